"""What the doctor looks at, gathered once; what may not be asked is named in `denied`.

No setting that holds a secret is ever asked for: `requirepass` is found out by trying the door.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from redis import exceptions as redis_errors

from ledger import errors, keys
from ledger.connect import pool
from ledger.ledger import Ledger
from ledger.server import NodeSettings, Server, pack
from ledger.service.cleanup import LEASE_LIMIT_MS, idle_s
from ledger.service.inspection import (
    Standing,
    began_ms,
    config,
    info,
    oldest_unfolded_ms,
    ping_ms,
    server_now_ms,
    standings,
)
from ledger.service.runs import Run, last_runs, running
from ledger.service.snapshot import is_local
from ledger.settings import Settings
from projections.registry import configured

__all__ = ["Node", "Seen", "look"]

PINGS: Final = 200
CONFIG_NAMES: Final = (
    "save",
    "stop-writes-on-bgsave-error",
    "min-replicas-to-write",
    "min-replicas-max-lag",
    "dir",
    "activedefrag",
    "slowlog-log-slower-than",
)
NAMES_LIMIT: Final = 1000
_STREAM: Final = re.compile(
    re.escape(keys.LEDGER.encode()) + rb":\{(.*)\}:governance:decisions", re.DOTALL
)
_REFUSALS: Final = (
    errors.PermissionDenied,
    errors.ServerError,  # such as a key of another type
    errors.ServerBusy,  # MISCONF, to PING too
    errors.OutOfMemory,
    errors.ReadOnlyReplica,
    errors.FunctionMissing,
)
_T = TypeVar("_T")


@dataclass(slots=True)
class Node:
    """One primary, or the one server there is."""

    name: str
    info: dict[str, str] = field(default_factory=dict)
    """Empty where INFO is denied."""
    config: dict[str, str] | None = None
    """None where CONFIG is denied."""
    settings: NodeSettings = field(default_factory=NodeSettings)
    """What decides durability, by CONFIG or else by attestation."""
    attested: bool = False
    """Whether the attestation was left or renewed just now."""
    round_trips_ms: list[float] = field(default_factory=list)
    slow: list[tuple[int, int, str]] | None = None
    """Time in s since 1970, duration in µs, and name of the latest slow commands; None: denied."""
    clock_ahead_ms: int | None = 0
    """How far this machine's clock is ahead of the node's; None: TIME is denied."""
    library_version: int | None = None
    free_bytes: int | None = None
    """On the disk of the data directory; None where that cannot be seen from here."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """What the health job kept, the newest first."""


@dataclass(slots=True)
class Seen:
    """Everything the checks judge."""

    address: str
    scheme: str
    local: bool
    settings: Settings
    verifies_tls: bool
    user: str | None
    open_door: bool | None
    """Whether a client without a password gets in; None where that was not tried."""
    now_ms: int
    nodes: list[Node]
    tenants: list[str] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    began_ms: int | None = None
    """When the first entry was recorded; None where nothing is, or nobody says."""
    oldest_unfolded_ms: int | None = None
    """When the oldest entry was recorded that is not folded yet, by the ledger's clock."""
    quarantined: dict[str, int] = field(default_factory=dict)
    unregistered: list[str] | None = None
    """Tenants whose stream is there and whose name is not in the registry; None: SCAN is denied."""
    importing: dict[str, int] = field(default_factory=dict)
    """Tenants with parts of an import, and for how many seconds nobody has gone on with it."""
    lasting_leases: list[str] = field(default_factory=list)
    """Tenants with a lease that never ends, which no worker of ours makes."""
    misnamed: list[str] = field(default_factory=list)
    """Names in the registry that no tenant can have."""
    last_runs: dict[str, Run] = field(default_factory=dict)
    running: list[Run] = field(default_factory=list)
    """What runs, or ran when its process was killed."""
    claimed_ms: dict[str, int] = field(default_factory=dict)
    denied: dict[str, str] = field(default_factory=dict)
    """What could not be asked, and what the server said."""


