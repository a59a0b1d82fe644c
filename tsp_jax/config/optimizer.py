"""The optimizer and its schedule."""

import dataclasses

from tsp_jax.config.checks import check
from tsp_jax.config.model import DType
from tsp_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay and global-norm clipping.

    If the configuration file defines its own `optimizer` (optax), only `zero1` applies, and flags for the other fields
    are refused.
    """

    learning_rate: float = 3e-4
    """peak learning rate"""
    warmup_steps: int = 100
    """steps of linear warm-up: step s of W has s / W of the peak, so the first step's learning rate is above 0; a run
    that has no more steps than this warms up for a tenth of its steps"""
    final_fraction: float = 0.1
    """learning rate after the last step, as a fraction of the peak"""
    b1: float = 0.9
    """decay rate of the first moment"""
    b2: float = 0.95
    """decay rate of the second moment"""
    eps: float = 1e-8
    """added to the square root of the second moment"""
    weight_decay: float = 0.1
    """decoupled weight decay; not applied to norm scales"""
    clip_norm: float = 1.0
    """largest global norm of the gradients; gradients above it are scaled down to it"""
    zero1: bool = False
    """ZeRO-1: also shard the optimizer state over the data axis"""
    moments_dtype: DType = "float32"
    """dtype in which both moments are stored between steps; updates are computed in float32"""

    def __post_init__(self):
        check("optimizer.", self, "learning_rate eps clip_norm", "warmup_steps weight_decay final_fraction")
        for name in ("b1", "b2"):
            flag, value = f"optimizer.{name}", getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{flag}={value} must lie in [0, 1); use 0.9")
            # bfloat16 rounds by up to 2^-8: a moment that shrinks by less in a step never shrinks.
            if self.moments_dtype == "bfloat16" and value > 1 - 2**-8:
                too_slow = f"{flag}={value} is too slow for optimizer.moments_dtype=bfloat16"
                raise ConfigError(f"{too_slow}; use {flag}=0.99, or float32")
