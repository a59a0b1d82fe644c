"""What a training step moves, from shapes alone.

Bytes received per device, as `tsp_jax.inspect.traffic` counts them. W are the axes that shard weights, Q those that
shard the sequence, folded = W & Q, tensor = W - Q; with r ranks a gather or scatter of n bytes receives n (r - 1) / r,
a sum twice that. Source of the terms: arXiv 2604.26294, section III, extended to every row of the layout table.
"""

import math
from collections.abc import Mapping

from tsp_jax.config import Config
from tsp_jax.layout import Heads, Layout, pad_heads

ITEMSIZE = {"float32": 4, "bfloat16": 2}
INT32 = 4


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


class _Sizes:
    """Ranks by role, and the slices that follow."""

    def __init__(self, config: Config, layout: Layout, sizes: Mapping[str, int]):
        def ranks(axes: tuple[str, ...]) -> int:
            return math.prod(sizes[name] for name in axes)

        axes = layout.axes("heads")
        self.folded, self.tensor, self.sequence = (ranks(names) for names in axes)
        replicas = layout.batch + tuple(name for name in layout.sequence if name not in layout.heads)
        self.replicas = ranks(replicas)
        self.batch = config.batch // ranks(layout.batch)
        self.tokens = self.batch * config.seq_len // self.sequence
        self.item, self.grad_item = ITEMSIZE[config.compute_dtype], ITEMSIZE[config.stream.grad_dtype]
        model = config.model
        shards = (sizes[name] for name in layout.heads)
        self.heads: Heads = pad_heads(model.num_heads, model.num_kv_heads, model.head_dim, *shards)

    def streamed(self, elements: float) -> float:
        """Elements of weights (of all ranks) that a device receives when they pass by once."""
        return elements / self.tensor * _share(self.folded)

    def summed(self, elements: float, itemsize: int) -> float:
        """Bytes of summing [B, t, D] partial outputs over the tensor axes."""
        return 2 * elements * itemsize * _share(self.tensor)

    def replica_sum(self, elements: float) -> float:
        """Bytes of summing a weight's float32 gradient over the ranks that hold the same shard."""
        return 2 * elements / (self.folded * self.tensor) * 4 * _share(self.replicas)


