"""Proofs as files: what they say, and whether it is true. Pure: no Redis, no network.

Three kinds, told apart by their first line:

    c2sp.org/tlog-proof@v1       one entry is in the log (C2SP tlog-proof); the entry is its `extra`
    govledger/range-proof@1      these entries, and no others between them, are in the log
    old <size>                   a later checkpoint continues an earlier one: the body of C2SP
                                 tlog-witness's add-checkpoint request
"""

from __future__ import annotations

import base64
import binascii
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from typing import BinaryIO, Final, overload

from ledger.errors import InvalidInput, NotProved
from ledger.leaf import EntryRecord
from ledger.merkle import (
    MAX_PROOF_HASHES,
    check_consistency,
    leaf_hash,
    root_from_inclusion,
    root_from_range,
)
from ledger.note import (
    COSIGNATURE,
    ED25519,
    MAX_NOTE_BYTES,
    Checkpoint,
    Note,
    Signature,
    VerifierKey,
    b64,
    checked_hash,
    parse_size,
    signers,
)

__all__ = [
    "ConsistencyProof",
    "InclusionProof",
    "Proof",
    "Proved",
    "RangeProof",
    "check_time",
    "parse_proof",
    "read_proof",
]

INCLUSION: Final = "c2sp.org/tlog-proof@v1"
_EXTRA: Final = b"extra "
RANGE: Final = "govledger/range-proof@1"
MAX_PROOF_BYTES: Final = 1 << 20
"""Of a continuation, which has no entry in it."""

MAX_ENTRY_BYTES: Final = 128 << 20
"""Of one entry's proof: a foreign entry may be large."""

MAX_RANGE_BYTES: Final = 1 << 30
MAX_RANGE_ENTRIES: Final = 100_000
_MAX_LINE_BYTES: Final = 1000
"""Of all lines that have no entry in them."""

_MIN_RECORD_BYTES: Final = len(b64(EntryRecord("", b"", ()).encode()))
_ENTRY_ID: Final = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")


@dataclass(frozen=True, slots=True)
class Proved:
    """What a proof has shown: entries `first_seq` on, of a log of `checkpoint.size` entries."""

    checkpoint: Checkpoint
    first_seq: int
    entries: Sequence[EntryRecord]
    cosignatures: tuple[Signature, ...]
    """Of the trusted witnesses."""

    old: Checkpoint | None = None
    """The checkpoint that `checkpoint` continues, for a consistency proof."""

    @property
    def last_seq(self) -> int:
        """The last entry's."""
        return self.first_seq + len(self.entries) - 1

    def seqs_between(self, first: int | None, last: int | None) -> range:
        """The seqs `first` to `last`, all of which are here; None = to that end of the log.

        Raises:
            NotProved: some are not, with the reason `incomplete`.
        """
        wanted = range(
            1 if first is None else first, (self.checkpoint.size if last is None else last) + 1
        )
        if not wanted or wanted[0] < self.first_seq or wanted[-1] > self.last_seq:
            raise NotProved(
                f"seq {wanted.start} to {wanted.stop - 1} is asked for, the proof has "
                f"{self.first_seq} to {self.last_seq} of {self.checkpoint.size}",
                reason="incomplete",
            )
        return wanted

    def seqs_recorded(self, since_ms: int | None, to_ms: int | None) -> range:
        """The seqs of all entries of this log that were recorded in a time, perhaps none.

        Ids grow along a log, and begin with the time. So there are no others in that time where an
        entry before it and one behind it stand here too, or the log begins or ends there.

        Args:
            since_ms: the first ms of it, since 1970; None = since the log's beginning.
            to_ms: the last ms; None = to its end.

        Raises:
            NotProved: others may be missing (`incomplete`), or ids do not grow (`out-of-order`).
            InvalidInput: the time ends before it begins.
        """
        check_time(since_ms, to_ms)
        ids = [_id_of(entry) for entry in self.entries]
        if any(one >= following for one, following in pairwise(ids)):
            raise NotProved("the entries' ids do not grow", reason="out-of-order")
        times = [ms for ms, _ in ids]
        earlier = 0 if since_ms is None else sum(ms < since_ms for ms in times)
        later = 0 if to_ms is None else sum(ms > to_ms for ms in times)
        begun = earlier or self.first_seq == 1
        ended = later or self.last_seq == self.checkpoint.size
        if not times or not begun or not ended:
            side, seq = ("behind", self.last_seq) if begun else ("before", self.first_seq)
            raise NotProved(
                f"not all of that time is here: {side} seq {seq} of {self.checkpoint.size} there "
                "may be more",
                reason="incomplete",
            )
        return range(self.first_seq + earlier, self.last_seq + 1 - later)


