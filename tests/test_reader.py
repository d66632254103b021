"""What policies read: typed, no older than it says, and never of another history."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

import msgspec
import orjson
import pytest
from msgspec import structs

from ledger import (
    Decision,
    EscalationResolved,
    Ledger,
    Overridden,
    Position,
    errors,
    keys,
    load_settings,
)
from ledger import sync as sync_ledger
from projections import Projector, StateReader
from projections.governance import Governance
from projections.state_model import GovernanceState, governance_of
from projections.sync import StateReader as StateReaderSync
from tests.proxy import Proxy
from tests.test_governance import Fold, at
from tests.test_governance import decision as event_of
from tests.test_governance import policy as policy_of


def decision(number, verdict="allow", **more):
    return Decision(id=f"d-{number}", agent="a", action="act", verdict=verdict, **more)


@pytest.fixture
async def ledger(server):
    async with Ledger.connect(server.url) as opened:
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


async def until(condition):
    """Awaits what others bring about."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - others set no event of ours
            await asyncio.sleep(0.005)


async def polled(read, wanted):
    """The first result of `read` that is wanted."""
    async with asyncio.timeout(20):
        while not wanted(found := await read()):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
    return found


# -- the model ------------------------------------------------------------------------------------


def rich_view():
    """A published value in which every list and every dict has something."""
    fold = Fold(chunk=1000, watched=False)
    fold.add({"type": "policy.activated", "policy": policy_of("p@1") | {"hash": "h"}, "at": at(0)})
    fold.add({"type": "policy.activated", "policy": policy_of("q@1")})
    fold.add({"type": "constitution.activated", "constitutional_hash": "c"})
    fold.add({"type": "threshold.changed", "scope": "risk", "level": "high", "new": 0.7})
    fold.add({"type": "mode.changed", "mode": "strict", "learning_paused": True})
    fold.add({"type": "waiver.granted", "waiver_id": "w", "scope": "s", "expires_at": at(60)})
    fold.add({"type": "of.the.future"})
    action = {"type": "pay", "resource": "bank", "args_hash": "x"}
    fold.add(
        event_of("d-1", "escalate", at=at(1), policies=[policy_of("p@1")], action=action)
        | {"latency_ms": 3.5, "expires_at": at(30), "required_approvals": 2}
    )
    fold.add(event_of("d-2", "escalate", at=at(2), expires_at=at(40)))
    fold.add(event_of("d-3", "deny", at=at(-90), rules=[{"id": "r", "effect": "violation"}]))
    follow_ups = [
        {"type": "escalation.voted", "approve": True, "reviewer": "r"},
        {"type": "escalation.resolved", "resolution": "approved", "reviewer": "r"},
        {"type": "decision.overridden", "from_verdict": "escalate", "to_verdict": "deny"},
        {"type": "outcome.reported", "outcome": "blocked"},
        {"type": "feedback.recorded", "feedback": "negative", "reviewer": "r"},
    ]
    for event in follow_ups:
        fold.add({"decision_id": "d-1", "reviewer": "r", **event})
    assert not fold.refused
    return fold.view


def assert_known(model, value, path="value"):
    """Nothing in the JSON is missing from the model."""
    names = {field.encode_name: field for field in msgspec.structs.fields(type(model))}
    for name, part in value.items():
        assert name in names, f"{path}.{name} is not in the model"
        found = getattr(model, names[name].name)
        if isinstance(found, msgspec.Struct):
            assert_known(found, part, f"{path}.{name}")
        elif isinstance(part, dict) and part:
            assert set(found) == set(part)
            first = next(iter(part))
            if isinstance(found[first], msgspec.Struct):
                assert_known(found[first], part[first], f"{path}.{name}.{first}")
        elif isinstance(part, list) and part and isinstance(part[0], dict):
            assert_known(found[0], part[0], f"{path}.{name}[0]")


def state_of(value):
    return governance_of("acgs-dev", 1, Position("e", 0, "0-0"), value, "folded")


def test_the_model_has_all_that_is_published():
    """Each name in the published value is a field of the typed state; so is an empty tenant's."""
    view = rich_view()
    state = state_of(view)
    assert_known(state, view)
    assert state.thresholds.of("risk", "high").value == 0.7
    assert state.thresholds.of("risk", "low") is None
    assert state.escalations.oldest[0].decision_id == "d-2"
    assert state.active_at(datetime(2100, 1, 1, tzinfo=UTC)).constitutional_hash == "c"
    assert state.feedback.overall.fp == 1
    empty = state_of(Governance().view({}))
    assert empty.decisions.total == 0
    assert empty.windows is None


