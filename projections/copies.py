"""Which entities' published copies are due, and since when.

A copy is put after the commit that changed its entity, so a worker that dies in between leaves one
that is old. Therefore the projection's hash has a mark: up to which seq every copy is up to date.
Whoever takes over reads the names of what changed since from the entries behind the mark. The same
way bounds memory: where too many copies are due, they are forgotten and found again by the entries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, Final

from ledger import errors
from ledger.server import Server
from ledger.stream import Walk
from projections.bodies import names_of
from projections.projection import CopiedEntities, Entities
from projections.store import Committed, FoldStore

__all__ = ["COPIES_AT_ONCE", "EntityCopies"]

COPIES_AT_ONCE: Final = 1000
"""So that other tenants do not wait; a page of entries names no more."""

_DUE_LIMIT: Final = 32 * COPIES_AT_ONCE
"""Some 3 MiB of names."""

_log = logging.getLogger("ledger")


class EntityCopies:
    """The published copies of one tenant's entities of one projection."""

    def __init__(
        self, server: Server, tenant: str, projection: CopiedEntities, store: FoldStore
    ) -> None:
        self._server = server
        self._tenant = tenant
        self._projection = projection
        self._store = store
        self._due: dict[str, None] = {}
        self._mark: int | None = None
        """Every copy has what was changed up to this seq; None: Redis has to be asked."""
        self._noted_after = 0
        """What was changed behind this seq is in `_due`."""
        self._seq = 0
        self._begun = 0
        self._walk: Walk | None = None

    def begin(self, seq: int) -> None:
        """The fold goes on from what is committed, up to `seq`, perhaps by another worker."""
        self._due.clear()
        self._begun += 1
        self._mark, self._walk, self._noted_after, self._seq = None, None, seq, seq

    def note(self, changed: Iterable[str], seq: int) -> None:
        """Entities were changed, and that was committed up to `seq`."""
        self._seq = seq
        for name in changed:
            if self._projection.entity_key(self._tenant, name) is not None:
                self._due[name] = None
        if len(self._due) > _DUE_LIMIT:
            self._due.clear()
            self._noted_after = seq

    @property
    def are_due(self) -> bool:
        """Whether some are known to be old, or may be; or the mark lies more than a page behind."""
        if self._due or self._mark is None or self._mark < self._noted_after:
            return True
        return self._seq - self._mark >= COPIES_AT_ONCE

    async def publish(
        self, committed: Committed, at_hand: Entities, ttl_seconds: int, *, anew: bool
    ) -> None:
        """Puts up to a thousand copies that are due, the oldest first; then moves the mark.
        `anew`: the fold was rebuilt, so copies of the same seq are replaced too.

        Raises:
            LedgerRolledBack, EntriesMissing: the entries that name what is due are not there.
            CommitConflict: the fold was begun anew meanwhile.
        """
        assert committed.position is not None
        begun = self._begun
        if self._mark is None:
            mark = await self._store.copies_mark(committed)
            self._check_begun(begun)
            self._mark = min(mark, self._noted_after)
        if self._mark < self._noted_after:
            names, seq = await self._named_behind(self._mark, committed.position.epoch)
        else:
            names = list(self._due)[:COPIES_AT_ONCE]
            seq = committed.position.seq if len(names) == len(self._due) else self._mark
        missing = [name for name in names if name not in at_hand]
        entities = (
            at_hand | await self._store.load(dict.fromkeys(missing, 0)) if missing else at_hand
        )
        values = self._values(names, entities)
        await self._store.publish_entities(committed, values, ttl_seconds, anew=anew)
        self._check_begun(begun)
        for name in names:
            self._due.pop(name, None)
        if seq > self._mark:
            try:
                await self._store.mark_copies(committed, seq)
            except errors.CommitConflict as error:
                _log.debug("%s", error)  # who folds it moves the mark itself
            self._check_begun(begun)
            self._mark, self._noted_after = seq, max(seq, self._noted_after)
        if self._mark >= self._noted_after:
            self._walk = None

    def _check_begun(self, begun: int) -> None:
        if begun != self._begun:
            raise errors.CommitConflict(
                f"tenant {self._tenant}: {self._projection.name} was begun anew meanwhile",
                hint="the copies that are due are found again by the entries",
            )

    def _values(self, names: Iterable[str], entities: Entities) -> dict[str, dict[str, Any]]:
        values = {}
        for name in names:
            key = self._projection.entity_key(self._tenant, name)
            if key is not None and name in entities:
                values[key] = self._projection.entity_view(name, entities[name])
        return values

    async def _named_behind(self, mark: int, epoch: str) -> tuple[list[str], int]:
        """The entities that the next page of entries names, and its last seq."""
        walk = self._walk
        if walk is None:
            walk = self._walk = Walk(self._server, self._tenant, page_entries=COPIES_AT_ONCE)
            await walk.start_after(mark)
        if walk.head.epoch != epoch:
            raise errors.LedgerRolledBack(
                f"tenant {self._tenant}: folded in epoch {epoch}, its head is {walk.head.position}",
                hint=f"if that is known: govledger rebuild {self._tenant} --accept-rollback",
                tenant=self._tenant,
            )
        async with aclosing(walk.pages()) as pages:
            async for page in pages:
                named = [names_of(self._projection, entry) for entry in page if not entry.foreign]
                names = dict.fromkeys(name for names in named for name in names)
                return list(names), min(page[-1].seq, self._noted_after)
        return [], self._noted_after  # behind it are only foreign entries that are gone
