"""The pure core of an attack: a warm start by plain PGD, then the joint descent; no checks.

`craft` works on a batch of problems, under `jit` as a part of a larger program (adversarial
training), and on sharded problems. `adv2_jax.attack` checks its arguments once and crafts batch
after batch.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adv2_jax import losses
from adv2_jax.capabilities import logits_of
from adv2_jax.descent import (
    CONFIDENCE,
    Driver,
    Info,
    Numbers,
    OnStep,
    Options,
    Problem,
    State,
    by_host,
    criterion,
    descend,
    image_of,
    init,
    is_done,
    keep_better,
    reaches,
    solve,
)
from adv2_jax.detectors import parts_of
from adv2_jax.interpreters import Explain, Init, Interpreter, Solver
from adv2_jax.presets import Preset, Schedule, constant
from adv2_jax.threats import Params, Threat
from adv2_jax.types import Classifier, Image, Label, Logits, Map

T = TypeVar("T")


class Crafted(NamedTuple):
    """The outcome of an attack on a batch of B images.

    Attributes:
        params: the best parameters of the threat model, or the last ones if the preset keeps no
            best; a pytree whose leaves have a leading axis [B].
        last: the parameters after the last step.
        curves: the reports of the steps on the iterates they started from, [B, warm steps + joint
            steps].
        pictures: the 8-bit images in [0, 1] of the first M problems at `snapshot_steps`, the last
            from `params`, [S, M, H, W, 3]; None unless asked for.
        steps: joint steps until each image was done (`Preset.enough`), or all, int32 [B].
    """

    params: Params
    last: Params
    curves: Info
    pictures: Array | None
    steps: Array


class Stages(NamedTuple):
    """The static part of an attack, all but its numbers.

    Attributes:
        warm, joint: options of the steps.
        interpreters: those under attack.
        apart: whether iterates are compared by the explained maps after each chunk of steps; else
            the steps compare them.
        keep_best: whether the best iterate is returned.
        calibrated: whether benign images set the threshold of f_t (`thresholds`).
        cuts: the numbers of joint steps at which chunks begin and end.
        slots: for each chunk the index of the picture taken at its end, out of range for none.
        pictures: the numbers of images to take pictures of, and of pictures of each.
    """

    warm: Options
    joint: Options
    interpreters: tuple[Interpreter, ...]
    apart: bool
    keep_best: bool
    calibrated: bool
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
    start: Params = None,
) -> Crafted:
    """Attack a batch of images; pure and unchecked.

    On an accelerator, and under `jit`, all of it is one program of `lax.fori_loop`s. It is compiled
    once for each model architecture, batch shape, threat and preset, whatever the values of the
    schedules.

    Args:
        model: a pytree with the methods that the interpreter needs; one with leaves that are not
            arrays goes through `capabilities.static_leaves` first.
        problems: images in [0, 1], targets, target maps and keys, with a leading axis [B].
        preset: the numbers; its interpreter is the one attacked, None is plain PGD.
        threat: the threat model.
        driver: "auto", "fori" or "host" (see `descent.drive`).
        on_step: called with the number of new steps; not under `jit`.
        pictured: the number of images to take pictures of on the way.
        start: parameters of the threat model to start from, with a leading axis [B]; the unchanged
            images unless given. `attack` makes its restarts by them: here the preset's are one.
    """
    schedules = (
        tabulate(preset.warm_steps, constant(preset.warm_step_size), constant(0), constant(0)),
        joint_numbers(preset),
    )
    stages = _stages(preset, threat, min(pictured, len(problems.target)))
    if by_host(driver, (model, problems)):
        return _craft(model, problems, schedules, stages, start, "host", on_step)
    leaves, structure = jax.tree.flatten(model)
    crafted = _compiled(
        leaves, problems, jax.device_put(schedules), start, structure=structure, stages=stages
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
    start: Params,
    *,
    structure: Any,
    stages: Stages,
) -> Crafted:
    model = jax.tree.unflatten(structure, leaves)
    return _craft(model, problems, schedules, stages, start, "fori", None)


def _craft(
    model: Classifier,
    problems: Problem,
    schedules: tuple[Numbers, Numbers],
    stages: Stages,
    start: Params,
    driver: Driver,
    on_step: OnStep | None,
) -> Crafted:
    run = partial(descend, model, driver=driver, on_step=on_step)
    threat, (m, many) = stages.warm.threat, stages.pictures
    pictures = (
        jax.device_put(np.zeros((many, m, *np.shape(problems.image)[1:]), np.float32))
        if m
        else None
    )

    def picture(pictures: Array | None, slot: Any, params: Params) -> Array | None:
        if pictures is None:
            return None
        # moved explicitly: an attack runs under `jax.transfer_guard("disallow")`
        slot = slot if isinstance(slot, Array) else jax.device_put(np.int32(slot))
        return _photograph(pictures, slot, problems.image, params, threat)

    states = _start(problems.image, start, None, stages.warm)
    pictures = picture(pictures, 0, states.params)
    # plain PGD reads no map: with one entry of each its step is one program for all interpreters
    states, warm = run(
        problems._replace(target_map=_one_entry(problems.target_map)),
        states,
        schedules[0],
        stages.warm,
    )
    pictures = picture(pictures, 1 if len(schedules[0].alpha) else 0, states.params)
    if stages.calibrated:
        problems = problems._replace(confidence=thresholds(model, problems.image))
    images = images_of(problems.image, states.params, threat, True)
    # solved on the 8-bit image, as after each chunk: it is what the analyst will explain
    labels = classes_of(model, images, problems.target, stages.joint.goal)
    memories = [
        solved(model, images, labels, one.solver, driver)
        if one.init is None
        else _remember(model, images, one.init)
        for one in stages.interpreters
    ]
    memory = packed(memories, stages.joint)
    # anew from the parameters alone: momentum of ℓ_prd and the lowest criterion of the warm start
    # mean nothing for the joint loss
    states = _start(problems.image, states.params, memory, stages.joint)

    def forward(c: Any, states: State, curves: Info) -> tuple[State, Info]:
        states, info = run(
            problems, states, schedules[1], stages.joint, span=(cuts[c], cuts[c + 1])
        )
        if stages.apart:
            states = _compare(model, problems, states, stages, driver)
        # each report is a number at its own steps, and 0 at those of other chunks
        return states, jax.tree.map(operator.add, curves, info)

    def chunk(c: Any, carry: tuple[State, Info, Array | None]) -> tuple[State, Info, Array | None]:
        states, curves, pictures = carry
        ended = _ended(states, enough) if enough else False
        if enough and driver == "fori":
            states, curves = jax.lax.cond(
                ended, lambda *same: same, partial(forward, c), states, curves
            )
        elif not jax.device_get(ended):
            states, curves = forward(c, states, curves)
        elif on_step:  # or progress would end short of its total
            on_step(cuts[c + 1] - cuts[c])
        return states, curves, picture(pictures, slots[c], states.params)

    # `Any`: tuples on the host, arrays in a loop, where the number of the chunk is traced
    cuts: Any = stages.cuts
    slots: Any = stages.slots
    enough = stages.joint.enough
    several = stages.joint.parts
    if several:  # plain PGD reports one distance, 0: as many as there are interpreters
        warm = warm._replace(map_l1=warm.map_l1[..., None].repeat(len(several), axis=-1))
    joint = jax.tree.map(
        lambda values: np.zeros((len(values), cuts[-1], *values.shape[2:]), values.dtype), warm
    )
    if driver == "host":
        for c in range(len(slots)):
            states, joint, pictures = chunk(c, (states, joint, pictures))
    elif slots:
        # the carry of a loop must have the very types of the reports, float64 under x64
        joint = jax.eval_shape(
            lambda states: run(problems, states, schedules[1], stages.joint, span=(0, 0))[1], states
        )
        joint = jax.tree.map(lambda values: jnp.zeros(values.shape, values.dtype), joint)
        cuts, slots = jnp.array(cuts), jnp.array(slots)
        # A loop over chunks: unrolled, each would be compiled, MASK's solver in it included
        states, joint, pictures = jax.lax.fori_loop(
            0, len(stages.slots), chunk, (states, joint, pictures)
        )
    params = states.best if stages.keep_best else states.params
    pictures = picture(pictures, many - 1, params)  # these need not be the last iterate
    concatenate = np.concatenate if driver == "host" else jnp.concatenate
    curves = jax.tree.map(lambda *stage: concatenate(stage, axis=1), warm, joint)
    return Crafted(params, states.params, curves, pictures, states.step)


@partial(jax.jit, static_argnames="enough")
def _ended(states: State, enough: float) -> Array:
    """Return whether no image of a batch needs a further step."""
    return is_done(states, enough).all()


def scores_apart(preset: Preset) -> bool:
    """Return whether iterates are compared by the explained map, between chunks of steps."""
    return preset.score_every > 0 and not all(one.faithful for one in preset.interpreters)


def snapshot_steps(preset: Preset) -> list[int]:
    """Return about eight steps at which pictures are taken, the first and the last included.

    They are equally spaced over the joint stage where its number of steps allows that.
    """
    # chunks end where iterates are compared anyway: a picture costs no further cut
    unit = preset.score_every if scores_apart(preset) else 1
    units = math.ceil(preset.steps / unit)
    # seven intervals where they are equal, else the nearest number that divides; a convention, for
    # a film that is short and regular
    count = next((k for k in (7, 8, 6, 9, 5) if units % k == 0), 7)
    stride, total = math.ceil(units / count) * unit, preset.warm_steps + preset.steps
    return sorted({0, *(range(preset.warm_steps, total, stride) if stride else ()), total})


def _stages(preset: Preset, threat: Threat, pictured: int) -> Stages:
    apart, looks = scores_apart(preset), snapshot_steps(preset)
    # where steps compare, every tenth asks whether all images are done
    unit = preset.score_every if apart else 10 if preset.enough else 0
    compared = range(unit, preset.steps, unit) if unit else ()
    looked = [step - preset.warm_steps for step in looks] if pictured > 0 else []
    cuts = sorted({0, preset.steps, *(step for step in (*compared, *looked) if step > 0)})
    ends = [preset.warm_steps + end for end in cuts[1:]]
    return Stages(
        Options(threat, goal=preset.goal),
        joint_options(preset, threat),
        preset.interpreters,
        apart,
        preset.score_every > 0,
        preset.calibrated,
        tuple(cuts),
        tuple(looks.index(end) if end in looks else len(looks) for end in ends),
        (pictured, len(looks)) if pictured > 0 else (0, 0),
    )


# this and the next two take images, not problems: target maps of another size need no new program
@partial(jax.jit, static_argnames="options")
def _start(images: Array, params: Params, memory: Any, options: Options) -> State:
    return jax.vmap(lambda image, *start: init(image, options, *start))(images, params, memory)


# jitted: an index of an array on the device would be moved there
_one_entry = jax.jit(lambda maps: jax.tree.leaves(maps)[0][:, :1, :1])


@partial(jax.jit, static_argnames="init")
def _remember(model: Classifier, images: Array, init: Init) -> Any:
    return jax.vmap(partial(init, model))(images)


def tabulate(n: int, *schedules: Schedule) -> Numbers:
    """Return the values of schedules over n steps, as arrays: other values need no retrace."""
    # the values do not depend on the padding: a schedule knows n
    # each length compiles small programs of its own: round up to multiples of 256
    steps = np.arange(max(math.ceil(n / 256), 1) * 256)
    with jax.transfer_guard("allow"):  # optax computes with numbers of the host
        return Numbers(
            *(jax.device_get(jax.vmap(schedule(n))(steps))[:n] for schedule in schedules)
        )


def joint_numbers(preset: Preset) -> Numbers:
    """Return the numbers of the joint steps of a preset."""
    schedules = [
        tabulate(preset.steps, preset.step_size, part.balance, part.tau)
        for part in preset.parts or (preset,)
    ]
    if not preset.parts:
        return schedules[0]
    lam, tau = (np.stack(values, axis=-1) for values in list(zip(*schedules, strict=True))[1:])
    return Numbers(schedules[0].alpha, lam, tau)


def joint_options(preset: Preset, threat: Threat) -> Options:
    """Return the options of the joint steps of a preset."""
    return Options(
        threat,
        None if preset.interpreter is None else preset.interpreter.surrogate,
        map_loss=preset.map_loss,
        momentum=preset.momentum,
        second_moment=preset.second_moment,
        smoothing=preset.smoothing,
        yielding=preset.yielding,
        least_weight=preset.least_weight,
        enough=preset.enough,
        rounded=preset.rounded,
        # a surrogate that is not faithful draws another map than the analyst sees: `_compare` does
        # it
        keep_best=preset.score_every > 0 and not scores_apart(preset),
        goal=preset.goal,
        parts=tuple(joint_options(part, threat) for part in preset.parts),
    )


def packed(values: Sequence[T], options: Options) -> T | tuple[T, ...] | None:
    """Return a value of each interpreter as steps take them: a tuple of several, or the only one."""
    return tuple(values) if options.parts else next(iter(values), None)


def _compare(
    model: Classifier, problems: Problem, states: State, stages: Stages, driver: Driver
) -> State:
    """Return the states with the best iterate by the explained map, and the memory solved anew."""
    images = images_of(problems.image, states.params, stages.joint.threat, True)
    labels = classes_of(model, images, problems.target, stages.joint.goal)
    problems = problems._replace(target=labels)
    seen = [
        look(model, images, labels, one.explain, one.solver, driver) for one in stages.interpreters
    ]
    logits, maps = seen[0][0], packed([one[1] for one in seen], stages.joint)
    excess = excesses(model, images)
    states = _keep_better(problems, states, logits, maps, excess, stages.joint)
    old = states.memory if stages.joint.parts else (states.memory,)
    memories = [
        before if one.solver is None else after
        for one, before, (_, _, after) in zip(stages.interpreters, old, seen, strict=True)
    ]
    return states._replace(memory=packed(memories, stages.joint))


@partial(jax.jit, static_argnames=("threat", "rounded"))
def images_of(images: Array, params: Params, threat: Threat, rounded: bool = False) -> Array:
    """Return the adversarial images [B, H, W, 3] of parameters, or their allowed 8-bit images."""
    return jax.vmap(lambda image, p: image_of(p, image, threat, rounded=rounded))(images, params)


@partial(jax.jit, static_argnames="threat")
def _photograph(
    pictures: Array, slot: Array, images: Array, params: Params, threat: Threat
) -> Array:
    first = jax.tree.map(lambda values: values[: pictures.shape[1]], (images, params))
    # "drop": a chunk without a picture has a slot out of range
    return pictures.at[slot].set(images_of(*first, threat, True), mode="drop")


@partial(jax.jit, static_argnames="options")
def _keep_better(
    problems: Problem, states: State, logits: Array, maps: Any, excess: Any, options: Options
) -> State:
    def one(problem: Problem, state: State, logits: Logits, seen: Any, excess: Any) -> State:
        f_t = losses.probability(logits, problem.target)
        map_l1 = jax.tree.map(lambda m, goal: jnp.abs(m - goal).mean(), seen, problem.target_map)
        mean = jnp.stack(jax.tree.leaves(map_l1)).mean()
        value = criterion(f_t, mean, reaches(logits, problem, options), excess)
        return keep_better(state, value, options.enough)

    return jax.vmap(one)(problems, states, logits, maps, excess)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0))
def thresholds(model: Classifier, image: Image) -> Array:
    """Return for each image [B] the f_t that counts as confident: its own, .8 at most."""
    return jnp.minimum(jax.nn.softmax(logits_of(model, image)).max(), CONFIDENCE)


@jax.jit
def excesses(model: Classifier, images: Array) -> Array | None:
    """Return the largest excess [B] over the threshold of a model's detector; None without one."""
    network, detector = parts_of(model)
    if detector is None:
        return None
    return jax.vmap(lambda image: detector.excess(network, image).max())(images)


