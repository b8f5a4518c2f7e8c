"""Interpreters in closed form on a linear classifier, and as functions that compose on a small network."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import interpreters, losses
from adv2_jax.activations import relu, relu_curved, relu_h, relu_sigmoid, softplus
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters import (
    INTERPRETERS,
    Context,
    grad_interpreter,
    smooth_relu_grad_interpreter,
)
from adv2_jax.interpreters.activation_maps import raw_cam, raw_grad_cam

LABEL = 1
TAU = 1e-3
# those of transformers have tests of their own
EVERY = {name: make for name, make in INTERPRETERS.items() if "attend" not in make().needs}
EVERY |= {"smooth_relu_grad": smooth_relu_grad_interpreter}
EVERY["occlusion"] = partial(EVERY["occlusion"], shares=1)  # exact, from any memory
# a model with a masker, a surrogate with a memory: tests of their own
del (EVERY["rts"], EVERY["mask"])


@pytest.fixture(scope="module", params=EVERY)
def interpreter(request):
    return EVERY[request.param]()


@pytest.fixture(scope="module")
def photos(images):
    return jnp.asarray(images[1:5] / np.float32(255))


def seen_by(interpreter, model, image, tau=TAU):
    """The surrogate in the first step of an attack."""
    memory = None if interpreter.solver is None else interpreter.solver.init(image)
    return interpreter.surrogate(model, image, LABEL, Context(tau, memory=memory))


def surrogate_loss(interpreter, model, image, tau=TAU):
    """A function of logits and map with neither symmetry nor zero curvature."""
    logits, m, *_ = seen_by(interpreter, model, image, tau)
    return jnp.sin(logits).sum() + jnp.sum(jnp.cos(jnp.arange(m.size).reshape(m.shape)) * m**2)


@pytest.fixture(scope="module")
def small(make_small):
    return make_small()


@pytest.fixture(scope="module")
def seen(small, photos, interpreter):
    """What the tests below ask of one interpreter on the network and the photos, from one compilation."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=photos[0].shape), jnp.float32)

    def cross_entropy(forward, image):
        return losses.cross_entropy(forward(image), 2)

    def one(image):
        def loss(x):
            return surrogate_loss(interpreter, small, x)

        def true_logits(x):
            return small.head(small.features(x))

        def surrogate_logits(x):
            return seen_by(interpreter, small, x).logits

        gradient = jax.grad(loss)(image)
        return {
            "true": (true_logits(image), interpreter.explain(small, image, LABEL)),
            "surrogate": seen_by(interpreter, small, image)[:2],
            "true gradient": jax.grad(partial(cross_entropy, true_logits))(image),
            "surrogate gradient": jax.grad(partial(cross_entropy, surrogate_logits))(image),
            "gradient": gradient,
            "reverse": jnp.vdot(gradient, v),
            "forward": jax.jvp(loss, (image,), (v,))[1],
        }

    return jax.jit(jax.vmap(one))(jnp.concatenate([photos, jnp.zeros_like(photos[:1])]))


class Closed:
    """What the linear classifier of conftest.py makes of an image, in float64."""

    def __init__(self, linear, image):
        mix, self.weights, bias = (
            np.asarray(leaf, float) for leaf in (linear.mix, linear.weights, linear.bias)
        )
        self.size = mix.shape[0] * mix.shape[1]
        self.features = np.einsum("hwc,hwck->hwk", np.asarray(image, float), mix)
        self.logits = self.features.mean((0, 1)) @ self.weights + bias
        self.slopes = np.einsum("hwck,kj->hwcj", mix, self.weights) / self.size  # of every logit
        self.cam = self.features @ self.weights[:, LABEL]
        self.grad_cam = np.maximum(self.cam, 0) / self.size

    def log_odds_slope(self):
        others = np.where(np.arange(3) == LABEL, 0, np.exp(self.logits))
        return self.slopes[..., LABEL] - self.slopes @ (others / others.sum())

    def probability_slope(self):
        f_c = np.exp(self.logits[LABEL]) / np.exp(self.logits).sum()
        return f_c * (1 - f_c) * self.log_odds_slope()


