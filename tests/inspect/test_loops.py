"""Simulated time of loops, branches and calls."""

import itertools
import re

import pytest

from tests.builders.hlo import GROUPS, gather, iteration_of, kernel, lines, loop, module_of, simulated
from tsp_jax.errors import ConfigError
from tsp_jax.inspect import list_collectives
from tsp_jax.inspect.scopes import declared_trips


@pytest.mark.parametrize("computed", [(80, 0), (16, 40), (0, 8), (0, 0)])
@pytest.mark.parametrize("trips", [0, 1, 2, 7])
def test_a_loop_is_its_rounds_one_after_another(trips, computed):
    instruction, bodies = loop("w", lines(*iteration_of("", 56, computed)), trips)
    rolled = simulated(lines(instruction), bodies)
    unrolled = simulated(lines(*itertools.chain(*(iteration_of(n, 56, computed) for n in range(trips)))))
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
    rolled = simulated(lines(first, instruction, last), bodies, record=record)
    text, starts = [first], ["first"]
    for n in range(trips):
        start, _ = gather(f"g{n}", 56)
        done = f"%done{n} = f32[16] all-gather-done(%{starts[-1]})"
        text += [done, kernel(f"k{n}", computed[0]), start, kernel(f"l{n}", computed[1])]
        starts.append(f"g{n}")
    unrolled = simulated(lines(*text, f"%done = f32[16] all-gather-done(%{starts[-1]})"))
    assert rolled.step_s == unrolled.step_s
    assert rolled.exposed_comm_s == unrolled.exposed_comm_s


def test_a_first_round_unlike_the_others_counts_once():
    """Links are busy before the loop, so that its first gather alone waits."""
    before, before_done = gather("before", 560)
    instruction, bodies = loop("w", lines(*iteration_of("", 28, (40, 0))), 10)
    result = simulated(lines(before, instruction, before_done), bodies)
    assert (result.step_s, result.exposed_comm_s) == (588 + 9 * 40, 548)


@pytest.mark.parametrize("record", [False, True])
def test_loops_nest(record):
    inner, inner_bodies = loop("inner", lines(*iteration_of("", 56, (16, 8))), 5)
    outer, bodies = loop("outer", lines(inner, kernel("m", 24)), 3, inner=inner_bodies)
    result = simulated(lines(outer), bodies, record=record)
    assert result.step_s == 3 * (5 * (56 + 8) + 24)
    assert {t.task.name: (t.count, t.exposed_s) for t in result.collectives} == {"g": (15, 15 * 40)}
    assert {t.task.name: t.count for t in result.kernels} == {"k": 15, "l": 15, "m": 3}


def test_loops_of_compute_nest_in_closed_form():
    inner, inner_bodies = loop("inner", lines(kernel("k", 16)), 10**6)
    outer, bodies = loop("outer", lines(inner, kernel("m", 24)), 10**6, inner=inner_bodies)
    result = simulated(lines(outer), bodies)
    assert result.step_s == result.compute_s == 10**6 * (10**6 * 16 + 24)


