"""Texts from before scheduling: products and shardings are reported, a peak or a timeline never."""

import io

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from tests.builders.hlo_texts import CPU, CUDA
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.inspect.expect import broken, parse_expectations
from tsp_jax.inspect.render import show

N = 4096
WHOLE = f"""HloModule jit_f, num_partitions=8

ENTRY main {{
  x = f32[{N},{N}]{{1,0}} parameter(0), sharding={{devices=[8,1]<=[8]}}, metadata={{op_name="x"}}
  y = f32[{N},{N}]{{1,0}} dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT z = f32[{N},{N}]{{1,0}} dot(x, y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""


def printed(report):
    out = Console(width=200, file=io.StringIO(), markup=False)
    show(report, out)
    return out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_text_before_optimizations():
    found = inspect.report(WHOLE, target="mi300x:8")
    assert found.flops == 2 * 2 * N**3
    assert found.shardings == {"x": "{devices=[8,1]<=[8]}"}
    assert found.timeline is None
    for read in (lambda: found.peak, lambda: found.peak_bytes, lambda: found.exposed_fraction):
        with pytest.raises(ConfigError, match="lacks is_scheduled=true"):
            read()
    figures = found.to_json()
    assert (figures["memory"], figures["timeline"], figures["flops"]) == (None, None, found.flops)
    assert "is_scheduled=true" in figures["missing"]


def test_what_is_missing_is_printed():
    text = printed(inspect.report(WHOLE))
    assert "No peak and no timeline: its text lacks is_scheduled=true" in text
    assert "of all 8 devices" in text and "not in the text yet" in text
    assert "peak memory" not in text


def test_a_text_that_is_partitioned_and_not_scheduled_has_its_collectives():
    whole, partial = inspect.report(CPU), inspect.report(CPU.replace("is_scheduled=true, ", ""))
    assert partial.collectives == whole.collectives
    assert partial.shardings == {"x": "{devices=[2,4]<=[8]}"}
    assert "Collectives that the text holds so far" in printed(partial)
    assert (partial.live, whole.missing) == (None, "")


@pytest.mark.parametrize("contract", ["peak<=1GB", "received<=1GB", "no-sync-collective", "step<=1s"])
def test_contracts_of_it_are_refused(contract):
    with pytest.raises(ConfigError, match="lacks is_scheduled=true"):
        broken(inspect.report(WHOLE), parse_expectations(contract))


@pytest.mark.parametrize("read", [inspect.find_peak, lambda module: inspect.simulate(module, HARDWARE["h100"])])
def test_neither_peak_nor_timeline(read):
    with pytest.raises(ConfigError, match="lacks is_scheduled=true"):
        read(inspect.parse(CUDA.replace("is_scheduled=true, ", "")))


def test_what_jax_lowers_is_not_what_it_compiles():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    lowered = jax.jit(lambda x: x @ x.T, in_shardings=NamedSharding(mesh, P("a"))).lower(jnp.ones((64, 64)))
    text = inspect.report(lowered.compiler_ir("hlo").as_hlo_text())  # pyright: ignore[reportOptionalMemberAccess]
    assert text.flops == 2 * 64**3
    with pytest.raises(ConfigError, match="lacks is_scheduled=true"):
        text.peak_bytes  # noqa: B018
    assert inspect.report(lowered).flops == 2 * 64**3 / 8
