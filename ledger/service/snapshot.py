"""RDB snapshots: one BGSAVE, watched to its end; and its dump copied out of the server's reach.

A snapshot is a backup of a moment, no part of an acknowledgement: what is durable is decided by
the append-only file. `bgsave` in a client answers before anything was saved, so its success is read
from INFO: `rdb_saves` and `rdb_last_save_time` have moved and `rdb_last_bgsave_status` is ok.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

from ledger import errors, keys
from ledger.durable import fsync_directory
from ledger.server import Server
from ledger.service.inspection import config, info, server_now_ms
from ledger.service.scratch import RDB_HEADER_BYTES, copy_with_digest, is_dump

__all__ = [
    "Archived",
    "Retention",
    "Snapshot",
    "archive_owner",
    "archive_snapshot",
    "check_archive",
    "copy_saved",
    "is_local",
    "saved_path",
    "superfluous",
    "take_snapshot",
]

POLL_S: Final = 0.05
POLL_MAX_S: Final = 1.0
SNAPSHOT_TIMEOUT_S: Final = 3600.0
_OWNER: Final = re.compile(r"[0-9a-f]{8}")
_NAME: Final = re.compile(r"dump-(\d{8}T\d{6}\d{3}Z)-([0-9a-f]{8})-[0-9a-f]{8}\.rdb")
_AHEAD: Final = timedelta(minutes=5)
"""A copy whose time is further ahead was made while a clock was wrong."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that one node has made; `path` is on the server's own disk, None where CONFIG may
    not be read.
    """

    run_id: str
    begun_ms: int
    seconds: float
    path: Path | None
    remote: bool
    """Whether the server is on another machine, so that the path is not one of ours."""


@dataclass(frozen=True, slots=True)
class Archived:
    """A dump that was copied out, and what its bytes add up to."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Retention:
    """Which copies stay: the newest `last`, and of each of the last `days` days the newest."""

    last: int = 7
    days: int = 30


# -- the save ------------------------------------------------------------------------------------


async def take_snapshot(
    server: Server,
    key: str = "",
    *,
    timeout_s: float = SNAPSHOT_TIMEOUT_S,
    wait_out: bool = False,
) -> Snapshot | None:
    """Saves the node of `key` to its own disk.

    Args:
        server: whose node.
        key: the node that holds it.
        timeout_s: how long all of it may take.
        wait_out: wait for the end of a save that is under way there already, and then save;
            without it, return None.

    Raises:
        SnapshotFailed: the server could not save, restarted meanwhile, or took too long.
        Unavailable: the server cannot be asked.
    """
    begun, pauses = time.monotonic(), _pauses()
    while True:
        before, begun_ms = await _persistence(server, key), await server_now_ms(server, key)
        if before["rdb_bgsave_in_progress"] == "0":
            if await _begin(server, key, only_ours=wait_out):
                break
        elif not wait_out:
            return None
        _in_time(server, begun, timeout_s, "another save or an AOF rewrite is in the way")
        await asyncio.sleep(next(pauses))
    now, pauses = await _persistence(server, key), _pauses()
    while now["rdb_bgsave_in_progress"] != "0":
        _in_time(server, begun, timeout_s, "BGSAVE goes on")
        await asyncio.sleep(next(pauses))
        now = await _persistence(server, key)
    _check_saved(server, before, now)
    taken_s = time.monotonic() - begun
    path = await saved_path(server, key)
    return Snapshot(now["run_id"], begun_ms, taken_s, path, not is_local(server))


def _pauses() -> Iterator[float]:
    pause_s = POLL_S
    while True:
        yield pause_s
        pause_s = min(POLL_MAX_S, pause_s * 1.5)


async def _begin(server: Server, key: str, *, only_ours: bool) -> bool:
    """Whether a save has begun; not while the append-only file is rewritten."""
    try:
        await server.command(key, "BGSAVE")
    except errors.ServerError as error:
        if "already in progress" in error.message:  # begun since we looked, by whomever:
            return not only_ours  # by us, where the first answer was lost
        if "child process is active" in error.message:
            return False
        raise errors.SnapshotFailed(f"BGSAVE was refused: {error.message}") from error
    return True


