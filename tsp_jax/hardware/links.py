"""Link model: time of a collective, a fixed cost and received bytes over the rate of the links that it uses."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from tsp_jax.errors import ConfigError
from tsp_jax.hardware import rates
from tsp_jax.hardware.devices import TPU_TOPOLOGIES, Hardware
from tsp_jax.hardware.rates import Level

COLLECTIVES = (*rates.COLLECTIVES, "collective-broadcast")


def collective_seconds(
    hardware: Hardware, op: str, received_bytes: float, groups: Sequence[Sequence[int]], level: Level = "typical"
) -> float:
    """Seconds that a collective (one of `COLLECTIVES`) keeps the links busy; the slowest group or pair counts.

    Within a node, it takes a fixed cost, and the received bytes over a rate, both of its kind (`Rates.collective`). The
    rate is of a device that uses all its links. On a full mesh, a device in a group of g uses g - 1 links at once. On a
    switch, a device has one link. On a torus, a device uses its links along every dimension in which the group has
    another member: two links if the dimension is longer than 2, else one (slices are assumed to wrap around). A permute
    uses one link per device.

    Across nodes. If m of the g members of a group share a node, (g - m) / (g - 1) of the bytes that they receive come
    from other nodes. In an all-to-all, these bytes enter over the network card of the device that receives them. In
    other collectives, they enter the node once, over m network cards. The links pass bytes on while more bytes enter,
    so the slower of network and links counts, each with its fixed cost.

    `received_bytes` is per device, as `tsp_jax.inspect.list_collectives` counts it. `groups` holds the device numbers
    of each group, or a permute's (source, target) pairs. A node is `node_size` consecutive devices.

    Raises:
      ConfigError: the op is unknown, or no known slice of a torus has so many devices.
    """
    if op not in COLLECTIVES:
        raise ConfigError(f"op={op} is no collective; use one of {', '.join(COLLECTIVES)}")
    if op == "collective-permute":
        return max((_pair_seconds(hardware, received_bytes, *pair, level=level) for pair in groups), default=0.0)
    extents = _extents(hardware, groups) if hardware.links == "torus" else ()
    return max((_group_seconds(hardware, op, received_bytes, group, extents, level) for group in groups), default=0.0)


def link_model(hardware: Hardware) -> str:
    """The rules of `collective_seconds` for one kind of device, in one line."""
    inside = {
        "host": "all transfers share the host's memory",
        "switch": "one link per device",
        "full_mesh": f"{hardware.num_links} links per device; in a group of g it uses g - 1, in a permute one",
        "torus": f"{hardware.num_links} links per device; it uses those along its group's dimensions (wrapped), in a "
        "permute one",
    }[hardware.links]
    network = hardware.rates.between_nodes
    return (
        f"links: {inside}; between nodes of {hardware.node_size}, {network.bytes_per_s.text(1e9)} GB/s per device and "
        f"{network.fixed_s.text(1e-6)} us"
    )


def _pair_seconds(hardware: Hardware, received: float, source: int, target: int, level: Level) -> float:
    if source == target:
        return 0.0
    inside = source // hardware.node_size == target // hardware.node_size
    row = hardware.rates.collective("collective-permute") if inside else hardware.rates.between_nodes
    return row.fixed_s.cost(level) + received / row.bytes_per_s.rate(level)


def _group_seconds(
    hardware: Hardware, op: str, received: float, group: Sequence[int], extents: Sequence[int], level: Level
) -> float:
    row, network = hardware.rates.collective(op), hardware.rates.between_nodes
    nodes: dict[int, list[int]] = {}
    for device in group:
        nodes.setdefault(device // hardware.node_size, []).append(device)
    slowest = 0.0
    for members in nodes.values() if len(group) > 1 else ():
        shared_by = 1 if op == "all-to-all" else len(members)
        entering = received * (len(group) - len(members)) / (len(group) - 1)
        if len(nodes) > 1:
            card = entering / shared_by / network.bytes_per_s.rate(level)
            slowest = max(slowest, network.fixed_s.cost(level) + card)
        if len(members) > 1:
            rate = row.bytes_per_s.rate(level) * _share_of_links(hardware, members, extents)
            slowest = max(slowest, row.fixed_s.cost(level) + (received - entering / shared_by) / rate)
    return slowest


def _share_of_links(hardware: Hardware, members: Sequence[int], extents: Sequence[int]) -> float:
    """Share of its links over which the member with the fewest receives from the other members of its node."""
    links = hardware.num_links
    if hardware.links == "full_mesh":
        links = min(len(members) - 1, hardware.num_links)
    elif hardware.links == "torus":
        places = [coordinates(device, extents) for device in members]
        links = max(1, min(_torus_links(places, extents)))
    return links / hardware.num_links


def _torus_links(places: Sequence[tuple[int, ...]], extents: Sequence[int]) -> list[int]:
    """Number of links that the device at each place uses; the places differ.

    It uses a dimension's links if another device differs from it in that dimension and in no other.
    """
    used = [0] * len(places)
    for k, extent in enumerate(extents):
        lines = [place[:k] + place[k + 1 :] for place in places]
        on_line = Counter(lines)
        links = 2 if extent > 2 else 1
        used = [n + links * (on_line[line] > 1) for n, line in zip(used, lines, strict=True)]
    return used


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
