"""Losses by position in the context: how much a model gains from the tokens before a token.

Dims: B batch, S tokens of a sequence, P buckets of positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PER_OCTAVE = 4
"""buckets between one number of tokens and twice as many"""


def position_buckets(seq_len: int) -> np.ndarray:
    """First number of tokens of each bucket: [P] int32, ascending from 1 to at most S.

    A token at position i of its document has i + 1 tokens to predict the next from, itself included. Bucket p has the
    tokens with at least `position_buckets(S)[p]` and fewer than the next bucket's.
    """
    octaves = np.arange(PER_OCTAVE * int(seq_len).bit_length() + 1) / PER_OCTAVE
    first = np.unique(np.floor(2**octaves)).astype(np.int32)
    return first[first <= seq_len]


def sum_by_position(nll_BS: jax.Array, labels_BS: jax.Array, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sums of negative log-likelihoods [P] float32, numbers of labels [P] int32).

    Positions are those of documents, so the order of tokens in the arrays does not matter.
    """
    first = position_buckets(nll_BS.shape[1])
    bucket_BS = jnp.searchsorted(jnp.asarray(first), positions_BS + 1, side="right") - 1

    # One bucket at a time: [B, S, P] is never stored. A scatter would add in the order of a GPU's atomics.
    def sums(bucket):
        inside_BS = bucket_BS == bucket
        return jnp.where(inside_BS, nll_BS, 0.0).sum(), (inside_BS & (labels_BS >= 0)).sum(dtype=jnp.int32)

    return lax.map(sums, jnp.arange(len(first), dtype=bucket_BS.dtype))
