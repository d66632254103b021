"""Tampering with Redis and with the anchor: each is caught, for the right reason, in its place."""

from __future__ import annotations

import asyncio
import random
from contextlib import closing

import pytest

from ledger import keys
from ledger.errors import InvalidInput, NotProved
from ledger.leaf import leaf_hasher
from ledger.merkle import EMPTY_ROOT, TileTree
from ledger.note import Checkpoint, Handover, Note, SigningKey
from ledger.prove import prove
from ledger.service.witness_server import WitnessServer
from ledger.verify import verify
from ledger.witness import Witness, log_path
from tests.evidence import DEPLOYMENT, flip, sealed_case, signed
from tests.servers import new_tenant

MALLORY = SigningKey.generate(DEPLOYMENT)
ROOT = b"r" * 32


@pytest.fixture
async def case(valkey, tenant, tmp_path):
    async with sealed_case(valkey, tenant, tmp_path) as case:
        yield case


def replaced(at, value):
    def change(fields):
        fields[at] = value

    return change


def data_byte(fields):
    fields[5] = fields[5].replace(b"allow", b"deny ")


def swapped(entries):
    entries[3][1][:], entries[6][1][:] = list(entries[6][1]), list(entries[3][1])


def inserted(entries):
    time_ms = int(entries[3][0].split(b"-")[0])
    for i in range(4, len(entries)):
        entries[i] = (b"%d-%d" % (time_ms + 1000, i + 2), entries[i][1])
    forged = [b"type", b"decision.recorded", b"id", b"forged", b"data", b"{}"]
    entries.insert(4, (b"%d-5" % (time_ms + 1000), forged))


def inserted_between(entries):
    forged = [b"type", b"decision.recorded", b"id", b"forged", b"data", b"{}"]
    entries.insert(5, (entries[4][0].split(b"-")[0] + b"-6", forged))  # the next is of later time


def renumbered(entries):
    time_ms, _ = entries[11][0].split(b"-")
    entries[11] = (time_ms + b"-99", entries[11][1])


def moved_in_time(entries):
    for i in range(8, 12):
        time_ms, seq = entries[i][0].split(b"-")
        entries[i] = (b"%d-%b" % (int(time_ms) + 60_000, seq), entries[i][1])


def forward_first(entries):
    for i in range(12):
        time_ms, seq = entries[i][0].split(b"-")
        entries[i] = (b"%d-%b" % (int(time_ms) + 5, seq), entries[i][1])


def turned(fields):
    fields[:] = [*fields[2:], *fields[:2]]


ENTRY_ATTACKS = {
    "a verdict edited": (lambda c: c.edit(4, data_byte), "edited", 4),
    "the first entry edited": (lambda c: c.edit(1, data_byte), "edited", 1),
    "the last entry edited": (lambda c: c.edit(12, data_byte), "edited", 12),
    "a type edited": (lambda c: c.edit(7, replaced(1, b"mode.changed")), "edited", 7),
    "an id edited": (lambda c: c.edit(7, replaced(3, b"d-other")), "edited", 7),
    "a field's name edited": (lambda c: c.edit(7, replaced(4, b"Data")), "edited", 7),
    "a field added": (lambda c: c.edit(7, lambda f: f.extend([b"x", b"y"])), "edited", 7),
    "data doubled": (lambda c: c.edit(7, lambda f: f.extend([b"data", f[5]])), "edited", 7),
    "a field removed": (lambda c: c.edit(7, lambda f: f.__delitem__(slice(2, 4))), "edited", 7),
    "fields reordered": (
        lambda c: c.edit(7, lambda f: f.extend([f.pop(0), f.pop(0)])),
        "edited",
        7,
    ),
    "time changed": (lambda c: c.rewrite(moved_in_time), "edited", 9),
    "all times changed": (lambda c: c.rewrite(forward_first), "edited", 1),
    "an entry deleted": (lambda c: c.client.xdel(c.stream, c.entries()[5][0]), "deleted", 6),
    "the first entry deleted": (lambda c: c.client.xdel(c.stream, c.entries()[0][0]), "deleted", 1),
    "two entries deleted": (
        lambda c: c.client.xdel(c.stream, *(one[0] for one in c.entries()[5:7])),
        "deleted",
        6,
    ),
    "trimmed at the front": (
        lambda c: c.trim(4),
        "deleted",
        1,
    ),
    "an entry inserted": (lambda c: c.rewrite(inserted_between), "inserted", 6),
    "an entry inserted, the rest renumbered": (lambda c: c.rewrite(inserted), "edited", 5),
    "two entries swapped": (lambda c: c.rewrite(swapped), "reordered", 4),
    "an entry renumbered": (lambda c: c.rewrite(renumbered), "renumbered", 12),
    "the tail cut off": (
        lambda c: c.client.xdel(c.stream, *(one[0] for one in c.entries()[9:])),
        "cut-off",
        10,
    ),
    "the last entry cut off": (
        lambda c: c.delete(12),
        "cut-off",
        12,
    ),
    "emptied": (lambda c: c.trim(0), "empty", 1),
    "another type": (
        lambda c: (c.client.delete(c.stream), c.client.set(c.stream, "x")),
        "malformed",
        None,
    ),
    "the stream gone": (lambda c: c.client.delete(c.stream), "empty", 1),
}


