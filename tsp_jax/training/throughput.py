"""The speed of a step: tokens/s, and the share of the device's peak that the model's own products reach (MFU)."""

import dataclasses

from tsp_jax.config import ModelConfig
from tsp_jax.cost.flops import model_flops
from tsp_jax.hardware.devices import Hardware

COUNTED = (
    "6 operations per token and weight (4 if it is frozen), and attention's causal half within windows, each sequence "
    "as one document; "
    "recomputation does not count"
)
"""what TFLOP/s count; see `model_flops`"""


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Speed of the steps of a model on a number of devices of one kind."""

    model: ModelConfig
    num_devices: int
    hardware: Hardware | None
    """of each device; None: its peak is not known"""
    frozen: bool = False
    """the model's weights are frozen, as under LoRA"""

    def of(self, tokens: int, seq_len: int, seconds: float) -> dict[str, float | None]:
        """Metrics of a step of `tokens` tokens, without padding, in sequences of `seq_len`, by its seconds.

        tokens_per_s: of all devices. tflops_per_device: `model_flops` per second and device, 1e12. mfu: their share of
        the data sheet's peak for dense bfloat16, whatever the compute dtype; None if the peak is not known.
        """
        flops_per_s = model_flops(self.model, tokens, seq_len, frozen=self.frozen) / seconds / self.num_devices
        return {
            "tokens_per_s": tokens / seconds,
            "tflops_per_device": flops_per_s / 1e12,
            "mfu": flops_per_s / self.hardware.peak_flops if self.hardware else None,
        }

    def __str__(self) -> str:
        """The peak that `mfu` is a share of, for the start of a run."""
        if self.hardware is None:
            return "no share of peak, which is not known for this kind of device"
        return f"share of {self.hardware.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16 ({self.hardware.source})"
