"""Weights in other people's files: `.npz`, safetensors and torch, read without running any code."""

import logging
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adv2_jax.errors import listed
from adv2_jax.files import intact, optional, read_arrays

log = logging.getLogger(__name__)

# path to a state dict in its file -> name -> array or tensor
StateDicts = Mapping[str, Mapping[str, Any]]

# where training checkpoints keep the weights, by preference; the last is the outer level
NESTED = ("state_dict", "model_state_dict", "model", "")
ONLY = "only a state dict is read"
CHOICE = "--weights-key NAME, or key= in Python"
OTHER_FORMATS = {  # by their first bytes
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: git lfs pull fetches it",
    b"<": "a web page, not weights: download the file itself",
}

# Objects that trainers write beside the weights. torch refuses a whole file for one object that it
# does not know. Objects of these names are read as the inert ones below, so that their classes need
# neither be trusted nor installed.
HARMLESS = {  # module -> names
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "typing": "Any",
    "copyreg": "_reconstructor",
    "uuid": "UUID",
    "decimal": "Decimal",
    "builtins": "object int float str bool tuple list frozenset slice range Ellipsis",
    "datetime": "datetime date time timedelta timezone",
    "pathlib": "PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "pathlib._local": "PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode EnumNode PathNode BytesNode",
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
}
HARMLESS_DICTS = {
    "builtins": "dict",
    "collections": "defaultdict",
    "yacs.config": "CfgNode",
    "easydict": "EasyDict",
    "addict.addict": "Dict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data_structures": "AttributeDict",
    "lightning.fabric.utilities.data_structures": "AttributeDict",
}


def read_weights(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of a file of weights, by name.

    Nothing is unpickled but plain tensors, by torch, which refuses everything else.

    Args:
        path: `.npz`, `.safetensors`, or, where torch is installed, a file of `torch.save` (`.pth`,
            `.pt`, `.th`, `.pth.tar`, `.ckpt`, `.bin`): a state dict, or a training checkpoint that
            holds one as `state_dict`, `model_state_dict` or `model`. The contents decide, not the
            name. Entries that are not tensors are passed over, and half precision becomes float32.
        key: which arrays: the dotted path to another state dict of a checkpoint (`state_dict_ema`),
            or the first names of arrays (`model_ema` of `model_ema.conv1.weight`), which is removed
            from their names.

    Raises:
        ValueError: one line that names the file and the reason: it is missing, of another format,
            truncated, holds pickled objects, several state dicts of which none is the usual one, or
            none under `key`.
    """
    path = Path(path)
    with intact(path):
        arrays = _choose(READERS[_format(path)](path), key, path)
        return {name: _numpy(array) for name, array in arrays.items()}


def _format(path: Path) -> str:
    """Return the suffix that suits a file's contents, or else its own suffix."""
    with path.open("rb") as file:
        start = file.read(512)
        members = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    names = {member.rpartition("/")[2] for member in members}
    formats = [  # the first that holds; a suffix is read, all else refused
        (
            "a part of a checkpoint in several files: join them into one first",
            re.search(r"-\d+-of-\d+\.\w+$|\.index\.json$", path.name),
        ),
        (".npz", any(name.endswith(".npy") for name in names)),
        (
            "a TorchScript program, only a state dict is read: torch.save(torch.jit.load(FILE).state_dict(), …)",
            "constants.pkl" in names,
        ),
        # torch writes a zip, and before version 1.6 wrote a bare pickle of protocol 2
        (".pth", "data.pkl" in names or start[:2] == b"\x80\x02"),
        # the length of a JSON header, then the header
        (
            ".safetensors",
            start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size,
        ),
        *((meaning, start.startswith(bytes_)) for bytes_, meaning in OTHER_FORMATS.items()),
    ]
    suffix = path.suffix.lower()
    kind = next((kind for kind, holds in formats if holds), suffix)
    if kind not in READERS:
        raise ValueError(
            f"suffix {path.suffix!r} is not one of {', '.join(READERS)}, nor does it begin as such files do"
            if kind == suffix
            else f"it is {kind}"
        )
    return kind


class _Ignored:
    """An inert object in the place of one beside the weights; no code of its own class runs."""

    def __init__(self, *arguments: Any):
        pass

    __setstate__ = __init__


class _IgnoredDict:
    """An `OrderedDict` in the place of another kind of dict."""

    # torch puts items into plain kinds of dict only, so an object of this class would not do
    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


def _read_torch(path: Path) -> StateDicts:
    torch = optional(
        "torch", f"reading {path.suffix}", "pip install torch, or convert the file elsewhere"
    )
    harmless = [
        (kind, f"{module}.{name}")
        for kind, table in ((_Ignored, HARMLESS), (_IgnoredDict, HARMLESS_DICTS))
        for module, names in table.items()
        for name in names.split()
    ]
    with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
        warnings.simplefilter("ignore")  # about old formats; what matters to the user is an error
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))  # the class that torch refused
            raise ValueError(
                f"it holds other objects than tensors ({refused[1]}), {ONLY}: write one where the file was made, "
                "torch.save(checkpoint['state_dict'], FILE), or of a whole network torch.save(network.state_dict(), FILE)"
                if refused
                else f"it is damaged or holds other objects than tensors, {ONLY}"
            ) from None
    state_dicts = dict(_state_dicts(checkpoint)) if isinstance(checkpoint, Mapping) else {}
    if not state_dicts:
        raise ValueError(f"it holds no tensors by name, {ONLY}")
    return state_dicts


