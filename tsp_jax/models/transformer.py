"""A decoder that is configured as Llama, Qwen3 or a similar model.

Layers are stacked along a leading dimension and scanned, so that compile time does not grow with depth.

Dims: B batch, T tokens, D model, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import ModelConfig, Remat, StreamConfig, TokenOrder
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement
from tsp_jax.models.keep import Saved
from tsp_jax.models.remat import add_attention, finish_gradients, run_layers
from tsp_jax.nn import MLP, Attention, Embed, residual_std

M = TypeVar("M", bound=nnx.Module)
_NOT_BUILT = (
    "qk_norm_width", "qkv_bias", "norms", "norm_unit_offset", "embedding_scale", "residual_scale", "logits_scale",
    "logits_softcap", "layer_kinds", "local_rope_theta",
)  # fmt: skip
"""fields of ModelConfig that may only have their default"""
Attend = Callable[[Attention, jax.Array], tuple[jax.Array, Any]]
"""(a layer's attention module, normalized x [B, T, D]) -> (what attention adds to x [B, T, D], any other output)"""


def make_merge(graphdef: nnx.GraphDef[M], state: nnx.State) -> Callable[[dict], M]:
    """Returns a function that maps a pure dict of parameters to the module with them and the rest of `state`."""

    def merge(params: dict) -> M:
        copy = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(copy, params)
        return nnx.merge(graphdef, copy)

    return merge


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, *, placement: Placement, stream: StreamConfig, dtype: Any, remat: Remat,
        token_order: TokenOrder, rngs: nnx.Rngs,
    ):  # fmt: skip
        kwargs: dict[str, Any] = {"placement": placement, "stream": stream, "dtype": dtype, "rngs": rngs}
        kwargs["init_std"] = config.init_std
        kwargs["out_std"] = residual_std(config.init_std, config.num_layers)
        self.remat: Remat = remat
        self.attention_norm = _norm(config, placement, dtype, rngs)
        self.attention = Attention(
            config.d_model, config.num_heads, config.num_kv_heads, config.head_dim,
            rope_theta=config.rope_theta, rope_scaling=config.rope_scaling, qk_norm=config.qk_norm,
            norm_eps=config.norm_eps, window=config.window, softcap=config.attention_softcap,
            scale=config.attention_scale, sinks=config.attention_sinks, token_order=token_order, remat=remat, **kwargs,
        )  # fmt: skip
        self.mlp_norm = _norm(config, placement, dtype, rngs)
        self.mlp = MLP(config.d_model, config.d_ff, activation=config.activation, **kwargs)

    def __call__(
        self, x_BTD: jax.Array, attend: Attend, recall: Callable[[], Saved] | None = None
    ) -> tuple[jax.Array, Any]:
        """(residual stream [B, T, D], other output of `attend`).

        `attend` is for training, prefill or decode; `recall` is that of `tsp_jax.models.keep.Layer`.
        """

        def branch(x_BTD):
            return attend(self.attention, self.attention_norm(x_BTD))

        x_BTD, extra = add_attention(branch, x_BTD, self.remat, recall)
        mlp = self.mlp
        if self.remat != "none":
            graphdef, state = nnx.split(mlp)
            x_BTD, state = finish_gradients(x_BTD, state)
            mlp = nnx.merge(graphdef, state)
        return x_BTD + mlp(self.mlp_norm(x_BTD)), extra


def _norm(config: ModelConfig, placement: Placement, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    metadata = {"out_sharding": placement.layout.spec(None), "mesh": placement.mesh}
    return nnx.RMSNorm(
        config.d_model, epsilon=config.norm_eps, dtype=dtype, param_dtype=jnp.float32, scale_metadata=metadata,
        rngs=rngs,
    )  # fmt: skip


def _check_built(config: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        if field.name in _NOT_BUILT and (value := getattr(config, field.name)) != field.default:
            raise ConfigError(f"model.{field.name}={value} is not supported; use {field.default}")


class Transformer(nnx.Module):
    """Decoder-only language model.

    Args:
      config: sizes.
      placement: layout and mesh.
      stream: movement, bucket size, kernel.
      dtype: compute dtype; parameters are float32.
      remat: what backward recomputes; see `tsp_jax.models.remat`.
      token_order: how the tokens of a sequence are ordered over the sequence axes; see `tsp_jax.nn.Attention`.
      grad_dtype: dtype of the layers' gradients until the backward pass ends.
      rngs: random number generators; the stream `params` is used.
    """

    def __init__(
        self, config: ModelConfig, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        dtype: Any = jnp.bfloat16, remat: Remat = "full", grad_dtype: jax.typing.DTypeLike = jnp.float32,
        token_order: TokenOrder = "any", rngs: nnx.Rngs,
    ):  # fmt: skip
        _check_built(config)
        self.config, self.placement, self.grad_dtype = config, placement, jnp.dtype(grad_dtype)
        self.remat: Remat = remat
        kwargs: dict[str, Any] = {"placement": placement, "stream": stream, "dtype": dtype}
        table = dict(kwargs, init_std=config.init_std, rngs=rngs)
        self.embed = Embed(config.vocab_size, config.d_model, **table)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, **kwargs, remat=remat, token_order=token_order, rngs=rngs)

        self.layers = stacked(rngs)
        self.final_norm = _norm(config, placement, dtype, rngs)
        self.head = None if config.tie_embeddings else Embed(config.vocab_size, config.d_model, **table)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Final hidden states, [B, T, D] in the compute dtype, from int32 token ids, positions and document numbers."""
        graphdef, stacked = nnx.split(self.layers)
        merge = make_merge(graphdef, stacked)

        def layer(params, x_BTD, documents, recall):
            def attend(attention, x_BTD):
                return attention.attend(x_BTD, *documents, known=recall and recall()[1])

            return merge(params)(x_BTD, attend, recall)

        x_BTD = self.embed(tokens_BT)
        x_BTD = run_layers(
            layer, x_BTD, nnx.to_pure_dict(stacked), (positions_BT, segment_ids_BT),
            specs=nnx.to_pure_dict(nnx.get_partition_spec(stacked)),
            attended_specs=self.layers.attention.attended_specs(x_BTD.shape), placement=self.placement,
            policy=self.remat, grad_dtype=self.grad_dtype,
        )  # fmt: skip
        return self.final_norm(x_BTD)

    def token_losses(self, batch: Any):
        """TokenLosses of a batch with fields tokens, labels, positions, segment_ids, each [B, T] int32."""
        x_BTD = self(batch.tokens, batch.positions, batch.segment_ids)
        return (self.head or self.embed).cross_entropy(x_BTD, batch.labels)
