"""News that a state was published: each `publish` sends a message in the channel of the key's name.

A message may be lost (a broken connection, a cluster's bus), so nobody relies on it: it only makes
others look sooner. One connection to any node has them all: a cluster passes messages on.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from redis import exceptions as redis_errors

from ledger import errors
from ledger.server import Server, pack
from ledger.wire import Wire

__all__ = ["Notices", "happened"]

PING_INTERVAL_S: Final = 0.5
PING_TIMEOUT_S: Final = 2.0
"""A connection that does not answer for so long is given up for a new one."""

RECONNECT_PAUSE_S: Final = 0.5
_log = logging.getLogger("ledger")


async def happened(event: asyncio.Event, timeout_s: float) -> None:
    """Returns when the event is set, or after the time; never at once."""
    # Not `wait_for`, which may swallow a cancellation up to Python 3.11.
    with suppress(TimeoutError):
        async with asyncio.timeout(max(timeout_s, 0.001)):
            await event.wait()


class Notices:
    """A subscription that comes back by itself, on a connection of its own."""

    def __init__(self, server: Server, noticed: Callable[[str], None]) -> None:
        """`noticed`: called with a channel that has news, or may have had some unseen."""
        self._server = server
        self._noticed = noticed
        self._wanted: set[str] = set()
        self._denied: set[str] = set()
        self._changed = asyncio.Event()

    def add(self, channel: str) -> None:
        """Listens to this one too."""
        self._wanted.add(channel)
        self._changed.set()

    def remove(self, channel: str) -> None:
        """Listens to it no longer."""
        self._wanted.discard(channel)
        self._changed.set()

    async def run(self) -> None:
        """Listens until the server object is closed; a connection that breaks is replaced."""
        while not self._server.closed:
            try:
                async with self._server.own_wire("") as wire:
                    wire.pushed = self._pushed
                    await self._listen(wire)
            except (errors.LedgerError, redis_errors.RedisError, OSError) as error:
                _log.debug("notices: %s", error)
            await asyncio.sleep(random.uniform(0.5, 1) * RECONNECT_PAUSE_S)  # noqa: S311 - jitter

    async def _listen(self, wire: Wire) -> None:
        heard: set[str] = set()
        while True:
            self._changed.clear()
            for channel in self._wanted - heard - self._denied:
                await self._subscribe(wire, channel)
                heard.add(channel)
                self._noticed(channel)  # for what came before
            for channel in heard - self._wanted:
                packed = pack("UNSUBSCRIBE", channel) + pack("PING")
                await wire.exchange(packed, 1, PING_TIMEOUT_S)
                heard.discard(channel)
            await wire.exchange(pack("PING"), 1, PING_TIMEOUT_S)
            await happened(self._changed, PING_INTERVAL_S)

    async def _subscribe(self, wire: Wire, channel: str) -> None:
        # What answers a SUBSCRIBE is a push; only a refusal is a reply, which comes before PING's.
        packed = pack("SUBSCRIBE", channel) + pack("PING")
        (reply,) = await wire.exchange(packed, 1, PING_TIMEOUT_S)
        if isinstance(reply, Exception):
            self._denied.add(channel)
            _log.warning(
                "no news of %s, so its states are noticed later: %s; grant the ACL's +subscribe "
                "and &%s",
                *(channel, reply, channel),
            )
            raise reply

    def _pushed(self, push: list[Any]) -> None:
        if push[0] == b"message":
            self._noticed(push[1].decode(errors="replace"))
