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
    "DAY_HOURS",
    "HOUR_MS",
    "HOUR_SLOTS",
    "MINUTES",
    "MINUTE_MS",
    "MINUTE_SLOTS",
    "SECOND_MS",
    "SURELY_LIVE_MS",
    "WINDOWS",
    "Moment",
    "Ring",
    "live_slots",
    "moment",
    "moment_of_ms",
    "new_ring",
    "slot",
    "slots",
    "time_ms",
    "time_text",
]

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
MINUTE_SLOTS: Final = 60
DAY_HOURS: Final = 24
HOUR_SLOTS: Final = 7 * DAY_HOURS

COLUMNS: Final = 9
"""Of a bucket and of a counter cell: six verdicts, then warnings, violations, overridden."""

BUCKET: Final = COLUMNS
"""A slot's last column: the number of the bucket that it counts now."""

WINDOWS: Final = {
    "1h": ("minutes", MINUTE_MS, MINUTE_SLOTS),
    "24h": ("hours", HOUR_MS, DAY_HOURS),
    "7d": ("hours", HOUR_MS, HOUR_SLOTS),
}
"""By window: the ring that it is read from, the length of a bucket in ms, and how many it spans."""

Ring = list[list[int] | None]
Moment = tuple[int, int, int, int, int]
"""A time: ms since 1970; its minute, and that one's place in the ring; its hour, and its place."""

_EMPTY: Final = (0,) * COLUMNS
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS: Final = 253_402_300_799_999
"""The end of the year 9999."""
_HOUR: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):", re.ASCII)
_FRACTION: Final = re.compile(r"\.(\d{1,9})Z", re.ASCII)
_MEMO_LIMIT: Final = 1024

SURELY_LIVE_MS: Final = (MINUTE_SLOTS - 1) * MINUTE_MS
"""What is less than this older than the newest time seen has a slot in both rings."""

SECOND_MS: Final = {f"{second:02}Z": second * 1000 for second in range(60)}
MINUTES: Final[dict[str, Moment]] = {}
"""By its text, up to the seconds, how a minute begins: most times that a fold meets share theirs
with others. It only saves time. Both are for `moment`, and for the one that cannot afford a call.
"""
_hours_ms: Final[dict[str, int]] = {}
"""By its text, up to the minutes, when an hour begins. It only saves time."""
_MINUTE_MS_BY_TEXT: Final = {f"{minute:02}:": minute * MINUTE_MS for minute in range(60)}


def moment(text: str) -> Moment:
    """The moment of an RFC 3339 time in UTC, as the ledger stores it; finer than a ms is cut.

    Raises:
        Unfoldable: it is no such time.
    """
    begin_ms, minute, place, hour, hour_place = MINUTES.get(text[:17]) or _minute(text[:17])
    ms = SECOND_MS.get(text[17:])
    if ms is None:
        ms = _fraction_ms(text[17:])
    return begin_ms + ms, minute, place, hour, hour_place


def time_ms(text: str) -> int:
    """The ms of `moment`, sooner.

    Raises:
        Unfoldable: as `moment`.
    """
    try:
        return MINUTES[text[:17]][0] + SECOND_MS[text[17:]]
    except KeyError:
        return moment(text)[0]


def _minute(text: str) -> Moment:
    hour_ms, minute_ms = _hours_ms.get(text[:14]), _MINUTE_MS_BY_TEXT.get(text[14:])
    if minute_ms is None:
        raise Unfoldable("a time is not RFC 3339 in UTC")
    if hour_ms is None:
        hour_ms = _hour_ms(text[:14])
    if len(MINUTES) >= _MEMO_LIMIT:
        MINUTES.clear()
    begin = MINUTES[text] = moment_of_ms(hour_ms + minute_ms)
    return begin


def _hour_ms(text: str) -> int:
    found = _HOUR.fullmatch(text)
    if found is None:
        raise Unfoldable("a time is not RFC 3339 in UTC")
    year, month, day, hour = map(int, found.groups())
    try:
        time = datetime(year, month, day, hour, tzinfo=UTC)
    except ValueError:
        raise Unfoldable("a time is not in the calendar") from None
    if len(_hours_ms) >= _MEMO_LIMIT:
        _hours_ms.clear()
    hour_ms = _hours_ms[text] = (time - _EPOCH) // timedelta(milliseconds=1)
    return hour_ms


def _fraction_ms(text: str) -> int:
    whole_ms, fraction = SECOND_MS.get(text[:2] + "Z"), _FRACTION.fullmatch(text, 2)
    if whole_ms is None or fraction is None:
        raise Unfoldable("a time is not RFC 3339 in UTC")
    return whole_ms + int(fraction[1][:3].ljust(3, "0"))


def moment_of_ms(ms: int) -> Moment:
    """The moment `ms` after 1970 began."""
    minute, hour = ms // MINUTE_MS, ms // HOUR_MS
    return ms, minute, minute % MINUTE_SLOTS, hour, hour % HOUR_SLOTS


def time_text(ms: int) -> str:
    """RFC 3339 in UTC with milliseconds; what is past the year 9999 shows as its end."""
    time = _EPOCH + timedelta(milliseconds=min(ms, _LAST_MS))
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_ring(length: int) -> Ring:
    """An empty ring: a slot is null until its first bucket claims it."""
    return [None] * length


def slot(ring: Ring, place: int, bucket: int) -> list[int]:
    """The slot at the place, emptied if another bucket was counted there."""
    found = ring[place]
    if found is None or found[BUCKET] != bucket:
        found = ring[place] = [*_EMPTY, bucket]
    return found


def slots(minutes: Ring | None, hours: Ring, at: Moment, newest_ms: int) -> list[list[int]]:
    """The slots of the rings that still count the moment: both, the hour's, or none."""
    _, minute, minute_place, hour, hour_place = at
    found = []
    if minutes is not None and newest_ms // MINUTE_MS - minute < MINUTE_SLOTS:
        found.append(slot(minutes, minute_place, minute))
    if newest_ms // HOUR_MS - hour < HOUR_SLOTS:
        found.append(slot(hours, hour_place, hour))
    return found


def live_slots(ring: Ring, newest_bucket: int, span: int) -> list[list[int]]:
    """The slots of the `span` newest buckets that count anything, oldest first."""
    oldest = newest_bucket - span + 1
    live = [slot for slot in ring if slot and slot[BUCKET] >= oldest]
    return sorted(live, key=itemgetter(BUCKET))
