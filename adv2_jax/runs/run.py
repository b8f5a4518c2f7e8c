"""One run: PGD and ADV² on the same images, a batch at a time, into rows and arrays."""

import json
from collections import Counter
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
from adv2_jax.presets import Preset, resolve, to_dict
from adv2_jax.runs.batch import Job, attack_batch
from adv2_jax.runs.schema import ATTACKS, Images, Row
from adv2_jax.runs.select import select
from adv2_jax.runs.statistics import paired, row
from adv2_jax.runs.store import Part, Store
from adv2_jax.runs.task import Settings, Task, check_own_maps, make_task
from adv2_jax.types import Classifier

Progress = Callable[[int, int, int], OnStep]

# of the command line, but not of the results: may change when a run is resumed
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
    the set's own or drawn from the seed. A finished batch stays in the directory until the run is
    over: beyond the image set and the images taken from it, one batch and a dozen numbers an image
    are held in memory.

    Args:
        model: the classifier.
        image_set: the images; those the network gets wrong are left out.
        settings: what to run.
        directory: an existing one, for `results.npz`, `summary.json` and `log.jsonl`.
        limit: at most so many images, after leaving out.
        config: what was asked for, by name, for the summary. A run is resumed with an equal one
            only (see `UNRELATED`).
        resume: go on with the unfinished run in the directory.
        progress: (images, steps in all, steps done) -> function called with the steps newly done.
        publish: called with the directory when its files are there, before the finished batches are
            removed.

    Returns:
        Rows, whose `seconds` include compilation (interpreters whose ADV² costs the same share one
        PGD run), paired differences, and how many images were left out. The arrays of `results.npz`
        are those of `schema.Results`.

    Raises:
        ValueError: one line: what is wrong, the value, and what is allowed.
        KeyboardInterrupt: says what is finished, and how to resume.
    """
    prints = fingerprints(model, image_set)
    presets = _presets(settings)
    selection = select(model, image_set, limit=limit, batch_size=settings.batch_size)
    task = make_task(model, image_set, selection, settings)
    attacked = _attacked(presets)
    check_own_maps(model, task, attacked)
    jobs = _jobs(model, image_set.images.shape[1:], presets, settings)
    count = len(range(0, len(task.targets), settings.batch_size))
    parts = [Part(one.name, kind, i) for one in attacked for kind in ATTACKS for i in range(count)]
    store = Store(directory, identity(config or {}, prints), parts)
    store.begin(resume=resume)
    chosen = task.images
    arrays = Images.named(
        images=chosen.images,
        labels=chosen.labels,
        targets=task.targets,
        indices=task.indices,
        masks=chosen.objects,
        names=chosen.names,
    )
    try:
        if resume:
            store.write_log()
        _attack_all(model, task, jobs, settings, store, progress)
        # what an interrupted run left may be damaged
        with intact(directory) if resume else nullcontext():
            rows, differences, failed = _rows(jobs, attacked, store, settings, task.target_map)
        names = task.indices if chosen.names is None else chosen.names
        lost = names[failed].tolist()
        store.write_results(arrays)
        counts = {"images": len(image_set.images), "left_out": selection.left_out}
        summary = {
            "config": dict(config or {}),
            "environment": environment(),
            "counts": counts | {"failed": len(lost)},
            "failed": lost,
            "fingerprints": prints,
            "classes": image_set.classes,
            "rows": rows,
            "paired": differences,
        }
        write_summary(directory, summary)
        with intact(directory) if resume else nullcontext():
            publish(directory)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(store.resume_hint()) from None
    except OSError as error:  # of the summary, or of what is published
        hint = store.resume_hint()
        raise ValueError(f"cannot write to {directory}: {error.strerror}{hint}") from None
    store.remove()
    return Outcome(rows, differences, selection.left_out, lost)


def fingerprints(model: Classifier, image_set: ImageSet) -> dict[str, str]:
    """Return the fingerprints of the arrays that a run is about."""
    return {"network": tree_fingerprint(model), "image set": tree_fingerprint(image_set)}


def identity(config: Mapping[str, Any], prints: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that bear on the results, and the fingerprints, as JSON reads them."""
    settings = {key: value for key, value in config.items() if key not in UNRELATED}
    known: dict[str, Any] = json.loads(json.dumps(settings | dict(prints)))
    return known


