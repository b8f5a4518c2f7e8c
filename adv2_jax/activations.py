"""Activations whose backward pass is smooth, so that the gradient of a gradient exists.

`relu_h`, `relu_curved` and `relu_sigmoid` are exactly ReLU in the forward pass; only a derivative
is replaced (ADV² §3.2, Fig. 3). The replacement is a JVP rule, `tangent = phi'(z) * dz`, and is
itself differentiated like any other function, so forward mode, reverse mode and any order of mixing
them agree. `softplus` is a smooth activation in the forward pass too. All factors are computed in
float32 or wider, since z² overflows float16 at 256, and take the type of z afterwards, which a JVP
rule must keep.

Factories are cached: the same options give the same function object, so `jit` sees a static
argument it already knows.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import relu

from adv2_jax.options import bind, shared
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Activation

__all__ = ["TAU", "relu", "relu_curved", "relu_h", "relu_sigmoid", "softplus"]

TAU = 1e-4


@jax.custom_jvp
def relu_h(z: Array, tau: Array | float = TAU) -> Array:
    """ReLU whose derivative is h(z) = z / sqrt(z² + tau) + [z < 0] (ADV² §3.2).

    Left of zero h is the derivative of z + sqrt(z² + tau), right of zero that of sqrt(z² + tau). It
    jumps at 0 (1 on the left, 0 on the right) and h'(z) = tau (z² + tau)^(-3/2) on both sides; at 0
    the right branch is taken.

    Args:
        z: pre-activations, any shape.
        tau: squared width of the transition, > 0 (the paper uses 1e-4); may be traced.

    Returns:
        max(z, 0), same shape.
    """
    return jnp.maximum(z, 0)


@relu_h.defjvp
def _relu_h_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # tau is an option: nothing is differentiated with respect to it
    (z, tau), (dz, _) = (primals, tangents)
    wide = at_least_float32(z)
    return relu_h(z, tau), (wide * jax.lax.rsqrt(wide**2 + tau) + (z < 0)).astype(
        jnp.result_type(z)
    ) * dz


@shared
def relu_sigmoid(beta: float = 1.0) -> Activation:
    """ReLU whose derivative is the logistic sigmoid(beta z); beta = 1 is the sigma of ADV² Fig. 3.

    Args:
        beta: slope, > 0; the derivative tends to the step function as beta grows.

    Returns:
        An activation, any shape to the same shape; equal options give the same object.
    """

    return bind(_relu_sigmoid, beta=beta)


def _relu_sigmoid(z: Array, *, beta: float) -> Array:
    return _relu_with_sigmoid(z, beta)


@jax.custom_jvp
def _relu_with_sigmoid(z: Array, beta: Array) -> Array:
    return jnp.maximum(z, 0)


@_relu_with_sigmoid.defjvp
def _relu_with_sigmoid_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (z, beta), (dz, _) = primals, tangents
    return _relu_with_sigmoid(z, beta), jax.nn.sigmoid(beta * at_least_float32(z)).astype(
        jnp.result_type(z)
    ) * dz


@jax.custom_jvp
def relu_curved(z: Array, tau: Array | float = 3e-3) -> Array:
    """ReLU with its exact derivative 1[z > 0], whose *second* derivative is tau / 2 (z² +
    tau)^(-3/2) in place of zero.

    The kernel is h' of `relu_h` at unit mass. A gradient map drawn with it is the true map to the
    last digit, and so is every first derivative; only the curvature that an attack on the map
    descends is made up (the surrogate gradients of spiking networks, Neftci et al. 2019). An attack
    thus has no gap between the map it optimises and the map the analyst sees.

    Args:
        z: pre-activations, any shape.
        tau: squared width of the kernel, > 0; may be traced, so that a schedule can narrow it.

    Returns:
        max(z, 0), same shape.
    """
    return jnp.maximum(z, 0)


@relu_curved.defjvp
def _relu_curved_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (z, tau), (dz, _) = primals, tangents
    return relu_curved(z, tau), _step(z, tau) * dz


@jax.custom_jvp
def _step(z: Array, tau: Array) -> Array:
    return jnp.heaviside(z, 0.0)


@_step.defjvp
def _step_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (z, tau), (dz, _) = primals, tangents
    return _step(z, tau), (0.5 * tau * jax.lax.rsqrt(at_least_float32(z) ** 2 + tau) ** 3).astype(
        jnp.result_type(z)
    ) * dz


@shared
def softplus(beta: float = 1.0) -> Activation:
    """log(1 + exp(beta z)) / beta, a smooth activation in the forward pass too (Dombrowski et al.,
    NeurIPS 2019).

    Args:
        beta: slope, > 0; tends to ReLU as beta grows.

    Returns:
        An activation, any shape to the same shape; equal options give the same object.
    """

    return bind(_softplus, beta=beta)


def _softplus(z: Array, *, beta: float) -> Array:
    return (jax.nn.softplus(beta * at_least_float32(z)) / beta).astype(jnp.result_type(z))
