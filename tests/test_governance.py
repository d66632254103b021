"""The governance fold: what each event does to state, and what holds for every history."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from random import Random

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.events import event_types
from ledger.stream import Entry
from projections.bodies import BODIES, FollowUp, subject_id
from projections.governance import Governance
from projections.projection import Unfoldable
from tests.governance_reference import expected, published

NOON_MS = 1_793_620_800_000  # 2026-11-02T12:00:00Z
MINUTE_MS = 60_000
DECISION = "decision.recorded"
FOLLOW_UPS = [kind for kind, body in BODIES.items() if issubclass(body, FollowUp)]
FOLLOW_UPS_RAW = {kind.encode() for kind in FOLLOW_UPS}
GOVERNANCE = Governance()
FIXTURES = Path(__file__).parent / "fixtures" / "events-v1.jsonl"


class Fold:
    """A projector without a server: entities are bytes in between the chunks of entries.

    While `watched`, each entry is checked to change nothing but what it named, or nothing at all.
    """

    def __init__(self, chunk=1, *, watched=True):
        self.chunk = chunk
        self.watched = watched
        self.stored = {}
        self.subjects = {}
        self.seq = 0
        self.refused = {}
        self._entities = {}
        self._in_chunk = 0

    def add(self, event, recorded_ms=NOON_MS):
        """Folds one event; its reason where it was refused."""
        self.seq += 1
        event = {"id": f"e-{self.seq}", **event}
        return self.add_entry(Entry.of("acgs-dev", f"{recorded_ms}-{self.seq}", event))

    def add_entry(self, entry):
        names = ["state", *GOVERNANCE.names(entry)]
        for name in names:
            if name not in self._entities and name in self.stored:
                self._entities[name] = orjson.loads(self.stored[name])
        before = dumped(self._entities) if self.watched else {}
        try:
            subject = self.subjects.get(subject_id(entry))
            GOVERNANCE.apply(self._entities, entry, subject)
        except Unfoldable as error:
            assert not self.watched or dumped(self._entities) == before
            self.refused[entry.seq] = error.reason
            GOVERNANCE.quarantined(self._entities, entry)
        if self.watched:
            after = dumped(self._entities)
            assert {name for name in after if before.get(name) != after[name]} <= set(names)
        if entry.type == DECISION:
            self.subjects[entry.id] = entry
        self._in_chunk += 1
        if self._in_chunk >= self.chunk:
            self.flush()
        return self.refused.get(entry.seq)

    def add_page(self, entries):
        """Folds entries at once, as the projector does."""
        self.flush()
        names, subjects = {"state"}, []
        for entry in entries:
            names.update(GOVERNANCE.names(entry) if entry.raw_fields[1] in FOLLOW_UPS_RAW else ())
            subjects.append(self.subjects.get(subject_id(entry)))
            if entry.type == DECISION:
                self.subjects[entry.id] = entry
        known = names & self.stored.keys()
        self._entities = {name: orjson.loads(self.stored[name]) for name in known}
        self.refused |= GOVERNANCE.apply_all(self._entities, entries, subjects)
        assert self._entities.keys() <= names
        self.flush()

    def flush(self):
        self.stored |= dumped(self._entities)
        self._entities = {}
        self._in_chunk = 0
        for subject in self.subjects.values():
            subject.memo = None

    @property
    def state(self):
        self.flush()
        return orjson.loads(self.stored.get("state", b"{}"))

    @property
    def view(self):
        return GOVERNANCE.view(self.state)

    def decision(self, decision_id):
        self.flush()
        return orjson.loads(self.stored[f"decision:{decision_id}"])


def dumped(entities):
    return {
        name: orjson.dumps(entity, option=orjson.OPT_SORT_KEYS) for name, entity in entities.items()
    }


def decision(decision_id="d", verdict="allow", **fields):
    event = {
        "type": "decision.recorded",
        "id": decision_id,
        "agent": {"id": "agent-1"},
        "action": {"type": "mail.send"},
        "verdict": verdict,
    }
    return event | fields


def follow_up(kind, decision_id="d", **fields):
    return {"type": kind, "decision_id": decision_id, **fields}


def policy(name):
    policy_id, _, version = name.partition("@")
    return {"id": policy_id, "version": version}


def folded(*events, recorded_ms=NOON_MS):
    fold = Fold(chunk=1_000_000, watched=False)
    for event in events:
        assert fold.add(event, recorded_ms) is None
    fold.watched = True
    return fold


def at(offset_minutes):
    """`offset_minutes` from noon, as the ledger stores a time."""
    time = datetime(2026, 11, 2, 12, tzinfo=UTC) + timedelta(minutes=offset_minutes)
    return time.isoformat().replace("+00:00", "Z")


# -- decisions ------------------------------------------------------------------------------------


def test_every_type_of_the_ledger_is_folded():
    """No event type that can be recorded counts as unknown."""
    assert set(event_types()) == set(BODIES)


def test_old_fixtures_fold():
    """What any release has recorded can be folded."""
    fold = Fold()
    for line in FIXTURES.read_bytes().splitlines():
        event = orjson.loads(line)
        fold.add(event.get("event", event), recorded_ms=4_000_000_000_000)
    assert fold.refused == {}


def test_decision_counts_in_each_dimension_once():
    """A decision counts by verdict, impact level, action type and each policy that took part."""
    view = folded(
        decision("1", "deny", impact_level="high", policies=[policy("p@1"), policy("q@2")]),
        decision("2", "deny", policies=[policy("p@1"), policy("p@1")]),
        decision("3", "allow", policies=[]),
    ).view
    decisions = view["decisions"]
    assert decisions["total"] == 3
    assert decisions["by_verdict"]["deny"] == 2
    assert decisions["by_impact_level"]["high"]["deny"] == 1
    assert decisions["by_impact_level"]["unset"]["decisions"] == 2
    assert decisions["by_action_type"]["mail.send"]["decisions"] == 3
    assert decisions["by_policy"]["p@1"]["deny"] == 2
    assert decisions["by_policy"]["q@2"]["deny"] == 1


def test_decision_counts_by_policy_action_and_impact_together():
    """A decision counts in one row for each of its policies, and by none in a row of null."""
    table = folded(
        decision("1", "deny", impact_level="high", policies=[policy("p@1"), policy("q@2")]),
        decision("2", "deny", impact_level="high", policies=[policy("p@1"), policy("q@2")]),
        decision("3", impact_level="high", policies=[policy("p@1")]),
        decision("4", policies=[]),
    ).view["decisions"]["by_policy_action_impact"]
    rows = {tuple(row[:3]): row[3:5] for row in table["rows"]}
    assert rows == {
        ("p@1", "mail.send", "high"): [1, 2],
        ("q@2", "mail.send", "high"): [0, 2],
        (None, "mail.send", "unset"): [1, 0],
    }
    assert table["columns"][:5] == ["policy", "action_type", "impact_level", "allow", "deny"]
    assert table["other"]["decisions"] == 0


def test_combinations_are_bounded_and_dimensions_stay_exact():
    """Beyond 256 combinations decisions count as other there, and exactly in each dimension."""
    events = [
        decision(f"{n}-{m}", "deny", action={"type": f"a{n}"}, policies=[policy(f"p{m}@1")])
        for n in range(20)
        for m in range(15)
    ]
    fold = folded(*events, *events[:5])
    view = fold.view
    table = view["decisions"]["by_policy_action_impact"]
    assert len(table["rows"]) == 256
    assert table["other"]["deny"] == 300 - 256
    assert view["bounds"]["overflowed"] == {"combinations": 300 - 256}
    assert {cell["deny"] for cell in view["decisions"]["by_policy"].values()} == {20, 21}
    assert view["decisions"]["by_action_type"]["a0"]["deny"] == 20
    assert view["decisions"]["by_action_type"]["a19"]["deny"] == 15


def test_names_that_could_be_mistaken_for_several_policies_count_apart():
    """A policy whose name holds what stands between policies is itself, and no combination."""
    odd = {"id": "p@1\x00q", "version": "2"}
    table = folded(
        decision("1", policies=[odd]), decision("2", policies=[policy("p@1"), policy("q@2")])
    ).view["decisions"]
    assert {name: cell["decisions"] for name, cell in table["by_policy"].items()} == {
        "p@1\x00q@2": 1, "p@1": 1, "q@2": 1,
    }  # fmt: skip
    assert table["by_policy_action_impact"]["other"]["decisions"] == 1


def test_rates_show_numerator_and_denominator():
    """A rate stands beside what it was made of, and is null over nothing."""
    rules = [{"id": "r", "effect": "violation"}, {"id": "s", "effect": "violation"}]
    fold = folded(decision("1", "deny", rules=rules), decision("2"), decision("3", "escalate"))
    rates = fold.view["rates"]
    assert rates["deny"] == {"rate": 1 / 3, "numerator": 1, "denominator": 3}
    assert rates["violation"]["numerator"] == 1
    assert rates["escalate"]["numerator"] == 1
    assert GOVERNANCE.view({})["rates"]["deny"] == {"rate": None, "numerator": 0, "denominator": 0}


def test_rule_effects_count_a_decision_once():
    """A decision with a warning and a violation counts in both, however many rules hit."""
    rules = [{"id": "a", "effect": "warning"}, {"id": "b", "effect": "violation"}, {"id": "c"}]
    view = folded(decision(rules=rules * 3, policies=[policy("p@1")])).view
    assert (view["decisions"]["warnings"], view["decisions"]["violations"]) == (1, 1)
    assert view["decisions"]["by_policy"]["p@1"]["warnings"] == 1
    assert view["windows"]["1h"]["warnings"] == 1


def test_latency_bounds_are_inclusive():
    """A latency counts in the first bucket whose bound it does not exceed."""
    fold = folded(*(decision(str(ms), latency_ms=ms) for ms in (0, 0.1, 0.11, 10_000, 10_001)))
    latency = fold.view["latency"]
    by_bound = dict(zip([*latency["bounds_ms"], "more"], latency["counts"], strict=True))
    assert latency["count"] == 5
    assert (by_bound[0.1], by_bound[0.25], by_bound[10_000], by_bound["more"]) == (2, 1, 1, 1)


def test_recent_shows_the_last_hundred_newest_first():
    """The ring holds the last hundred decisions, however long the history."""
    fold = folded(*(decision(f"d{n}", policies=[policy("p@1")]) for n in range(250)))
    recent = fold.view["recent"]
    assert [row["id"] for row in recent] == [f"d{n}" for n in range(249, 149, -1)]
    assert recent[0] == {
        "seq": 250,
        "id": "d249",
        "at": "2026-11-02T12:00:00.000Z",
        "verdict": "allow",
        "agent": "agent-1",
        "action": "mail.send",
        "policy": "p@1",
    }


def test_unknown_type_is_counted():
    """A newer writer's event is counted by its type, and nothing else changes."""
    view = folded({"type": "weather.reported", "wind": 3}).view
    assert view["counts"]["unknown_types"] == {"weather.reported": 1}
    assert (view["decisions"]["total"], view["windows"]) == (0, None)


