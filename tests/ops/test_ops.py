"""Each op under its layouts, value and every gradient, against the plain mathematics.

The inputs differ at every position and row, and no two dimensions of a device's slices are alike, so that neither a
reversed ring nor a transposition can hide.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import (
    BF16_TOLERANCE,
    F32_TOLERANCE,
    assert_trees_near,
    normal,
    packed_batch,
    place_case,
    zigzag,
)
from tsp_jax.heads import Heads, pad_heads
from tsp_jax.layout import largest_divisor
from tsp_jax.ops import reference
from tsp_jax.ops.attention.train import AttentionConfig, AttentionWeights, HeadNorms, attention
from tsp_jax.ops.cross_entropy import cross_entropy
from tsp_jax.ops.embedding import embed
from tsp_jax.ops.kernels import XlaKernel
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.linear import matmul, matmul_t, outer
from tsp_jax.ops.mlp import ACTIVATIONS, mlp
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.rope import rope
from tsp_jax.ops.sequence import gather_sequence, scatter_sequence
from tsp_jax.ops.stream import Stream

B, S, D, F, V = 2, 48, 20, 120, 72
LARGE_LOGITS_TOLERANCE = 1e-3
"""relative; a logit of 500 is known to 5e-5, and so is the logarithm of its probability"""
ALL_MOVEMENTS = ("gather", "ring", "activations")
# tsp8 and tsp3 stand for a single folded axis, the others each for a role of axes, or for roles together.
LAYOUTS = ("single", "tp8", "tp2_sp4", "tsp2", "tsp3", "tsp8", "data2_tsp4", "mix2_4", "two_axes2_4", "partial2_4")
STREAMS = [
    *((layout, "gather") for layout in LAYOUTS),
    *((layout, "ring") for layout in LAYOUTS[3:]),
    *((layout, "activations") for layout in LAYOUTS[4:]),
]
over_streams = pytest.mark.parametrize(("layout", "movement"), STREAMS)


def value_and_grads(f, cotangent, *args):
    """(outputs, gradients of every argument) for a fixed cotangent."""
    primals, vjp = jax.vjp(f, *args)
    return primals, vjp(jax.tree.map(lambda c, p: jnp.asarray(c, p.dtype), cotangent, primals))


def compiled_value_and_grads(f, cotangent, *args):
    return jax.device_get(jax.jit(functools.partial(value_and_grads, f, cotangent))(*args))


def activations(seed: int, tokens: int = S) -> np.ndarray:
    return normal(seed, B, tokens, D)


def ids(low: int = 0, high: int = V, tokens: int = S) -> np.ndarray:
    return np.random.default_rng(3).integers(low, high, (B, tokens)).astype(np.int32)


# ------------------------------------------------------------------------------------------------ MLP


@functools.cache
def desired_mlp(activation: str):
    f = functools.partial(reference.mlp, activation=activation)
    return compiled_value_and_grads(f, activations(4), *mlp_args())


def sharded_mlp(layout: str, stream: Stream, activation: str = "silu"):
    placement = place_case(layout)
    x_spec, w_spec = placement.layout.spec("batch", "sequence", None), placement.layout.spec("mlp", None)

    def local(x, *weights):
        return mlp(x, *weights, axes=placement.layout.axes("mlp"), stream=stream, activation=activation)

    return placement.shard_map(local, (x_spec, w_spec, w_spec, w_spec), x_spec)


def mlp_args(dtype=jnp.float32):
    return jnp.asarray(activations(0), dtype), *(normal(seed, F, D, std=D**-0.5) for seed in (1, 2, 3))


@over_streams
def test_mlp(layout, movement):
    buckets = largest_divisor(F // place_case(layout).size("mlp"), 4)
    f = sharded_mlp(layout, Stream(movement, buckets, token_buckets=buckets))
    assert_trees_near(compiled_value_and_grads(f, activations(4), *mlp_args()), desired_mlp("silu"), F32_TOLERANCE)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("gelu", lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations(activation, formula):
    """The reference shares them with the op, so they need formulas of their own."""
    x = normal(0, 100, std=2.0)
    assert_trees_near(ACTIVATIONS[activation](x), formula(x.astype(np.float64)), F32_TOLERANCE)


@pytest.mark.parametrize("layout", ["single", "tsp8"])
def test_mlp_with_gelu(layout):
    f = sharded_mlp(layout, Stream(buckets=5), "gelu")
    assert_trees_near(compiled_value_and_grads(f, activations(4), *mlp_args()), desired_mlp("gelu"), F32_TOLERANCE)


@pytest.mark.parametrize("buckets", [1, 3, 15])
def test_mlp_does_not_depend_on_buckets(buckets):
    f = sharded_mlp("tsp8", Stream(buckets=buckets))
    assert_trees_near(compiled_value_and_grads(f, activations(4), *mlp_args()), desired_mlp("silu"), F32_TOLERANCE)


@pytest.mark.parametrize("movement", ALL_MOVEMENTS)
def test_mlp_in_bfloat16_is_near_float32(movement):
    f = sharded_mlp("tsp8", Stream(movement, 3, grad_dtype="bfloat16"))
    out, grads = compiled_value_and_grads(f, activations(4), *mlp_args(jnp.bfloat16))
    assert [array.dtype for array in (out, *grads)] == [jnp.bfloat16, jnp.bfloat16, *(jnp.float32,) * 3]
    assert_trees_near((out, grads), desired_mlp("silu"), BF16_TOLERANCE)


# ------------------------------------------------------------------------------------------------ embedding


def sharded_embed(layout: str, stream: Stream, dtype=jnp.float32):
    placement = place_case(layout)
    spec = placement.layout.spec

    def local(tokens, table):
        return embed(tokens, table, axes=placement.layout.axes("vocab"), stream=stream, dtype=dtype)

    return placement.shard_map(local, (spec("batch", "sequence"), spec("vocab", None)), spec("batch", "sequence", None))


def check_embedding(f, tokens: np.ndarray):
    """Rows are copied, so they are the same bits; gradients are sums."""
    table, cotangent = normal(5, V, D), activations(4)
    out, (dtable,) = compiled_value_and_grads(functools.partial(f, tokens), cotangent, table)
    inside = (tokens >= 0) & (tokens < V)
    np.testing.assert_array_equal(out, np.where(inside[..., None], table[np.where(inside, tokens, 0)], 0))
    desired = np.zeros_like(table)
    np.add.at(desired, tokens[inside], cotangent[inside])
    assert_trees_near(dtable, desired, F32_TOLERANCE)


@over_streams
def test_embedding(layout, movement):
    check_embedding(sharded_embed(layout, Stream(movement, 3)), ids())


@pytest.mark.parametrize(
    ("layout", "movement"),
    [("single", "gather"), ("tp8", "gather"), *((name, move) for name in ("tsp8", "mix2_4") for move in ALL_MOVEMENTS)],
)
def test_embedding_of_an_id_outside_of_the_vocabulary_is_zero(layout, movement):
    check_embedding(sharded_embed(layout, Stream(movement, 3)), ids(-V, 2 * V))


def test_embedding_in_bfloat16_rounds_the_rows_once():
    tokens, table = ids(), normal(5, V, D)
    out = jax.jit(sharded_embed("tsp8", Stream(buckets=3), jnp.bfloat16))(tokens, table)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.asarray(table, jnp.bfloat16)[tokens])


# ------------------------------------------------------------------------------------------------ cross-entropy


def sharded_cross_entropy(layout: str, stream: Stream):
    placement = place_case(layout)
    spec = placement.layout.spec
    tokens = spec("batch", "sequence")

    def local(x, table, labels):
        return tuple(cross_entropy(x, table, labels, axes=placement.layout.axes("vocab"), stream=stream))

    f = placement.shard_map(local, (spec("batch", "sequence", None), spec("vocab", None), tokens), (tokens, tokens))
    return lambda x, table: f(x, table, some_ignored())


CE_COTANGENTS = normal(6, B, S), normal(7, B, S)
"""of the negative log-likelihood, and of the log-partition (as the z-loss has it)"""


def ce_args(dtype=jnp.float32, std: float = 0.3):
    return jnp.asarray(activations(0), dtype), normal(5, V, D, std=std)


@functools.cache
def desired_cross_entropy(std: float = 0.3):
    def f(x, table):
        return reference.cross_entropy(x, table, some_ignored())

    return compiled_value_and_grads(f, CE_COTANGENTS, *ce_args(std=std))


def some_ignored() -> np.ndarray:
    labels = ids()
    labels[:, ::5] = -1
    return labels


@over_streams
def test_cross_entropy(layout, movement):
    f = sharded_cross_entropy(layout, Stream(movement, 3))
    actual = compiled_value_and_grads(f, CE_COTANGENTS, *ce_args())
    assert_trees_near(actual, desired_cross_entropy(), F32_TOLERANCE)


@pytest.mark.parametrize("layout", ["single", "tp8", "tsp8", "mix2_4"])
def test_ignored_labels_have_no_loss_and_no_gradient(layout):
    f = sharded_cross_entropy(layout, Stream(buckets=3))
    out, (dx, _) = compiled_value_and_grads(f, CE_COTANGENTS, *ce_args())
    ignored = some_ignored() < 0
    for array in (*out, dx):
        assert not array[ignored].any()
        assert array[~ignored].all()


@pytest.mark.parametrize("layout", ["single", "mix2_4"])
def test_cross_entropy_of_large_logits(layout):
    f = sharded_cross_entropy(layout, Stream(buckets=3))
    out, grads = compiled_value_and_grads(f, CE_COTANGENTS, *ce_args(std=40.0))  # logits in the hundreds
    assert_trees_near((out, grads), desired_cross_entropy(40.0), LARGE_LOGITS_TOLERANCE)


def test_cross_entropy_in_bfloat16_is_near_float32():
    f = sharded_cross_entropy("tsp8", Stream(buckets=3))
    actual = compiled_value_and_grads(f, CE_COTANGENTS, *ce_args(jnp.bfloat16))
    assert [array.dtype for array in jax.tree.leaves(actual)] == [*(jnp.float32,) * 2, jnp.bfloat16, jnp.float32]
    assert_trees_near(actual, desired_cross_entropy(), BF16_TOLERANCE)


# ------------------------------------------------------------------------------------------------ attention

HEAD_DIM, THETA, EPS = 24, 100.0, 1e-3  # a head's columns can be shared by 8 ranks, and by 3
HEADS = {"multi_head": (8, 8), "one_kv_head_a_rank": (16, 8), "shared_kv_heads": (8, 2), "one_kv_head": (8, 1)}
HEADS_OF_3 = {"multi_head": (6, 6), "one_kv_head_a_rank": (6, 3), "shared_kv_heads": (6, 1), "one_kv_head": (3, 1)}
ATTENTION_LAYOUTS = ("single", "tp8", "tp2_sp4", "tsp2", "tsp3", "tsp8", "mix2_4", "two_axes2_4", "partial2_4")


def attention_heads(heads: str, ranks: int) -> Heads:
    """Head slots without padding, so that stored and logical weights are the same."""
    return pad_heads(*(HEADS_OF_3 if ranks == 3 else HEADS)[heads], HEAD_DIM, ranks)


def sharded_attention(layout: str, heads: Heads, stream: Stream, buckets: int = 2, exchange_buckets: int = 1):
    placement = place_case(layout)
    spec = placement.layout.spec
    config = AttentionConfig(
        heads.kv, HEAD_DIM, THETA, EPS, buckets, buckets, XlaKernel(5, 4), exchange_buckets=exchange_buckets
    )

    def local(x, weights, norms, tokens):
        axes = placement.layout.axes("heads")
        return attention(x, weights, tokens, norms, config=config, axes=axes, stream=stream)

    x_spec, token_spec = spec("batch", "sequence", None), spec("batch", "sequence")
    f = placement.shard_map(local, (x_spec, spec("heads", None), spec(None), token_spec), x_spec)
    order = zigzag(S, placement)
    batch = packed_batch(B, S, V)
    tokens = Tokens(batch.positions[:, order], batch.segment_ids[:, order])
    back = np.argsort(order)

    def natural(x, weights, norms):
        return f(x[:, order], weights, norms, tokens)[:, back]

    return natural


def reference_attention(x, weights, norms):
    batch = packed_batch(B, S, V)
    return reference.attention(
        x, *weights, batch.positions, batch.segment_ids, head_dim=HEAD_DIM, theta=THETA, norms=norms, eps=EPS
    )


def attention_args(heads: Heads, norms: bool):
    rows = [count * HEAD_DIM for count in (heads.query, heads.kv, heads.kv, heads.query)]
    weights = AttentionWeights(*(normal(seed, count, D, std=0.3) for seed, count in enumerate(rows)))
    scales = HeadNorms(1 + normal(8, HEAD_DIM, std=0.3), 1 + normal(9, HEAD_DIM, std=0.3))
    return activations(0), weights, scales if norms else None


@functools.cache
def desired_attention(heads: Heads, norms: bool):
    return compiled_value_and_grads(reference_attention, activations(4), *attention_args(heads, norms))


def check_attention(layout: str, heads: str, stream: Stream, norms: bool):
    ranks = place_case(layout).size("heads")
    slots = attention_heads(heads, ranks)
    assert not slots.padded
    f = sharded_attention(layout, slots, stream, buckets=2)
    actual = compiled_value_and_grads(f, activations(4), *attention_args(slots, norms))
    # Slots, and so `desired_attention`, are equal for all numbers of ranks but 3.
    assert_trees_near(actual, desired_attention(slots, norms), F32_TOLERANCE)


def _attention_cases():
    """Every layout meets half of the forms of heads, those with most roles meet all; streams take turns."""
    for number, layout in enumerate(ATTENTION_LAYOUTS):
        for turn, heads in enumerate(HEADS, start=number):
            if turn % 2 == 0 or layout in ("tp8", "tsp8", "mix2_4"):
                yield layout, heads, Stream()
    for number, layout in enumerate(ATTENTION_LAYOUTS[3:]):
        for turn, heads in enumerate(HEADS, start=number):
            if turn % 2 == 0 or layout == "mix2_4":
                yield layout, heads, Stream("activations", token_buckets=2)


@pytest.mark.parametrize(("layout", "heads", "stream"), list(_attention_cases()))
def test_attention(layout, heads, stream):
    check_attention(layout, heads, stream, norms=heads != "one_kv_head_a_rank")


@pytest.mark.parametrize("heads", ["multi_head", "shared_kv_heads"])
def test_attention_inside_data_parallelism(heads):
    check_attention("data2_tsp4", heads, Stream(), norms=True)


@pytest.mark.parametrize("heads", ["multi_head", "shared_kv_heads"])
def test_attention_in_bfloat16_is_near_float32(heads):
    slots = attention_heads(heads, 2)
    x, weights, norms = attention_args(slots, norms=True)
    f = sharded_attention("tsp2", slots, Stream())
    out, grads = compiled_value_and_grads(f, activations(4), jnp.asarray(x, jnp.bfloat16), weights, norms)
    assert out.dtype == jnp.bfloat16
    assert_trees_near((out, grads), desired_attention(slots, norms=True), BF16_TOLERANCE)


# ------------------------------------------------------------------------------------------------ sequence


@pytest.mark.parametrize("layout", ["single", "sp8", "two_axes2_4"])
def test_gather_sequence_puts_ranks_in_order(layout):
    placement = place_case(layout)
    spec = placement.layout.spec("batch", "sequence", None)

    def local(x, y):
        gathered = gather_sequence(x, y, axes=placement.layout.sequence)
        return tuple(array[None] for array in gathered)

    every = placement.layout.sequence or None
    out_spec = jax.sharding.PartitionSpec(every, *spec[:1])
    x, y = activations(0), activations(1)
    for array, full in zip(jax.jit(placement.shard_map(local, (spec, spec), out_spec))(x, y), (x, y), strict=True):
        np.testing.assert_array_equal(array, np.broadcast_to(full, array.shape))


@pytest.mark.parametrize("layout", ["single", "sp8", "two_axes2_4"])
def test_scatter_sequence_is_the_transpose_of_gather_sequence(layout):
    placement = place_case(layout)
    spec = placement.layout.spec("batch", "sequence", None)

    def by_scatter(x, c):
        del x
        return scatter_sequence(c * _rank(placement), c, axes=placement.layout.sequence)

    def by_transpose(x, c):
        _, vjp = jax.vjp(lambda *arrays: gather_sequence(*arrays, axes=placement.layout.sequence), x, x)
        return vjp((_vary(c * _rank(placement), placement), _vary(c, placement)))

    whole = placement.layout.spec("batch")
    run = [jax.jit(placement.shard_map(f, (spec, whole), (spec, spec))) for f in (by_scatter, by_transpose)]
    actual, desired = (f(activations(0), activations(1)) for f in run)
    assert_trees_near(actual, desired, F32_TOLERANCE)


def _rank(placement):
    """1 + this device's rank along the sequence, so that no two devices add the same."""
    axes = placement.layout.sequence
    return 1.0 + jax.lax.axis_index(axes).astype(jnp.float32) if axes else jnp.float32(1)


