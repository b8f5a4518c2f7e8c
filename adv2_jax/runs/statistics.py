"""How sure a mean or a proportion over images is."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
BLOCK = 2**20  # numbers held at a time


def interval(values: ArrayLike, *, seed: int = 0, confidence: float = 0.95) -> list[float] | None:
    """Percentile bootstrap interval of a mean over images.

    Args:
        values: numbers [N], one an image.
        seed: of the resampling; equal values and seed give the same interval.
        confidence: share of intervals that hold the true mean.

    Returns:
        [low, high]; None of fewer than two images, which say nothing of how much images differ.
    """
    from scipy.stats import bootstrap  # takes a second: only where it is used

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    found = bootstrap(
        (values,),
        np.mean,
        axis=0,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(BLOCK // len(values), 1),
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def proportion_interval(values: ArrayLike, *, confidence: float = 0.95) -> list[float] | None:
    """Wilson's interval of a proportion; unlike a bootstrap it is wide where all images agree:
    [.81, 1] for 16 of 16.

    Args:
        values: booleans [N], one an image.
        confidence: share of intervals that hold the true proportion.

    Returns:
        [low, high]; None of no image.
    """
    from scipy.stats import binomtest

    hits = np.asarray(values, bool)
    if not len(hits):
        return None
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(confidence, method="wilson")
    return [float(found.low), float(found.high)]


def intervals(measures: Mapping[str, ArrayLike], *, seed: int = 0) -> dict[str, list[float]]:
    """The interval of each measure, by name, Wilson's for booleans; those without one are left out."""
    found = {
        name: proportion_interval(values)
        if np.asarray(values).dtype == bool
        else interval(values, seed=seed)
        for name, values in measures.items()
    }
    return {name: ends for name, ends in found.items() if ends is not None}
