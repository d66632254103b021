"""Files that are whole or not there: written aside, synced, and put in place in one step."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from ledger import errors
from ledger.durable import fsync_directory

__all__ = [
    "create_file",
    "disk_errors_named",
    "in_thread",
    "partial_path",
    "put_directory",
    "refuse_existing",
    "remove",
]


REMOVALS: Final = 3
_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

T = TypeVar("T")
_log = logging.getLogger("ledger")


def partial_path(path: Path) -> Path:
    """A name beside `path` for what is not whole yet; nobody takes it for a finished one."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """`asyncio.to_thread` that ends when the thread does: who is cancelled can clean up then."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def remove(directory: Path) -> None:
    """Deletes a directory that has no name yet; what cannot be deleted is said, and harmless."""
    for _ in range(REMOVALS):
        try:
            shutil.rmtree(directory)
            return
        except FileNotFoundError:  # somebody deletes there too, such as a server that ends
            if not directory.exists():
                return
        except OSError as error:
            _log.warning("%s is left and can be deleted: %s", directory, error)
            return


@contextmanager
def disk_errors_named(place: Path) -> Iterator[None]:
    """A write that fails says neither where nor what to do.

    Raises:
        InvalidInput: the disk of `place` is full or broken, or a limit on files was reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise errors.InvalidInput(
            f"{error.filename or place}: it cannot be written: {error.strerror}",
            hint="make room on that disk, or write to another one; nothing of it was kept",
        ) from error


@contextmanager
def create_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, readable by its owner alone, that is there with all its bytes when the block has
    ended, and not at all where that failed.

    Raises:
        TargetExists: there is something at `path`, before or after the block.
        InvalidInput: nothing can be made in its directory, or there is no such directory.
    """
    refuse_existing(path)
    partial = partial_path(path)
    try:
        fd = _opened_new(partial)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # unlike a rename it fails where somebody was faster
        except FileExistsError:
            refuse_existing(path)
            raise
        except OSError:  # a file system without hard links
            refuse_existing(path)
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _opened_new(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:  # it would name a file that nobody asked for
        raise errors.InvalidInput(
            f"{path.parent}: nothing can be written there: {error.strerror}",
            hint=f"mkdir -p {path.parent}, or name a file in a directory that is there and yours",
        ) from error


def refuse_existing(path: Path) -> None:
    """Raises `TargetExists` where there is anything at `path`."""
    if path.exists() or path.is_symlink():
        raise errors.TargetExists(
            f"{path} exists", hint="choose another name: nothing is overwritten", path=str(path)
        )


def put_directory(partial: Path, path: Path) -> None:
    """Gives a finished directory its name, where nothing or an empty directory is there.

    Raises:
        TargetExists: somebody put something there meanwhile.
    """
    try:
        partial.rename(path)  # replaces an empty directory and nothing else
    except OSError as error:
        if path.exists():
            raise errors.TargetExists(
                f"{path} is not an empty directory any more: {error.strerror}",
                hint="somebody else was faster: nothing was overwritten; choose another name",
                path=str(path),
            ) from error
        raise
    fsync_directory(path.parent)
