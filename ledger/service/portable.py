r"""The file that carries one tenant's record: every entry's id and bytes exactly as stored.

A file is a sequence of records, each an array of byte strings in the Redis protocol's own encoding
(RESP2: `*<count>\r\n`, then `$<bytes>\r\n<bytes>\r\n` for each), so any client library can read it:

1. `govledger-export`, `1`, and a JSON object: `tenant`, `epoch`, `seq`, `entry_id` (the record's
   head), `length` (entries in this file), `incidents`, `exported_at_ms` (the server's clock before
   the head was read, ms since 1970);
2. `incident` and the JSON that the append function wrote, for each, in order;
3. `entry`, the id, and every field and value in stored order, for each, in order;
4. `end` and the SHA-256, in hex, of all bytes before this record. Nothing follows.

A foreign entry is any whose id lies in an incident of the kind `foreign`; it is carried as it is.
The checksum finds damage. It is no signature: who can write the file can write another sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from ledger import errors, keys
from ledger.server import pack
from ledger.stream import Incident, split_id

__all__ = ["MAGIC", "ExportHead", "ExportReader", "ExportWriter", "encode_entry", "entry_record"]

_WORD: Final = b"govledger-export"
MAGIC: Final = b"*3\r\n$16\r\n" + _WORD + b"\r\n"
"""What every file begins with."""

VERSION: Final = b"1"
MAX_RECORD_BYTES: Final = 64 << 20
"""Of one entry, checked at write and at read; ours are a thousandth of it."""

MAX_RECORD_PARTS: Final = 65_536
MAX_INCIDENTS: Final = 1_000_000
MAX_INCIDENT_BYTES: Final = 1024
INCIDENT_KINDS: Final = ("foreign", "missing", "recreated", "moved", "headless")
_LINE_BYTES: Final = 32


class ExportHead(msgspec.Struct, frozen=True):
    """Where the exported record stood."""

    tenant: str
    epoch: str
    seq: int
    entry_id: str
    length: int
    incidents: int
    exported_at_ms: int


def encode_entry(entry_id: bytes, fields: Sequence[bytes]) -> bytes:
    """An entry of any size as it stands in a file: what digests of entries are made of."""
    record = b"*%d\r\n$5\r\nentry\r\n$%d\r\n%b\r\n" % (len(fields) + 2, len(entry_id), entry_id)
    return record + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in fields])


def entry_record(entry_id: bytes, fields: Sequence[bytes]) -> bytes:
    """`encode_entry` of an entry that a file may carry.

    Raises:
        InvalidBackup: it is larger than a file may carry.
    """
    size = sum(map(len, fields))
    if size > MAX_RECORD_BYTES or len(fields) + 2 > MAX_RECORD_PARTS:
        raise errors.InvalidBackup(
            f"entry {entry_id.decode()}: {size} bytes in {len(fields)} fields and values; a file "
            f"carries at most {MAX_RECORD_BYTES} in {MAX_RECORD_PARTS - 2}",
            hint="nobody appended this through govledger: look at it, and XDEL it if it is junk",
        )
    return encode_entry(entry_id, fields)


class ExportWriter:
    """Writes records to an open file, and the checksum at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def head(self, head: ExportHead, incidents: Sequence[bytes]) -> None:
        """The first records."""
        self.raw(pack(_WORD, VERSION, msgspec.json.encode(head)))
        for incident in incidents:
            self.raw(pack(b"incident", incident))

    def raw(self, records: bytes) -> None:
        """Records that are encoded already."""
        self._sha256.update(records)
        self._file.write(records)

    def end(self) -> str:
        """The last record; the SHA-256 of the whole file."""
        self.raw(pack(b"end", self._sha256.hexdigest()))
        return self._sha256.hexdigest()


