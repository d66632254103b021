"""An independent fold of governance events, with nothing but dictionaries, sets and whole lists.

It keeps everything and counts at the end, where the projection counts as it goes; so the two agree
only where both are right. `counters` of either gives the numbers that are compared.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
SPANS = {"1h": (MINUTE_MS, 60), "24h": (HOUR_MS, 24), "7d": (HOUR_MS, 168)}
FOLLOW_UPS = {
    "escalation.voted",
    "escalation.resolved",
    "decision.overridden",
    "outcome.reported",
    "feedback.recorded",
}


def at_ms(event, recorded_ms):
    if "at" not in event:
        return recorded_ms
    moment = datetime.fromisoformat(event["at"])
    return int((moment - EPOCH).total_seconds() * 1000 + 0.5)


def reference(entries):
    """The counters of `(recorded_ms, event)` pairs, in order; what is too far ahead is refused."""
    decisions, follow_ups, times, late = {}, [], [], Counter()
    unknown, orphans, windowed, overridden = Counter(), Counter(), [], {}
    refused = events = 0
    changes = []
    for recorded_ms, event in entries:
        kind = event["type"]
        if kind == "from.the.future":
            unknown[kind] += 1
            events += 1
            continue
        ms = at_ms(event, recorded_ms)
        if ms > recorded_ms + 300_000:
            refused += 1
            continue
        events += 1
        times.append(ms)
        if kind == "decision.recorded":
            decisions[event["id"]] = event
            windowed.append((ms, event["verdict"]))
            note_late(late, ms, max(times))
        elif kind in FOLLOW_UPS:
            if event["decision_id"] not in decisions:
                orphans[kind] += 1
                continue
            follow_ups.append(event)
            first = kind == "decision.overridden" and event["decision_id"] not in overridden
            if first:
                overridden[event["decision_id"]] = ms
                windowed.append((ms, "overridden"))
                note_late(late, ms, max(times))
        else:
            changes.append(event)
    newest = max(times, default=None)
    return {
        "events": events,
        "refused": refused,
        "unknown": dict(unknown),
        "orphans": dict(orphans),
        "late": dict(late),
        "windows": {name: in_window(windowed, newest, *SPANS[name]) for name in SPANS},
        **count_decisions(decisions),
        **count_follow_ups(decisions, follow_ups),
        **count_changes(changes),
    }


def note_late(late, ms, newest):
    if ms // MINUTE_MS == newest // MINUTE_MS:
        return
    late["total"] += 1
    for name, (length, span) in SPANS.items():
        if ms // length <= newest // length - span:
            late[name] += 1


def in_window(windowed, newest, length, span):
    if newest is None:
        return {}
    oldest = newest // length - span + 1
    return dict(Counter(what for ms, what in windowed if ms // length >= oldest))


def count_decisions(decisions):
    counts = {"total": len(decisions), "by_impact": Counter(), "by_action": Counter()}
    counts |= {"by_verdict": Counter(), "by_policy": Counter(), "warnings": 0, "violations": 0}
    for event in decisions.values():
        verdict = event["verdict"]
        counts["by_verdict"][verdict] += 1
        counts["by_impact"][event.get("impact_level", "unset"), verdict] += 1
        counts["by_action"][event["action"]["type"], verdict] += 1
        for key in policy_keys(event):
            counts["by_policy"][key, verdict] += 1
        effects = {rule.get("effect") for rule in event.get("rules", [])}
        counts["warnings"] += "warning" in effects
        counts["violations"] += "violation" in effects
    return counts


def policy_keys(event):
    return {f"{policy['id']}@{policy['version']}" for policy in event.get("policies", [])}


def count_follow_ups(decisions, follow_ups):
    state = {
        "resolved": {},
        "effective": {name: event["verdict"] for name, event in decisions.items()},
        "overridden": set(),
        "directions": Counter(),
        "reviewers": Counter(),
        "policies": Counter(),
        "outcomes": Counter(),
        "feedback": {},
        "votes": {},
        "ignored_votes": Counter(),
        "conflicts": Counter(),
    }
    for event in follow_ups:
        APPLY[event["type"]](state, event, decisions[event["decision_id"]])
    matrix, by_policy = Counter(), Counter()
    for (decision_id, _), cell in state["feedback"].items():
        matrix[cell] += 1
        for key in policy_keys(decisions[decision_id]):
            by_policy[key, cell] += 1
    escalated = {name for name, event in decisions.items() if event["verdict"] == "escalate"}
    pending = escalated - set(state["resolved"])
    return {
        "pending": sorted(pending),
        "tallies": {name: tally(state["votes"].get(name, {})) for name in pending},
        "resolved": dict(Counter(state["resolved"].values())),
        "effective": dict(Counter(state["effective"].values())),
        "overridden": len(state["overridden"]),
        "directions": dict(state["directions"]),
        "override_reviewers": dict(state["reviewers"]),
        "override_policies": dict(state["policies"]),
        "outcomes": dict(state["outcomes"]),
        "matrix": dict(matrix),
        "matrix_by_policy": dict(by_policy),
        "with_feedback": len({decision_id for decision_id, _ in state["feedback"]}),
        "ignored_votes": dict(state["ignored_votes"]),
        "conflicts": dict(state["conflicts"]),
    }


def tally(votes):
    return sum(votes.values()), len(votes) - sum(votes.values())


def vote(state, event, decision):
    name = event["decision_id"]
    if decision["verdict"] != "escalate" or name in state["resolved"]:
        state["conflicts"]["vote_not_pending"] += 1
    elif event.get("reviewer_kind") == "advisory":
        state["ignored_votes"]["advisory"] += 1
    elif event["reviewer"] == decision["agent"]["id"]:
        state["ignored_votes"]["own_action"] += 1
    else:
        state["votes"].setdefault(name, {})[event["reviewer"]] = event["approve"]


def resolve(state, event, decision):
    name = event["decision_id"]
    if decision["verdict"] != "escalate" or name in state["resolved"]:
        state["conflicts"]["resolution_not_pending"] += 1
        return
    state["resolved"][name] = event["resolution"]
    if name not in state["overridden"]:
        state["effective"][name] = "allow" if event["resolution"] == "approved" else "deny"


def override(state, event, decision):
    name = event["decision_id"]
    if event["from_verdict"] not in (decision["verdict"], state["effective"][name]):
        state["conflicts"]["override_from_mismatch"] += 1
    state["effective"][name] = event["to_verdict"]
    state["overridden"].add(name)
    state["directions"][f"{event['from_verdict']}→{event['to_verdict']}"] += 1
    state["reviewers"][event["reviewer"]] += 1
    for key in policy_keys(decision):
        state["policies"][key] += 1


def outcome(state, event, _):
    state["outcomes"][event["outcome"]] += 1


def feedback(state, event, decision):
    predicted = decision["verdict"] in ("deny", "escalate")
    if event["feedback"] == "neutral":
        cell = "neutral"
    else:
        if event.get("correct_verdict"):
            actual = event["correct_verdict"] in ("deny", "escalate")
        else:
            actual = predicted if event["feedback"] == "positive" else not predicted
        cell = ("t" if predicted == actual else "f") + ("p" if predicted else "n")
    state["feedback"][event["decision_id"], event["reviewer"]] = cell


APPLY = {
    "escalation.voted": vote,
    "escalation.resolved": resolve,
    "decision.overridden": override,
    "outcome.reported": outcome,
    "feedback.recorded": feedback,
}


def count_changes(changes):
    thresholds, waivers, active, conflicts, mode = {}, set(), {}, Counter(), None
    for event in changes:
        kind = event["type"]
        if kind == "threshold.changed":
            key = (event["scope"], event["level"])
            if key in thresholds and thresholds[key][0] != event.get("old"):
                conflicts["threshold_old_mismatch"] += 1
                continue
            version = thresholds[key][1] if key in thresholds else int("old" in event)
            thresholds[key] = (event["new"], version + 1)
        elif kind == "policy.activated":
            active[event["policy"]["id"]] = event["policy"]["version"]
        elif kind == "policy.deactivated":
            policy = event["policy"]
            if active.get(policy["id"]) == policy["version"]:
                del active[policy["id"]]
            else:
                conflicts["policy_not_active"] += 1
        elif kind == "waiver.granted":
            waivers.add(event["waiver_id"])
        elif kind == "waiver.revoked":
            conflicts["waiver_unknown"] += event["waiver_id"] not in waivers
            waivers.discard(event["waiver_id"])
        elif kind == "mode.changed":
            mode = event["mode"]
    return {
        "thresholds": thresholds,
        "waivers": sorted(waivers),
        "active": active,
        "mode": mode,
        "other_conflicts": {name: count for name, count in conflicts.items() if count},
    }


def published(view, refused):
    """The same counters, read from what the projection publishes."""
    decisions, feedback = view["decisions"], view["feedback"]
    conflicts = {name: n for name, n in view["counts"]["conflicts"].items() if n}
    conflicts.pop("total", None)
    about_follow_ups = ("vote_not_pending", "resolution_not_pending", "override_from_mismatch")
    windows = view["windows"] or {}
    return {
        "events": view["counts"]["events"],
        "refused": refused,
        "unknown": view["counts"]["unknown_types"],
        "orphans": without(view["counts"]["orphans"], "total"),
        "late": positive(view["counts"]["late"]),
        "windows": {
            name: without(windows.get(name, {}), "decisions", "warnings", "violations")
            for name in SPANS
        },
        "total": decisions["total"],
        "by_verdict": positive(decisions["by_verdict"]),
        "by_impact": crossed(decisions["by_impact_level"]),
        "by_action": crossed(decisions["by_action_type"]),
        "by_policy": crossed(decisions["by_policy"]),
        "warnings": decisions["warnings"],
        "violations": decisions["violations"],
        "pending": sorted(row["decision_id"] for row in view["escalations"]["oldest"]),
        "tallies": {
            row["decision_id"]: (row["approvals"], row["rejections"])
            for row in view["escalations"]["oldest"]
        },
        "resolved": positive(view["escalations"]["resolved"]),
        "effective": positive(decisions["by_effective_verdict"]),
        "overridden": decisions["overridden"],
        "directions": view["overrides"]["by_direction"],
        "override_reviewers": view["overrides"]["by_reviewer"],
        "override_policies": view["overrides"]["by_policy"],
        "outcomes": without(view["outcomes"], "total"),
        "matrix": {cell: n for cell in CELLS if (n := feedback["overall"][cell])},
        "matrix_by_policy": {
            (name, cell): n
            for name, matrix in feedback["by_policy"].items()
            for cell in CELLS
            if (n := matrix[cell])
        },
        "with_feedback": feedback["overall"]["decisions"],
        "ignored_votes": without(view["escalations"]["votes"], "approve", "reject"),
        "conflicts": {name: n for name, n in conflicts.items() if name in about_follow_ups},
        "thresholds": {
            (row["scope"], row["level"]): (row["value"], row["version"])
            for row in view["thresholds"]["current"]
        },
        "waivers": sorted(row["waiver_id"] for row in view["waivers"]["oldest"]),
        "active": {name: row["version"] for name, row in view["policies"]["active"].items()},
        "mode": view["mode"]["mode"],
        "other_conflicts": {n: c for n, c in conflicts.items() if n not in about_follow_ups},
    }


CELLS = ("tp", "fp", "tn", "fn", "neutral")


def positive(counts):
    return {name: count for name, count in counts.items() if count}


def without(counts, *names):
    left = {name: count for name, count in counts.items() if name not in names}
    return {name: count for name, count in left.items() if isinstance(count, int) and count}


def crossed(cells):
    verdicts = ("allow", "deny", "escalate", "transform", "abstain", "error")
    return {
        (name, verdict): cell[verdict]
        for name, cell in cells.items()
        for verdict in verdicts
        if cell[verdict]
    }
