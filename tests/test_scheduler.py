"""The scheduler: which slot a job is due for, who gets it, how it ends; with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import Decision, Ledger, errors, keys
from ledger.service import runs as runs_module
from ledger.service import scheduler as schedulers
from ledger.service.jobs import JobContext
from ledger.service.runs import claim_token, counts, history, last_runs, running
from ledger.service.scheduler import Scheduler, latest_slot, trigger_of
from ledger.settings import DEFAULT_JOBS, JobSchedule, load_settings
from projections import Projector
from tests.commands import GOVLEDGER, environment, run
from tests.proxy import Proxy

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


def only(**schedules: dict) -> str:
    """GOVLEDGER_JOBS with these jobs alone."""
    names = [name.replace("-", "_") for name in DEFAULT_JOBS]
    table = {name: {"enabled": False} for name in DEFAULT_JOBS}
    assert set(schedules) <= set(names)
    return json.dumps(table | {name.replace("_", "-"): one for name, one in schedules.items()})


# -- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("{", "GOVLEDGER_JOBS: is no JSON"),
        ("[]", "GOVLEDGER_JOBS"),
        ('{"Nope": {}}', "GOVLEDGER_JOBS.Nope: Input should be 'expire', 'snapshot'"),
        ('{"expire": {"every_seconds": 0}}', "GOVLEDGER_JOBS.expire.every_seconds: Input"),
        ('{"expire": {"every_seconds": 604801}}', "less than or equal to 604800"),
        ('{"expire": {"every_seconds": 5, "cron": "* * * * *"}}', "not both"),
        ('{"expire": {"cron": "0 3 * *"}}', "is no cron line"),
        ('{"expire": {"cron": "61 3 * * *"}}', "is no cron line"),
        ('{"expire": {"cron": "0 0 31 2 *"}}', "never comes"),
        ('{"expire": {"cron": "0 3 * * 0"}}', "is 0 Sunday or Monday"),
        ('{"expire": {"cron": "0 3 * * mon,3"}}', "is 0 Sunday or Monday"),
        ('{"expire": {"evry_seconds": 5}}', "Extra inputs"),
    ],
)
def test_a_bad_table_names_what_is_wrong(table, says, monkeypatch):
    """Each mistake in GOVLEDGER_JOBS is refused with its place and the limit."""
    monkeypatch.setenv("GOVLEDGER_JOBS", table)
    with pytest.raises(errors.InvalidSetting, match="GOVLEDGER_JOBS") as caught:
        load_settings()
    assert says in str(caught.value)


def test_a_table_changes_what_it_names(monkeypatch):
    """What the table does not name stays as it is by default; a job can be switched off."""
    given_table = {"expire": {"cron": "*/5 * * * mon-fri"}, "snapshot": {"enabled": False}}
    monkeypatch.setenv("GOVLEDGER_JOBS", json.dumps(given_table))
    jobs = load_settings().govledger_jobs
    assert {job: str(one) for job, one in jobs.items()} == {
        **{job: str(one) for job, one in DEFAULT_JOBS.items()},
        "expire": "cron */5 * * * mon-fri",
        "snapshot": "off",
    }
    assert jobs["snapshot"].cron == DEFAULT_JOBS["snapshot"].cron


SCHEDULES = st.one_of(
    st.builds(JobSchedule, every_seconds=st.integers(1, 604_800)),
    st.sampled_from(
        ["* * * * *", "*/7 * * * *", "0 3 * * *", "30 2 * * sun", "0 0 1 * *", "59 23 31 12 *"]
    ).map(lambda line: JobSchedule(cron=line)),
)


@given(SCHEDULES, st.integers(1_700_000_000, 1_900_000_000))
def test_the_latest_slot_is_the_last_one_due(schedule, seconds):
    """It is not in the future, nothing is due between it and now, and everybody gets the same."""
    now = datetime.fromtimestamp(seconds, UTC)
    slot = latest_slot(schedule, now)
    assert slot <= now
    following = trigger_of(schedule).get_next_fire_time(slot, slot + timedelta(microseconds=1))
    assert following > now
    assert latest_slot(schedule, following - timedelta(microseconds=1)) == slot


# -- claims --------------------------------------------------------------------------------------


async def claim(server, job: str, slot_ms: int) -> bool:
    """By somebody who has not asked before."""
    return await runs_module.claim(server, job, slot_ms, claim_token())


async def test_a_slot_is_given_once(fresh_server, server):
    """Of many who claim a slot at once one gets it; later nobody does, even without the claim."""
    url = fresh_server(server.kind).url
    slot_ms = int(time.time() * 1000)
    ledgers = [await Ledger.connect(url) for _ in range(8)]
    got = await asyncio.gather(*(claim(one.server, "health", slot_ms) for one in ledgers * 4))
    assert Counter(got) == {True: 1, False: 31}
    first = ledgers[0].server
    await first.command("", "DEL", keys.job_slot("health", slot_ms))  # as its TTL does
    assert not await claim(first, "health", slot_ms)
    assert not await claim(first, "health", slot_ms - 60_000)
    assert await claim(first, "cleanup", slot_ms - 60_000)
    assert await claim(first, "health", slot_ms + 1)
    assert 0 < await first.command("", "TTL", keys.job_slot("health", slot_ms + 1)) <= 172_800
    for one in ledgers:
        await one.aclose()


@pytest.mark.parametrize("lost", [b"NX\r\n", b"ZADD", b"HSET"])
async def test_a_slot_is_not_lost_with_the_answer(fresh_server, monkeypatch, lost):
    """Where the server took the claim and the connection broke, for longer than the attempts of a
    call, who asks again has the slot, and its job runs once.
    """
    monkeypatch.setattr(schedulers, "CLAIM_RETRY_S", 0.05)
    async with Proxy(fresh_server()) as proxy:
        settings = load_settings(redis_url=proxy.url, memory_max_reconnect_attempts=0)
        async with Ledger.connect(settings=settings) as ledger:
            proxy.lose_reply_to = lost
            table = {"health": JobSchedule(every_seconds=86_400)}
            scheduler = asyncio.create_task(Scheduler(JobContext(ledger), table).run())
            await asyncio.wait_for(proxy.lost.wait(), 10)
            (ran,) = await asyncio.wait_for(runs_of(ledger, "health", 1), 10)
            scheduler.cancel()
            await asyncio.gather(scheduler, return_exceptions=True)
            assert ran.status == "ok"
            assert await running(ledger.server) == []
            assert not await claim(ledger.server, "health", ran.slot_ms)


async def test_a_clock_that_is_ahead_claims_nothing(fresh_server):
    """A slot that has not come by the server's clock is refused: it would block the true ones."""
    async with Ledger.connect(fresh_server().url) as ledger:
        slot_ms = int(time.time() * 1000) + 3_600_000
        with pytest.raises(errors.JobFailed, match="clock"):
            await claim(ledger.server, "health", slot_ms)
        assert await claim(ledger.server, "health", slot_ms - 3_600_000)