def _presets(settings: Settings) -> list[Preset]:
    """Return a preset for each interpreter; refuse two of one name, by which results are known."""
    own = {"warm_steps": settings.warm_steps, "steps": settings.steps}
    threat, given = settings.threat, settings.interpreters
    presets = [resolve(settings.preset, name, threat=threat, **own) for name in given]
    name, times = Counter(interpreter.name for interpreter in _attacked(presets)).most_common(1)[0]
    if times > 1:
        raise ValueError(f"interpreter {name!r} is given {times} times; each needs its own name")
    return presets


def _attacked(presets: Sequence[Preset]) -> list[Interpreter]:
    return [preset.interpreter for preset in presets if preset.interpreter is not None]


def _jobs(
    model: Classifier, shape: tuple[int, ...], presets: Sequence[Preset], settings: Settings
) -> list[Job]:
    """Return plain PGD, a job for each budget, then ADV² by each preset, which sets the budgets."""
    threat = settings.threat
    adv2: list[Job] = []
    sharing: dict[int, list[Interpreter]] = {}
    for interpreter, preset in zip(_attacked(presets), presets, strict=True):
        cost = gradient_evaluations(model, preset, threat, shape)
        adv2.append(Job("adv2", preset, (interpreter,), cost))
        # a step of plain PGD is one unit of cost
        sharing.setdefault(round(cost), []).append(interpreter)
    pgd = []
    for budget, served in sharing.items():
        preset = resolve(settings.preset, None, threat=threat, steps=budget)
        cost = gradient_evaluations(model, preset, threat, shape)
        pgd.append(Job("pgd", preset, tuple(served), cost))
    return pgd + adv2


def _attack_all(
    model: Classifier,
    task: Task,
    jobs: Sequence[Job],
    settings: Settings,
    store: Store,
    progress: Progress,
) -> None:
    """Make every part that is not finished yet, a batch after the other."""
    n, size = len(task.targets), settings.batch_size
    count = len(range(0, n, size))
    todo = [[job for job in jobs if not all(map(store.has, job.parts(i)))] for i in range(count)]
    every, *left = (sum(count_steps(job.preset, 1, size) for job in some) for some in (jobs, *todo))
    on_step = progress(n, every * count, every * count - sum(left))
    for i, places in enumerate(batches(np.arange(n), size)):
        for name, kind, arrays in attack_batch(model, task, todo[i], places, settings, on_step):
            if not store.has(part := Part(name, kind, i)):
                store.save(part, arrays)


def _rows(
    jobs: Sequence[Job],
    attacked: Sequence[Interpreter],
    store: Store,
    settings: Settings,
    target_map: str,
) -> tuple[list[Row], list[Row], np.ndarray]:
    """Return two rows an interpreter, how they differ, and which images [N] failed somewhere."""
    job_of = {part[:2]: job for job in jobs for part in job.parts(0)}
    rows, differences, failed = [], [], []
    for interpreter in attacked:
        head = {"interpreter": interpreter.name, "threat": settings.threat.name}
        measures = {kind: store.measures(interpreter.name, kind) for kind in ATTACKS}
        for kind, numbers in measures.items():
            job, seconds = job_of[interpreter.name, kind], float(numbers.pop("seconds").sum())
            own = {"attack": kind, "target_map": target_map, **row(numbers, seed=settings.seed)}
            cost = {"gradient_evaluations": job.cost, "seconds": round(seconds, 2)}
            rows.append(head | own | cost | {"preset": to_dict(job.preset)})
            failed.append(numbers["failed"])
        pairs = paired(measures["pgd"], measures["adv2"], seed=settings.seed)
        differences += [head | pair for pair in pairs]
    return rows, differences, np.any(failed, axis=0)
