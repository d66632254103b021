"""One tenant's fold of one projection: pages of entries, folded and committed one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from ledger import errors
from ledger.server import Server
from ledger.stream import Entry, Walk
from projections.bodies import DECISION, FOLLOW_UPS, unreadable
from projections.projection import (
    DECISION_PREFIX,
    STATE,
    Entities,
    PageProjection,
    Projection,
    Unfoldable,
)
from projections.store import Committed, FoldStore, Replaces, Standing
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
        names: the entities that they may touch.
        orphans: those among them of decisions that are not recorded.
    """

    subjects: list[Entry | None]
    names: dict[str, None]
    orphans: set[str]


class TenantFold:
    """One tenant's fold of one projection, as far as it is in memory."""

    def __init__(
        self, server: Server, tenant: str, projection: Projection, store: FoldStore
    ) -> None:
        self.tenant = tenant
        self.projection = projection
        self._naming: Container[bytes] | None = None
        self._apply_all: _ApplyAll = partial(_apply_each, projection)
        if isinstance(projection, PageProjection):
            self._naming, self._apply_all = projection.naming, projection.apply_all
        self.store = store
        self.committed: Committed | None = None
        self.published_at = 0.0
        self._standing: tuple[Standing, float] | None = None
        self._left: Committed | None = None
        self._marked: str | None = None
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
        self._left = self.committed or self._left
        self.committed = self._walk = None
        self._entities.clear()
        self._subjects.forget()

    def begin_with(self, state: dict[str, Any]) -> None:
        """What is applied next goes on top of this entity `state`."""
        self._entities[STATE] = state

    async def begin(self) -> Walk:
        """Where the next fold goes on.

        Raises:
            LedgerRolledBack: the ledger is behind, or other than, what is committed.
        """
        if self._walk is None or self.committed is None:
            self.committed, state = await self.store.committed()
            self._left, self._marked = self.committed, self.committed.stopped
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
            changed, quarantined = await self.apply(own)
            if self.committed is None:
                raise errors.CommitConflict(  # noqa: TRY301 - so that memory is dropped here too
                    f"tenant {self.tenant}: {self.projection.name} was rebuilt meanwhile",
                    hint="the next fold goes on from there",
                )
            self.committed = await self.store.commit(
                self.committed, walk.position, changed, quarantined
            )
        except BaseException:
            self.forget()
            raise

    async def apply(
        self, entries: Sequence[Entry]
    ) -> tuple[dict[str, dict[str, Any]], dict[int, str]]:
        """Folds entries of ours in memory; what changed, and why which of them were refused."""
        needs, entities = await self._gather(entries), self._entities
        refused = self._apply_all(entities, entries, needs.subjects) if entries else {}
        for seq, reason in refused.items():
            self._name_quarantined(seq, reason)
        self._check_orphans(needs)
        changed = {name: entities[name] for name in needs.names if name in entities}
        self._trim(entries)
        return changed, refused

    async def _gather(self, entries: Sequence[Entry]) -> _Needs:  # noqa: C901 - one loop, for speed
        """Waits only where something is not at hand: then what all the rest need is read at once.

        An entity is not looked for where it cannot exist: of a decision that has no follow-up yet.
        """
        entities, subjects, naming = self._entities, self._subjects, self._naming
        needs, absent = _Needs([], {STATE: None}, set()), set[str]()
        for entry in entries:
            fields, subject, first = entry.raw_fields, None, False
            kind = fields[1]
            if kind == DECISION:
                subjects.untouched[fields[3]] = entry
            elif kind in FOLLOW_UPS:
                found = subjects.of(entry)
                if found is None:
                    absent |= await self._look_ahead(entries, entry)
                    found = subjects.of(entry)
                    assert found is not None
                subject, first = found
            needs.subjects.append(subject)
            if naming is not None and kind not in naming:
                continue
            for name in self._names(entry):
                if name in needs.names:
                    continue
                needs.names[name] = None
                if name in entities or name in absent:
                    continue
                if not name.startswith(DECISION_PREFIX) or not (first or subject is None):
                    absent |= await self._look_ahead(entries, entry)
                elif subject is None:
                    needs.orphans.add(name)
        return needs

    def _names(self, entry: Entry) -> Sequence[str]:
        try:
            return self.projection.names(entry)
        except Exception as error:
            if isinstance(error, Unfoldable) or unreadable(entry) is not None:
                return ()  # `apply` raises it too
            raise

    async def _look_ahead(self, page: Sequence[Entry], at: Entry) -> set[str]:
        """Reads what the rest of a page needs and what is not at hand; what exists nowhere."""
        entries = page[page.index(at) :]
        untouched = await self._subjects.look_ahead(entries)
        new = {DECISION_PREFIX + decision_id for decision_id in untouched}
        named = {name for entry in entries for name in self._names(entry)}
        missing = named - new - self._entities.keys()
        self._entities.update(await self.store.load(missing))
        return missing - self._entities.keys()

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

    def _trim(self, page: Sequence[Entry]) -> None:
        """Bounds memory; what is dropped is in Redis."""
        for entry in page:
            entry.memo = None
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

    async def publish(self, ttl_seconds: int, *, replaces: Replaces = "older") -> None:
        """Puts the copy that readers take, if this is the version that they take. A newer one
        takes over here, when it has caught up; the first one at once.
        """
        if self.committed is None or self.committed.position is None:
            return
        standing = await self.standing()
        if standing is Standing.SUPERSEDED or (standing is Standing.NEXT and self.is_behind):
            return
        if standing is Standing.PINNED and replaces == "older":
            replaces = "pinned"
        await self.store.publish(self.committed, self.state, ttl_seconds, replaces=replaces)
        if standing is Standing.NEXT or not self.published_at:
            await self.store.activate()
            self._standing = None
        if self._marked is not None:
            await self.store.mark_stopped(None)
            self._marked = None
        self.published_at = time.monotonic()

    async def show_stopped(self, reason: str, ttl_seconds: int) -> None:
        """Tells readers why what they read does not go on; the next publish takes it back."""
        if self._marked == reason:
            return
        committed, state = await self.store.committed()
        if self._left is None or committed.token != self._left.token:  # others go on with it
            return
        if committed.position is None:
            return
        await self.store.mark_stopped(reason)
        if await self.standing() in (Standing.ACTIVE, Standing.PINNED):
            await self.store.publish(
                committed, state, ttl_seconds, replaces="equal", stopped=reason
            )
        self._marked = reason


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
