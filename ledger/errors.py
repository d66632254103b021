"""Every error that govledger raises, and what to do about it.

    LedgerError                      anything below; carries `hint` and `facts`
    ├── InvalidInput                 what the caller gave cannot be recorded; nothing was written
    │   ├── InvalidTenant            the name cannot become a key
    │   ├── InvalidEvent             a field, its limit, and the remedy
    │   └── InvalidSetting           an environment variable or a URL that cannot be used
    ├── Refused                      the ledger said no; nothing was written
    │   ├── ConflictingEvent         the id is recorded with another body
    │   ├── WrongExpectedSeq         the tenant has moved on
    │   ├── PredecessorMissing       the batch that it was to come behind is not the last one
    │   ├── ClockSkew                this machine's clock and the server's differ too much
    │   ├── UnsafeServer             a server setting can lose what was acknowledged
    │   ├── IndexBehind              the idempotency index does not cover the stream: reindex
    │   ├── StreamBlocked            a foreign id leaves no room for true times
    │   ├── LibraryTooNew            the server speaks only to newer releases
    │   ├── ForeignEntries           too many foreign entries to register in one go
    │   ├── TargetExists             something lies where a backup, restore or import would go
    │   ├── SealRefused              what would be signed contradicts what was signed before
    │   ├── UnsafeKey                others can read or replace the signing key
    │   └── ServerInUse              another server or port holds the data directory
    ├── DurabilityNotReached         may be recorded, but not as safely as was asked
    ├── Unavailable                  the server cannot be asked now; a retry by id is safe
    │   ├── ServerUnreachable        nobody answers there, or the answer was lost
    │   ├── AuthenticationFailed     NOAUTH, WRONGPASS
    │   ├── PermissionDenied         the ACL lacks a right
    │   ├── TlsFailed                certificate or protocol do not fit
    │   ├── ReadOnlyReplica          this node takes no writes
    │   ├── OutOfMemory              maxmemory is reached
    │   ├── ServerLoading            the data set is still being read
    │   ├── ServerBusy               a snapshot error, a script or a failover holds writes back
    │   ├── FunctionMissing          the function library is not there and may not be loaded
    │   ├── WitnessUnavailable       a witness cannot be asked now
    │   ├── AnchorUnavailable        an anchor's file cannot be read or written now
    │   ├── EmbeddedServerError      the private server did not start
    │   └── StateUnavailable         a reader is cut off, and what it has is too old to be served
    ├── ServerError                  the server refused the command for a reason we do not know
    ├── JobFailed                    a scheduled job did not do what it is for
    │   └── SnapshotFailed           BGSAVE or the copy of its dump failed
    ├── NotFound                     no such tenant, entry or state
    ├── NotProved                    the evidence does not prove it; `facts` has the reason
    ├── EntriesMissing               the record has a hole
    ├── NotCaughtUp                  the projection has not folded that far yet
    ├── LedgerRolledBack             the ledger is behind what was already read from it
    ├── CommitConflict               another projector folded this tenant meanwhile
    │   └── LeaseHeld                another worker folds this tenant now
    ├── InvalidBackup                a backup or an export is damaged, or is not what it says
    ├── MalformedValue               a memory key holds something else than was expected
    └── NotInitialized               the memory service is not connected yet, or not any more

Operating errors (`Unavailable`, `DurabilityNotReached`) are worth a retry with the same event ids,
which is always safe. `InvalidInput` and `Refused` are not: something must change first.
"""

from __future__ import annotations

__all__ = [
    "AnchorUnavailable",
    "AuthenticationFailed",
    "ClockSkew",
    "CommitConflict",
    "ConflictingEvent",
    "DurabilityNotReached",
    "EmbeddedServerError",
    "EntriesMissing",
    "ForeignEntries",
    "FunctionMissing",
    "IndexBehind",
    "InvalidBackup",
    "InvalidEvent",
    "InvalidInput",
    "InvalidSetting",
    "InvalidTenant",
    "JobFailed",
    "LeaseHeld",
    "LedgerError",
    "LedgerRolledBack",
    "LibraryTooNew",
    "MalformedValue",
    "NotCaughtUp",
    "NotFound",
    "NotInitialized",
    "NotProved",
    "OutOfMemory",
    "PermissionDenied",
    "PredecessorMissing",
    "ReadOnlyReplica",
    "Refused",
    "SealRefused",
    "ServerBusy",
    "ServerError",
    "ServerInUse",
    "ServerLoading",
    "ServerUnreachable",
    "SnapshotFailed",
    "StateUnavailable",
    "StreamBlocked",
    "TargetExists",
    "TlsFailed",
    "Unavailable",
    "UnsafeKey",
    "UnsafeServer",
    "WitnessUnavailable",
    "WrongExpectedSeq",
]


class LedgerError(Exception):
    """The root. `hint` says what to do next; `facts` are the values behind the message."""

    def __init__(self, message: str, *, hint: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.facts))


def _rebuild(
    kind: type[LedgerError], message: str, hint: str | None, facts: dict[str, object]
) -> LedgerError:
    return kind(message, hint=hint, **facts)


class InvalidInput(LedgerError, ValueError):
    """What the caller gave cannot be recorded or asked for; nothing was written."""


