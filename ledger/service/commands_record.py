"""The commands that write and read the record: append, replay, follow, show, tenants."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager, aclosing, closing, nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ledger import errors
from ledger.service import terminal
from ledger.service.command import (
    After,
    Json,
    Limit,
    TenantName,
    Types,
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
    from collections.abc import AsyncGenerator

    from ledger import Entry, Head, Ledger
    from ledger.service.appending import Landed
    from ledger.service.jsonl import Source

__all__: list[str] = []


class _Level(StrEnum):
    MEMORY = "memory"
    FSYNCED = "fsynced"
    REPLICATED = "replicated"


# -- append ------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger append acgs-dev events.jsonl",
        "govledger append --tenant-from-event - --json < events.jsonl",
        "govledger append acgs-dev events.jsonl --keep-going --rejects rejects.jsonl",
    )
)
def append(
    first: Annotated[
        str | None, typer.Argument(metavar="TENANT", show_default=False, help="Whose events.")
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(metavar="FILE", show_default=False, help="Default: -, standard input."),
    ] = None,
    *,
    tenant_from_event: Annotated[
        bool,
        typer.Option(
            "--tenant-from-event", help="Instead of TENANT: each line's `tenant` says whose it is."
        ),
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="Record the good lines and reject the others, conflicts too, instead of checking "
            "all lines first. Exits with 2 if a line was rejected.",
        ),
    ] = False,
    rejects: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="With --keep-going: write rejected lines here, as JSON Lines of line, error, "
            "hint, input.",
        ),
    ] = None,
    durability: Annotated[
        _Level | None,
        typer.Option(
            show_default=False,
            help="What each event must reach. Default: what the server gives, which is printed.",
        ),
    ] = None,
    expected_seq: Annotated[
        int | None,
        typer.Option(
            metavar="SEQ",
            min=0,
            show_default=False,
            help="Only if the tenant's head is this seq (0: nothing recorded yet). All events, at "
            "most 1000, then go into one batch, all or none.",
        ),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Record events from JSON Lines, one event a line.

    Each has a `type` and an `id`. Every line is checked before anything is written; a conflict with
    what is recorded is found later and stops there, saying what had landed. So the input is read
    twice: standard input is copied to memory, and beyond 8 MiB to an unnamed temporary file.
    Running the same file again adds nothing: what is recorded already is counted as a duplicate.

    A line may have a `tenant`; it must then be TENANT. Prints for each tenant the count of events,
    the duplicates among them, the first and last seq, and the least durability reached.
    """
    from ledger import keys
    from ledger.service.jsonl import Source

    tenant, file = (None, first) if tenant_from_event else (first, second)
    if tenant_from_event and second is not None:
        raise usage("append", "--tenant-from-event stands instead of TENANT: give FILE alone")
    if not tenant_from_event and tenant is None:
        raise usage("append", "TENANT is missing; or use --tenant-from-event")
    if rejects and not keep_going:
        raise usage("append", "--rejects is for --keep-going, which rejects lines")
    if expected_seq is not None and (keep_going or tenant_from_event):
        raise usage("append", "--expected-seq is for one batch of one TENANT, all or none")
    if tenant is not None:
        keys.checked_tenant(tenant)
    terminal.spare_gc()
    with closing(Source(file or "-")) as source:
        if rejects and source.is_same_file(rejects):
            raise usage("append", "--rejects is the input itself, which it would overwrite")
        ledger = connect(url, durability)
        if keep_going:
            terminal.run(_append_good_lines(ledger, source, tenant, rejects, as_json=as_json))
        else:
            terminal.run(_append_checked(ledger, source, tenant, expected_seq, as_json=as_json))


async def _append_checked(
    connecting: AbstractAsyncContextManager[Ledger],
    source: Source,
    tenant: str | None,
    expected_seq: int | None,
    *,
    as_json: bool,
) -> None:
    from ledger.service.appending import append_checked

    async with connecting as ledger:
        landed = await append_checked(ledger, source, tenant, expected_seq=expected_seq)
    _print_landed(landed, tenant, None, as_json=as_json)


async def _append_good_lines(
    connecting: AbstractAsyncContextManager[Ledger],
    source: Source,
    tenant: str | None,
    rejects: Path | None,
    *,
    as_json: bool,
) -> None:
    from ledger.service.appending import Rejects, append_good_lines

    async with connecting as ledger:
        with rejects.open("wb") if rejects else nullcontext() as to:
            rejected = Rejects(source, to)
            landed = await append_good_lines(ledger, source, tenant, rejected)
    _print_landed(landed, tenant, rejected.count, as_json=as_json)
    if rejected.count:
        sys.stdout.flush()
        where = f"{rejects} has them all" if rejects else "--rejects FILE writes them down"
        raise rejected.as_error(
            "the other lines are recorded", f"{where}; corrected ones can be appended by themselves"
        )


def _print_landed(
    landed: dict[str, Landed], tenant: str | None, rejected: int | None, *, as_json: bool
) -> None:
    from ledger.service.appending import Landed

    none = [Landed(tenant)] if tenant and not landed else []
    for one in [*landed.values(), *none]:
        if as_json:
            print_json(asdict(one) | ({} if rejected is None else {"rejected": rejected}))
        elif one.count:
            told = f"{counted(one.count, 'event')} ({counted(one.duplicates, 'duplicate')})"
            print_lines(
                f"{one.tenant}: {told}, seq {one.first_seq} to {one.last_seq}, {one.durability}"
            )
        else:
            print_lines(f"{one.tenant}: no events")


