"""What a run is asked for: images, target classes, and target maps by kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adv2_jax.attacks import check_interpreter, explain
from adv2_jax.data import ImageSet, targets
from adv2_jax.interpreters import INTERPRETERS, Interpreter
from adv2_jax.models import user
from adv2_jax.presets import Preset
from adv2_jax.runs.select import Selection
from adv2_jax.threats import Threat
from adv2_jax.types import Classifier

TargetMaps = Callable[[Interpreter, np.ndarray, np.ndarray], np.ndarray]


class Settings(NamedTuple):
    """What a run is asked for, beyond the network and the images.

    Attributes:
        interpreters: names, or interpreters with options of their own.
        threat: threat model.
        preset: name, or presets by interpreter (`presets.read`).
        warm_steps, steps: take the place of the preset's when given.
        batch_size: images at a time.
        seed: of target classes, target maps and bootstrap.
        target_map: what is to be shown where the image set has no target maps of its own: "benign",
            the map of the unchanged image, which hides the attack; "image", the map of another
            image of the target class; "patch", a random figure.
        snapshots: of how many images, the first, to keep what they were on the way, some eight
            times an attack, each explained.
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


def interpreter_of(name: str) -> str | Interpreter:
    """An interpreter by its name, which stays a name, or by the file it is written in.

    Args:
        name: a key of `interpreters.INTERPRETERS`, or `path/to/file.py:name` of an `Interpreter` or
            a function that makes one.

    Raises:
        ValueError: if there is no such interpreter, or the file or the function fails (says how).
    """
    if name in INTERPRETERS:
        return name
    if not user.is_reference(name):
        raise ValueError(
            f"interpreter {name!r} is not one of {', '.join(INTERPRETERS)}, or path/to/file.py:name"
        )
    made = user.named("interpreter", name)
    if callable(made):
        made = user.attempt(
            f"{name} must be an adv2_jax Interpreter, or a function that makes one of nothing", made
        )
    if not isinstance(made, Interpreter):
        raise ValueError(
            f"{name} is neither an adv2_jax Interpreter nor a function that makes one, but {type(made).__name__}"
        )
    return made


class Task(NamedTuple):
    """N images and what they are driven to.

    Attributes:
        images: those of the source that the network gets right.
        places: int [N], of the images in their source.
        targets: int32 [N], target classes.
        target_map: as in `Settings`, or "file": the set's own.
        target_maps: (interpreter, places [B] among the N, benign maps [B, h, w]) -> target maps [B,
            h, w].
    """

    images: ImageSet
    places: np.ndarray
    targets: np.ndarray
    target_map: str
    target_maps: TargetMaps


def make_task(
    model: Classifier, image_set: ImageSet, selection: Selection, settings: Settings
) -> Task:
    """The images a network gets right, their target classes, and their target maps.

    Raises:
        ValueError: for an unknown target map, or one that cannot be had: which, and why.
    """
    chosen, where = selection.images, selection.indices
    assert chosen.labels is not None
    goals = chosen.targets
    if goals is None:
        goals = targets.random_targets(
            chosen.labels, selection.num_classes, seed=settings.seed, indices=where
        )
    if chosen.target_maps is not None:
        if settings.target_map != "benign":
            raise ValueError(
                f"target map {settings.target_map!r}: the images come with target maps of their own"
            )
        own = chosen.target_maps
        return Task(chosen, where, goals, "file", lambda interpreter, places, benign: own[places])
    return Task(
        chosen,
        where,
        goals,
        settings.target_map,
        _target_maps(model, image_set, selection, goals, settings),
    )


def _target_maps(
    model: Classifier,
    image_set: ImageSet,
    selection: Selection,
    goals: np.ndarray,
    settings: Settings,
) -> TargetMaps:
    kind, where, seed = settings.target_map, selection.indices, settings.seed
    if kind not in targets.TARGET_MAPS:
        raise ValueError(f"target map {kind!r} is not one of {', '.join(targets.TARGET_MAPS)}")
    if kind == "benign":
        return lambda interpreter, places, benign: benign
    if kind == "patch":
        return lambda interpreter, places, benign: np.stack(
            [targets.patch(benign.shape[1:], seed=seed, index=int(i)) for i in where[places]]
        )
    donors = targets.donors(
        selection.source_labels, goals, where, seed=seed, classes=image_set.classes
    )
    return lambda interpreter, places, benign: explain(
        model,
        image_set.images[donors[places]],
        goals[places],
        interpreter=interpreter,
        batch_size=len(places),
        all_may_fail=True,
    )[1]


def check_own_maps(model: Classifier, task: Task, interpreters: Sequence[Interpreter]) -> None:
    """Refuse maps of another size than an interpreter's, and interpreters that the model does not
    suit, before the work.

    Raises:
        ValueError: names the interpreter, and what it wants.
    """
    own = task.images.target_maps
    for interpreter in interpreters:
        expected = [
            len(task.targets),
            *check_interpreter(model, task.images.images.shape[1:], interpreter, attacked=True),
        ]
        if own is not None and list(own.shape) != expected:
            raise ValueError(
                f"target_maps must be {expected} for {interpreter.name}, got {list(own.shape)}"
            )
