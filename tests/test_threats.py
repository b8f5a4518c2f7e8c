"""Threat models, each for itself: where they start, what they allow, what they cost, and what they can be differentiated to."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adv2_jax import attack, attacks, explain, interpreters, losses, metrics, threats
from adv2_jax.activations import relu_curved

EVERY = pytest.mark.parametrize("name", threats.THREATS)


@pytest.fixture(scope="module")
def image():
    x = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
    x[0], x[1] = 0, 1
    return jnp.asarray(x)


def normal(shape, seed=1, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


# Every threat model.


@EVERY
def test_start_is_the_unchanged_image(image, name):
    threat = threats.THREATS[name]()
    start = threat.init(image)
    np.testing.assert_array_equal(threat.apply(start, image), image)
    for before, after in zip(
        jax.tree.leaves(start), jax.tree.leaves(threat.project(start, image)), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert threat.name == name


@EVERY
def test_what_is_projected_makes_an_image(image, name):
    """Also where rounding would leave [0, 1], or a user's file be refused."""
    threat = threats.THREATS[name]()
    for seed, scale in itertools.product(range(10), (1e-7, 0.02, 1.0)):
        params = jax.tree.map(lambda leaf: normal(leaf.shape, seed, scale), threat.init(image))  # noqa: B023
        x = threat.apply(threat.project(params, image), image)
        assert x.min() >= 0 and x.max() <= 1


@EVERY
def test_gradient_at_the_start_is_finite_and_not_zero(image, name):
    threat = threats.THREATS[name]()

    def loss(params):
        return jnp.vdot(threat.apply(params, image), normal(image.shape)) + threat.penalty(params)

    for gradient in jax.tree.leaves(jax.grad(loss)(threat.init(image))):
        assert jnp.isfinite(gradient).all()
        assert (gradient != 0).mean() > 0.5


@EVERY
def test_equal_options_give_the_same_object(name):
    factory = threats.THREATS[name]
    assert factory() is factory()
    assert factory(0.05) is factory(0.05)
    assert factory(0.05) is not factory(0.06)


def test_an_option_spelt_out_is_the_same_object():
    assert threats.linf() is threats.linf(8 / 255)
    assert threats.linf() is threats.linf(epsilon=8 / 255)


@EVERY
def test_a_batch_is_its_images(image, name):
    threat = threats.THREATS[name]()
    images = jnp.stack([image, image[::-1], image**2])
    params = jax.tree.map(lambda leaf: normal(leaf.shape, 3), jax.vmap(threat.init)(images))

    def one(params, image):
        allowed = threat.project(params, image)
        return allowed, threat.apply(allowed, image), threat.penalty(allowed)

    together = jax.vmap(one)(params, images)
    for i in range(3):
        alone = one(jax.tree.map(lambda leaf: leaf[i], params), images[i])  # noqa: B023
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-6, atol=1e-6)  # float32


# The sup-norm ball cut with the unit cube, pixel by pixel.


@pytest.mark.parametrize("epsilon", [0.031, 8 / 255, 0.5, 1.0])
def test_projection_is_the_nearest_allowed_image(image, epsilon):
    threat = threats.linf(epsilon)
    delta = normal(image.shape)
    projected = threat.project(delta, image)
    expected = [
        min(max(d, -epsilon, -x), epsilon, 1 - x)
        for d, x in zip(np.ravel(delta), np.ravel(image), strict=True)
    ]
    np.testing.assert_allclose(np.ravel(projected), expected, atol=6e-8)  # half an ulp of 1
    x = threat.apply(projected, image)
    assert x.min() >= 0 and x.max() <= 1
    assert jnp.abs(x - image).max() <= epsilon + 1e-7


@pytest.mark.parametrize("threat", [threats.linf(0.1), threats.l2(0.4)], ids=["linf", "l2"])
def test_allowed_changes_stay(image, threat):
    delta = jnp.where(image > 0.5, -0.05, 0.05)
    np.testing.assert_array_equal(threat.project(delta, image), delta)
    np.testing.assert_array_equal(threat.apply(delta, image), image + delta)


