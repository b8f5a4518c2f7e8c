"""A folder of images: one sub-folder a class, or flat with its labels in a CSV file or without labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adv2_jax.data import photos
from adv2_jax.data.images import ImageSet
from adv2_jax.data.labels import ClassList, read_labels, whole

Draw = Callable[[int], np.ndarray]  # N -> sorted positions of those to be read
PASSED_OVER = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders; hidden files are passed over too


class Contents(NamedTuple):
    """What an image set of a folder is before any image is read; entries as in `ImageSet`."""

    names: Sequence[str]
    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    classes_from: str | None = None


def load(folder: Path, *, size: int | None, draw: Draw, labels: Path | None = None, listed: ClassList | None = None) -> ImageSet:
    """The images of a folder, sorted by name.

    Args:
        folder: either with one folder a class, in which there are only images, or flat.
        size: side in pixels the network wants; None where all images have one size.
        draw: N -> the sorted positions of those to be read.
        labels: CSV file on a flat folder (see `labels.read_labels`); files it does not name are left out.
        listed: the classes that the CSV file may name.

    Returns:
        images, names and: for class folders, labels and `classes` in sorted order, or the folders' names themselves as labels if
        all are whole numbers; for a flat folder, what the CSV file holds, or no labels.

    Raises:
        ValueError: one line that names the folder, file or line and what is wrong.
    """
    aside = [Path(path).resolve() for path in (labels, listed and listed.path) if path is not None]
    entries = [path for path in _entries(folder) if path.resolve() not in aside]
    folders = [path for path in entries if path.is_dir()]
    files = [path for path in entries if not path.is_dir()]
    if folders and files:
        raise ValueError(f"{folder} holds both folders ({folders[0].name}) and files ({files[0].name}); it may hold one kind")
    if folders and labels:
        raise ValueError(f"{folder} has class folders: labels in a file, {labels}, are for a flat folder")
    contents = _class_folders(folder, folders) if folders else _flat(folder, files, labels, listed)
    return _read(folder, contents, size, draw)


def _read(folder: Path, contents: Contents, size: int | None, draw: Draw) -> ImageSet:
    index = draw(len(contents.names))
    names = [contents.names[i] for i in index]
    labels, targets = (None if values is None else values[index] for values in (contents.labels, contents.targets))
    return ImageSet(
        photos.read_all(folder, names, size),
        labels,
        targets,
        classes=contents.classes,
        names=np.array(names),
        positions=index,
        classes_from=contents.classes_from,
    )


def _class_folders(folder: Path, folders: list[Path]) -> Contents:
    files = [_images(path) for path in folders]
    names = [f"{path.parent.name}/{path.name}" for paths in files for path in paths]
    if not names:
        raise ValueError(f"the class folders of {folder} hold no images")
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), [len(paths) for paths in files])
    classes = tuple(path.name for path in folders)
    if all(map(whole, classes)):
        return Contents(names, np.array(classes).astype(np.int32)[labels])
    return Contents(names, labels, classes=classes, classes_from=f"{folder} has {len(classes)} class folders")


def _flat(folder: Path, files: list[Path], labels: Path | None, listed: ClassList | None) -> Contents:
    if not files:
        raise ValueError(f"{folder} holds no images")
    if labels is None:
        return Contents([path.name for path in _images(folder, files)])
    return Contents(*read_labels(labels, {path.name for path in files}, listed))


def _images(folder: Path, files: list[Path] | None = None) -> list[Path]:
    """The files of a folder, all of which must be images."""
    files = _entries(folder) if files is None else files
    for path in files:
        if path.is_dir():
            raise ValueError(f"{path} is a folder in a class folder, which may hold only images")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file but a pipe, socket or device")
        if path.suffix.lower() not in photos.SUFFIXES:
            raise ValueError(f"{path} is not an image: suffix {path.suffix!r} is not one of {', '.join(photos.SUFFIXES)}")
    return files


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without what no person put there."""
    entries = (path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in PASSED_OVER)
    return sorted(entries, key=lambda path: path.name)
