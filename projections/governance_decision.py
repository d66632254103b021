"""A recorded decision: what it has to be, and how it counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, Final

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
    moment_of,
    note_late,
)
from projections.windows import (
    MINUTES,
    SECOND_MS,
    SURELY_LIVE_MS,
    Moment,
    moment,
    slot,
    slots,
)

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["decided_at", "decision_counter", "keep_recent"]

_LATENCY_BOUNDS_MS: Final = tuple(map(float, LATENCY_BOUNDS_MS))  # which compare fastest
_ESCALATE: Final = VERDICT_COLUMN["escalate"]
_EFFECT: Final = {"match": 0, "warning": 1, "violation": 2}
_EFFECT_COLUMNS: Final = ((), (WARNINGS,), (VIOLATIONS,), (WARNINGS, VIOLATIONS))


def decided_at(entry: Entry, body: Decision) -> Moment:
    """When it was decided, by its own time or else the ledger's.

    Raises:
        Unfoldable: a time in it is none.
    """
    if body.expires_at is not None:
        moment(body.expires_at)
    return moment_of(entry, body)


# What the next function returns is most of what a projector does, and a call costs as much as
# counting in two cells: so it is long, and looks up itself what others would look up for it.


def decision_counter(  # noqa: C901, PLR0915 - see above
    state: State,
) -> Callable[[Entry, Decision], None]:
    """What counts decisions in every cell of the state that they belong to.

    It raises Unfoldable where a time is none, or `at` lies ahead of the ledger's time.
    """
    minutes, hours, levels = state["minutes"], state["hours"], state["impact_levels"]
    actions, known, windows = state["action_types"], state["policies"], state["policy_windows"]
    latency = state["latency"]
    # Of the last decision: the slots of a minute stay where they are while it counts.
    last_minute: int | None = None
    in_minute: list[int] = []
    in_hour: list[int] = []

    def count(entry: Entry, body: Decision) -> None:  # noqa: C901, PLR0912, PLR0915 - see above
        nonlocal last_minute, in_minute, in_hour
        text = body.at
        if text is None or body.expires_at is not None:
            ms, minute, minute_place, hour, hour_place = decided_at(entry, body)
        else:
            try:
                ms, minute, minute_place, hour, hour_place = MINUTES[text[:17]]
                ms += SECOND_MS[text[17:]]
            except KeyError:
                ms, minute, minute_place, hour, hour_place = moment(text)
        effects = 0
        if body.rules:
            for rule in body.rules:
                if rule.effect != "match":
                    effects |= _EFFECT[rule.effect]
        newest_ms = state["newest_ms"]
        if ms > newest_ms:
            if ms > state["clock_ms"] + FUTURE_LIMIT_MS:
                advance(state, entry, ms)
            state["newest_ms"] = newest_ms = ms
        verdict, action, policies = VERDICT_COLUMN[body.verdict], body.action.type, body.policies
        level = levels[body.impact_level or "unset"]
        by_action = actions.get(action)
        if by_action is None:
            by_action = cell_of(state, "action_types", action)
        policy = by_policy = None
        if policies:
            first = policies[0]
            policy = first.id + "@" + first.version
            if len(policies) == 1:
                by_policy = known.get(policy)
        if by_policy is not None and newest_ms - ms < SURELY_LIVE_MS:
            if minute != last_minute:
                in_minute = slot(minutes, minute_place, minute)
                in_hour = slot(hours, hour_place, hour)
                last_minute = minute
            level[verdict] += 1
            by_action[verdict] += 1
            in_minute[verdict] += 1
            in_hour[verdict] += 1
            by_policy[verdict] += 1
            of_policy = None
            if policy in windows:
                of_policy = slot(windows[policy], hour_place, hour)
                of_policy[verdict] += 1
            if effects:
                cells = [level, by_action, in_minute, in_hour, by_policy]
                _count_effects(cells if of_policy is None else [*cells, of_policy], effects)
        else:
            at = ms, minute, minute_place, hour, hour_place
            cells = [level, by_action, *slots(minutes, hours, at, newest_ms)]
            if policies:
                cells += _policy_cells(state, policies, at)
            for cell in cells:
                cell[verdict] += 1
            _count_effects(cells, effects)
        if ms < newest_ms:
            note_late(state, ms, minute)
        if body.latency_ms is not None:
            latency[bisect_left(_LATENCY_BOUNDS_MS, body.latency_ms)] += 1
        named, constitution = body.constitutional_hash, state["constitution"]
        if named != constitution and named is not None and constitution is not None:
            state["constitution_mismatches"] += 1
        if verdict == _ESCALATE:
            _open_escalation(state, entry, body, ms)

    return count


def _count_effects(cells: list[list[int]], effects: int) -> None:
    for column in _EFFECT_COLUMNS[effects]:
        for cell in cells:
            cell[column] += 1


def keep_recent(state: State, entries: Sequence[Entry], refused: Container[int]) -> None:
    """Puts the latest of the decisions that were counted into the ring of the last hundred."""
    rows: list[list[Any]] = []
    for entry in reversed(entries):
        body = entry.memo
        if isinstance(body, Decision) and entry.seq not in refused:
            rows.append(_row(entry, body))
            if len(rows) == RECENT_LIMIT:
                break
    recent = state["recent"]
    recent += reversed(rows)
    del recent[:-RECENT_LIMIT]


def _row(entry: Entry, body: Decision) -> list[Any]:
    policy = None
    if body.policies:
        policy = body.policies[0].id + "@" + body.policies[0].version
    ms, verdict = decided_at(entry, body)[0], VERDICT_COLUMN[body.verdict]
    return [entry.seq, entry.id, ms, verdict, body.agent.id, body.action.type, policy]


def _policy_cells(state: State, policies: list[PolicyName], at: Moment) -> list[list[int]]:
    """For what is rare: several policies, a new one, a late decision."""
    cells: list[list[int]] = []
    for policy in dict.fromkeys(policy.id + "@" + policy.version for policy in policies):
        cell = cell_of(state, "policies", policy)
        if any(cell is one for one in cells):  # `other`, for another of the decision's policies
            continue
        cells.append(cell)
        if policy in state["policy_windows"]:
            cells += slots(None, state["policy_windows"][policy], at, state["newest_ms"])
    return cells


def _open_escalation(state: State, entry: Entry, body: Decision, ms: int) -> None:
    state["escalations"] += 1
    if state["pending_unlisted"] or len(state["pending"]) >= PENDING_LIMIT:
        if not state["pending_unlisted"]:
            state["pending_unlisted_from_seq"] = entry.seq
        state["pending_unlisted"] += 1
        return
    state["pending"][entry.id] = {
        "seq": entry.seq,
        "at_ms": ms,
        "expires_at": body.expires_at,
        "agent": clipped(body.agent.id),
        "action": clipped(body.action.type),
        "required_approvals": body.required_approvals,
        "approvals": 0,
        "rejections": 0,
    }
