"""A target of another platform than the program's is refused, by its devices or by the marks in its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.builders.hlo import entry
from tests.builders.hlo_texts import CPU, CUDA, ROCM, TPU
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import HARDWARE, parse_target
from tsp_jax.inspect import target_mesh
from tsp_jax.inspect.platforms import platforms_of_text

PLAIN = "HloModule m, is_scheduled=true\n\nENTRY %e (x: f32[4]) -> f32[4] {\n  ROOT %x = f32[4]{0} parameter(0)\n}\n"


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_program_of_the_cpu_is_not_priced_as_a_gpus(compile_it):
    lowered = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8)))
    program = lowered.compile() if compile_it else lowered
    named = r"target=mi300x is of platform rocm, .* compiled for cpu; compile it with inspect.compile_for\(f"
    with pytest.raises(ConfigError, match=named) as error:
        inspect.report(program, target="mi300x")
    assert "\n" not in str(error.value)
    found = inspect.report(program, target="cpu:1")
    assert found.timeline and found.timeline.step_s > 0
    assert not [line for line in found.timeline.assumptions if "about its platform" in line]


@pytest.mark.parametrize("kind", ["text", "lowered", "compiled"])
def test_a_target_of_another_number_of_devices_is_refused(kind):
    mesh = target_mesh("cpu:4", "tsp=4")
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("tsp")))
    lowered = jax.jit(lambda x: x + 1).lower(x)
    program = {"text": lambda: lowered.compile().as_text(), "lowered": lambda: lowered, "compiled": lowered.compile}[
        kind
    ]()
    with pytest.raises(ConfigError, match=r"target=cpu:8 has 8 devices, .* compiled for 4; use target=cpu:4"):
        inspect.report(program, target="cpu:8")
    for target in ("cpu:4", "cpu", parse_target("cpu:4"), HARDWARE["cpu"]):
        assert inspect.report(program, target=target).timeline


def test_an_unused_argument_hides_no_mesh():
    mesh = target_mesh("cpu:8", "tsp=8")
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("tsp")))
    found = inspect.report(jax.jit(lambda x, unused: x + 1).lower(x, x))
    assert found.mesh == {"tsp": 8} and found.full_weights


@pytest.mark.parametrize(
    ("text", "target", "compiled"),
    [(CUDA, "v5p", "rocm or cuda"), (ROCM, "cpu", "rocm or cuda"), (TPU, "mi300x", "tpu"), (TPU, "cpu", "tpu")],
)
def test_a_text_that_names_another_platform_is_refused(text, target, compiled):
    with pytest.raises(ConfigError, match=rf"target={target} .* compiled for {compiled}"):
        inspect.report(text, target=target)


@pytest.mark.parametrize(
    ("text", "target", "told"),
    [
        (PLAIN, "mi300x", "its text says nothing about its platform"),
        (CPU, "h100", "its text says nothing about its platform"),
        (ROCM, "mi300x", "its text says only that it is rocm or cuda about its platform"),
        (TPU, "v5p", ""),
    ],
)
def test_what_a_text_does_not_tell_is_assumed_and_said(text, target, told):
    timeline = inspect.report(text, target=target).timeline
    assert timeline
    assert [line.partition(": ")[2] for line in timeline.assumptions if "platform" in line] == [told] * bool(told)


@pytest.mark.parametrize(
    ("attributes", "platforms"),
    [
        ('custom_call_target="__cublas$gemm"', ("rocm", "cuda")),
        ('custom_call_target="x", backend_config={"operation_queue_id":"0"}', ("rocm", "cuda")),
        ('custom_call_target="tpu_custom_call"', ("tpu",)),
        ('custom_call_target="x", backend_config={"outer_dimension_partitions":["8"]}', ("cpu",)),
        ('custom_call_target="mine"', ()),
    ],
)
def test_marks_of_platforms(attributes, platforms):
    assert platforms_of_text(entry(f"  ROOT %x = f32[2]{{0}} custom-call(), {attributes}")) == platforms
