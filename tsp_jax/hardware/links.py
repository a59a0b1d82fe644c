"""How long a collective keeps the links busy, from bandwidth alone: no latency, no contention with other work."""

import itertools
import math
from collections.abc import Sequence

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import TPU_TOPOLOGIES, Hardware

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def collective_seconds(hardware: Hardware, op: str, received_bytes: float, groups: Sequence[Sequence[int]]) -> float:
    """How long a collective keeps the links busy, from bandwidth alone; the slowest group or pair decides.

    Within a node of a full mesh, g devices use g - 1 links of each at once, a permute one link. Behind a switch a
    device has one link for everything. In a torus a device uses its links along every dimension in which it has another
    member, two of a dimension longer than 2 (slices are taken to wrap around), a permute one.

    Across nodes, m of the g members being in a node: of what a gather or scatter moves, (g - m) / (g - 1) comes from
    other nodes, once a node, over m network cards; it is passed on within the node while more comes in, so that the
    slower of the two counts. An all-to-all has nothing to pass on: each card carries all that its device gets.

    Args:
      hardware: rates.
      op: one of `COLLECTIVES`.
      received_bytes: per device, as `tsp_jax.inspect.collectives` counts them.
      groups: device numbers of each group; of a permute the (source, target) pairs. Nodes are `node_size` consecutive
        devices.

    Raises:
      ConfigError: the op is unknown, or so many devices form no known slice of a torus.
    """
    if op not in COLLECTIVES:
        raise ConfigError(f"op={op} is no collective; use one of {', '.join(COLLECTIVES)}")
    if op == "collective-permute":
        return max((_pair_seconds(hardware, received_bytes, *pair) for pair in groups), default=0.0)
    extents = _extents(groups) if hardware.links == "torus" else ()
    return max((_group_seconds(hardware, op, received_bytes, group, extents) for group in groups), default=0.0)


def link_model(hardware: Hardware) -> str:
    """The rules of `collective_seconds` for one kind of device, in a line."""
    rate = f"{hardware.link_bandwidth / 1e9:g} GB/s"
    inside = {
        "host": f"{rate} for everything",
        "switch": f"one link of {rate} a device for everything",
        "full_mesh": f"{rate} a link, g - 1 links of a device in a group of g, one in a permute",
        "torus": f"{rate} a link, those along the dimensions of a group, which wrap around; one in a permute",
    }[hardware.links]
    return f"links: {inside}; {hardware.node_bandwidth / 1e9:g} GB/s a device between nodes of {hardware.node_size}"


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
    """bytes/s that the worst placed member receives from the others of its node."""
    links = 1
    if hardware.links == "full_mesh":
        links = min(len(members) - 1, hardware.num_links)
    elif hardware.links == "torus":
        places = [_place(device, extents) for device in members]
        links = max(1, min(_torus_links(place, places, extents) for place in places))
    return links * hardware.link_bandwidth


def _torus_links(place: Sequence[int], places: Sequence[Sequence[int]], extents: Sequence[int]) -> int:
    """Links of a device along the dimensions in which another member lies straight ahead."""
    differing = [[k for k in range(len(extents)) if place[k] != other[k]] for other in places]
    straight = {axes[0] for axes in differing if len(axes) == 1}
    return sum(2 if extents[k] > 2 else 1 for k in straight)


def _place(device: int, extents: Sequence[int]) -> tuple[int, ...]:
    """Coordinates of a device whose number counts row by row."""
    return tuple(device // math.prod(extents[k + 1 :]) % extent for k, extent in enumerate(extents))


def _extents(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Extents of the smallest slice that holds all devices."""
    devices = max(itertools.chain.from_iterable(groups), default=0) + 1
    size = min((size for size in TPU_TOPOLOGIES if size >= devices), default=None)
    if size is None:
        known = ", ".join(map(str, TPU_TOPOLOGIES))
        raise ConfigError(f"devices={devices} are more than the slices known here; use one of {known}")
    return tuple(int(extent) for extent in TPU_TOPOLOGIES[size].partition(":")[2].split("x"))
