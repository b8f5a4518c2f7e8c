"""A finished training as one HTML page."""

from pathlib import Path

from adv2_jax.files import read_summary
from adv2_jax.report import charts, page, tables, words


def write_training(directory: Path | str) -> Path:
    """Write `report.html` from `summary.json` of a finished training: loss, and what was measured.

    Args:
        directory: the folder of the training.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no summary, or it has another schema.
    """
    folder = Path(directory)
    summary = read_summary(folder)
    facts = {
        "Model": summary["config"]["model"],
        "Images trained on": summary["counts"]["train"],
        "Held out": summary["counts"]["held_out"],
    }
    accuracies = {
        "Held-out accuracy": summary.get("accuracy"),
        "Before": summary.get("accuracy_before"),
        "Accuracy under PGD": summary.get("robust_accuracy"),
        "Under PGD before": summary.get("robust_accuracy_before"),
    }
    # a masker has no accuracy, and a fresh network none before
    facts |= {key: words.number(one, 4) for key, one in accuracies.items() if one is not None}
    # a loss of thousands of steps has more points than the chart has pixels: a band holds those of
    # a column
    loss, rows = charts.over_steps("loss", summary["losses"]), summary.get("quality")
    curve = charts.chart([loss], anchor="curve", title="Loss of a step", limits=[0.0])
    curve += charts.legend([loss], "Band: smallest to largest.")
    sections = page.section("loss", "Loss", curve)
    if rows:
        quality = tables.quality(rows)
        sections += page.section("quality", "Do the maps explain?", quality, QUALITY)
    body = page.template("plain.html").substitute(
        title="Training",
        facts=words.definitions(facts, "facts"),
        sections=sections,
        reproduction=page.reproduction(summary),
    )
    return page.write_page(folder, page.document("Training", body))


QUALITY = """On N held-out images that the network gets right. Confidence kept: the share that is
left where only what the map marks is shown. Confidence removed: what is left where that is hidden.
Inside, outside: the map on the object and beside it. Pointing game: share of maps that peak on the
object. IoU: of the map at .5 and the object."""
