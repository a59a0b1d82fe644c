"""How the memory of a device is divided."""

import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.plan.budget import FRACTION, usable_bytes

DEVICES = [hardware for hardware in HARDWARE.values() if hardware.platform != "cpu"]


@pytest.mark.parametrize("hardware", DEVICES, ids=lambda hardware: hardware.name)
def test_reserves_are_named_and_sourced_and_add_up(hardware):
    budget = usable_bytes(hardware, fraction=1.0)
    named = {each.name: each for each in budget.reserves}
    assert set(named) == {"runtime", "fragmentation"} | ({"collectives"} if hardware.platform != "tpu" else set())
    assert all(each.bytes > 0 and str(each.source) for each in named.values())
    assert budget.usable_bytes + sum(each.bytes for each in budget.reserves) == pytest.approx(hardware.memory_bytes)


def test_a_share_of_the_memory_counts_where_it_leaves_more_than_the_reserves():
    hardware = HARDWARE["mi300x"]
    half = usable_bytes(hardware, fraction=0.5)
    assert half.usable_bytes == pytest.approx(0.98 * 0.5 * hardware.memory_bytes)
    assert half.usable_bytes < usable_bytes(hardware).usable_bytes < FRACTION * hardware.memory_bytes


def test_each_communicator_takes_memory():
    three, nine = (usable_bytes(HARDWARE["h100"], communicators=number).usable_bytes for number in (3, 9))
    assert nine < three - 6 * 1e9


def test_virtual_devices_reserve_nothing():
    assert usable_bytes(HARDWARE["cpu"], fraction=1.0).usable_bytes == HARDWARE["cpu"].memory_bytes


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"memory={fraction:g} must be above 0 and at most 1; use 0.92"):
        usable_bytes(HARDWARE["h100"], fraction=fraction)


def test_a_budget_is_printed_and_written_with_its_sources():
    budget = usable_bytes(HARDWARE["v5e"])
    assert budget.lines()[0] == "memory for a step: 14.6 of 16 GB, at most 92%"
    assert budget.to_json()["reserves"]["runtime"]["bytes"] == 529 * 2**20
    assert len(budget.lines()) == 1 + len(budget.reserves)
