"""Occlusion against a double loop in NumPy and in closed form, its slow look at all positions, and its surrogate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import interpreters, losses
from adv2_jax.attacks import explain, gradient_evaluations
from adv2_jax.interpreters import Context, occlusion_interpreter
from adv2_jax.presets import resolve
from adv2_jax.threats import linf

LABEL = 1


def scaled(raw):
    return (raw - raw.min()) / np.ptp(raw)


def by_loops(score_of, image, patch, stride, colour):
    """The drop of the score for each patch, added to the pixels that it hides and divided by the number of patches."""
    h, w, _ = image.shape
    drops, counts = np.zeros((h, w)), np.zeros((h, w))
    whole = score_of(image)
    top = 0
    while True:
        left = 0
        while True:
            hidden = image.copy()
            hidden[top : top + patch, left : left + patch] = colour
            drops[top : top + patch, left : left + patch] += whole - score_of(hidden)
            counts[top : top + patch, left : left + patch] += 1
            if left + patch >= w:
                break
            left += stride
        if top + patch >= h:
            break
        top += stride
    assert counts.min() >= 1
    return drops / counts


@pytest.fixture
def small(make_small, double):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), make_small())


@pytest.fixture
def photo(double):
    """Not square, and neither side a multiple of the other's numbers."""
    return np.random.default_rng(0).uniform(size=(8, 11, 3))


# patch, stride: side by side, overlapping, over the border, at every pixel
@pytest.mark.parametrize(
    ("patch", "stride", "fill"), [(2, 2, 0.5), (4, 2, None), (5, 3, 0.0), (3, 1, 0.5), (7, 7, 0.5)]
)
def test_a_double_loop(small, photo, patch, stride, fill):
    @jax.jit
    def score_of(image):
        return losses.log_odds(small.head(small.features(image)), LABEL)

    colour = photo.mean((0, 1)) if fill is None else fill
    expected = scaled(by_loops(score_of, photo, patch, stride, colour))
    options = {"patch": patch, "stride": stride, "fill": fill}
    actual = interpreters.occlusion(small, jnp.asarray(photo), LABEL, **options)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_a_linear_classifier_in_closed_form(linear, pixels):
    """The drop is that of the weights under the patch, times what it changes."""
    slopes = np.einsum(
        "hwck,k->hwc", np.asarray(linear.mix, float), np.asarray(linear.weights, float)[:, LABEL]
    )
    change = (slopes * (np.asarray(pixels, float) - 0.5)).sum(-1)
    actual = interpreters.occlusion(linear, pixels, LABEL, patch=1, score=losses.logit)
    np.testing.assert_allclose(actual, scaled(change), atol=1e-5)
    # without overlap each block has its own sum
    blocks = change.reshape(2, 2, 2, 2).sum((1, 3)).repeat(2, 0).repeat(2, 1)
    actual = interpreters.occlusion(linear, pixels, LABEL, patch=2, stride=2, score=losses.logit)
    np.testing.assert_allclose(actual, scaled(blocks), atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32, 3), (224, 224, 3), (16, 16, 3)])
