"""What a training step moves and holds, from shapes alone.

Bytes received per device, as `tsp_jax.inspect.collectives` counts them, by the formulas of `tsp_jax.cost.traffic`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

from tsp_jax.config import Config
from tsp_jax.cost.traffic import Cut, Traffic, attention_traffic, choose, embed_traffic, loss_traffic, mlp_traffic
from tsp_jax.heads import pad_heads
from tsp_jax.layout import Layout, largest_divisor

ITEMSIZE = {"float32": 4, "bfloat16": 2}


class _Sizes:
    """A configuration on a mesh: each op's cut and movement."""

    def __init__(self, config: Config, layout: Layout, sizes: Mapping[str, int]):
        model, self.config, self.layout, self.sizes = config.model, config, layout, sizes
        self.item, self.grad_item = ITEMSIZE[config.compute_dtype], ITEMSIZE[config.stream.grad_dtype]
        self.cut = self.cut_of("heads")
        shards = (sizes[name] for name in layout.heads)
        self.heads = pad_heads(model.num_heads, model.num_kv_heads, model.head_dim, *shards)

    def cut_of(self, dim: str) -> Cut:
        config = self.config
        batch = config.batch // config.accumulate
        kwargs = {"batch": batch, "seq_len": config.seq_len, "item": self.item, "grad_item": self.grad_item}
        return Cut.of(self.layout, self.sizes, dim, **kwargs)

    def ops(self) -> dict[str, tuple[str, Callable[..., Traffic]]]:
        """Op -> (its movement, (movement, forward) -> bytes of one layer)."""
        stream, model, vocab = self.config.stream, self.config.model, self.cut_of("vocab")
        attention = partial(attention_traffic, self.cut, heads=self.heads, d_model=model.d_model)
        mlp = partial(mlp_traffic, self.cut_of("mlp"), d_model=model.d_model, d_ff=model.d_ff)
        table = {"d_model": model.d_model, "vocab_size": model.vocab_size}
        functions: dict[str, tuple[str, Callable[..., Traffic]]] = {
            "attention": (stream.attention_movement, partial(attention, remat=self.config.remat)),
            "mlp": (stream.mlp_movement, mlp),
            "embed": (stream.vocab_movement, partial(embed_traffic, vocab, **table)),
            "loss": (stream.vocab_movement, partial(loss_traffic, vocab, **table)),
        }
        if self.layout.whole_weights:
            return {op: ("gather", traffic) for op, (_, traffic) in functions.items()}
        return {op: (choose(movement, traffic), traffic) for op, (movement, traffic) in functions.items()}

    def traffic(self, forward: bool) -> dict[str, Traffic]:
        found = {}
        for op, (movement, traffic) in self.ops().items():
            times = self.config.model.num_layers if op in ("attention", "mlp") else 1
            found[op] = {kind: times * n for kind, n in traffic(movement, forward=forward).items()}
        return found


def movements(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, str]:
    """Op (attention, mlp, embed, loss) -> its movement, with `auto` resolved."""
    return {op: movement for op, (movement, _) in _Sizes(config, layout, sizes).ops().items()}


def step_traffic(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, Traffic]:
    """Bytes received per device for one micro-batch of a training step (all of it: accumulate = 1), by op and kind."""
    return _Sizes(config, layout, sizes).traffic(forward=False)


def forward_traffic(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, Traffic]:
    """Bytes received per device in the forward pass to the loss, by op and kind.

    Weights or activations pass once, keys and values are exchanged once, and partial outputs are summed once.
    """
    return _Sizes(config, layout, sizes).traffic(forward=True)


# How many arrays of a size are alive at once in the backward pass of attention, counted in compiled programs (ROCm, jax
# 0.10.2, fused attention): of one activation [B, t, D] in the compute dtype (a layer's input and its gradient, normed
# input, queries, keys, values, gradient of outputs, and chunks of others), and of one exchange's keys and values
# [2, B, S, c, H]: in use, on their way, and their gradients.
_ACTIVATIONS, _KEY_VALUES = 8, 3


def step_memory(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, float]:
    """Peak bytes on one device of a training step (accumulate = 1, any remat but none), by part.

    Parts: `state` (float32 weights and two moments), `residuals` that forward leaves for backward on the device,
    `gradients` that wait for the update and do not fit where residuals were (full remat puts them there), and of what
    comes and goes `activations`, `keys_values`, `weights` in flight. Source of the terms: arXiv 2604.26294, sec. III;
    the number of arrays alive at once is counted, see above.
    """
    s, model = _Sizes(config, layout, sizes), config.model
    cut, heads, shards = s.cut, s.heads, s.cut.folded * s.cut.tensor
    layer = (2 * heads.query + 2 * heads.kv) * heads.dim * model.d_model + 3 * model.d_ff * model.d_model
    tables = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    layers = model.num_layers * layer
    replicas = math.prod(sizes[name] for name in layout.batch) if config.optimizer.zero1 else 1
    activation = cut.tokens * model.d_model * s.item
    outputs = cut.tokens * heads.query * heads.dim / cut.tensor * s.item
    kept = {"offload": 0.0, "save_attention": activation + outputs}.get(config.remat, activation)
    residuals = model.num_layers * kept
    waiting = layers * ITEMSIZE[config.grad_dtype] / shards
    if config.remat == "full":
        waiting = max(0.0, waiting - residuals)
    kv_heads = max(1, heads.kv / cut.tensor)
    stream, exchanges = config.stream, layout.share("heads", config.stream.exchange_buckets, sizes)
    exchanged = kv_heads / largest_divisor(int(kv_heads), exchanges)
    in_flight = max(
        (2 * heads.kv + heads.query) * heads.dim / layout.pieces("heads", stream.attention_buckets, sizes),
        3 * model.d_ff / layout.pieces("mlp", stream.mlp_buckets, sizes),
    )
    return {
        "state": (layers + tables) / shards * (4 + 2 * ITEMSIZE[config.optimizer.moments_dtype] / replicas),
        "gradients": waiting + tables * 4 / shards,
        "residuals": residuals,
        "activations": _ACTIVATIONS * activation,
        "keys_values": _KEY_VALUES * 2 * cut.batch * config.seq_len * exchanged * heads.dim * s.item,
        "weights": in_flight * model.d_model / cut.tensor * (2 * s.item + s.grad_item),
    }
