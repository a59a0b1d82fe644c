"""Which tiles are visited and which need no mask, against every pair of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.attention import RULES, Case, S, allowed_pairs
from tsp_jax.ops.kernels.mask import LATEST, Scores, Tokens, may_attend, mean_visits, tiles_to_visit
from tsp_jax.training.data import sequence_order


def test_a_query_may_attend_to_no_later_and_no_foreign_key():
    queries = Tokens(np.array([[4, 4, 4, 4]]), np.array([[1, 1, 1, 1]]))
    keys = Tokens(np.array([[3, 4, 5, 3]]), np.array([[1, 1, 1, 2]]))
    np.testing.assert_array_equal(may_attend(queries, keys), [[True, True, False, False]])


@pytest.mark.parametrize("scores", [Scores(), Scores(window=5), Scores(causal=False), Scores(causal=False, window=5)])
@pytest.mark.parametrize("position", [-1, -LATEST])
def test_padding_attends_to_nothing_and_nothing_attends_to_it(position, scores):
    """The distance of a padding query from a padding key does not fit into 32 bits."""
    queries, keys = (Tokens(jnp.array([x]), jnp.zeros((1, 4), jnp.int32)) for x in ([3] * 3 + [position], [LATEST] * 4))
    assert not may_attend(queries, keys, scores).any()
    visit, unmasked = tiles_to_visit(queries, keys._replace(positions=jnp.array([[3, 3, 3, LATEST]])), 4, 4, scores)
    assert visit.all()
    assert not unmasked.any()


@pytest.mark.parametrize("scores", RULES.values(), ids=RULES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_tiles_are_visited_and_unmasked_exactly_when_pairs_say_so(packed, rank, scores):
    """With segments, a tile that is visited because of its bounds may turn out to hold no pair."""
    case, query_tile, key_tile = Case(ranks=4, rank=rank, packed=packed), 3, 6
    queries, keys = case.tokens()
    tokens = (Tokens(*map(jnp.asarray, x)) for x in (queries, keys))
    visit, unmasked = jax.device_get(tiles_to_visit(*tokens, query_tile, key_tile, scores))
    pairs = allowed_pairs(queries, keys, scores).reshape(case.batch, -1, query_tile, S // key_tile, key_tile)
    np.testing.assert_array_equal(unmasked, pairs.all(axis=(2, 4)))
    assert (visit >= pairs.any(axis=(2, 4))).all()
    if not packed:
        np.testing.assert_array_equal(visit, pairs.any(axis=(2, 4)))


def counted_visits(length: int, ranks: int, query_tile: int, key_tile: int, scores: Scores) -> np.ndarray:
    """[ranks, 2]: mean key tiles per query tile and query tiles per key tile, from the positions themselves."""
    order = sequence_order(length, ranks, "zigzag").astype(np.int32)
    keys, owns = Tokens.one_document(order[None]), order.reshape(ranks, -1)
    pairs = (allowed_pairs(Tokens.one_document(own[None]), keys, scores)[0] for own in owns)
    tiles = (p.reshape(-1, query_tile, length // key_tile, key_tile).any(axis=(1, 3)) for p in pairs)
    return np.array([[v.sum(axis=1).mean(), v.sum(axis=0).mean()] for v in tiles])


@pytest.mark.parametrize("scores", [Scores(), Scores(window=13), Scores(causal=False), Scores(causal=False, window=3)])
@pytest.mark.parametrize("tiles", [(4, 4), (2, 8), (8, 2), (8, 8), (1, 1)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_mean_visits_are_those_of_the_positions(ranks, tiles, scores):
    """Mean over the ranks; no tile is longer than a zigzag chunk."""
    length = 64
    expected = mean_visits(length // ranks, length, *tiles, scores)
    np.testing.assert_allclose(counted_visits(length, ranks, *tiles, scores).mean(axis=0), expected)
    assert expected[0] > 1
