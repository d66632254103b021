"""The commands that seal and prove: keys, seal, verify, prove, verify-proof, witness."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
    known,
    moment,
    print_json,
    print_lines,
    usage,
)
from ledger.service.files import create_file, refuse_existing
from ledger.wording import counted

if TYPE_CHECKING:
    from ledger.note import VerifierKey
    from ledger.proof import Proof, Proved
    from ledger.seal import Sealed, Sealer
    from ledger.verify import Verification

__all__: list[str] = []

MAX_SEQ_DIGITS = 18

KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="VKEY",
        show_default=False,
        help="Whom to believe: the public key of the log or of its deployment, as `govledger keys "
        "show` prints it. Default: that of the signing key in the environment.",
    ),
]
AnchorDir = Annotated[
    Path | None,
    typer.Option(
        "--anchor",
        metavar="DIR",
        show_default=False,
        help="Where signed checkpoints are kept outside Redis. Default: GOVLEDGER_ANCHOR.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        show_default=False,
        help="The signing key. Default: GOVLEDGER_SIGNING_KEY_FILE or GOVLEDGER_SIGNING_KEY.",
    ),
]
WitnessKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--witness-key",
        metavar="VKEY",
        show_default=False,
        help="This witness must have cosigned the checkpoint; may be repeated.",
    ),
]
Witness = Annotated[
    bool, typer.Option("--witness", help="Print it as a witness's key, which cosigns.")
]


def _settings() -> Any:
    from ledger import load_settings

    return load_settings()


def _signing_key(file: Path | None) -> Any:
    from ledger.keyfile import read_key, signing_key

    return read_key(file) if file else signing_key(_settings())


def _verifier_key(text: str | None) -> VerifierKey:
    from ledger.note import VerifierKey

    if text is not None:
        return VerifierKey.parse(text)
    try:
        key: VerifierKey = _signing_key(None).verifier()
    except errors.InvalidSetting:
        raise errors.InvalidInput(
            "--key is missing: whom to believe",
            hint="`govledger keys show` prints it to the key's owner",
        ) from None
    return key


def _witness_keys(texts: list[str] | None) -> list[VerifierKey]:
    from ledger.note import COSIGNATURE, VerifierKey

    return [VerifierKey.parse(text).of_kind(COSIGNATURE) for text in texts or ()]


def _time(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return f"second {seconds}"


# -- keys --------------------------------------------------------------------------------------

keys_app = typer.Typer(
    help="Signing keys: make one, show its public half, hand over to the next.",
    rich_markup_mode=None,
)
app.add_typer(keys_app, name="keys")


@keys_app.command(
    "new", epilog=example("govledger keys new --deployment acme.example/prod -o seal.key")
)
def keys_new(
    *,
    deployment: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="What the logs are called, before /TENANT: best a domain of yours and a path.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", show_default=False, help="New file.")
    ],
    witness: Witness = False,
    as_json: Json = False,
) -> None:
    """Make a signing key in a new file that only its owner can read; print its public half.

    Give the public half to whoever is to verify, by a way that does not lead through this server.
    """
    from ledger.keyfile import write_key
    from ledger.note import COSIGNATURE, SigningKey

    key = SigningKey.generate(deployment)
    write_key(output, key)
    kind = {"kind": COSIGNATURE} if witness else {}
    _print_key(str(key.verifier(None, **kind)), as_json=as_json)


@keys_app.command(
    "show", epilog=example("govledger keys show --key-file seal.key --tenant acgs-dev")
)
def keys_show(
    *,
    key_file: KeyFile = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="TENANT",
            show_default=False,
            help="The key of this tenant's log alone, for other people's tools.",
        ),
    ] = None,
    witness: Witness = False,
    as_json: Json = False,
) -> None:
    """Print the public half of a signing key."""
    from ledger.note import COSIGNATURE, origin_of

    key = _signing_key(key_file)
    if witness and tenant:
        raise usage("keys show", "--witness and --tenant exclude each other")
    name = origin_of(key.name, tenant) if tenant else None
    kind = {"kind": COSIGNATURE} if witness else {}
    _print_key(str(key.verifier(name, **kind)), as_json=as_json)


def _print_key(text: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"key": text})
    else:
        print_lines(text)
    sys.stdout.flush()


@keys_app.command(
    "rotate",
    epilog=example("govledger keys rotate old.key new.key --anchor /mnt/anchor"),
)
def keys_rotate(
    old: Annotated[Path, typer.Argument(metavar="OLDFILE", show_default=False)],
    new: Annotated[Path, typer.Argument(metavar="NEWFILE", show_default=False)],
    *,
    anchor: AnchorDir = None,
    as_json: Json = False,
) -> None:
    """Hand every log of the deployment over to a new key, by a note that both keys sign.

    Stop the sealer first, and start it with the new key. Checkpoints up to here stay verified by
    the old key, later ones by the new; who trusts either accepts the other where the anchor has
    the note.
    """
    from ledger.keyfile import read_key
    from ledger.seal import rotate

    done = rotate(_anchor(anchor), read_key(old), read_key(new))
    if as_json:
        print_json({"handed_over": done})
    else:
        print_lines(*(f"{origin}: handed over" for origin in done))
    sys.stdout.flush()


def _anchor(given: Path | None) -> Path:
    found: Path | None = given or _settings().govledger_anchor
    if found is None:
        raise errors.InvalidSetting(
            "GOVLEDGER_ANCHOR: there is no anchor directory",
            hint="--anchor DIR: on another disk or machine than Redis, or it proves little",
        )
    return found


# -- seal --------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger seal --once --key-file seal.key --anchor /mnt/anchor",
        "govledger seal acgs-dev --once --key-file seal.key --anchor /mnt/anchor",
    )
)
def seal(
    tenants: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TENANT]...", show_default=False, help="Default: all of them."),
    ] = None,
    *,
    once: Annotated[
        bool, typer.Option("--once", help="Seal what there is now, print it, and end.")
    ] = False,
    key_file: KeyFile = None,
    anchor: AnchorDir = None,
    witness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VKEY@URL",
            show_default=False,
            help="Ask this witness to cosign; may be repeated. Default: GOVLEDGER_WITNESSES.",
        ),
    ] = None,
    rebuild_tiles: Annotated[
        bool,
        typer.Option(
            "--rebuild-tiles",
            help="With --once: derive the tiles that proofs are made of anew from the entries.",
        ),
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Sign what is recorded, and keep the signatures outside Redis.

    Runs until stopped, and seals a tenant when GOVLEDGER_SEAL_ENTRIES are new or the oldest of them
    is GOVLEDGER_SEAL_SECONDS old. Exits with 4 where a ledger contradicts its anchor: then nothing
    is signed.
    """
    if tenants and not once:
        raise usage("seal", "TENANT is for --once: the sealer that runs seals all")
    if rebuild_tiles and not (once and tenants):
        raise usage("seal", "--rebuild-tiles is for --once and a TENANT")
    terminal.spare_gc()

    async def work() -> None:
        from ledger.seal import Sealer
        from ledger.service.operate import ends_on_sigterm
        from ledger.witness import WitnessClient

        asked = witness or _settings().govledger_witnesses.split()
        clients = [WitnessClient.parse(text) for text in asked]
        key, directory = _signing_key(key_file), _anchor(anchor)
        async with ends_on_sigterm(), connect(url) as ledger:
            sealer = Sealer(ledger, key, directory, clients)
            if once:
                await _seal_once(sealer, tenants, rebuild=rebuild_tiles, as_json=as_json)
            else:
                await _seal_for_ever(sealer, as_json=as_json)

    terminal.run(work())


