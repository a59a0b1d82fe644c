"""Hardware files: what they replace, and one line for whatever is wrong with them."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.builders.fuzz import check_door
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, Hardware
from tsp_jax.hardware.rates import Band, Work, exactly
from tsp_jax.hardware.rates_file import read_hardware
from tsp_jax.hardware.targets import parse_target

NODE: dict[str, Any] = {
    "format": 1, "name": "my-node", "base": "h100", "device_kind": "NVIDIA H100 80GB HBM3", "num_devices": 8,
    "date": "2026-11-26", "versions": {"jax": "0.10.2", "python": "3.11.7"},
    "products": [
        {"m": 8192, "n": 8192, "k": 8192, "dtype": "bfloat16", "flops_per_s": 7e14, "low": 6.8e14, "high": 7.1e14},
        {"m": 1024, "n": 1024, "k": 1024, "flops_per_s": 2e14},
    ],
    "memory": {"bytes_per_s": 2.8e12, "low": 2.7e12, "high": 2.9e12},
    "collectives": {
        "all-gather": {
            "fixed_s": 3e-5, "bytes_per_s": 3.55e11, "low": 3.4e11, "high": 3.6e11,
            "points": [{"received_bytes": 1048576, "seconds": 3.1e-5}],
        },
    },
    "attention": [
        {"kernel": "cudnn", "direction": "forward", "head_dim": 128, "flops_per_s": 5.5e14, "low": 5e14, "high": 6e14}
    ],
    "host": {"to_host_bytes_per_s": 5e10, "from_host_bytes_per_s": 4e10},
}  # fmt: skip


def read(folder: Path, content: Any) -> Hardware:
    path = folder / "node.json"
    path.write_text(json.dumps(content))
    return read_hardware(path)


def attention(hardware: Hardware, kernel: str, direction: Any) -> Band:
    return hardware.rates.attention_row(Work(1.0, None, "", direction, kernel, 128)).flops_per_s


def test_what_was_measured_replaces_the_bases(tmp_path):
    found, base = read(tmp_path, NODE), HARDWARE["h100"]
    rates = found.rates
    assert found.name == "h100"
    assert rates.best_flops == Band(6.8e14, 7e14, 7.1e14)
    assert [p.flops_per_s for p in rates.products if p.dtype == "bfloat16"][1] == exactly(2e14)
    assert rates.memory.bytes_per_s == Band(2.7e12, 2.8e12, 2.9e12)
    assert rates.host.bytes_per_s == Band(4e10, 4.5e10, 5e10)
    assert rates.collective("all-gather").fixed_s == exactly(3e-5)
    assert attention(found, "cudnn", "forward") == Band(5e14, 5.5e14, 6e14)
    assert str(rates.memory.source).startswith("measured: my-node (")
    assert "my-node, 8 x NVIDIA H100 80GB HBM3, 2026-11-26" in rates.origin
    assert {p.dtype for p in rates.products} == {p.dtype for p in base.rates.products}


def test_what_was_not_measured_is_the_bases(tmp_path):
    found, base = read(tmp_path, {key: NODE[key] for key in ("format", "name", "base", "date")}), HARDWARE["h100"]
    assert found.rates.origin
    for name in ("products", "attention", "memory", "host", "collectives", "contention", "between_nodes"):
        assert getattr(found.rates, name) == getattr(base.rates, name)
    whole = read(tmp_path, NODE)
    assert whole.rates.collective("all-reduce") == base.rates.collective("all-reduce")
    assert attention(whole, "cudnn", "backward") == attention(base, "cudnn", "backward")


def test_part_of_a_full_mesh_used_fewer_links(tmp_path):
    """Four devices use three of the seven links of each; the rate in the table is that of all seven."""
    line = {"fixed_s": 0, "bytes_per_s": 9e10}
    node = NODE | {"base": "mi300x", "num_devices": 4, "collectives": {"all-gather": line, "collective-permute": line}}
    found = read(tmp_path, node).rates
    assert found.collective("all-gather").bytes_per_s.typical == pytest.approx(21e10)
    assert found.collective("collective-permute").bytes_per_s.typical == 9e10


def changed(path: str, value: Any) -> dict[str, Any]:
    """NODE with another value at a path such as products.0.m; None removes it."""
    content = copy.deepcopy(NODE)
    place: Any = content
    *before, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    for key in before:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "format=2"),
        ("base", "h1000", "base=h1000 is unknown; use one of cpu, mi300x"),
        ("name", None, "Object missing required field `name`"),
        ("date", "today", 'date="today"'),
        ("products/0/flops_per_s", -1, "products[0].flops_per_s=-1"),
        ("products/0/flops_per_s", 0, "products[0].flops_per_s=0"),
        ("products/1/flops_per_s", float("nan"), "products[1].flops_per_s=NaN"),
        ("products/1/flops_per_s", float("inf"), "products[1].flops_per_s=Infinity"),
        ("products/1/flops_per_s", "7e14", 'products[1].flops_per_s="7e14"'),
        ("products/1/flops_per_s", True, "products[1].flops_per_s=true"),
        ("products/1/flops_per_s", None, "products[1]"),
        ("products/1/m", 0, "products[1].m=0"),
        ("products/1/dtype", "int4", 'products[1].dtype="int4"'),
        ("products/0/low", 7.5e14, "products[0].low=7.5e+14: the band does not contain flops_per_s=7e+14"),
        ("products/0/high", 1e14, "products[0].high=1e+14: the band does not contain"),
        ("products/0/hihg", 1e15, "hihg"),
        ("memory/bytes_per_s", None, "memory"),
        ("memory/low", -1.0, "memory.low=-1"),
        ("collectives/all-gather/bytes_per_s", None, "collectives.all-gather"),
        ("collectives/all-gather/fixed_s", -1e-6, "collectives.all-gather.fixed_s=-1e-06"),
        ("collectives/all-gather/points/0/seconds", 0, "collectives.all-gather.points[0].seconds=0"),
        (
            "collectives/gather",
            {"fixed_s": 0, "bytes_per_s": 1},
            "Object contains unknown field `gather`",
        ),
        ("attention/0/kernel", "flash", "attention[0].kernel=flash is unknown; use one of aiter, cudnn"),
        ("attention/0/direction", "sideways", 'attention[0].direction="sideways"'),
        ("attention/0/low", 6e14, "attention[0].low=6e+14: the band does not contain"),
        ("host/to_host_bytes_per_s", 0, "host.to_host_bytes_per_s=0"),
        ("host/from_host_bytes_per_s", None, "host"),
        ("procucts", [], "procucts"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(path, value, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read(tmp_path, changed(path, value))
    text = str(error.value)
    assert "\n" not in text and "node.json" in text
    assert text.endswith("measure it again") or "use one of" in text


def test_a_file_replaces_the_rates_of_its_own_kind_of_target_alone(tmp_path):
    read(tmp_path, NODE)
    file = str(tmp_path / "node.json")
    assert parse_target("h100:16", hardware_file=file).hardware.rates.best_flops.typical == 7e14
    with pytest.raises(ConfigError, match=r"has base h100, target=mi300x:8; use target=h100:8"):
        parse_target("mi300x:8", hardware_file=file)
    half = parse_target("h100:8", attention_efficiency=0.5, hardware_file=file).hardware
    assert attention(half, "cudnn", "forward").typical == 3.5e14


def test_any_file_is_read_or_refused_in_a_line(tmp_path):
    def read_bytes(content: bytes) -> Hardware:
        path = tmp_path / "node.json"
        path.write_bytes(content)
        hardware = read_hardware(path)
        hardware.rates.seconds(Work(1.0, (100.0, 100.0, 100.0)), "typical")
        return hardware

    check_door(read_bytes, [json.dumps(NODE).encode()], (ConfigError,))
