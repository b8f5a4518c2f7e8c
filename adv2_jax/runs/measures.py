"""What an attack did, in numbers: one an image, and their means with intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax import metrics
from adv2_jax.attacks import Result, finite
from adv2_jax.runs.statistics import interval, intervals

Row = dict[str, Any]
Measures = dict[str, NDArray[Any]]

# and mc
WITH_INTERVAL = (
    "asr",
    "map_l1",
    "map_l2",
    "map_iou75",
    "map_iou50",
    "pointing_game",
    "benign_pointing_game",
)
PAIRED = ("map_l1", "map_iou75")


def measure(
    benign: np.ndarray, targets: np.ndarray, target_maps: np.ndarray, result: Result
) -> Measures:
    """The measures of method §8 on the 8-bit images, and `float_...`, two of them before rounding.

    Args:
        benign: uint8 [N, H, W, 3].
        targets: [N] target classes.
        target_maps: [N, h, w].
        result: of an attack on them, with the maps that the interpreter in question draws.

    Returns:
        [N] by name: `asr` says which images are successes, `confidence` is f_t, `failed` which
        images gave no finite numbers: what else is said of these means nothing.
    """
    found: dict[str, ArrayLike] = {
        "failed": result.failed | ~finite((result.maps, result.float_maps, target_maps)),
        "asr": metrics.success(result.logits, targets),
        "confidence": metrics.confidence(result.logits, targets),
        "map_l1": metrics.map_l1(result.maps, target_maps),
        "map_l2": metrics.map_l2(result.maps, target_maps),
        "map_iou75": metrics.iou_quantile(result.maps, target_maps),
        "map_iou50": metrics.iou_threshold(result.maps, target_maps),
        "linf": metrics.linf(result.images, benign),
        "l2": metrics.l2(result.images, benign),
        "float_map_l1": metrics.map_l1(result.float_maps, target_maps),
        "float_map_iou75": metrics.iou_quantile(result.float_maps, target_maps),
    }
    return {name: np.asarray(values) for name, values in found.items()}


def row(measures: Measures, *, seed: int) -> Row:
    """Means over the `n` images that did not fail, of which there are `failed`; None where there is
    nothing to be averaged.

    But `linf` is the largest; `mc` is the mean confidence of the successes; `ci` holds the
    intervals of most.
    """
    failed = measures["failed"]
    good = {name: values[~failed] for name, values in measures.items() if name != "failed"}
    good["mc"] = good.pop("confidence")[good["asr"]]
    spread = {name: values for name, values in good.items() if name in (*WITH_INTERVAL, "mc")}
    return {
        "n": int((~failed).sum()),
        "failed": int(failed.sum()),
        **{name: mean(values) for name, values in good.items()},
        "linf": float(good["linf"].max()) if len(good["linf"]) else None,
        "ci": intervals(spread, seed=seed),
    }


def mean(values: NDArray[Any]) -> float | None:
    """The mean of some numbers; None of none."""
    return float(np.mean(values)) if len(values) else None


def paired(
    pgd: Mapping[str, NDArray[Any]], adv2: Mapping[str, NDArray[Any]], *, seed: int
) -> list[Row]:
    """ADV² - PGD on the images on which neither failed, a row for each measure of the maps; fewer than two have no interval."""
    rows = []
    both = ~(pgd["failed"] | adv2["failed"])
    for name in PAIRED:
        difference = (adv2[name] - pgd[name])[both]
        row = {
            "measure": name,
            "n": len(difference),
            "difference": mean(difference),
            "ci": interval(difference, seed=seed),
        }
        rows.append(row)
    return rows
