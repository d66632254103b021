"""A backup is what the server had, a restore is what the backup has, and neither believes it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from ledger import Ledger, errors, keys
from ledger.embedded import EmbeddedServer, is_running
from ledger.service import backup as backups
from ledger.service import portable, scratch
from ledger.service.backup import make_backup, read_manifest
from ledger.service.cli import app
from ledger.service.files import create_file, disk_errors_named
from ledger.service.restore import Target, make_plan, restore
from ledger.service.scratch import private_server
from projections import Projector, StateReader
from tests.commands import GOVLEDGER, environment, run
from tests.histories import events, recorded, with_foreign_hands
from tests.servers import KINDS, Server, new_tenant, wait_until


def quiet(_line):
    """Told what is being done."""


def local(directory: Path) -> str:
    return f"embedded://{directory}"


async def backed_up(url, directory, *, verify=True):
    async with Ledger.connect(url) as ledger:
        return await make_backup(ledger, directory, verify=verify, say=quiet)


async def restored(source, into, **target):
    plan = await asyncio.to_thread(make_plan, source, into, Target(**target))
    return {one.tenant: one for one in await restore(plan, quiet)}


async def state_of(ledger, tenant):
    """The whole published state, as its JSON."""
    return json.dumps((await StateReader(ledger).state(tenant)).value, sort_keys=True)


def put_manifest(directory, raw):
    """A manifest that somebody changed, and its digest too."""
    (directory / "manifest.json").write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    (directory / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
async def source(fresh_server):
    """`source(kind)`: a server with two tenants, one of them with foreign hands, all folded."""

    @asynccontextmanager
    async def made(kind="valkey9", **options):
        server = fresh_server(kind, **options)
        async with Ledger.connect(server.url) as ledger:
            await ledger.append_many("busy", events(300))
            await with_foreign_hands(ledger, server, "odd")
            await Projector(ledger).run_once(["busy"])
            await ledger.memory.set("busy:session:s-1", {"step": 1})
            yield server, ledger

    return made


# -- backup and restore ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"), [("valkey9", "snapshot"), ("redis7", "snapshot"), ("redis8", "logical")]
)
async def test_a_backup_comes_back_as_it_was(source, tmp_path, kind, how):
    """From each kind of server: the same entries and state, a new epoch, ids still idempotent."""
    async with source(kind) as (_server, ledger):
        done = await make_backup(ledger, tmp_path / "b", verify=True, say=quiet)
        await ledger.append_many("busy", events(10, first=300))  # not in it
        assert (done.kind, done.verified) == (how, True)
        assert {one.tenant: (one.seq, one.entries) for one in done.tenants} == {
            "busy": (300, 300),
            "odd": (24, 23),
        }
        assert read_manifest(tmp_path / "b") == done
        tenants = await restored(tmp_path / "b", tmp_path / "data")
        assert {name: one.seq for name, one in tenants.items()} == {"busy": 300, "odd": 24}
        assert (tenants["busy"].folded, tenants["busy"].problem) == (300, None)
        assert "seq 16 was recorded and is not in the stream" in tenants["odd"].problem
        old = await recorded(ledger, "busy"), await recorded(ledger, "odd")
        old_epoch = (await ledger.head("busy")).epoch
    async with private_server(tmp_path / "data") as copy:
        assert await copy.tenants() == ["busy", "odd"]
        assert (await recorded(copy, "busy"), await recorded(copy, "odd")) == (old[0][:300], old[1])
        assert (await copy.head("busy")).epoch == tenants["busy"].epoch != old_epoch
        state = await StateReader(copy).state("busy")
        assert (state.seq, state.source, state.position.epoch) == (
            300,
            "published",
            tenants["busy"].epoch,
        )
        assert state.value["decisions"]["total"] == 180
        assert await copy.memory.exists("busy:session:s-1") == (how == "snapshot")
        receipts = await copy.append_many("busy", events(10, first=295))
        assert [receipt.duplicate for receipt in receipts] == [True] * 5 + [False] * 5
        assert await Projector(copy).run_once(["busy"]) == {"busy": 5}
    assert leftovers(tmp_path) == []


async def test_an_embedded_ledger_is_backed_up_and_restored_by_command(embedded_dir, tmp_path):
    """The commands do it, say what was done, and neither overwrites anything."""
    url, lines = local(embedded_dir), jsonl(20)
    assert run(url, "append", "acgs-dev", "-", stdin=lines).code == 0
    assert run(url, "project", "--once").code == 0
    done = run(url, "backup", tmp_path / "b", "--json")
    assert (done.code, done.lines[0]["kind"], done.lines[0]["verified"]) == (0, "snapshot", True)
    assert done.lines[0]["tenants"][0]["seq"] == 20
    again = run(url, "backup", tmp_path / "b", "--json")
    assert (again.code, again.error["error"]) == (4, "TargetExists")
    planned = run(None, "restore", tmp_path / "b", "--into", tmp_path / "new", "--dry-run")
    assert planned.code == 0
    assert "lay the snapshot as the base of the append-only file" in planned.out
    assert not (tmp_path / "new").exists()
    done = run(None, "restore", tmp_path / "b", "--into", tmp_path / "new")
    assert done.code == 0, done.err
    assert f"REDIS_URL=embedded://{tmp_path / 'new'}" in done.out
    try:
        there = run(local(tmp_path / "new"), "state", "acgs-dev", "--json").lines[0]
        assert (there["seq"], there["behind"], there["source"]) == (20, 0, "published")
        running = run(None, "restore", tmp_path / "b", "--into", tmp_path / "new", "--json")
        assert (running.code, running.error["error"]) == (4, "ServerInUse")
    finally:
        EmbeddedServer.acquire(tmp_path / "new").stop()
    full = run(None, "restore", tmp_path / "b", "--into", tmp_path / "new", "--json")
    assert (full.code, full.error["error"]) == (4, "TargetExists")
    assert leftovers(tmp_path) == []


def test_examples_in_the_help_work(shared_server, embedded_dir, tmp_path):
    """Backup, restore and import do what their help shows."""
    assert run(local(embedded_dir), "append", "acgs-dev", "-", stdin=jsonl(50)).code == 0
    assert (
        run(local(embedded_dir), "export-ledger", "acgs-dev", "acgs-dev.ledger", cwd=tmp_path).code
        == 0
    )
    commands = {one.name or one.callback.__name__: one.epilog for one in app.registered_commands}
    for command in ("backup", "restore"):
        for line in commands[command].splitlines()[2:]:
            done = run(local(embedded_dir), *line.split()[1:], cwd=tmp_path)
            assert (done.code, bool(done.out)) == (0, True), (line, done.err)
    assert {path.name for path in tmp_path.iterdir()} >= {"monday", "restored", "earlier"}
    assert not (tmp_path / "noon").exists()
    (line,) = commands["import-ledger"].splitlines()[2:]
    target = shared_server("redis7")
    target.cli("DEL", keys.decisions("acgs-dev"), keys.head("acgs-dev"), keys.index("acgs-dev"))
    assert run(target.url, *line.split()[1:], cwd=tmp_path).code == 0


def jsonl(count):
    return "".join(
        f'{{"type":"decision.recorded","id":"d-{n}","at":"2026-03-03T12:00:00Z",'
        f'"agent":{{"id":"a"}},"action":{{"type":"t"}},"verdict":"deny"}}\n'
        for n in range(count)
    ).encode()


async def test_a_cluster_is_backed_up_logically(cluster, tmp_path):
    """Each tenant is exported from its own node, and they come back on one machine."""
    tenants = [new_tenant() for _ in range(5)]
    async with Ledger.connect(cluster.url) as ledger:
        for tenant in tenants:
            await ledger.append_many(tenant, events(10))
        done = await make_backup(ledger, tmp_path / "b", verify=True, say=quiet)
        assert (done.kind, done.verified) == ("logical", True)
        assert "cluster" in done.why_logical
    found = await restored(tmp_path / "b", tmp_path / "data")
    assert [found[tenant].seq for tenant in tenants] == [10] * 5


async def test_a_tenant_out_of_the_registry_is_backed_up_too(source, tmp_path):
    """Where the registry was deleted, heads in the keyspace are found, and registered again."""
    async with source() as (server, _ledger):
        server.cli("DEL", keys.TENANTS)
        server.cli("SADD", keys.TENANTS, "a}:b")  # no tenant can be called so
        for n, verify in enumerate([True, False]):
            done = await backed_up(server.url, tmp_path / f"b{n}", verify=verify)
            assert [one.tenant for one in done.tenants] == ["busy", "odd"]
            await restored(tmp_path / f"b{n}", tmp_path / f"data{n}")
            async with private_server(tmp_path / f"data{n}") as copy:
                assert await copy.tenants() == ["busy", "odd"]


@pytest.mark.parametrize("kind", ["valkey9", "redis8"])
async def test_a_damaged_tenant_leaves_the_others_a_backup(source, tmp_path, kind):
    """A tenant whose head is gone is named in the manifest; the rest comes back; exit code 1."""
    async with source(kind) as (server, _ledger):
        server.cli("DEL", keys.head("odd"))
        server.cli("SREM", keys.TENANTS, "odd")
        done = await asyncio.to_thread(run, server.url, "backup", tmp_path / "b", "--json")
        assert done.code == 1
        assert "odd" in done.err
        found = await restored(tmp_path / "b", tmp_path / "data")
        assert found["busy"].seq == 300


@pytest.mark.parametrize("kind", ["valkey9", "redis8"])
async def test_other_hands_do_not_stop_a_backup(source, tmp_path, monkeypatch, kind):
    """Another type in a stream's or head's place, a giant foreign entry, a name without a record:
    each is said where it matters, and the other tenants come back.
    """
    monkeypatch.setattr(portable, "MAX_RECORD_BYTES", 100_000)  # "odd" has an entry over it
    async with source(kind) as (server, ledger):
        for number, key in enumerate((keys.decisions, keys.head)):
            await ledger.append_many(f"wrong-{number}", events(2))
            server.cli("SET", key(f"wrong-{number}"), "something else")
        server.cli("SADD", keys.TENANTS, "never-came")
        await ledger.append_many("lost", events(2))
        server.cli("DEL", keys.decisions("lost"), keys.head("lost"))
        await ledger.reindex("lost")
        done = await make_backup(ledger, tmp_path / "b", verify=True, say=quiet)
        problems = [line.partition(":")[0] for line in done.problems]
        assert set(problems) == {"wrong-0", "wrong-1", "odd"}
    found = await restored(tmp_path / "b", tmp_path / "data")
    assert found["busy"].seq == 300
    # A file cannot carry the giant entry, a snapshot can.
    assert (found["odd"].seq, found["odd"].problem is None) == (
        (24, False) if kind == "valkey9" else (0, False)
    )
    if kind == "valkey9":
        cut = await restored(tmp_path / "b", tmp_path / "cut", to_seq={"busy": 5})
        assert (cut["busy"].seq, "carries at most" in cut["odd"].problem) == (5, True)


async def test_a_mounted_disk_is_refused_before_anything(small, tmp_path, monkeypatch):
    """A directory that cannot be replaced in one step is refused with the way out."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    refused(small, tmp_path / "disk", errors.TargetExists, "mounted")
    assert (await restored(small, tmp_path / "disk" / "ledger"))["acgs-dev"].seq == 10


