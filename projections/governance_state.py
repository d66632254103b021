"""What the governance folds share: vocabulary, the empty state, bounded names, event time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import orjson

from projections.projection import Unfoldable
from projections.windows import (
    COLUMNS,
    DAY_HOURS,
    HOUR_SLOTS,
    MINUTE_MS,
    MINUTE_SLOTS,
    WINDOWS,
    Moment,
    moment,
    moment_of_ms,
    new_ring,
    time_ms,
)

if TYPE_CHECKING:
    from ledger.stream import Entry
    from projections.bodies import Body, Decision

__all__ = [
    "COMBINATIONS_LIMIT",
    "COMBINED_POLICIES_LIMIT",
    "CONFLICTS",
    "FEEDBACK",
    "FOLLOW_UP_TYPES",
    "FUTURE_LIMIT_MS",
    "HISTORY_LIMIT",
    "IMPACT_LEVELS",
    "LATENCY_BOUNDS_MS",
    "NAMES_LIMIT",
    "NAME_BYTES_LIMIT",
    "NEVER_MS",
    "OTHER",
    "OUTCOMES",
    "OVERRIDDEN",
    "PENDING_LIMIT",
    "POLICY_WINDOWS_LIMIT",
    "PRECEDENTS_LIMIT",
    "RECENT_LIMIT",
    "RESOLUTIONS",
    "VERDICTS",
    "VERDICT_COLUMN",
    "VIOLATIONS",
    "VOTES",
    "WARNINGS",
    "WITH_FEEDBACK",
    "State",
    "advance",
    "cell_of",
    "clipped",
    "count_name",
    "fits",
    "moment_of",
    "ms_of",
    "new_state",
    "note_late",
    "note_overflow",
    "remember",
    "shown_name",
]

State = dict[str, Any]

VERDICTS: Final = ("allow", "deny", "escalate", "transform", "abstain", "error")
VERDICT_COLUMN: Final = {verdict: column for column, verdict in enumerate(VERDICTS)}
WARNINGS: Final = 6
VIOLATIONS: Final = 7
OVERRIDDEN: Final = 8
"""Decisions that were overridden, each at its first override."""

FEEDBACK: Final = ("tp", "fp", "tn", "fn", "neutral", "decisions")
"""The columns of a feedback matrix; the last one counts decisions that have feedback."""
WITH_FEEDBACK: Final = FEEDBACK.index("decisions")

IMPACT_LEVELS: Final = ("negligible", "low", "medium", "high", "critical", "unset")
RESOLUTIONS: Final = ("approved", "rejected", "expired", "cancelled")
OUTCOMES: Final = ("succeeded", "failed", "blocked", "cancelled", "timed_out")
VOTES: Final = ("approve", "reject", "advisory", "own_action")
FOLLOW_UP_TYPES: Final = (
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
LATENCY_BOUNDS_MS: Final = (
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500),
    *(1_000, 2_500, 5_000, 10_000),
)
"""Upper bounds, inclusive; one more bucket counts what is slower."""

NAMES_LIMIT: Final = 256
NAME_BYTES_LIMIT: Final = 128
OTHER: Final = "other"
COMBINATIONS_LIMIT: Final = 256
COMBINED_POLICIES_LIMIT: Final = 4
"""A decision by more policies than this counts in its dimensions alone."""
RECENT_LIMIT: Final = 100
HISTORY_LIMIT: Final = 100
PENDING_LIMIT: Final = 1_000
PRECEDENTS_LIMIT: Final = 256
POLICY_WINDOWS_LIMIT: Final = 16
FUTURE_LIMIT_MS: Final = 300_000
NEVER_MS: Final = -(10**15)
"""Before every time there is: nothing has been seen yet."""


def new_state() -> State:
    """The entity `state` of a tenant that has recorded nothing."""
    return {
        "events": 0,
        "newest_ms": NEVER_MS,
        "clock_ms": NEVER_MS,
        "minutes": new_ring(MINUTE_SLOTS),
        "hours": new_ring(HOUR_SLOTS),
        "late": dict.fromkeys(("total", *WINDOWS), 0),
        "impact_levels": {level: [0] * COLUMNS for level in IMPACT_LEVELS},
        "action_types": {},
        "policies": {},
        "combinations": {level: {} for level in IMPACT_LEVELS},
        "combinations_kept": 0,
        "effective_change": [0] * len(VERDICTS),
        "latency": [0] * (len(LATENCY_BOUNDS_MS) + 1),
        "recent": [],
        "precedents": {},
        "active_policies": {},
        "policy_windows": {},
        "policy_changes": 0,
        "policy_history": [],
        "constitution": None,
        "constitution_changes": 0,
        "constitution_history": [],
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
        "escalations": 0,
        "resolutions": dict.fromkeys(RESOLUTIONS, 0),
        "votes": dict.fromkeys(VOTES, 0),
        "overrides": 0,
        "override_directions": {},
        "override_policies": {},
        "override_reviewers": {},
        "feedback": [0] * len(FEEDBACK),
        "feedback_events": 0,
        "feedback_policies": {},
        "outcomes": dict.fromkeys(OUTCOMES, 0),
        "roles_assigned": 0,
        "trust_adjustments": 0,
        "orphans": dict.fromkeys(FOLLOW_UP_TYPES, 0),
        "conflicts": dict.fromkeys(CONFLICTS, 0),
        "unknown_types": {},
        "quarantined": 0,
        "overflow": {},
    }


# -- bounded names --------------------------------------------------------------------------------


_SURELY_FITS: Final = NAME_BYTES_LIMIT // 6
"""Characters: JSON needs at most six bytes for one."""


def fits(name: str) -> bool:
    """Whether the name is at most 128 bytes as JSON writes it, escapes counted."""
    if len(name) > NAME_BYTES_LIMIT:
        return False
    return len(name) <= _SURELY_FITS or len(orjson.dumps(name)) - 2 <= NAME_BYTES_LIMIT


def clipped(name: str) -> str:
    """The name for a list or a key: one that does not fit is cut, and its digest tells it apart."""
    if len(name) <= _SURELY_FITS or fits(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[:16]}…{digest}"


def note_overflow(state: State, part: str) -> None:
    """Counts that something did not fit in a bounded part of the state."""
    overflow = state["overflow"]
    overflow[part] = overflow.get(part, 0) + 1


def shown_name(state: State, dimension: str, name: str) -> str:
    """The name under which the dimension counts this one: itself if it is kept, else `other`."""
    return name if name in state[dimension] else OTHER


def _kept_name(state: State, dimension: str, name: str) -> str:
    """As `shown_name`, for one that is being counted: it is kept where there is room."""
    names = state[dimension]
    if name in names or name == OTHER:
        return name
    if len(names) - (OTHER in names) < NAMES_LIMIT and fits(name):
        return name
    note_overflow(state, dimension)
    return OTHER


def cell_of(state: State, dimension: str, name: str) -> list[int]:
    """The name's cell, made if need be."""
    cells: dict[str, list[int]] = state[dimension]
    return cells.setdefault(_kept_name(state, dimension, name), [0] * COLUMNS)


