"""A rebuild among projectors that are at work."""

import asyncio

import pytest

from ledger import Decision, Ledger, errors, keys
from projections import Projector, StateReader
from projections.store import FoldStore


def decision(number):
    return Decision(id=f"d-{number}", agent="a", action="act", verdict="allow")


async def test_a_rebuild_never_takes_a_later_published_state_back(server, tenant, monkeypatch):
    """What another projector folds and publishes between the rebuild's last step and its own
    publishing stays: the rebuilt state is older by then.
    """
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many(tenant, [decision(number) for number in range(10)])
        projector, other = Projector(ledger), Projector(ledger)
        await projector.run_once([tenant])
        adopt = FoldStore.adopt

        async def overtaken(store, *args):
            await adopt(store, *args)
            await ledger.append_many(tenant, [decision(number) for number in range(10, 15)])
            await other.run_once([tenant])

        monkeypatch.setattr(FoldStore, "adopt", overtaken)
        assert await projector.rebuild(tenant) == 10
        published = await FoldStore(
            ledger.server, tenant, projector.projections[0]
        ).read_published()
        assert published is not None
        assert (published.seq, published.value["decisions"]["total"]) == (15, 15)
        state = await StateReader(ledger).state(tenant, at_least=15)
        assert state.value["decisions"]["total"] == 15
        # The projector that rebuilt goes on from what the other one committed.
        await ledger.append(tenant, decision(15))
        await projector.run_once([tenant])
        state = await StateReader(ledger).state(tenant, at_least=16)
        assert state.value["decisions"]["total"] == 16


async def test_a_rebuild_that_is_always_overtaken_ends_and_takes_nobody_back(
    valkey, tenant, monkeypatch
):
    """Readers' committed state never goes back: a rebuild that is behind the live fold by the time
    folds on, and at last holds the others up for one page.
    """
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append(tenant, decision(0))
        other = Projector(ledger)
        await other.run_once([tenant])
        live = other._fold_of(tenant, other.projections[0])
        snapshot_seqs, overtaken = FoldStore._snapshot_seqs, []

        async def overtaking(store):
            if store._rebuild:
                await ledger.append(tenant, decision(len(overtaken) + 1))
                try:
                    await other._catch_up(live)
                    overtaken.append(live.seq)
                except errors.LeaseHeld:
                    overtaken.append(None)
            return await snapshot_seqs(store)

        before = await live.store.committed()
        monkeypatch.setattr(FoldStore, "_snapshot_seqs", overtaking)
        await Projector(ledger).rebuild(tenant)
        monkeypatch.undo()
        assert overtaken[-1] is None
        assert len(overtaken) > 3
        committed, _ = await live.store.committed()
        assert committed.build != before[0].build
        assert committed.position.seq >= max(seq for seq in overtaken if seq)
        await other.run_once([tenant])
        state = await StateReader(ledger).state(tenant)
        assert state.seq == state.value["decisions"]["total"] == len(overtaken) + 1


async def test_rebuilds_at_once_are_refused_by_name(valkey, tenant, monkeypatch):
    """A second rebuild of a tenant is told who is at it, on the same object too; where several
    accept a rollback at once, one of them begins the epoch.
    """
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, [decision(number) for number in range(3)])
        projector = Projector(ledger)
        await projector.run_once([tenant])
        adopt = FoldStore.adopt

        async def with_another(store, *args):
            with pytest.raises(errors.LeaseHeld):
                await projector.rebuild(tenant)
            await adopt(store, *args)

        monkeypatch.setattr(FoldStore, "adopt", with_another)
        assert await projector.rebuild(tenant) == 3
        monkeypatch.undo()
        position = await projector.store(tenant, "governance").position()
        ahead = str(position._replace(seq=9))
        valkey.cli("HSET", keys.projection(tenant, "governance", 1), "position", ahead)
        calls = [projector.rebuild(tenant, accept_rollback=True) for _ in range(3)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert 3 in done
        assert all(one == 3 or isinstance(one, errors.LeaseHeld) for one in done)
        head = await ledger.head(tenant)
        assert (head.epoch != position.epoch, head.incidents) == (True, 1)