async def _seal_for_ever(sealer: Sealer, *, as_json: bool) -> None:
    os.nice(15)  # engines come first: it catches up when they rest
    address, settings = sealer.server.address, _settings()
    if as_json:
        print_json({"sealing": address, "key": str(sealer.key.verifier())})
        sys.stdout.flush()
    else:
        terminal.say(f"sealing {address} into {sealer.directory}; Ctrl-C ends it")
    await sealer.run(
        every_entries=settings.govledger_seal_entries,
        every_seconds=settings.govledger_seal_seconds,
    )


async def _seal_once(
    sealer: Sealer, tenants: list[str] | None, *, rebuild: bool, as_json: bool
) -> None:
    for tenant in tenants or () if rebuild else ():
        await sealer.rebuild_tiles(tenant)
    try:
        done = await sealer.run_once(tenants)
    except errors.LedgerError as error:
        sealed: Any = error.facts.get("sealed", [])
        _print_sealed(sealed, as_json=as_json)
        sys.stdout.flush()
        raise
    _print_sealed(done, as_json=as_json)


def _print_sealed(done: list[Sealed], *, as_json: bool) -> None:
    from ledger.note import b64

    for one in done:
        size = one.checkpoint.size if one.checkpoint else 0
        root = b64(one.checkpoint.root) if one.checkpoint else None
        if as_json:
            shown = {"tenant": one.tenant, "sealed": one.entries, "size": size, "root": root}
            print_json({**shown, "witnesses": one.witnesses, "waiting": one.waiting})
            continue
        by = f", cosigned by {', '.join(one.witnesses)}" if one.witnesses else ""
        waiting = "; the last 5 s wait, as this server does not fsync each append"
        print_lines(
            f"{one.tenant}: {counted(one.entries, 'new entry')} sealed, {size} in all{by}"
            f"{waiting if one.waiting else ''}"
        )


