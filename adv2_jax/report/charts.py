"""Drawings in SVG: curves over the steps of an attack or a training, and arrows of a flow field."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax.report.pictures import resample

Numbers = NDArray[np.float64]

WIDTH, HEIGHT = 340, 210  # of a chart, its text included
# edges of the plot in the chart; right of it is room for half of the last number of steps
LEFT, RIGHT, TOP, BOTTOM = (48, 320, 12, 176)
ARROWS = 14  # in a row, at most: more are too small to see
CELL = 40  # side of a square of the grid of arrows, in units of the drawing


class Line(NamedTuple):
    """A curve with a band around it.

    Attributes:
        name: in the legend.
        kind: style: pgd, adv2, joint or loss.
        steps: [n], increasing.
        middle, low, high: [n] finite numbers.
    """

    name: str
    kind: str
    steps: Numbers
    middle: Numbers
    low: Numbers
    high: Numbers


def over_images(name: str, kind: str, steps: ArrayLike, values: ArrayLike) -> Line | None:
    """Return the mean over the images, with the quartiles as the band.

    Images without a finite last number, which failed, do not count. Steps at which one of the
    others has no finite number are left out.

    Args:
        name, kind: as of `Line`.
        steps: [n].
        values: [N, n].

    Returns:
        The curve; None if there is nothing to draw.
    """
    numbers: Numbers = np.asarray(values, float)
    numbers = numbers[np.isfinite(numbers[:, -1:]).all(axis=1)]
    if not numbers.size:
        return None
    finite = np.isfinite(numbers).all(axis=0)
    numbers = numbers[:, finite]
    low, high = np.quantile(numbers, [0.25, 0.75], axis=0)
    return Line(name, kind, np.asarray(steps, float)[finite], numbers.mean(axis=0), low, high)


def over_steps(name: str, values: Sequence[float], *, points: int = 200) -> Line:
    """Return the loss of every step of a training: means of consecutive steps, and their range.

    Args:
        name: in the legend.
        values: one number a step, at least one.
        points: number of means, at most.
    """
    groups = np.array_split(np.asarray(values, float), min(points, len(values)))
    sizes, middle, low, high = np.array(
        [(len(group), np.mean(group), np.min(group), np.max(group)) for group in groups]
    ).T
    return Line(name, "loss", np.cumsum(sizes), middle, low, high)


def ticks(low: float, high: float, *, at_most: int = 6) -> Numbers:
    """Return round numbers that reach from `low` or below to `high` or above.

    Their distance is 1, 2 or 5 times a power of ten.
    """
    least = (high - low or abs(high) or 1.0) / (at_most - 2)
    power = 10.0 ** math.floor(math.log10(least))
    # 1e-9 absorbs rounding: 3 * 0.1 / 0.1 is a little more than 3
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return step * np.arange(first, max(last, first + 1) + 1, dtype=np.float64)


def chart(
    lines: Sequence[Line],
    *,
    anchor: str,
    title: str,
    limits: Sequence[float] = (),
    across: str = "step",
    reach: Sequence[float] = (),
    marks: Sequence[str] = (),
) -> str:
    """Draw curves over the steps in one plot, with axes and a description in words.

    Args:
        lines: at least one.
        anchor: unique on the page; the identifiers of title and description begin with it.
        title: what is drawn, with its unit.
        limits: numbers that the vertical axis must reach.
        across: what the horizontal axis is, if not the step.
        reach: its ends; those of the curves, at least one step apart, unless given.
        marks: of the points of each curve, if it is of a few.

    Returns:
        A figure.
    """
    heights = np.concatenate([np.ravel([line.low, line.high, line.middle]) for line in lines])
    levels = ticks(min([heights.min(), *limits]), max([heights.max(), *limits]))
    first, last = reach or (
        min(line.steps[0] for line in lines),
        max(line.steps[-1] for line in lines),
    )

    # at least one step wide: a curve may have a single point
    x: Callable[[ArrayLike], Any] = partial(
        np.interp, xp=[first, last if last > first else first + 1], fp=[LEFT, RIGHT]
    )
    y: Callable[[ArrayLike], Any] = partial(np.interp, xp=[levels[0], levels[-1]], fp=[BOTTOM, TOP])

    def points(steps: Numbers, values: Numbers) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(steps), y(values), strict=True))

    description = "; ".join(
        f"{line.name} from {line.middle[0]:.3g} to {line.middle[-1]:.3g}" for line in lines
    )
    # 3.5 below the line: text stands on its baseline, and is centred on the line so
    parts = [
        f'<path class="grid" d="M{LEFT} {y(level):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(level) + 3.5:.1f}" text-anchor="end">{level:g}</text>'
        for level in levels
    ]
    parts += [
        f'<path class="axis" d="M{x(step):.1f} {BOTTOM}v4"/>'
        f'<text x="{x(step):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{step:g}</text>'
        for step in ticks(first, last, at_most=8)
        if first <= step <= last
    ]
    # bands first: none is to hide a curve
    parts += [
        f'<polygon class="{line.kind}" points="{points(line.steps, line.high)} '
        f'{points(line.steps[::-1], line.low[::-1])}"/>'
        for line in lines
    ]
    parts += [
        f'<polyline class="{line.kind}" points="{points(line.steps, line.middle)}"/>'
        for line in lines
    ]
    parts += [
        f'<text x="{x(step):.1f}" y="{y(value) - 4:.1f}" text-anchor="middle">{escape(mark)}</text>'
        f'<circle class="{line.kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>'
        for line in lines
        for mark, step, value in zip(marks, line.steps, line.middle, strict=bool(marks))
    ]
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{anchor}-title {anchor}-words">'
        f'<title id="{anchor}-title">{escape(title)}</title>'
        f'<desc id="{anchor}-words">{escape(description)}, over {across} {first:g} to {last:g}.</desc>'
        f'{"".join(parts)}<text x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{across}</text>'
        "</svg></figure>"
    )


def legend(lines: Iterable[Line], note: str) -> str:
    """Draw the style of each curve with its name, and a note on what curves and bands are."""
    samples = (
        f'<span><svg class="sample" viewBox="0 0 36 8" aria-hidden="true">'
        f'<path class="{line.kind}" d="M0 4H36"/></svg> {escape(line.name)}</span>'
        for line in lines
    )
    return f'<p class="note legend">{" ".join(samples)} <span>{escape(note)}</span></p>'


def arrows(flow: NDArray[Any], alt: str) -> str:
    """Draw a flow field on a coarse grid; the longest arrow is as long as a square of the grid.

    Args:
        flow: [H, W, 2], (dy, dx) of each pixel.
        alt: description in words.

    Returns:
        A drawing with the proportions of the flow.
    """
    height, width = flow.shape[:2]
    cell = max(height, width) / min(max(height, width), ARROWS)
    coarse = resample(flow, round(height / cell) or 1, round(width / cell) or 1)
    rows, columns = coarse.shape[:2]
    longest = np.linalg.norm(coarse, axis=-1).max() or 1.0  # no flow: nothing is drawn
    scaled = coarse * CELL / longest
    path = "".join(_arrow(i, j, *scaled[i, j]) for i, j in np.ndindex(rows, columns))
    # stretched over the picture, whose ratio a grid of whole squares may miss
    return (
        f'<svg class="arrows" viewBox="0 0 {columns * CELL} {rows * CELL}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(alt)}"><path d="{path}"/></svg>'
    )


def _arrow(i: int, j: int, down: float, right: float) -> str:
    """Draw an arrow from the middle of square (i, j); nothing if it is too short to be seen."""
    if math.hypot(down, right) < CELL / 20:
        return ""
    shaft, across = np.array([[right, down], [-down, right]])
    # the head: two strokes from the tip backwards, one to either side
    left_barb, right_barb = -0.35 * shaft - 0.2 * across, -0.35 * shaft + 0.2 * across
    # m, a move, goes back to the tip; whole numbers keep a page of many arrows small
    strokes = zip("llml", (shaft, right_barb, -right_barb, left_barb), strict=True)
    return f"M{(j + 0.5) * CELL:g} {(i + 0.5) * CELL:g}" + "".join(
        f"{command}{round(x)} {round(y)}" for command, (x, y) in strokes
    )
