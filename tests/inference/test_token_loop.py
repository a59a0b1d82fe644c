"""Generation from prompts of token ids: the loop, its counts, and refusals."""

import dataclasses
import time

import jax
import pytest

from tests.builders.arrays import place_case
from tests.builders.serving import MODELS, STREAM, continued, make_prompts, served
from tsp_jax.errors import ConfigError
from tsp_jax.inference import Sampling, Stats, generate_tokens, make_inference_program


def test_generate_continues_prompts_by_their_likeliest_tokens():
    program, params = served("tsp4", "odd_heads")
    _, tokens, _, _ = continued("tsp4", "odd_heads")
    calls = []
    prompts = [*make_prompts(), make_prompts()[1]]  # one more than the batch
    new = generate_tokens(program, params, prompts, max_new_tokens=20, on_token=lambda *call: calls.append(call))
    assert new == [*tokens[:, :20].tolist(), tokens[1, :20].tolist()]
    assert [[token for row, token in calls if row == n] for n in range(5)] == new
    assert [row for row, _ in calls[:8]] == [0, 1, 2, 3, 0, 1, 2, 3], "as they come"


def test_generate_counts_what_it_did():
    program, params = served("tsp4", "odd_heads")
    prompts = [*make_prompts(), make_prompts()[1]]
    full = generate_tokens(program, params, prompts, max_new_tokens=20, stats=(stats := Stats()))
    assert (stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens) == (sum(map(len, prompts)), 100, 95)
    assert stats.prefill_s > 0 < stats.decode_s
    stopped = generate_tokens(program, params, prompts, max_new_tokens=20, stop_tokens=full[0][3:4], stats=stats)
    assert stats.new_tokens == 100 + sum(map(len, stopped)) < 200


def test_decoding_has_its_own_time_where_dispatching_waits_for_the_device():
    program, params = served("tsp4", "odd_heads")

    def waits(*args):
        time.sleep(0.3)
        return jax.block_until_ready(program.decode(*args))

    slow = dataclasses.replace(program, decode=waits)
    generate_tokens(slow, params, make_prompts(), max_new_tokens=3, stats=(stats := Stats()))
    assert stats.decode_s > 0.5, "two steps"


def test_generate_ends_a_sequence_at_its_stop_token():
    program, params = served("tsp4", "odd_heads")
    full = generate_tokens(program, params, make_prompts(), max_new_tokens=20)
    stops = [full[0][3], full[1][7]]
    stopped = generate_tokens(program, params, make_prompts(), max_new_tokens=20, stop_tokens=stops)
    for row, tokens in enumerate(full):
        ends = [place for place, token in enumerate(tokens) if token in stops]
        assert stopped[row] == tokens[: ends[0] + 1 if ends else None]
    assert any(len(tokens) < 20 for tokens in stopped)


def test_a_draw_depends_on_seed_prompt_and_place_alone():
    program, params = served("tsp4", "odd_heads")
    prompts, hot = make_prompts(), Sampling(temperature=2.0, seed=3)
    drawn = generate_tokens(program, params, prompts, max_new_tokens=8, sampling=hot)
    assert generate_tokens(program, params, prompts[:2], max_new_tokens=8, sampling=hot) == drawn[:2]
    assert (
        generate_tokens(program, params, prompts, max_new_tokens=8, sampling=dataclasses.replace(hot, seed=4)) != drawn
    )
    assert generate_tokens(program, params, prompts, max_new_tokens=8) != drawn


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1], []], 4, r"prompts\[1\] is empty"),
        ([[1] * 100], 29, "capacity=128 is too small for the 100 tokens of .*; use capacity=129"),
        ([[1]], 0, "max_new_tokens=0 must be positive"),
        ([], 4, "is empty; use at least one prompt"),
        ([[1], [70, 71]], 4, r"prompts\[1\] has token id 71, which is unknown; use 0 to 70"),
        ([[-1]], 4, "has token id -1, which is unknown"),
    ],
)
def test_generate_refuses(prompts, max_new_tokens, message):
    program, params = served("tsp4", "odd_heads")
    with pytest.raises(ConfigError, match=message):
        generate_tokens(program, params, prompts, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 42}, "chunk=42 is not divisible by 4 over tsp; use 44"),
        ({"batch": 3}, "batch=3 is not divisible by 2 over data; use 4"),
        ({"capacity": 0}, "capacity=0 must be positive"),
        ({"dtype": "float16"}, "dtype=float16 is unknown; use one of float32, bfloat16"),
    ],
)
def test_program_refuses(changes, message):
    sizes = {"batch": 4, "capacity": 64, "chunk": 16} | changes
    with pytest.raises(ConfigError, match=message):
        make_inference_program(MODELS["grouped"], place_case("data2_tsp4"), stream=STREAM, **sizes)
