"""Files in and out: named arrays read without unpickling, results written atomically."""

import contextlib
import json
import logging
import math
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from adv2_jax.errors import first_line, listed

log = logging.getLogger(__name__)

SCHEMA = 1  # of summary.json and results.npz

Wanted = Callable[[str], bool]
# path to a state dict in its file -> name -> array or tensor
StateDicts = Mapping[str, Mapping[str, Any]]
Headers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shapes and types by name

# an .npz may unpack to ten times its bytes, or to 64 MiB: what holds memory to the size of the file
EXPANSION, SMALL = (10, 2**26)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read_npz(path: Path, wanted: Wanted = lambda name: True) -> dict[str, np.ndarray]:
    with _archive(path) as archive:
        return {
            name: _whole(archive, member)
            for name, member in _members(archive, path, wanted).items()
        }


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ValueError(
            "reading .safetensors needs safetensors: pip install 'adv2_jax[weights]'"
        ) from None
    return load_file(path)


def _read_torch(path: Path) -> StateDicts:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"reading {path.suffix} needs torch: pip install torch, or convert the file elsewhere"
        ) from None
    harmless = [(_Ignored, name) for name in HARMLESS] + [
        (_IgnoredDict, name) for name in HARMLESS_DICTS
    ]
    with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
        warnings.simplefilter("ignore")  # of old formats; what matters to the user is an error
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(_refusal(str(error))) from None
    state_dicts = _state_dicts(checkpoint)
    if not state_dicts:
        raise ValueError("it holds no tensors by name, only a state dict is read")
    return state_dicts


class _Ignored:
    """Take the place of an object beside the weights; nothing of its own class is run."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _IgnoredDict:
    """Take the place of a kind of dict; torch puts items into plain ones only."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


# What trainers write beside the weights. torch refuses a whole file for one object that it does not
# know; objects of these names become the inert ones above, so none of them has to be trusted, or
# installed.
HARMLESS = (
    *(
        "argparse.Namespace",
        "types.SimpleNamespace",
        "typing.Any",
        "copyreg._reconstructor",
        "uuid.UUID",
        "decimal.Decimal",
    ),
    *(
        f"builtins.{name}"
        for name in (
            "object",
            "int",
            "float",
            "str",
            "bool",
            "tuple",
            "list",
            "frozenset",
            "slice",
            "range",
            "Ellipsis",
        )
    ),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(
        f"{module}.{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows")
    ),
    *(
        f"{module}.Pure{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows")
    ),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Path", "Bytes")
    ),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
HARMLESS_DICTS = (
    *(
        "builtins.dict",
        "collections.defaultdict",
        "yacs.config.CfgNode",
        "easydict.EasyDict",
        "addict.addict.Dict",
    ),
    *(
        f"{package}.utilities.parsing.AttributeDict"
        for package in ("pytorch_lightning", "lightning.pytorch")
    ),
    *(
        f"{package}.utilities.data_structures.AttributeDict"
        for package in ("lightning_fabric", "lightning.fabric")
    ),
)


def _refusal(message: str) -> str:
    """Name the object that torch refused, and say how to do without it."""
    name = re.search(r"GLOBAL (\S+)", message)
    if name is None:
        return "it is damaged or holds other objects than tensors, only a state dict is read"
    return (
        f"it holds other objects than tensors ({name[1]}), only a state dict is read: write one where the file was made, "
        "torch.save(checkpoint['state_dict'], FILE), or of a whole network torch.save(network.state_dict(), FILE)"
    )


def _state_dicts(entries: Any, path: str = "") -> StateDicts:
    """All tensors by name in a checkpoint, by the dotted path to where they are; those of optimisers are no weights."""
    if not isinstance(entries, Mapping):
        return {}
    named = {key: value for key, value in entries.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if hasattr(value, "detach")}
    found: StateDicts = (
        {path: tensors}
        if any(value.is_floating_point() and value.ndim for value in tensors.values())
        else {}
    )
    for key, value in named.items():
        if not key.startswith("optim"):
            found = {**found, **_state_dicts(value, f"{path}.{key}" if path else key)}
    return found


def _choose(state_dicts: StateDicts, key: str | None, path: Path) -> Mapping[str, Any]:
    """The arrays below a name, or those that the writer of the file means to be used."""
    usual = next(iter(state_dicts)) if len(state_dicts) == 1 else _usual(state_dicts)
    others = [name for name in state_dicts if name not in ("", usual)]
    if key is not None:
        key = key.rstrip(".")
        every = {
            f"{outer}.{name}".lstrip("."): array
            for outer, arrays in state_dicts.items()
            for name, array in arrays.items()
        }
        found = _below(every, key) or _below(state_dicts.get(usual, {}), key)
        if not found:
            names = others + list(
                dict.fromkeys(name.partition(".")[0] for name in state_dicts.get(usual, every))
            )
            raise ValueError(f"it holds no weights called {key!r}, but {listed(names, ', ')}")
        return found
    if usual not in state_dicts:
        raise ValueError(
            f"it holds several state dicts, {listed(others, ', ')}: choose one ({CHOICE})"
        )
    if others:
        log.warning(
            "%s: %s is read; there is also %s (%s)",
            path,
            usual or "its outer level",
            listed(others, ", "),
            CHOICE,
        )
    return state_dicts[usual]


