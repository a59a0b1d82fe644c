"""Spans of moments. They say when a buffer is in use; a moment is the index of an instruction in the schedule."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

Span = tuple[int, int]
"""(first, last) moment, ends included"""


class Spans:
    """A set of moments, held as sorted disjoint spans. Joining two sets takes time linear in the smaller one."""

    def __init__(self, spans: Iterable[Span], gap: int):
        """Merges spans that overlap (gap 0), or that overlap or are adjacent (gap 1)."""
        self.gap = gap
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted(spans):
            if self._lasts and first <= self._lasts[-1] + gap:
                self._lasts[-1] = max(self._lasts[-1], last)
            else:
                self._firsts.append(first)
                self._lasts.append(last)

    def __len__(self) -> int:
        return len(self._firsts)

    def __iter__(self) -> Iterator[Span]:
        return zip(self._firsts, self._lasts, strict=True)

    def _by_length(self, other: "Spans") -> tuple["Spans", "Spans"]:
        """This set and another, the one of fewer spans first."""
        return (self, other) if len(self._firsts) <= len(other._firsts) else (other, self)

    def meets_only_at(self, other: "Spans", allowed: Callable[[int], bool]) -> bool:
        """Whether all overlaps with another set are single moments, each of them allowed."""
        few, many = self._by_length(other)
        for first, last in few:
            k = bisect_left(many._lasts, first)
            while k < len(many) and many._firsts[k] <= last:
                start, end = max(first, many._firsts[k]), min(last, many._lasts[k])
                if start < end or not allowed(start):
                    return False
                k += 1
        return True

    def joined(self, other: "Spans") -> "Spans":
        """This set and another as one; the larger of the two is changed and returned."""
        few, many = self._by_length(other)
        for first, last in few:
            a = bisect_left(many._lasts, first - self.gap)
            b = a
            while b < len(many) and many._firsts[b] <= last + self.gap:
                first, last = min(first, many._firsts[b]), max(last, many._lasts[b])
                b += 1
            many._firsts[a:b], many._lasts[a:b] = [first], [last]
        return many
