"""What a reader makes of published governance state: as of now, what was active, what counts."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import Decision, EscalationResolved, Ledger, errors
from projections import Governance, Projector
from projections.governance_follow_ups import effective_verdict
from projections.governance_now import active_at, as_of_now
from projections.store import FoldStore
from tests.test_governance import (
    DECISION,
    GOVERNANCE,
    HISTORIES,
    MINUTE_MS,
    NOON_MS,
    activated,
    at,
    decision,
    fold_of,
    folded,
    hostile_events,
    policy,
)

NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)


def minutes_after_noon(minutes):
    return NOON + timedelta(minutes=minutes)


@settings(max_examples=120)
@given(HISTORIES, st.integers(0, 9 * 24 * 60))
def test_as_of_now_is_what_an_event_of_now_would_show(history, minutes):
    """Windows, pending escalations and waivers as of a time are those that are published where an
    event of that time is the newest.
    """
    now_ms = NOON_MS + (len(history) + 10 + minutes) * MINUTE_MS
    now = minutes_after_noon(len(history) + 10 + minutes)
    view = orjson.loads(orjson.dumps(fold_of(history, 1_000).view))
    if view["windows"] is None:
        return
    then = fold_of([*history, (now_ms, {"type": "mode.changed", "mode": "strict"})], 1_000).view
    seen = as_of_now(view, now)
    for window in ("1h", "24h", "7d"):
        assert seen["windows"][window] == then["windows"][window]
    assert seen["escalations"] == then["escalations"]
    assert seen["waivers"] == then["waivers"]
    assert seen["decisions"] == view["decisions"]


def test_as_of_a_time_before_the_newest_is_as_of_the_newest():
    """A reader whose clock is behind sees no window without the newest events."""
    view = folded(decision("1", at=at(-30)), decision("2", at=at(0))).view
    seen = as_of_now(view, minutes_after_noon(-10))
    assert seen["windows"]["1h"] == view["windows"]["1h"]
    assert seen["windows"]["as_of"] == view["windows"]["newest_at"]


def test_as_of_now_of_an_empty_state():
    """A tenant that has decided nothing has no windows, now or later."""
    assert as_of_now(GOVERNANCE.view({}), NOON)["windows"] is None


def test_waiver_expires_by_the_readers_clock():
    """A waiver is expired from its expiry on; one without never."""
    granted = {"type": "waiver.granted", "scope": "p", "at": at(0)}
    view = folded(
        {**granted, "waiver_id": "w1", "expires_at": at(10)}, {**granted, "waiver_id": "w2"}
    ).view
    assert [row["expired"] for row in view["waivers"]["oldest"]] == [False, False]
    for minutes, expired in ((9, 0), (10, 1)):
        assert as_of_now(view, minutes_after_noon(minutes))["waivers"]["expired"] == expired


@settings(max_examples=120)
@given(HISTORIES)
def test_active_at_is_what_was_active_then(history):
    """What was active at a time is what is published when the history ends there."""
    view = fold_of(history, 1_000).view
    for count in range(0, len(history) + 1, 5):
        then = fold_of(history[:count], 1_000).view
        when = minutes_after_noon(count - 1)  # the last one's recorded time
        active = then["policies"]["active"]
        assert active_at(view, when).policies == {
            name: (one["version"], one["hash"]) for name, one in active.items()
        }


def test_active_at_knows_the_constitution():
    """The constitution at a time is the last one activated until then, that time included."""
    fold = folded({"type": "constitution.activated", "constitutional_hash": "c1"})
    fold.add({"type": "constitution.activated", "constitutional_hash": "c2"}, NOON_MS + MINUTE_MS)
    view = fold.view
    found = [
        active_at(view, when).constitutional_hash
        for when in (NOON - timedelta(milliseconds=1), NOON, minutes_after_noon(1))
    ]
    assert found == [None, "c1", "c2"]


@pytest.mark.parametrize(
    "change",
    [activated, lambda name: {"type": "constitution.activated", "constitutional_hash": name}],
)
def test_active_at_says_where_the_history_does_not_reach(change):
    """Before the oldest change that is shown nobody knows, and nobody guesses."""
    fold = folded()
    for n in range(60):
        fold.add(change(f"p@{n}"), NOON_MS + n * MINUTE_MS)
    view = fold.view
    active_at(view, minutes_after_noon(10))
    with pytest.raises(errors.NotFound, match="the last 50 of 60 changes") as caught:
        active_at(view, minutes_after_noon(9))
    assert "as_of" in caught.value.hint


def test_active_at_says_where_not_all_that_is_active_is_shown():
    """Where the published state has not room for every active policy, it is not taken for all."""
    view = folded(*hostile_events("x" * 125)).view
    assert view["policies"]["active_count"] > len(view["policies"]["active"])
    with pytest.raises(errors.NotFound, match="are active, the published state shows"):
        active_at(view, NOON)


@settings(max_examples=100)
@given(HISTORIES)
def test_effective_verdicts_add_up_to_what_is_published(history):
    """The effective verdict of each decision, by its entity, is what the published counts count."""
    fold = fold_of(history, 1_000)
    counts = Counter(
        effective_verdict(
            event["verdict"], orjson.loads(fold.stored.get(f"decision:{name}", b"{}"))
        )
        for seq, (_, event) in enumerate(history, 1)
        for name in [event["id"]]
        if event["type"] == DECISION and seq not in fold.refused
    )
    published = fold.view["decisions"]["by_effective_verdict"]
    assert counts == {verdict: count for verdict, count in published.items() if count}


def test_effective_verdict_of_what_nothing_follows_is_the_engines():
    """A decision without an entity counts as the engine said."""
    assert effective_verdict("escalate", None) == "escalate"


async def test_committed_entity_is_read_with_its_position(valkey, tenant):
    """A decision's entity is read with a position that it is not older than; none is none."""
    async with Ledger.connect(valkey.url) as ledger:
        store = FoldStore(ledger.server, tenant, Governance())
        assert (await store.read_entity("decision:d"))[:3] == (None, None, None)
        escalated = Decision(id="d", agent="a", action="b", verdict="escalate")
        await ledger.append(tenant, escalated)
        await Projector(ledger).run_once([tenant])
        position, _, entity, _ = await store.read_entity("decision:d")
        assert (position.seq, entity) == (1, None)
        await ledger.append(tenant, EscalationResolved(decision_id="d", resolution="approved"))
        await Projector(ledger).run_once([tenant])
        position, _, entity, _ = await store.read_entity("decision:d")
        assert (position.seq, effective_verdict("escalate", entity)) == (2, "allow")
        position, _, state, _ = await store.read_entity("state")
        assert (position.seq, state["events"]) == (2, 2)


