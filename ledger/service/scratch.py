"""Servers of one's own: a dump laid so that it is really loaded, a server run on it, and stopped.

A dump.rdb copied into the directory of a server with `appendonly yes` is ignored: the server comes
up empty. So the dump is laid as the base of the append-only file, with the manifest that names it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from redis import exceptions as redis_errors

from ledger import errors, keys
from ledger.durable import fsync_directory
from ledger.embedded import EmbeddedServer, is_running
from ledger.ledger import Ledger
from ledger.server import LIBRARY_VERSION, Server, library_source, pack
from ledger.settings import load_settings

__all__ = [
    "AOF_DIR",
    "RDB_HEADER_BYTES",
    "check_loadable",
    "copy_with_digest",
    "dump_time_ms",
    "file_digest",
    "is_dump",
    "known_tenants",
    "lay_dump",
    "private_server",
]

CHUNK_BYTES: Final = 1 << 20
LINGER_S: Final = 5.0
START_TIMEOUT_S: Final = 3600.0
"""A large dump loads for minutes."""

NEWEST_REDIS_RDB: Final = 11
AOF_DIR: Final = "appendonlydir"
_BASE: Final = "appendonly.aof.1.base.rdb"
_HEADER: Final = re.compile(rb"(REDIS|VALKEY)(\d{3,4})")
RDB_HEADER_BYTES: Final = 9
LOG_TAIL_BYTES: Final = 4096
_DISK_SIGNS: Final = (os.strerror(errno.ENOSPC), "AOF write error")
"""What its log says where the disk is full or broken."""

_WARNING: Final = re.compile(r"\d+:[A-Z] [^#*]* # (?!WARNING )(.*)")


def is_dump(header: bytes) -> bool:
    """Whether a file that begins so is an RDB snapshot."""
    return _HEADER.match(header) is not None


def check_loadable(path: Path, header: bytes) -> None:
    """Raises `InvalidBackup` where the embedded server cannot load a snapshot that begins so."""
    found = _HEADER.match(header)
    if found is None:
        raise errors.InvalidBackup(f"{path}: this is no RDB snapshot", path=str(path))
    if found[1] == b"REDIS" and int(found[2]) > NEWEST_REDIS_RDB:
        raise errors.InvalidBackup(
            f"{path}: an RDB snapshot of version {int(found[2])}; the embedded server loads those "
            f"of Redis to version {NEWEST_REDIS_RDB}, and its own",
            hint="load it with the program that wrote it, then `govledger backup`: it exports",
            path=str(path),
        )


def dump_time_ms(header: bytes) -> int | None:
    """When a snapshot was begun, ms since 1970, from its field `ctime`: a string of 5 bytes and a
    32-bit integer, as the RDB format has them; None where it is not among the first bytes.
    """
    _, found, behind = header.partition(b"\xfa\x05ctime\xc2")
    return int.from_bytes(behind[:4], "little") * 1000 if found and len(behind) >= 4 else None


def copy_with_digest(source: BinaryIO, target: Path) -> tuple[int, str]:
    """Copies an open file to a new one, on disk at return; bytes and SHA-256 of what was copied."""
    sha256, size = hashlib.sha256(), 0
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as copy:
        while chunk := source.read(CHUNK_BYTES):
            sha256.update(chunk)
            copy.write(chunk)
            size += len(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    return size, sha256.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lay_dump(dump: Path, data_dir: Path) -> str:
    """Copies a snapshot to where a server on `data_dir` loads it; its SHA-256 as it was copied."""
    aof_dir = data_dir / AOF_DIR
    data_dir.mkdir(mode=0o700)
    aof_dir.mkdir(mode=0o700)
    with dump.open("rb") as file:
        _, sha256 = copy_with_digest(file, aof_dir / _BASE)
    manifest = aof_dir / "appendonly.aof.manifest"
    with manifest.open("x") as file_of_names:
        file_of_names.write(f"file {_BASE} seq 1 type b\n")
        file_of_names.flush()
        os.fsync(file_of_names.fileno())
    for directory in (aof_dir, data_dir, data_dir.parent):
        fsync_directory(directory)
    return sha256


@asynccontextmanager
async def private_server(data_dir: Path, dump: Path | None = None) -> AsyncIterator[Ledger]:
    """A ledger on an embedded server that nobody else knows; it has ended when the block has.

    Args:
        data_dir: the server's.
        dump: the snapshot that was laid there, for the message where it does not load.

    Raises:
        InvalidBackup: the server ended while it loaded the snapshot.
        EmbeddedServerError: it does not start, or ended in the middle, as where the disk is full.
    """
    try:
        hold = await _acquired(data_dir)
    except errors.EmbeddedServerError as error:
        raise _not_started(error, data_dir, dump) from error
    try:
        settings = load_settings(redis_url=hold.url).model_copy(update={"redis_password": None})
        async with Ledger.connect(settings=settings) as ledger:
            await _own_library(ledger.server)
            yield ledger
    except errors.LedgerError as error:
        if await asyncio.to_thread(is_running, data_dir):
            raise
        raise _ended(data_dir) from error
    finally:
        await asyncio.shield(asyncio.to_thread(hold.stop))


def _not_started(
    error: errors.EmbeddedServerError, data_dir: Path, dump: Path | None
) -> errors.LedgerError:
    words = _last_words(data_dir) if "log" in error.facts else ""
    if _names_the_disk(words):
        return _ended(data_dir)
    if not words or dump is None:
        return error
    return errors.InvalidBackup(
        f"{dump}: the embedded server cannot load it: {words}",
        hint="the snapshot is damaged: take another copy of it, or another one",
        path=str(dump),
    )


def _ended(data_dir: Path) -> errors.EmbeddedServerError:
    """What to say where the server died: that it cannot be reached is no news of REDIS_URL."""
    words = _last_words(data_dir)
    hint = "try again; if it ends again, look for what kills processes here, such as too little RAM"
    if _names_the_disk(words):
        hint = "the disk is full or broken: make room, or name a directory on another one"
    return errors.EmbeddedServerError(
        f"{data_dir.parent.parent}: the private server that was begun there has ended"
        + (f": {words}" if words else ""),
        hint=hint,
    )


def _last_words(data_dir: Path) -> str:
    """The last warning in the server's log, which is deleted with the directory."""
    try:
        with (data_dir / "valkey.log").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    told = [found[1] for line in lines if (found := _WARNING.match(line))]
    return next(filter(_names_the_disk, told), told[-1] if told else "")


