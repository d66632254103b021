"""The Merkle tree of RFC 6962 §2.1 (= RFC 9162 §2.1) over SHA-256: pure, without I/O.

Leaves have ordinals from 0. A *node* is a perfect subtree: `(level, index)` covers the leaves
`index << level` to `(index + 1) << level`. A range of leaves that begins where a subtree may begin
is a few nodes, largest first (`cover`), and its hash is theirs, folded from the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from ledger.errors import NotProved

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "MAX_PROOF_HASHES",
    "MAX_SIZE",
    "TILE_WIDTH",
    "CompactRange",
    "Node",
    "TileTree",
    "check_consistency",
    "consistency_ranges",
    "cover",
    "inclusion_ranges",
    "leaf_hash",
    "node_hash",
    "perfect_root",
    "range_hash",
    "root_from_inclusion",
    "root_from_range",
]

HASH_BYTES: Final = 32
MAX_SIZE: Final = 2**63 - 1
MAX_PROOF_HASHES: Final = 63
TILE_WIDTH: Final = 256
_TILE_LEVELS: Final = 8
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()

Node = tuple[int, int]
_sha256 = hashlib.sha256


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 ‖ data)."""
    return _sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right)."""
    return _sha256(b"\x01" + left + right).digest()


def perfect_root(hashes: Sequence[bytes]) -> bytes:
    """The root over a power of two of nodes of one level."""
    sha256, row = _sha256, hashes
    while len(row) > 1:
        pairs = iter(row)
        row = [
            sha256(b"\x01" + left + right).digest()
            for left, right in zip(pairs, pairs, strict=True)
        ]
    return row[0]


def cover(start: int, end: int) -> Iterator[Node]:
    """The largest nodes that cover the leaves `start` to `end` (exclusive), in order."""
    while start < end:
        level = (end - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        yield level, start >> level
        start += 1 << level


def range_hash(start: int, end: int, node: Callable[[Node], bytes]) -> bytes:
    """The hash of a subtree over the leaves `start` to `end`, of the nodes that `node` gives."""
    hashes = [node(one) for one in cover(start, end)]
    if not hashes:
        return EMPTY_ROOT
    return _folded(hashes)


def _folded(hashes: list[bytes]) -> bytes:
    root = hashes[-1]
    for left in reversed(hashes[:-1]):
        root = node_hash(left, root)
    return root


class CompactRange:
    """A tree's size and the few nodes that its root, and every later root, follow from."""

    __slots__ = ("nodes", "size")

    def __init__(self, size: int = 0, nodes: Iterable[bytes] = ()) -> None:
        """`nodes`: the hashes of `cover(0, size)`."""
        self.size = size
        self.nodes = list(nodes)
        if len(self.nodes) != size.bit_count():
            raise NotProved(
                f"a tree of size {size} has {size.bit_count()} nodes, not {len(self.nodes)}",
                reason="malformed",
            )

    def extend(self, leaves: Sequence[bytes]) -> None:
        """Adds leaf hashes."""
        for level, index in cover(self.size, self.size + len(leaves)):
            first = (index << level) - self.size
            self.push(level, perfect_root(leaves[first : first + (1 << level)]))
            leaves = leaves[first + (1 << level) :]

    def push(self, level: int, node: bytes) -> None:
        """Adds one perfect subtree where the tree ends; its size must allow that."""
        filled = self.size >> level
        while filled & 1:
            node = node_hash(self.nodes.pop(), node)
            filled >>= 1
        self.nodes.append(node)
        self.size += 1 << level

    def root(self) -> bytes:
        """The root of the whole tree."""
        return _folded(self.nodes) if self.nodes else EMPTY_ROOT


