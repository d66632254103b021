"""Who folds a tenant: a lease in the tenant's own slot, checked by every commit.

The key `lease:<projection>` holds the name of the worker that folds; it expires LEASE_MS after
that worker's last commit or claim. The name is the fencing token: the commit function refuses any
other one while the lease stands, and renews it for its holder. So a worker that was paused, and
was taken for dead, commits nothing once another has begun; a dead one's tenants are free LEASE_MS
after its last commit.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Final

from ledger import errors, keys
from ledger.server import Server

__all__ = ["LEASE_MS", "Leases", "lease_held", "worker_name"]

LEASE_MS: Final = 5_000
_RENEW_BEFORE_S: Final = 2.0


def worker_name() -> str:
    """`host-pid-random`: readable in `govledger projections`, and never twice."""
    host = "".join(char for char in socket.gethostname() if char.isalnum() or char in "._-")
    return f"{host[:64]}-{os.getpid()}-{secrets.token_hex(4)}"


def lease_held(tenant: str, name: str, holder: str, left_ms: int) -> errors.LeaseHeld:
    """What a worker that is not the holder is told."""
    return errors.LeaseHeld(
        f"tenant {tenant}: {name} is folded by {holder}, for another {left_ms} ms at least",
        hint="it goes on from what that worker commits",
        tenant=tenant,
        holder=holder,
        left_ms=left_ms,
    )


class Leases:
    """One worker's leases: those that it surely holds, and those that it knows others hold."""

    def __init__(self, server: Server, worker: str, names: Sequence[str]) -> None:
        self._server = server
        self.worker = worker
        self._names = tuple(names)
        self._sure_until: dict[str, float] = {}
        self._others_until: dict[str, float] = {}

    def held_elsewhere(self, tenant: str) -> bool:
        """Whether another worker is known to fold the tenant now: nobody need ask."""
        until = self._others_until.get(tenant)
        if until is None:
            return False
        if until > time.monotonic():
            return True
        del self._others_until[tenant]
        return False

    async def take(self, tenant: str) -> None:
        """Claims the tenant, or goes on holding it.

        Raises:
            LeaseHeld: another worker folds it.
        """
        now = time.monotonic()
        if self._sure_until.get(tenant, 0) - now > _RENEW_BEFORE_S:
            return
        on = [keys.lease(tenant, name) for name in self._names]
        answers = await self._server.function("govledger_lease", on, self.worker, LEASE_MS)
        for name, (holder, left_ms) in zip(self._names, answers, strict=True):
            if holder:
                held = lease_held(tenant, name, holder.decode(errors="replace"), left_ms)
                self.lose(tenant, left_ms)
                raise held
        self._sure_until[tenant] = now + LEASE_MS / 1000
        self._others_until.pop(tenant, None)

    def lose(self, tenant: str, left_ms: int) -> None:
        """Remembers that another worker holds the tenant."""
        self._sure_until.pop(tenant, None)
        self._others_until[tenant] = time.monotonic() + max(left_ms, 1) / 1000

    async def release(self, tenants: Iterable[str] | None = None) -> None:
        """Gives back what is held, of these tenants or of all, so that others need not wait."""
        now = time.monotonic()
        for tenant in list(self._sure_until if tenants is None else tenants):
            if self._sure_until.pop(tenant, 0) > now:
                on = [keys.lease(tenant, name) for name in self._names]
                await self._server.function("govledger_release", on, self.worker)
