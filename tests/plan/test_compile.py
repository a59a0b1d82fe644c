"""Steps compiled for targets, and their reports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.builders.arrays import place_case
from tests.builders.steps import CONFIG, CPU, train_step
from tests.builders.targets import needs_compiler
from tsp_jax import inspect
from tsp_jax.config import ExpertsConfig
from tsp_jax.cost.serving import cache_bytes, decode_traffic
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.inspect.expect import broken, parse_expectations
from tsp_jax.layout import get_layout
from tsp_jax.plan.compile import compile_step, full_weights, place_on
from tsp_jax.tools.cli import load_config

pytestmark = pytest.mark.usefixtures("optax_promotes")

JSON_FIELDS = {"argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes"}
COLLECTIVE_FIELDS = {"op", "axis", "scope", "count", "bytes", "is_async", "hidden_fraction"}
TIMELINE_FIELDS = {"step_s", "compute_s", "comm_s", "exposed_comm_s", "flops"}
FACTS = {"target", "num_devices", "layout", "mesh", "seq_len", "batch", "num_params", "compile_s"}


@pytest.fixture(scope="module")
def step():
    return train_step()


@pytest.fixture(scope="module")
def found(step):
    return step.report()


def test_json_holds_what_other_tools_read(step, found):
    facts, report = step.facts(), found.to_json()
    assert set(facts) >= FACTS
    assert set(report["memory"]) >= JSON_FIELDS
    assert all(set(c) >= COLLECTIVE_FIELDS for c in report["collectives"])
    assert set(report["timeline"]) >= TIMELINE_FIELDS
    json.dumps({**facts, **report})


def test_memory_adds_up(found):
    memory = found.to_json()["memory"]
    total = memory["argument_bytes"] + memory["temp_bytes"] + memory["output_bytes"] - memory["alias_bytes"]
    assert memory["peak_bytes"] == total == found.peak_bytes


def test_blocking_collectives_are_exposed(found):
    """The CPU compiler writes collectives that cannot overlap."""
    assert found.timeline.comm_s > 0
    assert found.timeline.exposed_comm_s == pytest.approx(found.timeline.comm_s)
    assert found.exposed_fraction == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("experts", "mlps"),
    [
        (ExpertsConfig(), {"tsp/mlp": 1}),
        (ExpertsConfig(number=16), {"tsp/experts": 16}),
        (ExpertsConfig(number=16, shared=2), {"tsp/experts": 16, "tsp/mlp": 2}),
    ],
    ids=["dense", "experts", "shared"],
)
def test_weights_that_no_device_gathers_whole_are_those_of_all_ops(experts, mlps):
    """`mlps`: op -> MLPs of width d_ff whose three weights it has."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, d_ff=64, experts=experts))
    found = {weight.scope: weight.elements for weight in full_weights(config, place_case("tsp8"))}
    each = 3 * 64 * config.model.d_model
    assert {scope: found[scope] / each for scope in ("tsp/mlp", "tsp/experts") if scope in found} == mlps
    assert len(found) == 5 + len(mlps)


def test_forward_is_less_than_training(found):
    forward = compile_step(CONFIG, CPU, "forward").report()
    assert 0 < forward.timeline.flops < found.timeline.flops / 3
    assert forward.peak_bytes < found.peak_bytes


def test_decode_moves_activations(found):
    """One token a sequence: nothing like the weights."""
    decode = compile_step(CONFIG, CPU, "decode").report()
    moved = sum(c.total_bytes for c in decode.collectives)
    assert 0 < moved < sum(c.total_bytes for c in found.collectives) / 20


def test_a_chunk_of_a_prompt_holds_less_and_fetches_what_came_before():
    config = dataclasses.replace(CONFIG, seq_len=128)
    whole, chunk = (compile_step(config, CPU, "prefill", size).report() for size in (0, 32))

    def exchanged(found):
        scopes = ("attention", "gather_sequence")
        return sum(c.total_bytes for c in found.collectives if all(scope in c.scope for scope in scopes))

    assert chunk.memory.temp_bytes < whole.memory.temp_bytes
    # Four chunks visit one to four pages, each a quarter of all keys and values.
    assert exchanged(chunk) == pytest.approx(exchanged(whole) * (1 + 2 + 3 + 4) / 4 / 4)


