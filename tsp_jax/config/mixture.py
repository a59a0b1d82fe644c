"""A mixture of sources of training text, written as ``NAME=FILES:WEIGHT,...``."""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from tsp_jax.config.checks import check_local
from tsp_jax.errors import ConfigError

LONGEST_PERIOD = 10**6
"""most sequences after which the order of a mixture's sources repeats; the order is kept in memory"""
_EXAMPLE = "'wiki=corpus/wiki/**/*.jsonl:3,code=corpus/**/*.py:1'"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_WEIGHT = re.compile(r"[0-9]{1,9}([.][0-9]{1,9})?")


class Part(NamedTuple):
    """One source of a mixture."""

    name: str
    files: str
    """glob of the source's files"""
    weight: int
    """sequences of this source in a period; a period has as many sequences as the sum of all weights"""


def parse_mixture(text: str) -> tuple[Part, ...]:
    """Parses a mixture: sources separated by commas, each a name, a glob of files and a weight (1 if left out).

    Weights are integers or decimal fractions. They are scaled to the smallest integers with the same ratios.

    Raises:
      ConfigError: a source has no name or files, its weight is not a positive number, two have one name, or the ratios
        of the weights need more than `LONGEST_PERIOD` sequences.
    """
    entries = [_parse_part(entry.strip()) for entry in text.split(",")]
    names = [name for name, _, _ in entries]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.mixture names {names.count(name)} sources {name}; use a name for each")
    weights = [int(Fraction(weight) * 10**9) for _, _, weight in entries]
    common = math.gcd(*weights)
    if sum(weights) // common > LONGEST_PERIOD:
        ratio = ":".join(weight for _, _, weight in entries)
        raise ConfigError(f"data.mixture: weights {ratio} are too fine; use weights with few digits, such as 3:1")
    return tuple(Part(name, files, weight // common) for (name, files, _), weight in zip(entries, weights, strict=True))


def _parse_part(entry: str) -> tuple[str, str, str]:
    """(name, files, weight as text) of one source."""
    name, equals, rest = entry.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise ConfigError(
            f"data.mixture has {entry!r:.200}, which does not start with a name of letters and digits and =; "
            f"use {_EXAMPLE}"
        )
    files, _, weight = rest.rpartition(":") if ":" in rest else (rest, "", "1")
    if not files:
        raise ConfigError(f"data.mixture: source {name} has no files; use {_EXAMPLE}")
    check_local(f"data.mixture: source {name}", rest)
    if not _WEIGHT.fullmatch(weight) or not float(weight):
        raise ConfigError(
            f"data.mixture: weight {weight!r:.80} of source {name} is not a positive number; use {name}={files:.200}:1"
        )
    return name, files, weight
