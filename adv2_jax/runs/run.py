"""One run: noise, PGD and ADV² on the same images, a batch at a time, into rows and arrays."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from adv2_jax import metrics
from adv2_jax.attacks import (
    Result,
    attack,
    batches,
    check_target_maps,
    count_steps,
    explain,
    gradient_evaluations,
    image_keys,
    noise,
    reached,
)
from adv2_jax.crafting import snapshot_steps
from adv2_jax.data import ImageSet, targets
from adv2_jax.data.lazy import ahead, behind
from adv2_jax.descent import OnStep
from adv2_jax.detectors import parts_of
from adv2_jax.devices import number_of_devices
from adv2_jax.files import intact, write_summary
from adv2_jax.hosts import processes
from adv2_jax.identity import environment, tree_fingerprint
from adv2_jax.interpreters import INTERPRETERS, Interpreter, Joint, joint
from adv2_jax.models import user
from adv2_jax.precision import at
from adv2_jax.presets import Preset, resolve, to_dict
from adv2_jax.runs.doubts import counts, doubts
from adv2_jax.runs.schema import (
    CONTROL,
    COST,
    JOINT,
    KEPT,
    KINDS,
    Aim,
    Arrays,
    Attacked,
    Evaluated,
    Images,
    Row,
    measure,
    paired,
    row,
)
from adv2_jax.runs.select import Selection, select
from adv2_jax.runs.store import CURVATURE_FILES, MEASURE, SECONDS, Part, Store
from adv2_jax.threats import Threat
from adv2_jax.types import Classifier

# (images, steps in all, steps done) -> function called with the steps newly done
Progress = Callable[[int, int, int], OnStep]
TargetMaps = Callable[[Interpreter, np.ndarray, np.ndarray], np.ndarray]

# of the command line, but not of the results: may change when a run is resumed
UNRELATED = (
    "command",
    "out",
    "run_directory",
    "resume",
    "overwrite",
    "quiet",
    "table",
    "devices",
    "results",
)
CURVE_POINTS = 100  # at most
# by which sources of images are known, beside interpreters
RESERVED = ("benign", *KINDS)


class Settings(NamedTuple):
    """The settings of a run, beyond the network and the images.

    Attributes:
        interpreters: names, or interpreters with options of their own.
        threat: threat model.
        preset: name, or presets by interpreter (`presets.read`).
        warm_steps, steps: take the place of the preset's when given.
        batch_size: images at a time on each device.
        seed: of target classes, target maps and bootstrap.
        target_map: the map to be shown where the image set has no target maps of its own:
            "benign", that of the unchanged image, which hides the attack; "image", that of another
            image of the target class; "patch", a random figure.
        snapshots: of how many images, the first, to keep what they were on the way: some eight
            pictures an attack, each explained.
        precision: of attack steps (see `attacks.attack`).
        devices: number of devices of this host to use; all unless given.
        keep: key of `schema.KEPT`: "adversarial" leaves out maps, flows, curves and snapshots, which
            are most of the bytes, from the results; what is measured is the same.
        results: form of the results, of `schema.FORMS`: one file, shards, or shards above 2 GB.
        joint: attack all interpreters by one image, too.
        goal: of `descent.GOALS`: the class that the attack drives at is a target, any but the label,
            or the label.
        restarts: number of attacks on each image (see `presets.Preset`); the preset's unless given.
    """

    interpreters: Sequence[str | Interpreter]
    threat: Threat
    preset: str | Mapping[str, Preset] = "default"
    warm_steps: int | None = None
    steps: int | None = None
    batch_size: int = 32
    seed: int = 0
    target_map: str = "benign"
    snapshots: int = 16
    precision: str = "high"
    devices: int | None = None
    keep: str = "all"
    results: str = "auto"
    joint: bool = False
    goal: str = "targeted"
    restarts: int | None = None


def interpreter_of(name: str) -> str | Interpreter:
    """Return an interpreter by its name, which stays a name, or by the file it is written in.

    Args:
        name: a key of `interpreters.INTERPRETERS`, or `path/to/file.py:name` of an `Interpreter`
            or a function that makes one.

    Raises:
        ValueError: there is no such interpreter, or the file or the function fails (says how).
    """
    if name in INTERPRETERS:
        return name
    if not user.is_reference(name):
        raise ValueError(
            f"interpreter {name!r} is not one of {', '.join(INTERPRETERS)}, or path/to/file.py:name"
        )
    made, kind = user.named("interpreter", name), "an adv2_jax Interpreter"
    if callable(made):
        made = user.attempt(f"{name} must be {kind}, or a function that makes one of nothing", made)
    if not isinstance(made, Interpreter):
        raise ValueError(
            f"{name} is neither {kind} nor a function that makes one, but {type(made).__name__}"
        )
    return made


class Outcome(NamedTuple):
    """The numbers of a finished run.

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
    """Attack a set of images by PGD alone and by ADV², for each interpreter, beside random noise.

    PGD alone gets as many gradient evaluations as ADV² on the same interpreter, or as the joint
    attack on all of them (`Settings.joint`), whose images all interpreters share. Target classes are
    the set's own or drawn from the seed. A finished batch stays in the directory until the run is
    over: beyond the image set and the images taken from it, one batch and a dozen numbers an image
    are held in memory. Of several processes (`hosts.connect`) each makes its share of the batches;
    process 0 alone returns, the others exit when it has finished.

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
    presets = presets_of(settings)
    selection = select(
        model,
        image_set,
        limit=limit,
        batch_size=settings.batch_size,
        devices=settings.devices,
    )
    # of all images, not only the selected: with another source, indices would mean others; and
    # after the images were looked at: those that are decoded on demand are not read once more
    prints = fingerprints(model, image_set)
    task = make_task(model, image_set, selection, settings)
    # snapshots are more than the images: in larger batches they would need programs of their own
    settings = settings._replace(batch_size=min(settings.batch_size, len(task.targets)))
    maps = task.images.target_maps
    for interpreter in presets:  # before the work
        wanted = None if maps is None else maps.shape
        check_target_maps(model, task.images.images.shape, interpreter, wanted)
    # ADV² of each interpreter, and plain PGD of the same cost
    with at(settings.precision):  # as in `attack`: work is counted on the traces of its steps
        jobs = _jobs(model, image_set.images.shape[1:], presets, settings)
    count = len(range(0, len(task.targets), settings.batch_size))
    kinds = sorted({job.attack for job in jobs}, key=KINDS.index)
    parts = [Part(one.name, kind, i) for one in presets for kind in kinds for i in range(count)]
    everybody = processes()
    store = Store(directory, identity(config or {}, prints), parts, leads=everybody.index == 0)
    # what an interrupted run left may be damaged
    reading = partial(intact, directory) if resume else nullcontext
    with store.kept():
        if everybody.index == 0:
            store.begin(resume=resume)
            if everybody.count > 1:
                store.announce()
        everybody.begin()
        if everybody.index > 0:
            store.join()
        _attack_all(model, task, jobs, settings, store, progress)
        if everybody.index > 0:
            everybody.finish()
        if everybody.count > 1:
            store.collect()
        with reading():
            rows, differences, failed = _rows(jobs, store, settings, task.target_map)
        images = task.images
        lost = (task.indices if images.names is None else images.names)[failed].tolist()
        store.write_results(
            Images.named(
                images=images.images,
                labels=images.labels,
                targets=task.targets,
                indices=task.indices,
                masks=images.objects,
                names=images.names,
            ),
            settings.results,
        )
        summary = {
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
        }
        # what was measured on the images of a run that is replaced
        for name in CURVATURE_FILES:
            (directory / name).unlink(missing_ok=True)
        write_summary(directory, summary)
        with reading():
            publish(directory)
    # last: until results and report are written, finished batches are all there is
    store.remove()
    return Outcome(rows, differences, selection.left_out, lost)


def fingerprints(model: Classifier, image_set: ImageSet) -> dict[str, str]:
    """Return the fingerprints of the arrays that a run is about."""
    network, detector = parts_of(model)
    prints = {"network": tree_fingerprint(network), "image set": tree_fingerprint(image_set)}
    if detector is None:
        return prints
    return prints | {"detector": ", ".join(map(tree_fingerprint, detector.members))}


def identity(config: Mapping[str, Any], prints: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that bear on the results, and the fingerprints, as JSON reads them."""
    settings = {key: value for key, value in config.items() if key not in UNRELATED}
    # through JSON: tuples become lists, as they come back from the file that they are compared with
    return dict(json.loads(json.dumps(settings | dict(prints))))


