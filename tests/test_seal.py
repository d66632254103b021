"""The sealer: exact after a kill at any step, and never two histories under one key."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest

from ledger import Ledger, errors, keys
from ledger.anchor import AnchorFile, read_notes
from ledger.leaf import leaf_hasher
from ledger.merkle import TileTree
from ledger.note import Checkpoint, Handover, Note, SigningKey
from ledger.prove import prove
from ledger.seal import Sealer, rotate
from ledger.service.witness_server import WitnessServer
from ledger.tiles import Tiles
from ledger.verify import verify
from ledger.witness import Witness, WitnessClient, log_path
from tests.evidence import DEPLOYMENT, Case, decision, sealed_case, signed
from tests.servers import KINDS, new_tenant, wait_until
from tests.test_server import as_user, recipe


@pytest.fixture
async def case(valkey, tenant, tmp_path):
    async with sealed_case(valkey, tenant, tmp_path) as case:
        yield case


@contextmanager
def serving(directory, *logs):
    """A witness on a free port; its client, and itself."""
    directory.mkdir(exist_ok=True)
    witness = Witness(SigningKey.generate("witness.example/w1"), logs, directory)
    with WitnessServer(("127.0.0.1", 0), witness) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield WitnessClient(witness.verifier, server.url), witness
        finally:
            server.shutdown()
            thread.join()
            witness.close()


def roots_by_size(*sources):
    """Every signed checkpoint that can be found anywhere: the roots of each size."""
    found: dict[int, set[bytes]] = {}
    for notes in sources:
        for note in notes:
            if not Handover.is_one(note):
                checkpoint = Checkpoint.parse(note.text)
                found.setdefault(checkpoint.size, set()).add(checkpoint.root)
    return found


def anchor_notes(case):
    with case.file.open("rb") as stream:
        return list(read_notes(stream, "anchor"))


def copied_notes(case):
    page = case.client.execute_command("XRANGE", case.copies, "-", "+")
    return [Note.parse(dict(fields)[b"note"]) for _, fields in page]


def whole_signed_notes(raw):
    """What a torn file shows: every note in it whose signature line is whole."""
    parts, found = raw.split(b"\n\n"), []
    for text, signatures in pairwise(parts):
        with suppress(errors.NotProved):
            found.append(Note.parse(text + b"\n\n" + signatures.rstrip(b"\n") + b"\n"))
    return found


# -- kills -------------------------------------------------------------------------------------

CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from ledger import Ledger
from ledger import seal
from ledger.anchor import AnchorFile
from ledger.note import SigningKey
from ledger.tiles import Tiles
from ledger.witness import WitnessClient

url, tenant, secret, anchor, step, witness = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name):
    setattr(owner, name, die)

def after(owner, name, calls=1):
    real = getattr(owner, name)
    count = 0
    if asyncio.iscoroutinefunction(real):
        async def wrapped(*args, **options):
            nonlocal count
            result = await real(*args, **options)
            count += 1
            if count == calls:
                die()
            return result
    else:
        def wrapped(*args, **options):
            nonlocal count
            result = real(*args, **options)
            count += 1
            if count == calls:
                die()
            return result
    setattr(owner, name, wrapped)

def torn(share):
    def append(self, stream, tail, note):
        raw = note.encode() + b"\\n"
        stream.write(raw[: int(len(raw) * share)])
        stream.flush()
        die()
    AnchorFile.append = append

STEPS = {
    "before tiles": lambda: before(Tiles, "_write"),
    "after tiles": lambda: after(Tiles, "_write"),
    "before the signature": lambda: before(AnchorFile, "append"),
    "torn in the name": lambda: torn(0.05),
    "torn in the root": lambda: torn(0.3),
    "torn before the signature": lambda: torn(0.5),
    "torn in the signature": lambda: torn(0.8),
    "torn at the end": lambda: torn(0.995),
    "after the anchor": lambda: after(AnchorFile, "append"),
    "before the witness": lambda: before(WitnessClient, "add"),
    "after the witness": lambda: after(WitnessClient, "add"),
    "after its copy": lambda: after(AnchorFile, "append", 2),
    "before the copy in Redis": lambda: before(seal, "publish_copy"),
    "after the copy in Redis": lambda: after(seal, "publish_copy"),
    "any": lambda: None,
}
STEPS[step]()

async def main():
    async with Ledger.connect(url) as ledger:
        sealer = seal.Sealer(
            ledger, SigningKey.parse(secret), Path(anchor), [WitnessClient.parse(witness)],
            batch_entries=300,
        )
        print("ready", flush=True)
        while True:
            await sealer.seal(tenant)
            if step != "any":
                return

asyncio.run(main())
"""

