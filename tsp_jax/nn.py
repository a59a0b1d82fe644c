"""Flax NNX layers over global arrays, to use in a model of your own.

Each layer holds ordinary global parameters with sharding metadata, and runs its op in one `jax.shard_map` on a
`Placement` (a layout on a mesh). Weights are stored [rows, D]: the first dimension is the one that is sharded.

Dims: B batch, T tokens, D model, N query heads, K KV heads, H head, F ffn, V vocabulary; lower case is this device's
shard.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

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
from tsp_jax.ops import cross_entropy as cross_entropy_op
from tsp_jax.ops import kernels
from tsp_jax.ops.attention import train as attention_op
from tsp_jax.ops.embedding import embed
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.mlp import mlp
from tsp_jax.ops.stream import Stream

MIB = 1 << 20
"""bytes"""


def _sharding(placement: Placement, dim: str, shape: Sequence[int], dtype: jnp.dtype, stream: StreamConfig):
    """The sharding of an op on tokens [B, T, ...] whose weights are sharded along `dim`."""
    return OpSharding.of(
        placement.layout, placement.mesh.shape, dim, batch=shape[0], seq_len=shape[1],
        itemsize=dtype.itemsize, grad_itemsize=jnp.dtype(stream.grad_dtype).itemsize,
    )  # fmt: skip


def _make_stream(
    placement: Placement, config: StreamConfig, movement: str, sharding: OpSharding, traffic: Callable[..., Traffic],
    *, d_model: int, rows: int = 1, elements: int = 0,
) -> Stream:  # fmt: skip
    """What moves in an op, and in how many buckets of `config.bucket_mib`.

    Args:
      placement: layout and mesh; its layout may ask for whole weights.
      config: sizes and dtype of messages.
      movement: of this op, from the configuration.
      sharding: of this op.
      traffic: movement -> bytes by kind, which `auto` compares.
      d_model: D.
      rows: rows of weights per device.
      elements: of all ranks' weights.
    """
    whole, bucket_bytes = placement.layout.whole_weights, config.bucket_mib * MIB
    return Stream(
        movement="gather" if whole else choose_movement(movement, traffic),
        buckets=1 if whole else sharding.weight_buckets(rows, elements, bucket_bytes),
        grad_dtype=config.grad_dtype,
        chunk_tokens=config.chunk_tokens,
        token_buckets=sharding.token_buckets(d_model, bucket_bytes),
    )


def _shard_rows(name: str, value: int, dim: str, placement: Placement) -> int:
    shards = placement.size(dim)
    check_divides(name, value, shards, getattr(placement.layout, dim))
    return value // shards


def _check_tokens(shape: Sequence[int], placement: Placement) -> None:
    for name, value, dim in (("batch", shape[0], "batch"), ("sequence", shape[1], "sequence")):
        _shard_rows(name, value, dim, placement)


def _weight(key: jax.Array, shape: Sequence[int], std: float) -> jax.Array:
    return nnx.initializers.normal(std)(key, shape, jnp.float32)


class Attention(nnx.Module):
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
      remat: which part of this layer the model around it recomputes in backward; movement `auto` counts its bytes too.
      init_std: standard deviation of the initial input projections.
      out_std: the same for the output projection; init_std if None.
      dtype: compute dtype; parameters are float32.
      rngs: stream `params`.
    """

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
        self.placement, self.dtype, self.heads = placement, jnp.dtype(dtype), heads
        self.remat: Remat = remat
        self.stream = stream
        self.config = attention_op.AttentionConfig(
            padded_kv_heads=heads.kv,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=norm_eps,
            kernel=kernels.choose_kernel(stream.kernel, placement.mesh, head_dim, dtype),
        )

        def rows(count: int, queries: bool, std: float) -> nnx.Param:
            padding = HeadPadding(heads, queries)
            value = padding.pad(_weight(rngs.params(), (count * head_dim, d_model), std))
            return nnx.Param(
                value, out_sharding=placement.layout.spec("heads", None), mesh=placement.mesh, padding=padding
            )

        self.w_q = rows(num_heads, True, init_std)
        self.w_k = rows(num_kv_heads, False, init_std)
        self.w_v = rows(num_kv_heads, False, init_std)
        self.w_o = rows(num_heads, True, init_std if out_std is None else out_std)
        self.q_norm = self._norm() if qk_norm else None
        self.k_norm = self._norm() if qk_norm else None

    def _norm(self) -> nnx.Param:
        layout, mesh = self.placement.layout, self.placement.mesh
        return nnx.Param(jnp.ones((self.heads.dim,), jnp.float32), out_sharding=layout.spec(None), mesh=mesh)

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
        _check_tokens(x_BTD.shape, self.placement)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        layout = self.placement.layout
        w_o = self.w_o[...]
        if self.heads.padded:  # a padded query head of a real KV head has an output, and so a gradient, to drop
            w_o *= HeadPadding(self.heads, True).pad(jnp.ones((self._logical_rows(), 1), w_o.dtype))
        weights = attention_op.AttentionWeights(self.w_q[...], self.w_k[...], self.w_v[...], w_o)

        config, stream = self.configure(x_BTD.shape)

        def local(x_BtD, weights, tokens_Bt, norms):
            axes = layout.axes("heads")
            return attention_op.attention(x_BtD, weights, tokens_Bt, norms, config=config, axes=axes, stream=stream)

        tokens, x_spec = layout.spec("batch", "sequence"), layout.spec("batch", "sequence", None)
        return self.placement.shard_map(
            local, in_specs=(x_spec, layout.spec("heads", None), tokens, layout.spec(None)), out_specs=x_spec
        )(x_BTD.astype(self.dtype), weights, Tokens(positions_BT, segment_ids_BT), self.head_norms())

    def head_norms(self) -> attention_op.HeadNorms:
        """Scales of the q/k norm, None without one."""
        return attention_op.HeadNorms(*(None if norm is None else norm[...] for norm in (self.q_norm, self.k_norm)))

    def configure(self, shape: Sequence[int]) -> tuple[attention_op.AttentionConfig, Stream]:
        """What moves for tokens [B, T, D]: `auto` resolved, and bucket counts from the bucket size."""
        heads, d_model, bucket_bytes = self.heads, shape[2], self.stream.bucket_mib * MIB
        sharding = _sharding(self.placement, "heads", shape, self.dtype, self.stream)
        traffic = partial(attention_traffic, sharding, heads=heads, d_model=d_model, remat=self.remat)
        movement = self.stream.attention_movement
        stream = _make_stream(self.placement, self.stream, movement, sharding, traffic, d_model=d_model)

        def buckets(num_heads: int, elements: int) -> int:
            per_device = max(1, num_heads // (sharding.folded * sharding.tensor))
            return sharding.weight_buckets(per_device, elements, bucket_bytes)

        config = self.config._replace(exchange_buckets=sharding.exchange_buckets(heads, stream.movement, bucket_bytes))
        if self.placement.layout.whole_weights:
            return config, stream
        query_elements, kv_elements = (n * heads.dim * d_model for n in (heads.query, 2 * heads.kv))
        counts = buckets(heads.query, query_elements), buckets(heads.kv, kv_elements)
        return config._replace(query_buckets=counts[0], kv_buckets=counts[1]), stream

    def _logical_rows(self) -> int:
        return self.heads.num_kv_heads * self.heads.real_group * self.heads.dim


class MLP(nnx.Module):
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

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        placement: Placement,
        stream: StreamConfig = StreamConfig(),
        activation: Activation = "silu",
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        self.rows = _shard_rows("d_ff", d_ff, "mlp", placement)
        self.placement, self.dtype, self.activation, self.stream = placement, jnp.dtype(dtype), activation, stream

        def columns(std: float) -> nnx.Param:
            value = _weight(rngs.params(), (d_ff, d_model), std)
            return nnx.Param(value, out_sharding=placement.layout.spec("mlp", None), mesh=placement.mesh)

        self.w_gate = columns(init_std)
        self.w_up = columns(init_std)
        self.w_down = columns(init_std if out_std is None else out_std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] in the compute dtype."""
        _check_tokens(x_BTD.shape, self.placement)
        layout, stream = self.placement.layout, self._stream(x_BTD.shape)

        def local(x_BtD, *weights):
            return mlp(x_BtD, *weights, axes=layout.axes("mlp"), stream=stream, activation=self.activation)

        x_spec, w_spec = layout.spec("batch", "sequence", None), layout.spec("mlp", None)
        return self.placement.shard_map(local, in_specs=(x_spec, w_spec, w_spec, w_spec), out_specs=x_spec)(
            x_BTD.astype(self.dtype), self.w_gate[...], self.w_up[...], self.w_down[...]
        )

    def _stream(self, shape: Sequence[int]) -> Stream:
        """What moves for tokens [B, T, D]."""
        sharding = _sharding(self.placement, "mlp", shape, self.dtype, self.stream)
        d_ff, d_model = self.w_up.shape
        return _make_stream(
            self.placement, self.stream, self.stream.mlp_movement, sharding,
            partial(mlp_traffic, sharding, d_model=d_model, d_ff=d_ff),
            d_model=d_model, rows=self.rows, elements=3 * d_ff * d_model,
        )  # fmt: skip


class Embed(nnx.Module):
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

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        placement: Placement,
        stream: StreamConfig = StreamConfig(),
        init_std: float = 0.02,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        self.rows = _shard_rows("vocab_size", vocab_size, "vocab", placement)
        self.placement, self.dtype, self.stream = placement, jnp.dtype(dtype), stream
        value = _weight(rngs.params(), (vocab_size, d_model), init_std)
        self.table = nnx.Param(value, out_sharding=placement.layout.spec("vocab", None), mesh=placement.mesh)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """[B, T] int32 token ids -> [B, T, D] in the compute dtype."""
        _check_tokens(ids_BT.shape, self.placement)
        layout, stream = self.placement.layout, self._stream(ids_BT.shape, embed_traffic)

        def local(ids_Bt, table_vD):
            return embed(ids_Bt, table_vD, axes=layout.axes("vocab"), stream=stream, dtype=self.dtype)

        specs = (layout.spec("batch", "sequence"), layout.spec("vocab", None))
        out_spec = layout.spec("batch", "sequence", None)
        return self.placement.shard_map(local, in_specs=specs, out_specs=out_spec)(ids_BT, self.table[...])

    def cross_entropy(self, x_BTD: jax.Array, labels_BT: jax.Array) -> cross_entropy_op.TokenLosses:
        """Cross-entropy of each token, with the table as output head, without [B, T, V] logits.

        Args:
          x_BTD: final hidden states.
          labels_BT: int32 next tokens; negative: ignored.

        Returns:
          TokenLosses (nll, lse), each [B, T] float32, 0 where ignored.
        """
        _check_tokens(labels_BT.shape, self.placement)
        layout, stream = self.placement.layout, self._stream(labels_BT.shape, loss_traffic)

        def local(x_BtD, table_vD, labels_Bt):
            axes = layout.axes("vocab")
            return cross_entropy_op.cross_entropy(x_BtD, table_vD, labels_Bt, axes=axes, stream=stream)

        tokens = layout.spec("batch", "sequence")
        specs = (layout.spec("batch", "sequence", None), layout.spec("vocab", None), tokens)
        return self.placement.shard_map(local, in_specs=specs, out_specs=tokens)(
            x_BTD.astype(self.dtype), self.table[...], labels_BT
        )

    def _stream(self, shape: Sequence[int], traffic: Callable[..., Traffic]) -> Stream:
        """What moves for tokens [B, T] in an op that receives `traffic`."""
        sharding = _sharding(self.placement, "vocab", shape, self.dtype, self.stream)
        vocab_size, d_model = self.table.shape
        return _make_stream(
            self.placement, self.stream, self.stream.vocab_movement, sharding,
            partial(traffic, sharding, d_model=d_model, vocab_size=vocab_size),
            d_model=d_model, rows=self.rows, elements=vocab_size * d_model,
        )  # fmt: skip


def residual_std(init_std: float, num_layers: int) -> float:
    """Initial standard deviation of a projection into the residual stream (GPT-2's scaling)."""
    return init_std / math.sqrt(2 * num_layers)
