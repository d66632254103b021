"""The rows about projectors: a backlog folded, committed and published, by one worker or two."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ledger import keys
from projections import Projector, StateReader

if TYPE_CHECKING:
    from bench import Bench


async def fold_backlog(bench: Bench, tenant: str) -> float:
    """Entries a second: one worker, from nothing folded to published at the head."""
    projector = Projector(bench.ledger)
    for projection in projector.projections:
        await projector.store(tenant, projection.name).discard()
    begin_s = time.perf_counter()
    await projector.run_once([tenant])
    took_s = time.perf_counter() - begin_s
    state = await StateReader(bench.ledger).state(tenant)
    head = await bench.ledger.head(tenant)
    assert (state.seq, state.source) == (head.seq, "published")
    return head.seq / took_s


# -- two workers -------------------------------------------------------------------------------

_WORKER = """
import asyncio, sys
from ledger import Ledger
from ledger.service.terminal import spare_gc
from projections import Projector

async def main():
    spare_gc()
    async with Ledger.connect(sys.argv[1]) as ledger:
        projector = Projector(ledger)
        print("ready", flush=True)
        sys.stdin.readline()
        await projector.run()

asyncio.run(main())
"""


async def fold_with_workers(bench: Bench, tenants: Sequence[str], count: int) -> float:
    """Entries a second of `count` workers, each a process, that share a backlog."""
    await _forget(bench, tenants)
    workers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _WORKER, bench.server.url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(count)
    ]
    for worker in workers:
        assert worker.stdout is not None
        await worker.stdout.readline()
    begin_s = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"go\n")
    total = await _all_published(bench, tenants)
    took_s = time.perf_counter() - begin_s
    for worker in workers:
        worker.kill()
        await worker.wait()
    return total / took_s


async def _forget(bench: Bench, tenants: Sequence[str]) -> None:
    projector = Projector(bench.ledger)
    for tenant in tenants:
        for projection in projector.projections:
            await bench.command("DEL", keys.lease(tenant, projection.name, projection.version))
            await projector.store(tenant, projection.name).discard()
        await bench.command("DEL", keys.governance_state(tenant))


async def _all_published(bench: Bench, tenants: Sequence[str]) -> int:
    heads = {tenant: (await bench.ledger.head(tenant)).seq for tenant in tenants}
    reader = StateReader(bench.ledger)
    for tenant, seq in heads.items():
        await reader.state(tenant, at_least=seq, timeout_s=300)
    return sum(heads.values())
