"""Foreign hands: what others do to a stream is noticed, named, never folded, and numbered past."""

from __future__ import annotations

import logging
import re
import shutil
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import redis

from ledger import Decision, Ledger, errors, keys
from ledger.stream import Walk
from tests.servers import KINDS

MAXIMAL = f"{2**64 - 1}-{2**64 - 1}"


def decision(event_id):
    return Decision(id=event_id, at="2026-03-03T12:00:00Z", agent="a", action="b", verdict="allow")


@pytest.fixture
async def book(server):
    async with Ledger.connect(server.url) as opened:
        yield opened


@pytest.fixture
def stream(tenant):
    return keys.decisions(tenant)


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.WARNING, "ledger")
    return caplog


async def append(book, tenant, *ids):
    """One call for each id; the last receipt."""
    receipt = None
    for event_id in ids:
        receipt = await book.append(tenant, decision(event_id))
    return receipt


async def assert_reads(book, tenant, ids):
    """Every way of reading agrees: `ids` by ordinal, None for a foreign entry."""
    numbered = list(enumerate(ids, 1))
    whole = [entry async for entry in book.replay(tenant, foreign=True)]
    assert [(e.seq, None if e.foreign else e.id) for e in whole] == numbered
    assert [e.id async for e in book.replay(tenant)] == [i for i in ids if i]
    assert (await book.head(tenant)).seq == len(ids)
    for after in range(len(ids) + 1):
        found = [e.entry_id async for e in book.replay(tenant, after=after, foreign=True)]
        assert found == [e.entry_id for e in whole[after:]], after
    for entry in whole:
        got = await book.get_seq(tenant, entry.seq)
        assert (got.seq, got.entry_id, got.foreign) == (entry.seq, entry.entry_id, entry.foreign)
        if not entry.foreign:
            assert (await book.get(tenant, entry.id)).seq == entry.seq
            since = [e.seq async for e in book.replay(tenant, since=entry.recorded_at)]
            ours = [e for e in whole if not e.foreign]
            assert since == [e.seq for e in ours if e.recorded_ms >= entry.recorded_ms]


def missing(first, last):
    """What `pytest.raises` matches for a hole of these ordinals."""
    return rf"seq {first} was" if first == last else rf"seq {first}\.\.{last} was"


async def read_until_hole(book, tenant, after=0):
    """The ordinals handed out, and the hole (first, last) that ended it, if one did."""
    seqs = []
    try:
        async for entry in book.replay(tenant, after=after, foreign=True):
            seqs += [entry.seq]
    except errors.EntriesMissing as error:
        return seqs, (error.facts["first_seq"], error.facts["last_seq"])
    return seqs, None


# -- entries that others add ----------------------------------------------------------------------


def in_the_same_ms(head):
    ms, _, seq = head.entry_id.partition("-")
    return f"{ms}-{int(seq) + 7}"


def ahead(head, ms):
    return f"{int(head.entry_id.partition('-')[0]) + ms}-0"


ADDED_IDS = {
    "auto": lambda _: "*",
    "the same ms": in_the_same_ms,
    "the next ordinal's id": lambda head: f"{int(head.entry_id.split('-')[0]) + 1}-{head.seq + 1}",
    "the largest sequence half": lambda head: f"{head.entry_id.split('-')[0]}-{2**64 - 1}",
    "a minute ahead": lambda head: ahead(head, 60_000),
}


@pytest.mark.parametrize("new_id", ADDED_IDS.values(), ids=ADDED_IDS)
async def test_a_foreign_entry_is_named_and_numbered_past(
    book, server, tenant, *, stream, log, new_id
):
    """Its ordinal is consumed, it is named with its id, it is not handed out as an event."""
    await append(book, tenant, "a", "b")
    head = await book.head(tenant)
    added = server.cli("XADD", stream, new_id(head), "type", "decision.recorded", "id", "x")
    assert [e.id async for e in book.replay(tenant)] == ["a", "b"]
    assert added in log.text
    log.clear()
    receipt = await append(book, tenant, "c")
    assert receipt.seq == 4
    assert added in log.text
    assert receipt.recorded_at >= head_time(added)
    await append(book, tenant, "d", "a")
    await assert_reads(book, tenant, ["a", "b", None, "c", "d"])


