"""Bytes that a device receives and holds in a training step, from shapes alone.

Bytes received are counted as `tsp_jax.inspect.collectives` counts them, by the formulas of `tsp_jax.cost.traffic`.
"""

from collections.abc import Callable, Mapping
from functools import partial

from tsp_jax.config import Config
from tsp_jax.cost.traffic import (
    FLOAT32,
    OpSharding,
    Traffic,
    attention_may_move_tokens,
    choose_movement,
    embed_traffic,
    layers_attention_traffic,
    loss_traffic,
    mlp_traffic,
    repeats_attention,
    repeats_mlp,
)
from tsp_jax.heads import HeadSharding
from tsp_jax.layout import Layout, num_ranks
from tsp_jax.stored import RowPadding

OPS = "attention", "mlp", "embed", "loss"
ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""bytes of an element"""


class _Step:
    """A configuration on a mesh: each op's sharding and movement. Rows are counted as stored, padding included."""

    def __init__(self, config: Config, layout: Layout, sizes: Mapping[str, int]):
        model, self.config, self.layout, self.sizes = config.model, config, layout, sizes
        self.itemsize, self.grad_itemsize = ITEMSIZE[config.compute_dtype], ITEMSIZE[config.stream.grad_dtype]
        self.bucket_bytes = config.stream.bucket_mib * 2**20
        self.sharding = self.sharding_of("heads")
        self.heads = HeadSharding.of(layout, sizes, model.num_heads, model.num_kv_heads, model.head_dim)
        self.d_ff = RowPadding.over(model.d_ff, num_ranks(layout.mlp, sizes)).stored
        self.vocab_size = RowPadding.over(model.vocab_size, num_ranks(layout.vocab, sizes)).stored

    def sharding_of(self, dim: str) -> OpSharding:
        batch = self.config.batch // self.config.accumulate
        return OpSharding.of(
            self.layout, self.sizes, dim, batch=batch, seq_len=self.config.seq_len,
            itemsize=self.itemsize, grad_itemsize=self.grad_itemsize,
        )  # fmt: skip

    def ops(self) -> dict[str, tuple[str, Callable[..., Traffic]]]:
        """Op -> (its movement, a function that gives its traffic from a movement and `forward`).

        Attention's traffic is that of all layers, the MLP's that of one.
        """
        stream, model, vocab = self.config.stream, self.config.model, self.sharding_of("vocab")
        attention = partial(
            layers_attention_traffic, self.sharding, heads=self.heads, d_model=model.d_model, windows=model.windows,
            token_order=self.config.data.order, remat=self.config.remat,
        )  # fmt: skip
        mlp = partial(mlp_traffic, self.sharding_of("mlp"), d_model=model.d_model, d_ff=self.d_ff)
        mlp = partial(mlp, repeated=repeats_mlp(model.norms != "pre", self.config.remat))
        table = {"d_model": model.d_model, "vocab_size": self.vocab_size}
        functions: dict[str, tuple[str, Callable[..., Traffic]]] = {
            "attention": (stream.attention_movement, attention),
            "mlp": (stream.mlp_movement, mlp),
            "embed": (stream.vocab_movement, partial(embed_traffic, vocab, **table)),
            "loss": (stream.vocab_movement, partial(loss_traffic, vocab, **table)),
        }
        may_move = dict.fromkeys(functions, True)
        may_move["attention"] = attention_may_move_tokens(self.layout.axes("heads"), self.heads)
        return {
            op: (
                "gather" if self.layout.whole_weights else choose_movement(movement, traffic, may_move[op]),
                traffic,
            )
            for op, (movement, traffic) in functions.items()
        }

    def adapters(self) -> tuple[float, float]:
        """Elements per device: (of the adapters of all layers, of the weights of one layer that have adapters)."""
        model, (query_rows, kv_rows) = self.config.model, self.heads.stored
        rows = {"q": query_rows, "o": query_rows, "k": kv_rows, "v": kv_rows}
        own = [
            rows[name] / num_ranks(self.layout.heads, self.sizes) if name in rows
            else self.d_ff / num_ranks(self.layout.mlp, self.sizes)
            for name in self.config.lora.targets
        ]  # fmt: skip
        factors = self.config.lora.rank * (sum(own) + len(own) * model.d_model)
        return model.num_layers * factors, sum(own) * model.d_model

    def bucket_elements(self) -> float:
        """Elements of the largest bucket of weights, before tensor axes shard it."""
        model, heads, sharding, bucket_bytes = self.config.model, self.heads, self.sharding, self.bucket_bytes
        query_rows, kv_rows = heads.stored
        sizes = query_rows, 2 * kv_rows, 3 * self.d_ff
        if self.layout.whole_weights:
            return max(sizes) * model.d_model
        rows = self.d_ff // num_ranks(self.layout.mlp, self.sizes)
        mlp_buckets = sharding.weight_buckets(rows, 3 * self.d_ff * model.d_model, bucket_bytes)
        counts = *sharding.head_buckets(heads, model.d_model, bucket_bytes), mlp_buckets
        return max(size / count for size, count in zip(sizes, counts, strict=True)) * model.d_model


