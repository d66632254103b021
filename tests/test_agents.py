"""The agents fold: what each event does to an agent, and that no agent costs more among many."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, suppress

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import Decision, Ledger, Outcome, errors, event_from_json, keys
from ledger.stream import Entry
from projections import Agents, Governance, Projector, StateReader, Unfoldable
from projections.agents import agent_name
from projections.store import FoldStore
from tests import agents_reference
from tests.governance_reference import expected as expected_governance
from tests.governance_reference import published as published_governance
from tests.test_governance import (
    DECISION,
    HISTORIES,
    NOON_MS,
    at,
    decision,
    dumped,
    event_of,
    fold_of,
    places,
    put,
)

AGENTS = Agents()
AT = "2026-11-02T12:00:00Z"


def entries_of(history):
    return [
        Entry.of("acgs-dev", f"{recorded_ms}-{seq}", {"id": f"e-{seq}", **event})
        for seq, (recorded_ms, event) in enumerate(history, 1)
    ]


def folded(*events, chunk=1_000, recorded_ms=NOON_MS):
    return fold_agents([(recorded_ms, event) for event in events], chunk)


def fold_agents(history, chunk):
    """Entities by name after the history, as bytes between the chunks; and why what was refused."""
    stored, refused, entries = {}, {}, entries_of(history)
    for start in range(0, len(entries), chunk):
        page = entries[start : start + chunk]
        names = {"state", *(name for entry in page for name in named(entry))}
        entities = {name: orjson.loads(stored[name]) for name in names & stored.keys()}
        refused |= AGENTS.apply_all(entities, page, [None] * len(page))
        assert entities.keys() <= names
        stored |= dumped(entities)
    return stored, refused


def named(entry):
    try:
        return AGENTS.names(entry)
    except Unfoldable:
        return ()


def view_of(folds, agent="agent-1"):
    stored, _ = folds
    name = agent_name(agent)
    return AGENTS.entity_view(name, orjson.loads(stored[name]))


def violation(*severities, verdict="deny"):
    rules = [{"id": "r", "effect": "violation", "severity": severity} for severity in severities]
    return decision("v", verdict, rules=rules)


def adjusted(delta):
    return {"type": "agent.trust_adjusted", "agent": {"id": "agent-1"}, "delta": delta}


# -- what each event does -------------------------------------------------------------------------


def test_decisions_count_by_verdict_and_effect():
    """An agent's decisions count by verdict, and once each as warning and as violation."""
    rules = [{"id": "a", "effect": "warning"}, {"id": "b", "effect": "violation"}] * 2
    decisions = view_of(folded(decision("1"), decision("2", "deny", rules=rules)))["decisions"]
    assert decisions["total"] == 2
    assert (decisions["by_verdict"]["allow"], decisions["by_verdict"]["deny"]) == (1, 1)
    assert (decisions["warnings"], decisions["violations"]) == (1, 1)
    assert decisions["violations_by_severity"] == {"critical": 0, "high": 1, "medium": 0, "low": 0}


def test_recent_rates_are_of_the_last_hundred():
    """What happened a hundred decisions ago is in no recent rate any more."""
    early = [violation("low") for _ in range(30)]
    recent = view_of(folded(*early, *(decision(str(n), "escalate") for n in range(90))))["recent"]
    assert recent["decisions"] == 100
    assert recent["rates"]["deny"] == {"rate": 0.1, "numerator": 10, "denominator": 100}
    assert recent["rates"]["violation"]["numerator"] == 10
    assert recent["rates"]["escalate"]["numerator"] == 90
    assert recent["by_verdict"] == {
        "allow": 0, "deny": 10, "escalate": 90, "transform": 0, "abstain": 0, "error": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "streak"),
    [("d", 1), ("add", 2), ("dda", 0), ("ddeddd", 3), ("ddx", 0), ("", 0)],
)
def test_denials_are_consecutive(verdicts, streak):
    """A streak of denials ends with any other verdict."""
    words = {"a": "allow", "d": "deny", "e": "escalate", "x": "error"}
    history = [decision(str(n), words[letter]) for n, letter in enumerate(verdicts)]
    assert view_of(folded(adjusted(0), *history))["consecutive_denials"] == streak


