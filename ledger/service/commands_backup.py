"""The commands that carry a ledger elsewhere: backup, restore, export-ledger, import-ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from msgspec import to_builtins

from ledger import errors
from ledger.service import terminal
from ledger.service.command import (
    Json,
    TenantName,
    Url,
    app,
    connect,
    example,
    moment,
    print_json,
    print_lines,
    usage,
)
from ledger.wording import counted

if TYPE_CHECKING:
    from ledger import Ledger
    from ledger.service.restore import Target

__all__: list[str] = []


# -- everything --------------------------------------------------------------------------------


@app.command(epilog=example("govledger backup monday"))
def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    *,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not load it and compare; the manifest says so.")
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a verified backup in a new or empty directory.

    The server's snapshot where this machine can read it, else an export of each tenant. The copy is
    loaded into a scratch server, and each tenant's head, entries and state are compared with the
    live ones. Exits with 1 where a tenant is damaged and could not be copied or compared: the rest
    is backed up, and the manifest says what is not.
    """
    terminal.spare_gc()

    async def work() -> None:
        from ledger.service.backup import make_backup
        from ledger.service.files import disk_errors_named

        async with connect(url) as ledger:
            say = _quiet if as_json else terminal.say
            with disk_errors_named(directory):
                done = await make_backup(ledger, directory, verify=not no_verify, say=say)
        if as_json:
            print_json({"directory": str(directory), **to_builtins(done)})
        else:
            how = "verified" if done.verified else "NOT verified"
            of = counted(len(done.tenants), "tenant")
            print_lines(
                f"{directory}: a {done.kind} backup of {of}, {how}",
                *(f"  {one.tenant}: seq {one.seq}" for one in done.tenants),
            )
        for problem in done.problems:
            terminal.say(f"warning: {problem}")
        if done.problems:
            raise typer.Exit(terminal.EXIT_NEGATIVE)

    terminal.run(_to_its_end(work()))


