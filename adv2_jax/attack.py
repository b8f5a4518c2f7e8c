"""The attack: a warm start by plain PGD, the joint descent, the best iterate kept, the result rounded to 8 bits and scored."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from adv2_jax import losses, threats
from adv2_jax.classifier import num_classes
from adv2_jax.descent import (
    Driver,
    Info,
    Numbers,
    OnStep,
    Options,
    Problem,
    State,
    descend,
    init,
    keep_better,
    round_to_8_bits,
    score,
    solve,
)
from adv2_jax.interpreters import INTERPRETERS, Explain, Interpreter, Solver
from adv2_jax.presets import Plan, Preset, constant, look_up, resolve
from adv2_jax.threats import Params, Threat
from adv2_jax.types import Classifier, Image, Label, Logits, Map

T = TypeVar("T")


class Result(NamedTuple):
    """A finished attack on N images. `float_*` is what it was before rounding; everything else is measured on the 8-bit images.

    Attributes:
        images: uint8 [N, H, W, 3], adversarial.
        logits: [N, K].
        maps: [N, h, w] in [0, 1], explained for the targets; empty without an interpreter.
        float_images: [N, H, W, 3] in [0, 1].
        float_logits: [N, K].
        float_maps: [N, h, w].
        gradient_evaluations: gradients through the network spent on each image, scoring for keep-best included.
        params: of the threat model, a pytree whose leaves have a leading axis [N].
        curves: what the n steps, those of the warm start too, reported for the iterates they started from, [N, n]; `map_l1` is
            not a number where a step draws no map.
        snapshots: uint8 [M, S, H, W, 3], the first M images at `snapshot_steps`; the last is what is delivered.
    """

    images: np.ndarray
    logits: np.ndarray
    maps: np.ndarray
    float_images: np.ndarray
    float_logits: np.ndarray
    float_maps: np.ndarray
    gradient_evaluations: int
    params: Params
    curves: Info
    snapshots: np.ndarray


def attack(
    model: Classifier,
    images: ArrayLike,
    targets: ArrayLike,
    target_maps: ArrayLike | None = None,
    *,
    interpreter: str | Interpreter | None = "cam",
    threat: Threat | None = None,
    preset: str | Preset = "default",
    warm_steps: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    driver: Driver = "auto",
    on_step: OnStep | None = None,
    snapshots: int = 0,
) -> Result:
    """Fool the classifier and the interpreter at once.

    Args:
        model: any pytree with `features` and `head` (`adv2_jax.types.Classifier`).
        images: benign, uint8 [N, H, W, 3] or floating point in [0, 1].
        targets: integers [N], the classes to be predicted.
        target_maps: [N, h, w] in [0, 1], the maps to be shown. Plain PGD needs none.
        interpreter: "grad", "cam", "grad_cam", "rts" (whose model is a `models.Masked`), "mask", an `Interpreter` of your own, or
            None for plain PGD on ℓ_prd. With a `Preset` of your own a name must be that of its interpreter.
        threat: what may be changed: `threats.linf` (0.031 unless given), `l2`, `flow`, `linf_flow`, or a `Threat` of your own.
        preset: "default", "paper", or a `Preset` of your own.
        warm_steps, steps: take the place of the preset's; its schedules stretch with `steps`.
        batch_size: images at a time. Changes memory and speed; no image sees its batch mates.
        driver: "auto", "fori" or "host" (see `descent.descend`).
        on_step: called with the number of steps newly done; `count_steps` says how many there will be.
        snapshots: of how many images, M or all if there are fewer, to keep what they were on the way.

    Returns:
        The adversarial images and what they do.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    threat = threats.linf() if threat is None else threat
    plan = resolve(preset, interpreter, threat=threat, warm_steps=warm_steps, steps=steps)
    _check_batch_size(batch_size)
    problems = _problems(model, images, targets, target_maps, plan.interpreter)
    n = len(problems.target)
    parts = [
        _attack_batch(model, batch, plan, threat, driver, on_step, min(snapshots, n) - i * batch_size)
        for i, batch in enumerate(batches(problems, batch_size))
    ]
    x, params, curves = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *(part[:3] for part in parts))
    _check_finite(x)  # steps along gradients that are not
    rounded = to_uint8(x)

    def look(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        interpreter = no_map if plan.interpreter is None else plan.interpreter
        return explain(model, seen, problems.target, interpreter=interpreter, batch_size=batch_size, driver=driver)

    taken = np.concatenate([part.snapshots for part in parts])
    return Result(rounded, *look(rounded), x, *look(x), gradient_evaluations(plan), params, curves, taken)


def no_map(model: Classifier, image: Image, label: Label) -> Map:
    """The explanation of no interpreter: a map of no pixels, [0, 0]."""
    return jnp.zeros((0, 0))


def explain(
    model: Classifier,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    interpreter: str | Interpreter | Explain,
    batch_size: int = 64,
    driver: Driver = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and maps of a set of images.

    Args:
        model: the classifier.
        images: uint8 [N, H, W, 3] or floating point in [0, 1].
        labels: integers [N], the classes to explain.
        interpreter: a key of `interpreters.INTERPRETERS`, an `Interpreter`, or a pure one-image function (model, image, label) ->
            map, which `jit` knows again only if it is the same object.
        batch_size: images at a time.
        driver: of an interpreter that is a descent itself: "auto", "fori" or "host" (see `descent.drive`).

    Returns:
        logits [N, K], maps [N, h, w] in [0, 1].

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    _check_batch_size(batch_size)
    x = check_images(images)
    inputs = x, _classes("labels", labels, model, x)
    if isinstance(interpreter, str):
        interpreter = look_up(INTERPRETERS, "interpreter", interpreter)()
    faces = (interpreter.explain, interpreter.solver) if isinstance(interpreter, Interpreter) else (interpreter, None)
    parts = [
        _look(model, jnp.asarray(to_float(images)), jnp.asarray(labels), *faces, driver)[:2]
        for images, labels in batches(inputs, batch_size)
    ]
    logits, maps = (np.concatenate(part)[: len(x)] for part in zip(*parts, strict=True))
    _check_finite(logits)
    return logits, maps


def map_shape(model: Classifier, shape: tuple[int, ...], interpreter: Interpreter) -> tuple[int, ...]:
    """h, w of the maps that an interpreter draws of images of a shape [H, W, 3]; nothing is computed."""
    image, label = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct((), np.int32)
    return jax.eval_shape(interpreter.explain, model, image, label).shape


def gradient_evaluations(plan: Preset) -> int:
    """Gradients through the network that a plan spends on each image, scoring for keep-best included.

    A step is one, the gradient of its loss, or as many as its interpreter's `cost`. Scoring is free where the step's own map is the
    explained one (a faithful surrogate), and one more where it is not. A solver takes one for each of its steps: before the
    joint stage, and whenever an iterate is scored.
    """
    cost, solver = 1 if plan.interpreter is None else plan.interpreter.cost, _solver(plan)
    solving = 0 if solver is None else solver.steps
    scoring = (1 + solving) * math.ceil(plan.steps / plan.keep_every) if _scores_apart(plan) else 0
    return plan.warm_steps + solving + cost * plan.steps + scoring


def count_steps(plan: Preset, n: int, batch_size: int) -> int:
    """Steps that `attack` reports through `on_step` for n images."""
    return math.ceil(n / min(batch_size, n)) * (plan.warm_steps + plan.steps)


def batches(arrays: T, size: int) -> Iterator[T]:
    """Batches of one size, so of one compilation; the last is filled up with its last entry."""
    n = len(jax.tree.leaves(arrays)[0])
    for start in range(0, n, min(size, n)):
        index = np.minimum(np.arange(start, start + min(size, n)), n - 1)
        yield jax.tree.map(itemgetter(index), arrays)


def to_float(images: ArrayLike) -> np.ndarray:
    """uint8 images, or floating point in [0, 1], as float32 [N, H, W, 3] in [0, 1].

    Raises:
        ValueError: as `check_images`.
    """
    x = check_images(images)
    return x.astype(np.float32) / 255 if x.dtype == np.uint8 else x.astype(np.float32)


def to_uint8(x: ArrayLike) -> np.ndarray:
    """Images in [0, 1] as 8-bit images."""
    return np.round(np.asarray(x) * 255).astype(np.uint8)


def check_images(images: ArrayLike) -> np.ndarray:
    """The images themselves, uint8 or floating point in [0, 1], as an array [N, H, W, 3].

    Raises:
        ValueError: for another type, shape or range, or not-a-number.
    """
    x = np.asarray(images)
    if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"images must be [N, H, W, 3] with N >= 1, got {list(x.shape)}")
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise ValueError(f"images must be uint8, or floating point in [0, 1], got {x.dtype}")
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], got {x.min()}..{x.max()}")
    return x


