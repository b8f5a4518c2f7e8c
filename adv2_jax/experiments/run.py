"""One run: PGD and ADV² on the same images, an interpreter at a time; rows for a table and arrays for a report."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from adv2_jax import metrics
from adv2_jax.attack import OnStep, Result, attack, count_steps, explain, gradient_evaluations, no_map
from adv2_jax.data import ImageSet, targets
from adv2_jax.data.sources import check_classes
from adv2_jax.interpreters import Interpreter
from adv2_jax.presets import Preset, resolve
from adv2_jax.threats import Threat
from adv2_jax.types import Classifier

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
Progress = Callable[[str, int], OnStep]


class Settings(NamedTuple):
    """What a run is asked for, beyond the network and the images.

    Attributes:
        interpreters: names.
        threat: threat model.
        preset: name.
        warm_steps, steps: take the place of the preset's when given.
        batch_size: images at a time.
        seed: of the target classes.
    """

    interpreters: Sequence[str]
    threat: Threat
    preset: str = "default"
    warm_steps: int | None = None
    steps: int | None = None
    batch_size: int = 32
    seed: int = 0


class Outcome(NamedTuple):
    """Rows of the summary, arrays of the results file, and the number of images left out because the network gets them wrong."""

    rows: list[Row]
    arrays: Arrays
    left_out: int


class Selection(NamedTuple):
    """Images the network gets right, their positions [N] in the set, its number of classes, and how many it gets wrong."""

    images: ImageSet
    indices: np.ndarray
    num_classes: int
    left_out: int


def select(model: Classifier, image_set: ImageSet, *, limit: int | None = None, batch_size: int = 32) -> Selection:
    """The images a network gets right, at most `limit` of them.

    Raises:
        ValueError: if the network cannot take the images, a class is out of range, or no image is left.
    """
    logits = _predict(model, image_set.images, batch_size)
    check_classes(image_set, logits.shape[-1])
    right = np.flatnonzero(logits.argmax(axis=-1) == image_set.labels).astype(np.int32)
    if len(right) == 0:
        raise ValueError(f"the network gets none of the {len(image_set.images)} images right: nothing to attack")
    indices = right[:limit]
    return Selection(image_set.take(indices), indices, logits.shape[-1], len(image_set.images) - len(right))


def _predict(model: Classifier, images: np.ndarray, batch_size: int) -> np.ndarray:
    try:
        logits, _ = explain(model, images, np.zeros(len(images), np.int32), interpreter=no_map, batch_size=batch_size)
    except (TypeError, ValueError) as error:  # what jax raises when shapes do not fit
        reason = str(error).splitlines()[0]
        raise ValueError(f"the network cannot take images of {list(images.shape[1:])}: {reason}") from None
    if not np.isfinite(logits).all():
        raise ValueError("the network gives logits that are not finite numbers on these images")
    return logits


def run(
    model: Classifier,
    image_set: ImageSet,
    settings: Settings,
    *,
    limit: int | None = None,
    progress: Progress = lambda title, steps: lambda done: None,
) -> Outcome:
    """Attack a set of images by PGD alone and by ADV², for each interpreter.

    PGD alone gets as many gradient evaluations as ADV² on the same interpreter. Target classes are the set's own or drawn from the
    seed; target maps are the set's own or the benign maps, so that the attack hides.

    Args:
        model: the classifier.
        image_set: the images; those the network gets wrong are left out.
        settings: what to run.
        limit: at most so many images, after leaving out.
        progress: (title, steps in all) -> function called with the steps newly done.

    Returns:
        Rows, whose `seconds` include compilation, and arrays: `images`, `labels`, `targets`, `indices` (positions in the set),
        `masks` when known; for each interpreter `I/benign_maps`, `I/target_maps`; for each attack A in pgd, adv2 `I/A/images`,
        `I/A/maps`, `I/A/confidence` (f_t), `I/A/success`, `I/A/map_l1`.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    plans = [resolve(settings.preset, name, warm_steps=settings.warm_steps, steps=settings.steps) for name in settings.interpreters]
    selection = select(model, image_set, limit=limit, batch_size=settings.batch_size)
    chosen = selection.images
    goals = chosen.targets
    if goals is None:
        goals = targets.random_targets(chosen.labels, selection.num_classes, seed=settings.seed, indices=selection.indices)
    arrays: Arrays = {"images": chosen.images, "labels": chosen.labels, "targets": goals, "indices": selection.indices}
    if chosen.masks is not None:
        arrays["masks"] = chosen.masks
    rows: list[Row] = []
    seen = [_benign_maps(model, chosen, plan, settings) for plan in plans]  # all, so that a misfit is found before the work
    for plan, benign_maps in zip(plans, seen, strict=True):
        new_rows, new_arrays = _compare(model, chosen, goals, benign_maps, plan, settings, progress)
        rows += new_rows
        arrays |= new_arrays
    return Outcome(rows, arrays, selection.left_out)


