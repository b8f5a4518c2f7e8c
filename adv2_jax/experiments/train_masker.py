"""Training the masker of RTS by eq. 8, and whether its maps explain: what the classifier makes of what they show and hide."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import ArrayLike, NDArray

from adv2_jax import metrics
from adv2_jax.attacks import explain
from adv2_jax.blending import alternative, blend
from adv2_jax.classifier import num_classes
from adv2_jax.data import ImageSet
from adv2_jax.experiments import fit
from adv2_jax.experiments.fit import NOWHERE, Images, Kept, Labels, Losses, check_examples
from adv2_jax.experiments.select import select
from adv2_jax.experiments.train import Labelled
from adv2_jax.interpreters import INTERPRETERS
from adv2_jax.interpreters.rts import MaskWeights, log_probability, mask_loss, size_loss
from adv2_jax.models import Masked, Masker
from adv2_jax.types import Classifier, Image, Label, Map


@dataclass(frozen=True, kw_only=True)
class Recipe(fit.Recipe):
    """How a masker is trained.

    Attributes:
        variation, area, removal, power, area_power: of eq. 8, 0 or more (see `MaskWeights`).
        absent: share of the images, by chance, of which the map of another class is asked, in [0, 1); it should be empty.
        tune: whether to train the encoder too; its BatchNorm statistics stay as they are in any case.

    Raises:
        ValueError: names the option that is out of its range.
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    variation: float = MaskWeights().variation
    area: float = MaskWeights().area
    removal: float = MaskWeights().removal
    power: float = MaskWeights().power
    area_power: float = MaskWeights().area_power
    absent: float = 0.3
    tune: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in MaskWeights._fields:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 <= self.absent < 1:
            raise ValueError(f"absent must lie in [0, 1), got {self.absent}")

    @property
    def weights(self) -> MaskWeights:
        """λ1 to λ4."""
        return MaskWeights(**{name: getattr(self, name) for name in MaskWeights._fields})


def train_masker(
    masker: Masker, classifier: Classifier, images: Images, labels: Labels, *, kept: Kept = NOWHERE, **options: Any
) -> tuple[Masker, Losses]:
    """Trains a copy of a masker to explain a classifier (eq. 8), then measures the mean features of each class.

    The same arguments give the same weights, interrupted and resumed or not.

    Args:
        masker: its present weights are the start.
        classifier: f of eq. 8; stays as it is. Need not be the encoder.
        images: uint8 `[N, H, W, 3]`, N >= `batch_size`.
        labels: integers `[N]` in 0..K-1.
        kept: where the run is kept and how it is followed.
        **options: the attributes of `Recipe`.

    Returns:
        The trained masker, and the loss of every step `[steps]`.

    Raises:
        ValueError: an option is out of its range; images, labels, classifier and masker do not fit each other or `batch_size`; or
            as for `fit.fit`.
    """
    recipe = Recipe(**options)
    check_examples(images, labels, recipe.batch_size, lambda image: num_classes(classifier, image.shape))
    masker.check(num_classes(classifier, images.shape[1:]), images.shape[1:])
    trained, losses = fit.fit(
        masker,
        partial(batch_loss, recipe=recipe),
        images,
        labels,
        recipe,
        kept,
        constants=classifier,
        trainable=nnx.Param if recipe.tune else nnx.All(nnx.Param, nnx.Not(nnx.PathContains("encoder"))),
        prepare=_prepare,
    )
    trained.means[...] = class_means(trained, images, labels)
    return trained, losses


def _prepare(masker: Masker) -> None:
    masker.train()
    masker.encoder.eval()


