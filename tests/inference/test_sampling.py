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
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0, or lie in"),
        ({"temperature": float("nan")}, "temperature=nan must be 0, or lie in"),
        ({"temperature": float("inf")}, "temperature=inf must be 0, or lie in"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be 0, or lie in"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in"),
        ({"top_p": float("nan")}, r"top_p=nan must lie in"),
        ({"top_k": -1}, "top_k=-1 must be 0, or lie in"),
        ({"top_k": 2**31}, "top_k=2147483648 must be 0, or lie in"),
        ({"seed": -1}, "seed=-1 must be 0, or lie in"),
        ({"seed": 2**32}, r"seed=4294967296 must be 0, or lie in \[1, 4294967295\]"),
    ],
)
def test_sampling_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


def test_the_ends_of_the_ranges_draw_tokens():
    """Largest logits over the lowest temperature are finite; no two seeds are one."""
    logits, rows = jnp.asarray(LOGITS * 1e5), jnp.arange(2)
    for seed in (0, 2**32 - 1):
        drawn = sample(logits, row_keys(seed, rows, rows), Sampling(temperature=1e-6, seed=seed))
        assert drawn.tolist() == [1, 0]
    assert (row_keys(0, rows, rows) != row_keys(2**32 - 1, rows, rows)).all()
