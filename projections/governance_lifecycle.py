"""What governs decisions: policies, constitution, thresholds, mode, waivers, agents' roles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from projections.bodies import (
    AgentRoleAssigned,
    AgentTrustAdjusted,
    Body,
    ConstitutionActivated,
    ModeChanged,
    PolicyActivated,
    PolicyDeactivated,
    PolicyRef,
    ThresholdChanged,
    WaiverGranted,
    WaiverRevoked,
)
from projections.governance_state import (
    NAMES_LIMIT,
    POLICY_WINDOWS_LIMIT,
    State,
    advance,
    clipped,
    fits,
    moment_of,
    note_overflow,
    remember,
)
from projections.windows import HOUR_SLOTS, Moment, moment, new_ring

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["fold_lifecycle"]


def fold_lifecycle(state: State, entry: Entry, body: Body) -> None:
    """Notes a change of what governs.

    Raises:
        Unfoldable: a time in it is none, or its `at` lies ahead of the ledger's time.
    """
    if isinstance(body, WaiverGranted) and body.expires_at is not None:
        moment(body.expires_at)
    at = moment_of(entry, body)
    advance(state, entry, at[0])
    _NOTE[type(body)](state, entry, at, body)


# -- policies and constitution --------------------------------------------------------------------


def _note_policy(state: State, entry: Entry, at: Moment, change: str, policy: PolicyRef) -> None:
    """A row of the history, with what was in force before: so what was in force at a time is
    found by going back from now.
    """
    state["policy_changes"] += 1
    before = state["active_policies"].get(policy.id)
    row = [entry.seq, entry.recorded_ms, at[0], change, clipped(policy.id)]
    row += _shown_version(policy.version, policy.hash)
    row += _shown_version(before["version"], before["hash"]) if before else [None, None]
    remember(state["policy_history"], row)


def _shown_version(version: str, policy_hash: str | None) -> list[str | None]:
    return [clipped(version), policy_hash and clipped(policy_hash)]


def _activate_policy(state: State, entry: Entry, at: Moment, body: PolicyActivated) -> None:
    _note_policy(state, entry, at, "activated", body.policy)
    policy_id, version, policy_hash = body.policy.id, body.policy.version, body.policy.hash
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


def _deactivate_policy(state: State, entry: Entry, at: Moment, body: PolicyDeactivated) -> None:
    _note_policy(state, entry, at, "deactivated", body.policy)
    policy_id, version = body.policy.id, body.policy.version
    before = state["active_policies"].get(policy_id)
    if before is None or before["version"] != version:
        state["conflicts"]["policy_not_active"] += 1
        return
    del state["active_policies"][policy_id]
    state["policy_windows"].pop(f"{policy_id}@{version}", None)


def _activate_constitution(
    state: State, entry: Entry, at: Moment, body: ConstitutionActivated
) -> None:
    state["constitution"] = body.constitutional_hash
    state["constitution_changes"] += 1
    row = [entry.seq, entry.recorded_ms, at[0], clipped(body.constitutional_hash)]
    remember(state["constitution_history"], row)


# -- thresholds and mode --------------------------------------------------------------------------


def _change_threshold(state: State, entry: Entry, at: Moment, body: ThresholdChanged) -> None:
    """The first change of a threshold has nothing to match; its `old`, if given, was version 1."""
    scope, level, old = body.scope, body.level, body.old
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
        "value": body.new,
        "version": version + 1,
        "seq": entry.seq,
        "event_id": clipped(entry.id),
        "at_ms": at[0],
        "recorded_ms": entry.recorded_ms,
    }


def _change_mode(state: State, entry: Entry, at: Moment, body: ModeChanged) -> None:
    state["mode_changes"] += 1
    state["mode"] = {
        "mode": body.mode,
        "seq": entry.seq,
        "at_ms": at[0],
        "recorded_ms": entry.recorded_ms,
    }
    if body.learning_paused is not None:
        state["learning_paused"] = body.learning_paused


# -- waivers and agents ---------------------------------------------------------------------------


def _grant_waiver(state: State, entry: Entry, at: Moment, body: WaiverGranted) -> None:
    waivers = state["waivers"]
    state["waivers_granted"] += 1
    key = clipped(body.waiver_id)
    if key not in waivers and len(waivers) >= NAMES_LIMIT:
        _drop_expired(waivers, state["newest_ms"])
    if key not in waivers and len(waivers) >= NAMES_LIMIT:
        note_overflow(state, "waivers")
        return
    waivers[key] = {
        "scope": clipped(body.scope),
        "expires_ms": None if body.expires_at is None else moment(body.expires_at)[0],
        "seq": entry.seq,
        "at_ms": at[0],
    }


def _drop_expired(waivers: dict[str, Any], newest_ms: int) -> None:
    """Makes room: what had expired at the newest time seen is no waiver to anybody."""
    for key, waiver in list(waivers.items()):
        if waiver["expires_ms"] is not None and waiver["expires_ms"] <= newest_ms:
            del waivers[key]


def _revoke_waiver(state: State, _entry: Entry, _at: Moment, body: WaiverRevoked) -> None:
    state["waivers_revoked"] += 1
    if state["waivers"].pop(clipped(body.waiver_id), None) is None:
        state["conflicts"]["waiver_unknown"] += 1


def _assign_role(state: State, _entry: Entry, _at: Moment, _body: Body) -> None:
    state["roles_assigned"] += 1


def _adjust_trust(state: State, _entry: Entry, _at: Moment, _body: Body) -> None:
    state["trust_adjustments"] += 1


_Noter = Callable[[State, "Entry", Moment, Any], None]

_NOTE: Final[dict[type[Body], _Noter]] = {
    PolicyActivated: _activate_policy,
    PolicyDeactivated: _deactivate_policy,
    ConstitutionActivated: _activate_constitution,
    ThresholdChanged: _change_threshold,
    ModeChanged: _change_mode,
    AgentRoleAssigned: _assign_role,
    AgentTrustAdjusted: _adjust_trust,
    WaiverGranted: _grant_waiver,
    WaiverRevoked: _revoke_waiver,
}