def test_defaults_make_7_x_7_positions(shape):
    start = occlusion_interpreter().solver.init
    memory = jax.eval_shape(start, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert memory.scores.shape == (7, 7)
    spelt = occlusion_interpreter(patch=shape[0] // 4, stride=shape[0] // 8).solver.init
    for one, other in zip(start(jnp.ones(shape)), spelt(jnp.ones(shape)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shares", [1, 2, 7, 100])
def test_shares_make_up_the_whole_map(small, photo, shares):
    """Also where they do not divide the number of positions: some are then computed twice."""
    made = occlusion_interpreter(shares=shares)
    image, step = jnp.asarray(photo), jax.jit(made.solver.step)
    memory = made.solver.init(image)
    for _ in range(made.solver.steps):
        memory = step(small, image, LABEL, memory)
    np.testing.assert_allclose(
        made.solver.read(memory), interpreters.occlusion(small, image, LABEL), atol=1e-12
    )


def test_explain_draws_the_map_of_each_image(make_small, images):
    model = make_small()
    _, maps = explain(model, images[1:4], [0, 1, 2], interpreter="occlusion")
    assert maps.shape == (3, 16, 16)
    for image, label, m in zip(images[1:4] / np.float32(255), range(3), maps, strict=True):
        expected = interpreters.occlusion(model, jnp.asarray(image), label)
        # float32 sums in another order, of scores that differ by some tenths
        np.testing.assert_allclose(m, expected, atol=1e-4)


def test_a_step_renews_a_share_and_differentiates_it_alone(small, photo, slope):
    made = occlusion_interpreter(patch=4, shares=3)
    step = jax.jit(made.solver.step)
    image, other = jnp.asarray(photo), jnp.asarray(photo[::-1].copy())
    memory = made.solver.init(other)
    for _ in range(made.solver.steps):
        memory = step(small, other, LABEL, memory)

    @jax.jit
    def seen(x, memory=memory):
        return made.surrogate(small, x, LABEL, Context(1e-3, memory=memory))

    def loss(x):
        m = seen(x).map
        return jnp.sum(jnp.cos(jnp.arange(m.size).reshape(m.shape)) * m**2)

    after = seen(image).memory
    renewed = np.asarray(after.scores != memory.scores)
    assert renewed.sum() == -(-memory.scores.size // 3)
    true = made.solver.init(image)
    for _ in range(made.solver.steps):
        true = step(small, image, LABEL, true)
    np.testing.assert_allclose(after.scores[renewed], true.scores[renewed], rtol=1e-12)
    np.testing.assert_array_equal(seen(image).map, made.solver.read(after))
    v = np.random.default_rng(1).normal(size=image.shape)
    along = jnp.vdot(jax.grad(loss)(image), v)
    np.testing.assert_allclose(along, slope(loss, image, v, 1e-6), rtol=1e-6)
    # after all shares nothing is left of the other image, and the map is the explained one
    for _ in range(made.solver.steps - 1):
        after = seen(image, after).memory
    np.testing.assert_allclose(after.scores, true.scores, rtol=1e-12)


def test_one_share_is_faithful(small, photo):
    made = occlusion_interpreter(shares=1)
    assert made.faithful and not occlusion_interpreter().faithful
    image = jnp.asarray(photo)
    m = made.surrogate(small, image, LABEL, Context(1e-3, memory=made.solver.init(image))).map
    np.testing.assert_allclose(m, interpreters.occlusion(small, image, LABEL), atol=1e-12)


def test_work_is_counted(randomised):
    """An explained map costs 49 forward passes; a step the logits and seven more, each gone back through."""
    from flax import nnx

    from adv2_jax import models

    model = randomised(lambda: models.CifarResNet(1, width=16, rngs=nnx.Rngs(0)))

    def cost(**options):
        preset = dataclasses.replace(
            resolve("default", occlusion_interpreter(), warm_steps=0), **options
        )
        return gradient_evaluations(model, preset, linf(), (32, 32, 3))

    solve = 49 / 2
    assert cost(steps=0) == pytest.approx(solve, rel=0.02)
    assert cost(steps=10, score_every=0) == pytest.approx(solve + 10 * 8, rel=0.02)
    # a comparison looks at the logits besides
    assert cost(steps=10, score_every=5) == pytest.approx(3 * solve + 2 / 2 + 10 * 8, rel=0.02)


BAD = {
    "stride = 3 and patch = 2": {"patch": 2, "stride": 3},
    "stride = 0 and patch = 2": {"patch": 2, "stride": 0},
    "stride = 4 and patch = 8": {"patch": 8},
}


@pytest.mark.parametrize("words", BAD)
def test_patches_that_do_not_cover_the_image_are_named(make_small, words):
    with pytest.raises(ValueError, match=rf"^{words} must be 1 <= stride"):
        interpreters.occlusion(make_small(), jnp.ones((8, 8, 3)), 0, **BAD[words])


def test_shares_below_one_are_refused():
    with pytest.raises(ValueError, match=r"^shares = 0 must be 1 or more$"):
        occlusion_interpreter(shares=0)
