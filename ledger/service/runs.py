"""A job's runs: claimed before, recorded after, in Redis, so that any process can tell.

A slot is a time at which a job is due. Several schedulers may want one; `SET NX` gives it to one
of them, and `jobs:claimed` keeps the newest slot that was ever given, so that a process which slept
past the claim's TTL takes no old one. Nobody leads, and a slot whose holder dies is not given
again: a lock could expire while its holder's BGSAVE goes on, and nothing can fence that.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import getpid, kill
from typing import Any, Final

import msgspec
import orjson

from ledger import errors, keys
from ledger.server import Server
from ledger.service import terminal
from ledger.service.inspection import server_now_ms
from ledger.service.jobs import JOBS, JobContext
from ledger.settings import JobName

__all__ = [
    "Run",
    "claim",
    "claim_token",
    "counts",
    "history",
    "is_gone",
    "last_runs",
    "perform",
    "record_lost",
    "running",
]

RUNNING: Final = "running"
ENDS: Final = ("ok", "skipped", "failed", "stopped")
"""How a run can end."""

COUNT_DIGITS: Final = 19
"""Of what HINCRBY can count to."""

RUNS_KEPT: Final = 100
"""Of each job."""
SLOT_AHEAD_LIMIT_MS: Final = 30_000
RESULT_LIMIT: Final = 4_000
RECORD_TIMEOUT_S: Final = 3.0
_log = logging.getLogger("ledger")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job. `status`: running, ok, skipped, failed, or stopped (by SIGTERM)."""

    job: str
    status: str
    worker: str
    slot_ms: int | None
    """The time at which it was due; None where somebody ran it by hand."""
    begun_ms: int
    seconds: float | None
    result: dict[str, Any]


def worker_name() -> str:
    """This process, for people."""
    return f"{socket.gethostname()}:{getpid()}"


def is_gone(worker: str) -> bool:
    """Whether it was a process of this machine that has ended; of another's nobody knows here."""
    host, _, pid = worker.rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # it is somebody else's, or no pid at all
    return False


# -- slots ---------------------------------------------------------------------------------------


def claim_token() -> str:
    """Who asks for a slot; the same for each attempt to get it, and for nothing else."""
    return f"{worker_name()}:{secrets.token_hex(8)}"


async def claim(server: Server, job: str, slot_ms: int, token: str) -> bool:
    """Whether this slot is ours, which the holder of at most one token is ever told.

    Args:
        server: where the slots are given.
        job: whose slot.
        slot_ms: which.
        token: of `claim_token`: who asks again after `Unavailable` must ask with the same one,
            since the slot may have been given to it.

    Raises:
        JobFailed: this machine's clock is ahead, so the slot has not come yet.
        Unavailable: the server cannot be asked.
    """
    ahead_ms = slot_ms - await server_now_ms(server)
    if ahead_ms > SLOT_AHEAD_LIMIT_MS:
        raise errors.JobFailed(
            f"{job}: this machine's clock is {ahead_ms / 1000:.0f} s or more ahead of the server's",
            hint="set the clock (NTP) here; other schedulers run the job meanwhile",
        )
    key = keys.job_slot(job, slot_ms)
    # A retry after a lost answer finds its own token there.
    holder = await server.command(
        key, "SET", key, token, "NX", "GET", "EX", keys.JOB_SLOT_TTL_SECONDS
    )
    if holder is not None and holder.decode(errors="replace") != token:
        return False
    newest = await server.command(keys.JOBS_CLAIMED, "ZSCORE", keys.JOBS_CLAIMED, job)
    # Nobody can have claimed what is still to come: that was written by other hands.
    possible = newest is not None and float(newest) <= slot_ms - ahead_ms + SLOT_AHEAD_LIMIT_MS
    # While no claim of this slot can have expired, our token there says that nobody else had it.
    had = holder is not None and -ahead_ms < keys.JOB_SLOT_TTL_SECONDS * 1000 - SLOT_AHEAD_LIMIT_MS
    if possible and (float(newest) > slot_ms or (float(newest) == slot_ms and not had)):
        return False
    only_up = ("GT",) if possible or newest is None else ()
    await server.command(keys.JOBS_CLAIMED, "ZADD", keys.JOBS_CLAIMED, *only_up, slot_ms, job)
    return True


# -- one run -------------------------------------------------------------------------------------


