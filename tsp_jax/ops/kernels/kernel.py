"""What an attention kernel is: a named pair of functions for one device, with the block sizes they use.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head.
"""

import abc
import dataclasses
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from tsp_jax.ops.kernels.mask import Scores, Tokens

_KINDS = {
    "AMD Instinct MI300": "gfx942", "AMD Instinct MI325": "gfx942", "gfx942": "gfx942",
    "AMD Instinct MI35": "gfx950", "gfx950": "gfx950",
    "NVIDIA H100": "sm_90", "NVIDIA H200": "sm_90", "NVIDIA GH200": "sm_90",
    "NVIDIA B200": "sm_100",
    "TPU v5 lite": "tpu_v5e", "TPU v5e": "tpu_v5e", "TPU v5": "tpu_v5p", "TPU v6": "tpu_v6e", "TPU7x": "tpu_v7x",
    "TPU": "tpu",
}  # fmt: skip
"""prefix of a device kind -> arch, for devices that report no compute capability: TPUs, topologies, abstract devices"""


def arch_of(mesh: Mesh | AbstractMesh) -> str:
    """Architecture of a mesh's devices: ``cpu``, ``tpu_v5p``, ``gfx942``, ``sm_90``, ...; empty if it is not known."""
    device: Any = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    if device is None or device.platform == "cpu":
        return device.platform if device else ""
    capability = str(getattr(device, "compute_capability", ""))
    if capability.startswith("gfx"):
        return capability.split(":")[0]
    if capability[:1].isdecimal():
        return f"sm_{capability.replace('.', '')}"
    return next((arch for kind, arch in _KINDS.items() if device.device_kind.startswith(kind)), "")


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """Attention within segments on one device, and its gradients. Hashable: a static argument of jitted code."""

    backward_products: ClassVar[int] = 5
    """matrix products that backward computes for each pair of query and key"""

    @classmethod
    @abc.abstractmethod
    def for_arch(cls, arch: str) -> Self:
        """The kernel with the block sizes of an architecture; see `arch_of`."""

    def not_here(self) -> str:
        """Why the kernel cannot run on its architecture; empty if it can."""
        return ""

    def unsupported(self, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
        """Why the kernel cannot run with these heads and scores on its architecture; empty if it can."""
        return self.not_here()

    def within(self, tokens: int) -> Self:
        """The kernel for `tokens` query tokens that form two zigzag chunks, with blocks that never span both chunks."""
        return self

    @abc.abstractmethod
    def attend(
        self, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Tokens, keys: Tokens,
        scores: Scores = Scores(),
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Attention within segments.

        ``s = mask(cap(scale q k^T))``, ``out = softmax(s) v``, ``lse = logsumexp(s)``; the mask is `mask.may_attend`.

        Args:
          q_BTKGH: queries, grouped by KV head, in the compute dtype.
          k_BSKH, v_BSKH: keys and values, in the compute dtype.
          queries: positions and segments of the T query tokens.
          keys: positions and segments of the S key tokens, in any order.
          scores: scale, soft cap, causality and window; static.

        Returns:
          (out [B, T, K, G, H] in q's dtype, lse [B, T, K, G] float32). For a query without keys, out is 0 and lse is
          `MASKED`.
        """

    @abc.abstractmethod
    def attend_backward(
        self, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Tokens, keys: Tokens,
        delta_BTKG: jax.Array, lse_BTKG: jax.Array, dout_BTKGH: jax.Array, scores: Scores = Scores(),
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Gradients of `attend`, accumulated in float32.

        ``p = exp(s - lse)``, ``ds = scale p (dout v^T - delta) (1 - (s / softcap)^2)``, without the last factor if
        there is no soft cap; ``dq = ds k``, ``dk = ds^T q``, ``dv = p^T dout``

        The keys may be a part of those that the queries attend to, as long as lse and delta are those of all keys: the
        gradients of the parts add up.

        Args:
          q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores: as in `attend`.
          delta_BTKG: float32, from `delta`.
          lse_BTKG: float32, from `attend`.
          dout_BTKGH: cotangent of out, in the compute dtype.

        Returns:
          (dq [B, T, K, G, H], dk [B, S, K, H], dv [B, S, K, H]), each in the dtype of its primal.
        """


def declare_products(
    kernel: str, direction: Literal["forward", "backward"], head_dim: int, flops: float
) -> AbstractContextManager[Any]:
    """A named scope that tells `tsp_jax.inspect` what a kernel computes, which the text of a program does not show.

    The scope goes directly around the call that becomes the kernel: ``with declare_products("triton", "forward", 128,
    6e12): call(...)`` writes ``mean_flops[attention_forward.triton.h128=6000000000000]``.

    Args:
      kernel: the kernel's name in `tsp_jax.ops.kernels.KERNELS`.
      direction: which of `Kernel.attend` and `Kernel.attend_backward` calls it.
      head_dim: H, as the kernel sees it.
      flops: operations of all matrix products that one call executes on a device, a multiply-add counting as two: 4 H a
        visited pair of query and key in forward; in backward 10 H, or 14 H if scores are computed twice. The mean, if
        it depends on data.
    """
    return jax.named_scope(f"mean_flops[attention_{direction}.{kernel}.h{head_dim}={flops:.0f}]")


def delta(out_BTKGH: jax.Array, dout_BTKGH: jax.Array) -> jax.Array:
    """``sum_H(out dout)``, [B, T, K, G] float32: all that backward needs of the outputs.

    Source: Dao et al., arXiv 2205.14135, appendix B.
    """
    return (dout_BTKGH.astype(jnp.float32) * out_BTKGH.astype(jnp.float32)).sum(axis=-1)


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(out, lse), float32, of attention to the union of two sets of keys, from those of each set.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``
    """
    lse = jnp.logaddexp(a[1], b[1])
    out_a, out_b = (out.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for out, part in (a, b))
    return out_a + out_b, lse