async def _persistence(server: Server, key: str) -> dict[str, str]:
    return await info(server, key, "server", "persistence")


def _in_time(server: Server, begun: float, timeout_s: float, what: str) -> None:
    if time.monotonic() - begun > timeout_s:
        raise errors.SnapshotFailed(
            f"{server.address}: no snapshot within {timeout_s:g} s: {what}",
            hint="see the server's log, and `INFO persistence`",
        )


def _check_saved(server: Server, before: dict[str, str], now: dict[str, str]) -> None:
    if now["run_id"] != before["run_id"]:
        raise errors.SnapshotFailed(
            f"{server.address}: the server restarted while it saved",
            hint="see its log: a snapshot needs up to as much memory again as the data",
        )
    moved = now["rdb_saves"] != before["rdb_saves"]
    moved = moved or now["rdb_last_save_time"] != before["rdb_last_save_time"]
    if not moved or now["rdb_last_bgsave_status"] != "ok":
        raise errors.SnapshotFailed(
            f"{server.address}: BGSAVE failed (rdb_last_bgsave_status: "
            f"{now['rdb_last_bgsave_status']})",
            hint="the server's log says why: the disk is full, `dir` cannot be written, or fork "
            "found no memory (vm.overcommit_memory)",
        )


def is_local(server: Server) -> bool:
    """Whether the server runs on this machine, by its address."""
    return (
        server.embedded is not None
        or re.match(r"(unix:|rediss?://(localhost|127\.[0-9.]+|\[::1\])(:|/|$))", server.address)
        is not None
    )


async def saved_path(server: Server, key: str = "") -> Path | None:
    """Where the node of `key` puts its dump, on its own disk; None where CONFIG may not be read."""
    try:
        seen = await config(server, key, "dir", "dbfilename")
    except errors.PermissionDenied:
        return None
    return Path(seen["dir"]) / seen["dbfilename"]


# -- the copy ------------------------------------------------------------------------------------


async def archive_owner(server: Server) -> str:
    """Whose copies are whose, where several servers have one directory: 8 hex digits that Redis
    keeps. A `run_id` would not do, since it is another one after each restart.

    Raises:
        SnapshotFailed: other hands put something else there.
    """
    made = secrets.token_hex(4)
    kept = await server.command(keys.ARCHIVE_OWNER, "SET", keys.ARCHIVE_OWNER, made, "NX", "GET")
    owner = made if kept is None else str(kept.decode(errors="replace"))
    if not _OWNER.fullmatch(owner):
        raise errors.SnapshotFailed(
            f"{keys.ARCHIVE_OWNER} is {owner[:80]!a}, which nobody of us wrote",
            hint="delete it: then a new one is made, and no copy that is there is removed any more",
        )
    return owner


def check_archive(directory: Path) -> None:
    """Raises `InvalidSetting` where there is no such directory to archive to."""
    if not directory.is_dir():
        raise errors.InvalidSetting(
            f"--archive: there is no directory {directory}",
            hint=f"mkdir -p {directory}, or mount what it is on: it is not made here, so that an "
            "absent disk is noticed",
        )


async def archive_snapshot(
    snapshot: Snapshot,
    directory: Path,
    retention: Retention | None = None,
    *,
    owner: str,
    at_ms: int = 0,
) -> Archived:
    """Copies the dump into `directory`, with its SHA-256 beside it as `sha256sum -c` reads it, and
    removes the owner's copies that the rule does not keep. All of it is on disk then.

    Args:
        snapshot: which; its path must be readable here.
        directory: where to; it must be there. What is put into it is for our eyes only.
        retention: the rule; None keeps everything.
        owner: of `archive_owner`.
        at_ms: the time in the name, the same for all nodes of a cluster; by default the snapshot's.

    Raises:
        SnapshotFailed: there is no such dump to be read here, it is no RDB file, or it cannot be
            written there.
        InvalidSetting: there is no such directory.
    """
    check_archive(directory)
    if snapshot.path is None:
        raise errors.SnapshotFailed(
            "the dump cannot be copied out: CONFIG is denied, so nobody says where it is",
            hint="grant +config|get, or archive by an operator's user",
        )
    moment = datetime.fromtimestamp((at_ms or snapshot.begun_ms) / 1000, UTC)
    stamp = f"{moment:%Y%m%dT%H%M%S}{moment.microsecond // 1000:03d}Z"
    path = directory / f"dump-{stamp}-{owner}-{snapshot.run_id[:8]}.rdb"
    try:
        return await asyncio.to_thread(_archive, snapshot, snapshot.path, path, retention, moment)
    except OSError as error:
        where = "the server is on another machine; " if snapshot.remote else ""
        raise errors.SnapshotFailed(
            f"the dump cannot be copied out: {error.filename or directory}: {error.strerror}",
            hint=f"{where}the scheduler must run where it can read {snapshot.path} and write "
            f"{directory}, with room for it",
        ) from error


