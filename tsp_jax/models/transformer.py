"""One decoder, configured as Llama, Qwen3 and their like.

Layers are stacked along a leading dimension and scanned, so that compile time does not grow with depth.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tsp_jax.config import ModelConfig, Remat, StreamConfig
from tsp_jax.layout import Placement
from tsp_jax.models.remat import run_layers
from tsp_jax.nn import MLP, Attention, Embed, divert_grads, residual_std
from tsp_jax.ops.attention.train import SAVED_NAMES

M = TypeVar("M", bound=nnx.Module)
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


def functional(graphdef: nnx.GraphDef[M], state: nnx.State) -> Callable[[dict], M]:
    """Parameters -> the module that `nnx.split` took apart, with these in the place of its own."""

    def module_of(params: dict) -> M:
        mine = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(mine, params)
        return nnx.merge(graphdef, mine)

    return module_of


def rematerialise(layer: Callable, remat: Remat) -> Callable:
    """`layer`, dropping in forward what `remat` says backward is to compute again. For use inside a scan."""
    policy = REMAT_POLICIES[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False) if policy else layer


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, *, placement: Placement, stream: StreamConfig, dtype: Any, remat: Remat,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        kwargs: dict[str, Any] = {"placement": placement, "stream": stream, "dtype": dtype, "rngs": rngs}
        kwargs["init_std"] = config.init_std
        kwargs["out_std"] = residual_std(config.init_std, config.num_layers)
        self.attention_norm = _norm(config, placement, dtype, rngs)
        self.attention = Attention(
            config.d_model, config.num_heads, config.num_kv_heads, config.head_dim,
            rope_theta=config.rope_theta, rope_scaling=config.rope_scaling, qk_norm=config.qk_norm,
            norm_eps=config.norm_eps, remat=remat, **kwargs,
        )  # fmt: skip
        self.mlp_norm = _norm(config, placement, dtype, rngs)
        self.mlp = MLP(config.d_model, config.d_ff, activation=config.activation, **kwargs)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.feed(x_BTD + self.attend(x_BTD, positions_BT, segment_ids_BT))

    def attend(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """What attention adds to the residual stream."""
        return self.attention(self.attention_norm(x_BTD), positions_BT, segment_ids_BT)

    def feed(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream after the MLP."""
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


def _norm(config: ModelConfig, placement: Placement, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    metadata = {"out_sharding": placement.layout.spec(None), "mesh": placement.mesh}
    return nnx.RMSNorm(
        config.d_model, epsilon=config.norm_eps, dtype=dtype, param_dtype=jnp.float32, scale_metadata=metadata,
        rngs=rngs,
    )  # fmt: skip


class Transformer(nnx.Module):
    """Decoder-only language model.

    Args:
      config: sizes.
      placement: layout and mesh.
      stream: movement, buckets and blocks.
      dtype: compute dtype; parameters are float32.
      remat: what backward recomputes.
      rngs: stream `params`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        placement: Placement,
        stream: StreamConfig = StreamConfig(),
        dtype: Any = jnp.bfloat16,
        remat: Remat = "full",
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.remat: Remat = remat
        self.placement = placement
        kwargs: dict[str, Any] = {"placement": placement, "stream": stream, "dtype": dtype}
        table = dict(kwargs, init_std=config.init_std, rngs=rngs)
        self.embed = Embed(config.vocab_size, config.d_model, **table)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, **kwargs, remat=remat, rngs=rngs)

        self.layers = stacked(rngs)
        self.final_norm = _norm(config, placement, dtype, rngs)
        self.head = None if config.tie_embeddings else Embed(config.vocab_size, config.d_model, **table)

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, grad_sinks: dict | None = None
    ) -> jax.Array:
        """Final hidden states, [B, T, D] in the compute dtype.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 positions, in any order of tokens.
          segment_ids_BT: int32 document numbers.
          grad_sinks: arrays like the layers' parameters that get their gradients; see `divert_grads`.
        """
        graphdef, stacked = nnx.split(self.layers)
        x_BTD, params, tokens = self.embed(tokens_BT), nnx.to_pure_dict(stacked), (positions_BT, segment_ids_BT)

        module = functional(graphdef, stacked)

        def layer(params, x_BTD, tokens):
            return module(params)(x_BTD, *tokens)

        def lean_layer(params, x_BTD, tokens):
            """Within a layer's backward, queries, keys and values are projected again after that of the MLP."""
            layer = module(params)
            attend = jax.checkpoint(layer.attend, policy=REMAT_POLICIES["save_attention"])
            return layer.feed(lax.optimization_barrier(x_BTD + attend(x_BTD, *tokens)))

        if self.remat == "full":
            specs = nnx.to_pure_dict(nnx.get_partition_spec(stacked))
            x_BTD = run_layers(lean_layer, x_BTD, params, grad_sinks, tokens, specs, self.placement)
        else:

            def turn(x_BTD, scanned):
                params, sinks = scanned
                params = params if sinks is None else divert_grads(params, sinks)
                run = lean_layer if self.remat == "offload" else layer
                return run(params, checkpoint_name(x_BTD, "layer_input"), tokens), None

            x_BTD, _ = lax.scan(rematerialise(turn, self.remat), x_BTD, (params, grad_sinks))
        return self.final_norm(x_BTD)

    def token_losses(self, batch: Any, grad_sinks: dict | None = None):
        """TokenLosses of a batch with fields tokens, labels, positions, segment_ids, each [B, T] int32."""
        x_BTD = self(batch.tokens, batch.positions, batch.segment_ids, grad_sinks)
        return (self.head or self.embed).cross_entropy(x_BTD, batch.labels)
