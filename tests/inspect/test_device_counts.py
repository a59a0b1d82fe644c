"""Texts of programs for another number of devices than the target's, or for a number that they do not name."""

import pytest

from tests.builders.hlo import GROUPS, UNIT, gather, kernel, lines
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import report
from tsp_jax.tools.inspect import TextOptions, inspect_text


def text(header: str) -> str:
    start, done = gather("g", 56)
    body = lines(start, kernel("k", 80), done)
    return f"HloModule test, is_scheduled=true{header}\n\nENTRY %main () -> () {{\n{body}\n}}\n"


@pytest.mark.parametrize("header", [", num_partitions=8", ", replica_count=8", ", num_partitions=4, replica_count=2"])
def test_the_number_that_a_text_names_is_that_of_the_target(header):
    assert "devices" not in report(text(header), target="h100:8").unknown
    with pytest.raises(ConfigError, match="target=h100:4 has 4 devices, and the program was compiled for 8; use"):
        report(text(header), target="h100:4")


def test_a_number_that_a_text_does_not_name_is_unknown():
    assert "num_partitions=8" in report(text(""), target="h100:8").unknown["devices"]


@pytest.mark.parametrize("target", ["h100", "h100:1", UNIT, None])
def test_a_target_without_a_number_asks_for_none(target):
    assert "devices" not in report(text(""), target=target).unknown


def test_the_command_refuses_another_number(tmp_path, capsys):
    file = tmp_path / "a.hlo"
    file.write_text(text(", num_partitions=8"))
    assert GROUPS in file.read_text()
    assert inspect_text(str(file), TextOptions(target="h100")) == 0
    with pytest.raises(ConfigError, match="compiled for 8; use target=h100:8"):
        inspect_text(str(file), TextOptions(target="h100:16"))


def test_the_command_says_that_the_number_is_unknown(tmp_path, capsys):
    file = tmp_path / "a.hlo"
    file.write_text(text(""))
    assert inspect_text(str(file), TextOptions(target="h100:8")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "unknown (devices)" in line]
    assert "whether it was compiled for 8 devices" in line
