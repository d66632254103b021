"""Notes, keys, leaves and proofs: against published vectors, and against every flipped byte."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.anchor import AnchorFile, read_notes
from ledger.errors import InvalidInput, NotProved, UnsafeKey
from ledger.keyfile import read_key, signing_key, write_key
from ledger.leaf import EntryRecord, leaf_data, leaf_hasher
from ledger.merkle import (
    consistency_ranges,
    cover,
    inclusion_ranges,
    leaf_hash,
    perfect_root,
    range_hash,
)
from ledger.note import (
    COSIGNATURE,
    Checkpoint,
    Handover,
    Note,
    SigningKey,
    VerifierKey,
    b64,
    origin_of,
    signers,
)
from ledger.proof import ConsistencyProof, InclusionProof, RangeProof, parse_proof, read_proof
from ledger.regular import open_regular
from ledger.settings import load_settings
from ledger.verify import read_anchor
from tests.evidence import flip

FORMAT = (Path(__file__).parent.parent / "FORMAT.md").read_text()

# Of golang.org/x/mod/sumdb/note's tests.
PETER = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PETER_PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
ENOCH_PUBLIC = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
TEXT = (
    b"If you think cryptography is the answer to your problem,\n"
    b"then you don't know what your problem is.\n"
)
PETER_LINE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpR"
    "Zb6KE6RyyBwJnAM=\n"
)
ENOCH_LINE = (
    "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33"
    "WWd1RvMc+QQ=\n"
)
# The checkpoint of C2SP tlog-checkpoint's own page.
C2SP_CHECKPOINT = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv"
    "2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
)

ORIGIN = "acme.example/prod/t"
KEY = SigningKey.parse(SigningKey.generate("acme.example/prod").encode())
FIELDS = [b"type", b"mode.changed", b"id", b"m-1", b"data", b'{"mode":"strict"}']
RECORDS = [
    EntryRecord.of(ORIGIN, b"1-%d" % n, [*FIELDS[:3], b"m-%d" % n, *FIELDS[4:]])
    for n in range(1, 8)
]
LEAVES = [leaf_hash(one.leaf_data()) for one in RECORDS]


def node(one):
    return perfect_root(LEAVES[one[1] << one[0] : (one[1] + 1) << one[0]])


def checkpoint(size=7):
    return Checkpoint(ORIGIN, size, range_hash(0, size, node)).signed(KEY)


def proofs():
    hashes = tuple(range_hash(*one, node) for one in inclusion_ranges(2, 7))
    left, right = tuple(map(node, cover(0, 2))), tuple(map(node, cover(5, 7)))
    return {
        "inclusion": InclusionProof(2, hashes, checkpoint(), RECORDS[2]),
        "withheld": InclusionProof(2, hashes, checkpoint(), RECORDS[2].without_data()),
        "range": RangeProof(2, left, right, checkpoint(), tuple(RECORDS[2:5])),
    }


# -- notes and keys ----------------------------------------------------------------------------


def test_go_vectors():
    """Key, signature and note are byte for byte those of Go's tests."""
    key = SigningKey.parse(PETER)
    assert str(key.verifier()) == PETER_PUBLIC
    assert key.encode() == PETER
    note = Note(TEXT, (key.sign(TEXT),))
    assert note.encode() == TEXT + b"\n" + PETER_LINE.encode()
    both = Note.parse(TEXT + b"\n" + (PETER_LINE + ENOCH_LINE).encode())
    for public in (PETER_PUBLIC, ENOCH_PUBLIC):
        ((found, _),) = signers(both, [VerifierKey.parse(public)])
        assert str(found) == public


@pytest.mark.parametrize(
    "raw",
    [
        TEXT,
        TEXT + b"\n",
        TEXT + b"\n" + PETER_LINE.encode()[:-1],
        b"\x01" + TEXT + b"\n" + PETER_LINE.encode(),
        b"\xff" + TEXT + b"\n" + PETER_LINE.encode(),
        TEXT + b"\n" + PETER_LINE.replace("PeterNeumann", "Bad Name").encode(),
        TEXT + b"\n" + PETER_LINE.encode() + b"Unexpected line.\n",
        TEXT + b"\n" + PETER_LINE.encode() * 101,
        TEXT + b"\n" + "— PeterNeumann AAAA\n".encode(),
        TEXT * 2000 + b"\n" + PETER_LINE.encode(),
    ],
)
def test_malformed_notes_are_refused(raw):
    """What Go's verifier calls malformed is refused here too."""
    with pytest.raises(NotProved):
        signers(Note.parse(raw), [VerifierKey.parse(PETER_PUBLIC)])


