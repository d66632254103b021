"""Every key, its grammar and its TTL rule: the only place that spells a key.

Grammar: `claude-flow:{store}:{tenant}:{type}:{id}` (the operations guide's, with two stores).

`memory`  published copies, without braces, as the guide's clients read them; TTL by the guide's
          rule (`MEMORY_DEFAULT_TTL_SECONDS`, a caller's own, 0 = none). Anyone may delete them.
`ledger`  the record and what is exact. No TTL, ever, but for what says so here. The braces round
          the tenant are real: they are the Redis Cluster hash tag, so one function may touch
          several of a tenant's keys.

What belongs to no tenant has `_` in the tenant's place, which no tenant can be called.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote

from ledger.errors import InvalidTenant

__all__ = [
    "ATTESTATION_TTL_SECONDS",
    "FEED",
    "TENANTS",
    "agent_state",
    "attestation",
    "checked_tenant",
    "decisions",
    "evidence_checkpoints",
    "evidence_tiles",
    "governance_state",
    "head",
    "index",
    "index_rebuild",
    "is_tenant",
    "projection",
    "projection_active",
    "projection_bucket",
    "projection_quarantine",
    "published",
]

LEDGER: Final = "claude-flow:ledger"
MEMORY: Final = "claude-flow:memory"

TENANTS: Final = f"{LEDGER}:_:tenants:all"
"""Set of every tenant's name, acknowledged before the tenant's first append."""

FEED: Final = f"{LEDGER}:_:feed:0"
"""Stream of hints that a tenant has news; capped, lossy by design, the sweep is the truth."""

ATTESTATION_TTL_SECONDS: Final = 86_400
"""The one ledger key here with a TTL: what an operator's process saw of a server's settings."""

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


def evidence_checkpoints(tenant: str) -> str:
    """Stream, capped: copies of the latest signed checkpoints; entry id `<tree size>-<copy>`."""
    return f"{LEDGER}:{{{tenant}}}:evidence:checkpoints"


def evidence_tiles(tenant: str) -> str:
    """Hash: `<level>/<number>` → up to 256 node hashes of the evidence tree (C2SP tlog-tiles)."""
    return f"{LEDGER}:{{{tenant}}}:evidence:tiles"


def published(tenant: str, name: str) -> str:
    """String: a projection's published state in the guide's envelope; has a TTL."""
    return f"{MEMORY}:{tenant}:{name}:state"


def governance_state(tenant: str) -> str:
    """String: the current governance state, as the guide's readers know it; has a TTL."""
    return published(tenant, "governance")


def agent_state(tenant: str, agent_id: str) -> str:
    """String: one agent's published state; the id percent-encoded, so two ids never share a key."""
    return f"{MEMORY}:{tenant}:agent:{quote(agent_id, safe='')}"


def attestation(run_id: str) -> str:
    """Hash: what an operator's process read of the settings of the server with this run_id."""
    return f"{LEDGER}:_:attestation:{run_id}"
