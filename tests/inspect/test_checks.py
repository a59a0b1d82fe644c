"""Texts that are no program: each is refused in one line that names the instruction, and none takes long."""

import io
import time

import pytest

from tests.builders.hlo import module_of
from tsp_jax import inspect
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import render
from tsp_jax.inspect.checks import DEEPEST

X = "  %x = f32[4,4]{1,0} parameter(0)\n"
T = '  %t = (f32[4,4]{1,0}, s32[]) custom-call(), custom_call_target="f"\n'
DOT = "  ROOT %bad = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
CONVOLUTION = "  ROOT %bad = f32[4,4]{1,0} convolution(%x, %x), dim_labels=bf_io->bf"
SPATIAL = (
    "  %y = f32[2,9,3] parameter(1)\n  %k = f32[3,3,7] parameter(2)\n  ROOT %bad = f32[2,9,7] convolution(%y, %k), "
)
LABELS = "dim_labels=b0f_0io->b0f"
REDUCE = "  ROOT %bad = f32[4,4]{1,0} all-reduce(%x), to_apply=%add, replica_groups="


def text_of(lines: str, *computations: str, header: str = "num_partitions=8") -> str:
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
    add += "  ROOT %sum = f32[] add(%a, %b)\n}\n"
    others = "\n".join((add, *computations))
    return f"HloModule m, is_scheduled=true, {header}\n\n{others}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


def read_all(text: str) -> None:
    """Everything that a report computes."""
    found = inspect.report(text, target="h100", record=True)
    found.to_json()
    out = render.console()
    out.file = io.StringIO()
    render.show(found, out)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (X + "  ROOT %bad = f32[4,4] add(%bad, %x)", "operand bad, which no earlier"),
        (X + "  ROOT %bad = f32[4,4] add(%late, %x)\n  %late = f32[4,4] negate(%x)", "operand late, which no earlier"),
        (X + "  %bad = f32[4,4] negate(%x)\n  ROOT %bad = f32[4,4] negate(%x)", "stands twice"),
        (X + "  ROOT %y = f32[4,4] negate(%x)\n  ROOT %bad = f32[4,4] negate(%x)", "second ROOT"),
        ("  ROOT %bad = f32[4] parameter(1000000000)", "lacks parameter(0)"),
        ("  %x = f32[4] parameter(0)\n  ROOT %bad = f32[4] parameter(0)", "number 0"),
        ("  ROOT %bad = f32[4] parameter(one)", "number one"),
        (X + "  ROOT %bad = f32[4,4] add(%x, 1)", "operand 1, which no earlier"),
        (T + "  ROOT %bad = s32[] get-tuple-element(%t)", "index none"),
        (T + "  ROOT %bad = s32[] get-tuple-element(%t), index=2", "index 2, and its operand is a tuple of 2"),
        (T + "  ROOT %bad = s32[] get-tuple-element(%t), index=-1", "index -1"),
        (X + "  ROOT %bad = f32[4] get-tuple-element(%x), index=0", "no tuple"),
        (T + "  ROOT %bad = (s32[], s32[]) get-tuple-element(%t), index=1", "another number of arrays"),
        (X + "  ROOT %bad = (f32[4,4], f32[4,4]) tuple(%x)", "another number of arrays"),
        (X + DOT.replace("={1}", "={99}"), "dimension numbers"),
        (X + "  ROOT %bad = f32[4,4] dot(%x)", "needs 2 arrays"),
        (X + CONVOLUTION.replace(", dim_labels=bf_io->bf", ""), "dimension numbers"),
        (X + CONVOLUTION.replace("bf_io->bf", "bf_io"), "dimension numbers"),
        (X + CONVOLUTION.replace("bf_io->bf", "b01f_io01->b01f"), "dimension numbers"),
        (X + CONVOLUTION + ", batch_group_count=0", "dimension numbers"),
        (X + SPATIAL + "window={size=3 stride=0}, " + LABELS, "window"),
        (X + SPATIAL + "window={size=3 lhs_dilate=0}, " + LABELS, "window"),
        (
            X + SPATIAL.replace("[3,3,7]", "[1000000000,3,7]").replace("[2,9,7]", "[2,1000000000,7]") + LABELS,
            "window",
        ),
        (X + REDUCE + "[1,1000000000]<=[1000000000]", "more than 999,999 devices"),
        (X + REDUCE + "[2,4]<=[8]T(7,0)", "does not add up"),
        (X + REDUCE + "[8,0]<=[8]", "no whole groups"),
        (X + REDUCE + "[2,3]<=[8]", "no whole groups"),
        (X + REDUCE + "mesh['a'=0,'b'=4] {'a':(2)4}", "no whole groups"),
        (X + REDUCE + "mesh['a'=8], device_ids=(0,1) {'a'}", "does not add up"),
        (X + REDUCE + "a spelling of next year", "none of HLO's notations"),
        (X + "  ROOT %bad = f32[4,4] collective-permute(%x), source_target_pairs={{0,1,2}}", "no pairs"),
        ("  ROOT %bad = f32[4,4]{2,0} parameter(0)", "layout does not fit"),
        ("  ROOT %bad = f32[4,4]{1,0:T(0,128)} parameter(0)", "layout does not fit"),
        ("  ROOT %bad = f32[1000000000,1000000000,1000000000] parameter(0)", "elements or more"),
        ("  ROOT %bad = f32[1" + "0" * 400 + "] parameter(0)", "at most 18 digits"),
        ("  ROOT %bad = f32[-4] parameter(0)", "must be numbers"),
        ("  ROOT %bad = " + "(" * 5000 + ")" * 5000 + " tuple()", "tuples more than"),
        (X + "  ROOT %bad = f32[] dynamic-update-slice()", "needs 2 arrays"),
        (X + "  ROOT %bad = f32[4,4] bitcast()", "needs an operand"),
        (X + "  ROOT %bad = () exponential(%x)", "needs 1 arrays"),
        (X + "  ROOT %bad = f32[4,4] fusion(%x), kind=kLoop", "lacks its calls"),
    ],
)
def test_one_line_names_the_instruction(lines, says):
    with pytest.raises(ConfigError) as error:
        read_all(text_of(lines))
    line = str(error.value)
    assert says in line and "\n" not in line and len(line) < 400
    assert "bad" in line or "main" in line or "1000" in line


