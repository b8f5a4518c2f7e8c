"""Drawings in SVG: curves over the steps of an attack or a training, and arrows of a flow field."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adv2_jax.report.pictures import resample

Numbers = NDArray[np.float64]

WIDTH, HEIGHT = 340, 210  # of a chart, its text included
# edges of the plot in it; half of the last number of steps lies beyond
LEFT, RIGHT, TOP, BOTTOM = (48, 320, 12, 176)
ARROWS = 14  # in a row, at most: more are too small to see
CELL = 40  # side of the square of an arrow


class Line(NamedTuple):
    """A curve and the band around it.

    Attributes:
        name: in the legend.
        kind: its style: pgd, adv2 or loss.
        steps: [n], rising.
        middle, low, high: [n] finite numbers.
    """

    name: str
    kind: str
    steps: Numbers
    middle: Numbers
    low: Numbers
    high: Numbers


class Axis(NamedTuple):
    """From numbers to the drawing: `start` and `end` lie at `near` and `far`."""

    start: float
    end: float
    near: float
    far: float

    def __call__(self, values: ArrayLike) -> Numbers:
        """Places of some numbers."""
        return self.near + (np.asarray(values, float) - self.start) * (self.far - self.near) / (
            self.end - self.start
        )


def over_images(name: str, kind: str, steps: ArrayLike, values: ArrayLike) -> Line | None:
    """The mean over the images that have a number at the end, with the quartiles as the band, where
    all of them have one.

    Args:
        name, kind: as of `Line`.
        steps: [n].
        values: [N, n].

    Returns:
        The curve; None if there is nothing to draw.
    """
    numbers: Numbers = np.asarray(values, float)
    numbers = numbers[np.isfinite(numbers[:, -1])] if numbers.size else numbers
    finite = np.isfinite(numbers).all(axis=0)
    if not numbers.size or not finite.any():
        return None
    low, high = np.quantile(numbers[:, finite], [0.25, 0.75], axis=0)
    return Line(
        name, kind, np.asarray(steps, float)[finite], numbers[:, finite].mean(axis=0), low, high
    )


def over_steps(name: str, values: Sequence[float], *, points: int = 200) -> Line:
    """The loss of every step of a training, as means of consecutive steps with their range as the
    band.

    Args:
        name: in the legend.
        values: one number a step, at least one.
        points: how many means, at most.
    """
    parts = np.array_split(np.asarray(values, float), min(points, len(values)))
    steps, middle, low, high = np.array(
        [(len(part), np.mean(part), np.min(part), np.max(part)) for part in parts]
    ).T
    return Line(name, "loss", np.cumsum(steps), middle, low, high)


def ticks(low: float, high: float, *, at_most: int = 6) -> Numbers:
    """Round numbers, 1, 2 or 5 times a power of ten apart, the first not above `low` and the last not below `high`."""
    least = (high - low or abs(high) or 1.0) / (at_most - 2)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return step * np.arange(first, max(last, first + 1) + 1, dtype=np.float64)


def chart(lines: Sequence[Line], *, anchor: str, title: str, limits: Sequence[float] = ()) -> str:
    """Curves over the steps in one plot, with axes, and words for those who do not see it.

    Args:
        lines: at least one.
        anchor: unique on the page; its names are made of it.
        title: what is drawn, with its unit.
        limits: numbers that the vertical axis must reach.

    Returns:
        A figure.
    """
    heights = np.concatenate([np.ravel([line.low, line.high, line.middle]) for line in lines])
    levels = ticks(min([heights.min(), *limits]), max([heights.max(), *limits]))
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    x = Axis(first, last if last > first else first + 1, LEFT, RIGHT)
    y = Axis(levels[0], levels[-1], BOTTOM, TOP)
    parts = [_level(y, level, levels) for level in levels]
    parts += [_step(x, step) for step in ticks(first, last, at_most=8) if first <= step <= last]
    parts += [_band(line, x, y) for line in lines] + [_curve(line, x, y) for line in lines]
    told = "; ".join(
        f"{line.name} from {line.middle[0]:.3g} to {line.middle[-1]:.3g}" for line in lines
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{anchor}-title {anchor}-words">'
        f'<title id="{anchor}-title">{escape(title)}</title>'
        f'<desc id="{anchor}-words">{escape(told)}, over steps {first:g} to {last:g}.</desc>'
        f'{"".join(parts)}<text x="{RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text></svg></figure>'
    )


def legend(lines: Iterable[Line], words: str) -> str:
    """The style of each curve with its name, and what the curves and bands are."""
    samples = (
        f'<span><svg class="sample" viewBox="0 0 36 8" aria-hidden="true"><path class="{line.kind}" d="M0 4H36"/></svg> '
        f"{escape(line.name)}</span>"
        for line in lines
    )
    return f'<p class="note legend">{" ".join(samples)} <span>{escape(words)}</span></p>'


def _level(y: Axis, level: float, levels: Numbers) -> str:
    """A horizontal line with its number, which has the decimals that the distance of the lines asks for."""
    decimals = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9))
    height = y(level)
    return (
        f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{round(level, decimals) + 0:g}</text>'
    )


def _step(x: Axis, step: float) -> str:
    place = f"{x(step):.1f}"
    return f'<path class="axis" d="M{place} {BOTTOM}v4"/><text x="{place}" y="{BOTTOM + 16}" text-anchor="middle">{step:g}</text>'


def _band(line: Line, x: Axis, y: Axis) -> str:
    outline = _points(x(line.steps), y(line.high)) + _points(x(line.steps), y(line.low))[::-1]
    return f'<polygon class="{line.kind}" points="{" ".join(outline)}"/>'


def _curve(line: Line, x: Axis, y: Axis) -> str:
    return f'<polyline class="{line.kind}" points="{" ".join(_points(x(line.steps), y(line.middle)))}"/>'


def _points(x: Numbers, y: Numbers) -> list[str]:
    return [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]


def arrows(flow: NDArray[Any], alt: str) -> str:
    """A flow field on a coarse grid, the longest arrow as long as the distance of two.

    Args:
        flow: [H, W, 2], (dy, dx) of each pixel.
        alt: what it is, for those who do not see it.

    Returns:
        A drawing of the proportions of the flow.
    """
    height, width = flow.shape[:2]
    cell = max(height, width) / min(max(height, width), ARROWS)
    coarse = resample(flow, round(height / cell) or 1, round(width / cell) or 1)
    longest = np.max(np.linalg.norm(coarse, axis=-1))
    rows, columns = coarse.shape[:2]
    scaled = coarse * CELL / longest if longest > 0 else coarse
    path = "".join(_arrow(i, j, *scaled[i, j]) for i in range(rows) for j in range(columns))
    return (
        f'<svg class="arrows" viewBox="0 0 {columns * CELL} {rows * CELL}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(alt)}"><path d="{path}"/></svg>'
    )


def _arrow(i: int, j: int, down: float, right: float) -> str:
    """From the middle of a square of the grid; nothing where the flow is too small to be seen."""
    if math.hypot(down, right) < CELL / 20:
        return ""
    shaft = np.array([right, down])
    across = np.array([-down, right])
    one, other = -0.35 * shaft + 0.2 * across, -0.35 * shaft - 0.2 * across
    strokes = zip("llml", (shaft, one, -one, other), strict=True)
    return f"M{(j + 0.5) * CELL:g} {(i + 0.5) * CELL:g}" + "".join(
        f"{kind}{round(x)} {round(y)}" for kind, (x, y) in strokes
    )