def presets_of(settings: Settings) -> dict[Interpreter, Preset]:
    """Return a preset for each interpreter; refuse two of one name, by which results are known."""
    resolved = [_resolve(settings, one) for one in settings.interpreters]
    interpreters = [one.interpreter for one in resolved if one.interpreter is not None]
    names = [interpreter.name for interpreter in interpreters]
    for name in names:
        # arrays and rows are filed by name alone
        if (times := names.count(name)) > 1:
            raise ValueError(
                f"interpreter {name!r} is given {times} times; each needs its own name"
            )
        if name in RESERVED:
            raise ValueError(f"interpreter {name!r} needs another name: that is one of results")
    return dict(zip(interpreters, resolved, strict=True))


def joint_preset_of(settings: Settings) -> list[Preset]:
    """Return the preset of the attack on all interpreters; none unless it is asked for."""
    if not settings.joint:
        return []
    return [_resolve(settings, joint(*settings.interpreters))]


def _resolve(settings: Settings, interpreter: str | Interpreter | Joint | None) -> Preset:
    # None leaves the preset's own number
    return resolve(
        settings.preset,
        interpreter,
        threat=settings.threat,
        warm_steps=settings.warm_steps,
        steps=settings.steps,
        goal=settings.goal,
        restarts=settings.restarts,
    )


