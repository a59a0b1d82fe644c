"""A training step as passes: in each, an op fetches weights, keys and values or tokens, bucket by bucket, multiplies
with them, and sends to other ranks what is theirs.

The bytes that all passes receive are those of `step_traffic`; their operations are those of `step_flops`, for one
device and with padding.

Dims: t tokens of a micro-batch on this device, D model, H head.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tsp_jax.config import Config
from tsp_jax.cost.expert_passes import ExpertPasses
from tsp_jax.cost.flops import keys_within
from tsp_jax.cost.op_passes import Attend, Message, OpPasses, Pass
from tsp_jax.cost.step import Step
from tsp_jax.cost.traffic import FLOAT32, INT32, exchanged_heads, repeats_attention, repeats_mlp
from tsp_jax.layout import Layout, largest_divisor


class _Bytes(NamedTuple):
    """Bytes that elementwise work reads and writes in main memory, in forward and in backward, by element.

    Counted in compiled programs (jax 0.10.2; benchmarks/closed_forms.md): those that stand in kernels of their own on
    every platform, and those that XLA for CUDA alone does not fuse into products.
    """

    forward: float
    backward: float


_HIDDEN = _Bytes(10, 36)
"""of the MLP, by token and row: gate and up in float32, h; in backward dh too, and the gradients of gate and up"""
_HEADS = _Bytes(11, 26)
"""of queries, keys and values: RoPE of float32 products; fused"""
_NORMED_HEADS = _Bytes(16, 53)
"""the same with a norm of each head; not fused"""
_LOGITS = _Bytes(8, 10)
_LAYER, _LAYER_FUSED = _Bytes(30, 39), _Bytes(12, 37)
"""of [B, t, D]: norms in float32, residuals, what is kept"""
_SUM = 6
"""of an op's output [B, t, D]: read in float32, written in the compute dtype; fused"""


class Block(NamedTuple):
    """Passes that run one after another, `times` times in a micro-batch, such as the forward pass of a layer."""

    name: str
    times: int
    passes: tuple[Pass, ...]


def step_passes(config: Config, layout: Layout, sizes: Mapping[str, int]) -> tuple[Block, ...]:
    """The passes of one micro-batch of a training step, in the order in which they run."""
    step, model = Step(config, layout, sizes), config.model
    attention = {window: _Attention(step, window) for window, _ in model.windows}
    embed, loss = OpPasses(step, "embed", "vocab"), OpPasses(step, "loss", "vocab")
    mlp_forward, mlp_repeated, mlp_backward = _mlp(step)
    forward = [Block("forward", n, (*attention[window].forward(), *mlp_forward)) for window, n in model.windows]
    backward = [
        Block(
            "backward", n, (*attention[window].repeated(), *mlp_repeated, *mlp_backward, *attention[window].backward())
        )
        for window, n in model.windows
    ]
    first, last = _embed(embed)
    last = Block("embed", 1, (last,)) if embed.trained else Block("embed", 0, ())
    return (Block("embed", 1, (first,)), *forward, Block("loss", 1, _loss(loss)), *backward, last)


def _mlp(step: Step) -> tuple[tuple[Pass, ...], tuple[Pass, ...], tuple[Pass, ...]]:
    """(forward, what backward repeats, backward) of the MLP, or of experts and the MLP of shared ones."""
    experts = ExpertPasses(step) if step.expert_rows else None
    op = OpPasses(step, "mlp", "mlp") if step.d_ff else None
    *forward, last = [*(experts.forward() if experts else ()), *([_mlp_forward(op)] if op else ())]
    *backward, end = [*([_mlp_backward(op)] if op else ()), *(experts.backward() if experts else ())]
    forward = *forward, _with_layer(last, step, _LAYER.forward, _LAYER_FUSED.forward)
    backward = *backward, _with_layer(end, step, _LAYER.backward, _LAYER_FUSED.backward)
    repeated = experts.repeated() if experts else ()
    again = repeats_mlp(step.config.model.norms != "pre", step.config.remat)
    return forward, forward if again else repeated, backward


def _mlp_forward(op: OpPasses) -> Pass:
    rows, item = op.step.d_ff, op.width * op.sharding.itemsize
    return op.use(
        "mlp", rows / op.sharding.tensor, op.buckets(rows, 3), 3, expand=2, contract=1, gathers=item, scatters=item,
        summed=op.output_sum(), row_bytes=_HIDDEN.forward, token_bytes=_SUM,
    )  # fmt: skip


