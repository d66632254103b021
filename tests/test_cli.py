"""The command line, run as a process against real servers."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import Decision, Ledger, __version__, errors, keys
from ledger.append import Durability, Receipt
from ledger.events import encode, event_types
from ledger.service import appending, jsonl, terminal
from ledger.service.appending import append_checked
from ledger.service.cli import app
from ledger.service.command import moment
from ledger.service.jsonl import LINE_BYTES_LIMIT, Line, LineSplitter, Source, event_of
from ledger.service.render import entry_json, entry_text, time_text
from ledger.stream import Entry
from ledger.wording import counted
from tests.commands import GOVLEDGER, environment, run
from tests.servers import new_tenant, wait_until

SHIPPED = Path(__file__).parent.parent / "ledger" / "data" / "agentdojo-decisions.jsonl"
CALLBACKS = {one.name or one.callback.__name__: one for one in app.registered_commands}
COMMANDS = list(CALLBACKS)
EVIDENCE = ("seal", "verify", "prove", "verify-proof")

NOT_THERE = {"REDIS_URL": "redis://127.0.0.1:1", "MEMORY_MAX_RECONNECT_ATTEMPTS": "0"}


def decision(event_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "decision.recorded",
        "id": event_id,
        "at": "2026-03-03T12:00:00Z",
        "agent": {"id": "agent-1"},
        "action": {"type": "read_file"},
        "verdict": "allow",
        **fields,
    }


def as_lines(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def decisions(count: int, prefix: str = "d", **fields: Any) -> bytes:
    return as_lines(*(decision(f"{prefix}-{n}", **fields) for n in range(1, count + 1)))


def recorded(server: Any, tenant: str) -> int:
    return server.cli("XLEN", keys.decisions(tenant))


@pytest.fixture(scope="module")
def shipped(shared_server, tmp_path_factory):
    """The shipped events, recorded on the shared Valkey for four tenants of this module's own."""
    server, prefix = shared_server("valkey9"), new_tenant()
    file = tmp_path_factory.mktemp("shipped") / "events.jsonl"
    file.write_bytes(
        SHIPPED.read_bytes().replace(b'"tenant":"', b'"tenant":"%b-' % prefix.encode())
    )
    done = run(server.url, "append", "--tenant-from-event", file, "--json")
    assert done.code == 0, done.err
    tenant = done.lines[0]["tenant"]
    return SimpleNamespace(server=server, url=server.url, file=file, done=done, tenant=tenant)


# --- append ---------------------------------------------------------------------------------------


def test_append_lets_each_line_choose_its_tenant(shipped):
    """--tenant-from-event records every line for the tenant that it names, and says so for each."""
    assert len(shipped.done.lines) == 4
    for line in shipped.done.lines:
        assert line["tenant"].endswith(("workspace", "travel", "banking", "slack"))
        assert (line["count"], line["duplicates"]) == (700, 0)
        assert (line["first_seq"], line["last_seq"]) == (1, 700)
        assert line["durability"] == "fsynced"
        assert recorded(shipped.server, line["tenant"]) == 700


def test_append_twice_adds_nothing(server, tenant, tmp_path):
    """The same file again is all duplicates, on every server kind."""
    file = tmp_path / "events.jsonl"
    file.write_bytes(decisions(450))
    first = run(server.url, "append", tenant, file)
    again = run(server.url, "append", tenant, file)
    assert first.out == f"{tenant}: 450 events (0 duplicates), seq 1 to 450, fsynced\n"
    assert again.out == f"{tenant}: 450 events (450 duplicates), seq 1 to 450, fsynced\n"
    assert (first.code, again.code, first.err, again.err) == (0, 0, "", "")
    assert recorded(server, tenant) == 450


def test_append_reads_what_editors_and_pipes_make(valkey, tenant):
    """A byte order mark, CRLF, empty lines, no last newline, and `tenant` anywhere are fine."""
    text = b"\r\n".join(
        [
            b"\xef\xbb\xbf" + json.dumps({"tenant": tenant, **decision("a")}).encode(),
            b"",
            b"   ",
            json.dumps({**decision("b"), "tenant": tenant}).encode(),
            json.dumps(decision("c", metadata={"tenant": "another", "n": 2**60})).encode(),
        ]
    )
    done = run(valkey.url, "append", tenant, "--json", stdin=text)
    assert (done.code, done.lines[0]["count"]) == (0, 3)
    shown = run(valkey.url, "show", tenant, "c", "--json").lines[0]
    assert shown["event"]["metadata"] == {"tenant": "another", "n": 2**60}


