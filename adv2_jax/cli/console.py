"""What goes to the terminal: one-line warnings, tables, bars."""

import contextlib
import logging
import re
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from adv2_jax.descent import OnStep
from adv2_jax.errors import first_line
from adv2_jax.runs.tables import NAMES, Sheet

LONGEST = 2000  # characters of a message
PLUGIN = re.compile(r"jax[-_](cuda|rocm)\d*[-_]plugin|libtpu", re.IGNORECASE)
log = logging.getLogger(__name__)


def one_line(text: str) -> str:
    """A text as one line that a terminal can show: names in it may hold anything, and be of any length."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} … {shown[-LONGEST // 2 :]}"


class OneLine(logging.Formatter):
    """A warning as a line of the command's own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return f"adv2: {one_line(record.getMessage())}"


@contextlib.contextmanager
def warnings_on_stderr(quiet: bool) -> Iterator[None]:
    """Prints what the package logs."""
    logger, handler = logging.getLogger("adv2_jax"), logging.StreamHandler()
    handler.setFormatter(OneLine())
    handler.setLevel(logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False  # other handlers would print it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def check_devices() -> None:
    """Says so when JAX has fallen back to the CPU: a plugin of another version than its own is passed over in silence."""
    wanted = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"JAX has no device of JAX_PLATFORMS={wanted}: {first_line(error)}"
        ) from None
    if backend != "cpu" or wanted.startswith("cpu"):
        return
    plugins = [
        f"{found.name} {found.version}"
        for found in distributions()
        if PLUGIN.match(found.name or "")
    ]
    if plugins:
        log.warning(
            "JAX %s runs on the CPU although %s is installed: is there a device, and do the versions fit? (not said if %s)",
            jax.__version__,
            ", ".join(plugins),
            "JAX_PLATFORMS=cpu",
        )


def print_sheet(sheet: Sheet) -> None:
    """Print a table."""
    # as narrow as a terminal of 80 columns
    table = Table(title=sheet.title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in sheet.headings:
        table.add_column(heading, justify="left" if heading in NAMES else "right")
    for line in sheet.lines:
        table.add_row(*line)
    Console().print(table)


class Rate(ProgressColumn):
    """Images a second, from the steps a second of a task that knows its images."""

    def render(self, task: Task) -> Text:
        """The column of one bar."""
        speed, images = task.finished_speed or task.speed, task.fields["images"]
        return Text(
            f"{speed * images / task.total:.2f} images/s" if speed and images and task.total else ""
        )


@contextlib.contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Any]:
    """(title, steps) -> function called with the steps newly done; a bar each on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda title, steps, **more: lambda new: None
        return
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        Rate(),
    )
    with Progress(*columns, console=console) as bars:

        def start(title: str, steps: int, done: int = 0, images: int | None = None) -> OnStep:
            task = bars.add_task(title, total=steps, completed=done, images=images)
            return lambda new: bars.advance(task, new)

        yield start
