"""The sequences of one source in the order in which a run takes them.

Dims: N sequences of an epoch, M sequences of the rest of an epoch that an earlier phase began.
"""

import numpy as np

from tsp_jax.config import LongDocuments, PackingName
from tsp_jax.training.corpus import Corpus
from tsp_jax.training.mixture import Epochs
from tsp_jax.training.packing import Spans, check_packing, documents_of, pack, without

NOTHING = Spans(np.zeros(0, np.int64), np.zeros(0, np.int64))
_REST = 1 << 31  # marks the stream of the order of the rest of an epoch


class Row:
    """The endless row of one source's sequences: epoch after epoch, each of which has every sequence once.

    If an earlier phase of a schedule of lengths ended in the middle of an epoch, the row begins with the text that it
    left, packed anew. So no token is used twice in an epoch of the run. Sequences are numbered: from 0 those of a whole
    epoch, from N those of the rest.

    Args:
      corpus: one split of the source.
      used: what earlier phases have used in the epoch that they ended in.
      seq_len: tokens per sequence.
      multiple: sequence lengths that suit the ranks are its multiples; for advice.
      packing: how documents fill sequences.
      long_documents: what best-fit packing does with documents longer than a sequence.
      seed: seed of the order.
      stream: number below 2^31; rows with the same seed and other streams are independent.
      shuffle: permute the sequences anew in every epoch; otherwise they are in the order of the corpus.

    Raises:
      ConfigError: the corpus is shorter than one sequence, or none of its tokens has a label.
    """

    def __init__(
        self, corpus: Corpus, used: Spans, *, seq_len: int, multiple: int, packing: PackingName,
        long_documents: LongDocuments, seed: int, stream: int, shuffle: bool,
    ):  # fmt: skip
        documents = documents_of(corpus)
        self.packing = pack(documents, seq_len, packing, long_documents)
        """of a whole epoch"""
        check_packing(corpus, self.packing, seq_len, multiple)
        left = without(documents, used) if len(used.starts) else NOTHING
        self._rest = pack(left, seq_len, packing, long_documents)
        self.size = self.packing.num_sequences + self._rest.num_sequences
        """N + M"""
        self._epochs = Epochs(self.packing.num_sequences, seed, stream, shuffle)
        self._rest_epoch = Epochs(self._rest.num_sequences, seed, stream | _REST, shuffle)
        self._used = used

    def at(self, places: np.ndarray) -> np.ndarray:
        """Returns the sequences at some places, int64, like `places`."""
        num_rest, sequences = self._rest.num_sequences, np.empty_like(places)
        is_rest = places < num_rest
        sequences[~is_rest] = self._epochs.at(places[~is_rest] - num_rest)
        if is_rest.any():
            sequences[is_rest] = self.packing.num_sequences + self._rest_epoch.at(places[is_rest])
        return sequences

    def spans(self, sequence: int) -> Spans:
        """Returns the spans of a sequence."""
        rest = sequence - self.packing.num_sequences
        return self.packing.spans(sequence) if rest < 0 else self._rest.spans(rest)

    def num_tokens(self, sequences: np.ndarray) -> int:
        """Returns the number of tokens in some sequences, without padding."""
        rest = sequences - self.packing.num_sequences
        return self.packing.num_tokens(sequences[rest < 0]) + self._rest.num_tokens(rest[rest >= 0])

    def tokens_before(self, place: int) -> int:
        """Returns the number of tokens in the sequences before a place, without padding."""
        num_rest = min(place, self._rest.num_sequences)
        tokens = self._rest.num_tokens(self._rest_epoch.order(0)[:num_rest]) if num_rest else 0
        whole, taken = divmod(place - num_rest, self.packing.num_sequences)
        if self.packing.is_full:  # the order of a large corpus takes seconds
            return tokens + (place - num_rest) * self.packing.num_tokens(np.zeros(1, np.int64))
        tokens += whole * self.packing.num_tokens(np.arange(self.packing.num_sequences))
        return tokens + (self.packing.num_tokens(self._epochs.order(whole)[:taken]) if taken else 0)

    def used_before(self, place: int) -> Spans:
        """Returns what the sequences before a place have used of the epoch that the place is in."""
        whole, taken = divmod(place - self._rest.num_sequences, self.packing.num_sequences)
        if whole < 0:
            used = self._rest.spans_of(self._rest_epoch.order(0)[:place])
            return Spans(*(np.concatenate(pair) for pair in zip(self._used, used, strict=True)))
        return self.packing.spans_of(self._epochs.order(whole)[:taken]) if taken else NOTHING
