"""Follow → fold → commit → publish, over many tenants, by any number of workers.

Wake-ups come from the feed. A slower sweep compares heads with what is committed and published, and
finds what the feed lost, what was deleted, and what a dead worker left. A tenant is folded by the
worker that holds its leases (`lease.py`); the commit compares position, build and lease, so two
workers can waste work and never double-count.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Container, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final
from weakref import WeakValueDictionary

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import pack
from ledger.stream import Walk, head_command, parse_head
from projections.lease import Leases, worker_name
from projections.projection import Projection
from projections.registry import configured
from projections.store import FoldStore, Standing
from projections.tenant_fold import TenantFold

__all__ = ["Projector"]

PUBLISH_INTERVAL_S: Final = 0.05
"""A busy tenant is published at most 20 times a second."""

SWEEP_INTERVAL_S: Final = 5.0
"""What the feed lost, or somebody deleted, is found after this, or a second for each thousand
tenants where that is longer."""

SWEEP_TENANTS: Final = 250
SWEEP_TENANTS_PER_S: Final = 1000
FOLDS_AT_ONCE: Final = 8
FOLDS_KEPT: Final = 1000
ATTEMPTS: Final = 5
HANDOVER_S: Final = 0.05
SEIZED_MS: Final = 1_000
"""How long a rebuild that keeps being overtaken holds the tenant's other workers up, at most."""

TAKEOVER_S: Final = 0.1
"""How soon after another worker's lease has run out somebody looks whether it has died."""

_log = logging.getLogger("ledger")

Progress = Callable[[str, int], None]


def _hinted(fields: Sequence[bytes]) -> str | None:
    """The tenant of a feed entry; None for what somebody else put there."""
    try:
        return keys.checked_tenant(fields[1].decode())
    except (errors.InvalidTenant, UnicodeDecodeError):
        return None


