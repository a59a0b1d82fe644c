"""Traces of recorded timelines."""

import gzip
import json
from collections import Counter

import pytest

from tests.builders.hlo import at_rates, gather, kernel, lines, loop, overlapped, simulated
from tsp_jax.errors import ConfigError
from tsp_jax.inspect.trace import write_trace


def traced(tmp_path, name: str = "trace.json"):
    start, done = gather("g", 56)
    inner, inner_bodies = loop("inner", lines(kernel("k", 8)), 100)
    outer, bodies = loop("outer", lines(start, inner, kernel("m", 16), done), 2, inner=inner_bodies)
    slow_links = at_rates(link=0.05)
    timeline = simulated(lines(outer), bodies, hardware=slow_links, record=True)
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
        ("compute", "other iteration 1 of 2"): 1,
        ("compute", "other iteration 2 of 2"): 1,
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
        write_trace(simulated(overlapped(28, 8)), tmp_path / "trace.json")