def _mlp_backward(op: OpPasses) -> Pass:
    rows, item = op.step.d_ff, op.width * op.sharding.itemsize
    return op.use(
        "mlp", rows / op.sharding.tensor, op.buckets(rows, 3), 3, expand=3, contract=2, grads=True, gathers=2 * item,
        scatters=item, summed=op.output_sum() + op.replica_sum(3 * rows * op.width), row_bytes=_HIDDEN.backward,
        token_bytes=_SUM,
    )  # fmt: skip


def _with_layer(part: Pass, step: Step, nbytes: float, fusible: float) -> Pass:
    """A pass with the elementwise work of a layer outside of its ops."""
    elements = step.sharding.tokens * step.config.model.d_model
    return part._replace(bytes=part.bytes + nbytes * elements, fusible=part.fusible + fusible * elements)


def _embed(op: OpPasses) -> tuple[Pass, Pass]:
    """(forward, backward)."""
    rows, item = op.step.vocab_size, op.width * op.sharding.itemsize
    buckets, own = op.buckets(rows, 1), rows / op.sharding.tensor
    return (
        op.use("embed", own, buckets, 1, gathers=INT32, scatters=item, summed=op.output_sum()),
        op.use(
            "embed", own, buckets, 1, grads=True, fetches=False, gathers=INT32 + item,
            summed=op.replica_sum(rows * op.width),
        )._replace(products=()),
    )  # fmt: skip


def _loss(op: OpPasses) -> tuple[Pass, Pass]:
    """(forward, backward)."""
    rows, item, tokens = op.step.vocab_size, op.width * op.sharding.itemsize, op.sharding.tokens
    buckets, own = op.buckets(rows, 1), rows / op.sharding.tensor
    sums = op.tensor_sum(tokens, FLOAT32, 3) + op.tensor_sum(tokens, INT32)
    forward = op.use(
        "loss", own, buckets, 1, expand=1, gathers=item + INT32 + 2 * FLOAT32, summed=sums, row_bytes=_LOGITS.forward
    )
    backward = op.use(
        "loss", own, buckets, 1, expand=1, contract=1, grads=True, gathers=item + INT32 + 3 * FLOAT32, scatters=item,
        summed=op.output_sum() + op.replica_sum(rows * op.width), row_bytes=_LOGITS.backward, token_bytes=_SUM,
    )  # fmt: skip
    return forward, backward


