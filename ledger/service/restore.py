"""Restoring: plan first, then make a data directory beside its place, prove it, give it its name.

A restored tenant has a new epoch, so that no projector or reader takes it for the continuation of
what it was copied from. Its state is folded anew and published. A point in time is a cut of the
record: an entry's id has the time it was recorded at and its ordinal, and nothing that came later
can have changed what lay before it, so the finest grain is one entry, or one millisecond. What is
no record (sessions, caches, other memory keys) has no history: a whole snapshot brings it back, a
point in time and a logical backup do not.

A crash at any step leaves a directory whose name begins with a dot and ends with `.partial`, which
nothing reads and anybody may delete, and DATA_DIR as it was.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

from ledger import errors, keys
from ledger.durable import fsync_directory
from ledger.embedded import is_running
from ledger.ledger import Ledger
from ledger.memory import iso_ms
from ledger.server import Server
from ledger.service.backup import (
    DUMP,
    MANIFEST,
    TenantState,
    check_target,
    export_path,
    read_manifest,
)
from ledger.service.digests import fold_name
from ledger.service.exporting import export_tenant, readable_head, record_digest
from ledger.service.files import in_thread, partial_path, put_directory, remove
from ledger.service.importing import Cut, Imported, import_tenant
from ledger.service.inspection import info
from ledger.service.portable import MAGIC, ExportReader
from ledger.service.scratch import (
    AOF_DIR,
    check_loadable,
    dump_time_ms,
    file_digest,
    is_dump,
    known_tenants,
    lay_dump,
    private_server,
)
from ledger.service.unknown_folds import forget_unknown_folds
from ledger.stream import Head, split_id
from ledger.wording import counted, shown
from projections import Projector
from projections.store import FoldStore

__all__ = ["Plan", "PlannedTenant", "Restored", "Target", "make_plan", "restore"]

ROOM_FACTOR: Final = 2.5
"""A dump is laid once or twice, and what is written to the new one is small beside it."""

HEADER_BYTES: Final = 512
YEAR_10000_MS: Final = 253_402_300_800_000

Say = Callable[[str], None]
_log = logging.getLogger("ledger")


@dataclass(frozen=True)
class Target:
    """Where in time to restore to; neither = all that the backup has."""

    to_ms: int | None = None
    to_seq: Mapping[str, int] = field(default_factory=dict)
    """By tenant; those that are not named are restored whole."""

    @property
    def is_cut(self) -> bool:
        """Whether anything is to be left out."""
        return self.to_ms is not None or bool(self.to_seq)

    def cut(self, tenant: str) -> Cut:
        """Where a tenant's record ends."""
        return Cut(self.to_ms, self.to_seq.get(tenant))


