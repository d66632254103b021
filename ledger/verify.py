"""Verifying a tenant's record against a checkpoint that is kept outside Redis.

The verifier trusts a key and an anchor. It reads the latest signed checkpoint there and derives its
root anew from the stream's raw entries. `governance:head`, the index, the tiles and the checkpoints
in Redis are whatever their owner says: where the root differs, tiles whose own root is the anchored
one (they cannot be forged) show the first entry that was touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import orjson

from ledger import keys
from ledger.anchor import AnchorFile, Chain, Followed, checkpoints_of, read_notes
from ledger.errors import (
    InvalidInput,
    InvalidSetting,
    LedgerError,
    NotFound,
    NotProved,
    ServerError,
    Unavailable,
)
from ledger.leaf import leaf_hasher
from ledger.ledger import Ledger
from ledger.merkle import EMPTY_ROOT, TILE_WIDTH, TileTree, cover, range_hash
from ledger.note import COSIGNATURE, Checkpoint, Handover, Note, VerifierKey, signers
from ledger.server import Server
from ledger.stream import Incident, raw_pages, read_head, read_incidents, split_id
from ledger.tiles import Tiles, partial_rows
from ledger.witness import WitnessClient
from ledger.wording import counted

__all__ = ["Finding", "Verification", "latest_checkpoint", "read_anchor", "verify"]

_OWN_NAMES: Final = (b"type", b"id", b"data")
_SHOWN: Final = 100
_WINDOW: Final = 1000
_MAX_COPIES: Final = 5000
_OTHERS_SHOWN: Final = 10
_ORIGIN_SHOWN: Final = 200
_NO_RECORD: Final = "its own record of the stream was lost, and an imitation looks the same"
_URLS: Final = ("http://", "https://")

Progress = Callable[[int], None]
Hasher = Callable[[bytes, Sequence[bytes]], bytes]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong: a reason in a word or two, what it means, and at which seq if it has one."""

    reason: str
    message: str
    seq: int | None = None


@dataclass(slots=True)
class Verification:
    """What was found. `proved`: entries 1 to `sealed` are those that the anchor's signer saw."""

    tenant: str
    origin: str
    anchor: str | None
    proved: bool = False
    sealed: int = 0
    root: bytes = EMPTY_ROOT
    entries: int = 0
    """How many are in the stream now."""

    checkpoints: int = 0
    """How many signed checkpoints were compared with the entries."""

    witnessed: dict[str, int] = field(default_factory=dict)
    """Trusted witnesses of the last checkpoint, and when (s since 1970) they cosigned it."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and says nothing against the record."""

    not_proved: list[str] = field(default_factory=list)
    """What nobody should conclude from it."""

    @property
    def ok(self) -> bool:
        """A proof, and nothing found."""
        return self.proved and not self.findings

    def found(self, reason: str, message: str, seq: int | None = None) -> None:
        """Adds a finding; of very many only the first are kept."""
        if len(self.findings) < _SHOWN:
            self.findings.append(Finding(reason, message, seq))


# -- anchors -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Anchored:
    """The signed checkpoints to compare with, in order of size; `last` is the largest."""

    chain: Chain
    source: str
    sizes: Callable[[], Iterator[tuple[Checkpoint, Note]]]
    last: Checkpoint
    note: Note
    torn: bool
    """Behind `last` a note is cut off."""

    has_handovers: bool
    """Whether a hand-over would stand here: not in a witness's answer or one kept checkpoint."""


