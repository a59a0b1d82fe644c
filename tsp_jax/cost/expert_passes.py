"""The passes of a mixture of experts and of its router.

A pass goes through buckets of whole experts, or of tokens. The choices of an expert are multiplied in tiles, whose mean
number is that of balanced routers; see `tsp_jax.ops.experts`.

On GPUs a kernel multiplies the tiles of a slab at once; see `tsp_jax.ops.grouped`.

Dims: t tokens of a micro-batch on this device, D model, E experts, f this device's rows of an expert, k experts of a
token, n choices of a tile.
"""

import math

from tsp_jax.config import StreamConfig
from tsp_jax.config.experts import TILES, mean_tiles, slab_tiles, tile_size
from tsp_jax.cost.op_passes import OpPasses, Pass, Product
from tsp_jax.cost.step import Step
from tsp_jax.cost.traffic import FLOAT32, INT32

_HIDDEN_BYTES = 10, 36
"""read and written of the hidden layer, by choice and row, in forward and in backward; as `passes._HIDDEN`"""
_ROUTER_BYTES = 28, 32
"""of scores and probabilities, by token and expert; counted in a program for MI300X (benchmarks/closed_forms.md)"""


def is_grouped(stream: StreamConfig, d_model: int, rows: int, itemsize: int) -> bool:
    """Whether the Triton kernel multiplies experts of these sizes. `auto` counts as on GPUs that have it."""
    return stream.expert_kernel != "xla" and itemsize == 2 and not (d_model % 16 or rows % 16)


def tile_products(rows: float, f: int, width: int, times: float, grouped: bool) -> tuple[Product, ...]:
    """Products of so many slabs of `rows` choices in forward, of experts with f rows on this device."""
    if grouped:
        return Product(rows, f, width, 2 * times, kernel="grouped"), Product(rows, width, f, times, kernel="grouped")
    return Product(rows, 2 * f, width, times), Product(rows, width, f, times)


