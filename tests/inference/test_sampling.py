"""Sampling: filters of logits, draws, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.inference import Sampling, sample
from tsp_jax.inference.sampling import filter_top_k, filter_top_p, row_keys

LOGITS = np.log(np.array([[0.1, 0.4, 0.05, 0.25, 0.2], [0.6, 0.1, 0.1, 0.15, 0.05]], np.float32))


def kept(logits) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


def test_top_k_keeps_the_likeliest():
    assert kept(filter_top_k(jnp.asarray(LOGITS), 2)) == [[1, 3], [0, 3]]
    assert kept(filter_top_k(jnp.asarray(LOGITS), 0)) == kept(filter_top_k(jnp.asarray(LOGITS), 9)) == [[*range(5)]] * 2


def test_top_p_keeps_the_fewest_that_reach_the_sum():
    assert kept(filter_top_p(jnp.asarray(LOGITS), 0.6)) == [[1, 3], [0]]
    assert kept(filter_top_p(jnp.asarray(LOGITS), 0.01)) == [[1], [0]]
    assert kept(filter_top_p(jnp.asarray(LOGITS), 1.0)) == [[*range(5)]] * 2


def test_draws_follow_the_probabilities():
    rows = 4000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (rows, 5))
    numbers = jnp.arange(rows, dtype=jnp.int32)
    drawn = jax.jit(lambda: sample(logits, row_keys(0, numbers, numbers), Sampling(temperature=0.5, top_k=3)))()
    desired = np.where(np.isin(range(5), [1, 3, 4]), np.exp(LOGITS[0]) ** 2, 0)  # half the temperature squares them
    shares = np.bincount(np.asarray(drawn), minlength=5) / rows
    assert np.abs(shares - desired / desired.sum()).max() < 0.03  # four standard deviations
    assert sample(jnp.asarray(LOGITS), row_keys(0, numbers[:2], numbers[:2]), Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"temperature": -1.0}, "temperature=-1.0 must not be negative"), ({"top_p": 0.0}, r"top_p=0.0 must lie in")],
)
def test_sampling_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)