def test_damaged_keys_are_refused():
    """No part of a key, and no key with a byte changed, is a key."""
    for text, parse in ((PETER_PUBLIC, VerifierKey.parse), (PETER, SigningKey.parse)):
        for at in range(len(text)):
            damaged = [text[:at], text[:at] + chr(ord(text[at]) + 1) + text[at + 1 :]]
            for one in damaged:
                with pytest.raises(InvalidInput):
                    parse(one)


def test_published_checkpoint_is_read_and_written_alike():
    """The checkpoint on C2SP's page survives a round trip byte for byte."""
    note = Note.parse(C2SP_CHECKPOINT.encode())
    found = Checkpoint.parse(note.text)
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20852163)
    assert note.encode() == C2SP_CHECKPOINT.encode()
    assert found.text() == note.text


def test_rust_implementation_accepts_our_checkpoint():
    """A checkpoint and an inclusion proof of ours verify with an independent program's library."""
    theirs = pytest.importorskip("metamorphic_log")
    key, note = str(KEY.verifier(ORIGIN)), checkpoint().encode().decode()
    head = theirs.checkpoint_verify(note, [key])
    assert (head.origin, head.size) == (ORIGIN, 7)
    proof = proofs()["inclusion"]
    theirs.checkpoint_verify_inclusion(note, [key], 2, LEAVES[2], list(proof.hashes))
    with pytest.raises(theirs.VerifyError):
        theirs.checkpoint_verify_inclusion(note, [key], 3, LEAVES[2], list(proof.hashes))


@pytest.mark.parametrize(
    "text",
    [
        "o\n1\n",
        "o\n01\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n",
        "o\n-1\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n",
        "o\n9223372036854775808\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n",
        "o\n" + "9" * 5000 + "\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n",
        "o\n\u0661\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n",
        "\n1\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n",
        "o\n1\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2J=\n",
        "o\n1\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jx\n",
        "o\n1\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\nx\n",
    ],
)
def test_malformed_checkpoints_are_refused(text):
    """Sizes with zeroes, signs, other digits or too many of them, and roots that are none."""
    with pytest.raises(NotProved):
        Checkpoint.parse(text.encode())


def test_handover_text_is_no_checkpoint():
    """No signed hand-over can pass for a checkpoint of any log."""
    at = Checkpoint.parse(checkpoint().text)
    with pytest.raises(NotProved):
        Checkpoint.parse(Handover.signed(at, KEY, SigningKey.generate("acme.example/prod")).text)


@pytest.mark.parametrize(
    "deployment", ["a b", "a+b", "a\nb", "", "/a", "a/", "é", "x" * 129, "/".join("a" * 60)]
)
def test_names_that_could_break_a_note_are_refused(deployment):
    """A deployment's name cannot bring a newline, a space or a plus into a checkpoint, nor make a
    file's name too long.
    """
    with pytest.raises(InvalidInput):
        SigningKey.generate(deployment)
    with pytest.raises(InvalidInput):
        origin_of("acme.example", "t\nx")


def test_every_deployment_has_files_for_its_logs(tmp_path):
    """The longest name that is allowed fits into a file's name; a longer one is refused by it."""
    longest = "/".join("a" * 44) + "aaa"
    with pytest.raises(InvalidInput, match="too long"):
        SigningKey.generate(f"{longest}a")
    anchor = AnchorFile(tmp_path, f"{SigningKey.generate(longest).name}/{'t' * 64}")
    with anchor.locked() as stream:
        assert anchor.tail(stream).last is None
    with pytest.raises(InvalidInput, match="too long for its file"):
        AnchorFile(tmp_path, f"{longest}a/{'t' * 64}")


# -- key files ---------------------------------------------------------------------------------


def test_key_files_are_private(tmp_path, monkeypatch):
    """A key is written with 0600, never over another, on disk with its name, and refused when
    others can read it.
    """
    path, synced, fsync = tmp_path / "seal.key", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), fsync(fd)))
    write_key(path, KEY)
    assert [one.st_ino for one in synced] == [path.stat().st_ino, tmp_path.stat().st_ino]
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path).encode() == KEY.encode()
    with pytest.raises(InvalidInput, match="exists"):
        write_key(path, KEY)
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(UnsafeKey, match="others can read"):
            read_key(path)


