"""Bytes that a device receives and holds in serving, from shapes alone, counted as in `tsp_jax.cost.training`."""

from collections.abc import Mapping

from tsp_jax.config import Config
from tsp_jax.cost.expert_passes import Tiling
from tsp_jax.cost.op_passes import Product
from tsp_jax.cost.step import ITEMSIZE, Step
from tsp_jax.cost.traffic import INT32
from tsp_jax.heads import HeadSharding
from tsp_jax.layout import Layout, num_ranks
from tsp_jax.stored import RowPadding

FLOAT32 = 4


class _Serving:
    """Numbers of ranks by role. A device has the cache of `batch` sequences and decodes `decoded` sequences."""

    def __init__(self, config: Config, layout: Layout, sizes: Mapping[str, int]):
        model = config.model
        axes = layout.axes("heads")
        self.folded, self.tensor, self.sequence = (num_ranks(names, sizes) for names in axes)
        self.unfolded_sequence = num_ranks(axes.unfolded_sequence, sizes)
        self.batch = config.batch // num_ranks(layout.batch, sizes)
        self.decoded = config.batch // num_ranks(layout.replica_batch, sizes)
        self.item = ITEMSIZE[config.compute_dtype]
        self.heads = HeadSharding.of(layout, sizes, model.num_heads, model.num_kv_heads, model.head_dim)


def _gathered(nbytes: float, ranks: int) -> float:
    return nbytes * (ranks - 1) / ranks


def _summed(nbytes: float, ranks: int) -> float:
    return 2 * _gathered(nbytes, ranks)


