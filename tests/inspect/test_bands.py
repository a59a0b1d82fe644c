"""Steps as bands: simulations at several rates, and what computation and communication cost each other."""

import dataclasses

import pytest

from tests.builders.hlo import GROUPS, UNIT, gather, kernel, lines, loop, overlapped, simulated
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.rates import SCENARIOS, Band, Collective, Contention, Memory, Source, exactly
from tsp_jax.inspect import report
from tsp_jax.inspect.units import format_band

TEST = Source("assumed", "a test")


def banded(memory: Band = exactly(1.0), links: Band = exactly(1.0), own: float = 0.0, other: float = 0.0) -> Hardware:
    """A byte of memory and of a link a second, with bands; shares that computation and links lose to each other."""
    line = Collective(fixed_s=exactly(0.0), bytes_per_s=links, source=TEST)
    rates = dataclasses.replace(
        UNIT.rates,
        memory=Memory(bytes_per_s=memory, source=TEST),
        collectives=(("all-gather", line),),
        contention=Contention(compute=exactly(own), links=exactly(other), source=TEST),
    )
    return dataclasses.replace(UNIT, rates=rates)


def test_a_step_is_a_band_over_all_corners():
    hardware = banded(memory=Band(0.5, 1.0, 2.0), links=Band(0.25, 1.0, 4.0))
    result = simulated(overlapped(56, 80), hardware=hardware)
    steps = {name: result.scenarios[name].step_s for name in SCENARIOS}
    assert list(steps.values()) == [80, max(224, 160), max(14, 40), max(224, 40), max(14, 160)]
    assert result.band() == Band(40, 80, 224)
    assert result.band("exposed_comm_s") == Band(0, 0, 224 - 40)


def test_flat_rates_give_a_band_without_width():
    assert simulated(overlapped(56, 80)).band() == exactly(80)


@pytest.mark.parametrize(
    ("own", "other", "step", "exposed"),
    [
        (0.0, 0.0, 80, 0),
        (0.5, 0.0, 80 + 28, 0),  # computation at half its rate for the 56 s of the gather
        (0.0, 0.5, 80 + 16, 16),  # the gather at half its rate for 80 s; 16 s are left
        (0.5, 0.5, 112 + 24, 0),  # both at half their rate for 112 s; 24 s of computation are left
    ],
)
def test_computation_and_communication_slow_each_other(own, other, step, exposed):
    result = simulated(overlapped(56, 80), hardware=banded(own=own, other=other))
    assert (result.step_s, result.exposed_comm_s) == (step, exposed)
    assert result.step_s == result.compute_s + result.contention_s + result.exposed_comm_s


def test_communication_that_blocks_slows_nothing():
    reduce = f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}, to_apply=%add"
    result = simulated(lines(kernel("a", 80), reduce, kernel("b", 40)), hardware=banded(own=0.5, other=0.5))
    assert (result.step_s, result.contention_s) == (148, 0)


def test_contention_counts_in_loops_of_computation():
    inner, bodies = loop("i", lines(kernel("k", 16)), 5)
    start, done = gather("g", 56)
    result = simulated(lines(start, inner, done), bodies, hardware=banded(own=0.5))
    assert result.step_s == 80 + 28
    assert result.compute_s == 80


def test_a_later_gather_waits_for_one_that_was_slowed():
    (a, a_done), (b, b_done) = gather("a", 56), gather("b", 56)
    result = simulated(lines(a, b, kernel("k", 80), a_done, b_done), hardware=banded(other=0.5))
    # 80 s at half the rate: 40 done; 72 left
    assert (result.step_s, result.exposed_comm_s) == (152, 72)


@pytest.mark.parametrize("name", ["mi300x", "h100", "v5p"])
def test_a_band_contains_its_typical_value(name):
    found = simulated(overlapped(28 * 10**6, 8 * 10**6), hardware=HARDWARE[name])
    for field in ("step_s", "compute_s", "contention_s", "comm_s", "exposed_comm_s", "matmul_s"):
        low, typical, high = found.band(field)
        assert low <= typical <= high
    assert found.band().low < found.band().high
    assert found.scenarios["fast rates"].step_s == found.band().low
    assert found.scenarios["slow rates"].step_s == found.band().high


def test_json_has_all_scenarios():
    text = f"HloModule test, is_scheduled=true\n\nENTRY %main () -> f32[] {{\n{lines(kernel('k', 80))}\n}}\n"
    found = report(text, target=banded(memory=Band(0.5, 1.0, 2.0))).to_json()["timeline"]
    assert found["step_s"] == 80
    assert found["bands"]["step_s"] == {"low": 40, "typical": 80, "high": 160}
    assert {name: times["step_s"] for name, times in found["scenarios"].items()} == {
        "typical rates": 80, "slow rates": 160, "fast rates": 40,
        "slow links, fast computation": 40, "fast links, slow computation": 160,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("band", "text"),
    [
        (Band(11.4, 12.0, 14.2), "11.40 to 14.20 s (12.00)"),
        (Band(0.9, 1.1, 1.2), "0.90 to 1.20 s (1.10)"),
        (Band(0.0002, 0.005, 0.1), "0.20 to 100.00 ms (5.00)"),
        (exactly(3.2e-6), "3.20 us"),
    ],
)
def test_bands_are_readable(band, text):
    assert format_band(band) == text
