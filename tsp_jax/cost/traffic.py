"""Bytes that each op receives on a device, from shapes alone, and the movement that takes fewer.

With r ranks a gather, a scatter or an exchange of n bytes receives n (r - 1) / r, a sum twice that. On folded axes
either weights move past tokens, or tokens past weights. Source of the terms: arXiv 2604.26294, section III, extended to
every row of the layout table and to both movements.

Dims: B batch, S all tokens, t this device's tokens, D model, F ffn, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from tsp_jax.config import Remat
from tsp_jax.heads import Heads
from tsp_jax.layout import Layout

INT32 = FLOAT32 = 4
Traffic = dict[str, float]
"""Kind -> bytes. `weights` and their `weight_grads` over folded axes, or `activations` in their place; `keys_values`
and `key_value_grads` over sequence axes; `tensor_sums` over tensor axes; `replica_sums` of gradients over the rest.
Positions and segments of tokens, gradients of norms, and scalars are left out: kilobytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How an op's weights and tokens are cut over ranks, and bytes of an element."""

    folded: int
    """ranks by role"""
    tensor: int
    sequence: int
    replicas: int
    """ranks that hold the same weights"""
    batch: int
    """sequences of this device"""
    seq_len: int
    """S"""
    item: int
    """of the compute dtype"""
    grad_item: int
    """of the dtype in which weight gradients travel"""

    @classmethod
    def of(
        cls, layout: Layout, sizes: Mapping[str, int], dim: str, *, batch: int, seq_len: int, item: int, grad_item: int
    ) -> "Cut":
        """Of an op whose weights are cut along `dim` (heads, mlp or vocab), for `batch` sequences of all replicas."""

        def ranks(axes: tuple[str, ...]) -> int:
            return math.prod(sizes[name] for name in axes)

        folded, tensor, sequence = (ranks(names) for names in layout.axes(dim))
        copies = layout.batch + tuple(name for name in layout.sequence if name not in getattr(layout, dim))
        return cls(
            folded=folded, tensor=tensor, sequence=sequence, replicas=ranks(copies),
            batch=batch // ranks(layout.batch), seq_len=seq_len, item=item, grad_item=grad_item,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """B t."""
        return self.batch * self.seq_len // self.sequence

    def streamed(self, elements: float) -> float:
        """Elements of weights (of all ranks) that a device receives when they pass by once."""
        return elements / self.tensor * _share(self.folded)

    def moved(self, per_token: float) -> float:
        """Elements that a device receives when all folded ranks' tokens pass by once, or its own come home."""
        return self.tokens * per_token * (self.folded - 1)

    def summed(self, elements: float, itemsize: int) -> float:
        """Bytes of summing partial outputs over the tensor axes."""
        return 2 * elements * itemsize * _share(self.tensor)

    def replica_sum(self, elements: float) -> float:
        """Bytes of summing a weight's float32 gradient over the ranks that hold the same shard."""
        return 2 * elements / (self.folded * self.tensor) * FLOAT32 * _share(self.replicas)


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def choose(movement: str, traffic: Callable[[str], Traffic]) -> str:
    """A movement, or of gather and activations that which moves fewer bytes, for `auto`.

    Args:
      movement: of the configuration.
      traffic: movement -> bytes.
    """
    if movement != "auto":
        return movement
    return min(("gather", "activations"), key=lambda candidate: sum(traffic(candidate).values()))


# ------------------------------------------------------------------------------------------------ ops


def attention_traffic(
    cut: Cut, movement: str, *, heads: Heads, d_model: int, remat: Remat, forward: bool = False
) -> Traffic:
    """Of one layer's attention, forward and backward.

    Args:
      cut: of its heads.
      movement: anything but activations moves weights.
      heads: slots, padded ones too.
      d_model: D.
      remat: what backward repeats.
      forward: without backward.
    """
    moved = movement == "activations"
    weight_ranks = cut.tensor * (cut.folded if moved else 1)
    query, kv = heads.query * heads.dim * d_model, heads.kv * heads.dim * d_model
    if heads.kv < weight_ranks:  # a KV head lies on several ranks: each gathers all KV heads
        kv_weights = 2 * kv * _share(cut.folded * cut.tensor)
    else:
        kv_weights = 0 if moved else cut.streamed(2 * kv)
    into, out = kv_weights + (0 if moved else cut.streamed(query)), 0 if moved else cut.streamed(query)
    used_heads = max(1, heads.kv // weight_ranks)
    exchanged = _share(cut.sequence // cut.folded if moved else cut.sequence)
    keys_values = 2 * cut.batch * cut.seq_len * used_heads * heads.dim * cut.item * exchanged
    again = 0 if remat == "none" else 1
    # Under full remat queries, keys and values are made once more, after the MLP's backward.
    twice = 1 if remat in ("full", "offload") else 0
    into_passes, out_passes = (1, 1) if forward else (2 + again + twice, 2 + again)
    # x here, y home; in backward x, dy here, dx home, and of forward x, y again
    activations = 2 if forward else 5 + 2 * again + twice
    return {
        "weights": (into_passes * into + out_passes * out) * cut.item,
        "weight_grads": 0 if forward else (into + out) * cut.grad_item,
        "keys_values": keys_values if forward else (2 + twice) * keys_values,
        "key_value_grads": 0 if forward else keys_values,
        "activations": activations * cut.moved(d_model) * cut.item if moved else 0,
        # forward, recomputation, and of dx
        "tensor_sums": (1 if forward else 2 + again) * cut.summed(cut.tokens * d_model, cut.item),
        "replica_sums": 0 if forward else cut.replica_sum(2 * query + 2 * kv),
    }


def mlp_traffic(cut: Cut, movement: str, *, d_model: int, d_ff: int, forward: bool = False) -> Traffic:
    """Of one layer's MLP, whatever is repeated of its forward: nothing needs it."""
    activations = 2 if forward else 5  # x here, y home; in backward x, dy here, dx home
    sums = (1 if forward else 2) * cut.summed(cut.tokens * d_model, cut.item)
    return _rows(cut, movement, 3 * d_ff * d_model, activations * cut.moved(d_model) * cut.item, sums, forward)


def embed_traffic(cut: Cut, movement: str, *, d_model: int, vocab_size: int, forward: bool = False) -> Traffic:
    """Of the embedding."""
    activations = cut.moved((1 if forward else 2) * d_model * cut.item + INT32)  # ids here, x home; dx here
    sums = cut.summed(cut.tokens * d_model, cut.item)
    return _rows(cut, movement, vocab_size * d_model, activations, sums, forward, again=False)


def loss_traffic(cut: Cut, movement: str, *, d_model: int, vocab_size: int, forward: bool = False) -> Traffic:
    """Of the output head and cross-entropy."""
    # x and labels here, two partial sums home; in backward x, lse and two cotangents here, dx home
    per_token = d_model * cut.item + INT32 + 2 * FLOAT32
    if not forward:
        per_token += 2 * d_model * cut.item + 3 * FLOAT32
    # a token's label, maximum and sum, which labels are real, and dx
    sums = 3 * cut.summed(cut.tokens, FLOAT32) + cut.summed(cut.tokens, INT32)
    if not forward:
        sums += cut.summed(cut.tokens * d_model, cut.item)
    return _rows(cut, movement, vocab_size * d_model, cut.moved(per_token), sums, forward)


def _rows(
    cut: Cut, movement: str, weights: float, activations: float, sums: float, forward: bool, again: bool = True
) -> Traffic:
    """Of an op of `weights` elements, which pass once, and in backward `again`."""
    moved = movement == "activations"
    passes = 1 if forward or not again else 2
    return {
        "weights": 0 if moved else passes * cut.streamed(weights) * cut.item,
        "weight_grads": 0 if moved or forward else cut.streamed(weights) * cut.grad_item,
        "activations": activations if moved else 0,
        "tensor_sums": sums,
        "replica_sums": 0 if forward else cut.replica_sum(weights),
    }
