"""φ(x; m) against a plain loop, its gradients against differences, and what an image is blended into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_maps import bilinear

from adv2_jax import blending, maps

H, W = 6, 8


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).random((H, W, 3))


@pytest.fixture(scope="module")
def other():
    return np.random.default_rng(1).random((H, W, 3))


@pytest.fixture(scope="module")
def m():
    return np.random.default_rng(2).random((3, 2))


def blended(x, m, other):
    weights = bilinear(m, x.shape[:2])
    mixed = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        weight = weights[place[:2]]
        mixed[place] = weight * x[place] + (1 - weight) * other[place]
    return mixed


def float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_blend_is_the_one_of_a_plain_loop(x, m, other):
    # float32
    np.testing.assert_allclose(
        blending.blend(*float32(x, m, other)), blended(x, m, other), atol=1e-6
    )


def test_a_map_of_ones_shows_the_image_one_of_zeros_the_alternative(x, other):
    ones, zeros = np.ones((3, 2)), np.zeros((3, 2))
    np.testing.assert_allclose(blending.blend(*float32(x, ones, other)), x, atol=1e-6)
    np.testing.assert_allclose(blending.blend(*float32(x, zeros, other)), other, atol=1e-6)


def test_a_map_and_its_complement_share_the_image_out(x, m, other):
    shown, hidden = blending.blend(*float32(x, m, other)), blending.blend(*float32(x, 1 - m, other))
    np.testing.assert_allclose(shown + hidden, x + other, atol=1e-6)


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["image", "m", "alternative"])
def test_blend_is_differentiable_in_all_three(double, slope, x, m, other, argument):
    arguments = [jnp.asarray(array) for array in (x, m, other)]
    rng = np.random.default_rng(3)
    factor, v = rng.standard_normal(x.shape), rng.standard_normal(arguments[argument].shape)

    def f(changed):
        return jnp.sum(
            factor * blending.blend(*arguments[:argument], changed, *arguments[argument + 1 :]) ** 2
        )

    actual = jnp.vdot(jax.grad(f)(arguments[argument]), v)
    np.testing.assert_allclose(actual, slope(f, arguments[argument], v), rtol=1e-7)
    assert abs(actual) > 1e-3


def test_blurred_is_a_blur_by_parts_of_the_shorter_side(x):
    (image,) = float32(x)
    np.testing.assert_allclose(
        blending.blurred(image), maps.blur(image, blending.BLUR * H), atol=1e-6
    )


def test_blur_takes_away_what_is_fine():
    board = np.indices((224, 224)).sum(0)[..., None] % 2 * np.ones(3)
    middle = blending.blurred(*float32(board))[50:-50, 50:-50]
    np.testing.assert_allclose(middle, 0.5, atol=1e-3)


def test_coloured_is_one_colour_with_noise():
    drawn = jax.vmap(lambda key: blending.coloured(key, jnp.zeros((16, 16, 3))))(
        jax.random.split(jax.random.key(0), 300)
    )
    assert drawn.shape == (300, 16, 16, 3) and drawn.min() >= 0 and drawn.max() <= 1
    # noise pushes nothing beyond 0 or 1 where the colour is four deviations away, so its statistics can be seen there
    colours = np.median(drawn, axis=(1, 2))
    clear = (colours > 4 * blending.NOISE) & (colours < 1 - 4 * blending.NOISE)
    noise = (np.asarray(drawn) - colours[:, None, None])[
        np.broadcast_to(clear[:, None, None], drawn.shape)
    ]
    assert abs(noise.mean()) < 0.01 * blending.NOISE + 1e-3 and noise.std() == pytest.approx(
        blending.NOISE, rel=0.05
    )
    # 900 colours, uniform in [0, 1]: mean .5 and deviation 12^-1/2, each known to .01
    assert colours.mean() == pytest.approx(0.5, abs=0.04) and colours.std() == pytest.approx(
        12**-0.5, abs=0.03
    )
    # channels are drawn apart; deviation 300^-1/2 = .06
    assert np.abs(np.corrcoef(colours.T) - np.eye(3)).max() < 0.25


def test_alternatives_are_blurred_or_coloured_as_often(x):
    (image,) = float32(x)
    keys = jax.random.split(jax.random.key(1), 400)
    drawn = jax.vmap(blending.alternative, (0, None))(keys, image)
    is_blurred = np.abs(drawn - blending.blurred(image)).max((1, 2, 3)) < 1e-5
    assert abs(is_blurred.mean() - 0.5) < 0.1  # four deviations of 400 tosses
    assert (
        len({colour.tobytes() for colour in np.asarray(drawn)[~is_blurred]}) == (~is_blurred).sum()
    )
    assert drawn.min() >= 0 and drawn.max() <= 1


def test_an_alternative_is_a_function_of_its_key(x):
    (image,) = float32(x)
    keys = jax.random.split(jax.random.key(2), 8)
    together = jax.vmap(blending.alternative, (0, None))(keys, image)
    alone = jax.jit(blending.alternative)
    for key, drawn in zip(keys, together, strict=True):
        np.testing.assert_allclose(alone(key, image), drawn, atol=1e-6)  # a batch rounds otherwise