@pytest.mark.parametrize(
    ("history", "trust"),
    [
        ([violation("critical")], 0.8),
        ([violation("high")], 0.9),
        ([violation("medium")], 0.95),
        ([violation("low")], 0.98),
        ([violation("odd")], 0.9),
        ([violation(None)], 0.9),
        ([violation("low", "critical", "low")], 0.8),
        ([violation("low", verdict="allow")], 0.98),
        ([violation("high"), decision("a")], 0.91),
        ([violation("high"), decision("a", "transform")], 0.91),
        ([violation("high"), decision("a", "deny")], 0.9),
        ([violation("high"), decision("a", "escalate")], 0.9),
        ([violation("high"), decision("a", "abstain"), decision("b", "error")], 0.9),
        ([decision("a")] * 3, 1.0),
        ([violation("critical")] * 6, 0.0),
        ([violation("critical")] * 6 + [decision("a")], 0.01),
        ([adjusted(-0.3)], 0.7),
        ([adjusted(-1), adjusted(-1), adjusted(0.25)], 0.25),
        ([adjusted(-0.1), adjusted(1)], 1.0),
        ([adjusted(-0.000001)], 0.999999),
        ([violation("high"), violation("medium"), violation("medium")], 0.8),
    ],
)
def test_trust_moves_by_its_constants(history, trust):
    """Trust starts at 1.0, falls by the gravest violation, recovers by compliance, and is clamped;
    sums are exact.
    """
    assert view_of(folded(*history))["trust"]["score"] == trust


@pytest.mark.parametrize(
    ("delta", "tier"),
    [(-0.2, "trusted"), (-0.200001, "monitored"), (-0.5, "monitored"), (-0.500001, "restricted")],
)
def test_tiers_begin_at_their_bounds(delta, tier):
    """A tier includes its lower bound, and the tenant's summary counts agents by tier."""
    folds = folded(adjusted(delta), decision("d", "deny", agent={"id": "other"}))
    assert view_of(folds)["trust"]["tier"] == tier
    tiers = orjson.loads(folds[0]["state"])["tiers"]
    assert sum(tiers.values()) == 2
    assert tiers[tier] >= 1


def test_role_is_what_was_assigned_last():
    """An assignment names the role; what decisions claim stands beside it."""
    assigned = {"type": "agent.role_assigned", "agent": {"id": "agent-1"}}
    claim = decision("d", agent={"id": "agent-1", "maci_role": "proposer"})
    view = view_of(
        folded({**assigned, "role": "judge"}, claim, {**assigned, "role": "executive"}, decision())
    )
    assert (view["role"], view["maci_role"]) == ("executive", "proposer")


def test_last_seen_is_the_newest_time():
    """The latest `at` is when an agent was last seen, whatever came after it."""
    view = view_of(folded(decision("1", at=at(-1)), decision("2", at=at(-9))))
    assert (view["first_seq"], view["last_seen"]["seq"]) == (1, 2)
    assert view["last_seen"]["at"] == "2026-11-02T11:59:00.000Z"
    assert view["last_seen"]["recorded_at"] == "2026-11-02T12:00:00.000Z"


def test_follow_ups_concern_no_agent():
    """What people say of a decision later names no agent, and loads none."""
    vote = {"type": "escalation.voted", "decision_id": "d", "reviewer": "agent-1", "approve": True}
    assert set(folded(vote)[0]) == {"state"}
    assert AGENTS.names(entries_of([(NOON_MS, vote)])[0]) == ()


