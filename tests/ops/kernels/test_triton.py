"""The Triton kernel: tiles and visit lists, interpreted on a CPU; compiled for GPUs where their compilers are."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near
from tests.builders.attention import Case, H, S, jitted_run, run, run_reference, sharded_run
from tests.builders.targets import needs_compiler
from tsp_jax.hardware.targets import HARDWARE, Target
from tsp_jax.inspect import parse
from tsp_jax.inspect.scopes import declared_flops
from tsp_jax.ops.kernels import TritonKernel, arch_of, visits
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.kernels.tiles import Tile, Tiles, padded_head_dim
from tsp_jax.training.data import sequence_order

KERNEL = TritonKernel("interpret")
P = PartitionSpec
TILES = {
    "that do not divide": Tiles(Tile(32, 32, 4, 1), Tile(32, 8, 4, 1), Tile(8, 32, 4, 1)),
    "longer than the sequence": Tiles(*(Tile(64, 64, 4, 1),) * 3),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_tiles_of_any_size_compute_the_same(tiles):
    case = Case(packed=True)
    actual = jitted_run(TritonKernel("interpret", tiles), *case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_spans_compute_the_same(packed, monkeypatch):
    """As in sequences so long that lists of single tiles would be large."""
    case = Case(ranks=2, rank=1, packed=packed)
    arrays = *case.arrays(), *case.tokens()
    single = run(KERNEL, *arrays)
    assert visits.span_of(3, 6) == 1
    monkeypatch.setattr(visits, "MOST_ENTRIES", 10)
    assert [visits.span_of(3, n) for n in (2, 6, 7, 8)] == [1, 2, 1, 4]
    assert_trees_near(run(KERNEL, *arrays), single, F32_TOLERANCE)


# ------------------------------------------------------------------------------------------------ declared products


def counted_flops(case: Case, tiles: Tiles) -> list[float]:
    """FLOPs of the three kernels from the tiles that they visit, mean over all ranks of a zigzag."""
    flops = []
    for products, tile, by_key in zip((2, 3, 4), tiles, (False, False, True), strict=True):
        pairs = 0
        for rank in range(case.ranks):
            tokens = case._replace(rank=rank).tokens()
            pairs += int(visits.Plan.of(*tokens, tile, by_key).visits.visited.sum())
        size = padded_head_dim(case.arrays()[0].shape[-1])
        heads = case.kv_heads * case.group
        flops.append(2 * products * size * tile.query * tile.key * heads * pairs / case.ranks)
    return flops


@pytest.mark.parametrize(("ranks", "entries"), [(1, 1 << 22), (4, 1 << 22), (1, 100)])
def test_kernels_declare_the_products_of_the_tiles_that_they_visit(ranks, entries, monkeypatch):
    """Zigzag chunks are whole tiles, so that every rank has the mean."""
    monkeypatch.setattr(visits, "MOST_ENTRIES", entries)
    case, tiles = Case(ranks=ranks), Tiles(Tile(2, 3, 1, 1), Tile(3, 2, 1, 1), Tile(3, 6, 1, 1))
    kernel = TritonKernel("interpret", tiles)
    text = jax.jit(lambda *arrays: run(kernel, *arrays)).lower(*case.arrays(), *case.tokens()).as_text(debug_info=True)
    declared = {float(n): kind for kind, n in re.findall(r"mean_flops\[([^=]+)=([^\]]*)\]", text)}
    forward, dq, dkv = counted_flops(case, tiles)
    kinds = [f"attention_{each}.triton.h{padded_head_dim(H)}" for each in ("forward", "backward", "backward")]
    assert declared == dict(zip((forward, dq, dkv), kinds, strict=True))


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


def devices_of(name: str):
    """Devices of a topology."""
    needs_compiler(HARDWARE[name].platform)
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
    kernel = TritonKernel(arch_of(mesh))

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
    text = jax.jit(sharded_run(mesh, kernel)).lower(q, k, k, q, *tokens).compile().as_text()
    declared = [found for i, _ in parse(text).walk() if (found := declared_flops(i))]
    assert Counter(found.work.direction for found in declared) == {"forward": 1, "backward": 2}
    assert {(found.work.kernel, found.work.head_dim) for found in declared} == {("triton", padded_head_dim(head_dim))}
    least = 2 * 9 * (length // 8) * (length / 2) * kv_heads * group * head_dim
    assert least < sum(flops for _, flops in declared) < 2.2 * least  # heads of 80 are padded to 128
    assert f"{length // 8},{length}]" not in text
