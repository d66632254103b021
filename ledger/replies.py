"""What an error reply or a broken connection means for the ledger, and what to do about it."""

from __future__ import annotations

import ssl
from typing import Final

from redis import exceptions as redis_errors
from redis.sentinel import MasterNotFoundError

from ledger import errors

__all__ = ["function_missing", "library_is_old", "translate"]


def library_is_old(error: Exception) -> bool:
    """Whether the server lacks our function library, or has one from before this release."""
    text = str(error)
    return "Function not found" in text or text.startswith("LEDGERLIBOLD")


def function_missing(address: str) -> errors.FunctionMissing:
    """For a user that may not load it."""
    return errors.FunctionMissing(
        f"{address}: the function library `govledger` is not loaded or is of an older release, and "
        "this user may not load it",
        hint="let an operator's `govledger project` connect once, or grant +function|load",
    )


def translate(error: BaseException, address: str) -> errors.LedgerError:
    """What a redis-py or socket error means for the ledger, with what to do about it."""
    text = str(error) or type(error).__name__
    if isinstance(error, errors.LedgerError):
        return error
    if _is_tls(error):
        return errors.TlsFailed(
            f"{address}: TLS failed: {text}",
            hint="is this the TLS port, and its CA trusted? ?ssl_ca_certs=/path/ca.pem in the URL",
        )
    return _by_reply(error, text, address)


def _by_reply(error: BaseException, text: str, address: str) -> errors.LedgerError:
    if address.startswith("rediss:") and "Timeout connecting" in text:
        return errors.TlsFailed(
            f"{address}: nobody answered the TLS handshake: {text}",
            hint="is this a TLS port? redis:// is for a plain one",
        )
    if isinstance(error, MasterNotFoundError):
        return errors.ServerUnreachable(
            f"{address}: no sentinel there knows a primary of that name",
            hint="are the sentinels up, and is the service's name in REDIS_URL right?",
        )
    for kinds, codes, kind, message, hint in _BY_REPLY:
        if isinstance(error, kinds) or text.startswith(codes):
            return kind(f"{address}: {message}: {text}", hint=hint)
    if isinstance(error, redis_errors.ResponseError):
        return errors.ServerError(f"{address}: {text}", hint=None)
    return errors.ServerUnreachable(
        f"{address}: cannot be reached: {text}",
        hint="is the server up, and is REDIS_URL right (rediss:// for a TLS port, redis:// for a "
        "plain one)? "
        "What was in flight may be recorded; sending it again with the same id is safe",
    )


def _is_tls(error: BaseException | None) -> bool:
    seen = 0
    while error is not None and seen < 8:
        if isinstance(error, ssl.SSLError):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


_Kinds = tuple[type[BaseException], ...]
_BY_REPLY: Final[list[tuple[_Kinds, tuple[str, ...], type[errors.LedgerError], str, str]]] = [
    (
        (redis_errors.AuthenticationError,),
        ("NOAUTH", "WRONGPASS", "DENIED"),
        errors.AuthenticationFailed,
        "authentication failed",
        "set REDIS_PASSWORD (or user and password in REDIS_URL) to what the server expects",
    ),
    (
        (redis_errors.NoPermissionError,),
        # The last one is Redis 7.0's, for a command inside a function.
        ("NOPERM", "ERR ACL failure", "ACL failure", "The user executing the script"),
        errors.PermissionDenied,
        "the server's ACL denies this user",
        "grant the command and key named here; README, Access control, has the recipes",
    ),
    (
        (redis_errors.ReadOnlyError,),
        ("READONLY",),
        errors.ReadOnlyReplica,
        "this node is a read-only replica",
        "connect to the primary, or by redis+sentinel:// or a cluster URL that finds it",
    ),
    (
        (redis_errors.OutOfMemoryError,),
        ("OOM",),
        errors.OutOfMemory,
        "maxmemory is reached and nothing was written",
        "raise maxmemory, or free keys of claude-flow:memory:*",
    ),
    (
        (redis_errors.BusyLoadingError,),
        ("LOADING",),
        errors.ServerLoading,
        "still loading its data set",
        "wait; INFO persistence shows how far it is",
    ),
    (
        (
            redis_errors.MovedError,
            redis_errors.AskError,
            redis_errors.TryAgainError,
            redis_errors.ClusterDownError,
        ),
        ("MOVED", "ASK ", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN"),
        errors.ServerUnreachable,
        "the cluster is rearranging itself",
        "a retry finds the slot's new primary",
    ),
    (
        (),
        ("MISCONF", "BUSY", "NOREPLICAS", "UNKILLABLE"),
        errors.ServerBusy,
        "the server takes no writes for now",
        "MISCONF: a snapshot failed, see its log; NOREPLICAS: too few replicas are connected",
    ),
    (
        (),
        ("Function not found", "ERR Function not found"),
        errors.FunctionMissing,
        "the function library is missing",
        "let an operator's `govledger project` connect once, or grant +function|load",
    ),
    (
        (),
        ("LEDGERLIBNEW",),
        errors.LibraryTooNew,
        "the server's function library no longer answers this release",
        "upgrade govledger here: pip install -U govledger",
    ),
]
