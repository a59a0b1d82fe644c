"""Bytes that a device receives in each op, from shapes alone; and the movements and numbers of buckets that follow.

In an all-gather, reduce-scatter or all-to-all of n bytes over r ranks, a device receives n (r - 1) / r bytes; in an
all-reduce, twice as many. On folded axes either weights move past tokens, or tokens move past weights. Source of the
terms: arXiv 2604.26294, section III, extended to every layout and to both movements. Sizes are those of stored arrays,
padding included.

Dims: B sequences on this device, S tokens per sequence, t of these tokens on this device, D model, F ffn,
V vocabulary, H head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsp_jax.config import Remat, TokenOrder
from tsp_jax.heads import HeadRows, HeadSharding
from tsp_jax.layout import Axes, Layout, num_ranks

INT32 = FLOAT32 = 4
"""bytes of an element"""
FEWEST_BUCKETS = 4
"""on folded axes, an op's weights or tokens are split into at least about this many buckets: with only two, XLA for
ROCm makes a padded copy of each (benchmarks/step_128k.md)"""
WINDOW_MULTIPLE = 128
"""keys and values within a window are exchanged in multiples of this many tokens"""
Traffic = dict[str, float]
"""Kind of traffic -> bytes. Over folded axes: `weights` and `weight_grads`, or `activations` in their place. Over
sequence axes: `keys_values` and `key_value_grads`. Over tensor axes: `tensor_sums` of partial outputs. Over axes that
replicate a weight: `replica_sums` of its gradients. Left out, because they are small: positions and segments of tokens,
gradients of norms and biases, scalars, and the two numbers a token that a norm over all heads sums over ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSharding:
    """How one op's weights and tokens are sharded, and the bytes of an element."""

    folded: int
    """number of ranks on folded axes; likewise `tensor` and `sequence`"""
    tensor: int
    sequence: int
    replicas: int
    """number of ranks that hold the same shard of a weight"""
    batch: int
    """sequences on this device"""
    seq_len: int
    """S, tokens per sequence"""
    itemsize: int
    """bytes of an element in the compute dtype"""
    grad_itemsize: int
    """bytes of an element in the dtype in which weight gradients are sent"""

    @classmethod
    def of(
        cls, layout: Layout, sizes: Mapping[str, int], dim: str, *, batch: int, seq_len: int, itemsize: int,
        grad_itemsize: int,
    ) -> "OpSharding":  # fmt: skip
        """The sharding of an op whose weights are sharded along `dim` (heads, mlp or vocab).

        `sizes`: number of ranks of each mesh axis; `batch`: number of sequences on all devices together.
        """
        folded, tensor, sequence = (num_ranks(names, sizes) for names in layout.axes(dim))
        copies = tuple(name for name in layout.tokens if name not in getattr(layout, dim))
        return cls(
            folded=folded, tensor=tensor, sequence=sequence, replicas=num_ranks(copies, sizes), seq_len=seq_len,
            batch=batch // num_ranks(layout.batch, sizes), itemsize=itemsize, grad_itemsize=grad_itemsize,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens on this device, B t."""
        return self.batch * self.seq_len // self.sequence

    def weights_received(self, elements: float) -> float:
        """Elements received while the weights of all ranks, `elements` in total, pass this device's tokens once."""
        return elements / self.tensor * _others(self.folded)

    def tokens_received(self, per_token: float) -> float:
        """Elements received in one all-gather of all folded ranks' tokens, or in one reduce-scatter of their outputs.

        `per_token`: elements of one token.
        """
        return self.tokens * per_token * (self.folded - 1)

    def tensor_sum_bytes(self, elements: float, itemsize: int) -> float:
        """Bytes received in an all-reduce of partial outputs over the tensor axes."""
        return 2 * elements * itemsize * _others(self.tensor)

    def replica_sum_bytes(self, elements: float) -> float:
        """Bytes received in the all-reduce of a weight's float32 gradient over the ranks that replicate its shard."""
        return 2 * elements / (self.folded * self.tensor) * FLOAT32 * _others(self.replicas)

    def weight_buckets(self, rows: int, elements: float, bucket_bytes: float) -> int:
        """Number of buckets of an op's weights.

        `elements`: elements on all ranks together; `rows`: rows on each device, which the buckets split.
        """
        return self._folded_buckets(rows, elements / self.tensor * self.itemsize, bucket_bytes)

    def head_buckets(self, heads: HeadSharding, d_model: int, bucket_bytes: float) -> tuple[int, int]:
        """(number of buckets of Wq, number of buckets of Wk and Wv together). Buckets hold whole heads.

        Wo has as many buckets as Wq.
        """

        def count(rows: HeadRows, weights: int) -> int:
            return self.weight_buckets(rows.parts, weights * self.tensor * rows.stored * d_model, bucket_bytes)

        return count(heads.queries, 1), 1 if heads.kv_head_spans_shards else count(heads.keys_values, 2)

    def token_buckets(self, d_model: int, bucket_bytes: float) -> int:
        """Number of buckets of the tokens [B, t, D] of all folded ranks."""
        nbytes = self.folded * self.tokens * d_model * self.itemsize
        return self._folded_buckets(self.seq_len // self.sequence, nbytes, bucket_bytes)

    def _folded_buckets(self, rows: int, nbytes: float, bucket_bytes: float) -> int:
        """Number of buckets into which `rows` rows of each device are split.

        `nbytes`: bytes of these rows on all ranks together. On folded axes a bucket has at most about a quarter of
        these bytes, so that no device holds a full weight or all tokens.
        """
        if self.folded > 1:
            bucket_bytes = min(bucket_bytes, max(1.0, nbytes / FEWEST_BUCKETS))
        return num_buckets(rows, nbytes, bucket_bytes)

    def exchanged_tokens(self, movement: str, window: int | None = None, token_order: TokenOrder = "any") -> int:
        """Tokens per sequence whose keys and values this device receives from others over the sequence axes.

        Those of all other ranks; or, if the order of the tokens is known, at most a window before each of this rank's
        chunks, rounded up to a multiple of 128 tokens if chunks are such multiples.
        """
        moves_tokens = movement == "activations"
        ranks = self.sequence // self.folded if moves_tokens else self.sequence
        others = self.seq_len // ranks * (ranks - 1)
        if window is None or token_order == "any" or moves_tokens:
            return others
        chunks = 2 if token_order == "zigzag" and ranks > 1 else 1
        multiple = WINDOW_MULTIPLE if self.seq_len // (ranks * chunks) % WINDOW_MULTIPLE == 0 else 1
        halo = multiple * -(-(window - 1) // multiple)
        messages = 1 if ranks == 2 else chunks  # of two ranks, one needs nothing before its first chunk
        return messages * halo if 0 < chunks * halo < others else others

    def exchange_buckets(self, heads: HeadSharding, movement: str, bucket_bytes: float, exchanged: int) -> int:
        """Number of buckets of KV heads in which keys and values are exchanged, with those of `exchanged_tokens`."""
        kv_heads = (heads.own if movement == "activations" else heads.shard).kv
        ranks = self.sequence // self.folded if movement == "activations" else self.sequence
        nbytes = 2 * self.batch * (exchanged + self.seq_len // ranks) * kv_heads * heads.heads.dim * self.itemsize
        return num_buckets(kv_heads, nbytes, bucket_bytes)


def exchanged_heads(heads: HeadSharding, d_model: int) -> tuple[float, float]:
    """(elements of Wq, elements of Wk and Wv together) that a rank receives to have all rows of its own heads."""

    def received(rows: HeadRows, head_numbers: list[list[int]]) -> float:
        units = len(rows.units_of(head_numbers)[0])
        return 0 if rows.whole else units * rows.rows_of_unit * (rows.ranks - 1) * d_model

    query_heads, kv_heads = heads.own_heads()
    return received(heads.queries, query_heads), 2 * received(heads.keys_values, kv_heads)


def _others(ranks: int) -> float:
    """The share of an array that other ranks hold."""
    return (ranks - 1) / ranks


def choose_movement(movement: str, traffic: Callable[[str], Traffic], tokens_may_move: bool = True) -> str:
    """Returns the movement, with `auto` resolved to gather or activations, whichever receives fewer bytes.

    `traffic` gives the traffic of a movement. Unless `tokens_may_move`, `auto` is always gather; see
    `attention_may_move_tokens`.
    """
    if movement != "auto":
        return movement
    if not tokens_may_move:
        return "gather"
    return min(("gather", "activations"), key=lambda candidate: sum(traffic(candidate).values()))


def attention_may_move_tokens(axes: Axes, heads: HeadSharding) -> bool:
    """Whether `auto` may move attention's tokens to stationary weights.

    It may not if a folded axis shards the batch: a rank would treat the tokens of several sequences as one sequence.
    Nor if the ranks do not share the heads evenly: they would have to compute with padded heads.
    """
    return not axes.folded_batch and heads.even


def num_buckets(rows: int, nbytes: float, bucket_bytes: float) -> int:
    """Number of buckets: the divisor of `rows` whose buckets have the size nearest to `bucket_bytes`, by ratio.

    `rows`: rows per device; `nbytes`: size of all ranks' rows together. A bucket takes equally many rows of every rank.
    """
    wanted = max(1.0, nbytes / bucket_bytes)
    return min(_divisors(rows), key=lambda n: max(n / wanted, wanted / n))


@functools.cache
def _divisors(value: int) -> tuple[int, ...]:
    """All divisors, the largest first."""
    small = [n for n in range(1, math.isqrt(value) + 1) if value % n == 0]
    return tuple(sorted({*small, *(value // n for n in small)}, reverse=True))


# ------------------------------------------------------------------------------------------------ ops


def repeats_attention(remat: Remat) -> bool:
    """Whether backward computes attention's outputs again; then it projects queries, keys and values twice."""
    return remat in ("full", "offload")


def repeats_mlp(norm_follows: bool, remat: Remat) -> bool:
    """Whether backward computes the MLP's output again: a norm of it needs it, and forward has not kept it."""
    return norm_follows and remat != "none"


def attention_traffic(
    sharding: OpSharding, movement: str, *, heads: HeadSharding, d_model: int, remat: Remat, forward: bool = False,
    window: int | None = None, token_order: TokenOrder = "any",
) -> Traffic:  # fmt: skip
    """Traffic of one layer's attention in forward and backward, or in `forward` alone.

    `remat` says what backward recomputes; `window` and `token_order` are those of `tsp_jax.nn.Attention`. Here and in
    the ops below, movement `activations` moves tokens; every other movement moves weights.
    """
    moves_tokens, dim = movement == "activations", heads.heads.dim
    query, kv = (rows * d_model for rows in heads.stored)
    if moves_tokens:
        query_weights, kv_weights = exchanged_heads(heads, d_model)
    else:
        query_weights = sharding.weights_received(query)
        spans = heads.kv_head_spans_shards  # each tensor shard gathers all KV heads
        kv_weights = 2 * kv * _others(heads.keys_values.ranks) if spans else sharding.weights_received(2 * kv)
    into, out = kv_weights + query_weights, query_weights
    used_heads = (heads.own if moves_tokens else heads.shard).kv
    exchanged = sharding.exchanged_tokens(movement, window, token_order)
    keys_values = 2 * sharding.batch * exchanged * used_heads * dim * sharding.itemsize
    again = 0 if remat == "none" else 1
    twice = int(repeats_attention(remat))
    if moves_tokens:  # backward keeps the heads that forward has exchanged; whatever repeats forward exchanges all
        into_passes, out_passes = (1, 1) if forward else (1 + again + twice, 1 + 2 * again)
    else:
        into_passes, out_passes = (1, 1) if forward else (2 + again + twice, 2 + again)
    # Forward gathers x and scatters y; backward gathers x and dy and scatters dx, and repeats forward's.
    activations = 2 if forward else 5 + 2 * again + twice
    received = sharding.tokens_received(d_model) * sharding.itemsize if moves_tokens else 0
    outputs = sharding.tensor_sum_bytes(sharding.tokens * d_model, sharding.itemsize)
    return {
        "weights": (into_passes * into + out_passes * out) * (FLOAT32 if moves_tokens else sharding.itemsize),
        "weight_grads": 0 if forward else (into + out) * (FLOAT32 if moves_tokens else sharding.grad_itemsize),
        "keys_values": keys_values if forward else (2 + twice) * keys_values,
        "key_value_grads": 0 if forward else keys_values,
        "activations": activations * received,
        "tensor_sums": (1 if forward else 2 + again) * outputs,  # forward, its repetition, and dx
        "replica_sums": 0 if forward else sharding.replica_sum_bytes(2 * query + 2 * kv),
    }


def layers_attention_traffic(
    sharding: OpSharding, movement: str, *, windows: Sequence[tuple[int | None, int]], **settings: Any
) -> Traffic:
    """`attention_traffic` of several layers together; `windows` are pairs of a window and its number of layers."""
    total: Traffic = {}
    for window, layers in windows:
        for kind, nbytes in attention_traffic(sharding, movement, window=window, **settings).items():
            total[kind] = total.get(kind, 0) + layers * nbytes
    return total


def mlp_traffic(
    sharding: OpSharding, movement: str, *, d_model: int, d_ff: int, repeated: bool = False, forward: bool = False
) -> Traffic:
    """Traffic of one layer's MLP. `repeated`: backward computes the output again, which only a norm of it needs."""
    sizes = {"d_model": d_model, "stored_rows": 3 * d_ff, "repeated": repeated, "forward": forward}
    return _gated_traffic(sharding, movement, **sizes)


def _gated_traffic(
    sharding: OpSharding, movement: str, *, d_model: int, stored_rows: int, repeated: bool, forward: bool
) -> Traffic:
    """Traffic of gated MLPs; `stored_rows`: rows of all their weights, and of biases stored with them."""
    more = 0 if forward else int(repeated)
    # Forward gathers x and scatters y; backward gathers x and dy and scatters dx.
    activations = (2 if forward else 5) + 2 * more
    received = activations * sharding.tokens_received(d_model) * sharding.itemsize
    sums = ((1 if forward else 2) + more) * sharding.tensor_sum_bytes(sharding.tokens * d_model, sharding.itemsize)
    return _row_traffic(sharding, movement, stored_rows * d_model, received, sums, forward, again=1 + more)


def experts_traffic(
    sharding: OpSharding, movement: str, *, d_model: int, stored_rows: int, per_token: int, repeated: bool = False,
    forward: bool = False,
) -> Traffic:  # fmt: skip
    """Traffic of one layer's experts, without shared ones.

    `stored_rows` are those of all experts' three weights, and of the biases of gate and up that move with them. If
    tokens move, the numbers and weights of the k chosen experts of each move too, and backward sums the gradients of
    the weights. Left out, because they are small: the router's own sums, and the gradients of the biases of down, which
    every device holds.
    """
    sizes = {"d_model": d_model, "stored_rows": stored_rows, "repeated": repeated, "forward": forward}
    total = _gated_traffic(sharding, movement, **sizes)
    more = 0 if forward else int(repeated)
    if movement == "activations":
        passes = 2 if forward else 5 + 2 * more
        total["activations"] += passes * FLOAT32 * sharding.tokens_received(per_token)
    if not forward:
        total["tensor_sums"] += sharding.tensor_sum_bytes(sharding.tokens * per_token, FLOAT32)
    return total


def embed_traffic(
    sharding: OpSharding, movement: str, *, d_model: int, vocab_size: int, forward: bool = False
) -> Traffic:
    """Traffic of the embedding."""
    # Forward gathers ids and scatters x; backward gathers ids and dx.
    received = sharding.tokens_received((1 if forward else 2) * (d_model * sharding.itemsize + INT32))
    sums = sharding.tensor_sum_bytes(sharding.tokens * d_model, sharding.itemsize)
    return _row_traffic(sharding, movement, vocab_size * d_model, received, sums, forward, again=0)


def loss_traffic(
    sharding: OpSharding, movement: str, *, d_model: int, vocab_size: int, forward: bool = False
) -> Traffic:
    """Traffic of the output head and the cross-entropy."""
    # Forward gathers x and labels and exchanges two sums; backward gathers x, labels, lse and two cotangents and
    # scatters dx.
    per_token = d_model * sharding.itemsize + INT32 + 2 * FLOAT32
    if not forward:
        per_token += 2 * d_model * sharding.itemsize + INT32 + 3 * FLOAT32
    # Per token a label's logit, a maximum and a sum, whether there is a label, and dx.
    sums = 3 * sharding.tensor_sum_bytes(sharding.tokens, FLOAT32) + sharding.tensor_sum_bytes(sharding.tokens, INT32)
    if not forward:
        sums += sharding.tensor_sum_bytes(sharding.tokens * d_model, sharding.itemsize)
    received = sharding.tokens_received(per_token)
    return _row_traffic(sharding, movement, vocab_size * d_model, received, sums, forward)


def _row_traffic(
    sharding: OpSharding, movement: str, weights: float, activations: float, sums: float, forward: bool,
    again: int = 1,
) -> Traffic:  # fmt: skip
    """Traffic of an op whose `weights` elements move once in forward and `again` times in backward."""
    moves_tokens = movement == "activations"
    passes = 1 if forward else 1 + again
    received = 0 if moves_tokens else sharding.weights_received(weights)
    return {
        "weights": passes * received * sharding.itemsize,
        "weight_grads": 0 if forward else received * sharding.grad_itemsize,
        "activations": activations if moves_tokens else 0,
        "tensor_sums": sums,
        "replica_sums": 0 if forward else sharding.replica_sum_bytes(weights),
    }
