"""Faithfulness of maps: the confidence of a classifier on what they mark, and on the rest."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from adv2_jax import metrics
from adv2_jax.attacks import batches, explain
from adv2_jax.blending import alternative, blend
from adv2_jax.data import ImageSet
from adv2_jax.interpreters import PAPER
from adv2_jax.interpreters.masker_maps import log_probability
from adv2_jax.models import ClassifierWithMasker
from adv2_jax.runs.select import select
from adv2_jax.types import Classifier, Image, Label, Map


class Quality(NamedTuple):
    """Measures of how well maps explain, means over N images.

    Attributes:
        n: images.
        confidence_kept: f_c(φ(x; m)) / f_c(x), the share of the confidence that is left where only
            the marked region is shown.
        confidence_removed: f_c(φ(x; 1 - m)), the confidence where the marked region is hidden.
        inside, outside: mean of the map over all pixels on the objects, and over all beside them;
            None where the objects are not known, like the next two.
        pointing_game: share of maps whose largest value lies on the object.
        iou: intersection over union of the map, cut at 0.5, and the object.
    """

    n: int
    confidence_kept: float
    confidence_removed: float
    inside: float | None = None
    outside: float | None = None
    pointing_game: float | None = None
    iou: float | None = None


def quality(
    classifier: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    maps: ArrayLike,
    objects: np.ndarray | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Quality:
    """Measure how well maps explain a classifier.

    Args:
        classifier: f.
        images: uint8 [N, H, W, 3].
        labels: [N] the classes c that the maps explain.
        maps: [N, h, w] in [0, 1], of any interpreter.
        objects: bool [N, H, W], True on the objects, if known.
        seed: of the images that φ blends in.
        batch_size: images at a time; changes memory and speed, not the result.
    """
    # a key for each image before batches are cut: results do not depend on their size
    m, keys = np.asarray(maps, np.float32), jax.random.split(jax.random.key(seed), len(images))
    shares = [
        _shares(classifier, x / np.float32(255), *rest)
        for x, *rest in batches((images, labels, m, keys), batch_size)
    ]
    # the last batch is padded; summed in float64, so that the batch size changes no digit
    kept, removed = np.concatenate(shares)[: len(images)].mean(0, dtype=float).tolist()
    measures = Quality(len(images), kept, removed)
    if objects is None:
        return measures
    # without antialias: maps are enlarged, and a map as large as its image stays as it is
    large = np.asarray(jax.image.resize(m, objects.shape, "bilinear", antialias=False))
    return measures._replace(
        inside=float(large[objects].mean()),
        outside=float(large[~objects].mean()),
        pointing_game=float(metrics.pointing_game(m, objects).mean()),
        iou=float(metrics.iou_threshold(large, objects).mean()),
    )


def to_explain(
    classifier: Classifier, held_out: ImageSet, *, limit: int = 200, batch_size: int = 64
) -> ImageSet:
    """Return the first held-out images that the classifier gets right, for `qualities`.

    Raises:
        ValueError: as `select`.
    """
    return select(classifier, held_out, limit=limit, batch_size=batch_size).images


def qualities(
    model: ClassifierWithMasker, images: ImageSet, *, batch_size: int = 64
) -> dict[str, Quality]:
    """Measure the interpreters of the paper on the same images, RTS first.

    Args:
        model: a classifier and its masker.
        images: with labels that the classifier predicts, and objects if known (`to_explain`).
        batch_size: images at a time.

    Returns:
        The measures of each interpreter, by its name.
    """
    assert images.labels is not None
    # read once for all interpreters
    x, y = np.asarray(images.images), images.labels
    measures = {}
    # a stable sort: RTS, which was trained, first, the others in their usual order
    for name in sorted(PAPER, key=lambda name: name != "rts"):
        _, maps = explain(model, x, y, interpreter=name, batch_size=batch_size)
        measures[name] = quality(
            model.classifier, x, y, maps, images.objects, batch_size=batch_size
        )
    return measures


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0, 0, 0))
def _shares(classifier: Classifier, x: Image, label: Label, m: Map, key: Array) -> Array:
    """Return `confidence_kept` and `confidence_removed` of one image, [2]."""
    # one alternative for both blends: they differ by the map alone
    other = alternative(key, x)
    whole, left, removed = (
        log_probability(classifier, shown, label)
        for shown in (x, blend(x, m, other), blend(x, 1 - m, other))
    )
    # a ratio by its logarithms: f_c(x) may round to 0
    return jnp.exp(jnp.stack([left - whole, removed]))
