"""Layers over global arrays, in a decoder and in a model of one's own."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.builders.arrays import (
    F32_TOLERANCE,
    LAYOUT_CASES,
    assert_trees_near,
    normal,
    packed_batch,
    place_case,
    reorder,
    zigzag,
)
from tsp_jax.config import ModelConfig, StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.models.transformer import Transformer, make_merge
from tsp_jax.nn import MLP, Attention, Embed
from tsp_jax.ops import reference
from tsp_jax.stored import HeadPadding, logical_params, paddings, to_logical, to_stored
from tsp_jax.training.data import sequence_order

B, S, D, F, V, N, H = 2, 48, 20, 113, 71, 9, 8
K = 3
CONFIG = ModelConfig(
    vocab_size=V, d_model=D, num_layers=2, num_heads=N, num_kv_heads=K, head_dim=H, d_ff=F, qk_norm=True, init_std=0.2
)


def make_model(layout: str, config: ModelConfig = CONFIG, seed: int = 0, **kwargs) -> Transformer:
    return Transformer(config, placement=place_case(layout), dtype=jnp.float32, rngs=nnx.Rngs(seed), **kwargs)


def make_attention(layout: str, **kwargs) -> Attention:
    kwargs = {"placement": place_case(layout), "dtype": jnp.float32, "rngs": nnx.Rngs(0), "init_std": 0.3, **kwargs}
    return Attention(D, N, K, H, **kwargs)


@functools.cache
def compiled_losses(layout: str):
    """Batch -> losses of its tokens, [B, S]."""
    graphdef, state = nnx.split(make_model(layout))
    losses = jax.jit(lambda state, batch: nnx.merge(graphdef, state).token_losses(batch).nll_Bt)
    return functools.partial(losses, state)


# ------------------------------------------------------------------------------------------------ parameters


def test_every_parameter_has_a_partition_spec():
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(make_model("mix2_4"))))
    rows, layer_rows, layer_replicated = P(("model", "tsp"), None), P(None, ("model", "tsp"), None), P(None, None)
    assert specs["embed"]["table"] == rows
    assert specs["head"]["table"] == rows
    assert specs["final_norm"]["scale"] == P(None)
    layers = specs["layers"]
    assert {layers["attention"][name] for name in ("w_q", "w_k", "w_v", "w_o")} == {layer_rows}
    assert {layers["mlp"][name] for name in ("w_gate", "w_up", "w_down")} == {layer_rows}
    assert {layers["attention"][name] for name in ("q_norm", "k_norm")} == {layer_replicated}
    assert {layers[name]["scale"] for name in ("attention_norm", "mlp_norm")} == {layer_replicated}


def test_shapes_of_parameters():
    shapes = jax.tree.map(lambda array: array.shape, nnx.to_pure_dict(nnx.state(make_model("tsp8"))))
    L = CONFIG.num_layers
    assert shapes == {
        "embed": {"table": (8 * 9, D)},
        "head": {"table": (8 * 9, D)},
        "final_norm": {"scale": (D,)},
        "layers": {
            "attention": {
                **dict.fromkeys(("w_q", "w_o"), (L, N * H, D)),
                **dict.fromkeys(("w_k", "w_v"), (L, K * H, D)),
                **dict.fromkeys(("q_norm", "k_norm"), (L, H)),
            },
            "mlp": dict.fromkeys(("w_gate", "w_up", "w_down"), (L, 8 * 15, D)),
            **{key: {"scale": (L, D)} for key in ("attention_norm", "mlp_norm")},
        },
    }


def test_logical_parameters_are_as_many_as_the_configuration_says():
    params = logical_params(nnx.state(make_model("tsp8")))
    assert sum(array.size for array in jax.tree.leaves(params)) == CONFIG.num_params


def test_tied_embeddings_have_no_head():
    state = nnx.to_pure_dict(nnx.state(make_model("single", dataclasses.replace(CONFIG, tie_embeddings=True))))
    assert "head" not in state


@pytest.mark.parametrize("layout", [name for name in LAYOUT_CASES if name != "single"])
def test_a_seed_gives_the_same_logical_parameters_under_every_layout(layout):
    actual, desired = (logical_params(nnx.state(make_model(name))) for name in (layout, "single"))
    chex.assert_trees_all_equal(actual, desired)


def test_other_seeds_give_other_parameters():
    one, other = (logical_params(nnx.state(make_model("single", seed=seed))) for seed in (0, 1))
    assert not np.array_equal(one["embed"]["table"], other["embed"]["table"])


def test_layers_start_with_parameters_of_their_own():
    w_q = logical_params(nnx.state(make_model("single")))["layers"]["attention"]["w_q"]
    assert not np.array_equal(w_q[0], w_q[1])


def test_to_stored_is_the_inverse_of_to_logical():
    state = nnx.state(make_model("tsp8"))
    pads, params = paddings(state), nnx.to_pure_dict(state)
    chex.assert_trees_all_equal(to_stored(pads, to_logical(pads, params)), params)


# ------------------------------------------------------------------------------------------------ a user's model


class Block(nnx.Module):
    """Ordinary nnx around the layers: a linear map in front, none of it knowing of meshes."""

    def __init__(self, layout: str):
        kwargs = {"placement": place_case(layout), "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        self.embed = Embed(V, D, init_std=1.0, **kwargs)
        self.linear = nnx.Linear(D, D, rngs=nnx.Rngs(1))
        self.attention = Attention(D, N, K, H, **kwargs)
        self.mlp = MLP(D, F, **kwargs)

    def __call__(self, ids):
        x = self.linear(self.embed(ids))
        x += self.attention(x)
        return x + self.mlp(x)

    def loss(self, batch):
        return self.embed.cross_entropy(self(batch.tokens), batch.labels).nll_Bt.sum()


@functools.cache
def block_result():
    batch = packed_batch(B, S, V)
    graphdef, state = nnx.split(Block("single"))
    loss, grads = jax.jit(jax.value_and_grad(lambda state: nnx.merge(graphdef, state).loss(batch)))(state)
    return jax.device_get((loss, logical_params(grads)))


def test_layers_in_a_model_of_ones_own_under_jit():
    batch = packed_batch(B, S, V)
    graphdef, state = nnx.split(Block("data2_tsp4"))
    loss, grads = jax.jit(jax.value_and_grad(lambda state: nnx.merge(graphdef, state).loss(batch)))(state)
    assert_trees_near((loss, logical_params(grads)), block_result(), F32_TOLERANCE)


def test_layers_in_a_model_of_ones_own_under_nnx_jit():
    batch = packed_batch(B, S, V)

    @nnx.jit
    def value_and_grad(model):
        return nnx.value_and_grad(lambda model: model.loss(batch))(model)

    loss, grads = value_and_grad(Block("data2_tsp4"))
    assert_trees_near((loss, logical_params(grads)), block_result(), F32_TOLERANCE)


def test_attention_without_positions_is_one_document():
    attention = make_attention("tsp4")
    x = normal(0, B, S, D)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    run = jax.jit(lambda *args: attention(*args))
    np.testing.assert_array_equal(run(x), run(x, positions, np.ones((B, S), np.int32)))


@pytest.mark.parametrize("layer", ["attention", "mlp", "embed"])
def test_the_result_has_the_compute_dtype(layer):
    kwargs = {"placement": place_case("tsp2"), "rngs": nnx.Rngs(0), "dtype": jnp.bfloat16}
    make = {
        "attention": lambda: Attention(D, N, K, H, **kwargs),
        "mlp": lambda: MLP(D, F, **kwargs),
        "embed": lambda: Embed(V, D, **kwargs),
    }
    x = jax.ShapeDtypeStruct((B, S), jnp.int32) if layer == "embed" else jax.ShapeDtypeStruct((B, S, D), jnp.float32)
    assert jax.eval_shape(make[layer](), x).dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------ padded heads


@pytest.mark.parametrize("layout", ["tp8", "tp2_sp4", "mix2_4"])
def test_padded_heads_get_exactly_no_gradient(layout):
    attention = make_attention(layout, qk_norm=True)
    assert attention.head_sharding.heads.padded
    graphdef, state = nnx.split(attention)
    x, cotangent = normal(0, B, S, D), normal(1, B, S, D)
    grads = jax.jit(jax.grad(lambda state: (nnx.merge(graphdef, state)(x) * cotangent).sum()))(state)
    pads = paddings(state)
    for name in ("w_q", "w_k", "w_v", "w_o"):
        real = pads[name].pad(jnp.ones_like(pads[name].unpad(grads[name][...])))
        gradient = np.asarray(grads[name][...])
        assert not gradient[np.asarray(real) == 0].any()
        assert gradient[np.asarray(real) == 1].all()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_padded_heads_change_nothing(noise):
    """Even if their rows of the output projection are not zero."""
    attention = make_attention("tp8")
    padding = HeadPadding(attention.head_sharding, True)
    no_head = 1 - padding.pad(jnp.ones_like(padding.unpad(attention.w_o[...])))
    attention.w_o[...] += noise * no_head
    x = normal(0, B, S, D)
    weights = (logical_params(nnx.state(attention))[name] for name in ("w_q", "w_k", "w_v", "w_o"))
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    desired = reference.attention(
        x, *weights, positions, np.zeros_like(positions), head_dim=H, theta=10_000.0
    )  # fmt: skip
    assert_trees_near(jax.jit(lambda x: attention(x))(x), desired, F32_TOLERANCE)


# ------------------------------------------------------------------------------------------------ padded rows


def make_layer(layer: str, layout: str):
    """A layer, and a function (it, x [B, S, D]) -> its outputs."""
    kwargs = {"placement": place_case(layout), "dtype": jnp.float32, "rngs": nnx.Rngs(0), "init_std": 0.3}
    if layer == "mlp":
        return MLP(D, F, **kwargs), lambda mlp, x: mlp(x)
    batch = packed_batch(B, S, V)
    if layer == "embed":
        return Embed(V, D, **kwargs), lambda embed, x: x * embed(batch.tokens)
    return Embed(V, D, **kwargs), lambda embed, x: embed.cross_entropy(x, batch.labels).nll_Bt


@pytest.mark.parametrize("layer", ["mlp", "embed", "loss"])
@pytest.mark.parametrize("layout", ["tsp3", "tp8", "replicas2_4"])
def test_padded_rows_change_nothing_and_get_exactly_no_gradient(layer, layout):
    """Even if they are not zero."""
    module, call = make_layer(layer, layout)
    assert module.padding.padded
    graphdef, state = nnx.split(module)
    pads, params, merge = paddings(state), nnx.to_pure_dict(state), make_merge(graphdef, state)
    padding = jax.tree.map(
        lambda real: 1 - real, to_stored(pads, to_logical(pads, jax.tree.map(jnp.ones_like, params)))
    )

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x):
        y = call(merge(params), x)
        return (y * normal(1, *y.shape)).sum(), y

    noisy = jax.tree.map(lambda array, padding: array + padding, params, padding)
    quiet, noisy = (jax.device_get(jax.jit(loss)(params, normal(0, B, S, D))) for params in (params, noisy))
    chex.assert_trees_all_equal(quiet, noisy)
    of_padding = jax.tree.map(lambda grad, padding: grad * padding, quiet[1][0], padding)
    assert not any(grad.any() for grad in jax.tree.leaves(of_padding))


# ------------------------------------------------------------------------------------------------ causality, order


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_a_hidden_state_depends_on_exactly_the_earlier_tokens_of_its_document(order):
    """By gradient through the whole decoder, at the borders of shards and of zigzag chunks."""
    graphdef, state = nnx.split(make_model("tsp4"))
    places = sequence_order(S, place_case("tsp4").size("sequence"), order)
    batch = reorder(packed_batch(B, S, V, documents=2, seed=3), places)
    embedded, cotangent = normal(0, B, S, D), normal(1, D)

    def hidden(x, chosen):
        model = nnx.merge(graphdef, state)
        model.embed = lambda tokens: x
        return (model(batch.tokens, batch.positions, batch.segment_ids)[0, chosen] * cotangent).sum()

    gradient = jax.jit(jax.grad(hidden))
    for chosen in (0, S // 8 - 1, S // 8, S // 4 - 1, S // 4, S // 2, S - 1):
        reached = np.asarray(gradient(embedded, chosen) != 0).any(axis=-1)
        seen = (batch.segment_ids[0] == batch.segment_ids[0, chosen]) & (places <= places[chosen])
        np.testing.assert_array_equal(reached[0], seen)
        assert not reached[1].any()


def losses_of_tokens(layout: str, order: str) -> np.ndarray:
    """[B, S] in natural order."""
    places = sequence_order(S, place_case(layout).size("sequence"), order)
    return np.asarray(compiled_losses(layout)(reorder(packed_batch(B, S, V), places)))[:, np.argsort(places)]


@pytest.mark.parametrize("layout", ["tsp4", "tp2_sp4"])
def test_tokens_have_the_same_losses_in_any_order(layout):
    assert_trees_near(losses_of_tokens(layout, "zigzag"), losses_of_tokens(layout, "contiguous"), F32_TOLERANCE)


def test_other_documents_do_not_change_the_losses_of_a_document():
    one = packed_batch(B, S, V, documents=2, seed=3)
    last = one.segment_ids == 2
    other = one._replace(tokens=np.where(last, one.tokens, (one.tokens + 1) % V))
    places = zigzag(S, place_case("tsp4"))
    losses, changed = (
        np.asarray(compiled_losses("tsp4")(reorder(batch, places)))[:, np.argsort(places)] for batch in (one, other)
    )
    np.testing.assert_array_equal(losses[last], changed[last])
    assert not np.array_equal(losses[~last], changed[~last])


# ------------------------------------------------------------------------------------------------ errors, depth


def _call(layer: str, shape: tuple[int, ...], layout: str = "data2_tsp4"):
    kwargs = {"placement": place_case(layout), "rngs": nnx.Rngs(0)}
    made = {"attention": lambda: Attention(D, N, K, H, **kwargs), "mlp": lambda: MLP(D, F, **kwargs)}
    made["embed"] = lambda: Embed(V, D, **kwargs)
    dtype = jnp.int32 if layer == "embed" else jnp.float32
    return jax.eval_shape(made[layer](), jnp.zeros(shape if layer == "embed" else (*shape, D), dtype))


@pytest.mark.parametrize("layer", ["attention", "mlp", "embed"])
@pytest.mark.parametrize(
    ("shape", "message", "works"),
    [
        ((2, 49), "sequence=49 is not divisible by 4 over tsp; use 52", (2, 52)),
        ((3, 48), "batch=3 is not divisible by 2 over data; use 4", (4, 48)),
    ],
)
def test_tokens_that_do_not_divide_are_refused_with_a_number_that_does(layer, shape, message, works):
    with pytest.raises(ConfigError, match=re.escape(message)):
        _call(layer, shape)
    assert _call(layer, works).shape == (*works, D)


def test_query_heads_that_kv_heads_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="num_heads=9 is not a multiple of num_kv_heads=2"):
        Attention(D, 9, 2, H, placement=place_case("single"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("remat", ["none", "full", "save_attention"])
def test_programs_do_not_grow_with_depth(remat):
    """Layers are scanned, so that depth costs no compile time: the same text except for some numbers."""

    def program(num_layers: int) -> str:
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        stream = StreamConfig(bucket_mib=0.001)
        model = nnx.eval_shape(lambda: make_model("tsp2", config, remat=remat, stream=stream))
        graphdef, state = nnx.split(model)
        batch = packed_batch(B, S, V)
        loss = jax.grad(lambda state: nnx.merge(graphdef, state).token_losses(batch).nll_Bt.sum())
        return jax.jit(loss).lower(state).as_text()

    shallow, deep = program(2), program(6)
    assert len(shallow.splitlines()) == len(deep.splitlines())
