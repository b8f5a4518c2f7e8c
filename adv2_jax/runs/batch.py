"""One batch of images through the attacks of a run, and all that the results hold of it."""

import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np

from adv2_jax import metrics
from adv2_jax.attacks import Result, attack, explain, image_keys
from adv2_jax.crafting import snapshot_steps
from adv2_jax.descent import OnStep
from adv2_jax.interpreters import Interpreter
from adv2_jax.presets import Preset
from adv2_jax.runs.schema import Aim, Arrays, Attacked, Evaluated, measure
from adv2_jax.runs.store import MEASURE, SECONDS, Part
from adv2_jax.runs.task import Settings, Task, maps_of
from adv2_jax.types import Classifier

CURVE_POINTS = 100  # at most


class Job(NamedTuple):
    """An attack on every batch. Interpreters of equal budget share one run of plain PGD.

    Attributes:
        attack: a name of `schema.ATTACKS`.
        preset: its numbers.
        interpreters: those it is made for.
        cost: work on an image, in gradients of ℓ_prd.
    """

    attack: str
    preset: Preset
    interpreters: tuple[Interpreter, ...]
    cost: float

    def parts(self, batch: int) -> list[Part]:
        """Return what it finishes of a batch."""
        return [Part(interpreter.name, self.attack, batch) for interpreter in self.interpreters]


def attack_batch(
    model: Classifier,
    task: Task,
    jobs: Sequence[Job],
    places: np.ndarray,
    settings: Settings,
    on_step: OnStep,
) -> Iterator[tuple[str, str, Arrays]]:
    """Yield interpreter, attack and arrays of each part of a batch.

    Args:
        model: the classifier.
        task: the images of the run.
        jobs: the attacks.
        places: [B] of the batch among the images; the last batch is padded by repeating its last
            image, of which only one is returned.
        settings: of the run.
        on_step: called with the number of steps newly done.
    """
    chosen, targets = task.images.take(places), task.targets[places]
    assert chosen.labels is not None
    labels, valid = chosen.labels, int(np.ptp(places)) + 1
    keys = image_keys(settings.seed, task.indices[places])

    @cache
    def aim(interpreter: Interpreter) -> tuple[np.ndarray, np.ndarray]:
        benign = maps_of(model, chosen.images, labels, interpreter)
        return benign, task.target_maps(interpreter, places, benign)

    for job in jobs:
        attacked, displacement = job.preset.interpreter, settings.threat.displacement
        start = time.perf_counter()
        result = attack(
            model,
            chosen.images,
            targets,
            None if attacked is None else aim(attacked)[1],
            interpreter=attacked,
            threat=settings.threat,
            preset=job.preset,
            batch_size=len(places),
            on_step=on_step,
            snapshots=int((np.unique(places) < settings.snapshots).sum()),
            all_may_fail=True,
            keys=keys,
        )
        seconds = np.array([time.perf_counter() - start])
        flows = None if displacement is None else jax.vmap(displacement)(result.params)
        for interpreter in job.interpreters:
            maps, float_maps = result.maps, result.float_maps
            if attacked is None:
                maps = maps_of(model, result.images, targets, interpreter)
                float_maps = maps_of(model, result.float_images, targets, interpreter)
            evaluated = Evaluated(
                chosen.images,
                targets,
                chosen.objects,
                *aim(interpreter),
                result.images,
                result.logits,
                maps,
                float_maps,
                flows,
            )
            arrays = _of_images(job.attack, evaluated, result)
            arrays = {key: values[:valid] for key, values in arrays.items()}
            pictures = _snapshots(model, interpreter, job.preset, targets, result)
            steps = Attacked.named(f"{job.attack}/", curve_steps=_curve_steps(result), **pictures)
            yield interpreter.name, job.attack, arrays | steps | {SECONDS: seconds}


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
        flow=None if evaluated.flows is None else np.asarray(evaluated.flows),
        # a curve that no step reports is left out
        **{name: values for name, values in curves.items() if not np.isnan(values).all()},
    )
    if attack == "pgd":  # what no attack made stands in one part alone
        maps = {"benign_maps": evaluated.benign_maps, "target_maps": evaluated.target_maps}
        arrays |= Aim.named(**maps)
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
    result: Result,
) -> dict[str, np.ndarray]:
    """Return what an interpreter sees of the first images on the way."""
    images = result.snapshots
    if not len(images):
        return {}
    m, s = images.shape[:2]
    labels, frames = np.repeat(targets[:m], s), images.reshape(m * s, *images.shape[2:])
    logits, maps = explain(
        model,
        frames,
        labels,
        interpreter=interpreter,
        batch_size=len(targets),
        all_may_fail=True,
    )
    return {
        "snapshot_steps": np.array(snapshot_steps(preset), np.int32),
        "snapshot_images": images,
        "snapshot_maps": maps.reshape(m, s, *maps.shape[1:]),
        "snapshot_confidence": metrics.confidence(logits, labels).reshape(m, s),
    }
