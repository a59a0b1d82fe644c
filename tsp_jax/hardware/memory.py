"""Memory of the devices that are present, and checks that arrays fit into it before they are made."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tsp_jax.errors import ConfigError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""file that holds the number of bytes that a container may use, or "max" (Linux, cgroup v2)"""


def memory_bytes(devices: Sequence[Any]) -> int | None:
    """Bytes of memory per device of this process; None if not known. Virtual CPU devices share the host's memory."""
    if not devices:
        return None
    if devices[0].platform == "cpu":
        return host_bytes() // len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit), default=None)


def host_bytes() -> int:
    """Memory of this host, or of the container that this process runs in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return physical


def shard_bytes(arrays: Any) -> int:
    """Bytes of one device's shards of abstract arrays."""
    shards = [(array.sharding.shard_shape(array.shape), array.dtype.itemsize) for array in jax.tree.leaves(arrays)]
    return sum(math.prod(shape) * itemsize for shape, itemsize in shards)


def check_room(what: str, nbytes: int, memory: int | None, advice: str) -> None:
    """Raises ConfigError, stating both sizes, if `nbytes` exceeds `memory`; accepts everything if `memory` is None."""
    if memory is not None and nbytes > memory:
        raise ConfigError(f"{what} needs {nbytes:,} bytes of memory, there are {memory:,}; {advice}")
