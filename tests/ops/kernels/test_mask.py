"""Which tiles are visited and which need no mask, against every pair of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.attention import Case, S, allowed_pairs
from tsp_jax.ops.kernels.mask import Tokens, may_attend, mean_visits, tiles_to_visit
from tsp_jax.training.data import sequence_order


def test_a_query_may_attend_to_no_later_and_no_foreign_key():
    queries = Tokens(np.array([[4, 4, 4, 4]]), np.array([[1, 1, 1, 1]]))
    keys = Tokens(np.array([[3, 4, 5, 3]]), np.array([[1, 1, 1, 2]]))
    np.testing.assert_array_equal(may_attend(queries, keys), [[True, True, False, False]])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_tiles_are_visited_and_unmasked_exactly_when_pairs_say_so(packed, rank):
    """With segments, a tile that is visited because of its bounds may turn out to hold no pair."""
    case, query_tile, key_tile = Case(ranks=4, rank=rank, packed=packed), 4, 8
    queries, keys = case.tokens()
    tokens = (Tokens(*map(jnp.asarray, x)) for x in (queries, keys))
    visit, unmasked = jax.device_get(tiles_to_visit(*tokens, query_tile, key_tile))
    pairs = allowed_pairs(queries, keys).reshape(case.batch, -1, query_tile, S // key_tile, key_tile)
    np.testing.assert_array_equal(unmasked, pairs.all(axis=(2, 4)))
    assert (visit >= pairs.any(axis=(2, 4))).all()
    if not packed:
        np.testing.assert_array_equal(visit, pairs.any(axis=(2, 4)))


def counted_visits(length: int, ranks: int, query_tile: int, key_tile: int) -> np.ndarray:
    """[ranks, 2]: mean key tiles per query tile and query tiles per key tile, from the positions themselves."""
    order = sequence_order(length, ranks, "zigzag")
    first_k = order.reshape(-1, key_tile).min(axis=1)
    visit = [first_k[None] <= own.reshape(-1, query_tile).max(axis=1)[:, None] for own in order.reshape(ranks, -1)]
    return np.array([[v.sum(axis=1).mean(), v.sum(axis=0).mean()] for v in visit])


@pytest.mark.parametrize("tiles", [(4, 4), (2, 8), (8, 2), (8, 8), (1, 1)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_mean_visits_are_those_of_the_positions(ranks, tiles):
    """Mean over the ranks; no tile is longer than a zigzag chunk."""
    length = 64
    expected = mean_visits(length // ranks, length, *tiles)
    np.testing.assert_allclose(counted_visits(length, ranks, *tiles).mean(axis=0), expected)
    assert expected[0] > 1
