"""The image set that every source gives and every run takes."""

from typing import NamedTuple

import numpy as np


class ImageSet(NamedTuple):
    """N images; optional entries are None where the source has none.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int32 [N]; None: unlabelled, the network's own prediction is to be the label.
        targets: int32 [N], the classes to be predicted.
        target_maps: float32 [N, h, w] in [0, 1], the maps to be shown.
        objects: bool [N, H, W], where the labelled object is.
        classes: names of the classes.
        names: unicode [N], the images' file names below their folder.
        positions: int32 [N], places of the images in their source, of which only a sample may have
            been read.
        classes_from: who says how many classes there are and in which order, for messages: "photos
            has 3 class folders". None: nobody, any network with a class for each label will do.
        advice: what to do if the network gets many images wrong, in one line, where the labels may
            have been read as nobody meant.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    target_maps: np.ndarray | None = None
    objects: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    names: np.ndarray | None = None
    positions: np.ndarray | None = None
    classes_from: str | None = None
    advice: str | None = None

    def take(self, index: np.ndarray) -> "ImageSet":
        """The images at `index` [M] (integers, or booleans [N])."""
        arrays = {
            key: value[index]
            for key, value in self._asdict().items()
            if isinstance(value, np.ndarray)
        }
        return self._replace(**arrays)


def check_classes(image_set: ImageSet, num_classes: int) -> None:
    """Refuse labels and targets that the network has no class for, and class orders that cannot be
    the network's.

    Raises:
        ValueError: names the image, its class and the number of classes; or who counts another
            number of classes.
    """
    if image_set.classes_from and len(image_set.classes or ()) != num_classes:
        advice = "name the classes with --classes FILE, one a line in the network's order"
        raise ValueError(f"{image_set.classes_from}, the network {num_classes} classes: {advice}")
    for name, values in (("label", image_set.labels), ("target", image_set.targets)):
        if values is not None and values.max() >= num_classes:
            i = int(np.argmax(values))
            allowed = f"the network has {num_classes} classes, 0..{num_classes - 1}"
            advice = f"; {image_set.advice}" if image_set.advice else ""
            raise ValueError(f"{name} {values[i]} of image {i} is out of range: {allowed}{advice}")


def as_classes(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """Classes of n images as int32 [n].

    Raises:
        ValueError: they are no integers [n], or one is negative or beyond int32.
    """
    if values.dtype.kind not in "iu" or values.shape != (n,):
        raise ValueError(
            f"{name} must be integers [{n}], one an image, got {values.dtype} {list(values.shape)}"
        )
    if values.min() < 0:
        raise ValueError(
            f"{name} must be 0 or more, got {values.min()} at image {np.argmin(values)}"
        )
    if values.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{name} must be below 2**31, got {values.max()} at image {np.argmax(values)}"
        )
    return values.astype(np.int32)
