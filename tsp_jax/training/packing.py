"""How the documents of a corpus fill sequences: by cutting (`Windows`) or whole (`BestFit`).

A packing says which spans of which documents make each sequence of an epoch. It follows from the lengths of the
documents and of a sequence alone, so it is the same on every host and whenever a run is resumed.

Dims: S sequence length (tokens), n spans.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tsp_jax.config import LongDocuments, PackingName
from tsp_jax.errors import ConfigError
from tsp_jax.training.corpus import Corpus

LOOK_AHEAD = 1 << 18
"""best-fit chooses among this many consecutive documents at a time"""
_SCAN = 1 << 20  # number of tokens in memory at a time while a first label is looked for


class Spans(NamedTuple):
    """Documents, or parts of them, such as those of one sequence. Spans that do not fill it leave a tail of padding."""

    starts: np.ndarray
    """[n] int64, index of the first token in the corpus"""
    lengths: np.ndarray
    """[n] int64, tokens, at least 1"""


class Packing(Protocol):
    """The sequences of one epoch."""

    num_sequences: int
    num_dropped: int
    """documents that are in no sequence, because they are longer than one"""
    is_full: bool
    """whether no sequence has padding"""

    def spans(self, sequence: int) -> Spans:
        """Returns the spans of a sequence."""
        ...

    def spans_of(self, sequences: np.ndarray) -> Spans:
        """Returns the spans of some sequences, in the order of the corpus or of sequences."""
        ...

    def num_tokens(self, sequences: np.ndarray) -> int:
        """Returns the number of tokens in some sequences, without padding."""
        ...


class Windows:
    """Sequence w is tokens ``[w S, (w + 1) S)`` of all documents, concatenated; a remainder shorter than S is not used.

    Args:
      documents: documents, or parts of them.
      seq_len: S.
    """

    num_dropped = 0
    is_full = True

    def __init__(self, documents: Spans, seq_len: int):
        self._documents, self._seq_len = documents, seq_len
        self._ends = np.cumsum(documents.lengths)
        self.num_sequences = int(self._ends[-1]) // seq_len if len(self._ends) else 0

    def spans(self, sequence: int) -> Spans:
        first, last = sequence * self._seq_len, (sequence + 1) * self._seq_len
        inside = slice(*np.searchsorted(self._ends, [first + 1, last]))
        edges = np.concatenate([[first], self._ends[inside], [last]])
        return self._between(edges[:-1], edges[1:])

    def spans_of(self, sequences: np.ndarray) -> Spans:
        is_asked = np.zeros(self.num_sequences, bool)
        is_asked[sequences] = True
        last = self.num_sequences * self._seq_len
        edges = np.union1d(np.arange(self.num_sequences + 1) * self._seq_len, self._ends[self._ends < last])
        asked = is_asked[edges[:-1] // self._seq_len]
        return self._between(edges[:-1][asked], edges[1:][asked])

    def num_tokens(self, sequences: np.ndarray) -> int:
        return np.size(sequences) * self._seq_len

    def _between(self, first: np.ndarray, last: np.ndarray) -> Spans:
        """Spans of the concatenated documents, none of which crosses from one document to the next."""
        at = np.searchsorted(self._ends, first, side="right")
        begin = self._ends[at] - self._documents.lengths[at]
        return Spans(self._documents.starts[at] + first - begin, last - first)


class BestFit:
    """Each sequence holds whole documents, packed by `best_fit_decreasing` among `LOOK_AHEAD` documents at a time.

    A document longer than S is split into spans of S and a remainder, which is packed like a document, or is dropped.
    The index of spans takes 16 bytes per document, that of sequences another 16 per sequence.

    Args:
      documents: documents, or parts of them.
      seq_len: S.
      long_documents: what becomes of documents longer than S.
    """

    def __init__(self, documents: Spans, seq_len: int, long_documents: LongDocuments):
        starts, lengths = documents
        is_kept = lengths <= seq_len if long_documents == "drop" else np.ones(len(lengths), bool)
        self.num_dropped = int((~is_kept).sum())
        starts, lengths = _split(starts[is_kept], lengths[is_kept], seq_len)
        sequence, count = np.empty(len(starts), np.int64), 0
        for first in range(0, len(starts), LOOK_AHEAD):
            group = slice(first, first + LOOK_AHEAD)
            bins, num_bins = best_fit_decreasing(lengths[group], seq_len)
            sequence[group] = bins + count
            count += num_bins
        order = np.argsort(sequence, kind="stable")  # within a sequence, documents keep the order of the corpus
        self.num_sequences = count
        self._starts, self._lengths = starts[order], lengths[order]
        self._first = np.searchsorted(sequence[order], np.arange(count + 1))
        self._filled = np.add.reduceat(self._lengths, self._first[:-1]) if count else np.zeros(0, np.int64)
        self.is_full = bool((self._filled == seq_len).all())

    def spans(self, sequence: int) -> Spans:
        inside = slice(self._first[sequence], self._first[sequence + 1])
        return Spans(self._starts[inside], self._lengths[inside])

    def spans_of(self, sequences: np.ndarray) -> Spans:
        is_asked = np.zeros(self.num_sequences, bool)
        is_asked[sequences] = True
        asked = np.repeat(is_asked, np.diff(self._first))
        return Spans(self._starts[asked], self._lengths[asked])

    def num_tokens(self, sequences: np.ndarray) -> int:
        return int(self._filled[sequences].sum())


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Packs items into bins: the longest first, each into the fullest bin that has room for it, or into a new one.

    Items of one length are placed together: the fullest bin with room takes as many as it can, then the next. So time
    is O(n log n) for the sort, and a few list operations per distinct length and bin that it changes.

    Args:
      lengths: [n] integers from 1 to `capacity`.
      capacity: size of a bin.

    Returns:
      ([n] int64: the bin of each item, number of bins).
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    bins, placed = _Bins(), []
    for length, left in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            room = bins.least_room(length)
            if room is None:
                room = capacity
                bins.open(-(-left // (capacity // length)), room)
            each = room // length  # after an item, the same bin is again the fullest that has room
            taken = bins.take(room, left // each)
            if not taken:  # the last items of this length do not fill a bin
                taken, each = bins.take(room, 1), left
            placed.append(np.repeat(taken, each))
            bins.put(taken, room - each * length)
            left -= each * len(taken)
    bin_of_item = np.empty(len(lengths), np.int64)
    bin_of_item[order] = np.concatenate([*placed, np.zeros(0, np.int64)])
    return bin_of_item, bins.count


class _Bins:
    """Bins, found by the room that is left in them."""

    def __init__(self):
        self.count = 0
        """number of bins so far"""
        self._rooms: list[int] = []  # the keys of _bins, ascending
        self._bins: dict[int, list[int]] = {}

    def least_room(self, length: int) -> int | None:
        """The least room of a bin that has room for an item; None if there is no such bin."""
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, count: int) -> list[int]:
        """Takes out at most `count` bins with this room."""
        bins = self._bins[room]
        taken = bins[max(0, len(bins) - count) :]
        del bins[len(bins) - len(taken) :]
        if not bins:
            del self._bins[room], self._rooms[bisect_left(self._rooms, room)]
        return taken

    def put(self, bins: Sequence[int], room: int) -> None:
        """Puts bins in, with this room."""
        if room not in self._bins:
            insort(self._rooms, room)
        self._bins.setdefault(room, []).extend(bins)

    def open(self, count: int, capacity: int) -> None:
        """Puts in new bins."""
        self.put(range(self.count, self.count + count), capacity)
        self.count += count


def _split(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> Spans:
    """Splits documents longer than S into spans of S and a remainder."""
    counts = -(-lengths // seq_len)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = number * seq_len
    return Spans(np.repeat(starts, counts) + skipped, np.minimum(np.repeat(lengths, counts) - skipped, seq_len))


def documents_of(corpus: Corpus) -> Spans:
    """Returns the documents of a corpus."""
    return Spans(corpus.starts, np.diff(corpus.starts, append=len(corpus.tokens)))


def without(documents: Spans, used: Spans) -> Spans:
    """Returns what is left of all documents of a corpus without the tokens of some spans, in order."""
    order = np.argsort(used.starts)
    first, last = used.starts[order], (used.starts + used.lengths)[order]
    edges = functools.reduce(np.union1d, [documents.starts, documents.starts + documents.lengths, first, last])
    at = np.searchsorted(first, edges[:-1], side="right")  # spans that start at or before an edge
    is_left = edges[:-1] >= np.append(0, last)[at]
    return Spans(edges[:-1][is_left], np.diff(edges)[is_left])


def pack(documents: Spans, seq_len: int, packing: PackingName, long_documents: LongDocuments) -> Packing:
    """Packs documents into sequences."""
    return Windows(documents, seq_len) if packing == "windows" else BestFit(documents, seq_len, long_documents)


def check_packing(corpus: Corpus, packed: Packing, seq_len: int, multiple: int) -> None:
    """Raises ConfigError if a packing of all documents of a corpus has no sequence, or none has a label.

    `multiple`: sequence lengths that suit the ranks are its multiples; for advice.
    """
    num_tokens, documents = len(corpus.tokens), documents_of(corpus)
    if not packed.num_sequences and isinstance(packed, Windows):
        fitting = num_tokens // multiple * multiple
        raise ConfigError(
            f"seq_len={seq_len} is longer than the {num_tokens} tokens of the {corpus.name}; "
            f"use {f'seq_len={fitting} or ' if fitting else ''}more text"
        )
    if not packed.num_sequences:
        raise ConfigError(
            f"data.long_documents=drop leaves nothing of the {corpus.name}: each of its {len(corpus.starts)} "
            f"documents is longer than seq_len={seq_len}; use data.long_documents=split"
        )
    ends = documents.starts + documents.lengths
    if isinstance(packed, Windows):
        ends = np.minimum(ends, packed.num_sequences * seq_len + 1)  # the last label may lie behind the windows
    elif packed.num_dropped:
        ends = np.where(documents.lengths <= seq_len, ends, documents.starts)
    _check_labels(corpus, ends)


def _check_labels(corpus: Corpus, ends: np.ndarray) -> None:
    """Raises ConfigError if no token after the first of a document, before its end in `ends`, counts as a label."""
    labelled = np.flatnonzero(ends - corpus.starts >= 2)
    if not len(labelled):
        raise ConfigError(
            f"the {corpus.name} has no label: each of its documents is one token long; use files of several tokens"
        )
    if corpus.loss is None:
        return
    for first, end in zip(corpus.starts[labelled] + 1, ends[labelled], strict=True):
        for start in range(first, end, _SCAN):
            if corpus.loss[np.arange(start, min(end, start + _SCAN))].any():
                return
    raise ConfigError(f"the {corpus.name} has no label: none of its tokens counts for the loss; use other text")
