"""Escalations that wait for people, by the folded governance state: which, and until when."""

from __future__ import annotations

from typing import Any, NamedTuple

from projections.projection import Unfoldable
from projections.windows import moment

__all__ = ["Pending", "deadline_ms", "pending_with_deadline", "unlisted_from_seq"]


class Pending(NamedTuple):
    """A decision whose escalation nobody has resolved, and the ms since 1970 when it expires."""

    decision_id: str
    deadline_ms: int


def deadline_ms(expires_at: str | None) -> int | None:
    """Milliseconds since 1970; None where there is none, or it is no time."""
    if expires_at is None:
        return None
    try:
        return moment(expires_at)[0]
    except Unfoldable:
        return None


def pending_with_deadline(state: dict[str, Any]) -> list[Pending]:
    """Those that the entity `state` lists; at most a thousand."""
    pending = state.get("pending") or {}
    found = []
    for decision_id, row in pending.items():
        at_ms = deadline_ms(row["expires_at"])
        if at_ms is not None:
            found.append(Pending(decision_id, at_ms))
    return found


def unlisted_from_seq(state: dict[str, Any]) -> int | None:
    """From which entry on the stream has to be read for those that the state only counts."""
    first = state.get("pending_unlisted_from_seq")
    return None if first is None else int(first)
