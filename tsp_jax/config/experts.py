"""A mixture of experts in place of the MLP of each layer."""

import dataclasses
import math
from typing import Literal, NamedTuple

from tsp_jax.config.checks import check
from tsp_jax.errors import ConfigError

RouterScores = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP of each layer: gated MLPs; each token is the input of a few."""

    number: int = 0
    """E, experts of each layer, each a gated MLP of width d_ff; 0: none, each layer has one MLP"""
    per_token: int = 2
    """k, experts that a token is the input of: those with the highest scores"""
    scores: RouterScores = "softmax"
    """what scores are of the router's logits: softmax over all experts, or sigmoid of each (DeepSeek-V3)"""
    normalize: bool = True
    """a token's weights, which are the scores of its experts, are divided by their sum"""
    scale: float = 1.0
    """factor of the weights"""
    router_bias: bool = False
    """the router's logits have biases (gpt-oss)"""
    biases: bool = False
    """the three projections of each expert have biases (gpt-oss)"""
    shared: int = 0
    """experts that every token is the input of, with weight 1; together they are one MLP of width shared x d_ff"""
    balance_loss: float = 0.0
    """coefficient of the balance loss of each layer, E times the sum over experts of the share of choices times the
    mean probability, over all tokens of a micro-batch but padding: 1 in balance. The loss adds those of all L layers.
    transformers has one loss of all layers together, k times as large: its coefficient times k / L is this one"""
    z_loss: float = 0.0
    """coefficient of each layer's mean squared log-partition of the router's logits"""
    bias_rate: float = 0.0
    """balance without a loss: experts are chosen by score plus a bias, which weights leave out; after each step the
    bias of an expert rises by this if it received less than its share of the choices, and falls by this if more. 0: no
    bias. arXiv 2408.15664 uses 0.001 with sigmoid scores"""

    def __post_init__(self):
        owner = "model.experts."
        check(owner, self, positive="per_token scale", not_negative="number shared balance_loss z_loss bias_rate")
        for field in dataclasses.fields(self):
            if not self.number and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(
                    f"{owner}{field.name}={value} has no effect with {owner}number=0; use {owner}number=8"
                )
        if self.number and self.per_token > self.number:
            raise ConfigError(
                f"{owner}per_token={self.per_token} is more than {owner}number={self.number}; "
                f"use {owner}per_token={self.number} at most"
            )


class Slabs(NamedTuple):
    """How large the tiles of a kernel of grouped products are, and how many tiles one call multiplies (a slab)."""

    smallest_tile: int
    largest_tile: int
    rows: int
    """most rows of a slab; 1: a slab is one tile"""

    @property
    def many(self) -> bool:
        """Whether a slab may hold many tiles: the first one then stands before the loop over the others."""
        return self.rows > 1

    def tile(self, choices: int, num_experts: int) -> int:
        """Choices of a tile, a power of two: half a tile, what an expert's last one wastes, is at most 15 % of them.

        `choices` are those of all experts. There are limits, so that few choices still are a product, and a product
        fits into caches.
        """
        most = max(1, int(0.3 * choices / num_experts))
        return min(self.largest_tile, max(self.smallest_tile, 1 << (most.bit_length() - 1)))

    def tiles(self, mean_tiles: float, tile: int) -> int:
        """Tiles of a slab, of a bucket that has `mean_tiles` on average: a quarter more, within limits."""
        return max(1, min(math.ceil(1.25 * mean_tiles), self.rows // tile))


SLABS = {"triton": Slabs(16, 128, 16384), "xla": Slabs(8, 512, 1)}
"""name of a kernel of `tsp_jax.ops.grouped` -> its slabs"""


KERNEL_MULTIPLE = 16
"""the kernel triton takes experts whose width, and rows on a device, are multiples of this"""


def mean_tiles(choices: int, num_experts: int, tile: int) -> float:
    """Mean number of tiles of an expert if all experts are chosen equally often: its last one is half full."""
    each = choices / num_experts
    return min(each, max(1.0, each / tile + 0.5))
