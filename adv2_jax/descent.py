"""The loop: one joint-loss descent for every interpreter and threat model (ADV² eqs. 3 and 4).

    x⁽ⁱ⁺¹⁾ = Π( x⁽ⁱ⁾ - α_i steepest(∇_x [ ℓ_prd(f(x), t) + λ_i ℓ_int(g(x; f), m_t) ]) )

`step` is that line for one image; `descend` maps it over a batch and repeats it. Notation: f
softmax probabilities, t target class, m_t target map, g the interpreter, α step size, λ weight of
the map, Π `threat.project`; what is said of x holds for the parameters that make it under other
threat models. Where a map is itself the end of a descent, `solve` goes down to it; both are driven
by `drive`.
"""

import operator
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from adv2_jax import losses
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters import Context, Seen, Solver, Surrogate
from adv2_jax.threats import Params, Threat
from adv2_jax.types import Classifier, Image, Label, Map

Driver = Literal["auto", "fori", "host"]
MapLoss = Callable[[Map, Map], Array]
OnStep = Callable[[int], None]
Step = Callable[[Classifier, Any, Any, Any], tuple[Any, Any]]

LEAST_WEIGHT = 1e-2  # share of λ: without it a hundred steps that miss the target would switch the map off for good


class Problem(NamedTuple):
    """What is asked for one image: benign image [H, W, 3], target class [], target map [h, w].

    `key` is the raw data of a PRNG key (`jax.random.key_data`), for interpreters that draw random
    numbers.
    """

    image: Image | Any
    target: Label | Any
    target_map: Map | Any
    key: Array | Any = None


class Options(NamedTuple):
    """What a step is made of. Static under `jit`: every entry is a value, or a function that equal
    options share.

    Attributes:
        threat: the threat model.
        surrogate: (model, image, label, context) -> `interpreters.Seen`, or None for the prediction
            loss alone (PGD).
        map_loss: ℓ_int, (map, target map) -> [].
        momentum: what the sum of normalised gradients that goes into `threat.steepest` keeps of
            itself at each step, in [0, 1) (MI-FGSM, Dong et al. 2018); None is `threat.optimiser`.
        smoothing: label smoothing of ℓ_prd.
        yielding: while f_t < confidence the weight of the map term is multiplied by 1 - yielding at
            each step, afterwards by 1 + yielding, up to λ and not below λ / 100; 0 keeps λ. The map
            yields where both goals cannot be had at once.
        confidence: f_t from which on an iterate is judged by its map.
        rounded: take losses and gradients at the allowed 8-bit image nearest to the iterate
            (`Threat.round`), with the gradient passed straight through, so that what is optimised
            and scored is what will be delivered.
        keep_best: whether a step scores the iterate it starts from, by its map (meant for faithful
            surrogates) or, without a surrogate, by its loss. Where the last step of a descent leads
            is then never scored, and so never delivered.
    """

    threat: Threat
    surrogate: Surrogate | None = None
    map_loss: MapLoss = losses.map_l2
    momentum: float | None = None
    smoothing: float = 0.0
    yielding: float = 0.0
    confidence: float = 0.8
    rounded: bool = False
    keep_best: bool = False


class Numbers(NamedTuple):
    """What a schedule sets at each step: step size α in pixel values (see `Threat.steepest`),
    weight λ, width τ of the surrogate.

    Each is [] in a step and [n] over n steps.
    """

    alpha: Array | Any
    lam: Array | Any
    tau: Array | Any


class State(NamedTuple):
    """Carried from step to step for one image.

    `weight` in [.01, 1] is the share of λ that the map term has at present; `best` are the
    parameters with the lowest score so far; `memory` is that of the surrogate, None where it has
    none; `step` counts the steps taken.
    """

    params: Params
    optimiser: optax.OptState
    weight: Array
    best: Params
    best_score: Array
    memory: Any = None
    step: Array | Any = 0


