"""The data of a run: batches of both splits, those for training by the phases of a schedule of sequence lengths."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from tsp_jax.config import Config, Phase
from tsp_jax.errors import ConfigError
from tsp_jax.training.corpus import Split, load_corpus
from tsp_jax.training.data import Batch, Batches, Weighted


class Scheduled:
    """The batches of a run by step: those of the phase that the step is in.

    Each phase counts its own steps, from its first step on, and goes on with the epoch that the one before it began. So
    the step is the only state.

    Args:
      phases: phases of a schedule; the last has no end.
      batches: the batches of each.
    """

    def __init__(self, phases: tuple[Phase, ...], batches: list[Batches]):
        self.phases, self.batches = phases, batches
        self.digest = batches[0].digest

    def of(self, step: int) -> tuple[Batches, int]:
        """Returns (the batches of a step's phase, the step within the phase)."""
        at = int(np.searchsorted([phase.first for phase in self.phases], step, side="right")) - 1
        return self.batches[at], step - self.phases[at].first

    def at(self, step: int) -> Batch[np.ndarray]:
        """Returns the batch of a step, as `Batches.at`."""
        batches, step = self.of(step)
        return batches.at(step)

    def place(self, step: int, sharding: NamedSharding, *, accumulate: int | None = None) -> Batch[jax.Array]:
        """Returns the batch of a step as global arrays, as `Batches.place`."""
        batches, step = self.of(step)
        return batches.place(step, sharding, accumulate=accumulate)

    def num_tokens(self, step: int) -> int:
        """Returns the number of tokens in the batch of a step, without padding."""
        batches, step = self.of(step)
        return batches.num_tokens(step)

    def parts(self, start: int, stop: int) -> list[tuple[Batches, range]]:
        """Returns for each phase that has some of the steps from `start` to `stop`: (batches, steps in the phase)."""
        ends = [phase.first for phase in self.phases[1:]]
        steps = [
            range(max(start, phase.first) - phase.first, min(stop, end) - phase.first)
            for phase, end in zip(self.phases, [*ends, stop], strict=True)
        ]
        return [(batches, part) for batches, part in zip(self.batches, steps, strict=True) if part]


class Splits(NamedTuple):
    """Batches of both splits of a run's corpus."""

    train: Scheduled
    held_out: Batches


def load_splits(config: Config, sequence_shards: int) -> Splits:
    """Loads both splits of a run's corpus, from the cache if they are there.

    The training split is shuffled, and has batches for each phase of the schedule of sequence lengths.

    Raises:
      ConfigError: as `load_corpus` and `Batches`.
    """

    def batches(sources: list[Weighted], seq_len: int, shuffle: bool, **phase) -> Batches:
        return Batches(
            sources, batch=config.batch, seq_len=seq_len, seed=config.seed, order=config.data.order,
            sequence_shards=sequence_shards, shuffle=shuffle, packing=config.data.packing,
            long_documents=config.data.long_documents, **phase,
        )  # fmt: skip

    phases, train = config.phases(), _load_sources(config, "train")
    in_phases, used = [], None
    for number, phase in enumerate(phases):
        in_phases.append(batches(train, phase.seq_len, True, phase=number, used=used))
        if number + 1 < len(phases):
            used = in_phases[-1].used(phases[number + 1].first - phase.first)
    return Splits(Scheduled(phases, in_phases), batches(_load_sources(config, "heldout"), config.seq_len, False))


def _load_sources(config: Config, split: Split) -> list[Weighted]:
    """One split of each source; an error names the source."""
    sources = []
    for name, weight, data in config.data.sources():
        try:
            sources.append(Weighted(name, load_corpus(data, config.model.vocab_size, split), weight))
        except ConfigError as error:
            raise ConfigError(f"data.mixture, source {name}: {error}" if name else str(error)) from None
    return sources