class PlannedTenant(NamedTuple):
    """A tenant as the backup states it; its file in a logical one."""

    state: TenantState
    file: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What a restore will do; made without starting anything or writing anywhere."""

    source: Path
    kind: Literal["snapshot", "logical"]
    into: Path
    target: Target
    taken_at_ms: int | None
    """None where there is no manifest to say."""
    verified: bool
    tenants: list[PlannedTenant]
    """Empty for a snapshot file without a manifest: it says itself, once it is loaded."""
    dump: Path | None = None
    dump_sha256: str | None = None

    def steps(self) -> list[str]:
        """What will be done, a line each."""
        to = self.target
        named = [f"tenant {tenant} to seq {seq}" for tenant, seq in sorted(to.to_seq.items())]
        if to.to_ms is not None:
            named.append(f"every tenant to what was recorded by {iso_ms(to.to_ms)}")
        lines = [f"read {self.source}: a {self.kind} backup, checksums right"]
        if self.dump and to.is_cut:
            lines += ["load the snapshot into a scratch server", "export each tenant from it"]
        if self.dump and not to.is_cut:
            lines.append("lay the snapshot as the base of the append-only file")
        else:
            lines.append("import each tenant into a new server")
        lines += [f"cut {one}" for one in named]
        lines += [
            "compare heads, entries and digests"
            + ("" if self.verified else " as far as the backup states them"),
            "give each tenant a new epoch, fold its state and publish it",
            f"stop the server and put its directory at {self.into}",
        ]
        return lines


@dataclass
class Restored:
    """A tenant as it was restored; `problem`: why it, or only its state, could not be."""

    tenant: str
    epoch: str
    seq: int
    entry_id: str
    entries: int
    left_out: int = 0
    folded: int | None = None
    problem: str | None = None


# -- the plan -----------------------------------------------------------------------------------


def make_plan(source: Path, into: Path, target: Target) -> Plan:
    """Looks at everything that can be wrong before anything is written.

    Raises:
        ServerInUse, TargetExists: DATA_DIR has a server, or anything else.
        InvalidBackup: a checksum is wrong, or the embedded server cannot load the snapshot.
        InvalidInput: the point in time is not in the backup, or the disk has no room.
    """
    source, into = source.expanduser().absolute(), into.expanduser().absolute()
    _check_into(into)
    if not source.exists():
        raise errors.InvalidInput(
            f"{source}: there is no such file or directory",
            hint="name what `govledger backup` or `export-ledger` wrote, or a dump.rdb",
        )
    plan = (
        _plan_directory(source, into, target)
        if source.is_dir()
        else _plan_file(source, into, target)
    )
    _check_target(plan)
    _check_room(plan)
    return plan


def _check_into(into: Path) -> None:
    running = is_running(into) if into.is_dir() else None
    if running is not None:
        raise errors.ServerInUse(
            f"a server (pid {running.pid}) runs on {into}",
            hint="restore into another directory, then point REDIS_URL at it",
            pid=running.pid,
        )
    check_target(into)


def _plan_directory(source: Path, into: Path, target: Target) -> Plan:
    manifest = read_manifest(source)
    dump = source / DUMP if manifest.kind == "snapshot" else None
    if dump is not None:
        _check_digest(dump, manifest.dump_sha256)
        _check_header(dump)
    tenants = []
    for place, state in enumerate(manifest.tenants):
        file = None
        if dump is None and state.file_sha256 is not None:
            file = export_path(source, place, state.tenant)
            _check_digest(file, state.file_sha256)
        elif dump is None and state.seq:
            raise errors.InvalidBackup(
                f"{source / MANIFEST}: tenant {state.tenant} has entries and no file",
                hint="the manifest was changed: take another copy of the backup",
            )
        tenants.append(PlannedTenant(state, file))
    _check_nothing_else(source, tenants)
    return Plan(
        source,
        manifest.kind,
        into,
        target,
        manifest.taken_at_ms,
        manifest.verified,
        tenants,
        dump,
        manifest.dump_sha256,
    )


def _check_nothing_else(source: Path, tenants: Sequence[PlannedTenant]) -> None:
    """Raises `InvalidBackup` for a tenant's file that no tenant of the manifest has."""
    known = {one.file for one in tenants}
    for file in sorted((source / "tenants").glob("*.ledger")):
        if file not in known:
            raise errors.InvalidBackup(
                f"{file}: the manifest has no such file",
                hint="take another copy of the backup, or restore this file by itself",
            )


def _plan_file(source: Path, into: Path, target: Target) -> Plan:
    with source.open("rb") as file:
        header = file.read(HEADER_BYTES)
    beside = source.with_name(f"{source.name}.sha256")
    if beside.exists():  # as sha256sum writes it
        _check_digest(source, beside.read_text(errors="replace")[:64])
    if header.startswith(MAGIC):
        planned, taken_ms = _planned_export(source)
        return Plan(source, "logical", into, target, taken_ms, False, [planned])
    if not is_dump(header):
        raise errors.InvalidBackup(
            f"{source}: this is neither a snapshot nor a file of export-ledger",
            hint="name a backup's directory, a dump.rdb, or an exported ledger",
        )
    _check_header(source)
    begun_ms, sha256 = dump_time_ms(header), file_digest(source)
    return Plan(source, "snapshot", into, target, begun_ms, False, [], source, sha256)


