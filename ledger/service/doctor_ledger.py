"""The doctor on the ledger: its tenants, what folds them, who else wrote, and the jobs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from ledger.service.cleanup import IMPORT_LIMIT_S
from ledger.service.doctor_result import Result, unknown
from ledger.service.doctor_seen import Seen
from ledger.service.runs import is_gone
from ledger.service.scheduler import latest_slot
from ledger.settings import JobName
from ledger.wording import counted, shown

__all__ = ["LEDGER_CHECKS"]

LAG_LIMIT_MS: Final = 60_000
JOB_GRACE: Final = timedelta(minutes=3)
LONG_RUN_S: Final = 600
LONG_RUN_TIMES: Final = 10
"""A run that takes longer, and so many times longer than the one before, may have been killed."""


def registry(seen: Seen) -> Result:
    """Whether every tenant's stream is known."""
    if "registry" in seen.denied:
        return unknown("registry", "which tenants there are", "+smembers")
    if seen.unregistered is None:
        return unknown("registry", "whether streams are hidden from the projectors", "+scan")
    if seen.unregistered:
        return Result(
            "registry",
            "danger",
            f"not in the registry: {shown(seen.unregistered)}",
            "their decisions are recorded, and no projector folds them: nobody acts on them",
            f"SADD claude-flow:ledger:_:tenants:all {seen.unregistered[0]} …, or delete the keys "
            "if they are no ledgers",
        )
    if seen.misnamed:
        meaning = "somebody else writes into the registry; they are ignored"
        fix = "SREM them from claude-flow:ledger:_:tenants:all"
        return Result("registry", "warning", f"no tenants: {shown(seen.misnamed)}", meaning, fix)
    return Result("registry", "ok", f"{counted(len(seen.tenants), 'tenant')}, no unknown stream")


def projector(seen: Seen) -> Result:
    """How far the folds are behind the heads."""
    if "registry" in seen.denied:
        return unknown("projector", "how far state is behind", "+smembers")
    if "tenants" in seen.denied:
        return unknown("projector", "how far state is behind", "+hmget +hget +ttl +getrange")
    broken = [f"{one.tenant} ({one.problem})" for one in seen.standings if one.problem]
    if broken:
        return Result(
            "projector",
            "danger",
            f"not folded: {shown(broken)}",
            "policies act on state that stands still",
            "the hint in `govledger project --once` for that tenant says the way out",
        )
    behind: dict[str, int] = {}
    for one in seen.standings:  # an entry waits until every projection has folded it
        if one.behind:
            behind[one.tenant] = max(one.behind, behind.get(one.tenant, 0))
    entries = sum(behind.values())
    absent = {
        one.tenant for one in seen.standings if one.head and one.head.seq and one.ttl_seconds == -2
    }
    if not behind and not absent:
        return Result("projector", "ok", "every tenant is folded up to its head")
    age_ms = 0 if seen.oldest_unfolded_ms is None else seen.now_ms - seen.oldest_unfolded_ms
    found = f"not folded: {counted(entries, 'entry')} of {counted(len(behind), 'tenant')}"
    if behind:
        found += f", the oldest for {age_ms / 1000:.0f} s"
    if absent:
        found += f"; no published copy: {shown(sorted(absent))}"
    if age_ms <= LAG_LIMIT_MS and not absent:
        return Result("projector", "note", found)
    meaning = "adaptive policies read state from before these decisions"
    return Result("projector", "warning", found, meaning, "govledger project (is one running?)")


def quarantine(seen: Seen) -> Result:
    """Entries that no fold could read."""
    if "registry" in seen.denied:
        return unknown("quarantine", "whether entries could not be folded", "+smembers")
    if "quarantine" in seen.denied:
        return unknown("quarantine", "whether entries could not be folded", "+hlen")
    if not seen.quarantined:
        return Result("quarantine", "ok", "empty")
    counts = [f"{tenant}: {count}" for tenant, count in seen.quarantined.items()]
    first = next(iter(seen.quarantined))
    return Result(
        "quarantine",
        "warning",
        f"entries that could not be folded: {shown(counts)}",
        "they are recorded, and missing from state",
        f"HGETALL claude-flow:ledger:{{{first}}}:projection:quarantine says why; a release that "
        f"can read them, then govledger rebuild {first}",
    )


def foreign_hands(seen: Seen) -> Result:
    """Incidents that the append function noticed."""
    if "registry" in seen.denied:
        return unknown("foreign writes", "whether others write into streams", "+smembers")
    if "tenants" in seen.denied:
        return unknown("foreign writes", "whether others write into streams", "+hmget")
    touched = {
        one.tenant: one.head.incidents for one in seen.standings if one.head and one.head.incidents
    }
    if not touched:
        return Result("foreign writes", "ok", "none was noticed")
    counts = [f"{tenant}: {count}" for tenant, count in touched.items()]
    first = next(iter(touched))
    return Result(
        "foreign writes",
        "warning",
        f"incidents: {shown(counts)}",
        "others wrote into streams or deleted entries; foreign entries are never folded",
        f"HGETALL claude-flow:ledger:{{{first}}}:governance:head; SECURITY.md has the ACLs",
    )


