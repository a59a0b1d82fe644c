"""The timeline of small programs whose answer is known, and what their instructions cost."""

import dataclasses
import gzip
import itertools
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE
from tsp_jax.inspect import collectives, parse
from tsp_jax.inspect.hlo import declared_trips
from tsp_jax.inspect.roofline import Costs, _meetings
from tsp_jax.inspect.schedule import readable_scope
from tsp_jax.inspect.timeline import Timeline, simulate
from tsp_jax.inspect.trace import write_trace
from tsp_jax.ops.kernels import XlaKernel, delta
from tsp_jax.ops.kernels.mask import Tokens, mean_visits

UNIT = dataclasses.replace(
    HARDWARE["h100"], sustained_flops=1.0, sustained_bandwidth=1.0, link_bandwidth=1.0, host_bandwidth=1.0
)
"""a byte of memory, of a link or of the host a second, and an operation a second"""
TPU_UNIT = dataclasses.replace(UNIT, platform="tpu")
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}"
SYNC = 'backend_config={"collective_backend_config":{"is_sync":true}}'
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module(entry: str, *computations: str, header: str = "num_partitions=8"):
    """A program from the lines of its entry and whole other computations."""
    others = "\n".join(computations)
    return parse(
        f"HloModule test, is_scheduled=true, {header}\n\n{ADD}\n{others}\n\nENTRY %main () -> f32[] {{\n{entry}\n}}\n"
    )


def run(entry: str, *computations: str, hardware=UNIT, **options) -> Timeline:
    return simulate(module(entry, *computations), hardware, **options)


def kernel(name: str, seconds: int, extra: str = "") -> str:
    """A copy that takes so many seconds: it reads and writes 4 bytes an element."""
    return f"%{name} = f32[{seconds // 8}] copy(f32[{seconds // 8}] %p.{name}){extra}"


def gather(name: str, seconds: int) -> tuple[str, str]:
    """Start and done of a gather that takes so many seconds: of 4 bytes an element, 7 / 8 come from others."""
    n = seconds // 28
    assert n * 28 == seconds
    start = f"%{name} = (f32[{n}], f32[{8 * n}]) all-gather-start(f32[{n}] %x.{name}), {GROUPS}, dimensions={{0}}"
    return start, f"%{name}-done = f32[{8 * n}] all-gather-done(%{name})"


OPERAND = re.compile(r"(\w+\[[\d,]*\]|\([^()]*\)) (%[px]\.[\w.]+)")


def lines(*instructions: str) -> str:
    """Instructions, after a parameter for every operand that is named p.* or x.*, which nothing makes."""
    made = {name: shape for line in instructions for shape, name in OPERAND.findall(line)}
    parameters = [f"{name} = {shape} parameter({number})" for number, (name, shape) in enumerate(made.items())]
    return "\n".join(f"  {line}" for line in (*parameters, *instructions, "ROOT %end = () tuple()"))


def overlapped(moved: int, computed: int) -> str:
    start, done = gather("g", moved)
    return lines(start, kernel("k", computed), done)


# ------------------------------------------------------------------------------------------------ queues


@pytest.mark.parametrize("spelling", ["all-reduce", "all-reduce-start"])
def test_what_blocks_is_wholly_exposed(spelling):
    reduce = f"%r = f32[4] {spelling}(f32[4] %x.r), {GROUPS}, to_apply=%add, {SYNC}"
    done = ["%r.done = f32[4] all-reduce-done(%r)"] if spelling.endswith("start") else []
    result = run(lines(kernel("a", 80), reduce, kernel("b", 40), *done))
    assert (result.step_s, result.compute_s) == (148, 120)
    assert result.exposed_comm_s == result.comm_s == 28  # 16 bytes, 2 x 7 / 8
    assert result.hidden_fraction == {"r": 0.0}


@pytest.mark.parametrize(
    ("moved", "computed", "step", "exposed", "hidden"),
    [(56, 80, 80, 0, 1.0), (56, 56, 56, 0, 1.0), (56, 16, 56, 40, 16 / 56), (56, 0, 56, 56, 0.0)],
)
def test_what_computes_meanwhile_hides_communication(moved, computed, step, exposed, hidden):
    result = run(overlapped(moved, computed))
    assert (result.step_s, result.compute_s, result.comm_s) == (step, computed, moved)
    assert result.exposed_comm_s == exposed
    assert result.hidden_fraction == {"g": pytest.approx(hidden)}


def test_the_second_collective_waits_for_the_first():
    (a, a_done), (b, b_done) = gather("a", 28), gather("b", 56)
    result = run(lines(a, b, kernel("k", 16), a_done, kernel("l", 40), b_done))
    # a ends at 28, compute waits 12; l until 68, b from 28 to 84, compute waits 16
    assert (result.step_s, result.exposed_comm_s) == (84, 28)
    assert result.hidden_fraction == {"a": pytest.approx(16 / 28), "b": pytest.approx(40 / 56)}


