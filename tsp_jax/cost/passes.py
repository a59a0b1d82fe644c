"""A training step as passes: in each, an op fetches weights, keys and values or tokens, bucket by bucket, multiplies
with them, and sends to other ranks what is theirs.

The bytes that all passes receive are those of `step_traffic`; their operations are those of `step_flops`, for one
device and with padding.

Dims: t tokens of a micro-batch on this device, D model, V vocabulary, H head; c tokens of a chunk, p rows of a bucket.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tsp_jax.config import Config
from tsp_jax.cost.flops import keys_within
from tsp_jax.cost.step import Step
from tsp_jax.cost.traffic import FLOAT32, INT32, exchanged_heads, repeats_attention, repeats_mlp
from tsp_jax.layout import AxisNames, Layout, largest_divisor


class Message(NamedTuple):
    """Collectives of one kind in a pass."""

    kind: str
    """as in `tsp_jax.cost.traffic.Traffic`"""
    collective: str
    axes: AxisNames
    bytes: float
    """received in all of them together"""
    number: int = 1


class Product(NamedTuple):
    """The matrix product [m, k] x [k, n], `times` times in a pass."""

    m: float
    n: float
    k: float
    times: float


class Attend(NamedTuple):
    """The run of an attention kernel in a pass."""

    backward: bool
    pairs: float
    """pairs of query and key that may attend, times heads, times H; each product takes 2 operations per pair"""


class Pass(NamedTuple):
    """One pass over an op's buckets."""

    op: str
    """attention, mlp, embed or loss"""
    part: str
    """which of the op's weights; attend: keys and values"""
    buckets: int = 1
    weights: int = 0
    """number of weights that a bucket has rows of"""
    rows: float = 0.0
    """rows of one weight in a bucket; where tokens move, those of this device"""
    chunk: float = 0.0
    """tokens that are multiplied with a bucket at once"""
    products: tuple[Product, ...] = ()
    attend: Attend | None = None
    bytes: float = 0.0
    """read and written in main memory besides the products' operands and results"""
    fetched: tuple[Message, ...] = ()
    """before a bucket is used"""
    sent: tuple[Message, ...] = ()
    """after a bucket was used"""
    summed: tuple[Message, ...] = ()
    """once, after the last bucket"""

    @property
    def messages(self) -> tuple[Message, ...]:
        """All collectives."""
        return self.fetched + self.sent + self.summed


class Block(NamedTuple):
    """Passes that run one after another, `times` times in a micro-batch, such as the forward pass of a layer."""

    name: str
    times: int
    passes: tuple[Pass, ...]