async def look(ledger: Ledger) -> Seen:
    """Asks the server, its other primaries, and every tenant's keys; leaves the attestation.

    Raises:
        Unavailable: the server stopped answering in the middle.
    """
    server, denied = ledger.server, dict[str, str]()
    parts = urlsplit(server.settings.redis_url)
    nodes = [await _look_at(server, key, denied) for key in server.primary_keys()]
    seen = Seen(
        address=server.address,
        scheme=parts.scheme,
        local=is_local(server),
        settings=server.settings,
        verifies_tls=parse_qs(parts.query).get("ssl_cert_reqs", [""])[0] != "none",
        user=await _user(server, denied),
        open_door=await _door_is_open(server),
        now_ms=time.time_ns() // 1_000_000 - (nodes[0].clock_ahead_ms or 0),
        nodes=nodes,
        denied=denied,
    )
    await _look_at_tenants(ledger, seen)
    seen.last_runs = await _allowed(denied, "jobs", last_runs(server)) or {}
    seen.claimed_ms = await _allowed(denied, "jobs", _claimed(server)) or {}
    seen.running = await _allowed(denied, "jobs", running(server)) or []
    return seen


async def _allowed(denied: dict[str, str], what: str, asking: Awaitable[_T]) -> _T | None:
    """The answer; None where the server is there and refuses, which is noted."""
    try:
        return await asking
    except _REFUSALS as error:
        denied[what] = error.message
        return None


# -- a node --------------------------------------------------------------------------------------


async def _look_at(server: Server, key: str, denied: dict[str, str]) -> Node:
    seen = await _allowed(denied, "INFO", info(server, key, "everything")) or {}
    node = Node(name=_node_name(server, seen), info=seen)
    node.config = await _allowed(denied, "CONFIG", config(server, key, *CONFIG_NAMES))
    node.settings = await server.node_settings(key, anew=True)
    if node.config is not None and not node.settings.aof_begins:
        node.attested = await _attested(server, key, denied)
    node.round_trips_ms = await _allowed(denied, "PING", ping_ms(server, key, PINGS)) or []
    node.slow = await _allowed(denied, "SLOWLOG", _slow_log(server, key))
    node.clock_ahead_ms = await _allowed(denied, "TIME", _clock_ahead_ms(server, key))
    node.library_version = await _allowed(denied, "FCALL", server.library_version(key))
    if node.config is not None and is_local(server):
        node.free_bytes = await asyncio.to_thread(_free_bytes, node.config.get("dir", ""))
    samples = await _allowed(denied, "health samples", _samples(server))
    node.samples = [one for one in samples or () if one.get("run_id") == seen.get("run_id")]
    return node


async def _attested(server: Server, key: str, denied: dict[str, str]) -> bool:
    try:
        await server.attest(key)
    except _REFUSALS as error:
        denied["attestation"] = error.message
        return False
    return True


def _node_name(server: Server, seen: dict[str, str]) -> str:
    return f"port {seen.get('tcp_port', '?')}" if server.is_cluster else ""


async def _slow_log(server: Server, key: str) -> list[tuple[int, int, str]]:
    found = await server.command(key, "SLOWLOG", "GET", 20)
    # Only a command's name: what it was given may be anybody's secret.
    return [(at, took, command[0].decode(errors="replace")) for _, at, took, command, *_ in found]


async def _clock_ahead_ms(server: Server, key: str) -> int:
    before = time.time()
    theirs_ms = await server_now_ms(server, key)
    return round((before + time.time()) / 2 * 1000) - theirs_ms


def _free_bytes(directory: str) -> int | None:
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None  # another machine's or container's path
    return disk.f_bavail * disk.f_frsize


async def _samples(server: Server) -> list[dict[str, str]]:
    key = keys.HEALTH_SAMPLES
    entries = await server.command(key, "XREVRANGE", key, "+", "-")
    return [
        {
            name.decode(): value.decode(errors="replace")
            for name, value in zip(fields[::2], fields[1::2], strict=True)
        }
        for _, fields in entries
    ]


# -- the way in ----------------------------------------------------------------------------------


async def _user(server: Server, denied: dict[str, str]) -> str | None:
    try:
        name = await server.command("", "ACL", "WHOAMI")
    except errors.PermissionDenied as error:
        denied["ACL WHOAMI"] = error.message
        return None
    return str(name.decode(errors="replace"))