@pytest.mark.parametrize(
    "header", ["num_partitions=x", "num_partitions=0", "replica_count=1000000000", "replica_count=-1"]
)
def test_numbers_of_devices(header):
    with pytest.raises(ConfigError, match=f"{header.partition('=')[0]}=.* is no number of devices"):
        inspect.parse(text_of(X + "  ROOT %y = f32[4,4] negate(%x)", header=header))


CALLS = {
    "call": "call(%p.{0}), to_apply=%{1}",
    "fusion": "fusion(%p.{0}), kind=kLoop, calls=%{1}",
    "conditional": "conditional(%i.{0}, %p.{0}), branch_computations={{%{1}}}",
}


def call(name: str, callee: str, times: int = 1, kind: str = "call") -> str:
    lines = [f"  %p.{name} = f32[4] parameter(0)", f"  %i.{name} = s32[] constant(0)"]
    lines += [f"  %c{n}.{name} = f32[4] {CALLS[kind].format(name, callee)}" for n in range(times)]
    body = "\n".join([*lines, f"  ROOT %r.{name} = f32[4] negate(%p.{name})"])
    return f"%{name} (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


END = "%f0 (p: f32[4]) -> f32[4] {\n  ROOT %p.f0 = f32[4] parameter(0)\n}\n"
MAIN = "  %x = f32[4] parameter(0)\n  ROOT %y = f32[4] call(%x), to_apply=%"


@pytest.mark.parametrize(
    ("computations", "start", "says"),
    [
        ([call("f1", "f1")], "f1", "c0.f1 (call) calls f1"),
        ([call("f1", "f2"), call("f2", "f1")], "f1", "a cycle of calls"),
        ([END, *(call(f"f{n + 1}", f"f{n}") for n in range(5000))], "f5000", f"more than {DEEPEST} deep"),
        ([END, *(call(f"f{n + 1}", f"f{n}", 2) for n in range(24))], "f24", "more than 1,000,000 instructions"),
        ([END, *(call(f"f{n + 1}", f"f{n}", 16) for n in range(6))], "f6", "more than 1,000,000 instructions"),
    ],
)
def test_calls_that_have_no_end(computations, start, says):
    with pytest.raises(ConfigError) as error:
        read_all(text_of(MAIN + start, *computations))
    assert says in str(error.value)


