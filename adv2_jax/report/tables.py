"""The tables of a run: measures with their intervals, paired differences, transfer between interpreters and to other networks."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adv2_jax.names import attack_name
from adv2_jax.report import words
from adv2_jax.report.pictures import colour_map

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One column of numbers: the key in `rows`, the heading, decimals, and the factor from file to page."""

    key: str
    heading: str
    decimals: int
    factor: float = 1.0


COLUMNS = (
    Column("n", "Images", 0),
    Column("failed", "Failed", 0),
    Column("asr", "ASR ↑", 3),
    Column("mc", "MC ↑", 3),
    Column("map_l1", "Map L1 ↓", 4),
    Column("map_l2", "Map L2 ↓", 4),
    Column("map_iou75", "IoU@75 ↑", 3),
    Column("map_iou50", "IoU@.5 ↑", 3),
    Column("linf", "L∞ · 255", 2, 255.0),
    Column("l2", "L2", 3),
    Column("mean_displacement", "Shift, px", 3),
    Column("flow_penalty", "Flow penalty", 2),
    Column("gradient_evaluations", "Gradients", 1),
    Column("seconds", "Seconds", 1),
)
OCCASIONAL = ("failed", "mean_displacement", "flow_penalty")  # columns only where a row has one
ROW_NAMES = ("interpreter", "attack", "ci")
SETTINGS = ("threat", "target_map", "model")  # columns only where they tell rows apart
MEASURES = {column.key: column for column in COLUMNS}


def summary(rows: Sequence[Row]) -> str:
    """PGD against ADV²: a line an attack, grouped by interpreter; a measure with an interval carries it below."""
    settings = [
        Column(key, words.heading(key), 0)
        for key in SETTINGS
        if len({row.get(key) for row in rows}) > 1
    ]
    present = dict.fromkeys(
        key for row in rows for key in row if key not in (*ROW_NAMES, *SETTINGS)
    )
    measured = [
        column
        for column in COLUMNS
        if column.key not in OCCASIONAL or any(row.get(column.key) for row in rows)
    ]
    extra = [Column(key, words.heading(key), 4) for key in present if key not in MEASURES]
    columns = [*settings, *measured, *extra]
    head = _head(["Interpreter", "Attack", *(column.heading for column in columns)])
    bodies = "".join(
        _group(name, list(group), columns)
        for name, group in groupby(rows, key=lambda row: row["interpreter"])
    )
    return f'<table class="summary">{head}{bodies}</table>'


def common(rows: Sequence[Row], key: str) -> object:
    """The value of a setting that all rows share; None if they do not."""
    values = {words.text(row.get(key)) for row in rows}
    return rows[0].get(key) if len(values) == 1 else None


