"""Fold, commit, publish: exact under races, kills and lost copies."""

import asyncio
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import orjson
import pytest

from ledger import Decision, EscalationResolved, Ledger, Outcome, errors, keys
from projections import Projector, StateReader, Unfoldable
from projections.status import statuses
from projections.store import FoldStore, encode_entity


class Counter:
    """A small projection of one's own: decisions by verdict, outcomes by decision."""

    name = "counter"
    version = 1

    def names(self, entry):
        decision_id = entry.event.get("decision_id")
        return ("state", f"decision:{decision_id}") if decision_id else ("state",)

    def apply(self, entities, entry, subject):
        event = entry.event
        if event.get("metadata", {}).get("unfoldable"):
            raise Unfoldable("it says so")
        state = entities.setdefault("state", {})
        kind = event.get("verdict") or (entry.type if subject else "orphan")
        state[kind] = state.get(kind, 0) + 1
        if subject:
            entity = entities.setdefault(f"decision:{subject.id}", {"follow_ups": 0})
            entity["follow_ups"] += 1
            entity["subject_seq"] = subject.seq

    def quarantined(self, entities, entry):
        state = entities.setdefault("state", {})
        state["quarantined"] = state.get("quarantined", 0) + 1

    def view(self, state):
        return dict(state)


def decision(number, verdict="allow"):
    return Decision(id=f"d-{number}", agent="a", action="act", verdict=verdict)


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


def governance_key(server, tenant):
    return server.cli("GET", keys.governance_state(tenant))


async def test_state_is_published_under_the_guides_key(ledger, server, tenant):
    """governance:state is the guide's envelope, with metadata last and the default TTL."""
    receipt = await ledger.append(tenant, decision(1, "deny"))
    await Projector(ledger).run_once([tenant])
    raw = governance_key(server, tenant)
    envelope = orjson.loads(raw)
    assert list(envelope) == ["value", "createdAt", "updatedAt", "metadata"]
    assert envelope["metadata"] == {
        "epoch": receipt.epoch,
        "position": receipt.entry_id,
        "seq": 1,
        "projection": "governance",
        "version": 1,
    }
    assert 86_000 < server.cli("TTL", keys.governance_state(tenant)) <= 86_400
    created = envelope["createdAt"]
    await ledger.append(tenant, decision(2))
    await Projector(ledger).run_once([tenant])
    assert orjson.loads(governance_key(server, tenant))["createdAt"] == created


async def test_reader_waits_for_its_own_write(ledger, tenant):
    """at_least=receipt returns a state that has folded that event, as soon as there is one."""
    reader = StateReader(ledger)
    async with running(Projector(ledger)):
        for number in range(5):
            receipt = await ledger.append(tenant, decision(number))
            state = await reader.state(tenant, at_least=receipt)
            assert state.seq >= receipt.seq
            assert state.value["decisions"]["total"] == number + 1


async def test_one_projector_folds_a_tenant_for_one_caller_at_a_time(ledger, tenant):
    """Calls on one object share what is in memory: each is right, and one that is cancelled takes
    no other with it.
    """
    await ledger.append_many(tenant, [decision(number) for number in range(50)])
    projector = Projector(ledger)
    first, second, cancelled = (asyncio.create_task(projector.run_once([tenant])) for _ in range(3))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert sorted([(await first)[tenant], (await second)[tenant]]) == [0, 50]
    state = await StateReader(ledger).state(tenant)
    assert (state.seq, state.value["decisions"]["total"], state.stopped) == (50, 50, None)


async def test_not_caught_up_is_said(ledger, tenant):
    """Without a projector the wait ends by name, with both numbers."""
    await ledger.append(tenant, decision(1))
    reader = StateReader(ledger)
    with pytest.raises(errors.NotFound, match="folded none"):
        await reader.state(tenant)
    with pytest.raises(errors.NotCaughtUp, match="has folded to seq 0, not to 1") as caught:
        await reader.state(tenant, at_least=1, timeout_s=0.05)
    assert (caught.value.facts["wanted"], caught.value.facts["folded"]) == (1, 0)