async def test_a_claim_from_the_future_is_no_claim(fresh_server):
    """A slot that nobody can have claimed yet, written by other hands, does not stop the job."""
    async with Ledger.connect(fresh_server().url) as ledger:
        server, slot_ms = ledger.server, int(time.time() * 1000)
        for score in ("9e18", "inf"):
            await server.command("", "ZADD", keys.JOBS_CLAIMED, score, "health")
            slot_ms += 1
            assert await claim(server, "health", slot_ms)
            assert not await claim(server, "health", slot_ms)


async def test_junk_among_the_runs_is_left_out(fresh_server):
    """What is no run, or a count that is no number, is left out of what `jobs` lists."""
    server = fresh_server()
    async with Ledger.connect(server.url) as ledger:
        assert run(server.url, "run", "health").code == 0
        for raw in ("1", "{}", '{"job":1}', "\\xff", "[]"):
            for key in (keys.JOBS_LAST, keys.JOBS_RUNNING):
                await ledger.server.command("", "HSET", key, f"junk {raw}", raw)
        await ledger.server.command("", "HSET", keys.JOB_COUNTS, "health ok", "many")
        await ledger.server.command("", "HSET", keys.JOB_COUNTS, "junk", "-1")
        for name in ("junk ok", "health junk", "health", "health ok ok"):
            await ledger.server.command("", "HSET", keys.JOB_COUNTS, name, "7")
        await ledger.server.command("", "HSET", keys.JOB_COUNTS, "health failed", "9" * 5000)
        (kept,) = (await last_runs(ledger.server)).values()
        for change in ({"job": "junk"}, {"status": "junk"}):
            raw = json.dumps(asdict(kept) | change)
            await ledger.server.command("", "HSET", keys.JOBS_LAST, f"{change}", raw)
        assert await last_runs(ledger.server) == {"health": kept}
        assert await counts(ledger.server) == {}
    done = run(server.url, "jobs", "--json")
    assert done.code == 0, done.err
    listed = {line["job"]: line for line in done.lines}
    assert listed["health"]["last"]["status"] == "ok"
    assert listed["health"]["runs"] == {}
    assert run(server.url, "doctor").code == 0