async def test_appends_during_a_backup_do_not_disturb_it(source, tmp_path):
    """While engines append, a backup verifies against the record as of the snapshot."""
    async with source() as (server, ledger):
        at = 300

        async def keep_appending():
            nonlocal at
            while True:
                await ledger.append_many("busy", events(20, first=at))
                at += 20

        appending = asyncio.create_task(keep_appending())
        done = await backed_up(server.url, tmp_path / "b")
        appending.cancel()
        await asyncio.gather(appending, return_exceptions=True)
        assert done.verified
        seq = next(one.seq for one in done.tenants if one.tenant == "busy")
        assert 300 <= seq <= at
        assert (await restored(tmp_path / "b", tmp_path / "data"))["busy"].seq == seq


async def test_no_verify_says_so(source, tmp_path):
    """Without verification the manifest says it, states what was there before, and restores."""
    async with source() as (server, _ledger):
        done = await backed_up(server.url, tmp_path / "b", verify=False)
    assert not done.verified
    assert {one.tenant: one.seq for one in done.tenants} == {"busy": 300, "odd": 24}
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["verified"] is False
    assert (await restored(tmp_path / "b", tmp_path / "data"))["busy"].seq == 300


# -- verification finds what is wrong -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["valkey9", "redis8"])
async def test_a_copy_that_is_not_the_server_is_found(source, tmp_path, monkeypatch, kind):
    """An entry that differs between copy and server fails the backup, and nothing is kept of it."""
    async with source(kind) as (server, ledger):
        first = (await ledger.get("busy", "e-7")).entry_id

        step = "lay_dump" if kind == "valkey9" else "import_tenant"
        real = getattr(backups, step)

        def tampering(*args):
            server.cli("XDEL", keys.decisions("busy"), first)
            return real(*args)

        monkeypatch.setattr(backups, step, tampering)
        with pytest.raises(errors.InvalidBackup, match="tenant busy"):
            await backed_up(server.url, tmp_path / "b")
    assert list(tmp_path.glob("b*")) == []
    assert leftovers(tmp_path) == []


