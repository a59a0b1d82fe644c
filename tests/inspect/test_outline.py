"""The tree of a simulated timeline."""

import json
from collections import Counter

import pytest

from tests.builders.hlo import gather, kernel, lines, loop, simulated
from tsp_jax.inspect import outline as module
from tsp_jax.inspect.outline import LANES, outline


def nested(trips=(9, 7), **options):
    start, done = gather("g", 56)
    fetch, fetched = gather("h", 28)
    inner, inner_bodies = loop("inner", lines(fetch, kernel("k", 8), fetched), trips[1])
    outer, bodies = loop("outer", lines(start, inner, kernel("m", 16), done), trips[0], inner=inner_bodies)
    return simulated(lines(kernel("a", 40), outer, kernel("b", 24)), bodies, **options)


def seconds(items, times=1):
    """lane -> seconds, with every iteration counted."""
    total = Counter()
    for item in items:
        if isinstance(item, dict):
            total.update({lane: found * item["times"] for lane, found in seconds(item["items"]).items()})
        else:
            total[LANES[item[0]]] += item[3]
    return total


def ends(items, begin=0.0):
    """Ends of the items of the compute queue, with iterations that are alike one after another."""
    for item in items:
        if isinstance(item, dict):
            yield begin + item["start"] + item["seconds"] * item["times"]
        elif LANES[item[0]] in ("compute", "wait"):
            yield begin + item[2] + item[3]


@pytest.mark.parametrize("trips", [(9, 7), (1, 1), (2, 100)])
@pytest.mark.parametrize("record", [False, True])
def test_iterations_that_are_alike_stand_once_and_add_up(trips, record):
    timeline = nested(trips, record=record)
    tree = outline(timeline.outline)
    found = seconds(tree["items"])
    assert found["compute"] == pytest.approx(timeline.compute_s)
    assert found["links"] == pytest.approx(timeline.comm_s)
    assert found["wait"] == pytest.approx(timeline.exposed_comm_s)
    assert max(ends(tree["items"])) == pytest.approx(timeline.step_s)
    assert len(timeline.outline) < 100


def test_loops_hold_loops():
    tree = outline(nested((1, 1)).outline)
    (outer,) = [item for item in tree["items"] if isinstance(item, dict)]
    (inner,) = [item for item in outer["items"] if isinstance(item, dict)]
    names = [
        [tree["tasks"][item[1]]["name"] for item in part["items"] if isinstance(item, list)] for part in (outer, inner)
    ]
    assert names == [["g", "m"], ["h", "k", "h"]]  # the last: compute waits
    assert outer["start"] == 40 and inner["start"] == 0


def test_many_short_tasks_are_merged(monkeypatch):
    monkeypatch.setattr(module, "MOST_TASKS", 1)
    start, done = gather("g", 560)
    timeline = simulated(lines(start, *(kernel(f"k{n}", 8 * (n + 1)) for n in range(4)), kernel("long", 800), done))
    tree = outline(timeline.outline)
    found = [(LANES[lane], tree["tasks"][task]["name"], *rest) for lane, task, *rest in tree["items"]]
    assert found == [("links", "g", 0, 560, 1), ("compute", "k3", 0, 80, 4), ("compute", "long", 80, 800, 1)]
    assert [task["name"] for task in tree["tasks"]] == ["g", "k3", "long"]


def test_it_is_json_without_a_task():
    assert json.loads(json.dumps(outline(()))) == {"lanes": list(LANES), "tasks": [], "items": []}
