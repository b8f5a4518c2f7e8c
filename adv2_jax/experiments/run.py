"""One run: PGD and ADV² on the same images, a batch at a time; rows for a table, arrays for a report, and a way to go on."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from adv2_jax import metrics
from adv2_jax.attack import OnStep, Result, attack, batches, count_steps, explain, gradient_evaluations, map_shape, snapshot_steps
from adv2_jax.data import ImageSet, targets
from adv2_jax.experiments.batches import MEASURE, SECONDS, Arrays, Batches, Part
from adv2_jax.experiments.checkpoints import tree_fingerprint
from adv2_jax.experiments.files import write_summary
from adv2_jax.experiments.measures import Measures, Row, measure, paired, row
from adv2_jax.experiments.select import Selection, select
from adv2_jax.interpreters import Interpreter
from adv2_jax.presets import Preset, resolve
from adv2_jax.threats import Threat, flow_penalty
from adv2_jax.types import Classifier

Progress = Callable[[int, int, int], OnStep]
TargetMaps = Callable[[Interpreter, np.ndarray, np.ndarray], np.ndarray]

ATTACKS = ("pgd", "adv2")
PICTURED = 16  # images whose way is kept
CURVE_POINTS = 100  # at most
UNRELATED = ("command", "out", "resume", "quiet", "table")  # to the results: may change when a run is resumed


class Settings(NamedTuple):
    """What a run is asked for, beyond the network and the images.

    Attributes:
        interpreters: names, or interpreters with options of their own.
        threat: threat model.
        preset: name.
        warm_steps, steps: take the place of the preset's when given.
        batch_size: images at a time.
        seed: of target classes, target maps and bootstrap.
        target_map: what is to be shown where the image set has no target maps of its own: "benign", the map of the unchanged
            image, which hides the attack; "image", the map of another image of the target class; "patch", a random figure.
    """

    interpreters: Sequence[str | Interpreter]
    threat: Threat
    preset: str = "default"
    warm_steps: int | None = None
    steps: int | None = None
    batch_size: int = 32
    seed: int = 0
    target_map: str = "benign"


class Task(NamedTuple):
    """N images and what they are driven to.

    Attributes:
        images: those of the source that the network gets right.
        targets: int32 [N], target classes.
        target_map: as in `Settings`, or "file": the set's own.
        target_maps: (interpreter, places [B] among the N, benign maps [B, h, w]) -> target maps [B, h, w].
    """

    images: ImageSet
    targets: np.ndarray
    target_map: str
    target_maps: TargetMaps


class Job(NamedTuple):
    """An attack on every batch, and the interpreters it is made for: plain PGD serves all that cost the same."""

    attack: str
    plan: Preset
    interpreters: tuple[Interpreter, ...]

    def parts(self, batch: int) -> list[Part]:
        """What it finishes of a batch."""
        return [Part(interpreter.name, self.attack, batch) for interpreter in self.interpreters]


class Outcome(NamedTuple):
    """Rows and paired differences of the summary, and the number of images left out because the network gets them wrong."""

    rows: list[Row]
    paired: list[Row]
    left_out: int


def run(
    model: Classifier,
    image_set: ImageSet,
    settings: Settings,
    directory: Path,
    *,
    limit: int | None = None,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = lambda images, steps, done: lambda new: None,
    publish: Callable[[Path], object] = lambda directory: None,
) -> Outcome:
    """Attack a set of images by PGD alone and by ADV², for each interpreter.

    PGD alone gets as many gradient evaluations as ADV² on the same interpreter. Target classes are the set's own or drawn from the
    seed. A finished batch is kept in the directory until the run is over: what is held in memory, beyond the image set and the
    images taken from it, is one batch, and a dozen numbers an image.

    Args:
        model: the classifier.
        image_set: the images; those the network gets wrong are left out.
        settings: what to run.
        directory: an existing one, for `results.npz`, `summary.json` and `log.jsonl`.
        limit: at most so many images, after leaving out.
        config: what was asked for, by name, for the summary. A run goes on with an equal one only (see `UNRELATED`).
        resume: go on with the unfinished run in the directory.
        progress: (images, steps in all, steps done) -> function called with the steps newly done.
        publish: called with the directory when its files are there, before the finished batches are removed.

    Returns:
        Rows, whose `seconds` include compilation (interpreters whose ADV² costs the same share one PGD run), paired differences,
        and how many images were left out. `results.npz` holds `images`, `labels`, `targets`, `indices` (positions in the set),
        `masks` and file `names` when known; for each interpreter `I/benign_maps`, `I/target_maps`; for each attack A in pgd, adv2
        `I/A/images`, `I/A/maps`, `I/A/confidence` (f_t), `I/A/success`, `I/A/map_l1`, `I/A/map_iou75`, and `I/A/flow` (dy, dx in
        pixels) under a threat model that has one; `I/A/curve_...`, what the steps reported, at `I/A/curve_steps`; for the first few
        images `I/A/snapshot_...`, what they were at `I/A/snapshot_steps`: images, and maps and f_t of the target.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
        KeyboardInterrupt: says what is kept.
    """
    jobs = _jobs(settings)
    prints = fingerprints(model, image_set)
    selection = select(model, image_set, limit=limit, batch_size=settings.batch_size)
    task = _task(model, image_set, selection, settings)
    _check_own_maps(model, task, jobs)
    count = len(range(0, len(task.targets), settings.batch_size))
    names = [interpreter.name for job in jobs if job.attack == "adv2" for interpreter in job.interpreters]
    kept = Batches(
        directory, identity(config or {}, prints), [Part(name, kind, i) for name in names for kind in ATTACKS for i in range(count)]
    )
    kept.begin(resume=resume)
    try:
        _attack_all(model, task, jobs, settings, kept, progress)
        rows, differences = _rows(jobs, names, kept, settings, task.target_map)
        kept.write_results(_whole(task, selection))
        write_summary(
            directory,
            {
                "config": dict(config or {}),
                "environment": environment(),
                "counts": {"images": len(image_set.images), "left_out": selection.left_out},
                "fingerprints": prints,
                "classes": image_set.classes,
                "rows": rows,
                "paired": differences,
            },
        )
        publish(directory)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept.kept()) from None
    except OSError as error:  # of the summary, or of what is published
        raise ValueError(f"cannot write to {directory}: {error.strerror}{kept.kept()}") from None
    kept.remove()
    return Outcome(rows, differences, selection.left_out)


def fingerprints(model: Classifier, image_set: ImageSet) -> dict[str, str]:
    """Of the arrays that a run is about."""
    return {"network": tree_fingerprint(model), "image set": tree_fingerprint(image_set)}


def identity(config: Mapping[str, Any], prints: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run the run it is, as JSON reads it: the settings that bear on its results, and the fingerprints."""
    settings = {key: value for key, value in config.items() if key not in UNRELATED}
    known: dict[str, Any] = json.loads(json.dumps(settings | dict(prints)))
    return known