# -- verify ------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger verify acgs-dev --anchor /mnt/anchor --key acme.example/prod+0f1e2d3c+AbCd…",
        "govledger verify acgs-dev --anchor checkpoint.txt --key VKEY --json",
    )
)
def verify(
    tenant: TenantName,
    *,
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|URL",
            show_default=False,
            help="Signed checkpoints outside Redis: the sealer's directory, a file that was kept, "
            "or a witness. Default: GOVLEDGER_ANCHOR.",
        ),
    ] = None,
    key: KeyOption = None,
    witness_key: WitnessKeys = None,
    allow_foreign: Annotated[
        bool,
        typer.Option(
            "--allow-foreign",
            help="Sealed entries that others wrote into the stream are no reason to fail.",
        ),
    ] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Compare the raw entries with what was signed.

    Exits with 0 only where that is proved and nothing is found; with 1 it says what is wrong, and
    where. Without an anchor nothing is proved, and it says why.
    """
    terminal.spare_gc()
    trusted, witnesses = _verifier_key(key), _witness_keys(witness_key)
    kept = _settings().govledger_anchor
    place = anchor or (str(kept) if kept else None)

    async def work() -> None:
        from ledger.verify import verify as run

        async with connect(url) as ledger:
            with terminal.progress("verifying", None) as advance:
                found = await run(
                    ledger,
                    tenant,
                    trusted,
                    anchor=place,
                    witnesses=witnesses,
                    allow_foreign=allow_foreign,
                    on_progress=advance,
                )
        _print_verification(found, as_json=as_json)
        if not found.ok:
            raise typer.Exit(terminal.EXIT_NEGATIVE)

    terminal.run(work())


def _print_verification(found: Verification, *, as_json: bool) -> None:
    from dataclasses import asdict

    from ledger.note import b64

    if as_json:
        print_json({**asdict(found), "ok": found.ok, "root": b64(found.root)})
        sys.stdout.flush()
        return
    lines = []
    if found.proved:
        lines.append(
            f"{found.tenant}: PROVED: seq 1 to {found.sealed} are what was sealed as {found.origin}"
        )
        compared = counted(found.checkpoints, "signed checkpoint")
        lines.append(f"  compared with {compared}; the last: {b64(found.root)}")
        lines += [f"  cosigned by {who} at {_time(at)}" for who, at in found.witnessed.items()]
    else:
        lines.append(f"{found.tenant}: NOT PROVED, log {found.origin}")
    lines += [f"  found: {one.reason}: {one.message}" for one in found.findings]
    lines += [f"  note: {what}" for what in found.notes]
    lines += [f"  not proved: {what}" for what in found.not_proved]
    print_lines(*map(terminal.printable, lines))
    sys.stdout.flush()


# -- prove -------------------------------------------------------------------------------------


@app.command(
    epilog=example(
        "govledger prove acgs-dev d-1 -o d-1.tlog-proof",
        "govledger prove acgs-dev --range 2026-03-01..2026-03-31 -o march.range-proof",
        "govledger prove acgs-dev --continues january.checkpoint -o since-january.proof",
    )
)
def prove(
    tenant: TenantName,
    event_id: Annotated[str | None, typer.Argument(metavar="ID", show_default=False)] = None,
    *,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", show_default=False, help="New file."),
    ],
    seq: Annotated[
        int | None, typer.Option(metavar="SEQ", min=1, show_default=False, help="Instead of ID.")
    ] = None,
    range_text: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="A..B",
            show_default=False,
            help="All entries from A to B, two seqs or two times, and that there is no other.",
        ),
    ] = None,
    continues: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            show_default=False,
            help="That the latest checkpoint continues the one in this file.",
        ),
    ] = None,
    withhold_data: Annotated[
        bool, typer.Option("--withhold-data", help="Put only the digests of `data` into the proof.")
    ] = False,
    key: KeyOption = None,
    anchor: AnchorDir = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a proof of an entry, a range or a continuation.

    One file, to be verified offline by `govledger verify-proof`.
    """
    given = [event_id, seq, range_text, continues]
    if sum(one is not None for one in given) != 1:
        raise usage("prove", "give one of ID, --seq, --range, --continues")
    refuse_existing(output)
    trusted = _verifier_key(key)
    kept = anchor or _settings().govledger_anchor

    async def work() -> None:
        from ledger import prove as proving

        options: dict[str, Any] = {"key": trusted, "anchor": kept}
        proof: Proof
        async with connect(url) as ledger:
            await known(ledger, tenant)
            if continues is not None:
                old = _read_checkpoint(continues)
                proof = await proving.prove_consistency(ledger, tenant, old, **options)
            elif range_text is not None:
                options |= {"withhold_data": withhold_data, **_range(range_text, "prove")}
                proof = await proving.prove_range(ledger, tenant, **options)
            else:
                options |= {"withhold_data": withhold_data, "seq": seq}
                proof = await proving.prove(ledger, tenant, event_id, **options)
        raw = proof.encode()
        with create_file(output) as file:
            file.write(raw)
        told = {"tenant": tenant, "file": str(output), "bytes": len(raw)}
        if as_json:
            print_json(told)
        else:
            print_lines(f"{output}: {len(raw)} bytes")

    terminal.run(work())