@pytest.mark.parametrize("name", ENTRY_ATTACKS)
async def test_changed_entries_are_named_with_their_place(case, name):
    """Whatever is done to sealed entries, the proof fails and says what happened where."""
    attack, reason, seq = ENTRY_ATTACKS[name]
    attack(case)
    found = await case.verify()
    assert not found.proved
    assert not found.ok
    assert (found.findings[0].reason, found.findings[0].seq) == (reason, seq), found.findings


@pytest.mark.parametrize("name", ENTRY_ATTACKS)
async def test_changed_entries_are_caught_where_tiles_were_changed_too(case, name):
    """With the tiles deleted the change is still found: between two checkpoints, if no closer."""
    attack, _, _ = ENTRY_ATTACKS[name]
    attack(case)
    case.client.delete(case.tiles)
    found = await case.verify()
    assert not found.proved
    first = found.findings[0]
    assert first.reason in {"rewritten", "cut-off", "rolled-back", "empty", "malformed"}
    assert (first.seq is None) == (first.reason == "malformed")


async def test_untouched_record_is_proved(case):
    """Without an attack both checkpoints fit and nothing is found."""
    found = await case.verify()
    assert found.ok
    assert (found.sealed, found.entries, found.checkpoints) == (12, 12, 2)
    assert found.not_proved == []


async def test_entries_behind_the_seal_are_said_not_to_be_proved(case):
    """What is recorded and not sealed yet is no failure, and no claim is made for it."""
    await case.append(13, 14)
    found = await case.verify()
    assert found.ok
    assert found.not_proved == [
        "seq 13 to 14: recorded, and not covered by the anchor's last checkpoint"
    ]


async def test_foreign_entry_is_named_and_the_others_stay_proved(case):
    """A raw XADD is reported as what it is, sealed or not; the proof of the others stands."""
    case.client.xadd(case.stream, {"type": "decision.recorded", "id": "x", "data": "{}"})
    found = await case.verify()
    assert found.proved
    assert [(one.reason, one.seq) for one in found.findings] == [("foreign-entry", 13)]
    await case.append(14, 14)  # which registers it
    await case.sealer().seal(case.tenant)
    found = await case.verify()
    assert found.proved
    assert [(one.reason, one.seq) for one in found.findings] == [("foreign-entry", 13)]
    assert (await case.verify(allow_foreign=True)).ok


