"""Text files about images: the names of the classes, and the labels of the files in a folder."""

import csv
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

import numpy as np

from adv2_jax.data.photos import SUFFIXES


def whole(text: str) -> bool:
    """Return whether a text is a whole number that can be a class (nine digits fit int32)."""
    # not `isdigit`, which allows ², where `int` fails
    return text.isdecimal() and len(text) < 10


def composed(text: str) -> str:
    """Return a text in Unicode's composed form; file systems and editors differ in theirs (é)."""
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class ClassList:
    """The classes of a network, in its order.

    Attributes:
        path: the file they are from.
        lines: one a class: `tench`, or an identifier and a name: `n01440764 tench, Tinca tinca`.
    """

    path: str
    lines: tuple[str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The lines without identifiers, which are first words that hold a digit.

        WordNet's are known: `n01440764`, or n and fewer digits in several lines. Others are
        identifiers where every line begins with one, all of one form, and the names stay distinct:
        `c0 reading`, `c1 writing`; not `1 euro`, `2 euro`, nor `3D printer`, `ink`.
        """
        words = [line.split(maxsplit=1) for line in self.lines]
        firsts, rests = {first for first, *_ in words}, {rest[0] for _, *rest in words if rest}
        forms = {re.sub(r"\d+", "0", first) for first in firsts}
        every = (
            1 < len(self.lines) == len(firsts) == len(rests)
            and len(forms) == 1
            and "0" in "".join(forms)
        )
        wordnet = {first for first in firsts if re.fullmatch(r"n\d+", first)}
        # one alone may be a name, as in `n95 mask`, if it has not the eight digits of ImageNet's
        known = {first for first in wordnet if len(wordnet) > 1 or len(first) == len("n01440764")}
        identifiers = firsts if every else known
        return tuple(
            rest[0] if rest and first in identifiers else line
            for line, (first, *rest) in zip(self.lines, words, strict=True)
        )

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        """Classes by name; a whole line goes before a name, and a name before a first word."""
        by_word, by_name, by_line = (
            _positions(map(_key, texts))
            for texts in ([line.split()[0] for line in self.lines], self.names, self.lines)
        )
        return by_word | by_name | by_line

    def number(self, text: str, *, as_position: bool = False) -> int:
        """Return the class of a whole line, a line without its identifier, or a line's first word.

        Args:
            text: what stands for the class.
            as_position: a whole number is no name, but counts the lines from 0.

        Raises:
            ValueError: no line or several have that name, or the number is out of range.
        """
        if as_position and whole(text):
            if int(text) >= len(self.lines):
                raise ValueError(
                    f"class {text} is out of range: "
                    f"{self.path} has {len(self.lines)} classes, counted from 0"
                )
            return int(text)
        classes = self._by_name.get(_key(text), [])
        if len(classes) != 1:
            lines = ", ".join(str(i + 1) for i in classes)
            raise ValueError(
                f"class {text!r} may be any of lines {lines} of {self.path}"
                if classes
                else f"class {text!r} is in no line of {self.path}"
            )
        return classes[0]

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """Return the classes int32 [K] of the names that a source has for its K classes.

        Raises:
            ValueError: as `number`.
        """
        as_position = all(map(whole, names)) and self.are_positions(names)
        return np.array([self.number(name, as_position=as_position) for name in names], np.int32)

    def are_positions(self, texts: Iterable[str]) -> bool:
        """Return whether the whole numbers among texts count the lines from 0.

        They do not if one of them is itself a line or its name, or if every line begins with a
        number: then they are names.
        """
        numbers = {_key(text) for text in texts if whole(text)}
        are_names = not numbers.isdisjoint(map(_key, self.lines + self.names))
        return not are_names and not all(whole(line.split()[0]) for line in self.lines)

    def knows(self, text: str) -> bool:
        """Return whether a text names a class or several."""
        return _key(text) in self._by_name


def _key(text: str) -> str:
    """Return what the spellings of one name share: 7 is 007."""
    return str(int(text)) if whole(text) else composed(text)


def _positions(keys: Iterable[str]) -> dict[str, list[int]]:
    """Return the positions of every key."""
    positions: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        positions[key].append(i)
    return positions


def read_classes(path: str | PathLike[str]) -> ClassList:
    """Read the names of the classes from a text file, one a line in class order.

    Raises:
        OSError: it cannot be opened.
        ValueError: one line: no text, or with an empty line.
    """
    lines = [line.strip() for line in _text(path).rstrip().split("\n")]
    if "" in lines:  # a name left out would shift all classes after it
        raise ValueError(f"{path} line {lines.index('') + 1} is empty: one class a line is wanted")
    return ClassList(str(path), tuple(lines))


def read_labels(
    path: str | PathLike[str], folder: Path, files: Sequence[str], class_list: ClassList | None
) -> dict[str, list[int]]:
    """Read the labels of files in a folder from a CSV file.

    Its lines are file name, class and, in all of them or none, target class.

    Args:
        path: of the CSV file. Its first line is a header if it names no file and its second cell is
            no class.
        folder: where the files lie; its name may stand before theirs.
        files: the names there are. A name may be written without its suffix, or with other
            capitals, where that fits one file.
        class_list: the classes, if they may be named (see `ClassList.are_positions`); numbers will
            do without.

    Returns:
        file -> [class] or [class, target class].

    Raises:
        OSError: it cannot be opened.
        ValueError: names the line: unknown, ambiguous or repeated file, unknown class, target that
            is the label, number of columns.
    """
    lines, find = _lines(path), _finder(folder, files)
    if lines and _is_header(lines[0][1], find, class_list):
        lines = lines[1:]
    read = _whole_number
    if class_list is not None:
        texts = (text for _, cells in lines for text in cells[1:])
        read = partial(class_list.number, as_position=class_list.are_positions(texts))
    rows: dict[str, list[int]] = {}
    for number, cells in lines:
        try:
            name, classes = _row(cells, find, rows, read)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        rows[name] = classes
    if not rows:
        raise ValueError(f"{path} names none of the files in the folder")
    return rows


def _lines(path: str | PathLike[str]) -> list[tuple[int, list[str]]]:
    """Return the lines of a CSV file that are not blank: number and cells."""
    reader = csv.reader(io.StringIO(_text(path)))
    try:
        return [
            (reader.line_num, [cell.strip() for cell in cells])
            for cells in reader
            if "".join(cells).strip()
        ]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def _is_header(
    cells: list[str], find: Callable[[str], list[str]], class_list: ClassList | None
) -> bool:
    name, *rest = cells
    if find(name) or Path(name).suffix.lower() in SUFFIXES or not rest or not rest[0]:
        return False
    try:
        float(rest[0])  # somebody meant a number, if not one that a class can have
    except ValueError:
        return class_list is None or not class_list.knows(rest[0])
    return False


def _finder(folder: Path, files: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function from what a file may be called to the files that are meant.

    These are the files of that very name; else those that differ from it in the suffix; else in
    capitals; else in both.
    """
    base, names = composed(folder.resolve().name), list(map(composed, files))
    tables = [
        (fold, _positions(fold(spell(name)) for name in names))
        for fold in (str, str.casefold)
        for spell in (str, _stem)
    ]

    def find(text: str) -> list[str]:
        # a CSV file from Windows separates folders by backslashes
        *above, last = re.split(r"[/\\]", text)
        text = last if above and above[-1] in (".", base) else text
        matches = (table[fold(text)] for fold, table in tables if fold(text) in table)
        return [files[i] for i in next(matches, [])]

    return find


def _stem(name: str) -> str:
    """Return a file name without the suffix of an image."""
    stem, dot, suffix = name.rpartition(".")
    return stem if (dot + suffix).lower() in SUFFIXES else name


def _row(
    cells: list[str],
    find: Callable[[str], list[str]],
    rows: dict[str, list[int]],
    read: Callable[[str], int],
) -> tuple[str, list[int]]:
    """Return the file and the classes of one line; refuse it if it does not suit those before."""
    text, *classes = cells
    # the first line decides whether there are target classes
    columns = {1 + len(next(iter(rows.values())))} if rows else {2, 3}
    if len(cells) not in columns:
        mark = next((mark for mark in ";\t|" if mark in text and not classes), None)
        raise ValueError(
            f"{len(cells)} columns, expected {' or '.join(map(str, columns))}: "
            "file name, class, and target class in all lines or none"
            + (f"; commas separate columns, not {mark!r}" if mark else "")
        )
    names = find(text)
    if len(names) != 1:
        raise ValueError(
            # in ASCII: names that differ in their Unicode form alone look the same
            f"{text!r} may be any of {', '.join(map(ascii, sorted(names)))}"
            if names
            else f"no image {text!r} in the folder"
        )
    if names[0] in rows:
        raise ValueError(f"{text!r} for the second time")
    numbers = [read(text) for text in classes]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"the target class of {text!r} is its class, {classes[0]!r}; it must be another"
        )
    return names[0], numbers


def _whole_number(text: str) -> int:
    if not whole(text):
        raise ValueError(
            f"class {text!r} is not a whole number, 0 or more; names need --classes FILE"
        )
    return int(text)


def _text(path: str | PathLike[str]) -> str:
    """Read a UTF-8 text, composed, with line feeds as line ends."""
    # spreadsheets begin their files with a byte-order mark, and save them as UTF-16, too
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    if re.search("[\0\udc80-\udcff]", text):
        reason = " but, it seems, UTF-16" if "\0" in text else ""
        raise ValueError(f"cannot read {path}: it is not a UTF-8 text{reason}; save it as UTF-8")
    return composed(text.replace("\r\n", "\n").replace("\r", "\n"))