def head_time(entry_id):
    return datetime.fromtimestamp(int(entry_id.partition("-")[0]) / 1000, UTC)


async def test_an_entry_that_imitates_ours_is_foreign(book, server, tenant, stream):
    """The right fields under the next id are no event: only the function's entries are."""
    await append(book, tenant, "a")
    (ours,) = [entry async for entry in book.replay(tenant)]
    imitation = ["type", "decision.recorded", "id", "forged", "data", ours.data]
    server.cli("XADD", stream, f"{ours.recorded_ms + 1}-2", *imitation)
    assert [e.id async for e in book.replay(tenant)] == ["a"]
    with pytest.raises(errors.NotFound):
        await book.get(tenant, "forged")
    await append(book, tenant, "b")
    await assert_reads(book, tenant, ["a", None, "b"])


async def test_a_stream_that_was_there_first_is_not_ours(book, server, tenant, stream):
    """Without the function's own record nothing is appended to a stream that somebody made."""
    server.cli("XADD", stream, "*", "x", "y")
    with pytest.raises(errors.IndexBehind, match="reindex"):
        await append(book, tenant, "a")
    with pytest.raises(errors.IndexBehind):
        await read_until_hole(book, tenant)
    assert await book.reindex(tenant) == 0
    await append(book, tenant, "a")
    await assert_reads(book, tenant, [None, "a"])


async def test_foreign_entries_between_ours(book, server, tenant, stream):
    """Several runs, two of them side by side, some within one millisecond."""
    await append(book, tenant, "a", "b")
    for _ in range(2):
        for _ in range(3):
            server.cli("XADD", stream, "*", "x", "y")
        await append(book, tenant, "a")  # a duplicate registers, and writes nothing in between
    await append(book, tenant, "c")
    server.cli("XADD", stream, in_the_same_ms(await book.head(tenant)), "x", "y")
    await append(book, tenant, "d")
    await assert_reads(book, tenant, ["a", "b", *[None] * 6, "c", None, "d"])


async def test_thousands_of_foreign_entries(book, server, tenant, *, stream, log):
    """More than one call registers: refused with how far it is, then numbered past."""
    await append(book, tenant, "a", "b")
    with server.client() as client:
        pipeline = client.pipeline(transaction=False)
        for _ in range(12_000):
            pipeline.xadd(stream, {"x": "y"})
        added = [raw.decode() for raw in pipeline.execute()]
    for registered in (5_000, 10_000):
        with pytest.raises(errors.ForeignEntries, match=added[registered - 1]):
            await append(book, tenant, "c")
    assert (await append(book, tenant, "c")).seq == 12_003
    assert [e.seq async for e in book.replay(tenant)] == [1, 2, 12_003]
    assert all(added[first] in log.text for first in (0, 5_000, 10_000))
    whole = [e async for e in book.replay(tenant, foreign=True)]
    assert [e.seq for e in whole] == list(range(1, 12_004))
    assert [e.entry_id for e in whole[2:-1]] == added
    for after in (2, 3, 5_001, 5_002, 5_003, 7_000, 10_002, 12_001, 12_002):
        found = [e.entry_id async for e in book.replay(tenant, after=after, foreign=True)]
        assert found == [e.entry_id for e in whole[after:]], after
        got = await book.get_seq(tenant, after + 1)
        assert (got.seq, got.entry_id) == (after + 1, whole[after].entry_id)


async def test_follow_goes_past_foreign_entries(book, server, tenant, stream):
    """Whoever follows gets ours alone, before and after a foreign one is registered."""
    await append(book, tenant, "a")
    followed = book.follow(tenant, after=0)
    assert (await anext(followed)).id == "a"
    server.cli("XADD", stream, "*", "x", "y")
    await append(book, tenant, "b")
    entry = await anext(followed)
    assert (entry.id, entry.seq) == ("b", 3)
    await followed.aclose()


# -- a last id that leaves no room ----------------------------------------------------------------


BLOCKING_IDS = {
    "the maximal id": lambda _: MAXIMAL,
    "an hour ahead": lambda head: ahead(head, 3_600_000),
    "sixteen digits": lambda _: f"{10**15}-1",
}


