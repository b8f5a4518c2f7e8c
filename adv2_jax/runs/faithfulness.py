"""Whether maps explain a classifier: what it makes of what they show and of what they hide."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike, NDArray

from adv2_jax import metrics
from adv2_jax.attacks import explain
from adv2_jax.blending import alternative, blend
from adv2_jax.data import ImageSet
from adv2_jax.interpreters import INTERPRETERS
from adv2_jax.interpreters.masker_maps import log_probability
from adv2_jax.models import ClassifierWithMasker
from adv2_jax.runs.select import select
from adv2_jax.types import Classifier, Image, Label, Map

Images = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]


class Quality(NamedTuple):
    """Do maps explain? Means over N images; `inside` and `outside` over all their pixels there.

    Attributes:
        n: images.
        confidence_kept: f_c(φ(x; m)) / f_c(x), what is left of the confidence where only what the
            map marks is shown.
        confidence_removed: f_c(φ(x; 1 - m)), the confidence where what it marks is hidden.
        inside, outside: the map on the object and beside it; None where the object is not known,
            like the next two.
        pointing_game: share of maps whose largest value lies on the object.
        iou: of the map at .5 and the object.
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
    images: Images,
    labels: Labels,
    maps: ArrayLike,
    objects: NDArray[np.bool_] | None = None,
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
        objects: [N, H, W], where the objects are, if known.
        seed: of what φ blends in.
        batch_size: images at a time; changes memory and speed, not the result.
    """
    m, keys = np.asarray(maps, np.float32), jax.random.split(jax.random.key(seed), len(images))
    parts = []
    for i in range(0, len(images), batch_size):
        batch = slice(i, i + batch_size)
        parts.append(
            _shares(
                classifier, images[batch] / np.float32(255), labels[batch], m[batch], keys[batch]
            )
        )
    kept, removed = (float(np.concatenate(part).mean()) for part in zip(*parts, strict=True))
    return Quality(
        len(images), kept, removed, *(() if objects is None else _against_objects(m, objects))
    )


def to_explain(
    classifier: Classifier, held_out: ImageSet, *, limit: int = 200, batch_size: int = 64
) -> ImageSet:
    """The first held-out images that the classifier gets right: what `qualities` are measured on.

    Raises:
        ValueError: as `select`.
    """
    return select(classifier, held_out, limit=limit, batch_size=batch_size).images


def qualities(
    model: ClassifierWithMasker, images: ImageSet, *, batch_size: int = 64
) -> dict[str, Quality]:
    """Every interpreter on the same images, RTS first.

    Args:
        model: a classifier and its masker.
        images: with labels that the classifier predicts, and objects if known (`to_explain`).
        batch_size: images at a time.
    """
    assert images.labels is not None
    found = {}
    for name in sorted(INTERPRETERS, key=lambda name: name != "rts"):
        _, maps = explain(
            model, images.images, images.labels, interpreter=name, batch_size=batch_size
        )
        found[name] = quality(
            model.classifier,
            images.images,
            images.labels,
            maps,
            images.objects,
            batch_size=batch_size,
        )
    return found


@jax.jit
def _shares(
    classifier: Classifier, images: Array, labels: Array, maps: Array, keys: Array
) -> tuple[Array, Array]:
    def one(x: Image, y: Label, m: Map, key: Array) -> tuple[Array, Array]:
        other = alternative(key, x)
        whole, kept, removed = (
            log_probability(classifier, shown, y)
            for shown in (x, blend(x, m, other), blend(x, 1 - m, other))
        )
        return jnp.exp(kept - whole), jnp.exp(removed)

    return jax.vmap(one)(images, labels, maps, keys)


def _against_objects(maps: NDArray[np.floating[Any]], objects: NDArray[np.bool_]) -> list[float]:
    """`inside`, `outside`, `pointing_game` and `iou` of `Quality`."""
    shape = (len(objects), *objects.shape[1:])
    m = np.asarray(jax.image.resize(maps, shape, "bilinear", antialias=False))
    measures = (
        m[objects],
        m[~objects],
        metrics.pointing_game(maps, objects),
        metrics.iou_threshold(m, objects),
    )
    return [float(np.mean(values)) for values in measures]