def _jobs(settings: Settings) -> list[Job]:
    threat, warm_steps, steps = settings.threat, settings.warm_steps, settings.steps
    plans = [resolve(settings.preset, name, threat=threat, warm_steps=warm_steps, steps=steps) for name in settings.interpreters]
    sharing: dict[int, list[Interpreter]] = {}  # a PGD run, by their cost
    for plan in plans:
        assert plan.interpreter is not None
        sharing.setdefault(gradient_evaluations(plan), []).append(plan.interpreter)
    pgd = [
        Job("pgd", resolve(settings.preset, None, threat=threat, steps=budget), tuple(served)) for budget, served in sharing.items()
    ]
    return pgd + [Job("adv2", plan, (plan.interpreter,)) for plan in plans if plan.interpreter is not None]


def _task(model: Classifier, image_set: ImageSet, selection: Selection, settings: Settings) -> Task:
    chosen, where = selection.images, selection.indices
    assert chosen.labels is not None
    goals = chosen.targets
    if goals is None:
        goals = targets.random_targets(chosen.labels, selection.num_classes, seed=settings.seed, indices=where)
    if chosen.target_maps is not None:
        if settings.target_map != "benign":
            raise ValueError(f"target map {settings.target_map!r}: the images come with target maps of their own")
        own = chosen.target_maps
        return Task(chosen, goals, "file", lambda interpreter, places, benign: own[places])
    return Task(chosen, goals, settings.target_map, _target_maps(model, image_set, selection, goals, settings))