def _vary(x, placement):
    missing = set(placement.layout.sequence) - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


# ------------------------------------------------------------------------------------------------ norm, RoPE, products


def test_rms_norm_has_unit_mean_square_times_scale():
    x, scale = normal(0, 3, 5, 7, std=4.0), normal(1, 7)
    desired = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 0.5) * scale
    assert_trees_near(rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.5), desired, F32_TOLERANCE)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(0, 3, 512), jnp.bfloat16)
    out = rms_norm(x, jnp.ones(512), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rms_norm(x.astype(jnp.float32), jnp.ones(512), 1e-6).astype(jnp.bfloat16))


def test_rope_rotates_pairs_of_the_two_halves():
    x, positions = normal(0, 1, 3, 2, 6), np.array([[4, 0, 7]], np.int32)
    pairs = x[..., :3] + 1j * x[..., 3:]
    angles = positions[..., None, None] * 50.0 ** (-np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)
    desired = np.concatenate([turned.real, turned.imag], axis=-1)
    assert_trees_near(rope(jnp.asarray(x), jnp.asarray(positions), 50.0), desired, F32_TOLERANCE)


def test_rope_scores_depend_on_distance_alone():
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)

    def dot(q_position, k_position):
        rotated = (
            rope(jnp.asarray(x), jnp.full((1, 1), position, jnp.int32), 100.0)
            for x, position in ((q, q_position), (k, k_position))
        )
        return float(jnp.vdot(*rotated))

    np.testing.assert_allclose(dot(9, 4), dot(105, 100), rtol=F32_TOLERANCE * 10)
    assert abs(dot(9, 4) - dot(9, 5)) > 0.01


def test_products_accumulate_in_float32():
    ones = jnp.ones((1, 600, 1), jnp.bfloat16)
    assert outer(ones, ones)[0, 0] == 600  # not representable in bfloat16's 8 bits after 256 + 1
    wide = jnp.ones((1, 1, 601), jnp.bfloat16)
    assert matmul_t(wide, jnp.ones((2, 601), jnp.bfloat16)).tolist() == [[[601.0, 601.0]]]
    assert matmul(wide, jnp.ones((601, 2), jnp.bfloat16)).tolist() == [[[601.0, 601.0]]]
