"""Attention by cuDNN on NVIDIA GPUs, which computes pairs of chunks; see `tsp_jax.ops.kernels.chunk_pairs`.

XLA replaces two calls by cuDNN's fused attention. They are written here with `jax.ffi`, for two reasons.
`jax.nn.dot_product_attention` has no backward pass that takes the log-sum-exp of more keys than its own, and it asks a
present GPU what it can do, so that no program could be compiled for an absent one.

XLA asks cuDNN how much workspace it needs when it compiles for a present GPU; compiled for an absent one, a program's
peak memory leaves the workspace out.

Dims: B batch, K KV heads, G query heads per KV head, N = K G, H head; C tokens of a chunk.
"""

import dataclasses
import json
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsp_jax.ops.kernels.chunk_pairs import PairKernel
from tsp_jax.ops.kernels.kernel import declare_products
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.ops.kernels.triton import TritonKernel
from tsp_jax.ops.kernels.xla import XlaKernel

_ELEMENT = {"bfloat16": "BF16", "float16": "F16"}
"""dtypes that cuDNN's attention takes -> their names in XLA"""
_PRODUCTS = {
    "forward": {"bmm1": (3, 3, "02"), "bmm2": (3, 1, "01")},
    "backward": {
        "bmm1_grad_gemm1": (2, 1, "01"), "bmm1_grad_gemm2": (3, 1, "01"), "bmm2_grad_gemm1": (2, 1, "01"),
        "bmm2_grad_gemm2": (3, 3, "02"),
    },
}  # fmt: skip
"""products of attention -> contracted dim on the left and on the right, and batch dims on the left"""


@dataclasses.dataclass(frozen=True)
class CudnnKernel(PairKernel):
    """cuDNN's fused attention for sequences of one document, and another kernel for packed documents."""

    arch: str = ""
    """GPU to compile for, such as ``sm_90``"""

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        return cls((TritonKernel.for_arch(arch), XlaKernel.for_arch(arch)), arch=arch)

    @property
    def _capability(self) -> int:
        """Such as 90 for ``sm_90``; 0 if the device is no NVIDIA GPU."""
        number = self.arch.removeprefix("sm_")
        return int(number) if self.arch.startswith("sm_") and number.isdecimal() else 0

    def not_here(self) -> str:
        here = self.arch or "unknown devices"
        return "" if self._capability >= 80 else f"runs on NVIDIA GPUs from sm_80 on, not on {here}"

    def unsupported(self, head_dim: int, dtype: Any, scores: Scores = Scores()) -> str:
        if reason := self.not_here():
            return reason
        if jnp.dtype(dtype).name not in _ELEMENT:
            return f"computes in {' or '.join(_ELEMENT)}, not in {jnp.dtype(dtype).name}"
        most = 256 if self._capability >= 90 else 128
        if head_dim > most or head_dim % 8:
            return f"heads have {head_dim} dims; on {self.arch} they must have a multiple of 8, at most {most}"
        if scores._replace(scale=None, total=None) != Scores():
            return "computes causal attention without window and soft cap only"
        return ""

    def pair(self, q_BCKGH, k_BCKH, v_BCKH, causal, scale):
        q_BCNH = _flat(q_BCKGH)
        out, lse = _call("forward", [q_BCNH, k_BCKH, v_BCKH], [q_BCNH], causal, scale)
        return out.reshape(q_BCKGH.shape), lse.transpose(0, 2, 1).reshape(q_BCKGH.shape[:-1])

    def pair_backward(self, q_BCKGH, k_BCKH, v_BCKH, delta_BCKG, lse_BCKG, dout_BCKGH, causal, scale):
        q_BCNH, out_BCNH, dout_BCNH = _flat(q_BCKGH), _flat(_outputs(delta_BCKG, dout_BCKGH)), _flat(dout_BCKGH)
        lse_BNC = lse_BCKG.reshape(q_BCNH.shape[:-1]).transpose(0, 2, 1)
        inputs = [q_BCNH, k_BCKH, v_BCKH, lse_BNC, dout_BCNH, out_BCNH]
        dq_BCNH, dk_BCKH, dv_BCKH = _call("backward", inputs, inputs[:3], causal, scale)
        return dq_BCNH.reshape(q_BCKGH.shape), dk_BCKH, dv_BCKH


