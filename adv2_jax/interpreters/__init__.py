"""Interpreters: pure one-image functions `(model, image, label, *, options) -> map [h, w] in [0, 1]`, large = important.

    m = adv2.interpreters.cam(model, image, label)

`explain` is what the analyst sees. An attack differentiates a `surrogate` of it, `(model, image, label) -> (logits, map)`, which
shares one pass over the network between the two terms of the joint loss. `Interpreter` pairs the two faces.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from adv2_jax.activations import relu_curved
from adv2_jax.interpreters.cam import cam, cam_surrogate, grad_cam, grad_cam_surrogate
from adv2_jax.interpreters.grad import grad, grad_surrogate, input_gradient, smooth_grad_surrogate
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
]


Explain = Callable[[Classifier, Image, Label], Map]
Surrogate = Callable[[Classifier, Image, Label], tuple[Logits, Map]]


class Interpreter(NamedTuple):
    """The two faces of an interpreter.

    Attributes:
        name: as in results.
        explain: (model, image, label) -> map, what the analyst sees.
        surrogate: (model, image, label) -> (logits, map), what the adversary differentiates. The logits' first gradient is exact.
        faithful: whether the surrogate's map *is* the explained map (only its gradient may differ), so that an iterate is scored
            by the pass that differentiates it.
    """

    name: str
    explain: Explain
    surrogate: Surrogate
    faithful: bool = True


@lru_cache
def cam_interpreter() -> Interpreter:
    """CAM; the analyst and the adversary use the same function."""
    return Interpreter("cam", cam, cam_surrogate)


@lru_cache
def grad_cam_interpreter() -> Interpreter:
    """Grad-CAM; the analyst and the adversary use the same function."""
    return Interpreter("grad_cam", grad_cam, grad_cam_surrogate)


@lru_cache
def grad_interpreter(*, pool: int = 1, act: Activation | None = None) -> Interpreter:
    """GRAD and a surrogate whose second derivative is of use.

    Args:
        pool: side of the mean-pooling blocks of the map.
        act: None for the surrogate with the true map and a curved ReLU (`relu_curved`); or the paper's kind, an activation whose
            *first* derivative is replaced, such as `relu_h` or `relu_sigmoid(beta)`, used for the map term only.

    Returns:
        An interpreter; equal options give the same object.
    """

    def explain(model: Classifier, image: Image, label: Label) -> Map:
        return grad(model, image, label, pool=pool)

    def faithful(model: Classifier, image: Image, label: Label) -> tuple[Logits, Map]:
        return grad_surrogate(model, image, label, act=relu_curved(), pool=pool)

    def smooth(model: Classifier, image: Image, label: Label) -> tuple[Logits, Map]:
        assert act is not None
        return smooth_grad_surrogate(model, image, label, act=act, pool=pool)

    return Interpreter("grad", explain, faithful) if act is None else Interpreter("grad", explain, smooth, faithful=False)


INTERPRETERS: dict[str, Callable[..., Interpreter]] = {
    "grad": grad_interpreter,
    "cam": cam_interpreter,
    "grad_cam": grad_cam_interpreter,
}
