"""The jobs, each run by itself on real servers: what they do, and what they leave alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import Decision, EscalationResolved, Ledger, errors, keys
from ledger.service.cleanup import Cleanup, unlink
from ledger.service.expiry import APPENDS_AT_ONCE, Expiry, expiry_event
from ledger.service.inspection import server_now_ms
from ledger.service.jobs import JOBS, Archive, JobContext
from ledger.service.runs import Run, counts, history, last_runs, running
from ledger.service.snapshot import (
    Retention,
    archive_owner,
    archive_snapshot,
    superfluous,
    take_snapshot,
)
from projections import Projector, StateReader
from projections.governance import Governance
from projections.governance_state import PENDING_LIMIT
from projections.pending import Pending
from tests.servers import new_tenant

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


def escalation(event_id: str, expires_at: datetime | None = LONG_AGO) -> Decision:
    return Decision(
        id=event_id, agent="a", action="b", verdict="escalate", at=LONG_AGO, expires_at=expires_at
    )


async def entries(ledger: Ledger, tenant: str, kind: str) -> list[dict]:
    return [entry.event async for entry in ledger.replay(tenant) if entry.type == kind]


@pytest.fixture
async def ledger(fresh_server):
    """A ledger on a server of its own: the jobs look at every tenant."""
    async with Ledger.connect(fresh_server().url) as connected:
        yield connected


# -- expire --------------------------------------------------------------------------------------


async def test_overdue_escalations_expire_and_count_as_deny(ledger, tenant):
    """What is past its deadline is resolved as expired; what is not, or has none, stays pending."""
    later = datetime.now(UTC) + timedelta(hours=1)
    events = [escalation("over"), escalation("later", later), escalation("never", None)]
    await ledger.append_many(tenant, events)
    await Projector(ledger).run_once([tenant])
    expiry = Expiry(ledger)
    assert await expiry.run() == {"expired": 1, "tenants": 1}
    assert await expiry.run() == {"expired": 0, "tenants": 1}
    (resolved,) = await entries(ledger, tenant, "escalation.resolved")
    assert resolved["id"] == "expire:over"
    assert (resolved["decision_id"], resolved["resolution"]) == ("over", "expired")
    await Projector(ledger).run_once([tenant])
    state = (await StateReader(ledger).state(tenant)).value
    assert state["escalations"]["pending"] == 2
    assert state["escalations"]["resolved"]["expired"] == 1
    assert state["decisions"]["by_effective_verdict"]["deny"] == 1
    assert state["counts"]["conflicts"]["total"] == 0


async def test_a_deadline_that_comes_while_nothing_is_recorded_is_kept(ledger, tenant):
    """A tenant that was looked at and stays idle is looked at again when its deadline passes."""
    soon = datetime.now(UTC) + timedelta(milliseconds=200)
    await ledger.append(tenant, escalation("soon", soon))
    await Projector(ledger).run_once([tenant])
    expiry, expired = Expiry(ledger), 0
    while not expired:
        expired = (await expiry.run())["expired"]
        await asyncio.sleep(0.02)
    assert len(await entries(ledger, tenant, "escalation.resolved")) == 1


async def test_a_person_who_was_recorded_first_wins(ledger, tenant):
    """A resolution that no projector has folded yet keeps the expiry from being recorded."""
    await ledger.append(tenant, escalation("over"))
    await Projector(ledger).run_once([tenant])
    approved = EscalationResolved(decision_id="over", resolution="approved", reviewer="r")
    await ledger.append(tenant, approved)
    assert (await Expiry(ledger).run())["expired"] == 0
    assert len(await entries(ledger, tenant, "escalation.resolved")) == 1


async def test_escalations_that_the_state_only_counts_expire_too(ledger, tenant):
    """Past the thousand that are listed the stream itself says which are pending."""
    later = datetime.now(UTC) + timedelta(hours=1)
    listed = [escalation(f"listed-{n}", later) for n in range(PENDING_LIMIT)]
    await ledger.append_many(tenant, listed)
    more = [escalation(f"more-{n}", later if n % 2 else LONG_AGO) for n in range(6)]
    await ledger.append_many(tenant, more)
    resolved = EscalationResolved(decision_id="more-0", resolution="rejected", reviewer="r")
    await ledger.append(tenant, resolved)
    await Projector(ledger).run_once([tenant])
    assert (await Expiry(ledger).run())["expired"] == 2
    events = await entries(ledger, tenant, "escalation.resolved")
    assert [event["id"] for event in events[1:]] == ["expire:more-2", "expire:more-4"]


async def test_several_at_once_expire_each_escalation_once(ledger, tenant):
    """Many schedulers at the same moment record one resolution a decision."""
    await ledger.append_many(tenant, [escalation(f"d-{n}") for n in range(300)])
    await Projector(ledger).run_once([tenant])
    ledgers = [await Ledger.connect(ledger.server.settings.redis_url) for _ in range(4)]
    done = await asyncio.gather(*(Expiry(one).run() for one in ledgers))
    assert sum(one["expired"] for one in done) == 300
    assert len(await entries(ledger, tenant, "escalation.resolved")) == 300
    for one in ledgers:
        await one.aclose()


async def test_a_taken_id_keeps_nothing_open(ledger, tenant):
    """Where another event has the expiry's id, the escalation expires under a second one, once."""
    taken = Decision(id="expire:taken", agent="a", action="b", verdict="allow")
    await ledger.append_many(tenant, [escalation("taken"), taken])
    await Projector(ledger).run_once()
    assert (await Expiry(ledger).run())["expired"] == 1
    assert (await Expiry(ledger).run())["expired"] == 0
    (resolved,) = await entries(ledger, tenant, "escalation.resolved")
    assert resolved["id"] == expiry_event("taken", 0, fallback=True).id
    await Projector(ledger).run_once()
    assert (await Expiry(ledger).run())["expired"] == 0
    state = (await StateReader(ledger).state(tenant)).value
    assert (state["escalations"]["pending"], state["counts"]["conflicts"]["total"]) == (0, 0)


