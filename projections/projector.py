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
from functools import partial
from typing import Any, Final

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import Server, pack
from ledger.stream import Entry, Head, Walk, head_command, parse_head
from projections.bodies import DECISION, FOLLOW_UPS, unreadable
from projections.governance import Governance
from projections.projection import DECISION_PREFIX, STATE, Entities, Projection, Unfoldable
from projections.store import Committed, FoldStore
from projections.subjects import Subjects, latest

__all__ = ["Projector"]

PUBLISH_INTERVAL_S: Final = 0.05
"""A busy tenant is published at most 20 times a second."""

SWEEP_INTERVAL_S: Final = 5.0
FOLDS_AT_ONCE: Final = 8
ENTITIES_KEPT: Final = 2048
HEADS_A_CALL: Final = 1000
ATTEMPTS: Final = 5
_log = logging.getLogger("ledger")

Progress = Callable[[str, int], None]


class TenantFold:
    """One tenant's fold of one projection, as far as it is in memory."""

    def __init__(
        self, server: Server, tenant: str, projection: Projection, store: FoldStore
    ) -> None:
        self.tenant = tenant
        self.projection = projection
        self._naming = getattr(projection, "naming", None)
        self._apply_all = getattr(projection, "apply_all", None) or partial(apply_each, projection)
        self.store = store
        self.committed: Committed | None = None
        self.published_at = 0.0
        self.published_seq = -1
        self._server = server
        self._walk: Walk | None = None
        self._entities: dict[str, dict[str, Any]] = {}
        self._subjects = Subjects(server, tenant)

    @property
    def seq(self) -> int:
        """The last ordinal that is committed."""
        return self.committed.position.seq if self.committed and self.committed.position else 0

    @property
    def state(self) -> dict[str, Any]:
        """The entity `state`."""
        return self._entities.get(STATE, {})

    @property
    def is_behind(self) -> bool:
        """Whether the head that was last seen is past what is folded."""
        return self._walk is not None and self.seq < self._walk.head.seq

    def forget(self) -> None:
        """Drops what is in memory: the next fold begins from what is committed."""
        self.committed = self._walk = None
        self._entities.clear()
        self._subjects.forget()

    async def begin(self) -> Walk:
        """Where the next fold goes on.

        Raises:
            LedgerRolledBack: the ledger is behind, or other than, what is committed.
        """
        if self._walk is None or self.committed is None:
            self.committed, state = await self.store.committed()
            self._entities.clear()
            if state:
                self._entities[STATE] = state
            walk = Walk(self._server, self.tenant)
            if self.committed.position:
                await walk.start_at(self.committed.position)
            else:
                await walk.start_after(0)
            self._walk = walk
        else:
            await self._walk.refresh()
        return self._walk

    async def fold_page(self, walk: Walk, page: Sequence[Entry]) -> None:
        """Folds a page and commits it; on any error memory is dropped, and nothing is half done."""
        try:
            own = [entry for entry in page if not entry.foreign]
            changed, quarantined = await self._apply(own)
            assert self.committed is not None
            self.committed = await self.store.commit(
                self.committed, walk.position, changed, quarantined
            )
        except BaseException:
            self.forget()
            raise

    async def _apply(
        self, entries: Sequence[Entry]
    ) -> tuple[dict[str, dict[str, Any]], dict[int, str]]:
        """The entities that changed, and why which entries could not be folded."""
        subjects, names = await self._gather(entries)
        entities = self._entities
        refused = self._apply_all(entities, entries, subjects)
        for seq, reason in refused.items():
            self._name_quarantined(seq, reason)
        changed = {name: entities[name] for name in names if name in entities}
        self._trim(entries)
        return changed, refused

    async def _gather(  # noqa: C901 - one pass over a page is what makes a fold fast
        self, entries: Sequence[Entry]
    ) -> tuple[list[Entry | None], dict[str, None]]:
        """What each entry follows, and what they name; all that there is of it is at hand then.

        It waits only where something is not: then what all the rest need is read at once.
        """
        entities, of, untouched = self._entities, self._subjects.of, self._subjects.untouched
        names_of, naming = self.projection.names, self._naming
        names: dict[str, None] = {STATE: None}
        absent: set[str] = set()
        subjects: list[Entry | None] = []
        for entry in entries:
            fields, subject, first = entry.raw_fields, None, False
            kind = fields[1]
            if kind == DECISION:
                untouched[fields[3]] = entry
            elif kind in FOLLOW_UPS:
                found = of(entry)
                if found is None:
                    absent |= await self._look_ahead(entries, entry)
                    found = of(entry)
                    assert found is not None
                subject, first = found
            subjects.append(subject)
            if naming is not None and kind not in naming:
                continue
            try:
                named = names_of(entry)
            except Exception as error:  # noqa: BLE001 - a defect is raised again
                named = _unnamed(entry, error)
            for name in named:
                if name in names:
                    continue
                names[name] = None
                if name in entities or name in absent:
                    continue
                if not name.startswith(DECISION_PREFIX) or not (first or subject is None):
                    absent |= await self._look_ahead(entries, entry)
        return subjects, names

    async def _look_ahead(self, page: Sequence[Entry], at: Entry) -> set[str]:
        """Reads what the rest of a page needs and what is not at hand; what exists nowhere."""
        entries = page[page.index(at) :]
        untouched = await self._subjects.look_ahead(entries)
        new = {DECISION_PREFIX + decision_id for decision_id in untouched}
        named = set[str]()
        for entry in entries:
            try:
                named.update(self.projection.names(entry))
            except Exception as error:  # noqa: BLE001 - a defect is raised again
                _unnamed(entry, error)
        missing = named - new - self._entities.keys()
        self._entities |= await self.store.load(missing)
        return missing - self._entities.keys()

    def _name_quarantined(self, seq: int, reason: str) -> None:
        fold = f"{self.projection.name}@{self.projection.version}"
        _log.warning("tenant %s: %s cannot fold seq %d: %s", self.tenant, fold, seq, reason)

    def _trim(self, page: Sequence[Entry]) -> None:
        """Bounds memory; what is dropped is in Redis."""
        for entry in page:
            entry.memo = None
        self._subjects.trim()
        state = self._entities.get(STATE)
        self._entities = latest(self._entities, ENTITIES_KEPT)
        if state is not None:
            self._entities[STATE] = state

    async def publish(self, ttl_seconds: int, *, force: bool = False) -> None:
        """Puts the copy that readers take."""
        if self.committed is None or self.committed.position is None:
            return
        await self.store.publish(self.committed, self.state, ttl_seconds, force=force)
        if self.published_seq < 0:
            await self.store.activate()
        self.published_at, self.published_seq = time.monotonic(), self.seq


