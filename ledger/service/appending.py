"""Appending a file of events: check every line, then record them all; or record the good lines and
report the others.

A tenant's events are recorded in the order of the file. Two of its groups are under way at once:
the later one asks to come right behind the earlier one, and is refused where that was.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

import orjson

from ledger import errors
from ledger.append import BATCH_EVENTS_LIMIT, Durability, Link, Receipt
from ledger.events import CheckedEvent, EncodedEvent
from ledger.ledger import Ledger
from ledger.service.jsonl import KEPT_BYTES, Line, LineSplitter, Source, event_of
from ledger.service.terminal import progress
from ledger.wording import counted

__all__ = ["Landed", "Rejects", "append_checked", "append_good_lines"]

GROUP_EVENTS: Final = 128
GROUP_BYTES: Final = 1024 * 1024
"""How much goes into one call; more would hold the server's readers up."""

WAITING_EVENTS: Final = 10 * GROUP_EVENTS
"""How many events, of all tenants, wait for their groups to fill before all groups are sent."""

GROUPS_AT_ONCE: Final = 2
"""Of one tenant."""

CALLS_AT_ONCE: Final = 8
LINES_A_TURN: Final = 32
BAD_LINES_SHOWN: Final = 10
AHEAD_LIMIT_MS: Final = 300_000
_LEVELS: Final = list(Durability)

_Event = CheckedEvent | EncodedEvent


@dataclass(slots=True)
class _Group:
    """A tenant's events for one call, the numbers of their lines, and the lines that may yet have
    to be rejected.
    """

    tenant: str
    numbers: list[int] = field(default_factory=list)
    events: list[_Event] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    size_bytes: int = 0


class _Gathering:
    """Puts events into groups, a tenant each, in the order of the file."""

    def __init__(self) -> None:
        self._filling: dict[str, _Group] = {}
        self._waiting_count = 0

    def put(
        self, tenant: str, number: int, event: _Event, line: bytes | None = None
    ) -> Sequence[_Group]:
        """What is ready to go; `line` is kept where it is given."""
        group = self._filling.get(tenant)
        if group is None:
            group = self._filling[tenant] = _Group(tenant)
        group.numbers.append(number)
        group.events.append(event)
        if line is not None:
            group.lines.append(line)
        group.size_bytes += event.size_bytes
        self._waiting_count += 1
        if len(group.events) >= GROUP_EVENTS or group.size_bytes >= GROUP_BYTES:
            self._waiting_count -= len(group.events)
            return (self._filling.pop(tenant),)
        return self.rest() if self._waiting_count >= WAITING_EVENTS else ()

    def rest(self) -> Sequence[_Group]:
        """Everything that waits."""
        groups, self._filling = tuple(self._filling.values()), {}
        self._waiting_count = 0
        return groups


@dataclass
class Landed:
    """What was acknowledged of a tenant's events; `count` has the duplicates in it, and
    `durability` is the least that one of them reached.
    """

    tenant: str
    count: int = 0
    duplicates: int = 0
    first_seq: int | None = None
    last_seq: int | None = None
    durability: Durability | None = None

    @property
    def newest_seq(self) -> int:
        """The last ordinal that was acknowledged, of a duplicate too; 0 before the first."""
        return self.last_seq or 0

    def add(self, receipts: list[Receipt], newest_seq: int) -> None:
        """Counts one group's receipts; it was sent when `newest_seq` had been acknowledged.

        Raises:
            LedgerRolledBack: what was acknowledged is not recorded any more.
        """
        new = [receipt.seq for receipt in receipts if not receipt.duplicate]
        if new and new[0] <= newest_seq:
            raise errors.LedgerRolledBack(
                f"tenant {self.tenant}: seq {newest_seq} was acknowledged, and seq {new[0]} is a "
                "new entry now: the ledger went back meanwhile",
                hint="find out why (a failover, a restored file); the same command again records "
                "what is missing",
                tenant=self.tenant,
            )
        seqs = [receipt.seq for receipt in receipts]
        self.count += len(receipts)
        self.duplicates += sum(receipt.duplicate for receipt in receipts)
        self.first_seq = min(seqs) if self.first_seq is None else min(self.first_seq, *seqs)
        self.last_seq = max(seqs) if self.last_seq is None else max(self.last_seq, *seqs)
        reached = receipts[0].durability
        self.durability = min(self.durability or reached, reached, key=_LEVELS.index)


