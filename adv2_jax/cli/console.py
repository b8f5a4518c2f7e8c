"""Output on the terminal: one-line warnings, tables, progress bars."""

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

HALF = 1000  # characters at each end of a message; what lies between is cut
PLUGIN = re.compile(r"jax[-_](cuda|rocm)\d*[-_]plugin|libtpu", re.IGNORECASE)
log = logging.getLogger(__name__)


def one_line(text: str) -> str:
    """Return a text as one printable line of some 2 x `HALF` characters at most.

    File names and the errors of other packages may hold any character, and be of any length.
    """
    # a control sequence in a file name would reach the terminal
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))
    return shown if len(shown) <= 2 * HALF else f"{shown[:HALF]} … {shown[-HALF:]}"


class OneLine(logging.Formatter):
    """Format a warning like an error message of `adv2`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return f"adv2: {one_line(record.getMessage())}"


@contextlib.contextmanager
def warnings_on_stderr(quiet: bool) -> Iterator[None]:
    """Print the warnings of the package; none if `quiet`, only errors."""
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
    """Warn when JAX has fallen back to the CPU.

    JAX skips a plugin without a word if its version does not fit.

    Raises:
        ValueError: JAX has no device of the platform that `JAX_PLATFORMS` asks for.
    """
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
        f"{package.name} {package.version}"
        for package in distributions()
        if PLUGIN.match(package.name or "")
    ]
    if plugins:
        log.warning(
            "JAX %s runs on the CPU although %s is installed: is there a device, and do the "
            "versions fit? (not said if %s)",
            jax.__version__,
            ", ".join(plugins),
            "JAX_PLATFORMS=cpu",
        )


def print_sheet(sheet: Sheet) -> None:
    """Print a table."""
    # the widest table fits a terminal of 80 columns only without padding at the edges
    table = Table(title=sheet.title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in sheet.headings:
        table.add_column(heading, justify="left" if heading in NAMES else "right")
    for line in sheet.lines:
        table.add_row(*line)
    Console().print(table)


class Rate(ProgressColumn):
    """Column of a progress bar: images a second, where the number of images is known."""

    def render(self, task: Task) -> Text:
        """Return the text of one bar: the share of the steps done, in images."""
        speed, images = task.finished_speed or task.speed, task.fields["images"]
        return Text(
            f"{speed * images / task.total:.2f} images/s" if speed and images and task.total else ""
        )


@contextlib.contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Any]:
    """Yield a function that starts a progress bar; bars are drawn on a terminal only.

    Yields:
        (title, steps, done=0, images=None) -> function called with the steps newly done.
    """
    # stdout is for results, which may go to a file
    console = Console(stderr=True)
    console.quiet = quiet or not console.is_terminal
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        Rate(),
    )
    with Progress(*columns, console=console, disable=console.quiet) as bars:

        def start(title: str, steps: int, done: int = 0, images: int | None = None) -> OnStep:
            task = bars.add_task(title, total=steps, completed=done, images=images)
            return lambda new: bars.advance(task, new)

        yield start
