"""What a server says of itself, and how far each tenant's folds are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from ledger import errors, keys
from ledger.ledger import Ledger
from ledger.server import Server, pack
from ledger.stream import Head, Position, head_command, parse_head
from projections.projection import Projection
from projections.registry import configured
from projections.status import committed_position, first_recorded_ms, unfolded

__all__ = [
    "Standing",
    "began_ms",
    "config",
    "info",
    "number",
    "oldest_unfolded_ms",
    "ping_ms",
    "server_now_ms",
    "standings",
]

TENANTS_A_CALL: Final = 500
_ENVELOPE_TAIL_BYTES: Final = 600


async def info(server: Server, key: str, *sections: str) -> dict[str, str]:
    """What INFO says of the node of `key`, field by field.

    Raises:
        PermissionDenied: this user may not ask.
    """
    raw = await server.command(key, "INFO", *sections)
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else ""
    lines = (line.partition(":") for line in text.splitlines())
    return {name: value for name, colon, value in lines if colon}


async def config(server: Server, key: str, *names: str) -> dict[str, str]:
    """The named settings of the node of `key`; those that it does not know are absent.

    Raises:
        PermissionDenied: this user may not ask.
    """
    found = await server.command(key, "CONFIG", "GET", *names)
    return {name.decode(): value.decode(errors="replace") for name, value in found.items()}


def number(fields: dict[str, str], name: str) -> int:
    """A field of INFO, or of a sample, as a whole number; 0 where there is none."""
    try:
        return int(float(fields.get(name, "0")))
    except (OverflowError, ValueError):
        return 0


# -- tenants -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Standing:
    """How far one projection of a tenant has come.

    `problem` is set where the ledger's own record of the tenant cannot be read, or the fold is of
    another ledger than the one that is there.
    """

    tenant: str
    projection: Projection
    head: Head | None
    folded: Position | None
    published_ms: int | None
    """When the published copy was last written; None where there is none of ours."""
    published_seq: int | None
    ttl_seconds: int
    """Of the published copy: -1 none, -2 no such key."""
    problem: str | None = None

    @property
    def behind(self) -> int:
        """Entries that are recorded and not folded."""
        return 0 if self.head is None else unfolded(self.head, self.folded)


async def standings(ledger: Ledger, tenants: Sequence[str] | None = None) -> list[Standing]:
    """Where every projection of the tenants stands, by head against committed position."""
    names = await ledger.tenants() if tenants is None else tenants
    projections = configured(ledger.server.settings)
    found: list[Standing] = []
    for start in range(0, len(names), TENANTS_A_CALL):
        some = names[start : start + TENANTS_A_CALL]
        replies = iter(await ledger.server.exchange_each(_asked(some, projections)))
        for tenant in some:
            found += _standings_of(ledger.server, tenant, projections, replies)
    return found


def _asked(tenants: Sequence[str], projections: Sequence[Projection]) -> list[tuple[str, bytes]]:
    asked = []
    for tenant in tenants:
        asked.append((keys.head(tenant), head_command(tenant)))
        for one in projections:
            fold, copy = (
                keys.projection(tenant, one.name, one.version),
                keys.published(tenant, one.name),
            )
            asked += [
                (fold, pack("HGET", fold, "position")),
                (copy, pack("TTL", copy)),
                (copy, pack("GETRANGE", copy, -_ENVELOPE_TAIL_BYTES, -1)),
            ]
    return asked


def _standings_of(
    server: Server, tenant: str, projections: Sequence[Projection], replies: Iterator[Any]
) -> list[Standing]:
    head, problem = None, None
    try:
        head = parse_head(tenant, server.checked(next(replies)))
    except errors.PermissionDenied:
        raise  # what may not be seen is not broken
    except errors.LedgerError as error:
        problem = str(error)
    found = []
    for one in projections:
        position, ttl, tail = next(replies), next(replies), next(replies)
        folded, published_ms, published_seq = None, None, None
        try:
            raw = server.checked(position)
            folded = committed_position(raw)
            published_ms, published_seq = _published(server.checked(tail))
        except errors.ServerError as error:
            problem = problem or str(error)
        except ValueError:
            problem = problem or f"the position of {one.name} is damaged"
        standing = Standing(
            tenant, one, head, folded, published_ms, published_seq, _ttl(server, ttl), problem
        )
        standing.problem = problem or _rolled_back(standing)
        found.append(standing)
    return found


def _ttl(server: Server, reply: Any) -> int:
    return int(server.checked(reply))


def _rolled_back(at: Standing) -> str | None:
    if at.head is None or at.folded is None:
        return None
    if at.folded.epoch != at.head.epoch:
        return "the ledger is of another epoch than what was folded"
    if at.folded.seq > at.head.seq:
        return f"the ledger is at seq {at.head.seq}, behind what was folded ({at.folded.seq})"
    return None


def _published(tail: bytes) -> tuple[int | None, int | None]:
    """When a published copy was written and up to which seq, by the end of its envelope."""
    begin = tail.rfind(b'"updatedAt":"')
    if begin < 0:
        return None, None
    try:
        rest = orjson.loads(b"{" + tail[begin:])
        written = time_ms(rest["updatedAt"])
        return written, int(rest["metadata"]["seq"])
    except (KeyError, TypeError, ValueError):
        return None, None


def time_ms(text: str) -> int:
    """Milliseconds since 1970 of an RFC 3339 time; ValueError for anything else."""
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


async def ping_ms(server: Server, key: str, count: int) -> list[float]:
    """Round trips of PING from here, in ms, sorted."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        await server.command(key, "PING")
        taken.append((time.perf_counter() - begun) * 1000)
    return sorted(taken)


async def oldest_unfolded_ms(server: Server, found: Sequence[Standing]) -> int | None:
    """When the oldest entry was recorded that is not folded yet, by the ledger's clock; None where
    everything is folded. Tenants with a problem of their own are left out.
    """
    behind = [one for one in found if one.behind and one.problem is None]
    begins = [(one.tenant, one.folded.entry_id if one.folded else None) for one in behind]
    firsts = await first_recorded_ms(server, begins)
    return min((ms for ms in firsts if ms is not None), default=None)


async def began_ms(server: Server, tenants: Sequence[str]) -> int | None:
    """When the first entry of all that are there was recorded; None where nothing is."""
    firsts = await first_recorded_ms(server, [(tenant, None) for tenant in tenants])
    return min((ms for ms in firsts if ms is not None), default=None)


async def server_now_ms(server: Server, key: str = "") -> int:
    """The node's own clock, ms since 1970."""
    seconds, micros = await server.command(key, "TIME")
    return int(seconds) * 1000 + int(micros) // 1000
