"""Gathering and scattering tokens over sequence axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, place_case
from tests.builders.ops import activations
from tsp_jax.ops.sequence import gather_sequence, scatter_sequence


@pytest.mark.parametrize("layout", ["single", "sp8", "two_axes2_4"])
def test_gather_sequence_puts_ranks_in_order(layout):
    placement = place_case(layout)
    spec = placement.layout.spec("batch", "sequence", None)

    def local(x, y):
        gathered = gather_sequence(x, y, axes=placement.layout.sequence)
        return tuple(array[None] for array in gathered)

    every = placement.layout.sequence or None
    out_spec = jax.sharding.PartitionSpec(every, *spec[:1])
    x, y = activations(0), activations(1)
    for array, full in zip(jax.jit(placement.shard_map(local, (spec, spec), out_spec))(x, y), (x, y), strict=True):
        np.testing.assert_array_equal(array, np.broadcast_to(full, array.shape))


@pytest.mark.parametrize("layout", ["single", "sp8", "two_axes2_4"])
def test_scatter_sequence_is_the_transpose_of_gather_sequence(layout):
    placement = place_case(layout)
    spec = placement.layout.spec("batch", "sequence", None)

    def by_scatter(x, c):
        del x
        return scatter_sequence(c * _rank(placement), c, axes=placement.layout.sequence)

    def by_transpose(x, c):
        _, vjp = jax.vjp(lambda *arrays: gather_sequence(*arrays, axes=placement.layout.sequence), x, x)
        return vjp((_vary(c * _rank(placement), placement), _vary(c, placement)))

    whole = placement.layout.spec("batch")
    run = [jax.jit(placement.shard_map(f, (spec, whole), (spec, spec))) for f in (by_scatter, by_transpose)]
    actual, desired = (f(activations(0), activations(1)) for f in run)
    assert_trees_near(actual, desired, F32_TOLERANCE)


def _rank(placement):
    """1 + this device's rank along the sequence, so that no two devices add the same."""
    axes = placement.layout.sequence
    return 1.0 + jax.lax.axis_index(axes).astype(jnp.float32) if axes else jnp.float32(1)


def _vary(x, placement):
    missing = set(placement.layout.sequence) - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x
