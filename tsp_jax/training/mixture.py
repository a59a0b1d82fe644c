"""Which sequence of which source has which place in a run, as a function of the place.

A run takes sequences from an endless row of places; step s has places ``[s B, (s + 1) B)``. `Interleaving` gives each
place to a source, `Epochs` says which sequence of the source that is.

Dims: K sources, W sum of weights.
"""

import functools
from collections.abc import Sequence

import numpy as np


class Interleaving:
    """Divides places among sources by weight. W consecutive places, a period, hold each source as often as its weight.

    Within a period the places of each source lie as evenly as possible: the j-th of a source with weight w is due at
    ``(j + 1/2) / w``, and sources come in the order in which they are due. So every batch is close to the weights.

    Args:
      weights: [K] positive integers.
    """

    def __init__(self, weights: Sequence[int]):
        self.weights = np.array(weights, np.int64)
        due = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in weights])
        order = np.argsort(due, kind="stable")
        self._source = np.repeat(np.arange(len(weights)), weights)[order]
        self._number = np.concatenate([np.arange(weight) for weight in weights])[order]

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source of each place, its place among those of the source), each like `places`, int64."""
        period, place = np.divmod(places, len(self._source))
        source = self._source[place]
        return source, period * self.weights[source] + self._number[place]

    def counts(self, places: int) -> np.ndarray:
        """Returns how many of the first `places` places each source has, [K] int64."""
        periods, rest = divmod(places, len(self._source))
        return periods * self.weights + np.bincount(self._source[:rest], minlength=len(self.weights))


class Epochs:
    """The endless row of one source's sequences: epoch after epoch, each of which has every sequence once.

    Args:
      size: number of sequences.
      seed: seed of the order.
      stream: number from 0 to 2^32 - 1; rows with the same seed and other streams are independent.
      shuffle: permute the sequences anew in every epoch; otherwise they are in the order of the corpus.
    """

    def __init__(self, size: int, seed: int, stream: int, shuffle: bool):
        self.size = size
        key = seed | stream << 32

        @functools.lru_cache(maxsize=2)  # an epoch and the next
        def order(epoch: int) -> np.ndarray:
            return permutation(key, epoch, size) if shuffle else np.arange(size)

        self.order = order
        """epoch -> its sequences in order, [size] int64"""

    def at(self, places: np.ndarray) -> np.ndarray:
        """Returns the sequences at some places, int64, like `places`."""
        epochs, places = np.divmod(places, self.size)
        sequences = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sequences[here] = self.order(int(epoch))[places[here]]
        return sequences


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """A random permutation, [size] int64, made from raw bits, which are the same in every release of numpy."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order
