"""Every key, its grammar and its TTL rule: the only place that spells a key.

Grammar: `claude-flow:{store}:{tenant}:{type}:{id}` (the operations guide's, with two stores).

`memory`  published copies, without braces, as the guide's clients read them; TTL by the guide's
          rule (`MEMORY_DEFAULT_TTL_SECONDS`, a caller's own, 0 = none). Anyone may delete them.
`ledger`  the record and what is exact. No TTL, ever, but for what says so here (leases,
          attestations). The braces round the tenant are real: they are the Redis Cluster hash
          tag, so one function may touch several of a tenant's keys.

What belongs to no tenant has `_` in the tenant's place, which no tenant can be called.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final
from urllib.parse import quote

from ledger.errors import InvalidInput, InvalidTenant

__all__ = [
    "ATTESTATION_TTL_SECONDS",
    "FEED",
    "HEALTH_SAMPLES",
    "JOBS_CLAIMED",
    "JOBS_LAST",
    "JOBS_RUNNING",
    "JOB_COUNTS",
    "JOB_SLOT_TTL_SECONDS",
    "LEASES",
    "MEMORY_PREFIX",
    "MEMORY_STALE",
    "RECORDS",
    "TENANTS",
    "agent_key",
    "agent_state",
    "attestation",
    "cache_key",
    "checked_tenant",
    "decisions",
    "evidence_checkpoints",
    "evidence_tiles",
    "governance_state",
    "head",
    "importing",
    "index",
    "index_rebuild",
    "is_disposable",
    "is_lease",
    "is_tenant",
    "job_history",
    "job_slot",
    "lease",
    "memory_key",
    "projection",
    "projection_active",
    "projection_bucket",
    "projection_quarantine",
    "published",
    "session_key",
    "snapshot",
    "snapshots",
    "state_key",
    "swarm_key",
    "tenant_of_import",
    "tenant_of_record",
]

LEDGER: Final = "claude-flow:ledger"
MEMORY: Final = "claude-flow:memory"

MEMORY_PREFIX: Final = f"{MEMORY}:"
"""What the memory service's keys are relative to."""

MAX_MEMORY_KEY_BYTES: Final = 1024
_LOG_DIGITS: Final = 16

TENANTS: Final = f"{LEDGER}:_:tenants:all"
"""Set of every tenant's name, acknowledged before the tenant's first append."""

FEED: Final = f"{LEDGER}:_:feed:0"
"""Stream of hints that a tenant has news; capped, lossy by design, the sweep is the truth."""

ATTESTATION_TTL_SECONDS: Final = 86_400
"""The one ledger key here with a TTL: what an operator's process saw of a server's settings."""

JOB_SLOT_TTL_SECONDS: Final = 2 * 86_400
"""How long a claimed slot of a job is remembered; `JOBS_CLAIMED` keeps the newest for ever."""

JOBS_CLAIMED: Final = f"{LEDGER}:_:jobs:claimed"
"""Sorted set: job → the newest slot that somebody claimed, in ms since 1970."""

JOBS_RUNNING: Final = f"{LEDGER}:_:jobs:running"
"""Hash: run id → what runs now, as JSON; what a killed process left is dropped by the cleanup."""

JOBS_LAST: Final = f"{LEDGER}:_:jobs:last"
"""Hash: job → its last run, as JSON."""

JOB_COUNTS: Final = f"{LEDGER}:_:jobs:counts"
"""Hash: `<job> <status>` → how many runs have ended so."""

ARCHIVE_OWNER: Final = f"{LEDGER}:_:archive:owner"
"""String: whose a copied dump is, in its name; made once. A restored server has none at first."""

HEALTH_SAMPLES: Final = f"{LEDGER}:_:health:samples"
"""Stream of what the health job saw of the server; capped."""

MEMORY_STALE: Final = f"{MEMORY}:stale:"
"""What begins so is rubbish by the operations guide's word: its `cleanup('stale:*')`."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED_TENANTS: Final = frozenset({"stale"})
_TENANT_HINT: Final = (
    "1 to 64 characters of A-Z a-z 0-9 . _ - beginning with a letter or digit, and not `stale`"
)


def is_tenant(name: str) -> bool:
    """Whether a tenant can be called so."""
    return _TENANT.fullmatch(name) is not None and name not in _RESERVED_TENANTS


def checked_tenant(tenant: str) -> str:
    """`tenant` itself when it can be part of a key.

    Raises:
        InvalidTenant: it has other characters, another length, or a reserved name.
    """
    given: object = tenant  # callers without types
    if not isinstance(given, str) or not _TENANT.fullmatch(given):
        raise InvalidTenant(f"tenant: {_shown(tenant)} is no tenant name", hint=_TENANT_HINT)
    if tenant in _RESERVED_TENANTS:
        raise InvalidTenant(
            f"tenant: {tenant!r} is reserved: the operations guide's cleanup('stale:*') deletes it",
            hint=_TENANT_HINT,
        )
    return tenant


def _shown(tenant: object) -> str:
    text = ascii(tenant)
    return text if len(text) <= 80 else f"{text[:80]}… ({len(text)} characters)"


def decisions(tenant: str) -> str:
    """The stream: the only truth."""
    return f"{LEDGER}:{{{tenant}}}:governance:decisions"


def head(tenant: str) -> str:
    """Hash: the append function's own record of the tail, and the incidents it noticed."""
    return f"{LEDGER}:{{{tenant}}}:governance:head"