async def _door_is_open(server: Server) -> bool | None:
    """Tries PING on a connection that gives no password."""
    parts = urlsplit(server.settings.redis_url)
    if parts.scheme not in ("redis", "rediss"):
        return None
    # redis-py takes user and password from the query too.
    options = [pair for pair in parse_qsl(parts.query) if pair[0] not in ("username", "password")]
    host = parts.netloc.rpartition("@")[2]
    url = parts._replace(netloc=host, query=urlencode(options)).geturl()
    stranger = server.settings.model_copy(update={"redis_url": url, "redis_password": None})
    connection = pool(url, stranger).make_connection()  # type: ignore[no-untyped-call]
    try:
        async with asyncio.timeout(5):
            await connection.connect()
            await connection.send_packed_command([pack("PING")])
            await connection.read_response()
            return True
    except redis_errors.NoPermissionError:
        return True  # it is in, if only as somebody with few rights
    except (redis_errors.AuthenticationError, redis_errors.ResponseError):
        return False
    except (redis_errors.RedisError, OSError):
        return None
    finally:
        await connection.disconnect(nowait=True)


# -- tenants -------------------------------------------------------------------------------------


async def _look_at_tenants(ledger: Ledger, seen: Seen) -> None:
    server, denied = ledger.server, seen.denied
    raw = await _allowed(denied, "registry", server.command(keys.TENANTS, "SMEMBERS", keys.TENANTS))
    names = {name.decode(errors="backslashreplace") for name in raw or ()}
    seen.tenants = sorted(name for name in names if keys.is_tenant(name))
    seen.misnamed = sorted(names - set(seen.tenants))[:NAMES_LIMIT]
    found = await _allowed(denied, "tenants", standings(ledger, seen.tenants))
    seen.standings = found or []
    seen.began_ms = await _allowed(denied, "streams", began_ms(server, seen.tenants))
    seen.oldest_unfolded_ms = await _allowed(
        denied, "streams", oldest_unfolded_ms(server, seen.standings)
    )
    seen.quarantined = await _allowed(denied, "quarantine", _quarantined(server, seen)) or {}
    if raw is not None:
        there = await _allowed(denied, "SCAN", _records(server))
        if there is not None:
            streams, importing = there
            seen.unregistered = sorted(streams - names)[:NAMES_LIMIT]
            seen.importing = await _allowed(denied, "OBJECT", _idle_s(server, importing)) or {}
    leases = await _allowed(denied, "leases", _lasting_leases(server, seen.tenants))
    seen.lasting_leases = leases or []


async def _quarantined(server: Server, seen: Seen) -> dict[str, int]:
    found = [keys.projection_quarantine(one) for one in seen.tenants]
    replies = await server.exchange_each([(key, pack("HLEN", key)) for key in found])
    counts = zip(seen.tenants, map(server.checked, replies), strict=True)
    return {tenant: count for tenant, count in counts if count}


async def _records(server: Server) -> tuple[set[str], set[str]]:
    """The tenants, of whatever name, that have a stream; those that have parts of an import."""
    streams, importing = set[str](), set[str]()
    async with aclosing(server.scan(keys.RECORDS)) as pages:
        async for page in pages:
            importing.update(filter(None, map(keys.tenant_of_import, page)))
            found = (match[1] for key in page if (match := _STREAM.fullmatch(key)))
            streams.update(name.decode(errors="backslashreplace") for name in found)
    return streams, importing


async def _idle_s(server: Server, tenants: set[str]) -> dict[str, int]:
    found = sorted(tenants)[:NAMES_LIMIT]
    parts = {one: [key.encode() for key in keys.importing(one)] for one in found}
    return {one: await idle_s(server, some) for one, some in parts.items()}


async def _lasting_leases(server: Server, tenants: list[str]) -> list[str]:
    folded = [(one.name, one.version) for one in configured(server.settings)]
    found = [(tenant, keys.lease(tenant, *one)) for tenant in tenants for one in folded]
    replies = await server.exchange_each([(key, pack("PTTL", key)) for _, key in found])
    lefts = zip(found, map(server.checked, replies), strict=True)
    return sorted({tenant for (tenant, _), left in lefts if left == -1 or left > LEASE_LIMIT_MS})


async def _claimed(server: Server) -> dict[str, int]:
    found = await server.command(
        keys.JOBS_CLAIMED, "ZRANGE", keys.JOBS_CLAIMED, 0, -1, "WITHSCORES"
    )
    return {job.decode(errors="replace"): int(min(score, 2**53)) for job, score in found}