def _problems(
    model: Classifier,
    images: ArrayLike,
    targets: ArrayLike,
    target_maps: ArrayLike | None,
    interpreter: Interpreter | None,
) -> Problem:
    """The caller's arrays, checked and brought to one form."""
    x = to_float(images)
    t = _classes("targets", targets, model, x)
    if interpreter is None:
        return Problem(jnp.asarray(x), jnp.asarray(t), jnp.zeros((len(x), 1, 1)))
    expected = (len(x), *map_shape(model, x.shape[1:], interpreter))
    maps = np.zeros(()) if target_maps is None else np.asarray(target_maps, np.float32)
    if maps.shape != expected:
        raise ValueError(f"target_maps must be {list(expected)} for {interpreter.name}, got {list(maps.shape)}")
    if not (maps.min() >= 0 and maps.max() <= 1):
        raise ValueError(f"target_maps must lie in [0, 1], got {maps.min()}..{maps.max()}")
    return Problem(jnp.asarray(x), jnp.asarray(t), jnp.asarray(maps))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError("the network gives logits or gradients that are not finite numbers on these images")


def _classes(name: str, values: ArrayLike, model: Classifier, x: np.ndarray) -> np.ndarray:
    """Class indices as int32 [N], one for each image of x and in the model's range."""
    classes = np.asarray(values)
    if classes.shape != x.shape[:1] or classes.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [{len(x)}], one an image, got {classes.dtype} {list(classes.shape)}")
    k = num_classes(model, x.shape[1:])
    if classes.min() < 0 or classes.max() >= k:
        raise ValueError(f"{name} must lie in 0..{k - 1}, the model's classes, got {classes.min()}..{classes.max()}")
    return classes.astype(np.int32)


