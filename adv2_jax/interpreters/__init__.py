"""Interpreters: pure one-image functions `(model, image, label, *, options) -> map [h, w] in [0,
1]`, large = important.

    m = adv2.interpreters.cam(model, image, label)

`explain` is what the analyst sees. An attack differentiates a `surrogate` of it, `(model, image,
label, context) -> Seen`, which shares one pass over the network between the two terms of the joint
loss. `Interpreter` pairs the two faces.

The map of MASK is the end of a descent. Such an interpreter has a `Solver` besides, so that whoever
explains or attacks many images can drive the descent as it drives an attack, and a surrogate that
carries along where its own descent stands.
"""

from collections.abc import Callable
from typing import Any

from adv2_jax.interpreters.activation_maps import (
    cam,
    cam_interpreter,
    grad_cam,
    grad_cam_interpreter,
)
from adv2_jax.interpreters.base import (
    Context,
    Explain,
    Interpreter,
    Seen,
    Solver,
    Surrogate,
    from_explain,
)
from adv2_jax.interpreters.gradients import (
    grad,
    grad_interpreter,
    input_gradient,
    smooth_grad_interpreter,
)
from adv2_jax.interpreters.mask_descent import MaskObjective, mask, mask_interpreter
from adv2_jax.interpreters.masker_maps import SaliencyWeights, rts, rts_interpreter
from adv2_jax.options import shown

__all__ = [
    "FACTORIES",
    "INTERPRETERS",
    "Context",
    "Explain",
    "Interpreter",
    "MaskObjective",
    "SaliencyWeights",
    "Seen",
    "Solver",
    "Surrogate",
    "cam",
    "cam_interpreter",
    "from_explain",
    "grad",
    "grad_cam",
    "grad_cam_interpreter",
    "grad_interpreter",
    "input_gradient",
    "mask",
    "mask_interpreter",
    "rts",
    "rts_interpreter",
    "smooth_grad_interpreter",
]


INTERPRETERS: dict[str, Callable[..., Interpreter]] = {
    "grad": grad_interpreter,
    "cam": cam_interpreter,
    "grad_cam": grad_cam_interpreter,
    "rts": rts_interpreter,
    "mask": mask_interpreter,
}
FACTORIES: dict[str, Callable[..., Interpreter]] = {
    **INTERPRETERS,
    "smooth_grad": smooth_grad_interpreter,
}


def of_function(explain: Explain) -> Interpreter:
    """The interpreter of this package that explains by a function, and so its checks, or one that has nothing but the function."""
    known = (factory() for factory in INTERPRETERS.values())
    return next(
        (own for own in known if own.explain == explain),
        Interpreter(shown(explain), explain, _not_to_be_attacked),
    )


def _not_to_be_attacked(*arguments: Any) -> Seen:
    raise ValueError("a function explains; to be attacked it needs a surrogate, in an Interpreter")
