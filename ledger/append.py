"""Writing to a tenant's ledger: what a call carries, and how calls in flight share one.

An acknowledgement means what its receipt says: `memory`, `fsynced` or `replicated`. Nothing is ever
queued behind an acknowledgement; an append that has not returned may or may not be recorded, and
sending it again with the same id is always safe.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
from redis import exceptions as redis_errors

from ledger import errors, keys
from ledger.events import EncodedEvent, Event, encode
from ledger.replies import library_is_old, translate
from ledger.server import LIBRARY_VERSION, REPLY_TIMEOUT_S, NodeSettings, Server, pack
from ledger.stream import Incident, Position, bad_index, behind, blocked, headless
from ledger.wire import Pool, Wire

__all__ = ["BATCH_EVENTS_LIMIT", "Appender", "Durability", "Receipt"]

BATCH_EVENTS_LIMIT: Final = 1000
"""Events in one append_many, which is all or nothing."""

GATHER_EVENTS: Final = 128
GATHER_BYTES: Final = 1024 * 1024
"""How much of several callers' work one function call carries; more would hold readers up."""

CALLS_IN_FLIGHT: Final = 2
SECOND_CALL_EVENTS: Final = 16
WAIT_TIMEOUT_MS: Final = 2000
NAME_LIMIT: Final = 64
_GROUP_ARGS: Final = 3
_EVENT_ARGS: Final = 3
_FIRST_TYPE: Final = ord("A")
FEED_LENGTH: Final = 10_000
FEED_INTERVAL_S: Final = 0.05
_log = logging.getLogger("ledger")


class Durability(StrEnum):
    """What is true of an event when its append returns.

    memory      the server has it and will write it out within about a second (`everysec`)
    fsynced     it is on the server's disk: `appendfsync always`, nothing less is honest
    replicated  at least one replica has acknowledged it too

    Who asks for a level is content with a higher one.
    """

    MEMORY = "memory"
    FSYNCED = "fsynced"
    REPLICATED = "replicated"


_LEVELS: Final = tuple(Durability)


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What an append returned. `recorded_ms` is the ledger's time, ms since 1970. `duplicate`: it
    had been recorded before, with the same bytes (after a retry of ours that may be our own first
    attempt).
    """

    tenant: str
    epoch: str
    recorded_ms: int
    seq: int
    duplicate: bool
    durability: Durability

    @property
    def entry_id(self) -> str:
        """The stream's id of the entry."""
        return f"{self.recorded_ms}-{self.seq}"

    @property
    def recorded_at(self) -> datetime:
        """The ledger's time."""
        return datetime.fromtimestamp(self.recorded_ms / 1000, UTC)

    @property
    def position(self) -> Position:
        """Where a reader must have come to see this event."""
        return Position(self.epoch, self.seq, self.entry_id)


class Link(NamedTuple):
    """A name for a batch, and that of the named one right behind which alone it may come."""

    name: str
    after: str | None = None


class _Group:
    """One caller's events: sequenced together or refused together, alone."""

    __slots__ = ("bytes", "done", "durability", "events", "expected_seq", "packed")

    def __init__(
        self,
        events: Sequence[EncodedEvent],
        expected_seq: int | None,
        durability: Durability | None,
        done: asyncio.Future[list[Receipt]],
        link: Link | None = None,
    ) -> None:
        self.events = events
        self.expected_seq = expected_seq
        self.durability = durability
        self.done = done
        self.packed = _packed_group(events, expected_seq, link)
        self.bytes = len(self.packed)