# -- windows --------------------------------------------------------------------------------------


def test_windows_go_by_event_time():
    """A window counts the decisions of its buckets, up to the newest time seen."""
    fold = folded(
        decision("week", at=at(-6 * 24 * 60)),
        decision("day", "deny", at=at(-23 * 60)),
        decision("hour", at=at(-59)),
        decision("now", "deny", at=at(0)),
    )
    windows = fold.view["windows"]
    assert [windows[name]["decisions"] for name in ("1h", "24h", "7d")] == [2, 3, 4]
    assert windows["24h"]["rates"]["deny"] == {"rate": 2 / 3, "numerator": 2, "denominator": 3}
    assert windows["1h"]["since"] == "2026-11-02T11:01:00.000Z"
    assert windows["newest_at"] == "2026-11-02T12:00:00.000Z"


def test_windows_forget_what_is_too_old():
    """When the newest time moves on, what fell out of a window is not counted there any more."""
    fold = folded(decision("old", at=at(-61)), decision("new", at=at(0)))
    assert fold.view["windows"]["1h"]["decisions"] == 1
    fold.add({"type": "mode.changed", "mode": "strict", "at": at(60)}, NOON_MS + 60 * MINUTE_MS)
    assert fold.view["windows"]["1h"]["decisions"] == 0
    assert fold.view["windows"]["24h"]["decisions"] == 2


def test_late_decision_counts_where_its_bucket_still_is():
    """A late decision counts in totals, in windows that still reach it, and in `late`."""
    fold = folded(decision("now", at=at(0)), decision("late", at=at(-90)))
    view = fold.view
    assert view["decisions"]["total"] == 2
    assert [view["windows"][name]["decisions"] for name in ("1h", "24h")] == [1, 2]
    assert view["counts"]["late"] == {"total": 1, "1h": 1, "24h": 0, "7d": 0}


@pytest.mark.parametrize("minutes", [60, 61, 118, 7 * 24 * 60])
def test_late_decision_leaves_newer_buckets_alone(minutes):
    """What is too late for a window does not take the place of what is in it."""
    fold = folded(*(decision(f"n{n}", at=at(-n)) for n in range(3)))
    fold.add(decision("late", at=at(-minutes)))
    windows = fold.view["windows"]
    assert windows["1h"]["decisions"] == 3
    assert windows["7d"]["decisions"] == 3 + (minutes < 7 * 24 * 60)


def test_same_minute_is_not_late():
    """Engines need not be in order within a minute: late begins with the minute before."""
    fold = folded(decision("1", at=at(0).replace(":00Z", ":50Z")), decision("2", at=at(0)))
    assert fold.view["counts"]["late"]["total"] == 0
    fold.add(decision("3", at=at(-1).replace(":00Z", ":59Z")))
    assert fold.view["counts"]["late"] == {"total": 1, "1h": 0, "24h": 0, "7d": 0}


def test_buckets_add_up_to_windows():
    """A reader that sums the published buckets gets the published windows."""
    fold = folded(*(decision(str(n), at=at(-7 * n)) for n in range(40)))
    windows = fold.view["windows"]
    column = windows["buckets"]["columns"].index("allow")
    assert sum(row[column] for row in windows["buckets"]["minutes"]) == windows["1h"]["allow"]
    assert sum(row[column] for row in windows["buckets"]["hours"]) == windows["7d"]["allow"] == 40


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2026-11-02T12:00:00Z", NOON_MS),
        ("2026-11-02T11:59:59.123456Z", NOON_MS - 877),
        ("2026-11-02T11:59:59.9Z", NOON_MS - 100),
        ("2026-11-02T11:00:00Z", NOON_MS - 60 * MINUTE_MS),
        ("0001-01-01T00:00:00Z", -62_135_596_800_000),
        ("1969-12-31T23:59:59.999Z", -1),
        (None, NOON_MS),
    ],
)
def test_at_is_read_to_the_millisecond(text, ms):
    """The time of a decision is its `at`, or the ledger's where it has none."""
    fold = folded(decision(at=text) if text else decision())
    assert fold.state["newest_ms"] == ms


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "2026-11-02", "2026-11-02T12:00Z", "2026-11-02T12:00:00", 17, True, [], {}),
        *("2026-13-02T12:00:00Z", "2026-11-02T12:00:60Z", "2026-11-02T12:00:00+00:00"),
        *("2026-11-02T24:00:00Z", "2026-11-02T12:60:00Z", "0000-11-02T12:00:00Z"),
        *("2026-11-02T12:00:60.5Z", "2026-11-02T12:00:0.5Z", "2026-11-02T12:00:5Z"),
        *("2026-11-02T12:00:00.Z", "2026-11-02T12:00:00.1234567890Z", "2026-11-02t12:00:00z"),
        *("2026-11-02T12:00:00Z\n", "٢٠٢٦-11-02T12:00:00Z", "2026-11-02T12:00:00.٣Z"),
    ],
)
def test_time_that_is_none_is_refused(text):
    """An `at` that is not RFC 3339 in UTC cannot be folded."""
    assert Fold().add(decision(at=text))


def test_at_ahead_of_the_ledger_is_refused():
    """Five minutes ahead of the recorded time is folded; a millisecond more is not."""
    fold = Fold()
    assert fold.add(decision("1", at="2026-11-02T12:05:00Z")) is None
    assert "ahead" in fold.add(decision("2", at="2026-11-02T12:05:00.001Z"))
    assert fold.add(decision("3", at="2026-11-02T12:05:00.001Z"), NOON_MS + 1) is None
    assert fold.view["counts"]["quarantined"] == 1


# -- policies and the rest of what governs --------------------------------------------------------


def activated(name, **fields):
    return {"type": "policy.activated", "policy": policy(name) | fields}


def test_policy_version_begins_with_fresh_windows():
    """A new version's counters and windows hold only its own decisions."""
    fold = folded(
        activated("p@1"),
        decision("1", "deny", policies=[policy("p@1")]),
        activated("p@2", hash="h2"),
        decision("2", "allow", policies=[policy("p@2")]),
        decision("3", "deny", policies=[policy("p@1")]),
    )
    policies = fold.view["policies"]
    assert policies["active_count"] == 1
    active = policies["active"]["p"]
    assert (active["version"], active["hash"], active["seq"]) == ("2", "h2", 3)
    assert (active["windows"]["24h"]["allow"], active["windows"]["24h"]["deny"]) == (1, 0)
    assert [row["version"] for row in policies["history"]] == ["2", "1"]
    assert fold.view["decisions"]["by_policy"]["p@1"]["deny"] == 2


