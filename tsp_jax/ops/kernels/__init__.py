"""Attention on one device. Every backend has one signature: (q, k, v, query tokens, key tokens) -> (out, lse).

blockwise: plain XLA, for every device. fused: for the GPUs that it has tiles for.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from tsp_jax.config import Kernel
from tsp_jax.errors import ConfigError
from tsp_jax.ops.kernels import triton as fused
from tsp_jax.ops.kernels import xla as blockwise
from tsp_jax.ops.kernels.tiles import TILES, supports

delta = blockwise.delta

_KINDS = {
    "AMD Instinct MI300": "gfx942", "AMD Instinct MI325": "gfx942", "gfx942": "gfx942",
    "AMD Instinct MI35": "gfx950", "gfx950": "gfx950",
    "NVIDIA H100": "sm_90", "NVIDIA H200": "sm_90", "NVIDIA GH200": "sm_90",
}  # fmt: skip
"""how a device kind begins -> arch; devices of a topology, and abstract ones, may tell nothing else"""


def arch_of(mesh: Mesh | AbstractMesh) -> str:
    """What code for a mesh's GPUs is compiled for, ``gfx942`` or ``sm_90``; empty if they are none, or not known."""
    device: Any = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    if device is None or device.platform in ("cpu", "tpu"):
        return ""
    capability = str(getattr(device, "compute_capability", ""))
    if capability.startswith("gfx"):
        return capability.split(":")[0]
    if capability[:1].isdecimal():
        return f"sm_{capability.replace('.', '')}"
    return next((arch for kind, arch in _KINDS.items() if device.device_kind.startswith(kind)), "")


def choose(kernel: Kernel, mesh: Mesh | AbstractMesh, head_dim: int, dtype: Any) -> str:
    """The arch that the fused kernel is to be compiled for on a mesh; empty: the XLA kernel.

    Args:
      kernel: auto: fused where it is supported.
      mesh: of devices that need not be there.
      head_dim: H.
      dtype: compute dtype.

    Raises:
      ConfigError: fused was asked for where it is not supported.
    """
    arch = arch_of(mesh)
    if kernel == "xla" or supports((head_dim,), dtype, arch):
        return "" if kernel == "xla" else arch
    if kernel == "fused":
        known = ", ".join(name for name in TILES if name != "interpret")
        raise ConfigError(
            f"kernel=fused: not for {arch or 'these devices'} and heads of {head_dim} {jax.numpy.dtype(dtype).name}; "
            f"only for {known} and heads of at most 512 bytes, float32 or bfloat16; use kernel=xla"
        )
    return ""


def attend(arch: str, *args: Any) -> tuple[jax.Array, jax.Array]:
    """`blockwise.attend`, or `fused.attend` for an arch."""
    return fused.attend(*args, arch=arch) if arch else blockwise.attend(*args)


def attend_backward(arch: str, *args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`blockwise.attend_backward`, or `fused.attend_backward` for an arch."""
    return fused.attend_backward(*args, arch=arch) if arch else blockwise.attend_backward(*args)
