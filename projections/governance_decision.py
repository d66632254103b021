"""A recorded decision: what it has to be, and how it counts."""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from projections.bodies import Decision, PolicyName
from projections.governance_state import (
    FUTURE_LIMIT_MS,
    LATENCY_BOUNDS_MS,
    PENDING_LIMIT,
    RECENT_LIMIT,
    VERDICT_COLUMN,
    VIOLATIONS,
    WARNINGS,
    State,
    advance,
    cell_of,
    clipped,
    note_late,
)
from projections.windows import (
    BUCKET,
    SURELY_LIVE_MS,
    Moment,
    claim,
    moment,
    moment_of_ms,
    slots,
)

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["decided_at", "fold_decision"]

_LATENCY_BOUNDS_MS: Final = tuple(map(float, LATENCY_BOUNDS_MS))  # which compare fastest
_ESCALATE: Final = VERDICT_COLUMN["escalate"]
_EFFECT: Final = {"match": 0, "warning": 1, "violation": 2}
_EFFECT_COLUMNS: Final = ((), (WARNINGS,), (VIOLATIONS,), (WARNINGS, VIOLATIONS))
_PARTS: Final = itemgetter(
    *("newest_ms", "minutes", "hours", "impact_levels", "action_types", "policies"),
    *("policy_windows", "latency", "recent", "constitution"),
)


def decided_at(entry: Entry, body: Decision) -> Moment:
    """When it was decided, by its own time or else the ledger's.

    Raises:
        Unfoldable: a time in it is none.
    """
    if body.expires_at is not None:
        moment(body.expires_at)
    return moment_of_ms(entry.recorded_ms) if body.at is None else moment(body.at)


# The next function is most of what a projector does, and a call costs as much as counting in two
# cells: so it is long, and looks up itself what is known.


def fold_decision(state: State, entry: Entry, body: Decision) -> None:  # noqa: C901, PLR0912
    """Counts a decision in every cell that it belongs to.

    Raises:
        Unfoldable: a time in it is none, or its `at` lies ahead of the ledger's time.
    """
    if body.at is None or body.expires_at is not None:
        at = decided_at(entry, body)
    else:
        at = moment(body.at)
    ms, minute, minute_place, hour, hour_place = at
    newest_ms, minutes, hours, levels, actions, known, windows, latency, recent, constitution = (
        _PARTS(state)
    )
    if ms > newest_ms:
        if ms > state["clock_ms"] + FUTURE_LIMIT_MS:
            advance(state, entry, at)
        state["newest_ms"] = newest_ms = ms
    verdict, action, policies = VERDICT_COLUMN[body.verdict], body.action.type, body.policies
    level = levels[body.impact_level or "unset"]
    by_action = actions.get(action)
    if by_action is None:
        by_action = cell_of(state, "action_types", action)
    policy = by_policy = None
    if policies:
        policy = policies[0].id + "@" + policies[0].version
        by_policy = known.get(policy) if len(policies) == 1 else None
    if by_policy is not None and newest_ms - ms < SURELY_LIVE_MS:
        in_minute = minutes[minute_place]
        if in_minute is None or in_minute[BUCKET] != minute:
            in_minute = claim(minutes, minute_place, minute)
        in_hour = hours[hour_place]
        if in_hour is None or in_hour[BUCKET] != hour:
            in_hour = claim(hours, hour_place, hour)
        ring = windows.get(policy)
        if ring is None:
            cells = (level, by_action, in_minute, in_hour, by_policy)
        else:
            of_policy = ring[hour_place]
            if of_policy is None or of_policy[BUCKET] != hour:
                of_policy = claim(ring, hour_place, hour)
            cells = (level, by_action, in_minute, in_hour, by_policy, of_policy)
    else:
        cells = (level, by_action, *slots(minutes, hours, at, newest_ms))
        if policies:
            cells += _policy_cells(state, policies, at)
    for cell in cells:
        cell[verdict] += 1
    if body.rules:
        effects = 0
        for rule in body.rules:
            effects |= _EFFECT[rule.effect]
        for column in _EFFECT_COLUMNS[effects]:
            for cell in cells:
                cell[column] += 1
    if ms < newest_ms:
        note_late(state, at)
    if body.latency_ms is not None:
        latency[bisect_left(_LATENCY_BOUNDS_MS, body.latency_ms)] += 1
    named = body.constitutional_hash
    if named != constitution and named is not None and constitution is not None:
        state["constitution_mismatches"] += 1
    recent.append((entry.seq, body.id, ms, verdict, body.agent.id, action, policy))
    if len(recent) >= 2 * RECENT_LIMIT:
        del recent[:RECENT_LIMIT]
    if verdict == _ESCALATE:
        _open_escalation(state, entry, body, ms)


def _policy_cells(state: State, policies: list[PolicyName], at: Moment) -> tuple[list[int], ...]:
    """For what is rare: several policies, a new one, a late decision."""
    cells: list[list[int]] = []
    for policy in dict.fromkeys(policy.id + "@" + policy.version for policy in policies):
        cell = cell_of(state, "policies", policy)
        if any(cell is one for one in cells):  # `other`, for another of the decision's policies
            continue
        cells.append(cell)
        if policy in state["policy_windows"]:
            cells += slots(None, state["policy_windows"][policy], at, state["newest_ms"])
    return tuple(cells)


def _open_escalation(state: State, entry: Entry, body: Decision, ms: int) -> None:
    state["escalations"] += 1
    if state["pending_unlisted"] or len(state["pending"]) >= PENDING_LIMIT:
        if not state["pending_unlisted"]:
            state["pending_unlisted_from_seq"] = entry.seq
        state["pending_unlisted"] += 1
        return
    state["pending"][body.id] = {
        "seq": entry.seq,
        "at_ms": ms,
        "expires_at": body.expires_at,
        "agent": clipped(body.agent.id),
        "action": clipped(body.action.type),
        "required_approvals": body.required_approvals,
        "approvals": 0,
        "rejections": 0,
    }
