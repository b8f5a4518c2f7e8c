"""Interpreters: pure one-image functions `(model, image, label, *, options) -> map [h, w] in [0, 1]`, large = important.

    m = adv2.interpreters.cam(model, image, label)

`explain` is what the analyst sees. An attack differentiates a `surrogate` of it, `(model, image, label, context) -> Seen`,
which shares one pass over the network between the two terms of the joint loss. `Interpreter` pairs the two faces.

The map of MASK is the end of a descent. Such an interpreter has a `Solver` besides, so that whoever explains or attacks many images
can drive the descent as it drives an attack, and a surrogate that carries along where its own descent stands.
"""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

import jax
from jax import Array

from adv2_jax.activations import relu_curved, relu_h
from adv2_jax.classifier import check_features, logits_of
from adv2_jax.interpreters.cam import cam, cam_with_logits, check_pooling, grad_cam, grad_cam_with_logits
from adv2_jax.interpreters.grad import grad, grad_with_logits, input_gradient
from adv2_jax.interpreters.mask import (
    OBJECTIVE,
    Descent,
    MaskObjective,
    Memory,
    check_descent,
    implicit,
    mask,
    start_mask,
    step_mask,
    unrolled,
)
from adv2_jax.interpreters.rts import MaskWeights, check_masker, head_loss, mean_loss, rts
from adv2_jax.options import Bound, bind, shared, shown
from adv2_jax.types import Activation, Classifier, HasFeatures, Image, Label, Logits, Map

