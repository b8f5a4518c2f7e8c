"""The loop: one joint-loss descent for every interpreter and threat model (ADV² eqs. 3 and 4).

    x⁽ⁱ⁺¹⁾ = Π( x⁽ⁱ⁾ - α_i steepest(∇_x [ ℓ_prd(f(x), t) + λ_i ℓ_int(g(x; f), m_t) ]) )

`step` is that line for one image; `descend` maps it over a batch and repeats it. Notation: f
softmax probabilities, t target class, m_t target map, g the interpreter, α step size, λ weight of
the map term, Π `threat.project`. Under other threat models than L∞ the steps are taken in the
parameters that make x. `solve` runs the descent of an interpreter that is one itself (MASK). Both
are loops of `drive`.
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
from adv2_jax.detectors import Detector, Ensemble, parts_of
from adv2_jax.interpreters import Context, Seen, Solver, Surrogate
from adv2_jax.threats import PIXEL, Params, Threat
from adv2_jax.types import Classifier, Image, Label, Map

# what the adversary wants of the class: a class of its own, any but the label, or the label
GOALS = ("targeted", "untargeted", "keep")
Driver = Literal["auto", "fori", "host"]
MapLoss = Callable[[Map, Map], Array]
OnStep = Callable[[int], None]
Step = Callable[[Classifier, Any, Any, Any], tuple[Any, Any]]

# Lower bound of `State.weight` unless a preset has another. Without it a hundred steps that miss the
# target would leave .9^100 = 3e-5 of λ, and 1.1^k brings it back only after 111 steps that hit
LEAST_WEIGHT = 1e-2
# f_t above which an iterate is compared by its map
CONFIDENCE = 0.8


class Problem(NamedTuple):
    """One image and its targets.

    Attributes:
        image: benign, [H, W, 3] in [0, 1].
        target: target class, int32 []; under the goal "untargeted" the class to be left.
        target_map: [h, w] in [0, 1]; of several interpreters a tuple, in the order of `Options.parts`.
        key: raw data of a PRNG key (`jax.random.key_data`), for interpreters that draw random
            numbers; None for others.
        confidence: threshold of f_t for this image, []; None for that of the options.
    """

    image: Image | Any
    target: Label | Any
    target_map: Map | Any
    key: Array | Any = None
    confidence: Array | Any = None


class Options(NamedTuple):
    """The static options of a step. They compare by value, so equal options compile once.

    Attributes:
        threat: the threat model.
        surrogate: (model, image, label, context) -> `interpreters.Seen`, or None for the prediction
            loss alone (PGD).
        map_loss: ℓ_int, (map, target map) -> [].
        momentum: decay of the running sum of normalised gradients that goes into `threat.steepest`,
            in [0, 1) (MI-FGSM, Dong et al. 2018). None steps by `threat.optimiser`.
        second_moment: decay of the running mean of squares that the running sum is divided by, in
            [0, 1): Adam on normalised gradients, for threat models with a `stride`. 0 is none.
        smoothing: label smoothing of ℓ_prd, in [0, 1).
        yielding: while f_t < confidence the weight of the map term is multiplied by 1 - yielding at
            each step, afterwards by 1 + yielding, up to λ and not below `least_weight` of it; 0
            keeps λ. So the map term gives way on images where it would keep the prediction from
            succeeding.
        least_weight: see there.
        confidence: threshold of f_t; above it an iterate is compared by its map.
        enough: an image is done once its best map L1 is at most this: its best iterate stays. 0
            goes on to the last step.
        rounded: take losses and gradients at the allowed 8-bit image nearest to the iterate
            (`Threat.round`), with the gradient passed straight through. Then the image that is
            optimised is the image that is returned.
        keep_best: whether a step compares the iterate it starts from with the best one, by
            `criterion` (meant for faithful surrogates) or, without a surrogate, by its loss. The
            iterate after the last step is then never compared, and so never returned.
        goal: of `GOALS`. "untargeted" aims at the strongest class beside `Problem.target`, whichever
            it is at this step; "keep" is "targeted" to the loop.
        parts: of a joint attack the options of each of its P interpreters, whose surrogate, map
            loss and smoothing count; () for one interpreter or none.
    """

    threat: Threat
    surrogate: Surrogate | None = None
    map_loss: MapLoss = losses.map_l2
    momentum: float | None = None
    second_moment: float = 0.0
    smoothing: float = 0.0
    yielding: float = 0.0
    least_weight: float = LEAST_WEIGHT
    confidence: float = CONFIDENCE
    enough: float = 0.0
    rounded: bool = False
    keep_best: bool = False
    goal: str = "targeted"
    parts: tuple["Options", ...] = ()


class Numbers(NamedTuple):
    """The numbers of a step, each []; as the schedule of n steps, each [n].

    Attributes:
        alpha: step size α in pixel values (see `Threat.steepest`).
        lam: weight λ of the map term; [P], or [n, P], of P interpreters.
        tau: width τ of the surrogate; likewise.
    """

    alpha: Array | Any
    lam: Array | Any
    tau: Array | Any


class State(NamedTuple):
    """The state of the descent for one image.

    Attributes:
        params: of the threat model, any pytree.
        optimiser: state of `direction`.
        weight: [] in [`Options.least_weight`, 1], factor of λ at present (see `Options.yielding`); of all interpreters.
        best: parameters with the lowest criterion so far.
        lowest: [] float32, their criterion; infinite before the first comparison.
        memory: of the surrogate, any pytree, or a tuple of those of several; None where it has none.
        step: [] int32, the number of steps taken until the image was done (`Options.enough`).
    """

    params: Params
    optimiser: optax.OptState
    weight: Array
    best: Params
    lowest: Array
    memory: Any = None
    step: Array | Any = 0


class Info(NamedTuple):
    """The report of a step on the iterate it starts from, each [], over n steps [n].

    Attributes:
        loss: the joint loss.
        confidence: f_t, in [0, 1].
        map_l1: mean absolute difference of map and target map, in [0, 1]; of P interpreters [P].
    """

    loss: Array | Any
    confidence: Array | Any
    map_l1: Array | Any


def image_of(params: Params, image: Image, threat: Threat, *, rounded: bool) -> Image:
    """Return the image [H, W, 3] that parameters make, rounded straight through if `rounded`."""
    x = threat.apply(params, image)
    # the gradient of round is 0: the sum has the value of the rounded image, and the gradient of x
    return x + jax.lax.stop_gradient(threat.round(x, params, image) - x) if rounded else x


def reaches(logits: Array, problem: Problem, options: Options) -> Array:
    """Return whether f_t is at its threshold or above: [K] -> []."""
    f_t = losses.probability(logits, problem.target)
    if problem.confidence is None:
        return f_t >= options.confidence
    # one of the image may be below ½, where another class may still be above the target
    return (f_t >= problem.confidence) & (logits[problem.target] >= logits.max())


def criterion(f_t: Any, map_l1: Any, hit: Any, excess: Any = None) -> Any:
    """Return what the best iterate minimises: map L1 where the target is `hit`, else 2 - f_t.

    Arrays of NumPy or JAX, of one image or many. Under a detector, an iterate with a positive
    `excess` (`detectors.Detector.excess`) is worse than any that evades it.
    """
    where = f_t.__array_namespace__().where
    if excess is not None:
        over = where(excess > 0, excess, 0)
        # in (1, 2 - CONFIDENCE): between those that evade and those that miss
        map_l1 = where(excess > 0, 1 + (1 - CONFIDENCE) * over / (1 + over), map_l1)
    # maps lie in [0, 1], so any iterate that hits the target is better than any that misses
    return where(hit, map_l1, 2 - f_t)


def keep_better(state: State, value: Array, enough: float = 0.0) -> State:
    """Return the state whose best parameters are the present ones if their criterion is lower."""
    # of a float64 network it is float64, which a loop does not carry
    value = value.astype(state.lowest.dtype)
    # one that is done stays, so that it does not depend on how long others in its batch go on
    better = (value < state.lowest) & ~is_done(state, enough)
    best = optax.tree_utils.tree_where(better, state.params, state.best)
    return state._replace(best=best, lowest=jnp.where(better, value, state.lowest))


def is_done(state: State, enough: float) -> Array:
    """Return whether an image needs no more steps (`Options.enough`), bool [] or [B]."""
    return state.lowest <= (enough or -jnp.inf)


def direction(options: Options) -> optax.GradientTransformation:
    """Return the transformation from gradients to step directions, before the step size."""
    threat, momentum = options.threat, options.momentum
    if momentum is None:
        return (threat.optimiser or threat.steepest)()
    # normalised first, so that momentum sums directions: gradients of a confident network are tiny,
    # and differ by orders of magnitude from step to step
    unit = optax.normalize_by_update_norm()
    if options.second_moment and threat.stride is not None:
        # where the signs of a pixel take turns its steps get shorter by themselves
        adam = optax.scale_by_adam(momentum, options.second_moment)
        return optax.chain(unit, adam, optax.scale(threat.stride / PIXEL))
    return optax.chain(unit, optax.trace(momentum), threat.steepest())


def init(image: Image, options: Options, params: Params = None, memory: Any = None) -> State:
    """Return the state at `params`, or at the unchanged image."""
    start = options.threat.init(image) if params is None else params
    # 32 bits throughout: under x64 the defaults would be wider than what a step returns
    one, infinity = jnp.ones((), jnp.float32), jnp.asarray(jnp.inf, jnp.float32)
    optimiser, count = direction(options).init(start), jnp.zeros((), jnp.int32)
    return State(start, optimiser, one, start, infinity, memory, count)


def joint_loss(
    params: Params,
    model: Classifier,
    problem: Problem,
    numbers: Numbers,
    options: Options,
    memory: Any = None,
    index: Any = 0,
) -> tuple[Array, tuple[Info, Any, Array]]:
    """Return ℓ_prd(f(x), t) + λ ℓ_int(g(x; f), m_t) (eq. 3), with (`Info`, next memory, hit) beside it.

    x is the image that the parameters make, hit whether it `reaches` the target. Penalties of the
    surrogate and of the threat model are added.
    """
    x = image_of(params, problem.image, options.threat, rounded=options.rounded)
    plain, untargeted = options.surrogate is None, options.goal == "untargeted"
    # a surrogate gives logits too, but has to be told which class it explains
    logits: Any = logits_of(model, x) if plain or untargeted else None
    if untargeted:
        problem = problem._replace(target=losses.strongest_other(logits, problem.target))
    if options.surrogate is None:
        seen = Seen(logits, problem.target_map)
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
    info = Info(loss, f_t, jnp.abs(seen.map - problem.target_map).mean())
    return loss, (info, seen.memory, reaches(seen.logits, problem, options))


def step(
    model: Classifier, problem: Problem, state: State, numbers: Numbers, options: Options
) -> tuple[State, Info]:
    """Take one step of eq. 4 for one image.

    Args:
        model: the classifier.
        problem: the image and its targets.
        state: of the descent.
        numbers: of this step.
        options: static options.

    Returns:
        The next state, and the report on the present one.
    """
    weighed = numbers._replace(lam=state.weight * numbers.lam)
    going = jnp.where(is_done(state, options.enough), 0, 1)
    model, detector = parts_of(model)
    gradient, info, memory, hit = _slope(model, problem, state, weighed, options)
    excess = None
    if detector is not None:
        away, excess = _away(detector, model, problem, state, options)
        # both as long: no weight of the detector has to be found
        gradient = jax.tree.map(operator.add, gradient if options.parts else _unit(gradient), away)
    if options.keep_best:
        plain = options.surrogate is None and not options.parts
        # the mean of several interpreters: the largest would always be that of the same one
        distance = 1 - info.confidence if plain else info.map_l1.mean()
        value = criterion(info.confidence, distance, hit, excess)
        value = info.loss if plain and detector is None else value
        state = keep_better(state, value, options.enough)
    down, optimiser = direction(options).update(gradient, state.optimiser, state.params)
    # the step size is data, not an optax schedule: other values of it need no new program
    moved = jax.tree.map(lambda p, d: p - numbers.alpha * d, state.params, down)
    factor = jnp.where(hit, 1 + options.yielding, 1 - options.yielding)
    weight = jnp.clip(state.weight * factor, options.least_weight, 1)
    projected = options.threat.project(moved, problem.image)
    return state._replace(
        params=projected, optimiser=optimiser, weight=weight, memory=memory, step=state.step + going
    ), info


def _slope(
    model: Classifier, problem: Problem, state: State, numbers: Numbers, options: Options
) -> tuple[Params, Info, Any, Array]:
    """Return the gradient of the joint loss in the parameters, the report, the next memory, the hit.

    Of several interpreters it is the sum of the directions in which each alone would step: a weight
    of each would have to be found for each network, and the loudest would drown the others.
    """
    if not options.parts:
        gradient, beside = jax.grad(joint_loss, has_aux=True)(
            state.params, model, problem, numbers, options, state.memory, state.step
        )
        return gradient, *beside
    inputs = zip(
        problem.target_map, state.memory, numbers.lam, numbers.tau, options.parts, strict=True
    )
    gradients, infos, after, hits = zip(
        *(
            _slope(
                model,
                problem._replace(target_map=target_map),
                state._replace(memory=memory),
                numbers._replace(lam=lam, tau=tau),
                part,
            )
            for target_map, memory, lam, tau, part in inputs
        ),
        strict=True,
    )
    gradient = jax.tree.map(lambda *leaves: sum(leaves), *map(_unit, gradients))
    map_l1 = jnp.stack([info.map_l1 for info in infos])
    info = Info(sum(info.loss for info in infos), infos[0].confidence, map_l1)
    return gradient, info, after, hits[0]


def _unit(gradient: Params) -> Params:
    """Return a gradient divided by its norm."""
    unit = optax.normalize_by_update_norm()
    return unit.update(gradient, unit.init(gradient))[0]


def _away(
    detector: Detector | Ensemble,
    model: Classifier,
    problem: Problem,
    state: State,
    options: Options,
) -> tuple[Params, Array]:
    """Return the direction in which a detector's scores rise, 0 below its threshold; the excess."""

    def above(params: Params) -> tuple[Array, Array]:
        x = image_of(params, problem.image, options.threat, rounded=options.rounded)
        excess = detector.excess(model, x)
        # of several scores all that are too large, or the largest two would take turns
        return jax.nn.relu(excess).sum(), excess.max()

    gradient, excess = jax.grad(above, has_aux=True)(state.params)
    return _unit(gradient), excess


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
        lambda model, problem, memory, _: (solver.step(model, problem[0], problem[1], memory), ()),
        inline=True,
    )