def _names_the_disk(words: str) -> bool:
    return any(sign in words for sign in _DISK_SIGNS)


async def _acquired(data_dir: Path) -> EmbeddedServer:
    """A thread cannot be cancelled: a server that it starts all the same is stopped again."""
    acquire = partial(
        EmbeddedServer.acquire, data_dir, start_timeout_s=START_TIMEOUT_S, linger_s=LINGER_S
    )
    starting = asyncio.ensure_future(asyncio.to_thread(acquire))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await asyncio.wait([starting])
        if starting.exception() is None:
            await asyncio.to_thread(starting.result().stop)
        raise


async def _own_library(server: Server) -> None:
    """A dump brings its own function library along: one that calls itself ours must be ours.

    Raises:
        LibraryTooNew: it is of a newer release.
    """
    version = await server.library_version()
    if version is not None and version > LIBRARY_VERSION:
        raise errors.LibraryTooNew(
            f"the backup was written under function library {version}, this release has "
            f"{LIBRARY_VERSION}",
            hint="upgrade govledger here: pip install -U govledger",
        )
    load = pack("FUNCTION", "LOAD", "REPLACE", library_source())
    (reply,) = await server.exchange("", [load], 1)
    if isinstance(reply, redis_errors.RedisError):
        server.checked(reply)


async def known_tenants(server: Server) -> tuple[list[str], list[str]]:
    """Every tenant that is registered or has a stream or a head, sorted; and those of them that
    the registry does not have.
    """
    members = await server.command(keys.TENANTS, "SMEMBERS", keys.TENANTS)
    registered = {name.decode(errors="backslashreplace") for name in members}
    found = {name for name in registered if keys.is_tenant(name)}
    async with aclosing(server.scan(keys.RECORDS)) as pages:
        async for page in pages:
            found.update(name for one in page if (name := keys.tenant_of_record(one)))
    stray = found - registered
    return sorted(found), sorted(stray)
