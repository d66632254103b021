"""How far each projection of each tenant has come, who folds it, and what it could not fold."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import pack
from ledger.stream import Head, Position, head_command, parse_head, split_id
from projections.projection import Projection
from projections.store import FoldStore, Standing

__all__ = ["Status", "statuses"]

TENANTS_A_CALL: Final = 200


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
            after = status.position.entry_id if status.position else "0-0"
            stream = keys.decisions(store.tenant)
            first = pack("XRANGE", stream, f"({after}", "+", "COUNT", 1)
            behind.append((len(found) - 1, stream, first))
    firsts = await server.exchange_each([(stream, first) for _, stream, first in behind])
    for (at, _, _), reply in zip(behind, firsts, strict=True):
        found[at] = _with_lag(found[at], server.checked(reply))
    return found


def _status(store: FoldStore, head_reply: Any, replies: Sequence[Any]) -> Status:
    standing, (raw, stopped), holder, quarantined = replies
    position = Position.parse(raw.decode()) if raw else None
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
        lag_entries=max(0, head.seq - (position.seq if position else 0)),
        lag_seconds=0.0,
        worker=holder.decode(errors="replace") if holder else None,
        quarantined=sum(field.startswith(prefix) for field in quarantined),
        stopped=stopped.decode() if stopped else None,
    )


def _with_lag(status: Status, first: Sequence[Any]) -> Status:
    if not first:
        return status
    recorded_ms = split_id(first[0][0])[0]
    lag_s = round(max(0.0, time.time() - recorded_ms / 1000), 3)
    return replace(status, lag_seconds=lag_s)