class Projector:
    """Keeps the state of every tenant folded and published: one worker among any number."""

    def __init__(self, ledger: Ledger, projections: Sequence[Projection] = ()) -> None:
        """`projections`: default ours, and those of GOVLEDGER_PROJECTIONS."""
        self.server = ledger.server
        self.ledger = ledger
        self.projections = tuple(projections) or configured(self.server.settings)
        self.worker = worker_name()
        self.stopped: dict[str, errors.LedgerError] = {}
        """Tenants that are not folded any more, and why."""
        self._leases = Leases(self.server, self.worker, self.projections)
        self._folds: dict[tuple[str, str], TenantFold] = {}
        self._ttl_seconds = self.server.settings.memory_default_ttl_seconds
        self._dirty: dict[str, None] = {}
        self._woken = asyncio.Event()
        self._busy: set[str] = set()
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        self._again: set[str] = set()
        self._probes: dict[str, list[tuple[FoldStore, list[tuple[str, bytes]]]]] = {}

    def _lock_of(self, tenant: str) -> asyncio.Lock:
        """Whoever folds the tenant here has it: `run` and `run_once` share folds in memory."""
        lock = self._locks.get(tenant)
        if lock is None:
            lock = self._locks[tenant] = asyncio.Lock()
        return lock

    def _fold_of(self, tenant: str, projection: Projection) -> TenantFold:
        """The fold in memory, made where there is none; the least recently used one is dropped."""
        key = (tenant, projection.name)
        fold = self._folds.pop(key, None)
        if fold is None:
            store = FoldStore(self.server, tenant, projection, worker=self.worker)
            fold = TenantFold(self.server, tenant, projection, store)
            if len(self._folds) >= FOLDS_KEPT * len(self.projections):
                self._drop_oldest()
        self._folds[key] = fold
        return fold

    def _drop_oldest(self) -> None:
        key = next((key for key in self._folds if key[0] not in self._busy), None)
        if key is not None:
            del self._folds[key]

    def store(self, tenant: str, name: str) -> FoldStore:
        """Where a projection's state is kept.

        Raises:
            InvalidTenant: no tenant can be called so.
            NotFound: there is no such projection.
        """
        return FoldStore(self.server, keys.checked_tenant(tenant), self._projection(name))

    def _projection(self, name: str) -> Projection:
        projection = next((one for one in self.projections if one.name == name), None)
        if projection is None:
            known = ", ".join(one.name for one in self.projections)
            raise errors.NotFound(f"no projection is called {name!r}", hint=f"there is: {known}")
        return projection

    async def _folds_of(self, tenant: str, held: Container[str]) -> list[TenantFold]:
        """Those of versions that readers take, or will, among those whose leases are held."""
        held_here = [one for one in self.projections if one.name in held]
        folds = [self._fold_of(tenant, projection) for projection in held_here]
        return [fold for fold in folds if await fold.standing() is not Standing.SUPERSEDED]

    # -- once ---------------------------------------------------------------------------------

    async def run_once(
        self, tenants: Sequence[str] | None = None, *, on_progress: Progress | None = None
    ) -> dict[str, int]:
        """Folds, commits and publishes up to the heads of now. Where another worker folds a
        tenant, waits until that has come as far.

        Args:
            tenants: whose; default: all that are registered.
            on_progress: called with the tenant and the entries just folded.

        Returns: entries folded here, by tenant.

        Raises:
            LedgerRolledBack: a tenant's ledger is behind, or other than, what was folded.
            CommitConflict: other projectors kept overtaking this one.
            EntriesMissing, IndexBehind, Unavailable: as `Ledger.replay`. The first one, after the
                other tenants were folded; its facts have `folded`.
        """
        names = await self.ledger.tenants() if tenants is None else tenants
        folded: dict[str, int] = {}
        failed: list[errors.LedgerError] = []
        for tenant in names:
            keys.checked_tenant(tenant)
            began = time.monotonic()
            try:
                folded[tenant] = await self._fold_tenant_once(tenant, on_progress)
            except errors.LedgerError as error:
                failed.append(error)
                await self._show_stopped(tenant, error, began)
                if len(names) > 1:
                    _log.error("tenant %s: not folded: %s", tenant, error)
        if failed:
            failed[0].facts["folded"] = folded
            raise failed[0]
        return folded

    async def _fold_tenant_once(self, tenant: str, on_progress: Progress | None) -> int:
        goal, folded = await self.ledger.head(tenant), 0
        while True:
            held = frozenset[str]()
            try:
                async with self._lock_of(tenant):
                    held = await self._leases.take(tenant)
                    folds = await self._folds_of(tenant, held)
                    folded = max(folded, await self._fold_whole(folds, on_progress))
                    await self._leases.release([tenant])
            except errors.LeaseHeld:
                held = frozenset()
            if await self._is_folded_to(tenant, goal.seq, besides=held):
                return folded
            await asyncio.sleep(HANDOVER_S)

    async def _fold_whole(self, folds: Sequence[TenantFold], on_progress: Progress | None) -> int:
        """Folds and publishes all that there is; the entries folded."""
        folded = 0
        for place, fold in enumerate(folds):
            count = await self._catch_up(fold, on_progress, followers=folds[place + 1 :])
            await fold.publish(self._ttl_seconds, whole=True)
            folded = max(folded, count)
        return folded

    async def _is_folded_to(self, tenant: str, seq: int, *, besides: Container[str]) -> bool:
        """Whether others have committed at least that far what is not held here."""
        for projection in self.projections:
            fold = self._fold_of(tenant, projection)
            if projection.name in besides or await fold.standing() is Standing.SUPERSEDED:
                continue
            if await fold.store.seq() < seq:
                return False
        return True

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
                async with self._left_whole(fold, followers):
                    walk = await fold.begin()
                    goal = walk.head.seq
                    async with aclosing(walk.pages()) as found:
                        async for page in found:
                            await fold.fold_ahead(walk, page, followers)
                            folded += len(page)
                            if on_progress:
                                on_progress(fold.tenant, len(page))
                            enough = pages is not None and folded >= pages * walk.page_entries
                            if enough or fold.folded_seq >= goal:
                                break
                            if time.monotonic() - fold.published_at > PUBLISH_INTERVAL_S * 4:
                                await fold.publish(self._ttl_seconds)
                    await fold.settle(followers)
            except errors.LeaseHeld:
                raise
            except errors.CommitConflict as error:
                overtaken = error
                continue
            return folded
        assert overtaken is not None
        raise overtaken

    @asynccontextmanager
    async def _left_whole(
        self, fold: TenantFold, followers: Sequence[TenantFold]
    ) -> AsyncIterator[None]:
        """Whatever ends a fold: what came before it is committed, and memory is what is committed
        or empty.
        """
        try:
            yield
        except errors.LeaseHeld as error:
            left_ms = error.facts["left_ms"]
            assert isinstance(left_ms, int)
            self._leases.lose(fold.tenant, fold.projection.name, left_ms)
            raise
        except errors.CommitConflict:
            raise
        except Exception:
            for one in (fold, *followers):
                await one.settle_or_forget()
            fold.forget()
            raise
        except BaseException:
            for one in (fold, *followers):
                await one.abandon()
            raise

    # -- for ever -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Folds whatever comes, until cancelled; an error stops its tenant, not the others."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._sweep_for_ever())
                tasks.create_task(self._take_over_for_ever())
                for _ in range(FOLDS_AT_ONCE):
                    tasks.create_task(self._work())
        finally:
            await self._leave()

    def _wake(self, tenants: Iterable[str]) -> None:
        for tenant in tenants:
            if self._leases.held_elsewhere(tenant):
                continue
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
        began = time.monotonic()
        try:
            if self._rests(tenant):
                return
            async with self._lock_of(tenant):
                held = await self._leases.take(tenant)
                folds = await self._folds_of(tenant, held)
                for place, fold in enumerate(folds):
                    if not (place and fold.stands_with(folds[0])):
                        await self._catch_up(fold, pages=1, followers=folds[place + 1 :])
                    await fold.publish(self._ttl_seconds)
                    if fold.is_behind or fold.copies_are_due:
                        self._wake([tenant])
            if self.stopped.pop(tenant, None):
                _log.warning("tenant %s: folded again", tenant)
        except errors.LeaseHeld as error:
            _log.debug("%s", error)  # its holder has had the same hint
        except errors.CommitConflict:
            self._wake([tenant])  # another projector was at it; what it leaves is ours
        except errors.LedgerError as error:
            await self._stop(tenant, error, began)
            await self._leave([tenant])
        except Exception as error:  # noqa: BLE001 - logged; it must not stop the other tenants
            _log.exception("tenant %s: a defect in a fold", tenant)
            told = errors.ServerError(f"{type(error).__name__}: {error}")
            await self._stop(tenant, told, began)
            await self._leave([tenant])

    async def _leave(self, tenants: Sequence[str] | None = None) -> None:
        """Others need not wait for leases to expire; where the server is away they will."""
        with suppress(errors.LedgerError, TimeoutError):
            async with asyncio.timeout(1):
                await self._leases.release(tenants)

    def _rests(self, tenant: str) -> bool:
        """Whether it was published a moment ago; it is woken again when its time has come."""
        known = [self._folds.get((tenant, one.name)) for one in self.projections]
        published_at = max([fold.published_at for fold in known if fold], default=0.0)
        wait_s = published_at + PUBLISH_INTERVAL_S - time.monotonic()
        if wait_s > 0:
            asyncio.get_running_loop().call_later(wait_s, self._wake, [tenant])
        return wait_s > 0

    async def _stop(
        self, tenant: str, error: errors.LedgerError, began: float = float("inf")
    ) -> None:
        """Keeps why a tenant is not folded; it is tried again at each sweep and each hint."""
        if str(self.stopped.get(tenant)) != str(error):
            _log.error("tenant %s: not folded: %s", tenant, error)
        self.stopped[tenant] = error
        await self._show_stopped(tenant, error, began)

    async def _show_stopped(self, tenant: str, error: errors.LedgerError, began: float) -> None:
        """Readers see by name what only a person can put right; the server's troubles pass. Not
        of a projection that was folded and published since `began`: another one stopped.
        """
        if isinstance(error, errors.Unavailable | errors.CommitConflict):
            return
        for projection in self.projections:
            try:
                async with self._lock_of(tenant):
                    fold = self._fold_of(tenant, projection)
                    if fold.committed is not None and fold.published_at >= began:
                        continue
                    await fold.show_stopped(type(error).__name__, self._ttl_seconds)
            except Exception as also:  # noqa: BLE001 - logged; what stopped it may stop this too
                _log.warning("tenant %s: readers are not told that it stopped: %s", tenant, also)

    # -- the sweep ----------------------------------------------------------------------------

    async def _sweep_for_ever(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async for stale in self._stale_batches():
                    self._wake(stale)
            except errors.LedgerError as error:
                _log.warning("sweep: %s", error)
            rest_s = began + SWEEP_INTERVAL_S - time.monotonic()
            await asyncio.sleep(max(rest_s, PUBLISH_INTERVAL_S))

    async def _take_over_for_ever(self) -> None:
        """What others folded when there was news is looked at as soon as their leases run out."""
        while True:
            await asyncio.sleep(TAKEOVER_S)
            expired = self._leases.expired()
            for start in range(0, len(expired), SWEEP_TENANTS):
                try:
                    self._wake(await self._stale_among(expired[start : start + SWEEP_TENANTS]))
                except errors.LedgerError as error:  # the sweep finds them
                    _log.debug("leases that ran out: %s", error)

    async def stale_tenants(self) -> list[str]:
        """Tenants whose head is past what is folded, or whose published copy is gone or ageing."""
        return [tenant async for batch in self._stale_batches(pause=False) for tenant in batch]

    async def _stale_batches(self, *, pause: bool = True) -> AsyncIterator[list[str]]:
        tenants = await self.ledger.tenants()
        random.shuffle(tenants)  # so that several workers do not all begin with the same ones
        for start in range(0, len(tenants), SWEEP_TENANTS):
            batch = tenants[start : start + SWEEP_TENANTS]
            yield await self._stale_among(batch)
            if pause:
                await asyncio.sleep(len(batch) / SWEEP_TENANTS_PER_S)

    async def _stale_among(self, tenants: Sequence[str]) -> list[str]:
        asked: list[tuple[str, bytes]] = []
        stores = {tenant: self._probes_of(tenant) for tenant in tenants}
        for tenant, probes in stores.items():
            asked.append((keys.head(tenant), head_command(tenant)))
            for _, commands in probes:
                asked += commands
        replies = iter(await self.server.exchange_each(asked))
        stale = []
        for tenant, probes in stores.items():
            head_reply = next(replies)
            answers = [(store, [next(replies) for _ in asks]) for store, asks in probes]
            try:
                head = parse_head(tenant, self.server.checked(head_reply))
                current = [one.is_current(head, got, self._ttl_seconds) for one, got in answers]
                if not all(current) or tenant in self.stopped:
                    stale.append(tenant)
            except errors.LedgerError as error:
                await self._stop(tenant, error)
            except Exception as error:  # noqa: BLE001 - logged; it must not stop the other tenants
                await self._stop(tenant, errors.ServerError(f"{type(error).__name__}: {error}"))
        return stale

    def _probes_of(self, tenant: str) -> list[tuple[FoldStore, list[tuple[str, bytes]]]]:
        if tenant not in self._probes:
            made = [
                FoldStore(self.server, tenant, one, worker=self.worker) for one in self.projections
            ]
            self._probes[tenant] = [(store, store.probe()) for store in made]
        return self._probes[tenant]

    # -- rebuild ------------------------------------------------------------------------------

    async def rebuild(
        self,
        tenant: str,
        name: str = "governance",
        *,
        accept_rollback: bool = False,
        on_progress: Progress | None = None,
    ) -> int:
        """Folds a tenant anew from its first entry, beside the state that readers see, and then
        puts the new one in its place in one step; the entries folded.

        Args:
            tenant: whose.
            name: which projection.
            accept_rollback: where the ledger is behind, or other than, what was folded, take it as
                it is now: a new epoch begins, and what was folded of the old one is dropped.
            on_progress: called with the tenant and the entries just folded.

        Raises:
            NotFound: nothing is recorded for the tenant, or there is no such projection.
            LedgerRolledBack: it went back, and nobody accepted that.
            LeaseHeld: it is being rebuilt already.
            CommitConflict: other projectors kept overtaking it.
        """
        projection = self._projection(name)
        if not (await self.ledger.head(tenant)).seq:
            raise errors.NotFound(f"tenant {tenant}: nothing is recorded", tenant=tenant)
        # One of its own: a worker of this projector may be in the middle of a page of the other.
        live_store = FoldStore(self.server, tenant, projection, worker=self.worker)
        live = TenantFold(self.server, tenant, projection, live_store)
        try:
            await self._check_rollback(live)
        except errors.LedgerRolledBack:
            if not accept_rollback:
                raise
            await self._begin_epoch(live)
        worker = worker_name()  # of this call: another one on the same object is refused too
        leases = Leases(self.server, worker, [projection], rebuild=True)
        await leases.take(tenant)
        try:
            store = FoldStore(self.server, tenant, projection, worker=worker, rebuild=True)
            return await self._rebuild_beside(live, store, on_progress)
        finally:
            await leases.release([tenant])

    async def _rebuild_beside(
        self, live: TenantFold, store: FoldStore, on_progress: Progress | None
    ) -> int:
        await store.discard()
        fold = TenantFold(self.server, live.tenant, live.projection, store)
        fold.published_at = float("inf")  # readers keep the old one until this one is whole
        folded = await self._catch_up_and_adopt(fold, live.store, on_progress)
        self._folds.pop((live.tenant, live.projection.name), None)
        # By the live fold: what is adopted lies under the live keys, agents' entities too.
        await live.begin()
        await live.publish(self._ttl_seconds, anew=True, whole=True)
        return folded

    async def _catch_up_and_adopt(
        self, fold: TenantFold, live: FoldStore, on_progress: Progress | None
    ) -> int:
        """Folds to the head, and on for as long as the live fold is further by then; at last that
        is held up meanwhile.
        """
        folded, holder = 0, ""
        try:
            for left in reversed(range(ATTEMPTS)):
                folded += await self._catch_up(fold, on_progress)
                assert fold.committed is not None
                try:
                    await fold.store.adopt(fold.committed, holder)
                except errors.CommitConflict as error:
                    if not left or "ahead_seq" not in error.facts:
                        raise
                else:
                    break
                if left <= ATTEMPTS // 2:
                    holder = worker_name()  # not this worker's: its own commits are to wait too
                    await live.seize(holder, SEIZED_MS)
        finally:
            if holder:
                await live.release(holder)
        return folded

    async def _check_rollback(self, live: TenantFold) -> None:
        """Raises LedgerRolledBack where what is committed cannot be gone on from."""
        position = await live.store.position()
        if position is None:
            return
        walk = Walk(self.server, live.tenant)
        await walk.start_at(position)
        async with aclosing(walk.pages()) as pages:
            async for _ in pages:
                break  # a walk meets another entry in its place with the first page

    async def _begin_epoch(self, live: TenantFold) -> None:
        """A new epoch, unless the ledger has one that is not what was folded already."""
        head = await self.ledger.head(live.tenant)
        position = await live.store.position()
        if position is not None and position.epoch == head.epoch:
            on = [keys.decisions(live.tenant), keys.head(live.tenant)]
            new = secrets.token_hex(8)
            try:
                await self.server.function("govledger_begin_epoch", on, head.epoch, new)
            except errors.ServerError as error:
                if "LEDGERMOVED " not in error.message:
                    raise
                return  # somebody else accepted it meanwhile
            _log.warning("tenant %s: rollback accepted; epoch %s began", live.tenant, new)
