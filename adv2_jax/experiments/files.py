"""The directory of a run: `summary.json`, `results.npz`, `report.html`."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adv2_jax.files import SCHEMA, atomic


@contextlib.contextmanager
def output_directory(path: str) -> Iterator[Path]:
    """A directory that can be written to; made if it is not there, and unmade if nothing was written to it.

    Raises:
        ValueError: names the directory and why it cannot be written to.
    """
    directory = Path(path)
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        _remove_empty(new)
        raise ValueError(f"cannot write to --out {path}: {error.strerror}") from None
    try:
        yield directory
    except BaseException:
        _remove_empty(new)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` atomically."""
    with atomic(directory / "summary.json", "w") as file:
        json.dump({"schema": SCHEMA, **summary}, file, indent=2, allow_nan=False)
        file.write("\n")


def read_summary(directory: Path) -> dict[str, Any]:
    """The `summary.json` of a finished run.

    Raises:
        ValueError: names the directory that holds none, or one of another schema.
    """
    path = directory / "summary.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no finished run: there is no summary.json")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {summary.get('schema')}, this is adv2 of schema {SCHEMA}")
    return summary
