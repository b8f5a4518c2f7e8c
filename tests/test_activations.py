"""Each activation against closed forms in float64, to the third derivative and in every order of forward and reverse mode."""

import itertools
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import activations
from adv2_jax.activations import relu, relu_curved, relu_h, relu_sigmoid, softplus

# Points on both sides of zero, inside and outside every transition; zero itself is tested on its own.
Z = np.array([-3.0, -0.4, -0.03, -0.01, -1e-3, -1e-5, 1e-5, 1e-3, 0.01, 0.03, 0.4, 3.0])


def ramp(z):
    return np.maximum(z, 0)


def kernel(z, tau):
    """Derivative of z / sqrt(z² + tau)."""
    return tau * (z**2 + tau) ** -1.5


def kernel_slope(z, tau):
    return -3 * tau * z * (z**2 + tau) ** -2.5


def logistic(z):
    return 1 / (1 + np.exp(-z))


def logistic_slope(z):
    return logistic(z) * (1 - logistic(z))


def h_closed(tau):
    left_and_right = [lambda z: 1 + z / np.sqrt(z**2 + tau), lambda z: z / np.sqrt(z**2 + tau)]
    return ramp, lambda z: np.piecewise(z, [z < 0, z >= 0], left_and_right), *kernels(tau)


def kernels(tau, mass=1.0):
    return lambda z: mass * kernel(z, tau), lambda z: mass * kernel_slope(z, tau)


def sigmoid_closed(beta, value=ramp):
    def third(z):
        return beta**2 * logistic_slope(beta * z) * (1 - 2 * logistic(beta * z))

    return value, lambda z: logistic(beta * z), lambda z: beta * logistic_slope(beta * z), third


# name: (activation, (value, first, second, third derivative))
CASES = {
    "h": (relu_h, h_closed(1e-4)),
    "wide h": (partial(relu_h, tau=0.01), h_closed(0.01)),
    "sigmoid": (relu_sigmoid(), sigmoid_closed(1.0)),
    "steep sigmoid": (relu_sigmoid(10.0), sigmoid_closed(10.0)),
    "curved": (
        partial(relu_curved, tau=3e-3),
        (ramp, lambda z: (z > 0) * 1.0, *kernels(3e-3, 0.5)),
    ),
    "narrow curved": (
        partial(relu_curved, tau=1e-4),
        (ramp, lambda z: (z > 0) * 1.0, *kernels(1e-4, 0.5)),
    ),
    "softplus": (softplus(), sigmoid_closed(1.0, lambda z: np.log1p(np.exp(z)))),
    "steep softplus": (
        softplus(10.0),
        sigmoid_closed(10.0, lambda z: np.log1p(np.exp(10 * z)) / 10),
    ),
    "relu": (relu, (ramp, lambda z: (z > 0) * 1.0, np.zeros_like, np.zeros_like)),
}
STRAIGHT = [name for name in CASES if "softplus" not in name]


def forward(f):
    return lambda z: jax.jvp(f, (z,), (jnp.ones_like(z),))[1]


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_the_closed_forms_in_every_mode(name, order):
    activation, closed = CASES[name]

    @jax.jit
    def derivatives(z):
        modes = itertools.product((jax.grad, forward), repeat=order)
        return [jax.vmap(reduce(lambda f, mode: mode(f), chain, activation))(z) for chain in modes]

    expected = closed[order](Z)
    for actual in derivatives(jnp.asarray(Z, jnp.float32)):
        # float32: z² + tau is rounded to 6e-8 and raised to -2.5; the scale is that of the largest value
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("name", CASES)
def test_half_precision_keeps_its_type_and_the_derivatives(name, order, dtype):
    """Options are float32 arrays here, as in an attack: they must not widen what they meet. float16 cannot square 300."""
    activation, closed = CASES[name]
    if isinstance(activation, partial):
        activation = partial(
            activation.func,
            **{key: jnp.float32(value) for key, value in activation.keywords.items()},
        )
    z = jnp.asarray([*Z, -300, 300], dtype)
    modes = itertools.product((jax.grad, forward), repeat=order)
    actual = [jax.vmap(reduce(lambda f, mode: mode(f), chain, activation))(z) for chain in modes]
    # where NumPy's exp does not overflow; the same but for the value
    exact = closed[order](np.asarray(z, float).clip(-30, 30))
    exact = np.where(abs(z) > 30, np.maximum(z, 0), exact) if order == 0 else exact
    for values in actual:
        assert values.dtype == dtype
        # a few roundings of the result's type
        np.testing.assert_allclose(
            values.astype(float), exact, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-3
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factory", [relu_sigmoid, softplus])
def test_a_typed_option_widens_nothing(factory, dtype):
    z = jnp.asarray(0.5, jnp.bfloat16)
    assert factory(dtype(1))(z).dtype == jax.grad(factory(dtype(1)))(z).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", STRAIGHT)
def test_forward_pass_is_exactly_relu(name):
    z = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)
    np.testing.assert_array_equal(CASES[name][0](z), np.maximum(z, 0))