async def test_an_old_snapshot_is_not_taken_for_a_new_one(source, tmp_path, monkeypatch):
    """Where the file there is not what the server just saved, the backup becomes a logical one."""
    async with source() as (server, ledger):
        stale = tmp_path / "dump.rdb"
        server.cli("SAVE")
        shutil.copy(server.directory / "dump.rdb", stale)
        os.utime(stale, (1, 1))

        async def elsewhere(_server):
            return stale

        monkeypatch.setattr(backups, "dump_path", elsewhere)
        await ledger.append_many("busy", events(10, first=300))
        done = await make_backup(ledger, tmp_path / "b", verify=True, say=quiet)
        assert (done.kind, "older" in done.why_logical) == ("logical", True)
        os.utime(stale)  # and where even the time of the file looks right, the heads do not
        with pytest.raises(errors.InvalidBackup, match="it had seq 310"):
            await make_backup(ledger, tmp_path / "c", verify=True, say=quiet)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_failed_save_is_a_failed_backup(fresh_server, tenant, tmp_path, kind):
    """BGSAVE's own answer is not believed: what failed in the background fails the backup."""
    server = fresh_server(kind, config={"enable-protected-configs": "local"})
    gone = tmp_path / "gone"
    gone.mkdir()
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, events(1)[0])
        server.cli("CONFIG", "SET", "dir", str(gone))
        (gone / "dump.rdb").mkdir()  # it cannot be renamed over
        (gone / "dump.rdb" / "x").touch()
        with pytest.raises(errors.ServerBusy, match="BGSAVE failed"):
            await make_backup(ledger, tmp_path / "b", verify=True, say=quiet)
    assert not (tmp_path / "b").exists()
    assert leftovers(tmp_path) == []