@pytest.mark.parametrize(
    ("body", "seconds"), [(kernel("k", 16), 16), (f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}", 28)]
)
def test_a_condition_runs_once_more_than_its_body(body, seconds):
    instruction, bodies = loop("w", lines(body), 4)
    bodies = bodies.replace(
        "ROOT %go = pred[] constant(true)", "%q = f32[1] constant({1})\n  ROOT %go = f32[1] copy(%q)"
    )
    assert simulated(lines(instruction), bodies).step_s == 4 * seconds + 5 * 8


SCOPE = "jit(f)/tsp/attention/mean_trips[2.5]/while"


def declaring(op_name: str) -> tuple[str, str]:
    inner, inner_bodies = loop("inner", lines(kernel("k", 16)), None, op_name=f"{SCOPE}/body/closed_call/while")
    return loop("outer", lines(inner, kernel("m", 8)), None, op_name=op_name, inner=inner_bodies)


def test_a_loop_runs_as_often_as_it_declares():
    """And one inside it, which declares nothing, as often as the caller says."""
    instruction, bodies = declaring(SCOPE)
    result = simulated(lines(instruction), bodies, unknown_trips=4)
    assert result.step_s == 2.5 * (4 * 16 + 8)
    text = " ".join(result.assumptions)
    assert "mean number of trips that they declare: 2.5" in text
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
    assert declared_trips(module_of(lines(instruction), bodies).entry.by_name["outer"]) == trips


@pytest.mark.parametrize("number", ["1.2.3", "-5", "0", "1e400", "inf", "nan", "1e30", "", "many"])
def test_a_declaration_that_is_no_positive_number_is_named(number):
    instruction, bodies = declaring(f"mean_trips[{number}]/while")
    with pytest.raises(ConfigError, match=f"outer: scope mean_trips{re.escape(f'[{number}]')} is no number above 0"):
        simulated(lines(instruction), bodies)


def test_what_the_text_counts_goes_before_what_is_declared():
    instruction, bodies = loop("w", lines(kernel("k", 16)), 6, op_name=SCOPE)
    assert simulated(lines(instruction), bodies).step_s == 6 * 16


def test_traffic_counts_declared_trips():
    start, done = gather("g", 28)
    instruction, bodies = loop("w", lines(start, done), None, op_name=SCOPE)
    assert [c.count for c in list_collectives(module_of(lines(instruction), bodies), unknown_trips=9)] == [2.5]


@pytest.mark.parametrize("moved", [28, 280])
def test_a_conditional_costs_its_dearest_branch(moved):
    start, done = gather("g", moved)
    branches = [
        f"%left (l: f32[2]) -> () {{\n{lines(start, done)}\n}}\n",
        f"%right (r: f32[2]) -> () {{\n{lines(kernel('k', 80))}\n}}\n",
    ]
    choice = "%c = () conditional(s32[] %x.i, f32[2] %x.l, f32[2] %x.r), branch_computations={%left, %right}"
    result = simulated(lines(choice, kernel("m", 8)), *branches)
    assert result.step_s == max(moved, 80) + 8
    assert (len(result.collectives), len(result.kernels)) == ((1, 1) if moved > 80 else (0, 2))


CHOICES = {
    "by index": "%c = () conditional(s32[] %x.i, f32[2] %x.l, f32[2] %x.r), branch_computations={%left, %right}",
    "by truth": "%c = () conditional(pred[] %x.i, f32[2] %x.r, f32[2] %x.l), "
    "true_computation=%right, false_computation=%left",
}
"""a choice of %left (0, false) or %right (1, true)"""


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize(("number", "seconds"), [(0, 80), (1, 8)])
def test_of_a_conditional_the_declared_branch_counts(choice, number, seconds):
    branches = [
        f"%left (l: f32[2]) -> () {{\n{lines(kernel('k', 80))}\n}}\n",
        f"%right (r: f32[2]) -> () {{\n{lines(kernel('m', 8))}\n}}\n",
    ]
    scope = f', metadata={{op_name="jit(f)/likely_branch[{number}]/cond"}}'
    result = simulated(lines(choice + scope), *branches)
    assert (result.step_s, len(result.kernels)) == (seconds, 1)
    module = module_of(lines(choice + scope), *branches)
    assert len([*module.executions()]) == 2
    assert len([*module.executions(unlikely=True)]) == 3


@pytest.mark.parametrize("number", ["2", "-1", "x", ""])
def test_a_declared_branch_that_does_not_exist_is_named(number):
    branches = [f"%{name} (p: f32[2]) -> () {{\n{lines(kernel('k', 80))}\n}}\n" for name in ("left", "right")]
    scope = f', metadata={{op_name="jit(f)/likely_branch[{number}]/cond"}}'
    with pytest.raises(ConfigError, match=rf"c: scope likely_branch\[{number}\] is no number of a branch; use 0 to 1"):
        simulated(lines(CHOICES["by index"] + scope), *branches)


def test_calls_are_gone_through():
    start, done = gather("g", 56)
    body = f"%whole (w: f32[2]) -> () {{\n{lines(start, kernel('k', 16), done)}\n}}\n"
    assert simulated(lines("%c = () call(f32[2] %x.c), to_apply=%whole"), body).step_s == 56
