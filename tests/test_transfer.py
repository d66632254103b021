"""A tenant's record moves between servers as it is: bytes, ids, foreign entries, holes."""

from __future__ import annotations

import asyncio
import hashlib
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from ledger import Ledger, errors, keys, load_settings
from ledger.server import pack
from ledger.service.exporting import export_tenant, stream_head
from ledger.service.importing import Cut, import_tenant
from ledger.service.portable import ExportReader, entry_record
from ledger.stream import Incident
from projections import Projector, StateReader
from tests.commands import run
from tests.histories import events, raw_entries, recorded, with_foreign_hands
from tests.proxy import Proxy
from tests.servers import KINDS, new_tenant
from tests.test_foreign_any import PICKS, ForeignHands, picked

PATH = Path("a.ledger")


async def exported(ledger, tenant):
    """An export's bytes."""
    file = io.BytesIO()
    await export_tenant(ledger.server, tenant, file)
    return file.getvalue()


async def imported(ledger, raw, **options):
    return await import_tenant(ledger.server, io.BytesIO(raw), PATH, **options)


def renamed(raw, old, new):
    """The export of another tenant, with the checksum that belongs to it."""
    assert len(old) == len(new)
    body = raw[: raw.rindex(b"*2\r\n$3\r\nend\r\n")].replace(old.encode(), new.encode(), 1)
    return body + pack(b"end", hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize(
    ("source_kind", "target_kind"),
    [("valkey9", "redis7"), ("redis7", "redis8"), ("redis8", "valkey9"), ("valkey9", "valkey9")],
)
async def test_a_record_moves_as_it_is(shared_server, tenant, source_kind, target_kind):
    """Entry for entry and byte for byte, foreign ones too, on whatever server; in a new epoch."""
    source, target = shared_server(source_kind), shared_server(target_kind)
    async with Ledger.connect(source.url) as old, Ledger.connect(target.url) as new:
        await with_foreign_hands(old, source, tenant)
        raw = await exported(old, tenant)
        moved = tenant
        if source is target:
            moved = new_tenant()
            raw = renamed(raw, tenant, moved)
        before = raw_entries(source, tenant)
        done = await imported(new, raw)
        assert raw_entries(target, moved) == before
        assert (done.entries, done.own, done.seq) == (23, 19, 24)
        assert await recorded(new, moved) == await recorded(old, tenant)
        heads = await old.head(tenant), await new.head(moved)
        assert heads[0].epoch != heads[1].epoch
        assert [h.seq for h in heads] == [24, 24]
        assert heads[0].entry_id == heads[1].entry_id
        assert moved in await new.tenants()
        # All that was recorded and is there is a duplicate, and what is new goes on from there.
        again = await new.append_many(moved, [e for e in events(20) if e.id != "e-11"])
        assert all(receipt.duplicate for receipt in again)
        receipt = await new.append(moved, events(1, first=20)[0])
        assert (receipt.seq, receipt.duplicate) == (25, False)


async def test_a_move_loses_and_duplicates_nothing(shared_server, tenant):
    """What engines append to the old server after the export, they retry on the new: once each."""
    old_server, new_server = shared_server("redis7"), shared_server("valkey9")
    async with Ledger.connect(old_server.url) as old, Ledger.connect(new_server.url) as new:
        await old.append_many(tenant, events(30))
        raw = await exported(old, tenant)
        await old.append_many(tenant, events(10, first=30))
        await imported(new, raw)
        for start in range(20, 50, 10):
            await new.append_many(tenant, events(10, first=start))
        assert [one[0] for one in await recorded(new, tenant)] == list(range(1, 51))
        await Projector(new).run_once([tenant])
        await Projector(old).run_once([tenant])
        counts = [
            (await StateReader(one).state(tenant)).value["decisions"]["total"] for one in (old, new)
        ]
        assert counts == [24, 30]


async def test_export_takes_the_head_of_its_beginning(valkey, tenant):
    """Appends during an export are not torn: the file has a head and exactly its entries."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, events(1000))

        async def keep_appending():
            for start in range(1000, 2000, 50):
                await ledger.append_many(tenant, events(50, first=start))

        raw, _ = await asyncio.gather(exported(ledger, tenant), keep_appending())
    reader = ExportReader(io.BytesIO(raw), PATH)
    assert len(list(reader.entries())) == reader.head.length == reader.head.seq


async def test_an_import_overwrites_nothing(valkey, tenant):
    """Where the tenant has a record, or only an index or a head, an import is refused."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, events(3))
        raw = await exported(ledger, tenant)
        before = raw_entries(valkey, tenant)
        with pytest.raises(errors.TargetExists, match="recorded there"):
            await imported(ledger, raw)
        for left in (keys.head(tenant), keys.index(tenant), keys.decisions(tenant)):
            others = {keys.head(tenant), keys.index(tenant), keys.decisions(tenant)} - {left}
            other = new_tenant()
            with valkey.client() as client:
                client.copy(left, left.replace(tenant, other))
            with pytest.raises(errors.TargetExists):
                await imported(ledger, renamed(raw, tenant, other))
            assert all(not valkey.cli("EXISTS", key.replace(tenant, other)) for key in others)
        assert raw_entries(valkey, tenant) == before
        assert valkey.cli("KEYS", f"*{tenant}*importing*") == []


async def test_two_imports_at_once_make_one_record(valkey, shared_server, tenant):
    """Of two imports of a tenant one is refused or both see one whole record; never a mixture."""
    async with (
        Ledger.connect(shared_server("redis7").url) as old,
        Ledger.connect(valkey.url) as new,
    ):
        await old.append_many(tenant, events(1000))
        await old.append_many(tenant, events(1000, first=1000))
        raw = await exported(old, tenant)
        results = await asyncio.gather(
            *(imported(new, raw) for _ in range(3)), return_exceptions=True
        )
        assert sum(not isinstance(one, Exception) for one in results) == 1
        assert all(
            isinstance(one, errors.TargetExists) for one in results if isinstance(one, Exception)
        )
        assert await recorded(new, tenant) == await recorded(old, tenant)
        assert valkey.cli("KEYS", f"*{tenant}*importing*") == []


CALLS = ["begin", "incidents", "page", "finish"]


@pytest.mark.parametrize("call", CALLS)
async def test_an_import_whose_answer_is_lost_goes_on(valkey, shared_server, tenant, call):
    """Each call of an import may be executed twice."""
    source = shared_server("redis7")
    async with Ledger.connect(source.url) as old, Proxy(valkey) as proxy:
        await with_foreign_hands(old, source, tenant)
        raw = await exported(old, tenant)
        async with Ledger.connect(proxy.url) as new:
            proxy.lose_reply_to = f"govledger_import_{call}".encode()
            await imported(new, raw)
            assert proxy.lost.is_set()
            assert raw_entries(valkey, tenant) == raw_entries(source, tenant)
            assert await recorded(new, tenant) == await recorded(old, tenant)


@pytest.mark.parametrize("call", [*CALLS[1:], "XADD", "SADD"])
async def test_a_killed_import_leaves_no_record(valkey, shared_server, tenant, call):
    """An import that dies at any call has recorded nothing, and the next one is whole."""
    source = shared_server("redis7")
    async with Ledger.connect(source.url) as old, Ledger.connect(valkey.url) as new:
        await with_foreign_hands(old, source, tenant)
        raw = await exported(old, tenant)
        await new.append(tenant + "-x", events(1)[0])  # the function library is there
        async with Proxy(valkey) as proxy, Ledger.connect(proxy.url) as dying:
            task = asyncio.create_task(imported(dying, raw))
            wanted = f"govledger_import_{call}" if call.islower() else call
            await _until(proxy, wanted.encode(), task)
            dying.server._closed = True  # as a killed process: nothing more is sent
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if call == "finish":
            assert valkey.cli("EXISTS", keys.head(tenant)) in (0, 1)  # it may have been executed
            if valkey.cli("EXISTS", keys.head(tenant)):
                assert raw_entries(valkey, tenant) == raw_entries(source, tenant)
                return
        assert not valkey.cli(
            "EXISTS", keys.decisions(tenant), keys.head(tenant), keys.index(tenant)
        )
        await imported(new, raw)
        assert await recorded(new, tenant) == await recorded(old, tenant)
        assert valkey.cli("KEYS", f"*{tenant}*importing*") == []


async def _until(proxy, part, task):
    while not proxy.requests_with(part):
        assert not task.done(), f"no request had {part}"
        await asyncio.sleep(0)


async def test_an_import_goes_on_after_its_server_was_killed(fresh_server, valkey, tenant):
    """A server killed in the middle and restarted: the import ends whole, each entry once."""
    server = fresh_server()
    patient = load_settings(redis_url=server.url, memory_max_reconnect_attempts=1000)
    async with Ledger.connect(valkey.url) as old, Ledger.connect(settings=patient) as new:
        for start in range(0, 5000, 1000):
            await old.append_many(tenant, events(1000, first=start))
        raw = await exported(old, tenant)
        begun = asyncio.create_task(imported(new, raw))
        stream, _, _ = keys.importing(tenant)
        while not await asyncio.to_thread(server.cli, "EXISTS", stream):
            assert not begun.done()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        await begun
        assert raw_entries(server, tenant) == raw_entries(valkey, tenant)
        assert await recorded(new, tenant) == await recorded(old, tenant)


async def test_moved_state_is_not_a_continuation(valkey, tenant):
    """A projector that folded the original does not fold the copy on top of it."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, events(10))
        await Projector(ledger).run_once([tenant])
        raw = await exported(ledger, tenant)
        valkey.cli("DEL", keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
        await imported(ledger, raw)
        with pytest.raises(errors.LedgerRolledBack):
            await Projector(ledger).run_once([tenant])
        assert await Projector(ledger).rebuild(tenant, accept_rollback=True) == 10
        state = await StateReader(ledger).state(tenant)
        assert (state.seq, state.position.epoch) == (10, (await ledger.head(tenant)).epoch)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_record_without_entries_moves_too(shared_server, tenant, kind):
    """Where all entries were deleted, the head moves, and the next seq goes on from it."""
    source, target = shared_server("redis7"), shared_server(kind)
    other = new_tenant()
    async with Ledger.connect(source.url) as old, Ledger.connect(target.url) as new:
        await old.append_many(tenant, events(3))
        source.cli("XTRIM", keys.decisions(tenant), "MAXLEN", 0)
        await imported(new, renamed(await exported(old, tenant), tenant, other))
        assert (await new.append(other, events(1, first=3)[0])).seq == 4


async def test_a_cluster_takes_an_import(cluster, valkey, tenant):
    """All of a tenant's keys, those on their way in too, share a slot."""
    async with Ledger.connect(valkey.url) as old, Ledger.connect(cluster.url) as new:
        await with_foreign_hands(old, valkey, tenant)
        await imported(new, await exported(old, tenant))
        assert await recorded(new, tenant) == await recorded(old, tenant)
        assert (await new.append(tenant, events(1, first=20)[0])).seq == 25


async def test_an_evicting_server_takes_no_import(fresh_server, valkey, tenant):
    """As with an append, a server that may drop the record is refused."""
    server = fresh_server(config={"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"})
    async with Ledger.connect(valkey.url) as old, Ledger.connect(server.url) as new:
        await old.append_many(tenant, events(3))
        with pytest.raises(errors.UnsafeServer, match="allkeys-lru"):
            await imported(new, await exported(old, tenant))
    assert server.cli("KEYS", "*governance*") == []


async def test_an_import_that_does_not_fit_is_cleaned_up(fresh_server, valkey, tenant):
    """A server that runs out of memory on the way is rid of what it was given."""
    server = fresh_server(config={"maxmemory-policy": "noeviction"})
    async with Ledger.connect(valkey.url) as old, Ledger.connect(server.url) as new:
        for start in range(0, 4000, 1000):
            await old.append_many(tenant, events(1000, first=start))
        raw = await exported(old, tenant)
        await new.server.load_library()
        room = server.cli("INFO", "memory")["used_memory"] + (512 << 10)
        server.cli("CONFIG", "SET", "maxmemory", room)
        with pytest.raises(errors.OutOfMemory):
            await imported(new, raw)
        assert server.cli("KEYS", "*governance*") == []


async def test_a_record_that_was_lost_whole_moves_too(valkey, tenant):
    """A head that was rebuilt from nothing has seq 0 and moves as such."""
    other = new_tenant()
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, events(3))
        valkey.cli("DEL", keys.decisions(tenant), keys.head(tenant))
        await ledger.reindex(tenant)
        done = await imported(ledger, renamed(await exported(ledger, tenant), tenant, other))
        assert (done.seq, done.entries) == (0, 0)
        assert (await ledger.append(other, events(1)[0])).seq == 1