def test_key_comes_from_the_environment(tmp_path):
    """The key itself, or the file that has it; neither is said with the way out."""
    path = tmp_path / "seal.key"
    write_key(path, KEY)
    by_file = load_settings(govledger_signing_key_file=path)
    by_value = load_settings(govledger_signing_key=KEY.encode())
    assert signing_key(by_file).encode() == signing_key(by_value).encode() == KEY.encode()
    assert KEY.encode() not in repr(by_value)
    assert KEY.encode().rpartition("+")[2] not in repr(KEY)
    with pytest.raises(InvalidInput, match="keys new"):
        signing_key(load_settings())


# -- leaves ------------------------------------------------------------------------------------


def test_format_page_has_the_vectors():
    """FORMAT.md's leaves, hashes and records are what the code makes."""
    leaves = re.findall(r"^ +leaf +([0-9a-f]{100,})$", FORMAT, re.MULTILINE)
    hashes = re.findall(r"^ +hash +([0-9a-f]{64})$", FORMAT, re.MULTILINE)
    (record,) = re.findall(r"^ +record +([0-9a-f]+)$", FORMAT, re.MULTILINE)
    origin = "acme.example/prod/acgs-dev"
    ours = (origin, b"1795532923293-1", FIELDS)
    foreign = (origin, b"1795532923294-0", [b"data", b"", b"data", b"\xff\x00", b"x", b""])
    assert [leaf_data(*one).hex() for one in (ours, foreign)] == leaves
    assert [leaf_hasher(one[0])(*one[1:]).hex() for one in (ours, foreign)] == hashes
    assert EntryRecord.of(*ours).encode().hex() == record
    assert EntryRecord.decode(bytes.fromhex(record)).leaf_data().hex() == leaves[0]


PARTS = st.binary(max_size=40) | st.sampled_from([b"type", b"id", b"data"])


@given(st.lists(st.tuples(PARTS, PARTS), max_size=5), PARTS)
def test_both_ways_to_a_leaf_agree(pairs, entry_id):
    """The fast hasher, the encoding and the record give one leaf, with the data or without."""
    fields = [part for pair in pairs for part in pair]
    record = EntryRecord.of(ORIGIN, entry_id, fields)
    data = leaf_data(ORIGIN, entry_id, fields)
    assert leaf_hasher(ORIGIN)(entry_id, fields) == leaf_hash(data)
    assert record.leaf_data() == record.without_data().leaf_data() == data
    assert EntryRecord.decode(record.encode()) == record


@given(st.lists(PARTS, min_size=6, max_size=6), st.lists(PARTS, min_size=6, max_size=6))
def test_different_entries_have_different_leaves(one, other):
    """No two lists of fields share a leaf, wherever the borders between their bytes lie."""
    assert (one == other) == (leaf_data(ORIGIN, b"1-1", one) == leaf_data(ORIGIN, b"1-1", other))
    assert leaf_data(ORIGIN, b"1-1", one) != leaf_data(ORIGIN, b"1-2", one)
    assert leaf_data(ORIGIN, b"1-1", one) != leaf_data(ORIGIN + "2", b"1-1", one)


@given(st.integers(0, 5), st.data())
def test_no_bit_of_an_entry_is_outside_its_leaf(field, data):
    """Any flipped bit of any name or value changes the leaf."""
    at = data.draw(st.integers(0, len(FIELDS[field]) - 1))
    changed = list(FIELDS)
    changed[field] = flip(changed[field], at, data.draw(st.integers(0, 7)))
    hashed = leaf_hasher(ORIGIN)
    assert hashed(b"1-1", changed) != hashed(b"1-1", FIELDS)


# -- proofs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inclusion", "withheld", "range"])
def test_proofs_survive_their_file(kind):
    """What is written is read back the same, and proves the same."""
    proof = proofs()[kind]
    again = parse_proof(proof.encode())
    assert again == proof
    proved = again.verify([KEY.verifier()])
    assert (proved.first_seq, proved.checkpoint.size) == (3, 7)
    assert len(proved.entries) == (3 if kind == "range" else 1)


@given(st.sampled_from(["inclusion", "withheld", "range"]), st.data())
def test_no_flipped_bit_is_accepted(kind, data):
    """Any flipped bit of a proof makes it prove nothing: an error, never a traceback."""
    raw = proofs()[kind].encode()
    damaged = flip(raw, data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7)))
    with pytest.raises(NotProved):
        parse_proof(damaged).verify([KEY.verifier()])


