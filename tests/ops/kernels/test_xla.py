"""Blockwise attention against the plain mathematics, and what it must not touch."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near, normal, packed_batch
from tsp_jax.ops import reference
from tsp_jax.ops.kernels.xla import MASKED, Blocks, Tokens, attend, attend_backward, delta
from tsp_jax.training.data import sequence_order

B, S, H = 2, 48, 10


class Case(NamedTuple):
    """Queries are some of the tokens, as on one rank; keys are all of them, in the order of the ranks."""

    kv_heads: int = 3
    group: int = 2
    blocks: Blocks = Blocks(4, 6)
    packed: bool = False
    ranks: int = 1
    rank: int = 0
    batch: int = B

    def tokens(self) -> tuple[Tokens, Tokens]:
        """(queries, keys)"""
        order = sequence_order(S, self.ranks, "zigzag")
        batch = packed_batch(self.batch, S, 7)
        positions = batch.positions if self.packed else np.broadcast_to(np.arange(S, dtype=np.int32), (self.batch, S))
        segments = batch.segment_ids if self.packed else np.zeros((self.batch, S), np.int32)
        keys = Tokens(positions[:, order], segments[:, order])
        here = slice(self.rank * (S // self.ranks), (self.rank + 1) * (S // self.ranks))
        return Tokens(*(array[:, here] for array in keys)), keys

    def arrays(self):
        """(q, k, v, cotangent)"""
        queries = self.batch, S // self.ranks, self.kv_heads, self.group, H
        keys = self.batch, S, self.kv_heads, H
        return normal(0, *queries, std=2.0), normal(1, *keys), normal(2, *keys), normal(3, *queries)


forward = jax.jit(attend, static_argnames="blocks")
backward = jax.jit(attend_backward, static_argnames="blocks")


def run(q, k, v, dout, queries, keys, blocks):
    """(out, lse, (dq, dk, dv))"""
    out, lse = attend(q, k, v, queries, keys, blocks)
    return out, lse, attend_backward(q, k, v, queries, keys, delta(out, dout), lse, dout, blocks)


jitted_run = jax.jit(run, static_argnums=6)


@jax.jit
def run_reference(q, k, v, dout, queries, keys):
    def f(q, k, v):
        return reference.softmax_attention(q, k, v, queries.positions, keys.positions, queries.segments, keys.segments)

    (out, lse), vjp = jax.vjp(f, q, k, v)
    return out, lse, vjp((dout, jnp.zeros_like(lse)))


CASES = {
    "plain": Case(),
    "one head": Case(kv_heads=1, group=1),
    "no groups": Case(group=1),
    "one group": Case(kv_heads=1, group=5),
    "packed": Case(packed=True),
    "packed, one row": Case(packed=True, batch=1),
    "zigzag, first of 4": Case(ranks=4, rank=0),
    "zigzag, last of 4": Case(ranks=4, rank=3),
    "zigzag, packed, third of 4": Case(ranks=4, rank=2, packed=True),
    "blocks of one token": Case(blocks=Blocks(1, 1), packed=True),
    "one block": Case(blocks=Blocks(S, S), packed=True),
    "blocks longer than the sequence": Case(blocks=Blocks(512, 512)),
    "blocks that do not divide": Case(blocks=Blocks(7, 11), packed=True),
    "query blocks longer than key blocks": Case(blocks=Blocks(16, 3)),
    "key blocks longer than query blocks": Case(blocks=Blocks(3, 16)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_equal_the_reference(case):
    queries, keys = case.tokens()
    actual = jitted_run(*case.arrays(), queries, keys, case.blocks)
    assert_trees_near(actual, run_reference(*case.arrays(), queries, keys), F32_TOLERANCE)


def test_the_reference_is_what_jax_computes():
    case = Case()
    q, k, v, dout = case.arrays()
    desired = jax.nn.dot_product_attention(jnp.asarray(q.reshape(B, S, -1, H)), k, v, is_causal=True)
    assert_trees_near(run_reference(q, k, v, dout, *case.tokens())[0].reshape(desired.shape), desired, F32_TOLERANCE)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_any_order_and_any_segments(seed, num_segments):
    """Queries and keys in orders of their own: nothing but positions and segments counts."""
    rng = np.random.default_rng(seed)
    case = Case()
    tokens = [
        Tokens(
            np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32),
            rng.integers(0, num_segments, (B, S), np.int32),
        )
        for _ in range(2)
    ]
    queries, keys = tokens
    out, lse, grads = jitted_run(*case.arrays(), queries, keys, case.blocks)
    has_key = (np.asarray(lse) > MASKED / 2).all(axis=(2, 3))
    q, k, v, dout = case.arrays()
    # The reference divides by zero for a query without a key: there, let queries see one key and count for nothing.
    desired = run_reference_where(has_key, q, k, v, dout, queries, keys)
    assert_trees_near((out, grads), desired, F32_TOLERANCE)


@jax.jit
def run_reference_where(has_key, q, k, v, dout, queries, keys):
    def f(q, k, v):
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / np.float32(np.sqrt(H))
        allowed = (keys.positions[:, None] <= queries.positions[:, :, None]) & (
            keys.segments[:, None] == queries.segments[:, :, None]
        )
        weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED), axis=-1)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
        return jnp.where(has_key[:, :, None, None, None], out, 0.0)

    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(dout)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_queries_of_all_ranks_are_the_queries_of_the_sequence(ranks):
    parts = []
    for rank in range(ranks):
        case = Case(ranks=ranks, rank=rank, packed=True)
        q, k, v, _ = Case(packed=True).arrays()
        order = sequence_order(S, ranks, "zigzag")
        queries, keys = case.tokens()
        here = order[rank * (S // ranks) : (rank + 1) * (S // ranks)]
        parts.append(forward(q[:, here], k[:, order], v[:, order], queries, keys, case.blocks)[0])
    natural = np.concatenate(parts, axis=1)[:, np.argsort(sequence_order(S, ranks, "zigzag"))]
    q, k, v, dout = Case(packed=True).arrays()
    assert_trees_near(natural, run_reference(q, k, v, dout, *Case(packed=True).tokens())[0], F32_TOLERANCE)


def test_bfloat16_is_near_float32():
    case = Case(packed=True)
    half = tuple(jnp.asarray(array, jnp.bfloat16) for array in case.arrays())
    out, lse, grads = jitted_run(*half, *case.tokens(), case.blocks)
    assert [array.dtype for array in (out, lse, *grads)] == [jnp.bfloat16, jnp.float32, *(jnp.bfloat16,) * 3]
    desired = run_reference(*(array.astype(jnp.float32) for array in half), *case.tokens())
    assert_trees_near((out, lse, grads), desired, BF16_TOLERANCE)


def test_scores_of_any_size_are_finite():
    case = Case()
    q, k, v, dout = case.arrays()
    out, lse, _ = jitted_run(100 * q, 100 * k, v, dout, *case.tokens(), case.blocks)
    desired = run_reference(100 * q, 100 * k, v, dout, *case.tokens())
    assert_trees_near((out, lse), desired[:2], LARGE_SCORES_TOLERANCE)


LARGE_SCORES_TOLERANCE = 1e-2
"""relative; a score of 50,000 is known to 4e-3, and so is the logarithm of its weight"""


# ------------------------------------------------------------------------------------------------ who sees whom


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_reach_exactly_the_allowed_keys(rank, packed):
    """d out[t] / d k[s] and d v[s] are zero, to the bit, for later and foreign s, and for no other."""
    case = Case(kv_heads=1, group=1, ranks=4, rank=rank, packed=packed, batch=1)
    queries, keys = case.tokens()
    q, k, v, dout = case.arrays()
    out, lse = forward(q, k, v, queries, keys, case.blocks)

    @jax.jit
    @jax.vmap
    def gradients(chosen_t):
        one = jnp.where(chosen_t[None, :, None, None, None], dout, 0.0)
        return backward(q, k, v, queries, keys, delta(out, one), lse, one, case.blocks)

    dq, dk, dv = gradients(np.eye(q.shape[1], dtype=bool))
    allowed = (keys.positions[0] <= queries.positions[0][:, None]) & (keys.segments[0] == queries.segments[0][:, None])
    reached_by_k, reached_by_v = ((np.asarray(grad) != 0).any(axis=(1, 3, 4)) for grad in (dk, dv))
    np.testing.assert_array_equal(reached_by_v, allowed)
    assert not reached_by_k[~allowed].any()
    several = allowed.sum(axis=1, keepdims=True) > 1  # the weight of an only key is 1, whatever the key
    assert reached_by_k[allowed & several].all()
    assert not (np.asarray(dq) != 0).any(axis=(1, 3, 4, 5))[~np.eye(q.shape[1], dtype=bool)].any()


def _without_keys(case: Case) -> tuple[Tokens, np.ndarray]:
    """Queries of which every fifth is of a segment that no key has; and which these are."""
    queries, _ = case.tokens()
    alone = np.zeros((case.batch, S), bool)
    alone[:, ::5] = True
    return Tokens(queries.positions, np.where(alone, 99, queries.segments).astype(np.int32)), alone


def test_a_query_without_keys_has_no_output_and_no_gradient():
    case = Case(packed=True)
    queries, alone = _without_keys(case)
    out, lse, (dq, *_) = (jax.device_get(x) for x in jitted_run(*case.arrays(), queries, case.tokens()[1], case.blocks))
    assert not out[alone].any()
    assert not dq[alone].any()
    assert (lse[alone] == np.float32(MASKED)).all()
    assert np.isfinite(dq).all()


def test_a_query_without_keys_changes_nothing_else():
    case = Case(packed=True)
    queries, alone = _without_keys(case)
    q, k, v, dout = case.arrays()
    _, keys = case.tokens()
    without = jitted_run(q, k, v, dout, queries, keys, case.blocks)
    silent = jitted_run(q, k, v, np.where(alone[:, :, None, None, None], 0, dout), *case.tokens(), case.blocks)
    np.testing.assert_array_equal(np.asarray(without[0])[~alone], np.asarray(silent[0])[~alone])
    assert_trees_near(without[2][1:], silent[2][1:], F32_TOLERANCE)


# ------------------------------------------------------------------------------------------------ skipped blocks


def needed_keys(queries: Tokens, keys: Tokens, blocks: Blocks) -> np.ndarray:
    """[S]: keys in a block that holds an allowed pair of tokens with any query, by looking at every pair."""
    allowed = (keys.positions[:, None] <= queries.positions[:, :, None]) & (
        keys.segments[:, None] == queries.segments[:, :, None]
    )
    return np.repeat(allowed.any(axis=(0, 1)).reshape(-1, blocks.key).any(axis=1), blocks.key)


def poison(array: np.ndarray, where_t: np.ndarray) -> np.ndarray:
    return np.where(where_t.reshape(1, -1, *(1,) * (array.ndim - 2)), np.nan, array).astype(np.float32)


@pytest.mark.parametrize(("ranks", "rank"), [(4, 1), (4, 2), (4, 3)])
def test_key_blocks_after_every_query_are_not_visited(ranks, rank):
    case = Case(ranks=ranks, rank=rank, blocks=Blocks(6, 6))
    queries, keys = case.tokens()
    last = queries.positions.max()
    later = (keys.positions[0].reshape(-1, 6) > last).all(axis=1).repeat(6)
    assert later.any()
    np.testing.assert_array_equal(later, ~needed_keys(queries, keys, case.blocks))
    check_poisoned_keys(case, later)


def test_blocks_of_other_segments_are_not_visited():
    case = Case(blocks=Blocks(6, 6), batch=2)
    segments = np.repeat(np.arange(S // 6, dtype=np.int32) // 2, 6)
    segments = np.stack([segments, segments])
    keys = Tokens(np.broadcast_to(np.arange(S, dtype=np.int32), (2, S)), segments)
    queries = Tokens(keys.positions, np.full((2, S), 3, np.int32))
    check_poisoned_keys(case, segments[0] != 3, queries, keys)


def test_a_block_that_one_row_needs_is_visited():
    """Segments differ from row to row: the second row needs what the first does not."""
    case = Case(blocks=Blocks(6, 6))
    keys = Tokens(
        np.broadcast_to(np.arange(S, dtype=np.int32), (2, S)),
        np.stack([np.full(S, 1), np.where(np.arange(S) < S // 2, 2, 3)]).astype(np.int32),
    )
    queries = Tokens(
        keys.positions, np.stack([np.where(np.arange(S) < S // 2, 9, 1), keys.segments[1]]).astype(np.int32)
    )
    q, k, v, dout = case.arrays()
    out, lse, grads = jitted_run(q, k, v, dout, queries, keys, case.blocks)
    has_key = np.asarray(lse > MASKED / 2).all(axis=(2, 3))
    assert_trees_near((out, grads), run_reference_where(has_key, q, k, v, dout, queries, keys), F32_TOLERANCE)


def check_poisoned_keys(case: Case, skipped: np.ndarray, queries: Tokens | None = None, keys: Tokens | None = None):
    """Keys and values that are not numbers where blocks are skipped change nothing, forward or backward."""
    if queries is None or keys is None:
        queries, keys = case.tokens()
    q, k, v, dout = case.arrays()
    clean = jitted_run(q, k, v, dout, queries, keys, case.blocks)
    poisoned = jitted_run(q, poison(k, skipped), poison(v, skipped), dout, queries, keys, case.blocks)
    chex.assert_trees_all_equal(poisoned, clean)
    assert not np.asarray(poisoned[2][1])[:, skipped].any()


def test_query_blocks_before_every_key_are_not_visited_backward():
    """Where keys are the last of the sequence, queries before them do not count even if they are not numbers."""
    case = Case(blocks=Blocks(6, 6))
    queries, _ = case.tokens()
    q, k, v, dout = case.arrays()
    late = slice(S // 2, None)
    keys = Tokens(*(array[:, late] for array in queries))
    early = np.arange(S) < S // 2
    out, lse = forward(q, k[:, late], v[:, late], queries, keys, case.blocks)
    run_backward = functools.partial(
        backward, k_BSKH=k[:, late], v_BSKH=v[:, late], queries=queries, keys=keys, delta_BTKG=delta(out, dout),
        lse_BTKG=lse, blocks=case.blocks,
    )  # fmt: skip
    clean = run_backward(q, dout_BTKGH=dout)
    poisoned = run_backward(poison(q, early), dout_BTKGH=poison(dout, early))
    chex.assert_trees_all_equal(poisoned, clean)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_zigzag_rank_visits_about_half_of_the_blocks(in_backward):
    """Every rank visits equally many: what balances causal attention."""
    counts = []
    for rank in range(4):
        case = Case(kv_heads=1, group=1, ranks=4, rank=rank, blocks=Blocks(6, 6), batch=1)
        queries, keys = case.tokens()
        first_k, last_q = keys.positions[0].reshape(-1, 6).min(axis=1), queries.positions[0].reshape(-1, 6).max(axis=1)
        table = first_k[None] <= last_q[:, None]
        counts.append(visited(case, in_backward))
        assert counts[-1] == table.sum()
    assert len(set(counts)) == 1
    assert counts[0] == 9  # of 2 x 8


def visited(case: Case, in_backward: bool) -> int:
    """How many block pairs are computed: those in which a key that is not a number spoils a query, or its gradient."""
    queries, keys = case.tokens()
    q, k, v, dout = case.arrays()
    pairs = 0
    size = case.blocks.key
    for j in range(S // size):
        spoiled = poison(k, np.arange(S) // size == j)
        if in_backward:
            out, lse = forward(q, k, v, queries, keys, case.blocks)
            result = backward(q, spoiled, v, queries, keys, delta(out, dout), lse, dout, case.blocks)[0]
        else:
            result = forward(q, spoiled, v, queries, keys, case.blocks)[1]
        bad = np.isnan(np.asarray(result)).reshape(q.shape[1] // case.blocks.query, -1).any(axis=1)
        pairs += int(bad.sum())
    return pairs
