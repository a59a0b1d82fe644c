"""Causal self-attention on streamed weights, over a sequence that is spread over ranks.

Three parts with a VJP each. `project_in` streams [Wk Wv] and Wq past this device's tokens. `_over_sequence` takes some
KV heads at a time: their keys and values are gathered over the sequence while the heads before them attend, and in
backward their gradients are scattered while the queries' are computed. `project_out` streams Wo. What stands between
the last two, the heads' outputs and their log-sum-exps, is what the remat policy `save_attention` keeps.

Dims: B batch, t this device's tokens, S all tokens, D model, N query heads and K KV heads of this tensor shard,
G = N / K, c KV heads attended to at a time, H head; nH and kH: this device's rows of Wq and Wk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tsp_jax.layout import Axes, largest_divisor
from tsp_jax.ops.attention.projections import (
    AttentionConfig,
    AttentionWeights,
    HeadNorms,
    Projections,
    project_in,
    project_out,
)
from tsp_jax.ops.attention.stationary import Moved, moved_in, moved_out
from tsp_jax.ops.kernels import delta
from tsp_jax.ops.kernels.mask import Tokens
from tsp_jax.ops.pipeline import pipelined
from tsp_jax.ops.sequence import gather_sequence, scatter_sequence
from tsp_jax.ops.stationary import moves_tokens
from tsp_jax.ops.stream import Stream, custom_vjp, vary_alike, zeros

SAVED_NAMES = ("attention_out", "attention_lse")
"""checkpoint names of what `save_attention` keeps"""

__all__ = ["SAVED_NAMES", "AttentionConfig", "AttentionWeights", "HeadNorms", "attention"]


def attention(
    x_BtD: jax.Array,
    weights: AttentionWeights,
    tokens_Bt: Tokens,
    norms: HeadNorms | None = None,
    *,
    config: AttentionConfig,
    axes: Axes = Axes(),
    stream: Stream = Stream(),
) -> jax.Array:
    """Causal self-attention within segments: ``concat_h(softmax(q_h k_h^T / sqrt(H)) v_h) Wo``.

    Args:
      x_BtD: this device's tokens, in the compute dtype.
      weights: this device's rows, any float dtype.
      tokens_Bt: positions and segments of this device's tokens; any order of tokens over ranks is legal.
      norms: scales of q/k RMSNorm (Qwen3), or None.
      config: static sizes.
      axes: folded axes: weights move past tokens, or tokens past weights; tensor axes: partial outputs are summed;
        sequence axes: keys and values are gathered.
      stream: movement; its buckets are replaced by `config.buckets`.

    Returns:
      [B, t, D] in x's dtype.

    Moves: forward (2 N + 2 K) H D (R - 1) / R weights and 2 B S K H (R - 1) / R keys and values (R of the sequence
      axes), and 8 B S (R - 1) / R bytes of positions and segments; backward the weights and the keys and values again,
      beside what a remat policy repeats of forward, as many weight gradients, and gradients of keys and values. Or
      activations: forward 2 B S D (R - 1) / R (x here, y home), backward 3 B S D (R - 1) / R (x, dy, dx); keys and
      values then move over sequence axes that are not folded alone. Over tensor axes one all-reduce of [B, t, D]
      forward, one backward.
    Keeps: its inputs, queries, keys, values and outputs of this device's tokens, and the outputs' lse.
    Source: arXiv 2604.26294, section on attention; projections apart from the exchange are ours.
    """
    with jax.named_scope("tsp/attention"):
        scales = jax.tree.leaves(norms)
        arrays = vary_alike(x_BtD, *weights, *tokens_Bt, *scales)
        x_BtD, weights, tokens_Bt = arrays[0], AttentionWeights(*arrays[1:5]), Tokens(*arrays[5:7])
        norms = HeadNorms(*arrays[7:])
        run = _moved if moves_tokens(axes.folded, stream) else _streamed
        y_BtD = run(x_BtD, weights, tokens_Bt, norms, config, axes, stream)
        return lax.psum(y_BtD, axes.tensor) if axes.tensor else y_BtD


def _streamed(x_BtD, weights, tokens_Bt: Tokens, norms: HeadNorms, config, axes: Axes, stream: Stream) -> jax.Array:
    static = Projections.of(config, axes, stream, weights)
    q_BtNH, k_BtKH, v_BtKH = project_in(x_BtD, weights[:3], norms, tokens_Bt.positions, static)
    out_BtNH = _attend(q_BtNH, k_BtKH, v_BtKH, tokens_Bt, static)
    return project_out(out_BtNH, weights.o_nHD, static)


def _moved(x_BtD, weights, tokens_Bt: Tokens, norms: HeadNorms, config, axes: Axes, stream: Stream) -> jax.Array:
    """Folded axes act as tensor axes for an op that sees all their tokens, but for the sum of what it makes."""
    tokens_BT = Tokens(*gather_sequence(*tokens_Bt, axes=axes.folded))
    roles = Axes(tensor=axes.tensor + axes.folded, sequence=tuple(a for a in axes.sequence if a not in axes.folded))
    groups = config.exchange_buckets if roles.sequence else 1  # nothing to exchange: all of this rank's heads at once
    whole = config._replace(
        query_buckets=1, kv_buckets=1, exchange_buckets=groups, kernel=config.kernel.within(x_BtD.shape[1])
    )
    static = Projections.of(whole, roles, stream, weights)
    how = Moved(static, axes.folded, stream)
    q_BTnH, k_BTkH, v_BTkH = moved_in(x_BtD, weights[:3], norms, tokens_BT.positions, how)
    return moved_out(_attend(q_BTnH, k_BTkH, v_BTkH, tokens_BT, static), weights.o_nHD, how)


# ------------------------------------------------------------------------------------------------ over the sequence


def _attend(q_BtNH, k_BtKH, v_BtKH, tokens_Bt: Tokens, static: Projections) -> jax.Array:
    """[B, t, N, H]: causal attention within segments to the tokens of all sequence axes."""
    keys_BS = Tokens(*gather_sequence(*tokens_Bt, axes=static.axes.sequence))
    q_BtKGH = q_BtNH.reshape(*k_BtKH.shape[:3], -1, q_BtNH.shape[-1])
    return _over_sequence(q_BtKGH, k_BtKH, v_BtKH, tokens_Bt, keys_BS, static).reshape(q_BtNH.shape)


class _Group(NamedTuple):
    """c of the KV heads, and what belongs to them in arrays [B, ., K, ...]."""

    number: Any
    size: int
    """c"""

    def take(self, array_BtK: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array_BtK, self.number * self.size, self.size, axis=2)

    def put(self, array_BtK: jax.Array, mine_Btc: jax.Array) -> jax.Array:
        mine = mine_Btc.astype(array_BtK.dtype)
        return lax.dynamic_update_slice_in_dim(array_BtK, mine, self.number * self.size, axis=2)


def _groups(kv_heads: int, static: Projections) -> tuple[int, int]:
    """(how many groups, KV heads of each)."""
    count = largest_divisor(kv_heads, static.config.exchange_buckets)
    return count, kv_heads // count


@custom_vjp(5)
def _over_sequence(q_BtKGH, k_BtKH, v_BtKH, tokens_Bt, keys_BS, static: Projections):
    return _sequence_forward(q_BtKGH, k_BtKH, v_BtKH, tokens_Bt, keys_BS, static)[0]


def _sequence_forward(q_BtKGH, k_BtKH, v_BtKH, tokens_Bt, keys_BS, static: Projections):
    config, axes = static.config, static.axes.sequence
    count, size = _groups(k_BtKH.shape[2], static)
    kernel = config.kernel.within(q_BtKGH.shape[1])

    def fetch(_, index):
        group = _Group(index, size)
        return gather_sequence(group.take(k_BtKH), group.take(v_BtKH), axes=axes)

    def turn(carry, keys_values, index):
        group = _Group(index, size)
        k_BScH, v_BScH = keys_values
        mine = kernel.attend(group.take(q_BtKGH), k_BScH, v_BScH, tokens_Bt, keys_BS)
        return tuple(group.put(array, part) for array, part in zip(carry, mine, strict=True)), (), ()

    out = zeros(q_BtKGH.shape, q_BtKGH.dtype, like=q_BtKGH)
    lse = zeros(q_BtKGH.shape[:-1], jnp.float32, like=q_BtKGH)
    (out, lse), *_ = pipelined(turn, fetch, None, (out, lse), count, remote=bool(axes))
    out, lse = (checkpoint_name(array, name) for array, name in zip((out, lse), SAVED_NAMES, strict=True))
    return out, (q_BtKGH, k_BtKH, v_BtKH, tokens_Bt, keys_BS, out, lse)


def _sequence_backward(static: Projections, residuals, dout_BtKGH):
    q_BtKGH, k_BtKH, v_BtKH, tokens_Bt, keys_BS, out_BtKGH, lse_BtKG = residuals
    config, axes = static.config, static.axes.sequence
    count, size = _groups(k_BtKH.shape[2], static)
    kernel = config.kernel.within(q_BtKGH.shape[1])

    def fetch(carry, index):
        group = _Group(index, size)
        return gather_sequence(group.take(carry[1]), group.take(carry[2]), axes=axes)

    def turn(carry, keys_values, index):
        group = _Group(index, size)
        delta_BtcG, lse_BtcG, dout_BtcGH = (group.take(array) for array in (delta_BtKG, lse_BtKG, dout_BtKGH))
        q_BtcGH, (k_BScH, v_BScH) = group.take(carry[0]), keys_values
        grads = kernel.attend_backward(q_BtcGH, k_BScH, v_BScH, tokens_Bt, keys_BS, delta_BtcG, lse_BtcG, dout_BtcGH)
        grads = (grads[0], *scatter_sequence(*grads[1:], axes=axes))
        return tuple(group.put(array, grad) for array, grad in zip(carry, grads, strict=True)), (), ()

    delta_BtKG = delta(out_BtKGH, dout_BtKGH)
    # Gradients take the places of queries, keys and values as these have been used.
    carry = q_BtKGH, k_BtKH, v_BtKH
    grads, *_ = pipelined(turn, fetch, None, carry, count, remote=bool(axes))
    return *grads, None, None


_over_sequence.defvjp(_sequence_forward, _sequence_backward)
