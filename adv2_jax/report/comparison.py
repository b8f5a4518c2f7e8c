"""Several networks under one attack, or one under attacks of several sizes, as one HTML page."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from adv2_jax.files import read_summary
from adv2_jax.report import charts, page, tables, words
from adv2_jax.runs.schema import CONTROL, KINDS, Row, kind_of, row_name


def write_comparison(directory: Path | str) -> Path:
    """Write `report.html` from the `summary.json` of a comparison.

    Args:
        directory: the folder of the comparison.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no summary, or it has another schema.
    """
    folder = Path(directory)
    summary = read_summary(folder)
    networks, rows, setting = summary["networks"], summary["rows"], summary["setting"]
    title = "Attacks compared" if setting else "Networks compared"
    across = setting or "accuracy"
    sections = [
        ("networks", "Runs" if setting else "Networks", tables.networks(networks, setting)),
        ("distance", f"Map distance over {across}", _charts(networks, rows, across)),
        ("attacks", "The attacks" if setting else "The same attack on each", tables.summary(rows)),
    ]
    names = ", ".join(row["model"] for row in networks)
    body = page.template("plain.html").substitute(
        title=title,
        facts=words.definitions({"Runs" if setting else "Networks": names}, "facts"),
        sections="".join(page.section(*one) for one in sections),
        reproduction=page.reproduction(summary),
    )
    return page.write_page(folder, page.document(title, body))


def _charts(networks: Sequence[Row], rows: Sequence[Row], across: str) -> str:
    """Draw for each interpreter the map L1 of each attack over accuracy, or over a setting.

    Over a setting the success rate too: where neither moves any more, the attack has what it needs.
    """
    order = sorted(range(len(networks)), key=lambda k: networks[k][across])
    ends = networks[order[0]][across], networks[order[-1]][across]
    drawn: dict[str, tuple[str, Sequence[float]]] = {"map_l1": ("map L1", [0.0])}
    if across == "accuracy":
        levels = charts.ticks(*ends)
        ends = levels[0], min(levels[-1], 1.0)
    else:
        drawn |= {"asr": ("success rate", [0.0, 1.0])}
    figures: list[str] = []
    styles: dict[str, charts.Line] = {}
    ordered, kinds = [networks[k] for k in order], [kind for kind in KINDS if kind != CONTROL]
    interpreters = dict.fromkeys(row["interpreter"] for row in rows)
    for interpreter, (key, (name, limits)) in product(interpreters, drawn.items()):
        found = [_line(ordered, rows, interpreter, kind, key, across) for kind in kinds]
        lines = [line for line in found if line]
        if lines:
            figures.append(
                charts.chart(
                    lines,
                    anchor=f"chart-{len(figures)}",
                    title=f"{words.title(interpreter)}: {name}",
                    limits=limits,
                    across=across,
                    reach=ends,
                    marks=[str(k + 1) for k in order],
                )
            )
            styles |= {line.kind: line for line in lines}
    note = "Numbers are those of the table above; band: 95 % interval."
    return f'<div class="charts">{"".join(figures)}</div>{charts.legend(styles.values(), note)}'


def _line(
    networks: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    interpreter: str,
    kind: str,
    key: str,
    across: str,
) -> charts.Line | None:
    """Return a measure of an attack over a number of the networks; None if one lacks it."""
    of = {
        row["model"]: row
        for row in rows
        if row["interpreter"] == interpreter and kind_of(row) == kind and row[key] is not None
    }
    if not all(network["model"] in of for network in networks):
        return None
    chosen = [of[network["model"]] for network in networks]
    means = np.array([row[key] for row in chosen], float)
    # of a single image there is no interval
    ends = [row["ci"].get(key, [row[key]] * 2) for row in chosen]
    places = np.array([network[across] for network in networks], float)
    low, high = np.array(ends, float).T
    return charts.Line(row_name(chosen[0]), kind, places, means, low, high)
