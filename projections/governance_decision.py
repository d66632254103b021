"""A recorded decision: what the fold reads of its body, and how it counts."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final

from projections.governance_state import (
    IMPACT_LEVELS,
    LATENCY_BOUNDS_MS,
    NAME_BYTES_LIMIT,
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
    text_or_none,
)
from projections.windows import COLUMNS, MINUTE_MS, slots, time_ms

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["DECISION", "RECENT_LIMIT", "fold_decision", "read_decision"]

DECISION: Final = "decision.recorded"
RECENT_LIMIT: Final = 100
PENDING_LIMIT: Final = 1_000
PRECEDENTS_LIMIT: Final = 256
_FINGERPRINT_LENGTH_LIMIT: Final = 512
_ID_LENGTH_LIMIT: Final = 128
_ESCALATE: Final = VERDICT_COLUMN["escalate"]
_IMPACT: Final = {None: "unset", **{level: level for level in IMPACT_LEVELS if level != "unset"}}
_EFFECT: Final = {"match": 0, "warning": 1, "violation": 2}
_EFFECT_COLUMNS: Final = ((), (WARNINGS,), (VIOLATIONS,), (WARNINGS, VIOLATIONS))

Read = tuple[int, str, str, str, tuple[str, ...], int, int | None]


def read_decision(event: dict[str, Any]) -> Read:
    """(verdict column, agent id, action type, impact level, policy keys, effects, latency bucket).

    A policy's key is `id@version`; `effects` has bit 1 for a rule's warning, 2 for a violation.

    Raises:
        Unfoldable: a field that a fold uses is missing, or has another type or vocabulary.
    """
    try:
        verdict = VERDICT_COLUMN[event["verdict"]]
        agent = event["agent"]["id"]
        action = event["action"]
        action_type = action["type"]
        impact = _IMPACT[event.get("impact_level")]
        if not agent.__class__ is action_type.__class__ is event["id"].__class__ is str:
            raise TypeError
        if len(agent) > _ID_LENGTH_LIMIT or len(event["id"]) > _ID_LENGTH_LIMIT:
            raise TypeError
        text_or_none(action, "resource")
        text_or_none(action, "args_hash")
        text_or_none(event, "constitutional_hash")
        keys: tuple[str, ...] = ()
        policies = event.get("policies")
        if policies is not None:
            if policies.__class__ is not list:
                raise TypeError
            if len(policies) == 1:
                policy = policies[0]
                keys = (policy["id"] + "@" + policy["version"],)
            else:
                keys = tuple(dict.fromkeys([p["id"] + "@" + p["version"] for p in policies]))
        effects = 0
        rules = event.get("rules")
        if rules is not None:
            if rules.__class__ is not list:
                raise TypeError
            for rule in rules:
                effects |= _EFFECT[rule.get("effect", "match")]
        latency_bucket = None
        latency_ms = event.get("latency_ms")
        if latency_ms is not None:
            if latency_ms.__class__ is bool or latency_ms < 0:
                raise TypeError
            latency_bucket = bisect_left(LATENCY_BOUNDS_MS, latency_ms)
        if verdict == _ESCALATE:
            _read_escalation(event)
    except (KeyError, TypeError, AttributeError) as error:
        raise malformed(DECISION, error) from None
    return verdict, agent, action_type, impact, keys, effects, latency_bucket


def _read_escalation(event: dict[str, Any]) -> None:
    required = event.get("required_approvals")
    if required is not None and required.__class__ is not int:
        raise TypeError
    expires_at = text_or_none(event, "expires_at")
    if expires_at is not None:
        time_ms(expires_at)


def fold_decision(state: State, entry: Entry) -> None:
    """Counts a decision wherever it belongs.

    Raises:
        Unfoldable: as `read_decision` and `advance`.
    """
    event = entry.event
    verdict, agent, action_type, impact, policies, effects, latency_bucket = read_decision(event)
    ms = advance(state, entry, event)
    newest_ms = state["newest_ms"]
    cells = slots(state["windows"], ms, newest_ms)
    cells.append(state["impact_levels"][impact])
    actions = state["action_types"]
    cells.append(
        actions.get(action_type) or cell_of(state, "action_types", action_type, COLUMNS)
    )
    if policies:
        _add_policy_cells(state, policies, ms, cells)
    for cell in cells:
        cell[verdict] += 1
    if effects:
        for column in _EFFECT_COLUMNS[effects]:
            for cell in cells:
                cell[column] += 1
    if newest_ms - ms >= MINUTE_MS:
        note_late(state, ms)
    if latency_bucket is not None:
        state["latency"][latency_bucket] += 1
    constitution = state["constitution"]
    if constitution is not None:
        named = event.get("constitutional_hash")
        if named is not None and named != constitution:
            state["constitution_mismatches"] += 1
    if len(action_type) > NAME_BYTES_LIMIT:
        action_type = clipped(action_type)
    policy = policies[0] if policies else None
    recent = state["recent"]
    recent.append([entry.seq, event["id"], ms, verdict, agent, action_type, policy])
    if len(recent) >= 2 * RECENT_LIMIT:
        del recent[:RECENT_LIMIT]


def _add_policy_cells(state, policies, ms, cells) -> None:
    known = state["policies"]
    windows = state["policy_windows"]
    for policy in policies:
        cells.append(known.get(policy) or cell_of(state, "policies", policy, POLICY_COLUMNS))
        own = windows.get(policy)
        if own is not None:
            cells += slots(own, ms, state["newest_ms"])
