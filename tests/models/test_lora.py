"""Adapters on a whole decoder: values and gradients of the plain mathematics on merged weights, under every layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.builders.arrays import (
    F32_TOLERANCE,
    assert_trees_near,
    normal,
    packed_batch,
    place_case,
    relative_error,
    reorder,
    zigzag,
)
from tests.builders.folders import LLAMA, MODELS, logical_params
from tsp_jax.config import LoraConfig, Remat, StreamConfig
from tsp_jax.hf.weights import load_params, save_params
from tsp_jax.layout import Placement
from tsp_jax.models.lora import merge, split_adapters
from tsp_jax.models.transformer import Transformer
from tsp_jax.ops import reference
from tsp_jax.stored import paddings, to_logical, to_stored

GRAD_TOLERANCE = 1e-4
"""relative, each array; float32 sums in another order, through two layers"""
SEQ_LEN, RANK, ALPHA = 48, 3, 2.0
ALL = LoraConfig(rank=RANK, alpha=ALPHA)
SOME = LoraConfig(rank=RANK, alpha=ALPHA, targets=("o", "up", "k"))
CASES: list[tuple[str, str, Remat, LoraConfig]] = [
    ("single", "llama", "full", ALL),
    ("tsp4", "llama", "save_attention", ALL),
    ("tsp4", "padded_tied_qwen", "none", SOME),
    ("tp8", "padded_tied_qwen", "full", ALL),
    ("tp2_sp4", "llama", "full", SOME),
    ("fsdp4", "padded_tied_qwen", "full", ALL),
    ("replicas2_4", "llama", "full", ALL),
    ("fsdp_cp8", "padded_tied_qwen", "offload", ALL),
    ("mix2_4", "padded_tied_qwen", "offload_attention", ALL),
]


def abstract_model(model: str, placement: Placement, adapters: LoraConfig, remat: Remat = "none"):
    """(graph definition, abstract state) of a Transformer."""

    def make():
        return Transformer(
            MODELS[model], placement=placement, stream=StreamConfig(bucket_mib=0.008), dtype=jnp.float32,
            remat=remat, adapters=adapters, rngs=nnx.Rngs(0),
        )  # fmt: skip

    return nnx.split(nnx.eval_shape(make))


@functools.cache
def logical(model: str, adapters: LoraConfig) -> dict:
    """Random parameters of a model with adapters; no factor of an adapter is 0."""
    _, state = abstract_model(model, place_case("single"), adapters)
    factors, tree = jax.tree.flatten(nnx.to_pure_dict(state)["adapters"])
    random = [normal(100 + seed, *factor.shape, std=0.2) for seed, factor in enumerate(factors)]
    base = jax.tree.map(lambda param: 0.2 * param if param.ndim > 2 else param, logical_params(MODELS[model]))
    return {**base, "adapters": jax.tree.unflatten(tree, random)}


NAMES = {
    "q": "attention.w_q", "k": "attention.w_k", "v": "attention.w_v", "o": "attention.w_o",
    "gate": "mlp.w_gate", "up": "mlp.w_up", "down": "mlp.w_down",
}  # fmt: skip


def merged(params: dict, scale: float) -> dict:
    """W + s left right, by einsum on logical parameters."""
    layers = {module: dict(weights) for module, weights in params["layers"].items()}
    for name, adapter in params["adapters"].items():
        module, weight = NAMES[name].split(".")
        layers[module][weight] += scale * jnp.einsum("lor,lrd->lod", adapter["left"], adapter["right"])
    return {**split_adapters(params)[1], "layers": layers}


@functools.cache
def desired(model: str, adapters: LoraConfig, rows: int):
    """(loss, gradients of the adapters) of the plain mathematics."""
    frozen = jax.tree.map(jnp.asarray, split_adapters(logical(model, adapters))[1])
    batch = packed_batch(rows, SEQ_LEN, MODELS[model].vocab_size)

    def loss(trained):
        params = merged({**frozen, **trained}, ALPHA / RANK)
        return reference.decoder_loss(params, *batch, config=MODELS[model], z_loss=0.0)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(split_adapters(logical(model, adapters))[0]))


def place_params(model: str, adapters: LoraConfig, placement: Placement) -> tuple[dict, dict]:
    """(parameters in stored form on the devices, their paddings)."""
    _, state = abstract_model(model, placement, adapters)
    pads = paddings(state)
    stored = to_stored(pads, jax.tree.map(jnp.asarray, logical(model, adapters)))
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(state, placement.mesh))
    return jax.device_put(stored, shardings), pads


@pytest.mark.parametrize(("layout", "model", "remat", "adapters"), CASES)
def test_loss_and_gradients_of_adapters_are_those_of_merged_weights(layout, model, remat, adapters):
    placement = place_case(layout)
    graphdef, state = abstract_model(model, placement, adapters, remat)
    params, pads = place_params(model, adapters, placement)
    rows = max(2, placement.size("batch"))
    batch = reorder(packed_batch(rows, SEQ_LEN, MODELS[model].vocab_size), zigzag(SEQ_LEN, placement))
    trained, frozen = split_adapters(params)

    def loss(trained, batch):
        copy = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(copy, {**frozen, **trained})
        losses = nnx.merge(graphdef, copy).token_losses(batch)
        return losses.nll_Bt.sum() / (batch.labels >= 0).sum(dtype=jnp.float32)

    placed = jax.device_put(batch, placement.sharding("batch", "sequence"))
    value, grads = jax.jit(jax.value_and_grad(loss))(trained, placed)
    desired_value, desired_grads = desired(model, adapters, rows)
    assert relative_error(value, desired_value) <= F32_TOLERANCE
    pads = split_adapters(pads)[0]
    assert_trees_near(to_logical(pads, grads), desired_grads, GRAD_TOLERANCE)
    real = to_stored(pads, jax.tree.map(jnp.ones_like, desired_grads))
    assert not any(np.any(grad * (1 - one)) for grad, one in zip(*map(jax.tree.leaves, (grads, real)), strict=True))


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["tsp4", "mix2_4"])
def test_merged_weights_are_the_sum_and_are_exported_bit_by_bit(layout, base_dtype, tmp_path):
    model, placement = "padded_tied_qwen", place_case(layout)
    params, pads = place_params(model, ALL, placement)
    trained, frozen = split_adapters(params)
    frozen = jax.tree.map(lambda param: param.astype(base_dtype), frozen)
    result = merge({**frozen, **trained}, dataclasses.replace(ALL, base_dtype=base_dtype), placement)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda param: np.asarray(param.astype(base_dtype), np.float32), frozen)
    wanted = merged(to_logical(pads, {**rounded, **trained}), ALPHA / RANK)
    assert_trees_near(to_logical(split_adapters(pads)[1], result), wanted, F32_TOLERANCE)
    save_params(tmp_path / "merged", result, MODELS[model], placement)
    again = load_params(tmp_path / "merged", MODELS[model], placement)
    for kept, written in zip(*map(jax.tree.leaves, (again, result)), strict=True):
        np.testing.assert_array_equal(np.asarray(kept).view(np.uint32), np.asarray(written).view(np.uint32))


def test_weights_without_adapters_are_merged_already():
    params = {"layers": {}, "embed": {}}
    assert merge(params, LoraConfig(), place_case("single")) is params


def test_adapters_change_nothing_at_first():
    """The factor on the side of the outputs is 0, the other one is random."""
    placement = place_case("single")
    model = Transformer(LLAMA, placement=placement, adapters=ALL, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    result = merge(params, ALL, placement)
    jax.tree.map(np.testing.assert_array_equal, result, split_adapters(params)[1])
    zero = {name: {side for side, f in factors.items() if not f.any()} for name, factors in params["adapters"].items()}
    inputs_first = {"o": {"right"}, "down": {"right"}}
    assert zero == {name: inputs_first.get(name, {"left"}) for name in NAMES}
    spread = {name: float(np.std(factors["right"])) for name, factors in params["adapters"].items() if name != "o"}
    assert spread["q"] == pytest.approx((3 * LLAMA.d_model) ** -0.5, rel=0.2)


def test_initial_weights_under_adapters_are_those_without():
    placement = place_case("single")
    plain, adapted = (
        nnx.to_pure_dict(nnx.state(Transformer(LLAMA, placement=placement, adapters=lora, rngs=nnx.Rngs(0))))
        for lora in (LoraConfig(), ALL)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, split_adapters(adapted)[1])
