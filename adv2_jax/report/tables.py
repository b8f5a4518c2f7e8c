"""Tables of a page: measures with their intervals, paired differences, transfer, map quality."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax.report import words
from adv2_jax.report.pictures import colour_map
from adv2_jax.runs.schema import (
    CURVATURE,
    DETECTION,
    JOINT,
    Row,
    attack_name,
    columns,
    detection_marks,
    row_name,
)

SETTINGS = ("threat", "target_map", "model")  # columns only where rows differ


def summary(rows: Sequence[Row]) -> str:
    """Draw noise, PGD and ADV²: a line for each attack, grouped by interpreter."""
    settings = differing(rows)
    # a column for failed images only where there are some
    keys = [
        key
        for key in columns()
        if any(row.get(key) if key == "failed" else row.get(key) is not None for row in rows)
    ]
    groups = []
    for interpreter, group in groupby(rows, key=lambda row: row["interpreter"]):
        lines = [
            _line(
                row_name(row),
                [escape(words.text(row.get(key))) for key in settings]
                + [_with_interval(row, key) for key in keys],
            )
            for row in group
        ]
        title = escape(words.title(interpreter))
        # one cell for the rows of an interpreter: screen readers read it with each of them
        lines[0] = f'<th scope="rowgroup" rowspan="{len(lines)}">{title}</th>{lines[0]}'
        groups.append(lines)
    headings = ["Interpreter", "Attack", *map(words.heading, settings), *map(_heading, keys)]
    return _table("Summary table", headings, groups, kind="summary")


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the settings that tell rows apart."""
    return [key for key in SETTINGS if len({row.get(key) for row in rows}) > 1]


def paired(differences: Sequence[Row]) -> str:
    """Draw mean differences of attacks on the same images: a line for each interpreter and measure."""
    lines = []
    for row in differences:
        key = row["measure"]
        difference, *ends = (
            _number(value, key, sign="+") for value in (row["difference"], *(row["ci"] or ()))
        )
        lines.append(
            [
                words.title(row["interpreter"]),
                row["threat"],
                "joint − alone" if row.get("joint") else "ADV² − plain",
                _heading(key),
                words.number(row["n"], 0),
                difference,
                " to ".join(ends) or words.DASH,
            ]
        )
    headings = ["Interpreter", "Threat", "Attacks", "Measure", "Images", "Mean", "95 % interval"]
    return _plain("Paired differences", headings, lines, kind="named")


def models(rows: Sequence[Row]) -> str:
    """Draw the transfer to other networks: a line for each network and source of images."""
    keys = ["n", "asr", *_paired_keys()]
    lines = [
        [row["model"], _source(row["source"]), words.title(row["interpreter"])]
        + [_number(row.get(key), key) for key in keys]
        for row in rows
    ]
    headings = ["Network", "Images made against", "Interpreter", *map(_heading, keys)]
    return _plain("Transfer to other networks", headings, lines, kind="named")


def networks(rows: Sequence[Row], setting: str | None = None) -> str:
    """Draw the accuracy of each network, numbered, and its curvature where some was measured.

    A setting is a number in which the runs differ.
    """
    keys = [one.key for one in CURVATURE] if any("curvature" in row for row in rows) else []
    lines = [
        _line(
            f"{k}: {row['model']}",
            [
                *([words.number(row[setting], 4)] if setting else []),
                words.number(row["images"], 0),
                _spread(words.number, row["accuracy"], row["ci"]["accuracy"], 3),
                *(_with_interval(row.get("curvature", {}), key) for key in keys),
            ],
        )
        for k, row in enumerate(rows, 1)
    ]
    first = ["Run", setting] if setting else ["Network"]
    headings = [*first, "Images", "Accuracy", *map(_heading, keys)]
    return _table("Networks", headings, [lines])


def transfer(matrix: Mapping[str, Any]) -> str:
    """Draw interpreter against interpreter: a table of coloured numbers for each paired measure.

    Args:
        matrix: `interpreters` [C], `sources` [R], and [R, C] numbers by measure.
    """
    tables = "".join(_heat(matrix, key) for key in _paired_keys() if key in matrix)
    return f'<div class="columns">{tables}</div>'


def _heat(matrix: Mapping[str, Any], key: str) -> str:
    """Draw a matrix of colours and numbers; a frame marks the interpreter that was attacked."""
    values = np.array(matrix[key], float)  # None becomes NaN
    # a measure that is better when larger is an overlap, which ends at 1
    # or 1.0: a matrix of zeros, or without numbers, has no maximum to divide by
    largest = 1.0 if _heading(key).endswith("↑") else np.nanmax(values, initial=0.0) or 1.0
    shades = colour_map(np.nan_to_num(values) / largest)
    lines = [
        f'<th scope="row">{escape(_source(source))}</th>'
        + "".join(
            f'<td class="heat{" attacked" if source in (name, JOINT) else ""}" style="{_paint(colour)}">'
            f"{_number(value, key)}</td>"
            for name, value, colour in zip(matrix["interpreters"], numbers, colours, strict=True)
        )
        for source, numbers, colours in zip(matrix["sources"], values, shades, strict=True)
    ]
    headings = ["Made against", *map(words.title, matrix["interpreters"])]
    return _table(
        f"Transfer, {_heading(key)}",
        headings,
        [lines],
        caption=f"{_heading(key)}, explained by …",
    )


