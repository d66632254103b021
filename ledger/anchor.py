"""Where signed checkpoints are kept outside Redis: a directory of append-only files.

A log's file is `<directory>/<origin, percent-encoded>.checkpoints`: signed notes, each followed by
one empty line, in the order in which they were signed; later copies of one may have more signatures
(witnesses'). It is the sealer's own memory of what it has signed. A tail that a power cut has torn
is finished by the sealer, which signs that very checkpoint again, or nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, NamedTuple
from urllib.parse import quote, unquote

from ledger.durable import fsync_directory
from ledger.errors import InvalidInput, InvalidSetting, NotProved
from ledger.note import MAX_NOTE_BYTES, Checkpoint, Handover, Note, VerifierKey, signers
from ledger.regular import open_regular, regular_only

__all__ = ["AnchorFile", "Chain", "Followed", "Tail", "checkpoints_of", "goes_back", "read_notes"]

_SIGNED: Final = "— ".encode()
MAX_FILE_NAME_BYTES: Final = 255
_TAIL_BYTES: Final = 4 * MAX_NOTE_BYTES


def read_notes(stream: BinaryIO, name: str) -> Iterator[Note]:
    """The notes of an anchor file in order, in constant memory.

    Raises:
        NotProved: what is there is no such file; `torn` where only its end is missing.
    """
    text, signed, line_number = bytearray(), bytearray(), 0
    while line := stream.readline(MAX_NOTE_BYTES + 1):
        line_number += 1
        if len(text) + len(signed) + len(line) > MAX_NOTE_BYTES:
            raise NotProved(f"{name}:{line_number}: a note is too large", reason="malformed")
        if line != b"\n":
            (signed if text.endswith(b"\n\n") else text).extend(line)
        elif signed:
            yield _note(bytes(text + signed), name, line_number)
            text, signed = bytearray(), bytearray()
        elif text.endswith(b"\n\n") or not text:
            raise NotProved(f"{name}:{line_number}: an unsigned note", reason="unsigned")
        else:
            text.extend(line)
    if _is_whole(text, signed):  # as other tools write a single note
        yield _note(bytes(text + signed), name, line_number)
    elif text or signed:
        raise NotProved(f"{name}: its last note is cut off", reason="torn")


def _is_whole(text: bytes | bytearray, signed: bytes | bytearray) -> bool:
    """Whether a file's last note lacks nothing but its empty line; a hand-over has two signers."""
    lines = 2 if text.startswith(Handover.FIRST_LINE) else 1
    return signed.endswith(b"\n") and signed.count(b"\n") >= lines


def up_to_torn(notes: Iterator[Note]) -> Iterator[Note]:
    """The notes before a tail that is cut off."""
    try:
        yield from notes
    except NotProved as error:
        if error.facts.get("reason") != "torn":
            raise


def _note(raw: bytes, name: str, line_number: int) -> Note:
    try:
        return Note.parse(raw)
    except NotProved as error:
        reason = error.facts["reason"]
        raise NotProved(f"{name}:{line_number}: {error.message}", reason=reason) from None


class Followed(NamedTuple):
    """One reading of an anchor: its last note, how many, and whether one behind it is cut off."""

    last: Note | None
    seen: int
    torn: bool = False


