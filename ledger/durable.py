"""What makes a file outlive a power cut beyond its own fsync: the directory that has its name."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["fsync_directory"]


def fsync_directory(path: Path) -> None:
    """Puts the names in a directory on disk: made, replaced or deleted ones.

    Raises:
        OSError: it is no directory, or cannot be opened or synced.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
