"""The command `govledger`: options, exit codes, and what is printed; the work is done elsewhere."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager, aclosing, closing, nullcontext
from dataclasses import asdict
from datetime import UTC, date, datetime, time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import orjson
import typer

from ledger import __version__, errors
from ledger.service import terminal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ledger import Entry, Head, Ledger
    from ledger.service.appending import Landed
    from ledger.service.jsonl import Source

__all__ = ["app", "main"]

_EXIT_CODES: Final = """\b
Exit codes:
  0    done
  1    a negative answer: not found, entries missing, not folded that far
  2    bad usage or bad input, such as lines that cannot be recorded
  3    the server cannot be used now: unreachable, password, TLS, rights,
       loading, out of memory, read-only
  4    refused: conflicting id, wrong expected seq, clock, unsafe server,
       durability not reached, ledger rolled back
  130  Ctrl-C      141  whoever read the output has gone"""

# typer brings its own copy of click, under a name that has moved between its releases.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Record governance decisions in Redis or Valkey, replay them, read what they add up to.",
    epilog=_EXIT_CODES,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Runs the command line that sys.argv has, and ends the process."""
    terminal.show_warnings()
    as_json = "--json" in sys.argv
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="govledger", standalone_mode=False)
    except errors.LedgerError as error:
        terminal.print_error(error, as_json=as_json)
        code = terminal.exit_code(error)
    except _UsageError as error:
        help_of = error.ctx.command_path if error.ctx else "govledger"
        message = error.format_message().replace("Value error, ", "")
        usage = errors.InvalidInput(message, hint=f"{help_of} --help")
        terminal.print_error(usage, as_json=as_json)
        code = error.exit_code
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        told = errors.InvalidInput(f"{named}{error.strerror or error}")
        terminal.print_error(told, as_json=as_json)
        code = terminal.EXIT_BAD_INPUT
    sys.exit(code or 0)


# -- options -----------------------------------------------------------------------------------

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        show_default=False,
        help="Where the ledger is: redis://, rediss://, unix://, embedded:///data/dir, "
        "redis+sentinel://. Default: REDIS_URL, else redis://localhost:6379. A password is better "
        "kept in REDIS_PASSWORD: command lines can be seen by others.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, and errors as JSON on stderr.")]
TenantName = Annotated[str, typer.Argument(metavar="TENANT", show_default=False)]
After = Annotated[
    int | None,
    typer.Option(metavar="SEQ", min=0, show_default=False, help="Begin behind this seq."),
]
Types = Annotated[
    list[str] | None,
    typer.Option("--type", metavar="TYPE", show_default=False, help="Only this; may be repeated."),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, show_default=False, help="End after this many entries."),
]
ProjectionName = Annotated[str, typer.Option(metavar="NAME", help="Which projection.")]


class _Level(StrEnum):
    MEMORY = "memory"
    FSYNCED = "fsynced"
    REPLICATED = "replicated"


def _example(*lines: str) -> str:
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def _connect(url: str | None, durability: str | None = None) -> AbstractAsyncContextManager[Ledger]:
    from ledger import Ledger, load_settings

    settings = load_settings(redis_url=url)
    password = settings.redis_password
    terminal.hide_secrets(settings.redis_url, password.get_secret_value() if password else None)
    return Ledger.connect(settings=settings, durability=durability)


def _usage(command: str, message: str) -> errors.InvalidInput:
    return errors.InvalidInput(message, hint=f"govledger {command} --help")


def _moment(text: str | None, option: str, *, at_the_end_of_a_day: bool) -> datetime | None:
    """A time as RFC 3339, or a date; UTC where no zone is given."""
    if text is None:
        return None
    try:
        day = date.fromisoformat(text)
        moment = datetime.combine(day, time.max if at_the_end_of_a_day else time.min)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise errors.InvalidInput(
                f"{option}: {text!r} is no time", hint="write 2026-03-03T12:00:00Z or 2026-03-03"
            ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(value) + b"\n")


