"""The tables of the paper, each by one run and a choice of its columns."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adv2_jax.data import ImageSet
from adv2_jax.files import atomic, intact, read_summary, write_summary
from adv2_jax.identity import changes, environment
from adv2_jax.names import attack_name
from adv2_jax.runs.measures import Row
from adv2_jax.runs.run import Progress, fingerprints, identity, run
from adv2_jax.runs.store import is_unfinished
from adv2_jax.runs.task import Settings
from adv2_jax.runs.transfer import add, load_run, transfer_matrix
from adv2_jax.types import Classifier

DECIMALS = {"gradient_evaluations": 1, "seconds": 1}  # of columns; 3 of the others
WORDS = ("interpreter", "attack", "made against")  # headings of columns without numbers


class Table(NamedTuple):
    """What a table shows.

    Attributes:
        title: above it.
        columns: keys of the run's rows -> headings; none: the transfer matrix.
        threat: name of the threat model of the run.
        target_map: of the run.
    """

    title: str
    columns: Mapping[str, str]
    threat: str = "linf"
    target_map: str = "benign"

    @property
    def run(self) -> str:
        """Name of the run, and of its folder; tables that share it share the work."""
        return f"{self.threat}-{self.target_map}"


TABLES = {
    "effectiveness": Table("Effectiveness by prediction", {"asr": "ASR", "mc": "MC"}),
    "maps": Table(
        "Distance of the maps from the target maps", {"map_l1": "map L1", "map_l2": "map L2"}
    ),
    "iou": Table(
        "Overlap of the maps with the target maps",
        {"map_iou75": "IoU, 75th percentile", "map_iou50": "IoU at .5"},
    ),
    "patch": Table(
        "Random patches as target maps",
        {"asr": "ASR", "map_l1": "map L1", "map_iou75": "IoU, 75th percentile"},
        target_map="patch",
    ),
    "stadv": Table(
        "Attacks that move pixels (StAdv)",
        {"asr": "ASR", "mc": "MC", "map_l1": "map L1", "map_iou75": "IoU, 75th percentile"},
        threat="flow",
    ),
    "transfer": Table(
        "Images made against one interpreter (row), explained by another (column): map L1 (IoU)", {}
    ),
}


ON_ANOTHER = {"asr": "ASR", "map_l1": "map L1", "map_iou75": "IoU, 75th percentile"}


class Sheet(NamedTuple):
    """A table in words: headings, and lines of as many cells."""

    title: str
    headings: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """The table as Markdown."""
        rule = ["---"] * len(self.headings)
        lines = "\n".join(
            f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.lines)
        )
        return f"## {self.title}\n\n{lines}\n"


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
    """Run what a table needs, below a directory, and write `table.md` and `summary.json` there.

    Args:
        name: key of `TABLES`; `settings` are to have its threat model and target map.
        model, image_set, settings, config, limit, progress, publish: as for `run`.
        directory: of the table; the run has a folder in it.
        resume: go on with an unfinished run; one that is finished is taken as it is.

    Returns:
        the table.

    Raises:
        ValueError: as for `run`; or a finished run had other settings.
    """
    table, place = TABLES[name], directory / TABLES[name].run
    place.mkdir(exist_ok=True)
    if not (resume and _is_finished(place, identity(config, fingerprints(model, image_set)))):
        unfinished = resume and is_unfinished(place)
        run(
            model,
            image_set,
            settings,
            place,
            limit=limit,
            config=config,
            resume=unfinished,
            progress=progress,
            publish=publish,
        )
    summary = read_summary(place)
    if table.columns:
        with intact(place / "summary.json"):
            sheet = by_rows(table.title, table.columns, summary["rows"])
    else:
        finished = load_run(place)
        summary["transfer"] = transfer_matrix(finished, model, batch_size=settings.batch_size)
        add(finished, publish=publish, transfer=summary["transfer"])
        sheet = by_matrix(table.title, summary["transfer"])
    shown: dict[str, Any] = {
        key: summary[key] for key in ("counts", "rows", "paired", "transfer") if key in summary
    }
    with atomic(directory / "table.md", "w") as file:
        file.write(sheet.markdown())
    head = {"table": name, "run": table.run, "config": dict(config), "environment": environment()}
    write_summary(directory, head | shown)
    return sheet


def _is_finished(directory: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a directory holds a finished run, and refuses one of other settings."""
    if is_unfinished(directory) or not (directory / "summary.json").exists():
        return False
    summary = read_summary(directory)
    with intact(directory / "summary.json"):
        was = identity(summary["config"], summary["fingerprints"])
    if changed := changes(was, asked):
        raise ValueError(f"{directory} holds a run with other settings: {changed}")
    return True


def by_rows(
    title: str, columns: Mapping[str, str], rows: Sequence[Row], *, spread: bool = True
) -> Sheet:
    """A line for each row of a run; means with their intervals if `spread`."""
    lines = [
        [row["interpreter"], attack_name(row["attack"], row["threat"]), str(row["n"])]
        + [_number(row, key, spread) for key in columns]
        for row in rows
    ]
    return Sheet(title, ["interpreter", "attack", "n", *columns.values()], lines)


def _number(row: Row, key: str, spread: bool) -> str:
    ends = row.get("ci", {}).get(key) if spread else None
    decimals = DECIMALS.get(key, 3)
    return _cell(row[key], decimals) + (
        "" if ends is None else f" [{ends[0]:.{decimals}f}, {ends[1]:.{decimals}f}]"
    )


def _cell(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def by_matrix(title: str, matrix: Mapping[str, Any]) -> Sheet:
    """A line for each source of images, a column for each interpreter."""
    numbers = [
        [f"{_cell(a, 3)} ({_cell(b, 2)})" for a, b in zip(*rows, strict=True)]
        for rows in zip(matrix["map_l1"], matrix["map_iou75"], strict=True)
    ]
    lines = [[source, *cells] for source, cells in zip(matrix["sources"], numbers, strict=True)]
    return Sheet(title, ["made against", *matrix["interpreters"]], lines)


def by_model(title: str, rows: Sequence[Row]) -> Sheet:
    """A line for each source of images and interpreter, on another network."""
    lines = [
        [
            row["source"],
            row["interpreter"],
            str(row["n"]),
            *(_number(row, key, True) for key in ON_ANOTHER),
        ]
        for row in rows
    ]
    return Sheet(title, ["made against", "interpreter", "n", *ON_ANOTHER.values()], lines)