async def test_a_cut_before_a_trimmed_tail_ends_there(valkey, tenant):
    """Where later entries are gone, a cut before them neither has their seq nor their incidents."""
    other, third = new_tenant(), new_tenant()
    stream = keys.decisions(tenant)
    async with Ledger.connect(valkey.url) as ledger:
        first = await ledger.append(tenant, events(1)[0])
        await asyncio.sleep(0.002)
        foreign = valkey.cli("XADD", stream, "*", "x", "y")
        await asyncio.sleep(0.002)
        last = await ledger.append(tenant, events(1, first=1)[0])
        valkey.cli("XDEL", stream, foreign, last.entry_id)
        raw = await exported(ledger, tenant)
        to_ms = int(first.entry_id.partition("-")[0])
        done = await imported(ledger, renamed(raw, tenant, other), cut=Cut(to_ms=to_ms))
        assert (done.seq, done.entry_id) == (1, first.entry_id)
        assert (await ledger.head(other)).incidents == 0
        assert (await ledger.append(other, events(1, first=1)[0])).seq == 2
        with pytest.raises(errors.NotFound):
            await imported(ledger, renamed(raw, tenant, third), cut=Cut(to_ms=to_ms - 1))


async def test_a_cut_in_a_hole_is_refused(valkey, tenant):
    """A seq that is gone is no point to restore to: its state would be an earlier one's."""
    stream, other = keys.decisions(tenant), new_tenant()
    async with Ledger.connect(valkey.url) as ledger:
        receipts = [await ledger.append(tenant, one) for one in events(4)]
        valkey.cli("XDEL", stream, receipts[1].entry_id, receipts[2].entry_id)
        raw = renamed(await exported(ledger, tenant), tenant, other)
        with pytest.raises(errors.EntriesMissing, match="from seq 2 to 3"):
            await imported(ledger, raw, cut=Cut(to_seq=3))
        assert (await imported(ledger, raw, cut=Cut(to_seq=1))).seq == 1