class Rejects:
    """Lines that cannot be recorded: counted, the first ones kept, all of them written to `to`.

    What is written is JSON Lines of `line` (its number), `error`, `hint`, and `input`, the line.
    """

    def __init__(self, source: Source, to: IO[bytes] | None = None) -> None:
        self.count = 0
        self.first: list[dict[str, Any]] = []
        self._source = source
        self._to = to

    def add(self, number: int, raw: bytes, error: errors.LedgerError) -> None:
        """Counts one more, with what is wrong with it."""
        self.count += 1
        if len(self.first) < BAD_LINES_SHOWN:
            where = f"{self._source.name}:{number}"
            shown = {"line": number, "where": where, "message": error.message, "hint": error.hint}
            self.first.append(shown)
        if self._to:
            told = {"line": number, "error": error.message, "hint": error.hint}
            text = raw.decode(errors="backslashreplace")
            self._to.write(orjson.dumps({**told, "input": text}) + b"\n")

    def as_error(self, outcome: str, hint: str) -> errors.InvalidInput:
        """All of them as one error, whose `facts` has the first `lines`."""
        lines = counted(self.count, "line")
        shown = "" if self.count == len(self.first) else f" (the first {len(self.first)} are shown)"
        message = f"{self._source.name}: {lines} cannot be recorded{shown}; {outcome}"
        return errors.InvalidInput(message, hint=hint, lines=self.first)


# -- every line checked before anything is written ----------------------------------------------


async def append_checked(
    ledger: Ledger, source: Source, tenant: str | None, *, expected_seq: int | None = None
) -> dict[str, Landed]:
    """Checks every line, and then records them all; what landed, by tenant.

    Args:
        ledger: where to.
        source: JSON Lines.
        tenant: whose; None takes the tenant that each line names.
        expected_seq: the tenant's head must be this; at most 1,000 events then, all or none.

    Raises:
        InvalidInput: a line cannot be recorded; nothing was written.
        LedgerError: as `Ledger.append_many`; it says where it stopped and what had landed.
    """
    check = _Check(ledger, source, tenant)
    with progress("checking", source.size_bytes) as advance:
        await check.every_line(advance)
    with progress("recording", check.count) as advance:
        recorder = _Recorder(ledger, source, advance)
        if expected_seq is not None:
            await recorder.whole(check.one_batch(), expected_seq)
            return recorder.landed
        try:
            for groups in check.groups():
                await recorder.send(*groups)
                await asyncio.sleep(0)
            await recorder.finish()
        except errors.LedgerError as error:
            await recorder.settle()
            raise _stopped(error, recorder.landed) from error
    return recorder.landed


class _Check:
    """The first reading: nothing but refusals, and the events themselves where they are few."""

    def __init__(self, ledger: Ledger, source: Source, tenant: str | None) -> None:
        self.count = 0
        self._ledger = ledger
        self._source = source
        self._tenant = tenant
        self._bad = Rejects(source)
        self._gathering = _Gathering()
        self._kept: list[_Group] | None = []
        self._kept_bytes = 0
        self._seen: defaultdict[str, dict[str, tuple[int, _Event]]] = defaultdict(dict)
        self._clock_ahead_ms = 0.0

    async def every_line(self, advance: Callable[[int], None]) -> None:
        """Raises InvalidInput with the first bad lines, where there are any."""
        seconds, micros = await self._ledger.server.command("", "TIME")
        self._clock_ahead_ms = int(seconds) * 1000 + int(micros) / 1000 - time.time() * 1000
        splitter = LineSplitter()
        async for chunk in self._source.chunks(twice=True):
            await self._check(splitter.feed(chunk))
            self._kept_bytes += len(chunk)
            if self._kept_bytes > KEPT_BYTES:
                self._kept, self._gathering = None, _Gathering()
                self._seen.clear()
            advance(len(chunk))
            await asyncio.sleep(0)  # lets Ctrl-C in
        await self._check(splitter.end())
        if self._kept is not None:
            self._kept += self._gathering.rest()
        self._seen.clear()
        if self._bad.count:
            raise self._bad.as_error(
                "nothing was written",
                "correct the input and run the same command again; --keep-going records the good "
                "lines and rejects the others",
            )

    async def _check(self, lines: list[Line]) -> None:
        in_time_ms = self._now_ms() + AHEAD_LIMIT_MS
        for line in lines:
            try:
                tenant, event = event_of(line, self._tenant)
                if event.at_ms is not None and event.at_ms > in_time_ms:
                    await self._refuse_future(tenant, event.at_ms)
                if self._kept is not None:
                    self._keep(self._kept, line.number, tenant, event)
            except errors.InvalidInput as error:
                self._bad.add(line.number, line.raw, error)
        self.count += len(lines)

    def _now_ms(self) -> float:
        return time.time() * 1000 + self._clock_ahead_ms

    async def _refuse_future(self, tenant: str, at_ms: int) -> None:
        """The append function's own rule, held before anything is written."""
        recorded_ms = int((await self._ledger.head(tenant)).entry_id.partition("-")[0])
        ahead_ms = at_ms - max(self._now_ms(), recorded_ms)
        if ahead_ms > AHEAD_LIMIT_MS:
            raise errors.InvalidEvent(
                f"at: is {ahead_ms / 1000:.0f} s ahead of the ledger's time; the limit is "
                f"{AHEAD_LIMIT_MS // 1000} s",
                hint="`at` is when the engine decided, in UTC; set that machine's clock",
            )

    def _keep(self, kept: list[_Group], number: int, tenant: str, event: _Event) -> None:
        """Only among what is kept contradictions are found; the ledger finds the rest."""
        if full := self._gathering.put(tenant, number, event):
            kept += full
        line, first = self._seen[tenant].setdefault(event.id, (number, event))
        if first is not event and first.data != event.data:
            raise errors.InvalidEvent(
                f"id: {event.id} is on line {line} too, with other content",
                hint="a new event needs a new id",
            )

    def groups(self) -> Iterator[Sequence[_Group]]:
        """The events in order, what is kept or what is read and encoded anew, in turns: what is
        under way wants to go on in between, and Ctrl-C to come in.
        """
        if self._kept is not None:
            yield from ((group,) for group in self._kept)
            return
        gathering, splitter = _Gathering(), LineSplitter()
        for chunk in self._source.again():
            yield from self._encoded(gathering, splitter.feed(chunk))
        yield from self._encoded(gathering, splitter.end())
        yield gathering.rest()

    def _encoded(self, gathering: _Gathering, lines: list[Line]) -> Iterator[Sequence[_Group]]:
        for start in range(0, len(lines), LINES_A_TURN):
            full: list[_Group] = []
            for line in lines[start : start + LINES_A_TURN]:
                tenant, event = event_of(line, self._tenant)
                full += gathering.put(tenant, line.number, event)
            yield full

    def one_batch(self) -> _Group:
        """Raises InvalidInput where they do not fit into one atomic batch."""
        if self._kept is None or not 1 <= self.count <= BATCH_EVENTS_LIMIT:
            raise errors.InvalidInput(
                f"--expected-seq: needs one atomic batch, of 1 to {BATCH_EVENTS_LIMIT} events; "
                f"{self._source.name} has {self.count}",
                hint="append it in parts, each with the last seq of the one before",
            )
        whole = _Group(self._kept[0].tenant)
        for group in self._kept:
            whole.numbers += group.numbers
            whole.events += group.events
        return whole


