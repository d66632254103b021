"""A server's own snapshot, taken now and copied out: BGSAVE watched to its end, not believed.

`BGSAVE` answers before anything is saved, and clients call any answer a success. What counts is in
INFO: `rdb_saves` has grown, `rdb_last_bgsave_status` is ok, and it is the same server process.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Final, NamedTuple

from ledger import errors
from ledger.server import Server
from ledger.service.files import in_thread
from ledger.service.inspection import info, server_now_ms
from ledger.service.scratch import copy_with_digest

__all__ = ["CannotDump", "Dump", "copy_dump", "dump_path"]

POLL_S: Final = 0.05
POLL_MAX_S: Final = 1.0
SAVE_TIMEOUT_S: Final = 3600.0
_CLOCK_ROUNDING_S: Final = 2.0
_LOCAL: Final = re.compile(r"(unix:|embedded:|rediss?://(localhost|127\.[0-9.]+|\[::1\])(:|/|$))")


class CannotDump(Exception):
    """Why a server's snapshot file cannot be used here: then a backup is logical."""


class Dump(NamedTuple):
    """A copied snapshot."""

    path: Path
    bytes: int
    sha256: str


async def dump_path(server: Server) -> Path:
    """Where the server puts its snapshots, if that is a directory of this machine.

    Raises:
        CannotDump: it is not, or nobody says.
    """
    if server.is_cluster:
        raise CannotDump("each node of a cluster has a part of it")
    if not _LOCAL.match(server.address):
        raise CannotDump("its snapshot file is on another machine")
    try:
        seen = await server.command("", "CONFIG", "GET", "dir", "dbfilename")
    except errors.PermissionDenied:
        raise CannotDump("its ACL does not tell this user where the snapshot is") from None
    names = {name.decode(): Path(value.decode()) for name, value in seen.items()}
    path = names["dir"] / names["dbfilename"]
    if not path.parent.is_dir():
        raise CannotDump(f"its directory {path.parent} is not on this machine")
    return path


async def copy_dump(server: Server, source: Path, target: Path) -> Dump:
    """Has the server save now, and copies what it saved.

    Raises:
        ServerBusy: it could not save; its log says why.
        CannotDump: the file there cannot be read, or is not the one just saved.
    """
    begun_s = await server_now_ms(server) / 1000
    await _save(server)
    return await in_thread(_copy, source, target, begun_s)


def _copy(source: Path, target: Path, begun_s: float) -> Dump:
    try:
        opened = source.open("rb")
    except (FileNotFoundError, PermissionError) as error:
        raise CannotDump(f"{source} cannot be read here: {error.strerror}") from error
    # An open file stays what it is: the next save puts another one in its place.
    with opened as file:
        if os.fstat(file.fileno()).st_mtime < begun_s - _CLOCK_ROUNDING_S:
            raise CannotDump(f"{source} is older than what the server just saved elsewhere")
        size, sha256 = copy_with_digest(file, target)
    return Dump(target, size, sha256)


async def _save(server: Server) -> None:
    deadline_s, pause_s = time.monotonic() + SAVE_TIMEOUT_S, POLL_S
    before = await _idle(server, deadline_s)
    while not await _started(server):  # somebody else's save began before ours: wait for its end
        before = await _idle(server, deadline_s)
    while True:
        now = await _persistence(server)
        if now["run_id"] != before["run_id"]:
            raise _failed(server, "it was restarted meanwhile")
        if now["rdb_bgsave_in_progress"] == "0":
            break
        _check_time(server, deadline_s)
        await asyncio.sleep(pause_s)
        pause_s = min(POLL_MAX_S, pause_s * 1.5)
    if now["rdb_last_bgsave_status"] != "ok" or now["rdb_saves"] == before["rdb_saves"]:
        raise _failed(server, f"rdb_last_bgsave_status is {now['rdb_last_bgsave_status']}")


async def _started(server: Server) -> bool:
    try:
        await server.command("", "BGSAVE")
    except errors.ServerError as error:
        if "in progress" in error.message:
            return False
        raise
    return True


async def _idle(server: Server, deadline_s: float) -> dict[str, str]:
    """What INFO says when neither a save nor a rewrite, which would refuse one, is under way."""
    while True:
        seen = await _persistence(server)
        if seen["rdb_bgsave_in_progress"] == seen["aof_rewrite_in_progress"] == "0":
            return seen
        _check_time(server, deadline_s)
        await asyncio.sleep(POLL_S)


async def _persistence(server: Server) -> dict[str, str]:
    return await info(server, "", "server", "persistence")


def _check_time(server: Server, deadline_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise _failed(server, f"it was not done in {SAVE_TIMEOUT_S:g} s")


def _failed(server: Server, why: str) -> errors.ServerBusy:
    return errors.ServerBusy(
        f"{server.address}: BGSAVE failed: {why}",
        hint="the server's log says why: a full disk, a directory it may not write, or no memory "
        "to fork",
    )
