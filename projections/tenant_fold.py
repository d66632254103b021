"""One tenant's fold of one projection: pages of entries, folded and committed one by one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ledger import errors
from ledger.server import Server
from ledger.stream import Entry, Position, Walk, dropped
from projections.bodies import DECISION, FOLLOW_UPS, names_of, read_all, unreadable
from projections.copies import EntityCopies
from projections.projection import (
    DECISION_PREFIX,
    STATE,
    CopiedEntities,
    Entities,
    PageProjection,
    Projection,
    Unfoldable,
)
from projections.store import Committed, FoldStore, Standing
from projections.subjects import Subjects, latest

__all__ = ["TenantFold"]

ENTITIES_KEPT: Final = 4096
"""Beside those of the page at hand; up to twice as many."""

STANDING_S: Final = 5.0
_log = logging.getLogger("ledger")


_ApplyAll = Callable[[Entities, Sequence[Entry], Sequence[Entry | None]], dict[int, str]]


class _Needs(NamedTuple):
    """What a page of entries needs, when all of it that exists is at hand.

    Attributes:
        subjects: for each entry the decision that it follows, recorded before it; None for most.
        names: the entities that they may touch, and behind which seq each came to be: that of the
            decision that it is about, or 0 where nothing is known of it.
        orphans: those among them of decisions that are not recorded.
    """

    subjects: list[Entry | None]
    names: dict[str, int]
    orphans: set[str]


class _Landing(NamedTuple):
    """A commit under way, and the entities that it changes."""

    commit: asyncio.Future[Committed]
    changed: Entities


class TenantFold:
    """One tenant's fold of one projection, as far as it is in memory."""

    def __init__(
        self, server: Server, tenant: str, projection: Projection, store: FoldStore
    ) -> None:
        self.tenant = tenant
        self.projection = projection
        self._naming: Container[bytes] | None = None
        self._wants_subjects = True
        self._apply_all: _ApplyAll = partial(_apply_each, projection)
        if isinstance(projection, PageProjection):
            self._naming, self._apply_all = projection.naming, projection.apply_all
            self._wants_subjects = projection.wants_subjects
        self._copies: EntityCopies | None = None
        if isinstance(projection, CopiedEntities):
            self._copies = EntityCopies(server, tenant, projection, store)
        self.store = store
        self.committed: Committed | None = None
        self._folded: Position | None = None
        """How far memory is: past the committed position while a commit is under way."""
        self._memory = 0
        """Which memory this is: another one once it was dropped, or a page was applied to it."""
        self._landing: _Landing | None = None
        self._since: Mapping[str, int] = {}
        """Of the entities that were applied last; see `_Needs.names`."""
        self.published_at = 0.0
        self._standing: tuple[Standing, float] | None = None
        self._left: Committed | None = None
        self._head_seq = 0
        self._marked: str | None = None
        self._published: str | None = None
        """The commit that was published last."""
        self._shown: tuple[str, str] | None = None
        """What readers were told last: at which commit it stopped, and why."""
        self._server = server
        self._walk: Walk | None = None
        self._entities: dict[str, dict[str, Any]] = {}
        self._subjects = Subjects(server, tenant)

    @property
    def seq(self) -> int:
        """The last ordinal that is committed."""
        return self.committed.position.seq if self.committed and self.committed.position else 0

    @property
    def folded_seq(self) -> int:
        """The last ordinal that is folded, and committed or about to be."""
        return self._folded.seq if self._folded else 0

    @property
    def state(self) -> dict[str, Any]:
        """The entity `state`."""
        return self._entities.get(STATE, {})

    @property
    def is_behind(self) -> bool:
        """Whether the head that was last seen is past what is folded."""
        return self.seq < self._head_seq

    @property
    def copies_are_due(self) -> bool:
        """Whether copies of entities are still to be published."""
        begun = self.committed is not None and self.committed.position is not None
        return begun and self._copies is not None and self._copies.are_due

    def stands_with(self, other: TenantFold) -> bool:
        """Whether both have committed the same entries."""
        if self.committed is None or other.committed is None:
            return False
        return self.committed.position == other.committed.position

    def forget(self) -> None:
        """Drops what is in memory: the next fold begins from what is committed."""
        if self._landing is not None:  # it may land: the next fold begins where it then stands
            self._landing.commit.add_done_callback(_seen)
            self._landing = None
        self._memory += 1
        self._left = self.committed or self._left
        self.committed = self._folded = self._walk = None
        self._entities.clear()
        self._subjects.forget()

    def _check_memory(self, memory: int) -> None:
        """Whoever has waited goes on in the memory that it began with, or not at all."""
        if memory != self._memory:
            raise errors.CommitConflict(
                f"tenant {self.tenant}: {self.projection.name} was begun anew or folded meanwhile",
                hint="the next fold goes on from what is committed",
            )

    def begin_with(self, state: dict[str, Any]) -> None:
        """What is applied next goes on top of this entity `state`."""
        self._entities[STATE] = state

    async def begin(self) -> Walk:
        """Where the next fold goes on.

        Raises:
            LedgerRolledBack: the ledger is behind, or other than, what is committed.
        """
        await self.settle()
        if self.committed is None:
            await self._load()
            assert self.committed is not None
        if self._walk is None:
            walk = Walk(self._server, self.tenant)
            if self.committed.position:
                await walk.start_at(self.committed.position)
            else:
                await walk.start_after(0)
            self._walk = walk
        else:
            await self._walk.refresh()
        self._head_seq = self._walk.head.seq
        return self._walk

    async def _load(self) -> None:
        self.forget()
        self.committed, state = await self.store.committed()
        self._folded = self.committed.position
        self._left, self._marked = self.committed, self.committed.stopped
        if state:
            self._entities[STATE] = state
        if self._copies is not None:
            self._copies.begin(self.seq)

    async def fold_page(
        self, walk: Walk, page: Sequence[Entry], followers: Sequence[TenantFold] = ()
    ) -> None:
        """Folds a page and commits it; on any error memory is dropped, and nothing is half done.

        `followers`, other folds of the tenant that stand where this one stood, fold the page too:
        it is read and decoded once for all.
        """
        await self.fold_ahead(walk, page, followers)
        await self.settle(followers)

    async def fold_ahead(
        self, walk: Walk, page: Sequence[Entry], followers: Sequence[TenantFold] = ()
    ) -> None:
        """`fold_page` that does not wait for its own commit, but for the one before: the server
        works on it while the next page is folded. `settle` waits for the last one.
        """
        before = self._folded
        try:
            await self._fold_page(walk, page)
            for follower in followers:
                await follower.follow(walk, page, before)
        finally:
            _drop_bodies(page)

    async def settle(self, followers: Sequence[TenantFold] = ()) -> None:
        """Waits until what is folded is committed; on any error memory is dropped.

        Raises:
            CommitConflict, LeaseHeld, Unavailable: as `FoldStore.commit`; not what `followers`
                meet, as their own walks meet it again.
        """
        for follower in followers:
            await follower.settle_or_forget()
        landing = self._landing
        if landing is None:
            return
        try:
            committed = await landing.commit
        except Exception:
            self.forget()
            raise
        if self._landing is not landing:  # memory was dropped meanwhile
            return
        self._landing, self.committed = None, committed
        if self._copies is not None:
            self._copies.note(landing.changed, self.seq)

    async def settle_or_forget(self) -> None:
        """`settle` that raises nothing: whoever folds on from what is committed meets it again."""
        try:
            await self.settle()
        except Exception as error:  # noqa: BLE001 - its own walk meets it again, and raises it
            _log.debug("tenant %s: %s: %s", self.tenant, self.projection.name, error)

    async def follow(self, walk: Walk, page: Sequence[Entry], before: Position | None) -> None:
        """Folds a page that begins behind `before` and that another fold has read.

        Where this one stands elsewhere, or that fails, its own walk comes to it, and says why.
        """
        try:
            if self.committed is None:
                await self._load()
            self._head_seq = walk.head.seq
            if self.committed is not None and self._folded == before:
                await self._fold_page(walk, page)
                self._walk = None
        except Exception as error:  # noqa: BLE001 - its own walk meets it again, and raises it
            _log.debug("tenant %s: %s: %s", self.tenant, self.projection.name, error)

    async def _fold_page(self, walk: Walk, page: Sequence[Entry]) -> None:
        try:
            folded = self.folded_seq
            if page[0].seq != folded + 1:
                raise errors.CommitConflict(  # noqa: TRY301 - so that memory is dropped here too
                    f"tenant {self.tenant}: {self.projection.name} is folded to seq {folded}, "
                    f"so it cannot fold a page that begins with seq {page[0].seq}",
                    hint="the next fold goes on from what is committed",
                )
            own, position = [entry for entry in page if not entry.foreign], walk.position
            changed, quarantined = await self.apply(own, keep_bodies=True)
            memory = self._memory
            await self.settle()
            self._check_memory(memory)
            assert self.committed is not None
            commit = self.store.commit(self.committed, position, changed, quarantined, self._since)
            self._landing = _Landing(asyncio.ensure_future(commit), changed)
            self._folded = position
            await asyncio.sleep(0)  # so that it is sent now, not when we next wait
        except Exception:
            await self.settle_or_forget()
            self.forget()
            raise
        except BaseException:
            await self.abandon()
            raise

    async def abandon(self) -> None:
        """Drops what is in memory, and the commit that is under way, which may land or not."""
        landing = self._landing
        self.forget()
        if landing is not None:
            await dropped(landing.commit)

    async def apply(
        self, entries: Sequence[Entry], *, keep_bodies: bool = False
    ) -> tuple[dict[str, dict[str, Any]], dict[int, str]]:
        """Folds entries of ours in memory; what changed, and why which of them were refused."""
        memory = self._memory
        needs, entities = await self._gather(entries), self._entities
        self._check_memory(memory)
        self._memory += 1
        refused = self._apply_all(entities, entries, needs.subjects) if entries else {}
        for seq, reason in refused.items():
            self._name_quarantined(seq, reason)
        self._check_orphans(needs)
        self._since = needs.names
        changed = {name: entities[name] for name in needs.names if name in entities}
        self._trim()
        if not keep_bodies:
            _drop_bodies(entries)
        return changed, refused

    async def _gather(self, entries: Sequence[Entry]) -> _Needs:
        """Sees to it that what the page needs is at hand, as far as it exists.

        An entity is not looked for where it cannot exist: of a decision that has no follow-up yet.
        """
        memory, subjects = self._memory, list[Entry | None]([None] * len(entries))
        first = await self._find_subjects(entries, subjects) if self._wants_subjects else ()
        needs, sought, naming = _Needs(subjects, {STATE: 0}, set()), dict[str, int](), self._naming
        names, known = needs.names, self._entities
        for place, entry in enumerate(entries):
            if naming is not None and entry.raw_fields[1] not in naming:
                continue
            for name in names_of(self.projection, entry):
                if name in names:
                    continue
                of_decision, subject = name.startswith(DECISION_PREFIX), subjects[place]
                names[name] = subject.seq if of_decision and subject is not None else 0
                if name in known:
                    continue
                if of_decision and subject is None:
                    needs.orphans.add(name)
                elif not of_decision or entry.seq not in first:
                    sought[name] = names[name]
        if sought:
            found = await self._load_entities(sought)
            self._check_memory(memory)
            self._entities.update(found)
        return needs

    async def _load_entities(self, names: Mapping[str, int]) -> Entities:
        """Those that exist; from Redis what no commit under way is changing there."""
        if self._landing is None:
            return await self.store.load(names)
        landing = self._landing.changed
        elsewhere = {name: since for name, since in names.items() if name not in landing}
        found = await self.store.load(elsewhere)
        return found | {name: landing[name] for name in names if name in landing}

    async def _find_subjects(
        self, entries: Sequence[Entry], subjects: list[Entry | None]
    ) -> set[int]:
        """Puts the decision that an entry follows, recorded before it, in the entry's place; the
        seqs of those that are the first to follow theirs.

        Waits only where a decision is not at hand: then all that the rest need are read at once.
        """
        read_all(entries)
        memory, kept, first = self._memory, self._subjects, set[int]()
        untouched = kept.untouched
        for place, entry in enumerate(entries):
            fields = entry.raw_fields
            kind = fields[1]
            if kind == DECISION:
                untouched[fields[3]] = entry
            elif kind in FOLLOW_UPS:
                found = kept.of(entry)
                if found is None:
                    await kept.look_ahead(entries[place:])
                    self._check_memory(memory)
                    found = kept.of(entry)
                    assert found is not None
                subjects[place], is_first = found
                if is_first:
                    first.add(entry.seq)
        return first

    def _check_orphans(self, needs: _Needs) -> None:
        made = needs.orphans & self._entities.keys()
        if made:
            made -= {DECISION_PREFIX + one.id for one in needs.subjects if one is not None}
        for name in made:
            # When the decision is recorded after all, nobody will look for it.
            raise RuntimeError(f"{self.projection.name} made {name}, which is not recorded")

    def _name_quarantined(self, seq: int, reason: str) -> None:
        fold = f"{self.projection.name}@{self.projection.version}"
        _log.warning("tenant %s: %s cannot fold seq %d: %s", self.tenant, fold, seq, reason)

    def _trim(self) -> None:
        """Bounds memory; what is dropped is in Redis."""
        self._subjects.trim()
        state = self._entities.get(STATE)
        self._entities = latest(self._entities, ENTITIES_KEPT)
        if state is not None:
            self._entities[STATE] = state

    async def standing(self) -> Standing:
        """What this version is to readers; asked again after STANDING_S."""
        now = time.monotonic()
        if self._standing is None or now - self._standing[1] > STANDING_S:
            self._standing = await self.store.standing(), now
        return self._standing[0]

    async def publish(self, ttl_seconds: int, *, anew: bool = False, whole: bool = False) -> None:
        """Puts the copies that readers take, if this is the version that they take; of entities'
        copies a thousand, or the `whole`. A newer version takes over here, when it has caught up;
        the first one at once. `anew`: the fold was rebuilt.
        """
        await self.settle()
        committed, memory = self.committed, self._memory
        if committed is None or committed.position is None:
            return
        standing = await self.standing()
        if standing is Standing.SUPERSEDED or (standing is Standing.NEXT and self.is_behind):
            return
        if self._published == committed.token:  # by now another worker may have marked it
            self._marked = await self.store.stopped()
        if self._marked is not None and not await self._unmark():
            return
        self._check_memory(memory)
        await self.store.publish(committed, self.state, ttl_seconds, anew=anew)
        while self._copies is not None and self._copies.are_due:
            self._check_memory(memory)
            await self._copies.publish(committed, self._entities, ttl_seconds, anew=anew)
            if not whole:
                break
        if standing is Standing.NEXT or not self.published_at:
            await self.store.activate()
            self._standing = None
        self.published_at, self._published = time.monotonic(), committed.token
        self._shown = None  # where it stops here once more, readers are told once more

    async def _unmark(self) -> bool:
        """Takes back that the fold has stopped; False where another worker goes on with it."""
        assert self.committed is not None
        try:
            await self.store.mark_stopped(self.committed, None)
        except errors.CommitConflict as error:
            _log.debug("%s", error)
            self.forget()
            return False
        self._marked = None
        return True

    async def show_stopped(self, reason: str, ttl_seconds: int) -> None:
        """Tells readers why what they read does not go on; the next publish takes it back."""
        found = await self.store.whole_commit()
        if found is None:
            return
        committed, state = found
        left = self.committed or self._left or committed
        if committed.token != left.token or self._shown == (committed.token, reason):
            return  # others go on with it, or it is known
        try:
            await self.store.mark_stopped(committed, reason)
        except errors.CommitConflict as error:
            _log.debug("%s", error)  # others go on with it
            return
        if await self.standing() in (Standing.ACTIVE, Standing.PINNED):
            await self.store.publish(committed, state, ttl_seconds, stopped=reason)
            await self._publish_last_copies(committed, ttl_seconds)
        self._marked, self._shown = reason, (committed.token, reason)

    async def _publish_last_copies(self, committed: Committed, ttl_seconds: int) -> None:
        """Entities' copies come as far as what is committed, as nothing else will bring them."""
        if self._copies is None or committed.position is None:
            return
        if self.committed is None:
            self._copies.begin(committed.position.seq)
        while self._copies.are_due:
            await self._copies.publish(committed, {}, ttl_seconds, anew=False)


def _seen(commit: asyncio.Future[Committed]) -> None:
    if not commit.cancelled():
        commit.exception()


def _drop_bodies(entries: Sequence[Entry]) -> None:
    """What is kept of entries is their bytes."""
    for entry in entries:
        entry.memo = None


def _apply_each(
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
