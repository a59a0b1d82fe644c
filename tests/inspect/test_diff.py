"""What differs between two programs: nothing under other names, and what is known to differ."""

import dataclasses
import re

import pytest

from tests.builders.hlo import ADD, GROUPS, UNIT, at_rates, gather, kernel, lines
from tests.builders.steps import CONFIG, CPU, train_step
from tsp_jax.hardware.rates import Contention, Source, exactly
from tsp_jax.inspect import report
from tsp_jax.inspect.diff import Diff, Pair, diff
from tsp_jax.inspect.render import console
from tsp_jax.inspect.render_diff import show_diff, verdict
from tsp_jax.plan.compile import compile_step

HEADER = "HloModule test, is_scheduled=true, num_partitions=8"
MLP = ', metadata={op_name="jit(f)/tsp/mlp/mul"}'


def text_of(*instructions: str, header: str = HEADER) -> str:
    return f"{header}\n\n{ADD}\nENTRY %main () -> () {{\n{lines(*instructions)}\n}}\n"


def compared(before: str, after: str, hardware=UNIT, **options) -> Diff:
    first, second = (report(text, target=hardware, **options).to_json() for text in (before, after))
    return diff(first, second)


START, DONE = gather("g", 56)
GATHER = START + ', metadata={op_name="jit(f)/tsp/mlp/gather/all_gather"}'
PROGRAM = text_of(GATHER, kernel("k", 80, MLP), DONE, kernel("l", 40))


def test_other_names_are_no_difference(capsys):
    renamed = re.sub(r"%(\w+)", r"%new_\1", PROGRAM)
    assert "%new_g " in renamed
    found = compared(PROGRAM, renamed)
    assert found.same and not (found.scopes or found.collectives or found.buffers or found.unknown)
    show_diff(found, ("a", "b"), console())
    assert "no difference" in capsys.readouterr().out


def test_a_longer_kernel_shows_in_its_scope_alone():
    found = compared(PROGRAM, text_of(GATHER, kernel("k", 96, MLP), DONE, kernel("l", 40)))
    (row,) = found.scopes
    assert (row.key, row.state, row.figures["seconds"]) == (("tsp/mlp",), "changed", Pair(80, 96))
    assert found.totals["step_s"] == Pair(120, 136) and found.holds
    assert verdict(found) == "B's step is longer at all rates, by 16.00 s"


def test_scopes_and_contention_add_up_to_the_step():
    contention = Contention(compute=exactly(0.5), links=exactly(0.0), source=Source("assumed", "a test"))
    hardware = dataclasses.replace(UNIT, rates=dataclasses.replace(UNIT.rates, contention=contention))
    timeline = report(text_of(*gather("h", 28), GATHER, kernel("k", 16, MLP), DONE), target=hardware).to_json()[
        "timeline"
    ]
    parts = [scope["compute_s"] + scope["exposed_s"] for scope in timeline["scopes"].values()]
    assert timeline["contention_s"] and sum(parts) + timeline["contention_s"] == timeline["step_s"]


def test_collectives_appear_disappear_and_change():
    reduce = f"%r = f32[4] all-reduce(f32[4] %x.r), {GROUPS}, to_apply=%add"
    later = text_of(GATHER, DONE, kernel("k", 80, MLP), kernel("l", 40))
    found = compared(PROGRAM, later)  # the same gather, no longer overlapped
    (row,) = found.collectives
    assert (row.key, row.figures["hidden"], row.figures["bytes"]) == (
        ("all-gather", "?", "tsp/mlp/gather"),
        Pair(1.0, 0.0),
        Pair(56, 56),
    )
    other = compared(PROGRAM, text_of(kernel("k", 80, MLP), kernel("l", 40), reduce))
    states = {row.key[0]: (row.state, row.figures["count"]) for row in other.collectives}
    assert states == {"all-gather": ("disappeared", Pair(1, 0)), "all-reduce": ("appeared", Pair(0, 1))}
    assert other.totals["received"] == Pair(56, 28)


