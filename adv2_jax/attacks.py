"""The attack: a warm start by plain PGD, the joint descent, the best iterate kept, the result rounded to 8 bits and scored."""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adv2_jax import threats
from adv2_jax.capabilities import (
    Architecture,
    architecture,
    check_activation,
    num_classes,
    static_leaves,
)
from adv2_jax.cost import multiply_adds
from adv2_jax.crafting import craft, explain_one, images_of, joint_options, look, scores_apart
from adv2_jax.descent import (
    Driver,
    Info,
    Numbers,
    OnStep,
    Options,
    Problem,
    init,
    solver_step_of,
    step_of,
)
from adv2_jax.interpreters import INTERPRETERS, Explain, Interpreter, Solver, of_function
from adv2_jax.presets import Preset, look_up, resolve
from adv2_jax.threats import Params, Threat
from adv2_jax.types import Classifier, Image, Label, Map

T = TypeVar("T")

# of float32 in [.5, 1): whoever divides 8-bit images by 255 in float32 is on the grid of 8-bit
# images
ULP = 2.0**-24


class Result(NamedTuple):
    """A finished attack on N images. `float_*` is what it was before rounding; everything else is
    measured on the 8-bit images.

    An image on which the network gives logits, maps or gradients that are not finite numbers has
    failed: it is handed back unchanged, and its logits and maps are not a number.

    Attributes:
        images: uint8 [N, H, W, 3], adversarial.
        logits: [N, K].
        maps: [N, h, w] in [0, 1], explained for the targets; empty without an interpreter.
        float_images: [N, H, W, 3] in [0, 1].
        float_logits: [N, K].
        float_maps: [N, h, w].
        gradient_evaluations: work on each image in gradients of ℓ_prd (see the function of that
            name).
        params: of the threat model, a pytree whose leaves have a leading axis [N].
        curves: what the n steps, those of the warm start too, reported for the iterates they
            started from, [N, n]; `map_l1` is not a number where a step draws no map.
        snapshots: uint8 [M, S, H, W, 3], the first M images at `snapshot_steps`; the last is what
            is delivered.
        failed: bool [N].
    """

    images: np.ndarray
    logits: np.ndarray
    maps: np.ndarray
    float_images: np.ndarray
    float_logits: np.ndarray
    float_maps: np.ndarray
    gradient_evaluations: float
    params: Params
    curves: Info
    snapshots: np.ndarray
    failed: np.ndarray


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
    all_may_fail: bool = False,
    keys: ArrayLike | None = None,
) -> Result:
    """Fool the classifier and the interpreter at once.

    Args:
        model: any pytree with what the interpreter needs: `logits`, or `features` and `head`
            (`adv2_jax.types.Classifier`).
        images: benign, uint8 [N, H, W, 3] or floating point in [0, 1].
        targets: integers [N], the classes to be predicted.
        target_maps: [N, h, w] in [0, 1], the maps to be shown; an image whose map is not a number,
            as `explain` gives it where it fails, fails here too. Plain PGD needs none.
        interpreter: "grad", "cam", "grad_cam", "rts" (whose model is a
            `models.ClassifierWithMasker`), "mask", an `Interpreter` of your own, or None for plain
            PGD on ℓ_prd. With a `Preset` of your own a name must be that of its interpreter.
        threat: what may be changed: `threats.linf` (8/255 unless given), `l2`, `flow`, `linf_flow`,
            or a `Threat` of your own.
        preset: "default", "paper", "quick", or a `Preset` of your own.
        warm_steps, steps: take the place of the preset's; its schedules stretch with `steps`.
        batch_size: images at a time. Changes memory and speed; no image sees its batch mates.
        driver: "auto", "fori" or "host" (see `descent.descend`).
        on_step: called with the number of steps newly done; `count_steps` says how many there will
            be.
        snapshots: of how many images, M or all if there are fewer, to keep what they were on the
            way. At `snapshot_steps` the descent then pauses for them.
        all_may_fail: give a result of nothing but failed images too, instead of refusing the
            network.
        keys: of `image_keys`, what an interpreter that draws random numbers draws them from; unless
            given, of seed 0 and the images' places.

    Returns:
        The adversarial images and what they do.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed; or all images fail.
    """
    threat = threats.linf() if threat is None else threat
    resolved = resolve(preset, interpreter, threat=threat, warm_steps=warm_steps, steps=steps)
    _check_batch_size(batch_size)
    benign = check_images(images)
    drawn = image_keys(0, np.arange(len(benign))) if keys is None else np.asarray(keys)
    problems = _problems(
        model, benign, targets, target_maps, resolved.interpreter, all_may_fail
    )._replace(key=drawn)
    model = static_leaves(model)
    for image in () if benign.dtype == np.uint8 else benign:
        threat.check(_unit(image))
    n = len(benign)
    parts = [
        _attack_batch(
            model,
            benign[index],
            batch,
            resolved,
            threat,
            driver,
            on_step,
            min(snapshots, n) - i * batch_size,
        )
        for i, (index, batch) in enumerate(batches((np.arange(n), problems), batch_size))
    ]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    taken, whole = whole.snapshots, jax.tree.map(itemgetter(slice(n)), whole._replace(snapshots=()))
    _check_failed(whole.failed, all_may_fail)
    (x, logits, maps), (float_x, float_logits, float_maps) = whole.seen, whole.float_seen
    evaluations = gradient_evaluations(model, resolved, threat, benign.shape[1:])
    return Result(
        x,
        logits,
        maps,
        float_x,
        float_logits,
        float_maps,
        evaluations,
        whole.params,
        whole.curves,
        taken,
        whole.failed,
    )


