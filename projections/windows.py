"""Event time, and windows over it: rings of minute and hour buckets.

A ring has a fixed slot for each bucket that can be in the window, at the bucket's number modulo the
ring's length, so nothing has to be pruned: a slot is emptied when a newer bucket claims it, and one
that is too old for the newest time seen is not read. A bucket's number is minutes (or hours) since
1970. All is integers, so the result does not depend on how the entries were cut into chunks.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from projections.projection import Unfoldable

__all__ = [
    "BUCKET",
    "COLUMNS",
    "HOUR_MS",
    "HOUR_SLOTS",
    "MINUTE_MS",
    "MINUTE_SLOTS",
    "WINDOWS",
    "in_window",
    "new_windows",
    "slots",
    "time_ms",
    "time_text",
]

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
MINUTE_SLOTS: Final = 60
HOUR_SLOTS: Final = 7 * 24

COLUMNS: Final = 9
"""Of a bucket and of a counter cell: six verdicts, then warnings, violations, overridden."""

BUCKET: Final = COLUMNS
"""A slot's last column: the number of the bucket that it counts now."""

WINDOWS: Final = {
    "1h": ("minutes", MINUTE_MS, 60),
    "24h": ("hours", HOUR_MS, 24),
    "7d": ("hours", HOUR_MS, HOUR_SLOTS),
}
"""By window: the ring that it is read from, the length of a bucket in ms, and how many it spans."""

_EMPTY: Final = (0,) * COLUMNS
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d):(\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)
_MEMO_LIMIT: Final = 4096
_minute_ms: dict[str, int] = {}
_SECOND_MS: Final = {f":{second:02}Z": second * 1000 for second in range(60)}


def time_ms(text: str) -> int:
    """Milliseconds since 1970 of an RFC 3339 time in UTC, as the ledger stores it; finer is cut.

    Raises:
        Unfoldable: it is no such time.
    """
    try:
        return _minute_ms[text[:16]] + _SECOND_MS[text[16:]]
    except (KeyError, TypeError):
        return _parsed_ms(text)


def _parsed_ms(text: str) -> int:
    match = _TIME.fullmatch(text) if type(text) is str else None
    if match is None:
        raise Unfoldable("a time is not RFC 3339 in UTC")
    minute, second, fraction = match.groups("0")
    minute_ms = _minute_ms.get(minute)
    if minute_ms is None or second > "59":
        try:
            begin = datetime.fromisoformat(f"{minute}:{second}+00:00").replace(second=0)
        except ValueError:
            raise Unfoldable("a time is not in the calendar") from None
        minute_ms = (begin - _EPOCH) // timedelta(milliseconds=1)
        if len(_minute_ms) >= _MEMO_LIMIT:
            _minute_ms.clear()
        _minute_ms[minute] = minute_ms
    return minute_ms + int(second) * 1000 + int(fraction[:3].ljust(3, "0"))


def time_text(ms: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    moment = _EPOCH + timedelta(milliseconds=ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_windows() -> dict[str, list[list[int]]]:
    """Empty rings. A slot that counts nothing yet stands for the bucket 0, the first of 1970."""
    return {
        "minutes": [[*_EMPTY, 0] for _ in range(MINUTE_SLOTS)],
        "hours": [[*_EMPTY, 0] for _ in range(HOUR_SLOTS)],
    }


def slots(windows: dict[str, list[list[int]]], ms: int, newest_ms: int) -> list[list[int]]:
    """The slots that still count the moment: the minute's and the hour's, or one, or none."""
    found = []
    minute = ms // MINUTE_MS
    if newest_ms // MINUTE_MS - minute < MINUTE_SLOTS:
        slot = windows["minutes"][minute % MINUTE_SLOTS]
        if slot[BUCKET] != minute:
            slot[:] = (*_EMPTY, minute)
        found.append(slot)
    hour = minute // 60
    if newest_ms // HOUR_MS - hour < HOUR_SLOTS:
        slot = windows["hours"][hour % HOUR_SLOTS]
        if slot[BUCKET] != hour:
            slot[:] = (*_EMPTY, hour)
        found.append(slot)
    return found


def in_window(ring: list[list[int]], newest_bucket: int, span: int) -> list[list[int]]:
    """The slots of the `span` newest buckets that count anything, oldest first."""
    live = [
        slot
        for slot in ring
        if newest_bucket - span < slot[BUCKET] <= newest_bucket and any(slot[:COLUMNS])
    ]
    return sorted(live, key=_bucket)


def _bucket(slot: list[int]) -> Any:
    return slot[BUCKET]
