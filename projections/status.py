"""How far each projection of each tenant has come, who folds it, and what it could not fold."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from redis import exceptions as redis_errors

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import Server, pack
from ledger.stream import Head, Position, head_command, parse_head, split_id
from projections.projection import Projection
from projections.store import FoldStore, Standing

__all__ = ["Status", "committed_position", "first_recorded_ms", "statuses", "unfolded"]

TENANTS_A_CALL: Final = 200
DAMAGED: Final = b"damaged"
"""Why a fold stands whose position cannot be read: whoever folds it next begins anew."""


@dataclass(frozen=True, slots=True)
class Status:
    """One projection of one tenant.

    `lag_entries` and `lag_seconds` are what is recorded and not folded: how many, and how long ago
    the first of them was recorded. `worker` holds the lease now; nobody does on a quiet tenant.
    `stopped` names the error that keeps it from going on.
    """

    tenant: str
    projection: str
    version: int
    standing: Standing
    position: Position | None
    head_seq: int
    lag_entries: int
    lag_seconds: float
    worker: str | None
    quarantined: int
    stopped: str | None


async def statuses(
    ledger: Ledger, tenants: Sequence[str], projections: Sequence[Projection]
) -> AsyncIterator[Status]:
    """The status of each projection, tenant by tenant.

    Raises:
        Unavailable: the server cannot be asked. A tenant whose head is damaged has status stopped.
    """
    for start in range(0, len(tenants), TENANTS_A_CALL):
        for one in await _some(ledger, tenants[start : start + TENANTS_A_CALL], projections):
            yield one


async def _some(
    ledger: Ledger, tenants: Sequence[str], projections: Sequence[Projection]
) -> list[Status]:
    server = ledger.server
    stores = [FoldStore(server, tenant, one) for tenant in tenants for one in projections]
    asked = []
    for store in stores:
        asked.append((keys.head(store.tenant), head_command(store.tenant)))
        asked += store.status_commands()
    replies = iter(await server.exchange_each(asked))
    found, behind = [], []
    for store in stores:
        head, *rest = [next(replies) for _ in range(1 + len(store.status_commands()))]
        status = _status(store, server.checked(head), [server.checked(one) for one in rest])
        found.append(status)
        if status.lag_entries:
            after = status.position.entry_id if status.position else None
            if status.lag_entries == status.head_seq:  # what was folded is of another epoch
                after = None
            behind.append((len(found) - 1, store.tenant, after))
    firsts = await first_recorded_ms(server, [(tenant, after) for _, tenant, after in behind])
    for (at, _, _), recorded_ms in zip(behind, firsts, strict=True):
        if recorded_ms is not None:
            lag_s = round(max(0.0, time.time() - recorded_ms / 1000), 3)
            found[at] = replace(found[at], lag_seconds=lag_s)
    return found


async def first_recorded_ms(
    server: Server, begins: Sequence[tuple[str, str | None]]
) -> list[int | None]:
    """When each tenant's first entry behind an id, or of all, was recorded, by the ledger's clock
    in ms since 1970; None where there is none. What is no stream has no entries: whoever folds or
    appends there names it.

    Raises:
        PermissionDenied: this user may not read one of the streams.
    """
    asked = []
    for tenant, after in begins:
        stream, begin = keys.decisions(tenant), f"({after}" if after else "-"
        asked.append((stream, pack("XRANGE", stream, begin, "+", "COUNT", 1)))
    replies = await server.exchange_each(asked)
    denied = next((one for one in replies if isinstance(one, redis_errors.NoPermissionError)), None)
    server.checked(denied)
    entries = (one if isinstance(one, list) else [] for one in replies)
    return [split_id(one[0][0])[0] if one else None for one in entries]


def committed_position(raw: bytes | None) -> Position | None:
    """What a fold's hash says of its position; ValueError for what is none."""
    if raw is None:
        return None
    found = Position.parse(raw.decode())
    split_id(found.entry_id)
    return found


def unfolded(head: Head, folded: Position | None) -> int:
    """Entries that are recorded and not folded: all of them where the fold is of another epoch."""
    same = folded is not None and folded.epoch == head.epoch
    return max(0, head.seq - (folded.seq if folded and same else 0))


def _status(store: FoldStore, head_reply: Any, replies: Sequence[Any]) -> Status:
    standing, (raw, stopped), holder, quarantined = replies
    position = None
    try:
        position = committed_position(raw)
    except ValueError:
        stopped = DAMAGED
    try:
        head = parse_head(store.tenant, head_reply)
    except errors.IndexBehind as error:
        head, stopped = Head(store.tenant, "", 0, "0-0", 0), type(error).__name__.encode()
    prefix = f"{store.projection.name}@{store.projection.version}:".encode()
    return Status(
        tenant=store.tenant,
        projection=store.projection.name,
        version=store.projection.version,
        standing=store.standing_of(standing),
        position=position,
        head_seq=head.seq,
        lag_entries=unfolded(head, position),
        lag_seconds=0.0,
        worker=holder.decode(errors="replace") if holder else None,
        quarantined=sum(field.startswith(prefix) for field in quarantined),
        stopped=stopped.decode() if stopped else None,
    )
