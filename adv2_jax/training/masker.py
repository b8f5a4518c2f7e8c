"""Training the masker of RTS by eq. 8."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adv2_jax.blending import alternative
from adv2_jax.capabilities import num_classes
from adv2_jax.interpreters.masker_maps import SaliencyWeights, saliency_loss, size_loss
from adv2_jax.models import Masker
from adv2_jax.training.loop import (
    NO_CHECKPOINTS,
    Checkpointing,
    Images,
    Labels,
    Losses,
    Recipe,
    check_examples,
    fit,
)
from adv2_jax.types import Classifier, Image, Label, Map


@dataclass(frozen=True, kw_only=True)
class MaskerRecipe(Recipe):
    """How a masker is trained.

    Attributes:
        variation, area, removal, power, area_power: of eq. 8, 0 or more (see `SaliencyWeights`).
        absent: share of the images, by chance, of which the map of another class is asked, in [0,
            1); it should be empty.
        tune: whether to train the encoder too; its BatchNorm statistics stay as they are in any
            case.

    Raises:
        ValueError: names the option that is out of its range.
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    variation: float = SaliencyWeights().variation
    area: float = SaliencyWeights().area
    removal: float = SaliencyWeights().removal
    power: float = SaliencyWeights().power
    area_power: float = SaliencyWeights().area_power
    absent: float = 0.3
    tune: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SaliencyWeights._fields:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0 <= self.absent < 1:
            raise ValueError(f"absent must lie in [0, 1), got {self.absent}")

    @property
    def weights(self) -> SaliencyWeights:
        """λ1 to λ4."""
        return SaliencyWeights(**{name: getattr(self, name) for name in SaliencyWeights._fields})


def train_masker(
    masker: Masker,
    classifier: Classifier,
    images: Images,
    labels: Labels,
    *,
    checkpointing: Checkpointing = NO_CHECKPOINTS,
    **options: Any,
) -> tuple[Masker, Losses]:
    """Trains a copy of a masker to explain a classifier (eq. 8), then measures the mean features of
    each class.

    The same arguments give the same weights, interrupted and resumed or not.

    Args:
        masker: its present weights are the start.
        classifier: f of eq. 8; stays as it is. Need not be the encoder.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: integers `[N]` in 0..K-1.
        checkpointing: where the run is kept and how it is followed.
        **options: the attributes of `MaskerRecipe`.

    Returns:
        The trained masker, and the loss of every step `[steps]`.

    Raises:
        ValueError: an option is out of its range; images, labels, classifier and masker do not fit
            each other or `batch_size`; or as for `loop.fit`.
    """
    recipe = MaskerRecipe(**options)
    check_examples(
        images, labels, recipe.batch_size, lambda image: num_classes(classifier, image.shape)
    )
    masker.check(num_classes(classifier, images.shape[1:]), images.shape[1:])
    trained, losses = fit(
        masker,
        partial(batch_loss, recipe=recipe),
        images,
        labels,
        recipe,
        checkpointing,
        constants=classifier,
        trainable=nnx.Param
        if recipe.tune
        else nnx.All(nnx.Param, nnx.Not(nnx.PathContains("encoder"))),
        prepare=_prepare,
    )
    trained.means[...] = class_means(trained, images, labels)
    return trained, losses


def _prepare(masker: Masker) -> None:
    masker.train()
    masker.encoder.eval()


def batch_loss(
    masker: Any,
    classifier: Classifier,
    key: Array,
    images: Array,
    labels: Array,
    *,
    recipe: MaskerRecipe,
) -> Array:
    """Mean over a batch of eq. 8, or of its first two terms where a class is asked for that is not
    shown.

    Args:
        masker: sees the batch as a whole, for BatchNorm.
        classifier: f of eq. 8.
        key: of the classes asked for and of what φ blends in.
        images: [B, H, W, 3] in [0, 1].
        labels: [B].
        recipe: weights and the share of absent classes.

    Returns:
        [].
    """
    absent_key, class_key, alternative_key = jax.random.split(key, 3)
    n, k = len(labels), len(masker.embedding[...])
    absent = jax.random.bernoulli(absent_key, recipe.absent, (n,))
    others = (labels + jax.random.randint(class_key, (n,), 1, k)) % k
    maps = masker(images, jnp.where(absent, others, labels))

    def one(x: Image, y: Label, m: Map, key: Array) -> Array:
        return saliency_loss(classifier, x, y, m, alternative(key, x), recipe.weights)

    shown = jax.vmap(one)(images, labels, maps, jax.random.split(alternative_key, n))
    return jnp.where(absent, jax.vmap(lambda m: size_loss(m, recipe.weights))(maps), shown).mean()


def class_means(masker: Masker, images: Images, labels: Labels, *, batch_size: int = 64) -> Array:
    """Mean over images and positions of the encoder's last features, a class each: [N, H, W, 3],
    [N] -> [K, C].

    A class without images has the mean of all images.
    """
    starts = range(0, len(images), batch_size)
    pooled = np.concatenate(
        [_pooled(masker.encoder, images[i : i + batch_size] / np.float32(255)) for i in starts]
    )
    sums = np.zeros(masker.means.shape)
    np.add.at(sums, labels, pooled)
    counts = np.bincount(labels, minlength=len(sums))[:, None]
    return jnp.asarray(
        np.where(counts > 0, sums / np.maximum(counts, 1), pooled.mean(0)), jnp.float32
    )


@jax.jit
def _pooled(encoder: Any, images: Array) -> Array:
    return encoder.features(images).mean(axis=(-3, -2))