def test_policy_that_is_announced_again_keeps_its_windows():
    """Activating what is active changes nothing but the history; another hash is a fresh start."""
    fold = folded(activated("p@1"), decision("1", policies=[policy("p@1")]), activated("p@1"))
    assert fold.view["policies"]["active"]["p"]["windows"]["7d"]["decisions"] == 1
    fold.add(activated("p@1", hash="other"))
    assert fold.view["policies"]["active"]["p"]["windows"]["7d"]["decisions"] == 0


def test_policy_deactivated():
    """The active version is taken out; a version that is not active is a conflict."""
    off = {"type": "policy.deactivated", "policy": policy("p@1")}
    fold = folded(activated("p@1"), {**off, "policy": policy("p@2")}, off, off)
    view = fold.view
    assert view["policies"]["active"] == {}
    assert view["counts"]["conflicts"]["policy_not_active"] == 2
    assert [row["change"] for row in view["policies"]["history"]][:2] == ["deactivated"] * 2
    assert fold.state["policy_windows"] == {}


def test_constitution_mismatches_are_counted():
    """Decisions that name another constitution than the active one count, and are folded."""
    fold = folded(
        decision("0", constitutional_hash="c0"),
        {"type": "constitution.activated", "constitutional_hash": "c1"},
        decision("1", constitutional_hash="c1"),
        decision("2", constitutional_hash="c0"),
        decision("3"),
    )
    constitution = fold.view["constitution"]
    assert (constitution["active"], constitution["mismatched_decisions"]) == ("c1", 1)
    assert fold.view["decisions"]["total"] == 4


def threshold(old, new, **fields):
    change = {"type": "threshold.changed", "scope": "p", "level": "high", "new": new, **fields}
    return change if old is None else {**change, "old": old}


def test_threshold_moves_only_from_its_value():
    """A change whose `old` is not the current value is a conflict and changes nothing."""
    fold = folded(threshold(0.6, 0.5), threshold(0.6, 0.4), threshold(0.5, 0.3, id="set-it"))
    thresholds = fold.view["thresholds"]
    (row,) = thresholds["current"]
    assert (row["value"], row["version"], row["event_id"], row["seq"]) == (0.3, 3, "set-it", 3)
    assert (thresholds["count"], thresholds["changes"]) == (1, 2)
    assert fold.view["counts"]["conflicts"]["threshold_old_mismatch"] == 1


def test_first_threshold_without_old_is_version_one():
    """Where no value was before, the first one is version 1; scopes and levels stand apart."""
    fold = folded(threshold(None, 0.5), threshold(None, 0.7, level="low"), threshold(None, 0.1))
    rows = {row["level"]: row for row in fold.view["thresholds"]["current"]}
    assert (rows["high"]["value"], rows["high"]["version"]) == (0.5, 1)
    assert rows["low"]["value"] == 0.7
    assert fold.view["counts"]["conflicts"]["total"] == 1


def test_mode_and_pause():
    """The mode is the latest; a change that says nothing of learning leaves it as it is."""
    fold = folded(
        {"type": "mode.changed", "mode": "adaptive", "learning_paused": True},
        {"type": "mode.changed", "mode": "strict"},
    )
    mode = fold.view["mode"]
    assert (mode["mode"], mode["learning_paused"], mode["changes"]) == ("strict", True, 2)


def test_waivers():
    """A granted waiver is listed with its expiry until it is revoked; an unknown one conflicts."""
    granted = {"type": "waiver.granted", "waiver_id": "w1", "scope": "p"}
    fold = folded(
        {**granted, "expires_at": "2026-12-01T00:00:00Z"},
        {**granted, "waiver_id": "w2"},
        {"type": "waiver.revoked", "waiver_id": "w2"},
        {"type": "waiver.revoked", "waiver_id": "w3"},
    )
    waivers = fold.view["waivers"]
    assert waivers["count"] == 1
    assert waivers["oldest"][0]["expires_at"] == "2026-12-01T00:00:00.000Z"
    assert fold.view["counts"]["conflicts"]["waiver_unknown"] == 1


def test_expired_waivers_make_room():
    """Among 256 waivers those that had expired by event time give way to a new one."""
    granted = {"type": "waiver.granted", "scope": "p"}
    fold = folded(
        *({**granted, "waiver_id": f"w{n}"} for n in range(255)),
        {**granted, "waiver_id": "expired", "expires_at": at(-1)},
        {**granted, "waiver_id": "new"},
        {**granted, "waiver_id": "too many"},
    )
    assert fold.view["waivers"]["count"] == 256
    assert "new" in fold.state["waivers"]
    assert "expired" not in fold.state["waivers"]
    assert fold.view["bounds"]["overflowed"] == {"waivers": 1}


def test_agent_events_are_counted():
    """Roles and trust are counted here; what they mean is another projection's."""
    fold = folded(
        {"type": "agent.role_assigned", "agent": {"id": "a"}, "role": "executive"},
        {"type": "agent.trust_adjusted", "agent": {"id": "a"}, "delta": -0.1},
    )
    assert fold.view["agents"] == {"roles_assigned": 1, "trust_adjustments": 1}


# -- what follows a decision ----------------------------------------------------------------------


def test_escalation_is_pending_until_resolved():
    """An escalated decision is listed with its deadline and closes with its resolution."""
    deadline = "2026-11-02T13:00:00Z"
    fold = folded(decision("e", "escalate", expires_at=deadline, required_approvals=2))
    escalations = fold.view["escalations"]
    assert (escalations["opened"], escalations["pending"]) == (1, 1)
    assert escalations["oldest"][0]["deadline"] == deadline
    assert escalations["oldest"][0]["required_approvals"] == 2
    fold.add(follow_up("escalation.resolved", "e", resolution="approved"))
    escalations = fold.view["escalations"]
    assert (escalations["pending"], escalations["oldest"]) == (0, [])
    assert escalations["resolved"]["approved"] == 1
    assert fold.decision("e") == {"resolution": "approved", "effective_verdict": "allow"}


@pytest.mark.parametrize(
    ("resolution", "verdict"),
    [("approved", "allow"), ("rejected", "deny"), ("expired", "deny"), ("cancelled", "deny")],
)
def test_resolution_sets_the_effective_verdict(resolution, verdict):
    """Only an approval lets the action happen; the engine's own count stays."""
    fold = folded(
        decision("e", "escalate"), follow_up("escalation.resolved", "e", resolution=resolution)
    )
    decisions = fold.view["decisions"]
    assert decisions["by_effective_verdict"][verdict] == 1
    assert decisions["by_effective_verdict"]["escalate"] == 0
    assert decisions["by_verdict"]["escalate"] == 1


def test_pending_shows_its_age_and_what_is_overdue():
    """Age and overdue are those at the newest time seen; what has no deadline is never overdue."""
    fold = folded(
        decision("early", "escalate", at=at(0), expires_at=at(10)),
        decision("late", "escalate", at=at(5), expires_at=at(11)),
        decision("open", "escalate", at=at(9)),
        decision("now", at=at(10)),
        recorded_ms=NOON_MS + 20 * MINUTE_MS,
    )
    escalations = fold.view["escalations"]
    assert [
        (row["decision_id"], row["age_ms"], row["overdue"]) for row in escalations["oldest"]
    ] == [
        ("early", 10 * MINUTE_MS, True),
        ("late", 5 * MINUTE_MS, False),
        ("open", MINUTE_MS, False),
    ]
    assert escalations["overdue"] == 1


def test_pending_that_does_not_fit_is_said():
    """Of a thousand with long names as many are listed as fit, the oldest; the rest are counted."""
    fold = folded(*(decision(f"{n:04}{'x' * 120}", "escalate") for n in range(1_200)))
    escalations = fold.view["escalations"]
    listed = len(escalations["oldest"])
    assert 300 < listed < 1_000
    assert escalations["unlisted"] == 1_200 - listed
    assert escalations["unlisted_from_seq"] == listed + 1
    assert [row["seq"] for row in escalations["oldest"]] == list(range(1, listed + 1))


