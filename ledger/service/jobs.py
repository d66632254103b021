"""The jobs: each is one async function that does its work once and says what it did.

What a job returns is kept in its history. `skipped` in it says why there was nothing to do; what it
raises makes the run a failed one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import Server
from ledger.service.cleanup import Cleanup
from ledger.service.expiry import Expiry
from ledger.service.inspection import Standing, info, number, ping_ms, server_now_ms, standings
from ledger.service.snapshot import (
    POLL_MAX_S,
    SNAPSHOT_TIMEOUT_S,
    Retention,
    archive_owner,
    archive_snapshot,
    take_snapshot,
)
from ledger.settings import JobName
from ledger.wording import counted
from projections import Projector

__all__ = ["JOBS", "Archive", "JobContext", "is_due_for_refresh", "sample_of"]

AOF_MIN_BYTES: Final = 64 * 1024 * 1024
AOF_GROWTH: Final = 2.0
"""Rewritten when it is this many times what the last rewrite left, and not small: the servers' own
defaults for `auto-aof-rewrite-percentage` and `-min-size`."""

SAMPLES_KEPT: Final = 1440
PINGS_A_SAMPLE: Final = 20
FOLD_GRACE_MS: Final = 60_000
"""What was recorded less than this ago a live projector may still be at."""


@dataclass(frozen=True, slots=True)
class Archive:
    """Where the snapshot job copies dumps to, and which of them stay."""

    directory: Path
    retention: Retention = field(default_factory=Retention)


@dataclass(slots=True)
class JobContext:
    """What the jobs work with; `expiry` remembers idle tenants between runs."""

    ledger: Ledger
    archive: Archive | None = None
    expiry: Expiry = field(init=False)

    def __post_init__(self) -> None:
        self.expiry = Expiry(self.ledger)


_log = logging.getLogger("ledger")

Job = Callable[[JobContext], Awaitable[dict[str, Any]]]


async def expire(context: JobContext) -> dict[str, Any]:
    """Closes escalations past their deadline, which counts as deny."""
    return await context.expiry.run()


async def cleanup(context: JobContext) -> dict[str, Any]:
    """Deletes what may go."""
    ttl_seconds = context.ledger.server.settings.memory_default_ttl_seconds
    return await Cleanup(context.ledger, ttl_seconds).run()


# -- snapshot and append-only file ----------------------------------------------------------------


async def snapshot(context: JobContext) -> dict[str, Any]:
    """Saves every primary to its disk, and copies the dumps out where an archive is given: then a
    save of somebody else's is waited for, since its dump may not have what was just recorded.
    """
    server, archive = context.ledger.server, context.archive
    at_ms = await server_now_ms(server)
    owner = await archive_owner(server) if archive else ""
    nodes = []
    for key in server.primary_keys():
        taken = await take_snapshot(server, key, wait_out=archive is not None)
        if taken is None:
            nodes.append({"skipped": "a save is under way there already"})
            continue
        told: dict[str, Any] = {"run_id": taken.run_id, "seconds": round(taken.seconds, 3)}
        if archive is not None:
            kept = await archive_snapshot(
                taken, archive.directory, archive.retention, owner=owner, at_ms=at_ms
            )
            told |= {"file": str(kept.path), "bytes": kept.size_bytes, "sha256": kept.sha256}
        nodes.append(told)
    return nodes[0] if len(nodes) == 1 else {"nodes": nodes}


async def aof_rewrite(context: JobContext) -> dict[str, Any]:
    """Rewrites the append-only file of every primary where it has grown."""
    server = context.ledger.server
    nodes = [await _rewrite(server, key) for key in server.primary_keys()]
    return nodes[0] if len(nodes) == 1 else {"nodes": nodes}


async def _rewrite(server: Server, key: str) -> dict[str, Any]:
    before = await info(server, key, "server", "persistence")
    size, base = number(before, "aof_current_size"), number(before, "aof_base_size")
    if before.get("aof_enabled") != "1":
        return {"skipped": "the server keeps no append-only file"}
    if before["aof_rewrite_in_progress"] != "0" or before["aof_rewrite_scheduled"] != "0":
        return {"skipped": "a rewrite is under way there already"}
    if before["rdb_bgsave_in_progress"] != "0":
        return {"skipped": "a snapshot is under way there"}
    if size < AOF_MIN_BYTES or size < AOF_GROWTH * base:
        return {"skipped": "it has not grown enough", "bytes": size, "base_bytes": base}
    begun = time.monotonic()
    await server.command(key, "BGREWRITEAOF")
    while True:
        now = await info(server, key, "server", "persistence")
        if now["run_id"] != before["run_id"] or time.monotonic() - begun > SNAPSHOT_TIMEOUT_S:
            raise errors.JobFailed(
                f"{server.address}: the append-only file was not rewritten: the server restarted, "
                f"or took more than {SNAPSHOT_TIMEOUT_S:g} s",
                hint="see its log; the old file stays valid",
            )
        if now["aof_rewrite_in_progress"] == now["aof_rewrite_scheduled"] == "0":
            break
        await asyncio.sleep(POLL_MAX_S)
    if now["aof_last_bgrewrite_status"] != "ok":
        raise errors.JobFailed(
            f"{server.address}: the append-only file was not rewritten",
            hint="its log says why (disk, memory for fork); the old file stays valid",
        )
    after = number(now, "aof_current_size")
    return {"bytes_before": size, "bytes": after, "seconds": round(time.monotonic() - begun, 3)}


# -- state and health -----------------------------------------------------------------------------


async def refresh(context: JobContext) -> dict[str, Any]:
    """Folds and publishes what no live projector keeps: copies gone, ageing, or long behind."""
    ledger = context.ledger
    ttl_seconds, now_ms = (
        ledger.server.settings.memory_default_ttl_seconds,
        await server_now_ms(ledger.server),
    )
    found = await standings(ledger)
    due = sorted({one.tenant for one in found if is_due_for_refresh(one, ttl_seconds, now_ms)})
    if not due:
        return {"refreshed": 0, "tenants": len(found)}
    folded, failed = 0, dict[str, str]()
    projector = Projector(ledger)
    for tenant in due:
        try:
            folded += sum((await projector.run_once([tenant])).values())
        except errors.CommitConflict:
            continue  # a projector is at it
        except errors.Unavailable:
            raise
        except errors.LedgerError as error:
            failed[tenant] = str(error)
        except Exception as error:  # noqa: BLE001 - logged; it must not stop the other tenants
            _log.exception("tenant %s: a defect in a fold", tenant)
            failed[tenant] = repr(error)
    if failed:
        tenant, first = next(iter(failed.items()))
        raise errors.JobFailed(
            f"not folded: {len(failed)} of {counted(len(due), 'tenant')}; the first is {tenant}: "
            f"{first}",
            hint="`govledger doctor` lists them",
        )
    return {"refreshed": len(due), "folded": folded, "tenants": len({one.tenant for one in found})}


def is_due_for_refresh(one: Standing, ttl_seconds: int, now_ms: int) -> bool:
    """Whether nobody seems to keep the published copy: gone, past half of its life, or behind."""
    if one.head is None or not one.head.seq:
        return False
    if one.ttl_seconds == -2 or 0 <= one.ttl_seconds < ttl_seconds // 2:
        return True
    recorded_ms = int(one.head.entry_id.partition("-")[0])
    behind = one.behind > 0 or one.published_seq != one.head.seq
    return behind and recorded_ms < now_ms - FOLD_GRACE_MS


async def health(context: JobContext) -> dict[str, Any]:
    """Keeps a sample of what the servers say of themselves; the doctor compares with it."""
    server = context.ledger.server
    samples = [await sample_of(server, key) for key in server.primary_keys()]
    for sample in samples:
        flat = [part for pair in sample.items() for part in pair]
        await server.command(
            keys.HEALTH_SAMPLES, "XADD", keys.HEALTH_SAMPLES, "MAXLEN", SAMPLES_KEPT, "*", *flat
        )
    return samples[0] if len(samples) == 1 else {"nodes": samples}


async def sample_of(server: Server, key: str) -> dict[str, Any]:
    """A node's key metrics, as the operations guide lists them, and the round trip from here."""
    seen = await info(server, key, "server", "memory", "clients", "stats", "persistence")
    round_trips = await ping_ms(server, key, PINGS_A_SAMPLE)
    return {
        "run_id": seen["run_id"],
        "used_memory": number(seen, "used_memory"),
        "maxmemory": number(seen, "maxmemory"),
        "connected_clients": number(seen, "connected_clients"),
        "keys": int(await server.command(key, "DBSIZE")),
        "ops_per_second": number(seen, "instantaneous_ops_per_sec"),
        "evicted_keys": number(seen, "evicted_keys"),
        "ping_us": round(round_trips[len(round_trips) // 2] * 1000),
    }


JOBS: Final[dict[JobName, Job]] = {
    "expire": expire,
    "snapshot": snapshot,
    "cleanup": cleanup,
    "aof-rewrite": aof_rewrite,
    "refresh": refresh,
    "health": health,
}