async def test_a_resolution_before_its_decision_keeps_nothing_open(ledger, tenant):
    """An event that has the expiry's id and came before the escalation has resolved nothing."""
    early = expiry_event("over", 0).model_copy(update={"resolution": "cancelled"})
    await ledger.append_many(tenant, [early, escalation("over")])
    await Projector(ledger).run_once([tenant])
    assert (await Expiry(ledger).run())["expired"] == 1
    await Projector(ledger).run_once([tenant])
    assert (await StateReader(ledger).state(tenant)).value["escalations"]["pending"] == 0


async def test_ids_that_are_all_taken_fail_loudly_and_alone(ledger, tenant):
    """Where both ids are another event's the job fails, and all others of the tenant expire."""
    names = [f"d-{n}" for n in range(APPENDS_AT_ONCE + 2)]
    for event_id in (f"expire:{names[0]}", expiry_event(names[0], 0, fallback=True).id):
        taken = Decision(id=event_id, agent="a", action="b", verdict="allow")
        await ledger.append(tenant, taken)
    await ledger.append_many(tenant, [escalation(name) for name in names])
    await Projector(ledger).run_once()
    expiry = Expiry(ledger)
    with pytest.raises(errors.JobFailed, match=f"1 of 1 tenant failed.*{tenant}") as caught:
        await expiry.run()
    assert caught.value.facts["expired"] == len(names) - 1
    assert len(await entries(ledger, tenant, "escalation.resolved")) == len(names) - 1
    with pytest.raises(errors.JobFailed):  # until somebody resolves it
        await expiry.run()


async def test_an_expiry_of_another_release_is_no_reason_for_a_second(ledger, tenant):
    """Where the id resolves the same decision with other bytes, nothing more is recorded."""
    await ledger.append(tenant, escalation("over"))
    await Projector(ledger).run_once([tenant])
    expiry, resolving = Expiry(ledger), expiry_event("over", 0)
    await ledger.append(tenant, resolving.model_copy(update={"reason": "x"}))
    assert await expiry._resolve(tenant, Pending("over", 0)) is False
    assert len(await entries(ledger, tenant, "escalation.resolved")) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "no json",
        "[]",
        '{"pending":{"x":{}}}',
        '{"pending":[1]}',
        '{"pending_unlisted_from_seq":"x"}',
    ],
)
async def test_damaged_fold_state_stops_its_own_tenant_alone(ledger, tenant, damage):
    """Whatever somebody wrote over a tenant's folded state, the others' escalations expire."""
    other = new_tenant()
    await ledger.append(tenant, escalation("d"))
    await ledger.append(other, escalation("d"))
    await Projector(ledger).run_once()
    fold = keys.projection(tenant, "governance", Governance().version)
    await ledger.server.command(fold, "HSET", fold, "state", damage)
    with pytest.raises(errors.JobFailed, match=f"1 of 2 tenants.*{tenant}"):
        await Expiry(ledger).run()
    assert (await ledger.get(other, "expire:d")).type == "escalation.resolved"