@pytest.mark.parametrize("kind", CALLS)
def test_what_nests_as_deeply_as_it_may_is_read(kind):
    texts = [END, *(call(f"f{n + 1}", f"f{n}", kind=kind) for n in range(DEEPEST - 2))]
    read_all(text_of(f"{MAIN}f{DEEPEST - 2}", *texts))


def chain(n: int, opcode: str, operand: str = "") -> str:
    start = (
        '  %k = s32[] constant(0)\n  %u = f32[1] parameter(0)\n  %c0 = f32[256] custom-call(), custom_call_target="f"\n'
    )
    steps = [f"  %c{i + 1} = f32[256] {opcode}(%c{i}{operand})" for i in range(n)]
    return start + "\n".join(steps) + f"\n  ROOT %r = f32[256] copy(%c{n})"


def seconds(lines: str) -> float:
    module = inspect.parse(text_of(lines))
    began = time.process_time()
    inspect.find_peak(module)
    return time.process_time() - began


@pytest.mark.parametrize(("opcode", "operand"), [("negate", ""), ("dynamic-update-slice", ", %u, %k")])
def test_the_peak_takes_time_in_proportion_to_the_text(opcode, operand):
    """Four times the text took 14 to 16 times as long when every group was joined anew."""
    short, long = (min(seconds(chain(n, opcode, operand)) for _ in range(3)) for n in (500, 2000))
    assert long < 8 * short


def test_numbers_that_double_are_followed_without_recursion():
    body = "%body (b: (s32[])) -> (s32[]) {\n  ROOT %b = (s32[]) parameter(0)\n}\n"
    go = "  %c = (s32[]) parameter(0)\n  ROOT %go = pred[] constant(true)"
    cond = f"%cond (c: (s32[])) -> pred[] {{\n{go}\n}}\n"
    steps = [f"  %c{n + 1} = s32[] add(%c{n}, %c{n})\n" for n in range(3000)]
    lines = "  %c0 = s32[] constant(1)\n" + "".join(steps) + "  %t = (s32[]) tuple(%c3000)\n"
    module = module_of(lines + "  ROOT %w = (s32[]) while(%t), condition=%cond, body=%body", body, cond)
    assert module.trip_count(module.entry.root) is None


def test_a_loop_that_never_settles_is_refused():
    """Each iteration starts what nothing waits for."""
    start = "(f32[8], f32[64]) all-gather-start(%x), replica_groups={}, dimensions={0}"
    state = "(f32[8])"
    body = (
        f"%body (b: {state}) -> {state} {{\n  %b = {state} parameter(0)\n  %x = f32[8] get-tuple-element(%b), index=0\n"
    )
    body += f"  %s = {start}\n  ROOT %t = {state} tuple(%x)\n}}\n"
    cond = f"%cond (c: {state}) -> pred[] {{\n  %c = {state} parameter(0)\n  ROOT %go = pred[] constant(true)\n}}\n"
    lines = f"  %p = f32[8] parameter(0)\n  %t = {state} tuple(%p)\n  ROOT %w = {state} while(%t), condition=%cond, "
    lines += 'body=%body, backend_config={"known_trip_count":{"n":"1000000000"}}'
    with pytest.raises(ConfigError, match="never become alike"):
        read_all(text_of(lines, body, cond))


def test_loops_that_run_longer_than_any_program_are_refused():
    lines, inner, count = "  %p = f32[8] parameter(0)\n", [], '{"known_trip_count":{"n":"1000000000000000"}}'
    for n in range(4):
        work = f"%y{n} = f32[8] negate(%x{n})" if not n else f"%y{n} = f32[8] while(%x{n}), condition=%c{n - 1}, "
        work += f"body=%b{n - 1}, backend_config={count}" if n else ""
        cond = f"  %q{n} = f32[8] parameter(0)\n  ROOT %go{n} = pred[] constant(true)"
        inner += [f"%b{n} (p: f32[8]) -> f32[8] {{\n  %x{n} = f32[8] parameter(0)\n  ROOT {work}\n}}\n"]
        inner += [f"%c{n} (p: f32[8]) -> pred[] {{\n{cond}\n}}\n"]
    lines += f"  ROOT %w = f32[8] while(%p), condition=%c3, body=%b3, backend_config={count}"
    with pytest.raises(ConfigError, match="times or more"):
        read_all(text_of(lines, *inner))