@given(st.sampled_from(["inclusion", "withheld", "range"]), st.data())
def test_cut_or_lengthened_proofs_are_refused(kind, data):
    """A proof cut anywhere, or with lines doubled or bytes added, proves nothing."""
    raw = proofs()[kind].encode()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    lines = raw.split(b"\n")
    at = data.draw(st.integers(0, len(lines) - 3))
    doubled = b"\n".join([*lines[: at + 1], *lines[at:]])
    for forged in (cut, raw + data.draw(st.binary(min_size=1, max_size=9)), doubled):
        with pytest.raises(NotProved):
            parse_proof(forged).verify([KEY.verifier()])


@given(st.binary(max_size=300))
def test_anything_else_is_no_proof(raw):
    """Random bytes, also behind a proof's first line, are refused."""
    for forged in (raw, b"c2sp.org/tlog-proof@v1\n" + raw, b"govledger/range-proof@1\n" + raw):
        with pytest.raises(NotProved):
            parse_proof(forged).verify([KEY.verifier()])


def test_proof_longer_than_the_tree_is_refused():
    """Hashes beyond the tree's height are refused, however many."""
    proof = proofs()["inclusion"]
    for more in (1, 60, 100_000):
        longer = InclusionProof(2, proof.hashes + (b"x" * 32,) * more, proof.note, proof.entry)
        with pytest.raises(NotProved):
            parse_proof(longer.encode()).verify([KEY.verifier()])


@pytest.mark.parametrize(
    ("count", "body", "why", "most_bytes"),
    [
        (100_001, b"A\n" * 1_000_000, "at most 100000 entries", 100),
        (100_000, b"A\n" * 1_000_000, "too short for an entry", 100),
        (2, b"A" * 80 + b"\n" + b"A" * 80_000, "a line of more than", 10_200),
        (2, (b"A" * 80 + b"\n") * 10_000, "not have as many entries", 500),
    ],
)
def test_of_a_range_no_more_is_read_than_it_may_have(monkeypatch, count, body, why, most_bytes):
    """Whatever a file claims or has, its reader stops at the first line that cannot be."""
    monkeypatch.setattr("ledger.proof.MAX_ENTRY_BYTES", 10_000)
    stream = BytesIO(b"govledger/range-proof@1\nstart 0\ncount %d\n\n\n\n" % count + body)
    with pytest.raises(NotProved, match=why):
        read_proof(stream)
    assert stream.tell() <= most_bytes


@pytest.mark.parametrize("begin", [b"old ", b"govledger/range-proof@1\nstart ", b"old 1\n"])
def test_lines_without_an_entry_are_short(begin):
    """A number or a hash of megabytes is refused as a line that cannot be, unread."""
    stream = BytesIO(begin + b"9" * 500_000)
    with pytest.raises(NotProved, match="a line of more than 1000 bytes"):
        read_proof(stream)
    assert stream.tell() < 1200


def test_a_range_is_read_from_its_file_record_by_record(tmp_path):
    """A range's records stay in the file: what is given later is what was verified, or an error."""
    raw = b"before" + proofs()["range"].encode()
    path = tmp_path / "r"
    path.write_bytes(raw)
    with path.open("r+b", buffering=0) as writing, path.open("rb") as stream:
        stream.seek(len(b"before"))
        proved = read_proof(stream).verify([KEY.verifier()])
        assert list(proved.entries) == list(proved.entries[:]) == RECORDS[2:5]
        assert list(proved.entries[1:]) == RECORDS[3:5]
        other = b64(RECORDS[6].encode()).encode()
        writing.seek(raw.index(b64(RECORDS[3].encode()).encode()))
        writing.write(other)
        stream.seek(0)
        assert stream.read(1) == b"b"
        assert proved.entries[2] == RECORDS[4]
        with pytest.raises(NotProved, match="changed while"):
            list(proved.entries)


def test_proof_without_its_entry_is_read_and_proves_nothing_alone():
    """`extra` is optional in a tlog-proof: others' files are read, and what is missing is said."""
    proof = proofs()["inclusion"]
    bare = replace(proof, entry=None)
    again = parse_proof(bare.encode())
    assert again == bare
    with pytest.raises(NotProved, match="no `extra`"):
        again.verify([KEY.verifier()])
    assert replace(again, entry=proof.entry).verify([KEY.verifier()]).first_seq == 3


@pytest.mark.parametrize("first", [b"\0", b"x", b"c2sp.org/tlog-proof@v2\n"])
def test_a_file_of_another_kind_is_not_read_on(tmp_path, first):
    """The first line decides: of a huge file of something else no more than that is read."""
    path = tmp_path / "huge"
    path.write_bytes(first)
    os.truncate(path, 1 << 40)
    with path.open("rb") as stream, pytest.raises(NotProved, match="no proof that"):
        read_proof(stream)