class ExportReader:
    """Reads a file record by record in constant memory; trusts nothing in it.

    `head` and `incidents` are there from the beginning; `entries` yields the rest, and its end is
    reached only when the checksum is right. Every method raises `InvalidBackup` for a file that is
    not what `portable.py` describes, and the first one `InvalidInput` for what is none at all.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._sha256 = hashlib.sha256()
        self._at = 0
        self.head = self._read_head()
        self.raw_incidents: list[bytes] = []
        self.incidents: list[Incident] = []
        for _ in range(self.head.incidents):
            self._read_incident()

    def entries(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """Id, and fields and values, of each entry in order of the ids."""
        last, tail = (-1, -1), split_id(self.head.entry_id)
        for _ in range(self.head.length):
            kind, *parts = self._record()
            if kind != b"entry" or len(parts) < 3 or len(parts) % 2 == 0:
                raise self._damaged("there should be an entry")
            entry_id = self._checked_id(parts[0].decode("ascii", "replace"))
            if not last < entry_id <= tail:
                raise self._damaged(f"entry {parts[0].decode()} is out of order")
            last = entry_id
            yield parts[0], parts[1:]
        digest = self._sha256.hexdigest().encode()
        if self._record() != [b"end", digest] or self._file.read(1):
            raise self._damaged("its SHA-256 is not that of its content")

    def _read_head(self) -> ExportHead:
        begin = self._file.read(len(MAGIC))
        if begin != MAGIC and not (begin and MAGIC.startswith(begin)):
            raise errors.InvalidInput(
                f"{self._path}: this is no file of `govledger export-ledger`",
                hint="`govledger restore` reads backups and dumps, `govledger append` JSON Lines",
                path=str(self._path),
            )
        self._taken(begin, len(MAGIC))
        version, raw = self._parts(2)
        if version != VERSION:
            raise self._damaged("it is of another version: a newer govledger can read it")
        try:
            head = msgspec.json.decode(raw, type=ExportHead)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(f"its head is damaged: {error}") from None
        self._checked_id(head.entry_id)
        keys.checked_tenant(head.tenant)
        if not (0 <= head.length < 2**53 and 0 <= head.seq < 2**47 and head.exported_at_ms >= 0):
            raise self._damaged("its head counts what cannot be")
        if not 0 <= head.incidents <= MAX_INCIDENTS:
            raise self._damaged(f"it has more than {MAX_INCIDENTS} incidents")
        return head

    def _read_incident(self) -> None:
        record = self._record()
        if len(record) != 2 or record[0] != b"incident":
            raise self._damaged("there should be an incident")
        if len(record[1]) > MAX_INCIDENT_BYTES:
            raise self._damaged("an incident is too long")
        try:
            incident = Incident.parse(record[1])
            for entry_id in (incident.first_id, incident.last_id):
                self._checked_id(entry_id)
        except (ValueError, TypeError, AttributeError):
            raise self._damaged("an incident is damaged") from None
        if incident.kind not in INCIDENT_KINDS:
            raise self._damaged("an incident is of a kind that only a newer govledger can read")
        if not all(
            type(n) is int and 0 <= n < 2**53
            for n in (incident.seq, incident.count, incident.noticed_ms)
        ):
            raise self._damaged("an incident counts what cannot be")
        self.raw_incidents.append(record[1])
        self.incidents.append(incident)

    def _checked_id(self, text: str) -> tuple[int, int]:
        time_ms, dash, seq = text.partition("-")
        digits = time_ms.isascii() and time_ms.isdigit() and seq.isascii() and seq.isdigit()
        if dash and digits and len(text) <= 41:
            entry_id = int(time_ms), int(seq)
            if f"{entry_id[0]}-{entry_id[1]}" == text and max(entry_id) < 2**64:
                return entry_id
        raise self._damaged("an entry id is damaged")

    def _record(self) -> list[bytes]:
        parts = self._parts(self._number(b"*", MAX_RECORD_PARTS))
        if not parts:
            raise self._damaged("a record is empty")
        return parts

    def _parts(self, count: int) -> list[bytes]:
        parts, left = [], MAX_RECORD_BYTES + 4096
        for _ in range(count):
            size = self._number(b"$", left)
            left -= size
            body = self._read(size + 2)
            if body[size:] != b"\r\n":
                raise self._damaged("a record does not end where it should")
            parts.append(body[:size])
        return parts

    def _number(self, sign: bytes, limit: int) -> int:
        line = self._file.readline(_LINE_BYTES)
        self._sha256.update(line)
        self._at += len(line)
        digits = line[1:-2]
        if line[:1] == sign and line[-2:] == b"\r\n" and digits.isdigit() and int(digits) <= limit:
            return int(digits)
        raise self._damaged("it ends too early" if line[-1:] != b"\n" else "a record is damaged")

    def _read(self, size: int) -> bytes:
        return self._taken(self._file.read(size), size)

    def _taken(self, body: bytes, size: int) -> bytes:
        self._sha256.update(body)
        self._at += len(body)
        if len(body) != size:
            raise self._damaged("it ends too early")
        return body

    def _damaged(self, what: str) -> errors.InvalidBackup:
        return errors.InvalidBackup(
            f"{self._path}: {what} (at byte {self._at})",
            hint="take another copy of the file",
            path=str(self._path),
        )