@given(st.text(st.characters(min_codepoint=128, max_codepoint=0x2FFF), min_size=1, max_size=128))
def test_every_decision_has_an_expiry_id_that_fits(decision_id):
    """The id is within the ledger's limit, and the same event is made each time."""
    event = expiry_event(decision_id, 1_700_000_000_123)
    assert len(event.id) <= 128
    assert event == expiry_event(decision_id, 1_700_000_000_123)
    assert event.decision_id == decision_id


async def test_state_of_another_ledger_expires_nothing(ledger, tenant):
    """Where the fold is of another epoch, what it calls pending may not be in this ledger."""
    await ledger.append(tenant, escalation("over"))
    await Projector(ledger).run_once([tenant])
    await ledger.server.command("", "HSET", keys.head(tenant), "epoch", "0123456789abcdef")
    with pytest.raises(errors.JobFailed, match="another epoch"):
        await Expiry(ledger).run()
    assert (await ledger.head(tenant)).seq == 1


# -- snapshot ------------------------------------------------------------------------------------


@pytest.fixture
def archive_dir(tmp_path):
    path = tmp_path / "archive"
    path.mkdir()
    return path


async def test_a_snapshot_is_watched_and_its_dump_copied_out(
    fresh_server, server, archive_dir, tenant
):
    """The copy has the bytes of the server's dump and a digest that sha256sum accepts."""
    own = fresh_server(server.kind)
    async with Ledger.connect(own.url) as ledger:
        await ledger.append(tenant, escalation("d"))
        context = JobContext(ledger, Archive(archive_dir))
        told = await JOBS["snapshot"](context)
    check_copy(Path(told["file"]), own.directory / "dump.rdb", told["sha256"])


def check_copy(copy: Path, dump: Path, sha256: str) -> None:
    assert copy.read_bytes() == dump.read_bytes()
    assert sha256 == hashlib.sha256(copy.read_bytes()).hexdigest()
    assert copy.with_suffix(".rdb.sha256").read_text() == f"{sha256}  {copy.name}\n"
    assert copy.stat().st_mode & 0o077 == 0
    assert {path.name for path in copy.parent.iterdir()} == {copy.name, f"{copy.name}.sha256"}


async def test_a_failed_save_is_an_error(fresh_server, server):
    """Where the server cannot write its dump the job says so, and says it again the next time."""
    own = fresh_server(server.kind)
    (own.directory / "dump.rdb").mkdir()
    async with Ledger.connect(own.url) as ledger:
        for _ in range(2):
            with pytest.raises(errors.SnapshotFailed, match="BGSAVE failed"):
                await take_snapshot(ledger.server)
        (own.directory / "dump.rdb").rmdir()
        assert await take_snapshot(ledger.server) is not None


async def begin_a_save(ledger, server, tenant, delay_us):
    await ledger.append(tenant, escalation("d"))
    server.cli("CONFIG", "SET", "rdb-key-save-delay", delay_us)  # for each of the keys
    server.cli("BGSAVE")


async def test_a_snapshot_under_way_is_left_to_end(fresh_server, tenant):
    """While the server saves already, the job is skipped."""
    own = fresh_server()
    async with Ledger.connect(own.url) as ledger:
        await begin_a_save(ledger, own, tenant, delay_us=10_000_000)
        assert "skipped" in await JOBS["snapshot"](JobContext(ledger))
        assert await take_snapshot(ledger.server) is None


async def test_a_backups_snapshot_waits_out_anothers(fresh_server, tenant):
    """What a backup takes was begun after it was asked for, whatever save was under way."""
    own = fresh_server()
    async with Ledger.connect(own.url) as ledger:
        await begin_a_save(ledger, own, tenant, delay_us=20_000)
        assert await take_snapshot(ledger.server, wait_out=True) is not None
        assert own.cli("INFO", "persistence")["rdb_saves"] == 2


