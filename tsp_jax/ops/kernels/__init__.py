"""Attention on one device: a table of named kernels.

To add a kernel, write its module (a subclass of `Kernel`) and give it a row in `KERNELS`.
"""

from typing import Any

from jax.sharding import AbstractMesh, Mesh

from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels.chunk_pairs import PairKernel
from tsp_jax.ops.kernels.cudnn import CudnnKernel
from tsp_jax.ops.kernels.kernel import Kernel, arch_of, delta
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.ops.kernels.tpu import TpuKernel
from tsp_jax.ops.kernels.triton import TritonKernel
from tsp_jax.ops.kernels.xla import XlaKernel

__all__ = [
    "ABSENT", "KERNELS", "CudnnKernel", "Kernel", "TpuKernel", "TritonKernel", "XlaKernel", "arch_of", "choose_kernel",
    "delta", "describe_kernel",
]  # fmt: skip

KERNELS: dict[str, type[Kernel]] = {"cudnn": CudnnKernel, "triton": TritonKernel, "tpu": TpuKernel, "xla": XlaKernel}
"""name -> kernel; `auto` takes the first one that is supported"""
ABSENT = {
    "aiter": "AMD's AITER reaches JAX through the package jax_aiter, which no package index has, so it could not be "
    "tested here; use stream.kernel=triton",
}
"""names of known kernels for which there is no code here -> why, and what to use"""


def choose_kernel(name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any, scores: Scores = Scores()) -> Kernel:
    """The kernel for the devices of a mesh, with block sizes for them. The devices may be abstract or a topology's.

    `name` is one of `KERNELS`, or ``auto`` for the first one that is supported; `dtype` is the compute dtype, `scores`
    what the kernel must compute.

    Raises:
      ConfigError: the name is unknown, or the kernel does not support these devices and heads.
    """
    return _choose(name, mesh, head_dim, dtype, scores)[1]


def describe_kernel(name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
    """The name of the kernel that `choose_kernel` returns, and why others of these devices before it cannot compute it.

    Such as ``triton (cudnn: computes in bfloat16 or float16, not in float32)``. A kernel that leaves some tokens to
    another one names it: ``cudnn (triton for documents that cross chunks)``.
    """
    chosen, kernel, notes = _choose(name, mesh, head_dim, dtype, scores)
    if isinstance(kernel, PairKernel):
        other = kernel.other(head_dim, dtype, scores)
        notes = [
            *notes,
            f"{next(each for each in KERNELS if type(other) is KERNELS[each])} for documents that cross chunks",
        ]
    return f"{chosen} ({'; '.join(notes)})" if notes else chosen


def _choose(
    name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any, scores: Scores
) -> tuple[str, Kernel, list[str]]:
    """(name, kernel, reasons against those before it that run on these devices)."""
    if name != "auto" and name not in KERNELS:
        if name in ABSENT:
            raise ConfigError(f"stream.kernel={name}: {ABSENT[name]}")
        raise ConfigError(f"stream.kernel={name} is unknown; use one of {', '.join(['auto', *KERNELS])}")
    reasons = []
    for each in KERNELS if name == "auto" else [name]:
        kernel = KERNELS[each].for_arch(arch_of(mesh))
        reason = kernel.unsupported(head_dim, dtype, scores)
        if not reason:
            return each, kernel, reasons
        if name != "auto" or not kernel.not_here():
            reasons.append(f"{each}: {reason}")
    raise ConfigError(f"stream.kernel={name}: {reasons[-1].removeprefix(f'{name}: ')}; use stream.kernel=xla")
