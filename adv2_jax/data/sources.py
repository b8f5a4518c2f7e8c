"""Image sets by name: `shapes` (embedded), `shapes:N`, or an `.npz` file."""

from typing import NamedTuple

import numpy as np

from adv2_jax.data import shapes
from adv2_jax.files import read_arrays

HELD_OUT_SEED = 1  # the embedded network is trained on the scenes of seed 0


class ImageSet(NamedTuple):
    """N labelled images; optional entries are None where the source has none.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int32 [N].
        targets: int32 [N], the classes to be predicted.
        target_maps: float32 [N, h, w] in [0, 1], the maps to be shown.
        masks: bool [N, H, W], where the labelled object is.
        classes: names of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None = None
    target_maps: np.ndarray | None = None
    masks: np.ndarray | None = None
    classes: tuple[str, ...] | None = None

    def take(self, index: np.ndarray) -> "ImageSet":
        """The images at `index` [M] (integers, or booleans [N])."""
        arrays = {key: value[index] for key, value in self._asdict().items() if isinstance(value, np.ndarray)}
        return self._replace(**arrays)


def load(source: str) -> ImageSet:
    """The image set a source names.

    Args:
        source: `shapes` (200 embedded scenes), `shapes:N` (N of them), or the path of an `.npz` with `images` uint8
            [N, H, W, 3] and `labels` [N]; `targets` [N], `target_maps` [N, h, w] and `masks` [N, H, W] are used when present.

    Raises:
        ValueError: one line that names the source, what is wrong and what is allowed.
    """
    if source.split(":")[0] == "shapes":
        return _shapes(source)
    if not source.endswith(".npz"):
        raise ValueError(f"images {source!r} are neither shapes, shapes:N nor an .npz file")
    arrays = read_arrays(source)
    missing = [key for key in ("images", "labels") if key not in arrays]
    if missing:
        raise ValueError(f"{source} lacks {' and '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    optional = {key: arrays[key] for key in ("targets", "target_maps", "masks") if key in arrays}
    try:
        return _checked(arrays["images"], arrays["labels"], **optional)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _shapes(source: str) -> ImageSet:
    _, _, count = source.partition(":")
    if source != "shapes" and not (count.isdecimal() and int(count) > 0):
        raise ValueError(f"images {source!r}: the number after 'shapes:' must be a whole number above 0")
    scenes = shapes.generate(int(count or 200), seed=HELD_OUT_SEED)
    return ImageSet(scenes.images, scenes.labels, masks=scenes.masks, classes=shapes.CLASSES)


def _checked(
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray | None = None,
    target_maps: np.ndarray | None = None,
    masks: np.ndarray | None = None,
) -> ImageSet:
    """The arrays of a file as an image set, or one line on what is wrong with them."""
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0..255, got {images.dtype}{_excess(images)}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [N, H, W, 3], got {list(images.shape)}")
    if 0 in images.shape:
        raise ValueError(f"images are empty: {list(images.shape)}")
    n = len(images)
    labels = _classes("labels", labels, n)
    if targets is not None:
        targets = _classes("targets", targets, n)
        same = np.flatnonzero(targets == labels)
        if len(same):
            raise ValueError(f"the target of image {same[0]} is its label, {labels[same[0]]}; it must be another class")
    if target_maps is not None:
        if target_maps.ndim != 3 or len(target_maps) != n or target_maps.dtype.kind != "f":
            raise ValueError(f"target_maps must be floats [{n}, h, w], got {target_maps.dtype} {list(target_maps.shape)}")
        if not (target_maps.min() >= 0 and target_maps.max() <= 1):
            raise ValueError(f"target_maps must lie in [0, 1], got {target_maps.min()}..{target_maps.max()}")
        target_maps = target_maps.astype(np.float32)
    if masks is not None and (masks.dtype != bool or masks.shape != images.shape[:3]):
        raise ValueError(f"masks must be bool {list(images.shape[:3])}, got {masks.dtype} {list(masks.shape)}")
    return ImageSet(images, labels, targets, target_maps, masks)


def _excess(images: np.ndarray) -> str:
    """What else is wrong with images of another type."""
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        return " with values that are not finite"
    if images.dtype.kind in "iuf" and images.size and (images.max() > 255 or images.min() < 0):
        return f" with values {images.min()}..{images.max()}"
    return ""


def _classes(name: str, values: np.ndarray, n: int) -> np.ndarray:
    if values.dtype.kind not in "iu" or values.shape != (n,):
        raise ValueError(f"{name} must be integers [{n}], one an image, got {values.dtype} {list(values.shape)}")
    if values.min() < 0:
        raise ValueError(f"{name} must be 0 or more, got {values.min()} at image {values.argmin()}")
    if values.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{name} must be below 2**31, got {values.max()} at image {values.argmax()}")
    return values.astype(np.int32)


def check_classes(image_set: ImageSet, num_classes: int) -> None:
    """Refuse labels and targets that the network has no class for.

    Raises:
        ValueError: names the image, its class and the number of classes.
    """
    for name, values in (("label", image_set.labels), ("target", image_set.targets)):
        if values is not None and values.max() >= num_classes:
            i = values.argmax()
            raise ValueError(
                f"{name} {values[i]} of image {i} is out of range: the network has {num_classes} classes, 0..{num_classes - 1}"
            )
