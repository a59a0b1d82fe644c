"""Fused attention: interpreted on CPU against the plain mathematics; compiled for GPUs where their compilers are."""

import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near
from tests.builders.targets import installed
from tests.ops.kernels.test_xla import Case, S, poison, run_reference, run_reference_where
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import HARDWARE, Target
from tsp_jax.inspect import parse
from tsp_jax.inspect.scopes import declared_flops
from tsp_jax.ops import kernels
from tsp_jax.ops.kernels import triton as fused
from tsp_jax.ops.kernels import visits
from tsp_jax.ops.kernels.tiles import TILES, Tile, Tiles, head_size
from tsp_jax.ops.kernels.xla import MASKED, Blocks, Tokens
from tsp_jax.ops.stream import vary_alike
from tsp_jax.training.data import sequence_order

SMALL = TILES["interpret"][1 << 30]
P = PartitionSpec


def run(q, k, v, dout, queries, keys, tiles=SMALL, arch="interpret"):
    """(out, lse, (dq, dk, dv))"""
    options = {"arch": arch, "tiles": tiles}
    out, lse = fused.attend(q, k, v, queries, keys, Blocks(1, 1), **options)
    grads = fused.attend_backward(q, k, v, queries, keys, kernels.delta(out, dout), lse, dout, Blocks(1, 1), **options)
    return out, lse, grads


jitted_run = jax.jit(run, static_argnames=("tiles", "arch"))