async def perform(context: JobContext, job: JobName, slot_ms: int | None = None) -> Run:
    """Runs the job now and keeps what came of it; a failure is in what is returned.

    Raises:
        CancelledError: it was stopped; that is recorded too.
        Unavailable: nobody could be told that it begins; then it did not run.
    """
    server = context.ledger.server
    # A slot's run that is begun again, since the answer was lost, is the same run.
    run_id = secrets.token_hex(8) if slot_ms is None else f"{job}:{slot_ms}"
    begun = Run(job, RUNNING, worker_name(), slot_ms, await server_now_ms(server), None, {})
    fields = (run_id, orjson.dumps(asdict(begun)))
    await server.command(keys.JOBS_RUNNING, "HSET", keys.JOBS_RUNNING, *fields)
    clock = time.monotonic()
    try:
        result = await JOBS[job](context)
        status = "skipped" if "skipped" in result else "ok"
    except asyncio.CancelledError:
        stopped = _ended(begun, "stopped", clock, {"error": "the scheduler was told to end"})
        await _record(server, run_id, stopped)
        raise
    except errors.LedgerError as error:
        status, result = "failed", {"error": error.message, "hint": error.hint}
    except Exception as error:  # noqa: BLE001 - logged; one job's defect must not end the others
        _log.exception("job %s: a defect", job)
        told = terminal.without_secrets(f"{type(error).__name__}: {error}")
        status, result = "failed", {"error": told, "hint": None}
    ended = _ended(begun, status, clock, result)
    await _record(server, run_id, ended)
    return ended


def _ended(begun: Run, status: str, clock: float, result: dict[str, Any]) -> Run:
    taken_s = round(time.monotonic() - clock, 3)
    if len(orjson.dumps(result)) > RESULT_LIMIT:
        _log.warning("job %s: %s", begun.job, result)
        result = {"note": f"the result is longer than {RESULT_LIMIT} bytes; the log has it"}
    return Run(begun.job, status, begun.worker, begun.slot_ms, begun.begun_ms, taken_s, result)


async def _record(server: Server, run_id: str | bytes, ended: Run, *, is_last: bool = True) -> None:
    raw, history = orjson.dumps(asdict(ended)), keys.job_history(ended.job)
    try:
        async with asyncio.timeout(RECORD_TIMEOUT_S):
            await server.command(history, "XADD", history, "MAXLEN", RUNS_KEPT, "*", "run", raw)
            if is_last:
                await server.command(keys.JOBS_LAST, "HSET", keys.JOBS_LAST, ended.job, raw)
            counter = f"{ended.job} {ended.status}"
            await server.command(keys.JOB_COUNTS, "HINCRBY", keys.JOB_COUNTS, counter, 1)
            await server.command(keys.JOBS_RUNNING, "HDEL", keys.JOBS_RUNNING, run_id)
    except (errors.LedgerError, TimeoutError) as error:
        _log.error(
            "job %s: that it is %s could not be recorded: %s", *(ended.job, ended.status), error
        )


async def record_lost(server: Server, begun_before_ms: int) -> int:
    """Records as failed what began before that and never said how it ended, since its process was
    killed; how many there were, what is no run of ours included.
    """
    raw = await server.command(keys.JOBS_RUNNING, "HGETALL", keys.JOBS_RUNNING)
    last, count = await last_runs(server), 0
    for run_id, one in raw.items():
        run = next(iter(_runs([one])), None)
        if run is None:
            await server.command(keys.JOBS_RUNNING, "HDEL", keys.JOBS_RUNNING, run_id)
        elif run.begun_ms < begun_before_ms:
            told = {"error": f"{run.worker} ended before it was done", "hint": "see its log"}
            lost = replace(run, status="failed", result=told)
            newer = last.get(run.job)
            is_last = newer is None or newer.begun_ms < run.begun_ms
            await _record(server, run_id, lost, is_last=is_last)
        else:
            continue
        count += 1
    return count


# -- what has run --------------------------------------------------------------------------------


async def history(server: Server, job: JobName) -> list[Run]:
    """The job's runs, the newest first."""
    key = keys.job_history(job)
    entries = await server.command(key, "XREVRANGE", key, "+", "-")
    return _runs([fields[1] for _, fields in entries])


async def last_runs(server: Server) -> dict[str, Run]:
    """Of each job the run that ended last."""
    raw = await server.command(keys.JOBS_LAST, "HGETALL", keys.JOBS_LAST)
    return {run.job: run for run in _runs(list(raw.values()))}


async def running(server: Server) -> list[Run]:
    """What runs now, or was running when its process was killed."""
    raw = await server.command(keys.JOBS_RUNNING, "HGETALL", keys.JOBS_RUNNING)
    return sorted(_runs(list(raw.values())), key=lambda run: run.begun_ms)


async def counts(server: Server) -> dict[tuple[str, str], int]:
    """How many runs have ended, by job and status; what is no count of ours is left out."""
    raw = await server.command(keys.JOB_COUNTS, "HGETALL", keys.JOB_COUNTS)
    found = {}
    for name, value in raw.items():
        job, _, status = name.decode(errors="replace").partition(" ")
        if job in JOBS and status in ENDS and value.isdigit() and len(value) <= COUNT_DIGITS:
            found[job, status] = int(value)
    return found


def _runs(raws: Sequence[bytes]) -> list[Run]:
    found = []
    for raw in raws:
        try:
            run: Run | None = msgspec.json.decode(raw, type=Run)
        except (msgspec.MsgspecError, ValueError):
            run = None
        if run is not None and run.job in JOBS and run.status in (RUNNING, *ENDS):
            found.append(run)
        else:
            _log.warning("a run that is no run of ours lies among the jobs: %s", ascii(raw[:100]))
    return found
