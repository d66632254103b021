"""Reading a tenant's stream: the only module that sees stream replies.

An entry's ordinal (`seq`) is the second half of its id. Entries that the append function did not
write are foreign: they are registered in `governance:head` with the ordinals that they consume, are
named to the log, and are never handed out as events. A hole in the ordinals is `EntriesMissing`.

Each page is read from the last entry before it, that one included. Where it is not there any more,
and nobody has deleted it, the ledger is another one than what was read: `LedgerRolledBack`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, Final, NamedTuple, Self

import msgspec
import orjson

from ledger import errors, keys
from ledger.events import Event, parse_stored
from ledger.server import Reply, Server, pack
from ledger.spans import Spans

__all__ = ["PAGE_ENTRIES", "Entry", "Head", "Incident", "Position", "Walk"]

PAGE_ENTRIES: Final = 1000
_ENTRY_FIELDS: Final = 6
_INDEX_VALUE_BYTES: Final = 44
_FOREIGN_FIELDS: Final = [b"type", b"foreign", b"id", b"", b"data", b"null"]
_BLOCK_MS: Final = 5000
_INCIDENTS_TOLD: Final = 100
"""Of those read at once; the rest is counted."""

_log = logging.getLogger("ledger")


class Position(NamedTuple):
    """How far something has read: an ordinal means nothing without its epoch and its entry."""

    epoch: str
    seq: int
    entry_id: str

    def __str__(self) -> str:
        return f"{self.epoch}/{self.seq}/{self.entry_id}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position that `str` wrote."""
        epoch, seq, entry_id = text.split("/")
        return cls(epoch, int(seq), entry_id)


class Entry(msgspec.Struct, gc=False, eq=False):
    """One recorded entry, decoded no further than it is asked to be.

    `seq` is its ordinal from 1; `entry_id` `<recorded ms>-<seq>`; `data` the event's JSON, byte for
    byte as it was stored; `event` that JSON as a dict; `typed()` the same as a model.

    `raw_id` and `raw_fields` are what the stream has, every field and value in stored order; `memo`
    is room for what a reader has made of it.
    """

    # A struct of msgspec is made four times as fast as an object whose __init__ is in Python, and
    # as nothing that it refers to refers back, the garbage collector need not know of it.

    tenant: str
    seq: int
    raw_id: bytes
    raw_fields: list[bytes]
    foreign: bool = False
    memo: Any = None
    _event: dict[str, Any] | None = None

    @classmethod
    def of(cls, tenant: str, entry_id: str, event: dict[str, Any]) -> Self:
        """An entry made from an event that was read elsewhere, such as an export."""
        data = orjson.dumps(event, option=orjson.OPT_SORT_KEYS)
        kind, event_id = str(event["type"]).encode(), str(event["id"]).encode()
        fields = [b"type", kind, b"id", event_id, b"data", data]
        return cls(tenant, int(entry_id.partition("-")[2]), entry_id.encode(), fields)

    @property
    def _fields(self) -> list[bytes]:
        return _FOREIGN_FIELDS if self.foreign else self.raw_fields

    @property
    def entry_id(self) -> str:
        """`<recorded ms>-<seq>`."""
        return self.raw_id.decode()

    @property
    def recorded_ms(self) -> int:
        """The ledger's time, in ms since 1970."""
        return int(self.raw_id[: self.raw_id.index(b"-")])

    @property
    def recorded_at(self) -> datetime:
        """The ledger's time."""
        return datetime.fromtimestamp(self.recorded_ms / 1000, UTC)

    @property
    def type(self) -> str:
        """The event's type."""
        return self._fields[1].decode(errors="backslashreplace")

    @property
    def id(self) -> str:
        """The event's own id, by which an append is idempotent."""
        return self._fields[3].decode(errors="backslashreplace")

    @property
    def data(self) -> bytes:
        """The event's JSON, byte for byte as it was stored."""
        return self._fields[5]

    @property
    def event(self) -> dict[str, Any]:
        """The event's JSON as a dict; the same one at each call."""
        if self._event is None:
            self._event = orjson.loads(self._fields[5])
        return self._event

    def typed(self) -> Event | dict[str, Any]:
        """The event as its model, with unknown fields kept; a dict where no model here fits."""
        return parse_stored(self.data)

    def __repr__(self) -> str:
        return f"Entry({self.tenant} {self.entry_id}{' foreign' if self.foreign else ''})"