async def test_fold_in_any_pages_is_the_same_bytes(ledger, tenant):
    """One page or many, with follow-ups that reach far back: the committed entities are equal."""
    events = []
    for number in range(60):
        events.append(decision(number, ("allow", "deny", "escalate")[number % 3]))
        events.append(Outcome(decision_id=f"d-{number // 2}", outcome="succeeded"))
    events.append(Outcome(decision_id="d-never", outcome="failed"))
    await ledger.append_many(tenant, events)
    wholes = []
    projector = Projector(ledger, [Counter()])
    fold = projector._fold_of(tenant, projector.projections[0])
    for page_entries in (1000, 7, 1):
        fold.forget()
        await fold.store.discard()
        while fold.seq < len(events):
            walk = await fold.begin()
            walk.page_entries = page_entries
            async for page in walk.pages():
                await fold.fold_page(walk, page)
        names = ["state", *(f"decision:d-{number}" for number in range(60)), "decision:d-never"]
        wholes.append(encode_entity(await fold.store.load(dict.fromkeys(names, 0))))
    assert wholes[0] == wholes[1] == wholes[2]
    assert orjson.loads(wholes[0])["state"] == {
        "allow": 20, "deny": 20, "escalate": 20, "outcome.reported": 60, "orphan": 1,
    }  # fmt: skip


async def test_two_projectors_never_count_twice(ledger, tenant):
    """Two live projectors race on one tenant while it is written: the counts are exact."""
    one, two = Projector(ledger, [Counter()]), Projector(ledger, [Counter()])
    async with running(one), running(two):
        for start in range(0, 400, 20):
            await ledger.append_many(tenant, [decision(start + n) for n in range(20)])
        reader = StateReader(ledger, [Counter()])
        state = await reader.state(tenant, "counter", at_least=400)
    assert state.value == {"allow": 400}


async def test_commit_from_an_old_position_is_refused(ledger, tenant):
    """A projector that was overtaken cannot commit what it folded before."""
    await ledger.append_many(tenant, [decision(n) for n in range(3)])
    slow, fast = Projector(ledger, [Counter()]), Projector(ledger, [Counter()])
    fold = slow._fold_of(tenant, slow.projections[0])
    walk = await fold.begin()
    await fast.run_once([tenant])
    pages = [page async for page in walk.pages()]
    with pytest.raises(errors.CommitConflict):
        await fold.fold_page(walk, pages[0])
    await slow.run_once([tenant])
    assert (await StateReader(ledger, [Counter()]).state(tenant, "counter")).value == {"allow": 3}


async def test_publishing_never_goes_back(ledger, tenant):
    """An older state of the same epoch does not replace a later one."""
    await ledger.append(tenant, decision(1))
    projector = Projector(ledger, [Counter()])
    await projector.run_once([tenant])
    fold = projector._fold_of(tenant, projector.projections[0])
    old, old_state = fold.committed, dict(fold.state)
    await ledger.append(tenant, decision(2))
    await projector.run_once([tenant])
    assert not await fold.store.publish(old, old_state, 60)
    assert (await fold.store.read_published()).seq == 2


async def test_lost_copy_is_read_from_the_committed_state_and_comes_back(ledger, server, tenant):
    """A deleted published key never looks like "no decision", and a live projector restores it."""
    receipt = await ledger.append(tenant, decision(1))
    reader = StateReader(ledger)
    projector = Projector(ledger)
    await projector.run_once([tenant])
    server.cli("DEL", keys.governance_state(tenant))
    state = await reader.state(tenant)
    assert (state.source, state.seq, state.value["decisions"]["total"]) == ("committed", 1, 1)
    assert tenant in await projector.stale_tenants()
    await projector.run_once([tenant])
    assert (await reader.state(tenant, at_least=receipt)).source == "published"


async def test_rebuild_replaces_a_damaged_fold(ledger, server, tenant):
    """Rebuild folds from the first entry and puts the result in place, for live projectors too."""
    await ledger.append_many(tenant, [decision(n) for n in range(10)])
    projector = Projector(ledger, [Counter()])
    await projector.run_once([tenant])
    server.cli("HSET", keys.projection(tenant, "counter", 1), "state", '{"allow":999}')
    other = Projector(ledger, [Counter()])
    await other.run_once([tenant])  # holds the damaged state in memory
    assert await Projector(ledger, [Counter()]).rebuild(tenant, "counter") == 10
    await ledger.append(tenant, decision(10))
    await other.run_once([tenant])
    state = await StateReader(ledger, [Counter()]).state(tenant, "counter", at_least=11)
    assert state.value == {"allow": 11}
    left = server.cli("KEYS", f"*{tenant}*rebuild*")
    assert left == []