def leftovers(seen: Seen) -> Result:
    """What killed processes and other hands left beside the record."""
    if not {"registry", "SCAN", "OBJECT", "leases"}.isdisjoint(seen.denied):
        return unknown(
            "leftovers", "what killed processes left", "+smembers +scan +object|idletime +pttl"
        )
    killed = [tenant for tenant, idle in seen.importing.items() if idle >= IMPORT_LIMIT_S]
    found = [
        *([f"imports that were never finished: {shown(killed)}"] if killed else ()),
        *([f"leases without an end: {shown(seen.lasting_leases)}"] if seen.lasting_leases else ()),
    ]
    if found:
        meaning = "they are in nobody's way, and take memory; no worker heeds such a lease"
        fix = "govledger run cleanup, which `govledger schedule` does each night"
        return Result("leftovers", "warning", "; ".join(found), meaning, fix)
    if seen.importing:
        going_on = f"imports go on: {shown([*seen.importing])}"
        meaning = "or were killed less than an hour ago; the next one of the tenant begins anew"
        return Result("leftovers", "note", going_on, meaning)
    return Result("leftovers", "ok", "none")


def jobs(seen: Seen) -> Result:
    """Whether the scheduled jobs run, come to their end, and work."""
    if "jobs" in seen.denied:
        return unknown("jobs", "whether the scheduled jobs run", "+hgetall +zrange")
    table = {job: one for job, one in seen.settings.govledger_jobs.items() if one.enabled}
    late = [job for job in table if _is_late(seen, job)]
    lost = {job: how for job in table if job not in late and (how := _how_lost(seen, job))}
    ended = {job: run for job, run in seen.last_runs.items() if job in table and job not in lost}
    failed = {job: run for job, run in ended.items() if run.status == "failed"}
    stopped = [job for job, run in ended.items() if run.status == "stopped" and job not in late]
    found = [
        *([f"not run when due: {', '.join(late)}"] if late else ()),
        *(f"{job} {how}" for job, how in lost.items()),
        *([f"stopped before they were done: {', '.join(stopped)}"] if stopped else ()),
        *(
            f"{job} failed at its last run: {run.result.get('error')}"
            for job, run in failed.items()
        ),
    ]
    if late:
        meaning = "no scheduler seems to run: escalations do not expire, snapshots are not taken"
        fix = "govledger schedule, as a service; GOVLEDGER_JOBS switches off what is not wanted"
        return Result("jobs", "warning", "; ".join(found), meaning, fix)
    if found:
        meaning = "what the job is for is not done; it is due again at its next time"
        first = next(iter([*lost, *stopped, *failed]))
        fix = f"govledger jobs {first}; govledger run {first} makes up for it now"
        return Result("jobs", "warning", "; ".join(found), meaning, fix)
    off = [job for job, one in seen.settings.govledger_jobs.items() if not one.enabled]
    return Result(
        "jobs", "ok", "each that was due has run" + (f"; off: {', '.join(off)}" if off else "")
    )


def _is_late(seen: Seen, job: JobName) -> bool:
    """Whether nobody took the job when it was due."""
    now = datetime.fromtimestamp(seen.now_ms / 1000, UTC) - JOB_GRACE
    due = latest_slot(seen.settings.govledger_jobs[job], now)
    due_ms = due.timestamp() * 1000 if due is not None else 0
    # Of what was due before anything was recorded there was nothing to do.
    return seen.claimed_ms.get(job, 0) < due_ms and _was_there(seen, due_ms)


def _how_lost(seen: Seen, job: JobName) -> str:
    """What is known of a run that was begun and has not ended; "" where nothing is wrong.

    A slot is not given again: while its holder lives this is a long run, and nobody can tell from
    here but on the holder's own machine.
    """
    claimed_ms, last = seen.claimed_ms.get(job, 0), seen.last_runs.get(job)
    if last is not None and (last.slot_ms == claimed_ms or last.begun_ms >= claimed_ms):
        return ""
    run = next((one for one in seen.running if (one.job, one.slot_ms) == (job, claimed_ms)), None)
    if run is None:
        was_taken = 0 < claimed_ms < seen.now_ms - JOB_GRACE.total_seconds() * 1000
        return "was taken when due, and its process ended before it began" if was_taken else ""
    if is_gone(run.worker):
        return f"was begun by {run.worker}, whose process ended before it was done"
    taken_s = (seen.now_ms - run.begun_ms) / 1000
    usual_s = last.seconds if last is not None and last.seconds else 0
    if taken_s <= max(LONG_RUN_S, LONG_RUN_TIMES * usual_s):
        return ""
    return f"was begun by {run.worker} {taken_s / 60:.0f} min ago and has not ended: does it run?"


def _was_there(seen: Seen, time_ms: float) -> bool:
    """Whether anything was recorded by then; in doubt it was."""
    unknown = not {"registry", "streams"}.isdisjoint(seen.denied)
    return unknown or (seen.began_ms is not None and seen.began_ms <= time_ms)


LEDGER_CHECKS: Final[tuple[Callable[[Seen], Result], ...]] = (
    registry,
    projector,
    quarantine,
    foreign_hands,
    leftovers,
    jobs,
)