def _target_maps(model: Classifier, image_set: ImageSet, selection: Selection, goals: np.ndarray, settings: Settings) -> TargetMaps:
    kind, where, seed = settings.target_map, selection.indices, settings.seed
    if kind not in targets.TARGET_MAPS:
        raise ValueError(f"target map {kind!r} is not one of {', '.join(targets.TARGET_MAPS)}")
    if kind == "benign":
        return lambda interpreter, places, benign: benign
    if kind == "patch":
        return lambda interpreter, places, benign: np.stack(
            [targets.patch(benign.shape[1:], seed=seed, index=int(i)) for i in where[places]]
        )
    donors = targets.donors(selection.source_labels, goals, where, seed=seed, classes=image_set.classes)
    return lambda interpreter, places, benign: _maps(model, image_set.images[donors[places]], goals[places], interpreter)


def _check_own_maps(model: Classifier, task: Task, jobs: Sequence[Job]) -> None:
    """Refuses maps of another size than an interpreter's, and interpreters that the model does not suit, before the work."""
    for interpreter in (interpreter for job in jobs if job.attack == "adv2" for interpreter in job.interpreters):
        expected = [len(task.targets), *map_shape(model, task.images.images.shape[1:], interpreter)]
        own = task.images.target_maps
        if own is not None and list(own.shape) != expected:
            raise ValueError(f"target_maps must be {expected} for {interpreter.name}, got {list(own.shape)}")


def _attack_all(model: Classifier, task: Task, jobs: Sequence[Job], settings: Settings, kept: Batches, progress: Progress) -> None:
    """Every part that is not finished yet, a batch after the other."""
    n, size = len(task.targets), settings.batch_size
    todo = [[job for job in jobs if not all(map(kept.has, job.parts(i)))] for i in range(len(range(0, n, size)))]
    every, *left = (sum(count_steps(job.plan, 1, size) for job in batch) for batch in (jobs, *todo))
    on_step = progress(n, every * len(todo), every * len(todo) - sum(left))
    for i, places in enumerate(batches(np.arange(n), size)):
        for name, kind, arrays in _attack_batch(model, task, todo[i], places, settings, on_step):
            if not kept.has(part := Part(name, kind, i)):
                kept.save(part, arrays)


def _attack_batch(
    model: Classifier, task: Task, jobs: Sequence[Job], places: np.ndarray, settings: Settings, on_step: OnStep
) -> Iterator[tuple[str, str, Arrays]]:
    """Interpreter, attack and arrays of each part of a batch; `places` may repeat the last image, to be as many as others."""
    chosen, goals = task.images.take(places), task.targets[places]
    last = int(np.ptp(places)) + 1

    @cache
    def aim(interpreter: Interpreter) -> Arrays:
        benign = _maps(model, chosen.images, chosen.labels, interpreter)
        return {"benign_maps": benign, "target_maps": task.target_maps(interpreter, places, benign)}

    for job in jobs:
        asked = None if job.plan.interpreter is None else aim(job.plan.interpreter)["target_maps"]
        start = time.perf_counter()
        result = attack(
            model,
            chosen.images,
            goals,
            asked,
            interpreter=job.plan.interpreter,
            threat=settings.threat,
            preset=job.plan,
            batch_size=len(places),
            on_step=on_step,
            snapshots=int((np.unique(places) < PICTURED).sum()),
        )
        seconds = np.array([time.perf_counter() - start])
        for interpreter in job.interpreters:
            seen = result if job.plan.interpreter is not None else _seen_by(model, interpreter, goals, result)
            measures = _measures(chosen, goals, aim(interpreter), settings.threat, seen)
            arrays = {
                **(aim(interpreter) if job.attack == "pgd" else {}),
                **_below(f"{job.attack}/", _shown(measures, settings.threat, seen)),
                **_below(MEASURE, measures),
            }
            arrays = {key: values[:last] for key, values in arrays.items()} | {SECONDS: seconds}
            yield interpreter.name, job.attack, arrays | _below(f"{job.attack}/", _way(model, interpreter, job.plan, goals, result))


def _below(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}{key}": values for key, values in arrays.items()}


def _maps(model: Classifier, images: np.ndarray, labels: np.ndarray | None, interpreter: Interpreter) -> np.ndarray:
    assert labels is not None
    return explain(model, images, labels, interpreter=interpreter, batch_size=len(images))[1]