async def test_an_archive_gets_its_copy_while_others_save(fresh_server, archive_dir, tenant):
    """With an archive the job waits for the end of another save, and then makes its own."""
    own = fresh_server()
    async with Ledger.connect(own.url) as ledger:
        await begin_a_save(ledger, own, tenant, delay_us=50_000)
        told = await JOBS["snapshot"](JobContext(ledger, Archive(archive_dir)))
        assert own.cli("INFO", "persistence")["rdb_saves"] == 2
    check_copy(Path(told["file"]), own.directory / "dump.rdb", told["sha256"])


async def test_a_server_keeps_to_its_own_copies(fresh_server, tmp_path, tenant):
    """Two servers with one directory leave each other's copies alone, a restarted one knows its
    own, and the copy just made stays where a wrong clock made others later.
    """
    first, second = fresh_server(), fresh_server()
    context_of = lambda ledger: JobContext(ledger, Archive(tmp_path, Retention(1, 0)))  # noqa: E731
    async with Ledger.connect(first.url) as ledger:
        await JOBS["snapshot"](context_of(ledger))
        owner = await archive_owner(ledger.server)
        ahead = tmp_path / f"dump-20990101T000000000Z-{owner}-0123abcd.rdb"
        ahead.write_bytes(b"REDIS0011")
    async with Ledger.connect(second.url) as ledger:
        other = Path((await JOBS["snapshot"](context_of(ledger)))["file"])
        await ledger.server.command("", "SET", keys.ARCHIVE_OWNER, "../../x")
        with pytest.raises(errors.SnapshotFailed, match="nobody of us wrote"):
            await archive_owner(ledger.server)
    first.kill()
    first.restart()
    async with Ledger.connect(first.url) as ledger:
        made = Path((await JOBS["snapshot"](context_of(ledger)))["file"])
    assert set(tmp_path.glob("*.rdb")) == {made, other}


async def test_a_snapshot_waits_for_a_rewrite(fresh_server, server, tenant):
    """While the append-only file is rewritten BGSAVE is refused; the job waits and then saves."""
    own = fresh_server(server.kind)
    async with Ledger.connect(own.url) as ledger:
        await ledger.append(tenant, escalation("d"))
        own.cli("CONFIG", "SET", "rdb-key-save-delay", 100_000)
        own.cli("BGREWRITEAOF")
        assert own.cli("INFO", "persistence")["aof_rewrite_in_progress"] == 1
        taken = await take_snapshot(ledger.server)
        assert taken is not None
        assert own.cli("INFO", "persistence")["rdb_saves"] == 1


async def test_a_restart_in_the_middle_is_an_error(fresh_server, tenant):
    """A server that comes back while it was to save has saved nothing, whatever it says then."""
    own = fresh_server()
    async with Ledger.connect(own.url) as ledger:
        await ledger.append(tenant, escalation("d"))
        own.cli("CONFIG", "SET", "rdb-key-save-delay", 500_000)
        saving = asyncio.create_task(take_snapshot(ledger.server))
        while own.cli("INFO", "persistence")["rdb_bgsave_in_progress"] != 1:  # noqa: ASYNC110 - a server's state has no event
            await asyncio.sleep(0.01)
        own.kill()
        own.restart()
        with pytest.raises(errors.SnapshotFailed, match="restarted"):
            await saving


async def test_an_archive_without_room_is_an_error(fresh_server, archive_dir, no_room):
    """Where the copy cannot be written its directory is named, and nothing is left there."""
    async with Ledger.connect(fresh_server().url) as ledger:
        taken = await take_snapshot(ledger.server)
        with no_room(), pytest.raises(errors.SnapshotFailed, match=f"{archive_dir}: File too lar"):
            await archive_snapshot(taken, archive_dir, owner="0123abcd")
    assert list(archive_dir.iterdir()) == []