async def test_a_deletion_during_the_export_is_noticed(valkey, tenant, monkeypatch):
    """An entry that goes while the file is written makes the export fail, by name."""
    from ledger.service import exporting

    real = exporting.entry_pages

    def deleting(server, stream, last_id):
        valkey.cli("XTRIM", stream, "MAXLEN", 5)
        return real(server, stream, last_id)

    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, events(10))
        monkeypatch.setattr(exporting, "entry_pages", deleting)
        with pytest.raises(errors.EntriesMissing, match=r"5 entries .* 10 were counted"):
            await exported(ledger, tenant)


async def test_a_ledger_of_the_future_is_refused(valkey, tenant):
    """A record whose last entry is later than the server's clock would make later times lies."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, events(2))
        raw = await exported(ledger, tenant)
        last = (await ledger.head(tenant)).entry_id
        later = str(int(last.partition("-")[0]) + 3_600_000) + "-2"
        body = raw[: raw.rindex(b"*2\r\n$3\r\nend\r\n")].replace(last.encode(), later.encode())
        body = body.replace(tenant.encode(), b"t-future-" + tenant[9:].encode(), 1)
        with pytest.raises(errors.ClockSkew):
            await imported(ledger, body + pack(b"end", hashlib.sha256(body).hexdigest()))


# -- hostile files --------------------------------------------------------------------------------


INCIDENT = b'{"kind":"foreign","seq":2,"count":1,"first_id":"7-0","last_id":"7-0","noticed_ms":9}'


def small_export():
    """A file made by hand, as the format's description has it."""
    head = (
        b'{"tenant":"acgs-dev","epoch":"ab","seq":3,"entry_id":"8-3","length":3,"incidents":1,'
        b'"exported_at_ms":1}'
    )
    event = b'{"id":"%s","type":"decision.recorded"}'
    body = pack(b"govledger-export", b"1", head) + pack(b"incident", INCIDENT)
    own = [b"type", b"decision.recorded", b"id"]
    body += entry_record(b"5-1", [*own, b"a", b"data", event % b"a"])
    body += entry_record(b"7-0", [b"x", b"y"])
    body += entry_record(b"8-3", [*own, b"b", b"data", event % b"b"])
    return body + pack(b"end", hashlib.sha256(body).hexdigest())