def test_a_state_cannot_be_changed():
    """One object serves every caller: no field, no dict and no list of it can be changed."""
    state = state_of(rich_view())
    with pytest.raises(AttributeError):
        state.tenant = "other"
    with pytest.raises(AttributeError):
        state.decisions.total = 5
    for change in (
        lambda names: names.update(x=1),
        lambda names: names.pop("p@1"),
        lambda names: names.setdefault("x", 1),
        lambda names: names.__setitem__("x", 1),
        lambda names: names.__delitem__("p@1"),
        lambda names: names.clear(),
        lambda names: names.popitem(),
        lambda names: names.__ior__({"x": 1}),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change(state.decisions.by_policy)
    assert isinstance(state.recent, tuple)
    assert pickle.loads(pickle.dumps(state)) == state
    assert orjson.loads(msgspec.json.encode(state))["decisions"]["total"] == 3


def parts_of(value):
    yield value
    inner = []
    if isinstance(value, msgspec.Struct):
        inner = [getattr(value, name) for name in value.__struct_fields__]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, tuple):
        inner = list(value)
    for part in inner:
        yield from parts_of(part)


def test_nothing_that_can_be_changed_is_in_a_state():
    """However deep one looks, there is no plain dict and no list."""
    kinds = {type(part) for part in parts_of(state_of(rich_view()))}
    assert not kinds & {dict, list, set, bytearray}


def test_windows_end_now_when_asked():
    """A window read as of now leaves out what has passed since the newest event, and says so."""
    state = state_of(rich_view())
    newest = state.windows.newest_at
    assert newest == datetime(2026, 11, 2, 12, 2, tzinfo=UTC)
    same = state.windows.at(newest)
    for name in ("hour", "day", "week"):
        assert getattr(same, name) == getattr(state.windows, name)
    assert (same.hour.decisions, same.day.decisions) == (2, 3)
    assert same.hour.rates.escalate.rate == 1.0
    hour_later = state.windows.at(newest + timedelta(minutes=59))
    assert (hour_later.hour.decisions, hour_later.day.decisions) == (1, 3)
    day_later = state.windows.at(newest + timedelta(hours=24))
    assert (day_later.hour.decisions, day_later.day.decisions, day_later.week.decisions) == (
        0,
        0,
        3,
    )
    assert day_later.day.rates.deny.rate is None
    # A clock that is behind the events, by as much as the ledger allows, sees no less of them.
    assert state.windows.at(newest - timedelta(minutes=4)).hour == state.windows.hour
    with pytest.raises(ValueError, match="time zone"):
        state.windows.at(datetime(2026, 11, 2, 12))  # noqa: DTZ001 - that is what is refused


def test_what_is_due_depends_on_the_clock_of_the_reader():
    """Overdue escalations and expired waivers are told by the time at which they are asked for."""
    state = state_of(rich_view())
    noon = datetime(2026, 11, 2, 12, tzinfo=UTC)
    assert state.escalations.overdue_at(noon) == ()
    assert [one.decision_id for one in state.escalations.overdue_at(noon + timedelta(hours=1))] == [
        "d-2"
    ]
    assert [one.waiver_id for one in state.waivers.active(noon)] == ["w"]
    assert state.waivers.active(noon + timedelta(hours=2)) == ()


# -- reading --------------------------------------------------------------------------------------


async def test_governance_is_typed_and_says_how_far_it_is(ledger, tenant):
    """The state has its position, seq, time and age, and the ledger's head on request."""
    receipts = await ledger.append_many(tenant, [decision(1, "deny"), decision(2)])
    await Projector(ledger).run_once([tenant])
    async with StateReader(ledger) as reader:
        state = await reader.governance(tenant)
        assert isinstance(state, GovernanceState)
        assert (state.decisions.by_verdict.deny, state.decisions.total) == (1, 2)
        assert state.position == receipts[1].position
        assert (state.tenant, state.seq, state.version, state.source) == (tenant, 2, 1, "published")
        assert state.recorded_at == receipts[1].recorded_at
        assert timedelta(seconds=-60) < state.age < timedelta(seconds=60)
        assert (state.head, state.behind, state.stale) == (None, None, False)
        await ledger.append(tenant, decision(3))
        known = await reader.governance(tenant, head=True)
        assert (known.head.seq, known.behind) == (3, 1)


