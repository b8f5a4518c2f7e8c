"""Activations with a smoothed derivative, for which the gradient of a gradient is useful.

`relu_h`, `relu_curved` and `relu_sigmoid` are exactly ReLU in the forward pass; only a derivative
is replaced (ADV² §3.2, Fig. 3). The replacement is a JVP rule, tangent = φ'(z) dz, which is
differentiated like any other function, so that forward mode, reverse mode and all mixtures of them
agree. `softplus` is smooth in the forward pass too.

Factories are memoised: equal options give the same object, and `jit` does not retrace.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import relu

from adv2_jax.options import bind, shared
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Activation

__all__ = [
    "TAU",
    "relu",
    "relu_boxed",
    "relu_curved",
    "relu_guided",
    "relu_h",
    "relu_sigmoid",
    "softplus",
    "squared_width",
]

TAU = 1e-4  # of the paper

Kernel = Callable[[Array, Array], Array]  # second derivative of an activation, (z, tau) -> [...]

# Two rules for all functions below. Factors are computed in float32 or wider: z² overflows float16
# at 256. Then they are cast to the type of z: a JVP rule must return a tangent of the type of its
# primal, and a float32 `tau` would promote a bfloat16 one.


@jax.custom_jvp
def relu_h(z: Array, tau: Array | float = TAU) -> Array:
    """ReLU whose derivative is h(z) = z / sqrt(z² + tau) + [z < 0] (ADV² §3.2).

    Left of zero h is the derivative of z + sqrt(z² + tau), right of zero that of sqrt(z² + tau). It
    jumps at 0 (1 on the left, 0 on the right), and h'(z) = tau (z² + tau)^(-3/2) on both sides. At
    0 the right branch is taken, so that h(0) = 0 as for ReLU.

    Args:
        z: pre-activations, any shape.
        tau: squared width of the transition, > 0 (the paper uses 1e-4); may be traced.

    Returns:
        max(z, 0), same shape.
    """
    return jnp.maximum(z, 0)


@relu_h.defjvp
def _relu_h_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # tau is an option: its tangent is dropped, so derivatives in it are 0
    (z, tau), (dz, _) = (primals, tangents)
    wide = at_least_float32(z)
    return relu_h(z, tau), (wide * jax.lax.rsqrt(wide**2 + tau) + (z < 0)).astype(
        jnp.result_type(z)
    ) * dz


@shared
def relu_sigmoid(beta: float = 1.0) -> Activation:
    """Return a ReLU whose derivative is sigmoid(beta z); beta = 1 is the σ of ADV² Fig. 3.

    Args:
        beta: slope, > 0; the derivative tends to the step function as beta grows.

    Returns:
        An activation, any shape to the same shape; equal options give the same object.
    """

    return bind(_relu_sigmoid, beta=beta)


def _relu_sigmoid(z: Array, *, beta: float) -> Array:
    return _relu_with_sigmoid(z, beta)


# apart from `_relu_sigmoid`, because a custom JVP wants its options by position, and `bind` by name
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


def relu_curved(z: Array, tau: Array | float = 3e-3) -> Array:
    """ReLU whose *second* derivative is tau / 2 (z² + tau)^(-3/2) in place of zero.

    Its values and first derivatives 1[z > 0] are exact, so a gradient map drawn with it is the true
    map to the last digit. Only the second derivative, which an attack on the map follows, is
    invented (as the surrogate gradients of spiking networks, Neftci et al. 2019): there is no gap
    between the map that is optimised and the map that the analyst sees. The kernel is half of h' of
    `relu_h`, whose mass is 1, that of the jump it replaces.

    Args:
        z: pre-activations, any shape.
        tau: squared width of the kernel, > 0; may be traced, so that a schedule can decrease it.

    Returns:
        max(z, 0), same shape.
    """
    return _relu_with_kernel(_curve, z, tau)


def relu_boxed(z: Array, tau: Array | float = 3e-3) -> Array:
    """ReLU whose *second* derivative is 1 / (2 √tau) where |z| < √tau, in place of zero.

    As `relu_curved`, with another kernel: the mean of the kink over a step that moves z by ±√tau
    (see `curvature.matched_width`).

    Args:
        z: pre-activations, any shape.
        tau: squared half-width of the box, > 0; may be traced.

    Returns:
        max(z, 0), same shape.
    """
    return _relu_with_kernel(_box, z, tau)


@jax.custom_vjp
def relu_guided(z: Array, tau: Array | float = 3e-3) -> Array:
    """ReLU that passes a gradient g back only where z > 0 and g > 0 (Springenberg et al. 2015).

    Not linear in g, the rule is none of forward mode: `jax.jvp` of it fails, that of a gradient
    through it does not. As in `relu_curved` the values of that gradient are exact, and only its
    derivative in z is invented.

    Args:
        z: pre-activations, any shape.
        tau: squared width of that derivative, > 0; may be traced.

    Returns:
        max(z, 0), same shape.
    """
    return jnp.maximum(z, 0)


def _guided_forward(z: Array, tau: Array | float) -> tuple[Array, tuple[Array, Array]]:
    return relu(z), (z, jnp.asarray(tau))


def _guided_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    z, tau = residuals
    return _step(_curve, z, tau) * relu(g), jnp.zeros_like(tau)


relu_guided.defvjp(_guided_forward, _guided_backward)


def squared_width(moved: Array, *, neuron: float, layer: float) -> Array:
    """Return τ_i = (neuron m_i)² + (layer rms(m))² for neurons of a layer that move by m.

    A kernel of this width sees a kink as far off as the neuron moves: any shape to the same shape.
    """
    tau = (neuron * moved) ** 2 + layer**2 * (moved**2).mean()
    # a neuron that does not move has no width, and no curvature; 0 would be 0/0 in the kernel
    return jnp.maximum(tau, jnp.finfo(moved.dtype).tiny ** 0.25)


def _curve(z: Array, tau: Array) -> Array:
    return 0.5 * tau * jax.lax.rsqrt(z**2 + tau) ** 3


def _box(z: Array, tau: Array) -> Array:
    return jnp.where(z**2 < tau, 0.5 / jnp.sqrt(tau), 0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _relu_with_kernel(kernel: Kernel, z: Array, tau: Array | float) -> Array:
    return jnp.maximum(z, 0)


@_relu_with_kernel.defjvp
def _relu_with_kernel_jvp(
    kernel: Kernel, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (z, tau), (dz, _) = primals, tangents
    return _relu_with_kernel(kernel, z, tau), _step(kernel, z, tau) * dz


# a function of its own, so that the derivative of the derivative can be replaced
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(kernel: Kernel, z: Array, tau: Array) -> Array:
    # 0 at z = 0, as JAX's own ReLU
    return jnp.heaviside(z, 0.0)


@_step.defjvp
def _step_jvp(
    kernel: Kernel, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (z, tau), (dz, _) = primals, tangents
    second = kernel(at_least_float32(z), jnp.asarray(tau)).astype(jnp.result_type(z))
    return _step(kernel, z, tau), second * dz


@shared
def softplus(beta: float = 1.0) -> Activation:
    """Return the activation log(1 + exp(beta z)) / beta (Dombrowski et al., NeurIPS 2019).

    It is smooth in the forward pass too: the logits and the map differ from those of the network.

    Args:
        beta: slope, > 0; tends to ReLU as beta grows.

    Returns:
        An activation, any shape to the same shape; equal options give the same object.
    """

    return bind(_softplus, beta=beta)


def _softplus(z: Array, *, beta: float) -> Array:
    return (jax.nn.softplus(beta * at_least_float32(z)) / beta).astype(jnp.result_type(z))
