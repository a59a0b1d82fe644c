"""Attention as a layer.

Dims: B batch, T tokens, D model, N query heads, K KV heads, H head; upper case is the full dimension.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import NormWidth, Remat, RopeScaling, StreamConfig, TokenOrder
from tsp_jax.cost.traffic import attention_may_move_tokens, layers_attention_traffic
from tsp_jax.errors import ConfigError
from tsp_jax.heads import HeadSharding
from tsp_jax.layout import Placement, largest_divisor
from tsp_jax.nn.arguments import check_settings
from tsp_jax.nn.layer import Layer
from tsp_jax.ops import kernels
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadBiases, HeadNorms
from tsp_jax.ops.attention.train import Attended, attended_specs, attention
from tsp_jax.ops.kernels.mask import Scores, Tokens
from tsp_jax.ops.stream import Stream
from tsp_jax.stored import HeadPadding


class Attention(Layer):
    """Self-attention with grouped queries and RoPE; causal, without a window, norms and sinks by default.

    Heads that do not divide over the tensor axes are padded with heads of zeros, which get no gradient and change no
    result. Folded axes need no padded heads: each rank stores an equal part of the rows of all heads. There is one
    exception: where the folded ranks cannot share the heads evenly, the movement `activations` computes with padded
    heads. `auto` never chooses this movement there.

    Args:
      d_model: D.
      num_heads: N.
      num_kv_heads: K, a divisor of N; N if None.
      head_dim: H; D / N if None.
      placement: layout and mesh.
      stream: movement, bucket size, kernel.
      rope_theta: base of the rotary frequencies; None: no RoPE.
      rope_scaling: scaling of those frequencies for long contexts; if it depends on the length, that is T.
      qkv_bias: whether queries, keys and values have biases, 0 at first.
      out_bias: whether the output has a bias, 0 at first.
      qk_norm: whether to apply RMSNorm to queries and keys before RoPE.
      qk_norm_width: what that norm takes its mean over: each head on its own, or all heads.
      norm_eps: epsilon of that norm.
      norm_unit_offset: whether that norm multiplies by 1 + its scale.
      causal: whether a token attends to no later token; False in encoders.
      window: number of tokens that a token attends to, itself and those just before it, and in encoders as many after
        it; None: all.
      softcap: bound c of the absolute scores s, which become ``c tanh(s / c)``; None: no bound.
      scale: factor of the products of queries and keys; 1 / sqrt(H) if None.
      token_order: how the tokens of a sequence are ordered over the sequence axes; see `tsp_jax.config.DataConfig`. If
        it is known, a layer with a window receives only keys and values within the window. Tokens in another order give
        NaN then.
      sinks: whether each query head has a learned score without a value, 0 at first.
      remat: what backward recomputes of this layer. Recomputing moves bytes again; `auto` counts them when it chooses
        the movement.
      init_std: standard deviation of the initial input projections.
      out_std: the same for the output projection; init_std if None.
      dtype: compute dtype; parameters are float32.
      rngs: random number generators; the stream `params` is used.
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
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling = RopeScaling(),
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        qk_norm_width: NormWidth = "head",
        norm_eps: float = 1e-6,
        norm_unit_offset: bool = False,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        token_order: TokenOrder = "any",
        remat: Remat = "none",
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        out_std = init_std if out_std is None else out_std
        self._check_settings(
            d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, placement=placement, stream=stream,
            rope_theta=rope_theta, rope_scaling=rope_scaling, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm,
            qk_norm_width=qk_norm_width, norm_eps=norm_eps, norm_unit_offset=norm_unit_offset, causal=causal,
            window=window, softcap=softcap, scale=scale, sinks=sinks, token_order=token_order, remat=remat,
            init_std=init_std, out_std=out_std, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        head_dim = _head_dim(d_model, num_heads, num_kv_heads, head_dim)
        rope_scaling.check_fits(f"{type(self).__name__}: ", head_dim, rope_theta)
        sharding = HeadSharding.of(placement.layout, placement.mesh.shape, num_heads, num_kv_heads, head_dim)
        super().__init__(placement, stream, dtype)
        self.head_sharding = sharding
        self.remat: Remat = remat
        self.windows: tuple[tuple[int | None, int], ...] = ((window, 1),)
        """windows of the layers for which `auto` chooses a movement together"""
        self.config = AttentionConfig(
            heads=sharding.heads, rope_theta=rope_theta, norm_eps=norm_eps, rope_scaling=rope_scaling,
            scores=Scores(causal, window, softcap, scale), token_order=token_order, norm_width=qk_norm_width,
        )  # fmt: skip
        self.config = self.variant(window, rope_theta, rope_scaling)

        def weight(num_heads: int, queries: bool, std: float) -> nnx.Param:
            return self._param(rngs, num_heads * head_dim, d_model, std, HeadPadding(sharding, queries))

        def replicated(value: float, size: int) -> nnx.Param:
            sharding = {"out_sharding": placement.layout.spec(None), "mesh": placement.mesh}
            return nnx.Param(jnp.full((size,), value, jnp.float32), **sharding)

        self.w_q = weight(num_heads, True, init_std)
        self.w_k = weight(num_kv_heads, False, init_std)
        self.w_v = weight(num_kv_heads, False, init_std)
        self.w_o = weight(num_heads, True, out_std)
        query, kv = num_heads * head_dim, num_kv_heads * head_dim
        widths = (query, kv) if qk_norm_width == "all" else (head_dim, head_dim)
        first = 0.0 if norm_unit_offset else 1.0
        self.norm_unit_offset = norm_unit_offset
        self.q_norm, self.k_norm = (replicated(first, width) if qk_norm else None for width in widths)
        biases = (replicated(0.0, width) if qkv_bias else None for width in (query, kv, kv))
        self.q_bias, self.k_bias, self.v_bias = biases
        self.o_bias = replicated(0.0, d_model) if out_bias else None
        self.sinks = replicated(0.0, num_heads) if sinks else None

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """Each token attends to the tokens of its segment, causally and within the window if the layer has one.

        Args:
          x_BTD: input, any float dtype.
          positions_BT: int32; 0 to T - 1 if None. Tokens may stand in any order over the sequence axes.
          segment_ids_BT: int32 document numbers; one document if None.

        Returns:
          [B, T, D] in the compute dtype.
        """
        return self.attend(x_BTD, positions_BT, segment_ids_BT)[0]

    def attend(
        self, x_BTD: jax.Array, positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
        known: Attended | None = None,
    ) -> tuple[jax.Array, Attended]:  # fmt: skip
        """As a call, but also returns what the kernel has computed.

        Given back as `known` for the same arguments, this replaces the kernel's run. So backward need not repeat it.

        Returns:
          ([B, T, D] in the compute dtype, `Attended`: global arrays sharded as `attended_specs` says).
        """
        self._check_x(x_BTD, self.w_q.shape[-1])
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        self._check_integers("positions_BT", positions_BT, *x_BTD.shape[:2])
        self._check_integers("segment_ids_BT", segment_ids_BT, *x_BTD.shape[:2])
        tokens = Tokens(positions_BT.astype(jnp.int32), segment_ids_BT.astype(jnp.int32))
        heads, w_o = self.head_sharding.heads, self.w_o[...]
        if heads.padded:  # a padded query head of a real KV head has an output, and so a gradient, to drop
            real_rows = heads.num_kv_heads * heads.real_group * heads.dim
            w_o *= HeadPadding(self.head_sharding, True).pad(jnp.ones((real_rows, 1), w_o.dtype))
        weights = AttentionWeights(self.w_q[...], self.w_k[...], self.w_v[...], w_o)
        config, stream = self.configure(x_BTD.shape)
        op = partial(attention, config=config, axes=self.placement.layout.axes(self.dim), stream=stream)
        (tokens_spec, x_spec, w_spec), attended = self._specs(), self.attended_specs(x_BTD.shape)
        whole, (norms, sinks_N, biases) = self.placement.layout.spec(None), self.replicated()
        in_specs = x_spec, w_spec, tokens_spec, whole, whole, None if known is None else attended, whole
        arrays = x_BTD.astype(self.dtype), weights, tokens, norms, sinks_N, known, biases
        y_BTD, attended = self._run(op, in_specs, (x_spec, attended), *arrays)
        return self.with_out_bias(y_BTD), attended

    def with_out_bias(self, y_BTD: jax.Array) -> jax.Array:
        """What an attention op returns, summed over all ranks, with the bias of the output if there is one."""
        return y_BTD if self.o_bias is None else y_BTD + self.o_bias[...].astype(y_BTD.dtype)[None, None]

    def attended_specs(self, shape: Sequence[int]) -> Attended:
        """PartitionSpecs of `Attended` for tokens [B, T, D]."""
        layout = self.placement.layout
        return attended_specs(layout.axes(self.dim), layout.batch, self.configure(shape)[1])

    def replicated(self) -> tuple[HeadNorms, jax.Array | None, HeadBiases | None]:
        """The parameters that all devices hold: (scales of the q/k norm, sinks [N], biases), None if there are none."""
        q_H, k_H, sinks_N = (None if p is None else p[...] for p in (self.q_norm, self.k_norm, self.sinks))
        if self.norm_unit_offset and q_H is not None and k_H is not None:
            q_H, k_H = (1.0 + scale.astype(jnp.float32) for scale in (q_H, k_H))
        if self.q_bias is None or self.k_bias is None or self.v_bias is None:
            return HeadNorms(q_H, k_H), sinks_N, None
        return HeadNorms(q_H, k_H), sinks_N, HeadBiases(self.q_bias[...], self.k_bias[...], self.v_bias[...])

    def variant(self, window: int | None, rope_theta: float | None, rope_scaling: RopeScaling) -> AttentionConfig:
        """The settings of a layer that differs from this one only in its window and its RoPE; see `with_config`."""
        scores = self.config.scores._replace(window=window)
        kernel = kernels.choose_kernel(
            self.stream.kernel, self.placement.mesh, self.config.head_dim, self.dtype, scores
        )
        return self.config._replace(scores=scores, rope_theta=rope_theta, rope_scaling=rope_scaling, kernel=kernel)

    def with_config(self, config: AttentionConfig) -> "Attention":
        """A layer with the same parameters and other settings."""
        other = nnx.merge(*nnx.split(self))
        other.config = config
        return other

    def configure(self, shape: Sequence[int]) -> tuple[AttentionConfig, Stream]:
        """The op's settings for tokens [B, T, D]: `auto` is resolved, and the bucket size converted to counts."""
        heads, d_model, sharding = self.head_sharding, shape[2], self._sharding(shape)
        order = self.config.token_order
        stream = self._stream(
            shape, self.stream.attention_movement, layers_attention_traffic, d_model=d_model, heads=heads,
            remat=self.remat, windows=self.windows, token_order=order,
            tokens_may_move=attention_may_move_tokens(self.placement.layout.axes(self.dim), heads),
        )  # fmt: skip
        exchanged = sharding.exchanged_tokens(stream.movement, self.config.scores.window, order)
        exchange_buckets = sharding.exchange_buckets(heads, stream.movement, self._bucket_bytes, exchanged)
        rope_scaling = self.config.rope_scaling.at(shape[1])
        config = self.config._replace(exchange_buckets=exchange_buckets, rope_scaling=rope_scaling)
        if self.placement.layout.whole_weights:
            return config, stream
        query_buckets, kv_buckets = sharding.head_buckets(heads, d_model, self._bucket_bytes)
        return config._replace(query_buckets=query_buckets, kv_buckets=kv_buckets), stream


def _head_dim(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    """H, by default D / N; raises ConfigError if these sizes do not give whole heads."""
    layer = Attention.__name__
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{layer}: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; "
            f"use num_heads={-(-num_heads // num_kv_heads) * num_kv_heads}"
        )
    if head_dim is None:
        if d_model % num_heads:
            use = f"num_heads={largest_divisor(d_model, num_heads)}, or pass head_dim"
            raise ConfigError(f"{layer}: d_model={d_model} is not a multiple of num_heads={num_heads}; use {use}")
        head_dim = d_model // num_heads
    check_settings(layer, head_dim=head_dim)
    if head_dim % 2:
        raise ConfigError(f"{layer}: head_dim={head_dim} is odd, RoPE rotates pairs; use head_dim={head_dim + 1}")
    return int(head_dim)