async def test_cached_state_is_the_same_object_without_a_round_trip(server, tenant):
    """While it is known to be fresh, reading it asks the server nothing."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as ledger:
        await ledger.append(tenant, decision(1))
        await Projector(ledger).run_once([tenant])
        async with StateReader(ledger, max_stale_s=60) as reader:
            state = await reader.governance(tenant)
            asked = len(proxy.requests_with(b"HMGET"))
            for _ in range(100):
                assert await reader.governance(tenant) is state
            assert len(proxy.requests_with(b"HMGET")) == asked


async def test_a_notice_renews_what_is_cached(ledger, tenant):
    """With a bound of an hour, the next state is there once it is published: a notice says so."""
    await ledger.append(tenant, decision(1))
    projector = Projector(ledger)
    await projector.run_once([tenant])
    async with StateReader(ledger, max_stale_s=3600) as reader:
        assert (await reader.governance(tenant)).seq == 1
        async with asyncio.timeout(20), aclosing(reader.watch(tenant)) as states:
            await anext(states)
            for number in range(2, 5):
                await ledger.append(tenant, decision(number))
                await projector.run_once([tenant])
                assert (await anext(states)).seq == number
                assert (await reader.governance(tenant)).seq == number


async def test_without_notices_the_bound_holds(ledger, server, tenant):
    """Where no notice ever comes, the checks find what is new within the bound."""
    await ledger.append(tenant, decision(1))
    projector = Projector(ledger)
    await projector.run_once([tenant])
    async with StateReader(ledger, max_stale_s=0.4) as reader:
        reader._cache._notices._noticed = lambda channel: None
        assert (await reader.governance(tenant)).seq == 1
        assert (await reader.governance(tenant)).seq == 1
        await ledger.append(tenant, decision(2))
        await projector.run_once([tenant])
        await polled(lambda: reader.governance(tenant), lambda state: state.seq == 2)


async def test_read_your_writes(ledger, tenant):
    """at_least=receipt returns a state that has folded that event, with a projector beside it."""
    async with StateReader(ledger) as reader, running(Projector(ledger)):
        for number in range(10):
            receipt = await ledger.append(tenant, decision(number))
            state = await reader.governance(tenant, at_least=receipt)
            assert state.seq >= receipt.seq
            assert state.decisions.total >= number + 1
        assert (await reader.governance(tenant, at_least=10)).seq == 10
        assert (await reader.governance(tenant, at_least=receipt.position)).seq == 10


async def test_waiting_for_what_nobody_folds_ends_by_name(ledger, tenant):
    """Without a projector the wait ends in NotCaughtUp with both numbers, first and later on."""
    await ledger.append(tenant, decision(1))
    async with StateReader(ledger) as reader:
        with pytest.raises(errors.NotFound, match="folded none"):
            await reader.governance(tenant)
        with pytest.raises(errors.NotCaughtUp, match="has folded to seq 0, not to 1"):
            await reader.governance(tenant, at_least=1, timeout_s=0.05)
        await Projector(ledger).run_once([tenant])
        with pytest.raises(errors.NotCaughtUp, match="has folded to seq 1, not to 9") as caught:
            await reader.governance(tenant, at_least=9, timeout_s=0.05)
        assert (caught.value.facts["wanted"], caught.value.facts["folded"]) == (9, 1)
        with pytest.raises(errors.NotFound, match="nothing is recorded"):
            await reader.governance(f"{tenant}-new")


async def test_a_wait_asks_seldom(valkey, tenant):
    """A wait of a second for what never comes is some reads, not a hot loop."""
    async with Proxy(valkey) as proxy, Ledger.connect(proxy.url) as ledger:
        await ledger.append(tenant, decision(1))
        await Projector(ledger).run_once([tenant])
        async with StateReader(ledger) as reader:
            before = len(proxy.requests)
            with pytest.raises(errors.NotCaughtUp):
                await reader.governance(tenant, at_least=2, timeout_s=1)
            assert len(proxy.requests) - before < 60


async def test_receipt_of_another_tenant_or_epoch_is_refused(ledger, server, tenant):
    """A receipt means nothing for another tenant, or once the ledger has a new epoch."""
    receipt = await ledger.append(tenant, decision(1))
    await Projector(ledger).run_once([tenant])
    async with StateReader(ledger) as reader:
        with pytest.raises(errors.InvalidInput, match="is of tenant"):
            await reader.governance(f"{tenant}-other", at_least=receipt)
        wanted = structs.replace(receipt, epoch="0" * 16)
        with pytest.raises(errors.LedgerRolledBack, match="in epoch 0000"):
            await reader.governance(tenant, at_least=wanted, timeout_s=0.05)


# -- copies that are gone or strange --------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        ("DEL",),
        ("SET", "[]"),
        ("SET", '{"value":{},"metadata":{"epoch":"a","position":"1-1","seq":1}}'),
        ("LIST",),
        ("TYPES",),
    ],
)
async def test_a_copy_that_is_gone_or_strange_is_read_from_the_committed_fold(
    ledger, server, tenant, damage
):
    """Eviction, expiry and foreign hands never look like another state."""
    await ledger.append_many(tenant, [decision(1, "deny"), decision(2)])
    await Projector(ledger).run_once([tenant])
    key = keys.governance_state(tenant)
    copy = server.cli("GET", key)
    command, *rest = damage
    if command == "LIST":
        server.cli("DEL", key)
        command, rest = "RPUSH", ["x"]
    if command == "TYPES":
        command, rest = "SET", [str(copy).replace('"deny":1', '"deny":"1"')]
    server.cli(command, key, *rest)
    async with StateReader(ledger) as reader:
        state = await reader.governance(tenant)
    assert (state.source, state.seq, state.decisions.by_verdict.deny) == ("committed", 2, 1)


async def test_deleted_copies_never_show_and_come_back(valkey, tenant):
    """While a projector runs and every published key is deleted again and again, each state that
    is read is the exact one of its seq, it never goes back, and at last the copy is there again.
    """
    tenants = [tenant, f"{tenant}-2"]
    verdicts = ("allow", "deny", "escalate")
    expected = {0: (0, 0)}

    async def write():
        for number in range(1, 120):
            event = decision(number, verdicts[number % 3])
            for name in tenants:
                await ledger.append(name, event)
            denied = expected[number - 1][1] + (event.verdict == "deny")
            expected[number] = (number, denied)

    async def delete():
        while True:
            for name in tenants:
                valkey.cli("DEL", keys.governance_state(name))
            await asyncio.sleep(0.003)

    seen = []

    async def read(name):
        last = 0
        while last < 119:
            with suppress(errors.NotFound):
                state = await reader.governance(name)
                seen.append((state.seq, state.decisions.total, state.decisions.by_verdict.deny))
                assert state.seq >= last
                last = state.seq
            await asyncio.sleep(0.001)

    async with (
        Ledger.connect(valkey.url) as ledger,
        StateReader(ledger, max_stale_s=0.5) as reader,
        running(Projector(ledger)),
    ):
        deleting = asyncio.create_task(delete())
        async with asyncio.timeout(60):
            await asyncio.gather(write(), *(read(name) for name in tenants))
        deleting.cancel()
        await asyncio.wait([deleting])
        assert all((total, denied) == expected[seq] for seq, total, denied in seen)
        assert len({seq for seq, _, _ in seen}) > 5
        await until(lambda: all(valkey.cli("EXISTS", keys.governance_state(t)) for t in tenants))


async def test_an_older_copy_is_passed_over(ledger, server, tenant):
    """What a slow projector puts back after the copy was deleted is older than what was read."""
    await ledger.append(tenant, decision(1))
    projector = Projector(ledger)
    await projector.run_once([tenant])
    old = server.cli("GET", keys.governance_state(tenant))
    await ledger.append(tenant, decision(2))
    await projector.run_once([tenant])
    async with StateReader(ledger, max_stale_s=0.2) as reader:
        assert (await reader.governance(tenant)).seq == 2
        server.cli("SET", keys.governance_state(tenant), old)
        entry = reader._cache._entries[tenant]
        entry.fresh_until = float("-inf")
        state = await reader.governance(tenant)
        assert (state.seq, state.source) == (2, "committed")


async def test_a_rebuilt_state_replaces_the_damaged_one_of_the_same_seq(ledger, server, tenant):
    """A cached state whose seq still is right is read again where its value was made anew."""
    await ledger.append(tenant, decision(1))
    projector = Projector(ledger)
    await projector.run_once([tenant])
    key = keys.governance_state(tenant)
    good = server.cli("GET", key)
    server.cli("SET", key, str(good).replace('"deny":0', '"deny":7'))
    async with StateReader(ledger, max_stale_s=0.4) as reader:
        assert (await reader.governance(tenant)).decisions.by_verdict.deny == 7
        await projector.rebuild(tenant)
        await polled(
            lambda: reader.governance(tenant), lambda state: not state.decisions.by_verdict.deny
        )


# -- rolled back ----------------------------------------------------------------------------------


async def test_state_of_a_history_that_is_no_more_is_refused(ledger, server, tenant):
    """A ledger that was made anew, or that lost its end, makes the folded state say so."""
    receipts = await ledger.append_many(tenant, [decision(n) for n in range(5)])
    await Projector(ledger).run_once([tenant])
    async with StateReader(ledger, max_stale_s=0.2) as reader:
        assert (await reader.governance(tenant)).seq == 5
        watching = reader.watch(tenant)
        assert (await anext(watching)).seq == 5
        server.cli("HSET", keys.head(tenant), "seq", "3", "id", receipts[2].entry_id)
        with pytest.raises(errors.LedgerRolledBack, match="the ledger's head is"):
            await asyncio.wait_for(anext(watching), 20)
        with pytest.raises(errors.LedgerRolledBack, match="the ledger's head is"):
            await reader.governance(tenant)
        with pytest.raises(errors.LedgerRolledBack):
            await reader.governance(tenant, stale_ok=True)
        server.cli("DEL", keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
        with pytest.raises(errors.LedgerRolledBack, match="is now gone"):
            await reader.governance(tenant)
        await ledger.append(tenant, decision(0))
        with pytest.raises(errors.LedgerRolledBack, match="is now of epoch"):
            await reader.governance(tenant)
        await Projector(ledger).rebuild(tenant, accept_rollback=True)
        assert (await reader.governance(tenant)).seq == 1


async def test_no_read_serves_what_an_older_replica_has_not(ledger, server, tenant):
    """A ledger that lost its end under the same epoch: each read says so, whether a projector has
    noticed or not; and what a projector stopped at is named by an agent and by a decision.
    """
    projector, reader = Projector(ledger), StateReader(ledger)
    record = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    overridden = Overridden(
        decision_id="d-1", reviewer="r", from_verdict="allow", to_verdict="deny", justification="j"
    )
    with server.client() as client:
        await ledger.append_many(tenant, [decision(1), decision(2)])
        older = {key: client.dump(key) for key in record}
        await ledger.append_many(tenant, [overridden, decision(3)])
        await projector.run_once([tenant])
        reads = {
            "agent": lambda: reader.agent(tenant, "a"),
            "verdict": lambda: reader.effective_verdict(tenant, "d-1"),
            "state": lambda: reader.state(tenant),
            "committed": lambda: reader.state(tenant, "agents"),
        }
        before = {name: await read() for name, read in reads.items()}
        assert all(found.stopped is None for found in before.values())
        for key, dumped in older.items():
            client.restore(key, 0, dumped, replace=True)
        client.delete(keys.published(tenant, "agents"))
        for read in reads.values():
            with pytest.raises(errors.LedgerRolledBack, match="the ledger's head is"):
                await read()
        client.delete(keys.agent_state(tenant, "a"))
        with pytest.raises(errors.LedgerRolledBack, match="the ledger's head is"):
            await reads["agent"]()
        with pytest.raises(errors.LedgerRolledBack):
            await projector.run_once([tenant])
        for name in ("agent", "verdict"):
            with pytest.raises(errors.LedgerRolledBack):
                await reads[name]()
        assert (await reads["state"]()).stopped == "LedgerRolledBack"
    # It grows past what was folded, under the same ordinals: only the projector's mark tells.
    await ledger.append_many(tenant, [decision(n) for n in range(10, 20)])
    for name in ("agent", "verdict"):
        assert (await reads[name]()).stopped == "LedgerRolledBack"
    for name in ("governance", "agents"):
        await Projector(ledger).rebuild(tenant, name, accept_rollback=True)
    found = await reads["agent"](), await reads["verdict"]()
    assert [one.stopped for one in found] == [None, None]
    assert (found[0].decisions.total, found[1].overrides) == (12, 0)


async def test_a_copy_of_an_agent_that_a_rollback_unmade_is_no_state(ledger, server, tenant):
    """What an accepted rollback left behind under an agent's key is not served."""
    await ledger.append_many(tenant, [decision(1), decision(2)])
    await Projector(ledger).run_once([tenant])
    copy = server.cli("GET", keys.agent_state(tenant, "a"))
    unmade = keys.agent_state(tenant, "b")
    server.cli("SET", unmade, copy.replace('"epoch":"', '"epoch":"0'))
    with pytest.raises(errors.NotFound, match="agent 'b'"):
        await StateReader(ledger).agent(tenant, "b")
    # A later release's copy tells of itself alone: what this one once folded is of no concern.
    server.cli("SET", unmade, copy.replace('"version":1', '"version":2'))
    server.cli("HSET", keys.projection(tenant, "agents", 1), "stopped", "EntriesMissing")
    assert (await StateReader(ledger).agent(tenant, "b")).stopped is None
    assert (await StateReader(ledger).agent(tenant, "a")).stopped == "EntriesMissing"


