"""What is published of the governance state, in names that a reader of the JSON understands.

A rate is `{"rate", "numerator", "denominator"}`; `rate` is null where the denominator is 0. Times
are RFC 3339 in UTC; `at` is the event's own, `recorded_at` the ledger's. Windows end with the
bucket of the newest time seen; from `windows.buckets` a reader with a clock can sum up to now.

The JSON stays below 256 KiB: names and lists that would not fit are left out, those that count most
first kept, and `bounds.names_shown` says how many names a dimension shows at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

import orjson

from projections.governance_decision import AND
from projections.governance_state import (
    COMBINATIONS_LIMIT,
    FEEDBACK,
    HISTORY_LIMIT,
    IMPACT_LEVELS,
    LATENCY_BOUNDS_MS,
    NAME_BYTES_LIMIT,
    NAMES_LIMIT,
    NEVER_MS,
    OTHER,
    OVERRIDDEN,
    PENDING_LIMIT,
    POLICY_WINDOWS_LIMIT,
    PRECEDENTS_LIMIT,
    RECENT_LIMIT,
    VERDICTS,
    VIOLATIONS,
    WARNINGS,
    WITH_FEEDBACK,
    State,
    clipped,
    new_state,
)
from projections.windows import BUCKET, COLUMNS, WINDOWS, Ring, live_slots, moment, time_text

__all__ = ["VIEW_BYTES_LIMIT", "cell_view", "rate", "rates", "view"]

VIEW_BYTES_LIMIT: Final = 255 * 1024
"""Of the view; the envelope round it takes what is left of 256 KiB."""

_NAMES_SHOWN: Final = (NAMES_LIMIT, 128, 64, 32, 16, 8)
_LISTED: Final = 50
_MORE_BYTES: Final = 64
"""By which the rest of a section may grow when more of its list fits."""
_COLUMN_NAMES: Final = (*VERDICTS, "warnings", "violations", "overridden")

View = dict[str, Any]


def view(state: State) -> View:
    """The published value of the entity `state`, which may be empty."""
    state = state or new_state()
    state = {**state, **_dimensions(state)}
    pending = _pending_rows(state)
    for shown in _NAMES_SHOWN:
        listed = min(_LISTED, shown)
        value = _view(state, shown, pending[:listed])
        left_bytes = VIEW_BYTES_LIMIT - len(orjson.dumps(value))
        if left_bytes > 0:
            break
    more = _that_fit(pending[listed:], left_bytes)
    return {**value, "escalations": _escalations(state, [*pending[:listed], *more])}


def _that_fit(rows: list[View], left_bytes: int) -> list[View]:
    left_bytes -= _MORE_BYTES
    for place, row in enumerate(rows):
        left_bytes -= len(orjson.dumps(row)) + 1
        if left_bytes < 0:
            return rows[:place]
    return rows


def _view(state: State, shown: int, pending: list[View]) -> View:
    return {
        "decisions": _decisions(state, shown),
        "rates": rates(_total(state)),
        "windows": _tenant_windows(state),
        "policies": _policies(state, shown),
        "constitution": _constitution(state, shown),
        "thresholds": _thresholds(state, shown),
        "mode": _mode(state),
        "waivers": _waivers(state, shown),
        "escalations": _escalations(state, pending),
        "overrides": _overrides(state, shown),
        "feedback": _feedback(state, shown),
        "outcomes": {"total": sum(state["outcomes"].values()), **state["outcomes"]},
        "precedents": _precedents(state, shown),
        "latency": _latency(state),
        "agents": {
            "roles_assigned": state["roles_assigned"],
            "trust_adjustments": state["trust_adjustments"],
        },
        "recent": _recent(state, shown),
        "counts": _counts(state, shown),
        "bounds": {
            "names_per_dimension": NAMES_LIMIT,
            "name_bytes": NAME_BYTES_LIMIT,
            "names_shown": shown,
            "listed": _LISTED,
            "pending": PENDING_LIMIT,
            "recent": RECENT_LIMIT,
            "combinations": COMBINATIONS_LIMIT,
            "policy_windows": POLICY_WINDOWS_LIMIT,
            "precedents": PRECEDENTS_LIMIT,
            "history": HISTORY_LIMIT,
            "overflowed": state["overflow"],
        },
    }


# -- parts that many sections have ----------------------------------------------------------------


def rate(numerator: int, denominator: int) -> View:
    """A rate beside what it was made of; null over nothing."""
    value = numerator / denominator if denominator else None
    return {"rate": value, "numerator": numerator, "denominator": denominator}


def rates(cell: list[int]) -> View:
    """Of the decisions that the cell counts."""
    decisions = sum(cell[: len(VERDICTS)])
    return {
        "deny": rate(cell[VERDICTS.index("deny")], decisions),
        "escalate": rate(cell[VERDICTS.index("escalate")], decisions),
        "warning": rate(cell[WARNINGS], decisions),
        "violation": rate(cell[VIOLATIONS], decisions),
        "override": rate(cell[OVERRIDDEN], decisions),
    }


def cell_view(cell: list[int]) -> View:
    """A cell by the names of its columns."""
    decisions = sum(cell[: len(VERDICTS)])
    return {"decisions": decisions, **dict(zip(_COLUMN_NAMES, cell, strict=False))}


def _summed(cells: Iterable[list[int]], columns: int) -> list[int]:
    total = [0] * columns
    for cell in cells:
        for column in range(columns):
            total[column] += cell[column]
    return total


def _total(state: State) -> list[int]:
    return _summed(state["impact_levels"].values(), COLUMNS)


def _most(cells: dict[str, list[int]], shown: int) -> dict[str, list[int]]:
    """The names that count most, and all the others added up in `other`."""
    if len(cells) <= shown + 1:
        return dict(sorted(cells.items()))
    named = sorted((name for name in cells if name != OTHER), key=lambda n: (-sum(cells[n]), n))
    kept = {name: cells[name] for name in sorted(named[:shown])}
    rest = [cells[name] for name in cells if name not in kept]
    return {**kept, OTHER: _summed(rest, len(rest[0]))}


def _most_counts(counts: dict[str, int], shown: int) -> dict[str, int]:
    cells = {name: [count] for name, count in counts.items()}
    return {name: cell[0] for name, cell in _most(cells, shown).items()}


def _time(ms: int | None) -> str | None:
    return None if ms is None else time_text(ms)


# -- decisions and windows ------------------------------------------------------------------------


def _dimensions(state: State) -> dict[str, dict[str, list[int]]]:
    """The cells of each dimension, with what is counted by combination added up."""
    names = ("impact_levels", "action_types", "policies")
    levels, actions, policies = (
        {name: list(cell) for name, cell in state[dimension].items()} for dimension in names
    )
    for level, action, of_policies, cell in _combinations(state):
        _add(levels[level], cell)
        _add(actions[action], cell)
        for name in of_policies:
            _add(policies[name], cell)
    return {"impact_levels": levels, "action_types": actions, "policies": policies}


def _combinations(state: State) -> Iterator[tuple[str, str, list[str], list[int]]]:
    """Impact level, action type and policies of each combination that is kept, and its cell."""
    for level, by_action in state["combinations"].items():
        for action, by_policies in by_action.items():
            for joined, cell in by_policies.items():
                yield level, action, joined.split(AND) if joined else [], cell


def _add(total: list[int], cell: list[int]) -> None:
    for column, count in enumerate(cell):
        total[column] += count


def _by_combination(state: State, shown: int) -> View:
    """A row for each policy, action type and impact level; those that count most, and the rest.

    A decision by several policies counts in a row of each, one by none in a row of null.
    """
    rows: dict[tuple[str | None, str, str], list[int]] = {}
    total, combined = _total(state), [0] * COLUMNS
    for level, action, policies, cell in _combinations(state):
        _add(combined, cell)
        for policy in policies or (None,):
            _add(rows.setdefault((policy, action, level), [0] * COLUMNS), cell)
    most = sorted(rows, key=lambda row: (-sum(rows[row][: len(VERDICTS)]), row[0] or "", row[1:]))
    other = [every - counted for every, counted in zip(total, combined, strict=True)]
    for row in most[shown:]:
        _add(other, rows[row])
    return {
        "columns": ["policy", "action_type", "impact_level", *_COLUMN_NAMES],
        "rows": [[*row, *rows[row]] for row in most[:shown]],
        "other": cell_view(other),
    }


def _decisions(state: State, shown: int) -> View:
    total = _total(state)
    verdicts = total[: len(VERDICTS)]
    effective = [
        count + change for count, change in zip(verdicts, state["effective_change"], strict=True)
    ]
    levels = state["impact_levels"]
    actions, policies = _most(state["action_types"], shown), _most(state["policies"], shown)
    return {
        "total": sum(verdicts),
        "by_verdict": dict(zip(VERDICTS, verdicts, strict=True)),
        "by_effective_verdict": dict(zip(VERDICTS, effective, strict=True)),
        "warnings": total[WARNINGS],
        "violations": total[VIOLATIONS],
        "overridden": total[OVERRIDDEN],
        "by_impact_level": {level: cell_view(levels[level]) for level in IMPACT_LEVELS},
        "by_action_type": {name: cell_view(cell) for name, cell in actions.items()},
        "by_policy": {name: cell_view(cell) for name, cell in policies.items()},
        "by_policy_action_impact": _by_combination(state, shown),
    }


def _windows(rings: dict[str, Ring], newest_ms: int) -> View:
    found = {}
    for window, (ring, bucket_ms, span) in WINDOWS.items():
        if ring not in rings:
            continue
        newest_bucket = newest_ms // bucket_ms
        cell = _summed(live_slots(rings[ring], newest_bucket, span), COLUMNS)
        found[window] = {
            "since": time_text((newest_bucket - span + 1) * bucket_ms),
            **cell_view(cell),
            "rates": rates(cell),
        }
    return found


def _tenant_windows(state: State) -> View | None:
    newest_ms = state["newest_ms"]
    if newest_ms == NEVER_MS:
        return None
    buckets: View = {"columns": ["start_ms", *_COLUMN_NAMES]}
    for window in ("1h", "7d"):
        ring, bucket_ms, span = WINDOWS[window]
        live = live_slots(state[ring], newest_ms // bucket_ms, span)
        buckets[ring] = [[slot[BUCKET] * bucket_ms, *slot[:COLUMNS]] for slot in live]
    windows = _windows(state, newest_ms)
    return {"newest_at": time_text(newest_ms), **windows, "buckets": buckets}


def _latency(state: State) -> View:
    counts = state["latency"]
    return {"count": sum(counts), "bounds_ms": list(LATENCY_BOUNDS_MS), "counts": counts}


def _recent(state: State, shown: int) -> list[View]:
    newest = islice(reversed(state["recent"]), min(RECENT_LIMIT, shown))
    return [
        {
            "seq": seq,
            "id": clipped(event_id),
            "at": time_text(at_ms),
            "verdict": VERDICTS[verdict],
            "agent": clipped(agent),
            "action": clipped(action),
            "policy": policy and clipped(policy),
        }
        for seq, event_id, at_ms, verdict, agent, action, policy in newest
    ]


# -- what governs ---------------------------------------------------------------------------------


def _policies(state: State, shown: int) -> View:
    active, windows = state["active_policies"], state["policy_windows"]
    by_age = sorted(active, key=lambda policy_id: int(active[policy_id]["seq"]))
    shown_active = {}
    for policy_id in by_age[:shown]:
        policy = active[policy_id]
        own = windows.get(f"{policy_id}@{policy['version']}")
        shown_active[policy_id] = {
            "version": clipped(policy["version"]),
            "hash": policy["hash"] and clipped(policy["hash"]),
            **_when(policy),
            "windows": own and _windows({"hours": own}, state["newest_ms"]),
        }
    history = [
        {
            "change": change,
            "id": policy_id,
            "version": version,
            "hash": policy_hash,
            "before": before[0] and dict(zip(("version", "hash"), before, strict=True)),
            **_when({"seq": seq, "at_ms": at_ms, "recorded_ms": recorded_ms}),
        }
        for seq, recorded_ms, at_ms, change, policy_id, version, policy_hash, *before in _last(
            state["policy_history"], shown
        )
    ]
    return {
        "active_count": len(active),
        "active": shown_active,
        "changes": state["policy_changes"],
        "history": history,
    }


def _when(row: View) -> View:
    times = {"at": time_text(row["at_ms"]), "recorded_at": time_text(row["recorded_ms"])}
    return {"seq": row["seq"], **times}


def _last(history: list[Any], shown: int) -> list[Any]:
    """The newest rows of a history, the newest first."""
    return history[: -min(_LISTED, shown) - 1 : -1]


def _constitution(state: State, shown: int) -> View:
    history = [
        {
            "constitutional_hash": constitutional_hash,
            **_when({"seq": seq, "at_ms": at_ms, "recorded_ms": recorded_ms}),
        }
        for seq, recorded_ms, at_ms, constitutional_hash in _last(
            state["constitution_history"], shown
        )
    ]
    return {
        "active": state["constitution"] and clipped(state["constitution"]),
        "changes": state["constitution_changes"],
        "mismatched_decisions": state["constitution_mismatches"],
        "history": history,
    }


def _thresholds(state: State, shown: int) -> View:
    thresholds = state["thresholds"]
    current = [
        {
            "scope": row["scope"],
            "level": row["level"],
            "value": row["value"],
            "version": row["version"],
            "event_id": row["event_id"],
            **_when(row),
        }
        for _, row in islice(sorted(thresholds.items()), shown)
    ]
    return {"count": len(thresholds), "changes": state["threshold_changes"], "current": current}


def _mode(state: State) -> View:
    mode = state["mode"]
    return {
        "mode": mode and mode["mode"],
        "learning_paused": state["learning_paused"],
        "changes": state["mode_changes"],
        **(_when(mode) if mode else {"seq": None, "at": None, "recorded_at": None}),
    }


def _waivers(state: State, shown: int) -> View:
    waivers, newest_ms = state["waivers"], state["newest_ms"]
    by_age = sorted(waivers.items(), key=lambda item: int(item[1]["seq"]))
    listed = [
        {
            "waiver_id": waiver_id,
            "scope": waiver["scope"],
            "expires_at": _time(waiver["expires_ms"]),
            "expired": _has_expired(waiver, newest_ms),
            "seq": waiver["seq"],
            "at": time_text(waiver["at_ms"]),
        }
        for waiver_id, waiver in by_age[:shown]
    ]
    return {
        "count": len(waivers),
        "expired": sum(_has_expired(waiver, newest_ms) for waiver in waivers.values()),
        "granted": state["waivers_granted"],
        "revoked": state["waivers_revoked"],
        "oldest": listed,
    }


def _has_expired(waiver: View, now_ms: int) -> bool:
    return waiver["expires_ms"] is not None and waiver["expires_ms"] <= now_ms


# -- what followed --------------------------------------------------------------------------------


def _pending_rows(state: State) -> list[View]:
    """What is listed in the state, the oldest first; age and overdue at the newest time seen."""
    newest_ms, rows = state["newest_ms"], []
    for decision_id, row in sorted(state["pending"].items(), key=lambda item: int(item[1]["seq"])):
        deadline = row["expires_at"]
        rows.append(
            {
                "decision_id": clipped(decision_id),
                "seq": row["seq"],
                "at": time_text(row["at_ms"]),
                "age_ms": max(newest_ms - row["at_ms"], 0),
                "deadline": deadline,
                "overdue": deadline is not None and moment(deadline)[0] <= newest_ms,
                "agent": row["agent"],
                "action": row["action"],
                "required_approvals": row["required_approvals"],
                "approvals": row["approvals"],
                "rejections": row["rejections"],
            }
        )
    return rows


def _escalations(state: State, listed: list[View]) -> View:
    pending = len(state["pending"]) + state["pending_unlisted"]
    return {
        "opened": state["escalations"],
        "pending": pending,
        "overdue": sum(row["overdue"] for row in listed),
        "unlisted": pending - len(listed),
        "unlisted_from_seq": _first_unlisted_seq(state, len(listed)),
        "resolved": state["resolutions"],
        "votes": state["votes"],
        "oldest": listed,
    }


def _first_unlisted_seq(state: State, listed: int) -> int | None:
    """From which seq the stream has to be read to find those that are pending and not listed."""
    if listed == len(state["pending"]):
        from_seq: int | None = state["pending_unlisted_from_seq"]
        return from_seq
    return sorted(int(row["seq"]) for row in state["pending"].values())[listed]


def _overrides(state: State, shown: int) -> View:
    return {
        "events": state["overrides"],
        "decisions": _total(state)[OVERRIDDEN],
        "by_direction": dict(sorted(state["override_directions"].items())),
        "by_policy": _most_counts(state["override_policies"], shown),
        "by_reviewer": _most_counts(state["override_reviewers"], shown),
    }


def _matrix(matrix: list[int]) -> View:
    tp, fp, tn, fn = matrix[:4]
    return {
        **dict(zip(FEEDBACK, matrix, strict=True)),
        "false_negative_rate": rate(fn, fn + tp),
        "false_positive_rate": rate(fp, fp + tn),
    }


def _feedback(state: State, shown: int) -> View:
    by_policy = _most(state["feedback_policies"], shown)
    decisions = sum(_total(state)[: len(VERDICTS)])
    return {
        "events": state["feedback_events"],
        "coverage": rate(state["feedback"][WITH_FEEDBACK], decisions),
        "overall": _matrix(state["feedback"]),
        "by_policy": {name: _matrix(matrix) for name, matrix in by_policy.items()},
    }


def _precedents(state: State, shown: int) -> View:
    precedents = state["precedents"]
    by_age = sorted(precedents.items(), key=lambda item: -int(item[1]["seq"]))
    latest = [
        {
            **dict(zip(("action", "resource", "args_hash"), orjson.loads(key), strict=True)),
            "effective_verdict": row["effective_verdict"],
            "times": row["times"],
            "decision_id": clipped(row["decision_id"]),
            "seq": row["seq"],
        }
        for key, row in by_age[: min(_LISTED, shown)]
    ]
    return {"count": len(precedents), "latest": latest}


def _counts(state: State, shown: int) -> View:
    return {
        "events": state["events"],
        "late": state["late"],
        "orphans": {"total": sum(state["orphans"].values()), **state["orphans"]},
        "conflicts": {"total": sum(state["conflicts"].values()), **state["conflicts"]},
        "unknown_types": _most_counts(state["unknown_types"], shown),
        "quarantined": state["quarantined"],
    }
