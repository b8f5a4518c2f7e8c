"""The finished parts of a run that is under way, so that whoever interrupts it loses one of them
and no more.

DIR/batches/settings.json says what the run was asked for, DIR/batches/INTERPRETER.ATTACK/00000.npz
is a finished part, and DIR/log.jsonl has a line for each. All are written atomically, and removed,
but for the log, when the run is over.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adv2_jax.files import Stream, atomic, intact, read_arrays, stored, write_streams
from adv2_jax.identity import changes
from adv2_jax.runs.measures import mean

Arrays = Mapping[str, NDArray[Any]]
FOLDER = "batches"
UNFINISHED = (
    f"{FOLDER}/settings.json"  # is there from the first finished part until the run is over
)
MEASURE = "measure/"  # and a name: one number an image
SECONDS = "measure/seconds"  # of the part
SHARED = (
    "_steps"  # arrays of such names have no image axis: those of the first part are those of all
)
ROWS = 64  # of a whole array, written at a time


class Part(NamedTuple):
    """A batch of images under one attack, as one interpreter sees it."""

    interpreter: str
    attack: str
    batch: int


def is_unfinished(directory: Path) -> bool:
    """Whether a directory holds a run that was begun, and is not over."""
    return (directory / UNFINISHED).exists()


class Store:
    """The parts of one run. What is held in memory is one array of one part, whatever their number.

    Args:
        directory: of the run.
        settings: what was asked for, by name, as JSON reads it; a run goes on with equal settings
            only.
        parts: all that the run is made of, in the order of the results: the batches of a row follow
            each other.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], parts: Sequence[Part]):
        self.directory, self.parts = directory, parts
        self._folder, self._log = directory / FOLDER, directory / "log.jsonl"
        self._known = directory / UNFINISHED
        self._settings = dict(settings)

    def begin(self, *, resume: bool) -> None:
        """Check that there is a run to go on with, or none in the way. Both must be said, so that
        no slip costs a run.

        Raises:
            ValueError: names the directory: it holds an unfinished run although `resume` is False,
                none although it is True, or one with other settings (each is named with what it was
                and is).
        """
        if resume != is_unfinished(self.directory):
            raise ValueError(
                f"nothing to resume: {self.directory} holds no unfinished run"
                if resume
                else f"{self.directory} holds an unfinished run: go on with it (--resume), or remove {self._folder} to start anew"
            )
        if not resume:
            return
        with intact(self._known):
            was = dict(json.loads(self._known.read_text(encoding="utf-8")))
        if changed := changes(was, self._settings):
            raise ValueError(f"cannot resume {self.directory} with other settings: {changed}")

    def write_log(self) -> None:
        """Write the log of a run that is gone on with anew: its last line may be missing or cut short."""
        lines = [self._line(part) for part in self.parts if self.has(part)]
        with self._writing(self._log), atomic(self._log, "w") as log:
            log.writelines(lines)

    def has(self, part: Part) -> bool:
        """Whether a part is finished."""
        return self._path(part).exists()

    def save(self, part: Part, arrays: Arrays) -> None:
        """Keep a finished part, and log it.

        Args:
            part: which.
            arrays: those of the results, by their names below the interpreter's; `measure/...`, and
                among them the seconds.

        Raises:
            ValueError: names the file and why it cannot be written.
        """
        path = self._path(part)
        with self._writing(path):
            if not self._known.exists():
                self._start()
            path.parent.mkdir(exist_ok=True)
            with atomic(path) as file:
                np.savez(file, **dict[str, Any](arrays))
            with self._log.open("a", encoding="utf-8") as log:
                log.write(self._line(part))

    def _start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._log.unlink(missing_ok=True)
        with atomic(self._known, "w") as file:
            json.dump(self._settings, file, indent=2)

    def measures(self, interpreter: str, attack: str) -> dict[str, NDArray[Any]]:
        """Numbers [N] by name, one an image; `seconds` has one a part."""
        parts = [self._measures(part) for part in self.parts if part[:2] == (interpreter, attack)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def write_results(self, own: Arrays) -> None:
        """Write results.npz: the arrays of all images, then those of the parts.

        Raises:
            ValueError: names the file and why it cannot be written.
        """
        made, results = self._folder / "results.npz", self.directory / "results.npz"
        with self._writing(results):
            write_streams(made, self._streams(own))
            os.replace(made, results)

    def remove(self) -> None:
        """Remove the parts: the run is over. Without its settings what a kill leaves of them is no run any more."""
        # there may be none, or a file of somebody's in place of the folder
        with contextlib.suppress(OSError):
            self._known.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)

    def resume_hint(self) -> str:
        """Say how to go on, for whoever is interrupted; remove what was begun, and say nothing, if no part is finished."""
        n = sum(map(self.has, self.parts))
        if n == 0:
            self.remove()
            return ""
        return f"; {n} of {len(self.parts)} parts are kept, --resume goes on from them"

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.interpreter}.{part.attack}" / f"{part.batch:05d}.npz"

    def _measures(self, part: Part) -> dict[str, NDArray[Any]]:
        path = self._path(part)
        found = read_arrays(path, lambda name: name.startswith(MEASURE))
        with intact(path):
            for name, values in found.items():
                shape = (1,) if name == SECONDS else found[f"{MEASURE}asr"].shape
                if values.shape != shape or len(shape) != 1 or values.dtype.kind not in "bf":
                    raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
        return {name.removeprefix(MEASURE): values for name, values in found.items()}

    def _line(self, part: Part) -> str:
        found = self._measures(part)
        with intact(self._path(part)):
            good = ~found["failed"]
            numbers = {name: mean(found[name][good]) for name in ("asr", "map_l1")} | {
                "seconds": mean(found["seconds"])
            }
        head = {
            "batch": part.batch,
            "interpreter": part.interpreter,
            "attack": part.attack,
            "n": int(good.sum()),
        }
        rounded = {
            name: None if value is None else round(value, 6) for name, value in numbers.items()
        }
        return json.dumps(head | {"failed": int((~good).sum())} | rounded) + "\n"

    def _streams(self, own: Arrays) -> Iterator[tuple[str, Stream]]:
        for name, values in own.items():
            yield (
                name,
                Stream(
                    values.shape,
                    values.dtype,
                    (values[i : i + ROWS] for i in range(0, len(values), ROWS)),
                ),
            )
        for (interpreter, _), parts in groupby(self.parts, key=lambda part: part[:2]):
            paths = [self._path(part) for part in parts]
            headers = [stored(path) for path in paths]
            for name, (shape, dtype) in headers[0].items():
                if name.startswith(MEASURE):
                    continue
                having = [i for i, header in enumerate(headers) if name in header][
                    : 1 if name.endswith(SHARED) else None
                ]
                for i in having:
                    held, kind = headers[i][name]
                    if not held or (held[1:], kind) != (shape[1:], dtype):
                        raise ValueError(
                            f"cannot read {paths[i]}: {name} is {kind} {list(held)}, before {dtype} {list(shape)}"
                        )
                n = sum(headers[i][name][0][0] for i in having)
                yield (
                    f"{interpreter}/{name}",
                    Stream((n, *shape[1:]), dtype, _blocks([paths[i] for i in having], name)),
                )

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Says what cannot be written, and leaves no folder of parts without a part."""
        try:
            yield
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}{self.resume_hint()}") from None


def _blocks(paths: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    for path in paths:
        yield read_arrays(path, name.__eq__)[name]
