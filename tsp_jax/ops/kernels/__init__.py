"""Attention on one device: a table of named kernels.

To add a kernel, write its module (a subclass of `Kernel`) and give it a row in `KERNELS`.
"""

from typing import Any

from jax.sharding import AbstractMesh, Mesh

from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels.kernel import Kernel, arch_of, delta
from tsp_jax.ops.kernels.triton import TritonKernel
from tsp_jax.ops.kernels.xla import XlaKernel

__all__ = ["KERNELS", "Kernel", "TritonKernel", "XlaKernel", "arch_of", "choose_kernel", "delta"]

KERNELS: dict[str, type[Kernel]] = {"triton": TritonKernel, "xla": XlaKernel}
"""name -> kernel; `auto` takes the first one that is supported"""


def choose_kernel(name: str, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any) -> Kernel:
    """The kernel for the devices of a mesh, with block sizes for them. The devices may be abstract or a topology's.

    `name` is one of `KERNELS`, or ``auto`` for the first one that is supported; `dtype` is the compute dtype.

    Raises:
      ConfigError: the name is unknown, or the kernel does not support these devices and heads.
    """
    if name != "auto" and name not in KERNELS:
        raise ConfigError(f"stream.kernel={name} is unknown; use one of {', '.join(['auto', *KERNELS])}")
    reason = ""
    for each in KERNELS if name == "auto" else [name]:
        kernel = KERNELS[each].for_arch(arch_of(mesh))
        reason = kernel.unsupported(head_dim, dtype)
        if not reason:
            return kernel
    raise ConfigError(f"stream.kernel={name}: {reason}; use stream.kernel=xla")