@dataclass(slots=True)
class Chain:
    """Which key signs from where on: the trusted one, and those that hand-overs link to it."""

    origin: str
    trusted: tuple[VerifierKey, ...]
    handovers: list[Handover] = field(default_factory=list)

    def add(self, handover: Handover) -> None:
        """A hand-over, in the order of the anchor.

        Raises:
            NotProved: it is another log's, or does not go on from the one before.
        """
        if handover.at.origin != self.origin:
            raise NotProved(
                f"a hand-over is of the log {handover.at.origin}, not {self.origin}",
                reason="wrong-origin",
            )
        if self.handovers:
            last = self.handovers[-1]
            if handover.old != last.new or handover.at.size < last.at.size:
                raise NotProved("a hand-over is not by the key before it", reason="wrong-key")
        self.handovers.append(handover)

    def follow(self, notes: Iterator[Note]) -> Followed:
        """Takes the hand-overs among an anchor's notes, from one reading of it.

        Raises:
            NotProved: they are no anchor's, a hand-over does not hold, or sizes go back.
        """
        last, seen, before, torn = None, 0, 0, False
        try:
            for last in notes:
                seen += 1
                if Handover.is_one(last):
                    self.add(Handover.parse(last))
                    at = self.handovers[-1].at
                else:
                    at = Checkpoint.parse(last.text)
                if at.size < before:
                    raise goes_back(before, at.size)
                before = at.size
        except NotProved as error:
            torn = error.facts["reason"] == "torn"
            if last is None or not torn:
                raise
        self.checked()
        return Followed(last, seen, torn)

    def checked(self) -> Chain:
        """Itself, where the hand-overs and a trusted key belong together.

        Raises:
            NotProved: no trusted key is in the chain.
        """
        linked = {key for one in self.handovers for key in (one.old, one.new)}
        if linked and not linked & set(self.trusted):
            raise NotProved(
                f"the keys of {self.origin} were handed over, and none of them is trusted here",
                reason="wrong-key",
            )
        return self

    def keys(self) -> Sequence[VerifierKey]:
        """All that ever signed, or are trusted to, whatever the size."""
        linked = (key for one in self.handovers for key in (one.old, one.new))
        return tuple(dict.fromkeys((*self.trusted, *linked)))

    def keys_at(self, size: int) -> Sequence[VerifierKey]:
        """Whose signature a checkpoint of this size must have."""
        if not self.handovers:
            return self.trusted
        for one in self.handovers:
            if size <= one.at.size:  # several, where a key was handed on before it sealed anything
                return tuple(o.old for o in self.handovers if o.at.size == one.at.size)
        return (self.handovers[-1].new,)

    def verified(self, note: Note) -> Checkpoint:
        """The checkpoint of a note; of a hand-over, the last one of its old key.

        Raises:
            NotProved: it is another log's, or not signed by the key that was then in charge; or a
                hand-over that is not in this chain: its own two keys alone vouch for nothing.
        """
        if Handover.is_one(note):
            handover = Handover.parse(note)
            if handover not in self.handovers:
                raise NotProved(
                    f"a hand-over of {handover.at.origin[:200]} is not linked to the trusted key",
                    reason="wrong-key",
                )
            return handover.at
        checkpoint = Checkpoint.parse(note.text)
        if checkpoint.origin != self.origin:
            raise NotProved(
                f"a checkpoint is of the log {checkpoint.origin[:200]}, not {self.origin}",
                reason="wrong-origin",
            )
        signers(note, self.keys_at(checkpoint.size))
        return checkpoint


def checkpoints_of(notes: Iterator[Note], chain: Chain) -> Iterator[tuple[Checkpoint, Note]]:
    """The verified checkpoints among an anchor's notes, each larger than the one before or equal.

    Raises:
        NotProved: one is not verified, goes back, or differs from another of its size.
    """
    last: Checkpoint | None = None
    for note in notes:
        checkpoint = chain.verified(note)
        if last is not None and checkpoint.size < last.size:
            raise goes_back(last.size, checkpoint.size)
        if last is not None and checkpoint.size == last.size and checkpoint.root != last.root:
            raise NotProved(
                f"two signed checkpoints of size {last.size} have different roots",
                reason="split-view",
                size=last.size,
            )
        last = checkpoint
        yield checkpoint, note


def goes_back(before: int, size: int) -> NotProved:
    """A checkpoint of a smaller size stands behind a larger one."""
    return NotProved(
        f"the anchor goes back from size {before} to {size}", reason="anchor-goes-back"
    )


@dataclass(slots=True)
class Tail:
    """The end of an anchor file: the last note, and a body whose signature may have been torn."""

    last: Note | None
    torn: Checkpoint | None
    whole_bytes: int
    unended: bool = False
    """The last note lacks the empty line behind it, and nothing else."""


