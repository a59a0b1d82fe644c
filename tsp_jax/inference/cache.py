"""The KV cache: its arrays, their shardings, and which rank keeps which token.

Rank p of R keeps ceil((n - p) / R) of a sequence's n tokens, so the counts of two ranks differ by at most one,
whatever was prefilled and decoded before. Which tokens a rank keeps does not matter to attention. `assign_tokens` gives
each rank two runs of a chunk, one from the front and one from the back, as training's zigzag order does.

Dims: B batch, T tokens of a chunk, S cache entries of all ranks, L layers, K KV heads, H head, R ranks of the sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsp_jax.config import ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.memory import memory_bytes, shard_bytes
from tsp_jax.heads import HeadSharding
from tsp_jax.layout import Placement
from tsp_jax.ops.attention.kv_cache import EMPTY, NO_TOKEN, KeyValues

MAX_CAPACITY = 2**30
"""most tokens of a sequence: positions are int32"""
ENTRIES_MULTIPLE = 16
"""a rank's number of cache entries is a multiple of this"""


class Cache(NamedTuple):
    """Keys and values of every layer, and the position of each entry's token."""

    k_LBKSH: Any
    """after q/k norm and RoPE"""
    v_LBKSH: Any
    positions_BS: Any
    """int32: position of each entry's token; `EMPTY` if the entry holds no token"""
    lengths_B: Any
    """int32: number of tokens of each sequence"""

    @property
    def key_values(self) -> KeyValues:
        """The arrays that layers read and write."""
        return KeyValues(self.k_LBKSH, self.v_LBKSH)


def cache_specs(placement: Placement) -> Cache:
    """A Cache of PartitionSpecs: entries sharded over the sequence axes, heads over the tensor axes only."""
    layout = placement.layout
    batch, sequence = layout.spec("batch", "sequence")
    array = PartitionSpec(None, batch, layout.axes("heads").tensor or None, sequence, None)
    return Cache(array, array, PartitionSpec(batch, sequence), PartitionSpec(batch))


def abstract_cache(
    model: ModelConfig, placement: Placement, *, batch: int, capacity: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """Shapes, dtypes and shardings of a cache with keys and values in `dtype`.

    `capacity` is a number of tokens per sequence. It is rounded up, so that every rank has a multiple of
    `ENTRIES_MULTIPLE` entries. The KV heads include padded heads. A head that several tensor shards use has a copy on
    each of them.
    """
    heads = HeadSharding.of(placement.layout, placement.mesh.shape, model.num_heads, model.num_kv_heads, model.head_dim)
    multiple = ENTRIES_MULTIPLE * placement.size("sequence")
    entries = -(-capacity // multiple) * multiple
    array = (model.num_layers, batch, heads.shard.kv * heads.tensor, entries, model.head_dim)
    shapes, dtypes = (array, array, (batch, entries), (batch,)), (dtype, dtype, jnp.int32, jnp.int32)
    shardings = (NamedSharding(placement.mesh, spec) for spec in cache_specs(placement))
    fields = zip(shapes, dtypes, shardings, strict=True)
    return Cache(*(jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind, sharding in fields))


def check_capacity(
    model: ModelConfig, placement: Placement, *, batch: int, capacity: int, dtype: jax.typing.DTypeLike,
    weight_bytes: int = 0,
) -> None:  # fmt: skip
    """Raises ConfigError if weights and cache do not fit a device's memory (if its size is known)."""
    if capacity > MAX_CAPACITY:
        raise ConfigError(f"capacity={capacity} is too large; use at most {MAX_CAPACITY}")
    devices = placement.mesh.local_devices if isinstance(placement.mesh, Mesh) else []
    memory = memory_bytes(devices)
    cache = abstract_cache(model, placement, batch=batch, capacity=capacity, dtype=dtype)
    need = shard_bytes(cache)
    room = memory - weight_bytes if memory else need
    if need > room:
        raise ConfigError(
            f"capacity={capacity} (a prompt and its max_new_tokens) needs {need:,} bytes per device for keys and "
            f"values, {max(room, 0):,} are left beside the weights; use at most {max(1, capacity * room // need):,}"
        )


def empty_cache(abstract: Cache) -> Cache:
    """A cache without tokens."""
    zeros = Cache(*(jnp.zeros(array.shape, array.dtype) for array in abstract))
    return zeros._replace(positions_BS=jnp.full_like(zeros.positions_BS, EMPTY))


def assign_tokens(starts: Sequence[int], counts: Sequence[int], chunk: int, ranks: int) -> np.ndarray:
    """Positions of the tokens of a chunk in the order of the ranks that keep them.

    Args:
      starts: for each sequence, number of its tokens that are in the cache.
      counts: for each sequence, number of its tokens in this chunk, at most `chunk`.
      chunk: T, a multiple of `ranks`.
      ranks: R, the number of ranks over which a sequence is sharded.

    Returns:
      [B, T] int32 positions: R blocks of T / R, one per rank, each padded at its end with `NO_TOKEN`.
    """
    positions = np.full((len(starts), ranks, chunk // ranks), NO_TOKEN, np.int32)
    for row, start, count in zip(positions, starts, counts, strict=True):
        new = _tokens_per_rank(start + count, ranks) - _tokens_per_rank(start, ranks)
        front, back = new - new // 2, new // 2
        runs = np.split(start + np.arange(count), np.cumsum([*front, *back[::-1]])[:-1])
        for rank, length in enumerate(new):
            row[rank, :length] = np.concatenate([runs[rank], runs[2 * ranks - 1 - rank]])
    return positions.reshape(len(starts), chunk)


def _tokens_per_rank(tokens: int, ranks: int) -> np.ndarray:
    """[R]: number of a sequence's tokens that each rank keeps."""
    return (tokens + ranks - 1 - np.arange(ranks)) // ranks