CASES = {
    "plain": Case(),
    "one head": Case(kv_heads=1, group=1),
    "one group": Case(kv_heads=1, group=5),
    "packed": Case(packed=True),
    "zigzag, first of 4": Case(ranks=4, rank=0),
    "zigzag, packed, third of 4": Case(ranks=4, rank=2, packed=True),
    "zigzag, last of 2": Case(ranks=2, rank=1, batch=1),
}
MANY_TILES = {
    "of a power of two": SMALL,
    "that do not divide": Tiles(Tile(32, 32, 4, 1), Tile(32, 8, 4, 1), Tile(8, 32, 4, 1)),
    "longer than the sequence": Tiles(*(Tile(64, 64, 4, 1),) * 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_the_reference(case):
    actual = jitted_run(*case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize("tiles", MANY_TILES.values(), ids=MANY_TILES)
def test_tiles_of_any_size_compute_the_same(tiles):
    case = Case(packed=True)
    actual = jitted_run(*case.arrays(), *case.tokens(), tiles=tiles)
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_any_segments(seed):
    """Queries and keys in orders of their own, some queries without any key."""
    rng = np.random.default_rng(seed)
    case = Case()
    queries, keys = (
        Tokens(
            np.stack([rng.permutation(S) for _ in range(case.batch)]).astype(np.int32),
            rng.integers(0, seed + 1, (case.batch, S), np.int32),
        )
        for _ in range(2)
    )
    out, lse, grads = jitted_run(*case.arrays(), queries, keys)
    has_key = np.asarray(lse > MASKED / 2).all(axis=(2, 3))
    desired = run_reference_where(has_key, *case.arrays(), queries, keys)
    assert_trees_near((out, grads), desired, F32_TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_spans_compute_the_same(packed, monkeypatch):
    """As in sequences so long that lists of single tiles would be large."""
    case = Case(ranks=2, rank=1, packed=packed)
    arrays = *case.arrays(), *case.tokens()
    single = run(*arrays)
    assert visits.span_of(3, 6) == 1
    monkeypatch.setattr(visits, "MOST_ENTRIES", 10)
    assert [visits.span_of(3, n) for n in (2, 6, 7, 8)] == [1, 2, 1, 4]
    assert_trees_near(run(*arrays), single, F32_TOLERANCE)
    assert_trees_near(single, run_reference(*arrays), F32_TOLERANCE)


def test_a_query_without_keys_has_no_output_and_no_gradient():
    case = Case(packed=True)
    queries, keys = case.tokens()
    alone = np.arange(S) % 5 == 0
    queries = Tokens(queries.positions, np.where(alone, 99, queries.segments).astype(np.int32))
    out, lse, (dq, *others) = jax.device_get(jitted_run(*case.arrays(), queries, keys))
    assert not out[:, alone].any()
    assert not dq[:, alone].any()
    assert (lse[:, alone] == np.float32(MASKED)).all()
    assert all(np.isfinite(array).all() for array in (dq, *others))


def test_bfloat16_is_near_float32():
    case = Case(packed=True)
    half = tuple(jnp.asarray(array, jnp.bfloat16) for array in case.arrays())
    actual = jitted_run(*half, *case.tokens())
    assert [x.dtype for x in jax.tree.leaves(actual)] == [jnp.bfloat16, jnp.float32, *(jnp.bfloat16,) * 3]
    desired = run_reference(*(array.astype(jnp.float32) for array in half), *case.tokens())
    assert_trees_near(actual, desired, BF16_TOLERANCE)


# ------------------------------------------------------------------------------------------------ visited tiles


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_tiles_are_whole_or_needed_exactly_when_pairs_say_so(packed, rank):
    """Against every pair; with segments, a tile that is needed by its bounds may turn out to be empty."""
    case, tile = Case(ranks=4, rank=rank, packed=packed), Tile(4, 8, 1, 1)
    queries, keys = case.tokens()
    needed, whole = jax.device_get(
        visits.needed_tiles(Tokens(*map(jnp.asarray, queries)), Tokens(*map(jnp.asarray, keys)), tile)
    )
    allowed = (keys.positions[:, None] <= queries.positions[:, :, None]) & (
        keys.segments[:, None] == queries.segments[:, :, None]
    )
    pairs = allowed.reshape(case.batch, -1, tile.query, S // tile.key, tile.key)
    np.testing.assert_array_equal(whole, pairs.all(axis=(2, 4)))
    assert (needed >= pairs.any(axis=(2, 4))).all()
    if not packed:
        np.testing.assert_array_equal(needed, pairs.any(axis=(2, 4)))


@pytest.mark.parametrize("rank", [1, 3])
def test_keys_after_every_query_are_not_visited(rank):
    case = Case(ranks=4, rank=rank)
    queries, keys = case.tokens()
    later = keys.positions[0] > queries.positions.max()
    assert later.any()
    tiles = Tiles(*(Tile(2, 2, 1, 1),) * 3)  # a zigzag chunk of 6 tokens is whole tiles
    q, k, v, dout = case.arrays()
    clean = jax.device_get(jitted_run(q, k, v, dout, queries, keys, tiles=tiles))
    poisoned = jax.device_get(jitted_run(q, poison(k, later), poison(v, later), dout, queries, keys, tiles=tiles))
    chex.assert_trees_all_equal(poisoned, clean)
    assert not clean[2][1][:, later].any()


def test_queries_before_every_key_are_not_visited_backward():
    case = Case()
    queries, _ = case.tokens()
    q, k, v, dout = case.arrays()
    late, early = slice(S // 2, None), np.arange(S) < S // 2
    keys = Tokens(*(array[:, late] for array in queries))
    clean = jax.device_get(jitted_run(q, k[:, late], v[:, late], dout, queries, keys))
    poisoned = jax.device_get(jitted_run(poison(q, early), k[:, late], v[:, late], poison(dout, early), queries, keys))
    chex.assert_trees_all_equal(poisoned[2], clean[2])


# ------------------------------------------------------------------------------------------------ declared products


def counted_flops(case: Case, tiles: Tiles) -> list[float]:
    """Of the three kernels, mean over all ranks of a zigzag, from the tiles that they visit."""
    flops = []
    for products, tile, by_key in zip((2, 3, 4), tiles, (False, False, True), strict=True):
        pairs = 0
        for rank in range(case.ranks):
            tokens = case._replace(rank=rank).tokens()
            pairs += int(visits.Plan.of(*tokens, tile, by_key).visits.needed.sum())
        size = head_size(case.arrays()[0].shape[-1])
        heads = case.kv_heads * case.group
        flops.append(2 * products * size * tile.query * tile.key * heads * pairs / case.ranks)
    return flops


@pytest.mark.parametrize(("ranks", "entries"), [(1, 1 << 22), (4, 1 << 22), (1, 100)])
def test_kernels_declare_the_products_of_the_tiles_that_they_visit(ranks, entries, monkeypatch):
    """Chunks of the zigzag are whole tiles, so that every rank has the mean."""
    monkeypatch.setattr(visits, "MOST_ENTRIES", entries)
    case, tiles = Case(ranks=ranks), Tiles(Tile(2, 3, 1, 1), Tile(3, 2, 1, 1), Tile(3, 6, 1, 1))
    text = jax.jit(lambda *arrays: run(*arrays, tiles)).lower(*case.arrays(), *case.tokens()).as_text(debug_info=True)
    declared = {float(n): kind for kind, n in re.findall(r"mean_flops\[(\w+)=([^\]]*)\]", text)}
    forward, dq, dkv = counted_flops(case, tiles)
    assert declared == {forward: "attention_forward", dq: "attention_backward", dkv: "attention_backward"}


# ------------------------------------------------------------------------------------------------ on a mesh


def sharded_run(mesh: Mesh, tiles: Tiles | None, arch: str):
    """`run` on each device's queries, over all keys; gradients of keys are summed over the mesh."""

    def local(*arrays):
        q, k, v, dout, *tokens = vary_alike(*arrays)
        out, lse, (dq, dk, dv) = run(q, k, v, dout, Tokens(*tokens[:2]), Tokens(*tokens[2:]), tiles, arch)
        return out, lse, (dq, *jax.lax.psum((dk, dv), "tsp"))

    split, whole = P(None, "tsp"), P()
    specs = (split, whole, whole, split, split, split, whole, whole)
    out_specs = (split, split, (split, whole, whole))
    # The interpreter mixes its own constants, which do not vary over the mesh, with arrays that do.
    checked = arch != "interpret"
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=checked)


def test_under_shard_map():
    case = Case(packed=True, batch=1)
    order = sequence_order(S, 4, "zigzag")
    q, k, v, dout = (array[:, order] for array in case.arrays())
    tokens = Tokens(*(array[:, order] for array in case.tokens()[0]))
    mesh = jax.make_mesh((4,), ("tsp",), axis_types=(AxisType.Auto,))
    actual = jax.jit(sharded_run(mesh, SMALL, "interpret"))(q, k, v, dout, *tokens, *tokens)
    assert_trees_near(actual, run_reference(q, k, v, dout, tokens, tokens), F32_TOLERANCE)


def devices_of(name: str):
    """A topology's."""
    if not installed(HARDWARE[name].platform):
        pytest.skip("its compiler is not installed")
    return np.array(Target(HARDWARE[name], 8).devices())


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "group"),
    [(128, "bfloat16", 1), (64, "bfloat16", 4), (256, "bfloat16", 1), (80, "bfloat16", 1), (128, "float32", 1)],
)
@pytest.mark.parametrize("name", ["mi300x", "mi355x", "h100"])
def test_kernels_compile_for_absent_gpus(name, head_dim, dtype, group):
    """On the concrete mesh of a topology, with its shardings: three kernels, and no scores in memory."""
    mesh = Mesh(devices_of(name), ("tsp",), axis_types=(AxisType.Auto,))
    arch = kernels.arch_of(mesh)

    def like(*shape, dtype="int32", spec=P()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    length, kv_heads, split = 8192, 2, P(None, "tsp")
    q = like(1, length, kv_heads, group, head_dim, dtype=dtype, spec=split)
    k = like(1, length, kv_heads, head_dim, dtype=dtype)
    tokens = (
        like(1, length, spec=split),
        like(1, length, spec=split),
        like(1, length),
        like(1, length),
    )
    text = jax.jit(sharded_run(mesh, None, arch)).lower(q, k, k, q, *tokens).compile().as_text()
    declared = [found for i, _ in parse(text).walk() if (found := declared_flops(i))]
    assert Counter(kind for kind, _ in declared) == {"attention_forward": 1, "attention_backward": 2}
    least = 2 * 9 * (length // 8) * (length / 2) * kv_heads * group * head_dim
    assert least < sum(flops for _, flops in declared) < 2.2 * least  # heads of 80 are padded to 128
    assert f"{length // 8},{length}]" not in text


# ------------------------------------------------------------------------------------------------ choice


def abstract_mesh(kind: str, platform: str) -> AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((2,), ("tsp",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize(
    ("kind", "platform", "arch"),
    [
        ("AMD Instinct MI300X", "gpu", "gfx942"),
        ("AMD Instinct MI355X", "gpu", "gfx950"),
        ("gfx942", "gpu", "gfx942"),
        ("NVIDIA H100 80GB HBM3", "gpu", "sm_90"),
        ("NVIDIA A100", "gpu", ""),
        ("TPU v5p", "tpu", ""),
        ("cpu", "cpu", ""),
    ],
)
def test_devices_are_known_by_kind(kind, platform, arch):
    assert kernels.arch_of(abstract_mesh(kind, platform)) == arch


def test_a_mesh_without_devices_has_no_arch():
    assert kernels.arch_of(AbstractMesh((2,), ("tsp",), axis_types=(AxisType.Auto,))) == ""


def test_choice():
    gpu, cpu = abstract_mesh("gfx942", "gpu"), jax.make_mesh((2,), ("tsp",), axis_types=(AxisType.Auto,))
    assert kernels.choose("auto", gpu, 128, jnp.bfloat16) == "gfx942"
    assert kernels.choose("xla", gpu, 128, jnp.bfloat16) == ""
    assert kernels.choose("auto", gpu, 256, jnp.float32) == ""
    assert kernels.choose("auto", cpu, 128, jnp.bfloat16) == ""
    with pytest.raises(ConfigError, match=r"kernel=fused.*use kernel=xla"):
        kernels.choose("fused", cpu, 128, jnp.bfloat16)
    with pytest.raises(ConfigError, match="heads of 256 float32"):
        kernels.choose("fused", gpu, 256, jnp.float32)


@pytest.mark.parametrize("arch", ["", "interpret"])
def test_one_call_for_every_kernel(arch):
    case = Case(packed=True)
    q, k, v, dout = case.arrays()
    queries, keys = case.tokens()

    @jax.jit
    def both(q, k, v, dout, queries, keys):
        out, lse = kernels.attend(arch, q, k, v, queries, keys, case.blocks)
        return (
            out,
            lse,
            kernels.attend_backward(arch, q, k, v, queries, keys, kernels.delta(out, dout), lse, dout, case.blocks),
        )

    desired = run_reference(q, k, v, dout, queries, keys)
    assert_trees_near(both(q, k, v, dout, queries, keys), desired, F32_TOLERANCE)
