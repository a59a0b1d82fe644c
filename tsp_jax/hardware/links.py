"""Link model: time of a collective from bandwidth alone, without latency or contention with other work."""

import itertools
import math
from collections.abc import Sequence

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import TPU_TOPOLOGIES, Hardware

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"
)  # fmt: skip


def collective_seconds(hardware: Hardware, op: str, received_bytes: float, groups: Sequence[Sequence[int]]) -> float:
    """Seconds that a collective (one of `COLLECTIVES`) keeps the links busy; the slowest group or pair counts.

    Within a node. On a full mesh, a device in a group of g uses g - 1 links at once. On a switch, a device has one
    link. On a torus, a device uses its links along every dimension in which the group has another member: two links if
    the dimension is longer than 2, else one (slices are assumed to wrap around). A permute uses one link per device.

    Across nodes. If m of the g members of a group share a node, (g - m) / (g - 1) of the bytes that they receive come
    from other nodes. In an all-to-all, these bytes enter over the network card of the device that receives them. In
    other collectives, they enter the node once, over m network cards. The links pass bytes on while more bytes enter,
    so the slower of network and links counts.

    `received_bytes` is per device, as `tsp_jax.inspect.list_collectives` counts it. `groups` holds the device numbers
    of each group, or a permute's (source, target) pairs. A node is `node_size` consecutive devices.

    Raises:
      ConfigError: the op is unknown, or no known slice of a torus has so many devices.
    """
    if op not in COLLECTIVES:
        raise ConfigError(f"op={op} is no collective; use one of {', '.join(COLLECTIVES)}")
    if op == "collective-permute":
        return max((_pair_seconds(hardware, received_bytes, *pair) for pair in groups), default=0.0)
    extents = _extents(hardware, groups) if hardware.links == "torus" else ()
    return max((_group_seconds(hardware, op, received_bytes, group, extents) for group in groups), default=0.0)


def link_model(hardware: Hardware) -> str:
    """The rules of `collective_seconds` for one kind of device, in one line."""
    rate = f"{hardware.link_bandwidth / 1e9:g} GB/s"
    inside = {
        "host": f"{rate} shared by all transfers",
        "switch": f"one link of {rate} per device",
        "full_mesh": f"{rate} per link; a device in a group of g uses g - 1 links, in a permute one",
        "torus": f"{rate} per link; a device uses the links along its group's dimensions (wrapped), in a permute one",
    }[hardware.links]
    return f"links: {inside}; {hardware.node_bandwidth / 1e9:g} GB/s per device between nodes of {hardware.node_size}"


def _pair_seconds(hardware: Hardware, received: float, source: int, target: int) -> float:
    if source == target:
        return 0.0
    inside = source // hardware.node_size == target // hardware.node_size
    return received / (hardware.link_bandwidth if inside else hardware.node_bandwidth)


def _group_seconds(hardware: Hardware, op: str, received: float, group: Sequence[int], extents: Sequence[int]) -> float:
    nodes: dict[int, list[int]] = {}
    for device in group:
        nodes.setdefault(device // hardware.node_size, []).append(device)
    slowest = 0.0
    for members in nodes.values() if len(group) > 1 else ():
        shared_by = 1 if op == "all-to-all" else len(members)
        outside = received * (len(group) - len(members)) / (len(group) - 1) / shared_by
        slowest = max(slowest, outside / hardware.node_bandwidth)
        if len(members) > 1:
            slowest = max(slowest, (received - outside) / _inside_bandwidth(hardware, members, extents))
    return slowest


def _inside_bandwidth(hardware: Hardware, members: Sequence[int], extents: Sequence[int]) -> float:
    """bytes/s that the member with the fewest links receives from the other members of its node."""
    links = 1
    if hardware.links == "full_mesh":
        links = min(len(members) - 1, hardware.num_links)
    elif hardware.links == "torus":
        places = [coordinates(device, extents) for device in members]
        links = max(1, min(_torus_links(place, places, extents) for place in places))
    return links * hardware.link_bandwidth


def _torus_links(place: Sequence[int], places: Sequence[Sequence[int]], extents: Sequence[int]) -> int:
    """Number of links that the device at `place` uses.

    It uses a dimension's links if another member of `places` differs from it in that dimension and in no other.
    """
    differing = [[k for k in range(len(extents)) if place[k] != other[k]] for other in places]
    straight = {axes[0] for axes in differing if len(axes) == 1}
    return sum(2 if extents[k] > 2 else 1 for k in straight)


def coordinates(device: int, extents: Sequence[int]) -> tuple[int, ...]:
    """Coordinates of a device in a mesh or torus whose devices are numbered in row-major order."""
    return tuple(device // math.prod(extents[k + 1 :]) % extent for k, extent in enumerate(extents))


def _extents(hardware: Hardware, groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Extents of the smallest slice that has all the devices; the last one counts the devices of a chip, if several."""
    devices = max(itertools.chain.from_iterable(groups), default=0) + 1
    slices = TPU_TOPOLOGIES[hardware.name]
    size = min((size for size in slices if size >= devices), default=None)
    if size is None:
        known = ", ".join(map(str, slices))
        raise ConfigError(f"devices={devices} are more than the slices known here; use one of {known}")
    extents = tuple(int(extent) for extent in slices[size].partition(":")[2].split("x"))
    return (*extents, hardware.devices_per_chip) if hardware.devices_per_chip > 1 else extents
