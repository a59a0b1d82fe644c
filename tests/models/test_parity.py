"""A whole decoder under every layout, against the plain mathematics on the same logical parameters.

The product of layouts, models and settings would take hours to compile. So `CASES` pairs what can interact: every
layout meets full remat, whose buffers depend on it, and a policy without buffers; every layout whose weights move
meets every movement; tsp on four devices meets every movement with every remat policy. `make test` runs those in which
each layout, model, movement and policy is tested at least once; `make soak` runs all.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.builders.arrays import (
    LAYOUT_CASES,
    assert_trees_near,
    packed_batch,
    place_case,
    relative_error,
    reorder,
    zigzag,
)
from tests.builders.marks import soak
from tsp_jax.config import ExpertsConfig, ModelConfig, Remat, RopeScaling, StreamConfig
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.ops import reference
from tsp_jax.stored import logical_params, paddings, to_stored

LOSS_TOLERANCE = 1e-5
"""relative; float32 sums in another order: 2e-7 is typical"""
GRAD_TOLERANCE = 1e-4
"""relative, each array; float32 sums in another order, through two layers: 1e-6 is typical"""

# No two of D, H, and a device's share of F, V, S and of the heads are alike. Nothing divides V and F of the first.
MULTI_HEAD = ModelConfig(
    vocab_size=71, d_model=28, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=10, d_ff=113, init_std=0.2
)
MODELS = {
    "multi_head": MULTI_HEAD,
    "grouped": dataclasses.replace(
        MULTI_HEAD,
        vocab_size=72,
        d_ff=120,
        num_kv_heads=2,
        qk_norm=True,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64),
    ),
    "odd_heads_tied": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, tie_embeddings=True, activation="gelu"
    ),
    "14_of_2": dataclasses.replace(MULTI_HEAD, num_heads=14, num_kv_heads=2),
    "4_of_1": dataclasses.replace(MULTI_HEAD, num_heads=4, num_kv_heads=1, qk_norm=True),
    "28_of_4": dataclasses.replace(MULTI_HEAD, num_heads=28, num_kv_heads=4),
    "windowed": dataclasses.replace(
        MULTI_HEAD,
        num_heads=9,
        num_kv_heads=3,
        window=11,
        attention_softcap=2.0,
        attention_scale=0.5,
        attention_sinks=True,
    ),
    "biased": dataclasses.replace(MULTI_HEAD, num_heads=9, num_kv_heads=3, qkv_bias=True, residual_scale=0.7),
    "biased_grouped": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, qkv_bias=True, norms="post"),
    "gemma": dataclasses.replace(
        MULTI_HEAD,
        num_kv_heads=2,
        qk_norm=True,
        norms="both",
        norm_unit_offset=True,
        embedding_scale=5.5,
        logits_scale=0.6,
        logits_softcap=1.5,
    ),
    "olmo": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, norms="post", qk_norm=True, qk_norm_width="all", norm_eps=0.1
    ),
    "olmo_grouped": dataclasses.replace(
        MULTI_HEAD, num_kv_heads=2, qk_norm=True, qk_norm_width="all", qkv_bias=True, norm_eps=0.1
    ),
    "kinds": dataclasses.replace(
        MULTI_HEAD,
        num_layers=5,
        num_heads=9,
        num_kv_heads=3,
        window=11,
        layer_kinds=("sliding", "full_nope", "full"),
        local_rope_theta=50.0,
        rope_theta=500.0,
        rope_scaling=RopeScaling(kind="linear", factor=4.0),
    ),
    "two_kinds": dataclasses.replace(
        MULTI_HEAD, num_layers=4, num_kv_heads=2, window=11, layer_kinds=("full", "sliding"), norms="post"
    ),
    "experts": dataclasses.replace(
        MULTI_HEAD,
        num_kv_heads=2,
        d_ff=14,
        experts=ExpertsConfig(number=6, per_token=2, balance_loss=0.3, z_loss=0.02),
    ),
    "experts_shared": dataclasses.replace(
        MULTI_HEAD,
        num_layers=3,
        num_kv_heads=2,
        d_ff=14,
        norms="both",
        window=11,
        layer_kinds=("full", "sliding"),
        experts=ExpertsConfig(
            number=5, per_token=3, scores="sigmoid", normalize=False, scale=1.5, shared=2, balance_loss=0.3
        ),
    ),
    "gpt_oss": dataclasses.replace(
        MULTI_HEAD,
        num_heads=9,
        num_kv_heads=3,
        d_ff=31,
        window=11,
        layer_kinds=("sliding", "full"),
        qkv_bias=True,
        out_bias=True,
        attention_sinks=True,
        activation="clamped_swiglu",
        init_std=0.5,
        experts=ExpertsConfig(number=6, per_token=2, router_bias=True, biases=True, balance_loss=0.3),
    ),
    "thirds": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, head_dim=12),  # three ranks could share a KV head
}
BATCH, SEQ_LEN, Z_LOSS = 2, 48, 1e-2
REMATS: tuple[Remat, ...] = ("full", "none", "save_attention")
MOVEMENTS = ("gather", "paper", "activations")
"""paper: a ring for the MLP and the tables"""
GATHER, PAPER, ACTIVATIONS = MOVEMENTS
FULL, NONE, SAVE = REMATS
SAVE_ON_HOST: Remat = "offload_attention"
CASES = [
    # no weights move, so that a movement changes nothing
    ("single", "grouped", GATHER, FULL),
    soak("single", "odd_heads_tied", GATHER, SAVE),
    ("tp8", "grouped", GATHER, FULL),
    soak("tp8", "odd_heads_tied", GATHER, NONE),
    ("sp8", "odd_heads_tied", GATHER, FULL),
    soak("sp8", "grouped", GATHER, SAVE),
    ("tp2_sp4", "odd_heads_tied", GATHER, FULL),
    ("tp2_sp4", "grouped", GATHER, SAVE),
    ("tp4_sp2", "multi_head", GATHER, FULL),
    soak("tp4_sp2", "grouped", GATHER, NONE),
    # tokens are sharded by batch; attention gathers weights under every movement
    ("dp8", "grouped", GATHER, FULL),
    soak("dp8", "odd_heads_tied", GATHER, SAVE),
    ("fsdp8", "odd_heads_tied", GATHER, FULL),
    ("fsdp8", "grouped", PAPER, SAVE),
    soak("fsdp8", "multi_head", ACTIVATIONS, NONE),
    ("replicas2_4", "grouped", GATHER, FULL),
    soak("replicas2_4", "multi_head", PAPER, NONE),
    soak("replicas2_4", "odd_heads_tied", ACTIVATIONS, SAVE),
    # whole weights are gathered under every movement
    soak("fsdp_cp8", "multi_head", GATHER, FULL),
    ("fsdp_cp8", "odd_heads_tied", GATHER, SAVE),
    # weights move past tokens, or tokens past weights
    ("tsp2", "multi_head", PAPER, FULL),
    ("tsp3", "multi_head", ACTIVATIONS, FULL),
    soak("tsp3", "odd_heads_tied", PAPER, NONE),
    ("tsp4", "grouped", GATHER, FULL),
    soak("tsp4", "multi_head", GATHER, NONE),
    soak("tsp4", "grouped", GATHER, SAVE),
    soak("tsp4", "multi_head", PAPER, FULL),
    soak("tsp4", "grouped", PAPER, NONE),
    ("tsp4", "grouped", PAPER, SAVE),
    soak("tsp4", "multi_head", ACTIVATIONS, FULL),
    ("tsp4", "grouped", ACTIVATIONS, NONE),
    soak("tsp4", "grouped", ACTIVATIONS, SAVE),
    ("tsp8", "odd_heads_tied", GATHER, FULL),
    soak("tsp8", "multi_head", PAPER, NONE),
    soak("tsp4", "14_of_2", ACTIVATIONS, NONE),
    ("tsp8", "14_of_2", GATHER, FULL),
    ("tsp8", "4_of_1", ACTIVATIONS, FULL),
    ("tsp8", "28_of_4", PAPER, SAVE),
    soak("tsp8", "grouped", ACTIVATIONS, SAVE),
    soak("data2_tsp4", "multi_head", ACTIVATIONS, FULL),
    ("data2_tsp4", "odd_heads_tied", PAPER, SAVE),
    soak("mix2_4", "multi_head", PAPER, FULL),
    ("mix2_4", "odd_heads_tied", ACTIVATIONS, NONE),
    soak("mix2_4", "grouped", GATHER, SAVE),
    ("mix2_4", "grouped", ACTIVATIONS, "offload"),
    # weights folded inside a node, replicated between nodes; tokens over both
    ("two_level2_4", "odd_heads_tied", GATHER, FULL),
    soak("two_level2_4", "grouped", PAPER, SAVE),
    soak("two_level2_4", "multi_head", ACTIVATIONS, NONE),
    # tensor ranks that neither divide the KV heads nor are divided by them
    ("mix2_3", "odd_heads_tied", GATHER, FULL),
    ("mix3_2", "thirds", GATHER, NONE),
    # windows, soft caps and sinks, also where heads are padded, or sharded by two axes
    soak("tsp4", "windowed", GATHER, SAVE),
    ("tsp8", "windowed", ACTIVATIONS, FULL),
    ("mix2_4", "windowed", ACTIVATIONS, NONE),
    ("tp2_sp4", "windowed", GATHER, FULL),
    soak("fsdp8", "windowed", GATHER, FULL),
    soak("tsp2", "windowed", GATHER, SAVE_ON_HOST),
    # biases, norms elsewhere, scales, and norms over all heads
    soak("single", "gemma", GATHER, FULL),
    soak("single", "olmo", GATHER, FULL),
    soak("tsp4", "biased", GATHER, FULL),
    ("tsp8", "biased", ACTIVATIONS, SAVE),
    ("mix2_4", "biased_grouped", ACTIVATIONS, FULL),
    soak("tp8", "biased_grouped", GATHER, SAVE),
    ("tp2_sp4", "biased", GATHER, NONE),
    ("tsp4", "gemma", PAPER, FULL),
    soak("tp8", "gemma", GATHER, FULL),
    soak("mix2_4", "gemma", ACTIVATIONS, NONE),
    ("tsp2", "gemma", GATHER, SAVE_ON_HOST),
    soak("tsp4", "olmo", GATHER, FULL),
    ("tsp4", "olmo", ACTIVATIONS, SAVE),
    soak("tsp8", "olmo", ACTIVATIONS, FULL),
    ("tp8", "olmo_grouped", GATHER, FULL),
    soak("mix2_4", "olmo_grouped", ACTIVATIONS, FULL),
    ("mix2_3", "olmo", ACTIVATIONS, NONE),
    soak("fsdp8", "olmo_grouped", GATHER, SAVE),
    # layers of several kinds, some after the last whole period
    soak("single", "kinds", GATHER, FULL),
    ("tsp4", "kinds", GATHER, FULL),
    soak("tsp2", "kinds", GATHER, SAVE_ON_HOST),
    soak("tsp8", "kinds", ACTIVATIONS, SAVE),
    soak("tp2_sp4", "kinds", GATHER, NONE),
    ("mix2_4", "two_kinds", ACTIVATIONS, FULL),
    soak("tsp4", "two_kinds", PAPER, NONE),
    ("data2_tsp4", "two_kinds", GATHER, "offload"),
    # experts: fewer than ranks, shared, under tensor axes, and with small arrays of several kinds of layers
    ("tsp8", "experts", GATHER, FULL),
    ("tsp4", "experts_shared", ACTIVATIONS, SAVE),
    ("mix2_4", "experts", PAPER, NONE),
    ("tp2_sp4", "experts_shared", GATHER, FULL),
    ("data2_tsp4", "experts_shared", GATHER, SAVE_ON_HOST),
    # biases of everything, and gates that are clamped
    ("tsp4", "gpt_oss", GATHER, FULL),
    ("tp4_sp2", "gpt_oss", GATHER, SAVE),
    soak("mix2_4", "gpt_oss", ACTIVATIONS, NONE),
    soak("data2_tsp4", "gpt_oss", PAPER, SAVE_ON_HOST),
    # what attention has computed is kept, of heads that are shared or padded too
    soak("tp8", "4_of_1", GATHER, SAVE),
    ("tp4_sp2", "grouped", GATHER, SAVE_ON_HOST),
    ("tsp8", "14_of_2", ACTIVATIONS, SAVE),
    soak("mix2_3", "odd_heads_tied", ACTIVATIONS, SAVE),
    soak("mix3_2", "thirds", GATHER, SAVE_ON_HOST),
    ("two_level2_4", "grouped", ACTIVATIONS, SAVE_ON_HOST),
    ("fsdp8", "odd_heads_tied", GATHER, SAVE_ON_HOST),
]
"""(layout, model, movement, remat)"""
ALL_CASES = [getattr(case, "values", case) for case in CASES]


def stream_config(movement: str, placement: Placement) -> StreamConfig:
    paper = movement == "paper"
    return StreamConfig(
        attention_movement="gather" if paper or placement.layout.axes("heads").folded_batch else movement,
        mlp_movement="ring" if paper else movement,
        vocab_movement="ring" if paper else movement,
        bucket_mib=0.008,  # two to three buckets in most ops
    )


def abstract_model(model: str, placement: Placement, movement: str, remat: Remat):
    """(graph definition, abstract state) of a Transformer."""

    def make():
        return Transformer(
            MODELS[model], placement=placement, stream=stream_config(movement, placement), dtype=jnp.float32,
            remat=remat, rngs=nnx.Rngs(0),
        )  # fmt: skip

    return nnx.split(nnx.eval_shape(make))


def batch_size(placement: Placement) -> int:
    return max(BATCH, placement.size("batch"))


@functools.cache
def reference_params(model: str):
    """Logical parameters; norm scales are random too, so that none can stand in for another."""
    _, state = abstract_model(model, place_case("single"), GATHER, NONE)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        std = MODELS[model].init_std
        value = 1 + 0.3 * rng.normal(size=leaf.shape) if "norm" in str(path) else std * rng.normal(size=leaf.shape)
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(logical_params, state))


@functools.cache
def reference_result(model: str, rows: int):
    """(loss, gradients) of the plain mathematics."""
    config = MODELS[model]

    def loss(params, batch):
        return reference.decoder_loss(params, *batch, config=config, z_loss=Z_LOSS)

    batch = packed_batch(rows, SEQ_LEN, config.vocab_size)
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(reference_params(model), batch))


def tsp_result(layout: str, model: str, movement: str, remat: Remat):
    """(loss, logical gradients, stored gradients of padding) of the library."""
    placement = place_case(layout)
    graphdef, state = abstract_model(model, placement, movement, remat)
    stored = to_stored(paddings(state), reference_params(model))
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(state, placement.mesh))
    nnx.replace_by_pure_dict(state, jax.device_put(stored, shardings))
    batch = packed_batch(batch_size(placement), SEQ_LEN, MODELS[model].vocab_size)
    batch = reorder(batch, zigzag(SEQ_LEN, placement))

    def loss(state, batch):
        model = nnx.merge(graphdef, state)
        (nll, lse), sums = model.losses(batch)
        loss = (nll + Z_LOSS * lse**2).sum() / (batch.labels >= 0).sum(dtype=jnp.float32)
        return loss + model.router_loss(sums)

    placed = jax.device_put(batch, placement.sharding("batch", "sequence"))
    value, grads = jax.jit(jax.value_and_grad(loss))(state, placed)
    logical, pads = logical_params(grads), paddings(state)
    real = to_stored(pads, jax.tree.map(jnp.ones_like, logical))
    of_padding = jax.tree.map(lambda grad, real: grad * (1 - real), nnx.to_pure_dict(grads), real)
    return jax.device_get((value, logical, of_padding))


@pytest.mark.parametrize(("layout", "model", "movement", "remat"), CASES)
def test_loss_and_gradients_equal_the_reference(layout, model, movement, remat):
    loss, grads, of_padding = tsp_result(layout, model, movement, remat)
    desired_loss, desired_grads = reference_result(model, batch_size(place_case(layout)))
    assert relative_error(loss, desired_loss) <= LOSS_TOLERANCE
    assert_trees_near(grads, desired_grads, GRAD_TOLERANCE)
    assert not any(grad.any() for grad in jax.tree.leaves(of_padding))


def test_cases_cover_what_can_interact():
    for name, (layout, _) in LAYOUT_CASES.items():
        remats = {remat for case, _, _, remat in ALL_CASES if case == name}
        assert "full" in remats, name
        same_layout = {case for case, (other, _) in LAYOUT_CASES.items() if other == layout}
        found = {(movement, remat) for case, _, movement, remat in ALL_CASES if case in same_layout}
        assert len({remat for _, remat in found}) > 1, name
        assert any(MODELS[model].vocab_size == 71 for case, model, _, _ in ALL_CASES if case == name), name
        if layout.axes("mlp").folded and not layout.whole_weights:
            assert {movement for movement, _ in found} == set(MOVEMENTS), name
    assert {tuple(case[2:]) for case in ALL_CASES if case[0] == "tsp4"} == set(itertools.product(MOVEMENTS, REMATS))


def test_make_test_runs_each_layout_model_movement_and_policy():
    run = [case for case in CASES if not hasattr(case, "marks")]
    for number in range(4):
        assert {case[number] for case in run} == {case[number] for case in ALL_CASES}