# -- cut off --------------------------------------------------------------------------------------


async def test_a_reader_that_is_cut_off_says_so(valkey, tenant):
    """When the connection hangs, a state is served until the bound, then refused or marked; when
    the server answers again, it is fresh again.
    """
    settings = load_settings(memory_max_reconnect_attempts=2)
    async with Proxy(valkey) as proxy, Ledger.connect(proxy.url, settings=settings) as ledger:
        await ledger.append(tenant, decision(1))
        await Projector(ledger).run_once([tenant])
        async with StateReader(ledger, max_stale_s=0.3) as reader:
            assert not (await reader.governance(tenant)).stale
            proxy.silent = True
            with pytest.raises(errors.StateUnavailable, match="what was read last is at seq 1"):
                await polled(lambda: reader.governance(tenant), lambda state: state.stale)
            stale = await reader.governance(tenant, stale_ok=True)
            assert (stale.stale, stale.seq, stale.decisions.total) == (True, 1, 1)
            with pytest.raises(errors.StateUnavailable):
                await reader.governance(tenant, at_least=2, stale_ok=True, timeout_s=0.1)
            with pytest.raises(errors.StateUnavailable, match="nothing was read before"):
                await reader.governance(f"{tenant}-2", stale_ok=True)
            proxy.silent = False
            await polled(
                lambda: reader.governance(tenant, stale_ok=True), lambda state: not state.stale
            )
            assert not (await reader.governance(tenant)).stale


