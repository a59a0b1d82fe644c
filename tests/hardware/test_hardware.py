"""The link model: seconds that a collective keeps the links busy, against figures worked out by hand."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.builders.hlo import at_rates
from tsp_jax.errors import ConfigError
from tsp_jax.hardware import targets
from tsp_jax.hardware.devices import HARDWARE, TPU_TOPOLOGIES, Hardware
from tsp_jax.hardware.links import COLLECTIVES, collective_seconds, link_model

GATHERS = [op for op in COLLECTIVES if op != "collective-permute"]
BYTES = 7e9
ALL_8 = [tuple(range(8))]


def hardware(name: str) -> Hardware:
    """A link carries 1 GB/s, a network card a quarter of that."""
    return at_rates(HARDWARE[name], link=1e9, between_nodes=0.25e9)


MESH, SWITCH, TORUS, HOST = (hardware(name) for name in ("mi300x", "h100", "v5p", "cpu"))
FLAT, PAIRED = hardware("v5e"), hardware("v7x")


@pytest.mark.parametrize("op", GATHERS)
def test_a_full_mesh_uses_all_links_of_a_whole_node(op):
    assert collective_seconds(MESH, op, BYTES, ALL_8) == pytest.approx(1.0)


def test_a_full_mesh_has_one_link_less_than_the_group_has_members():
    assert collective_seconds(MESH, "all-gather", BYTES, [(0, 1, 2, 3), (4, 5, 6, 7)]) == pytest.approx(7 / 3)


def test_a_permute_has_one_link_of_the_full_mesh():
    assert collective_seconds(MESH, "collective-permute", BYTES, [(0, 1), (1, 0)]) == pytest.approx(7.0)


def test_a_message_to_oneself_takes_no_link():
    assert collective_seconds(MESH, "collective-permute", BYTES, [(3, 3)]) == 0.0


@pytest.mark.parametrize("op", COLLECTIVES)
def test_behind_a_switch_a_device_has_one_link_whatever_the_op(op):
    groups = [(0, 1), (1, 0)] if op == "collective-permute" else ALL_8
    assert collective_seconds(SWITCH, op, BYTES, groups) == pytest.approx(7.0)


@pytest.mark.parametrize("op", COLLECTIVES)
def test_virtual_devices_share_the_hosts_memory(op):
    groups = [(0, 1), (1, 0)] if op == "collective-permute" else ALL_8
    assert collective_seconds(HOST, op, BYTES, groups) == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("groups", "links"),
    [
        (ALL_8, 3),  # 2 x 2 x 2: a link along each dimension
        ([(0, 1, 2, 3), (4, 5, 6, 7)], 2),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], 1),
        ([(0, 7), (1, 6), (2, 5), (3, 4)], 1),  # nobody straight ahead: at least one link
        ([tuple(range(16))], 4),  # 2 x 2 x 4: both links of the dimension of 4
        ([tuple(range(k, k + 4)) for k in range(0, 16, 4)], 2),
        ([tuple(range(64))], 6),
    ],
)
def test_a_torus_uses_the_links_along_the_dimensions_of_the_group(groups, links):
    assert collective_seconds(TORUS, "all-gather", BYTES, groups) == pytest.approx(7 / links)


@pytest.mark.parametrize(
    ("kind", "devices", "links"),
    [
        (FLAT, 8, 3),  # 2 x 4: one link along the dimension of 2, two along that of 4
        (FLAT, 64, 4),
        (PAIRED, 2, 1),  # the two cores of a chip
        (PAIRED, 8, 3),  # 2 x 2 x 1 chips of two cores: a link along each dimension, and the other core
        (PAIRED, 128, 7),
    ],
)
def test_each_kind_of_tpu_has_a_torus_of_its_own(kind, devices, links):
    assert collective_seconds(kind, "all-gather", BYTES, [tuple(range(devices))]) == pytest.approx(7 / links)


def test_a_permute_has_one_link_of_the_torus():
    assert collective_seconds(TORUS, "collective-permute", BYTES, [(k, (k + 1) % 8) for k in range(8)]) == 7.0


def test_one_device_a_node_has_its_network_card():
    received = 1e9
    groups = [tuple(range(k, 32, 8)) for k in range(8)]
    assert collective_seconds(MESH, "all-gather", received, groups) == pytest.approx(4.0)


@pytest.mark.parametrize(("op", "share"), [("all-gather", 1 / 15), ("all-reduce", 1 / 15), ("all-to-all", 8 / 15)])
def test_whole_nodes_share_their_network_cards(op, share):
    """Of 15 parts, 8 come from the other node: over 8 cards once a node, but all of them to each device of a pair."""
    card = BYTES * share / 0.25e9
    inside = BYTES * (1 - share) / 7e9
    expected = {"all-to-all": card}.get(op, max(card, inside))
    assert collective_seconds(MESH, op, BYTES, [tuple(range(16))]) == pytest.approx(expected)


def test_the_links_inside_decide_where_the_network_is_fast():
    fast = at_rates(MESH, link=1e9, between_nodes=1e12)
    assert collective_seconds(fast, "all-gather", BYTES, [tuple(range(16))]) == pytest.approx(14 / 15)


def test_the_slowest_group_decides():
    both = [(0, 1, 2, 3), (4, 5, 6, 8)]
    assert collective_seconds(MESH, "all-gather", BYTES, both) == collective_seconds(
        MESH, "all-gather", BYTES, both[1:]
    )
    assert collective_seconds(MESH, "all-gather", BYTES, both) > collective_seconds(MESH, "all-gather", BYTES, both[:1])


def test_the_slowest_pair_decides():
    assert collective_seconds(MESH, "collective-permute", BYTES, [(0, 1), (7, 8)]) == pytest.approx(28.0)


@pytest.mark.parametrize("groups", [[], [(0,), (1,)]])
def test_alone_there_is_nothing_to_wait_for(groups):
    assert collective_seconds(MESH, "all-gather", 0, groups) == 0.0


def test_an_unknown_op_is_named():
    with pytest.raises(ConfigError, match="op=gather is no collective; use one of all-gather"):
        collective_seconds(MESH, "gather", 1, ALL_8)


def test_a_slice_that_is_not_known_is_named():
    with pytest.raises(ConfigError, match=r"devices=513 .* use one of 4, 8, .* 512$"):
        collective_seconds(TORUS, "all-gather", 1, [tuple(range(513))])


@pytest.mark.parametrize("kind", HARDWARE.values(), ids=HARDWARE)
def test_nothing_is_sustained_above_its_peak(kind):
    rates = kind.rates
    assert all(0 < product.flops_per_s.low <= product.flops_per_s.high < kind.peak_flops for product in rates.products)
    assert all(0 < row.flops_per_s.low <= row.flops_per_s.high < kind.peak_flops for row in rates.attention)
    assert 0 < rates.memory.bytes_per_s.high < kind.memory_bandwidth
    assert f"{rates.between_nodes.bytes_per_s.text(1e9)} GB/s" in link_model(kind)


def test_targets_speak_of_the_same_hardware():
    assert targets.HARDWARE is HARDWARE
    assert targets.Hardware is Hardware
    assert targets.TPU_TOPOLOGIES is TPU_TOPOLOGIES


def test_the_module_alone_needs_no_jax():
    """A planner may read the facts on a machine without jax; the package's own surface is another matter."""
    code = """
import sys, types
package = types.ModuleType("tsp_jax")
package.__path__ = [sys.argv[1]]
sys.modules["tsp_jax"] = package
import tsp_jax.hardware.devices
assert "jax" not in sys.modules
"""
    folder = str(Path(targets.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=60)


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("gpu", "AMD Instinct MI300X", "mi300x"),
        ("gpu", "gfx942", "mi300x"),
        ("gpu", "gfx950", "mi355x"),
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("tpu", "TPU v5", "v5p"),  # so in jax 0.10 to 0.12
        ("tpu", "TPU v5p", "v5p"),
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v6 lite", "v6e"),
        ("tpu", "TPU7x", "v7x"),
        ("tpu", "TPU v4", None),
        ("gpu", "NVIDIA H200", "h200"),
        ("gpu", "NVIDIA B200", "b200"),
        ("gpu", "AMD Instinct MI325X", "mi325x"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_devices_of_jax_are_told_apart(platform, kind, name):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    assert [h.name for h in HARDWARE.values() if h.is_kind_of(device)] == ([name] if name else [])
