"""Fold state and position, committed together under a lease; and the published copy of it.

Exact, in the tenant's own slot, without TTL: the hash `projection:<name>@<version>` has `position`,
`build` and the entity `state`; every other entity is a field in one of 1,024 bucket hashes beside
it, by CRC-32 of its name. A small entity costs its JSON and 70 to 110 bytes there.

`projection:active` says which version readers take. A newer one is built beside it and takes over
when it has caught up; only a command takes it back, and pins it.

A copy, with the guide's TTL: `claude-flow:memory:{tenant}:{name}:state` (without the braces).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from zlib import crc32

import orjson

from ledger import errors, keys
from ledger.server import Server, pack
from ledger.stream import Head, Position, head_command, parse_head, read_head, split_id
from projections.lease import LEASE_MS, lease_held, worker_name
from projections.projection import STATE, Entities, Projection
from projections.publishing import Copy, Facts, Seen, Standing, copy_text, put
from projections.snapshots import (
    FIELD,
    Kept,
    key_of,
    list_key,
    packed,
    parse_list,
    snapshot_is_due,
    spare,
)

__all__ = [
    "Committed",
    "FoldStore",
    "PublishedState",
    "Standing",
    "encode_entity",
    "parse_position",
]

BUCKETS: Final = 1024
BUCKETS_A_CALL: Final = 64
REBUILD: Final = "rebuild"
STOPPED: Final = "stopped"
SNAPSHOT_FIELDS_A_CALL: Final = 1000
PINNED: Final = ":pinned"
_TAIL_BYTES: Final = 400
PUBLISH_ATTEMPTS: Final = 5
"""Somebody else has put a copy there between two of them."""

COPIES: Final = "copies"


class CommittedEntity(NamedTuple):
    """An entity, None where there is none; a position that it is not older than, None where
    nothing is committed; why the fold stopped; and the ledger's head, read after them.
    """

    position: Position | None
    stopped: str | None
    entity: dict[str, Any] | None
    head: Head


class Committed(NamedTuple):
    """Where a projection stands in Redis: no position before its first commit; `stopped` names
    the error that kept it from going on.
    """

    position: Position | None
    build: str
    stopped: str | None = None

    @property
    def token(self) -> str:
        """What the next commit must find."""
        return f"{self.position} {self.build}" if self.position else ""


@dataclass(frozen=True, slots=True)
class PublishedState:
    """A projection's value and how far it has folded.

    `source` is `published` for the copy under `claude-flow:memory`, `committed` where that copy was
    absent and the exact fold state was read instead. Freshness is `seq` against the head's.
    `stopped` names the error that keeps the projector from going on, such as `LedgerRolledBack`.
    """

    tenant: str
    projection: str
    version: int
    value: dict[str, Any]
    position: Position
    updated_at: datetime | None
    source: str
    stopped: str | None = None

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
        self,
        server: Server,
        tenant: str,
        projection: Projection,
        *,
        worker: str | None = None,
        rebuild: bool = False,
    ) -> None:
        """`worker`: who commits; default: a name that nobody else has."""
        self._server = server
        self.tenant = tenant
        self.projection = projection
        self._worker = worker or worker_name()
        name = projection.name
        self._lease = keys.lease(tenant, name, projection.version, rebuild=rebuild)
        self._active = keys.projection_active(tenant)
        self._live = keys.projection(tenant, projection.name, projection.version)
        self._key = f"{self._live}:{REBUILD}" if rebuild else self._live
        quarantine = keys.projection_quarantine(tenant)
        self._quarantine = f"{self._key}:quarantine" if rebuild else quarantine
        self._quarantine_prefix = f"{name}@{projection.version}:"
        self._published = keys.published(tenant, projection.name)
        self._rebuild = rebuild
        self._list = list_key(tenant, name, projection.version, rebuild=rebuild)
        self._snapshots: list[Kept] = []

    def _bucket(self, name: str) -> str:
        return f"{self._key}:{crc32(name.encode()) % BUCKETS}"

    async def committed(self) -> tuple[Committed, dict[str, Any]]:
        """Position, build and state of the last commit, read in one step.

        Where one of them is gone, what is left of the others is deleted, and a new build begins:
        a fold on top of leftovers would count them again.

        Raises:
            CommitConflict, LeaseHeld: one of them is gone, and another worker is at it.
        """
        seen, found, self._snapshots = await self._read_commit()
        if found is not None:
            return found
        await self.discard(seen)
        return Committed(None, secrets.token_hex(4)), {}

    async def whole_commit(self) -> tuple[Committed, dict[str, Any]] | None:
        """The same, and None where one of them is gone; nothing is changed."""
        return (await self._read_commit())[1]

    async def _read_commit(
        self,
    ) -> tuple[bytes, tuple[Committed, dict[str, Any]] | None, list[Kept]]:
        """What is committed, as functions compare it; the commit, where it is whole; snapshots."""
        read = pack("HMGET", self._key, "position", "build", STATE, STOPPED)
        # The list last: who adds to it after that moves the position, so no commit of ours lands.
        replies = await self._server.exchange(self._key, [read, pack("HGETALL", self._list)], 2)
        (position, build, state, stopped), listed = map(self._server.checked, replies)
        try:
            at = Position.parse(position.decode())
            why = stopped.decode() if stopped else None
            snapshots = parse_list(listed)
            whole = Committed(at, build.decode(), why), orjson.loads(state)
        except (AttributeError, TypeError, ValueError):
            return _as_compared(position, build), None, []
        return _as_compared(position, build), whole, snapshots

    async def position(self) -> Position | None:
        """Of the last commit; None where there is none, or somebody damaged it."""
        return parse_position(await self._server.command(self._key, "HGET", self._key, "position"))

    async def seq(self) -> int:
        """The last ordinal that is committed; 0 where nothing is."""
        position = await self.position()
        return position.seq if position else 0

    async def load(self, names: Mapping[str, int]) -> Entities:
        """The named entities that exist; the seq with each, behind which it came to be, is for
        who reads the past.
        """
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
        since: Mapping[str, int] | None = None,
    ) -> Committed:
        """Entities and position in one step.

        `since`: entities that did not exist at or before a seq, so no older snapshot needs them.

        Raises:
            CommitConflict: the committed position is not `before` any more.
            LeaseHeld: another worker folds this tenant now.
        """
        on: list[str] = [self._key, self._lease]
        fields: list[bytes | str | int] = []
        older = self._known_to_snapshots(changed, since or {})
        for name in sorted(changed, key=older.__contains__, reverse=True):
            if name != STATE:
                on.append(self._bucket(name))
                fields += [len(on), name, encode_entity(changed[name])]
        entities, state = len(older), b""
        if STATE in changed:
            state = encode_entity(changed[STATE])
            fields += [1, STATE, state]
        snapshots, state = self._snapshot(on, entities, position, state)
        for seq, reason in quarantined.items():
            on.append(self._quarantine)
            fields += [len(on), f"{self._quarantine_prefix}{seq}", reason]
        after = Committed(position, before.build)
        try:
            await self._server.function(
                "govledger_commit",
                on,
                before.token,
                str(position),
                before.build,
                self._worker,
                LEASE_MS,
                snapshots,
                state,
                *fields,
            )
        except errors.ServerError as error:
            raise self._conflict(before.token, error) or error from None
        if state:
            self._snapshots.append(Kept(position.seq, position, before.build))
            await self._drop_spare_snapshots(after)
        return after

    def _known_to_snapshots(self, names: Iterable[str], since: Mapping[str, int]) -> set[str]:
        """Those of the entities that may have existed at the latest snapshot."""
        if not self._snapshots:
            return set()
        last = self._snapshots[-1].seq
        return {name for name in names if name != STATE and since.get(name, 0) <= last}

    def _snapshot(
        self, on: list[str], entities: int, position: Position, state: bytes
    ) -> tuple[str, bytes]:
        """What a commit is told about snapshots, and the state for a new one where one is due."""
        if not getattr(self.projection, "keeps_snapshots", False):
            return "0 0 0 0 0", b""
        latest = new = 0
        if self._snapshots and entities:
            on.append(key_of(self._list, self._snapshots[-1].seq))
            latest = len(on)
        if state and snapshot_is_due(self._snapshots, position.seq):
            on += [key_of(self._list, position.seq), self._list]
            new = len(on) - 1
        told = f"{latest} {entities} {new} {new and new + 1} {position.seq}"
        return told, packed(state) if new else b""

    async def _drop_spare_snapshots(self, committed: Committed) -> None:
        """Makes room for the next snapshots, a little at each call to the server.

        Raises:
            CommitConflict, LeaseHeld: another worker folds this tenant now.
        """
        while (place := spare(self._snapshots)) is not None:
            seqs = [one.seq for one in self._snapshots[max(place - 1, 0) : place + 1]]
            dropped = [key_of(self._list, seq) for seq in reversed(seqs)]
            on, cursor = [self._key, self._lease, self._list, *dropped], b"0"
            try:
                while cursor:
                    cursor = await self._server.function(
                        "govledger_drop_snapshot",
                        on,
                        committed.token,
                        self._worker,
                        LEASE_MS,
                        seqs[-1],
                        cursor,
                        SNAPSHOT_FIELDS_A_CALL,
                    )
            except errors.ServerError as error:
                raise self._conflict(committed.token, error) or error from None
            del self._snapshots[place]

    def _conflict(self, before: str, error: errors.ServerError) -> errors.LedgerError | None:
        _, lease, facts = error.message.partition("LEDGERLEASE ")
        if lease:
            left_ms, _, holder = facts.partition(" ")
            return lease_held(self.tenant, self.projection.name, holder, int(left_ms))
        _, ahead, seq = error.message.partition("LEDGERAHEAD ")
        if ahead:
            return errors.CommitConflict(
                f"tenant {self.tenant}: {self.projection.name} is committed at seq {seq}, which is "
                f"behind {before}",
                hint="another projector went on with it; fold up to there and try again",
                ahead_seq=int(seq),
            )
        _, position, found = error.message.partition("LEDGERPOSITION")
        if not position:
            return None
        return errors.CommitConflict(
            f"tenant {self.tenant}: {self.projection.name} is committed at "
            f"{found.strip() or 'nothing'}, this fold began at {before or 'nothing'}",
            hint="another projector folds this tenant too; it goes on from there",
        )

    async def _fenced(
        self, name: str, on: Sequence[str], seen: bytes | str, *args: bytes | str | int
    ) -> Any:
        """A function that does what it does only where nothing else is committed than was seen.

        Raises:
            CommitConflict: something else is.
            LeaseHeld: another worker folds this tenant now.
        """
        try:
            return await self._server.function(name, on, seen, *args)
        except errors.ServerError as error:
            told = seen.decode(errors="replace") if isinstance(seen, bytes) else seen
            raise self._conflict(told, error) or error from None

    async def publish(
        self,
        committed: Committed,
        state: dict[str, Any],
        ttl_seconds: int,
        *,
        anew: bool = False,
        stopped: str | None = None,
    ) -> bool:
        """Puts the copy that readers take; False where one is there that it may not replace.

        Args:
            committed: where the fold stands.
            state: its entity `state`.
            ttl_seconds: until the copy expires; 0: never.
            anew: the fold was rebuilt, so a copy of the same seq is replaced too, and one that is
                ahead of the ledger.
            stopped: the error that keeps the fold from going on, as it was marked.
        """
        copy = self._copy(committed, self.projection.view(state), stopped)
        return await self._publish({self._published: copy}, ttl_seconds, anew=anew)

    async def publish_entities(
        self,
        committed: Committed,
        values: Mapping[str, Mapping[str, Any]],
        ttl_seconds: int,
        *,
        anew: bool = False,
    ) -> None:
        """Puts copies of entities, by their keys, in one round trip; later ones stay."""
        copies = {key: self._copy(committed, value, None) for key, value in values.items()}
        await self._publish(copies, ttl_seconds, anew=anew)

    def _copy(self, committed: Committed, value: Mapping[str, Any], stopped: str | None) -> Copy:
        position, version = committed.position, self.projection.version
        assert position is not None
        metadata = self._metadata(position, stopped)
        return Copy(encode_entity(value), position, version, stopped, metadata)

    async def _publish(self, copies: Mapping[str, Copy], ttl_seconds: int, *, anew: bool) -> bool:
        """Whether each of them, or its like, is there now."""
        seen: dict[str, bytes] = {}
        for _ in range(PUBLISH_ATTEMPTS):
            found = await put(self._server, copies, seen, ttl_seconds)
            seen = await self._replaceable(copies, found, anew=anew)
            if not seen:
                return all(copies[key].is_like(there) for key, there in found.items())
            copies = {key: copies[key] for key in seen}
        return False

    async def _replaceable(
        self, copies: Mapping[str, Copy], found: Mapping[str, Seen], *, anew: bool
    ) -> dict[str, bytes]:
        """The texts of those copies that may be replaced, by what is true by now."""
        looked_at = {
            key: there
            for key, there in found.items()
            if copies[key].is_worth_a_look(there, anew=anew)
        }
        if not looked_at:
            return {}
        head, standing = await read_head(self._server, self.tenant), await self.standing()
        position, stopped = await self._server.command(
            self._key, "HMGET", self._key, "position", STOPPED
        )
        why = stopped.decode(errors="replace") if stopped else None
        now = Facts(head, standing, parse_position(position), why)
        return {
            key: there.text
            for key, there in looked_at.items()
            if copies[key].may_replace(there, now, anew=anew)
        }

    def _metadata(self, position: Position, stopped: str | None) -> bytes:
        about: dict[str, Any] = {
            "epoch": position.epoch,
            "position": position.entry_id,
            "seq": position.seq,
            "projection": self.projection.name,
            "version": self.projection.version,
        }
        return orjson.dumps(about | ({STOPPED: stopped} if stopped else {}))

    # -- entities' copies ---------------------------------------------------------------------

    async def copies_mark(self, committed: Committed) -> int:
        """Up to which seq every entity's copy is up to date."""
        raw = await self._server.command(self._live, "HGET", self._live, COPIES)
        build, _, seq = (raw or b"").decode(errors="replace").partition(" ")
        return int(seq) if build == committed.build and seq.isdecimal() else 0

    async def mark_copies(self, committed: Committed, seq: int) -> None:
        """Says so: of this build, as those of another have other copies.

        Raises:
            CommitConflict, LeaseHeld: another worker folds this tenant now.
        """
        await self._mark(committed, COPIES, f"{committed.build} {seq}")

    async def _mark(self, committed: Committed, name: str, value: str) -> None:
        args = (self._worker, LEASE_MS, name, value)
        await self._fenced("govledger_mark", [self._key, self._lease], committed.token, *args)

    async def read_entity(self, name: str) -> CommittedEntity:
        """A committed entity, and how far the fold and the ledger are."""
        return self.entity_of(await self._server.exchange_each(self.entity_commands(name)))

    def entity_commands(self, name: str) -> list[tuple[str, bytes]]:
        """Commands, each with its key, whose replies `entity_of` reads."""
        key, head = self._key if name == STATE else self._bucket(name), keys.head(self.tenant)
        return [
            (self._key, pack("HMGET", self._key, "position", STOPPED)),
            (key, pack("HGET", key, name)),
            (head, head_command(self.tenant)),  # last, so it is as far as what was folded
        ]

    def entity_of(self, replies: Sequence[Any]) -> CommittedEntity:
        """The entity that was asked for.

        Raises:
            IndexBehind: the head is damaged.
        """
        (position, stopped), raw, head_reply = map(self._server.checked, replies)
        head, at = parse_head(self.tenant, head_reply), parse_position(position)
        if at is None:
            return CommittedEntity(None, None, None, head)
        why = stopped.decode(errors="replace") if stopped else None
        return CommittedEntity(at, why, orjson.loads(raw) if raw else None, head)

    async def discard(self, seen: bytes | None = None) -> None:
        """Deletes everything that this store has committed.

        Args:
            seen: position and build that it was decided by; default: those of now.

        Raises:
            CommitConflict, LeaseHeld: another worker is at it.
        """
        if seen is None:
            position, build = await self._server.command(
                self._key, "HMGET", self._key, "position", "build"
            )
            seen = _as_compared(position, build)
        seqs = await self._snapshot_seqs()
        self._snapshots = []
        key, *buckets = self._all_keys()
        on = [key, self._lease, *buckets, *self._kept_keys(seqs)]
        if self._rebuild:
            on.append(self._quarantine)
        await self._fenced("govledger_discard", on, seen, self._worker, LEASE_MS)

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

    async def adopt(self, committed: Committed, holder: str = "") -> None:
        """Puts this rebuilt state in the place of the live one, its quarantine too, in one step.

        Args:
            committed: where the rebuilt one stands.
            holder: who seized the live lease before the rebuilt one was folded to the head.

        Raises:
            CommitConflict: somebody else has rebuilt it meanwhile; or, with `ahead_seq` in the
                facts, the live one is further on, and no `holder` keeps it there.
        """
        live = FoldStore(self._server, self.tenant, self.projection)
        seqs = await self._snapshot_seqs() | await live._snapshot_seqs()
        pairs = [
            *zip(live._all_keys(), self._all_keys(), strict=True),
            *zip(live._kept_keys(seqs), self._kept_keys(seqs), strict=True),
            (live._quarantine, self._quarantine),
        ]
        on = [*(key for pair in pairs for key in pair), live._lease]
        prefix = self._quarantine_prefix
        await self._fenced("govledger_adopt", on, committed.token, prefix, holder)

    async def seize(self, holder: str, lease_ms: int) -> None:
        """Takes the lease from whoever holds it, for as long: its commits are refused.
        At most LEASE_MS: what lasts longer is no lease.
        """
        await self._server.function("govledger_seize", [self._lease], holder, lease_ms)

    async def release(self, holder: str) -> None:
        """Gives the lease back, if that holder has it."""
        await self._server.function("govledger_release", [self._lease], holder)

    # -- quarantine ---------------------------------------------------------------------------

    async def quarantined(self) -> dict[int, str]:
        """By seq, why this version could not fold an entry; in order."""
        prefix = self._quarantine_prefix
        raw = await self._server.command(self._quarantine, "HGETALL", self._quarantine)
        pairs = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=True)
        named = {field.decode(): reason.decode(errors="replace") for field, reason in pairs}
        own = {
            name.removeprefix(prefix): why
            for name, why in named.items()
            if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
        }
        return {int(seq): own[seq] for seq in sorted(own, key=int)}

    async def accept_quarantined(self, seqs: Iterable[int]) -> int:
        """Takes entries off the list, and nothing else: what they meant is in no count."""
        fields = [f"{self._quarantine_prefix}{seq}" for seq in seqs]
        if not fields:
            return 0
        return int(await self._server.command(self._quarantine, "HDEL", self._quarantine, *fields))

    async def _snapshot_seqs(self) -> set[int]:
        return {one.seq for one in await self.snapshots()}

    def _kept_keys(self, seqs: Iterable[int]) -> list[str]:
        return [self._list, *(key_of(self._list, seq) for seq in sorted(seqs))]

    # -- the past -----------------------------------------------------------------------------

    async def snapshots(self) -> list[Kept]:
        """The snapshots that are kept, in order."""
        return parse_list(await self._server.command(self._list, "HGETALL", self._list))

    async def snapshot_state(self, kept: Kept) -> bytes | None:
        """The compressed entity `state` of a snapshot; None where it is one no more."""
        key = key_of(self._list, kept.seq)
        state, build = await self._server.command(key, "HMGET", key, STATE, "build")
        return None if build is None or build.decode() != kept.build else state

    async def load_at(self, base: Kept, names: Iterable[str]) -> dict[str, bytes] | None:
        """The named entities as they were at a snapshot, those that existed; None where too much
        changed meanwhile to say so: the snapshot was dropped, or the projection rebuilt.
        """
        # What is there now is read first: a commit after that puts what it changes into a snapshot
        # that is not asked, or was already; so each part is asked newer to older.
        wanted = list(names)
        now = [pack("HGET", self._bucket(name), name) for name in wanted]
        replies = await self._server.exchange(
            self._key, [*now, pack("HGETALL", self._list)], len(now) + 1
        )
        *current, listed = map(self._server.checked, replies)
        chain = [one for one in reversed(parse_list(listed)) if one.seq >= base.seq]
        fields = [FIELD + name for name in wanted]
        asked = [pack("HMGET", key_of(self._list, one.seq), "build", *fields) for one in chain]
        asked.append(pack("HEXISTS", key_of(self._list, base.seq), STATE))
        *rows, is_base = map(
            self._server.checked, await self._server.exchange(self._list, asked, len(asked))
        )
        builds = {build for build, *_ in rows}
        if not is_base or builds != {base.build.encode()}:
            return None
        found: dict[str, bytes | None] = dict(zip(wanted, current, strict=True))
        for _, *before in rows:
            pairs = zip(wanted, before, strict=True)
            found |= {name: value for name, value in pairs if value is not None}
        return {name: value for name, value in found.items() if value}

    def _all_keys(self) -> list[str]:
        return [self._key, *(f"{self._key}:{n}" for n in range(BUCKETS))]

    # -- versions -----------------------------------------------------------------------------

    def standing_command(self) -> bytes:
        """What `standing_of` reads the reply of."""
        name = self.projection.name
        return pack("HMGET", self._active, name, name + PINNED)

    def standing_of(self, reply: Any) -> Standing:
        """What this version is to readers.

        Raises:
            ServerError, PermissionDenied: the reply is an error.
        """
        active, pinned = self._server.checked(reply)
        try:
            version = int(active) if active is not None else self.projection.version
        except ValueError:  # somebody else wrote there
            version = self.projection.version
        if version == self.projection.version:
            return Standing.ACTIVE if pinned is None else Standing.PINNED
        if version > self.projection.version or pinned is not None:
            return Standing.SUPERSEDED
        return Standing.NEXT

    async def standing(self) -> Standing:
        """What this version is to readers now."""
        (reply,) = await self._server.exchange(self._active, [self.standing_command()], 1)
        return self.standing_of(reply)

    async def activate(self) -> None:
        """Makes readers take this version, unless they take a later one, or a command has pinned
        one.
        """
        name, version = self.projection.name, self.projection.version
        await self._server.function("govledger_activate", [self._active], name, version)

    async def pin(self, version: int) -> None:
        """Makes readers take that version, and keeps a later one from taking over by itself,
        unless this release folds no later one.

        Raises:
            NotFound: nobody has folded that version, and this release does not.
        """
        name = self.projection.name
        kept = keys.projection(self.tenant, name, version)
        folds_it = version == self.projection.version
        if not folds_it and not await self._server.command(kept, "EXISTS", kept):
            raise errors.NotFound(
                f"tenant {self.tenant}: nobody has folded {name}@{version}",
                hint=f"this release folds {name}@{self.projection.version}",
            )
        set_it = pack("HSET", self._active, name, version)
        if version < self.projection.version:
            mark = pack("HSET", self._active, name + PINNED, 1)
        else:
            mark = pack("HDEL", self._active, name + PINNED)
        for reply in await self._server.exchange(self._active, [set_it, mark], 2):
            self._server.checked(reply)

    # -- what stops a fold --------------------------------------------------------------------

    async def stopped(self) -> str | None:
        """Why it is not folded any further, as somebody marked it; None where it is."""
        raw = await self._server.command(self._key, "HGET", self._key, STOPPED)
        return raw.decode(errors="replace") if raw else None

    async def mark_stopped(self, committed: Committed, reason: str | None) -> None:
        """Keeps by the committed state why it is not folded any further; None: it is again.

        Raises:
            CommitConflict, LeaseHeld: another worker goes on with it.
        """
        await self._mark(committed, STOPPED, reason or "")

    # -- what a sweep asks, and who looks ------------------------------------------------------

    def status_commands(self) -> list[tuple[str, bytes]]:
        """Standing, then position and why it stopped, the lease's holder, and the quarantine."""
        return [
            (self._active, self.standing_command()),
            (self._key, pack("HMGET", self._key, "position", STOPPED)),
            (self._lease, pack("GET", self._lease)),
            (self._quarantine, pack("HKEYS", self._quarantine)),
        ]

    def probe(self) -> list[tuple[str, bytes]]:
        """Commands, each with its key, whose replies `is_current` reads: no entity is loaded."""
        return [
            (self._active, self.standing_command()),
            (self._key, pack("HGET", self._key, "position")),
            (self._published, pack("GETRANGE", self._published, -_TAIL_BYTES, -1)),
            (self._published, pack("TTL", self._published)),
        ]

    def is_current(self, head: Head, replies: Sequence[Any], ttl_seconds: int) -> bool:
        """Whether nothing is to be done: folded to the head, published so, and not ageing."""
        standing, committed, tail, ttl = replies
        if self.standing_of(standing) is Standing.SUPERSEDED:
            return True
        if not head.seq:
            return committed is None
        committed, ttl = self._server.checked(committed), self._server.checked(ttl)
        if committed != str(head.position).encode() or self.standing_of(standing) is Standing.NEXT:
            return False
        if isinstance(tail, Exception):  # another type of key
            return False
        ageing = ttl == -2 or 0 <= ttl < ttl_seconds // 2
        return bool(tail.endswith(b"%b}" % self._metadata(head.position, None))) and not ageing

    async def read_published(self) -> PublishedState | None:
        """The published copy; None where it is absent or not in the envelope's form."""
        return (await self.read_published_and_head())[0]

    async def read_published_and_head(self) -> tuple[PublishedState | None, Head]:
        """The same, and the ledger's head, read after it."""
        head_key = keys.head(self.tenant)
        reply, head = await self._server.exchange_each(
            [
                (self._published, pack("GET", self._published)),
                (head_key, head_command(self.tenant)),
            ]
        )
        found = parse_envelope(self.tenant, copy_text(self._server, reply))
        return found, parse_head(self.tenant, self._server.checked(head))

    async def read_committed(self) -> PublishedState | None:
        """The exact state as it was last committed."""
        return (await self.read_committed_and_head())[0]

    async def read_committed_and_head(self) -> tuple[PublishedState | None, Head]:
        """The same, and the ledger's head, read after it."""
        read = pack("HMGET", self._key, "position", STATE, STOPPED)
        replies = await self._server.exchange(self._key, [read, head_command(self.tenant)], 2)
        (position, state, stopped), head_reply = map(self._server.checked, replies)
        head = parse_head(self.tenant, head_reply)
        if position is None:
            return None, head
        found = PublishedState(
            tenant=self.tenant,
            projection=self.projection.name,
            version=self.projection.version,
            value=self.projection.view(orjson.loads(state) if state else {}),
            position=Position.parse(position.decode()),
            updated_at=None,
            source="committed",
            stopped=stopped.decode() if stopped else None,
        )
        return found, head


def _as_compared(position: bytes | None, build: bytes | None) -> bytes:
    """What is committed, as functions compare it."""
    return b"" if position is None else b"%b %b" % (position, build or b"")


def parse_position(raw: bytes | None) -> Position | None:
    """A committed position; None where there is none, or somebody damaged it."""
    try:
        return None if raw is None else Position.parse(raw.decode())
    except ValueError:
        return None


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
            stopped=about.get(STOPPED),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
