"""Batches as a pure function of the step, and their placement on devices.

Dims: B batch (sequences), S sequence length (tokens), R ranks of the sequence axes.
"""

import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from tsp_jax.config import LongDocuments, Order, PackingName
from tsp_jax.errors import ConfigError
from tsp_jax.ops.cross_entropy import IGNORE
from tsp_jax.ops.kernels.mask import PADDING
from tsp_jax.training.corpus import Corpus
from tsp_jax.training.mixture import Interleaving
from tsp_jax.training.packing import Spans
from tsp_jax.training.rows import NOTHING, Row

T = TypeVar("T")
Array = TypeVar("Array")
_GAP = 1 << 12  # tokens that are read and thrown away, rather than read the tokens around them in two reads


class Batch(NamedTuple, Generic[Array]):
    """Four arrays [B, S] or [micro-batches, B / micro-batches, S], int32, with their tokens in the same order.

    A sequence that documents do not fill ends with padding: token 0, no label, and the segment `PADDING`.
    """

    tokens: Array
    labels: Array
    """the next token of the same document; `IGNORE` at the last token of a document, and where the next token does not
    count for the loss"""
    positions: Array
    """distance from the start of the document, or from the start of the sequence if that is nearer"""
    segment_ids: Array
    """number of the document within the sequence: 1, 2, 3, ...; `PADDING` after the last one"""


class Weighted(NamedTuple):
    """One source of a mixture."""

    name: str
    corpus: Corpus
    weight: int


