"""Batches as a pure function of the step, and their placement on devices.

Dims: B batch (sequences), S sequence length (tokens), R ranks of the sequence axes.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from tsp_jax.config import Config, Order
from tsp_jax.errors import ConfigError
from tsp_jax.ops.cross_entropy import IGNORE
from tsp_jax.text.shards import Split
from tsp_jax.training.corpus import Corpus, load_corpus

T = TypeVar("T")
Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Four arrays [B, S] or [micro-batches, B / micro-batches, S], int32, with their tokens in the same order."""

    tokens: Array
    labels: Array
    """the next token of the same document; `IGNORE` at the last token of a document"""
    positions: Array
    """distance from the start of the document, or from the start of the sequence if that is nearer"""
    segment_ids: Array
    """number of the document within the sequence: 1, 2, 3, ..."""


class Batches:
    """The batches of a corpus, one for each step. The step is the only state: a resumed run asks for the next one.

    Window w is tokens ``[w S, (w + 1) S)`` of the corpus; a remainder shorter than S is never used. Each epoch has
    every window once. Epoch follows epoch in an endless sequence of windows, and step s takes places
    ``[s B, (s + 1) B)`` of this sequence.

    Args:
      corpus: one split.
      batch: B, sequences per step.
      seq_len: S, tokens per sequence.
      seed: seed of the order of windows.
      order: order of tokens over the ranks of the sequence axes.
      sequence_shards: R, number of ranks that a sequence is sharded over.
      shuffle: permute the windows anew in every epoch; otherwise they are in the order of the corpus.

    Raises:
      ConfigError: `seq_len` does not suit the ranks (see `sequence_order`), the corpus is shorter than one sequence,
        or none of its tokens has a label.
    """

    def __init__(
        self, corpus: Corpus, *, batch: int, seq_len: int, seed: int, order: Order, sequence_shards: int, shuffle: bool
    ):
        num_tokens = len(corpus.tokens)
        if num_tokens < seq_len:
            multiple = _seq_len_multiple(sequence_shards, order)
            fitting = num_tokens // multiple * multiple
            raise ConfigError(
                f"seq_len={seq_len} is longer than the {num_tokens} tokens of the {corpus.name}; "
                f"use {f'seq_len={fitting} or ' if fitting else ''}more text"
            )
        self.order = sequence_order(seq_len, sequence_shards, order)
        """[S] int64: for each position in a placed array, the index of its token in the sequence"""
        self.num_windows = num_tokens // seq_len
        """number of sequences in one epoch"""
        self.digest = corpus.digest
        self._tokens = corpus.tokens
        self._borders = np.append(corpus.starts, num_tokens)  # document d is tokens [borders[d], borders[d + 1])
        used = self.num_windows * seq_len
        if np.searchsorted(self._borders[1:], used, side="right") == used:
            raise ConfigError(
                f"the {corpus.name} has no label: each of its documents is one token long; use files of several tokens"
            )
        self._batch, self._seq_len, self._seed, self._shuffle = batch, seq_len, seed, shuffle

    def at(self, step: int) -> Batch[np.ndarray]:
        """Returns the batch of a step, [B, S], with tokens in natural order."""
        return self._read(self._windows(step), np.arange(self._seq_len))

    def place(self, step: int, sharding: NamedSharding, *, accumulate: int | None = None) -> Batch[jax.Array]:
        """Returns the batch of a step as global arrays, with tokens in `order`.

        The arrays are [B, S], or [accumulate, B / accumulate, S] with micro-batches of consecutive rows. Each process
        reads only the shards of its own devices, and each shard once.

        Raises:
          ConfigError: B is not a multiple of `accumulate`.
        """
        windows = self._windows(step)
        if accumulate is not None:
            if self._batch % accumulate:
                raise ConfigError(
                    f"batch={self._batch} is not a multiple of accumulate={accumulate}; "
                    f"use batch={-(-self._batch // accumulate) * accumulate}"
                )
            windows = windows.reshape(accumulate, -1)
        shape = (*windows.shape, self._seq_len)

        @functools.cache  # for this call only: four fields and devices with equal shards share one read
        def read(*bounds: tuple[int, int, int]) -> Batch[np.ndarray]:
            *rows, columns = (slice(*bound) for bound in bounds)
            return self._read(windows[tuple(rows)], self.order[columns])

        def shard(field: int, index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return read(*(part.indices(size) for part, size in zip(index, shape, strict=True)))[field]

        def array(field: int) -> jax.Array:
            callback = functools.partial(shard, field)
            return jax.make_array_from_callback(shape, sharding, callback, dtype=np.int32)

        return Batch(*map(array, range(len(Batch._fields))))

    def _windows(self, step: int) -> np.ndarray:
        """[B] int64: the windows of a step."""
        samples = step * self._batch + np.arange(self._batch)
        if not self._shuffle:
            return samples % self.num_windows
        epochs, places = np.divmod(samples, self.num_windows)
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = _permutation(self._seed, int(epoch), self.num_windows)[places[here]]
        return windows

    def _read(self, windows: np.ndarray, columns: np.ndarray) -> Batch[np.ndarray]:
        """[..., b] windows, [s] token indices within a window -> arrays [..., b, s] int32."""
        first = windows[..., None] * self._seq_len
        at = first + columns
        document = np.searchsorted(self._borders, at, side="right") - 1
        first_document = np.searchsorted(self._borders, first, side="right") - 1
        has_next = at + 1 < self._borders[document + 1]
        following = self._tokens[np.where(has_next, at + 1, at)].astype(np.int32)
        return Batch(
            tokens=self._tokens[at].astype(np.int32),
            labels=np.where(has_next, following, np.int32(IGNORE)),
            positions=(at - np.maximum(self._borders[document], first)).astype(np.int32),
            segment_ids=(document - first_document + 1).astype(np.int32),
        )


class Splits(NamedTuple):
    """Batches of both splits of a run's corpus."""

    train: Batches
    held_out: Batches


def load_splits(config: Config, sequence_shards: int) -> Splits:
    """Loads both splits of a run's corpus, from the cache if they are there. The training split is shuffled.

    Raises:
      ConfigError: as `load_corpus` and `Batches`.
    """

    def batches(split: Split) -> Batches:
        return Batches(
            load_corpus(config.data, config.model.vocab_size, split),
            batch=config.batch, seq_len=config.seq_len, seed=config.seed, order=config.data.order,
            sequence_shards=sequence_shards, shuffle=split == "train",
        )  # fmt: skip

    return Splits(batches("train"), batches("heldout"))


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


@functools.lru_cache(maxsize=2)  # an epoch and the next
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """A random permutation, [size] int64, made from raw bits, which are the same in every release of numpy."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    permutation = np.argsort(bits, kind="stable")
    permutation.flags.writeable = False
    return permutation