class _Op:
    """An op on a mesh, and its passes."""

    def __init__(self, step: Step, name: str, dim: str):
        self.name, self.step, self.config, self.width = name, step, step.config, step.config.model.d_model
        self.sharding, self.movement = step.sharding_of(dim), step.ops()[name][0]
        self.axes, self.layout = step.layout.axes(dim), step.layout
        self.copies = tuple(axis for axis in step.layout.tokens if axis not in getattr(step.layout, dim))
        self.moves_tokens = self.movement == "activations" and self.sharding.folded > 1
        self.rings = self.movement == "ring" and self.sharding.folded > 1 and not step.layout.whole_weights
        wanted = self.sharding.token_buckets(self.width, step.bucket_bytes)
        self.token_buckets = largest_divisor(self.sharding.seq_len // self.sharding.sequence, wanted)
        adapted = {"attention" if target in "qkvo" else "mlp" for target in self.config.lora.targets}
        self.trained = not self.config.lora.rank or name in adapted

    def buckets(self, rows: float, weights: int) -> int:
        """Number of buckets of weights with so many rows on all ranks."""
        if self.layout.whole_weights:
            return 1
        local = rows / (self.sharding.folded * self.sharding.tensor)
        return self.sharding.weight_buckets(int(local), weights * rows * self.width, self.step.bucket_bytes)

    def use(
        self, part: str, rows: float, buckets: int, weights: int, *, expand: int = 0, contract: int = 0,
        grads: bool = False, gathers: float = 0.0, scatters: float = 0.0, fetches: bool = True,
        received: float | None = None, axes: AxisNames = (), summed: tuple[Message, ...] = (),
    ) -> Pass:  # fmt: skip
        """A pass of `weights` weights, each [`rows` on all folded ranks, D].

        Args:
          part: name.
          rows: of one weight in one tensor shard.
          buckets: number of buckets, where weights move.
          weights: how many weights a bucket has.
          expand: number of products x w^T.
          contract: number of products h w.
          grads: whether gradients of the weights are computed, and sent.
          gathers, scatters: bytes per token that are all-gathered or reduce-scattered, where tokens move.
          fetches: whether the weights are read.
          received: elements of the weights that other ranks hold; None: those of the folded axes.
          axes: over which they are received; empty: the folded axes.
          summed: what is summed at the end.
        """
        sharding, folded, grads = self.sharding, self.sharding.folded, grads and self.trained
        tokens = sharding.tokens * (folded if self.moves_tokens else 1)
        buckets = self.token_buckets if self.moves_tokens else folded if self.rings else buckets
        used, chunk = self._shape(rows, buckets, tokens)
        times = tokens / chunk * (1 if self.moves_tokens else buckets)
        products = (
            Product(chunk, used, self.width, times * expand), Product(chunk, self.width, used, times * contract),
            Product(used, self.width, chunk, times * weights * grads),
        )  # fmt: skip
        fetched, sent = self._weight_messages(weights * rows, buckets, received, axes or self.axes.folded)
        moved = weights * rows * self.width / folded * (FLOAT32 + sharding.itemsize)
        return Pass(
            self.name, part, buckets, weights, used, chunk, tuple(product for product in products if product.times),
            bytes=moved * (fetches + grads), summed=summed,
            fetched=fetched * fetches + self._token_messages("all-gather", gathers),
            sent=sent * grads + self._token_messages("reduce-scatter", scatters),
        )  # fmt: skip

    def _shape(self, rows: float, buckets: int, tokens: float) -> tuple[float, float]:
        """(rows of a weight, tokens) of one product."""
        if self.moves_tokens:
            return rows / self.sharding.folded, tokens / self.token_buckets
        batch, used = self.sharding.batch, rows / buckets
        most = max(1, int(2 * self.step.bucket_bytes / (FLOAT32 * used))) // batch
        return used, batch * largest_divisor(self.sharding.seq_len // self.sharding.sequence, max(1, most))

    def _weight_messages(self, rows: float, buckets: int, received: float | None, axes: AxisNames):
        folded, sharding = self.sharding.folded, self.sharding
        if received is None:
            received = rows * self.width * (folded - 1) / folded
        if self.moves_tokens or not received:
            return (), ()
        count = folded - 1 if self.rings else buckets
        fetch, send = ("collective-permute",) * 2 if self.rings else ("all-gather", "reduce-scatter")
        return (
            (Message("weights", fetch, axes, received * sharding.itemsize, count),),
            (Message("weight_grads", send, axes, received * sharding.grad_itemsize, count),),
        )

    def _token_messages(self, collective: str, per_token: float) -> tuple[Message, ...]:
        if not (self.moves_tokens and per_token):
            return ()
        received = self.sharding.tokens_received(per_token)
        return (Message("activations", collective, self.axes.folded, received, self.token_buckets),)

    def tensor_sum(self, elements: float, itemsize: int, count: int = 1) -> tuple[Message, ...]:
        """All-reduces over tensor axes."""
        nbytes = count * self.sharding.tensor_sum_bytes(elements, itemsize)
        return (Message("tensor_sums", "all-reduce", self.axes.tensor, nbytes, count),) * (nbytes > 0)

    def output_sum(self) -> tuple[Message, ...]:
        """The all-reduce of partial outputs [B, t, D]."""
        return self.tensor_sum(self.sharding.tokens * self.width, self.sharding.itemsize)

    def replica_sum(self, elements: float) -> tuple[Message, ...]:
        """The all-reduce of gradients over the ranks that hold the same shard of the weights."""
        nbytes = self.sharding.replica_sum_bytes(elements)
        return (Message("replica_sums", "all-reduce", self.copies, nbytes),) * (nbytes > 0 and self.trained)


def step_passes(config: Config, layout: Layout, sizes: Mapping[str, int]) -> tuple[Block, ...]:
    """The passes of one micro-batch of a training step, in the order in which they run."""
    step, model = Step(config, layout, sizes), config.model
    attention = {window: _Attention(step, window) for window, _ in model.windows}
    mlp, embed, loss = (_Op(step, *names) for names in (("mlp", "mlp"), ("embed", "vocab"), ("loss", "vocab")))
    mlp_forward, mlp_repeated, mlp_backward = _mlp(mlp)
    forward = [Block("forward", n, (*attention[window].forward(), mlp_forward)) for window, n in model.windows]
    backward = [
        Block(
            "backward", n, (*attention[window].repeated(), *mlp_repeated, mlp_backward, *attention[window].backward())
        )
        for window, n in model.windows
    ]
    first, last = _embed(embed)
    last = Block("embed", 1, (last,)) if embed.trained else Block("embed", 0, ())
    return (Block("embed", 1, (first,)), *forward, Block("loss", 1, _loss(loss)), *backward, last)


def _mlp(op: _Op) -> tuple[Pass, tuple[Pass, ...], Pass]:
    """(forward, what backward repeats of it, backward)."""
    rows, item = op.step.d_ff, op.width * op.sharding.itemsize
    buckets, own = op.buckets(rows, 3), rows / op.sharding.tensor
    forward = op.use("mlp", own, buckets, 3, expand=2, contract=1, gathers=item, scatters=item, summed=op.output_sum())
    backward = op.use(
        "mlp", own, buckets, 3, expand=3, contract=2, grads=True, gathers=2 * item, scatters=item,
        summed=op.output_sum() + op.replica_sum(3 * rows * op.width),
    )  # fmt: skip
    again = repeats_mlp(op.config.model.norms != "pre", op.config.remat)
    return forward, (forward,) * again, backward


def _embed(op: _Op) -> tuple[Pass, Pass]:
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


def _loss(op: _Op) -> tuple[Pass, Pass]:
    """(forward, backward)."""
    rows, item, tokens = op.step.vocab_size, op.width * op.sharding.itemsize, op.sharding.tokens
    buckets, own = op.buckets(rows, 1), rows / op.sharding.tensor
    sums = op.tensor_sum(tokens, FLOAT32, 3) + op.tensor_sum(tokens, INT32)
    forward = op.use("loss", own, buckets, 1, expand=1, gathers=item + INT32 + 2 * FLOAT32, summed=sums)
    backward = op.use(
        "loss", own, buckets, 1, expand=1, contract=1, grads=True, gathers=item + INT32 + 3 * FLOAT32, scatters=item,
        summed=op.output_sum() + op.replica_sum(rows * op.width),
    )  # fmt: skip
    return forward, backward


class _Attention(_Op):
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
        self.again, self.twice = repeats, repeats_attention(step.config.remat)

    def project(self) -> tuple[Pass, Pass]:
        """To keys and values, and to queries."""
        item = self.width * self.sharding.itemsize
        settings = {"received": self.kv_received, "axes": self.kv_axes}
        keys = self.use("keys_values", self.kv_rows, self.kv_buckets, 2, expand=2, gathers=item, **settings)
        return keys, self.use("queries", self.query_rows, self.query_buckets, 1, expand=1)

    def project_backward(self) -> tuple[Pass, Pass]:
        """The gradients of queries, and of keys and values."""
        item, model = self.width * self.sharding.itemsize, self.config.model
        normed = int(model.qk_norm and model.qk_norm_width == "head" and not model.qkv_bias)
        settings = {"received": self.kv_received, "axes": self.kv_axes}
        replicas = self.replica_sum(2 * sum(self.heads.stored) * self.width)
        return (
            self.use(
                "queries", self.query_rows, self.query_buckets, 1, expand=normed, contract=1, grads=True,
                gathers=item, scatters=item,
            ),
            self.use(
                "keys_values", self.kv_rows, self.kv_buckets, 2, expand=normed, contract=2, grads=True,
                summed=self.output_sum() + replicas, **settings,
            ),
        )  # fmt: skip

    def out(self) -> Pass:
        """The output projection."""
        item = self.width * self.sharding.itemsize
        return self.use(
            "out", self.query_rows, self.query_buckets, 1, contract=1, scatters=item, summed=self.output_sum()
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
        pairs = tokens * keys_within(self.window, config.seq_len) * heads.query * heads.dim
        return Pass(
            self.name,
            "attend",
            buckets,
            attend=Attend(backward, pairs),
            fetched=fetched,
            sent=sent,
            bytes=0.0,
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
        return self.use("out", self.query_rows, self.query_buckets, 1, expand=1, grads=True, gathers=item)
