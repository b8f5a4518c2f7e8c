"""Folders of images: one sub-folder a class, or flat, with labels in a CSV file or without."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adv2_jax.data import photos
from adv2_jax.data.class_files import ClassList, composed, read_labels, whole
from adv2_jax.data.images import Draw, ImageSet
from adv2_jax.data.lazy import LazyImages
from adv2_jax.errors import listed

# What systems, archives and servers leave in folders, in small letters. Hidden files are ignored
# too.
IGNORED = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    # macOS's icon of a folder, and what file servers make of its carriage return
    "icon\r",
    "icon\uf00d",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "network trash folder",
    "temporary items",
    "lost+found",
    "__macosx",
    "__pycache__",
    # Synology's and QNAP's network storage, down to #snapshot
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@tmp",
    "#recycle",
    "#snapshot",
}
BY_NUMBER = (
    "the class folders were taken by their numbers; a network that was trained through "
    "torchvision's ImageFolder has them in the order of their names as text (0, 1, 10, 11, 2): "
    "give the order with --classes FILE, the name of a folder a line"
)


def load(
    folder: Path,
    *,
    size: int | None,
    draw: Draw,
    labels: str | os.PathLike[str] | None = None,
    class_list: ClassList | None = None,
) -> ImageSet:
    """List the images of a folder, sorted by name; they are decoded on demand.

    Args:
        folder: either with one folder a class, in which there are only images, or flat.
        size: side in pixels the network wants; None where all images have one size.
        draw: N -> the sorted indices of those to be listed.
        labels: CSV file about a flat folder (see `class_files.read_labels`); files it does not name
            are left out.
        class_list: the classes of the network, which class folders or the CSV file may name (see
            `ClassList.are_positions`).

    Returns:
        images, names and: for class folders, labels by `class_list` or, without it, labels and
        `classes` in sorted order, or the folders' names themselves as labels if all are whole
        numbers; for a flat folder, what the CSV file holds, or no labels.

    Raises:
        ValueError: one line that names the folder, file or line and what is wrong.
    """
    # the text files may lie in the folder themselves
    texts = {
        os.path.realpath(path)
        for path in (labels, None if class_list is None else class_list.path)
        if path is not None
    }
    entries = [p for p in _entries(folder) if not texts or os.path.realpath(p) not in texts]
    folders = [path for path in entries if path.is_dir()]
    files = [path for path in entries if not path.is_dir()]
    if folders and files:
        raise ValueError(
            f"{folder} holds both folders ({folders[0].name}) and files ({files[0].name}); "
            "it may hold one kind"
        )
    if folders and labels is not None:
        raise ValueError(
            f"{folder} has class folders: labels in a file, {labels}, are for a flat folder"
        )
    # only the files that are drawn are ever decoded
    listing = (
        _class_folders(folder, folders, class_list)
        if folders
        else _flat(folder, files, labels, class_list)
    )
    indices = draw(len(listing.images))
    chosen = listing.take(indices)
    names: list[str] = np.asarray(chosen.images).tolist()
    return chosen._replace(
        images=LazyImages(names, photos.reader(folder, names, size)),
        names=np.array([_printable(name) for name in names]),
        positions=indices,
    )


def _class_folders(folder: Path, folders: list[Path], class_list: ClassList | None) -> ImageSet:
    """List class folders: an image set with the names of files in place of images."""
    files = [_images(_entries(path)) for path in folders]
    empty = [path.name for path, images in zip(folders, files, strict=True) if not images]
    if empty:
        raise ValueError(f"class folders of {folder} hold no images: {listed(empty, ', ', 5)}")
    names = np.array([f"{path.parent.name}/{path.name}" for images in files for path in images])
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), list(map(len, files)))
    classes = tuple(composed(_printable(path.name)) for path in folders)
    numbers = list(map(int, classes)) if all(map(whole, classes)) else None
    by_class: dict[object, Path] = {}
    for path, key in zip(folders, numbers or classes, strict=True):
        if by_class.setdefault(key, path) is not path:  # 7 and 007, or é as one character or two
            raise ValueError(
                f"class folders {by_class[key].name!a} and {path.name!a} of {folder} are one class"
            )
    if class_list is not None:
        return ImageSet(names, class_list.numbers(classes)[labels])
    if numbers is not None:
        # torchvision gives folders 0, 1, 2 these labels, too
        advice = None if numbers == list(range(len(numbers))) else BY_NUMBER
        return ImageSet(names, np.array(numbers, np.int32)[labels], advice=advice)
    return ImageSet(
        names, labels, classes=classes, classes_from=f"{folder} has {len(classes)} class folders"
    )


def _flat(
    folder: Path,
    files: list[Path],
    labels: str | os.PathLike[str] | None,
    class_list: ClassList | None,
) -> ImageSet:
    """List a flat folder: an image set with the names of files in place of images."""
    if not files:
        raise ValueError(f"{folder} holds no images")
    if labels is None:
        return ImageSet(np.array([path.name for path in _images(files)]))
    rows = read_labels(labels, folder, [path.name for path in files], class_list)
    names = sorted(rows)
    return ImageSet(np.array(names), *np.array([rows[name] for name in names], np.int32).T)


def _images(files: Sequence[Path]) -> Sequence[Path]:
    """Return files as they are; refuse any that is no image by its name."""
    for path in files:
        if path.is_dir():
            raise ValueError(f"{path} is a folder in a class folder, which may hold only images")
        if path.suffix.lower() not in photos.SUFFIXES:
            raise ValueError(
                f"{path} is not an image: "
                f"suffix {path.suffix!r} is not one of {', '.join(photos.SUFFIXES)}"
            )
    return files


def _entries(folder: Path) -> list[Path]:
    """Return what people put into a folder, sorted by name in Unicode's composed form."""
    return sorted(
        (
            path
            for path in folder.iterdir()
            if not path.name.startswith(".") and path.name.lower() not in IGNORED
        ),
        # the bare name too: `iterdir` has no order that would decide between two forms of one name
        key=lambda path: (composed(path.name), path.name),
    )


def _printable(name: str) -> str:
    """Replace bytes that are no UTF-8, as in names from old archives, by question marks."""
    return os.fsencode(name).decode("utf-8", "replace")
