"""What moves on folded axes, and in which buckets."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check
from tsp_jax.config.model import DType

AttentionMovement = Literal["auto", "gather", "activations"]
Movement = Literal["auto", "gather", "ring", "activations"]
ExpertKernel = Literal["auto", "triton", "xla"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What moves on folded axes, which shard both weights and tokens, and what bounds activation memory.

    One bucket size serves every layout and mesh; the numbers of buckets and chunks follow from it and from shapes.
    Layouts with `Layout.whole_weights` gather all weights of an op in one bucket.
    """

    attention_movement: AttentionMovement = "auto"
    """gather: all-gather weights, one bucket of heads at a time; activations: leave weights where they are, all-gather
    tokens and reduce-scatter outputs; auto: whichever of the two receives fewer bytes"""
    mlp_movement: Movement = "auto"
    """as attention_movement; ring: send weights from neighbour to neighbour, one rank's shard at a time, as in
    arXiv 2604.26294"""
    vocab_movement: Movement = "auto"
    """as mlp_movement, for the embedding and the output head"""
    bucket_mib: float = 64.0
    """approximate size of a bucket in MiB. A bucket is what a device receives at a time: weights, keys and values, or
    tokens. On folded axes it is at most a quarter of an op's weights or tokens. Two buckets are in memory at once. A
    chunk of tokens is multiplied with one bucket. The float32 product is at most as large as two buckets. Experts are
    multiplied with all their tokens at once, and their outputs take [B, t, k, D] (`tsp_jax.ops.experts.experts`)."""
    grad_dtype: DType = "float32"
    """dtype in which weight gradients are reduce-scattered"""
    kernel: str = "auto"
    """attention kernel: xla runs everywhere; triton is for MI300X, MI355X and H100; cudnn is for NVIDIA GPUs, and
    leaves documents that cross chunks of the sequence to triton; tpu is for v5p, v5e, v6e and v7x; auto: the first of
    cudnn, triton, tpu and xla that can compute the heads. Of triton and tpu, triton has run on H100 alone, and tpu on
    no TPU yet."""
    expert_kernel: ExpertKernel = "auto"
    """how rows are multiplied with the experts that they chose: xla runs everywhere, one product after another; triton
    is for MI300X, MI355X and H100, and multiplies many experts' rows at once, in bfloat16; auto: triton where it can.
    Triton's kernel has run on H100 alone."""

    def __post_init__(self):
        check("stream.", self, positive="bucket_mib")