def _solver(plan: Preset) -> Solver | None:
    return None if plan.interpreter is None else plan.interpreter.solver


def _scores_apart(plan: Preset) -> bool:
    return plan.interpreter is not None and not plan.interpreter.faithful and plan.keep_every > 0


def snapshot_steps(plan: Preset) -> list[int]:
    """About eight steps of a plan, the first and the last among them, at which the iterate is worth a look.

    The joint steps between two are as many each time where that can be: a loop compiles once for each length.
    """
    unit = plan.keep_every if _scores_apart(plan) else 1
    units = math.ceil(plan.steps / unit)
    parts = next((k for k in (7, 8, 6, 9, 5) if units % k == 0), 7)
    stride, total = math.ceil(units / parts) * unit, plan.warm_steps + plan.steps
    return sorted({0, *(range(plan.warm_steps, total, stride) if stride else ()), total})


def _cuts(plan: Preset) -> list[int]:
    """The numbers of joint steps after which the descent pauses: to look at the iterates, or to score them."""
    scored = range(plan.keep_every, plan.steps, plan.keep_every) if _scores_apart(plan) else ()
    seen = (step - plan.warm_steps for step in snapshot_steps(plan))
    return sorted({step for step in (*scored, *seen) if step > 0})


class Attacked(NamedTuple):
    """A batch that is done: images [B, H, W, 3], not yet rounded, the parameters that make them, and what was seen on the way.

    `curves` are [B, n], `snapshots` uint8 [B, S, H, W, 3].
    """

    images: Array
    params: Params
    curves: Info
    snapshots: np.ndarray


