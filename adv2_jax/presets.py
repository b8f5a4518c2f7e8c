"""The numbers of an attack, by preset and interpreter.

`paper` holds the constants of the released code, `default` those found here by search, and `quick`
as few steps as will do. `auto` takes what it can from the network, the image and the threat model.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import optax

from adv2_jax import losses
from adv2_jax.activations import TAU
from adv2_jax.descent import GOALS, LEAST_WEIGHT, MapLoss
from adv2_jax.errors import first_line
from adv2_jax.interpreters import (
    FACTORIES,
    INTERPRETERS,
    Interpreter,
    Joint,
    MaskObjective,
    attention_rollout_interpreter,
    cam_interpreter,
    grad_cam_interpreter,
    grad_cam_pp_interpreter,
    grad_interpreter,
    gradient_rollout_interpreter,
    guided_backprop_interpreter,
    input_x_gradient_interpreter,
    integrated_gradients_interpreter,
    layer_cam_interpreter,
    lrp_interpreter,
    mask_interpreter,
    occlusion_interpreter,
    rts_interpreter,
    smooth_grad_interpreter,
    smooth_relu_grad_interpreter,
)
from adv2_jax.options import shown
from adv2_jax.threats import PIXEL, Threat

T = TypeVar("T")
Schedule = Callable[[int], optax.Schedule]


# shape -> optax schedule from a first to a last value over n steps
SHAPES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "constant": lambda first, last, n: optax.constant_schedule(first),
    "ramp": optax.linear_schedule,
    "decay": lambda first, last, n: optax.cosine_decay_schedule(first, n, last / first),
    "geometric": lambda first, last, n: optax.exponential_decay(first, n, last / first),
}


@dataclass(frozen=True)
class Course:
    """A schedule that stretches: called with the number n of joint steps it is the optax schedule.

    Attributes:
        shape: "constant"; "ramp", a straight line; "decay", half a cosine; "geometric", a constant
            factor per step.
        first, last: its values at steps 0 and n.
    """

    shape: str
    first: float
    last: float

    def __call__(self, n: int) -> optax.Schedule:
        """Return the schedule over n steps."""
        # optax refuses schedules over 0 steps
        return SHAPES[self.shape](self.first, self.last, max(n, 1))


def constant(value: float) -> Course:
    """Return the schedule of the same value at every step."""
    return Course("constant", value, value)


def ramp(first: float, last: float) -> Course:
    """Return the schedule along a straight line from `first` to `last`."""
    return Course("ramp", first, last)


def decay(first: float, last: float) -> Course:
    """Return the schedule along half a cosine from `first` down to `last`."""
    return Course("decay", first, last)


def geometric(first: float, last: float) -> Course:
    """Return the schedule with a constant factor per step from `first` to `last`."""
    return Course("geometric", first, last)


_TAU = constant(TAU)


@dataclass(frozen=True, repr=False)
class Preset:
    """The numbers of one attack.

    Attributes:
        interpreter: the interpreter with the surrogate the numbers were found for; None is plain
            PGD.
        warm_steps: steps of plain PGD before the joint stage.
        steps: joint steps.
        step_size: n -> optax schedule of α over n joint steps, in pixel values (see
            `Threat.steepest`).
        balance: n -> optax schedule of λ over n joint steps.
        tau: n -> optax schedule of the surrogate's width.
        map_loss: ℓ_int; λ weighs a sum of squares in eq. 3, and a mean in the released CAM code.
        momentum: of the joint stage (see `descent.Options`); None is the optimiser of the threat
            model.
        second_moment: decay of Adam's mean of squares, joint stage; 0 is none (see
            `descent.Options`).
        smoothing: label smoothing, joint stage.
        yielding, least_weight: how fast, and how far, the map term gives way where the prediction
            fails (see `descent.Options`).
        calibrated: an image is fooled once f_t reaches the confidence that the network has in the
            benign image, where that is below .8; else at .8 throughout.
        enough: map L1 at which an image is done, and costs no more steps; 0 takes all steps. Of
            several interpreters their mean.
        rounded: take joint steps at 8-bit images (see `descent.Options`).
        score_every: 0 returns the last iterate; any other number the best, compared after every so
            many joint steps by the explained map if the interpreter is not `faithful`. Else, and in
            plain PGD, the number does not matter: every iterate is compared, at no cost, by the
            step that starts from it. A comparison of an interpreter with a `solver` is a complete
            solve, from which the memory of the surrogate starts anew.
        warm_step_size: α of the warm start.
        parts: of a joint attack the presets of each interpreter alone, whose balance, tau, map_loss
            and smoothing count; its own interpreter is then None.
        goal: what the adversary wants of the class, of `descent.GOALS` (see `descent.Options`).
        restarts: number of attacks on each image, all but the first from random changes half as
            large as the threat model allows; the best one counts.
    """

    interpreter: Interpreter | None
    warm_steps: int
    steps: int
    step_size: Schedule
    balance: Schedule
    tau: Schedule = _TAU
    map_loss: MapLoss = losses.map_l2
    momentum: float | None = None
    second_moment: float = 0.0
    smoothing: float = 0.0
    yielding: float = 0.0
    least_weight: float = LEAST_WEIGHT
    calibrated: bool = False
    enough: float = 0.0
    rounded: bool = False
    score_every: int = 0
    warm_step_size: float = PIXEL
    parts: tuple["Preset", ...] = ()
    goal: str = "targeted"
    restarts: int = 1

    def __repr__(self) -> str:
        return shown(self)

    @property
    def interpreters(self) -> tuple[Interpreter, ...]:
        """Return the interpreters under attack: none, one, or those of the parts."""
        each = (part.interpreter for part in self.parts or (self,))
        return tuple(one for one in each if one is not None)


def paper_grad_balance(n: int) -> optax.Schedule:
    """Return λ = .001, .004, .01, .05 for 301, 201, 101, 101 of 704 steps, stretched to n steps.

    The released code, for GRAD.
    """
    factors: dict[int, float] = {}
    for at, factor in ((301, 4.0), (502, 2.5), (603, 5.0)):
        step = round(at * n / 704)
        # in a short run several changes may fall on one step
        factors[step] = factors.get(step, 1.0) * factor
    return optax.piecewise_constant_schedule(0.001, factors)


_PGD = Preset(None, warm_steps=0, steps=1200, step_size=constant(PIXEL), balance=constant(0.0))
_PAPER_CAM = Preset(
    cam_interpreter(),
    warm_steps=400,
    steps=1200,
    step_size=constant(PIXEL),
    balance=ramp(5.0, 10.0),
    map_loss=losses.map_mse,
)
_PAPER_GRAD = Preset(
    smooth_relu_grad_interpreter(),
    warm_steps=300,
    steps=704,
    step_size=constant(PIXEL),
    balance=paper_grad_balance,
    smoothing=0.05,
    score_every=10,
)
# The numbers of `default` were found here by search
_DEFAULT_CAM = Preset(
    cam_interpreter(),
    warm_steps=0,
    steps=150,
    # a constant sign step comes no closer to a map than its own size (docs/method.md, the attack)
    step_size=decay(PIXEL / 2, PIXEL / 40),
    balance=ramp(300.0, 600.0),
    map_loss=losses.map_mse,
    momentum=0.85,
    smoothing=0.02,
    # a weight falls to its bound, .01, in 44 steps that miss the target
    yielding=0.1,
    # scored as returned: an 8-bit image
    rounded=True,
    score_every=1,
)
_DEFAULT_GRAD = replace(
    _DEFAULT_CAM,
    interpreter=grad_interpreter(),
    steps=300,
    step_size=decay(0.35 * PIXEL, PIXEL / 40),
    balance=ramp(1000.0, 2000.0),
    # from wide to narrow: at any width the map is the true one, only its second derivative is not
    tau=geometric(0.1, 5e-4),
    momentum=0.6,
)
# The released constants and the literal formula, except for two things that the loop does not
# have: the released code steps along the normalised gradient, not along signs (eq. 4), and bisects
# between the two losses, where λ of CAM stands here
_PAPER_MASK = replace(
    _PAPER_CAM,
    interpreter=mask_interpreter(
        steps=300,
        learning_rate=0.1,
        objective=MaskObjective(l1=0.0784, tv=7.84, blur=3.5 / 224, score=losses.probability),
        free=4,
        ahead=4,
    ),
    steps=1000,
    score_every=50,
)
_DEFAULT_MASK = replace(
    _DEFAULT_CAM,
    interpreter=mask_interpreter(),
    steps=100,
    # ten times the weight of CAM, found by search like the others
    balance=ramp(3000.0, 6000.0),
    tau=constant(0.03),
    score_every=10,
)
# as GRAD, but for the number of steps, since each costs more, and of those between comparisons, of
# which each costs 16 gradients
_DEFAULT_IG = replace(
    _DEFAULT_GRAD, interpreter=integrated_gradients_interpreter(), steps=120, score_every=10
)
_DEFAULT_SMOOTH = replace(
    _DEFAULT_GRAD, interpreter=smooth_grad_interpreter(), steps=120, score_every=20
)
# a look at all positions costs three steps, so there are few. A small weight first: with all of
# CAM's the map of a network that withstands the attack wins, and its class is never reached
_DEFAULT_OCCLUSION = replace(
    _DEFAULT_CAM,
    interpreter=occlusion_interpreter(),
    steps=100,
    balance=ramp(3.0, 100.0),
    score_every=25,
)
# As few steps as will do, so each is long. All but MASK and occlusion spend about 56 gradients:
# interpreters of equal cost share one run of plain PGD
_QUICK_STEPS = {
    "pgd": 56,
    "grad": 28,
    "cam": 56,
    "grad_cam": 56,
    "rts": 17,
    "mask": 12,
    "input_x_gradient": 28,
    "integrated_gradients": 8,
    "smooth_grad": 8,
    "guided_backprop": 19,
    "lrp": 14,
    "grad_cam_pp": 56,
    "layer_cam": 56,
    "occlusion": 20,
    "attention_rollout": 56,
    "gradient_rollout": 28,
}

PRESETS: dict[str, dict[str, Preset]] = {
    "paper": {
        "pgd": _PGD,
        "grad": _PAPER_GRAD,
        "cam": _PAPER_CAM,
        "grad_cam": replace(_PAPER_CAM, interpreter=grad_cam_interpreter()),
        "rts": replace(_PAPER_CAM, interpreter=rts_interpreter(), warm_steps=300, steps=1000),
        "mask": _PAPER_MASK,
    },
    "default": {
        "pgd": replace(_DEFAULT_CAM, interpreter=None, balance=constant(0.0), smoothing=0.0),
        "grad": _DEFAULT_GRAD,
        "cam": _DEFAULT_CAM,
        "grad_cam": replace(_DEFAULT_CAM, interpreter=grad_cam_interpreter()),
        "rts": replace(_DEFAULT_CAM, interpreter=rts_interpreter()),
        "mask": _DEFAULT_MASK,
        "input_x_gradient": replace(_DEFAULT_GRAD, interpreter=input_x_gradient_interpreter()),
        "integrated_gradients": _DEFAULT_IG,
        "smooth_grad": _DEFAULT_SMOOTH,
        "guided_backprop": replace(
            _DEFAULT_GRAD, interpreter=guided_backprop_interpreter(), steps=200
        ),
        "lrp": replace(_DEFAULT_GRAD, interpreter=lrp_interpreter(), steps=150),
        "grad_cam_pp": replace(_DEFAULT_CAM, interpreter=grad_cam_pp_interpreter()),
        "layer_cam": replace(_DEFAULT_CAM, interpreter=layer_cam_interpreter()),
        "occlusion": _DEFAULT_OCCLUSION,
        "attention_rollout": replace(_DEFAULT_CAM, interpreter=attention_rollout_interpreter()),
        "gradient_rollout": replace(_DEFAULT_GRAD, interpreter=gradient_rollout_interpreter()),
    },
}
# What a table cannot know is measured on what is attacked (docs/method.md, `auto`): the threshold of
# f_t on the benign image, the pace of a pixel on its own gradients, the length of a step on the
# radius, the widths of GRAD on how far the attack moves a neuron
_MEASURED: dict[str, Any] = {"least_weight": 1e-3, "calibrated": True, "enough": PIXEL / 2}


def _auto(name: str, known: Preset) -> Preset:
    """Return the numbers of `auto` for an interpreter from those of `default`."""
    if known.interpreter is None:  # plain PGD: both are compared with the same
        return known
    balance: Any = known.balance
    second_order, share = "act" in known.interpreter.needs, 0.8
    # MASK, IG, SmoothGrad: the gradient is that of another map than the analyst's, and an Adam that
    # follows it closely ends farther away
    if second_order and not known.interpreter.faithful:
        return replace(known, **_MEASURED)
    if name == "grad":
        share, interpreter = 2 / 3, grad_interpreter(tau="matched", spread=True)
        known = replace(known, interpreter=interpreter)
    return replace(
        known,
        steps=round(share * known.steps),
        second_moment=0.95,
        step_size=decay((1.0 if second_order else 1.5) * PIXEL, PIXEL / 20),
        # little at first, so that the class is reached, and more than enough at last
        balance=ramp(balance.first / (1 if second_order else 3), 5 * balance.last),
        **_MEASURED,
    )


PRESETS["auto"] = {name: _auto(name, known) for name, known in PRESETS["default"].items()}
PRESETS["quick"] = {
    name: replace(PRESETS["default"][name], steps=steps, step_size=decay(4 * PIXEL, PIXEL / 5))
    for name, steps in _QUICK_STEPS.items()
}
PRESETS["quick"]["smooth_grad"] = replace(
    PRESETS["quick"]["smooth_grad"], interpreter=smooth_grad_interpreter(draws=2)
)
# a map after half of the usual 50 solver steps
PRESETS["quick"]["mask"] = replace(
    PRESETS["quick"]["mask"], interpreter=mask_interpreter(steps=25, free=1), score_every=6
)


def _released_flow(preset: Preset) -> Preset:
    """Return a preset with the numbers of steps of the released StAdv code.

    Its learning rate is that of `threats.flow` at steps of one pixel value.
    """
    if preset.interpreter is None:
        return replace(preset, steps=800)
    return replace(preset, warm_steps=200, steps=600)


def _at_least_300_steps(preset: Preset) -> Preset:
    return replace(preset, steps=max(preset.steps, 300))


# threat model -> preset -> a function that adapts the numbers of an interpreter. In `default` a
# flow comes as close to a map as a change of pixel values does, but takes longer
THREAT_ADJUSTMENTS: dict[str, dict[str, Callable[[Preset], Preset]]] = {
    "flow": {"paper": _released_flow, "default": _at_least_300_steps}
}


def resolve(
    preset: str | Preset | Mapping[str, Preset],
    interpreter: str | Interpreter | Joint | None,
    *,
    threat: Threat | None = None,
    warm_steps: int | None = None,
    steps: int | None = None,
    goal: str | None = None,
    restarts: int | None = None,
) -> Preset:
    """Return a preset with the caller's interpreter, goal and numbers of steps in it.

    Args:
        preset: a key of `PRESETS`; presets by interpreter, "pgd" among them, as `PRESETS` holds and
            `read` gives them; or a `Preset`.
        interpreter: a key of `interpreters.INTERPRETERS` (with a `Preset`: the name of its
            interpreter); an `Interpreter`, which takes the numbers of the preset, or those of its
            name, or of the most similar one: of MASK if it is a descent, of GRAD if it
            differentiates the network (`needs` names "act"), else of CAM; a `Joint` of these, which
            a `Preset` with parts has already; or None for plain PGD.
        threat: the threat model; a preset called by its name is adapted to some
            (`THREAT_ADJUSTMENTS`).
        warm_steps, steps, goal, restarts: replace those of the preset; its schedules stretch with
            `steps`.

    Raises:
        ValueError: for an unknown preset, interpreter or goal, a negative number of steps, or no
            attack at all.
    """
    if isinstance(interpreter, Joint):
        if not (isinstance(preset, Preset) and preset.parts):
            preset = _together(
                resolve(preset, one, threat=threat) for one in interpreter.interpreters
            )
    elif isinstance(preset, Preset):
        name = None if preset.interpreter is None else preset.interpreter.name
        if isinstance(interpreter, str) and interpreter != name:
            raise ValueError(f"interpreter {interpreter!r} is not that of the preset, {name!r}")
    else:
        known = look_up(PRESETS, "preset", preset) if isinstance(preset, str) else preset
        named = {name: numbers for name, numbers in known.items() if name != "pgd"}
        # the paper has no numbers for some of ours: they are then as good as a user's own
        if isinstance(interpreter, str) and interpreter not in named:
            interpreter = look_up(INTERPRETERS, "interpreter", interpreter)()
        name = interpreter.name if isinstance(interpreter, Interpreter) else interpreter
        if isinstance(interpreter, Interpreter) and name not in named:
            name = "grad" if "act" in interpreter.needs else "cam"
            name = name if interpreter.solver is None else "mask"
        adjustments = THREAT_ADJUSTMENTS.get(threat.name, {}) if threat else {}
        adjust = adjustments.get(preset) if isinstance(preset, str) else None
        chosen = known["pgd"] if name is None else look_up(named, "interpreter", name)
        chosen = adjust(chosen) if adjust else chosen
        if preset == "auto" and threat is not None and threat.stride is None:
            pace = resolve("default", name, threat=threat)
            chosen = replace(chosen, second_moment=0.0, steps=pace.steps, step_size=pace.step_size)
        preset = chosen
    if not isinstance(interpreter, str | Joint):
        preset = replace(preset, interpreter=interpreter)
    counts = {"warm_steps": (warm_steps, 0), "steps": (steps, 0), "restarts": (restarts, 1)}
    changes: dict[str, Any] = {}
    for key, (value, least) in counts.items():
        if value is not None:
            if value != int(value) or value < least:
                raise ValueError(f"{key} = {value} must be a whole number, {least} or more")
            changes[key] = int(value)
    if goal is not None:
        changes["goal"] = _goal(goal)
        changes["parts"] = tuple(replace(part, goal=goal) for part in preset.parts)
    return replace(preset, **changes)


def _goal(value: str) -> str:
    if value not in GOALS:
        raise ValueError(f"goal {value!r} is not one of {', '.join(GOALS)}")
    return value


def _together(presets: Iterable[Preset]) -> Preset:
    """Return the preset of a joint attack: each part's own, and the pace of the slowest."""
    parts = tuple(presets)
    slowest = max(parts, key=attrgetter("steps"))
    momenta = [part.momentum for part in parts if part.momentum is not None]
    return replace(
        slowest,
        interpreter=None,
        warm_steps=max(part.warm_steps for part in parts),
        # directions of several terms agree less: half as many steps again, and the longest memory,
        # bring each map to what its own attack leaves (docs/method.md, several interpreters)
        steps=math.ceil(1.5 * slowest.steps),
        momentum=max(momenta, default=None),
        score_every=max(part.score_every for part in parts),
        balance=constant(0.0),
        tau=_TAU,
        parts=parts,
    )


