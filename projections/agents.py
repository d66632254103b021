"""The `agents` projection: what each agent of a tenant did, and how far it is trusted.

Entities: `agent:<id>`, one an agent, made by the first event that names it, and `state`, which sums
them up. Only the agents that a page names are loaded, and only those are committed and published,
each under a key of its own: what one costs does not depend on how many there are.

- A decision counts by its verdict, and once as one with a warning and as one with a violation.
- The last hundred decisions are kept, a letter each: rates over them are exact.
- Denials are consecutive until a decision with another verdict.
- Trust is `TRUST` below. A decision moves it once: down by its gravest violation, whatever the
  verdict; up where nothing was violated and the agent was let through (allow, transform). What was
  denied, escalated or undecided without a violation leaves it as it is.
- A role is what the latest `agent.role_assigned` says; `maci_role` what the latest decision
  that names one says.
- What people make of a decision later does not change what its agent did: `governance` has that.
- Times are refused as in `governance`; the latest `at` is when an agent was last seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ledger import keys
from ledger.stream import split_id
from projections.bodies import (
    DECISION,
    AgentRoleAssigned,
    AgentTrustAdjusted,
    Decision,
    read,
)
from projections.governance_decision import decided_at
from projections.governance_state import (
    FUTURE_LIMIT_MS,
    NEVER_MS,
    VERDICT_COLUMN,
    VERDICTS,
    clipped,
    ms_of,
)
from projections.governance_view import rate
from projections.projection import STATE, Entities, Unfoldable
from projections.windows import time_text

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["TRUST", "Agents", "Trust", "agent_name", "tier_of"]

AGENT_PREFIX: Final = "agent:"
RECENT_LIMIT: Final = 100
_MILLION: Final = 1_000_000


class Trust(NamedTuple):
    """How trust moves, in millionths, so that sums are exact: 1.0 is 1,000,000.

    Source: the constants that ACGS-lite's trust scores use; a violation without one of its four
    severities counts as `high`, the default of its rules.
    """

    start: int = _MILLION
    compliant: int = 10_000
    critical: int = -200_000
    high: int = -100_000
    medium: int = -50_000
    low: int = -20_000
    trusted_from: int = 800_000
    monitored_from: int = 500_000


TRUST: Final = Trust()
SEVERITIES: Final = ("critical", "high", "medium", "low")
TIERS: Final = ("trusted", "monitored", "restricted")
_DEFAULT_SEVERITY: Final = SEVERITIES.index("high")
_SEVERITY: Final[dict[str | None, int]] = {name: n for n, name in enumerate(SEVERITIES)}
_LOSS: Final = tuple(getattr(TRUST, name) for name in SEVERITIES)
_LET_THROUGH: Final = (VERDICT_COLUMN["allow"], VERDICT_COLUMN["transform"])
_DENY: Final = VERDICT_COLUMN["deny"]

_WARNING, _VIOLATION = 1, 2
_EFFECT: Final = {"match": 0, "warning": _WARNING, "violation": _VIOLATION}
_LETTERS: Final = "abcdefghijklmnopqrstuvwx"
"""By verdict and effects: four letters a verdict, of which the last two say that it violated."""
_DENY_LETTERS: Final = _LETTERS[4 * _DENY : 4 * _DENY + 4]

_NAMING: Final = (DECISION, b"agent.role_assigned", b"agent.trust_adjusted")

Agent = dict[str, Any]


def agent_name(agent_id: str) -> str:
    """The agent's entity."""
    return AGENT_PREFIX + agent_id


def tier_of(trust: int) -> str:
    """The tier of a trust in millionths."""
    if trust >= TRUST.trusted_from:
        return TIERS[0]
    return TIERS[1] if trust >= TRUST.monitored_from else TIERS[2]


def _new_state() -> Agent:
    return {
        "agents": 0,
        "decisions": 0,
        "roles_assigned": 0,
        "trust_adjustments": 0,
        "tiers": dict.fromkeys(TIERS, 0),
        "quarantined": 0,
    }


def _new_agent(entry: Entry) -> Agent:
    return {
        "verdicts": [0] * len(VERDICTS),
        "warnings": 0,
        "violations": [0] * len(SEVERITIES),
        "recent": "",
        "denials": 0,
        "trust": TRUST.start,
        "adjustments": 0,
        "role": None,
        "maci_role": None,
        "first_seq": entry.seq,
        "last_entry": entry.entry_id,
        "last_ms": NEVER_MS,
    }