def count_name(state: State, dimension: str, name: str) -> None:
    """Adds one to the name's count in a dimension of plain counts."""
    counts: dict[str, int] = state[dimension]
    kept = _kept_name(state, dimension, name)
    counts[kept] = counts.get(kept, 0) + 1


def remember(history: list[Any], row: list[Any]) -> None:
    """Appends to a history, which keeps its last hundred rows."""
    history.append(row)
    del history[:-HISTORY_LIMIT]


# -- event time -----------------------------------------------------------------------------------


def moment_of(entry: Entry, body: Body | Decision) -> Moment:
    """The event's own time; where it has none, the ledger's.

    Raises:
        Unfoldable: `at` is no time.
    """
    return moment_of_ms(entry.recorded_ms) if body.at is None else moment(body.at)


def ms_of(entry: Entry, body: Body | Decision) -> int:
    """The ms of `moment_of`.

    Raises:
        Unfoldable: as `moment_of`.
    """
    return entry.recorded_ms if body.at is None else time_ms(body.at)


def advance(state: State, entry: Entry, ms: int) -> None:
    """Moves the newest time seen up to `ms`. Changes nothing if it raises.

    Raises:
        Unfoldable: it is more than five minutes ahead of the ledger's own time: one event
            in the far future must not empty every window.
    """
    if ms <= state["newest_ms"]:
        return
    # `clock_ms` is a ledger time that an earlier entry has reached; recorded times never go back,
    # so this entry's own has to be read only where that one does not suffice.
    if ms > state["clock_ms"] + FUTURE_LIMIT_MS:
        recorded_ms = entry.recorded_ms
        if ms > recorded_ms + FUTURE_LIMIT_MS:
            raise Unfoldable("at is more than five minutes ahead of the recorded time")
        state["clock_ms"] = recorded_ms
    state["newest_ms"] = ms


def note_late(state: State, minute: int) -> None:
    """Counts what came after its minute had passed, and the windows that it came too late for."""
    newest_minute = state["newest_ms"] // MINUTE_MS
    if newest_minute == minute:
        return
    late = state["late"]
    late["total"] += 1
    if newest_minute - minute < MINUTE_SLOTS:
        return
    late["1h"] += 1
    hours = newest_minute // 60 - minute // 60
    if hours >= DAY_HOURS:
        late["24h"] += 1
    if hours >= HOUR_SLOTS:
        late["7d"] += 1
