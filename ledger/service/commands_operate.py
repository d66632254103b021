"""The commands that keep it going: schedule, run, jobs, doctor, health, top."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ledger import errors
from ledger.service import terminal
from ledger.service.command import (
    Json,
    MetricsHost,
    MetricsPort,
    Url,
    app,
    connect,
    example,
    print_json,
    print_lines,
)
from ledger.settings import JobName, Settings

if TYPE_CHECKING:
    from ledger import Ledger
    from ledger.service.jobs import Archive
    from ledger.service.runs import Run

__all__: list[str] = []

_log = logging.getLogger("ledger")

ArchiveDir = Annotated[
    Path | None,
    typer.Option(
        "--archive",
        metavar="DIR",
        show_default=False,
        help="Copy each snapshot's dump to this directory, with its SHA-256. The directory must be "
        "there, and the server's dump readable from here.",
    ),
]
KeepLast = Annotated[
    int, typer.Option("--keep-last", metavar="N", min=1, help="Of the copies keep the newest N,")
]
KeepDays = Annotated[
    int,
    typer.Option("--keep-days", metavar="N", min=0, help="and the newest of each of N days."),
]


def _archive(directory: Path | None, last: int, days: int) -> Archive | None:
    from ledger.service.jobs import Archive
    from ledger.service.snapshot import Retention, check_archive

    if directory is None:
        return None
    check_archive(directory)
    return Archive(directory, Retention(last, days))


# -- jobs ----------------------------------------------------------------------------------------


@app.command(epilog=example("govledger schedule", "govledger schedule --archive ./dumps"))
def schedule(
    *,
    archive: ArchiveDir = None,
    keep_last: KeepLast = 7,
    keep_days: KeepDays = 30,
    stop_after_s: Annotated[
        float,
        typer.Option(
            "--stop-after", metavar="SECONDS", min=0, help="How long a job may go on after SIGTERM."
        ),
    ] = 8.0,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Run the jobs at their times, until stopped.

    GOVLEDGER_JOBS has the table. Any number of schedulers may run: each time of a job is given to
    one of them. What nobody was there for is made up for once.
    """

    async def work() -> None:
        from ledger.service.jobs import JobContext
        from ledger.service.operate import ends_on_sigterm, prepare, with_metrics
        from ledger.service.scheduler import Scheduler

        terminal.show_logs()
        kept = _archive(archive, keep_last, keep_days)
        async with (
            ends_on_sigterm(),
            connect(url) as ledger,
            with_metrics(ledger, metrics_host, metrics_port),
        ):
            await prepare(ledger)
            table = ledger.server.settings.govledger_jobs
            if as_json:
                told = {job: str(one) for job, one in table.items()}
                print_json({"scheduling": ledger.server.address, "jobs": told})
                sys.stdout.flush()
            _log.info(
                "scheduling on %s: %s",
                ledger.server.address,
                ", ".join(f"{job} {one}" for job, one in table.items()),
            )
            await Scheduler(JobContext(ledger, kept), table, stop_after_s=stop_after_s).run()

    terminal.run(work())


def _job(name: str) -> JobName:
    if name not in get_args(JobName):
        names = ", ".join(get_args(JobName))
        raise errors.InvalidInput(f"JOB: {name!r} is no job", hint=f"there is: {names}")
    return name  # type: ignore[return-value]  # just looked up