class Agents:
    """Folds what each agent did; the module's docstring says how."""

    name = "agents"
    version = 1
    naming = _NAMING
    wants_subjects = False

    def names(self, entry: Entry) -> tuple[str, ...]:
        """The agent that acted, or that the event is about."""
        if entry.raw_fields[1] not in _NAMING:
            return ()
        body = entry.memo or read(entry)
        return (AGENT_PREFIX + body.agent.id,)

    def apply(self, entities: Entities, entry: Entry, subject: Entry | None) -> None:  # noqa: ARG002 - the protocol
        """Folds the entry.

        Raises:
            Unfoldable: a time in it is none, or lies ahead of the ledger's.
        """
        state = entities[STATE] if STATE in entities else _new_state()
        refused = _fold(state, entities, [entry])
        if refused:
            raise Unfoldable(refused[entry.seq])
        entities[STATE] = state

    def apply_all(
        self,
        entities: Entities,
        entries: Sequence[Entry],
        subjects: Sequence[Entry | None],  # noqa: ARG002 - the protocol
    ) -> dict[int, str]:
        """The same for many entries, and counts those that were refused; by seq, why."""
        if STATE not in entities:
            entities[STATE] = _new_state()
        refused = _fold(entities[STATE], entities, entries)
        entities[STATE]["quarantined"] += len(refused)
        return refused

    def quarantined(self, entities: Entities, entry: Entry) -> None:  # noqa: ARG002 - the protocol
        """Counts an entry that was refused."""
        if STATE not in entities:
            entities[STATE] = _new_state()
        entities[STATE]["quarantined"] += 1

    def view(self, state: Agent) -> dict[str, Any]:
        """What is published for all agents together; a dozen numbers."""
        return dict(state or _new_state())

    def entity_key(self, tenant: str, name: str) -> str | None:
        """The key of an agent's own copy."""
        if not name.startswith(AGENT_PREFIX):
            return None
        return keys.agent_state(tenant, name.removeprefix(AGENT_PREFIX))

    def entity_view(self, name: str, entity: Agent) -> dict[str, Any]:
        """What is published of an agent; below 8 KiB of JSON, whatever its id and roles."""
        return _view(name.removeprefix(AGENT_PREFIX), entity)


# -- folding --------------------------------------------------------------------------------------


class _Met:
    """An agent that a page names, with what is noted once for all of the page's decisions."""

    __slots__ = ("agent", "last", "last_ms", "letters", "tier_before")

    def __init__(self, agent: Agent, tier_before: str | None) -> None:
        self.agent = agent
        self.tier_before = tier_before
        self.letters = ""
        self.last: Entry | None = None
        self.last_ms: int = agent["last_ms"]


def _fold(state: Agent, entities: Entities, entries: Sequence[Entry]) -> dict[int, str]:
    refused: dict[int, str] = {}
    clock_ms = entries[0].recorded_ms + FUTURE_LIMIT_MS if entries else 0
    agents: dict[str, _Met] = {}
    for entry in entries:
        count = _COUNT.get(entry.raw_fields[1])
        if count is None:
            continue
        try:
            body = entry.memo or read(entry)
            ms = _ms_of(entry, body)
        except Unfoldable as error:
            refused[entry.seq] = error.reason
            continue
        # Recorded times never go back, so only what is ahead of the first one has to be held
        # against its own.
        if ms > clock_ms and ms > entry.recorded_ms + FUTURE_LIMIT_MS:
            refused[entry.seq] = "at is more than five minutes ahead of the recorded time"
            continue
        met = agents.get(body.agent.id)
        if met is None:
            met = agents[body.agent.id] = _meet(state, entities, entry, body.agent.id)
        met.last = entry
        if ms > met.last_ms:  # noqa: PLR1730 - a call takes longer
            met.last_ms = ms
        count(state, met, body)
    for met in agents.values():
        _note_last(state, met)
    return refused


def _ms_of(entry: Entry, body: Any) -> int:
    if type(body) is Decision and body.expires_at is not None:
        return decided_at(entry, body)[0]
    return ms_of(entry, body)


def _meet(state: Agent, entities: Entities, entry: Entry, agent_id: str) -> _Met:
    name = agent_name(agent_id)
    if name in entities:
        agent = entities[name]
        return _Met(agent, tier_of(agent["trust"]))
    state["agents"] += 1
    agent = entities[name] = _new_agent(entry)
    return _Met(agent, None)