@dataclass(frozen=True, slots=True)
class Incident:
    """What others did to a stream behind the append function's back.

    `kind`: foreign (entries `first_id`..`last_id`, which consume `count` ordinals from `seq` on),
    missing (`count` entries gone), recreated (the stream was deleted and made again), moved (its
    last id or counter was set), headless (the function's own record was lost and rebuilt), epoch
    (an operator accepted that the ledger had been rolled back).
    """

    kind: str
    seq: int
    count: int
    first_id: str
    last_id: str
    noticed_ms: int

    @property
    def last_seq(self) -> int:
        """The last ordinal that it concerns."""
        return self.seq + self.count - 1 if self.kind == "foreign" else self.seq

    @classmethod
    def parse(cls, raw: bytes) -> Incident:
        """From the function's JSON; ValueError for anything else."""
        fields = orjson.loads(raw)
        try:
            return cls(**{name: fields[name] for name in cls.__slots__})
        except (KeyError, TypeError):
            raise ValueError(raw) from None

    def __str__(self) -> str:
        told = {
            "foreign": "{count} foreign entries {first_id}..{last_id} take seq {seq} and on",
            "missing": "{count} recorded entries are gone from the stream (tail was {last_id})",
            "recreated": "the stream was deleted and made again; {count} entries up to {last_id}",
            "moved": "the stream's last id or counter was moved from {first_id} to {last_id}",
            "epoch": "a rollback to seq {seq} was accepted; a new epoch began",
            "headless": "governance:head was lost; rebuilt from {count} entries up to {last_id}",
        }
        return told.get(self.kind, self.kind).format(**asdict(self))


class Head(NamedTuple):
    """Where a tenant's ledger stands, by the append function's own record."""

    tenant: str
    epoch: str
    seq: int
    entry_id: str
    incidents: int

    @property
    def position(self) -> Position:
        """Of the last entry."""
        return Position(self.epoch, self.seq, self.entry_id)


def split_id(entry_id: bytes | str) -> tuple[int, int]:
    """`<ms>-<seq>` as two integers, which order as the stream does."""
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    time_ms, _, seq = text.partition("-")
    return int(time_ms), int(seq)


def head_command(tenant: str) -> bytes:
    """What `parse_head` reads the reply of."""
    return pack("HMGET", keys.head(tenant), "epoch", "seq", "id", "incidents")


def parse_head(tenant: str, reply: list[bytes | None]) -> Head:
    """A tenant without a head is new: seq 0, no epoch."""
    epoch, seq, entry_id, incidents = reply
    if epoch is None:
        return Head(tenant, "", 0, "0-0", 0)
    if seq is None or entry_id is None or incidents is None:
        raise _damaged_head(tenant)
    try:
        split_id(entry_id)
        return Head(tenant, epoch.decode(), int(seq), entry_id.decode(), int(incidents))
    except ValueError:
        raise _damaged_head(tenant) from None


def _damaged_head(tenant: str) -> errors.IndexBehind:
    return errors.IndexBehind(
        f"tenant {tenant}: {keys.head(tenant)} was damaged: the append function did not write this",
        hint=f"find who wrote it; then delete that key, and govledger reindex {tenant} rebuilds it",
        tenant=tenant,
    )


async def read_head(server: Server, tenant: str) -> Head:
    """The tenant's head; seq 0 where nothing is recorded.

    Raises:
        IndexBehind: there is a stream or an index, but the function's record of it is gone.
    """
    stream = keys.decisions(tenant)
    # In this order: a first append in between makes them all.
    packed = [pack("EXISTS", stream, keys.index(tenant)), head_command(tenant)]
    exists, found = (server.checked(reply) for reply in await server.exchange(stream, packed, 2))
    head = parse_head(tenant, found)
    if not head.epoch and exists:
        raise headless(tenant)
    return head


async def read_incidents(server: Server, tenant: str, first: int, last: int) -> list[Incident]:
    """The incidents of these numbers, from 1; a page of them, not all there may be.

    Raises:
        IndexBehind: the head was damaged.
    """
    names, key = [f"incident:{n}" for n in range(first, last + 1)], keys.head(tenant)
    found = await server.command(key, "HMGET", key, *names)
    try:
        return [Incident.parse(raw or b"") for raw in found]
    except ValueError:
        raise _damaged_head(tenant) from None