def _attack_batch(
    model: Classifier, problems: Problem, plan: Preset, threat: Threat, driver: Driver, on_step: OnStep | None, pictured: int
) -> Attacked:
    """Warm start, joint stage and keep-best for one batch; snapshots of the first `pictured` images, if that is above 0."""

    def picture(params: Params) -> np.ndarray:
        return to_uint8(np.asarray(jax.vmap(threat.apply)(params, problems.image))[: max(pictured, 0)])

    def run(states: State, options: Options, schedule: Numbers) -> tuple[State, Info]:
        states, info = descend(model, problems, states, schedule, options, driver=driver, on_step=on_step)
        drawn = info.map_l1 if options.surrogate is not None else jnp.asarray(np.full(info.map_l1.shape, np.nan, np.float32))
        return states, info._replace(map_l1=drawn)

    warm, joint = Options(threat), joint_options(plan, threat)
    states = jax.vmap(lambda problem: init(problem, warm))(problems)
    looks, snapshots = snapshot_steps(plan), [picture(states.params)]
    states, info = run(states, warm, _tabulate(plan.warm_steps, constant(plan.warm_step_size), constant(0), constant(0)))
    curves = [info]
    if plan.warm_steps:
        snapshots.append(picture(states.params))
    memory = _solved(model, _seen(problems, states, threat), problems.target, _solver(plan), driver)
    states = jax.vmap(lambda problem, *start: init(problem, joint, *start))(problems, states.params, memory)
    numbers = _tabulate(plan.steps, plan.step_size, plan.balance, plan.tau)
    for start, stop in pairwise([0, *_cuts(plan)]):
        states, info = run(states, joint, Numbers(*(values[start:stop] for values in numbers)))
        curves.append(info)
        if plan.interpreter is not None and _scores_apart(plan):
            states = _rescore(model, problems, states, joint, plan.interpreter, driver, plan.reset)
        if plan.warm_steps + stop in looks:
            snapshots.append(picture(states.params))
    params = states.best if plan.keep_every else states.params
    snapshots[-1] = picture(params)  # what is delivered, which need not be the last iterate
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *curves)
    return Attacked(jax.vmap(threat.apply)(params, problems.image), params, whole, np.stack(snapshots, axis=1))


def _tabulate(n: int, *plans: Plan) -> Numbers:
    """Schedules as numbers: no retrace for another schedule."""
    return Numbers(*(jax.vmap(plan(n))(jnp.arange(n)) for plan in plans))


def joint_options(plan: Preset, threat: Threat) -> Options:
    """What the joint steps of a preset are made of."""
    return Options(
        threat,
        None if plan.interpreter is None else plan.interpreter.surrogate,
        map_loss=plan.map_loss,
        momentum=plan.momentum,
        smoothing=plan.smoothing,
        yielding=plan.yielding,
        rounded=plan.rounded,
        keep_best=plan.keep_every > 0 and not _scores_apart(plan),
    )


def _rescore(
    model: Classifier, problems: Problem, states: State, options: Options, interpreter: Interpreter, driver: Driver, reset: bool
) -> State:
    """Scores the present iterates on the explained map of their 8-bit images; what a solver finds may become the memory."""
    images = _seen(problems, states, options.threat)
    logits, maps, memory = _look(model, images, problems.target, interpreter.explain, interpreter.solver, driver)
    return _kept(problems, states, logits, maps, options.confidence)._replace(memory=memory if reset else states.memory)


@partial(jax.jit, static_argnames="threat")
def _seen(problems: Problem, states: State, threat: Threat) -> Array:
    """The 8-bit images [B, H, W, 3] of the present iterates."""
    return round_to_8_bits(jax.vmap(threat.apply)(states.params, problems.image))


@partial(jax.jit, static_argnames="confidence")
def _kept(problems: Problem, states: State, logits: Array, maps: Array, confidence: float) -> State:
    def one(problem: Problem, state: State, logits: Logits, m: Map) -> State:
        f_t = losses.probability(logits, problem.target)
        return keep_better(state, score(f_t, jnp.abs(m - problem.target_map).mean(), confidence))

    return jax.vmap(one)(problems, states, logits, maps)


def _look(
    model: Classifier, images: Array, labels: Array, interpreter: Explain, solver: Solver | None, driver: Driver
) -> tuple[Array, Array, tuple[Any, ...]]:
    """Logits and maps of a batch, and the memory of its solver, as `_solved`."""
    memory = _solved(model, images, labels, solver, driver)
    return *_explain_batch(model, images, labels, memory, interpreter, solver), memory


def _solved(model: Classifier, images: Array, labels: Array, solver: Solver | None, driver: Driver) -> tuple[Any, ...]:
    """(memory at the end of a solver,), or () without one."""
    return () if solver is None else (solve(model, images, labels, solver, driver=driver),)


@partial(jax.jit, static_argnames=("interpreter", "solver"))
def _explain_batch(
    model: Classifier, images: Array, labels: Array, memory: tuple[Any, ...], interpreter: Explain, solver: Solver | None
) -> tuple[Array, Array]:
    def one(image: Image, label: Label, memory: tuple[Any, ...]) -> tuple[Logits, Map]:
        m = interpreter(model, image, label) if solver is None else solver.read(*memory)
        # float32, whatever the network computes in: NumPy knows no bfloat16
        return model.head(model.features(image)).astype(jnp.float32), m.astype(jnp.float32)

    return jax.vmap(one)(images, labels, memory)
