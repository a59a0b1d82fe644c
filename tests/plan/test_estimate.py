"""Closed-form estimates of steps."""

import dataclasses
import re

import pytest

from tests.builders.steps import CONFIG
from tsp_jax.config import Config, ExpertsConfig, ModelConfig
from tsp_jax.cost.memory import step_memory
from tsp_jax.cost.training import step_traffic
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates import SCENARIOS
from tsp_jax.hardware.targets import parse_target
from tsp_jax.layout import get_layout
from tsp_jax.plan.estimate import estimate, kernel_of, rival_kernels, with_expert_kernel

LLAMA = dataclasses.replace(
    CONFIG,
    model=ModelConfig(
        vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=16384
    ),
    seq_len=131072, compute_dtype="bfloat16", grad_dtype="bfloat16", mesh="", remat="save_attention",
    stream=dataclasses.replace(CONFIG.stream, bucket_mib=64.0),
)  # fmt: skip
MI300X = parse_target("mi300x:8")


def on(config: Config = LLAMA, target: str = "mi300x:8", **changes):
    return estimate(dataclasses.replace(config, **changes), parse_target(target))


def test_terms_add_up_to_the_step_and_parts_to_the_peak():
    found, sizes = on(), {"data": 1, "tsp": 8}
    assert set(found.scenarios) == set(SCENARIOS)
    assert found.step_s == sum(found.seconds.values()) == found.band.typical
    assert found.band.low < found.band.typical < found.band.high
    assert found.memory == step_memory(LLAMA, get_layout("tsp"), sizes)
    assert found.peak_bytes == sum(found.memory.values())
    traffic = step_traffic(LLAMA, get_layout("tsp"), sizes)
    assert found.received_bytes == pytest.approx(sum(n for kinds in traffic.values() for n in kinds.values()))


def test_micro_batches_repeat_all_but_the_update():
    once, twice = on(batch=2, accumulate=1), on(batch=4, accumulate=2)
    assert twice.received_bytes == pytest.approx(2 * once.received_bytes)
    assert twice.seconds["attention"] == pytest.approx(2 * once.seconds["attention"])
    assert twice.seconds["optimizer"] < 2 * once.seconds["optimizer"]


QWEN3_30B_A3B = dataclasses.replace(
    LLAMA,
    model=ModelConfig(
        vocab_size=151_936, d_model=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128, d_ff=768,
        experts=ExpertsConfig(number=128, per_token=8, balance_loss=0.001), qk_norm=True,
    ),
    stream=dataclasses.replace(CONFIG.stream, attention_movement="auto", bucket_mib=64.0, grad_dtype="bfloat16"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "movement", "simulated_s"),
    [("tsp", "gather", 21.23), ("tsp", "activations", 21.43), ("fsdp_cp", "gather", 21.69)],
)
def test_steps_of_a_mixture_that_were_simulated(layout, movement, simulated_s):
    """Compiled for 8 x MI300X with jax 0.10.2 (benchmarks/experts.md)."""
    stream = dataclasses.replace(QWEN3_30B_A3B.stream, mlp_movement=movement)
    assert on(QWEN3_30B_A3B, layout=layout, stream=stream).step_s == pytest.approx(simulated_s, rel=0.03)


@pytest.mark.parametrize(
    ("target", "kernel"), [("mi300x:8", "triton"), ("h100:8", "triton"), ("v5p:8", "xla"), ("cpu:8", "xla")]
)
def test_the_kernel_of_experts_is_that_of_the_devices(target, kernel):
    hardware, sizes = parse_target(target).hardware, {"data": 1, "tsp": 8}
    assert with_expert_kernel(QWEN3_30B_A3B, hardware, sizes).stream.expert_kernel == kernel
    assert with_expert_kernel(LLAMA, hardware, sizes) == LLAMA


def test_many_tiles_at_once_take_less_time_and_more_memory():
    tiled = on(QWEN3_30B_A3B, stream=dataclasses.replace(QWEN3_30B_A3B.stream, expert_kernel="xla"))
    slabs = on(QWEN3_30B_A3B)
    assert slabs.seconds["products"] < 0.6 * tiled.seconds["products"]
    assert sum(slabs.moments["experts"].values()) > sum(tiled.moments["experts"].values())


def test_moved_tokens_cost_less_for_few_tokens_a_device_and_more_for_many():
    def step_s(movement: str, seq_len: int) -> float:
        stream = dataclasses.replace(QWEN3_30B_A3B.stream, mlp_movement=movement)
        return on(QWEN3_30B_A3B, seq_len=seq_len, stream=stream).step_s

    assert step_s("activations", 8192) < step_s("gather", 8192)
    assert step_s("activations", 2**20) > step_s("gather", 2**20)


def test_a_bucket_can_be_too_small_and_too_large():
    """Small buckets cost a message and a slower product each. The first of large ones is exposed for longer."""

    def step_s(bucket_mib: float) -> float:
        return on(stream=dataclasses.replace(LLAMA.stream, bucket_mib=bucket_mib)).step_s

    assert step_s(256.0) < step_s(64.0) < step_s(4.0)
    assert step_s(256.0) < step_s(4096.0)


def test_fixed_costs_are_exposed_where_sequences_are_short():
    def exposed(seq_len: int) -> float:
        found = on(seq_len=seq_len)
        return sum(s for name, s in found.seconds.items() if name.startswith("exposed")) / found.step_s

    assert exposed(2048) > 0.3
    assert exposed(131072) < 0.01


def test_every_collective_waits_on_tpus():
    found = on(target="v5p:8")
    assert found.seconds.get("contention", 0.0) == 0
    assert sum(s for name, s in found.seconds.items() if name.startswith("exposed")) > 0.05 * found.step_s


@pytest.mark.parametrize(
    ("target", "kernel", "products"),
    [
        ("mi300x:8", "triton", 7),
        ("mi355x:8", "triton", 7),
        ("h100:8", "cudnn", 5),
        ("v5p:8", "tpu", 5),
        ("cpu:8", "xla", 5),
    ],
)
def test_the_kernel_is_that_of_the_devices(target, kernel, products):
    assert kernel_of(LLAMA, parse_target(target).hardware) == (kernel, products)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mesh": "model=8"}, "has no axis 'model'"),
        ({"mesh": "data=1,tsp=4"}, "mesh=data=1,tsp=4 has 4 devices, target=mi300x:8 has 8; use --target mi300x:4"),
        ({"layout": "dp"}, "batch=1 is not divisible by 8 over data; use 8"),
    ],
    ids=["axis", "devices", "batch"],
)
def test_what_does_not_fit_the_target_is_refused(changes, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        on(**changes)


@pytest.mark.parametrize(
    ("target", "expected"), [("h100:8", ["triton"]), ("mi300x:8", []), ("v5p:8", []), ("cpu:8", [])]
)
def test_rival_kernels_have_rates_of_their_own(target, expected):
    """XLA's own attention would be priced at another kernel's rate."""
    assert rival_kernels(LLAMA, parse_target(target).hardware) == expected


@pytest.mark.parametrize(("target", "width"), [("v5p:8", 640), ("mi300x:8", 576), ("h100:8", 576)])
def test_a_tpu_stores_d_in_whole_lanes(target, width):
    """Of memory alone: 576 is 4.5 times 128."""

    def found(d_model: int):
        model = dataclasses.replace(LLAMA.model, d_model=d_model)
        return estimate(dataclasses.replace(LLAMA, model=model, seq_len=2048), parse_target(target))

    assert found(576).peak_bytes == found(width).peak_bytes
    assert (found(576).step_s == found(width).step_s) == (width == 576)
