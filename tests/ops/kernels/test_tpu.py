"""The TPU kernel: tiles, lists of pairs and cores, interpreted on a CPU; compiled for TPUs where their compiler is."""

import dataclasses
import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near
from tests.builders.attention import Case, S, jitted_run, run, run_reference, sharded_run
from tests.builders.targets import needs_compiler
from tsp_jax.hardware.targets import HARDWARE, Target
from tsp_jax.inspect import parse
from tsp_jax.inspect.scopes import declared_flops
from tsp_jax.ops.kernels import TpuKernel, arch_of, pairs, tpu
from tsp_jax.ops.kernels.mask import Tokens, tiles_to_visit
from tsp_jax.ops.kernels.pairs import FIRST, FIRST_OF_ROW, FLAG_BITS, LAST, MASK, RUN, PairList
from tsp_jax.ops.kernels.tpu_tiles import CORES, Tile, Tiles, fit
from tsp_jax.training.data import sequence_order

KERNEL = TpuKernel("interpret")
P = PartitionSpec
TILES = {
    "that do not divide": Tiles(Tile(32, 32, 16), Tile(32, 20, 10), Tile(20, 32, 5)),
    "longer than the sequence": Tiles(*(Tile(64, 64, 64),) * 3),
    "in one part": Tiles(*(Tile(8, 8, 8),) * 3),
}


@pytest.fixture
def no_room_for_dq(monkeypatch):
    """As in sequences so long that dq of all queries does not fit into VMEM."""
    monkeypatch.setitem(tpu.CORES, "interpret", CORES["interpret"]._replace(vmem_bytes=0))


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_tiles_of_any_size_compute_the_same(tiles):
    case = Case(packed=True)
    actual = jitted_run(TpuKernel("interpret", tiles), *case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize(
    "case",
    [Case(packed=True), Case(kv_heads=1, group=1, ranks=4, rank=1), Case(kv_heads=2, group=3, batch=1)],
    ids=["odd heads", "one head", "even heads"],
)
def test_two_kernels_of_backward_compute_the_same(case, no_room_for_dq):
    """Not jitted: the limit of VMEM is no argument."""
    assert_trees_near(
        run(KERNEL, *case.arrays(), *case.tokens()), run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE
    )


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_spans_compute_the_same(packed, monkeypatch):
    """As in sequences so long that lists of single tiles would be large."""
    case = Case(ranks=2, rank=1, packed=packed)
    arrays = *case.arrays(), *case.tokens()
    monkeypatch.setattr(pairs, "MOST_ENTRIES", 10)
    assert PairList.of(*case.tokens(), Tile(12, 6, 6), by_key=False).span == 4
    assert_trees_near(
        run(TpuKernel("interpret", Tiles(*(Tile(12, 6, 3),) * 3)), *arrays), run_reference(*arrays), F32_TOLERANCE
    )


# ------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize(
    ("lengths", "chunk", "expected"),
    [
        ((16384, 131072), 8192, Tile(1024, 2048, 512)),
        ((200, 131072), 100, Tile(256, 2048, 512)),  # no chunk of whole units
        ((2048, 16384), 768, Tile(256, 256, 256)),
        ((130, 130), 0, Tile(256, 256, 256)),
    ],
)
def test_tiles_fit_the_tokens_and_the_chunks(lengths, chunk, expected):
    assert fit(Tile(1024, 2048, 512), False, *lengths, chunk, 128) == expected


def test_tiles_within_a_zigzag_chunk():
    assert TpuKernel("tpu_v5p").within(1536) == dataclasses.replace(TpuKernel("tpu_v5p"), chunk=768)


# ------------------------------------------------------------------------------------------------ lists of pairs


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("case", [Case(packed=True), Case(ranks=4, rank=2, batch=1)], ids=["packed", "zigzag"])
def test_a_list_has_every_visited_pair_once(case, by_key, cores):
    """Pairs of an own tile are neighbours, in one core's list, and the first and the last of them are marked."""
    queries, keys = case.tokens()
    tile = Tile(3, 4, 1)
    both = tiles_to_visit(queries, keys, tile.query, tile.key)
    visit, unmasked = (np.asarray(x.swapaxes(1, 2) if by_key else x) for x in both)
    found = PairList.of(queries, keys, tile, by_key, cores=cores)
    listed, num_own, num_other = [], *visit.shape[1:]
    for own, other in zip(np.asarray(found.own_cE), np.asarray(found.other_cE), strict=True):
        own, other = own[: int(found.number)], other[: int(found.number)]
        flags, changes = other & ((1 << FLAG_BITS) - 1), np.flatnonzero(np.diff(own)) + 1
        ran = flags != 0  # steps at the end of a shorter list have no flag, and stay at the last pair
        assert (np.flatnonzero(flags & FIRST) == [0, *changes]).all()
        assert (np.flatnonzero(flags & LAST) == [*(changes - 1), ran.sum() - 1]).all()
        rows = own // num_own
        assert (np.flatnonzero(flags & FIRST_OF_ROW) == [0, *(np.flatnonzero(np.diff(rows)) + 1)]).all()
        assert (own[~ran] == own[ran][-1]).all()
        for row, i, j, flag in zip(rows[ran], own[ran] % num_own, other[ran] >> FLAG_BITS, flags[ran], strict=True):
            listed.append((row, i, j % num_other))
            assert j // num_other == row
            assert bool(flag & RUN) == visit[row, i, j % num_other]
            assert bool(flag & MASK) == (visit & ~unmasked)[row, i, j % num_other]
    expected = visit.copy()
    expected[..., 0] |= ~visit.any(axis=2)
    assert sorted(listed) == sorted(zip(*np.nonzero(expected), strict=True))


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_cores_have_about_as_much_to_do(rank, by_key):
    found = PairList.of(*Case(ranks=2, rank=rank, batch=1).tokens(), Tile(3, 3, 1), by_key, cores=2)
    first, second = (np.asarray(found.other_cE) & RUN).sum(axis=1)
    assert abs(first - second) <= 0.05 * (first + second)