async def test_a_killed_server_is_said_at_once_to_later_callers(fresh_server, tenant):
    """Once a read has failed, the next callers do not each wait for the server."""
    server = fresh_server()
    settings = load_settings(memory_max_reconnect_attempts=1000)
    async with Ledger.connect(server.url, settings=settings) as ledger:
        await ledger.append(tenant, decision(1))
        await Projector(ledger).run_once([tenant])
        async with StateReader(ledger, max_stale_s=0.3, stale_ok=True) as reader:
            await reader.governance(tenant)
            server.kill()
            await polled(lambda: reader.governance(tenant), lambda state: state.stale)
            sent = ledger.server.generation
            for _ in range(50):
                assert (await reader.governance(tenant)).stale
            assert ledger.server.generation - sent < 10


async def test_watch_survives_a_restart_and_never_goes_back(fresh_server, tenant):
    """A watcher sees each newer state across kills of the server, in order, and says when it is
    cut off where it is asked to.
    """
    server = fresh_server(config={"appendfsync": "always"})
    settings = load_settings(memory_max_reconnect_attempts=1000)
    async with Ledger.connect(server.url, settings=settings) as ledger:
        await ledger.append(tenant, decision(0))
        seen, stale = [], []

        async def watch():
            async for state in reader.watch(tenant):
                seen.append(state.seq)  # noqa: PERF401 - seen while it runs

        async def watch_stale():
            async for state in reader.watch(tenant, stale_ok=True):
                stale.append((state.seq, state.stale))  # noqa: PERF401 - as above

        projector = Projector(ledger)
        await projector.run_once([tenant])
        async with StateReader(ledger, max_stale_s=0.4) as reader:
            watchers = [asyncio.create_task(watch()), asyncio.create_task(watch_stale())]
            await until(lambda: seen)
            for number in range(1, 4):
                server.kill()
                cut_off = len(stale)
                if number == 1:
                    await until(lambda: stale[-1][1])
                server.restart()
                await ledger.append(tenant, decision(number))
                await projector.run_once([tenant])
                await until(lambda: seen[-1] == number + 1)  # noqa: B023
                assert len(stale) >= cut_off
            await until(lambda: stale[-1] == (4, False))
            for task in watchers:
                task.cancel()
            await asyncio.wait(watchers)
    assert seen == sorted(set(seen))
    fresh = [seq for seq, is_stale in stale if not is_stale]
    assert fresh == sorted(fresh)
    assert (1, True) in stale


