"""The embedded image set: textured scenes of one labelled shape among clutter, drawn from a seed.

Nothing is downloaded. Scene `i` of a seed is a function of `(seed, i, size, plain)` alone, so any
slice of the endless set can be made on its own. Colours and textures are drawn without looking at
the class. Two things tell it: the outline, and a faint weave on the object. The weave stands for
the cues below human notice that natural images have (Ilyas et al., NeurIPS 2019). A network trained
on outlines alone, at higher contrast and noise, was so robust that 300 steps of plain PGD at
epsilon = .031 fooled it on 3 of 10. One trained on whole scenes alone lost half of its confidence
in an object shown before a loud colour, whatever the map that cut it out: hence `plain`.

Points of the plane are complex numbers: a scene is the unit square, an object lives in the unit
disc, a rotation is a product. A shape is its signed distance (negative inside), which also gives
the anti-aliased edge.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adv2_jax.data.images import ImageSet

Floats = NDArray[np.floating[Any]]
Points = NDArray[np.complexfloating[Any, Any]]
Distance = Callable[[Points], Floats]

WEAVE = 7 / 255  # amplitude; below the 8/255 that an adversary usually may change
RADIUS = (0.16, 0.26)  # of an object's circumscribed circle, in sides of the image


def generate(
    n: int, *, seed: int = 0, size: int = 64, start: int = 0, plain: float = 0.0
) -> ImageSet:
    """Draw scenes `start, …, start + n - 1` of the endless set that belongs to a seed.

    Args:
        n: number of scenes, at least 1.
        seed: which set, at least 0.
        size: side of the square images in pixels, at least 32 (below, the shapes cannot be told
            apart).
        start: index of the first scene, at least 0. Scene `i` has class `i % 10`.
        plain: share of the scenes, by chance, of which a part is hidden under a plain colour, but
            not the object; in [0, 1]. The others are as without it.

    Returns:
        images, labels (indices into `CLASSES`), objects and the names of the classes; image `k`
        depends on `(seed, start + k, size, plain)` only, never on `n`.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value, least in (
        ("n", n, 1),
        ("seed", seed, 0),
        ("size", size, 32),
        ("start", start, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= plain <= 1:
        raise ValueError(f"plain must lie in [0, 1], got {plain}")
    labels = np.arange(start, start + n) % len(CLASSES)
    # a generator for every scene, so that each can be made without the others
    pairs = [
        _scene(np.random.default_rng([seed, start + k]), size, int(labels[k]), plain)
        for k in range(n)
    ]
    images, objects = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return ImageSet(images, labels.astype(np.int32), objects=objects, classes=CLASSES)


def _scene(
    rng: np.random.Generator, size: int, label: int, plain: float
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one scene: background, clutter, then the object on top, so that nothing hides it."""
    # the order of all draws is fixed: another would give a seed other scenes, and void the weights
    z = _pixel_centres(size)
    hue, night = rng.random(), rng.random() < 0.5
    dark, light = (0.3, 0.55), (0.6, 0.9)  # apart, so that the object stands out
    ground, figure = (dark, light) if night else (light, dark)
    image = _textured(rng, z, hue, saturation=(0.1, 0.5), value=ground)
    for _ in range(rng.integers(3, 7)):
        clutter = _CLUTTER[rng.integers(len(_CLUTTER))](rng)
        ink = _rgb(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.15, 1.0))
        image = _over(image, ink, clutter(z) * size)
    radius = rng.uniform(*RADIUS)
    centre = complex(*rng.uniform(radius, 1 - radius, 2))
    distance = _SHAPES[CLASSES[label]](_turned(rng, z, centre, radius)) * (radius * size)
    # at least a quarter of the circle of hues away from the ground
    paint = _textured(rng, z, hue + rng.uniform(0.25, 0.75), saturation=(0.4, 0.95), value=figure)
    image = _over(image, paint + _weave(z * size, label), distance)
    # weaker than the weave, which must be seen through it
    image = image + rng.normal(0, rng.uniform(0.002, 0.008), image.shape)
    # the last draws of a scene: those that are not hidden are the same for every `plain`
    if rng.random() < plain:
        image = _hidden(rng, z, image, distance)
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8), distance < 0


def _hidden(rng: np.random.Generator, z: Points, image: Floats, distance: Floats) -> Floats:
    """Hide all but a window, or a patch, under one colour and noise.

    Window and patch have a random shape, which tells nothing of the class. The object shows in any
    case, and so does what is up to an eighth of a side away from it; edges are soft.
    """
    size, ground = len(z), rng.random(3) + rng.normal(0, rng.uniform(0, 0.1), image.shape)
    shape, radius = _SHAPES[CLASSES[rng.integers(len(CLASSES))]], rng.uniform(*RADIUS)
    stencil = shape(_turned(rng, z, complex(rng.random(), rng.random()), radius)) * (radius * size)
    window = rng.choice([-1, 1]) * stencil
    near = distance - size * rng.uniform(0, 0.125)
    return _over(ground, image, np.minimum(near, window) / rng.uniform(1, 5))


def _turned(rng: np.random.Generator, z: Points, centre: complex, radius: float) -> Points:
    """Map points to the unit disc in which a shape lives, turned by a random angle."""
    return (z - centre) * (np.exp(2j * np.pi * rng.random()) / radius)


@lru_cache(maxsize=4)
def _pixel_centres(size: int) -> Points:
    """Return the points `[H, W]` of the unit square at which an image is sampled."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return axis + 1j * axis[:, None]


def _over(image: Floats, paint: Floats, distance: Floats) -> Floats:
    """Paint the inside of a shape over an image; with `distance` in pixels the edge is one wide."""
    return image + (0.5 - distance).clip(0, 1)[..., None] * (paint - image)


# Shapes: signed distance of points [H, W] to an outline in the unit disc, negative inside.


def _segments(a: Points, b: Points) -> Distance:
    """Return the distance to the nearest of the segments `a[i]..b[i]`, which may be points."""
    start, side = (ends.astype(np.complex64)[:, None, None] for ends in (a, b - a))
    # 1e-12: a segment that is a point has no direction to divide by
    along = side.conj() / np.maximum(np.abs(side) ** 2, 1e-12)

    def distance(z: Points) -> Floats:
        offset = z - start
        return np.abs(offset - (offset * along).real.clip(0, 1) * side).min(0)

    return distance


def _polygon(corners: Points) -> Distance:
    """Return the signed distance to a polygon.

    A point is inside when the ray to its right crosses an odd number of sides.
    """
    a, b = (ends.astype(np.complex64)[:, None, None] for ends in (corners, np.roll(corners, -1)))
    outline = _segments(corners, np.roll(corners, -1))

    def distance(z: Points) -> Floats:
        # half-open sides: an outline that passes the ray at a corner is counted once
        spans = (a.imag > z.imag) != (b.imag > z.imag)
        # a product in place of the crossing itself, whose quotient fails for horizontal sides
        ahead = ((z - a) * (b - a).conj()).imag * (b - a).imag > 0
        crossed = np.count_nonzero(spans & ahead, axis=0)
        return np.where(crossed % 2, -1, 1) * outline(z)

    return distance


def _mirrored(*half: complex) -> Points:
    """Return the corners of a polygon symmetric about the real axis from those above it."""
    return np.array(half + tuple(corner.conjugate() for corner in reversed(half)))


def _box(z: Points, half_width: float, half_height: float) -> Floats:
    return np.maximum(np.abs(z.real) - half_width, np.abs(z.imag) - half_height)


def _heart(z: Points) -> Floats:
    """A square on its corner and, on two of its sides, discs of the side's width."""
    side, z = 1.08, z + 0.16
    square = (np.abs(z.real) + np.abs(z.imag)) / 2**0.5 - side / 2
    lobe = side / 8**0.5
    return np.minimum(square, np.abs(z.real + 1j * np.abs(z.imag) - complex(lobe, lobe)) - side / 2)


_SHAPES: dict[str, Distance] = {
    "disc": lambda z: np.abs(z) - 0.85,
    "ring": lambda z: np.abs(np.abs(z) - 0.75) - 0.2,
    "square": lambda z: _box(z, 0.72, 0.72),
    "triangle": _polygon(np.exp(2j * np.pi * np.arange(3) / 3)),
    "star": _polygon(np.exp(2j * np.pi * np.arange(10) / 10) * np.tile([1, 0.42], 5)),
    "cross": lambda z: np.minimum(_box(z, 0.95, 0.28), _box(z, 0.28, 0.95)),
    "crescent": lambda z: np.maximum(np.abs(z) - 1, 0.8 - np.abs(z - 0.5)),
    "arrow": _polygon(_mirrored(1, 0.1 + 0.75j, 0.1 + 0.26j, -0.95 + 0.26j)),
    "heart": _heart,
    "hourglass": _polygon(_mirrored(0.8 + 0.6j, 0.12j, -0.8 + 0.6j)),
}
CLASSES: tuple[str, ...] = tuple(_SHAPES)


# Clutter: strokes along random paths in the unit square. The paths bend too little to close into an
# outline.


def _stroke(path: Points, half_width: float) -> Distance:
    line = _segments(path[:-1], path[1:])
    return lambda z: line(z) - half_width


def _path(rng: np.random.Generator, steps: int, length: float, bend: float) -> Points:
    """Draw a walk `[steps + 1]` from a random point, turning by at most `bend` radians a corner."""
    heading = 2 * np.pi * rng.random() + np.cumsum(rng.uniform(-bend, bend, steps))
    return np.cumsum(np.append(_points(rng, 1), length * np.exp(1j * heading)))


def _points(rng: np.random.Generator, n: int) -> Points:
    return rng.random(n) + 1j * rng.random(n)


def _walk(
    rng: np.random.Generator,
    *,
    steps: int,
    length: tuple[float, float],
    bend: float,
    half_width: tuple[float, float],
) -> Distance:
    return _stroke(_path(rng, steps, rng.uniform(*length), bend), rng.uniform(*half_width))


def _squiggle(rng: np.random.Generator) -> Distance:
    t = np.linspace(0, 1, 10)
    wave = rng.uniform(0.3, 0.6) * t + 0.05j * np.sin(rng.uniform(10, 20) * t)
    return _stroke(_points(rng, 1) + wave * np.exp(2j * np.pi * rng.random()), 0.012)


def _dots(rng: np.random.Generator) -> Distance:
    points, radius = _points(rng, 8), rng.uniform(0.012, 0.025)
    dots = _segments(points, points)
    return lambda z: dots(z) - radius


# In sides of the image: thinner than any object (RADIUS), so that none passes for one. Kinds and
# ranges are a convention; the weights belong to them, so they cannot change alone
_CLUTTER: tuple[Callable[[np.random.Generator], Distance], ...] = (
    partial(_walk, steps=1, length=(0.15, 0.5), bend=0, half_width=(0.015, 0.04)),  # a bar
    partial(_walk, steps=5, length=(0.15, 0.3), bend=1.2, half_width=(0.006, 0.012)),  # a polyline
    partial(_walk, steps=3, length=(0.04, 0.08), bend=0.9, half_width=(0.03, 0.05)),  # a worm
    _squiggle,
    _dots,
)


def _weave(pixels: Points, label: int) -> Floats:
    """Return a class's faint grating `[H, W, 1]`: one of five directions and two periods."""
    # in pixels, whatever the size: above the 2 that pixels can show, and finer than stripes (7 or
    # more at 64 x 64) and checks, so that no texture is taken for a weave; the factor 1.5 between
    # the two is a convention
    direction, period = np.exp(1j * np.pi * (label % 5) / 5), (3.0, 4.5)[label // 5]
    return WEAVE * np.sin(2 * np.pi / period * (pixels * direction).real)[..., None]


# Textures: fields [H, W] in [0, 1] that mix two shades of a colour.


def _textured(
    rng: np.random.Generator,
    z: Points,
    hue: float,
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> Floats:
    """Draw a texture `[H, W, 3]` between two shades of about one hue."""
    field = _TEXTURES[rng.integers(len(_TEXTURES))](rng, z)[..., None]
    one, other = (
        _rgb(hue + rng.uniform(-0.06, 0.06), rng.uniform(*saturation), rng.uniform(*value))
        for _ in range(2)
    )
    return one + field * (other - one)


def _rgb(hue: float, saturation: float, value: float) -> Floats:
    """Return the RGB colour `[3]` of a hue (modulo 1), saturation and value in [0, 1]."""
    k = (np.array([5, 3, 1]) + 6 * hue) % 6
    return (value * (1 - saturation * np.minimum(k, 4 - k).clip(0, 1))).astype(np.float32)


def _noise(rng: np.random.Generator, z: Points) -> Floats:
    """Draw fractal noise: random grids of ever finer mesh, each weighted by its mesh width."""
    layers = (
        _interpolation(len(z), k)
        @ rng.standard_normal((k, k), np.float32)
        @ _interpolation(len(z), k).T
        / k
        for k in (3, 6, 12, 24)
    )
    return _unit(sum(layers, np.zeros(z.shape, np.float32)))


@lru_cache(maxsize=16)
def _interpolation(n: int, k: int) -> Floats:
    """Return the matrix `[n, k]` that interpolates k values linearly at n pixel centres."""
    distance = np.abs(np.linspace(0, k - 1, n)[:, None] - np.arange(k))
    return (1 - distance).clip(0).astype(np.float32)


def _unit(field: Floats) -> Floats:
    low, high = np.min(field), np.max(field)
    return (field - low) / (high - low)


def _gradient(rng: np.random.Generator, z: Points) -> Floats:
    return _unit((z * np.exp(2j * np.pi * rng.random())).real)


def _waves(rng: np.random.Generator, z: Points, low: float, high: float) -> Points:
    """Draw a direction and `low` to `high` periods; return the phase along and across it."""
    return z * (2 * np.pi * rng.uniform(low, high) * np.exp(2j * np.pi * rng.random()))


def _stripes(rng: np.random.Generator, z: Points) -> Floats:
    return (0.5 + np.sin(_waves(rng, z, 5, 9).real)).clip(0, 1)


def _checker(rng: np.random.Generator, z: Points) -> Floats:
    phase = _waves(rng, z, 4, 7)
    return (0.5 + 2 * np.sin(phase.real) * np.sin(phase.imag)).clip(0, 1)


def _marble(rng: np.random.Generator, z: Points) -> Floats:
    return 0.5 + 0.5 * np.sin(_waves(rng, z, 2, 5).real + 8 * _noise(rng, z))


_TEXTURES = (_noise, _gradient, _stripes, _checker, _marble)
