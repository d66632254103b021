"""A backup: a directory with a manifest, and either the server's snapshot or every tenant's export.

`manifest.json` states what was there, and is written last: a directory without it is no backup.
`manifest.json.sha256` has its digest, as `sha256sum -c` reads it.

- `snapshot`: `dump.rdb`, the whole server as of one moment. Taken where this machine can read the
  server's snapshot file and the embedded server can load it.
- `logical`: `tenants/<n>-<tenant>.ledger`, each as `portable.py` describes it, each as of its own
  moment. It moves between all kinds of servers, and holds the record alone: sessions, caches and
  other memory keys are not in it, and state is folded anew at restore.

To verify, the copy is loaded into a scratch server, and each tenant's head, entries and folds are
compared with those of the live server up to the same seq: the record never changes behind a head.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from ledger import __version__, errors, keys
from ledger.durable import fsync_directory
from ledger.ledger import Ledger
from ledger.server import Server
from ledger.service.digests import fold_digest, fold_name
from ledger.service.dump import CannotDump, copy_dump, dump_path
from ledger.service.exporting import export_tenant, readable_head, record_digest
from ledger.service.files import in_thread, partial_path, put_directory, remove
from ledger.service.importing import import_tenant
from ledger.service.inspection import server_now_ms
from ledger.service.scratch import check_loadable, known_tenants, lay_dump, private_server
from ledger.stream import Head
from ledger.wording import counted
from projections import Projector
from projections.projection import Projection

__all__ = [
    "DUMP",
    "MANIFEST",
    "Manifest",
    "TenantState",
    "check_target",
    "export_path",
    "make_backup",
    "read_manifest",
]

MANIFEST: Final = "manifest.json"
DUMP: Final = "dump.rdb"
FORMAT: Final = "govledger-backup"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 256 << 20
MAX_TIME_MS: Final = 253_402_300_800_000
"""The year 10000."""

_CANNOT_EXPORT: Final = (
    errors.NotFound,
    errors.IndexBehind,
    errors.EntriesMissing,
    errors.InvalidBackup,
)

Say = Callable[[str], None]


class TenantState(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What a backup holds of a tenant. `problem`: why it could not be copied or compared."""

    tenant: str
    epoch: str = ""
    seq: int = 0
    entry_id: str = "0-0"
    entries: int = 0
    records_sha256: str | None = None
    folds: dict[str, str] = msgspec.field(default_factory=dict)
    """`governance@1` → SHA-256 of what it makes of the entries."""
    file_sha256: str | None = None
    problem: str | None = None


class _Format(msgspec.Struct):
    """What every release's manifest says of itself, whatever else it has."""

    format: str
    version: int


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """`manifest.json`. Every entry that was recorded by `taken_at_ms` is in the backup.

    Where a snapshot is not `verified`, heads were read before it was taken, and it has at least
    these.
    """

    kind: Literal["snapshot", "logical"]
    taken_at_ms: int
    server: str
    server_version: str
    verified: bool
    tenants: list[TenantState]
    why_logical: str | None = None
    dump_bytes: int = 0
    dump_sha256: str | None = None
    format: str = FORMAT
    version: int = VERSION
    govledger: str = __version__

    @property
    def entries(self) -> int:
        """Of all tenants."""
        return sum(one.entries for one in self.tenants)

    @property
    def problems(self) -> list[str]:
        """What could not be copied or compared, a line each."""
        return [f"{one.tenant}: {one.problem}" for one in self.tenants if one.problem]


def export_path(directory: Path, place: int, tenant: str) -> Path:
    """A tenant's file in a logical backup; numbered, as a file system may not tell `A` from `a`."""
    return directory / "tenants" / f"{place:05d}-{tenant}.ledger"


