"""The commands of the evidence, end to end, as their users run them."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import keys
from ledger.service.commands_evidence import app
from ledger.service.fields import field_json, field_line
from tests.commands import GOVLEDGER, environment, run
from tests.evidence import flip


def lines(first, last):
    return b"".join(
        b'{"type":"decision.recorded","id":"d-%d","at":"2026-11-22T08:00:00Z",'
        b'"agent":{"id":"agent-7"},"action":{"type":"send_email"},"verdict":"allow"}\n' % n
        for n in range(first, last + 1)
    )


class Owner:
    """Who runs the ledger: a key, an anchor, and commands that know of them."""

    def __init__(self, url, tenant, folder):
        self.url, self.tenant, self.folder = url, tenant, folder
        self.anchor, self.key_file = folder / "anchor", folder / "seal.key"
        self.anchor.mkdir()
        made = run(
            None, "keys", "new", "--deployment", "acme.example/prod", "-o", self.key_file, "--json"
        )
        self.key = made.lines[0]["key"]
        self.run("append", tenant, "-", stdin=lines(1, 20))

    def run(self, *args, **options):
        return run(
            self.url,
            *args,
            GOVLEDGER_SIGNING_KEY_FILE=str(self.key_file),
            GOVLEDGER_ANCHOR=str(self.anchor),
            **options,
        )


@pytest.fixture
def owner(valkey, tenant, tmp_path):
    return Owner(valkey.url, tenant, tmp_path)


def test_seal_verify_prove_and_verify_offline(owner, tmp_path):
    """From a key to a proof that a stranger checks without Redis, and what each step prints."""
    done = owner.run("seal", owner.tenant, "--once")
    assert (done.code, done.out) == (0, f"{owner.tenant}: 20 new entries sealed, 20 in all\n")
    done = owner.run("verify", owner.tenant)
    assert done.code == 0, done.out
    assert "PROVED: seq 1 to 20 are what was sealed" in done.out
    stranger = run(
        owner.url, "verify", owner.tenant, "--anchor", owner.anchor, "--key", owner.key, "--json"
    )
    assert stranger.code == 0
    assert (stranger.lines[0]["ok"], stranger.lines[0]["sealed"]) == (True, 20)
    proof = tmp_path / "d-7.tlog-proof"
    assert owner.run("prove", owner.tenant, "d-7", "-o", proof).code == 0
    done = run(None, "verify-proof", proof, "--key", owner.key, REDIS_URL="redis://127.0.0.1:1")
    assert done.code == 0
    assert "record 7 of 20" in done.out
    assert "id: d-7" in done.out
    shown = run(None, "verify-proof", proof, "--key", owner.key, "--json").lines[0]
    assert (shown["proved"], shown["first_seq"], shown["size"]) == (True, 7, 20)
    log_key = owner.run("keys", "show", "--tenant", owner.tenant).out.strip()
    assert run(None, "verify-proof", proof, "--key", log_key).code == 0


def test_tampering_ends_with_1_and_a_reason(owner, valkey, tmp_path):
    """Edited entries, edited proofs and foreign keys end with exit code 1 and say why."""
    owner.run("seal", owner.tenant, "--once")
    proof = tmp_path / "p.tlog-proof"
    owner.run("prove", owner.tenant, "--seq", 3, "-o", proof)
    proof.write_bytes(flip(proof.read_bytes(), 200))
    done = run(None, "verify-proof", proof, "--key", owner.key, "--json")
    assert done.code == 1
    assert done.error["error"] == "NotProved"
    with valkey.client() as client:
        stream = keys.decisions(owner.tenant)
        client.xdel(stream, client.execute_command("XRANGE", stream, "-", "+")[4][0])
    done = owner.run("verify", owner.tenant, "--json")
    assert done.code == 1
    (found,) = [one for one in done.lines[0]["findings"] if one["reason"] == "deleted"]
    assert found["seq"] == 5
    assert not done.lines[0]["proved"]
    done = owner.run("seal", owner.tenant, "--once")
    assert done.code == 0  # nothing new; what it signed still stands
    done = owner.run("prove", owner.tenant, "d-5", "-o", tmp_path / "q", "--json")
    assert done.error["error"] == "EntriesMissing"


def test_an_anchor_that_is_not_there_is_bad_input(owner, tmp_path):
    """A directory or file that is absent is named, and nothing is said about the record."""
    done = owner.run("verify", owner.tenant, "--anchor", tmp_path / "none")
    assert (done.code, done.out) == (2, "")
    assert f"error: anchor: there is no file or directory {tmp_path / 'none'}\nhint: " in done.err


def test_a_tenant_that_is_not_there_is_named(owner):
    """Where a name is misspelt, `verify` says more than that it was never sealed."""
    done = owner.run("verify", "nobody-at-all")
    assert done.code == 1
    assert "found: no-anchor: " in done.out
    assert "note: tenant nobody-at-all: nothing is recorded (`govledger tenants`" in done.out


def test_no_anchor_says_what_is_not_proved(owner):
    """Without an anchor it ends with 1, and in so many words."""
    owner.run("seal", owner.tenant, "--once")
    done = run(owner.url, "verify", owner.tenant, "--key", owner.key)
    assert done.code == 1
    assert "NOT PROVED" in done.out
    assert "not proved: that nothing was cut off" in done.out


def test_ranges_prove_completeness(owner, tmp_path):
    """By seq and by time: how many of how many, with no other between; data may be withheld."""
    owner.run("seal", owner.tenant, "--once")
    proof = tmp_path / "r.range-proof"
    assert owner.run("prove", owner.tenant, "--range", "5..9", "-o", proof).code == 0
    done = run(None, "verify-proof", proof, "--key", owner.key)
    assert "records 5 to 9 of 20, and no other between" in done.out
    today = datetime.now(UTC).date().isoformat()
    days, all_of_them = f"{today}..2099-01-01", tmp_path / "days.range-proof"
    told = ["--range", days, "-o", all_of_them]
    done = owner.run("prove", owner.tenant, *told, "--withhold-data")
    assert done.code == 0, done.err
    shown = run(None, "verify-proof", all_of_them, "--key", owner.key, "--json").lines[0]
    assert len(shown["entries"]) == 20
    assert all(set(one["fields"][2]) == {"name", "sha256"} for one in shown["entries"])
    for wrong, code in (("9..5", 2), ("0..3", 2), ("x..y", 2), ("7", 2), ("9" * 30 + "..", 2)):
        done = owner.run("prove", owner.tenant, "--range", wrong, "-o", tmp_path / "new")
        assert done.code == code, wrong
    assert owner.run("prove", owner.tenant, *told).code == 4  # nothing is overwritten
    done = run(None, "verify-proof", all_of_them, "--key", owner.key, "--range", days)
    assert "recorded in that time: 20, 1 to 20, and no other; the checkpoint ends there" in done.out
    for file, asked, is_open in (
        (all_of_them, days, True),
        (all_of_them, "1..20", False),
        (all_of_them, "1..", True),
        (proof, "5..9", False),
    ):
        told = ["--key", owner.key, "--range", asked, "--json"]
        assert run(None, "verify-proof", file, *told).lines[0]["open_end"] is is_open, asked
    backwards = ["--key", owner.key, "--range", "2027-01-01..2020-01-01"]
    assert run(None, "verify-proof", all_of_them, *backwards).code == 2
    for asked, code in (("5..9", 0), ("5..10", 1), (days, 1), ("x..y", 2)):
        done = run(None, "verify-proof", proof, "--key", owner.key, "--range", asked, "--json")
        assert done.code == code, asked
    done = owner.run("prove", owner.tenant, "d-1", "-o", owner.key_file)
    assert (done.code, "exists" in done.err) == (4, True)


FIELDS = [
    (b"raw", b"\xff", False, r"raw (bytes): b'\xff'", {"name": "raw", "value_base64": "/w=="}),
    (b"raw", rb"\xff", False, r"raw: \xff", {"name": "raw", "value": r"\xff"}),
    (b"x", b"y\n  z: 1", False, r"x (quoted): 'y\n  z: 1'", {"name": "x", "value": "y\n  z: 1"}),
    (b"a: b", b"c", False, "b'a: b': c", {"name": "a: b", "value": "c"}),
    (b"\xfd", b"", False, r"b'\xfd': ", {"name_base64": "/Q==", "value": ""}),
    (b"data", b"\0", True, "data (withheld, SHA-256): 00", {"name": "data", "sha256": "00"}),
    (
        b"data",
        b"withheld, SHA-256 00",
        False,
        "data: withheld, SHA-256 00",
        {"name": "data", "value": "withheld, SHA-256 00"},
    ),
    (
        b"data (withheld, SHA-256)",
        b"00",
        False,
        "b'data (withheld, SHA-256)': 00",
        {"name": "data (withheld, SHA-256)", "value": "00"},
    ),
]


@pytest.mark.parametrize(("name", "value", "withheld", "line", "shown"), FIELDS)
def test_fields_are_shown_as_what_they_are(name, value, withheld, line, shown):
    """Bytes, text that spells them, new lines, and what is withheld have forms of their own."""
    assert field_line(name, value, withheld=withheld) == line
    assert field_json(name, value, withheld=withheld) == shown


FIELD = st.tuples(
    st.binary(max_size=9) | st.text("a':b\\x0 ()", max_size=9).map(str.encode),
    st.binary(max_size=9) | st.text("a':b\\x0 \n", max_size=9).map(str.encode),
    st.booleans(),
)


@given(FIELD, FIELD)
def test_fields_that_differ_never_look_alike(one, other):
    """No two fields have one line or one object, and a line is one line."""
    lines = {field_line(name, value, withheld=withheld) for name, value, withheld in (one, other)}
    objects = [field_json(name, value, withheld=withheld) for name, value, withheld in (one, other)]
    assert len(lines) == len({one, other})
    assert (objects[0] == objects[1]) == (one == other)
    assert all(line.isprintable() for line in lines)


def test_a_checkpoint_continues_an_earlier_one(owner, tmp_path):
    """Who kept an old checkpoint gets a proof that today's log still begins with it."""
    owner.run("seal", owner.tenant, "--once")
    (file,) = owner.anchor.iterdir()
    old = tmp_path / "old.checkpoint"
    old.write_bytes(file.read_bytes())
    owner.run("append", owner.tenant, "-", stdin=lines(21, 27))
    owner.run("seal", owner.tenant, "--once")
    proof = tmp_path / "c.proof"
    assert owner.run("prove", owner.tenant, "--continues", old, "-o", proof).code == 0
    done = run(None, "verify-proof", proof, "--continues", old, "--key", owner.key)
    assert done.code == 0
    assert "size 27 continues that of 20" in done.out
    assert run(None, "verify-proof", proof, "--key", owner.key).code == 2
    done = owner.run("verify", owner.tenant, "--anchor", old)
    assert done.code == 0
    assert "not proved: seq 21 to 27" in done.out


