"""Snapshots of a projection: from where a fold to some point in the past begins.

Copy on write: a snapshot is made with a commit, and costs the entity `state`, compressed. What any
other entity was before its first change since then is put there by the commit that changes it. So
what all snapshots have of entities grows with the follow-ups, never with copies of a whole tenant.

At most 64 are kept of a version, a few thousand entries apart in a small tenant and a sixty-fourth
of the whole in a large one. Where there are more, the one goes whose neighbours are the closest.

A projection has them if its attribute `keeps_snapshots` is true. They pay where entities change
seldom: one that changes with each entry, such as an agent's, would be copied as often.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from operator import attrgetter
from typing import Final, NamedTuple

from ledger import keys
from ledger.stream import Position

__all__ = ["SNAPSHOTS_KEPT", "Kept", "parse_list", "snapshot_is_due", "spare", "unpacked"]

SNAPSHOTS_KEPT: Final = 64
MIN_ENTRIES: Final = 2_000
"""Apart: to fold so many takes some 15 ms."""

FIELD: Final = "e:"
_LEVEL: Final = 1


class Kept(NamedTuple):
    """A snapshot that is kept. Without a position it is being dropped, and only has entities."""

    seq: int
    position: Position | None
    build: str


def parse_list(raw: Mapping[bytes, bytes]) -> list[Kept]:
    """The snapshots of a list's hash, in order. One that is being dropped, or of which somebody
    damaged what the list says, has no position; what names no seq is none.
    """
    found = []
    for seq, about in raw.items():
        if not seq.isdigit():
            continue
        position, _, build = about.decode(errors="replace").partition(" ")
        try:
            found.append(Kept(int(seq), Position.parse(position), build))
        except ValueError:
            found.append(Kept(int(seq), None, ""))
    return sorted(found, key=attrgetter("seq"))


def snapshot_is_due(kept: list[Kept], seq: int) -> bool:
    """Whether a commit up to `seq` is to make one."""
    last = kept[-1].seq if kept else 0
    return seq - last >= max(MIN_ENTRIES, seq // SNAPSHOTS_KEPT)


def spare(kept: list[Kept]) -> int | None:
    """The place of the one to drop; None where there is room. The latest one is never dropped."""
    for place, one in enumerate(kept[:-1]):
        if one.position is None:
            return place
    if len(kept) <= SNAPSHOTS_KEPT:
        return None
    seqs = [0, *(one.seq for one in kept)]
    return min(range(len(kept) - 1), key=lambda place: seqs[place + 2] - seqs[place])


def packed(state: bytes) -> bytes:
    """An entity's bytes as they are kept."""
    return zlib.compress(state, _LEVEL)


def unpacked(raw: bytes) -> bytes:
    """What `packed` was given."""
    return zlib.decompress(raw)


def key_of(live: str, seq: int) -> str:
    """The key of a snapshot by that of the list."""
    return f"{live}:{seq}"


def list_key(tenant: str, name: str, version: int, *, rebuild: bool) -> str:
    """The key of the list; a rebuild has one of its own beside it."""
    live = keys.snapshots(tenant, name, version)
    return f"{live}:rebuild" if rebuild else live