async def test_imitation_of_an_entry_is_named(case):
    """A raw XADD in our own shape, under the next ordinal, is told by the append function's own
    record: before it is registered, after that, and when it is sealed.
    """
    last_id, fields = case.entries()[-1]
    forged = [*fields[:3], b"d-evil", fields[4], fields[5].replace(b"d-12", b"d-evil")]
    time_ms = int(last_id.split(b"-")[0])
    case.client.execute_command("XADD", case.stream, f"{time_ms + 1}-13", *forged)
    for then in (None, case.append(14, 14), case.sealer().seal(case.tenant)):
        if then:
            await then
        found = await case.verify()
        assert found.proved
        assert [(one.reason, one.seq) for one in found.findings] == [("foreign-entry", 13)]
    assert (await case.verify(allow_foreign=True)).ok
    case.client.delete(case.head)
    found = await case.verify()
    assert [one.reason for one in found.findings] == ["head-damaged"]
    assert found.not_proved[0].startswith("that govledger's append wrote each entry")
    await case.ledger.reindex(case.tenant)  # which has to believe that it is ours
    found = await case.verify()
    assert found.ok
    assert found.not_proved[0].startswith("that govledger's append wrote each entry up to seq 14")


async def test_unsealed_foreign_entry_is_named_behind_many_that_are_allowed(case):
    """Sealed foreign entries that are allowed, however many, hide none that is not sealed."""
    pipe = case.client.pipeline()
    for _ in range(120):
        pipe.xadd(case.stream, {"x": "y"})
    pipe.execute()
    await case.append(13, 13)
    await case.sealer().seal(case.tenant)
    case.client.xadd(case.stream, {"x": "y"})
    found = await case.verify(allow_foreign=True)
    assert [(one.reason, one.seq) for one in found.findings] == [("foreign-entry", 134)]


@pytest.mark.parametrize("by", ["a stolen key", "a key of the attacker's"])
async def test_consistent_rewrite_is_caught_by_the_anchor(case, tmp_path, by):
    """Entries, head, index, tiles and signed checkpoints all made again: the anchor contradicts."""
    key = case.key if by == "a stolen key" else MALLORY
    case.edit(4, data_byte)
    await case.reseal(key, tmp_path / "mallory")
    found = await case.verify()
    assert not found.proved
    reasons = [one.reason for one in found.findings]
    assert "rewritten" in reasons
    assert ("copy-foreign-signature" in reasons) == (key is MALLORY)
    assert next(one.seq for one in found.findings if one.reason == "rewritten") == 1


async def test_consistent_cut_is_told_as_a_rollback(case, tmp_path):
    """The tail cut off and everything in Redis made to fit: the anchor has more."""
    case.rewrite(lambda entries: entries.__delitem__(slice(8, None)))
    await case.reseal(case.key, tmp_path / "mallory")
    found = await case.verify()
    assert not found.proved
    assert found.findings[0].reason == "rolled-back"
    assert found.findings[0].message.startswith("restored to seq 8, the anchor has 12")


def every_key(case):
    """The tenant's keys as DUMP has them."""
    names = case.client.keys(f"claude-flow:ledger:{{{case.tenant}}}:*")
    return {name: case.client.dump(name) for name in names}


def put_back(case, dumps):
    case.client.delete(*case.client.keys(f"claude-flow:ledger:{{{case.tenant}}}:*"))
    for name, dump in dumps.items():
        case.client.restore(name, 0, dump)


async def test_restored_backup_is_told_as_one(case):
    """Every key of the tenant put back as it was earlier: the verifier says from where to where."""
    backup = every_key(case)
    await case.append(13, 15)
    await case.sealer().seal(case.tenant)
    put_back(case, backup)
    found = await case.verify()
    assert not found.proved
    assert (found.findings[0].reason, found.findings[0].seq) == ("rolled-back", 13)
    assert found.findings[0].message.startswith("restored to seq 12, the anchor has 15")


async def test_another_tenants_record_is_no_substitute(case, valkey, tmp_path):
    """A whole sealed ledger of another tenant, put under this one's keys, is not this one."""
    other = new_tenant()
    (tmp_path / "other").mkdir()
    async with sealed_case(valkey, other, tmp_path / "other") as theirs:
        for ours, their in ((case.stream, theirs.stream), (case.tiles, theirs.tiles)):
            case.client.delete(ours)
            case.client.restore(ours, 0, case.client.dump(their))
    found = await case.verify()
    assert not found.proved
    assert found.findings[0].reason == "rewritten"