STEPS = [
    "before tiles",
    "after tiles",
    "before the signature",
    "torn in the name",
    "torn in the root",
    "torn before the signature",
    "torn in the signature",
    "torn at the end",
    "after the anchor",
    "before the witness",
    "after the witness",
    "after its copy",
    "before the copy in Redis",
    "after the copy in Redis",
]


def child(case, step, client, spawn):
    secret, witness = case.key.encode(), f"{client.key}@{client.url}"
    arguments = [case.server.url, case.tenant, secret, str(case.anchor), step, witness]
    return spawn([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE)


@pytest.mark.parametrize("step", STEPS)
async def test_kill_at_any_step_leaves_one_history(case, step, spawn, tmp_path):
    """A sealer killed there goes on exactly; all signed checkpoints agree, and verify passes."""
    with serving(tmp_path / "witness", case.key.verifier()) as (client, witness):
        await case.append(13, 20)
        killed = await asyncio.to_thread(child(case, step, client, spawn).wait, 30)
        assert killed == -signal.SIGKILL
        left_behind = whole_signed_notes(case.file.read_bytes())
        await case.append(21, 24)
        sealed = await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
        assert sealed.checkpoint.size == 24
        shown = Note.parse(witness.latest(log_path(case.origin)).body)
        sources = (left_behind, anchor_notes(case), copied_notes(case), [shown])
        roots = roots_by_size(*sources)
        assert all(len(one) == 1 for one in roots.values())
        found = await case.verify(witnesses=[client.key])
        assert found.ok, found.findings
        assert found.sealed == 24


async def test_kills_in_a_loop_leave_one_history(case, spawn, tmp_path):
    """A sealer killed at random while entries are appended never signs two histories."""
    rng, number = random.Random(5), 13
    with serving(tmp_path / "witness", case.key.verifier()) as (client, _):
        for _ in range(4):
            sealer = child(case, "any", client, spawn)
            assert await asyncio.to_thread(sealer.stdout.readline) == b"ready\n"
            for _ in range(rng.randrange(1, 12)):
                await case.append(number, number + 90)
                number += 91
            sealer.kill()
            await asyncio.to_thread(sealer.wait)
        await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
        roots = roots_by_size(anchor_notes(case), copied_notes(case))
        assert all(len(one) == 1 for one in roots.values())
        found = await case.verify(witnesses=[client.key])
        assert found.ok, found.findings
        assert found.sealed == number - 1


async def test_torn_copy_of_a_whole_checkpoint_is_written_over(case, tmp_path):
    """A cosigned copy that the disk had no room for ends nothing: sealing goes on over it."""
    whole = case.file.read_bytes()
    with serving(tmp_path / "witness", case.key.verifier()) as (client, _):
        sealer = Sealer(case.ledger, case.key, case.anchor, [client])
        await sealer.seal(case.tenant)
        cosigned = case.file.read_bytes()
        for first, missing in ((13, 60), (15, 2)):
            case.file.write_bytes(cosigned[:-missing])
            await case.append(first, first + 1)
            sealed = await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
            assert sealed.entries == 2
            assert case.file.read_bytes().startswith(whole)
            cosigned = case.file.read_bytes()
    assert (await case.verify()).ok


async def test_torn_checkpoint_of_a_sealed_size_stops_the_sealer(case):
    """Another root of a size that is sealed was being signed: that is told, not passed over."""
    other = Checkpoint(case.origin, 12, b"r" * 32).signed(case.key).encode()
    torn = case.file.read_bytes() + other[:-40]
    case.file.write_bytes(torn)
    await case.append(13, 14)
    with pytest.raises(errors.SealRefused, match="another one of size 12"):
        await case.sealer().seal(case.tenant)
    assert case.file.read_bytes() == torn


async def test_torn_checkpoint_of_changed_entries_stops_the_sealer(case):
    """A checkpoint was half written; its entries were changed since: no second one is signed."""
    await case.append(13, 14)
    other = Checkpoint(case.origin, 14, b"r" * 32).signed(case.key).encode()
    whole = case.file.read_bytes()
    case.file.write_bytes(whole + other[:-40])
    with pytest.raises(errors.SealRefused, match="another root was being signed") as caught:
        await case.sealer().seal(case.tenant)
    assert caught.value.facts["reason"] == "tampered"
    assert case.file.read_bytes() == whole + other[:-40]


async def test_racing_sealers_agree(case):
    """Four sealers on one anchor while entries come: one history, and nobody fails."""
    others = [await _opened(case) for _ in range(4)]
    try:
        for number in range(13, 33):
            await case.append(number, number)
            sealers = [Sealer(one, case.key, case.anchor) for one in others]
            sealed = await asyncio.gather(*(sealer.seal(case.tenant) for sealer in sealers))
            assert {one.checkpoint.size for one in sealed} == {number}
    finally:
        for one in others:
            await one.aclose()
    roots = roots_by_size(anchor_notes(case))
    assert all(len(one) == 1 for one in roots.values())
    assert (await case.verify()).ok


async def _opened(case):
    return await Ledger.connect(case.server.url)


async def test_sealer_that_is_overtaken_at_every_step_ends(case):
    """Others sign each size just before it, more often than it tries anew: it is done with them."""
    await case.append(13, 30)
    slow = Sealer(case.ledger, case.key, case.anchor, batch_entries=1)
    sign = slow._sign

    async def late(log):
        note = signed(case.key, case.origin, log.tree.size, log.tree.root())
        with log.anchor.locked() as stream:
            log.anchor.append(stream, log.anchor.tail(stream), note)
        await sign(log)

    slow._sign = late
    sealed = await slow.seal(case.tenant)
    assert sealed.checkpoint.size == 30
    assert (await case.verify()).ok


def overtaken(case, slow, fast):
    """Another sealer seals between the slow one's signature and what it does with it."""
    publish = slow._publish

    async def late(*args, **options):
        slow._publish = publish
        await case.append(21, 25)
        await fast.seal(case.tenant)
        return await publish(*args, **options)

    slow._publish = late


@pytest.mark.parametrize("witnessed", [False, True])
async def test_overtaken_sealer_goes_on(case, tmp_path, witnessed):
    """A sealer that another one overtakes, also at the witness, neither fails nor stops."""
    with serving(tmp_path / "witness", case.key.verifier()) as (client, _):
        clients = [client] if witnessed else []
        slow, fast = (Sealer(case.ledger, case.key, case.anchor, clients) for _ in range(2))
        await case.append(13, 20)
        overtaken(case, slow, fast)
        sealed = await slow.seal(case.tenant)
        assert sealed.witnesses == tuple(one.key.name for one in clients)
        assert (sealed.entries, sealed.checkpoint.size) == (8, 25 if witnessed else 20)
        assert (await case.verify(witnesses=[one.key for one in clients])).ok


async def test_tiles_never_get_shorter(case):
    """A row that comes late, from a slower sealer, takes nothing from the one that is there."""
    tiles = Tiles(case.ledger.server, case.tenant, case.origin)
    slow = await tiles.tree(12)
    await case.append(13, 300)
    await case.sealer().seal(case.tenant)
    there = case.client.hgetall(case.tiles)
    await tiles.write_rows(slow)
    assert case.client.hgetall(case.tiles) == there
    case.client.hset(case.tiles, "1/0", b"x" * 64)
    await tiles.write_rows(await tiles.tree(300))
    assert case.client.hget(case.tiles, "1/0") == b"x" * 64  # the same, as far as it goes
    case.client.delete(case.tiles)
    case.client.set(case.tiles, "another type")
    await case.append(301, 301)
    await case.sealer().seal(case.tenant)
    assert (await case.verify()).ok


async def test_damaged_tiles_are_written_over(case):
    """What is no tile, or has more hashes than one, does not stay for what it begins with."""
    await case.append(13, 300)
    await case.sealer().seal(case.tenant)
    there = case.client.hgetall(case.tiles)
    case.client.hset(case.tiles, "0/0", there[b"0/0"] + b"y" * 32)
    for name in (b"0/1", b"1/0"):
        case.client.hset(case.tiles, name, there[name] + b"x")
    await case.sealer().seal(case.tenant)  # opens, and finds the last of them damaged
    assert case.client.hgetall(case.tiles) == there


# -- what it refuses ---------------------------------------------------------------------------


async def test_restored_ledger_is_not_sealed(case):
    """A ledger behind its anchor stops the sealer, which says from where to where."""
    backup = {
        name: case.client.dump(name)
        for name in case.client.keys(f"claude-flow:ledger:{{{case.tenant}}}:*")
    }
    await case.append(13, 15)
    await case.sealer().seal(case.tenant)
    before = case.file.read_bytes()
    case.client.delete(*backup)
    for name, dump in backup.items():
        case.client.restore(name, 0, dump)
    with pytest.raises(errors.SealRefused, match="at seq 12, the anchor has 15"):
        await case.sealer().seal(case.tenant)
    await case.append(13, 20)  # others now, and more of them
    case.client.hset(case.stream.replace("decisions", "head"), "touched", "1")
    assert case.file.read_bytes() == before


async def test_overtaken_rollback_is_not_sealed(case):
    """A restored ledger that has grown past the anchor is not that which was sealed."""
    names = case.client.keys(f"claude-flow:ledger:{{{case.tenant}}}:*")
    backup = {name: case.client.dump(name) for name in names}
    await case.append(13, 15)
    await case.sealer().seal(case.tenant)
    case.client.delete(*backup)
    for name, dump in backup.items():
        case.client.restore(name, 0, dump)
    await case.append(113, 120)
    with pytest.raises(errors.SealRefused) as caught:
        await case.sealer().seal(case.tenant)
    assert caught.value.facts["reason"] == "tampered"


async def test_lost_tiles_are_derived_anew(case):
    """Deleted or damaged tiles cost time, nothing else."""
    case.client.delete(case.tiles)
    await case.append(13, 13)
    await case.sealer().seal(case.tenant)
    assert (await case.verify()).ok
    case.client.hset(case.tiles, "0/0", b"x" * 32 * 13)
    assert await case.sealer().rebuild_tiles(case.tenant) == 13
    assert (await case.verify()).ok


async def test_hole_in_the_record_stops_the_sealer(case):
    """An unsealed entry that was deleted is named; nothing behind it is signed."""
    await case.append(13, 16)
    case.client.xdel(case.stream, case.entries()[13][0])
    before = case.file.read_bytes()
    with pytest.raises(errors.EntriesMissing, match="seq 14"):
        await case.sealer().seal(case.tenant)
    assert case.file.read_bytes() == before


@pytest.mark.parametrize(
    "anchor", ["put back", "put back and torn", "another directory", "with another root"]
)
async def test_anchor_that_lacks_what_was_signed_is_not_sealed_on(case, tmp_path, anchor):
    """Where Redis has a checkpoint of this key that the anchor has not, nothing is signed."""
    before, directory = case.file.read_bytes(), case.anchor
    await case.append(13, 20)
    await case.sealer().seal(case.tenant)
    if anchor == "another directory":
        directory = tmp_path / "other"
        directory.mkdir()
    elif anchor.startswith("put back"):
        case.edit(15, lambda fields: fields.__setitem__(5, fields[5].replace(b"allow", b"deny!")))
        await case.append(21, 22)
        tree, hashed = TileTree(), leaf_hasher(case.origin)
        tree.extend([hashed(*entry) for entry in case.entries()])
        body = Checkpoint(case.origin, 22, tree.root()).text() + b"\n"  # unsigned, so anybody's
        case.file.write_bytes(before + (body if anchor.endswith("torn") else b""))
    else:
        case.copy(signed(case.key, case.origin, 20, b"r" * 32))
    held = [one.read_bytes() for one in directory.iterdir()]
    with pytest.raises(errors.SealRefused, match="checkpoint") as caught:
        await case.sealer(anchor=directory).seal(case.tenant)
    reason = "split-view" if anchor == "with another root" else "rolled-back"
    assert caught.value.facts["reason"] == reason
    assert [one.read_bytes() for one in directory.iterdir() if one.stat().st_size] == held


async def test_other_logs_of_a_tenant_are_not_in_the_way(case, tmp_path):
    """After a key was lost a log of another name begins anew beside it, and both verify."""
    new, anchor = SigningKey.generate("acme.example/prod-2"), tmp_path / "second"
    anchor.mkdir()
    await case.append(13, 14)
    assert (await case.sealer(new, anchor).seal(case.tenant)).entries == 14
    found = await verify(case.ledger, case.tenant, new.verifier(), anchor=anchor)
    assert (found.ok, found.sealed) == (True, 14), found.findings
    found = await case.verify()
    assert (found.ok, found.sealed) == (True, 12), found.findings
    assert "acme.example/prod-2" in found.notes[0]
    await case.sealer().seal(case.tenant)  # the key is found again
    assert (await case.verify()).ok
    assert (await case.verify(anchor=None)).findings == []


@pytest.mark.parametrize("by", ["the last id", "another type"])
async def test_copies_that_cannot_be_written_are_a_warning(case, caplog, by):
    """The anchor has the checkpoint, so it is sealed; the key that is in the way is named."""
    if by == "the last id":
        case.client.execute_command("XADD", case.copies, f"{2**64 - 1}-{2**64 - 1}", "note", "x")
    else:
        case.client.delete(case.copies)
        case.client.set(case.copies, "x")
    await case.append(13, 15)
    assert (await case.sealer().seal(case.tenant)).checkpoint.size == 15
    assert any(case.copies in one and "delete that key" in one for one in caplog.messages)


async def test_unreadable_anchor_file_stops_its_tenant_alone(case, caplog):
    """What the disk refuses is that tenant's error, and is tried again; the others are sealed."""
    other = new_tenant()
    await case.ledger.append(other, decision(1))
    kept = case.file.read_bytes()
    case.file.unlink()
    case.file.symlink_to(case.file)
    sealer = case.sealer()
    with pytest.raises(errors.AnchorUnavailable, match="symbolic links") as caught:
        await sealer.run_once([case.tenant, other])
    assert [one.tenant for one in caught.value.facts["sealed"]] == [other]
    await sealer._seal_safely(case.tenant)
    assert "not sealed" in caplog.messages[-1]
    assert sealer.stopped == {}
    case.file.unlink()
    case.file.write_bytes(kept)
    await sealer._seal_safely(case.tenant)
    assert (await sealer.seal(case.tenant)).checkpoint.size == 12


async def test_absent_anchor_directory_is_not_made(case, tmp_path):
    """A mount that is missing must be noticed, not written beside."""
    with pytest.raises(errors.InvalidSetting, match="there is no directory"):
        await case.sealer(anchor=tmp_path / "absent").seal(case.tenant)
    assert not (tmp_path / "absent").exists()


async def test_another_key_does_not_continue_a_log(case):
    """A key that nobody handed the log over to is refused, with the way out."""
    await case.append(13, 13)
    with pytest.raises(errors.SealRefused, match="keys rotate"):
        await case.sealer(SigningKey.generate(DEPLOYMENT)).seal(case.tenant)


async def test_tenant_like_the_deployments_end_is_refused(case):
    """A name that would make deployment and log ambiguous is refused."""
    with pytest.raises(errors.InvalidInput, match="last part of the deployment"):
        await case.sealer().seal("prod")


# -- rotation ----------------------------------------------------------------------------------


async def test_rotation_keeps_old_and_new_verifiers(case):
    """After a hand-over the new key seals, the old one is refused, and trust in either will do."""
    new, newest = SigningKey.generate(DEPLOYMENT), SigningKey.generate(DEPLOYMENT)
    assert rotate(case.anchor, case.key, new) == [case.origin]
    assert rotate(case.anchor, case.key, new) == []
    await case.append(13, 13)
    with pytest.raises(errors.SealRefused, match="handed over"):
        await case.sealer().seal(case.tenant)
    await case.sealer(new).seal(case.tenant)
    rotate(case.anchor, new, newest)
    await case.append(14, 14)
    await case.sealer(newest).seal(case.tenant)
    for key in (case.key, new, newest):
        found = await verify(case.ledger, case.tenant, key.verifier(), anchor=case.anchor)
        assert found.ok, (key, found.findings)
        assert found.sealed == 14
    stranger = SigningKey.generate(DEPLOYMENT).verifier()
    found = await verify(case.ledger, case.tenant, stranger, anchor=case.anchor)
    assert [one.reason for one in found.findings] == ["wrong-key"]


async def test_proofs_between_a_rotation_and_the_next_seal(case):
    """The last checkpoint is signed by both keys, so proofs verify with either, twice over."""
    keys_of = [case.key, *(SigningKey.generate(DEPLOYMENT) for _ in range(2))]
    for old, new in pairwise(keys_of):
        assert rotate(case.anchor, old, new) == [case.origin]
        for key in (old, new):
            options = {"key": key.verifier(), "anchor": case.anchor}
            proof = await prove(case.ledger, case.tenant, "d-3", **options)
            assert proof.verify([key.verifier()]).first_seq == 3
            found = await verify(case.ledger, case.tenant, key.verifier(), anchor=case.anchor)
            assert found.ok, found.findings
    await case.append(13, 13)
    await case.sealer(keys_of[-1]).seal(case.tenant)
    for key in keys_of:
        assert (await verify(case.ledger, case.tenant, key.verifier(), anchor=case.anchor)).ok


async def test_rotation_that_was_cut_short_is_finished(case):
    """Killed before its hand-over is whole, nothing is signed by either key until it runs again."""
    new = SigningKey.generate(DEPLOYMENT)
    rotate(case.anchor, case.key, new)
    raw = case.file.read_bytes()
    begin = raw.index(Handover.FIRST_LINE)
    for cut in (begin, begin + 100, len(raw) - 60):
        case.file.write_bytes(raw[:cut])
        for key in (case.key, new):
            with pytest.raises(errors.SealRefused, match="hand-over to another key was begun"):
                await case.sealer(key).seal(case.tenant)
        assert rotate(case.anchor, case.key, new) == [case.origin]
        assert case.file.read_bytes() == raw


@pytest.mark.parametrize("after_a_handover", [False, True])
async def test_rotation_goes_on_behind_its_own_torn_note(case, after_a_handover):
    """Cut short in the last checkpoint's second signature, `rotate` finishes it, or a seal."""
    old, new = case.key, SigningKey.generate(DEPLOYMENT)
    if after_a_handover:
        old = SigningKey.generate(DEPLOYMENT)
        rotate(case.anchor, case.key, old)
    rotate(case.anchor, old, new)
    whole = case.file.read_bytes()
    torn = whole[: whole.rindex(Handover.FIRST_LINE) - 40]
    case.file.write_bytes(torn)
    assert rotate(case.anchor, old, new) == [case.origin]
    assert case.file.read_bytes() == whole
    case.file.write_bytes(torn)
    await case.append(13, 13)
    assert (await case.sealer(old).seal(case.tenant)).entries == 1
    assert (await case.verify()).ok


def test_rotation_is_of_one_deployment(tmp_path):
    """Logs of a deployment whose name begins alike are left, and one that fails stops no other."""
    old, new, under = (SigningKey.generate(f"acme.example{end}") for end in ("", "", "/prod"))
    stranger = SigningKey.generate("acme.example")
    for key, tenant in ((old, "a"), (stranger, "b"), (old, "c"), (under, "d")):
        origin = f"{key.name}/{tenant}"
        anchor = AnchorFile(tmp_path, origin)
        with anchor.locked() as stream:
            anchor.append(stream, anchor.tail(stream), signed(key, origin, 1, b"r" * 32))
    with pytest.raises(errors.SealRefused, match="Fb") as caught:
        rotate(tmp_path, old, new)
    assert caught.value.facts["handed_over"] == ["acme.example/a", "acme.example/c"]


async def test_old_key_signs_nothing_after_the_hand_over(case):
    """A checkpoint by the old key behind the hand-over is refused, whoever is trusted."""
    new = SigningKey.generate(DEPLOYMENT)
    rotate(case.anchor, case.key, new)
    forged = Checkpoint(case.origin, 13, b"r" * 32).signed(case.key)
    with case.file.open("ab") as file:
        file.write(forged.encode() + b"\n")
    for key in (case.key, new):
        found = await verify(case.ledger, case.tenant, key.verifier(), anchor=case.anchor)
        assert [one.reason for one in found.findings] == ["foreign-signature"]


async def test_sealer_that_ran_through_a_rotation_stops(case):
    """A sealer with the old key, alive during the hand-over, signs nothing after it."""
    sealer = case.sealer()
    await sealer.seal(case.tenant)
    rotate(case.anchor, case.key, SigningKey.generate(DEPLOYMENT))
    await case.append(13, 13)
    with pytest.raises(errors.SealRefused, match="handed over"):
        await sealer.seal(case.tenant)


async def test_rotation_does_not_excuse_an_anchor_that_was_put_back(case):
    """Handed over below what the old key has signed, the log is not sealed by the new one."""
    before = case.file.read_bytes()
    await case.append(13, 20)
    await case.sealer().seal(case.tenant)
    case.file.write_bytes(before)
    new = SigningKey.generate(DEPLOYMENT)
    rotate(case.anchor, case.key, new)
    held = case.file.read_bytes()
    with pytest.raises(errors.SealRefused, match="checkpoint of size 20 that this log's key"):
        await case.sealer(new).seal(case.tenant)
    assert case.file.read_bytes() == held


@pytest.mark.parametrize("place", ["a copy", "a witness"])
async def test_anchor_put_back_to_before_a_rotation_is_told(case, tmp_path, caplog, place):
    """What the next key has signed meanwhile is named, and stops the old one where a witness
    vouches for it.
    """
    before, new = case.file.read_bytes(), SigningKey.generate(DEPLOYMENT)
    rotate(case.anchor, case.key, new)
    await case.append(13, 20)
    logs = [case.key.verifier(), new.verifier()]
    with serving(tmp_path / "witness", *logs) as (client, _):
        await Sealer(case.ledger, new, case.anchor, [client]).seal(case.tenant)
        case.file.write_bytes(before)
        if place == "a copy":
            await case.sealer().seal(case.tenant)
            told = f"{case.copies} has a checkpoint of size 20 by a key that is not known here"
            assert any(told in one for one in caplog.messages)
            return
        with pytest.raises(errors.SealRefused, match="size 20 that a key that the anchor does not"):
            await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
        assert case.file.read_bytes() == before


async def test_sealer_that_ran_through_half_a_rotation_stops(case):
    """A sealer alive during a hand-over that was cut short signs nothing, as a new one does not."""
    sealer, new = case.sealer(), SigningKey.generate(DEPLOYMENT)
    await sealer.seal(case.tenant)
    rotate(case.anchor, case.key, new)
    raw = case.file.read_bytes()
    half = raw[: raw.index(Handover.FIRST_LINE)]
    case.file.write_bytes(half)
    await case.append(13, 13)
    with pytest.raises(errors.SealRefused, match="hand-over to another key was begun"):
        await sealer.seal(case.tenant)
    assert case.file.read_bytes() == half


# -- witnesses ---------------------------------------------------------------------------------


async def test_witness_that_is_away_is_caught_up_later(case, tmp_path):
    """Sealing goes on without it; the next seal brings it up to date."""
    with serving(tmp_path / "witness", case.key.verifier()) as (client, _):
        pass
    await case.append(13, 13)
    sealed = await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
    assert sealed.checkpoint.size == 13
    assert sealed.witnesses == ()
    with serving(tmp_path / "witness", case.key.verifier()) as (again, _):
        await case.append(14, 14)
        sealed = await Sealer(case.ledger, case.key, case.anchor, [again]).seal(case.tenant)
        assert sealed.witnesses == ("witness.example/w1",)
        assert (await case.verify(witnesses=[again.key])).ok
        found = await case.verify(anchor=again.url, witnesses=[again.key])
        assert found.ok
        assert found.sealed == 14


async def test_witness_notices_a_fork(case, tmp_path, monkeypatch):
    """A directory put back: a witness stops the sealer before it signs, whether it shows its latest
    checkpoint or not, and refuses a history that was signed without it.
    """
    with serving(tmp_path / "witness", case.key.verifier()) as (client, _):
        before = case.file.read_bytes()
        names = case.client.keys(f"claude-flow:ledger:{{{case.tenant}}}:*")
        backup = {name: case.client.dump(name) for name in names}
        await case.append(13, 15)
        await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
        case.file.write_bytes(before)
        case.client.delete(*backup)
        for name, dump in backup.items():
            case.client.restore(name, 0, dump)
        with pytest.raises(errors.SealRefused, match=r"w1 has a checkpoint of size 15"):
            await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
        assert case.file.read_bytes() == before
        monkeypatch.setattr(WitnessClient, "latest", lambda *_: None)
        await case.append(113, 120)
        with pytest.raises(errors.SealRefused, match="has seen size 15"):
            await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)
        assert case.file.read_bytes() == before  # nor is anything signed where it shows none
        await case.sealer().seal(case.tenant)  # without it
        with pytest.raises(errors.SealRefused, match="not the beginning of this"):
            await Sealer(case.ledger, case.key, case.anchor, [client]).seal(case.tenant)