# What is wrong with a line, and what the error says of it.
BAD_LINES: list[tuple[bytes, str]] = [
    (json.dumps(decision("nan", risk_score=float("nan"))).encode(), "risk_score"),
    (json.dumps(decision("inf", latency_ms=float("inf"))).encode(), "latency_ms"),
    (json.dumps(decision("surrogate", reason="\ud800")).encode(), "Invalid JSON"),
    (json.dumps(decision("reason", reason="x" * 2**20)).encode(), "at most 32768"),
    (json.dumps(decision("large", reason="x" * 33_000)).encode(), "the limit is 32768"),
    (json.dumps(decision("meta", metadata={"x": "y" * 9000})).encode(), "the limit is 8192"),
    (json.dumps(decision("future", at="2100-01-01T00:00:00Z")).encode(), "ahead of the ledger"),
    (json.dumps(decision("naive", at="2026-03-03T12:00:00")).encode(), "at: "),
    (json.dumps(decision("unknown", colour="red")).encode(), "colour: is no field"),
    (json.dumps(decision("verdict", verdict="maybe")).encode(), "verdict"),
    (json.dumps(decision("type", type="decision.guessed")).encode(), "decision.recorded"),
    (json.dumps(decision("i" * 129)).encode(), "id: "),
    (json.dumps(decision("control\n")).encode(), "id: "),
    (json.dumps({**decision("x"), "id": None}).encode(), "id: "),
    (
        b'{"type":"decision.recorded","agent":{"id":"a"},"action":{"type":"b"},"verdict":"deny"}',
        "id",
    ),
    (json.dumps(decision("digits", obligations=[2**70])).encode(), "64-bit"),
    (json.dumps({**decision("whose"), "tenant": "another"}).encode(), "'another'"),
    (json.dumps({"tenant": "another", **decision("whose-2")}).encode(), "'another'"),
    (b"[]", "object"),
    (b'{"type":"decision.recorded","id":"\xff"}', "Invalid JSON"),
    (b"[" * 3000 + b"]" * 3000, "Invalid JSON"),
]
CUT_OFF = json.dumps(decision("cut")).encode()[:-20]


def bad_file(tmp_path: Path) -> Path:
    """Good lines around all the bad ones; the last one is cut off."""
    file = tmp_path / "bad.jsonl"
    bad = b"\n".join(line for line, _ in BAD_LINES)
    other = as_lines(decision("g-2", reason="other content"))
    file.write_bytes(decisions(2, "g") + bad + b"\n" + other + CUT_OFF)
    return file


def test_append_checks_every_line_before_it_writes(valkey, tenant, tmp_path):
    """Bad lines are named with numbers and reasons, and of the good ones nothing is written."""
    done = run(valkey.url, "append", tenant, bad_file(tmp_path), "--json")
    assert (done.code, done.out) == (2, "")
    assert done.error["error"] == "InvalidInput"
    assert f"{len(BAD_LINES) + 2} lines cannot be recorded" in done.error["message"]
    assert "nothing was written" in done.error["message"]
    assert [line["line"] for line in done.error["lines"]] == list(range(3, 13))
    for line, (_, reason) in zip(done.error["lines"], BAD_LINES, strict=False):
        assert reason in line["message"]
    assert valkey.cli("EXISTS", keys.decisions(tenant)) == 0
    assert valkey.cli("SISMEMBER", keys.TENANTS, tenant) == 0


def test_keep_going_records_the_good_lines_and_writes_the_others_down(valkey, tenant, tmp_path):
    """--keep-going rejects each bad line with number, reason and text, and records the rest."""
    file, rejects = bad_file(tmp_path), tmp_path / "rejects.jsonl"
    done = run(valkey.url, "append", tenant, file, "--keep-going", "--rejects", rejects, "--json")
    assert done.code == 2
    assert done.lines[0]["count"] == 2
    assert done.lines[0]["rejected"] == len(BAD_LINES) + 2
    found = {line["line"]: line for line in map(json.loads, rejects.read_text().splitlines())}
    assert sorted(found) == list(range(3, len(BAD_LINES) + 5))
    for number, (text, reason) in enumerate(BAD_LINES, 3):
        assert reason in found[number]["error"], (number, reason)
        assert found[number]["input"][:50] == text.decode(errors="backslashreplace")[:50]
    conflict, cut = found[len(BAD_LINES) + 3], found[len(BAD_LINES) + 4]
    assert "g-2" in conflict["error"]
    assert "cut off" in cut["hint"]
    assert recorded(valkey, tenant) == 2


def test_no_line_can_make_a_bad_tenant(valkey):
    """What is no tenant name is refused before it reaches a key."""
    names = ["a:b", "*", "a{b}", "a\nb", "t" * 65, "", "stale", None, 7, "../x"]
    lines = as_lines(*({**decision("x"), "tenant": name} for name in names), decision("none"))
    done = run(valkey.url, "append", "--tenant-from-event", "--keep-going", "--json", stdin=lines)
    assert (done.code, done.out) == (2, "")
    assert "11 lines cannot be recorded" in done.error["message"]
    assert run(None, "append", "a:b", "-").code == 2


