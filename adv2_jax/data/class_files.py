"""Text files about images: the names of the classes, and the labels of the files in a folder."""

import codecs
import csv
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adv2_jax.data.photos import SUFFIXES

Lookup = Callable[[str], int]  # what stands for a class -> the class
WORDNET = re.compile(r"n\d+")  # identifiers of ImageNet's classes have eight digits


def whole(text: str) -> bool:
    """Whether a text is a whole number that can be a class (nine digits fit int32)."""
    return text.isdecimal() and len(text) < 10


def composed(text: str) -> str:
    """A text in the one of Unicode's spellings in which texts are compared: file systems and editors differ in theirs (é)."""
    return unicodedata.normalize("NFC", text)


class ClassList(NamedTuple):
    """The classes of a network, in its order.

    Attributes:
        path: the file they are from.
        lines: one a class: `tench`, or an identifier and a name: `n01440764 tench, Tinca tinca`.
    """

    path: str
    lines: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Readable names: the lines without identifiers."""
        return _names(self.lines)

    def number(self, name: str) -> int:
        """The class of a name: a whole line, a line without its identifier, or the first word of a
        line.

        Raises:
            ValueError: no line or several have that name.
        """
        found = _numbers(self.lines).get(_key(name), [])
        if len(found) != 1:
            lines = (
                "is in no line"
                if not found
                else f"may be any of lines {', '.join(str(i + 1) for i in found)}"
            )
            raise ValueError(f"class {name!r} {lines} of {self.path}")
        return found[0]

    def lookup(self, texts: Iterable[str]) -> Lookup:
        """How texts are to be read that are names or, where they are whole numbers, lines counted
        from 0.

        But where one of those numbers is itself a line or its name, or every line begins with a
        number, numbers are names too.
        """
        numbers = {_key(text) for text in texts if whole(text)}
        named = not numbers.isdisjoint(map(_key, self.lines + self.names))
        numbered = all(whole(line.split()[0]) for line in self.lines)

        def look(text: str) -> int:
            if named or numbered or not whole(text):
                return self.number(text)
            if int(text) >= len(self.lines):
                raise ValueError(
                    f"class {text} is out of range: {self.path} has {len(self.lines)} classes, counted from 0"
                )
            return int(text)

        return look

    def knows(self, text: str) -> bool:
        """Whether a text names a class or several."""
        return _key(text) in _numbers(self.lines)


def _key(text: str) -> str:
    """What two texts share that are one name: 7 is 007."""
    return str(int(text)) if whole(text) else composed(text)


@lru_cache(maxsize=1)  # class folders and labels ask once a class
def _numbers(lines: tuple[str, ...]) -> dict[str, list[int]]:
    """Name -> classes; a whole line goes before a first word."""
    return (
        _positions(line.split()[0] for line in lines)
        | _positions(_names(lines))
        | _positions(lines)
    )


@lru_cache(maxsize=1)
def _names(lines: tuple[str, ...]) -> tuple[str, ...]:
    """The lines without identifiers, which are first words that hold a digit.

    WordNet's are known: `n01440764`, or n and fewer digits in several lines. Others are identifiers
    where every line begins with one, all of one form, and the names stay distinct: `c0 reading`,
    `c1 writing`; not `1 euro`, `2 euro`, nor `3D printer`, `ink`.
    """
    words = [line.split(maxsplit=1) for line in lines]
    firsts, rests = {first for first, *_ in words}, {rest[0] for _, *rest in words if rest}
    forms = {re.sub(r"\d+", "0", first) for first in firsts}
    every = (
        1 < len(lines) == len(firsts) == len(rests) and len(forms) == 1 and "0" in "".join(forms)
    )
    several = sum(WORDNET.fullmatch(first) is not None for first in firsts) > 1

    def known(first: str) -> bool:
        return every or (
            WORDNET.fullmatch(first) is not None and (several or len(first) == len("n01440764"))
        )

    return tuple(
        rest[0] if rest and known(first) else line
        for line, (first, *rest) in zip(lines, words, strict=True)
    )


def _positions(keys: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        found[_key(key)].append(i)
    return found


def read_classes(path: str | PathLike[str]) -> ClassList:
    """The names of the classes in a text file, one a line in class order.

    Raises:
        ValueError: one line: unreadable, empty, or with an empty line in between.
    """
    lines = [line.strip() for line in _text(path).strip().split("\n")]
    if lines == [""]:
        raise ValueError(f"{path} is empty: one class a line is wanted")
    if "" in lines:
        raise ValueError(f"{path} line {lines.index('') + 1} is empty: one class a line is wanted")
    return ClassList(str(path), tuple(lines))


class Labels(NamedTuple):
    """File names in their order, labels int32 [N], and target classes int32 [N] or None."""

    names: list[str]
    labels: np.ndarray
    targets: np.ndarray | None


def read_labels(
    path: str | PathLike[str], folder: Path, files: Collection[str], listed: ClassList | None
) -> Labels:
    """The labels of files in a folder, from a CSV file: file name, class and, in all lines or none,
    target class.

    Args:
        path: of the CSV file. Its first line is a header if it names no file and its second cell is
            no class.
        folder: where the files lie; its name may stand before theirs.
        files: the names there are. A name may be written without its suffix, or with other
            capitals, where that fits one file.
        listed: the classes, if they may be named (see `ClassList.lookup`); numbers will do without.

    Returns:
        the files it names, sorted.

    Raises:
        ValueError: names the line: unknown, ambiguous or repeated file, unknown class, target that
            is the label, number of columns.
    """
    lines, find = _lines(path), _finder(folder, files)
    if lines and _is_header(lines[0][1], find, listed):
        lines = lines[1:]
    read = cache(
        _counted
        if listed is None
        else listed.lookup({text for _, cells in lines for text in cells[1:]})
    )
    rows: dict[str, list[int]] = {}
    for number, cells in lines:
        try:
            name, classes = _row(cells, find, rows, read)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        rows[name] = classes
    if not rows:
        raise ValueError(f"{path} names none of the files in the folder")
    names = sorted(rows)
    labels, *targets = np.array([rows[name] for name in names], np.int32).T
    return Labels(names, labels, targets[0] if targets else None)


def _lines(path: str | PathLike[str]) -> list[tuple[int, list[str]]]:
    """The lines of a CSV file that are not blank: number and cells."""
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
    cells: list[str], find: Callable[[str], list[str]], listed: ClassList | None
) -> bool:
    name, *rest = cells
    if find(name) or Path(name).suffix.lower() in SUFFIXES or not rest or not rest[0]:
        return False
    return not _is_number(rest[0]) and not (listed and listed.knows(rest[0]))


def _is_number(text: str) -> bool:
    """Whether somebody meant a number, if not one that a class can have."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _finder(folder: Path, files: Iterable[str]) -> Callable[[str], list[str]]:
    """What a file may be called -> the files that are meant: those of that name, else those that differ in less than the others."""
    own = composed(folder.resolve().name)

    @cache
    def table(spell: Callable[[str], str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in files:
            found[spell(composed(name))].append(name)
        return found

    def find(text: str) -> list[str]:
        *above, last = re.split(r"[/\\]", text)
        text = last if above and above[-1] in (".", own) else text
        keys = {str: text, _stem: text, str.casefold: text.casefold(), _small_stem: text.casefold()}
        return next((table(spell)[key] for spell, key in keys.items() if key in table(spell)), [])

    return find


def _stem(name: str) -> str:
    """A file name without the suffix of an image."""
    stem, dot, suffix = name.rpartition(".")
    return stem if (dot + suffix).lower() in SUFFIXES else name


def _small_stem(name: str) -> str:
    return _stem(name).casefold()


def _row(
    cells: list[str], find: Callable[[str], list[str]], rows: dict[str, list[int]], read: Lookup
) -> tuple[str, list[int]]:
    """File and class, perhaps target class, of one line; refuses lines that do not go with those before."""
    text, *classes = cells
    columns = {len(next(iter(rows.values()))) + 1} if rows else {2, 3}
    if len(cells) not in columns:
        allowed = " or ".join(map(str, columns))
        other = next(
            (
                f"; commas separate columns, not {mark!r}"
                for mark in ";\t|"
                if mark in text and not classes
            ),
            "",
        )
        wanted = f"expected {allowed}: file name, class, and target class in all lines or none"
        raise ValueError(f"{len(cells)} columns, {wanted}{other}")
    names = find(text)
    if not names:
        raise ValueError(f"no image {text!r} in the folder")
    if len(names) > 1:
        raise ValueError(f"{text!r} may be any of {', '.join(map(ascii, sorted(names)))}")
    if names[0] in rows:
        raise ValueError(f"{text!r} for the second time")
    numbers = [read(text) for text in classes]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"the target class of {text!r} is its class, {classes[0]!r}; it must be another"
        )
    return names[0], numbers


def _counted(text: str) -> int:
    if not whole(text):
        raise ValueError(
            f"class {text!r} is not a whole number, 0 or more; names need --classes FILE"
        )
    return int(text)


def _text(path: str | PathLike[str]) -> str:
    """A UTF-8 text, composed, with line feeds as line ends."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError(
            f"cannot read {path}: it is not a UTF-8 text but, it seems, UTF-16; save it as UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")  # spreadsheets begin their files with a byte-order mark
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path}: it is not a UTF-8 text") from None
    return composed(text.replace("\r\n", "\n").replace("\r", "\n"))