async def test_changed_tiles_are_no_fork(case, tmp_path):
    """A consistency proof of tiles that somebody changed is made again of the entries; and two
    witnesses of one name are two.
    """
    logs = [case.key.verifier()]
    with serving(tmp_path / "1", *logs) as (one, _), serving(tmp_path / "2", *logs) as (two, _):
        await Sealer(case.ledger, case.key, case.anchor, [one, two]).seal(case.tenant)
        await case.append(13, 260)
        await case.sealer().seal(case.tenant)
        row = case.client.hget(case.tiles, "0/0")
        case.client.hset(case.tiles, "0/0", row[:-32] + bytes(32))
        await case.append(261, 262)
        sealed = await Sealer(case.ledger, case.key, case.anchor, [one, two]).seal(case.tenant)
        assert sealed.witnesses == ("witness.example/w1",) * 2
        assert (await case.verify(witnesses=[one.key, two.key])).ok


async def test_anchor_without_hand_overs_is_no_false_alarm(case, tmp_path):
    """A witness shows no hand-over: copies by the key before it are noted, and nothing is found."""
    new = SigningKey.generate(DEPLOYMENT)
    rotate(case.anchor, case.key, new)
    await case.append(13, 13)
    with serving(tmp_path / "witness", new.verifier()) as (client, _):
        await Sealer(case.ledger, new, case.anchor, [client]).seal(case.tenant)
        options = {"anchor": client.url, "witnesses": [client.key]}
        found = await verify(case.ledger, case.tenant, new.verifier(), **options)
    assert found.ok, found.findings
    assert "2 checkpoints of this log by a key that is not known here" in found.notes[0]


