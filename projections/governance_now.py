"""What a reader with a clock makes of published governance state. Pure: the clock is the caller's.

Published windows, ages and what is overdue or expired are those of the newest time seen, which on a
quiet tenant may be long ago. `as_of_now` gives the same value as of a later time.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from ledger import errors
from projections.governance_view import cell_view, rates
from projections.windows import COLUMNS, WINDOWS, moment, time_text

__all__ = ["ActiveAt", "active_at", "as_of_now", "windows_at"]

View = dict[str, Any]
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def as_of_now(value: Mapping[str, Any], now: datetime) -> View:
    """The published value with the tenant's windows, pending escalations and waivers as of `now`.

    Where `now` lies before the newest time seen, that one counts. A policy's own windows stay as
    they are: they end at the newest time seen.
    """
    windows = value["windows"]
    now_ms = (now - _EPOCH) // timedelta(milliseconds=1)
    if windows is not None:
        now_ms = max(now_ms, _ms(windows["newest_at"]))
        found = windows_at(windows["buckets"], now_ms)
        windows = {**windows, **found, "as_of": time_text(now_ms)}
    return {
        **value,
        "windows": windows,
        "escalations": _escalations(value["escalations"], now_ms),
        "waivers": _waivers(value["waivers"], now_ms),
    }


def windows_at(buckets: Mapping[str, Any], now_ms: int) -> View:
    """The windows that end with the bucket of a time, in ms since 1970, by their names."""
    found: View = {}
    for window, (ring, bucket_ms, span) in WINDOWS.items():
        since_ms = (now_ms // bucket_ms - span + 1) * bucket_ms
        rows = [row[1:] for row in buckets[ring] if row[0] >= since_ms]
        cell = [sum(column) for column in zip(*rows, strict=True)] or [0] * COLUMNS
        found[window] = {"since": time_text(since_ms), **cell_view(cell), "rates": rates(cell)}
    return found


def _escalations(escalations: View, now_ms: int) -> View:
    rows = [
        {
            **row,
            "age_ms": max(now_ms - _ms(row["at"]), 0),
            "overdue": _is_past(row["deadline"], now_ms),
        }
        for row in escalations["oldest"]
    ]
    return {**escalations, "overdue": sum(row["overdue"] for row in rows), "oldest": rows}


def _waivers(waivers: View, now_ms: int) -> View:
    rows = [{**row, "expired": _is_past(row["expires_at"], now_ms)} for row in waivers["oldest"]]
    expired = max(waivers["expired"], sum(row["expired"] for row in rows))
    return {**waivers, "expired": expired, "oldest": rows}


def _is_past(time: str | None, now_ms: int) -> bool:
    return time is not None and _ms(time) <= now_ms


def _ms(time: str) -> int:
    return moment(time)[0]


class ActiveAt(NamedTuple):
    """What was in force.

    Attributes:
        policies: by id the version, and the hash where it was given.
        constitutional_hash: of the constitution; None where there was none.
    """

    policies: dict[str, tuple[str, str | None]]
    constitutional_hash: str | None


def active_at(value: Mapping[str, Any], at: datetime) -> ActiveAt:
    """The policies and the constitution that were in force at a time, by the ledger's own clock.

    It goes back from what is in force now, change by change.

    Raises:
        NotFound: the published history does not reach back so far, or not all that is in force
            fits into the published state.
    """
    at_ms = (at - _EPOCH) // timedelta(milliseconds=1)
    policies, constitution = value["policies"], value["constitution"]
    if policies["active_count"] > len(policies["active"]):
        raise errors.NotFound(
            f"policies: {policies['active_count']} are active, the published state shows "
            f"{len(policies['active'])}",
            hint="read as_of that time, which folds the history itself",
        )
    active = {name: (one["version"], one["hash"]) for name, one in policies["active"].items()}
    for row in _changes_after(policies, at_ms, "policies"):
        if row["before"] is None:
            active.pop(row["id"], None)
        else:
            active[row["id"]] = (row["before"]["version"], row["before"]["hash"])
    later = len(_changes_after(constitution, at_ms, "constitution"))
    earlier = constitution["history"][later:]
    return ActiveAt(active, earlier[0]["constitutional_hash"] if earlier else None)


def _changes_after(section: View, at_ms: int, name: str) -> list[View]:
    """The changes after the time, the latest first."""
    history: list[View] = section["history"]
    later = [row for row in history if _ms(row["recorded_at"]) > at_ms]
    if len(later) == len(history) < section["changes"]:
        oldest = history[-1]["recorded_at"] if history else "nothing"
        raise errors.NotFound(
            f"{name}: the published history has the last {len(history)} of {section['changes']} "
            f"changes, back to {oldest}",
            hint="read as_of that time, which folds the history itself",
        )
    return later
