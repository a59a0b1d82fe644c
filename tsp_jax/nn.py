"""Flax NNX layers over global arrays, to use in a model of your own.

Each layer holds ordinary global parameters with sharding metadata, and runs its op in one `jax.shard_map` on a
`Placement` (a layout on a mesh). Weights are stored [rows, D]: the first dimension is the one that is sharded.

Dims: B batch, T tokens, D model, N query heads, K KV heads, H head, F ffn, V vocabulary; lower case is this device's
shard.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tsp_jax.config import Activation, Remat, RopeScaling, StreamConfig
from tsp_jax.cost.traffic import (
    OpSharding,
    Traffic,
    attention_traffic,
    choose_movement,
    embed_traffic,
    loss_traffic,
    mlp_traffic,
)
from tsp_jax.errors import ConfigError
from tsp_jax.heads import HeadPadding, padded_heads
from tsp_jax.layout import Placement, check_divides
from tsp_jax.ops import kernels
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadNorms
from tsp_jax.ops.attention.train import attention
from tsp_jax.ops.cross_entropy import TokenLosses, cross_entropy
from tsp_jax.ops.embedding import embed
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.mlp import mlp
from tsp_jax.ops.stream import Stream


class _Layer(nnx.Module):
    """An op on tokens [B, T, ...], with weights [rows, D] that are sharded along one logical dimension."""

    dim: str
    """heads, mlp or vocab"""

    def __init__(self, placement: Placement, stream: StreamConfig, dtype: jax.typing.DTypeLike):
        self.placement, self.stream, self.dtype = placement, stream, jnp.dtype(dtype)

    def _param(
        self, rngs: nnx.Rngs, rows: int, d_model: int, std: float, padding: HeadPadding | None = None
    ) -> nnx.Param:
        """A weight with normally distributed rows, and zeros for padded heads."""
        value = nnx.initializers.normal(std)(rngs.params(), (rows, d_model), jnp.float32)
        return nnx.Param(
            padding.pad(value) if padding else value, out_sharding=self.placement.layout.spec(self.dim, None),
            mesh=self.placement.mesh, padding=padding,
        )  # fmt: skip

    def _specs(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Of arrays [B, T], of arrays [B, T, D] and of weights."""
        spec = self.placement.layout.spec
        return spec("batch", "sequence"), spec("batch", "sequence", None), spec(self.dim, None)

    def _check_tokens(self, shape: Sequence[int]) -> None:
        for dim, value in zip(("batch", "sequence"), shape, strict=False):
            _shard_rows(dim, value, dim, self.placement)

    def _sharding(self, shape: Sequence[int]) -> OpSharding:
        return OpSharding.of(
            self.placement.layout, self.placement.mesh.shape, self.dim, batch=shape[0], seq_len=shape[1],
            itemsize=self.dtype.itemsize, grad_itemsize=jnp.dtype(self.stream.grad_dtype).itemsize,
        )  # fmt: skip

    @property
    def _bucket_bytes(self) -> float:
        return self.stream.bucket_mib * 2**20

    def _stream(
        self, shape: Sequence[int], movement: str, traffic: Callable[..., Traffic],
        *, d_model: int, rows: int = 1, elements: int = 0, **sizes: Any,
    ) -> Stream:  # fmt: skip
        """The stream for tokens [B, T, ...]: `auto` resolved, and bucket counts from the bucket size.

        ``traffic(sharding, movement, **sizes)`` gives the bytes that `auto` compares; `rows` counts rows of
        weights per device, `elements` the elements of all ranks' weights.
        """
        sharding, whole = self._sharding(shape), self.placement.layout.whole_weights
        received = partial(traffic, sharding, d_model=d_model, **sizes)
        tokens_may_move = self.dim != "heads" or not self.placement.layout.axes(self.dim).folded_batch
        return Stream(
            movement="gather" if whole else choose_movement(movement, received, tokens_may_move),
            buckets=1 if whole else sharding.weight_buckets(rows, elements, self._bucket_bytes),
            token_buckets=sharding.token_buckets(d_model, self._bucket_bytes),
            grad_dtype=self.stream.grad_dtype, chunk_tokens=self.stream.chunk_tokens,
        )  # fmt: skip


def _shard_rows(name: str, value: int, dim: str, placement: Placement) -> int:
    shards = placement.size(dim)
    check_divides(name, value, shards, getattr(placement.layout, dim))
    return value // shards