def test_waiting_for_the_second_alone_includes_the_first():
    (a, a_done), (b, b_done) = gather("a", 28), gather("b", 56)
    result = run(lines(a, b, b_done, a_done))
    assert (result.step_s, result.exposed_comm_s) == (84, 84)
    assert result.hidden_fraction == {"a": 1.0, "b": 0.0}


def test_links_idle_until_something_is_issued():
    (a, a_done), (b, b_done) = gather("a", 28), gather("b", 28)
    assert run(lines(a, kernel("k", 80), a_done, b, b_done)).step_s == 108


def test_what_blocks_waits_for_what_was_started_before():
    a, a_done = gather("a", 56)
    result = run(lines(a, f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}, to_apply=%add", a_done))
    assert (result.step_s, result.exposed_comm_s) == (84, 84)


def test_a_program_ends_when_all_that_it_started_has():
    start, _ = gather("a", 56)
    assert run(lines(start, kernel("k", 16))).step_s == 56


def test_compute_takes_the_longer_of_products_and_memory():
    def product(k):
        left, right = f"f32[2,{k}] %p.a", f"f32[{k},2] %p.b"
        return lines(f"%d = f32[2,2] dot({left}, {right}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}")

    fast = dataclasses.replace(UNIT, sustained_bandwidth=1000.0)
    assert run(product(50), hardware=UNIT).step_s == 4 * (100 + 100 + 4)
    result = run(product(50), hardware=fast)
    assert result.step_s == result.matmul_s == result.flops == 2 * 4 * 50


def test_generic_async_collectives_run_on_the_links():
    wrapped = f"""%wrapped (q: f32[2]) -> f32[16] {{
  %q = f32[2] parameter(0)
  ROOT %inner = f32[16] all-gather(%q), {GROUPS}, dimensions={{0}}
}}
"""
    start = "%s = ((f32[2]), f32[16], u32[]) async-start(f32[2] %x.s), calls=%wrapped"
    update = "%u = ((f32[2]), f32[16], u32[]) async-update(%s), calls=%wrapped"
    done = "%d = f32[16] async-done(%u), calls=%wrapped"
    result = run(lines(start, kernel("k", 40), update, done, kernel("l", 8)), wrapped)
    assert (result.step_s, result.comm_s, result.exposed_comm_s) == (64, 56, 16)
    assert result.hidden_fraction == {"inner": pytest.approx(40 / 56)}


def test_generic_async_compute_takes_its_turn():
    wrapped = "%wrapped (q: f32[2]) -> f32[2] {\n  %q = f32[2] parameter(0)\n  ROOT %inner = f32[2] copy(%q)\n}\n"
    start = "%s = ((f32[2]), f32[2], u32[]) async-start(f32[2] %x.s), calls=%wrapped"
    result = run(lines(start, kernel("k", 40), "%d = f32[2] async-done(%s), calls=%wrapped"), wrapped)
    assert (result.step_s, result.compute_s) == (56, 56)


@pytest.mark.parametrize(("computed", "exposed"), [(16, 8), (80, 0)])
def test_host_copies_have_a_queue_of_their_own(computed, exposed):
    start = "%c = (f32[6]{0:S(5)}, f32[6], u32[]) copy-start(f32[6] %x.c)"
    g, g_done = gather("g", 28)
    result = run(lines(start, g, kernel("k", computed), "%d = f32[6]{0:S(5)} copy-done(%c)", g_done))
    assert (result.host_s, result.exposed_host_s, result.exposed_comm_s) == (
        24,
        exposed,
        max(0, 28 - computed - exposed),
    )
    assert result.step_s == max(28, computed)


SLOTS = "f32[10,6]{1,0:S(5)}"
PUT_AND_TAKE = f"""%put (a: f32[10,6], b: f32[1,6], c: s32[]) -> f32[10,6] {{
  %a = {SLOTS} parameter(0)
  %b = f32[1,6] parameter(1)
  %c = s32[] parameter(2)
  ROOT %u = {SLOTS} dynamic-update-slice(%a, %b, %c, %c)
}}

%take (d: f32[10,6], e: s32[]) -> f32[1,6] {{
  %d = {SLOTS} parameter(0)
  %e = s32[] parameter(1)
  ROOT %s = f32[1,6] dynamic-slice(%d, %e, %e), dynamic_slice_sizes={{1,6}}
}}
"""


def test_of_slots_in_the_host_a_started_fusion_copies_one():
    """As XLA offloads what a scan keeps: six numbers there and six back, 4 bytes each."""
    put = f"%f = (({SLOTS}, f32[1,6], s32[]), {SLOTS}, u32[]) fusion-start({SLOTS} %x.a, f32[1,6] %x.b, s32[] %x.c)"
    take = f"%g = (({SLOTS}, s32[]), f32[1,6], u32[]) fusion-start(%f-done, s32[] %x.c)"
    put, take = f"{put}, kind=kLoop, calls=%put", f"{take}, kind=kLoop, calls=%take"
    entry = lines(
        put,
        kernel("k", 16),
        f"%f-done = {SLOTS} fusion-done(%f)",
        take,
        kernel("m", 40),
        "%g-done = f32[1,6] fusion-done(%g)",
    )
    result = run(entry, PUT_AND_TAKE)
    assert (result.host_s, result.exposed_host_s, result.compute_s) == (48, 8, 56)


def test_copies_to_the_host_that_are_not_started_block():
    result = run(lines("%c = f32[6]{0:S(5)} copy(f32[6] %p.c)", kernel("k", 16)))
    assert (result.step_s, result.compute_s, result.exposed_host_s) == (64, 40, 24)


# ------------------------------------------------------------------------------------------------ loops


def loop(name: str, body: str, trips: int | None, op_name: str = "", inner: str = "") -> tuple[str, str]:
    """A while instruction, and its computations."""
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips is not None else ""
    named = f', metadata={{op_name="{op_name}"}}' if op_name else ""
    text = f"%{name} = (f32[2]) while((f32[2]) %x.{name}), condition=%{name}.cond, body=%{name}.body{named}{known}"
    go = "  %c = (f32[2]) parameter(0)\n  ROOT %go = pred[] constant(true)"
    cond = f"%{name}.cond (c: (f32[2])) -> pred[] {{\n{go}\n}}\n"
    return text, f"{inner}\n{cond}\n%{name}.body (b: (f32[2])) -> (f32[2]) {{\n{body}\n}}\n"


def round_of(number: int | str, moved: int, computed: tuple[int, int]) -> list[str]:
    start, done = gather(f"g{number}", moved)
    return [start, kernel(f"k{number}", computed[0]), done, kernel(f"l{number}", computed[1])]


@pytest.mark.parametrize("computed", [(80, 0), (16, 40), (0, 8), (0, 0)])
@pytest.mark.parametrize("trips", [0, 1, 2, 7])
def test_a_loop_is_its_rounds_one_after_another(trips, computed):
    instruction, bodies = loop("w", lines(*round_of("", 56, computed)), trips)
    rolled = run(lines(instruction), bodies)
    unrolled = run(lines(*itertools.chain(*(round_of(n, 56, computed) for n in range(trips)))))
    totals = "step_s", "compute_s", "comm_s", "exposed_comm_s"
    assert [getattr(rolled, t) for t in totals] == [getattr(unrolled, t) for t in totals]
    assert rolled.comm_s == 56 * trips


@pytest.mark.parametrize("computed", [(80, 0), (16, 40), (80, 200)])
@pytest.mark.parametrize("record", [False, True])
def test_what_a_round_starts_may_be_waited_for_in_the_next(computed, record):
    """A done whose start is not in sight, behind the loop's state, waits for the oldest of its kind."""
    trips = 9
    start, _ = gather("g", 56)
    orphan = "%late = f32[16] all-gather-done((f32[2], f32[16]) %x.late)"
    instruction, bodies = loop("w", lines(orphan, kernel("k", computed[0]), start, kernel("l", computed[1])), trips)
    first, _ = gather("first", 56)
    last = "%last = f32[16] all-gather-done((f32[2], f32[16]) %x.last)"
    rolled = run(lines(first, instruction, last), bodies, record=record)
    text, starts = [first], ["first"]
    for n in range(trips):
        start, _ = gather(f"g{n}", 56)
        done = f"%done{n} = f32[16] all-gather-done(%{starts[-1]})"
        text += [done, kernel(f"k{n}", computed[0]), start, kernel(f"l{n}", computed[1])]
        starts.append(f"g{n}")
    unrolled = run(lines(*text, f"%done = f32[16] all-gather-done(%{starts[-1]})"))
    assert rolled.step_s == unrolled.step_s
    assert rolled.exposed_comm_s == unrolled.exposed_comm_s


def test_a_first_round_unlike_the_others_counts_once():
    """Links are busy before the loop, so that its first gather alone waits."""
    before, before_done = gather("before", 560)
    instruction, bodies = loop("w", lines(*round_of("", 28, (40, 0))), 10)
    result = run(lines(before, instruction, before_done), bodies)
    assert (result.step_s, result.exposed_comm_s) == (588 + 9 * 40, 548)


@pytest.mark.parametrize("record", [False, True])
def test_loops_nest(record):
    inner, inner_bodies = loop("inner", lines(*round_of("", 56, (16, 8))), 5)
    outer, bodies = loop("outer", lines(inner, kernel("m", 24)), 3, inner=inner_bodies)
    result = run(lines(outer), bodies, record=record)
    assert result.step_s == 3 * (5 * (56 + 8) + 24)
    assert {t.task.name: (t.count, t.exposed_s) for t in result.collectives} == {"g": (15, 15 * 40)}
    assert {t.task.name: t.count for t in result.kernels} == {"k": 15, "l": 15, "m": 3}


def test_loops_of_compute_nest_in_closed_form():
    inner, inner_bodies = loop("inner", lines(kernel("k", 16)), 10**6)
    outer, bodies = loop("outer", lines(inner, kernel("m", 24)), 10**6, inner=inner_bodies)
    result = run(lines(outer), bodies)
    assert result.step_s == result.compute_s == 10**6 * (10**6 * 16 + 24)


@pytest.mark.parametrize(
    ("body", "seconds"), [(kernel("k", 16), 16), (f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}", 28)]
)
def test_a_condition_runs_once_more_than_its_body(body, seconds):
    instruction, bodies = loop("w", lines(body), 4)
    bodies = bodies.replace(
        "ROOT %go = pred[] constant(true)", "%q = f32[1] constant({1})\n  ROOT %go = f32[1] copy(%q)"
    )
    assert run(lines(instruction), bodies).step_s == 4 * seconds + 5 * 8


SCOPE = "jit(f)/tsp/attention/mean_trips[2.5]/while"


def declaring(op_name: str) -> tuple[str, str]:
    inner, inner_bodies = loop("inner", lines(kernel("k", 16)), None, op_name=f"{SCOPE}/body/closed_call/while")
    return loop("outer", lines(inner, kernel("m", 8)), None, op_name=op_name, inner=inner_bodies)


def test_a_loop_runs_as_often_as_it_declares():
    """And one inside it, which declares nothing, as often as the caller says."""
    instruction, bodies = declaring(SCOPE)
    result = run(lines(instruction), bodies, unknown_trips=4)
    assert result.step_s == 2.5 * (4 * 16 + 8)
    text = " ".join(result.assumptions)
    assert "on average: 2.5" in text
    assert "run 4 times: inner" in text


@pytest.mark.parametrize(
    ("op_name", "trips"),
    [
        (SCOPE, 2.5),
        ("mean_trips[3]/while", 3.0),
        ("jit(f)/vmap(mean_trips[64])/while", 64.0),
        ("jit(f)/mean_trips[1e+06]/while", 1e6),
        ("jit(f)/mean_trips[2.5]/tsp/while", None),
        ("jit(f)/mean_trips[2.5]/while/body/add", None),
        ("jit(f)/not_mean_trips[2.5]/while", None),
        ("jit(f)/while", None),
        ("", None),
    ],
)
def test_only_the_scope_directly_around_a_loop_declares(op_name, trips):
    instruction, bodies = declaring(op_name)
    assert declared_trips(module(lines(instruction), bodies).entry.by_name["outer"]) == trips


def test_a_declaration_that_is_no_number_is_named():
    instruction, bodies = declaring("mean_trips[1.2.3]/while")
    with pytest.raises(ConfigError, match=r"mean_trips\[1.2.3\] is no number"):
        run(lines(instruction), bodies)


def test_what_the_text_counts_goes_before_what_is_declared():
    instruction, bodies = loop("w", lines(kernel("k", 16)), 6, op_name=SCOPE)
    assert run(lines(instruction), bodies).step_s == 6 * 16


def test_traffic_counts_declared_trips():
    start, done = gather("g", 28)
    instruction, bodies = loop("w", lines(start, done), None, op_name=SCOPE)
    assert [c.count for c in collectives(module(lines(instruction), bodies), unknown_trips=9)] == [2.5]


@pytest.mark.parametrize("moved", [28, 280])
def test_a_conditional_costs_its_dearest_branch(moved):
    start, done = gather("g", moved)
    branches = [
        f"%left (l: f32[2]) -> () {{\n{lines(start, done)}\n}}\n",
        f"%right (r: f32[2]) -> () {{\n{lines(kernel('k', 80))}\n}}\n",
    ]
    choice = "%c = () conditional(s32[] %x.i, f32[2] %x.l, f32[2] %x.r), branch_computations={%left, %right}"
    result = run(lines(choice, kernel("m", 8)), *branches)
    assert result.step_s == max(moved, 80) + 8
    assert (len(result.collectives), len(result.kernels)) == ((1, 1) if moved > 80 else (0, 2))


def test_calls_are_gone_through():
    start, done = gather("g", 56)
    body = f"%whole (w: f32[2]) -> () {{\n{lines(start, kernel('k', 16), done)}\n}}\n"
    assert run(lines("%c = () call(f32[2] %x.c), to_apply=%whole"), body).step_s == 56


# ------------------------------------------------------------------------------------------------ TPU

CHAINED = f'{GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="5"}}'
FUSIONS = f"""%start (s: f32[2]) -> (f32[2], f32[16]) {{
  %s = f32[2] parameter(0)
  %all-gather.1 = f32[16] all-gather(%s), {CHAINED}
  ROOT %cs = (f32[2], f32[16], u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%step (q: f32[2], r: f32[16], a: f32[2,8], b: f32[8,2]) -> (f32[2,2], f32[2], f32[16]) {{
  %q = f32[2] parameter(0)
  %r = f32[16] parameter(1)
  %a = f32[2,8] parameter(2)
  %b = f32[8,2] parameter(3)
  %conv = f32[2,2] convolution(%a, %b), dim_labels=bf_io->bf
  %all-gather.2 = f32[16] all-gather(%q), {CHAINED}
  ROOT %t = (f32[2,2], f32[2], f32[16]) tuple(%conv, %q, %all-gather.2)
}}

%finish (f: f32[2]) -> f32[16] {{
  %f = f32[2] parameter(0)
  %all-gather.3 = f32[16] all-gather(%f), {CHAINED}
  ROOT %cd = f32[16] custom-call(%f, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
"""


CHAIN = (
    "%f.1 = (f32[2], f32[16], u32[]{:S(2)}) fusion(f32[2] %x.s), kind=kCustom, calls=%start",
    "%f.2 = (f32[2,2], f32[2], f32[16]) fusion(f32[2] %x.q, f32[16] %x.r, f32[2,8] %x.a, f32[8,2] %x.b), "
    "kind=kOutput, calls=%step",
    "%f.3 = f32[16] fusion(f32[2] %x.f), kind=kCustom, calls=%finish",
)


def test_tpu_spreads_a_gather_over_fusions():
    fast = dataclasses.replace(TPU_UNIT, sustained_bandwidth=1e9, links="switch")
    result = run(lines(*CHAIN), FUSIONS, hardware=fast)
    assert result.flops == 2 * 4 * 8
    assert (result.comm_s, result.exposed_comm_s) == (56, 0)
    assert result.step_s == 64
    slow = dataclasses.replace(fast, sustained_flops=2.0)
    after = "%d = f32[1,1] dot(f32[1,8] %p.a, f32[8,1] %p.b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    result = run(lines(*CHAIN, after), FUSIONS, hardware=slow)
    assert (result.step_s, result.exposed_comm_s) == (56 + 8, 24)
    assert set(result.hidden_fraction) == {"all-gather.1"}


@pytest.mark.parametrize(("fusion", "size"), [*zip(CHAIN, [0, 4 * (16 + 16 + 4), 0], strict=True)])
def test_what_fusions_of_a_gather_hand_on_is_no_traffic_of_memory(fusion, size):
    assert cost(fusion, FUSIONS)[1] == size


def test_a_fused_collective_without_a_chain_blocks():
    fused = f"""%scatter (i: f32[32]) -> f32[4] {{
  %i = f32[32] parameter(0)
  %all-reduce.1 = f32[32] all-reduce(%i), {GROUPS}, to_apply=%add
  %n = s32[] constant(0)
  ROOT %keep = f32[4] dynamic-slice(%all-reduce.1, %n), dynamic_slice_sizes={{4}}
}}
"""
    result = run(lines("%f = f32[4] fusion(f32[32] %x.f), kind=kCustom, calls=%scatter"), fused)
    assert result.comm_s == result.exposed_comm_s == 128 * 7 / 8
    assert [t.task.op for t in result.collectives] == ["reduce-scatter"]


# ------------------------------------------------------------------------------------------------ costs


def cost(instruction: str, *computations: str, on_chip: bool = False):
    """(flops, bytes) of the first instruction that is no parameter."""
    parsed = module(lines(instruction), *computations)
    (found,) = [i for i in parsed.entry.instructions if i.opcode not in ("parameter", "tuple")]
    result = Costs(parsed, on_chip=on_chip).of(found)
    return result.flops, result.bytes


@pytest.mark.parametrize(
    ("instruction", "flops", "size"),
    [
        (
            "%d = f32[2,3] dot(bf16[2,5] %p.a, bf16[5,3] %p.b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 2 * 3 * 5,
            2 * (10 + 15) + 4 * 6,
        ),
        (
            "%d = bf16[7,2,3] dot(bf16[7,2,5] %p.a, bf16[7,3,5] %p.b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={2}",
            2 * 7 * 2 * 3 * 5,
            2 * 7 * (10 + 15 + 6),
        ),
        (
            '%d = (bf16[2,3], s8[64]) custom-call(bf16[5,2] %p.a, bf16[5,3] %p.b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
            '"rhs_contracting_dimensions":["0"]}}}',
            2 * 2 * 3 * 5,
            2 * (10 + 15 + 6) + 64,
        ),
        (
            "%d = (bf16[2,3], s8[64]) custom-call(bf16[2,5] %p.a, bf16[3,5] %p.b), "
            'custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 2 * 3 * 5,
            2 * (10 + 15 + 6) + 64,
        ),
        ('%d = f32[4] custom-call(f32[8] %p.a), custom_call_target="__gpu$xla.gpu.triton"', 0, 16 + 32),
        ('%d = f32[400] custom-call(), custom_call_target="AllocateBuffer"', 0, 0),
    ],
)
def test_products(instruction, flops, size):
    assert cost(instruction) == (flops, size)


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        ("%c = f32[6,7] convolution(f32[6,5] %p.a, f32[5,7] %p.b), dim_labels=bf_io->bf", 2 * 6 * 7 * 5),
        ("%c = f32[6,7] convolution(f32[5,6] %p.a, f32[7,5] %p.b), dim_labels=fb_oi->bf", 2 * 6 * 7 * 5),
        (
            "%c = f32[6,4,7] convolution(f32[6,5] %p.a, f32[4,5,7] %p.b), window={size=4 pad=3_3 rhs_reversal=1}, "
            "dim_labels=bf0_0io->b0f".replace("f32[6,5]", "f32[6,5,1]"),
            2 * 6 * 4 * 7 * 5,  # [6, 5] x [5, 4 x 7]
        ),
        (
            "%c = f32[8,6,7] convolution(f32[8,6,5] %p.a, f32[8,7,5] %p.b), window={size=8 stride=7 lhs_dilate=8}, "
            "dim_labels=0bf_0oi->0bf",
            2 * 8 * 6 * 7 * 5,  # 8 products, one a batch element
        ),
        (
            "%c = f32[8,6,7] convolution(f32[8,6,5] %p.a, f32[5,7,1] %p.b), window={size=1}, dim_labels=0bf_io0->0bf",
            2 * 8 * 6 * 7 * 5,
        ),
        (
            "%c = f32[2,9,7] convolution(f32[2,9,3] %p.a, f32[3,3,7] %p.b), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f",
            2 * 2 * 7 * 3 * (3 * 9 - 2),  # the ends meet padding
        ),
    ],
)
def test_products_written_as_convolutions(instruction, flops):
    assert cost(instruction)[0] == flops


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("low", [-2, 0, 1, 3])
@pytest.mark.parametrize(("spread", "gap"), [(1, 1), (2, 1), (1, 2), (3, 2), (8, 1)])
def test_windows_meet_what_counting_finds(stride, low, spread, gap):
    size, window, out = 7, 4, 9
    counted = sum(
        0 <= (place := o * stride + k * gap - low) <= (size - 1) * spread and place % spread == 0
        for o in range(out)
        for k in range(window)
    )
    sides = {"stride": f"{stride}", "pad": f"{low}_0", "lhs_dilate": f"{spread}", "rhs_dilate": f"{gap}"}
    assert _meetings(size, window, out, 0, sides) == counted


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("%b = f32[100] bitcast(f32[10,10] %p.a)", 0),
        ("%b = f32[10] get-tuple-element((f32[10]) %p.a), index=0", 0),
        ("%b = f32[100] copy(f32[100] %p.a)", 800),
        ("%b = f32[100] multiply(f32[100] %p.a, f32[100] %p.a)", 800),
        ("%b = f32[10] slice(f32[100] %p.a), slice={[0:10]}", 80),
        ("%b = f32[10] dynamic-slice(f32[100] %p.a, s32[] %p.i), dynamic_slice_sizes={10}", 80 + 4),
        ("%b = f32[100] dynamic-update-slice(f32[100] %p.a, f32[10] %p.u, s32[] %p.i)", 80),
        ("%b = f32[3,4] gather(f32[100,4] %p.a, s32[3,1] %p.i), slice_sizes={1,4}", 2 * 48 + 12),
        ("%b = f32[100,4] scatter(f32[100,4] %p.a, s32[3,1] %p.i, f32[3,4] %p.u), to_apply=%add", 3 * 48 + 12),
        ("%b = (f32[100]{0:S(1)}, f32[100], u32[]) copy-start(f32[100] %p.a)", 800),
        ("%b = ((f32[100]), f32[10], s32[]) slice-start(f32[100] %p.a), slice={[0:10]}", 80),
    ],
)
def test_bytes_of_plain_instructions(instruction, size):
    assert cost(instruction) == (0, size)