class Batches:
    """The batches of a corpus, one for each step. The step is the only state: a resumed run asks for the next one.

    A packing (`tsp_jax.training.packing`) makes sequences of the corpus. Each epoch has every sequence once. Epoch
    follows epoch in an endless row of sequences, and step s takes places ``[s B, (s + 1) B)`` of this row. In a mixture
    each source has such a row, and places are divided among the sources by weight.

    Args:
      corpus: one split, or one split of each source of a mixture.
      batch: B, sequences per step.
      seq_len: S, tokens per sequence.
      seed: seed of the order of sequences.
      order: order of tokens over the ranks of the sequence axes.
      sequence_shards: R, number of ranks that a sequence is sharded over.
      shuffle: permute the sequences anew in every epoch; otherwise they are in the order of the corpus.
      packing: how documents fill sequences.
      long_documents: what best-fit packing does with documents longer than a sequence.
      phase: number of the phase of a schedule of lengths; each has an order of its own.
      used: what earlier phases have used of each source in the epoch that they ended in (`Row`).

    Raises:
      ConfigError: `seq_len` does not suit the ranks (see `sequence_order`), a corpus is shorter than one sequence,
        or none of its tokens has a label.
    """

    def __init__(
        self, corpus: Corpus | Sequence[Weighted], *, batch: int, seq_len: int, seed: int, order: Order,
        sequence_shards: int, shuffle: bool, packing: PackingName = "windows", long_documents: LongDocuments = "split",
        phase: int = 0, used: Sequence[Spans] | None = None,
    ):  # fmt: skip
        self.sources = [Weighted("", corpus, 1)] if isinstance(corpus, Corpus) else list(corpus)
        multiple = _seq_len_multiple(sequence_shards, order)
        make_row = functools.partial(
            Row, seq_len=seq_len, multiple=multiple, packing=packing, long_documents=long_documents, seed=seed,
            shuffle=shuffle,
        )  # fmt: skip
        used = used or [NOTHING] * len(self.sources)
        pairs = enumerate(zip(self.sources, used, strict=True))
        self.rows = [make_row(source.corpus, spans, stream=phase << 16 | k) for k, (source, spans) in pairs]
        """of each source"""
        self.order = sequence_order(seq_len, sequence_shards, order)
        """[S] int64: for each position in a placed array, the index of its token in the sequence"""
        self.num_windows = sum(row.packing.num_sequences for row in self.rows)
        """number of sequences in one epoch of every source"""
        self.digest = _digest(self.sources)
        self.batch, self.seq_len = batch, seq_len
        self.interleaving = Interleaving([source.weight for source in self.sources])
        sizes = [row.size for row in self.rows]
        # Sequences are numbered over all sources: source k has those from first[k] on.
        self._first = np.cumsum(sizes) - sizes
        self._borders = [np.append(source.corpus.starts, len(source.corpus.tokens)) for source in self.sources]
        self._shuffle = shuffle

    def at(self, step: int) -> Batch[np.ndarray]:
        """Returns the batch of a step, [B, S], with tokens in natural order."""
        return self._read(self.sequences(step), np.arange(self.seq_len))

    def num_tokens(self, step: int) -> int:
        """Returns the number of tokens in the batch of a step, without padding."""
        sequences = self.sequences(step)
        sources = self._source_of(sequences)
        return sum(row.num_tokens(sequences[sources == k] - self._first[k]) for k, row in enumerate(self.rows))

    def source_tokens(self, steps: int) -> np.ndarray:
        """Returns the tokens of each source in the first `steps` steps, without padding, [sources] int64."""
        places = self.interleaving.counts(steps * self.batch).tolist()
        return np.array([row.tokens_before(place) for row, place in zip(self.rows, places, strict=True)], np.int64)

    def used(self, steps: int) -> list[Spans]:
        """Returns what the first `steps` steps use of each source in the epoch of it that they end in."""
        places = self.interleaving.counts(steps * self.batch).tolist()
        return [row.used_before(place) for row, place in zip(self.rows, places, strict=True)]

    def lengths(self, sequence: int) -> np.ndarray:
        """Returns the tokens of each segment of a sequence, padding included, [segments] int64; they sum to S."""
        source = self._source_of(sequence)
        lengths = self.rows[source].spans(sequence - int(self._first[source])).lengths
        padding = self.seq_len - lengths.sum()
        return np.append(lengths, padding) if padding else lengths

    def sequences(self, step: int) -> np.ndarray:
        """Returns the sequences of a step, [B] int64, numbered over all sources."""
        sources, places = self.interleaving.at(step * self.batch + np.arange(self.batch))
        sequences = np.empty_like(places)
        for source in np.unique(sources):
            here = sources == source
            sequences[here] = self._first[source] + self.rows[source].at(places[here])
        return sequences

    def place(self, step: int, sharding: NamedSharding, *, accumulate: int | None = None) -> Batch[jax.Array]:
        """Returns the batch of a step as global arrays, with tokens in `order`.

        The arrays are [B, S], or [accumulate, B / accumulate, S] with micro-batches of consecutive rows. Each process
        reads only the shards of its own devices, and each shard once.

        Raises:
          ConfigError: B is not a multiple of `accumulate`.
        """
        sequences = self.sequences(step)
        if accumulate is not None:
            if self.batch % accumulate:
                raise ConfigError(
                    f"batch={self.batch} is not a multiple of accumulate={accumulate}; "
                    f"use batch={-(-self.batch // accumulate) * accumulate}"
                )
            sequences = sequences.reshape(accumulate, -1)
        shape = (*sequences.shape, self.seq_len)

        @functools.cache  # for this call only: four fields and devices with equal shards share one read
        def read(*bounds: tuple[int, int, int]) -> Batch[np.ndarray]:
            *rows, columns = (slice(*bound) for bound in bounds)
            return self._read(sequences[tuple(rows)], self.order[columns])

        def shard(field: int, index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return read(*(part.indices(size) for part, size in zip(index, shape, strict=True)))[field]

        def array(field: int) -> jax.Array:
            callback = functools.partial(shard, field)
            return jax.make_array_from_callback(shape, sharding, callback, dtype=np.int32)

        return Batch(*map(array, range(len(Batch._fields))))

    def _source_of(self, sequences):
        return np.searchsorted(self._first, sequences, side="right") - 1

    def _read(self, windows: np.ndarray, columns: np.ndarray) -> Batch[np.ndarray]:
        """[..., b] sequences, [s] token indices within a sequence -> arrays [..., b, s] int32."""
        rows = [self._read_row(sequence, columns) for sequence in windows.ravel().tolist()]
        shape = (*windows.shape, len(columns))
        return Batch(*(np.reshape(field, shape).astype(np.int32) for field in zip(*rows, strict=True)))

    def _read_row(self, sequence: int, columns: np.ndarray) -> Batch[np.ndarray]:
        """Some tokens of one sequence: arrays [s]."""
        source = self._source_of(sequence)
        corpus, borders = self.sources[source].corpus, self._borders[source]
        spans = self.rows[source].spans(sequence - int(self._first[source]))
        ends = np.cumsum(spans.lengths)  # within the sequence
        segment = np.searchsorted(ends, columns, side="right")  # padding comes after the last span
        positions = columns - np.append(0, ends)[segment]
        span = np.minimum(segment, len(ends) - 1)
        at = spans.starts[span] + np.minimum(positions, spans.lengths[span] - 1)
        stop = borders[np.searchsorted(borders, spans.starts, side="right")]  # of each span's document
        is_real = segment < len(ends)
        has_next = is_real & (at + 1 < stop[span])
        following = np.where(has_next, at + 1, at)
        if corpus.loss is not None:
            has_next &= _gather(corpus.loss, following) != 0
        return Batch(
            tokens=np.where(is_real, _gather(corpus.tokens, at), 0),
            labels=np.where(has_next, _gather(corpus.tokens, following).astype(np.int32), np.int32(IGNORE)),
            positions=positions,
            segment_ids=np.where(is_real, segment + 1, PADDING),
        )


def sequence_order(seq_len: int, shards: int, order: Order) -> np.ndarray:
    """Order of tokens in an array that is sharded over R ranks: [S] int64, for each position the index of its token.

    "contiguous" is the natural order. "zigzag" splits the sequence into 2 R chunks and gives rank p the chunks p and
    2 R - 1 - p, so that under a causal mask every rank attends to the same number of keys.

    Raises:
      ConfigError: S is not a multiple of R (contiguous) or of 2 R (zigzag with R > 1).
    """
    multiple = _seq_len_multiple(shards, order)
    if seq_len % multiple:
        below = seq_len // multiple * multiple
        nearest = below if below and 2 * (seq_len - below) <= multiple else below + multiple
        reason = f"twice the {shards} ranks (zigzag)" if order == "zigzag" else f"the {shards} ranks"
        raise ConfigError(f"seq_len={seq_len} is not a multiple of {reason} of the sequence; use seq_len={nearest}")
    natural = np.arange(seq_len)
    if order == "contiguous" or shards == 1:
        return natural
    chunks = natural.reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(seq_len)


def prefetch(
    make: Callable[[int], T], start: int, stop: int, depth: int, interrupt: Future | None = None
) -> Generator[tuple[int, T], None, None]:
    """Yields ``(step, make(step))`` for each step, prepared by one thread, in order.

    At most `depth` items are prepared ahead. An exception of `make` is raised when its step is due. Closing the
    generator ends the thread. Once `interrupt` is done the generator ends at the first step that is not ready, without
    waiting for the thread (which may hang).
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tsp_prefetch")
    pending: deque[tuple[int, Future[T]]] = deque()
    steps = iter(range(start, stop))
    try:
        while True:
            for step in itertools.islice(steps, depth + 1 - len(pending)):
                pending.append((step, worker.submit(make, step)))
            if not pending:
                return
            due, future = pending.popleft()
            if interrupt and not future.done():
                wait([future, interrupt], return_when=FIRST_COMPLETED)
                if not future.done():
                    return
            yield due, future.result()
    finally:
        worker.shutdown(wait=not (interrupt and interrupt.done()), cancel_futures=True)


def _seq_len_multiple(shards: int, order: Order) -> int:
    return 2 * shards if order == "zigzag" and shards > 1 else shards


def _gather(array: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The items of a corpus at some indices, [s]; a run of indices close to each other takes one read."""
    runs = np.split(at, np.flatnonzero(np.abs(np.diff(at)) > _GAP) + 1)
    return np.concatenate([array[run] for run in runs])


def _digest(sources: Sequence[Weighted]) -> str:
    """SHA-256 of the text of all sources and of their weights; of one source without a name its corpus's own."""
    if len(sources) == 1 and not sources[0].name:
        return sources[0].corpus.digest
    facts = [(source.name, source.weight, source.corpus.digest) for source in sources]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
