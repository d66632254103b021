"""Many workers on the same tenants: leases, takeover, versions, fairness."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial

import orjson
import pytest

from ledger import (
    Decision,
    EscalationResolved,
    Feedback,
    Ledger,
    Overridden,
    errors,
    keys,
    load_settings,
)
from ledger.service import operate
from ledger.service.workers import run_workers
from projections import Projector, StateReader
from projections import projector as projector_module
from projections.lease import Leases
from projections.store import FoldStore, Standing, encode_entity
from projections.tenant_fold import TenantFold
from tests.commands import GOVLEDGER, environment, run
from tests.governance_reference import expected, published
from tests.servers import wait_until
from tests.test_projector import Counter


def decision(number, verdict="allow"):
    return Decision(id=f"d-{number}", agent="a", action="act", verdict=verdict)


def history(start, count):
    """Decisions of every kind and what follows them, reaching back beyond any page."""
    for number in range(start, start + count):
        yield decision(number, ("allow", "deny", "escalate")[number % 3])
        of = f"d-{number // 2}"
        if number % 3 == 0:
            yield EscalationResolved(id=f"r-{number}", decision_id=of, resolution="rejected")
        elif number % 3 == 1:
            yield Feedback(id=f"f-{number}", decision_id=of, reviewer="r", feedback="negative")
        else:
            yield Overridden(
                id=f"o-{number}",
                decision_id=of,
                reviewer="r",
                from_verdict="allow",
                to_verdict="deny",
                justification="j",
            )


class Tally:
    """A small projection of one's own: decisions by verdict."""

    name = "tally"
    version = 1

    def names(self, entry):
        return ()

    def apply(self, entities, entry, subject):
        state = entities.setdefault("state", {})
        word = entry.event.get("verdict", "other")
        state[word] = state.get(word, 0) + 1

    def quarantined(self, entities, entry):
        pass

    def view(self, state):
        return dict(state)


class TallyOfTwo(Tally):
    """A later version, which counts differently."""

    version = 2

    def apply(self, entities, entry, subject):
        state = entities.setdefault("state", {})
        state["all"] = state.get("all", 0) + 2


@pytest.fixture
async def ledger(valkey):
    async with Ledger.connect(valkey.url) as opened:
        yield opened