def test_resolution_of_what_is_not_pending_conflicts():
    """A second resolution, or one of a decision that was not escalated, changes nothing."""
    fold = folded(
        decision("e", "escalate"),
        decision("d"),
        follow_up("escalation.resolved", "e", resolution="rejected"),
        follow_up("escalation.resolved", "e", resolution="approved"),
        follow_up("escalation.resolved", "d", resolution="approved"),
    )
    assert fold.view["counts"]["conflicts"]["resolution_not_pending"] == 2
    assert fold.decision("e")["effective_verdict"] == "deny"
    assert "decision:d" not in fold.stored


def vote(reviewer, approve=True, **fields):
    return follow_up("escalation.voted", "e", reviewer=reviewer, approve=approve, **fields)


def test_one_vote_a_reviewer():
    """The latest vote of each reviewer counts; advisory ones and the agent's own do not."""
    fold = folded(
        decision("e", "escalate"),
        vote("r1"),
        vote("r1", approve=False),
        vote("r2"),
        vote("r3", reviewer_kind="advisory"),
        vote("agent-1"),
    )
    escalations = fold.view["escalations"]
    (row,) = escalations["oldest"]
    assert (row["approvals"], row["rejections"]) == (1, 1)
    assert escalations["votes"] == {"approve": 2, "reject": 1, "advisory": 1, "own_action": 1}


def test_vote_after_the_end_conflicts():
    """A vote on what is not pending changes no tally."""
    fold = folded(
        decision("e", "escalate"),
        follow_up("escalation.resolved", "e", resolution="expired"),
        vote("r1"),
    )
    assert fold.view["counts"]["conflicts"]["vote_not_pending"] == 1
    assert "votes" not in fold.decision("e")


def test_list_of_pending_is_bounded_and_its_overflow_closes():
    """Beyond a thousand, pending escalations are counted, findable by seq, and close the same."""
    fold = folded(*(decision(f"e{n}", "escalate") for n in range(1_003)))
    escalations = fold.view["escalations"]
    assert (escalations["pending"], escalations["unlisted"]) == (1_003, 3)
    assert escalations["unlisted_from_seq"] == 1_001
    assert [row["decision_id"] for row in escalations["oldest"]] == [f"e{n}" for n in range(1_000)]
    fold.add(follow_up("escalation.resolved", "e0", resolution="rejected"))
    fold.add(decision("younger", "escalate"))
    assert fold.view["escalations"]["unlisted"] == 4
    assert "younger" not in fold.state["pending"], "the list holds the oldest ones"
    for name in ("e1000", "e1001", "e1002", "younger"):
        fold.add(follow_up("escalation.resolved", name, resolution="approved"))
    escalations = fold.view["escalations"]
    assert (escalations["pending"], escalations["unlisted"]) == (999, 0)
    assert escalations["unlisted_from_seq"] is None
    fold.add(decision("listed again", "escalate"))
    assert "listed again" in fold.state["pending"]


def override(before, after, decision_id="d", reviewer="r1"):
    return follow_up(
        "decision.overridden",
        decision_id,
        reviewer=reviewer,
        from_verdict=before,
        to_verdict=after,
    )


def test_override_changes_the_effective_verdict_alone():
    """An override counts by direction, policy and reviewer; what the engine said stays."""
    fold = folded(
        decision("d", "deny", policies=[policy("p@1")]),
        override("deny", "allow"),
        override("allow", "deny", reviewer="r2"),
    )
    view = fold.view
    assert view["decisions"]["by_verdict"]["deny"] == 1
    assert view["overrides"] == {
        "events": 2,
        "decisions": 1,
        "by_direction": {"allow→deny": 1, "deny→allow": 1},
        "by_policy": {"p@1": 2},
        "by_reviewer": {"r1": 1, "r2": 1},
    }
    assert view["rates"]["override"] == {"rate": 1.0, "numerator": 1, "denominator": 1}
    assert view["windows"]["1h"]["overridden"] == 1
    assert fold.decision("d") == {"overrides": 2, "effective_verdict": "deny"}


def test_override_from_another_verdict_conflicts_and_counts():
    """`from_verdict` may be the engine's or the effective one; else it is a conflict, and done."""
    fold = folded(decision("d", "deny"), override("escalate", "allow"))
    assert fold.view["counts"]["conflicts"]["override_from_mismatch"] == 1
    assert fold.view["decisions"]["by_effective_verdict"]["allow"] == 1


def test_resolution_after_an_override_leaves_the_effective_verdict():
    """An expired escalation does not undo what a person said."""
    fold = folded(
        decision("d", "escalate"),
        override("escalate", "allow"),
        follow_up("escalation.resolved", resolution="expired"),
    )
    assert fold.decision("d")["effective_verdict"] == "allow"
    assert fold.view["escalations"]["pending"] == 0


def test_outcomes():
    """Each report counts by kind; the decision keeps the latest."""
    fold = folded(
        decision("d"),
        follow_up("outcome.reported", outcome="timed_out"),
        follow_up("outcome.reported", outcome="succeeded"),
    )
    outcomes = fold.view["outcomes"]
    assert (outcomes["total"], outcomes["timed_out"], outcomes["succeeded"]) == (2, 1, 1)
    assert fold.decision("d") == {"outcome": "succeeded"}


def feedback(word, correct=None, reviewer="r1"):
    given = follow_up("feedback.recorded", reviewer=reviewer, feedback=word)
    return given if correct is None else {**given, "correct_verdict": correct}


@pytest.mark.parametrize(
    ("verdict", "word", "correct", "cell"),
    [
        ("deny", "positive", None, "tp"),
        ("escalate", "positive", None, "tp"),
        ("deny", "negative", None, "fp"),
        ("allow", "positive", None, "tn"),
        ("allow", "negative", None, "fn"),
        ("transform", "negative", None, "fn"),
        ("allow", "negative", "deny", "fn"),
        ("allow", "positive", "escalate", "fn"),
        ("deny", "correction", "allow", "fp"),
        ("deny", "correction", "escalate", "tp"),
        ("error", "correction", "allow", "tn"),
        ("deny", "neutral", "allow", "neutral"),
    ],
)
def test_confusion_matrix(verdict, word, correct, cell):
    """Feedback counts in the cell that its definition says, overall and for the policy."""
    fold = folded(decision("d", verdict, policies=[policy("p@1")]), feedback(word, correct))
    matrix = fold.view["feedback"]["overall"]
    assert [name for name in ("tp", "fp", "tn", "fn", "neutral") if matrix[name]] == [cell]
    assert matrix["decisions"] == 1
    assert fold.view["feedback"]["by_policy"]["p@1"] == matrix


def test_latest_feedback_of_a_reviewer_counts():
    """Who judges a decision again takes the first judgement back; a second reviewer adds one."""
    fold = folded(
        decision("1"),
        decision("d", "deny"),
        feedback("negative"),
        feedback("positive"),
        feedback("negative", reviewer="r2"),
    )
    given = fold.view["feedback"]
    assert (given["overall"]["tp"], given["overall"]["fp"]) == (1, 1)
    assert (given["events"], given["overall"]["decisions"]) == (3, 1)
    assert given["coverage"] == {"rate": 0.5, "numerator": 1, "denominator": 2}
    assert given["overall"]["false_positive_rate"]["numerator"] == 1


def test_reviewers_of_a_decision_are_bounded():
    """The 257th reviewer of one decision is counted as not kept, and changes no matrix."""
    fold = folded(decision("d"), *(feedback("positive", reviewer=f"r{n}") for n in range(257)))
    assert fold.view["feedback"]["overall"]["tn"] == 256
    assert fold.view["bounds"]["overflowed"] == {"reviewers_of_a_decision": 1}


@pytest.mark.parametrize("kind", FOLLOW_UPS)
def test_orphans(kind):
    """A follow-up without its decision is counted by type; a later decision does not mend it."""
    body = {
        "escalation.voted": {"reviewer": "r", "approve": True},
        "escalation.resolved": {"resolution": "approved"},
        "decision.overridden": {"reviewer": "r", "from_verdict": "deny", "to_verdict": "allow"},
        "outcome.reported": {"outcome": "failed"},
        "feedback.recorded": {"reviewer": "r", "feedback": "positive"},
    }[kind]
    fold = folded(follow_up(kind, "d", **body), decision("d"))
    assert fold.view["counts"]["orphans"] == {
        "total": 1,
        **dict.fromkeys(FOLLOW_UPS, 0),
        kind: 1,
    }
    assert set(fold.stored) == {"state"}


def test_what_follows_a_quarantined_decision_is_an_orphan():
    """A decision that could not be folded has no follow-ups: the counts stay consistent."""
    fold = Fold()
    assert fold.add(decision("bad", "escalate", latency_ms=-1))
    assert fold.add(decision("ahead", "escalate", at="2026-11-02T13:00:00Z"))
    for name in ("bad", "ahead"):
        fold.add(follow_up("escalation.resolved", name, resolution="approved"))
    view = fold.view
    assert view["counts"]["orphans"]["escalation.resolved"] == 2
    assert (view["escalations"]["pending"], view["counts"]["quarantined"]) == (0, 2)


