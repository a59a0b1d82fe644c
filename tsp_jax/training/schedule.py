"""A schedule of sequence lengths: a compiled step for each length, and what is said about it."""

import dataclasses

from tsp_jax.config import Config
from tsp_jax.training.data import Batch
from tsp_jax.training.step import StepMetrics, TrainProgram, TrainState


class CompiledSteps:
    """The compiled training step, called like `TrainProgram.step`: one program for each length of a batch.

    Args:
      program: the functions of the run.
      config: the run; only the lengths of its steps from `start` on are compiled.
      start: steps that are done.
      options: compiler options.
    """

    def __init__(self, program: TrainProgram, config: Config, start: int, options: dict):
        self._by_length = {
            length: program.lower_step(of_length(config, length)).compile(options)
            for length in lengths_from(config, start)
        }
        self.longest = self._by_length[max(self._by_length)]
        """the program of the longest sequences, which needs the most memory"""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return self._by_length[batch.tokens.shape[-1]](state, batch)


def lengths_from(config: Config, start: int) -> list[int]:
    """Returns the lengths of sequences of the steps from `start` on, or of the last step, each once, in order."""
    start, phases = min(start, config.steps - 1), config.phases()
    ends = [*(phase.first for phase in phases[1:]), config.steps]
    pairs = zip(phases, ends, strict=True)
    return list(dict.fromkeys(phase.seq_len for phase, end in pairs if phase.first < config.steps and end > start))


def of_length(config: Config, seq_len: int) -> Config:
    """Returns the configuration with one length for all steps."""
    return dataclasses.replace(config, seq_len=seq_len, seq_len_schedule="")


def describe_schedule(config: Config) -> str | None:
    """One line: the length and tokens of a step in each phase, with its steps; None without a schedule."""
    phases = config.phases()
    if len(phases) == 1:
        return None
    texts = [
        f"{phase.seq_len:,} from step {phase.first + 1} ({config.batch * phase.seq_len:,} tokens a step)"
        for phase in phases
        if phase.first < config.steps
    ]
    left = "" if phases[-1].first < config.steps else f"; seq_len={config.seq_len} comes after the last step"
    return f"sequence length {', '.join(texts)}{left}"
