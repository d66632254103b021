"""What a worker does beside its commits changes nothing once another one has gone on."""

import pytest

from ledger import Decision, Ledger, errors, keys
from ledger.stream import Position
from projections import Projector, StateReader
from projections import store as store_module
from projections.lease import LEASE_MS, Leases
from projections.store import FoldStore, Standing
from tests.test_foreign import with_two_histories
from tests.test_projector import Counter, decision


class CounterOfTwo(Counter):
    """A later version, which says so."""

    version = 2

    def view(self, state):
        return {"version": 2, **state}


@pytest.fixture
async def ledger(server):
    async with Ledger.connect(server.url) as opened:
        yield opened


async def folded(ledger, tenant, *, projection=Counter):
    """A projector that has folded and published all there is, and its fold."""
    projector = Projector(ledger, [projection()])
    await projector.run_once([tenant])
    return projector, projector._fold_of(tenant, projector.projections[0])


async def published(ledger, tenant):
    return await FoldStore(ledger.server, tenant, Counter()).read_published()


def before_it_goes_on(monkeypatch, owner, name, meanwhile):
    """The first call of a function ends, and then something happens before its caller goes on."""
    original, calls = getattr(owner, name), []

    async def stopped(*args):
        result = await original(*args)
        calls.append(1)
        if len(calls) == 1:
            await meanwhile()
        return result

    monkeypatch.setattr(owner, name, stopped)


# -- copies ---------------------------------------------------------------------------------------


async def test_a_copy_of_another_epoch_is_replaced_only_while_it_is_that(
    ledger, server, tenant, monkeypatch
):
    """Who found an old epoch's copy, and was paused after it had asked for the ledger's own, finds
    what another one has published since, and leaves it.
    """
    await ledger.append(tenant, decision(1))
    await folded(ledger, tenant)
    key = keys.published(tenant, "counter")
    of_old_epoch = server.cli("GET", key).replace('"epoch":"', '"epoch":"0')
    _, fold = await folded(ledger, tenant)
    await ledger.append(tenant, decision(2))
    other, _ = await folded(ledger, tenant)

    async def another_publishes():
        await other.run_once([tenant])

    server.cli("SET", key, of_old_epoch)
    before_it_goes_on(monkeypatch, store_module, "read_head", another_publishes)
    assert not await fold.store.publish(fold.committed, fold.state, 60)
    assert (await published(ledger, tenant)).seq == 2
    server.cli("SET", key, of_old_epoch)
    assert await fold.store.publish(fold.committed, fold.state, 60)
    assert (await published(ledger, tenant)).seq == 1


async def test_a_version_that_was_pinned_meanwhile_keeps_its_copy(ledger, tenant, monkeypatch):
    """A worker of a version that is not taken any more, or of one whose pin was taken back while it
    was paused, replaces nothing that readers take; nor does it make them take its own again.
    """
    await ledger.append(tenant, decision(1))
    _, old = await folded(ledger, tenant)
    new_projector, new = await folded(ledger, tenant, projection=CounterOfTwo)
    assert (await published(ledger, tenant)).version == 2

    await new.store.pin(1)
    assert await old.store.publish(old.committed, old.state, 60)
    assert not await new.store.publish(new.committed, new.state, 60)
    assert (await published(ledger, tenant)).version == 1
    await new.store.activate()  # it had looked before the command came
    assert await new.store.standing() is Standing.SUPERSEDED

    async def taken_back():
        await new.store.pin(2)
        await ledger.append(tenant, decision(2))
        await Projector(ledger, [CounterOfTwo()]).run_once([tenant])

    await new.store.pin(2)
    await new_projector.run_once([tenant])
    await new.store.publish(new.committed, new.state, 60)
    await new.store.pin(1)
    before_it_goes_on(monkeypatch, FoldStore, "standing", taken_back)
    assert not await old.store.publish(old.committed, old.state, 60)
    state = await published(ledger, tenant)
    assert (state.version, state.seq) == (2, 2)
    await old.store.activate()
    assert await old.store.standing() is Standing.SUPERSEDED