def scaled(raw):
    return (raw - raw.min()) / np.ptp(raw)


@pytest.fixture(scope="module")
def closed(linear, pixels):
    return Closed(linear, pixels)


SLOPES = {
    losses.log_odds: Closed.log_odds_slope,
    losses.logit: lambda closed: closed.slopes[..., LABEL],
    losses.probability: Closed.probability_slope,
}


@pytest.mark.parametrize("score", SLOPES)
def test_input_gradient_is_that_of_the_score(linear, pixels, closed, score):
    gradient, logits = interpreters.input_gradient(linear, pixels, LABEL, score=score)
    # float32 sums of 240 terms
    np.testing.assert_allclose(gradient, SLOPES[score](closed), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logits, closed.logits, rtol=1e-5)


@pytest.mark.parametrize("score", SLOPES)
@pytest.mark.parametrize("pool", [1, 2])
def test_grad_map(linear, pixels, closed, score, pool):
    raw = np.abs(SLOPES[score](closed)).max(-1)
    pooled = raw.reshape(4 // pool, pool, 4 // pool, pool).mean((1, 3))
    actual = interpreters.grad(linear, pixels, LABEL, pool=pool, score=score)
    np.testing.assert_allclose(actual, scaled(pooled), atol=1e-5)


@pytest.mark.parametrize("name", ["cam", "grad_cam"])
def test_cam_and_grad_cam_maps(linear, pixels, closed, name):
    features = linear.features(pixels)
    raw = {"cam": raw_cam, "grad_cam": raw_grad_cam}[name](linear, features, LABEL)
    np.testing.assert_allclose(raw, getattr(closed, name), rtol=1e-5, atol=1e-6)
    actual = getattr(interpreters, name)(linear, pixels, LABEL)
    np.testing.assert_allclose(actual, scaled(getattr(closed, name)), atol=1e-6)


def test_part_of_the_grad_cam_map_is_cut_off(closed):
    assert 0 < (closed.cam < 0).sum() < closed.size  # or the test above would not see the ReLU


def test_grad_cam_averages_the_gradient_of_a_head_that_is_not_linear(linear, pixels, closed):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Quadratic(type(linear)):
        def head(self, features):
            return (features**2).mean((0, 1)) @ self.weights

    model = Quadratic(*jax.tree.leaves(linear))
    alpha = 2 * closed.features.mean((0, 1)) * closed.weights[:, LABEL] / closed.size
    raw = raw_grad_cam(model, model.features(pixels), LABEL)
    np.testing.assert_allclose(raw, np.maximum(closed.features @ alpha, 0), rtol=1e-5, atol=1e-6)


def test_log_odds_and_probability_give_one_map_where_nothing_saturates(model, photos):
    @jax.jit
    def both(image):
        f_c = losses.probability(model.head(model.features(image)), LABEL)
        literal = interpreters.grad(model, image, LABEL, score=losses.probability)
        return f_c, literal, interpreters.grad(model, image, LABEL)

    for image in photos:
        f_c, literal, m = both(image)
        assert 1e-3 < f_c < 0.99
        np.testing.assert_allclose(m, literal, atol=1e-5)  # float32 gradients


def test_cam_reads_the_weights_of_the_last_layer(model, photos):
    features = jax.jit(model.features)(photos[0])
    expected = np.asarray(features, float) @ np.asarray(model.linear.kernel[...], float)[:, LABEL]
    np.testing.assert_allclose(raw_cam(model, features, LABEL), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing(small, photos, interpreter, seen):
    alone = jax.jit(interpreter.explain)
    for image, m in zip(photos, seen["true"][1], strict=False):
        assert m.min() == 0 and m.max() <= 1
        # float32 sums in another order
        np.testing.assert_allclose(m, alone(small, image, LABEL), atol=1e-5)


def test_surrogate_shows_the_same_logits_and_when_faithful_the_same_map(seen, interpreter):
    (logits, m), (true_logits, true_map) = seen["surrogate"], seen["true"]
    np.testing.assert_array_equal(logits, true_logits)
    if interpreter.faithful:
        # a solver's positions in one batch, and one by one: float32 sums in another order
        atol = 0 if interpreter.solver is None else 1e-5
        np.testing.assert_allclose(m, true_map, rtol=0, atol=atol)
    else:
        assert 0 < jnp.abs(m - true_map).mean() < 0.2


def test_gradient_of_the_surrogate_logits_is_exact(seen):
    expected = seen["true gradient"]
    atol = 1e-6 * jnp.abs(expected).max()  # float32 sums in another order
    np.testing.assert_allclose(seen["surrogate gradient"], expected, rtol=1e-4, atol=atol)


def test_forward_and_reverse_mode_agree_and_are_finite(seen):
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(seen))
    assert (seen["reverse"][:4] != 0).all()
    # kernels as high as 1 / sqrt(tau) in float32
    np.testing.assert_allclose(seen["reverse"], seen["forward"], rtol=1e-3)


def test_hessian_is_symmetric_and_that_of_central_differences(
    linear, pixels, interpreter, double, slope
):
    model, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (linear, pixels))
    v = np.random.default_rng(0).normal(size=x.shape)
    loss = partial(surrogate_loss, interpreter, model)
    derivatives = jax.jit(
        lambda x: (loss(x), jax.grad(loss)(x).ravel(), jax.hessian(loss)(x).reshape(x.size, x.size))
    )
    _, gradient, hessian = derivatives(x)
    np.testing.assert_allclose(
        gradient @ v.ravel(), slope(lambda x: derivatives(x)[0], x, v), rtol=1e-7
    )
    np.testing.assert_allclose(
        hessian @ v.ravel(), slope(lambda x: derivatives(x)[1], x, v), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)


