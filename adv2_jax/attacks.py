"""`attack` and `explain` for NumPy arrays of any length: checks, batches, 8-bit rounding, cost.

The attack itself is `crafting.craft`, which checks nothing.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adv2_jax import metrics, threats
from adv2_jax.capabilities import (
    Architecture,
    architecture,
    check_activation,
    lacks,
    logits_of,
    num_classes,
    static_leaves,
)
from adv2_jax.cost import multiply_adds
from adv2_jax.crafting import (
    craft,
    excesses,
    explain_one,
    images_of,
    joint_options,
    look,
    packed,
    scores_apart,
    snapshot_steps,
    thresholds,
)
from adv2_jax.data.images import check_integers, check_range
from adv2_jax.data.lazy import Images, LazyImages, ahead
from adv2_jax.descent import (
    Driver,
    Info,
    Numbers,
    OnStep,
    Options,
    Problem,
    State,
    batched_step,
    criterion,
    init,
    solver_step_of,
    step_of,
)
from adv2_jax.detectors import parts_of
from adv2_jax.devices import largest_batch, number_of_devices, replicate, spread
from adv2_jax.errors import first_line
from adv2_jax.files import optional
from adv2_jax.interpreters import INTERPRETERS, Explain, Interpreter, Joint, Solver, of_function
from adv2_jax.precision import at, computing
from adv2_jax.presets import Preset, look_up, resolve
from adv2_jax.threats import Params, Threat
from adv2_jax.types import Classifier, Image, Label, Map

T = TypeVar("T")

log = logging.getLogger(__name__)

# by program: the batch size on each device at which it goes on after it ran out of memory. For the
# life of the process: a run calls `attack` for each of its batches
_SMALLER: dict[Any, int] = {}

# folded into the key of an image for its noise, and more than the steps of any attack
NOISE = 2**31 - 1

# The spacing of float32 in [.5, 1), twice the largest rounding error there. An 8-bit image that was
# divided by 255 in float32 is closer than this to k/255, and taken for k/255 in float64 too
ULP = 2.0**-24


class Result(NamedTuple):
    """The outcome of an attack on N images; `float_*` before rounding, the rest of 8-bit images.

    An image fails if the network gives logits, maps or gradients for it that are not finite: it is
    returned unchanged, and its logits and maps are NaN.

    Attributes:
        images: uint8 [N, H, W, 3], adversarial.
        logits: [N, K].
        maps: [N, h, w] in [0, 1], explained for the targets; empty without an interpreter, a tuple
            of several.
        float_images: [N, H, W, 3] in [0, 1].
        float_logits: [N, K].
        float_maps: [N, h, w]; likewise.
        work: [N], on each image in gradients of ℓ_prd (see the function `gradient_evaluations`).
        params: of the threat model, a pytree whose leaves have a leading axis [N].
        curves: the reports of the n steps, the warm start included, on the iterates they started
            from, [N, n]; `map_l1` is NaN where a step draws no map, and [N, n, P] of P interpreters.
        snapshots: uint8 [M, S, H, W, 3], the first M images at `snapshot_steps`; the last ones
            equal `images`.
        failed: bool [N].
    """

    images: np.ndarray
    logits: np.ndarray
    maps: np.ndarray | Any
    float_images: np.ndarray
    float_logits: np.ndarray
    float_maps: np.ndarray | Any
    work: np.ndarray
    params: Params
    curves: Info
    snapshots: np.ndarray
    failed: np.ndarray

    def __repr__(self) -> str:
        sizes = ", ".join(f"maps {list(m.shape)}" for m in jax.tree.leaves(self.maps) if m.size)
        return (
            f"Result(images {list(self.images.shape)}, {sizes or 'no maps'}, "
            f"{np.shape(self.curves.loss)[1]} steps, {self.gradient_evaluations} gradients "
            f"an image, {int(self.failed.sum())} failed)"
        )

    @property
    def gradient_evaluations(self) -> float:
        """Return the mean work on an image, to one decimal."""
        return round(float(self.work.mean()), 1)

    def to_pandas(self, targets: ArrayLike, target_maps: Any = None) -> Any:
        """Return a pandas data frame: a row for each image.

        Args:
            targets: [N], the classes of the attack.
            target_maps: as for `attack`; without them the distances of maps are left out.

        Returns:
            Columns `target`, `predicted`, `success`, `confidence` (of the target), `failed`, and of
            each interpreter `map_l1` and `map_iou75`, numbered where there are several.

        Raises:
            ValueError: pandas is not installed.
        """
        pandas = optional("pandas", "a data frame", "pip install pandas")
        columns = {
            "target": np.asarray(targets),
            "predicted": self.logits.argmax(axis=-1),
            "success": metrics.success(self.logits, targets),
            "confidence": metrics.confidence(self.logits, targets),
            "failed": self.failed,
        }
        pairs = list(zip(jax.tree.leaves(self.maps), jax.tree.leaves(target_maps), strict=False))
        for k, (m, wanted) in enumerate(pairs):
            number = f"_{k + 1}" if len(pairs) > 1 else ""
            columns[f"map_l1{number}"] = metrics.map_l1(m, wanted)
            columns[f"map_iou75{number}"] = metrics.iou_quantile(m, wanted)
        return pandas.DataFrame(columns)


def attack(
    model: Classifier,
    images: ArrayLike | LazyImages,
    targets: ArrayLike,
    target_maps: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    interpreter: str | Interpreter | Joint | None = "cam",
    threat: Threat | None = None,
    preset: str | Preset = "default",
    warm_steps: int | None = None,
    steps: int | None = None,
    goal: str | None = None,
    restarts: int | None = None,
    batch_size: int = 32,
    driver: Driver = "auto",
    on_step: OnStep | None = None,
    snapshots: int = 0,
    all_may_fail: bool = False,
    keys: ArrayLike | None = None,
    precision: str = "high",
    devices: int | None = None,
) -> Result:
    """Attack a classifier and its interpreter at once.

    Args:
        model: any pytree with what the interpreter needs: `logits`, or `features` and `head`
            (`adv2_jax.types.Classifier`).
        images: benign, uint8 [N, H, W, 3] or floating point in [0, 1].
        targets: integers [N], the classes to be predicted; under `goal` "untargeted" those that are
            to be left.
        target_maps: [N, h, w] in [0, 1]; an image whose target map is NaN, as `explain` returns it
            for an image that fails, fails here too. Of several interpreters a sequence of such
            arrays, in their order. Plain PGD needs none.
        interpreter: "grad", "cam", "grad_cam", "rts" (whose model is a
            `models.ClassifierWithMasker`), "mask", an `Interpreter` of your own,
            `interpreters.joint` of several that each image is to fool, or None for plain PGD on
            ℓ_prd. With a `Preset` of your own a name must be that of its interpreter.
        threat: the threat model: `threats.linf` (8/255 unless given), `l2`, `flow`, `linf_flow`, or
            a `Threat` of your own.
        preset: "default", "auto", "paper", "quick", or a `Preset` of your own.
        warm_steps, steps: replace those of the preset; its schedules stretch with `steps`.
        goal: "targeted" unless the preset has another; "untargeted" takes the strongest class beside
            the target, whichever it is at each step; "keep" says that targets are the classes that
            the network predicts already, so that only the map moves.
        restarts: number of attacks on each image (see `Preset`); the image whose map is closest of
            those that succeed is returned, without an interpreter the most confident one.
        batch_size: images at a time on each device. Changes memory and speed; results to the last
            bits of float32. One for which memory runs out is halved, with a warning, also in later
            calls of the same attack.
        driver: "auto", "fori" or "host" (see `descent.drive`).
        on_step: called with the number of new steps; `count_steps` returns their total.
        snapshots: M, the number of images to return snapshots of, at most N.
        all_may_fail: return a result even if every image fails, instead of refusing the network.
        keys: `image_keys`, for interpreters that draw random numbers; unless given, those of seed 0
            and indices 0..N-1.
        precision: of the products in attack steps, one of `precision.PRECISIONS`; what is returned
            is computed at "highest". On a CPU only "bfloat16" differs.
        devices: number of devices of this host to use; all unless given. Changes no result.

    Returns:
        The adversarial images, their logits and maps, and the cost.

    Raises:
        ValueError: for an argument out of range, or if all images fail; one line.
    """
    threat = threats.linf() if threat is None else threat
    resolved = resolve(
        preset,
        interpreter,
        threat=threat,
        warm_steps=warm_steps,
        steps=steps,
        goal=goal,
        restarts=restarts,
    )
    if resolved.restarts > 1 and threat.noise is None:
        raise ValueError(
            f"restarts = {resolved.restarts} start from noise, and the threat model {threat.name!r} "
            "has none"
        )
    benign = np.asarray(check_images(images))
    n, count = len(benign), number_of_devices(devices)
    problems = _problems(model, benign, targets, target_maps, resolved, all_may_fail)._replace(
        key=image_keys(0, np.arange(n)) if keys is None else np.asarray(keys)
    )
    model = replicate(static_leaves(model), count)
    stepped = _of_steps(model, benign.shape[1:], precision)
    # pixels between two levels may have no level inside a small ball: a threat model refuses them
    # before any work is done
    for image in () if benign.dtype == np.uint8 else benign:
        threat.check(to_unit(image))
    together = min(batch_size, n) * count

    def attack_batch(batch: tuple[np.ndarray, Problem]) -> Result:
        indices, some = batch
        # steps are those of batches as asked for: of halves, the first reports them
        first = any(i % together == 0 for i in indices)
        each = [
            _attack_batch(
                model,
                stepped,
                benign[indices],
                some,
                resolved,
                threat,
                _scattered(some, i, threat) if i else None,
                driver,
                on_step if first else None,
                min(snapshots, n) - int(indices[0]),
                precision,
                count,
            )
            for i in range(resolved.restarts)
        ]
        return each[0] if len(each) == 1 else _best(model, each, some, resolved, threat)

    program = architecture(stepped), benign.shape[1:], resolved, threat
    result = _by_batches(attack_batch, (np.arange(n), problems), batch_size, count, program)
    _check_failed(result.failed, all_may_fail)
    return result


def noise(
    model: Classifier,
    images: ArrayLike,
    targets: ArrayLike,
    *,
    threat: Threat,
    batch_size: int = 32,
    keys: ArrayLike | None = None,
    devices: int | None = None,
) -> Result:
    """Change images at random, by as much as a threat model allows: a control beside `attack`.

    It costs no gradient. Images are rounded at once, `float_*` are those too. One that fails keeps
    its noise.

    Args:
        model: the classifier.
        images: benign, uint8 [N, H, W, 3].
        targets, threat, batch_size, keys, devices: as in `attack`; the noise of an image depends on
            its key alone. The threat model must have `noise`.

    Returns:
        As `attack` of plain PGD, without steps: curves are [N, 0].
    """
    benign = np.asarray(check_images(images))
    n = len(benign)
    keys = image_keys(0, np.arange(n)) if keys is None else np.asarray(keys)
    drawn = _noisy(*jax.device_put((to_unit(benign, np.float32), keys)), threat)
    params, x = jax.tree.map(np.array, jax.device_get(drawn))
    rounded = to_uint8(_rounded(x, params, benign, threat))
    seen = explain(
        model,
        rounded,
        targets,
        interpreter=no_map,
        batch_size=batch_size,
        all_may_fail=True,
        devices=devices,
    )
    curves, none = Info(*[np.zeros((n, 0))] * 3), np.zeros((0, 0, *benign.shape[1:]), np.uint8)
    x = to_unit(rounded, np.float32)
    return Result(rounded, *seen, x, *seen, np.zeros(n), params, curves, none, ~finite(seen))


@partial(jax.jit, static_argnums=2)
@partial(jax.vmap, in_axes=(0, 0, None))
def _noisy(image: Image, key: jax.Array, threat: Threat) -> tuple[Params, Image]:
    """Return random parameters of a threat model, and the image that they make."""
    assert threat.noise is not None
    params = threat.noise(jax.random.fold_in(jax.random.wrap_key_data(key), NOISE), image)
    return params, threat.apply(params, image)


def image_keys(seed: int, places: ArrayLike) -> np.ndarray:
    """Return the raw data of a PRNG key [N, ...] for each image, from a seed and its index.

    Args:
        seed: any whole number, taken modulo 2^32.
        places: [N], the index of each image in its source: keys do not depend on batches.
    """
    # "allow": a key is made from numbers of the host
    with jax.transfer_guard("allow"):
        key, indices = jax.random.key(seed % 2**32), np.asarray(places, np.uint32)
        return jax.device_get(
            jax.vmap(lambda index: jax.random.key_data(jax.random.fold_in(key, index)))(indices)
        )


def _scattered(problems: Problem, restart: int, threat: Threat) -> Params:
    """Return random parameters of a threat model for each image, half as far away as its noise."""
    drawn = jax.device_put((problems.image, problems.key, np.int32(restart)))
    return jax.device_get(_halfway(*drawn, threat))


@partial(jax.jit, static_argnums=3)
@partial(jax.vmap, in_axes=(0, 0, None, None))
def _halfway(image: Image, key: jax.Array, restart: Any, threat: Threat) -> Params:
    assert threat.noise is not None
    # below the word of noise, and above any number of steps
    drawn = threat.noise(jax.random.fold_in(jax.random.wrap_key_data(key), NOISE - restart), image)
    return threat.project(jax.tree.map(lambda p: p / 2, drawn), image)


def _best(
    model: Classifier,
    results: Sequence[Result],
    problems: Problem,
    preset: Preset,
    threat: Threat,
) -> Result:
    """Return the best of several attacks for each image, by the criterion of the descent.

    Its work is that of all of them.
    """
    values, least = [], joint_options(preset, threat).confidence
    if preset.calibrated:
        least = jax.device_get(thresholds(model, jax.device_put(problems.image)))
    for one in results:
        classes = reached(one.logits, problems.target, preset.goal)
        hit = metrics.success(one.logits, classes)
        f_t, maps = metrics.confidence(one.logits, classes), jax.tree.leaves(one.maps)
        distance = 1 - f_t
        if preset.interpreters:
            goals = jax.tree.leaves(problems.target_map)
            pairs = zip(maps, goals, strict=True)
            distance = np.mean([metrics.map_l1(m, goal) for m, goal in pairs], axis=0)
        excess = jax.device_get(excesses(model, to_unit(one.images, np.float32)))
        value = criterion(f_t, distance, hit & (f_t >= least), excess)
        values.append(np.where(one.failed, np.inf, value))
    best = np.argmin(values, axis=0)

    def choose(*leaves: np.ndarray) -> np.ndarray:
        # snapshots are of the first images only
        images = np.arange(len(leaves[0]))
        return np.stack(leaves)[best[images], images]

    best_of_each = jax.tree.map(choose, *results)
    return best_of_each._replace(work=np.sum([one.work for one in results], axis=0))


def reached(logits: ArrayLike, targets: ArrayLike, goal: str) -> np.ndarray:
    """Return the classes [N] that attacks drive at, or have reached."""
    return metrics.strongest_other(logits, targets) if goal == "untargeted" else np.asarray(targets)


def no_map(model: Classifier, image: Image, label: Label) -> Map:
    """Return a map without pixels, [0, 0]: what `explain` takes to compute logits only."""
    return jnp.zeros((0, 0))


def explain(
    model: Classifier,
    images: ArrayLike | LazyImages,
    labels: ArrayLike,
    *,
    interpreter: str | Interpreter | Joint | Explain,
    batch_size: int = 64,
    driver: Driver = "auto",
    all_may_fail: bool = False,
    devices: int | None = None,
) -> tuple[np.ndarray, np.ndarray | Any]:
    """Return logits and maps of a set of images.

    Args:
        model: the classifier.
        images: uint8 [N, H, W, 3] or floating point in [0, 1].
        labels: integers [N], the classes to explain.
        interpreter: a key of `interpreters.INTERPRETERS`, an `Interpreter`, `interpreters.joint` of
            several, or a pure one-image function (model, image, label) -> map. It is compiled once for each object, or each
            value of `options.bind`.
        batch_size: as in `attack`.
        driver: of an interpreter that is a descent itself: "auto", "fori" or "host" (see
            `descent.drive`).
        all_may_fail: return even if no image has finite logits and a finite map, instead of
            refusing the network.
        devices: as in `attack`.

    Returns:
        logits [N, K], maps [N, h, w] in [0, 1]. A map with a value that is not finite is NaN
        throughout. Of several interpreters the maps are a tuple of such arrays.

    Raises:
        ValueError: for an argument out of range, or if all images fail; one line.
    """
    x = check_images(images)
    if isinstance(interpreter, Joint):
        one = partial(
            explain,
            model,
            x,
            labels,
            batch_size=batch_size,
            driver=driver,
            all_may_fail=all_may_fail,
            devices=devices,
        )
        each = [one(interpreter=part) for part in interpreter.interpreters]
        return each[0][0], tuple(maps for _, maps in each)
    inputs = x, _classes("labels", labels, model, x)
    if isinstance(interpreter, str):
        interpreter = look_up(INTERPRETERS, "interpreter", interpreter)()
    interpreter = interpreter if isinstance(interpreter, Interpreter) else of_function(interpreter)
    check_interpreter(model, x.shape[1:], interpreter)
    count, faces = number_of_devices(devices), (interpreter.explain, interpreter.solver)
    model = replicate(static_leaves(model), count)
    logits, maps = _by_batches(
        lambda batch: _seen(model, batch[0], batch[1], *faces, driver, count),
        inputs,
        batch_size,
        count,
        (architecture(model), x.shape[1:], *faces),
    )
    _check_failed(~finite((logits, maps)), all_may_fail)
    return logits, maps


def map_shape(
    model: Classifier, shape: tuple[int, ...], interpreter: Interpreter
) -> tuple[int, ...]:
    """Return h, w of an interpreter's maps of images [H, W, 3]; traced, not computed."""
    return _map_shape(architecture(model), tuple(shape), interpreter.explain, interpreter.solver)