async def test_required_cosignature_that_is_missing_is_a_finding(case):
    """Who asks for a witness gets no exit code 0 without it."""
    witness = SigningKey.generate("witness.example/w1").verifier(kind=4)
    found = await case.verify(witnesses=[witness])
    assert found.proved
    assert [one.reason for one in found.findings] == ["not-cosigned"]


# -- many tenants, and servers -----------------------------------------------------------------


async def test_running_sealer_seals_by_count_and_by_age(valkey, tmp_path):
    """A busy tenant is sealed at once, a quiet one when its oldest entry is old enough."""
    anchor, key = tmp_path / "anchor", SigningKey.generate(DEPLOYMENT)
    anchor.mkdir()
    busy, quiet = new_tenant(), new_tenant()
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append_many(busy, [decision(n) for n in range(20)])
        await ledger.append(quiet, decision(1))
        sealer = Sealer(ledger, key, anchor)
        running = asyncio.ensure_future(sealer.run(every_entries=20, every_seconds=0.2))
        files = [AnchorFile(anchor, f"{DEPLOYMENT}/{one}").path for one in (busy, quiet)]
        try:

            def all_sealed():
                return all(one.exists() and one.stat().st_size for one in files)

            await asyncio.to_thread(wait_until, all_sealed, "sealed")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        for tenant in (busy, quiet):
            assert (await verify(ledger, tenant, key.verifier(), anchor=anchor)).ok