def test_other_event_as_subject_is_an_orphan():
    """A `decision_id` that names an event of another type counts as an orphan."""
    fold = folded({"type": "mode.changed", "mode": "strict", "id": "m"})
    entry = Entry.of("acgs-dev", f"{NOON_MS}-2", {"id": "x", **feedback("positive")})
    entities = {"state": fold.state}
    mode = {"type": "mode.changed", "mode": "strict", "id": "m"}
    other = Entry.of("acgs-dev", f"{NOON_MS}-1", mode)
    GOVERNANCE.apply(entities, entry, other)
    assert entities["state"]["orphans"]["feedback.recorded"] == 1


def test_precedents_are_what_people_made_of_an_action():
    """A resolution or override by a person is kept by action, resource and arguments."""
    action = {"type": "pay", "resource": "bank", "args_hash": "sha256:1"}
    fold = folded(
        decision("1", "escalate", action=action),
        decision("2", "deny", action=action),
        decision("3", "escalate", action={"type": "pay"}),
        follow_up("escalation.resolved", "1", resolution="rejected"),
        override("deny", "allow", "2"),
        follow_up("escalation.resolved", "3", resolution="approved"),
    )
    assert fold.view["precedents"] == {
        "count": 1,
        "latest": [
            {**dict(zip(("action", "resource"), ("pay", "bank"), strict=True))}
            | {"args_hash": "sha256:1", "effective_verdict": "allow", "times": 2}
            | {"decision_id": "2", "seq": 5}
        ],
    }


# -- what cannot be folded ------------------------------------------------------------------------

VALID = [
    decision(
        verdict="escalate",
        at=at(0),
        constitutional_hash="c",
        impact_level="low",
        policies=[policy("p@1")],
        rules=[{"id": "r", "effect": "match"}],
        latency_ms=1.5,
        required_approvals=1,
        expires_at=at(1),
    ),
    vote("r", reviewer_kind="human"),
    follow_up("escalation.resolved", resolution="approved"),
    override("deny", "allow"),
    follow_up("outcome.reported", outcome="failed"),
    feedback("correction", "deny"),
    activated("p@1", hash="h"),
    {"type": "policy.deactivated", "policy": policy("p@1")},
    {"type": "constitution.activated", "constitutional_hash": "c"},
    threshold(0.5, 1),
    {"type": "mode.changed", "mode": "strict", "learning_paused": False},
    {"type": "agent.role_assigned", "agent": {"id": "a"}, "role": "r"},
    {"type": "agent.trust_adjusted", "agent": {"id": "a"}, "delta": 0.1},
    {"type": "waiver.granted", "waiver_id": "w", "scope": "s", "expires_at": at(1)},
    {"type": "waiver.revoked", "waiver_id": "w"},
]
OPTIONAL = {
    *("at", "reviewer_kind", "constitutional_hash", "impact_level", "policies", "rules", "hash"),
    *("latency_ms", "required_approvals", "expires_at", "effect", "learning_paused", "old"),
}
NOT_READ = {"type", "id", "rules.0.id"}


def places(value, path=()):
    """Every path into nested JSON, the root left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def changed(event, path, edit):
    """A copy of the event where `edit(container, key)` was called at the path."""
    event = orjson.loads(orjson.dumps(event))
    container = event
    for key in path[:-1]:
        container = container[key]
    edit(container, path[-1])
    return event


def put(bad):
    return lambda container, key: container.__setitem__(key, bad)


READ_PLACES = [
    pytest.param(event, path, id=f"{event['type']}-{'.'.join(map(str, path))}")
    for event in VALID
    for path in places(event)
    if ".".join(map(str, path)) not in NOT_READ
]


def test_valid_bodies_fold():
    """Every body that the next tests spoil is good before that."""
    assert folded(*VALID).refused == {}


@pytest.mark.parametrize(("event", "path"), READ_PLACES)
def test_field_of_another_json_type_is_refused_whole(event, path):
    """A field that is read and has another JSON type is Unfoldable, and nothing has changed."""
    value = event
    for key in path:
        value = value[key]
    for bad in (7.5, True, "text", ["text"], {"x": 1}):
        fold = folded(decision(verdict="escalate", id="before"))
        reason = fold.add(changed(event, path, put(bad)))
        if type(bad) is not type(value) and not (bad == 7.5 and type(value) is int):
            assert reason or path == ("required_approvals",), f"{bad!r} was folded"


@pytest.mark.parametrize(("event", "path"), READ_PLACES)
def test_missing_field_is_refused_whole(event, path):
    """A required field that is missing is Unfoldable; an optional one may be."""
    reason = Fold().add(changed(event, path, lambda container, key: container.pop(key)))
    optional = path[-1] in OPTIONAL or isinstance(path[-1], int)
    if path == ("constitutional_hash",):
        optional = event["type"] == DECISION
    if path == ("id",):
        optional = True  # `Fold` gives it one
    assert bool(reason) is not optional


@pytest.mark.parametrize(
    "event",
    [
        decision(verdict="maybe"),
        decision(impact_level="huge"),
        decision(rules=[{"effect": "explosion"}]),
        decision(latency_ms=-0.001),
        follow_up("escalation.resolved", resolution="forgotten"),
        follow_up("outcome.reported", outcome="exploded"),
        override("deny", "maybe"),
        feedback("glowing"),
        feedback("correction"),
        feedback("negative", "maybe"),
        {"type": "mode.changed", "mode": "party"},
    ],
)
def test_unknown_word_is_refused(event):
    """A word outside a closed vocabulary is not counted as another one."""
    assert Fold().add(event)


def raw_entry(data, kind=DECISION, event_id="x", seq=1):
    """An entry whose bytes no writer of ours would have made."""
    event_id = event_id if isinstance(event_id, bytes) else event_id.encode()
    fields = [b"type", kind.encode(), b"id", event_id, b"data", data]
    return Entry("acgs-dev", seq, f"{NOON_MS}-{seq}".encode(), fields)


RAW = orjson.dumps(decision("x", at=at(0)))


def with_member(member, data=RAW):
    """The JSON object with one more member at its end."""
    return data[:-1] + b"," + member + b"}"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"7", b'"x"', b"null", b'{"id":"x"}', b"\xff", RAW + b"x", RAW[:-1]),
        *(with_member(b'"u":tru'), with_member(b'"u":"\\ud800"'), with_member(b'"u":NaN')),
        *(with_member(b'"u":[1,]'), with_member(b'"latency_ms":1e999')),
    ],
)
def test_data_that_is_no_event_is_refused(data):
    """An entry whose data is not a JSON object with a type is Unfoldable."""
    fold = folded(decision())
    assert fold.add_entry(raw_entry(data, seq=2))
    assert fold.view["decisions"]["total"] == 1


@pytest.mark.parametrize(
    ("stream_type", "data_type"),
    [
        ("decision.recorded", "mode.changed"),
        ("mode.changed", "decision.recorded"),
        ("outcome.reported", "feedback.recorded"),
        ("from.the.future", "decision.recorded"),
        ("decision.recorded", "from.the.future"),
    ],
)
def test_type_that_the_data_contradicts_is_refused(stream_type, data_type):
    """Where the entry's type and the one in its data disagree, nobody knows what was recorded."""
    data = orjson.dumps({**decision("x"), "mode": "strict", "type": data_type})
    fold = folded(decision())
    assert fold.add_entry(raw_entry(data, stream_type, seq=2))
    assert fold.view["counts"]["unknown_types"] == {}


def test_id_is_the_one_that_it_was_recorded_under():
    """The copy of the id in the data is not read: follow-ups find a decision by the entry's own."""
    fold = Fold()
    data = orjson.dumps(decision("another", "escalate"))
    assert fold.add_entry(raw_entry(data, event_id="real")) is None
    assert fold.view["recent"][0]["id"] == fold.view["escalations"]["oldest"][0]["decision_id"]
    fold.seq = 1
    fold.add(follow_up("escalation.resolved", "real", resolution="approved"))
    fold.add(follow_up("escalation.resolved", "another", resolution="approved"))
    view = fold.view
    assert (view["escalations"]["pending"], view["counts"]["orphans"]["total"]) == (0, 1)
    assert view["recent"][0]["id"] == "real"


def test_id_that_is_no_text_is_refused():
    """An id that is not UTF-8 could not be shown or named."""
    assert "UTF-8" in Fold().add_entry(raw_entry(RAW, event_id=b"\xff"))


