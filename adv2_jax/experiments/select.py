"""Which images are attacked: those the network gets right. And whether the network is used as it was trained."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax.activations import relu
from adv2_jax.attack import explain, no_map
from adv2_jax.data import ImageSet
from adv2_jax.data.sources import check_classes
from adv2_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD
from adv2_jax.types import Activation, Classifier, Features, Image, Logits

RANGES = {  # scale and shift of the [0, 1] image
    "0..255": (np.full(3, 255.0), np.zeros(3)),
    "-1..1": (np.full(3, 2.0), -np.ones(3)),
    "ImageNet's mean 0 and standard deviation 1": (
        1 / np.array(IMAGENET_STD),
        -np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD),
    ),
}
TRIED = 64  # images that the other ranges are tried on
CHANCE = 1e-3  # of refusing a network that is indifferent to the range


class Selection(NamedTuple):
    """Images the network gets right, their positions [N] in the source, its number of classes, and how many it gets wrong.

    `source_labels` are the classes of all images.
    """

    images: ImageSet
    indices: np.ndarray
    num_classes: int
    left_out: int
    source_labels: np.ndarray


def select(model: Classifier, image_set: ImageSet, *, limit: int | None = None, batch_size: int = 32) -> Selection:
    """The images a network gets right, at most `limit` of them. Of unlabelled images the label is the network's own prediction.

    Raises:
        ValueError: if the model is not a classifier or cannot take the images, its logits are not finite or are probabilities, it
            does clearly better on images of another range than [0, 1], a class is out of range, or no image is left.
    """
    logits = _logits(model, image_set.images, batch_size)
    _check_logits(logits)
    check_classes(image_set, logits.shape[-1])
    predicted = logits.argmax(axis=-1).astype(np.int32)
    labels = predicted if image_set.labels is None else image_set.labels
    image_set, right = image_set._replace(labels=labels), predicted == labels
    if not right.all():
        _check_range(model, image_set, right, batch_size)
    if not right.any():
        raise ValueError(f"the network gets none of the {len(right)} images right: nothing to attack")
    index = np.flatnonzero(right).astype(np.int32)[:limit]
    chosen = image_set.take(index)
    positions = index if chosen.positions is None else chosen.positions
    return Selection(chosen, positions, logits.shape[-1], int((~right).sum()), labels)


def _logits(model: Classifier, images: np.ndarray, batch_size: int) -> np.ndarray:
    return explain(model, images, np.zeros(len(images), np.int32), interpreter=no_map, batch_size=batch_size)[0]


def _check_logits(logits: np.ndarray) -> None:
    """Probabilities would do as logits in part: the right class, the wrong confidence and gradients."""
    if (logits >= 0).all() and np.allclose(logits.sum(-1), 1, atol=1e-3):
        raise ValueError("head gives probabilities (0 or more, sum 1); it must give logits, before the softmax")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled:
    """A network that is given images of another range."""

    model: Classifier
    scale: Array
    shift: Array

    def features(self, image: Image, act: Activation = relu) -> Features:
        """As the network's, of scale * image + shift."""
        return self.model.features(self.scale * image + self.shift, act=act)

    def head(self, features: Features) -> Logits:
        """As the network's."""
        return self.model.head(features)


def _check_range(model: Classifier, image_set: ImageSet, right: np.ndarray, batch_size: int) -> None:
    """Refuses a network that was trained on another range than [0, 1] and is not told to scale."""
    assert image_set.labels is not None
    images, labels, right = image_set.images[:TRIED], image_set.labels[:TRIED], right[:TRIED]
    if right.any() and _by_chance(int((~right).sum()), 0) >= CHANCE:
        return  # too few are wrong to tell
    for name, (scale, shift) in RANGES.items():
        rescaled = Rescaled(model, jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
        better = _logits(rescaled, images, batch_size).argmax(-1) == labels
        gained, lost = int((better & ~right).sum()), int((right & ~better).sum())
        if _by_chance(gained, lost) < CHANCE or (not right.any() and better.mean() > 0.5):
            raise ValueError(
                f"the network gets {better.sum()} of {len(right)} images right when they are scaled to {name}, "
                f"{right.sum()} in [0, 1]: features must take images in [0, 1] and scale them inside"
            )


def _by_chance(gained: int, lost: int) -> float:
    """Sign test: the probability of so many gains or more if gains and losses were as likely."""
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n
