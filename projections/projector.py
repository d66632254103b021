"""Follow → fold → commit → publish, over many tenants.

Wake-ups come from the feed; a slower sweep compares heads with positions and finds what the feed
lost. Two projectors on one tenant can waste work, never double-count: the commit compares the
position and the build it began from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Final

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import pack
from ledger.stream import Head, head_command, parse_head
from projections.agents import Agents
from projections.governance import Governance
from projections.projection import Projection
from projections.store import FoldStore
from projections.tenant_fold import TenantFold

__all__ = ["Projector"]

PUBLISH_INTERVAL_S: Final = 0.05
"""A busy tenant is published at most 20 times a second."""

SWEEP_INTERVAL_S: Final = 5.0
FOLDS_AT_ONCE: Final = 8
HEADS_A_CALL: Final = 1000
ATTEMPTS: Final = 5
_log = logging.getLogger("ledger")

Progress = Callable[[str, int], None]


def _hinted(fields: Sequence[bytes]) -> str | None:
    """The tenant of a feed entry; None for what somebody else put there."""
    try:
        return keys.checked_tenant(fields[1].decode())
    except (errors.InvalidTenant, UnicodeDecodeError):
        return None


class Projector:
    """Keeps the state of every tenant folded and published."""

    def __init__(self, ledger: Ledger, projections: Sequence[Projection] = ()) -> None:
        """`projections`: default `Governance()` and `Agents()`."""
        self.server = ledger.server
        self.ledger = ledger
        default: tuple[Projection, ...] = (Governance(), Agents())
        self.projections = tuple(projections) or default
        self.stopped: dict[str, errors.LedgerError] = {}
        """Tenants that are not folded any more, and why."""
        self._folds: dict[tuple[str, str], TenantFold] = {}
        self._ttl_seconds = self.server.settings.memory_default_ttl_seconds
        self._dirty: dict[str, None] = {}
        self._woken = asyncio.Event()
        self._busy: set[str] = set()
        self._again: set[str] = set()

    def _fold_of(self, tenant: str, projection: Projection) -> TenantFold:
        key = (tenant, projection.name)
        if key not in self._folds:
            store = FoldStore(self.server, tenant, projection)
            self._folds[key] = TenantFold(self.server, tenant, projection, store)
        return self._folds[key]

    def _folds_of(self, tenant: str) -> list[TenantFold]:
        return [self._fold_of(tenant, projection) for projection in self.projections]

    # -- once ---------------------------------------------------------------------------------

    async def run_once(
        self, tenants: Sequence[str] | None = None, *, on_progress: Progress | None = None
    ) -> dict[str, int]:
        """Folds, commits and publishes up to the heads of now.

        Args:
            tenants: whose; default: all that are registered.
            on_progress: called with the tenant and the entries just folded.

        Returns: entries folded, by tenant.

        Raises:
            LedgerRolledBack: a tenant's ledger is behind, or other than, what was folded.
            CommitConflict: other projectors kept overtaking this one.
            EntriesMissing, IndexBehind, Unavailable: as `Ledger.replay`. The first one, after the
                other tenants were folded.
        """
        names = await self.ledger.tenants() if tenants is None else tenants
        folded: dict[str, int] = {}
        failed: list[errors.LedgerError] = []
        for tenant in names:
            keys.checked_tenant(tenant)
            try:
                folds = self._folds_of(tenant)
                for place, fold in enumerate(folds):
                    count = await self._catch_up(fold, on_progress, followers=folds[place + 1 :])
                    await fold.publish(self._ttl_seconds, whole=True)
                    folded[tenant] = max(folded.get(tenant, 0), count)
            except errors.LedgerError as error:
                failed.append(error)
                if len(names) > 1:
                    _log.error("tenant %s: not folded: %s", tenant, error)
        if failed:
            raise failed[0]
        return folded

    async def _catch_up(
        self,
        fold: TenantFold,
        on_progress: Progress | None = None,
        *,
        pages: int | None = None,
        followers: Sequence[TenantFold] = (),
    ) -> int:
        """Folds up to the head, at most `pages` pages; the entries folded. The `followers` fold the
        same pages, as far as they stand where this one does.
        """
        folded = 0
        overtaken: errors.CommitConflict | None = None
        for _ in range(ATTEMPTS):
            try:
                walk = await fold.begin()
                goal = walk.head.seq
                async with aclosing(walk.pages()) as found:
                    async for page in found:
                        await fold.fold_page(walk, page, followers)
                        folded += len(page)
                        if on_progress:
                            on_progress(fold.tenant, len(page))
                        if time.monotonic() - fold.published_at > PUBLISH_INTERVAL_S * 4:
                            await fold.publish(self._ttl_seconds)
                        enough = pages is not None and folded >= pages * walk.page_entries
                        if enough or fold.seq >= goal:
                            break
            except errors.CommitConflict as error:
                overtaken = error
                continue
            except BaseException:
                fold.forget()
                raise
            return folded
        assert overtaken is not None
        raise overtaken

    # -- for ever -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Folds whatever comes, until cancelled; an error stops its tenant, not the others."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._sweep_for_ever())
            for _ in range(FOLDS_AT_ONCE):
                tasks.create_task(self._work())

    def _wake(self, tenants: Iterable[str]) -> None:
        for tenant in tenants:
            if tenant in self._busy:
                self._again.add(tenant)
            else:
                self._dirty[tenant] = None
        if self._dirty:
            self._woken.set()

    async def _listen(self) -> None:
        last_id = "$"
        while True:
            command = pack("XREAD", "COUNT", 1000, "BLOCK", 5000, "STREAMS", keys.FEED, last_id)
            try:
                (reply,) = await self.server.exchange(keys.FEED, [command], 1, timeout_s=15)
                found = self.server.checked(reply)
            except errors.LedgerError as error:
                _log.debug("feed: %s", error)
                await asyncio.sleep(SWEEP_INTERVAL_S)
                continue
            for entries in (found or {}).values():
                last_id = entries[-1][0].decode()
                self._wake(tenant for _, fields in entries if (tenant := _hinted(fields)))

    async def _work(self) -> None:
        while True:
            while not self._dirty:
                self._woken.clear()
                await self._woken.wait()
            tenant = next(iter(self._dirty))
            del self._dirty[tenant]
            self._busy.add(tenant)
            try:
                await self._fold_fairly(tenant)
            finally:
                self._busy.discard(tenant)
                if tenant in self._again:
                    self._again.discard(tenant)
                    self._wake([tenant])

    async def _fold_fairly(self, tenant: str) -> None:
        """One batch; a tenant with more to fold queues again behind the others."""
        try:
            folds = self._folds_of(tenant)
            for place, fold in enumerate(folds):
                wait_s = fold.published_at + PUBLISH_INTERVAL_S - time.monotonic()
                if wait_s > 0:
                    asyncio.get_running_loop().call_later(wait_s, self._wake, [tenant])
                    return
                if not (place and fold.stands_with(folds[0])):
                    await self._catch_up(fold, pages=1, followers=folds[place + 1 :])
                await fold.publish(self._ttl_seconds)
                if fold.is_behind or fold.copies_are_due:
                    self._wake([tenant])
            if self.stopped.pop(tenant, None):
                _log.warning("tenant %s: folded again", tenant)
        except errors.CommitConflict:
            self._wake([tenant])  # another projector is at it; what it leaves is ours
        except errors.LedgerError as error:
            self._stop(tenant, error)
        except Exception as error:  # noqa: BLE001 - logged; it must not stop the other tenants
            _log.exception("tenant %s: a defect in a fold", tenant)
            self._stop(tenant, errors.ServerError(f"{type(error).__name__}: {error}"))

    def _stop(self, tenant: str, error: errors.LedgerError) -> None:
        """Keeps why a tenant is not folded; it is tried again at each sweep and each hint."""
        if str(self.stopped.get(tenant)) != str(error):
            _log.error("tenant %s: not folded: %s", tenant, error)
        self.stopped[tenant] = error

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                self._wake(await self.stale_tenants())
            except errors.LedgerError as error:
                _log.warning("sweep: %s", error)
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def stale_tenants(self) -> list[str]:
        """Tenants whose head is past what is folded, or whose published copy is gone or ageing."""
        tenants = await self.ledger.tenants()
        stale = []
        for start in range(0, len(tenants), HEADS_A_CALL):
            stale += await self._stale_among(tenants[start : start + HEADS_A_CALL])
        return stale

    async def _stale_among(self, tenants: Sequence[str]) -> list[str]:
        asked = []
        for tenant in tenants:
            asked.append((keys.head(tenant), head_command(tenant)))
            for projection in self.projections:
                key = keys.published(tenant, projection.name)
                asked.append((key, pack("TTL", key)))
        replies = iter(await self.server.exchange_each(asked))
        stale = []
        for tenant in tenants:
            answers = [next(replies) for _ in range(1 + len(self.projections))]
            try:
                head_reply, *ttls = [self.server.checked(answer) for answer in answers]
                if self._is_stale(tenant, parse_head(tenant, head_reply), ttls):
                    stale.append(tenant)
            except errors.LedgerError as error:
                self._stop(tenant, error)
        return stale

    def _is_stale(self, tenant: str, head: Head, ttls: Sequence[int]) -> bool:
        folds = [self._fold_of(tenant, projection) for projection in self.projections]
        if head.seq == 0:
            return any(fold.seq for fold in folds)
        ageing = any(ttl == -2 or 0 <= ttl < self._ttl_seconds // 2 for ttl in ttls)
        behind = any(fold.published_seq != head.seq for fold in folds)
        return behind or ageing or tenant in self.stopped

    # -- rebuild ------------------------------------------------------------------------------

    async def rebuild(
        self, tenant: str, name: str = "governance", *, on_progress: Progress | None = None
    ) -> int:
        """Folds a tenant anew from its first entry, beside the state that readers see, and then
        puts the new one in its place in one step; the entries folded.

        Raises:
            NotFound: nothing is recorded for the tenant, or there is no such projection.
        """
        projection = next((one for one in self.projections if one.name == name), None)
        if projection is None:
            known = ", ".join(one.name for one in self.projections)
            raise errors.NotFound(f"no projection is called {name!r}", hint=f"there is: {known}")
        if not (await self.ledger.head(tenant)).seq:
            raise errors.NotFound(f"tenant {tenant}: nothing is recorded", tenant=tenant)
        store = FoldStore(self.server, tenant, projection, rebuild=True)
        await store.discard()
        fold = TenantFold(self.server, tenant, projection, store)
        fold.published_at = float("inf")  # readers keep the old one until this one is whole
        folded = await self._catch_up(fold, on_progress)
        assert fold.committed is not None
        await store.adopt(fold.committed)
        self._fold_of(tenant, projection).forget()
        published = await store.read_published()
        head = await self.ledger.head(tenant)
        ahead = published is not None and published.seq > head.seq  # of a ledger that went back
        await fold.publish(self._ttl_seconds, force=ahead, whole=True)
        return folded
