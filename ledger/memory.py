"""MemoryService: the memory API of the operations guide, on the keys `claude-flow:memory:*`.

    memory = get_memory_service()
    await memory.initialize()
    await memory.set("acgs-dev:session:s-1", {"step": 3}, 3600)

Keys are relative to `claude-flow:memory:`; `keys.py` builds those of state, session, agent, swarm
and cache. What is stored is what the guide's own service stores and reads: a JSON string
`{"value": …, "createdAt": …, "updatedAt": …, "metadata": {…}}`, times as JavaScript's
`toISOString` writes them. Nothing here can reach a key of the ledger.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final, Self, TypeVar, overload

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from ledger import errors, keys
from ledger.server import Server, pack
from ledger.settings import Settings, load_settings

__all__ = [
    "MAX_TTL_SECONDS",
    "MAX_VALUE_BYTES",
    "CleanedUp",
    "MemoryEntry",
    "MemoryService",
    "get_memory_service",
    "iso_ms",
    "reset_memory_service",
]

MAX_VALUE_BYTES: Final = 16 << 20
"""Of the value's JSON: the server reads nothing else while it takes it in."""

MAX_TTL_SECONDS: Final = 3_153_600_000
"""A hundred years."""

MAX_PATTERN_CHARS: Final = 512
_PREFIX: Final = keys.MEMORY_PREFIX.encode()

T = TypeVar("T")


class CleanedUp(int):
    """How many keys `cleanup` deleted (or would delete), and how many bytes of memory they took."""

    bytes_freed: int

    def __new__(cls, count: int, bytes_freed: int) -> Self:
        """The count itself, as the guide's `cleanup` returns it, with the bytes beside it."""
        made = super().__new__(cls, count)
        made.bytes_freed = bytes_freed
        return made


@dataclass(frozen=True, slots=True)
class MemoryEntry:
    """A stored value with what is kept about it; `ttl_seconds` None = it does not expire."""

    value: Any
    created_at: datetime
    updated_at: datetime
    metadata: dict[str, Any] = field(default_factory=dict)
    ttl_seconds: int | None = None


