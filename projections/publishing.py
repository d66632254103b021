"""Published copies: put so that nobody, however long it was paused, replaces a later one.

The copies lie in other slots than what is committed, so no function can compare the two. Therefore
one that is older, of the same epoch and version, is replaced at once; any other is answered by the
end of its text. Who publishes then asks what is true by now (`Facts`), and replaces it where that
says so, if it still is, byte for byte, what was looked at.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from ledger.memory import iso_ms
from ledger.server import LIBRARY_VERSION, Reply, Server, pack
from ledger.stream import Head, Position

__all__ = ["Copy", "Facts", "Seen", "Standing", "copy_text", "put"]

_NOBODY_TOLD: Final = 2
_SEEN: Final = re.compile(
    rb'"metadata":\{"epoch":"([0-9a-f]+)","position":"[^"]*","seq":(\d+),"projection":"[^"{}]*",'
    rb'"version":(\d+)[^{}]*\}\}'
)
_log = logging.getLogger("ledger")


class Standing(StrEnum):
    """What a version of a projection is to readers, and so to those who fold it.

    active      the one they take, or the first one
    pinned      the one they take by command, whatever later one there is
    next        newer than the one they take: it takes over when it has caught up
    superseded  older than the one they take, or newer while an older one is pinned: not folded
    """

    ACTIVE = "active"
    PINNED = "pinned"
    NEXT = "next"
    SUPERSEDED = "superseded"


class Facts(NamedTuple):
    """What is true of a tenant and a version of a projection, read after a copy was looked at."""

    head: Head
    standing: Standing
    position: Position | None
    stopped: str | None


class Seen(NamedTuple):
    """A copy that lies under a key: what the end of its text says, and that text."""

    epoch: str
    seq: int
    version: int
    text: bytes


class Copy(NamedTuple):
    """What is to be published: a value's JSON, how far it is folded, and why no further."""

    value: bytes
    position: Position
    version: int
    stopped: str | None
    metadata: bytes

    def is_like(self, there: Seen) -> bool:
        """Whether the copy that is there is of the same version and as far."""
        return (there.epoch, there.seq) == self.position[:2] and there.version == self.version

    def may_replace(self, there: Seen, now: Facts, *, anew: bool) -> bool:
        """Whether this one is to be taken instead; `anew`: it was made by a rebuild."""
        at = self.position
        if there.epoch != at.epoch:
            return now.head.epoch == at.epoch
        if there.version > self.version:
            return now.standing is Standing.PINNED
        if there.version < self.version:
            return now.standing is not Standing.SUPERSEDED and there.seq <= at.seq
        if there.seq > at.seq:  # which nobody can have folded where the head has not come so far
            return anew and now.head.epoch == at.epoch and there.seq > now.head.seq
        return anew or (now.position == at and now.stopped == self.stopped)

    def is_worth_a_look(self, there: Seen, *, anew: bool) -> bool:
        """Whether `may_replace` can be true: not where it is ahead or the same already."""
        if anew or (there.epoch, there.version) != (self.position.epoch, self.version):
            return True
        return there.seq == self.position.seq and not there.text.endswith(self.metadata + b"}")


def copy_text(server: Server, reply: Reply) -> bytes:
    """What lies under a copy's key, by the reply to GET; nothing where that is no text."""
    if isinstance(reply, Exception) and "WRONGTYPE" in str(reply):
        return b""
    return server.checked(reply) or b""


async def put(
    server: Server, copies: Mapping[str, Copy], seen: Mapping[str, bytes], ttl_seconds: int
) -> dict[str, Seen]:
    """Puts copies by their keys, in one round trip; what lies there where one was not put.

    Args:
        server: where.
        copies: what.
        seen: by key the text of what may be replaced, whatever it is.
        ttl_seconds: until they expire; 0: never.
    """
    now, name = iso_ms(time.time_ns() // 1_000_000), "govledger_publish"
    args: dict[str, tuple[bytes | str | int, ...]] = {}
    for key, one in copies.items():
        about = (one.value, now, one.position.epoch, one.position.seq, one.version, one.metadata)
        args[key] = (*about, ttl_seconds, seen.get(key, b""))
    asked = [(key, pack("FCALL", name, 1, key, LIBRARY_VERSION, *args[key])) for key in copies]
    found: dict[str, Seen] = {}
    for key, reply in zip(copies, await server.exchange_each(asked), strict=True):
        answer = reply
        if isinstance(answer, Exception):  # such as a node without the library
            answer = await server.function(name, [key], *args[key])
        if isinstance(answer, bytes):
            about_it = _SEEN.search(answer)
            assert about_it is not None
            epoch, seq, version = about_it.groups()
            found[key] = Seen(epoch.decode(), int(seq), int(version), answer)
        elif answer == _NOBODY_TOLD:
            _log.debug(
                "readers are not told of %s, and notice it later: grant the ACL's &%s", key, key
            )
    return found
