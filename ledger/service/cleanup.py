"""What may go: rubbish in the memory store, fold state of retired versions, what killed processes
left. Never the record.

Every key passes `keys.is_disposable` right before UNLINK, so no pattern, tenant or projection of
whatever name can lead to a stream, an index, a head, or evidence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Final

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import Server
from ledger.service.inspection import server_now_ms
from projections.registry import configured
from projections.snapshots import key_of, list_key, parse_list
from projections.store import BUCKETS, REBUILD

__all__ = ["IMPORT_LIMIT_S", "LEASE_LIMIT_MS", "Cleanup", "idle_s"]

UNLINK_AT_ONCE: Final = 500
RUNNING_LIMIT_MS: Final = 2 * 86_400_000
"""What is said to run for longer was left by a process that was killed."""
IMPORT_LIMIT_S: Final = 3_600
"""An import that nobody has gone on with for so long was killed."""
LEASE_LIMIT_MS: Final = 60_000
"""Longer than any worker's lease (`projections.lease.LEASE_MS`)."""

_ENVELOPE_TAIL_BYTES: Final = 600
_OURS: Final = re.compile(
    rb'"metadata":\{"epoch":"[0-9a-f]+","position":"[^"]*","seq":\d+,[^{}]*\}\}$'
)


class Cleanup:
    """One cleanup; the counts by rule are in what `run` returns."""

    def __init__(self, ledger: Ledger, ttl_seconds: int) -> None:
        """`ttl_seconds`: what published state should have (MEMORY_DEFAULT_TTL_SECONDS)."""
        self._ledger = ledger
        self._server = ledger.server
        self._ttl_seconds = ttl_seconds
        self._projections = configured(ledger.server.settings)

    async def run(self) -> dict[str, Any]:
        """How many keys were deleted, or got the TTL they should have, by rule."""
        tenants = set(await self._ledger.tenants())
        found: dict[str, Any] = {"stale": await self._stale()}
        found |= await self._published(tenants)
        found["retired_folds"] = 0
        for tenant in sorted(tenants):
            found["retired_folds"] += await self._retired(tenant)
        found["unfinished_imports"] = await self._unfinished_imports()
        found["leases_given_a_ttl"] = await self._lasting_leases()
        found["forgotten_runs"] = await self._forgotten_runs()
        return found

    async def _stale(self) -> int:
        count = 0
        async with aclosing(self._server.scan(f"{keys.MEMORY_STALE}*")) as pages:
            async for page in pages:
                count += await unlink(self._server, page)
        return count

    # -- published state --------------------------------------------------------------------------

    async def _published(self, tenants: set[str]) -> dict[str, int]:
        """Copies of ours that nobody will renew: of tenants without a ledger, deleted; without the
        TTL that the rule gives them, given it.
        """
        orphaned, expiring = 0, 0
        for name in sorted({one.name for one in self._projections} | {"agent"}):
            suffix = "agent:*" if name == "agent" else f"{name}:state"
            async with aclosing(self._server.scan(f"{keys.MEMORY}:*:{suffix}")) as pages:
                async for page in pages:
                    ours = await self._ours(page)
                    known = {key: _tenant_of(key) for key in ours}
                    lost = [key for key, tenant in known.items() if tenant not in tenants]
                    gone = [key for key in lost if not await self._has_ledger(known[key])]
                    orphaned += await unlink(self._server, gone)
                    expiring += await self._expire([key for key in ours if key not in gone])
        return {"orphaned": orphaned, "given_a_ttl": expiring}

    async def _ours(self, some: Sequence[bytes]) -> list[bytes]:
        """Those that a projector has published: anybody may keep other values under such names."""
        replies = await self._server.on_each(some, "GETRANGE", then=(-_ENVELOPE_TAIL_BYTES, -1))
        return [
            key
            for key, reply in zip(some, replies, strict=True)
            if isinstance(reply, bytes) and _OURS.search(reply)
        ]

    async def _has_ledger(self, tenant: str) -> bool:
        """In doubt it has: a registry that was lost is no reason to delete what is derived."""
        if not keys.is_tenant(tenant):
            return False
        stream = keys.decisions(tenant)
        there = (stream, keys.head(tenant), keys.index(tenant))
        return bool(await self._server.command(stream, "EXISTS", *there))

    async def _expire(self, some: Sequence[bytes]) -> int:
        if not self._ttl_seconds:
            return 0
        replies = await self._server.on_each(some, "EXPIRE", then=(self._ttl_seconds, "NX"))
        return sum(int(self._server.checked(reply)) for reply in replies)

    # -- fold state -------------------------------------------------------------------------------

    async def _retired(self, tenant: str) -> int:
        """Folds of versions below the one that readers take and below what this release folds, with
        their snapshots, and what they could not fold. Nobody folds them any further.
        """
        active = await self._server.command(
            keys.projection_active(tenant), "HGETALL", keys.projection_active(tenant)
        )
        count = 0
        for one in self._projections:
            kept = _version(active.get(one.name.encode()))
            if kept is None:
                continue
            for version in range(1, min(kept, one.version)):
                count += await self._discard(tenant, one.name, version)
        return count

    async def _discard(self, tenant: str, name: str, version: int) -> int:
        count, live = 0, keys.projection(tenant, name, version)
        for rebuild in (False, True):
            fold = f"{live}:{REBUILD}" if rebuild else live
            listed = list_key(tenant, name, version, rebuild=rebuild)
            if not await self._server.command(fold, "EXISTS", fold, listed):
                continue
            kept = parse_list(await self._server.command(listed, "HGETALL", listed))
            parts = [f"{fold}:{bucket}" for bucket in range(BUCKETS)]
            parts += [key_of(listed, one.seq) for one in kept]
            # Those that lead to the others last: after a kill here the next cleanup finds them.
            some = [*parts, fold, listed]
            count += await unlink(self._server, [one.encode() for one in some])
        if count:
            await self._forget_quarantined(tenant, f"{name}@{version}:".encode())
        return count

    async def _forget_quarantined(self, tenant: str, prefix: bytes) -> None:
        key = keys.projection_quarantine(tenant)
        fields = await self._server.command(key, "HKEYS", key)
        gone = [field for field in fields if field.startswith(prefix)]
        for start in range(0, len(gone), UNLINK_AT_ONCE):
            await self._server.command(key, "HDEL", key, *gone[start : start + UNLINK_AT_ONCE])

    # -- what killed processes leave --------------------------------------------------------------

    async def _unfinished_imports(self) -> int:
        """Imports that nobody has gone on with for an hour: their parts, of all three keys or none.
        One that is only asleep is refused when it goes on, since its token is gone.
        """
        tenants = set[str]()
        async with aclosing(self._server.scan(keys.RECORDS)) as pages:
            async for page in pages:
                tenants.update(filter(None, map(keys.tenant_of_import, page)))
        count = 0
        for tenant in sorted(tenants):
            parts = [key.encode() for key in keys.importing(tenant)]
            if await idle_s(self._server, parts) >= IMPORT_LIMIT_S:
                count += await unlink(self._server, parts)
        return count

    async def _lasting_leases(self) -> int:
        """Leases that would outlive any worker's: nobody heeds them, and now they go by themselves,
        as no lease is ever deleted here: its worker may live.
        """
        count = 0
        async with aclosing(self._server.scan(keys.LEASES)) as pages:
            async for page in pages:
                some = [key for key in page if keys.is_lease(key)]
                replies = await self._server.on_each(some, "PEXPIRE", then=(LEASE_LIMIT_MS, "LT"))
                count += sum(int(self._server.checked(reply)) for reply in replies)
        return count

    async def _forgotten_runs(self) -> int:
        """Job runs whose process was killed before it could say how they ended: failed ones."""
        from ledger.service.runs import record_lost  # it runs us

        oldest_ms = await server_now_ms(self._server) - RUNNING_LIMIT_MS
        return await record_lost(self._server, oldest_ms)


