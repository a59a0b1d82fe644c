"""Contracts that hold, contracts that are broken, and wrong ones."""

import dataclasses

import pytest

from tests.builders.steps import CONFIG, CPU, train_step
from tsp_jax.errors import ConfigError
from tsp_jax.inspect.expect import broken, parse_expectations
from tsp_jax.plan.compile import compile_step

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def step():
    return train_step()


@pytest.fixture(scope="module")
def found(step):
    return step.report()


@pytest.mark.parametrize("name", ["peak", "temp", "received", "exposed", "step", "exposed-time"])
def test_bounds(found, name):
    unit = "ms" if name in ("step", "exposed-time") else ""
    assert not broken(found, parse_expectations(f"{name}<=1e18{unit}"))
    (line,) = broken(found, parse_expectations(f"{name}<=0{unit}"))
    assert line.startswith(f"{name}<=0{unit}: is ")


def test_broken_lines_name_the_culprit(found):
    peak, exposed = broken(found, parse_expectations("peak<=1KB,exposed<=10%"))
    assert "tsp_jax" in peak and "f32[" in peak
    assert "tsp/" in exposed


def test_units(found):
    assert not broken(found, parse_expectations(f"peak<={found.peak_bytes / 1e3}KB"))
    assert broken(found, parse_expectations(f"peak<={found.peak_bytes / 1e3 * 0.99}kB"))
    assert parse_expectations("exposed<=10%")[0].bound == pytest.approx(0.1)


def test_full_weight_in_one_message(found):
    """One bucket is the whole weight: attention has one here, the MLP four."""
    (line,) = broken(found, parse_expectations("no-full-weight"))
    assert "tsp/attention" in line


@pytest.mark.parametrize(("layout", "holds"), [("tsp", True), ("fsdp_cp", False)])
def test_full_weight_by_layout(layout, holds):
    heads = dataclasses.replace(CONFIG.model, num_layers=1, num_heads=16, num_kv_heads=16)
    config = dataclasses.replace(CONFIG, model=heads, layout=layout)
    report = compile_step(config, CPU, "forward").report()
    assert bool(broken(report, parse_expectations("no-full-weight"))) != holds


def test_blocking_collective(found):
    (line,) = broken(found, parse_expectations("no-sync-collective"))
    assert "tsp/" in line


@pytest.mark.parametrize(
    "text", ["peak", "peak<24GB", "peak<=24parsecs", "exposed<=3GB", "speed<=1", "peak<=", "no-half-weight", "step<=3"]
)
def test_wrong_contracts(text):
    with pytest.raises(ConfigError, match="use one of"):
        parse_expectations(text)
