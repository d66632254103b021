"""The rows of the bench that are about evidence: hashing, sealing, proving."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger.leaf import leaf_hasher
from ledger.merkle import TileTree
from ledger.note import SigningKey
from ledger.proof import parse_proof
from ledger.prove import prove
from ledger.seal import Sealer
from ledger.stream import raw_pages
from ledger.verify import verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench import Bench

ROOT = Path(__file__).parent.parent
DEPLOYMENT = "bench.example/log"


async def leaves(bench: Bench) -> tuple[Any, Any, str]:
    """Leaf, tree and root of entries in memory, and SHA-256 of the same bytes alone."""
    await bench.reset("everysec")
    tenant, count = await bench.new_tenant(), bench.size(100_000)
    await bench.fill(tenant, count)
    async with aclosing(raw_pages(bench.ledger.server, tenant)) as found:
        pages = [page async for page in found]
    raw = [b"".join([raw_id, *fields]) for page in pages for raw_id, fields in page]

    async def ours() -> float:
        hashed, tree = leaf_hasher(f"{DEPLOYMENT}/{tenant}"), TileTree()
        begin_s = time.perf_counter()
        for page in pages:
            tree.extend([hashed(raw_id, fields) for raw_id, fields in page])
        tree.root()
        return tree.size / (time.perf_counter() - begin_s)

    async def bare() -> float:
        sha256, begin_s = hashlib.sha256, time.perf_counter()
        for one in raw:
            sha256(one).digest()
        return len(raw) / (time.perf_counter() - begin_s)

    note = f"{statistics.mean(map(len, raw)):.0f} bytes an entry"
    return ours, bare, note


async def sealing(bench: Bench, fold: Callable[[str], Awaitable[float]]) -> tuple[Any, Any]:
    """A sealer's way from the stream to a signed checkpoint on disk, and a fold of the same."""
    await bench.reset("always")
    tenant = await bench.new_tenant()
    await bench.fill(tenant, bench.size(100_000))

    async def ours() -> float:
        with tempfile.TemporaryDirectory() as anchor:
            sealer = Sealer(bench.ledger, SigningKey.generate(DEPLOYMENT), Path(anchor))
            begin_s = time.perf_counter()
            sealed = await sealer.seal(tenant)
            return sealed.entries / (time.perf_counter() - begin_s)

    async def theirs() -> float:
        return await fold(tenant)

    return ours, theirs


async def verifying(bench: Bench) -> tuple[Any, str]:
    """Verification of a tenant on the server against its anchor."""
    await bench.reset("always")
    tenant, key = await bench.new_tenant(), SigningKey.generate(DEPLOYMENT)
    await bench.fill(tenant, bench.size(100_000))
    anchor = Path(tempfile.mkdtemp(dir=bench.server.socket_path.parent))
    await Sealer(bench.ledger, key, anchor).seal(tenant)

    async def ours() -> float:
        begin_s = time.perf_counter()
        found = await verify(bench.ledger, tenant, key.verifier(), anchor=anchor)
        if not found.ok:
            sys.exit(f"not proved: {found.findings}")
        return found.entries / (time.perf_counter() - begin_s)

    return ours, tenant


async def proving(bench: Bench) -> tuple[list[float], str]:
    """Proofs of single entries of a large tenant: ms to make and to verify one."""
    await bench.reset("everysec")
    count = 100_000 if bench.quick else 1_000_000
    tenant, key = f"bench-{secrets.token_hex(4)}", SigningKey.generate(DEPLOYMENT)
    await bench.fill_with_copies(tenant, count)
    await bench.command("CONFIG", "SET", "appendfsync", "always")
    await asyncio.sleep(1.1)  # until that is known
    anchor = Path(tempfile.mkdtemp(dir=bench.server.socket_path.parent))
    begin_s = time.perf_counter()
    await Sealer(bench.ledger, key, anchor, batch_entries=count).seal(tenant)
    sealed_s = time.perf_counter() - begin_s
    made, verified, sizes, hashes = [], [], [], []
    for n in range(100):
        begin_s = time.perf_counter()
        proof = await prove(
            bench.ledger, tenant, seq=1 + n * (count // 100), key=key.verifier(), anchor=anchor
        )
        made.append((time.perf_counter() - begin_s) * 1000)
        raw = proof.encode()
        begin_s = time.perf_counter()
        parse_proof(raw).verify([key.verifier()])
        verified.append((time.perf_counter() - begin_s) * 1000)
        sizes.append(len(raw))
        hashes.append(len(proof.hashes))
    note = (
        f"{count:,} entries, sealed in {sealed_s:.1f} s; {statistics.median(hashes):.0f} hashes, "
        f"{statistics.median(sizes):,.0f} bytes with the entry; verified in "
        f"{statistics.median(verified):.2f} ms"
    )
    return made, note


@asynccontextmanager
async def sealer_beside(bench: Bench) -> AsyncIterator[None]:
    """`govledger seal` in a process of its own, as it runs beside engines."""
    folder = Path(tempfile.mkdtemp(dir=bench.server.socket_path.parent))
    (folder / "key").touch(0o600)
    (folder / "key").write_text(SigningKey.generate(DEPLOYMENT).encode())
    (folder / "anchor").mkdir()
    environment = {**os.environ, "GOVLEDGER_SEAL_SECONDS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "ledger", "seal", "--url", bench.server.url, "--json"]
    argv += ["--key-file", str(folder / "key"), "--anchor", str(folder / "anchor")]
    process = await asyncio.create_subprocess_exec(
        *argv, env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()  # it is ready
        yield
        async with asyncio.timeout(10):
            while not any((folder / "anchor").iterdir()):  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
