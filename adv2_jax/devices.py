"""Devices: how many there are, what memory they have, and where their programs are kept.

A batch is split over the devices of this host, and every device holds the whole network: images do
not see each other, so nothing is exchanged. Each device computes a batch of the same size whatever
their number; XLA then compiles the same program for it, and results have the same bits.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# jax 0.7 raises NotImplementedError for the gradient of a convolution of sharded images in `vmap`
SHARDS = jax.__version_info__ >= (0, 8)
AXIS = "batch"

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own
# Programs take up to 11 % more than XLA says of them (measured on CPU); images and results of a
# batch lie beside them, and so do gaps between buffers
SHARE = 0.75
# Larger batches are no faster, and a part of a run, which an interrupt costs, is a batch. On two
# cores GRAD on ResNet-20 takes 13 to 19 ms an image and step in any batch of 8 to 128; 256 images of
# the smallest network keep an H200 busy for milliseconds a step (docs/results.md)
MOST_ON_CPU, MOST = 32, 256


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


def free_memory() -> int | None:
    """Return the bytes that are free on a device; None where nothing tells."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    free = []
    if device.platform == "cpu":
        with contextlib.suppress(OSError):  # Linux only; what caches would give up counts as free
            meminfo = Path("/proc/meminfo").read_text()
            free += [1024 * int(kb) for kb in re.findall(r"MemAvailable: +(\d+) kB", meminfo)]
        with contextlib.suppress(OSError, ValueError):  # of a container; "max" is no limit
            limit, used = (
                int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current")
            )
            free.append(limit - used)
    # simulated devices share the memory of the machine
    return min(free) // jax.local_device_count() if free else None


def largest_batch(lowered: Callable[[int], jax.stages.Lowered]) -> int | None:
    """Return the largest batch of a program, a power of two, that a device has memory for.

    Costs two compilations, of batches of 2 and 4: memory is linear in the size.

    Args:
        lowered: size of the batch -> the program, lowered.

    Returns:
        1 to `MOST`; None where the backend does not say how much memory there is, or is needed.
    """

    def needed(size: int) -> int | None:
        stats = lowered(size).compile().memory_analysis()
        return stats and (
            stats.temp_size_in_bytes
            + stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
        )

    if (free := free_memory()) is None:
        return None
    two, four = needed(2), needed(4)
    if two is None or four is None:
        return None
    image, most = max((four - two) / 2, 1), MOST_ON_CPU if jax.default_backend() == "cpu" else MOST
    size = min((SHARE * free - (two - 2 * image)) / image, most)
    return 2 ** int(math.log2(max(size, 1)))


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