def test_axes_that_one_program_does_not_tell_are_left_out():
    told, untold = (report(PROGRAM, target=UNIT, mesh_axes=axes).to_json() for axes in ({"tsp": 8}, None))
    found = diff(told, untold)
    assert found.same and found.unknown == ["B: mesh axes of collectives are not known without --mesh"]


def test_buffers_grow_appear_and_disappear():
    copy = '%{} = f32[{}] copy(f32[{}] %p.{}), metadata={{op_name="jit(f)/{}/copy"}}'
    made = [copy.format(name, size, size, name, name) for name, size in (("a", 64), ("b", 32))]
    grown = [copy.format(name, size, size, name, name) for name, size in (("a", 128), ("c", 16))]
    end = '%{} = f32[1] custom-call({}), custom_call_target="u"'
    before, after = (
        text_of(*some, end.format("e", ", ".join(f"%{name}" for name in names)))
        for some, names in ((made, "ab"), (grown, "ac"))
    )
    rows = {row.key[1:]: (row.state, row.figures["bytes"]) for row in compared(before, after).buffers}
    transient = {key: value for key, value in rows.items() if key[1]}
    assert transient == {
        ("f32[64] -> f32[128]", "a"): ("changed", Pair(256, 512)),
        ("f32[32]", "b"): ("disappeared", Pair(128, 0)),
        ("f32[16]", "c"): ("appeared", Pair(0, 64)),
    }


def test_an_order_that_depends_on_rates_is_a_tie():
    plain = report(PROGRAM, target=UNIT).to_json()

    def with_steps(typical: float, slow: float):
        steps = {"typical rates": {"step_s": typical}, "slow rates": {"step_s": slow}}
        return {**plain, "timeline": {**plain["timeline"], "step_s": typical, "scenarios": steps}}

    found = diff(with_steps(2.0, 5.0), with_steps(3.0, 4.0))
    assert found.holds is False
    assert "tie within their uncertainty: +1.00 s at typical rates, -1.00 s at slow rates" in verdict(found)


def test_what_a_text_does_not_tell_is_unknown():
    unscheduled = PROGRAM.replace(", is_scheduled=true", "")
    found = diff(report(PROGRAM, target=UNIT).to_json(), report(unscheduled, target=UNIT).to_json())
    assert [found.totals[name].after for name in ("step_s", "peak_bytes", "received")] == [None, None, None]
    assert found.totals["flops"] == Pair(0, 0) and found.holds is None and verdict(found) == ""
    assert not (found.scopes or found.collectives or found.buffers)
    assert found.unknown[0].startswith("B: memory, communication and time are not known: its text lacks is_scheduled")
    untimed = diff(report(PROGRAM, target=UNIT).to_json(), report(PROGRAM).to_json())
    assert untimed.totals["peak_bytes"].difference == 0 and untimed.totals["step_s"] == Pair(120, None)
    assert untimed.unknown[0] == "B: time is not known without a target"
    kernel_call = text_of('%c = f32[2] custom-call(f32[2] %p.c), custom_call_target="mine"')
    assert "B: the text does not tell work inside custom calls" in compared(PROGRAM, kernel_call).unknown[0]


def test_other_rates_are_said():
    slow = report(PROGRAM, target=at_rates(memory=0.5)).to_json()
    found = diff(report(PROGRAM, target=UNIT).to_json(), slow)
    assert "different rates" in found.unknown[-1]


@pytest.mark.usefixtures("optax_promotes")
def test_remat_of_a_real_step():
    """What is kept is no longer recomputed: products and gathers fall away, and residuals grow."""
    repeated = train_step().report().to_json()
    kept = compile_step(dataclasses.replace(CONFIG, remat="none"), CPU).report().to_json()
    found = diff(repeated, kept)
    recomputed = [row for row in found.scopes if row.key[0].startswith("recompute ")]
    assert recomputed and all(row.state == "disappeared" for row in recomputed)
    residual, flops = found.totals["residual"].difference, found.totals["flops"].difference
    assert residual and flops and residual > 0 > flops
    gone = sum(row.figures["flops"].before or 0.0 for row in recomputed)
    assert 0 < gone == pytest.approx(-flops)
    assert diff(kept, kept).same
