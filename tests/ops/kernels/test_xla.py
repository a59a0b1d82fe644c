"""The XLA kernel: blocks of any size compute the same, and which keys and blocks it reads."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near
from tests.builders.attention import (
    Case,
    S,
    allowed_pairs,
    jitted_run,
    poison,
    run_reference,
    run_reference_where,
)
from tsp_jax.ops.kernels import XlaKernel, delta
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.training.data import sequence_order

KERNEL, BLOCKS_OF_6 = XlaKernel(4, 6), XlaKernel(6, 6)
LARGE_SCORES_TOLERANCE = 1e-2
"""relative; a score of 50,000 is known to 4e-3, and so is the logarithm of its weight"""
BLOCKS = {
    "blocks of one token": XlaKernel(1, 1),
    "one block": XlaKernel(S, S),
    "blocks longer than the sequence": XlaKernel(512, 512),
    "blocks that do not divide": XlaKernel(7, 11),
    "query blocks longer than key blocks": XlaKernel(16, 3),
    "key blocks longer than query blocks": XlaKernel(3, 16),
}

forward = functools.partial(jax.jit, static_argnums=0)(XlaKernel.attend)
backward = functools.partial(jax.jit, static_argnums=0)(XlaKernel.attend_backward)


@pytest.mark.parametrize("kernel", BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_any_size_compute_the_same(kernel):
    case = Case(packed=True)
    actual = jitted_run(kernel, *case.arrays(), *case.tokens())
    assert_trees_near(actual, run_reference(*case.arrays(), *case.tokens()), F32_TOLERANCE)


@pytest.mark.parametrize(
    ("kernel", "tokens", "expected"),
    [
        (XlaKernel(512, 512), 4096, XlaKernel(512, 512)),
        (XlaKernel(512, 512), 512, XlaKernel(256, 256)),
        (XlaKernel(5, 4), 48, XlaKernel(6, 4)),
        (XlaKernel(8, 8), 1, XlaKernel(1, 1)),
    ],
)
def test_no_block_crosses_from_one_zigzag_chunk_to_the_other(kernel, tokens, expected):
    assert kernel.within(tokens) == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_queries_of_all_ranks_are_the_queries_of_the_sequence(ranks):
    parts = []
    q, k, v, dout = Case(packed=True).arrays()
    order = sequence_order(S, ranks, "zigzag")
    for rank in range(ranks):
        queries, keys = Case(ranks=ranks, rank=rank, packed=True).tokens()
        own = order[rank * (S // ranks) : (rank + 1) * (S // ranks)]
        parts.append(forward(KERNEL, q[:, own], k[:, order], v[:, order], queries, keys)[0])
    natural = np.concatenate(parts, axis=1)[:, np.argsort(order)]
    assert_trees_near(natural, run_reference(q, k, v, dout, *Case(packed=True).tokens())[0], F32_TOLERANCE)


def test_scores_of_any_size_are_finite():
    case = Case()
    q, k, v, dout = case.arrays()
    out, lse, _ = jitted_run(KERNEL, 100 * q, 100 * k, v, dout, *case.tokens())
    desired = run_reference(100 * q, 100 * k, v, dout, *case.tokens())
    assert_trees_near((out, lse), desired[:2], LARGE_SCORES_TOLERANCE)


# ------------------------------------------------------------------------------------------------ which keys are read


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_reach_exactly_the_allowed_keys(rank, packed):
    """d out[t] / d k[s] and d v[s] are zero, to the bit, for later and foreign s, and for no other."""
    case = Case(kv_heads=1, group=1, ranks=4, rank=rank, packed=packed, batch=1)
    queries, keys = case.tokens()
    q, k, v, dout = case.arrays()
    out, lse = forward(KERNEL, q, k, v, queries, keys)

    @jax.jit
    @jax.vmap
    def gradients(chosen_t):
        one = jnp.where(chosen_t[None, :, None, None, None], dout, 0.0)
        return backward(KERNEL, q, k, v, queries, keys, delta(out, one), lse, one)

    dq, dk, dv = gradients(np.eye(q.shape[1], dtype=bool))
    (allowed,) = allowed_pairs(queries, keys)
    reached_by_k, reached_by_v = ((np.asarray(grad) != 0).any(axis=(1, 3, 4)) for grad in (dk, dv))
    np.testing.assert_array_equal(reached_by_v, allowed)
    assert not reached_by_k[~allowed].any()
    several = allowed.sum(axis=1, keepdims=True) > 1  # the weight of an only key is 1, whatever the key
    assert reached_by_k[allowed & several].all()
    assert not (np.asarray(dq) != 0).any(axis=(1, 3, 4, 5))[~np.eye(q.shape[1], dtype=bool)].any()


def test_a_query_without_keys_changes_nothing_else():
    case = Case(packed=True)
    queries, alone = case.lonely_queries()
    q, k, v, dout = case.arrays()
    _, keys = case.tokens()
    without = jitted_run(KERNEL, q, k, v, dout, queries, keys)
    silent = jitted_run(KERNEL, q, k, v, np.where(alone[:, :, None, None, None], 0, dout), *case.tokens())
    np.testing.assert_array_equal(np.asarray(without[0])[~alone], np.asarray(silent[0])[~alone])
    assert_trees_near(without[2][1:], silent[2][1:], F32_TOLERANCE)


# ------------------------------------------------------------------------------------------------ skipped blocks


def test_blocks_of_other_segments_are_not_visited():
    """Keys and values that are not numbers in skipped blocks change nothing, forward or backward."""
    segments = np.repeat(np.arange(S // 6, dtype=np.int32) // 2, 6)
    keys = Tokens(np.broadcast_to(np.arange(S, dtype=np.int32), (2, S)), np.stack([segments, segments]))
    queries = Tokens(keys.positions, np.full((2, S), 3, np.int32))
    skipped = segments != 3
    q, k, v, dout = Case().arrays()
    clean = jitted_run(BLOCKS_OF_6, q, k, v, dout, queries, keys)
    poisoned = jitted_run(BLOCKS_OF_6, q, poison(k, skipped), poison(v, skipped), dout, queries, keys)
    chex.assert_trees_all_equal(poisoned, clean)
    assert not np.asarray(poisoned[2][1])[:, skipped].any()


def test_a_block_that_one_row_needs_is_visited():
    """Segments differ from row to row: the second row needs what the first does not."""
    first_half = np.arange(S) < S // 2
    second_row = np.where(first_half, 2, 3)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (2, S))
    keys = Tokens(positions, np.stack([np.full(S, 1), second_row]).astype(np.int32))
    queries = Tokens(positions, np.stack([np.where(first_half, 9, 1), second_row]).astype(np.int32))
    out, _, grads = jitted_run(BLOCKS_OF_6, *Case().arrays(), queries, keys)
    has_key = allowed_pairs(queries, keys).any(axis=2)
    assert_trees_near((out, grads), run_reference_where(has_key, *Case().arrays(), queries, keys), F32_TOLERANCE)


@pytest.mark.parametrize("in_backward", [False, True])
def test_every_zigzag_rank_visits_about_half_of_the_blocks(in_backward):
    """Equally many on every rank: the zigzag balances causal attention."""
    cases = [Case(kv_heads=1, group=1, ranks=4, rank=rank, batch=1) for rank in range(4)]
    assert [visited(case, in_backward) for case in cases] == [9] * 4  # of 2 x 8


def visited(case: Case, in_backward: bool, size: int = 6) -> int:
    """How many pairs of blocks are computed: those in which a NaN among the keys reaches a query, or its gradient."""
    queries, keys = case.tokens()
    q, k, v, dout = case.arrays()
    pairs = 0
    for j in range(S // size):
        poisoned = poison(k, np.arange(S) // size == j)
        if in_backward:
            out, lse = forward(BLOCKS_OF_6, q, k, v, queries, keys)
            result = backward(BLOCKS_OF_6, q, poisoned, v, queries, keys, delta(out, dout), lse, dout)[0]
        else:
            result = forward(BLOCKS_OF_6, q, poisoned, v, queries, keys)[1]
        pairs += int(np.isnan(np.asarray(result)).reshape(q.shape[1] // size, -1).any(axis=1).sum())
    return pairs