def follow_hint(server, error):
    """Run what the hint says, literally: list, delete each, then the two XSETID."""
    listing, *repairs = re.findall(r"`([^`]+)`", error.hint)
    for entry_id, _ in raw_entries(server, listing.split()):
        server.cli("XDEL", listing.split()[1], entry_id)
    assert len(repairs) == 2
    for command in repairs:
        server.cli(*command.split())


def raw_entries(server, command):
    with server.client() as client:
        return [(raw_id.decode(), fields) for raw_id, fields in client.execute_command(*command)]


@pytest.mark.parametrize("also", [0, 2], ids=["alone", "with others"])
@pytest.mark.parametrize("new_id", BLOCKING_IDS.values(), ids=BLOCKING_IDS)
async def test_a_blocked_stream_is_named_and_its_hint_repairs_it(
    book, server, tenant, *, stream, log, new_id, also
):
    """Appends are refused with the id and the commands that help; these really do."""
    last = await append(book, tenant, "a", "b")
    for _ in range(also):
        server.cli("XADD", stream, "*", "x", "y")
    added = server.cli("XADD", stream, new_id(await book.head(tenant)), "x", "y")
    for _ in range(2):
        with pytest.raises(errors.StreamBlocked) as refused:
            await append(book, tenant, "c")
        assert added in refused.value.message
        assert last.entry_id in refused.value.message
    with pytest.raises(errors.StreamBlocked):
        await book.reindex(tenant)
    assert [e.id async for e in book.replay(tenant)] == ["a", "b"]
    follow_hint(server, refused.value)
    assert (await append(book, tenant, "c")).seq == 3 + also
    assert (await append(book, tenant, "a")).duplicate
    await assert_reads(book, tenant, ["a", "b", *[None] * also, "c"])


async def test_an_id_set_to_the_maximum_is_named_and_its_hint_repairs_it(
    book, server, tenant, stream
):
    """XSETID alone blocks a stream too, without an entry to delete."""
    await append(book, tenant, "a")
    server.cli("XSETID", stream, MAXIMAL)
    with pytest.raises(errors.StreamBlocked) as refused:
        await append(book, tenant, "b")
    follow_hint(server, refused.value)
    assert (await append(book, tenant, "b")).seq == 2
    await assert_reads(book, tenant, ["a", "b"])


# -- counters that others set ---------------------------------------------------------------------


async def test_a_last_id_set_ahead_is_named_and_time_goes_on_from_there(
    book, server, tenant, *, stream, log
):
    """XSETID within five minutes: named, and the next entry is not before it."""
    await append(book, tenant, "a")
    moved = ahead(await book.head(tenant), 60_000)
    server.cli("XSETID", stream, moved)
    receipt = await append(book, tenant, "b")
    assert receipt.seq == 2
    assert receipt.recorded_at >= head_time(moved)
    assert moved in log.text
    await assert_reads(book, tenant, ["a", "b"])


@pytest.mark.parametrize("count", [5, 9_000])
async def test_a_counter_that_was_set_loses_no_entry(book, server, tenant, *, stream, log, count):
    """ENTRIESADDED set down or up: named; what is in the stream stays readable."""
    last = await append(book, tenant, *"abcd")
    await append(book, tenant, "e", "f")
    server.cli("XDEL", stream, last.entry_id)
    (tail, _) = raw_entries(server, ["XREVRANGE", stream, "+", "-", "COUNT", 1])[0]
    server.cli("XSETID", stream, tail, "ENTRIESADDED", count)
    receipt = await append(book, tenant, "g")
    assert receipt.seq == 7
    assert await read_until_hole(book, tenant) == ([1, 2, 3], (4, 4))
    assert await read_until_hole(book, tenant, after=4) == ([5, 6, 7], None)
    assert log.text


# -- entries that others delete -------------------------------------------------------------------


