"""Files in and out: named arrays read without unpickling, results written atomically."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

SCHEMA = 1  # of summary.json and results.npz


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("not a whole .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ValueError("reading .safetensors needs safetensors: pip install 'adv2_jax[weights]'") from None
    return load_file(path)


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {".npz": _read_npz, ".safetensors": _read_safetensors}


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` or `.safetensors` file, by name. Nothing is ever unpickled.

    Raises:
        ValueError: one line that names the file and what is wrong: missing, another suffix, truncated, pickled objects.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"cannot read {path}: suffix {path.suffix!r} is not one of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: no such file") from None
    except Exception as error:  # zipfile, zlib, numpy and safetensors each raise their own on a damaged file
        reason = "it holds pickled objects, only plain arrays are read" if "allow_pickle" in str(error) else error
        raise ValueError(f"cannot read {path}: {str(reason).splitlines()[0] or type(error).__name__}") from None


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


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` atomically; arrays keep their names, slashes included."""
    with atomic(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
