"""A recorded decision: what it has to be, and how it counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, Final

from projections.bodies import Decision
from projections.governance_state import (
    COMBINATIONS_LIMIT,
    COMBINED_POLICIES_LIMIT,
    FUTURE_LIMIT_MS,
    LATENCY_BOUNDS_MS,
    OTHER,
    OVERRIDDEN,
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
    ms_of,
    note_late,
    note_overflow,
    shown_name,
)
from projections.windows import (
    COLUMNS,
    HOUR_MS,
    HOUR_SLOTS,
    MINUTE_MS,
    MINUTE_SLOTS,
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

__all__ = [
    "AND",
    "count_overridden",
    "decided_at",
    "decision_counter",
    "keep_recent",
    "policy_names",
]

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


# -- where a decision counts ----------------------------------------------------------------------

# A decision counts in the cell of its combination of impact level, action type and policies, from
# which the view adds up each dimension. Where that has no cell, as one of its names is not kept or
# there are too many combinations, it counts in a cell of each dimension instead. Either stays so:
# names and combinations are kept from the first decision that has them, or never.

AND: Final = "\x00"
"""Between the policies of a combination; one whose name has it is in no combination."""


def policy_names(body: Decision) -> list[str]:
    """`<id>@<version>` of each policy that took part, each once."""
    policies = body.policies
    if not policies:
        return []
    if len(policies) == 1:
        return [policies[0].id + "@" + policies[0].version]
    return list(dict.fromkeys(policy.id + "@" + policy.version for policy in policies))


def _cells_of(state: State, body: Decision, names: list[str]) -> list[list[int]]:
    """The cells that a decision by these policies counts in, windows apart; made if need be."""
    found = _combined_cell(state, body, names)
    if found is not None:
        return [found]
    level, action = body.impact_level or "unset", body.action.type
    cells = [state["impact_levels"][level], cell_of(state, "action_types", action)]
    for name in names:
        cell = cell_of(state, "policies", name)
        if not any(cell is one for one in cells):  # `other`, for another of the policies
            cells.append(cell)
    if not _are_kept(state, action, names):
        return cells
    if state["combinations_kept"] >= COMBINATIONS_LIMIT or len(names) > COMBINED_POLICIES_LIMIT:
        note_overflow(state, "combinations")
        return cells
    state["combinations_kept"] += 1
    cell = [0] * COLUMNS
    state["combinations"][level].setdefault(action, {})[AND.join(names)] = cell
    return [cell]


def _combined_cell(state: State, body: Decision, names: list[str]) -> list[int] | None:
    by_action = state["combinations"][body.impact_level or "unset"]
    cell: list[int] | None = by_action.get(body.action.type, {}).get(AND.join(names))
    return cell


def _are_kept(state: State, action: str, names: list[str]) -> bool:
    if action == OTHER or action not in state["action_types"]:
        return False
    known = state["policies"]
    return all(name != OTHER and name in known and AND not in name for name in names)


def _counted_cells(state: State, body: Decision, names: list[str]) -> list[list[int]]:
    """The cells in which a decision by these policies was counted."""
    found = _combined_cell(state, body, names)
    if found is not None:
        return [found]
    action = shown_name(state, "action_types", body.action.type)
    shown = dict.fromkeys(shown_name(state, "policies", name) for name in names)
    in_policies = [state["policies"][name] for name in shown]
    level = state["impact_levels"][body.impact_level or "unset"]
    return [level, state["action_types"][action], *in_policies]


def _window_cells(state: State, names: list[str], at: Moment) -> list[list[int]]:
    """The buckets that still count the moment, of the tenant and of the policies."""
    newest_ms, rings = state["newest_ms"], state["policy_windows"]
    cells = slots(state["minutes"], state["hours"], at, newest_ms)
    for name in names:
        if name in rings:
            cells += slots(None, rings[name], at, newest_ms)
    return cells


# -- counting -------------------------------------------------------------------------------------

# What the next function returns is most of what a projector does, and a call costs as much as
# counting in two cells: so it is long, and looks up itself what others would look up for it.


def decision_counter(  # noqa: C901, PLR0915 - see above
    state: State,
) -> Callable[[Entry, Decision], None]:
    """What counts decisions in every cell of the state that they belong to.

    It raises Unfoldable where a time is none, or `at` lies ahead of the ledger's time.
    """
    minutes, hours, windows = state["minutes"], state["hours"], state["policy_windows"]
    combinations, latency = state["combinations"], state["latency"]
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
        verdict, policies, policy = VERDICT_COLUMN[body.verdict], body.policies, ""
        if policies:
            first = policies[0]
            policy = first.id + "@" + first.version
        try:
            cell = combinations[body.impact_level or "unset"][body.action.type][policy]
        except KeyError:
            cell = None
        if cell is not None and (not policies or len(policies) == 1):
            cell[verdict] += 1
            if newest_ms - ms < SURELY_LIVE_MS:
                if minute != last_minute:
                    in_minute = slot(minutes, minute_place, minute)
                    in_hour = slot(hours, hour_place, hour)
                    last_minute = minute
                in_minute[verdict] += 1
                in_hour[verdict] += 1
                if policy in windows:
                    slot(windows[policy], hour_place, hour)[verdict] += 1
            elif newest_ms // HOUR_MS - hour < HOUR_SLOTS:
                slot(hours, hour_place, hour)[verdict] += 1
                if newest_ms // MINUTE_MS - minute < MINUTE_SLOTS:
                    slot(minutes, minute_place, minute)[verdict] += 1
                if policy in windows:
                    slot(windows[policy], hour_place, hour)[verdict] += 1
            if effects:
                at = ms, minute, minute_place, hour, hour_place
                _count_effects([cell, *_window_cells(state, [policy], at)], effects)
        else:
            names, at = policy_names(body), (ms, minute, minute_place, hour, hour_place)
            cells = [*_cells_of(state, body, names), *_window_cells(state, names, at)]
            for counted in cells:
                counted[verdict] += 1
            _count_effects(cells, effects)
        if ms < newest_ms:
            note_late(state, minute)
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


def count_overridden(state: State, at: Moment, body: Decision) -> None:
    """A decision is overridden once, in the buckets of its first override."""
    names = policy_names(body)
    for cell in (*_counted_cells(state, body, names), *_window_cells(state, names, at)):
        cell[OVERRIDDEN] += 1
    note_late(state, at[1])


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
    ms, verdict = ms_of(entry, body), VERDICT_COLUMN[body.verdict]
    event_id = entry.raw_fields[3].decode()
    return [entry.seq, event_id, ms, verdict, body.agent.id, body.action.type, policy]


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