class Task(NamedTuple):
    """N images and what they are driven to.

    Attributes:
        images: those of the source that the network gets right.
        indices: int [N], their positions in their source.
        targets: int32 [N], target classes.
        target_map: as in `Settings`, or "file": the set's own.
        target_maps: (interpreter, places [B] among the N, benign maps [B, h, w]) -> target maps
            [B, h, w].
    """

    images: ImageSet
    indices: np.ndarray
    targets: np.ndarray
    target_map: str
    target_maps: TargetMaps


def make_task(
    model: Classifier, image_set: ImageSet, selection: Selection, settings: Settings
) -> Task:
    """Return the images a network gets right, with their target classes and target maps.

    Raises:
        ValueError: an unknown target map, or one that cannot be had (says which, and why).
    """
    chosen, indices = selection.images, selection.indices
    kind, seed, own_maps = settings.target_map, settings.seed, selection.images.target_maps
    if settings.goal == "keep" and kind == "benign" and own_maps is None:
        raise ValueError(
            "goal 'keep' with target map 'benign' asks for the image as it is: "
            f"take {' or '.join(targets.TARGET_MAPS[1:])}, or images with target maps of their own"
        )
    if own_maps is not None and kind != "benign":
        raise ValueError(f"target map {kind!r}: the images come with target maps of their own")
    if kind not in targets.TARGET_MAPS:
        raise ValueError(f"target map {kind!r} is not one of {', '.join(targets.TARGET_MAPS)}")
    drawn, labels = chosen.targets, chosen.labels
    assert labels is not None
    if drawn is None:
        drawn = targets.random_targets(labels, selection.num_classes, seed=seed, indices=indices)
    classes = drawn if settings.goal == "targeted" else labels.astype(np.int32)
    if kind == "image":
        donors = targets.donors(
            selection.source_labels, drawn, indices, seed=seed, classes=image_set.classes
        )

    def target_maps(interpreter: Interpreter, places: np.ndarray, benign: np.ndarray) -> np.ndarray:
        if own_maps is not None:
            return own_maps[places]
        if kind == "benign":
            return benign
        if kind == "patch":
            size = benign.shape[1:]
            # by the place in the source: batches and left-out images change no patch
            return np.stack([targets.patch(size, seed=seed, index=int(i)) for i in indices[places]])
        donated = image_set.images[donors[places]]
        return maps_of(model, donated, drawn[places], interpreter, settings)

    return Task(chosen, indices, classes, kind if own_maps is None else "file", target_maps)


def maps_of(
    model: Classifier,
    images: np.ndarray,
    classes: np.ndarray,
    interpreter: Interpreter,
    settings: Settings,
) -> np.ndarray:
    """Return the maps [M, h, w] of images; those of images on which they fail are not a number."""
    return _seen(model, images, classes, interpreter, settings)[1]