def _usual(state_dicts: StateDicts) -> str:
    """The path to where training checkpoints keep the weights; empty for the outer level."""
    path, paths = "", [f"{name}." for name in state_dicts]
    while inner := [
        f"{path}{name}."
        for name in NESTED
        if any(known.startswith(f"{path}{name}.") for known in paths)
    ]:
        path = inner[0]
    return path.removesuffix(".")


def _below(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arrays whose names begin with a name and a dot, without these."""
    return {
        key.removeprefix(f"{name}."): array
        for key, array in arrays.items()
        if key.startswith(f"{name}.")
    }


def _numpy(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach()
    small = tensor.is_floating_point() and tensor.itemsize < 4  # of those NumPy knows one
    numpy: np.ndarray = (tensor.float() if small else tensor).numpy()
    return numpy


NESTED = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights
CHOICE = "--weights-key NAME, or key= in Python"
READERS: dict[str, Callable[[Path], StateDicts]] = {
    ".npz": lambda path: {"": _read_npz(path)},
    ".safetensors": lambda path: {"": _read_safetensors(path)},
    **dict.fromkeys((".pth", ".pt", ".th", ".tar", ".ckpt", ".bin"), _read_torch),
}
OTHER_FORMATS = {  # by their first bytes
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: git lfs pull fetches it",
    b"<": "a web page, not weights: download the file itself",
}
SHARD = re.compile(r"-\d+-of-\d+\.\w+$|\.index\.json$")


def _format(path: Path) -> str:
    """The suffix that a file's contents should have, told by its first bytes, or else by its own suffix."""
    if SHARD.search(path.name):
        raise ValueError("it is a part of a checkpoint in several files: join them into one first")
    with path.open("rb") as file:
        start = file.read(512)
        members = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    if any(name.endswith(".npy") for name in members):
        return ".npz"
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError(
            "it is a TorchScript program, only a state dict is read: torch.save(torch.jit.load(FILE).state_dict(), …)"
        )
    if any(name.endswith("/data.pkl") for name in members) or start[:2] == b"\x80\x02":
        return ".pth"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return ".safetensors"
    for signature, meaning in OTHER_FORMATS.items():
        if start.startswith(signature):
            raise ValueError(f"it is {meaning}")
    if path.suffix.lower() not in READERS:
        raise ValueError(
            f"suffix {path.suffix!r} is not one of {', '.join(READERS)}, nor does it begin as such files do"
        )
    return path.suffix.lower()


def read_arrays(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """All arrays of a file, by name. Nothing is ever unpickled but plain tensors, by torch, which
    refuses the rest.

    Args:
        path: `.npz`, `.safetensors`, or, where torch is installed, what `torch.save` writes
            (`.pth`, `.pt`, `.th`, `.pth.tar`, `.ckpt`, `.bin`; the contents decide): a state dict,
            or a training checkpoint that holds one as `state_dict`, `model_state_dict` or `model`.
            Entries of it that are not tensors are passed over, and half precision becomes float32.
        key: which arrays: the dotted path to another state dict of a checkpoint (`state_dict_ema`),
            or the first names of arrays (`model_ema` of `model_ema.conv1.weight`); is taken off the
            names.

    Raises:
        ValueError: one line that names the file and what is wrong: missing, another format,
            truncated, pickled objects, several state dicts of which none is the usual one, or none
            under `key`.
    """
    path = Path(path)
    with intact(path):
        return {
            name: _numpy(array)
            for name, array in _choose(READERS[_format(path)](path), key, path).items()
        }


def array_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the arrays of an `.npz`.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with intact(path), _archive(path) as archive:
        return [entry.removesuffix(".npy") for entry in archive.namelist()]


def read_some(path: str | os.PathLike[str], wanted: Wanted) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` whose names are wanted; the others are not read.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with intact(path):
        return _read_npz(path, wanted)


def read_pictures(path: str | os.PathLike[str], n: int) -> dict[str, np.ndarray]:
    """All arrays of an `.npz`, but of those with three axes or more (images, maps) only the first n
    entries; no others are held.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with intact(path), _archive(path) as archive:
        return {
            name: _first(archive, member, n) for name, member in _members(archive, path).items()
        }


class Member(NamedTuple):
    """An array in an `.npz`: where it is, its shape, type and order."""

    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("not a whole .npz archive")
        with zipfile.ZipFile(file) as archive:
            yield archive


def _members(
    archive: zipfile.ZipFile, path: Path, wanted: Wanted = lambda name: True
) -> dict[str, Member]:
    """The arrays of an archive by name, which together must not be much larger than its file."""
    entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    entries = {name: entry for name, entry in entries.items() if wanted(name)}
    packed, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries.values())
    if unpacked > max(SMALL, EXPANSION * packed):
        raise ValueError(
            f"its {packed} bytes unpack to {unpacked}, over {EXPANSION} times as many: save it without compression"
        )
    return {name: _member(archive, name, entry) for name, entry in entries.items()}


def _member(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> Member:
    # NumPy writes no other, which unpack without bounds
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is compressed in another way than NumPy's")
    with archive.open(entry) as member:
        shape, dtype, order = _header(member)
        if (told := math.prod(shape) * dtype.itemsize) != (held := entry.file_size - member.tell()):
            raise ValueError(
                f"{name!r} holds {held} bytes, an array of {dtype} {list(shape)} takes {told}"
            )
    return Member(entry, shape, dtype, order)


def _whole(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    with archive.open(member.entry) as file:
        values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return values


def _first(archive: zipfile.ZipFile, member: Member, n: int) -> np.ndarray:
    _, shape, dtype, order = member
    if len(shape) < 3:
        return _whole(archive, member)
    if order == "F":
        return _whole(archive, member)[:n]
    shape = (min(n, shape[0]), *shape[1:])
    with archive.open(member.entry) as file:
        _header(file)
        return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], Literal["C", "F"]]:
    version = np.lib.format.read_magic(member)
    if version not in HEADERS:
        raise ValueError(f"version {version} of NumPy's format is not read")
    shape, fortran, dtype = HEADERS[version](member)
    if dtype.hasobject:
        # NumPy's word, which becomes ours
        raise ValueError("without allow_pickle there are no objects")
    if min(shape, default=0) < 0:
        raise ValueError(f"it tells of an array {list(shape)}")
    return shape, dtype, "F" if fortran else "C"


@contextlib.contextmanager
def intact(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file, or what adv2 wrote into a folder, is read as one line that names it."""
    if not path.exists():
        raise ValueError(f"cannot read {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy and zipfile warn of damage, too
            yield
    except Exception as error:  # zipfile, zlib, numpy, safetensors and torch each raise their own on a damaged file
        reason = first_line(error)
        if "allow_pickle" in reason:
            reason = "it holds pickled objects, only plain arrays are read"
        if isinstance(error, LookupError | TypeError | AttributeError):  # of our own readers
            reason = f"it is not as adv2 writes it ({type(error).__name__}: {reason})"
        raise ValueError(f"cannot read {path}: {reason}") from None


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that takes the place of `path` only when the block ends without an error."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        text = "b" not in mode
        errors = "replace" if text else None  # for file names with bytes that are no characters
        with os.fdopen(handle, mode, encoding="utf-8" if text else None, errors=errors) as file:
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
    """A directory that can be written to; made if it is not there, and unmade if nothing was
    written to it.

    Raises:
        ValueError: names the directory and why it cannot be written to.
    """
    directory = Path(path)
    new = [folder for folder in (directory, *directory.parents) if not os.path.exists(folder)]
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
        ValueError: names the directory that holds none, or the file that is damaged or of another
            schema.
    """
    path = directory / "summary.json"
    if not path.exists():
        raise ValueError(f"{directory} holds no finished run: there is no summary.json")
    with intact(path):
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(f"it holds no object, but {type(summary).__name__}")
        json.dumps(summary, allow_nan=False)  # infinite numbers could not be written again
    check_schema(summary, path)
    return summary


def check_schema(summary: Mapping[str, Any], name: object = "summary") -> None:
    """Refuse a summary that this version does not know how to read.

    Raises:
        ValueError: names both schemas.
    """
    if summary.get("schema") != SCHEMA:
        raise ValueError(
            f"{name} has schema {summary.get('schema')!r}, this adv2 reads schema {SCHEMA}"
        )


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
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": shape,
            }
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(np.asarray(block, dtype).tobytes())


def stored(path: str | os.PathLike[str]) -> Headers:
    """Shape and type of each array of an `.npz`; their values are not read.

    Raises:
        ValueError: as `read_arrays`.
    """
    path = Path(path)
    with intact(path), _archive(path) as archive:
        return {
            name: (member.shape, member.dtype) for name, member in _members(archive, path).items()
        }


def _write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise ValueError(f"only plain arrays are written, not objects: {listed(objects, ', ')}")
    np.savez_compressed(file, **dict[str, Any](arrays))  # its allow_pickle is of NumPy 2.2


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ValueError(
            "writing .safetensors needs safetensors: pip install 'adv2_jax[weights]'"
        ) from None
    # it forgets about strides
    file.write(save({key: np.asarray(array, order="C") for key, array in arrays.items()}))


WRITERS: dict[str, Callable[[IO[bytes], Mapping[str, np.ndarray]], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a name that `write_arrays` has no format for, or no folder.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    if Path(path).suffix.lower() not in WRITERS:
        raise ValueError(
            f"cannot write {path}: suffix {Path(path).suffix!r} is not one of {', '.join(WRITERS)}"
        )
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
        WRITERS[Path(path).suffix.lower()](file, arrays)
