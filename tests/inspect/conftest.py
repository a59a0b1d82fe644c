"""A program with nested loops, compiled for eight virtual CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.builders.hlo import BUCKETS, LAYERS, D, compiled, ring, text_of
from tsp_jax import inspect


def nested(x, w):
    """Each of LAYERS layers gathers BUCKETS buckets, then sends, reduces in a branch, scatters."""

    def bucket(total, w_dD):
        with jax.named_scope("tsp/mlp/bucket"):
            return jnp.tanh(total @ lax.all_gather(w_dD, "tsp", axis=0, tiled=True)), None

    def layer(x, w):
        y, _ = lax.scan(bucket, x, w)
        y = ring(y)
        y = lax.cond(y[0, 0] > 0, lambda y: lax.psum(y, "data"), lambda y: 2 * y, y)
        with jax.named_scope("tsp/mlp/gradient"):
            g = lax.psum_scatter(jnp.concatenate([y, -y, 3 * y, y * y]), "tsp", tiled=True)
        return x + g, None

    return lax.scan(layer, x, w)[0]


@pytest.fixture(scope="module")
def program():
    shapes = (16, D), (LAYERS, BUCKETS, D, D)
    specs = (P("data"), P(None, None, "tsp"))
    return compiled(nested, specs, P("data"), *shapes)


@pytest.fixture(scope="module")
def module(program):
    return inspect.parse(text_of(program))