# ------------------------------------------------------------------------------------------------ declared products


@pytest.mark.parametrize(("ranks", "entries"), [(1, 1 << 16), (4, 1 << 16), (1, 100)])
@pytest.mark.parametrize("fused", [True, False])
def test_kernels_declare_the_products_of_the_tiles_that_they_visit(ranks, entries, fused, monkeypatch, request):
    """Zigzag chunks are whole tiles, so that every rank has the mean."""
    if not fused:
        request.getfixturevalue("no_room_for_dq")
    monkeypatch.setattr(pairs, "MOST_ENTRIES", entries)
    case, tiles = Case(kv_heads=2, ranks=ranks, batch=1), Tiles(Tile(2, 3, 1), Tile(3, 2, 1), Tile(3, 6, 1))

    def f(*arrays):
        return run(TpuKernel("interpret", tiles), *arrays)

    text = jax.jit(f).lower(*case.arrays(), *case.tokens()).as_text(debug_info=True)
    declared = Counter(float(n) for _, n in re.findall(r"mean_flops\[([^=]+)=([^\]]*)\]", text))
    products = [
        (2, tiles.forward, False),
        *([(5, tiles.dkv, True)] if fused else [(4, tiles.dkv, True), (3, tiles.dq, False)]),
    ]
    expected = set()
    for number, tile, by_key in products:
        visited = 0
        for rank in range(ranks):
            found = PairList.of(*case._replace(rank=rank).tokens(), tile, by_key)
            visited += found.span * int((np.asarray(found.other_cE[0, : int(found.number)]) & RUN).sum())
        size, heads = case.arrays()[0].shape[-1], case.kv_heads * case.group
        expected.add(2 * number * size * tile.query * tile.key * heads * visited / ranks)
    assert set(declared) == expected


# ------------------------------------------------------------------------------------------------ on a mesh


def test_under_shard_map():
    case = Case(packed=True, batch=1)
    order = sequence_order(S, 4, "zigzag")
    q, k, v, dout = (array[:, order] for array in case.arrays())
    tokens = Tokens(*(array[:, order] for array in case.tokens()[0]))
    mesh = jax.make_mesh((4,), ("tsp",), axis_types=(AxisType.Auto,))
    # The interpreter mixes its own constants, which do not vary over the mesh, with arrays that do.
    actual = jax.jit(sharded_run(mesh, KERNEL, check_vma=False))(q, k, v, dout, *tokens, *tokens)
    assert_trees_near(actual, run_reference(q, k, v, dout, tokens, tokens), F32_TOLERANCE)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_heads", "group", "length"),
    [
        (128, "bfloat16", 1, 1, 8192),
        (64, "bfloat16", 2, 4, 8192),
        (256, "bfloat16", 2, 1, 8192),
        (80, "float32", 1, 1, 1000),
        (128, "bfloat16", 1, 8, 65536),  # two kernels in backward
    ],
)
def test_kernels_compile_for_absent_tpus(head_dim, dtype, kv_heads, group, length):
    """On the concrete mesh of a topology, with its shardings: no scores in memory, and the products are declared."""
    needs_compiler("tpu")
    mesh = Mesh(np.array(Target(HARDWARE["v5p"], 8).devices()), ("tsp",), axis_types=(AxisType.Auto,))
    kernel = TpuKernel(arch_of(mesh)).within(length // 8)

    def like(*shape, dtype="int32", spec=P()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    split = P(None, "tsp")
    q = like(1, length, kv_heads, group, head_dim, dtype=dtype, spec=split)
    k = like(1, length, kv_heads, head_dim, dtype=dtype)
    own, every = like(1, length, spec=split), like(1, length)
    text = jax.jit(sharded_run(mesh, kernel)).lower(q, k, k, q, own, own, every, every).compile().as_text()
    kinds = Counter(found[0] for i, _ in parse(text).walk() if (found := declared_flops(i)))
    assert kinds == {
        f"attention_forward.tpu.h{head_dim}": 1,
        f"attention_backward.tpu.h{head_dim}": 2 if group == 8 else 1,
    }
    assert f"{length // 8},{length}]" not in text