def _state_dicts(
    entries: Mapping[Any, Any], path: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the state dicts of a checkpoint with their dotted paths, except those of optimisers."""
    named = {key: value for key, value in entries.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if hasattr(value, "detach")}
    # counters and best scores are tensors too, but make no state dict
    if any(value.is_floating_point() and value.ndim for value in tensors.values()):
        yield path, tensors
    for key, value in named.items():
        if isinstance(value, Mapping) and not key.startswith("optim"):
            yield from _state_dicts(value, f"{path}.{key}".lstrip("."))


def _choose(state_dicts: StateDicts, key: str | None, path: Path) -> Mapping[str, Any]:
    """Return the arrays below a name, or without one those of the usual state dict."""
    usual: str = max(
        (name for name in state_dicts if set(name.split(".")) <= set(NESTED)),
        # name by name, and a longer path wins: names may be nested, as in state_dict.model
        key=lambda name: [-NESTED.index(outer) for outer in name.split(".")],
        default=next(iter(state_dicts)) if len(state_dicts) == 1 else "",
    )
    others = [name for name in state_dicts if name not in ("", usual)]
    if key is not None:
        key = key.rstrip(".")
        every = {
            f"{outer}.{name}".lstrip("."): array
            for outer, arrays in state_dicts.items()
            for name, array in arrays.items()
        }
        inner = state_dicts.get(usual, {})
        if arrays := _below(every, key) or _below(inner, key):
            return arrays
        first = dict.fromkeys(name.partition(".")[0] for name in inner or every)
        raise ValueError(
            f"it holds no weights called {key!r}, but {listed([*others, *first], ', ')}"
        )
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


def _below(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the arrays whose names begin with a name and a dot, without these."""
    return {
        key.removeprefix(f"{name}."): array
        for key, array in arrays.items()
        if key.startswith(f"{name}.")
    }


def _numpy(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach()
    # NumPy has no bfloat16 and no float8
    half = tensor.is_floating_point() and tensor.itemsize < 4
    return np.asarray((tensor.float() if half else tensor).numpy())


READERS: dict[str, Callable[[Path], StateDicts]] = {
    ".npz": lambda path: {"": read_arrays(path)},
    ".safetensors": lambda path: {
        "": optional("safetensors.numpy", "reading .safetensors").load_file(path)
    },
    **dict.fromkeys((".pth", ".pt", ".th", ".tar", ".ckpt", ".bin"), _read_torch),
}