def check_time(since_ms: int | None, to_ms: int | None) -> None:
    """That a time has something in it: of nothing, everything would be proved.

    Raises:
        InvalidInput: it ends before it begins.
    """
    if since_ms is not None and to_ms is not None and to_ms < since_ms:
        raise InvalidInput(
            "range: it ends before it begins", hint="write A..B with A no later than B"
        )


def _id_of(entry: EntryRecord) -> tuple[int, int]:
    found = _ENTRY_ID.fullmatch(entry.entry_id)
    if found is None:
        raise NotProved(f"{entry.entry_id[:60]!r} is no entry id", reason="malformed")
    return int(found[1]), int(found[2])


def _malformed(why: str) -> NotProved:
    return NotProved(f"proof: {why}", reason="malformed")


class _Lines:
    """A proof's lines one by one, and no more bytes than its kind may have."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream = stream
        self.read = 0
        self._limit = limit

    def next(self, most: int = _MAX_LINE_BYTES) -> bytes:
        """A line of up to `most` bytes."""
        line = self.stream.readline(min(self._limit - self.read, most) + 1)
        self.read += len(line)
        if self.read > self._limit:
            raise _malformed(f"more than {self._limit} bytes; so many are read at most")
        if len(line) > most:
            raise _malformed(f"a line of more than {most} bytes where no longer one can be")
        if not line.endswith(b"\n"):
            raise _malformed("it ends too early")
        return line[:-1]

    def part(self, most: int) -> list[str]:
        """Up to an empty line."""
        found: list[str] = []
        while line := self.next():
            if len(found) == most:
                raise _malformed(f"more than {most} lines where no more can be")
            found.append(_decoded(line))
        return found

    def note(self) -> Note:
        return Note.parse(self.stream.read(MAX_NOTE_BYTES + 1))


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise _malformed("it is no UTF-8") from None


def _number(line: str, name: str) -> int:
    if not line.startswith(f"{name} "):
        raise _malformed(f"it has no `{name}` where that belongs")
    return parse_size(line.removeprefix(f"{name} "), name)


def _hash_lines(hashes: Sequence[bytes]) -> str:
    return "".join(f"{b64(one)}\n" for one in hashes)


def _hashes(lines: Sequence[str]) -> tuple[bytes, ...]:
    if len(lines) > MAX_PROOF_HASHES:
        raise _malformed(f"{len(lines)} hashes; no tree needs more than {MAX_PROOF_HASHES}")
    return tuple(checked_hash(line, "proof") for line in lines)


def _record(line: bytes) -> EntryRecord:
    try:
        raw = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed("an entry is no base64") from None
    if base64.b64encode(raw) != line:
        raise _malformed("an entry is no canonical base64")
    return EntryRecord.decode(raw)


def _trusted(
    note: Note, log: Sequence[VerifierKey], witnesses: Sequence[VerifierKey]
) -> tuple[Checkpoint, tuple[Signature, ...]]:
    """The checkpoint, signed by one of the log's keys and cosigned by every witness asked for."""
    log = [key.of_kind(ED25519) for key in log]
    witnesses = [key.of_kind(COSIGNATURE) for key in witnesses]
    checkpoint = Checkpoint.parse(note.text)
    named = [key for key in log if key.name == checkpoint.origin]
    deployment = checkpoint.origin.rpartition("/")[0]
    named += [key.named(checkpoint.origin) for key in log if key.name == deployment]
    if not named:
        raise NotProved(
            f"the checkpoint is of the log {checkpoint.origin[:200]!r}, whose key is not trusted",
            reason="wrong-origin",
        )
    signers(note, named)
    cosignatures = []
    for witness in witnesses:
        ((_, signature), *_) = signers(note, [witness])
        cosignatures.append(signature)
    return checkpoint, tuple(cosignatures)


def _check_root(found: bytes, checkpoint: Checkpoint) -> None:
    if found != checkpoint.root:
        raise NotProved(
            f"it does not lead to the root of the signed checkpoint of size {checkpoint.size}",
            reason="wrong-root",
        )


def _check_origin(entries: Sequence[EntryRecord], checkpoint: Checkpoint) -> None:
    for entry in entries:
        if entry.origin != checkpoint.origin:
            raise NotProved(
                f"an entry is of the log {entry.origin[:200]!r}, not {checkpoint.origin!r}",
                reason="wrong-origin",
            )