def decode_traffic(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that a device receives while one token of each of `config.batch` sequences is decoded, by op and kind.

    Neither weights nor cached keys and values move. A device that decodes the tokens of B sequences receives
    O(B (D + N H)) elements per layer, padded heads included. After the last layer it receives B V logits, padded rows
    included. There are four kinds. `heads` are all-gathered over folded axes. `merges` combine partial softmaxes over
    sequence axes. `sums` add partial outputs over the axes that shard weights. `logits` are all-gathered over the
    axes that shard the vocabulary. The numbers of cache entries are also exchanged, but not counted.
    """
    s, model = _Serving(config, layout, sizes), config.model
    residual = s.decoded * model.d_model * s.item
    vocab, mlp = (num_ranks(axes, sizes) for axes in (layout.vocab, layout.mlp))
    logits = s.decoded * RowPadding.over(model.vocab_size, vocab).stored * FLOAT32
    return {
        "attention": {kind: model.num_layers * n for kind, n in _attention(config, s).items()},
        "mlp": {"sums": (1 + bool(model.experts.shared)) * model.num_layers * _summed(residual, mlp)},
        "embed": {"sums": _summed(residual, vocab)},
        "logits": {"logits": _gathered(logits, vocab)},
    }


def _attention(config: Config, s: _Serving) -> dict[str, float]:
    """Bytes received in one layer's attention, by kind.

    Elements are float32, because heads are gathered before q/k norm and RoPE.
    """
    row, (query_rows, kv_rows) = s.decoded * FLOAT32, s.heads.stored
    if s.heads.kv_head_spans_shards:  # each tensor shard gathers all KV heads
        gathered = _gathered(2 * kv_rows * row, s.folded * s.tensor)
    else:
        gathered = _gathered(2 * kv_rows / s.tensor * row, s.folded)
    queries = query_rows / s.tensor * row
    lse = _gathered(s.sequence * s.batch * s.heads.shard.query * FLOAT32, s.sequence)
    outputs = _gathered(queries, s.folded) + _summed(queries / s.folded, s.unfolded_sequence)
    return {
        "heads": _gathered(queries, s.folded) + gathered,
        "merges": lse + outputs,
        "sums": _summed(s.decoded * config.model.d_model * FLOAT32, s.folded * s.tensor),
    }


def serving_memory(
    config: Config, layout: Layout, sizes: Mapping[str, int], *, chunk: int = 0
) -> dict[str, float]:  # fmt: skip
    """Peak bytes per device, by part, while `chunk` tokens of each sequence are prefilled; with 0, of a decode step.

    Parts: `weights` in the compute dtype; `cache` of `config.seq_len` tokens a sequence, with its entries' positions;
    `cache_copy`, the keys and values of one layer that decode reads; `keys_values`, of a chunk of all ranks;
    `activations`, of attention or of the MLP; `buckets` of weights; `experts` of one layer, copied; `logits`. Counted
    in programs for MI300X (jax 0.10.2; benchmarks/closed_forms.md).
    """
    s, model, step = _Serving(config, layout, sizes), config.model, Step(config, layout, sizes)
    shards, heads = s.folded * s.tensor, s.heads.shard
    vocab = RowPadding.over(model.vocab_size, num_ranks(layout.vocab, sizes)).stored
    tables = vocab * model.d_model / num_ranks(layout.vocab, sizes) * (1 if model.tie_embeddings else 2)
    rows = 2 * sum(s.heads.stored) + 3 * step.d_ff + step.moved_rows
    layers = model.num_layers * model.d_model * (rows / shards + model.experts.number * (1 + model.experts.biases))
    experts = 3 * step.expert_rows * model.d_model / shards
    tokens = s.batch * chunk / s.sequence if chunk else s.decoded
    queries, hidden = heads.query * heads.dim, step.d_ff / (s.tensor if chunk else shards)
    attention = tokens * (2 * (model.d_model + queries) * s.item + queries * FLOAT32)
    mlp = tokens * model.d_model * (2 * s.item + FLOAT32) + min(3 * tokens * hidden * FLOAT32, 6 * step.bucket_bytes)
    if step.expert_rows:  # the sum over buckets, and that of a bucket's choices; the router's scores
        mlp = max(mlp, tokens * (model.d_model * (2 * s.item + 2 * FLOAT32) + 3 * model.experts.number * FLOAT32))
    cache = cache_bytes(config, layout, sizes)
    return {
        "weights": (layers + tables) * s.item,
        "cache": cache + s.batch * config.seq_len / s.sequence * INT32,
        "cache_copy": 0.0 if chunk else cache / model.num_layers,
        "keys_values": 2 * s.batch * chunk * heads.kv * heads.dim * s.item,
        "activations": max(attention, mlp),
        "buckets": 2 * step.bucket_elements() / s.tensor * s.item if chunk and mlp > attention else 0.0,
        "experts": experts * s.item,
        "logits": 2 * s.decoded * vocab * FLOAT32,
    }


def decode_bytes(config: Config, layout: Layout, sizes: Mapping[str, int]) -> float:
    """Bytes of weights and of the cache that a device reads and writes in a decode step.

    Experts are copied out of those of all layers, before the loop over choices reads those that are chosen: all of them
    are read and written once.
    """
    held = serving_memory(config, layout, sizes)
    return held["weights"] + held["cache"] + config.model.num_layers * held["experts"]


def decode_products(config: Config, layout: Layout, sizes: Mapping[str, int]) -> tuple[Product, ...]:
    """Products of one layer's experts on a device in a decode step, if all experts are chosen equally often."""
    s, rule = _Serving(config, layout, sizes), config.model.experts
    if not rule.number:
        return ()
    experts, choices = Step(config, layout, sizes).experts, s.decoded * rule.per_token
    tiling = Tiling(config.stream.expert_kernel, choices, rule.number, share=1 / experts.folded)
    return tiling.products(experts.shard_rows, config.model.d_model)


def cache_bytes(config: Config, layout: Layout, sizes: Mapping[str, int]) -> float:
    """Bytes per device of the keys and values of `config.batch` sequences, `config.seq_len` tokens each.

    Sizes are not rounded up to whole pages. A device stores 1 / R of the keys and values of its sequences, with R ranks
    on sequence and tensor axes. But a KV head that several tensor shards use is stored once on each of them.
    """
    s = _Serving(config, layout, sizes)
    heads = s.heads.shard
    return 2 * config.model.num_layers * s.batch * config.seq_len / s.sequence * heads.kv * heads.dim * s.item
