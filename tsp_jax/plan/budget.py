"""Memory that a program may fill on a device, and what no compiler counts, with its source, or said to be assumed."""

import dataclasses
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import Hardware
from tsp_jax.hardware.rates import Source

FRACTION = 0.92
"""share of a device's memory that a run gives to its programs, as docs/training.md's XLA_PYTHON_CLIENT_MEM_FRACTION"""
COMMUNICATORS = 3
"""groups of ranks with a communicator each: those of two sets of mesh axes, and all devices"""
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Reserve:
    """Memory that programs do not get."""

    name: str
    bytes: float
    source: Source


_LUMI = "about 1 GiB for the first RCCL communicator and 0.65 GiB for each other one (Lumi-AI-Guide issue 111)"
_NCCL = (
    "1.6 GB after the first communicator's all-reduce, about 6 GB with three or more of them (NVIDIA/nccl issue 864); "
    "8 x H100 took 1.06 GB before the first all-to-all and 4.34 GB after it (issue 1685)"
)
_TPU = "XLA's own messages: 528 to 529 MiB reserved for transfers on v2 and v3 (tensorflow/tensor2tensor issue 1382)"
_FIRST_COLLECTIVES: dict[str, tuple[float, float, Source]] = {
    "rocm": (1.0 * _GIB, 0.65 * _GIB, Source("measured", _LUMI, "MI250X", "2026-08")),
    "cuda": (1.6e9, 2.2e9, Source("measured", _NCCL, "NVIDIA GPUs", "2023 to 2025")),
}
"""platform -> bytes of the first communicator, of each other one, source"""
_RUNTIME: dict[str, tuple[float, Source]] = {
    "rocm": (0.6e9, Source("assumed", "HIP's context, code of kernels and libraries, the driver's own part")),
    "cuda": (0.6e9, Source("assumed", "CUDA's context, code of kernels and libraries, the driver's own part")),
    "tpu": (529 * 2**20, Source("measured", _TPU, "TPU v2 and v3", "2019 to 2020")),
}
_FRAGMENTATION: dict[str, tuple[float, Source]] = {
    "rocm": (0.02, Source("assumed", "gaps between arguments; a program's temporaries are one block")),
    "cuda": (0.02, Source("assumed", "gaps between arguments; a program's temporaries are one block")),
    "tpu": (
        0.005,
        Source("measured", "0.4 % in a message of XLA (pytorch/xla issue 1735)", "TPU", "2020"),
    ),
}
"""platform -> share of the memory that programs get"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How the memory of a device is divided."""

    memory_bytes: float
    """of the device, as its data sheet has it"""
    fraction: float
    """largest share of it that programs get"""
    reserves: tuple[Reserve, ...]
    """outside of that share: the runtime and collective libraries; within it: fragmentation"""
    usable_bytes: float
    """what the compiler's peak must not exceed"""

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and strings."""
        parts = {each.name: {"bytes": each.bytes, "source": str(each.source)} for each in self.reserves}
        return {
            "memory_bytes": self.memory_bytes, "fraction": self.fraction, "usable_bytes": self.usable_bytes,
            "reserves": parts,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """What is not usable, a line each."""
        text = f"{self.usable_bytes / 1e9:.1f} of {self.memory_bytes / 1e9:.0f} GB, at most {self.fraction:.0%}"
        return [f"memory for a step: {text}"] + [
            f"{each.name}: {each.bytes / 1e9:.2f} GB; {each.source}" for each in self.reserves
        ]


def usable_bytes(hardware: Hardware, fraction: float = FRACTION, communicators: int = COMMUNICATORS) -> Budget:
    """The budget of a device.

        usable = min(fraction M, M - runtime - collectives) (1 - fragmentation)

    Scratch memory of cuDNN and of libraries of matrix products is not reserved: the compiler counts it among buffers
    of a program. Nothing is reserved on virtual CPU devices.

    Args:
      hardware: the device, with M bytes.
      fraction: largest share of M that programs get.
      communicators: groups of ranks that communicate.

    Raises:
      ConfigError: `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"memory={fraction:g} must be above 0 and at most 1; use {FRACTION}")
    memory, platform = hardware.memory_bytes, hardware.platform
    outside = []
    if platform in _RUNTIME:
        outside.append(Reserve("runtime", *_RUNTIME[platform]))
    if platform in _FIRST_COLLECTIVES and communicators:
        first, other, source = _FIRST_COLLECTIVES[platform]
        outside.append(Reserve("collectives", first + (communicators - 1) * other, source))
    given = min(fraction * memory, memory - sum(each.bytes for each in outside))
    if platform in _FRAGMENTATION:
        share, source = _FRAGMENTATION[platform]
        outside.append(Reserve("fragmentation", share * given, source))
        given -= share * given
    return Budget(memory_bytes=memory, fraction=fraction, reserves=tuple(outside), usable_bytes=given)
