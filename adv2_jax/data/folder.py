"""A folder of images: one sub-folder a class, or flat with its labels in a CSV file or without labels."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adv2_jax.data import photos
from adv2_jax.data.class_files import ClassList, composed, read_labels, whole
from adv2_jax.data.images import ImageSet

Draw = Callable[[int], np.ndarray]  # N -> sorted positions of those to be read
PASSED_OVER = {  # what systems, archives and servers leave in folders, in small letters; hidden files are passed over too
    *(
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
    ),
    *("__macosx", "icon\r", "icon\uf00d", "network trash folder", "temporary items", "__pycache__"),
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot"),
}
BY_NUMBER = (
    "the class folders were taken by their numbers; a network that was trained through torchvision's ImageFolder has them in the "
    "order of their names as text (0, 1, 10, 11, 2): give the order with --classes FILE, the name of a folder a line"
)


class Contents(NamedTuple):
    """What an image set of a folder is before any image is read; entries as in `ImageSet`."""

    names: Sequence[str]
    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    classes_from: str | None = None
    advice: str | None = None


def load(
    folder: Path,
    *,
    size: int | None,
    draw: Draw,
    labels: Path | None = None,
    listed: ClassList | None = None,
) -> ImageSet:
    """The images of a folder, sorted by name.

    Args:
        folder: either with one folder a class, in which there are only images, or flat.
        size: side in pixels the network wants; None where all images have one size.
        draw: N -> the sorted positions of those to be read.
        labels: CSV file on a flat folder (see `labels.read_labels`); files it does not name are
            left out.
        listed: the classes of the network, which class folders or the CSV file may name (see
            `ClassList.lookup`).

    Returns:
        images, names and: for class folders, labels by `listed` or, without it, labels and
        `classes` in sorted order, or the folders' names themselves as labels if all are whole
        numbers; for a flat folder, what the CSV file holds, or no labels.

    Raises:
        ValueError: one line that names the folder, file or line and what is wrong.
    """
    aside = {
        os.path.realpath(path) for path in (labels, listed and listed.path) if path is not None
    }
    entries = [
        path for path in _entries(folder) if not aside or os.path.realpath(path) not in aside
    ]
    folders = [path for path in entries if path.is_dir()]
    files = [path for path in entries if not path.is_dir()]
    if folders and files:
        raise ValueError(
            f"{folder} holds both folders ({folders[0].name}) and files ({files[0].name}); it may hold one kind"
        )
    if folders and labels:
        raise ValueError(
            f"{folder} has class folders: labels in a file, {labels}, are for a flat folder"
        )
    contents = (
        _class_folders(folder, folders, listed) if folders else _flat(folder, files, labels, listed)
    )
    return _read(folder, contents, size, draw)


def _read(folder: Path, contents: Contents, size: int | None, draw: Draw) -> ImageSet:
    index = draw(len(contents.names))
    names = [contents.names[i] for i in index]
    labels, targets = (
        None if values is None else values[index] for values in (contents.labels, contents.targets)
    )
    return ImageSet(
        photos.read_all(folder, names, size),
        labels,
        targets,
        classes=contents.classes,
        names=np.array([_shown(name) for name in names]),
        positions=index,
        classes_from=contents.classes_from,
        advice=contents.advice,
    )


def _class_folders(folder: Path, folders: list[Path], listed: ClassList | None) -> Contents:
    files = [_images(path) for path in folders]
    names = [f"{path.parent.name}/{path.name}" for paths in files for path in paths]
    if not names:
        raise ValueError(f"the class folders of {folder} hold no images")
    empty = [path.name for path, paths in zip(folders, files, strict=True) if not paths]
    if empty:
        raise ValueError(
            f"class folders of {folder} hold no images: {', '.join(empty[:5])}{', …' * (len(empty) > 5)}"
        )
    classes = tuple(composed(_shown(path.name)) for path in folders)
    places = np.repeat(np.arange(len(folders), dtype=np.int32), [len(paths) for paths in files])
    numbers = [int(name) for name in classes] if all(map(whole, classes)) else None
    _check_distinct(folder, folders, numbers or classes)
    if listed is not None:
        look = listed.number if numbers is None else listed.lookup(classes)
        return Contents(names, np.array([look(name) for name in classes], np.int32)[places])
    if numbers is not None:
        advice = None if numbers == list(range(len(numbers))) else BY_NUMBER
        return Contents(names, np.array(numbers, np.int32)[places], advice=advice)
    return Contents(
        names, places, classes=classes, classes_from=f"{folder} has {len(classes)} class folders"
    )


def _check_distinct(folder: Path, folders: list[Path], keys: Sequence[str | int]) -> None:
    """Refuse folders whose names mean the same class."""
    seen: dict[str | int, Path] = {}
    for path, key in zip(folders, keys, strict=True):
        if key in seen:
            raise ValueError(
                f"class folders {seen[key].name!a} and {path.name!a} of {folder} are one class"
            )
        seen[key] = path


def _flat(
    folder: Path, files: list[Path], labels: Path | None, listed: ClassList | None
) -> Contents:
    if not files:
        raise ValueError(f"{folder} holds no images")
    if labels is None:
        return Contents([path.name for path in _images(folder, files)])
    found = read_labels(labels, folder, [path.name for path in files], listed)
    for name in found.names:
        _check_file(folder / name)
    return Contents(*found)


def _images(folder: Path, files: list[Path] | None = None) -> list[Path]:
    """The files of a folder, all of which must be images."""
    files = _entries(folder) if files is None else files
    for path in files:
        if path.is_dir():
            raise ValueError(f"{path} is a folder in a class folder, which may hold only images")
        _check_file(path)
        if path.suffix.lower() not in photos.SUFFIXES:
            raise ValueError(
                f"{path} is not an image: suffix {path.suffix!r} is not one of {', '.join(photos.SUFFIXES)}"
            )
    return files


def _check_file(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a file but a pipe, socket or device")


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name however it is spelt, without what no person put there."""
    entries = (
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in PASSED_OVER
    )
    return sorted(entries, key=lambda path: (composed(path.name), path.name))


def _shown(name: str) -> str:
    """A name as it can be printed: bytes that are no UTF-8, as of old archives, become question marks."""
    return os.fsencode(name).decode("utf-8", "replace")
