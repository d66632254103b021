"""Making proofs: of one entry, of a range, of one checkpoint continuing another.

They are made of the tiles in Redis, or where these are gone or damaged, of all entries, and read
back and checked before they are handed out: never is there a proof that its reader refuses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

from ledger import keys
from ledger.errors import InvalidInput, NotProved
from ledger.leaf import EntryRecord, leaf_hasher
from ledger.ledger import Ledger, time_ms
from ledger.merkle import Node, consistency_ranges, cover, inclusion_ranges, leaf_hash, range_hash
from ledger.note import Checkpoint, Note, VerifierKey
from ledger.proof import (
    MAX_RANGE_BYTES,
    MAX_RANGE_ENTRIES,
    ConsistencyProof,
    InclusionProof,
    RangeProof,
    check_time,
    parse_proof,
)
from ledger.server import Server
from ledger.stream import Entry, Head, raw_pages, split_id
from ledger.tiles import DerivedTiles, Tiles
from ledger.verify import latest_checkpoint

__all__ = ["prove", "prove_consistency", "prove_range"]

_OF_TILES: Final = ("tiles-damaged", "wrong-root", "inconsistent")
"""Reasons that tiles can be to blame for."""

Hashes = Callable[[Node], bytes]
T = TypeVar("T")
Single = TypeVar("Single", InclusionProof, RangeProof)
_log = logging.getLogger("ledger")


async def prove(
    ledger: Ledger,
    tenant: str,
    event_id: str | None = None,
    *,
    key: VerifierKey,
    seq: int | None = None,
    anchor: str | Path | None = None,
    withhold_data: bool = False,
) -> InclusionProof:
    """A proof that the entry of an event, or with a seq, is in the log.

    Args:
        ledger: where it is.
        tenant: whose.
        event_id: the event's id.
        key: the log's or its deployment's.
        seq: instead of `event_id`.
        anchor: take the latest checkpoint from there, not its copy in Redis.
        withhold_data: leave out `data`; its digest is in the proof.

    Raises:
        NotFound: there is no such entry.
        NotProved: it is not sealed yet, or was changed since.
        IndexBehind: the index leads to another event.
        InvalidInput: it is larger than readers take.
    """
    if (event_id is None) == (seq is None):
        raise InvalidInput("prove: give either the event's id or its seq")
    if event_id is not None:
        entry = await ledger.get(tenant, event_id)
    else:
        entry = await ledger.get_seq(tenant, seq or 0)
    log = await _Log.at(ledger, tenant, key, anchor)
    _check_sealed(entry.seq, log.checkpoint)
    index, ranges = entry.seq - 1, inclusion_ranges(entry.seq - 1, log.checkpoint.size)
    record = EntryRecord.of(log.key.name, entry.raw_id, entry.raw_fields)
    shown = record.without_data() if withhold_data else record

    def make(node: Hashes) -> InclusionProof:
        hashes = tuple(range_hash(*one, node) for one in ranges)
        return _checked(InclusionProof(index, hashes, log.note, shown), log.key)

    nodes = [node for one in ranges for node in cover(*one)]
    return await log.proof(make, nodes, index, [record])


async def prove_range(
    ledger: Ledger,
    tenant: str,
    *,
    key: VerifierKey,
    first_seq: int | None = None,
    last_seq: int | None = None,
    since: datetime | None = None,
    to: datetime | None = None,
    anchor: str | Path | None = None,
    withhold_data: bool = False,
) -> RangeProof:
    """A proof that these entries, and no others between them, are in the log.

    By seq, or by recorded time: then with the entry before and the one behind, where there are
    some, which show that no other was recorded in that time (`Proved.seqs_recorded`); where none
    was, with these two alone.

    Raises:
        NotProved: there is no checkpoint, the range is not all sealed yet, or it was changed since.
        InvalidInput: more than 100,000 entries, or larger than readers take.
    """
    log = await _Log.at(ledger, tenant, key, anchor)
    size = log.checkpoint.size
    if since is not None or to is not None:
        first, last = await _seqs_in(ledger, tenant, time_ms(since), time_ms(to), log.checkpoint)
    else:
        first = 1 if first_seq is None else first_seq
        last = size if last_seq is None else last_seq
    if not 1 <= first <= last:
        raise InvalidInput(f"range: {first}..{last} has no entries", hint="the first one is seq 1")
    _check_sealed(last, log.checkpoint)
    entries = await _entries(ledger, tenant, first, last)
    records = [EntryRecord.of(log.key.name, one.raw_id, one.raw_fields) for one in entries]
    shown = tuple(one.without_data() if withhold_data else one for one in records)
    before, behind = list(cover(0, first - 1)), list(cover(last, size))

    def make(node: Hashes) -> RangeProof:
        left, right = tuple(map(node, before)), tuple(map(node, behind))
        return _checked(RangeProof(first - 1, left, right, log.note, shown), log.key)

    return await log.proof(make, [*before, *behind], first - 1, records)


async def prove_consistency(
    ledger: Ledger,
    tenant: str,
    old: Note,
    *,
    key: VerifierKey,
    anchor: str | Path | None = None,
) -> ConsistencyProof:
    """A proof that the latest checkpoint continues `old`, an earlier one.

    Raises:
        NotProved: it does not continue it, or there is no checkpoint.
    """
    log = await _Log.at(ledger, tenant, key, anchor)
    before = Checkpoint.parse(old.text)
    if before.size > log.checkpoint.size:
        raise NotProved(
            f"the earlier checkpoint has size {before.size}, the latest {log.checkpoint.size}",
            reason="rolled-back",
        )
    ranges = consistency_ranges(before.size, log.checkpoint.size)

    def make(node: Hashes) -> ConsistencyProof:
        hashes = tuple(range_hash(*one, node) for one in ranges)
        proof = ConsistencyProof(before.size, hashes, log.note)
        proof.verify([log.key], old)
        return proof

    return await log.proof(make, [node for one in ranges for node in cover(*one)])


@dataclass(frozen=True, slots=True)
class _Log:
    """A tenant's log at its latest checkpoint."""

    server: Server
    tenant: str
    key: VerifierKey
    checkpoint: Checkpoint
    note: Note

    @classmethod
    async def at(
        cls, ledger: Ledger, tenant: str, key: VerifierKey, anchor: str | Path | None
    ) -> _Log:
        log_key = key.for_log(tenant)
        checkpoint, note = await latest_checkpoint(ledger.server, tenant, log_key, anchor)
        return cls(ledger.server, tenant, log_key, checkpoint, note)

    async def proof(
        self,
        make: Callable[[Hashes], T],
        nodes: list[Node],
        first: int = 0,
        records: Sequence[EntryRecord] = (),
    ) -> T:
        """What `make` makes and checks, of the tiles in Redis, or where these are gone or do not
        lead to the root, of all entries. `records`: entries in it, for the message, from `first`.
        """
        tiles = Tiles(self.server, self.tenant, self.key.name)
        try:
            return await asyncio.to_thread(make, await tiles.nodes(nodes))
        except NotProved as error:
            if error.facts["reason"] not in _OF_TILES:
                raise
            _log.warning("tenant %s: proved by reading all entries: %s", self.tenant, error)
        derived = await self._derived(nodes)
        if derived.tree.root() == self.checkpoint.root:
            return await asyncio.to_thread(make, derived.hashes())
        seq = await _edited(tiles, first, records)
        which = f"seq {seq} is" if seq else f"the entries up to seq {self.checkpoint.size} are"
        raise NotProved(
            f"{which} not what was sealed",
            hint=f"govledger verify {self.tenant} says more",
            reason="edited" if seq else "rewritten",
        )

    async def _derived(self, nodes: list[Node]) -> DerivedTiles:
        hashed, derived, size = (
            leaf_hasher(self.key.name),
            DerivedTiles(nodes),
            self.checkpoint.size,
        )
        async with aclosing(raw_pages(self.server, self.tenant)) as pages:
            async for page in pages:
                wanted = page[: size - derived.tree.size]
                derived.tree.extend([hashed(raw_id, fields) for raw_id, fields in wanted])
                if derived.tree.size == size:
                    break
        return derived


