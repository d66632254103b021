"""The commands that derive and run: state, project, rebuild, reindex, dev."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from ledger.service import terminal
from ledger.service.command import (
    Json,
    ProjectionName,
    TenantName,
    Url,
    app,
    connect,
    example,
    print_json,
    print_lines,
)

__all__: list[str] = []


# -- state -------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger state acgs-dev",
        "govledger state acgs-dev --json --wait-for 3 --timeout 5",
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
            found = await reader.state(tenant, projection, at_least=wait_for, timeout_s=timeout_s)
            head = await ledger.head(tenant)
        if as_json:
            print_json(state_json(found, head))
        else:
            print_lines(*state_lines(found, head))

    terminal.run(work())


# -- project, rebuild, reindex -----------------------------------------------------------------


@app.command(epilog=example("govledger project --once", "govledger project"))
def project(
    *,
    once: Annotated[
        bool, typer.Option("--once", help="Fold what there is now, print how much, and end.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Fold what is recorded into each tenant's state, until stopped.

    SIGTERM and Ctrl-C end it. Any number may run; two on one tenant waste work and never count
    twice.
    """
    terminal.spare_gc()
    terminal.run(_project_once(url, as_json=as_json) if once else _project(url, as_json=as_json))


async def _project(url: str | None, *, as_json: bool) -> None:
    from ledger.service.operate import ends_on_sigterm, run_projector

    async with ends_on_sigterm(), connect(url) as ledger:
        address = ledger.server.address
        if as_json:
            print_json({"projecting": address})
            sys.stdout.flush()
        else:
            terminal.say(f"projecting {address}; Ctrl-C ends it")
        await run_projector(ledger)


async def _project_once(url: str | None, *, as_json: bool) -> None:
    from ledger.service.operate import prepare
    from ledger.service.render import table
    from projections import Projector

    async with connect(url) as ledger:
        await prepare(ledger)
        with terminal.progress("folding", None) as advance:
            folded = await Projector(ledger).run_once(on_progress=lambda _, count: advance(count))
    if as_json:
        for name, count in folded.items():
            print_json({"tenant": name, "folded": count})
    else:
        print_lines(*table(("tenant", "folded"), list(folded.items())))


@app.command(epilog=example("govledger rebuild acgs-dev"))
def rebuild(
    tenant: TenantName,
    *,
    projection: ProjectionName = "governance",
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Fold a tenant's state anew from its first entry.

    Readers see the old state until the new one is whole.
    """
    terminal.spare_gc()

    async def work() -> None:
        from projections import Projector

        async with connect(url) as ledger:
            head = await ledger.head(tenant)
            with terminal.progress("folding", head.seq) as advance:
                count = await Projector(ledger).rebuild(
                    tenant, projection, on_progress=lambda _, done: advance(done)
                )
        if as_json:
            print_json({"tenant": tenant, "projection": projection, "folded": count})
        else:
            print_lines(f"{tenant}: {projection} folded anew, {count} entries")

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
            print_lines(f"{tenant}: {count} entries indexed")

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
    as_json: Json = False,
) -> None:
    """Run a durable server of one's own, and a projector.

    Prints the REDIS_URL to use, and runs until SIGTERM or Ctrl-C. Where the directory's server runs
    already, for a command or another `dev`, it is shared; one that dies is started again. It ends
    half a minute after its last user. With GOVLEDGER_ANCHOR and a signing key it seals too.
    """
    from ledger.service.operate import default_data_dir

    terminal.spare_gc()
    terminal.run(_dev(data or default_data_dir(), port, as_json=as_json))


async def _dev(data_dir: Path, port: int | None, *, as_json: bool) -> None:
    from ledger.service.operate import DevServer, ends_on_sigterm, run_projector, run_sealer

    async with ends_on_sigterm(), DevServer.running(data_dir, port) as server:
        tcp_url = server.hold.tcp_url
        if as_json:
            told = {"url": server.url, "tcp_url": tcp_url, "data_dir": str(server.hold.data_dir)}
            print_json({**told, "pid": server.endpoint.pid, "attached": server.attached})
        else:
            how = "attached to the server that runs" if server.attached else "started a server"
            terminal.say(f"{how} on {server.hold.data_dir} (pid {server.endpoint.pid})")
            print_lines(f"REDIS_URL={server.url}", *([f"REDIS_URL={tcp_url}"] if tcp_url else []))
            terminal.say("what it acknowledges is on disk; a projector runs; Ctrl-C ends both")
        sys.stdout.flush()
        async with server.connect() as ledger:
            await asyncio.gather(run_projector(ledger), run_sealer(ledger), server.watch())
    terminal.say("ended; the server stays for half a minute, or as long as others use it")