# every batch asks for it, and a trace of a large network takes seconds; the key is the
# architecture, so other weights of the same network share the entry
@lru_cache(maxsize=64)
def _map_shape(
    known: Architecture, shape: tuple[int, ...], explain: Explain, solver: Solver | None
) -> tuple[int, ...]:
    model, image, label = _abstract(known, shape)
    return jax.eval_shape(
        partial(explain_one, interpreter=explain, solver=solver),
        model,
        image,
        label,
        _memory(image, solver),
    )[1].shape


def missing(model: Classifier, interpreter: Interpreter) -> str | None:
    """Return the first of an interpreter's `needs` that a model lacks, None if it has all."""
    return next(iter(lacks(model, *interpreter.needs)), None)


def check_interpreter(
    model: Classifier, shape: tuple[int, ...], interpreter: Interpreter, *, attacked: bool = False
) -> tuple[int, ...]:
    """Return the map shape of an interpreter that can explain a model on images [H, W, 3].

    Args:
        model: the classifier.
        shape: of the images, [H, W, 3].
        interpreter: to be checked.
        attacked: whether it must be fit to be attacked too.

    Raises:
        ValueError: if it is not fit, or its maps have fewer than four entries (`no_map` has none).
    """
    lacking, kind = missing(model, interpreter), type(model).__name__
    if lacking == "masker":
        raise ValueError(
            f"{interpreter.name} needs a masker: its model is a "
            f"models.ClassifierWithMasker(classifier, masker), not a {kind}"
        )
    if lacking == "attend":
        raise ValueError(
            f"{interpreter.name} needs a transformer: {kind}.logits has no option attend "
            "(see models.VisionTransformer)"
        )
    if lacking is not None:
        raise ValueError(
            f"{interpreter.name} needs features and head, and {kind} has no method {lacking}; "
            "grad and mask need logits only"
        )
    if attacked and "act" in interpreter.needs:
        check_activation(model, shape)
    if interpreter.check is not None:
        interpreter.check(model, shape)
    expected = map_shape(model, shape, interpreter)
    # a map of one entry, scaled by its own minimum and maximum, is always 0
    if 0 < math.prod(expected) < 4:
        raise ValueError(
            f"{interpreter.name} draws maps {list(expected)} of images {list(shape)}: "
            "fewer than 2 x 2 entries show nothing; use larger images, or a network whose last features are finer"
        )
    return expected