class InvalidTenant(InvalidInput):
    """The tenant's name does not fit the key grammar."""


class InvalidEvent(InvalidInput):
    """An event breaks its schema or a limit; `facts` has `problems`, a list of field and reason."""


class InvalidSetting(InvalidInput):
    """A setting or URL cannot be used."""


class Refused(LedgerError):
    """The ledger said no, and nothing of the refused group was written."""


class ConflictingEvent(Refused):
    """The id is recorded with another body; `facts`: id, seq, entry_id, both SHA-256 digests."""


class WrongExpectedSeq(Refused):
    """The tenant's head is not where the caller expected; `facts`: expected, actual."""


class PredecessorMissing(Refused):
    """The batch that this one was to come right behind was refused, or another one came between."""


class ClockSkew(Refused):
    """The clocks of client and server, or an event's `at`, are too far apart."""


class UnsafeServer(Refused):
    """A server setting can lose acknowledged entries; the message names it and the value to set."""


class IndexBehind(Refused):
    """The idempotency index or the head record does not cover the stream."""


class StreamBlocked(Refused):
    """A foreign last id lies so far ahead that true recorded times are impossible."""


class LibraryTooNew(Refused):
    """The server's function library no longer answers this release."""


class ForeignEntries(Refused):
    """More foreign entries than one call registers; the rest follow at the next call."""


class SealRefused(Refused):
    """The ledger contradicts what is anchored: nothing was signed; `facts` has the reason."""


class UnsafeKey(Refused):
    """The signing key's file can be read or replaced by other accounts."""


class ServerInUse(Refused):
    """A server already runs on this data directory in another way than was asked for."""


class TargetExists(Refused):
    """Something lies where a backup, a restore or an import would go; nothing was overwritten."""


class DurabilityNotReached(LedgerError):
    """The event is recorded, but not at the level asked for; a retry by id is safe.

    `facts`: wanted, reached, and the `receipts` of what is recorded.
    """


class Unavailable(LedgerError):
    """The server cannot be asked now. Whether a call in flight landed is unknown; retry by id."""


class ServerUnreachable(Unavailable):
    """Nobody answers at the address, or the connection broke and retries ran out."""


class AuthenticationFailed(Unavailable):
    """The server wants a password, or another one."""


class PermissionDenied(Unavailable):
    """The server's ACL denies this user a command or a key."""


class TlsFailed(Unavailable):
    """The TLS handshake failed."""


class ReadOnlyReplica(Unavailable):
    """The node is a replica and takes no writes."""


class OutOfMemory(Unavailable):
    """The server has reached maxmemory and takes no more entries."""


class ServerLoading(Unavailable):
    """The server is still reading its data set."""


class ServerBusy(Unavailable):
    """The server holds writes back for now: MISCONF, BUSY, CLUSTERDOWN, NOREPLICAS, TRYAGAIN."""


class FunctionMissing(Unavailable):
    """The function library is absent and this user may not load it."""


class WitnessUnavailable(Unavailable):
    """A witness does not answer, or not as the protocol says."""


class AnchorUnavailable(Unavailable):
    """A log's file in the anchor cannot be read or written now; nothing was signed beyond it."""


class EmbeddedServerError(Unavailable):
    """The private server did not start or did not answer; the message ends with its log."""


class StateUnavailable(Unavailable):
    """A reader cannot reach the server, and what it read last is too old to pass for current.

    `facts`: tenant, and `seq` and `recorded_at` of what it read last, None where it has nothing.
    """


class ServerError(LedgerError):
    """The server answered with an error that has no name of its own here."""


class JobFailed(LedgerError):
    """A scheduled job did not do what it is for; it runs again at its next time."""


class SnapshotFailed(JobFailed):
    """A snapshot was not made, or its dump could not be copied out."""


class NotFound(LedgerError, LookupError):
    """There is no such tenant, entry or state."""

    @classmethod
    def nothing_of(cls, tenant: str) -> NotFound:
        """Of a tenant that has no entries."""
        return cls(
            f"tenant {tenant}: nothing is recorded",
            hint="`govledger tenants` lists who is known",
            tenant=tenant,
        )


class NotProved(LedgerError):
    """The evidence does not prove what was asked; `facts` has `reason`, one short word or two."""


class EntriesMissing(LedgerError):
    """Entries that were recorded are not in the stream; `facts`: tenant, first_seq, last_seq."""


class NotCaughtUp(LedgerError, TimeoutError):
    """The projection had not folded the sequence number in time; `facts`: wanted, folded."""


class LedgerRolledBack(LedgerError):
    """The ledger is behind, or other than, what was already folded or read from it."""


class CommitConflict(LedgerError):
    """The committed position is not the one that this fold began from."""


class LeaseHeld(CommitConflict):
    """Another worker folds this tenant; whose lease it is, and for how long, is in the facts."""


class InvalidBackup(LedgerError):
    """A backup or an export is damaged, unfinished, or does not hold what it says it holds."""


class MalformedValue(LedgerError, ValueError):
    """What is stored under a memory key is no envelope, or does not fit the model asked for."""


class NotInitialized(LedgerError, RuntimeError):
    """The memory service was used before `initialize` or after `disconnect`."""