@pytest.mark.parametrize("minutes", [5, 6])
def test_at_ahead_of_the_ledger_is_refused(minutes):
    """Five minutes ahead of the recorded time is folded, more is quarantined, agents too."""
    stored, refused = folded(decision("1", at=at(-1)), decision("2", at=at(minutes)))
    assert bool(refused) is (minutes > 5)
    assert orjson.loads(stored["state"])["quarantined"] == (minutes > 5)


VALID = [
    decision(at=at(0), rules=[{"id": "r", "severity": "low"}], expires_at=at(1))
    | {"agent": {"id": "agent-1", "maci_role": "m"}},
    {"type": "agent.role_assigned", "agent": {"id": "agent-1"}, "role": "r", "at": at(0)},
    {**adjusted(0.5), "at": at(0)},
]


@settings(max_examples=200)
@given(st.sampled_from(VALID), st.data())
def test_any_json_is_folded_or_refused(event, data):
    """Whatever stands in any field, an entry folds, or is refused and changes nothing."""
    path = data.draw(st.sampled_from(list(places(event))))
    value = data.draw(st.none() | st.booleans() | st.integers() | st.text() | st.just([{}]))
    event = orjson.loads(orjson.dumps(event))
    container = event
    for key in path[:-1]:
        container = container[key]
    try:
        put(value)(container, path[-1])
        entry = entries_of([(NOON_MS, event)])[0]
    except (KeyError, TypeError, orjson.JSONEncodeError):
        return  # no event at all
    entities = {}
    try:
        AGENTS.apply(entities, entry, None)
    except Unfoldable:
        assert entities == {}


@pytest.mark.parametrize("agent_id", ["é" * 512, "\x01" * 512, "a:b/c d%*{}", "😀" * 200])
def test_agent_of_any_name_has_its_own_key_and_a_small_copy(agent_id):
    """An id of any characters gives a key of its own, and a copy below 8 KiB."""
    role = {"type": "agent.role_assigned", "agent": {"id": agent_id}, "role": "\x02" * 512}
    acted = decision("d", agent={"id": agent_id, "maci_role": "\x03" * 512})
    view = view_of(folded(role, *[acted] * 200), agent_id)
    assert len(orjson.dumps(view)) < 8 * 1024
    key = AGENTS.entity_key("acgs-dev", agent_name(agent_id))
    assert key == keys.agent_state("acgs-dev", agent_id)
    assert not set(key) & set("*{} \x01/")
    assert AGENTS.entity_key("acgs-dev", "state") is None


# -- every history --------------------------------------------------------------------------------


@settings(max_examples=150)
@given(HISTORIES)
def test_agents_equal_an_independent_fold(history):
    """For any history each agent's numbers are those of a fold of nothing but dictionaries."""
    stored, refused = fold_agents(history, 1_000)
    expected = agents_reference.reference(history)
    assert {name for name in stored if name != "state"} == {agent_name(one) for one in expected}
    for agent, numbers in expected.items():
        assert agents_reference.published(view_of((stored, refused), agent)) == numbers
    state = orjson.loads(stored["state"]) if stored else {"agents": 0, "decisions": 0}
    assert state["agents"] == len(expected)
    assert state["decisions"] == sum(sum(one["by_verdict"].values()) for one in expected.values())


@settings(max_examples=80)
@given(HISTORIES, st.integers(1, 20))
def test_chunks_do_not_matter(history, chunk):
    """Entities are the same bytes however the entries are cut, or folded one by one."""
    assert fold_agents(history, chunk) == fold_agents(history, 1_000)
    entities, refused = {}, {}
    for entry in entries_of(history):
        try:
            AGENTS.apply(entities, entry, None)
        except Unfoldable as error:
            refused[entry.seq] = error.reason
            AGENTS.quarantined(entities, entry)
    whole, whole_refused = fold_agents(history, 1_000)
    assert refused == whole_refused
    assert dumped(entities) == {n: v for n, v in whole.items() if n != "state" or entities}


