"""An entry's bytes in the evidence tree: pure; FORMAT.md has them byte by byte, with vectors.

    leaf data = b"govledger leaf 1" ‖ str(origin) ‖ str(entry id) ‖ u32(fields) ‖ field…
    field     = str(name) ‖ 0x00 ‖ str(value)         any field but `data`
              = str(name) ‖ 0x01 ‖ SHA-256(value)     each field named `data`
    str(x)    = u32(length of x) ‖ x;  u32 is 4 bytes, big-endian

Every field of the stream entry is in it, in stored order, however often it is there. Of `data` it
is the digest, so that a decision's data can be erased by law and all proofs still hold.

An *entry record*, which proofs carry, is the same with b"govledger data 1" in front and each `data`
either in full (0x00, as other fields) or, where it is withheld, as its digest (0x01).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ledger.errors import NotProved

__all__ = ["EntryRecord", "leaf_data", "leaf_hasher"]

LEAF: Final = b"govledger leaf 1"
RECORD: Final = b"govledger data 1"
DATA: Final = b"data"
IN_FULL: Final = 0
DIGEST: Final = 1
MAX_FIELDS: Final = 1 << 20
"""What a server takes of one command; `prove` reads back what it writes, so no proof has more."""

_SHORT: Final = 1024

_u32 = struct.Struct(">I")
_LENGTHS: Final = [_u32.pack(n) for n in range(_SHORT)]
_sha256 = hashlib.sha256


def _str(value: bytes) -> bytes:
    return _u32.pack(len(value)) + value


def leaf_data(origin: str, entry_id: bytes, fields: Sequence[bytes]) -> bytes:
    """The leaf of a stream entry; `fields` is name, value, name, value… as stored."""
    parts = [LEAF, _str(origin.encode()), _str(entry_id), _u32.pack(len(fields) // 2)]
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        parts.append(_str(name))
        if name == DATA:
            parts += [b"\x01", _sha256(value).digest()]
        else:
            parts += [b"\x00", _str(value)]
    return b"".join(parts)


def leaf_hasher(origin: str) -> Callable[[bytes, Sequence[bytes]], bytes]:
    """`leaf_hash(leaf_data(origin, …))`, at twice the speed for entries of the usual shape."""
    begin = b"\x00" + LEAF + _str(origin.encode())
    types: dict[bytes, bytes] = {}
    lengths, sha256 = _LENGTHS, _sha256
    before_data = _str(DATA) + b"\x01"

    def hashed(entry_id: bytes, fields: Sequence[bytes]) -> bytes:
        if len(fields) == 6:
            type_name, kind, id_name, event_id, data_name, data = fields
            if (
                type_name == b"type"
                and id_name == b"id"
                and data_name == b"data"
                and len(event_id) < _SHORT
            ):
                middle = types.get(kind)
                if middle is None:
                    middle = _u32.pack(3) + _str(b"type") + b"\x00" + _str(kind)
                    middle += _str(b"id") + b"\x00"
                    if len(types) < _SHORT:
                        types[kind] = middle
                return sha256(
                    b"%b%b%b%b%b%b%b%b"
                    % (
                        begin,
                        lengths[len(entry_id)],
                        entry_id,
                        middle,
                        lengths[len(event_id)],
                        event_id,
                        before_data,
                        sha256(data).digest(),
                    )
                ).digest()
        return sha256(b"\x00" + leaf_data(origin, entry_id, fields)).digest()

    return hashed


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """An entry as a proof carries it: `fields` are name, digest or not, value, in stored order."""

    origin: str
    entry_id: bytes
    fields: tuple[tuple[bytes, bool, bytes], ...]

    @classmethod
    def of(cls, origin: str, entry_id: bytes, fields: Sequence[bytes]) -> EntryRecord:
        """From what the stream has."""
        pairs = zip(fields[::2], fields[1::2], strict=True)
        return cls(origin, entry_id, tuple((name, False, value) for name, value in pairs))

    def without_data(self) -> EntryRecord:
        """The same entry with its data withheld: the digest is in its place."""
        fields = [
            (name, name == DATA, value if digest or name != DATA else _sha256(value).digest())
            for name, digest, value in self.fields
        ]
        return EntryRecord(self.origin, self.entry_id, tuple(fields))

    def leaf_data(self) -> bytes:
        """The leaf that this entry has in the tree."""
        return self.without_data().encode(LEAF)

    def encode(self, begin: bytes = RECORD) -> bytes:
        """The record's bytes."""
        parts = [begin, _str(self.origin.encode()), _str(self.entry_id)]
        parts.append(_u32.pack(len(self.fields)))
        for name, digest, value in self.fields:
            parts += [_str(name), bytes([digest]), value if digest else _str(value)]
        return b"".join(parts)

    @classmethod
    def decode(cls, raw: bytes) -> EntryRecord:
        """The record that `encode` wrote.

        Raises:
            NotProved: these are not the bytes of one.
        """
        read = _Reader(raw)
        if read.take(len(RECORD)) != RECORD:
            raise _malformed("it does not begin as an entry record does")
        try:
            origin = read.str().decode()
        except UnicodeDecodeError:
            raise _malformed("its origin is no UTF-8") from None
        entry_id, fields = read.str(), []
        count = read.u32()
        if count > MAX_FIELDS:
            raise _malformed(f"{count} fields, at most {MAX_FIELDS} are read")
        for _ in range(count):
            name, kind = read.str(), read.take(1)[0]
            if kind not in (IN_FULL, DIGEST) or (kind == DIGEST and name != DATA):
                raise _malformed(f"field {name!r} is of the unknown kind {kind}")
            value = read.take(32) if kind == DIGEST else read.str()
            fields.append((name, kind == DIGEST, value))
        if read.at != len(raw):
            raise _malformed("bytes follow its end")
        return cls(origin, entry_id, tuple(fields))

    def value(self, name: bytes) -> bytes | None:
        """The first field's value in full; None where there is none or it is withheld."""
        return next((v for n, digest, v in self.fields if n == name and not digest), None)


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def take(self, count: int) -> bytes:
        part = self.raw[self.at : self.at + count]
        if len(part) != count:
            raise _malformed("it ends too early")
        self.at += count
        return part

    def u32(self) -> int:
        number: int = _u32.unpack(self.take(4))[0]
        return number

    def str(self) -> bytes:
        return self.take(self.u32())


def _malformed(why: str) -> NotProved:
    return NotProved(f"entry record: {why}", reason="malformed")
