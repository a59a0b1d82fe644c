"""The passes of a mixture of experts and of its router.

A pass goes through buckets of whole experts, or of tokens. The choices of an expert are multiplied in tiles, whose mean
number is that of balanced routers; see `tsp_jax.ops.experts`.

Dims: t tokens of a micro-batch on this device, D model, E experts, f this device's rows of an expert, k experts of a
token, n choices of a tile.
"""

from tsp_jax.config.experts import mean_tiles, tile_size
from tsp_jax.cost.op_passes import OpPasses, Pass, Product
from tsp_jax.cost.step import Step
from tsp_jax.cost.traffic import FLOAT32, INT32

_HIDDEN_BYTES = 10, 36
"""read and written of the hidden layer, by choice and row, in forward and in backward; as `passes._HIDDEN`"""
_ROUTER_BYTES = 28, 32
"""of scores and probabilities, by token and expert; counted in a program for MI300X (benchmarks/closed_forms.md)"""


def tile_products(tile: int, rows: float, width: int, tiles: float) -> tuple[Product, ...]:
    """Products of so many tiles in forward, of experts with `rows` rows on this device."""
    return Product(tile, 2 * rows, width, tiles), Product(tile, width, rows, tiles)


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
        self.tile = tile_size(int(self.bucket_tokens) * self.rule.per_token, self.rule.number)
        """n"""

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
        n, f, width, tiles = self.tile, self.experts.shard_rows, self.width, self.tiles
        if not grads:
            return tile_products(n, f, width, tiles)
        return (
            Product(n, 2 * f, width, tiles), Product(n, f, width, tiles), Product(n, width, 2 * f, tiles),
            Product(2 * f, width, n, tiles), Product(f, width, n, tiles),
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
        """Read and written by the tiles of a pass, besides their products.

        A tile copies its expert's weights, and its tokens; it adds its outputs, or its gradients, to float32 sums.
        """
        f, width, item = self.experts.shard_rows, self.width, self.sharding.itemsize
        weights = 3 * f * width * 2 * item
        rows = width * (2 * item + 3 * FLOAT32) + f * _HIDDEN_BYTES[backward]
        if backward:
            weights += 2 * f * width * 2 * item + 3 * f * width * 3 * FLOAT32  # gate and up joined; gradients
            rows += width * 2 * item  # dy
        return self.tiles * (weights + self.tile * rows)

    def _sum_bytes(self, part: Pass, backward: bool) -> float:
        """Of sums that start from zeros with each bucket: outputs or gradients of tokens, gradients of weights.

        Zeros are made for one of the three weights and copied for the others.
        """
        sums, grads = part.chunk * self.width * 4, part.weights * part.rows * self.width
        grads *= (5 / 3 + 3 * self.moves_tokens) * backward
        return part.buckets * (sums + grads) * FLOAT32

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