SMALL = small_export()


def read(raw):
    reader = ExportReader(io.BytesIO(raw), PATH)
    return reader.head, reader.incidents, list(reader.entries())


def test_the_documented_format_is_read():
    """A file that another program writes by the description is read."""
    head, incidents, entries = read(SMALL)
    assert (head.tenant, head.seq, incidents[0].kind) == ("acgs-dev", 3, "foreign")
    assert [entry_id for entry_id, _ in entries] == [b"5-1", b"7-0", b"8-3"]


@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
@settings(max_examples=400)
def test_a_changed_byte_is_found(at, change):
    """Whatever byte of a file is changed, it is refused as damaged and nothing else."""
    raw = bytearray(SMALL)
    raw[at] ^= change
    with pytest.raises((errors.InvalidBackup, errors.InvalidInput)):
        read(bytes(raw))


def test_a_cut_or_longer_file_is_found():
    """A file is refused at whatever byte it ends too early, and where more follows its end."""
    for end in range(1, len(SMALL)):
        with pytest.raises(errors.InvalidBackup):
            read(SMALL[:end])
    with pytest.raises(errors.InvalidBackup):
        read(SMALL + b"\n")


HEAD = (
    '{{"tenant":"{tenant}","epoch":"ab","seq":{seq},"entry_id":"{id}","length":{length},'
    '"incidents":{incidents},"exported_at_ms":1}}'
)


