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
from collections.abc import Sequence
from dataclasses import dataclass
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
    COSIGNATURE,
    ED25519,
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
MAX_RANGE_BYTES: Final = 1 << 30


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
        text = _text(raw, MAX_PROOF_BYTES)
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