def index(tenant: str) -> str:
    """Hash: event id → recorded ms, seq and SHA-256 of the data."""
    return f"{LEDGER}:{{{tenant}}}:governance:index"


def index_rebuild(tenant: str) -> str:
    """Hash: the index while `reindex` builds it anew; renamed to `index` or deleted at the end."""
    return f"{LEDGER}:{{{tenant}}}:governance:index-rebuild"


RECORDS: Final = f"{LEDGER}:{{*}}:governance:*"
"""Glob of the keys that `tenant_of_record` tells tenants from."""

_RECORD = re.compile(
    rf"{re.escape(LEDGER)}:\{{([^{{}}]*)\}}:governance:(?:decisions|head)".encode()
)


_IMPORTING = re.compile(
    rf"{re.escape(LEDGER)}:\{{([^{{}}]*)\}}:governance:importing-(?:decisions|head|index)".encode()
)


def tenant_of_record(key: bytes) -> str | None:
    """Whose stream or head a key is; None for any other key."""
    found = _RECORD.fullmatch(key)
    name = found[1].decode("latin-1") if found else ""
    return name if is_tenant(name) else None


def importing(tenant: str) -> tuple[str, str, str]:
    """Stream, head and index of a record while it is imported: renamed to the tenant's own at the
    end; what a killed import leaves is deleted by the next one, or by a cleanup.
    """
    begin = f"{LEDGER}:{{{tenant}}}:governance:importing"
    return f"{begin}-decisions", f"{begin}-head", f"{begin}-index"


def tenant_of_import(key: bytes) -> str | None:
    """Whose unfinished import a key belongs to; None for any other key."""
    found = _IMPORTING.fullmatch(key)
    name = found[1].decode("latin-1") if found else ""
    return name if is_tenant(name) else None


def projection(tenant: str, name: str, version: int) -> str:
    """Hash: a projection's position and its entity `state`, committed together."""
    return f"{LEDGER}:{{{tenant}}}:projection:{name}@{version}"


def projection_bucket(tenant: str, name: str, version: int, bucket: int) -> str:
    """Hash: a bucket of a projection's many small entities."""
    return f"{projection(tenant, name, version)}:{bucket}"


def projection_active(tenant: str) -> str:
    """Hash: projection name → the version that readers take."""
    return f"{LEDGER}:{{{tenant}}}:projection:active"


def projection_quarantine(tenant: str) -> str:
    """Hash: `name@version:seq` → why that entry could not be folded."""
    return f"{LEDGER}:{{{tenant}}}:projection:quarantine"


def lease(tenant: str, name: str, version: int, *, rebuild: bool = False) -> str:
    """String: the worker that folds this version of a projection now, or builds it anew beside it.
    Expires 5 s after its last commit.
    """
    key = f"{LEDGER}:{{{tenant}}}:lease:{name}@{version}"
    return f"{key}:rebuild" if rebuild else key


LEASES: Final = f"{LEDGER}:{{*}}:lease:*"
"""Glob of the keys that `is_lease` tells leases from."""

_LEASE = re.compile(
    rf"{re.escape(LEDGER)}:\{{([^{{}}]*)\}}:lease:[A-Za-z0-9_-]{{1,64}}@\d+(?::rebuild)?".encode()
)


def is_lease(key: bytes) -> bool:
    """Whether the key is a lease of a tenant."""
    found = _LEASE.fullmatch(key)
    return found is not None and is_tenant(found[1].decode("latin-1"))


def snapshots(tenant: str, name: str, version: int) -> str:
    """Hash: the seq of each snapshot that is kept of a projection → its position and build."""
    return f"{LEDGER}:{{{tenant}}}:snapshot:{name}@{version}"


def snapshot(tenant: str, name: str, version: int, seq: int) -> str:
    """Hash: a projection's `state` at that seq, and what other entities were before they changed
    between it and the next snapshot.
    """
    return f"{snapshots(tenant, name, version)}:{seq}"


