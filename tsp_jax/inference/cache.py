"""The KV cache: its arrays, its shardings, and which rank keeps which token.

Of n tokens of a sequence rank p of R keeps ceil((n - p) / R): they are dealt one to each rank in turn, so that ranks
differ by one token at most, whatever was prefilled and decoded before. Which tokens these are is free. Of those that
come together, `deal` gives each rank a run from the front and one from the back, as training's zigzag does.

Dims: B batch, T tokens of a chunk, S slots of all ranks, L layers, K KV heads, H head, R ranks of the sequence.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.config import ModelConfig
from tsp_jax.heads import padded_heads
from tsp_jax.layout import Placement
from tsp_jax.ops.attention.kv_cache import EMPTY, NO_TOKEN, KeyValues

PAGE = 16
"""a rank's slots are a multiple of this"""


class Cache(NamedTuple):
    """Keys and values of every layer, and what stands where."""

    k_LBKSH: Any
    """after q/k norm and RoPE"""
    v_LBKSH: Any
    positions_BS: Any
    """int32: the position of each slot's token; `EMPTY` if it has none"""
    lengths_B: Any
    """int32: tokens of each sequence"""

    @property
    def key_values(self) -> KeyValues:
        """What layers read and write."""
        return KeyValues(self.k_LBKSH, self.v_LBKSH)


def cache_specs(placement: Placement) -> Cache:
    """A Cache of PartitionSpecs: slots over the sequence axes, heads over the tensor axes alone."""
    layout = placement.layout
    batch, sequence = layout.spec("batch", "sequence")
    array = PartitionSpec(None, batch, layout.axes("heads").tensor or None, sequence, None)
    return Cache(array, array, PartitionSpec(batch, sequence), PartitionSpec(batch))


def abstract_cache(
    model: ModelConfig, placement: Placement, *, batch: int, capacity: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """Shapes, dtypes and shardings.

    KV heads are those of the stored weights, padding included; a head that several tensor shards use is there once for
    each of them.

    Args:
      model: sizes.
      placement: layout and mesh.
      batch: sequences.
      capacity: tokens of a sequence, rounded up to whole pages of every rank.
      dtype: of keys and values.
    """
    tensor_shards = math.prod(placement.mesh.shape[name] for name in placement.layout.axes("heads").tensor)
    heads = padded_heads(placement, model.num_heads, model.num_kv_heads, model.head_dim)
    page = PAGE * placement.size("sequence")
    slots = -(-capacity // page) * page
    array = (model.num_layers, batch, max(heads.kv, tensor_shards), slots, model.head_dim)
    shapes = Cache(array, array, (batch, slots), (batch,))
    return Cache(
        *(
            jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=NamedSharding(placement.mesh, spec))
            for shape, kind, spec in zip(
                shapes, (dtype, dtype, jnp.int32, jnp.int32), cache_specs(placement), strict=True
            )
        )
    )


def empty_cache(abstract: Cache) -> Cache:
    """Arrays without any token."""
    zeros = Cache(*(jnp.zeros(array.shape, array.dtype) for array in abstract))
    return zeros._replace(positions_BS=jnp.full_like(zeros.positions_BS, EMPTY))


def deal(starts: Sequence[int], counts: Sequence[int], chunk: int, ranks: int) -> np.ndarray:
    """Which token of each sequence stands at each place of a chunk.

    Args:
      starts: tokens that each sequence has in the cache already.
      counts: tokens that it gets now, each at most `chunk`.
      chunk: T, a multiple of the ranks.
      ranks: of the sequence.

    Returns:
      [B, T] int32 positions, `NO_TOKEN` for padding; each rank's tokens stand first in its T / R places.
    """
    positions = np.full((len(starts), ranks, chunk // ranks), NO_TOKEN, np.int32)
    for row, start, count in zip(positions, starts, counts, strict=True):
        shares = _kept(start + count, ranks) - _kept(start, ranks)
        front, back = shares - shares // 2, shares // 2
        runs = np.split(start + np.arange(count), np.cumsum([*front, *back[::-1]])[:-1])
        for rank, share in enumerate(shares):
            row[rank, :share] = np.concatenate([runs[rank], runs[2 * ranks - 1 - rank]])
    return positions.reshape(len(starts), chunk)


def _kept(tokens: int, ranks: int) -> np.ndarray:
    """[R]: how many of a sequence's tokens each rank keeps."""
    return (tokens + ranks - 1 - np.arange(ranks)) // ranks
