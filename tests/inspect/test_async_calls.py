"""Calls that run beside the rest of the program, as libtpu 0.0.50 writes gathers on a TPU's sparse cores."""

import pytest

from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.inspect import parse
from tsp_jax.inspect.peak import find_peak
from tsp_jax.inspect.timeline import simulate

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=1

%inner (q.0: f32[1000], q.1: s32[10]) -> f32[10] {{
  %q.1 = s32[10] parameter(1)
  %q.0 = f32[1000] parameter(0)
  ROOT %rows = f32[10] custom-call(%q.0, %q.1), custom_call_target="gather"
}}, execution_thread="sparsecore"

%offload (p.0: f32[1000], p.1: s32[10]) -> f32[10] {{
  %p.0 = f32[1000] parameter(0)
  %p.1 = s32[10] parameter(1)
  %inner-start = ((f32[1000], s32[10]), f32[10], u32[]) call-start(%p.0, %p.1), to_apply=%inner
  ROOT %inner-done = f32[10] call-done(%inner-start)
}}, execution_thread="sparsecore"

ENTRY %main (x: f32[10], ids: s32[10]) -> f32[10] {{
  %x = f32[10] parameter(0)
  %ids = s32[10] parameter(1)
  {before}
  %table = f32[1000] broadcast(%x), dimensions={{}}
  {after}
  %big = f32[500] broadcast(%x), dimensions={{}}
  %small = f32[10] slice(%big), slice={{[0:10]}}
  %done = f32[10] call-done({done})
  %other = f32[700] broadcast(%x), dimensions={{}}
  %other.small = f32[10] slice(%other), slice={{[0:10]}}
  ROOT %sum = f32[10] add(%done, %other.small)
}}
"""
START = "%start = ((f32[1000], s32[10]), f32[10], u32[]) call-start(%table, %ids), to_apply=%offload"
LATE = "%start = ((), (), (s32[1])) call-start(), to_apply=%offload"
EMPTY = "%update = ((f32[1000], s32[10]), f32[10], u32[]) call-update(%start)"
ARRIVE = "%update = ((f32[1000], s32[10]), f32[10]) call-update(%start, %table, %ids)"
CASES = {
    "operands at the start": ("", START, "%start"),
    "operands at the start, and an update": ("", f"{START}\n  {EMPTY}", "%update"),
    "operands at the update": (LATE, ARRIVE, "%update"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_operands_live_until_the_call_is_done(case):
    program = parse(PROGRAM.format(**dict(zip(("before", "after", "done"), case, strict=True))))
    peak = find_peak(program)
    alive = {buffer.name for buffer in peak.buffers}
    assert {"x", "ids", "table", "rows", "big"} <= alive
    assert 4 * (10 + 10 + 1000 + 10 + 500) <= peak.bytes <= 4 * (10 + 10 + 1000 + 10 + 500 + 10 + 2)
    assert "other" not in alive  # the table is dead by then


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_their_work_counts_once(case):
    program = parse(PROGRAM.format(**dict(zip(("before", "after", "done"), case, strict=True))))
    kernels = simulate(program, HARDWARE["v5p"]).kernels
    assert sum(each.task.bytes for each in kernels if "start" in each.task.name) == 4 * (1000 + 10 + 10)