def test_two_lines_with_one_id_and_other_content_are_found_before_anything_is_written(
    valkey, tenant
):
    """A file that contradicts itself is refused with both line numbers; mere repetition is not."""
    repeated = decisions(2) + decisions(1)
    contradiction = repeated + decisions(1, reason="changed my mind")
    done = run(valkey.url, "append", tenant, stdin=contradiction)
    assert done.code == 2
    assert "error: stdin:4: id: d-1 is on line 1 too, with other content" in done.err
    assert valkey.cli("EXISTS", keys.decisions(tenant)) == 0
    assert run(valkey.url, "append", tenant, "--json", stdin=repeated).lines[0]["duplicates"] == 1


def test_a_conflict_stops_and_says_what_had_landed(valkey, tenant):
    """A recorded id with other content ends the append at its line, with exit code 4."""
    assert run(valkey.url, "append", tenant, stdin=decisions(1, "taken")).code == 0
    lines = decisions(299) + decisions(1, "taken", reason="other") + decisions(200, "later")
    done = run(valkey.url, "append", tenant, stdin=lines)
    assert (done.code, done.out) == (4, "")
    error, hint = done.err.splitlines()
    assert error.startswith(f"error: stdin:300: tenant {tenant}: id taken-1 is recorded as seq 1")
    landed = 299 // appending.GROUP_EVENTS * appending.GROUP_EVENTS
    told = f"stopped there: {landed} events had landed ({tenant} seq 2..{landed + 1})"
    assert error.endswith(told)
    assert hint.startswith(f"hint: `govledger show {tenant} taken-1`")
    assert recorded(valkey, tenant) == landed + 1
    kept = run(valkey.url, "append", tenant, "--keep-going", "--json", stdin=lines)
    assert (kept.code, kept.lines[0]["rejected"]) == (2, 1)
    assert recorded(valkey, tenant) == 1 + 499


@pytest.mark.parametrize("at", [0, 127, 200, 255, 256, 599])
def test_order_of_a_file_holds_where_a_line_is_refused(valkey, tenant, at):
    """Whatever group a conflict is in, nothing behind it lands; with --keep-going all the others
    do, in the order of the file.
    """
    taken = as_lines(decision(f"d-{at}", verdict="deny"))
    assert run(valkey.url, "append", tenant, "--json", stdin=taken).code == 0
    lines = as_lines(*(decision(f"d-{n}") for n in range(600)))
    done = run(valkey.url, "append", tenant, "--json", stdin=lines)
    assert done.code == 4
    landed = at // 128 * 128
    assert recorded(valkey, tenant) == 1 + landed
    assert f"stdin:{at + 1}: " in done.error["message"]
    done = run(valkey.url, "append", tenant, "--keep-going", "--json", stdin=lines)
    assert (done.code, done.lines[0]["rejected"]) == (2, 1)
    ids = [line["id"] for line in run(valkey.url, "replay", tenant, "--json").lines]
    assert ids == [f"d-{at}", *(f"d-{n}" for n in range(600) if n != at)]


def test_order_of_a_file_holds_where_the_end_of_a_refused_group_is_recorded(valkey, tenant):
    """A group that ends with a line that was there before is refused whole all the same."""
    taken = as_lines(decision("d-200", verdict="deny"))
    assert run(valkey.url, "append", tenant, "--json", stdin=taken).code == 0
    names = [f"d-{n}" for n in range(384)]
    names[255] = "d-3"
    lines = as_lines(*map(decision, names))
    assert run(valkey.url, "append", tenant, "--json", stdin=lines).code == 4
    assert recorded(valkey, tenant) == 1 + 128
    assert run(valkey.url, "append", tenant, "--keep-going", stdin=lines).code == 2
    ids = [line["id"] for line in run(valkey.url, "replay", tenant, "--json").lines]
    assert ids == ["d-200", *(name for n, name in enumerate(names) if n not in (200, 255))]


def test_expected_seq_is_for_one_batch(valkey, tenant):
    """--expected-seq appends all or nothing, and only at that head."""
    assert run(valkey.url, "append", tenant, "--expected-seq", 0, stdin=decisions(3)).code == 0
    wrong = run(valkey.url, "append", tenant, "--expected-seq", 2, stdin=decisions(2, "e"))
    assert wrong.code == 4
    assert f"expected seq 2, tenant {tenant} is at 3" in wrong.err
    many = run(valkey.url, "append", tenant, "--expected-seq", 3, stdin=decisions(1001, "e"))
    assert many.code == 2
    assert "1 to 1000 events; stdin has 1001" in many.err
    assert recorded(valkey, tenant) == 3


def test_rejects_never_overwrite_the_input(tmp_path):
    """--rejects that names the input is refused, and so is every other misuse of an option."""
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"x")
    done = run(None, "append", "t", file, "--keep-going", "--rejects", file)
    assert done.code == 2
    assert "overwrite" in done.err
    assert file.read_bytes() == b"x"


