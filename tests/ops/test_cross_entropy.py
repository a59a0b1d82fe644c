"""Cross-entropy under its layouts and movements, value and every gradient, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.ops import PADDED_STREAMS, B, D, S, V, activations, compiled_value_and_grads, ids, over_streams
from tsp_jax.ops import reference
from tsp_jax.ops.cross_entropy import Logits, cross_entropy
from tsp_jax.ops.stream import Stream

LARGE_LOGITS_TOLERANCE = 1e-3
"""relative; a logit of 500 is known to 5e-5, and so is the logarithm of its probability"""


def sharded_cross_entropy(
    layout: str, stream: Stream, labels: np.ndarray | None = None, vocab_size: int | None = None, **options
):
    placement = place_case(layout)
    spec = placement.layout.spec
    tokens = spec("batch", "sequence")

    def local(x, table, labels):
        axes = placement.layout.axes("vocab")
        return tuple(cross_entropy(x, table, labels, axes=axes, stream=stream, vocab_size=vocab_size, **options))

    f = placement.shard_map(local, (spec("batch", "sequence", None), spec("vocab", None), tokens), (tokens, tokens))
    return lambda x, table: f(x, table, some_ignored() if labels is None else labels)


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


@pytest.mark.parametrize(("scale", "softcap"), [(0.4, None), (3.0, 2.0)])
@pytest.mark.parametrize(
    ("layout", "movement"), [("single", "gather"), ("tp8", "gather"), ("tsp3", "ring"), ("mix2_4", "activations")]
)
def test_scaled_and_capped_logits(layout, movement, scale, softcap):
    def plain(x, table):
        return reference.cross_entropy(x, table, some_ignored(), scale=scale, softcap=softcap)

    f = sharded_cross_entropy(layout, Stream(movement, 3), logits=Logits(scale, softcap))
    desired = compiled_value_and_grads(plain, CE_COTANGENTS, *ce_args())
    assert_trees_near(compiled_value_and_grads(f, CE_COTANGENTS, *ce_args()), desired, F32_TOLERANCE)


@pytest.mark.parametrize(("layout", "chunk_tokens"), [("single", 7), ("mix2_4", 12), ("tsp8", 1)])
def test_cross_entropy_does_not_depend_on_chunks(layout, chunk_tokens):
    f = sharded_cross_entropy(layout, Stream(buckets=3, chunk_tokens=chunk_tokens))
    assert_trees_near(compiled_value_and_grads(f, CE_COTANGENTS, *ce_args()), desired_cross_entropy(), F32_TOLERANCE)


@pytest.mark.parametrize("layout", ["single", "mix2_4"])
def test_ignored_labels_have_no_loss_and_no_gradient(layout):
    f = sharded_cross_entropy(layout, Stream(buckets=3))
    out, (dx, _) = compiled_value_and_grads(f, CE_COTANGENTS, *ce_args())
    ignored = some_ignored() < 0
    for array in (*out, dx):
        assert not array[ignored].any()
        assert array[~ignored].all()


@pytest.mark.parametrize("layout", ["single", "tp8", "tsp8", "mix2_4"])
@pytest.mark.parametrize("movement", ["gather", "activations"])
def test_labels_at_or_above_the_vocabulary_have_no_finite_loss(layout, movement):
    labels = some_ignored()
    labels[:, 1::7], labels[:, 2::7], labels[:, 3::7] = V, 2**31 - 1, -100
    losses = jax.jit(sharded_cross_entropy(layout, Stream(movement, 3), labels))(*ce_args())
    for loss, desired in zip(losses, reference.cross_entropy(*ce_args(), labels), strict=True):
        np.testing.assert_array_equal(np.isnan(loss), labels >= V)
        np.testing.assert_allclose(loss, desired, rtol=1e-5)
        assert not loss[labels < 0].any()


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


@pytest.mark.parametrize(("layout", "movement"), PADDED_STREAMS)
@pytest.mark.parametrize("vocab_size", [9, 70])  # all rows of most ranks are padding; two rows of the last
def test_padded_rows_have_no_probability_and_no_gradient(layout, movement, vocab_size):
    """Whatever they hold. A label that names one gives no finite loss."""
    x, table = ce_args()
    labels = some_ignored() % vocab_size
    labels[:, ::5], labels[:, 1::7] = -1, vocab_size
    f = sharded_cross_entropy(layout, Stream(movement, 3), labels, vocab_size)
    out, (dx, dtable) = compiled_value_and_grads(f, CE_COTANGENTS, x, table)

    def reference_f(x, real):
        return reference.cross_entropy(x, real, labels)

    desired, (desired_dx, desired_dtable) = compiled_value_and_grads(reference_f, CE_COTANGENTS, x, table[:vocab_size])
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(labels == vocab_size, (2, B, S)))
    known = labels != vocab_size
    assert_trees_near([loss[known] for loss in out], [loss[known] for loss in desired], F32_TOLERANCE)
    assert_trees_near((dx, dtable[:vocab_size]), (desired_dx, desired_dtable), F32_TOLERANCE)
    assert not dtable[vocab_size:].any()
