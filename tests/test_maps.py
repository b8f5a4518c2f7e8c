"""Map operations against plain loops; min-max at its edge, to second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import maps


@pytest.fixture(scope="module")
def raw():
    return np.random.default_rng(0).normal(size=(6, 8)) * 3 - 1


def test_min_max_reaches_from_zero_to_one(raw):
    m = maps.min_max(jnp.asarray(raw, jnp.float32))
    # one float32 rounding of numbers up to 1
    np.testing.assert_allclose(m, (raw - raw.min()) / np.ptp(raw), atol=2e-7)
    # XLA divides by multiplying with the reciprocal
    assert m.min() == 0 and m.max() == pytest.approx(1, abs=6e-8)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e30])
def test_min_max_knows_no_scale(raw, factor):
    np.testing.assert_allclose(
        maps.min_max(jnp.asarray(raw * factor, jnp.float32)), maps.min_max(raw), atol=2e-6
    )


def loss(raw):
    """A function of the scaled map with neither symmetry nor zero curvature."""
    m = maps.min_max(raw)
    return jnp.sum(jnp.sin(jnp.arange(m.size).reshape(m.shape)) * (m + 1) ** 2)


gradient = jax.jit(jax.grad(loss))
hessian = jax.jit(jax.hessian(loss))


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-20, 1e30])
def test_constant_map_gives_zeros_and_a_zero_gradient(value):
    raw = jnp.full((3, 4), value)
    np.testing.assert_array_equal(maps.min_max(raw), np.zeros((3, 4)))
    np.testing.assert_array_equal(gradient(raw), np.zeros((3, 4)))
    np.testing.assert_array_equal(hessian(raw), np.zeros((3, 4, 3, 4)))


def test_rounding_noise_on_a_large_number_is_a_constant_map():
    noisy = jnp.float32(1000) * (
        1 + jnp.finfo(jnp.float32).eps * jnp.array([[0.0, 1.0], [2.0, 1.0]])
    )
    assert np.ptp(noisy) > 0
    np.testing.assert_array_equal(maps.min_max(noisy), np.zeros((2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", ["one", "all"])
def test_a_map_that_is_not_finite_is_not_taken_for_a_constant_one(raw, bad, share):
    broken = (
        jnp.full((6, 8), bad) if share == "all" else jnp.asarray(raw, jnp.float32).at[2, 3].set(bad)
    )
    assert np.isnan(maps.min_max(broken)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_map_is_scaled_in_float32(dtype):
    """3 % of the largest value is 4 eps of bfloat16, but no rounding noise of a map that is computed in float32."""
    raw = jnp.asarray([[1.0, 1.015625], [1.0078125, 1.0]], dtype)
    m = maps.min_max(raw)
    assert m.dtype == np.float32
    np.testing.assert_array_equal(m, [[0, 1], [0.5, 0]])
    assert jax.grad(lambda raw: maps.min_max(raw)[1, 0])(raw).dtype == dtype


def test_small_structure_on_a_large_number_is_a_map():
    np.testing.assert_allclose(
        maps.min_max(jnp.array([[1000.0, 1000.25], [1000.5, 1001.0]])), [[0, 0.25], [0.5, 1]]
    )


def test_gradient_of_min_max_is_a_central_difference(raw, double, slope):
    v = np.random.default_rng(1).normal(size=raw.shape)
    np.testing.assert_allclose(jnp.vdot(gradient(raw), v), slope(jax.jit(loss), raw, v), rtol=1e-7)
    curvature = jax.jit(lambda x: jax.jvp(gradient, (x,), (v,))[1])(raw)
    np.testing.assert_allclose(curvature, slope(gradient, raw, v), rtol=1e-5, atol=1e-8)


def test_channel_max_is_the_largest_absolute_value():
    gradient = jnp.array([[[1.0, -3.0, 2.0], [0.0, 0.5, -0.25]]])
    np.testing.assert_array_equal(maps.channel_max(gradient), [[3.0, 0.5]])


@pytest.mark.parametrize("size", [1, 2])
def test_pool_is_the_mean_of_blocks(raw, size):
    expected = [
        [raw[i : i + size, j : j + size].mean() for j in range(0, raw.shape[1], size)]
        for i in range(0, raw.shape[0], size)
    ]
    np.testing.assert_allclose(
        maps.pool(jnp.asarray(raw, jnp.float32), size), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [0, -2, 3, 4, 16])
def test_pool_names_what_does_not_fit(raw, size):
    with pytest.raises(ValueError, match=rf"^pool = {size} must .* 6 x 8$"):
        maps.pool(raw, size)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((224, 224), 4),
        ((32, 32), 1),
        ((64, 64), 1),
        ((111, 111), 1),
        ((112, 112), 2),
        ((256, 320), 4),
        ((299, 299), 1),
        ((448, 448), 8),
    ],
)
def test_usual_pool_is_the_paper_s_at_its_size(shape, expected):
    assert maps.usual_pool(*shape) == expected
    assert maps.pool(jnp.zeros(shape)).shape == (shape[0] // expected, shape[1] // expected)


def bilinear(values, shape):
    """Half-pixel centres, edges repeated, no antialiasing: a plain loop."""
    out = np.empty(shape)
    for i, j in np.ndindex(*shape):
        y = np.clip((i + 0.5) * values.shape[0] / shape[0] - 0.5, 0, values.shape[0] - 1)
        x = np.clip((j + 0.5) * values.shape[1] / shape[1] - 0.5, 0, values.shape[1] - 1)
        top, left = int(min(y, values.shape[0] - 2)), int(min(x, values.shape[1] - 2))
        down, right = y - top, x - left
        rows = values[top : top + 2, left : left + 2]
        out[i, j] = np.array([1 - down, down]) @ rows @ np.array([1 - right, right])
    return out


@pytest.mark.parametrize("shape", [(12, 16), (17, 9), (6, 8), (3, 4), (4, 5)])
def test_resize_is_bilinear_and_never_antialiases(raw, shape):
    actual = maps.resize(jnp.asarray(raw, jnp.float32), shape)
    np.testing.assert_allclose(actual, bilinear(raw, shape), atol=2e-5)  # float32 sample positions


def test_total_variation_is_the_mean_of_squared_differences(raw):
    h, w = raw.shape
    vertical = [(raw[i + 1, j] - raw[i, j]) ** 2 for i in range(h - 1) for j in range(w)]
    horizontal = [(raw[i, j + 1] - raw[i, j]) ** 2 for i in range(h) for j in range(w - 1)]
    assert maps.total_variation(jnp.asarray(raw, jnp.float32)) == pytest.approx(
        np.mean(vertical) + np.mean(horizontal), rel=1e-5
    )
    assert maps.total_variation(jnp.full((3, 4), 0.7)) == 0


@pytest.mark.parametrize("sigma", [0.3, 1.5, 20.0])
def test_blur_is_a_weighted_mean_of_the_pixels_there_are(raw, sigma):
    h, w = raw.shape
    expected = np.empty(raw.shape)
    for i in range(h):
        for j in range(w):
            distance = np.array([[(y - i) ** 2 + (x - j) ** 2 for x in range(w)] for y in range(h)])
            weights = np.exp(-distance / (2 * sigma**2))
            expected[i, j] = (weights * raw).sum() / weights.sum()
    actual = maps.blur(jnp.asarray(raw, jnp.float32), sigma)
    np.testing.assert_allclose(actual, expected, atol=1e-5)  # float32 sums of 48 numbers of order 1
    channels = maps.blur(jnp.asarray(np.stack([raw, 2 * raw], axis=-1), jnp.float32), sigma)
    np.testing.assert_allclose(channels, np.stack([expected, 2 * expected], axis=-1), atol=2e-5)


def test_rounding_beyond_the_unit_interval_is_clipped_and_has_the_derivatives_of_the_map():
    """A GPU may divide x by x to 1 + 1e-7, which a check of maps in [0, 1] would refuse."""
    off = jnp.asarray([-1e-8, 0.0, 0.3, 1.0, 1 + 2**-23], jnp.float32)
    np.testing.assert_array_equal(maps.within_unit(off), jnp.float32([0, 0, 0.3, 1, 1]))
    np.testing.assert_array_equal(jax.vmap(jax.grad(maps.within_unit))(off), np.ones(5))
