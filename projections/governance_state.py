"""What the governance folds share: vocabulary, the empty state, bounded names, event time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import orjson

from projections.projection import Unfoldable
from projections.windows import COLUMNS, MINUTE_MS, WINDOWS, Moment, moment, moment_of_ms, new_windows

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = [
    "CONFLICTS",
    "FEEDBACK_COLUMNS",
    "FOLLOW_UPS",
    "IMPACT_LEVELS",
    "LATENCY_BOUNDS_MS",
    "NAMES_LIMIT",
    "NAME_BYTES_LIMIT",
    "NEVER_MS",
    "OTHER",
    "OUTCOMES",
    "OVERRIDDEN",
    "OVERRIDES",
    "POLICY_COLUMNS",
    "RESOLUTIONS",
    "TP",
    "VERDICTS",
    "VERDICT_COLUMN",
    "VIOLATIONS",
    "WARNINGS",
    "WITH_FEEDBACK",
    "State",
    "advance",
    "cell_of",
    "clipped",
    "note_late",
    "fits",
    "kept_name",
    "malformed",
    "new_state",
    "remember",
    "text",
    "optional_text",
]

State = dict[str, Any]

VERDICTS: Final = ("allow", "deny", "escalate", "transform", "abstain", "error")
VERDICT_COLUMN: Final = {verdict: column for column, verdict in enumerate(VERDICTS)}
WARNINGS: Final = 6
VIOLATIONS: Final = 7
OVERRIDDEN: Final = 8
"""Decisions that were overridden, each at its first override."""

FEEDBACK_COLUMNS: Final = ("tp", "fp", "tn", "fn", "neutral")
TP: Final = COLUMNS
"""A policy cell's first feedback column; the others follow in the order of FEEDBACK_COLUMNS."""
WITH_FEEDBACK: Final = TP + len(FEEDBACK_COLUMNS)
OVERRIDES: Final = WITH_FEEDBACK + 1
"""Override events, of which one decision may have several."""
POLICY_COLUMNS: Final = OVERRIDES + 1

IMPACT_LEVELS: Final = ("negligible", "low", "medium", "high", "critical", "unset")
RESOLUTIONS: Final = ("approved", "rejected", "expired", "cancelled")
OUTCOMES: Final = ("succeeded", "failed", "blocked", "cancelled", "timed_out")
FOLLOW_UPS: Final = (
    "escalation.voted",
    "escalation.resolved",
    "decision.overridden",
    "outcome.reported",
    "feedback.recorded",
)
CONFLICTS: Final = (
    "threshold_old_mismatch",
    "policy_not_active",
    "vote_not_pending",
    "resolution_not_pending",
    "override_from_mismatch",
    "waiver_unknown",
)
VOTES: Final = ("approve", "reject", "advisory", "own_action")
LATENCY_BOUNDS_MS: Final = (
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500),
    *(1_000, 2_500, 5_000, 10_000),
)
"""Upper bounds, inclusive; one more bucket counts what is slower."""

NAMES_LIMIT: Final = 256
NAME_BYTES_LIMIT: Final = 128
OTHER: Final = "other"
HISTORY_LIMIT: Final = 100
NEVER_MS: Final = -(10**15)
"""Before every time there is: no event has been seen yet."""
_FUTURE_LIMIT_MS: Final = 300_000


def new_state() -> State:
    """The entity `state` of a tenant that has recorded nothing."""
    return {
        "newest_ms": NEVER_MS,
        "clock_ms": NEVER_MS,
        "windows": new_windows(),
        "late": dict.fromkeys(("total", *WINDOWS), 0),
        "impact_levels": {level: [0] * COLUMNS for level in IMPACT_LEVELS},
        "action_types": {},
        "policies": {},
        "effective_change": [0] * len(VERDICTS),
        "latency": [0] * (len(LATENCY_BOUNDS_MS) + 1),
        "recent": [],
        "precedents": {},
        "active_policies": {},
        "policy_windows": {},
        "policy_history": [],
        "policy_changes": 0,
        "constitution": None,
        "constitution_history": [],
        "constitution_changes": 0,
        "constitution_mismatches": 0,
        "thresholds": {},
        "threshold_changes": 0,
        "mode": None,
        "mode_changes": 0,
        "learning_paused": False,
        "waivers": {},
        "waivers_granted": 0,
        "waivers_revoked": 0,
        "pending": {},
        "pending_unlisted": 0,
        "pending_unlisted_from_seq": None,
        "escalations_opened": 0,
        "resolutions": dict.fromkeys(RESOLUTIONS, 0),
        "votes": dict.fromkeys(VOTES, 0),
        "override_events": 0,
        "override_directions": {},
        "override_reviewers": {},
        "feedback": [0] * (len(FEEDBACK_COLUMNS) + 1),
        "feedback_events": 0,
        "outcomes": dict.fromkeys(OUTCOMES, 0),
        "roles_assigned": 0,
        "trust_adjustments": 0,
        "orphans": dict.fromkeys(FOLLOW_UPS, 0),
        "conflicts": dict.fromkeys(CONFLICTS, 0),
        "unknown_types": {},
        "quarantined": 0,
        "overflow": {},
    }


