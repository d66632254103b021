"""An independent fold of governance events, with nothing but dictionaries, sets and whole lists.

It keeps everything and counts at the end, where the projection counts as it goes; so the two agree
only where both are right. `reference` has the bounds of what is kept, `expected` those of what is
shown too; `published` reads the same numbers from what the projection publishes.
"""

from __future__ import annotations

import json
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
NAMES, NAME_BYTES, OTHER = 256, 128, "other"
PENDING, RECENT, LISTED = 1_000, 100, 50


class Names:
    """The first names that fit, in the order in which they are counted; the rest are `other`."""

    def __init__(self):
        self.kept = {}

    def keep(self, name):
        if len(self.kept) < NAMES and name != OTHER and is_short(name):
            self.kept[name] = None
        return self.shown(name)

    def shown(self, name):
        return name if name in self.kept else OTHER


def is_short(name):
    return len(json.dumps(name, ensure_ascii=False).encode()) - 2 <= NAME_BYTES


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
    changes, types = [], Names()
    for recorded_ms, event in entries:
        kind = event["type"]
        if kind.startswith("from.the.future"):
            unknown[types.keep(kind)] += 1
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
            changes.append((event, max(times)))
    newest = max(times, default=None)
    policies, actions = Names(), Names()
    counted = {
        "events": events,
        "refused": refused,
        "unknown": dict(unknown),
        "orphans": dict(orphans),
        "late": dict(late),
        "windows": {name: in_window(windowed, newest, *SPANS[name]) for name in SPANS},
        "recent": list(decisions)[::-1][:RECENT],
        **count_decisions(decisions, policies, actions),
        **count_follow_ups(decisions, follow_ups, policies),
        **count_changes(changes),
        "listed": listed_pending(entries, decisions, follow_ups),
    }
    counted["weights"] = weigh(decisions, overridden, counted.pop("given"), policies, actions)
    return counted


def weigh(decisions, overridden, given, policies, actions):
    """By dimension how much each name counts, in all the columns that its cells have."""
    by_action, by_policy, in_matrix = Counter(), Counter(), Counter()
    for name, event in decisions.items():
        effects = {rule.get("effect") for rule in event.get("rules", [])} & {"warning", "violation"}
        weight = 1 + len(effects) + (name in overridden)
        by_action[actions.shown(event["action"]["type"])] += weight
        for policy in {policies.shown(one) for one in policy_names(event)}:
            by_policy[policy] += weight
            if given.get(name):
                in_matrix[policy] += 1 + len(given[name])
    return {"by_action": by_action, "by_policy": by_policy, "matrix_by_policy": in_matrix}


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


def count_decisions(decisions, policies, actions):
    counts = {"total": len(decisions), "by_impact": Counter(), "by_action": Counter()}
    counts |= {"by_verdict": Counter(), "by_policy": Counter(), "warnings": 0, "violations": 0}
    for event in decisions.values():
        verdict = event["verdict"]
        counts["by_verdict"][verdict] += 1
        counts["by_impact"][event.get("impact_level", "unset"), verdict] += 1
        counts["by_action"][actions.keep(event["action"]["type"]), verdict] += 1
        for key in {policies.keep(name): None for name in policy_names(event)}:
            counts["by_policy"][key, verdict] += 1
        effects = {rule.get("effect") for rule in event.get("rules", [])}
        counts["warnings"] += "warning" in effects
        counts["violations"] += "violation" in effects
    return counts


def policy_names(event):
    return [f"{policy['id']}@{policy['version']}" for policy in event.get("policies", [])]


