"""Making proofs: of one entry, of a range, of one checkpoint continuing another.

They are made of the tiles in Redis and checked before they are handed out, so that damaged tiles
lead to an error and never to a proof that its reader refuses.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Final

from ledger import keys
from ledger.errors import InvalidInput, NotFound, NotProved
from ledger.leaf import EntryRecord
from ledger.ledger import Ledger
from ledger.merkle import consistency_ranges, cover, inclusion_ranges, leaf_hash
from ledger.note import Checkpoint, Note, VerifierKey
from ledger.proof import ConsistencyProof, InclusionProof, Proved, RangeProof
from ledger.stream import Entry
from ledger.tiles import Tiles
from ledger.verify import latest_checkpoint

__all__ = ["prove", "prove_consistency", "prove_range"]

MAX_RANGE_ENTRIES: Final = 100_000


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
        NotFound: there is no such entry, or no checkpoint.
        NotProved: it is not sealed yet, or was changed since; or the tiles are damaged.
    """
    if (event_id is None) == (seq is None):
        raise InvalidInput("prove: give either the event's id or its seq")
    if event_id is not None:
        entry = await ledger.get(tenant, event_id)
    else:
        entry = await ledger.get_seq(tenant, seq or 0)
    log_key = key.for_log(tenant)
    checkpoint, note = await latest_checkpoint(ledger.server, tenant, log_key, anchor)
    _check_sealed(entry.seq, checkpoint)
    index = entry.seq - 1
    tiles = Tiles(ledger.server, tenant, log_key.name)
    hashes = await tiles.range_hashes(inclusion_ranges(index, checkpoint.size))
    record = EntryRecord.of(log_key.name, entry.raw_id, entry.raw_fields)
    shown = record.without_data() if withhold_data else record
    proof = InclusionProof(index, tuple(hashes), note, shown)
    await _checked(proof, log_key, tiles, tenant, [record])
    return proof


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
    some, which show that no other was recorded in that time.

    Raises:
        NotFound: there is no entry in the range, or no checkpoint.
        NotProved: the range is not sealed yet, or was changed since; or the tiles are damaged.
        InvalidInput: more than 100,000 entries.
    """
    log_key = key.for_log(tenant)
    checkpoint, note = await latest_checkpoint(ledger.server, tenant, log_key, anchor)
    by_time = since is not None or to is not None
    if by_time:
        first_seq, last_seq = await _seqs_in(ledger, tenant, since, to, checkpoint.size)
    first, last = first_seq or 1, last_seq or checkpoint.size
    _check_sealed(last, checkpoint)
    if not 1 <= first <= last:
        raise InvalidInput(f"range: {first}..{last} has no entries")
    if last - first >= MAX_RANGE_ENTRIES:
        raise InvalidInput(
            f"range: {last - first + 1} entries; one proof has at most {MAX_RANGE_ENTRIES}",
            hint="prove it in parts: they join where one ends and the next begins",
        )
    entries = await _entries(ledger, tenant, first, last)
    records = [EntryRecord.of(log_key.name, one.raw_id, one.raw_fields) for one in entries]
    tiles = Tiles(ledger.server, tenant, log_key.name)
    before, behind = list(cover(0, first - 1)), list(cover(last, checkpoint.size))
    node = await tiles.nodes([*before, *behind])
    shown = [one.without_data() if withhold_data else one for one in records]
    left, right = tuple(map(node, before)), tuple(map(node, behind))
    proof = RangeProof(first - 1, left, right, note, tuple(shown))
    await _checked(proof, log_key, tiles, tenant, records)
    return proof


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
        NotFound: there is no checkpoint.
        NotProved: it does not continue it, or the tiles are damaged.
    """
    log_key = key.for_log(tenant)
    checkpoint, note = await latest_checkpoint(ledger.server, tenant, log_key, anchor)
    before = Checkpoint.parse(old.text)
    if before.size > checkpoint.size:
        raise NotProved(
            f"the earlier checkpoint has size {before.size}, the latest {checkpoint.size}",
            reason="rolled-back",
        )
    tiles = Tiles(ledger.server, tenant, log_key.name)
    hashes = await tiles.range_hashes(consistency_ranges(before.size, checkpoint.size))
    proof = ConsistencyProof(before.size, tuple(hashes), note)
    proof.verify([log_key], old)
    return proof


def _check_sealed(seq: int, checkpoint: Checkpoint) -> None:
    if seq > checkpoint.size:
        raise NotProved(
            f"seq {seq} is recorded and not sealed yet: the latest checkpoint ends at "
            f"{checkpoint.size}",
            hint="govledger seal --once, or wait for the sealer",
            reason="not-sealed",
        )


async def _checked(
    proof: InclusionProof | RangeProof,
    key: VerifierKey,
    tiles: Tiles,
    tenant: str,
    records: list[EntryRecord],
) -> Proved:
    """What the proof proves; where it does not, whether entries or tiles were changed."""
    try:
        return await asyncio.to_thread(proof.verify, [key])
    except NotProved as error:
        if error.facts["reason"] != "wrong-root":
            raise
    first = proof.index if isinstance(proof, InclusionProof) else proof.start
    for index, record in enumerate(records, first):
        (sealed,) = await tiles.range_hashes([(index, index + 1)])
        if leaf_hash(record.leaf_data()) != sealed:
            raise NotProved(
                f"seq {index + 1} is not what was sealed, or its tile was changed",
                hint=f"govledger verify {tenant} says which",
                reason="edited",
            )
    raise NotProved(
        "the tiles in Redis do not lead to the signed root",
        hint=f"govledger seal {tenant} --once --rebuild-tiles makes them anew",
        reason="tiles-damaged",
    )


async def _entries(ledger: Ledger, tenant: str, first: int, last: int) -> list[Entry]:
    entries = ledger.replay(tenant, after=first - 1, until=last, foreign=True)
    async with aclosing(entries):
        found = [entry async for entry in entries]
    if [entry.seq for entry in found] != list(range(first, last + 1)):
        raise NotProved(f"seq {first}..{last} are not all there", reason="deleted")
    return found


async def _seqs_in(
    ledger: Ledger, tenant: str, since: datetime | None, to: datetime | None, size: int
) -> tuple[int, int]:
    """The seqs of the entries recorded in a time, and of their neighbours."""
    first, last = None, None
    entries = ledger.replay(tenant, since=since, to=to, until=size, foreign=True)
    async with aclosing(entries):
        async for entry in entries:
            first, last = first or entry.seq, entry.seq
    if first is None or last is None:
        raise NotFound(
            f"tenant {keys.checked_tenant(tenant)}: nothing that is sealed was recorded then",
            tenant=tenant,
        )
    return max(first - 1, 1), min(last + 1, size)