def check_target_maps(
    model: Classifier,
    shape: tuple[int, ...],
    interpreter: Interpreter,
    maps: tuple[int, ...] | None,
) -> None:
    """Refuse an interpreter that cannot be attacked, and target maps of another shape than its own.

    Args:
        model: the classifier.
        shape: of the images, [N, H, W, 3].
        interpreter: the one to be attacked.
        maps: shape of the target maps; None where they are yet to be drawn.

    Raises:
        ValueError: names the interpreter, and what it wants.
    """
    expected = (shape[0], *check_interpreter(model, shape[1:], interpreter, attacked=True))
    if maps not in (None, expected):
        raise ValueError(
            f"target_maps must be {list(expected)} for {interpreter.name}, got {list(maps or ())}"
        )


def _of_steps(model: Classifier, shape: tuple[int, ...], precision: str) -> Classifier:
    """Return the network as attack steps compute it, on images [H, W, 3]; refuse one that cannot.

    Raises:
        ValueError: for another precision, or a network that does not take weights in bfloat16.
    """
    with at(precision):
        used = computing(model, precision)
    if used is model:
        return model
    if parts_of(model)[1] is not None:
        raise ValueError(f"precision {precision!r} rounds a detector's threshold: take another")
    try:
        jax.eval_shape(logits_of, used, jax.ShapeDtypeStruct(shape, np.float32))
    except Exception as error:  # a user's network: JAX, Flax or it refuses types that do not fit
        raise ValueError(
            "precision 'bfloat16' needs a network that casts its image to the type of its weights: "
            + first_line(error)
        ) from None
    return used