def _benign_maps(model: Classifier, chosen: ImageSet, plan: Preset, settings: Settings) -> np.ndarray:
    """The maps [N, h, w] of the unchanged images for their labels; refuses target maps of another size."""
    assert plan.interpreter is not None
    _, maps = explain(model, chosen.images, chosen.labels, interpreter=plan.interpreter.explain, batch_size=settings.batch_size)
    if chosen.target_maps is not None and chosen.target_maps.shape != maps.shape:
        found, name = list(chosen.target_maps.shape), plan.interpreter.name
        raise ValueError(f"target_maps must be {list(maps.shape)} for {name}, got {found}")
    return maps


def _compare(
    model: Classifier,
    chosen: ImageSet,
    goals: np.ndarray,
    benign_maps: np.ndarray,
    plan: Preset,
    settings: Settings,
    progress: Progress,
) -> tuple[list[Row], Arrays]:
    """PGD and ADV² against one interpreter: two rows, and arrays named `interpreter/...`."""
    interpreter = plan.interpreter
    assert interpreter is not None
    name, n = interpreter.name, len(chosen.images)
    target_maps = benign_maps if chosen.target_maps is None else chosen.target_maps
    arrays: Arrays = {f"{name}/benign_maps": benign_maps, f"{name}/target_maps": target_maps}
    truth: Row = {}
    if chosen.masks is not None:
        truth["benign_pointing_game"] = float(np.mean(metrics.pointing_game(benign_maps, chosen.masks)))
    rows = []
    for kind, kind_plan in (("pgd", resolve(settings.preset, None, steps=gradient_evaluations(plan))), ("adv2", plan)):
        steps = count_steps(kind_plan, n, settings.batch_size)
        start = time.perf_counter()
        result = attack(
            model,
            chosen.images,
            goals,
            None if kind_plan.interpreter is None else target_maps,
            interpreter=kind_plan.interpreter,
            threat=settings.threat,
            preset=kind_plan,
            batch_size=settings.batch_size,
            on_step=progress(f"{name} {kind}", steps),
        )
        seconds = time.perf_counter() - start
        row, found = measure(model, chosen, goals, target_maps, result, interpreter, batch_size=settings.batch_size)
        head = {"interpreter": name, "attack": kind, "threat": settings.threat.name}
        cost = {"gradient_evaluations": result.gradient_evaluations, "seconds": round(seconds, 2)}
        rows.append(head | row | cost | truth)
        arrays |= {f"{name}/{kind}/{key}": value for key, value in found.items()}
    return rows, arrays


def measure(
    model: Classifier,
    chosen: ImageSet,
    goals: np.ndarray,
    target_maps: np.ndarray,
    result: Result,
    interpreter: Interpreter,
    *,
    batch_size: int,
) -> tuple[Row, Arrays]:
    """The measures of method §8 on the 8-bit images, and the arrays they were taken from.

    `float_map_l1` and `float_map_iou75` are the same measures before rounding. With masks of the true object,
    `pointing_game` is the share of final maps that peak on it. All are means over the images, but `linf`, the largest.

    Args:
        model: the classifier.
        chosen: the benign images.
        goals: [N] target classes.
        target_maps: [N, h, w].
        result: of an attack on them, by this or another interpreter, or plain PGD.
        interpreter: the interpreter that explains.
        batch_size: images at a time.

    Returns:
        numbers by name; arrays `images` uint8 [N, H, W, 3], `maps` [N, h, w], `confidence`, `success` and `map_l1` [N].
    """
    logits, maps = explain(model, result.images, goals, interpreter=interpreter.explain, batch_size=batch_size)
    _, float_maps = explain(model, result.float_images, goals, interpreter=interpreter.explain, batch_size=batch_size)
    x, x0 = result.images / np.float32(255), chosen.images / np.float32(255)
    success = np.asarray(metrics.success(logits, goals))
    confidence = np.asarray(metrics.confidence(logits, goals))
    map_l1 = np.asarray(metrics.map_l1(maps, target_maps))
    means: dict[str, ArrayLike] = {
        "asr": success,
        "map_l1": map_l1,
        "map_l2": metrics.map_l2(maps, target_maps),
        "map_iou75": metrics.iou_quantile(maps, target_maps),
        "map_iou50": metrics.iou_threshold(maps, target_maps),
        "linf": metrics.linf(x, x0),
        "l2": metrics.l2(x, x0),
        "float_map_l1": metrics.map_l1(float_maps, target_maps),
        "float_map_iou75": metrics.iou_quantile(float_maps, target_maps),
    }
    if chosen.masks is not None:
        means["pointing_game"] = metrics.pointing_game(maps, chosen.masks)
    row: Row = {"n": len(x), "mc": float(confidence[success].mean()) if success.any() else None}
    row |= {key: float(np.mean(np.asarray(value))) for key, value in means.items()}
    row["linf"] = float(np.max(np.asarray(means["linf"])))
    arrays = {"images": result.images, "maps": maps, "confidence": confidence, "success": success, "map_l1": map_l1}
    return row, arrays


def environment() -> dict[str, Any]:
    """Versions and machine, for the summary."""
    packages = ("adv2_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