def _planned_export(source: Path) -> tuple[PlannedTenant, int]:
    with source.open("rb") as file:
        reader = ExportReader(file, source)
        for _ in reader.entries():  # to its end, where the checksum is
            pass
    head = reader.head
    planned = PlannedTenant(
        TenantState(
            head.tenant,
            epoch=head.epoch,
            seq=head.seq,
            entry_id=head.entry_id,
            entries=head.length,
        ),
        source,
    )
    return planned, head.exported_at_ms


def _check_header(dump: Path) -> None:
    with dump.open("rb") as file:
        check_loadable(dump, file.read(HEADER_BYTES))


def _check_digest(path: Path, stated: str | None) -> None:
    try:
        found = file_digest(path)
    except FileNotFoundError:
        raise errors.InvalidBackup(
            f"{path}: it is missing", hint="take another copy of the backup"
        ) from None
    if found != stated:
        raise errors.InvalidBackup(
            f"{path}: its SHA-256 is {found}, the backup states {stated}",
            hint="the file was damaged or replaced: take another copy of the backup",
            path=str(path),
        )


def _check_target(plan: Plan) -> None:
    to, taken_ms = plan.target, plan.taken_at_ms
    if to.to_ms is not None and taken_ms is not None and to.to_ms > taken_ms:
        raise errors.InvalidInput(
            f"to: {iso_ms(to.to_ms)} is after the backup, which was taken at {iso_ms(taken_ms)}",
            hint="what was recorded later is not in it: take a newer backup, or an earlier time",
        )
    _check_begun(to, plan.tenants)
    known = {one.state.tenant: one.state for one in plan.tenants}
    for tenant, seq in to.to_seq.items():
        keys.checked_tenant(tenant)
        if not plan.tenants and plan.dump:
            continue  # known when it is loaded
        if tenant not in known:
            raise _no_such_tenant(tenant, list(known))
        exact = plan.verified or plan.kind == "logical"
        if exact and not 1 <= seq <= known[tenant].seq:
            raise errors.InvalidInput(
                f"to-seq: {tenant} goes from seq 1 to {known[tenant].seq} in this backup, not to "
                f"{seq}"
            )


def _no_such_tenant(tenant: str, names: Sequence[str]) -> errors.InvalidInput:
    there = shown(names) or "none"
    return errors.InvalidInput(
        f"to-seq: the backup has no tenant {tenant}", hint=f"there is: {there}"
    )


def _check_begun(to: Target, tenants: Sequence[PlannedTenant]) -> None:
    """Refuses a time before the first entry of all; a snapshot's is known when it is exported."""
    if to.to_ms is None:
        return
    found = (_first_ms(one.file) for one in tenants if one.file)
    oldest_ms = min((ms for ms in found if ms is not None), default=None)
    if oldest_ms is not None and to.to_ms < oldest_ms:
        raise errors.InvalidInput(
            f"to: nothing was recorded by {iso_ms(to.to_ms)}",
            hint=f"the oldest entry of this backup was recorded at {iso_ms(oldest_ms)}: that is "
            "the oldest possible time",
        )


def _first_ms(file: Path) -> int | None:
    """When an exported tenant's first entry was recorded; None where it has none with a time."""
    with file.open("rb") as opened:
        first = next(ExportReader(opened, file).entries(), None)
    ms = None if first is None else split_id(first[0])[0]
    return None if ms is None or ms >= YEAR_10000_MS else ms  # only other hands can write that