def gradient_evaluations(
    model: Classifier, preset: Preset, threat: Threat, shape: tuple[int, ...]
) -> float:
    """Return the work of an attack on one image, in gradients of ℓ_prd (steps of plain PGD).

    Work is the number of multiply-adds of convolutions and dots in the traced steps, in the solver
    of the interpreter, and in the explained maps that iterates are compared by; one decimal.
    Nothing is computed, and the traces are those that the attack needs anyway. A network without
    convolutions and dots is charged one for each step.

    Args:
        model: the classifier.
        preset: of the attack.
        threat: the threat model.
        shape: of the image, [H, W, 3].
    """
    return _gradient_evaluations(architecture(model), preset, threat, tuple(shape))


def _spent(
    model: Classifier, preset: Preset, threat: Threat, shape: tuple[int, ...], steps: np.ndarray
) -> np.ndarray:
    """Return the `gradient_evaluations` of one attack on each image, by its number of joint steps."""
    known, which = np.unique(steps, return_inverse=True)
    once = [replace(preset, steps=int(n), restarts=1) for n in known]
    return np.array([gradient_evaluations(model, one, threat, shape) for one in once])[which]


@lru_cache(maxsize=256)  # a run asks once a batch
def _gradient_evaluations(
    known: Architecture, preset: Preset, threat: Threat, shape: tuple[int, ...]
) -> float:
    # the unit is that of the network alone; steps that evade a detector too cost more
    bare = architecture(parts_of(known.model())[0])
    unit = _work_of_step(bare, Options(threat), (), shape)
    # a network without convolutions and dots has no work to divide by
    if not unit:
        return float(preset.restarts * (preset.warm_steps + preset.steps))
    options, (model, image, label) = joint_options(preset, threat), _abstract(known, shape)
    spent = preset.warm_steps * _work_of_step(known, Options(threat), (), shape)
    spent += preset.steps * _work_of_step(known, options, preset.interpreters, shape)
    comparisons = math.ceil(preset.steps / preset.score_every) if scores_apart(preset) else 0
    for interpreter in preset.interpreters:
        solver = interpreter.solver
        memory = _memory(image, solver)
        if comparisons:
            look = partial(explain_one, interpreter=interpreter.explain, solver=solver)
            spent += comparisons * multiply_adds(look, model, image, label, memory)
        if solver is not None:
            solving = solver_step_of(solver), model, (image, label), memory, np.int32(0)
            # once at the start of the joint stage, and once for each comparison
            spent += (1 + comparisons) * solver.steps * multiply_adds(*solving)
    return round(preset.restarts * spent / unit, 1)


