"""What layers refuse, in one line that names layer, argument, what it got and what it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tsp_jax.config import ExpertsConfig
from tsp_jax.errors import ConfigError
from tsp_jax.nn import MLP, Attention, Embed, Experts, residual_std

B, S, D, F, V, N = 2, 16, 16, 32, 64, 4
X = jax.ShapeDtypeStruct((B, S, D), jnp.float32)
IDS = jax.ShapeDtypeStruct((B, S), jnp.int32)


def make(layer: type, **changes) -> nnx.Module:
    settings = {
        Attention: {"d_model": D, "num_heads": N},
        MLP: {"d_model": D, "d_ff": F},
        Embed: {"vocab_size": V, "d_model": D},
    }[layer]
    common = {"placement": place_case("data2_tsp4"), "rngs": nnx.Rngs(0), "dtype": jnp.float32}
    return layer(**{**settings, **common, **changes})


def refusal(function, *args) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


BAD_INPUTS = [
    (array("float32", B, S, 20), "is float32[2, 16, 20]; use floats [B, T, 16]"),
    (array("float32", S, D), "is float32[16, 16]; use floats [B, T, 16]"),
    (array("float32", 1, B, S, D), "is float32[1, 2, 16, 16]; use floats [B, T, 16]"),
    (array("float32", 0, S, D), "is float32[0, 16, 16]; use floats [B, T, 16], B at least 1, T at least 1"),
    (array("float32", B, 0, D), "is float32[2, 0, 16]; use floats [B, T, 16], B at least 1, T at least 1"),
    (array("int32", B, S, D), "is int32[2, 16, 16]; use floats [B, T, 16]"),
    (array("complex64", B, S, D), "is complex64[2, 16, 16]; use floats [B, T, 16]"),
    (IDS, "is int32[2, 16]; use floats [B, T, 16]"),
]
BAD_INTEGERS = [
    array("int32", S),
    array("int32", 1, S),
    array("int32", S, B),
    array("int32", B, S + 4),
    array("int32", B, S, 1),
    array("float32", B, S),
    array("bool", B, S),
]


@pytest.mark.parametrize(("x", "message"), BAD_INPUTS)
def test_inputs(x, message):
    embed = make(Embed)
    for name, call in {"Attention": make(Attention), "MLP": make(MLP)}.items():
        assert refusal(jax.eval_shape, call, x) == f"{name}: x_BTD {message}"
    assert refusal(jax.eval_shape, embed.cross_entropy, x, IDS) == f"Embed: x_BTD {message}"


@pytest.mark.parametrize("value", [None, 1.0, [[[1.0] * D] * S] * B])
def test_inputs_that_are_no_arrays(value):
    assert refusal(make(MLP), value) == f"MLP: x_BTD is no array but {type(value).__name__}; use floats [B, T, 16]"
    assert refusal(make(Embed), value) == f"Embed: ids_BT is no array but {type(value).__name__}; use integers [B, T]"


@pytest.mark.parametrize("wrong", BAD_INTEGERS, ids=str)
def test_integers_beside_an_input(wrong):
    got = f"{wrong.dtype}{list(wrong.shape)}; use integers [2, 16]"
    attention, embed = make(Attention), make(Embed)
    assert refusal(jax.eval_shape, attention, X, wrong) == f"Attention: positions_BT is {got}"
    assert refusal(jax.eval_shape, attention, X, IDS, wrong) == f"Attention: segment_ids_BT is {got}"
    assert refusal(jax.eval_shape, embed.cross_entropy, X, wrong) == f"Embed: labels_BT is {got}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (array("int32", S), "int32[16]; use integers [B, T]"),
        (array("int32", B, S, 1), "int32[2, 16, 1]; use integers [B, T]"),
        (array("float32", B, S), "float32[2, 16]; use integers [B, T]"),
        (array("bool", B, S), "bool[2, 16]; use integers [B, T]"),
        (array("int32", 0, S), "int32[0, 16]; use integers [B, T], B at least 1, T at least 1"),
    ],
)
def test_ids(wrong, message):
    assert refusal(jax.eval_shape, make(Embed), wrong) == f"Embed: ids_BT is {message}"


# ------------------------------------------------------------------------------------------------ settings

SIZE, POSITIVE, NOT_NEGATIVE = "a positive integer", "a positive number", "a number that is not negative"
NAN, FLOATS = float("nan"), "jnp.float32 or jnp.bfloat16"
BAD_SETTINGS = [
    *((Attention, name, value, SIZE) for name in ("d_model", "num_heads", "num_kv_heads", "head_dim")
      for value in (0, -4, 4.0, "4", True, 2**31)),
    *((MLP, name, 0, SIZE) for name in ("d_model", "d_ff")),
    *((Embed, name, 0, SIZE) for name in ("vocab_size", "d_model")),
    *((Attention, "rope_theta", value, f"{POSITIVE}, or None") for value in (0.0, -1.0, NAN, "1e4")),
    (Attention, "qk_norm_width", "heads", "one of head, all"),
    *((Attention, name, 1, "True or False") for name in ("qkv_bias", "norm_unit_offset")),
    (MLP, "norm_follows", None, "True or False"),
    (MLP, "remat", "some", "one of none, full, save_attention, offload, offload_attention"),
    (Embed, "logits_scale", 0.0, POSITIVE),
    (Embed, "logits_softcap", -1.0, f"{POSITIVE}, or None"),
    *((Attention, name, value, NOT_NEGATIVE) for name in ("norm_eps", "init_std", "out_std") for value in (-1.0, NAN)),
    *((MLP, name, -1.0, NOT_NEGATIVE) for name in ("init_std", "out_std")),
    (Embed, "init_std", float("inf"), NOT_NEGATIVE),
    *((MLP, "activation", value, "one of silu, gelu, clamped_swiglu") for value in ("relu", jax.nn.silu, [])),
    (Attention, "remat", "ful", "one of none, full, save_attention, offload, offload_attention"),
    (Attention, "qk_norm", "no", "True or False"),
    *((layer, "dtype", value, FLOATS)
      for layer in (Attention, MLP, Embed) for value in (jnp.int32, "bf16", None, float)),
    *((layer, "placement", value, 'a tsp_jax.Placement, such as tsp_jax.place("tsp", tsp=8)')
      for layer in (Attention, MLP, Embed) for value in ("tsp", None)),
    *((layer, "stream", {}, "a tsp_jax.StreamConfig") for layer in (Attention, MLP, Embed)),
    (Attention, "rope_scaling", {"kind": "linear"}, "a tsp_jax.config.RopeScaling"),
    *((layer, "rngs", 0, "flax.nnx.Rngs") for layer in (Attention, MLP, Embed)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "name", "value", "use"), BAD_SETTINGS)
def test_settings(layer, name, value, use):
    message = refusal(lambda: make(layer, **{name: value}))
    assert message == f"{layer.__name__}: {name}={value!r} does not fit; use {use}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 3}, "Attention: head_dim=3 is odd, RoPE rotates pairs; use head_dim=4"),
        ({"num_heads": 16}, "Attention: head_dim=1 is odd, RoPE rotates pairs; use head_dim=2"),
        ({"num_heads": 3}, "Attention: d_model=16 is not a multiple of num_heads=3; use num_heads=2, or pass head_dim"),
        ({"num_kv_heads": 3}, "Attention: num_heads=4 is not a multiple of num_kv_heads=3; use num_heads=6"),
        ({"num_kv_heads": 8}, "Attention: num_heads=4 is not a multiple of num_kv_heads=8; use num_heads=8"),
    ],
)
def test_sizes_that_make_no_heads(settings, message):
    assert refusal(lambda: make(Attention, **settings)) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExpertsConfig(), "Experts: config.number=0; use MLP, or 1 expert at least"),
        ({"number": 2}, "Experts: config={'number': 2} does not fit; use a tsp_jax.config.ExpertsConfig"),
    ],
)
def test_experts_without_experts(config, message):
    assert refusal(lambda: Experts(D, D, config, placement=place_case("tsp2"), rngs=nnx.Rngs(0))) == message


def test_settings_of_numpy_are_taken():
    layer = nnx.eval_shape(lambda: make(Attention, d_model=np.int64(D), num_heads=np.int64(N), dtype="bfloat16"))
    assert (layer.head_sharding.heads.query, layer.w_q.shape[1], layer.dtype) == (N, D, jnp.bfloat16)


def test_residual_std():
    assert residual_std(0.02, 2) == 0.01
    assert "num_layers=0" in refusal(residual_std, 0.02, 0)


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("layout", ["tsp4", "tp8"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_ids_and_labels_of_any_integer_dtype(layout, dtype):
    """A shard may hold more rows than the dtype can count."""
    rows = 2048
    embed = Embed(rows, D, placement=place_case(layout), dtype=jnp.float32, init_std=1.0, rngs=nnx.Rngs(0))
    ids = np.arange(B * S).reshape(B, S) * 4
    x = normal(0, B, S, D)
    run = jax.jit(lambda ids: (embed(ids), embed.cross_entropy(x, ids).nll_Bt))
    actual, desired = run(ids.astype(dtype)), run(ids.astype(np.int32))
    assert_trees_near(actual, desired, 0.0)
    np.testing.assert_array_equal(actual[0], np.asarray(embed.table[...])[ids])


@pytest.mark.parametrize("layout", ["single", "tp8", "tsp4", "mix2_4"])
def test_ids_and_labels_outside_the_vocabulary(layout):
    """Zero rows, ignored tokens below 0, and no number at or above V; their neighbours are as ever."""
    embed = Embed(V, D, placement=place_case(layout), dtype=jnp.float32, init_std=1.0, rngs=nnx.Rngs(0))
    inside = np.arange(B * S, dtype=np.int32).reshape(B, S)
    ids = inside.copy()
    ids[0, :4] = [-1, V, V + 1, 2**31 - 1]
    run = jax.jit(lambda ids, x: (embed(ids), embed.cross_entropy(x, ids)))
    x = normal(0, B, S, D)
    (rows, losses), (desired_rows, desired) = run(ids, x), run(inside, x)
    assert not np.asarray(rows)[0, :4].any()
    np.testing.assert_array_equal(np.asarray(rows)[1:], np.asarray(desired_rows)[1:])
    nll = np.asarray(losses.nll_Bt)
    assert nll[0, 0] == 0.0
    assert np.isnan(nll[0, 1:4]).all()
    assert_trees_near(nll[0, 4:], np.asarray(desired.nll_Bt)[0, 4:], F32_TOLERANCE)
    assert np.isnan(np.asarray(losses.lse_Bt)[0, 1:4]).all()


# ------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("layer", [Attention, MLP])
def test_forward_mode(layer):
    x, call = jnp.ones((1, 2, D)), make(layer, placement=place_case("single"))
    message = f"{layer.__name__}: forward mode (jax.jvp, jax.jacfwd) is not supported; use jax.grad or jax.vjp"
    assert refusal(jax.jvp, call, (x,), (x,)) == message


def test_forward_mode_under_jit():
    x = jnp.ones((B, S, D))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(make(MLP), (x,), (x,))).lower(x)
