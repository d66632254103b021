"""The command `govledger`: what runs, how it ends, and what an error looks like."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final, NoReturn

import typer

from ledger import __version__, errors
from ledger.service import (
    commands_backup,
    commands_evidence,
    commands_operate,
    commands_project,
    commands_record,
    terminal,
)
from ledger.service.command import app, print_lines

__all__ = ["app", "main"]

_ROOMS: Final = [
    room.__name__
    for room in (
        commands_record,
        commands_project,
        commands_operate,
        commands_backup,
        commands_evidence,
    )
]
"""Whose commands there are, in the order of `--help`; importing a room adds its own to the app."""

app.registered_commands.sort(
    key=lambda one: _ROOMS.index(one.callback.__module__) if one.callback else 0
)

# typer brings its own copy of click, under a name that has moved between its releases.
_UsageError: Any = typer.BadParameter.__mro__[1]


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


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback
    if wanted:
        print_lines(f"govledger {__version__}")
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