@pytest.mark.parametrize("as_pipe", [False, True])
async def test_what_is_too_large_to_keep_is_read_twice(
    valkey, tenant, tmp_path, monkeypatch, as_pipe
):
    """Beyond the limit, a file and a spooled pipe are read again, and nothing is lost."""
    monkeypatch.setattr(appending, "KEPT_BYTES", 1000)
    monkeypatch.setattr(jsonl, "KEPT_BYTES", 1000)
    file = tmp_path / "events.jsonl"
    if as_pipe:
        os.mkfifo(file)
    writer = threading.Thread(target=file.write_bytes, args=(decisions(700),))
    writer.start()
    if not as_pipe:
        writer.join()
    with closing(Source(str(file))) as source:
        async with Ledger.connect(valkey.url) as ledger:
            landed = await append_checked(ledger, source, tenant)
            ids = [entry.id async for entry in ledger.replay(tenant)]
    writer.join()
    assert landed[tenant].count == 700
    assert ids == [f"d-{n}" for n in range(1, 701)]


@pytest.mark.parametrize("kept_bytes", [1000, 10**8])
async def test_every_tenant_keeps_the_order_of_the_file(
    valkey, tenant, tmp_path, monkeypatch, kept_bytes
):
    """Thirty tenants' lines, mixed and in groups of every size, are recorded each in its order."""
    monkeypatch.setattr(appending, "KEPT_BYTES", kept_bytes)
    numbers = random.Random(7)
    whose = [f"{tenant}-{min(int(numbers.expovariate(0.15)), 29)}" for _ in range(4000)]
    lines = [{**decision(f"d-{n}"), "tenant": name} for n, name in enumerate(whose)]
    file = tmp_path / "events.jsonl"
    file.write_bytes(as_lines(*lines))
    async with Ledger.connect(valkey.url) as ledger:
        with closing(Source(str(file))) as source:
            landed = await append_checked(ledger, source, None)
        for name in set(whose):
            ids = [entry.id async for entry in ledger.replay(name)]
            assert ids == [line["id"] for line in lines if line["tenant"] == name]
            assert landed[name].count == len(ids)