async def test_a_stop_is_shown_and_taken_back_by_who_folds(ledger, tenant):
    """A copy of the same seq says what is marked beside the commit, whoever was paused in between;
    who was overtaken can neither mark nor take back.
    """
    await ledger.append(tenant, decision(1))
    _, fold = await folded(ledger, tenant)
    _, late = await folded(ledger, tenant)
    await fold.show_stopped("LedgerRolledBack", 60)
    assert (await published(ledger, tenant)).stopped == "LedgerRolledBack"
    assert await late.store.publish(late.committed, late.state, 60)  # its like is there
    assert (await published(ledger, tenant)).stopped == "LedgerRolledBack"
    assert await late.store.publish(late.committed, late.state, 60, stopped="EntriesMissing")
    assert (await published(ledger, tenant)).stopped == "LedgerRolledBack"
    await fold.publish(60)
    assert (await published(ledger, tenant)).stopped is None

    leases = Leases(ledger.server, "another", [Counter()])
    await leases.take(tenant)
    with pytest.raises(errors.LeaseHeld, match="another"):
        await late.store.mark_stopped(late.committed, "LedgerRolledBack")
    await late.show_stopped("LedgerRolledBack", 60)
    await leases.release([tenant])
    await ledger.append(tenant, decision(2))
    await Projector(ledger, [Counter()]).run_once([tenant])
    with pytest.raises(errors.CommitConflict, match="is committed at"):
        await late.store.mark_stopped(late.committed, "LedgerRolledBack")
    await late.show_stopped("LedgerRolledBack", 60)
    state = await StateReader(ledger, [Counter()]).state(tenant, "counter")
    assert (state.seq, state.stopped) == (2, None)
    assert (await fold.store.read_committed()).stopped is None


async def test_what_another_worker_marked_is_taken_back_by_who_goes_on_from_memory(ledger, tenant):
    """A stop that somebody else met and marked ends with the next publish, and with the next
    commit, though the worker that goes on read what is committed before the mark was set.
    """
    await ledger.append(tenant, decision(1))
    projector, fold = await folded(ledger, tenant)
    other = (await folded(ledger, tenant))[1]
    await other.show_stopped("IndexBehind", 60)
    await projector.run_once([tenant])
    assert (await published(ledger, tenant)).stopped is None
    assert (await fold.store.read_committed()).stopped is None
    await other.store.mark_stopped(other.committed, "IndexBehind")
    await ledger.append(tenant, decision(2))
    await projector.run_once([tenant])
    assert (await fold.store.read_committed()).stopped is None


async def test_a_copy_that_is_ahead_of_the_ledger_is_put_right_by_a_rebuild(ledger, server, tenant):
    """What nobody can have folded is replaced by command alone."""
    await ledger.append(tenant, decision(1))
    projector, fold = await folded(ledger, tenant)
    key = keys.published(tenant, "counter")
    server.cli("SET", key, server.cli("GET", key).replace('"seq":1,', '"seq":9,'))
    assert not await fold.store.publish(fold.committed, fold.state, 60)
    await projector.rebuild(tenant, "counter")
    assert (await published(ledger, tenant)).seq == 1


# -- the fold itself ------------------------------------------------------------------------------


async def test_a_fold_is_discarded_only_by_who_saw_what_is_there(ledger, server, tenant):
    """A worker that found a fold damaged, and was paused, does not delete what another has folded
    since, nor what another is folding.
    """
    await ledger.append_many(tenant, [decision(n) for n in range(3)])
    _, fold = await folded(ledger, tenant)
    seen = fold.committed.token.encode()
    await ledger.append(tenant, decision(3))
    await folded(ledger, tenant)
    with pytest.raises(errors.CommitConflict, match="is committed at"):
        await fold.store.discard(seen)
    leases = Leases(ledger.server, "another", [Counter()])
    await leases.take(tenant)
    with pytest.raises(errors.LeaseHeld):
        await fold.store.discard()
    server.cli("HDEL", keys.projection(tenant, "counter", 1), "state")
    with pytest.raises(errors.LeaseHeld):
        await fold.store.committed()
    assert await fold.store.seq() == 4
    await leases.release([tenant])
    committed, state = await fold.store.committed()
    assert (committed.position, state, await fold.store.seq()) == (None, {}, 0)


async def test_copies_are_marked_only_by_who_folds(ledger, server, tenant):
    """The mark of entities' copies is about one commit, and not moved after a later one."""
    await ledger.append(tenant, decision(1))
    _, fold = await folded(ledger, tenant)
    await fold.store.mark_copies(fold.committed, 1)
    assert await fold.store.copies_mark(fold.committed) == 1
    old = fold.committed
    await ledger.append(tenant, decision(2))
    await folded(ledger, tenant)
    with pytest.raises(errors.CommitConflict, match="is committed at"):
        await fold.store.mark_copies(old, 0)
    assert await fold.store.copies_mark(old) == 1


