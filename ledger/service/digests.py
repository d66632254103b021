"""What makes two ledgers the same: heads, entries, and what folds make of them."""

from __future__ import annotations

from contextlib import aclosing

from ledger import errors
from ledger.server import Server
from ledger.stream import Position
from projections.lease import Leases, worker_name
from projections.projection import Projection
from projections.store import FoldStore
from projections.tenant_fold import TenantFold

__all__ = ["fold_digest", "fold_name"]


def fold_name(projection: Projection) -> str:
    """`governance@1`."""
    return f"{projection.name}@{projection.version}"


async def fold_digest(
    source: Server, tenant: str, projection: Projection, until: int, scratch: Server
) -> str:
    """SHA-256 of what a fold makes of a tenant's entries up to seq `until`, whatever is committed
    or has been recorded since; the work is done on `scratch`, and nothing is written to `source`.

    Raises:
        EntriesMissing: the record has a hole.
        LedgerRolledBack: it went back meanwhile.
    """
    leases = Leases(scratch, worker_name(), [projection], rebuild=True)
    store = FoldStore(scratch, tenant, projection, worker=leases.worker, rebuild=True)
    await leases.take(tenant)
    await store.discard()
    fold = TenantFold(source, tenant, projection, store)
    try:
        if not until:  # a head that was rebuilt from nothing
            return await store.digest()
        walk = await fold.begin()
        async with aclosing(walk.pages()) as pages:
            async for page in pages:
                part = [entry for entry in page if entry.seq <= until]
                if part:
                    own = [entry for entry in part if not entry.foreign]
                    changed, quarantined = await fold.apply(own)
                    at = Position(walk.head.epoch, part[-1].seq, part[-1].entry_id)
                    assert fold.committed is not None
                    fold.committed = await store.commit(fold.committed, at, changed, quarantined)
                if page[-1].seq >= until:
                    return await store.digest()
        raise errors.EntriesMissing(f"tenant {tenant}: it ends before seq {until}", tenant=tenant)
    finally:
        await store.discard()
        await leases.release([tenant])