def test_huge_numbers_in_a_record_are_refused():
    """A record that says it has 4 GiB, or billions of fields, costs nothing."""
    raw = RECORDS[0].encode()
    for at in (16, 16 + 4 + len(ORIGIN), 16 + 4 + len(ORIGIN) + 4 + 3):
        with pytest.raises(NotProved):
            EntryRecord.decode(raw[:at] + b"\xff\xff\xff\xff" + raw[at + 4 :])


def test_other_logs_keys_do_not_count():
    """A proof verifies with the log's or its deployment's key, and no other."""
    proof = proofs()["inclusion"]
    proof.verify([KEY.verifier(ORIGIN)])
    for key in (KEY.verifier("acme.example"), KEY.verifier(f"{ORIGIN}/x")):
        with pytest.raises(NotProved, match="not trusted"):
            proof.verify([key])
    with pytest.raises(NotProved):
        proof.verify([SigningKey.generate("acme.example/prod").verifier()])


@pytest.mark.parametrize("kind", ["inclusion", "range"])
def test_keys_of_the_two_kinds_do_not_stand_in_for_each_other(kind):
    """A log's key is no witness, and a witness's signs no log: refused, not ignored."""
    proof, log = proofs()[kind], KEY.verifier(ORIGIN)
    with pytest.raises(InvalidInput, match="a log's, and a witness's"):
        proof.verify([log], [log])
    with pytest.raises(InvalidInput, match="a witness's, and a log's"):
        proof.verify([log, KEY.verifier(ORIGIN, COSIGNATURE)])


def test_signers_name_each_key_once():
    """A signature line that is repeated, or a second cosignature, makes no second signer."""
    note = checkpoint(3)
    witness = SigningKey.generate("w.example/w1")
    many = (*note.signatures * 40, *(witness.cosign(note.text, at) for at in range(50)))
    found = signers(Note(note.text, many), [KEY.verifier(ORIGIN), witness.verifier(None, 4)])
    assert [(key.name, one.raw) for key, one in found] == [
        (ORIGIN, note.signatures[0].raw),
        ("w.example/w1", many[40].raw),
    ]


def test_entry_of_another_log_is_refused():
    """An entry record must name the log that the checkpoint is of."""
    proof = proofs()["inclusion"]
    other = EntryRecord("acme.example/prod/u", proof.entry.entry_id, proof.entry.fields)
    with pytest.raises(NotProved, match="is of the log"):
        InclusionProof(2, proof.hashes, proof.note, other).verify([KEY.verifier()])


def test_consistency_is_between_the_two_checkpoints_given():
    """It verifies between those two, and fails for another earlier one, size or root."""
    old = checkpoint(4)
    hashes = tuple(range_hash(*one, node) for one in consistency_ranges(4, 7))
    proof = ConsistencyProof(4, hashes, checkpoint())
    parsed = parse_proof(proof.encode())
    assert parsed.verify([KEY.verifier()], old).old.size == 4
    with pytest.raises(NotProved, match="size"):
        parsed.verify([KEY.verifier()], checkpoint(5))
    forged = Checkpoint(ORIGIN, 4, b"r" * 32).signed(KEY)
    with pytest.raises(NotProved):
        parsed.verify([KEY.verifier()], forged)


# -- anchor files ------------------------------------------------------------------------------


def test_anchor_tail_is_read_backwards_through_any_length(tmp_path):
    """The end of a long file is found without reading the rest, wherever the window begins."""
    anchor = AnchorFile(tmp_path, ORIGIN)
    notes = [Checkpoint(ORIGIN, n, b"%032d" % n).signed(KEY) for n in range(1, 1500)]
    anchor.path.write_bytes(b"".join(note.encode() + b"\n" for note in notes))
    with anchor.locked() as stream:
        tail = anchor.tail(stream)
        assert (tail.last, tail.torn) == (notes[-1], None)
        assert tail.whole_bytes == anchor.path.stat().st_size
        more = Checkpoint(ORIGIN, 1500, b"x" * 32).signed(KEY)
        anchor.append(stream, tail, more)
    with anchor.path.open("rb") as stream:
        assert list(read_notes(stream, "x")) == [*notes, more]