def forged(*records, **head):
    """A file with a right checksum and a wrong content."""
    given = {"tenant": "acgs-dev", "seq": 3, "id": "9-9", "length": 0, "incidents": 0, **head}
    body = pack(b"govledger-export", b"1", HEAD.format(**given)) + b"".join(records)
    return body + pack(b"end", hashlib.sha256(body).hexdigest())


OWN = [b"type", b"t", b"id", b"a", b"data", b'{"id":"a","type":"t"}']


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"REDIS0011",
        b"*99999999999\r\n",
        b"*3\r\n$99999999999\r\nx",
        b"*3\r\n$-1\r\n",
        b"*" + b"9" * 100,
        forged(tenant="../../etc"),
        forged(tenant="stale"),
        forged(tenant="a}:x{"),
        forged(seq=-1),
        forged(seq=2**60),
        forged(seq='"3"'),
        forged(id="99999999999999999999-1"),
        forged(id="9-9\\n"),
        forged(id="09-9"),
        forged(length=-1),
        forged(length=2**60),
        forged(length=1),
        forged(incidents=2**40),
        forged(pack(b"incident", b"[]"), incidents=1),
        forged(pack(b"incident", b'{"kind":"foreign"}'), incidents=1),
        forged(pack(b"incident", INCIDENT.replace(b"foreign", b"{x}")), incidents=1),
        forged(pack(b"incident", INCIDENT.replace(b"2", b"true")), incidents=1),
        forged(pack(b"incident", INCIDENT + b" " * 1024), incidents=1),
        forged(entry_record(b"9-8", OWN), entry_record(b"9-8", OWN), length=2),
        forged(entry_record(b"9-10", OWN), length=1),
        forged(entry_record(b"9-8", OWN[:3]), length=1),
        forged(pack(b"entry", b"9-8"), length=1),
        forged(entry_record(b"9-8", OWN)),
    ],
)
def test_a_forged_file_is_refused(raw):
    """A file whose content cannot be is refused, whatever its checksum says."""
    with pytest.raises((errors.InvalidBackup, errors.InvalidInput)):
        read(raw)


