"""The loop over layers whose kinds repeat, against a plain loop: carry, outputs, gradients, and reading by place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import normal
from tsp_jax.models.scan import last_place, scan_layers

L = 7
PERIODS = pytest.mark.parametrize("period", [1, 2, 3, 7])
"""after whole periods of 2 there is 1 layer more; of 3, also 1; of 7, none; of 1, none"""
ARRAYS, XS = normal(0, L, 4), normal(1, L, 4)


def step(place, carry, array, x):
    """What it returns depends on the kind of the layer, its number, and the order of layers."""
    carry = jnp.tanh(carry * (place.number + 1.5) + array + x * place.layer.astype(jnp.float32))
    return carry, {"y": carry * x}


def looped(carry, arrays, xs, period, reverse):
    carry, outputs = scan_layers(step, carry, arrays, period=period, xs=xs, reverse=reverse)
    return carry, outputs.joined()["y"]


def plain(carry, arrays, xs, period, reverse):
    outputs = [carry] * L
    for index in reversed(range(L)) if reverse else range(L):
        carry = jnp.tanh(carry * (index % period + 1.5) + arrays[index] + xs[index] * index)
        outputs[index] = carry * xs[index]
    return carry, jnp.stack(outputs)


@PERIODS
@pytest.mark.parametrize("reverse", [False, True])
def test_loop_equals_a_plain_loop(period, reverse):
    def value_and_grads(loop):
        def f(carry, xs):
            return loop(carry, ARRAYS, xs, period, reverse)

        value, vjp = jax.vjp(f, normal(2, 4), jnp.asarray(XS))
        return value, vjp((normal(3, 4), normal(4, L, 4)))

    got, wanted = (jax.jit(lambda loop=loop: value_and_grads(loop))() for loop in (looped, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-5), got, wanted)


@PERIODS
def test_outputs_are_read_by_place_one_layer_ahead(period):
    """Backward fetches what forward has kept of the layer before the one that it differentiates."""

    def keep(place, carry, array, x):
        return carry, array

    def use(place, carry, array, x):
        found, ahead = carry
        return (found + (ahead == array).all().astype(jnp.int32), kept.read(place.before)), ahead

    _, kept = scan_layers(keep, jnp.zeros(()), ARRAYS, period=period)
    carry = jnp.zeros((), jnp.int32), kept.read(last_place(L, period))
    (found, _), _ = scan_layers(use, carry, ARRAYS, period=period, reverse=True)
    assert found == L
