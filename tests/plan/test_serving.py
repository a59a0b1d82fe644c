"""Layout, mesh and chunk for serving: closed forms, compiled finalists, refusals."""

import dataclasses

import pytest

from tests.builders.plans import compiled_row
from tests.builders.steps import CONFIG, CPU
from tsp_jax.cost.serving import cache_bytes
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target
from tsp_jax.layout import get_layout
from tsp_jax.mesh import parse_sizes
from tsp_jax.plan.compile import place_step
from tsp_jax.plan.compiled import Compiled, Refused
from tsp_jax.plan.serving import choose_serving
from tsp_jax.plan.worker import compile_row

MODEL = CONFIG.model
LARGE = dataclasses.replace(MODEL, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, d_ff=14336)
NODE = parse_target("mi300x:8")


def ways(model, context, batch, target=NODE, **options):
    return choose_serving(model, context, batch, target, finalists=0, **options)


def test_every_way_is_a_placement_that_serves():
    for way in ways(MODEL, 1024, 8, CPU):
        config = dataclasses.replace(CONFIG, layout=way.layout, mesh=way.mesh, batch=8, seq_len=1024)
        place_step(config, CPU, "prefill", way.chunk)


def test_all_devices_decode_one_sequence():
    """Weights are read once a token, so they are on all devices."""
    found = ways(LARGE, 32768, 1)
    best = found[0]
    assert best.decode_s <= 1.01 * min(way.decode_s for way in found)
    assert "sp" not in (best.layout, best.layout.partition("(")[0])


def test_what_fits_a_device_less_is_not_returned():
    few, many = ways(LARGE, 32768, 8, memory=0.1), ways(LARGE, 32768, 8)
    assert 0 < len(few) < len(many)
    assert max(way.peak_bytes for way in few) <= 0.1 * NODE.hardware.memory_bytes


def test_long_contexts_take_little_more_than_their_cache():
    """Prefill writes the cache where it lies (tests/plan/test_compile.py)."""
    config = dataclasses.replace(CONFIG, model=LARGE, batch=8, seq_len=2**20, compute_dtype="bfloat16")
    for way in ways(LARGE, 2**20, 8):
        cache = cache_bytes(config, get_layout(way.layout), parse_sizes(way.mesh))
        assert cache < way.peak_bytes < 1.5 * cache


def test_compiled_figures_decide():
    """Decode of the last of three finalists is the fastest, and the first does not compile."""
    steps = {}

    def compile(jobs):
        names = list(dict.fromkeys((job.config.layout, job.config.mesh) for job in jobs))
        for number, name in enumerate(names):
            steps[name] = 3.0 - number
        return [
            Refused("no") if names.index((j.config.layout, j.config.mesh)) == 0
            else compiled_row(steps[j.config.layout, j.config.mesh], 1e9) for j in jobs
        ]  # fmt: skip

    found = choose_serving(LARGE, 32768, 8, NODE, compile=compile)
    assert [(way.layout, way.mesh) for way in found] == list(steps)[:0:-1]
    assert found[0].is_compiled and found[0].decode_s == 1.0
    assert found[0].prefill_s == 32768 / found[0].chunk


@pytest.mark.usefixtures("optax_promotes")
def test_finalists_compile():
    def compile(jobs):
        return [Compiled(**answer["row"]) for answer in (compile_row(job, CPU) for job in jobs)]

    (way,) = choose_serving(MODEL, 64, 1, CPU, finalists=1, dtype="float32", compile=compile)
    assert way.is_compiled and way.decode_s > 0 and way.chunk == 64


REFUSED = {
    "too much": ({"memory": 1e-6}, "fit on no layout: the least is"),
    "a mesh of fewer devices": ({"mesh": "data=1,tsp=4", "fixed": frozenset({"mesh"})}, "has 4 devices, the target 8"),
    "no memory": ({"memory": 0.0}, "memory=0 must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    options, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        ways(LARGE, 32768, 8, **options)
