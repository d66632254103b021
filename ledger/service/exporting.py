"""One tenant's record out of a server into a file: what lay in its stream at one head, foreign
entries and holes included.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import BinaryIO, Final, NamedTuple

from ledger import errors, keys
from ledger.reindex import notice
from ledger.server import Server
from ledger.service.portable import ExportHead, ExportWriter, encode_entry, entry_record
from ledger.stream import Head, parse_head, read_head
from ledger.wording import counted

__all__ = [
    "Exported",
    "Fields",
    "Progress",
    "StreamHead",
    "entry_pages",
    "export_tenant",
    "readable_head",
    "record_digest",
    "stream_head",
]

FIRST_PAGE_ENTRIES: Final = 64
PAGE_ENTRIES: Final = 1000
PAGE_BYTES: Final = 8 << 20
"""A page that is larger halves the next one: foreign entries have no limit."""

_CANNOT_REGISTER: Final = (
    errors.StreamBlocked,
    errors.PermissionDenied,
    errors.ReadOnlyReplica,
    errors.FunctionMissing,
)
_log = logging.getLogger("ledger")

Progress = Callable[[int], None]
Fields = list[bytes]


class StreamHead(NamedTuple):
    """A head with what the append function counted: entries that lie in the stream up to it."""

    head: Head
    length: int
    incidents: list[bytes]


class Exported(NamedTuple):
    """What an export wrote; SHA-256 of the whole file, and of its entries alone."""

    head: ExportHead
    sha256: str
    records_sha256: str


# -- reading a stream ---------------------------------------------------------------------------


async def readable_head(server: Server, tenant: str) -> Head:
    """The tenant's head, seq 0 where nothing is recorded.

    Raises:
        IndexBehind: it, or the stream, was damaged by other hands.
    """
    stream = keys.decisions(tenant)
    try:
        head = await read_head(server, tenant)
        await server.command(stream, "XLEN", stream)
    except errors.ServerError as error:
        if "WRONGTYPE" not in error.message:
            raise
        raise errors.IndexBehind(
            f"tenant {tenant}: somebody put something else in the place of its stream or head",
            hint=f"find who did; `TYPE {stream}` and `TYPE {keys.head(tenant)}` say what is there",
            tenant=tenant,
        ) from error
    return head


async def stream_head(server: Server, tenant: str) -> StreamHead:
    """The tenant's head, with foreign entries registered first where that is allowed.

    Raises:
        NotFound: nothing is recorded.
        IndexBehind: the function's own record of the stream is gone or damaged.
    """
    keys.checked_tenant(tenant)
    head = await readable_head(server, tenant)
    if not head.epoch:
        raise errors.NotFound.nothing_of(tenant)
    on = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    try:
        await notice(server, tenant, on)
    except _CANNOT_REGISTER as error:
        _log.warning(
            "tenant %s: what lies behind its last own entry is left out: %s", tenant, error
        )
    return await _read_stream_head(server, tenant)


async def _read_stream_head(server: Server, tenant: str) -> StreamHead:
    key = keys.head(tenant)
    epoch, seq, entry_id, incidents, length = await server.command(
        key, "HMGET", key, "epoch", "seq", "id", "incidents", "length"
    )
    head = parse_head(tenant, [epoch, seq, entry_id, incidents])
    raw: list[bytes] = []
    for first in range(1, head.incidents + 1, PAGE_ENTRIES):
        last = min(first + PAGE_ENTRIES - 1, head.incidents)
        names = [f"incident:{n}" for n in range(first, last + 1)]
        raw += [one or b"" for one in await server.command(key, "HMGET", key, *names)]
    return StreamHead(head, int(length or 0), raw)


async def entry_pages(
    server: Server, stream: str, last_id: str = "+"
) -> AsyncGenerator[list[tuple[bytes, Fields]], None]:
    """What lies in a stream up to `last_id`: ids, and fields and values, as they are stored."""
    after, count = "0-0", FIRST_PAGE_ENTRIES
    while True:
        page = await server.command(stream, "XRANGE", stream, f"({after}", last_id, "COUNT", count)
        if not page:
            return
        yield [(entry_id, fields) for entry_id, fields in page]
        after = page[-1][0].decode()
        size = sum(len(part) for _, fields in page for part in fields)
        count = max(1, count // 2) if size > PAGE_BYTES else min(PAGE_ENTRIES, count * 2)


async def record_digest(server: Server, stream: str, last_id: str = "+") -> tuple[int, str]:
    """How many entries lie in a stream up to `last_id`, and the SHA-256 over them as an export has
    them.
    """
    sha256, count = hashlib.sha256(), 0
    async with aclosing(entry_pages(server, stream, last_id)) as pages:
        async for page in pages:
            sha256.update(b"".join(encode_entry(*entry) for entry in page))
            count += len(page)
    return count, sha256.hexdigest()


def _check_count(found: StreamHead, count: int) -> None:
    if count != found.length:
        raise errors.EntriesMissing(
            f"tenant {found.head.tenant}: {counted(count, 'entry')} found in the stream up "
            f"to {found.head.entry_id}, {found.length} were counted there",
            hint="somebody deletes or writes entries meanwhile: find out who, and try again",
            tenant=found.head.tenant,
        )


async def export_tenant(
    server: Server, tenant: str, file: BinaryIO, on_progress: Progress | None = None
) -> Exported:
    """Writes a tenant's record, up to its head of now, to an open file.

    Raises:
        NotFound, IndexBehind: as `stream_head`.
        EntriesMissing: entries went while they were read.
        InvalidBackup: a foreign entry is too large for a file.
    """
    seconds, micros = await server.command(keys.decisions(tenant), "TIME")
    found = await stream_head(server, tenant)
    head = ExportHead(
        tenant=tenant,
        epoch=found.head.epoch,
        seq=found.head.seq,
        entry_id=found.head.entry_id,
        length=found.length,
        incidents=len(found.incidents),
        exported_at_ms=int(seconds) * 1000 + int(micros) // 1000,
    )
    writer, records, count = ExportWriter(file), hashlib.sha256(), 0
    writer.head(head, found.incidents)
    async with aclosing(entry_pages(server, keys.decisions(tenant), head.entry_id)) as pages:
        async for page in pages:
            raw = b"".join(entry_record(*entry) for entry in page)
            records.update(raw)
            writer.raw(raw)
            count += len(page)
            if on_progress:
                on_progress(len(page))
    _check_count(found, count)
    return Exported(head, writer.end(), records.hexdigest())
