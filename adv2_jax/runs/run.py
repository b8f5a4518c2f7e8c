"""One run: PGD and ADV² on the same images, a batch at a time; rows for a table, arrays for a report, and a way to go on."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adv2_jax.attacks import batches, count_steps, gradient_evaluations
from adv2_jax.data import ImageSet
from adv2_jax.descent import OnStep
from adv2_jax.files import intact, write_summary
from adv2_jax.identity import environment, tree_fingerprint
from adv2_jax.interpreters import Interpreter
from adv2_jax.names import ATTACKS
from adv2_jax.presets import Preset, resolve, to_dict
from adv2_jax.runs.batch import Job, attack_batch
from adv2_jax.runs.measures import Row, paired, row
from adv2_jax.runs.select import Selection, select
from adv2_jax.runs.store import Arrays, Part, Store
from adv2_jax.runs.task import Settings, Task, check_own_maps, make_task
from adv2_jax.types import Classifier

Progress = Callable[[int, int, int], OnStep]

# to the results: may change when a run is resumed
UNRELATED = ("command", "out", "resume", "overwrite", "quiet", "table")


class Outcome(NamedTuple):
    """What a run found.

    Attributes:
        rows, paired: rows and paired differences of the summary.
        left_out: number of images left out because the network gets them wrong.
        failed: names (positions where there are none) of the images that failed under some attack:
            the network gives logits, maps or gradients that are not finite numbers on them.
    """

    rows: list[Row]
    paired: list[Row]
    left_out: int
    failed: list[str | int]


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

    PGD alone gets as many gradient evaluations as ADV² on the same interpreter. Target classes are
    the set's own or drawn from the seed. A finished batch is kept in the directory until the run is
    over: what is held in memory, beyond the image set and the images taken from it, is one batch,
    and a dozen numbers an image.

    Args:
        model: the classifier.
        image_set: the images; those the network gets wrong are left out.
        settings: what to run.
        directory: an existing one, for `results.npz`, `summary.json` and `log.jsonl`.
        limit: at most so many images, after leaving out.
        config: what was asked for, by name, for the summary. A run goes on with an equal one only
            (see `UNRELATED`).
        resume: go on with the unfinished run in the directory.
        progress: (images, steps in all, steps done) -> function called with the steps newly done.
        publish: called with the directory when its files are there, before the finished batches are
            removed.

    Returns:
        Rows, whose `seconds` include compilation (interpreters whose ADV² costs the same share one
        PGD run), paired differences, and how many images were left out. `results.npz` holds
        `images`, `labels`, `targets`, `indices` (positions in the set), `masks` and file `names`
        when known; for each interpreter `I/benign_maps`, `I/target_maps`; for each attack A in pgd,
        adv2 `I/A/images`, `I/A/maps`, `I/A/confidence` (f_t), `I/A/success`, `I/A/map_l1`,
        `I/A/map_iou75`, and `I/A/flow` (dy, dx in pixels) under a threat model that has one;
        `I/A/curve_...`, what the steps reported, at `I/A/curve_steps`; for the first few images
        `I/A/snapshot_...`, what they were at `I/A/snapshot_steps`: images, and maps and f_t of the
        target.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
        KeyboardInterrupt: says what is kept.
    """
    presets = _presets(settings)
    prints = fingerprints(model, image_set)
    selection = select(model, image_set, limit=limit, batch_size=settings.batch_size)
    task = make_task(model, image_set, selection, settings)
    check_own_maps(
        model, task, [preset.interpreter for preset in presets if preset.interpreter is not None]
    )
    jobs = _jobs(model, image_set.images.shape[1:], presets, settings)
    count = len(range(0, len(task.targets), settings.batch_size))
    names = [
        interpreter.name for job in jobs if job.attack == "adv2" for interpreter in job.interpreters
    ]
    store = Store(
        directory,
        identity(config or {}, prints),
        [Part(name, kind, i) for name in names for kind in ATTACKS for i in range(count)],
    )
    store.begin(resume=resume)
    try:
        if resume:
            store.write_log()
        _attack_all(model, task, jobs, settings, store, progress)
        whole = _whole(task, selection)
        # what was kept of the run before may be damaged
        with intact(directory) if resume else nullcontext():
            rows, differences, failed = _rows(jobs, names, store, settings, task.target_map)
            lost = whole.get("names", selection.indices)[failed].tolist()
        store.write_results(whole)
        write_summary(
            directory,
            {
                "config": dict(config or {}),
                "environment": environment(),
                "counts": {
                    "images": len(image_set.images),
                    "left_out": selection.left_out,
                    "failed": len(lost),
                },
                "failed": lost,
                "fingerprints": prints,
                "classes": image_set.classes,
                "rows": rows,
                "paired": differences,
            },
        )
        with intact(directory) if resume else nullcontext():
            publish(directory)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(store.resume_hint()) from None
    except OSError as error:  # of the summary, or of what is published
        raise ValueError(
            f"cannot write to {directory}: {error.strerror}{store.resume_hint()}"
        ) from None
    store.remove()
    return Outcome(rows, differences, selection.left_out, lost)


