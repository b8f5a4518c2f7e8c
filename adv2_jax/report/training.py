"""A finished training as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

from adv2_jax.files import read_summary
from adv2_jax.report import charts, page, tables, words
from adv2_jax.runs.schema import Row


def write_training(directory: Path | str) -> Path:
    """Reads `summary.json` of a finished training and writes `report.html` next to it: loss curve,
    and what was measured.

    Args:
        directory: the folder of the training.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there is no summary, or it has another schema.
    """
    folder = Path(directory)
    summary = read_summary(folder)
    config, counts = summary["config"], summary["counts"]
    facts = {
        "Model": config["model"],
        "Images trained on": counts["train"],
        "Held out": counts["held_out"],
    }
    for key, name in (("accuracy", "Held-out accuracy"), ("accuracy_before", "Before")):
        if summary.get(key) is not None:
            facts[name] = f"{summary[key]:.4f}"
    body = page.template("training.html").substitute(
        facts=words.definitions(facts, "facts"),
        curve=_curve(summary["losses"]),
        quality=_quality(summary.get("quality", [])),
        reproduction=page.reproduction(config, summary.get("environment", {})),
    )
    return page.write_page(folder, page.document("Training", body, page.style()))


def _curve(losses: Sequence[float]) -> str:
    line = charts.over_steps("loss", losses)
    return charts.chart(
        [line], anchor="curve", title="Loss of a step", limits=[0.0]
    ) + charts.legend([line], "Band: smallest to largest.")


def _quality(rows: Sequence[Row]) -> str:
    return QUALITY.substitute(table=tables.quality(rows)) if rows else ""


QUALITY = Template("""<section aria-labelledby="quality">
<h2 id="quality">Do the maps explain?</h2>
<div class="scroll" role="region" aria-label="Quality table" tabindex="0">$table</div>
<p class="note">On N held-out images that the network gets right. Confidence kept: the share that is left where only what
the map marks is shown. Confidence removed: what is left where that is hidden. Inside, outside: the map on the object and beside it.
Pointing game: share of maps that peak on the object. IoU: of the map at .5 and the object.</p>
</section>
""")