def overwrite(*notes):
    """An anchor file of these notes."""

    def attack(case):
        found = [one if isinstance(one, bytes) else one(case).encode() for one in notes]
        case.file.write_bytes(b"".join(note + b"\n" for note in found))

    return attack


def last_note(case):
    return Note.parse(case.file.read_bytes().split(b"\n\n", 2)[2][:-1])


def unsigned(case):
    note = last_note(case)
    case.file.write_bytes(note.text + b"\n")


def unsigned_first(case):
    raw = case.file.read_bytes()
    text, _, rest = raw.partition(b"\n\n")
    case.file.write_bytes(text + b"\n\n" + rest.partition(b"\n\n")[2])


def bad_signature(case):
    raw = case.file.read_bytes()
    at = raw.rindex(b" ") + 20
    case.file.write_bytes(flip(raw, at, 1) if raw[at] not in b"+/=" else flip(raw, at + 1, 1))


def other_size(case):
    case.file.write_bytes(case.file.read_bytes().replace(b"\n12\n", b"\n11\n"))


def other_deployment(case):
    key = SigningKey.parse(case.key.encode())
    return signed(key, f"other.example/{case.tenant}", 12, ROOT)


def forged_handover(case):
    at = Checkpoint.parse(last_note(case).text)
    honest = case.file.read_bytes()
    forged = Handover.signed(at, MALLORY, SigningKey.generate(DEPLOYMENT))
    case.file.write_bytes(honest + forged.encode() + b"\n")


def stolen_name_handover(case):
    """The text names the true key as the old one, and only the attacker signs it, twice."""
    at = Checkpoint.parse(last_note(case).text)
    true, mallory = (key.verifier(case.origin) for key in (case.key, MALLORY))
    text = Handover.signed(at, MALLORY, MALLORY).text.replace(
        str(mallory).encode(), str(true).encode(), 1
    )
    forged = Note(text, (MALLORY.sign(text, case.origin),))
    case.file.write_bytes(case.file.read_bytes() + forged.encode() + b"\n")


def two_roots(case):
    case.file.write_bytes(
        case.file.read_bytes() + signed(case.key, case.origin, 12, ROOT).encode() + b"\n"
    )


def goes_back(case):
    raw = case.file.read_bytes()
    first = raw[: raw.index(b"\n\n", raw.index(b"\n\n") + 2) + 2]
    case.file.write_bytes(raw + first)


ANCHOR_ATTACKS = {
    "no signature on the last": (unsigned, {"torn", "unsigned"}),
    "no signature on an earlier one": (unsigned_first, {"unsigned", "malformed"}),
    "a signature changed": (bad_signature, {"bad-signature", "foreign-signature", "malformed"}),
    "a size changed": (other_size, {"bad-signature"}),
    "signed by another key": (
        overwrite(lambda c: signed(MALLORY, c.origin, 12, ROOT)),
        {"foreign-signature"},
    ),
    "another tenant's checkpoint": (
        overwrite(lambda c: signed(c.key, f"{DEPLOYMENT}/other", 12, ROOT)),
        {"wrong-origin"},
    ),
    "another deployment's checkpoint": (overwrite(other_deployment), {"wrong-origin"}),
    "another root, by the true key": (
        overwrite(lambda c: signed(c.key, c.origin, 12, ROOT)),
        {"rewritten"},
    ),
    "a larger size, by the true key": (
        overwrite(lambda c: signed(c.key, c.origin, 99, ROOT)),
        {"cut-off", "rolled-back"},
    ),
    "a huge size, by the true key": (
        overwrite(lambda c: signed(c.key, c.origin, 2**63 - 1, ROOT)),
        {"cut-off", "rolled-back"},
    ),
    "two roots of one size, by the true key": (two_roots, {"split-view", "rewritten"}),
    "an empty log's, by the true key": (
        overwrite(lambda c: signed(c.key, c.origin, 0, EMPTY_ROOT)),
        {"no-anchor"},
    ),
    "checkpoints that go back": (goes_back, {"anchor-goes-back"}),
    "a hand-over between strangers": (forged_handover, {"wrong-key"}),
    "a hand-over that the true key did not sign": (stolen_name_handover, {"unsigned"}),
    "cut off in its first note": (lambda c: c.file.write_bytes(c.file.read_bytes()[:99]), {"torn"}),
    "empty": (lambda c: c.file.write_bytes(b""), {"no-anchor"}),
    "gone": (lambda c: c.file.unlink(), {"no-anchor"}),
    "binary": (lambda c: c.file.write_bytes(bytes(range(256)) * 9), {"malformed", "torn"}),
    "endless line": (lambda c: c.file.write_bytes(b"x" * 200_000), {"malformed"}),
    "empty lines": (lambda c: c.file.write_bytes(b"\n" * 9), {"unsigned"}),
}