@lru_cache(maxsize=32)  # an entry holds all that was compiled for one architecture and one step
def _programs(structure: Any, step: Step) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the jitted programs of a batch for one architecture: one step, and a loop over [n]."""

    # The model enters as its leaves: flattening an NNX module at every call costs milliseconds

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
        # bounds are traced, not static: one program serves every span
        return jax.lax.fori_loop(start, stop, body, (states, reports))

    return jax.jit(one), jax.jit(loop)


def batched_step(
    model: Classifier, options: Options
) -> tuple[list[Array], Callable[..., tuple[State, Info]]]:
    """Return the leaves of the model, and the jitted step of a batch that the host driver calls.

    The step is (leaves, problems, states, numbers) -> (states, info); all but leaves and numbers
    have a leading axis [B].
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
        The states after these steps, and the reports of the steps, [B, n]; 0 for steps outside the
        span.

    Raises:
        ValueError: for an unknown driver.
    """
    # a float64 step size would make float64 parameters, which a loop does not carry
    schedule = jax.tree.map(lambda values: values.astype(np.float32), schedule)
    if len(schedule.alpha) == 0:
        return states, Info(*[np.zeros((len(problems.target), 0), np.float32)] * len(Info._fields))
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
    """Return the memory of a solver after all its steps: [B, H, W, 3], [B] -> leading axis [B]."""
    start, places = _init_solver(images, solver), np.arange(solver.steps)
    step = solver_step_of(solver)
    return drive(model, step, (images, labels), start, places, driver=driver)[0]


@partial(jax.jit, static_argnames="solver")
def _init_solver(images: Array, solver: Solver) -> Any:
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
        problems: inputs of the step that stay the same, any pytree with leading axis [B].
        states: inputs that each step replaces, any pytree with leading axis [B].
        schedule: the numbers of each step, any pytree with leading axis [n], n >= 1.
        span: first step, and the one after the last; all n unless given. Spans of one schedule
            share one program.
        driver: "fori" is one jitted `lax.fori_loop`, "host" calls the same step n times. "auto" is
            the host on CPU, where XLA compiles convolutions inside loops to slow code (jax issue
            12868), and the loop elsewhere.
        on_step: called with the number of new steps: 1 after every step of the host, all of them at
            the end of the loop.

    Returns:
        The states after the span, and the reports of the steps, for each image and step, [B, n] and
        the axes of a report; 0 for steps outside the span.

    Raises:
        ValueError: for an unknown driver.
    """
    leaves, structure = jax.tree.flatten(model)
    one, loop = _programs(structure, step)
    n = len(jax.tree.leaves(schedule)[0])
    start, stop = span or (0, n)
    if not by_host(driver, (leaves, problems, states)):
        # moved explicitly, so that `jax.transfer_guard` has nothing to refuse
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
            # JAX returns before the step is computed: progress would run ahead
            jax.block_until_ready(info)
            on_step(1)
    if not reports:
        return states, ()

    def pad(*values: np.ndarray) -> np.ndarray:
        more = [(0, 0)] * (values[0].ndim - 1)
        return np.pad(np.stack(values, axis=1), [(0, 0), (start, n - stop), *more])

    return states, jax.tree.map(pad, *jax.device_get(reports))


def by_host(driver: Driver, values: Any) -> bool:
    """Return whether the host drives steps on these values (see `drive`); never under `jit`.

    Raises:
        ValueError: for an unknown driver.
    """
    if driver not in ("auto", "fori", "host"):
        raise ValueError(f"driver {driver!r} is not one of auto, fori, host")
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
    return driver == "host" or (driver == "auto" and not traced and jax.default_backend() == "cpu")
