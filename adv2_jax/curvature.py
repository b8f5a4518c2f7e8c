"""Second derivatives of class scores and maps in the image: the Hessian behaviour of GRAD attacks.

For a score s(x) = S(z(x)) of logits z [K], with J = ∂z/∂x and A = ∇²S in the logits,

    ∇²s = Jᵀ A J + Σ_k (∂S/∂z_k) ∇²z_k        "softmax term" + "network term".

The network term of a ReLU network is zero almost everywhere (ADV² §3.2); with a surrogate
activation it is not. What an attack with steps of size h meets is neither, but the `secant` Hessian
of the true network, kinks included.

Functions are of one image, and compose with `jit` and `vmap`. An `Operator` is linearised once;
then each product is two passes over the network without new activations. All products are taken at
the highest precision. D is the number of values of the image, K of classes. A model with leaves that
are not arrays goes through `capabilities.static_leaves` first.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from adv2_jax.activations import relu_curved, squared_width
from adv2_jax.capabilities import logits_of, pre_activations
from adv2_jax.descent import Driver, MapLoss, by_host
from adv2_jax.interpreters import Context, Interpreter, Surrogate, input_gradient
from adv2_jax.losses import log_odds, map_l2
from adv2_jax.options import bind
from adv2_jax.precision import highest
from adv2_jax.spectra import (
    Density,
    Eigenpairs,
    Estimate,
    Moments,
    Operator,
    along,
    eigenpairs,
    gram,
    moments,
    singular_values,
    spectral_density,
)
from adv2_jax.threats import PIXEL, Params, Threat, linf
from adv2_jax.types import Activation, Classifier, Image, Label, Logits, Map, Score

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "Fidelity",
    "Lipschitz",
    "Matched",
    "Moments",
    "Operator",
    "along",
    "eigenpairs",
    "fidelity",
    "gradient",
    "gram",
    "hessian",
    "hessian_of",
    "lipschitz",
    "map_hessian",
    "map_jacobian",
    "matched_width",
    "moments",
    "network_term",
    "normalised",
    "secant",
    "singular_values",
    "softmax_spectrum",
    "softmax_term",
    "spectral_density",
]

WIDTH = 0.01  # τ of `relu_curved` that agrees best with steps of about a pixel value
CONTEXT = Context(tau=WIDTH)

# one for all ReLUs, or one for each in the order of the network; None keeps ReLU
Activations = Activation | Sequence[Activation] | None
# keeps the memory of the backward passes bounded: 16 images' activations whatever K is (1000 for
# ImageNet)
BLOCK = 16  # gradients of logits computed at a time


@partial(jax.jit, static_argnames="function")
@highest
def hessian_of(function: Callable[..., Array], image: Image, *arguments: Any) -> Operator:
    """Return the Hessian of a function in the image.

    Args:
        function: (image, *arguments) -> []; static under `jit`. Equal functions share one program,
            so make it by `options.bind`, not by a lambda inside a loop.
        image: [H, W, 3].
        arguments: pytrees: the model, a label.

    Returns:
        The operator [H, W, 3] -> [H, W, 3]; a product is forward mode over the reverse mode, which
        was linearised once: about 3.5 forward passes.
    """
    slope = jax.grad(function)
    return _linearised(lambda x: slope(x, *arguments), image)[1]


def _linearised(function: Callable[[Array], Array], x: Array) -> tuple[Array, Operator]:
    """Return the value of a function at x, and its derivative there as a pytree."""
    # jax 0.7 leaves a tracer in the derivative of a function that has none, such as the gradient of
    # a logit of a ReLU network; the added zero makes every function depend on x
    value, linear = jax.linearize(lambda x: function(x) + 0 * x.sum(), x)
    return value, Partial(_apply, linear)


@jax.jit
def _apply(linear: Operator, v: Array) -> Array:
    # jitted, or a product outside a larger program would run operation by operation
    return linear(v)


def hessian(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activations = None,
    score: Score = log_odds,
) -> Operator:
    """Return the Hessian of a class score in the image, ∇²s; see `hessian_of`.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        act: replaces ReLU in all derivatives, such as `Partial(relu_curved, tau=0.01)`, whose width
            may change without a new program; a sequence has one for each ReLU of the network; None
            keeps ReLU, and with it the softmax term alone.
        score: (logits, label) -> []: `losses.log_odds`, `probability`, `logit`, or `cross_entropy`
            for -log f_c.

    Returns:
        The operator [H, W, 3] -> [H, W, 3], in units of the score per squared unit of pixel value.
    """
    return hessian_of(bind(_score, score=score), image, model, label, _as_pytree(act))


def _score(
    image: Image, model: Classifier, label: Label, act: Activations, *, score: Score
) -> Array:
    return score(logits_of(model, image, act), label)


def _as_pytree(act: Activations) -> Any:
    if act is None or isinstance(act, Partial):
        return act
    # a plain function is no pytree, and would have to be static: each new lambda a new program
    return Partial(act) if callable(act) else [_as_pytree(one) for one in act]


def softmax_term(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activations = None,
    score: Score = log_odds,
) -> Operator:
    """Return Jᵀ A J, the part of the Hessian that comes from the score; arguments of `hessian`.

    The whole Hessian of a ReLU network. A product costs a forward-mode and a backward pass.
    """
    return _softmax_term(model, image, label, _as_pytree(act), score=score)


@partial(jax.jit, static_argnames="score")
@highest
def _softmax_term(
    model: Classifier, image: Image, label: Label, act: Activations, *, score: Score
) -> Operator:
    logits, push = _linearised(lambda x: logits_of(model, x, act), image)
    bend = _linearised(jax.grad(lambda z: score(z, label)), logits)[1]
    return Partial(_sandwich, push, bend)


@jax.jit
def _sandwich(push: Operator, bend: Operator, v: Array) -> Array:
    # one linearisation serves both sides: the backward pass is the transpose of the forward one, so
    # the product is symmetric up to rounding
    return jax.linear_transpose(push, v)(bend(push(v)))[0]


def network_term(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activations = None,
    score: Score = log_odds,
) -> Operator:
    """Return Σ_k (∂S/∂z_k) ∇²z_k, the part of the Hessian that comes from the network.

    Arguments of `hessian`; zero without a surrogate `act`. A product costs as much as one of it.
    """
    # ∂S/∂z is held fixed while the logits are differentiated twice: its own slope is
    # `softmax_term`. It needs no `act`, which leaves values as they are
    weights = _score_slope(model, image, label, score=score)
    return hessian_of(_weighted_logits, image, model, weights, _as_pytree(act))


@partial(jax.jit, static_argnames="score")
@highest
def _score_slope(model: Classifier, image: Image, label: Label, *, score: Score) -> Logits:
    """Return ∂S/∂z, [K]."""
    return jax.grad(lambda z: score(z, label))(logits_of(model, image))


def _weighted_logits(image: Image, model: Classifier, weights: Logits, act: Activations) -> Array:
    return logits_of(model, image, act) @ weights


@partial(jax.jit, static_argnames=("score", "k"))
@highest
def softmax_spectrum(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    score: Score = log_odds,
    k: int | None = None,
) -> Eigenpairs:
    """Return the spectrum of the exact Hessian of a ReLU network, without iteration.

    The softmax term Jᵀ A J has rank K - 1 for -log f_c (and is positive semi-definite), K - 2 for
    the log-odds (negative semi-definite), K - 1 for f_c, 0 for a logit. With Jᵀ = Q R its
    eigenvalues are those of R A Rᵀ, [K, K], and all others are 0. Costs K gradients and K images of
    memory.

    Args:
        model, image, label, score: as for `hessian`.
        k: number of pairs, at most min(K, D); None is all of these.
    """
    logits, pull = jax.vjp(lambda x: logits_of(model, x), image)
    rows = jnp.eye(len(logits), dtype=logits.dtype)
    one = lambda row: pull(row)[0].ravel()  # noqa: E731
    # all at a time would hold the activations of K backward passes
    gradients = (
        jax.vmap(one)(rows) if len(rows) <= BLOCK else jax.lax.map(one, rows, batch_size=BLOCK)
    )
    # Q is [D, K]: QR of the slopes, not of JJᵀ, whose condition number is the square
    basis, triangle = jnp.linalg.qr(gradients.T)
    bend = jax.hessian(lambda z: score(z, label))(logits)
    values, vectors = jnp.linalg.eigh(triangle @ bend @ triangle.T)
    order = jnp.argsort(-jnp.abs(values))[:k]
    values = values[order]
    return Eigenpairs(
        values,
        (basis @ vectors[:, order]).T.reshape(-1, *image.shape),
        # exact but for rounding: no residual to report
        jnp.zeros_like(values),
        jnp.asarray(len(rows)),
    )


def secant(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    step: float | Array,
    score: Score = log_odds,
    noise: float = 0.0,
    samples: int = 1,
    key: Array | None = None,
) -> Operator:
    """Return the finite-step Hessian of the true network, v -> (∇s(x + hv) - ∇s(x - hv)) / 2h.

    It is the mean of the second derivative along the segment, kinks of ReLU included: what an
    attack with steps of size h meets. It is not linear in v: scale v so that h v is the step that
    is meant; for random signs v, h is the change of each pixel value. With `noise` it is that of
    the score smoothed by a Gaussian, whose samples are the same for all v and both ends (common
    random numbers); then it is nearly linear. Costs 2 `samples` gradients a product.

    Args:
        model, image, label, score: as for `hessian`.
        step: [] h > 0.
        noise: standard deviation of the Gaussian, in pixel values.
        samples: number of its samples; all are computed at a time.
        key: of the samples; none are drawn without noise.

    Raises:
        ValueError: for noise without a key.
    """
    if noise and key is None:
        raise ValueError(f"noise = {noise} needs a key")
    offsets = jnp.zeros((1, *image.shape), image.dtype)
    if key is not None:
        offsets = noise * jax.random.normal(key, (samples, *image.shape), image.dtype)
    return Partial(bind(_difference, score=score), model, image, label, step, offsets)


@partial(jax.jit, static_argnames="score")
@highest
def _difference(
    model: Classifier,
    image: Image,
    label: Label,
    step: Array,
    offsets: Array,
    v: Array,
    *,
    score: Score,
) -> Array:
    def slope(x: Image) -> Array:
        return gradient(model, x, label, score=score)

    def one(offset: Array) -> Array:
        return slope(image + offset + step * v) - slope(image + offset - step * v)

    # a central difference: with ± ends the error of a smooth score is of second order in h, and the
    # mean segment lies around the image
    return jax.vmap(one)(offsets).mean(0) / (2 * step)


def normalised(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activations = None,
    score: Score = log_odds,
    depth: int = 16,
    key: Array,
) -> Array:
    """Return ‖H‖₂ / ‖∇s‖₂, curvature in proportion to the slope (Srinivas et al. 2022), [].

    The gradient turns by an angle of about this number times the length of a step. Arguments of
    `hessian` and `eigenpairs`; costs `depth` products.
    """
    operator = hessian(model, image, label, act=act, score=score)
    # Lanczos takes the value of largest size of either sign, as ‖H‖₂ is
    top = eigenpairs(operator, image, 1, depth=depth, key=key).values[0]
    return jnp.abs(top) / jnp.linalg.norm(gradient(model, image, label, score=score))


@partial(jax.jit, static_argnames="score")
@highest
def gradient(model: Classifier, image: Image, label: Label, *, score: Score = log_odds) -> Array:
    """Return the gradient of a class score in the image, ∇s; arguments and shape of `hessian`."""
    return input_gradient(model, image, label, score=score)[0]


class Matched(NamedTuple):
    """Surrogate whose widths follow the step that is taken; see `matched_width`.

    Attributes:
        neuron, layer: factors of the movement of the neuron itself, and of its layer's mean.
        kernel: (z, tau) -> activation with a second derivative of that width.
    """

    neuron: float = 1.0
    layer: float = 0.0
    kernel: Callable[[Array, Array], Array] = relu_curved

    def activations(
        self, model: Classifier, image: Image, direction: Array, step: float | Array
    ) -> list[Activation]:
        """Return the activation of each ReLU; arguments of `matched_width`."""
        factors = {"neuron": self.neuron, "layer": self.layer}
        widths = matched_width(model, image, direction, step, **factors)
        return [Partial(self.kernel, tau=width) for width in widths]


@partial(jax.jit, static_argnames=("neuron", "layer"))
@highest
def matched_width(
    model: Classifier,
    image: Image,
    direction: Array,
    step: float | Array,
    *,
    neuron: float = 1.0,
    layer: float = 0.0,
) -> list[Array]:
    """Return the squared widths of a surrogate that sees as far as a step moves each neuron.

    At one layer the secant Hessian of step h along v is exactly the Hessian with a box kernel of
    half-width h |∂z_i/∂x·v| at each pre-activation z_i. So

        τ_i = (neuron h ∂z_i·v)² + (layer h rms_layer(∂z·v))².

    Costs a forward-mode pass.

    Args:
        model: a classifier whose ReLUs `act` replaces.
        image: [H, W, 3] in [0, 1].
        direction: [H, W, 3] v.
        step: [] h.
        neuron, layer: factors; (1, 0) is the width of each neuron, (0, 2) one for each layer.

    Returns:
        τ for each call of the activation, in the order of the network, each of the shape of z_i.

    Raises:
        ValueError: if the network does not pass `act` on.
    """
    moved = jax.jvp(partial(pre_activations, model), (image,), (direction,))[1]
    return [squared_width(step * dz, neuron=neuron, layer=layer) for dz in moved]


class Fidelity(NamedTuple):
    """How well products of surrogate Hessians agree with those of the secant.

    Attributes:
        cosine: [directions, surrogates, steps], in [-1, 1].
        ratio: [directions, surrogates, steps], norm of the surrogate's product over the secant's.
    """

    cosine: Array
    ratio: Array


def fidelity(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    surrogates: Sequence[Activations | Matched],
    steps: Sequence[float],
    directions: int = 1,
    key: Array,
    score: Score = log_odds,
) -> Fidelity:
    """Compare surrogate Hessians with the secant Hessian, along random signs, over steps.

    Costs, for each direction, two gradients a step and one product a surrogate, or one a step if
    its widths are matched.

    Args:
        model, image, label, score: as for `hessian`.
        surrogates: activations, or `Matched`; None is the exact Hessian.
        steps: h, in units of pixel value.
        directions: number of random sign vectors.
        key: of these.
    """

    def product(act: Activations, v: Array) -> Array:
        return hessian(model, image, label, act=act, score=score)(v)

    def products(surrogate: Activations | Matched, v: Array) -> Array:
        # only matched widths depend on the step
        if isinstance(surrogate, Matched):
            acts = [surrogate.activations(model, image, v, h) for h in steps]
            return jnp.stack([product(act, v) for act in acts])
        return jnp.stack([product(surrogate, v)] * len(steps))

    def compare(v: Array) -> Array:
        truths = jnp.stack([secant(model, image, label, step=h, score=score)(v) for h in steps])
        return _agreement(jnp.stack([products(one, v) for one in surrogates]), truths)

    # by index: the first directions stay the same when there are more of them
    keys = [jax.random.fold_in(key, i) for i in range(directions)]
    # signs, as steps of a sign attack are; then h is the change of every pixel value
    signs = [jax.random.rademacher(key, image.shape, image.dtype) for key in keys]
    return Fidelity(*jnp.moveaxis(jnp.stack([compare(v) for v in signs]), 1, 0))


@jax.jit
@highest
def _agreement(seen: Array, truth: Array) -> Array:
    """Return cosine and norm ratio: [surrogates, steps, ...], [steps, ...] -> [2, surrogates, steps]."""
    axes = tuple(range(2, seen.ndim))
    a, b = (jnp.sqrt((values**2).sum(axes)) for values in (seen, truth[None]))
    # sums of products, not unit vectors: a zero product would be divided by its zero norm
    inner = (seen * truth[None]).sum(axes)
    # a product that is zero has no direction
    cosine = jnp.where(a * b > 0, inner / jnp.where(a * b > 0, a * b, 1), 0)
    return jnp.stack([cosine, jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.nan)])


def map_jacobian(
    interpreter: Interpreter,
    model: Classifier,
    image: Image,
    label: Label,
    context: Context = CONTEXT,
) -> Operator:
    """Return the Jacobian of a map in the image, [H, W, 3] -> [h, w]; see `singular_values`.

    Its largest singular value says how far the map moves (L2) for a small change of the image (L2):
    how fragile it is. A product costs one forward-mode pass over the map.

    Args:
        interpreter: whose surrogate draws the map. GRAD's has the curvature of `context.tau`:
            without a surrogate, the Jacobian of a gradient map is the softmax term alone.
        model, image, label: as for the interpreter.
        context: of the surrogate; MASK needs `memory`.
    """
    return _jacobian(interpreter.surrogate, model, image, label, context)


@partial(jax.jit, static_argnames="surrogate")
@highest
def _jacobian(
    surrogate: Surrogate, model: Classifier, image: Image, label: Label, context: Context
) -> Operator:
    return _linearised(lambda x: surrogate(model, x, label, context).map, image)[1]


def map_hessian(
    interpreter: Interpreter,
    model: Classifier,
    image: Image,
    label: Label,
    target_map: Map,
    context: Context = CONTEXT,
    *,
    map_loss: MapLoss = map_l2,
) -> Operator:
    """Return the Hessian of the map loss of any interpreter in the image.

    That is ∇² ℓ_int(g(x; f), m_t) as the attack differentiates it; for GRAD it holds third
    derivatives of the network.

    Args:
        interpreter, model, image, label, context: as for `map_jacobian`.
        target_map: [h, w] m_t.
        map_loss: ℓ_int, (map, target map) -> [].
    """
    function = bind(_map_loss, surrogate=interpreter.surrogate, map_loss=map_loss)
    return hessian_of(function, image, model, label, target_map, context)


def _map_loss(
    image: Image,
    model: Classifier,
    label: Label,
    target_map: Map,
    context: Context,
    *,
    surrogate: Surrogate,
    map_loss: MapLoss,
) -> Array:
    return map_loss(surrogate(model, image, label, context).map, target_map)


class Lipschitz(NamedTuple):
    """The largest change of a map that was found in a ball around an image.

    Attributes:
        change: [] ‖m(x') - m(x)‖₂ of the maps.
        constant: [] the change divided by ‖x' - x‖₂, a lower bound of the Lipschitz constant.
        image: [H, W, 3], the image x' that shows it.
        map: [h, w], its map.
    """

    change: Array
    constant: Array
    image: Image
    map: Map


def lipschitz(
    interpreter: Interpreter,
    model: Classifier,
    image: Image,
    label: Label,
    context: Context = CONTEXT,
    *,
    threat: Threat | None = None,
    steps: int = 30,
    step_size: float = PIXEL,
    key: Array,
    driver: Driver = "auto",
) -> Lipschitz:
    """Search a ball around an image for the image whose map differs most from its map.

    (Local Lipschitz estimate, Alvarez-Melis & Jaakkola 2018.) Ascent of ‖m(x') - m(x)‖² from a
    random start. The change is maximised, not its ratio to the distance: the gradient map of a ReLU
    network jumps, so that ratio has no bound. The class explained stays `label`, whatever the
    network says of x'. Costs `steps` gradients of the map.

    Args:
        interpreter, model, image, label, context: as for `map_jacobian`.
        threat: the ball; None is `linf` at 8/255.
        steps: of the ascent.
        step_size: α of the first step, in pixel values; it falls to 0 along half a cosine.
        key: of the start.
        driver: see `descent.drive`.
    """
    problem = (model, image, label, context)
    static = {"surrogate": interpreter.surrogate, "threat": threat or linf()}
    state = _start(problem, key, step_size, **static)
    sizes = optax.cosine_decay_schedule(step_size, max(steps, 1))
    if by_host(driver, (problem, key)):
        for i in range(steps):
            state = _ascend(problem, state, sizes(i), **static)
    else:
        state = jax.lax.fori_loop(
            0, steps, lambda i, state: _ascend(problem, state, sizes(i), **static), state
        )
    return _largest_change(problem, state, **static)


_Problem = tuple[Classifier, Image, Label, Context]


class _Ascent(NamedTuple):
    """State of the search: the map of the image, parameters now and at the largest change."""

    benign: Map
    params: Params
    best: Params
    largest: Array


_static = partial(jax.jit, static_argnames=("surrogate", "threat"))


@_static
@highest
def _start(
    problem: _Problem, key: Array, step_size: float, *, surrogate: Surrogate, threat: Threat
) -> _Ascent:
    model, image, label, context = problem
    # at the image itself the gradient of the change is 0
    zeros = threat.init(image)
    flat, shaped = ravel_pytree(zeros)
    signs = shaped(step_size * jax.random.rademacher(key, flat.shape, flat.dtype))
    params = threat.project(signs, image)
    benign = surrogate(model, image, label, context).map
    # -1 lies below any change, so that the start counts
    return _Ascent(benign, params, params, jnp.full((), -1, benign.dtype))


@_static
@highest
def _ascend(
    problem: _Problem, state: _Ascent, size: Array, *, surrogate: Surrogate, threat: Threat
) -> _Ascent:
    model, image, label, context = problem

    def moved_by(params: Params) -> Array:
        x = threat.apply(params, image)
        return _map_loss(
            x, model, label, state.benign, context, surrogate=surrogate, map_loss=map_l2
        )

    change, slope = jax.value_and_grad(moved_by)(state.params)
    better = change > state.largest
    state = state._replace(
        best=optax.tree_utils.tree_where(better, state.params, state.best),
        largest=jnp.maximum(change, state.largest),
    )
    transform = threat.steepest()
    up, _ = transform.update(slope, transform.init(state.params))
    moved = jax.tree.map(lambda p, d: p + size * d, state.params, up)
    return state._replace(params=threat.project(moved, image))


@_static
@highest
def _largest_change(
    problem: _Problem, state: _Ascent, *, surrogate: Surrogate, threat: Threat
) -> Lipschitz:
    model, image, label, context = problem
    x = threat.apply(state.best, image)
    m = surrogate(model, x, label, context).map
    # the root only here: its own slope at a change of 0 would be infinite
    change, distance = jnp.sqrt(map_l2(m, state.benign)), jnp.linalg.norm((x - image).ravel())
    # a start that the threat model projects onto the image itself has no distance
    constant = jnp.where(distance > 0, change / jnp.where(distance > 0, distance, 1), 0)
    return Lipschitz(change, constant, x, m)