async def test_a_rebuild_that_was_overtaken_is_not_adopted(ledger, tenant):
    """A rebuilt fold that somebody else has begun anew meanwhile takes nobody's place."""
    await ledger.append(tenant, decision(1))
    _, fold = await folded(ledger, tenant)
    rebuilt = FoldStore(ledger.server, tenant, Counter(), rebuild=True)
    before, _ = await rebuilt.committed()
    after = await rebuilt.commit(before, fold.committed.position, {"state": {"allow": 9}}, {})
    await FoldStore(
        ledger.server, tenant, Counter(), worker=rebuilt._worker, rebuild=True
    ).discard()
    with pytest.raises(errors.CommitConflict, match="is committed at nothing"):
        await rebuilt.adopt(after)
    assert (await fold.store.load({"state": 0}))["state"] == {"allow": 1}


async def test_a_rebuilt_fold_that_is_behind_the_live_one_is_not_adopted(ledger, tenant):
    """Readers would go back; unless who seized the live lease knows that nothing lies between."""
    await ledger.append(tenant, decision(1))
    rebuilt = FoldStore(ledger.server, tenant, Counter(), rebuild=True)
    _, fold = await folded(ledger, tenant)
    before, _ = await rebuilt.committed()
    after = await rebuilt.commit(before, fold.committed.position, {"state": {"allow": 9}}, {})
    await ledger.append(tenant, decision(2))
    _, fold = await folded(ledger, tenant)
    for holder in ("", "nobody"):
        with pytest.raises(errors.CommitConflict, match="committed at seq 2") as refused:
            await rebuilt.adopt(after, holder)
        assert refused.value.facts == {"ahead_seq": 2}
    assert await fold.store.seq() == 2
    await fold.store.seize("rebuilding", LEASE_MS)
    with pytest.raises(errors.CommitConflict):
        await fold.store.commit(fold.committed, fold.committed.position, {}, {})
    await rebuilt.adopt(after, "rebuilding")
    await fold.store.release("rebuilding")
    assert (await fold.store.load({"state": 0}))["state"] == {"allow": 9}


class Readable(Counter):
    """A repaired release of the same version: it can read what the other could not."""

    def apply(self, entities, entry, subject):
        state = entities.setdefault("state", {})
        state["read"] = state.get("read", 0) + 1


class Defective(Counter):
    """A release that finds other entries unreadable, and ends with a defect."""

    def apply(self, entities, entry, subject):
        if entry.seq == 3:
            raise KeyError("typo")
        super().apply(entities, entry, subject)


async def test_quarantine_is_replaced_with_the_fold(ledger, server, tenant):
    """A rebuild that fails leaves the list as it was, one that is adopted brings its own, and what
    belongs to other projections stays.
    """
    bad = Decision(agent="a", action="b", verdict="allow", metadata={"unfoldable": True})
    await ledger.append_many(tenant, [decision(1), bad, decision(2)])
    await folded(ledger, tenant)
    quarantine = keys.projection_quarantine(tenant)
    others = {"counter@10:1": "not ours", "other@1:2": "not ours either"}
    server.cli("HSET", quarantine, *[part for pair in others.items() for part in pair])
    before = server.cli("HGETALL", quarantine)
    with pytest.raises(KeyError):
        await Projector(ledger, [Defective()]).rebuild(tenant, "counter")
    assert server.cli("HGETALL", quarantine) == before == {"counter@1:2": "it says so", **others}
    await Projector(ledger, [Readable()]).rebuild(tenant, "counter")
    assert server.cli("HGETALL", quarantine) == others
    await Projector(ledger, [Counter()]).rebuild(tenant, "counter")
    assert server.cli("HGETALL", quarantine) == before
    assert server.cli("KEYS", f"*{tenant}*rebuild*") == []


# -- a history that is no more --------------------------------------------------------------------


async def test_a_fold_does_not_go_on_in_another_history(ledger, server, tenant):
    """Where another node's entries lie round the position, with the ordinals that were to be
    expected, the tenant stops by name, and accepting it folds what there is.
    """
    projector = Projector(ledger, [Counter()])

    async def fold():
        await projector.run_once([tenant])

    _, position = await with_two_histories(ledger, server, tenant, meanwhile=fold)
    assert projector._fold_of(tenant, projector.projections[0]).committed.position == position
    assert isinstance(position, Position)
    for worker in (projector, Projector(ledger, [Counter()])):
        with pytest.raises(errors.LedgerRolledBack, match="lies entry"):
            await worker.run_once([tenant])
        await worker._leases.release([tenant])
    with pytest.raises(errors.LedgerRolledBack, match="lies entry"):
        await projector.rebuild(tenant, "counter")
    reader = StateReader(ledger, [Counter()])
    assert (await reader.state(tenant, "counter")).stopped == "LedgerRolledBack"
    await projector.rebuild(tenant, "counter", accept_rollback=True)
    state = await reader.state(tenant, "counter")
    assert (state.seq, state.value, state.stopped) == (6, {"allow": 6}, None)