async def test_watch_begins_with_the_first_state(ledger, tenant):
    """A watcher of a tenant that has recorded nothing waits for its first state."""
    async with StateReader(ledger) as reader, running(Projector(ledger)):
        states = reader.watch(tenant)
        first = asyncio.ensure_future(anext(states))
        await ledger.append(tenant, decision(1))
        async with asyncio.timeout(20):
            assert (await first).seq == 1
        await states.aclose()


async def test_a_reader_ends_with_its_ledger(server, tenant):
    """Closing the ledger ends what the reader has in the background."""
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, decision(1))
        await Projector(ledger).run_once([tenant])
        reader = StateReader(ledger, max_stale_s=0.2)
        await reader.governance(tenant)
        await reader.governance(tenant)
        tasks = list(reader._cache._tasks)
        assert tasks
    done, _ = await asyncio.wait(tasks, timeout=20)
    assert len(done) == len(tasks)
    assert not any(task.exception() for task in tasks if not task.cancelled())


async def test_what_nobody_asks_for_is_dropped(ledger, tenant, monkeypatch):
    """A tenant that nobody reads any more costs neither memory nor checks."""
    monkeypatch.setattr("projections.cache.IDLE_S", 0.1)
    await ledger.append(tenant, decision(1))
    await Projector(ledger).run_once([tenant])
    async with StateReader(ledger, max_stale_s=0.2) as reader:
        await reader.governance(tenant)
        await reader.governance(tenant)
        tasks = list(reader._cache._tasks)
        await until(lambda: not reader._cache._entries)
        await asyncio.wait(tasks, timeout=20)
        assert (await reader.governance(tenant)).seq == 1
        assert (await reader.governance(tenant)).seq == 1
        assert len(reader._cache._tasks) == 2


async def test_readers_without_a_right_to_the_channel_still_keep_the_bound(server, tenant):
    """An ACL that denies the channel costs promptness, not truth; nor does one that denies the
    projector to send.
    """
    user = f"u-{tenant}"
    rules = ["reset", "on", ">pw", "resetchannels", "~*", "+@all"]
    server.cli("ACL", "SETUSER", user, *rules)
    url = server.url.replace("redis://", f"redis://{user}:pw@").replace("unix://", "unix://")
    async with Ledger.connect(url) as ledger:
        await ledger.append(tenant, decision(1))
        projector = Projector(ledger)
        await projector.run_once([tenant])
        async with StateReader(ledger, max_stale_s=0.4) as reader:
            await reader.governance(tenant)
            await reader.governance(tenant)
            await until(lambda: reader._cache._notices._denied)
            await ledger.append(tenant, decision(2))
            await projector.run_once([tenant])
            await polled(lambda: reader.governance(tenant), lambda state: state.seq == 2)