def headless(tenant: str) -> errors.IndexBehind:
    """The stream or the index is there and `governance:head` is not."""
    return errors.IndexBehind(
        f"tenant {tenant}: {keys.head(tenant)} is gone, so its entries cannot be told from foreign",
        hint=f"govledger reindex {tenant} rebuilds it from the stream",
        tenant=tenant,
    )


def blocked(tenant: str, facts: Sequence[str]) -> errors.StreamBlocked:
    """A foreign last id leaves no room; facts: it, ours, the last one that could stay."""
    stream, (foreign, ours, last) = keys.decisions(tenant), facts
    return errors.StreamBlocked(
        f"tenant {tenant}: somebody set the stream's last id to {foreign} (ours was {ours}): no "
        "later entry could carry a true time",
        hint=f"XDEL what `XRANGE {stream} ({last} +` lists, then `XSETID {stream} {foreign} "
        f"MAXDELETEDID 0-1` and `XSETID {stream} {last}`",
        tenant=tenant,
        entry_id=foreign,
        last_id=last,
    )


async def find_by_id(server: Server, tenant: str, event_id: str) -> Entry | None:
    """The entry recorded under the event id; None where there is none.

    Raises:
        EntriesMissing: the index knows it, the stream has lost it.
        IndexBehind: the index has gaps, so "none" cannot be said.
    """
    if any("\ud800" <= char <= "\udfff" for char in event_id):
        return None  # what is no UTF-8 cannot have been recorded
    places = await _places(server, tenant, [event_id])
    if not places:
        return None
    time_ms, seq = places[0]
    entry = await _exactly(server, tenant, time_ms, seq)
    if entry is None:
        raise _missing(tenant, seq, seq)
    if entry.raw_fields[3:4] != [event_id.encode()]:
        raise bad_index(tenant, [event_id])  # it leads to another event
    return entry


async def find_many(server: Server, tenant: str, event_ids: list[str]) -> list[Entry]:
    """The entries recorded under the event ids, in two round trips; unknown ids are left out.

    Raises:
        EntriesMissing: the index knows one, the stream has lost it.
        IndexBehind: the index has gaps, so "unknown" cannot be said.
    """
    if not event_ids:
        return []
    stream = keys.decisions(tenant)
    places = await _places(server, tenant, event_ids)
    packed = [pack("XRANGE", stream, f"{ms}-{seq}", f"{ms}-{seq}") for ms, seq in places]
    replies = await server.exchange(stream, packed, len(packed)) if packed else []
    entries = []
    for (_, seq), reply in zip(places, replies, strict=True):
        found = server.checked(reply)
        if not found:
            raise _missing(tenant, seq, seq)
        entries.append(Entry(tenant, seq, *found[0]))
    return entries


async def _places(server: Server, tenant: str, event_ids: list[str]) -> list[tuple[int, int]]:
    """Recorded ms and ordinal of each id that the index knows."""
    index, head = keys.index(tenant), keys.head(tenant)
    packed = [
        pack("HGET", head, "own"),  # before HLEN: both grow together
        pack("HLEN", index),
        pack("HMGET", index, *event_ids),
    ]
    replies = await server.exchange(index, packed, len(packed))
    own, indexed, values = (server.checked(reply) for reply in replies)
    if indexed < int(own or 0):
        raise behind(tenant, indexed, int(own))
    if own is None:
        await read_head(server, tenant)  # which tells a new tenant from a lost head
    places = []
    for event_id, value in zip(event_ids, values, strict=True):
        if value is not None:
            if len(value) != _INDEX_VALUE_BYTES:
                raise bad_index(tenant, [event_id])
            places.append((int.from_bytes(value[:6], "big"), int.from_bytes(value[6:12], "big")))
    return places


def bad_index(tenant: str, facts: Sequence[str]) -> errors.IndexBehind:
    """Somebody wrote into the idempotency index; facts: the event id, split at spaces."""
    return errors.IndexBehind(
        f"tenant {tenant}: the idempotency index has no valid value for id {' '.join(facts)}",
        hint=f"govledger reindex {tenant}",
        tenant=tenant,
    )