def movements(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, str]:
    """Op (attention, mlp, embed, loss) -> its movement, with `auto` resolved."""
    return {op: movement for op, (movement, _) in _Step(config, layout, sizes).ops().items()}


def step_traffic(
    config: Config, layout: Layout, sizes: Mapping[str, int], *, forward: bool = False
) -> dict[str, Traffic]:
    """Bytes that a device receives in one micro-batch of a training step, in all layers together, by op and kind.

    With `accumulate` = 1 a micro-batch is the whole step. `forward` counts only the forward pass and the loss: weights
    or activations move once, keys and values are exchanged once, and partial outputs are summed once. With LoRA, an op
    whose weights have no adapters sends no gradients of them; sums of adapters' gradients, [r, D], are left out. If
    attention without adapters moves tokens, it moves a seventh less than counted.
    """
    received, lora = {}, config.lora
    adapted = {"attention" if name in "qkvo" else "mlp" for name in lora.targets} if lora.rank else {*OPS}
    for op, (movement, traffic) in _Step(config, layout, sizes).ops().items():
        times = config.model.num_layers if op == "mlp" else 1
        no_backward = forward or (op == "embed" and op not in adapted)
        received[op] = {kind: times * n for kind, n in traffic(movement, forward=no_backward).items()}
        if op not in adapted:
            received[op] |= dict.fromkeys(("weight_grads", "replica_sums"), 0)
    return received


_ACTIVATIONS, _KEY_VALUES = 8, 3
"""Numbers of arrays that are in memory at once in attention's backward pass, counted in compiled programs (ROCm,
jax 0.10.2, Triton kernel). The first counts activations, [B, t, D] in the compute dtype: a layer's input and its
gradient, the normed input, queries, keys, values, the gradient of the outputs, and chunks of other activations. The
second counts keys and values of the c KV heads of a bucket, [2, B, S, c, H]: those in use, those being received, and
their gradients."""


def step_memory(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, float]:
    """Peak bytes per device of a training step, by part; for `accumulate` = 1 and any remat except `none`.

    Parts: `state` is float32 weights and two moments. `residuals` is what forward keeps on the device for backward, or
    what backward has fetched for one layer from the host. `gradients` is the gradients that wait for the update; where
    they take the place of residuals, only those that do not fit there count. `activations`, `keys_values` and `weights`
    are transient. With LoRA, `state` is frozen weights, and adapters with two moments; `weights` includes the sums of
    one layer's weights and adapters, and their gradients. Source of the terms: arXiv 2604.26294, section III. The
    numbers of arrays in memory at once were counted; see `_ACTIVATIONS`.
    """
    step, model = _Step(config, layout, sizes), config.model
    sharding, heads = step.sharding, step.heads
    shards = sharding.folded * sharding.tensor
    layer = (2 * sum(heads.stored) + 3 * step.d_ff) * model.d_model
    tables = step.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    layers = model.num_layers * layer
    copies = tuple(name for name in layout.batch if name not in layout.heads)
    replicas = num_ranks(copies, sizes) if config.optimizer.zero1 else 1
    activation = sharding.tokens * model.d_model * step.itemsize
    movement = step.ops()["attention"][0]
    computed = heads.own.query * sharding.folded if movement == "activations" else heads.shard.query
    outputs = sharding.tokens * computed * (heads.heads.dim * step.itemsize + FLOAT32)  # and log-sum-exps
    kept = activation + (0 if repeats_attention(config.remat) else outputs)
    on_host = config.remat.startswith("offload")
    residuals = kept if on_host else model.num_layers * kept
    moments = 2 * ITEMSIZE[config.optimizer.moments_dtype] / replicas
    trained, frozen, summed = (layers + tables) / shards, 0.0, 0.0
    waiting, table_grads = layers / shards * ITEMSIZE[config.grad_dtype], tables * FLOAT32 / shards
    if config.lora.rank:
        frozen, table_grads = trained, 0.0
        trained, summed = step.adapters()
        waiting = trained * ITEMSIZE[config.grad_dtype]
    if not on_host:
        waiting = max(0.0, waiting - residuals)
    exchanged = max(sharding.exchanged_tokens(movement, window, config.data.order) for window, _ in model.windows)
    kv_heads = heads.shard.kv / sharding.exchange_buckets(heads, movement, step.bucket_bytes, exchanged)
    keys = exchanged + config.seq_len // sharding.sequence
    bucket = step.bucket_elements() / sharding.tensor
    return {
        "state": trained * (FLOAT32 + moments) + frozen * ITEMSIZE[config.lora.base_dtype],
        "gradients": waiting + table_grads,
        "residuals": residuals,
        "activations": _ACTIVATIONS * activation,
        "keys_values": _KEY_VALUES * 2 * sharding.batch * keys * kv_heads * heads.heads.dim * step.itemsize,
        "weights": bucket * (2 * step.itemsize + step.grad_itemsize) + summed * 2 * FLOAT32,
    }