class Attention(_Layer):
    """Causal self-attention with grouped queries, RoPE, and optional q/k RMSNorm.

    Heads that do not divide over the ranks are padded with zeros; padded heads get no gradient and change no result.

    Args:
      d_model: D.
      num_heads: N.
      num_kv_heads: K, a divisor of N; N if None.
      head_dim: H; D / N if None.
      placement: layout and mesh.
      stream: movement, bucket and chunk size, kernel.
      rope_theta: base of the rotary frequencies.
      rope_scaling: scaling of those frequencies for long contexts.
      qk_norm: whether to apply RMSNorm to each query and key head before RoPE.
      norm_eps: epsilon of that norm.
      remat: what the model recomputes of this layer in backward; `auto` counts bytes that this moves again.
      init_std: standard deviation of the initial input projections.
      out_std: the same for the output projection; init_std if None.
      dtype: compute dtype; parameters are float32.
      rngs: stream `params`.
    """

    dim = "heads"

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        placement: Placement,
        stream: StreamConfig = StreamConfig(),
        rope_theta: float = 10_000.0,
        rope_scaling: RopeScaling = RopeScaling(),
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        remat: Remat = "none",
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or d_model // num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; use a multiple")
        heads = padded_heads(placement, num_heads, num_kv_heads, head_dim)
        super().__init__(placement, stream, dtype)
        self.heads = heads
        self.remat: Remat = remat
        self.config = AttentionConfig(
            padded_kv_heads=heads.kv, head_dim=head_dim, rope_theta=rope_theta, rope_scaling=rope_scaling,
            norm_eps=norm_eps, kernel=kernels.choose_kernel(stream.kernel, placement.mesh, head_dim, dtype),
        )  # fmt: skip

        def weight(num_heads: int, queries: bool, std: float) -> nnx.Param:
            return self._param(rngs, num_heads * head_dim, d_model, std, HeadPadding(heads, queries))

        def norm() -> nnx.Param | None:
            sharding = {"out_sharding": placement.layout.spec(None), "mesh": placement.mesh}
            return nnx.Param(jnp.ones((head_dim,), jnp.float32), **sharding) if qk_norm else None

        self.w_q = weight(num_heads, True, init_std)
        self.w_k = weight(num_kv_heads, False, init_std)
        self.w_v = weight(num_kv_heads, False, init_std)
        self.w_o = weight(num_heads, True, init_std if out_std is None else out_std)
        self.q_norm, self.k_norm = norm(), norm()

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Each token attends to the tokens of its segment whose positions are not later than its own.

        Args:
          x_BTD: input, any float dtype.
          positions_BT: int32; 0 to T - 1 if None. Tokens may stand in any order over the sequence axes.
          segment_ids_BT: int32 document numbers; one document if None.

        Returns:
          [B, T, D] in the compute dtype.
        """
        self._check_tokens(x_BTD.shape)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        heads, w_o = self.heads, self.w_o[...]
        if heads.padded:  # a padded query head of a real KV head has an output, and so a gradient, to drop
            real_rows = heads.num_kv_heads * heads.real_group * heads.dim
            w_o *= HeadPadding(heads, True).pad(jnp.ones((real_rows, 1), w_o.dtype))
        weights = AttentionWeights(self.w_q[...], self.w_k[...], self.w_v[...], w_o)
        config, stream = self.configure(x_BTD.shape)
        op = partial(attention, config=config, axes=self.placement.layout.axes(self.dim), stream=stream)
        tokens_spec, x_spec, w_spec = self._specs()
        in_specs = x_spec, w_spec, tokens_spec, self.placement.layout.spec(None)
        return self.placement.shard_map(op, in_specs, x_spec)(
            x_BTD.astype(self.dtype), weights, Tokens(positions_BT, segment_ids_BT), self.head_norms()
        )

    def head_norms(self) -> HeadNorms:
        """Scales of the q/k norm, None without one."""
        return HeadNorms(*(None if norm is None else norm[...] for norm in (self.q_norm, self.k_norm)))

    def configure(self, shape: Sequence[int]) -> tuple[AttentionConfig, Stream]:
        """Settings for tokens [B, T, D]: `auto` resolved, bucket counts derived from the bucket size."""
        heads, d_model, sharding = self.heads, shape[2], self._sharding(shape)
        stream = self._stream(
            shape, self.stream.attention_movement, attention_traffic, d_model=d_model, heads=heads, remat=self.remat
        )
        exchange_buckets = sharding.exchange_buckets(heads, stream.movement, self._bucket_bytes)
        config = self.config._replace(exchange_buckets=exchange_buckets)
        if self.placement.layout.whole_weights:
            return config, stream

        def buckets(num_heads: int, weights: int) -> int:
            per_device = max(1, num_heads // (sharding.folded * sharding.tensor))
            return sharding.weight_buckets(per_device, weights * num_heads * heads.dim * d_model, self._bucket_bytes)

        return config._replace(query_buckets=buckets(heads.query, 1), kv_buckets=buckets(heads.kv, 2)), stream


class MLP(_Layer):
    """Gated MLP: SwiGLU (silu) or GeGLU (gelu).

    Args:
      d_model: D.
      d_ff: F, divisible by the shards of `mlp`.
      placement: layout and mesh.
      stream: movement, bucket and chunk size.
      activation: activation of the gate.
      init_std: standard deviation of the initial gate and up projections.
      out_std: the same for the down projection; init_std if None.
      dtype: compute dtype; parameters are float32.
      rngs: stream `params`.
    """

    dim = "mlp"

    def __init__(
        self, d_model: int, d_ff: int, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        activation: Activation = "silu", init_std: float = 0.02, out_std: float | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.rows = _shard_rows("d_ff", d_ff, "mlp", placement)
        super().__init__(placement, stream, dtype)
        self.activation = activation
        self.w_gate = self._param(rngs, d_ff, d_model, init_std)
        self.w_up = self._param(rngs, d_ff, d_model, init_std)
        self.w_down = self._param(rngs, d_ff, d_model, init_std if out_std is None else out_std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] in the compute dtype."""
        self._check_tokens(x_BTD.shape)
        d_ff, d_model = self.w_up.shape
        stream = self._stream(
            x_BTD.shape, self.stream.mlp_movement, mlp_traffic,
            d_model=d_model, d_ff=d_ff, rows=self.rows, elements=3 * d_ff * d_model,
        )  # fmt: skip
        op = partial(mlp, axes=self.placement.layout.axes(self.dim), stream=stream, activation=self.activation)
        _, x_spec, w_spec = self._specs()
        return self.placement.shard_map(op, (x_spec, w_spec, w_spec, w_spec), x_spec)(
            x_BTD.astype(self.dtype), self.w_gate[...], self.w_up[...], self.w_down[...]
        )


