"""GRAD: the map is the gradient of a class score with respect to the image (ADV² eq. 5)."""

import jax
from jax import Array

from adv2_jax import maps
from adv2_jax.activations import relu_curved, relu_h
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters.base import Context, Interpreter, Seen, recorded
from adv2_jax.losses import log_odds
from adv2_jax.options import bind
from adv2_jax.types import Activation, Classifier, Image, Label, Logits, Map, Score


def input_gradient(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    score: Score = log_odds,
) -> tuple[Array, Logits]:
    """Gradient of a class score with respect to the image, and the logits the same pass gave.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        act: stands in for every ReLU, in this pass and in whatever is differentiated through it;
            None leaves them.
        score: (logits, label) -> [], one of `log_odds`, `logit`, `probability` or your own.

    Returns:
        gradient [H, W, 3] per unit of pixel value, logits [K].
    """

    def class_score(x: Image) -> tuple[Array, Logits]:
        logits = logits_of(model, x, act)
        return score(logits, label), logits

    return jax.grad(class_score, has_aux=True)(image)


def grad_with_logits(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None,
    pool: int | None,
    score: Score = log_odds,
) -> tuple[Logits, Map]:
    """The logits [K] and the map of `grad`, from one linearisation.

    A gradient of any function of both costs about four forward passes.
    """
    gradient, logits = input_gradient(model, image, label, act=act, score=score)
    return logits, maps.min_max(maps.pool(maps.channel_max(gradient), pool))


def grad(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    act: Activation | None = None,
    pool: int | None = None,
    score: Score = log_odds,
) -> Map:
    """GRAD map, |∂f_c/∂x| reduced over colours and scaled to [0, 1] (ADV² eq. 5).

    The score differentiated is the log-odds u_c. Since ∂f_c/∂x = f_c (1 - f_c) ∂u_c/∂x, the min-max
    map, and the gradient of any loss on it, are the same functions of the image as with f_c itself;
    but f_c rounds to exactly 1 in float32 for confident networks and its gradient is then rounding
    noise, while that of u_c stays exact to 1e-6. `score=probability` is the literal formula, for
    those who study its Hessian.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        act: stands in for every ReLU; None explains the network, `relu_h` gives the map a useful
            second derivative.
        pool: side of the mean-pooling blocks; None is 4 at 224², as in the paper, and 1 below 112²
            (`maps.usual_pool`).
        score: (logits, label) -> [].

    Returns:
        [H/pool, W/pool] in [0, 1].

    Raises:
        ValueError: if `pool` does not divide the image sides.
    """
    return grad_with_logits(model, image, label, act=act, pool=pool, score=score)[1]


@recorded
def grad_interpreter(*, pool: int | None = None) -> Interpreter:
    """GRAD, and the true map with a curved ReLU (`relu_curved`, kernel width `tau`) for the
    adversary.

    Args:
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112²
            (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter("grad", bind(grad, pool=pool), bind(_curved_grad, pool=pool), needs=("act",))


def _curved_grad(
    model: Classifier, image: Image, label: Label, context: Context, *, pool: int | None
) -> Seen:
    return Seen(
        *grad_with_logits(model, image, label, act=lambda z: relu_curved(z, context.tau), pool=pool)
    )


@recorded
def smooth_grad_interpreter(
    *, act: Activation | None = None, pool: int | None = None
) -> Interpreter:
    """GRAD, and a map whose *first* derivative is smoothed for the adversary: the paper's way
    (§3.2).

    The smoothed activation serves the map term only; the logits go through the true ReLU.

    Args:
        act: the activation, such as `relu_sigmoid(beta)`; None is `relu_h` of width `tau`.
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112²
            (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter(
        "grad",
        bind(grad, pool=pool),
        bind(_smooth_grad, act=act, pool=pool),
        faithful=False,
        needs=("act",),
    )


def _smooth_grad(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    act: Activation | None,
    pool: int | None,
) -> Seen:
    smooth = (lambda z: relu_h(z, context.tau)) if act is None else act
    # the forward pass is the same for both terms, and XLA merges it
    return Seen(logits_of(model, image), grad(model, image, label, act=smooth, pool=pool))