# Formal Hessians on a network with ReLUs: what automatic differentiation makes of the replaced
# derivatives. In float64, where differences have nine digits.

WIDTH = 0.01


def bump(z):
    """h' of `relu_h`."""
    return WIDTH * (z**2 + WIDTH) ** -1.5


def logistic_bump(z):
    return 5 * jax.nn.sigmoid(5 * z) * jax.nn.sigmoid(-5 * z)


# an activation, and its second derivative
CURVED = {
    "relu_curved": (partial(relu_curved, tau=WIDTH), lambda z: bump(z) / 2),
    "relu_h": (partial(relu_h, tau=WIDTH), bump),
    "softplus": (softplus(5.0), logistic_bump),
    "relu": (relu, jnp.zeros_like),
}


@pytest.fixture
def network(make_small, double):
    """Two convolutions with ReLUs, an image of 8 x 8 pixels and a direction."""
    rng = np.random.default_rng(4)
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), make_small())
    return model, jnp.asarray(rng.uniform(size=(8, 8, 3))), rng.normal(size=(8, 8, 3))


def inner(model, x, act, shifts=(0, 0)):
    """Logits and pre-activations; each shift is added after one activation."""
    remaining, pre = iter(shifts), []

    def shifted(z):
        pre.append(z)
        return act(z) + next(remaining)

    return model.head(model.features(x, act=shifted)), pre


def log_odds_of(model, act, x):
    return losses.log_odds(logits_of(model, x, act), LABEL)


def hessians(model, x, act, curvature):
    """Of the log-odds: by JAX; by hand, the softmax term J'AJ and, for each neuron i of each layer,
    (∂s/∂a_i) φ''(z_i) ∇z_i∇z_i'."""
    n = x.size
    logits, pre = inner(model, x, act)
    slopes, pre_slopes = jax.jacobian(lambda x: inner(model, x, act))(x)
    slopes = slopes.reshape(-1, n)
    shifts = [jnp.zeros_like(z) for z in pre]
    after = jax.grad(lambda shifts: losses.log_odds(inner(model, x, act, shifts)[0], LABEL))(shifts)
    softmax = slopes.T @ jax.hessian(losses.log_odds)(logits, LABEL) @ slopes
    layers = [
        rows.reshape(-1, n).T @ ((s * curvature(z)).reshape(-1, 1) * rows.reshape(-1, n))
        for s, z, rows in zip(after, pre, pre_slopes, strict=True)
    ]
    return jax.hessian(partial(log_odds_of, model, act))(x).reshape(n, n), softmax, layers


