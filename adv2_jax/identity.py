"""The identity of a run: fingerprints of its arrays, changes of its settings, and its machine."""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences between two settings in words; empty if there are none."""
    names = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    return "; ".join(f"{name} was {was.get(name)}, is {now.get(name)}" for name in names)


def tree_fingerprint(tree: Any) -> str:
    """Return the count of all numbers in a pytree, and a 64-bit hash of its arrays.

    Types, shapes, values and order of the arrays count; leaves that are no arrays and the structure
    of the tree do not. Of images that are decoded on demand, the digests stand for the pixels.
    """
    arrays = [_plain(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return f"{sum(array.size for array in arrays)} numbers {hash_of(arrays).hex()}"


def hash_of(arrays: Iterable[np.ndarray]) -> bytes:
    """Return 64 bits of the types, shapes and values of contiguous arrays."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        # type and shape in front tell how many bytes follow: no two lists of arrays read the same
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _plain(leaf: Any) -> np.ndarray:
    """Return a leaf as a contiguous array of NumPy; of a random key its data."""
    if hasattr(leaf, "digests"):  # `data.lazy.LazyImages`, which lies above this module
        return np.asarray(leaf.digests)
    # NumPy knows no random keys, and a network with dropout holds some
    is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    # not `ascontiguousarray`, which makes a vector of a single number
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf, order="C")


def environment() -> dict[str, Any]:
    """Return the versions of packages and the machine, for the summary."""
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