def _packed_group(
    events: Sequence[EncodedEvent], expected_seq: int | None, link: Link | None
) -> bytes:
    """The group as functions.lua reads it: its header, its types, then the events."""
    expected = -1 if expected_seq is None else expected_seq
    linked = b"" if link is None else f" {link.name} {link.after or ''}".encode()
    if len(events) == 1:
        (event,) = events
        header = b"%d %d 1%b" % (expected, max(event.at_ms or 0, 0), linked)
        kind = event.type.encode()
        return _PACKED_ALONE % (len(header), header, len(kind), kind, event.packed)
    types = {event.type: b"" for event in events}
    codes = b""
    if len(types) > 1:
        places = {kind: b"%c" % (_FIRST_TYPE + n) for n, kind in enumerate(types)}
        codes = b"".join([places[event.type] for event in events])
    latest = max([event.at_ms or 0 for event in events])
    header = b"%d %d %d%b" % (expected, max(latest, 0), len(events), linked)
    head = _packed_strings(header, " ".join(types).encode(), codes)
    return b"".join([head, *[event.packed for event in events]])


_PACKED_ALONE: Final = b"$%d\r\n%b\r\n$%d\r\n%b\r\n$0\r\n\r\n%b"


def _packed_strings(*values: bytes) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(value), value) for value in values])


def prepare(tenant: str, events: Sequence[Event], expected_seq: int | None) -> list[EncodedEvent]:
    """Everything that can be checked without the server.

    Raises:
        InvalidTenant, InvalidEvent, InvalidInput: the name, an event, or the batch does not fit.
    """
    keys.checked_tenant(tenant)
    if not 1 <= len(events) <= BATCH_EVENTS_LIMIT:
        raise errors.InvalidInput(
            f"events: a batch has 1 to {BATCH_EVENTS_LIMIT} events, this one has {len(events)}",
            hint="append it in parts; each part is all or nothing",
        )
    if expected_seq is not None and not 0 <= expected_seq < 2**53:
        raise errors.InvalidInput(f"expected_seq: {expected_seq} is no sequence number")
    return [encode(event) for event in events]


def _check_link(link: Link | None) -> None:
    for name in link or ():
        if name is not None and not (name.isascii() and name.isalnum() and len(name) <= NAME_LIMIT):
            raise errors.InvalidInput(
                f"link: {name!a:.80} names no batch",
                hint=f"1 to {NAME_LIMIT} letters and digits, for each batch another name",
            )


class Appender:
    """The write side of a Ledger: one lane a tenant, up to two function calls in flight on each."""

    def __init__(self, server: Server, durability: Durability | None = None) -> None:
        self.server = server
        self.durability = durability
        self._lanes: dict[tuple[str, bool], _Lane] = {}
        self._feed = _Feed(server)

    def put(
        self,
        tenant: str,
        events: Sequence[Event],
        expected_seq: int | None,
        durability: Durability | None,
        link: Link | None = None,
    ) -> asyncio.Future[list[Receipt]]:
        """Receipts in the order of `events`; all are recorded, or none.

        What is put first is recorded first, unless it is refused or waits for a replica.
        """
        encoded = prepare(tenant, events, expected_seq)
        _check_link(link)
        level = durability or self.durability
        # Who waits for a replica holds up his own kind alone.
        at = (tenant, level is Durability.REPLICATED)
        lane = self._lanes.get(at)
        if lane is None:
            lane = self._lanes[at] = _Lane(self.server, tenant, self._feed)
        done: asyncio.Future[list[Receipt]] = asyncio.get_running_loop().create_future()
        lane.put(_Group(encoded, expected_seq, level, done, link))
        return done

    async def aclose(self) -> None:
        """Waits for the calls in flight and for the last hints."""
        await asyncio.gather(*(lane.drained() for lane in self._lanes.values()))
        await self._feed.aclose()


class _Call(NamedTuple):
    """A call that goes the slow way. `reply` is its answer where only the node is in doubt, of
    which `settings` were known; `lost` is what became of its first attempt.
    """

    groups: list[_Group]
    reply: list[Any] | None = None
    settings: NodeSettings | None = None
    lost: Exception | None = None