def _seen(
    model: Classifier,
    images: np.ndarray,
    classes: np.ndarray,
    interpreter: Interpreter,
    settings: Settings,
) -> tuple[np.ndarray, np.ndarray]:
    return explain(
        model,
        images,
        classes,
        interpreter=interpreter,
        batch_size=settings.batch_size,
        all_may_fail=True,
        devices=settings.devices,
    )


class Job(NamedTuple):
    """An attack, or noise, on every batch. Interpreters of equal budget share one run of plain PGD.

    Attributes:
        attack: one of `schema.KINDS`.
        preset: its numbers; None for noise.
        interpreters: those it is made for.
        cost: work on an image, in gradients of ℓ_prd.
    """

    attack: str
    preset: Preset | None
    interpreters: tuple[Interpreter, ...]
    cost: float

    def parts(self, batch: int) -> list[Part]:
        """Return the parts of a batch that it makes."""
        return [Part(interpreter.name, self.attack, batch) for interpreter in self.interpreters]


def _jobs(
    model: Classifier,
    shape: tuple[int, ...],
    presets: Mapping[Interpreter, Preset],
    settings: Settings,
) -> list[Job]:
    """Return plain PGD, a job for each budget, ADV² by each preset, the joint attack; noise.

    ADV² sets the budgets: each has its own, unless there is a joint attack, whose budget serves all.
    """

    def job(attack: str, preset: Preset, interpreters: Sequence[Interpreter]) -> Job:
        cost = gradient_evaluations(model, preset, settings.threat, shape)
        return Job(attack, preset, tuple(interpreters), cost)

    adv2 = [job("adv2", preset, [interpreter]) for interpreter, preset in presets.items()]
    together = [job(JOINT, preset, list(presets)) for preset in joint_preset_of(settings)]
    plain = _resolve(settings._replace(warm_steps=None), None)
    # one unit, but for a detector that it evades; of 100 steps, as a cost has one decimal
    hundred = job("pgd", replace(plain, warm_steps=0, steps=100), ())
    # a run of plain PGD is often half of the work, and knows nothing of interpreters
    sharing: dict[int, list[Interpreter]] = {}
    for one in together or adv2:
        sharing.setdefault(round(100 * one.cost / hundred.cost), []).extend(one.interpreters)
    pgd = [job("pgd", replace(plain, steps=steps), served) for steps, served in sharing.items()]
    # last, as it takes no time: a run that is interrupted early leaves nothing behind
    control = [Job(CONTROL, None, tuple(presets), 0.0)] if settings.threat.noise else []
    return pgd + adv2 + together + control


