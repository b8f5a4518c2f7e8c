"""The choice of images a network gets right, and checks that it is used as it was trained."""

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax.attacks import explain, no_map
from adv2_jax.capabilities import logits_of
from adv2_jax.data import ImageSet
from adv2_jax.data.images import check_classes
from adv2_jax.data.lazy import Images
from adv2_jax.errors import listed
from adv2_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD
from adv2_jax.types import Activation, Classifier, Image, Logits

log = logging.getLogger(__name__)

RANGES = {  # scale and shift of the [0, 1] image
    "0..255": (np.full(3, 255.0), np.zeros(3)),
    "-1..1": (np.full(3, 2.0), -np.ones(3)),
    "ImageNet's mean 0 and standard deviation 1": (
        1 / np.array(IMAGENET_STD),
        -np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD),
    ),
}
TRIED = 64  # images that the other ranges are tried on
# probability of refusing a network that is indifferent to the range or the order
SIGNIFICANCE = 1e-3
DOUBT = (
    "the order of its classes may be another than that of the labels, "
    "or the range of its images another than [0, 1]"
)


class Selection(NamedTuple):
    """The images that are attacked.

    Attributes:
        images: N that the network gets right, with labels.
        indices: int [N], their positions in the source.
        num_classes: K of the network.
        left_out: number of images that it gets wrong.
        source_labels: [M], the classes of all images, right or wrong.
    """

    images: ImageSet
    indices: np.ndarray
    num_classes: int
    left_out: int
    source_labels: np.ndarray


def select(
    model: Classifier,
    image_set: ImageSet,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    devices: int | None = None,
) -> Selection:
    """Return the images a network gets right, at most `limit` of them.

    The label of an unlabelled image is the network's own prediction. Where the network gets less
    than half of the images right, and where its logits are not finite, a warning is logged.

    Raises:
        ValueError: if the model is not a classifier or cannot take the images, its logits are not
            finite or are probabilities, it does well, and clearly better, with labels one higher or
            lower (of two classes: swapped) or on images of another range than [0, 1], a class is
            out of range, or no image is left.
    """
    logits = predict(model, image_set.images, batch_size, devices=devices)
    # would do as logits in part: the right classes, wrong confidences and gradients
    if (logits >= 0).all() and np.allclose(logits.sum(-1), 1, atol=1e-3):
        raise ValueError(
            "head gives probabilities (0 or more, sum 1); it must give logits, before the softmax"
        )
    n, num_classes = logits.shape
    check_classes(image_set, num_classes)
    predicted = logits.argmax(axis=-1).astype(np.int32)
    labels = predicted if image_set.labels is None else image_set.labels
    finite = np.isfinite(logits).all(axis=-1)
    if not finite.all():
        names = np.arange(n) if image_set.names is None else image_set.names
        log.warning(
            "the network gives logits that are not finite numbers on image %s: left out",
            listed([str(name) for name in names[~finite]], ", "),
        )
    image_set, right = image_set._replace(labels=labels), (predicted == labels) & finite
    if not right.all():
        _check_order(predicted, labels, num_classes)
        _check_range(model, image_set.images, labels, right, batch_size)
    if not right.any():
        advice = image_set.advice or DOUBT
        raise ValueError(
            f"the network gets none of the {n} images right: nothing to attack; {advice}"
        )
    if 2 * right.sum() < n:
        log.warning("the network gets %d of the %d images right; %s", right.sum(), n, DOUBT)
    indices = np.flatnonzero(right).astype(np.int32)[:limit]
    chosen = image_set.take(indices)
    positions = indices if chosen.positions is None else chosen.positions
    return Selection(chosen, positions, num_classes, int((~right).sum()), labels)


def predict(
    model: Classifier,
    images: Images,
    batch_size: int,
    all_may_fail: bool = False,
    devices: int | None = None,
) -> np.ndarray:
    """Return the logits [N, K] of images, as `explain` gives them."""
    # no map is drawn: any class will do
    classes = np.zeros(len(images), np.int32)
    return explain(
        model,
        images,
        classes,
        interpreter=no_map,
        batch_size=batch_size,
        all_may_fail=all_may_fail,
        devices=devices,
    )[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled:
    """A network that is given images of another range."""

    model: Classifier
    scale: Array
    shift: Array

    def logits(self, image: Image, act: Activation | None = None) -> Logits:
        """Return the network's, of scale * image + shift."""
        return logits_of(self.model, self.scale[None, None] * image + self.shift[None, None], act)


def _check_order(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Refuse labels that count classes from another number than the network, or swap two."""
    right = predicted == labels
    for shift, word in ((-1, "lower"), (1, "higher")):
        hits = predicted == (labels + shift) % num_classes
        if _does_better(hits, right, labels):
            change = "the two classes swapped" if num_classes == 2 else f"labels one {word}"
            raise ValueError(
                f"the network gets {right.sum() or 'none'} of the {len(labels)} images right, "
                f"but {hits.sum()} with {change}: "
                "labels must count from 0, in the order of the network's classes"
            )


def _check_range(
    model: Classifier, images: Images, labels: np.ndarray, right: np.ndarray, batch_size: int
) -> None:
    """Refuse a network that was trained on another range than [0, 1] and does not rescale."""
    # not the first: folders are read a class after the other
    some = np.arange(0, len(right), -(-len(right) // TRIED))
    images, labels, right = images[some], labels[some], right[some]
    n, wrong = len(right), int((~right).sum())
    if right.any() and _p_value(wrong, wrong) >= SIGNIFICANCE:
        return  # too few are wrong to tell
    for name, (scale, shift) in RANGES.items():
        rescaled = Rescaled(model, jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
        hits = predict(rescaled, images, batch_size, all_may_fail=True).argmax(-1) == labels
        if _does_better(hits, right, labels):
            raise ValueError(
                f"the network gets {hits.sum()} of {n} images right "
                f"when they are scaled to {name}, {right.sum()} in [0, 1]: "
                "features must take images in [0, 1] and scale them inside"
            )


def _does_better(hits: np.ndarray, right: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether another use of a network beats the present one, and one answer for all images.

    Both count: where labels are wrong, a network does better on images that it cannot read.

    Args:
        hits: bool [N], where the other use is right.
        right: bool [N], where the present one is.
        labels: [N].
    """
    n, k, share = len(labels), int(hits.sum()), max(np.bincount(labels)) / len(labels)
    does_well = k > share * n and (k == n or _p_value(k, n, share) < SIGNIFICANCE)
    # sign test: images on which the two agree say nothing
    gained, lost = int((hits & ~right).sum()), int((right & ~hits).sum())
    return does_well and (not right.any() or _p_value(gained, gained + lost) < SIGNIFICANCE)


def _p_value(k: int, n: int, chance: float = 0.5) -> float:
    """Return the probability of k hits or more in n trials; 1 of no trials (binomial test)."""
    from scipy.stats import binomtest  # takes a second: only where it is used

    return float(binomtest(k, n, chance, alternative="greater").pvalue) if n else 1.0
