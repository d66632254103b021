"""Opening what somebody names on a command line: a regular file, or an error at once.

A named pipe without a writer would hold its reader for ever, and a device has no end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ledger.errors import InvalidInput

__all__ = ["open_regular", "regular_only"]


def regular_only(path: str, flags: int) -> int:
    """The `opener` of `open` that refuses everything else.

    Raises:
        InvalidInput: there is something else.
        OSError: as `os.open`.
    """
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # else a pipe waits here
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InvalidInput(f"{path}: {kind}, not a file", hint="a file on a disk is asked for")
    return handle


def open_regular(path: Path) -> BinaryIO:
    """A file to read.

    Raises:
        InvalidInput: it is no regular file.
        OSError: it cannot be opened.
    """
    return open(path, "rb", opener=regular_only)