def read_anchor(anchor: str | Path, origin: str, trusted: Sequence[VerifierKey]) -> _Anchored:
    """What an anchor holds of a log: a directory, a file of one or more checkpoints, or a witness's
    URL; blocks.

    Raises:
        InvalidSetting: there is no such file or directory.
        NotProved: there is no valid checkpoint of this log; the reason says why.
        WitnessUnavailable: the witness does not answer.
        InvalidInput: it is a pipe or a device.
    """
    chain = Chain(origin, tuple(trusted))
    text = str(anchor)
    if text.startswith(_URLS):
        found = WitnessClient(trusted[0], text).latest(origin)
        notes = [found] if found else []
        followed = Followed(found, len(notes))
        return _anchored(chain, text, followed, lambda: iter(notes), has_handovers=False)
    path = Path(text)
    if not path.exists():
        raise InvalidSetting(
            f"anchor: there is no file or directory {path}",
            hint="name the directory that `govledger seal` writes to (--anchor, GOVLEDGER_ANCHOR), "
            "and see that its disk is mounted",
        )
    file = AnchorFile(path, origin) if path.is_dir() else AnchorFile.at(path)
    with file.held_still() as stream:
        followed = chain.follow(read_notes(stream, file.path.name))
    has_handovers = path.is_dir() or bool(chain.handovers)
    return _anchored(chain, text, followed, file.notes, has_handovers=has_handovers)


def _anchored(
    chain: Chain,
    source: str,
    followed: Followed,
    read: Callable[[], Iterator[Note]],
    *,
    has_handovers: bool = True,
) -> _Anchored:
    """The chain is complete: whatever `read` gives later is verified by it, and adds nothing."""
    last, seen, torn = followed
    if last is None:
        raise NotProved(
            f"the anchor {source} has no checkpoint of the log {chain.origin}", reason="no-anchor"
        )
    at = chain.verified(last)
    if at.size == 0:
        raise NotProved(f"the anchor {source} has an empty log's checkpoint", reason="no-anchor")

    def sizes() -> Iterator[tuple[Checkpoint, Note]]:
        # A sealer may be at work: what comes behind the last one is another verification's.
        return islice(checkpoints_of(read(), chain), seen)

    return _Anchored(chain, source, sizes, at, last, torn, has_handovers)


# -- verify ------------------------------------------------------------------------------------


async def verify(
    ledger: Ledger,
    tenant: str,
    key: VerifierKey,
    *,
    anchor: str | Path | None = None,
    witnesses: Sequence[VerifierKey] = (),
    allow_foreign: bool = False,
    on_progress: Progress | None = None,
) -> Verification:
    """Compares a tenant's raw entries with what was signed; constant memory.

    Args:
        ledger: where the entries are.
        tenant: whose.
        key: the log's key, or its deployment's: whom to believe.
        anchor: a directory, a file, or a witness's URL, outside the reach of who runs Redis.
            Without one nothing but the copies in Redis is compared, and nothing is proved.
        witnesses: keys that must have cosigned the last checkpoint.
        allow_foreign: sealed entries that the append function did not write are no finding.
        on_progress: called with counts of entries.

    Raises:
        Unavailable: the ledger or a witness cannot be asked.
        InvalidInput: the key is no log's, a witness's is none, or there is no such anchor.
    """
    log_key = key.for_log(tenant)
    witnesses = [one.of_kind(COSIGNATURE) for one in witnesses]
    if str(anchor).startswith(_URLS) and not witnesses:
        raise InvalidInput(
            f"anchor: {anchor} could be anybody: the witness's key is missing",
            hint="--witness-key VKEY",
        )
    found = Verification(tenant, log_key.name, None if anchor is None else str(anchor))
    run = _Run(ledger.server, found, leaf_hasher(log_key.name), on_progress)
    try:
        anchored = await _anchor_of(ledger.server, found, log_key, anchor)
    except NotProved as error:
        found.found(str(error.facts["reason"]), error.message)
        found.not_proved.append("anything: there is no checkpoint to compare with")
        stream = keys.decisions(tenant)
        if not await ledger.server.command(stream, "EXISTS", stream):
            found.notes.append(str(NotFound.nothing_of(tenant)))
        return found
    if anchored.torn:
        found.not_proved.append(
            "what stands behind the anchor's last checkpoint: it is cut off, and the sealer "
            "finishes it if it was writing when it was stopped"
        )
    found.sealed, found.root = anchored.last.size, anchored.last.root
    _check_witnesses(found, anchored.note, witnesses)
    try:
        # Before the entries, so that what is appended meanwhile is no contradiction.
        await run.read_head()
        await run.read_copies(anchored)
        if await run.compare(anchored):
            found.proved = anchor is not None
            await run.check_tiles()
            run.check_ends()
            await run.find_imitations()
    except NotProved as error:
        found.found(str(error.facts["reason"]), error.message)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        # Its owner is whom we do not trust: a server can answer anything.
        found.proved = False
        found.found("malformed", f"the server answers what no Redis does: {error!r}"[:300])
    run.report_foreign(allowed=allow_foreign)
    _say_what_is_not_proved(found)
    return found


