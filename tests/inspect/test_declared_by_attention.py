"""Trips that the XLA attention kernel declares for its loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsp_jax.inspect import parse
from tsp_jax.inspect.scopes import declared_trips
from tsp_jax.ops.kernels.xla import Blocks, Tokens, attend, attend_backward, delta, mean_visits
from tsp_jax.training.data import sequence_order


def counted_visits(length: int, ranks: int, blocks: Blocks) -> np.ndarray:
    """[ranks, 2]: mean key blocks of a query block and query blocks of a key block, from the positions themselves."""
    order = sequence_order(length, ranks, "zigzag")
    first_k = order.reshape(-1, blocks.key).min(axis=1)
    needed = [first_k[None] <= own.reshape(-1, blocks.query).max(axis=1)[:, None] for own in order.reshape(ranks, -1)]
    return np.array([[n.sum(axis=1).mean(), n.sum(axis=0).mean()] for n in needed])


@pytest.mark.parametrize("blocks", [Blocks(4, 4), Blocks(2, 8), Blocks(8, 2), Blocks(8, 8), Blocks(1, 1)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_mean_visits_are_those_of_the_positions(ranks, blocks):
    """Over the ranks; where blocks are as long as a chunk of the zigzag, or shorter, every rank has the mean."""
    length = 64
    expected = mean_visits(length // ranks, length, *blocks)
    counted = counted_visits(length, ranks, blocks)
    np.testing.assert_allclose(counted.mean(axis=0), expected)
    assert expected[0] > 1


def test_attention_declares_its_visits():
    """The compiled program tells: forward and backward loops, and nobody else."""
    q_len, k_len, blocks = 16, 64, Blocks(8, 16)
    q, k = jnp.ones((1, q_len, 2, 1, 4)), jnp.ones((1, k_len, 2, 4))
    queries, keys = (Tokens(*jnp.zeros((2, 1, n), jnp.int32)) for n in (q_len, k_len))

    def step(q, k, queries, keys):
        out, lse = attend(q, k, k, queries, keys, blocks)
        return attend_backward(q, k, k, queries, keys, delta(out, out), lse, out, blocks)

    text = jax.jit(step).lower(q, k, queries, keys).compile().as_text()
    assert text
    loops = [i for i, _ in parse(text).walk() if i.opcode == "while"]
    declared = sorted(trips for i in loops if (trips := declared_trips(i)) is not None)
    assert declared == sorted(mean_visits(q_len, k_len, *blocks)) == [1.25, 2.5]
