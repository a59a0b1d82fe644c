"""Targets: names, messages, and compiling for hardware where its compiler is installed."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.builders.targets import installed, needs_compiler
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import HARDWARE, parse_target
from tsp_jax.inspect import report
from tsp_jax.mesh import make_mesh

ROOT = Path(__file__).parents[2]
ABSENT = [name for name in HARDWARE if name != "cpu"]


@pytest.mark.parametrize("text", ["mi300x:8", "h100:1024", "cpu:2"])
def test_names_are_read_back(text):
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [("mi300:8", "mi300x:8"), ("mi300x", "mi300x:8"), ("h100:0", "h100:8"), ("v5p:x", "v5p:8"), ("", "cpu:8")],
)
def test_bad_targets_are_refused_with_one_that_works(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_target(text)


def test_cpu_devices_are_the_machines_own():
    assert parse_target("cpu:4").devices() == jax.devices()[:4]
    with pytest.raises(ConfigError, match="use cpu:8"):
        parse_target("cpu:9").devices()


@pytest.mark.parametrize("name", ABSENT)
def test_a_missing_compiler_is_a_line_with_its_command(name):
    platform = HARDWARE[name].platform
    if installed(platform):
        pytest.skip(f"a compiler for {platform} is installed")
    with pytest.raises(ConfigError, match=rf'target={name}:8: .*pip install "\.\[aot-{platform}\]"'):
        parse_target(f"{name}:8").devices()


@pytest.mark.parametrize("name", ABSENT)
def test_programs_compile_for_absent_hardware(name):
    needs_compiler(HARDWARE[name].platform)
    mesh = Mesh(np.array(parse_target(f"{name}:8").devices()), ("tsp",), axis_types=(AxisType.Auto,))
    gather = jax.shard_map(
        lambda x: jax.lax.all_gather(x, "tsp").sum(axis=0), mesh=mesh, in_specs=PartitionSpec("tsp"),
        out_specs=PartitionSpec("tsp"),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tsp")))
    result = report(jax.jit(gather).lower(x))
    assert result.hardware == HARDWARE[{"mi325x": "mi300x"}.get(name, name)]  # both are gfx942 to the compiler
    (found,) = result.collectives
    assert found.op in ("all-gather", "all-reduce", "reduce-scatter")
    assert found.axis == "tsp"


def test_descriptions_carry_what_the_compiler_must_know():
    assert "gfx942" in HARDWARE["mi300x"].description
    assert "shared_memory_per_block: 65536" in HARDWARE["mi300x"].description
    assert "cuda_compute_capability { major: 9 minor: 0 }" in HARDWARE["h100"].description
    assert "cuda_compute_capability { major: 10 minor: 0 }" in HARDWARE["b200"].description


@pytest.mark.parametrize(
    ("text", "known"), [("v7x:4", "v7x: with one of 1, 8, 16, 32"), ("v5e:512", "v5e: with one of 1, 4, 8, 16")]
)
def test_a_slice_that_no_tpu_has_is_refused_with_those_of_its_kind(text, known):
    needs_compiler("tpu")
    with pytest.raises(ConfigError, match=f"target={text}: no such slice; use {known}"):
        parse_target(text).devices()


@pytest.mark.parametrize("sizes", [{"data": 8, "tsp": 8}, {"data": 2, "tsp": 32}, {"data": 1, "tsp": 64}])
def test_any_axes_fit_on_a_torus(sizes):
    """v5p's slice of 64 is 4 x 4 x 4: axes of 8, 2 and 32 split a dimension of it."""
    needs_compiler("tpu")
    devices = parse_target("v5p:64").devices()
    mesh = make_mesh(sizes, devices)
    assert dict(mesh.shape) == sizes
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


@pytest.mark.parametrize("name", ["mi300x", "h100", "v5p"])
def test_a_process_that_compiled_for_absent_hardware_can_trace_its_own(name, tmp_path):
    """A plugin's profiler may end the process; hence a process of its own."""
    needs_compiler(HARDWARE[name].platform)
    code = f"""
import jax
from tsp_jax.hardware.targets import parse_target
parse_target("{name}:8").devices()
with jax.profiler.trace({str(tmp_path)!r}):
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
