"""Low-rank adapters: what is trained when the weights of a model are frozen."""

import dataclasses
from typing import Literal, get_args

from tsp_jax.config.checks import check
from tsp_jax.config.model import DType
from tsp_jax.errors import ConfigError

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA: weights are frozen, and each target W becomes W + (alpha / rank) B A with trained A and B."""

    rank: int = 0
    """r, rows of A and columns of B; 0: no adapters, all weights are trained"""
    alpha: float = 16.0
    """the product B A is multiplied by alpha / rank"""
    targets: tuple[Target, ...] = TARGETS
    """weights with adapters, of every layer: q, k, v, o of attention, and gate, up, down of the MLP. All other weights,
    the vocabulary tables and the norms are frozen too"""
    base_dtype: DType = "float32"
    """dtype in which frozen weights are stored"""
    init_std: float | None = None
    """standard deviation of the initial A, whose rows have one element per input of the weight; None: 1 / sqrt(3
    inputs). B is 0 at first"""

    def __post_init__(self):
        check("lora.", self, positive="alpha init_std", not_negative="rank")
        for field in dataclasses.fields(self):
            if not self.rank and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(f"lora.{field.name}={value} has no effect with lora.rank=0; use --lora.rank 16")
        for number, name in enumerate(self.targets):
            if name not in TARGETS or name in self.targets[:number]:
                why = "names a weight twice" if name in TARGETS else f"has {name!r:.80}, which no layer has"
                raise ConfigError(f"lora.targets={','.join(map(str, self.targets))} {why}; use {','.join(TARGETS)}")
        if not self.targets:
            raise ConfigError("lora.targets is empty, so nothing is trained; use --lora.targets q v")
        object.__setattr__(self, "targets", tuple(sorted(self.targets, key=TARGETS.index)))

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank
