"""Event time, and windows over it: rings of minute and hour buckets.

A ring has a fixed slot for each bucket that can be in the window, at the bucket's number modulo the
ring's length, so nothing has to be pruned: a slot is emptied when a newer bucket claims it, and one
that is too old for the newest time seen is not read. A bucket's number is minutes (or hours) since
1970. All is integers, so the result does not depend on how the entries were cut into chunks.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Final

from projections.projection import Unfoldable

__all__ = [
    "BUCKET",
    "COLUMNS",
    "HOUR_MS",
    "MINUTE_MS",
    "WINDOWS",
    "Moment",
    "Windows",
    "live_slots",
    "moment",
    "moment_of_ms",
    "new_windows",
    "slots",
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

Windows = dict[str, list[list[int]]]
Moment = tuple[int, int, int, int, int]
"""A time: ms since 1970, its minute and the minute's place in the ring, its hour and that's place."""

_EMPTY: Final = (0,) * COLUMNS
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS: Final = 253_402_300_799_999
"""The end of the year 9999."""
_SECOND: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_FRACTION: Final = re.compile(r"\.(\d{1,9})Z", re.ASCII)
_SURELY_LIVE_MS: Final = (MINUTE_SLOTS - 1) * MINUTE_MS
_MEMO_LIMIT: Final = 4096
_memo: dict[str, Moment] = {}


def moment(text: str) -> Moment:
    """The moment of an RFC 3339 time in UTC, as the ledger stores it; finer than a ms is cut.

    Raises:
        Unfoldable: it is no such time.
    """
    try:
        return _memo.get(text) or _parsed(text)
    except TypeError:
        raise Unfoldable("a time is not a string") from None


def _parsed(text: str) -> Moment:
    if _SECOND.fullmatch(text):
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise Unfoldable("a time is not in the calendar") from None
        parsed = moment_of_ms((time - _EPOCH) // timedelta(milliseconds=1))
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[text] = parsed
        return parsed
    fraction = _FRACTION.fullmatch(text, 19)
    if fraction is None:
        raise Unfoldable("a time is not RFC 3339 in UTC")
    ms, *place = moment(text[:19] + "Z")
    return (ms + int(fraction[1][:3].ljust(3, "0")), *place)


def moment_of_ms(ms: int) -> Moment:
    """The moment `ms` after 1970 began."""
    minute, hour = ms // MINUTE_MS, ms // HOUR_MS
    return ms, minute, minute % MINUTE_SLOTS, hour, hour % HOUR_SLOTS


def time_text(ms: int) -> str:
    """RFC 3339 in UTC with milliseconds; what is past the year 9999 shows as its end."""
    time = _EPOCH + timedelta(milliseconds=min(ms, _LAST_MS))
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_windows() -> Windows:
    """Empty rings. A slot that counts nothing yet stands for the bucket 0, the first of 1970."""
    return {
        "minutes": [[*_EMPTY, 0] for _ in range(MINUTE_SLOTS)],
        "hours": [[*_EMPTY, 0] for _ in range(HOUR_SLOTS)],
    }


def slots(windows: Windows, at: Moment, newest_ms: int) -> list[list[int]]:
    """The slots that still count the moment: the minute's and the hour's, or one, or none."""
    ms, minute, minute_place, hour, hour_place = at
    found = []
    # Almost every event is within the hour, and then neither bucket can have left its window.
    recent = newest_ms - ms < _SURELY_LIVE_MS
    if recent or newest_ms // MINUTE_MS - minute < MINUTE_SLOTS:
        slot = windows["minutes"][minute_place]
        if slot[BUCKET] != minute:
            slot[:] = (*_EMPTY, minute)
        found.append(slot)
    if recent or newest_ms // HOUR_MS - hour < HOUR_SLOTS:
        slot = windows["hours"][hour_place]
        if slot[BUCKET] != hour:
            slot[:] = (*_EMPTY, hour)
        found.append(slot)
    return found


def live_slots(ring: list[list[int]], newest_bucket: int, span: int) -> list[list[int]]:
    """The slots of the `span` newest buckets that count anything, oldest first."""
    oldest = newest_bucket - span + 1
    live = [slot for slot in ring if slot[BUCKET] >= oldest and any(slot[:COLUMNS])]
    return sorted(live, key=itemgetter(BUCKET))
