"""Closed forms of memory in serving against what compiled programs take."""

import dataclasses

import pytest

from tests.builders.arrays import LAYOUT_CASES
from tests.builders.steps import CONFIG
from tsp_jax.cost.serving import serving_memory
from tsp_jax.hardware.memory import shard_bytes
from tsp_jax.inference.program import make_inference_program
from tsp_jax.layout import place

SERVED = dataclasses.replace(CONFIG, seq_len=1024, batch=2, compute_dtype="bfloat16")


def on(case: str, **settings) -> dict[str, float]:
    layout, sizes = LAYOUT_CASES[case]
    return serving_memory(SERVED, layout, dict.fromkeys(layout.axis_names, 1) | sizes, **settings)


@pytest.mark.parametrize("case", ["tsp8", "tp8", "tp2_sp4", "fsdp_cp8"])
def test_weights_and_cache_are_what_a_program_takes(case):
    """The closed form leaves out the norms' scales."""
    layout, sizes = LAYOUT_CASES[case]
    program = make_inference_program(
        SERVED.model, place(layout, **sizes), stream=SERVED.stream, dtype="bfloat16", batch=2, capacity=1024, chunk=64
    )
    found, norms = on(case), 2 * (2 * SERVED.model.num_layers + 1) * SERVED.model.d_model
    assert found["weights"] == shard_bytes(program.abstract_params) - norms
    assert found["cache"] == pytest.approx(shard_bytes(program.abstract_cache), abs=64)


def test_decode_reads_one_layer_and_prefill_copies_the_cache():
    decode, prefill = on("tsp8"), on("tsp8", chunk=512)
    assert prefill["cache_copy"] == SERVED.model.num_layers * decode["cache_copy"] > 0
    assert decode["keys_values"] == 0 < prefill["keys_values"]
    assert prefill["activations"] > on("tsp8", chunk=256)["activations"] > decode["activations"]
