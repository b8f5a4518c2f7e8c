"""The sup-norm ball cut with the unit cube, pixel by pixel."""

import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import threats


@pytest.fixture(scope="module")
def image():
    x = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
    x[0], x[1] = 0, 1
    return jnp.asarray(x)


@pytest.mark.parametrize("epsilon", [0.031, 8 / 255, 0.5, 1.0])
def test_projection_is_the_nearest_allowed_image(image, epsilon):
    threat = threats.linf(epsilon)
    delta = jnp.asarray(np.random.default_rng(1).normal(size=image.shape), jnp.float32)
    projected = threat.project(delta, image)
    expected = [min(max(d, -epsilon, -x), epsilon, 1 - x) for d, x in zip(np.ravel(delta), np.ravel(image), strict=True)]
    np.testing.assert_allclose(np.ravel(projected), expected, atol=6e-8)  # half an ulp of 1
    x = threat.apply(projected, image)
    assert x.min() >= 0 and x.max() <= 1
    assert jnp.abs(x - image).max() <= epsilon + 1e-7


def test_allowed_changes_stay(image):
    threat = threats.linf(0.1)
    delta = jnp.where(image > 0.5, -0.05, 0.05)
    np.testing.assert_array_equal(threat.project(delta, image), delta)
    np.testing.assert_array_equal(threat.apply(delta, image), image + delta)


def test_start_is_the_unchanged_image(image):
    threat = threats.linf()
    np.testing.assert_array_equal(threat.apply(threat.init(image), image), image)
    assert threat.name == "linf"


@pytest.mark.parametrize("epsilon", [0, -0.1, 1.5, float("nan"), 8])
def test_radius_out_of_range_is_named(epsilon):
    with pytest.raises(ValueError, match=rf"^epsilon = {epsilon} must lie in \(0, 1\]"):
        threats.linf(epsilon)


def test_equal_options_give_the_same_object():
    assert threats.linf(0.05) is threats.linf(0.05)
    assert threats.linf(0.05) is not threats.linf(0.06)


def test_an_option_spelt_out_is_the_same_object():
    assert threats.linf() is threats.linf(0.031)
    assert threats.linf() is threats.linf(epsilon=0.031)
