"""From numbers of images to the rows of a run: means, with how sure they are, and paired differences."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax.runs import schema
from adv2_jax.runs.schema import Row

RESAMPLES = 2000
BLOCK = 2**20  # numbers held at a time: the resamples of all images at once would not fit memory

Measures = Mapping[str, NDArray[Any]]


def interval(values: ArrayLike, *, seed: int = 0, confidence: float = 0.95) -> list[float] | None:
    """Return the percentile bootstrap interval of a mean, or Wilson's of a proportion.

    Wilson's is wide where all images agree, [.81, 1] for 16 of 16; a bootstrap would say [1, 1].

    Args:
        values: numbers [N], one an image; booleans are those of a proportion.
        seed: of the resampling; equal values and seed give the same interval.
        confidence: share of intervals that hold the true mean or proportion.

    Returns:
        [low, high]; None of no image, and of a single number, which says nothing of how much
        images differ.
    """
    from scipy.stats import binomtest, bootstrap  # takes a second: only where it is used

    values = np.asarray(values)
    if len(values) == 0 or (len(values) == 1 and values.dtype != bool):
        return None
    if values.dtype == bool:
        test = binomtest(int(values.sum()), len(values))
        ends = test.proportion_ci(confidence, method="wilson")
    else:
        ends = bootstrap(
            (values.astype(np.float64),),
            np.mean,
            axis=0,
            method="percentile",
            n_resamples=RESAMPLES,
            batch=max(BLOCK // len(values), 1),
            confidence_level=confidence,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return [float(ends.low), float(ends.high)]


def mean(values: NDArray[Any], total: Any = np.mean) -> float | None:
    """Return the mean of some numbers, or another total; None of none."""
    return float(total(values)) if len(values) else None


def row(measures: Measures, *, seed: int) -> Row:
    """Return the numbers of a row: totals over the `n` images that did not fail.

    Args:
        measures: [N] by key (`schema.measure`).
        seed: of the bootstrap.

    Returns:
        `n`; `failed`, the number of images that did; a total for each measure, None where there
        is nothing to be averaged; `ci`, the intervals of most.
    """
    good = ~measures["failed"]
    numbers: Row = {"n": int(good.sum()), "failed": int((~good).sum())}
    intervals = {}
    for one in schema.MEASURES:
        if one.key in measures:
            counted = good & measures["asr"] if one.of_successes else good
            values = measures[one.key][counted]
            numbers[one.key] = mean(values, one.total)
            if one.interval and (ends := interval(values, seed=seed)) is not None:
                intervals[one.key] = ends
    return numbers | {"ci": intervals}


def paired(pgd: Measures, adv2: Measures, *, seed: int) -> list[Row]:
    """Return ADV² - PGD on the images on which neither failed, a row for each paired measure."""
    both = ~(pgd["failed"] | adv2["failed"])
    rows = []
    for one in schema.MEASURES:
        if one.paired:
            values = (adv2[one.key] - pgd[one.key])[both]
            ends = interval(values, seed=seed)
            rows.append(
                {"measure": one.key, "n": len(values), "difference": mean(values), "ci": ends}
            )
    return rows