_OF_FOLD: Final = re.compile(
    re.escape(LEDGER.encode())
    + rb":\{([A-Za-z0-9][A-Za-z0-9._-]{0,63})\}:(?:projection|snapshot):([A-Za-z0-9_-]{1,64})@"
    rb"(\d{1,9})(?::rebuild)?(?::\d{1,16})?"
)


def fold_of_key(key: bytes) -> tuple[str, str, int] | None:
    """Tenant, projection and version whose fold or snapshot a key has; None for any other key."""
    found = _OF_FOLD.fullmatch(key)
    return None if found is None else (found[1].decode(), found[2].decode(), int(found[3]))


def evidence_checkpoints(tenant: str) -> str:
    """Stream, capped: copies of the latest signed checkpoints, of all logs of the tenant."""
    return f"{LEDGER}:{{{tenant}}}:evidence:checkpoints"


def evidence_tiles(tenant: str, origin: str) -> str:
    """Hash: `<level>/<number>` → up to 256 node hashes of a log's tree (C2SP tlog-tiles). The key's
    end is the log's: leaves are bound to their origin, so two logs of a tenant share no tile.
    """
    log = hashlib.sha256(origin.encode()).hexdigest()[:_LOG_DIGITS]
    return f"{LEDGER}:{{{tenant}}}:evidence:tiles:{log}"


def published(tenant: str, name: str) -> str:
    """String: a projection's published state in the guide's envelope; has a TTL."""
    return f"{MEMORY}:{tenant}:{name}:state"


def governance_state(tenant: str) -> str:
    """String: the current governance state, as the guide's readers know it; has a TTL."""
    return published(tenant, "governance")


def agent_state(tenant: str, agent_id: str) -> str:
    """String: one agent's published state; the id percent-encoded, so two ids never share a key."""
    return f"{MEMORY}:{tenant}:agent:{quote(agent_id, safe='')}"


def memory_key(key: str) -> str:
    """The full key of one that is relative to `claude-flow:memory:`.

    Raises:
        InvalidInput: it is empty, over 1,024 bytes, no UTF-8, or has the prefix already.
    """
    given: object = key  # callers without types
    try:
        size = len(given.encode()) if isinstance(given, str) else 0
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_MEMORY_KEY_BYTES:
        raise InvalidInput(
            f"key: {_shown(key)} is no key",
            hint=f"1 to {MAX_MEMORY_KEY_BYTES} bytes of UTF-8, such as acgs-dev:session:s-1",
        )
    if key.startswith("claude-flow:"):
        raise InvalidInput(
            f"key: {_shown(key)} is a full key",
            hint=f"leave out {MEMORY_PREFIX}: keys are relative",
        )
    return f"{MEMORY_PREFIX}{key}"


def _memory_part(tenant: str, kind: str, name: str) -> str:
    return f"{checked_tenant(tenant)}:{kind}:{quote(name, safe='')}"


def state_key(tenant: str) -> str:
    """The memory service's key of a tenant's published governance state."""
    return _memory_part(tenant, "governance", "state")


def session_key(tenant: str, session_id: str) -> str:
    """The memory service's key of a session; the id percent-encoded, as in all of these."""
    return _memory_part(tenant, "session", session_id)


def agent_key(tenant: str, agent_id: str) -> str:
    """The memory service's key of an agent."""
    return _memory_part(tenant, "agent", agent_id)


def swarm_key(tenant: str, swarm_id: str) -> str:
    """The memory service's key of a swarm."""
    return _memory_part(tenant, "swarm", swarm_id)


def cache_key(tenant: str, name: str) -> str:
    """The memory service's key of something cached."""
    return _memory_part(tenant, "cache", name)


def attestation(run_id: str) -> str:
    """Hash: what an operator's process read of the settings of the server with this run_id."""
    return f"{LEDGER}:_:attestation:{run_id}"


def job_slot(job: str, slot_ms: int) -> str:
    """String: who claimed this run of a job; has the TTL above."""
    return f"{LEDGER}:_:job-slot:{job}:{slot_ms}"


def job_history(job: str) -> str:
    """Stream: a job's runs, the newest hundred."""
    return f"{LEDGER}:_:jobs:history:{job}"


def is_disposable(key: bytes) -> bool:
    """Whether a cleanup may delete the key at all: memory keys, a projection's fold and snapshots,
    an import that was never finished.

    No stream, index, head, evidence or registry ever is, whatever a pattern or a name says.
    """
    in_memory_store = key.startswith(f"{MEMORY}:".encode())
    is_fold = fold_of_key(key) is not None
    return in_memory_store or is_fold or tenant_of_import(key) is not None