def behind(tenant: str, indexed: int, own: int) -> errors.IndexBehind:
    """The idempotency index has lost entries."""
    return errors.IndexBehind(
        f"tenant {tenant}: the idempotency index covers {indexed} of {own} entries, so a "
        "duplicate could get in",
        hint=f"govledger reindex {tenant}",
        tenant=tenant,
    )


async def _exactly(server: Server, tenant: str, time_ms: int, seq: int) -> Entry | None:
    stream, entry_id = keys.decisions(tenant), f"{time_ms}-{seq}"
    found = await server.command(stream, "XRANGE", stream, entry_id, entry_id)
    return Entry(tenant, seq, *found[0]) if found else None


def _missing(tenant: str, first_seq: int, last_seq: int) -> errors.EntriesMissing:
    which = f"seq {first_seq}" if first_seq == last_seq else f"seq {first_seq}..{last_seq}"
    return errors.EntriesMissing(
        f"tenant {tenant}: {which} was recorded and is not in the stream any more",
        hint=f"somebody deleted it; --after {last_seq} reads on behind the hole",
        tenant=tenant,
        first_seq=first_seq,
        last_seq=last_seq,
    )


async def raw_pages(
    server: Server, tenant: str, *, after_id: str = "0-0", page_entries: int = PAGE_ENTRIES
) -> AsyncGenerator[list[list[Any]], None]:
    """What the stream has, page by page, as it is: ids, and names and values in stored order.

    For who trusts no record of it: nothing is numbered, skipped or compared. The next page is read
    while one is worked on.
    """
    stream, ahead = keys.decisions(tenant), None

    async def fetch(after: str) -> list[list[Any]]:
        page: list[list[Any]] = await server.command(
            stream, "XRANGE", stream, f"({after}", "+", "COUNT", page_entries
        )
        return page

    try:
        page = await fetch(after_id)
        while page:
            if len(page) == page_entries:
                ahead = asyncio.ensure_future(fetch(page[-1][0].decode()))
                await asyncio.sleep(0)
            yield page
            if ahead is None:
                break
            page, ahead = await ahead, None
    finally:
        if ahead is not None:
            await dropped(ahead)


@dataclass(slots=True)
class _Page:
    entries: list[list[Any]]
    head: Head
    lost: bool = False
    """Whether the entry that it was to be read from is not there."""