def _check_room(plan: Plan) -> None:
    files = [plan.dump] if plan.dump else [one.file for one in plan.tenants if one.file]
    needed = int(sum(file.stat().st_size for file in files) * ROOM_FACTOR)
    parent = plan.into.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise errors.InvalidInput(
            f"{parent} has {free >> 20} MiB free, and this may take {needed >> 20} MiB",
            hint="make room, or restore to another disk",
        )


# -- the act ------------------------------------------------------------------------------------


async def restore(plan: Plan, say: Say) -> list[Restored]:
    """Does what the plan says; DATA_DIR is there when everything was found right.

    Raises:
        InvalidBackup: what was restored is not what the backup states.
        TargetExists: somebody put something at DATA_DIR meanwhile.
        InvalidInput: the point in time is not in the snapshot.
        EmbeddedServerError: the server does not start, or ended in the middle: the disk is full.
    """
    made = [path for path in plan.into.parents if not path.exists()]
    plan.into.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(plan.into)
    partial.mkdir(mode=0o700)
    data_dir = partial / "data"
    try:
        whole = plan.dump is not None and not plan.target.is_cut
        restored = await (_whole if whole else _records)(plan, partial, data_dir, say)
        _sync_and_put(data_dir, plan.into)
    finally:
        await in_thread(remove, partial)
        if not plan.into.exists():
            for path in made:
                with suppress(OSError):  # somebody else has put something there
                    path.rmdir()
    return restored


def _sync_and_put(data_dir: Path, into: Path) -> None:
    for name in ("valkey.log", "valkey.pid"):  # they tell of how it was made
        (data_dir / name).unlink(missing_ok=True)
    for directory in (data_dir / AOF_DIR, data_dir):
        fsync_directory(directory)
    put_directory(data_dir, into)


async def _whole(plan: Plan, partial: Path, data_dir: Path, say: Say) -> list[Restored]:
    """A snapshot as it is, memory keys and all."""
    del partial
    say("laying the snapshot, and starting a server on it")
    await _laid(plan, data_dir)
    async with private_server(data_dir, plan.dump) as ledger:
        tenants, stray = await known_tenants(ledger.server)
        for tenant in stray:
            say(f"tenant {tenant} was not in the registry: now it is")
            await ledger.server.command(keys.TENANTS, "SADD", keys.TENANTS, tenant)
        stated = _stated(plan, tenants)
        await _check_databases(ledger.server, plan, tenants)
        # Another server from now on: it must not thin out the archive of the one it was.
        await ledger.server.command(keys.ARCHIVE_OWNER, "UNLINK", keys.ARCHIVE_OWNER)
        unknown = await forget_unknown_folds(ledger)
        if unknown:
            _log.warning(
                "the state of %s is left out, since nothing here folds it: name a projection of "
                "your own in GOVLEDGER_PROJECTIONS, and `govledger project` folds it anew",
                ", ".join(unknown),
            )
        return [
            await _whole_tenant(ledger, tenant, stated.get(tenant), plan, say) for tenant in tenants
        ]


def _stated(plan: Plan, there: Iterable[str]) -> dict[str, TenantState]:
    """What the backup states of each tenant, when these are the snapshot's tenants.

    Raises:
        InvalidBackup: it states one that is not there, or was verified without one that is.
    """
    stated, found = {one.state.tenant: one.state for one in plan.tenants}, set(there)
    for tenant in sorted(stated.keys() - found):
        raise _not_as_stated(tenant, "it is not in the snapshot")
    for tenant in sorted(found - stated.keys() if plan.verified else ()):
        raise _not_as_stated(tenant, "it is in the snapshot, and the manifest does not list it")
    return stated


async def _check_databases(server: Server, plan: Plan, tenants: Sequence[str]) -> None:
    """A ledger that is in another database than 0 is not seen here: that must not look like none.

    Raises:
        InvalidBackup: there is nothing but such.
    """
    found = await info(server, "", "keyspace")
    others = [name.removeprefix("db") for name in found if re.fullmatch(r"db[1-9]\d*", name)]
    if not others:
        return
    what = f"{plan.dump}: it has keys in database {', '.join(others)} too"
    remedy = "load it with a server and `govledger backup` that database: it is exported"
    if not tenants:
        raise errors.InvalidBackup(f"{what}, and no ledger in database 0", hint=remedy)
    _log.warning("%s, where no ledger is looked for: %s", what, remedy)