@pytest.mark.parametrize("gone", [(1, 1), (3, 4), (5, 5), (4, 5), (1, 5)])
@pytest.mark.parametrize("noticed", [False, True], ids=["unnoticed", "noticed"])
async def test_deleted_entries_are_missed_not_skipped(
    book, server, tenant, *, stream, log, gone, noticed
):
    """XDEL at the head, in the middle, at the tail: reading stops at the hole and names it."""
    await append(book, tenant, *"abcde")
    entries = [entry async for entry in book.replay(tenant)]
    first, last = gone
    for entry in entries[first - 1 : last]:
        server.cli("XDEL", stream, entry.entry_id)
    ids = "abcde"
    if noticed:
        log.clear()
        assert (await append(book, tenant, "f")).seq == 6
        assert f"{last - first + 1} recorded entries are gone" in log.text
        ids = "abcdef"
    everyone = list(range(1, len(ids) + 1))
    assert await read_until_hole(book, tenant) == (everyone[: first - 1], gone)
    for after in range(last, len(ids) + 1):
        assert await read_until_hole(book, tenant, after=after) == (everyone[after:], None)
    for after in range(first - 1, last):
        found, hole = await read_until_hole(book, tenant, after=after)
        assert (found, hole) == (everyone[after : first - 1], (after + 1, last))
    for seq in range(first, last + 1):
        with pytest.raises(errors.EntriesMissing):
            await book.get_seq(tenant, seq)
        with pytest.raises(errors.EntriesMissing, match=missing(seq, seq)):
            await book.get(tenant, ids[seq - 1])
    # What was acknowledged once is not recorded a second time.
    assert (await append(book, tenant, ids[first - 1])).duplicate


async def test_a_trimmed_stream_goes_on_densely(book, server, tenant, *, stream, log):
    """XTRIM to nothing, and to a few: the hole is named, numbers go on."""
    await append(book, tenant, *"abcd")
    server.cli("XTRIM", stream, "MAXLEN", "=", 2)
    assert (await append(book, tenant, "e")).seq == 5
    assert await read_until_hole(book, tenant) == ([], (1, 2))
    assert await read_until_hole(book, tenant, after=2) == ([3, 4, 5], None)
    server.cli("XTRIM", stream, "MAXLEN", "=", 0)
    assert await read_until_hole(book, tenant) == ([], (1, 5))
    assert (await append(book, tenant, "f")).seq == 6
    assert await read_until_hole(book, tenant) == ([], (1, 5))
    assert await read_until_hole(book, tenant, after=5) == ([6], None)
    assert "recorded entries are gone" in log.text


async def test_added_and_deleted_again(book, server, tenant, *, stream, log):
    """A foreign entry that did not stay takes no ordinal; that the tail moved is named."""
    await append(book, tenant, "a")
    added = server.cli("XADD", stream, "*", "x", "y")
    server.cli("XDEL", stream, added)
    assert (await append(book, tenant, "b")).seq == 2
    assert added in log.text
    await assert_reads(book, tenant, ["a", "b"])


async def test_one_deleted_and_one_added(book, server, tenant, *, stream, log):
    """Counts that cancel out hide neither: the foreign one is numbered, the hole is named."""
    await append(book, tenant, *"abc")
    second = await book.get_seq(tenant, 2)
    server.cli("XDEL", stream, second.entry_id)
    added = server.cli("XADD", stream, "*", "x", "y")
    assert (await append(book, tenant, "d")).seq == 5
    assert added in log.text
    assert "1 recorded entries are gone" in log.text
    assert await read_until_hole(book, tenant) == ([1], (2, 2))
    assert await read_until_hole(book, tenant, after=2) == ([3, 4, 5], None)


# -- streams that others delete -------------------------------------------------------------------


@pytest.mark.parametrize("made", [0, 2, 4, 6])
@pytest.mark.parametrize("noticed", [False, True], ids=["unnoticed", "noticed"])
async def test_a_stream_that_was_deleted_and_made_again(
    book, server, tenant, *, stream, log, made, noticed
):
    """Fewer, as many, more entries than ours had: ours are missed, theirs are foreign."""
    await append(book, tenant, *"abcd")
    server.cli("DEL", stream)
    for _ in range(made):
        server.cli("XADD", stream, "*", "x", "y")
    if not noticed:
        assert await read_until_hole(book, tenant) == ([], (1, 4))
        return
    assert (await append(book, tenant, "e")).seq == 5 + made
    assert "deleted and made again" in log.text or "4 recorded entries are gone" in log.text
    assert await read_until_hole(book, tenant) == ([], (1, 4))
    for after in range(4, 6 + made):
        found = list(range(after + 1, 6 + made))
        assert await read_until_hole(book, tenant, after=after) == (found, None)
    assert [e.id async for e in book.replay(tenant, after=4)] == ["e"]
    assert (await append(book, tenant, "a")).duplicate