def step_traffic(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes received per device in one training step (accumulate = 1), by op and kind.

    Kinds: `weights` and their `weight_grads` over folded axes, `keys_values` and `key_value_grads` over sequence axes,
    `tensor_sums` over tensor axes, `replica_sums` of gradients over the rest. Positions and segments of tokens,
    gradients of norms, and scalars are left out: kilobytes.
    """
    s, model = _Sizes(config, layout, sizes), config.model
    return {
        "attention": {kind: model.num_layers * n for kind, n in _attention(config, s).items()},
        "mlp": {kind: model.num_layers * n for kind, n in _mlp(config, s).items()},
        "embed": _embed(config, s),
        "loss": _loss(config, s),
    }


def forward_traffic(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes received per device in the forward pass to the loss, by op and kind; see `step_traffic`.

    Weights pass once, keys and values are exchanged once, and partial outputs are summed once.
    """
    s, model = _Sizes(config, layout, sizes), config.model
    residual = s.summed(s.tokens * model.d_model, s.item)
    table = s.streamed(model.vocab_size * model.d_model) * s.item
    into, out, keys_values = _attention_passes(config, s)
    layers = model.num_layers
    return {
        "attention": {
            "weights": layers * (into + out) * s.item,
            "keys_values": layers * keys_values,
            "tensor_sums": layers * residual,
        },
        "mlp": {
            "weights": layers * s.streamed(3 * model.d_ff * model.d_model) * s.item,
            "tensor_sums": layers * residual,
        },
        "embed": {"weights": table, "tensor_sums": residual},
        "loss": {"weights": table, "tensor_sums": _loss_sums(s)},
    }


def _attention_passes(config: Config, s: _Sizes) -> tuple[float, float, float]:
    """Of one layer and pass: elements of [Wq Wk Wv], elements of Wo, bytes of keys and values."""
    heads, d_model = s.heads, config.model.d_model
    query, kv = heads.query * heads.dim * d_model, heads.kv * heads.dim * d_model
    if heads.kv < s.tensor:  # a KV head lies on several tensor shards: each gathers all KV heads
        kv_weights = 2 * kv * _share(s.folded * s.tensor)
    else:
        kv_weights = s.streamed(2 * kv)
    used_heads = max(1, heads.kv // s.tensor)
    keys_values = 2 * s.batch * config.seq_len * used_heads * heads.dim * s.item * _share(s.sequence)
    return s.streamed(query) + kv_weights, s.streamed(query), keys_values


def _loss_sums(s: _Sizes) -> float:
    """Bytes of a token's label, maximum and sum, and of which labels are real."""
    return 3 * s.summed(s.tokens, 4) + s.summed(s.tokens, INT32)


def _attention(config: Config, s: _Sizes) -> dict[str, float]:
    heads, d_model = s.heads, config.model.d_model
    query, kv = heads.query * heads.dim * d_model, heads.kv * heads.dim * d_model
    into, out, keys_values = _attention_passes(config, s)
    passes = {"none": 2, "save_attention": 2, "full": 3}[config.remat]  # of q, k, v
    out_passes = {"none": 2, "save_attention": 3, "full": 3}[config.remat]
    residual = s.summed(s.tokens * d_model, s.item)
    return {
        "weights": (passes * into + out_passes * out) * s.item,
        "weight_grads": (into + out) * s.grad_item,
        "keys_values": passes * keys_values,
        "key_value_grads": keys_values,
        "tensor_sums": out_passes * residual,  # forward, recomputation, and of dx
        "replica_sums": s.replica_sum(2 * query + 2 * kv),
    }


def _mlp(config: Config, s: _Sizes) -> dict[str, float]:
    weights = 3 * config.model.d_ff * config.model.d_model
    return {
        "weights": 2 * s.streamed(weights) * s.item,
        "weight_grads": s.streamed(weights) * s.grad_item,
        "tensor_sums": 2 * s.summed(s.tokens * config.model.d_model, s.item),
        "replica_sums": s.replica_sum(weights),
    }


def _embed(config: Config, s: _Sizes) -> dict[str, float]:
    table = config.model.vocab_size * config.model.d_model
    return {
        "weights": s.streamed(table) * s.item,
        "weight_grads": s.streamed(table) * s.grad_item,
        "tensor_sums": s.summed(s.tokens * config.model.d_model, s.item),
        "replica_sums": s.replica_sum(table),
    }


def _loss(config: Config, s: _Sizes) -> dict[str, float]:
    table = config.model.vocab_size * config.model.d_model
    return {
        "weights": 2 * s.streamed(table) * s.item,
        "weight_grads": s.streamed(table) * s.grad_item,
        "tensor_sums": s.summed(s.tokens * config.model.d_model, s.item) + _loss_sums(s),
        "replica_sums": s.replica_sum(table),
    }


# How many arrays of a size are alive at once in the backward pass of an op, counted in compiled programs (ROCm, jax
# 0.10.2): of one activation [B, t, D] in the compute dtype (float32 ones count twice), and of one bucket's gathered
# keys and values [2, B, S, K, H]: as received, cut into blocks, and as many gradients on their way back.
_ACTIVATIONS, _KEY_VALUES = 13, 5.5


def step_memory(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, float]:
    """Peak bytes on one device of a training step (accumulate = 1, remat full or save_attention), by part.

    Parts: `state` (float32 weights and two moments), `gradients` that wait for the update, `residuals` that forward
    leaves for backward, and of what comes and goes `activations`, `keys_values`, `weights` in flight. Source of the
    terms: arXiv 2604.26294, section III; the number of arrays alive at once is counted, see above.
    """
    s, model = _Sizes(config, layout, sizes), config.model
    heads, shards = s.heads, s.folded * s.tensor
    layer = (2 * heads.query + 2 * heads.kv) * heads.dim * model.d_model + 3 * model.d_ff * model.d_model
    tables = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    layers = model.num_layers * layer
    replicas = math.prod(sizes[name] for name in layout.batch) if config.optimizer.zero1 else 1
    activation = s.tokens * model.d_model * s.item
    outputs = s.tokens * heads.query * heads.dim / s.tensor * s.item
    kept = activation + (outputs if config.remat == "save_attention" else 0)
    buckets = 1 if layout.whole_weights else config.stream.attention_buckets
    kv_heads = max(1, heads.kv / s.tensor / min(buckets, max(1, heads.kv // shards)))
    in_flight = max((2 * heads.kv + heads.query) * heads.dim / buckets, 3 * model.d_ff / _mlp_buckets(config, layout))
    return {
        "state": (layers + tables) / shards * 4 * (1 + 2 / replicas),
        "gradients": (layers * ITEMSIZE[config.grad_dtype] + tables * 4) / shards,
        "residuals": model.num_layers * kept,
        "activations": _ACTIVATIONS * activation,
        "keys_values": _KEY_VALUES * 2 * s.batch * config.seq_len * kv_heads * heads.dim * s.item,
        "weights": in_flight * model.d_model / s.tensor * (2 * s.item + s.grad_item),
    }


def _mlp_buckets(config: Config, layout: Layout) -> int:
    return 1 if layout.whole_weights else config.stream.mlp_buckets