class MemoryService:
    """Values under `claude-flow:memory:`, as the operations guide has it; use with `async with`,
    or between `initialize` and `disconnect`.

    Every call but these may raise `NotInitialized` before `initialize`, `InvalidInput` for a key
    that is none, and `Unavailable` when the server stayed away for MEMORY_MAX_RECONNECT_ATTEMPTS
    attempts: no write is put aside for later, or dropped, without an error. A call whose answer
    was lost is sent again, so under two writers of one key the last to be answered wins.
    """

    def __init__(self, settings: Settings | None = None, *, server: Server | None = None) -> None:
        """`server`: one that somebody else opened and closes, such as a `Ledger`'s."""
        self.settings = server.settings if server else settings or load_settings()
        self._server = server
        self._borrowed = server is not None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = asyncio.Lock()
        self._calls = 0
        self._idle = asyncio.Event()

    # -- connection ---------------------------------------------------------------------------

    async def initialize(self) -> None:
        """Connects; where it is connected in this event loop, nothing happens.

        Raises:
            InvalidSetting: the URL cannot be used.
            Unavailable: nobody answers, or not us; the subclass says why.
        """
        async with self._opening:
            if not self.is_initialized:
                self._server = await Server.open(self.settings)
                self._borrowed, self._calls = False, 0
                self._loop = asyncio.get_running_loop()

    async def disconnect(self) -> None:
        """Waits for calls that are under way, then closes the connections. Idempotent."""
        server, self._server = self._server, None
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        if server is not None and not self._borrowed:
            await server.aclose()

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()

    @property
    def is_initialized(self) -> bool:
        """Whether `initialize` has connected, and `disconnect` has not closed it since."""
        here = self._borrowed or self._loop is asyncio.get_running_loop()
        return self._server is not None and here

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[Server]:
        if self._server is None or not self.is_initialized:
            raise errors.NotInitialized(
                "Redis client not initialized",
                hint="await initialize() first, in the same event loop, or use `async with`; after "
                "disconnect() again",
            )
        self._calls += 1
        try:
            yield self._server
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    # -- one key ------------------------------------------------------------------------------

    async def set(
        self,
        key: str,
        value: Any,
        ttl_seconds: int | None = None,
        *,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Stores a value; `createdAt` stays that of the first `set` while the key lives.

        Args:
            key: relative to `claude-flow:memory:`.
            value: what JSON can hold; a pydantic model is stored as its JSON.
            ttl_seconds: when it expires; None = MEMORY_DEFAULT_TTL_SECONDS, 0 = never.
            metadata: kept beside the value, in place of what was there.

        Raises:
            InvalidInput: the value is not JSON (a NaN, bytes, keys that are no strings), is over
                16 MiB, the metadata is no dict, or the TTL is no number of seconds from 0 to a
                hundred years.
        """
        default_ttl_s = self.settings.memory_default_ttl_seconds
        async with self._calling() as server:
            await server.function(
                "govledger_memory_set",
                [keys.memory_key(key)],
                _json("value", value),
                iso_ms(time.time_ns() // 1_000_000),
                _json("metadata", _checked_metadata(metadata)),
                _checked_ttl(default_ttl_s if ttl_seconds is None else ttl_seconds),
            )

    @overload
    async def get(self, key: str) -> Any: ...
    @overload
    async def get(self, key: str, model: type[T]) -> T | None: ...
    async def get(self, key: str, model: type[T] | None = None) -> Any:
        """The value; None where there is none. `model`: a type to check it against and make of it.

        Raises:
            MalformedValue: what is stored is no envelope, or its value does not fit the model.
        """
        entry = await self.get_entry(key)
        if entry is None or model is None:
            return None if entry is None else entry.value
        try:
            # As JSON, so that a model reads its times, tuples and bytes from strings and lists.
            return TypeAdapter(model).validate_json(orjson.dumps(entry.value))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "value"
            raise errors.MalformedValue(
                f"{keys.memory_key(key)}: {where}: {first['msg']}",
                hint="another release or program wrote it; read it without a model",
                key=key,
            ) from None

    async def get_entry(self, key: str) -> MemoryEntry | None:
        """The value with its times, metadata and time to live; None where there is none.

        Raises:
            MalformedValue: what is stored there is not the guide's envelope.
        """
        async with self._calling() as server:
            full_key = keys.memory_key(key)
            packed = [pack("GET", full_key), pack("TTL", full_key)]
            replies = await server.exchange(full_key, packed, 2)
            raw, ttl_s = (server.checked(reply) for reply in replies)
        return None if raw is None else _parse(full_key, raw, ttl_s)

    async def delete(self, key: str) -> bool:
        """Deletes a value; False where there was none."""
        async with self._calling() as server:
            full_key = keys.memory_key(key)
            return bool(await server.command(full_key, "UNLINK", full_key))

    async def exists(self, key: str) -> bool:
        """Whether there is a value."""
        async with self._calling() as server:
            full_key = keys.memory_key(key)
            return bool(await server.command(full_key, "EXISTS", full_key))

    async def expire(self, key: str, ttl_seconds: int) -> bool:
        """Sets when a value expires, from now; 0 = never. False where there is none.

        Raises:
            InvalidInput: the TTL is no number of seconds from 0 to a hundred years.
        """
        async with self._calling() as server:
            full_key = keys.memory_key(key)
            if _checked_ttl(ttl_seconds):
                return bool(await server.command(full_key, "EXPIRE", full_key, ttl_seconds))
            packed = [pack("PERSIST", full_key), pack("EXISTS", full_key)]
            replies = await server.exchange(full_key, packed, 2)
            _, exists = (server.checked(reply) for reply in replies)
            return bool(exists)

    # -- many keys ----------------------------------------------------------------------------

    async def keys(self, pattern: str = "*") -> list[str]:
        """The keys that match a glob pattern, relative and sorted, by SCAN.

        A key that exists all the while is among them; one that comes or goes meanwhile may be.

        Raises:
            InvalidInput: the pattern is empty, too long, or names the prefix itself.
        """
        found: set[bytes] = set()
        async with (
            self._calling() as server,
            aclosing(server.scan(_checked_pattern(pattern))) as pages,
        ):
            async for page in pages:
                found.update(page)
        prefix = len(keys.MEMORY_PREFIX)
        return sorted(one.decode(errors="backslashreplace")[prefix:] for one in found)

    async def cleanup(self, pattern: str, *, dry_run: bool = False) -> CleanedUp:
        """Deletes the keys that match a glob pattern, by SCAN and UNLINK in batches.

        Published state among them comes back: a projector publishes it anew.

        Args:
            pattern: relative, such as `stale:*`; `*` is everything under `claude-flow:memory:`.
            dry_run: delete nothing, and say what would be.

        Returns: how many keys it was, with `bytes_freed`: what MEMORY USAGE said of them.

        Raises:
            InvalidInput: the pattern is empty, too long, or names the prefix itself.
        """
        count = freed = 0
        seen: set[bytes] = set()  # SCAN may name a key twice; what is deleted counts once by itself
        async with (
            self._calling() as server,
            aclosing(server.scan(_checked_pattern(pattern))) as pages,
        ):
            async for page in pages:
                fresh = [one for one in page if one.startswith(_PREFIX) and one not in seen]
                if dry_run:
                    seen.update(fresh)
                sizes = await _checked_each(server, fresh, "MEMORY", "USAGE")
                gone = (
                    [size is not None for size in sizes]
                    if dry_run
                    else await _checked_each(server, fresh, "UNLINK")
                )
                count += sum(map(bool, gone))
                freed += sum(size or 0 for size, was in zip(sizes, gone, strict=True) if was)
        return CleanedUp(count, freed)


async def _checked_each(server: Server, found: Iterable[bytes], *words: str) -> list[Any]:
    return [server.checked(reply) for reply in await server.on_each(found, *words)]


# -- what is valid ------------------------------------------------------------------------------


def _checked_pattern(pattern: str) -> str:
    given: object = pattern  # callers without types
    if not isinstance(given, str) or not given or len(given) > MAX_PATTERN_CHARS:
        raise errors.InvalidInput(
            f"pattern: {ascii(pattern)[:80]} is no pattern",
            hint=f"1 to {MAX_PATTERN_CHARS} characters, such as 'stale:*'; '*' is everything here",
        )
    if pattern.startswith("claude-flow:"):
        raise errors.InvalidInput(
            f"pattern: {pattern!r} begins with the prefix itself",
            hint=f"patterns are relative to {keys.MEMORY_PREFIX} and cannot leave it",
        )
    try:
        return f"{keys.MEMORY_PREFIX}{pattern}".encode().decode()
    except UnicodeEncodeError:
        raise errors.InvalidInput("pattern: it is no UTF-8", hint="no lone surrogates") from None


def _checked_ttl(ttl_seconds: int) -> int:
    given: object = ttl_seconds  # callers without types
    if type(given) is not int or not 0 <= given <= MAX_TTL_SECONDS:
        raise errors.InvalidInput(
            f"ttl_seconds: {ascii(ttl_seconds)[:80]} is no time to live",
            hint=f"whole seconds from 1 to {MAX_TTL_SECONDS}; 0 = it never expires",
        )
    return given


def _checked_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    given: object = metadata  # callers without types
    if given is None or isinstance(given, dict):
        return given or {}
    raise errors.InvalidInput(
        f"metadata: {ascii(given)[:80]} is no dict", hint="names and values, such as {'by': 'me'}"
    )


def _json(name: str, value: Any) -> bytes:
    try:
        raw = orjson.dumps(value, default=_model_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidInput(
            f"{name}: JSON cannot hold it: {error}",
            hint="strings, numbers, booleans, null, lists, objects with string keys, or a model",
        ) from None
    if len(raw) > MAX_VALUE_BYTES:
        raise errors.InvalidInput(
            f"{name}: its JSON is {len(raw)} bytes, the limit is {MAX_VALUE_BYTES}",
            hint="split it over several keys",
        )
    if b"null" in raw and _has_nan(value):
        raise errors.InvalidInput(
            f"{name}: JSON has no NaN and no infinity", hint="use null, or leave the field out"
        )
    return raw


def _model_json(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")


def _has_nan(value: Any) -> bool:
    """Whether it has a NaN or infinity wherever orjson looks, which writes null for them."""
    if isinstance(value, BaseModel):
        value = value.model_dump()  # not as JSON, which has nulls by then
    elif isinstance(value, Enum):
        value = value.value
    elif is_dataclass(value) and not isinstance(value, type):
        names = (one.name for one in fields(value) if not one.name.startswith("_"))
        return any(_has_nan(getattr(value, name, None)) for name in names)
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(map(_has_nan, value.values()))
    is_text = isinstance(value, str | bytes | bytearray)
    return isinstance(value, Collection) and not is_text and any(map(_has_nan, value))


def _parse(full_key: str, raw: bytes, ttl_s: int) -> MemoryEntry:
    try:
        envelope = orjson.loads(raw)
        return MemoryEntry(
            value=envelope["value"],
            created_at=datetime.fromisoformat(envelope["createdAt"]),
            updated_at=datetime.fromisoformat(envelope["updatedAt"]),
            metadata=envelope.get("metadata") or {},
            ttl_seconds=ttl_s if ttl_s >= 0 else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise errors.MalformedValue(
            f"{full_key}: what is stored there is not the memory service's envelope",
            hint='it must be {"value": …, "createdAt": …, "updatedAt": …}; delete() removes it',
            key=full_key,
        ) from None


def iso_ms(ms: int) -> str:
    """ISO 8601 with milliseconds and Z, as JavaScript's toISOString writes it."""
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


# -- the process's own --------------------------------------------------------------------------

_shared: MemoryService | None = None


def get_memory_service(**settings: Any) -> MemoryService:
    """The process's one memory service; the first call decides its settings.

    Args:
        settings: fields of `Settings`, such as `redis_url`, before the environment's.

    Raises:
        InvalidSetting: there is no such setting, or the service exists with others.
    """
    global _shared  # noqa: PLW0603 - the guide's API has one instance a process
    unknown = settings.keys() - Settings.model_fields.keys()
    if unknown:
        raise errors.InvalidSetting(
            f"{min(unknown)}: there is no such setting",
            hint=f"there is: {', '.join(sorted(Settings.model_fields))}",
        )
    if _shared is None:
        _shared = MemoryService(load_settings(**settings))
    elif settings and load_settings(**settings) != _shared.settings:
        raise errors.InvalidSetting(
            "the memory service of this process has other settings",
            hint="await reset_memory_service() first, or make a MemoryService of your own",
        )
    return _shared


async def reset_memory_service() -> None:
    """Disconnects the process's memory service and forgets it."""
    global _shared
    service, _shared = _shared, None
    if service is not None:
        await service.disconnect()
