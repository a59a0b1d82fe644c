"""The memory at hand, the bytes of shards, and how many devices there may be."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.builders.arrays import place_case
from tsp_jax.errors import ConfigError
from tsp_jax.hardware import memory
from tsp_jax.hardware.targets import parse_target
from tsp_jax.tools.cli import use_devices


def test_memory_is_that_of_the_host_its_container_or_the_device(tmp_path, monkeypatch):
    cpus = [SimpleNamespace(platform="cpu")] * 4
    whole = memory.memory_bytes(cpus[:1])
    assert whole is not None and memory.memory_bytes(cpus) == whole // 4
    (tmp_path / "limit").write_text("1000000\n")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "limit")
    assert memory.memory_bytes(cpus) == 250_000
    (tmp_path / "limit").write_text("max\n")
    assert memory.memory_bytes(cpus) == whole // 4
    gpus = [SimpleNamespace(platform="gpu", memory_stats=lambda n=n: {"bytes_limit": n}) for n in (80, 70)]
    assert memory.memory_bytes(gpus) == 70
    assert memory.memory_bytes([SimpleNamespace(platform="tpu", memory_stats=lambda: None)]) is None
    memory.check_room("what", 10**30, None, "use less")


def test_bytes_are_those_of_a_shard():
    sharding = place_case("tsp8").sharding("sequence")
    array = jax.ShapeDtypeStruct((16, 3), np.float32, sharding=sharding)
    assert memory.shard_bytes({"a": array, "b": [array]}) == 2 * 2 * 3 * 4


@pytest.mark.parametrize("text", ["cpu:2000", "mi300x:1000000000", "h100:" + "9" * 5000])
def test_targets_of_too_many_devices_are_refused(text):
    with pytest.raises(ConfigError, match=re.escape(f"target={text:.80} has too many devices")):
        parse_target(text)


def test_too_many_virtual_devices_are_refused():
    with pytest.raises(ConfigError, match="cpu_devices=20000 is too large; use 1024 at most"):
        use_devices(20_000)