async def test_an_archive_out_of_reach_is_an_error(fresh_server, archive_dir):
    """No right to ask where the dump is, no dump there, no RDB file, or no directory, since a
    disk may not be mounted: each says what to do, and nothing is left.
    """
    own = fresh_server()
    own.cli("ACL", "SETUSER", "job", "on", ">pw", "~*", "+@all", "-config")
    url = own.url.replace("redis://", "redis://job:pw@")
    async with Ledger.connect(url) as ledger:
        taken = await take_snapshot(ledger.server)
        with pytest.raises(errors.SnapshotFailed, match="CONFIG is denied"):
            await archive_snapshot(taken, archive_dir, owner="0123abcd")
    async with Ledger.connect(own.url) as ledger:
        taken = await take_snapshot(ledger.server)
        for absent in (archive_dir / "absent", taken.path):
            with pytest.raises(errors.InvalidSetting, match=r"no directory .*mkdir -p"):
                await archive_snapshot(taken, absent, owner="0123abcd")
        moved = replace(taken, path=taken.path.with_name("elsewhere.rdb"))
        with pytest.raises(errors.SnapshotFailed, match=r"cannot be copied out.*must run where"):
            await archive_snapshot(moved, archive_dir, owner="0123abcd")
        taken.path.write_bytes(b"no dump")
        with pytest.raises(errors.SnapshotFailed, match="no RDB file"):
            await archive_snapshot(taken, archive_dir, owner="0123abcd")
    assert list(archive_dir.iterdir()) == []


def copies_at(*moments: str, owner: str = "89abcdef") -> list[str]:
    return [f"dump-{moment}-{owner}-0123abcd.rdb" for moment in moments]


def test_retention_keeps_the_newest_and_one_a_day():
    """The newest N stay, of each of the last days the newest, and what is not this owner's always;
    a copy of a time to come goes first.
    """
    now = datetime(2026, 3, 10, 12, tzinfo=UTC)
    new = copies_at("20260310T110000000Z", "20260310T100000000Z", "20260310T090000000Z")
    yesterday = copies_at("20260309T230000000Z", "20260309T010000000Z")
    old = copies_at("20260101T000000000Z")
    ahead = copies_at("20260310T120900000Z", "20300101T000000000Z")
    others = copies_at("20260101T000000000Z", "20300101T000000000Z", owner="01234567")
    foreign = ["dump.rdb", f"{old[0]}.sha256", "../x", "notes", *others]
    names = [*new, *yesterday, *old, *foreign]
    assert superfluous(names, new[0], Retention(2, 7), now) == sorted([new[2], yesterday[1], *old])
    assert superfluous(names, new[0], Retention(2, 0), now) == sorted([new[2], *yesterday, *old])
    assert superfluous(old, old[0], Retention(1, 0), now) == []
    assert superfluous([*names, *ahead], new[0], Retention(6, 7), now) == sorted(ahead)
    assert superfluous([*ahead, new[0]], new[0], Retention(2, 7), now) == [ahead[0]]
    assert superfluous([*ahead, new[0]], ahead[0], Retention(1, 0), now) == [ahead[1]]


@given(
    st.lists(st.dates(date(2026, 1, 1), date(2026, 3, 9)), min_size=1, max_size=40),
    st.data(),
    st.integers(1, 10),
    st.integers(0, 40),
)
def test_retention_never_takes_the_copy_just_made(moments, data, last, days):
    """Whatever the rule and the clocks are, it and enough others stay, and a second look removes
    nothing more.
    """
    names = copies_at(*(f"{moment:%Y%m%d}T12{n:02}00000Z" for n, moment in enumerate(moments)))
    made, now = data.draw(st.sampled_from(names)), datetime(2026, 3, 1, tzinfo=UTC)
    left = set(names) - set(superfluous(names, made, Retention(last, days), now))
    assert made in left
    assert len(left) >= min(last, len(set(names)))
    assert superfluous(left, made, Retention(last, days), now) == []


# -- cleanup -------------------------------------------------------------------------------------

