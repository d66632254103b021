"""One connection's bytes, once redis-py has opened it; and the idle ones to one address.

redis-py opens a connection: address, TLS, authentication, protocol version, Sentinel. From then on
requests and replies go past its streams: what a reply costs there is most of what an append costs.
Replies come in the order of the requests, so several may be on their way at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import hiredis
from redis import exceptions as redis_errors
from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection

__all__ = ["Pool", "Wire"]

Answered = Callable[[list[Any] | None, Exception | None], None]
"""What is called with a request's replies, error replies among them, or with why none came."""

_NOT_ENOUGH: Final = object()
_CALL_BYTES: Final = 1024 * 1024
_log = logging.getLogger("ledger")


class Wire(asyncio.Protocol):
    """An open connection. Made by `Pool.open`; of no use any more once it is `closed`."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.closed = False
        self.pushed: Callable[[list[Any]], None] | None = None
        """Takes what the server says unasked, such as a channel's messages."""
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        # redis-py has no public way to it; the tests on every server kind notice when it moves.
        writer = connection._writer  # noqa: SLF001
        assert writer is not None
        self._transport = cast("asyncio.Transport", writer.transport)
        self._before = self._transport.get_protocol()
        self._reader = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse,
            replyError=BaseParser.parse_error,
            notEnoughData=_NOT_ENOUGH,
        )
        self._asked: deque[tuple[int, Answered, float]] = deque()
        self._replies: list[Any] = []
        self._watch: asyncio.TimerHandle | None = None
        self._transport.set_protocol(self)
        self._transport.resume_reading()
        _fit_a_call(self._transport.get_extra_info("socket"))
        self.address = (getattr(connection, "host", None), getattr(connection, "port", None))
        """Host and port that redis-py connected to; None for a socket in the file system."""
        reader = connection._reader  # noqa: SLF001 - as above
        if self._transport.is_closing() or (reader is not None and reader.at_eof()):
            self.abort()  # it ended before it was ours, and nobody would tell us

    @property
    def busy(self) -> bool:
        """Whether a reply is still to come."""
        return bool(self._asked)

    def request(self, packed: bytes, replies: int, answered: Answered, timeout_s: float) -> None:
        """Sends packed commands; `answered` is called once, from the event loop.

        After `timeout_s` without the replies the connection is given up, with all that is asked.
        """
        if self.closed:
            error = redis_errors.ConnectionError("the connection is closed")
            self._loop.call_soon(answered, None, error)
            return
        deadline_s = self._loop.time() + timeout_s
        self._asked.append((replies, answered, deadline_s))
        if self._watch is None or deadline_s < self._watch.when():
            self._watch_until(deadline_s)
        self._transport.write(packed)

    async def exchange(self, packed: bytes, replies: int, timeout_s: float) -> list[Any]:
        """Sends packed commands and returns their replies; raises OSError or RedisError.

        A cancelled one leaves the connection closed, since nobody would wait for the replies.
        """
        done: asyncio.Future[list[Any]] = self._loop.create_future()
        self.request(packed, replies, partial(_settle, done), timeout_s)
        try:
            return await done
        except asyncio.CancelledError:
            self.abort()
            raise

    def abort(self, error: Exception | None = None) -> None:
        """Closes at once; what is asked gets the error."""
        self._transport.abort()
        self._ended(error)

    # -- asyncio.Protocol ---------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Hands out the replies that are whole."""
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOT_ENOUGH:
                if isinstance(reply, hiredis.PushNotification):
                    if self.pushed is not None:
                        self.pushed(reply)
                    continue  # nobody's reply
                self._replies.append(reply)
                if self._asked and len(self._replies) == self._asked[0][0]:
                    _, answered, _ = self._asked.popleft()
                    got, self._replies = self._replies, []
                    _tell(answered, got, None)
        except redis_errors.InvalidResponse as error:
            self.abort(error)
        if self._replies and not self._asked:
            self.abort(redis_errors.InvalidResponse("a reply that nobody asked for"))

    def connection_lost(self, exc: Exception | None) -> None:
        """What is asked will not be answered."""
        self._before.connection_lost(exc)  # redis-py waits for it when it disconnects
        self._ended(exc)

    def _ended(self, error: Exception | None) -> None:
        if self.closed:
            return
        self.closed = True
        if self._watch:
            self._watch.cancel()
        self._connection._close()  # type: ignore[no-untyped-call]  # noqa: SLF001 - it does not wait
        error = error or redis_errors.ConnectionError("Connection closed by server.")
        while self._asked:
            _tell(self._asked.popleft()[1], None, error)

    # -- one timer for all that is asked --------------------------------------------------------

    def _watch_until(self, deadline_s: float) -> None:
        if self._watch:
            self._watch.cancel()
        self._watch = self._loop.call_at(deadline_s, self._look)

    def _look(self) -> None:
        self._watch = None
        if not self._asked:
            return
        deadline_s = min(deadline_s for _, _, deadline_s in self._asked)
        if deadline_s > self._loop.time():
            self._watch_until(deadline_s)
        else:
            self.abort(redis_errors.TimeoutError("Timeout: no reply in time"))


def _tell(answered: Answered, replies: list[Any] | None, error: Exception | None) -> None:
    """A defect of one who asked must not reach the connection, or the others."""
    try:
        answered(replies, error)
    except Exception:  # noqa: BLE001 - logged
        _log.exception("a defect where a reply was awaited")


def _fit_a_call(endpoint: socket.socket) -> None:
    """Lets a whole call go out in one write. A Unix socket's buffer does not grow by itself, and
    the server would wait each time for our loop to come round to the rest.
    """
    if endpoint.family == socket.AF_UNIX:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CALL_BYTES)


def _settle(
    done: asyncio.Future[list[Any]], replies: list[Any] | None, error: Exception | None
) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        assert replies is not None
        done.set_result(replies)


class Pool:
    """The idle connections to one address."""

    def __init__(self, make: Callable[[], AbstractConnection]) -> None:
        """`make`: a connection of redis-py's, not opened yet."""
        self._make = make
        self._idle: list[Wire] = []
        self._lent: set[Wire] = set()
        self._outdated: set[Wire] = set()
        self._closed = False

    def take(self) -> Wire | None:
        """An idle connection, where there is one."""
        while self._idle:
            wire = self._idle.pop()
            if not wire.closed:
                self._lent.add(wire)
                return wire
        return None

    async def open(self) -> Wire:
        """A new connection; raises OSError or RedisError."""
        connection = self._make()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        wire = Wire(connection)
        self._lent.add(wire)
        return wire

    def give(self, wire: Wire) -> None:
        """Takes a connection back."""
        self._lent.discard(wire)
        if self._closed or wire.busy or wire in self._outdated:
            self._outdated.discard(wire)
            wire.abort()
        elif not wire.closed:
            self._idle.append(wire)

    def renew(self, *, keep: Wire) -> None:
        """The address leads elsewhere now: closes what was opened before, or when it comes back."""
        self._outdated = self._lent - {keep}
        self.drop_idle()

    def drop_idle(self) -> None:
        """Closes those that nobody uses now."""
        while self._idle:
            self._idle.pop().abort()

    def close(self) -> None:
        """Closes those that nobody uses now, and the others when they come back."""
        self._closed = True
        self.drop_idle()
