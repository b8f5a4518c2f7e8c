"""Operations on attribution maps [h, w], all safe to differentiate twice."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax.precision import at_least_float32
from adv2_jax.types import Map


def min_max(raw: Array) -> Map:
    """Scale a map to [0, 1] by its own minimum and maximum.

    A constant map gives zeros with a zero gradient. Constant means: its range is within float
    rounding of its largest absolute value, so the rule does not depend on the scale of the map.

    Args:
        raw: [h, w], any range and floating-point type.

    Returns:
        [h, w] in [0, 1], float32 or wider; with NaN in it if the raw map is not finite, so that it
        can be seen.
    """
    raw = at_least_float32(raw)
    # by place: JAX's gradient of min compares all entries with the minimum, which XLA may compute
    # anew with other rounding, so that none is equal and the gradient is 0/0
    low, high = raw.reshape(-1)[raw.argmin()], raw.reshape(-1)[raw.argmax()]
    span = high - low
    resolution = 4 * jnp.finfo(raw.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    constant = jnp.isfinite(span) & (span <= resolution)
    # the inner `where` keeps 0/0 out of the branch that the outer one discards: its gradient would
    # be NaN
    return jnp.where(constant, 0, (raw - low) / jnp.where(constant, 1, span))


def channel_max(gradient: Array) -> Array:
    """Largest absolute value over colour channels: [H, W, C] -> [H, W] (ADV² eq. 5)."""
    size = jnp.abs(gradient)
    places = jax.lax.broadcasted_iota(int, size.shape, size.ndim - 1)
    largest = places == size.argmax(axis=-1, keepdims=True)  # by place, as in `min_max`
    return jnp.where(largest, size, 0).sum(axis=-1)


def pool(raw: Array, size: int | None = None) -> Array:
    """Mean over non-overlapping size x size blocks: [H, W] -> [H/size, W/size].

    Args:
        raw: [H, W].
        size: side of the blocks; None is `usual_pool`.

    Raises:
        ValueError: if `size` is below 1 or does not divide both sides.
    """
    h, w = raw.shape
    size = usual_pool(h, w) if size is None else size
    if size < 1 or h % size or w % size:
        raise ValueError(f"pool = {size} must be at least 1 and divide the map sides {h} x {w}")
    return raw.reshape(h // size, size, w // size, size).mean(axis=(1, 3))


def usual_pool(h: int, w: int) -> int:
    """4 at 224² as in the paper, 1 below 112²: the largest divisor of both sides that leaves 56 or more of the shorter one."""
    return next(size for size in range(max(min(h, w) // 56, 1), 0, -1) if h % size == w % size == 0)


def total_variation(m: Map) -> Array:
    """Mean squared difference of vertical and of horizontal neighbours, added: r_tv(m) of eq. 8, [h, w] -> [] >= 0."""
    return (jnp.diff(m, axis=0) ** 2).mean() + (jnp.diff(m, axis=1) ** 2).mean()


def blur(values: Array, sigma: float) -> Array:
    """Gaussian blur of [H, W, ...] along its first two axes; what would lie beyond the edge has no
    weight.

    Args:
        values: [H, W, ...].
        sigma: standard deviation in pixels, > 0.
    """
    values = at_least_float32(values)
    rows, columns = (_gaussian(n, sigma, values.dtype) for n in values.shape[:2])
    return jnp.einsum("ih,jw,hw...->ij...", rows, columns, values)


def _gaussian(n: int, sigma: float, dtype: Any) -> Array:
    """Matrix [n, n] that blurs n values; each row sums to 1."""
    # or a network would be given float64 images where JAX knows them
    place = jnp.arange(n, dtype=dtype)
    distance = place[:, None] - place[None]
    return jax.nn.softmax(-0.5 * (distance / sigma) ** 2, axis=-1)


def resize(values: Array, shape: tuple[int, int]) -> Array:
    """Bilinear resize of [h, w] with half-pixel centres and no antialiasing (as torch's align_corners=False)."""
    return jax.image.resize(values, shape, "bilinear", antialias=False)
