"""Folds of projections that nobody here knows, in a server that was restored from a snapshot.

They are of the epoch before, and only who knows a projection can fold it anew. Left there they
would stop that projection at its next start, as rolled back.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import NamedTuple

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import Server
from projections import Projector

__all__ = ["forget_unknown_folds"]


class _Fold(NamedTuple):
    tenant: str
    name: str
    version: int


async def forget_unknown_folds(ledger: Ledger) -> list[str]:
    """Deletes them, and what was published of them, on a server of one's own; their names, such as
    `deny-streak@1`.
    """
    server = ledger.server
    known = {(one.name, one.version) for one in Projector(ledger).projections}
    found: set[_Fold] = set()
    for kind in ("projection", "snapshot"):
        async with aclosing(server.scan(f"{keys.LEDGER}:{{*}}:{kind}:*")) as pages:
            async for page in pages:
                folds = {one: _Fold(*of) for one in page if (of := keys.fold_of_key(one))}
                unknown = {one: of for one, of in folds.items() if of[1:] not in known}
                if unknown:
                    await server.command("", "UNLINK", *unknown)
                    found.update(unknown.values())
    for fold in found:
        await _forget(server, fold)
        if fold.name not in {name for name, _ in known}:
            await _unpublish(ledger, fold)
    return sorted({f"{one.name}@{one.version}" for one in found})


async def _forget(server: Server, fold: _Fold) -> None:
    """What the tenant's other hashes say of it."""
    active, quarantine = (
        keys.projection_active(fold.tenant),
        keys.projection_quarantine(fold.tenant),
    )
    taken = await server.command(active, "HGET", active, fold.name)
    if taken == str(fold.version).encode():
        await server.command(active, "HDEL", active, fold.name)
    prefix = f"{fold.name}@{fold.version}:".encode()
    fields = await server.command(quarantine, "HKEYS", quarantine)
    gone = [field for field in fields if field.startswith(prefix)]
    if gone:
        await server.command(quarantine, "HDEL", quarantine, *gone)


async def _unpublish(ledger: Ledger, fold: _Fold) -> None:
    key = keys.published(fold.tenant, fold.name).removeprefix(keys.MEMORY_PREFIX)
    try:
        entry = await ledger.memory.get_entry(key)
    except errors.MalformedValue:
        return  # nothing that a projector has published
    if entry is not None and entry.metadata.get("projection") == fold.name:
        await ledger.memory.delete(key)
