"""The pure core: a warm start by plain PGD, the joint descent, the best iterate kept. Nothing here
is checked.

`craft` works on a batch of problems, under `jit` as a part of a larger program (adversarial
training), and on sharded problems; `adv2_jax.attack` checks once what it is given and crafts a
batch after the other.
"""

import math
import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax import losses
from adv2_jax.capabilities import logits_of
from adv2_jax.descent import (
    Driver,
    Info,
    Numbers,
    OnStep,
    Options,
    Problem,
    State,
    by_host,
    descend,
    image_of,
    init,
    keep_better,
    score,
    solve,
)
from adv2_jax.interpreters import Explain, Solver
from adv2_jax.presets import Preset, Schedule, constant
from adv2_jax.threats import Params, Threat
from adv2_jax.types import Classifier, Image, Label, Logits, Map


class Crafted(NamedTuple):
    """What an attack on a batch of B images found.

    Attributes:
        params: to be delivered: parameters of the threat model, a pytree whose leaves have a
            leading axis [B].
        last: the parameters where the descent ended.
        curves: what the steps reported for the iterates they started from, [B, warm steps + joint
            steps].
        pictures: the 8-bit images in [0, 1] of the first M problems at `snapshot_steps`, the last
            those delivered, [S, M, H, W, 3]; None unless asked for.
    """

    params: Params
    last: Params
    curves: Info
    pictures: Array | None


class Stages(NamedTuple):
    """What an attack is made of besides numbers. Static under `jit`.

    Attributes:
        warm, joint: options of the steps.
        scorer: the explained map, by which iterates are scored after each chunk of steps; None
            where steps score them.
        solver: of the interpreter.
        keeps_best: whether the best iterate is delivered.
        cuts: the numbers of joint steps at which chunks begin and end.
        slots: for each chunk the place of the picture that is taken at its end, out of range for
            none.
        pictures: how many images to take pictures of, and how often.
    """

    warm: Options
    joint: Options
    scorer: Explain | None
    solver: Solver | None
    keeps_best: bool
    cuts: tuple[int, ...]
    slots: tuple[int, ...]
    pictures: tuple[int, int]


def craft(
    model: Classifier,
    problems: Problem,
    preset: Preset,
    threat: Threat,
    *,
    driver: Driver = "auto",
    on_step: OnStep | None = None,
    pictured: int = 0,
) -> Crafted:
    """Attack a batch of images; pure and unchecked.

    On an accelerator, and under `jit`, the whole of it is one program of `lax.fori_loop`s: one
    compilation for each model architecture, batch shape, threat and preset, whatever the numbers of
    its schedules.

    Args:
        model: a pytree with what the interpreter needs; leaves that are not arrays go through
            `classifier.static_leaves` first.
        problems: images in [0, 1], targets, target maps and keys, with a leading axis [B].
        preset: the numbers; its interpreter is the one attacked, None is plain PGD.
        threat: what may be changed.
        driver: "auto", "fori" or "host" (see `descent.drive`).
        on_step: called with the number of steps newly done; not under `jit`.
        pictured: of how many images to take pictures on the way.
    """
    schedules = (
        tabulate(preset.warm_steps, constant(preset.warm_step_size), constant(0), constant(0)),
        tabulate(preset.steps, preset.step_size, preset.balance, preset.tau),
    )
    stages = _stages(preset, threat, min(pictured, len(problems.target)))
    if by_host(driver, (model, problems)):
        return _craft(model, problems, schedules, stages, "host", on_step)
    leaves, structure = jax.tree.flatten(model)
    crafted = _compiled(
        leaves, problems, jax.device_put(schedules), structure=structure, stages=stages
    )
    if on_step:
        jax.block_until_ready(crafted)
        on_step(preset.warm_steps + preset.steps)
    return crafted


@partial(jax.jit, static_argnames=("structure", "stages"))
def _compiled(
    leaves: list[Array],
    problems: Problem,
    schedules: tuple[Numbers, Numbers],
    *,
    structure: Any,
    stages: Stages,
) -> Crafted:
    return _craft(jax.tree.unflatten(structure, leaves), problems, schedules, stages, "fori", None)


