"""What a run is asked for: images, target classes, and target maps by kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
        target_map: the map to be shown where the image set has no target maps of its own:
            "benign", that of the unchanged image, which hides the attack; "image", that of another
            image of the target class; "patch", a random figure.
        snapshots: of how many images, the first, to keep what they were on the way: some eight
            pictures an attack, each explained.
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
        known = ", ".join(INTERPRETERS)
        raise ValueError(f"interpreter {name!r} is not one of {known}, or path/to/file.py:name")
    made = user.named("interpreter", name)
    if callable(made):
        kind = "an adv2_jax Interpreter, or a function that makes one of nothing"
        made = user.attempt(f"{name} must be {kind}", made)
    if not isinstance(made, Interpreter):
        kinds = "an adv2_jax Interpreter nor a function that makes one"
        raise ValueError(f"{name} is neither {kinds}, but {type(made).__name__}")
    return made


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
    chosen, indices, kind = selection.images, selection.indices, settings.target_map
    assert chosen.labels is not None
    classes = chosen.targets
    if classes is None:
        classes = targets.random_targets(
            chosen.labels, selection.num_classes, seed=settings.seed, indices=indices
        )
    own, seed = chosen.target_maps, settings.seed
    if own is not None and kind != "benign":
        raise ValueError(f"target map {kind!r}: the images come with target maps of their own")
    if kind not in targets.TARGET_MAPS:
        known = ", ".join(targets.TARGET_MAPS)
        raise ValueError(f"target map {kind!r} is not one of {known}")
    if kind == "image":
        donors = targets.donors(
            selection.source_labels, classes, indices, seed=seed, classes=image_set.classes
        )

    def target_maps(interpreter: Interpreter, places: np.ndarray, benign: np.ndarray) -> np.ndarray:
        if own is not None:
            return own[places]
        if kind == "benign":
            return benign
        if kind == "patch":
            size = benign.shape[1:]
            return np.stack([targets.patch(size, seed=seed, index=int(i)) for i in indices[places]])
        images = image_set.images[donors[places]]
        return maps_of(model, images, classes[places], interpreter)

    return Task(chosen, indices, classes, kind if own is None else "file", target_maps)


def maps_of(
    model: Classifier, images: np.ndarray, classes: np.ndarray, interpreter: Interpreter
) -> np.ndarray:
    """Return the maps [B, h, w] of a batch; those of images on which they fail are not a number."""
    options: dict[str, Any] = {"batch_size": len(images), "all_may_fail": True}
    return explain(model, images, classes, interpreter=interpreter, **options)[1]


def check_own_maps(model: Classifier, task: Task, interpreters: Sequence[Interpreter]) -> None:
    """Refuse, before the work, interpreters that do not suit the model, and maps of other sizes.

    Raises:
        ValueError: names the interpreter, and what it wants.
    """
    own, shape = task.images.target_maps, task.images.images.shape[1:]
    for interpreter in interpreters:
        drawn = check_interpreter(model, shape, interpreter, attacked=True)
        expected = [len(task.targets), *drawn]
        if own is not None and list(own.shape) != expected:
            name, given = interpreter.name, list(own.shape)
            raise ValueError(f"target_maps must be {expected} for {name}, got {given}")
