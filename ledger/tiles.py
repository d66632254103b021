"""The evidence tree's hashes in Redis, as C2SP tlog-tiles has them: what proofs are made of.

A log's hash `evidence:tiles:<log>` has a field `<level>/<number>` for each tile: up to 256 hashes
of 32 bytes, in all 32.1 bytes an entry. They are a convenience, never evidence: whoever can write
there can change them, so whatever is made of them is compared with a signed root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from ledger import keys
from ledger.errors import NotProved, ServerError
from ledger.merkle import (
    HASH_BYTES,
    TILE_WIDTH,
    Node,
    TileTree,
    cover,
    perfect_root,
    range_hash,
)
from ledger.server import Server

__all__ = ["DerivedTiles", "Tiles", "hashes_of", "partial_rows"]

TileRows = dict[tuple[int, int], list[bytes]]

_LEVELS: Final = 8  # of the tree in one of tiles
_WRITE_AT_ONCE: Final = 128


def partial_rows(size: int) -> list[tuple[int, int, int]]:
    """Level, number and width of the last tile of each level, which may not be full, bottom up."""
    found, level = [], 0
    while size >> (_LEVELS * level) or level == 0:
        count = size >> (_LEVELS * level)
        found.append((level, count // TILE_WIDTH, count % TILE_WIDTH))
        level += 1
    return found


class Tiles:
    """One log's tiles."""

    def __init__(self, server: Server, tenant: str, origin: str) -> None:
        self._server = server
        self._key = keys.evidence_tiles(tenant, origin)
        self._tenant = tenant
        self._full: list[tuple[int, int, list[bytes]]] = []

    def add_full(self, level: int, number: int, hashes: list[bytes]) -> None:
        """Takes a tile that is full, to be written by the next `flush`."""
        self._full.append((level, number, hashes))

    async def flush(self) -> None:
        """Writes the tiles that were taken."""
        taken, self._full = self._full, []
        for first in range(0, len(taken), _WRITE_AT_ONCE):
            await self._write(taken[first : first + _WRITE_AT_ONCE])

    async def write_rows(self, tree: TileTree) -> None:
        """Writes the last tiles of a tree, without which it cannot go on later."""
        numbers = partial_rows(tree.size)
        rows = [
            (level, number, tree.rows[level])
            for level, number, width in numbers
            if width and level < len(tree.rows)
        ]
        await self._write(rows)

    async def _write(self, tiles: list[tuple[int, int, list[bytes]]]) -> None:
        if tiles:
            fields = [
                part
                for level, number, hashes in tiles
                for part in (f"{level}/{number}", b"".join(hashes))
            ]
            await self._server.function("govledger_write_tiles", [self._key], *fields)

    async def any(self) -> bool:
        """Whether there are tiles, or something in their place."""
        return bool(await self._server.command(self._key, "EXISTS", self._key))

    async def read(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[bytes]]:
        """Tiles by level and number; those that are absent, or no tiles, are left out."""
        names = list(wanted)
        found: dict[tuple[int, int], list[bytes]] = {}
        if not names:
            return found
        fields = [f"{level}/{number}" for level, number in names]
        try:
            replies = await self._server.command(self._key, "HMGET", self._key, *fields)
        except ServerError as error:
            if "WRONGTYPE" not in error.message:
                raise
            return found
        for name, raw in zip(names, replies, strict=True):
            if raw and len(raw) % HASH_BYTES == 0 and len(raw) <= HASH_BYTES * TILE_WIDTH:
                found[name] = [raw[at : at + HASH_BYTES] for at in range(0, len(raw), HASH_BYTES)]
        return found

    async def tree(self, size: int) -> TileTree | None:
        """The tree at a size that was sealed, to go on from; None where its tiles are gone."""
        numbers = partial_rows(size)
        found = await self.read((level, number) for level, number, width in numbers if width)
        rows = []
        for level, number, width in numbers:
            row = found.get((level, number), [])[:width] if width else []
            if len(row) != width:
                return None
            rows.append(row)
        return TileTree.resumed(size, rows, self.add_full)

    async def range_hashes(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The hash of each range of leaves.

        Raises:
            NotProved: a tile is gone.
        """
        node = await self.nodes(one for start, end in ranges for one in cover(start, end))
        return [range_hash(start, end, node) for start, end in ranges]

    async def nodes(self, wanted: Iterable[Node]) -> Callable[[Node], bytes]:
        """The hash of each node.

        Raises:
            NotProved: a tile is gone.
        """
        nodes = list(wanted)
        tiles = await self.read({_place(one)[:2] for one in nodes})
        return hashes_of(nodes, tiles, f"{self._key} of tenant {self._tenant}")


def hashes_of(nodes: Iterable[Node], tiles: TileRows, where: str) -> Callable[[Node], bytes]:
    """The hash of each node.

    Raises:
        NotProved: a tile is not there, or too short; `where` is for the message.
    """
    hashes = {}
    for one in nodes:
        level, number, first, width = _place(one)
        row = tiles.get((level, number), [])[first : first + width]
        if len(row) != width:
            raise NotProved(
                f"tile {level}/{number} of {where} is gone or cut",
                hint="govledger seal TENANT --once --rebuild-tiles",
                reason="tiles-damaged",
            )
        hashes[one] = perfect_root(row)
    return hashes.__getitem__


class DerivedTiles:
    """The few tiles that lead to some nodes, made of all leaves: for where Redis has none."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = list(nodes)
        self._wanted = {_place(one)[:2] for one in self._nodes}
        self._rows: TileRows = {}
        self.tree = TileTree(self._keep)

    def _keep(self, level: int, number: int, hashes: list[bytes]) -> None:
        if (level, number) in self._wanted:
            self._rows[level, number] = hashes

    def hashes(self) -> Callable[[Node], bytes]:
        """The hash of each node, of the leaves that `tree` was given."""
        rows = dict(self._rows)
        for level, number, _ in partial_rows(self.tree.size):
            if level < len(self.tree.rows):
                rows[level, number] = self.tree.rows[level]
        return hashes_of(self._nodes, rows, "the tree")


def _place(node: Node) -> tuple[int, int, int, int]:
    """The tile that has a node, and which of its hashes lead to it."""
    level, index = node
    below = level % _LEVELS
    first = index << below
    return level // _LEVELS, first // TILE_WIDTH, first % TILE_WIDTH, 1 << below
