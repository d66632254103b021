"""The commands that derive and run: state, project, rebuild, reindex, projections, dev."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ledger import errors
from ledger.service import terminal
from ledger.service.command import (
    Json,
    MetricsHost,
    MetricsPort,
    ProjectionName,
    TenantName,
    Url,
    app,
    connect,
    example,
    known,
    moment,
    print_json,
    print_lines,
    usage,
)
from ledger.wording import counted

if TYPE_CHECKING:
    from datetime import datetime

    from ledger import Head
    from projections import Projector

__all__: list[str] = []

_log = logging.getLogger("ledger")


# -- state -------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger state acgs-dev",
        "govledger state acgs-dev --json --wait-for 3 --timeout 5",
        "govledger state acgs-dev --as-of 250",
    )
)
def state(
    tenant: TenantName,
    *,
    projection: ProjectionName = "governance",
    wait_for: Annotated[
        int | None,
        typer.Option(
            metavar="SEQ", min=1, show_default=False, help="Wait until it has folded this seq."
        ),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="How long to wait for it.")
    ] = 10.0,
    as_of: Annotated[
        str | None,
        typer.Option(
            metavar="SEQ|TIME",
            show_default=False,
            help="What it was when this seq was the head, or at this time; a date means its end.",
        ),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print a tenant's current state, and how far it is folded.

    It is what a projector (`govledger project`, `govledger dev`) has made of the entries. Exits
    with 1 where nothing is folded, or not as far as --wait-for in time.
    """

    async def work() -> None:
        from ledger.service.state import state_json, state_lines
        from projections import StateReader

        async with connect(url) as ledger:
            reader = StateReader(ledger)
            found = await reader.state(
                tenant,
                projection,
                at_least=wait_for,
                as_of=_point(as_of),
                timeout_s=timeout_s,
            )
            head = await ledger.head(tenant)
        if as_json:
            print_json(state_json(found, head))
        else:
            print_lines(*state_lines(found, head))

    terminal.run(work())


def _point(as_of: str | None) -> int | datetime | None:
    if as_of is not None and as_of.isascii() and as_of.isdigit():
        return int(as_of)
    return moment(as_of, "--as-of", at_the_end_of_a_day=True)


# -- project, rebuild, reindex -----------------------------------------------------------------


