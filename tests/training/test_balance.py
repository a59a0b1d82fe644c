"""Attention work per rank: the pairs that may attend, counted one by one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders.batches import counting_corpus, make_batches
from tsp_jax.config import ModelConfig
from tsp_jax.ops.kernels.mask import Scores, Tokens, may_attend
from tsp_jax.training.balance import imbalance, rank_work
from tsp_jax.training.data import sequence_order

MODEL = ModelConfig(vocab_size=8, d_model=8, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8)


def counted(positions: np.ndarray, segments: np.ndarray, window: int | None) -> np.ndarray:
    """Keys that each query of one sequence may attend to, by the rule that kernels follow."""
    tokens = Tokens(positions[:, None], segments[:, None]), Tokens(positions[None], segments[None])
    return np.asarray(may_attend(*tokens, Scores(window=window))).sum(axis=1)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@given(st.lists(st.integers(1, 30), min_size=3, max_size=12), st.sampled_from([None, 1, 5]), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=25)
def test_work_of_a_rank_is_the_number_of_pairs_that_may_attend(order, lengths, window, ranks):
    batches = make_batches(
        counting_corpus([2, *lengths]), batch=2, packing="best-fit", order=order, sequence_shards=ranks, seq_len=16
    )
    batch = batches.at(0)
    placed = sequence_order(16, ranks, order)
    for row, sequence in enumerate(batches.sequences(0).tolist()):
        pairs = counted(batch.positions[row], batch.segment_ids[row], window)
        want = pairs[placed].reshape(ranks, -1).sum(axis=1)
        np.testing.assert_array_equal(rank_work(batches.lengths(sequence), ranks, order, window), want)


def ratio(lengths, order="zigzag", model=MODEL, ranks=4, groups=1, accumulate=1, batch=1) -> float:
    batches = make_batches(counting_corpus(lengths), batch=batch, seq_len=16, shuffle=False)
    return imbalance(
        batches, range(1), order=order, ranks=ranks, groups=groups, accumulate=accumulate, model=model
    )  # fmt: skip


def test_zigzag_balances_one_document_and_contiguous_equal_ones():
    assert ratio([16]) == 1
    assert ratio([16], "contiguous") == pytest.approx((13 + 14 + 15 + 16) / (16 * 17 / 2 / 4))
    assert ratio([4] * 4, "contiguous") == 1
    # chunks of 2: 3 and 7 pairs by turns; rank p has chunks p and 7 - p
    assert ratio([4] * 4) == 1
    # one document of 8, then two of 4: chunks 3, 7, 11, 15, 3, 7, 3, 7
    assert ratio([8, 4, 4]) == pytest.approx(18 / 14)


def test_devices_wait_for_the_slowest_in_every_micro_batch():
    lengths = [16, *[1] * 16, *[1] * 16, 16]  # sequences of 136 and 16 pairs
    assert ratio(lengths, ranks=1, groups=2, batch=4) == 1
    assert ratio(lengths, ranks=1, groups=2, accumulate=2, batch=4) == pytest.approx(136 / 76)


def test_each_layer_counts_with_its_own_window():
    kinds = {"window": 1, "layer_kinds": ("full", "sliding", "sliding")}
    model = dataclasses.replace(MODEL, **kinds)
    full, sliding = np.array([10, 26, 42, 58]), np.array([4, 4, 4, 4])
    want = (full.max() + 2 * sliding.max()) / (full.mean() + 2 * sliding.mean())
    assert ratio([16], "contiguous", model) == pytest.approx(want)