@pytest.mark.parametrize("name", CURVED)
def test_formal_hessian_is_symmetric_and_the_sum_over_neurons(network, name):
    model, x, _ = network
    formal, softmax, layers = jax.jit(lambda x: hessians(model, x, *CURVED[name]))(x)
    np.testing.assert_allclose(formal, formal.T, atol=1e-12 * jnp.abs(formal).max())
    np.testing.assert_allclose(
        formal, sum(layers, softmax), rtol=1e-9, atol=1e-9 * jnp.abs(formal).max()
    )
    # the network term is not lost beside the other, in either layer; ReLU itself has none
    for layer in layers:
        assert (jnp.abs(layer).max() > 0.1 * jnp.abs(softmax).max()) == (name != "relu")


def differences(network, act, slope):
    """Value, gradient and formal Hessian along v, and central differences of the first two.

    With ReLU kinks the step must cross none: no pre-activation changes its sign.
    """
    model, x, v = network
    f = partial(log_odds_of, model, act)
    step = 1e-6
    pre = jax.jit(lambda x: inner(model, x, act)[1])
    for ends in zip(pre(x - step * v), pre(x + step * v), strict=True):
        assert (jnp.sign(ends[0]) == jnp.sign(ends[1])).all()
    gradient = jax.jit(jax.grad(f))
    curved = jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (jnp.asarray(v),))[1])(x)
    return (
        jnp.vdot(gradient(x), v),
        slope(jax.jit(f), x, v, step),
        curved,
        slope(gradient, x, v, step),
    )


def close(one, other):
    return np.abs(one - other).max() <= 1e-6 * np.abs(other).max()  # differences at a step of 1e-6


def test_softplus_has_the_derivatives_that_it_claims(network, slope):
    first, by_value, second, by_gradient = differences(network, softplus(5.0), slope)
    assert close(first, by_value) and close(second, by_gradient)


@pytest.mark.slow
def test_curved_relu_has_the_true_gradient_and_an_invented_hessian(network, slope):
    first, by_value, second, by_gradient = differences(network, CURVED["relu_curved"][0], slope)
    true, _, true_second, _ = differences(network, relu, slope)
    assert first == true and close(first, by_value)
    # what the differences of the true gradient see is the softmax term
    assert close(true_second, by_gradient) and not close(second, by_gradient)


def test_h_has_an_invented_gradient_with_its_true_slope(network, slope):
    """In one layer under a linear score, where what is invented meets nothing else."""
    model, x, v = network
    one = dataclasses.replace(model, kernels=model.kernels[:1], weights=model.weights[:8])
    act = CURVED["relu_h"][0]

    def score(x):
        return logits_of(one, x, act)[LABEL]

    z = jax.jit(lambda x: inner(one, x, act, (0,))[1][0])
    assert (jnp.sign(z(x - 1e-6 * v)) == jnp.sign(z(x + 1e-6 * v))).all()
    gradient = jax.jit(jax.grad(score))
    second = jax.jit(lambda x: jax.jvp(jax.grad(score), (x,), (jnp.asarray(v),))[1])(x)
    assert close(second, slope(gradient, x, v, 1e-6))
    assert not close(jnp.vdot(gradient(x), v), slope(jax.jit(score), x, v, 1e-6))


@pytest.mark.slow
def test_hessian_of_the_joint_loss_is_symmetric_on_a_network_with_relus(network, interpreter):
    """Third derivatives of the network, for GRAD; the kernels' own slopes enter."""
    model, x, _ = network

    def formal(x, tau):
        return jax.hessian(partial(surrogate_loss, interpreter, model, tau=tau))(x).reshape(192, -1)

    formal = jax.jit(formal)
    hessian, wider = formal(x, 0.01), formal(x, 0.1)
    largest = jnp.abs(hessian).max()
    assert largest > 1e-3
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-10 * largest)
    assert (jnp.abs(wider - hessian).max() > 0.01 * largest) == ("act" in interpreter.needs)


