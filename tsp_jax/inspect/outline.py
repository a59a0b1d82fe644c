"""A simulated timeline as a tree of loops, small enough to be drawn: iterations that are alike stand once.

An item of the tree is a list of numbers or a loop. Times are seconds after the start of the enclosing item.

    [lane, task, start, seconds, count]               a task
    {"name", "start", "seconds", "times", "items"}    one iteration of a loop, which runs `times` times in a row

`lane` is a place in `LANES`, `task` one in the table of the tasks that items name. `count` is 1, or the number of
neighbours in their lane that were merged because they are short; the longest of them gives its name.
"""

from collections.abc import Sequence
from typing import Any

from tsp_jax.inspect.queues import Event
from tsp_jax.inspect.schedule import Task

LANES = ("compute", "wait", "links", "host")
"""wait: the compute queue waits for a task of the links or the host"""
MOST_TASKS = 4000
_COLUMNS = ("label", "op", "name", "bytes", "flops")
_DIGITS = 10

Item = list[Any] | dict[str, Any]


def outline(events: Sequence[Event]) -> dict[str, Any]:
    """The tree of a timeline's `outline`: {"lanes", "tasks": [{"label", "op", "name", "bytes", "flops"}], "items"}."""
    numbers: dict[str, int] = {}
    tasks: list[Task] = []
    shortest = _shortest(events)
    stack: list[tuple[Event, int, Item]] = []  # (event, number of events that it stands for, item)
    for event in events:
        if event.task is None:
            item = _loop(event, _parts(stack, event), shortest)
            stack.append((event, event.holds + 1, item))
            continue
        if (number := numbers.setdefault(event.task.name, len(tasks))) == len(tasks):
            tasks.append(event.task)
        lane = LANES.index("wait" if event.exposed else event.track)
        stack.append((event, 1, [lane, number, event.start_s, event.seconds, 1]))
    items = _merged([item for _, _, item in stack], 0.0, shortest)
    table = [{name: getattr(tasks[k], name) for name in _COLUMNS} for k in _numbered_anew(items, {})]
    return {"lanes": list(LANES), "tasks": table, "items": items}


def _numbered_anew(items: list[Item], numbers: dict[int, int]) -> dict[int, int]:
    """Leaves out tasks that no item names, since the items were merged: number before -> number from now on."""
    for item in items:
        if isinstance(item, dict):
            _numbered_anew(item["items"], numbers)
        else:
            item[1] = numbers.setdefault(item[1], len(numbers))
    return numbers


def _shortest(events: Sequence[Event]) -> float:
    """Seconds below which a task is merged with its neighbours, so that about MOST_TASKS remain."""
    lengths = sorted((event.seconds for event in events if event.task), reverse=True)
    return lengths[MOST_TASKS] if len(lengths) > MOST_TASKS else 0.0


def _parts(stack: list[tuple[Event, int, Item]], event: Event) -> list[Item]:
    """Takes the items that are parts of an iteration from the stack."""
    parts, left = [], event.holds
    while left:
        _, stands_for, item = stack.pop()
        left -= stands_for
        parts.append(item)
    return parts[::-1]


def _loop(event: Event, parts: list[Item], shortest: float) -> Item:
    return {
        "name": event.name, "start": event.start_s, "seconds": round(event.seconds, _DIGITS), "times": event.times,
        "items": _merged(parts, event.start_s, shortest),
    }  # fmt: skip


def _merged(items: list[Item], begin: float, shortest: float) -> list[Item]:
    """Items with times after `begin`, where neighbours of a lane that are shorter than `shortest` are one."""
    found: list[Item] = []
    last: dict[int, tuple[list[Any], float]] = {}  # lane -> (its last item if short, seconds of the longest in it)
    for item in items:
        if isinstance(item, dict):
            last = {}
            found.append(item | {"start": round(item["start"] - begin, _DIGITS)})
            continue
        lane, task, start, seconds, _ = item
        start = round(start - begin, _DIGITS)
        if seconds < shortest and lane in last:
            merged, longest = last[lane]
            merged[1] = task if seconds > longest else merged[1]
            merged[3:] = [round(start + seconds - merged[2], _DIGITS), merged[4] + 1]
            last[lane] = merged, max(longest, seconds)
            continue
        found.append([lane, task, start, round(seconds, _DIGITS), 1])
        last.pop(lane, None)
        if seconds < shortest:
            last[lane] = found[-1], seconds  # type: ignore[assignment]
    return found