def _flat(x_BCKGH: jax.Array) -> jax.Array:
    """[B, C, K, G, H] -> [B, C, N, H]"""
    batch, chunk, _, _, head_dim = x_BCKGH.shape
    return x_BCKGH.reshape(batch, chunk, -1, head_dim)


def _outputs(delta_BCKG: jax.Array, dout_BCKGH: jax.Array) -> jax.Array:
    """Outputs that have the given delta: ``delta dout / |dout|^2``, in dout's dtype.

    cuDNN's backward pass takes outputs, but needs only their delta. The true outputs would have to be kept until then.
    """
    dout = dout_BCKGH.astype(jnp.float32)
    top = jnp.abs(dout).max(axis=-1, keepdims=True)  # of dout / top, squares neither overflow nor vanish
    unit = dout / jnp.where(top == 0, 1.0, top)
    square = jnp.square(unit).sum(axis=-1, keepdims=True)
    factor = delta_BCKG[..., None] / jnp.where(top == 0, 1.0, top * square)
    return (factor * unit).astype(dout_BCKGH.dtype)


def _call(
    direction: Literal["forward", "backward"], inputs: list[jax.Array], outputs: list[jax.Array], causal: bool,
    scale: float,
) -> list[jax.Array]:  # fmt: skip
    """cuDNN's forward or backward pass of one pair.

    Args:
      direction: which pass.
      inputs: queries, keys and values; in backward also log-sum-exps [B, N, C], cotangents and outputs.
      outputs: arrays of the shapes [B, C, heads, H] and dtypes of what the pass returns, besides log-sum-exps.
      causal: a query attends to keys of no higher index; else to all.
      scale: factor of the products of queries and keys.

    Returns:
      Arrays like `outputs`; in forward also log-sum-exps [B, N, C] float32.
    """
    batch, chunk, heads, head_dim = inputs[0].shape
    like = jax.typeof(inputs[0])
    sharding = None if like.sharding.mesh.empty else NamedSharding(like.sharding.mesh, P())

    def result(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=like.mat)

    results = [result((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in outputs]
    layouts: list[tuple[int, ...] | None] = [(0, 2, 1, 3)] * len(outputs)  # heads and tokens are swapped back below
    if direction == "forward":
        results, layouts = [*results, result((batch, heads, chunk), jnp.float32)], [*layouts, None]
    results, layouts = [*results, result((0,), jnp.uint8)], [*layouts, None]  # cuDNN's workspace
    suffix = "" if direction == "forward" else "Backward"
    call = jax.ffi.ffi_call(
        f"__cudnn$fmhaSoftmax{suffix}", results, output_layouts=layouts, custom_call_api_version=2,
        legacy_backend_config=_backend_config(direction, inputs, causal, scale),
    )  # fmt: skip
    products = (2 if direction == "forward" else 5) / (2 if causal else 1)
    with declare_products("cudnn", direction, head_dim, 2.0 * products * batch * heads * chunk**2 * head_dim):
        *found, _ = call(*inputs)
    return [x.swapaxes(1, 2) if x.ndim == 4 else x for x in found]


def _backend_config(direction: Literal["forward", "backward"], inputs: list[jax.Array], causal: bool, scale: float):
    """JSON of what XLA is to ask cuDNN for (`CudnnfMHABackendConfig` in XLA's backend_configs.proto)."""
    batch, chunk, heads, _ = inputs[0].shape
    products = {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": [str(left)], "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": list(batch_dims), "rhs_batch_dimensions": ["0", "2"],
        }
        for name, (left, right, batch_dims) in _PRODUCTS[direction].items()
    }  # fmt: skip
    scores = {
        "element_type": _ELEMENT[inputs[0].dtype.name],
        "dimensions": [str(size) for size in (batch, heads, chunk, inputs[1].shape[1])],
        "layout": {"minor_to_major": ["3", "2", "1", "0"]},
    }
    algorithm = {
        "algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
        "is_cudnn_frontend": True, "workspace_size": "0",
    }  # fmt: skip
    fmha = {
        "algorithm": algorithm, "fmha_scale": scale, "intermediate_tensor_shape": scores, "is_flash_attention": True,
        "mask_type": "CAUSAL" if causal else "NO_MASK", "dropout_rate": 0.0, "seed": 42, "sliding_window_length": 0,
        "max_seg_per_batch": 1, "is_paged_attention": False, **products,
    }  # fmt: skip
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": fmha})