def test_rotation_by_command(owner, tmp_path):
    """The next key takes the logs over; the old one is refused from then on."""
    owner.run("seal", owner.tenant, "--once")
    new = tmp_path / "new.key"
    run(None, "keys", "new", "--deployment", "acme.example/prod", "-o", new)
    done = owner.run("keys", "rotate", owner.key_file, new)
    assert done.out == f"acme.example/prod/{owner.tenant}: handed over\n"
    owner.run("append", owner.tenant, "-", stdin=lines(21, 22))
    refused = owner.run("seal", owner.tenant, "--once")
    assert (refused.code, refused.err.count("was handed over to the key")) == (4, 1)
    assert owner.run("seal", owner.tenant, "--once", "--key-file", new).code == 0
    for key in (owner.key, run(None, "keys", "show", "--key-file", new).out.strip()):
        assert owner.run("verify", owner.tenant, "--key", key).code == 0


def test_witness_serves_and_sealer_runs(owner, spawn, tmp_path):
    """Both long commands say when they are ready, work together, and end on SIGTERM with 0."""
    key, data = tmp_path / "w.key", tmp_path / "w"
    data.mkdir()
    public = run(None, "keys", "new", "--deployment", "w.example/w1", "-o", key, "--witness")
    assert public.code == 0
    argv = [*GOVLEDGER, "witness", "serve", "--key-file", key, "--log", owner.key]
    argv += ["--data", data, "--port", "0", "--json"]
    witness = spawn(argv, stdout=subprocess.PIPE, env=environment(None))
    told = json.loads(witness.stdout.readline())
    place = told["witness"]
    assert (told["key"], f"{told['key']}@{told['url']}") == (public.out.strip(), place)
    argv = [*GOVLEDGER, "seal", "--key-file", owner.key_file, "--anchor", owner.anchor]
    argv += ["--witness", place, "--json"]
    sealer = spawn(argv, stdout=subprocess.PIPE, env=environment(owner.url))
    assert "sealing" in json.loads(sealer.stdout.readline())
    sealer.terminate()
    assert sealer.wait(20) == 0
    done = owner.run("seal", owner.tenant, "--once", "--witness", place)
    assert "cosigned by w.example/w1" in done.out
    cosigner, _, url = place.partition("@")
    done = owner.run("verify", owner.tenant, "--anchor", url, "--witness-key", cosigner)
    assert done.code == 0, done.out
    assert "cosigned by w.example/w1 at 20" in done.out
    assert owner.run("verify", owner.tenant, "--anchor", url).code == 2
    witness.terminate()
    assert witness.wait(20) == 0


