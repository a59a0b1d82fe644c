"""Attention on one device: a table of named kernels.

To add a kernel, write its module (a subclass of `Kernel`) and give it a row in `KERNELS`.
"""

from typing import Any

from jax.sharding import AbstractMesh, Mesh

from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels.kernel import Kernel, arch_of, delta
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.ops.kernels.tpu import TpuKernel
from tsp_jax.ops.kernels.triton import TritonKernel
from tsp_jax.ops.kernels.xla import XlaKernel

__all__ = [
    "KERNELS", "Kernel", "TpuKernel", "TritonKernel", "XlaKernel", "arch_of", "choose_kernel", "delta",
    "describe_kernel",
]  # fmt: skip

KERNELS: dict[str, type[Kernel]] = {"triton": TritonKernel, "tpu": TpuKernel, "xla": XlaKernel}
"""name -> kernel; `auto` takes the first one that is supported"""


def choose_kernel(name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any, scores: Scores = Scores()) -> Kernel:
    """The kernel for the devices of a mesh, with block sizes for them. The devices may be abstract or a topology's.

    `name` is one of `KERNELS`, or ``auto`` for the first one that is supported; `dtype` is the compute dtype, `scores`
    what the kernel must compute.

    Raises:
      ConfigError: the name is unknown, or the kernel does not support these devices and heads.
    """
    return _choose(name, mesh, head_dim, dtype, scores)[1]


def describe_kernel(name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
    """The name of the kernel that `choose_kernel` returns, and why each kernel before it in `KERNELS` cannot run.

    Such as ``xla (triton: runs on gfx942, gfx950, sm_90, not on cpu)``.
    """
    chosen, _, reasons = _choose(name, mesh, head_dim, dtype, scores)
    return f"{chosen} ({'; '.join(reasons)})" if reasons else chosen


def _choose(
    name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any, scores: Scores
) -> tuple[str, Kernel, list[str]]:
    """(name, kernel, reasons against the kernels before it)."""
    if name != "auto" and name not in KERNELS:
        raise ConfigError(f"stream.kernel={name} is unknown; use one of {', '.join(['auto', *KERNELS])}")
    reasons = []
    for each in KERNELS if name == "auto" else [name]:
        kernel = KERNELS[each].for_arch(arch_of(mesh))
        reason = kernel.unsupported(head_dim, dtype, scores)
        if not reason:
            return each, kernel, reasons
        reasons.append(f"{each}: {reason}")
    raise ConfigError(f"stream.kernel={name}: {reasons[-1].removeprefix(f'{name}: ')}; use stream.kernel=xla")