@lru_cache(maxsize=256)  # every preset is compared with the same step of plain PGD
def _work_of_step(
    known: Architecture,
    options: Options,
    interpreters: tuple[Interpreter, ...],
    shape: tuple[int, ...],
) -> int:
    """Return the multiply-adds of one step on one image.

    Arguments have the very types of those in `attack`: then `descent.step_of` is traced once.
    """
    inputs = _step_inputs(known, options, interpreters, shape)
    return multiply_adds(step_of(options), *inputs)


def _step_inputs(
    known: Architecture,
    options: Options,
    interpreters: tuple[Interpreter, ...],
    shape: tuple[int, ...],
) -> tuple[Any, Problem, State, Numbers]:
    """Return the abstract model, problem, state and numbers of a step on one image [H, W, 3]."""
    model, image, label = _abstract(known, shape)
    # (1, 1) is the shape of the empty target map that `_problems` gives to plain PGD
    sizes = [map_shape(model, shape, one) for one in interpreters] or [(1, 1)]
    maps = packed([jax.ShapeDtypeStruct(size, np.float32) for size in sizes], options)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    memories = [
        _memory(image, one.solver) if one.init is None else jax.eval_shape(one.init, model, image)
        for one in interpreters
    ]
    start = partial(init, options=options)
    state = jax.eval_shape(start, image, memory=packed(memories, options))
    several = np.ones([len(options.parts)] if options.parts else [], np.float32)
    numbers = Numbers(np.float32(1), several, several)
    return model, Problem(image, label, maps, key), state, numbers


