"""Proofs of entries and ranges: what they claim, from any state of what they are made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ledger import Ledger, errors, keys
from ledger.leaf import EntryRecord
from ledger.note import Checkpoint
from ledger.proof import Proved, parse_proof
from ledger.prove import prove, prove_consistency, prove_range
from ledger.service.exporting import export_tenant
from ledger.service.importing import import_tenant
from ledger.verify import verify
from tests.evidence import sealed_case


@pytest.fixture
async def case(valkey, tenant, tmp_path):
    async with sealed_case(valkey, tenant, tmp_path) as case:
        yield case


def options(case):
    return {"key": case.key.verifier(), "anchor": case.anchor}


def at(ms):
    return datetime.fromtimestamp(ms / 1000, UTC)


# -- completeness ------------------------------------------------------------------------------


def proved(first_seq, *ids, size=9):
    """Entries 4 to 6 of 9 were recorded at 40 to 60 ms, and so on."""
    entries = tuple(
        EntryRecord("o", one if isinstance(one, bytes) else b"%d-%d" % one, ()) for one in ids
    )
    return Proved(Checkpoint("o", size, b""), first_seq, entries, ())


MIDDLE = [(40, 4), (50, 5), (60, 6)]
WHOLE = [(10 * n, n) for n in range(1, 10)]


@pytest.mark.parametrize(
    ("first", "ids", "time", "seqs"),
    [
        (4, MIDDLE, (41, 59), [5]),
        (4, MIDDLE, (50, 50), [5]),
        (4, MIDDLE, (51, 59), []),
        (4, MIDDLE, (41, 60), None),
        (4, MIDDLE, (40, 59), None),
        (4, MIDDLE, (41, None), None),
        (4, MIDDLE, (None, 59), None),
        (4, MIDDLE, (0, 9), None),
        (4, MIDDLE, (70, 99), None),
        (1, WHOLE, (None, None), [*range(1, 10)]),
        (1, WHOLE, (0, 99), [*range(1, 10)]),
        (1, WHOLE, (0, 9), []),
        (9, WHOLE[8:], (91, 99), []),
        (9, WHOLE[8:], (90, 99), None),
        (8, WHOLE[7:], (85, 99), [9]),
        (1, [(10, 1), (10, 2), (11, 3)], (10, 10), [1, 2]),
        (4, [(40, 4), (60, 6), (50, 5)], (41, 59), None),
        (4, [(40, 4), (50, 5), (50, 5), (60, 6)], (41, 59), None),
        (4, [b"40", (50, 5), (60, 6)], (41, 59), None),
        (4, [], (41, 59), None),
    ],
)
def test_a_time_is_proved_by_what_lies_around_it(first, ids, time, seqs):
    """Only an entry on either side, or the log's ends, show that no other was recorded then."""
    found = proved(first, *ids)
    if seqs is None:
        with pytest.raises(errors.NotProved) as caught:
            found.seqs_recorded(*time)
        assert caught.value.facts["reason"] in {"incomplete", "out-of-order", "malformed"}
    else:
        assert list(found.seqs_recorded(*time)) == seqs


def test_a_time_that_ends_before_it_begins_is_refused():
    """Nothing was recorded in it, whatever the log has: that is no proof of anything."""
    with pytest.raises(errors.InvalidInput, match="ends before it begins"):
        proved(1, *WHOLE).seqs_recorded(50, 49)


@pytest.mark.parametrize(
    ("asked", "is_all"),
    [
        ((4, 6), True),
        ((5, 5), True),
        ((3, 5), False),
        ((5, 7), False),
        ((0, 5), False),
        ((None, 5), False),
        ((5, None), False),
        ((6, 5), False),
    ],
)
def test_seqs_that_are_asked_for_are_all_there(asked, is_all):
    """A range cut short does not pass for the one that was asked for."""
    if is_all:
        seqs = proved(4, *MIDDLE).seqs_between(*asked)
        assert (seqs[0], seqs[-1]) == asked
    else:
        with pytest.raises(errors.NotProved, match="is asked for"):
            proved(4, *MIDDLE).seqs_between(*asked)


