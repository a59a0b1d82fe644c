"""The MLP under its layouts and movements, value and every gradient, against the reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.ops import MOVEMENT_LAYOUTS, PADDED_STREAMS, D, activations, compiled_value_and_grads, over_streams
from tsp_jax.layout import largest_divisor
from tsp_jax.ops import reference
from tsp_jax.ops.mlp import GATED, mlp
from tsp_jax.ops.stream import Stream

F = 120


@functools.cache
def desired_mlp(activation: str):
    f = functools.partial(reference.mlp, activation=activation)
    return compiled_value_and_grads(f, activations(4), *mlp_args())


def sharded_mlp(layout: str, stream: Stream, activation: str = "silu", d_ff: int | None = None):
    placement = place_case(layout)
    x_spec, w_spec = placement.layout.spec("batch", "sequence", None), placement.layout.spec("mlp", None)

    def local(x, *weights):
        return mlp(x, *weights, axes=placement.layout.axes("mlp"), stream=stream, activation=activation, d_ff=d_ff)

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
        ("silu", lambda g, u: g / (1 + np.exp(-g)) * u),
        ("gelu", lambda g, u: g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u),
        (
            "clamped_swiglu",
            lambda g, u: (np.clip(u, -7, 7) + 1) * np.minimum(g, 7) / (1 + np.exp(-1.702 * np.minimum(g, 7))),
        ),
    ],
)
def test_activations(activation, formula):
    """The reference shares them with the op, so they need formulas of their own."""
    gate, up = normal(0, 100, std=4.0), normal(1, 100, std=4.0)
    assert max(gate.max(), up.max(), -up.min()) > 7
    found = GATED[activation](gate, up)
    assert_trees_near(found, formula(gate.astype(np.float64), up.astype(np.float64)), F32_TOLERANCE)


@pytest.mark.parametrize("layout", ["single", "tsp8"])
def test_mlp_with_gelu(layout):
    f = sharded_mlp(layout, Stream(buckets=5), "gelu")
    assert_trees_near(compiled_value_and_grads(f, activations(4), *mlp_args()), desired_mlp("gelu"), F32_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "buckets", "chunk_tokens"),
    [
        ("single", 5, 7),
        ("tsp3", 5, 8),
        ("data2_tsp4", 5, 5),
        ("mix2_4", 5, 12),
        ("tsp8", 15, 1),  # one column, one token
        ("tsp8", 1, 10**9),
    ],
)
def test_mlp_does_not_depend_on_buckets_or_chunks(layout, buckets, chunk_tokens):
    f = sharded_mlp(layout, Stream(buckets=buckets, chunk_tokens=chunk_tokens))
    assert_trees_near(compiled_value_and_grads(f, activations(4), *mlp_args()), desired_mlp("silu"), F32_TOLERANCE)


@pytest.mark.parametrize("movement", MOVEMENT_LAYOUTS)
def test_mlp_in_bfloat16_is_near_float32(movement):
    f = sharded_mlp("tsp8", Stream(movement, 3, grad_dtype="bfloat16"))
    out, grads = compiled_value_and_grads(f, activations(4), *mlp_args(jnp.bfloat16))
    assert [array.dtype for array in (out, *grads)] == [jnp.bfloat16, jnp.bfloat16, *(jnp.float32,) * 3]
    assert_trees_near((out, grads), desired_mlp("silu"), BF16_TOLERANCE)


@pytest.mark.parametrize(("layout", "movement"), PADDED_STREAMS)
@pytest.mark.parametrize(("d_ff", "activation"), [(16, "silu"), (113, "gelu")])
def test_padded_rows_change_nothing_and_get_no_gradient(layout, movement, d_ff, activation):
    """Whatever they hold."""
    x, *weights = mlp_args()
    f = sharded_mlp(layout, Stream(movement, 3), activation, d_ff)
    out, (dx, *grads) = compiled_value_and_grads(f, activations(4), x, *weights)
    plain = functools.partial(reference.mlp, activation=activation)
    desired = compiled_value_and_grads(plain, activations(4), x, *(weight[:d_ff] for weight in weights))
    assert_trees_near((out, (dx, *(grad[:d_ff] for grad in grads))), desired, F32_TOLERANCE)
    assert not any(grad[d_ff:].any() for grad in grads)
