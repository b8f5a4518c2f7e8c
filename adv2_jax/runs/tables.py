"""The tables of the paper, each by one run and a choice of its columns."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from adv2_jax.data import ImageSet
from adv2_jax.files import atomic, intact, read_summary, write_summary
from adv2_jax.identity import changes, environment
from adv2_jax.runs import schema
from adv2_jax.runs.run import Progress, Settings, fingerprints, identity, run
from adv2_jax.runs.schema import (
    COSTS,
    Row,
    as_text,
    attack_name,
    columns,
    detection_marks,
    row_name,
)
from adv2_jax.runs.store import UNFINISHED
from adv2_jax.runs.transfer import add, load_run, transfer_matrix
from adv2_jax.types import Classifier

NAMES = (
    "interpreter",
    "attack",
    "made against",
    "images",
    "surrogate",
    "network",
    "detector",
    "run",
)  # headings of columns without numbers


class Table(NamedTuple):
    """The run and the columns of a table.

    Attributes:
        title: above the table.
        keys: of the columns; empty for the transfer matrix.
        threat: name of the threat model of the run.
        target_map: of the run.
    """

    title: str
    keys: Sequence[str] = ()
    threat: str = "linf"
    target_map: str = "benign"

    @property
    def run(self) -> str:
        """Return the name of the run, which is that of its folder; tables may share a run."""
        # four of the six tables are columns of one and the same run
        return f"{self.threat}-{self.target_map}"


TABLES = {
    "effectiveness": Table("Effectiveness by prediction", ["asr", "mc"]),
    "maps": Table("Distance of the maps from the target maps", ["map_l1", "map_l2"]),
    "iou": Table(
        "Overlap of the maps with the target maps, at the 75th percentile and at .5",
        ["map_iou75", "map_iou50"],
    ),
    "patch": Table(
        "Random patches as target maps", ["asr", "map_l1", "map_iou75"], target_map="patch"
    ),
    "stadv": Table(
        "Attacks that move pixels (StAdv)", ["asr", "mc", "map_l1", "map_iou75"], threat="flow"
    ),
    "transfer": Table(
        "Images made against one interpreter (row), explained by another (column): map L1 (IoU)"
    ),
}


class Sheet(NamedTuple):
    """A table in words: headings, and lines of as many cells."""

    title: str
    headings: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = ["---"] * len(self.headings)
        lines = "\n".join(
            f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.lines)
        )
        return f"## {self.title}\n\n{lines}\n"


def by_rows(title: str, keys: Sequence[str], rows: Sequence[Row], *, spread: bool = True) -> Sheet:
    """Return a line for each row of a run; means with their intervals if `spread`."""
    names = [[row["interpreter"], row_name(row)] for row in rows]
    return _sheet(title, ["interpreter", "attack"], names, keys, rows, spread)


def after_a_run(rows: Sequence[Row]) -> Sheet:
    """Return the table shown when a run is over: main measures and cost of each row."""
    keys = [one.key for one in schema.MEASURES if not one.page_only]
    title = "PGD against ADV² on the same images"
    return by_rows(title, keys + [one.key for one in COSTS], rows, spread=False)


def by_matrix(title: str, matrix: Mapping[str, Any]) -> Sheet:
    """Return a line for each source of images, a column for each interpreter."""
    numbers = [
        [f"{_number('map_l1', a)} ({_number('map_iou75', b)})" for a, b in zip(*rows, strict=True)]
        for rows in zip(matrix["map_l1"], matrix["map_iou75"], strict=True)
    ]
    lines = [[source, *cells] for source, cells in zip(matrix["sources"], numbers, strict=True)]
    return Sheet(title, ["made against", *matrix["interpreters"]], lines)


def by_model(title: str, rows: Sequence[Row]) -> Sheet:
    """Return a line for each source of images and interpreter, on another network."""
    keys = ["asr", *(one.key for one in schema.MEASURES if one.paired)]
    names = [[row["source"], row["interpreter"]] for row in rows]
    return _sheet(title, ["made against", "interpreter"], names, keys, rows)


def by_network(networks: Sequence[Row], rows: Sequence[Row], *, spread: bool = True) -> Sheet:
    """Return a line for each row of several runs, with the accuracy of its network."""
    keys = ["asr", *(one.key for one in schema.MEASURES if one.paired)]
    accuracy = {one["model"]: as_text(one["accuracy"], 3) for one in networks}
    names = [
        [row["model"], accuracy[row["model"]], row["interpreter"], row_name(row)] for row in rows
    ]
    headings = ["network", "accuracy", "interpreter", "attack"]
    return _sheet("Networks under the same attack", headings, names, keys, rows, spread)


def by_curvature(rows: Sequence[Row]) -> Sheet:
    """Return a line for each set of images, of means."""
    names = [[attack_name(row["images"], None)] for row in rows]
    keys = [one.key for one in schema.CURVATURE]
    title = "Curvature: exact and surrogate Hessian, and the map's Jacobian"
    return _sheet(title, ["images"], names, keys, rows, spread=False)


def by_detection(rows: Sequence[Row]) -> Sheet:
    """Return a line for each detector, run and attack: benign images, noise and what attacks made."""
    names = [
        [
            row["detector"],
            row["run"],
            row["interpreter"] or "",
            row_name(row) + detection_marks(row),
        ]
        for row in rows
    ]
    keys = ["asr", *(one.key for one in schema.DETECTION)]
    headings = ["detector", "run", "interpreter", "attack"]
    return _sheet("Detectors", headings, names, keys, rows, spread=False)


def by_fidelity(fidelity: Mapping[str, Any]) -> Sheet:
    """Return a line for each surrogate: median cosine with the true network, by step."""
    lines = [
        [name, *("-" if one is None else as_text(one, 2) for one in cosines)]
        for name, cosines in zip(fidelity["surrogates"], fidelity["cosine"], strict=True)
    ]
    title = "Cosine of surrogate Hessians with steps of so many pixel values"
    return Sheet(title, ["surrogate", *map(str, map(Fraction, fidelity["steps"]))], lines)


def _sheet(
    title: str,
    headings: Sequence[str],
    names: Sequence[Sequence[str]],
    keys: Sequence[str],
    rows: Sequence[Row],
    spread: bool = True,
) -> Sheet:
    """Return a line for each row: its names, its number of images, and its numbers by key."""
    lines = [
        [*name, str(row["n"]), *(_cell(row, key, spread) for key in keys)]
        for name, row in zip(names, rows, strict=True)
    ]
    return Sheet(title, [*headings, "n", *(columns()[key].heading for key in keys)], lines)


def _cell(row: Row, key: str, spread: bool) -> str:
    ends = row.get("ci", {}).get(key) if spread else None
    shown = _number(key, row[key])
    return shown if ends is None else f"{shown} [{_number(key, ends[0])}, {_number(key, ends[1])}]"


def _number(key: str, value: float | None) -> str:
    # None where no image succeeded, or the measure is not defined: no number, not 0
    return "-" if value is None else as_text(value, columns()[key].decimals)


def make_table(
    name: str,
    model: Classifier,
    image_set: ImageSet,
    settings: Settings,
    directory: Path,
    *,
    config: Mapping[str, Any],
    limit: int | None = None,
    resume: bool = False,
    progress: Progress = lambda images, steps, done: lambda new: None,
    publish: Callable[[Path], object] = lambda directory: None,
) -> Sheet:
    """Make the run that a table needs, and write `table.md` and `summary.json`.

    Args:
        name: key of `TABLES`; `settings` must have its threat model and target map.
        model, image_set, settings, config, limit, progress, publish: as for `run`.
        directory: of the table; the run gets a folder in it.
        resume: go on with an unfinished run; one that is finished is taken as it is.

    Returns:
        The table.

    Raises:
        ValueError: as for `run`; or a finished run had other settings.
    """
    table, folder = TABLES[name], directory / TABLES[name].run
    # tables of one run share the folder: it may be there
    folder.mkdir(exist_ok=True)
    # a run that is made anew has its old summary until it is over: that does not count
    unfinished = (folder / UNFINISHED).exists()
    if resume and not unfinished and (folder / "summary.json").exists():
        _check_settings(folder, identity(config, fingerprints(model, image_set)))
    else:
        run(
            model,
            image_set,
            settings,
            folder,
            limit=limit,
            config=config,
            resume=resume and unfinished,
            progress=progress,
            publish=publish,
        )
    summary = read_summary(folder)
    if table.keys:
        with intact(folder / "summary.json"):
            sheet = by_rows(table.title, table.keys, summary["rows"])
    else:
        # explained maps on images of others cost little against the attacks: computed anew, with no
        # file of its own to be checked
        finished = load_run(folder)
        summary["transfer"] = transfer_matrix(finished, model, batch_size=settings.batch_size)
        add(finished, publish=publish, transfer=summary["transfer"])
        sheet = by_matrix(table.title, summary["transfer"])
    shown: dict[str, Any] = {
        # a copy of the numbers: a table's folder can be read without its run
        key: summary[key]
        for key in ("counts", "rows", "paired", "transfer")
        if key in summary
    }
    with atomic(directory / "table.md", "w") as file:
        file.write(sheet.markdown())
    # the run's own summary has no word of tables, since several may share it
    head = {"table": name, "run": table.run, "config": dict(config), "environment": environment()}
    write_summary(directory, head | shown)
    return sheet


def _check_settings(directory: Path, asked: Mapping[str, Any]) -> None:
    """Refuse a finished run of other settings."""
    summary = read_summary(directory)
    with intact(directory / "summary.json"):
        # the same reduction on both sides: options that change no result may differ
        was = identity(summary["config"], summary["fingerprints"])
    if changed := changes(was, asked):
        raise ValueError(f"{directory} holds a run with other settings: {changed}")
