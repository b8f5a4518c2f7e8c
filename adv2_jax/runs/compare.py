"""Several networks under the same attack on the same images: their finished runs, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adv2_jax.files import intact, read_summary
from adv2_jax.identity import changes
from adv2_jax.runs.run import identity
from adv2_jax.runs.schema import Row, interval
from adv2_jax.runs.store import CURVATURE_FILES

# what may differ between the runs: the network and what belongs to it, where the images were, and
# what changes no result
FREE = (
    *("model", "weights", "weights_key", "masker", "mean", "std", "interpreter"),
    *("images", "limit", "batch_size", "snapshots", "keep", "network"),
)


def compare(directories: Sequence[Path]) -> dict[str, Any]:
    """Return the rows of several runs of one attack on one image set.

    Each network is attacked on the images that it gets right, so the number of images may differ.

    Args:
        directories: folders of finished runs, two or more; the last parts of their names, or the
            names themselves where these are equal, name the networks.

    Returns:
        `networks`, a row for each run: `model`, `images`, `accuracy` on all of them, its interval in
        `ci`, and `curvature`, the row of the benign images where it was measured. `rows`, those of
        all runs with the network as `model`, by interpreter.

    Raises:
        ValueError: fewer than two folders; one holds no attack, or one of other settings or images
            than the first (says which).
    """
    if len(directories) < 2:
        raise ValueError("a comparison needs two finished runs or more")
    ends = [one.resolve().name for one in directories]
    names = ends if len(set(ends)) == len(ends) else list(map(str, directories))
    networks, rows, first = [], [], None
    for name, directory in zip(names, directories, strict=True):
        summary = read_summary(directory)
        if not summary.get("rows"):
            raise ValueError(f"{directory} holds no attack: its summary.json has no rows")
        with intact(directory / "summary.json"):
            settings = identity(summary["config"], summary["fingerprints"])
            networks.append({"model": name} | _network(summary) | _curvature(directory))
            rows += [row | {"model": name} for row in summary["rows"]]
        asked = {key: value for key, value in settings.items() if key not in FREE}
        first = asked if first is None else first
        if changed := changes(first, asked):
            raise ValueError(
                f"{directory} is a run of another attack than {directories[0]}: {changed}"
            )
    order = list(dict.fromkeys(row["interpreter"] for row in rows))
    return {
        "networks": networks,
        "rows": sorted(rows, key=lambda row: order.index(row["interpreter"])),
    }


def _network(summary: dict[str, Any]) -> Row:
    """Return how many images there were, and the share that the network gets right."""
    right = np.arange(summary["counts"]["images"]) >= summary["counts"]["left_out"]
    return {
        "images": len(right),
        "accuracy": float(right.mean()),
        "ci": {"accuracy": interval(right)},
    }


def _curvature(directory: Path) -> Row:
    """Return the means of curvature at the benign images of a run; nothing if not measured."""
    if not (directory / CURVATURE_FILES[0]).exists():
        return {}
    rows = read_summary(directory, CURVATURE_FILES[0])["rows"]
    (benign,) = (row for row in rows if row["images"] == "benign")
    return {"curvature": benign}
