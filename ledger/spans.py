"""Which of many spans of entry ids an id lies in, found by bisection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

__all__ = ["EntryId", "Span", "Spans"]

T = TypeVar("T")
EntryId = tuple[int, int]
"""ms and ordinal, which order as the stream does."""


class Span(NamedTuple, Generic[T]):
    """The ids from `first` to `last`, both included; none where `last` is the smaller one."""

    first: EntryId
    last: EntryId
    value: T


class Spans(Generic[T]):
    """Spans in the order in which they were added; they may overlap."""

    def __init__(self) -> None:
        self._all: list[Span[T]] = []
        self._begins: list[EntryId] = []
        self._values: list[T | None] = []
        self._is_sorted = True
        self._last: EntryId = (-1, -1)

    def __iter__(self) -> Iterator[Span[T]]:
        return iter(self._all)

    def add(self, first: EntryId, last: EntryId, value: T) -> None:
        """One more. The next `at` sorts all of them, so add many before asking."""
        self._all.append(Span(first, last, value))
        self._last = max(self._last, last)
        self._is_sorted = False

    def reach(self, entry_id: EntryId) -> bool:
        """Whether any span ends at the id or behind it."""
        return self._last >= entry_id

    def at(self, entry_id: EntryId) -> T | None:
        """Of the spans that have the id the one added first; None where none has it."""
        if not self._is_sorted:
            self._sort()
        place = bisect_right(self._begins, entry_id) - 1
        return self._values[place] if place >= 0 else None

    def _sort(self) -> None:
        """Cuts all that is covered into pieces that do not overlap, each with its value."""
        opens = sorted((span.first, number) for number, span in enumerate(self._all))
        behind = {(span.last[0], span.last[1] + 1) for span in self._all}
        begins = sorted(behind | {first for first, _ in opens})
        values: list[T | None] = []
        covering: list[int] = []
        opened = 0
        for begin in begins:
            while opened < len(opens) and opens[opened][0] <= begin:
                heappush(covering, opens[opened][1])
                opened += 1
            while covering and self._all[covering[0]].last < begin:
                heappop(covering)
            values.append(self._all[covering[0]].value if covering else None)
        self._begins, self._values, self._is_sorted = begins, values, True
