"""Which images are attacked: those the network gets right. And whether the network is used as it was trained."""

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
CHANCE = 1e-3  # of refusing a network that is indifferent to the range or the order
DOUBT = "the order of its classes may be another than that of the labels, or the range of its images another than [0, 1]"


class Selection(NamedTuple):
    """Images the network gets right, their positions [N] in the source, its number of classes, and
    how many it gets wrong.

    `source_labels` are the classes of all images.
    """

    images: ImageSet
    indices: np.ndarray
    num_classes: int
    left_out: int
    source_labels: np.ndarray


def select(
    model: Classifier, image_set: ImageSet, *, limit: int | None = None, batch_size: int = 32
) -> Selection:
    """The images a network gets right, at most `limit` of them. Of unlabelled images the label is
    the network's own prediction.

    Raises:
        ValueError: if the model is not a classifier or cannot take the images, its logits are not
            finite or are probabilities, it does well, and clearly better, with labels one higher or
            lower (of two classes: swapped) or on images of another range than [0, 1], a class is
            out of range, or no image is left. Few that are left are logged as a warning.
    """
    logits = predict(model, image_set.images, batch_size)
    _check_logits(logits)
    check_classes(image_set, logits.shape[-1])
    predicted = logits.argmax(axis=-1).astype(np.int32)
    labels = predicted if image_set.labels is None else image_set.labels
    sound = np.isfinite(logits).all(axis=-1)
    if not sound.all():
        log.warning(
            "the network gives logits that are not finite numbers on %s: left out",
            _named(image_set, ~sound),
        )
    image_set, right = image_set._replace(labels=labels), (predicted == labels) & sound
    if not right.all():
        _check_order(predicted, labels, logits.shape[-1])
        _check_range(model, image_set, right, batch_size)
    if not right.any():
        advice = image_set.advice or DOUBT
        raise ValueError(
            f"the network gets none of the {len(right)} images right: nothing to attack; {advice}"
        )
    if 2 * right.sum() < len(right):
        log.warning(
            "the network gets %d of the %d images right; %s", right.sum(), len(right), DOUBT
        )
    index = np.flatnonzero(right).astype(np.int32)[:limit]
    chosen = image_set.take(index)
    positions = index if chosen.positions is None else chosen.positions
    return Selection(chosen, positions, logits.shape[-1], int((~right).sum()), labels)


def _named(image_set: ImageSet, which: np.ndarray) -> str:
    """The names of some images, or their places."""
    names = np.flatnonzero(which) if image_set.names is None else image_set.names[which]
    return f"image {listed([str(name) for name in names], ', ')}"


def predict(
    model: Classifier, images: np.ndarray, batch_size: int, all_may_fail: bool = False
) -> np.ndarray:
    """Logits [N, K] of images, as `explain` gives them."""
    nobody = np.zeros(len(images), np.int32)
    return explain(
        model, images, nobody, interpreter=no_map, batch_size=batch_size, all_may_fail=all_may_fail
    )[0]


def _check_logits(logits: np.ndarray) -> None:
    """Probabilities would do as logits in part: the right class, the wrong confidence and gradients."""
    if (logits >= 0).all() and np.allclose(logits.sum(-1), 1, atol=1e-3):
        raise ValueError(
            "head gives probabilities (0 or more, sum 1); it must give logits, before the softmax"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled:
    """A network that is given images of another range."""

    model: Classifier
    scale: Array
    shift: Array

    def logits(self, image: Image, act: Activation | None = None) -> Logits:
        """As the network's, of scale * image + shift."""
        return logits_of(self.model, self.scale[None, None] * image + self.shift[None, None], act)


def _check_order(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Refuses labels that count classes from another number than the network, or two classes that are swapped."""
    for shift, word in ((-1, "lower"), (1, "higher")):
        other = (labels + shift) % num_classes
        if _does_better(predicted == other, predicted == labels, labels):
            raise ValueError(
                f"the network gets {(predicted == labels).sum() or 'none'} of the {len(labels)} images right, but "
                f"{(predicted == other).sum()} with {'the two classes swapped' if num_classes == 2 else f'labels one {word}'}: "
                "labels must count from 0, in the order of the network's classes"
            )


def _check_range(
    model: Classifier, image_set: ImageSet, right: np.ndarray, batch_size: int
) -> None:
    """Refuses a network that was trained on another range than [0, 1] and is not told to scale."""
    # not the first: folders are read a class after the other
    some = np.arange(0, len(right), -(-len(right) // TRIED))
    image_set, right = image_set.take(some), right[some]
    assert image_set.labels is not None
    if right.any() and _by_chance(int((~right).sum()), 0) >= CHANCE:
        return  # too few are wrong to tell
    for name, (scale, shift) in RANGES.items():
        rescaled = Rescaled(model, jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
        better = (
            predict(rescaled, image_set.images, batch_size, all_may_fail=True).argmax(-1)
            == image_set.labels
        )
        if _does_better(better, right, image_set.labels):
            raise ValueError(
                f"the network gets {better.sum()} of {len(right)} images right when they are scaled to {name}, "
                f"{right.sum()} in [0, 1]: features must take images in [0, 1] and scale them inside"
            )


def _does_better(other: np.ndarray, right: np.ndarray, labels: np.ndarray) -> bool:
    """Whether another way to use a network is right more often than the present one, and than one
    answer for all images is.

    Both count: where labels are wrong, a network does better on images that it cannot read.
    """
    from scipy.stats import binomtest  # takes a second: only where it is used

    n, k, chance = len(labels), int(other.sum()), max(np.bincount(labels)) / len(labels)
    if k <= chance * n or (
        k < n and binomtest(k, n, chance, alternative="greater").pvalue >= CHANCE
    ):
        return False
    return (
        not right.any()
        or _by_chance(int((other & ~right).sum()), int((right & ~other).sum())) < CHANCE
    )


def _by_chance(gained: int, lost: int) -> float:
    """Sign test: the probability of so many gains or more if gains and losses were as likely."""
    from scipy.stats import binomtest

    return (
        float(binomtest(gained, gained + lost, alternative="greater").pvalue)
        if gained + lost
        else 1.0
    )