# The Euclidean ball cut with the unit cube.


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("scale", [0.01, 0.2, 2.0])
def test_projection_on_the_ball_is_that_of_plain_numpy(image, epsilon, scale):
    delta, x = normal(image.shape, scale=scale), np.asarray(image, float)
    inside = np.clip(np.asarray(delta, float), -x, 1 - x)
    expected = inside * min(1, epsilon / np.sqrt((inside**2).sum()))
    projected = threats.l2(epsilon).project(delta, image)
    np.testing.assert_allclose(projected, expected, rtol=1e-5, atol=1e-7)  # float32
    assert jnp.linalg.norm(projected.ravel()) <= epsilon * (1 + 1e-6)
    assert (image + projected).min() >= 0 and (image + projected).max() <= 1


def test_projection_on_the_ball_is_the_nearest_point_where_the_cube_does_not_matter():
    image = jnp.full((5, 4, 3), 0.5)
    delta = normal(image.shape, scale=0.1)
    projected = np.asarray(threats.l2(0.3).project(delta, image))
    rng = np.random.default_rng(4)
    for other in rng.normal(size=(50, *image.shape)):
        other *= 0.3 * rng.random() / np.linalg.norm(other)
        # what makes it nearest in a convex set
        assert np.vdot(delta - projected, other - projected) <= 1e-6


def test_a_step_in_the_ball_follows_the_gradient_and_grows_with_the_radius():
    gradient = normal((5, 4, 3))
    for epsilon in (0.25, 0.5):
        steepest = threats.l2(epsilon).steepest()
        direction, _ = steepest.update(gradient, steepest.init(gradient))
        np.testing.assert_allclose(
            direction / 255, epsilon / 4 * gradient / jnp.linalg.norm(gradient.ravel()), rtol=1e-5
        )


# The flow.


def plain_warp(image, flow):
    """Bilinear, one pixel at a time, in float64."""
    h, w, _ = image.shape
    out = np.empty(image.shape)
    for i, j in np.ndindex(h, w):
        y, x = np.clip(i + flow[i, j, 0], 0, h - 1), np.clip(j + flow[i, j, 1], 0, w - 1)
        top, left = min(int(y), h - 2), min(int(x), w - 2)
        a, b = y - top, x - left
        corners = image[top : top + 2, left : left + 2]
        out[i, j] = np.einsum("i,j,ijc->c", [1 - a, a], [1 - b, b], corners)
    return out


def plain_penalty(flow):
    """One pair of neighbours at a time."""
    h, w, _ = flow.shape
    total = 0.0
    for i, j in np.ndindex(h, w):
        for di, dj in itertools.product((-1, 1), repeat=2):
            apart = flow[np.clip(i + di, 0, h - 1), np.clip(j + dj, 0, w - 1)] - flow[i, j]
            total += np.sqrt((apart**2).sum() + 1e-8)
    return total


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_warp_is_that_of_plain_numpy(image, scale):
    flow = normal((5, 4, 2), scale=scale)
    expected = plain_warp(np.asarray(image, float), np.asarray(flow, float))
    # float32 places, slopes up to 1
    np.testing.assert_allclose(threats.warp(image, flow), expected, atol=2e-6)


def test_no_flow_is_the_identity(image):
    np.testing.assert_array_equal(threats.warp(image, jnp.zeros((5, 4, 2))), image)


@pytest.mark.parametrize("shift", [(1, 0), (0, -1), (-2, 3), (9, -9)])
def test_whole_shifts_are_exact(image, shift):
    rows, columns = (
        np.clip(np.arange(n) + s, 0, n - 1) for n, s in zip((5, 4), shift, strict=True)
    )
    flow = jnp.broadcast_to(jnp.asarray(shift, jnp.float32), (5, 4, 2))
    np.testing.assert_array_equal(threats.warp(image, flow), image[rows][:, columns])


