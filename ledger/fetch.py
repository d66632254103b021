"""One HTTP request and its whole answer by a deadline; blocks.

urllib's own timeout is that of each read: a peer that sends a byte now and then holds it for ever.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from contextlib import closing, suppress
from functools import partial
from typing import Any

__all__ = ["fetch"]


def fetch(url: str, body: bytes | None, *, timeout_s: float, max_bytes: int) -> tuple[int, bytes]:
    """The status and the first `max_bytes` of the answer to a GET, or with a body to a POST.

    Raises:
        OSError, ValueError, http.client.HTTPException: there is no answer, or none in time.
    """
    request = urllib.request.Request(url, data=body)  # noqa: S310 - `_opener` knows http(s) alone
    with closing(_Deadline(timeout_s)) as deadline:
        try:
            found = _answer(_opener(deadline), request, timeout_s, max_bytes)
        except (OSError, http.client.HTTPException):
            deadline.check()
            raise
        deadline.check()  # a body that is cut off ends like any other
        return found


def _answer(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    timeout_s: float,
    max_bytes: int,
) -> tuple[int, bytes]:
    try:
        with opener.open(request, timeout=timeout_s) as reply:
            return reply.status, reply.read(max_bytes)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(max_bytes)


class _Deadline:
    """Shuts the connections that it watches when the time is over."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._watched: list[socket.socket] = []
        self._passed = threading.Event()
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, connected: socket.socket) -> None:
        self._watched.append(connected.dup())  # TLS takes the socket itself away
        if self._passed.is_set():
            self._end()

    def check(self) -> None:
        if self._passed.is_set():
            raise TimeoutError(f"no whole answer within {self._timeout_s} s")

    def close(self) -> None:
        self._timer.cancel()
        for one in self._watched:
            one.close()

    def _end(self) -> None:
        self._passed.set()
        for one in self._watched:
            with suppress(OSError):  # it has ended by itself
                one.shutdown(socket.SHUT_RDWR)


class _Plain(http.client.HTTPConnection):
    def __init__(self, *args: Any, deadline: _Deadline, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline = deadline

    def connect(self) -> None:
        super().connect()
        self._deadline.watch(self.sock)


class _Tls(http.client.HTTPSConnection, _Plain):
    """Connects as `_Plain` does, then shakes hands."""


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Plain, deadline=self._deadline), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Tls, deadline=self._deadline), req)


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Handler(deadline),
    ):
        opener.add_handler(handler)
    return opener
