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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ledger.errors import NotProved
from ledger.leaf import EntryRecord
from ledger.merkle import (
    MAX_PROOF_HASHES,
    check_consistency,
    leaf_hash,
    root_from_inclusion,
    root_from_range,
)
from ledger.note import (
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
    "parse_proof",
]

INCLUSION: Final = "c2sp.org/tlog-proof@v1"
RANGE: Final = "govledger/range-proof@1"
MAX_PROOF_BYTES: Final = 1 << 20
"""Of a continuation, which has no entry in it."""

MAX_ENTRY_BYTES: Final = 128 << 20
"""Of one entry's proof: a foreign entry may be large."""

MAX_RANGE_BYTES: Final = 1 << 30
_ENTRY_ID: Final = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")


@dataclass(frozen=True, slots=True)
class Proved:
    """What a proof has shown: entries `first_seq` on, of a log of `checkpoint.size` entries."""

    checkpoint: Checkpoint
    first_seq: int
    entries: tuple[EntryRecord, ...]
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
        """
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


def _id_of(entry: EntryRecord) -> tuple[int, int]:
    found = _ENTRY_ID.fullmatch(entry.entry_id)
    if found is None:
        raise NotProved(f"{entry.entry_id[:60]!r} is no entry id", reason="malformed")
    return int(found[1]), int(found[2])


def _malformed(why: str) -> NotProved:
    return NotProved(f"proof: {why}", reason="malformed")


def _text(raw: bytes, limit: int) -> str:
    if len(raw) > limit:
        raise _malformed(f"{len(raw)} bytes; at most {limit} are read")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _malformed("it is no UTF-8") from None


def _hash_lines(hashes: Sequence[bytes]) -> str:
    return "".join(f"{b64(one)}\n" for one in hashes)


def _hashes(lines: str) -> tuple[bytes, ...]:
    found = lines.split("\n") if lines else []
    if len(found) > MAX_PROOF_HASHES:
        raise _malformed(f"{len(found)} hashes; no tree needs more than {MAX_PROOF_HASHES}")
    return tuple(checked_hash(line, "proof") for line in found)


def _record(line: str) -> EntryRecord:
    try:
        raw = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed("an entry is no base64") from None
    if b64(raw) != line:
        raise _malformed("an entry is no canonical base64")
    return EntryRecord.decode(raw)


def _trusted(
    note: Note, log: Sequence[VerifierKey], witnesses: Sequence[VerifierKey]
) -> tuple[Checkpoint, tuple[Signature, ...]]:
    """The checkpoint, signed by one of the log's keys and cosigned by every witness asked for."""
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
    entry: EntryRecord

    def encode(self) -> bytes:
        """The file's bytes."""
        head = f"{INCLUSION}\nextra {b64(self.entry.encode())}\nindex {self.index}\n"
        return head.encode() + _hash_lines(self.hashes).encode() + b"\n" + self.note.encode()

    @classmethod
    def parse(cls, raw: bytes) -> InclusionProof:
        """From a file's bytes.

        Raises:
            NotProved: it is no such proof.
        """
        text = _text(raw, MAX_ENTRY_BYTES)
        head, blank, note = text.partition("\n\n")
        lines = head.split("\n")
        if not blank or lines[0] != INCLUSION or len(lines) < 3:
            raise _malformed("it has no head of at least three lines and no checkpoint")
        if not lines[1].startswith("extra ") or not lines[2].startswith("index "):
            raise _malformed("it must have `extra`, the entry, and `index`")
        entry = _record(lines[1].removeprefix("extra "))
        index = parse_size(lines[2].removeprefix("index "), "index")
        return cls(index, _hashes("\n".join(lines[3:])), Note.parse(note.encode()), entry)

    def verify(self, log: Sequence[VerifierKey], witnesses: Sequence[VerifierKey] = ()) -> Proved:
        """What it proves to who trusts these keys.

        Raises:
            NotProved: nothing; `facts["reason"]` says why.
        """
        checkpoint, cosignatures = _trusted(self.note, log, witnesses)
        _check_origin([self.entry], checkpoint)
        leaf = leaf_hash(self.entry.leaf_data())
        root = root_from_inclusion(self.index, checkpoint.size, leaf, self.hashes)
        _check_root(root, checkpoint)
        return Proved(checkpoint, self.index + 1, (self.entry,), cosignatures)


@dataclass(frozen=True, slots=True)
class RangeProof:
    """Entries that follow each other, and the nodes before and behind them."""

    start: int
    left: tuple[bytes, ...]
    right: tuple[bytes, ...]
    note: Note
    entries: tuple[EntryRecord, ...]

    def encode(self) -> bytes:
        """The file's bytes."""
        head = f"{RANGE}\nstart {self.start}\ncount {len(self.entries)}\n"
        parts = [head, "\n", _hash_lines(self.left), "\n", _hash_lines(self.right), "\n"]
        parts += [f"{b64(entry.encode())}\n" for entry in self.entries]
        return "".join(parts).encode() + b"\n" + self.note.encode()

    @classmethod
    def parse(cls, raw: bytes) -> RangeProof:
        """From a file's bytes.

        Raises:
            NotProved: it is no such proof.
        """
        text = _text(raw, MAX_RANGE_BYTES)
        head, _, rest = text.partition("\n\n")
        lines = head.split("\n")
        if len(lines) != 3 or lines[0] != RANGE:
            raise _malformed("its head is not that of a range proof")
        if not lines[1].startswith("start ") or not lines[2].startswith("count "):
            raise _malformed("it must have `start` and `count`")
        start = parse_size(lines[1].removeprefix("start "), "start")
        left, rest = _block(rest)
        right, rest = _block(rest)
        entries, note = _block(rest)
        records = tuple(map(_record, entries.split("\n") if entries else ()))
        if parse_size(lines[2].removeprefix("count "), "count") != len(records):
            raise _malformed("it does not have as many entries as it says")
        return cls(start, _hashes(left), _hashes(right), Note.parse(note.encode()), records)

    def verify(self, log: Sequence[VerifierKey], witnesses: Sequence[VerifierKey] = ()) -> Proved:
        """What it proves to who trusts these keys.

        Raises:
            NotProved: nothing; `facts["reason"]` says why.
        """
        checkpoint, cosignatures = _trusted(self.note, log, witnesses)
        _check_origin(self.entries, checkpoint)
        leaves = [leaf_hash(entry.leaf_data()) for entry in self.entries]
        root = root_from_range(self.start, checkpoint.size, leaves, self.left, self.right)
        _check_root(root, checkpoint)
        return Proved(checkpoint, self.start + 1, self.entries, cosignatures)


def _block(text: str) -> tuple[str, str]:
    """The lines up to an empty one, and what follows it."""
    if text.startswith("\n"):
        return "", text[1:]
    block, blank, rest = text.partition("\n\n")
    if not blank:
        raise _malformed("it ends too early")
    return block, rest


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
        head, blank, note = _text(raw, MAX_PROOF_BYTES).partition("\n\n")
        first, _, lines = head.partition("\n")
        if not blank or not first.startswith("old "):
            raise _malformed("it does not begin with `old` and a size")
        old = parse_size(first.removeprefix("old "), "old size")
        return cls(old, _hashes(lines), Note.parse(note.encode()))

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
    first = raw[:64].partition(b"\n")[0]
    if first == INCLUSION.encode():
        return InclusionProof.parse(raw)
    if first == RANGE.encode():
        return RangeProof.parse(raw)
    if first.startswith(b"old "):
        return ConsistencyProof.parse(raw)
    raise _malformed("this is no proof that govledger knows")