# -- the good lines, whatever the others are ------------------------------------------------------


async def append_good_lines(
    ledger: Ledger, source: Source, tenant: str | None, rejects: Rejects
) -> dict[str, Landed]:
    """Records each line that can be recorded as it is read, and hands the others to `rejects`.

    What a pipe has brought is recorded when it pauses, so it may stay open.

    Raises:
        LedgerError: what is no single line's fault; it says what had landed.
    """
    with progress("recording", source.size_bytes) as advance:
        recorder = _Recorder(ledger, source, lambda _: None, rejects)
        gathering, splitter = _Gathering(), LineSplitter()
        try:
            async for chunk in source.chunks(twice=False):
                await _send_good(recorder, gathering, splitter.feed(chunk), tenant, rejects)
                if source.size_bytes is None:
                    await recorder.send(*gathering.rest())
                advance(len(chunk))
            await _send_good(recorder, gathering, splitter.end(), tenant, rejects)
            await recorder.send(*gathering.rest())
            await recorder.finish()
        except errors.LedgerError as error:
            await recorder.settle()
            raise _stopped(error, recorder.landed) from error
    return recorder.landed


async def _send_good(
    recorder: _Recorder,
    gathering: _Gathering,
    lines: list[Line],
    tenant: str | None,
    rejects: Rejects,
) -> None:
    for turn, line in enumerate(lines, 1):
        try:
            whose, event = event_of(line, tenant)
        except errors.InvalidInput as error:
            rejects.add(line.number, line.raw, error)
        else:
            await recorder.send(*gathering.put(whose, line.number, event, line.raw))
        if turn % LINES_A_TURN == 0:
            await asyncio.sleep(0)  # what is under way goes on, and Ctrl-C comes in


# -- recording ----------------------------------------------------------------------------------


