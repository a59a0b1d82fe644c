"""The decoder over a cache: many tokens at once, or one a sequence.

Both run the layers of one Transformer with the same parameters. Prefill is the training forward, attention apart.
For decoding, activations are so few that every device keeps all of them, so the model is placed by `decode_placement`:
the row of the layout's table in which the sequence is whole. The same axes shard the same weights, and since none of
them shards tokens too, each is a tensor axis: embedding, MLP and head are then tensor-parallel as they stand. Only
attention still needs the first layout, whose sequence axes shard the cache.

Dims: B batch, T tokens of a chunk, S slots of all ranks, D model, V vocabulary; lower case this device's slice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from tsp_jax.inference.cache import Cache, cache_specs
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.nn import Attention
from tsp_jax.ops.attention.decode import decode_attention
from tsp_jax.ops.attention.kv_cache import EMPTY, NO_TOKEN, claim_slots, own_tokens, write_slots
from tsp_jax.ops.attention.prefill import prefill_attention
from tsp_jax.ops.attention.projections import AttentionWeights, HeadNorms
from tsp_jax.ops.linear import matmul_t

REPLICATED = PartitionSpec()


def decode_placement(placement: Placement) -> Placement:
    """The same weights in the same places, and tokens on every device."""
    return Placement(dataclasses.replace(placement.layout, sequence=()), placement.mesh)


def prefill(
    model: Transformer,
    whole: Transformer,
    placement: Placement,
    cache: Cache,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Puts a chunk of tokens into the cache.

    Args:
      model: on `placement`.
      whole: the same on `decode_placement(placement)`; makes the logits.
      placement: layout and mesh.
      cache: what came before.
      tokens_BT: int32 ids, dealt over the ranks as `tsp_jax.inference.cache.deal` does, or in any order that leaves
        every rank room and its real tokens first.
      positions_BT: int32; `NO_TOKEN` where a token is only padding.

    Returns:
      (logits [B, V] float32 after each sequence's last token of this chunk, the cache). Logits of a sequence without
      a token in this chunk mean nothing.
    """
    layout, specs = placement.layout, cache_specs(placement)
    tokens = layout.spec("batch", "sequence")
    claim, keys_BS = placement.shard_map(
        claim_slots, in_specs=(specs.positions_BS, tokens), out_specs=(tokens, specs.positions_BS)
    )(cache.positions_BS, positions_BT)
    all_keys_BS = lax.with_sharding_constraint(keys_BS, placement.sharding("batch", None))
    keys_BRc = all_keys_BS.reshape(keys_BS.shape[0], placement.size("sequence"), -1)
    used = (keys_BRc != EMPTY).sum(axis=-1, dtype=jnp.int32).max()

    def attend(module: Attention, x_BTD, kv, layer):
        config, stream = module.configure(x_BTD.shape)

        def local(*args):
            return prefill_attention(*args, config=config, axes=layout.axes("heads"), stream=stream)

        rest = REPLICATED, tokens, tokens, layout.spec("batch", None), REPLICATED
        run = _sharded(local, placement, layout.spec("batch", "sequence", None), *rest)
        y_BTD, kv = run(*_inputs(module, x_BTD), kv, layer, positions_BT, claim, all_keys_BS, used)
        return y_BTD, kv, None

    x_BTD, kv, _ = _layers(model, model.embed(tokens_BT), attend, cache.key_values)
    last_B = positions_BT.max(axis=1)
    is_last_BT = (positions_BT == last_B[:, None]) & (positions_BT != NO_TOKEN)
    x_B1D = jnp.where(is_last_BT[..., None], x_BTD, jnp.zeros_like(x_BTD)).sum(axis=1, keepdims=True)
    lengths_B = jnp.maximum(cache.lengths_B, last_B + 1)
    return _logits(whole, x_B1D), Cache(kv.k_LBKcH, kv.v_LBKcH, keys_BS, lengths_B)


