# ruff: noqa: T201 - printing is its job
"""What every command shares: exit codes, errors and warnings on stderr, progress, secrets.

An error is one line, `error: …`, and where there is a way out a second one, `hint: …`; under
`--json` it is one JSON object with `error` (its class), `message` and `hint`. A password that a URL
or REDIS_PASSWORD holds is replaced by `***` in whatever is printed here.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import orjson
import typer

from ledger import errors
from ledger.settings import Settings

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_NEGATIVE",
    "cleaned",
    "exit_code",
    "hide_secrets",
    "hide_settings",
    "print_error",
    "printable",
    "progress",
    "run",
    "say",
    "show_logs",
    "show_warnings",
    "spare_gc",
    "without_secrets",
]

EXIT_NEGATIVE: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_UNAVAILABLE: Final = 3
EXIT_REFUSED: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141
EXIT_TERMINATED: Final = 143

_EXIT_CODES: Final[tuple[tuple[type[errors.LedgerError], int], ...]] = (
    (errors.NotFound, EXIT_NEGATIVE),
    (errors.EntriesMissing, EXIT_NEGATIVE),
    (errors.NotCaughtUp, EXIT_NEGATIVE),
    (errors.JobFailed, EXIT_NEGATIVE),
    (errors.NotProved, EXIT_NEGATIVE),
    (errors.InvalidInput, EXIT_BAD_INPUT),
    (errors.Unavailable, EXIT_UNAVAILABLE),
    (errors.ServerError, EXIT_UNAVAILABLE),
)

_SECRET_MIN_LENGTH: Final = 3
_URL_PASSWORD: Final = re.compile(r"(\w://[^\s/@:]*:)[^\s@]{1,512}@")
_secrets: set[str] = set()


def exit_code(error: errors.LedgerError) -> int:
    """What the process ends with; what has no other code is a refusal."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_REFUSED)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs a command to its end, its last output included.

    Raises:
        typer.Exit: Ctrl-C, or whoever read our output has gone, as with `| head`.
        LedgerError: what the command raised.
    """
    try:
        asyncio.run(work)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # What is still buffered would fail once more when the interpreter flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_BROKEN_PIPE) from None


def spare_gc() -> None:
    """For commands that touch many objects once: full collections would visit every import and
    every entry in memory again and again (a third of a replay's time).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


# -- secrets -----------------------------------------------------------------------------------


def hide_secrets(url: str, password: str | None) -> None:
    """Keeps the passwords of a URL and of the environment out of everything printed from now on."""
    user_info = url.partition("://")[2].rpartition("@")[0]
    secret = user_info.partition(":")[2]
    # A parser that stumbles over a / or # in a password quotes only a piece of it.
    found = {secret, unquote(secret), password or "", *re.split(r"[/?#:@]", secret)}
    with suppress(ValueError):  # no URL; whoever connects says so
        found.update(parse_qs(urlsplit(url).query).get("password", ()))
    _secrets.update(one for one in found if len(one) >= _SECRET_MIN_LENGTH)


def hide_settings(settings: Settings) -> None:
    """As `hide_secrets`, for all that the settings hold."""
    password = settings.redis_password
    hide_secrets(settings.redis_url, password.get_secret_value() if password else None)


def without_secrets(text: str) -> str:
    """`text` with `***` for what is known to be secret, and for the password of any URL in it."""
    text = _URL_PASSWORD.sub(r"\1***@", text)
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def cleaned(value: Any) -> Any:
    """The JSON value with every string in it `without_secrets`."""
    if isinstance(value, dict):
        return {name: cleaned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


# -- stderr ------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` on one line and without what could steer a terminal: recorded names are anybody's."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(line: str) -> None:
    """One line to the person at the terminal, where the output proper does not go."""
    print(without_secrets(printable(line)), file=sys.stderr, flush=True)


def print_error(error: errors.LedgerError, *, as_json: bool) -> None:
    """The error, and the lines of input that it is about where it has them."""
    if as_json:
        shown = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        extra = {name: error.facts[name] for name in ("lines", "landed") if name in error.facts}
        print(orjson.dumps(cleaned({**shown, **extra})).decode(), file=sys.stderr, flush=True)
        return
    lines = error.facts.get("lines")
    for line in lines if isinstance(lines, list) else ():
        remedy = f" ({line['hint']})" if line["hint"] else ""
        say(f"error: {line['where']}: {line['message']}{remedy}")
    first, *more = error.message.splitlines() or [""]
    say(f"error: {first}")
    for line in more:  # the end of a server's log
        say(f"  {line}")
    if error.hint:
        say(f"hint: {error.hint}")


class _JsonHandler(logging.Handler):
    """A line of JSON for each record: `at`, `level`, `logger`, `message`, `exception`."""

    def emit(self, record: logging.LogRecord) -> None:
        told: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = "".join(traceback.format_exception(*record.exc_info))
        whole = {name: str(text).encode(errors="backslashreplace") for name, text in told.items()}
        shown = {name: text.decode() for name, text in whole.items()}
        print(orjson.dumps(cleaned(shown)).decode(), file=sys.stderr, flush=True)


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno <= logging.INFO:
            say(record.getMessage())
            return
        level = "error" if record.levelno >= logging.ERROR else "warning"
        say(f"{level}: {record.getMessage()}")
        if record.exc_info:
            for line in "".join(traceback.format_exception(*record.exc_info)).splitlines():
                say(f"  {line}")


def show_warnings() -> None:
    """What the ledger's logger says goes to stderr, a plain line each."""
    logger = logging.getLogger("ledger")
    logger.addHandler(_StderrHandler(logging.WARNING))
    logger.propagate = False


def show_logs() -> None:
    """For what keeps running: news too, and JSON where nobody sits at the terminal."""
    kind = _StderrHandler if sys.stderr.isatty() else _JsonHandler
    for name, level in (("ledger", logging.INFO), ("apscheduler", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [kind(level)]
        logger.setLevel(level)
        logger.propagate = False


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs, where that is a terminal; call it with each advance."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda advance: bar.update(task, advance=advance)
