"""Prefill and decode under every layout, against the plain mathematics on the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tsp_jax
from tests.builders.arrays import BF16_TOLERANCE, LAYOUT_CASES, UNUSUAL_CASES, place_case, relative_error
from tests.builders.serving import (
    BATCH,
    CAPACITY,
    CASES,
    CHUNK,
    LOGITS_TOLERANCE,
    MODELS,
    STEPS,
    STREAM,
    continued,
    greedy,
    logical_params,
    make_prompts,
    reference_logits,
    served,
)
from tsp_jax.inference import make_inference_program
from tsp_jax.inference.token_loop import prefill_prompts
from tsp_jax.ops import kernels

SERVED = [case for case in (*LAYOUT_CASES, *UNUSUAL_CASES) if BATCH % place_case(case).size("batch") == 0]
OTHER_CASES = [(case, model) for case in SERVED for model in MODELS if model != "wide" and (case, model) not in CASES]


def check(case: str, model: str) -> None:
    """Logits at every step, and so the likeliest tokens, are those of the whole forward."""
    prompts, tokens, logits, _ = continued(case, model)
    desired = reference_logits(model, [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)])
    for row, prompt in enumerate(prompts):
        expected = desired[row, len(prompt) - 1 : len(prompt) - 1 + STEPS]
        errors = [relative_error(logits[row, step], expected[step]) for step in range(STEPS)]
        assert max(errors) <= LOGITS_TOLERANCE, f"prompt of {len(prompt)} tokens: {errors}"
        assert tokens[row].tolist() == expected.argmax(axis=-1).tolist()


@pytest.mark.parametrize(("case", "model"), CASES)
def test_every_step_equals_the_whole_forward(case, model):
    check(case, model)


@pytest.mark.soak
@pytest.mark.parametrize(("case", "model"), OTHER_CASES)
def test_every_other_layout_and_model(case, model):
    check(case, model)


def test_one_device_is_one_device():
    """tsp 1 has nothing to fold, and is the program of `single` above."""
    alone = tsp_jax.place("tsp", tsp=1)
    assert dataclasses.replace(alone.layout, name="single") == place_case("single").layout


def test_every_layout_is_in_the_short_run():
    assert {case for case, _ in CASES} == set(SERVED)


def test_chunks_fill_the_cache_as_the_whole_prompt_does():
    prompts = make_prompts()
    (program, params), (whole, _) = served("tsp4", "odd_heads"), served("tsp4", "odd_heads", chunk=64)
    logits, cache = prefill_prompts(program, params, program.init_cache(), prompts)
    whole_logits, whole_cache = prefill_prompts(whole, params, whole.init_cache(), prompts)
    assert relative_error(logits, whole_logits) <= LOGITS_TOLERANCE
    for row, prompt in enumerate(prompts):
        (here, there) = (np.asarray(c.positions_BS)[row] for c in (cache, whole_cache))
        assert sorted(here)[: len(prompt)] == sorted(there)[: len(prompt)] == list(range(len(prompt)))
        entries, whole_entries = np.argsort(here)[: len(prompt)], np.argsort(there)[: len(prompt)]
        for array, whole_array in ((cache.k_LBKSH, whole_cache.k_LBKSH), (cache.v_LBKSH, whole_cache.v_LBKSH)):
            error = relative_error(
                np.asarray(array)[:, row, :, entries], np.asarray(whole_array)[:, row, :, whole_entries]
            )
            assert error <= LOGITS_TOLERANCE


def test_prefill_attends_by_the_kernel_that_is_chosen(monkeypatch):
    """Triton, interpreted, which needs one device; a sequence without a token in the second chunk, too."""
    monkeypatch.setattr(kernels, "choose_kernel", lambda *_: kernels.TritonKernel("interpret"))
    monkeypatch.setattr(kernels.XlaKernel, "attend", None)
    program = make_inference_program(
        MODELS["odd_heads"], place_case("single"),
        stream=STREAM, dtype="float32", batch=BATCH, capacity=CAPACITY, chunk=CHUNK,
    )  # fmt: skip
    prompts, params = make_prompts(), jax.tree.map(jnp.asarray, logical_params("odd_heads"))
    logits, _ = prefill_prompts(program, params, program.init_cache(), prompts)
    desired = reference_logits("odd_heads", prompts)
    for row, prompt in enumerate(prompts):
        assert relative_error(logits[row], desired[row, len(prompt) - 1]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize(("case", "model"), [("tsp4", "odd_heads"), ("tp4_sp2", "grouped")])
def test_a_second_turn_of_the_conversation_continues_the_cache(case, model):
    """Prefill, decode, prefill more: chunks start anywhere and end near the last slot, and one row gets nothing."""
    program, params = served(case, model)
    first, second = make_prompts((5, 50, 1, 33)), make_prompts((7, 55, 0, 2))
    logits, cache = prefill_prompts(program, params, program.init_cache(), first)
    tokens, _, cache = greedy(program, params, logits, cache, 6)
    logits, cache = prefill_prompts(program, params, cache, second)
    sequences = [[*a, *b, *c] for a, b, c in zip(first, tokens, second, strict=True)]
    desired = reference_logits(model, sequences)
    for row, sequence in enumerate(sequences):
        if second[row]:
            assert relative_error(logits[row], desired[row, len(sequence) - 1]) <= LOGITS_TOLERANCE
    more, seen, _ = greedy(program, params, logits.at[2].set(desired[2, len(sequences[2]) - 1]), cache, 3)
    desired = reference_logits(model, [[*a, *b] for a, b in zip(sequences, more, strict=True)])
    for row, sequence in enumerate(sequences):
        last = len(sequence) - 1
        assert relative_error(seen[row], desired[row, last : last + 3]) <= LOGITS_TOLERANCE


def test_sequences_that_have_ended_stay_as_they_are():
    program, params = served("tsp4", "odd_heads")
    logits, cache = prefill_prompts(program, params, program.init_cache(), make_prompts())
    before = np.asarray(cache.lengths_B), np.asarray(cache.positions_BS)
    tokens = np.array([3, -1, 4, -1], np.int32)
    logits, cache = program.decode(params, cache, jax.device_put(tokens, program.abstract_tokens.sharding))
    assert np.asarray(cache.lengths_B).tolist() == (before[0] + [1, 0, 1, 0]).tolist()
    changed = (np.asarray(cache.positions_BS) != before[1]).sum(axis=1)
    assert changed.tolist() == [1, 0, 1, 0]
    assert np.isfinite(logits).all()


@jax.numpy_dtype_promotion("standard")  # flax's RMSNorm promotes
def test_bfloat16_parameters_and_cache():
    program, params = served("tsp4", "odd_heads", dtype="bfloat16")
    assert {array.dtype for array in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert program.abstract_cache.k_LBKSH.dtype == jnp.dtype("bfloat16")
    prompts = make_prompts()
    logits, cache = prefill_prompts(program, params, program.init_cache(), prompts)
    tokens, logits, _ = greedy(program, params, logits, cache, 4)
    desired = reference_logits("odd_heads", [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)])
    for row, prompt in enumerate(prompts):
        assert relative_error(logits[row], desired[row, len(prompt) - 1 :][:4]) <= BF16_TOLERANCE