@pytest.mark.parametrize("name", ANCHOR_ATTACKS)
async def test_changed_anchor_proves_nothing(case, name):
    """A checkpoint that is missing, forged or another's is refused with its own reason."""
    attack, reasons = ANCHOR_ATTACKS[name]
    attack(case)
    found = await case.verify()
    assert not found.proved
    assert found.findings[0].reason in reasons, found.findings


def rewritten_and_handed_over(case):
    """Everything in Redis made to fit a changed entry, and a hand-over between two keys of the
    attacker's that states its root.
    """
    case.edit(3, data_byte)
    case.client.delete(case.tiles, case.copies)
    tree, hashed = TileTree(), leaf_hasher(case.origin)
    tree.extend([hashed(*entry) for entry in case.entries()])
    at = Checkpoint(case.origin, tree.size, tree.root())
    return Handover.signed(at, MALLORY, SigningKey.generate(DEPLOYMENT))


@pytest.mark.parametrize("colludes", [True, False])
async def test_witness_cannot_hand_a_log_over(case, tmp_path, colludes):
    """A hand-over that a witness, or who sits in between, makes up and cosigns proves nothing."""
    forged, cosigner = rewritten_and_handed_over(case), SigningKey.generate("w.example/w1")
    if colludes:
        forged = forged.with_signatures([cosigner.cosign(forged.text, 1)])
    shown = log_path(case.origin).strip("/").replace("/", ".")
    (tmp_path / shown).write_bytes(forged.encode())
    witness = Witness(cosigner, [case.key.verifier()], tmp_path)
    with closing(witness), WitnessServer(("127.0.0.1", 0), witness) as server:
        serving = asyncio.ensure_future(asyncio.to_thread(server.serve_forever, 0.01))
        found = await case.verify(anchor=server.url, witnesses=[witness.verifier])
        server.shutdown()
        await serving
    assert not found.proved
    assert [one.reason for one in found.findings] == ["wrong-key"]


@pytest.mark.parametrize(
    ("later", "reason"), [("hand-over", "wrong-key"), ("nothing", "anchor-changed")]
)
async def test_anchor_that_changes_while_it_is_read_proves_nothing(
    case, monkeypatch, later, reason
):
    """Keys come from the first reading of an anchor: a file put there later adds none."""
    forged = rewritten_and_handed_over(case).encode() + b"\n" if later == "hand-over" else b""
    real = case.ledger.server.command

    async def slow(key, *args):
        if key == case.copies:  # behind the first reading, before the comparison
            case.file.write_bytes(forged)
        return await real(key, *args)

    monkeypatch.setattr(case.ledger.server, "command", slow)
    found = await case.verify()
    assert not found.proved
    assert [one.reason for one in found.findings] == [reason]


async def test_cut_off_anchor_proves_what_is_whole(case):
    """A checkpoint that a crash tore proves nothing; the one before it does, and it is said."""
    case.file.write_bytes(case.file.read_bytes()[:-30])
    found = await case.verify()
    assert found.ok
    assert found.sealed == 5
    assert found.not_proved[0].startswith("what stands behind the anchor's last checkpoint")
    await case.sealer().seal(case.tenant)
    found = await case.verify()
    assert (found.sealed, found.not_proved) == (12, [])


