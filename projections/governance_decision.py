"""A recorded decision: what the folds read of its body, and how it counts."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final

from projections.governance_state import (
    IMPACT_LEVELS,
    LATENCY_BOUNDS_MS,
    POLICY_COLUMNS,
    VERDICT_COLUMN,
    VIOLATIONS,
    WARNINGS,
    State,
    advance,
    cell_of,
    clipped,
    malformed,
    note_late,
    optional_text,
)
from projections.windows import COLUMNS, Moment, moment, slots

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["DECISION", "RECENT_LIMIT", "Read", "fold_decision", "read_decision"]

DECISION: Final = "decision.recorded"
RECENT_LIMIT: Final = 100
PENDING_LIMIT: Final = 1_000
_ESCALATE: Final = VERDICT_COLUMN["escalate"]
_IMPACT: Final = {None: "unset", **{level: level for level in IMPACT_LEVELS if level != "unset"}}
_EFFECT: Final = {"match": 0, "warning": 1, "violation": 2}
_EFFECT_COLUMNS: Final = ((), (WARNINGS,), (VIOLATIONS,), (WARNINGS, VIOLATIONS))

Read = tuple[int, str, str, str, list[str], int, int]


def read_decision(event: dict[str, Any]) -> Read:
    """(verdict column, agent id, action type, impact level, policy keys, effects, latency bucket).

    A policy's key is `id@version`; `effects` has bit 1 for a rule's warning and 2 for a violation;
    the latency bucket is -1 where no latency is given. One function, since its cost is every fold's.

    Raises:
        Unfoldable: a field that a fold uses is missing, or has another type or vocabulary.
    """
    try:
        verdict = VERDICT_COLUMN[event["verdict"]]
        agent = event["agent"]["id"]
        action = event["action"]["type"]
        impact = _IMPACT[event.get("impact_level")]
        if not agent.__class__ is action.__class__ is event["id"].__class__ is str:
            raise TypeError
        keys = []
        policies = event.get("policies")
        if policies is not None:
            if policies.__class__ is not list:
                raise TypeError
            for policy in policies:
                keys.append(policy["id"] + "@" + policy["version"])
        effects = 0
        rules = event.get("rules")
        if rules is not None:
            if rules.__class__ is not list:
                raise TypeError
            for rule in rules:
                effects |= _EFFECT[rule.get("effect", "match")]
        latency_bucket = -1
        latency_ms = event.get("latency_ms")
        if latency_ms is not None:
            if latency_ms.__class__ is bool or latency_ms < 0:
                raise TypeError
            latency_bucket = bisect_left(LATENCY_BOUNDS_MS, latency_ms)
        if verdict == _ESCALATE:
            _check_escalation(event)
    except (KeyError, TypeError, AttributeError) as error:
        raise malformed(DECISION, error) from None
    return verdict, agent, action, impact, keys, effects, latency_bucket


def _check_escalation(event: dict[str, Any]) -> None:
    required = event.get("required_approvals")
    if required is not None and required.__class__ is not int:
        raise TypeError
    expires_at = optional_text(event, "expires_at")
    if expires_at is not None:
        moment(expires_at)


def fold_decision(state: State, entry: Entry) -> None:
    """Counts a decision wherever it belongs.

    Raises:
        Unfoldable: as `read_decision` and `advance`.
    """
    event = entry.event
    verdict, agent, action, impact, policies, effects, latency_bucket = read_decision(event)
    at = advance(state, entry, event)
    newest_ms = state["newest_ms"]
    cells = slots(state["windows"], at, newest_ms)
    cells.append(state["impact_levels"][impact])
    cell = state["action_types"].get(action)
    if cell is None:
        cell = cell_of(state, "action_types", action, COLUMNS)
        action = clipped(action)
    cells.append(cell)
    if policies:
        _add_policy_cells(state, policies, at, cells)
    for cell in cells:
        cell[verdict] += 1
    if effects:
        for column in _EFFECT_COLUMNS[effects]:
            for cell in cells:
                cell[column] += 1
    if at[0] < newest_ms:
        note_late(state, at)
    if latency_bucket >= 0:
        state["latency"][latency_bucket] += 1
    constitution = state["constitution"]
    if constitution is not None:
        named = event.get("constitutional_hash")
        if named is not None and named != constitution:
            state["constitution_mismatches"] += 1
    recent = state["recent"]
    policy = policies[0] if policies else None
    recent.append([entry.seq, event["id"], at[0], verdict, agent, action, policy])
    if len(recent) >= 2 * RECENT_LIMIT:
        del recent[:RECENT_LIMIT]


def _add_policy_cells(state: State, policies: list[str], at: Moment, cells: list[list[int]]) -> None:
    known = state["policies"]
    windows = state["policy_windows"]
    for policy in policies:
        cells.append(known.get(policy) or cell_of(state, "policies", policy, POLICY_COLUMNS))
        own = windows.get(policy)
        if own is not None:
            cells += slots(own, at, state["newest_ms"])