@dataclass(frozen=True, slots=True)
class InclusionProof:
    """One entry, its place, and the way from its leaf to a signed root."""

    index: int
    hashes: tuple[bytes, ...]
    note: Note
    entry: EntryRecord | None
    """None where a proof that others made has no `extra`: then it is about a leaf alone."""

    def encode(self) -> bytes:
        """The file's bytes."""
        extra = f"extra {b64(self.entry.encode())}\n" if self.entry else ""
        head = f"{INCLUSION}\n{extra}index {self.index}\n"
        return head.encode() + _hash_lines(self.hashes).encode() + b"\n" + self.note.encode()

    @classmethod
    def read(cls, stream: BinaryIO) -> InclusionProof:
        """From a file.

        Raises:
            NotProved: it is no such proof.
        """
        lines = _Lines(stream, MAX_ENTRY_BYTES)
        if lines.next() != INCLUSION.encode():
            raise _malformed("it does not begin as the proof of an entry does")
        entry, line = None, lines.next(MAX_ENTRY_BYTES)
        if line.startswith(_EXTRA):
            entry, line = _record(line[len(_EXTRA) :]), lines.next()
        index = _number(_decoded(line), "index")
        return cls(index, _hashes(lines.part(MAX_PROOF_HASHES)), lines.note(), entry)

    def verify(self, log: Sequence[VerifierKey], witnesses: Sequence[VerifierKey] = ()) -> Proved:
        """What it proves to who trusts these keys.

        Raises:
            NotProved: nothing; `facts["reason"]` says why.
        """
        checkpoint, cosignatures = _trusted(self.note, log, witnesses)
        if self.entry is None:
            raise NotProved(
                "it does not say what entry it is about: it has no `extra`", reason="no-entry"
            )
        _check_origin([self.entry], checkpoint)
        leaf = leaf_hash(self.entry.leaf_data())
        root = root_from_inclusion(self.index, checkpoint.size, leaf, self.hashes)
        _check_root(root, checkpoint)
        return Proved(checkpoint, self.index + 1, (self.entry,), cosignatures)


class _StoredRecords(Sequence[EntryRecord]):
    """Records in a proof's file, read whenever one is wanted: a range may be larger than memory.

    With `leaves`, which were verified, a record that was changed in the file since is not given.
    """

    def __init__(
        self, stream: BinaryIO, offsets: Sequence[int], leaves: Sequence[bytes] | None = None
    ) -> None:
        self.stream = stream
        self.offsets = offsets
        self._leaves = leaves

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> EntryRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EntryRecord]: ...

    def __getitem__(self, index: int | slice) -> EntryRecord | Sequence[EntryRecord]:
        if isinstance(index, slice):
            leaves = self._leaves and self._leaves[index]
            return _StoredRecords(self.stream, self.offsets[index], leaves)
        self.stream.seek(self.offsets[index])
        record = _record(self.stream.readline(MAX_ENTRY_BYTES).removesuffix(b"\n"))
        if self._leaves is not None and leaf_hash(record.leaf_data()) != self._leaves[index]:
            raise NotProved("the file was changed while it was read", reason="changed")
        return record