async def test_unfoldable_entry_is_quarantined_and_the_fold_goes_on(ledger, server, tenant):
    """What a version cannot fold is kept apart with its reason, and counted."""
    bad = Decision(agent="a", action="b", verdict="allow", metadata={"unfoldable": True})
    await ledger.append_many(tenant, [decision(1), bad, decision(2)])
    await Projector(ledger, [Counter()]).run_once([tenant])
    quarantine = server.cli("HGETALL", keys.projection_quarantine(tenant))
    assert quarantine == {"counter@1:2": "it says so"}
    state = await StateReader(ledger, [Counter()]).state(tenant, "counter", at_least=3)
    assert state.value == {"allow": 2, "quarantined": 1}


async def test_foreign_entry_is_stepped_over(ledger, server, tenant):
    """A foreign entry moves the position and changes nothing else."""
    await ledger.append(tenant, decision(1))
    server.cli("XADD", keys.decisions(tenant), "*", "type", "decision.recorded")
    projector = Projector(ledger, [Counter()])
    await projector.run_once([tenant])
    assert projector._fold_of(tenant, projector.projections[0]).seq == 1
    await ledger.append(tenant, decision(2))
    await projector.run_once([tenant])
    state = await StateReader(ledger, [Counter()]).state(tenant, "counter")
    assert (state.seq, state.value) == (3, {"allow": 2})


async def test_rolled_back_ledger_stops_its_tenant_by_name(ledger, server, tenant):
    """A head behind the committed position is an error of that tenant; others are folded on."""
    other = f"{tenant}-other"
    await ledger.append_many(tenant, [decision(n) for n in range(5)])
    projector = Projector(ledger, [Counter()])
    await projector.run_once([tenant])
    server.cli("DEL", keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    await ledger.append(tenant, decision(0))
    with pytest.raises(errors.LedgerRolledBack, match=tenant):
        await projector.run_once([tenant])
    async with running(projector):
        receipt = await ledger.append(other, decision(1))
        await StateReader(ledger, [Counter()]).state(other, "counter", at_least=receipt)
    with pytest.raises(errors.LedgerRolledBack, match="folded to"):
        await projector.rebuild(tenant, "counter")
    stopped = await StateReader(ledger, [Counter()]).state(tenant, "counter")
    assert (stopped.stopped, stopped.seq) == ("LedgerRolledBack", 5)
    await projector.rebuild(tenant, "counter", accept_rollback=True)
    state = await StateReader(ledger, [Counter()]).state(tenant, "counter")
    assert (state.seq, state.value, state.stopped) == (1, {"allow": 1}, None)


async def test_a_fold_that_stops_again_at_the_same_entry_says_so_again(ledger, server, tenant):
    """Stopped, put right with no entry to fold, and stopped once more: readers are told twice."""
    await ledger.append_many(tenant, [decision(n) for n in range(5)])
    projector, head = Projector(ledger, [Counter()]), keys.head(tenant)
    store = projector.store(tenant, "counter")
    await projector.run_once([tenant])
    with server.client() as client:
        right = client.dump(head)
        for _ in range(2):
            client.hset(head, "seq", 3)
            with pytest.raises(errors.LedgerRolledBack):
                await projector.run_once([tenant])
            assert await store.stopped() == "LedgerRolledBack"
            client.restore(head, 0, right, replace=True)
            await projector.run_once([tenant])
            assert await store.stopped() is None


async def test_hole_stops_the_fold(ledger, server, tenant):
    """A deleted entry that was not folded yet is an error, not a smaller count."""
    receipts = await ledger.append_many(tenant, [decision(n) for n in range(5)])
    server.cli("XDEL", keys.decisions(tenant), receipts[2].entry_id)
    with pytest.raises(errors.EntriesMissing, match="seq 3"):
        await Projector(ledger, [Counter()]).run_once([tenant])


PROJECT = """
import asyncio, sys
from ledger import Ledger
from projections import Projector
async def main():
    async with Ledger.connect(sys.argv[1]) as ledger:
        print("up", flush=True)
        await Projector(ledger).run()
asyncio.run(main())
"""


async def test_killed_projectors_lose_and_repeat_nothing(ledger, server, tenant, spawn):
    """Kill -9 of projectors in the middle of their work, again and again: the state is exact."""
    reader = StateReader(ledger)
    total = 0
    for _ in range(3):
        worker = spawn([sys.executable, "-c", PROJECT, server.url], stdout=subprocess.PIPE)
        worker.stdout.readline()
        for _ in range(3):
            events = [decision(total + n, "escalate") for n in range(40)]
            events += [
                EscalationResolved(decision_id=f"d-{total + n}", resolution="approved")
                for n in range(20)
            ]
            await ledger.append_many(tenant, events)
            total += 40
        receipt = await ledger.head(tenant)
        with suppress(errors.NotCaughtUp):
            await reader.state(tenant, at_least=receipt.seq // 2, timeout_s=5)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        # How long its leases stand is another test's concern.
        server.cli("DEL", *[keys.lease(tenant, name, 1) for name in ("governance", "agents")])
    await Projector(ledger).run_once([tenant])
    value = (await reader.state(tenant, at_least=(await ledger.head(tenant)).seq)).value
    assert value["decisions"]["total"] == total
    assert value["escalations"]["pending"] == total // 2
    live = encode_entity(value)
    await Projector(ledger).rebuild(tenant)
    assert encode_entity((await reader.state(tenant)).value) == live


async def test_concurrent_first_commits_agree(ledger, tenant):
    """Two projectors that both meet a new tenant leave one state with one count."""
    await ledger.append_many(tenant, [decision(n) for n in range(50)])
    both = [Projector(ledger, [Counter()]) for _ in range(2)]
    await asyncio.gather(*(projector.run_once([tenant]) for projector in both))
    store = FoldStore(ledger.server, tenant, Counter())
    assert (await store.load({"state": 0}))["state"] == {"allow": 50}


async def test_cancelled_projector_ends_whatever_it_was_doing(ledger, tenant):
    """A cancellation at any moment of a fold ends the projector; it is never swallowed."""
    await ledger.append_many(tenant, [decision(n) for n in range(30)])
    for pause_s in (0, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01):
        projector = Projector(ledger, [Counter()])
        task = asyncio.create_task(projector.run())
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="deny"))
        await asyncio.sleep(pause_s)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=10)
        assert done
        assert task.cancelled()