def _archive(
    snapshot: Snapshot, source: Path, path: Path, retention: Retention | None, moment: datetime
) -> Archived:
    directory = path.parent
    partial = path.with_suffix(".partial")
    try:
        with source.open("rb") as dump:
            size, sha256 = copy_saved(dump, source, partial, snapshot.begun_ms)
        _write(path.with_suffix(".rdb.sha256"), f"{sha256}  {path.name}\n".encode())
        partial.replace(path)  # last: a dump that is there has its digest
    finally:
        partial.unlink(missing_ok=True)
    if retention is not None:
        names = (one.name for one in directory.iterdir())
        for old in superfluous(names, path.name, retention, max(moment, datetime.now(UTC))):
            (directory / f"{old}.sha256").unlink(missing_ok=True)
            (directory / old).unlink(missing_ok=True)
        for one in directory.glob("dump-*.partial"):  # of a process that was killed
            if one.name[5:13] < f"{moment - timedelta(days=1):%Y%m%d}":
                one.unlink(missing_ok=True)
    fsync_directory(directory)
    return Archived(path, size, sha256)


def copy_saved(dump: BinaryIO, source: Path, target: Path, begun_ms: int) -> tuple[int, str]:
    """Copies an open dump to a new file; size and SHA-256 of what was copied. An open dump stays as
    it is: a later save renames another file over it.

    Raises:
        SnapshotFailed: it is older than the save that was begun then, or no RDB file.
    """
    status = os.fstat(dump.fileno())
    if status.st_mtime_ns // 1_000_000 < begun_ms - 2000:  # file systems round, clocks differ
        raise errors.SnapshotFailed(
            f"{source} is older than the snapshot just made: it is another server's",
            hint="archive where the server's own disk is mounted under the same path",
        )
    if not is_dump(dump.read(RDB_HEADER_BYTES)):
        raise errors.SnapshotFailed(f"{source} is no RDB file")
    dump.seek(0)
    size, sha256 = copy_with_digest(dump, target)
    if size != status.st_size:
        raise errors.SnapshotFailed(f"{source}: {size} bytes read of {status.st_size}")
    return size, sha256


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    with suppress(FileNotFoundError):
        partial.unlink()
    with open(partial, "xb", opener=_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def superfluous(names: Iterable[str], made: str, retention: Retention, now: datetime) -> list[str]:
    """Which copies may go, of those that have the owner of the one just made, which stays.

    What is not named as ours are is never among them. The nodes of a cluster are saved as one:
    their copies have the same time and stay or go together. A time that is still to come was read
    off a wrong clock: such a copy counts as the oldest, and as none of a day's.
    """
    just = _NAME.fullmatch(made)
    assert just is not None
    copies = {
        name: match[1] for name in names if (match := _NAME.fullmatch(name)) and match[2] == just[2]
    }
    ahead = (now + _AHEAD).strftime("%Y%m%dT%H%M%S999Z")
    moments = sorted(set(copies.values()), reverse=True)
    true = [moment for moment in moments if moment <= ahead]
    rated = true + [moment for moment in moments if moment > ahead]
    kept, days = {just[1], *rated[: max(1, retention.last)]}, set()
    oldest = (now - timedelta(days=retention.days)).strftime("%Y%m%d")
    for moment in true:
        day = moment[:8]
        if day > oldest and day not in days:
            days.add(day)
            kept.add(moment)
    return sorted(name for name, moment in copies.items() if moment not in kept)