class Walk:
    """A way along one tenant's stream, in order, from after a position to the head and beyond."""

    def __init__(self, server: Server, tenant: str, *, page_entries: int = PAGE_ENTRIES) -> None:
        self.server = server
        self.tenant = tenant
        self.page_entries = page_entries
        self.seq = 0
        self.head = Head(tenant, "", 0, "0-0", 0)
        self.incidents: list[Incident] = []
        self._stream = keys.decisions(tenant)
        self._cursor = "0-0"
        self._at_entry = False  # whether an entry was read there, or else it is just a place
        self._exact = True  # whether the next own ordinal must be self.seq + 1
        self._skip_to = 0
        self._ranges = Spans[Incident]()
        self._unregistered: str | None = None
        self._broken: errors.LedgerError | None = None  # raised behind the entries before it

    @property
    def position(self) -> Position:
        """Of the last entry handed out."""
        return Position(self.head.epoch, self.seq, self._cursor)

    @property
    def _accepting(self) -> str:
        return f"govledger rebuild {self.tenant} --accept-rollback"

    # -- where to begin -----------------------------------------------------------------------

    async def start_after(self, seq: int) -> None:
        """Begin behind the ordinal `seq`; 0 = at the first entry.

        Raises:
            InvalidInput: `seq` is negative.
            LedgerRolledBack: the head has not come that far.
        """
        if seq < 0:
            raise errors.InvalidInput(f"after: {seq} is no seq", hint="0 = from the first entry")
        self.head = await read_head(self.server, self.tenant)
        if seq > self.head.seq:
            raise errors.LedgerRolledBack(
                f"tenant {self.tenant}: cannot read after seq {seq}, its head is {self.head.seq}",
                hint="a typing error, or the ledger was restored to an earlier state",
                tenant=self.tenant,
                head_seq=self.head.seq,
            )
        await self._read_incidents(self.head)
        self.seq = self._skip_to = seq
        if seq == self.head.seq:
            self._cursor = self.head.entry_id
            return
        for _, _, incident in self._ranges:
            if incident.kind == "foreign" and incident.seq <= seq < incident.last_seq:
                self.seq = incident.seq - 1  # numbering goes from the range's beginning
        self._cursor = await self._cursor_after(self.seq) if self.seq else "0-0"

    async def start_at(self, position: Position) -> None:
        """Begin behind a position that was kept.

        Raises:
            LedgerRolledBack: the ledger is of another epoch or is behind the position; `pages` too,
                where the position's entry is not in it.
        """
        head = await read_head(self.server, self.tenant)
        if head.epoch != position.epoch or head.seq < position.seq:
            raise errors.LedgerRolledBack(
                f"tenant {self.tenant}: folded to {position}, its head is now {head.position}",
                hint=f"find out why it went back; if it was restored on purpose: {self._accepting}",
                tenant=self.tenant,
            )
        self.head, self.seq, self._cursor = head, position.seq, position.entry_id
        self._at_entry = position.seq > 0

    async def start_at_time(self, since_ms: int) -> None:
        """Begin at the first entry recorded at or after `since_ms`."""
        self.head = await read_head(self.server, self.tenant)
        self._cursor, self._exact = f"{max(since_ms - 1, 0)}-{2**64 - 1}", False

    async def _cursor_after(self, seq: int) -> str:
        """An id that all ordinals up to `seq` lie at or below, and all later ones above.

        Our own are found by bisection over the time half, as ids and ordinals grow together.
        """
        ends = [last for _, last, incident in self._ranges if incident.last_seq <= seq]
        found = await self._first_own_from(0)
        if found is not None and found[1] <= seq:
            low, high = found[0], split_id(self.head.entry_id)[0]
            while low < high:
                middle = (low + high + 1) // 2
                found = await self._first_own_from(middle)
                if found is not None and found[1] <= seq:
                    low = found[0]
                else:
                    high = middle - 1
            ends.append((low, seq))
        time_ms, id_seq = max(ends, default=(0, 0))
        return f"{time_ms}-{id_seq}"

    async def _first_own_from(self, time_ms: int) -> tuple[int, int] | None:
        start, tail = f"{time_ms}-0", split_id(self.head.entry_id)
        while True:
            page = await self.server.command(
                self._stream, "XRANGE", self._stream, start, "+", "COUNT", 1
            )
            at = split_id(page[0][0]) if page else None
            if at is None or at > tail:
                return None
            incident = self._ranges.at(at)
            if incident is None:
                return at
            start = f"({incident.last_id}"

    # -- going on -----------------------------------------------------------------------------

    async def pages(self, *, to_ms: int | None = None) -> AsyncGenerator[list[Entry], None]:
        """Pages of entries to the head that there was at the beginning, the next one being read
        while one is worked on. Foreign entries are among them, marked.

        Raises:
            EntriesMissing: ordinals are missing, in the middle or at the end.
            LedgerRolledBack: the ledger went back while it was read.
        """
        end = "+" if to_ms is None else f"{max(to_ms, 0)}-{2**64 - 1}"
        goal, ahead = self.head.seq, None
        self._unregistered = self._broken = None
        try:
            page = await self._fetch(self._cursor, end, at_entry=self._at_entry)
            while True:
                if page.lost:
                    await self._check_lost(page)
                if not page.entries:
                    break
                more = len(page.entries) == self.page_entries
                if more:
                    last_id = page.entries[-1][0].decode()
                    ahead = asyncio.ensure_future(self._fetch(last_id, end, at_entry=True))
                    await asyncio.sleep(0)  # so that it is sent now, not when we next wait
                entries = await self._numbered(page)
                if entries:
                    yield entries
                if self._broken:
                    raise self._broken
                if ahead is None or self._unregistered:
                    break
                page, ahead = await ahead, None
        finally:
            if ahead is not None:
                await dropped(ahead)
        if to_ms is None and self._exact and self.seq < goal:
            raise _missing(self.tenant, self.seq + 1, goal)

    async def wait(self) -> None:
        """Returns when the stream has entries behind this walk, or after five seconds."""
        command = pack(
            *("XREAD", "COUNT", 1, "BLOCK", _BLOCK_MS, "STREAMS", self._stream, self._last_seen())
        )
        timeout_s = _BLOCK_MS / 1000 + 10
        (reply,) = await self.server.exchange(self._stream, [command], 1, timeout_s=timeout_s)
        self.server.checked(reply)
        await self.refresh()

    async def refresh(self) -> None:
        """Reads the head anew, so that `pages` goes on to where it is now."""
        self._accept(await read_head(self.server, self.tenant))

    def _last_seen(self) -> str:
        return max(self._cursor, self._unregistered or "0-0", key=split_id)

    async def _fetch(self, after_id: str, end: str, *, at_entry: bool) -> _Page:
        at_entry = at_entry and (end == "+" or split_id(after_id) <= split_id(end))
        start, count = after_id if at_entry else f"({after_id}", self.page_entries + at_entry
        packed = [
            pack("XRANGE", self._stream, start, end, "COUNT", count),
            head_command(self.tenant),  # read after the entries, so it covers them
        ]
        replies: list[Reply] = await self.server.exchange(self._stream, packed, 2)
        entries, raw_head = (self.server.checked(reply) for reply in replies)
        head = parse_head(self.tenant, raw_head)
        if not at_entry:
            return _Page(entries, head)
        if entries and entries[0][0] == after_id.encode():
            del entries[0]
            return _Page(entries, head)
        del entries[self.page_entries :]
        return _Page(entries, head, lost=True)

    async def _check_lost(self, page: _Page) -> None:
        """The entry that was read last is not there: deleted, or of a history that is no more.

        After a failover to a node whose clock was behind, new entries may lie at ids round it, so
        the ordinals behind it may be what was to be expected.
        """
        self._accept(page.head)
        if page.head.incidents > len(self.incidents):
            await self._read_incidents(page.head)
        before = await self._own_before(self._cursor)
        if before is not None and before[1] >= self.seq:
            time_ms, seq = before
            raise self._rolled_back(page.head, f"before that place lies entry {time_ms}-{seq}")
        if not (self._was_registered_gone() or await self._was_deleted()):
            raise self._rolled_back(page.head, "that entry is not there, and nobody deleted it")

    async def _own_before(self, entry_id: str) -> tuple[int, int] | None:
        """The nearest entry of ours below the id; None where there is none."""
        end = f"({entry_id}"
        while True:
            page = await self.server.command(
                self._stream, "XREVRANGE", self._stream, end, "-", "COUNT", 1
            )
            if not page:
                return None
            at = split_id(page[0][0])
            firsts = [first for first, last, _ in self._ranges if first <= at <= last]
            if not firsts and len(page[0][1]) == _ENTRY_FIELDS:
                return at
            time_ms, seq = min([at, *firsts])
            if (time_ms, seq) == (0, 0):
                return None
            end = f"({time_ms}-{seq}"

    def _was_registered_gone(self) -> bool:
        """Whether the head knows that entries were deleted when its last one was not before ours.

        It knows how many, not which.
        """
        kinds = ("missing", "recreated")
        return any(one.kind in kinds and one.seq >= self.seq for one in self.incidents)

    async def _was_deleted(self) -> bool:
        """Whether the stream itself says that entries were deleted there, or all up to there."""
        (reply,) = await self.server.exchange(
            self._stream, [pack("XINFO", "STREAM", self._stream)], 1
        )
        if isinstance(reply, Exception) and "no such key" in str(reply):
            return True  # what is missing is told by `pages`
        about, at = self.server.checked(reply), split_id(self._cursor)
        first = about[b"first-entry"]
        if first is None or split_id(first[0]) > at:
            return True
        return split_id(about[b"max-deleted-entry-id"]) >= at

    def _accept(self, head: Head) -> None:
        if not head.epoch and self.head.epoch:
            raise headless(self.tenant)
        if (self.head.epoch and head.epoch != self.head.epoch) or head.seq < self.seq:
            raise self._rolled_back(head, f"its head is now {head.position}")
        self.head = head

    def _rolled_back(self, head: Head, seen: str) -> errors.LedgerRolledBack:
        return errors.LedgerRolledBack(
            f"tenant {self.tenant}: read to {self.position}, {seen}",
            hint=f"it was restored meanwhile: begin again, or {self._accepting}",
            tenant=self.tenant,
            head_seq=head.seq,
        )

    async def _numbered(self, page: _Page) -> list[Entry]:
        """The page as entries with ordinals, up to the first that nobody has registered yet."""
        self._accept(page.head)
        if page.head.incidents > len(self.incidents):
            await self._read_incidents(page.head)
        ids, fields = zip(*page.entries, strict=True)
        seqs: list[int] = orjson.loads(b"[%b]" % b",".join(ids).replace(b"-", b","))[1::2]
        first = self.seq + 1 if self._exact else seqs[0]
        dense = seqs == list(range(first, first + len(seqs))) and seqs[-1] <= page.head.seq
        whole = set(map(len, fields)) == {_ENTRY_FIELDS}
        known = split_id(ids[-1]) <= split_id(page.head.entry_id)
        if not (dense and whole and known) or self._meets_incident(ids[0]):
            return self._numbered_one_by_one(page)
        self.seq, self._cursor, self._exact = seqs[-1], ids[-1].decode(), True
        self._at_entry = True
        return list(map(Entry, repeat(self.tenant), seqs, ids, fields))

    def _numbered_one_by_one(self, page: _Page) -> list[Entry]:
        entries: list[Entry] = []
        tail = split_id(page.head.entry_id)
        for raw_id, fields in page.entries:
            incident = self._incident_at(raw_id)
            if incident is None and split_id(raw_id) > tail:
                self._name_unregistered(page, raw_id)
                break
            if incident is not None and not self._exact:
                continue  # its ordinal is known only from the range's beginning
            if incident is not None and incident.kind == "recreated":
                if self.seq < incident.seq:
                    self._broken = _missing(self.tenant, self.seq + 1, incident.seq)
                    break
                continue
            seq = max(self.seq + 1, incident.seq) if incident else split_id(raw_id)[1]
            if self._exact and seq != self.seq + 1:
                self._broken = self._hole_before(seq, raw_id, page.head)
                break
            foreign = incident is not None or len(fields) != _ENTRY_FIELDS
            self.seq, self._cursor, self._exact = seq, raw_id.decode(), True
            self._at_entry = True
            if seq > self._skip_to:
                entries.append(Entry(self.tenant, seq, raw_id, fields, foreign=foreign))
        return entries

    def _hole_before(self, seq: int, raw_id: bytes, head: Head) -> errors.LedgerError:
        if seq > self.seq:
            return _missing(self.tenant, self.seq + 1, seq - 1)
        return self._rolled_back(head, f"seq {seq} is now entry {raw_id.decode()}")

    # -- foreign hands ------------------------------------------------------------------------

    def is_foreign(self, raw_id: bytes) -> bool:
        """Whether a registered incident says that the entry is not ours."""
        return self._incident_at(raw_id) is not None

    def _incident_at(self, raw_id: bytes) -> Incident | None:
        return self._ranges.at(split_id(raw_id))

    def _meets_incident(self, first_id: bytes) -> bool:
        return self._ranges.reach(split_id(first_id))

    async def _read_incidents(self, head: Head) -> None:
        before = len(self.incidents)
        for first in range(before + 1, head.incidents + 1, PAGE_ENTRIES):
            last = min(first + PAGE_ENTRIES - 1, head.incidents)
            await self._read_incidents_between(first, last)
        for incident in self.incidents[before : before + _INCIDENTS_TOLD]:
            _log.warning("tenant %s: %s", self.tenant, incident)
        more = len(self.incidents) - before - _INCIDENTS_TOLD
        if more > 0:
            _log.warning("tenant %s: and %d incidents more in its head", self.tenant, more)

    async def _read_incidents_between(self, first: int, last: int) -> None:
        for incident in await read_incidents(self.server, self.tenant, first, last):
            self.incidents.append(incident)
            if incident.kind in ("foreign", "recreated"):
                start = incident.first_id if incident.kind == "foreign" else "0-0"
                self._ranges.add(split_id(start), split_id(incident.last_id), incident)

    def _name_unregistered(self, page: _Page, raw_id: bytes) -> None:
        self._unregistered = page.entries[-1][0].decode()
        _log.warning(
            "tenant %s: foreign entry %s is in the stream; the next append registers it",
            self.tenant,
            raw_id.decode(),
        )


async def dropped(task: asyncio.Future[Any]) -> None:
    """Cancels a task and sees it end; a cancellation of the caller meanwhile stays the caller's."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # it was seen: the next read meets it again


async def follow(walk: Walk) -> AsyncGenerator[Entry, None]:
    """Entries as they are recorded, for ever; begins where the walk stands."""
    while True:
        async with aclosing(walk.pages()) as pages:
            async for page in pages:
                for entry in page:
                    yield entry
        await walk.wait()
