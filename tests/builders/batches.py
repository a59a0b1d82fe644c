"""Small corpora whose tokens tell where they came from, and batches of them."""

from collections.abc import Sequence

import numpy as np

from tsp_jax.training.corpus import Corpus
from tsp_jax.training.data import Batch, Batches, Weighted

DOCUMENT_LENGTHS = (5, 1, 30, 2, 100, 7, 64, 11)


def counting_corpus(
    lengths: Sequence[int] = DOCUMENT_LENGTHS, first: int = 0, loss: np.ndarray | None = None
) -> Corpus:
    """Token id = `first` + place in the stream, so that every batch tells where it came from."""
    starts = np.cumsum(lengths) - np.array(lengths)
    tokens = first + np.arange(sum(lengths), dtype=np.uint32)
    return Corpus(tokens=tokens, starts=starts, name="test corpus", digest=str(first), loss=loss)


def make_batches(corpus: Corpus | list[Weighted] | None = None, **changes) -> Batches:
    options = {"batch": 4, "seq_len": 16, "seed": 3, "order": "zigzag", "sequence_shards": 1, "shuffle": True}
    return Batches(corpus or counting_corpus(), **(options | changes))


def assert_same(got: Batch, expected: Batch) -> None:
    for name, a, b in zip(Batch._fields, got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