async def test_a_stream_made_again_with_old_ids(book, server, tenant, *, stream, log):
    """Entries under ids below our tail are not taken for ours, and block nothing."""
    await append(book, tenant, *"abcd")
    server.cli("DEL", stream)
    server.cli("XADD", stream, "1-1", "x", "y")
    server.cli("XADD", stream, "2-3", "type", "t", "id", "a", "data", "{}")
    assert (await append(book, tenant, "e")).seq == 5
    assert "deleted and made again" in log.text
    assert await read_until_hole(book, tenant) == ([], (1, 4))
    assert await read_until_hole(book, tenant, after=4) == ([5], None)


async def test_everything_deleted_is_a_new_tenant(book, server, tenant, stream):
    """Stream, head and index gone: numbers begin anew under another epoch, which readers notice."""
    first = await append(book, tenant, "a")
    server.cli("DEL", stream, keys.head(tenant), keys.index(tenant))
    with pytest.raises(errors.NotFound):
        await read_until_hole(book, tenant)
    again = await append(book, tenant, "b")
    assert (again.seq, again.epoch == first.epoch) == (1, False)
    with pytest.raises(errors.LedgerRolledBack):
        await Walk(book.server, tenant).start_at(first.position)


# -- what the function keeps, deleted or cut ------------------------------------------------------


def cut_index(server, tenant):
    server.cli("HDEL", keys.index(tenant), "b")


def delete_index(server, tenant):
    server.cli("DEL", keys.index(tenant))


def delete_head(server, tenant):
    server.cli("DEL", keys.head(tenant))


def delete_both(server, tenant):
    server.cli("DEL", keys.head(tenant), keys.index(tenant))


def damage_value(server, tenant):
    server.cli("HSET", keys.index(tenant), "b", "damaged")


@pytest.mark.parametrize(
    "damage", [cut_index, delete_index, delete_head, delete_both, damage_value]
)
@pytest.mark.parametrize("foreign", ["none", "registered", "unregistered"])
async def test_append_refuses_until_reindex_has_repaired(
    book, server, tenant, *, stream, damage, foreign
):
    """No duplicate gets in through a gap; `reindex` closes it, and every entry is what it was."""
    ids = ["a", "b", "c"]
    await append(book, tenant, *ids)
    if foreign != "none":
        for _ in range(2):
            server.cli("XADD", stream, "*", "type", "x", "id", "y", "data", "z")
        ids += [None, None]
    if foreign == "registered":
        await append(book, tenant, "d")
        ids += ["d"]
    damage(server, tenant)
    for event_id in ("b", "new") if damage is not damage_value else ("b",):
        with pytest.raises(errors.IndexBehind, match=f"reindex {tenant}"):
            await append(book, tenant, event_id)
    with suppress(errors.IndexBehind):
        assert (await book.get(tenant, "b")).seq == 2
    length = server.cli("XLEN", stream)

    assert await book.reindex(tenant) == len([i for i in ids if i])
    assert server.cli("XLEN", stream) == length
    again = await append(book, tenant, "b")
    assert (again.seq, again.duplicate) == (2, True)
    assert (await append(book, tenant, "new")).seq == len(ids) + 1
    await assert_reads(book, tenant, [*ids, "new"])


async def test_reindex_without_a_gap_changes_nothing(book, server, tenant):
    """Run on a whole tenant it leaves head and index as they are."""
    await append(book, tenant, *"abc")
    before = server.cli("HGETALL", keys.head(tenant))
    with server.client() as client:
        index = client.hgetall(keys.index(tenant))
        progress = []
        assert await book.reindex(tenant, progress.append) == 3
        assert client.hgetall(keys.index(tenant)) == index
    assert server.cli("HGETALL", keys.head(tenant)) == before
    assert sum(progress) == 3
    assert server.cli("EXISTS", keys.index_rebuild(tenant)) == 0