def fused(parameters: str, *body: str) -> str:
    """A fusion's computation from its parameters' shapes."""
    shapes = parameters.split(" ")
    text = "\n".join([f"  %p{n} = {shape} parameter({n})" for n, shape in enumerate(shapes)] + [f"  {b}" for b in body])
    return f"%fused () -> f32[] {{\n{text}\n}}\n"


SLICED = fused(
    "f32[100] s32[]",
    "%c = f64[100] convert(%p0)",
    "%s = f64[10] dynamic-slice(%c, %p1), dynamic_slice_sizes={10}",
    "ROOT %n = f64[10] negate(%s)",
)
UPDATED = fused(
    "f32[100] f32[10] s32[]",
    "%n = f32[10] negate(%p1)",
    "%v = f32[100] bitcast(%p0)",
    "ROOT %u = f32[100] dynamic-update-slice(%v, %n, %p2)",
)
ACCUMULATED = fused(
    "f32[100] f32[10] s32[]",
    "%s = f32[10] dynamic-slice(%p0, %p2), dynamic_slice_sizes={10}",
    "%n = f32[10] add(%p1, %s)",
    "%u = f32[100] dynamic-update-slice(%p0, %n, %p2)",
    "%e = f32[10] exponential(%n)",
    "ROOT %t = (f32[100], f32[10]) tuple(%u, %e)",
)
FILLED = fused(
    "f32[10] s32[]",
    "%z = f32[] constant(0)",
    "%b = f32[100] broadcast(%z), dimensions={}",
    "ROOT %u = f32[100] dynamic-update-slice(%b, %p0, %p1)",
)
TWICE = fused(
    "f32[100] s32[]",
    "%s = f32[10] dynamic-slice(%p0, %p1), dynamic_slice_sizes={10}",
    "%r = f32[] constant(0)",
    "%m = f32[] reduce(%p0, %r), dimensions={0}, to_apply=%add",
    "ROOT %t = (f32[10], f32[]) tuple(%s, %m)",
)
THROUGH = fused("f32[100] f32[10]", "%n = f32[10] negate(%p1)", "ROOT %t = (f32[100], f32[10]) tuple(%p0, %n)")
INNER = "%inner (i: f32[100]) -> f32[10] {\n  %i = f32[100] parameter(0)\n  ROOT %s = f32[10] slice(%i)\n}\n"
NESTED = INNER + fused("f32[100]", "ROOT %f = f32[10] fusion(%p0), calls=%inner")


