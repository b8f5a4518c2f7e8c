"""Input times gradient, Integrated Gradients, SmoothGrad and guided back-propagation: their axioms, and a network by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import interpreters, losses
from adv2_jax.activations import relu, relu_guided
from adv2_jax.capabilities import logits_of
from adv2_jax.cost import multiply_adds
from adv2_jax.interpreters import (
    Context,
    input_gradient,
    integrated_gradients_interpreter,
    smooth_grad_interpreter,
)
from adv2_jax.interpreters.gradients import attribution_map, times_input
from adv2_jax.interpreters.path import DECAY, mean_gradient, path_attribution

LABEL = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Two hidden layers at every pixel, a mean over pixels and a linear layer; no biases, so s(kx) = k s(x)."""

    first: jax.Array
    second: jax.Array
    last: jax.Array

    def features(self, image, act=relu):
        return act(act(image @ self.first) @ self.second)

    def head(self, features):
        return features.mean((0, 1)) @ self.last


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(0)
    shapes = (3, 8), (8, 6), (6, 4)
    return Dense(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def photos(images):
    return jnp.asarray(images[1:5] / np.float32(255))


def departure(model, images, points, score, baseline=0.0):
    """Mean over images: how far the sum of attributions is from the change of the score, and that change."""

    @jax.jit
    @jax.vmap
    def both(image):
        drawn = {"score": score, "baseline": baseline, "points": points}
        total = path_attribution(model, image, LABEL, **drawn).sum()
        ends = image, jnp.full_like(image, baseline)
        change = jnp.subtract(*(score(logits_of(model, end), LABEL) for end in ends))
        return abs(total - change), abs(change)

    return [float(values.mean()) for values in both(images)]


@pytest.mark.parametrize("baseline", [0.0, 0.8])
def test_integrated_gradients_of_a_linear_score_are_complete(linear, pixels, baseline):
    error, change = departure(linear, pixels[None], 1, losses.logit, baseline)
    assert error < 3e-6 and change > 0.1  # float32 sums of 48 terms of about 1


def test_integrated_gradients_of_a_quadratic_score_are_complete(linear, pixels):
    """The gradient is linear along the path: the midpoint rule is exact, a rule of end points would not be."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Quadratic(type(linear)):
        def head(self, features):
            return (features**2).mean((0, 1)) @ self.weights

    for points in (1, 3):
        model = Quadratic(*jax.tree.leaves(linear))
        error, change = departure(model, pixels[None], points, losses.logit)
        assert error < 1e-5 * change


def test_integrated_gradients_become_complete_with_the_points(small, photos):
    errors, (change, *_) = zip(
        *(departure(small, photos, n, losses.log_odds) for n in (1, 4, 16)), strict=True
    )
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02 * change


def test_input_times_gradient_is_integrated_gradients_of_a_homogeneous_network(dense, pixels):
    values, _ = times_input(dense, pixels, LABEL, score=losses.logit)
    integrated = path_attribution(dense, pixels, LABEL, score=losses.logit, points=3)
    np.testing.assert_allclose(values, integrated, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        values, pixels * input_gradient(dense, pixels, LABEL, score=losses.logit)[0]
    )


def test_smooth_grad_tends_to_grad(small, photos):
    photo = photos[1]

    @jax.jit
    def distance(noise):
        m = interpreters.smooth_grad(small, photo, LABEL, noise=noise, samples=4)
        return jnp.abs(m - interpreters.grad(small, photo, LABEL)).mean()

    far, near = distance(0.2), distance(1e-5)
    assert near < 1e-3 < 0.02 < far


def test_noise_is_that_of_the_seed_and_its_mean_is_taken(dense, pixels):
    """By hand, in NumPy's float64 sums over samples."""
    options = {"noise": 0.3, "samples": 6}
    noise = jax.random.normal(jax.random.key(5), (6, *pixels.shape))
    gradient = jax.jit(lambda x: input_gradient(dense, x, LABEL)[0])
    mean = np.mean([np.asarray(gradient(pixels + 0.3 * one), float) for one in noise], axis=0)
    m = interpreters.smooth_grad(dense, pixels, LABEL, seed=5, **options)
    np.testing.assert_allclose(m, attribution_map(jnp.asarray(mean), 1), atol=1e-5)
    other = interpreters.smooth_grad(dense, pixels, LABEL, seed=6, **options)
    assert jnp.abs(m - other).max() > 0.01


def by_hand(model, image, g, guided):
    """Backward pass in NumPy: from g, the gradient in the logits, to that in the image."""
    first, second, last = (np.asarray(leaf, float) for leaf in jax.tree.leaves(model))
    x = np.asarray(image, float)
    z1 = x @ first
    z2 = np.maximum(z1, 0) @ second
    g = np.broadcast_to(last @ g / (x.shape[0] * x.shape[1]), z2.shape)
    for z, weights in ((z2, second), (z1, first)):
        g = g * (z > 0) * ((g > 0) if guided else 1)
        g = g @ weights.T
    return g


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("score", [losses.logit, losses.log_odds])
def test_guided_backprop_by_hand(dense, pixels, guided, score):
    logits = logits_of(dense, pixels)
    expected = by_hand(dense, pixels, np.asarray(jax.grad(score)(logits, LABEL), float), guided)
    act = relu_guided if guided else relu
    actual, seen = input_gradient(dense, pixels, LABEL, act=act, score=score)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(seen, logits)
    draw = interpreters.guided_backprop if guided else interpreters.grad
    m = draw(dense, pixels, LABEL, score=score)
    np.testing.assert_allclose(m, attribution_map(jnp.asarray(expected), 1), atol=1e-5)


def test_guided_backprop_is_grad_where_all_gradients_are_positive(dense, pixels):
    positive = jax.tree.map(jnp.abs, dense)
    maps = [
        draw(positive, pixels, LABEL, score=losses.logit)
        for draw in (interpreters.guided_backprop, interpreters.grad)
    ]
    np.testing.assert_array_equal(*maps)


def test_derivatives_of_the_guided_rule(double):
    """In z the kernel of `relu_curved`, in g its own."""
    z, g = jnp.array([-0.3, 0.02, 0.4, 0.4]), jnp.array([2.0, 3.0, 5.0, -5.0])
    tau = 0.01

    def back(z, g):
        return jax.vjp(lambda z: relu_guided(z, tau), z)[1](g)[0]

    np.testing.assert_array_equal(relu_guided(z, tau), relu(z))
    np.testing.assert_array_equal(back(z, g), [0, 3, 5, 0])
    kernel = tau / 2 * (z**2 + tau) ** -1.5
    in_z, in_g = jax.jacobian(back, (0, 1))(z, g)
    np.testing.assert_allclose(in_z, np.diag(kernel * np.maximum(g, 0)), rtol=1e-12)
    np.testing.assert_array_equal(in_g, np.diag([0, 1, 1, 0]))
    np.testing.assert_allclose(
        jax.jvp(lambda z: back(z, g), (z,), (g,))[1], kernel * np.maximum(g, 0) * g, rtol=1e-12
    )


@pytest.mark.parametrize("n", [3, 5, 8])
def test_a_few_at_a_time_are_all(dense, pixels, n):
    """The mean, and its derivative, whatever the number of groups."""
    around = pixels[None] + 0.2 * jax.random.normal(jax.random.key(0), (n, *pixels.shape))

    @jax.jit
    def mean(images):
        return mean_gradient(dense, images, LABEL)

    @jax.jit
    def expected(images):
        return jnp.stack([input_gradient(dense, x, LABEL)[0] for x in images]).mean(0)

    np.testing.assert_allclose(mean(around), expected(around), atol=1e-6)
    slopes = [
        jax.jit(jax.grad(lambda images, f=f: (f(images) ** 2).sum()))(around)
        for f in (mean, expected)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_work_is_that_of_the_images(dense, pixels):
    def work(n):
        return multiply_adds(
            lambda x: mean_gradient(dense, jnp.broadcast_to(x, (n, *x.shape)), LABEL), pixels
        )

    assert [work(n) for n in (2, 8, 12)] == [2 * work(1), 8 * work(1), 12 * work(1)]


DRAWN = {
    "integrated_gradients": (integrated_gradients_interpreter, {"points": 16}),
    "smooth_grad": (smooth_grad_interpreter, {"samples": 16, "noise": 0.03}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_images_show_the_explained_map_on_average(dense, pixels, name):
    factory, options = DRAWN[name]
    some = factory(**options, draws=2)
    m = jax.jit(some.explain)(dense, pixels, LABEL)

    @jax.jit
    @jax.vmap
    def memory(key):
        context = Context(1e-3, key, 0, jnp.zeros_like(pixels))
        return some.surrogate(dense, pixels, LABEL, context).memory

    def mean(n):
        return np.asarray(memory(jax.random.split(jax.random.key(2), n))).mean(0)

    few, many = mean(4), mean(400)
    factor = pixels if name == "integrated_gradients" else 1
    errors = [
        np.abs(attribution_map(jnp.asarray(values) * factor, 1) - m).mean()
        for values in (few, many)
    ]
    assert errors[1] < 0.01 and errors[1] < errors[0]


def test_all_noisy_images_show_the_explained_map(dense, pixels):
    interpreter = smooth_grad_interpreter(samples=8, draws=8)
    m = jax.jit(interpreter.explain)(dense, pixels, LABEL)
    seen = jax.jit(interpreter.surrogate)(dense, pixels, LABEL, Context(1e-3, jax.random.key(1)))
    np.testing.assert_allclose(seen.map, m, atol=1e-5)  # float32 sums in another order


def test_fresh_noise_is_not_that_of_the_map(dense, pixels):
    interpreter = smooth_grad_interpreter(samples=4, draws=4, fresh=True)
    m = jax.jit(interpreter.explain)(dense, pixels, LABEL)
    surrogate = jax.jit(interpreter.surrogate)
    seen, other = (
        surrogate(dense, pixels, LABEL, Context(1e-3, jax.random.key(seed))).map for seed in (1, 2)
    )
    assert jnp.abs(seen - m).mean() > 0.01 and jnp.abs(seen - other).mean() > 0.01


@pytest.mark.parametrize("name", DRAWN)
def test_without_a_key_each_step_draws_other_images(dense, pixels, name):
    surrogate = jax.jit(DRAWN[name][0]().surrogate)
    first, again, second = (
        surrogate(dense, pixels, LABEL, Context(1e-3, step=step)).map for step in (0, 0, 1)
    )
    assert (first == again).all() and (first != second).any()


@pytest.mark.parametrize("name", DRAWN)
def test_the_running_mean_comes_nearer_to_the_explained_map(dense, pixels, name):
    interpreter = DRAWN[name][0]()
    m = jax.jit(interpreter.explain)(dense, pixels, LABEL)
    surrogate = jax.jit(interpreter.surrogate)
    memory, gradients, errors = interpreter.init(dense, pixels), [], []
    for step in range(40):
        context = Context(1e-3, jax.random.key(step), step, memory)
        seen = surrogate(dense, pixels, LABEL, context)
        share = max(1 - DECAY, 1 / (step + 1))
        gradients.append((seen.memory - (1 - share) * memory) / share)
        memory = seen.memory
        errors.append(jnp.abs(seen.map - m).mean())
    # the memory was taken apart: each part is the mean gradient of that step alone
    alone = surrogate(dense, pixels, LABEL, Context(1e-3, jax.random.key(7), 0, memory))
    np.testing.assert_allclose(alone.memory, gradients[7], atol=1e-5)
    assert np.mean(errors[20:]) < 0.6 * np.mean(errors[:3])


@pytest.mark.parametrize("name", DRAWN)
def test_the_slope_is_that_of_the_drawn_images(dense, pixels, name):
    """The memory gives values only: here it is what the step sees, so the map is that of the step."""
    surrogate = DRAWN[name][0]().surrogate
    key = jax.random.key(3)

    def loss(x, memory):
        seen = surrogate(dense, x, LABEL, Context(1e-2, key, 50, memory))
        return (seen.map**2).sum(), seen.memory

    slope = jax.jit(jax.grad(loss, has_aux=True))
    plain, _ = slope(pixels, None)
    # at step 0 the memory is replaced by the gradient of the step
    context = Context(1e-2, key, 0, jnp.zeros_like(pixels))
    gradient = jax.jit(surrogate)(dense, pixels, LABEL, context).memory
    with_memory, _ = slope(pixels, gradient)
    np.testing.assert_allclose(with_memory, plain, rtol=1e-3, atol=1e-4 * jnp.abs(plain).max())


@pytest.mark.parametrize(
    ("factory", "option"),
    [
        (integrated_gradients_interpreter, "points"),
        (integrated_gradients_interpreter, "draws"),
        (smooth_grad_interpreter, "samples"),
        (smooth_grad_interpreter, "draws"),
    ],
)
def test_numbers_out_of_range_are_named(factory, option):
    with pytest.raises(ValueError, match=f"^{option} = 0 must be 1 or more$"):
        factory(**{option: 0})


def test_draws_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"^draws = 9 must be at most samples = 8$"):
        smooth_grad_interpreter(samples=8, draws=9)
