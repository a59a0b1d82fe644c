"""Closed forms of memory in serving against what compiled programs take."""

import dataclasses

import pytest

from tests.builders.arrays import LAYOUT_CASES
from tests.builders.steps import CONFIG
from tsp_jax.config import Config, ExpertsConfig
from tsp_jax.cost.serving import decode_bytes, decode_products, serving_memory
from tsp_jax.hardware.memory import shard_bytes
from tsp_jax.inference.program import make_inference_program
from tsp_jax.layout import place

SERVED = dataclasses.replace(CONFIG, seq_len=1024, batch=2, compute_dtype="bfloat16")


MIXTURE = dataclasses.replace(
    SERVED, model=dataclasses.replace(CONFIG.model, d_ff=16, experts=ExpertsConfig(number=12, per_token=2, shared=1))
)
"""twelve experts, which are padded on 8 ranks"""


def on(case: str, config: Config = SERVED, **settings) -> dict[str, float]:
    layout, sizes = LAYOUT_CASES[case]
    return serving_memory(config, layout, dict.fromkeys(layout.axis_names, 1) | sizes, **settings)


@pytest.mark.parametrize("config", [SERVED, MIXTURE], ids=["mlp", "experts"])
@pytest.mark.parametrize("case", ["tsp8", "tp8", "tp2_sp4", "fsdp_cp8"])
def test_weights_and_cache_are_what_a_program_takes(case, config):
    """The closed form leaves out the norms' scales."""
    layout, sizes = LAYOUT_CASES[case]
    program = make_inference_program(
        config.model, place(layout, **sizes), stream=SERVED.stream, dtype="bfloat16", batch=2, capacity=1024, chunk=64
    )
    found, norms = on(case, config), 2 * (2 * SERVED.model.num_layers + 1) * SERVED.model.d_model
    assert found["weights"] == shard_bytes(program.abstract_params) - norms
    assert found["cache"] == pytest.approx(shard_bytes(program.abstract_cache), abs=64)


def test_decode_copies_one_layer_of_the_cache_and_prefill_none():
    decode, prefill = on("tsp8"), on("tsp8", chunk=512)
    assert prefill["cache_copy"] == 0 < decode["cache_copy"] < decode["cache"] / SERVED.model.num_layers
    assert decode["keys_values"] == 0 < prefill["keys_values"]
    assert prefill["activations"] > on("tsp8", chunk=256)["activations"] > decode["activations"]


@pytest.mark.parametrize(("case", "share"), [("tsp8", 1), ("tp8", 8)])
def test_decode_multiplies_the_choices_of_its_own_experts_or_a_part_of_all(case, share):
    """Two sequences choose four experts, a tile each: half of one on each of 8 ranks, or an eighth of each of four."""
    layout, sizes = LAYOUT_CASES[case]
    sizes = dict.fromkeys(layout.axis_names, 1) | sizes
    up, down = decode_products(MIXTURE, layout, sizes)
    assert (up.m, up.n, up.times) == (8, 2 * 16 / share, 4 * share / 8)
    assert (down.m, down.k, down.times) == (8, 16 / share, 4 * share / 8)
    assert not decode_products(SERVED, layout, sizes)


def test_decode_multiplies_a_slab_of_tiles_where_a_kernel_can():
    """Sixteen sequences choose 32 of twelve experts: a tile of 16 for each of the one and a half on a rank."""
    layout, sizes = LAYOUT_CASES["tsp8"]
    sizes = dict.fromkeys(layout.axis_names, 1) | sizes
    stream = dataclasses.replace(MIXTURE.stream, expert_kernel="triton")
    up, down = decode_products(dataclasses.replace(MIXTURE, batch=16, stream=stream), layout, sizes)
    assert (up.m, up.n, up.k, up.times, up.kernel) == (24, 32, 32, 1, "grouped")
    assert (down.m, down.n, down.k, down.times, down.kernel) == (24, 32, 16, 1, "grouped")


def test_decode_copies_the_experts_of_every_layer():
    """Sixteen stored experts of sixteen rows on eight ranks, in bfloat16."""
    layout, sizes = LAYOUT_CASES["tsp8"]
    held, sizes = on("tsp8", MIXTURE), dict.fromkeys(layout.axis_names, 1) | sizes
    assert held["experts"] == 3 * 16 * 16 * MIXTURE.model.d_model / 8 * 2
    copied = decode_bytes(MIXTURE, layout, sizes) - held["weights"] - held["cache"]
    assert copied == MIXTURE.model.num_layers * held["experts"]
