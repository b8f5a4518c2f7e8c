"""The work of a run: one batch of images under one attack after the other, and all that is kept of it."""

import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from adv2_jax import metrics
from adv2_jax.attacks import Result, attack, explain, image_keys
from adv2_jax.crafting import snapshot_steps
from adv2_jax.data import ImageSet
from adv2_jax.descent import OnStep
from adv2_jax.interpreters import Interpreter
from adv2_jax.presets import Preset
from adv2_jax.runs.measures import Measures, measure
from adv2_jax.runs.store import MEASURE, SECONDS, Arrays, Part
from adv2_jax.runs.task import Settings, Task
from adv2_jax.threats import flow_penalty
from adv2_jax.types import Classifier

CURVE_POINTS = 100  # at most


class Job(NamedTuple):
    """An attack on every batch, and the interpreters it is made for: those of equal budget share
    one run of plain PGD.

    `cost` is the work on an image, in gradients of ℓ_prd.
    """

    attack: str
    preset: Preset
    interpreters: tuple[Interpreter, ...]
    cost: float

    def parts(self, batch: int) -> list[Part]:
        """What it finishes of a batch."""
        return [Part(interpreter.name, self.attack, batch) for interpreter in self.interpreters]


def attack_batch(
    model: Classifier,
    task: Task,
    jobs: Sequence[Job],
    places: np.ndarray,
    settings: Settings,
    on_step: OnStep,
) -> Iterator[tuple[str, str, Arrays]]:
    """Interpreter, attack and arrays of each part of a batch at `places`; the last is filled up by repeating its last image."""
    chosen, goals = task.images.take(places), task.targets[places]
    last, keys = int(np.ptp(places)) + 1, image_keys(settings.seed, task.places[places])

    @cache
    def aim(interpreter: Interpreter) -> Arrays:
        benign = _maps(model, chosen.images, chosen.labels, interpreter)
        return {"benign_maps": benign, "target_maps": task.target_maps(interpreter, places, benign)}

    for job in jobs:
        asked = (
            None if job.preset.interpreter is None else aim(job.preset.interpreter)["target_maps"]
        )
        start = time.perf_counter()
        result = attack(
            model,
            chosen.images,
            goals,
            asked,
            interpreter=job.preset.interpreter,
            threat=settings.threat,
            preset=job.preset,
            batch_size=len(places),
            on_step=on_step,
            snapshots=int((np.unique(places) < settings.snapshots).sum()),
            all_may_fail=True,
            keys=keys,
        )
        seconds = np.array([time.perf_counter() - start])
        flows = (
            None
            if settings.threat.displacement is None
            else jax.vmap(settings.threat.displacement)(result.params)
        )
        for interpreter in job.interpreters:
            seen = (
                result
                if job.preset.interpreter is not None
                else _seen_by(model, interpreter, goals, result)
            )
            measures = _measures(chosen, goals, aim(interpreter), seen, flows)
            arrays = {
                **(aim(interpreter) if job.attack == "pgd" else {}),
                **_below(f"{job.attack}/", _shown(measures, seen, flows)),
                **_below(MEASURE, measures),
            }
            arrays = {key: values[:last] for key, values in arrays.items()} | {SECONDS: seconds}
            yield (
                interpreter.name,
                job.attack,
                arrays
                | _below(f"{job.attack}/", _way(model, interpreter, job.preset, goals, result)),
            )


def _below(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {f"{prefix}{key}": values for key, values in arrays.items()}


def _maps(
    model: Classifier, images: np.ndarray, labels: np.ndarray | None, interpreter: Interpreter
) -> np.ndarray:
    assert labels is not None
    return explain(
        model, images, labels, interpreter=interpreter, batch_size=len(images), all_may_fail=True
    )[1]


def _seen_by(
    model: Classifier, interpreter: Interpreter, goals: np.ndarray, result: Result
) -> Result:
    """Plain PGD with the maps an interpreter draws of its images."""
    maps, float_maps = (
        _maps(model, images, goals, interpreter) for images in (result.images, result.float_images)
    )
    return result._replace(maps=maps, float_maps=float_maps)


def _measures(
    chosen: ImageSet, goals: np.ndarray, aim: Arrays, result: Result, flows: Array | None
) -> Measures:
    """All that is measured of a batch, one number an image."""
    found = measure(chosen.images, goals, aim["target_maps"], result)
    if chosen.objects is not None:
        found["pointing_game"] = np.asarray(metrics.pointing_game(result.maps, chosen.objects))
        found["benign_pointing_game"] = np.asarray(
            metrics.pointing_game(aim["benign_maps"], chosen.objects)
        )
    if flows is not None:
        found["mean_displacement"] = np.asarray(metrics.mean_displacement(flows))
        found["flow_penalty"] = np.asarray(jax.vmap(flow_penalty)(flows))
    return found


def _shown(measures: Measures, result: Result, flows: Array | None) -> dict[str, np.ndarray]:
    """What the results hold of an attack, with a leading axis of images."""
    found = {
        "images": result.images,
        "maps": result.maps,
        "confidence": measures["confidence"],
        "success": measures["asr"],
    }
    found |= {key: measures[key] for key in ("map_l1", "map_iou75")}
    if flows is not None:
        found["flow"] = np.asarray(flows)
    steps = _curve_steps(result)
    curves = {
        f"curve_{name}": np.asarray(values)[:, steps]
        for name, values in result.curves._asdict().items()
    }
    return found | {name: values for name, values in curves.items() if not np.isnan(values).all()}


def _curve_steps(result: Result) -> np.ndarray:
    """The steps that curves are thinned to, evenly, the first and the last among them."""
    n = np.shape(result.curves.loss)[1]
    return np.linspace(0, n - 1, min(n, CURVE_POINTS)).round().astype(np.int32)


def _way(
    model: Classifier, interpreter: Interpreter, preset: Preset, goals: np.ndarray, result: Result
) -> Arrays:
    """The steps of the curves, and what an interpreter sees of a few images on the way."""
    images = result.snapshots
    steps = {"curve_steps": _curve_steps(result)}
    if not len(images):
        return steps
    m, s = images.shape[:2]
    labels = np.repeat(goals[:m], s)
    frames = images.reshape(m * s, *images.shape[2:])
    logits, maps = explain(
        model, frames, labels, interpreter=interpreter, batch_size=len(goals), all_may_fail=True
    )
    return steps | {
        "snapshot_steps": np.array(snapshot_steps(preset), np.int32),
        "snapshot_images": images,
        "snapshot_maps": maps.reshape(m, s, *maps.shape[1:]),
        "snapshot_confidence": np.asarray(metrics.confidence(logits, labels)).reshape(m, s),
    }