def _seen_by(model: Classifier, interpreter: Interpreter, goals: np.ndarray, result: Result) -> Result:
    """Plain PGD with the maps an interpreter draws of its images."""
    maps, float_maps = (_maps(model, images, goals, interpreter) for images in (result.images, result.float_images))
    return result._replace(maps=maps, float_maps=float_maps)


def _measures(chosen: ImageSet, goals: np.ndarray, aim: Arrays, threat: Threat, result: Result) -> Measures:
    """All that is measured of a batch, one number an image."""
    found = measure(chosen.images, goals, aim["target_maps"], result)
    if chosen.masks is not None:
        found["pointing_game"] = np.asarray(metrics.pointing_game(result.maps, chosen.masks))
        found["benign_pointing_game"] = np.asarray(metrics.pointing_game(aim["benign_maps"], chosen.masks))
    if threat.displacement is not None:
        flows = jax.vmap(threat.displacement)(result.params)
        found["mean_displacement"] = np.asarray(metrics.mean_displacement(flows))
        found["flow_penalty"] = np.asarray(jax.vmap(flow_penalty)(flows))
    return found


def _shown(measures: Measures, threat: Threat, result: Result) -> dict[str, np.ndarray]:
    """What the results hold of an attack, with a leading axis of images."""
    found = {"images": result.images, "maps": result.maps, "confidence": measures["confidence"], "success": measures["asr"]}
    found |= {key: measures[key] for key in ("map_l1", "map_iou75")}
    if threat.displacement is not None:
        found["flow"] = np.asarray(jax.vmap(threat.displacement)(result.params))
    steps = _curve_steps(result)
    curves = {f"curve_{name}": np.asarray(values)[:, steps] for name, values in result.curves._asdict().items()}
    return found | {name: values for name, values in curves.items() if not np.isnan(values).all()}


def _curve_steps(result: Result) -> np.ndarray:
    """The steps that curves are thinned to, evenly, the first and the last among them."""
    n = np.shape(result.curves.loss)[1]
    return np.linspace(0, n - 1, min(n, CURVE_POINTS)).round().astype(np.int32)


def _way(model: Classifier, interpreter: Interpreter, plan: Preset, goals: np.ndarray, result: Result) -> Arrays:
    """The steps of the curves, and what an interpreter sees of a few images on the way."""
    images = result.snapshots
    steps = {"curve_steps": _curve_steps(result)}
    if not len(images):
        return steps
    m, s = images.shape[:2]
    labels = np.repeat(goals[:m], s)
    logits, maps = explain(model, images.reshape(m * s, *images.shape[2:]), labels, interpreter=interpreter, batch_size=len(goals))
    return steps | {
        "snapshot_steps": np.array(snapshot_steps(plan), np.int32),
        "snapshot_images": images,
        "snapshot_maps": maps.reshape(m, s, *maps.shape[1:]),
        "snapshot_confidence": np.asarray(metrics.confidence(logits, labels)).reshape(m, s),
    }


def _rows(
    jobs: Sequence[Job], names: Sequence[str], kept: Batches, settings: Settings, target_map: str
) -> tuple[list[Row], list[Row]]:
    """Two rows an interpreter, and how they differ."""
    cost = {part[:2]: gradient_evaluations(job.plan) for job in jobs for part in job.parts(0)}
    rows, differences = [], []
    for name in names:
        found = {kind: kept.measures(name, kind) for kind in ATTACKS}
        for kind, measures in found.items():
            seconds = float(measures.pop("seconds").sum())
            head = {"interpreter": name, "attack": kind, "threat": settings.threat.name, "target_map": target_map}
            tail = {"gradient_evaluations": cost[name, kind], "seconds": round(seconds, 2)}
            rows.append(head | row(measures, seed=settings.seed) | tail)
        pair = {"interpreter": name, "threat": settings.threat.name}
        differences += [pair | difference for difference in paired(found["pgd"], found["adv2"], seed=settings.seed)]
    return rows, differences


def _whole(task: Task, selection: Selection) -> Arrays:
    """The arrays of the results that no attack makes."""
    chosen = task.images
    arrays = {"images": chosen.images, "labels": chosen.labels, "targets": task.targets, "indices": selection.indices}
    arrays |= {"masks": chosen.masks, "names": chosen.names}
    return {key: values for key, values in arrays.items() if values is not None}


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