@dataclass(frozen=True, slots=True)
class RangeProof:
    """Entries that follow each other, and the nodes before and behind them."""

    start: int
    left: tuple[bytes, ...]
    right: tuple[bytes, ...]
    note: Note
    entries: Sequence[EntryRecord]

    def encode(self) -> bytes:
        """The file's bytes."""
        head = f"{RANGE}\nstart {self.start}\ncount {len(self.entries)}\n"
        parts = [head, "\n", _hash_lines(self.left), "\n", _hash_lines(self.right), "\n"]
        parts += [f"{b64(entry.encode())}\n" for entry in self.entries]
        return "".join(parts).encode() + b"\n" + self.note.encode()

    @classmethod
    def read(cls, stream: BinaryIO) -> RangeProof:
        """From a file that can be sought in and stays open: its records stay there, and are decoded
        one by one whenever they are gone through.

        Raises:
            NotProved: it is no such proof.
        """
        lines = _Lines(stream, MAX_RANGE_BYTES)
        if lines.next() != RANGE.encode():
            raise _malformed("it does not begin as the proof of a range does")
        start, count = (_number(_decoded(lines.next()), name) for name in ("start", "count"))
        if lines.next():
            raise _malformed("its head has more than three lines")
        if count > MAX_RANGE_ENTRIES:
            raise _malformed(f"count {count}: a range has at most {MAX_RANGE_ENTRIES} entries")
        left, right = (_hashes(lines.part(MAX_PROOF_HASHES)) for _ in range(2))
        offsets, begin = array("Q"), stream.tell() - lines.read
        while line := lines.next(MAX_ENTRY_BYTES):
            if len(line) < _MIN_RECORD_BYTES:
                raise _malformed(f"{line!r} is too short for an entry")
            offsets.append(begin + lines.read - len(line) - 1)
            if len(offsets) > count:
                break
        if len(offsets) != count:
            raise _malformed("it does not have as many entries as it says")
        return cls(start, left, right, lines.note(), _StoredRecords(stream, offsets))

    def verify(self, log: Sequence[VerifierKey], witnesses: Sequence[VerifierKey] = ()) -> Proved:
        """What it proves to who trusts these keys.

        Raises:
            NotProved: nothing; `facts["reason"]` says why.
        """
        checkpoint, cosignatures = _trusted(self.note, log, witnesses)
        leaves = []
        for entry in self.entries:
            _check_origin([entry], checkpoint)
            leaves.append(leaf_hash(entry.leaf_data()))
        root = root_from_range(self.start, checkpoint.size, leaves, self.left, self.right)
        _check_root(root, checkpoint)
        entries = self.entries
        if isinstance(entries, _StoredRecords):
            entries = _StoredRecords(entries.stream, entries.offsets, leaves)
        return Proved(checkpoint, self.start + 1, entries, cosignatures)


@dataclass(frozen=True, slots=True)
class ConsistencyProof:
    """That the log of `note` begins with the log as it was at size `old`."""

    old: int
    hashes: tuple[bytes, ...]
    note: Note

    def encode(self) -> bytes:
        """The file's bytes, which are an add-checkpoint request's."""
        return f"old {self.old}\n{_hash_lines(self.hashes)}\n".encode() + self.note.encode()

    @classmethod
    def parse(cls, raw: bytes) -> ConsistencyProof:
        """From a file's or request's bytes.

        Raises:
            NotProved: it is no such proof.
        """
        return cls.read(BytesIO(raw))

    @classmethod
    def read(cls, stream: BinaryIO) -> ConsistencyProof:
        """From a file.

        Raises:
            NotProved: it is no such proof.
        """
        lines = _Lines(stream, MAX_PROOF_BYTES)
        old = _number(_decoded(lines.next()), "old")
        return cls(old, _hashes(lines.part(MAX_PROOF_HASHES)), lines.note())

    def verify(
        self, log: Sequence[VerifierKey], old: Note, witnesses: Sequence[VerifierKey] = ()
    ) -> Proved:
        """That the checkpoint of this proof continues the earlier one, `old`.

        Raises:
            NotProved: it does not; `facts["reason"]` says why.
        """
        checkpoint, cosignatures = _trusted(self.note, log, witnesses)
        before, _ = _trusted(old, log, ())
        if before.origin != checkpoint.origin:
            raise NotProved("the two checkpoints are of different logs", reason="wrong-origin")
        if before.size != self.old:
            raise NotProved(
                f"it is about size {self.old}, the earlier checkpoint has {before.size}",
                reason="wrong-size",
            )
        sizes = (self.old, checkpoint.size)
        check_consistency(*sizes, before.root, checkpoint.root, self.hashes)
        return Proved(checkpoint, self.old + 1, (), cosignatures, old=before)


Proof = InclusionProof | RangeProof | ConsistencyProof


def parse_proof(raw: bytes) -> Proof:
    """Any of the three kinds.

    Raises:
        NotProved: it is none of them.
    """
    proof = read_proof(BytesIO(raw))
    return replace(proof, entries=tuple(proof.entries)) if isinstance(proof, RangeProof) else proof


def read_proof(stream: BinaryIO) -> Proof:
    """Any of the three kinds from a file, as its first line says; a range's records stay there.

    Raises:
        NotProved: it is none of them.
    """
    begin = stream.tell()
    first = stream.read(64).partition(b"\n")[0]
    stream.seek(begin)
    if first == INCLUSION.encode():
        return InclusionProof.read(stream)
    if first == RANGE.encode():
        return RangeProof.read(stream)
    if first.startswith(b"old "):
        return ConsistencyProof.read(stream)
    raise _malformed("this is no proof that govledger knows")
