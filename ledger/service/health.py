"""The probe: can decisions be recorded now?"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ledger import errors
from ledger.server import Server
from ledger.service.inspection import info, number
from ledger.settings import Settings

__all__ = ["probe"]


async def probe(settings: Settings, timeout_s: float) -> dict[str, Any]:
    """Whether every primary answers, has its data, takes writes, and evicts nothing of ours:
    `healthy`, `reason`, `milliseconds`. It makes one attempt and writes nothing.

    Raises:
        InvalidSetting: the URL cannot be used.
    """
    begun = time.perf_counter()
    once = settings.model_copy(update={"memory_max_reconnect_attempts": 0})
    reason = ""
    try:
        async with asyncio.timeout(timeout_s), await Server.open(once) as server:
            for key in server.primary_keys():
                reason = reason or await _trouble(server, key)
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except (errors.Unavailable, errors.ServerError) as error:
        reason = str(error)
    taken_ms = round((time.perf_counter() - begun) * 1000, 1)
    told = reason or "decisions can be recorded"
    return {"healthy": not reason, "reason": told, "milliseconds": taken_ms}


async def _trouble(server: Server, key: str) -> str:
    """Why this node takes no appends; "" where it does, as far as this user may see."""
    await server.command(key, "PING")  # an error reply too, where writes are refused for MISCONF
    try:
        seen = await info(server, key, "replication", "persistence", "memory")
    except errors.PermissionDenied:
        return ""
    if seen.get("role", "master") != "master":
        return "it is a replica and takes no writes"
    if seen.get("loading", "0") != "0":
        return "it is still loading its data"
    if seen.get("aof_last_write_status", "ok") != "ok":
        return "the append-only file cannot be written"
    return _no_room(server, seen)


def _no_room(server: Server, seen: dict[str, str]) -> str:
    limit, used = number(seen, "maxmemory"), number(seen, "used_memory")
    policy = seen.get("maxmemory_policy", "")
    if policy.startswith("allkeys-") and not server.settings.govledger_allow_eviction:
        return f"maxmemory-policy is {policy}: appends refuse"
    full = limit and used >= limit and policy == "noeviction"
    return "maxmemory is reached" if full else ""
