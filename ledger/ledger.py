"""Ledger: what callers hold. Appends decisions, replays history, follows what is new."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Self

from ledger import errors, keys
from ledger.append import Appender, Durability, Link, Receipt
from ledger.events import Event
from ledger.memory import MemoryService
from ledger.reindex import reindex
from ledger.server import Server
from ledger.settings import Settings, load_settings
from ledger.stream import Entry, Head, Walk, find_by_id, follow, read_head

__all__ = ["Ledger"]


class Ledger:
    """The record of one server's tenants. Make it with `Ledger.connect`.

    Safe to share between tasks of one event loop. Every method may raise `Unavailable` (a retry
    with the same ids is safe) and `InvalidTenant`.
    """

    def __init__(self, server: Server, durability: Durability | None = None) -> None:
        self.server = server
        self.memory = MemoryService(server=server)
        """The operations guide's memory service, on this ledger's connections."""
        self._appender = Appender(server, durability)

    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        durability: Durability | str | None = None,
    ) -> _Connecting:
        """A ledger at `url` (default: REDIS_URL); await it, or use it with `async with`.

        Args:
            url: redis://, rediss://, unix://, embedded:///data/dir, redis+sentinel://.
            settings: instead of the environment.
            durability: what every append must reach unless it says otherwise; None takes what the
                server gives and says so in the receipt.

        Raises:
            InvalidSetting: the URL or a setting cannot be used.
            Unavailable: the server cannot be reached or does not let us in.
        """
        chosen = settings or load_settings(redis_url=url)
        if settings is not None and url is not None:
            chosen = settings.model_copy(update={"redis_url": url})
        return _Connecting(chosen, _durability(durability))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Waits for appends in flight, then closes the connections."""
        await self._appender.aclose()
        await self.server.aclose()

    # -- append -------------------------------------------------------------------------------

    async def append(
        self,
        tenant: str,
        event: Event,
        *,
        expected_seq: int | None = None,
        durability: Durability | str | None = None,
    ) -> Receipt:
        """Records one event; returns when it is as durable as the receipt says.

        A cancelled await may have been recorded. The same event again is always safe: it returns
        the first receipt, with `duplicate=True`.

        Args:
            tenant: whose ledger.
            event: what happened; its `id` makes the append idempotent.
            expected_seq: append only if the tenant's head is this (0 = nothing recorded yet).
            durability: the level that must be reached; more than `memory` or an error.

        Raises:
            InvalidEvent: the event is too large.
            ConflictingEvent: the id is recorded with other content.
            WrongExpectedSeq: the tenant has moved on.
            ClockSkew: the clocks, or `at`, are more than five minutes off.
            UnsafeServer: the server could lose what it acknowledges.
            IndexBehind, StreamBlocked, ForeignEntries: foreign hands; the hint says the way out.
            DurabilityNotReached: it may be recorded, but not as safely as asked.
        """
        receipts = await self._appender.put(tenant, (event,), expected_seq, _durability(durability))
        return receipts[0]

    async def append_many(
        self,
        tenant: str,
        events: Sequence[Event],
        *,
        expected_seq: int | None = None,
        durability: Durability | str | None = None,
        link: Link | None = None,
    ) -> list[Receipt]:
        """Records up to 1,000 events in one atomic step: all of them, or none.

        Otherwise as `append`; the receipts are in the order of `events`.

        Args:
            tenant: whose ledger.
            events: what happened, in order.
            expected_seq: append only if the tenant's head is this.
            durability: the level that must be reached; more than `memory` or an error.
            link: a name for this batch, of letters and digits, and the name of the one that it
                follows. So it can be sent before that one is acknowledged, and never lands without
                it, or where another named batch of the tenant came between.

        Raises:
            InvalidInput: there is no event, or more than 1,000; or `link` has no good name.
            PredecessorMissing: the last named batch that was accepted is not `link.after`.
        """
        level = _durability(durability)
        return await self._appender.put(tenant, events, expected_seq, level, link)

    # -- read ---------------------------------------------------------------------------------

    async def replay(
        self,
        tenant: str,
        *,
        after: int = 0,
        until: int | None = None,
        since: datetime | None = None,
        to: datetime | None = None,
        foreign: bool = False,
    ) -> AsyncGenerator[Entry, None]:
        """Entries in order, in constant memory, up to the head that there is when it begins.

        Args:
            tenant: whose ledger.
            after: begin behind this seq.
            until: the last seq wanted.
            since: begin at the first entry recorded at or after this time.
            to: end with the last entry recorded at or before this time.
            foreign: hand out entries that others wrote into the stream too (`entry.foreign`).

        Raises:
            NotFound: nothing was ever recorded for the tenant.
            EntriesMissing: recorded entries are not there any more.
            LedgerRolledBack: `after` is beyond the head.
            IndexBehind: the function's record of the stream is gone.
        """
        walk = await self.walk(tenant, after=after, since=since)
        last = walk.head.seq if until is None else min(until, walk.head.seq)
        async with aclosing(walk.pages(to_ms=time_ms(to))) as pages:
            async for page in pages:
                for entry in page:
                    if entry.seq > last:
                        return
                    if entry.seq > after and (foreign or not entry.foreign):
                        yield entry

    async def walk(self, tenant: str, *, after: int = 0, since: datetime | None = None) -> Walk:
        """The pages behind `replay`, for folds and exports that want whole pages."""
        walk = Walk(self.server, keys.checked_tenant(tenant))
        since_ms = time_ms(since)
        if since_ms is not None and not after:
            await walk.start_at_time(since_ms)
        else:
            await walk.start_after(after)
        if not walk.head.epoch:
            raise errors.NotFound.nothing_of(tenant)
        if since_ms is not None and after:
            await self._later_of(walk, since_ms)
        return walk

    async def _later_of(self, walk: Walk, since_ms: int) -> None:
        if int(walk.position.entry_id.partition("-")[0]) < since_ms:
            await walk.start_at_time(since_ms)

    async def follow(self, tenant: str, *, after: int | None = None) -> AsyncGenerator[Entry, None]:
        """Entries as they are recorded, for ever; `after=None` begins at the head of now.

        Raises:
            EntriesMissing, LedgerRolledBack, IndexBehind: as `replay`.
        """
        walk = Walk(self.server, keys.checked_tenant(tenant))
        start = after if after is not None else (await self.head(tenant)).seq
        await walk.start_after(start)
        async with aclosing(follow(walk)) as entries:
            async for entry in entries:
                if not entry.foreign:
                    yield entry

    async def head(self, tenant: str) -> Head:
        """Where the tenant's ledger stands; seq 0 and no epoch where nothing is recorded."""
        return await read_head(self.server, keys.checked_tenant(tenant))

    async def get(self, tenant: str, event_id: str) -> Entry:
        """The entry of the event with this id.

        Raises:
            NotFound: no event with this id is recorded.
            EntriesMissing: it was recorded, and somebody deleted it.
        """
        entry = await find_by_id(self.server, keys.checked_tenant(tenant), event_id)
        if entry is None:
            is_number = event_id.isascii() and event_id.isdigit()
            raise errors.NotFound(
                f"tenant {tenant}: no event has the id {event_id!r}",
                hint=f"is it a seq? --seq {event_id}, or `get_seq`" if is_number else None,
                tenant=tenant,
                id=event_id,
            )
        return entry

    async def get_seq(self, tenant: str, seq: int) -> Entry:
        """The entry with this ordinal.

        Raises:
            NotFound: the head has not come that far.
            EntriesMissing: it was recorded, and somebody deleted it.
        """
        head = await self.head(tenant)
        if not head.seq:
            raise errors.NotFound.nothing_of(tenant)
        if not 1 <= seq <= head.seq:
            raise errors.NotFound(
                f"tenant {tenant}: seq {seq} is not recorded, the head is {head.seq}",
                tenant=tenant,
                seq=seq,
            )
        walk = await self.walk(tenant, after=seq - 1)
        walk.page_entries = min(walk.page_entries, seq - walk.seq)
        async with aclosing(walk.pages()) as pages:
            async for page in pages:
                return page[0]
        raise errors.EntriesMissing(f"tenant {tenant}: seq {seq} is gone", tenant=tenant)

    async def tenants(self) -> list[str]:
        """Every tenant that anything was ever appended for, sorted: from a registry, not a SCAN.

        What others put into the registry and no tenant can be called is left out.
        """
        names = await self.server.command(keys.TENANTS, "SMEMBERS", keys.TENANTS)
        known = [name.decode(errors="backslashreplace") for name in names]
        return sorted(name for name in known if keys.is_tenant(name))

    # -- repair -------------------------------------------------------------------------------

    async def reindex(self, tenant: str, on_progress: Callable[[int], None] | None = None) -> int:
        """Rebuilds the idempotency index from the stream; the number of entries it covers.

        Raises:
            NotFound: the tenant has no stream.
            IndexBehind: the tail kept moving.
        """
        return await reindex(self.server, tenant, on_progress)


