"""Detectors against the images of finished runs: fitted on benign images, then judged.

A detector is fair to an attack only on images that it was not fitted on, beside noise of the same
size, and with attacks that know of it (Carlini et al. 2019, Tramèr et al. 2020): runs of `adv2
attack --evade` are judged in the same table.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from adv2_jax.attacks import batches, check_interpreter, to_unit
from adv2_jax.capabilities import num_classes, static_leaves
from adv2_jax.data import ImageSet
from adv2_jax.data.lazy import Images
from adv2_jax.detectors import (
    FALSE_POSITIVES,
    LEAST_BENIGN,
    Detector,
    Features,
    Record,
    check,
    fit,
)
from adv2_jax.identity import hash_of, tree_fingerprint
from adv2_jax.interpreters import INTERPRETERS
from adv2_jax.precision import at
from adv2_jax.runs.schema import ATTACKS, JOINT, Row, interval, kind_of, mean, roc_auc
from adv2_jax.runs.select import select
from adv2_jax.runs.transfer import Run
from adv2_jax.types import Classifier

# a map is close if its largest quarter overlaps that of the target map by half (IoU), the customary
# match of two regions; unrelated maps have .14
CLOSE = 0.5
POINTS = 41  # of a ROC curve in the summary, at most
FITTED_ON = (*ATTACKS, JOINT)  # attacks that a logistic head may be fitted on


def hashes(images: Images) -> NDArray[np.int64]:
    """Return 64 bits of each image [N, H, W, 3], by which a detector knows it again."""
    each = [hash_of([np.asarray(images[i : i + 1])]) for i in range(len(images))]
    return np.frombuffer(b"".join(each), np.int64)


def _by_batches(function: Callable[[Any], Any], images: Images, batch_size: int) -> Any:
    """Return a function of batches in [0, 1], of all images [N, H, W, 3], in NumPy."""
    with at("highest"):
        parts = [
            jax.device_get(function(to_unit(np.asarray(some), np.float32)))
            for some in batches(images, batch_size)
        ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(images)], *parts)


@partial(jax.jit, static_argnums=0)
def _looks(kind: Features, model: Classifier, images: Array) -> Any:
    assert kind.look is not None
    return jax.vmap(partial(kind.look, model))(images)


@partial(jax.jit, static_argnums=0)
def _features(kind: Features, reference: Any, model: Classifier, images: Array) -> Array:
    return jax.vmap(lambda image: kind.compute(model, image, reference))(images)


@jax.jit
def _scores(detector: Detector, model: Classifier, images: Array) -> Array:
    return jax.vmap(partial(detector.score, model))(images)


def unseen(
    model: Classifier, benign: ImageSet, runs: Sequence[Run], *, batch_size: int = 32
) -> ImageSet:
    """Return the benign images that a network gets right and no run has.

    Raises:
        ValueError: as `select`; or they are of another size than those of a run.
    """
    for run in runs:
        if (held := run.results.images.shape[1:]) != (shape := benign.images.shape[1:]):
            raise ValueError(
                f"benign images are {list(shape)}, those of {run.directory} {list(held)}"
            )
    right = select(model, benign, batch_size=batch_size).images
    known = np.concatenate([hashes(run.results.images) for run in runs])
    return right.take(~np.isin(hashes(right.images), known))


def fit_detector(
    model: Classifier,
    kind: Features,
    benign: ImageSet,
    *,
    teacher: Run | None = None,
    attacks: Sequence[str] = ("pgd",),
    batch_size: int = 32,
) -> tuple[Detector, Record]:
    """Fit a detector on benign images: every other one is the reference, the rest set the threshold.

    Args:
        model: the classifier.
        kind: of features.
        benign: with labels, those of `unseen`.
        teacher: a run whose attacks teach a logistic head; None for the threshold head.
        attacks: which of them, of `FITTED_ON`.
        batch_size: images at a time.

    Raises:
        ValueError: too few images, or an interpreter that does not fit the network.
    """
    network, (n, *shape) = static_leaves(model), benign.images.shape
    least = (2 if teacher is None else 4) * LEAST_BENIGN
    if n < least:
        raise ValueError(
            f"{least} benign images are needed that the network gets right and the runs do not "
            f"have, there are {n}: {FALSE_POSITIVES:.0%} of a part of them is to be one or more"
        )
    for name in kind.interpreters:
        check_interpreter(model, tuple(shape), INTERPRETERS[name]())
    first, second = (benign.take(np.arange(half, n, 2)) for half in (0, 1))
    reference: Any = ()
    if kind.look is not None and kind.gather is not None:
        seen = _by_batches(partial(_looks, kind, network), first.images, batch_size)
        reference = kind.gather(seen, first.labels, num_classes(model, tuple(shape)))
    features = partial(_features, kind, reference, network)
    known, attacked = [hashes(benign.images)], None
    if teacher is not None:
        known.append(hashes(teacher.results.images))
        made = [
            teacher.results.attacked(name, attack).images
            for name in teacher.interpreters
            for attack in attacks
        ]
        taught: NDArray[Any] = _by_batches(features, np.concatenate(made), batch_size)
        attacked = taught[np.isfinite(taught).all(1)]
    detector = fit(kind, reference, _by_batches(features, second.images, batch_size), attacked)
    taught_by = () if teacher is None else tuple(attacks)
    return detector, Record(tree_fingerprint(network), np.concatenate(known), taught_by)


def judge(
    model: Classifier,
    detector: Detector,
    record: Record,
    run: Run,
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Row]:
    """Show the images of a run to a detector.

    Args:
        model: the classifier.
        detector, record: fitted on other images.
        run: a finished run, blind or adaptive.
        batch_size: images at a time.
        seed: of the bootstrap.

    Returns:
        A row for the benign images of the run, whose `detected` are its false positives, then one
        for each row of the run: `n`; `asr`; `auc` against the benign images; `detected`, share
        above the threshold; `evades`, share below it with the class that the attack wants and a
        map whose IoU with the target map is `CLOSE` or more; `ci`; `roc`, its false and true
        positive rates. `adaptive` says that the run evaded this detector, `fitted` that a logistic
        head was fitted on such attacks.

    Raises:
        ValueError: the detector is of another network, or was fitted on images of the run.
    """
    network, images = static_leaves(model), run.results.images
    check(detector, record, model, images.shape[1:])
    overlap = np.isin(hashes(images), record.seen).sum()
    if overlap:
        raise ValueError(
            f"the detector was fitted on {overlap} of the {len(images)} images of "
            f"{run.directory}: it would be judged on what it knows"
        )
    known: dict[bytes, NDArray[Any]] = {}

    def scores(images: NDArray[Any]) -> NDArray[Any]:
        # noise and the joint attack are the same images for all interpreters
        key = hash_of([images])
        if key not in known:
            known[key] = _by_batches(partial(_scores, detector, network), images, batch_size)
        return known[key]

    prints: Mapping[str, str] = run.summary.get("fingerprints", {})
    head = {
        "detector": detector.kind.name,
        "head": "threshold" if detector.weights is None else "logistic",
        "run": run.directory.name,
        "adaptive": tree_fingerprint(detector) in prints.get("detector", "").split(", "),
    }
    threshold = float(detector.threshold)
    benign = scores(images)
    passed = benign[np.isfinite(benign)] > threshold
    rows: list[Row] = [
        {
            **head,
            "interpreter": None,
            "attack": "benign",
            "n": len(passed),
            **dict.fromkeys(("asr", "auc", "evades")),
            "detected": mean(passed),
            "ci": {"detected": interval(passed)},
        }
    ]
    for made in run.summary["rows"]:
        attacked = run.results.attacked(made["interpreter"], kind_of(made))
        found = scores(attacked.images)
        good = np.isfinite(found) & np.isfinite(benign) & np.isfinite(attacked.map_l1)
        success, close = attacked.success[good], attacked.map_iou75[good] >= CLOSE
        detected = found[good] > threshold
        shares = {"asr": success, "detected": detected, "evades": success & close & ~detected}
        area = roc_auc(benign[good], found[good], seed=seed)
        ends = {"auc": area["ci"]} | {key: interval(values) for key, values in shares.items()}
        rows.append(
            {
                **head,
                **{key: made[key] for key in ("interpreter", "attack", "joint") if key in made},
                "n": int(good.sum()),
                **{key: mean(values) for key, values in shares.items()},
                "auc": area["auc"],
                "ci": {key: pair for key, pair in ends.items() if pair is not None},
                "roc": roc(benign[good], found[good]),
                "fitted": kind_of(made) in record.attacks,
            }
        )
    return rows


def roc(benign: NDArray[Any], attacked: NDArray[Any]) -> dict[str, list[float]]:
    """Return false and true positive rates over all thresholds, thinned to `POINTS`."""
    thresholds = np.unique(np.concatenate([benign, attacked, [np.inf, -np.inf]]))[::-1]
    places = np.linspace(0, len(thresholds) - 1, min(len(thresholds), POINTS)).round().astype(int)
    return {
        name: [round(float((values >= t).mean()), 4) for t in thresholds[places]]
        for name, values in (("false", benign), ("true", attacked))
    }