# -- replay, follow, show ----------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger replay acgs-dev --since 2026-03-01 --type decision.recorded",
        "govledger replay acgs-dev --after 100 --until 200 --json > part.jsonl",
    )
)
def replay(
    tenant: TenantName,
    *,
    after: After = None,
    until: Annotated[
        int | None, typer.Option(metavar="SEQ", min=1, show_default=False, help="The last seq.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default=False,
            help="Recorded at this time or later: 2026-03-03T12:00:00Z, or a date. UTC where it "
            "has no zone.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            show_default=False,
            help="Recorded at this time or before; of a date, the whole day.",
        ),
    ] = None,
    types: Types = None,
    limit: Limit = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print what was recorded, in order, up to the head of now.

    With --json each line has `tenant`, `seq`, `entry_id`, `recorded_at`, `type`, `id`, and `event`,
    which is the stored JSON byte for byte.
    """
    start = moment(since, "--since", at_the_end_of_a_day=False)
    end = moment(to, "--to", at_the_end_of_a_day=True)
    terminal.spare_gc()

    async def work() -> None:
        async with connect(url) as ledger:
            entries = ledger.replay(tenant, after=after or 0, until=until, since=start, to=end)
            await _print_entries(entries, types, limit, as_json=as_json)

    terminal.run(work())


@app.command(
    epilog=example(
        "govledger follow acgs-dev --after 0 --limit 10",
        "govledger follow acgs-dev --type decision.recorded --json --limit 1 --after 0",
    )
)
def follow(
    tenant: TenantName,
    *,
    after: After = None,
    types: Types = None,
    limit: Limit = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print what is recorded as it comes, until Ctrl-C.

    It begins at the head of now, or behind --after. The output is as that of `replay`, each line
    written out at once.
    """
    terminal.spare_gc()

    async def work() -> None:
        async with connect(url) as ledger:
            if not (await ledger.head(tenant)).seq:  # it may come, or the name is misspelt
                terminal.say(f"warning: {errors.NotFound.nothing_of(tenant)}; waiting for it")
            entries = ledger.follow(tenant, after=after)
            await _print_entries(entries, types, limit, as_json=as_json, at_once=True)

    terminal.run(work())


async def _print_entries(
    entries: AsyncGenerator[Entry, None],
    types: list[str] | None,
    limit: int | None,
    *,
    as_json: bool,
    at_once: bool = False,
) -> None:
    from ledger.service.render import entry_json, entry_text

    _warn_of_unknown(types)
    write, shown = sys.stdout.buffer.write, 0
    async with aclosing(entries):
        async for entry in entries:
            if types and entry.type not in types:
                continue
            line = entry_json(entry) if as_json else entry_text(entry).encode(errors="replace")
            write(line + b"\n")
            shown += 1
            if at_once:
                sys.stdout.flush()
            if shown == limit:
                return


def _warn_of_unknown(types: list[str] | None) -> None:
    from ledger.events import event_types

    known = event_types()
    for name in types or ():
        if name not in known:  # a newer release may have recorded it
            terminal.say(f"warning: --type {name} is none of {', '.join(known)}")


@app.command(
    epilog=example("govledger show acgs-dev dec-0001", "govledger show acgs-dev --seq 1 --json")
)
def show(
    tenant: TenantName,
    event_id: Annotated[str | None, typer.Argument(metavar="ID", show_default=False)] = None,
    *,
    seq: Annotated[
        int | None, typer.Option(metavar="SEQ", min=1, show_default=False, help="Instead of ID.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print one entry, by its event's id or by its seq."""
    if (event_id is None) == (seq is None):
        raise usage("show", "give either ID or --seq")

    async def work() -> None:
        from ledger.service.render import entry_json, entry_lines

        async with connect(url) as ledger:
            await known(ledger, tenant)
            if event_id is not None:
                entry = await ledger.get(tenant, event_id)
            elif seq is not None:
                entry = await ledger.get_seq(tenant, seq)
        if as_json:
            sys.stdout.buffer.write(entry_json(entry) + b"\n")
        else:
            print_lines(*entry_lines(entry))

    terminal.run(work())


# -- tenants -----------------------------------------------------------------------------------


@app.command(epilog=example("govledger tenants --json"))
def tenants(*, url: Url = None, as_json: Json = False) -> None:
    """List the tenants: name, last seq, and when it was recorded."""

    async def work() -> None:
        from ledger.service.render import table, time_text

        async with connect(url) as ledger:
            heads = await _heads(ledger)
        rows = []
        for name, head in heads:
            seq = head.seq if head else None
            last = time_text(int(head.entry_id.partition("-")[0])) if head and head.seq else None
            rows.append((name, seq, last))
            if as_json:
                print_json({"tenant": name, "seq": seq, "last_recorded_at": last})
        if not as_json:
            print_lines(*table(("tenant", "seq", "last recorded"), rows))

    terminal.run(work())


async def _heads(ledger: Ledger) -> list[tuple[str, Head | None]]:
    """Every tenant's head; None, and a warning, where the ledger's record of it is gone."""
    slots = asyncio.Semaphore(16)

    async def one(name: str) -> tuple[str, Head | None]:
        async with slots:
            try:
                return name, await ledger.head(name)
            except (errors.IndexBehind, errors.ServerError) as error:
                terminal.say(f"warning: {error}")
                return name, None

    return await asyncio.gather(*(one(name) for name in await ledger.tenants()))
