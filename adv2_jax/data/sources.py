"""Image sets by name: `shapes` (embedded), an `.npz` file, a folder of images, or a set of TensorFlow Datasets."""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np

from adv2_jax.data import folder, photos, shapes, tfds
from adv2_jax.data.class_files import ClassList, read_classes, whole
from adv2_jax.data.images import ImageSet, as_classes, check_classes
from adv2_jax.errors import first_line
from adv2_jax.files import array_names, read_arrays

__all__ = ["ImageSet", "check_classes", "load", "sizes_vary"]

LARGEST = 4096  # side in pixels that images are brought to
MOST = 100_000  # embedded scenes at a time, in 1.6 GB
HELD_OUT_SEED = 1  # the embedded network is trained on the scenes of seed 0
ARRAYS = ("images", "labels", "targets", "target_maps", "masks")
NPZ = re.compile(r"(.+\.npz)(?:/(\w+))?", re.DOTALL)  # file, and a set in it


def load(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """The image set a source names.

    Args:
        source: one of `shapes` (200 embedded scenes), `shapes:N` (N of them); the path of an `.npz`
            with `images` uint8 [N, H, W, 3] and `labels` [N]; `targets` [N], `target_maps` [N, h,
            w] and `masks` [N, H, W] are used when present; `FILE.npz/SPLIT`, one of several sets in
            an `.npz` whose arrays are called as in MedMNIST, `test_images` and `test_labels`, or as
            in Keras, `x_test` and `y_test`; they may be grey, [N, H, W] or [N, H, W, 1], and labels
            [N, 1]; a folder of images, with one sub-folder a class, or flat (see `folder.load`);
            `tfds:NAME/SPLIT`, a prepared set of TensorFlow Datasets (see `tfds.load`).
        size: side in pixels the network wants: images of any other size go through `photos.fit`,
            masks too, target maps stay. None: all images have one size.
        labels: CSV file with the labels of a flat folder (see `labels.read_labels`).
        classes: text file, one class a line in the network's order (see `labels.ClassList`). Where
            the source names its classes, their lines become the labels; elsewhere it only gives the
            names.
        sample: read only so many images, drawn from the seed without replacement; their order
            stays. All if there are no more.
        seed: of the draw.

    Returns:
        the set; `labels` is None where the source has no labels.

    Raises:
        ValueError: one line that names the source, what is wrong and what is allowed.
    """
    for name, value, most in (("size", size, LARGEST), ("sample", sample, float("inf"))):
        if value is not None and not 1 <= value <= most:
            raise ValueError(
                f"{name} must be at least 1{'' if most == float('inf') else f' and at most {most}'}, got {value}"
            )
    table = None if labels is None else Path(labels)
    try:
        listed = None if classes is None else read_classes(classes)
        found = _read(
            os.fspath(source), size, table, listed, partial(_draw, sample=sample, seed=seed)
        )
        return found if listed is None else _listed(found, listed)
    except OSError as error:  # a folder that may not be read
        raise ValueError(
            f"cannot read {error.filename or source}: {error.strerror or first_line(error)}"
        ) from None
    except ValueError as error:
        raise ValueError(
            " ".join(str(error).splitlines())
        ) from None  # names of files may hold line breaks


def _read(
    source: str, size: int | None, labels: Path | None, listed: ClassList | None, draw: folder.Draw
) -> ImageSet:
    embedded, prepared = _embedded(source), source.startswith("tfds:")
    if not embedded and not prepared and os.path.isdir(source):
        return folder.load(Path(source), size=size, draw=draw, labels=labels, listed=listed)
    if labels is not None:
        raise ValueError(
            f"labels in a file, {labels}, are for a folder of images, which {source!r} is not"
        )
    if prepared:
        return tfds.load(source, size=size, draw=draw)
    found = _shapes(source) if embedded else _npz(source)
    index = draw(len(found.images))
    return _fitted(found.take(index), size)._replace(positions=index)


def sizes_vary(source: str | os.PathLike[str]) -> bool:
    """Whether images of a source may have any size (folders, TensorFlow Datasets), so that the network's is worth asking for."""
    source = os.fspath(source)
    return not _embedded(source) and not NPZ.fullmatch(source)


def _embedded(source: str) -> bool:
    return source.split(":")[0] == "shapes"


def _draw(n: int, *, sample: int | None, seed: int) -> np.ndarray:
    """The sorted positions of `sample` of n images."""
    if sample is None or sample >= n:
        return np.arange(n, dtype=np.int32)
    return np.sort(np.random.default_rng(seed).choice(n, sample, replace=False)).astype(np.int32)


def _fitted(found: ImageSet, size: int | None) -> ImageSet:
    if size is None or found.images.shape[1:3] == (size, size):
        return found
    images = np.stack([photos.fit(image, size) for image in found.images])
    if found.objects is None:
        return found._replace(images=images)
    objects = np.stack(
        [photos.fit(mask, size, nearest=True) for mask in found.objects.astype(np.uint8)]
    )
    return found._replace(images=images, objects=objects.astype(bool))


def _listed(found: ImageSet, listed: ClassList) -> ImageSet:
    """A set with the classes of a file; labels that were positions in the set's own names become
    positions in the file.

    Names that are numbers are often no names, but positions.
    """
    names, labels = found.classes, found.labels
    if (
        names is not None
        and labels is not None
        and (not all(map(whole, names)) or all(map(listed.knows, names)))
    ):
        labels = np.array([listed.number(name) for name in names], np.int32)[labels]
    return found._replace(
        labels=labels,
        classes=listed.names,
        classes_from=f"{listed.path} has {len(listed.lines)} classes",
    )


def _npz(source: str) -> ImageSet:
    named = NPZ.fullmatch(source)
    if not named:
        raise ValueError(
            f"images {source!r} are neither shapes, shapes:N nor an .npz file, nor tfds:NAME/SPLIT or a folder"
        )
    path, split = named.groups()
    keys = _keys(path, split)
    held = read_arrays(path, set(keys.values()).__contains__)
    arrays = {key: held[name] for key, name in keys.items()}
    try:
        return _checked(**(arrays if "images" in held else _coloured(**arrays)))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _keys(path: str, split: str | None) -> dict[str, str]:
    """What the arrays of a set are called in an `.npz`, by their names in an `ImageSet`."""
    held = array_names(path)
    own = {key: key for key in ARRAYS if key in held}
    splits = {}
    for name in held:
        of = name.removesuffix("_images").removeprefix("x_")
        labels = f"{of}_labels" if name.endswith("_images") else f"y_{of}"
        if of != name and labels in held:
            splits[of] = {"images": name, "labels": labels}
    if split is None and len(splits) == 1 and not own:
        (split,) = splits
    if split is not None and split in splits:
        return splits[split]
    if split is not None:
        raise ValueError(
            f"{path} has no set {split!r}; it holds {', '.join(splits or held) or 'nothing'}"
        )
    missing = [key for key in ("images", "labels") if key not in own]
    if splits and len(missing) == 2:
        raise ValueError(
            f"{path} holds the sets {', '.join(splits)}: name one, {path}/{list(splits)[-1]}"
        )
    if missing:
        raise ValueError(
            f"{path} lacks {' and '.join(missing)}; it holds {', '.join(held) or 'nothing'}"
        )
    return own


def _coloured(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Grey images [N, H, W] or [N, H, W, 1] as [N, H, W, 3], labels [N, 1] as [N]; others as they are."""
    images = images[..., None] if images.ndim == 3 else images
    images = images.repeat(3, -1) if images.shape[-1:] == (1,) else images
    return {"images": images, "labels": labels[:, 0] if labels.shape[1:] == (1,) else labels}


def _shapes(source: str) -> ImageSet:
    _, _, count = source.partition(":")
    if source != "shapes" and not (count.isdecimal() and int(count) > 0):
        raise ValueError(
            f"images {source!r}: the number after 'shapes:' must be a whole number above 0"
        )
    if len(count) > len(str(MOST)) or int(count or 0) > MOST:
        raise ValueError(f"images {source!r}: the number after 'shapes:' must be at most {MOST}")
    scenes = shapes.generate(int(count or 200), seed=HELD_OUT_SEED)
    return ImageSet(scenes.images, scenes.labels, objects=scenes.objects, classes=shapes.CLASSES)


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
    labels = as_classes("labels", labels, n)
    if targets is not None:
        targets = as_classes("targets", targets, n)
        same = np.flatnonzero(targets == labels)
        if len(same):
            raise ValueError(
                f"the target of image {same[0]} is its label, {labels[same[0]]}; it must be another class"
            )
    if target_maps is not None:
        if target_maps.ndim != 3 or len(target_maps) != n or target_maps.dtype.kind != "f":
            raise ValueError(
                f"target_maps must be floats [{n}, h, w], got {target_maps.dtype} {list(target_maps.shape)}"
            )
        if not (target_maps.min() >= 0 and target_maps.max() <= 1):
            raise ValueError(
                f"target_maps must lie in [0, 1], got {target_maps.min()}..{target_maps.max()}"
            )
        target_maps = target_maps.astype(np.float32)
    if masks is not None and (masks.dtype != bool or masks.shape != images.shape[:3]):
        raise ValueError(
            f"masks must be bool {list(images.shape[:3])}, got {masks.dtype} {list(masks.shape)}"
        )
    return ImageSet(images, labels, targets, target_maps, masks)


def _excess(images: np.ndarray) -> str:
    """What else is wrong with images of another type."""
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        return " with values that are not finite"
    if images.dtype.kind in "iuf" and images.size and (images.max() > 255 or images.min() < 0):
        return f" with values {images.min()}..{images.max()}"
    return ""
