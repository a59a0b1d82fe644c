"""The decoder over a KV cache: prefill of a chunk of tokens, or decode of one token per sequence.

Both run the layers of one Transformer on the same parameters. Prefill is the training forward with other attention.
In decode, activations are so small that they need no sharding over the axes that shard weights. So the model is
placed by `decode_placement`, which changes two things in the layout. The sequence is not sharded, and the batch is
sharded only over axes that shard no weights. The weights are sharded as before. Their axes no longer shard tokens, so
they are all tensor axes: embedding, MLP and head are tensor-parallel. Only attention uses the original layout, whose
batch and sequence axes shard the cache.

Dims: B batch, T tokens of a chunk, S cache entries of all ranks, D model, V vocabulary, L layers, K KV heads, H head,
R ranks of the sequence; lower case: this device's shard.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from tsp_jax.errors import ConfigError
from tsp_jax.inference.cache import Cache, cache_specs
from tsp_jax.layout import Placement, format_axes
from tsp_jax.models.scan import Place, scan_layers
from tsp_jax.models.transformer import Transformer
from tsp_jax.nn import Attention
from tsp_jax.ops.attention.decode import decode_attention
from tsp_jax.ops.attention.kv_cache import EMPTY, NO_TOKEN, allocate_entries, own_positions, write_entries
from tsp_jax.ops.attention.prefill import prefill_attention
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights
from tsp_jax.ops.linear import matmul_t

REPLICATED = PartitionSpec()


def decode_placement(placement: Placement) -> Placement:
    """Placement for decode: weights sharded as in `placement`, tokens only over batch axes that shard no weights."""
    layout = placement.layout
    batch = layout.replica_batch
    folded = tuple(name for name in layout.batch if name not in batch)
    if layout.batch != batch + folded:
        # Otherwise a device's sequences are not among those whose tokens it has.
        raise ConfigError(
            f"layout={layout.name}: batch={format_axes(layout.batch)} must name axes that shard weights last to serve; "
            f"use batch={format_axes(batch + folded)}"
        )
    if lacking := [name for name in folded if name not in layout.heads]:
        # Otherwise attention does not know that other devices have the cache of some of its sequences.
        raise ConfigError(
            f"layout={layout.name}: {format_axes(lacking)} shards batch and weights, to serve it must shard heads too; "
            f"use heads={format_axes((*layout.heads, *lacking))}"
        )
    decode = dataclasses.replace(layout, batch=batch, sequence=(), experts=layout.expert_axes)
    return Placement(decode, placement.mesh)


def prefill(
    model: Transformer, decode_model: Transformer, placement: Placement, cache: Cache, tokens_BT: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, Cache]:  # fmt: skip
    """Runs a chunk of tokens and writes them into the cache.

    Args:
      model: the model on `placement`.
      decode_model: the same model on `decode_placement(placement)`; computes the logits.
      placement: layout and mesh.
      cache: the cache, which holds the tokens before this chunk.
      tokens_BT: int32 ids, ordered by `tsp_jax.inference.cache.assign_tokens`, or in any order in which each
        rank's tokens come before its padding and fit into its free entries.
      positions_BT: int32; `NO_TOKEN` for padding.

    Returns:
      (logits [B, V] float32 after each sequence's last token of this chunk, the cache). Logits of a sequence without
      a token in this chunk are undefined.
    """
    layout, specs = placement.layout, cache_specs(placement)
    kv_specs, tokens_spec = specs.key_values, layout.spec("batch", "sequence")
    entries, entry_positions_BS = placement.shard_map(
        allocate_entries, in_specs=(specs.positions_BS, tokens_spec), out_specs=(tokens_spec, specs.positions_BS)
    )(cache.positions_BS, positions_BT)
    all_positions_BS = lax.with_sharding_constraint(entry_positions_BS, placement.sharding("batch", None))
    positions_BRs = all_positions_BS.reshape(all_positions_BS.shape[0], placement.size("sequence"), -1)
    max_used = (positions_BRs != EMPTY).sum(axis=-1, dtype=jnp.int32).max()

    def attend(module: Attention, x_BTD, kv, place: Place):
        config, stream = module.configure(x_BTD.shape)
        op = partial(prefill_attention, config=config, axes=layout.axes("heads"), stream=stream)
        inputs = kv, place.layer, positions_BT, entries, all_positions_BS, max_used
        attend_specs = kv_specs, REPLICATED, tokens_spec, tokens_spec, layout.spec("batch", None), REPLICATED
        x_spec = layout.spec("batch", "sequence", None)
        return *_run(op, module, placement, x_BTD, x_spec, inputs, attend_specs), None

    x_BTD, kv, _ = _layers(model, model.embed_tokens(tokens_BT), attend, cache.key_values)
    last_B = positions_BT.max(axis=1)
    is_last_BT = (positions_BT == last_B[:, None]) & (positions_BT != NO_TOKEN)
    x_B1D = jnp.where(is_last_BT[..., None], x_BTD, jnp.zeros_like(x_BTD)).sum(axis=1, keepdims=True)
    lengths_B = jnp.maximum(cache.lengths_B, last_B + 1)
    return _logits(decode_model, x_B1D), Cache(kv.k_LBKsH, kv.v_LBKsH, entry_positions_BS, lengths_B)


def decode(
    model: Transformer, configs: Sequence[AttentionConfig], placement: Placement, cache: Cache, tokens_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Runs one token per sequence and writes it into the cache.

    Args:
      model: the model on `decode_placement(placement)`.
      configs: settings of attention on `placement`, of each layer of a period; they say how the weights of attention
        are stored.
      placement: layout and mesh.
      cache: the cache, which holds the tokens before this one.
      tokens_B: int32 ids; negative: no token for this sequence, whose logits are then undefined.

    Returns:
      (logits [B, V] float32 after the token, the cache).
    """
    layout, specs = placement.layout, cache_specs(placement)
    kv_specs, entries_spec = specs.key_values, specs.positions_BS
    token_spec = layout.spec("batch", None)
    positions_B1 = jnp.where(tokens_B >= 0, cache.lengths_B, NO_TOKEN)[:, None]

    def allocate(entry_positions_Bs, positions_B1):
        return allocate_entries(entry_positions_Bs, own_positions(positions_B1, layout.sequence))

    entries, entry_positions_BS = placement.shard_map(
        allocate, in_specs=(entries_spec, token_spec), out_specs=(entries_spec, entries_spec)
    )(cache.positions_BS, positions_B1)

    def attend(module: Attention, x_B1D, _, place: Place):
        op = partial(decode_attention, config=configs[place.number], axes=layout.axes("heads"))
        inputs = cache.key_values, place.layer, positions_B1, entries, cache.positions_BS
        attend_specs = kv_specs, REPLICATED, token_spec, entries_spec, entries_spec
        x_spec = module.placement.layout.spec("batch", None, None)
        y_B1D, new = _run(op, module, placement, x_B1D, x_spec, inputs, attend_specs)
        return y_B1D, None, new

    x_B1D, _, new = _layers(model, model.embed_tokens(tokens_B[:, None]), attend, None)
    write_specs = kv_specs, kv_specs, REPLICATED, entries_spec
    write = placement.shard_map(write_entries, in_specs=write_specs, out_specs=kv_specs)
    kv = write(cache.key_values, jax.tree.map(lambda array: array[:, 0], new), jnp.zeros((), jnp.int32), entries)
    lengths_B = jnp.maximum(cache.lengths_B, positions_B1[:, 0] + 1)
    return _logits(model, x_B1D), Cache(kv.k_LBKsH, kv.v_LBKsH, entry_positions_BS, lengths_B)


def _run(op: Callable, module: Attention, placement: Placement, x_BTD: jax.Array, x_spec: PartitionSpec, inputs, specs):
    """Runs an attention op on x and `inputs`, the first of which is keys and values. Returns (y, keys and values)."""
    weights = AttentionWeights(module.w_q[...], module.w_k[...], module.w_v[...], module.w_o[...])
    in_specs = (x_spec, placement.layout.spec("heads", None), REPLICATED, *specs, REPLICATED, REPLICATED)
    run = placement.shard_map(op, in_specs, (x_spec, specs[0]))
    norms, sinks_N, biases = module.replicated()
    y_BTD, kv = run(x_BTD.astype(module.dtype), weights, norms, *inputs, sinks_N, biases)
    return module.with_out_bias(y_BTD), kv


def _layers(model: Transformer, x_BTD: jax.Array, attend: Callable, carry: Any) -> tuple[jax.Array, Any, Any]:
    """Runs all layers, with `attend` (module, x, carry, place) -> (y, carry, out) for attention.

    Returns (x, carry, outs of all layers).
    """
    graphdef, stacked = nnx.split(model.layers)

    def layer(place: Place, carry, state, _):
        x_BTD, carry = carry

        def attend_and_carry(attention: Attention, x_BTD: jax.Array):
            y_BTD, *extra = attend(attention, x_BTD, carry, place)
            return y_BTD, extra

        x_BTD, (carry, out), _ = nnx.merge(graphdef, state)(x_BTD, attend_and_carry, number=place.number)
        return (x_BTD, carry), out

    (x_BTD, carry), outs = scan_layers(layer, (x_BTD, carry), stacked, period=len(model.config.period))
    return x_BTD, carry, outs.joined()


def _logits(model: Transformer, x_B1D: jax.Array) -> jax.Array:
    """[B, V] float32, on every device of a batch shard. Each device multiplies by its own rows of the head."""
    head = model.head or model.embed
    layout, dtype = head.placement.layout, head.dtype

    def local(x_B1D, table_vD):
        return head.logits.of(matmul_t(x_B1D, table_vD.astype(dtype)))

    in_specs = layout.spec("batch", None, None), layout.spec("vocab", None)
    with jax.named_scope("tsp/logits"):
        logits_B1V = head.placement.shard_map(local, in_specs, layout.spec("batch", None, "vocab"))(
            model.final_norm(x_B1D).astype(dtype), head.table[...]
        )
        logits_BV = lax.with_sharding_constraint(logits_B1V[:, 0], head.placement.sharding("batch", None))
        return logits_BV[:, : head.padding.rows]
