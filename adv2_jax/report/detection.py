"""Detectors in a report: a table, and ROC curves, which need matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from adv2_jax.report import tables, words
from adv2_jax.report.curvature import COLOURS, INSTALL, WIDTH, as_html, library
from adv2_jax.runs.schema import Row, detection_marks, row_name

ACROSS = 2  # panels in a row
NOTE = """ROC-AUC: share of pairs of an attacked and a benign image that the detector puts in the right order.
Detected: share above the threshold, as are 5 % of other benign images; of the benign images themselves these
are false positives. Evades: the class that the attack wants, a map whose IoU with the target map is .5 or more,
and below the threshold. Adaptive attacks knew of the detector. In small print: 95 % intervals."""
ROC = """<b>ROC curves.</b> A line for each set of images; drawn through where the attack knew of the detector,
dashed where it did not. On the diagonal a detector sees nothing."""


def content(rows: Sequence[Row]) -> str:
    """Return table and picture as HTML; without matplotlib, the table and what to install."""
    if find_spec("matplotlib") is None:
        picture = f'<p class="note">The picture needs matplotlib: {INSTALL}</p>'
    else:
        areas = [f"{_name(row)} {row['auc']:.2f}" for row in rows if row["auc"] is not None]
        picture = as_html(curves(rows), f"ROC curves; area: {', '.join(areas)}.", ROC)
    return f"{tables.detection(rows)}\n{picture}"


def curves(rows: Sequence[Row]) -> Any:
    """Draw a panel of ROC curves for each detector.

    Args:
        rows: of `detection` in `summary.json`.

    Returns:
        A matplotlib figure.
    """
    drawn = [row for row in rows if row.get("roc") is not None]
    detectors = list(dict.fromkeys(row["detector"] for row in drawn))
    down = -(-len(detectors) // ACROSS)
    figure = library("figure").Figure(figsize=(WIDTH, 4.2 * down), layout="constrained")
    panels = figure.subplots(down, min(len(detectors), ACROSS), squeeze=False).ravel()
    for axis, detector in zip(panels, detectors, strict=False):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        lines: dict[Any, Row] = {}
        for row in drawn:
            # noise, and plain PGD of equal work, are the same images for all interpreters
            if row["detector"] == detector:
                lines.setdefault((row["run"], row["attack"], *map(tuple, row["roc"].values())), row)
        for i, row in enumerate(lines.values()):
            style = {"color": COLOURS[i % 6], "linestyle": "-" if row["adaptive"] else "--"}
            label = f"{_name(row, detector=False)}: {row['auc']:.2f}"
            axis.plot(row["roc"]["false"], row["roc"]["true"], label=label, **style)
        axis.set(title=detector, xlabel="false positives", ylabel="true positives", aspect="equal")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    for axis in panels[len(detectors) :]:
        axis.axis("off")
    return figure


def _name(row: Row, *, detector: bool = True) -> str:
    parts = [row["detector"] if detector else "", row["run"], row_name(row) + detection_marks(row)]
    parts += [words.title(row["interpreter"]) if row["attack"] == "adv2" else ""]
    return " ".join(part for part in parts if part)