async def _laid(plan: Plan, data_dir: Path) -> None:
    assert plan.dump is not None
    if await in_thread(lay_dump, plan.dump, data_dir) != plan.dump_sha256:
        raise errors.InvalidBackup(f"{plan.dump}: it changed while it was read")


async def _whole_tenant(
    ledger: Ledger, tenant: str, stated: TenantState | None, plan: Plan, say: Say
) -> Restored:
    try:
        head = await readable_head(ledger.server, tenant)
    except errors.IndexBehind as error:
        if stated is not None and stated.problem is None:
            raise _not_as_stated(tenant, error.message) from error
        return _not_restored(tenant, error.message, say)
    if not head.epoch and (stated is None or not stated.epoch):  # a first append that never came
        return Restored(tenant, "", 0, "0-0", 0)
    count, sha256 = await record_digest(ledger.server, keys.decisions(tenant), head.entry_id)
    if stated is not None:
        _check_stated(stated, head, count, sha256, verified=plan.verified)
    epoch = secrets.token_hex(8)
    await ledger.server.function("govledger_new_epoch", [keys.head(tenant)], head.epoch, epoch)
    restored = Restored(tenant, epoch, head.seq, head.entry_id, count)
    await _fold(ledger, restored, stated if plan.verified else None, say)
    return restored


def _check_stated(
    stated: TenantState, head: Head, count: int, sha256: str, *, verified: bool
) -> None:
    if stated.problem is not None and not stated.epoch:
        return
    if not verified:  # the heads were read before the snapshot
        same = head.epoch == stated.epoch and head.seq >= stated.seq
    else:
        found = (head.epoch, head.seq, head.entry_id, count, sha256)
        same = found == (
            stated.epoch,
            stated.seq,
            stated.entry_id,
            stated.entries,
            stated.records_sha256,
        )
    if not same:
        raise _not_as_stated(
            stated.tenant,
            f"seq {head.seq}, {counted(count, 'entry')}, digest {sha256[:16]} in epoch "
            f"{head.epoch} against seq {stated.seq}, {stated.entries}, "
            f"{str(stated.records_sha256)[:16]} in {stated.epoch}",
        )


async def _records(plan: Plan, partial: Path, data_dir: Path, say: Say) -> list[Restored]:
    """Each tenant's record, imported into a new server, cut where it was asked for."""
    files = plan.tenants
    if plan.dump is not None:
        files = await _exported(plan, partial, say)
        _check_begun(plan.target, files)
    say("importing into a new server")
    restored = []
    async with private_server(data_dir) as ledger:
        for one in files:
            if one.file is None:
                if one.state.problem:
                    restored.append(_not_restored(one.state.tenant, one.state.problem, say))
                continue
            done = await _import(ledger.server, one.file, plan.target, say)
            if done is not None:
                restored.append(await _imported(ledger, done, one.state, say))
    return restored


async def _exported(plan: Plan, partial: Path, say: Say) -> list[PlannedTenant]:
    """The tenants of a snapshot as files, by way of a scratch server."""
    say("loading the snapshot into a scratch server")
    scratch_dir = partial / "scratch"
    await _laid(plan, scratch_dir)
    files = []
    async with private_server(scratch_dir, plan.dump) as scratch:
        tenants, _ = await known_tenants(scratch.server)
        stated = _stated(plan, tenants)
        await _check_databases(scratch.server, plan, tenants)
        for tenant in plan.target.to_seq:
            if tenant not in tenants:
                raise _no_such_tenant(tenant, tenants)
        for place, tenant in enumerate(tenants):
            path = export_path(partial, place, tenant)
            path.parent.mkdir(exist_ok=True)
            files.append(await _export(scratch.server, tenant, path, stated.get(tenant), plan))
    await in_thread(remove, scratch_dir)
    return files


