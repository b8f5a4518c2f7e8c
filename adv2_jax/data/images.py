"""The image set that every source gives and every run takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adv2_jax.data.lazy import Images, LazyImages

Draw = Callable[[int], np.ndarray]  # N -> sorted indices of the images to be read


class ImageSet(NamedTuple):
    """N images; optional entries are None where the source has none.

    Attributes:
        images: uint8 [N, H, W, 3]; those of files are decoded on demand (`lazy.LazyImages`).
        labels: int32 [N]; None: unlabelled, the label is the network's own prediction.
        targets: int32 [N], target classes.
        target_maps: float32 [N, h, w] in [0, 1], the maps to be shown.
        objects: bool [N, H, W], True on the pixels of the labelled object.
        classes: names of the classes.
        names: unicode [N], file names relative to the folder.
        positions: int32 [N], indices of the images in their source, of which only a sample may have
            been read.
        classes_from: who says how many classes there are and in which order, for messages: "photos
            has 3 class folders". None: nobody, any network with a class for each label will do.
        advice: for labels that may have been read in another way than they were meant: what to do
            if the network gets many images wrong, in one line.
    """

    images: Images
    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    target_maps: np.ndarray | None = None
    objects: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    names: np.ndarray | None = None
    positions: np.ndarray | None = None
    classes_from: str | None = None
    advice: str | None = None

    def take(self, indices: np.ndarray) -> "ImageSet":
        """Return the images at `indices` [M] (integers, or booleans [N]); nothing is decoded."""
        taken: dict[str, Any] = {
            name: value.take(indices) if isinstance(value, LazyImages) else value[indices]
            for name, value in self._asdict().items()
            if isinstance(value, np.ndarray | LazyImages)
        }
        return self._replace(**taken)

    def decode(self) -> "ImageSet":
        """Return the set with all its images in memory."""
        return self._replace(images=np.asarray(self.images))


def check_classes(image_set: ImageSet, num_classes: int) -> None:
    """Refuse labels and targets without a class of the network, and class orders of another one.

    Raises:
        ValueError: names the image, its class and the number of classes; or who counts another
            number of classes.
    """
    # an order of other classes would give wrong labels that are all in range
    if image_set.classes_from and len(image_set.classes or ()) != num_classes:
        raise ValueError(
            f"{image_set.classes_from}, the network {num_classes} classes: "
            "name the classes with --classes FILE, one a line in the network's order"
        )
    for name, values in (("label", image_set.labels), ("target", image_set.targets)):
        if values is not None and values.max() >= num_classes:
            i = int(np.argmax(values))
            raise ValueError(
                f"{name} {values[i]} of image {i} is out of range: "
                f"the network has {num_classes} classes, 0..{num_classes - 1}"
                + (f"; {image_set.advice}" if image_set.advice else "")
            )


def check_integers(name: str, values: np.ndarray, n: int) -> None:
    """Refuse classes of n images that are no integers [n].

    Raises:
        ValueError: says what they are.
    """
    if values.dtype.kind not in "iu" or values.shape != (n,):
        raise ValueError(
            f"{name} must be integers [{n}], one an image, got {values.dtype} {list(values.shape)}"
        )


def check_range(name: str, values: np.ndarray, num_classes: int) -> None:
    """Refuse integers that are no classes of a network.

    Raises:
        ValueError: names the range, and the smallest and the largest of them.
    """
    if values.min() < 0 or values.max() >= num_classes:
        raise ValueError(
            f"{name} must lie in 0..{num_classes - 1}, the model's classes, "
            f"got {values.min()}..{values.max()}"
        )


def as_classes(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """Return the classes of n images as int32 [n].

    Raises:
        ValueError: they are no integers [n], or one is negative or beyond int32.
    """
    check_integers(name, values, n)
    wrong = np.flatnonzero((values < 0) | (values >= 2**31))
    if len(wrong):
        raise ValueError(
            f"{name} must be at least 0 and below 2**31, got {values[wrong[0]]} at image {wrong[0]}"
        )
    return values.astype(np.int32)
