"""Which keys and values a rank receives: those of all ranks, or only those within a sliding window.

The sequence is split into chunks of equal length. In contiguous order rank p holds chunk p of R; in zigzag order it
holds the chunks p and 2 R - 1 - p of 2 R. With a window, a chunk's queries need its own keys and the `halo` keys just
before it. The last tokens of earlier chunks are sent in hops: hop j sends those of the chunk that lies j before.

Dims: B batch, t this device's tokens, S tokens of all R ranks, s keys that this device attends to; n chunks of a rank,
C tokens of a chunk.
"""

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsp_jax.config import TokenOrder
from tsp_jax.ops.kernels.mask import LATEST, Scores, Tokens
from tsp_jax.ops.sequence import gather_sequence, scatter_sequence
from tsp_jax.ops.stream import permute_ranks

HALO_MULTIPLE = 128
"""the halo is rounded up to a multiple of this, so that kernels' tiles fit, unless chunks are shorter"""


class Exchange(NamedTuple):
    """How keys and values are exchanged over the sequence axes. Hashable."""

    axes: tuple[str, ...]
    order: TokenOrder
    chunk: int
    """C"""
    halo: int
    """keys before each chunk that its queries need; 0: every rank receives all keys"""

    @classmethod
    def of(cls, axes: tuple[str, ...], tokens: int, scores: Scores, order: TokenOrder) -> "Exchange":
        """The exchange that receives fewer tokens; `tokens` is t. Without a known order, all keys are exchanged."""
        ranks = lax.axis_size(axes) if axes else 1
        chunks = 2 if order == "zigzag" and ranks > 1 else 1
        halo = window_halo(scores, tokens // chunks)
        few = order != "any" and 0 < halo * chunks < (ranks - 1) * tokens and tokens % chunks == 0
        return cls(axes, order, tokens // chunks, halo if few else 0)

    # -------------------------------------------------------------------------------------------- what is exchanged

    def gather(self, *arrays_Bt: jax.Array) -> tuple[jax.Array, ...]:
        """Each array [B, t, ...] -> [B, s, ...]: the tokens of all ranks; or this rank's own, then its chunks' halos.

        Moves: all-gathers of (R - 1) / R of the gathered bytes; or, for each chunk, permutes of a halo of each array.
        """
        if not self.halo:
            return gather_sequence(*arrays_Bt, axes=self.axes)
        with jax.named_scope("window_halos"):
            return tuple(jnp.concatenate([array, *self._halos(array)], axis=1) for array in arrays_Bt)

    def scatter(self, *arrays_Bs: jax.Array) -> tuple[jax.Array, ...]:
        """Sums the gradients of `gather`'s results on the ranks that hold the tokens: its transpose."""
        if not self.halo:
            return scatter_sequence(*arrays_Bs, axes=self.axes)

        def transpose(array_Bs: jax.Array) -> jax.Array:
            own = self.chunk * self._chunks
            like = jax.typeof(array_Bs).update(shape=(array_Bs.shape[0], own, *array_Bs.shape[2:]))
            return jax.linear_transpose(lambda array: self.gather(array)[0], like)(array_Bs)[0]

        return tuple(map(transpose, arrays_Bs))

    def keys(self, tokens_BS: Tokens) -> Tokens:
        """[B, s]: positions and segments of the keys of `gather`, from those of all ranks' tokens, ranks in order.

        Keys before the sequence's start, and keys that this rank holds already, have the position `LATEST`.
        """
        if not self.halo:
            return tokens_BS
        own = self._own_chunks()
        indices = [chunk * self.chunk + jnp.arange(self.chunk) for chunk in own]
        halos = [chunk * self.chunk - self.halo + jnp.arange(self.halo) for chunk in own]
        firsts = 0, (own[0] + 1) * self.chunk  # all keys of a second chunk that come earlier are held already
        real = jnp.concatenate([jnp.ones(self.chunk * len(own), bool), *map(jnp.greater_equal, halos, firsts)])
        places = self._place(jnp.concatenate(indices + halos))
        positions, segments = (array[:, jnp.maximum(places, 0)] for array in tokens_BS)
        return Tokens(jnp.where(real[None], positions, LATEST), segments)

    def fits(self, tokens_BS: Tokens) -> jax.Array:
        """[B] bool: whether the tokens are in the order that was promised, so that no key in a window is missing.

        In the order of the sequence, each token follows the one before it in the same document, or starts a later one.
        """
        places = self._place(jnp.arange(tokens_BS.positions.shape[1]))
        positions, segments = (array[:, places] for array in tokens_BS)
        follows = (segments[:, 1:] == segments[:, :-1]) & (positions[:, 1:] == positions[:, :-1] + 1)
        return (follows | (segments[:, 1:] > segments[:, :-1])).all(axis=1)

    # -------------------------------------------------------------------------------------------- chunks and ranks

    @property
    def _chunks(self) -> int:
        return 2 if self.order == "zigzag" else 1

    def _own_chunks(self) -> list[jax.Array]:
        rank, ranks = lax.axis_index(self.axes), lax.axis_size(self.axes)
        return [rank, 2 * ranks - 1 - rank][: self._chunks]

    def _place(self, index: jax.Array) -> jax.Array:
        """Index in the sequence -> index among all ranks' tokens, ranks in order."""
        if self._chunks == 1:
            return index
        ranks, chunk = lax.axis_size(self.axes), index // self.chunk
        rank = jnp.where(chunk < ranks, chunk, 2 * ranks - 1 - chunk)
        return (2 * rank + (chunk >= ranks).astype(rank.dtype)) * self.chunk + index % self.chunk

    def _halos(self, array_Bt: jax.Array) -> list[jax.Array]:
        """For each of this rank's chunks, the `halo` tokens before it; zeros where `keys` says LATEST."""
        hops = -(-self.halo // self.chunk)
        sizes = {hop: min(self.chunk, self.halo - (hop - 1) * self.chunk) for hop in range(hops, 0, -1)}
        parts = [self._hop(array_Bt, hop, size) for hop, size in sizes.items()]
        return [jnp.concatenate(halo, axis=1) for halo in zip(*parts, strict=True)]

    def _hop(self, array_Bt: jax.Array, hop: int, tokens: int) -> list[jax.Array]:
        """For each of this rank's chunks, the last `tokens` tokens of the chunk that lies `hop` before it."""
        ends = range(self.chunk, self.chunk * self._chunks + 1, self.chunk)
        tails = [lax.slice_in_dim(array_Bt, end - tokens, end, axis=1) for end in ends]
        halos = [jnp.zeros_like(tails[0]) for _ in tails]
        in_mesh, numbers = permute_ranks(self.axes)
        rank, ranks = lax.axis_index(self.axes), lax.axis_size(self.axes)
        for messages in rounds(ranks, self._chunks, hop):
            sent, received = [-1] * ranks, [-1] * ranks
            for source, tail, target, halo in messages:
                sent[source], received[target] = tail, halo
            message = tails[0] if len(tails) == 1 else jnp.where(jnp.asarray(sent)[rank] == 1, tails[1], tails[0])
            route = [(numbers[source], numbers[target]) for source, _, target, _ in messages]
            message = lax.ppermute(message, in_mesh, route)
            chunk = jnp.asarray(received)[rank]
            halos = [jnp.where(chunk == number, message, halo) for number, halo in enumerate(halos)]
        return halos


def window_halo(scores: Scores, chunk: int) -> int:
    """Keys before a chunk that its queries need; 0 if that is not known beforehand."""
    if scores.window is None or not scores.causal:
        return 0
    multiple = HALO_MULTIPLE if chunk % HALO_MULTIPLE == 0 else 1
    return -(-(scores.window - 1) // multiple) * multiple


def rounds(ranks: int, chunks: int, hop: int) -> list[list[tuple[int, int, int, int]]]:
    """The messages of a hop, in rounds in which each rank sends and receives at most one.

    A message is (sending rank, which of its chunks, receiving rank, for which of its chunks). With two chunks a rank
    sends and receives at most two, so two rounds are enough: the messages form paths and even cycles, along which the
    rounds alternate.
    """

    def holder(chunk: int) -> tuple[int, int]:
        return (chunk, 0) if chunks == 1 or chunk < ranks else (2 * ranks - 1 - chunk, 1)

    messages = []
    for rank in range(ranks):
        own = [rank, 2 * ranks - 1 - rank][:chunks]
        for number, chunk in enumerate(own):
            source = chunk - hop
            known = number == 1 and source <= own[0]  # this rank's own first chunk, or that chunk's halo
            if source >= 0 and not known:
                messages.append((*holder(source), rank, number))
    return _alternate(messages)


def _alternate(messages: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Messages in two rounds, the second of which may be missing, such that none shares a sender or a receiver."""
    by_end: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for index, (source, _, target, _) in enumerate(messages):
        by_end["from", source].append(index)
        by_end["to", target].append(index)
    round_of: dict[int, int] = {}
    for start in range(len(messages)):
        waiting = [(start, 0)]
        while waiting:
            index, number = waiting.pop()
            if index not in round_of:
                round_of[index] = number
                source, _, target, _ = messages[index]
                waiting += [(other, 1 - number) for end in (("from", source), ("to", target)) for other in by_end[end]]
    found = ([message for index, message in enumerate(messages) if round_of[index] == number] for number in (0, 1))
    return [part for part in found if part]