# -- refusals -------------------------------------------------------------------------------------


@pytest.fixture
async def small(fresh_server, tmp_path):
    """A verified snapshot of one small tenant."""
    server = fresh_server("redis7")
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many("acgs-dev", events(10))
    await backed_up(server.url, tmp_path / "b")
    return tmp_path / "b"


def refused(source, into, kind, match=None):
    with pytest.raises(kind, match=match):
        make_plan(source, into, Target())


async def test_restore_refuses_what_is_not_right(small, tmp_path):
    """A target that is in use or full and a damaged backup are refused before anything."""
    into = tmp_path / "data"
    into.mkdir()
    (into / ".hidden").touch()
    refused(small, into, errors.TargetExists, "not empty")
    refused(small, small / "manifest.json", errors.TargetExists, "no directory")
    refused(tmp_path / "none", tmp_path / "d", errors.InvalidInput, "no such file")
    refused(tmp_path, tmp_path / "d", errors.InvalidBackup, "not finished")
    (small / "note.txt").write_text("hello")
    refused(small / "note.txt", tmp_path / "d", errors.InvalidBackup, "neither")
    dump = small / "dump.rdb"
    good = dump.read_bytes()
    dump.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(small, tmp_path / "d", errors.InvalidBackup, "SHA-256")
    dump.unlink()
    refused(small, tmp_path / "d", errors.InvalidBackup, "missing")
    dump.write_bytes(b"REDIS0012" + good[9:])
    refused(dump, tmp_path / "d", errors.InvalidBackup, "version 12")
    assert not (tmp_path / "d").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(version=2),
        lambda m: m.update(kind="magic"),
        lambda m: m.update(tenants=[{"tenant": "../../etc"}]),
        lambda m: m.update(tenants=[{"tenant": "a", "seq": "1"}]),
        lambda m: m.update(surprise=1),
        lambda m: m["tenants"][0].update(surprise=1),
        lambda m: m.update(dump_sha256=None),
        lambda m: m.update(dump_sha256="0" * 64),
        lambda m: m.pop("taken_at_ms"),
    ],
)
async def test_a_hostile_manifest_is_refused(small, tmp_path, change):
    """A manifest that says what cannot be, or names what is outside, is refused."""
    path = small / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    put_manifest(small, json.dumps(manifest).encode())
    with pytest.raises((errors.InvalidBackup, errors.InvalidTenant)):
        make_plan(small, tmp_path / "d", Target())
    put_manifest(small, b"\xff{")
    refused(small, tmp_path / "d", errors.InvalidBackup)


async def test_a_flipped_bit_in_the_manifest_is_refused(small):
    """Whichever bit of it is wrong, what the manifest says is not acted upon."""
    path, sums = small / "manifest.json", small / "manifest.json.sha256"
    good, digest = path.read_bytes(), sums.read_text()
    assert digest == f"{hashlib.sha256(good).hexdigest()}  manifest.json\n"
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 7
        path.write_bytes(flipped)
        with pytest.raises(errors.InvalidBackup, match="damaged"):
            read_manifest(small)
    path.write_bytes(good)
    assert read_manifest(small).verified
    sums.unlink()
    with pytest.raises(errors.InvalidBackup, match=r"no manifest\.json\.sha256"):
        read_manifest(small)