def test_slope_at_no_flow_is_that_to_the_next_pixel(image):
    """A sampler built on floor and ceil has none there."""
    x = np.asarray(image)
    v = np.asarray(normal(image.shape, 2))
    gradient = jax.grad(lambda flow: jnp.vdot(threats.warp(image, flow), v))(jnp.zeros((5, 4, 2)))
    np.testing.assert_allclose(
        gradient[:-1, :, 0], (v[:-1] * np.diff(x, axis=0)).sum(-1), atol=1e-5
    )
    np.testing.assert_allclose(
        gradient[:, :-1, 1], (v[:, :-1] * np.diff(x, axis=1)).sum(-1), atol=1e-5
    )
    assert (gradient[-1, :, 0] == 0).all() and (gradient[:, -1, 1] == 0).all()


def away_from_kinks(shape):
    """A flow whose places are all a tenth of a pixel or more from the next whole number."""
    rng = np.random.default_rng(5)
    return rng.integers(-2, 2, shape) + rng.uniform(0.1, 0.9, shape)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("of", ["warp", "penalty"])
def test_gradients_are_the_slopes(of, slope):
    image = jnp.asarray(np.random.default_rng(0).random((5, 4, 3)))
    weights = normal(image.shape, dtype=jnp.float64)
    flow, along = jnp.asarray(away_from_kinks((5, 4, 2))), normal((5, 4, 2), 6, dtype=jnp.float64)
    f = (
        threats.flow_penalty
        if of == "penalty"
        else lambda flow: jnp.vdot(threats.warp(image, flow), weights)
    )
    expected = slope(f, flow, along)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(jnp.vdot(jax.grad(f)(flow), along), expected, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_grad_maps_can_be_differentiated_through_the_flow(make_small, mode, slope):
    """Second order: the map is a gradient with respect to the image that the flow makes."""
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), make_small())
    image = jnp.asarray(np.random.default_rng(0).random((8, 8, 3)))
    target_map = jnp.asarray(np.random.default_rng(1).random((8, 8)))
    smooth = partial(jax.nn.gelu, approximate=False)  # a kink of a ReLU would spoil the differences

    @jax.jit
    def loss(flow):
        return losses.map_l2(
            interpreters.grad(model, threats.warp(image, flow), 3, act=smooth), target_map
        )

    flow, along = jnp.asarray(away_from_kinks((8, 8, 2))), normal((8, 8, 2), 6, dtype=jnp.float64)
    expected = slope(loss, flow, along, 1e-6)
    assert abs(expected) > 1e-2
    found = (
        jnp.vdot(jax.grad(loss)(flow), along)
        if mode == "reverse"
        else jax.jvp(loss, (flow,), (along,))[1]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_losses_have_second_derivatives_in_the_flow_itself(slope):
    """The sampler is bilinear: the mixed derivative of dy and dx at one place is not zero."""
    image = jnp.asarray(np.random.default_rng(0).random((5, 4, 3)))
    flow, along = jnp.asarray(away_from_kinks((5, 4, 2))), normal((5, 4, 2), 6, dtype=jnp.float64)

    @jax.grad
    def gradient(flow):
        return (threats.warp(image, flow) ** 3).sum() + threats.flow_penalty(flow)

    product = jax.jvp(gradient, (flow,), (along,))[1]
    np.testing.assert_allclose(product, slope(gradient, flow, along, 1e-6), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda flow: jnp.vdot(gradient(flow), along))(flow), product, rtol=1e-9, atol=1e-12
    )


