"""An independent fold of agents' events, with nothing but dictionaries, lists and exact decimals.

It keeps all that an agent did and counts at the end, where the projection counts as it goes.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

from tests.governance_reference import at_ms

LOSS = {"critical": "0.20", "high": "0.10", "medium": "0.05", "low": "0.02"}
SEVERITY_ORDER = ("critical", "high", "medium", "low")
VERDICTS = ("allow", "deny", "escalate", "transform", "abstain", "error")


def reference(entries):
    """By agent what `published` reads; `(recorded_ms, event)` pairs, in order, seq from 1."""
    deeds = {}
    for seq, (recorded_ms, event) in enumerate(entries, 1):
        if "agent" not in event:
            continue
        ms = at_ms(event, recorded_ms)
        if ms <= recorded_ms + 300_000:
            deeds.setdefault(event["agent"]["id"], []).append((seq, ms, event))
    return {name: counted(rows) for name, rows in deeds.items()}


def counted(rows):
    decisions = [event for _, _, event in rows if event["type"] == "decision.recorded"]
    roles = [event["role"] for _, _, event in rows if event["type"] == "agent.role_assigned"]
    claimed = [event["agent"].get("maci_role") for event in decisions]
    latest = decisions[-100:]
    return {
        "role": roles[-1] if roles else None,
        "maci_role": next((role for role in reversed(claimed) if role), None),
        "by_verdict": dict(Counter(event["verdict"] for event in decisions)),
        "warnings": sum("warning" in effects(event) for event in decisions),
        "severities": dict(Counter(filter(None, map(gravest, decisions)))),
        "recent": {
            "decisions": len(latest),
            "deny": sum(event["verdict"] == "deny" for event in latest),
            "escalate": sum(event["verdict"] == "escalate" for event in latest),
            "warning": sum("warning" in effects(event) for event in latest),
            "violation": sum("violation" in effects(event) for event in latest),
        },
        "consecutive_denials": streak([event["verdict"] for event in decisions]),
        "trust": float(trust([event for _, _, event in rows])),
        "adjustments": sum(event["type"] == "agent.trust_adjusted" for _, _, event in rows),
        "first_seq": rows[0][0],
        "last_seq": rows[-1][0],
        "last_ms": max(ms for _, ms, _ in rows),
    }


def effects(event):
    return {rule.get("effect") for rule in event.get("rules", [])}


def gravest(event):
    found = [
        severity if (severity := rule.get("severity")) in LOSS else "high"
        for rule in event.get("rules", [])
        if rule.get("effect") == "violation"
    ]
    return min(found, key=SEVERITY_ORDER.index, default=None)


def streak(verdicts):
    length = 0
    while length < len(verdicts) and verdicts[-1 - length] == "deny":
        length += 1
    return length


def trust(events):
    score = Decimal(1)
    for event in events:
        if event["type"] == "agent.trust_adjusted":
            score += Decimal(str(event["delta"]))
        elif event["type"] == "decision.recorded":
            if gravest(event):
                score -= Decimal(LOSS[gravest(event)])
            elif event["verdict"] in ("allow", "transform"):
                score += Decimal("0.01")
        score = max(Decimal(0), min(score, Decimal(1)))
    return score


def published(view):
    """The same of one agent, read from what the projection publishes."""
    decisions, recent = view["decisions"], view["recent"]
    return {
        "role": view["role"],
        "maci_role": view["maci_role"],
        "by_verdict": {name: n for name, n in decisions["by_verdict"].items() if n},
        "warnings": decisions["warnings"],
        "severities": {n: c for n, c in decisions["violations_by_severity"].items() if c},
        "recent": {
            "decisions": recent["decisions"],
            **{name: rate["numerator"] for name, rate in recent["rates"].items()},
        },
        "consecutive_denials": view["consecutive_denials"],
        "trust": view["trust"]["score"],
        "adjustments": view["trust"]["adjustments"],
        "first_seq": view["first_seq"],
        "last_seq": view["last_seen"]["seq"],
        "last_ms": at_ms(view["last_seen"], 0),
    }