@pytest.mark.parametrize("hears", [False, True])
async def test_the_rights_of_the_readme_suffice_to_read(server, tenant, hears):
    """With the analyst's rights one reads now and then; with the channel's one is told of news."""
    user, rules = f"r-{tenant}", [
        *("reset", "on", ">pw", "resetchannels", "-@all", "+@connection"),
        *(f"%R~claude-flow:ledger:{{{tenant}}}:*", f"%R~claude-flow:memory:{tenant}:*"),
        *("+@read", "-@dangerous", "-scan", "-randomkey"),
    ]  # fmt: skip
    if hears:
        rules += [f"&claude-flow:memory:{tenant}:*", "+subscribe", "+unsubscribe"]
    server.cli("ACL", "SETUSER", user, *rules)
    url = server.url.replace("redis://", f"redis://{user}:pw@")
    async with Ledger.connect(server.url) as writer, Ledger.connect(url) as ledger:
        projector = Projector(writer)
        await writer.append(tenant, decision(1))
        await projector.run_once([tenant])
        async with StateReader(ledger, max_stale_s=3600 if hears else 0.4) as reader:
            watching = reader.watch(tenant)
            assert (await anext(watching)).seq == 1
            await writer.append(tenant, decision(2))
            await projector.run_once([tenant])
            assert (await asyncio.wait_for(anext(watching), 20)).seq == 2
            assert (await reader.governance(tenant, as_of=1)).seq == 1
            assert bool(reader._cache._notices._denied) is not hears
            await watching.aclose()


async def test_states_in_a_cluster(cluster, tenant):
    """Reading, notices and watching work where each key lives on another node."""
    async with Ledger.connect(cluster.url) as ledger:
        names = [f"{tenant}-{n}" for n in range(6)]
        projector = Projector(ledger)
        async with StateReader(ledger, max_stale_s=1) as reader:
            for name in names:
                await ledger.append(name, decision(1))
            await projector.run_once(names)
            for name in names:
                assert (await reader.governance(name)).seq == 1
            watching = reader.watch(names[0])
            await anext(watching)
            for name in names:
                await ledger.append(name, decision(2))
            await projector.run_once(names)
            async with asyncio.timeout(20):
                assert (await anext(watching)).seq == 2
                for name in names:
                    assert (await reader.governance(name, at_least=2)).decisions.total == 2
            await watching.aclose()


async def test_a_closed_reader_says_so_and_its_watchers_end(ledger, tenant):
    """After aclose nothing is served from memory, and nobody waits for ever."""
    await ledger.append(tenant, decision(1))
    await Projector(ledger).run_once([tenant])
    reader = StateReader(ledger)
    watching = reader.watch(tenant)
    assert (await anext(watching)).seq == 1
    waiting = asyncio.ensure_future(anext(watching, None))
    await asyncio.sleep(0)
    await reader.aclose()
    assert await asyncio.wait_for(waiting, 20) is None
    with pytest.raises(errors.StateUnavailable, match="reader was closed"):
        await reader.governance(tenant, stale_ok=True)


async def test_a_dropped_tenant_is_not_read_older_than_before(ledger, server, tenant, monkeypatch):
    """How far a tenant was read is remembered when it has to make room for another."""
    monkeypatch.setattr("projections.cache.TENANTS_KEPT", 1)
    other = f"{tenant}-2"
    projector = Projector(ledger)
    for name in (tenant, other):
        await ledger.append(name, decision(1))
    await projector.run_once([tenant, other])
    old = server.cli("GET", keys.governance_state(tenant))
    await ledger.append(tenant, decision(2))
    await projector.run_once([tenant])
    async with StateReader(ledger) as reader:
        assert (await reader.governance(tenant)).seq == 2
        assert (await reader.governance(other)).seq == 1
        assert list(reader._cache._entries) == [other]
        server.cli("SET", keys.governance_state(tenant), old)
        assert (await reader.governance(tenant)).seq == 2


async def test_a_version_that_this_release_does_not_fold_is_read_from_its_copy_alone(
    ledger, server, tenant
):
    """Where readers take another version, what is committed of ours is no state of now."""
    await ledger.append(tenant, decision(1))
    await Projector(ledger).run_once([tenant])
    server.cli("HSET", keys.projection_active(tenant), "governance", 2)
    async with StateReader(ledger) as reader:
        assert (await reader.governance(tenant)).source == "published"
        server.cli("DEL", keys.governance_state(tenant))
        reader._cache._entries[tenant].fresh_until = float("-inf")
        with pytest.raises(errors.StateUnavailable, match="does not fold"):
            await reader.governance(tenant)
        assert (await reader.governance(tenant, stale_ok=True)).stale


