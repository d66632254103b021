"""One look at servers, tenants and jobs, as `top` and the metrics show it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ledger import keys
from ledger.ledger import Ledger
from ledger.server import Server, pack
from ledger.service.inspection import (
    Standing,
    info,
    oldest_unfolded_ms,
    server_now_ms,
    standings,
)
from ledger.service.runs import Run, counts, last_runs

__all__ = ["Observation", "TenantCounts", "observe"]

_SECTIONS = ("server", "memory", "clients", "stats", "persistence", "replication")
_COUNTED = ("own", "duplicates", "conflicts", "incidents")


@dataclass(frozen=True, slots=True)
class TenantCounts:
    """What the append function has counted of a tenant, since its ledger began."""

    appends: int = 0
    duplicates: int = 0
    conflicts: int = 0
    incidents: int = 0
    quarantined: int = 0


@dataclass(slots=True)
class Observation:
    """Everything, as of `taken_at` (by this process's monotonic clock, s)."""

    address: str
    nodes: list[tuple[str, dict[str, str], int]]
    """Of each primary its name, what INFO says, and how many keys it has."""
    tenants: dict[str, TenantCounts]
    standings: list[Standing]
    oldest_unfolded_ms: int | None
    """When the oldest entry was recorded that is not folded yet."""
    now_ms: int
    job_counts: dict[tuple[str, str], int]
    last_runs: dict[str, Run]
    taken_at: float = field(default_factory=time.monotonic)

    @property
    def lag_seconds(self) -> float:
        """How long the oldest entry that is not folded has waited; 0 where all is folded."""
        if self.oldest_unfolded_ms is None:
            return 0.0
        return max(0.0, (self.now_ms - self.oldest_unfolded_ms) / 1000)


async def observe(ledger: Ledger) -> Observation:
    """Looks at everything once; some round trips, and a few commands a tenant.

    Raises:
        Unavailable: the server cannot be asked, or this user may not ask.
    """
    server = ledger.server
    names = await ledger.tenants()
    found = await standings(ledger, names)
    return Observation(
        address=server.address,
        nodes=[await _node(server, key) for key in server.primary_keys()],
        tenants=await _counted(server, names),
        standings=found,
        oldest_unfolded_ms=await oldest_unfolded_ms(server, found),
        now_ms=await server_now_ms(server),
        job_counts=await counts(server),
        last_runs=await last_runs(server),
    )


async def _node(server: Server, key: str) -> tuple[str, dict[str, str], int]:
    seen = await info(server, key, *_SECTIONS)
    name = f"port {seen.get('tcp_port', '?')}" if server.is_cluster else ""
    return name, seen, int(await server.command(key, "DBSIZE"))


async def _counted(server: Server, names: list[str]) -> dict[str, TenantCounts]:
    asked = []
    for tenant in names:
        head, quarantine = keys.head(tenant), keys.projection_quarantine(tenant)
        asked += [(head, pack("HMGET", head, *_COUNTED)), (quarantine, pack("HLEN", quarantine))]
    replies = await server.exchange_each(asked)
    pairs = zip(names, replies[::2], replies[1::2], strict=True)
    return {tenant: _counts_of(head, quarantine) for tenant, head, quarantine in pairs}


def _counts_of(head: Any, quarantined: Any) -> TenantCounts:
    """Zero for what somebody else has put there: the doctor names it."""
    values = head if isinstance(head, list) else [None] * len(_COUNTED)
    own, duplicates, conflicts, incidents = (
        int(one) if one is not None and one.isdigit() else 0 for one in values
    )
    unread = quarantined if isinstance(quarantined, int) else 0
    return TenantCounts(own, duplicates, conflicts, incidents, unread)
