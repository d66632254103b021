"""A tenant's state for `govledger state`: the whole of it as JSON, the gist of it for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import orjson

from ledger.service.render import time_text
from ledger.service.terminal import printable
from ledger.stream import Head
from ledger.wording import counted
from projections import PublishedState
from projections.status import Status

__all__ = ["STATUS_HEADER", "state_json", "state_lines", "status_json", "status_row"]

PAST: Final = "folded"
"""The `source` of a state that was folded as of a point in time."""

STATUS_HEADER: Final = (
    *("tenant", "projection", "readers", "seq", "behind", "seconds", "worker", "quarantined"),
    "stopped",
)


def state_json(found: PublishedState, head: Head) -> dict[str, Any]:
    """The value, the position it was folded to, and how old that is.

    `behind` is how many entries are recorded and not folded, null of the past, and where the ledger
    is of another epoch than the state; `age_seconds` is the time since the last folded entry was
    recorded; `source` is `published`, `committed` where that copy is gone, `folded` for the past.
    """
    return {
        "tenant": found.tenant,
        "projection": found.projection,
        "version": found.version,
        "seq": found.seq,
        "entry_id": found.position.entry_id,
        "epoch": found.position.epoch,
        "recorded_at": _recorded_at(found),
        "age_seconds": round(found.age_seconds, 3),
        "updated_at": None if found.updated_at is None else _ms_text(found.updated_at),
        "head_seq": head.seq,
        "behind": _behind(found, head),
        "source": found.source,
        "stopped": found.stopped,
        "value": found.value,
    }


def state_lines(found: PublishedState, head: Head) -> list[str]:
    """The gist, a line each; a projection that has none here is shown as JSON."""
    lines = [
        f"{found.tenant}: {found.projection}@{found.version}, {_stands(found, head)}",
        f"last entry folded: {_recorded_at(found)}, {_age(found.age_seconds)} ago",
    ]
    if found.projection == "governance":
        return [*lines, *(printable(line) for line in _governance(found.value))]
    shown = orjson.dumps(found.value, option=orjson.OPT_INDENT_2).decode()
    return [*lines, *(printable(line) for line in shown.splitlines())]


def status_json(one: Status) -> dict[str, Any]:
    """One projection of one tenant: `position` is null where nothing is folded."""
    return {
        "tenant": one.tenant,
        "projection": one.projection,
        "version": one.version,
        "standing": one.standing,
        "position": str(one.position) if one.position else None,
        "seq": one.position.seq if one.position else 0,
        "head_seq": one.head_seq,
        "lag_entries": one.lag_entries,
        "lag_seconds": one.lag_seconds,
        "worker": one.worker,
        "quarantined": one.quarantined,
        "stopped": one.stopped,
    }


def status_row(one: Status) -> tuple[object, ...]:
    """The same, as a row below STATUS_HEADER."""
    return (
        one.tenant,
        f"{one.projection}@{one.version}",
        one.standing,
        one.position.seq if one.position else 0,
        one.lag_entries,
        f"{one.lag_seconds:.1f}",
        one.worker,
        one.quarantined,
        one.stopped,
    )


def _stands(found: PublishedState, head: Head) -> str:
    if found.source == PAST:
        return f"as of seq {found.seq}; the ledger is at seq {head.seq}"
    behind = _behind(found, head)
    stands = f"{counted(behind, 'entry')} behind" if behind else "up to date"
    if behind is None:
        stands = "of an earlier epoch of the ledger"
    if found.stopped:
        stands = f"{stands}; stopped: {found.stopped}"
    return f"folded to seq {found.seq}, {stands}"


def _behind(found: PublishedState, head: Head) -> int | None:
    if found.source == PAST or head.epoch != found.position.epoch:
        return None
    return max(0, head.seq - found.seq)


def _ms_text(moment: datetime) -> str:
    return time_text(round(moment.timestamp() * 1000))


def _recorded_at(found: PublishedState) -> str:
    return time_text(int(found.position.entry_id.partition("-")[0]))


def _age(seconds: float) -> str:
    for unit, size_s in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.1f} s"


def _governance(value: dict[str, Any]) -> list[str]:
    rates, effective = _at(value, "rates"), _at(value, "decisions", "by_effective_verdict")
    escalations, counts = _at(value, "escalations"), _at(value, "counts")
    policies = _at(value, "policies", "active").items()
    shown = {
        "decisions": f"{_at(value, 'decisions').get('total', 0)}: "
        + _counted(_at(value, "decisions", "by_verdict")),
        "effective": _counted(effective),
        "deny rate": _rate(_at(rates, "deny")),
        "overrides": f"{_rate(_at(rates, 'override'))} "
        + _counted(_at(value, "overrides", "by_direction")),
        "escalations": f"{escalations.get('pending', 0)} pending of {escalations.get('opened', 0)}",
        "policies": ", ".join(f"{name}@{_at(policy).get('version')}" for name, policy in policies),
        "constitution": _at(value, "constitution").get("active"),
        "mode": _at(value, "mode").get("mode"),
        "irregular": _counted(
            {name: _at(counts, name).get("total") for name in ("orphans", "conflicts", "late")}
            | {"quarantined": counts.get("quarantined")}
        ),
    }
    return [f"{name:<14}{text}".rstrip() for name, text in shown.items() if text]


def _at(value: Any, *path: str) -> dict[str, Any]:
    """The object there, or an empty one: the published copy lies where anybody may write."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _counted(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _rate(rate: dict[str, Any]) -> str:
    share = rate.get("rate")
    of = f"{rate.get('numerator')} of {rate.get('denominator')}"
    return f"{share:.1%} ({of})" if isinstance(share, int | float) else ""