def _craft(
    model: Classifier,
    problems: Problem,
    schedules: tuple[Numbers, Numbers],
    stages: Stages,
    driver: Driver,
    on_step: OnStep | None,
) -> Crafted:
    run = partial(descend, model, problems, driver=driver, on_step=on_step)
    m, many = stages.pictures
    pictures = (
        jax.device_put(np.zeros((many, m, *np.shape(problems.image)[1:]), np.float32))
        if m
        else None
    )

    def picture(pictures: Array | None, slot: Any, params: Params) -> Array | None:
        if pictures is None:
            return None
        place = slot if isinstance(slot, Array) else jax.device_put(np.int32(slot))
        return _photograph(pictures, place, problems, params, stages.warm.threat)

    states = _start(problems, None, None, stages.warm)
    pictures = picture(pictures, 0, states.params)
    states, warm = run(states, schedules[0], stages.warm)
    pictures = picture(pictures, 1 if len(schedules[0].alpha) else 0, states.params)
    images = images_of(problems, states.params, stages.warm.threat, True)
    states = _start(
        problems,
        states.params,
        solved(model, images, problems.target, stages.solver, driver),
        stages.joint,
    )

    def chunk(c: Any, carry: tuple[State, Info, Array | None]) -> tuple[State, Info, Array | None]:
        states, curves, pictures = carry
        states, info = run(states, schedules[1], stages.joint, span=(cuts[c], cuts[c + 1]))
        if stages.scorer is not None:
            states = _rescore(
                model, problems, states, stages.joint, stages.scorer, stages.solver, driver
            )
        # each report is a number at its own steps, and 0 at those of other chunks
        return (
            states,
            jax.tree.map(operator.add, curves, info),
            picture(pictures, slots[c], states.params),
        )

    cuts: Any = stages.cuts
    slots: Any = stages.slots
    joint = jax.tree.map(lambda values: np.zeros((len(values), cuts[-1]), values.dtype), warm)
    if driver == "host":
        for c in range(len(slots)):
            states, joint, pictures = chunk(c, (states, joint, pictures))
    elif slots:
        joint = jax.eval_shape(
            lambda states: run(states, schedules[1], stages.joint, span=(0, 0))[1], states
        )
        joint = jax.tree.map(lambda values: jnp.zeros(values.shape, values.dtype), joint)
        cuts, slots = jnp.array(cuts), jnp.array(slots)
        states, joint, pictures = jax.lax.fori_loop(
            0, len(stages.slots), chunk, (states, joint, pictures)
        )
    params = states.best if stages.keeps_best else states.params
    pictures = picture(pictures, many - 1, params)  # what is delivered need not be the last iterate
    curves = jax.tree.map(
        lambda *parts: np.concatenate(parts, 1) if driver == "host" else jnp.concatenate(parts, 1),
        warm,
        joint,
    )
    return Crafted(params, states.params, curves, pictures)


def scores_apart(preset: Preset) -> bool:
    """Whether iterates are scored by the explained map, drawn between chunks of steps, and not by the steps themselves."""
    return (
        preset.interpreter is not None
        and not preset.interpreter.faithful
        and preset.score_every > 0
    )


def snapshot_steps(preset: Preset) -> list[int]:
    """About eight steps of an attack, the first and the last among them, at which the iterate is
    worth a look.

    The joint steps between two are as many each time where that can be.
    """
    unit = preset.score_every if scores_apart(preset) else 1
    units = math.ceil(preset.steps / unit)
    parts = next((k for k in (7, 8, 6, 9, 5) if units % k == 0), 7)
    stride, total = math.ceil(units / parts) * unit, preset.warm_steps + preset.steps
    return sorted({0, *(range(preset.warm_steps, total, stride) if stride else ()), total})


def _cuts(preset: Preset, pictured: bool) -> list[int]:
    """The numbers of joint steps after which the descent pauses: to score the iterates, or to look at them."""
    scored = (
        range(preset.score_every, preset.steps, preset.score_every) if scores_apart(preset) else ()
    )
    seen = [step - preset.warm_steps for step in snapshot_steps(preset)] if pictured else []
    return sorted({0, preset.steps, *(step for step in (*scored, *seen) if step > 0)})


def _stages(preset: Preset, threat: Threat, pictured: int) -> Stages:
    interpreter, cuts = preset.interpreter, tuple(_cuts(preset, pictured > 0))
    looks = snapshot_steps(preset)
    ends = (preset.warm_steps + end for end in cuts[1:])
    return Stages(
        Options(threat),
        joint_options(preset, threat),
        interpreter.explain if interpreter is not None and scores_apart(preset) else None,
        None if interpreter is None else interpreter.solver,
        preset.score_every > 0,
        cuts,
        tuple(looks.index(end) if end in looks else len(looks) for end in ends),
        (pictured, len(looks)) if pictured > 0 else (0, 0),
    )