class TileTree:
    """A growing tree as tiles of 256 hashes (C2SP tlog-tiles): `rows` has the last tile, not yet
    full, of each level; a full one is handed to `on_full(level, number, hashes)`.
    """

    def __init__(self, on_full: Callable[[int, int, list[bytes]], None] | None = None) -> None:
        self.size = 0
        self.rows: list[list[bytes]] = [[]]
        self._on_full = on_full

    @classmethod
    def resumed(
        cls,
        size: int,
        rows: list[list[bytes]],
        on_full: Callable[[int, int, list[bytes]], None] | None = None,
    ) -> TileTree:
        """A tree that goes on from what was kept of it."""
        tree = cls(on_full)
        tree.size, tree.rows = size, rows
        return tree

    def extend(self, leaves: list[bytes]) -> None:
        """Adds leaf hashes."""
        self.size += len(leaves)
        at, row = 0, self.rows[0]
        while at < len(leaves):
            taken = leaves[at : at + TILE_WIDTH - len(row)]
            row += taken
            at += len(taken)
            if len(row) == TILE_WIDTH:
                self._close(0, (self.size - len(leaves) + at) // TILE_WIDTH - 1)
                row = self.rows[0]

    def _close(self, level: int, number: int) -> None:
        row = self.rows[level]
        if self._on_full:
            self._on_full(level, number, row)
        self.rows[level] = []
        if level + 1 == len(self.rows):
            self.rows.append([])
        above = self.rows[level + 1]
        above.append(perfect_root(row))
        if len(above) == TILE_WIDTH:
            self._close(level + 1, number // TILE_WIDTH)

    def root(self) -> bytes:
        """The root of the whole tree."""
        return self.root_with([])

    def root_with(self, leaves: list[bytes]) -> bytes:
        """The root as it would be with so many leaves more."""
        tree = CompactRange(self.size, self._nodes())
        tree.extend(leaves)
        return tree.root()

    def _nodes(self) -> Iterator[bytes]:
        for row in reversed(self.rows):
            for level, index in cover(0, len(row)):
                first = index << level
                yield perfect_root(row[first : first + (1 << level)])


# -- proofs ------------------------------------------------------------------------------------


def inclusion_ranges(index: int, size: int) -> list[tuple[int, int]]:
    """The ranges of leaves whose hashes prove leaf `index`, from its sibling to the root's child:
    PATH(m, D[n]) of RFC 6962 §2.1.1.
    """
    assert 0 <= index < size
    found = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            found.append((middle, end))
            end = middle
        else:
            found.append((start, middle))
            start = middle
    return found[::-1]


def consistency_ranges(old: int, new: int) -> list[tuple[int, int]]:
    """The ranges of leaves whose hashes prove that a tree of size `new` begins with the one of size
    `old`: PROOF(m, D[n]) of RFC 6962 §2.1.2. None where `old` is 0 or `new`.
    """
    assert 0 <= old <= new
    if old in (0, new):
        return []
    found = []
    start, end, whole = 0, new, True
    while old != end:
        middle = start + _split(end - start)
        if old <= middle:
            found.append((middle, end))
            end = middle
        else:
            found.append((start, middle))
            start, whole = middle, False
    if not whole:
        found.append((start, end))
    return found[::-1]


def _split(width: int) -> int:
    """The largest power of two smaller than `width`."""
    return 1 << (width - 1).bit_length() - 1


def _checked_hashes(proof: Sequence[bytes]) -> None:
    if len(proof) > MAX_PROOF_HASHES or any(len(one) != HASH_BYTES for one in proof):
        raise NotProved(
            f"a proof has at most {MAX_PROOF_HASHES} hashes of {HASH_BYTES} bytes",
            reason="malformed",
        )


def root_from_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes]) -> bytes:
    """The root that an inclusion proof leads to: RFC 9162 §2.1.3.2.

    Raises:
        NotProved: the proof is too long or too short for such a tree.
    """
    _checked_hashes(proof)
    if not 0 <= index < size <= MAX_SIZE:
        raise NotProved(f"a tree of size {size} has no leaf {index}", reason="malformed")
    inner, root = index, leaf
    last = size - 1
    for hashed in proof:
        if last == 0:
            raise NotProved("the proof is longer than the tree is high", reason="malformed")
        if inner & 1 or inner == last:
            root = node_hash(hashed, root)
            while not inner & 1 and inner:
                inner >>= 1
                last >>= 1
        else:
            root = node_hash(root, hashed)
        inner >>= 1
        last >>= 1
    if last:
        raise NotProved("the proof is shorter than the tree is high", reason="malformed")
    return root


def check_consistency(
    old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Whether the tree of size `new` begins with the one of size `old`: RFC 9162 §2.1.4.2.

    Raises:
        NotProved: it does not follow from the proof.
    """
    _checked_hashes(proof)
    if not 0 <= old <= new <= MAX_SIZE:
        raise NotProved(f"a tree cannot shrink from {old} to {new}", reason="inconsistent")
    if old in (0, new):
        if proof or (old == new and old_root != new_root) or (old == 0 and old_root != EMPTY_ROOT):
            raise NotProved(f"the trees of sizes {old} and {new} differ", reason="inconsistent")
        return
    hashes = list(proof)
    if old & (old - 1) == 0:
        hashes.insert(0, old_root)  # the old tree is one node of the new one
    if _consistent_roots(old, new, hashes) != (old_root, new_root):
        raise NotProved(
            f"the tree of size {new} does not begin with that of size {old}", reason="inconsistent"
        )


def _consistent_roots(old: int, new: int, hashes: list[bytes]) -> tuple[bytes, bytes]:
    inner, last = old - 1, new - 1
    while inner & 1:
        inner >>= 1
        last >>= 1
    if not hashes:
        raise NotProved("the proof is empty", reason="malformed")
    first = second = hashes[0]
    for hashed in hashes[1:]:
        if last == 0:
            raise NotProved("the proof is longer than the tree is high", reason="malformed")
        if inner & 1 or inner == last:
            first, second = node_hash(hashed, first), node_hash(hashed, second)
            while not inner & 1 and inner:
                inner >>= 1
                last >>= 1
        else:
            second = node_hash(second, hashed)
        inner >>= 1
        last >>= 1
    if last:
        raise NotProved("the proof is shorter than the tree is high", reason="malformed")
    return first, second


def root_from_range(
    start: int, size: int, leaves: Sequence[bytes], left: Sequence[bytes], right: Sequence[bytes]
) -> bytes:
    """The root of a tree whose leaves from `start` on are `leaves`; `left` and `right` are the
    hashes of the nodes that cover what lies before and behind them.

    Raises:
        NotProved: their numbers do not fit such a tree.
    """
    _checked_hashes(left)
    _checked_hashes(right)
    end = start + len(leaves)
    if not 0 <= start < end <= size <= MAX_SIZE:
        raise NotProved(f"a tree of size {size} has no {start}..{end}", reason="malformed")
    tree = CompactRange(start, left)
    tree.extend(leaves)
    behind = list(cover(end, size))
    if len(behind) != len(right):
        raise NotProved(
            f"{len(behind)} nodes lie behind leaf {end} of {size}, not {len(right)}",
            reason="malformed",
        )
    for (level, _), hashed in zip(behind, right, strict=True):
        tree.push(level, hashed)
    return tree.root()
