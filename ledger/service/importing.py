"""One tenant's record from a file into a server.

It grows beside the tenant's keys and takes their place in one step, under a new epoch: a projector
or reader that knew the original cannot take the copy for its continuation. With a cut it ends
where the record ended at a time or a seq: an entry's id says when it was recorded, and nothing
after it can have changed it. So the finest grain is one entry, or one millisecond.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import orjson

from ledger import errors, keys
from ledger.append import evicting
from ledger.server import Server, pack
from ledger.service.exporting import Fields, Progress, record_digest
from ledger.service.portable import ExportReader, entry_record
from ledger.spans import Spans
from ledger.stream import Incident, split_id

__all__ = ["Cut", "Imported", "import_tenant"]

PAGE_ENTRIES: Final = 500
PAGE_BYTES: Final = 512 << 10
MAX_FUNCTION_PARTS: Final = 2000
"""Lua cannot hand more to one command; what is larger is sent as a command of its own."""

REPORT_ENTRIES: Final = 1000
MAX_TIME_MS: Final = 10**15
MAX_SEQ: Final = 2**47
CLOCK_SKEW_LIMIT_MS: Final = 300_000
_OWN_FIELDS: Final = [b"type", b"id", b"data"]
_log = logging.getLogger("ledger")


class Cut(NamedTuple):
    """Where a point-in-time import ends; both None = at the head."""

    to_ms: int | None = None
    to_seq: int | None = None

    def is_behind(self, time_ms: int, seq: int) -> bool:
        """Whether an entry lies behind the cut."""
        return (self.to_ms is not None and time_ms > self.to_ms) or (
            self.to_seq is not None and seq > self.to_seq
        )


@dataclass
class Imported:
    """What an import recorded; `left_out` entries lay behind the cut."""

    tenant: str
    epoch: str
    seq: int = 0
    entry_id: str = "0-0"
    entries: int = 0
    own: int = 0
    left_out: int = 0
    records_sha256: str = ""


class _Numbered(NamedTuple):
    """An entry's ordinal, and its value in the index where it is ours."""

    seq: int
    index_value: bytes


class _Ordinals:
    """Gives entries their ordinals, and tells ours from foreign ones, as readers of the stream do:
    by the incidents that the append function registered.
    """

    def __init__(self, incidents: Sequence[Incident]) -> None:
        self.last_seq = 0
        self._ranges = Spans[Incident]()
        for one in incidents:
            if one.kind in ("foreign", "recreated"):
                first_id = one.first_id if one.kind == "foreign" else "0-0"
                self._ranges.add(split_id(first_id), split_id(one.last_id), one)

    def number(self, entry_id: bytes, fields: Fields) -> _Numbered:
        at = split_id(entry_id)
        incident = self._ranges.at(at)
        if incident is not None:
            foreign = incident.kind == "foreign"
            return _Numbered(
                max(self.last_seq + 1, incident.seq) if foreign else self.last_seq, b""
            )
        time_ms, seq = at
        if time_ms >= MAX_TIME_MS or seq >= MAX_SEQ or not _is_event(fields):
            return _Numbered(max(self.last_seq, min(seq, MAX_SEQ)), b"")
        place = time_ms.to_bytes(6, "big") + seq.to_bytes(6, "big")
        return _Numbered(max(self.last_seq, seq), place + hashlib.sha256(fields[5]).digest())


def _is_event(fields: Fields) -> bool:
    """Whether the append function can have written this."""
    if fields[::2] != _OWN_FIELDS:
        return False
    try:
        event = orjson.loads(fields[5])
        return [event["type"].encode(), event["id"].encode()] == fields[1:4:2]
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


async def import_tenant(
    server: Server,
    file: BinaryIO,
    path: Path,
    cut: Cut | None = None,
    on_progress: Progress | None = None,
) -> Imported:
    """Records what a file holds, up to the cut, under a new epoch; nothing of it is there before
    the whole file was read and its checksum, and what the server took, were found right.

    Raises:
        TargetExists: the tenant has a record there, or another import took over.
        InvalidInput: it is no such file.
        InvalidBackup: the file is damaged.
        NotFound: nothing was recorded yet at the cut.
        UnsafeServer: the server may evict what it would be given.
        ClockSkew: the record is of the future by this server's clock.
        Unavailable: as ever; beginning again is safe.
    """
    work = _Import(server, ExportReader(file, path), cut or Cut())
    await work.begin()
    try:
        await work.load(on_progress)
        await work.finish()
    except BaseException:
        await asyncio.shield(work.discard())
        raise
    return work.done


