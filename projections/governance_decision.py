"""A recorded decision: what the folds read of its body, and how it counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from projections.governance_state import (
    FUTURE_LIMIT_MS,
    IMPACT_LEVELS,
    LATENCY_BOUNDS_MS,
    MALFORMED,
    PENDING_LIMIT,
    RECENT_LIMIT,
    VERDICT_COLUMN,
    VIOLATIONS,
    WARNINGS,
    State,
    advance,
    cell_of,
    clipped,
    malformed,
    moment_of,
    note_late,
    optional_text,
)
from projections.windows import (
    BUCKET,
    KNOWN_MOMENTS,
    SURELY_LIVE_MS,
    Moment,
    claim,
    moment,
    slots,
)

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["DECISION", "DecisionBody", "fold_decision", "read_decision"]

DECISION: Final = "decision.recorded"

DecisionBody = tuple[int, str, str, str, str, str | None, tuple[str, ...], int, int, str | None]
"""Verdict column, agent id, action type, event id, impact level, the first policy (`id@version`),
the others, the rules' effects (bit 1 warning, 2 violation), the latency's bucket or -1, the
constitution that it names."""

_ESCALATE: Final = VERDICT_COLUMN["escalate"]
_IMPACT: Final[dict[str | None, str]] = {
    None: "unset",
    **{level: level for level in IMPACT_LEVELS if level != "unset"},
}
_EFFECT: Final = {"match": 0, "warning": 1, "violation": 2}
_EFFECT_COLUMNS: Final = ((), (WARNINGS,), (VIOLATIONS,), (WARNINGS, VIOLATIONS))
_PARTS: Final = itemgetter(
    *("newest_ms", "minutes", "hours", "impact_levels", "action_types", "policies"),
    *("policy_windows", "latency", "recent", "constitution"),
)

# The two functions below are most of what a projector does, and a call costs as much as counting
# in two cells: so they are long, test types by `__class__`, and look at a slot's bucket themselves.


def read_decision(event: dict[str, Any]) -> DecisionBody:  # noqa: C901 - see above
    """What the folds need of a decision."""
    verdict = VERDICT_COLUMN[event["verdict"]]
    agent = event["agent"]["id"]
    action = event["action"]["type"]
    event_id = event["id"]
    if not agent.__class__ is action.__class__ is event_id.__class__ is str:
        raise TypeError
    constitution = event.get("constitutional_hash")
    if constitution is not None and constitution.__class__ is not str:
        raise TypeError
    impact = _IMPACT[event.get("impact_level")]
    policies = event.get("policies")
    policy = None
    others: tuple[str, ...] = ()
    if policies is not None:
        if policies.__class__ is not list:
            raise TypeError
        if policies:
            first = policies[0]
            policy = first["id"] + "@" + first["version"]
            if len(policies) > 1:
                others = tuple(one["id"] + "@" + one["version"] for one in policies[1:])
    rules = event.get("rules")
    effects = 0
    if rules is not None:
        if rules.__class__ is not list:
            raise TypeError
        for rule in rules:
            effects |= _EFFECT[rule.get("effect", "match")]
    latency_ms = event.get("latency_ms")
    latency_bucket = -1
    if latency_ms is not None:
        if latency_ms.__class__ is bool or latency_ms < 0:
            raise TypeError
        latency_bucket = bisect_left(LATENCY_BOUNDS_MS, latency_ms)
    if verdict == _ESCALATE:
        _check_escalation(event)
    return (
        verdict,
        agent,
        action,
        event_id,
        impact,
        policy,
        others,
        effects,
        latency_bucket,
        constitution,
    )


def _check_escalation(event: dict[str, Any]) -> None:
    required = event.get("required_approvals")
    if required is not None and type(required) is not int:
        raise TypeError
    expires_at = optional_text(event, "expires_at")
    if expires_at is not None:
        moment(expires_at)


def fold_decision(state: State, entry: Entry, event: dict[str, Any]) -> None:  # noqa: C901, PLR0912, PLR0915
    """Counts a decision in every cell that it belongs to.

    Raises:
        Unfoldable: it is malformed, or its `at` lies ahead of the ledger's time.
    """
    try:
        body = read_decision(event)
        at = KNOWN_MOMENTS.get(event.get("at", "")) or moment_of(entry, event)
    except MALFORMED as error:
        raise malformed(DECISION, error) from None
    verdict, agent, action, event_id, impact, policy, others, effects, latency_bucket, named = body
    ms, minute, minute_place, hour, hour_place = at
    newest_ms, minutes, hours, levels, actions, known, windows, latency, recent, constitution = (
        _PARTS(state)
    )
    if ms > newest_ms:
        if ms > state["clock_ms"] + FUTURE_LIMIT_MS:
            advance(state, entry, at)
        state["newest_ms"] = newest_ms = ms
    cell = actions.get(action)
    if cell is None:
        cell = cell_of(state, "action_types", action)
    cells = [levels[impact], cell]
    live = newest_ms - ms < SURELY_LIVE_MS
    if live:
        slot = minutes[minute_place]
        if slot is None or slot[BUCKET] != minute:
            slot = claim(minutes, minute_place, minute)
        cells.append(slot)
        slot = hours[hour_place]
        if slot is None or slot[BUCKET] != hour:
            slot = claim(hours, hour_place, hour)
        cells.append(slot)
    else:
        cells += slots(minutes, hours, at, newest_ms)
    if policy is not None:
        cell = known.get(policy)
        if cell is not None and live and not others:
            cells.append(cell)
            ring = windows.get(policy)
            if ring is not None:
                slot = ring[hour_place]
                if slot is None or slot[BUCKET] != hour:
                    slot = claim(ring, hour_place, hour)
                cells.append(slot)
        else:
            _add_policy_cells(state, (policy, *others), at, cells)
    for cell in cells:
        cell[verdict] += 1
    if effects:
        for column in _EFFECT_COLUMNS[effects]:
            for cell in cells:
                cell[column] += 1
    if ms < newest_ms:
        note_late(state, at)
    if latency_bucket >= 0:
        latency[latency_bucket] += 1
    if named != constitution and named is not None and constitution is not None:
        state["constitution_mismatches"] += 1
    recent.append([entry.seq, event_id, ms, verdict, agent, action, policy])
    if len(recent) >= 2 * RECENT_LIMIT:
        del recent[:RECENT_LIMIT]
    if verdict == _ESCALATE:
        _open_escalation(state, entry, event, ms)


def _add_policy_cells(
    state: State, policies: Iterable[str], at: Moment, cells: list[list[int]]
) -> None:
    """For what is rare: several policies, a new one, a late decision."""
    for policy in dict.fromkeys(policies):
        cell = cell_of(state, "policies", policy)
        if any(cell is one for one in cells):  # `other`, for another of the decision's policies
            continue
        cells.append(cell)
        if policy in state["policy_windows"]:
            cells += slots(None, state["policy_windows"][policy], at, state["newest_ms"])


def _open_escalation(state: State, entry: Entry, event: dict[str, Any], ms: int) -> None:
    state["escalations"] += 1
    if state["pending_unlisted"] or len(state["pending"]) >= PENDING_LIMIT:
        if not state["pending_unlisted"]:
            state["pending_unlisted_from_seq"] = entry.seq
        state["pending_unlisted"] += 1
        return
    state["pending"][event["id"]] = {
        "seq": entry.seq,
        "at_ms": ms,
        "expires_at": event.get("expires_at"),
        "agent": clipped(event["agent"]["id"]),
        "action": clipped(event["action"]["type"]),
        "required_approvals": event.get("required_approvals"),
        "approvals": 0,
        "rejections": 0,
    }