async def test_keys_of_the_two_kinds_are_told_apart(case):
    """The log's key is not taken for a witness of it."""
    with pytest.raises(InvalidInput, match="a witness's is asked for"):
        await case.verify(witnesses=[case.key.verifier(case.origin)])


async def test_anchor_of_a_hand_over_alone_makes_no_proof(case, tmp_path):
    """A hand-over states a root, and what a proof needs is a checkpoint: that is said."""
    kept = tmp_path / "kept"
    at = Checkpoint.parse(last_note(case).text)
    kept.write_bytes(Handover.signed(at, case.key, MALLORY).encode() + b"\n")
    assert (await case.verify(anchor=kept)).ok
    with pytest.raises(NotProved) as caught:
        await prove(case.ledger, case.tenant, "d-4", key=case.key.verifier(), anchor=kept)
    assert caught.value.facts["reason"] == "no-anchor"


def tile_flipped(case):
    raw = case.client.hget(case.tiles, "0/0")
    case.client.hset(case.tiles, "0/0", flip(raw, 100))


def tiles_thinned(case):
    case.client.hset(case.tiles, "9/9", b"x")
    case.client.hdel(case.tiles, "0/0")


COPY_ATTACKS = {
    "a tile changed": (tile_flipped, "tiles-damaged"),
    "some tiles deleted": (tiles_thinned, "tiles-damaged"),
    "a tile of no hashes": (lambda c: c.client.hset(c.tiles, "0/0", b"short"), "tiles-damaged"),
    "the copies of another key": (
        lambda c: c.copy(signed(MALLORY, c.origin, 12, ROOT)),
        "copy-foreign-signature",
    ),
    "a copy of another root": (
        lambda c: c.copy(signed(c.key, c.origin, 12, ROOT)),
        "copy-wrong-root",
    ),
    "a copy that is no note": (
        lambda c: c.client.execute_command("XADD", c.copies, "*", "note", b"x"),
        "copy-unsigned",
    ),
    "a copy with other fields": (
        lambda c: c.client.execute_command("XADD", c.copies, "*", "a", b"x", "b", "y"),
        "copy-malformed",
    ),
    "copies of another type": (
        lambda c: (c.client.delete(c.copies), c.client.set(c.copies, "x")),
        "copy-malformed",
    ),
    "tiles of another type": (
        lambda c: (c.client.delete(c.tiles), c.client.set(c.tiles, "x")),
        "tiles-damaged",
    ),
    "the head deleted": (lambda c: c.client.delete(c.head), "head-damaged"),
    "the head damaged": (lambda c: c.client.hset(c.head, "seq", "x"), "head-damaged"),
    "the head ahead": (lambda c: c.client.hset(c.head, "seq", 20), "unsealed-gone"),
}


@pytest.mark.parametrize("name", COPY_ATTACKS)
async def test_changed_copies_are_named_and_the_proof_stands(case, name):
    """What Redis has of the evidence itself decides nothing; where it was changed, that is said."""
    attack, reason = COPY_ATTACKS[name]
    attack(case)
    found = await case.verify()
    assert found.proved
    assert [one.reason for one in found.findings] == [reason]


async def test_deleted_entry_that_was_never_sealed_is_named(case):
    """The function's own record shows that an unsealed entry is gone."""
    await case.append(13, 14)
    case.client.xdel(case.stream, case.entries()[-1][0])
    found = await case.verify()
    assert found.proved
    assert [(one.reason, one.seq) for one in found.findings] == [("unsealed-gone", 14)]


async def test_without_an_anchor_nothing_is_proved(case):
    """It says what is not, also where everything in Redis fits together."""
    found = await case.verify(anchor=None)
    assert not found.ok
    assert found.findings == []
    assert len(found.not_proved) == 2
    case.client.delete(case.copies)
    found = await case.verify(anchor=None)
    assert [one.reason for one in found.findings] == ["no-anchor"]


