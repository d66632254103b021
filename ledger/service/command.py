"""What every command is built of: the app, its options, how it connects and prints."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, date, datetime, time
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer

from ledger import errors
from ledger.service import terminal

if TYPE_CHECKING:
    from ledger import Ledger

__all__ = [
    "After",
    "Json",
    "Limit",
    "MetricsHost",
    "MetricsPort",
    "ProjectionName",
    "TenantName",
    "Types",
    "Url",
    "app",
    "connect",
    "example",
    "known",
    "moment",
    "print_json",
    "print_lines",
    "usage",
]

_EXIT_CODES: Final = """\b
Exit codes:
  0    done
  1    a negative answer: not found, entries missing, not folded that far, not
       proved, a job failed, the doctor or a probe found something
  2    bad usage or bad input, such as lines that cannot be recorded
  3    the server cannot be used now: unreachable, password, TLS, rights,
       loading, out of memory, read-only
  4    refused: conflicting id, wrong expected seq, clock, unsafe server,
       durability not reached, ledger rolled back
  130  Ctrl-C      141  whoever read the output has gone      143  SIGTERM"""

app = typer.Typer(
    help="Record governance decisions in Redis or Valkey, replay them, read what they add up to.",
    epilog=_EXIT_CODES,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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


def _can_serve_metrics(port: int | None) -> int | None:
    """Before anything is started: the module says what is missing."""
    if port is not None:
        import_module("ledger.service.metrics")
    return port


MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="N",
        min=0,
        max=65535,
        callback=_can_serve_metrics,
        show_default=False,
        help="Serve Prometheus metrics on this port; 0 takes a free one. Needs govledger[metrics].",
    ),
]
MetricsHost = Annotated[
    str, typer.Option("--metrics-host", metavar="HOST", help="On this address; 0.0.0.0 is all.")
]
ProjectionName = Annotated[str, typer.Option(metavar="NAME", help="Which projection.")]


def example(*lines: str) -> str:
    """What stands below a command's help."""
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def connect(url: str | None, durability: str | None = None) -> AbstractAsyncContextManager[Ledger]:
    """The ledger at `url`, by default of the environment; its passwords are never printed."""
    from ledger import Ledger, load_settings

    settings = load_settings(redis_url=url)
    terminal.hide_settings(settings)
    return Ledger.connect(settings=settings, durability=durability)


async def known(ledger: Ledger, tenant: str) -> str:
    """The tenant, if anything is recorded for it, or was and its head is damaged.

    Raises:
        NotFound: nothing is.
    """
    with suppress(errors.IndexBehind):
        if not (await ledger.head(tenant)).seq:
            raise errors.NotFound.nothing_of(tenant)
    return tenant


def usage(command: str, message: str) -> errors.InvalidInput:
    """Bad usage of a command: exit code 2."""
    return errors.InvalidInput(message, hint=f"govledger {command} --help")


def moment(text: str | None, option: str, *, at_the_end_of_a_day: bool) -> datetime | None:
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


def print_json(value: dict[str, Any]) -> None:
    """One object as a line of stdout."""
    sys.stdout.buffer.write(orjson.dumps(value) + b"\n")


def print_lines(*lines: str) -> None:
    """Text to stdout, where a newline ends each line."""
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))
