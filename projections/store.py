"""Fold state and position, committed together; and the published copy of it.

Exact, in the tenant's own slot, without TTL: the hash `projection:<name>@<version>` has `position`,
`build` and the entity `state`; every other entity is a field in one of 1,024 bucket hashes beside
it, by CRC-32 of its name. A small entity costs its JSON and 70 to 110 bytes there.

A copy, with the guide's TTL: `claude-flow:memory:{tenant}:{name}:state` (without the braces).
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from zlib import crc32

import orjson

from ledger import errors, keys
from ledger.memory import iso_ms
from ledger.server import Server, pack
from ledger.stream import Position, split_id
from projections.projection import STATE, Entities, Projection

__all__ = ["Committed", "FoldStore", "PublishedState", "encode_entity"]

BUCKETS: Final = 1024
BUCKETS_A_CALL: Final = 64
REBUILD: Final = "rebuild"


class Committed(NamedTuple):
    """Where a projection stands in Redis: no position before its first commit."""

    position: Position | None
    build: str

    @property
    def token(self) -> str:
        """What the next commit must find."""
        return f"{self.position} {self.build}" if self.position else ""


@dataclass(frozen=True, slots=True)
class PublishedState:
    """A projection's value and how far it has folded.

    `source` is `published` for the copy under `claude-flow:memory`, `committed` where that copy was
    absent and the exact fold state was read instead. Freshness is `seq` against the head's.
    """

    tenant: str
    projection: str
    version: int
    value: dict[str, Any]
    position: Position
    updated_at: datetime | None
    source: str

    @property
    def seq(self) -> int:
        """The last ordinal that is folded."""
        return self.position.seq

    @property
    def recorded_at(self) -> datetime:
        """When the last folded entry was recorded."""
        return datetime.fromtimestamp(int(self.position.entry_id.partition("-")[0]) / 1000, UTC)

    @property
    def age_seconds(self) -> float:
        """Since the last folded entry was recorded; large on a quiet tenant that is up to date."""
        return (datetime.now(UTC) - self.recorded_at).total_seconds()


def encode_entity(entity: Mapping[str, Any]) -> bytes:
    """An entity's canonical bytes: sorted-key JSON, so that equal folds are equal bytes."""
    return orjson.dumps(entity, option=orjson.OPT_SORT_KEYS)


