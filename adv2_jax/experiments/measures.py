"""What an attack did, in numbers: one an image, and their means with intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax import metrics
from adv2_jax.attack import Result
from adv2_jax.experiments.statistics import interval, intervals

Row = dict[str, Any]
Measures = dict[str, NDArray[Any]]

WITH_INTERVAL = ("asr", "map_l1", "map_l2", "map_iou75", "map_iou50")  # and mc
PAIRED = ("map_l1", "map_iou75")


def measure(benign: np.ndarray, targets: np.ndarray, target_maps: np.ndarray, result: Result) -> Measures:
    """The measures of method §8 on the 8-bit images, and `float_...`, two of them before rounding.

    Args:
        benign: uint8 [N, H, W, 3].
        targets: [N] target classes.
        target_maps: [N, h, w].
        result: of an attack on them, with the maps that the interpreter in question draws.

    Returns:
        [N] by name: `asr` says which images are successes, `confidence` is f_t.
    """
    x, x0 = result.images / np.float32(255), benign / np.float32(255)
    found: dict[str, ArrayLike] = {
        "asr": metrics.success(result.logits, targets),
        "confidence": metrics.confidence(result.logits, targets),
        "map_l1": metrics.map_l1(result.maps, target_maps),
        "map_l2": metrics.map_l2(result.maps, target_maps),
        "map_iou75": metrics.iou_quantile(result.maps, target_maps),
        "map_iou50": metrics.iou_threshold(result.maps, target_maps),
        "linf": metrics.linf(x, x0),
        "l2": metrics.l2(x, x0),
        "float_map_l1": metrics.map_l1(result.float_maps, target_maps),
        "float_map_iou75": metrics.iou_quantile(result.float_maps, target_maps),
    }
    return {name: np.asarray(values) for name, values in found.items()}


def row(measures: Measures, *, seed: int) -> Row:
    """Means over the images, but `linf`, the largest; `mc`, the mean confidence of the successes; and intervals of most."""
    measures = dict(measures)
    confidence = measures.pop("confidence")[measures["asr"]]
    means = {name: float(np.mean(values)) for name, values in measures.items()}
    spread = {name: measures[name] for name in WITH_INTERVAL} | {"mc": confidence}
    return {
        "n": len(measures["asr"]),
        **means,
        "mc": float(confidence.mean()) if len(confidence) else None,
        "linf": float(measures["linf"].max()),
        "ci": intervals(spread, seed=seed),
    }


def paired(pgd: Mapping[str, NDArray[Any]], adv2: Mapping[str, NDArray[Any]], *, seed: int) -> list[Row]:
    """ADV² - PGD on the same images, a row for each measure of the maps."""
    rows = []
    for name in PAIRED:
        difference = adv2[name] - pgd[name]
        row = {"measure": name, "n": len(difference), "difference": float(difference.mean()), "ci": interval(difference, seed=seed)}
        rows.append(row)
    return rows