def classes_of(model: Classifier, images: Array, targets: Array, goal: str) -> Array:
    """Return the classes [B] that images are to be taken for: targets, or any but them."""
    return _strongest_others(model, images, targets) if goal == "untargeted" else targets


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0))
def _strongest_others(model: Classifier, image: Image, label: Label) -> Array:
    return losses.strongest_other(logits_of(model, image), label)


def look(
    model: Classifier,
    images: Array,
    labels: Array,
    interpreter: Explain,
    solver: Solver | None,
    driver: Driver,
) -> tuple[Array, Array, Any]:
    """Return logits [B, K], maps [B, h, w] and the memory of the solver (see `solved`)."""
    memory = solved(model, images, labels, solver, driver)
    return *_explain_batch(model, images, labels, memory, interpreter, solver), memory


def solved(
    model: Classifier, images: Array, labels: Array, solver: Solver | None, driver: Driver
) -> Any:
    """Return the memory of a solver after all its steps, None without a solver."""
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
    """Return logits and map of one image; `memory` is that of its solver after all its steps.

    Jitted as in `descent.step_of`: map shape, counted work and the batch share one trace.
    """
    m = interpreter(model, image, label) if solver is None else solver.read(memory)
    # float32, whatever the network computes in: NumPy knows no bfloat16
    return logits_of(model, image).astype(jnp.float32), m.astype(jnp.float32)
