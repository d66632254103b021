"""What keeps running until it is told to end: a projector, and `govledger dev` around one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ledger import errors
from ledger.embedded import EmbeddedServer, Endpoint, is_running
from ledger.ledger import Ledger
from ledger.settings import load_settings
from projections import Projector

__all__ = [
    "DevServer",
    "default_data_dir",
    "ends_on_eof",
    "ends_on_sigterm",
    "prepare",
    "run_projector",
    "run_sealer",
    "together",
    "with_metrics",
]

PREPARE_INTERVAL_S: Final = 600.0
"""Settings change while a server runs, and an attestation expires after a day."""

WATCH_INTERVAL_S: Final = 0.5
_log = logging.getLogger("ledger")


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Runs all of it until one fails or this is cancelled, and ends when each has ended.

    Raises:
        LedgerError: what the first one failed with.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            for one in work:
                tasks.create_task(one)
    except BaseExceptionGroup as group:
        raise _first_of(group) from None


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


@asynccontextmanager
async def ends_on_sigterm() -> AsyncIterator[None]:
    """SIGTERM cancels the block, whose own cleanup runs, and is a success."""
    task, terminated = asyncio.current_task(), False
    assert task is not None

    def end() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        yield
    except asyncio.CancelledError:
        if not terminated:
            raise
        task.uncancel()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@asynccontextmanager
async def ends_on_eof() -> AsyncIterator[None]:
    """The end of standard input cancels the block: whoever started this process has ended."""
    task, ended = asyncio.current_task(), False
    assert task is not None

    def read() -> None:
        nonlocal ended
        if not os.read(0, 4096):
            ended = True
            loop.remove_reader(0)
            task.cancel()

    loop = asyncio.get_running_loop()
    loop.add_reader(0, read)
    try:
        yield
    except asyncio.CancelledError:
        if not ended:
            raise
        task.uncancel()
    finally:
        loop.remove_reader(0)


@asynccontextmanager
async def with_metrics(ledger: Ledger, host: str, port: int | None) -> AsyncIterator[None]:
    """Serves metrics while the block runs, where a port is given.

    Raises:
        InvalidInput: prometheus-client is missing, or the port cannot be listened on.
    """
    if port is None:
        yield
        return
    from ledger.service.metrics import metrics_served

    async with metrics_served(ledger, host, port) as listening:
        _log.info("metrics on http://%s:%d/metrics", host, listening)
        yield


async def prepare(ledger: Ledger) -> None:
    """What an operator's process leaves for clients with fewer rights: the function library, and an
    attestation of the server's settings.

    Raises:
        Unavailable: the server cannot be used; what keeps it from being attested, such as a missing
            right or another value under that key, is only a warning.
    """
    await ledger.server.load_library()
    try:
        await ledger.server.attest()
    except (errors.PermissionDenied, errors.ServerError) as error:
        _log.warning("the server's settings are not attested: %s", error)


async def run_projector(ledger: Ledger) -> None:
    """Folds every tenant, and keeps the attestation fresh, until it is cancelled.

    Raises:
        Unavailable: the server could not be prepared at the start; later it is waited for.
    """
    await prepare(ledger)
    await asyncio.gather(Projector(ledger).run(), _prepare_for_ever(ledger))


async def run_sealer(ledger: Ledger) -> None:
    """Seals every tenant, until it is cancelled; returns at once where no anchor is set.

    Raises:
        InvalidSetting: GOVLEDGER_ANCHOR is set, and there is no signing key.
    """
    from ledger.keyfile import signing_key
    from ledger.seal import Sealer
    from ledger.witness import WitnessClient

    settings = load_settings()
    if settings.govledger_anchor is None:
        return
    witnesses = [WitnessClient.parse(text) for text in settings.govledger_witnesses.split()]
    sealer = Sealer(ledger, signing_key(settings), settings.govledger_anchor, witnesses)
    await sealer.run(
        every_entries=settings.govledger_seal_entries,
        every_seconds=settings.govledger_seal_seconds,
    )


async def _prepare_for_ever(ledger: Ledger) -> None:
    while True:
        await asyncio.sleep(PREPARE_INTERVAL_S)
        try:
            await prepare(ledger)
        except errors.LedgerError as error:  # folding goes on without, and says what it lacks
            _log.warning("%s", error)


# -- govledger dev -----------------------------------------------------------------------------


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/govledger`, by default `~/.local/share/govledger`."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "govledger"


class DevServer:
    """The embedded server of a directory, held and brought back where it dies."""

    def __init__(self, hold: EmbeddedServer, endpoint: Endpoint, *, attached: bool) -> None:
        self.hold = hold
        self.endpoint = endpoint
        self.attached = attached
        """Whether it was running before."""

    @classmethod
    @asynccontextmanager
    async def running(cls, data_dir: Path, port: int | None) -> AsyncIterator[DevServer]:
        """Attaches to the directory's server, or starts it.

        Raises:
            ServerInUse: it listens on another port.
            EmbeddedServerError: it cannot be started.
        """
        before = await asyncio.to_thread(is_running, data_dir)
        hold = await asyncio.to_thread(EmbeddedServer.acquire, data_dir, port=port)
        try:
            endpoint = await asyncio.to_thread(is_running, data_dir)
            if endpoint is None:
                raise errors.EmbeddedServerError(f"the server of {data_dir} ended at once")
            attached = before is not None and before.pid == endpoint.pid
            yield cls(hold, endpoint, attached=attached)
        finally:
            await asyncio.to_thread(hold.release)

    @property
    def url(self) -> str:
        """What REDIS_URL must be."""
        return f"embedded://{quote(str(self.hold.data_dir))}"

    def connect(self) -> AbstractAsyncContextManager[Ledger]:
        """Of the embedded server, which has no password, whatever the environment says."""
        settings = load_settings(redis_url=self.url).model_copy(update={"redis_password": None})
        return Ledger.connect(settings=settings)

    async def watch(self) -> None:
        """Brings the server back where it dies, and says so, until it is cancelled."""
        told = ""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                await asyncio.to_thread(self.hold.ensure_running)
                found = await asyncio.to_thread(is_running, self.hold.data_dir)
            except errors.LedgerError as error:
                if str(error) != told:
                    _log.error("%s", error)
                told = str(error)
                continue
            if found is not None and found.pid != self.endpoint.pid:
                _log.warning(
                    "the server (pid %d) had ended; it runs again (pid %d) on the same files",
                    self.endpoint.pid,
                    found.pid,
                )
                self.endpoint, told = found, ""