def test_h_jumps_at_zero_and_takes_the_right_branch():
    h = jax.vmap(jax.grad(relu_h))(jnp.array([-1e-8, 0.0, 1e-8]))
    np.testing.assert_allclose(h, [1.0, 0.0, 0.0], atol=2e-6)  # h(±1e-8) lies 1e-6 from its limits
    assert h[1] == 0


@pytest.mark.parametrize("outer", [jax.grad, forward])
@pytest.mark.parametrize("inner", [jax.grad, forward])
def test_second_derivative_of_h_at_zero_is_one_over_root_tau(inner, outer):
    assert outer(inner(relu_h))(0.0) == pytest.approx(100.0, rel=1e-5)


@pytest.mark.parametrize("name", ["h", "curved", "relu"])
def test_first_derivative_at_zero_is_zero(name):
    assert jax.grad(CASES[name][0])(jnp.zeros(())) == 0


def test_curved_kernel_has_the_mass_of_the_jump_it_replaces():
    z = np.linspace(-30, 30, 600_001)
    mass = (
        jax.vmap(jax.grad(jax.grad(partial(relu_curved, tau=0.01))))(
            jnp.asarray(z, jnp.float32)
        ).mean()
        * 60
    )
    # the tails beyond ±30 hold 1 - z / sqrt(z² + tau) = 6e-6
    assert mass == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_far_from_zero_everything_is_finite(name):
    f = CASES[name][0]
    for derivative in (f, jax.grad(f), jax.grad(jax.grad(f))):
        assert np.isfinite(jax.vmap(derivative)(jnp.array([-1e4, -50.0, 50.0, 1e4]))).all()


@pytest.mark.parametrize("activation", [relu_h, relu_curved])
def test_tau_may_be_traced_and_the_gradient_ignores_it(activation):
    def slope_at(z, tau):
        return jax.grad(jax.grad(activation))(z, tau)

    z, tau = jnp.array(0.02), jnp.array(0.01)
    np.testing.assert_allclose(jax.jit(slope_at)(z, tau), slope_at(z, 0.01), rtol=1e-6)
    assert jax.grad(activation, argnums=1)(z, tau) == 0


@pytest.mark.parametrize("name", CASES)
def test_plain_numbers_will_do(name):
    assert jax.grad(CASES[name][0])(0.5) == pytest.approx(
        CASES[name][1][1](np.float64(0.5)), rel=1e-5
    )


@pytest.mark.parametrize("factory", [relu_sigmoid, softplus])
def test_equal_options_give_the_same_object(factory):
    assert factory(0.25) is factory(0.25)
    assert factory(0.25) is not factory(0.5)
    assert factory() is factory()


@pytest.mark.parametrize("factory", [relu_sigmoid, softplus])
def test_an_option_spelt_out_is_the_same_object(factory):
    assert factory() is factory(1.0)
    assert factory() is factory(beta=1.0)


def test_all_names_exist():
    assert all(
        callable(getattr(activations, name)) for name in activations.__all__ if name != "TAU"
    )
