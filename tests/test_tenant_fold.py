"""One tenant's fold in memory: what is at hand does not matter, nor how the entries were cut."""

import asyncio

import orjson
import pytest

from ledger import EscalationResolved, Feedback, Ledger, Outcome, errors, keys
from ledger.stream import Entry
from projections import Governance, Projector, StateReader
from projections.store import FoldStore, encode_entity
from projections.tenant_fold import TenantFold
from tests.test_projector import Counter, decision


@pytest.fixture
async def ledger(valkey):
    async with Ledger.connect(valkey.url) as opened:
        yield opened


def followed_up(count):
    """Decisions, each with follow-ups soon and late, in an order that crosses pages."""
    for number in range(count):
        yield decision(number, ("allow", "deny", "escalate")[number % 3])
        yield Outcome(decision_id=f"d-{number}", outcome="succeeded")
        for earlier in (number // 2, number // 7):
            yield Feedback(
                decision_id=f"d-{earlier}", reviewer=f"r-{number % 4}", feedback="negative"
            )
        yield EscalationResolved(decision_id=f"d-{number - 5}", resolution="rejected")
        yield Outcome(decision_id=f"d-{number + 3}", outcome="failed")


@pytest.mark.parametrize("projection", [Counter, Governance])
async def test_what_is_kept_in_memory_does_not_matter(ledger, tenant, projection, monkeypatch):
    """With next to nothing at hand, and everything read again, a fold commits the same bytes."""
    events = list(followed_up(40))
    await ledger.append_many(tenant, events)
    names = ["state", *(f"decision:d-{number}" for number in range(-5, 43))]
    projector, wholes = Projector(ledger), []
    for page_entries, kept in ((1000, 1000), (1000, 1), (16, 1000), (16, 3), (16, 0), (1, 0)):
        monkeypatch.setattr("projections.subjects.KEPT", kept)
        monkeypatch.setattr("projections.tenant_fold.ENTITIES_KEPT", kept)
        projector._folds.clear()
        fold = projector._fold_of(tenant, projection())
        await fold.store.discard()
        walk = await fold.begin()
        walk.page_entries = page_entries
        async for page in walk.pages():
            await fold.fold_page(walk, page)
        wholes.append(encode_entity(await fold.store.load(dict.fromkeys(names, 0))))
        assert fold.seq == len(events)
    assert len(set(wholes)) == 1
    assert len(orjson.loads(wholes[0])) == 41


async def test_first_follow_up_of_a_decision_looks_nothing_up(ledger, server, tenant):
    """What cannot exist is not asked for: a fold of fresh decisions costs no read for each."""
    await ledger.append_many(
        tenant,
        [
            event
            for number in range(100)
            for event in (decision(number), Outcome(decision_id=f"d-{number}", outcome="failed"))
        ],
    )
    server.cli("CONFIG", "RESETSTAT")
    projector = Projector(ledger)
    fold = projector._fold_of(tenant, Governance())
    walk = await fold.begin()
    async for page in walk.pages():
        await fold.fold_page(walk, page)
    calls = server.cli("INFO", "commandstats")
    assert "cmdstat_hget" not in calls
    assert fold.state["outcomes"]["failed"] == 100
    projector._folds.clear()
    again = projector._fold_of(tenant, Governance())
    await ledger.append(tenant, Outcome(decision_id="d-1", outcome="succeeded"))
    walk = await again.begin()
    async for page in walk.pages():
        await again.fold_page(walk, page)
    loaded = await again.store.load({"decision:d-1": 0, "decision:d-2": 0})
    assert [one["outcome"] for one in loaded.values()] == ["succeeded", "failed"]


def raw_entry(tenant, seq, data, kind=b"decision.recorded", event_id=b"x"):
    fields = [b"type", kind, b"id", event_id, b"data", data]
    return Entry(tenant, seq, b"1772539200000-%d" % seq, fields)


@pytest.mark.parametrize("projection", [Counter, Governance])
async def test_unreadable_data_is_quarantined_by_every_projection(ledger, tenant, projection):
    """What is no JSON object is refused with its reason, and what follows it is an orphan."""
    fold = Projector(ledger)._fold_of(tenant, projection())
    outcome = orjson.dumps(
        {"type": "outcome.reported", "decision_id": "d-1", "outcome": "failed", "id": "o"}
    )
    _, refused = await fold.apply(
        [
            raw_entry(tenant, 1, b"{", event_id=b"d-1"),
            raw_entry(tenant, 2, outcome, b"outcome.reported", b"o"),
            raw_entry(tenant, 3, b"[]"),
            raw_entry(tenant, 4, b"7", b"outcome.reported"),
            raw_entry(tenant, 5, b'{"type":"weather.reported"}', b"weather.reported", b"w"),
        ]
    )
    assert sorted(refused) == [1, 3, 4]
    assert all("JSON" in reason for reason in refused.values())
    assert fold.state["quarantined"] == 3
    assert projection is Counter or set(fold._entities) == {"state"}
    orphans = fold.state.get("orphan") or fold.state["orphans"]["outcome.reported"]
    assert orphans in (1, 2)


class Curious(Counter):
    """Reads the decision that an entry follows, as a dict."""

    def apply(self, entities, entry, subject):
        assert subject is None or subject.event["verdict"] == "allow"
        super().apply(entities, entry, subject)


async def test_field_that_only_a_dict_would_read_is_of_no_concern(ledger, tenant):
    """An unread number out of range stops no fold of typed bodies, and one of dicts alone."""
    data = orjson.dumps(decision(1).model_dump(exclude_unset=True, exclude={"at"}))
    data = data[:-1] + b',"type":"decision.recorded","u":1e999}'
    typed, plain = (Projector(ledger)._fold_of(tenant, one()) for one in (Governance, Curious))
    entry = raw_entry(tenant, 1, data, event_id=b"d-1")
    assert (await typed.apply([entry]))[1] == {}
    assert "JSON" in (await plain.apply([entry]))[1][1]
    outcome = orjson.dumps({"type": "outcome.reported", "decision_id": "d-1", "outcome": "failed"})
    follow_up = raw_entry(tenant, 2, outcome, b"outcome.reported", b"o")
    assert (await typed.apply([follow_up]))[1] == (await plain.apply([follow_up]))[1] == {}
    assert typed.state["outcomes"]["failed"] == 1
    assert plain.state == {"quarantined": 1, "orphan": 1}


class Eager(Counter):
    """Breaks a rule: it makes an entity for what is not recorded."""

    def apply(self, entities, entry, subject):
        super().apply(entities, entry, subject)
        for name in self.names(entry)[1:]:
            entities.setdefault(name, {})


async def test_projection_that_makes_an_entity_of_nothing_is_stopped(ledger, tenant):
    """An entity that nobody would look for again is a defect, and not committed."""
    await ledger.append_many(tenant, [decision(1), Outcome(decision_id="d-2", outcome="failed")])
    projector = Projector(ledger, [Eager()])
    with pytest.raises(RuntimeError, match="decision:d-2"):
        await projector.run_once([tenant])
    assert projector._fold_of(tenant, projector.projections[0]).committed is None


async def test_defect_in_a_projection_is_raised(ledger, tenant):
    """An error that the entry's bytes do not explain is nobody's quarantine."""

    class Broken(Counter):
        def apply(self, entities, entry, subject):
            raise KeyError("typo")

    await ledger.append(tenant, decision(1))
    with pytest.raises(KeyError, match="typo"):
        await Projector(ledger, [Broken()]).run_once([tenant])


class Gated:
    """A server to which commits are sent once the gate is open."""

    def __init__(self, server):
        self._server = server
        self.gate = asyncio.Event()

    def __getattr__(self, name):
        return getattr(self._server, name)

    async def function(self, name, *args):
        if name == "govledger_commit":
            await self.gate.wait()
        return await self._server.function(name, *args)


async def test_page_is_folded_on_top_of_a_commit_that_is_under_way(ledger, tenant, monkeypatch):
    """An entity that memory dropped, and whose last change is not in Redis yet, is not read old."""
    monkeypatch.setattr("projections.tenant_fold.ENTITIES_KEPT", 0)
    outcomes = [Outcome(decision_id="d-0", outcome="failed") for _ in range(3)]
    await ledger.append_many(tenant, [decision(0), *outcomes])
    server = Gated(ledger.server)
    fold = TenantFold(server, tenant, Counter(), FoldStore(server, tenant, Counter()))
    apply = fold.apply

    async def apply_and_open(*args, **kwargs):
        result = await apply(*args, **kwargs)
        if fold.folded_seq:  # the first page is folded, and not committed
            assert fold.seq == 0
            server.gate.set()
        return result

    monkeypatch.setattr(fold, "apply", apply_and_open)
    walk = await fold.begin()
    walk.page_entries = 2
    async for page in walk.pages():
        await fold.fold_ahead(walk, page)
    await fold.settle()
    followed = (await fold.store.load({"decision:d-0": 0}))["decision:d-0"]
    assert (fold.seq, followed["follow_ups"]) == (4, 3)


async def test_every_projection_stops_where_the_first_one_does(ledger, tenant):
    """Before a hole, what every projection folded is committed and published, agents' copies too,
    with the reason; a worker that begins there finds it so.
    """
    receipts = await ledger.append_many(tenant, [decision(number) for number in range(30)])
    await Projector(ledger).run_once([tenant])
    receipts += await ledger.append_many(tenant, [decision(number) for number in range(30, 60)])
    stream = keys.decisions(tenant)
    await ledger.server.command(stream, "XDEL", stream, receipts[45].entry_id)
    for _ in range(2):
        projector = Projector(ledger)
        with pytest.raises(errors.EntriesMissing):
            await projector.run_once([tenant])
        for name in ("governance", "agents"):
            published = await projector.store(tenant, name).read_published()
            assert (published.seq, published.stopped) == (45, "EntriesMissing")
            committed = await projector.store(tenant, name).read_committed()
            assert (committed.seq, committed.stopped) == (45, "EntriesMissing")
        agent = await StateReader(ledger).agent(tenant, "a")
        assert (agent.position.seq, agent.decisions.total) == (45, 45)
        await forget_leases(ledger, tenant)


async def forget_leases(ledger, tenant):
    for name in ("governance", "agents"):
        key = keys.lease(tenant, name, 1)
        await ledger.server.command(key, "DEL", key)


async def test_rebuild_of_a_fold_that_is_in_the_middle_of_a_page(ledger, tenant, monkeypatch):
    """A rebuild by the projector whose worker waits for what a page needs counts no entry twice."""
    projector = Projector(ledger, [Counter()])
    await ledger.append_many(tenant, [decision(number) for number in range(10)])
    await projector.run_once([tenant])
    await ledger.append_many(tenant, [decision(number) for number in range(10, 20)])
    fold, gather, rebuilt = projector._fold_of(tenant, projector.projections[0]), None, []

    async def rebuild_meanwhile(entries):
        needs = await gather(entries)
        if not rebuilt:
            rebuilt.append(await projector.rebuild(tenant, "counter"))
        return needs

    gather = fold._gather
    monkeypatch.setattr(fold, "_gather", rebuild_meanwhile)
    await projector.run_once([tenant])
    committed = await fold.store.read_committed()
    assert (rebuilt, committed.seq, committed.value["allow"]) == ([20], 20, 20)


@pytest.mark.parametrize("step", ["load", "_gather", "settle"])
async def test_memory_that_is_dropped_while_a_page_waits_is_not_gone_on_with(
    ledger, tenant, monkeypatch, step
):
    """A page that was begun in one memory is neither folded nor committed in the next one."""
    await ledger.append_many(tenant, [decision(0), Outcome(decision_id="d-0", outcome="failed")])
    fold = Projector(ledger)._fold_of(tenant, Counter())
    walk = await fold.begin()
    walk.page_entries = 1
    async for page in walk.pages():
        await fold.fold_page(walk, page)
        break
    fold.forget()  # so that what the next page needs is read
    walk = await fold.begin()
    owner = fold.store if step == "load" else fold
    original, calls = getattr(owner, step), []

    async def begun_anew_meanwhile(*args):
        result = await original(*args)
        if not calls:
            calls.append(step)
            await fold._load()
        return result

    async for page in walk.pages():
        monkeypatch.setattr(owner, step, begun_anew_meanwhile)
        with pytest.raises(errors.CommitConflict, match="meanwhile"):
            await fold.fold_page(walk, page)
    assert (calls, await fold.store.seq()) == ([step], 1)


async def test_publishing_that_waits_does_not_go_on_with_another_memory(
    ledger, tenant, monkeypatch
):
    """What is published is what was committed when it began, or nothing."""
    await ledger.append(tenant, decision(0))
    projector = Projector(ledger)
    fold = projector._fold_of(tenant, projector.projections[1])
    walk = await fold.begin()
    async for page in walk.pages():
        await fold.fold_page(walk, page)
    for owner, step in ((fold, "standing"), (fold.store, "copies_mark")):
        await fold.begin()
        original = getattr(owner, step)

        async def dropped_meanwhile(*args, original=original):
            result = await original(*args)
            await fold._load()
            return result

        with monkeypatch.context() as patched:
            patched.setattr(owner, step, dropped_meanwhile)
            with pytest.raises(errors.CommitConflict, match="meanwhile"):
                await fold.publish(60)
    await fold.publish(60)
    assert not fold.copies_are_due
