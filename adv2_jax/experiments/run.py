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
from adv2_jax.attack import OnStep, Result, attack, count_steps, explain, gradient_evaluations
from adv2_jax.data import ImageSet, targets
from adv2_jax.experiments.select import select
from adv2_jax.interpreters import Interpreter
from adv2_jax.presets import Preset, resolve
from adv2_jax.threats import Threat, flow_penalty
from adv2_jax.types import Classifier

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
Progress = Callable[[str, int], OnStep]


class Settings(NamedTuple):
    """What a run is asked for, beyond the network and the images.

    Attributes:
        interpreters: names, or interpreters with options of their own.
        threat: threat model.
        preset: name.
        warm_steps, steps: take the place of the preset's when given.
        batch_size: images at a time.
        seed: of the target classes.
    """

    interpreters: Sequence[str | Interpreter]
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
        Rows, whose `seconds` include compilation (interpreters whose ADV² costs the same share one PGD run), and arrays: `images`,
        `labels`, `targets`, `indices` (positions in the set), `masks` and file `names` when known; for each interpreter
        `I/benign_maps`, `I/target_maps`; for each attack A in pgd, adv2 `I/A/images`, `I/A/maps`, `I/A/confidence` (f_t),
        `I/A/success`, `I/A/map_l1`, and `I/A/flow` (dy, dx in pixels) under a threat model that has one.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
    """
    threat, warm_steps, steps = settings.threat, settings.warm_steps, settings.steps
    plans = [resolve(settings.preset, name, threat=threat, warm_steps=warm_steps, steps=steps) for name in settings.interpreters]
    selection = select(model, image_set, limit=limit, batch_size=settings.batch_size)
    chosen = selection.images
    assert chosen.labels is not None
    goals = chosen.targets
    if goals is None:
        goals = targets.random_targets(chosen.labels, selection.num_classes, seed=settings.seed, indices=selection.indices)
    arrays: Arrays = {"images": chosen.images, "labels": chosen.labels, "targets": goals, "indices": selection.indices}
    arrays |= {key: value for key, value in (("masks", chosen.masks), ("names", chosen.names)) if value is not None}
    rows: list[Row] = []
    seen = [_benign_maps(model, chosen, plan, settings) for plan in plans]  # all, so that a misfit is found before the work
    pgd: dict[int, Timed] = {}  # by budget: interpreters that cost the same share a run
    for plan, benign_maps in zip(plans, seen, strict=True):
        budget = gradient_evaluations(plan)
        target_maps = benign_maps if chosen.target_maps is None else chosen.target_maps
        if budget not in pgd:
            pgd_plan = resolve(settings.preset, None, threat=threat, steps=budget)
            pgd[budget] = _timed_attack(model, chosen, goals, None, pgd_plan, settings, progress)
        adv2 = _timed_attack(model, chosen, goals, target_maps, plan, settings, progress)
        explained = _explained(model, pgd[budget], goals, plan, settings)
        new_rows, new_arrays = _compare(chosen, goals, benign_maps, target_maps, plan, settings, explained, adv2)
        rows += new_rows
        arrays |= new_arrays
    return Outcome(rows, arrays, selection.left_out)


def _benign_maps(model: Classifier, chosen: ImageSet, plan: Preset, settings: Settings) -> np.ndarray:
    """The maps [N, h, w] of the unchanged images for their labels; refuses target maps of another size."""
    assert plan.interpreter is not None and chosen.labels is not None
    _, maps = explain(model, chosen.images, chosen.labels, interpreter=plan.interpreter, batch_size=settings.batch_size)
    if chosen.target_maps is not None and chosen.target_maps.shape != maps.shape:
        found, name = list(chosen.target_maps.shape), plan.interpreter.name
        raise ValueError(f"target_maps must be {list(maps.shape)} for {name}, got {found}")
    return maps


class Timed(NamedTuple):
    """An attack and the seconds it took."""

    result: Result
    seconds: float


def _timed_attack(
    model: Classifier,
    chosen: ImageSet,
    goals: np.ndarray,
    target_maps: np.ndarray | None,
    plan: Preset,
    settings: Settings,
    progress: Progress,
) -> Timed:
    title = "pgd" if plan.interpreter is None else f"{plan.interpreter.name} adv2"
    start = time.perf_counter()
    result = attack(
        model,
        chosen.images,
        goals,
        target_maps,
        interpreter=plan.interpreter,
        threat=settings.threat,
        preset=plan,
        batch_size=settings.batch_size,
        on_step=progress(title, count_steps(plan, len(chosen.images), settings.batch_size)),
    )
    return Timed(result, time.perf_counter() - start)


def _explained(model: Classifier, pgd: Timed, goals: np.ndarray, plan: Preset, settings: Settings) -> Timed:
    """Plain PGD with the maps an interpreter draws of its images."""
    assert plan.interpreter is not None
    (_, maps), (_, float_maps) = (
        explain(model, images, goals, interpreter=plan.interpreter, batch_size=settings.batch_size)
        for images in (pgd.result.images, pgd.result.float_images)
    )
    return pgd._replace(result=pgd.result._replace(maps=maps, float_maps=float_maps))


def _compare(
    chosen: ImageSet,
    goals: np.ndarray,
    benign_maps: np.ndarray,
    target_maps: np.ndarray,
    plan: Preset,
    settings: Settings,
    pgd: Timed,
    adv2: Timed,
) -> tuple[list[Row], Arrays]:
    """PGD and ADV² against one interpreter: two rows, and arrays named `interpreter/...`."""
    assert plan.interpreter is not None
    name = plan.interpreter.name
    arrays: Arrays = {f"{name}/benign_maps": benign_maps, f"{name}/target_maps": target_maps}
    truth: Row = {}
    if chosen.masks is not None:
        truth["benign_pointing_game"] = float(np.mean(metrics.pointing_game(benign_maps, chosen.masks)))
    rows = []
    for kind, (result, seconds) in (("pgd", pgd), ("adv2", adv2)):
        row, found = measure(chosen, goals, target_maps, result)
        moved, flows = displaced(settings.threat, result)
        head = {"interpreter": name, "attack": kind, "threat": settings.threat.name}
        cost = {"gradient_evaluations": result.gradient_evaluations, "seconds": round(seconds, 2)}
        rows.append(head | row | moved | cost | truth)
        arrays |= {f"{name}/{kind}/{key}": value for key, value in (found | flows).items()}
    return rows, arrays


def displaced(threat: Threat, result: Result) -> tuple[Row, Arrays]:
    """Mean displacement in pixels and flow penalty, means over the images, and the array `flow` [N, H, W, 2]; of a flow only."""
    if threat.displacement is None:
        return {}, {}
    flows = jax.vmap(threat.displacement)(result.params)
    means = {"mean_displacement": metrics.mean_displacement(flows), "flow_penalty": jax.vmap(flow_penalty)(flows)}
    return {key: float(value.mean()) for key, value in means.items()}, {"flow": np.asarray(flows)}


def measure(chosen: ImageSet, goals: np.ndarray, target_maps: np.ndarray, result: Result) -> tuple[Row, Arrays]:
    """The measures of method §8 on the 8-bit images, and the arrays they were taken from.

    `float_map_l1` and `float_map_iou75` are the same measures before rounding. With masks of the true object,
    `pointing_game` is the share of final maps that peak on it. All are means over the images, but `linf`, the largest.

    Args:
        chosen: the benign images.
        goals: [N] target classes.
        target_maps: [N, h, w].
        result: of an attack on them, with the maps that the interpreter in question draws.

    Returns:
        numbers by name; arrays `images` uint8 [N, H, W, 3], `maps` [N, h, w], `confidence`, `success` and `map_l1` [N].
    """
    x, x0 = result.images / np.float32(255), chosen.images / np.float32(255)
    success = np.asarray(metrics.success(result.logits, goals))
    confidence = np.asarray(metrics.confidence(result.logits, goals))
    map_l1 = np.asarray(metrics.map_l1(result.maps, target_maps))
    means: dict[str, ArrayLike] = {
        "asr": success,
        "map_l1": map_l1,
        "map_l2": metrics.map_l2(result.maps, target_maps),
        "map_iou75": metrics.iou_quantile(result.maps, target_maps),
        "map_iou50": metrics.iou_threshold(result.maps, target_maps),
        "linf": metrics.linf(x, x0),
        "l2": metrics.l2(x, x0),
        "float_map_l1": metrics.map_l1(result.float_maps, target_maps),
        "float_map_iou75": metrics.iou_quantile(result.float_maps, target_maps),
    }
    if chosen.masks is not None:
        means["pointing_game"] = metrics.pointing_game(result.maps, chosen.masks)
    row: Row = {"n": len(x), "mc": float(confidence[success].mean()) if success.any() else None}
    row |= {key: float(np.mean(np.asarray(value))) for key, value in means.items()}
    row["linf"] = float(np.max(np.asarray(means["linf"])))
    arrays = {"images": result.images, "maps": result.maps, "confidence": confidence, "success": success, "map_l1": map_l1}
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