async def test_reindex_does_not_give_an_ordinal_out_twice(book, server, tenant, stream):
    """After the tail was deleted and the index too, numbers still go on behind the deleted one."""
    last = await append(book, tenant, *"abc")
    server.cli("XDEL", stream, last.entry_id)
    delete_index(server, tenant)
    assert await book.reindex(tenant) == 2
    receipt = await append(book, tenant, "d")
    assert (receipt.seq, receipt.epoch) == (4, last.epoch)
    assert await read_until_hole(book, tenant) == ([1, 2], (3, 3))


async def test_a_lost_head_gets_a_new_epoch(book, server, tenant):
    """Kept positions are not valid against a record that was rebuilt."""
    receipt = await append(book, tenant, "a")
    delete_head(server, tenant)
    with pytest.raises(errors.IndexBehind):
        await book.head(tenant)
    await book.reindex(tenant)
    assert (await book.head(tenant)).epoch != receipt.epoch
    with pytest.raises(errors.LedgerRolledBack):
        await Walk(book.server, tenant).start_at(receipt.position)


@pytest.mark.parametrize("gone", ["stream", "stream and head", "stream and index"])
async def test_reindex_gets_out_of_any_loss(book, server, tenant, *, stream, gone):
    """Whatever is deleted, append never stays refused with advice that does not help."""
    await append(book, tenant, "a", "b")
    others = {"stream": [], "stream and head": [keys.head(tenant)]}
    server.cli("DEL", stream, *others.get(gone, [keys.index(tenant)]))
    if gone != "stream":
        with pytest.raises(errors.IndexBehind, match="reindex"):
            await append(book, tenant, "c")
        if gone == "stream and head":
            with pytest.raises(errors.IndexBehind):
                await read_until_hole(book, tenant)
    assert await book.reindex(tenant) == 0
    receipt = await append(book, tenant, "c")
    # Without the head nothing says how far the numbers were: a new epoch does.
    assert receipt.seq == (1 if gone == "stream and head" else 3)


async def test_reindex_of_nobody(book, tenant):
    """A tenant without any key is not found, and gets none."""
    with pytest.raises(errors.NotFound):
        await book.reindex(tenant)
    assert (await book.head(tenant)).epoch == ""


async def test_reindex_of_thousands_with_foreign_entries(book, server, tenant, stream):
    """Several pages, several runs, more foreign entries than one call registers."""
    await book.append_many(tenant, [decision(f"d-{n}") for n in range(1000)])
    with server.client() as client:
        pipeline = client.pipeline(transaction=False)
        for _ in range(6_000):
            pipeline.xadd(stream, {"x": "y"})
        pipeline.execute()
    delete_index(server, tenant)
    assert await book.reindex(tenant) == 1000
    receipts = await book.append_many(tenant, [decision(f"d-{n}") for n in range(500, 1500)])
    assert [r.duplicate for r in receipts] == [True] * 500 + [False] * 500
    assert receipts[-1].seq == 7_500
    for damage in (delete_both, delete_head):
        damage(server, tenant)
        assert await book.reindex(tenant) == 1500
        found = [e.seq async for e in book.replay(tenant)]
        assert found == [*range(1, 1001), *range(7_001, 7_501)]


# -- rolled back ----------------------------------------------------------------------------------


async def read_from(book, tenant, position):
    """Every entry behind a position that was kept."""
    walk = Walk(book.server, tenant)
    await walk.start_at(position)
    return [entry async for page in walk.pages() for entry in page]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unannounced_rollback_is_noticed(fresh_server, tenant, tmp_path, kind):
    """Old files put back and written on: a reader with a later position does not read on."""
    server = fresh_server(kind)
    async with Ledger.connect(server.url) as book:
        await append(book, tenant, *"abc")
        server.stop()
        shutil.copytree(server.directory / "appendonlydir", tmp_path / "old")
        server.restart()
        last = await append(book, tenant, *"de")
        server.stop()
        shutil.rmtree(server.directory / "appendonlydir")
        shutil.copytree(tmp_path / "old", server.directory / "appendonlydir")
        server.restart()
        with pytest.raises(errors.LedgerRolledBack):
            await Walk(book.server, tenant).start_at(last.position)
        with pytest.raises(errors.LedgerRolledBack):
            await read_until_hole(book, tenant, after=5)
        await append(book, tenant, *"xyz")  # now the head is beyond the position
        with pytest.raises(errors.LedgerRolledBack):
            await read_from(book, tenant, last.position)