@pytest.mark.parametrize(
    ("member", "folds"),
    [
        *((b'"latency_ms":5', True), (b'"latency_ms":1e300', True), (b'"latency_ms":-0.0', True)),
        *((b'"latency_ms":%d' % 10**40, True), (b'"latency_ms":%d' % 10**400, False)),
        *((b'"required_approvals":%d' % (2**53 - 1), True), (b'"required_approvals":0', True)),
        *((b'"required_approvals":%d' % 2**53, False), (b'"required_approvals":-1', False)),
        *((b'"required_approvals":1.0', False), (b'"required_approvals":true', False)),
        *((b'"expires_at":"soon"', False), (b'"expires_at":null', True)),
        *((b'"action":{"type":"pay","args_hash":7}', False), (b'"policies":[{"id":"p"}]', False)),
    ],
)
def test_numbers_and_what_else_has_a_range(member, folds):
    """An integer will do for a float, a float not for an integer; what is out of range is refused,
    whatever the verdict, so that state stays JSON that every reader understands.
    """
    fold = Fold()
    reason = fold.add_entry(raw_entry(with_member(member)))
    assert (reason is None) is folds, reason
    assert orjson.loads(orjson.dumps(fold.state)) == fold.state


def test_threshold_values_are_floats():
    """A threshold that was recorded as an integer is the same one as a float."""
    fold = folded(threshold(None, 1), threshold(1.0, 2))
    assert (
        fold.stored == {} or orjson.dumps(fold.view["thresholds"]["current"][0]["value"]) == b"2.0"
    )
    assert fold.view["counts"]["conflicts"]["total"] == 0


@pytest.mark.parametrize(
    ("first", "last", "folds"),
    [
        (b'"verdict":7', b'"verdict":"deny"', True),
        (b'"verdict":"deny"', b'"verdict":7', False),
        (b'"agent":[]', b'"agent":{"id":"a"}', True),
        (b'"type":"mode.changed"', b'"type":"decision.recorded"', True),
        (b'"type":"decision.recorded"', b'"type":"mode.changed"', False),
    ],
)
def test_repeated_key_counts_with_its_last_value(first, last, folds):
    """A key that is there twice is what JSON parsers make of it: the last one."""
    fold = Fold()
    data = with_member(last, with_member(first))
    assert (fold.add_entry(raw_entry(data)) is None) is folds
    if folds and b"deny" in last:
        assert fold.view["decisions"]["by_verdict"]["deny"] == 1


@pytest.mark.parametrize(
    "member",
    [
        *(b'"u":"\xff"', b'"\xff":1', b'"u":1e999', b'"u":%d' % 10**400, b'"u":{"verdict":7}'),
        b'"u":' + b"[" * 400 + b"]" * 400,
        b'"u":' + b"[" * 1000 + b"]" * 1000,
    ],
    ids=["text", "key", "float", "integer", "nested key", "deep", "deeper"],
)
def test_what_is_not_read_is_not_judged(member):
    """A field that no fold reads breaks none, whatever a newer or another writer put there."""
    assert Fold().add_entry(raw_entry(with_member(member))) is None


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 1100, 50_000])
@pytest.mark.parametrize("field", [b"u", b"reason", b"rules"])
def test_nesting_is_judged_by_the_data_alone(field, depth):
    """However deeply the reader's own calls are nested, an entry folds or does not."""
    data = with_member(b'"%b":' % field + b"[" * depth + b"]" * depth)

    def folds_below(calls):
        if calls:
            return folds_below(calls - 1)
        return Fold(watched=False).add_entry(raw_entry(data)) is None

    assert folds_below(0) == folds_below(100)
    assert folds_below(0) == (depth < 1024 and field != b"rules")


def test_fields_of_a_newer_writer_are_ignored():
    """A body with fields that nobody here knows, at every level, is folded as it is without."""
    for event in VALID:
        newer = {**event, "zz": {"x": [1]}, "aa": None}
        for key, value in event.items():
            if isinstance(value, dict):
                newer[key] = {**value, "zz": 1}
            if isinstance(value, list):
                newer[key] = [{**one, "aa": []} for one in value]
        assert folded(decision(), newer).stored == folded(decision(), event).stored


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.sampled_from(VALID), st.data())
def test_any_json_is_folded_or_refused(event, data):
    """Whatever stands in any field, an entry folds or is Unfoldable; `Fold` checks the rest."""
    path = data.draw(st.sampled_from(list(places(event))))
    fold = folded(decision("d", "escalate"))
    fold.add(changed(event, path, put(data.draw(JSON))))
    fold.add(follow_up("escalation.resolved", resolution="approved"))
    fold.add(feedback("positive"))
    assert len(orjson.dumps(fold.view)) < 256 * 1024


# -- every history --------------------------------------------------------------------------------

VERDICTS = ("allow", "deny", "escalate", "transform", "abstain", "error")
POLICIES = ("p@1", "p@2", "q@1")
REVIEWERS = ("r1", "r2", "agent-0")
NUMBERS = st.tuples(st.integers(0, 13), *[st.integers(0, 11)] * 5)
SEVERITIES = ("critical", "high", "medium", "low", "odd")
EFFECTS = ("match", "warning", "violation")


def event_of(numbers, earlier):
    """One event out of six small numbers; `earlier` is how many went before."""
    kind, a, b, c, d, time = numbers
    target = f"d{max(earlier - 1 - a, 0)}"
    reviewer, verdict = REVIEWERS[b % 3], VERDICTS[c % 6]
    makers = [
        lambda: decision_of(earlier, a, b, c, d),
        lambda: decision_of(earlier, a, b, 2, d),
        lambda: follow_up(
            "escalation.voted",
            target,
            reviewer=reviewer,
            approve=c % 2 == 0,
            reviewer_kind=("human", "service", "advisory")[d % 3],
        ),
        lambda: follow_up(
            "escalation.resolved",
            target,
            resolution=("approved", "rejected", "expired", "cancelled")[c % 4],
        ),
        lambda: override(verdict, VERDICTS[d % 6], target, reviewer),
        lambda: follow_up("outcome.reported", target, outcome=("failed", "succeeded")[c % 2]),
        lambda: {
            **follow_up("feedback.recorded", target, reviewer=reviewer),
            "feedback": ("positive", "negative", "neutral", "correction")[c % 4],
            **({"correct_verdict": VERDICTS[d % 6]} if c % 4 == 3 or d % 2 else {}),
        },
        lambda: activated(POLICIES[a % 3]),
        lambda: {"type": "policy.deactivated", "policy": policy(POLICIES[a % 3])},
        lambda: threshold((None, 1, 2)[a % 3], 1 + b % 2, level=("low", "high")[c % 2]),
        lambda: (
            {"type": ("waiver.granted", "waiver.revoked")[a % 2], "waiver_id": f"w{b % 3}"}
            | ({} if a % 2 else {"scope": "s"})
        ),
        lambda: {"type": ("mode.changed", "from.the.future")[a % 2], "mode": "strict"},
        lambda: {"type": "agent.role_assigned", **agent_of(a), "role": f"role-{b}"},
        lambda: {"type": "agent.trust_adjusted", **agent_of(a), "delta": (b - 5) / 8},
    ]
    event = {"id": f"d{earlier}", **makers[kind]()}
    minutes = (0, 0, 0, 3, -1, -2, -59, -60, -62, -24 * 60, -7 * 24 * 60, 6)[time]
    return event if time == 1 else {**event, "at": at(minutes + earlier)}


def agent_of(number):
    return {"agent": {"id": f"agent-{number % 2}"}}


def decision_of(earlier, a, b, c, d):
    event = decision(f"d{earlier}", VERDICTS[c % 6], **agent_of(a))
    if d % 4 == 0:
        event["agent"]["maci_role"] = f"maci-{b}"
    event["action"] = {"type": ("pay", "mail")[b % 2], "args_hash": str(d)}
    if a % 3:
        event["policies"] = [policy(name) for name in POLICIES[: a % 3 + b % 2]]
    if b % 3:
        event["rules"] = [
            {"id": "r", "effect": EFFECTS[n % 3], "severity": SEVERITIES[m % 5]}
            for n, m in ((a, c), (d, b))
        ]
    if d % 3:
        event["impact_level"] = ("low", "high")[d % 2]
    return event


HISTORIES = st.lists(NUMBERS, max_size=60).map(
    lambda steps: [
        (NOON_MS + number * MINUTE_MS, event_of(numbers, number))
        for number, numbers in enumerate(steps)
    ]
)


