"""A fuzz of one door: real files, mutated, must be read or refused in one line, quickly and in little memory."""

import copy
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

MUTATIONS = 500
LONGEST_S = 10
LARGEST_BYTES = 2_000_000_000
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, 10**30, 10**400, 1e308, float("inf"), float("nan"), "", "0",
    "false", "é\u0000[bold]", "x" * 10_000, [], [0], [None], {}, {"a": 1}, [[[]]], "../../etc/passwd",
)  # fmt: skip
"""values that replace a value of JSON"""


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (dict or list, key or index) of every value below."""
    for key in list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


def mutate_json(content: Any, chance: random.Random) -> str:
    """Returns the text of a copy in which one to three values or keys are replaced, removed, doubled or renamed."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(content))
        if not places:
            return json.dumps(chance.choice(HOSTILE))
        holder, key = chance.choice(places)
        kind = chance.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif kind == 2:
            holder[key] = [copy.deepcopy(holder[key])] * 2
        else:
            holder[key] = copy.deepcopy(chance.choice(HOSTILE))
    return json.dumps(content)


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """Returns a copy of which bytes are changed, removed, repeated, or cut off at the end."""
    size = len(content)
    start = chance.randrange(size)
    stop = min(size, start + chance.choice((1, 1, 2, 8, 64, size)))
    kind = chance.randrange(5)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[stop:]
    if kind == 2:
        return content[:stop] + content[start:stop] * chance.choice((1, 2, 50)) + content[stop:]
    if kind == 3:
        return content[:start] + bytes(chance.randrange(256) for _ in range(min(8, stop - start))) + content[stop:]
    digits = str(chance.choice((0, -1, 7, 2**31, 10**18, 10**40))).encode()
    return content[:start] + digits + content[start + 1 :]


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Mutates a file by its JSON where it is JSON, two times in three, else by its bytes."""
    if chance.random() < 2 / 3:
        try:
            return mutate_json(json.loads(content), chance).encode()
        except ValueError:
            pass
    return mutate_bytes(content, chance)


def mutations(contents: list[bytes], seed: int = 0, count: int = MUTATIONS) -> Iterator[bytes]:
    """Yields mutations, `count` of each real file."""
    for content in contents:
        chance = random.Random(seed)
        for _ in range(count):
            yield mutate(content, chance)


def check_door(
    read: Callable[[bytes], Any],
    contents: list[bytes],
    allowed: tuple[type[Exception], ...],
    seed: int = 0,
    count: int = MUTATIONS,
) -> None:
    """Calls `read` with mutations of each real file; fails at a traceback, 10 s for one of them, or 2 GB more memory.

    `allowed` are the errors that a refusal may raise; their text must be one line.
    """

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"no end after {LONGEST_S} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, too_long)
    try:
        for number, content in enumerate(mutations(contents, seed, count)):
            signal.alarm(LONGEST_S)
            try:
                read(content)
            except allowed as error:
                assert "\n" not in str(error).strip(), f"mutation {number}: more than one line: {error}"
            except BaseException as error:
                raise AssertionError(f"mutation {number} ends in {error!r}: {content[:2000]!r}") from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LARGEST_BYTES, f"memory grew by {grown:,} bytes"