async def with_two_histories(book, server, tenant, *, meanwhile=None):
    """A walk to, and a position in, one history, and now another one in its place: what was
    recorded by a node whose clock was behind, under the same epoch and the same ordinals, and went
    past it since. `meanwhile` is awaited while the first one stands.
    """
    record = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    with server.client() as client:
        await append(book, tenant, *"abc")
        shared = {key: client.dump(key) for key in record}
        slow = await append(book, tenant, *"de")
        other = {key: client.dump(key) for key in record}
        while server_time(server) <= slow.recorded_at:
            pass
        for key, value in shared.items():
            client.restore(key, 0, value, replace=True)
        walk = Walk(book.server, tenant)
        await walk.start_after(0)
        last = await append(book, tenant, *"xy")
        await walk.refresh()
        assert [entry.id async for page in walk.pages() for entry in page] == list("abcxy")
        if meanwhile is not None:
            await meanwhile()
        for key, value in other.items():
            client.restore(key, 0, value, replace=True)
    assert (await append(book, tenant, "f")).seq == 6
    return walk, last.position


async def test_a_history_that_goes_on_from_another_entry_is_noticed(book, server, tenant):
    """A position whose entry is not in the ledger any more is not gone on from, though the next
    ordinal lies behind it: neither by a new walk nor by one that was there before the failover.
    """
    walk, position = await with_two_histories(book, server, tenant)
    with pytest.raises(errors.LedgerRolledBack, match=r"lies entry .*-5"):
        await read_from(book, tenant, position)
    await walk.refresh()
    with pytest.raises(errors.LedgerRolledBack, match=r"lies entry .*-5"):
        [page async for page in walk.pages()]
    assert await read_until_hole(book, tenant) == ([1, 2, 3, 4, 5, 6], None)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("gone", ["it", "it and more", "all before it", "all", "it among foreign"])
async def test_a_deleted_entry_is_no_other_history(
    book, server, tenant, *, stream, gone, registered
):
    """A position whose entry was deleted or trimmed is gone on from, whether or not an append has
    registered that, and before and after there is more to read.
    """
    receipts = []
    for event_id in "abcd":
        receipts.append(await append(book, tenant, event_id))
        if gone == "it among foreign":
            server.cli("XADD", stream, "*", "x", "y")
    at = receipts[2].position
    trims = {"all before it": f"{receipts[3].recorded_ms}-{receipts[3].seq}", "all": "+"}
    if gone == "all before it":
        server.cli("XTRIM", stream, "MINID", "=", trims[gone])
    elif gone == "all":
        server.cli("XTRIM", stream, "MAXLEN", "=", 0)
    else:
        more = [receipts[1].entry_id] if gone == "it and more" else []
        server.cli("XDEL", stream, at.entry_id, *more)
    behind = [] if gone == "all" else ["d"]
    if registered:
        await append(book, tenant, "e")
        behind.append("e")
    if gone == "all":
        with pytest.raises(errors.EntriesMissing, match="seq 4"):
            await read_from(book, tenant, at)
        return
    entries = await read_from(book, tenant, at)
    assert [entry.id for entry in entries if not entry.foreign] == behind
    await append(book, tenant, "f")
    walk = Walk(book.server, tenant)
    await walk.start_at(at)
    walk.page_entries = 1
    found = [entry.id async for page in walk.pages() for entry in page if not entry.foreign]
    assert found == [*behind, "f"]


async def test_an_entry_that_is_gone_and_that_nobody_deleted_is_noticed(
    book, server, tenant, stream
):
    """Where nothing explains that a position's entry is not there, it is not gone on from."""
    await append(book, tenant, *"abc")
    at = (await append(book, tenant, "d")).position
    with server.client() as client:
        client.xdel(stream, at.entry_id)
        client.execute_command(
            "XSETID", stream, at.entry_id, "ENTRIESADDED", 3, "MAXDELETEDID", "0-1"
        )
        client.hset(keys.head(tenant), mapping={"added": 3, "length": 3})
    with pytest.raises(errors.LedgerRolledBack, match="nobody deleted it"):
        await read_from(book, tenant, at)


