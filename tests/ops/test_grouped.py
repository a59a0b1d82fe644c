"""Products of rows that are grouped by expert: the Triton kernel, interpreted on a CPU, against one product a tile.

Dims: T tokens, D model, E experts, F ffn, k experts of a token.
"""

import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal
from tests.builders.ops import compiled_value_and_grads
from tsp_jax.ops.experts import ExpertBiases, experts
from tsp_jax.ops.grouped import Blocks, OneByOne, TritonGrouped
from tsp_jax.ops.router import Choices
from tsp_jax.ops.stream import Stream

T, D, E, F, K = 48, 64, 6, 48, 2


class Short(TritonGrouped):
    """Slabs of two tiles, so that there are several, and experts that two of them share."""

    def slab_tiles(self, mean_tiles: float, tile: int) -> int:
        return 2


def run(grouped, chosen, x, mix, *weights, buckets=2):
    """`weights`: three, or three and their biases."""

    def local(x, mix, gate, up, down, *biases):
        return experts(
            x[None], Choices(chosen, mix), gate, up, down, num_experts=E, stream=Stream(buckets=buckets), tile=16,
            grouped=grouped, biases=ExpertBiases(*biases) if biases else None,
            activation="clamped_swiglu" if biases else "silu",
        )  # fmt: skip

    return compiled_value_and_grads(local, normal(9, 1, T, D), x, mix, *weights)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("favourite", [None, 1])
@pytest.mark.parametrize("kind", [TritonGrouped, Short])
def test_triton_equals_one_product_a_tile(kind, favourite, biased):
    """Also where all tokens choose the same two experts, and no token the others."""
    chosen = np.argsort(normal(0, T, E), axis=1)[:, :K].astype(np.int32)[None]
    if favourite is not None:
        chosen = np.tile(np.array([favourite, 4], np.int32), (1, T, 1))
    args = normal(1, T, D), normal(2, 1, T, K), *(normal(seed, E * F, D, std=D**-0.5) for seed in (3, 4, 5))
    if biased:  # an expert's biases are the first F elements of a row of D
        biases = (normal(seed, E, D) * (np.arange(D) < F) for seed in (6, 7))
        args = *args, *(bias.astype(np.float32) for bias in biases), normal(8, E, D)
    grouped = kind("interpret", Blocks(16, 32, 4, 1))
    assert_trees_near(run(grouped, chosen, *args), run(OneByOne(), chosen, *args), F32_TOLERANCE)