@app.command(
    epilog=example("govledger project --once", "govledger project", "govledger project --workers 4")
)
def project(
    *,
    once: Annotated[
        bool, typer.Option("--once", help="Fold what there is now, print how much, and end.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            help="How many processes; they share all tenants. One that dies is started again.",
        ),
    ] = 1,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Fold what is recorded into each tenant's state, until stopped.

    SIGTERM and Ctrl-C end it. Any number may run, on any number of machines: each tenant is folded
    by one of them at a time, and a dead one's tenants are taken over within 10 seconds.
    """
    if once and workers > 1:
        raise usage("project", "--once folds in this process: leave --workers out")
    terminal.spare_gc()
    if once:
        terminal.run(_project_once(url, as_json=as_json))
    else:
        options = _Projecting(workers, until_eof, metrics_host, metrics_port)
        terminal.run(_project(url, options, as_json=as_json))


class _Projecting(NamedTuple):
    workers: int
    until_eof: bool
    metrics_host: str
    metrics_port: int | None


async def _project(url: str | None, options: _Projecting, *, as_json: bool) -> None:
    from ledger.service.operate import (
        ends_on_eof,
        ends_on_sigterm,
        prepare,
        run_projector,
        with_metrics,
    )
    from ledger.service.workers import run_workers

    terminal.show_logs()
    ends = ends_on_eof if options.until_eof else nullcontext
    async with (
        ends_on_sigterm(),
        ends(),
        connect(url) as ledger,
        with_metrics(ledger, options.metrics_host, options.metrics_port),
    ):
        address = ledger.server.address
        await prepare(ledger)
        if as_json:
            print_json({"projecting": address, "workers": options.workers})
            sys.stdout.flush()
        elif not options.until_eof:
            _log.info("projecting %s; Ctrl-C ends it", address)
        if options.workers > 1:
            await run_workers(ledger.server.settings, options.workers)
        else:
            await run_projector(ledger)


async def _project_once(url: str | None, *, as_json: bool) -> None:
    from ledger.service.operate import prepare
    from projections import Projector

    async with connect(url) as ledger:
        await prepare(ledger)
        projector = Projector(ledger)
        try:
            with terminal.progress("folding", None) as advance:
                folded = await projector.run_once(on_progress=lambda _, count: advance(count))
        except errors.LedgerError as error:
            if isinstance(done := error.facts.pop("folded", None), dict):
                _print_folded(done, as_json=as_json)
            raise
    _print_folded(folded, as_json=as_json)


def _print_folded(folded: dict[str, int], *, as_json: bool) -> None:
    from ledger.service.render import table

    if as_json:
        for name, count in folded.items():
            print_json({"tenant": name, "folded": count})
    else:
        print_lines(*table(("tenant", "folded"), list(folded.items())))


@app.command(epilog=example("govledger rebuild acgs-dev"))
def rebuild(
    tenant: TenantName,
    *,
    projection: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Only this. Default: all."),
    ] = None,
    accept_rollback: Annotated[
        bool,
        typer.Option(
            "--accept-rollback",
            help="The ledger went back (a failover, a restored file) and that is known: take it as "
            "it is now. A new epoch begins, so that nothing of the old one is taken for its "
            "continuation.",
        ),
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Fold a tenant's state anew from its first entry.

    Readers see the old state until the new one is whole. What could not be folded is tried again.
    """
    terminal.spare_gc()

    async def work() -> None:
        from projections import Projector

        async with connect(url) as ledger:
            projector = Projector(ledger)
            names = [projection] if projection else [one.name for one in projector.projections]
            head = await ledger.head(await known(ledger, tenant))
            for name in names:
                count = await _rebuild_one(projector, head, name, accept_rollback=accept_rollback)
                if as_json:
                    print_json({"tenant": tenant, "projection": name, "folded": count})
                else:
                    print_lines(f"{tenant}: {name} folded anew, {counted(count, 'entry')}")

    terminal.run(work())


@app.command(epilog=example("govledger reindex acgs-dev"))
def reindex(tenant: TenantName, *, url: Url = None, as_json: Json = False) -> None:
    """Rebuild the index that keeps duplicates out.

    Where it was deleted or cut, append refuses until this has run.
    """
    terminal.spare_gc()

    async def work() -> None:
        async with connect(url) as ledger:
            with terminal.progress("indexing", None) as advance:
                count = await ledger.reindex(tenant, advance)
        if as_json:
            print_json({"tenant": tenant, "indexed": count})
        else:
            print_lines(f"{tenant}: {counted(count, 'entry')} indexed")

    terminal.run(work())


async def _rebuild_one(
    projector: Projector, head: Head, name: str, *, accept_rollback: bool
) -> int:
    with terminal.progress(f"folding {name}", head.seq) as advance:
        return await projector.rebuild(
            head.tenant,
            name,
            accept_rollback=accept_rollback,
            on_progress=lambda _, done: advance(done),
        )


# -- projections -------------------------------------------------------------------------------


@app.command(epilog=example("govledger projections", "govledger projections acgs-dev --json"))
def projections(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", show_default=False)] = None,
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List each tenant's projections: version, position, lag, worker, quarantine.

    The lag in seconds is how long ago the first entry was recorded that is not folded. A worker is
    shown while it folds and for 5 seconds after.
    """

    async def work() -> None:
        from ledger.service.render import table
        from ledger.service.state import STATUS_HEADER, status_json, status_row
        from projections.registry import configured
        from projections.status import statuses

        async with connect(url) as ledger:
            names = [await known(ledger, tenant)] if tenant else await ledger.tenants()
            every = configured(ledger.server.settings)
            found = [one async for one in statuses(ledger, names, every)]
        if as_json:
            for one in found:
                print_json(status_json(one))
        else:
            print_lines(*table(STATUS_HEADER, [status_row(one) for one in found]))

    terminal.run(work())


@app.command(
    epilog=example("govledger quarantine acgs-dev", "govledger quarantine acgs-dev --accept 17")
)
def quarantine(
    tenant: TenantName,
    *,
    projection: ProjectionName = "governance",
    accept: Annotated[
        list[int] | None,
        typer.Option(
            metavar="SEQ",
            show_default=False,
            help="Take this one off the list; may be repeated. No count changes by that.",
        ),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List the entries that a projection could not fold, and why.

    They are in the record, and counted in the state as quarantined. `govledger rebuild` tries them
    again, with a release that can read them.
    """

    async def work() -> None:
        from ledger.service.render import table
        from projections import Projector

        async with connect(url) as ledger:
            store = Projector(ledger).store(await known(ledger, tenant), projection)
            if accept:
                accepted = await store.accept_quarantined(accept)
                if accepted < len(set(accept)):
                    absent = len(set(accept)) - accepted
                    terminal.say(f"warning: not in quarantine: {absent} of {len(set(accept))}")
            found = await store.quarantined()
        if as_json:
            for seq, reason in found.items():
                print_json({"tenant": tenant, "seq": seq, "reason": reason})
        else:
            print_lines(*table(("seq", "reason"), list(found.items())))

    terminal.run(work())


@app.command(epilog=example("govledger activate acgs-dev governance 1"))
def activate(
    tenant: TenantName,
    projection: Annotated[str, typer.Argument(metavar="PROJECTION", show_default=False)],
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, show_default=False)],
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make readers take a version of a projection.

    A newer version takes over by itself when it has caught up; going back takes this command, and
    keeps the newer one out until this command names it. A projector of a release that folds the
    version must run.
    """

    async def work() -> None:
        from projections import Projector

        async with connect(url) as ledger:
            store = Projector(ledger).store(await known(ledger, tenant), projection)
            await store.pin(version)
        if as_json:
            print_json({"tenant": tenant, "projection": projection, "version": version})
        else:
            print_lines(f"{tenant}: readers take {projection}@{version}")

    terminal.run(work())


# -- dev ---------------------------------------------------------------------------------------


@app.command(epilog=example("govledger dev", "govledger dev --data ./ledger-data --port 6390"))
def dev(
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="The data directory. Default: $XDG_DATA_HOME/govledger, else "
            "~/.local/share/govledger.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=65535,
            show_default=False,
            help="Listen on this port of 127.0.0.1 too, without a password: every account of this "
            "machine can then connect.",
        ),
    ] = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
    as_json: Json = False,
) -> None:
    """Run a server of one's own, a projector, and the jobs.

    Prints the REDIS_URL to use, and runs until SIGTERM or Ctrl-C. Where the directory's server runs
    already, for a command or another `dev`, it is shared; one that dies is started again. It ends
    half a minute after its last user. With GOVLEDGER_ANCHOR and a signing key it seals too.
    """
    from ledger.service.operate import default_data_dir

    terminal.spare_gc()
    metrics = (metrics_host, metrics_port)
    terminal.run(_dev(data or default_data_dir(), port, metrics, as_json=as_json))


async def _dev(
    data_dir: Path, port: int | None, metrics: tuple[str, int | None], *, as_json: bool
) -> None:
    from ledger.service.jobs import JobContext
    from ledger.service.operate import (
        DevServer,
        ends_on_sigterm,
        run_projector,
        run_sealer,
        together,
        with_metrics,
    )
    from ledger.service.scheduler import Scheduler

    terminal.show_logs()
    async with ends_on_sigterm(), DevServer.running(data_dir, port) as server:
        tcp_url = server.hold.tcp_url
        if as_json:
            told = {"url": server.url, "tcp_url": tcp_url, "data_dir": str(server.hold.data_dir)}
            print_json({**told, "pid": server.endpoint.pid, "attached": server.attached})
        else:
            how = "attached to the server that runs" if server.attached else "started a server"
            _log.info("%s on %s (pid %d)", how, server.hold.data_dir, server.endpoint.pid)
            print_lines(f"REDIS_URL={server.url}", *([f"REDIS_URL={tcp_url}"] if tcp_url else []))
            _log.info("what it acknowledges is on disk; projector and jobs run; Ctrl-C ends them")
        sys.stdout.flush()
        async with server.connect() as ledger, with_metrics(ledger, *metrics):
            scheduler = Scheduler(JobContext(ledger), ledger.server.settings.govledger_jobs)
            await together(
                run_projector(ledger), run_sealer(ledger), scheduler.run(), server.watch()
            )
    _log.info("ended; the server stays for half a minute, or as long as others use it")
