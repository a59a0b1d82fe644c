"""A whole decoder under every layout, against the plain mathematics on the same logical parameters.

The product of layouts, models and settings would take hours to compile. So every layout meets every model, with
settings chosen so that every layout also meets each movement and each remat policy; and one layout meets every setting.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

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
from tsp_jax.config import ModelConfig, RopeScaling, StreamConfig
from tsp_jax.heads import logical_params, paddings, to_stored
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.ops import reference

LOSS_TOLERANCE = 1e-5
"""relative; float32 sums in another order: 2e-7 is typical"""
GRAD_TOLERANCE = 1e-4
"""relative, each array; float32 sums in another order, through two layers: 1e-6 is typical"""

# No two of D, H, and a device's share of F, V, S and of the heads are alike.
MULTI_HEAD = ModelConfig(
    vocab_size=72, d_model=28, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=10, d_ff=120, init_std=0.2
)
MODELS = {
    "multi_head": MULTI_HEAD,
    "grouped": dataclasses.replace(
        MULTI_HEAD,
        num_kv_heads=2,
        qk_norm=True,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64),
    ),
    "odd_heads_tied": dataclasses.replace(
        MULTI_HEAD, num_heads=9, num_kv_heads=3, tie_embeddings=True, activation="gelu"
    ),
    "thirds": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, head_dim=12),  # three ranks could share a KV head
}
EVERYWHERE = ("multi_head", "grouped", "odd_heads_tied")
BATCH, SEQ_LEN, Z_LOSS = 2, 48, 1e-2
REMATS = ("full", "none", "save_attention")


MOVEMENTS = ("gather", "paper", "activations")


class Setting(NamedTuple):
    movement: str
    """paper: a ring for the MLP and the tables"""
    remat: str

    @property
    def stream(self) -> StreamConfig:
        paper = self.movement == "paper"
        return StreamConfig(
            attention_movement="gather" if paper else self.movement,
            mlp_movement="ring" if paper else self.movement,
            vocab_movement="ring" if paper else self.movement,
            bucket_mib=0.008,  # two to three buckets in most ops
        )

    def __str__(self) -> str:
        return f"{self.movement}-{self.remat}"


SETTINGS = [Setting(*values) for values in itertools.product(MOVEMENTS, REMATS)]


def _matrix():
    for number, layout in enumerate(LAYOUT_CASES):
        for turn, model in enumerate(EVERYWHERE):
            movement, remat = MOVEMENTS[(number + turn) % 3], REMATS[(number // 3 + 2 * turn) % 3]
            yield layout, model, Setting(movement, remat)


UNEVEN = [("mix2_3", "odd_heads_tied", SETTINGS[0]), ("mix3_2", "thirds", SETTINGS[1])]
"""tensor ranks that neither divide the KV heads nor are divided by them"""
OFFLOADED = ("mix2_4", "grouped", Setting("activations", "offload"))
CASES = list(dict.fromkeys([*_matrix(), *(("tsp4", "grouped", setting) for setting in SETTINGS), *UNEVEN, OFFLOADED]))


def make_model(model: str, placement: Placement, setting: Setting) -> Transformer:
    return Transformer(
        MODELS[model],
        placement=placement,
        stream=setting.stream,
        dtype=jnp.float32,
        remat=setting.remat,
        rngs=nnx.Rngs(0),
    )


def abstract_state(model: str, placement: Placement, setting: Setting):
    return nnx.split(nnx.eval_shape(lambda: make_model(model, placement, setting)))


@functools.cache
def reference_params(model: str):
    """Logical parameters; norm scales are random too, so that none can stand in for another."""
    _, state = abstract_state(model, place_case("single"), SETTINGS[0])
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        std = MODELS[model].init_std
        value = 1 + 0.3 * rng.normal(size=leaf.shape) if "norm" in str(path) else std * rng.normal(size=leaf.shape)
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))


@functools.cache
def reference_result(model: str):
    """(loss, gradients) of the plain mathematics."""
    config = MODELS[model]

    def loss(params, batch):
        return reference.decoder_loss(params, *batch, config=config, z_loss=Z_LOSS)

    batch = packed_batch(BATCH, SEQ_LEN, config.vocab_size)
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(reference_params(model), batch))


def tsp_result(layout: str, model: str, setting: Setting):
    """(loss, logical gradients) of the library."""
    placement = place_case(layout)
    graphdef, state = abstract_state(model, placement, setting)
    stored = to_stored(paddings(state), reference_params(model))
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(state, placement.mesh))
    nnx.replace_by_pure_dict(state, jax.device_put(stored, shardings))
    batch = reorder(packed_batch(BATCH, SEQ_LEN, MODELS[model].vocab_size), zigzag(SEQ_LEN, placement))

    def loss(state, batch):
        nll, lse = nnx.merge(graphdef, state).token_losses(batch)
        return (nll + Z_LOSS * lse**2).sum() / (batch.labels >= 0).sum(dtype=jnp.float32)

    placed = jax.device_put(batch, placement.sharding("batch", "sequence"))
    value, grads = jax.jit(jax.value_and_grad(loss))(state, placed)
    return jax.device_get((value, logical_params(grads)))


@pytest.mark.parametrize(("layout", "model", "setting"), CASES, ids=lambda value: str(value))
def test_loss_and_gradients_equal_the_reference(layout, model, setting):
    loss, grads = tsp_result(layout, model, setting)
    desired_loss, desired_grads = reference_result(model)
    assert relative_error(loss, desired_loss) <= LOSS_TOLERANCE
    assert_trees_near(grads, desired_grads, GRAD_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_every_layout_meets_every_value_of_each_setting(layout):
    settings = [setting for name, _, setting in _matrix() if name == layout]
    for field, values in (("movement", set(MOVEMENTS)), ("remat", set(REMATS))):
        assert {getattr(setting, field) for setting in settings} == values
