"""Batches as a pure function of the step: which tokens, in which order, on which device.

Dims: B sequences of a batch, S tokens of a sequence, R ranks of the sequence; lower case is this device's slice.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from tsp_jax.config import Config, Order
from tsp_jax.errors import ConfigError
from tsp_jax.ops.cross_entropy import IGNORE
from tsp_jax.training.corpus import Corpus, Split, load_corpus

T = TypeVar("T")
Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Four arrays [B, S] (or [micro-batches, B / micro-batches, S]) int32, all in one order of tokens."""

    tokens: Array
    labels: Array
    """next token of the same document; `IGNORE` where the document ends"""
    positions: Array
    """distance from the start of the document, or of the sequence where that comes later"""
    segment_ids: Array
    """1, 2, 3, ...: which document of the sequence"""


class Batches:
    """Sequences cut from a corpus, by step. The step is the whole state, so resuming means asking for it.

    Window w holds tokens ``[w S, (w + 1) S)`` of the corpus's stream; the rest, shorter than S, is never used. Step s
    takes samples ``[s B, (s + 1) B)`` of an endless stream of epochs, each of which holds every window once.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch: int,
        seq_len: int,
        seed: int,
        order: Order,
        sequence_shards: int,
        shuffle: bool,
    ):
        """Check that the corpus and the sequence can be cut so.

        Args:
            corpus: one split.
            batch: B, sequences of one step.
            seq_len: S, tokens of a sequence.
            seed: of the order of windows.
            order: order of tokens over the ranks of the sequence.
            sequence_shards: R, ranks that a sequence is cut over.
            shuffle: a new permutation of the windows in every epoch; else the corpus's own order.

        Raises:
            ConfigError: ``seq_len`` cannot be cut over the ranks, or the corpus is shorter than one sequence.
        """
        num_tokens = len(corpus.tokens)
        if num_tokens < seq_len:
            multiple = _seq_len_multiple(sequence_shards, order)
            fitting = num_tokens // multiple * multiple
            raise ConfigError(
                f"seq_len={seq_len} is longer than the {num_tokens} tokens of the {corpus.name}; "
                f"use {f'seq_len={fitting} or ' if fitting else ''}more text"
            )
        self.order = sequence_order(seq_len, sequence_shards, order)
        """[S] int64: the token that stands at each place of a placed array"""
        self.num_windows = num_tokens // seq_len
        """sequences in one epoch"""
        self._tokens = corpus.tokens
        self._borders = np.append(corpus.starts, num_tokens)  # document d is tokens [borders[d], borders[d + 1])
        self._batch, self._seq_len, self._seed, self._shuffle = batch, seq_len, seed, shuffle

    def at(self, step: int) -> Batch[np.ndarray]:
        """The batch of a step, [B, S], tokens in their natural order."""
        return self._read(self._windows(step), np.arange(self._seq_len))

    def place(
        self, step: int, sharding: jax.sharding.NamedSharding, *, accumulate: int | None = None
    ) -> Batch[jax.Array]:
        """The batch of a step as global arrays, tokens in `order`.

        Each process reads only the rows and columns that its own devices hold, and those once.

        Args:
            step: which batch.
            sharding: of [B, S], or of [accumulate, B / accumulate, S] if ``accumulate`` is given.
            accumulate: micro-batches, as a leading dimension: consecutive runs of the rows.

        Raises:
            ConfigError: B is not a multiple of ``accumulate``.
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

        @functools.cache  # lives as long as this call: one reading for four fields and for devices with equal slices
        def read(*bounds: tuple[int, int, int]) -> Batch[np.ndarray]:
            *rows, columns = (slice(*bound) for bound in bounds)
            return self._read(windows[tuple(rows)], self.order[columns])

        def shard(field: int, index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return read(*(part.indices(size) for part, size in zip(index, shape, strict=True)))[field]

        return Batch(
            *(
                jax.make_array_from_callback(shape, sharding, functools.partial(shard, field), dtype=np.int32)
                for field in range(len(Batch._fields))
            )
        )

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
    digest: str
    """of the training split"""


def load_splits(config: Config, sequence_shards: int) -> Splits:
    """Reads the corpus of a run, or finds it in the cache; shuffles the training split.

    Raises:
      ConfigError: as `load_corpus` and `Batches`.
    """

    def batches(split: Split, shuffle: bool) -> tuple[Corpus, Batches]:
        corpus = load_corpus(config.data, config.model.vocab_size, split)
        return corpus, Batches(
            corpus, batch=config.batch, seq_len=config.seq_len, seed=config.seed, order=config.data.order,
            sequence_shards=sequence_shards, shuffle=shuffle,
        )  # fmt: skip

    corpus, train = batches("train", shuffle=True)
    return Splits(train, batches("heldout", shuffle=False)[1], corpus.digest)


def sequence_order(seq_len: int, shards: int, order: Order) -> np.ndarray:
    """[S] int64: the token that stands at each place of an array whose slice p belongs to rank p.

    "contiguous" is the natural order. "zigzag" cuts the sequence in 2 R chunks and gives rank p chunks p and
    2 R - 1 - p, so that under a causal mask every rank attends to equally many keys.

    Raises:
        ConfigError: S is not a multiple of R (contiguous) or 2 R (zigzag; one rank takes any S).
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
    """Yield ``(step, make(step))`` for steps from ``start`` to ``stop``, at most ``depth`` of them made ahead.

    One thread makes them, in order, so what is yielded does not depend on ``depth``. An exception in ``make`` is
    raised here when its step is due. Closing the generator ends the thread. Once ``interrupt`` is done the generator
    waits for nothing: it ends where a step is not ready, and leaves the thread to what it may hang in.
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
    """[size] int64. From the generator's raw bits, which unlike its methods are the same in every numpy release."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    permutation = np.argsort(bits, kind="stable")
    permutation.flags.writeable = False
    return permutation