def test_curved_surrogate_of_grad_has_a_gradient_at_no_flow(make_small):
    """What `grad` x `flow` starts from."""
    model, image = (
        make_small(),
        jnp.asarray(np.random.default_rng(0).random((8, 8, 3)), jnp.float32),
    )

    @jax.jit
    def loss(flow):
        m = interpreters.grad(
            model, threats.warp(image, flow), 3, act=lambda z: relu_curved(z, 0.1)
        )
        return losses.map_l2(m, jnp.zeros((8, 8)))

    gradient = jax.grad(loss)(jnp.zeros((8, 8, 2)))
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 0.3, 5.0])
def test_penalty_is_that_of_plain_numpy(scale):
    flow = normal((5, 4, 2), scale=scale)
    assert threats.flow_penalty(flow) == pytest.approx(
        plain_penalty(np.asarray(flow, float)), rel=1e-5
    )
    assert threats.flow(0.25).penalty(flow) == pytest.approx(
        0.25 * float(threats.flow_penalty(flow)), rel=1e-6
    )


def test_penalty_of_no_flow_has_no_slope():
    np.testing.assert_array_equal(jax.grad(threats.flow_penalty)(jnp.zeros((5, 4, 2))), 0)


def test_first_steps_of_a_flow():
    """Adam's is the learning rate in every coordinate, whatever the gradient."""
    gradient = normal((5, 4, 2), scale=100.0)
    for make, length in ((threats.flow().steepest, 0.02), (threats.flow().optimiser, 0.01)):
        direction, _ = make().update(gradient, make().init(gradient))
        np.testing.assert_allclose(direction / 255, length * np.sign(gradient), rtol=1e-4)


# Both.


def test_change_after_the_flow_is_within_the_ball_of_the_warped_image(image):
    threat = threats.linf_flow(0.05)
    params = threats.FlowDelta(normal((5, 4, 2)), normal((5, 4, 3)))
    projected = threat.project(params, image)
    warped = threats.warp(image, params.flow)
    np.testing.assert_array_equal(projected.flow, params.flow)
    np.testing.assert_array_equal(projected.delta, threats.linf(0.05).project(params.delta, warped))
    np.testing.assert_array_equal(threat.apply(projected, image), warped + projected.delta)
    assert threat.penalty(params) == threats.flow().penalty(params.flow)


def test_each_part_goes_its_own_way():
    threat, gradient = threats.linf_flow(), threats.FlowDelta(normal((5, 4, 2)), normal((5, 4, 3)))
    for kind in ("steepest", "optimiser"):
        both, moving = getattr(threat, kind)(), getattr(threats.flow(), kind)()
        state, own = both.init(gradient), moving.init(gradient.flow)
        for factor in (1.0, -0.5):
            changed = jax.tree.map(lambda leaf: factor * leaf, gradient)  # noqa: B023
            direction, state = both.update(changed, state)
            expected, own = moving.update(changed.flow, own)
        np.testing.assert_allclose(direction.flow, expected, rtol=1e-6)
        np.testing.assert_array_equal(direction.delta, -np.sign(gradient.delta))


# In an attack.


@pytest.fixture(scope="module")
def small(make_small, images):
    """A classifier, images, targets and the benign CAMs."""
    model = make_small()
    logits, _ = explain(model, images, np.zeros(6, int), interpreter="cam")
    labels, targets = logits.argsort(-1)[:, :-3:-1].T
    return model, images, targets, explain(model, images, labels, interpreter="cam")[1]


@EVERY
def test_attack_delivers_what_its_parameters_make(small, name):
    model, images, targets, maps = small
    threat = threats.THREATS[name]()
    result = attack(model, images, targets, maps, threat=threat, steps=10, batch_size=4)
    x = jax.vmap(threat.apply)(result.params, images / np.float32(255))
    np.testing.assert_allclose(result.float_images, x, atol=1e-6)  # float32
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result.params))
    assert (result.images != images).any()


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("interpreter", ["grad", "cam"])
def test_adv2_shows_more_of_the_map_than_the_plain_attack(small, name, interpreter):
    model, images, targets, _ = small
    _, maps = explain(model, images, targets, interpreter=interpreter)
    maps = maps[::-1]
    options = {"threat": threats.THREATS[name](), "steps": 60}
    plain = attack(model, images, targets, interpreter=None, **options)
    joint = attack(model, images, targets, maps, interpreter=interpreter, **options)
    _, plain_maps = explain(model, plain.images, targets, interpreter=interpreter)
    assert metrics.map_l1(joint.maps, maps).mean() < 0.95 * metrics.map_l1(plain_maps, maps).mean()


