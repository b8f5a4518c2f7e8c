"""Whether an attack missed for a numerical reason, rather than because a network withstood it.

Obfuscated gradients make an attack fail, and a network look robust (Athalye et al. 2018). What
gives them away is seen in the reports of the steps. To add a check, add a row to `DOUBTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adv2_jax import metrics
from adv2_jax.attacks import Result
from adv2_jax.runs.schema import Evaluated, Measures

Flags = NDArray[np.bool_]

GAIN = 0.02  # of map L1; smaller ones do not count
GROWTH = 1.2  # of the confidence; smaller ones do not count


@dataclass(frozen=True)
class Doubt:
    """A numerical reason, and what it says.

    Attributes:
        key: in the rows of a run.
        said: of so many images, in words.
        holds: (evaluated, result, missed [N]) -> [N], on which images.
    """

    key: str
    said: str
    holds: Callable[[Evaluated, Result, Flags], Flags]


def _same(curve: NDArray[np.floating]) -> Flags:
    """Return whether a curve [N, n] has one value at all steps that draw it."""
    return np.asarray(((curve == curve[:, -1:]) | np.isnan(curve)).all(axis=1))


def _tiny(confidence: NDArray[np.floating]) -> Flags:
    # below this 2 - f_t is 2, and no iterate is better than another (`descent.criterion`)
    return np.asarray((confidence < np.finfo(np.float32).eps).all(axis=1))


def _no_slope(evaluated: Evaluated, result: Result, missed: Flags) -> Flags:
    loss, confidence, map_l1 = map(np.asarray, result.curves)
    last = map_l1[:, -1]
    # with λ the joint loss changes even if the image does not, a confidence of 0 does not if it does
    still = (
        _same(confidence) & _same(map_l1) & (_same(loss) | ~(_tiny(confidence) | np.isnan(last)))
    )
    return still & (missed | (last > GAIN))


def _no_confidence(evaluated: Evaluated, result: Result, missed: Flags) -> Flags:
    return (
        missed & _tiny(np.asarray(result.curves.confidence)) & ~_no_slope(evaluated, result, missed)
    )


def _rounded(evaluated: Evaluated, result: Result, missed: Flags) -> Flags:
    lost = missed & metrics.success(result.float_logits, evaluated.targets)
    if evaluated.float_maps is None:
        return lost
    exact, map_l1 = (
        metrics.map_l1(maps, evaluated.target_maps)
        for maps in (evaluated.float_maps, evaluated.maps)
    )
    return lost | (~missed & (map_l1 > 2 * exact + GAIN))


def _unfinished(evaluated: Evaluated, result: Result, missed: Flags) -> Flags:
    # from half of the steps on: under a decayed step size the last of them gain nothing anyway
    confidence = np.asarray(result.curves.confidence)
    return missed & (confidence[:, -1] > GROWTH * confidence[:, confidence.shape[1] // 2])


def _disagree(evaluated: Evaluated, result: Result, missed: Flags) -> Flags:
    surrogate = result.curves.map_l1[:, -1]  # NaN of plain PGD compares as False
    return ~missed & (metrics.map_l1(evaluated.maps, evaluated.target_maps) > 2 * surrogate + GAIN)


DOUBTS = (
    Doubt(
        "no_slope",
        "got no gradient at all: look for rounding or thresholds in the network",
        _no_slope,
    ),
    Doubt(
        "no_confidence",
        "never saw a confidence above 1e-7: logits so large leave nothing to follow",
        _no_confidence,
    ),
    Doubt("rounded", "lost to rounding what the image had before 8 bits", _rounded),
    Doubt(
        "unfinished", "still gained in the second half of the steps: give more --steps", _unfinished
    ),
    Doubt(
        "disagree",
        "look much closer to the surrogate than to the interpreter: more --steps, or another preset",
        _disagree,
    ),
)


def doubts(evaluated: Evaluated, result: Result) -> dict[str, Flags]:
    """Return of each reason whether it holds, [N]; nothing of an attack of less than two steps."""
    if result.curves.loss.shape[1] < 2:
        return {}
    missed = ~metrics.success(evaluated.logits, evaluated.targets)
    return {doubt.key: doubt.holds(evaluated, result, missed) for doubt in DOUBTS}


def counts(measures: Measures) -> dict[str, int]:
    """Return on how many images that did not fail each reason holds, where it holds on any."""
    good = ~measures["failed"]
    numbers = {
        doubt.key: int((measures[doubt.key] & good).sum())
        for doubt in DOUBTS
        if doubt.key in measures
    }
    return {key: n for key, n in numbers.items() if n}