@settings(max_examples=100)
@given(HISTORIES)
def test_combinations_add_up_to_an_independent_count(history):
    """The counts by policy, action type and impact level together are those of a plain count."""
    fold = fold_of(history, 1_000)
    expected = Counter(
        (named, event["action"]["type"], event.get("impact_level", "unset"), event["verdict"])
        for seq, (_, event) in enumerate(history, 1)
        if event["type"] == DECISION and seq not in fold.refused
        for named in policies_of(event)
    )
    table = fold.view["decisions"]["by_policy_action_impact"]
    assert table["other"]["decisions"] == 0
    verdicts = table["columns"][3:9]
    assert expected == {
        (*row[:3], verdict): count
        for row in table["rows"]
        for verdict, count in zip(verdicts, row[3:9], strict=True)
        if count
    }


def policies_of(event):
    found = {f"{one['id']}@{one['version']}" for one in event.get("policies", [])}
    return found or {None}


def test_overridden_decision_shows_in_its_combination():
    """An override counts where its decision counts, for each of its policies."""
    over = {"type": "decision.overridden", "decision_id": "d", "reviewer": "r"}
    view = folded(
        decision("d", "deny", policies=[policy("p@1"), policy("q@1")]),
        {**over, "from_verdict": "deny", "to_verdict": "allow"},
    ).view
    table = view["decisions"]["by_policy_action_impact"]
    place = table["columns"].index("overridden")
    assert [row[place] for row in table["rows"]] == [1, 1]
    assert view["decisions"]["by_action_type"]["mail.send"]["overridden"] == 1
    assert view["decisions"]["overridden"] == 1