def image_keys(seed: int, places: ArrayLike) -> np.ndarray:
    """Raw data of a PRNG key for each image [N, ...], from a seed and the place of the image in its source alone."""
    with jax.transfer_guard("allow"):
        key, where = jax.random.key(seed % 2**32), np.asarray(places, np.uint32)
        return jax.device_get(
            jax.vmap(lambda place: jax.random.key_data(jax.random.fold_in(key, place)))(where)
        )


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
    all_may_fail: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and maps of a set of images.

    Args:
        model: the classifier.
        images: uint8 [N, H, W, 3] or floating point in [0, 1].
        labels: integers [N], the classes to explain.
        interpreter: a key of `interpreters.INTERPRETERS`, an `Interpreter`, or a pure one-image
            function (model, image, label) -> map, which `jit` knows again only if it is the same
            object (or compares by value, as `options.bind` makes them).
        batch_size: images at a time.
        driver: of an interpreter that is a descent itself: "auto", "fori" or "host" (see
            `descent.drive`).
        all_may_fail: return also where no image has finite logits and a finite map, instead of
            refusing the network.

    Returns:
        logits [N, K], maps [N, h, w] in [0, 1]. Where the map of an image has numbers that are not
        finite, all of it is not a number.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed; or no image has finite
            logits and a finite map.
    """
    _check_batch_size(batch_size)
    x = check_images(images)
    inputs = x, _classes("labels", labels, model, x)
    if isinstance(interpreter, str):
        interpreter = look_up(INTERPRETERS, "interpreter", interpreter)()
    interpreter = interpreter if isinstance(interpreter, Interpreter) else of_function(interpreter)
    check_interpreter(model, x.shape[1:], interpreter)
    model, faces = static_leaves(model), (interpreter.explain, interpreter.solver)
    parts = [_seen(model, x, c, *faces, driver) for x, c in batches(inputs, batch_size)]
    logits, maps = (np.concatenate(part)[: len(x)] for part in zip(*parts, strict=True))
    _check_failed(~finite((logits, maps)), all_may_fail)
    return logits, maps


def map_shape(
    model: Classifier, shape: tuple[int, ...], interpreter: Interpreter
) -> tuple[int, ...]:
    """h, w of the maps that an interpreter draws of images of a shape [H, W, 3]; nothing is computed."""
    return _map_shape(architecture(model), tuple(shape), interpreter.explain, interpreter.solver)


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
    """What a model lacks to be explained by an interpreter: "features", "head" or "masker"; None if it has all."""
    return next(
        (need for need in interpreter.needs if need != "act" and not hasattr(model, need)), None
    )


def check_interpreter(
    model: Classifier, shape: tuple[int, ...], interpreter: Interpreter, *, attacked: bool = False
) -> tuple[int, ...]:
    """The map shape of an interpreter that can explain a model on images of a shape [H, W, 3], and
    be attacked if it is to be.

    Raises:
        ValueError: if it cannot, or its maps have fewer than four entries (`no_map` has none).
    """
    lacking = missing(model, interpreter)
    if lacking == "masker":
        kind = f"a models.ClassifierWithMasker(classifier, masker), not a {type(model).__name__}"
        raise ValueError(f"{interpreter.name} needs a masker: its model is {kind}")
    if lacking is not None:
        needs, others = (
            f"{interpreter.name} needs features and head",
            "grad and mask need logits only",
        )
        raise ValueError(f"{needs}, and {type(model).__name__} has no method {lacking}; {others}")
    if attacked and "act" in interpreter.needs:
        check_activation(model, shape)
    if interpreter.check is not None:
        interpreter.check(model, shape)
    drawn = map_shape(model, shape, interpreter)
    # a map of one entry, scaled by its own minimum and maximum, is always 0
    if 0 < math.prod(drawn) < 4:
        raise ValueError(
            f"{interpreter.name} draws maps {list(drawn)} of images {list(shape)}: fewer than 2 x 2 entries show nothing; "
            "use larger images, or a network whose last features are finer"
        )
    return drawn


def gradient_evaluations(
    model: Classifier, preset: Preset, threat: Threat, shape: tuple[int, ...]
) -> float:
    """Work of an attack on one image of a shape [H, W, 3], in units of one gradient of ℓ_prd in the
    image, a step of plain PGD.

    Counted are the multiply-adds of convolutions and dots in the traced steps, in the solver of the
    interpreter, and in the scoring for keep-best where the steps' own maps are not the explained
    ones; one decimal. Nothing is computed. A network without convolutions and dots is charged one
    for each step.
    """
    return _gradient_evaluations(architecture(model), preset, threat, tuple(shape))


@lru_cache(maxsize=256)  # a run asks once a batch
def _gradient_evaluations(
    known: Architecture, preset: Preset, threat: Threat, shape: tuple[int, ...]
) -> float:
    unit = _work_of_step(known, Options(threat), None, shape)
    if not unit:
        return float(preset.warm_steps + preset.steps)
    interpreter, options = preset.interpreter, joint_options(preset, threat)
    spent = preset.warm_steps * unit
    spent += preset.steps * _work_of_step(known, options, interpreter, shape)
    solves = int(interpreter is not None and interpreter.solver is not None)
    if interpreter is not None:
        model, image, label = _abstract(known, shape)
        solver = interpreter.solver
        memory = _memory(image, solver)
        scored = math.ceil(preset.steps / preset.score_every) if scores_apart(preset) else 0
        if scored:
            one = partial(explain_one, interpreter=interpreter.explain, solver=solver)
            spent += scored * multiply_adds(one, model, image, label, memory)
        if solver is not None:
            inputs = model, (image, label), memory, np.int32(0)
            spent += (scored + 1) * solver.steps * multiply_adds(solver_step_of(solver), *inputs)
    return round(spent / unit, 1)


@lru_cache(maxsize=256)  # every preset is compared with the same step of plain PGD
def _work_of_step(
    known: Architecture, options: Options, interpreter: Interpreter | None, shape: tuple[int, ...]
) -> int:
    """Multiply-adds of one step on one image."""
    model, image, label = _abstract(known, shape)
    drawn = (1, 1) if interpreter is None else map_shape(model, shape, interpreter)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    problem = Problem(image, label, jax.ShapeDtypeStruct(drawn, np.float32), key)
    memory = None if interpreter is None else _memory(image, interpreter.solver)
    state = jax.eval_shape(partial(init, options=options), problem, memory=memory)
    return multiply_adds(step_of(options), model, problem, state, Numbers(*[np.float32(1)] * 3))


def _abstract(known: Architecture, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """A model, an image of a shape [H, W, 3] and a label without values."""
    return (
        known.model(),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct((), np.int32),
    )


def _memory(image: Any, solver: Solver | None) -> Any:
    return None if solver is None else jax.eval_shape(solver.init, image)


def count_steps(preset: Preset, n: int, batch_size: int) -> int:
    """Steps that `attack` reports through `on_step` for n images."""
    return math.ceil(n / min(batch_size, n)) * (preset.warm_steps + preset.steps)


def batches(arrays: T, size: int) -> Iterator[T]:
    """Batches of one size, so of one compilation; the last is filled up with its last entry."""
    n = len(jax.tree.leaves(arrays)[0])
    for start in range(0, n, min(size, n)):
        index = np.minimum(np.arange(start, start + min(size, n)), n - 1)
        yield jax.tree.map(itemgetter(index), arrays)


def _unit(x: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """Images in [0, 1] from uint8 or floating point; what is k/255 to the last digit of float32 is k/255 in float64 too."""
    if x.dtype == np.uint8:
        return x.astype(dtype) / 255
    values = x.astype(dtype)
    grid = np.round(values * 255) / 255
    return np.where(np.abs(values - grid) <= ULP, grid, values)


def to_uint8(x: Any) -> np.ndarray:
    """Images in [0, 1] as 8-bit images; what is not a number becomes 0."""
    return np.round(np.nan_to_num(np.asarray(x)) * 255).astype(np.uint8)


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
    x: np.ndarray,
    targets: ArrayLike,
    target_maps: ArrayLike | None,
    interpreter: Interpreter | None,
    all_may_fail: bool,
) -> Problem:
    """The caller's arrays, checked and brought to one form; they stay on the host until their batch is attacked."""
    t = _classes("targets", targets, model, x)
    if interpreter is None:
        return Problem(_unit(x, np.float32), t, np.zeros((len(x), 1, 1), np.float32))
    expected = (len(x), *check_interpreter(model, x.shape[1:], interpreter, attacked=True))
    maps = np.zeros(()) if target_maps is None else np.asarray(target_maps, np.float32)
    if maps.shape != expected:
        raise ValueError(
            f"target_maps must be {list(expected)} for {interpreter.name}, got {list(maps.shape)}"
        )
    given = maps[~np.isnan(maps).all(axis=(1, 2))]
    if not (all_may_fail or len(given)) or not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"target_maps must lie in [0, 1], got {maps.min()}..{maps.max()}")
    return Problem(_unit(x, np.float32), t, maps)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")


