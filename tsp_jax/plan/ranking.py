"""Whether the ranking of layouts holds over the bands of the rates.

Rates are the same for every layout, so layouts are compared within a scenario: slow with slow, fast with fast, and slow
links with slow links. Two layouts whose bands overlap may still have a certain order.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from tsp_jax.hardware.rates import SCENARIOS

_TYPICAL = next(iter(SCENARIOS))


class Row(Protocol):
    """A layout at one sequence length."""

    @property
    def layout(self) -> str: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def scenario_steps_s(self) -> Mapping[str, float]:
        """Name in `SCENARIOS` -> seconds of a step; empty if there are no figures."""
        ...


def turns(rows: Sequence[Row]) -> list[str]:
    """A line for each pair of layouts, at one sequence length, whose order depends on the scenario.

    Layouts rank by time per sequence. Pairs are in the order of typical rates.
    """
    lines = []
    for seq_len, group in itertools.groupby(sorted(rows, key=lambda row: row.seq_len), lambda row: row.seq_len):
        ranked = sorted((row for row in group if row.scenario_steps_s), key=lambda row: _seconds(row, _TYPICAL))
        lines += [line for pair in itertools.combinations(ranked, 2) if (line := _turn(seq_len, *pair))]
    return lines


def _turn(seq_len: int, first: Row, second: Row) -> str:
    """One line, if `second` is faster than `first` in a scenario; else nothing."""
    gains = {name: _seconds(first, name) / _seconds(second, name) for name in first.scenario_steps_s}
    turned = max(gains, key=lambda name: gains[name])
    if gains[turned] <= 1:
        return ""
    typical, other = (f"{_seconds(first, n):.3g} and {_seconds(second, n):.3g} s" for n in (_TYPICAL, turned))
    return (
        f"{first.layout} and {second.layout} at {seq_len} tokens are a tie within the rates' uncertainty: a sequence "
        f"takes {typical} at {_TYPICAL}, {other} at {turned}"
    )


def _seconds(row: Row, scenario: str) -> float:
    """Time per sequence."""
    return row.scenario_steps_s[scenario] / row.batch
