"""Trip counts of loops, from conditions and the text around them."""

import re

import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.builders.hlo import MESH, D, compiled, ring, text_of
from tests.builders.hlo_texts import CPU
from tsp_jax import inspect


def test_trips_follow_from_the_condition_alone(module, program):
    stripped = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"other":{}', text_of(program))
    assert stripped != text_of(program)
    again = inspect.parse(stripped)
    assert inspect.list_collectives(again, MESH) == inspect.list_collectives(module, MESH)
    assert inspect.list_collectives(module, MESH)


@pytest.mark.parametrize(
    ("start", "go_on", "move", "trips"),
    [
        (2, lambda i: i < 17, lambda i: i + 3, 5),
        (2, lambda i: i <= 17, lambda i: i + 3, 6),
        (20, lambda i: i > 3, lambda i: i - 4, 5),
        (20, lambda i: i >= 4, lambda i: i - 4, 5),
        (0, lambda i: i != 12, lambda i: i + 2, 6),
        (0, lambda i: lax.gt(jnp.int32(9), i), lambda i: 1 + i, 9),
    ],
)
def test_trips_of_plain_loops(start, go_on, move, trips):
    def f(x):
        loop = lax.while_loop(lambda c: go_on(c[0]), lambda c: (move(c[0]), ring(c[1])), (jnp.int32(start), x))
        return loop[1]

    text = text_of(compiled(f, P("tsp"), P("tsp"), (16, D)))
    for variant in (text, re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"other":{}', text)):
        (c,) = inspect.list_collectives(inspect.parse(variant), MESH)
        assert c.count == trips


def test_loops_that_data_end_use_the_callers_number():
    def f(x):
        return lax.while_loop(lambda y: lax.pmax(jnp.sum(y), "data") < 9.0, lambda y: lax.psum(y, "tsp"), x)

    module = inspect.parse(compiled(f, P("data"), P("data"), (16, D)).as_text())
    (loop,) = [i for i, _ in module.walk() if i.opcode == "while"]
    assert module.trip_count(loop) is None
    for unknown, trips in ((1, 1), (7, 7), (lambda i: 4 if i is loop else 0, 4)):
        counts = {c.axis: c.count for c in inspect.list_collectives(module, MESH, unknown_trips=unknown)}
        assert counts == {"tsp": trips, "data": trips + 1}  # the condition is asked once more


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("compare(%p.0, %p.1), direction=LT", "compare(%p.1, %p.0), direction=GT", 5),
        ("direction=LT", "direction=LE", 6),
        ("direction=LT", "direction=NE", 5),
        ("direction=LT", "direction=GT", None),
        ("constant(5)", "constant(-2)", 0),
        ("constant(1)", "constant(2)", 3),
        ("add(%n, %one)", "subtract(%n, %one)", None),
        ("add(%n, %one)", "multiply(%n, %one)", None),
        ("copy(%zero)", "never-heard-of(%zero)", None),
        ("  %limit = s32[] constant(5)", "  %limit = s32[] get-tuple-element(%param.1), index=1", None),
    ],
)
def test_trips_of_edited_text(old, new, trips):
    assert old in CPU
    module = inspect.parse(CPU.replace(old, new))
    assert module.trip_count(module.entry.by_name["while.1"]) == trips


def test_a_limit_carried_by_the_loop():
    text = CPU.replace("(s32[], f32[8,16]{1,0})", "(s32[], f32[8,16]{1,0}, s32[])")
    text = text.replace("tuple(%copy.1, %x.1)", "tuple(%copy.1, %x.1, %seven)")
    text = text.replace("  %copy.1 =", "  %seven = s32[] constant(7)\n  %copy.1 =")
    text = text.replace("limit = s32[] constant(5)", "limit = s32[] get-tuple-element(%param.1), index=2")
    kept = text.replace("tuple(%next, %psum.2)", "tuple(%next, %psum.2, %l)")
    kept = kept.replace("  %next =", "  %l = s32[] get-tuple-element(%param), index=2\n  %next =")
    changed = text.replace("tuple(%next, %psum.2)", "tuple(%next, %psum.2, %next)")
    for text, trips in ((kept, 7), (changed, None)):
        module = inspect.parse(text)
        assert module.trip_count(module.entry.by_name["while.1"]) == trips
