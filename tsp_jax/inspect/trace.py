"""A timeline as a trace file that ui.perfetto.dev and chrome://tracing open.

Format: Chrome's trace events, as in the "Trace Event Format" document of the Chromium project. The device is the
process; compute, links and host are its threads. Where compute waits, its thread has a slice "exposed: ...", and an
arrow points to this slice from the task that compute waits for. Each iteration of a loop is a slice that encloses what
runs in it; a loop without communication is a single slice.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsp_jax.errors import ConfigError
from tsp_jax.inspect.queues import Event
from tsp_jax.inspect.schedule import Task
from tsp_jax.inspect.timeline import Timeline

_THREADS = {"compute": 1, "links": 2, "host": 3}


def write_trace(timeline: Timeline, path: str | Path) -> None:
    """Writes a recorded timeline as JSON, gzipped if the name ends in .gz.

    Raises:
      ConfigError: the timeline has no events.
    """
    if not timeline.events:
        raise ConfigError("timeline has no events to write; use simulate(..., record=True)")
    trace = {"traceEvents": list(_trace_events(timeline)), "otherData": {"assumptions": list(timeline.assumptions)}}
    data = json.dumps(trace, separators=(",", ":")).encode()
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)


def _trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "device"}}
    for name, number in _THREADS.items():
        yield {"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": 0, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}}
    in_flight: dict[str, Event] = {}
    for number, event in enumerate(timeline.events):
        begin, end = _microseconds(event.start_s), _microseconds(event.start_s + event.seconds)
        slice_ = {"ph": "X", "pid": 0, "tid": _THREADS[event.track], "ts": begin, "dur": round(end - begin, 3)}
        yield slice_ | ({"name": event.name} if event.task is None else _description(event.task, event.exposed))
        if event.track != "compute":
            in_flight[event.name] = event
        elif event.exposed and event.name in in_flight:
            yield from _arrow(number, in_flight[event.name], event)


def _microseconds(seconds: float) -> float:
    """Converts seconds to microseconds, rounded to the nanosecond so that nested slices still nest."""
    return round(seconds * 1e6, 3)


def _description(task: Task, exposed: bool) -> dict[str, Any]:
    sizes = {"bytes": task.bytes, "flops": task.flops}
    details = {"instruction": task.name, "op": task.op, "scope": task.scope} | sizes
    return {"name": f"{'exposed: ' if exposed else ''}{task.label} ({task.op})", "args": details}


def _arrow(number: int, source: Event, target: Event) -> Iterator[dict[str, Any]]:
    common = {"pid": 0, "id": number, "name": "waits for", "cat": "exposed"}
    yield common | {"ph": "s", "tid": _THREADS[source.track], "ts": _microseconds(source.start_s)}
    yield common | {"ph": "f", "bp": "e", "tid": _THREADS[target.track], "ts": _microseconds(target.start_s)}
