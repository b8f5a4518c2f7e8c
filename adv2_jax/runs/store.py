"""The finished parts of a run under way, on disk: an interrupt costs one part and no more.

DIR/batches/settings.json says what the run was asked for, DIR/batches/INTERPRETER.ATTACK/00000.npz
is a finished part, and DIR/log.jsonl has a line for each. All are written atomically, and removed,
but for the log, when the run is over. `Parts` serves other work of many parts as well.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adv2_jax.files import (
    Headers,
    Stream,
    atomic,
    intact,
    read_arrays,
    stored,
    write_streams,
    write_summary,
)
from adv2_jax.identity import changes
from adv2_jax.runs import schema
from adv2_jax.runs.schema import INDEX, RESULTS, SHARED, Arrays, row

FOLDER, SETTINGS = "batches", "settings.json"
# exists from the first finished part until the run is over
UNFINISHED = f"{FOLDER}/{SETTINGS}"
CURVATURE_FILES = ("curvature.json", "curvature.npz")  # beside those of a run
MEASURE = "measure/"  # before a key: [B] numbers, one an image of the part
SECONDS = f"{MEASURE}seconds"  # [1], of the part
LATE = 90  # seconds until a file of another host is seen: NFS shows it within a minute
SHARD = 1000  # images; whatever batches and devices are
LARGE = 2 * 10**9  # bytes of arrays that become shards unless --results says otherwise
ROWS = 64  # entries of a whole array that are compressed and written at a time


class Part(NamedTuple):
    """A batch of images under one attack, as one interpreter sees it."""

    interpreter: str
    attack: str
    batch: int


AnyPart = tuple[Any, ...]  # names, the first of them before its arrays, and a number


class Parts:
    """The parts of one run; only one array of one part is held in memory, whatever their number.

    Args:
        directory: of the run.
        settings: what was asked for, by name, as JSON reads it; a run goes on with equal settings
            only.
        parts: all that the run is made of, in the order of the results: those of equal names follow
            each other.
        folder: name of the folder of finished parts.
        results: name of the file that the parts become; without its suffix, of a folder of shards.
        leads: whether this process, of several that share the run, writes the log and the results.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        parts: Sequence[AnyPart],
        *,
        folder: str = FOLDER,
        results: str = RESULTS,
        leads: bool = True,
    ):
        self.directory, self.parts, self._leads = directory, parts, leads
        self._folder, self._results = directory / folder, results
        self._settings_path = self._folder / SETTINGS
        self._settings = dict(settings)
        self._announced = False

    def begin(self, *, resume: bool) -> None:
        """Check that there is a run to resume, or none that a new one would overwrite.

        Starting and resuming are both explicit: a forgotten flag cannot cost a run.

        Raises:
            ValueError: the directory holds an unfinished run although `resume` is False, none
                although it is True, or one with other settings (says what they were and are).
        """
        there = self._settings_path.exists()
        if there and not resume:
            raise ValueError(
                f"{self.directory} holds an unfinished run: "
                f"go on with it (--resume), or remove {self._folder} to start anew"
            )
        if resume and not there:
            raise ValueError(f"nothing to resume: {self.directory} holds no unfinished run")
        if resume:
            with intact(self._settings_path):
                was = dict(json.loads(self._settings_path.read_text(encoding="utf-8")))
            if changed := changes(was, self._settings):
                raise ValueError(f"cannot resume {self.directory} with other settings: {changed}")
            self._announced = True

    def announce(self) -> None:
        """Write what the run was asked for."""
        with self._writing(self._settings_path):
            self._folder.mkdir(exist_ok=True)
            with atomic(self._settings_path, "w") as file:
                json.dump(self._settings, file, indent=2)
        self._announced = True

    def join(self) -> None:
        """Take part in a run that another process has announced.

        Raises:
            ValueError: it has other settings, or is not seen: the directory is not shared.
        """
        until = time.monotonic() + LATE
        while not self._settings_path.exists():
            if time.monotonic() > until:
                raise ValueError(
                    f"{self.directory} is not shared by all processes: process 0 wrote "
                    f"{self._settings_path}, which this one does not see"
                )
            time.sleep(0.2)
        Parts.begin(self, resume=True)

    def has(self, part: AnyPart) -> bool:
        """Return whether a part is finished."""
        return self._path(part).exists()

    def save(self, part: AnyPart, arrays: Arrays) -> None:
        """Write a finished part.

        Args:
            part: which.
            arrays: those of the results, by their names below the part's first name; and
                `measure/...`, which the results are without.

        Raises:
            ValueError: names the file and why it cannot be written.
        """
        if not self._announced:
            self.announce()
        path = self._path(part)
        with self._writing(path):
            # without its parents: a shared directory that vanishes is not made anew elsewhere
            path.parent.mkdir(exist_ok=True)
            with atomic(path) as file:
                np.savez(file, **dict[str, Any](arrays))

    def read(self, names: Sequence[str], wanted: Callable[[str], bool]) -> dict[str, NDArray[Any]]:
        """Return arrays of all parts of these names, joined along the first axis."""
        paths = [self._path(part) for part in self.parts if part[:-1] == tuple(names)]
        parts = [read_arrays(path, wanted) for path in paths]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def write_results(self, whole: Arrays, form: str = "npz") -> None:
        """Write the results: some arrays of the whole run, then those of the parts.

        Args:
            whole: arrays of N images each.
            form: of `schema.FORMS`; "auto" makes shards of what takes more than `LARGE` bytes.

        Raises:
            ValueError: names the file and why it cannot be written.
        """
        headers = {path: stored(path) for path in map(self._path, self.parts)}
        if form == "auto":
            sizes = [one for held in headers.values() for one in held.values()]
            sizes += [(values.shape, values.dtype) for values in whole.values()]
            total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)
            form = "shards" if total > LARGE else "npz"
        n = len(next(iter(whole.values())))
        file = self.directory / self._results
        folder = file.with_suffix("")
        results = folder if form == "shards" else file
        # written in the folder of parts: what a kill leaves of it is removed with the folder
        written = self._folder / results.name
        with self._writing(results):
            if form == "shards":
                self._write_shards(written, whole, headers, n)
                # only a file is replaced in one step; a kill here leaves the parts, and --resume
                if file.exists():
                    self._discard(file)
            else:
                write_streams(written, self._streams(whole, headers, 0, n))
            if (folder / INDEX).exists():  # else it is a folder of somebody's
                self._discard(folder)
            os.replace(written, results)

    def _write_shards(
        self, folder: Path, whole: Arrays, headers: Mapping[Path, Headers], n: int
    ) -> None:
        """Write a folder of `.npz`, of `SHARD` of the n images each, and an index."""
        shutil.rmtree(folder, ignore_errors=True)  # of a kill
        folder.mkdir()
        shards: list[dict[str, Any]] = []
        for start in range(0, n, SHARD):
            name, stop = f"{len(shards):05d}.npz", min(start + SHARD, n)
            streams = self._streams(whole, headers, start, stop)
            # pictures shrink by a tenth or two: not worth the time, at 25 MB a second
            write_streams(folder / name, streams, compressed=False)
            shards.append({"file": name, "images": stop - start})
        write_summary(folder, {"shards": shards}, INDEX)

    def _discard(self, path: Path) -> None:
        """Move old results into the folder of parts, with which they are removed."""
        os.replace(path, self._folder / f"{path.name}.{os.urandom(4).hex()}")

    def remove(self) -> None:
        """Remove the parts: the run is over."""
        # first the settings: without them, what a kill leaves of the folder is no run any more;
        # there may be none, or a file of somebody's in place of the folder
        with contextlib.suppress(OSError):
            self._settings_path.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)

    def resume_hint(self) -> str:
        """Return how to go on, for a message; if no part is finished, "", and remove the run."""
        n = sum(map(self.has, self.parts))
        if n == 0:
            if self._leads:
                self.remove()
            return ""
        return f"; {n} of {len(self.parts)} parts are kept, --resume goes on from them"

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Say, when the block is interrupted or cannot write, what is finished and how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.resume_hint()) from None
        except OSError as error:
            hint = self.resume_hint()
            raise ValueError(f"cannot write to {self.directory}: {error.strerror}{hint}") from None

    def _path(self, part: AnyPart) -> Path:
        *names, number = part
        return self._folder / ".".join(names) / f"{number:05d}.npz"

    def _streams(
        self, whole: Arrays, headers: Mapping[Path, Headers], start: int, stop: int
    ) -> Iterator[tuple[str, Stream]]:
        """Yield the arrays of some images by name; the first of them have all arrays."""
        for name, values in whole.items():
            blocks = (values[i : min(i + ROWS, stop)] for i in range(start, stop, ROWS))
            yield name, Stream((stop - start, *values.shape[1:]), values.dtype, blocks)
        for (prefix, *_), parts in groupby(self.parts, key=lambda part: part[:-1]):
            of_parts = {path: headers[path] for path in map(self._path, parts)}
            for name in next(iter(of_parts.values())):
                if not name.startswith(MEASURE):
                    stream = _join(name, of_parts, start, stop)
                    if start == 0 or stream.shape[0]:
                        yield f"{prefix}/{name}", stream

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turn an error of the disk into one line; leave no folder of parts without a part."""
        try:
            yield
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}{self.resume_hint()}") from None


class Store(Parts):
    """The parts of an attack, with a log: `DIR/log.jsonl` has a line for each finished part."""

    @property
    def _log(self) -> Path:
        return self.directory / "log.jsonl"

    def begin(self, *, resume: bool) -> None:
        """Check as `Parts.begin`; write the log of a resumed run again.

        Its last line may be missing or cut short.
        """
        super().begin(resume=resume)
        if resume:
            self._write_log()

    def collect(self) -> None:
        """Wait until the parts of all processes are there; write the log of all."""
        while not all(map(self.has, self.parts)):
            time.sleep(0.2)
        self._write_log()

    def _write_log(self) -> None:
        lines = []
        for part in filter(self.has, self.parts):
            measures = self._measures(part)
            with intact(self._path(part)):  # numbers that a row needs may be missing
                lines.append(self._line(part, measures))
        with self._writing(self._log), atomic(self._log, "w") as log:
            log.writelines(lines)

    def save(self, part: AnyPart, arrays: Arrays) -> None:
        """Write a finished part with its measures, `seconds` among them; and its line of the log.

        Raises:
            ValueError: names the file and why it cannot be written.
        """
        new = not self._announced
        super().save(part, arrays)
        if not self._leads:  # lines of several processes would mix: see `collect`
            return
        with self._writing(self._log), self._log.open("w" if new else "a", encoding="utf-8") as log:
            # not read back from the file: `intact` changes the warning filters of all threads
            log.write(self._line(part, _measures(arrays)))

    def measures(self, interpreter: str, attack: str) -> dict[str, NDArray[Any]]:
        """Return numbers [N] by key, one an image; `seconds` has one a part."""
        parts = [self._measures(part) for part in self.parts if part[:2] == (interpreter, attack)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _measures(self, part: AnyPart) -> dict[str, NDArray[Any]]:
        path = self._path(part)
        with intact(path):
            return _measures(read_arrays(path, lambda name: name.startswith(MEASURE)))

    def _line(self, part: AnyPart, measures: Arrays) -> str:
        numbers = row(measures) | {"seconds": float(measures["seconds"][0])}
        logged = [one.key for one in schema.MEASURES if not one.page_only and one.key in numbers]
        line = dict(zip(Part._fields, part, strict=True))
        for key in ("n", "failed", *logged, "seconds"):
            line[key] = None if numbers[key] is None else round(numbers[key], 6)
        return json.dumps(line) + "\n"


def _measures(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return the measures among the arrays of a part, by key.

    Raises:
        ValueError: names one whose shape, type or numbers are not those of a measure.
    """
    measures = {name: values for name, values in arrays.items() if name.startswith(MEASURE)}
    for name, values in measures.items():
        shape = (1,) if name == SECONDS else measures[f"{MEASURE}asr"].shape
        if values.shape != shape or len(shape) != 1 or values.dtype.kind not in "bf":
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
        sound = values if name == SECONDS else values[~measures[f"{MEASURE}failed"]]
        if not np.isfinite(sound).all():  # would be met when the summary is written
            raise ValueError(f"{name} has numbers that are not finite")
    return {name.removeprefix(MEASURE): values for name, values in measures.items()}


def _join(name: str, headers: Mapping[Path, Headers], start: int, stop: int) -> Stream:
    """Return an array of several parts as one; of what has no axis of images, that of the first.

    Args:
        name: of the array.
        headers: of the parts.
        start, stop: the images that are wanted, among those of all parts.

    Raises:
        ValueError: names a part whose array has another shape or type.
    """
    # not every part has snapshots, or a curve that some step reports
    paths = [path for path, header in headers.items() if name in header]
    shape, dtype = headers[paths[0]][name]
    if name.rpartition("/")[2] in SHARED:
        paths, start, stop = paths[:1], 0, shape[0]
    end, pieces = 0, []
    for path in paths:
        held, kind = headers[path][name]
        if not held or (held[1:], kind) != (shape[1:], dtype):
            raise ValueError(
                f"cannot read {path}: {name} is {kind} {list(held)}, before {dtype} {list(shape)}"
            )
        begin, end = end, end + held[0]
        some = slice(max(start - begin, 0), max(stop - begin, 0))
        pieces.append((path, some, len(range(held[0])[some])))
    blocks = (read_arrays(path, name.__eq__)[name][some] for path, some, n in pieces if n)
    return Stream((sum(n for *_, n in pieces), *shape[1:]), dtype, blocks)