def _group(interpreter: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = []
    for row in rows:
        name = escape(attack_name(row["attack"], row.get("threat")))
        cells = "".join(f"<td>{_cell(row, column)}</td>" for column in columns)
        lines.append(f'<th scope="row">{name}</th>{cells}')
    first = f'<th scope="rowgroup" rowspan="{len(rows)}">{escape(words.title(interpreter))}</th>'
    return f"<tbody><tr>{first}{'</tr><tr>'.join(lines)}</tr></tbody>"


def _cell(row: Row, column: Column) -> str:
    shown, interval = escape(_value(row.get(column.key), column)), row.get("ci", {}).get(column.key)
    return shown if interval is None else f"{shown}<small>{_interval(interval, column)}</small>"


def _value(value: object, column: Column) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return words.number(value * column.factor, column.decimals)
    return words.text(value)


def _interval(interval: Sequence[float | None], column: Column) -> str:
    low, high = (_value(end, column) for end in interval)
    return f"{low} {words.DASH} {high}"


def paired(differences: Sequence[Row]) -> str:
    """The mean difference ADV² - PGD on the same images, with its interval, a line for each interpreter and measure."""
    lines = []
    for row in differences:
        column = MEASURES.get(
            row["measure"], Column(row["measure"], words.heading(row["measure"]), 4)
        )
        interval = (
            " to ".join(words.signed(end, column.decimals) for end in row["ci"] or ()) or words.DASH
        )
        cells = [
            column.heading,
            words.number(row["n"], 0),
            words.signed(row["difference"], column.decimals),
            interval,
        ]
        lines.append([words.title(row["interpreter"]), row["threat"], *cells])
    return _plain(
        ["Interpreter", "Threat", "Measure", "Images", "ADV² − plain", "95 % interval"],
        lines,
        names=3,
    )


def models(rows: Sequence[Row]) -> str:
    """What the adversarial images do to other networks: a line for each network and attack."""
    lines = []
    for row in rows:
        names = [
            row["model"],
            _source(row["source"]),
            words.title(row["interpreter"]),
            words.number(row["n"], 0),
        ]
        lines.append(
            [
                *names,
                *(_value(row.get(key), MEASURES[key]) for key in ("asr", "map_l1", "map_iou75")),
            ]
        )
    headings = [MEASURES[key].heading for key in ("asr", "map_l1", "map_iou75")]
    return _plain(
        ["Network", "Images made against", "Interpreter", "Images", *headings], lines, names=3
    )


def transfer(found: Mapping[str, Any]) -> str:
    """Interpreter against interpreter, as two tables of coloured numbers: map L1 and IoU@75.

    Args:
        found: `interpreters` [C], `sources` [R], `map_l1` and `map_iou75` [R, C].
    """
    return "".join(
        _heat(found, MEASURES[key], top)
        for key, top in (("map_l1", None), ("map_iou75", 1.0))
        if key in found
    )


def _heat(found: Mapping[str, Any], column: Column, top: float | None) -> str:
    """Colours run from 0 to `top`, or to the largest number; a frame marks the interpreter that was attacked."""
    interpreters, sources = found["interpreters"], found["sources"]
    values = np.array(found[column.key], float)  # None becomes not a number
    shades = colour_map(np.nan_to_num(values) / (top or np.nanmax(values, initial=0.0) or 1.0))
    lines = []
    for source, numbers, colours in zip(sources, values, shades, strict=True):
        cells = (
            f'<td class="heat{" own" if source == name else ""}" style="{_paint(colour)}">{_value(float(value), column)}</td>'
            for name, value, colour in zip(interpreters, numbers, colours, strict=True)
        )
        lines.append(f'<tr><th scope="row">{escape(_source(source))}</th>{"".join(cells)}</tr>')
    head = _head(["Made against", *map(words.title, interpreters)], 1)
    return (
        f'<div class="scroll" role="region" aria-label="Transfer, {escape(column.heading)}" tabindex="0"><table>'
        f"<caption>{escape(column.heading)}, explained by …</caption>{head}<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _source(name: str) -> str:
    return {"benign": "– (benign)", "pgd": "none (PGD)"}.get(name, words.title(name))


def _paint(colour: NDArray[np.uint8]) -> str:
    """A background and the ink, black or white, that reads better on it."""
    light = contrast(colour, np.zeros(3)) > contrast(colour, np.full(3, 255))
    return f"background:rgb({','.join(map(str, colour))});color:{'#000' if light else '#fff'}"


def contrast(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Contrast of two sRGB colours [3] in 0..255, from 1 to 21; text needs 4.5 (WCAG 2)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: NDArray[Any]) -> float:
    c = np.asarray(colour, float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def quality(rows: Sequence[Row]) -> str:
    """What was measured of the maps of a training, a line an interpreter."""
    lines = [[_quality(key, value) for key, value in row.items()] for row in rows]
    return _plain([words.heading(key) for key in rows[0]], lines)


def _quality(key: str, value: object) -> str:
    if key == "interpreter":
        return words.title(str(value))
    return f"{value:.3f}" if isinstance(value, float) else words.text(value)


def _plain(headings: Sequence[str], lines: Iterable[Sequence[str]], *, names: int = 1) -> str:
    """A table whose first columns are names."""
    rows = "".join(f"<tr>{''.join(_cells(line, names))}</tr>" for line in lines)
    return f"<table>{_head(headings, names)}<tbody>{rows}</tbody></table>"


def _cells(line: Sequence[str], names: int) -> Iterable[str]:
    yield f'<th scope="row">{escape(line[0])}</th>'
    yield from (f"<td{_name(k, names)}>{escape(value)}</td>" for k, value in enumerate(line[1:], 1))


def _head(headings: Iterable[str], names: int = 2) -> str:
    cells = (
        f'<th scope="col"{_name(k, names)}>{escape(heading)}</th>'
        for k, heading in enumerate(headings)
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _name(column: int, names: int) -> str:
    return ' class="name"' if column < names else ""