NASTY = (
    "claude-flow:ledger:{stale:*}:governance:decisions",
    "claude-flow:ledger:{t}:governance:decisions",
    "claude-flow:ledger:{t}:governance:head",
    "claude-flow:ledger:{t}:governance:index",
    "claude-flow:ledger:{t}:governance:index-rebuild",
    "claude-flow:ledger:{t}:governance:importing",
    "claude-flow:ledger:{t}:governance:importing-head\n",
    "claude-flow:ledger:{*}:governance:importing-decisions",
    "claude-flow:ledger:{t}:evidence:checkpoints",
    "claude-flow:ledger:{t}:projection:active",
    "claude-flow:ledger:{t}:projection:quarantine",
    "claude-flow:ledger:{t}:projection:governance@1:rebuilding",
    "claude-flow:ledger:{t}:projection:governance@1:rebuild:",
    "claude-flow:ledger:{t}:snapshot:governance",
    "claude-flow:ledger:{t}:snapshot:governance@1:head",
    "claude-flow:ledger:{t}:lease:governance@1",
    "claude-flow:ledger:{t}:projection:governance@1:governance:decisions",
    "claude-flow:ledger:{t}:projection:governance@1\n",
    "claude-flow:ledger:{t}:projection:x@1}:governance:decisions",
    "claude-flow:ledger:{}:projection:governance@1",
    "claude-flow:ledger:{*}:projection:governance@1",
    "claude-flow:ledger:_:tenants:all",
    "claude-flow:ledger:_:feed:0",
    "claude-flow:ledgerstale:x",
    "claude-flow:memory",
    "claude-flow:memorystale:x",
    "stale:claude-flow:memory:x",
    "x:claude-flow:memory:stale:1",
    "CLAUDE-FLOW:MEMORY:STALE:1",
    "",
)


@pytest.mark.parametrize("key", NASTY)
def test_no_key_of_the_record_is_disposable(key):
    """No stream, index, head, registry or look-alike passes the last check before UNLINK."""
    assert not keys.is_disposable(key.encode())


@given(
    st.lists(
        st.sampled_from(
            [
                *(
                    "claude-flow:",
                    "ledger:",
                    "memory:",
                    "{t}",
                    "{",
                    "}",
                    ":",
                    "*",
                    "stale:",
                    "\x01",
                ),
                *("@1", "governance:", "decisions", "head", "index", "projection:", ":7", "_"),
                *("governance@1", "snapshot:", ":rebuild"),
            ]
        ),
        max_size=12,
    ).map("".join)
)
def test_what_is_disposable_is_memory_or_a_fold(key):
    """By an independent reading of the key: the memory store, a projection's or snapshot's
    name@version[:rebuild][:n], or one of the three keys of an import.
    """
    if not keys.is_disposable(key.encode()):
        return
    store, *rest = key.removeprefix("claude-flow:").split(":")
    if store == "memory":
        return
    tenant, kind, name, *bucket = rest
    bucket = bucket[1:] if bucket[:1] == ["rebuild"] else bucket
    assert store == "ledger"
    assert keys.is_tenant(tenant.removeprefix("{").removesuffix("}"))
    if kind == "governance":
        assert [name, *bucket] in ([f"importing-{part}"] for part in ("decisions", "head", "index"))
        return
    assert kind in ("projection", "snapshot")
    assert name.rpartition("@")[2].isdigit()
    assert len(bucket) <= 1
    assert all(part.isdigit() for part in bucket)


async def test_unlink_refuses_the_whole_batch(ledger, tenant):
    """One key that may not go keeps all of its batch, and is named."""
    await ledger.append(tenant, escalation("d"))
    stale = f"{keys.MEMORY_STALE}x"
    await ledger.server.command(stale, "SET", stale, "1")
    with pytest.raises(errors.JobFailed, match="no key that a cleanup may delete"):
        await unlink(ledger.server, [stale.encode(), keys.decisions(tenant).encode()])
    assert await ledger.server.command(stale, "EXISTS", stale) == 1


async def test_cleanup_deletes_rubbish_and_nothing_else(ledger, tenant):
    """Stale keys and copies of lost tenants go, ours get their TTL back, nasty names stay."""
    server = ledger.server
    await ledger.append(tenant, escalation("d"))
    await Projector(ledger).run_once([tenant])
    copy = keys.governance_state(tenant)
    envelope = await server.command(copy, "GET", copy)
    await server.command(copy, "PERSIST", copy)
    lost, own = keys.governance_state("lost-tenant"), keys.governance_state("own-value")
    nasty = [key for key in NASTY if key and not key.startswith("claude-flow:ledger:_:")]
    kept = [*nasty, own, "claude-flow:memory:acgs:session:stale:1", "claude-flow:memory:x"]
    rubbish = [f"claude-flow:memory:stale:{name}" for name in ("1", "*", "\n{x}", "")]
    await server.command(lost, "SET", lost, envelope)
    for key in kept + rubbish:
        await server.command(key, "SET", key, '{"value":1,"metadata":{}}')
    await server.command("", "SET", b"claude-flow:memory:stale:\xff\xfe", "1")
    before = {entry.id async for entry in ledger.replay(tenant)}
    done = await Cleanup(ledger, 3600).run()
    assert (done["stale"], done["orphaned"], done["given_a_ttl"]) == (5, 1, 1)
    assert 0 < await server.command(copy, "TTL", copy) <= 3600
    for key in kept:
        assert await server.command(key, "EXISTS", key) == 1, key
    assert {entry.id async for entry in ledger.replay(tenant)} == before
    assert (await Cleanup(ledger, 3600).run())["stale"] == 0


