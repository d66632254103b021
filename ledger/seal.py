"""The sealer: follows tenants' streams, grows their evidence trees, signs and anchors checkpoints.

Before a log is opened, the copies in Redis and the witnesses are asked what they have of it: what
is signed is in the anchor before it is anywhere else, so where they have more, or other roots, the
anchor is not the one that it was, and nothing is signed.

The order of a seal, and what a kill leaves at each step:

1. new entries are read, their tiles written to Redis   nothing is signed; it is done again
2. under the anchor file's lock: its tail is compared with what this tree continues; then signed and
   written there, on disk                               a torn tail: that very checkpoint comes next
3. the witnesses are asked for cosignatures             the next seal asks again
4. a copy goes to `evidence:checkpoints`                the next run copies it

So nothing is signed that the anchor contradicts, and no size is signed twice with other roots.
Sealers may race: who finds that another was faster goes on from what that one left.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ledger import errors, keys
from ledger.anchor import AnchorFile, Chain
from ledger.leaf import leaf_hasher
from ledger.ledger import Ledger
from ledger.merkle import EMPTY_ROOT, MAX_SIZE, TileTree, consistency_ranges
from ledger.note import (
    Checkpoint,
    Handover,
    Note,
    Signature,
    SigningKey,
    VerifierKey,
    origin_of,
    signers,
)
from ledger.proof import ConsistencyProof
from ledger.server import Server, pack
from ledger.stream import Walk, head_command, parse_head, split_id
from ledger.tiles import Tiles
from ledger.witness import WitnessBehind, WitnessClient

__all__ = ["Sealed", "Sealer", "publish_copy", "rotate"]

BATCH_ENTRIES: Final = 100_000
"""How many entries a checkpoint covers at most: what a kill in a large backlog costs again."""

SETTLE_MS: Final = 5_000
"""How old an entry must be on a server that does not fsync each append: what a power cut takes
away must not be sealed, or the ledger could never be sealed again."""

SWEEP_INTERVAL_S: Final = 1.0
SEALS_AT_ONCE: Final = 8
HEADS_A_CALL: Final = 1000
COPIES_KEPT: Final = 1000
COPIES_ASKED: Final = 100
"""How many of the latest copies an opening sealer looks at; racing ones put them out of order."""

COPIES_COMPARED: Final = 10
FUTURE_MS: Final = 300_000
LOGS_KEPT: Final = 1000
"""How many tenants' trees stay in memory, some 20 KiB each."""

ATTEMPTS: Final = 10
"""How often a sealer begins again where nothing comes nearer to what it wants."""

BACKOFF_S: Final = 0.005
_log = logging.getLogger("ledger")

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Sealed:
    """What one seal did: `entries` new ones, up to `checkpoint`; `witnesses` that cosigned it.

    `waiting` says that younger entries wait, as the server does not fsync each append.
    """

    tenant: str
    entries: int
    checkpoint: Checkpoint | None
    witnesses: tuple[str, ...] = ()
    waiting: bool = False


@dataclass(slots=True)
class _Log:
    """One tenant's log in memory: where it was last sealed, and the tree that grows from there."""

    tenant: str
    origin: str
    anchor: AnchorFile
    tiles: Tiles
    tree: TileTree
    walk: Walk
    sealed: Checkpoint
    note: Note | None
    torn: Checkpoint | None
    chain: Chain
    hashed: Callable[[bytes, Sequence[bytes]], bytes]
    witnessed: dict[VerifierKey, int] = field(default_factory=dict)
    cosigned: dict[VerifierKey, Signature] = field(default_factory=dict)
    used_up: bool = False


class _AnchorMoved(Exception):
    """Another sealer was faster: begin again from what it left."""


