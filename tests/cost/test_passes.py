"""Passes receive the bytes, and execute the operations, of the other closed forms."""

import dataclasses
from collections import defaultdict

import pytest

from tests.builders.arrays import LAYOUT_CASES, MIX, UNUSUAL_CASES
from tests.builders.steps import CONFIG
from tsp_jax.config import Config, ExpertsConfig, LoraConfig
from tsp_jax.cost.flops import step_flops
from tsp_jax.cost.passes import step_passes
from tsp_jax.cost.training import step_traffic
from tsp_jax.layout import num_ranks

CASES = LAYOUT_CASES | {"mix4_2": (MIX, {"model": 4, "tsp": 2}), **UNUSUAL_CASES}
SPARSE = dataclasses.replace(CONFIG.model, num_heads=9, num_kv_heads=3)
"""heads that eight ranks cannot share evenly"""


def on(case: str, config: Config):
    """(the configuration with a batch that fits, layout, sizes of its mesh)."""
    layout, sizes = CASES[case]
    sizes = {name: sizes.get(name, 1) for name in layout.axis_names}
    batch = max(config.batch, num_ranks(layout.batch, sizes))
    return dataclasses.replace(config, batch=batch), layout, sizes


def moved(config: Config, movement: str) -> Config:
    names = ("mlp_movement",) if movement == "ring" else ("attention_movement", "mlp_movement", "vocab_movement")
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **dict.fromkeys(names, movement)))


def check(config: Config, case: str) -> None:
    config, layout, sizes = on(case, config)
    found = defaultdict(float)
    for block in step_passes(config, layout, sizes):
        for part in block.passes:
            for message in part.messages:
                found[part.op, message.kind] += block.times * message.bytes
    expected = {
        (op, kind): nbytes
        for op, kinds in step_traffic(config, layout, sizes).items()
        for kind, nbytes in kinds.items()
        if nbytes
    }
    assert dict(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("remat", ["none", "full", "save_attention", "offload"])
def test_passes_receive_the_traffic_of_a_step(case, remat):
    check(dataclasses.replace(CONFIG, remat=remat), case)


@pytest.mark.parametrize("case", ["tsp8", "tsp3", "mix2_4", "two_level2_4"])
@pytest.mark.parametrize("remat", ["none", "full", "save_attention"])
@pytest.mark.parametrize("model", [CONFIG.model, SPARSE], ids=["even", "sparse"])
def test_passes_receive_the_traffic_of_moved_tokens(case, remat, model):
    check(dataclasses.replace(moved(CONFIG, "activations"), remat=remat, model=model), case)


@pytest.mark.parametrize("case", ["tsp4", "tp4_sp2", "tp8"])
@pytest.mark.parametrize(
    "change",
    [
        {"norms": "both"},
        {"window": 5},
        {"window": 9, "layer_kinds": ("sliding", "full")},
        {"num_heads": 9, "num_kv_heads": 3},
        {"vocab_size": 187, "d_ff": 185},
    ],
    ids=str,
)
def test_passes_receive_the_traffic_of_other_models(case, change):
    check(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change)), case)


MIXTURE = dataclasses.replace(
    CONFIG.model, d_ff=13, experts=ExpertsConfig(number=10, per_token=3, shared=1, balance_loss=0.1)
)
"""ten experts are padded on 8, 4 and 3 ranks, their 13 rows on 2"""


@pytest.mark.parametrize("case", ["tsp8", "tsp3", "tp8", "tp4_sp2", "mix2_4", "two_level2_4", "fsdp_cp8", "single"])
@pytest.mark.parametrize("movement", ["gather", "ring", "activations"])
@pytest.mark.parametrize("norms", ["pre", "both"])
def test_passes_receive_the_traffic_of_experts(case, movement, norms):
    """The movement of every op, except that only the MLP's and the experts' weights ring."""
    model = dataclasses.replace(MIXTURE, norms=norms)
    check(dataclasses.replace(moved(CONFIG, movement), remat="full", model=model), case)


@pytest.mark.parametrize("case", ["tsp8", "tp4_sp2", "mix2_4"])
@pytest.mark.parametrize("movement", ["gather", "activations"])
def test_passes_receive_the_biases_of_experts(case, movement):
    experts = dataclasses.replace(MIXTURE.experts, router_bias=True, biases=True)
    check(dataclasses.replace(moved(CONFIG, movement), model=dataclasses.replace(MIXTURE, experts=experts)), case)


@pytest.mark.parametrize(("case", "movement"), [("tsp8", "gather"), ("tp8", "gather"), ("tsp8", "activations")])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_passes_execute_the_products_of_experts_and_half_a_tile_of_each(case, movement, remat):
    """Each device computes the router of its tokens, under tp of all tokens."""
    model = dataclasses.replace(CONFIG.model, d_ff=24, experts=ExpertsConfig(number=8, per_token=2, shared=1))
    stream = dataclasses.replace(moved(CONFIG, movement).stream, bucket_mib=1.0)
    config, layout, sizes = on(case, dataclasses.replace(CONFIG, model=model, stream=stream, seq_len=4096, remat=remat))
    tile = choices = 0.0
    found = defaultdict(float)
    for block in step_passes(config, layout, sizes):
        for part in block.passes:
            found[part.op] += block.times * sum(2 * p.m * p.n * p.k * p.times for p in part.products)
            if part.op == "experts":
                tile, choices = part.products[0].m, part.chunk * 2 / 8
    expected = step_flops(config)
    assert found["router"] * num_ranks(layout.tokens, sizes) == pytest.approx(expected["router"], rel=1e-9)
    assert found["mlp"] * 8 == pytest.approx(expected["mlp"] / 3, rel=1e-9)
    assert found["experts"] * 8 == pytest.approx(expected["mlp"] * 2 / 3 * (1 + tile / 2 / choices), rel=1e-9)
    assert 0 < tile / 2 <= 0.15 * choices


@pytest.mark.parametrize("targets", [("q", "v"), ("down",), ("q", "k", "v", "o", "gate", "up", "down")])
def test_passes_with_adapters_send_no_gradients_of_frozen_weights(targets):
    check(dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, targets=targets)), "tsp8")


@pytest.mark.parametrize(("case", "ranks"), [("tsp8", 8), ("tp8", 8), ("tp2_sp4", 8), ("single", 1), ("fsdp_cp8", 8)])
@pytest.mark.parametrize("remat", ["none", "full", "save_attention"])
def test_passes_execute_the_products_of_a_step(case, ranks, remat):
    config, layout, sizes = on(case, dataclasses.replace(CONFIG, remat=remat))
    found = defaultdict(float)
    for block in step_passes(config, layout, sizes):
        for part in block.passes:
            op = "projections" if part.op == "attention" else part.op
            found[op] += block.times * sum(2 * p.m * p.n * p.k * p.times for p in part.products)
            if part.attend:
                found["attention"] += block.times * 2 * part.attend.pairs * (5 if part.attend.backward else 2)
    expected = step_flops(config)
    for op, flops in expected.items():
        assert found[op] * ranks == pytest.approx(flops, rel=1e-9), op
