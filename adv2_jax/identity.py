"""The identity of a run or a training: fingerprints of arrays, settings, and the machine."""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how two settings differ, in words; empty if they do not."""
    names = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    return "; ".join(f"{name} was {was.get(name)}, is {now.get(name)}" for name in names)


def fingerprint(arrays: Iterable[Any]) -> str:
    """Return how many numbers some arrays hold, and a hash of them, their types and shapes."""
    count, digest = 0, hashlib.blake2b(digest_size=8)
    for array in map(np.ascontiguousarray, arrays):
        count += array.size
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return f"{count} numbers {digest.hexdigest()}"


def tree_fingerprint(tree: Any) -> str:
    """Return the fingerprint of the arrays in a network or an image set."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return fingerprint(map(_plain, leaves))


def _plain(leaf: Any) -> np.ndarray:
    """Return a leaf as an array of NumPy, of a random key its raw data."""
    # NumPy knows no random keys, and a network with dropout holds some
    is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def environment() -> dict[str, Any]:
    """Return versions and machine, for the summary."""
    packages = ("adv2_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
