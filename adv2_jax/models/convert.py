"""Torch-style state dicts to Flax NNX modules and back.

A module whose attributes carry the PyTorch names needs no table: `layer1.0.conv1.kernel` is `layer1.0.conv1.weight` with its axes
moved. Only the names of the parameters themselves and the layouts differ, and one attribute that cannot have the name of a method.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adv2_jax.errors import listed
from adv2_jax.files import write_arrays

Module = TypeVar("Module", bound=nnx.Module)

TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TORCH_ATTRIBUTE = {"trunk": "features"}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,), 0: ()}  # convolution HWIO -> OIHW, linear IO -> OI
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,), 0: ()}
COUNTERS = ("num_batches_tracked", "n_averaged")  # of BatchNorm and of averaged models: not weights
OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # torchvision's files say norm.1, its module norm1


class Canonical(NamedTuple):
    """A state dict under the names of torchvision, and what was done to get there.

    Attributes:
        arrays: by name, as they were.
        prefix: taken off every key, with its last dot; empty for none.
        passed_over: keys left out, under their old names.
        renamed: old -> new name, both without the prefix.
    """

    arrays: dict[str, np.ndarray]
    prefix: str
    passed_over: list[str]
    renamed: dict[str, str]

    def changes(self) -> list[str]:
        """One line for each thing that was done."""
        renamed = [f"{old} -> {new}" for old, new in self.renamed.items()]
        prefix = [f"taken off every key: {self.prefix}"] if self.prefix else []
        lists = {"passed over": self.passed_over, "renamed": renamed}
        return prefix + [f"{what}, {len(keys)} in all: {listed(keys, ', ', 2)}" for what, keys in lists.items() if keys]


def canonical(arrays: Mapping[str, np.ndarray], own: Collection[str] = tuple(TORCH_ATTRIBUTE.values())) -> Canonical:
    """A state dict under the names of torchvision, which are those of timm.

    Counters are passed over; names that stand before every key (`module.`, `model.`, `backbone.`, …) are taken off; the layers of
    old DenseNet files are renamed.

    Args:
        arrays: by name.
        own: first names of the network itself, never taken off.

    Raises:
        ValueError: two keys become one.
    """
    passed_over = [key for key in arrays if key.rpartition(".")[2] in COUNTERS]
    kept = [key for key in arrays if key.rpartition(".")[2] not in COUNTERS]
    prefix = _prefix(kept, own)
    bare = [key.removeprefix(prefix) for key in kept]
    names = [OLD_DENSE_LAYER.sub(r"\1\2.", key) for key in bare]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"found under two names: {listed(twice)}")
    return Canonical(
        arrays={name: np.asarray(arrays[key]) for name, key in zip(names, kept, strict=True)},
        prefix=prefix,
        passed_over=passed_over,
        renamed={old: new for old, new in zip(bare, names, strict=True) if old != new},
    )


def _prefix(keys: Sequence[str], own: Collection[str]) -> str:
    """All the names, each with its dot, that every key starts with; at least one name remains, and none of `own` is taken."""
    first = {key.partition(".")[0] for key in keys}
    if len(first) != 1 or first & set(own) or not all("." in key for key in keys):
        return ""
    name = f"{first.pop()}."
    return name + _prefix([key.removeprefix(name) for key in keys], own)


def _torch_key(path: tuple[Any, ...]) -> str:
    names = (TORCH_ATTRIBUTE.get(name, name) for name in path[:-1])
    return ".".join(map(str, (*names, TORCH_NAME.get(path[-1], path[-1]))))


def _torch_shape(variable: nnx.Variable[Any]) -> tuple[int, ...]:
    shape = variable.shape
    return tuple(shape[axis] for axis in TO_TORCH[len(shape)])


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the torch-style state dict of a module, whose leaves may be abstract (`nnx.eval_shape`)."""
    return {_torch_key(path): _torch_shape(variable) for path, variable in nnx.to_flat_state(nnx.state(model))}


def mismatches(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One phrase for every key that is missing, unexpected or of another shape."""
    missing = [f"{k} expected {s} found nothing" for k, s in expected.items() if k not in found]
    shapes = [f"{k} expected {s} found {found[k]}" for k, s in expected.items() if k in found and found[k] != s]
    extra = [f"{k} expected nothing found {s}" for k, s in found.items() if k not in expected]
    return missing + shapes + extra


def from_state_dict(model: Module, arrays: Mapping[str, np.ndarray]) -> Module:
    """A module with the weights of a torch-style state dict.

    Args:
        model: any NNX module whose attribute names are those of the state dict; its leaves may be abstract (`nnx.eval_shape`).
        arrays: convolutions OIHW, linear layers [out, in], BatchNorm weight, bias, running_mean, running_var, under names that
            `canonical` understands.

    Returns:
        A new module of the same structure with float32 leaves.

    Raises:
        ValueError: says which keys do not match, with the expected and the found shape, or hold non-finite numbers.
    """
    graph, state = nnx.split(model)
    expected = shapes(model)
    arrays = canonical(arrays, own={key.partition(".")[0] for key in expected}).arrays
    wrong = mismatches(expected, {key: array.shape for key, array in arrays.items()})
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(expected.keys() | arrays.keys())} keys do not match: {listed(wrong)}")
    not_finite = [k for k, v in arrays.items() if not (jnp.issubdtype(v.dtype, jnp.floating) and np.isfinite(v).all())]
    if not_finite:
        raise ValueError(f"not finite floating-point numbers: {listed(not_finite, ', ')}")

    def filled(path: tuple[Any, ...], variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        value = arrays[_torch_key(path)].astype(np.float32)
        return variable.replace(jnp.asarray(value.transpose(FROM_TORCH[value.ndim])))

    flat = [(path, filled(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def to_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """The torch-style state dict of a module: inverse of `from_state_dict`."""

    def array(value: Array) -> np.ndarray:
        return np.asarray(np.asarray(value).transpose(TO_TORCH[value.ndim]), order="C")

    flat = nnx.to_flat_state(nnx.state(model))
    return {_torch_key(path): array(variable.get_value()) for path, variable in flat}


def save(model: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write a module's weights as a torch-style `.npz` or `.safetensors`, atomically."""
    write_arrays(path, to_state_dict(model))