def fold_of(history, chunk):
    fold = Fold(chunk, watched=False)
    for recorded_ms, event in history:
        fold.add(event, recorded_ms)
    fold.flush()
    return fold


@settings(max_examples=150)
@given(HISTORIES)
def test_counts_equal_an_independent_fold(history):
    """For any history the published numbers are those of a fold of nothing but dictionaries."""
    fold = fold_of(history, chunk=1_000)
    assert published(fold.view, len(fold.refused)) == expected(history, fold.view)
    assert fold.view["counts"]["quarantined"] == len(fold.refused)


CHANGES = (
    lambda n, name: threshold(None, 1, scope=name),
    lambda n, name: activated(f"{name}@{n % 3}"),
    lambda n, name: {"type": "waiver.granted", "waiver_id": name, "scope": "s"},
    lambda n, name: {"type": f"from.the.future.{name}"},
    lambda n, name: {"type": "policy.deactivated", "policy": policy(f"{name}@{n % 3}")},
    lambda n, name: {"type": "waiver.revoked", "waiver_id": name},
    lambda n, name: {"type": "constitution.activated", "constitutional_hash": name},
)


def of_many_names(seed, count):
    """A history with more names than any bound, in every dimension: first 300 of what is changed,
    then all kinds of events, among them many about the decision `d3`.
    """
    random, earlier = Random(seed), 0
    for n in range(count):
        name, kind = f"n-{random.randrange(400)}", random.randrange(27)
        earlier = f"d{random.choice([3, 3, random.randrange(n + 1)])}"
        many = f"r-{n}" if n % 8 else f"r-{name}"
        if n < 1_200:
            event = CHANGES[n % 4](n, f"n-{n // 4}")
            if n % 4 == 2 and n % 3 == 0:
                event["expires_at"] = at(n // 100)
        elif kind < len(CHANGES):
            event = CHANGES[kind if n % 3 else 2](n, name)
        elif kind < 12:
            event = decision(verdict="deny", action={"type": name})
            event["policies"] = [policy(f"{name}@{kind}"), policy(f"p-{random.randrange(300)}@1")]
            event["rules"] = [{"id": "r", "effect": EFFECTS[kind % 3]}]
        elif kind < 15:
            event = decision(action={"type": f"a-{n % 20}"}, impact_level="low")
            event["policies"] = [policy(f"p-{n % 33}@1")]
        else:
            event = (
                override("deny", "allow", earlier, many),
                feedback("negative", reviewer=many) | {"decision_id": earlier},
                vote(many) | {"decision_id": earlier},
                follow_up(
                    "escalation.resolved", earlier.replace("d3", "d4"), resolution="rejected"
                ),
                decision(verdict="escalate"),
                decision(verdict="escalate"),
            )[kind % 6]
        if n == 3:
            event = decision(verdict="escalate")
        yield NOON_MS + n * 300, {**event, "id": f"d{n}", "at": at(n // 200)}


@pytest.mark.parametrize("seed", [1, 2])
def test_counts_equal_an_independent_fold_beyond_every_bound(seed):
    """Where names and lists have reached their bounds, what is kept, what counts as `other`, and
    what is shown are those of a fold of nothing but dictionaries.
    """
    history = list(of_many_names(seed, 9_000))
    fold = fold_of(history, chunk=100_000)
    view = fold.view
    assert published(view, len(fold.refused)) == expected(history, view)
    reached = {"action_types", "policies", "override_reviewers", "thresholds", "active_policies"}
    reached |= {"waivers", "unknown_types", "reviewers_of_a_decision", "combinations"}
    assert reached <= view["bounds"]["overflowed"].keys()
    assert fold.state["pending_unlisted"] > 0
    assert len(view["recent"]) == min(100, view["bounds"]["names_shown"])


def test_counts_equal_an_independent_fold_where_all_names_fit():
    """With bounds that are reached and a view that has room, all that is kept is shown."""
    kinds = ("from.the.future", "escalate", "deny")
    history = [
        (NOON_MS, decision(f"d{n}", kinds[n % 3], action={"type": f"a-{n % 400}"}) | {"at": at(0)})
        if n % 3
        else (NOON_MS, {"id": f"d{n}", "type": f"from.the.future.{n}", "at": at(0)})
        for n in range(1_500)
    ]
    fold = fold_of(history, chunk=100_000)
    view = fold.view
    assert published(view, 0) == expected(history, view)
    assert view["bounds"]["names_shown"] == 256
    assert {"action_types", "unknown_types"} <= view["bounds"]["overflowed"].keys()


@settings(max_examples=60)
@given(HISTORIES, st.integers(1, 20))
def test_chunks_do_not_matter(history, chunk):
    """Entities are the same bytes however the entries are cut, stored and loaded in between."""
    assert fold_of(history, chunk).stored == fold_of(history, 1_000).stored


@settings(max_examples=100)
@given(HISTORIES, st.integers(1, 70))
def test_folding_at_once_is_folding_one_by_one(history, page):
    """Pages that are folded at once give the same bytes and refuse the same entries."""
    entries = [
        Entry.of("acgs-dev", f"{recorded_ms}-{seq}", event)
        for seq, (recorded_ms, event) in enumerate(history, 1)
    ]
    paged = Fold(watched=False)
    for start in range(0, len(entries), page):
        paged.add_page(entries[start : start + page])
    single = fold_of(history, 1)
    assert (paged.stored, paged.refused) == (single.stored, single.refused)


def test_fold_is_pure():
    """The same input twice gives the same bytes, and the input is as it was."""
    history = [(NOON_MS, event) for event in VALID * 3]
    before = orjson.dumps(history)
    first, second = fold_of(history, 4), fold_of(history, 4)
    assert first.stored == second.stored
    assert orjson.dumps(history) == before
    state = first.state
    assert orjson.dumps(first.view) == orjson.dumps(second.view)
    GOVERNANCE.view(state)
    assert state == second.state, "a view changed the state"


# -- bounds ---------------------------------------------------------------------------------------


def test_names_beyond_256_count_as_other():
    """A dimension keeps its first 256 names; later and too long ones count as `other`."""
    fold = folded(*(decision(f"d{n}", action={"type": f"a{n}"}) for n in range(258)))
    fold.add(decision("long", action={"type": "x" * 129}))
    fold.add(decision("again", action={"type": "a0"}))
    by_action = fold.view["decisions"]["by_action_type"]
    assert len(by_action) == 257
    assert (by_action["a0"]["decisions"], by_action["other"]["decisions"]) == (2, 3)
    assert fold.view["bounds"]["overflowed"] == {"action_types": 3}
    assert fold.view["recent"][1]["action"].startswith("xxxxxxxxxxxxxxxx…")


def test_name_is_measured_as_json():
    """128 bytes are meant as they are stored: a control character takes six of them."""
    fold = folded(
        decision("1", action={"type": "\x01" * 21}),
        decision("2", action={"type": "\x01" * 22}),
        decision("3", action={"type": "é" * 64}),
        decision("4", action={"type": "é" * 65}),
        decision("5", action={"type": "other"}),
    )
    by_action = fold.view["decisions"]["by_action_type"]
    assert {name: cell["decisions"] for name, cell in by_action.items()} == {
        "\x01" * 21: 1,
        "é" * 64: 1,
        "other": 3,
    }
    assert fold.view["bounds"]["overflowed"] == {"action_types": 2}


def test_policies_that_share_other_count_it_once():
    """A decision of which two policies do not fit counts once in `other`, overridden or judged."""
    long_ones = [policy(f"{'p' * 200}@{n}") for n in range(2)]
    fold = folded(
        decision("d", "deny", policies=[*long_ones, policy("p@1")]),
        override("deny", "allow"),
        feedback("negative"),
    )
    view = fold.view
    by_policy = view["decisions"]["by_policy"]
    assert {name: cell["deny"] for name, cell in by_policy.items()} == {"other": 1, "p@1": 1}
    assert by_policy["other"]["overridden"] == 1
    assert view["overrides"]["by_policy"] == {"other": 1, "p@1": 1}
    assert view["feedback"]["by_policy"]["other"]["fp"] == 1


def hostile_events(filler):
    """More distinct long names than fit, everywhere that a name can be."""
    yield decision("first", "deny", action={"type": "other"}, policies=[policy(f"{filler}@0")])
    for before, after in ((a, b) for a in VERDICTS for b in VERDICTS):
        yield override(before, after, "first", f"r-{before}")
    for n in range(300):
        name = f"{n:03}{filler}"
        ref = {"id": name, "version": name[:40], "hash": name * 3}
        yield {"type": "policy.activated", "policy": ref}
        yield decision(
            f"d{name}",
            "escalate",
            agent={"id": name},
            action={"type": name, "resource": name * 9, "args_hash": name * 3},
            policies=[ref, {**ref, "version": "2"}],
            expires_at=at(n),
        )
        yield decision(f"deny{name}", "deny", policies=[{"id": name[:60], "version": str(n)}])
        yield override("deny", "allow", f"deny{name}", name)
        yield {**feedback("positive", reviewer=name), "decision_id": f"deny{name}"}
        yield follow_up("escalation.voted", f"d{name}", reviewer=name, approve=True)
        yield threshold(None, n, scope=name, level=name)
        yield {"type": "waiver.granted", "waiver_id": name, "scope": name * 4}
        yield {"type": "constitution.activated", "constitutional_hash": name * 4}
        yield {"type": name}
        yield decision(f"c{n}", policies=[ref], action={"type": name}, impact_level="high")
        if n % 5 == 0:
            yield {"type": "policy.deactivated", "policy": ref}
    for n in range(1_100):
        action = {"type": filler, "resource": filler, "args_hash": str(n)}
        yield decision(f"{n}{filler}", "escalate", action=action)
    for n in range(600):
        yield follow_up("escalation.resolved", f"{n}{filler}", resolution="rejected")


@pytest.mark.parametrize(
    "filler",
    [
        pytest.param("x" * 125, id="as long as is kept"),
        pytest.param("\x01" * 20, id="control characters"),
        pytest.param('"\\' * 31, id="quotes"),
        pytest.param("😀" * 31, id="four bytes each"),
        pytest.param("y" * 500, id="too long"),
        pytest.param("\x01" * 500, id="too long when escaped"),
    ],
)
def test_view_stays_below_256_kib(filler):
    """With every bounded part full of the longest names, the value still fits, and says so."""
    fold = folded(*hostile_events(filler))
    view = fold.view
    assert len(orjson.dumps(view)) < 256 * 1024
    assert {"thresholds", "waivers", "unknown_types"} <= set(view["bounds"]["overflowed"])
    by_action = view["decisions"]["by_action_type"].values()
    assert sum(cell["decisions"] for cell in by_action) == view["decisions"]["total"] == 2_001
    assert view["bounds"]["names_shown"] >= 8
    assert len(fold.stored["state"]) < 4 * 1024 * 1024


LIMITS = {
    **dict.fromkeys(("action_types", "policies", "unknown_types", "override_reviewers"), 257),
    **dict.fromkeys(("override_policies", "feedback_policies"), 257),
    **dict.fromkeys(("thresholds", "waivers", "active_policies"), 256),
    **dict.fromkeys(("policy_history", "constitution_history", "recent"), 100),
    "pending": 1_000,
    "precedents": 256,
    "policy_windows": 16,
    "override_directions": 36,
    "minutes": 60,
    "hours": 168,
    "impact_levels": 6,
}


def grown(value, largest=10**12 - 1):
    """The same with every count as if a million million entries had been folded."""
    if isinstance(value, dict):
        return {key: grown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [grown(one) for one in value]
    if isinstance(value, float):
        return -2.2250738585072014e-308
    return largest if type(value) is int and abs(value) < 10**9 else value


@pytest.mark.parametrize("filler", ["x" * 124, "\x01" * 20, '"\\' * 30])
def test_view_of_a_state_that_is_full_everywhere_stays_below_256_kib(filler):
    """Every part at its limit, every name at its longest, every number at its longest: it fits."""
    state = full_state(filler)
    for part, limit in LIMITS.items():
        assert len(state[part]) >= limit, part
    view = GOVERNANCE.view(state)
    assert len(orjson.dumps(view)) < 255 * 1024
    assert view["bounds"]["names_shown"] >= 8
    assert len(view["escalations"]["oldest"]) >= 8
    assert view["escalations"]["unlisted"] > 0


def full_state(filler):
    """A fold of hostile events, then each part filled to its limit and each number grown."""
    fold = folded(*(activated(f"w{n}@1") for n in range(16)), *hostile_events(filler))
    for n in range(7 * 24 * 60):
        if n > 7 * 24 * 60 - 61 or n % 60 == 0:
            time_ms = NOON_MS + n * MINUTE_MS
            ref = [{"id": f"w{n % 16}", "version": "1"}]
            assert fold.add(decision(f"t{n}", policies=ref), time_ms) is None
    state = fold.state
    hours = state["hours"]
    for part, limit in LIMITS.items():
        if isinstance(state[part], dict):
            (*_, example) = state[part].values()
            numbers = iter(range(limit))
            while len(state[part]) < limit:
                state[part][f"{next(numbers):04}{filler}"[:128]] = example
    state["policy_windows"] = dict.fromkeys(state["policy_windows"], hours)
    names = zip(state["action_types"], state["policies"], strict=True)
    state["combinations"]["negligible"] = {
        action: {policy_name: [1] * 9} for action, policy_name in names if action != "other"
    }
    state["overflow"] = dict.fromkeys([*LIMITS, "reviewers_of_a_decision", "combinations"], 1)
    apart = ("minutes", "hours", "policy_windows", "newest_ms", "clock_ms", "recent")
    grown_state = grown({part: value for part, value in state.items() if part not in apart})
    rings = {part: grown_slots(state[part]) for part in ("minutes", "hours")}
    rings["policy_windows"] = {
        name: grown_slots(ring) for name, ring in state["policy_windows"].items()
    }
    recent = [[10**12 - 1, *row[1:]] for row in state["recent"]]
    return {**state, **grown_state, **rings, "recent": recent}


def grown_slots(ring):
    """The slots with their counts grown, and their buckets as they are."""
    return [slot and [*grown(slot[:-1]), slot[-1]] for slot in ring]


LONG = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).flatmap(
    lambda text: st.integers(1, 40).map(lambda times: text * times)
)


def named(number, first, second, third):
    """Events that carry the names wherever the schema lets them."""
    ref = {"id": first, "version": second, "hash": third}
    return [
        {"type": "policy.activated", "policy": ref},
        decision(f"d{number}", "escalate", agent={"id": third}, action={"type": first}),
        vote(second) | {"decision_id": f"d{number}"},
        override("escalate", "deny", f"d{number}", third),
        threshold(None, number, scope=second, level=third),
        {"type": "waiver.granted", "waiver_id": first, "scope": third},
    ]


@settings(max_examples=40)
@given(st.lists(st.tuples(LONG, LONG, LONG), max_size=25))
def test_any_names_fold(names):
    """Names of any characters and length fold in any chunks, and the value stays in its bounds."""
    history = [
        (NOON_MS, event) for number, row in enumerate(names) for event in named(number, *row)
    ]
    fold = fold_of(history, chunk=7)
    assert fold.refused == {}
    assert fold.stored == fold_of(history, 1_000).stored
    assert len(orjson.dumps(fold.view)) < 256 * 1024


# -- real data ------------------------------------------------------------------------------------


def test_shipped_events_give_their_own_totals():
    """Folding the shipped events tenant by tenant gives what a plain count of the file gives."""
    folds, counts, directions = defaultdict(lambda: Fold(500, watched=False)), Counter(), Counter()
    for line in (files("ledger") / "data" / "agentdojo-decisions.jsonl").read_bytes().splitlines():
        event = orjson.loads(line)
        tenant = event.pop("tenant")
        counts[tenant, event["type"]] += 1
        counts[tenant, event.get("verdict"), event.get("impact_level")] += 1
        if event["type"] == "decision.overridden":
            directions[f"{event['from_verdict']}→{event['to_verdict']}"] += 1
        assert folds[tenant].add(event, NOON_MS) is None
    assert len(folds) == 4
    shown_directions = Counter()
    for tenant, fold in folds.items():
        view = fold.view
        decisions = view["decisions"]
        assert decisions["total"] == counts[tenant, "decision.recorded"]
        for level, cell in decisions["by_impact_level"].items():
            for verdict in VERDICTS:
                assert cell[verdict] == counts[tenant, verdict, level]
        assert view["outcomes"]["total"] == counts[tenant, "outcome.reported"]
        assert view["feedback"]["overall"]["decisions"] == counts[tenant, "feedback.recorded"]
        assert view["escalations"]["pending"] == 0
        assert (
            sum(view["escalations"]["resolved"].values()) == counts[tenant, "escalation.resolved"]
        )
        assert view["thresholds"]["changes"] == counts[tenant, "threshold.changed"]
        assert view["counts"]["orphans"]["total"] == view["counts"]["conflicts"]["total"] == 0
        assert view["bounds"]["overflowed"] == {}
        shown_directions.update(view["overrides"]["by_direction"])
    assert shown_directions == directions
