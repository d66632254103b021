"""The tree and its proofs, against RFC 6962's vectors and two other implementations."""

from __future__ import annotations

import hashlib

import pymerkle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger import merkle
from ledger.errors import NotProved
from ledger.merkle import CompactRange, TileTree, cover, leaf_hash, perfect_root, range_hash

# The leaves and roots of Certificate Transparency's own tests.
LEAVES = [
    bytes.fromhex(one)
    for one in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
PATH_0_OF_8 = [
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
]
PROOF_6_TO_8 = [
    "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
]

HASHES = [leaf_hash(b"%d" % n) for n in range(1100)]
SIZES = st.integers(1, len(HASHES))


def node(one):
    level, index = one
    return perfect_root(HASHES[index << level : (index + 1) << level])


def root(size):
    return range_hash(0, size, node)


def inclusion(index, size):
    return [range_hash(*one, node) for one in merkle.inclusion_ranges(index, size)]


def consistency(old, new):
    return [range_hash(*one, node) for one in merkle.consistency_ranges(old, new)]


def test_reference_vectors():
    """Roots and proofs of Certificate Transparency's reference leaves come out."""
    assert hashlib.sha256().digest() == merkle.EMPTY_ROOT
    hashed = list(map(leaf_hash, LEAVES))

    def of(one):
        return perfect_root(hashed[one[1] << one[0] : (one[1] + 1) << one[0]])

    assert [range_hash(0, size, of).hex() for size in range(1, 9)] == ROOTS
    path = [range_hash(*one, of).hex() for one in merkle.inclusion_ranges(0, 8)]
    assert path == PATH_0_OF_8
    proof = [range_hash(*one, of).hex() for one in merkle.consistency_ranges(6, 8)]
    assert proof == PROOF_6_TO_8


@given(st.lists(st.integers(0, 300), max_size=8))
def test_trees_grow_alike_however_they_are_cut(cuts):
    """Compact range and tiles give the root of all leaves, whatever batches they came in."""
    compact, tiles, at = CompactRange(), TileTree(), 0
    for width in cuts:
        part = HASHES[at : at + width]
        assert tiles.root_with(part) == root(at + len(part)) or not at + len(part)
        compact.extend(part)
        tiles.extend(part)
        at += len(part)
    expected = root(at) if at else merkle.EMPTY_ROOT
    assert compact.root() == tiles.root() == expected
    assert compact.size == tiles.size == at


@given(st.lists(st.integers(1, 700), min_size=1, max_size=4))
def test_full_tiles_are_those_of_the_format(widths):
    """Each full tile is handed out once, in order, with the hashes that tlog-tiles puts there."""
    seen = {}
    tree = TileTree(lambda level, number, row: seen.setdefault((level, number), list(row)))
    total = min(sum(widths), len(HASHES))
    at = 0
    for width in widths:
        tree.extend(HASHES[at : min(at + width, total)])
        at = min(at + width, total)
    assert set(seen) == {(0, number) for number in range(total // 256)}
    for (_, number), row in seen.items():
        assert row == HASHES[number * 256 : (number + 1) * 256]


@settings(max_examples=40)
@given(st.data())
def test_other_implementation_agrees(data):
    """Roots and inclusion paths are pymerkle's, for generated trees."""
    size = data.draw(st.integers(1, 300))
    index = data.draw(st.integers(0, size - 1))
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    tree.append_entries([b"%d" % n for n in range(size)])
    assert tree.get_root() == root(size)
    theirs = tree.prove_inclusion(index + 1)
    assert theirs.path == [HASHES[index], *inclusion(index, size)]


@given(st.data())
def test_rust_implementation_accepts_our_proofs(data):
    """Inclusion and consistency proofs verify with an independent verifier."""
    theirs = pytest.importorskip("metamorphic_log")
    size = data.draw(SIZES)
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    theirs.verify_inclusion(index, size, HASHES[index], inclusion(index, size), root(size))
    theirs.verify_consistency(old, size, consistency(old, size), root(old), root(size))


@given(st.data())
def test_proofs_prove_their_own_and_nothing_else(data):
    """Every proof leads to the root; for another leaf, index or size it does not."""
    size = data.draw(SIZES)
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion(index, size)
    assert merkle.root_from_inclusion(index, size, HASHES[index], proof) == root(size)
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        assert refused(lambda: merkle.root_from_inclusion(index, size, HASHES[other], proof), size)
        assert refused(lambda: merkle.root_from_inclusion(other, size, HASHES[index], proof), size)
    old = data.draw(st.integers(0, size))
    good = (root(old) if old else merkle.EMPTY_ROOT, root(size), consistency(old, size))
    merkle.check_consistency(old, size, *good)
    if 0 < old < size:
        with pytest.raises(NotProved):
            merkle.check_consistency(old, size, root(size), good[1], good[2])
        with pytest.raises(NotProved):
            merkle.check_consistency(old, size, good[0], root(old), good[2])
        with pytest.raises(NotProved):
            merkle.check_consistency(old, size, good[0], good[1], [*good[2], good[0]])


def refused(prove, size):
    try:
        return prove() != root(size)
    except NotProved:
        return True


@given(st.data())
def test_ranges_prove_all_between(data):
    """A range proof leads to the root; with a leaf left out, doubled or changed it does not."""
    size = data.draw(SIZES)
    start = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(start + 1, size))
    left, right = list(map(node, cover(0, start))), list(map(node, cover(end, size)))
    leaves = HASHES[start:end]
    assert merkle.root_from_range(start, size, leaves, left, right) == root(size)
    at = data.draw(st.integers(0, len(leaves) - 1))
    for forged in (
        leaves[:at] + leaves[at + 1 :],
        leaves[:at] + leaves[at : at + 1] + leaves[at:],
        [*leaves[:at], b"x" * 32, *leaves[at + 1 :]],
    ):
        assert refused(lambda: merkle.root_from_range(start, size, forged, left, right), size)  # noqa: B023


@pytest.mark.parametrize(
    ("index", "size", "proof"),
    [(0, 0, []), (5, 5, []), (-1, 3, []), (0, 2**63, []), (0, 8, [b"x" * 32] * 64), (0, 8, [b"x"])],
)
def test_impossible_proofs_are_errors(index, size, proof):
    """A proof longer than any tree, of no tree, or of other hashes is refused, quickly."""
    with pytest.raises(NotProved):
        merkle.root_from_inclusion(index, size, HASHES[0], proof)