def test_an_open_pipe_is_recorded_as_it_comes(valkey, tenant, spawn):
    """With --keep-going what a pipe has brought is recorded while the pipe stays open."""
    process = spawn(
        [*GOVLEDGER, "append", tenant, "--keep-going"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(valkey.url),
    )
    for n in (1, 2):
        process.stdin.write(as_lines(decision(f"live-{n}")))
        process.stdin.flush()
        wait_until(lambda n=n: recorded(valkey, tenant) == n, f"{n} recorded")
    process.stdin.close()
    assert process.wait(10) == 0
    assert b"2 events" in process.stdout.read()


# --- lines of input -------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_lines_do_not_depend_on_chunks(pieces, chunk_bytes):
    """However the bytes are cut into chunks, the lines and their numbers are the same."""
    text = b"\n".join(piece.replace(b"\xff", b"").replace(b"\xfe", b"") for piece in pieces)
    splitter = LineSplitter()
    found = [
        line
        for start in range(0, len(text), chunk_bytes)
        for line in splitter.feed(text[start : start + chunk_bytes])
    ]
    found += splitter.end()
    expected = enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    assert [(line.number, line.raw) for line in found] == [
        (number, raw) for number, raw in expected if raw.strip()
    ]


def test_a_line_of_any_length_is_held_in_little_memory():
    """An endless line is counted and not kept, and the lines behind it are whole."""
    splitter = LineSplitter()
    for _ in range(100):
        assert splitter.feed(b"x" * LINE_BYTES_LIMIT) == []
        assert len(splitter._rest) <= LINE_BYTES_LIMIT
    first, second = splitter.feed(b"\n{}\n")
    assert (first.size, first.number) == (100 * LINE_BYTES_LIMIT, 1)
    assert second == Line(2, b"{}", 2, ended=True)


@pytest.mark.parametrize("place", ["first", "last"])
def test_taking_the_tenant_out_changes_nothing_else(place):
    """Numbers at the edge of what JSON can hold are recorded as they stand beside a `tenant`."""
    fields = '"metadata":{"a":9007199254740993,"b":0.1,"c":1e-7,"d":18446744073709551615}'
    rest = json.dumps(decision("n"))[1:-1] + "," + fields
    both = f'"tenant":"t",{rest}' if place == "first" else f'{rest},"tenant":"t"'
    line = Line(1, f"{{{both}}}".encode(), 1, ended=True)
    bare = Line(1, f"{{{rest}}}".encode(), 1, ended=True)
    whose, event = event_of(line, None)
    assert whose == "t"
    assert encode(event) == encode(event_of(bare, "t")[1])


# --- replay, follow, show, tenants ----------------------------------------------------------------


def test_replay_json_has_the_stored_bytes(shipped):
    """A line of replay --json is the documented seven fields, the event as it is stored."""
    done = run(shipped.url, "replay", shipped.tenant, "--json")
    lines = done.out.splitlines()
    assert (done.code, len(lines)) == (0, 700)
    with shipped.server.client() as client:
        stored = client.execute_command("XRANGE", keys.decisions(shipped.tenant), "-", "+")
    for line, (entry_id, fields) in zip(lines, stored, strict=True):
        assert line.endswith(f',"event":{fields[b"data"].decode()}}}')
        shown = json.loads(line)
        assert list(shown) == ["tenant", "seq", "entry_id", "recorded_at", "type", "id", "event"]
        assert shown["entry_id"] == entry_id.decode()
        at_ms = int(shown["entry_id"].partition("-")[0])
        assert datetime.fromisoformat(shown["recorded_at"]).timestamp() * 1000 == at_ms


def test_replay_ranges(shipped):
    """--after, --until, --since, --to, --type and --limit each cut the replay as they say."""
    whole = run(shipped.url, "replay", shipped.tenant, "--json").lines
    cut = run(shipped.url, "replay", shipped.tenant, "--json", "--after", 10, "--until", 20)
    assert [line["seq"] for line in cut.lines] == list(range(11, 21))
    kind = ["--type", "outcome.reported", "--limit", "3"]
    typed = run(shipped.url, "replay", shipped.tenant, "--json", *kind)
    assert typed.lines == [line for line in whole if line["type"] == "outcome.reported"][:3]
    middle = whole[350]["recorded_at"]
    since = run(shipped.url, "replay", shipped.tenant, "--json", "--since", middle).lines
    to = run(shipped.url, "replay", shipped.tenant, "--json", "--to", middle).lines
    assert since == [line for line in whole if line["recorded_at"] >= middle]
    assert to == [line for line in whole if line["recorded_at"] <= middle]


def test_replay_takes_dates(shipped):
    """A date is its first moment for --since and its last one for --to, in UTC."""
    day = datetime.now(UTC).date()
    around = ["--since", day - timedelta(days=1), "--to", day + timedelta(days=1)]
    assert len(run(shipped.url, "replay", shipped.tenant, *around).out.splitlines()) == 700
    assert run(shipped.url, "replay", shipped.tenant, "--since", around[-1]).out == ""
    since = moment("2026-03-03", "--since", at_the_end_of_a_day=False)
    to = moment("2026-03-03", "--to", at_the_end_of_a_day=True)
    assert since == datetime(2026, 3, 3, tzinfo=UTC)
    assert to == datetime(2026, 3, 3, 23, 59, 59, 999_999, tzinfo=UTC)
    zoned = moment("2026-03-03T12:00:00+02:00", "--to", at_the_end_of_a_day=True)
    assert zoned == datetime(2026, 3, 3, 10, tzinfo=UTC)
    with pytest.raises(errors.InvalidInput, match="--since: 'yesterday' is no time"):
        moment("yesterday", "--since", at_the_end_of_a_day=False)


def test_a_reader_that_leaves_is_no_error(shipped):
    """`| head` ends the replay without a word on stderr."""
    pipeline = (
        f"{sys.executable} -m ledger replay {shipped.tenant} --json | head -n 1; echo $PIPESTATUS"
    )
    done = subprocess.run(
        ["bash", "-c", pipeline],
        env=environment(shipped.url),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    line, code = done.stdout.splitlines()
    assert json.loads(line)["seq"] == 1
    assert code == "141"
    assert done.stderr == ""


def test_replay_names_foreign_hands_and_goes_on(valkey, tenant):
    """An entry that somebody XADDed is a warning on stderr, is not printed, and is no failure."""
    assert run(valkey.url, "append", tenant, stdin=decisions(2)).code == 0
    foreign = valkey.cli("XADD", keys.decisions(tenant), "*", "type", "x")
    done = run(valkey.url, "replay", tenant, "--json")
    assert (done.code, len(done.lines)) == (0, 2)
    assert done.err.startswith("warning: ")
    assert foreign in done.err


async def test_follow_sees_an_append_as_it_happens(valkey, tenant, spawn):
    """`follow` prints an entry when it is recorded, and Ctrl-C ends it quietly with 130."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow", id="first"))
        process = spawn(
            [*GOVLEDGER, "follow", tenant, "--after", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(valkey.url),
        )
        assert json.loads(process.stdout.readline())["id"] == "first"
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="deny", id="second"))
        assert json.loads(process.stdout.readline())["id"] == "second"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert process.stderr.read() == b""


def test_show_by_id_and_by_seq(shipped):
    """`show` prints the same entry by its id and by its seq."""
    by_seq = run(shipped.url, "show", shipped.tenant, "--seq", 3, "--json").lines[0]
    by_id = run(shipped.url, "show", shipped.tenant, by_seq["id"], "--json").lines[0]
    assert by_seq == by_id
    people = run(shipped.url, "show", shipped.tenant, "--seq", 3).out
    assert by_seq["id"] in people
    assert run(None, "show", "t").code == 2


def test_tenants_lists_heads(shipped):
    """`tenants` lists every tenant with its head and when that was recorded."""
    listed = {line["tenant"]: line for line in run(shipped.url, "tenants", "--json").lines}
    for landed in shipped.done.lines:
        head = listed[landed["tenant"]]
        assert head["seq"] == 700
        age = datetime.now(UTC) - datetime.fromisoformat(head["last_recorded_at"])
        assert timedelta(0) < age < timedelta(hours=1)
    assert run(shipped.url, "tenants").out.splitlines()[0].split() == [
        *("tenant", "seq", "last", "recorded")
    ]


def test_counts_read_as_english():
    """One of a thing has no plural, and only a consonant before the `y` changes it."""
    nouns = ("entry", "key", "later one")
    assert [counted(1, noun) for noun in nouns] == ["1 entry", "1 key", "1 later one"]
    assert [counted(n, noun) for n, noun in enumerate(nouns, 2)] == [
        *("2 entries", "3 keys", "4 later ones")
    ]


def test_text_for_people_cannot_steer_their_terminal():
    """What anybody recorded is shown without control characters."""
    event = decision("x", action={"type": "\x1b]0;owned\x07\u202e\x9b31m"})
    line = entry_text(Entry.of("t", "1772539200123-7", event))
    assert line.isprintable()
    assert "owned" in line


def test_json_line_stays_one_line():
    """An event that was stored with newlines between its tokens is still one line of replay."""
    fields = [b"type", b"x", b"id", b"y", b"data", b'{\n"id":\r\n"y"}']
    line = entry_json(Entry("t", 7, b"1772539200123-7", fields))
    assert b"\n" not in line
    assert json.loads(line)["event"] == {"id": "y"}
    assert time_text(1772539200123) == "2026-03-03T12:00:00.123Z"


# --- state, project, rebuild, reindex -------------------------------------------------------------


def test_project_and_state(valkey, tenant):
    """`project --once` folds what is recorded, and state shows it with its position."""
    text = decisions(3) + as_lines(decision("denied", verdict="deny"))
    assert run(valkey.url, "append", tenant, stdin=text).code == 0
    before = run(valkey.url, "state", tenant)
    assert before.code == 1
    assert "govledger project --once" in before.err
    folded = {line["tenant"]: line for line in run(valkey.url, "project", "--once", "--json").lines}
    assert folded[tenant]["folded"] == 4
    shown = run(valkey.url, "state", tenant, "--json", "--wait-for", 4).lines[0]
    assert (shown["seq"], shown["head_seq"], shown["behind"]) == (4, 4, 0)
    assert shown["value"]["decisions"]["by_verdict"]["deny"] == 1
    people = run(valkey.url, "state", tenant).out
    assert "4: allow 3, deny 1" in people
    assert "25.0% (1 of 4)" in people
    late = run(valkey.url, "state", tenant, "--wait-for", 5, "--timeout", 0.1, "--json")
    assert (late.code, late.error["error"]) == (1, "NotCaughtUp")


def test_rebuild_folds_anew(valkey, tenant):
    """`rebuild` folds a tenant from its first entry and publishes the result."""
    assert run(valkey.url, "append", tenant, stdin=decisions(5)).code == 0
    done = run(valkey.url, "rebuild", tenant, "--json")
    names = ("governance", "agents")
    assert done.lines == [{"tenant": tenant, "projection": name, "folded": 5} for name in names]
    shown = run(valkey.url, "state", tenant, "--json").lines[0]
    assert (shown["seq"], shown["source"]) == (5, "published")


def test_reindex_lets_appends_in_again(valkey, tenant):
    """With the index gone append refuses and names reindex, which mends it."""
    assert run(valkey.url, "append", tenant, stdin=decisions(5)).code == 0
    valkey.cli("DEL", keys.index(tenant))
    refused = run(valkey.url, "append", tenant, stdin=decisions(6))
    assert refused.code == 4
    assert f"govledger reindex {tenant}" in refused.err
    assert run(valkey.url, "reindex", tenant, "--json").lines == [{"tenant": tenant, "indexed": 5}]
    done = run(valkey.url, "append", tenant, "--json", stdin=decisions(6))
    assert (done.lines[0]["count"], done.lines[0]["duplicates"]) == (6, 5)


# --- errors ---------------------------------------------------------------------------------------

TENANTS = "`govledger tenants` lists who is known"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("show", "{tenant}", "9999"), "is it a seq? --seq 9999, or `get_seq`"),
        (("show", "{tenant}", "--seq", "9999"), None),
        (("show", "nobody-at-all", "no-such-id"), TENANTS),
        (("replay", "nobody-at-all"), TENANTS),
        (("state", "nobody-at-all"), TENANTS),
        (("state", "{tenant}", "--projection", "nonsense"), "there is: governance, agents"),
        (("rebuild", "nobody-at-all"), TENANTS),
        (("reindex", "nobody-at-all"), TENANTS),
        (("projections", "nobody-at-all"), TENANTS),
        (("quarantine", "nobody-at-all"), TENANTS),
        (("activate", "nobody-at-all", "governance", "1"), TENANTS),
    ],
)
def test_a_negative_answer_exits_with_1(shipped, args, hint):
    """What is not there is one line of error, with the way on, and exit code 1."""
    done = run(shipped.url, *(arg.format(tenant=shipped.tenant) for arg in args), "--json")
    assert (done.code, done.out, done.error["error"]) == (1, "", "NotFound")
    assert done.error["hint"] == (hint and hint.format(tenant=shipped.tenant))


def test_a_missing_server_exits_with_3():
    """Nobody there: one readable line and a hint, or a JSON object, and exit code 3."""
    done = run(None, "tenants", **NOT_THERE)
    error, hint = done.err.splitlines()
    assert done.code == 3
    assert error.startswith("error: redis://127.0.0.1:1: cannot be reached")
    assert hint.startswith("hint: ")
    as_json = run(None, "append", "t", "--json", stdin=decisions(1), **NOT_THERE)
    assert (as_json.code, as_json.error["error"]) == (3, "ServerUnreachable")
    assert set(as_json.error) >= {"error", "message", "hint"}


def test_a_wrong_password_exits_with_3_and_is_not_printed(fresh_server, tenant):
    """WRONGPASS and NOAUTH exit with 3; no password shows, whichever way it came."""
    server = fresh_server(password="right-password")
    bare = f"redis://127.0.0.1:{server.port}"
    wrong = f"redis://:wrong%2Fsecret@127.0.0.1:{server.port}"
    for done in (
        run(bare, "tenants"),
        run(bare, "tenants", REDIS_PASSWORD="wrong/secret"),
        run(None, "tenants", "--url", wrong),
    ):
        assert done.code == 3
        assert "authentication failed" in done.err
        assert "secret" not in done.err
    assert run(bare, "tenants", REDIS_PASSWORD="right-password").code == 0
    broken = run(f"redis://:wrong#secret@127.0.0.1:{server.port}", "tenants")
    assert broken.code == 2
    assert "secret" not in broken.err


def test_an_unsafe_server_exits_with_4(fresh_server, tenant):
    """A server that may evict or lose what it acknowledges is refused by the setting's name."""
    server = fresh_server(config={"maxmemory-policy": "allkeys-lru"})
    done = run(server.url, "append", tenant, stdin=decisions(1))
    assert done.code == 4
    assert "maxmemory-policy is allkeys-lru" in done.err
    server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
    server.cli("CONFIG", "SET", "appendfsync", "everysec")
    asked = run(server.url, "append", tenant, "--durability", "fsynced", stdin=decisions(1))
    assert asked.code == 4
    assert "appendfsync is everysec" in asked.err
    assert server.cli("EXISTS", keys.decisions(tenant)) == 0
    plain = run(server.url, "append", tenant, "--json", stdin=decisions(1))
    assert (plain.code, plain.lines[0]["durability"]) == (0, "memory")
    server.cli("CONFIG", "SET", "maxmemory", "1mb")
    full = run(server.url, "append", tenant, "--json", stdin=decisions(2))
    assert (full.code, full.error["error"]) == (3, "OutOfMemory")


@pytest.mark.parametrize(
    "args",
    [
        ("append",),
        ("append", "t", "no-such-file.jsonl"),
        ("append", "t", "/"),
        ("append", "t", "--durability", "eternal"),
        ("replay", "t", "--after", "-1"),
        ("nonsense",),
    ],
)
def test_bad_usage_exits_with_2(args):
    """Wrong options and files are one line and a hint, and no server is asked."""
    done = run(None, *args, **NOT_THERE)
    error, hint = done.err.splitlines()
    assert (done.code, done.out) == (2, "")
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")


def test_every_error_has_an_exit_code():
    """Each class of the tree ends a command with the code that --help documents for its family."""
    codes = {
        kind.__name__: terminal.exit_code(kind("x"))
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LedgerError)
    }
    assert {name for name, code in codes.items() if code == 1} == {
        *("NotFound", "EntriesMissing", "NotCaughtUp", "JobFailed", "SnapshotFailed", "NotProved")
    }
    assert {name for name, code in codes.items() if code == 2} == {
        *("InvalidInput", "InvalidTenant", "InvalidEvent", "InvalidSetting")
    }
    unavailable = {kind.__name__ for kind in errors.Unavailable.__subclasses__()}
    assert {name for name, code in codes.items() if code == 3} == {
        *("Unavailable", "ServerError", *unavailable)
    }
    assert all(code in (1, 2, 3, 4) for code in codes.values())


# --- help -----------------------------------------------------------------------------------------


def examples(command: str) -> list[str]:
    """The example lines in a command's help."""
    found = CALLBACKS[command]
    return [line.strip() for line in found.epilog.splitlines() if "govledger " in line]


def test_help_lists_every_command_and_exit_code():
    """`govledger --help` shows each command in one whole line, and what the exit codes mean."""
    shown = subprocess.run(
        GOVLEDGER, env=environment(None), capture_output=True, text=True, check=True, timeout=60
    )
    for command in COMMANDS:
        (line,) = [line for line in shown.stdout.splitlines() if line.split()[:1] == [command]]
        assert line.endswith(".")
        assert "..." not in line
    assert "Exit codes:" in shown.stdout
    assert run(None, "--help").out == shown.stdout
    assert run(None, "--version").out == f"govledger {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_json_and_an_example(command):
    """Every command takes --json and shows how it is used."""
    found = CALLBACKS[command]
    assert "as_json" in found.callback.__annotations__
    assert examples(command)
    assert all(shlex.split(line)[:2] == ["govledger", command] for line in examples(command))


def test_examples_work(fresh_server, tenant, tmp_path):
    """The examples in the help do what they say, on a tenant with a few hundred events."""
    valkey = fresh_server()  # `project --once` fails where another test's tenant is damaged
    events = [decision(f"dec-{n:04}", tenant=tenant) for n in range(1, 301)]
    (tmp_path / "events.jsonl").write_bytes(as_lines(*events))
    # What starts servers, runs jobs or judges the whole server has tests of its own, on servers of
    # their own, and so has what needs a key; two forms of project have no end.
    alone = ("dev", "backup", "restore", "import-ledger", "schedule", "run", "doctor", "health")
    lines = [
        line
        for command in COMMANDS
        if command not in (*alone, *EVIDENCE)
        for line in examples(command)
        if line not in ("govledger project", "govledger project --workers 4")
    ]
    # What reads the state comes after what folds it.
    for line in sorted(lines, key=lambda line: line.startswith("govledger state")):
        words = shlex.split(line.replace("acgs-dev", tenant))[1:]
        stdin = (tmp_path / words.pop()).read_bytes() if "<" in words else b""
        output = words.pop() if ">" in words else None
        args = [word for word in words if word not in "<>"]
        done = run(valkey.url, *args, stdin=stdin, cwd=tmp_path)
        assert done.code == 0, (line, done.err)
        assert done.out, line
        assert output is None or len(done.lines) == 100


def test_event_types_are_known_to_the_command_line(shipped):
    """A --type that this release does not know is a warning, not an empty answer without a word."""
    done = run(shipped.url, "replay", shipped.tenant, "--type", "decision.recoded")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("warning: --type decision.recoded is none of ")
    assert all(kind in done.err for kind in event_types())


def test_state_of_the_past(valkey, tenant):
    """--as-of takes a seq, a time or a date, and says where it is from; no past is behind."""
    lines = as_lines(*(decision(f"d-{n}", tenant=tenant) for n in range(3)))
    assert run(valkey.url, "append", tenant, "-", stdin=lines).code == 0
    for point, total in (("2", 2), ("2199-01-01", 3), ("2199-01-01T00:00:00Z", 3)):
        done = run(valkey.url, "state", tenant, "--as-of", point, "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert (found["seq"], found["source"], found["behind"]) == (total, "folded", None)
        assert found["value"]["decisions"]["total"] == total
    people = run(valkey.url, "state", tenant, "--as-of", "2").out
    assert "@1, as of seq 2; the ledger is at seq 3\n" in people
    assert run(valkey.url, "state", tenant, "--as-of", "2001-01-01").code == 1
    assert run(valkey.url, "state", tenant, "--as-of", "yesterday").code == 2
    assert run(valkey.url, "state", tenant, "--as-of", "1", "--wait-for", "1").code == 2


def test_a_ledger_that_went_back_behind_a_duplicate_is_noticed():
    """A duplicate was acknowledged too: a new entry with an earlier seq says that it is gone."""

    def receipt(seq: int, *, duplicate: bool) -> Receipt:
        return Receipt("acme", "e1", 1, seq, duplicate, Durability.MEMORY)

    landed = appending.Landed("acme")
    landed.add([receipt(5, duplicate=False), receipt(900, duplicate=True)], landed.newest_seq)
    landed.add([receipt(901, duplicate=False)], landed.newest_seq)
    landed.add([receipt(1000, duplicate=True)], landed.newest_seq)
    with pytest.raises(errors.LedgerRolledBack, match="seq 1000 was acknowledged, and seq 950 is"):
        landed.add([receipt(950, duplicate=False)], landed.newest_seq)