class _Recorder:
    """Appends groups: a tenant's one after the other, those of several tenants at once."""

    def __init__(
        self,
        ledger: Ledger,
        source: Source,
        advance: Callable[[int], None],
        rejects: Rejects | None = None,
    ) -> None:
        """`rejects`: takes the events that the ledger refuses; without it a refusal is the end."""
        self.landed: dict[str, Landed] = {}
        self._ledger = ledger
        self._source = source
        self._advance = advance
        self._rejects = rejects
        self._sending: dict[str, deque[tuple[asyncio.Task[None], str]]] = defaultdict(deque)
        """By tenant its groups under way, at most two, and the name of each."""
        self._token = secrets.token_hex(8)
        self._sent = 0
        self._slots = asyncio.Semaphore(CALLS_AT_ONCE)
        self._failure: errors.LedgerError | None = None

    async def send(self, *groups: _Group) -> None:
        """Returns when the last is on its way; raises what an earlier group came to."""
        for group in groups:
            under_way = self._sending[group.tenant]
            if len(under_way) == GROUPS_AT_ONCE:
                await under_way.popleft()[0]
            await self._slots.acquire()
            if self._failure:
                raise self._failure
            self._sent += 1
            name, before = f"{self._token}x{self._sent}", under_way[-1] if under_way else None
            under_way.append((asyncio.create_task(self._send(group, name, before)), name))

    async def finish(self) -> None:
        """Returns when all is acknowledged."""
        await self.settle()
        if self._failure:
            raise self._failure

    async def settle(self) -> None:
        """Waits for what is under way."""
        tasks = [task for under_way in self._sending.values() for task, _ in under_way]
        await asyncio.gather(*tasks)

    async def whole(self, group: _Group, expected_seq: int) -> None:
        """One atomic batch at the expected head: all of it, or an error and nothing."""
        try:
            await self._append(group, expected_seq)
        except errors.LedgerError as error:
            raise _located(error, group, self._source.name) from error

    async def _send(
        self, group: _Group, name: str, before: tuple[asyncio.Task[None], str] | None
    ) -> None:
        try:
            if before is not None and await self._landed_behind(group, name, *before):
                return
            while group.events and not await self._landed_or_rejected(group, name):
                pass
        except errors.LedgerError as error:
            self._failure = self._failure or _located(error, group, self._source.name)
        finally:
            self._slots.release()

    async def _landed_behind(
        self, group: _Group, name: str, before: asyncio.Task[None], before_name: str
    ) -> bool:
        """Whether the group landed, sent while the one before it is under way. If not, that one
        has ended: where it failed, this one is not to land.
        """
        try:
            await self._append(group, link=Link(name, before_name))
        except (errors.PredecessorMissing, errors.ConflictingEvent, errors.ClockSkew):
            await before  # and then again, without it
            return self._failure is not None
        return True

    async def _landed_or_rejected(self, group: _Group, name: str) -> bool:
        """Whether the group landed; if not, one event less is in it."""
        try:
            await self._append(group, link=Link(name))
        except (errors.ConflictingEvent, errors.ClockSkew) as error:
            at = _culprit(error, group)
            if at is None or self._rejects is None:
                raise
            del group.events[at]
            self._rejects.add(group.numbers.pop(at), group.lines.pop(at), error)
            return False
        return True

    async def _append(
        self, group: _Group, expected_seq: int | None = None, link: Link | None = None
    ) -> None:
        landed = self.landed.setdefault(group.tenant, Landed(group.tenant))
        events: Any = group.events  # `events.encode` takes what is checked already
        newest_seq = landed.newest_seq
        try:
            receipts = await self._ledger.append_many(
                group.tenant, events, expected_seq=expected_seq, link=link
            )
        except errors.DurabilityNotReached as error:  # recorded all the same
            landed.add(error.facts.pop("receipts"), newest_seq)  # type: ignore[arg-type]
            raise
        landed.add(receipts, newest_seq)
        self._advance(len(group.events))


def _culprit(error: errors.LedgerError, group: _Group) -> int | None:
    """Which event of the group the error is about, where it is about one."""
    if "id" not in error.facts:
        return None
    if "index" in error.facts:
        return int(str(error.facts["index"]))
    ids = [event.id for event in group.events]
    return ids.index(str(error.facts["id"]))


def _located(error: errors.LedgerError, group: _Group, name: str) -> errors.LedgerError:
    at = _culprit(error, group)
    first, last = (group.numbers[0], group.numbers[-1]) if at is None else (group.numbers[at],) * 2
    lines = f"{first}" if first == last else f"{first}-{last}"
    return type(error)(f"{name}:{lines}: {error.message}", hint=error.hint, **error.facts)


def _stopped(error: errors.LedgerError, landed: dict[str, Landed]) -> errors.LedgerError:
    tenants = [one for one in landed.values() if one.count]
    shown = ", ".join(f"{one.tenant} seq {one.first_seq}..{one.last_seq}" for one in tenants[:3])
    more = f" and {counted(len(tenants) - 3, 'more tenant')}" if len(tenants) > 3 else ""
    count = sum(one.count for one in tenants)
    what = (
        f"{counted(count, 'event')} had landed ({shown}{more})" if count else "nothing had landed"
    )
    again = "the same command again records only what is missing"
    facts = {
        **error.facts,
        "landed": [
            {"tenant": one.tenant, "count": one.count, "last_seq": one.last_seq} for one in tenants
        ],
    }
    hint = f"{error.hint}; then {again}" if error.hint else again
    return type(error)(f"{error.message}; stopped there: {what}", hint=hint, **facts)