async def test_time_range_with_unsealed_entries_is_refused(case):
    """Entries of that time that no checkpoint covers are not left out in silence."""
    since = datetime.now(UTC) - timedelta(hours=1)
    await case.append(13, 15)
    with pytest.raises(errors.NotProved, match="seq 15 is not sealed yet"):
        await prove_range(case.ledger, case.tenant, since=since, **options(case))
    await case.sealer().seal(case.tenant)
    proof = await prove_range(case.ledger, case.tenant, since=since, **options(case))
    assert len(proof.verify([case.key.verifier()]).seqs_recorded(None, None)) == 15


async def test_time_range_with_unregistered_entries_is_refused(case):
    """What others wrote behind the last entry that we know of is of that time, too."""
    last_ms = int(case.entries()[-1][0].split(b"-")[0])
    case.client.execute_command("XADD", case.stream, f"{last_ms + 5}-0", "x", "y")
    for since, to in ((last_ms, last_ms + 9), (None, last_ms + 5), (last_ms + 5, None)):
        span = {"since": at(since) if since else None, "to": at(to) if to else None}
        with pytest.raises(errors.NotProved, match="is not sealed yet") as caught:
            await prove_range(case.ledger, case.tenant, **span, **options(case))
        assert caught.value.facts["reason"] == "not-sealed"
    for since, to in ((last_ms, last_ms + 4), (last_ms + 6, None)):
        span = {"since": at(since), "to": at(to) if to else None}
        await prove_range(case.ledger, case.tenant, **span, **options(case))
    await case.append(14, 14)
    await case.sealer().seal(case.tenant)
    span = {"since": at(last_ms + 1), "to": at(last_ms + 5)}
    proof = await prove_range(case.ledger, case.tenant, **span, **options(case))
    found = proof.verify([case.key.verifier()])
    assert list(found.seqs_recorded(last_ms + 1, last_ms + 5)) == [13]


async def test_every_time_is_proved_with_its_neighbours(case):
    """Whatever the time, also one with nothing in it, and foreign entries in it, its reader can
    check that it is all.
    """
    last_ms = int(case.entries()[-1][0].split(b"-")[0])
    case.client.execute_command("XADD", case.stream, f"{last_ms + 5}-0", "x", "y")
    await case.append(14, 14)
    await case.sealer().seal(case.tenant)
    times = [int(one.split(b"-")[0]) for one, _ in case.entries()]
    last_ms = times[-1]
    moments = [None, times[0] - 1, times[0], times[12] - 1, times[12], times[12] + 1, last_ms]
    for since in moments:
        for to in [*moments, last_ms + 1]:
            if since is not None and to is not None and to < since:
                continue
            span = {"since": at(since) if since else None, "to": at(to) if to else None}
            if since is to is None:
                continue
            proof = await prove_range(case.ledger, case.tenant, **span, **options(case))
            seqs = (
                parse_proof(proof.encode()).verify([case.key.verifier()]).seqs_recorded(since, to)
            )
            inside = [n for n, ms in enumerate(times, 1) if (since or 0) <= ms <= (to or last_ms)]
            assert list(seqs) == inside, span
    with pytest.raises(errors.InvalidInput, match="ends before it begins"):
        await prove_range(case.ledger, case.tenant, since=at(9), to=at(8), **options(case))
    with pytest.raises(errors.InvalidInput, match="the first one is seq 1"):
        await prove_range(case.ledger, case.tenant, first_seq=0, last_seq=3, **options(case))


# -- what they are made of ---------------------------------------------------------------------