def _print(*lines: str) -> None:
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback
    if wanted:
        _print(f"govledger {__version__}")
        sys.stdout.flush()
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    del version  # its callback has ended the program


# -- append ------------------------------------------------------------------------------------


@app.command(
    epilog=_example(
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
        raise _usage("append", "--tenant-from-event stands instead of TENANT: give FILE alone")
    if not tenant_from_event and tenant is None:
        raise _usage("append", "TENANT is missing; or use --tenant-from-event")
    if rejects and not keep_going:
        raise _usage("append", "--rejects is for --keep-going, which rejects lines")
    if expected_seq is not None and (keep_going or tenant_from_event):
        raise _usage("append", "--expected-seq is for one batch of one TENANT, all or none")
    if tenant is not None:
        keys.checked_tenant(tenant)
    terminal.spare_gc()
    with closing(Source(file or "-")) as source:
        if rejects and source.is_same_file(rejects):
            raise _usage("append", "--rejects is the input itself, which it would overwrite")
        ledger = _connect(url, durability)
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
            _print_json(asdict(one) | ({} if rejected is None else {"rejected": rejected}))
        elif one.count:
            _print(
                f"{one.tenant}: {one.count} events, {one.duplicates} of them duplicates, "
                f"seq {one.first_seq} to {one.last_seq}, {one.durability}"
            )
        else:
            _print(f"{one.tenant}: no events")


# -- replay, follow, show ----------------------------------------------------------------------


@app.command(
    epilog=_example(
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
    start = _moment(since, "--since", at_the_end_of_a_day=False)
    end = _moment(to, "--to", at_the_end_of_a_day=True)
    terminal.spare_gc()

    async def work() -> None:
        async with _connect(url) as ledger:
            entries = ledger.replay(tenant, after=after or 0, until=until, since=start, to=end)
            await _print_entries(entries, types, limit, as_json=as_json)

    terminal.run(work())


@app.command(
    epilog=_example(
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
        async with _connect(url) as ledger:
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
    epilog=_example("govledger show acgs-dev dec-0001", "govledger show acgs-dev --seq 1 --json")
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
        raise _usage("show", "give either ID or --seq")

    async def work() -> None:
        from ledger.service.render import entry_json, entry_lines

        async with _connect(url) as ledger:
            if event_id is not None:
                entry = await ledger.get(tenant, event_id)
            elif seq is not None:
                entry = await ledger.get_seq(tenant, seq)
        if as_json:
            sys.stdout.buffer.write(entry_json(entry) + b"\n")
        else:
            _print(*entry_lines(entry))

    terminal.run(work())


# -- tenants, state ----------------------------------------------------------------------------


@app.command(epilog=_example("govledger tenants --json"))
def tenants(*, url: Url = None, as_json: Json = False) -> None:
    """List the tenants: name, last seq, and when it was recorded."""

    async def work() -> None:
        from ledger.service.render import table, time_text

        async with _connect(url) as ledger:
            heads = await _heads(ledger)
        rows = []
        for name, head in heads:
            seq = head.seq if head else None
            last = time_text(int(head.entry_id.partition("-")[0])) if head and head.seq else None
            rows.append((name, seq, last))
            if as_json:
                _print_json({"tenant": name, "seq": seq, "last_recorded_at": last})
        if not as_json:
            _print(*table(("tenant", "seq", "last recorded"), rows))

    terminal.run(work())


async def _heads(ledger: Ledger) -> list[tuple[str, Head | None]]:
    """Every tenant's head; None, and a warning, where the ledger's record of it is gone."""
    slots = asyncio.Semaphore(16)

    async def one(name: str) -> tuple[str, Head | None]:
        async with slots:
            try:
                return name, await ledger.head(name)
            except errors.IndexBehind as error:
                terminal.say(f"warning: {error}")
                return name, None

    return await asyncio.gather(*(one(name) for name in await ledger.tenants()))


@app.command(
    epilog=_example(
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

        async with _connect(url) as ledger:
            reader = StateReader(ledger)
            found = await reader.state(tenant, projection, at_least=wait_for, timeout_s=timeout_s)
            head = await ledger.head(tenant)
        if as_json:
            _print_json(state_json(found, head))
        else:
            _print(*state_lines(found, head))

    terminal.run(work())


# -- project, rebuild, reindex -----------------------------------------------------------------


@app.command(epilog=_example("govledger project --once", "govledger project"))
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

    async with ends_on_sigterm(), _connect(url) as ledger:
        address = ledger.server.address
        if as_json:
            _print_json({"projecting": address})
            sys.stdout.flush()
        else:
            terminal.say(f"projecting {address}; Ctrl-C ends it")
        await run_projector(ledger)


async def _project_once(url: str | None, *, as_json: bool) -> None:
    from ledger.service.operate import prepare
    from ledger.service.render import table
    from projections import Projector

    async with _connect(url) as ledger:
        await prepare(ledger)
        with terminal.progress("folding", None) as advance:
            folded = await Projector(ledger).run_once(on_progress=lambda _, count: advance(count))
    if as_json:
        for name, count in folded.items():
            _print_json({"tenant": name, "folded": count})
    else:
        _print(*table(("tenant", "folded"), list(folded.items())))


@app.command(epilog=_example("govledger rebuild acgs-dev"))
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

        async with _connect(url) as ledger:
            head = await ledger.head(tenant)
            with terminal.progress("folding", head.seq) as advance:
                count = await Projector(ledger).rebuild(
                    tenant, projection, on_progress=lambda _, done: advance(done)
                )
        if as_json:
            _print_json({"tenant": tenant, "projection": projection, "folded": count})
        else:
            _print(f"{tenant}: {projection} folded anew, {count} entries")

    terminal.run(work())


@app.command(epilog=_example("govledger reindex acgs-dev"))
def reindex(tenant: TenantName, *, url: Url = None, as_json: Json = False) -> None:
    """Rebuild the index that keeps duplicates out.

    Where it was deleted or cut, append refuses until this has run.
    """
    terminal.spare_gc()

    async def work() -> None:
        async with _connect(url) as ledger:
            with terminal.progress("indexing", None) as advance:
                count = await ledger.reindex(tenant, advance)
        if as_json:
            _print_json({"tenant": tenant, "indexed": count})
        else:
            _print(f"{tenant}: {count} entries indexed")

    terminal.run(work())


# -- dev ---------------------------------------------------------------------------------------


@app.command(epilog=_example("govledger dev", "govledger dev --data ./ledger-data --port 6390"))
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
    half a minute after its last user.
    """
    from ledger.service.operate import default_data_dir

    terminal.spare_gc()
    terminal.run(_dev(data or default_data_dir(), port, as_json=as_json))


async def _dev(data_dir: Path, port: int | None, *, as_json: bool) -> None:
    from ledger.service.operate import DevServer, ends_on_sigterm, run_projector

    async with ends_on_sigterm(), DevServer.running(data_dir, port) as server:
        tcp_url = server.hold.tcp_url
        if as_json:
            told = {"url": server.url, "tcp_url": tcp_url, "data_dir": str(server.hold.data_dir)}
            _print_json({**told, "pid": server.endpoint.pid, "attached": server.attached})
        else:
            how = "attached to the server that runs" if server.attached else "started a server"
            terminal.say(f"{how} on {server.hold.data_dir} (pid {server.endpoint.pid})")
            _print(f"REDIS_URL={server.url}", *([f"REDIS_URL={tcp_url}"] if tcp_url else []))
            terminal.say("what it acknowledges is on disk; a projector runs; Ctrl-C ends both")
        sys.stdout.flush()
        async with server.connect() as ledger:
            await asyncio.gather(run_projector(ledger), server.watch())
    terminal.say("ended; the server stays for half a minute, or as long as others use it")
