"""A projection's state as it was: a fold, in this process, of the history up to a point.

By recorded time, and byte for byte what was committed when the ledger's head was there. The fold
begins at the nearest snapshot that is kept; without one, at the first entry. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from ledger import errors, keys
from ledger.server import Server
from ledger.stream import Position, Walk, find_many, read_head, split_id
from projections.projection import DECISION_PREFIX, STATE, Entities, Projection
from projections.snapshots import Kept, unpacked
from projections.store import FoldStore, encode_entity
from projections.tenant_fold import TenantFold

__all__ = ["Past", "fold_to"]

ATTEMPTS: Final = 5


class Past(NamedTuple):
    """A projection at a point in the past: the entity `state`, others that were asked for and
    existed, and the last entry that is folded; `base`: the seq of the snapshot that it began at.
    """

    position: Position
    state: dict[str, Any]
    entities: Entities
    base: int


async def fold_to(
    server: Server,
    tenant: str,
    projection: Projection,
    as_of: int | datetime,
    *,
    names: Sequence[str] = (),
) -> Past:
    """The projection as of a seq, or of the last entry recorded at or before a time.

    Args:
        server: where the tenant's stream is.
        tenant: whose.
        projection: which fold.
        as_of: the seq or the time.
        names: the entities that are wanted beside `state`.

    Raises:
        InvalidInput: `as_of` is neither a seq nor a time with a zone.
        NotFound: nothing had been recorded by then, or the head has not come that far.
        EntriesMissing, IndexBehind, LedgerRolledBack: as `Ledger.replay`.
    """
    to_ms = _ms(as_of)
    for _ in range(ATTEMPTS):
        store = PastStore(server, keys.checked_tenant(tenant), projection)
        await store.begin(as_of if isinstance(as_of, int) else None, to_ms)
        with suppress(_SnapshotDropped):
            return await _folded(server, store, as_of, to_ms, names)
    store = PastStore(server, tenant, projection)  # without any, nothing can be dropped
    return await _folded(server, store, as_of, to_ms, names)


class _SnapshotDropped(Exception):
    """A snapshot went while it was read: it was dropped, or the projection rebuilt."""


async def _folded(
    server: Server,
    store: PastStore,
    as_of: int | datetime,
    to_ms: int | None,
    names: Sequence[str],
) -> Past:
    tenant, base = store.tenant, store.base
    fold = TenantFold(server, tenant, store.projection, store)
    walk = Walk(server, tenant)
    position: Position | None = None
    if base is not None and base.position is not None:
        fold.begin_with(orjson.loads(store.base_state))
        await walk.start_at(base.position)
        position = base.position
    else:
        await walk.start_after(0)
    last = min(as_of, walk.head.seq) if isinstance(as_of, int) else walk.head.seq
    if not walk.head.seq:
        raise errors.NotFound.nothing_of(tenant)
    if isinstance(as_of, int) and not 1 <= as_of <= walk.head.seq:
        raise errors.NotFound(
            f"tenant {tenant}: seq {as_of} is not recorded, the head is {walk.head.seq}",
            tenant=tenant,
            seq=as_of,
        )
    walk.page_entries = max(1, min(walk.page_entries, last - walk.seq))
    async with aclosing(walk.pages(to_ms=to_ms)) as pages:
        async for page in pages:
            entries = page if page[-1].seq <= last else [one for one in page if one.seq <= last]
            if entries:
                changed, _ = await fold.apply([one for one in entries if not one.foreign])
                store.keep(changed)
                position = Position(walk.head.epoch, entries[-1].seq, entries[-1].entry_id)
            if page[-1].seq >= last:
                break
    if position is None:
        raise errors.NotFound(
            f"tenant {tenant}: nothing was recorded by {as_of}",
            hint="`govledger replay` shows when its first entry was recorded",
            tenant=tenant,
        )
    entities = await store.load(await _recorded(server, tenant, names))
    return Past(position, fold.state, entities, store.base.seq if store.base else 0)


async def _recorded(server: Server, tenant: str, names: Sequence[str]) -> dict[str, int]:
    """For each entity the seq of the decision that it is about; 0 where there is none."""
    ids = [name.removeprefix(DECISION_PREFIX) for name in names if name.startswith(DECISION_PREFIX)]
    found = await find_many(server, tenant, ids)
    return dict.fromkeys(names, 0) | {DECISION_PREFIX + one.id: one.seq for one in found}


class PastStore(FoldStore):
    """Entities as they were at a snapshot, and what a fold in memory made of them since."""

    base: Kept | None = None
    base_state: bytes = b""

    def __init__(self, server: Server, tenant: str, projection: Projection) -> None:
        super().__init__(server, tenant, projection)
        self._folded: dict[str, bytes] = {}

    async def begin(self, seq: int | None, to_ms: int | None) -> None:
        """Takes the nearest snapshot, if there is one, up to the seq or the time."""
        epoch = (await read_head(self._server, self.tenant)).epoch
        for kept in reversed(await self.snapshots()):
            if kept.position is None or (seq is not None and kept.seq > seq):
                continue
            if kept.position.epoch != epoch:
                continue
            if to_ms is not None and split_id(kept.position.entry_id)[0] > to_ms:
                continue
            state = await self.snapshot_state(kept)
            if state is None:
                continue
            if await self.load_at(kept, []) is None:
                return  # a later one is damaged, on which this one and all before it rely
            self.base, self.base_state = kept, unpacked(state)
            return

    def keep(self, changed: Entities) -> None:
        """What was folded; it is not in Redis."""
        for name, entity in changed.items():
            if name != STATE:
                self._folded[name] = encode_entity(entity)

    async def load(self, names: Mapping[str, int]) -> Entities:
        """The named entities that existed; a snapshot says nothing of one that came to be later."""
        wanted = [name for name in names if name != STATE]
        found = {name: self._folded[name] for name in wanted if name in self._folded}
        last = self.base.seq if self.base is not None else 0
        missing = [name for name in wanted if name not in found and names[name] <= last]
        if self.base is not None and missing:
            older = await self.load_at(self.base, missing)
            if older is None:
                raise _SnapshotDropped
            found |= older
        return {name: orjson.loads(raw) for name, raw in found.items()}


def _ms(as_of: int | datetime) -> int | None:
    given: object = as_of  # callers without types
    if isinstance(given, int) and not isinstance(given, bool):
        return None
    if not isinstance(given, datetime):
        raise errors.InvalidInput(
            f"as_of: {ascii(given)[:80]} is neither a seq nor a time",
            hint="give an int (a seq) or a datetime with a time zone",
        )
    if given.tzinfo is None:
        raise errors.InvalidInput(
            f"as_of: {given} has no time zone", hint="give it one, such as 2026-03-03T12:00:00Z"
        )
    return int(given.timestamp() * 1000)
