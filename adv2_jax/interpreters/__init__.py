"""Interpreters: pure one-image functions `(model, image, label, *, options) -> map [h, w] in [0, 1]`, large = important.

    m = adv2.interpreters.cam(model, image, label)

`explain` is what the analyst sees. An attack differentiates a `surrogate` of it, `(model, image, label, tau) -> (logits, map)`,
which shares one pass over the network between the two terms of the joint loss; `tau` is the width of whatever it smooths, so that
a schedule can sharpen it on the way. `Interpreter` pairs the two faces.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from adv2_jax.activations import relu_curved, relu_h
from adv2_jax.interpreters.cam import cam, cam_with_logits, grad_cam, grad_cam_with_logits
from adv2_jax.interpreters.grad import grad, grad_with_logits, input_gradient
from adv2_jax.options import shared
from adv2_jax.types import Activation, Classifier, Image, Label, Logits, Map

__all__ = [
    "INTERPRETERS",
    "Explain",
    "Interpreter",
    "Surrogate",
    "cam",
    "cam_interpreter",
    "grad",
    "grad_cam",
    "grad_cam_interpreter",
    "grad_interpreter",
    "input_gradient",
    "smooth_grad_interpreter",
]


Explain = Callable[[Classifier, Image, Label], Map]
Surrogate = Callable[[Classifier, Image, Label, Array], tuple[Logits, Map]]


class Interpreter(NamedTuple):
    """The two faces of an interpreter.

    Attributes:
        name: as in results.
        explain: (model, image, label) -> map, what the analyst sees.
        surrogate: (model, image, label, tau) -> (logits, map), what the adversary differentiates; the logits' gradient is exact.
        faithful: whether the surrogate's map *is* the explained map (only its gradient may differ), so that an iterate is scored
            by the pass that differentiates it.
    """

    name: str
    explain: Explain
    surrogate: Surrogate
    faithful: bool = True


@shared
def cam_interpreter() -> Interpreter:
    """CAM; analyst and adversary use the same function, there is nothing to smooth."""
    return Interpreter("cam", cam, lambda model, image, label, tau: cam_with_logits(model, image, label))


@shared
def grad_cam_interpreter() -> Interpreter:
    """Grad-CAM; analyst and adversary use the same function, there is nothing to smooth."""
    return Interpreter("grad_cam", grad_cam, lambda model, image, label, tau: grad_cam_with_logits(model, image, label))


@shared
def grad_interpreter(*, pool: int | None = None) -> Interpreter:
    """GRAD, and the true map with a curved ReLU (`relu_curved`, kernel width `tau`) for the adversary.

    Args:
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112² (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """

    def surrogate(model: Classifier, image: Image, label: Label, tau: Array) -> tuple[Logits, Map]:
        return grad_with_logits(model, image, label, act=lambda z: relu_curved(z, tau), pool=pool)

    return Interpreter("grad", _grad(pool), surrogate)


@shared
def smooth_grad_interpreter(*, act: Activation | None = None, pool: int | None = None) -> Interpreter:
    """GRAD, and a map whose *first* derivative is smoothed for the adversary: the paper's way (§3.2).

    The smoothed activation serves the map term only; the logits go through the true ReLU.

    Args:
        act: the activation, such as `relu_sigmoid(beta)`; None is `relu_h` of width `tau`.
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112² (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """

    def surrogate(model: Classifier, image: Image, label: Label, tau: Array) -> tuple[Logits, Map]:
        smooth = (lambda z: relu_h(z, tau)) if act is None else act
        # the forward pass is the same for both terms, and XLA merges it
        return model.head(model.features(image)), grad(model, image, label, act=smooth, pool=pool)

    return Interpreter("grad", _grad(pool), surrogate, faithful=False)


@shared
def _grad(pool: int | None) -> Explain:
    return lambda model, image, label: grad(model, image, label, pool=pool)


INTERPRETERS: dict[str, Callable[..., Interpreter]] = {
    "grad": grad_interpreter,
    "cam": cam_interpreter,
    "grad_cam": grad_cam_interpreter,
}
