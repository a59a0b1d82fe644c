"""Groups of devices: how HLO writes which devices exchange data, and which mesh axes those are."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.links import coordinates
from tsp_jax.inspect.checks import misfit
from tsp_jax.inspect.instructions import Instruction
from tsp_jax.inspect.module import Module
from tsp_jax.inspect.shapes import ints

UNKNOWN_AXIS = "?"
MOST_DEVICES = 999_999
_OF_WHOLE_REPLICAS = ("all-reduce", "all-gather", "reduce-scatter")
_ATTRIBUTES = ("replica_groups", "device_ids", "source_target_pairs", "use_global_device_ids")
Groups = list[tuple[int, ...]]
"""device numbers of each group, or (source, target) pairs of a permute"""


def groups_of(module: Module, i: Instruction) -> Groups:
    """Device numbers of each group of a collective; for a permute, the (source, target) pairs.

    What a number in the text stands for follows the rules of XLA's ``GetCollectiveOpGroupMode``:

    - with ``use_global_device_ids``: a device
    - else, without ``channel_id``: a replica
    - else, in reductions and gathers: a replica with all its partitions
    - else: a partition

    The number of a device is replica * partitions + partition.

    Instructions with the same groups get the same list.

    Raises:
      ConfigError: the groups are in none of HLO's notations, or name more than `MOST_DEVICES`.
    """
    key = "groups", i.base, *map(i.attributes.get, _ATTRIBUTES), "channel_id" in i.attributes
    if key not in module.memo:
        module.memo[key] = _groups(module, i)
    return module.memo[key]


def _groups(module: Module, i: Instruction) -> Groups:
    replicas, partitions = module.replica_count, module.num_partitions
    channel = "channel_id" in i.attributes
    whole = channel and i.base in _OF_WHOLE_REPLICAS
    numbered = partitions if channel and not whole else replicas
    if i.attributes.get("use_global_device_ids") == "true":
        numbered = module.num_devices
    listed = _listed(i, numbered)
    if numbered == module.num_devices or max(map(max, listed), default=0) >= numbered:
        return listed
    if sum(map(len, listed)) * max(replicas, partitions) > 2 * MOST_DEVICES:
        raise misfit(i, f"names more than {MOST_DEVICES:,} devices")
    if whole:
        return [tuple(r * partitions + p for r in group for p in range(partitions)) for group in listed]
    if channel:
        return [tuple(r * partitions + p for p in group) for r in range(replicas) for group in listed]
    return [tuple(r * partitions + p for r in group) for p in range(partitions) for group in listed]


def _listed(i: Instruction, everyone: int) -> Groups:
    """The groups of numbers, or the pairs of a permute, as the text lists them."""
    if i.base == "collective-permute":
        text = i.attributes.get("source_target_pairs", "")
        pairs = _brace_groups(text)
        if any(len(pair) != 2 for pair in pairs):
            raise misfit(i, f"has source_target_pairs={text:.80}, which are no pairs")
        return pairs
    text = i.attributes.get("replica_groups", "{}")
    if "device_ids" in i.attributes:  # the parser reads the second half of a mesh's groups as an attribute of its own
        text += f", device_ids={i.attributes['device_ids']}"
    try:
        return replica_groups(text, everyone)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else "does not add up"
        raise misfit(i, f"has replica_groups={text:.80}, which {reason}") from None


def replica_groups(text: str, devices: int) -> Groups:
    """Groups of device numbers from any of HLO's three notations.

    The notations are ``{{0,1},{2,3}}`` (``{}`` means all devices), ``[groups,size]<=[dims]T(permutation)``, and
    ``mesh['a'=2,'b'=4] {'b'}``. The last may give the order of the devices in the mesh: ``mesh['a'=4,'b'=2],
    device_ids=([2,4]T(1,0)) {'b'}`` or ``device_ids=(1,0,...)``.

    Raises:
      ConfigError: the text is in none of these notations, or names more than `MOST_DEVICES`.
    """
    if re.fullmatch(r"\{\s*\}", text):
        return [tuple(range(devices))]
    if text.startswith("{"):
        return _brace_groups(text)
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _rows(ints(iota[2]), ints(iota[3] or ""), ints(iota[1])[-1])
    if mesh := re.fullmatch(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((.*)\))?\s*\{([^}]*)\}", text):
        groups, order = _mesh_groups(mesh[1], mesh[3]), _device_order(mesh[2])
        return [tuple(order[place] for place in group) for group in groups] if order else groups
    raise ConfigError("is in none of HLO's notations")


def axis_of_groups(groups: Groups, mesh_axes: Mapping[str, int] | None) -> str:
    """The mesh axes over which the groups run; '?' if no set of axes has exactly these groups."""
    if mesh_axes is None or not groups:
        return UNKNOWN_AXIS
    names, sizes = list(mesh_axes), list(mesh_axes.values())
    first = [coordinates(device, sizes) for device in groups[0]]
    axes = [k for k, values in enumerate(zip(*first, strict=True)) if len(set(values)) > 1]
    outside = [k for k in range(len(sizes)) if k not in axes]
    expected = _rows(sizes, outside + axes, math.prod(sizes[k] for k in axes))
    alike = set(map(frozenset, expected)) == set(map(frozenset, groups))
    return ",".join(names[k] for k in axes) if alike else UNKNOWN_AXIS


def axis_of_pairs(pairs: Groups, mesh_axes: Mapping[str, int] | None) -> tuple[str, int]:
    """(axes along which a permute sends, number of devices that its messages connect)."""
    if mesh_axes is None:
        return UNKNOWN_AXIS, _largest_component(pairs)
    sizes = list(mesh_axes.values())
    axes = {
        k
        for source, target in pairs
        for k, (a, b) in enumerate(zip(coordinates(source, sizes), coordinates(target, sizes), strict=True))
        if a != b
    }
    return ",".join(list(mesh_axes)[k] for k in sorted(axes)), math.prod(sizes[k] for k in axes)


def _device_order(text: str | None) -> Sequence[int]:
    """Device numbers in the order of the mesh; empty if they ascend."""
    if text and (iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)):
        return _rows(dims := ints(iota[1]), ints(iota[2] or ""), math.prod(dims))[0]
    return ints(text or "")


def _brace_groups(text: str) -> Groups:
    return [ints(group) for group in re.findall(r"\{([\d, ]*\d[\d, ]*)\}", text)]


def _rows(dims: Sequence[int], permutation: Sequence[int], size: int) -> Groups:
    """Numbers devices 0, 1, ... in an array of shape `dims`, transposes it, and splits it into rows of `size`.

    An empty permutation leaves the array as it is.
    """
    if not 1 <= math.prod(dims) <= MOST_DEVICES or not size or math.prod(dims) % size:
        raise ConfigError(f"names more than {MOST_DEVICES:,} devices, or no whole groups")
    order = np.arange(math.prod(dims)).reshape(dims).transpose(permutation or range(len(dims))).ravel().tolist()
    return [tuple(order[k : k + size]) for k in range(0, len(order), size)]


def _mesh_groups(mesh: str, axes: str) -> Groups:
    """Groups over named axes or a part of an axis: 'a':(2)4 splits axis a into 2 * 4 * the rest and takes the 4."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    parts = {name: (int(p), int(s)) for name, p, s in re.findall(r"'?([\w.\-]+)'?:\((\d+)\)(\d+)", axes)}
    chosen = re.findall(r"'?([\w.\-]+)'?(?::\(\d+\)\d+)?\s*(?:,|$)", axes)
    dims, inside = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, size))
        inside += [len(dims) + 1] if name in chosen else []
        dims += [before, part, size // (before * part)]
        if math.prod(dims[-3:]) != size:
            raise ValueError(size)
    outside = [k for k in range(len(dims)) if k not in inside]
    return _rows(dims, outside + inside, math.prod(dims[k] for k in inside))


def _largest_component(pairs: Groups) -> int:
    """Size of the largest set of devices that the messages connect."""
    members: dict[int, set[int]] = {}
    for source, target in pairs:
        few, many = sorted((members.get(device, {device}) for device in (source, target)), key=len)
        many |= few
        members.update(dict.fromkeys((*few, source, target), many))
    return max(map(len, members.values()), default=1)
