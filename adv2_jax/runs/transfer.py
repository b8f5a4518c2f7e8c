"""Do adversarial inputs made against one interpreter, or one network, fool another?

Both questions are put to a finished run: its images are looked at, nothing is attacked. One set of
images is held at a time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from adv2_jax import metrics
from adv2_jax.attacks import explain
from adv2_jax.files import Headers, atomic, intact, read_arrays, read_summary, stored, write_summary
from adv2_jax.identity import tree_fingerprint
from adv2_jax.interpreters import Interpreter
from adv2_jax.names import ATTACKS
from adv2_jax.presets import from_dict
from adv2_jax.runs.measures import Row, mean
from adv2_jax.runs.statistics import intervals
from adv2_jax.runs.task import interpreter_of
from adv2_jax.types import Classifier

MEASURES = {"map_l1": metrics.map_l1, "map_iou75": metrics.iou_quantile}


class Run(NamedTuple):
    """A finished run: its directory, summary, interpreters by name, and `labels`, `targets` [N]."""

    directory: Path
    summary: dict[str, Any]
    interpreters: Mapping[str, Interpreter]
    labels: np.ndarray
    targets: np.ndarray

    @property
    def sources(self) -> list[str]:
        """Whose images there are: the benign ones, those of plain PGD, and those of ADV² against each interpreter."""
        return ["benign", "pgd", *self.interpreters]

    def array(self, name: str) -> np.ndarray:
        """An array of the results."""
        with intact(path := self.directory / "results.npz"):
            return read_arrays(path, name.__eq__)[name]

    def images(self, source: str, interpreter: str) -> np.ndarray:
        """uint8 [N, H, W, 3] of a source; plain PGD as it was set against an interpreter, by its budget."""
        return self.array(
            {"benign": "images", "pgd": f"{interpreter}/pgd/images"}.get(
                source, f"{source}/adv2/images"
            )
        )

    def classes(self, source: str) -> np.ndarray:
        """[N], the classes that maps are drawn for: the labels of benign images, the targets of others."""
        return self.labels if source == "benign" else self.targets


def load_run(directory: Path) -> Run:
    """A finished run, with its interpreters as its preset has them, and those of files made again.

    Raises:
        ValueError: names the directory and what is wrong with it.
    """
    summary = read_summary(directory)
    with intact(directory / "summary.json"):
        names = dict.fromkeys(row["interpreter"] for row in summary.get("rows", []))
    if not names:
        raise ValueError(f"{directory} holds no attack: its summary.json has no rows")
    with intact(directory / "summary.json"):
        asked = map(interpreter_of, summary["config"].get("interpreter", ()))
        own = {one.name: one for one in asked if not isinstance(one, str)}
        made = {
            row["interpreter"]: row["preset"]["interpreter"]
            for row in summary["rows"]
            if row["attack"] == "adv2"
        }
        known = {
            name: own[name]
            if name in own
            else from_dict(name, {"interpreter": made[name]}).interpreter
            for name in names
        }
        interpreters = {
            name: interpreter for name, interpreter in known.items() if interpreter is not None
        }
    with intact(path := directory / "results.npz"):
        _check_arrays(stored(path), interpreters)
        classes = read_arrays(path, {"labels", "targets"}.__contains__)
    return Run(directory, summary, interpreters, classes["labels"], classes["targets"])


def _check_arrays(found: Headers, interpreters: Iterable[str]) -> None:
    """Refuse results without the arrays that are looked at, or of which one does not go with the images."""
    n, *size, _ = found["images"][0]
    pictures = [
        "images",
        *(f"{name}/{attack}/images" for name in interpreters for attack in ATTACKS),
    ]
    maps = [f"{name}/target_maps" for name in interpreters]
    for names, kinds, shape in (
        (pictures, "u", (n, *size, 3)),
        (["labels", "targets"], "i", (n,)),
        (maps, "f", (n, None, None)),
    ):
        for name in names:
            held, dtype = found[name]
            fits = len(held) == len(shape) and all(
                b in (a, None) for a, b in zip(held, shape, strict=True)
            )
            if not (fits and dtype.kind in kinds and min(held) > 0):
                raise ValueError(f"{name} is {dtype} {list(held)}")


def check_network(run: Run, model: Classifier) -> None:
    """Refuse another network than that of the run.

    Raises:
        ValueError: says what the run was made with.
    """
    with intact(run.directory / "summary.json"):
        made, config = (
            run.summary.get("fingerprints", {}).get("network"),
            dict(run.summary.get("config", {})),
        )
    if made not in (None, found := tree_fingerprint(model)):
        raise ValueError(
            f"the network holds {found}, that of {run.directory} held {made}: it was made with model {config.get('model')!r}, "
            f"weights {config.get('weights')!r}, masker {config.get('masker')!r}"
        )


def transfer_matrix(run: Run, model: Classifier, *, batch_size: int = 32) -> dict[str, Any]:
    """Images made against one interpreter, explained by another, for all pairs.

    Args:
        run: a finished run.
        model: its network.
        batch_size: images at a time.

    Returns:
        `interpreters`; `sources`: benign, pgd, and the interpreters; `map_l1` and `map_iou75`: a
        row for each source, a column for each interpreter: how far its maps of the source's images
        are, in the mean, from what the run wanted it to show (its benign maps where the attack
        hides). Benign images are explained for their label, others for their target class.
    """
    found: dict[str, list[list[float | None]]] = {
        name: [[] for _ in run.sources] for name in MEASURES
    }
    for column, interpreter in run.interpreters.items():
        wanted = run.array(f"{column}/target_maps")
        for i, source in enumerate(run.sources):
            images = run.images(source, column)
            classes = run.classes(source)
            _, maps = explain(
                model,
                images,
                classes,
                interpreter=interpreter,
                batch_size=batch_size,
                all_may_fail=True,
            )
            for name, measure in MEASURES.items():
                found[name][i].append(_mean(measure(maps, wanted)))
    return {"interpreters": list(run.interpreters), "sources": run.sources, **found}


def transfer_to(
    run: Run, model: Classifier, name: str, *, interpreters: Sequence[str], batch_size: int = 32
) -> list[Row]:
    """Images made against the network of a run, seen by another network and the interpreters on it.

    Args:
        run: a finished run.
        model: the other network.
        name: of it, for the rows.
        interpreters: those of the run that it can be explained by.
        batch_size: images at a time.

    Returns:
        a row for each source and interpreter: `n`, the images that the other network gets right
        while they are benign, of these `asr`, the share it takes for their target class, and
        `map_l1`, `map_iou75`, how far its maps are from its own benign maps.

    Raises:
        ValueError: if the other network gets no image right, or cannot take the images.
    """
    rows = []
    for column in interpreters:
        interpreter = run.interpreters[column]
        logits, wanted = explain(
            model, run.array("images"), run.labels, interpreter=interpreter, batch_size=batch_size
        )
        right = logits.argmax(-1) == run.labels
        if not right.any():
            raise ValueError(
                f"{name} gets none of the {len(right)} images of {run.directory} right: nothing can transfer to it"
            )
        for source in run.sources:
            images, classes = run.images(source, column)[right], run.classes(source)[right]
            logits, maps = explain(
                model,
                images,
                classes,
                interpreter=interpreter,
                batch_size=batch_size,
                all_may_fail=True,
            )
            hits = np.asarray(metrics.success(logits, run.targets[right]))
            head = {
                "model": name,
                "source": source,
                "n": int(right.sum()),
                "asr": mean(hits),
                "interpreter": column,
            }
            means = {key: _mean(measure(maps, wanted[right])) for key, measure in MEASURES.items()}
            rows.append(head | means | {"ci": intervals({"asr": hits})})
    return rows


def _mean(values: ArrayLike) -> float | None:
    """The mean over the images that have a number: a map that is not finite has none."""
    numbers = np.asarray(values)
    return mean(numbers[np.isfinite(numbers)])


def add(
    run: Run, *, publish: Callable[[Path], object] = lambda directory: None, **found: Any
) -> None:
    """Add what was found to the summary of a run, and publish it. A run that cannot be published stays as it was."""
    summary = run.directory / "summary.json"
    before = summary.read_bytes()
    write_summary(run.directory, run.summary | found)
    try:
        with intact(run.directory):
            publish(run.directory)
    except BaseException:
        with atomic(summary) as file:
            file.write(before)
        raise
