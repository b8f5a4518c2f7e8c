"""Transfer: adversarial inputs made against one interpreter or network, shown to another.

The inputs are those of a finished run; nothing is attacked. One set of images is held at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adv2_jax import metrics
from adv2_jax.attacks import explain
from adv2_jax.files import Headers, intact, read_summary, restored, write_summary
from adv2_jax.identity import tree_fingerprint
from adv2_jax.interpreters import Interpreter
from adv2_jax.presets import from_dict
from adv2_jax.runs import schema
from adv2_jax.runs.run import interpreter_of
from adv2_jax.runs.schema import (
    ATTACKS,
    CONTROL,
    JOINT,
    Aim,
    Attacked,
    Evaluated,
    Images,
    Measures,
    Results,
    Row,
    Stored,
    interval,
    mean,
    measure,
    results_path,
    row,
)
from adv2_jax.types import Classifier


class Run(NamedTuple):
    """A finished run: its directory, summary, interpreters by name, and arrays, read when asked."""

    directory: Path
    summary: dict[str, Any]
    interpreters: Mapping[str, Interpreter]
    results: Results

    @property
    def sources(self) -> list[str]:
        """Return the names of `inputs`: benign, `plain`, and ADV² by the interpreter it fools."""
        return ["benign", *self.plain, *self.interpreters, *self._all_having(JOINT)]

    @property
    def plain(self) -> list[str]:
        """Return what knows of no interpreter: noise, where the run has it, and plain PGD."""
        return self._all_having(CONTROL, "pgd")

    def _all_having(self, *attacks: str) -> list[str]:
        return [
            name
            for name in attacks
            if all(f"{one}/{name}/images" in self.results.arrays for one in self.interpreters)
        ]

    def pieces(self) -> list["Run"]:
        """Return the run a shard at a time, as runs of fewer images; a run of one file as it is."""
        arrays = self.results.arrays
        if not isinstance(arrays, Stored) or len(arrays.paths) == 1:
            return [self]
        return [self._replace(results=Results(Stored(path))) for path in arrays.paths]

    def inputs(self, interpreter: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield each source, its images uint8 [N, H, W, 3], and their classes [N] to be explained.

        The classes are the labels of benign images, and the targets of others, or what they are
        taken for under the goal "untargeted". Plain PGD has the budget of the interpreter that is
        asked for: interpreters need not share its images.
        """
        results = self.results
        yield "benign", results.images, results.labels
        made = [(name, interpreter, name) for name in self.plain]
        made += [(name, name, "adv2") for name in self.interpreters]
        made += [(name, interpreter, name) for name in self._all_having(JOINT)]
        for source, *names in made:
            yield source, results.attacked(*names).images, results.classes(*names)


def load_run(directory: Path) -> Run:
    """Return a finished run; its interpreters are made again from its rows, or from their files.

    Raises:
        ValueError: names the directory and what is wrong with it.
    """
    summary = read_summary(directory)
    if not summary.get("rows"):
        raise ValueError(f"{directory} holds no attack: its summary.json has no rows")
    with intact(directory / "summary.json"):
        rows = [row for row in summary["rows"] if not row.get("joint")]
        presets = {row["interpreter"]: row["preset"] for row in rows}  # ADV² comes last
        # a row says how to make one of the package again; one of a file is made by the file
        asked = map(interpreter_of, summary["config"].get("interpreter", ()))
        interpreters = {one.name: one for one in asked if not isinstance(one, str)}
        for name in presets.keys() - interpreters.keys():
            preset = from_dict(name, {"interpreter": presets[name]["interpreter"]})
            assert preset.interpreter is not None
            interpreters[name] = preset.interpreter
        interpreters = {name: interpreters[name] for name in presets}  # in the order of the rows
    with intact(path := results_path(directory)):
        arrays = Stored(path)
        results = Results(arrays)
        _check_arrays(arrays.headers, interpreters, any(map(results.explained, interpreters)))
    return Run(directory, summary, interpreters, results)


def _check_arrays(headers: Headers, interpreters: Iterable[str], keeps_maps: bool) -> None:
    """Refuse results that lack an array of a transfer, or have one of another shape or type.

    Raises:
        KeyError: names an array that is not there.
        ValueError: names an array with its type and shape.
    """
    # headers alone: the arrays may be gigabytes, and are read when asked for
    n, *size, _ = headers["images"][0]
    # kind of type, and shape; maps may be of any size
    pictures: Any = ("u", (n, *size, 3))
    classes: Any = ("i", (n,))
    maps: Any = ("f", (n, None, None))
    expected = Images.named(images=pictures, labels=classes, targets=classes)
    for name in interpreters:
        if keeps_maps:
            expected |= Aim.named(f"{name}/", target_maps=maps)
        others = [one for one in (CONTROL, JOINT) if f"{name}/{one}/images" in headers]
        for attack in (*others, *ATTACKS):
            expected |= Attacked.named(f"{name}/{attack}/", images=pictures)
    for name, (kind, wanted) in expected.items():
        shape, dtype = headers[name]
        fits = len(shape) == len(wanted) and min(shape) > 0 and dtype.kind == kind
        if not (fits and all(b in (a, None) for a, b in zip(shape, wanted, strict=True))):
            raise ValueError(f"{name}: {dtype} {list(shape)}")