async def test_cleanup_leaves_copies_whose_ledger_is_only_unregistered(ledger, tenant):
    """A registry that somebody deleted makes no tenant disappear."""
    await ledger.append(tenant, escalation("d"))
    await Projector(ledger).run_once([tenant])
    await ledger.server.command(keys.TENANTS, "DEL", keys.TENANTS)
    assert (await Cleanup(ledger, 3600).run())["orphaned"] == 0
    assert (await StateReader(ledger).state(tenant)).source == "published"


async def test_cleanup_records_a_run_that_was_killed(ledger):
    """A run that began two days ago and never ended is a failed one, and the last of its job unless
    a later one has ended; what is no run goes, what may still run stays.
    """
    server, now_ms = ledger.server, await server_now_ms(ledger.server)
    old = Run("snapshot", "running", "elsewhere:1", 5, now_ms - 3 * 86_400_000, None, {})
    other, young = replace(old, job="refresh"), replace(old, job="expire", begun_ms=now_ms)
    later = replace(other, status="ok", begun_ms=now_ms, seconds=1.0)
    for run_id, run in (("a", old), ("b", other), ("c", young)):
        await server.command(
            keys.JOBS_RUNNING, "HSET", keys.JOBS_RUNNING, run_id, json.dumps(asdict(run))
        )
    await server.command(keys.JOBS_RUNNING, "HSET", keys.JOBS_RUNNING, "d", "junk")
    await server.command(
        keys.JOBS_LAST, "HSET", keys.JOBS_LAST, later.job, json.dumps(asdict(later))
    )
    assert (await Cleanup(ledger, 0).run())["forgotten_runs"] == 3
    assert await running(server) == [young]
    last = await last_runs(server)
    assert last["snapshot"].status == "failed"
    assert last["snapshot"].result["error"] == "elsewhere:1 ended before it was done"
    assert last["refresh"] == later
    for job in ("snapshot", "refresh"):
        assert (await history(server, job))[0].status == "failed"
    assert await counts(server) == {("snapshot", "failed"): 1, ("refresh", "failed"): 1}


async def test_cleanup_deletes_folds_of_retired_versions(ledger, tenant, monkeypatch):
    """Below the version that readers take and what this release folds, all of a fold goes: buckets,
    snapshots, a killed rebuild, its quarantine. The fold that readers take stays whole.
    """
    server, name = ledger.server, "governance"
    await ledger.append(tenant, escalation("d"))
    await Projector(ledger).run_once([tenant])
    await ledger.append(tenant, escalation("e"))
    monkeypatch.setattr("projections.snapshots.MIN_ENTRIES", 1)
    await Projector(ledger).run_once([tenant])
    held = await keys_of(server, tenant)
    assert keys.snapshot(tenant, name, 1, 2) in held
    active, quarantine = keys.projection_active(tenant), keys.projection_quarantine(tenant)
    fields = ("governance@1:7", "x", "governance@2:7", "x", "agents@1:7", "x")
    await server.command(quarantine, "HSET", quarantine, *fields)
    for key in (
        keys.projection(tenant, name, 2),
        keys.projection_bucket(tenant, name, 2, 1023),
        f"{keys.projection(tenant, name, 2)}:rebuild",
        f"{keys.projection(tenant, name, 2)}:rebuild:0",
        keys.projection(tenant, name, 3),
    ):
        await server.command(key, "HSET", key, "x", "1")
    newer = type("Newer", (), {"name": name, "version": 3})
    monkeypatch.setattr("ledger.service.cleanup.configured", lambda _: (newer,))
    assert (await Cleanup(ledger, 0).run())["retired_folds"] == 0  # readers take the first one
    await server.command(active, "HSET", active, name, 3)
    gone = {key for key in held if "governance@1" in key}
    assert (await Cleanup(ledger, 0).run())["retired_folds"] == len(gone) + 4
    left = held - gone | {keys.projection(tenant, name, 3), active, quarantine}
    assert await keys_of(server, tenant) == left
    assert set(await server.command(quarantine, "HKEYS", quarantine)) == {b"agents@1:7"}
    assert (await ledger.head(tenant)).seq == 2