class FoldStore:
    """One tenant's state of one projection, in Redis; with `rebuild` beside the live one."""

    def __init__(
        self, server: Server, tenant: str, projection: Projection, *, rebuild: bool = False
    ) -> None:
        self._server = server
        self.tenant = tenant
        self.projection = projection
        self._live = keys.projection(tenant, projection.name, projection.version)
        self._key = f"{self._live}:{REBUILD}" if rebuild else self._live
        self._quarantine = keys.projection_quarantine(tenant)
        self._published = keys.published(tenant, projection.name)

    def _bucket(self, name: str) -> str:
        return f"{self._key}:{crc32(name.encode()) % BUCKETS}"

    async def committed(self) -> tuple[Committed, dict[str, Any]]:
        """Position, build and state of the last commit, read in one step.

        Where one of them is gone, what is left of the others is deleted, and a new build begins:
        a fold on top of leftovers would count them again.
        """
        position, build, state = await self._server.command(
            self._key, "HMGET", self._key, "position", "build", STATE
        )
        try:
            at = Position.parse(position.decode())
            return Committed(at, build.decode()), orjson.loads(state)
        except (AttributeError, TypeError, ValueError):
            await self.discard()
            return Committed(None, secrets.token_hex(4)), {}

    async def load(self, names: Iterable[str]) -> Entities:
        """The named entities that exist."""
        wanted = list(names)
        packed = [
            pack("HGET", self._key if name == STATE else self._bucket(name), name)
            for name in wanted
        ]
        replies = await self._server.exchange(self._key, packed, len(packed)) if packed else []
        raws = [self._server.checked(reply) for reply in replies]
        pairs = zip(wanted, raws, strict=True)
        return {name: orjson.loads(raw) for name, raw in pairs if raw is not None}

    async def commit(
        self,
        before: Committed,
        position: Position,
        changed: Mapping[str, Mapping[str, Any]],
        quarantined: Mapping[int, str],
    ) -> Committed:
        """Entities and position in one step.

        Raises:
            CommitConflict: the committed position is not `before` any more.
        """
        on: list[str] = [self._key]
        fields: list[bytes | str | int] = []
        for name, entity in changed.items():
            on.append(self._key if name == STATE else self._bucket(name))
            fields += [len(on), name, encode_entity(entity)]
        for seq, reason in quarantined.items():
            on.append(self._quarantine)
            fields += [len(on), f"{self.projection.name}@{self.projection.version}:{seq}", reason]
        after = Committed(position, before.build)
        try:
            await self._server.function(
                "govledger_commit", on, before.token, str(position), before.build, *fields
            )
        except errors.ServerError as error:
            found = error.message.partition("LEDGERPOSITION ")[2]
            if not found and "LEDGERPOSITION" not in error.message:
                raise
            raise errors.CommitConflict(
                f"tenant {self.tenant}: {self.projection.name} is committed at {found or 'nothing'}"
                f", this fold began at {before.token or 'nothing'}",
                hint="another projector folds this tenant too; it goes on from there",
            ) from None
        return after

    async def publish(
        self,
        committed: Committed,
        state: dict[str, Any],
        ttl_seconds: int,
        *,
        force: bool = False,
    ) -> bool:
        """Puts the copy that readers take; False where a later one is there already."""
        position = committed.position
        assert position is not None
        metadata = {
            "epoch": position.epoch,
            "position": position.entry_id,
            "seq": position.seq,
            "projection": self.projection.name,
            "version": self.projection.version,
        }
        value = encode_entity(self.projection.view(state))
        answer = await self._server.function(
            "govledger_publish",
            [self._published],
            value,
            iso_ms(time.time_ns() // 1_000_000),
            position.epoch,
            position.seq,
            orjson.dumps(metadata),
            ttl_seconds,
            int(force),
        )
        return bool(answer)

    async def discard(self) -> None:
        """Deletes everything that this store has committed."""
        await self._server.command(self._key, "UNLINK", *self._all_keys())

    async def digest(self) -> str:
        """SHA-256 over every committed entity: equal folds of equal entries have the same."""
        sha256 = hashlib.sha256()
        state = await self._server.command(self._key, "HGET", self._key, STATE)
        _feed(sha256, STATE.encode(), state or b"")
        buckets = self._all_keys()[1:]
        for start in range(0, len(buckets), BUCKETS_A_CALL):
            some = buckets[start : start + BUCKETS_A_CALL]
            packed = [pack("HGETALL", bucket) for bucket in some]
            for reply in await self._server.exchange(self._key, packed, len(packed)):
                for name, entity in sorted(self._server.checked(reply).items()):
                    _feed(sha256, name, entity)
        return sha256.hexdigest()

    async def adopt(self, committed: Committed) -> None:
        """Puts this rebuilt state in the place of the live one, in one step."""
        live = FoldStore(self._server, self.tenant, self.projection)
        pairs = zip(live._all_keys(), self._all_keys(), strict=True)
        on = [key for pair in pairs for key in pair]
        await self._server.function("govledger_adopt", on, committed.token)

    def _all_keys(self) -> list[str]:
        return [self._key, *(f"{self._key}:{n}" for n in range(BUCKETS))]

    async def activate(self) -> None:
        """Makes readers take this version, unless they take a later one already."""
        key, name = keys.projection_active(self.tenant), self.projection.name
        active = await self._server.command(key, "HGET", key, name)
        if active is None or int(active) < self.projection.version:
            await self._server.command(key, "HSET", key, name, self.projection.version)

    async def read_published(self) -> PublishedState | None:
        """The published copy; None where it is absent or not in the envelope's form."""
        try:
            raw = await self._server.command(self._published, "GET", self._published)
        except errors.ServerError as error:
            if "WRONGTYPE" in error.message:
                return None
            raise
        return parse_envelope(self.tenant, raw) if raw is not None else None

    async def read_committed(self) -> PublishedState | None:
        """The exact state as it was last committed."""
        position, state = await self._server.command(
            self._key, "HMGET", self._key, "position", STATE
        )
        if position is None:
            return None
        return PublishedState(
            tenant=self.tenant,
            projection=self.projection.name,
            version=self.projection.version,
            value=self.projection.view(orjson.loads(state) if state else {}),
            position=Position.parse(position.decode()),
            updated_at=None,
            source="committed",
        )


def _feed(sha256: hashlib._Hash, name: bytes, entity: bytes) -> None:
    sha256.update(b"%d:%b%d:%b" % (len(name), name, len(entity), entity))


def parse_envelope(tenant: str, raw: bytes) -> PublishedState | None:
    """An envelope that `publish` wrote; None for anything else under that key."""
    try:
        envelope = orjson.loads(raw)
        about = envelope["metadata"]
        split_id(about["position"])
        if not isinstance(about["seq"], int) or not isinstance(envelope["value"], dict):
            return None
        return PublishedState(
            tenant=tenant,
            projection=about["projection"],
            version=about["version"],
            value=envelope["value"],
            position=Position(about["epoch"], about["seq"], about["position"]),
            updated_at=datetime.fromisoformat(envelope["updatedAt"]),
            source="published",
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