def test_unsafe_and_missing_keys_are_refused(owner, tmp_path):
    """A key that others can read ends with 4, a missing one with 2, each with the way out."""
    owner.key_file.chmod(0o644)
    done = owner.run("seal", owner.tenant, "--once", "--json")
    assert (done.code, done.error["error"]) == (4, "UnsafeKey")
    assert "chmod 600" in done.error["hint"]
    done = run(owner.url, "seal", "--once", "--json")
    assert (done.code, done.error["error"]) == (2, "InvalidSetting")
    done = run(owner.url, "verify", owner.tenant, "--json")
    assert done.code == 2
    assert "--key" in done.error["message"]


@pytest.mark.parametrize(
    "args",
    [
        ["seal", "t"],
        ["seal", "--rebuild-tiles"],
        ["prove", "t", "-o", "x"],
        ["prove", "t", "id", "--seq", "1", "-o", "x"],
        ["verify-proof", "absent", "--key", "x"],
        ["keys", "show", "--witness", "--tenant", "t"],
        ["witness", "serve", "--log", "x", "--data", "."],
    ],
)
def test_bad_usage_ends_with_2(owner, args):
    """Options that do not fit together are refused before anything is done."""
    done = owner.run(*args, "--json")
    assert done.code == 2, done.err
    assert "Traceback" not in done.err


