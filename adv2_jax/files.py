"""Files: reading without unpickling, writing atomically; arrays in `.npz`, and summaries."""

import contextlib
import importlib
import json
import math
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from adv2_jax.errors import first_line, listed

SCHEMA = 1  # of summary.json and results.npz

Headers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shapes and types by name
# of an array in an .npz: its entry, shape, type, whether in Fortran order, and length of its header
Member = tuple[zipfile.ZipInfo, tuple[int, ...], np.dtype[Any], bool, int]

# an .npz may unpack to ten times its bytes, or to 64 MiB: memory is bounded by the size of the file
EXPANSION, SMALL = (10, 2**26)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextlib.contextmanager
def intact(path: Path) -> Iterator[None]:
    """Turn any error while a file or folder is read into one line that names it."""
    if not path.exists():
        raise ValueError(f"cannot read {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy and zipfile warn of damage, too
            yield
    # zipfile, zlib, numpy, safetensors and torch each raise their own errors for a damaged file
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, LookupError | TypeError | AttributeError):  # of our own readers
            reason = f"it is not as adv2 writes it ({type(error).__name__}: {reason})"
        what = f"cannot read {path}: "  # an inner reader of the same file may have said so
        raise ValueError(what + reason.removeprefix(what)) from None


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` only when the block ends without an error."""
    path, text = Path(path), "b" not in mode
    # in the same folder: only within a file system is a file replaced in one step
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    # file names may hold bytes that are no characters
    encoding, errors = ("utf-8", "replace") if text else (None, None)
    try:
        with temporary.open(mode.replace("w", "x"), encoding=encoding, errors=errors) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def output_directory(path: str) -> Iterator[Path]:
    """Make a directory that can be written to; after an error remove it again if it is empty.

    Raises:
        ValueError: names the directory and the reason why it cannot be written to.
    """
    directory = Path(path)
    new = [folder for folder in (directory, *directory.parents) if not os.path.exists(folder)]
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise ValueError(f"cannot write to --out {path}: {error.strerror}") from None
        yield directory
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def optional(module: str, doing: str, advice: str = "pip install 'adv2_jax[weights]'") -> Any:
    """Import a module that is no requirement of the package.

    Raises:
        ValueError: it is not installed; says what needs it, and what to do.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{doing} needs {module.partition('.')[0]}: {advice}") from None


@contextlib.contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """After an error in the block, put some small files back as they were, or remove new ones."""
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                with atomic(path) as file:
                    file.write(content)
        raise


def write_summary(directory: Path, summary: Mapping[str, Any], name: str = "summary.json") -> None:
    """Write `summary.json`, or another file of its kind, atomically."""
    with atomic(directory / name, "w") as file:
        json.dump({"schema": SCHEMA, **summary}, file, indent=2, allow_nan=False)
        file.write("\n")


def read_summary(directory: Path, name: str = "summary.json") -> dict[str, Any]:
    """Read the `summary.json` of a finished run, or another file of its kind.

    Raises:
        ValueError: names the directory that holds none, or the file that is damaged or of another
            schema.
    """
    path = directory / name
    if not path.exists():
        raise ValueError(f"{directory} holds no finished run: there is no {name}")
    with intact(path):
        summary: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        json.dumps(summary, allow_nan=False)  # infinite numbers could not be written again
    check_schema(summary, path)
    return summary


def check_schema(summary: Mapping[str, Any], name: object = "summary") -> None:
    """Refuse a summary of a schema that this version does not read.

    Raises:
        ValueError: names both schemas.
    """
    if summary.get("schema") != SCHEMA:
        raise ValueError(
            f"{name} has schema {summary.get('schema')!r}, this adv2 reads schema {SCHEMA}"
        )


def read_arrays(
    path: str | os.PathLike[str],
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    pictures: int | None = None,
) -> dict[str, np.ndarray]:
    """Read arrays of an `.npz` by name, without unpickling.

    Args:
        path: of the file.
        wanted: tells by its name whether an array is read.
        pictures: of arrays with three axes or more (images, maps) only so many entries along the
            first axis are read, and held in memory; all unless given.

    Raises:
        ValueError: one line that names the file and the reason: it is missing, damaged, compressed
            too well, or holds pickled objects.
    """
    with _archive(path) as archive:
        members = _members(archive, path, wanted)
        return {name: _values(archive, member, pictures) for name, member in members.items()}


def array_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays of an `.npz`.

    Raises:
        ValueError: as `read_arrays`.
    """
    with _archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def stored(path: str | os.PathLike[str]) -> Headers:
    """Return shape and type of each array of an `.npz`, without reading values.

    Raises:
        ValueError: as `read_arrays`.
    """
    with _archive(path) as archive:
        members = _members(archive, path)
        return {name: (shape, dtype) for name, (_, shape, dtype, *_) in members.items()}


@contextlib.contextmanager
def _archive(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    with intact(Path(path)), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("not a whole .npz archive")
        with zipfile.ZipFile(file) as archive:
            yield archive


def _members(
    archive: zipfile.ZipFile,
    path: str | os.PathLike[str],
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Member]:
    """Return the headers of arrays by name; refuse arrays much larger than the file."""
    names = {entry: entry.filename.removesuffix(".npy") for entry in archive.infolist()}
    entries = [entry for entry, name in names.items() if wanted(name)]
    packed, unpacked = os.path.getsize(path), sum(entry.file_size for entry in entries)
    if unpacked > max(SMALL, EXPANSION * packed):
        raise ValueError(
            f"its {packed} bytes unpack to {unpacked}, over {EXPANSION} times as many: save it without compression"
        )
    return {names[entry]: _member(archive, names[entry], entry) for entry in entries}


def _member(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> Member:
    # others, which NumPy does not write, unpack without bounds: `file_size` is only what they claim
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is compressed in another way than NumPy's")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"version {version} of NumPy's format is not read")
        shape, fortran, dtype = HEADERS[version](file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, only plain arrays are read")
    told, held = math.prod(shape) * dtype.itemsize, entry.file_size - start
    # checked before memory is asked for; two negative sides have a positive product
    if told != held or min(shape, default=0) < 0:
        raise ValueError(
            f"{name!r} holds {held} bytes, an array of {dtype} {list(shape)} takes {told}"
        )
    return entry, shape, dtype, fortran, start


def _values(archive: zipfile.ZipFile, member: Member, pictures: int | None) -> np.ndarray:
    entry, shape, dtype, fortran, start = member
    with archive.open(entry) as file:
        # in Fortran order the first entries are spread over the whole file
        if pictures is None or len(shape) < 3 or fortran:
            values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return values[:pictures] if len(shape) > 2 else values
        file.read(start)
        shape = (min(pictures, shape[0]), *shape[1:])
        return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


class Stream(NamedTuple):
    """An array that is never whole in memory.

    Attributes:
        shape: [N, ...].
        dtype: its type.
        blocks: [n, ...], along the first axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Iterable[np.ndarray]


def write_streams(
    path: str | os.PathLike[str], streams: Iterable[tuple[str, Stream]], *, compressed: bool = True
) -> None:
    """Write an `.npz` atomically, a block at a time; compression takes 40 ms a megabyte.

    Equal arrays give equal bytes, whatever their blocks and the time of day.
    """
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, (shape, dtype, blocks) in streams:
            # the earliest date of a zip, in place of the present one
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            # the size is unknown beforehand, and may pass 4 GiB
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header | {"shape": shape})
                for block in blocks:
                    member.write(np.asarray(block, dtype).tobytes())


def _write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise ValueError(f"only plain arrays are written, not objects: {listed(objects, ', ')}")
    # checked here, since `savez_compressed` has no allow_pickle before NumPy 2.2
    np.savez_compressed(file, **dict[str, Any](arrays))


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    # contiguous, since safetensors writes the memory of an array and forgets its strides
    plain = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    file.write(optional("safetensors.numpy", "writing .safetensors").save(plain))


WRITERS: dict[str, Callable[[IO[bytes], Mapping[str, np.ndarray]], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose suffix `write_arrays` does not know, or whose folder is not there.

    Raises:
        ValueError: names the file and the reason.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        raise ValueError(
            f"cannot write {path}: suffix {path.suffix!r} is not one of {', '.join(WRITERS)}"
        )
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` or `.safetensors` atomically; arrays keep their names, slashes included.

    Raises:
        ValueError: as `check_writable`, or safetensors is not installed.
    """
    check_writable(path)
    with atomic(path) as file:
        WRITERS[Path(path).suffix.lower()](file, arrays)