@EVERY
def test_image_is_attacked_the_same_alone_and_in_a_batch(small, name):
    together, alone = (
        attack(*small, threat=threats.THREATS[name](), steps=4, batch_size=n).images for n in (4, 1)
    )
    np.testing.assert_array_equal(together, alone)


def test_own_threat_model(small):
    """One brightness for the whole image, along the gradient itself: four functions, the rest has defaults."""
    model, images, targets, maps = small
    shade = threats.Threat(
        "shade",
        init=lambda image: jnp.zeros(()),
        apply=lambda shade, image: image * (1 - shade),
        project=lambda shade, image: jnp.clip(shade, 0, 0.5),
        steepest=partial(optax.scale, 3.0),
    )
    result = attack(model, images, targets, maps, threat=shade, steps=8)
    expected = np.round(images * (1 - result.params[:, None, None, None]))
    assert np.abs(result.images - expected).max() <= 1  # ties of the rounding
    assert result.params.shape == (6,) and (result.params > 0).any() and result.params.max() <= 0.5


# Bad input.


WRONG = {
    r"^epsilon = 0 must lie in \[1/255, 1\].*: a change below 1/255 is lost when": (
        threats.linf,
        0,
    ),
    r"^epsilon = 0.0039 must lie in \[1/255, 1\]": (threats.linf, 0.0039),
    r"^epsilon = -0.1 must lie in \[1/255, 1\]": (threats.linf, -0.1),
    r"^epsilon = nan must lie in \[1/255, 1\]": (threats.linf_flow, float("nan")),
    r"^epsilon = 8 must lie in \[1/255, 1\]": (threats.linf, 8),
    "^epsilon = 0.003 must be a finite number, 1/255 or more": (threats.l2, 0.003),
    "^epsilon = inf must be a finite number, 1/255 or more": (threats.l2, float("inf")),
    "^penalty = -1 must be a finite number, 0 or more$": (threats.flow, -1),
    "^penalty = nan must be a finite number, 0 or more$": (threats.flow, float("nan")),
}


@pytest.mark.parametrize("message", WRONG)
def test_option_out_of_range_is_named(message):
    factory, value = WRONG[message]
    with pytest.raises(ValueError, match=message):
        factory(value)


# What is delivered: the nearest allowed 8-bit image.


