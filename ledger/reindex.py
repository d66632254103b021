"""Rebuilding what the append function keeps about a stream, from the stream itself."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

from redis import exceptions as redis_errors

from ledger import errors, keys
from ledger.replies import translate
from ledger.server import Server, pack
from ledger.stream import PAGE_ENTRIES, Walk, split_id

__all__ = ["reindex"]

_ATTEMPTS = 5


async def reindex(
    server: Server, tenant: str, on_progress: Callable[[int], None] | None = None
) -> int:
    """Rebuilds the idempotency index, and `governance:head` where it is gone; the entries covered.

    Appends that meet the gap are refused meanwhile; on a whole index they go on, and the rebuilt
    one is put in place only if it covers the tail at that moment. A rebuilt head has a new epoch.

    Raises:
        NotFound: the tenant has no stream.
        IndexBehind: appends kept moving the tail; try when there are fewer.
    """
    keys.checked_tenant(tenant)
    stream, rebuilt = keys.decisions(tenant), keys.index_rebuild(tenant)
    on = (stream, keys.head(tenant), keys.index(tenant), rebuilt)
    for _ in range(_ATTEMPTS):
        await server.command(rebuilt, "UNLINK", rebuilt)
        try:
            tail, seq, own = await _rebuild(server, tenant, on_progress)
            epoch = secrets.token_hex(8)
            counters = (tail[b"entries-added"], tail[b"length"])
            last_id = tail[b"last-generated-id"]
            await server.function(
                "govledger_finish_reindex", on, epoch, last_id, seq, own, *counters
            )
        except errors.ServerError as error:
            if "LEDGERMOVED" not in error.message and "LEDGERBEHIND" not in error.message:
                raise
            continue
        finally:
            await server.command(rebuilt, "UNLINK", rebuilt)
        return own
    raise errors.IndexBehind(
        f"tenant {tenant}: entries kept coming while the index was rebuilt {_ATTEMPTS} times",
        hint="try again when fewer are appended",
        tenant=tenant,
    )


async def _rebuild(
    server: Server, tenant: str, on_progress: Callable[[int], None] | None
) -> tuple[dict[bytes, Any], int, int]:
    """Fills the rebuilt index; the stream's tail, the last ordinal, and how many are ours."""
    stream, rebuilt = keys.decisions(tenant), keys.index_rebuild(tenant)
    tail = await _tail(server, tenant)
    ours = await _ownership(server, tenant)
    after, seq, own = "0-0", 0, 0
    while True:
        page = await server.command(
            stream, "XRANGE", stream, f"({after}", "+", "COUNT", PAGE_ENTRIES
        )
        if not page:
            break
        values: list[bytes] = []
        for raw_id, fields in page:
            time_ms, id_seq = split_id(raw_id)
            if ours(raw_id, id_seq, seq) and len(fields) == 6:
                seq = id_seq
                digest = hashlib.sha256(fields[5]).digest()
                where = time_ms.to_bytes(6, "big") + seq.to_bytes(6, "big")
                values += [fields[3], where + digest]
                own += 1
            else:
                seq += 1
        if values:
            await server.command(rebuilt, "HSET", rebuilt, *values)
        after = page[-1][0].decode()
        if on_progress:
            on_progress(len(page))
    return tail, seq, own


async def _ownership(server: Server, tenant: str) -> Callable[[bytes, int, int], bool]:
    """Tells our entries from foreign ones: by the registered incidents, or, where the head that
    has them is gone, by whether the id carries the next ordinal.
    """
    walk = Walk(server, tenant)
    try:
        await walk.start_after(0)
    except errors.IndexBehind:
        return lambda _, id_seq, seq: id_seq > seq
    last = split_id(walk.head.entry_id)
    return lambda raw_id, _, __: not walk.is_foreign(raw_id) and split_id(raw_id) <= last


async def _tail(server: Server, tenant: str) -> dict[bytes, Any]:
    stream = keys.decisions(tenant)
    (reply,) = await server.exchange(stream, [pack("XINFO", "STREAM", stream)], 1)
    if isinstance(reply, redis_errors.ResponseError) and "no such key" in str(reply):
        raise errors.NotFound(f"tenant {tenant}: there is no stream {stream}", tenant=tenant)
    if isinstance(reply, Exception):
        raise translate(reply, server.address)
    return dict(reply)
