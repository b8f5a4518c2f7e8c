"""Devices: the only module that knows how many there are, and where their programs are kept.

A batch is split over the devices of this host, and every device holds the whole network: images do
not see each other, so nothing is exchanged. Each device computes a batch of the same size whatever
their number; XLA then compiles the same program for it, and results have the same bits.
"""

import contextlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# jax 0.7 raises NotImplementedError for the gradient of a convolution of sharded images in `vmap`
SHARDS = jax.__version_info__ >= (0, 8)
AXIS = "batch"


def number_of_devices(count: int | None = None) -> int:
    """Return how many devices of this host are used.

    Args:
        count: of devices; None is all, or one where this JAX cannot split a batch.

    Raises:
        ValueError: there are not so many, or this JAX uses one only.
    """
    there = jax.local_device_count()
    if count is None:
        return there if SHARDS else 1
    if not 1 <= count <= there:
        raise ValueError(f"{count} devices are asked for, JAX sees {there} on this host")
    if count > 1 and not SHARDS:
        raise ValueError(
            f"{count} devices are asked for, and jax {jax.__version__} splits no batch: "
            "install jax 0.8 or later, or use one process for each device"
        )
    return count


@lru_cache
def _mesh(count: int) -> Mesh:
    # Auto: under explicit axes, JAX's default, indexing by a sharded array is refused
    return jax.make_mesh(
        (count,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:count]
    )


def spread(batch: Any, count: int) -> Any:
    """Move a batch to the devices, an equal share to each: leading axis [count * B]."""
    # one device needs no mesh: arrays go where JAX puts them
    shares = NamedSharding(_mesh(count), PartitionSpec(AXIS)) if count > 1 else None
    return jax.device_put(batch, shares)


def replicate(model: T, count: int) -> T:
    """Copy a pytree of arrays to every device; of one device it is returned as it is."""
    # building an NNX module anew takes milliseconds, and every `explain` comes here
    if count == 1:
        return model
    return jax.device_put(model, NamedSharding(_mesh(count), PartitionSpec()))


def keep_programs() -> None:
    """Keep compiled programs on disk, in the user's cache folder, from one process to the next.

    Compiling takes longer than a short run. JAX's own settings (`JAX_COMPILATION_CACHE_DIR`, ...)
    are left as they are; nothing is kept where the folder cannot be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adv2_jax"
    # every program: JAX keeps only those that take a second to compile, a run has a dozen of half
    # a second for each of these
    settings = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        for name, value in settings.items():
            if name.upper() not in os.environ:
                jax.config.update(name, value)