async def _anchor_of(
    server: Server, found: Verification, key: VerifierKey, anchor: str | Path | None
) -> _Anchored:
    if anchor is not None:
        return await asyncio.to_thread(read_anchor, anchor, key.name, [key])
    notes = [note async for note in _copies(server, found.tenant, key.name)]
    notes.sort(key=lambda note: Checkpoint.parse(note.text).size)
    followed = Followed(notes[-1] if notes else None, len(notes))
    return _anchored(Chain(key.name, (key,)), "Redis", followed, lambda: iter(notes))


async def latest_checkpoint(
    server: Server, tenant: str, log_key: VerifierKey, anchor: str | Path | None
) -> tuple[Checkpoint, Note]:
    """The latest signed checkpoint of an anchor, or of the copies in Redis.

    Raises:
        NotProved: there is none, or none that the key has signed.
    """
    found = Verification(tenant, log_key.name, None)
    anchored = await _anchor_of(server, found, log_key, anchor)
    if not Handover.is_one(anchored.note):
        return anchored.last, anchored.note
    last = None
    for checkpoint, note in anchored.sizes():
        last = last if Handover.is_one(note) else (checkpoint, note)
    if last is None:
        raise NotProved(
            f"the anchor {anchored.source} has a hand-over and no checkpoint", reason="no-anchor"
        )
    return last


def _check_witnesses(found: Verification, note: Note, witnesses: Sequence[VerifierKey]) -> None:
    for witness in witnesses:
        try:
            ((_, signature), *_) = signers(note, [witness])
            found.witnessed[witness.name] = signature.time_s
        except NotProved as error:
            found.found("not-cosigned", f"witness {witness.name}: {error.message}", found.sealed)


def _say_what_is_not_proved(found: Verification) -> None:
    unsealed = found.entries - found.sealed
    if found.anchor is None:
        found.notes.append(
            "no anchor was named (--anchor, GOVLEDGER_ANCHOR): only copies in Redis were compared"
        )
        found.not_proved += [
            (
                "that nothing was cut off: an earlier state of Redis, with its checkpoints, looks "
                "the same"
            ),
            "that the signer did not sign another history: only what is kept elsewhere shows that",
        ]
    if found.proved and unsealed > 0:
        found.not_proved.append(
            f"seq {found.sealed + 1} to {found.entries}: recorded, and not covered by the anchor's "
            "last checkpoint"
        )


# -- what is compared --------------------------------------------------------------------------


