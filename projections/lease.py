"""Who folds a tenant: a lease in the tenant's own slot, checked by every commit.

The key `lease:<projection>@<version>` holds the name of the worker that folds; it expires LEASE_MS
after that worker's last commit or claim. The name is the fencing token: the commit function refuses
any other one while the lease stands, and renews it for its holder. So a worker that was paused, and
was taken for dead, commits nothing once another has begun; a dead one's tenants are free LEASE_MS
after its last commit.

Two releases fold two versions of a projection side by side, and share the others: so a worker may
hold a part of a tenant's leases, and folds that part.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ledger import errors, keys
from ledger.server import Server
from projections.projection import Projection

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
        hint="one worker at a time folds or rebuilds it: try again when that one is done; a dead "
        f"one's lease ends by itself, {LEASE_MS // 1000} s after its last step",
        tenant=tenant,
        holder=holder,
        left_ms=left_ms,
    )


class _Held(NamedTuple):
    """What a worker surely holds of a tenant: projections' names, until a time of its clock."""

    names: frozenset[str]
    until: float


class _Others(NamedTuple):
    """Until when others hold leases of a tenant, and whether they hold all of them."""

    until: float
    all: bool


class Leases:
    """One worker's leases: those that it surely holds, and those that it knows others hold."""

    def __init__(
        self,
        server: Server,
        worker: str,
        projections: Sequence[Projection],
        *,
        rebuild: bool = False,
    ) -> None:
        """`rebuild`: the leases of those who build a projection anew, beside the live ones."""
        self._server = server
        self.worker = worker
        self._versions = {one.name: one.version for one in projections}
        self._rebuild = rebuild
        self._held: dict[str, _Held] = {}
        self._others: dict[str, _Others] = {}

    def _keys(self, tenant: str) -> list[str]:
        return [
            keys.lease(tenant, name, version, rebuild=self._rebuild)
            for name, version in self._versions.items()
        ]

    def held_elsewhere(self, tenant: str) -> bool:
        """Whether other workers are known to fold all of the tenant now: nobody need ask."""
        others = self._others.get(tenant)
        return others is not None and others.all and others.until > time.monotonic()

    def expired(self) -> list[str]:
        """The tenants of which others' leases may have run out since they were seen, each once."""
        now = time.monotonic()
        found = [tenant for tenant, others in self._others.items() if others.until <= now]
        for tenant in found:
            del self._others[tenant]
        return found

    async def take(self, tenant: str) -> frozenset[str]:
        """Claims the tenant, or goes on holding it; the names of the projections that are held.

        Raises:
            LeaseHeld: other workers fold all of them.
        """
        now = time.monotonic()
        held, others = self._held.get(tenant), self._others.get(tenant)
        is_known = others is not None and others.until > now  # that others have the rest
        is_whole = held is not None and held.names == self._versions.keys()
        if held is not None and held.until - now > _RENEW_BEFORE_S and (is_whole or is_known):
            return held.names
        answers = await self._server.function(
            "govledger_lease", self._keys(tenant), self.worker, LEASE_MS
        )
        told = dict(zip(self._versions, answers, strict=True))
        refused = {name: answer for name, answer in told.items() if answer[0]}
        names = frozenset(told.keys() - refused.keys())
        self._held.pop(tenant, None)
        self._others.pop(tenant, None)
        if names:
            self._held[tenant] = _Held(names, now + LEASE_MS / 1000)
        for name, (_, left_ms) in refused.items():
            self.lose(tenant, name, left_ms)
        if not names:
            name, (holder, left_ms) = next(iter(refused.items()))
            raise lease_held(tenant, name, holder.decode(errors="replace"), left_ms)
        return names

    def lose(self, tenant: str, name: str, left_ms: int) -> None:
        """Remembers that another worker holds a projection of the tenant."""
        held, others = self._held.pop(tenant, None), self._others.get(tenant)
        left = held.names - {name} if held is not None else frozenset[str]()
        if held is not None and left:
            self._held[tenant] = held._replace(names=left)
        until = time.monotonic() + max(left_ms, 1) / 1000
        if others is not None:  # whichever runs out first is looked at
            until = min(until, others.until)
        self._others[tenant] = _Others(until, all=not left)

    async def release(self, tenants: Iterable[str] | None = None) -> None:
        """Gives back what is held, of these tenants or of all, so that others need not wait."""
        now = time.monotonic()
        if tenants is None:
            tenants = [tenant for tenant, held in self._held.items() if held.until > now]
        for tenant in tenants:
            self._held.pop(tenant, None)
            await self._server.function("govledger_release", self._keys(tenant), self.worker)
