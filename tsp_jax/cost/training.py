"""Bytes that a device receives and holds in a training step, from shapes alone.

Bytes received are counted as `tsp_jax.inspect.collectives` counts them, by the formulas of `tsp_jax.cost.traffic`.
"""

from collections.abc import Mapping

from tsp_jax.config import Config
from tsp_jax.cost.step import ITEMSIZE, OPS, Step
from tsp_jax.cost.traffic import FLOAT32, Traffic, repeats_attention
from tsp_jax.layout import Layout, num_ranks


def movements(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, str]:
    """Op (attention, mlp, embed, loss) -> its movement, with `auto` resolved."""
    return {op: movement for op, (movement, _) in Step(config, layout, sizes).ops().items()}


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
    for op, (movement, traffic) in Step(config, layout, sizes).ops().items():
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
    step, model = Step(config, layout, sizes), config.model
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
