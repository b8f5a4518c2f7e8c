"""Files in and out: named arrays read without unpickling, results written atomically."""

import contextlib
import json
import math
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from adv2_jax.errors import first_line

SCHEMA = 1  # of summary.json and results.npz

Wanted = Callable[[str], bool]


def _read_npz(path: Path, wanted: Wanted = lambda name: True) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("not a whole .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files if wanted(key)}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ValueError("reading .safetensors needs safetensors: pip install 'adv2_jax[weights]'") from None
    return load_file(path)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError(f"reading {path.suffix} needs torch: pip install torch, or convert the file elsewhere") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats; what matters to the user is an error
        try:
            entries = _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError:
            raise ValueError("it is damaged or holds other objects than tensors, only a state dict is read") from None
    tensors = {key: value.detach() for key, value in entries.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors by name, only a state dict is read")
    halves = (torch.float16, torch.bfloat16)
    return {key: (value.float() if value.dtype in halves else value).numpy() for key, value in tensors.items()}


def _unwrapped(entries: Any) -> Mapping[str, Any]:
    """The state dict inside a training checkpoint; empty if there is none."""
    if not isinstance(entries, Mapping):
        return {}
    inner = [entries[key] for key in NESTED if isinstance(entries.get(key), Mapping)]
    return _unwrapped(inner[0]) if inner else entries


NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights
READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
}


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a file, by name. Nothing is ever unpickled but plain tensors, by torch, which refuses the rest.

    Args:
        path: `.npz`, `.safetensors`, or, where torch is installed, `.pth` or `.pt`: a state dict, or a training checkpoint that
            holds one as `state_dict`, `model_state_dict` or `model`. Entries of it that are not tensors are passed over, and half
            precision becomes float32.

    Raises:
        ValueError: one line that names the file and what is wrong: missing, another suffix, truncated, pickled objects.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"cannot read {path}: suffix {path.suffix!r} is not one of {', '.join(READERS)}")
    with _one_line(path):
        return READERS[path.suffix](path)


def array_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the arrays of an `.npz`.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with _one_line(path), zipfile.ZipFile(path) as archive:
        return [entry.removesuffix(".npy") for entry in archive.namelist()]


def read_some(path: str | os.PathLike[str], wanted: Wanted) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` whose names are wanted; the others are not read.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with _one_line(path):
        return _read_npz(path, wanted)


def read_pictures(path: str | os.PathLike[str], n: int) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`, but of those with three axes or more (images, maps) only the first n entries; no others are held.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with _one_line(path), zipfile.ZipFile(path) as archive:
        return {entry.removesuffix(".npy"): _first(archive, entry, n) for entry in archive.namelist()}


def _first(archive: zipfile.ZipFile, entry: str, n: int) -> np.ndarray:
    with archive.open(entry) as member:
        shape, dtype, order = _header(member)
        if len(shape) > 2 and order == "C":
            shape = (min(n, shape[0]), *shape[1:])
        values = np.frombuffer(member.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape, order=order)
    return values[:n] if len(shape) > 2 else values


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]:
    np.lib.format.read_magic(member)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.hasobject:
        raise ValueError("without allow_pickle there are no objects")  # NumPy's word, which becomes ours
    return shape, dtype, "F" if fortran else "C"


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a reader raises as one line that names the file."""
    if not path.exists():
        raise ValueError(f"cannot read {path}: no such file")
    try:
        yield
    except Exception as error:  # zipfile, zlib, numpy, safetensors and torch each raise their own on a damaged file
        pickled = "allow_pickle" in str(error)
        reason = "it holds pickled objects, only plain arrays are read" if pickled else first_line(error)
        raise ValueError(f"cannot read {path}: {reason}") from None


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that takes the place of `path` only when the block ends without an error."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files only their owner can read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
        ValueError: names the directory that holds none, or the file that is damaged or of another schema.
    """
    path = directory / "summary.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no finished run: there is no summary.json")
    with _one_line(path):
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_schema(summary, path)
    return summary


def check_schema(summary: Mapping[str, Any], name: object = "summary") -> None:
    """Refuse a summary that this version does not know how to read.

    Raises:
        ValueError: names both schemas.
    """
    if summary.get("schema") != SCHEMA:
        raise ValueError(f"{name} has schema {summary.get('schema')!r}, this adv2 reads schema {SCHEMA}")


class Stream(NamedTuple):
    """An array that is never whole in memory: its shape [N, ...], its type, and its blocks [n, ...] along the first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Iterable[np.ndarray]


def write_streams(path: str | os.PathLike[str], streams: Iterable[tuple[str, Stream]]) -> None:
    """Write an `.npz` atomically, a block at a time. Equal arrays give equal bytes, whatever their blocks and the time of day."""
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, (shape, dtype, blocks) in streams:
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(np.asarray(block, dtype).tobytes())


def stored(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of each array of an `.npz`; their values are not read."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as member:
                found[entry.removesuffix(".npy")] = _header(member)[:2]
    return found


def _write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    np.savez_compressed(file, allow_pickle=False, **arrays)


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ValueError("writing .safetensors needs safetensors: pip install 'adv2_jax[weights]'") from None
    file.write(save({key: np.asarray(array, order="C") for key, array in arrays.items()}))  # it forgets about strides


WRITERS: dict[str, Callable[[IO[bytes], Mapping[str, np.ndarray]], None]] = {".npz": _write_npz, ".safetensors": _write_safetensors}


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a name that `write_arrays` has no format for, or no folder.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    if Path(path).suffix not in WRITERS:
        raise ValueError(f"cannot write {path}: suffix {Path(path).suffix!r} is not one of {', '.join(WRITERS)}")
    if Path(path).is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not Path(path).parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {Path(path).parent}")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` or `.safetensors` atomically; arrays keep their names, slashes included.

    Raises:
        ValueError: another suffix, or safetensors is not installed.
    """
    check_writable(path)
    with atomic(path) as file:
        WRITERS[Path(path).suffix](file, arrays)
