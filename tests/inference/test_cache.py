"""The KV cache: its size per device, and which rank keeps which token."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.builders.arrays import place_case
from tests.builders.serving import (
    BATCH,
    CAPACITY,
    CASES,
    MODELS,
    STEPS,
    config_of,
    continued,
    make_prompts,
    program_of,
    served,
)
from tsp_jax.cost.serving import cache_bytes
from tsp_jax.inference.cache import ENTRIES_MULTIPLE, assign_tokens
from tsp_jax.inference.token_loop import prefill_prompts
from tsp_jax.ops.attention.kv_cache import EMPTY, NO_TOKEN
from tsp_jax.training.data import sequence_order


@pytest.mark.parametrize("case", [case for case, _ in CASES])
def test_a_device_holds_its_share_of_the_cache_and_at_most_a_multiple_more(case):
    placement = place_case(case)
    program, ranks = program_of(case, "multi_head"), placement.size("sequence")
    sizes = dict.fromkeys(placement.layout.axis_names, 1) | dict(placement.mesh.shape)
    config = dataclasses.replace(config_of("multi_head"), batch=BATCH, seq_len=CAPACITY)
    share = cache_bytes(config, placement.layout, sizes)
    arrays = program.abstract_cache.key_values
    mine = sum(4 * math.prod(array.sharding.shard_shape(array.shape)) for array in arrays)
    assert share <= mine <= share * (1 + ENTRIES_MULTIPLE * ranks / CAPACITY)
    model = MODELS["multi_head"]
    total = 2 * model.num_layers * BATCH * CAPACITY * model.num_kv_heads * model.head_dim * 4
    shards = math.prod(placement.mesh.shape[axis] for axis in placement.layout.axes("heads").tensor)
    shards *= ranks * placement.size("batch")
    padding = {"mix3_2": 9 / 8}.get(case, 1)  # tensor shards do not divide the heads
    assert share == pytest.approx(padding * total / shards)


@pytest.mark.parametrize(("case", "model"), CASES)
def test_ranks_keep_equally_many_tokens_of_every_sequence(case, model):
    prompts, _, _, cache = continued(case, model)
    ranks = place_case(case).size("sequence")
    used = (np.asarray(cache.positions_BS).reshape(BATCH, ranks, -1) != EMPTY).sum(axis=-1)
    assert np.asarray(cache.lengths_B).tolist() == [len(prompt) + STEPS for prompt in prompts] == used.sum(1).tolist()
    assert (used.max(axis=1) - used.min(axis=1) <= 1).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_assign_tokens_gives_every_token_once_and_keeps_ranks_level(ranks):
    rng = np.random.default_rng(ranks)
    chunk = 4 * ranks
    starts, counts = rng.integers(0, 50, 20), rng.integers(0, chunk + 1, 20)
    for row, start, count in zip(assign_tokens(starts, counts, chunk, ranks), starts, counts, strict=True):
        is_token = row.reshape(ranks, -1) != NO_TOKEN
        assert sorted(row[row != NO_TOKEN]) == list(range(start, start + count))
        kept = [len(range(rank, start, ranks)) for rank in range(ranks)] + is_token.sum(axis=1)
        assert kept.max() - kept.min() <= 1
        assert (np.diff(is_token.astype(int), axis=1) <= 0).all(), "a rank's tokens come before its padding"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_whole_chunk_has_the_order_of_training(ranks):
    assert assign_tokens([0], [48], 48, ranks)[0].tolist() == sequence_order(48, ranks, "zigzag").tolist()


def test_prefill_and_decode_donate_the_cache():
    program, params = served("tsp4", "odd_heads")
    empty = program.init_cache()
    logits, cache = prefill_prompts(program, params, empty, make_prompts())
    assert all(array.is_deleted() for array in empty.key_values)
    tokens = np.asarray(logits).argmax(axis=-1).astype(np.int32)
    program.decode(params, cache, jax.device_put(tokens, program.abstract_tokens.sharding))
    assert all(array.is_deleted() for array in cache.key_values)