# -- processes -----------------------------------------------------------------------------------


@pytest.fixture
def schedule(spawn, tmp_path):
    """`schedule(url, table, *options)`: a running `govledger schedule`; `log` is its stderr."""

    def started(url: str, table: str, *options: object) -> subprocess.Popen[bytes]:
        log = tmp_path / f"schedule-{len(list(tmp_path.glob('schedule-*')))}.log"
        with log.open("wb") as stderr:
            process = spawn(
                [*GOVLEDGER, "schedule", "--json", *map(str, options)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(url, GOVLEDGER_JOBS=table),
            )
        assert process.stdout.readline(), log.read_text()
        process.log = log
        return process

    return started


async def runs_of(ledger: Ledger, job: str, at_least: int) -> list:
    while len(runs := await history(ledger.server, job)) < at_least:  # noqa: ASYNC110 - it waits for other processes
        await asyncio.sleep(0.05)
    return runs


async def test_several_schedulers_run_each_slot_once(fresh_server, schedule, tenant):
    """Three processes share the slots of a job, and none is run twice."""
    server = fresh_server()
    async with Ledger.connect(server.url) as ledger:
        decision = Decision(
            id="over", agent="a", action="b", verdict="escalate", at=LONG_AGO, expires_at=LONG_AGO
        )
        await ledger.append(tenant, decision)
        await Projector(ledger).run_once([tenant])
        table = only(health={"every_seconds": 1}, expire={"every_seconds": 1})
        started = [schedule(server.url, table) for _ in range(3)]
        for job in ("health", "expire"):
            runs = await runs_of(ledger, job, 4)
            slots = [run.slot_ms for run in runs]
            assert len(slots) == len(set(slots))
            assert all(slot % 1000 == 0 for slot in slots)
            assert {run.status for run in runs} == {"ok"}
        for process in started:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(20) for process in started] == [0, 0, 0]
        assert await running(ledger.server) == []
        kinds = [entry.type async for entry in ledger.replay(tenant)]
        assert kinds == ["decision.recorded", "escalation.resolved"]


async def test_what_was_missed_is_made_up_for_once(fresh_server, schedule):
    """After a time without any scheduler the job runs at once, and once, for all it missed."""
    server = fresh_server()
    table = only(cleanup={"cron": "0 3 * * *"}, health={"every_seconds": 1})
    async with Ledger.connect(server.url) as ledger:
        days_ago = latest_slot(DEFAULT_JOBS["snapshot"], datetime.now(UTC) - timedelta(days=5))
        days_ago_ms = int(days_ago.timestamp() * 1000)
        assert await claim(ledger.server, "cleanup", days_ago_ms)
        process = schedule(server.url, table)
        (made_up,) = await runs_of(ledger, "cleanup", 1)
        assert days_ago_ms + 4 * 86_400_000 <= made_up.slot_ms <= made_up.begun_ms
        await runs_of(ledger, "health", 3)
        os.kill(process.pid, signal.SIGSTOP)  # asleep for two slots
        before = await history(ledger.server, "health")
        await asyncio.sleep(2.1)
        os.kill(process.pid, signal.SIGCONT)
        runs = await runs_of(ledger, "health", len(before) + 2)
        slots = sorted(run.slot_ms for run in runs)
        assert len(slots) == len(set(slots))
        assert max(after - before for before, after in pairwise(slots)) >= 2000
        assert len(await history(ledger.server, "cleanup")) == 1


async def test_a_restart_of_redis_is_waited_for(fresh_server, schedule):
    """Slots that come while the server is away are made up for when it is back."""
    server = fresh_server()
    process = schedule(server.url, only(health={"every_seconds": 1}))
    async with Ledger.connect(server.url) as ledger:
        await runs_of(ledger, "health", 1)
        server.kill()
        await asyncio.sleep(1)
        server.restart()
        await runs_of(ledger, "health", 3)
    assert process.poll() is None


