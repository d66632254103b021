"""A rebuild among projectors that are at work."""

from ledger import Decision, Ledger
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

        async def overtaken(store, committed):
            await adopt(store, committed)
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