async def test_young_entries_wait_where_the_server_does_not_fsync_each(
    fresh_server, tmp_path, caplog
):
    """What a power cut could take away is not sealed yet; an id of the future is named."""
    server = fresh_server(config={"appendfsync": "everysec"})
    anchor, tenant = tmp_path / "anchor", new_tenant()
    anchor.mkdir()
    async with Ledger.connect(server.url) as ledger:
        case = Case(server, ledger, tenant, SigningKey.generate(DEPLOYMENT), anchor)
        old = b"%d-1" % (int(case.client.time()[0]) * 1000 - 60_000)
        await case.append(1, 1)
        case.rewrite(lambda entries: entries.__setitem__(0, (old, entries[0][1])))
        case.client.delete(case.head, keys.index(tenant))
        await ledger.reindex(tenant)
        await case.append(2, 3)
        sealed = await case.sealer().seal(tenant)
        assert (sealed.entries, sealed.waiting) == (1, True)
        found = await case.verify()
        assert found.ok
        told = "seq 2 to 3: recorded, and not covered by the anchor's last checkpoint"
        assert found.not_proved[-1] == told
        case.client.xadd(case.stream, {"x": "y"}, id="9999999999999-0")
        assert (await case.sealer().seal(tenant)).entries == 0
        assert any("9999999999999-0 lies in the future" in one for one in caplog.messages)
        case.client.close()