@asynccontextmanager
async def running(projector):
    task = asyncio.create_task(projector.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


WORKER = """
import asyncio, os, signal, sys
from ledger import Ledger
from projections import Projector
from projections.store import FoldStore
from projections.tenant_fold import TenantFold

url, tenant, step, name = sys.argv[1:]
owner, method = {
    "read": (TenantFold, "begin"), "fold": (TenantFold, "apply"),
    "commit": (FoldStore, "commit"), "publish": (FoldStore, "publish"),
}[step]
calls, original, begin = [], getattr(owner, method), TenantFold.begin

async def small_pages(fold):
    walk = await begin(fold)
    walk.page_entries = 25
    return walk

async def stops(*args, **kwargs):
    calls.append(1)
    result = await original(*args, **kwargs) if step == "read" else None
    if len(calls) == (1 if step in ("read", "publish") else 3):
        print(step, flush=True)
        os.kill(os.getpid(), getattr(signal, name))
    return result if step == "read" else await original(*args, **kwargs)

TenantFold.begin = small_pages
if step == "read":
    original = small_pages
setattr(owner, method, stops)

async def main():
    async with Ledger.connect(url) as ledger:
        await Projector(ledger).run_once([tenant])
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
async def test_a_worker_that_stops_at_any_step_is_taken_over_and_counts_are_exact(
    ledger, valkey, tenant, spawn, how
):
    """Killed or paused between read, fold, commit and publish: another one goes on, what the
    paused one does when it wakes changes nothing, and the state is what plain dictionaries say.
    """
    events = list(history(0, 90))
    steps = ("read", "fold", "commit", "publish")
    tenants = {step: f"{tenant}-{step}" for step in steps}
    workers = {}
    for step, name in tenants.items():
        await ledger.append_many(name, events)
        argv = [sys.executable, "-c", WORKER, valkey.url, name, step, how]
        workers[step] = spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for step, worker in workers.items():
        told = await asyncio.to_thread(worker.stdout.readline)
        assert told.decode().strip() == step, worker.stderr.read()
    more = list(history(90, 30))
    for name in tenants.values():
        await ledger.append_many(name, more)
    other = Projector(ledger)
    await asyncio.gather(*(other.run_once([name]) for name in tenants.values()))
    for worker in workers.values():
        worker.send_signal(signal.SIGCONT)
        code = await asyncio.to_thread(worker.wait, 30)
        assert code == (-signal.SIGKILL if how == "SIGKILL" else 0), worker.stderr.read()
    for name in tenants.values():
        entries = [entry async for entry in ledger.replay(name)]
        state = await StateReader(ledger).state(name)
        assert state.seq == len(entries)
        recorded = [(entry.recorded_ms, entry.event) for entry in entries]
        assert published(state.value, 0) == expected(recorded, state.value)


async def test_a_dead_workers_tenants_are_taken_over(ledger, valkey, tenant, spawn):
    """After kill -9 of the worker that holds a tenant, another one that runs folds it on."""
    worker = spawn([*GOVLEDGER, "project"], env=environment(valkey.url))
    reader = StateReader(ledger)
    receipt = await ledger.append(tenant, decision(1))
    await reader.state(tenant, at_least=receipt, timeout_s=30)
    async with running(Projector(ledger)):
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        receipt = await ledger.append(tenant, decision(2))
        state = await reader.state(tenant, at_least=receipt, timeout_s=15)
    assert state.value["decisions"]["total"] == 2


async def test_while_a_lease_stands_nobody_else_commits(ledger, tenant):
    """The commit itself refuses a worker that is not the lease's holder, and names the holder."""
    await ledger.append(tenant, decision(1))
    holder, other = Projector(ledger, [Tally()]), Projector(ledger, [Tally()])
    fold = other._fold_of(tenant, other.projections[0])
    walk = await fold.begin()
    pages = [page async for page in walk.pages()]
    await holder._leases.take(tenant)
    with pytest.raises(errors.LeaseHeld, match=holder.worker) as caught:
        await fold.fold_page(walk, pages[0])
    assert caught.value.facts["left_ms"] > 0
    with pytest.raises(errors.LeaseHeld):
        await other._leases.take(tenant)
    assert other._leases.held_elsewhere(tenant)
    await holder._leases.release()
    await other.run_once([tenant])
    assert (await StateReader(ledger, [Tally()]).state(tenant, "tally")).value == {"allow": 1}


async def test_a_projector_that_ends_gives_its_tenants_back(ledger, valkey, tenant):
    """After a clean end nobody waits for a lease to expire."""
    async with running(Projector(ledger)):
        receipt = await ledger.append(tenant, decision(1))
        await StateReader(ledger).state(tenant, at_least=receipt)
        assert valkey.cli("EXISTS", keys.lease(tenant, "governance", 1)) == 1
    assert valkey.cli("EXISTS", keys.lease(tenant, "governance", 1)) == 0


class Broken(Tally):
    """A projection with a defect."""

    name = "broken"

    def apply(self, entities, entry, subject):
        raise RuntimeError("a defect")


async def test_who_cannot_fold_leaves_a_tenant_to_others_and_stops_no_other_projection(
    ledger, tenant
):
    """A worker that fails keeps no lease, however often it tries; readers of what it has folded to
    the head are not told that it stopped.
    """
    await ledger.append(tenant, decision(1))
    broken = Projector(ledger, [Tally(), Broken()])
    await broken._fold_fairly(tenant)
    assert isinstance(broken.stopped[tenant], errors.ServerError)
    state = await StateReader(ledger, [Tally()]).state(tenant, "tally")
    assert (state.seq, state.stopped) == (1, None)
    assert await Leases(ledger.server, "another", [Tally(), Broken()]).take(tenant) == {
        "tally",
        "broken",
    }


async def test_a_state_of_an_old_epoch_replaces_nothing(ledger, valkey, tenant):
    """A worker that was paused before it published, while the ledger got a new epoch, finds the
    later one's state in its place.
    """
    await ledger.append_many(tenant, [decision(n) for n in range(5)])
    projector = Projector(ledger, [Tally()])
    await projector.run_once([tenant])
    fold = projector._fold_of(tenant, projector.projections[0])
    old, old_state = fold.committed, dict(fold.state)
    valkey.cli("DEL", keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    await ledger.append(tenant, decision(7, "deny"))
    await projector.rebuild(tenant, "tally", accept_rollback=True)
    assert not await fold.store.publish(old, old_state, 60)
    state = await StateReader(ledger, [Tally()]).state(tenant, "tally")
    assert (state.seq, state.value) == (1, {"deny": 1})


async def test_an_accepted_rollback_begins_an_epoch(ledger, valkey, tenant):
    """A record that was cut off under the same epoch stops the tenant; accepting it gives the
    ledger a new epoch, an incident in its record, and readers the state that there is now.
    """
    await ledger.append_many(tenant, [decision(n) for n in range(5)])
    record = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    with valkey.client() as client:
        dumped = {key: client.dump(key) for key in record}
        await ledger.append_many(tenant, [decision(n) for n in range(5, 9)])
        projector = Projector(ledger, [Tally()])
        await projector.run_once([tenant])
        for key, value in dumped.items():
            client.restore(key, 0, value, replace=True)
    with pytest.raises(errors.LedgerRolledBack, match="its head is now"):
        await projector.run_once([tenant])
    assert (await StateReader(ledger, [Tally()]).state(tenant, "tally")).stopped
    before = (await ledger.head(tenant)).epoch
    await projector.rebuild(tenant, "tally", accept_rollback=True)
    assert (await ledger.head(tenant)).epoch != before
    state = await StateReader(ledger, [Tally()]).state(tenant, "tally")
    assert (state.seq, state.value, state.stopped) == (5, {"allow": 5}, None)
    assert (await ledger.append(tenant, decision(9))).seq == 6
    await projector.run_once([tenant])
    assert (await StateReader(ledger, [Tally()]).state(tenant, "tally", at_least=6)).seq == 6


async def test_a_newer_version_takes_over_when_it_has_caught_up(ledger, tenant):
    """While @2 is built, readers keep @1; then they get @2, and a worker of the older release
    neither folds nor publishes any more.
    """
    await ledger.append_many(tenant, [decision(n) for n in range(60)])
    old, new = Projector(ledger, [Tally()]), Projector(ledger, [TallyOfTwo()])
    await old.run_once([tenant])
    await old._leases.release()
    reader = StateReader(ledger, [TallyOfTwo()])
    fold = new._fold_of(tenant, new.projections[0])
    walk = await fold.begin()
    walk.page_entries = 20
    async for page in walk.pages():
        await fold.fold_page(walk, page)
        await fold.publish(60)
        state = await reader.state(tenant, "tally")
        seen = (state.version, state.value)
        assert seen == ((1, {"allow": 60}) if fold.is_behind else (2, {"all": 120}))
    await new._leases.release([tenant])
    await ledger.append(tenant, decision(60))
    await old.run_once([tenant])  # it may not have heard of it yet
    assert (await reader.state(tenant, "tally")).version == 2
    assert await Projector(ledger, [Tally()]).run_once([tenant]) == {tenant: 0}
    assert (await reader.state(tenant, "tally")).version == 2
    assert await new.run_once([tenant]) == {tenant: 1}
    assert (await reader.state(tenant, "tally")).value == {"all": 122}


async def test_two_versions_are_folded_side_by_side(ledger, tenant, monkeypatch):
    """A worker of either release folds its version of a projection at the same time; what both
    releases have in common is folded by whoever holds it.
    """
    monkeypatch.setattr(projector_module, "PUBLISH_INTERVAL_S", 0)
    begin = TenantFold.begin

    async def small_pages(fold):
        walk = await begin(fold)
        walk.page_entries = 20
        return walk

    monkeypatch.setattr(TenantFold, "begin", small_pages)
    await ledger.append_many(tenant, [decision(n) for n in range(60)])
    common = Counter()
    old, new = (Projector(ledger, [tally, common]) for tally in (Tally(), TallyOfTwo()))
    assert await old._leases.take(tenant) == {"tally", "counter"}
    assert await new._leases.take(tenant) == {"tally"}
    assert not new._leases.held_elsewhere(tenant)
    for seq in (20, 40, 60):
        for projector in (old, new):
            await projector._fold_fairly(tenant)
            assert await projector.store(tenant, "tally").seq() == seq
        assert await new.store(tenant, "counter").seq() == seq
        assert new._fold_of(tenant, common).seq == 0
    assert old.stopped == new.stopped == {}
    await asyncio.gather(old.run_once([tenant]), new.run_once([tenant]))
    assert (await new.store(tenant, "tally").load(["state"]))["state"] == {"all": 120}
    assert (await new.store(tenant, "counter").load(["state"]))["state"] == {"allow": 60}


async def test_a_lease_that_runs_out_is_looked_at_then(ledger, valkey, tenant):
    """Who was told that another worker holds a tenant takes over what that one folded as soon as
    its leases run out, each for itself, with no hint and no sweep.
    """
    other = Projector(ledger, [Tally(), Counter()])
    for name, left_ms in (("tally", 150), ("counter", 300)):
        valkey.cli("SET", keys.lease(tenant, name, 1), "a dead one", "PX", left_ms)
    await ledger.append(tenant, decision(1))
    await other._fold_fairly(tenant)
    assert other._leases.held_elsewhere(tenant)
    other._wake([tenant])
    assert not other._dirty
    work = [asyncio.create_task(one) for one in (other._take_over_for_ever(), other._work())]
    reader = StateReader(ledger, [Tally(), Counter()])
    for name in ("tally", "counter"):
        assert (await reader.state(tenant, name, at_least=1)).value == {"allow": 1}
    for one in work:
        one.cancel()
    assert await other._leases.take(tenant) == {"tally", "counter"}


async def test_a_worker_that_cannot_attest_goes_on(fresh_server, tenant, monkeypatch, caplog):
    """What keeps the server from being prepared again is named, and ends no projector."""
    monkeypatch.setattr(operate, "PREPARE_INTERVAL_S", 0.01)
    server = fresh_server()
    async with Ledger.connect(server.url) as ledger:
        projecting = asyncio.create_task(operate.run_projector(ledger))
        await StateReader(ledger).state(tenant, at_least=await ledger.append(tenant, decision(1)))
        (key,) = server.cli("KEYS", keys.attestation("*"))
        server.cli("DEL", key)
        server.cli("SET", key, "of another hand")
        await asyncio.to_thread(
            wait_until, lambda: "not attested" in caplog.text, "it was tried and refused"
        )
        load_library = ledger.server.load_library
        refused = []

        async def too_new(*_):
            refused.append(1)
            raise errors.LibraryTooNew("a newer release was here")

        monkeypatch.setattr(ledger.server, "load_library", too_new)
        await asyncio.to_thread(wait_until, lambda: len(refused) > 1, "it was tried twice")
        monkeypatch.setattr(ledger.server, "load_library", load_library)
        receipt = await ledger.append(tenant, decision(2))
        assert (await StateReader(ledger).state(tenant, at_least=receipt)).seq == 2
        assert not projecting.done()
        projecting.cancel()


async def test_going_back_to_a_version_takes_a_command(ledger, valkey, tenant):
    """`activate` makes readers take the older version until it names the newer one again."""
    await ledger.append_many(tenant, [decision(n) for n in range(3)])
    old, new = Projector(ledger, [Tally()]), Projector(ledger, [TallyOfTwo()])
    await old.run_once([tenant])
    await new.run_once([tenant])
    reader = StateReader(ledger, [Tally()])
    assert (await reader.state(tenant, "tally")).version == 2
    with pytest.raises(errors.NotFound, match="tally@7"):
        await new.store(tenant, "tally").pin(7)
    await new.store(tenant, "tally").pin(1)
    old, new = Projector(ledger, [Tally()]), Projector(ledger, [TallyOfTwo()])
    assert await new.store(tenant, "tally").standing() is Standing.SUPERSEDED
    assert tenant in await old.stale_tenants()
    assert tenant not in await new.stale_tenants()
    await old.run_once([tenant])
    await new.run_once([tenant])
    state = await reader.state(tenant, "tally")
    assert (state.version, state.value) == (1, {"allow": 3})
    await new.store(tenant, "tally").pin(2)
    await Projector(ledger, [TallyOfTwo()]).run_once([tenant])
    assert (await reader.state(tenant, "tally")).version == 2


async def test_a_backlog_holds_another_tenant_up_by_one_batch(ledger, tenant, monkeypatch):
    """With one fold at a time, a fresh entry of another tenant comes after one page of a tenant
    with fifty pages to go, and before the next.
    """
    monkeypatch.setattr(projector_module, "FOLDS_AT_ONCE", 1)
    other, order = f"{tenant}-other", []
    for start in range(0, 50_000, 1000):
        await ledger.append_many(tenant, [decision(start + n) for n in range(1000)])
    projector = Projector(ledger, [Tally()])
    commit = FoldStore.commit

    async def noted(store, *args):
        order.append(store.tenant)
        if order.count(tenant) == 3 and store.tenant == tenant:
            await ledger.append(other, decision(1))
            projector._wake([other])
        return await commit(store, *args)

    monkeypatch.setattr(FoldStore, "commit", noted)
    projector._wake([tenant])
    work = asyncio.create_task(projector._work())
    await StateReader(ledger, [Tally()]).state(other, "tally", at_least=1, timeout_s=30)
    work.cancel()
    assert other in order[:5]


async def test_what_the_feed_lost_is_found(ledger, valkey, tenant):
    """Entries whose hint was lost, and copies that were deleted, are found by the sweep."""
    async with running(Projector(ledger)):
        receipt = await ledger.append(tenant, decision(1))
        await StateReader(ledger).state(tenant, at_least=receipt)
    await ledger.append(tenant, decision(2))  # its hint is long gone when the next one listens
    valkey.cli("DEL", keys.FEED)
    async with running(Projector(ledger)):
        await StateReader(ledger).state(tenant, at_least=2, timeout_s=20)
        valkey.cli("DEL", keys.governance_state(tenant))
        is_back = partial(valkey.cli, "EXISTS", keys.governance_state(tenant))
        await asyncio.to_thread(wait_until, is_back, "it is published again", timeout_s=20)


async def test_workers_are_started_again_and_end_together(valkey, tenant, spawn):
    """`project --workers 2`: a killed worker is replaced, SIGTERM ends all of them, and so does the
    death of their parent.
    """

    def workers(parent):
        listing = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(parent.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        return {int(pid) for pid in listing.stdout.split()}

    argv = [*GOVLEDGER, "project", "--workers", "2", "--json"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    parent = spawn(argv, env=environment(valkey.url), **options)
    assert json.loads(parent.stdout.readline())["workers"] == 2
    wait_until(lambda: len(workers(parent)) == 2, "two workers run")
    first = min(workers(parent))
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(workers(parent) - {first}) == 2, "another one was started")
    async with Ledger.connect(valkey.url) as ledger:
        receipt = await ledger.append(tenant, decision(1))
        await StateReader(ledger).state(tenant, at_least=receipt, timeout_s=30)
    left = workers(parent)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(15) == 0
    assert not any(_lives(pid) for pid in left)
    parent = spawn(argv, env=environment(valkey.url), **options)
    wait_until(lambda: len(workers(parent)) == 2, "two workers run")
    left = workers(parent)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(_lives(pid) for pid in left), "they have ended with their parent")


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 - a zombie has ended too
            return stat.read().rpartition(b")")[2].split()[0] != b"Z"
    except FileNotFoundError:
        return False


async def test_the_status_shows_lag_worker_and_quarantine(valkey, tenant, tmp_path):
    """`govledger projections` says how far each projection is, who folds it, what it could not."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(tenant, [decision(n) for n in range(3)])
        projector = Projector(ledger)
        fresh = run(valkey.url, "projections", tenant, "--json")
        (line,) = [one for one in fresh.lines if one["projection"] == "governance"]
        assert (line["seq"], line["lag_entries"], line["worker"]) == (0, 3, None)
        assert line["lag_seconds"] > 0
        await projector._leases.take(tenant)
        await projector._catch_up(projector._fold_of(tenant, projector.projections[0]))
        field = "governance@1:2"
        valkey.cli("HSET", keys.projection_quarantine(tenant), field, "cannot be read")
        done = run(valkey.url, "projections", tenant, "--json")
        (line,) = [one for one in done.lines if one["projection"] == "governance"]
        assert (line["seq"], line["lag_entries"], line["lag_seconds"]) == (3, 0, 0.0)
        assert (line["worker"], line["quarantined"]) == (projector.worker, 1)
        shown = run(valkey.url, "projections", tenant).out
        assert projector.worker in shown
    listed = run(valkey.url, "quarantine", tenant, "--json")
    assert listed.lines == [{"tenant": tenant, "seq": 2, "reason": "cannot be read"}]
    accepted = run(valkey.url, "quarantine", tenant, "--accept", "2", "--accept", "9", "--json")
    assert accepted.lines == []
    assert "not in quarantine: 1 of 2" in accepted.err


OWN = """
class Streak:
    name, version = "streak", 1
    def names(self, entry):
        return ()
    def apply(self, entities, entry, subject):
        state = entities.setdefault("state", {"denied": 0})
        if entry.type == "decision.recorded":
            denied = entry.event["verdict"] == "deny"
            state["denied"] = state["denied"] + 1 if denied else 0
    def quarantined(self, entities, entry):
        pass
    def view(self, state):
        return state
"""


async def test_a_projection_of_ones_own_by_its_import_path(valkey, tenant, tmp_path):
    """A file with a pure fold, named in GOVLEDGER_PROJECTIONS, is folded, read, listed, rebuilt."""
    (tmp_path / "own_fold.py").write_text(OWN)
    env = {"GOVLEDGER_PROJECTIONS": "own_fold:Streak", "PYTHONPATH": str(tmp_path)}
    async with Ledger.connect(valkey.url) as ledger:
        verdicts = ("deny", "allow", "deny", "deny")
        await ledger.append_many(tenant, [decision(n, v) for n, v in enumerate(verdicts)])

    def govledger(*args):
        done = subprocess.run(
            [*GOVLEDGER, *args],
            env=environment(valkey.url, **env),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [orjson.loads(line) for line in done.stdout.splitlines()]

    (done,) = govledger("rebuild", tenant, "--projection", "streak", "--json")
    assert done["folded"] == 4
    (state,) = govledger("state", tenant, "--projection", "streak", "--json")
    assert state["value"] == {"denied": 2}
    listed = govledger("projections", tenant, "--json")
    assert "streak" in {one["projection"] for one in listed}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere", "no import path"),
        ("no_such_module:Fold", "No module named"),
        ("json:loads", "a projection has names"),
        ("projections:Governance", "already"),
    ],
)
async def test_what_is_no_projection_is_refused(valkey, monkeypatch, path, why):
    """A wrong path ends with the setting's name, the reason, and the form that it must have."""
    monkeypatch.setenv("GOVLEDGER_PROJECTIONS", path)
    async with Ledger.connect(valkey.url) as ledger:
        with pytest.raises(errors.InvalidSetting, match=f"GOVLEDGER_PROJECTIONS: .*{why}"):
            Projector(ledger)


async def test_each_entity_of_any_worker_is_the_same_bytes(ledger, tenant):
    """Three workers that pass a tenant on leave, byte for byte, what one alone leaves."""
    workers = [Projector(ledger, [Tally()]) for _ in range(3)]
    for start in range(0, 60, 10):
        await ledger.append_many(tenant, list(history(start, 10)))
        await workers[(start // 10) % 3].run_once([tenant])
    store = workers[0].store(tenant, "tally")
    passed_on = encode_entity((await store.load({"state": 0}))["state"])
    await workers[1].rebuild(tenant, "tally")
    assert encode_entity((await store.load({"state": 0}))["state"]) == passed_on


async def test_what_no_worker_could_begin_with_is_said_once():
    """A projection that cannot be imported ends `--workers N` before any worker is started."""
    with pytest.raises(errors.InvalidSetting, match="GOVLEDGER_PROJECTIONS: nope:x"):
        async with asyncio.timeout(20):
            await run_workers(load_settings(govledger_projections="nope:x"), 2)