@app.command(epilog=example("govledger run expire", "govledger run snapshot --archive ./dumps"))
def run(
    name: Annotated[str, typer.Argument(metavar="JOB", show_default=False)],
    *,
    archive: ArchiveDir = None,
    keep_last: KeepLast = 7,
    keep_days: KeepDays = 30,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Run a job now, by its name.

    There are expire, snapshot, cleanup, aof-rewrite, refresh and health. It is what `govledger
    schedule` runs at the job's times; that goes on as it would.
    """
    job = _job(name)

    async def work() -> None:
        from ledger.service.jobs import JobContext
        from ledger.service.operate import ends_on_sigterm
        from ledger.service.runs import perform

        kept, done = _archive(archive, keep_last, keep_days), None
        async with ends_on_sigterm(), connect(url) as ledger:
            done = await perform(JobContext(ledger, kept), job)
        if done is None:
            raise errors.JobFailed(f"{job}: stopped by SIGTERM", hint="it is safe to run it again")
        if done.status == "failed":
            raise errors.JobFailed(f"{job}: {done.result['error']}", hint=done.result.get("hint"))
        if as_json:
            print_json(_run_json(done))
        else:
            print_lines(f"{job}: {done.status}, {done.seconds:.3f} s; {_result_text(done)}")

    terminal.run(work())


@app.command(epilog=example("govledger jobs", "govledger jobs --json"))
def jobs(
    name: Annotated[str | None, typer.Argument(metavar="[JOB]", show_default=False)] = None,
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List the jobs: what ran, when, how long, with what result.

    Of one JOB: its last hundred runs, the newest first.
    """
    job = _job(name) if name else None

    async def work() -> None:
        async with connect(url) as ledger:
            if job:
                await _print_history(ledger, job, as_json=as_json)
            else:
                await _print_jobs(ledger, as_json=as_json)

    terminal.run(work())


async def _print_history(ledger: Ledger, job: JobName, *, as_json: bool) -> None:
    from ledger.service.render import table, time_text
    from ledger.service.runs import history

    runs = await history(ledger.server, job)
    if as_json:
        for run in runs:
            print_json(_run_json(run))
        return
    rows = [
        (time_text(run.begun_ms), run.status, _seconds(run), run.worker, _result_text(run))
        for run in runs
    ]
    print_lines(*table(("begun", "status", "took", "worker", "result"), rows))


async def _print_jobs(ledger: Ledger, *, as_json: bool) -> None:
    from ledger.service.render import table, time_text
    from ledger.service.runs import counts, is_gone, last_runs, running

    server = ledger.server
    last, now, counted = await last_runs(server), await running(server), await counts(server)
    rows = []
    for job, schedule in server.settings.govledger_jobs.items():
        runs = {status: n for (of, status), n in counted.items() if of == job}
        current = [run for run in now if run.job == job]
        ended = last.get(job)
        if as_json:
            print_json(
                {
                    "job": job,
                    "schedule": str(schedule),
                    "runs": runs,
                    "last": _run_json(ended) if ended else None,
                    "running": [_run_json(run) for run in current],
                }
            )
            continue
        seen = [*current, *([ended] if ended else ())]
        latest = max(seen, key=lambda run: run.begun_ms, default=None)
        killed = latest is not None and latest.status == "running" and is_gone(latest.worker)
        rows.append(
            (
                job,
                str(schedule),
                time_text(latest.begun_ms) if latest else None,
                "killed" if killed else latest.status if latest else None,
                _seconds(latest) if latest else None,
                sum(runs.values()),
                runs.get("failed", 0),
                _result_text(ended) if ended else None,
            )
        )
    if not as_json:
        header = ("job", "schedule", "begun (UTC)", "status", "took", "runs", "failed", "result")
        print_lines(*table(header, rows))


def _seconds(run: Run) -> str | None:
    return None if run.seconds is None else f"{run.seconds:.3f} s"


def _run_json(run: Run) -> dict[str, Any]:
    from ledger.service.render import time_text

    return {
        "job": run.job,
        "status": run.status,
        "begun_at": time_text(run.begun_ms),
        "seconds": run.seconds,
        "slot_at": None if run.slot_ms is None else time_text(run.slot_ms),
        "worker": run.worker,
        "result": run.result,
    }


def _result_text(run: Run) -> str:
    shown = {name: value for name, value in run.result.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


# -- top -----------------------------------------------------------------------------------------


@app.command(epilog=example("govledger top", "govledger top --once --json"))
def top(
    *,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once, over one interval, and end.")
    ] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 2.0,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most N tenants.")] = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Watch append rates, verdicts, lag and load, live.

    Without a terminal, or with --json, it prints once and ends.
    """

    async def work() -> None:
        from rich.console import Console

        from ledger.service import top as screen
        from ledger.service.observation import observe

        async with connect(url) as ledger:
            if sys.stdout.isatty() and not (once or as_json):
                await screen.live(ledger, interval_s, limit)
                return
            before = await observe(ledger)
            await asyncio.sleep(interval_s)
            shown = await screen.between(ledger, before, await observe(ledger), limit)
        if as_json:
            print_json(screen.as_json(shown))
        else:
            Console(soft_wrap=True).print(screen.render(shown))

    terminal.run(work())


# -- doctor and health ---------------------------------------------------------------------------


@app.command(epilog=example("govledger doctor", "govledger doctor --strict"))
def doctor(
    *,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 for warnings too, not only for danger.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Examine server and ledger, and say what to set.

    Each finding says what it means for this ledger. Exits with 1 where there is danger: decisions
    are or will be lost, or cannot be recorded. It changes nothing; it leaves what it read of the
    durability settings for clients that may not.
    """

    async def work() -> str:
        from ledger import Ledger
        from ledger.service.doctor import ANSWER_LIMIT_S, examine, report_json, report_lines, worst
        from ledger.service.doctor_access import unreachable
        from ledger.service.health import reach

        settings, address = _settings(url), _address(url)
        # Who looks does not wait for what is gone as long as who must record does.
        attempts = min(1, settings.memory_max_reconnect_attempts)
        once = settings.model_copy(update={"memory_max_reconnect_attempts": attempts})
        try:
            await reach(settings, ANSWER_LIMIT_S)
            async with Ledger.connect(settings=once) as ledger:
                results = await examine(ledger)
        except errors.Unavailable as error:
            results = [unreachable(error)]
        if as_json:
            print_json(terminal.cleaned(report_json(address, results)))
        else:
            lines = map(terminal.printable, report_lines(results))
            print_lines(*map(terminal.without_secrets, lines))
        return worst(results)

    _end_with(work(), lambda level: level == "danger" or (strict and level == "warning"))


@app.command(epilog=example("govledger health", "govledger health --timeout 1 --json"))
def health(
    *,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="How long it may take.")
    ] = 3.0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Probe whether decisions can be recorded now.

    Exits with 0 or 1, fast. It connects once and asks every primary; it writes nothing. For the
    reasons: govledger doctor.
    """

    async def work() -> str:
        from ledger.service.health import probe

        found = terminal.cleaned(await probe(_settings(url), timeout_s))
        if as_json:
            print_json(found)
        else:
            print_lines(f"{'ok' if found['healthy'] else 'unhealthy'}: {found['reason']}")
        return "" if found["healthy"] else "unhealthy"

    _end_with(work(), bool)


def _settings(url: str | None) -> Settings:
    from ledger import load_settings

    settings = load_settings(redis_url=url)
    terminal.hide_settings(settings)
    return settings


def _address(url: str | None) -> str:
    from ledger.connect import shown_address

    return shown_address(_settings(url).redis_url)


def _end_with(work: Coroutine[Any, Any, str], is_negative: Callable[[str], bool]) -> None:
    """Runs it, and exits with 1 where its answer is negative."""
    answers: list[str] = []

    async def answered() -> None:
        answers.append(await work)

    terminal.run(answered())
    if is_negative(answers[0]):
        raise typer.Exit(1)
