"""RoPE that depends on the length of a sequence (longrope): which sequences a program serves, and their logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import place_case, relative_error
from tests.builders.serving import LOGITS_TOLERANCE, MODELS, STREAM, logical_params, make_prompts
from tsp_jax.config import RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.inference import Model, generate, generate_tokens, make_inference_program
from tsp_jax.inference.token_loop import prefill_prompts
from tsp_jax.ops import reference
from tsp_jax.stored import to_stored

CONTEXT, STEPS = 32, 3
SCALING = RopeScaling(
    kind="longrope", factor=4.0, original_context=CONTEXT, short_factors=(1.0, 1.1, 1.3, 1.6, 2.0),
    long_factors=(1.5, 2.0, 3.0, 5.0, 9.0),
)  # fmt: skip
MODEL = dataclasses.replace(MODELS["multi_head"], rope_scaling=SCALING)


def program_of(capacity: int, case: str = "tsp4"):
    return make_inference_program(
        MODEL, place_case(case), stream=STREAM, dtype="float32", batch=1, capacity=capacity, chunk=16
    )


def expected_logits(tokens: list[int]) -> np.ndarray:
    """[T, V] of one sequence, whose RoPE is that of its length."""
    tokens_1T = jnp.asarray([tokens], jnp.int32)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    params = logical_params("multi_head")
    x_1TD, table_VD, _ = reference.decoder(params, tokens_1T, positions, jnp.zeros_like(positions), config=MODEL)
    return np.asarray(x_1TD @ table_VD.T)[0]


@pytest.mark.parametrize(("capacity", "length"), [(CONTEXT, CONTEXT - STEPS), (CONTEXT + 8, CONTEXT + 1)])
def test_logits_are_those_of_the_sequences_length(capacity, length):
    program, (prompt,) = program_of(capacity), make_prompts((length,))
    shardings = jax.tree.map(lambda array: array.sharding, program.abstract_params)
    params = program.cast_params(jax.device_put(to_stored(program.paddings, logical_params("multi_head")), shardings))
    logits, cache = prefill_prompts(program, params, program.init_cache(), [prompt])
    written = list(prompt)
    for _ in range(STEPS):
        assert relative_error(logits[0], expected_logits(written)[-1]) <= LOGITS_TOLERANCE
        written.append(int(np.asarray(logits[0]).argmax()))
        token = jax.device_put(np.asarray(written[-1:], np.int32), program.abstract_tokens.sharding)
        logits, cache = program.decode(params, cache, token)


def test_a_program_serves_one_side_of_the_context():
    below, beyond = program_of(CONTEXT, "single"), program_of(CONTEXT + 1, "single")
    assert (below.capacity, below.shortest) == (CONTEXT, 1)
    assert (beyond.capacity > CONTEXT, beyond.shortest) == (True, CONTEXT + 1)
    with pytest.raises(ConfigError, match=r"prompts\[0\] has 9 tokens, .* at least 33 \(longrope\); use .* at most 32"):
        generate_tokens(beyond, {}, make_prompts((9,)), max_new_tokens=1)


@pytest.mark.parametrize(
    ("lengths", "max_new_tokens", "capacity"), [((9,), CONTEXT, 0), ((33, 9), 4, 0), ((9,), 4, CONTEXT + 1)]
)
def test_sequences_that_would_cross_the_context_are_refused_before_compiling(lengths, max_new_tokens, capacity):
    model = Model(config=MODEL, placement=place_case("single"), params={})
    with pytest.raises(ConfigError, match=r"has 9 tokens, .* use prompts and max_new_tokens of at most 32 tokens"):
        generate(model, make_prompts(lengths), max_new_tokens=max_new_tokens, capacity=capacity)
