"""GRAD: the map is the gradient of a class score with respect to the image (ADV² eq. 5)."""

from collections.abc import Callable

import jax
from jax import Array

from adv2_jax import maps
from adv2_jax.classifier import logits_of
from adv2_jax.losses import log_odds
from adv2_jax.types import Activation, Classifier, Image, Label, Logits, Map

Score = Callable[[Logits, Label], Array]


def input_gradient(
    model: Classifier, image: Image, label: Label, *, act: Activation | None = None, score: Score = log_odds
) -> tuple[Array, Logits]:
    """Gradient of a class score with respect to the image, and the logits the same pass gave.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        act: stands in for every ReLU, in this pass and in whatever is differentiated through it; None leaves them.
        score: (logits, label) -> [], one of `log_odds`, `logit`, `probability` or your own.

    Returns:
        gradient [H, W, 3] per unit of pixel value, logits [K].
    """

    def class_score(x: Image) -> tuple[Array, Logits]:
        logits = logits_of(model, x, act)
        return score(logits, label), logits

    return jax.grad(class_score, has_aux=True)(image)


def grad_with_logits(
    model: Classifier, image: Image, label: Label, *, act: Activation | None, pool: int | None, score: Score = log_odds
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

    The score differentiated is the log-odds u_c. Since ∂f_c/∂x = f_c (1 - f_c) ∂u_c/∂x, the min-max map, and the gradient of any
    loss on it, are the same functions of the image as with f_c itself; but f_c rounds to exactly 1 in float32 for confident
    networks and its gradient is then rounding noise, while that of u_c stays exact to 1e-6. `score=probability` is the literal
    formula, for those who study its Hessian.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        act: stands in for every ReLU; None explains the network, `relu_h` gives the map a useful second derivative.
        pool: side of the mean-pooling blocks; None is 4 at 224², as in the paper, and 1 below 112² (`maps.usual_pool`).
        score: (logits, label) -> [].

    Returns:
        [H/pool, W/pool] in [0, 1].

    Raises:
        ValueError: if `pool` does not divide the image sides.
    """
    return grad_with_logits(model, image, label, act=act, pool=pool, score=score)[1]