class _Lane:
    """One tenant's groups on their way, recorded in the order in which they were put.

    What waits while calls are in flight rides in the next. A call takes the fast way: straight onto
    a connection that the lane keeps while calls are in flight, its answer coming by a callback.
    Whatever is not plain there (no connection at hand, settings to be read anew, WAIT, an error)
    goes the other way: a task sends one call after the other, with retries, while nothing else is
    sent, so that the order stays.
    """

    def __init__(self, server: Server, tenant: str, feed: _Feed) -> None:
        self._server = server
        self._tenant = tenant
        self._feed = feed
        self._waiting: deque[_Group] = deque()
        self._waiting_events = 0
        self._in_flight = 0
        self._events_in_flight = 0
        self._lease: tuple[Pool, Wire] | None = None
        self._slow: deque[_Call] = deque()
        self._slow_task: asyncio.Task[None] | None = None
        self._flush_comes = False
        self._quiet = asyncio.Event()
        self._gathers = False  # whether the last call carried several groups
        # Until a call was answered the tenant or the library may be missing, and the call repeated:
        # another one must not overtake it.
        self._met = False
        self._new_epoch = secrets.token_hex(8)
        self._on = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
        head: list[bytes | str | int] = ["govledger_append", b"3", *self._on, LIBRARY_VERSION]
        self._call_head = pack("FCALL", *head).split(b"\r\n", 1)[1]
        self._fixed_args = 1 + len(head)

    def put(self, group: _Group) -> None:
        """Sends the group, at once where nobody else can ride along."""
        self._waiting.append(group)
        self._waiting_events += len(group.events)
        if not self._gathers and not self._in_flight:
            self._flush()
        else:
            self._flush_soon()

    def _flush_soon(self) -> None:
        """When all callers who are about to run have put theirs."""
        if not self._flush_comes:
            self._flush_comes = True
            asyncio.get_running_loop().call_soon(self._flush)

    async def drained(self) -> None:
        """Returns when every group has its answer."""
        while self._waiting or self._in_flight or self._slow_task:
            self._quiet.clear()
            await self._quiet.wait()

    def _flush(self) -> None:
        """A second call while one is in flight pays only with a load worth an fsync of its own."""
        self._flush_comes = False
        while self._waiting and not self._slow_task and self._in_flight < CALLS_IN_FLIGHT:
            if self._in_flight and (not self._met or self._waiting_events < SECOND_CALL_EVENTS):
                return
            groups = self._take()
            if groups and not self._send_fast(groups):
                self._send_slow(_Call(groups))
        if not self._in_flight:
            self._give_back()
            if not (self._waiting or self._slow_task):
                self._quiet.set()

    def _take(self) -> list[_Group]:
        """The next call's load: half of all that is on its way, so that one call is executed while
        the callers of the other one go on; all that waits where that is little.
        """
        half = (self._waiting_events + self._events_in_flight + 1) // 2
        limit = min(half, GATHER_EVENTS) if half >= SECOND_CALL_EVENTS else GATHER_EVENTS
        while self._waiting and self._waiting[0].done.cancelled():
            self._waiting_events -= len(self._waiting.popleft().events)
        if not self._waiting:
            return []
        first = self._waiting.popleft()
        groups, events, size = [first], len(first.events), first.bytes
        while self._waiting:
            after = self._waiting[0]
            grown, size = events + len(after.events), size + after.bytes
            if grown > limit or size > GATHER_BYTES or after.durability != first.durability:
                break
            groups.append(self._waiting.popleft())
            events = grown
        self._waiting_events -= events
        self._gathers = len(groups) > 1
        return groups

    # -- the fast way -------------------------------------------------------------------------

    def _send_fast(self, groups: list[_Group]) -> bool:
        """Whether the call is on its way."""
        stream, wanted = self._on[0], groups[0].durability
        settings = self._server.known_settings(stream)
        if settings is None or wanted is Durability.REPLICATED or self._unsafe(settings, wanted):
            return False
        if self._lease and self._lease[1].closed and not self._in_flight:
            self._give_back()
        if self._lease is None:
            self._lease = self._server.lease(stream)
        if self._lease is None or self._lease[1].closed:
            return False
        answered = partial(self._answered, groups, settings, self._server.generation)
        self._in_flight += 1
        self._events_in_flight += sum([len(group.events) for group in groups])
        packed = b"".join(self._packed(groups, wanted, registered=False))
        self._lease[1].request(packed, 1, answered, REPLY_TIMEOUT_S)
        return True

    def _answered(
        self,
        groups: list[_Group],
        settings: NodeSettings,
        generation: int,
        replies: list[Any] | None,
        error: Exception | None,
    ) -> None:
        self._in_flight -= 1
        self._events_in_flight -= sum([len(group.events) for group in groups])
        reply = replies[0] if replies else None
        try:
            if isinstance(reply, list) and generation == self._server.generation:
                self._met = True
                self._settle(groups, reply, _reached(settings, None), groups[0].durability, None)
            elif isinstance(reply, list):  # it may have been another node that answered
                self._send_slow(_Call(groups, reply=reply, settings=settings))
            elif reply is None or self._server.is_retryable(reply):
                self._send_slow(_Call(groups, lost=reply or error))
            elif library_is_old(reply) or str(reply).startswith("LEDGERUNREGISTERED"):
                self._send_slow(_Call(groups))
            else:
                _fail(groups, self._whole_refusal(reply))
        except Exception as odd:  # noqa: BLE001 - the callers get it; nobody else would
            _fail(groups, odd)
        if self._gathers and not self._slow_task:
            self._flush_soon()
        else:
            self._flush()

    def _give_back(self) -> None:
        if self._lease:
            node, wire = self._lease
            self._lease = None
            node.give(wire)

    # -- the other way ------------------------------------------------------------------------

    def _send_slow(self, call: _Call) -> None:
        self._slow.append(call)
        if self._slow_task is None:
            self._slow_task = asyncio.get_running_loop().create_task(self._run_slow())
            self._slow_task.add_done_callback(self._slow_ended)

    async def _run_slow(self) -> None:
        while self._slow:
            call = self._slow[0]
            try:
                await self._finish(call)
                self._met = True
            except Exception as error:  # noqa: BLE001 - the callers get it
                _fail(call.groups, error)
            self._slow.popleft()

    def _slow_ended(self, task: asyncio.Task[None]) -> None:
        """Here and not in the task: one that is cancelled before its first step runs nothing."""
        self._slow_task = None
        if self._slow:  # it was cancelled
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            assert error is not None
            _fail([group for call in self._slow for group in call.groups], error)
            self._slow.clear()
        self._flush()

    async def _finish(self, call: _Call) -> None:
        if call.reply is not None and call.settings is not None:
            anew = await self._server.node_settings(self._on[0], anew=True)
            reached = min(_reached(call.settings, None), _reached(anew, None), key=_LEVELS.index)
            self._settle(call.groups, call.reply, reached, call.groups[0].durability, None)
            return
        if call.lost is not None:
            await self._server.recover(call.lost)
        await self._send(call.groups, tried=0 if call.lost is None else 1)

    async def _send(self, groups: list[_Group], *, tried: int) -> None:
        wanted = groups[0].durability
        stream = self._on[0]
        last, settings = self._server.last_settings(stream), self._server.known_settings(stream)
        stale = settings is None
        if last is None or (stale and self._unsafe(last, wanted)):
            settings, stale = await self._server.node_settings(stream), False
        if settings is not None:
            self._refuse_unsafe(settings, wanted)
        generation = self._server.generation
        reply, replicas, later = await self._call(
            groups, wanted, stale=stale, registered=False, tried=tried
        )
        if self._server.generation != generation:  # it may have been another node that answered
            later = await self._server.node_settings(stream, anew=True)
        settings = later or settings or NodeSettings()
        self._settle(groups, reply, _reached(settings, replicas), wanted, replicas)

    def _evicts(self, settings: NodeSettings) -> bool:
        allowed = self._server.settings.govledger_allow_eviction
        return settings.evicts_ledger_keys and not allowed

    def _unsafe(self, settings: NodeSettings, wanted: Durability | None) -> bool:
        unsynced = wanted is Durability.FSYNCED and not settings.fsyncs_every_ack
        return unsynced or self._evicts(settings)

    def _refuse_unsafe(self, settings: NodeSettings, wanted: Durability | None) -> None:
        if self._evicts(settings):
            raise evicting(self._server.address, settings)
        if wanted is Durability.FSYNCED and not settings.fsyncs_every_ack:
            raise _not_fsynced(self._server.address, settings)

    async def _call(
        self,
        groups: list[_Group],
        wanted: Durability | None,
        *,
        stale: bool,
        registered: bool,
        tried: int = 0,
    ) -> tuple[list[Any], int | None, NodeSettings | None]:
        """One function call; behind it on the same connection what tells how durable it is."""
        packed = self._packed(groups, wanted, registered=registered)
        behind = [pack("WAIT", 1, WAIT_TIMEOUT_MS)] if wanted is Durability.REPLICATED else []
        behind += self._server.SETTINGS_COMMANDS if stale else ()
        replies = await self._server.exchange_function(
            self._on[0], [*packed, *behind], 1 + len(behind), tried=tried
        )
        if isinstance(replies[0], Exception):
            if not registered and str(replies[0]).startswith("LEDGERUNREGISTERED"):
                await self._server.command(keys.TENANTS, "SADD", keys.TENANTS, self._tenant)
                return await self._call(groups, wanted, stale=stale, registered=True)
            raise self._whole_refusal(replies[0])
        settings = None
        if stale:
            read = replies[-len(self._server.SETTINGS_COMMANDS) :]
            now = self._server.generation
            settings = await self._server.take_settings(self._on[0], read, now)
        replicas = None
        if wanted is Durability.REPLICATED:
            replicas = int(self._server.checked(replies[1]))
        return replies[0], replicas, settings

    def _packed(
        self, groups: list[_Group], wanted: Durability | None, *, registered: bool
    ) -> list[bytes]:
        flags = ("r" if registered else "") + ("w" if wanted else "")
        head = f"{time.time_ns() // 1_000_000} {flags} {self._new_epoch}".encode()
        args = self._fixed_args + 1
        for group in groups:
            args += _GROUP_ARGS + _EVENT_ARGS * len(group.events)
        packed = [b"*%d\r\n" % args, self._call_head, _packed_strings(head)]
        return packed + [group.packed for group in groups]

    def _settle(
        self,
        groups: list[_Group],
        reply: list[Any],
        reached: Durability,
        wanted: Durability | None,
        replicas: int | None,
    ) -> None:
        epoch, notes, results = reply[0].decode(), reply[1], reply[2]
        if epoch == self._new_epoch:
            self._new_epoch = secrets.token_hex(8)  # were the tenant deleted, it is another one
        for raw in notes:
            _log.warning("tenant %s: %s", self._tenant, Incident.parse(raw))
        for group, result in zip(groups, results, strict=True):
            if group.done.done():
                continue
            if result[0] != 0:
                group.done.set_exception(self._refusal(group, result))
            elif wanted is not None and _LEVELS.index(reached) < _LEVELS.index(wanted):
                receipts = self._receipts(group, epoch, result, reached)
                group.done.set_exception(self._not_reached(wanted, reached, replicas, receipts))
            else:
                group.done.set_result(self._receipts(group, epoch, result, reached))
        self._feed.hint(self._tenant)

    def _receipts(
        self, group: _Group, epoch: str, result: list[Any], reached: Durability
    ) -> list[Receipt]:
        _, ms, seq, flat = result
        tenant = self._tenant
        if not flat:
            return [
                Receipt(tenant, epoch, ms, at, False, reached)
                for at in range(seq, seq + len(group.events))
            ]
        duplicates = {flat[i]: (flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)}
        receipts = []
        for offset in range(len(group.events)):
            known = duplicates.get(offset)
            at_ms, at_seq = known or (ms, seq)
            receipts.append(Receipt(tenant, epoch, at_ms, at_seq, known is not None, reached))
            seq += known is None
        return receipts

    # -- what the function refused ------------------------------------------------------------

    def _refusal(self, group: _Group, result: list[Any]) -> errors.LedgerError:
        if result[0] == 1:
            _, offset, ms, seq, digest = result
            event, offered = group.events[offset], group.events[offset].sha256.hex()
            if any(earlier.id == event.id for earlier in group.events[:offset]):
                return errors.ConflictingEvent(
                    f"tenant {self._tenant}: id {event.id} is twice in this batch, with different "
                    "content",
                    hint="give each event an id of its own; nothing of the batch was written",
                    tenant=self._tenant,
                    id=event.id,
                    recorded_sha256=digest.hex(),
                    offered_sha256=offered,
                    index=offset,
                )
            return errors.ConflictingEvent(
                f"tenant {self._tenant}: id {event.id} is recorded as seq {seq} with other content "
                f"(recorded SHA-256 {digest.hex()[:16]}…, offered {offered[:16]}…)",
                hint=f"`govledger show {self._tenant} {event.id}` shows what is recorded; "
                "a new event needs a new id",
                tenant=self._tenant,
                id=event.id,
                seq=seq,
                entry_id=f"{ms}-{seq}",
                recorded_sha256=digest.hex(),
                offered_sha256=offered,
                index=offset,
            )
        if result[0] == 2:
            return errors.WrongExpectedSeq(
                f"expected seq {group.expected_seq}, tenant {self._tenant} is at {result[1]}",
                hint="read what came in between, decide again, and append with the new number",
                tenant=self._tenant,
                expected=group.expected_seq,
                actual=result[1],
            )
        if result[0] == 4:
            return errors.PredecessorMissing(
                f"tenant {self._tenant}: the batch behind which this one was to come was refused, "
                "or another named one came between",
                hint="see what became of that one, and append this one again; nothing of it was "
                "written",
                tenant=self._tenant,
            )
        latest = max(group.events, key=lambda event: event.at_ms or 0)
        return errors.ClockSkew(
            f"tenant {self._tenant}: event {latest.id}: at is "
            f"{((latest.at_ms or 0) - result[1]) / 1000:.0f} s ahead of the ledger's time; "
            "the limit is 300 s",
            hint="`at` is when the engine decided, in UTC; set that machine's clock",
            tenant=self._tenant,
            id=latest.id,
            ledger_ms=result[1],
        )

    def _whole_refusal(self, reply: Exception) -> errors.LedgerError:
        code, *facts = str(reply).split(" ")
        build = _REFUSALS.get(code)
        return build(self._tenant, facts) if build else translate(reply, self._server.address)

    def _not_reached(
        self,
        wanted: Durability,
        reached: Durability,
        replicas: int | None,
        receipts: list[Receipt],
    ) -> errors.DurabilityNotReached:
        counted = "" if replicas is None else f" ({replicas} replicas acknowledged in time)"
        return errors.DurabilityNotReached(
            f"tenant {self._tenant}: recorded, but only {reached}, not {wanted}{counted}",
            hint="append again with the same id once the server can give that level",
            wanted=wanted,
            reached=reached,
            receipts=receipts,
        )


