"""LRP: the score of a class, handed down layer by layer to the pixels (Bach et al. 2015).

A layer z_j = Σ_i a_i w_ij + b_j hands its relevance R_j on by the γ rule (Montavon et al. 2019,
§10.2), R_i = Σ_j a_i (w_ij + γ w_ij⁺) / (z_j + γ z_j⁺ + ε) R_j, where z_j⁺ = Σ_i a_i w_ij⁺; a bias
has no γ. With R = a ∂s/∂a this is the chain rule of another network: z + γ z⁺ enters its ReLUs, and
they multiply it by constants q = [z > 0] z / (z + γ z⁺ + ε). What lies between two ReLUs, such as a
convolution and its BatchNorm, or the sum of both branches of a residual block, is one such layer.

So no layer is named: the program of any network is run with three numbers in place of each: z, z⁺
and the bias.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax.activations import relu
from adv2_jax.capabilities import Architecture, architecture, count_relus, logits_of
from adv2_jax.cost import is_literal
from adv2_jax.interpreters.base import Context, Interpreter, Seen, interpreter_factory
from adv2_jax.interpreters.gradients import attribution_map
from adv2_jax.losses import logit
from adv2_jax.options import bind
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Classifier, Image, Label, Logits, Map, Score

# primitives whose outputs are sums or copies of entries of their inputs
SUMS = frozenset(
    "add add_any broadcast_in_dim concatenate convert_element_type copy expand_dims neg pad "  # noqa: SIM905
    "reduce_sum reduce_window_sum reshape rev slice squeeze sub transpose".split()
)
# of z - y the positive terms are those of z, and the negative ones of y
SIGNS = {"sub": (1, -1), "neg": (-1,)}
PRODUCTS = frozenset(("conv_general_dilated", "dot_general", "mul"))
CALLS = frozenset(
    "checkpoint closed_call custom_jvp_call custom_vjp_call jit pjit remat remat2".split()  # noqa: SIM905
)


class Parts(NamedTuple):
    """A value of the program that depends on the image.

    Attributes:
        total: z, any shape.
        positive: z⁺, the sum of the positive terms of z; None where there is nothing else.
        bias: the part of z that is no term but a constant; None for 0.
    """

    total: Array
    positive: Array | None = None
    bias: Array | None = None

    def terms(self, sign: int) -> Array:
        """Return the sum of the terms of a sign, 1 or -1; the bias for 0."""
        zeros = jnp.zeros_like(self.total)
        if sign == 0:
            return zeros if self.bias is None else self.bias
        if self.positive is None:
            return self.total if sign > 0 else zeros
        return self.positive if sign > 0 else self.total - self.positive - self.terms(0)


Rectify = Callable[[Parts], Parts]


def _run(program: Any, constants: Sequence[Any], values: Sequence[Any], rectify: Rectify) -> Any:
    """Run a jaxpr with `Parts` for what depends on the image, and `rectify` for its ReLUs."""
    known = dict(zip([*program.constvars, *program.invars], [*constants, *values], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if is_literal(variable) else known[variable]

    for equation in program.eqns:
        results = _run_equation(equation, [read(v) for v in equation.invars], rectify)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in program.outvars]


def _run_equation(equation: Any, values: list[Any], rectify: Rectify) -> list[Any]:
    primitive, name = equation.primitive, equation.primitive.name
    if name in CALLS:
        inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values, rectify)

    def apply(*arrays: Any) -> list[Any]:
        results = primitive.bind(*arrays, **equation.params)
        return results if primitive.multiple_results else [results]

    moving = [i for i, value in enumerate(values) if isinstance(value, Parts)]
    if not moving:
        return apply(*values)
    if name == "max" and len(moving) == 1 and _is_zero(values[1 - moving[0]]):
        return [rectify(values[moving[0]])]
    total, *more = apply(*(v.total if isinstance(v, Parts) else v for v in values))
    if name in SUMS:
        parts = [_parts(value) for value in values]
        # what pads is no bias
        inside = parts[:1] if name == "pad" else parts
        if name not in SIGNS and all(one.positive is None for one in inside):
            return [Parts(total)]
        signs = SIGNS.get(name, (1,) * len(parts))
        positive = apply(*(one.terms(sign) for one, sign in zip(parts, signs, strict=True)))
        if all(one.bias is None for one in inside):
            return [Parts(total, *positive)]
        return [Parts(total, *positive, *apply(*(one.terms(0) for one in parts)))]
    if name in PRODUCTS and len(moving) == 1:
        return [Parts(total, *_product(lambda *both: apply(*both)[0], values, moving[0]))]
    if name == "div" and moving == [0]:
        return [Parts(total, *_product(jnp.multiply, [values[0], 1 / values[1]], 0))]
    # no sum of terms, as a maximum or a product of two such values: now itself a term
    return [Parts(one, jnp.maximum(one, 0)) for one in (total, *more)]


def _product(
    multiply: Callable[..., Array], values: list[Any], at: int
) -> tuple[Array, Array | None]:
    """Return z⁺ and the bias of a product: terms of either sign meet the weights of that sign."""
    moving, weights = values[at], values[1 - at]

    def product(part: Array, factor: Any) -> Array:
        return multiply(part, factor) if at == 0 else multiply(factor, part)

    positive = product(moving.terms(1), jnp.maximum(weights, 0))
    if moving.positive is not None:
        positive += product(moving.terms(-1), jnp.minimum(weights, 0))
    return positive, None if moving.bias is None else product(moving.bias, weights)


def _parts(value: Any) -> Parts:
    """Return the parts of a value; a constant is a bias, and no term."""
    return value if isinstance(value, Parts) else Parts(value, jnp.zeros_like(value), value)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Parts | Array) and np.ndim(value) == 0 and value == 0


def relevance(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    gamma: float = 0.25,
    epsilon: float = 1e-6,
    score: Score = logit,
) -> tuple[Array, Logits]:
    """Return the relevance of each pixel and colour by LRP, and the logits.

    Up to ε it is conserved: its sum and that of the biases (R = b ∂s/∂b) make up the score. Pixels
    count from black: a black one has none, and the normalisation of the network is a bias. The last
    linear layer has no ReLU behind it, and γ = 0. Of a maximum over a window the largest inherits
    all. Other functions (GELU, softmax, products) hand relevance on as a gradient does.

    Args:
        model: a classifier with ReLUs; `act` is not needed.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        gamma: γ, 0 or more: how much positive terms are preferred. With γ and ε at 0 the relevance
            is image times gradient.
        epsilon: ε as a share of the root mean square of z over its layer; it takes relevance from
            neurons that hardly fire. An absolute ε would mean another thing in each layer.
        score: (logits, label) -> []; the literature explains the logit.

    Returns:
        relevance [H, W, 3] with its signs, logits [K].
    """
    program = jax.make_jaxpr(lambda x: logits_of(model, x))(image)
    factors: list[Array] = []

    def measure(z: Parts) -> Parts:
        total, positive = at_least_float32(z.total), at_least_float32(z.terms(1))
        fires = total > 0
        entering = total + gamma * positive + epsilon * jnp.sqrt((total**2).mean())
        # the safe denominator of a neuron that does not fire keeps 0/0 out of derivatives
        factor = jnp.where(fires, total / jnp.where(fires, entering, 1), 0)
        factors.append(factor.astype(z.total.dtype))
        return Parts(relu(z.total))

    (seen,) = _run(program.jaxpr, program.consts, [Parts(image)], measure)

    def handed_on(x: Image) -> Array:
        rest = iter(factors)
        weigh = lambda z: Parts(next(rest) * (z.total + gamma * z.terms(1)))  # noqa: E731
        (logits,) = _run(program.jaxpr, program.consts, [Parts(x)], weigh)
        return score(logits.total, label)

    return image * jax.grad(handed_on)(image), seen.total


def lrp(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    gamma: float = 0.25,
    epsilon: float = 1e-6,
    pool: int | None = None,
    score: Score = logit,
) -> Map:
    """Return the map of LRP, the absolute values of `relevance`; arguments and errors as there.

    Returns:
        [H/pool, W/pool] in [0, 1], scaled as that of `grad`.
    """
    return _surrogate(model, image, label, gamma=gamma, epsilon=epsilon, pool=pool, score=score).map


def _surrogate(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context | None = None,
    *,
    gamma: float,
    epsilon: float,
    pool: int | None,
    score: Score,
) -> Seen:
    values, logits = relevance(model, image, label, gamma=gamma, epsilon=epsilon, score=score)
    return Seen(logits, attribution_map(values, pool))


@interpreter_factory
def lrp_interpreter(
    *,
    gamma: float = 0.25,
    epsilon: float = 1e-6,
    pool: int | None = None,
    score: Score = logit,
) -> Interpreter:
    """LRP; analyst and adversary use the same function.

    No second derivative has to be invented: the factor z / (z + γ z⁺ + ε) rises from 0 at the kink,
    where that of GRAD jumps. At γ = 0 it rises within ε: it is the jump, unless ε is about .1.

    Args:
        gamma, epsilon, pool, score: as in `lrp`.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is negative.
    """
    for name, value in (("gamma", gamma), ("epsilon", epsilon)):
        if not value >= 0:
            raise ValueError(f"{name} = {value} must be 0 or more")
    options = {"gamma": gamma, "epsilon": epsilon, "pool": pool, "score": score}
    return Interpreter("lrp", bind(lrp, **options), bind(_surrogate, **options), check=check_relus)


def check_relus(model: Classifier, shape: tuple[int, ...]) -> None:
    """Refuse a network without ReLUs: its LRP by these rules is image times gradient.

    Raises:
        ValueError: recommends `gradient_rollout`.
    """
    if not _number_of_relus(architecture(model), tuple(shape)):
        raise ValueError(
            f"lrp needs a network with ReLUs: {type(model).__name__} has none; "
            "gradient_rollout explains transformers"
        )


@lru_cache(maxsize=64)  # every batch asks, and a trace of a large network takes seconds
def _number_of_relus(known: Architecture, shape: tuple[int, ...]) -> int:
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return count_relus(jax.make_jaxpr(logits_of)(known.model(), image), shape)