async def slow_snapshot(server, schedule, tenant, delay_us: int, *options: object):
    """A scheduler whose snapshot job takes a while, once it has begun."""
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))
        server.cli("CONFIG", "SET", "rdb-key-save-delay", delay_us)
        process = schedule(server.url, only(snapshot={"cron": "0 3 * * *"}), *options)
        while not await running(ledger.server):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
    return process


async def test_sigterm_lets_the_running_job_end(fresh_server, schedule, tenant):
    """A job that is under way comes to its end before the process does."""
    server = fresh_server()
    process = await slow_snapshot(server, schedule, tenant, 80_000, "--stop-after", 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    async with Ledger.connect(server.url) as ledger:
        assert (await last_runs(ledger.server))["snapshot"].status == "ok"
        assert await running(ledger.server) == []


async def test_sigterm_stops_a_job_that_takes_too_long(fresh_server, schedule, tenant):
    """Past --stop-after the job is stopped, and its run is recorded as stopped."""
    server = fresh_server()
    process = await slow_snapshot(server, schedule, tenant, 500_000, "--stop-after", 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    async with Ledger.connect(server.url) as ledger:
        assert (await last_runs(ledger.server))["snapshot"].status == "stopped"
        assert await running(ledger.server) == []


async def test_a_job_by_hand_that_is_stopped_has_not_succeeded(fresh_server, spawn, tenant):
    """SIGTERM ends `govledger run` with 1, and the run is recorded as stopped."""
    server = fresh_server()
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))
        server.cli("CONFIG", "SET", "rdb-key-save-delay", 500_000)
        process = spawn([*GOVLEDGER, "run", "snapshot"], env=environment(server.url))
        while not await running(ledger.server):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
        assert (await last_runs(ledger.server))["snapshot"].status == "stopped"


async def test_history_is_bounded_and_failures_are_kept(fresh_server):
    """A job's last hundred runs are kept, failed ones with their reason, and `jobs` lists them."""
    server = fresh_server()
    (server.directory / "dump.rdb").mkdir()
    failed = run(server.url, "run", "snapshot", "--json")
    assert failed.code == 1
    assert "BGSAVE failed" in failed.error["message"]
    async with Ledger.connect(server.url) as ledger:
        key = keys.job_history("health")
        for n in range(120):
            await ledger.server.command(key, "XADD", key, f"{n + 1}-0", "run", "no run of ours")
        assert run(server.url, "run", "health").code == 0
        assert await ledger.server.command(key, "XLEN", key) == 100
    listed = {line["job"]: line for line in run(server.url, "jobs", "--json").lines}
    assert list(listed) == list(DEFAULT_JOBS)
    assert listed["snapshot"]["last"]["status"] == "failed"
    assert "BGSAVE failed" in listed["snapshot"]["last"]["result"]["error"]
    assert listed["snapshot"]["runs"] == {"failed": 1}
    assert listed["health"]["last"]["result"]["keys"] > 0
    assert listed["cleanup"]["last"] is None
    (kept,) = run(server.url, "jobs", "snapshot", "--json").lines
    assert kept["status"] == "failed"
    shown = run(server.url, "jobs").out
    assert "cron 0 3 * * *" in shown
    assert run(server.url, "run", "nope").code == 2


async def test_dev_runs_the_jobs(spawn, embedded_dir, tenant):
    """`govledger dev` expires escalations by itself."""
    process = spawn(
        [*GOVLEDGER, "dev", "--data", embedded_dir, "--json"],
        stdout=subprocess.PIPE,
        env=environment(None, GOVLEDGER_JOBS=only(expire={"every_seconds": 1})),
    )
    url = json.loads(process.stdout.readline())["url"]
    async with Ledger.connect(url) as ledger:
        decision = Decision(
            id="over", agent="a", action="b", verdict="escalate", at=LONG_AGO, expires_at=LONG_AGO
        )
        await ledger.append(tenant, decision)
        while (await ledger.head(tenant)).seq < 2:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
        assert (await ledger.get(tenant, "expire:over")).type == "escalation.resolved"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