class Sealer:
    """Seals tenants with one key. Any number may run: the anchor's lock orders them."""

    def __init__(
        self,
        ledger: Ledger,
        key: SigningKey,
        anchor: Path,
        witnesses: Sequence[WitnessClient] = (),
        *,
        batch_entries: int = BATCH_ENTRIES,
    ) -> None:
        """`anchor`: a directory outside Redis, which must exist."""
        self.ledger = ledger
        self.server: Server = ledger.server
        self.key = key
        self.directory = anchor
        self.witnesses = tuple(witnesses)
        self.stopped: dict[str, errors.SealRefused] = {}
        """Tenants that are not sealed any more, and why."""
        self._batch = batch_entries
        self._logs: dict[str, _Log] = {}
        self._sizes: dict[str, int] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    # -- one tenant ---------------------------------------------------------------------------

    async def seal(self, tenant: str, *, on_progress: Progress | None = None) -> Sealed:
        """Seals what is recorded now, and returns when the anchor has it on disk.

        Raises:
            SealRefused: the ledger contradicts the anchor; nothing was signed.
            AnchorUnavailable: the anchor's file cannot be read or written.
            EntriesMissing, IndexBehind: the record has a hole; nothing was signed beyond it.
            NotFound: nothing is recorded.
            InvalidSetting: there is no anchor directory.
        """
        keys.checked_tenant(tenant)
        lock = self._locks.setdefault(tenant, asyncio.Lock())
        async with lock:
            log = self._logs.pop(tenant, None)  # what fails, or is not used, is opened anew
            try:
                sealed = await self._seal(tenant, log, on_progress)
            except OSError as error:
                raise errors.AnchorUnavailable(
                    f"tenant {tenant}: anchor {self.directory}: {error}",
                    hint="look at that file and its disk; the next seal finishes what was begun",
                ) from error
            while len(self._logs) > LOGS_KEPT:
                self._logs.pop(next(iter(self._logs)))
            return sealed

    async def _seal(self, tenant: str, log: _Log | None, on_progress: Progress | None) -> Sealed:
        count = wanted = attempt = reached = 0
        until_ms = await self._until_ms(tenant)
        while attempt < ATTEMPTS:
            try:
                log = log or await self._open(tenant)
                if not wanted:
                    await log.walk.refresh()
                    wanted = log.walk.head.seq
                if reached < log.sealed.size < wanted:  # others bring it nearer, so this ends
                    attempt, reached = 0, log.sealed.size
                # What comes meanwhile is the next call's; others may have sealed the rest.
                while (log.torn or log.sealed.size < wanted) and await self._grow(
                    log, until_ms, on_progress
                ):
                    count += log.tree.size - log.sealed.size
                    await self._sign(log)
                    if log.used_up:
                        log = await self._open(tenant)
                sealed = await self._publish(log, count, waiting=until_ms is not None)
                self._logs[tenant], self._sizes[tenant] = log, log.sealed.size
                return sealed
            except _AnchorMoved:
                log, attempt = None, attempt + 1
                await asyncio.sleep(random.uniform(0, BACKOFF_S * 2**attempt))  # noqa: S311 - jitter
        raise _busy(tenant)

    async def _until_ms(self, tenant: str) -> int | None:
        key = keys.decisions(tenant)
        if (await self.server.node_settings(key)).fsyncs_every_ack:
            return None
        seconds, micros = await self.server.command(key, "TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        last = await self.server.command(key, "XREVRANGE", key, "+", "-", "COUNT", 1)
        if last and split_id(last[0][0])[0] > now_ms + FUTURE_MS:
            _log.warning(
                "tenant %s: entry %s lies in the future, so it is not sealed, and nothing can be "
                "appended behind it: the next append says how to remove it",
                tenant,
                last[0][0].decode(),
            )
        return now_ms - SETTLE_MS

    async def _open(self, tenant: str) -> _Log:
        """The log as the anchor has it, and the tree and place in the stream that belong to it."""
        origin = origin_of(self.key.name, tenant)
        anchor = AnchorFile(self.directory, origin)
        elsewhere = await self._elsewhere(tenant, origin)  # before the anchor, which is ahead of it
        chain, note, torn = await asyncio.to_thread(self._read_anchor, anchor, origin)
        sealed = _checkpoint(note, chain) if note else Checkpoint(origin, 0, EMPTY_ROOT)
        for one in elsewhere:
            _check_known(anchor, chain, sealed, torn, one)
        walk = Walk(self.server, tenant)
        try:
            await walk.start_after(sealed.size)
        except errors.LedgerRolledBack as error:
            raise errors.SealRefused(
                f"tenant {tenant}: the ledger is at seq {error.facts['head_seq']}, the anchor has "
                f"{sealed.size}: it was cut off, or restored to an earlier state",
                hint="govledger verify says where it differs; README, Evidence, says what then",
                reason="rolled-back",
            ) from None
        if not walk.head.epoch:
            raise errors.NotFound.nothing_of(tenant)
        tiles = Tiles(self.server, tenant, origin)
        hashed = leaf_hasher(origin)
        tree = await tiles.tree(sealed.size)
        if tree is None or tree.root() != sealed.root:
            tree = await self._rederived(tenant, sealed, tiles)
        log = _Log(tenant, origin, anchor, tiles, tree, walk, sealed, note, torn, chain, hashed)
        for witness in self.witnesses:
            for signature in note.signatures if note else ():
                if witness.key.matches(signature):
                    log.cosigned[witness.key] = signature
        shown = {one.witness for one in elsewhere}
        silent = [one for one in self.witnesses if one.key not in shown]
        await asyncio.gather(*(self._ask_silent(log, one) for one in silent))
        return log

    async def _ask_silent(self, log: _Log, witness: WitnessClient) -> None:
        """Offers the anchor's last checkpoint to a witness that shows none, before one is signed.

        The protocol has no question for what a witness has seen: a conflict tells it.

        Raises:
            SealRefused: it has seen a larger one, or another root.
        """
        if not log.sealed.size:
            return
        proof = ConsistencyProof(log.sealed.size, (), log.sealed.signed(self.key))
        try:
            log.cosigned[witness.key] = await asyncio.to_thread(witness.add, proof)
            log.witnessed[witness.key] = log.sealed.size
        except WitnessBehind as stands:
            log.witnessed[witness.key] = stands.size
            if stands.size > log.sealed.size:
                await self._check_witness_ahead(log, witness, stands.size)
        except errors.WitnessUnavailable as error:
            _log.warning("tenant %s: what the witness has seen: %s", log.tenant, error)

    async def _check_witness_ahead(self, log: _Log, witness: WitnessClient, size: int) -> None:
        if await asyncio.to_thread(_anchored_size, log.anchor) >= size:
            raise _AnchorMoved
        raise errors.SealRefused(
            f"tenant {log.tenant}: the witness {witness.key.name} has seen size {size}, "
            f"the anchor ends at {log.sealed.size}",
            hint="the anchor directory was restored to an earlier state, or another sealer has "
            "another one",
            reason="rolled-back",
        )

    async def _elsewhere(self, tenant: str, origin: str) -> list[_Seen]:
        """What may be checkpoints of this log outside its anchor, and where they are."""
        key = keys.evidence_checkpoints(tenant)
        found = [_Seen(key, note) for note in await _latest_copies(self.server, key, origin)]
        asked = [asyncio.to_thread(one.latest, origin) for one in self.witnesses]
        results = await asyncio.gather(*asked, return_exceptions=True)
        for witness, result in zip(self.witnesses, results, strict=True):
            if isinstance(result, Note):
                found.append(_Seen(f"the witness {witness.key.name}", result, witness.key))
            elif isinstance(result, errors.LedgerError):
                _log.warning("tenant %s: what the witness has seen: %s", tenant, result)
            elif isinstance(result, BaseException):
                raise result
        return found

    def _read_anchor(
        self, anchor: AnchorFile, origin: str
    ) -> tuple[Chain, Note | None, Checkpoint | None]:
        try:
            chain = anchor.chain(origin, [self.key.verifier(origin)])
            with anchor.locked() as stream:
                tail = anchor.tail(stream)
            last_size = _checkpoint(tail.last, chain).size if tail.last else 0
        except errors.NotProved as error:
            raise self._contradicted(anchor, error) from None
        (in_charge,) = chain.keys_at(MAX_SIZE)
        if in_charge != self.key.verifier(origin):
            raise errors.SealRefused(
                f"{anchor.path}: the log was handed over to the key {in_charge}",
                hint="seal with that one",
                reason="wrong-key",
            )
        if tail.torn is not None and tail.torn.size <= last_size:
            raise errors.SealRefused(
                f"{anchor.path}: behind the checkpoint of size {last_size} another one of size "
                f"{tail.torn.size} was being signed",
                hint="find out who has the key; what is cut off at its end was not signed whole",
                reason="split-view",
            )
        if self._is_half_handed_over(tail.last, origin):
            raise errors.SealRefused(
                f"{anchor.path}: a hand-over to another key was begun, and is not there",
                hint="govledger keys rotate once more finishes it",
                reason="wrong-key",
            )
        return chain, tail.last, tail.torn

    def _is_half_handed_over(self, last: Note | None, origin: str) -> bool:
        """Whether another key has signed the last checkpoint, too, and no hand-over follows."""
        if last is None or Handover.is_one(last):
            return False
        by = [one for one in last.signatures if one.name == origin]
        return not all(map(self.key.verifier(origin).matches, by))

    def _contradicted(self, anchor: AnchorFile, error: errors.NotProved) -> errors.SealRefused:
        hints = {
            "foreign-signature": "another key has signed it: govledger keys rotate hands it over",
            "wrong-key": "another key has signed it: govledger keys rotate hands it over",
        }
        reason = str(error.facts.get("reason"))
        return errors.SealRefused(
            f"{anchor.path}: {error.message}", hint=hints.get(reason), reason=reason
        )

    async def _rederived(self, tenant: str, sealed: Checkpoint, tiles: Tiles) -> TileTree:
        """The tree from the entries themselves, where its tiles are gone or changed.

        Raises:
            SealRefused: the entries are not those that were sealed.
        """
        _log.warning("tenant %s: the evidence tree is derived anew from the entries", tenant)
        tree, hashed = TileTree(tiles.add_full), leaf_hasher(sealed.origin)
        walk = Walk(self.server, tenant)
        await walk.start_after(0)
        async with aclosing(walk.pages()) as pages:
            async for page in pages:
                wanted = page[: sealed.size - tree.size]
                tree.extend([hashed(entry.raw_id, entry.raw_fields) for entry in wanted])
                if tree.size == sealed.size:
                    break
        if tree.size != sealed.size or tree.root() != sealed.root:
            raise errors.SealRefused(
                f"tenant {tenant}: the entries up to seq {sealed.size} are not those that were "
                "sealed",
                hint="govledger verify says which; nothing is signed until that is cleared up",
                reason="tampered",
            )
        await tiles.flush()
        await tiles.write_rows(tree)
        return tree

    async def rebuild_tiles(self, tenant: str) -> int:
        """Derives the tiles anew from the entries, as far as they are sealed; how many that are.

        Raises:
            SealRefused: the entries are not those that were sealed.
        """
        try:
            log = await self._open(tenant)
        except _AnchorMoved:
            raise _busy(tenant) from None
        tiles = keys.evidence_tiles(tenant, log.origin)
        await self.server.command(tiles, "UNLINK", tiles)
        await self._rederived(tenant, log.sealed, log.tiles)
        self._logs.pop(tenant, None)
        return log.sealed.size

    async def _grow(self, log: _Log, until_ms: int | None, on_progress: Progress | None) -> bool:
        """Adds new entries to the tree, up to a batch; whether there are any to sign."""
        limit = log.torn.size if log.torn else log.sealed.size + self._batch
        await log.walk.refresh()
        async with aclosing(log.walk.pages(to_ms=until_ms)) as pages:
            async for page in pages:
                if page[0].seq != log.tree.size + 1:
                    raise errors.EntriesMissing(
                        f"tenant {log.tenant}: seq {log.tree.size + 1} is not there",
                        tenant=log.tenant,
                    )
                taken = page[: limit - log.tree.size]
                log.tree.extend([log.hashed(entry.raw_id, entry.raw_fields) for entry in taken])
                log.used_up = len(taken) < len(page)
                await log.tiles.flush()
                if on_progress:
                    on_progress(len(taken))
                if log.tree.size >= limit:
                    break
        if log.torn and log.tree.size < log.torn.size:
            raise errors.SealRefused(
                f"tenant {log.tenant}: a checkpoint of size {log.torn.size} was being signed, the "
                f"ledger ends at seq {log.tree.size}",
                hint="it was restored to an earlier state, or cut off",
                reason="rolled-back",
            )
        return log.tree.size > log.sealed.size

    async def _sign(self, log: _Log) -> None:
        await log.tiles.write_rows(log.tree)
        checkpoint = Checkpoint(log.origin, log.tree.size, log.tree.root())
        log.note = await asyncio.to_thread(self._anchored, log, checkpoint)
        log.sealed, log.torn = checkpoint, None
        log.cosigned.clear()

    def _anchored(self, log: _Log, checkpoint: Checkpoint) -> Note:
        with log.anchor.locked() as stream:
            tail = log.anchor.tail(stream)
            before = _checkpoint(tail.last, log.chain) if tail.last else None
            if (before or Checkpoint(log.origin, 0, EMPTY_ROOT)) != log.sealed:
                raise _AnchorMoved
            handed_over = tail.last is not None and Handover.is_one(tail.last)
            if tail.torn != log.torn or (handed_over and tail.last != log.note):
                raise _AnchorMoved
            if self._is_half_handed_over(tail.last, log.origin):
                raise _AnchorMoved  # opened anew, it says so
            if tail.torn and tail.torn != checkpoint:
                raise errors.SealRefused(
                    f"tenant {log.tenant}: a checkpoint of size {checkpoint.size} with another "
                    "root was being signed: its entries were changed since",
                    hint=f"{log.anchor.path} has it at its end",
                    reason="tampered",
                )
            note = checkpoint.signed(self.key)
            log.anchor.append(stream, tail, note)
            return note

    # -- witnesses and the copy in Redis ------------------------------------------------------

    async def _publish(self, log: _Log, count: int, *, waiting: bool) -> Sealed:
        note = log.note
        if note is None or Handover.is_one(note):
            sealed = log.sealed if note else None
            return Sealed(log.tenant, count, sealed, waiting=waiting)
        asked = [one for one in self.witnesses if one.key not in log.cosigned]
        results = await asyncio.gather(
            *(self._cosignature(log, one) for one in asked), return_exceptions=True
        )
        refused = None
        for witness, result in zip(asked, results, strict=True):
            if isinstance(result, Signature):
                log.cosigned[witness.key] = result
            elif isinstance(result, errors.WitnessUnavailable):
                _log.warning("tenant %s: not cosigned: %s", log.tenant, result)
            elif isinstance(result, errors.SealRefused):
                refused = result
            else:  # also where another sealer was faster
                raise result
        cosigned = note.with_signatures(log.cosigned.values())
        if cosigned != note:
            await asyncio.to_thread(self._add_copy, log, cosigned)
            log.note = cosigned
        try:
            await publish_copy(self.server, log.tenant, cosigned)
        except errors.LedgerError as error:
            _log.warning(
                "tenant %s: sealed, the anchor has it, and %s no copy: %s; if it stays so, delete "
                "that key: the next seal makes it anew",
                log.tenant,
                keys.evidence_checkpoints(log.tenant),
                error,
            )
        if refused:
            raise refused
        return Sealed(
            log.tenant, count, log.sealed, tuple(one.name for one in log.cosigned), waiting=waiting
        )

    def _add_copy(self, log: _Log, cosigned: Note) -> None:
        with log.anchor.locked() as stream:
            tail = log.anchor.tail(stream)
            if tail.last and tail.last.text == cosigned.text and tail.torn is None:
                log.anchor.append(stream, tail, cosigned)

    async def _cosignature(self, log: _Log, witness: WitnessClient) -> Signature:
        assert log.note is not None
        old, derived = log.witnessed.get(witness.key, 0), False
        for _ in range(ATTEMPTS):
            ranges = consistency_ranges(old, log.sealed.size)
            log_signature = Note(log.note.text, log.note.signatures[:1])
            try:
                hashes = tuple(await log.tiles.range_hashes(ranges))
                proof = ConsistencyProof(old, hashes, log_signature)
                signature = await asyncio.to_thread(witness.add, proof)
            except WitnessBehind as stands:
                old = stands.size
                if old > log.sealed.size:
                    await self._check_witness_ahead(log, witness, old)
            except (errors.NotProved, errors.SealRefused):
                if derived or not ranges:
                    raise
                await self._rederived(log.tenant, log.sealed, log.tiles)
                derived = True  # it was not the tiles that anybody may have changed
            else:
                log.witnessed[witness.key] = log.sealed.size
                return signature
        raise errors.WitnessUnavailable(f"witness {witness.key.name}: its size keeps changing")

    # -- many tenants -------------------------------------------------------------------------

    async def run(self, *, every_entries: int, every_seconds: float) -> None:
        """Seals every tenant when so many entries are new or the oldest is so old, for ever."""
        slots, interval_s = asyncio.Semaphore(SEALS_AT_ONCE), min(SWEEP_INTERVAL_S, every_seconds)
        new_since: dict[str, float] = {}

        async def one(tenant: str) -> None:
            async with slots:
                await self._seal_safely(tenant)
                new_since.pop(tenant, None)

        while True:
            try:
                behind = await self._behind()
            except errors.LedgerError as error:
                _log.warning("sealing waits: %s", error)
                behind = {}
            now = time.monotonic()
            for tenant in behind:
                new_since.setdefault(tenant, now)
            due = [
                tenant
                for tenant, count in behind.items()
                if count >= every_entries or now - new_since[tenant] >= every_seconds
            ]
            await asyncio.gather(*(one(tenant) for tenant in due))
            await asyncio.sleep(interval_s)

    async def run_once(self, tenants: Sequence[str] | None = None) -> list[Sealed]:
        """Seals what there is now.

        Raises:
            Unavailable: the server cannot be asked.
            LedgerError: a tenant could not be sealed, and why; the others were, and are in the
                error's `facts["sealed"]`. Where several could not, this is the last one's, and
                the log has the others'.
        """
        done: list[Sealed] = []
        refused: dict[str, errors.LedgerError] = {}
        try:
            for tenant in tenants or list(await self._behind()):
                try:
                    done.append(await self.seal(tenant))
                except errors.LedgerError as error:
                    of_all = isinstance(error, (errors.Unavailable, errors.InvalidSetting))
                    if of_all and not isinstance(error, errors.AnchorUnavailable):
                        raise
                    refused[tenant] = error
            if refused:
                _, last = refused.popitem()
                last.facts["sealed"] = done
                raise last
        finally:
            for tenant, why in refused.items():
                _log.error("tenant %s: not sealed: %s", tenant, why)
        return done

    async def _seal_safely(self, tenant: str) -> None:
        try:
            await self.seal(tenant)
        except errors.SealRefused as error:
            _log.error("tenant %s: NOT SEALED ANY MORE: %s", tenant, error)
            if error.facts.get("reason") != "busy":
                self.stopped[tenant] = error
        except errors.LedgerError as error:
            _log.error("tenant %s: not sealed: %s", tenant, error)

    async def _behind(self) -> dict[str, int]:
        """Tenants with entries that are not sealed, and how many; of unopened ones all."""
        tenants = [one for one in await self.ledger.tenants() if one not in self.stopped]
        found = {}
        for start in range(0, len(tenants), HEADS_A_CALL):
            some = tenants[start : start + HEADS_A_CALL]
            asked = [(keys.head(tenant), head_command(tenant)) for tenant in some]
            for tenant, reply in zip(some, await self.server.exchange_each(asked), strict=True):
                try:
                    head = parse_head(tenant, self.server.checked(reply))
                except errors.LedgerError as error:
                    _log.error("tenant %s: not sealed: %s", tenant, error)
                    continue
                sealed = self._sizes.get(tenant, 0)
                if head.seq > sealed:
                    found[tenant] = head.seq - sealed
        return found


def _busy(tenant: str) -> errors.SealRefused:
    return errors.SealRefused(
        f"tenant {tenant}: other sealers kept sealing it", hint="one is enough", reason="busy"
    )


def _checkpoint(note: Note, chain: Chain) -> Checkpoint:
    return Handover.parse(note).at if Handover.is_one(note) else chain.verified(note)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What may be a checkpoint of a log, seen outside its anchor; `witness` is who showed it."""

    place: str
    note: Note
    witness: VerifierKey | None = None

    def is_signed_by(self, trusted: Sequence[VerifierKey]) -> bool:
        """Whether one of these keys has signed it, whatever else is under it."""
        for key in trusted:
            try:
                return bool(signers(self.note, [key]))
            except errors.NotProved:  # not this one
                continue
        return False


def _check_known(
    anchor: AnchorFile, chain: Chain, sealed: Checkpoint, torn: Checkpoint | None, one: _Seen
) -> None:
    """What was signed for this log is in its anchor, wherever it was seen.

    A torn one has no signature: it excuses itself alone, and nothing that is smaller. The keys are
    not held to where they sign by the anchor: it is the anchor that is in doubt.

    Raises:
        SealRefused: the anchor does not have it: it was put back, or is another one.
    """
    try:
        seen = Checkpoint.parse(one.note.text)
    except errors.NotProved:
        return  # no checkpoint at all; `verify` says what it is
    if seen.origin != chain.origin or seen.size < sealed.size or seen == torn:
        return
    by_us = one.is_signed_by(chain.keys())
    cosigned = one.witness is not None and one.is_signed_by([one.witness])
    if not by_us and not cosigned:
        if seen.size > sealed.size:
            _log.warning(
                "%s ends at %d, and %s has a checkpoint of size %d by a key that is not known here:"
                " if that is one of yours, the anchor was put back to before it; govledger verify",
                anchor.path,
                sealed.size,
                one.place,
                seen.size,
            )
        return
    if seen.size > sealed.size:
        by = "this log's key" if by_us else "a key that the anchor does not know"
        raise errors.SealRefused(
            f"{anchor.path} ends at {sealed.size}, and {one.place} has a checkpoint of size "
            f"{seen.size} that {by} has signed",
            hint="the anchor was put back to an earlier state, or is another one: use the one that "
            "has it; where that is lost, seal under another deployment name (README, Evidence)",
            reason="rolled-back",
        )
    if seen.root != sealed.root:
        raise errors.SealRefused(
            f"{anchor.path} and {one.place} have signed checkpoints of size {seen.size} with "
            "different roots",
            hint="find out who has the key: two histories were signed with it",
            reason="split-view",
        )


def _anchored_size(anchor: AnchorFile) -> int:
    """Where the anchor ends now, by its own word."""
    with anchor.locked() as stream:
        last = anchor.tail(stream).last
    if last is None:
        return 0
    return (Handover.parse(last).at if Handover.is_one(last) else Checkpoint.parse(last.text)).size


async def _latest_copies(server: Server, key: str, origin: str) -> list[Note]:
    """The latest notes in Redis that say they are of this log; none where there is no such key."""
    ours = origin.encode() + b"\n"
    found: list[Note] = []
    for count in (COPIES_ASKED, 2 * COPIES_KEPT):
        (reply,) = await server.exchange(key, [pack("XREVRANGE", key, "+", "-", "COUNT", count)], 1)
        try:
            page = server.checked(reply)
        except errors.ServerError as error:  # another type of key
            _log.warning("%s: %s", key, error)
            return []
        raw = [fields[1] for _, fields in page if fields[1].startswith(ours)]
        for one in raw:
            try:
                found.append(Note.parse(one))
            except errors.NotProved as error:
                _log.warning("%s: no signed note: %s", key, error)
        if found or len(page) < count:
            break
    return found


async def publish_copy(server: Server, tenant: str, note: Note) -> None:
    """Puts a copy of a signed checkpoint into Redis, unless it is one of the last there."""
    key, raw = keys.evidence_checkpoints(tenant), note.encode()
    last = await server.command(key, "XREVRANGE", key, "+", "-", "COUNT", COPIES_COMPARED)
    if not any(fields == [b"note", raw] for _, fields in last):
        # In order of time: a size in the id would let whoever is ahead shut the others out.
        await server.command(key, "XADD", key, "MAXLEN", "~", COPIES_KEPT, "*", "note", raw)


def rotate(directory: Path, old: SigningKey, new: SigningKey) -> list[str]:
    """Hands every log of a deployment in an anchor directory over to a new key; their origins.

    What was handed over already is left; blocks. The last checkpoint is signed by both keys, too.
    It looks at nothing but the directory: whether that was put back, the next seal finds out, as
    what either key has signed is known elsewhere.

    Raises:
        InvalidInput: the keys are of different deployments, or the same key.
        SealRefused: a log's checkpoints are not by the old key; all others are handed over.
    """
    if old.name != new.name or old.encode() == new.encode():
        raise errors.InvalidInput(
            f"keys: {old.name} and {new.name} are not two keys of one deployment",
            hint="govledger keys new --deployment with the same name makes the next one",
        )
    done = []
    refused: errors.SealRefused | None = None
    for path in sorted(directory.glob(f"*{AnchorFile.SUFFIX}")):
        origin = AnchorFile.origin_of(path)
        if origin.rpartition("/")[0] != old.name:
            continue
        try:
            if _handed_over(AnchorFile(directory, origin), origin, old, new):
                done.append(origin)
        except errors.NotProved as error:
            reason = str(error.facts.get("reason"))
            refused = errors.SealRefused(f"{path}: {error.message}", reason=reason)
    if refused:
        refused.facts["handed_over"] = done
        raise refused
    return done


def _handed_over(anchor: AnchorFile, origin: str, old: SigningKey, new: SigningKey) -> bool:
    old_key, new_key = old.verifier(origin), new.verifier(origin)
    with anchor.locked() as stream:
        chain = anchor.chain(origin, [old_key, new_key])
        if not chain.handovers:
            chain = Chain(origin, (old_key,))
        tail = anchor.tail(stream)
        if tail.last is None or chain.keys_at(MAX_SIZE)[0] == new_key:
            return False
        if tail.torn is not None:
            raise errors.NotProved(
                "its last checkpoint is cut off: seal the tenant once first", reason="torn"
            )
        if chain.keys_at(MAX_SIZE)[0] != old_key:
            raise errors.NotProved("another key than the old one is in charge", reason="wrong-key")
        at = _checkpoint(tail.last, chain)
        text = at.text()
        signed = Note(text, ()) if Handover.is_one(tail.last) else tail.last
        both = signed.with_signatures([old.sign(text, origin), new.sign(text, origin)])
        if both != tail.last:  # proofs before the next seal verify with either key
            anchor.append(stream, tail, both)
            tail = anchor.tail(stream)
        anchor.append(stream, tail, Handover.signed(at, old, new))
    return True