async def test_a_manifest_cannot_hide_a_tenant(fresh_server, small, tmp_path):
    """What is in a backup and not in its manifest is named, even where somebody mended the digest;
    so is a tenant without its file.
    """
    server = fresh_server("redis8")
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many("acgs-dev", events(10))
    manifest = await backed_up(server.url, tmp_path / "l", verify=False)
    manifest.tenants[0].file_sha256 = None
    put_manifest(tmp_path / "l", msgspec.json.encode(manifest))
    refused(
        tmp_path / "l", tmp_path / "d", errors.InvalidBackup, "acgs-dev has entries and no file"
    )
    manifest.tenants = []
    put_manifest(tmp_path / "l", msgspec.json.encode(manifest))
    refused(tmp_path / "l", tmp_path / "d", errors.InvalidBackup, "no such file")
    manifest = read_manifest(small)
    manifest.tenants = []
    put_manifest(small, msgspec.json.encode(manifest))
    for target in ({}, {"to_ms": manifest.taken_at_ms}):
        with pytest.raises(errors.InvalidBackup, match="acgs-dev: it is in the snapshot"):
            await restored(small, tmp_path / "d", **target)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq", 9),
        ("entries", 9),
        ("records_sha256", "0" * 64),
        ("epoch", "ab"),
        ("folds", {"governance@1": "0" * 64}),
    ],
)
async def test_a_restore_that_is_not_what_was_stated_is_refused(small, tmp_path, name, value):
    """Heads, counts and digests are compared after loading; where one differs nothing is put."""
    manifest = read_manifest(small)
    setattr(manifest.tenants[0], name, value)
    put_manifest(small, msgspec.json.encode(manifest))
    with pytest.raises(errors.InvalidBackup, match="not what the backup states"):
        await restored(small, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert leftovers(tmp_path) == []


async def test_a_ledger_in_another_database_is_exported(fresh_server, tmp_path, caplog):
    """A snapshot has every database and is read from 0 alone: so the backup of another one is
    logical, and a dump that has other keys is never taken for all there is, or for empty.
    """
    server, into = fresh_server("valkey9"), tmp_path / "d"
    async with Ledger.connect(f"{server.url}/3") as ledger:
        await ledger.append_many("acgs-dev", events(10))
        await ledger.server.command("", "BGSAVE")
    done = await backed_up(f"{server.url}/3", tmp_path / "b")
    assert (done.kind, done.verified) == ("logical", True)
    assert done.why_logical == "the ledger is in database 3"
    assert (await restored(tmp_path / "b", tmp_path / "data"))["acgs-dev"].seq == 10
    await asyncio.to_thread(wait_until, (server.directory / "dump.rdb").exists, "the dump")
    with pytest.raises(errors.InvalidBackup, match="keys in database 3"):
        await restored(server.directory / "dump.rdb", into)
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many("other", events(1))
    await backed_up(server.url, tmp_path / "whole")
    assert set(await restored(tmp_path / "whole", into)) == {"other"}
    assert "keys in database 3" in caplog.text
    with pytest.raises(errors.InvalidSetting, match="takes no options"):
        await Ledger.connect(f"{local(into)}?db=3")


async def test_the_guides_dump_really_comes_back(small, tmp_path):
    """A dump.rdb alone, which a server with appendonly yes ignores, is restored."""
    guide = tmp_path / "guide"
    guide.mkdir()
    shutil.copy(small / "dump.rdb", guide)
    trap = Server.start("valkey9", guide)
    assert trap.cli("EXISTS", keys.decisions("acgs-dev")) == 0  # the guide's procedure loses it
    trap.kill()
    found = await restored(small / "dump.rdb", tmp_path / "data")
    assert found["acgs-dev"].seq == 10
    digest = hashlib.sha256((small / "dump.rdb").read_bytes()).hexdigest()
    (small / "dump.rdb.sha256").write_text(f"{digest}  dump.rdb\n")
    await restored(small / "dump.rdb", tmp_path / "data2")
    (small / "dump.rdb.sha256").write_text(f"{'0' * 64}  dump.rdb\n")
    refused(small / "dump.rdb", tmp_path / "d", errors.InvalidBackup, "SHA-256")


async def test_a_snapshot_that_does_not_load_leaves_nothing(small, tmp_path):
    """A truncated dump is refused in one line, by what the server says that was to load it."""
    dump = small / "dump.rdb"
    dump.write_bytes(dump.read_bytes()[:-40])
    for target in ({}, {"to_ms": 1}):
        with pytest.raises(errors.InvalidBackup, match=r"dump\.rdb: .* RDB") as caught:
            await restored(dump, tmp_path / "data", **target)
        assert "\n" not in caught.value.message
    assert not (tmp_path / "data").exists()
    assert leftovers(tmp_path) == []


async def test_a_private_server_that_dies_is_named(tmp_path, monkeypatch):
    """What is said then is of that server, with what it said last, and not of REDIS_URL."""
    monkeypatch.setenv("MEMORY_MAX_RECONNECT_ATTEMPTS", "0")
    data_dir = tmp_path / "x" / "data"

    async def used(*, kill):
        async with private_server(data_dir) as ledger:
            if kill:
                os.kill(is_running(data_dir).pid, signal.SIGKILL)
            await ledger.get("acgs-dev", "none")

    with pytest.raises(errors.NotFound):
        await used(kill=False)
    with pytest.raises(errors.EmbeddedServerError, match=f"{tmp_path}: the private server.*ended"):
        await used(kill=True)
    log = tmp_path / "valkey.log"
    log.write_text(
        "1:M 24 Nov 2026 19:19:58.134 # WARNING Memory overcommit must be enabled!\n"
        "1:M 24 Nov 2026 19:19:58.134 * Ready # not a warning\n"
        "1:M 24 Nov 2026 19:19:58.135 # Error writing: No space left on device\n"
        "1:M 24 Nov 2026 19:19:58.136 # Exiting\n"
    )
    assert scratch._last_words(tmp_path) == "Error writing: No space left on device"
    assert "make room" in scratch._ended(tmp_path).hint


def test_a_full_disk_is_named(tmp_path, no_room):
    """Where a file cannot be written the error has its place and a way out, and nothing is left."""
    with (
        pytest.raises(errors.InvalidInput, match=r"/here: .*No space left") as caught,
        disk_errors_named(Path("/here")),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x")
    assert "make room" in caught.value.hint
    file = tmp_path / "file"
    with (
        pytest.raises(errors.InvalidInput, match=f"{file}: .*File too large"),
        no_room(),
        disk_errors_named(file),
        create_file(file) as opened,
    ):
        opened.write(b"x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), disk_errors_named(tmp_path):
        file.read_bytes()


async def test_of_two_restores_at_once_one_is_put(small, tmp_path):
    """Both make a whole directory, one gets the name, the other is refused and leaves nothing."""
    results = await asyncio.gather(
        *(restored(small, tmp_path / "data") for _ in range(2)), return_exceptions=True
    )
    assert sorted(type(one).__name__ for one in results) == ["TargetExists", "dict"]
    assert leftovers(tmp_path) == []
    async with private_server(tmp_path / "data") as ledger:
        assert (await ledger.head("acgs-dev")).seq == 10


async def test_a_foreign_function_library_is_replaced(fresh_server, tmp_path):
    """What a dump brings along under our library's name does not decide what is restored."""
    server = fresh_server()
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many("acgs-dev", events(3))
    source = server.cli("FUNCTION", "LIST", "WITHCODE")[0]["library_code"]
    fake = source.replace(
        "call('HSET', keys[1], 'epoch', args[3])", "call('HGET', keys[1], 'epoch')"
    )
    assert fake != source
    server.cli("FUNCTION", "LOAD", "REPLACE", fake)
    await backed_up(server.url, tmp_path / "b")
    found = await restored(tmp_path / "b", tmp_path / "data")
    async with private_server(tmp_path / "data") as ledger:
        assert (await ledger.head("acgs-dev")).epoch == found["acgs-dev"].epoch


class Streak:
    """A projection of one's own."""

    name, version = "streak", 1

    def names(self, _entry):
        return ()

    def apply(self, entities, _entry, _subject):
        entities.setdefault("state", {"seen": 0})["seen"] += 1

    def quarantined(self, entities, entry):
        """Nothing to count."""

    def view(self, state):
        return state


async def test_a_fold_that_nobody_here_knows_is_left_out(
    fresh_server, tmp_path, monkeypatch, caplog
):
    """Restored without GOVLEDGER_PROJECTIONS, a projection of one's own is named and not there;
    with it again it is folded from the first entry, and everything else was there all the time.
    """
    server = fresh_server()
    monkeypatch.setenv("GOVLEDGER_PROJECTIONS", "tests.test_backup:Streak")
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many("acgs-dev", events(10))
        await Projector(ledger).run_once()
        await ledger.memory.set("acgs-dev:other:state", 1)
        fold = keys.projection("acgs-dev", "governance", 99)
        await ledger.server.command("", "HSET", fold, "position", "ab/1/1-1")
        active = keys.projection_active("acgs-dev")
        await ledger.server.command("", "HSET", active, "streak", "1", "agents", "1")
        await ledger.server.command(
            "", "HSET", keys.projection_quarantine("acgs-dev"), "streak@1:3", "x", "agents@1:3", "x"
        )
    await backed_up(server.url, tmp_path / "b", verify=False)
    monkeypatch.delenv("GOVLEDGER_PROJECTIONS")
    await restored(tmp_path / "b", tmp_path / "data")
    assert "the state of governance@99, streak@1 is left out" in caplog.text
    async with private_server(tmp_path / "data") as ledger:
        there = await ledger.server.command("", "KEYS", "*")
        assert [key for key in there if b"streak" in key or b"@99" in key] == []
        assert set(await ledger.server.command("", "HKEYS", active)) == {b"agents", b"governance"}
        assert await ledger.memory.get("acgs-dev:other:state") == 1
        assert (await StateReader(ledger).state("acgs-dev")).seq == 10
    monkeypatch.setenv("GOVLEDGER_PROJECTIONS", "tests.test_backup:Streak")
    async with private_server(tmp_path / "data") as ledger:
        await Projector(ledger).run_once()
        assert (await StateReader(ledger).state("acgs-dev", "streak")).value == {"seen": 10}


@pytest.mark.parametrize("command", ["backup", "restore"])
async def test_a_killed_command_leaves_no_half_result(source, small, tmp_path, spawn, command):
    """Kill -9 at any moment: the target is not there, and the next run makes it."""
    async with source() as (server, _ledger):
        target = tmp_path / "target"
        arguments = (
            ["backup", target] if command == "backup" else ["restore", small, "--into", target]
        )
        signs = {
            "backup": ["", "/dump.rdb", "/scratch/appendonlydir", "/scratch/valkey.sock"],
            "restore": ["", "/data/appendonlydir/*.rdb", "/data/valkey.sock"],
        }[command]
        for sign in signs:
            process = spawn(
                [*GOVLEDGER, *map(str, arguments)], env=environment(server.url), cwd=tmp_path
            )
            await asyncio.to_thread(wait_until, lambda s=sign: _is_at(tmp_path, s), sign)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if target.exists():  # it was faster than we
                shutil.rmtree(target)
            for partial in tmp_path.glob(".target.*.partial"):
                for server_dir in (partial / "data", partial / "scratch"):
                    if server_dir.is_dir() and is_running(server_dir):
                        await asyncio.to_thread(EmbeddedServer.acquire(server_dir).stop)
                shutil.rmtree(partial, ignore_errors=True)
        if command == "backup":
            assert (await backed_up(server.url, target)).verified
        else:
            assert (await restored(small, target))["acgs-dev"].seq == 10


@pytest.mark.parametrize(
    "at",
    [
        "130 backup /scratch/valkey.sock",
        "143 backup /scratch/valkey.sock",
        "130 restore /data",
        "143 restore /data/valkey.sock",
    ],
)
async def test_ctrl_c_and_sigterm_leave_nothing(source, small, tmp_path, spawn, at):
    """An interrupted command stops the server it began and removes what it made."""
    code_then, command, sign = at.split()
    async with source() as (server, _ledger):
        target = tmp_path / "target"
        arguments = ["backup"] if command == "backup" else ["restore", small, "--into"]
        process = spawn(
            [*GOVLEDGER, *map(str, arguments), str(target)],
            env=environment(server.url),
            cwd=tmp_path,
        )
        await asyncio.to_thread(wait_until, lambda: _is_at(tmp_path, sign), sign)
        process.send_signal(int(code_then) - 128)
        code = await asyncio.to_thread(process.wait, 30)
        assert code == int(code_then) or (code == 0 and target.exists())  # it was faster than we
        assert leftovers(tmp_path) == []


def _is_at(folder, sign):
    return any(folder.glob(f".target.*.partial{sign}")) or (folder / "target").exists()


# -- point in time --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["valkey9", "redis8"])
async def test_state_at_a_point_in_time_is_what_it_was(fresh_server, tmp_path, kind):
    """Restored to a seq or a time, entries and state are byte for byte those of that moment."""
    server, then = fresh_server(kind), {}
    async with Ledger.connect(server.url) as ledger:
        projector = Projector(ledger)
        for step in range(6):
            receipts = await ledger.append_many("acgs-dev", events(30, first=30 * step))
            await ledger.append_many("other", events(2, first=2 * step))
            await projector.run_once()
            then[receipts[-1].seq] = (
                await state_of(ledger, "acgs-dev"),
                receipts[-1].recorded_at,
                await recorded(ledger, "acgs-dev"),
            )
            if step == 2:
                with server.client() as client:
                    for _ in range(3):
                        client.xadd(keys.decisions("acgs-dev"), {"foreign": 1})
            await asyncio.sleep(0.003)  # so that no two steps share a millisecond
        await make_backup(ledger, tmp_path / "b", verify=True, say=quiet)
    assert sorted(then) == [30, 60, 90, 123, 153, 183]
    for seq in (60, 123):
        found = await restored(tmp_path / "b", tmp_path / f"seq-{seq}", to_seq={"acgs-dev": seq})
        assert (found["acgs-dev"].seq, found["other"].seq) == (seq, 12)
        await _is_as_then(tmp_path / f"seq-{seq}", then[seq])
    state, moment, entries = then[90]
    to_ms = int(moment.timestamp() * 1000)
    found = await restored(tmp_path / "b", tmp_path / "time", to_ms=to_ms)
    assert (found["acgs-dev"].seq, found["acgs-dev"].left_out) == (90, 93)
    await _is_as_then(tmp_path / "time", (state, moment, entries))
    # In the middle of foreign entries: those before the cut stay, and count.
    found = await restored(tmp_path / "b", tmp_path / "middle", to_seq={"acgs-dev": 92})
    async with private_server(tmp_path / "middle") as copy:
        assert (found["acgs-dev"].seq, found["acgs-dev"].entries) == (92, 92)
        assert await recorded(copy, "acgs-dev") == entries
        assert (await copy.append("acgs-dev", events(1, first=500)[0])).seq == 93
        assert await Projector(copy).run_once(["acgs-dev"]) == {"acgs-dev": 1}


async def _is_as_then(data_dir, then):
    state, _, entries = then
    async with private_server(data_dir) as copy:
        assert await recorded(copy, "acgs-dev") == entries
        assert await state_of(copy, "acgs-dev") == state


async def test_a_point_in_time_that_is_not_there_is_refused(small, tmp_path):
    """After the backup, beyond the head, an unknown tenant: refused by name, nothing made."""
    taken_ms = read_manifest(small).taken_at_ms
    for target, match in (
        (Target(to_ms=taken_ms + 1), "after the backup"),
        (Target(to_seq={"acgs-dev": 11}), "seq 1 to 10"),
        (Target(to_seq={"acgs-dev": 0}), "seq 1 to 10"),
        (Target(to_seq={"nobody": 1}), "no tenant nobody .there is: acgs-dev"),
    ):
        with pytest.raises(errors.InvalidInput, match=match):
            make_plan(small, tmp_path / "d", target)
    for target in ({"nobody": 1}, {"acgs-dev": 11}):  # a snapshot alone knows when it is loaded
        with pytest.raises(errors.InvalidInput, match="to-seq"):
            await restored(small / "dump.rdb", tmp_path / "d", to_seq=target)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("to_ms", [1000, -62_135_596_800_000])
async def test_a_time_before_everything_is_refused(small, tmp_path, to_ms):
    """The message has the oldest possible time, at which a restore works; nothing is made."""
    into = tmp_path / "new" / "data"
    with pytest.raises(errors.InvalidInput, match="to: nothing was recorded by") as refused:
        await restored(small, into, to_ms=to_ms)
    assert not into.parent.exists()
    oldest = re.search(r"recorded at (\S+):", refused.value.hint)[1]
    found = await restored(
        small, into, to_ms=int(datetime.fromisoformat(oldest).timestamp() * 1000)
    )
    assert found["acgs-dev"].seq >= 1


def test_point_in_time_by_command(small_command, tmp_path):
    """--to and --to-seq are read, checked and told."""
    out = run(None, "restore", small_command, "--into", tmp_path / "x", "--to-seq", "acgs-dev:4")
    assert out.code == 0, out.err
    assert "acgs-dev: 4 entries to seq 4, 6 later ones left out" in out.out
    for arguments in (
        ["--to-seq", "acgs-dev"],
        ["--to-seq", "acgs-dev:-1"],
        ["--to-seq", "acgs-dev:5", "--to-seq", "acgs-dev:3"],
        ["--to", "yesterday"],
        ["--to", "2026-01-01", "--to-seq", "acgs-dev:1"],
        ["--to", "2099-01-01"],
    ):
        assert run(None, "restore", small_command, "--into", tmp_path / "y", *arguments).code == 2
    early = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
    out = run(None, "restore", small_command, "--into", tmp_path / "z", "--to", early)
    assert (out.code, "that is the oldest possible time" in out.err) == (2, True)
    assert not (tmp_path / "z").exists()


@pytest.fixture
def small_command(tmp_path):
    """An exported ledger of ten entries."""
    url = local(tmp_path / "source")
    assert run(url, "append", "acgs-dev", "-", stdin=jsonl(10)).code == 0
    assert run(url, "export-ledger", "acgs-dev", tmp_path / "a.ledger").code == 0
    EmbeddedServer.acquire(tmp_path / "source").stop()
    return tmp_path / "a.ledger"