@pytest.mark.parametrize("raw", [b"", b'{"type":"decision.recorded"}\n', b"REDIS0011", b"\0" * 99])
def test_what_is_no_export_is_told_from_a_damaged_one(raw):
    """A file of another kind is bad input, and the message says what was expected."""
    with pytest.raises(errors.InvalidInput, match="no file of `govledger export-ledger`"):
        read(raw)


@pytest.mark.parametrize(
    "records",
    [
        [entry_record(b"9-1", OWN), entry_record(b"9-2", OWN)],  # one event id twice
        [entry_record(b"9-4", OWN)],  # beyond the head's seq
    ],
)
async def test_a_forged_record_is_not_put_in_place(valkey, records):
    """What no ledger recorded is refused by the import, and nothing of it stays."""
    tenant = new_tenant()
    raw = forged(*records, length=len(records), tenant=tenant)
    async with Ledger.connect(valkey.url) as ledger:
        with pytest.raises(errors.InvalidBackup):
            await imported(ledger, raw)
    assert valkey.cli("KEYS", f"*{tenant}*") == []


async def test_damage_at_the_end_records_nothing(valkey, shared_server, tenant):
    """A file that turns out damaged after thousands of entries leaves nothing."""
    async with (
        Ledger.connect(shared_server("redis7").url) as old,
        Ledger.connect(valkey.url) as new,
    ):
        for start in range(0, 3000, 1000):
            await old.append_many(tenant, events(1000, first=start))
        raw = await exported(old, tenant)
        with pytest.raises(errors.InvalidBackup, match="SHA-256"):
            await imported(new, raw[:-10] + b"0" * 8 + raw[-2:])
    assert valkey.cli("KEYS", f"*{tenant}*") == []


# -- the commands ---------------------------------------------------------------------------------


