"""The probe: can decisions be recorded now?"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final
from urllib.parse import quote, urlsplit

from redis import exceptions as redis_errors

from ledger import errors
from ledger.connect import embedded_path
from ledger.embedded import listening_at
from ledger.replies import function_missing, library_is_old, translate
from ledger.server import LIBRARY_VERSION, Server, pack
from ledger.service.inspection import info, number
from ledger.settings import Settings

__all__ = ["probe", "reach"]

# What every append is, a call of a function that may write, and gives back no lease: it runs into
# all that keeps appends from running, and writes nothing.
_LOADS_NOTHING: Final = pack("FUNCTION", "LOAD", "")
"""Refused as no library, or before that by the ACL."""
_WRITES_NOTHING: Final = pack("FCALL", "govledger_release", 0, LIBRARY_VERSION, "probe")


async def reach(settings: Settings, timeout_s: float) -> None:
    """Connects once, and returns where somebody answers; an embedded server that does not run is
    none of its concern.

    Raises:
        InvalidSetting: the URL cannot be used.
        Unavailable: nobody answers in time, or not us.
    """
    there = _as_it_runs(settings)
    if there is None:
        return
    try:
        async with asyncio.timeout(timeout_s), await Server.open(there):
            return
    except TimeoutError:
        raise errors.ServerUnreachable(
            f"no answer within {timeout_s:g} s",
            hint="it accepts connections and says nothing: is it stopped, swapping, or busy?",
        ) from None


async def probe(settings: Settings, timeout_s: float) -> dict[str, Any]:
    """Whether every primary answers, has its data, takes writes, and evicts nothing of ours:
    `healthy`, `reason`, `milliseconds`. It makes one attempt, writes nothing and starts nothing.

    Raises:
        InvalidSetting: the URL cannot be used.
    """
    begun = time.perf_counter()
    trouble, seen_whole = "", True
    try:
        there = _as_it_runs(settings)
        if there is None:
            trouble = "the embedded server does not run; what uses the ledger next starts it"
        else:
            async with asyncio.timeout(timeout_s), await Server.open(there) as server:
                for key in server.primary_keys():
                    if not trouble:
                        trouble, whole = await _examined(server, key)
                        seen_whole = seen_whole and whole
    except TimeoutError:
        trouble = f"no answer within {timeout_s:g} s"
    except (errors.Unavailable, errors.ServerError) as error:
        trouble = str(error)
    taken_ms = round((time.perf_counter() - begun) * 1000, 1)
    bound = "" if seen_whole else ", as far as this user may see"
    told = trouble or f"decisions can be recorded{bound}"
    return {"healthy": not trouble, "reason": told, "milliseconds": taken_ms}


def _as_it_runs(settings: Settings) -> Settings | None:
    """For one attempt, at an embedded server that runs: whoever opens one by its URL starts it, in
    a thread that cannot be left before it is done. None where it does not run.
    """
    once = settings.model_copy(update={"memory_max_reconnect_attempts": 0})
    if urlsplit(settings.redis_url).scheme != "embedded":
        return once
    socket_path = listening_at(embedded_path(settings.redis_url))
    if socket_path is None:
        return None
    return once.model_copy(update={"redis_url": f"unix://{quote(str(socket_path))}"})


async def _examined(server: Server, key: str) -> tuple[str, bool]:
    """Why this node takes no appends, "" where it does; and whether this user could see that."""
    await server.command(key, "PING")  # an error reply too, where writes are refused for MISCONF
    try:
        seen = await info(server, key, "replication", "persistence", "memory")
    except errors.PermissionDenied:
        seen = {}
    trouble = _trouble(server, seen)
    if trouble:
        return trouble, True
    (reply,) = await server.exchange(key, [_WRITES_NOTHING], 1)
    if not isinstance(reply, Exception):
        return "", True
    if library_is_old(reply):  # the first append loads it, where its user may
        (loaded,) = await server.exchange(key, [_LOADS_NOTHING], 1)
        if isinstance(loaded, redis_errors.NoPermissionError):
            return str(function_missing(server.address)), True
        return "", bool(seen)
    named = translate(reply, server.address)
    return ("", False) if isinstance(named, errors.PermissionDenied) else (str(named), True)


def _trouble(server: Server, seen: dict[str, str]) -> str:
    """What INFO has against appends; "" for nothing."""
    if seen.get("role", "master") != "master":
        return "it is a replica and takes no writes"
    if seen.get("loading", "0") != "0":
        return "it is still loading its data"
    if seen.get("aof_last_write_status", "ok") != "ok":
        return "the append-only file cannot be written"
    if seen.get("min_slaves_good_slaves") == "0":  # INFO has it where some are needed
        return "min-replicas-to-write is set and no replica keeps up: appends are refused"
    policy = seen.get("maxmemory_policy", "")
    if policy.startswith("allkeys-") and not server.settings.govledger_allow_eviction:
        return f"maxmemory-policy is {policy}: appends refuse"
    # Whatever may be evicted has been by now; what evicting does not count is no hindrance.
    limit = number(seen, "maxmemory")
    used = number(seen, "used_memory") - number(seen, "mem_not_counted_for_evict")
    return "maxmemory is reached" if limit and used >= limit else ""
