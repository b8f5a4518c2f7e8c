"""Several networks under one attack, or one under attacks of several sizes: runs side by side."""

from collections.abc import Mapping, Sequence
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

# numbers of an attack in which runs of one network may differ, one at a time
SWEPT = ("epsilon", "steps", "restarts")


def compare(directories: Sequence[Path]) -> dict[str, Any]:
    """Return the rows of several runs on one image set: of one attack, or of one network.

    Each network is attacked on the images that it gets right, so the number of images may differ.

    Args:
        directories: folders of finished runs, two or more; the last parts of their names, or the
            names themselves where these are equal, name the networks.

    Returns:
        `networks`, a row for each run: `model`, `images`, `accuracy` on all of them, its interval in
        `ci`, and `curvature`, the row of the benign images where it was measured. `rows`, those of
        all runs with the network as `model`, by interpreter. Where runs of one network differ in
        one number of `SWEPT`, `setting` is its name, and each network has it.

    Raises:
        ValueError: fewer than two folders; one holds no attack, or one of other settings or images
            than the first (says which).
    """
    if len(directories) < 2:
        raise ValueError("a comparison needs two finished runs or more")
    ends = [one.resolve().name for one in directories]
    names = ends if len(set(ends)) == len(ends) else list(map(str, directories))
    networks, rows, asked = [], [], []
    for name, directory in zip(names, directories, strict=True):
        summary = read_summary(directory)
        if not summary.get("rows"):
            raise ValueError(f"{directory} holds no attack: its summary.json has no rows")
        with intact(directory / "summary.json"):
            asked.append(identity(summary["config"], summary["fingerprints"]))
            networks.append({"model": name} | _network(summary) | _curvature(directory))
            rows += [row | {"model": name} for row in summary["rows"]]
    setting = _swept(asked)
    for directory, settings in zip(directories, asked, strict=True):
        if changed := changes(*(_bound(one, setting) for one in (asked[0], settings))):
            raise ValueError(
                f"{directory} is a run of another attack than {directories[0]}: {changed}"
            )
    if setting is not None:
        networks = [row | {setting: one[setting]} for row, one in zip(networks, asked, strict=True)]
    order = list(dict.fromkeys(row["interpreter"] for row in rows))
    return {
        "setting": setting,
        "networks": networks,
        "rows": sorted(rows, key=lambda row: order.index(row["interpreter"])),
    }


def _swept(asked: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the number in which runs of one network differ; None if it is none, or several."""
    keys = [key for key in SWEPT if any(one.get(key) != asked[0].get(key) for one in asked)]
    if len(keys) != 1 or any(one.get("network") != asked[0].get("network") for one in asked):
        return None
    return keys[0] if all(isinstance(one.get(keys[0]), int | float) for one in asked) else None


def _bound(settings: Mapping[str, Any], setting: str | None) -> dict[str, Any]:
    """Return the settings that must be equal."""
    return {key: value for key, value in settings.items() if key not in (*FREE, setting)}


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
