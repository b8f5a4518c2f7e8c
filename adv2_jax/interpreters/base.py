"""Types of an interpreter: its two faces, and the input and output of its surrogate.

An interpreter has two faces. `explain` draws the map that the analyst sees. `surrogate` is the
function that the adversary differentiates: it gives the logits and the map from one pass over the
network, and may smooth derivatives, carry a memory from step to step or add a penalty.
"""

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
Init = Callable[[Any, Image], Any]


class Context(NamedTuple):
    """Input of a surrogate besides model, image and label: one step of one attack.

    Attributes:
        tau: [] > 0, width of the smoothing (see `activations.relu_curved`); a schedule may decrease
            it during the attack.
        key: PRNG key of this image and this step, for surrogates that draw random numbers; None if
            the problem has no key.
        step: [] int32, number of joint steps taken before this one.
        memory: `Seen.memory` of the previous step; None for an interpreter without a memory.
    """

    tau: Array | Any
    key: Array | Any = None
    step: Array | Any = 0
    memory: Any = None


class Seen(NamedTuple):
    """Output of a surrogate for one image.

    Attributes:
        logits: [K], those of the classifier; their gradient in the image must be exact.
        map: [h, w] in [0, 1].
        penalty: [], added to the joint loss with weight 1.
        memory: pytree whose structure, shapes and types do not change, for the next step.
    """

    logits: Logits
    map: Map
    penalty: Array | float = 0.0
    memory: Any = None


Surrogate = Callable[[Any, Image, Label, Context], Seen]


class Solver(NamedTuple):
    """Iterative interpreter, one step at a time, so that `descent.drive` can run it for a batch.

    Attributes:
        init: image -> memory, the state before the first step (any pytree).
        step: (model, image, label, memory) -> memory; its work is counted in its program.
        read: memory -> map [h, w].
        steps: number of steps after which `read` gives the explained map.
    """

    init: Callable[[Image], Any]
    step: Callable[[Classifier, Image, Label, Any], Any]
    read: Callable[[Any], Map]
    steps: int

    def __repr__(self) -> str:
        return shown(self)


class Interpreter(NamedTuple):
    """Interpreter: the map of the analyst, and the function that the adversary differentiates.

    Attributes:
        name: name in results and presets.
        explain: (model, image, label) -> map, the map that the analyst sees.
        surrogate: (model, image, label, context) -> `Seen`, differentiated by the adversary.
        faithful: whether the values of the surrogate's map are those of `explain` (its derivatives
            may differ): if so, each step compares iterates by the map that it differentiates; if
            not, they are compared by the explained map, every `Preset.score_every` steps.
        solver: for an interpreter that is itself a descent, what draws its explained map step by
            step in place of `explain`, also for each of these comparisons; None for others. The
            memory of the surrogate has the same structure, and each complete solve replaces it.
        init: (model, image) -> memory of a surrogate without a solver before its first step; None
            for a surrogate without memory.
        check: (model, image shape [H, W, 3]) -> None; raises a ValueError if a model that has all
            of `needs` still cannot be explained on such images. None checks nothing.
        needs: attributes that a model must have besides `logits`: "features", "head", "masker".
            "act" is no attribute: it means that an attack, but not `explain`, needs a network
            whose ReLUs can be replaced (`capabilities.check_activation`).
        made: the factory bound to the options that made this interpreter; None for one that was
            written by hand. Presets are saved by it.
    """

    name: str
    explain: Explain
    surrogate: Surrogate
    faithful: bool = True
    solver: Solver | None = None
    init: Init | None = None
    check: Callable[[Any, tuple[int, ...]], object] | None = None
    needs: tuple[str, ...] = ()
    made: Bound | None = None

    def __repr__(self) -> str:
        return shown(self)


class Joint(NamedTuple):
    """Several interpreters that one image is to fool, by name or as objects."""

    interpreters: tuple[str | Interpreter, ...]


def joint(*interpreters: str | Interpreter) -> Joint:
    """Return the aim of an attack on several interpreters at once, for `attack` and `explain`.

    Args:
        interpreters: names or interpreters, two or more, of different names.

    Raises:
        ValueError: for fewer, or two of one name.
    """
    names = [one if isinstance(one, str) else one.name for one in interpreters]
    if not 1 < len(names) == len(set(names)):
        given = ", ".join(names) or "none"
        raise ValueError(f"joint takes two or more interpreters of different names, got {given}")
    return Joint(interpreters)


def interpreter_factory(factory: Callable[P, Interpreter]) -> Callable[P, Interpreter]:
    """Decorator that memoises a factory (`options.shared`) and sets `Interpreter.made`."""

    @shared
    @wraps(factory)
    def make(*args: P.args, **options: P.kwargs) -> Interpreter:
        return factory(*args, **options)._replace(made=bind(make, **options))

    return make


def from_explain(name: str, explain: Callable[..., Map]) -> Interpreter:
    """Make an interpreter from a pure function; its surrogate is the function itself.

    If the function has an option `act`, which it passes to the network, the surrogate calls it with
    the curved ReLU of GRAD attacks (`relu_curved`): the map has the same values, and a second
    derivative.

    Args:
        name: name in results: letters, digits, `_` and `-`.
        explain: (model, image, label) -> map [h, w] in [0, 1].

    Raises:
        ValueError: if the name has other characters.
    """
    # the name becomes a part of file names and of keys in results.npz
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"interpreter name {name!r} may have letters, digits, _ and - only")
    # a map made of first derivatives needs curvature from `act`; one made of values, such as CAM,
    # has no use for it
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