def benign(kind, shape=(6, 5, 3), seed=0):
    """A float64 image: on the 8-bit grid, off it, or almost on it."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, shape).astype(np.float64)
    levels[0], levels[1] = 0, 255
    off = {
        "8-bit": 0.0,
        "float": rng.uniform(-0.5, 0.5, shape),
        "almost 8-bit": rng.uniform(-1e-3, 1e-3, shape),
    }[kind]
    return np.clip(levels + off, 0, 255) / 255


def delivered(threat, image, seed):
    """A change of random size, projected and rounded as an attack does it, in NumPy."""
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=image.shape) * rng.choice([0.01, 0.1, 1.0])
    delta = np.asarray(threat.project(jnp.float32(delta), jnp.float32(image)), np.float64)
    x = threat.round(image + delta, delta, image)
    np.testing.assert_array_equal(x, np.round(x * 255) / 255)
    assert x.min() >= 0 and x.max() <= 1
    return delta, x


@pytest.mark.parametrize("kind", ["8-bit", "float", "almost 8-bit"])
def test_linf_holds_for_what_is_delivered(kind):
    """200 random radii, whole levels among them; nothing is forgiven but the last digits of float64."""
    rng = np.random.default_rng(3)
    for seed in range(200):
        epsilon = rng.integers(1, 30) / 255 if seed % 2 else rng.uniform(1 / 255, 0.2)
        image = benign(kind, seed=seed)
        delta, x = delivered(threats.linf(float(epsilon)), image, seed)
        assert np.abs(x - image).max() <= epsilon * (1 + 1e-12)
        nearest = np.round((image + delta) * 255) / 255
        # elsewhere rounding may have to go the other way
        allowed = np.abs(nearest - image) <= epsilon * (1 - 1e-6)
        np.testing.assert_array_equal(x[allowed], nearest[allowed])
        # it is never further than the next level
        assert np.abs(x - (image + delta)).max() < 1 / 255 + 1e-6


def test_whole_levels_of_linf_are_used_up(image):
    """8/255 allows 8 levels, .031 and 8.9/255 allow 7 and 8."""
    for epsilon, level in (
        (8 / 255, 8),
        (0.031, 7),
        (8.9 / 255, 8),
        (1 / 255, 1),
        (100 / 255, 100),
    ):
        grey = np.full((2, 2, 3), 128 / 255)
        x = threats.linf(epsilon).round(grey + epsilon, None, grey)
        np.testing.assert_array_equal(np.round((x - grey) * 255), level)


@pytest.mark.parametrize("kind", ["8-bit", "float"])
def test_l2_holds_for_what_is_delivered(kind):
    rng = np.random.default_rng(3)
    for seed in range(100):
        epsilon = float(rng.uniform(0.1, 1))  # the float image is some .01 from the grid
        image = benign(kind, seed=seed)
        delta, x = delivered(threats.l2(epsilon), image, seed)
        assert np.linalg.norm(x - image) <= epsilon
        nearest = np.round((image + delta) * 255) / 255
        if np.linalg.norm(nearest - image) <= epsilon * (1 - 1e-6):
            np.testing.assert_array_equal(x, nearest)
        else:  # shrunk no more than the rounding of 90 values asks for
            assert np.linalg.norm(x - image) >= 0.9 * epsilon


def test_an_image_further_from_8_bits_than_l2_allows_is_refused():
    image = np.full((4, 4, 3), 100.5 / 255)  # .5 √48 = 3.46 levels away
    threats.l2(3.5 / 255).check(image)
    with pytest.raises(
        ValueError,
        match=r"^the image is 0.0136 \(L2\) away from the nearest 8-bit image, more than epsilon",
    ):
        threats.l2(3.4 / 255).check(image)


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_rounding_in_the_loop_is_that_of_what_is_delivered(name):
    """jax in float32 and NumPy in float64 agree on 8-bit images, to the last level."""
    threat = threats.THREATS[name](0.1)
    for seed in range(20):
        image = benign("8-bit", seed=seed)
        delta, x = delivered(threat, image, seed)
        looped = jax.jit(threat.round)(
            jnp.float32(image + delta), jnp.float32(delta), jnp.float32(image)
        )
        # l2: at a radius that one level more or less decides, float32 may decide otherwise for one value in a hundred
        assert np.mean(np.abs(looped - x) > 1e-6) <= (0 if name == "linf" else 0.02)


def test_linf_of_a_flow_is_measured_from_the_moved_image():
    threat, image = threats.linf_flow(4 / 255), jnp.float32(benign("8-bit"))
    params = threats.FlowDelta(normal((6, 5, 2)), normal((6, 5, 3)))
    params = threat.project(params, image)
    moved = threats.warp(image, params.flow)
    x = threat.round(threat.apply(params, image), params, image)
    assert jnp.abs(x - moved).max() <= 4 / 255 + 1e-6
    np.testing.assert_allclose(x * 255, jnp.round(x * 255), atol=1e-4)


# Noise.

SIZES = pytest.mark.parametrize("size", [8, 32, 64])


def noisy(threat, size, n=6, seed=0):
    """Return benign images, one of them black and one white, and their noise."""
    x = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    x[0], x[1] = 0, 255
    keys = attacks.image_keys(seed, np.arange(n))
    targets = np.ones(n, np.int32)
    return x, attacks.noise(Bright(), x, targets, threat=threat, keys=keys, batch_size=4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bright:
    """A network without weights: how red, green or blue an image is."""

    def logits(self, image, act=jax.nn.relu):
        return image.mean((0, 1))


@SIZES
@pytest.mark.parametrize(("epsilon", "levels"), [(8 / 255, 8), (0.031, 7), (1 / 255, 1), (1, 255)])
def test_noise_of_linf_is_all_levels_up_or_down(size, epsilon, levels):
    x, result = noisy(threats.linf(epsilon), size)
    change = result.images.astype(int) - x
    up, down = np.minimum(255 - x.astype(int), levels), np.minimum(x.astype(int), levels)
    assert ((change == up) | (change == -down)).all()
    signs = change[2:][(up[2:] > 0) & (down[2:] > 0)] > 0
    # four standard errors
    assert abs(signs.mean() - 0.5) < 2 / np.sqrt(signs.size)


@SIZES
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 3.0])
def test_noise_of_l2_is_as_long_as_allowed_in_a_random_direction(size, epsilon):
    x, result = noisy(threats.l2(epsilon), size)
    lengths = metrics.l2(result.images, x)
    # one level of one value, at least, is what the grid leaves
    assert (lengths <= epsilon).all() and (lengths >= 0.95 * epsilon).all()
    a, b = (result.images.astype(float) - x)[2:4].reshape(2, -1)
    assert abs(a @ b) < 4 * np.sqrt(a.size) * np.abs(a * b).mean() + 1e-9
    # half of the values go up; a black image has no other way
    assert abs((a > 0).sum() - (a < 0).sum()) < 4 * np.sqrt((a != 0).sum())


@SIZES
def test_noise_of_a_flow_moves_every_pixel_as_far(size):
    x, result = noisy(threats.flow(), size)
    flow = result.params
    np.testing.assert_allclose(np.linalg.norm(flow, axis=-1), 0.2, rtol=1e-5)
    assert np.abs(flow.mean((1, 2))).max() < 4 * 0.2 / size
    for image, moved, displacement in zip(x, result.images, flow, strict=True):
        warped = threats.warp(jnp.float32(image / 255), displacement)
        np.testing.assert_allclose(moved, np.asarray(warped) * 255, atol=0.51)


@SIZES
def test_noise_of_a_flow_and_linf_is_within_the_ball_of_the_moved_image(size):
    x, result = noisy(threats.linf_flow(4 / 255), size)
    moved = jax.vmap(threats.warp)(jnp.float32(x / 255), result.params.flow)
    away = np.abs(result.images / 255 - np.asarray(moved))
    # whole levels from a place between two
    assert away.max() <= 4 / 255 + 1e-6 and away[2:].mean() > 2.9 / 255


@EVERY
def test_noise_of_an_image_depends_on_its_key_alone(name):
    threat = threats.THREATS[name]()
    x, result = noisy(threat, 16)
    keys = attacks.image_keys(0, np.arange(6))
    for some in ([3], [5, 2], [0, 1, 2, 3, 4]):
        again = attacks.noise(
            Bright(), x[some], np.ones(len(some), int), threat=threat, keys=keys[some]
        )
        np.testing.assert_array_equal(again.images, result.images[some])
    others = attacks.image_keys(1, np.arange(6))
    other = attacks.noise(Bright(), x, np.ones(6, int), threat=threat, keys=others)
    assert (other.images != result.images).any((1, 2, 3))[2:].all()
    np.testing.assert_allclose(result.logits, x.mean((1, 2)) / 255, atol=0.2)
    assert not result.failed.any() and result.gradient_evaluations == 0