@given(st.integers(1, 400))
def test_torn_tail_is_overwritten_by_the_next(cut):
    """Whatever part of the last note is there, what is before it stays, the next follows."""
    with tempfile.TemporaryDirectory() as folder:
        anchor = AnchorFile(Path(folder), ORIGIN)
        first, second = (checkpoint(size).encode() + b"\n" for size in (3, 7))
        anchor.path.write_bytes(first + second[: min(cut, len(second) - 2)])
        with anchor.locked() as stream:
            tail = anchor.tail(stream)
            assert tail.last == Note.parse(first[:-1])
            assert tail.torn in (None, Checkpoint.parse(Note.parse(second[:-1]).text))
            anchor.append(stream, tail, Note.parse(second[:-1]))
        assert anchor.path.read_bytes() == first + second


def handed_over(signers=2):
    at = Checkpoint.parse(checkpoint(7).text)
    note = Handover.signed(at, KEY, SigningKey.generate(KEY.name))
    return Note(note.text, note.signatures[:signers]).encode() + b"\n"


@pytest.mark.parametrize("last", [lambda: checkpoint(7).encode() + b"\n", handed_over])
def test_last_note_without_its_empty_line_is_whole(tmp_path, last):
    """Who reads an anchor and who writes on agree that only the empty line is missing."""
    anchor = AnchorFile(tmp_path, ORIGIN)
    first, second, third = checkpoint(3).encode() + b"\n", last(), checkpoint(7)
    anchor.path.write_bytes((first + second)[:-1])
    assert [note.encode() + b"\n" for note in anchor.notes()] == [first, second]
    with anchor.locked() as stream:
        tail = anchor.tail(stream)
        assert (tail.last.encode() + b"\n", tail.torn) == (second, None)
        anchor.append(stream, tail, third)
    assert anchor.path.read_bytes() == first + second + third.encode() + b"\n"


def test_hand_over_that_lost_its_second_signature_is_torn(tmp_path):
    """A crash between a hand-over's two signatures leaves no hand-over, for reader and writer."""
    anchor = AnchorFile(tmp_path, ORIGIN)
    first = checkpoint(3).encode() + b"\n"
    anchor.path.write_bytes(first + handed_over(1)[:-1])
    assert [note.encode() + b"\n" for note in anchor.notes()] == [first]
    with anchor.locked() as stream:
        assert anchor.tail(stream).last == Note.parse(first[:-1])
        assert anchor.tail(stream).whole_bytes == len(first)


def read_as_anchor(raw):
    """What a file of these bytes proves: (sizes, whether more is cut off)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.checkpoints"
        path.write_bytes(raw)
        anchored = read_anchor(path, ORIGIN, [KEY.verifier(ORIGIN)])
        return [one.size for one, _ in anchored.sizes()], anchored.torn


@given(st.data())
def test_no_flipped_bit_of_an_anchor_is_accepted(data):
    """Any flipped bit of an anchor file makes it prove nothing, or, where it looks like an end that
    a crash tore, no more than what is before that, and it says so.
    """
    raw = b"".join(checkpoint(size).encode() + b"\n" for size in (3, 7))
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    assert read_as_anchor(raw) == ([3, 7], False)
    try:
        assert read_as_anchor(flip(raw, at, bit)) == ([3], True)
        assert at > len(raw) // 2
    except NotProved:
        pass


def test_only_files_are_read(tmp_path):
    """A pipe, which would hold its reader for ever, and a device without an end are refused."""
    os.mkfifo(pipe := tmp_path / "pipe", 0o600)
    for read in (open_regular, read_key, lambda path: read_anchor(path, ORIGIN, [])):
        for path in (pipe, Path("/dev/zero")):
            with pytest.raises(InvalidInput, match="a pipe or a device"):
                read(path)
    endless = AnchorFile(tmp_path, ORIGIN)
    endless.path.write_bytes(b"x" * 200_000)
    with pytest.raises(NotProved, match="too l"):
        endless.chain(ORIGIN, [])


@given(st.integers(0, 600))
def test_anchor_cut_anywhere_proves_what_is_whole(cut):
    """A file cut off at any byte proves the notes before the cut, or nothing if there is none."""
    first, both = checkpoint(3).encode(), checkpoint(3).encode() + b"\n" + checkpoint(7).encode()
    raw = both[:cut]
    if len(raw) < len(first):
        with pytest.raises(NotProved):
            read_as_anchor(raw)
    elif len(raw) == len(both):
        assert read_as_anchor(raw) == ([3, 7], False)
    else:
        assert read_as_anchor(raw) == ([3], len(raw) > len(first) + 1)