class Info(NamedTuple):
    """Reported by a step for the iterate it starts from: loss [], f_t [], mean absolute difference of the maps []."""

    loss: Array | Any
    confidence: Array | Any
    map_l1: Array | Any


def image_of(params: Params, image: Image, threat: Threat, *, rounded: bool) -> Image:
    """The adversarial image [H, W, 3] that parameters make, or the 8-bit image of it; the gradient passes straight through."""
    x = threat.apply(params, image)
    return x + jax.lax.stop_gradient(threat.round(x, params, image) - x) if rounded else x


def score(f_t: Array, map_l1: Array, confidence: float) -> Array:
    """What keep-best minimises: the L1 distance of the maps once f_t >= confidence; before that 2 - f_t, which is larger."""
    return jnp.where(f_t >= confidence, map_l1, 2 - f_t)


def keep_better(state: State, found: Array) -> State:
    """The state with its present parameters as the best ones if their score `found` [] is lower."""
    # of a float64 network it is float64, which a loop does not carry
    found = found.astype(state.best_score.dtype)
    best = jax.tree.map(
        lambda new, old: jnp.where(found < state.best_score, new, old), state.params, state.best
    )
    return state._replace(best=best, best_score=jnp.fmin(found, state.best_score))


def direction(options: Options) -> optax.GradientTransformation:
    """From gradients to directions; the step size is applied after it."""
    threat, momentum = options.threat, options.momentum
    if momentum is None:
        return (threat.optimiser or threat.steepest)()
    return optax.chain(optax.normalize_by_update_norm(), optax.trace(momentum), threat.steepest())


def init(problem: Problem, options: Options, params: Params = None, memory: Any = None) -> State:
    """The state at `params`, or at the unchanged image."""
    start = options.threat.init(problem.image) if params is None else params
    weight, worst = jnp.ones((), jnp.float32), jnp.asarray(jnp.inf, jnp.float32)
    return State(
        start,
        direction(options).init(start),
        weight,
        start,
        worst,
        memory,
        jnp.zeros((), jnp.int32),
    )


def joint_loss(
    params: Params,
    model: Classifier,
    problem: Problem,
    numbers: Numbers,
    options: Options,
    memory: Any = None,
    index: Any = 0,
) -> tuple[Array, tuple[Info, Any]]:
    """ℓ_prd(f(x), t) + λ ℓ_int(g(x; f), m_t) of the image x that the parameters make (eq. 3); its
    parts, and the next memory.

    What the surrogate and the threat model penalise besides is added.
    """
    x = image_of(params, problem.image, options.threat, rounded=options.rounded)
    if options.surrogate is None:
        seen = Seen(logits_of(model, x), problem.target_map)
    else:
        key = (
            None
            if problem.key is None
            else jax.random.fold_in(jax.random.wrap_key_data(problem.key), index)
        )
        seen = options.surrogate(model, x, problem.target, Context(numbers.tau, key, index, memory))
    f_t = losses.probability(seen.logits, problem.target)
    prediction = losses.cross_entropy(seen.logits, problem.target, smoothing=options.smoothing)
    loss = prediction + numbers.lam * options.map_loss(seen.map, problem.target_map)
    loss += seen.penalty + options.threat.penalty(params)
    return loss, (Info(loss, f_t, jnp.abs(seen.map - problem.target_map).mean()), seen.memory)


def step(
    model: Classifier, problem: Problem, state: State, numbers: Numbers, options: Options
) -> tuple[State, Info]:
    """One step of eq. 4 for one image.

    Args:
        model: the classifier.
        problem: the image and its targets.
        state: where the descent stands.
        numbers: of this step.
        options: static options.

    Returns:
        The next state, and what was found at the present one.
    """
    weighed = numbers._replace(lam=state.weight * numbers.lam)
    slope = jax.grad(joint_loss, has_aux=True)
    gradient, (info, memory) = slope(
        state.params, model, problem, weighed, options, state.memory, state.step
    )
    if options.keep_best:
        by_map = score(info.confidence, info.map_l1, options.confidence)
        state = keep_better(state, info.loss if options.surrogate is None else by_map)
    down, optimiser = direction(options).update(gradient, state.optimiser, state.params)
    moved = jax.tree.map(lambda p, d: p - numbers.alpha * d, state.params, down)
    holds = info.confidence >= options.confidence
    weight = jnp.clip(
        state.weight * jnp.where(holds, 1 + options.yielding, 1 - options.yielding), LEAST_WEIGHT, 1
    )
    projected = options.threat.project(moved, problem.image)
    return state._replace(
        params=projected, optimiser=optimiser, weight=weight, memory=memory, step=state.step + 1
    ), info