class _Connecting:
    """What `Ledger.connect` returns: to be awaited, or entered with `async with`."""

    def __init__(self, settings: Settings, durability: Durability | None) -> None:
        self._settings = settings
        self._durability = durability
        self._ledger: Ledger | None = None

    def __await__(self) -> Generator[Any, None, Ledger]:
        return self._open().__await__()

    async def _open(self) -> Ledger:
        return Ledger(await Server.open(self._settings), self._durability)

    async def __aenter__(self) -> Ledger:
        self._ledger = await self._open()
        return self._ledger

    async def __aexit__(self, *_: object) -> None:
        if self._ledger is not None:
            await self._ledger.aclose()


def _durability(asked: Durability | str | None) -> Durability | None:
    try:
        return None if asked is None else Durability(asked)
    except ValueError:
        raise errors.InvalidInput(
            f"durability: {asked!r} is no level", hint="memory, fsynced or replicated"
        ) from None


def time_ms(moment: datetime | None) -> int | None:
    """A time in whole ms since 1970, as entries' ids have it; None stays None.

    Raises:
        InvalidInput: it has no time zone.
    """
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise errors.InvalidInput(
            f"time: {moment} has no time zone", hint="give it one, such as 2026-03-03T12:00:00Z"
        )
    return int(moment.timestamp() * 1000)
