"""Training the masker of RTS by eq. 8 of ADV² (Dabkowski & Gal 2017)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adv2_jax.attacks import batches
from adv2_jax.blending import alternative
from adv2_jax.capabilities import num_classes
from adv2_jax.crafting import classes_of
from adv2_jax.data.lazy import ahead
from adv2_jax.interpreters.masker_maps import SaliencyWeights, saliency_loss, size_loss
from adv2_jax.models import ClassifierWithMasker, Masker
from adv2_jax.training import robust
from adv2_jax.training.loop import (
    NO_CHECKPOINTS,
    NOT_NEGATIVE,
    SHARE,
    Checkpointing,
    Images,
    Labels,
    Losses,
    Range,
    Recipe,
    check_examples,
    fit,
)
from adv2_jax.types import Classifier


@dataclass(frozen=True, kw_only=True)
class MaskerRecipe(Recipe):
    """The hyper-parameters of a training of a masker.

    Attributes:
        variation, area, removal, power, area_power: of eq. 8, 0 or more (see `SaliencyWeights`).
        absent: probability, in [0, 1), that the map of an image is asked for a class that it does
            not show; such a map should be empty.
        tune: whether to train the encoder too; its BatchNorm statistics stay as they are in any
            case.
        robust: "adv2", interpretation distillation (see `distillation_loss`), or None.
        epsilon: radius of the L∞ ball of its attack, in [1/255, 1].
        attack_steps: at least 1.
        distillation: weight of its loss. A positive one keeps the benign map, against attacks that
            aim at the map of another image; a negative one draws another map,
            against those that aim at the benign one.

    Raises:
        ValueError: names the option that is out of its range.
    """

    RANGES: ClassVar[dict[str, Range]] = {
        **Recipe.RANGES,
        **robust.RANGES,
        **dict.fromkeys(SaliencyWeights._fields, NOT_NEGATIVE),
        "absent": SHARE,
        "robust": ("be adv2", lambda name: name == "adv2"),
        "distillation": ("be finite", np.isfinite),
    }

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
    robust: str | None = None
    epsilon: float = 8 / 255
    attack_steps: int = 7
    distillation: float = 1.0

    @property
    def weights(self) -> SaliencyWeights:
        """The weights of eq. 8."""
        return SaliencyWeights(**{name: getattr(self, name) for name in SaliencyWeights._fields})


def train_masker(
    masker: Masker,
    classifier: Classifier,
    images: Images,
    labels: Labels,
    *,
    checkpointing: Checkpointing = NO_CHECKPOINTS,
    devices: int | None = None,
    **options: Any,
) -> tuple[Masker, Losses]:
    """Train a copy of a masker to explain a classifier (eq. 8), then measure its class means.

    The same arguments give the same weights, whether the run was interrupted and resumed or not.

    Args:
        masker: its present weights are the start.
        classifier: f of eq. 8; stays as it is. Need not be the encoder.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: integers `[N]` in 0..K-1.
        checkpointing: where to keep checkpoints, and whom to tell the losses.
        devices: as `loop.fit`.
        **options: the attributes of `MaskerRecipe`.

    Returns:
        The trained masker, and the loss of every step `[steps]`.

    Raises:
        ValueError: an option is out of its range; images, labels, classifier and masker do not fit
            each other or `batch_size`; or as `loop.fit`.
    """
    recipe = MaskerRecipe(**options)
    check_examples(
        images, labels, recipe.batch_size, lambda image: num_classes(classifier, image.shape)
    )
    masker.check(num_classes(classifier, images.shape[1:]), images.shape[1:])
    trained, losses = fit(
        masker,
        partial(distillation_loss if recipe.robust else batch_loss, recipe=recipe),
        images,
        labels,
        recipe,
        checkpointing,
        constants=classifier,
        trainable=nnx.Param
        if recipe.tune
        else nnx.All(nnx.Param, nnx.Not(nnx.PathContains("encoder"))),
        set_mode=_set_mode,
        adversary=partial(_beside_attacked, recipe=recipe) if recipe.robust else None,
        devices=devices,
    )
    # after the training: where the encoder is tuned, its features move
    trained.means[...] = class_means(trained, images, labels)
    return trained, losses


def _set_mode(masker: Masker) -> None:
    masker.train()
    # statistics of the encoder stay those that its weights were trained with, tuned or not
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
    """Return the mean over a batch of eq. 8, of its first two terms for classes not shown.

    Args:
        masker: sees the batch as a whole, for BatchNorm.
        classifier: f of eq. 8.
        key: of the classes asked for, and of the images that φ blends in.
        images: [B, H, W, 3] in [0, 1].
        labels: [B], the classes shown.
        recipe: weights and the share of absent classes.

    Returns:
        [].
    """
    absent_key, class_key, alternative_key = jax.random.split(key, 3)
    n, k = len(labels), len(masker.embedding[...])
    absent = jax.random.bernoulli(absent_key, recipe.absent, (n,))
    # 1..K-1 classes further: uniform over all classes but the one shown
    others = (labels + jax.random.randint(class_key, (n,), 1, k)) % k
    maps = masker(images, jnp.where(absent, others, labels))
    # eq. 8 for all: which images ask for an absent class is known only at run time
    shown = jax.vmap(
        lambda x, y, m, key: saliency_loss(classifier, x, y, m, alternative(key, x), recipe.weights)
    )(images, labels, maps, jax.random.split(alternative_key, n))
    return jnp.where(absent, jax.vmap(lambda m: size_loss(m, recipe.weights))(maps), shown).mean()


def distillation_loss(
    masker: Any,
    classifier: Classifier,
    key: Array,
    images: tuple[Array, Array],
    labels: Array,
    *,
    recipe: MaskerRecipe,
) -> Array:
    """Return eq. 8 on benign images, and the weighted map L1 between these and attacked ones.

    Adversarial interpretation distillation (ADV² §6.3): the map of an attacked image is that of the
    class that it is taken for; the benign map does not move for its sake.

    Args:
        masker, classifier, key, labels, recipe: as for `batch_loss`.
        images: benign and attacked, each [B, H, W, 3].

    Returns:
        [].
    """
    benign, attacked = images
    kept = jax.lax.stop_gradient(masker(benign, labels))
    seen = masker(attacked, classes_of(classifier, attacked, labels, "untargeted"))
    distance = jnp.abs(seen - kept).mean()
    loss = batch_loss(masker, classifier, key, benign, labels, recipe=recipe)
    return loss + recipe.distillation * distance


def _beside_attacked(
    masker: Masker,
    classifier: Classifier,
    key: Array,
    images: Array,
    labels: Array,
    *,
    recipe: MaskerRecipe,
) -> tuple[Array, Array]:
    """Return benign images, and those of ADV² on classifier and masker."""
    attacked = robust.adversarial(
        ClassifierWithMasker(classifier, masker),
        key,
        images,
        labels,
        robust.inner_attack("rts", recipe.attack_steps, recipe.epsilon),
        recipe.epsilon,
        # the map of the next image of the batch is none that this image should have
        partial(jnp.roll, shift=1, axis=0) if recipe.distillation > 0 else lambda maps: maps,
    )
    return images, attacked


def class_means(masker: Masker, images: Images, labels: Labels, *, batch_size: int = 64) -> Array:
    """Return the mean of the encoder's last features over images and positions, for each class.

    Args:
        masker: its encoder is measured.
        images: uint8 [N, H, W, 3].
        labels: [N].
        batch_size: images at a time; changes memory and speed, not the result.

    Returns:
        [K, C]. A class without images has the mean of all images.
    """
    pooled = np.concatenate(
        # by a float32: uint8 by a Python number is float64 in NumPy
        [
            _pooled(masker.encoder, np.asarray(x) / np.float32(255))
            for x in ahead(batches(images, batch_size))
        ],
        dtype=float,  # sums over many images lose digits in float32
    )[: len(images)]  # `batches` fills up the last one
    means = [
        pooled[shown if shown.any() else slice(None)].mean(0)
        for shown in (labels == c for c in range(len(masker.means[...])))
    ]
    return jnp.asarray(np.stack(means), jnp.float32)


@jax.jit
def _pooled(encoder: Any, images: Array) -> Array:
    return encoder.features(images).mean(axis=(-3, -2))
