"""Products of rows grouped by expert: many tiles at once, on a CPU, against one product a tile.

Dims: T tokens, D model, E experts, F ffn, k experts of a token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.ops import compiled_value_and_grads
from tests.builders.targets import needs_compiler
from tsp_jax.config.experts import Slabs
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.hardware.targets import Target
from tsp_jax.inspect.parser import parse
from tsp_jax.inspect.scopes import declared_flops
from tsp_jax.layout import Axes, place
from tsp_jax.ops.experts import ExpertBiases, experts
from tsp_jax.ops.grouped import Blocks, KernelBlocks, OneByOne, TritonGrouped, choose_grouped
from tsp_jax.ops.router import Choices
from tsp_jax.ops.stream import Stream
from tsp_jax.stored import ExpertPadding

T, D, E, F, K = 48, 64, 6, 48, 2
BLOCKS = KernelBlocks(*3 * [Blocks(8, 32, 16, 4, 1, together=3)], Blocks(16, 32, 8, 4, 1, together=2))


class Short(TritonGrouped):
    """Slabs of two tiles, so that there are several, and experts that two of them share."""

    slabs = Slabs(16, 128, 32)


def run(grouped, chosen, x, mix, *weights, buckets=2):
    """`weights`: three, or three and their biases."""

    def local(x, mix, gate, up, down, *biases):
        return experts(
            x[None], Choices(chosen, mix), gate, up, down, num_experts=E, stream=Stream(buckets=buckets), tile=16,
            grouped=grouped, biases=ExpertBiases(*biases) if biases else None,
            activation="clamped_swiglu" if biases else "silu",
        )  # fmt: skip

    return compiled_value_and_grads(local, normal(9, 1, len(x), D), x, mix, *weights)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("favourite", [None, 1])
@pytest.mark.parametrize("grouped", [TritonGrouped("interpret", BLOCKS), Short("interpret", BLOCKS)])
def test_equals_one_product_a_tile(grouped, favourite, biased):
    """Also where all tokens choose the same two experts, and no token the others."""
    chosen = np.argsort(normal(0, T, E), axis=1)[:, :K].astype(np.int32)[None]
    if favourite is not None:
        chosen = np.tile(np.array([favourite, 4], np.int32), (1, T, 1))
    args = normal(1, T, D), normal(2, 1, T, K), *(normal(seed, E * F, D, std=D**-0.5) for seed in (3, 4, 5))
    if biased:  # an expert's biases are the first F elements of a row of D
        biases = (normal(seed, E, D) * (np.arange(D) < F) for seed in (6, 7))
        args = *args, *(bias.astype(np.float32) for bias in biases), normal(8, E, D)
    assert_trees_near(run(grouped, chosen, *args), run(OneByOne(), chosen, *args), F32_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "stream.expert_kernel=triton: runs on gfx942, gfx950, sm_90, not on cpu; use .*=xla"),
        ("cudnn", "stream.expert_kernel=cudnn is unknown; use one of auto, triton, xla"),
    ],
)
def test_refuses_by_name(name, message):
    with pytest.raises(ConfigError, match=message):
        choose_grouped(name, place("single", data=1).mesh, D, F, jnp.bfloat16)


def test_auto_takes_what_the_devices_have():
    assert isinstance(choose_grouped("auto", place("single", data=1).mesh, D, F, jnp.bfloat16), OneByOne)
    assert TritonGrouped("sm_90").unsupported(2048, 768, jnp.bfloat16) == ""
    assert "multiples of 16, not 2048 and 100" in TritonGrouped("gfx942").unsupported(2048, 100, jnp.bfloat16)
    assert "computes in bfloat16, not in float32" in TritonGrouped("gfx942").unsupported(2048, 768, jnp.float32)


def test_slabs_of_one_tile_where_tokens_are_few():
    """Fewer choices than experts, one expert in a bucket: a slab has one tile, and mostly none is filled."""
    chosen = np.array([[[0, 3], [3, 5]]], np.int32)
    args = normal(1, 2, D), abs(normal(2, 1, 2, K)), *(normal(3 + i, E * F, D) / 8 for i in range(3))
    one_by_one, grouped = (
        run(each, chosen, *args, buckets=E) for each in (OneByOne(), TritonGrouped("interpret", BLOCKS))
    )
    assert_trees_near(grouped, one_by_one, F32_TOLERANCE)


@pytest.mark.parametrize("name", ["mi300x", "h100"])
def test_compiles_for_absent_gpus(name):
    """Under shard_map, forward and backward: kernels that declare the products of a quarter of the experts."""
    needs_compiler(HARDWARE[name].platform)
    mesh = Mesh(np.array(Target(HARDWARE[name], 8).devices())[:4], ("tsp",), axis_types=(AxisType.Auto,))
    tokens, d_model, number, d_ff, per_token = 4096, 256, 8, 384, 2
    grouped = choose_grouped("auto", mesh, d_model, d_ff, jnp.bfloat16)
    op = functools.partial(experts, num_experts=number, axes=Axes(folded=("tsp",)), stream=Stream(buckets=2))

    def local(x, chosen, mix, *weights):
        return op(x, Choices(chosen, mix), *weights, grouped=grouped)

    def loss(x, mix, chosen, *weights):
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(P(None, "tsp"),) * 3 + (P("tsp"),) * 3, out_specs=P(None, "tsp")
        )
        return run(x, chosen, mix, *weights).astype(jnp.float32).sum()

    def like(*shape, dtype="bfloat16", spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    split = P(None, "tsp")
    rows = [like(number * d_ff, d_model, dtype="float32", spec=P("tsp"))] * 3
    args = (
        like(1, tokens, d_model, spec=split), like(1, tokens, per_token, dtype="float32", spec=split),
        like(1, tokens, per_token, dtype="int32", spec=split), *rows,
    )  # fmt: skip
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 3, 4, 5))).lower(*args).compile().as_text()
    declared = [(found, times) for i, times in parse(text).walk() if (found := declared_flops(i))]
    assert {found.work.kernel for found, _ in declared} == {"grouped"}
    # 2 products of x, 1 of dy, 2 in dx and 3 gradients, of each of two buckets
    routed = 2 * d_model * d_ff * per_token * tokens / 4
    assert 8 * routed <= sum(times * found.flops for found, times in declared) <= 1.15 * 8 * routed


@pytest.mark.parametrize("stream", [Stream(buckets=2), Stream("activations", token_buckets=2)])
def test_over_folded_ranks(stream):
    """Slabs with experts of several ranks, two of which are padding, and of this rank for all ranks' tokens."""
    placement = place_case("tsp4")
    padding = ExpertPadding(E, F, folded=4)
    chosen = np.argsort(normal(0, T, E), axis=1)[:, :K].astype(np.int32)[None]
    args = normal(1, 1, T, D), normal(2, 1, T, K), *(normal(seed, E * F, D, std=D**-0.5) for seed in (3, 4, 5))
    split, rows = P(None, "tsp", None), P("tsp", None)

    def on(grouped, check):
        def local(x, mix, chosen, *weights):
            return experts(
                x, Choices(chosen, mix), *weights, num_experts=E, axes=Axes(folded=("tsp",)), stream=stream, tile=16,
                grouped=grouped,
            )  # fmt: skip

        specs = (split, split, split, rows, rows, rows)
        # The interpreter mixes its own constants, which do not vary over the mesh, with arrays that do.
        run = jax.shard_map(local, mesh=placement.mesh, in_specs=specs, out_specs=split, check_vma=check)
        return compiled_value_and_grads(
            lambda x, mix, *weights: run(x, mix, chosen, *map(padding.pad, weights)), normal(9, 1, T, D), *args
        )  # fmt: skip

    assert_trees_near(on(TritonGrouped("interpret", BLOCKS), False), on(OneByOne(), True), F32_TOLERANCE)