class _Attention(OpPasses):
    """The passes of one layer's attention."""

    def __init__(self, step: Step, window: int | None):
        super().__init__(step, "attention", "heads")
        self.heads, self.window = step.heads, window
        whole, tensor = step.layout.whole_weights, self.sharding.tensor
        counts = self.sharding.head_buckets(self.heads, self.width, step.bucket_bytes)
        self.query_buckets, self.kv_buckets = (1, 1) if whole else counts
        self.query_rows, self.kv_rows = (rows / tensor for rows in self.heads.stored)
        self.kv_received, self.kv_axes = None, ()
        if self.heads.kv_head_spans_shards and not self.moves_tokens:  # each tensor shard gathers all KV heads
            ranks = self.heads.keys_values.ranks
            self.kv_received = 2 * self.heads.stored[1] * self.width * (ranks - 1) / ranks
            self.kv_axes, self.kv_rows = self.axes.tensor + self.axes.folded, self.heads.shard.kv * self.heads.heads.dim
        repeats = step.config.remat != "none"
        self.normed = step.config.model.qk_norm
        self.again, self.twice = repeats, repeats_attention(step.config.remat)

    def elementwise(self, weights: int = 1, *, backward: bool = False) -> dict[str, Any]:
        """Bytes for each token and row, of heads that `weights` weights make."""
        counted = _NORMED_HEADS if self.normed else _HEADS
        return {
            "row_bytes" if self.normed else "fusible": weights * (counted.backward if backward else counted.forward)
        }

    def project(self) -> tuple[Pass, Pass]:
        """To keys and values, and to queries."""
        item = self.width * self.sharding.itemsize
        settings = {"received": self.kv_received, "axes": self.kv_axes}
        return (
            self.use(
                "keys_values",
                self.kv_rows,
                self.kv_buckets,
                2,
                expand=2,
                gathers=item,
                **settings,
                **self.elementwise(2),
            ),
            self.use("queries", self.query_rows, self.query_buckets, 1, expand=1, **self.elementwise()),
        )

    def project_backward(self) -> tuple[Pass, Pass]:
        """The gradients of queries, and of keys and values."""
        item, model = self.width * self.sharding.itemsize, self.config.model
        normed = int(model.qk_norm and model.qk_norm_width == "head" and not model.qkv_bias)
        settings = {"received": self.kv_received, "axes": self.kv_axes}
        replicas = self.replica_sum(2 * sum(self.heads.stored) * self.width)
        return (
            self.use(
                "queries", self.query_rows, self.query_buckets, 1, expand=normed, contract=1, grads=True,
                gathers=item, scatters=item, **self.elementwise(backward=True),
            ),
            self.use(
                "keys_values", self.kv_rows, self.kv_buckets, 2, expand=normed, contract=2, grads=True,
                summed=self.output_sum() + replicas, token_bytes=_SUM, **settings, **self.elementwise(2, backward=True),
            ),
        )  # fmt: skip

    def out(self) -> Pass:
        """The output projection."""
        item = self.width * self.sharding.itemsize
        return self.use(
            "out",
            self.query_rows,
            self.query_buckets,
            1,
            contract=1,
            scatters=item,
            summed=self.output_sum(),
            token_bytes=_SUM,
        )

    def attend(self, backward: bool = False) -> Pass:
        """The kernel, with the exchange of keys and values, and of their gradients."""
        sharding, moved, config = self.sharding, self.moves_tokens, self.config
        heads = self.heads.own if moved else self.heads.shard
        exchanged = sharding.exchanged_tokens(self.movement, self.window, config.data.order)
        buckets = sharding.exchange_buckets(self.heads, self.movement, self.step.bucket_bytes, exchanged)
        buckets = largest_divisor(heads.kv, buckets)
        axes = self.axes.unfolded_sequence if moved else self.axes.sequence
        nbytes = 2 * sharding.batch * exchanged * heads.kv * heads.dim * sharding.itemsize
        others = sharding.seq_len // sharding.sequence * (sharding.sequence - 1)
        near = self.window is not None and not moved and exchanged < others
        gather, scatter = ("collective-permute",) * 2 if near else ("all-gather", "reduce-scatter")
        fetched = (Message("keys_values", gather, axes, nbytes, 2 * buckets),) * (nbytes > 0)
        sent = (Message("key_value_grads", scatter, axes, nbytes, 2 * buckets),) * (nbytes > 0 and backward)
        tokens = sharding.tokens * (sharding.folded if moved else 1)
        elements, ranks = tokens * heads.query * heads.dim, sharding.sequence // (sharding.folded if moved else 1)
        pairs = elements * keys_within(self.window, config.seq_len)
        # Gathered keys and values are copied, and so are their gradients.
        gathered = nbytes + 2 * tokens * heads.kv * heads.dim * sharding.itemsize
        return Pass(
            self.name,
            "attend",
            buckets,
            attend=Attend(backward, pairs, elements, ranks),
            fetched=fetched,
            sent=sent,
            bytes=2 * gathered * (1 + backward),
        )

    def own_weights(self, into: int, out: int, grads: bool = False) -> tuple[Pass, ...]:
        """The exchange of the rows of this rank's own heads, where tokens move and ranks store parts of heads."""
        if not self.moves_tokens:
            return ()
        query, key_value = exchanged_heads(self.heads, self.width)
        kind = "weight_grads" if grads else "weights"
        nbytes = (into * (query + key_value) + out * query) * FLOAT32
        message = Message(kind, "all-to-all", self.axes.folded, nbytes, 3 * into + out)
        return (Pass(self.name, "own_heads", fetched=(message,)),) * (nbytes > 0)

    def forward(self) -> tuple[Pass, ...]:
        """Of a layer."""
        return (*self.own_weights(1, 1), *self.project(), self.attend(), self.out())

    def repeated(self) -> tuple[Pass, ...]:
        """What backward repeats before the MLP's backward: the outputs, and what they need if it was not kept."""
        if not self.again:
            return ()
        before = (*self.project(), self.attend()) * self.twice
        return (*self.own_weights(int(self.twice), 1), *before, self.out())

    def backward(self) -> tuple[Pass, ...]:
        """Of a layer."""
        again = (*self.own_weights(1, 1), *self.project()) * self.again
        return (
            *again, self.out_backward(), self.attend(backward=True), *self.project_backward(),
            *self.own_weights(1, 1, grads=True),
        )  # fmt: skip

    def out_backward(self) -> Pass:
        """The gradient of the output projection."""
        item = self.width * self.sharding.itemsize
        return self.use("out", self.query_rows, self.query_buckets, 1, expand=1, grads=True, gathers=item, fusible=_SUM)
