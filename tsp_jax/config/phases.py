"""A schedule of sequence lengths, written as ``LENGTHxSTEPS,...``."""

import re
from typing import NamedTuple

from tsp_jax.errors import ConfigError

_PHASE = re.compile(r"([1-9][0-9]{0,9})x([1-9][0-9]{0,9})")


class Phase(NamedTuple):
    """Consecutive steps whose sequences have the same length."""

    first: int
    """steps before this phase"""
    seq_len: int


def parse_phases(schedule: str, seq_len: int) -> tuple[Phase, ...]:
    """Parses a schedule of lengths; the last phase has length `seq_len` and no end.

    The schedule may name the last length too, without a number of steps. It must then be `seq_len`.

    Raises:
      ConfigError: the schedule cannot be read, has a length above `seq_len`, or ends with another length.
    """
    texts = [text.strip() for text in schedule.split(",")] if schedule else []
    if texts and re.fullmatch("[1-9][0-9]{0,9}", texts[-1]) and int(last := texts.pop()) != seq_len:
        raise ConfigError(f"seq_len_schedule={schedule:.200} ends with {last}, seq_len={seq_len}; use seq_len={last}")
    phases, first = [], 0
    for text in texts:
        found = _PHASE.fullmatch(text)
        if not found:
            raise ConfigError(
                f"seq_len_schedule={schedule!r:.200}: {text!r:.40} is not LENGTHxSTEPS; use {-(-seq_len // 2)}x200"
            )
        length, steps = map(int, found.groups())
        if length > seq_len:
            raise ConfigError(
                f"seq_len_schedule={schedule:.200} has length {length}, above seq_len={seq_len}; use seq_len={length}"
            )
        phases.append(Phase(first, length))
        first += steps
    return (*phases, Phase(first, seq_len))