def _note_last(state: Agent, met: _Met) -> None:
    agent, letters = met.agent, met.letters
    assert met.last is not None
    agent["last_entry"], agent["last_ms"] = met.last.entry_id, met.last_ms
    state["decisions"] += len(letters)
    agent["recent"] = (agent["recent"] + letters)[-RECENT_LIMIT:]
    before_denials = letters.rstrip(_DENY_LETTERS)
    denials = len(letters) - len(before_denials)
    agent["denials"] = denials if before_denials else agent["denials"] + denials
    tiers, tier = state["tiers"], tier_of(agent["trust"])
    if tier != met.tier_before:
        tiers[tier] += 1
        if met.tier_before is not None:
            tiers[met.tier_before] -= 1


def _count_decision(_state: Agent, met: _Met, body: Decision) -> None:
    agent, verdict, role = met.agent, VERDICT_COLUMN[body.verdict], body.agent.maci_role
    effects, gravest = 0, len(SEVERITIES)
    if body.rules:
        for rule in body.rules:
            if rule.effect != "match":
                effects |= _EFFECT[rule.effect]
                if rule.effect == "violation":
                    gravest = min(gravest, _SEVERITY.get(rule.severity, _DEFAULT_SEVERITY))
    agent["verdicts"][verdict] += 1
    met.letters += _LETTERS[4 * verdict + effects]
    if role is not None and role != agent["maci_role"]:
        agent["maci_role"] = clipped(role)
    if effects:
        _count_effects(agent, effects, gravest)
    if effects < _VIOLATION and agent["trust"] < TRUST.start and verdict in _LET_THROUGH:
        _move_trust(agent, TRUST.compliant)


def _count_effects(agent: Agent, effects: int, gravest: int) -> None:
    if effects & _WARNING:
        agent["warnings"] += 1
    if effects & _VIOLATION:
        agent["violations"][gravest] += 1
        _move_trust(agent, _LOSS[gravest])


def _move_trust(agent: Agent, change: int) -> None:
    agent["trust"] = min(max(agent["trust"] + change, 0), TRUST.start)


def _assign_role(state: Agent, met: _Met, body: AgentRoleAssigned) -> None:
    state["roles_assigned"] += 1
    met.agent["role"] = clipped(body.role)


def _adjust_trust(state: Agent, met: _Met, body: AgentTrustAdjusted) -> None:
    state["trust_adjustments"] += 1
    met.agent["adjustments"] += 1
    _move_trust(met.agent, round(max(-1.0, min(body.delta, 1.0)) * _MILLION))


_Counter = Callable[[Agent, _Met, Any], None]

_COUNT: Final[dict[bytes, _Counter]] = {
    DECISION: _count_decision,
    b"agent.role_assigned": _assign_role,
    b"agent.trust_adjusted": _adjust_trust,
}


# -- what is published ----------------------------------------------------------------------------


def _view(agent_id: str, agent: Agent) -> dict[str, Any]:
    verdicts, (recorded_ms, seq) = agent["verdicts"], split_id(agent["last_entry"])
    return {
        "agent": clipped(agent_id),
        "role": agent["role"],
        "maci_role": agent["maci_role"],
        "decisions": {
            "total": sum(verdicts),
            "by_verdict": dict(zip(VERDICTS, verdicts, strict=True)),
            "warnings": agent["warnings"],
            "violations": sum(agent["violations"]),
            "violations_by_severity": dict(zip(SEVERITIES, agent["violations"], strict=True)),
        },
        "recent": _recent(agent["recent"]),
        "consecutive_denials": agent["denials"],
        "trust": {
            "score": agent["trust"] / _MILLION,
            "tier": tier_of(agent["trust"]),
            "adjustments": agent["adjustments"],
        },
        "first_seq": agent["first_seq"],
        "last_seen": {
            "seq": seq,
            "at": time_text(agent["last_ms"]),
            "recorded_at": time_text(recorded_ms),
        },
    }


def _recent(letters: str) -> dict[str, Any]:
    of_verdict = [_count_in(letters, _LETTERS[4 * n : 4 * n + 4]) for n in range(len(VERDICTS))]
    by_verdict = dict(zip(VERDICTS, of_verdict, strict=True))
    counts = {
        "deny": by_verdict["deny"],
        "escalate": by_verdict["escalate"],
        "warning": _count_in(letters, _LETTERS[1::2]),
        "violation": _count_in(letters, _LETTERS[2::4] + _LETTERS[3::4]),
    }
    rates = {name: rate(count, len(letters)) for name, count in counts.items()}
    return {"decisions": len(letters), "by_verdict": by_verdict, "rates": rates}


def _count_in(letters: str, wanted: Iterable[str]) -> int:
    return sum(map(letters.count, wanted))
