"""JSON Lines of events, from a file or a pipe, as `govledger append` reads them.

A line is one event as `ledger.event_from_json` takes it, and may have a `tenant` besides. Empty
lines are skipped; a UTF-8 byte order mark and CRLF are tolerated.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

from ledger import errors, keys
from ledger.canonical import checked_from_json, proven
from ledger.events import EVENT_BYTES_LIMIT, CheckedEvent, EncodedEvent

__all__ = ["KEPT_BYTES", "LINE_BYTES_LIMIT", "Line", "LineSplitter", "Source", "event_of"]

LINE_BYTES_LIMIT: Final = 8 * EVENT_BYTES_LIMIT
"""White space and escapes (six bytes a character) make a line longer than its event."""

KEPT_BYTES: Final = 8 * 1024 * 1024
"""Up to this much input is kept in memory as encoded events, which take about twice as much."""

_CHUNK_BYTES: Final = 256 * 1024
_SHOWN_BYTES: Final = 1000
_UTF8_MARK: Final = b"\xef\xbb\xbf"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_ABSENT: Final = object()
_TENANT_FIRST: Final = re.compile(rb'\s*\{\s*"tenant"\s*:\s*"([ !#-\[\]-~]*)"\s*,')


class Line(NamedTuple):
    """`raw` is without its newline; of a line over the limit only the beginning.

    `size` is the line's length in bytes; `ended` says whether a newline came behind it.
    """

    number: int
    raw: bytes
    size: int
    ended: bool


class LineSplitter:
    """Cuts chunks of bytes into lines with their numbers, never holding more than one line."""

    def __init__(self) -> None:
        self._number = 0
        self._rest = b""
        self._dropped_bytes = 0

    def feed(self, chunk: bytes) -> list[Line]:
        """The lines that end in this chunk.

        Raises:
            InvalidInput: the first line is UTF-16.
        """
        pieces = (self._rest + chunk).split(b"\n")
        self._rest = pieces.pop()
        # Only the first can be the beginning of the input, or the end of a line that was cut.
        lines = [line for piece in pieces[:1] if (line := self._line(piece, ended=True))]
        lines += [
            tuple.__new__(Line, (number, piece[:LINE_BYTES_LIMIT], len(piece), True))
            for number, piece in enumerate(pieces[1:], self._number + 1)
            if piece and not piece.isspace()
        ]
        self._number += len(pieces[1:])
        if len(self._rest) > LINE_BYTES_LIMIT:
            self._dropped_bytes += len(self._rest) - _SHOWN_BYTES
            self._rest = self._rest[:_SHOWN_BYTES]
        return lines

    def end(self) -> list[Line]:
        """The last line, where no newline ends it."""
        line, self._rest = self._line(self._rest, ended=False), b""
        return [line] if line else []

    def _line(self, piece: bytes, *, ended: bool) -> Line | None:
        self._number += 1
        if self._number == 1:
            piece = piece.removeprefix(_UTF8_MARK)
            if piece.startswith(_UTF16_MARKS):
                raise errors.InvalidInput(
                    "the input is UTF-16, and JSON Lines are UTF-8",
                    hint="iconv -f UTF-16 -t UTF-8 converts it",
                )
        size, self._dropped_bytes = len(piece) + self._dropped_bytes, 0
        if not piece or piece.isspace():
            return None
        return Line(self._number, piece[:LINE_BYTES_LIMIT], size, ended)


class Source:
    """The bytes of a file or of standard input (`-`); what cannot be read twice is spooled."""

    def __init__(self, name: str) -> None:
        """Raises InvalidInput where the file cannot be opened."""
        self.name = "stdin" if name == "-" else name
        try:
            self._fd = 0 if name == "-" else os.open(name, os.O_RDONLY)
            self._status = os.fstat(self._fd)
        except OSError as error:
            raise _unreadable(self.name, error) from None
        if stat.S_ISDIR(self._status.st_mode):
            raise errors.InvalidInput(f"{name}: is a directory", hint="name a file, or - for stdin")
        self._regular = stat.S_ISREG(self._status.st_mode)
        self._start = os.lseek(self._fd, 0, os.SEEK_CUR) if self._regular else 0
        self._end = self._start
        self._spool: IO[bytes] | None = None

    def close(self) -> None:
        """Gives the file and the spool back; standard input stays open."""
        if self._spool:
            self._spool.close()
        if self._fd:
            os.close(self._fd)

    @property
    def size_bytes(self) -> int | None:
        """Of a regular file; None for a pipe."""
        return self._status.st_size - self._start if self._regular else None

    def is_same_file(self, path: Path) -> bool:
        """Whether writing to `path` would write into this source."""
        return path.exists() and os.path.samestat(path.stat(), self._status)

    async def chunks(self, *, twice: bool) -> AsyncIterator[bytes]:
        """Everything, once; `twice` makes it possible to read it again by `again`.

        Raises:
            InvalidInput: it cannot be read, or spooled.
        """
        if twice and not self._regular:
            # It has no name in the file system, so it is gone when this process is.
            self._spool = tempfile.SpooledTemporaryFile(max_size=KEPT_BYTES)  # noqa: SIM115 - see `close`
        try:
            while chunk := await self._read():
                self._end += len(chunk)
                if self._spool:
                    self._spool.write(chunk)
                yield chunk
        except OSError as error:
            raise _unreadable(self.name, error) from None

    async def _read(self) -> bytes:
        if not self._regular:
            await _readable(self._fd)
        return os.read(self._fd, _CHUNK_BYTES)

    def again(self) -> Iterator[bytes]:
        """The same bytes once more; what was added to a file meanwhile is not among them.

        Raises:
            InvalidInput: it cannot be read.
        """
        at = self._start
        if self._spool:
            self._spool.seek(0)
        try:
            while at < self._end:
                wanted = min(_CHUNK_BYTES, self._end - at)
                chunk = self._spool.read(wanted) if self._spool else os.pread(self._fd, wanted, at)
                if not chunk:
                    raise errors.InvalidInput(f"{self.name}: was cut while it was read")
                at += len(chunk)
                yield chunk
        except OSError as error:
            raise _unreadable(self.name, error) from None


async def _readable(fd: int) -> None:
    """Waits without a thread, which could not be stopped, and without setting O_NONBLOCK, which
    would reach everybody else who has this terminal or pipe.
    """
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # /dev/null and its like are always ready
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _unreadable(name: str, error: OSError) -> errors.InvalidInput:
    hint = "is the path right?" if isinstance(error, FileNotFoundError) else None
    return errors.InvalidInput(f"{name}: {error.strerror or error}", hint=hint)


# -- one line ----------------------------------------------------------------------------------


def event_of(line: Line, tenant: str | None) -> tuple[str, CheckedEvent | EncodedEvent]:
    """Whose event a line is, and the event.

    Args:
        line: the line.
        tenant: the only tenant that the line may name; None takes the one that it names.

    Raises:
        InvalidInput: the line cannot be recorded.
    """
    _, raw, size, ended = line
    # What is an event as it stands has no `tenant`.
    if tenant is not None and size <= LINE_BYTES_LIMIT and (event := proven(raw)):
        return tenant, event
    if size > LINE_BYTES_LIMIT:
        raise errors.InvalidEvent(
            f"the line is {size} bytes; an event is at most {EVENT_BYTES_LIMIT}",
            hint="store large texts elsewhere and record a reference or a hash",
        )
    named, raw = _split_tenant(raw)
    whose = _whose(named, tenant)
    try:
        return whose, checked_from_json(raw)
    except errors.InvalidEvent as error:
        if ended or _is_json(raw):
            raise
        raise errors.InvalidEvent(
            error.message, hint="the input ends inside this line: was it cut off?", **error.facts
        ) from None


def _whose(named: object, tenant: str | None) -> str:
    if tenant is None:
        if named is _ABSENT:
            raise errors.InvalidEvent("tenant: is required with --tenant-from-event")
        return keys.checked_tenant(named)  # type: ignore[arg-type]  # it checks the type as well
    if named not in (_ABSENT, tenant):
        raise errors.InvalidEvent(
            f"tenant: is {ascii(named)[:80]}, and this append is for {tenant!r}",
            hint="--tenant-from-event instead of TENANT lets each line choose",
        )
    return tenant


def _split_tenant(raw: bytes) -> tuple[object, bytes]:
    """The `tenant` of a line, or `_ABSENT`, and the line without it.

    No other value is changed: the parser of the slow way keeps integers and floats exactly.
    """
    first = _TENANT_FIRST.match(raw)
    if first:
        return first[1].decode(), b"{" + raw[first.end() :]
    if b'"tenant"' not in raw:
        return _ABSENT, raw
    try:
        fields = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return _ABSENT, raw  # checked_from_json says what is wrong
    if not isinstance(fields, dict) or "tenant" not in fields:
        return _ABSENT, raw
    return fields.pop("tenant"), json.dumps(fields).encode()


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True