def test_export_and_import_commands(shared_server, tenant, tmp_path):
    """export-ledger writes a file, import-ledger records and folds it; neither overwrites."""
    source, target = shared_server("redis8"), shared_server("valkey9")
    lines = "".join(
        f'{{"type":"decision.recorded","id":"d-{n}","at":"2026-03-03T12:00:00Z","agent":{{"id":"a"}},'
        f'"action":{{"type":"t"}},"verdict":"deny"}}\n'
        for n in range(5)
    )
    assert run(source.url, "append", tenant, "-", stdin=lines.encode()).code == 0
    file = tmp_path / "a.ledger"
    done = run(source.url, "export-ledger", tenant, file, "--json")
    assert (done.code, done.lines[0]["entries"], done.lines[0]["seq"]) == (0, 5, 5)
    assert file.stat().st_mode & 0o777 == 0o600
    again = run(source.url, "export-ledger", tenant, file, "--json")
    assert (again.code, again.error["error"]) == (4, "TargetExists")
    assert list(tmp_path.iterdir()) == [file]
    done = run(target.url, "import-ledger", file, "--json")
    assert (done.code, done.lines[0]["entries"], done.lines[0]["folded"]) == (0, 5, 5)
    state = run(target.url, "state", tenant, "--json").lines[0]
    assert state["value"]["decisions"]["by_verdict"]["deny"] == 5
    again = run(target.url, "import-ledger", file)
    assert again.code == 4
    assert "hint: nothing is overwritten" in again.err
    file.write_bytes(file.read_bytes()[:-5])
    broken = run(shared_server("redis7").url, "import-ledger", file, "--json")
    assert (broken.code, broken.error["error"]) == (4, "InvalidBackup")
    assert run(target.url, "import-ledger", tmp_path / "none").code == 2
    other = run(target.url, "import-ledger", __file__)
    assert (other.code, "no file of `govledger export-ledger`" in other.err) == (2, True)
    assert run(source.url, "export-ledger", new_tenant(), tmp_path / "b").code == 1
    nowhere = run(source.url, "export-ledger", tenant, tmp_path / "none" / "a")
    assert (nowhere.code, ".partial" in nowhere.err) == (2, False)
    assert f"{tmp_path / 'none'}: nothing can be written there" in nowhere.err
    assert f"hint: mkdir -p {tmp_path / 'none'}" in nowhere.err
    assert list(tmp_path.iterdir()) == [file]


# -- any history ----------------------------------------------------------------------------------


class Moves(ForeignHands):
    """After whatever others did, a copy of the record is what the record is, whole or cut."""

    def check(self):
        """Reading is looked at where it is copied."""

    @rule()
    def reindex(self):
        if not self.new:
            self.book.reindex(self.tenant)
            self.receipts, self.last_seq, self.gap = {}, 0, False

    def copied(self, **cut):
        """A tenant with what was exported of ours."""
        other, server = new_tenant(), self.book._ledger.server
        file = io.BytesIO()
        self.book._run(export_tenant(server, self.tenant, file))
        raw = io.BytesIO(renamed(file.getvalue(), self.tenant, other))
        return other, self.book._run(import_tenant(server, raw, PATH, **cut))

    def read(self, tenant):
        return self.book._run(recorded(self.book._ledger, tenant))

    @precondition(lambda self: not self.headless and not self.new)
    @rule()
    def move(self):
        other, done = self.copied()
        assert raw_entries(self.server, other) == raw_entries(self.server, self.tenant)
        assert self.read(other) == self.read(self.tenant)
        assert self.book.head(other).seq == self.book.head(self.tenant).seq == done.seq
        assert self.book.append(other, events(1)[0]).seq == done.seq + 1

    @precondition(lambda self: not self.headless and not self.new)
    @rule(pick=PICKS)
    def move_cut(self, pick):
        self.incidents()  # so that all that others did is registered
        ours = self.read(self.tenant)
        if not ours:
            return
        seq, entry_id, _ = picked(ours, pick)
        for cut in (Cut(to_seq=seq), Cut(to_ms=int(entry_id.partition("-")[0]))):
            times = [int(one[1].partition("-")[0]) for one in ours]
            before = zip(ours, times, strict=True)
            wanted = [one for one, ms in before if not cut.is_behind(ms, one[0])]
            try:
                other, done = self.copied(cut=cut)
            except errors.EntriesMissing:  # it was made again later: nobody knows what was there
                assert any(i.kind == "recreated" for i in self.incidents())
                continue
            assert self.read(other) == wanted
            assert done.seq >= wanted[-1][0]
            assert self.book.append(other, events(1)[0]).seq == done.seq + 1

    def incidents(self):
        found = self.book._run(stream_head(self.book._ledger.server, self.tenant)).incidents
        return [Incident.parse(raw) for raw in found]


def test_any_history_moves_as_it_is(valkey):
    """Whatever foreign hands did, a record's copy reads the same, and its cut is its prefix."""

    class Machine(Moves):
        server = valkey

    run_machine(Machine, settings=settings(max_examples=30, stateful_step_count=15))