def _check_failed(failed: np.ndarray, all_may_fail: bool) -> None:
    if failed.all() and not all_may_fail:
        raise ValueError(
            "the network gives logits or gradients that are not finite numbers on these images"
        )


def finite(values: Any) -> np.ndarray:
    """Which entries of the leading axis [N] are finite in every leaf of a pytree: bool [N]."""
    leaves = jax.tree.leaves(values)
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves], axis=0)


def _classes(name: str, values: ArrayLike, model: Classifier, x: np.ndarray) -> np.ndarray:
    """Class indices as int32 [N], one for each image of x and in the model's range."""
    classes = np.asarray(values)
    if classes.shape != x.shape[:1] or classes.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers [{len(x)}], one an image, got {classes.dtype} {list(classes.shape)}"
        )
    k = num_classes(model, x.shape[1:])
    if classes.min() < 0 or classes.max() >= k:
        raise ValueError(
            f"{name} must lie in 0..{k - 1}, the model's classes, got {classes.min()}..{classes.max()}"
        )
    return classes.astype(np.int32)


class Attacked(NamedTuple):
    """A batch that is done, in NumPy: images, logits and maps, 8-bit and float; entries as in `Result`."""

    seen: tuple[np.ndarray, np.ndarray, np.ndarray]
    float_seen: tuple[np.ndarray, np.ndarray, np.ndarray]
    params: Params
    curves: Info
    snapshots: Any
    failed: np.ndarray


