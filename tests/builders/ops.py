"""What tests of single ops share: sizes, inputs, layouts x movements, values with gradients.

Inputs differ at every position and row, and no two dimensions of a device's shards are equal, so that neither a
reversed ring nor a transposition can pass.

Dims: B batch, S tokens, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import normal

B, S, D, V = 2, 48, 20, 72
FOLDED = ("tsp3", "tsp8", "data2_tsp4", "mix2_4", "two_axes2_4", "two_level2_4")
"""one folded axis (tsp3, tsp8), and each combination of roles"""
MOVEMENT_LAYOUTS = {
    "gather": ("single", "tp8", "tp2_sp4", "tsp2", *FOLDED),
    "ring": ("tsp2", *FOLDED),
    "activations": FOLDED,
}
over_streams = pytest.mark.parametrize(
    ("layout", "movement"),
    [(layout, movement) for movement in MOVEMENT_LAYOUTS for layout in MOVEMENT_LAYOUTS[movement]],
)

PADDED_STREAMS = [
    ("tp8", "gather"),
    *((layout, movement) for layout in ("tsp8", "mix2_4") for movement in MOVEMENT_LAYOUTS),
]
"""(layout, movement) of weights whose last rows are padding"""


def value_and_grads(f, cotangent, *args):
    """(outputs, gradients of every argument) for a fixed cotangent."""
    primals, vjp = jax.vjp(f, *args)
    return primals, vjp(jax.tree.map(lambda c, p: jnp.asarray(c, p.dtype), cotangent, primals))


def compiled_value_and_grads(f, cotangent, *args):
    """`value_and_grads` in one compiled program, on the host."""
    return jax.device_get(jax.jit(functools.partial(value_and_grads, f, cotangent))(*args))


def activations(seed: int) -> np.ndarray:
    """[B, S, D] normals."""
    return normal(seed, B, S, D)


def ids(low: int = 0, high: int = V) -> np.ndarray:
    """[B, S] int32 in [low, high)."""
    return np.random.default_rng(3).integers(low, high, (B, S)).astype(np.int32)
