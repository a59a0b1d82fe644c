"""The optimizer and its schedule."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check
from tsp_jax.config.model import DType
from tsp_jax.errors import ConfigError

OptimizerName = Literal["adamw", "lion", "adafactor", "muon", "sgd"]
SETTINGS: dict[OptimizerName, dict[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
    "adafactor": {"weight_decay": 0.0},
    "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "sgd": {"momentum": 0.9, "weight_decay": 0.0},
}
"""name -> the settings that the optimizer has, and what they are if they are not given"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer of optax, with warm-up, cosine decay and global-norm clipping.

    If the configuration file defines its own `optimizer` (optax), only `zero1` applies, and flags for the other fields
    are refused.
    """

    name: OptimizerName = "adamw"
    """adamw, lion, adafactor, muon or sgd. muon orthogonalizes the updates of the layers' matrices and gives them the
    size of AdamW's; other parameters have AdamW. adafactor keeps sums of rows and of columns instead of moments"""
    learning_rate: float = 3e-4
    """peak learning rate"""
    warmup_steps: int = 100
    """steps of linear warm-up: step s of W has s / W of the peak, so the first step's learning rate is above 0; a run
    that has no more steps than this warms up for a tenth of its steps"""
    final_fraction: float = 0.1
    """learning rate after the last step, as a fraction of the peak"""
    b1: float | None = None
    """decay rate of the first moment (adamw, lion, muon); None: 0.9"""
    b2: float | None = None
    """decay rate of the second moment (adamw, muon), or of lion's moment; None: 0.95, lion 0.99"""
    momentum: float | None = None
    """decay rate of the momentum of muon's matrices and of sgd; None: muon 0.95, sgd 0.9"""
    eps: float | None = None
    """added to the square root of the second moment (adamw, muon); None: 1e-8"""
    weight_decay: float | None = None
    """decoupled weight decay; not applied to norm scales, biases and sinks; None: 0.1, adafactor and sgd 0"""
    clip_norm: float = 1.0
    """largest global norm of the gradients; gradients above it are scaled down to it"""
    zero1: bool = False
    """ZeRO-1: also shard the optimizer state over the data axis"""
    moments_dtype: DType = "float32"
    """dtype in which moments are stored between steps; updates are computed in float32"""

    def __post_init__(self):
        check("optimizer.", self, "learning_rate eps clip_norm", "warmup_steps weight_decay final_fraction")
        for name in {name: None for settings in SETTINGS.values() for name in settings}:
            if getattr(self, name) is not None and name not in SETTINGS[self.name]:
                self._refuse(name, next(other for other in SETTINGS if name in SETTINGS[other]))
        if self.name == "adafactor":  # its state is small, and moves too slowly for bfloat16
            for field in dataclasses.fields(self):
                if field.name in ("zero1", "moments_dtype") and getattr(self, field.name) != field.default:
                    self._refuse(field.name, "adamw")
        for name in ("b1", "b2", "momentum"):
            if (value := getattr(self, name)) is not None:
                self._check_decay(f"optimizer.{name}", value)

    @property
    def settings(self) -> dict[str, float]:
        """The settings that the optimizer has, as given or by default."""
        return {
            name: default if (value := getattr(self, name)) is None else value
            for name, default in SETTINGS[self.name].items()
        }

    def _refuse(self, field: str, other: OptimizerName) -> None:
        raise ConfigError(
            f"optimizer.{field}={getattr(self, field)} has no effect with optimizer.name={self.name}; leave it out, "
            f"or use optimizer.name={other}"
        )

    def _check_decay(self, flag: str, value: float) -> None:
        if not 0 <= value < 1:
            raise ConfigError(f"{flag}={value} must lie in [0, 1); use 0.9")
        # bfloat16 rounds by up to 2^-8: a moment that shrinks by less in a step never shrinks.
        if self.moments_dtype == "bfloat16" and value > 1 - 2**-8:
            too_slow = f"{flag}={value} is too slow for optimizer.moments_dtype=bfloat16"
            raise ConfigError(f"{too_slow}; use {flag}=0.99, or float32")
