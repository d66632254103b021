"""Rebuilding what the append function keeps about a stream, from the stream itself."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from redis import exceptions as redis_errors

from ledger import errors, keys
from ledger.server import LIBRARY_VERSION, Server, pack
from ledger.stream import PAGE_ENTRIES, Incident, Walk, blocked, split_id

__all__ = ["notice", "reindex"]

_ATTEMPTS: Final = 5
_OWN_FIELDS: Final = [b"type", b"id", b"data"]
_log = logging.getLogger("ledger")


async def reindex(
    server: Server, tenant: str, on_progress: Callable[[int], None] | None = None
) -> int:
    """Rebuilds the idempotency index, and `governance:head` where it is gone; the entries covered.

    Appends that meet the gap are refused meanwhile; on a whole index they go on, and the rebuilt
    one is put in place only if it covers the tail at that moment. A rebuilt head has a new epoch.

    Raises:
        NotFound: the tenant has neither stream nor head nor index.
        StreamBlocked: a foreign id lies so far ahead that nothing can follow it.
        IndexBehind: appends kept moving the tail; try when there are fewer.
    """
    keys.checked_tenant(tenant)
    stream, rebuilt = keys.decisions(tenant), keys.index_rebuild(tenant)
    on = (stream, keys.head(tenant), keys.index(tenant))
    if not await server.command(stream, "EXISTS", *on):
        raise errors.NotFound.nothing_of(tenant)
    for _ in range(_ATTEMPTS):
        await server.command(rebuilt, "UNLINK", rebuilt)
        try:
            await notice(server, tenant, on)
            found = await _rebuild(server, tenant, on_progress)
            await server.function(
                "govledger_finish_reindex", (*on, rebuilt), secrets.token_hex(8), *found.facts()
            )
        except errors.ServerError as error:
            if "LEDGERMOVED" not in error.message and "LEDGERBEHIND" not in error.message:
                raise
            continue
        finally:
            await server.command(rebuilt, "UNLINK", rebuilt)
        return found.own
    raise errors.IndexBehind(
        f"tenant {tenant}: entries kept coming while the index was rebuilt {_ATTEMPTS} times",
        hint="try again when fewer are appended",
        tenant=tenant,
    )


async def notice(server: Server, tenant: str, on: tuple[str, ...]) -> None:
    """Has foreign entries registered first: what is in the stream and not registered is ours."""
    packed = pack("FCALL", "govledger_notice", len(on), *on, LIBRARY_VERSION)
    while True:
        (reply,) = await server.exchange_function(on[0], [packed], 1)
        code, *facts = str(reply).split(" ") if isinstance(reply, Exception) else [""]
        if code == "LEDGERBLOCKED":
            raise blocked(tenant, facts)
        if code not in ("LEDGERFOREIGN", "LEDGERNOHEAD"):
            for raw in server.checked(reply):
                _log.warning("tenant %s: %s", tenant, Incident.parse(raw))
        if code != "LEDGERFOREIGN":  # which says that there are more than it took at once
            return


@dataclass(slots=True)
class _Found:
    """What the stream was taken to be: its tail, its last ordinal, which entries are ours."""

    tail: dict[bytes, Any]
    seq: int = 0
    own: int = 0
    runs: list[tuple[int, int, str, str]] = field(default_factory=list)
    """Foreign entries that follow each other: first ordinal, count, first id, last id."""

    def add_foreign(self, entry_id: str, *, goes_on: bool) -> None:
        self.seq += 1
        if goes_on and self.runs:
            first_seq, count, first_id, _ = self.runs[-1]
            self.runs[-1] = (first_seq, count + 1, first_id, entry_id)
        else:
            self.runs.append((self.seq, 1, entry_id, entry_id))

    def facts(self) -> list[bytes | str | int]:
        """As `finish_reindex` in functions.lua takes them."""
        counters = (self.tail[b"entries-added"], self.tail[b"length"])
        fixed = [self.tail[b"last-generated-id"], self.seq, self.own, *counters]
        return [*fixed, *(part for run in self.runs for part in run)]


async def _rebuild(
    server: Server, tenant: str, on_progress: Callable[[int], None] | None
) -> _Found:
    """Fills the rebuilt index."""
    stream, rebuilt = keys.decisions(tenant), keys.index_rebuild(tenant)
    found = _Found(await _tail(server, tenant))
    ours = await _ownership(server, tenant)
    after, was_foreign = "0-0", False
    while True:
        page = await server.command(
            stream, "XRANGE", stream, f"({after}", "+", "COUNT", PAGE_ENTRIES
        )
        if not page:
            return found
        values: list[bytes] = []
        for raw_id, fields in page:
            time_ms, id_seq = split_id(raw_id)
            if fields[::2] == _OWN_FIELDS and ours(raw_id, fields, id_seq > found.seq):
                found.seq = id_seq
                where = time_ms.to_bytes(6, "big") + id_seq.to_bytes(6, "big")
                values += [fields[3], where + hashlib.sha256(fields[5]).digest()]
                was_foreign = False
            else:
                found.add_foreign(raw_id.decode(), goes_on=was_foreign)
                was_foreign = True
        if values:
            found.own += await server.command(rebuilt, "HSET", rebuilt, *values)
        after = page[-1][0].decode()
        if on_progress:
            on_progress(len(page))


async def _ownership(server: Server, tenant: str) -> Callable[[bytes, list[bytes], bool], bool]:
    """Tells our entries from foreign ones: by the registered incidents, or, where the head that
    has them is gone, by whether the id carries a later ordinal and the data is such an event.
    """
    walk = Walk(server, tenant)
    try:
        await walk.start_after(0)
    except errors.IndexBehind:
        return lambda _, fields, later: later and _is_event(fields)
    return lambda raw_id, _, __: not walk.is_foreign(raw_id)


def _is_event(fields: list[bytes]) -> bool:
    try:
        event = orjson.loads(fields[5])
        named = [event["type"].encode(), event["id"].encode()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return named == fields[1:4:2]


async def _tail(server: Server, tenant: str) -> dict[bytes, Any]:
    stream = keys.decisions(tenant)
    (reply,) = await server.exchange(stream, [pack("XINFO", "STREAM", stream)], 1)
    if isinstance(reply, redis_errors.ResponseError) and "no such key" in str(reply):
        return {b"last-generated-id": b"0-0", b"entries-added": 0, b"length": 0}
    return dict(server.checked(reply))