@pytest.mark.parametrize(
    ("factory", "act"), [(grad_interpreter, relu_curved), (smooth_relu_grad_interpreter, relu_h)]
)
def test_tau_is_the_width_of_the_activation(small, photos, factory, act):
    def through_surrogate(x, tau):
        return losses.map_l2(
            factory().surrogate(small, x, LABEL, Context(tau)).map, jnp.ones((16, 16))
        )

    def through_activation(x, tau):
        m = interpreters.grad(small, x, LABEL, act=lambda z: act(z, tau))
        return losses.map_l2(m, jnp.ones((16, 16)))

    @jax.jit
    def gradients(tau):
        return jax.grad(through_surrogate)(photos[0], tau), jax.grad(through_activation)(
            photos[0], tau
        )

    (wide, _), (narrow, expected) = gradients(1e-2), gradients(1e-4)
    np.testing.assert_allclose(narrow, expected, rtol=1e-4, atol=1e-5 * jnp.abs(expected).max())
    assert jnp.abs(wide - narrow).max() > 0.1 * jnp.abs(narrow).max()


def test_own_activation_of_the_smooth_surrogate(small, photos):
    @jax.jit
    def maps(image):
        through_surrogate = (
            smooth_relu_grad_interpreter(act=relu_sigmoid())
            .surrogate(small, image, LABEL, Context(TAU))
            .map
        )
        return (
            through_surrogate,
            interpreters.grad(small, image, LABEL, act=relu_sigmoid()),
            interpreters.grad(small, image, LABEL),
        )

    through_surrogate, expected, plain = maps(photos[0])
    np.testing.assert_allclose(through_surrogate, expected, atol=1e-6)
    assert jnp.abs(through_surrogate - plain).max() > 0.1


def test_constant_map_is_zeros(linear, pixels):
    same_everywhere = dataclasses.replace(
        linear, mix=jnp.broadcast_to(linear.mix[:1, :1], linear.mix.shape)
    )
    np.testing.assert_array_equal(
        interpreters.grad(same_everywhere, pixels, LABEL), np.zeros((4, 4))
    )
    flat = jnp.broadcast_to(pixels[:1, :1], pixels.shape)
    for interpreter in (interpreters.cam, interpreters.grad_cam):
        np.testing.assert_array_equal(interpreter(same_everywhere, flat, LABEL), np.zeros((4, 4)))


@pytest.mark.parametrize("factory", [grad_interpreter, smooth_relu_grad_interpreter])
def test_pool_serves_both_faces(linear, pixels, factory):
    interpreter = factory(pool=2)
    assert interpreter.explain(linear, pixels, LABEL).shape == (2, 2)
    assert interpreter.surrogate(linear, pixels, LABEL, Context(TAU)).map.shape == (2, 2)
    np.testing.assert_array_equal(
        interpreter.explain(linear, pixels, LABEL), interpreters.grad(linear, pixels, LABEL, pool=2)
    )


@pytest.mark.parametrize("factory", EVERY.values())
def test_equal_options_give_the_same_object(factory):
    assert factory() is factory()


@pytest.mark.parametrize("factory", [grad_interpreter, smooth_relu_grad_interpreter])
def test_an_option_spelt_out_is_the_same_object(factory):
    assert factory(pool=2) is factory(pool=2)
    assert factory() is factory(pool=None)


def test_names_are_keys():
    assert all(factory().name == name for name, factory in INTERPRETERS.items())


@pytest.mark.parametrize("pool", [0, 3])
def test_pool_that_does_not_fit_is_named(linear, pixels, pool):
    with pytest.raises(ValueError, match=rf"^pool = {pool} must .* 4 x 4$"):
        interpreters.grad(linear, pixels, LABEL, pool=pool)


MAKERS = {"from_explain", "joint"}
FUNCTIONS = [
    name
    for name in interpreters.__all__
    if name.islower() and not name.endswith("_interpreter") and name not in MAKERS
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_model_image_label_and_options_by_name(name):
    parameters = list(inspect.signature(getattr(interpreters, name)).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == [
        "masker" if name == "rts" else "model",
        "image",
        "label",
    ]
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters[:3])
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in parameters[3:])
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[3:])
