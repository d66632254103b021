"""A server's own snapshot as a backup's: taken now, and copied where this machine can read it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ledger import errors
from ledger.connect import database_number
from ledger.server import Server
from ledger.service.files import in_thread
from ledger.service.snapshot import copy_saved, is_local, saved_path, take_snapshot

__all__ = ["CannotDump", "Dump", "copy_dump", "dump_path"]


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
    database = database_number(server.settings.redis_url)
    if database:  # a snapshot has all of them, and who loads it looks in 0
        raise CannotDump(f"the ledger is in database {database}")
    if server.is_cluster:
        raise CannotDump("each node of a cluster has a part of it")
    if not is_local(server):
        raise CannotDump("its snapshot file is on another machine")
    path = await saved_path(server)
    if path is None:
        raise CannotDump("its ACL does not tell this user where the snapshot is")
    if not path.parent.is_dir():
        raise CannotDump(f"its directory {path.parent} is not on this machine")
    return path


async def copy_dump(server: Server, source: Path, target: Path) -> Dump:
    """Has the server save now, a save that others have begun aside, and copies what it saved.

    Raises:
        ServerBusy: it could not save; its log says why.
        CannotDump: the file there cannot be read, or is not the one just saved.
    """
    try:
        taken = await take_snapshot(server, wait_out=True)
    except errors.SnapshotFailed as error:
        raise errors.ServerBusy(error.message, hint=error.hint) from error
    assert taken is not None
    return await in_thread(_copy, source, target, taken.begun_ms)


def _copy(source: Path, target: Path, begun_ms: int) -> Dump:
    try:
        opened = source.open("rb")
    except (FileNotFoundError, PermissionError) as error:
        raise CannotDump(f"{source} cannot be read here: {error.strerror}") from error
    with opened as file:
        try:
            return Dump(target, *copy_saved(file, source, target, begun_ms))
        except errors.SnapshotFailed as error:
            raise CannotDump(error.message) from error
