"""One way to a server, whatever its kind: standalone, TLS, Sentinel, Cluster or embedded.

Everything goes through `Server.exchange`: packed commands out, raw replies in, on a connection to
the node that holds the key. redis-py keeps connections, TLS, authentication and topology; its own
retries are off, since they repeat a write blindly. Ours repeat only what is safe to repeat, and all
that this project sends is: an append carries ids, a commit carries the position it began from.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from typing import Any, Final, Self
from urllib.parse import urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ledger import errors, keys
from ledger.connect import cluster_client, embedded_path, pool, sentinel_pool, shown_address
from ledger.embedded import EmbeddedServer
from ledger.replies import function_missing, library_is_old, translate
from ledger.settings import Settings
from ledger.wire import Pool, Wire

__all__ = ["LIBRARY_VERSION", "NodeSettings", "Reply", "Server", "library_source", "pack"]

LIBRARY_VERSION: Final = 3
"""The protocol this client speaks, and the version of functions.lua that it ships."""

REPLY_TIMEOUT_S: Final = 10.0
BACKOFF_BASE_S: Final = 0.05
BACKOFF_CAP_S: Final = 2.0
SCAN_COUNT: Final = 500
SCAN_ATTEMPTS: Final = 20
SETTINGS_AGE_LIMIT_S: Final = 1.0
"""How old the server settings behind a receipt's durability may be."""

Reply = Any
_log = logging.getLogger("ledger")

# The second is no RedisError: the whole cluster is away, or a slot has no node.
_CLUSTER_ERRORS: Final = (redis_errors.RedisError, redis_errors.RedisClusterException, OSError)
_RETRYABLE: Final = (errors.ServerUnreachable, errors.ServerLoading, errors.EmbeddedServerError)


def pack(*args: bytes | str | int) -> bytes:
    """A command in RESP, as the Redis protocol specification has it."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        raw = arg if isinstance(arg, bytes) else str(arg).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


@cache
def library_source() -> bytes:
    """The text of the function library that this release ships."""
    return (files("ledger") / "functions.lua").read_bytes()


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What decides durability on one node; None = could not be read."""

    appendonly: str | None = None
    appendfsync: str | None = None
    no_fsync_on_rewrite: str | None = None
    maxmemory_policy: str | None = None
    aof_begins: bool = False
    """The append-only file is still being made: until then a crash loses what was fsynced."""
    by_attestation: bool = False
    """Known by what another process left, not by CONFIG."""
    run_id: str | None = None
    version: str | None = None
    read_at: float = field(default_factory=time.monotonic)

    @property
    def fsyncs_every_ack(self) -> bool:
        """Whether an acknowledgement follows the fsync of what it acknowledges."""
        set_to = (self.appendonly, self.appendfsync, self.no_fsync_on_rewrite)
        return set_to == ("yes", "always", "no") and not self.aof_begins

    @property
    def evicts_ledger_keys(self) -> bool:
        """Whether the eviction policy can drop keys that have no TTL."""
        return (self.maxmemory_policy or "").startswith("allkeys-")


