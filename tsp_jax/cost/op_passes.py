"""One pass over an op's buckets: its products, what it fetches and sends, and its work in main memory.

Dims: t tokens of a micro-batch on this device, D model, H head; c tokens of a chunk, p rows of a bucket.
"""

from typing import NamedTuple

from tsp_jax.cost.step import Step
from tsp_jax.cost.traffic import FLOAT32
from tsp_jax.layout import AxisNames, largest_divisor


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
    dtype: str = ""
    """of the operands; empty: the compute dtype"""
    kernel: str = ""
    """as in `tsp_jax.hardware.rates.Work`"""


class Attend(NamedTuple):
    """The run of an attention kernel in a pass."""

    backward: bool
    pairs: float
    """pairs of query and key that may attend, times heads, times H; each product takes 2 operations per pair"""
    elements: float
    """of the queries"""
    ranks: int
    """that share the sequence, whose keys these queries attend to"""


class Pass(NamedTuple):
    """One pass over an op's buckets."""

    op: str
    """attention, router, experts, mlp, embed or loss"""
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
    fusible: float = 0.0
    """further such bytes, of work that only some compilers fuse into products"""
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


class OpPasses:
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
        row_bytes: float = 0.0, fusible: float = 0.0, token_bytes: float = 0.0,
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
          row_bytes: of elementwise work for each token and row of a weight; `fusible`: the same that may be fused.
          token_bytes: of elementwise work for each element of [B, t, D].
        """
        sharding, folded, grads = self.sharding, self.sharding.folded, grads and self.trained
        tokens = sharding.tokens * (folded if self.moves_tokens else 1)
        buckets = self.token_buckets if self.moves_tokens else folded if self.rings else buckets
        used, chunk = self._shape(rows, buckets, tokens)
        times = tokens / chunk * (1 if self.moves_tokens else buckets)
        products = self._products(used, chunk, times, expand, contract, weights * grads)
        fetched, sent = self._weight_messages(weights * rows, buckets, received, axes or self.axes.folded)
        elements = weights * rows * self.width
        own, whole = elements / folded, 0.0 if self.moves_tokens or folded == 1 else elements
        # A layer's weights are copied out of those of all layers and cast. Buckets are unpacked; in a loop from a copy.
        # Gradients are packed.
        unpacked = whole * 2 * sharding.itemsize * (2 if buckets > 1 else 1)
        moved = fetches * (own * (2 * FLOAT32 + FLOAT32 + sharding.itemsize) + unpacked)
        moved += grads * (own * (FLOAT32 + sharding.itemsize) + whole * (FLOAT32 + sharding.grad_itemsize))
        if contract and chunk < tokens and not self.moves_tokens:  # the sum over buckets, apart from the product
            moved += buckets * 3 * FLOAT32 * tokens * self.width
        made = tokens * rows / (folded if self.moves_tokens else 1)
        return Pass(
            self.name, part, buckets, weights, used, chunk, tuple(product for product in products if product.times),
            bytes=moved + made * row_bytes, summed=summed,
            fusible=made * fusible + tokens * self.width * token_bytes,
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

    def _products(
        self, rows: float, chunk: float, times: float, expand: int, contract: int, grads: int
    ) -> tuple[Product, ...]:
        """Of a pass, from the numbers of products x w^T, h w and gradients of w."""
        return (
            Product(chunk, rows, self.width, times * expand), Product(chunk, self.width, rows, times * contract),
            Product(rows, self.width, chunk, times * grads),
        )  # fmt: skip

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