def batch_loss(masker: Any, classifier: Classifier, key: Array, images: Array, labels: Array, *, recipe: Recipe) -> Array:
    """Mean over a batch of eq. 8, or of its first two terms where a class is asked for that is not shown.

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
    masks = masker(images, jnp.where(absent, others, labels))

    def one(x: Image, y: Label, m: Map, key: Array) -> Array:
        return mask_loss(classifier, x, y, m, alternative(key, x), recipe.weights)

    shown = jax.vmap(one)(images, labels, masks, jax.random.split(alternative_key, n))
    return jnp.where(absent, jax.vmap(lambda m: size_loss(m, recipe.weights))(masks), shown).mean()


def class_means(masker: Masker, images: Images, labels: Labels, *, batch_size: int = 64) -> Array:
    """Mean over images and positions of the encoder's last features, a class each: [N, H, W, 3], [N] -> [K, C].

    A class without images has the mean of all images.
    """
    starts = range(0, len(images), batch_size)
    pooled = np.concatenate([_pooled(masker.encoder, images[i : i + batch_size] / np.float32(255)) for i in starts])
    sums = np.zeros(masker.means.shape)
    np.add.at(sums, labels, pooled)
    counts = np.bincount(labels, minlength=len(sums))[:, None]
    return jnp.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), pooled.mean(0)), jnp.float32)


@jax.jit
def _pooled(encoder: Any, images: Array) -> Array:
    return encoder.features(images).mean(axis=(-3, -2))


class Quality(NamedTuple):
    """Do maps explain? Means over N images; `inside` and `outside` over all their pixels there.

    Attributes:
        n: images.
        kept: f_c(φ(x; m)) / f_c(x), what is left of the confidence where only what the map marks is shown.
        removed: f_c(φ(x; 1 - m)), the confidence where what it marks is hidden.
        inside, outside: the map on the object and beside it; None where the object is not known, like the next two.
        pointing_game: share of maps whose largest value lies on the object.
        iou: of the map at .5 and the object.
    """

    n: int
    kept: float
    removed: float
    inside: float | None = None
    outside: float | None = None
    pointing_game: float | None = None
    iou: float | None = None


def quality(
    classifier: Classifier,
    images: Images,
    labels: Labels,
    maps: ArrayLike,
    masks: NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Quality:
    """Whether maps explain a classifier.

    Args:
        classifier: f.
        images: uint8 [N, H, W, 3].
        labels: [N] the classes c the maps explain.
        maps: [N, h, w] in [0, 1], of any interpreter.
        masks: [N, H, W], where the objects are, if known.
        seed: of what φ blends in.
        batch_size: images at a time; changes memory and speed, not the result.
    """
    m, keys = np.asarray(maps, np.float32), jax.random.split(jax.random.key(seed), len(images))
    parts = []
    for i in range(0, len(images), batch_size):
        batch = slice(i, i + batch_size)
        parts.append(_shares(classifier, images[batch] / np.float32(255), labels[batch], m[batch], keys[batch]))
    kept, removed = (float(np.concatenate(part).mean()) for part in zip(*parts, strict=True))
    return Quality(len(images), kept, removed, *(() if masks is None else _against_truth(m, masks)))


def to_explain(classifier: Classifier, held_out: Labelled, *, limit: int = 200, batch_size: int = 64) -> ImageSet:
    """The first held-out images that the classifier gets right: what `qualities` are measured on.

    Raises:
        ValueError: as `select`.
    """
    images = ImageSet(held_out.images, held_out.labels, masks=held_out.masks)
    return select(classifier, images, limit=limit, batch_size=batch_size).images


def qualities(model: Masked, images: ImageSet, *, batch_size: int = 64) -> dict[str, Quality]:
    """Every interpreter on the same images, RTS first.

    Args:
        model: a classifier and its masker.
        images: with labels that the classifier predicts, and masks if known (`to_explain`).
        batch_size: images at a time.
    """
    assert images.labels is not None
    found = {}
    for name in sorted(INTERPRETERS, key=lambda name: name != "rts"):
        _, maps = explain(model, images.images, images.labels, interpreter=name, batch_size=batch_size)
        found[name] = quality(model.classifier, images.images, images.labels, maps, images.masks, batch_size=batch_size)
    return found


@jax.jit
def _shares(classifier: Classifier, images: Array, labels: Array, maps: Array, keys: Array) -> tuple[Array, Array]:
    def one(x: Image, y: Label, m: Map, key: Array) -> tuple[Array, Array]:
        other = alternative(key, x)
        whole, kept, removed = (log_probability(classifier, shown, y) for shown in (x, blend(x, m, other), blend(x, 1 - m, other)))
        return jnp.exp(kept - whole), jnp.exp(removed)

    return jax.vmap(one)(images, labels, maps, keys)


def _against_truth(maps: NDArray[np.floating[Any]], masks: NDArray[np.bool_]) -> list[float]:
    """`inside`, `outside`, `pointing_game` and `iou` of `Quality`."""
    shape = (len(masks), *masks.shape[1:])
    m = np.asarray(jax.image.resize(maps, shape, "bilinear", antialias=False))
    measures = (m[masks], m[~masks], metrics.pointing_game(maps, masks), metrics.iou_threshold(m, masks))
    return [float(np.mean(values)) for values in measures]