def _range(text: str, command: str) -> dict[str, Any]:
    first, dots, last = text.partition("..")
    if not dots:
        raise usage(command, f"--range: {text!r} is no range: write A..B")
    if all(not one or (one.isascii() and one.isdigit()) for one in (first, last)):
        if max(len(first), len(last)) > MAX_SEQ_DIGITS:
            raise usage(command, f"--range: {text[:60]!r} is no range of seqs")
        return {
            "first_seq": int(first) if first else None,
            "last_seq": int(last) if last else None,
        }
    return {
        "since": moment(first or None, "--range", at_the_end_of_a_day=False),
        "to": moment(last or None, "--range", at_the_end_of_a_day=True),
    }


def _read_checkpoint(path: Path) -> Any:
    from ledger.anchor import read_notes
    from ledger.regular import open_regular

    with open_regular(path) as stream:
        notes = list(islice(read_notes(stream, path.name), 2))
    if len(notes) != 1:
        many = "more than one" if notes else "no"
        raise errors.InvalidInput(f"{path}: {many} checkpoint, and one is asked for")
    return notes[0]


@app.command(
    "verify-proof",
    epilog=example(
        "govledger verify-proof d-1.tlog-proof --key acme.example/prod+0f1e2d3c+AbCd…",
        "govledger verify-proof march.range-proof --key VKEY --range 2026-03-01..2026-03-31",
    ),
)
def verify_proof(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    *,
    key: Annotated[
        list[str],
        typer.Option(
            metavar="VKEY",
            show_default=False,
            help="Whom to believe; of a log whose key was handed over, either.",
        ),
    ],
    witness_key: WitnessKeys = None,
    continues: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            show_default=False,
            help="For a proof that one checkpoint continues another: the earlier one.",
        ),
    ] = None,
    range_text: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="A..B",
            show_default=False,
            help="It must have all entries of the log from A to B, two seqs or two times. Without "
            "this it may have any that follow each other.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a proof, without Redis and without a network.

    Prints what it proves, and the entries. Exits with 0 only if it proves something, and what was
    asked for.
    """
    from ledger.note import VerifierKey
    from ledger.proof import ConsistencyProof, read_proof
    from ledger.regular import open_regular

    trusted, witnesses = list(map(VerifierKey.parse, key)), _witness_keys(witness_key)
    asked = _range(range_text, "verify-proof") if range_text is not None else {}
    with open_regular(file) as stream:
        proof = read_proof(stream)
        if isinstance(proof, ConsistencyProof):
            if continues is None:
                raise usage("verify-proof", "--continues is missing: the earlier checkpoint")
            if asked:
                raise usage("verify-proof", "--range is for a proof of entries")
            proved = proof.verify(trusted, _read_checkpoint(continues), witnesses)
        else:
            proved = proof.verify(trusted, witnesses)
        _print_proved(proved, _complete(proved, asked) if asked else None, as_json=as_json)
        sys.stdout.flush()


class _Complete(NamedTuple):
    """What the proof says of the range that was asked for."""

    seqs: range
    told: str
    open_end: bool
    """Whether it goes to the checkpoint's end, which says nothing of what was recorded after."""


