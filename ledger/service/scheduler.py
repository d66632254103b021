"""The scheduler: APScheduler is the clock, `runs.claim` decides who runs a slot.

Slots are the same for every scheduler: cron times in UTC, or multiples of the interval since 1970.
At each wake-up a job is due for its latest slot alone, so what was missed (nobody there, a blocked
process, Redis away) is made up for once. A job runs at most once at a time in one process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from ledger import errors
from ledger.service.jobs import JobContext
from ledger.service.runs import Run, claim, claim_token, perform
from ledger.settings import JobName, JobSchedule

__all__ = ["STOP_AFTER_S", "Scheduler", "latest_slot", "trigger_of"]

STOP_AFTER_S: Final = 8.0
"""How long a running job may go on after SIGTERM: `docker stop` kills after 10 s."""

CLAIM_RETRY_S: Final = 5.0
CLOCK_CHECK_S: Final = 5.0
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LOOK_BACK: Final = (timedelta(hours=2), timedelta(days=2), timedelta(days=62), timedelta(days=800))
_log = logging.getLogger("ledger")


def trigger_of(schedule: JobSchedule) -> BaseTrigger:
    """When the job is due."""
    if schedule.cron is not None:
        return CronTrigger.from_crontab(schedule.cron, timezone=UTC)
    return IntervalTrigger(seconds=schedule.every_seconds, start_date=_EPOCH, timezone=UTC)


def latest_slot(schedule: JobSchedule, now: datetime) -> datetime | None:
    """The last time at or before `now` at which the job was due; None: not in two years."""
    if schedule.every_seconds is not None:
        period = timedelta(seconds=schedule.every_seconds)
        return _EPOCH + (now - _EPOCH) // period * period
    trigger = trigger_of(schedule)
    for back in _LOOK_BACK:
        found: datetime | None = None
        due = trigger.get_next_fire_time(None, now - back)
        while due is not None and due <= now:
            found, due = due, trigger.get_next_fire_time(due, due + timedelta(microseconds=1))
        if found is not None:
            return found
    return None


def _tell(run: Run) -> None:
    if run.status == "failed":
        _log.error("job %s failed: %s", run.job, run.result["error"])
    else:
        _log.info("job %s: %s in %.3f s", run.job, run.status, run.seconds)


class Scheduler:
    """Runs the jobs of a table until it is cancelled."""

    def __init__(
        self,
        context: JobContext,
        table: dict[JobName, JobSchedule],
        *,
        stop_after_s: float = STOP_AFTER_S,
    ) -> None:
        self._context = context
        self._table = {job: one for job, one in table.items() if one.enabled}
        self._stop_after_s = stop_after_s
        self._running: dict[JobName, asyncio.Task[None]] = {}
        self._performing: set[JobName] = set()
        """Those that have begun; the others only wait for Redis."""

    async def run(self) -> None:
        """Runs what is due, and what was missed, until cancelled; then what runs may end."""
        clock = AsyncIOScheduler(timezone=UTC)
        for job, schedule in self._table.items():
            clock.add_job(
                self._due,
                trigger_of(schedule),
                args=[job],
                id=job,
                coalesce=True,
                misfire_grace_time=None,  # however late: the slot is claimed, not the moment
                max_instances=1,
            )
        clock.start()
        try:
            for job in self._table:
                await self._due(job)
            await self._watch(clock)
        finally:
            clock.shutdown(wait=False)
            await asyncio.sleep(0)  # it shuts down in the loop's next turn
            await self._end()

    async def _watch(self, clock: AsyncIOScheduler) -> None:
        """Plans anew where this machine's clock was set back: APScheduler would wait for the old
        time to come again, for hours.
        """
        offset = time.time() - time.monotonic()
        while True:
            await asyncio.sleep(CLOCK_CHECK_S)
            before, offset = offset, time.time() - time.monotonic()
            if offset < before - 1:
                _log.warning("the clock was set back by %.0f s", before - offset)
                for job, schedule in self._table.items():
                    clock.reschedule_job(job, trigger=trigger_of(schedule))
                    await self._due(job)

    async def _due(self, job: JobName) -> None:
        """Starts the job in a task of its own: a shutdown of APScheduler cancels what it awaits."""
        if job in self._running:
            return  # it goes on, or waits for Redis; its next slot makes up for this one
        task = asyncio.create_task(self._attend(job), name=f"job {job}")
        self._running[job] = task
        task.add_done_callback(lambda _: self._running.pop(job, None))

    async def _attend(self, job: JobName) -> None:
        server, claimed_ms, told = self._context.ledger.server, None, ""
        asked_ms, token = None, ""
        while True:
            try:
                if claimed_ms is None:
                    slot = latest_slot(self._table[job], datetime.now(UTC))
                    slot_ms = (slot - _EPOCH) // timedelta(milliseconds=1) if slot else None
                    if slot_ms is None:
                        return
                    if slot_ms != asked_ms:
                        asked_ms, token = slot_ms, claim_token()
                    if not await claim(server, job, slot_ms, token):
                        return
                    claimed_ms = slot_ms
                self._performing.add(job)
                _tell(await perform(self._context, job, claimed_ms))
                return
            except errors.Unavailable as error:
                level = logging.DEBUG if str(error) == told else logging.WARNING
                _log.log(level, "job %s waits: %s", job, error)
                told = str(error)
            except errors.LedgerError as error:
                _log.error("job %s: %s", job, error)
                return
            finally:
                self._performing.discard(job)
            await asyncio.sleep(CLAIM_RETRY_S)

    async def _end(self) -> None:
        tasks = set(self._running.values())
        begun = {self._running[job] for job in self._performing}
        try:
            if begun:
                names = ", ".join(sorted(self._performing))
                _log.info("ending: %s may go on for %g s", names, self._stop_after_s)
                await asyncio.wait(begun, timeout=self._stop_after_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
