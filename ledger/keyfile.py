"""Signing keys in files: private to their owner, and refused where they are not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ledger.durable import fsync_directory
from ledger.errors import InvalidInput, InvalidSetting, UnsafeKey
from ledger.note import SigningKey
from ledger.regular import open_regular
from ledger.settings import Settings

__all__ = ["read_key", "signing_key", "write_key"]

_MAX_BYTES = 4096


def write_key(path: Path, key: SigningKey) -> None:
    """A new file with mode 0600, on disk when this returns.

    Raises:
        InvalidInput: there is a file of that name.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidInput(
            f"{path} exists", hint="a key is never overwritten: choose another name"
        ) from None
    with os.fdopen(handle, "w") as file:
        os.fchmod(file.fileno(), 0o600)  # whatever the umask took away
        file.write(f"{key.encode()}\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(path.parent)  # the name too: what it signed would outlive it


def read_key(path: Path) -> SigningKey:
    """The key of a file.

    Raises:
        UnsafeKey: others can read or write the file.
        InvalidInput: it has no key, or is a pipe or a device.
    """
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UnsafeKey(
                f"{path}: others can read the signing key (mode {stat.S_IMODE(found.st_mode):04o})",
                hint=f"chmod 600 {path}; and if somebody may have read it, make a new key",
            )
        if found.st_uid not in (os.geteuid(), 0):
            raise UnsafeKey(
                f"{path}: belongs to the account {found.st_uid}, which can replace it",
                hint="let the account that seals own it",
            )
        raw = file.read(_MAX_BYTES)
    try:
        return SigningKey.parse(raw.decode())
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: this is no key file") from None


def signing_key(settings: Settings) -> SigningKey:
    """The key of the environment: GOVLEDGER_SIGNING_KEY, else the file GOVLEDGER_SIGNING_KEY_FILE.

    Raises:
        InvalidSetting: there is none.
        UnsafeKey, InvalidInput: as `read_key`.
    """
    if settings.govledger_signing_key is not None:
        return SigningKey.parse(settings.govledger_signing_key.get_secret_value())
    if settings.govledger_signing_key_file is None:
        raise InvalidSetting(
            "GOVLEDGER_SIGNING_KEY_FILE: there is no signing key",
            hint="govledger keys new --deployment NAME -o FILE makes one; or set "
            "GOVLEDGER_SIGNING_KEY",
        )
    return read_key(settings.govledger_signing_key_file)
