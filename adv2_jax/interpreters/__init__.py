"""Interpreters: pure functions (model, image, label, *, options) -> map [h, w], large = important.

    m = adv2.interpreters.cam(model, image, label)

These functions explain one image. An attack differentiates a surrogate, (model, image, label,
context) -> `Seen`, which shares one pass over the network between the two terms of the joint loss.
An `Interpreter` pairs both. That of MASK has a `Solver` too, since its map is the result of an
optimisation, which `descent.drive` runs for a batch of images.
"""

from collections.abc import Callable
from typing import Any

from adv2_jax.interpreters.activation_maps import (
    cam,
    cam_interpreter,
    grad_cam,
    grad_cam_interpreter,
    grad_cam_pp,
    grad_cam_pp_interpreter,
    layer_cam,
    layer_cam_interpreter,
)
from adv2_jax.interpreters.attention_maps import (
    attention_rollout,
    attention_rollout_interpreter,
    gradient_rollout,
    gradient_rollout_interpreter,
)
from adv2_jax.interpreters.base import (
    Context,
    Explain,
    Init,
    Interpreter,
    Joint,
    Seen,
    Solver,
    Surrogate,
    from_explain,
    joint,
)
from adv2_jax.interpreters.gradients import (
    grad,
    grad_interpreter,
    guided_backprop,
    guided_backprop_interpreter,
    input_gradient,
    input_x_gradient,
    input_x_gradient_interpreter,
    smooth_relu_grad_interpreter,
)
from adv2_jax.interpreters.mask_descent import MaskObjective, mask, mask_interpreter
from adv2_jax.interpreters.masker_maps import SaliencyWeights, rts, rts_interpreter
from adv2_jax.interpreters.patch_maps import occlusion, occlusion_interpreter
from adv2_jax.interpreters.path import (
    integrated_gradients,
    integrated_gradients_interpreter,
    smooth_grad,
    smooth_grad_interpreter,
)
from adv2_jax.interpreters.relevance import lrp, lrp_interpreter
from adv2_jax.options import shown

__all__ = [
    "FACTORIES",
    "INTERPRETERS",
    "PAPER",
    "Context",
    "Explain",
    "Init",
    "Interpreter",
    "Joint",
    "MaskObjective",
    "SaliencyWeights",
    "Seen",
    "Solver",
    "Surrogate",
    "attention_rollout",
    "attention_rollout_interpreter",
    "cam",
    "cam_interpreter",
    "from_explain",
    "grad",
    "grad_cam",
    "grad_cam_interpreter",
    "grad_cam_pp",
    "grad_cam_pp_interpreter",
    "grad_interpreter",
    "gradient_rollout",
    "gradient_rollout_interpreter",
    "guided_backprop",
    "guided_backprop_interpreter",
    "input_gradient",
    "input_x_gradient",
    "input_x_gradient_interpreter",
    "integrated_gradients",
    "integrated_gradients_interpreter",
    "joint",
    "layer_cam",
    "layer_cam_interpreter",
    "lrp",
    "lrp_interpreter",
    "mask",
    "mask_interpreter",
    "occlusion",
    "occlusion_interpreter",
    "rts",
    "rts_interpreter",
    "smooth_grad",
    "smooth_grad_interpreter",
    "smooth_relu_grad_interpreter",
]


# by the names of the command line and of the results; `FACTORIES` has the names of preset files too
INTERPRETERS: dict[str, Callable[..., Interpreter]] = {
    "grad": grad_interpreter,
    "cam": cam_interpreter,
    "grad_cam": grad_cam_interpreter,
    "rts": rts_interpreter,
    "mask": mask_interpreter,
    "input_x_gradient": input_x_gradient_interpreter,
    "integrated_gradients": integrated_gradients_interpreter,
    "smooth_grad": smooth_grad_interpreter,
    "guided_backprop": guided_backprop_interpreter,
    "lrp": lrp_interpreter,
    "grad_cam_pp": grad_cam_pp_interpreter,
    "layer_cam": layer_cam_interpreter,
    "occlusion": occlusion_interpreter,
    "attention_rollout": attention_rollout_interpreter,
    "gradient_rollout": gradient_rollout_interpreter,
}
# those that ADV² attacks, which all commands take unless told otherwise
PAPER = ("grad", "cam", "grad_cam", "rts", "mask")
FACTORIES: dict[str, Callable[..., Interpreter]] = {
    **INTERPRETERS,
    "smooth_relu_grad": smooth_relu_grad_interpreter,
}


def of_function(explain: Explain) -> Interpreter:
    """Return the built-in interpreter with this `explain`, or one without a surrogate.

    The built-in one brings its checks and its solver.
    """
    builtin = (factory() for factory in INTERPRETERS.values())
    return next(
        (interpreter for interpreter in builtin if interpreter.explain == explain),
        Interpreter(shown(explain), explain, _no_surrogate),
    )


def _no_surrogate(*arguments: Any) -> Seen:
    raise ValueError("a function explains; to be attacked it needs a surrogate, in an Interpreter")