async def test_walk_that_is_dropped_while_it_reads_ahead_keeps_its_callers_cancellation(
    ledger, tenant
):
    """Closing a walk waits for the page being read ahead; a cancellation then is the caller's."""
    await ledger.append_many(tenant, [decision(n) for n in range(50)])
    for pause_s in (0, 0.0002, 0.0005, 0.001):

        async def read():
            while True:
                walk = await ledger.walk(tenant)
                walk.page_entries = 5
                pages = walk.pages()
                await anext(pages)
                await pages.aclose()

        task = asyncio.create_task(read())
        await asyncio.sleep(0.02 + pause_s)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=10)
        assert done
        assert task.cancelled()


@pytest.mark.parametrize(
    "damage", [("HSET", "seq", "abc"), ("HSET", "id", "x"), ("DEL",), ("SET",)]
)
async def test_damaged_head_stops_its_tenant_alone(ledger, server, tenant, damage):
    """A head that somebody damaged is named; other tenants are folded, live and once."""
    other, head = f"{tenant}-other", keys.head(tenant)
    await ledger.append(tenant, decision(1))
    await ledger.append(other, decision(1))
    command, *rest = damage
    if command == "SET":
        server.cli("DEL", head)
        rest = ["text"]
    server.cli(command, head, *rest)
    once = Projector(ledger, [Counter()])
    with pytest.raises(errors.LedgerError):
        await once.run_once([tenant, other])
    reader = StateReader(ledger, [Counter()])
    assert (await reader.state(other, "counter")).value == {"allow": 1}
    live = Projector(ledger, [Counter()])
    receipt = await ledger.append(other, decision(2))
    assert await live._stale_among([tenant, other]) == [other]
    async with running(live):
        await reader.state(other, "counter", at_least=receipt)


async def test_incidents_that_nobody_noticed_are_no_hang(ledger, server, tenant):
    """A counter of incidents that was set absurdly high is damage, and found at once."""
    await ledger.append(tenant, decision(1))
    server.cli("HSET", keys.head(tenant), "incidents", "30000000")
    with pytest.raises(errors.IndexBehind, match="damaged"):
        [entry async for entry in ledger.replay(tenant)]


async def test_feed_of_another_hand_wakes_nobody(ledger, server, tenant):
    """What somebody else writes into the feed neither ends nor misleads the projector."""
    reader = StateReader(ledger, [Counter()])
    async with running(Projector(ledger, [Counter()])):
        server.cli("XADD", keys.FEED, "*", "tenant", "no:tenant*")
        server.cli("XADD", keys.FEED, "*", "x", b"\xff")
        receipt = await ledger.append(tenant, decision(1))
        assert (await reader.state(tenant, "counter", at_least=receipt)).seq == 1