class Server:
    """A connection to where the ledger lives. Make it with `Server.open`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = shown_address(settings.redis_url)
        self.embedded: EmbeddedServer | None = None
        self._primary: Pool | None = None
        self._cluster: RedisCluster | None = None
        self._cluster_pools: dict[str, Pool] = {}
        self._node_settings: dict[str, tuple[int, NodeSettings]] = {}
        self._sentinels: list[Redis] = []
        self._primary_at: tuple[Any, Any] | None = None
        self._own_wires: set[Wire] = set()
        self._closed = False
        self.generation = 0
        """Grows with each connection that broke or opened: it may lead to another node."""

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """Connects, and finds out what kind of server answers.

        Raises:
            InvalidSetting: the URL cannot be used.
            Unavailable: nobody answers, or not us; the subclass says why.
        """
        server = cls(settings)
        try:
            await server._connect()
        except BaseException:
            await server.aclose()
            raise
        return server

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes every connection and, for an embedded server, leaves it to its other users."""
        self._closed = True
        for wire in list(self._own_wires):
            wire.abort()
        for one in self._pools():
            one.close()
        for _ in range(3):  # a socket is closed a turn of the loop later, under TLS two
            await asyncio.sleep(0)
        if self._cluster:
            await self._cluster.aclose()
        for sentinel in self._sentinels:
            await sentinel.aclose()
        if self.embedded:
            await asyncio.to_thread(self.embedded.release)

    async def _connect(self) -> None:
        url = self.settings.redis_url
        scheme = urlsplit(url).scheme
        if scheme == "embedded":
            self.embedded = await asyncio.to_thread(EmbeddedServer.acquire, embedded_path(url))
            url = self.embedded.url
        if scheme == "redis+sentinel":
            primary, self._sentinels = sentinel_pool(self.settings)
        else:
            primary = pool(url, self.settings)
        self._primary = Pool(primary.make_connection)
        # Asked whatever the scheme: who cannot get in is to learn it here.
        if await self._is_cluster() and scheme in ("redis", "rediss"):
            self._primary.close()
            self._primary = None
            self._cluster = cluster_client(url, self.settings)
            await self._cluster_topology()

    async def _is_cluster(self) -> bool:
        try:
            info = await self.command("", "INFO", "cluster")
        except errors.PermissionDenied:
            return False
        return b"cluster_enabled:1" in _raw(info)

    async def _cluster_topology(self) -> None:
        assert self._cluster is not None
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                if self._cluster._initialize:  # noqa: SLF001 - the first time has no other test
                    await self._cluster.initialize()
                else:
                    await self._cluster.nodes_manager.initialize()
        except _CLUSTER_ERRORS as error:
            raise translate(error, self.address) from error

    # -- one exchange -------------------------------------------------------------------------

    async def command(self, key: str, *args: bytes | str | int) -> Reply:
        """One command, to the node that holds `key` ("" = any); its reply, or a LedgerError."""
        (reply,) = await self.exchange(key, [pack(*args)], 1)
        return self.checked(reply)

    async def function(self, name: str, on: Iterable[str], *args: bytes | str | int) -> Reply:
        """One call of our function library, loading or upgrading it where that is needed."""
        on = tuple(on)
        packed = [pack("FCALL", name, len(on), *on, LIBRARY_VERSION, *args)]
        (reply,) = await self.exchange_function(on[0], packed, 1)
        return self.checked(reply)

    async def exchange_function(
        self, key: str, packed: list[bytes], replies: int, *, tried: int = 0
    ) -> list[Reply]:
        """`exchange` whose first reply is a function's; retried once the library is there."""
        got = await self.exchange(key, packed, replies, tried=tried)
        if isinstance(got[0], redis_errors.ResponseError) and library_is_old(got[0]):
            await self.load_library(key)
            got = await self.exchange(key, packed, replies)
        return got

    def is_retryable(self, reply: Exception) -> bool:
        """Whether the same request may get another answer a little later, or from another node."""
        return self._worth_another_attempt(reply) is not None

    async def recover(self, error: Exception) -> None:
        """What `exchange` does after a first attempt that broke, for one that was made elsewhere.

        Raises:
            Unavailable: nothing is to be tried again.
        """
        if self.settings.memory_max_reconnect_attempts == 0:
            named = self._worth_another_attempt(error) or translate(error, self.address)
            named.facts["attempts"] = 1
            raise named from error
        await self._recover(0)

    def checked(self, reply: Reply) -> Reply:
        """`reply` itself; an error reply is raised as what it means."""
        if isinstance(reply, Exception):
            raise translate(reply, self.address)
        return reply

    async def exchange(
        self,
        key: str,
        packed: list[bytes],
        replies: int,
        *,
        timeout_s: float = REPLY_TIMEOUT_S,
        tried: int = 0,
    ) -> list[Reply]:
        """Sends `packed` and reads `replies` replies, error replies among them as values.

        What breaks is tried again up to MEMORY_MAX_RECONNECT_ATTEMPTS times, with full jitter
        between 0 and a doubling bound of 50 ms to 2 s (the first time at once: an idle connection
        may just be stale). So send only what may be executed twice. `tried`: attempts that were
        made elsewhere, and count.

        Raises:
            Unavailable: the attempts ran out, or trying again would not help.
        """
        if self._closed:
            raise errors.ServerUnreachable(f"{self.address}: this connection was closed")
        attempts = self.settings.memory_max_reconnect_attempts
        for attempt in range(tried, attempts + 1):
            try:
                return await self._exchange_once(key, packed, replies, timeout_s)
            except _RETRYABLE as error:
                if attempt == attempts:
                    error.facts["attempts"] = attempt + 1
                    raise
            await self._recover(attempt)
        raise AssertionError("unreachable")

    async def exchange_each(self, asked: list[tuple[str, bytes]]) -> list[Reply]:
        """Commands each with its own key, replies in their order: one round trip, or in a cluster
        one for each node.
        """
        by_node: dict[str, list[int]] = {}
        for i, (key, _) in enumerate(asked):
            by_node.setdefault(self._node_name(key), []).append(i)
        replies: list[Reply] = [None] * len(asked)
        for places in by_node.values():
            packed = [asked[i][1] for i in places]
            got = await self.exchange(asked[places[0]][0], packed, len(packed))
            for i, reply in zip(places, got, strict=True):
                replies[i] = reply
        return replies

    async def on_each(
        self, found: Iterable[bytes], *words: str, then: Sequence[str | int] = ()
    ) -> list[Reply]:
        """One command for each key, as `exchange_each`: the words, the key, then what is behind it;
        keys of any bytes.
        """
        asked = [(one.decode(errors="surrogateescape"), pack(*words, one, *then)) for one in found]
        return await self.exchange_each(asked)

    async def scan(self, pattern: str) -> AsyncGenerator[list[bytes], None]:
        """Pages of the keys that match a glob, from each primary, by SCAN: every key that is there
        all the while, some perhaps twice. Where a connection broke it begins anew, since a cursor
        means nothing to another server.

        Raises:
            ServerUnreachable: connections kept breaking.
        """
        for node_key in self.primary_keys():
            cursor, begun, generation = b"0", 0, self.generation
            while True:
                sent = cursor
                cursor, page = await self.command(
                    node_key, "SCAN", sent, "MATCH", pattern, "COUNT", SCAN_COUNT
                )
                yield page
                if sent == b"0":
                    begun, generation = begun + 1, self.generation
                elif self.generation != generation:
                    cursor = b"0"
                    if begun > SCAN_ATTEMPTS:
                        raise errors.ServerUnreachable(
                            f"{self.address}: connections kept breaking while keys were listed",
                            hint="try again when the server is steady",
                        )
                    continue
                if cursor == b"0":
                    break

    async def _exchange_once(
        self, key: str, packed: list[bytes], replies: int, timeout_s: float
    ) -> list[Reply]:
        """MOVED, LOADING and their like become errors worth another attempt; an ASK is followed."""
        got = await self._exchange_with(self._pool(key), packed, replies, timeout_s)
        asked = next((reply for reply in got if isinstance(reply, redis_errors.AskError)), None)
        if asked is not None and self._cluster:
            node = self._cluster.get_node(host=asked.host, port=asked.port)
            if node is not None:
                got = await self._exchange_asking(self._node_pool(node), packed, replies, timeout_s)
        for reply in got:
            if isinstance(reply, redis_errors.RedisError):
                named = self._worth_another_attempt(reply)
                if named is not None:
                    raise named from reply
        return got

    def _worth_another_attempt(self, reply: Exception) -> errors.LedgerError | None:
        named = translate(reply, self.address)
        if self._sentinels and isinstance(named, errors.ReadOnlyReplica):
            # It was the primary when we asked the sentinels; the next connection asks them again.
            return errors.ServerUnreachable(f"{named.message}: it was the primary", hint=named.hint)
        return named if isinstance(named, _RETRYABLE) else None

    async def _exchange_asking(
        self, node: Pool, packed: list[bytes], replies: int, timeout_s: float
    ) -> list[Reply]:
        asking = pack("ASKING")
        if len(packed) != replies:  # a function call in parts; what is behind it has no key
            return (await self._exchange_with(node, [asking, *packed], replies + 1, timeout_s))[1:]
        each = [part for command in packed for part in (asking, command)]
        return (await self._exchange_with(node, each, 2 * replies, timeout_s))[1::2]

    async def _exchange_with(
        self, node: Pool, packed: list[bytes], replies: int, timeout_s: float
    ) -> list[Reply]:
        try:
            wire = node.take() or await self._opened(node, timeout_s)
            try:
                return await wire.exchange(b"".join(packed), replies, timeout_s)
            finally:
                node.give(wire)
        except (redis_errors.RedisError, OSError) as error:
            raise translate(error, self.address) from error

    async def _opened(self, node: Pool, timeout_s: float) -> Wire:
        # A hung server accepts a connection, and says nothing.
        async with asyncio.timeout(timeout_s):
            wire = await node.open()
        self.generation += 1
        if self._sentinels:
            # Idle connections still lead to the primary of before, which may not know it yet.
            if self._primary_at not in (None, wire.address):
                node.renew(keep=wire)
            self._primary_at = wire.address
        return wire

    def lease(self, key: str) -> tuple[Pool, Wire] | None:
        """An idle connection to the node of `key`, to be given back to its pool; None where there
        is none at hand or nobody can say which node.
        """
        try:
            node = self._pool(key)
        except errors.LedgerError:
            return None
        wire = node.take()
        return (node, wire) if wire else None

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    @asynccontextmanager
    async def own_wire(self, key: str) -> AsyncIterator[Wire]:
        """A connection to the node of `key` for one user alone; closed afterwards, or by `aclose`.

        Raises:
            Unavailable: it cannot be opened. Nothing is tried again.
        """
        if self._closed:
            raise errors.ServerUnreachable(f"{self.address}: this connection was closed")
        node = self._pool(key)
        try:
            wire = await self._opened(node, REPLY_TIMEOUT_S)
        except (redis_errors.RedisError, OSError) as error:
            raise translate(error, self.address) from error
        self._own_wires.add(wire)
        try:
            yield wire
        finally:
            self._own_wires.discard(wire)
            wire.abort()
            node.give(wire)

    def _pool(self, key: str) -> Pool:
        if self._primary:
            return self._primary
        if self._cluster is None:
            raise errors.ServerUnreachable(f"{self.address}: the connection is closed")
        try:
            node = self._node_of(key) if key else self._cluster.get_default_node()
        except _CLUSTER_ERRORS as error:
            raise translate(error, self.address) from error
        if node is None:
            raise errors.ServerUnreachable(f"{self.address}: no cluster node serves {key}")
        return self._node_pool(node)

    def _node_pool(self, node: ClusterNode) -> Pool:
        known = self._cluster_pools.get(node.name)
        if known is None:
            options = {**node.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
            known = Pool(partial(node.connection_class, **options))
            self._cluster_pools[node.name] = known
        return known

    def _pools(self) -> list[Pool]:
        return [*([self._primary] if self._primary else ()), *self._cluster_pools.values()]

    async def _recover(self, attempt: int) -> None:
        self._node_settings.clear()
        self.generation += 1
        if attempt:
            bound_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0**attempt)
            await asyncio.sleep(random.uniform(0, bound_s))  # noqa: S311 - jitter, no secret
        try:
            if self.embedded:
                await asyncio.to_thread(self.embedded.ensure_running)
            # Where one connection broke the idle ones may be stale too: each would cost an attempt.
            for one in self._pools():
                one.drop_idle()
            if self._cluster:
                await self._cluster_topology()
        except errors.Unavailable as error:
            _log.debug("not back yet: %s", error)

    # -- the function library -----------------------------------------------------------------

    async def load_library(self, key: str = "") -> None:
        """Puts our function library on every primary, unless a newer one is there.

        Raises:
            FunctionMissing: this user may not load it.
        """
        source = library_source()
        for node_key in self._primary_keys() if self._cluster else [key]:
            await self._load_on(node_key, source)

    async def _load_on(self, key: str, source: bytes) -> None:
        for _ in range(3):  # another client may load meanwhile; then look again
            version = await self.library_version(key)
            if version is not None and version >= LIBRARY_VERSION:
                return
            replace = ["REPLACE"] if version is not None else []
            load = pack("FUNCTION", "LOAD", *replace, source)
            (reply,) = await self.exchange(key, [load], 1)
            if not isinstance(reply, Exception):
                return
            if "already exists" not in str(reply):
                named = translate(reply, self.address)
                if isinstance(named, errors.PermissionDenied):
                    raise function_missing(self.address) from reply
                raise named from reply

    async def library_version(self, key: str = "") -> int | None:
        """The version of the function library on the node of `key`; None = it has none."""
        # FCALL, not FCALL_RO: who appends has the right to that.
        (reply,) = await self.exchange(key, [pack("FCALL", "govledger_version", 0)], 1)
        if isinstance(reply, Exception):
            if "Function not found" in str(reply):
                return None
            raise translate(reply, self.address) from reply
        return int(reply[0])

    def primary_keys(self) -> list[str]:
        """For each primary a key that leads to it; one server has "", which leads anywhere."""
        return self._primary_keys() if self._cluster else [""]

    @property
    def is_cluster(self) -> bool:
        """Whether several nodes share the keys."""
        return self._cluster is not None

    def _primary_keys(self) -> list[str]:
        """For each primary a key that it holds, so that commands find it by the usual way."""
        assert self._cluster is not None
        missing = {node.name for node in self._cluster.get_primaries()}
        found = []
        for n in range(200_000):
            key = f"{{{n}}}"
            node = self._cluster.get_node_from_key(key)
            if node is not None and node.name in missing:
                missing.discard(node.name)
                found.append(key)
            if not missing:
                break
        return found

    # -- what the server's settings mean ------------------------------------------------------

    SETTINGS_COMMANDS: Final = (
        pack("CONFIG", "GET", "append*", "maxmemory-policy", "no-appendfsync-on-rewrite"),
        pack("INFO", "server", "memory", "persistence"),
    )

    def _node_name(self, key: str) -> str:
        node = self._node_of(key) if self._cluster else None
        return str(node.name) if node else ""

    def _node_of(self, key: str) -> ClusterNode | None:
        assert self._cluster is not None
        raw = key.encode(errors="surrogateescape")  # of any bytes: text must be UTF-8 there
        return self._cluster.get_node_from_key(raw)  # type: ignore[arg-type]

    def known_settings(self, key: str) -> NodeSettings | None:
        """The settings of the node of `key` where they are known and fresh."""
        generation, known = self._node_settings.get(self._node_name(key), (0, None))
        if known is None or generation != self.generation:
            return None
        return known if time.monotonic() - known.read_at < SETTINGS_AGE_LIMIT_S else None

    def last_settings(self, key: str) -> NodeSettings | None:
        """The settings of the node of `key` as last read, however long ago; None = never."""
        return self._node_settings.get(self._node_name(key), (0, None))[1]

    async def node_settings(self, key: str, *, anew: bool = False) -> NodeSettings:
        """The settings of the node of `key`, at most a second old; `anew`: read just now."""
        known = None if anew else self.known_settings(key)
        if known:
            return known
        generation = self.generation
        replies = await self.exchange(
            key, list(self.SETTINGS_COMMANDS), len(self.SETTINGS_COMMANDS)
        )
        return await self.take_settings(key, replies, generation)

    async def take_settings(self, key: str, replies: list[Reply], generation: int) -> NodeSettings:
        """What the replies to SETTINGS_COMMANDS say; kept, unless a connection broke since
        `generation`, when they may be another node's.
        """
        seen, info = _config(replies[0]), _info(replies[1])
        before = self.last_settings(key)
        by_attestation = not seen and "run_id" in info
        if by_attestation:
            seen = await self._attested(info["run_id"])
        known = NodeSettings(
            appendonly=seen.get("appendonly"),
            appendfsync=seen.get("appendfsync"),
            no_fsync_on_rewrite=seen.get("no-appendfsync-on-rewrite"),
            maxmemory_policy=seen.get("maxmemory-policy") or info.get("maxmemory_policy"),
            aof_begins=_aof_begins(info, before),
            by_attestation=by_attestation,
            run_id=info.get("run_id"),
            version=info.get("valkey_version") or info.get("redis_version"),
        )
        if generation == self.generation:
            self._node_settings[self._node_name(key)] = (generation, known)
        return known

    async def _attested(self, run_id: str) -> dict[str, str]:
        """What an operator's process left about this very server process, for those who may not
        read CONFIG; nothing once it has expired.
        """
        key = keys.attestation(run_id)
        (reply,) = await self.exchange(key, [pack("HGETALL", key)], 1)
        return {} if isinstance(reply, Exception) else _config(reply)

    async def attest(self, key: str = "") -> None:
        """Leaves what CONFIG says of the node of `key` for clients that may not read it."""
        self._node_settings.clear()
        seen = await self.node_settings(key)
        if seen.run_id is None or seen.appendonly is None or seen.aof_begins:
            return
        if seen.by_attestation:
            return  # renewed unseen it would outlive the settings that it tells of
        where = keys.attestation(seen.run_id)
        fields = {
            "appendonly": seen.appendonly,
            "appendfsync": seen.appendfsync or "",
            "no-appendfsync-on-rewrite": seen.no_fsync_on_rewrite or "",
            "maxmemory-policy": seen.maxmemory_policy or "",
            "checked_at_ms": str(time.time_ns() // 1_000_000),
        }
        flat = [part for pair in fields.items() for part in pair]
        await self.command(where, "HSET", where, *flat)
        await self.command(where, "EXPIRE", where, keys.ATTESTATION_TTL_SECONDS)


def _raw(reply: Reply) -> bytes:
    return reply if isinstance(reply, bytes) else b""


def _info(reply: Reply) -> dict[str, str]:
    if isinstance(reply, Exception):
        return {}
    lines = (line.partition(":") for line in _raw(reply).decode().splitlines())
    return {name: value for name, _, value in lines}


def _aof_begins(info: dict[str, str], before: NodeSettings | None) -> bool:
    """Whether the rewrite under way may be the one by which `CONFIG SET appendonly yes` begins.

    No server tells it from any other rewrite, so: the first of its run, or one that was not under
    way while the file was in use, as far as we have seen.
    """
    if info.get("aof_rewrite_in_progress", "0") == info.get("aof_rewrite_scheduled", "0") == "0":
        return False
    if before is not None and before.run_id == info.get("run_id"):
        return before.aof_begins or before.appendonly == "no"
    return info.get("aof_last_rewrite_time_sec") == "-1"


def _config(reply: Reply) -> dict[str, str]:
    """CONFIG GET and HGETALL: a map with RESP3."""
    if not isinstance(reply, dict):
        return {}
    return {name.decode(): value.decode() for name, value in reply.items()}
