"""A TCP proxy in front of a real server: counts round trips, loses replies, goes silent."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from tests.servers import Server

__all__ = ["Proxy"]


class Proxy:
    """`async with Proxy(server) as proxy`: connect to `proxy.url`.

    `requests` has what clients sent, one item a round trip: bytes that followed a reply begin a
    new one. `lose_reply_to` names bytes: the next request that has them is executed by the server,
    and its reply is lost with the connection. While `silent`, no reply gets through.
    `takes_over`: the server that answers behind this address once a reply was lost.
    """

    def __init__(self, server: Server) -> None:
        self.requests: list[bytes] = []
        self.lose_reply_to: bytes | None = None
        self.lost = asyncio.Event()
        self.silent = False
        self.takes_over: Server | None = None
        self._port = server.port
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listener.wait_closed()

    def requests_with(self, part: bytes) -> list[bytes]:
        """The round trips whose request has these bytes."""
        return [request for request in self.requests if part in request]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, up_writer]
        turn = _Turn()
        with suppress(ConnectionError):
            await asyncio.gather(
                self._requests(reader, up_writer, turn), self._replies(up_reader, writer, turn)
            )

    async def _requests(
        self, reader: asyncio.StreamReader, up: asyncio.StreamWriter, turn: _Turn
    ) -> None:
        while data := await reader.read(1 << 20):
            if turn.replied:
                turn.replied, turn.at = False, len(self.requests)
                self.requests.append(b"")
            self.requests[turn.at] += data
            if self.lose_reply_to is not None and self.lose_reply_to in self.requests[turn.at]:
                self.lose_reply_to, turn.lost = None, True
            up.write(data)
        up.close()

    async def _replies(
        self, reader: asyncio.StreamReader, down: asyncio.StreamWriter, turn: _Turn
    ) -> None:
        while data := await reader.read(1 << 20):
            turn.replied = True
            if turn.lost:
                if self.takes_over:
                    self._port = self.takes_over.port
                self.lost.set()
                break
            if not self.silent:
                down.write(data)
        down.close()


class _Turn:
    """Where one connection stands between request and reply."""

    def __init__(self) -> None:
        self.replied = True
        self.lost = False
        self.at = 0