def test_examples_in_the_help_work(fresh_server, tenant, tmp_path):
    """Each example of these commands does what it says, with a user's own names in it."""
    owner = Owner(fresh_server().url, tenant, tmp_path)  # as one of them seals all tenants
    owner.run("append", owner.tenant, "-", stdin=lines(21, 21))
    names = {
        "acgs-dev": owner.tenant,
        "/mnt/anchor": str(owner.anchor),
        "seal.key": str(owner.key_file),
        "acme.example/prod+0f1e2d3c+AbCd…": owner.key,
        "VKEY": owner.key,
    }
    (tmp_path / "events.jsonl").write_bytes(lines(1, 1))
    examples = [
        line.strip()
        for command in app.registered_commands
        if command.callback.__module__.endswith("commands_evidence")
        for line in command.epilog.splitlines()
        if "govledger " in line
    ]
    assert len(examples) == 9
    today = datetime.now(UTC).date().isoformat()
    names["2026-03-01..2026-03-31"] = f"{today}..2099-01-01"
    for example in examples:
        line = example
        for name, value in names.items():
            line = line.replace(name, value)
        done = owner.run(*line.split()[1:], cwd=tmp_path)
        assert done.code == 0, (line, done.out, done.err)
        if "--once" in line:
            (file,) = [one for one in owner.anchor.iterdir() if owner.tenant in one.name]
            for name in ("checkpoint.txt", "january.checkpoint"):
                (tmp_path / name).write_bytes(file.read_bytes())