async def test_wrong_key_proves_nothing(case):
    """Who trusts another key is told that the checkpoint is not by it."""
    found = await verify(case.ledger, case.tenant, MALLORY.verifier(), anchor=case.anchor)
    assert not found.proved
    assert [one.reason for one in found.findings] == ["foreign-signature"]


async def test_tenant_that_was_never_sealed_is_not_proved(case):
    """Another tenant's anchor file does not speak for a tenant without one."""
    found = await verify(case.ledger, new_tenant(), case.key.verifier(), anchor=case.file)
    assert [one.reason for one in found.findings] == ["wrong-origin"]
    assert keys.decisions(case.tenant) == case.stream


async def test_old_anchor_and_a_cut_that_redis_signed_for(case, tmp_path):
    """With an older checkpoint, entries that a later signed copy in Redis covers are missed."""
    kept = tmp_path / "kept.checkpoint"
    kept.write_bytes(case.file.read_bytes())
    await case.append(13, 15)
    await case.sealer().seal(case.tenant)
    case.delete(14, 15)
    case.client.hset(case.head, "seq", 13)
    found = await case.verify(anchor=kept)
    assert found.proved
    assert [(one.reason, one.seq) for one in found.findings] == [("cut-off", 14)]


async def test_appends_during_a_verification_are_no_finding(case):
    """Entries that come while the record is read change nothing about what was sealed."""
    stop = asyncio.Event()

    async def keep_appending():
        number = 13
        while not stop.is_set():
            await case.append(number, number)
            await case.sealer().seal(case.tenant)
            number += 1

    appending = asyncio.ensure_future(keep_appending())
    for _ in range(15):
        found = await case.verify()
        assert found.ok, found.findings
    stop.set()
    await appending


async def test_server_that_answers_nonsense_proves_nothing(case, monkeypatch):
    """What no Redis answers is a finding, not a traceback: the owner is whom nobody trusts."""
    real = case.ledger.server.command

    async def lying(key, *args):
        reply = await real(key, *args)
        return [[b"x", 7], None] if args[0] == "XRANGE" and key == case.stream else reply

    monkeypatch.setattr(case.ledger.server, "command", lying)
    found = await case.verify()
    assert not found.proved
    assert [one.reason for one in found.findings] == ["malformed"]


async def test_proofs_are_checked_before_they_are_handed_out(case):
    """What is not sealed or was changed gives an error and no proof; damaged tiles do no harm."""
    options = {"key": case.key.verifier(), "anchor": case.anchor}

    async def refused(**asked):
        with pytest.raises(NotProved) as caught:
            await prove(case.ledger, case.tenant, **asked, **options)
        return caught.value.facts["reason"]

    proof = await prove(case.ledger, case.tenant, "d-4", **options)
    assert proof.verify([case.key.verifier()]).first_seq == 4
    await case.append(13, 13)
    assert await refused(seq=13) == "not-sealed"
    tile_flipped(case)
    assert (await prove(case.ledger, case.tenant, seq=9, **options)).index == 8
    await case.sealer().rebuild_tiles(case.tenant)
    case.edit(4, data_byte)
    assert await refused(seq=4) == "edited"
    case.client.delete(case.tiles)
    assert await refused(seq=9) == "rewritten"


async def test_flipped_bytes_of_entries_are_found(case):
    """Any byte of any field of any sealed entry, flipped in Redis: the very entry is named."""
    rng = random.Random(7)
    honest = case.entries()
    for _ in range(25):
        seq, field = rng.randrange(1, 13), rng.randrange(6)

        def change(fields, field=field):
            fields[field] = flip(fields[field], rng.randrange(len(fields[field])), rng.randrange(8))

        case.edit(seq, change)
        found = await case.verify()
        assert not found.proved
        assert (found.findings[0].reason, found.findings[0].seq) == ("edited", seq)
        case.rewrite(lambda entries: entries.__setitem__(slice(None), honest))
        assert (await case.verify()).proved