def read_manifest(directory: Path) -> Manifest:
    """A backup's manifest.

    Raises:
        InvalidBackup: there is none, its digest is another, or it is of a newer release.
    """
    path = directory / MANIFEST
    raw = _checked_manifest(path)
    try:
        of = msgspec.json.decode(raw, type=_Format)
        if (of.format, of.version) != (FORMAT, VERSION):
            raise errors.InvalidBackup(
                f"{path}: {of.format} {of.version} is not what this release reads",
                hint="a newer govledger can read it",
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise errors.InvalidBackup(
            f"{path}: it is damaged: {error}", hint="take another copy of the backup"
        ) from None
    if not 0 <= manifest.taken_at_ms < MAX_TIME_MS:
        raise errors.InvalidBackup(f"{path}: it was taken at no time: {manifest.taken_at_ms} ms")
    for one in manifest.tenants:
        keys.checked_tenant(one.tenant)
    return manifest


def _checked_manifest(path: Path) -> bytes:
    """The manifest's bytes as they were written: one flipped bit in them might hide a tenant."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES)
        with _digest_path(path).open("rb") as file:
            stated = file.read(64).decode(errors="replace")
    except FileNotFoundError as error:
        raise errors.InvalidBackup(
            f"{path.parent}: there is no {Path(error.filename).name}: this is no backup, or one "
            "that was not finished",
            hint="name a directory of `govledger backup`, or a snapshot or export file itself",
        ) from None
    found = hashlib.sha256(raw).hexdigest()
    if found != stated:
        raise errors.InvalidBackup(
            f"{path}: it is damaged: its SHA-256 is {found}, the file beside it says {stated!a}",
            hint="take another copy of the backup",
        )
    return raw


def _digest_path(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.name}.sha256")


def check_target(directory: Path) -> None:
    """Raises `TargetExists` unless `directory` is absent or an empty directory that can be replaced
    by a whole one in one step.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise errors.TargetExists(f"{directory} is no directory", hint="choose another name")
    if directory.is_dir() and any(directory.iterdir()):
        raise errors.TargetExists(
            f"{directory} is not empty", hint="choose another name: nothing is overwritten"
        )
    if directory.is_mount():
        raise errors.TargetExists(
            f"{directory} is where a disk is mounted, and cannot be replaced",
            hint=f"name a directory in it, such as {directory / 'ledger'}",
        )


# -- making one ---------------------------------------------------------------------------------


async def make_backup(ledger: Ledger, directory: Path, *, verify: bool, say: Say) -> Manifest:
    """Makes a backup in `directory`, which is there when it is whole and on disk.

    Args:
        ledger: of which server.
        directory: absent or empty.
        verify: load it into a scratch server, and compare.
        say: is told what is being done.

    Raises:
        TargetExists: there is something already.
        InvalidBackup: the copy is not what the server has.
        ServerBusy: the server could not save.
        EmbeddedServerError: the scratch server ended, as where the disk is full.
    """
    directory, partial = await in_thread(_begin, directory)
    try:
        manifest = await _Backup(ledger, partial, say).make(verify=verify)
        await in_thread(_finish, partial, manifest)
        put_directory(partial, directory)
    except BaseException:
        await in_thread(remove, partial)
        raise
    return manifest


def _begin(directory: Path) -> tuple[Path, Path]:
    directory = directory.expanduser().absolute()
    check_target(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(directory)
    partial.mkdir(mode=0o700)
    return directory, partial


def _finish(partial: Path, manifest: Manifest) -> None:
    path = partial / MANIFEST
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    digest = f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n".encode()
    for target, content in ((_digest_path(path), digest), (path, raw)):
        with target.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    fsync_directory(partial)


class _Backup:
    """One backup on its way, in a directory that has no name yet."""

    def __init__(self, ledger: Ledger, partial: Path, say: Say) -> None:
        self._ledger = ledger
        self._server = ledger.server
        self._partial = partial
        self._scratch = partial / "scratch"
        self._say = say

    async def make(self, *, verify: bool) -> Manifest:
        try:
            manifest = await self._snapshot()
        except CannotDump as error:
            (self._partial / DUMP).unlink(missing_ok=True)
            self._say(f"a logical backup, an export of each tenant: {error}")
            manifest = await self._logical(str(error))
        if verify:
            self._say("loading it into a scratch server, and comparing")
            try:
                await self._verify(manifest)
            finally:
                await in_thread(remove, self._scratch)
        return manifest

    async def _manifest(self, kind: Literal["snapshot", "logical"]) -> Manifest:
        settings = await self._server.node_settings("")
        return Manifest(
            kind=kind,
            taken_at_ms=await server_now_ms(self._server),
            server=self._server.address,
            server_version=settings.version or "",
            verified=False,
            tenants=[],
        )

    async def _snapshot(self) -> Manifest:
        source = await dump_path(self._server)
        manifest = await self._manifest("snapshot")
        manifest.tenants = [await self._live_head(one) for one in await self._live_tenants()]
        self._say("the server saves a snapshot")
        dump = await copy_dump(self._server, source, self._partial / DUMP)
        with dump.path.open("rb") as file:
            header = file.read(16)
        try:
            check_loadable(dump.path, header)
        except errors.InvalidBackup as error:
            raise CannotDump(error.message.partition(": ")[2]) from error
        manifest.dump_bytes, manifest.dump_sha256 = dump.bytes, dump.sha256
        return manifest

    async def _live_tenants(self) -> list[str]:
        tenants, stray = await known_tenants(self._server)
        for tenant in stray:
            self._say(f"tenant {tenant} is not in the registry; it is backed up all the same")
        return tenants

    async def _live_head(self, tenant: str) -> TenantState:
        try:
            head = await readable_head(self._server, tenant)
        except errors.IndexBehind as error:
            return TenantState(tenant, problem=error.message)
        return TenantState(tenant, epoch=head.epoch, seq=head.seq, entry_id=head.entry_id)

    async def _logical(self, why: str) -> Manifest:
        manifest = await self._manifest("logical")
        manifest.why_logical = why
        (self._partial / "tenants").mkdir(mode=0o700)
        for place, tenant in enumerate(await self._live_tenants()):
            path = export_path(self._partial, place, tenant)
            manifest.tenants.append(await self._export(tenant, path))
        fsync_directory(self._partial / "tenants")
        return manifest

    async def _export(self, tenant: str, path: Path) -> TenantState:
        try:
            with path.open("xb") as file:
                done = await export_tenant(self._server, tenant, file)
                file.flush()
                os.fsync(file.fileno())
        except _CANNOT_EXPORT as error:
            # One tenant that cannot be read must not leave the others without a backup.
            await in_thread(path.unlink)
            problem = None if isinstance(error, errors.NotFound) else error.message
            return TenantState(tenant, problem=problem)
        return TenantState(
            tenant,
            epoch=done.head.epoch,
            seq=done.head.seq,
            entry_id=done.head.entry_id,
            entries=done.head.length,
            records_sha256=done.records_sha256,
            file_sha256=done.sha256,
        )

    # -- verifying --------------------------------------------------------------------------

    async def _verify(self, manifest: Manifest) -> None:
        if manifest.kind == "snapshot":
            await in_thread(lay_dump, self._partial / DUMP, self._scratch)
            async with private_server(self._scratch, self._partial / DUMP) as scratch:
                await self._verify_snapshot(manifest, scratch.server)
        else:
            async with private_server(self._scratch) as scratch:
                for place, state in enumerate(manifest.tenants):
                    if state.file_sha256 is not None:
                        path = export_path(self._partial, place, state.tenant)
                        await self._verify_export(state, path, scratch.server)
        manifest.verified = True

    async def _verify_snapshot(self, manifest: Manifest, scratch: Server) -> None:
        before = {one.tenant: one for one in manifest.tenants}
        there, _ = await known_tenants(scratch)
        absent = before.keys() - set(there)
        if absent:
            raise _not_the_same(min(absent), "it is not in the snapshot")
        manifest.tenants = [
            await self._verify_tenant(tenant, before.get(tenant), scratch) for tenant in there
        ]

    async def _verify_tenant(
        self, tenant: str, before: TenantState | None, scratch: Server
    ) -> TenantState:
        try:
            head = await readable_head(scratch, tenant)
        except errors.IndexBehind as error:
            if before is not None and before.problem is None:
                raise _not_the_same(tenant, error.message) from error
            return TenantState(tenant, problem=error.message)
        if before is not None and (head.epoch != before.epoch or head.seq < before.seq):
            raise _not_the_same(
                tenant, f"it had seq {before.seq} in epoch {before.epoch}, the snapshot has {head}"
            )
        if not head.epoch:  # a first append that never came
            return TenantState(tenant)
        return await self._compared(tenant, head, scratch)

    async def _verify_export(self, state: TenantState, path: Path, scratch: Server) -> None:
        with path.open("rb") as file:
            done = await import_tenant(scratch, file, path)
        if (done.seq, done.records_sha256) != (state.seq, state.records_sha256):
            raise _not_the_same(state.tenant, "the file does not hold what was exported")
        head = Head(state.tenant, state.epoch, done.seq, done.entry_id, 0)
        compared = await self._compared(state.tenant, head, scratch)
        state.folds, state.problem = compared.folds, compared.problem

    async def _compared(self, tenant: str, head: Head, scratch: Server) -> TenantState:
        """Entries and folds up to a head, found the same on the scratch and the live server."""
        stream = keys.decisions(tenant)
        count, sha256 = await record_digest(scratch, stream, head.entry_id)
        live = await record_digest(self._server, stream, head.entry_id)
        if live != (count, sha256):
            raise _not_the_same(
                tenant,
                f"up to {head.entry_id} the copy has {counted(count, 'entry')} of digest "
                f"{sha256[:16]}, the server {live[0]} of {live[1][:16]}",
            )
        state = TenantState(
            tenant,
            epoch=head.epoch,
            seq=head.seq,
            entry_id=head.entry_id,
            entries=count,
            records_sha256=sha256,
        )
        for projection in Projector(self._ledger).projections:
            copied, lived = [
                await _fold_or_hole(source, tenant, projection, head.seq, scratch)
                for source in (scratch, self._server)
            ]
            if copied != lived:
                raise _not_the_same(tenant, f"{fold_name(projection)}: {copied} against {lived}")
            if isinstance(copied, _Hole):
                state.problem = copied.message
            else:
                state.folds[fold_name(projection)] = copied
        return state


class _Hole(msgspec.Struct, frozen=True):
    """Why a record cannot be folded; the same on both sides, or the copy is another."""

    message: str


async def _fold_or_hole(
    source: Server, tenant: str, projection: Projection, until: int, scratch: Server
) -> str | _Hole:
    try:
        return await fold_digest(source, tenant, projection, until, scratch)
    except errors.EntriesMissing as error:
        return _Hole(error.message)


def _not_the_same(tenant: str, what: str) -> errors.InvalidBackup:
    return errors.InvalidBackup(
        f"the backup is not what the server has: tenant {tenant}: {what}",
        hint="nothing was kept of it; back up again, and if it fails again run `govledger replay` "
        "on that tenant",
        tenant=tenant,
    )