class ExpertPasses(OpPasses):
    """The passes of one layer's experts, without shared ones, and of its router."""

    def __init__(self, step: Step):
        super().__init__(step, "experts", "mlp")
        self.experts, self.rule = step.experts, step.config.model.experts
        self.whole_buckets = step.expert_buckets()
        self.bucket_tokens = self.sharding.tokens
        """tokens whose choices are sorted at once"""
        if self.moves_tokens:
            self.bucket_tokens *= self.sharding.folded / self.token_buckets
        choices = int(self.bucket_tokens) * self.rule.per_token
        self.grouped = is_grouped(step.config.stream, self.width, self.experts.shard_rows, self.sharding.itemsize)
        """whether a kernel multiplies the tiles of a slab at once"""
        self.tile = tile_size(choices, self.rule.number, *TILES["triton" if self.grouped else "xla"])
        """n"""
        self.slab_rows = self.tile
        """rows that are multiplied at once, whether they hold choices or not"""
        self.slabs = self.tiles
        """number of slabs in a pass"""
        if self.grouped:
            passes = (
                self.token_buckets if self.moves_tokens else self.sharding.folded if self.rings else self.whole_buckets
            )
            mean = self.tiles / passes
            size = slab_tiles(mean, self.tile)
            self.slab_rows, self.slabs = size * self.tile, passes * math.ceil(mean / size)

    @property
    def routed(self) -> float:
        """Share of the MLPs' products of a token that are not those of shared experts."""
        return self.rule.per_token / (self.rule.per_token + self.rule.shared)

    @property
    def tiles(self) -> float:
        """Mean number of tiles in a pass. Each rank has its share of the experts, or all of them pass it."""
        each = mean_tiles(int(self.bucket_tokens) * self.rule.per_token, self.rule.number, self.tile)
        if self.moves_tokens:
            return self.token_buckets * each * self.rule.number / self.sharding.folded
        return each * self.rule.number

    def _shape(self, rows: float, buckets: int, tokens: float) -> tuple[float, float]:
        return (rows / self.sharding.folded if self.moves_tokens else rows / buckets), self.bucket_tokens

    def _products(
        self, rows: float, chunk: float, times: float, expand: int, contract: int, grads: int
    ) -> tuple[Product, ...]:
        """Those of all tiles. XLA makes one product of those with gate and up, whose operands they share."""
        f, width, slabs = self.experts.shard_rows, self.width, self.slabs
        n = self.tiles * self.tile / slabs
        forward = tile_products(n, f, width, slabs, self.grouped)
        if not grads:
            return forward
        if self.grouped:
            return (
                forward[0], Product(n, f, width, slabs, kernel="grouped"),
                Product(n, width, f, 5 * slabs, kernel="grouped"),
            )  # fmt: skip
        return (
            forward[0], Product(n, f, width, slabs), Product(n, width, 2 * f, slabs),
            Product(2 * f, width, n, slabs), Product(f, width, n, slabs),
        )  # fmt: skip

    def _pass(self, backward: bool) -> Pass:
        rows, item, per_token = self.step.expert_rows, self.sharding.itemsize, self.rule.per_token
        tokens, choice = self.width * item, per_token * (INT32 + FLOAT32)
        summed = self.output_sum()
        if backward:
            summed += self.tensor_sum(self.sharding.tokens * per_token, FLOAT32)
            summed += self.replica_sum(3 * rows * self.width)
        made = self.use(
            "experts", rows / self.sharding.tensor, self.whole_buckets, 3, expand=2 + backward, contract=1 + backward,
            grads=backward, gathers=(1 + backward) * tokens + choice,
            scatters=tokens + backward * per_token * FLOAT32, summed=summed,
        )  # fmt: skip
        return made._replace(bytes=made.bytes + self._tile_bytes(backward) + self._sum_bytes(made, backward))

    def _tile_bytes(self, backward: bool) -> float:
        """Read and written by the loop over choices, besides its products.

        Rows of tokens are copied, and outputs, or gradients of x, are put in their places. The hidden layer of forward
        is part of the kernel. Without it, a tile copies its expert's weights and adds its gradients to float32 sums.
        """
        f, width, item = self.experts.shard_rows, self.width, self.sharding.itemsize
        rows = width * (4 + 2 * backward) * item + f * _HIDDEN_BYTES[backward] * (backward or not self.grouped)
        nbytes = (self.slabs * self.slab_rows if self.grouped else self.tiles * self.tile) * rows
        if self.grouped:
            return nbytes
        weights = 3 * f * width * 2 * item
        if backward:
            weights += 2 * f * width * 2 * item + 3 * f * width * 3 * FLOAT32  # gate and up joined; gradients
        return nbytes + self.tiles * weights

    def _sum_bytes(self, part: Pass, backward: bool) -> float:
        """Of the outputs, or the gradients of x, of all choices: they start from zeros and are added at the end.

        And of the zeros with which the sums of a bucket's gradients start. They are made for one of the three weights
        and copied for the others.
        """
        times = part.buckets if self.moves_tokens else 1
        sums = times * part.chunk * self.width * (2 * self.rule.per_token + 2) * self.sharding.itemsize
        grads = part.buckets * part.weights * part.rows * self.width * (5 / 3 + 3 * self.moves_tokens) * FLOAT32
        return sums + grads * backward

    def router(self, backward: bool = False) -> Pass:
        """Scores, which backward needs again, and their gradients."""
        tokens, number = self.sharding.tokens, self.rule.number
        products = [Product(tokens, number, self.width, 1, "float32")]
        if backward:
            products = [
                Product(tokens, self.width, number, 1, "float32"), Product(number, self.width, tokens, 1, "float32")
            ]  # fmt: skip
        nbytes = tokens * number * _ROUTER_BYTES[backward]
        return Pass("router", "router", chunk=tokens, products=tuple(products), bytes=nbytes)

    def forward(self) -> tuple[Pass, ...]:
        """Of a layer."""
        return self.router(), self._pass(backward=False)

    def repeated(self) -> tuple[Pass, ...]:
        """What backward repeats, unless it repeats all of forward."""
        return (self.router(),) * (self.config.remat != "none")

    def backward(self) -> tuple[Pass, ...]:
        """Of a layer."""
        return self._pass(backward=True), self.router(backward=True)
