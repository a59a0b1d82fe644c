"""A decoder that is configured as Llama, Qwen3 or a similar model.

Layers are stacked along a leading dimension and scanned, so that compile time does not grow with depth.

Dims: B batch, T tokens, D model, V vocabulary, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import LayerKind, LoraConfig, ModelConfig, Remat, RopeScaling, StreamConfig, TokenOrder
from tsp_jax.layout import Placement
from tsp_jax.models import lora
from tsp_jax.models.keep import Saved
from tsp_jax.models.remat import add_attention, finish_gradients, run_layers
from tsp_jax.nn import MLP, Attention, Embed, Experts, residual_std
from tsp_jax.ops.cross_entropy import TokenLosses
from tsp_jax.ops.kernels.mask import PADDING
from tsp_jax.ops.norm import rms_norm
from tsp_jax.ops.router import RouterSums

M = TypeVar("M", bound=nnx.Module)
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
    """Attention and an MLP, or experts, each added to the residual stream; norms before them, after them, or both."""

    def __init__(
        self, config: ModelConfig, *, placement: Placement, stream: StreamConfig, dtype: Any, remat: Remat,
        token_order: TokenOrder, rngs: nnx.Rngs,
    ):  # fmt: skip
        kwargs: dict[str, Any] = {"placement": placement, "stream": stream, "dtype": dtype, "rngs": rngs}
        kwargs["init_std"] = config.init_std
        kwargs["out_std"] = residual_std(config.init_std, config.num_layers)
        self.remat: Remat = remat
        self.residual_scale = config.residual_scale
        before, after = config.norms != "post", config.norms != "pre"
        self.attention_norm = _norm(config, placement, dtype, rngs) if before else None
        self.attention = Attention(
            config.d_model, config.num_heads, config.num_kv_heads, config.head_dim,
            qkv_bias=config.qkv_bias, out_bias=config.out_bias, qk_norm=config.qk_norm,
            qk_norm_width=config.qk_norm_width, norm_eps=config.norm_eps, norm_unit_offset=config.norm_unit_offset,
            softcap=config.attention_softcap, scale=config.attention_scale, sinks=config.attention_sinks,
            token_order=token_order, remat=remat, **_settings(config, config.period[0]), **kwargs,
        )  # fmt: skip
        self.attention.windows = config.windows
        self.variants = tuple(self.attention.variant(**_settings(config, kind)) for kind in config.period)
        """settings of the attention of each layer of a period"""
        self.attention_post_norm = _norm(config, placement, dtype, rngs) if after else None
        self.mlp_norm = _norm(config, placement, dtype, rngs) if before else None
        kwargs |= {"activation": config.activation, "norm_follows": after, "remat": remat}
        sizes = config.d_model, config.d_ff
        self.mlp = Experts(*sizes, config.experts, **kwargs) if config.experts.number else MLP(*sizes, **kwargs)
        self.mlp_post_norm = _norm(config, placement, dtype, rngs) if after else None

    def __call__(
        self, x_BTD: jax.Array, attend: Attend, recall: Callable[[], Saved] | None = None, number: int = 0,
        real_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, RouterSums | tuple[()]]:  # fmt: skip
        """(residual stream [B, T, D], other output of `attend`, sums of the router or ()).

        `attend` is for training, prefill or decode; `recall` is that of `tsp_jax.models.keep.Layer`; `number` is the
        layer's number in its period, which says of what kind it is; `real_BT` are the tokens that the router counts.
        """
        attention = self.attention if number == 0 else self.attention.with_config(self.variants[number])

        def branch(x_BTD):
            return attend(attention, _normed(self.attention_norm, x_BTD))

        added = partial(self._added, self.attention_post_norm)
        x_BTD, extra = add_attention(branch, x_BTD, self.remat, recall, added)
        mlp = self.mlp
        if self.remat != "none":
            graphdef, state = nnx.split(mlp)
            x_BTD, state = finish_gradients(x_BTD, state)
            mlp = nnx.merge(graphdef, state)
        x_of_mlp, sums = _normed(self.mlp_norm, x_BTD), ()
        if isinstance(mlp, Experts):
            y_BTD, sums = mlp(x_of_mlp, real_BT)
        else:
            y_BTD = mlp(x_of_mlp)
        return x_BTD + self._added(self.mlp_post_norm, y_BTD), extra, sums

    def _added(self, norm: nnx.RMSNorm | None, y_BTD: jax.Array) -> jax.Array:
        """What is added to the residual stream, from the output of attention or the MLP."""
        y_BTD = _normed(norm, y_BTD)
        if self.residual_scale == 1.0:
            return y_BTD
        return (y_BTD.astype(jnp.float32) * self.residual_scale).astype(y_BTD.dtype)


def _settings(config: ModelConfig, kind: LayerKind) -> dict[str, Any]:
    """Window and RoPE of the layers of a kind."""
    if kind == "full_nope":
        return {"window": None, "rope_theta": None, "rope_scaling": RopeScaling()}
    if kind == "sliding" and config.local_rope_theta is not None:
        return {"window": config.window, "rope_theta": config.local_rope_theta, "rope_scaling": RopeScaling()}
    window = config.window if kind == "sliding" else None
    return {"window": window, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}


class _UnitOffsetNorm(nnx.RMSNorm):
    """RMSNorm that multiplies by 1 + its scale, in float32 (Gemma)."""

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        scale = self.scale[...].astype(jnp.float32)  # pyright: ignore[reportOptionalSubscript]
        return rms_norm(x, 1.0 + scale, self.epsilon).astype(self.dtype)


def _norm(config: ModelConfig, placement: Placement, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    metadata = {"out_sharding": placement.layout.spec(None), "mesh": placement.mesh}
    of = nnx.initializers
    kind, init = (_UnitOffsetNorm, of.zeros) if config.norm_unit_offset else (nnx.RMSNorm, of.ones)
    return kind(
        config.d_model, epsilon=config.norm_eps, dtype=dtype, param_dtype=jnp.float32, scale_init=init,
        scale_metadata=metadata, rngs=rngs,
    )  # fmt: skip


def _normed(norm: nnx.RMSNorm | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


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
      adapters: LoRA; see `tsp_jax.models.lora`. By default there are no adapters.
      rngs: random number generators; the stream `params` is used.
    """

    def __init__(
        self, config: ModelConfig, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        dtype: Any = jnp.bfloat16, remat: Remat = "full", grad_dtype: jax.typing.DTypeLike = jnp.float32,
        token_order: TokenOrder = "any", adapters: LoraConfig = LoraConfig(), rngs: nnx.Rngs,
    ):  # fmt: skip
        self.config, self.placement, self.grad_dtype = config, placement, jnp.dtype(grad_dtype)
        self.remat: Remat = remat
        self.lora = adapters
        if adapters.rank:
            config.refuse_experts(f"lora.rank={adapters.rank}")
        kwargs: dict[str, Any] = {"placement": placement, "stream": stream, "dtype": dtype}
        logits = {"logits_scale": config.logits_scale, "logits_softcap": config.logits_softcap}
        table = dict(kwargs, init_std=config.init_std, rngs=rngs, **logits)
        self.embed = Embed(config.vocab_size, config.d_model, **table)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, **kwargs, remat=remat, token_order=token_order, rngs=rngs)

        self.layers = stacked(rngs)
        self.final_norm = _norm(config, placement, dtype, rngs)
        self.head = None if config.tie_embeddings else Embed(config.vocab_size, config.d_model, **table)
        self.adapters = lora.Adapters(self.layers, adapters, rngs) if adapters.rank else None

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Final hidden states, [B, T, D] in the compute dtype, from int32 token ids, positions and document numbers."""
        return self.with_router(tokens_BT, positions_BT, segment_ids_BT)[0]

    def with_router(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, RouterSums | tuple[()]]:
        """(final hidden states, sums of the layers' routers, each [L, ...], or () without experts)."""
        graphdef, stacked = nnx.split(self.layers)
        merge = make_merge(graphdef, stacked)

        states = (stacked, nnx.State({})) if self.adapters is None else (nnx.state(self.adapters), stacked)

        def layer(params, x_BTD, documents, recall, *, number):
            def attend(attention, x_BTD):
                return attention.attend(x_BTD, *documents, known=recall and recall()[1])

            trained, frozen = params
            params = lora.add(frozen, trained, self.lora, self.placement) if frozen else trained
            return merge(params)(x_BTD, attend, recall, number, documents[1] != PADDING)

        period = tuple(partial(layer, number=number) for number in range(len(self.config.period)))
        x_BTD = self.embed_tokens(tokens_BT)
        x_BTD, sums = run_layers(
            period, x_BTD, tuple(map(nnx.to_pure_dict, states)), (positions_BT, segment_ids_BT),
            specs=nnx.to_pure_dict(nnx.get_partition_spec(states[0])),
            attended_specs=self.layers.attention.attended_specs(x_BTD.shape), placement=self.placement,
            policy=self.remat, grad_dtype=self.grad_dtype,
        )  # fmt: skip
        return self.final_norm(x_BTD), sums

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        """Input of the first layer, [B, T, D] in the compute dtype, from token ids."""
        x_BTD, scale = self.embed(tokens_BT), self.config.embedding_scale
        return x_BTD if scale == 1.0 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    def token_losses(self, batch: Any) -> TokenLosses:
        """TokenLosses of a batch with fields tokens, labels, positions, segment_ids, each [B, T] int32."""
        return self.losses(batch)[0]

    def losses(self, batch: Any) -> tuple[TokenLosses, RouterSums | tuple[()]]:
        """(`token_losses`, sums of the layers' routers, each [L, ...], or () without experts)."""
        x_BTD, sums = self.with_router(batch.tokens, batch.positions, batch.segment_ids)
        return (self.head or self.embed).cross_entropy(x_BTD, batch.labels), sums

    def router_loss(self, sums: RouterSums | tuple[()]) -> jax.typing.ArrayLike:
        """What the layers' routers add to a loss: their balance losses and z-losses, with the configured factors."""
        experts = self.config.experts
        return experts.balance_loss * sums.balance.sum() + experts.z_loss * sums.z.sum() if sums else 0.0
