"""Any op that gives a partial result and its VJP runs on every layout: here one with float and integer inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.ops import B, D, S, V, activations, compiled_value_and_grads, ids
from tsp_jax.ops.embedding import local_ids
from tsp_jax.ops.rowwise import RowwiseOp, rowwise
from tsp_jax.ops.stream import Stream


@dataclasses.dataclass(frozen=True)
class ScaledRows(RowwiseOp):
    """``scale * (a[id] + b[id])``."""

    dtype: Any = jnp.float32
    accumulator_dtype: Any = jnp.float32
    chunked: bool = True

    def _onehot(self, inputs, bucket):
        index_Bt, inside_Bt = bucket.find(inputs[1])
        return jax.nn.one_hot(jnp.where(inside_Bt, index_Bt, -1), bucket.arrays[0].shape[0])

    def partial(self, inputs, bucket):
        return inputs[0][..., None] * (self._onehot(inputs, bucket) @ (bucket.arrays[0] + bucket.arrays[1]))

    def partial_vjp(self, inputs, dy_BtD, bucket):
        onehot_Btp = self._onehot(inputs, bucket)
        dscale_Bt = jnp.einsum("btp,pd,btd->bt", onehot_Btp, bucket.arrays[0] + bucket.arrays[1], dy_BtD)
        grad_pD = jnp.einsum("btp,bt,btd->pd", onehot_Btp, inputs[0], dy_BtD)
        return (dscale_Bt, None), (grad_pD, grad_pD)


@pytest.mark.parametrize(
    ("layout", "stream"),
    [
        ("single", Stream(buckets=3, chunk_tokens=12)),
        ("tp8", Stream()),
        ("mix2_4", Stream(buckets=3, chunk_tokens=12)),
        ("tsp3", Stream("ring")),
        ("tsp3", Stream("activations", token_buckets=4)),
        ("mix2_4", Stream("activations")),
    ],
)
def test_an_op_with_several_inputs(layout, stream):
    placement = place_case(layout)
    axes, spec = placement.layout.axes("vocab"), placement.layout.spec
    tokens, rows = spec("batch", "sequence"), spec("vocab", None)

    def local(scale_Bt, ids_Bt, a_vD, b_vD):
        inputs = scale_Bt, local_ids(ids_Bt, a_vD, axes)
        return rowwise(ScaledRows(), inputs, (a_vD, b_vD), axes=axes, stream=stream)

    f = placement.shard_map(local, (tokens, tokens, rows, rows), spec("batch", "sequence", None))
    args = normal(0, B, S), normal(1, V, D), normal(2, V, D)
    actual = compiled_value_and_grads(lambda scale, a, b: f(scale, ids(), a, b), activations(4), *args)
    desired = compiled_value_and_grads(lambda scale, a, b: scale[..., None] * (a + b)[ids()], activations(4), *args)
    assert_trees_near(actual, desired, F32_TOLERANCE)