__all__ = [
    "FACTORIES",
    "INTERPRETERS",
    "Context",
    "Explain",
    "Interpreter",
    "MaskObjective",
    "MaskWeights",
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


P = ParamSpec("P")
Explain = Callable[[Any, Image, Label], Map]


class Context(NamedTuple):
    """What a surrogate is told of the step it serves.

    Attributes:
        tau: [] > 0, the width of whatever the surrogate smooths; a schedule sharpens it on the way.
        key: a PRNG key of this image and step, for those that draw random numbers.
        step: [] int32, 0 at the start of the joint stage.
        memory: what the surrogate returned as `Seen.memory` at the step before; of an interpreter with a solver.
    """

    tau: Array | Any
    key: Array | Any = None
    step: Array | Any = 0
    memory: Any = None


class Seen(NamedTuple):
    """What a surrogate makes of an image.

    Attributes:
        logits: [K]; their gradient in the image is exact.
        map: [h, w] in [0, 1].
        penalty: [], added to the joint loss as it is.
        memory: any pytree of one structure, handed to the next step.
    """

    logits: Logits
    map: Map
    penalty: Array | float = 0.0
    memory: Any = None


Surrogate = Callable[[Any, Image, Label, Context], Seen]


class Solver(NamedTuple):
    """An interpreter whose map is where a descent ends, one step at a time.

    Attributes:
        init: image -> memory (any pytree), where the descent starts.
        step: (model, image, label, memory) -> memory; costs one gradient through the network.
        read: memory -> map.
        steps: how many steps make the explained map.
    """

    init: Callable[[Image], Any]
    step: Callable[[Classifier, Image, Label, Any], Any]
    read: Callable[[Any], Map]
    steps: int

    def __repr__(self) -> str:
        return shown(self)


class Interpreter(NamedTuple):
    """The two faces of an interpreter.

    Attributes:
        name: as in results.
        explain: (model, image, label) -> map, what the analyst sees.
        surrogate: (model, image, label, context) -> `Seen`, what the adversary differentiates.
        faithful: whether the surrogate's map *is* the explained map (only its gradient may differ), so that an iterate is scored
            by the pass that differentiates it.
        solver: `explain` step by step, for an interpreter that is itself a descent. The surrogate carries a memory of the same
            kind from step to step; it starts anew from each fresh solve.
        check: of (model, image shape [H, W, 3]); raises a ValueError for a model, or images, that it cannot explain.
        needs: what it asks of a model beyond `logits`: "features", "head", "masker"; and "act", if its surrogate does.
        made: the factory of this module and the options that it was made with, if it was.
    """

    name: str
    explain: Explain
    surrogate: Surrogate
    faithful: bool = True
    solver: Solver | None = None
    check: Callable[[Any, tuple[int, ...]], object] | None = None
    needs: tuple[str, ...] = ()
    made: Bound | None = None

    def __repr__(self) -> str:
        return shown(self)


def recorded(factory: Callable[P, Interpreter]) -> Callable[P, Interpreter]:
    """Decorator: the factory is `options.shared`, and what it makes knows how."""

    @shared
    @wraps(factory)
    def make(*args: P.args, **options: P.kwargs) -> Interpreter:
        return factory(*args, **options)._replace(made=bind(make, **options))

    return make


@recorded
def cam_interpreter() -> Interpreter:
    """CAM; analyst and adversary use the same function, there is nothing to smooth."""
    return Interpreter("cam", cam, bind(_exact, draw=cam_with_logits), check=check_pooling, needs=("features", "head"))


@recorded
def grad_cam_interpreter() -> Interpreter:
    """Grad-CAM; analyst and adversary use the same function, there is nothing to smooth."""
    surrogate = bind(_exact, draw=grad_cam_with_logits)
    return Interpreter("grad_cam", grad_cam, surrogate, check=check_features, needs=("features", "head"))


def _exact(model: HasFeatures, image: Image, label: Label, context: Context, *, draw: Callable[..., tuple[Logits, Map]]) -> Seen:
    return Seen(*draw(model, image, label))


@recorded
def grad_interpreter(*, pool: int | None = None) -> Interpreter:
    """GRAD, and the true map with a curved ReLU (`relu_curved`, kernel width `tau`) for the adversary.

    Args:
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112² (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter("grad", bind(grad, pool=pool), bind(_curved_grad, pool=pool), needs=("act",))


def _curved_grad(model: Classifier, image: Image, label: Label, context: Context, *, pool: int | None) -> Seen:
    return Seen(*grad_with_logits(model, image, label, act=lambda z: relu_curved(z, context.tau), pool=pool))


@recorded
def smooth_grad_interpreter(*, act: Activation | None = None, pool: int | None = None) -> Interpreter:
    """GRAD, and a map whose *first* derivative is smoothed for the adversary: the paper's way (§3.2).

    The smoothed activation serves the map term only; the logits go through the true ReLU.

    Args:
        act: the activation, such as `relu_sigmoid(beta)`; None is `relu_h` of width `tau`.
        pool: side of the mean-pooling blocks of the map; None is 4 at 224² and 1 below 112² (`maps.usual_pool`).

    Returns:
        An interpreter; equal options give the same object.
    """
    return Interpreter("grad", bind(grad, pool=pool), bind(_smooth_grad, act=act, pool=pool), faithful=False, needs=("act",))


def _smooth_grad(
    model: Classifier, image: Image, label: Label, context: Context, *, act: Activation | None, pool: int | None
) -> Seen:
    smooth = (lambda z: relu_h(z, context.tau)) if act is None else act
    # the forward pass is the same for both terms, and XLA merges it
    return Seen(logits_of(model, image), grad(model, image, label, act=smooth, pool=pool))


@recorded
def rts_interpreter(*, encoder_loss: str = "head", encoder_weight: float = 0.1) -> Interpreter:
    """RTS, and with it ℓ_enc for the adversary, without which its attack "is often ineffective" (ADV² §3.4).

    The model is to be a `models.Masked`: a classifier and its masker.

    Args:
        encoder_loss: "head", cross-entropy of the encoder's own head towards the target (released code), or "mean", distance of
            its pooled features from the mean of the target's class (the paper's text).
        encoder_weight: what ℓ_enc is multiplied with, 0 or more; the released code uses .1, 0 leaves it out.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    if encoder_loss not in ENCODER_LOSSES:
        raise ValueError(f"encoder_loss {encoder_loss!r} is not one of {', '.join(ENCODER_LOSSES)}")
    if not 0 <= encoder_weight < float("inf"):
        raise ValueError(f"encoder_weight = {encoder_weight} must be finite and not negative")
    surrogate = bind(_rts_with_penalty, encoder_loss=encoder_loss, encoder_weight=encoder_weight)
    needs_means = encoder_loss == "mean" and encoder_weight > 0
    return Interpreter("rts", _rts, surrogate, check=bind(check_masker, needs_means=needs_means), needs=("masker",))


def _rts(model: Any, image: Image, label: Label) -> Map:
    return rts(model.masker, image, label)


def _rts_with_penalty(
    model: Any, image: Image, label: Label, context: Context, *, encoder_loss: str, encoder_weight: float
) -> Seen:
    penalty = encoder_weight * ENCODER_LOSSES[encoder_loss](model.masker, image, label) if encoder_weight else 0.0
    return Seen(logits_of(model, image), rts(model.masker, image, label), penalty)


ENCODER_LOSSES = {"head": head_loss, "mean": mean_loss}


