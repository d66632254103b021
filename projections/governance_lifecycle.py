"""What governs decisions: policies, constitution, thresholds, mode, waivers, agents' roles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from projections.governance_state import (
    MALFORMED,
    NAMES_LIMIT,
    POLICY_WINDOWS_LIMIT,
    State,
    advance,
    clipped,
    fits,
    malformed,
    moment_of,
    note_overflow,
    one_of,
    optional_text,
    remember,
    text,
)
from projections.windows import HOUR_SLOTS, Moment, moment, new_ring

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["LIFECYCLE", "fold_lifecycle"]

Body = tuple[Any, ...]
_MODES: Final = ("strict", "adaptive", "evolving", "degraded")


def fold_lifecycle(state: State, entry: Entry, event: dict[str, Any]) -> None:
    """Notes a change of what governs.

    Raises:
        Unfoldable: it is malformed, or its `at` lies ahead of the ledger's time.
    """
    kind = event["type"]
    read, note = LIFECYCLE[kind]
    try:
        body = read(event)
        at = moment_of(entry, event)
    except MALFORMED as error:
        raise malformed(kind, error) from None
    advance(state, entry, at)
    note(state, entry, at, body)


def _number(event: dict[str, Any], field: str) -> float:
    value = event[field]
    if type(value) is not int and type(value) is not float:
        raise TypeError(field)
    return value


# -- policies and constitution --------------------------------------------------------------------


def _read_policy(event: dict[str, Any]) -> Body:
    policy = event["policy"]
    return text(policy, "id"), text(policy, "version"), optional_text(policy, "hash")


def _note_policy(state: State, entry: Entry, at: Moment, change: str, body: Body) -> None:
    state["policy_changes"] += 1
    policy_id, version, policy_hash = body
    shown_hash = policy_hash and clipped(policy_hash)
    row = [entry.seq, entry.recorded_ms, at[0], change, clipped(policy_id), clipped(version)]
    remember(state["policy_history"], [*row, shown_hash])


def _activate_policy(state: State, entry: Entry, at: Moment, body: Body) -> None:
    _note_policy(state, entry, at, "activated", body)
    policy_id, version, policy_hash = body
    active, windows = state["active_policies"], state["policy_windows"]
    before = active.get(policy_id)
    if before is not None and (before["version"], before["hash"]) == (version, policy_hash):
        return  # it is in force already, and its windows go on
    if before is None and (len(active) >= NAMES_LIMIT or not fits(policy_id)):
        note_overflow(state, "active_policies")
        return
    if before is not None:
        windows.pop(f"{policy_id}@{before['version']}", None)
    if len(windows) < POLICY_WINDOWS_LIMIT and fits(f"{policy_id}@{version}"):
        windows[f"{policy_id}@{version}"] = new_ring(HOUR_SLOTS)
    else:
        note_overflow(state, "policy_windows")
    active[policy_id] = {
        "version": version,
        "hash": policy_hash,
        "seq": entry.seq,
        "at_ms": at[0],
        "recorded_ms": entry.recorded_ms,
    }


def _deactivate_policy(state: State, entry: Entry, at: Moment, body: Body) -> None:
    _note_policy(state, entry, at, "deactivated", body)
    policy_id, version, _ = body
    before = state["active_policies"].get(policy_id)
    if before is None or before["version"] != version:
        state["conflicts"]["policy_not_active"] += 1
        return
    del state["active_policies"][policy_id]
    state["policy_windows"].pop(f"{policy_id}@{version}", None)


def _read_constitution(event: dict[str, Any]) -> Body:
    return (text(event, "constitutional_hash"),)


def _activate_constitution(state: State, entry: Entry, at: Moment, body: Body) -> None:
    state["constitution"] = body[0]
    state["constitution_changes"] += 1
    row = [entry.seq, entry.recorded_ms, at[0], clipped(body[0])]
    remember(state["constitution_history"], row)


# -- thresholds and mode --------------------------------------------------------------------------


def _read_threshold(event: dict[str, Any]) -> Body:
    old = None if event.get("old") is None else _number(event, "old")
    return text(event, "scope"), text(event, "level"), old, _number(event, "new")


def _change_threshold(state: State, entry: Entry, at: Moment, body: Body) -> None:
    """The first change of a threshold has nothing to match; its `old`, if given, was version 1."""
    scope, level, old, new = body
    thresholds = state["thresholds"]
    key = orjson.dumps([scope, level]).decode()
    before = thresholds.get(key)
    if before is not None and before["value"] != old:
        state["conflicts"]["threshold_old_mismatch"] += 1
        return
    if before is None and (len(thresholds) >= NAMES_LIMIT or not (fits(scope) and fits(level))):
        note_overflow(state, "thresholds")
        return
    state["threshold_changes"] += 1
    version = before["version"] if before else int(old is not None)
    thresholds[key] = {
        "scope": scope,
        "level": level,
        "value": new,
        "version": version + 1,
        "seq": entry.seq,
        "event_id": clipped(entry.event["id"]),
        "at_ms": at[0],
        "recorded_ms": entry.recorded_ms,
    }


def _read_mode(event: dict[str, Any]) -> Body:
    paused = event.get("learning_paused")
    if paused is not None and type(paused) is not bool:
        raise TypeError
    return one_of(event, "mode", _MODES), paused


def _change_mode(state: State, entry: Entry, at: Moment, body: Body) -> None:
    mode, paused = body
    state["mode_changes"] += 1
    state["mode"] = {
        "mode": mode,
        "seq": entry.seq,
        "at_ms": at[0],
        "recorded_ms": entry.recorded_ms,
    }
    if paused is not None:
        state["learning_paused"] = paused


# -- waivers and agents ---------------------------------------------------------------------------


def _read_waiver(event: dict[str, Any]) -> Body:
    expires_at = optional_text(event, "expires_at")
    expires_ms = None if expires_at is None else moment(expires_at)[0]
    return text(event, "waiver_id"), text(event, "scope"), expires_ms


def _grant_waiver(state: State, entry: Entry, at: Moment, body: Body) -> None:
    waiver_id, scope, expires_ms = body
    waivers = state["waivers"]
    state["waivers_granted"] += 1
    key = clipped(waiver_id)
    if key not in waivers and len(waivers) >= NAMES_LIMIT:
        _drop_expired(waivers, state["newest_ms"])
    if key not in waivers and len(waivers) >= NAMES_LIMIT:
        note_overflow(state, "waivers")
        return
    waivers[key] = {
        "scope": clipped(scope),
        "expires_ms": expires_ms,
        "seq": entry.seq,
        "at_ms": at[0],
    }


def _drop_expired(waivers: dict[str, Any], newest_ms: int) -> None:
    """Makes room: what had expired at the newest time seen is no waiver to anybody."""
    for key, waiver in list(waivers.items()):
        if waiver["expires_ms"] is not None and waiver["expires_ms"] <= newest_ms:
            del waivers[key]


def _read_waiver_id(event: dict[str, Any]) -> Body:
    return (text(event, "waiver_id"),)


def _revoke_waiver(state: State, _entry: Entry, _at: Moment, body: Body) -> None:
    state["waivers_revoked"] += 1
    if state["waivers"].pop(clipped(body[0]), None) is None:
        state["conflicts"]["waiver_unknown"] += 1


def _read_role(event: dict[str, Any]) -> Body:
    return text(event["agent"], "id"), text(event, "role")


def _assign_role(state: State, _entry: Entry, _at: Moment, _body: Body) -> None:
    state["roles_assigned"] += 1


def _read_trust(event: dict[str, Any]) -> Body:
    return text(event["agent"], "id"), _number(event, "delta")


def _adjust_trust(state: State, _entry: Entry, _at: Moment, _body: Body) -> None:
    state["trust_adjustments"] += 1


_Reader = Callable[[dict[str, Any]], Body]
_Noter = Callable[[State, "Entry", Moment, Body], None]

LIFECYCLE: Final[dict[str, tuple[_Reader, _Noter]]] = {
    "policy.activated": (_read_policy, _activate_policy),
    "policy.deactivated": (_read_policy, _deactivate_policy),
    "constitution.activated": (_read_constitution, _activate_constitution),
    "threshold.changed": (_read_threshold, _change_threshold),
    "mode.changed": (_read_mode, _change_mode),
    "waiver.granted": (_read_waiver, _grant_waiver),
    "waiver.revoked": (_read_waiver_id, _revoke_waiver),
    "agent.role_assigned": (_read_role, _assign_role),
    "agent.trust_adjusted": (_read_trust, _adjust_trust),
}
"""By event type: what reads the body, and what notes it."""
