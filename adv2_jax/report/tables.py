"""The tables of a run: measures with their intervals, paired differences, transfers."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax.report import words
from adv2_jax.report.pictures import colour_map
from adv2_jax.runs.schema import Column, Measure, Row, attack_name, columns

SETTINGS = ("threat", "target_map", "model")  # columns only where they tell rows apart


def summary(rows: Sequence[Row]) -> str:
    """Draw PGD against ADV²: a line an attack, grouped by interpreter; intervals stand below."""
    settings = [key for key in SETTINGS if len({row.get(key) for row in rows}) > 1]
    # no image that failed is not worth a column
    known = [
        key
        for key in columns()
        if any(row.get(key) is not None for row in rows)
        and (key != "failed" or any(row.get(key) for row in rows))
    ]
    headings = ["Interpreter", "Attack", *map(words.heading, settings), *map(_heading, known)]
    bodies = []
    for name, group in groupby(rows, key=lambda row: row["interpreter"]):
        lines = []
        for row in group:
            cells = [escape(words.text(row.get(key))) for key in settings]
            cells += [_cell(row, key) for key in known]
            attack = escape(attack_name(row["attack"], row.get("threat")))
            data = "".join(f"<td>{cell}</td>" for cell in cells)
            lines.append(f'<th scope="row">{attack}</th>{data}')
        title = escape(words.title(name))
        first = f'<th scope="rowgroup" rowspan="{len(lines)}">{title}</th>'
        bodies.append(f"<tbody><tr>{first}{'</tr><tr>'.join(lines)}</tr></tbody>")
    return f'<table class="summary">{_head(headings)}{"".join(bodies)}</table>'


def common(rows: Sequence[Row], key: str) -> object:
    """Return the value of a setting that all rows share; None if they do not."""
    values = {words.text(row.get(key)) for row in rows}
    return rows[0].get(key) if len(values) == 1 else None


def paired(differences: Sequence[Row]) -> str:
    """Draw the mean of ADV² - PGD on the same images, a line for each interpreter and measure."""
    lines = []
    for row in differences:
        decimals = _column(row["measure"]).decimals
        ends = " to ".join(words.signed(end, decimals) for end in row["ci"] or ()) or words.DASH
        difference = words.signed(row["difference"], decimals)
        names = [words.title(row["interpreter"]), row["threat"], _heading(row["measure"])]
        lines.append([*names, words.number(row["n"], 0), difference, ends])
    headings = ["Interpreter", "Threat", "Measure", "Images", "ADV² − plain", "95 % interval"]
    return _plain(headings, lines, names=3)


def models(rows: Sequence[Row]) -> str:
    """Draw what the adversarial images do to other networks: a line a network and attack."""
    keys = ["n", "asr", *(key for key, column in columns().items() if _is_paired(column))]
    lines = [
        [
            row["model"],
            _source(row["source"]),
            words.title(row["interpreter"]),
            *(_value(row.get(key), key) for key in keys),
        ]
        for row in rows
    ]
    headings = ["Network", "Images made against", "Interpreter", *map(_heading, keys)]
    return _plain(headings, lines, names=3)


def transfer(matrix: Mapping[str, Any]) -> str:
    """Draw interpreter against interpreter: a table of coloured numbers for each paired measure.

    Args:
        matrix: `interpreters` [C], `sources` [R], and [R, C] numbers by measure.
    """
    keys = [key for key, column in columns().items() if _is_paired(column) and key in matrix]
    return "".join(_heat(matrix, key) for key in keys)


def _heat(matrix: Mapping[str, Any], key: str) -> str:
    """Draw a matrix; a frame marks the interpreter that was attacked."""
    values = np.array(matrix[key], float)  # None becomes not a number
    # what is to be large is an overlap, which ends at 1
    top = 1.0 if _heading(key).endswith("↑") else np.nanmax(values, initial=0.0) or 1.0
    shades = colour_map(np.nan_to_num(values) / top)
    lines = []
    for source, numbers, colours in zip(matrix["sources"], values, shades, strict=True):
        cells = [
            f'<td class="heat{" own" if source == name else ""}" style="{_paint(colour)}">'
            f"{_value(float(value), key)}</td>"
            for name, value, colour in zip(matrix["interpreters"], numbers, colours, strict=True)
        ]
        first = f'<th scope="row">{escape(_source(source))}</th>'
        lines.append(f"<tr>{first}{''.join(cells)}</tr>")
    heading = escape(_heading(key))
    head = _head(["Made against", *map(words.title, matrix["interpreters"])], 1)
    return (
        f'<div class="scroll" role="region" aria-label="Transfer, {heading}" tabindex="0"><table>'
        f"<caption>{heading}, explained by …</caption>{head}<tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def _source(name: str) -> str:
    return {"benign": "– (benign)", "pgd": "none (PGD)"}.get(name, words.title(name))


def _paint(colour: NDArray[np.uint8]) -> str:
    """Return a background and the ink, black or white, that has more contrast with it (WCAG 2)."""
    c = colour / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    # (L + .05) / .05 > 1.05 / (L + .05)
    ink = "#000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#fff"
    return f"background:rgb({','.join(map(str, colour))});color:{ink}"


def quality(rows: Sequence[Row]) -> str:
    """Draw what was measured of the maps of a training, a line an interpreter."""
    lines = []
    for row in rows:
        name, *numbers = row.values()
        cells = [f"{one:.3f}" if isinstance(one, float) else words.text(one) for one in numbers]
        lines.append([words.title(name), *cells])
    return _plain([words.heading(key) for key in rows[0]], lines)


def _column(key: str) -> Column:
    return columns().get(key, Column(key, words.heading(key), decimals=4))


def _is_paired(column: Column) -> bool:
    return isinstance(column, Measure) and column.paired


def _heading(key: str) -> str:
    column = _column(key)
    return f"{column.heading} {getattr(column, 'direction', '')}".rstrip()


def _cell(row: Row, key: str) -> str:
    shown, ends = _value(row.get(key), key), row.get("ci", {}).get(key)
    interval = "" if ends is None else f" {words.DASH} ".join(_value(end, key) for end in ends)
    return f"{shown}<small>{interval}</small>" if interval else shown


def _value(value: float | None, key: str) -> str:
    column = _column(key)
    return words.number(None if value is None else value * column.factor, column.decimals)


def _plain(headings: Sequence[str], lines: Iterable[Sequence[str]], *, names: int = 1) -> str:
    """Draw a table whose first columns are names."""
    rows = []
    for first, *rest in lines:
        cells = [f"<td{_kind(k, names)}>{escape(cell)}</td>" for k, cell in enumerate(rest, 1)]
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>')
    return f"<table>{_head(headings, names)}<tbody>{''.join(rows)}</tbody></table>"


def _head(headings: Iterable[str], names: int = 2) -> str:
    cells = [
        f'<th scope="col"{_kind(k, names)}>{escape(heading)}</th>'
        for k, heading in enumerate(headings)
    ]
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _kind(column: int, names: int) -> str:
    return ' class="name"' if column < names else ""