def check_network(run: Run, model: Classifier) -> None:
    """Refuse another network than that of the run.

    Raises:
        ValueError: says what the run was made with.
    """
    # a summary without fingerprints is of any network
    with intact(run.directory / "summary.json"):
        made = run.summary.get("fingerprints", {}).get("network")
        config = dict(run.summary.get("config", {}))
    held = tree_fingerprint(model)
    if made not in (None, held):
        options = ", ".join(f"{key} {config.get(key)!r}" for key in ("model", "weights", "masker"))
        raise ValueError(
            f"the network holds {held}, that of {run.directory} held {made}: "
            f"it was made with {options}"
        )


def transfer_matrix(run: Run, model: Classifier, *, batch_size: int = 32) -> dict[str, Any]:
    """Explain images made against one interpreter by another, for all pairs.

    Args:
        run: a finished run.
        model: its network.
        batch_size: images at a time.

    Returns:
        `interpreters`; `sources`: benign, noise, pgd, the interpreters and joint; `map_l1` and
        `map_iou75`: a row for each source, a column for each interpreter: how far its maps of the
        source's images are, in the mean, from what the run wanted it to show (its benign maps where
        the attack hides). Benign images are explained for their label, others for their target
        class.

    Raises:
        ValueError: the run kept no maps.
    """
    if not any(map(run.results.explained, run.interpreters)):
        raise ValueError(
            f"{run.directory} holds no maps to compare with: it was made with --keep adversarial"
        )
    matrix: dict[str, Any] = {"interpreters": list(run.interpreters), "sources": run.sources}
    matrix |= {one.key: [[] for _ in run.sources] for one in schema.MEASURES if one.paired}
    for name, interpreter in run.interpreters.items():
        measures: list[list[Measures]] = [[] for _ in run.sources]
        for piece in run.pieces():
            target_maps = piece.results.aim(name).target_maps
            for of_source, (_, images, classes) in zip(measures, piece.inputs(name), strict=True):
                _, maps = explain(
                    model,
                    images,
                    classes,
                    interpreter=interpreter,
                    batch_size=batch_size,
                    all_may_fail=True,
                )
                of_source.append(measure(Evaluated(maps=maps, target_maps=target_maps)))
        for i, of_source in enumerate(measures):
            for key, distance in _distances(_join(of_source)).items():
                matrix[key][i].append(distance)
    return matrix


def transfer_to(
    run: Run, model: Classifier, name: str, *, interpreters: Sequence[str], batch_size: int = 32
) -> list[Row]:
    """Show images made against the network of a run to another network and its interpreters.

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
    rows: list[Row] = []
    untargeted = any(name.endswith("/classes") for name in run.results.arrays)
    for column in interpreters:
        options: dict[str, Any] = {
            "interpreter": run.interpreters[column],
            "batch_size": batch_size,
        }
        measures: dict[str, list[Measures]] = {source: [] for source in run.sources}
        for piece in run.pieces():
            results = piece.results
            # its own maps: another network never showed those of the run
            logits, benign_maps = explain(model, results.images, results.labels, **options)
            right = logits.argmax(-1) == results.labels
            if not right.any():
                continue
            for source, images, classes in piece.inputs(column):
                logits, maps = explain(
                    model, images[right], classes[right], all_may_fail=True, **options
                )
                # only where it is right while benign: an error it makes anyway is no success of
                # the attack
                hits = metrics.success(logits, results.targets[right])
                if untargeted:  # these are the labels
                    hits = ~hits
                numbers = measure(Evaluated(maps=maps, target_maps=benign_maps[right]))
                measures[source].append({**numbers, "hits": hits})
        for source, of_source in measures.items():
            if not of_source:
                raise ValueError(
                    f"{name} gets none of the {len(run.results.labels)} images of {run.directory} "
                    "right: nothing can transfer to it"
                )
            numbers = _join(of_source)
            hits = numbers.pop("hits")
            rows.append(
                {
                    "model": name,
                    "source": source,
                    "n": len(hits),
                    "asr": mean(hits),
                    "interpreter": column,
                    **_distances(numbers),
                    "ci": {"asr": interval(hits)},
                }
            )
    return rows


def _join(measures: Sequence[Measures]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([one[key] for one in measures]) for key in measures[0]}


def _distances(measures: Measures) -> dict[str, float | None]:
    """Return the mean of each distance over the images whose maps are finite, by key."""
    numbers = row(measures)
    return {one.key: numbers[one.key] for one in schema.MEASURES if one.paired}


def add(
    run: Run, *, publish: Callable[[Path], object] = lambda directory: None, **entries: Any
) -> None:
    """Add entries to the summary of a run, and publish it; if that fails, it stays as it was."""
    # to the byte: what was published of it stays true
    with restored(run.directory / "summary.json"):
        write_summary(run.directory, run.summary | entries)
        with intact(run.directory):
            publish(run.directory)