def to_dict(preset: Preset) -> dict[str, Any]:
    """Return all numbers of a preset as JSON, functions by their names; inverse of `from_dict`."""
    numbers = {field.name: _plain(getattr(preset, field.name)) for field in fields(preset)}
    if not preset.parts:
        del numbers["parts"]
    return numbers


def _plain(value: Any) -> Any:
    if isinstance(value, Interpreter):
        if value.made is None:
            return {"kind": value.name}
        kind = value.made.function.__name__.removesuffix("_interpreter")
        return {"kind": kind} | {name: _plain(option) for name, option in value.made.options}
    if isinstance(value, Course):
        return value.first if value.shape == "constant" else asdict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    if isinstance(value, tuple):
        return [to_dict(part) for part in value]
    return shown(value) if callable(value) else value


def from_dict(name: str, numbers: Mapping[str, Any]) -> Preset:
    """Return the preset of numbers as `to_dict` writes them; the others are those of `default`.

    Args:
        name: a key of `PRESETS["default"]`: "pgd" or an interpreter.
        numbers: by the names of the attributes of `Preset`. A schedule is a number, or shape, first
            and last of a `Course`; an interpreter has a kind, a key of `interpreters.FACTORIES`,
            and its options.

    Raises:
        ValueError: names what is unknown or out of its range.
    """
    base = look_up(PRESETS["default"], "preset of", name)
    known = {field.name: getattr(base, field.name) for field in fields(base)}
    del known["parts"]  # a joint preset is made of those of its interpreters
    changes: dict[str, Any] = {}
    for key, value in numbers.items():
        look_up(known, f"{name}: number", key)
        try:
            changes[key] = _read(key, value, known[key])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {key} = {json.dumps(value)}: {error}") from None
    return replace(base, **changes)


