"""The ledger for notebooks and synchronous engines: `Ledger`'s methods, without await.

A facade over an event loop in a thread of its own (anyio's "portal" pattern); it has no logic.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from datetime import datetime
from typing import Any, Final, Self, TypeVar

from ledger import errors
from ledger.append import Durability, Receipt
from ledger.events import Event
from ledger.ledger import Ledger as AsyncLedger
from ledger.memory import CleanedUp, MemoryEntry, MemoryService
from ledger.settings import Settings
from ledger.stream import Entry, Head

__all__ = ["Ledger"]

T = TypeVar("T")

_REPLAY_AT_ONCE: Final = 500
"""A hop between threads costs more than an entry; who follows waits for each."""


class Ledger:
    """`ledger.Ledger` for callers without an event loop; use it with `with`, from any thread."""

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        durability: Durability | str | None = None,
    ) -> None:
        """As `ledger.Ledger.connect`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._ledger = self._run(_opened(url, settings, durability))
        except BaseException:
            self._stop()
            raise

    @classmethod
    def connect(cls, url: str | None = None, **options: Any) -> Self:
        """As `ledger.Ledger.connect`."""
        return cls(url, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As `ledger.Ledger.aclose`."""
        try:
            self._run(self._ledger.aclose())
        finally:
            self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def wrapped(self) -> AsyncLedger:
        """The ledger that lives on this one's event loop; use it with `run` alone."""
        return self._ledger

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on this ledger's event loop, and waits for it."""
        return self._run(work)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def append(self, tenant: str, event: Event, **options: Any) -> Receipt:
        """As `ledger.Ledger.append`."""
        receipt: Receipt = self._run(self._ledger.append(tenant, event, **options))
        return receipt

    def append_many(self, tenant: str, events: Sequence[Event], **options: Any) -> list[Receipt]:
        """As `ledger.Ledger.append_many`."""
        return self._run(self._ledger.append_many(tenant, events, **options))

    def replay(
        self,
        tenant: str,
        *,
        after: int = 0,
        until: int | None = None,
        since: datetime | None = None,
        to: datetime | None = None,
    ) -> Iterator[Entry]:
        """As `ledger.Ledger.replay`."""
        entries = self._ledger.replay(tenant, after=after, until=until, since=since, to=to)
        return self._pulled(entries, _REPLAY_AT_ONCE)

    def follow(self, tenant: str, *, after: int | None = None) -> Iterator[Entry]:
        """As `ledger.Ledger.follow`; waits in `next()`."""
        return self._pulled(self._ledger.follow(tenant, after=after), 1)

    def _pulled(self, entries: AsyncGenerator[Entry, None], at_once: int) -> Iterator[Entry]:
        error: errors.LedgerError | None = None
        try:
            while error is None:
                chunk, error = self._run(_chunk(entries, at_once))
                yield from chunk
                if not chunk:
                    break
            if error is not None:
                raise error
        finally:
            self._run(entries.aclose())

    def head(self, tenant: str) -> Head:
        """As `ledger.Ledger.head`."""
        return self._run(self._ledger.head(tenant))

    def get(self, tenant: str, event_id: str) -> Entry:
        """As `ledger.Ledger.get`."""
        return self._run(self._ledger.get(tenant, event_id))

    def get_seq(self, tenant: str, seq: int) -> Entry:
        """As `ledger.Ledger.get_seq`."""
        return self._run(self._ledger.get_seq(tenant, seq))

    def tenants(self) -> list[str]:
        """As `ledger.Ledger.tenants`."""
        return self._run(self._ledger.tenants())

    @property
    def memory(self) -> Memory:
        """As `ledger.Ledger.memory`."""
        return Memory(self._ledger.memory, self._run)

    def reindex(self, tenant: str, on_progress: Callable[[int], None] | None = None) -> int:
        """As `ledger.Ledger.reindex`."""
        return self._run(self._ledger.reindex(tenant, on_progress))


class Memory:
    """`ledger.memory.MemoryService` for callers without an event loop."""

    def __init__(
        self, service: MemoryService, run: Callable[[Coroutine[Any, Any, Any]], Any]
    ) -> None:
        self._service = service
        self._run = run

    def set(self, key: str, value: Any, ttl_seconds: int | None = None, **options: Any) -> None:
        """As `MemoryService.set`."""
        self._run(self._service.set(key, value, ttl_seconds, **options))

    def get(self, key: str, model: type[Any] | None = None) -> Any:
        """As `MemoryService.get`."""
        return self._run(self._service.get(key, model) if model else self._service.get(key))

    def get_entry(self, key: str) -> MemoryEntry | None:
        """As `MemoryService.get_entry`."""
        entry: MemoryEntry | None = self._run(self._service.get_entry(key))
        return entry

    def delete(self, key: str) -> bool:
        """As `MemoryService.delete`."""
        return bool(self._run(self._service.delete(key)))

    def exists(self, key: str) -> bool:
        """As `MemoryService.exists`."""
        return bool(self._run(self._service.exists(key)))

    def expire(self, key: str, ttl_seconds: int) -> bool:
        """As `MemoryService.expire`."""
        return bool(self._run(self._service.expire(key, ttl_seconds)))

    def keys(self, pattern: str = "*") -> list[str]:
        """As `MemoryService.keys`."""
        found: list[str] = self._run(self._service.keys(pattern))
        return found

    def cleanup(self, pattern: str, *, dry_run: bool = False) -> CleanedUp:
        """As `MemoryService.cleanup`."""
        done: CleanedUp = self._run(self._service.cleanup(pattern, dry_run=dry_run))
        return done


async def _opened(
    url: str | None, settings: Settings | None, durability: Durability | str | None
) -> AsyncLedger:
    opened: AsyncLedger = await AsyncLedger.connect(url, settings=settings, durability=durability)
    return opened


async def _chunk(
    entries: AsyncGenerator[Entry, None], limit: int
) -> tuple[list[Entry], errors.LedgerError | None]:
    """Up to `limit` entries, and the error that ended them: what lies before a hole counts."""
    chunk: list[Entry] = []
    try:
        async for entry in entries:
            chunk.append(entry)
            if len(chunk) == limit:
                break
    except errors.LedgerError as error:
        return chunk, error
    return chunk, None