def _paint(colour: NDArray[np.uint8]) -> str:
    """Return a background and the ink, black or white, that has more contrast with it (WCAG 2)."""
    c = colour / 255
    # sRGB to linear light; the weights are of red, green and blue
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    # black where its contrast (L + .05) / .05 is above that of white, 1.05 / (L + .05)
    ink = "#000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#fff"
    return f"background:rgb({','.join(map(str, colour))});color:{ink}"


def quality(rows: Sequence[Row]) -> str:
    """Draw the quality of the maps after a training: a line for each interpreter."""
    lines = [
        [words.title(interpreter)]
        + [words.number(one, 3) if isinstance(one, float) else words.text(one) for one in numbers]
        for interpreter, *numbers in (row.values() for row in rows)
    ]
    return _plain("Quality table", [words.heading(key) for key in rows[0]], lines)


def curvature(rows: Sequence[Row]) -> str:
    """Draw means of curvature with their intervals: a line for each set of images."""
    keys = ["n", *(["failed"] if any(row["failed"] for row in rows) else [])]
    keys += [one.key for one in CURVATURE]
    lines = [
        _line(attack_name(row["images"], None), [_with_interval(row, key) for key in keys])
        for row in rows
    ]
    return _table("Curvature table", ["At images", *map(_heading, keys)], [lines])


def detection(rows: Sequence[Row]) -> str:
    """Draw detectors against benign images, noise and attacks: a group for each detector and run."""
    keys = ["n", "asr", *(one.key for one in DETECTION)]

    def line(row: Row) -> str:
        made = row_name(row) + detection_marks(row)
        names = [
            row["run"],
            ", ".join([made, *map(words.title, filter(None, [row["interpreter"]]))]),
        ]
        return _line(
            row["detector"], [*map(escape, names), *(_with_interval(row, k) for k in keys)]
        )

    by_run = groupby(rows, key=lambda row: (row["detector"], row["run"]))
    headings = ["Detector", "Run", "Images made by", *map(_heading, keys)]
    groups = [list(map(line, group)) for _, group in by_run]
    return _table("Detection table", headings, groups, kind="named")


def fidelity(numbers: Mapping[str, Any]) -> str:
    """Draw cosine and norm ratio of surrogates with secants: a column for each step."""
    lines = [
        [
            name,
            *(f"{words.number(a, 2)} ({words.number(b, 2)})" for a, b in zip(*pair, strict=True)),
        ]
        for name, *pair in zip(
            numbers["surrogates"], numbers["cosine"], numbers["ratio"], strict=True
        )
    ]
    headings = ["Cosine (norm ratio) at a step of", *(str(Fraction(h)) for h in numbers["steps"])]
    return _plain("Fidelity of surrogates", headings, lines)


def correlation(rows: Sequence[Row]) -> str:
    """Draw rank correlations of curvature with what attacks leave of maps."""
    lines = [
        [
            _heading(row["measure"]),
            attack_name(row["attack"], None),
            words.number(row["n"], 0),
            words.number(row["spearman"], 2, sign="+"),
            " to ".join(words.number(end, 2, sign="+") for end in row["ci"] or ()) or words.DASH,
        ]
        for row in rows
    ]
    headings = ["At the benign image", "Map L1 of", "Images", "Spearman", "95 % interval"]
    return _plain("Correlation with map distances", headings, lines)


def _paired_keys() -> list[str]:
    return [key for key, column in columns().items() if getattr(column, "paired", False)]


def _source(name: str) -> str:
    names = {"benign": "– (benign)", "noise": "none (noise)", "pgd": "none (PGD)", JOINT: "all"}
    return names.get(name, words.title(name))


def _heading(key: str) -> str:
    column = columns()[key]
    return f"{column.heading} {getattr(column, 'direction', '')}".rstrip()


def _number(value: float | None, key: str, sign: str = "") -> str:
    column = columns()[key]
    scaled = None if value is None else value * column.factor
    return words.number(scaled, column.decimals, sign=sign)


def _with_interval(row: Row, key: str) -> str:
    return _spread(_number, row.get(key), row.get("ci", {}).get(key), key)


def _spread(
    shown: Callable[[float | None, Any], str], value: float | None, ends: Any, form: Any
) -> str:
    between = f" {words.DASH} ".join(shown(end, form) for end in ends or ())
    return shown(value, form) + (f"<small>{between}</small>" if ends else "")


def _plain(
    label: str, headings: Iterable[str], lines: Iterable[Sequence[str]], kind: str = ""
) -> str:
    """Draw a table of texts."""
    # names of networks and classes are a user's: they may hold < or &
    group = [_line(name, map(escape, cells)) for name, *cells in lines]
    return _table(label, headings, [group], kind=kind)


def _line(name: str, cells: Iterable[str]) -> str:
    """Return the cells of a line as HTML; `cells` are HTML, `name` is text."""
    return f'<th scope="row">{escape(name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)


def _table(
    label: str,
    headings: Iterable[str],
    groups: Iterable[Iterable[str]],
    *,
    kind: str = "",
    caption: str = "",
) -> str:
    """Draw a table that scrolls sideways where the window is narrow.

    Args:
        label: description of the region that scrolls.
        headings: of the columns.
        groups: of lines, each its cells as HTML.
        kind: style; it says which columns are names, aligned to the left.
        caption: above the table.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    bodies = "".join(
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody>" for lines in groups
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    # tabindex: the keyboard scrolls only what can have the focus
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f'<table class="{kind}">{title}<thead><tr>{head}</tr></thead>{bodies}</table></div>'
    )
