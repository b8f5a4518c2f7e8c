"""Maps from one gradient of a class score in the image: GRAD (ADV² eq. 5) and its relatives.

An attribution [H, W, 3] becomes a map as the gradient of GRAD does: the largest absolute value over
colours, pooled and scaled to [0, 1] (`attribution_map`). The gradient of the map is a second
derivative of the network, and that of a ReLU network is zero almost everywhere. An attack therefore
replaces a derivative of ReLU (see `activations`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from adv2_jax import maps
from adv2_jax.activations import relu_curved, relu_guided, relu_h, squared_width
from adv2_jax.capabilities import logits_of, pre_activations
from adv2_jax.interpreters.base import Context, Interpreter, Seen, interpreter_factory
from adv2_jax.losses import log_odds
from adv2_jax.options import bind
from adv2_jax.precision import at_least_float32
from adv2_jax.types import Activation, Classifier, Image, Label, Logits, Map, Score

# of matched widths, found by search (docs/method.md, GRAD)
DECAY = 0.95  # of the sum of past movements, in a step: it looks back about 20 steps
NEURON, LAYER = 0.7, 0.7  # factors of the movement of the neuron, and of its layer

COLOURS, PIXELS = 2, 8  # powers of `maps.spread_max`

# (model, image, label, *, act) -> attribution [H, W, 3], logits [K]
Attribution = Callable[..., tuple[Array, Logits]]


def input_gradient(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    score: Score = log_odds,
) -> tuple[Array, Logits]:
    """Return the gradient of a class score in the image, and the logits of the same pass.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        act: replaces every ReLU, in this pass and in every derivative of it; None keeps ReLU.
        score: (logits, label) -> [], one of `log_odds`, `logit`, `probability` or your own.

    Returns:
        gradient [H, W, 3] per unit of pixel value, logits [K].
    """

    def class_score(x: Image) -> tuple[Array, Logits]:
        logits = logits_of(model, x, act)
        return score(logits, label), logits

    return jax.grad(class_score, has_aux=True)(image)


def attribution_map(attribution: Array, pool: int | None, spread: bool = False) -> Map:
    """Return the map of an attribution: [H, W, 3] of any range -> [H/pool, W/pool] in [0, 1].

    Args:
        attribution: its largest absolute value over colours is taken, as for GRAD (Simonyan et al.
            2014).
        pool: side of the mean-pooling blocks, as in `grad`.
        spread: share the derivatives of both maxima (`maps.spread_max`).
    """
    colours, pixels = (COLOURS, PIXELS) if spread else (None, None)
    return maps.min_max(maps.pool(maps.channel_max(attribution, colours), pool), pixels)


def grad(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    pool: int | None = None,
    score: Score = log_odds,
) -> Map:
    """Return the GRAD map, |∂f_c/∂x| reduced over colours and scaled to [0, 1] (ADV² eq. 5).

    The score differentiated is the log-odds u_c. Since ∂f_c/∂x = f_c (1 - f_c) ∂u_c/∂x, the min-max
    map, and the gradient of any loss on it, are the same functions of the image as with f_c itself.
    But f_c rounds to exactly 1 in float32 for confident networks; its gradient is then rounding
    noise, while that of u_c stays exact to 1e-6. `score=probability` is the formula of the paper,
    for studies of its Hessian.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        act: replaces every ReLU; None explains the network as it is, `relu_curved` and `relu_h`
            give the map a useful second derivative.
        pool: side of the mean-pooling blocks; None is 4 at 224², as in the paper, and 1 below 112²
            (`maps.usual_pool`).
        score: (logits, label) -> [].

    Returns:
        [H/pool, W/pool] in [0, 1].

    Raises:
        ValueError: if `pool` does not divide the image sides.
    """
    return attribution_map(input_gradient(model, image, label, act=act, score=score)[0], pool)


@interpreter_factory
def grad_interpreter(
    *, pool: int | None = None, tau: str | None = None, spread: bool = False
) -> Interpreter:
    """GRAD, attacked through the true map with an invented second derivative (`relu_curved`).

    The surrogate is faithful; its kernels have the width `Context.tau`, or a matched one.

    Args:
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112²
            (`maps.usual_pool`).
        tau: None for `Context.tau`. "matched" computes the width of each kernel from how far the
            attack moves its neuron (as `curvature.matched_width`), and has no schedule to tune. It
            costs no pass over the network, and one float32 for each neuron and image of memory.
        spread: share the derivatives of the two maxima of the map, over colours and over pixels,
            among the values near them (`maps.spread_max`); its values stay exact.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: for another tau.
    """
    if tau not in (None, "matched"):
        raise ValueError(f"tau {tau!r} is neither None, for a schedule, nor 'matched'")
    surrogate = curved_attribution if tau is None else _matched_grad
    return Interpreter(
        "grad",
        bind(grad, pool=pool),
        bind(surrogate, pool=pool, spread=spread),
        init=None if tau is None else _no_movement,
        needs=("act",),
    )


def curved_attribution(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    attribution: Attribution = input_gradient,
    pool: int | None,
    spread: bool = False,
) -> Seen:
    """Surrogate of a map from one gradient: the true map, with a second derivative invented.

    The gradient of any function of map and logits costs about four forward passes.
    """
    act = lambda z: relu_curved(z, context.tau)  # noqa: E731
    # One pass for both. As two terms ℓ_prd and the map would each linearise the network; on
    # a ResNet-50 one joint step then takes 1.3 to 1.5 times as long. The logits are the true ones:
    # `relu_curved` has the values and first derivatives of ReLU.
    values, logits = attribution(model, image, label, act=act)
    return Seen(logits, attribution_map(values, pool, spread))


def _no_movement(model: Classifier, image: Image) -> list[Array]:
    """Return the running means of the pre-activations before the first step: zeros."""
    # not those of the image: the first widths are then as large as the pre-activations, and the
    # attack begins with the curvature of all neurons
    entering = jax.eval_shape(pre_activations, model, image)
    return [jnp.zeros(z.shape, jnp.promote_types(z.dtype, jnp.float32)) for z in entering]


def _matched_grad(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    pool: int | None,
    spread: bool,
) -> Seen:
    """GRAD with kernels as wide as the distance of each pre-activation from its running mean.

    With r_k = β r_{k-1} + (1 - β) z_k, the distance z_k - r_{k-1} is Σ_j β^j (z_{k-j} - z_{k-j-1}),
    the decayed sum of all movements: one number to remember, not two.
    """
    if context.memory is None:
        # outside of an attack nothing moves, as in `curvature.map_jacobian`
        return curved_attribution(model, image, label, context, pool=pool, spread=spread)

    def class_score(x: Image) -> tuple[Array, tuple[Logits, list[Array]]]:
        means, after = iter(context.memory), []

        def act(z: Array) -> Array:
            mean = next(means)
            moved = jax.lax.stop_gradient(at_least_float32(z)) - mean
            after.append(mean + (1 - DECAY) * moved)
            return relu_curved(z, squared_width(moved, neuron=NEURON, layer=LAYER))

        logits = logits_of(model, x, act)
        return log_odds(logits, label), (logits, after)

    gradient, (logits, memory) = jax.grad(class_score, has_aux=True)(image)
    return Seen(
        logits, attribution_map(gradient, pool, spread), memory=jax.lax.stop_gradient(memory)
    )


@interpreter_factory
def smooth_relu_grad_interpreter(
    *, act: Activation | None = None, pool: int | None = None
) -> Interpreter:
    """GRAD, attacked through a map with a smoothed *first* derivative, as in the paper (§3.2).

    The smoothed activation is used for the map term only; the logits are those of the true ReLU.

    Args:
        act: the activation, such as `relu_sigmoid(beta)`; None is `relu_h` of width `Context.tau`.
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112²
            (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter(
        "grad",
        bind(grad, pool=pool),
        bind(_apart_from_logits, of_width=relu_h, act=act, pool=pool),
        faithful=False,
        needs=("act",),
    )


def _apart_from_logits(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    of_width: Callable[[Array, Array], Array],
    act: Activation | None = None,
    pool: int | None,
) -> Seen:
    """Surrogate of GRAD with an activation, `of_width` τ unless given, that the logits do not have."""
    used = (lambda z: of_width(z, context.tau)) if act is None else act
    # Two linearisations, since the backward passes differ: that of the logits must be exact. The
    # forward passes are equal and XLA merges them, so 3 units of work cost 2.5.
    return Seen(logits_of(model, image), grad(model, image, label, act=used, pool=pool))


def times_input(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    score: Score = log_odds,
) -> tuple[Array, Logits]:
    """Return image times gradient, [H, W, 3], and the logits; arguments as `input_gradient`."""
    gradient, logits = input_gradient(model, image, label, act=act, score=score)
    return image * gradient, logits


def input_x_gradient(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    pool: int | None = None,
    score: Score = log_odds,
) -> Map:
    """Return the map of input times gradient, |x ∂u_c/∂x| (Shrikumar et al. 2016).

    Arguments and scaling as for `grad`; the log-odds u_c give the map of the probability here too.

    Returns:
        [H/pool, W/pool] in [0, 1].
    """
    return attribution_map(times_input(model, image, label, act=act, score=score)[0], pool)


@interpreter_factory
def input_x_gradient_interpreter(*, pool: int | None = None) -> Interpreter:
    """Input times gradient, attacked as GRAD is; the surrogate is faithful.

    Args:
        pool: as in `input_x_gradient`.

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter(
        "input_x_gradient",
        bind(input_x_gradient, pool=pool),
        bind(curved_attribution, attribution=times_input, pool=pool),
        needs=("act",),
    )


def guided_backprop(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation = relu_guided,
    pool: int | None = None,
    score: Score = log_odds,
) -> Map:
    """Return the map of guided back-propagation (Springenberg et al. 2015).

    It is GRAD, but each ReLU passes a gradient g only where z > 0 and g > 0 (`relu_guided`). The
    rule commutes with positive factors, so the log-odds give the map of the probability; that of
    `score=logit` is another.

    Args:
        model: the classifier. ReLUs that `act` does not reach stay as they are.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        act: the guided ReLU; `relu_guided` of another width has the same values.
        pool: as in `grad`.
        score: (logits, label) -> [].

    Returns:
        [H/pool, W/pool] in [0, 1].
    """
    return grad(model, image, label, act=act, pool=pool, score=score)


@interpreter_factory
def guided_backprop_interpreter(*, pool: int | None = None) -> Interpreter:
    """Guided back-propagation, attacked through the true map; its slope in z is invented.

    Args:
        pool: as in `guided_backprop`.

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter(
        "guided_backprop",
        bind(guided_backprop, pool=pool),
        bind(_apart_from_logits, of_width=relu_guided, pool=pool),
        needs=("act",),
    )
