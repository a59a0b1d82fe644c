"""How rotary position embedding is changed for contexts longer than those a model was first trained on."""

import dataclasses
from typing import Literal, get_args

from tsp_jax.config.checks import FLOAT32, check
from tsp_jax.errors import ConfigError

RopeKind = Literal["none", "linear", "llama3", "yarn", "longrope"]
USED: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_context"),
    "yarn": ("factor", "original_context", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", "original_context", "attention_factor", "short_factors", "long_factors"),
}
"""kind -> fields of RopeScaling that it uses; all kinds use `fraction`"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than those a model was first trained on."""

    kind: RopeKind = "none"
    """linear: divide all frequencies by factor; llama3, yarn: divide low ones by factor, keep high ones, interpolate
    between; longrope: divide each by a number of its own, long_factors for sequences longer than original_context"""
    factor: float = 1.0
    """divisor of the scaled frequencies; longrope: how much longer contexts become, which sets attention_factor"""
    low_freq_factor: float = 1.0
    """llama3: a frequency with fewer periods than this in the original context is low"""
    high_freq_factor: float = 4.0
    """llama3: a frequency with more periods than this in the original context is high"""
    original_context: int = 8192
    """llama3, yarn, longrope: context length of pretraining, in tokens (original_max_position_embeddings)"""
    beta_slow: float = 1.0
    """yarn: a frequency with fewer periods than this in the original context is low"""
    beta_fast: float = 32.0
    """yarn: a frequency with more periods than this in the original context is high"""
    truncate: bool = True
    """yarn: the interpolation begins and ends at a whole number of a frequency"""
    attention_factor: float | None = None
    """yarn, longrope: factor of rotated queries and of rotated keys; None: the one that follows from factor"""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency in sequences of at most original_context tokens"""
    long_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency in longer sequences"""
    fraction: float = 1.0
    """part of each head, from its first element on, that is rotated (partial_rotary_factor)"""

    def __post_init__(self):
        owner = "model.rope_scaling."
        factors = "factor low_freq_factor high_freq_factor beta_slow beta_fast attention_factor"
        check(owner, self, positive=f"{factors} original_context fraction")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, high) <= getattr(self, low):
                raise ConfigError(
                    f"{owner}{high}={getattr(self, high)} must exceed {low}={getattr(self, low)}; "
                    f"use {4 * getattr(self, low)}"
                )
        if self.kind == "none" and self.factor != 1.0:
            kinds = ", ".join(get_args(RopeKind)[1:])
            raise ConfigError(f"{owner}factor={self.factor} has no effect with {owner}kind=none; use a kind of {kinds}")
        if self.fraction > 1.0:
            raise ConfigError(f"{owner}fraction={self.fraction} is more than a head; use 1.0")
        if self.kind == "longrope" and self.original_context < 2:
            raise ConfigError(f"{owner}original_context={self.original_context} is too short for longrope; use 4096")

    def rotated(self, head_dim: int) -> int:
        """Number of elements of a head that are rotated."""
        return int(head_dim * self.fraction)

    def check_fits(self, owner: str, head_dim: int, theta: float | None) -> None:
        """Raises ConfigError unless these settings suit heads of this width and rotary frequencies of this base."""
        rotated = self.rotated(head_dim)
        if rotated % 2 or not rotated:
            raise ConfigError(
                f"{owner}rope_scaling.fraction={self.fraction} rotates {rotated} of the {head_dim} elements of a "
                f"head, RoPE rotates pairs; use {2 / head_dim * max(1, round(rotated / 2))}"
            )
        if self.kind == "yarn" and theta is not None and theta <= 1.0:
            raise ConfigError(f"{owner}rope_theta={theta} must exceed 1 for yarn; use 10000.0")
        for name in ("short_factors", "long_factors") if self.kind == "longrope" else ():
            factors = getattr(self, name)
            if len(factors) != rotated // 2:
                value = f"{owner}rope_scaling.{name} has {len(factors)} values"
                raise ConfigError(f"{value}, heads of {head_dim} have {rotated // 2} frequencies; use as many values")
            for factor in factors:
                if not FLOAT32[0] <= factor < FLOAT32[1]:
                    raise ConfigError(f"{owner}rope_scaling.{name} has {factor}; use positive numbers")

    @property
    def depends_on_length(self) -> bool:
        """Whether sequences longer than `original_context` are rotated in another way than shorter ones."""
        return self.kind == "longrope" and self.short_factors != self.long_factors

    def at(self, length: int) -> "RopeScaling":
        """The scaling for sequences of this many tokens; it no longer depends on their length."""
        if not self.depends_on_length:
            return self
        factors = self.long_factors if length > self.original_context else self.short_factors
        return dataclasses.replace(self, short_factors=factors, long_factors=factors)

    def shortest_prompt(self, capacity: int) -> int:
        """Fewest tokens of a prompt whose sequence keeps one scaling while it grows to `capacity` tokens."""
        return self.original_context + 1 if self.depends_on_length and capacity > self.original_context else 1

    def used(self) -> "RopeScaling":
        """The same scaling, with the default for each field that its kind does not use."""
        return RopeScaling(kind=self.kind, fraction=self.fraction, **{x: getattr(self, x) for x in USED[self.kind]})