async def test_proofs_need_no_tiles(case):
    """Where the tiles are gone or damaged, the entries themselves lead to the same proofs."""
    await case.append(13, 700)
    old = (await prove(case.ledger, case.tenant, "d-3", **options(case))).note
    await case.sealer().seal(case.tenant)

    async def proofs():
        made = [
            await prove(case.ledger, case.tenant, f"d-{n}", **options(case)) for n in (1, 300, 700)
        ]
        made += [
            await prove_range(
                case.ledger, case.tenant, first_seq=250, last_seq=600, **options(case)
            ),
            await prove_consistency(case.ledger, case.tenant, old, **options(case)),
        ]
        return [one.encode() for one in made]

    honest = await proofs()
    case.client.hset(case.tiles, "0/0", b"x" * 32 * 256)
    case.client.hdel(case.tiles, "1/0")
    assert await proofs() == honest
    case.client.delete(case.tiles)
    assert await proofs() == honest


async def test_index_that_leads_to_another_event_proves_nothing(case):
    """Who asks for one decision is never handed the proof of another."""
    index = keys.index(case.tenant)
    case.client.hset(index, "d-1", case.client.hget(index, "d-2"))
    with pytest.raises(errors.IndexBehind, match="no valid value for id d-1"):
        await prove(case.ledger, case.tenant, "d-1", **options(case))


@pytest.mark.parametrize("shape", ["a large value", "many fields"])
async def test_large_foreign_entries_have_proofs_that_are_read(case, shape):
    """What can be sealed can be proved, and its proof is read back."""
    fields = ["x", "y" * 2_000_000] if shape == "a large value" else [f"{n}" for n in range(3000)]
    last_ms = int(case.entries()[-1][0].split(b"-")[0])
    case.client.execute_command("XADD", case.stream, f"{last_ms + 1}-0", *fields)
    await case.append(14, 14)
    await case.sealer().seal(case.tenant)
    raw = (await prove(case.ledger, case.tenant, seq=13, **options(case))).encode()
    assert parse_proof(raw).verify([case.key.verifier()]).first_seq == 13


async def test_a_proof_that_no_reader_takes_is_not_written(case, monkeypatch):
    """What is beyond a reader's limits is refused with the way out, and not handed out."""
    monkeypatch.setattr("ledger.proof.MAX_ENTRY_BYTES", 100)
    with pytest.raises(errors.InvalidInput, match="no reader would take it") as caught:
        await prove(case.ledger, case.tenant, "d-1", **options(case))
    assert "--withhold-data" in caught.value.hint
    monkeypatch.setattr("ledger.prove.MAX_RANGE_BYTES", 1000)
    with pytest.raises(errors.InvalidInput, match="in parts"):
        await prove_range(case.ledger, case.tenant, first_seq=1, last_seq=12, **options(case))


async def test_moved_tenant_keeps_its_log(case, fresh_server, tmp_path):
    """An exported tenant verifies and proves where it was imported, and is sealed on there as the
    log that it was: the origin is in the key, and all that leaves are made of is in the file.
    """
    path = tmp_path / "tenant.govledger"
    with path.open("wb") as file:
        await export_tenant(case.ledger.server, case.tenant, file)
    async with Ledger.connect(fresh_server().url) as there:
        with path.open("rb") as file:
            await import_tenant(there.server, file, path)
        key = case.key.verifier()
        found = await verify(there, case.tenant, key, anchor=case.anchor)
        assert (found.ok, found.sealed) == (True, 12), found.findings
        assert "the tiles in Redis are gone" in found.notes[0]
        proof = await prove(there, case.tenant, "d-7", **options(case))
        assert proof == await prove(case.ledger, case.tenant, "d-7", **options(case))
        case.ledger = there
        await case.append(13, 14)
        assert (await case.sealer().seal(case.tenant)).entries == 2
        found = await verify(there, case.tenant, key, anchor=case.anchor)
        assert (found.ok, found.sealed, found.notes) == (True, 14, []), found.findings