def _clock_skew(_: str, facts: list[str]) -> errors.LedgerError:
    ahead_s = (time.time_ns() // 1_000_000 - int(facts[0])) / 1000
    return errors.ClockSkew(
        f"this machine's clock is {ahead_s:+.0f} s from the server's; the limit is 300 s",
        hint="set the clock (NTP) here or there; nothing was written",
        ahead_s=ahead_s,
    )


def _many_foreign(tenant: str, facts: list[str]) -> errors.LedgerError:
    return errors.ForeignEntries(
        f"tenant {tenant}: more than 5,000 foreign entries; registered up to {facts[1]}",
        hint="append again to register the next; find who has write access to the stream",
        tenant=tenant,
    )


_REFUSALS: Final[dict[str, Callable[[str, list[str]], errors.LedgerError]]] = {
    "LEDGERSKEW": _clock_skew,
    "LEDGERBEHIND": lambda tenant, facts: behind(tenant, int(facts[0]), int(facts[1])),
    "LEDGERBADINDEX": bad_index,
    "LEDGERNOHEAD": lambda tenant, _: headless(tenant),
    "LEDGERBLOCKED": blocked,
    "LEDGERFOREIGN": _many_foreign,
}
"""What an error reply of `append` in functions.lua means, by its code."""


def evicting(address: str, settings: NodeSettings) -> errors.UnsafeServer:
    """The server may drop what it acknowledged."""
    return errors.UnsafeServer(
        f"{address}: maxmemory-policy is {settings.maxmemory_policy}, which evicts keys without a "
        "TTL: acknowledged decisions would vanish",
        hint="CONFIG SET maxmemory-policy noeviction (or volatile-lru); "
        "GOVLEDGER_ALLOW_EVICTION=1 appends all the same",
        setting="maxmemory-policy",
        found=settings.maxmemory_policy,
    )


def _not_fsynced(address: str, settings: NodeSettings) -> errors.UnsafeServer:
    if settings.appendonly is None:
        found = "its settings may not be read (CONFIG is denied and nobody attested them)"
        remedy = "grant +config|get and +info, or let an operator's `govledger project` run"
    elif settings.appendonly != "yes":
        found, remedy = "appendonly is no", "CONFIG SET appendonly yes, appendfsync always"
    elif settings.appendfsync != "always":
        found = f"appendfsync is {settings.appendfsync}"
        remedy = "CONFIG SET appendfsync always"
    elif settings.aof_begins:
        found = "its append-only file may still be in the making, and a crash would lose all of it"
        remedy = "wait until INFO persistence says aof_rewrite_in_progress:0"
    else:
        found = "no-appendfsync-on-rewrite is yes, which skips fsync during rewrites"
        remedy = "CONFIG SET no-appendfsync-on-rewrite no"
    return errors.UnsafeServer(
        f"{address}: fsynced was asked for and cannot be reached: {found}",
        hint=f"{remedy}; or ask for less: this server reaches `memory`",
        reached=Durability.MEMORY,
    )


def _reached(settings: NodeSettings, replicas: int | None) -> Durability:
    if replicas:
        return Durability.REPLICATED
    return Durability.FSYNCED if settings.fsyncs_every_ack else Durability.MEMORY


def _fail(groups: list[_Group], error: BaseException) -> None:
    for group in groups:
        if group.done.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            group.done.cancel()
        elif isinstance(error, errors.LedgerError):  # each caller's own: notes and tracebacks grow
            own = type(error)(error.message, hint=error.hint, **error.facts)
            own.__cause__ = error.__cause__
            group.done.set_exception(own)
        else:
            group.done.set_exception(error)


class _Feed:
    """Tells projectors which tenants have news: after the ack, not awaited, lossy by design.

    A tenant's first hint leaves at once and the next 50 ms later at the earliest: projectors
    publish a tenant no oftener, and each hint costs the server a write.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._due: set[str] = set()
        self._resting: set[str] = set()
        self._again: set[str] = set()
        self._sending: asyncio.Task[None] | None = None

    def hint(self, tenant: str) -> None:
        if tenant in self._resting:
            self._again.add(tenant)
            return
        self._resting.add(tenant)
        asyncio.get_running_loop().call_later(FEED_INTERVAL_S, self._rested, tenant)
        self._due.add(tenant)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    def _rested(self, tenant: str) -> None:
        self._resting.discard(tenant)
        if tenant in self._again:
            self._again.discard(tenant)
            self.hint(tenant)

    async def _send(self) -> None:
        while self._due:
            tenants, self._due = self._due, set()
            packed = [
                pack("XADD", keys.FEED, "MAXLEN", "~", FEED_LENGTH, "*", "tenant", tenant)
                for tenant in tenants
            ]
            try:
                await self._server.exchange(keys.FEED, packed, len(packed))
            except (errors.LedgerError, redis_errors.RedisError) as error:
                _log.debug("feed hint lost, the sweep will find it: %s", error)
                return

    async def aclose(self) -> None:
        """Sends the hints that were still resting."""
        self._due |= self._again
        self._again.clear()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())
        await asyncio.wait([self._sending], timeout=1)
        self._sending.cancel()
