"""Image sets by name: `shapes` (embedded), an `.npz` file, a folder, or TensorFlow Datasets."""

import os
import re
from pathlib import Path

import numpy as np

from adv2_jax.data import folder, photos, shapes, tfds
from adv2_jax.data.class_files import ClassList, read_classes, whole
from adv2_jax.data.images import Draw, ImageSet, as_classes
from adv2_jax.errors import first_line
from adv2_jax.files import array_names, read_arrays

LARGEST = 4096  # side in pixels that images are brought to
MOST = 100_000  # embedded scenes at a time, in 1.6 GB
HELD_OUT_SEED = 1  # the embedded network is trained on the scenes of seed 0
EMBEDDED = re.compile(r"shapes(?::(.*))?", re.DOTALL)  # with the number of scenes
NPZ = re.compile(r"(.+\.npz)(?:/(\w+))?", re.DOTALL)  # file, and a set in it


def load(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | ClassList | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Read the image set that a source names.

    Args:
        source: one of
            `shapes`, 200 embedded scenes, or `shapes:N`, N of them;
            `FILE.npz`, with `images` uint8 [N, H, W, 3] and `labels` [N]; `targets` [N],
            `target_maps` [N, h, w] and `masks` [N, H, W] are used when present;
            `FILE.npz/SPLIT`, one of several sets in a file whose arrays are called as in MedMNIST,
            `test_images` and `test_labels`, or as in Keras, `x_test` and `y_test`; they may be
            grey, [N, H, W] or [N, H, W, 1], and labels [N, 1];
            a folder of images, with one sub-folder a class, or flat (see `folder.load`);
            `tfds:NAME/SPLIT`, a prepared set of TensorFlow Datasets (see `tfds.load`).
        size: side in pixels the network wants: images of any other size go through `photos.fit`,
            masks too, target maps stay. None: all images have one size.
        labels: CSV file with the labels of a flat folder (see `class_files.read_labels`).
        classes: text file, one class a line in the network's order, or a `class_files.ClassList`.
            Where the source names its classes, their lines become the labels; elsewhere it only
            gives the names.
        sample: read only so many images, drawn from the seed without replacement; their order
            stays. All if there are no more.
        seed: of the draw.

    Returns:
        the set; `labels` is None where the source has no labels. The images of folders and of
        TensorFlow Datasets are decoded on demand (`lazy.LazyImages`), and never all in memory
        unless asked for, `np.asarray(images)`.

    Raises:
        ValueError: one line that names the source, what is wrong and what is allowed. An image that
            is decoded on demand is refused then.
    """
    if size is not None and not 1 <= size <= LARGEST:
        raise ValueError(f"size must be at least 1 and at most {LARGEST}, got {size}")
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")

    def draw(n: int) -> np.ndarray:
        chosen = np.random.default_rng(seed).choice(n, min(sample or n, n), replace=False)
        return np.sort(chosen).astype(np.int32)

    try:
        class_list = classes if isinstance(classes, ClassList | None) else read_classes(classes)
        image_set = _read(os.fspath(source), size, labels, class_list, draw)
        return image_set if class_list is None else _with_classes(image_set, class_list)
    except OSError as error:  # a folder or a text file that may not be read
        raise ValueError(
            f"cannot read {error.filename or source}: {error.strerror or first_line(error)}"
        ) from None
    except ValueError as error:  # names of files may hold line breaks
        raise ValueError(" ".join(str(error).splitlines())) from None


def _read(
    source: str,
    size: int | None,
    labels: str | os.PathLike[str] | None,
    class_list: ClassList | None,
    draw: Draw,
) -> ImageSet:
    embedded, prepared = EMBEDDED.fullmatch(source), source.startswith("tfds:")
    # before the pattern of files: a folder may be called photos.npz
    if not embedded and not prepared and os.path.isdir(source):
        return folder.load(Path(source), size=size, draw=draw, labels=labels, class_list=class_list)
    if labels is not None:
        raise ValueError(
            f"labels in a file, {labels}, are for a folder of images, which {source!r} is not"
        )
    if prepared:
        return tfds.load(source, size=size, draw=draw)
    image_set = _scenes(source, *embedded.groups("200")) if embedded else _npz(source)
    indices = draw(len(image_set.images))
    return _fitted(image_set.take(indices), size)._replace(positions=indices)


def sizes_vary(source: str | os.PathLike[str]) -> bool:
    """Return whether images of a source may have any size, so that the network's is to be asked.

    Folders and TensorFlow Datasets are such sources.
    """
    name = os.fspath(source)
    # as in `load`: the embedded set first, and a folder may be called photos.npz
    file = NPZ.fullmatch(name) and not os.path.isdir(name)
    return not (EMBEDDED.fullmatch(name) or file)


def _fitted(image_set: ImageSet, size: int | None) -> ImageSet:
    """Bring images and objects to a size."""
    if size is None or image_set.images.shape[1:3] == (size, size):
        return image_set  # a copy could be over a gigabyte
    fitted = image_set._replace(
        images=np.stack([photos.fit(image, size) for image in np.asarray(image_set.images)])
    )
    if fitted.objects is None:
        return fitted
    masks = [photos.fit(mask, size, nearest=True) for mask in fitted.objects.astype(np.uint8)]
    return fitted._replace(objects=np.stack(masks).astype(bool))


def _with_classes(image_set: ImageSet, class_list: ClassList) -> ImageSet:
    """Give a set the classes of a file, and the labels that its own class names have there."""
    labels = image_set.labels
    if image_set.classes is not None and labels is not None:
        labels = class_list.numbers(image_set.classes)[labels]
    return image_set._replace(
        labels=labels,
        classes=class_list.names,
        classes_from=f"{class_list.path} has {len(class_list.lines)} classes",
    )


def _scenes(source: str, count: str) -> ImageSet:
    if not (whole(count) and 1 <= int(count) <= MOST):
        raise ValueError(
            f"images {source!r}: the number after 'shapes:' must be a whole number in 1..{MOST}"
        )
    return shapes.generate(int(count), seed=HELD_OUT_SEED)


def _npz(source: str) -> ImageSet:
    match = NPZ.fullmatch(source)
    if match is None:
        raise ValueError(
            f"images {source!r} are neither shapes, shapes:N nor an .npz file, "
            "nor tfds:NAME/SPLIT or a folder"
        )
    path, split = match.groups()
    keys = _keys(path, split)
    # only these are unpacked: the other sets of a file may be large
    stored = read_arrays(path, set(keys.values()).__contains__)
    arrays = {key: stored[name] for key, name in keys.items()}
    try:
        return _checked(**(arrays if "images" in stored else _in_colour(**arrays)))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _keys(path: str, split: str | None) -> dict[str, str]:
    """Return what the arrays of a set are called in an `.npz`, by the parameters of `_checked`."""
    names = array_names(path)
    plain: dict[str, str] = {
        key: key for key in ("images", "labels", "targets", "target_maps", "masks") if key in names
    }
    splits = {
        name: {"images": images, "labels": labels}
        for name in (array.removesuffix("_images").removeprefix("x_") for array in names)
        for images, labels in ((f"{name}_images", f"{name}_labels"), (f"x_{name}", f"y_{name}"))
        if images in names and labels in names
    }
    if split is None and len(splits) == 1 and not plain:
        (split,) = splits
    if split is not None and split in splits:
        return splits[split]
    if split is not None:
        raise ValueError(
            f"{path} has no set {split!r}; it holds {', '.join(splits or names) or 'nothing'}"
        )
    missing = [key for key in ("images", "labels") if key not in plain]
    if splits and len(missing) == 2:
        raise ValueError(
            f"{path} holds the sets {', '.join(splits)}: name one, {path}/{list(splits)[-1]}"
        )
    if missing:
        raise ValueError(
            f"{path} lacks {' and '.join(missing)}; it holds {', '.join(names) or 'nothing'}"
        )
    return plain


def _in_colour(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Bring grey images, [N, H, W] or [N, H, W, 1], to [N, H, W, 3] and labels [N, 1] to [N]."""
    images = images[..., None] if images.ndim == 3 else images
    images = images.repeat(3, -1) if images.shape[-1:] == (1,) else images
    return {"images": images, "labels": labels[:, 0] if labels.shape[1:] == (1,) else labels}


def _checked(
    images: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray | None = None,
    target_maps: np.ndarray | None = None,
    masks: np.ndarray | None = None,
) -> ImageSet:
    """Return the arrays of a file as an image set; refuse what `load` does not allow."""
    if images.dtype != np.uint8:
        is_number = images.size > 0 and images.dtype.kind in "biuf"
        raise ValueError(
            f"images must be uint8 in 0..255, got {images.dtype}"
            + (f" with values {images.min()}..{images.max()}" if is_number else "")
        )
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be non-empty, [N, H, W, 3], got {list(images.shape)}")
    n = len(images)
    labels = as_classes("labels", labels, n)
    if targets is not None:
        targets = as_classes("targets", targets, n)
        same = np.flatnonzero(targets == labels)
        if len(same):
            raise ValueError(
                f"the target of image {same[0]} is its label, {labels[same[0]]}; "
                "it must be another class"
            )
    if target_maps is not None:
        if target_maps.ndim != 3 or len(target_maps) != n or target_maps.dtype.kind != "f":
            raise ValueError(
                f"target_maps must be floats [{n}, h, w], "
                f"got {target_maps.dtype} {list(target_maps.shape)}"
            )
        # so written that NaN is refused, which fails every comparison
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
