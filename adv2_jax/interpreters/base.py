"""The two faces of an interpreter, and what passes between a surrogate and the attack that differentiates it."""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

from jax import Array

from adv2_jax.activations import relu_curved
from adv2_jax.capabilities import logits_of
from adv2_jax.options import Bound, bind, shared, shown
from adv2_jax.types import Classifier, Image, Label, Logits, Map

P = ParamSpec("P")
Explain = Callable[[Any, Image, Label], Map]


class Context(NamedTuple):
    """What a surrogate is told of the step it serves.

    Attributes:
        tau: [] > 0, the width of whatever the surrogate smooths; a schedule sharpens it on the way.
        key: a PRNG key of this image and step, for those that draw random numbers.
        step: [] int32, 0 at the start of the joint stage.
        memory: what the surrogate returned as `Seen.memory` at the step before; of an interpreter
            with a solver.
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
        faithful: whether the surrogate's map *is* the explained map (only its gradient may differ),
            so that an iterate is scored by the pass that differentiates it.
        solver: `explain` step by step, for an interpreter that is itself a descent. The surrogate
            carries a memory of the same kind from step to step; it starts anew from each fresh
            solve.
        check: of (model, image shape [H, W, 3]); raises a ValueError for a model, or images, that
            it cannot explain.
        needs: what it asks of a model beyond `logits`: "features", "head", "masker"; and "act", if
            its surrogate does.
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


def from_explain(name: str, explain: Callable[..., Map]) -> Interpreter:
    """An interpreter of a pure function alone, which the adversary differentiates as it is.

    If the function has an option `act`, to be handed on to the network, the adversary's maps are
    drawn with the curved ReLU of GRAD attacks (`relu_curved`): they are the true ones, and have a
    second derivative.

    Args:
        name: as in results, letters, digits, `_` and `-`.
        explain: (model, image, label) -> map [h, w] in [0, 1].

    Raises:
        ValueError: for another kind of name.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"interpreter name {name!r} may have letters, digits, _ and - only")
    curved = "act" in inspect.signature(explain).parameters
    return Interpreter(
        name,
        explain,
        bind(_as_explained, explain=explain, curved=curved),
        needs=("act",) if curved else (),
    )


def _as_explained(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    explain: Callable[..., Map],
    curved: bool,
) -> Seen:
    options = {"act": lambda z: relu_curved(z, context.tau)} if curved else {}
    return Seen(logits_of(model, image), explain(model, image, label, **options))