def decode(model: Transformer, placement: Placement, cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
    """Puts one token a sequence into the cache.

    Args:
      model: on `decode_placement(placement)`.
      placement: layout and mesh.
      cache: what came before.
      tokens_B: int32 ids; negative: nothing for this sequence, whose logits then mean nothing.

    Returns:
      (logits [B, V] float32 after the token, the cache).
    """
    layout, specs = placement.layout, cache_specs(placement)
    kv_specs, slots = specs.key_values, specs.positions_BS
    everywhere = layout.spec("batch", None)
    positions_B1 = jnp.where(tokens_B >= 0, cache.lengths_B, NO_TOKEN)[:, None]

    def claim_own(keys_Bc, positions_B1):
        return claim_slots(keys_Bc, own_tokens(positions_B1, layout.sequence))

    claim, keys_BS = placement.shard_map(claim_own, in_specs=(slots, everywhere), out_specs=(slots, slots))(
        cache.positions_BS, positions_B1
    )

    def attend(module: Attention, x_B1D, _, layer):
        def local(*args):
            return decode_attention(*args, config=module.config, axes=layout.axes("heads"))

        run = _sharded(local, placement, layout.spec("batch", None, None), REPLICATED, everywhere, slots, slots)
        inputs = cache.key_values, layer, positions_B1, claim, cache.positions_BS
        y_B1D, new = run(*_inputs(module, x_B1D), *inputs)
        return y_B1D, None, new

    x_B1D, _, new = _layers(model, model.embed(tokens_B[:, None]), attend, None)
    write = placement.shard_map(write_slots, in_specs=(kv_specs, kv_specs, REPLICATED, slots), out_specs=kv_specs)
    kv = write(cache.key_values, jax.tree.map(lambda array: array[:, 0], new), jnp.zeros((), jnp.int32), claim)
    lengths_B = jnp.maximum(cache.lengths_B, positions_B1[:, 0] + 1)
    return _logits(model, x_B1D), Cache(kv.k_LBKcH, kv.v_LBKcH, keys_BS, lengths_B)


def _sharded(local: Callable, placement: Placement, x_spec: PartitionSpec, *rest: Any) -> Callable:
    """`local` (x, weights, norms, key-values, *rest) -> (y like x, key-values), run on every device."""
    kv_specs = cache_specs(placement).key_values
    in_specs = (x_spec, placement.layout.spec("heads", None), REPLICATED, kv_specs, *rest)
    return placement.shard_map(local, in_specs=in_specs, out_specs=(x_spec, kv_specs))


def _inputs(module: Attention, x_BTD: jax.Array) -> tuple[jax.Array, AttentionWeights, HeadNorms | None]:
    norms = None
    if module.q_norm is not None and module.k_norm is not None:
        norms = HeadNorms(module.q_norm[...], module.k_norm[...])
    weights = AttentionWeights(module.w_q[...], module.w_k[...], module.w_v[...], module.w_o[...])
    return x_BTD.astype(module.dtype), weights, norms


def _layers(model: Transformer, x_BTD: jax.Array, attend: Callable, carry: Any) -> tuple[jax.Array, Any, Any]:
    """All layers, with `attend` (module, x, carry, layer number) -> (y, carry, out) for attention.

    Returns:
      (x, carry, outs of all layers).
    """
    graphdef, stacked = nnx.split(model.layers)

    def layer(carry, xs):
        (x_BTD, carry), (state, index) = carry, xs

        def attend_and_carry(attention: Attention, x_BTD: jax.Array):
            y_BTD, *extra = attend(attention, x_BTD, carry, index)
            return y_BTD, extra

        x_BTD, (carry, out) = nnx.merge(graphdef, state)(x_BTD, attend_and_carry)
        return (x_BTD, carry), out

    indices = jnp.arange(model.config.num_layers, dtype=jnp.int32)
    (x_BTD, carry), outs = lax.scan(layer, (x_BTD, carry), (stacked, indices))
    return x_BTD, carry, outs


def _logits(model: Transformer, x_B1D: jax.Array) -> jax.Array:
    """[B, V] float32, on every device: each multiplies by its own rows of the head."""
    head = model.head or model.embed
    layout, dtype = head.placement.layout, head.dtype

    def local(x_B1D, table_vD):
        return matmul_t(x_B1D, table_vD.astype(dtype))

    with jax.named_scope("tsp/logits"):
        logits_B1V = head.placement.shard_map(
            local,
            in_specs=(layout.spec("batch", None, None), layout.spec("vocab", None)),
            out_specs=layout.spec("batch", None, "vocab"),
        )(model.final_norm(x_B1D).astype(dtype), head.table[...])
        return lax.with_sharding_constraint(logits_B1V[:, 0], head.placement.sharding("batch", None))