class Embed(_Layer):
    """A vocabulary table: an embedding of tokens, and an output head with its cross-entropy.

    Args:
      vocab_size: V, divisible by the shards of `vocab`.
      d_model: D.
      placement: layout and mesh.
      stream: movement, bucket and chunk size.
      init_std: standard deviation of the initial table.
      dtype: compute dtype; the table is float32.
      rngs: stream `params`.
    """

    dim = "vocab"

    def __init__(
        self, vocab_size: int, d_model: int, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        init_std: float = 0.02, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.rows = _shard_rows("vocab_size", vocab_size, "vocab", placement)
        super().__init__(placement, stream, dtype)
        self.table = self._param(rngs, vocab_size, d_model, init_std)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """[B, T] int32 token ids -> [B, T, D] in the compute dtype."""
        self._check_tokens(ids_BT.shape)
        tokens_spec, x_spec, w_spec = self._specs()
        op = partial(embed, **self._options(ids_BT.shape, embed_traffic), dtype=self.dtype)
        return self.placement.shard_map(op, (tokens_spec, w_spec), x_spec)(ids_BT, self.table[...])

    def cross_entropy(self, x_BTD: jax.Array, labels_BT: jax.Array) -> TokenLosses:
        """Cross-entropy of each token, with the table as output head, without [B, T, V] logits.

        Labels are int32 next tokens, negative ones ignored; the losses are [B, T] float32, 0 where ignored.
        """
        self._check_tokens(labels_BT.shape)
        tokens_spec, x_spec, w_spec = self._specs()
        op = partial(cross_entropy, **self._options(labels_BT.shape, loss_traffic))
        return self.placement.shard_map(op, (x_spec, w_spec, tokens_spec), tokens_spec)(
            x_BTD.astype(self.dtype), self.table[...], labels_BT
        )

    def _options(self, shape: Sequence[int], traffic: Callable[..., Traffic]) -> dict[str, Any]:
        """Axes and stream of an op with this traffic, for tokens [B, T]."""
        vocab_size, d_model = self.table.shape
        stream = self._stream(
            shape, self.stream.vocab_movement, traffic,
            d_model=d_model, vocab_size=vocab_size, rows=self.rows, elements=vocab_size * d_model,
        )  # fmt: skip
        return {"axes": self.placement.layout.axes(self.dim), "stream": stream}


def residual_std(init_std: float, num_layers: int) -> float:
    """Initial standard deviation of a projection into the residual stream (GPT-2's scaling)."""
    return init_std / math.sqrt(2 * num_layers)
