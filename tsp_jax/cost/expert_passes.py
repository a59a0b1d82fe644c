"""The passes of a mixture of experts and of its router.

A pass goes through buckets of whole experts, or of tokens. The choices of an expert are cut into tiles, whose mean
number is that of balanced routers. A slab holds some tiles: one, or by a kernel of grouped products those of most
buckets. See `tsp_jax.ops.experts` and `tsp_jax.ops.grouped`.

Dims: t tokens of a micro-batch on this device, D model, E experts, f this device's rows of an expert, k experts of a
token, n choices of a tile, N rows of a slab.
"""

import math

from tsp_jax.config.experts import SLABS, mean_tiles
from tsp_jax.cost.op_passes import OpPasses, Pass, Product
from tsp_jax.cost.step import Step
from tsp_jax.cost.traffic import FLOAT32, INT32

_HIDDEN_BYTES = 10, 36
"""read and written of the hidden layer, by choice and row, in forward and in backward; as `passes._HIDDEN`"""
_ROUTER_BYTES = 28, 32
"""of scores and probabilities, by token and expert; counted in a program for MI300X (benchmarks/closed_forms.md)"""


class Tiling:
    """How the choices of a pass are cut into tiles and slabs.

    Args:
      kernel: `StreamConfig.expert_kernel`; auto: one product a tile.
      choices: those that are sorted at once.
      num_experts: E.
      share: of the experts that this device computes, of 1.
      sorts: how often choices are sorted in a pass.
      buckets: of the experts, for each time.
    """

    def __init__(
        self, kernel: str, choices: int, num_experts: int, *, share: float = 1.0, sorts: int = 1, buckets: int = 1
    ):
        self.grouped = kernel not in ("auto", "xla")
        """whether a kernel multiplies all tiles of a slab at once"""
        slabs = SLABS[kernel if self.grouped else "xla"]
        self.tile = slabs.tile(choices, num_experts)
        """n"""
        each = mean_tiles(choices, num_experts, self.tile) * num_experts * share / buckets
        self.tiles = sorts * buckets * each
        """mean number of tiles in a pass"""
        self.slab_tiles = slabs.tiles(each, self.tile)
        """of one slab"""
        self.expert_rows = mean_tiles(choices, num_experts, self.tile) * self.tile
        """mean number of rows of an expert in a pass over its choices"""
        self.slabs = sorts * buckets * math.ceil(each / self.slab_tiles) if self.grouped else self.tiles
        """mean number of slabs in a pass"""

    @property
    def slab_rows(self) -> int:
        """N"""
        return self.slab_tiles * self.tile

    def products(self, rows: float, width: int, backward: bool = False) -> tuple[Product, ...]:
        """Products of all slabs, of experts with `rows` rows on this device.

        XLA makes one product of those with gate and up, whose operands they share.
        """
        m, f, kernel = self.tiles * self.tile / self.slabs, rows, "grouped" if self.grouped else ""
        if not backward:
            return Product(m, 2 * f, width, self.slabs, "", kernel), Product(m, width, f, self.slabs, "", kernel)
        each = min(m, self.expert_rows)  # gradients of all experts as one product over the rows of each
        f_all = f * m / each
        return (
            Product(m, 2 * f, width, self.slabs, "", kernel), Product(m, f, width, self.slabs, "", kernel),
            Product(m, width, 2 * f, self.slabs, "", kernel),
            Product(2 * f_all, width, each, self.slabs, "", kernel),
            Product(f_all, width, each, self.slabs, "", kernel),
        )  # fmt: skip


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
        self.tiling = Tiling(
            self.config.stream.expert_kernel, int(self.bucket_tokens) * self.rule.per_token, self.rule.number,
            share=1 / self.sharding.folded if self.moves_tokens else 1.0,
            sorts=self.token_buckets if self.moves_tokens else 1,
            buckets=1 if self.moves_tokens else self.sharding.folded if self.rings else self.whole_buckets,
        )  # fmt: skip

    @property
    def routed(self) -> float:
        """Share of the MLPs' products of a token that are not those of shared experts."""
        return self.rule.per_token / (self.rule.per_token + self.rule.shared)

    def _shape(self, rows: float, buckets: int, tokens: float) -> tuple[float, float]:
        return (rows / self.sharding.folded if self.moves_tokens else rows / buckets), self.bucket_tokens

    def _products(
        self, rows: float, chunk: float, times: float, expand: int, contract: int, grads: int
    ) -> tuple[Product, ...]:
        """Those of all slabs."""
        return self.tiling.products(self.experts.shard_rows, self.width, bool(grads))

    def _pass(self, backward: bool) -> Pass:
        item, per_token, rows = self.sharding.itemsize, self.rule.per_token, self.step.moved_rows / 3
        tokens, choice = self.width * item, per_token * (INT32 + FLOAT32)
        summed = self.output_sum()
        if backward:
            summed += self.tensor_sum(self.sharding.tokens * per_token, FLOAT32)
            summed += self.replica_sum(self.step.moved_rows * self.width)
        made = self.use(
            "experts", rows / self.sharding.tensor, self.whole_buckets, 3, expand=2 + backward, contract=1 + backward,
            grads=backward, gathers=(1 + backward) * tokens + choice,
            scatters=tokens + backward * per_token * FLOAT32, summed=summed,
        )  # fmt: skip
        return made._replace(bytes=made.bytes + self._slab_bytes(backward) + self._sum_bytes(made, backward))

    def _slab_bytes(self, backward: bool) -> float:
        """Read and written by the slabs of a pass, besides their products.

        Tokens are copied, and results written in the order of choices. Without a kernel, a tile copies its expert's
        weights, and gradients are added to float32 sums; a kernel writes them once.
        """
        f, width, item = self.experts.shard_rows, self.width, self.sharding.itemsize
        rows = width * 2 * item * (2 + backward)  # x, the results; dy
        rows += f * (_HIDDEN_BYTES[backward] if backward or not self.tiling.grouped else 0)
        total = self.tiling.tiles * self.tiling.tile * rows
        experts = self.experts.stored_experts / (self.sharding.folded if self.moves_tokens else 1)
        if not self.tiling.grouped:
            total += self.tiling.tiles * (3 + 2 * backward) * f * width * 2 * item  # gate and up joined
            experts = self.tiling.tiles
        return total + backward * experts * 3 * f * width * (1 if self.tiling.grouped else 2) * FLOAT32

    def _sum_bytes(self, part: Pass, backward: bool) -> float:
        """Of sums: [t, k, D] starts from zeros and is added up once.

        Gradients start from zeros with each bucket, of which two are copies; not those that a kernel writes.
        """
        choices = self._summed_tokens * self.rule.per_token * self.width * 2 * self.sharding.itemsize
        total = choices + self._summed_tokens * self.width * FLOAT32
        times = 5 / 3 * (not self.tiling.grouped) + 3 * self.moves_tokens
        grads = part.weights * part.rows * self.width * times * FLOAT32
        return total + backward * part.buckets * grads

    @property
    def _summed_tokens(self) -> float:
        """Tokens whose choices' outputs a pass adds up."""
        return self.bucket_tokens * (self.token_buckets if self.moves_tokens else 1)

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