class _Run:
    """One verification on its way."""

    def __init__(
        self, server: Server, found: Verification, hashed: Hasher, on_progress: Progress | None
    ) -> None:
        self.server = server
        self.found = found
        self.tenant = found.tenant
        self.hashed = hashed
        self.tiles = Tiles(server, found.tenant, found.origin)
        self._on_progress = on_progress
        self._foreign: dict[bool, set[int]] = {True: set(), False: set()}  # sealed, not sealed
        self._last_id = b"0-0"
        self._damaged: int | None = None
        self._good: Checkpoint | None = None
        self._head_seq = 0
        self._copies: list[Checkpoint] = []
        self._tree = TileTree(self._keep_full)
        self._full: list[tuple[int, int, list[bytes]]] = []
        self._rows: list[list[bytes]] = []

    def _keep_full(self, level: int, number: int, hashes: list[bytes]) -> None:
        self._full.append((level, number, hashes))

    async def compare(self, anchored: _Anchored) -> bool:
        """Whether the entries lead to every signed root; findings say where they do not."""
        expected = anchored.sizes()
        wanted = next(expected, None)
        stream = keys.decisions(self.tenant)
        await _of_type(self.server.command(stream, "XLEN", stream), stream)
        async with aclosing(raw_pages(self.server, self.tenant)) as pages:
            async for page in pages:
                leaves = [self.hashed(raw_id, fields) for raw_id, fields in page]
                self._last_id = page[-1][0]
                self._note_foreign(page)
                while wanted and wanted[0].size <= self._tree.size + len(leaves):
                    if not self._matches(wanted[0], leaves):
                        await self._locate(wanted[0], anchored)
                        return False
                    wanted = await asyncio.to_thread(next, expected, None)
                self._compare_copies(leaves)
                self._grow(leaves)
                await self._compare_tiles()
                self.found.entries = self._tree.size
                if self._on_progress:
                    self._on_progress(len(page))
        if wanted is None:
            if self._good != anchored.last:
                raise NotProved(
                    "the anchor was changed while it was read: it has not the checkpoint any more "
                    "that it ended with",
                    reason="anchor-changed",
                )
            return True
        await self._cut_off(anchored)
        return False

    def _matches(self, checkpoint: Checkpoint, leaves: list[bytes]) -> bool:
        more = leaves[: checkpoint.size - self._tree.size]
        self.found.checkpoints += 1
        if self._tree.root_with(more) != checkpoint.root:
            return False
        self._good = checkpoint
        return True

    def _compare_copies(self, leaves: list[bytes]) -> None:
        while self._copies and self._copies[0].size <= self._tree.size + len(leaves):
            copy = self._copies.pop(0)
            if self._tree.root_with(leaves[: copy.size - self._tree.size]) != copy.root:
                self.found.found(
                    "copy-wrong-root",
                    f"the signed checkpoint of size {copy.size} in Redis is of other entries",
                    copy.size,
                )

    def _grow(self, leaves: list[bytes]) -> None:
        before = self.found.sealed - self._tree.size
        if 0 < before <= len(leaves):
            self._tree.extend(leaves[:before])
            self._rows = [list(row) for row in self._tree.rows]
            leaves = leaves[before:]
        self._tree.extend(leaves)

    # -- tiles --

    async def _compare_tiles(self) -> None:
        taken, self._full = self._full, []
        if self._damaged is not None:
            return
        there = await self.tiles.read((level, number) for level, number, _ in taken)
        for level, number, hashes in taken:
            sealed = (number + 1) * TILE_WIDTH ** (level + 1) <= self.found.sealed
            if sealed and there.get((level, number)) != hashes:
                self._damaged = number * TILE_WIDTH ** (level + 1) + 1
                return

    async def check_tiles(self) -> None:
        """Whether the tiles in Redis are those of the entries; the proof stands without them."""
        rows = partial_rows(self.found.sealed)
        there = await self.tiles.read((level, number) for level, number, width in rows if width)
        for level, number, width in rows:
            row = self._rows[level] if level < len(self._rows) else []
            if width and there.get((level, number), [])[:width] != row and self._damaged is None:
                self._damaged = number * TILE_WIDTH ** (level + 1) + 1
        if self._damaged is not None and not await self.tiles.any():
            self.found.notes.append(
                "the tiles in Redis are gone, or never came here: the proof stands, and proofs of "
                "entries are made by reading all of them until a sealer makes the tiles anew"
            )
        elif self._damaged is not None:
            self.found.found(
                "tiles-damaged",
                "the tiles in Redis are not those of the entries; the proof stands without them, "
                f"and govledger seal {self.tenant} --once --rebuild-tiles makes them anew",
                self._damaged,
            )

    # -- foreign hands --

    def _note_foreign(self, page: list[list[Any]]) -> None:
        ids, all_fields = zip(*page, strict=True)
        seqs = orjson.loads(b"[%b]" % b",".join(ids).replace(b"-", b","))[1::2]
        first = self._tree.size + 1
        dense = seqs == list(range(first, first + len(seqs))) and set(map(len, all_fields)) == {6}
        if dense and {(one[0], one[2], one[4]) for one in all_fields} == {_OWN_NAMES}:
            return
        for seq, (raw_id, fields) in enumerate(page, first):
            if fields[::2] != list(_OWN_NAMES) or split_id(raw_id)[1] != seq:
                self._add_foreign(seq, seq)

    def _add_foreign(self, first: int, last: int) -> None:
        """Ordinals that others have taken; of very many sealed and unsealed ones the first."""
        sealed = self.found.sealed
        for is_sealed, some in (
            (True, range(first, min(last, sealed) + 1)),
            (False, range(max(first, sealed + 1), last + 1)),
        ):
            room = _SHOWN - len(self._foreign[is_sealed])
            self._foreign[is_sealed].update(some[: max(room, 0)])

    async def find_imitations(self) -> None:
        """Foreign entries that look like ours, which only the append function's own record tells:
        it registers what it did not write, and what lies behind its last entry is not its own.
        """
        try:
            head = await read_head(self.server, self.tenant)  # anew: it covers all that was read
            for first in range(1, head.incidents + 1, _WINDOW):
                last = min(first + _WINDOW - 1, head.incidents)
                for one in await read_incidents(self.server, self.tenant, first, last):
                    self._note_incident(one)
        except Unavailable:
            raise
        except LedgerError as error:
            self._head_damaged(error)
            self.found.not_proved.append(f"that govledger's append wrote each entry: {_NO_RECORD}")
            return
        behind, end = 0, split_id(self._last_id)
        if split_id(head.entry_id) < end:
            after = raw_pages(self.server, self.tenant, after_id=head.entry_id)
            async with aclosing(after) as pages:
                async for page in pages:
                    behind += sum(split_id(raw_id) <= end for raw_id, _ in page)
        self._add_foreign(self.found.entries - behind + 1, self.found.entries)

    def _note_incident(self, incident: Incident) -> None:
        if incident.kind == "foreign":
            self._add_foreign(incident.seq, min(incident.last_seq, self.found.entries))
        elif incident.kind == "headless":
            self.found.not_proved.append(
                f"that govledger's append wrote each entry up to seq {incident.seq}: {_NO_RECORD}"
            )

    def report_foreign(self, *, allowed: bool) -> None:
        """Entries that the append function did not write, where the rest is proved."""
        if not self.found.proved:
            return
        for is_sealed in (False,) if allowed else (True, False):
            how = "is sealed like the others" if is_sealed else "is not sealed"
            for seq in sorted(self._foreign[is_sealed]):
                self.found.found(
                    "foreign-entry",
                    f"seq {seq} was not written by govledger's append; it {how}, and the proof of "
                    "the others stands",
                    seq,
                )

    # -- where it broke --

    async def _cut_off(self, anchored: _Anchored) -> None:
        found, size = self.found, anchored.last.size
        if not found.entries:
            found.found(
                "empty", f"the stream is empty or gone; the anchor has {counted(size, 'entry')}", 1
            )
            return
        if await self._tiles_lead_to(anchored.last) and await self._locate_by_tiles(anchored.last):
            return
        last = await self._last_copy()
        if self._head_seq == found.entries and (last is None or last.size <= found.entries):
            found.found(
                "rolled-back",
                f"restored to seq {found.entries}, the anchor has {size}: an earlier state of the "
                "ledger was put back",
                found.entries + 1,
            )
        else:
            found.found(
                "cut-off",
                f"the stream ends at seq {found.entries}, the anchor has {size}: the entries "
                "behind it were removed",
                found.entries + 1,
            )

    async def _last_copy(self) -> Checkpoint | None:
        last: Checkpoint | None = None
        try:
            async for note in _copies(self.server, self.tenant, self.found.origin):
                copy = Checkpoint.parse(note.text)
                last = copy if last is None or copy.size > last.size else last
        except NotProved:
            return None
        return last

    async def _locate(self, broken: Checkpoint, anchored: _Anchored) -> None:
        """Names the first entry that is not the sealed one: exactly, where the tiles in Redis have
        the anchored root, otherwise between two checkpoints.
        """
        for checkpoint in (anchored.last, broken):
            if await self._tiles_lead_to(checkpoint) and await self._locate_by_tiles(checkpoint):
                return
        first = self._good.size + 1 if self._good else 1
        self.found.found(
            "rewritten",
            f"the entries are not those that were sealed: the first that differs is between seq "
            f"{first} and {broken.size}",
            first,
        )

    async def _tiles_lead_to(self, checkpoint: Checkpoint) -> bool:
        """Whether the tiles in Redis have a signed root, with all of their hashes."""
        try:
            nodes = await self.tiles.nodes(cover(0, checkpoint.size))
        except NotProved:
            return False
        if range_hash(0, checkpoint.size, nodes) != checkpoint.root:
            return False
        tree = TileTree()
        async for leaves in self._tile_leaves(checkpoint.size):
            tree.extend(leaves)
        return tree.size == checkpoint.size and tree.root() == checkpoint.root

    async def _tile_leaves(self, size: int, *, first: int = 0) -> AsyncIterator[list[bytes]]:
        """Leaf hashes by the tiles of level 0, from tile `first` on, up to a size."""
        at_once = 64
        for start in range(first, -(-size // TILE_WIDTH), at_once):
            numbers = range(start, min(start + at_once, -(-size // TILE_WIDTH)))
            tiles = await self.tiles.read((0, number) for number in numbers)
            for number in numbers:
                yield tiles.get((0, number), [])[: size - number * TILE_WIDTH]

    async def _locate_by_tiles(self, checkpoint: Checkpoint) -> bool:
        """Whether an entry differs from its sealed leaf; the first one is a finding."""
        sealed = self._tile_leaves(checkpoint.size)
        known: list[bytes] = []
        at = 0
        async with aclosing(raw_pages(self.server, self.tenant)) as pages:
            async for page in pages:
                while len(known) < len(page) + 1 and (more := await anext(sealed, None)):
                    known += more
                for i, (raw_id, fields) in enumerate(page):
                    if i >= len(known):
                        return False
                    if self.hashed(raw_id, fields) != known[i]:
                        self.found.found(*self._told(at + i + 1, page[i:], known[i:]))
                        return True
                at += len(page)
                known = known[len(page) :]
        return False

    def _told(self, seq: int, page: list[list[Any]], known: list[bytes]) -> tuple[str, str, int]:
        """What happened to the first entry that differs, as far as what follows it shows."""
        (raw_id, fields), shown = page[0], page[0][0].decode(errors="replace")
        following = [self.hashed(*one) for one in page[:_WINDOW]]
        if following[0] in known[1:_WINDOW]:
            gone = known.index(following[0])
            if known[0] not in following:
                return "deleted", f"seq {seq} and {gone - 1} more were deleted", seq
            return "reordered", f"seq {seq} stands in another place", seq
        if known[0] in following:
            count = following.index(known[0])
            told = f"{counted(count, 'entry')} put in where seq {seq} was: {shown} on"
            return "inserted", told, seq
        time_ms, _ = split_id(raw_id)
        if self.hashed(b"%d-%d" % (time_ms, seq), fields) == known[0]:
            return "renumbered", f"seq {seq} has the id {shown} instead of {time_ms}-{seq}", seq
        if any(self.hashed(raw_id, other) == known[0] for _, other in page[1:_WINDOW]):
            return "reordered", f"seq {seq} has the content of another entry", seq
        return "edited", f"seq {seq} ({shown}) is not what was sealed", seq

    # -- what else is in Redis --

    async def read_copies(self, anchored: _Anchored) -> None:
        """The checkpoints in Redis: each must be signed, and of this log; `compare` looks at their
        roots.
        """
        others: set[str] = set()
        unknown = 0
        try:
            async for note in _copies(self.server, self.tenant, self.found.origin, others):
                copy = self._copy(anchored, note)
                self._copies += [copy] if copy else []
                unknown += copy is None
        except NotProved as error:
            told = f"{keys.evidence_checkpoints(self.tenant)}: {error.message}"
            self.found.found(f"copy-{error.facts['reason']}", told)
        self._copies.sort(key=lambda copy: copy.size)  # racing sealers file them as they come
        if others:
            told = f"checkpoints of other logs of this tenant: {', '.join(sorted(others))}"
            self.found.notes.append(f"Redis has {told}; they are not compared")
        if unknown:
            told = f"{counted(unknown, 'checkpoint')} of this log by a key that is not known here"
            self.found.notes.append(
                f"Redis has {told}; not compared: hand-overs stand in the anchor directory alone"
            )

    def _copy(self, anchored: _Anchored, note: Note) -> Checkpoint | None:
        """None where a key has signed it that may be the one before or behind a hand-over."""
        try:
            checkpoint = anchored.chain.verified(note)
        except NotProved as error:
            if anchored.has_handovers or error.facts["reason"] != "foreign-signature":
                raise
            return None
        if len(self._copies) == _MAX_COPIES:
            raise NotProved(f"there are more than {_MAX_COPIES}", reason="too-many")
        return checkpoint

    async def read_head(self) -> None:
        """The append function's own record of the stream, for `check_ends`."""
        try:
            self._head_seq = (await read_head(self.server, self.tenant)).seq
        except Unavailable:
            raise
        except LedgerError as error:
            self._head_damaged(error)

    def _head_damaged(self, error: LedgerError) -> None:
        if all(one.reason != "head-damaged" for one in self.found.findings):
            self.found.found("head-damaged", error.message)

    def check_ends(self) -> None:
        """Whether the head or a signed copy is in front of the stream: then entries are gone that
        the anchor does not know of.
        """
        entries = self.found.entries
        if self._head_seq > entries:
            self.found.found(
                "unsealed-gone",
                f"governance:head knows seq {self._head_seq}, the stream ends at {entries}: "
                "entries that were not sealed yet are gone",
                entries + 1,
            )
        if self._copies:
            self.found.found(
                "cut-off",
                f"Redis has a signed checkpoint of size {self._copies[-1].size}, the stream ends "
                f"at {entries}: entries behind what this anchor knows are gone",
                entries + 1,
            )


async def _of_type(reply: Awaitable[Any], key: str) -> Any:
    """A reply; a key that somebody has put another type under proves nothing."""
    try:
        return await reply
    except ServerError as error:
        if "WRONGTYPE" in error.message:
            raise NotProved(f"{key} is no stream", reason="malformed") from None
        raise


async def _copies(
    server: Server, tenant: str, origin: str, others: set[str] | None = None
) -> AsyncIterator[Note]:
    """The copies of a log's checkpoints in Redis. Those of other logs, such as of the deployment
    before a key was lost, are not looked at; `others` gets the first of their origins.

    Raises:
        NotProved: what is there is no copy of a signed note.
    """
    key, after = keys.evidence_checkpoints(tenant), "0-0"
    while True:
        page = await _of_type(
            server.command(key, "XRANGE", key, f"({after}", "+", "COUNT", _WINDOW), key
        )
        for raw_id, fields in page:
            if len(fields) != 2 or fields[0] != b"note":
                raise NotProved(f"{raw_id.decode()} is no note", reason="malformed")
            note = Note.parse(fields[1])
            if Handover.is_one(note):
                continue
            theirs = Checkpoint.parse(note.text).origin
            if theirs == origin:
                yield note
            elif others is not None and len(others) < _OTHERS_SHOWN:
                others.add(theirs[:_ORIGIN_SHOWN])
        if len(page) < _WINDOW:
            return
        after = page[-1][0].decode()
