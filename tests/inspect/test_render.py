"""Tables of a report: nothing that stands in a program's text is markup."""

import io

import pytest

from tests.builders.hlo import entry
from tsp_jax import inspect
from tsp_jax.inspect import render

NAMES = ["[bold]x[/bold]", "[/]", "[link=https://example.org]x", ":warning:", "[red", "\\[", "f32[2]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_not_markup(name, monkeypatch):
    text = f"""HloModule m, is_scheduled=true, num_partitions=2

ENTRY %e (x: f32[4096]) -> f32[8192] {{
  %x = f32[4096]{{0}} parameter(0), metadata={{op_name="{name}"}}
  ROOT %g = f32[8192]{{0}} all-gather(%x), replica_groups={{{{0,1}}}}, dimensions={{0}}, metadata={{op_name="{name}/g"}}
}}
"""
    out = render.console()
    out.file = io.StringIO()
    render.show(inspect.report(text, target="h100"), out)
    printed = out.file.getvalue()
    assert name in printed and "f32[4096]" in printed


def test_a_program_of_one_argument():
    """It does nothing, so no instruction stands at its peak."""
    module = entry("  ROOT %x = f32[4] parameter(0)", header="input_output_alias={ {}: (0, {}, may-alias) }")
    found = inspect.find_peak(module)
    assert (found.bytes, found.at) == (16, "")


def test_a_call_without_results():
    lines = '  %x = f32[4]{0} parameter(0)\n  ROOT %d = () custom-call(%x, %x), custom_call_target="print"'
    text = f"HloModule m, is_scheduled=true\n\nENTRY %e (x: f32[4]) -> () {{\n{lines}\n}}\n"
    assert inspect.report(text, target="cpu").flops == 0