def _attack_batch(
    model: Classifier,
    benign: np.ndarray,
    problems: Problem,
    preset: Preset,
    threat: Threat,
    driver: Driver,
    on_step: OnStep | None,
    pictured: int,
) -> Attacked:
    """Attack one batch, and look at what comes of it; snapshots of the first `pictured` images, if that is above 0."""
    asked = jax.device_put(problems)
    crafted = craft(
        model, asked, preset, threat, driver=driver, on_step=on_step, pictured=max(pictured, 0)
    )
    x = images_of(asked, crafted.params, threat)
    x, params, last, curves = jax.tree.map(
        np.array, jax.device_get((x, crafted.params, crafted.last, crafted.curves))
    )
    # of steps that draw no map
    curves.map_l1[:, : None if preset.interpreter is None else preset.warm_steps] = np.nan
    pictures = (
        np.zeros((0, 0, *benign.shape[1:]))
        if crafted.pictures is None
        else jax.device_get(crafted.pictures).swapaxes(0, 1)
    )
    # in float64, where k/255 and the radius of a ball are exact enough for "always inside"
    wide: Any = x.astype(np.float64)
    rounded = [
        threat.round(wide[i], jax.tree.map(itemgetter(i), params), image)
        for i, image in enumerate(_unit(benign))
    ]
    faces: tuple[Explain, Solver | None] = (
        (no_map, None)
        if preset.interpreter is None
        else (preset.interpreter.explain, preset.interpreter.solver)
    )
    seen, float_seen = (
        (images, *_seen(model, images, problems.target, *faces, driver))
        for images in (to_uint8(rounded), x)
    )
    failed = ~finite((last, problems.target_map, seen, float_seen))
    if failed.any():
        unchanged = jax.device_get(jax.vmap(threat.init)(problems.image))
        for values, old in zip(jax.tree.leaves(params), jax.tree.leaves(unchanged), strict=True):
            values[failed] = old[failed]
        for (images, logits, maps), old in (
            (seen, to_uint8(_unit(benign))),
            (float_seen, problems.image),
        ):
            images[failed], logits[failed], maps[failed] = old[failed], np.nan, np.nan
    return Attacked(seen, float_seen, params, curves, to_uint8(pictures), failed)


def _seen(
    model: Classifier,
    images: Any,
    labels: Any,
    interpreter: Explain,
    solver: Solver | None,
    driver: Driver,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and maps of a batch of images, uint8 or in [0, 1], in NumPy; a map with a number that is not finite is NaN."""
    x, classes = jax.device_put((_unit(images, np.float32), labels))
    logits, maps = map(
        np.array, jax.device_get(look(model, x, classes, interpreter, solver, driver)[:2])
    )
    maps[~finite(maps)] = np.nan
    return logits, maps
