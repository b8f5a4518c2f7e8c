"""Several networks under the same attack as one HTML page."""

from collections.abc import Mapping, Sequence
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
    networks, rows = summary["networks"], summary["rows"]
    sections = [
        ("networks", "Networks", tables.networks(networks)),
        ("distance", "Map distance against accuracy", _charts(networks, rows)),
        ("attacks", "The same attack on each", tables.summary(rows)),
    ]
    body = page.template("plain.html").substitute(
        title="Networks compared",
        facts=words.definitions({"Networks": ", ".join(row["model"] for row in networks)}, "facts"),
        sections="".join(page.section(*one) for one in sections),
        reproduction=page.reproduction(summary),
    )
    return page.write_page(folder, page.document("Networks compared", body))


def _charts(networks: Sequence[Row], rows: Sequence[Row]) -> str:
    """Draw for each interpreter the map L1 of each attack over the accuracy of the networks."""
    order = sorted(range(len(networks)), key=lambda k: networks[k]["accuracy"])
    ends = charts.ticks(networks[order[0]]["accuracy"], networks[order[-1]]["accuracy"])
    figures: list[str] = []
    styles: dict[str, charts.Line] = {}
    for interpreter in dict.fromkeys(row["interpreter"] for row in rows):
        lines = [
            line
            for kind in KINDS
            if kind != CONTROL
            and (line := _line([networks[k] for k in order], rows, interpreter, kind))
        ]
        if lines:
            figures.append(
                charts.chart(
                    lines,
                    anchor=f"chart-{len(figures)}",
                    title=f"{words.title(interpreter)}: map L1",
                    limits=(0.0,),
                    across="accuracy",
                    reach=(ends[0], min(ends[-1], 1.0)),
                    marks=[str(k + 1) for k in order],
                )
            )
            styles |= {line.kind: line for line in lines}
    note = "Numbers are those of the networks above; band: 95 % interval."
    return f'<div class="charts">{"".join(figures)}</div>{charts.legend(styles.values(), note)}'


def _line(
    networks: Sequence[Mapping[str, Any]], rows: Sequence[Row], interpreter: str, kind: str
) -> charts.Line | None:
    """Return the map L1 of an attack over the accuracies of networks; None if one lacks it."""
    of = {
        row["model"]: row
        for row in rows
        if row["interpreter"] == interpreter and kind_of(row) == kind and row["map_l1"] is not None
    }
    if not all(network["model"] in of for network in networks):
        return None
    chosen = [of[network["model"]] for network in networks]
    means = np.array([row["map_l1"] for row in chosen], float)
    # of a single image there is no interval
    ends = [row["ci"].get("map_l1", [row["map_l1"]] * 2) for row in chosen]
    accuracies = np.array([network["accuracy"] for network in networks], float)
    low, high = np.array(ends, float).T
    return charts.Line(row_name(chosen[0]), kind, accuracies, means, low, high)