async def keys_of(server, tenant) -> set[str]:
    """Every key of the tenant's record and folds; leases go by themselves."""
    found = {key async for page in server.scan(f"{keys.LEDGER}:{{{tenant}}}:*") for key in page}
    return {key.decode() for key in found if b":lease:" not in key}


# -- append-only file, refresh, health -------------------------------------------------------------


async def test_a_grown_append_only_file_is_rewritten(fresh_server, server):
    """Past 64 MiB and twice its base it is rewritten; a small one, or none, is left alone."""
    own = fresh_server(server.kind, config={"auto-aof-rewrite-percentage": 0, "appendfsync": "no"})
    async with Ledger.connect(own.url) as ledger:
        context = JobContext(ledger)
        assert "skipped" in await JOBS["aof-rewrite"](context)
        for _ in range(17):
            await ledger.server.command("k", "SET", "k", b"x" * (4 << 20))
        done = await JOBS["aof-rewrite"](context)
        assert done["bytes_before"] > 64 << 20 > done["bytes"]
        assert "skipped" in await JOBS["aof-rewrite"](context)
        own.cli("CONFIG", "SET", "appendonly", "no")
        assert "skipped" in await JOBS["aof-rewrite"](context)


async def test_refresh_publishes_what_no_projector_keeps(ledger, tenant):
    """A published copy that is gone or about to expire comes back; a fresh one is left alone."""
    await ledger.append(tenant, escalation("d"))
    copy = keys.governance_state(tenant)
    for _ in range(2):
        done = await JOBS["refresh"](JobContext(ledger))
        assert done["refreshed"] == 1
        assert await ledger.server.command(copy, "EXISTS", copy) == 1
        assert (await JOBS["refresh"](JobContext(ledger)))["refreshed"] == 0
        await ledger.server.command(copy, "DEL", copy)
    assert (await JOBS["refresh"](JobContext(ledger)))["refreshed"] == 1
    await ledger.server.command(copy, "EXPIRE", copy, 10)
    assert (await JOBS["refresh"](JobContext(ledger)))["refreshed"] == 1


async def test_health_keeps_a_bounded_run_of_samples(ledger):
    """Each run adds a sample of the server's key metrics; old ones fall off the end."""
    key = keys.HEALTH_SAMPLES
    for n in range(1440):
        await ledger.server.command(key, "XADD", key, f"{n + 1}-0", "run_id", "x")
    told = await JOBS["health"](JobContext(ledger))
    assert told["used_memory"] > 0
    assert told["connected_clients"] >= 1
    assert await ledger.server.command(key, "XLEN", key) == 1440
    ((_, fields),) = await ledger.server.command(key, "XREVRANGE", key, "+", "-", "COUNT", 1)
    assert dict(zip(fields[::2], fields[1::2], strict=True))[b"run_id"].decode() == told["run_id"]


async def test_jobs_work_on_a_cluster(cluster, tenant):
    """Snapshot, cleanup, expiry and health reach every primary."""
    async with Ledger.connect(cluster.url) as ledger:
        await ledger.append(tenant, escalation("d"))
        await Projector(ledger).run_once([tenant])
        for n in range(20):
            key = f"{keys.MEMORY_STALE}{n}"
            await ledger.server.command(key, "SET", key, "1")
        odd = f"{keys.MEMORY_STALE}\udcff"  # a name that is no UTF-8
        await ledger.server.command(odd, "SET", odd.encode(errors="surrogateescape"), "1")
        context = JobContext(ledger)
        assert (await JOBS["expire"](context))["expired"] >= 1
        assert (await JOBS["cleanup"](context))["stale"] == 21
        assert len((await JOBS["snapshot"](context))["nodes"]) == 3
        assert len((await JOBS["health"](context))["nodes"]) == 3
        assert (await ledger.get(tenant, "expire:d")).type == "escalation.resolved"