@recorded
def mask_interpreter(
    *,
    size: int | None = None,
    steps: int = 50,
    learning_rate: float = 0.2,
    objective: MaskObjective = OBJECTIVE,
    free: int = 2,
    ahead: int = 1,
    hypergradient: str = "unrolled",
) -> Interpreter:
    """MASK, and for the adversary a map that is always some steps short of the present image (ADV² §3.5).

    An attack carries a running map and its Adam state along. Each of its steps takes a few free steps of the descent on the
    present image, then some more that are differentiated, the look-ahead; the free ones are what it remembers.

    Args:
        size, steps, learning_rate, objective: of the descent, as in `mask`.
        free: steps before the look-ahead, 0 or more; the released code takes 4.
        ahead: steps of the look-ahead, 0 or more; the released code takes 4. Without any the map does not depend on the image: the
            attack is blind to it, and only scores what it meets.
        hypergradient: "unrolled" differentiates the look-ahead (the paper's way). "implicit" has none: it takes the running map
            for an optimum, whose slope is a Hessian-vector solve of 10 iterations at most, and is charged for all of them.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    descent = check_descent(Descent(size, steps, learning_rate, objective))
    if hypergradient not in ("unrolled", "implicit"):
        raise ValueError(f"hypergradient {hypergradient!r} is not one of unrolled, implicit")
    for name, value in (("free", free), ("ahead", ahead)):
        if value < 0:
            raise ValueError(f"{name} = {value} must be 0 or more")

    explain = bind(mask, size=size, steps=steps, learning_rate=learning_rate, objective=objective)
    surrogate = bind(_mask_ahead, descent=descent, free=free, ahead=ahead, hypergradient=hypergradient)
    solver = Solver(bind(start_mask, descent=descent), bind(step_mask, descent=descent), _map_of, steps)
    return Interpreter("mask", explain, surrogate, faithful=False, solver=solver, needs=("act",))


def _map_of(memory: Memory) -> Map:
    return memory.map


def _mask_ahead(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    descent: Descent,
    free: int,
    ahead: int,
    hypergradient: str,
) -> Seen:
    memory: Memory = context.memory
    for _ in range(free):
        memory = step_mask(model, image, label, memory, descent)
    memory = jax.lax.stop_gradient(memory)

    def act(z: Array) -> Array:
        return relu_curved(z, context.tau)

    if hypergradient == "unrolled":
        m = unrolled(model, image, label, memory, descent, act, ahead)
    else:
        m = implicit(model, image, label, memory.map, descent, act)
    return Seen(logits_of(model, image), m, memory=memory)


def from_explain(name: str, explain: Callable[..., Map]) -> Interpreter:
    """An interpreter of a pure function alone, which the adversary differentiates as it is.

    If the function has an option `act`, to be handed on to the network, the adversary's maps are drawn with the curved ReLU of GRAD
    attacks (`relu_curved`): they are the true ones, and have a second derivative.

    Args:
        name: as in results, letters, digits, `_` and `-`.
        explain: (model, image, label) -> map [h, w] in [0, 1].

    Raises:
        ValueError: for another kind of name.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"interpreter name {name!r} may have letters, digits, _ and - only")
    curved = "act" in inspect.signature(explain).parameters
    return Interpreter(name, explain, bind(_as_explained, explain=explain, curved=curved), needs=("act",) if curved else ())


def _as_explained(
    model: Classifier, image: Image, label: Label, context: Context, *, explain: Callable[..., Map], curved: bool
) -> Seen:
    options = {"act": lambda z: relu_curved(z, context.tau)} if curved else {}
    return Seen(logits_of(model, image), explain(model, image, label, **options))


INTERPRETERS: dict[str, Callable[..., Interpreter]] = {
    "grad": grad_interpreter,
    "cam": cam_interpreter,
    "grad_cam": grad_cam_interpreter,
    "rts": rts_interpreter,
    "mask": mask_interpreter,
}
FACTORIES: dict[str, Callable[..., Interpreter]] = {**INTERPRETERS, "smooth_grad": smooth_grad_interpreter}


def of_function(explain: Explain) -> Interpreter:
    """The interpreter of this package that explains by a function, and so its checks, or one that has nothing but the function."""
    known = (factory() for factory in INTERPRETERS.values())
    return next((own for own in known if own.explain == explain), Interpreter(shown(explain), explain, _not_to_be_attacked))


def _not_to_be_attacked(*arguments: Any) -> Seen:
    raise ValueError("a function explains; to be attacked it needs a surrogate, in an Interpreter")