def _check_sealed(seq: int, checkpoint: Checkpoint) -> None:
    if seq > checkpoint.size:
        raise NotProved(
            f"seq {seq} is not sealed yet: the latest checkpoint ends at {checkpoint.size}",
            hint="govledger seal --once, or wait for the sealer",
            reason="not-sealed",
        )


def _checked(proof: Single, key: VerifierKey) -> Single:
    """Itself, as its reader will read it.

    Raises:
        InvalidInput: it is larger than readers take.
        NotProved: it does not lead to the root.
    """
    try:
        again = parse_proof(proof.encode())
    except NotProved as error:
        raise InvalidInput(
            f"no reader would take it: {error.message}",
            hint="leave the data out (--withhold-data), or prove a range in parts",
        ) from None
    assert isinstance(again, InclusionProof | RangeProof)
    again.verify([key])
    return proof


async def _edited(tiles: Tiles, first: int, records: Sequence[EntryRecord]) -> int | None:
    """The seq of the first entry that is not the leaf which the tiles have; None = no such one."""
    leaves = [(0, index) for index in range(first, first + len(records))]
    try:
        node = await tiles.nodes(leaves)
    except NotProved:
        return None
    pairs = zip(leaves, records, strict=True)
    differ = (leaf[1] + 1 for leaf, one in pairs if leaf_hash(one.leaf_data()) != node(leaf))
    return next(differ, None)