class AnchorFile:
    """One log's file in an anchor directory."""

    SUFFIX: ClassVar[str] = ".checkpoints"

    def __init__(self, directory: Path, origin: str) -> None:
        self.directory = directory
        self.path = directory / f"{quote(origin, safe='')}{self.SUFFIX}"
        if len(self.path.name) > MAX_FILE_NAME_BYTES:
            raise InvalidInput(
                f"deployment: the log's name {origin[:80]}… is too long for its file's name",
                hint="make a key with a shorter one",
            )

    @classmethod
    def at(cls, path: Path) -> AnchorFile:
        """A file of any name, such as a copy that somebody was given."""
        file = cls(path.parent, "")
        file.path = path
        return file

    @classmethod
    def origin_of(cls, path: Path) -> str:
        """Whose file it is."""
        return unquote(path.name.removesuffix(cls.SUFFIX))

    def chain(self, origin: str, trusted: Sequence[VerifierKey]) -> Chain:
        """Which keys sign, by the hand-overs in the file.

        Raises:
            NotProved: a hand-over does not hold.
        """
        chain = Chain(origin, tuple(trusted))
        if self.path.exists():
            with open_regular(self.path) as stream:
                if not any(map(Handover.FIRST_LINE.__eq__, _lines(stream))):
                    return chain  # and no note was decoded
                stream.seek(0)
                for note in up_to_torn(read_notes(stream, self.path.name)):
                    if Handover.is_one(note):
                        chain.add(Handover.parse(note))
        return chain.checked()

    @contextmanager
    def locked(self) -> Iterator[BinaryIO]:
        """The file, for one sealer alone; created if absent, its directory must be there.

        Raises:
            InvalidSetting: there is no such directory.
        """
        if not self.directory.is_dir():
            raise InvalidSetting(
                f"anchor: there is no directory {self.directory}",
                hint="create it, or mount what it is on: it is not made here, so that an absent "
                "disk is noticed",
            )
        is_new = not self.path.exists()
        with open(self.path, "a+b", opener=regular_only) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if is_new:
                fsync_directory(self.directory)
            yield stream

    @contextmanager
    def held_still(self) -> Iterator[BinaryIO]:
        """The file, in which no sealer writes while the block reads; empty where there is none."""
        if not self.path.exists():
            yield BytesIO()
            return
        with open_regular(self.path) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield stream

    def notes(self) -> Iterator[Note]:
        """What is whole of it now.

        Raises:
            NotProved: it is no such file.
        """
        if self.path.exists():
            with open_regular(self.path) as stream:
                yield from up_to_torn(read_notes(stream, self.path.name))

    def tail(self, stream: BinaryIO) -> Tail:
        """Its end, read backwards: cheap however long it is.

        Raises:
            NotProved: the end is no such file's.
        """
        size = stream.seek(0, os.SEEK_END)
        start = stream.seek(max(0, size - _TAIL_BYTES))
        raw = stream.read()
        blocks = raw.split(b"\n\n")
        if start:  # the first may be the end of a longer one
            blocks = blocks[1:]
            while blocks and blocks[0].startswith(_SIGNED):
                blocks.pop(0)
        whole, last = size - sum(len(one) + 2 for one in blocks) + 2, None
        while len(blocks) > 2:
            last = _note(b"%b\n\n%b\n" % tuple(blocks[:2]), self.path.name, 0)
            whole += len(blocks[0]) + len(blocks[1]) + 4
            blocks = blocks[2:]
        if len(blocks) == 2 and _is_whole(*blocks):
            last = _note(b"%b\n\n%b" % tuple(blocks), self.path.name, 0)
            return Tail(last, None, size, unended=True)
        torn = Note(blocks[0] + b"\n", ()) if len(blocks) == 2 else None
        if torn is None or Handover.is_one(torn):
            return Tail(last, None, whole)
        checkpoint = Checkpoint.parse(torn.text)
        if last is not None and checkpoint == _at(last):  # a copy of what is whole already
            return Tail(last, None, whole)
        return Tail(last, checkpoint, whole)

    def append(self, stream: BinaryIO, tail: Tail, note: Note) -> None:
        """Adds a note behind the tail, over what was torn, and returns when it is on disk."""
        if stream.seek(0, os.SEEK_END) != tail.whole_bytes:
            stream.truncate(tail.whole_bytes)
        stream.write((b"\n" if tail.unended else b"") + note.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _at(note: Note) -> Checkpoint:
    """The checkpoint that a note has, or hands over, by its own word."""
    return Handover.parse(note).at if Handover.is_one(note) else Checkpoint.parse(note.text)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(MAX_NOTE_BYTES):
        if len(line) == MAX_NOTE_BYTES:  # it may have no end
            raise NotProved("a line of the anchor is too long", reason="malformed")
        yield line