@dataclass
class _Page:
    """Entries on their way: arguments of the function, or one that is too large for it."""

    before: int
    args: list[bytes | str | int] = field(default_factory=list)
    entries: int = 0
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        return self.entries >= PAGE_ENTRIES or self.bytes >= PAGE_BYTES


class _Import:
    """One import, from its token to the names that the keys get at the end."""

    def __init__(self, server: Server, reader: ExportReader, cut: Cut) -> None:
        tenant = reader.head.tenant
        self.done = Imported(tenant, epoch=secrets.token_hex(8))
        self._server = server
        self._reader = reader
        self._cut = cut
        self._token = secrets.token_hex(8)
        self._on = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
        self._importing = keys.importing(tenant)
        self._ordinals = _Ordinals(reader.incidents)
        self._records = hashlib.sha256()
        self._page = _Page(0)

    async def _call(self, name: str, *args: bytes | str | int) -> Any:
        on, tenant = (*self._on, *self._importing), self.done.tenant
        try:
            return await self._server.function(f"govledger_{name}", on, self._token, *args)
        except errors.ServerError as error:
            if "LEDGEREXISTS" in error.message:
                raise errors.TargetExists(
                    f"tenant {tenant}: something is recorded there already",
                    hint="nothing is overwritten: import to a server that has no such tenant",
                    tenant=tenant,
                ) from None
            if "LEDGERIMPORT" in error.message:
                raise errors.TargetExists(
                    f"tenant {tenant}: another import of this tenant took over",
                    hint="let one of them end, then look with `govledger tenants`",
                    tenant=tenant,
                ) from None
            if "LEDGERBEHIND" in error.message:
                raise errors.InvalidBackup(
                    f"tenant {tenant}: two entries of the file have the same event id",
                    hint="no ledger recorded this: where does the file come from?",
                ) from None
            raise

    async def begin(self) -> None:
        settings = await self._server.node_settings(self._on[0])
        if settings.evicts_ledger_keys and not self._server.settings.govledger_allow_eviction:
            raise evicting(self._server.address, settings)
        await self._check_clock()
        await self._call("import_begin")

    async def _check_clock(self) -> None:
        seconds, _ = await self._server.command(self._on[0], "TIME")
        now_ms, last_ms = int(seconds) * 1000, split_id(self._reader.head.entry_id)[0]
        if last_ms > min(now_ms + CLOCK_SKEW_LIMIT_MS, MAX_TIME_MS) and not self._cut.to_ms:
            raise errors.ClockSkew(
                f"tenant {self.done.tenant}: its last entry was recorded at {last_ms} ms, and this "
                f"server's clock says {now_ms}",
                hint="set the server's clock right: later entries could carry no true time",
            )

    async def load(self, on_progress: Progress | None) -> None:
        """Sends every entry up to the cut, and reads the file to its end."""
        cut, reported = False, 0
        for entry_id, fields in self._reader.entries():
            numbered = self._ordinals.number(entry_id, fields)
            cut = cut or self._cut.is_behind(split_id(entry_id)[0], numbered.seq)
            if cut:
                self.done.left_out += 1
                continue
            self._ordinals.last_seq = numbered.seq
            await self._add(entry_id, fields, numbered)
            if on_progress and self.done.entries - reported >= REPORT_ENTRIES:
                on_progress(self.done.entries - reported)
                reported = self.done.entries
        await self._send()
        self._set_head(cut=cut)

    def _set_head(self, *, cut: bool) -> None:
        head, done = self._reader.head, self.done
        done.seq = self._ordinals.last_seq
        # The head may lie behind entries that are gone.
        cut = cut or self._cut.is_behind(split_id(head.entry_id)[0], head.seq)
        if not cut:
            if head.seq < done.seq:
                raise errors.InvalidBackup(
                    f"tenant {done.tenant}: the file's head is seq {head.seq}, its entries go to "
                    f"{done.seq}",
                    hint="no ledger exported this: where does the file come from?",
                )
            done.seq, done.entry_id = head.seq, head.entry_id
        if done.seq >= MAX_SEQ:
            raise errors.InvalidBackup(f"tenant {done.tenant}: seq {done.seq} cannot be")
        wanted = self._cut.to_seq
        if cut and done.seq and wanted is not None and done.seq < min(wanted, head.seq):
            raise errors.EntriesMissing(
                f"tenant {done.tenant}: what was recorded from seq {done.seq + 1} to {wanted} is "
                "gone, so the state of that seq cannot be told",
                hint=f"restore to seq {done.seq}, or an older backup",
                tenant=done.tenant,
            )
        if cut and not done.seq:
            raise errors.NotFound(f"tenant {done.tenant}: nothing was recorded by then")

    async def _add(self, entry_id: bytes, fields: Fields, numbered: _Numbered) -> None:
        record = entry_record(entry_id, fields)
        self._records.update(record)
        self.done.entries += 1
        self.done.own += bool(numbered.index_value)
        self.done.entry_id = entry_id.decode()
        if len(fields) > MAX_FUNCTION_PARTS or len(record) > PAGE_BYTES:
            await self._send()
            await self._send_alone(entry_id, fields)
            return
        page = self._page
        page.args += [entry_id, numbered.index_value, len(fields), *fields]
        page.entries += 1
        page.bytes += len(record)
        if page.is_full:
            await self._send()

    async def _send(self) -> None:
        page = self._page
        if page.entries:
            await self._call("import_page", page.before, page.entries, *page.args)
        self._page = _Page(self.done.entries)

    async def _send_alone(self, entry_id: bytes, fields: Fields) -> None:
        """Sent again it is refused, since its id is there; the length says that it is."""
        stream = self._importing[0]
        packed = [pack("XADD", stream, entry_id, *fields), pack("XLEN", stream)]
        added, length = await self._server.exchange(stream, packed, 2)
        if self._server.checked(length) != self.done.entries:
            self._server.checked(added)
            await self._call("import_page", self.done.entries, 0)  # says who is in the way
        self._page = _Page(self.done.entries)

    async def finish(self) -> None:
        """Reads back what the server took, and puts it in place."""
        done = self.done
        incidents = self._incidents()
        for first in range(0, len(incidents), PAGE_ENTRIES):
            page = incidents[first : first + PAGE_ENTRIES]
            await self._call("import_incidents", first + 1, *page)
        done.records_sha256 = self._records.hexdigest()
        there = await record_digest(self._server, self._importing[0])
        if there != (done.entries, done.records_sha256):
            raise errors.ServerError(
                f"tenant {done.tenant}: the server does not give back what it was given",
                hint="nothing was put in place; see the server's log",
            )
        # Before its record appears, as with a first append: no crash can hide a tenant.
        await self._server.command(keys.TENANTS, "SADD", keys.TENANTS, done.tenant)
        head = (done.epoch, done.entry_id, done.seq)
        await self._call("import_finish", *head, done.entries, done.own, len(incidents))

    def _incidents(self) -> list[bytes]:
        pairs = zip(self._reader.raw_incidents, self._reader.incidents, strict=True)
        if self.done.entry_id == self._reader.head.entry_id:
            return [raw for raw, _ in pairs]
        kept = []
        for raw, incident in pairs:
            short = _incident_until(incident, self.done)
            if short is not None:
                kept.append(raw if short == incident else orjson.dumps(asdict(short)))
        return kept

    async def discard(self) -> None:
        """Deletes what was imported so far; where that fails, the next import does it."""
        try:
            await self._call("import_discard")
        except errors.LedgerError as error:
            tenant, why = self.done.tenant, error.message
            _log.warning("tenant %s: parts of an import are left: %s", tenant, why)


def _incident_until(incident: Incident, done: Imported) -> Incident | None:
    """What of an incident concerns a record that was cut; None for nothing."""
    end = split_id(done.entry_id)
    if split_id(incident.last_id) <= end:
        return incident
    if incident.kind == "recreated":
        raise errors.EntriesMissing(
            f"tenant {done.tenant}: what was recorded up to {incident.last_id} was deleted when "
            "the stream was made again, so the state of that time cannot be told",
            hint="restore an older backup, or to a later time",
            tenant=done.tenant,
        )
    if incident.kind == "foreign" and split_id(incident.first_id) <= end:
        return replace(incident, last_id=done.entry_id, count=done.seq - incident.seq + 1)
    return None
