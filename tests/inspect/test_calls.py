"""Calls: computations that do not fit the instructions that call them, and operands that arrive late."""

import pytest

from tests.builders.hlo import UNIT, simulated
from tsp_jax import inspect
from tsp_jax.errors import ConfigError

COMPUTATIONS = """
%two (a: f32[4], b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  ROOT %sum = f32[4]{0} add(%a, %b)
}

%short (s: (f32[4], f32[4])) -> (f32[4]) {
  %s = (f32[4]{0}, f32[4]{0}) parameter(0)
  %first = f32[4]{0} get-tuple-element(%s), index=0
  ROOT %less = (f32[4]{0}) tuple(%first)
}

%long (s: (f32[4], f32[4])) -> (f32[4], f32[4], f32[4]) {
  %s = (f32[4]{0}, f32[4]{0}) parameter(0)
  %first = f32[4]{0} get-tuple-element(%s), index=0
  ROOT %more = (f32[4]{0}, f32[4]{0}, f32[4]{0}) tuple(%first, %first, %first)
}

%go (s: (f32[4], f32[4])) -> pred[] {
  %s = (f32[4]{0}, f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%one (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %same = f32[4]{0} negate(%p)
}
"""
PAIR = "(f32[4]{0}, f32[4]{0})"


def program(*lines: str, header: str = "") -> str:
    parameters = "  %x = f32[4]{0} parameter(0)\n  %i = s32[] parameter(1)\n  %t = " + PAIR + " tuple(%x, %x)"
    body = "\n".join(f"  {line}" for line in lines)
    main = f"ENTRY %main () -> f32[4] {{\n{parameters}\n{body}\n}}\n"
    return f"HloModule m, is_scheduled=true{header}\n{COMPUTATIONS}\n{main}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%bad = f32[4]{0} call(%x), to_apply=%two", "bad .call. passes 1 arguments to two, which has 2"),
        ("%bad = f32[4]{0} call(), to_apply=%one", "bad .call. passes 0 arguments to one, which has 1"),
        ("%bad = f32[4]{0} fusion(%x), kind=kLoop, calls=%two", "bad .fusion. passes 1 arguments"),
        (f"%bad = {PAIR} fusion(%x), kind=kLoop, calls=%one", "bad .fusion. makes 2 arrays by one, which returns 1"),
        (
            f"%bad = {PAIR} while(%t), condition=%go, body=%short",
            "bad .while. makes 2 arrays by short, which returns 1",
        ),
        (f"%bad = {PAIR} while(%t), condition=%go, body=%long", "bad .while. makes 2 arrays by long, which returns 3"),
        ("%bad = (f32[4]{0}) while(%t), condition=%go, body=%short", "bad .while. makes 2 arrays by short"),
        (f"%bad = {PAIR} while(), condition=%go, body=%short", "bad .while. needs an operand"),
        ("%bad = f32[4]{0} conditional(%i, %x), branch_computations={%one, %one}", "has 2 branches and 2 operands"),
        ("%bad = f32[4]{0} conditional(%i, %x), branch_computations={%two}", "passes 1 arguments to two"),
        ("%bad = f32[4]{0} conditional()", "bad .conditional. needs an operand"),
        (f"%bad = {PAIR} conditional(%i, %x), branch_computations={{%one}}", "makes 2 arrays by one, which returns 1"),
        ("%bad = f32[4]{0} async-done()", "bad .async-done. needs an operand"),
        ("%bad = f32[4]{0} all-gather-done()", "bad .all-gather-done. needs an operand"),
    ],
)
def test_a_call_that_does_not_fit_is_named(line, message):
    with pytest.raises(ConfigError, match=message) as error:
        inspect.report(program(line, "ROOT %end = f32[4]{0} negate(%x)"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alias", ["{}: (7, {})", "{0}: (0, {})", "{}: (0, {1})"])
def test_an_alias_of_what_is_absent_is_named(alias):
    text = program("ROOT %end = f32[4]{0} negate(%x)", header=f", input_output_alias={{ {alias}, may-alias) }}")
    with pytest.raises(ConfigError, match="input_output_alias"):
        inspect.report(text.replace("}), may", "}, may"))


LATE = {
    "at the start": (
        "((f32[4], f32[4]), f32[4], u32[]) async-start(%x, %n), calls=%two",
        "((f32[4], f32[4]), f32[4], u32[]) async-update(%s)",
    ),
    "one later": (
        "((f32[4]), f32[4], u32[]) async-start(%x), calls=%two",
        "((f32[4], f32[4]), f32[4], u32[]) async-update(%s, %n)",
    ),
    "both later": (
        "((), (), u32[]) async-start(), calls=%two",
        "((f32[4], f32[4]), f32[4], u32[]) async-update(%s, %x, %n)",
    ),
    "results at the end": (
        "((), (), u32[]) call-start(), to_apply=%two",
        "((f32[4], f32[4]), (), u32[]) call-update(%s, %x, %n)",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_operands_of_an_asynchronous_call_may_arrive_late(name):
    """Whenever they come: x and i, n, the result and the context are alive, and nothing twice."""
    start, update = LATE[name]
    done = "call-done" if "call-update" in update else "async-done"
    lines = "%n = f32[4]{0} negate(%x)", f"%s = {start}", f"%u = {update}", f"ROOT %d = f32[4]{{0}} {done}(%u)"
    peak = inspect.report(program(*lines)).peak
    assert sum(b.bytes for b in peak.buffers) == peak.bytes
    assert sorted(b.bytes for b in peak.buffers) == [4, 4, 16, 16, 16]  # i and the context; x, n, the result


def test_a_program_without_work_has_a_peak_and_a_timeline():
    found = inspect.report(
        "HloModule m, is_scheduled=true\n\nENTRY %e (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4]{} parameter(0)\n}\n"
    )
    assert (found.peak.bytes, found.peak.at) == (16, "")
    assert simulated("  ROOT %p = f32[4,4]{} parameter(0)", hardware=UNIT).step_s == 0


def test_a_layout_without_dimensions():
    text = program("%m = f32[4,4]{} broadcast(%x), dimensions={0}", "ROOT %end = f32[4]{0} negate(%x)")
    text = text.replace("negate(%x)\n}\n", "dot(%m, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n")
    found = inspect.report(text)
    assert found.peak.bytes == 16 + 4 + 64 + 16
    assert found.flops == 32


def test_a_token_that_nothing_makes_is_an_element_of_a_tuple():
    """The array behind it is alive until it is read, beside another one that is made meanwhile."""
    text = program(
        "%k = token[] after-all()", "%n = f32[4]{0} negate(%x)", "%z = (token[], f32[4]{0}) tuple(%k, %n)",
        "%later = f32[8]{0} broadcast(%i), dimensions={}", "%a = f32[4]{0} get-tuple-element(%z), index=1",
        "ROOT %end = f32[12]{0} concatenate(%later, %a), dimensions={0}",
    )  # fmt: skip
    assert inspect.report(text).peak.bytes == 16 + 4 + 16 + 32 + 48  # x, i, n, later, end