def _complete(proved: Proved, asked: dict[str, Any]) -> _Complete:
    from ledger.ledger import time_ms

    if "since" not in asked:
        seqs = proved.seqs_between(asked["first_seq"], asked["last_seq"])
        told = f"all records {seqs.start} to {seqs.stop - 1}, as was asked"
        open_end = asked["last_seq"] is None
    else:
        seqs = proved.seqs_recorded(time_ms(asked["since"]), time_ms(asked["to"]))
        told = f"recorded in that time: {len(seqs)}"
        told += f", {seqs.start} to {seqs.stop - 1}, and no other" if seqs else " records"
        open_end = seqs.stop > proved.checkpoint.size
    if open_end:
        told += "; the checkpoint ends there, and says nothing of what was recorded after it"
    return _Complete(seqs, told, open_end)


def _print_proved(proved: Proved, complete: _Complete | None, *, as_json: bool) -> None:
    from ledger.note import b64
    from ledger.service.fields import field_line, name_text

    checkpoint, count = proved.checkpoint, len(proved.entries)
    cosigned = {one.name: one.time_s for one in proved.cosignatures}
    if as_json:
        _print_proved_json(
            {
                "proved": True,
                "origin": checkpoint.origin,
                "size": checkpoint.size,
                "root": b64(checkpoint.root),
                "first_seq": proved.first_seq,
                "continues": proved.old.size if proved.old else None,
                "range": [complete.seqs.start, complete.seqs.stop - 1] if complete else None,
                "open_end": complete.open_end if complete else None,
                "cosigned": cosigned,
            },
            proved,
        )
        return
    lines = [f"PROVED, log {checkpoint.origin}"]
    if proved.old is not None:
        lines.append(
            f"  the checkpoint of size {checkpoint.size} continues that of {proved.old.size}"
        )
    elif count == 1:
        lines.append(f"  record {proved.first_seq} of {checkpoint.size}")
    else:
        lines.append(
            f"  records {proved.first_seq} to {proved.last_seq} of {checkpoint.size}, and no other "
            "between"
        )
    lines += [f"  {complete.told}"] if complete else []
    lines += [f"  cosigned by {who} at {_time(at)}" for who, at in cosigned.items()]
    print_lines(*map(terminal.printable, lines))
    for seq, entry in enumerate(proved.entries, proved.first_seq):
        print_lines(f"  seq {seq}  {name_text(entry.entry_id)}")
        for name, withheld, value in entry.fields:
            print_lines(f"    {field_line(name, value, withheld=withheld)}")


