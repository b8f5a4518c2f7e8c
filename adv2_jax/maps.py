"""Operations on attribution maps [h, w]; all have finite first and second derivatives."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax.precision import at_least_float32
from adv2_jax.types import Map


def min_max(raw: Array, power: float | None = None) -> Map:
    """Scale a map to [0, 1] by its own minimum and maximum.

    A constant map gives zeros with a zero gradient. A map counts as constant if its range is within
    float rounding of its largest absolute value; the rule does not depend on the map's scale.

    Args:
        raw: [h, w], any range and floating-point type.
        power: spreads the derivative of the maximum (`spread_max`); needs a map >= 0.

    Returns:
        [h, w] in [0, 1], float32 or wider. It has NaN if the raw map is not finite, so that the
        failure is seen.
    """
    raw = at_least_float32(raw)
    # by index, not min(): JAX's gradient of min compares all entries with the minimum, which XLA
    # may compute a second time with other rounding; then no entry is equal and the gradient is 0/0
    flat = raw.reshape(-1)
    low = flat[raw.argmin()]
    high = flat[raw.argmax()] if power is None else spread_max(flat, power)
    span = high - low
    # four roundings of the largest value; relative, so that a map of values near 1e-30 is a map
    resolution = 4 * jnp.finfo(raw.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    constant = jnp.isfinite(span) & (span <= resolution)
    # double where: the inner one keeps 0/0 out of the branch that the outer one discards, whose
    # gradient would otherwise be NaN
    scaled = within_unit((raw - low) / jnp.where(constant, 1, span))
    return jnp.where(constant, 0, scaled)


def within_unit(m: Map) -> Map:
    """Return a map clipped to [0, 1], with the derivatives of the map itself.

    Only rounding is clipped: GPUs divide to within two units in the last place, and x / x may be
    1 + 1e-7 there.
    """
    # as a correction without a derivative: that of `clip` at 1, where every map has an entry, is
    # one half
    return m + jax.lax.stop_gradient(jnp.clip(m, 0, 1) - m)


def channel_max(gradient: Array, power: float | None = None) -> Array:
    """Return the largest absolute value over colour channels: [H, W, C] -> [H, W] (ADV² eq. 5).

    With a power its derivative is spread over the channels (`spread_max`).
    """
    size = jnp.abs(gradient)
    if power is not None:
        return spread_max(size, power)
    channels = jax.lax.broadcasted_iota(int, size.shape, size.ndim - 1)
    # by index, as in `min_max`; the sum has one term that is not 0
    largest = channels == size.argmax(axis=-1, keepdims=True)
    return jnp.where(largest, size, 0).sum(axis=-1)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def spread_max(values: Array, power: float) -> Array:
    """Return the maximum of the last axis, with a derivative that values near it share.

    A step that lowers the largest value alone is soon stopped by the second largest. Here a value v
    has the weight (v / max)^power in the derivative, and the weights sum to 1; the maximum itself is
    exact.

    Args:
        values: [..., n] >= 0.
        power: > 0; as it grows the derivative tends to that of the maximum.
    """
    return values.max(axis=-1)


@spread_max.defjvp
def _spread_max_jvp(
    power: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (values,), (moved,) = primals, tangents
    top = values.max(axis=-1, keepdims=True)
    # where all are 0, all are largest
    weights = jnp.where(top > 0, values / jnp.where(top > 0, top, 1), 1) ** power
    share = weights / weights.sum(axis=-1, keepdims=True)
    return spread_max(values, power), (share * moved).sum(axis=-1)


def pool(raw: Array, size: int | None = None) -> Array:
    """Return the means of non-overlapping size x size blocks: [H, W] -> [H/size, W/size].

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
    """Return the default block size of `pool`: 4 at 224² as in the paper, 1 below 112².

    It is the largest divisor of both sides that leaves 56 or more entries along the shorter one.
    """
    return next(size for size in range(max(min(h, w) // 56, 1), 0, -1) if h % size == w % size == 0)


def total_variation(m: Map) -> Array:
    """Return r_tv(m) of eq. 8: [h, w] -> [] >= 0.

    It is the mean squared difference of vertical neighbours plus that of horizontal ones.
    """
    return (jnp.diff(m, axis=0) ** 2).mean() + (jnp.diff(m, axis=1) ** 2).mean()


def blur(values: Array, sigma: float) -> Array:
    """Return the Gaussian blur of [H, W, ...] along its first two axes.

    Near the border the weights are normalised over the pixels inside: nothing is padded.

    Args:
        values: [H, W, ...].
        sigma: standard deviation in pixels, > 0.
    """
    values = at_least_float32(values)
    # two dense matrices, not a convolution: depthwise convolutions are slow on XLA:CPU, and a blur
    # of .6 sides would need a kernel larger than the image
    rows, columns = (_gaussian(n, sigma, values.dtype) for n in values.shape[:2])
    return jnp.einsum("ih,jw,hw...->ij...", rows, columns, values)


def _gaussian(n: int, sigma: float, dtype: Any) -> Array:
    """Return the matrix [n, n] that blurs n values; each row sums to 1."""
    # of the values' type: under `jax_enable_x64` that of arange would make the image float64
    index = jnp.arange(n, dtype=dtype)
    distance = index[:, None] - index[None]
    return jax.nn.softmax(-0.5 * (distance / sigma) ** 2, axis=-1)


def resize(values: Array, shape: tuple[int, int]) -> Array:
    """Resize [h, w] bilinearly, half-pixel centres, as torch with align_corners=False."""
    # without antialias=False JAX blurs whatever is made smaller
    return jax.image.resize(values, shape, "bilinear", antialias=False)


def of_tokens(tokens: Array) -> Array:
    """Return tokens as a map, without the class token: [1 + h h, ...] -> [h, h, ...]."""
    side = math.isqrt(len(tokens) - 1)
    return tokens[1:].reshape(side, side, *tokens.shape[1:])


def are_tokens(n: int) -> bool:
    """Return whether n tokens are a class token and a square of patches."""
    return n > 1 and math.isqrt(n - 1) ** 2 == n - 1