@partial(jax.jit, static_argnames="options")
def _start(problems: Problem, params: Params, memory: Any, options: Options) -> State:
    return jax.vmap(lambda problem, *start: init(problem, options, *start))(
        problems, params, memory
    )


def tabulate(n: int, *schedules: Schedule) -> Numbers:
    """Schedules as numbers: no retrace for another schedule."""
    # few lengths, for each compiles its own small programs
    places = np.arange(max(math.ceil(n / 256), 1) * 256)
    with jax.transfer_guard("allow"):  # optax computes with numbers of the host
        return Numbers(
            *(jax.device_get(jax.vmap(schedule(n))(places))[:n] for schedule in schedules)
        )


def joint_options(preset: Preset, threat: Threat) -> Options:
    """What the joint steps of a preset are made of."""
    return Options(
        threat,
        None if preset.interpreter is None else preset.interpreter.surrogate,
        map_loss=preset.map_loss,
        momentum=preset.momentum,
        smoothing=preset.smoothing,
        yielding=preset.yielding,
        rounded=preset.rounded,
        keep_best=preset.score_every > 0 and not scores_apart(preset),
    )


def _rescore(
    model: Classifier,
    problems: Problem,
    states: State,
    options: Options,
    interpreter: Explain,
    solver: Solver | None,
    driver: Driver,
) -> State:
    """Scores the present iterates on the explained map of their 8-bit images; where a solver stands becomes the memory."""
    images = images_of(problems, states.params, options.threat, True)
    logits, maps, memory = look(model, images, problems.target, interpreter, solver, driver)
    return _kept(problems, states, logits, maps, options.confidence)._replace(memory=memory)


@partial(jax.jit, static_argnames=("threat", "rounded"))
def images_of(problems: Problem, params: Params, threat: Threat, rounded: bool = False) -> Array:
    """The images [B, H, W, 3] that parameters make, in float32 or as their 8-bit images."""
    return jax.vmap(lambda problem, p: image_of(p, problem.image, threat, rounded=rounded))(
        problems, params
    )


@partial(jax.jit, static_argnames="threat")
def _photograph(
    pictures: Array, slot: Array, problems: Problem, params: Params, threat: Threat
) -> Array:
    few = jax.tree.map(lambda values: values[: pictures.shape[1]], (problems, params))
    return pictures.at[slot].set(images_of(*few, threat, True), mode="drop")


@partial(jax.jit, static_argnames="confidence")
def _kept(problems: Problem, states: State, logits: Array, maps: Array, confidence: float) -> State:
    def one(problem: Problem, state: State, logits: Logits, m: Map) -> State:
        f_t = losses.probability(logits, problem.target)
        return keep_better(state, score(f_t, jnp.abs(m - problem.target_map).mean(), confidence))

    return jax.vmap(one)(problems, states, logits, maps)


def look(
    model: Classifier,
    images: Array,
    labels: Array,
    interpreter: Explain,
    solver: Solver | None,
    driver: Driver,
) -> tuple[Array, Array, Any]:
    """Logits and maps of a batch, and the memory of its solver, as `solved`."""
    memory = solved(model, images, labels, solver, driver)
    return *_explain_batch(model, images, labels, memory, interpreter, solver), memory


def solved(
    model: Classifier, images: Array, labels: Array, solver: Solver | None, driver: Driver
) -> Any:
    """Memory at the end of a solver, None without one."""
    return None if solver is None else solve(model, images, labels, solver, driver=driver)


@partial(jax.jit, static_argnames=("interpreter", "solver"))
def _explain_batch(
    model: Classifier,
    images: Array,
    labels: Array,
    memory: Any,
    interpreter: Explain,
    solver: Solver | None,
) -> tuple[Array, Array]:
    one = partial(explain_one, model, interpreter=interpreter, solver=solver)
    return jax.vmap(one)(images, labels, memory)


@partial(jax.jit, static_argnames=("interpreter", "solver"), inline=True)
def explain_one(
    model: Classifier,
    image: Image,
    label: Label,
    memory: Any,
    interpreter: Explain,
    solver: Solver | None,
) -> tuple[Logits, Map]:
    """Logits and map of one image; `memory` is where its solver ends, if it has one."""
    m = interpreter(model, image, label) if solver is None else solver.read(memory)
    # float32, whatever the network computes in: NumPy knows no bfloat16
    return logits_of(model, image).astype(jnp.float32), m.astype(jnp.float32)
