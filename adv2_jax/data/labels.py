"""Text files about images: the names of the classes, and the labels of the files in a folder."""

import csv
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adv2_jax.data.photos import SUFFIXES


def whole(text: str) -> bool:
    """Whether a text is a whole number that can be a class (nine digits fit int32)."""
    return text.isdecimal() and len(text) < 10


class ClassList(NamedTuple):
    """The classes of a network, in its order.

    Attributes:
        path: the file they are from.
        lines: one a class: `tench`, or an identifier (a first word that holds a digit) and a name: `n01440764 tench, Tinca tinca`.
    """

    path: str
    lines: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Readable names: the lines without identifiers."""
        return tuple(_without_identifier(line) for line in self.lines)

    def number(self, name: str) -> int:
        """The class of a name: a whole line, a line without its identifier, or the first word of a line.

        Raises:
            ValueError: no line or several have that name.
        """
        found = _numbers(self.lines).get(name, [])
        if len(found) != 1:
            lines = "is in no line" if not found else f"may be any of lines {', '.join(str(i + 1) for i in found)}"
            raise ValueError(f"class {name!r} {lines} of {self.path}")
        return found[0]


@lru_cache(maxsize=1)  # a file of labels asks once a line
def _numbers(lines: tuple[str, ...]) -> dict[str, list[int]]:
    """Name -> classes; a whole line goes before a first word."""
    names = map(_without_identifier, lines)
    return _positions(line.split()[0] for line in lines) | _positions(names) | _positions(lines)


def _without_identifier(line: str) -> str:
    first, _, rest = line.partition(" ")
    return rest.strip() if rest and any(letter.isdigit() for letter in first) else line


def _positions(keys: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        found[key].append(i)
    return found


def read_classes(path: str | PathLike[str]) -> ClassList:
    """The names of the classes in a text file, one a line in class order.

    Raises:
        ValueError: one line: unreadable, empty, or with an empty line in between.
    """
    lines = [line.strip() for line in _text(path).strip().splitlines()]
    if not lines:
        raise ValueError(f"{path} is empty: one class a line is wanted")
    if "" in lines:
        raise ValueError(f"{path} line {lines.index('') + 1} is empty: one class a line is wanted")
    return ClassList(str(path), tuple(lines))


class Labels(NamedTuple):
    """File names in their order, labels int32 [N], and target classes int32 [N] or None."""

    names: list[str]
    labels: np.ndarray
    targets: np.ndarray | None


def read_labels(path: str | PathLike[str], files: Collection[str], listed: ClassList | None) -> Labels:
    """The labels of files in a folder, from a CSV file: file name, class and, in all lines or none, target class.

    Args:
        path: of the CSV file. A first line that names no image file, there or not, is its header.
        files: the names there are.
        listed: the classes, if they may be named; numbers will do without.

    Returns:
        the files it names, sorted.

    Raises:
        ValueError: names the line: unknown or repeated file, unknown class, target that is the label, number of columns.
    """
    lines = _lines(path)
    if lines and lines[0][1][0] not in files and Path(lines[0][1][0]).suffix.lower() not in SUFFIXES:
        lines = lines[1:]
    rows: dict[str, list[int]] = {}
    for number, cells in lines:
        try:
            rows[cells[0]] = _row(cells, files, rows, listed)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} names none of the files in the folder")
    names = sorted(rows)
    labels, *targets = np.array([rows[name] for name in names], np.int32).T
    return Labels(names, labels, targets[0] if targets else None)


def _lines(path: str | PathLike[str]) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not blank: number and cells."""
    reader = csv.reader(_text(path).splitlines())
    try:
        return [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if "".join(cells).strip()]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def _row(cells: list[str], files: Collection[str], rows: dict[str, list[int]], listed: ClassList | None) -> list[int]:
    """Class and perhaps target class of one line; refuses lines that do not go with those before."""
    name, *classes = cells
    columns = {len(next(iter(rows.values()))) + 1} if rows else {2, 3}
    if len(cells) not in columns:
        allowed = " or ".join(map(str, columns))
        raise ValueError(f"{len(cells)} columns, expected {allowed}: file name, class, and target class in all lines or none")
    if name not in files:
        raise ValueError(f"no image {name!r} in the folder")
    if name in rows:
        raise ValueError(f"{name!r} for the second time")
    numbers = [_number(text, listed) for text in classes]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"the target class of {name!r} is its class, {classes[0]!r}; it must be another")
    return numbers


def _number(text: str, listed: ClassList | None) -> int:
    if not whole(text):
        if listed is None:
            raise ValueError(f"class {text!r} is not a whole number, 0 or more; names need --classes FILE")
        return listed.number(text)
    if listed and int(text) >= len(listed.lines):
        raise ValueError(f"class {text} is out of range: {listed.path} has {len(listed.lines)} classes, counted from 0")
    return int(text)


def _text(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_text("utf-8-sig")  # spreadsheets begin their files with a byte-order mark
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path}: it is not a UTF-8 text") from None
