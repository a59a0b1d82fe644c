"""Bytes alive over the schedule, by kind."""

import random

import pytest

from tests.builders.hlo import module_of
from tsp_jax.inspect import find_peak
from tsp_jax.inspect.memory_curve import KINDS, MOST_POINTS, Use, memory_curve

K = 4096
LINE = """
  %x = f32[1024]{0} parameter(0)
  %a = f32[1024]{0} custom-call(%x), custom_call_target="f"
  %b = f32[1024]{0} custom-call(%a), custom_call_target="f", metadata={op_name="jit(f)/tsp/mlp/dot_general"}
  %c = f32[256]{0} custom-call(%b), custom_call_target="f"
  ROOT %d = f32[256]{0} custom-call(%c), custom_call_target="f"
"""


def curve(buffers, moments, loops=()):
    return memory_curve(buffers, moments, loops, lambda moment: f"scope {moment}")


def test_a_straight_line():
    found = find_peak(module_of(LINE)).curve
    assert found.moments == 4
    assert found.points == ((0, K, 0, K), (1, K, 0, 2 * K), (2, K, 0, K + K // 4), (3, K, 0, K // 2), (4, K, 0, K // 4))
    assert found.scopes == ("a", *["tsp/mlp"] * 3, "end of the program")  # without a name: the operand's


def test_the_curve_meets_the_peak(module):
    found = find_peak(module)
    assert found.curve.loops and max(map(sum, (point[1:] for point in found.curve.points))) == found.bytes
    assert tuple(found.by_kind[kind] for kind in KINDS) in [point[1:] for point in found.curve.points]


def test_uses_of_one_buffer_that_meet_count_once_and_as_the_later():
    uses = [Use(4, 9, "transient", 8), Use(0, 4, "state", 5), Use(6, 6, "residual", 8)]
    points = curve([uses], 10).points
    assert [point[1:] for point in points] == [
        *[(5, 0, 0)] * 4, (0, 0, 8), (0, 0, 8), (0, 8, 0), (0, 0, 8), (0, 0, 8), (0, 0, 8), (0, 0, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("moments", [0, 1, MOST_POINTS - 1, MOST_POINTS, 12345])
def test_few_points_hold_the_highest_of_each_part(moments):
    draw = random.Random(moments)
    spans = [sorted(draw.choices(range(moments + 1), k=2)) for _ in range(50)]
    uses = [Use(*span, draw.choice(KINDS), draw.randrange(100)) for span in spans]
    total = [sum(use.bytes for use in uses if use.first <= moment <= use.last) for moment in range(moments + 1)]
    points = curve([[use] for use in uses], moments).points
    assert len(points) == min(moments + 1, -(-(moments + 1) // -(-(moments + 1) // MOST_POINTS)))
    assert len(points) <= MOST_POINTS
    assert all(sum(point[1:]) == total[point[0]] for point in points)
    assert max(sum(point[1:]) for point in points) == max(total)
