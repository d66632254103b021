"""The HTTP around a witness: the standard library's server, a thread a connection."""

from __future__ import annotations

import logging
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from ledger.witness import MAX_REQUEST_BYTES, Answer, Witness

__all__ = ["WitnessServer"]

_TIMEOUT_S: Final = 10.0
_log = logging.getLogger("ledger")


class WitnessServer(ThreadingHTTPServer):
    """Answers for one witness at an address; `serve_forever` and `shutdown` as usual."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], witness: Witness) -> None:
        self.witness = witness
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """What clients put before `/add-checkpoint`."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    protocol_version = "HTTP/1.1"  # keep-alive
    timeout = _TIMEOUT_S  # a silent client must not hold its thread

    def do_GET(self) -> None:
        """The latest checkpoint of a log."""
        self._reply(self.server.witness.latest(self.path))

    def do_POST(self) -> None:
        """`/add-checkpoint`."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True  # its body is not read
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if length else HTTPStatus.LENGTH_REQUIRED
            self._reply(Answer(status))
            return
        body = self.rfile.read(int(length))
        if self.path != "/add-checkpoint":
            self._reply(Answer(HTTPStatus.NOT_FOUND))
            return
        try:
            answer = self.server.witness.answer(body)
        except Exception as error:  # noqa: BLE001 - logged; others must be answered still
            _log.error("witness: %s: %s", type(error).__name__, error)
            answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR)
        self._reply(answer)

    def _reply(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's
        """Requests are not logged; what goes wrong is."""