async def test_fold_that_was_overtaken_while_it_began_is_not_taken_for_done(ledger, tenant):
    """Two folds to the same position: the second commit is a conflict, never "our own"."""
    await ledger.append_many(tenant, [decision(n) for n in range(4)])
    one, two = (Projector(ledger, [Counter()]) for _ in range(2))
    await one.run_once([tenant])
    fold = two._fold_of(tenant, two.projections[0])
    await fold.begin()
    await ledger.append(tenant, decision(4))
    walk = await fold.begin()
    pages = [page async for page in walk.pages()]
    await one.run_once([tenant])
    fold._entities["state"] = {"allow": 5}  # as if it had been read after the other's commit
    with pytest.raises(errors.CommitConflict):
        await fold.fold_page(walk, pages[0])
    await two.run_once([tenant])
    assert fold.state == {"allow": 5}


@pytest.mark.parametrize("field", ["all", "state", "position", "garbage"])
async def test_derived_state_that_is_deleted_comes_back_right(ledger, server, tenant, field):
    """Whatever is deleted of a projection, the fold begins anew and counts nothing twice."""
    events = [decision(1), Outcome(decision_id="d-1", outcome="succeeded"), decision(2)]
    await ledger.append_many(tenant, events)
    await Projector(ledger, [Counter()]).run_once([tenant])
    key = keys.projection(tenant, "counter", 1)
    if field == "all":
        server.cli("DEL", key)
    elif field == "garbage":
        server.cli("HSET", key, "state", "{")
    else:
        server.cli("HDEL", key, field)
    projector = Projector(ledger, [Counter()])
    await projector.run_once([tenant])
    fold = projector._fold_of(tenant, projector.projections[0])
    assert fold.state == {"allow": 2, "outcome.reported": 1}
    assert (await fold.store.load({"decision:d-1": 0}))["decision:d-1"]["follow_ups"] == 1


async def test_publish_that_failed_is_tried_again(ledger, server, tenant):
    """A state that was committed and not published is found by the next sweep."""
    await ledger.append(tenant, decision(1))
    projector = Projector(ledger, [Counter()])
    await projector.run_once([tenant])
    await ledger.append(tenant, decision(2))
    await projector._catch_up(projector._fold_of(tenant, projector.projections[0]))
    assert tenant in await projector.stale_tenants()


@pytest.mark.parametrize("copy", [b"[]", b'{"metadata":{"position":"zz","seq":1}}', b"text"])
async def test_strange_published_copy_is_no_state(ledger, server, tenant, copy):
    """What somebody else put under the published key is not read as state."""
    await ledger.append(tenant, decision(1))
    await Projector(ledger, [Counter()]).run_once([tenant])
    server.cli("SET", keys.published(tenant, "counter"), copy)
    reader = StateReader(ledger, [Counter()])
    assert (await reader.state(tenant, "counter")).source == "committed"
    server.cli("DEL", keys.published(tenant, "counter"))
    server.cli("RPUSH", keys.published(tenant, "counter"), "x")
    assert (await reader.state(tenant, "counter")).source == "committed"


async def test_a_damaged_position_is_named(ledger, server, tenant):
    """What somebody wrote over a fold's position is shown as that, and the next fold mends it; of
    another epoch's fold every entry is still to come.
    """
    await ledger.append(tenant, decision(1))
    await Projector(ledger, [Counter()]).run_once([tenant])
    for position in ("x", "1/2/3/4", b"\xff"):
        server.cli("HSET", keys.projection(tenant, "counter", 1), "position", position)
        (found,) = [one async for one in statuses(ledger, [tenant], [Counter()])]
        assert (found.position, found.stopped, found.lag_entries) == (None, "damaged", 1)
    await Projector(ledger, [Counter()]).run_once([tenant])
    (found,) = [one async for one in statuses(ledger, [tenant], [Counter()])]
    assert (found.position.seq, found.stopped, found.lag_entries) == (1, None, 0)
    elsewhere = str(found.position._replace(epoch="0123456789abcdef"))
    server.cli("HSET", keys.projection(tenant, "counter", 1), "position", elsewhere)
    (found,) = [one async for one in statuses(ledger, [tenant], [Counter()])]
    assert (found.position.seq, found.lag_entries) == (1, 1)
    assert found.lag_seconds > 0
