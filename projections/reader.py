"""What adaptive policies hold: a tenant's state, and how far it has folded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from ledger import errors, keys
from ledger.append import Receipt
from ledger.ledger import Ledger
from projections.agents import Agents
from projections.governance import Governance
from projections.projection import Projection
from projections.store import FoldStore, PublishedState

__all__ = ["StateReader"]

_POLL_MIN_S: Final = 0.002
_POLL_MAX_S: Final = 0.05


class StateReader:
    """Reads published state, and what is committed where the published copy is absent."""

    def __init__(self, ledger: Ledger, projections: Sequence[Projection] = ()) -> None:
        """`projections`: default `Governance()` and `Agents()`."""
        self._server = ledger.server
        self._ledger = ledger
        default: tuple[Projection, ...] = (Governance(), Agents())
        self._projections = {one.name: one for one in tuple(projections) or default}

    async def state(
        self,
        tenant: str,
        projection: str = "governance",
        *,
        at_least: int | Receipt | None = None,
        timeout_s: float = 10.0,
    ) -> PublishedState:
        """The tenant's current state.

        Args:
            tenant: whose.
            projection: which fold.
            at_least: wait until this seq, or the event of this receipt, has been folded.
            timeout_s: how long to wait for that.

        Raises:
            NotFound: nothing is recorded or folded for the tenant, or no such projection.
            NotCaughtUp: the projector has not come that far in time.
        """
        store = self._store(tenant, projection)
        wanted = at_least.seq if isinstance(at_least, Receipt) else at_least or 0
        epoch = at_least.epoch if isinstance(at_least, Receipt) else None
        deadline, pause_s = time.monotonic() + timeout_s, _POLL_MIN_S
        while True:
            found = await store.read_published()
            if found is None or found.seq < wanted:
                found = await store.read_committed() or found
            if found is not None and found.seq >= wanted and epoch in (None, found.position.epoch):
                return found
            if wanted == 0:
                raise await self._nothing(tenant, projection)
            if time.monotonic() >= deadline:
                raise self._not_caught_up(tenant, projection, wanted, found, timeout_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)

    def _store(self, tenant: str, projection: str) -> FoldStore:
        known = self._projections.get(projection)
        if known is None:
            names = ", ".join(self._projections)
            raise errors.NotFound(
                f"no projection is called {projection!r}", hint=f"there is: {names}"
            )
        return FoldStore(self._server, keys.checked_tenant(tenant), known)

    async def _nothing(self, tenant: str, projection: str) -> errors.NotFound:
        head = await self._ledger.head(tenant)
        if not head.seq:
            return errors.NotFound(
                f"tenant {tenant}: nothing is recorded",
                hint="`govledger tenants` lists who is known",
            )
        return errors.NotFound(
            f"tenant {tenant}: {head.seq} entries are recorded, and {projection} has folded none",
            hint="is a projector running? `govledger project --once` folds what there is",
        )

    def _not_caught_up(
        self,
        tenant: str,
        projection: str,
        wanted: int,
        found: PublishedState | None,
        timeout_s: float,
    ) -> errors.NotCaughtUp:
        folded = found.seq if found else 0
        return errors.NotCaughtUp(
            f"tenant {tenant}: {projection} has folded to seq {folded}, not to {wanted}, "
            f"after {timeout_s:g} s",
            hint="is a projector running? `govledger project --once` folds what there is",
            tenant=tenant,
            wanted=wanted,
            folded=folded,
        )
