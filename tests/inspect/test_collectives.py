"""Collectives of real programs of the CPU compiler, and groups of devices in every notation."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.builders.hlo import BUCKETS, F32, LAYERS, MESH, D, compiled, entry, ring, text_of
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.inspect.groups import groups_of


def test_counts_and_bytes_of_nested_scans(module):
    found = {c.op: c for c in inspect.list_collectives(module, MESH)}
    assert len(found) == len(inspect.list_collectives(module, MESH)) == 4
    x = 8 * D * F32  # one device's [8, D]
    expected = {
        "all-gather": ("tsp", 4, LAYERS * BUCKETS, 3 * (D // 4) * D * F32),
        "collective-permute": ("tsp", 4, LAYERS, x),
        "all-reduce": ("data", 2, LAYERS, 2 * x // 2),
        "reduce-scatter": ("tsp", 4, LAYERS, 4 * x * 3 // 4),
    }
    assert {c.op: (c.axis, c.group_size, c.count, c.bytes) for c in found.values()} == expected
    assert all(c.dtype == "f32" and not c.is_async and c.elements * F32 == c.bytes for c in found.values())
    assert "tsp/mlp/bucket/all_gather" in found["all-gather"].scope
    assert "tsp/mlp/gradient" in found["reduce-scatter"].scope
    totals = inspect.total_by_op(found.values())
    assert totals["all-gather", "tsp"].bytes == LAYERS * BUCKETS * 3 * (D // 4) * D * F32
    assert totals["all-gather", "tsp"].count == 15
    assert [t.bytes for t in totals.values()] == sorted((t.bytes for t in totals.values()), reverse=True)


@pytest.mark.parametrize("axes", [{"data": 2, "tsp": 4}, {"tsp": 4, "data": 2}, {"a": 2, "data": 2, "tsp": 2}])
def test_axes_by_name_whatever_the_order_of_the_mesh(axes):
    size = axes["tsp"]

    def f(x):
        y = lax.psum(jnp.sin(ring(x, size=size)), ("data", "tsp"))
        y = lax.all_to_all(y, "tsp", 0, 1, tiled=True)
        return lax.all_gather(jnp.cos(y), "data", axis=0, tiled=True)

    module = inspect.parse(compiled(f, P(), P(), (8, D), axes=axes).as_text())
    assert module.num_partitions == 8
    found = {c.op: c for c in inspect.list_collectives(module, axes)}
    both = ",".join(axis for axis in axes if axis != "a")
    assert {op: c.axis for op, c in found.items()} == {
        "collective-permute": "tsp",
        "all-reduce": both,
        "all-to-all": "tsp",
        "all-gather": "data",
    }
    n, group = 8 * D * F32, axes["data"] * size
    assert found["all-to-all"].bytes == n * (size - 1) // size
    assert found["all-reduce"].bytes == 2 * n * (group - 1) // group
    assert all(c.axis == "?" and c.bytes == found[c.op].bytes for c in inspect.list_collectives(module))


def test_several_arrays_in_one_collective_are_one():
    def f(x, y):
        return lax.psum((jnp.sin(x), jnp.cos(y)), "tsp")

    program = compiled(f, P("data"), P("data"), (16, D), (32, D))
    found = inspect.list_collectives(inspect.parse(text_of(program)), MESH)
    assert sum(c.total_bytes for c in found) == 2 * 3 * (8 + 16) * D * F32 // 4
    assert len(found) == 1


def test_cpu_widens_bfloat16_so_elements_are_what_to_compare():
    def f(x):
        return lax.all_gather(jnp.tanh(x), "tsp", axis=0, tiled=True)

    wide, narrow = (
        inspect.list_collectives(inspect.parse(compiled(f, P("tsp"), P(), (16, D), dtype=dtype).as_text()), MESH)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert wide.elements == narrow.elements == 3 * 4 * D


def test_a_mesh_of_another_size_is_refused(module):
    with pytest.raises(ConfigError, match=r"mesh tsp=4 has 4 devices, the program 8"):
        inspect.list_collectives(module, {"tsp": 4})


def spellings(axes, over):
    """Groups over some axes of a mesh in HLO's three spellings."""
    ids = np.arange(np.prod(list(axes.values()))).reshape(*axes.values())
    names = list(axes)
    order = [k for k, a in enumerate(names) if a not in over] + [k for k, a in enumerate(names) if a in over]
    size = int(np.prod([axes[a] for a in over]))
    groups = ids.transpose(order).reshape(-1, size)
    dims, permutation = (",".join(map(str, values)) for values in (axes.values(), order))
    yield "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in groups) + "}"
    yield f"[{len(groups)},{size}]<=[{dims}]T({permutation})"
    mesh = ",".join(f"'{a}'={n}" for a, n in axes.items())
    yield f"mesh[{mesh}] {{{','.join(repr(a) for a in over)}}}"


