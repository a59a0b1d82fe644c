"""Self-attention with streamed or stationary weights, over a sequence that is sharded over ranks.

Three parts, each with a VJP. `project_in` streams [Wk Wv] and Wq past this device's tokens. `_attend_over_sequence`
takes one bucket of KV heads at a time. While one bucket attends, the keys and values of the next bucket are gathered
over the sequence. In backward, the gradients of one bucket's keys and values are reduce-scattered while those of the
next bucket are computed. `project_out` streams Wo.

Whoever has kept the results of the second part, `Attended`, can give them back in backward. Then the first two parts
are only differentiated: queries, keys and values are projected for that alone, and the kernel's forward is not run.

Dims: B batch, t this device's tokens, S all tokens, D model, N query heads and K KV heads of this tensor shard,
G = N / K, c KV heads of a bucket, H head, w this device's rows of a weight. With stationary weights: T tokens of all
folded ranks, n query heads and k KV heads of this device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tsp_jax.layout import Axes, AxisNames, check_attention_movement
from tsp_jax.ops.attention.all_heads import project_heads, stationary_project_heads
from tsp_jax.ops.attention.projections import project_out, vary_inputs_alike
from tsp_jax.ops.attention.sharded_heads import AttentionConfig, AttentionWeights, HeadBiases, HeadNorms, ShardedHeads
from tsp_jax.ops.attention.sinks import add_sinks, sinks_grad, sinks_of_rank, sinks_of_shard
from tsp_jax.ops.attention.stationary import (
    StationaryHeads,
    stationary_project_out,
    weights_of_own_heads,
)
from tsp_jax.ops.kernels import delta
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.pipeline import pipelined
from tsp_jax.ops.sequence import gather_sequence
from tsp_jax.ops.stationary import moves_tokens
from tsp_jax.ops.stream import Stream, custom_vjp, zeros

SAVED_NAMES = ("attention_out", "attention_lse")
"""checkpoint names of the arrays of `Attended`"""


class Attended(NamedTuple):
    """What the kernel computes. With stationary weights, of this device's heads and all folded ranks' tokens."""

    out_BtNH: Any
    """outputs before Wo, in the compute dtype"""
    lse_BNt: Any
    """log-sum-exps of the scores, float32; tokens last, for the TPU compiler keeps no other order on the host"""


def attended_specs(axes: Axes, batch: AxisNames, stream: Stream) -> Attended:
    """PartitionSpecs of `Attended` as global arrays; `batch`: axes that shard the batch."""
    if moves_tokens(axes.folded, stream):
        sequence, heads = axes.unfolded_sequence, axes.tensor + axes.folded
    else:
        sequence, heads = axes.sequence, axes.tensor
    return Attended(PartitionSpec(batch, sequence, heads, None), PartitionSpec(batch, heads, sequence))


def attention(
    x_BtD: jax.Array, weights: AttentionWeights, tokens_Bt: Tokens, norms: HeadNorms | None = None,
    sinks_N: jax.Array | None = None, known: Attended | None = None, biases: HeadBiases | None = None, *,
    config: AttentionConfig, axes: Axes = Axes(), stream: Stream = Stream(),
) -> tuple[jax.Array, Attended]:  # fmt: skip
    """Self-attention within segments.

    Forward: ``out_h = softmax(s_h) v_h``, ``y = concat_h(out_h) Wo``, with q, k, v of `project_heads` and scores
    ``s = mask(cap(scale q k^T))`` (`Scores`). dgrad, with P the softmax and delta = rowsum(dout * out):
    ``dS = scale P * (dout v^T - delta)`` (times the soft cap's derivative), ``dq = dS k``, ``dk = dS^T q``,
    ``dv = P^T dout``. wgrad: see `project_in` and `project_out`; sinks: see `sinks_grad`.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: this device's rows, any float dtype.
      tokens_Bt: positions and segments of this device's tokens; tokens may be in any order over the ranks.
      norms: scales of q/k RMSNorm (Qwen3, OLMo 2), or None.
      sinks_N: float32 [N], sinks of all query heads of the model (`tsp_jax.ops.attention.sinks`), or None.
      known: what an earlier call with the same arguments returned, or None. It is returned as the result, in place of
        running the kernel; gradients are those of the result.
      biases: of the projections to queries, keys and values (Qwen2), or None.
      config: static sizes.
      axes: over folded axes, weights or tokens are exchanged (see `stream`); over tensor axes, partial outputs are
        summed; over sequence axes, keys and values are gathered.
      stream: movement; its buckets are replaced by those of `config`.

    Returns:
      ([B, t, D] in x's dtype, `Attended`, which has no gradient of its own).

    Raises:
      ConfigError: the movement is activations and a folded axis shards the batch.

    Moves: the amounts below, each times (R - 1) / R for R ranks.
      Streamed weights: forward all-gathers of (2 N + 2 K) H D elements of weights and 2 B S K H of keys and values;
      backward the same again (plus what remat repeats of forward), and reduce-scatters of as many gradients.
      Stationary weights: forward 2 B S D elements (all-gather of x, reduce-scatter of y), backward 3 B S D (x, dy, dx);
      keys and values only over sequence axes that are not folded; weights only as `weights_of_own_heads` says.
      With a window and a known order of tokens, keys and values (and their gradients) move as permutes of at most a
      window before each of a rank's chunks, instead of all-gathers: see `Exchange`.
      Both: all-gathers of 8 B S bytes of positions and segments; over tensor axes, an all-reduce of [B, t, D] forward
      and one backward.
    Keeps: its inputs; queries, keys, values and outputs of this device's tokens; log-sum-exps of the outputs.
    Source: arXiv 2604.26294, section on attention; separating projections from the exchange is ours.
    """
    with jax.named_scope("tsp/attention"):
        check_attention_movement(axes, stream.movement)
        inputs = tokens_Bt, sinks_N, biases
        x_BtD, weights, norms, (tokens_Bt, sinks_N, biases) = vary_inputs_alike(x_BtD, weights, norms, inputs)
        run = _stationary if moves_tokens(axes.folded, stream) else _streamed
        y_BtD, attended = run(x_BtD, weights, norms, tokens_Bt, sinks_N, known, biases, config, axes, stream)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD, lax.stop_gradient(attended)


def _streamed(
    x_BtD, weights, norms: HeadNorms, tokens_Bt: Tokens, sinks_N, known: Attended | None,
    biases: HeadBiases | None, config, axes: Axes, stream: Stream,
) -> tuple[jax.Array, Attended]:  # fmt: skip
    heads = ShardedHeads.of(config, axes, stream)
    q_BtNH, k_BtKH, v_BtKH = project_heads(x_BtD, weights[:3], norms, biases, tokens_Bt.positions, heads)
    attended = _attend(q_BtNH, k_BtKH, v_BtKH, sinks_of_shard(sinks_N, heads), tokens_Bt, known, heads)
    return project_out(attended.out_BtNH, weights.o_wD, heads), attended


def _stationary(
    x_BtD, weights, norms: HeadNorms, tokens_Bt: Tokens, sinks_N, known: Attended | None,
    biases: HeadBiases | None, config, axes: Axes, stream: Stream,
) -> tuple[jax.Array, Attended]:  # fmt: skip
    """Each rank attends with its own heads for all folded ranks' tokens; outputs are reduce-scattered."""
    tokens_BT = Tokens(*gather_sequence(*tokens_Bt, axes=axes.folded))
    roles, sharded = Axes(sequence=axes.unfolded_sequence), ShardedHeads.of(config, axes, stream)
    weights = weights_of_own_heads(weights, sharded)
    sinks_kg = sinks_of_rank(sinks_of_shard(sinks_N, sharded), sharded)
    kernel = config.kernel.within(x_BtD.shape[1])
    config = config._replace(heads=sharded.sharding.own, kernel=kernel, token_order="any")  # T tokens are many chunks
    if not roles.sequence:  # nothing to exchange: all heads at once
        config = config._replace(exchange_buckets=1)
    heads = ShardedHeads.of(config, roles, stream)
    stationary = StationaryHeads(config, axes.folded, stream)
    q_BTnH, k_BTkH, v_BTkH = stationary_project_heads(
        x_BtD, weights[:3], norms, biases, tokens_BT.positions, stationary, sharded
    )
    attended = _attend(q_BTnH, k_BTkH, v_BTkH, sinks_kg, tokens_BT, known, heads)
    return stationary_project_out(attended.out_BtNH, weights.o_wD, stationary), attended


# ------------------------------------------------------------------------------------------------ over the sequence


def _attend(
    q_BtNH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt: Tokens, known: Attended | None, heads: ShardedHeads
) -> Attended:  # fmt: skip
    """Attention within segments to the tokens of all sequence axes."""
    tokens_BS = Tokens(*gather_sequence(*tokens_Bt, axes=heads.axes.sequence))
    q_BtKGH = q_BtNH.reshape(*k_BtKH.shape[:3], -1, q_BtNH.shape[-1])
    exchange = heads.exchange(q_BtNH.shape[1])
    if exchange.halo:
        scores = heads.config.scores._replace(total=tokens_BS.positions.shape[1])
        heads = heads._replace(config=heads.config._replace(scores=scores))
    arrays = q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, exchange.keys(tokens_BS)
    if known is not None:
        out, lse = known.out_BtNH.reshape(q_BtKGH.shape), known.lse_BNt.swapaxes(1, 2).reshape(q_BtKGH.shape[:-1])
        return known._replace(out_BtNH=_as_attended(*arrays, out, lse, heads).reshape(q_BtNH.shape))
    out, lse = _attend_over_sequence(*arrays, heads)
    if exchange.halo:  # NaN instead of a wrong result
        out = jnp.where(exchange.fits(tokens_BS)[:, None, None, None, None], out, jnp.nan)
    return Attended(out.reshape(q_BtNH.shape), lse.reshape(q_BtNH.shape[:-1]).swapaxes(1, 2))


class _KVBucket(NamedTuple):
    """A bucket of KV heads: c (`size`) of the K heads in arrays [B, t, K, ...]."""

    index: Any
    size: int

    def take(self, array_BtK: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array_BtK, self.index * self.size, self.size, axis=2)

    def take_sinks(self, sinks_KG: jax.Array | None) -> jax.Array | None:
        return None if sinks_KG is None else self.take(sinks_KG[None, None])[0, 0]

    def put(self, array_BtK: jax.Array, new_Btc: jax.Array) -> jax.Array:
        new_Btc = new_Btc.astype(array_BtK.dtype)
        return lax.dynamic_update_slice_in_dim(array_BtK, new_Btc, self.index * self.size, axis=2)


@custom_vjp(6)
def _attend_over_sequence(q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, heads: ShardedHeads):
    """(outputs [B, t, K, G, H], log-sum-exps [B, t, K, G]); gradients of the log-sum-exps are ignored."""
    return _forward(q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, heads)[0]


def _forward(q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, heads: ShardedHeads):
    buckets, scores, exchange = heads.exchange_buckets, heads.config.scores, heads.exchange(q_BtKGH.shape[1])
    kernel = heads.config.kernel.within(q_BtKGH.shape[1])

    def fetch(_, index):
        bucket = _KVBucket(index, heads.num_kv_heads // buckets)
        return exchange.gather(bucket.take(k_BtKH), bucket.take(v_BtKH))

    def attend_bucket(carry, keys_values, index):
        bucket = _KVBucket(index, heads.num_kv_heads // buckets)
        k_BScH, v_BScH = keys_values
        new = kernel.attend(bucket.take(q_BtKGH), k_BScH, v_BScH, tokens_Bt, tokens_Bs, scores)
        new = add_sinks(*new, bucket.take_sinks(sinks_KG))
        return tuple(bucket.put(array, part) for array, part in zip(carry, new, strict=True)), (), ()

    out = zeros(q_BtKGH.shape, q_BtKGH.dtype, like=q_BtKGH)
    lse = zeros(q_BtKGH.shape[:-1], jnp.float32, like=q_BtKGH)
    (out, lse), *_ = pipelined(attend_bucket, fetch, None, (out, lse), buckets, remote=bool(exchange.axes))
    out, lse = (checkpoint_name(array, name) for array, name in zip((out, lse), SAVED_NAMES, strict=True))
    return (out, lse), (q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, out, lse)


def _backward(heads: ShardedHeads, residuals, cotangents):
    dout_BtKGH, _ = cotangents
    q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, out_BtKGH, lse_BtKG = residuals
    buckets, scores, exchange = heads.exchange_buckets, heads.config.scores, heads.exchange(q_BtKGH.shape[1])
    kernel = heads.config.kernel.within(q_BtKGH.shape[1])

    def fetch(carry, index):
        bucket = _KVBucket(index, heads.num_kv_heads // buckets)
        return exchange.gather(bucket.take(carry[1]), bucket.take(carry[2]))

    def attend_bucket_vjp(carry, keys_values, index):
        bucket = _KVBucket(index, heads.num_kv_heads // buckets)
        delta_BtcG, lse_BtcG, dout_BtcGH = (bucket.take(array) for array in (delta_BtKG, lse_BtKG, dout_BtKGH))
        q_BtcGH, (k_BScH, v_BScH) = bucket.take(carry[0]), keys_values
        inputs = q_BtcGH, k_BScH, v_BScH, tokens_Bt, tokens_Bs, delta_BtcG, lse_BtcG, dout_BtcGH
        grads = kernel.attend_backward(*inputs, scores)
        grads = (grads[0], *exchange.scatter(*grads[1:]))
        return tuple(bucket.put(array, grad) for array, grad in zip(carry, grads, strict=True)), (), ()

    delta_BtKG = delta(out_BtKGH, dout_BtKGH)
    # Gradients overwrite queries, keys and values that have been used.
    carry = q_BtKGH, k_BtKH, v_BtKH
    grads, *_ = pipelined(attend_bucket_vjp, fetch, None, carry, buckets, remote=bool(exchange.axes))
    return *grads, sinks_grad(delta_BtKG, lse_BtKG, sinks_KG), None, None


_attend_over_sequence.defvjp(_forward, _backward)


@custom_vjp(8)
def _as_attended(q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, out_BtKGH, lse_BtKG, heads: ShardedHeads):
    """Returns `out`, as the outputs that `_attend_over_sequence` has computed from the same arrays."""
    return out_BtKGH


def _as_attended_forward(
    q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, out_BtKGH, lse_BtKG, heads: ShardedHeads
):
    return out_BtKGH, (q_BtKGH, k_BtKH, v_BtKH, sinks_KG, tokens_Bt, tokens_Bs, out_BtKGH, lse_BtKG)


def _as_attended_backward(heads: ShardedHeads, residuals, dout_BtKGH):
    return *_backward(heads, residuals, (dout_BtKGH, None)), None, None


_as_attended.defvjp(_as_attended_forward, _as_attended_backward)
