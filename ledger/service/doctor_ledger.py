"""The doctor on the ledger: its tenants, what folds them, who else wrote, and the jobs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from ledger.service.doctor_result import Result, shown, unknown
from ledger.service.doctor_seen import Seen
from ledger.service.scheduler import latest_slot

__all__ = ["LEDGER_CHECKS"]

LAG_LIMIT_MS: Final = 60_000
JOB_GRACE: Final = timedelta(minutes=3)


def registry(seen: Seen) -> Result:
    """Whether every tenant's stream is known."""
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
    return Result("registry", "ok", f"{len(seen.tenants)} tenants, no unknown stream")


def projector(seen: Seen) -> Result:
    """How far the folds are behind the heads."""
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
    found = f"{entries} entries of {len(behind)} tenants are not folded"
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


def jobs(seen: Seen) -> Result:
    """Whether the scheduled jobs run and work."""
    if "jobs" in seen.denied:
        return unknown("jobs", "whether the scheduled jobs run", "+hgetall +zrange")
    table = {job: one for job, one in seen.settings.govledger_jobs.items() if one.enabled}
    now = datetime.fromtimestamp(seen.now_ms / 1000, UTC) - JOB_GRACE
    late = []
    for job, schedule in table.items():
        due = latest_slot(schedule, now)
        due_ms = due.timestamp() * 1000 if due is not None else 0
        # Of what was due before anything was recorded there was nothing to do.
        if seen.claimed_ms.get(job, 0) < due_ms and _was_there(seen, due_ms):
            late.append(job)
    failed = [job for job, run in seen.last_runs.items() if job in table and run.status == "failed"]
    if late:
        return Result(
            "jobs",
            "warning",
            f"not run when due: {', '.join(late)}",
            "no scheduler seems to run: escalations do not expire, snapshots are not taken",
            "govledger schedule, as a service; GOVLEDGER_JOBS switches off what is not wanted",
        )
    if failed:
        reason = seen.last_runs[failed[0]].result.get("error")
        meaning = "what the job is for is not done"
        found = f"failed at their last run: {', '.join(failed)} ({reason})"
        return Result("jobs", "warning", found, meaning, f"govledger jobs {failed[0]}")
    off = [job for job, one in seen.settings.govledger_jobs.items() if not one.enabled]
    return Result(
        "jobs", "ok", "each that was due has run" + (f"; off: {', '.join(off)}" if off else "")
    )


def _was_there(seen: Seen, time_ms: float) -> bool:
    """Whether anything was recorded by then; in doubt it was."""
    unknown = not {"registry", "streams"}.isdisjoint(seen.denied)
    return unknown or (seen.began_ms is not None and seen.began_ms <= time_ms)


LEDGER_CHECKS: Final[tuple[Callable[[Seen], Result], ...]] = (
    registry,
    projector,
    quarantine,
    foreign_hands,
    jobs,
)