@app.command(
    epilog=example(
        "govledger restore monday --into restored",
        "govledger restore monday --into noon --to 2026-03-03T12:00:00Z --dry-run",
        "govledger restore monday --into earlier --to-seq acgs-dev:41",
    )
)
def restore(
    source: Annotated[Path, typer.Argument(metavar="DIR|FILE", show_default=False)],
    *,
    into: Annotated[
        Path,
        typer.Option(
            metavar="DATA_DIR",
            show_default=False,
            help="A new or empty directory; then REDIS_URL=embedded:///DATA_DIR has it.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default=False,
            help="As it was at this time: all that was recorded by then, to the millisecond.",
        ),
    ] = None,
    to_seq: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENANT:N",
            show_default=False,
            help="This tenant as it was at seq N, the others whole; may be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a data directory from a backup, to a point in time.

    A dump.rdb or an exported ledger alone will do. It is proved right before it gets its name:
    checksums, heads, entries and state are compared with what the backup states. Every tenant has a
    new epoch, and its state is folded and published. A point in time and a logical backup bring the
    record back, and no other memory keys. Exits with 1 where a tenant was damaged already: it, or
    its state, cannot be restored.
    """
    terminal.spare_gc()
    target = _target(to, to_seq)

    async def work() -> None:
        from ledger.service.files import disk_errors_named
        from ledger.service.restore import make_plan
        from ledger.service.restore import restore as act

        plan = await asyncio.to_thread(make_plan, source, into, target)
        if dry_run:
            planned = [to_builtins(one.state) for one in plan.tenants]
            if as_json:
                print_json({"into": str(plan.into), "steps": plan.steps(), "tenants": planned})
            else:
                print_lines(*plan.steps())
            return
        with disk_errors_named(into):
            restored = await act(plan, _quiet if as_json else terminal.say)
        if as_json:
            print_json({"into": str(plan.into), "tenants": [asdict(one) for one in restored]})
        else:
            for one in restored:
                cut = f", {counted(one.left_out, 'later one')} left out" if one.left_out else ""
                print_lines(f"{one.tenant}: {counted(one.entries, 'entry')} to seq {one.seq}{cut}")
            print_lines(f"REDIS_URL=embedded://{quote(str(plan.into))}")
        if any(one.problem for one in restored):
            raise typer.Exit(terminal.EXIT_NEGATIVE)

    terminal.run(_to_its_end(work()))


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """SIGTERM ends it as Ctrl-C does, so that what was begun is removed, and is no success."""
    from ledger.service.operate import ends_on_sigterm

    async with ends_on_sigterm():
        await work
        return
    raise typer.Exit(terminal.EXIT_TERMINATED)


def _quiet(_line: str) -> None:
    """Under --json what is said stands in the result."""


def _target(to: str | None, to_seq: list[str] | None) -> Target:
    from ledger.service.restore import Target

    if to is not None and to_seq:
        raise usage("restore", "--to is for all tenants, --to-seq for one: give one of them")
    moment_to = moment(to, "--to", at_the_end_of_a_day=True)
    places = {}
    for one in to_seq or ():
        tenant, _, seq = one.rpartition(":")
        if not (seq.isascii() and seq.isdigit() and tenant):
            raise usage("restore", f"--to-seq: {one!r} is not TENANT:N")
        if tenant in places:
            raise usage("restore", f"--to-seq: {tenant} is named twice")
        places[tenant] = int(seq)
    return Target(None if moment_to is None else int(moment_to.timestamp() * 1000), places)


# -- one tenant --------------------------------------------------------------------------------


@app.command("export-ledger", epilog=example("govledger export-ledger acgs-dev acgs-dev.ledger"))
def export_ledger(
    tenant: TenantName,
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a tenant's record to a file, ids and bytes as stored.

    The file is there when it is whole and on disk, and nothing is overwritten. It has a checksum,
    can be read by every kind of server's `import-ledger`, and holds what was recorded up to the
    head of now; stop the engines first where the tenant is to move.
    """
    terminal.spare_gc()

    async def work() -> None:
        from ledger.service.exporting import export_tenant
        from ledger.service.files import create_file, disk_errors_named

        async with connect(url) as ledger:
            head = await ledger.head(tenant)
            with (
                terminal.progress("exporting", head.seq) as advance,
                disk_errors_named(file),
                create_file(file) as opened,
            ):
                done = await export_tenant(ledger.server, tenant, opened, advance)
        told = {"tenant": tenant, "file": str(file), "seq": done.head.seq}
        if as_json:
            print_json(
                {
                    **told,
                    "epoch": done.head.epoch,
                    "entry_id": done.head.entry_id,
                    "entries": done.head.length,
                    "sha256": done.sha256,
                    "records_sha256": done.records_sha256,
                }
            )
        else:
            length = counted(done.head.length, "entry")
            print_lines(f"{tenant}: {length} to seq {done.head.seq} in {file}")

    terminal.run(_to_its_end(work()))


@app.command("import-ledger", epilog=example("govledger import-ledger acgs-dev.ledger"))
def import_ledger(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Record what an exported file holds, in a new epoch.

    The server must not have the tenant. All of it is there at once, after its checksum was found
    right; then the state is folded. An event that is appended again has its receipt as before: a
    duplicate. Exits with 1 where the record has a hole: it is imported as it is, and its state is
    not folded.
    """
    terminal.spare_gc()

    async def work() -> None:
        from ledger.service.importing import import_tenant

        async with connect(url) as ledger:
            with file.open("rb") as opened, terminal.progress("importing", None) as advance:
                done = await import_tenant(ledger.server, opened, file, on_progress=advance)
            folded = await _folded(ledger, done.tenant)
        if as_json:
            told = {name: value for name, value in asdict(done).items() if name != "left_out"}
            print_json({**told, "folded": folded})
        else:
            foreign = done.entries - done.own
            aside = f", {foreign} of them foreign" if foreign else ""
            print_lines(f"{done.tenant}: {counted(done.entries, 'entry')} to seq {done.seq}{aside}")
        if folded is None:
            raise typer.Exit(terminal.EXIT_NEGATIVE)

    terminal.run(_to_its_end(work()))


async def _folded(ledger: Ledger, tenant: str) -> int | None:
    """Entries folded; None, and a warning, where the record cannot be: it is imported as it was."""
    from projections import Projector

    if not (await ledger.head(tenant)).seq:
        return 0
    try:
        return await Projector(ledger).rebuild(tenant)
    except errors.EntriesMissing as error:
        terminal.say(f"warning: the record is as it was, and its state is not folded: {error}")
        return None