# -- odd questions --------------------------------------------------------------------------------


async def test_odd_places_to_begin(book, server, tenant):
    """Beyond the head, before the first, at the ends of time: an answer or a clear refusal."""
    await append(book, tenant, *"abc")
    assert await read_until_hole(book, tenant, after=3) == ([], None)
    for after in (4, 2**63):
        with pytest.raises(errors.LedgerRolledBack, match="its head is 3"):
            await read_until_hole(book, tenant, after=after)
    with pytest.raises(errors.InvalidInput):
        await read_until_hole(book, tenant, after=-1)
    for seq in (0, -1, 4, 2**63):
        with pytest.raises(errors.NotFound):
            await book.get_seq(tenant, seq)
    for odd in ("\ud800", "", "nobody", "x" * 1000):
        with pytest.raises(errors.NotFound):
            await book.get(tenant, odd)
    begin, end = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    assert [e.id async for e in book.replay(tenant, since=begin, to=end)] == ["a", "b", "c"]
    assert [e async for e in book.replay(tenant, since=end)] == []
    assert [e async for e in book.replay(tenant, to=begin)] == []
    with pytest.raises(errors.InvalidInput, match="no time zone"):
        await anext(book.replay(tenant, since=datetime.now()))  # noqa: DTZ005 - that is the point


async def test_a_replay_ends_at_the_head_there_was_when_it_began(book, tenant):
    """A writer that is as fast as the reader does not keep a replay from ending."""
    await append(book, tenant, "a", "b")
    found = []
    async for entry in book.replay(tenant):
        found += [entry.id]
        await append(book, tenant, f"after {entry.id}")
    assert found == ["a", "b"]
    replayed = book.replay(tenant, until=3)
    assert (await anext(replayed)).id == "a"
    await replayed.aclose()
    assert [e.id async for e in book.replay(tenant, until=3)] == ["a", "b", "after a"]


async def test_after_and_since_together(book, server, tenant):
    """The later of the two is where it begins."""
    receipts = []
    for event_id in "abc":
        receipts.append(await append(book, tenant, event_id))
        # The next one must be recorded in a later millisecond.
        now = receipts[-1].recorded_at
        while server_time(server) <= now:
            pass
    for after in range(4):
        for since in range(3):
            at = receipts[since].recorded_at
            found = [e.seq async for e in book.replay(tenant, after=after, since=at)]
            assert found == list(range(max(after, since) + 1, 4)), (after, since)
    late = receipts[-1].recorded_at + timedelta(seconds=1)
    assert [e async for e in book.replay(tenant, after=1, since=late)] == []


def server_time(server):
    seconds, micros = server.cli("TIME")
    return datetime.fromtimestamp(int(seconds) + int(micros) // 1000 / 1000, UTC)


async def test_a_stream_of_another_type_is_an_error_not_a_hole(book, server, tenant, stream):
    """A key that is no stream any more is named by the server's own words."""
    await append(book, tenant, "a")
    server.cli("DEL", stream)
    server.cli("SET", stream, "mine")
    for question in (append(book, tenant, "b"), read_until_hole(book, tenant)):
        with pytest.raises(errors.LedgerError, match="wrong kind of value"):
            await question
    with pytest.raises(redis.ResponseError):
        server.cli("XLEN", stream)


async def test_an_imitation_in_place_of_the_deleted_tail_is_not_ours(server, tenant):
    """The last entry deleted, and one put behind it with its ordinal: replay names the hole."""
    event = Decision(id="a", agent="a", action="b", verdict="deny")
    async with Ledger.connect(server.url) as ledger:
        receipt = await ledger.append(tenant, event)
        stream = keys.decisions(tenant)
        server.cli("XDEL", stream, receipt.entry_id)
        forged = {"type": "decision.recorded", "id": "a", "data": '{"verdict":"allow"}'}
        flat = [part for pair in forged.items() for part in pair]
        server.cli("XADD", stream, f"{receipt.recorded_ms + 1}-1", *flat)
        with pytest.raises(errors.EntriesMissing, match="seq 1"):
            [entry async for entry in ledger.replay(tenant)]
