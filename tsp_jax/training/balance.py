"""How evenly attention work is divided over the ranks of a sequence, from the lengths of its documents.

A query attends to the keys before it in its document, so the work of a rank's tokens is the number of pairs of a query
and a key that may attend. A zigzag order divides it evenly if a sequence is one document. With several documents of
unequal length a rank may have more. All devices wait for the slowest.

Dims: B batch, S sequence length, R ranks of the sequence, M chunks of a sequence, n segments (documents) of it.
"""

import numpy as np

from tsp_jax.config import ModelConfig, Order
from tsp_jax.training.data import Batches

MOST_SEQUENCES = 2048
"""sequences whose work is counted, about"""
LEAST_GAIN = 0.02
"""another order is advised if it makes the slowest rank this much faster, relative"""


def chunk_work(lengths: np.ndarray, chunks: int, window: int | None = None) -> np.ndarray:
    """Returns the pairs of a query and a key that may attend, for the queries of each chunk of a sequence, [M] int64.

    Args:
      lengths: [n] tokens of each segment; they sum to S, a multiple of M.
      chunks: M.
      window: a token attends to this many tokens, itself and those just before it; None: to all before it.
    """
    ends = np.cumsum(lengths)
    before = np.append(0, np.cumsum(_pairs(lengths, window)))
    edges = np.arange(chunks + 1) * (ends[-1] // chunks)
    whole = np.searchsorted(ends, edges, side="right")  # segments that end before the edge
    rest = edges - np.append(0, ends)[whole]
    return np.diff(before[whole] + _pairs(rest, window))


def rank_work(lengths: np.ndarray, ranks: int, order: Order, window: int | None = None) -> np.ndarray:
    """Returns the pairs of each rank's queries, [R] int64; arguments as in `chunk_work` and `sequence_order`."""
    if order == "contiguous" or ranks == 1:
        return chunk_work(lengths, ranks, window)
    work = chunk_work(lengths, 2 * ranks, window)
    return work[:ranks] + work[: ranks - 1 : -1]


def imbalance(
    batches: Batches, steps: range, *, order: Order, ranks: int, groups: int, accumulate: int, model: ModelConfig
) -> float:
    """Returns the work of the slowest device over the mean, at least 1, for the attention of some steps.

    In each micro-batch all devices wait for the slowest: work is the maximum over devices, summed over micro-batches,
    layers and steps.

    Args:
      batches: batches whose B sequences are divided into micro-batches, and these over groups of devices.
      steps: steps of `batches`; the first few that have about `MOST_SEQUENCES` sequences are counted.
      order: order of tokens over ranks.
      ranks: R.
      groups: number of devices that the sequences of a micro-batch are divided over.
      accumulate: number of micro-batches.
      model: its layers say which windows there are.
    """
    kinds = [model.period[layer % len(model.period)] for layer in range(model.num_layers)]
    windows = [model.window if kind == "sliding" else None for kind in kinds]
    slowest = mean = 0.0
    for step in steps[: -(-MOST_SEQUENCES // batches.batch)]:
        lengths = [batches.lengths(sequence) for sequence in batches.sequences(step).tolist()]
        for window in set(windows):
            work = np.array([rank_work(segments, ranks, order, window) for segments in lengths], np.float64)
            work = work.reshape(accumulate, groups, -1, ranks).sum(axis=2)
            slowest += windows.count(window) * work.max(axis=(1, 2)).sum()
            mean += windows.count(window) * work.mean(axis=(1, 2)).sum()
    return float(slowest / mean)


def _pairs(queries: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of the first `queries` tokens of a document: sum of ``min(p + 1, window)`` over their positions p."""
    ramp = queries if window is None else np.minimum(queries, window)
    return ramp * (ramp + 1) // 2 + (queries - ramp) * (0 if window is None else window)