def fitting_batch_size(
    model: Classifier,
    presets: Iterable[Preset],
    threat: Threat,
    shape: tuple[int, ...],
    precision: str = "high",
) -> int | None:
    """Return the largest batch size that fits into the memory of a device, a power of two.

    It is that of the joint step with the most work, which is compiled for two small batches.

    Args:
        model: the classifier.
        presets: of the attacks that it is for, one or more.
        threat, precision: as in `attack`.
        shape: of the images, [H, W, 3].

    Returns:
        None where the backend does not tell its memory.

    Raises:
        ValueError: an interpreter cannot be attacked on such a model; one line.
    """
    attacked = []
    for preset in presets:
        for interpreter in preset.interpreters:
            check_interpreter(model, shape, interpreter, attacked=True)
        attacked.append((joint_options(preset, threat), preset.interpreters))
    known = architecture(_of_steps(model, shape, precision))
    with at(precision):
        options, interpreters = max(
            attacked, key=lambda one: _work_of_step(known, one[0], one[1], shape)
        )
        abstract, *inputs, numbers = _step_inputs(known, options, interpreters, shape)
        leaves, step = batched_step(abstract, options)

        def lowered(size: int) -> jax.stages.Lowered:
            batch = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), inputs
            )
            return step.lower(leaves, *batch, numbers)  # type: ignore

        return largest_batch(lowered)


