"""Only keys and values within a window are exchanged, and the results are the same."""

import jax
import numpy as np
import pytest

from tests.builders.ops import activations
from tests.builders.sharded_attention import attention_args, check_attention, sharded_attention
from tsp_jax.ops.attention.exchange import rounds
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.ops.stream import Stream

WINDOWED = [
    ("tsp4", "zigzag", 5),
    ("tsp4", "zigzag", 8),
    ("tsp4", "zigzag", 14),
    ("tsp8", "zigzag", 9),
    ("tsp4", "contiguous", 7),
    ("tsp4", "contiguous", 20),
    ("two_axes2_4", "zigzag", 4),
    ("mix2_4", "zigzag", 5),
    ("data2_tsp4", "contiguous", 13),
]
"""(layout, order, window); a chunk has 6 tokens in zigzag order on 4 ranks, 12 in contiguous order"""


@pytest.mark.parametrize(("layout", "order", "window"), WINDOWED)
def test_windows_give_the_same_when_only_their_keys_are_exchanged(layout, order, window):
    scores = Scores(window=window)
    check_attention(layout, "shared_kv_heads", Stream(), norms=False, scores=scores, token_order=order)


@pytest.mark.parametrize(("layout", "promised"), [("tsp4", "contiguous"), ("tsp2", "contiguous")])
def test_tokens_in_another_order_than_promised_give_nan(layout, promised):
    """Keys that a window needs would be missing."""
    f = sharded_attention(layout, "multi_head", Stream(), scores=Scores(window=5), token_order=promised, order="zigzag")
    out = jax.jit(f)(*attention_args("multi_head", norms=False))
    assert out.shape == activations(0).shape
    assert np.isnan(out).all()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
def test_a_rank_sends_and_receives_one_message_in_a_round(ranks, chunks):
    for hop in range(1, ranks * chunks):
        found = rounds(ranks, chunks, hop)
        assert len(found) <= chunks
        for messages in found:
            sources, _, targets, _ = zip(*messages, strict=True)
            assert len(set(sources)) == len(set(targets)) == len(messages)


def test_messages_bring_the_chunk_that_lies_a_hop_before():
    """Four ranks hold the chunks 0 7, 1 6, 2 5 and 3 4; rank 3 holds the chunk before 4 itself."""
    held = [(0, 7), (1, 6), (2, 5), (3, 4)]
    sent = {(held[a][i], held[b][j]) for part in rounds(4, 2, 1) for a, i, b, j in part}
    assert sent == {(0, 1), (1, 2), (2, 3), (6, 7), (5, 6), (4, 5)}