@settings(max_examples=60)
@given(HISTORIES)
def test_what_governance_refuses_agents_refuse_too(history):
    """Both projections count the same decisions, so their totals agree."""
    _, refused = fold_agents(history, 7)
    governance = fold_of(history, 7)
    kinds = {seq: event["type"] for seq, (_, event) in enumerate(history, 1)}
    assert refused == {
        seq: reason
        for seq, reason in governance.refused.items()
        if kinds[seq] == DECISION or kinds[seq].startswith("agent.")
    }


# -- with a ledger --------------------------------------------------------------------------------


@pytest.fixture
async def ledger(valkey):
    async with Ledger.connect(valkey.url) as opened:
        yield opened


@asynccontextmanager
async def running(projector):
    task = asyncio.create_task(projector.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def append(ledger, tenant, events):
    await ledger.append_many(tenant, [event_from_json(orjson.dumps(event)) for event in events])


def committed_bytes(server, tenant):
    """All that both projections have committed, but for who committed it: by key and field."""
    found = {}
    for key in sorted(server.cli("KEYS", f"claude-flow:ledger:{{{tenant}}}:projection:*@*")):
        fields = server.cli("HGETALL", key)
        found |= {
            (key, name): value
            for name, value in fields.items()
            if name not in ("build", "copies", "position")
        }
    return found


def random_history(seed, count):
    """Valid events of every kind, mostly following each other."""
    choose, events = random.Random(seed), []
    while len(events) < count:
        numbers = [choose.randrange(14), *(choose.randrange(12) for _ in range(5))]
        event = event_of(numbers, len(events))
        is_correction = event.get("feedback") == "correction"
        if event["type"] != "from.the.future" and not (
            is_correction and "correct_verdict" not in event
        ):
            events.append(event | {"at": at(numbers[5] - 5 + len(events))})
    return events


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_live_rebuilt_and_pure_folds_are_the_same_bytes(ledger, valkey, tenant, seed):
    """fold(all) = live projector = fold in any pages = rebuild, for both projections, byte for
    byte; and the counts are those of the independent references.
    """
    events = random_history(seed, 160)
    choose = random.Random(seed)
    projector = Projector(ledger)
    async with running(projector):
        left = list(events)
        while left:
            size = choose.randrange(1, 40)
            await append(ledger, tenant, left[:size])
            del left[:size]
            if choose.random() < 0.5:
                await append(ledger, tenant, events[: len(events) - len(left)][-5:])  # retries
        await StateReader(ledger).state(tenant, at_least=len(events))
        await StateReader(ledger).state(tenant, "agents", at_least=len(events))
    live = committed_bytes(valkey, tenant)
    recorded = [entry async for entry in ledger.replay(tenant)]
    history = [(entry.recorded_ms, entry.event) for entry in recorded]
    assert len(history) == len(events), "a retry added an entry"
    for name in ("governance", "agents"):
        await Projector(ledger).rebuild(tenant, name)
    assert committed_bytes(valkey, tenant) == live
    pure = fold_of(history, 9).stored | {
        name: value for name, value in fold_agents(history, 9)[0].items() if name != "state"
    }
    assert {name: value.encode() for (_, name), value in live.items() if name != "state"} == {
        name: value for name, value in pure.items() if name != "state"
    }
    state = await StateReader(ledger).state(tenant)
    assert published_governance(state.value, 0) == expected_governance(history, state.value)
    for agent, expected in agents_reference.reference(history).items():
        copy = orjson.loads(valkey.cli("GET", keys.agent_state(tenant, agent)))
        assert agents_reference.published(copy["value"]) == expected


def acted(number, agent="agent-1", **fields):
    return Decision(id=f"d-{number}", agent=agent, action="act", verdict="allow", **fields)


async def fold_of_agents(ledger, tenant):
    projector = Projector(ledger, [Agents()])
    fold = projector._fold_of(tenant, projector.projections[0])
    return fold, await fold.begin()


async def test_page_that_is_delivered_twice_changes_nothing(ledger, valkey, tenant):
    """A fold refuses entries that it has folded, and a page that does not follow on them."""
    await ledger.append_many(tenant, [acted(n) for n in range(30)])
    fold, walk = await fold_of_agents(ledger, tenant)
    walk.page_entries = 10
    pages = [page async for page in walk.pages()]
    for page in pages:
        with suppress(errors.CommitConflict):
            walk = await fold.begin()
            await fold.fold_page(walk, page)
    valkey.cli("DEL", keys.lease(tenant, "agents", 1))
    await Projector(ledger).run_once([tenant])
    once = committed_bytes(valkey, tenant)
    for page in (*pages, pages[1]):
        walk = await fold.begin()
        with pytest.raises(errors.CommitConflict, match="so it cannot fold"):
            await fold.fold_page(walk, page)
    await Projector(ledger).run_once([tenant])
    assert committed_bytes(valkey, tenant) == once


async def test_agents_are_published_under_the_guides_keys(ledger, valkey, tenant):
    """An agent's copy is the guide's envelope with its TTL, and a reader of the key finds it."""
    receipt = await ledger.append(tenant, acted(1, "agent:1"))
    await Projector(ledger).run_once([tenant])
    key = keys.agent_state(tenant, "agent:1")
    envelope = orjson.loads(valkey.cli("GET", key))
    assert list(envelope) == ["value", "createdAt", "updatedAt", "metadata"]
    assert envelope["metadata"] == {
        "epoch": receipt.epoch,
        "position": receipt.entry_id,
        "seq": 1,
        "projection": "agents",
        "version": 1,
    }
    assert envelope["value"]["decisions"]["total"] == 1
    assert 86_000 < valkey.cli("TTL", key) <= 86_400


async def test_only_agents_that_acted_are_published(ledger, valkey, tenant):
    """A copy that nothing changed is not written again, nor an agent that nothing names."""
    await ledger.append_many(tenant, [acted(1, "one"), acted(2, "two")])
    projector = Projector(ledger)
    await projector.run_once([tenant])
    valkey.cli("DEL", keys.agent_state(tenant, "one"))
    await ledger.append_many(
        tenant, [acted(3, "two"), Outcome(decision_id="d-1", outcome="failed")]
    )
    await projector.run_once([tenant])
    assert valkey.cli("GET", keys.agent_state(tenant, "one")) is None
    two = orjson.loads(valkey.cli("GET", keys.agent_state(tenant, "two")))
    assert (two["value"]["decisions"]["total"], two["metadata"]["seq"]) == (2, 4)


async def test_copies_that_a_dead_worker_left_old_are_put_by_the_next(ledger, valkey, tenant):
    """What was committed and not published is published by whoever takes over."""
    await ledger.append_many(tenant, [acted(n, f"agent-{n}") for n in range(20)])
    await Projector(ledger).run_once([tenant])
    await ledger.append_many(tenant, [acted(n, f"agent-{n % 20}") for n in range(20, 35)])
    fold, walk = await fold_of_agents(ledger, tenant)
    async for page in walk.pages():
        await fold.fold_page(walk, page)  # and there it dies
    valkey.cli("DEL", keys.lease(tenant, "agents", 1))
    await Projector(ledger).run_once([tenant])
    for n in range(20):
        copy = orjson.loads(valkey.cli("GET", keys.agent_state(tenant, f"agent-{n}")))
        assert copy["value"]["decisions"]["total"] == 1 + (n < 15)
    state = valkey.cli("HGETALL", keys.projection(tenant, "agents", 1))
    assert state["copies"] == f"{state['build']} 35"


async def test_rebuild_publishes_every_agent_again(ledger, valkey, tenant):
    """After a rebuild no copy is left of what was there before."""
    await ledger.append_many(tenant, [acted(n, f"agent-{n % 7}") for n in range(50)])
    await Projector(ledger).run_once([tenant])
    for n in range(7):
        key = keys.agent_state(tenant, f"agent-{n}")
        valkey.cli("SET", key, valkey.cli("GET", key).replace('"total":', '"total":9'))
    await Projector(ledger).rebuild(tenant, "agents")
    for n in range(7):
        copy = orjson.loads(valkey.cli("GET", keys.agent_state(tenant, f"agent-{n}")))
        assert copy["value"]["decisions"]["total"] == 7 + (n < 1)
    assert valkey.cli("KEYS", f"*{tenant}*rebuild*") == []


async def test_copies_that_are_too_many_to_remember_are_found_again(
    ledger, valkey, tenant, monkeypatch
):
    """With room for next to no names at a time, every agent is published in the end, up to date."""
    monkeypatch.setattr("projections.copies.COPIES_AT_ONCE", 3)
    monkeypatch.setattr("projections.copies._DUE_LIMIT", 5)
    for start in (0, 40):
        events = [acted(start + n, f"agent-{n % 23}") for n in range(40)]
        await ledger.append_many(tenant, events)
        projector = Projector(ledger)
        fold = projector._fold_of(tenant, projector.projections[1])
        walk = await fold.begin()
        walk.page_entries = 10
        async for page in walk.pages():
            await fold.fold_page(walk, page)
            await fold.publish(60)
        assert fold.copies_are_due
        await projector.run_once([tenant])
        assert not fold.copies_are_due
        for n in range(23):
            copy = orjson.loads(valkey.cli("GET", keys.agent_state(tenant, f"agent-{n}")))
            assert copy["value"]["decisions"]["total"] == (1 + (n < 17)) * (1 + (start > 0))


async def test_defect_in_one_projection_stops_no_other(ledger, tenant):
    """A projection that fails on a page leaves the others folded, and is named by its own walk."""

    class Broken(Agents):
        def apply_all(self, entities, entries, subjects):
            raise KeyError("typo")

    await ledger.append(tenant, acted(1))
    projector = Projector(ledger, [Governance(), Broken()])
    with pytest.raises(KeyError, match="typo"):
        await projector.run_once([tenant])
    assert (await StateReader(ledger).state(tenant)).seq == 1
    with pytest.raises(errors.NotFound):
        await StateReader(ledger).state(tenant, "agents")


async def test_projection_that_was_added_later_catches_up(ledger, tenant):
    """A fold that stands behind the others folds what they have, by its own walk."""
    await ledger.append_many(tenant, [acted(n) for n in range(5)])
    await Projector(ledger, [Governance()]).run_once([tenant])
    await ledger.append_many(tenant, [acted(n) for n in range(5, 9)])
    projector = Projector(ledger)
    assert await projector.run_once([tenant]) == {tenant: 9}
    for name in ("governance", "agents"):
        state = await StateReader(ledger).state(tenant, name)
        assert state.seq == 9
    await ledger.append(tenant, acted(9))
    assert await projector.run_once([tenant]) == {tenant: 1}


async def test_both_projections_read_a_page_once(ledger, valkey, tenant):
    """A second projection reads no entry that the first has read already."""
    await ledger.append_many(tenant, [acted(n) for n in range(1000)])
    counts = []
    for projections in ([Governance()], []):
        store = FoldStore(ledger.server, tenant, Governance())
        await store.discard()
        valkey.cli("CONFIG", "RESETSTAT")
        await Projector(ledger, projections).run_once([tenant])
        counts.append(net_bytes(valkey, "output"))
    assert counts[1] - counts[0] < 30_000, "a page of 1,000 is some 200,000 bytes"


def net_bytes(server, direction):
    with server.client(decode_responses=True) as client:
        return int(client.info("stats")[f"total_net_{direction}_bytes"])


def cost(server):
    """Calls by command since the last reset, and bytes to and from the server."""
    with server.client(decode_responses=True) as client:
        calls = {name: about["calls"] for name, about in client.info("commandstats").items()}
    uncounted = ("info", "config", "hello", "client", "xadd", "fcall|append")
    return {name: n for name, n in calls.items() if not name.endswith(uncounted)}


async def cost_of_a_takeover(ledger, server, tenant, events):
    """What a new worker spends on a tenant that has these new entries: takeover, fold, publish."""
    await ledger.append_many(tenant, events)
    server.cli("CONFIG", "RESETSTAT")
    await Projector(ledger).run_once([tenant])
    received, sent = net_bytes(server, "input"), net_bytes(server, "output")
    return cost(server), received, sent


async def test_agents_are_published_on_every_node_of_a_cluster(cluster, tenant):
    """Copies lie in slots all over a cluster, and each node is given the library it lacks."""
    async with Ledger.connect(cluster.url) as ledger:
        await ledger.append_many(tenant, [acted(n, f"agent-{n % 40}") for n in range(80)])
        await Projector(ledger).run_once([tenant])
    nodes = set()
    for n in range(40):
        key = keys.agent_state(tenant, f"agent-{n}")
        node = cluster.node_for(key)
        nodes.add(node)
        assert orjson.loads(node.cli("GET", key))["value"]["decisions"]["total"] == 2
    assert len(nodes) == 3


async def test_agent_costs_the_same_among_a_hundred_thousand(fresh_server):
    """Takeover, fold and publish take the same calls, and bytes but for longer numbers, in a
    tenant of 100 agents and in one of 100,000.
    """
    server, costs = fresh_server(), []
    async with Ledger.connect(server.url) as ledger:
        for tenant, agents in (("few", 100), ("many", 100_000)):
            await ledger.append(tenant, acted(0))
            await Projector(ledger).run_once([tenant])
            await put_agents(ledger, tenant, agents)
            server.cli("DEL", keys.lease(tenant, "agents", 1))  # who put them is gone
            events = [acted(n, f"agent-{n:06}") for n in range(90, 110)]
            costs.append(await cost_of_a_takeover(ledger, server, tenant, events))
    (few, *few_bytes), (many, *many_bytes) = costs
    assert few == many
    assert few["cmdstat_hget"] < 60
    assert all(abs(one - two) < 3_000 for one, two in zip(few_bytes, many_bytes, strict=True))


async def put_agents(ledger, tenant, count):
    """Commits as many agents as if each had acted once."""
    store = FoldStore(ledger.server, tenant, Agents())
    committed, state = await store.committed()
    (agent,) = (await store.load({agent_name("agent-1"): 0})).values()
    for start in range(0, count, 1000):
        numbers = range(start, min(start + 1000, count))
        changed = {agent_name(f"agent-{n:06}"): agent for n in numbers}
        await store.commit(committed, committed.position, changed, {})
    await store.commit(committed, committed.position, {"state": state | {"agents": count}}, {})


async def test_decision_costs_the_same_among_many_with_follow_ups(fresh_server):
    """Takeover, fold and publish take the same calls, and bytes but for longer numbers, after
    1,500 decisions with follow-ups (which have a snapshot) and after 20,000.
    """
    server, costs = fresh_server(), []
    async with Ledger.connect(server.url) as ledger:
        for tenant, count in (("few", 1_500), ("many", 20_000)):
            for start in range(0, count, 500):
                events = []
                for n in range(start, min(start + 500, count)):
                    events.append(acted(n, at=AT))
                    events.append(Outcome(decision_id=f"d-{n}", outcome="failed", at=AT))
                await ledger.append_many(tenant, events)
            await Projector(ledger).run_once([tenant])
            events = [Outcome(decision_id=f"d-{n}", outcome="succeeded", at=AT) for n in range(20)]
            costs.append(await cost_of_a_takeover(ledger, server, tenant, events))
    (few, *few_bytes), (many, *many_bytes) = costs
    assert few == many
    assert all(abs(one - two) < 3_000 for one, two in zip(few_bytes, many_bytes, strict=True))