def _abstract(known: Architecture, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Return an abstract model, image [H, W, 3] and label."""
    return (
        known.model(),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct((), np.int32),
    )


def _memory(image: Any, solver: Solver | None) -> Any:
    return None if solver is None else jax.eval_shape(solver.init, image)


def count_steps(preset: Preset, n: int, batch_size: int, devices: int | None = None) -> int:
    """Return the number of steps that `attack` reports through `on_step` for n images."""
    together = min(batch_size, n) * number_of_devices(devices)
    return math.ceil(n / together) * preset.restarts * (preset.warm_steps + preset.steps)


def batches(arrays: T, size: int, devices: int = 1, start: int = 0) -> Iterator[T]:
    """Yield batches of one size; the last is padded by repeating its last entry.

    Args:
        arrays: a pytree whose leaves have a leading axis [N].
        size: of a batch on each device; N if there are no more.
        devices: their number.
        start: index of the first entry.

    Raises:
        ValueError: if the size is below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size = {size} must be at least 1")
    n = len(jax.tree.leaves(arrays)[0])
    # not N / devices each: a batch of another size rounds otherwise, in the last bits of losses
    together = min(size, n) * devices
    for first in range(start, n, together):
        # one size, so that a smaller last batch is not compiled again
        indices = np.minimum(np.arange(first, first + together), n - 1)
        yield jax.tree.map(itemgetter(indices), arrays)


def _by_batches(
    compute: Callable[[Any], T], arrays: Any, size: int, devices: int, program: Any
) -> T:
    """Compute batch after batch, at half the size from where the memory of a device runs out.

    Args:
        compute: batch -> a pytree of NumPy arrays with a leading axis.
        arrays: a pytree whose leaves have a leading axis [N].
        size: of a batch on each device.
        devices: their number.
        program: hashable, what the memory depends on besides the size.

    Returns:
        the results, joined; leading axis [N].

    Raises:
        MemoryError: a batch of one image does not fit; one line.
    """
    n, done, parts = len(jax.tree.leaves(arrays)[0]), 0, []
    while done < n:
        size = min(size, n, _SMALLER.get(program, size))
        try:
            # images that are decoded on demand are decoded while the device works on the batch
            # before
            for batch in ahead(batches(arrays, size, devices, done)):
                parts.append(compute(batch))
                done += size * devices
        except jax.errors.JaxRuntimeError as error:  # XLA has one error for everything
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if size == 1:
                raise MemoryError(
                    "the device has none left for one image at a time: end other programs on it, "
                    "or use smaller images, a smaller network or another device"
                ) from None
            _SMALLER[program] = size // 2
            log.warning(
                "out of memory in batches of %d: going on in batches of %d", size, size // 2
            )
    # the last batch is padded
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)


def to_unit(x: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """Return uint8 or floating-point images in [0, 1]; values within ULP of k/255 are k/255."""
    if x.dtype == np.uint8:
        return x.astype(dtype) / 255
    values = x.astype(dtype)
    grid = np.round(values * 255) / 255
    return np.where(np.abs(values - grid) <= ULP, grid, values)


def to_uint8(x: Any) -> np.ndarray:
    """Return images in [0, 1] as 8-bit images; NaN becomes 0."""
    return np.round(np.nan_to_num(np.asarray(x)) * 255).astype(np.uint8)


def check_images(images: ArrayLike | LazyImages) -> Images:
    """Return images, uint8 or floating point in [0, 1], as an array [N, H, W, 3].

    Those that are decoded on demand stay as they are.

    Raises:
        ValueError: for another type, shape or range, or NaN.
    """
    x = images if isinstance(images, LazyImages) else np.asarray(images)
    if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"images must be [N, H, W, 3] with N >= 1, got {list(x.shape)}")
    if isinstance(x, LazyImages) or x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise ValueError(f"images must be uint8, or floating point in [0, 1], got {x.dtype}")
    # in this form NaN is refused too
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], got {x.min()}..{x.max()}")
    return x


def _problems(
    model: Classifier,
    x: np.ndarray,
    targets: ArrayLike,
    target_maps: ArrayLike | Sequence[ArrayLike] | None,
    preset: Preset,
    all_may_fail: bool,
) -> Problem:
    """Return the checked arguments of `attack`, in NumPy: batches move to the device one by one."""
    t = _classes("targets", targets, model, x)
    interpreters = preset.interpreters
    if not interpreters:
        return Problem(to_unit(x, np.float32), t, np.zeros((len(x), 1, 1), np.float32))
    given: Any = target_maps if preset.parts else [target_maps]
    if given is None or len(given) != len(interpreters):
        names = ", ".join(one.name for one in interpreters)
        raise ValueError(f"target_maps must be a sequence of an array for each of {names}")
    maps = [
        _target_maps(model, x, one, some, all_may_fail)
        for one, some in zip(interpreters, given, strict=True)
    ]
    return Problem(to_unit(x, np.float32), t, tuple(maps) if preset.parts else maps[0])


def _target_maps(
    model: Classifier,
    x: np.ndarray,
    interpreter: Interpreter,
    target_maps: ArrayLike | None,
    all_may_fail: bool,
) -> np.ndarray:
    """Return the checked target maps of an interpreter."""
    maps = np.zeros(()) if target_maps is None else np.asarray(target_maps, np.float32)
    check_target_maps(model, x.shape, interpreter, maps.shape)
    # a map that is NaN throughout is that of an image that failed in `explain`: it fails here too,
    # and must not stop the others
    given = maps[~np.isnan(maps).all(axis=(1, 2))]
    if not (all_may_fail or len(given)) or not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"target_maps must lie in [0, 1], got {maps.min()}..{maps.max()}")
    return maps


def _check_failed(failed: np.ndarray, all_may_fail: bool) -> None:
    if failed.all() and not all_may_fail:
        raise ValueError(
            "the network gives logits or gradients that are not finite numbers on these images"
        )


def finite(values: Any) -> np.ndarray:
    """Return bool [N]: entries of the leading axis that are finite in all leaves of a pytree."""
    leaves = jax.tree.leaves(values)
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves], axis=0)