async def test_a_projector_that_stopped_is_named(ledger, server, tenant):
    """Readers and watchers learn why a state does not go on, and when it does again."""
    receipts = await ledger.append_many(tenant, [decision(1), decision(2)])
    projector = Projector(ledger)
    await projector.run_once([tenant])
    async with StateReader(ledger, max_stale_s=0.4) as reader:
        watching = reader.watch(tenant)
        assert (await anext(watching)).stopped is None
        (hole,) = await ledger.append_many(tenant, [decision(3)])
        server.cli("XDEL", keys.decisions(tenant), hole.entry_id)
        with pytest.raises(errors.EntriesMissing):
            await projector.run_once([tenant])
        said = await asyncio.wait_for(anext(watching), 20)
        assert (said.seq, said.stopped) == (2, "EntriesMissing")
        assert said.position == receipts[1].position
        await watching.aclose()


# -- one decision ---------------------------------------------------------------------------------


async def test_effective_verdict_of_a_decision(ledger, tenant):
    """The engine's verdict until people resolve or override it; what the engine said stays."""
    events = [
        decision(1, "escalate"),
        decision(2, "deny"),
        decision(3, "allow"),
        decision(4, "escalate"),
        EscalationResolved(decision_id="d-1", resolution="approved", reviewer="r"),
        Overridden(
            decision_id="d-2", reviewer="r", from_verdict="deny", to_verdict="allow",
            justification="j",
        ),
    ]  # fmt: skip
    await ledger.append_many(tenant, events)
    reader = StateReader(ledger)
    before = await reader.effective_verdict(tenant, "d-1")
    assert (before.verdict, before.effective, before.pending) == ("escalate", "escalate", True)
    assert before.position is None
    await Projector(ledger).run_once([tenant])
    one, two, three, four = [await reader.effective_verdict(tenant, f"d-{n}") for n in range(1, 5)]
    assert (one.effective, one.resolution, one.pending, one.seq) == ("allow", "approved", False, 1)
    assert (two.verdict, two.effective, two.overrides) == ("deny", "allow", 1)
    assert (three.effective, three.overrides, three.pending) == ("allow", 0, False)
    assert (four.effective, four.pending, four.position.seq) == ("escalate", True, 6)
    with pytest.raises(errors.NotFound, match="no decision has the id"):
        await reader.effective_verdict(tenant, "d-9")
    with pytest.raises(errors.NotFound, match="no decision has the id"):
        await reader.effective_verdict(tenant, events[4].id)


def test_the_reader_without_an_event_loop(valkey, tenant):
    """Notebooks read, wait, look back and watch without await."""
    with sync_ledger.Ledger.connect(valkey.url) as ledger, StateReaderSync(ledger) as reader:
        receipt = ledger.append(tenant, decision(1, "deny"))
        ledger.run(Projector(ledger.wrapped).run_once([tenant]))
        assert reader.governance(tenant, at_least=receipt).decisions.by_verdict.deny == 1
        assert reader.governance(tenant, as_of=1).source == "folded"
        assert reader.state(tenant).seq == 1
        assert reader.effective_verdict(tenant, "d-1").effective == "deny"
        states = reader.watch(tenant)
        assert next(states).seq == 1
        ledger.append(tenant, decision(2))
        ledger.run(Projector(ledger.wrapped).run_once([tenant]))
        assert next(states).seq == 2
        states.close()
        with pytest.raises(errors.NotFound):
            reader.agent(tenant, "nobody")


async def test_an_agent_is_read_typed_from_its_copy_or_what_is_committed(ledger, server, tenant):
    """One agent's counts and trust, in full, whether its copy is there, strange, or gone."""
    await ledger.append_many(tenant, [decision(1, "deny"), decision(2)])
    await Projector(ledger).run_once([tenant])
    reader, key = StateReader(ledger), keys.agent_state(tenant, "a")
    copy = await reader.agent(tenant, "a")
    assert (copy.source, copy.seq, copy.decisions.total) == ("published", 2, 2)
    assert (copy.consecutive_denials, copy.trust.tier) == (0, "trusted")
    assert_known(copy, orjson.loads(server.cli("GET", key))["value"])
    for damage in (("SET", key, "[]"), ("DEL", key), ("RPUSH", key, "x")):
        server.cli(*damage)
        found = await reader.agent(tenant, "a")
        assert found == msgspec.structs.replace(copy, source="committed")
    with pytest.raises(errors.NotFound, match="agent 'b'"):
        await reader.agent(tenant, "b")
