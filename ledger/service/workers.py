"""Several projectors on one machine: a process each, started again where one dies."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from typing import Final

from ledger.settings import Settings
from projections.registry import configured

__all__ = ["run_workers"]

RESTART_PAUSE_S: Final = 1.0
STOP_TIMEOUT_S: Final = 10.0
_log = logging.getLogger("ledger")


async def run_workers(settings: Settings, count: int) -> None:
    """Keeps `count` worker processes running until it is cancelled; then they end too.

    They end by themselves where this process is killed: their standard input ends with it.

    Raises:
        InvalidSetting: no worker could fold with these projections.
    """
    configured(settings)  # once here, and not again and again in each of them
    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(_keep_one(settings))


async def _keep_one(settings: Settings) -> None:
    while True:
        worker = await _start(settings)
        try:
            code = await worker.wait()
        finally:
            await _stop(worker)
        _log.warning("worker %d ended with %d; another one is started", worker.pid, code)
        await asyncio.sleep(RESTART_PAUSE_S)


async def _start(settings: Settings) -> asyncio.subprocess.Process:
    environment = os.environ | {"REDIS_URL": settings.redis_url}  # no secret on a command line
    if settings.redis_password is not None:
        environment["REDIS_PASSWORD"] = settings.redis_password.get_secret_value()
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ledger", "project", "--until-eof"),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


async def _stop(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is not None:
        return
    worker.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await worker.wait()
    except TimeoutError:
        worker.kill()
        await worker.wait()