def fingerprints(model: Classifier, image_set: ImageSet) -> dict[str, str]:
    """Of the arrays that a run is about."""
    return {"network": tree_fingerprint(model), "image set": tree_fingerprint(image_set)}


def identity(config: Mapping[str, Any], prints: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run the run it is, as JSON reads it: the settings that bear on its results, and the fingerprints."""
    settings = {key: value for key, value in config.items() if key not in UNRELATED}
    known: dict[str, Any] = json.loads(json.dumps(settings | dict(prints)))
    return known


def _presets(settings: Settings) -> list[Preset]:
    """The preset of each interpreter; refuses two interpreters of one name, whose results would have the same keys."""
    presets = [
        resolve(
            settings.preset,
            name,
            threat=settings.threat,
            warm_steps=settings.warm_steps,
            steps=settings.steps,
        )
        for name in settings.interpreters
    ]
    names = [preset.interpreter.name for preset in presets if preset.interpreter is not None]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"interpreter {twice[0]!r} is given {names.count(twice[0])} times; each needs a name of its own"
        )
    return presets


def _jobs(
    model: Classifier, shape: tuple[int, ...], presets: Sequence[Preset], settings: Settings
) -> list[Job]:
    """ADV² by each preset, and plain PGD with as much work: a step of it is one unit of cost."""
    adv2: list[Job] = []
    sharing: dict[int, list[Interpreter]] = {}
    for preset in presets:
        assert preset.interpreter is not None
        cost = gradient_evaluations(model, preset, settings.threat, shape)
        adv2.append(Job("adv2", preset, (preset.interpreter,), cost))
        sharing.setdefault(round(cost), []).append(preset.interpreter)
    pgd = []
    for budget, served in sharing.items():
        preset = resolve(settings.preset, None, threat=settings.threat, steps=budget)
        pgd.append(
            Job(
                "pgd",
                preset,
                tuple(served),
                gradient_evaluations(model, preset, settings.threat, shape),
            )
        )
    return pgd + adv2


def _attack_all(
    model: Classifier,
    task: Task,
    jobs: Sequence[Job],
    settings: Settings,
    store: Store,
    progress: Progress,
) -> None:
    """Every part that is not finished yet, a batch after the other."""
    n, size = len(task.targets), settings.batch_size
    todo = [
        [job for job in jobs if not all(map(store.has, job.parts(i)))]
        for i in range(len(range(0, n, size)))
    ]
    every, *left = (
        sum(count_steps(job.preset, 1, size) for job in batch) for batch in (jobs, *todo)
    )
    on_step = progress(n, every * len(todo), every * len(todo) - sum(left))
    for i, places in enumerate(batches(np.arange(n), size)):
        for name, kind, arrays in attack_batch(model, task, todo[i], places, settings, on_step):
            if not store.has(part := Part(name, kind, i)):
                store.save(part, arrays)


def _rows(
    jobs: Sequence[Job], names: Sequence[str], store: Store, settings: Settings, target_map: str
) -> tuple[list[Row], list[Row], np.ndarray]:
    """Two rows an interpreter, how they differ, and which images [N] failed under some attack."""
    job_of = {part[:2]: job for job in jobs for part in job.parts(0)}
    rows, differences, failed = [], [], []
    for name in names:
        found = {kind: store.measures(name, kind) for kind in ATTACKS}
        for kind, measures in found.items():
            seconds = float(measures.pop("seconds").sum())
            head = {
                "interpreter": name,
                "attack": kind,
                "threat": settings.threat.name,
                "target_map": target_map,
            }
            job = job_of[name, kind]
            tail = {
                "gradient_evaluations": job.cost,
                "seconds": round(seconds, 2),
                "preset": to_dict(job.preset),
            }
            rows.append(head | row(measures, seed=settings.seed) | tail)
            failed.append(measures["failed"])
        pair = {"interpreter": name, "threat": settings.threat.name}
        differences += [
            pair | difference
            for difference in paired(found["pgd"], found["adv2"], seed=settings.seed)
        ]
    return rows, differences, np.any(failed, axis=0)


def _whole(task: Task, selection: Selection) -> Arrays:
    """The arrays of the results that no attack makes."""
    chosen = task.images
    arrays = {
        "images": chosen.images,
        "labels": chosen.labels,
        "targets": task.targets,
        "indices": selection.indices,
    }
    arrays |= {"masks": chosen.objects, "names": chosen.names}
    return {key: values for key, values in arrays.items() if values is not None}
