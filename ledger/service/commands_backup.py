"""The commands that carry a ledger elsewhere: backup, restore, export-ledger, import-ledger."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ledger import errors
from ledger.service import terminal
from ledger.service.command import (
    Json,
    TenantName,
    Url,
    app,
    connect,
    example,
    print_json,
    print_lines,
)

if TYPE_CHECKING:
    from ledger import Ledger

__all__: list[str] = []


# -- one tenant --------------------------------------------------------------------------------


@app.command("export-ledger", epilog=example("govledger export-ledger acgs-dev acgs-dev.ledger"))
def export_ledger(
    tenant: TenantName,
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a tenant's record to a file, every entry's id and bytes exactly as stored.

    The file is there when it is whole and on disk, and nothing is overwritten. It has a checksum,
    can be read by every kind of server's `import-ledger`, and holds what was recorded up to the
    head of now; stop the engines first where the tenant is to move.
    """
    terminal.spare_gc()

    async def work() -> None:
        from ledger.service.exporting import export_tenant
        from ledger.service.files import create_file

        async with connect(url) as ledger:
            head = await ledger.head(tenant)
            with terminal.progress("exporting", head.seq) as advance, create_file(file) as opened:
                done = await export_tenant(ledger.server, tenant, opened, advance)
        told = {"tenant": tenant, "file": str(file), "seq": done.head.seq}
        if as_json:
            print_json(
                {
                    **told,
                    "epoch": done.head.epoch,
                    "entry_id": done.head.entry_id,
                    "entries": done.head.length,
                    "sha256": done.sha256,
                    "records_sha256": done.records_sha256,
                }
            )
        else:
            print_lines(f"{tenant}: {done.head.length} entries to seq {done.head.seq} in {file}")

    terminal.run(work())


@app.command("import-ledger", epilog=example("govledger import-ledger acgs-dev.ledger"))
def import_ledger(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    *,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Record what a file of `export-ledger` holds, on a server that has no such tenant.

    All of it is there at once, after its checksum was found right, under a new epoch; then the
    state is folded. An event that is appended again has its receipt as before: a duplicate.
    """
    terminal.spare_gc()

    async def work() -> None:
        from ledger.service.importing import import_tenant

        async with connect(url) as ledger:
            with file.open("rb") as opened, terminal.progress("importing", None) as advance:
                done = await import_tenant(ledger.server, opened, file, on_progress=advance)
            folded = await _folded(ledger, done.tenant)
        if as_json:
            told = {name: value for name, value in asdict(done).items() if name != "left_out"}
            print_json({**told, "folded": folded})
        else:
            foreign = done.entries - done.own
            aside = f", {foreign} of them foreign" if foreign else ""
            print_lines(f"{done.tenant}: {done.entries} entries to seq {done.seq}{aside}")

    terminal.run(work())


async def _folded(ledger: Ledger, tenant: str) -> int | None:
    """Entries folded; None, and a warning, where the record cannot be: it is imported as it was."""
    from projections import Projector

    try:
        return await Projector(ledger).rebuild(tenant)
    except errors.EntriesMissing as error:
        terminal.say(f"warning: the record is as it was, and its state is not folded: {error}")
        return None