def test_prefill_of_one_sequence_holds_the_cache_once():
    """The loop over one sequence is none to a compiler, which then is free to transpose the cache."""
    needs_compiler("rocm")
    target = parse_target("mi300x:8")
    config = load_config("qwen3_8b")
    model = dataclasses.replace(config.model, num_layers=3, vocab_size=1024)
    config = dataclasses.replace(config, model=model, layout="tsp", mesh="data=1,tsp=8", batch=1, seq_len=131072)
    use_target(target)
    prefill = compile_step(config, target, "prefill", 8192).report()
    assert prefill.memory.temp_bytes < cache_bytes(config, get_layout("tsp"), {"data": 1, "tsp": 8})


@pytest.mark.soak
@pytest.mark.parametrize(("kv_heads", "most"), [(32, 96e9), (8, 40e9)])
def test_a_million_tokens_are_served_from_one_node(kv_heads, most):
    """Prefilled at once, with the paper's model; less in chunks; and a decoded token moves what its form says."""
    needs_compiler("rocm")
    config, target = load_config("llama_7b"), parse_target("mi300x:8")
    model = dataclasses.replace(config.model, num_kv_heads=kv_heads)
    config = dataclasses.replace(config, model=model, seq_len=1 << 20, mesh="data=1,tsp=8")
    use_target(target)
    whole, chunk, decode = (
        compile_step(config, target, step, size).report()
        for step, size in (("prefill", 0), ("prefill", 1 << 17), ("decode", 0))
    )
    sizes = {"data": 1, "tsp": 8}
    cache = cache_bytes(config, get_layout("tsp"), sizes)
    assert cache < min(decode.peak_bytes, chunk.peak_bytes)
    assert max(decode.peak_bytes, chunk.peak_bytes) < whole.peak_bytes <= most
    moved = sum(sum(kinds.values()) for kinds in decode_traffic(config, get_layout("tsp"), sizes).values())
    assert sum(c.total_bytes for c in decode.collectives) == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize(
    ("step", "chunk", "message"),
    [
        ("decode", 16, "chunk=16 means nothing to step=decode; use --step prefill"),
        ("prefill", 128, "chunk=128 must be part of seq_len=64"),
        ("prefill", 20, "chunk=20 is not divisible by 8 over tsp; use 24"),
    ],
)
def test_wrong_chunks(step, chunk, message):
    with pytest.raises(ConfigError, match=message):
        compile_step(CONFIG, CPU, step, chunk)


def test_users_own_function():
    placement = place_case("tsp8")

    def gathered(x):
        return placement.shard_map(
            lambda x: jax.lax.all_gather(x, "tsp", tiled=True).sum(axis=0), PartitionSpec("tsp"), PartitionSpec("tsp")
        )(x)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=jax.NamedSharding(placement.mesh, PartitionSpec("tsp")))
    report = inspect.report(jax.jit(gathered).lower(x))
    assert report.mesh == dict(placement.mesh.shape)
    assert [(c.op, c.axis, c.bytes) for c in report.collectives] == [("all-gather", "tsp", 7 * 8 * 128 * 4)]
    assert report.hardware.name == "cpu"
    assert broken(report, parse_expectations("no-full-weight"))


def test_text_alone(step, found):
    report = inspect.report(step.compiled.as_text(), target="cpu", mesh_axes={"data": 1, "tsp": 8})
    assert report.memory is None
    assert report.peak_bytes == found.peak.bytes
    assert report.timeline.step_s == found.timeline.step_s
    assert report.to_json()["collectives"] == found.to_json()["collectives"]


def test_text_without_a_target_has_no_timeline(step):
    report = inspect.report(step.compiled.as_text())
    assert report.timeline is None and report.to_json()["timeline"] is None
    with pytest.raises(ConfigError, match="target"):
        broken(report, parse_expectations("exposed<=0.5"))


def test_mesh_and_target_disagree():
    with pytest.raises(ConfigError, match=r"mesh=data=1,tsp=4 has 4 devices, target=cpu:8 has 8; use --target cpu:4"):
        place_on(dataclasses.replace(CONFIG, mesh="data=1,tsp=4"), CPU)


def test_unknown_step():
    with pytest.raises(ConfigError, match="use one of train, forward"):
        compile_step(CONFIG, CPU, "backward")  # pyright: ignore[reportArgumentType]
