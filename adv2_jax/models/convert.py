"""Torch-style state dicts to Flax NNX modules and back.

A module whose attributes carry the PyTorch names needs no table: `layer1.0.conv1.kernel` is `layer1.0.conv1.weight` with its axes
moved. Only the names of the parameters themselves and the layouts differ.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from adv2_jax.files import write_arrays

Module = TypeVar("Module", bound=nnx.Module)

TORCH_NAME = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # convolution HWIO -> OIHW, linear IO -> OI
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def _torch_key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, (*path[:-1], TORCH_NAME[path[-1]])))


def _torch_shape(variable: nnx.Variable[Any]) -> tuple[int, ...]:
    shape = variable.shape
    return tuple(shape[axis] for axis in TO_TORCH[len(shape)])


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
        arrays: convolutions OIHW, linear layers [out, in], BatchNorm weight, bias, running_mean, running_var. The entries
            `num_batches_tracked` are passed over, and a leading `module.` (DataParallel) is taken off.

    Returns:
        A new module of the same structure with float32 leaves.

    Raises:
        ValueError: lists every key that does not match, with the expected and the found shape, or holds non-finite numbers.
    """
    arrays = {k.removeprefix("module."): np.asarray(v) for k, v in arrays.items() if "num_batches_tracked" not in k}
    graph, state = nnx.split(model)
    variables = {_torch_key(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    wrong = mismatches({k: _torch_shape(v) for k, (_, v) in variables.items()}, {k: v.shape for k, v in arrays.items()})
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(variables.keys() | arrays.keys())} keys do not match: {'; '.join(wrong)}")
    not_finite = [k for k, v in arrays.items() if v.dtype.kind != "f" or not np.isfinite(v).all()]
    if not_finite:
        raise ValueError(f"not finite floating-point numbers: {', '.join(not_finite)}")

    def filled(key: str, variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        value = arrays[key].astype(np.float32).transpose(FROM_TORCH[arrays[key].ndim])
        return variable.replace(jnp.asarray(value))

    flat = [(path, filled(key, variable)) for key, (path, variable) in variables.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def to_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """The torch-style state dict of a module: inverse of `from_state_dict`."""

    def array(value: Array) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(value).transpose(TO_TORCH[value.ndim]))

    flat = nnx.to_flat_state(nnx.state(model))
    return {_torch_key(path): array(variable.get_value()) for path, variable in flat}


def save(model: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Write a module's weights as a torch-style `.npz`, atomically."""
    write_arrays(path, to_state_dict(model))