async def _entries(ledger: Ledger, tenant: str, first: int, last: int) -> list[Entry]:
    if last - first >= MAX_RANGE_ENTRIES:
        raise InvalidInput(
            f"range: {last - first + 1} entries; one proof has at most {MAX_RANGE_ENTRIES}",
            hint="prove it in parts: they join where one ends and the next begins",
        )
    found, size = [], 0
    async with aclosing(
        ledger.replay(tenant, after=first - 1, until=last, foreign=True)
    ) as entries:
        async for entry in entries:
            found.append(entry)
            size += sum(map(len, entry.raw_fields))
            if size > MAX_RANGE_BYTES // 2:  # base64 and the rest come on top
                raise InvalidInput(
                    f"range: seq {first} to {entry.seq} have {size} bytes; one proof has at most "
                    f"{MAX_RANGE_BYTES // 2}",
                    hint="prove it in parts: they join where one ends and the next begins",
                )
    if [entry.seq for entry in found] != list(range(first, last + 1)):
        raise NotProved(f"seq {first}..{last} are not all there", reason="deleted")
    return found


async def _seqs_in(
    ledger: Ledger, tenant: str, since_ms: int | None, to_ms: int | None, checkpoint: Checkpoint
) -> tuple[int, int]:
    """The first and last seq of the entries recorded in a time and of their neighbours; only these
    where nothing was recorded.

    Raises:
        NotProved: some of that time are not sealed yet.
        InvalidInput: it ends before it begins.
    """
    check_time(since_ms, to_ms)
    head = await ledger.head(tenant)
    begin = 1 if since_ms is None else await _first_from(ledger, tenant, since_ms, head.seq)
    end = head.seq + 1 if to_ms is None else await _first_from(ledger, tenant, to_ms + 1, head.seq)
    if begin < end:
        _check_sealed(end - 1, checkpoint)
    if end > head.seq:
        await _check_all_registered(ledger, tenant, head, since_ms, to_ms)
    return max(min(begin - 1, checkpoint.size), 1), min(end, checkpoint.size)


async def _check_all_registered(
    ledger: Ledger, tenant: str, head: Head, since_ms: int | None, to_ms: int | None
) -> None:
    """That nobody wrote, in that time, behind the last entry that the append function knows of."""
    stream = keys.decisions(tenant)
    begin = f"({head.entry_id}"
    if since_ms is not None and since_ms > split_id(head.entry_id)[0]:
        begin = str(since_ms)  # an id without its second half: that of the first in this ms
    end = "+" if to_ms is None else str(max(to_ms, 0))  # and here of the last
    found = await ledger.server.command(stream, "XRANGE", stream, begin, end, "COUNT", 1)
    if found:
        entry_id = found[0][0].decode()
        raise NotProved(
            f"the entry {entry_id} is of that time, and is not sealed yet: others wrote it behind "
            f"seq {head.seq}",
            hint="the next append registers it, and the next seal covers it; verify names it",
            reason="not-sealed",
        )


async def _first_from(ledger: Ledger, tenant: str, time_ms: int, last: int) -> int:
    """The first seq recorded at a time or later, foreign entries included; `last` + 1 = none."""
    low, high = 1, last + 1
    while low < high:
        middle = (low + high) // 2
        if (await ledger.get_seq(tenant, middle)).recorded_ms >= time_ms:
            high = middle
        else:
            low = middle + 1
    return low
