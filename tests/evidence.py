"""What the tests of the evidence share: a sealed tenant, and an attacker's hands in Redis."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ledger import Decision, Ledger, keys
from ledger.anchor import AnchorFile
from ledger.note import Checkpoint, Note, SigningKey
from ledger.seal import Sealer
from ledger.verify import Verification, verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.servers import Server

DEPLOYMENT = "acme.example/prod"


def decision(number: int) -> Decision:
    return Decision(
        id=f"d-{number}",
        at="2026-11-22T08:00:00Z",
        agent="agent-7",
        action="send_email",
        verdict="allow",
        policy=f"cedar@{number}",
    )


@dataclass
class Case:
    """A tenant whose first 12 entries are sealed at 5 and at 12, and what an attacker can reach."""

    server: Server
    ledger: Ledger
    tenant: str
    key: SigningKey
    anchor: Path

    def __post_init__(self) -> None:
        self.client = self.server.client()
        self.stream = keys.decisions(self.tenant)
        self.head = keys.head(self.tenant)
        self.origin = f"{DEPLOYMENT}/{self.tenant}"
        self.tiles = keys.evidence_tiles(self.tenant, self.origin)
        self.copies = keys.evidence_checkpoints(self.tenant)
        self.file = AnchorFile(self.anchor, self.origin).path

    def sealer(self, key: SigningKey | None = None, anchor: Path | None = None) -> Sealer:
        return Sealer(self.ledger, key or self.key, anchor or self.anchor)

    async def append(self, first: int, last: int) -> None:
        await self.ledger.append_many(self.tenant, [decision(n) for n in range(first, last + 1)])

    async def verify(self, **options: Any) -> Verification:
        options = {"anchor": self.anchor, **options}
        return await verify(self.ledger, self.tenant, self.key.verifier(), **options)

    # -- an attacker's hands --

    def entries(self) -> list[tuple[bytes, list[bytes]]]:
        page = self.client.execute_command("XRANGE", self.stream, "-", "+")
        return [
            (entry_id, [part for pair in dict(fields).items() for part in pair])
            for entry_id, fields in page
        ]

    def rewrite(self, change: Callable[[list[tuple[bytes, list[bytes]]]], None]) -> None:
        """The stream deleted and made again, as `change` leaves its entries."""
        entries = self.entries()
        change(entries)
        self.client.delete(self.stream)
        for entry_id, fields in entries:
            self.client.execute_command("XADD", self.stream, entry_id, *fields)

    def delete(self, *seqs: int) -> None:
        entries = self.entries()
        self.client.xdel(self.stream, *(entries[seq - 1][0] for seq in seqs))

    def trim(self, length: int) -> None:
        self.client.xtrim(self.stream, length, approximate=False)

    def edit(self, seq: int, change: Callable[[list[bytes]], None]) -> None:
        self.rewrite(lambda entries: change(entries[seq - 1][1]))

    def copy(self, note: Note, size: int | None = None) -> None:
        checkpoint = Checkpoint.parse(note.text)
        entry_id = f"{checkpoint.size if size is None else size}-9"
        self.client.delete(self.copies)
        self.client.execute_command("XADD", self.copies, entry_id, "note", note.encode())

    def notes(self) -> list[bytes]:
        """The anchor's notes, without what divides them."""
        return [part + b"\n" for part in self.file.read_bytes().split(b"=\n\n")[:-1]]

    async def reseal(self, key: SigningKey, anchor: Path) -> None:
        """All evidence in Redis made again, for the entries that are there now."""
        self.client.delete(self.tiles, self.copies, self.head, keys.index(self.tenant))
        await self.ledger.reindex(self.tenant)
        await asyncio.to_thread(anchor.mkdir)
        await self.sealer(key, anchor).seal(self.tenant)


@asynccontextmanager
async def sealed_case(server: Server, tenant: str, tmp_path: Path) -> AsyncIterator[Case]:
    anchor = tmp_path / "anchor"
    anchor.mkdir()
    async with Ledger.connect(server.url) as ledger:
        case = Case(server, ledger, tenant, SigningKey.generate(DEPLOYMENT), anchor)
        try:
            await case.append(1, 5)
            await case.sealer().seal(tenant)
            await case.append(6, 12)
            await case.sealer().seal(tenant)
            yield case
        finally:
            case.client.close()


def flip(raw: bytes, at: int, bit: int = 0) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def signed(key: SigningKey, origin: str, size: int, root: bytes) -> Note:
    return Checkpoint(origin, size, root).signed(key)
