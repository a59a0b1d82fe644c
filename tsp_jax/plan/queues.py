"""Passes on two queues, compute and links: what overlaps, and what is exposed.

The rules are those of `tsp_jax.inspect.queues`, for this order of work:

- While a bucket is used, the next one is fetched and what the one before gave is sent, first in, first out.
- The first bucket of a pass is fetched during the last one of the pass before, except tokens, and the values that
  forward attends to: these come from the pass before. The first pass of a layer waits for its first bucket.
- A pass ends when what it sends has arrived; gradients of keys and values arrive during the next pass.
- Sums over replicas and over tensor axes are waited for. But backward's sums over tensor axes run beside the last
  bucket's gradients of weights.

They were read off programs compiled for MI300X, H100 and v5p (benchmarks/closed_forms.md).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_LIKE = 6
"""buckets of a pass that are simulated; all later ones take as long as the last of them"""


class Timed(NamedTuple):
    """A pass with the seconds that its parts take alone, in all buckets together."""

    buckets: int
    compute: Mapping[str, float]
    """term -> seconds"""
    fetched: Mapping[str, float]
    """kind of traffic -> seconds; likewise the two below"""
    sent: Mapping[str, float]
    summed: Mapping[str, float]
    early: float
    """share of the first bucket that is fetched while the pass before is at its last one"""
    awaited: bool
    """the next pass needs what is sent: tokens, or gradients of keys and values"""
    beside: float
    """seconds of computation that can run while outputs are summed over tensor axes: gradients of weights"""


class _Queues:
    def __init__(self, contention: tuple[float, float]):
        self.now = self.links = 0.0
        self.contention = contention
        self.terms: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self.terms[name] = self.terms.get(name, 0.0) + seconds

    def wait(self, until: float, kinds: Mapping[str, float]) -> None:
        """Compute waits; the wait counts for the kinds of traffic in proportion to their time."""
        if (exposed := until - self.now) > 0:
            total = sum(kinds.values()) or 1.0
            for kind, seconds in kinds.items():
                self.add(f"exposed {kind}", exposed * seconds / total)
            self.now = until

    def communicate(self, seconds: float) -> float:
        """Starts communication; returns when it ends."""
        self.links = max(self.now, self.links) + seconds
        return self.links

    def compute(self, terms: Mapping[str, float], share: float) -> None:
        """Computes a share of a pass; it and what the links do meanwhile slow each other."""
        seconds, (own, links) = share * sum(terms.values()), self.contention
        for name, each in terms.items():
            self.add(name, share * each)
        busy = max(0.0, self.links - self.now)
        if busy and (own or links):
            both = min(seconds / (1 - own), busy / (1 - links))
            self.links += links * both
            self.add("contention", own * both)
            seconds += own * both
        self.now += seconds


def run(passes: Sequence[Timed], contention: tuple[float, float], *, waits: bool) -> dict[str, float]:
    """Term -> seconds of passes that run one after another; the terms add up to the time from start to end.

    Args:
      passes: in their order.
      contention: shares of their rates that computation and communication lose while both run.
      waits: nothing overlaps: compute waits for every collective.
    """
    queues = _Queues(contention)
    if waits:
        for part in passes:
            for kinds in (part.fetched, part.sent, part.summed):
                queues.wait(queues.now + sum(kinds.values()), kinds)
            queues.compute(part.compute, 1.0)
        return queues.terms
    ready = 0.0
    for number, part in enumerate(passes):
        following = passes[number + 1] if number + 1 < len(passes) else None
        if late := 1.0 - part.early * (number > 0):
            ready = max(ready, queues.communicate(late * sum(part.fetched.values()) / part.buckets))
        ready = _use(queues, part, following, ready)
    sent = next((part.sent for part in reversed(passes) if part.sent), {})
    queues.wait(queues.links, sent or {"weights": 1.0})
    return queues.terms


def _use(queues: _Queues, part: Timed, following: Timed | None, ready: float) -> float:
    """Uses all buckets of a pass; returns when the early share of the following pass's first bucket is there."""
    share = 1 / part.buckets
    fetch, send = sum(part.fetched.values()) * share, sum(part.sent.values()) * share
    buckets = min(part.buckets, _LIKE)
    for bucket in range(buckets):
        began, before = queues.now, dict(queues.terms)
        queues.wait(ready, part.fetched)
        if bucket + 1 < buckets:
            ready = queues.communicate(fetch)
        elif following:
            ready = queues.communicate(following.early * sum(following.fetched.values()) / following.buckets)
        queues.compute(part.compute, share)
        if bucket == 1 and part.buckets > buckets:  # a bucket in the middle stands for those that are left out
            more = part.buckets - buckets
            for name, seconds in queues.terms.items():
                queues.terms[name] = seconds + more * (seconds - before.get(name, 0.0))
            shift = more * (queues.now - began)
            queues.now, queues.links, ready = queues.now + shift, queues.links + shift, ready + shift
        if send:
            queues.communicate(send)
    if part.sent and part.awaited:
        queues.wait(queues.links, part.sent)
    if part.summed:
        outputs = part.summed.get("tensor_sums", 0.0)
        queues.links = max(queues.links, queues.now - part.beside / part.buckets * (outputs > 0)) + sum(
            part.summed.values()
        )
        queues.wait(queues.links, part.summed)
    return ready