async def _export(
    scratch: Server, tenant: str, path: Path, stated: TenantState | None, plan: Plan
) -> PlannedTenant:
    try:
        head = await readable_head(scratch, tenant)
        if not head.epoch and (stated is None or not stated.epoch):
            return PlannedTenant(TenantState(tenant))
        count, sha256 = await record_digest(scratch, keys.decisions(tenant), head.entry_id)
        if stated is not None:
            _check_stated(stated, head, count, sha256, verified=plan.verified)
    except errors.IndexBehind as error:
        return PlannedTenant(TenantState(tenant, problem=error.message))
    try:
        with path.open("xb") as file:
            done = await export_tenant(scratch, tenant, file)
    except (errors.EntriesMissing, errors.InvalidBackup) as error:
        return PlannedTenant(TenantState(tenant, problem=error.message))
    seq = plan.target.to_seq.get(tenant)
    if seq is not None and not 1 <= seq <= done.head.seq:
        raise errors.InvalidInput(
            f"to-seq: {tenant} goes from seq 1 to {done.head.seq} in this backup, not to {seq}"
        )
    return PlannedTenant(TenantState(tenant, seq=done.head.seq), path)


async def _import(server: Server, file: Path, target: Target, say: Say) -> Imported | None:
    with file.open("rb") as opened:
        tenant = ExportReader(opened, file).head.tenant
        opened.seek(0)
        try:
            return await import_tenant(server, opened, file, target.cut(tenant))
        except errors.NotFound as error:
            say(f"{error.message}: it is left out")
            return None


async def _imported(ledger: Ledger, done: Imported, stated: TenantState, say: Say) -> Restored:
    whole = not done.left_out
    found = (done.seq, done.entries, done.records_sha256)
    if (
        whole
        and stated.records_sha256
        and found
        != (
            stated.seq,
            stated.entries,
            stated.records_sha256,
        )
    ):
        raise _not_as_stated(done.tenant, f"{found} against what the manifest says")
    restored = Restored(
        done.tenant, done.epoch, done.seq, done.entry_id, done.entries, done.left_out
    )
    await _fold(ledger, restored, stated if whole else None, say)
    return restored


def _not_restored(tenant: str, problem: str, say: Say) -> Restored:
    say(f"warning: tenant {tenant} cannot be restored: {problem}")
    return Restored(tenant, "", 0, "0-0", 0, problem=problem)


async def _fold(ledger: Ledger, restored: Restored, stated: TenantState | None, say: Say) -> None:
    """Folds state anew and publishes it; compares it with what the backup found it to be."""
    projector = Projector(ledger)
    if not restored.seq:  # a head that was rebuilt from nothing
        return
    for projection in projector.projections:
        try:
            restored.folded = await projector.rebuild(
                restored.tenant, projection.name, accept_rollback=True
            )
        except errors.EntriesMissing as error:
            restored.problem = error.message
            say(
                f"warning: tenant {restored.tenant} is restored as it was, and its state cannot be "
                f"folded: {error.message}"
            )
            return
        wanted = (stated.folds if stated else {}).get(fold_name(projection))
        store = FoldStore(ledger.server, restored.tenant, projection)
        if wanted is not None and await store.digest() != wanted:
            raise _not_as_stated(
                restored.tenant, f"{fold_name(projection)} folds to another state than at backup"
            )


def _not_as_stated(tenant: str, what: str) -> errors.InvalidBackup:
    return errors.InvalidBackup(
        f"what was restored is not what the backup states: tenant {tenant}: {what}",
        hint="nothing was put in place; take another copy of the backup, or another backup",
        tenant=tenant,
    )
