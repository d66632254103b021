"""The HTTP around a witness: the standard library's server, a thread a connection.

Anybody may connect, so everything has a bound: connections, how long they are kept, the bytes of a
request, and the time that one takes from its first byte, or from the answer before, to its end.
"""

from __future__ import annotations

import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from ledger.witness import MAX_REQUEST_BYTES, Answer, Witness

__all__ = ["WitnessServer"]

_TIMEOUT_S: Final = 10.0
_MAX_AGE_S: Final = 60.0
_MAX_CONNECTIONS: Final = 128
_LENGTH: Final = re.compile(r"[0-9]{1,19}")
_BUSY: Final = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_log = logging.getLogger("ledger")


class WitnessServer(ThreadingHTTPServer):
    """Answers for one witness at an address; `serve_forever` and `shutdown` as usual."""

    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(
        self,
        address: tuple[str, int],
        witness: Witness,
        *,
        timeout_s: float = _TIMEOUT_S,
        max_age_s: float = _MAX_AGE_S,
        max_connections: int = _MAX_CONNECTIONS,
    ) -> None:
        self.witness = witness
        self.max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._max = max_connections
        self._until: dict[socket.socket, float] = {}
        self._changing = threading.Lock()
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """What clients put before `/add-checkpoint`."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    # -- bounds -------------------------------------------------------------------------------

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or 503 where there are too many."""
        with self._changing:
            full = len(self._until) >= self._max
            if not full:
                self._until[request] = time.monotonic() + self._timeout_s
        if full:
            with suppress(OSError):
                request.sendall(_BUSY)
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def begin_again(self, request: socket.socket) -> None:
        """The connection's next request has all of its time."""
        with self._changing:
            if request in self._until:
                self._until[request] = time.monotonic() + self._timeout_s

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        with self._changing:
            self._until.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Shuts the connections whose time is over; `serve_forever` calls it again and again."""
        now = time.monotonic()
        with self._changing:
            for request in [one for one, until in self._until.items() if until < now]:
                del self._until[request]
                with suppress(OSError):  # it has ended by itself
                    request.shutdown(socket.SHUT_RDWR)  # so its thread reads the end, and ends

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line in the log: clients come and go as they please."""
        del request
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        _log.log(level, "witness: %s: %s: %s", client_address[0], type(error).__name__, error)


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Begins a connection."""
        self._begun_s = time.monotonic()
        super().setup()

    def do_GET(self) -> None:
        """The latest checkpoint of a log."""
        length = self._length()
        if length:
            self._refuse(HTTPStatus.BAD_REQUEST)  # a body would be read as the next request
        elif length is not None:
            self._reply(lambda: self.server.witness.latest(self.path))

    def do_POST(self) -> None:
        """`/add-checkpoint`."""
        length = self._length()
        if length is None:
            return
        if "Content-Length" not in self.headers:
            self._refuse(HTTPStatus.LENGTH_REQUIRED)
        elif length > MAX_REQUEST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif len(body := self.rfile.read(length)) < length:
            self.close_connection = True
        elif self.path != "/add-checkpoint":
            self._reply(lambda: Answer(HTTPStatus.NOT_FOUND))
        else:
            self._reply(lambda: self.server.witness.answer(body))

    def _length(self) -> int | None:
        """Of the body; None where that cannot be told for sure, and is refused."""
        lengths = self.headers.get_all("Content-Length", ["0"])
        if self.headers.defects:  # the parser gave up: a length may stand in what it left out
            self._refuse(HTTPStatus.BAD_REQUEST)
        elif "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.NOT_IMPLEMENTED)
        elif len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
            self._refuse(HTTPStatus.BAD_REQUEST)
        else:
            return int(lengths[0])
        return None

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # what follows is not read
        self._reply(lambda: Answer(status))

    def _reply(self, work: Callable[[], Answer]) -> None:
        try:
            answer = work()
        except Exception as error:  # noqa: BLE001 - logged; others must be answered still
            _log.error("witness: %s: %s", type(error).__name__, error)
            answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR)
        if time.monotonic() - self._begun_s >= self.server.max_age_s:
            self.close_connection = True  # others may be waiting for its place
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)
        self.server.begin_again(self.connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's
        """Requests are not logged; what goes wrong is."""