def apply_each(
    projection: Projection,
    entities: Entities,
    entries: Sequence[Entry],
    subjects: Sequence[Entry | None],
) -> dict[int, str]:
    """Folds entries one after the other, and counts those that cannot be folded; by seq, why.

    Raises:
        Exception: what a defect in the projection raises.
    """
    refused: dict[int, str] = {}
    for entry, subject in zip(entries, subjects, strict=True):
        try:
            projection.apply(entities, entry, subject)
        except Exception as error:  # noqa: BLE001 - a defect is raised again
            reason = _reason(projection, entities, entry, subject, error)
            if reason is not None:
                refused[entry.seq] = reason
                projection.quarantined(entities, entry)
    return refused


def _reason(
    projection: Projection,
    entities: Entities,
    entry: Entry,
    subject: Entry | None,
    error: Exception,
) -> str | None:
    """Why an entry cannot be folded; None where it was, without a decision that is unreadable."""
    if isinstance(error, Unfoldable):
        return error.reason
    reason = unreadable(entry)
    if reason is None and subject is not None and unreadable(subject) is not None:
        try:
            projection.apply(entities, entry, None)
        except Unfoldable as refusal:
            reason = refusal.reason
    elif reason is None:
        raise error
    return reason


def _unnamed(entry: Entry, error: Exception) -> Sequence[str]:
    """No names, where an entry cannot be folded: then `apply` raises as `names` did.

    Raises:
        Exception: `error`, if it is a defect in the projection.
    """
    if isinstance(error, Unfoldable) or unreadable(entry) is not None:
        return ()
    raise error


def _hinted(fields: Sequence[bytes]) -> str | None:
    """The tenant of a feed entry; None for what somebody else put there."""
    try:
        return keys.checked_tenant(fields[1].decode())
    except (errors.InvalidTenant, UnicodeDecodeError):
        return None


class Projector:
    """Keeps the state of every tenant folded and published."""

    def __init__(self, ledger: Ledger, projections: Sequence[Projection] = ()) -> None:
        """`projections`: default `Governance()`."""
        self.server = ledger.server
        self.ledger = ledger
        default: Projection = Governance()
        self.projections = tuple(projections) or (default,)
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
                for projection in self.projections:
                    fold = self._fold_of(tenant, projection)
                    count = await self._catch_up(fold, on_progress)
                    await fold.publish(self._ttl_seconds)
                    folded[tenant] = folded.get(tenant, 0) + count
            except errors.LedgerError as error:
                failed.append(error)
                if len(names) > 1:
                    _log.error("tenant %s: not folded: %s", tenant, error)
        if failed:
            raise failed[0]
        return folded

    async def _catch_up(
        self, fold: TenantFold, on_progress: Progress | None = None, *, pages: int | None = None
    ) -> int:
        """Folds up to the head, at most `pages` pages; the entries folded."""
        folded = 0
        overtaken: errors.CommitConflict | None = None
        for _ in range(ATTEMPTS):
            try:
                walk = await fold.begin()
                goal = walk.head.seq
                async with aclosing(walk.pages()) as found:
                    async for page in found:
                        await fold.fold_page(walk, page)
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
            for projection in self.projections:
                fold = self._fold_of(tenant, projection)
                wait_s = fold.published_at + PUBLISH_INTERVAL_S - time.monotonic()
                if wait_s > 0:
                    asyncio.get_running_loop().call_later(wait_s, self._wake, [tenant])
                    return
                await self._catch_up(fold, pages=1)
                await fold.publish(self._ttl_seconds)
                if fold.is_behind:
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
        await fold.publish(self._ttl_seconds, force=ahead)
        return folded