def _read(key: str, value: Any, default: Any) -> Any:
    """Return the attribute of a `Preset` for a value of JSON."""
    if key == "interpreter":
        return _read_interpreter(value, default)
    if key == "map_loss":
        return look_up({"map_l2": losses.map_l2, "map_mse": losses.map_mse}, "it", value)
    if key in ("step_size", "balance", "tau"):
        return paper_grad_balance if value == "paper_grad_balance" else _read_course(value)
    if key == "momentum" and value is None:
        return None
    if key == "goal":
        return _goal(value)
    if key == "restarts" and value == 0:
        raise ValueError("must be 1 or more")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    kind, word = (int, "whole") if isinstance(default, int) else (int | float, "finite")
    # a bool is an int to Python
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < math.inf:
        raise ValueError(f"must be a {word} number, 0 or more")
    if key in ("momentum", "second_moment", "smoothing", "yielding") and value >= 1:
        raise ValueError("must be below 1")
    return value


def _read_course(value: Any) -> Course:
    course = constant(value) if isinstance(value, int | float) else Course(**value)
    ends = course.first, course.last
    if course.shape not in SHAPES or not all(
        isinstance(end, int | float) and 0 <= end < math.inf for end in ends
    ):
        raise ValueError(
            f"must be a number, or shape ({', '.join(SHAPES)}), first and last, "
            "finite and not negative"
        )
    if course.shape in ("decay", "geometric") and not min(ends) > 0:
        raise ValueError("first and last must be above 0")
    return course