def count_follow_ups(decisions, follow_ups, policies):
    state = {
        "policy_keys": lambda event: {policies.shown(name) for name in policy_names(event)},
        "reviewer_names": Names(),
        "resolved": {},
        "effective": {name: event["verdict"] for name, event in decisions.items()},
        "overridden": set(),
        "directions": Counter(),
        "reviewers": Counter(),
        "policies": Counter(),
        "outcomes": Counter(),
        "feedback": {},
        "given": {},
        "votes": {},
        "ignored_votes": Counter(),
        "conflicts": Counter(),
    }
    for event in follow_ups:
        APPLY[event["type"]](state, event, decisions[event["decision_id"]])
    matrix, by_policy = Counter(), Counter()
    for (decision_id, _), cell in state["feedback"].items():
        matrix[cell] += 1
        for key in state["policy_keys"](decisions[decision_id]):
            by_policy[key, cell] += 1
    escalated = {name for name, event in decisions.items() if event["verdict"] == "escalate"}
    pending = escalated - set(state["resolved"])
    return {
        "pending": pending,
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
        "given": state["given"],
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
        votes = state["votes"].setdefault(name, {})
        if event["reviewer"] in votes or len(votes) < NAMES:
            votes[event["reviewer"]] = event["approve"]


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
    state["reviewers"][state["reviewer_names"].keep(event["reviewer"])] += 1
    for key in state["policy_keys"](decision):
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
    given = state["given"].setdefault(event["decision_id"], set())
    if event["reviewer"] in given or len(given) < NAMES:
        given.add(event["reviewer"])
        state["feedback"][event["decision_id"], event["reviewer"]] = cell


APPLY = {
    "escalation.voted": vote,
    "escalation.resolved": resolve,
    "decision.overridden": override,
    "outcome.reported": outcome,
    "feedback.recorded": feedback,
}


def count_changes(changes):
    state = {
        "thresholds": {},
        "waivers": {},
        "active": {},
        "history": [],
        "constitutions": [],
        "mode": None,
        "conflicts": Counter(),
    }
    for event, newest_ms in changes:
        if event["type"] in CHANGE:
            CHANGE[event["type"]](state, event, newest_ms)
    return {
        "thresholds": state["thresholds"],
        "waivers": list(state["waivers"]),
        "active": {name: policy["version"] for name, policy in state["active"].items()},
        "policy_history": state["history"][::-1][:LISTED],
        "constitutions": state["constitutions"][::-1][:LISTED],
        "mode": state["mode"],
        "other_conflicts": {name: count for name, count in state["conflicts"].items() if count},
    }


def change_threshold(state, event, _):
    key, thresholds = (event["scope"], event["level"]), state["thresholds"]
    if key in thresholds and thresholds[key][0] != event.get("old"):
        state["conflicts"]["threshold_old_mismatch"] += 1
    elif key in thresholds or len(thresholds) < NAMES:
        version = thresholds[key][1] if key in thresholds else int("old" in event)
        thresholds[key] = (event["new"], version + 1)


def activate(state, event, _):
    policy, active = event["policy"], state["active"]
    name = policy["id"]
    state["history"].append(("activated", name))
    if active.get(name) != policy and (name in active or len(active) < NAMES):
        active.pop(name, None)  # a new version is the latest one
        active[name] = policy


def deactivate(state, event, _):
    policy, active = event["policy"], state["active"]
    state["history"].append(("deactivated", policy["id"]))
    if active.get(policy["id"], {}).get("version") == policy["version"]:
        del active[policy["id"]]
    else:
        state["conflicts"]["policy_not_active"] += 1


def grant(state, event, newest_ms):
    waivers, name, until = state["waivers"], event["waiver_id"], event.get("expires_at")
    if name not in waivers and len(waivers) >= NAMES:
        expired = [one for one, ms in waivers.items() if ms is not None and ms <= newest_ms]
        for one in expired:
            del waivers[one]
    if waivers.pop(name, "none") != "none" or len(waivers) < NAMES:
        waivers[name] = None if until is None else at_ms({"at": until}, 0)


def revoke(state, event, _):
    state["conflicts"]["waiver_unknown"] += event["waiver_id"] not in state["waivers"]
    state["waivers"].pop(event["waiver_id"], None)


CHANGE = {
    "threshold.changed": change_threshold,
    "policy.activated": activate,
    "policy.deactivated": deactivate,
    "waiver.granted": grant,
    "waiver.revoked": revoke,
    "mode.changed": lambda state, event, _: state.update(mode=event["mode"]),
    "constitution.activated": lambda state, event, _: state["constitutions"].append(
        event["constitutional_hash"]
    ),
}


def listed_pending(entries, decisions, follow_ups):
    """The ids of pending escalations that are listed, the oldest first: one is while there is room
    and none is unlisted.
    """
    listed, unlisted, counts = {}, set(), {id(event) for event in follow_ups}
    for _, event in entries:
        name = event.get("decision_id")
        if event is decisions.get(event["id"]) and event["verdict"] == "escalate":
            if unlisted or len(listed) >= PENDING:
                unlisted.add(event["id"])
            else:
                listed[event["id"]] = None
        elif event["type"] == "escalation.resolved" and id(event) in counts:
            listed.pop(name, None)
            unlisted.discard(name)
    return list(listed)


# -- what is shown --------------------------------------------------------------------------------


def expected(entries, view):
    """The reference's counters, cut to what a view of so many bytes may show of them.

    How many names and pending escalations fit is the view's to say; that the ones that count most
    are shown, or the oldest, or the latest, and all the others as `other`, is said here.
    """
    counters, shown = reference(entries), view["bounds"]["names_shown"]
    listed = len(view["escalations"]["oldest"])
    assert listed >= min(LISTED, shown, len(counters["listed"]))
    counters["pending"] = len(counters["pending"])
    counters["listed"] = counters["listed"][:listed]
    counters["tallies"] = {name: counters["tallies"][name] for name in counters["listed"]}
    counters["recent"] = counters["recent"][:shown]
    for name in ("policy_history", "constitutions"):
        counters[name] = counters[name][:shown]
    counters["waivers"] = counters["waivers"][:shown]
    counters["active"] = dict(list(counters["active"].items())[:shown])
    by_text = sorted(counters["thresholds"], key=lambda key: json.dumps(key, separators=(",", ":")))
    counters["thresholds"] = {key: counters["thresholds"][key] for key in by_text[:shown]}
    for name in ("unknown", "override_reviewers", "override_policies"):
        counters[name] = most(counters[name], counters[name], shown)
    for name, weights in counters.pop("weights").items():
        counters[name] = most(counters[name], weights, shown)
    return counters


def most(counts, weights, shown):
    """The names that weigh most, the others added up in `other`."""
    if len(weights) <= shown + 1:
        return counts
    named = sorted((name for name in weights if name != OTHER), key=lambda n: (-weights[n], n))
    kept, left = set(named[:shown]), Counter()
    for key, count in counts.items():
        name, *column = key if isinstance(key, tuple) else (key,)
        name = name if name in kept else OTHER
        left[(name, *column) if column else name] += count
    return dict(left)


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
        "recent": [row["id"] for row in view["recent"]],
        "pending": view["escalations"]["pending"],
        "listed": [row["decision_id"] for row in view["escalations"]["oldest"]],
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
        "waivers": [row["waiver_id"] for row in view["waivers"]["oldest"]],
        "policy_history": [(row["change"], row["id"]) for row in view["policies"]["history"]],
        "constitutions": [row["constitutional_hash"] for row in view["constitution"]["history"]],
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