def _attack_all(
    model: Classifier,
    task: Task,
    jobs: Sequence[Job],
    settings: Settings,
    store: Store,
    progress: Progress,
) -> None:
    """Make every part of this process that is not finished yet, a batch on each device."""
    n, devices = len(task.targets), number_of_devices(settings.devices)
    groups = list(batches(np.arange(n), settings.batch_size))

    def missing(job: Job, batch: int) -> bool:
        return not all(map(store.has, job.parts(batch)))

    # the share of this process, of all batches: processes are resumed in any number
    share = range(processes().index, len(groups), processes().count)
    todo = {i: [job for job in jobs if missing(job, i)] for i in share}
    steps = {job: count_steps(job.preset, 1, 1, 1) if job.preset else 0 for job in jobs}
    total = len(share) * sum(steps.values())
    left = sum(steps[job] for some in todo.values() for job in some)
    on_step = progress(n * len(share) // len(groups), total, total - left)
    work = []
    for first in range(0, len(share), devices):
        together = share[first : first + devices]
        places = np.concatenate([groups[i] for i in together])
        some = [job for job in jobs if any(job in todo[i] for i in together)]
        work += [(together, places, some)] if some else []
    images = ahead(task.images.take(places).decode() for _, places, _ in work)
    # the parts of one attack may wait to be written while the device works on the next
    with closing(images), behind(store.save, waiting=devices) as save:
        for (together, places, some), chosen in zip(work, images, strict=True):
            made = attack_batches(model, task, chosen, some, places, settings, on_step)
            for name, kind, batch, arrays in made:
                if not store.has(part := Part(name, kind, together[batch])):
                    save(part, _kept(arrays, settings.keep))


def attack_batches(
    model: Classifier,
    task: Task,
    chosen: ImageSet,
    jobs: Sequence[Job],
    places: np.ndarray,
    settings: Settings,
    on_step: OnStep,
) -> Iterator[tuple[str, str, int, Arrays]]:
    """Yield interpreter, attack, number of the batch and arrays of each part of some batches.

    Args:
        model: the classifier.
        task: the images of the run.
        chosen: those of the batches, in memory.
        jobs: the attacks.
        places: [k B] of k whole batches among the images; the last is padded by repeating its last
            image, so that all have one size and one compilation. Padding is not returned.
        settings: of the run.
        on_step: called with the number of steps newly done, of all batches together.
    """
    images, labels, targets = np.asarray(chosen.images), chosen.labels, task.targets[places]
    assert labels is not None
    valid = len(np.unique(places))  # without padding
    cuts = [slice(cut[0], cut[-1] + 1) for cut in batches(np.arange(valid), settings.batch_size)]
    # of the image's place in its source: no batch size changes what is drawn
    keys = image_keys(settings.seed, task.indices[places])

    # not explained in vain
    snapshots = settings.snapshots if settings.keep == "all" else 0

    # several jobs ask for the maps of one interpreter
    @cache
    def aim(interpreter: Interpreter) -> tuple[np.ndarray, np.ndarray]:
        benign = maps_of(model, images, labels, interpreter, settings)
        return benign, task.target_maps(interpreter, places, benign)

    for job in jobs:
        displacement = settings.threat.displacement
        attacked = () if job.preset is None else job.preset.interpreters
        options: dict[str, Any] = {
            "threat": settings.threat,
            "batch_size": settings.batch_size,
            "keys": keys,
            "devices": settings.devices,
        }
        start = time.perf_counter()
        if job.preset is None:
            result = noise(model, images, targets, **options)
        else:
            goals = [aim(one)[1] for one in attacked]
            result = attack(
                model,
                images,
                targets,
                goals if len(goals) > 1 else next(iter(goals), None),
                interpreter=Joint(attacked) if len(attacked) > 1 else next(iter(attacked), None),
                preset=job.preset,
                on_step=lambda new: on_step(new * len(cuts)),
                snapshots=int((np.unique(places) < snapshots).sum()),
                all_may_fail=True,
                precision=settings.precision,
                **options,
            )
        seconds = np.array([time.perf_counter() - start]) / len(cuts)
        classes = reached(result.logits, targets, settings.goal)
        flows = None if displacement is None else np.asarray(jax.vmap(displacement)(result.params))
        for k, interpreter in enumerate(job.interpreters):
            seen = _of_interpreter(result, k)
            maps, float_maps = seen.maps, seen.float_maps
            if not attacked:  # noise and plain PGD draw no maps
                maps = float_maps = maps_of(model, result.images, classes, interpreter, settings)
            if job.attack == "pgd":  # noise is drawn on the 8-bit grid
                float_classes = reached(result.float_logits, targets, settings.goal)
                float_maps = maps_of(
                    model, result.float_images, float_classes, interpreter, settings
                )
            evaluated = Evaluated(
                images,
                classes,
                chosen.objects,
                *aim(interpreter),
                result.images,
                result.logits,
                maps,
                float_maps,
                flows,
            )
            of_images = _of_images(job.attack, evaluated, seen)
            if settings.goal == "untargeted":
                of_images |= Attacked.named(f"{job.attack}/", classes=classes)
            for batch, cut in enumerate(cuts):
                arrays = {key: values[cut] for key, values in of_images.items()}
                if job.preset is not None:
                    arrays |= Attacked.named(
                        f"{job.attack}/",
                        curve_steps=_curve_steps(result),
                        **_snapshots(
                            model,
                            interpreter,
                            job.preset,
                            classes[cut],
                            result.snapshots[cut],
                            settings,
                        ),
                    )
                yield interpreter.name, job.attack, batch, arrays | {SECONDS: seconds}


def _of_interpreter(result: Result, k: int) -> Result:
    """Return the result of a joint attack as its interpreter k sees it; others as they are."""
    if not isinstance(result.maps, tuple):
        return result
    curves = result.curves._replace(map_l1=result.curves.map_l1[..., k])
    return result._replace(maps=result.maps[k], float_maps=result.float_maps[k], curves=curves)


def _kept(arrays: Arrays, keep: str) -> Arrays:
    """Return the arrays of a part that the run keeps, and its measures."""
    names = KEPT[keep]
    return {
        key: values
        for key, values in arrays.items()
        if names is None or key.startswith(MEASURE) or key.rpartition("/")[2] in names
    }


def _of_images(attack: str, evaluated: Evaluated, result: Result) -> dict[str, np.ndarray]:
    """Return the arrays of a part that have an entry for each image, and its measures."""
    measures, steps = measure(evaluated), _curve_steps(result)
    curves = {
        f"curve_{name}": np.asarray(values)[:, steps]
        for name, values in result.curves._asdict().items()
    }
    arrays = Attacked.named(
        f"{attack}/",
        images=evaluated.images,
        maps=evaluated.maps,
        confidence=measures["mc"],
        success=measures["asr"],
        map_l1=measures["map_l1"],
        map_iou75=measures["map_iou75"],
        flow=evaluated.flows,
        # a curve that no step reports is left out
        **{name: values for name, values in curves.items() if not np.isnan(values).all()},
    )
    if attack == "pgd":  # these maps are of both attacks: one part holds them
        arrays |= Aim.named(benign_maps=evaluated.benign_maps, target_maps=evaluated.target_maps)
    measures |= doubts(evaluated, result) | {COST: result.work}
    return arrays | {f"{MEASURE}{key}": values for key, values in measures.items()}


def _curve_steps(result: Result) -> np.ndarray:
    """Return the steps that curves are thinned to, evenly, the first and the last among them."""
    n = np.shape(result.curves.loss)[1]
    return np.linspace(0, n - 1, min(n, CURVE_POINTS)).round().astype(np.int32)


def _snapshots(
    model: Classifier,
    interpreter: Interpreter,
    preset: Preset,
    targets: np.ndarray,
    images: np.ndarray,
    settings: Settings,
) -> dict[str, np.ndarray]:
    """Return snapshots of the first images, their maps by an interpreter, and their confidences."""
    if not len(images):
        return {}
    m, s = images.shape[:2]
    labels, frames = np.repeat(targets[:m], s), images.reshape(m * s, *images.shape[2:])
    logits, maps = _seen(model, frames, labels, interpreter, settings)
    return {
        "snapshot_steps": np.array(snapshot_steps(preset), np.int32),
        "snapshot_images": images,
        "snapshot_maps": maps.reshape(m, s, *maps.shape[1:]),
        "snapshot_confidence": metrics.confidence(logits, labels).reshape(m, s),
    }


def _rows(
    jobs: Sequence[Job], store: Store, settings: Settings, target_map: str
) -> tuple[list[Row], list[Row], np.ndarray]:
    """Return an interpreter's rows, how PGD and ADV² differ, and which images [N] failed in any."""
    job_of = {part[:2]: job for job in jobs for part in job.parts(0)}
    rows, differences, failed = [], [], []
    for name in dict.fromkeys(part[0] for part in store.parts):
        head = {"interpreter": name, "threat": settings.threat.name}
        kinds = dict.fromkeys(part[1] for part in store.parts)
        measures = {kind: store.measures(name, kind) for kind in kinds}
        for kind, numbers in measures.items():
            job, seconds = job_of[name, kind], float(numbers.pop("seconds").sum())
            cost = numbers.get(COST, np.full(1, job.cost))
            rows.append(
                {
                    **head,
                    **({"attack": "adv2", "joint": True} if kind == JOINT else {"attack": kind}),
                    "target_map": target_map,
                    **row(numbers, seed=settings.seed),
                    **({"doubts": found} if (found := counts(numbers)) else {}),
                    COST: round(float(cost.mean()), 1),
                    "seconds": round(seconds, 2),
                    "preset": None if job.preset is None else to_dict(job.preset),
                }
            )
            failed.append(numbers["failed"])
        for extra, before, after in (({}, "pgd", "adv2"), ({"joint": True}, "adv2", JOINT)):
            if after in measures:
                pairs = paired(measures[before], measures[after], seed=settings.seed)
                differences += [head | extra | pair for pair in pairs]
    return rows, differences, np.any(failed, axis=0)