@pytest.mark.parametrize(
    ("call", "body", "size"),
    [
        ("f64[10] fusion(f32[100] %p.a, s32[] %p.i)", SLICED, 80 + 40 + 4),
        ("f32[100] fusion(f32[100] %p.a, f32[10] %p.b, s32[] %p.i)", UPDATED, 40 + 40 + 4),
        ("(f32[100], f32[10]) fusion(f32[100] %p.a, f32[10] %p.b, s32[] %p.i)", ACCUMULATED, 4 * 40 + 4),
        ("f32[100] fusion(f32[10] %p.b, s32[] %p.i)", FILLED, 400 + 40 + 4),
        ("(f32[10], f32[]) fusion(f32[100] %p.a, s32[] %p.i)", TWICE, 400 + 40 + 4 + 4),
        ("(f32[100], f32[10]) fusion(f32[100] %p.a, f32[10] %p.b)", THROUGH, 80),
        ("f32[10] fusion(f32[100] %p.a)", NESTED, 80),
    ],
    ids=["sliced", "updated", "accumulated", "filled", "twice", "through", "nested"],
)
def test_bytes_of_fusions(call, body, size):
    assert cost(f"%f = {call}, kind=kLoop, calls=%fused", body) == (0, size)


def test_products_in_nested_fusions_count():
    inner = """%inner (i: f32[2,5], j: f32[5,3]) -> f32[2,3] {
  %i = f32[2,5] parameter(0)
  %j = f32[5,3] parameter(1)
  ROOT %d = f32[2,3] dot(%i, %j), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    body = inner + fused("f32[2,5] f32[5,3]", "ROOT %f = f32[2,3] fusion(%p0, %p1), calls=%inner")
    assert cost("%f = f32[2,3] fusion(f32[2,5] %p.a, f32[5,3] %p.b), calls=%fused", body) == (60, 4 * (10 + 15 + 6))


@pytest.mark.parametrize(("on_chip", "size"), [(True, 400), (False, 800)])
def test_on_chip_arrays_move_no_bytes_of_main_memory(on_chip, size):
    """On GPU the same mark is of main memory that collectives may use."""
    assert cost("%b = f32[100]{0:S(1)} copy(f32[100] %p.a)", on_chip=on_chip)[1] == size


# ------------------------------------------------------------------------------------------------ scopes and traces


@pytest.mark.parametrize(
    ("op_name", "callers", "label"),
    [
        ("jit(step)/jvp()/while/body/closed_call/shard_map/tsp/mlp/gather/all_gather", (), "forward tsp/mlp/gather"),
        ("jit(step)/transpose(jvp())/while/body/shard_map/tsp/mlp/btd,pd->btp/dot_general", (), "backward tsp/mlp"),
        ("jit(s)/transpose(jvp())/while/body/checkpoint/rematted_computation/tsp/mlp/mul", (), "recompute tsp/mlp"),
        ("jit(step)/tsp/a/b/c/d/e/add", (), "tsp/a/b/c"),
        ("jit(step)/transpose(jvp())/tsp/(attention/scatter/x:mlp/scatter/x)", (), "backward tsp/attention/scatter"),
        ("jit(step)/jvp()/tsp/mlp/reshape;tsp/mlp/gather/squeeze", (), "forward tsp/mlp"),
        ("jit(step)/optimizer/add", (), "optimizer"),
        ("jit(step)/add", (), "other"),
        ("", (), "other"),
        (
            "jit(step)/jvp()/tsp/mlp/add",
            ("jit(step)/transpose(jvp())/rematted_computation/while",),
            "recompute tsp/mlp",
        ),
        ("jit(step)/transpose(jvp())/rematted_computation/tsp/mlp/add", ("jit(step)/jvp()/while",), "forward tsp/mlp"),
    ],
)
def test_scopes_are_readable(op_name, callers, label):
    assert readable_scope(op_name, callers) == label


def test_compute_is_summed_by_scope():
    named = ', metadata={op_name="jit(f)/tsp/mlp/copy"}'
    body = lines(kernel("k", 16, named), kernel("l", 8))
    instruction, bodies = loop("w", body, 3, op_name="jit(f)/tsp/loss/while")
    result = run(lines(instruction, kernel("m", 80)), bodies)
    assert result.by_scope == {"other": 80, "tsp/mlp": 48, "tsp/loss": 24}


def traced(tmp_path, name: str = "trace.json"):
    start, done = gather("g", 56)
    inner, inner_bodies = loop("inner", lines(kernel("k", 8)), 100)
    outer, bodies = loop("outer", lines(start, inner, kernel("m", 16), done), 2, inner=inner_bodies)
    slow_links = dataclasses.replace(UNIT, link_bandwidth=0.05)
    timeline = run(lines(outer), bodies, hardware=slow_links, record=True)
    write_trace(timeline, tmp_path / name)
    return timeline, (tmp_path / name).read_bytes()


def test_a_trace_has_the_slices_of_every_queue(tmp_path):
    timeline, data = traced(tmp_path)
    events = json.loads(data)["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    slices = [(threads[e["tid"]], e["name"], e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    exposed = pytest.approx(56 / 0.05 - 816)
    assert Counter((thread, name) for thread, name, _ in slices) == {
        ("compute", "other (while)"): 2,  # a slice for 100 rounds of compute alone
        ("compute", "other (copy)"): 2,
        ("compute", "exposed: other (all-gather)"): 2,
        ("links", "other (all-gather)"): 2,
        ("compute", "other round 1 of 2"): 1,
        ("compute", "other round 2 of 2"): 1,
    }
    assert [seconds for _, name, seconds in slices if name.startswith("exposed")] == [exposed, exposed]
    assert sum(s for thread, name, s in slices if thread == "links") == pytest.approx(timeline.comm_s)


def test_slices_say_what_they_are(tmp_path):
    events = json.loads(traced(tmp_path)[1])["traceEvents"]
    (whole, *_) = [e["args"] for e in events if e["name"] == "other (while)"]
    assert whole == {"instruction": "inner", "op": "while", "scope": "", "bytes": 800.0, "flops": 0.0}


def test_arrows_point_from_the_links_to_what_waits(tmp_path):
    events = json.loads(traced(tmp_path)[1])["traceEvents"]
    arrows = [(e["ph"], e["tid"], e["id"]) for e in events if e["ph"] in "sf"]
    first, second = arrows[0][2], arrows[2][2]
    assert arrows == [("s", 2, first), ("f", 1, first), ("s", 2, second), ("f", 1, second)]


def test_slices_lie_within_one_another_or_apart(tmp_path):
    events = json.loads(traced(tmp_path)[1])["traceEvents"]
    spans = sorted((e["ts"], -e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == 1)
    open_until = []
    for begin, length in spans:
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        assert not open_until or begin - length <= open_until[-1]
        open_until.append(begin - length)


def test_traces_are_compressed_by_name(tmp_path):
    _, plain = traced(tmp_path)
    assert gzip.decompress(traced(tmp_path, "trace.json.gz")[1]) == plain


def test_a_timeline_without_events_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="record=True"):
        write_trace(run(overlapped(28, 8)), tmp_path / "trace.json")


# ------------------------------------------------------------------------------------------------ declared by attention


def test_attention_declares_its_visits():
    """The compiled program tells: forward and backward loops, and nobody else."""
    q_len, k_len, kernel = 16, 64, XlaKernel(8, 16)
    q, k = jnp.ones((1, q_len, 2, 1, 4)), jnp.ones((1, k_len, 2, 4))
    queries, keys = (Tokens(*jnp.zeros((2, 1, n), jnp.int32)) for n in (q_len, k_len))

    def step(q, k, queries, keys):
        out, lse = kernel.attend(q, k, k, queries, keys)
        return kernel.attend_backward(q, k, k, queries, keys, delta(out, out), lse, out)

    text = jax.jit(step).lower(q, k, queries, keys).compile().as_text()
    assert text
    loops = [i for i, _ in parse(text).walk() if i.opcode == "while"]
    declared = sorted(trips for i in loops if (trips := declared_trips(i)) is not None)
    assert declared == sorted(mean_visits(q_len, k_len, 8, 16)) == [1.25, 2.5]