def _classes(name: str, values: ArrayLike, model: Classifier, x: Images) -> np.ndarray:
    """Return class indices as int32 [N], checked: one for each image, in the model's range."""
    classes = np.asarray(values)
    check_integers(name, classes, len(x))
    check_range(name, classes, num_classes(model, x.shape[1:]))
    return classes.astype(np.int32)


def _attack_batch(
    model: Classifier,
    stepped: Classifier,
    benign: np.ndarray,
    problems: Problem,
    preset: Preset,
    threat: Threat,
    start: Params,
    driver: Driver,
    on_step: OnStep | None,
    pictured: int,
    precision: str,
    devices: int,
) -> Result:
    """Attack one batch, with snapshots of the first `pictured` images.

    The steps take `stepped`, what is returned is of `model`.
    """
    on_device = spread(problems, devices)
    with at(precision):
        crafted = craft(
            stepped,
            on_device,
            preset,
            threat,
            driver=driver,
            on_step=on_step,
            pictured=max(pictured, 0),
            start=None if start is None else spread(start, devices),
        )
    x = images_of(on_device.image, crafted.params, threat)
    # np.array: what `device_get` returns may be read-only, and failed images are overwritten below
    x, params, last, taken, curves = jax.tree.map(
        np.array, jax.device_get((x, crafted.params, crafted.last, crafted.steps, crafted.curves))
    )
    with at(precision):  # as the steps were, so that nothing is traced again
        spent = _spent(model, preset, threat, benign.shape[1:], taken)
    if preset.enough:  # an image that is done reports its last step from then on
        step = np.arange(preset.warm_steps + preset.steps)
        until = np.minimum(step, preset.warm_steps + taken[:, None] - 1)
        rows = np.arange(len(taken))[:, None]
        curves = jax.tree.map(lambda curve: curve[rows, until], curves)
    # steps of plain PGD draw no map, and report a distance of 0
    curves.map_l1[:, : preset.warm_steps if preset.interpreters else None] = np.nan
    pictures = (
        np.zeros((len(snapshot_steps(preset)), 0, *benign.shape[1:]))
        if crafted.pictures is None
        else jax.device_get(crafted.pictures)
    )
    rounded = _rounded(x, params, benign, threat)
    faces: list[tuple[Explain, Solver | None]] = [
        (one.explain, one.solver) for one in preset.interpreters
    ] or [(no_map, None)]

    def seen(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        classes = problems.target
        if preset.goal == "untargeted":
            logits, _ = _seen(model, images, classes, no_map, None, driver, devices)
            classes = reached(logits, classes, preset.goal)
        each = [_seen(model, images, classes, *one, driver, devices) for one in faces]
        maps = tuple(drawn for _, drawn in each)
        return images, each[0][0], maps if preset.parts else maps[0]

    results, float_results = seen(to_uint8(rounded)), seen(x)
    # `last`, not `params`: the best iterate stays finite when the gradients after it are not
    failed = ~finite((last, problems.target_map, results, float_results))
    if failed.any():
        # parameters too, or the saved ones would disagree with the unchanged image
        unchanged = jax.device_get(jax.vmap(threat.init)(problems.image))
        for values, old in zip(jax.tree.leaves(params), jax.tree.leaves(unchanged), strict=True):
            values[failed] = old[failed]
        for (images, logits, maps), old in (
            (results, to_uint8(to_unit(benign))),
            (float_results, problems.image),
        ):
            images[failed] = old[failed]
            for values in jax.tree.leaves((logits, maps)):
                values[failed] = np.nan
    snapshots = to_uint8(pictures).swapaxes(0, 1)
    return Result(*results, *float_results, spent, params, curves, snapshots, failed)


def _rounded(x: np.ndarray, params: Params, benign: np.ndarray, threat: Threat) -> list[Any]:
    """Return the nearest allowed 8-bit images, in [0, 1], of images that parameters make."""
    # in float64, where k/255 and the radius of a ball are exact enough for "always inside"
    x64: Any = x.astype(np.float64)
    return [
        threat.round(x64[i], jax.tree.map(itemgetter(i), params), image)
        for i, image in enumerate(to_unit(benign))
    ]


def _seen(
    model: Classifier,
    images: Any,
    labels: Any,
    interpreter: Explain,
    solver: Solver | None,
    driver: Driver,
    devices: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and maps of a batch in NumPy; a map with a value that is not finite is NaN."""
    x, classes = spread((to_unit(images, np.float32), labels), devices)
    with at("highest"):
        seen = look(model, x, classes, interpreter, solver, driver)[:2]
    logits, maps = map(np.array, jax.device_get(seen))
    # one bad value spoils a scaled map, so no part of it can be compared
    maps[~finite(maps)] = np.nan
    return logits, maps