@pytest.mark.parametrize("axes", [{"data": 2, "tsp": 4}, {"x": 2, "y": 3, "z": 4}, {"x": 4, "one": 1, "y": 2}])
def test_axes_of_groups_in_every_spelling(axes):
    devices = int(np.prod(list(axes.values())))
    wide = [a for a in axes if axes[a] > 1]
    for n in range(1, len(wide) + 1):
        for over in itertools.combinations(wide, n):
            for text in spellings(axes, over):
                line = (
                    f"  %p = f32[12]{{0}} parameter(0)\n  ROOT %g = f32[12]{{0}} all-to-all(%p), replica_groups={text}"
                )
                (c,) = inspect.list_collectives(entry(line, f"num_partitions={devices}"), axes)
                size = int(np.prod([axes[a] for a in over]))
                assert (c.axis, c.group_size, c.bytes) == (",".join(over), size, 48 * (size - 1) // size), text


@pytest.mark.parametrize(
    ("text", "axis", "size"),
    [
        ("{}, channel_id=1", "data,tsp", 8),
        ("{}", "", 1),
        ("[2,4]<=[8]", "tsp", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("{{0,1},{2,3},{4,5},{6,7}}", "?", 2),
        ("{{0,1,2},{3,4,5,6,7}}", "?", 5),
        ("mesh['a'=8] {'a':(2)4}", "tsp", 4),
        ("mesh[a=8] {a:(1)2}", "data", 2),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", "?", 2),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", "data", 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", "tsp", 4),
    ],
)
def test_other_groups(text, axis, size):
    line = f"  %p = f32[8]{{0}} parameter(0)\n  ROOT %g = f32[8]{{0}} all-reduce(%p), replica_groups={text}"
    (c,) = inspect.list_collectives(entry(line), MESH)
    assert (c.axis, c.group_size) == (axis, size)
    assert inspect.replica_groups("[4,2]<=[2,4]T(1,0)", 8) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    ordered = "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}"
    assert inspect.replica_groups(ordered, 8) == [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize(
    ("operands", "sizes", "sent"),
    [
        ("f32[128,32] %a, f32[128,128] %b, (s32[], s32[]) %i, (s32[], s32[]) %i", "{{16,32}}", 16 * 32),
        ("f32[128,128] %b, f32[128,128] %b, ((s32[]), (s32[])) %j, ((s32[]), (s32[])) %j", "{{1,8},{2,8}}", 24),
        ("(f32[128,32], f32[128,128]) %t, f32[128,128] %b, (s32[]) %i, (s32[]) %i", "{{1,8}, {2,8}}", 24),
    ],
)
@pytest.mark.parametrize("phase", ["", "-start"])
def test_a_permute_in_place_sends_its_slices(operands, sizes, sent, phase):
    """Not the whole operand."""
    names = re.findall(r"%\w+", operands)
    made = dict(zip(names, re.split(r" %\w+(?:, )?", operands), strict=False))
    lines = [f"  {name} = {shape} parameter({n})" for n, (name, shape) in enumerate(made.items())]
    shape = "(f32[128,128], f32[128,128])" if phase else "f32[128,128]"
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    lines += [f"  ROOT %x = {shape} collective-permute{phase}({', '.join(names)}), {pairs}, slice_sizes={sizes}"]
    (c,) = inspect.list_collectives(entry("\n".join(lines), header="num_partitions=4"))
    assert (c.bytes, c.elements) == (4 * sent, sent)


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1}}", [(0, 3), (1, 4), (2, 5)]),
        ("replica_groups={}", [(0, 3), (1, 4), (2, 5)]),
        ("replica_groups={{1},{0}}, channel_id=1", [(3, 4, 5), (0, 1, 2)]),
        ("replica_groups={}, channel_id=1", [(0, 1, 2, 3, 4, 5)]),
        ("replica_groups={{0,5},{1,4},{2,3}}, channel_id=1, use_global_device_ids=true", [(0, 5), (1, 4), (2, 3)]),
        ("replica_groups={}, channel_id=1, use_global_device_ids=true", [(0, 1, 2, 3, 4, 5)]),
        ("replica_groups={{0,1,2},{3,4,5}}", [(0, 1, 2), (3, 4, 5)]),  # no replica is 5: these are devices
    ],
)
def test_groups_of_two_replicas_of_three_partitions(attributes, groups):
    line = f"  %p = f32[6]{{0}} parameter(0)\n  ROOT %g = f32[6]{{0}} all-reduce(%p), {attributes}"
    module = entry(line, "replica_count=2, num_partitions=3")
    assert groups_of(module, module.entry.root) == groups


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("all-to-all(%p), channel_id=1, replica_groups={{0,1,2}}", [(0, 1, 2), (3, 4, 5)]),
        ("collective-permute(%p), channel_id=1, source_target_pairs={{0,1}}", [(0, 1), (3, 4)]),
        ("collective-permute(%p), source_target_pairs={{0,1}}", [(0, 3), (1, 4), (2, 5)]),
    ],
)
def test_groups_that_list_partitions_or_replicas(line, groups):
    module = entry(
        f"  %p = f32[6]{{0}} parameter(0)\n  ROOT %g = f32[6]{{0}} {line}", "replica_count=2, num_partitions=3"
    )
    assert groups_of(module, module.entry.root) == groups