async def test_every_server_kind_seals_and_proves(server, tenant, tmp_path):
    """The three servers give the same evidence, across a tile's border."""
    anchor, key = tmp_path / "anchor", SigningKey.generate(DEPLOYMENT)
    anchor.mkdir()
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many(tenant, [decision(n) for n in range(600)])
        assert (await Sealer(ledger, key, anchor).seal(tenant)).entries == 600
        await ledger.append_many(tenant, [decision(n) for n in range(600, 700)])
        await Sealer(ledger, key, anchor, batch_entries=33).seal(tenant)
        found = await verify(ledger, tenant, key.verifier(), anchor=anchor)
        assert found.ok
        assert found.checkpoints == 1 + 4


@pytest.mark.parametrize("kind", KINDS)
async def test_recipes_seal_and_verify(fresh_server, kind, tenant, tmp_path):
    """README's sealer seals its tenant and cannot write entries; its analyst verifies."""
    server, anchor = fresh_server(kind), tmp_path / "anchor"
    anchor.mkdir()
    key = SigningKey.generate(DEPLOYMENT)
    async with Ledger.connect(server.url) as operator:
        await operator.append(tenant, decision(1))
    rules = [*recipe("sealer", tenant), "+config|get", "+info"]
    async with Ledger.connect(as_user(server, "sealer", rules)) as ledger:
        (sealed,) = await Sealer(ledger, key, anchor).run_once()
        assert (sealed.entries, sealed.waiting) == (1, False)
        assert await Sealer(ledger, key, anchor).rebuild_tiles(tenant) == 1
        with pytest.raises(errors.PermissionDenied):
            await ledger.server.command("", "XADD", keys.decisions(tenant), "*", "a", "b")
    async with Ledger.connect(as_user(server, "sealer", recipe("sealer", tenant))) as ledger:
        assert (await Sealer(ledger, key, anchor).seal(tenant)).waiting
    async with Ledger.connect(as_user(server, "analyst", recipe("analyst", tenant))) as ledger:
        assert (await verify(ledger, tenant, key.verifier(), anchor=anchor)).ok