# -- bounded names --------------------------------------------------------------------------------


def fits(name: str) -> bool:
    """Whether the name is at most 128 bytes as JSON writes it, escapes counted."""
    return len(orjson.dumps(name)) - 2 <= NAME_BYTES_LIMIT


def clipped(name: str) -> str:
    """The name for a list, cut where it is longer than a name may be."""
    if len(name) <= NAME_BYTES_LIMIT and fits(name):
        return name
    # A character is at most six bytes of JSON; the digest keeps two long names apart.
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[:16]}…{digest}"


def overflow(state: State, dimension: str) -> None:
    """Notes that something did not fit in a bounded part of the state."""
    counts = state["overflow"]
    counts[dimension] = counts.get(dimension, 0) + 1


def kept_name(state: State, dimension: str, name: str) -> str:
    """The name that counts in the dimension: itself, if it is kept or there is room, or `other`."""
    names = state[dimension]
    if name in names or name == OTHER:
        return name
    if len(names) - (OTHER in names) < NAMES_LIMIT and fits(name):
        return name
    overflow(state, dimension)
    return OTHER


def cell_of(state: State, dimension: str, name: str, columns: int) -> list[int]:
    """The name's cell, made if need be."""
    cells: dict[str, list[int]] = state[dimension]
    return cells.setdefault(kept_name(state, dimension, name), [0] * columns)


def count(state: State, dimension: str, name: str) -> None:
    """Adds one to the name's count in a dimension of plain counts."""
    counts: dict[str, int] = state[dimension]
    key = kept_name(state, dimension, name)
    counts[key] = counts.get(key, 0) + 1


def remember(history: list[Any], row: list[Any]) -> None:
    """Appends to a bounded history."""
    history.append(row)
    del history[:-HISTORY_LIMIT]


# -- reading a body -------------------------------------------------------------------------------


def malformed(entry_type: str, error: Exception) -> Unfoldable:
    """What a reader of a body raises for the error that met it there."""
    if isinstance(error, KeyError):
        return Unfoldable(f"{entry_type}: missing or unknown {error.args[0]!r}")
    return Unfoldable(f"{entry_type}: a field has the wrong JSON type")


def text(event: dict[str, Any], field: str) -> str:
    """A required string. Raises KeyError or TypeError, which the fold turns into Unfoldable."""
    value = event[field]
    if type(value) is not str:
        raise TypeError(field)
    return value


def optional_text(event: dict[str, Any], field: str) -> str | None:
    """An optional string. Raises as `text`."""
    return None if event.get(field) is None else text(event, field)


# -- event time -----------------------------------------------------------------------------------


def advance(state: State, entry: Entry, event: dict[str, Any]) -> Moment:
    """The event's time; the newest time seen moves up to it. Changes nothing if it raises.

    Raises:
        Unfoldable: `at` is no time, or more than five minutes ahead of the ledger's own: one event
            in the far future must not empty every window.
    """
    text = event.get("at")
    at = moment_of_ms(entry.recorded_ms) if text is None else moment(text)
    ms = at[0]
    if ms > state["newest_ms"]:
        # `clock_ms` is a ledger time that an earlier entry has reached; recorded times never go
        # back, so this entry's own has to be read only where that one does not suffice.
        if ms > state["clock_ms"] + _FUTURE_LIMIT_MS:
            recorded_ms = entry.recorded_ms
            if ms > recorded_ms + _FUTURE_LIMIT_MS:
                raise Unfoldable("at is more than five minutes ahead of the recorded time")
            state["clock_ms"] = recorded_ms
        state["newest_ms"] = ms
    return at


def note_late(state: State, at: Moment) -> None:
    """Counts what came after its minute had passed, and the windows that it came too late for."""
    newest_ms = state["newest_ms"]
    if newest_ms // MINUTE_MS == at[1]:
        return
    late = state["late"]
    late["total"] += 1
    for window, (_, bucket_ms, span) in WINDOWS.items():
        if newest_ms // bucket_ms - at[0] // bucket_ms >= span:
            late[window] += 1