async def idle_s(server: Server, some: Sequence[bytes]) -> int:
    """For how many seconds nobody has touched any of the keys; 0 where the server keeps no such
    time (an LFU policy), and where none is there.
    """
    replies = await server.on_each(some, "OBJECT", "IDLETIME")
    if any(isinstance(reply, Exception) and "LFU" in str(reply) for reply in replies):
        return 0
    found = map(server.checked, replies)
    return min((int(seconds) for seconds in found if seconds is not None), default=0)


async def unlink(server: Server, some: Sequence[bytes]) -> int:
    """Deletes keys that a cleanup may delete; how many were there.

    Raises:
        JobFailed: one of them is not to be deleted; then none of them was.
    """
    refused = [key for key in some if not keys.is_disposable(key)]
    if refused:
        raise errors.JobFailed(
            f"cleanup: {refused[0]!a} is no key that a cleanup may delete",
            hint="this is a defect in govledger; nothing of this batch was deleted",
        )
    count = 0
    for start in range(0, len(some), UNLINK_AT_ONCE):
        replies = await server.on_each(some[start : start + UNLINK_AT_ONCE], "UNLINK")
        count += sum(int(server.checked(reply)) for reply in replies)
    return count


def _tenant_of(key: bytes) -> str:
    """The tenant in the name of a published key; "" for what is none."""
    tenant = (
        key.removeprefix(f"{keys.MEMORY}:".encode()).partition(b":")[0].decode("ascii", "replace")
    )
    return tenant if keys.is_tenant(tenant) else ""


def _version(raw: bytes | None) -> int | None:
    return int(raw) if raw is not None and raw.isdigit() else None