def _print_proved_json(head: dict[str, Any], proved: Proved) -> None:
    """One object on one line; its entries one by one, as there may be more than memory takes."""
    import orjson

    from ledger.service.fields import field_json, text_or_base64

    out = sys.stdout.buffer
    out.write(orjson.dumps(head).removesuffix(b"}") + b',"entries":[')
    for seq, entry in enumerate(proved.entries, proved.first_seq):
        fields = [
            field_json(name, value, withheld=withheld) for name, withheld, value in entry.fields
        ]
        shown = {"seq": seq, **text_or_base64("entry_id", entry.entry_id), "fields": fields}
        out.write(b"," * (seq > proved.first_seq) + orjson.dumps(shown))
    out.write(b"]}\n")


# -- witness -----------------------------------------------------------------------------------

witness_app = typer.Typer(
    help="A witness: a second machine that sees that no log forks.", rich_markup_mode=None
)
app.add_typer(witness_app, name="witness")


@witness_app.command(
    "serve",
    epilog=example(
        "govledger keys new --deployment w.example/w1 -o w.key --witness",
        "govledger witness serve --key-file w.key --log acme.example/prod+0f1e2d3c+AbCd… "
        "--data /var/lib/witness",
    ),
)
def witness_serve(
    *,
    key_file: KeyFile = None,
    log: Annotated[
        list[str],
        typer.Option(
            metavar="VKEY",
            show_default=False,
            help="The key of a log, or of a deployment for all its tenants; may be repeated.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", show_default=False, help="Where it remembers what it cosigned."
        ),
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="The port; 0 = any free one.")
    ] = 8300,
    as_json: Json = False,
) -> None:
    """Run a witness as C2SP tlog-witness says, until stopped.

    It cosigns a checkpoint only if it continues the one before, so that who verifies with its key
    knows that there is one history. It begins by printing its own public key, as sealers and
    verifiers take it. HTTP without TLS: put a proxy in front for other machines.
    """
    from ledger.note import VerifierKey
    from ledger.service.witness_server import WitnessServer
    from ledger.witness import Witness

    logs = [VerifierKey.parse(text) for text in log]

    async def work() -> None:
        from ledger.service.operate import ends_on_sigterm

        with (
            closing(Witness(_signing_key(key_file), logs, data)) as witness,
            WitnessServer((host, port), witness) as server,
        ):
            key, place = str(witness.verifier), f"{witness.verifier}@{server.url}"
            if as_json:
                print_json({"witness": place, "key": key, "url": server.url})
            else:
                print_lines(f"for who seals:    --witness {place}")
                print_lines(f"for who verifies: --witness-key {key}")
            sys.stdout.flush()
            async with ends_on_sigterm():
                serving = asyncio.ensure_future(asyncio.to_thread(server.serve_forever))
                try:
                    await asyncio.shield(serving)
                finally:
                    server.shutdown()
                    await serving

    terminal.run(work())