def _read_interpreter(value: Any, default: Interpreter | None) -> Interpreter | None:
    if default is None:
        if value is not None:
            raise ValueError("plain PGD has none")
        return None
    options = dict(value)
    kind = options.pop("kind", default.name)
    if isinstance(options.get("act"), str):
        raise ValueError("act is a function, which only Python can give")
    if "score" in options:
        options["score"] = look_up(losses.SCORES, "score", options["score"])
    if objective := options.get("objective"):
        score = objective.get("score")
        options["objective"] = MaskObjective(**objective)._replace(
            score=score and look_up(losses.SCORES, "score", score)
        )
    made = look_up(FACTORIES, "kind", kind)(**options)
    if made.name != default.name:
        raise ValueError(f"must be a kind of {default.name}")
    return made


def read(path: str | os.PathLike[str]) -> dict[str, Preset]:
    """Read the presets of a JSON file: interpreter (or "pgd") -> numbers as for `from_dict`.

    Interpreters that are not in the file have the presets of `default`.

    Raises:
        ValueError: names the file, and what is wrong in it.
    """
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(written, dict) or not all(
            isinstance(numbers, dict) for numbers in written.values()
        ):
            raise ValueError("must be an object of objects: interpreter, then its numbers")
        return PRESETS["default"] | {
            name: from_dict(name, numbers) for name, numbers in written.items()
        }
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None


def look_up(table: Mapping[str, T], what: str, name: str) -> T:
    """Return the entry of a table.

    Raises:
        ValueError: for an unknown name; lists the valid ones.
    """
    if name not in table:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(table)}")
    return table[name]