@lru_cache
def step_of(options: Options) -> Step:
    """Return `step` of these options, jitted; equal options give the same object.

    `jit` here caches the trace for one image: drivers map it over their batch, and
    `attacks.gradient_evaluations` counts its work, without tracing the network again.
    """
    return jax.jit(
        lambda model, problem, state, numbers: step(model, problem, state, numbers, options),
        inline=True,
    )


@lru_cache
def solver_step_of(solver: Solver) -> Step:
    """Return `solver.step` in the form that `drive` takes, jitted as in `step_of`."""
    return jax.jit(
        lambda model, problem, memory, _: (solver.step(model, *problem, memory), ()), inline=True
    )


@lru_cache(maxsize=32)  # an entry holds all that was compiled for one architecture and one step
def _programs(structure: Any, step: Step) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The jitted drivers of a batch for one architecture: one step, and a loop over [n] steps.

    The model enters as its leaves: flattening an NNX module at every call would cost milliseconds.
    """

    def one(leaves: list[Array], problems: Any, states: Any, numbers: Any) -> tuple[Any, Any]:
        model = jax.tree.unflatten(structure, leaves)
        return jax.vmap(lambda problem, state: step(model, problem, state, numbers))(
            problems, states
        )

    def loop(
        leaves: list[Array], problems: Any, states: Any, schedule: Any, start: Array, stop: Array
    ) -> tuple[Any, Any]:
        def numbers(i: Any) -> Any:
            return jax.tree.map(lambda values: values[i], schedule)

        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            states, info = one(leaves, problems, carry[0], numbers(i))
            return states, jax.tree.map(lambda all, new: all.at[:, i].set(new), carry[1], info)

        n = len(jax.tree.leaves(schedule)[0])
        _, info = jax.eval_shape(one, leaves, problems, states, numbers(0))
        reports = jax.tree.map(
            lambda leaf: jnp.zeros((leaf.shape[0], n, *leaf.shape[1:]), leaf.dtype), info
        )
        # traced bounds: one program for every span
        return jax.lax.fori_loop(start, stop, body, (states, reports))

    return jax.jit(one), jax.jit(loop)


def batched_step(
    model: Classifier, options: Options
) -> tuple[list[Array], Callable[..., tuple[State, Info]]]:
    """The jitted step of a batch, as the host driver calls it.

    Returns:
        the leaves of the model, and (leaves, problems, states, numbers) -> (states, info), all but
        the numbers with axis [B].
    """
    leaves, structure = jax.tree.flatten(model)
    return leaves, _programs(structure, step_of(options))[0]


def descend(
    model: Classifier,
    problems: Problem,
    states: State,
    schedule: Numbers,
    options: Options,
    *,
    span: tuple[int, int] | None = None,
    driver: Driver = "auto",
    on_step: OnStep | None = None,
) -> tuple[State, Info]:
    """Repeat `step` for a batch.

    Args:
        model: the classifier.
        problems: batched, leading axis [B].
        states: batched, leading axis [B].
        schedule: the numbers of each step, [n].
        options: static options.
        span: see `drive`.
        driver: see `drive`.
        on_step: see `drive`.

    Returns:
        The states after these steps, and what each step reported, [B, n]; 0 for steps out of the
        span.

    Raises:
        ValueError: for an unknown driver.
    """

    def single(
        values: Any,
    ) -> Any:  # a float64 step size would make float64 parameters, which a loop does not carry
        return (
            values.astype(np.float32)
            if isinstance(values, Array)
            else np.asarray(values, np.float32)
        )

    schedule = jax.tree.map(single, schedule)
    if len(schedule.alpha) == 0:
        return states, Info(
            *(np.zeros((len(problems.target), 0), np.float32) for _ in Info._fields)
        )
    return drive(
        model,
        step_of(options),
        problems,
        states,
        schedule,
        span=span,
        driver=driver,
        on_step=on_step,
    )


def solve(
    model: Classifier, images: Array, labels: Array, solver: Solver, *, driver: Driver = "auto"
) -> Any:
    """The memory of a solver at the end of its steps, for a batch: [B, H, W, 3], [B] -> leading axis [B]."""
    return drive(
        model,
        solver_step_of(solver),
        (images, labels),
        _start(images, solver),
        np.arange(solver.steps),
        driver=driver,
    )[0]


@partial(jax.jit, static_argnames="solver")
def _start(images: Array, solver: Solver) -> Any:
    return jax.vmap(solver.init)(images)


def drive(
    model: Classifier,
    step: Step,
    problems: Any,
    states: Any,
    schedule: Any,
    *,
    span: tuple[int, int] | None = None,
    driver: Driver = "auto",
    on_step: OnStep | None = None,
) -> tuple[Any, Any]:
    """Repeat a step of one image for a batch.

    Args:
        model: the classifier.
        step: (model, problem, state, numbers) -> (state, info); compiled once for each such object.
        problems: what does not change, any pytree with leading axis [B].
        states: what does, any pytree with leading axis [B].
        schedule: the numbers of each step, any pytree with leading axis [n], n >= 1.
        span: first step, and the one after the last; all n unless given. Spans of one schedule
            share one program.
        driver: "fori" is one jitted `lax.fori_loop`, "host" calls the same step n times. "auto" is
            the host on CPU, where XLA compiles convolutions inside loops to slow code (jax issue
            12868), and the loop elsewhere.
        on_step: called with the number of steps newly done: 1 after every step by the host, all at
            the end of the loop.

    Returns:
        The states after the span, and what each step reported, [B, n], one number an image and
        step; 0 for steps out of the span.

    Raises:
        ValueError: for an unknown driver.
    """
    leaves, structure = jax.tree.flatten(model)
    one, loop = _programs(structure, step)
    n = len(jax.tree.leaves(schedule)[0])
    start, stop = span or (0, n)
    if not by_host(driver, (leaves, problems, states)):
        bounds = (edge if isinstance(edge, Array) else np.int32(edge) for edge in (start, stop))
        states, infos = loop(leaves, problems, states, *jax.device_put((schedule, *bounds)))
        if on_step:
            jax.block_until_ready(states)
            on_step(stop - start)
        return states, infos
    reports = []
    for i in range(start, stop):
        states, info = one(
            leaves, problems, states, jax.device_put(jax.tree.map(operator.itemgetter(i), schedule))
        )
        reports.append(info)
        if on_step:
            jax.block_until_ready(info)
            on_step(1)
    if not reports:
        return states, ()

    def whole(*values: np.ndarray) -> np.ndarray:
        all_steps = np.zeros((len(values[0]), n), values[0].dtype)
        all_steps[:, start:stop] = np.stack(values, axis=1)
        return all_steps

    return states, jax.tree.map(whole, *jax.device_get(reports))


def by_host(driver: Driver, values: Any) -> bool:
    """Whether steps on these values are to be driven from the host: see `drive`. Under `jit` the
    loop is the only one there is.

    Raises:
        ValueError: for an unknown driver.
    """
    if driver not in ("auto", "fori", "host"):
        raise ValueError(f"driver {driver!r} is not one of auto, fori, host")
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
    return driver == "host" or (driver == "auto" and not traced and jax.default_backend() == "cpu")
