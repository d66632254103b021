"""What can be recorded, byte for byte, and what is refused before it reaches a server."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, ConfigDict, Field, create_model

import ledger
from ledger import Decision, Event, Feedback, Ledger, ModeChanged, errors, event_from_json, keys
from ledger.append import BATCH_EVENTS_LIMIT
from ledger.canonical import checked_from_json, checker, proven
from ledger.events import (
    EVENT_BYTES_LIMIT,
    ID_LENGTH_LIMIT,
    METADATA_BYTES_LIMIT,
    Moment,
    encode,
    event_types,
    parse_stored,
)
from tests.servers import new_tenant

FIXTURES = Path(__file__).parent / "fixtures" / "events-v1.jsonl"
AT = datetime(2026, 3, 3, 12, 0, 0, 250_000, UTC)
MINIMAL = {
    "type": "decision.recorded",
    "id": "d-1",
    "at": "2026-03-03T12:00:00.25Z",
    "agent": {"id": "agent-1"},
    "action": {"type": "payment.send"},
    "verdict": "allow",
}


def decision(**fields):
    """A decision with everything given that could differ between two runs."""
    given = {"id": "d-1", "at": AT, "agent": "agent-1", "action": "payment.send"}
    return Decision(**{**given, "verdict": "allow", **fields})


def line(**fields):
    """The JSON line of a decision with these fields; None leaves one out."""
    merged = {**MINIMAL, **fields}
    return orjson.dumps({name: value for name, value in merged.items() if value is not None})


def assert_readable(error):
    """The message is one line of printable UTF-8, not as long as what it complains about."""
    text = str(error)
    text.encode()
    assert text.isprintable(), ascii(text)
    assert len(text) < 1200


# -- the bytes ------------------------------------------------------------------------------------


def stored_lines():
    return FIXTURES.read_bytes().splitlines()


@pytest.mark.parametrize("stored", stored_lines(), ids=lambda raw: orjson.loads(raw)["id"])
def test_stored_v1_events_stay_readable_and_byte_identical(stored):
    """An event that version 1 stored is read as its model, and encodes to the same bytes again."""
    event = parse_stored(stored)
    assert isinstance(event, event_types()[orjson.loads(stored)["type"]])
    assert encode(event).data == stored


def test_stored_v1_events_cover_every_type():
    """The fixtures hold each type that can be recorded, once with all of its fields."""
    by_type = {}
    for raw in stored_lines():
        fields = orjson.loads(raw)
        by_type.setdefault(fields["type"], set()).update(fields)
    assert {kind: sorted(fields) for kind, fields in by_type.items()} == {
        name: sorted(model.model_fields) for name, model in event_types().items()
    }


def test_data_is_sorted_json_of_the_fields_that_were_set():
    """Defaults are not written, times are UTC, keys are sorted."""
    east = timezone(timedelta(hours=2))
    event = decision(rules="r-1", at=datetime(2026, 3, 3, 14, 0, tzinfo=east))
    assert encode(event).data == (
        b'{"action":{"type":"payment.send"},"agent":{"id":"agent-1"},"at":"2026-03-03T12:00:00Z",'
        b'"id":"d-1","rules":[{"id":"r-1"}],"type":"decision.recorded","verdict":"allow"}'
    )


def test_python_and_json_give_the_same_bytes():
    """An event built by the constructor and the same one as a JSON line in any order are one."""
    fields = {
        "policies": [{"id": "p", "version": "3"}],
        "rules": [{"id": "r", "effect": "warning"}],
        "metadata": {"z": 1, "a": {"y": None, "b": [1, 2.5, "é"]}},
        "risk_score": 1,
    }
    made = decision(policy="p@3", **{name: fields[name] for name in fields if name != "policies"})
    given = orjson.loads(line(**fields))
    for order in (sorted(given), sorted(given, reverse=True)):
        read = event_from_json(orjson.dumps({name: given[name] for name in order}))
        assert encode(read) == encode(made)


def test_shorthands():
    """A string stands for an agent, an action, a policy with its version, a rule."""
    event = decision(policies="a@b@1", rules=["r-1", {"id": "r-2"}])
    assert (event.agent.id, event.action.type) == ("agent-1", "payment.send")
    assert [(policy.id, policy.version) for policy in event.policies] == [("a@b", "1")]
    assert [rule.id for rule in event.rules] == ["r-1", "r-2"]
    assert encode(decision(policy="p@1")) == encode(decision(policies=["p@1"]))


def test_json_has_no_shorthands():
    """What is stored has one form only, so that every reader knows it."""
    for field, short in (("agent", "a"), ("action", "b"), ("policies", ["p@1"])):
        with pytest.raises(errors.InvalidEvent, match=field):
            event_from_json(line(**{field: short}))


def test_id_and_time_are_fixed_when_the_event_is_built():
    """Encoding twice gives the same bytes; two events built alike get ids of their own."""
    first = Decision(agent="a", action="b", verdict="deny")
    second = Decision(agent="a", action="b", verdict="deny")
    assert encode(first) == encode(first)
    assert first.id != second.id
    assert first.at.tzinfo is UTC


def test_json_without_a_time_stays_without():
    """A time made up while a line is read would differ at the next run: a conflict with itself."""
    event = event_from_json(line(at=None))
    assert event.at is None
    assert encode(event).at_ms is None
    assert encode(event) == encode(event_from_json(line(at=None)))


def test_json_needs_an_id():
    """A line without an id could not be sent twice safely."""
    with pytest.raises(errors.InvalidEvent, match="id: is required"):
        event_from_json(line(id=None))


# -- reading what another release wrote -----------------------------------------------------------


def test_unknown_fields_are_kept_on_read():
    """A newer writer's field is no obstacle to an older reader, and is not lost by it."""
    event = parse_stored(line(novelty={"a": [1]}))
    assert isinstance(event, Decision)
    assert event.model_extra == {"novelty": {"a": [1]}}


@pytest.mark.parametrize("fields", [{"verdict": "postpone"}, {"type": "decision.revised"}])
def test_what_no_model_fits_is_read_as_plain_json(fields):
    """A newer writer's value or type comes back as the object that it is."""
    assert parse_stored(line(**fields)) == {**MINIMAL, **fields}


def test_reading_makes_nothing_up():
    """A stored event without a time or an id is not given one."""
    timeless = parse_stored(line(at=None))
    assert isinstance(timeless, Decision)
    assert timeless.at is None
    assert parse_stored(line(id=None)) == {k: v for k, v in MINIMAL.items() if k != "id"}


NEXT_RELEASE = (
    (
        "    agent: AgentRef\n    action: Action\n    verdict: Verdict\n",
        (
            '    verdict: Verdict\n    novelty: str | None = "x"\n'
            "    action: Action\n    agent: AgentRef\n"
        ),
    ),
    ('] = "match"', '] = "violation"'),
    ('"advisory"] = "human"', '"advisory"] = "service"'),
    ("    maci_role: Name | None = None\n", '    maci_role: Name | None = "judicial"\n'),
)

ENCODE_PROGRAM = """
import sys
from ledger.events import encode, event_from_json
for line in sys.stdin.buffer:
    sys.stdout.buffer.write(encode(event_from_json(line)).data + b"\\n")
"""


@pytest.fixture(scope="module")
def next_release(tmp_path_factory):
    """A copy of the package with other defaults, another field order and one more field."""
    root = tmp_path_factory.mktemp("release")
    shutil.copytree(
        Path(ledger.__file__).parent,
        root / "ledger",
        ignore=shutil.ignore_patterns("__pycache__", "service", "data"),
    )
    models = root / "ledger" / "events.py"
    text = models.read_text()
    for old, new in NEXT_RELEASE:
        assert old in text
        text = text.replace(old, new)
    models.write_text(text)
    return root


def test_another_release_encodes_the_same_bytes(next_release):
    """Other defaults, another field order and a new optional field change no byte of an event."""
    lines = [*stored_lines(), line(rules=[{"id": "r"}]), line(at=None)]
    encoded = subprocess.run(
        [sys.executable, "-c", ENCODE_PROGRAM],
        input=b"\n".join(lines),
        cwd=next_release,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert encoded.stdout.splitlines() == [encode(event_from_json(raw)).data for raw in lines]


# -- limits and bad input -------------------------------------------------------------------------


def test_limits_are_inclusive():
    """An event of exactly 32 KiB, metadata of 8 KiB, an id of 128 characters are recorded."""
    room = EVENT_BYTES_LIMIT - len(encode(decision(reason="")).data)
    assert len(encode(decision(reason="x" * room)).data) == EVENT_BYTES_LIMIT
    with pytest.raises(errors.InvalidEvent) as refused:
        encode(decision(reason="x" * (room + 1)))
    for part in ("reason", str(EVENT_BYTES_LIMIT), str(EVENT_BYTES_LIMIT + 1)):
        assert part in refused.value.message

    filler = "x" * (METADATA_BYTES_LIMIT - len('{"k":""}'))
    assert encode(decision(metadata={"k": filler}))
    with pytest.raises(errors.InvalidEvent, match=f"metadata is {METADATA_BYTES_LIMIT + 1} bytes"):
        decision(metadata={"k": filler + "x"})

    assert decision(id="é" * ID_LENGTH_LIMIT).id
    with pytest.raises(errors.InvalidEvent, match=r"id: .* at most 128"):
        decision(id="x" * (ID_LENGTH_LIMIT + 1))


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


BAD_FIELDS = {
    "nan": {"risk_score": math.nan},
    "infinity": {"latency_ms": math.inf},
    "nan in features": {"features": {"a": math.nan}},
    "nan in metadata": {"metadata": {"a": [math.nan]}},
    "infinity in obligations": {"obligations": [{"a": -math.inf}]},
    "lone surrogate": {"reason": "\ud800"},
    "lone surrogate in an id": {"id": "\udfff"},
    "lone surrogate as a key": {"metadata": {"\ud800": 1}},
    "lone surrogate as a field": {"\ud800": 1},
    "1 MiB reason": {"reason": "x" * 2**20},
    "1 MiB key": {"k" * 2**20: 1},
    "field with a newline": {"a\n\x1b[31mb": 1},
    "unknown field": {"novelty": 1},
    "a thousand unknown fields": {f"k{number}": 1 for number in range(1000)},
    "unknown verdict": {"verdict": "maybe"},
    "id of 129": {"id": "x" * 129},
    "empty id": {"id": ""},
    "id with a newline": {"id": "a\n"},
    "id with NUL": {"id": "a\0b"},
    "time without a zone": {"at": datetime(2026, 3, 3)},  # noqa: DTZ001 - that is the point
    "time before year 1": {"at": "0001-01-01T00:00:00+14:00"},
    "time after year 9999": {"expires_at": "9999-12-31T23:59:59-12:00"},
    "time of no such day": {"at": "2026-02-30T00:00:00Z"},
    "integer of 5000 digits": {"risk_score": 10**5000},
    "integer of 65 bits": {"metadata": {"n": 2**64}},
    "integer of 65 bits in obligations": {"obligations": [-(2**63) - 1]},
    "nested too deeply": {"metadata": nested(100_000)},
    "bytes": {"metadata": {"a": b"\xff"}},
    "key that is no string": {"metadata": {1: 2}},
    "a policy without version": {"policy": "p"},
    "policy and policies": {"policy": "p@1", "policies": ["p@1"]},
    "too many tags": {"tags": ["t"] * 257},
    "risk above 1": {"risk_score": 1.01},
    "agent of the wrong kind": {"agent": 7},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
async def test_bad_fields_are_refused_and_nothing_is_written(valkey, tenant, fields):
    """Bad input is InvalidEvent with a readable message, at the latest when it is appended."""
    async with Ledger.connect(valkey.url) as book:
        with pytest.raises(errors.InvalidEvent) as refused:
            await book.append_many(tenant, [decision(), decision(**{"id": "d-2", **fields})])
    assert_readable(refused.value)
    assert nothing_of(valkey, tenant)


def nothing_of(server, tenant):
    made = (keys.decisions(tenant), keys.head(tenant), keys.index(tenant))
    return server.cli("EXISTS", *made) == 0


def test_cyclic_metadata_is_refused():
    """A structure that contains itself is no JSON."""
    cyclic = {}
    cyclic["self"] = cyclic
    with pytest.raises(errors.InvalidEvent) as refused:
        decision(metadata=cyclic)
    assert_readable(refused.value)


BAD_LINES = {
    "empty": b"",
    "no object": b"[]",
    "no type": b"{}",
    "unknown type": b'{"type":"decision.unmade","id":"a"}',
    "a type of 100 KB": b'{"type":"%b"}' % (b"x" * 100_000),
    "a type that is no string": b'{"type":5}',
    "NaN": line().replace(b'"allow"', b'"allow","risk_score":NaN'),
    "1e400": line().replace(b'"allow"', b'"allow","metadata":{"a":1e400}'),
    "an escaped lone surrogate": line(id="X").replace(b'"X"', rb'"\ud800"'),
    "no UTF-8": line(id="X").replace(b'"X"', b'"\xff"'),
    "two objects": line() + line(),
    "depth": b"[" * 100_000,
}


@pytest.mark.parametrize("raw", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_json_lines_are_refused(raw):
    """What is no JSON object of a known type is InvalidEvent, with a readable message."""
    with pytest.raises(errors.InvalidEvent) as refused:
        event_from_json(raw)
    assert_readable(refused.value)


def test_a_line_cut_off_anywhere_is_refused():
    """No prefix of a line is taken for an event."""
    whole = line(metadata={"a": [1, {"b": "c"}]})
    for end in range(len(whole)):
        with pytest.raises(errors.InvalidEvent):
            event_from_json(whole[:end])


BAD_TENANTS = ["a:b", "*", "{a}", "a\n", "", "x" * 65, "stale", "_", ".a", "é", "a b", "\ud800", 7]


@pytest.mark.parametrize("tenant", BAD_TENANTS, ids=ascii)
async def test_bad_tenants_are_refused_and_nothing_is_written(valkey, tenant):
    """A name that could reach another key or a glob is refused by every method, by itself."""
    async with Ledger.connect(valkey.url) as book:
        before = await book.tenants()
        for attempt in (
            book.append(tenant, decision()),
            book.head(tenant),
            book.get(tenant, "x"),
            book.get_seq(tenant, 1),
            book.reindex(tenant),
            anext(book.replay(tenant)),
            anext(book.follow(tenant)),
        ):
            with pytest.raises(errors.InvalidTenant) as refused:
                await attempt
            assert_readable(refused.value)
        assert await book.tenants() == before


@pytest.mark.parametrize("tenant", ["a", "Z9", "a.b_c-d", "x" * 64, "stale2"])
def test_good_tenants(tenant):
    """Letters, digits, dot, underscore and dash, up to 64 of them."""
    assert keys.checked_tenant(tenant) == tenant


@pytest.mark.parametrize("count", [0, BATCH_EVENTS_LIMIT + 1])
async def test_a_batch_has_one_to_a_thousand_events(valkey, tenant, count):
    """No event and 1,001 are refused with the limit, and nothing is written."""
    async with Ledger.connect(valkey.url) as book:
        with pytest.raises(errors.InvalidInput, match=f"1 to 1000 events, this one has {count}"):
            await book.append_many(tenant, [decision(id=f"d-{n}") for n in range(count)])
    assert nothing_of(valkey, tenant)


async def test_only_our_own_event_types_are_recorded(valkey, tenant):
    """Neither a bare Event, nor a class derived from one of ours, nor a dict is written."""

    class Extended(Decision):
        secret: str = "s"

    extended = Extended(agent="a", action="b", verdict="allow", secret="x")
    async with Ledger.connect(valkey.url) as book:
        for stranger in (Event(type="decision.recorded"), extended, MINIMAL, None):
            with pytest.raises(errors.InvalidEvent):
                await book.append(tenant, stranger)
    assert nothing_of(valkey, tenant)


def test_a_copy_is_checked_and_encoded_anew():
    """What pydantic changes unchecked in a copy is checked when it is encoded."""
    event = decision(metadata={"a": 1})
    assert encode(event.model_copy(update={"reason": "x"})) == encode(
        decision(metadata={"a": 1}, reason="x")
    )
    for bad in ({"verdict": "maybe"}, {"id": ""}, {"at": AT.replace(tzinfo=None)}):
        with pytest.raises(errors.InvalidEvent):
            encode(event.model_copy(update=bad))
    with pytest.raises(errors.InvalidEvent):
        encode(Decision.model_construct(id="d", type="decision.recorded", at=AT))
    with pytest.raises(errors.InvalidEvent, match="is no field"):
        encode(parse_stored(line(novelty=1)))


def test_what_is_changed_inside_an_event_later_is_not_recorded():
    """The bytes are fixed when it is built, though a dict in it can still be changed."""
    event = decision(metadata={"a": 1})
    before = encode(event)
    event.metadata["a"] = 2
    assert encode(event) == before


@pytest.mark.parametrize("ahead_s", [301, 10**9])
async def test_a_time_in_the_future_is_refused(server, tenant, ahead_s):
    """`at` more than five minutes ahead of the server's clock would empty every window."""
    late = datetime.now(UTC) + timedelta(seconds=ahead_s)
    async with Ledger.connect(server.url) as book:
        with pytest.raises(errors.ClockSkew, match="d-late") as refused:
            await book.append_many(tenant, [decision(), decision(id="d-late", at=late)])
        assert_readable(refused.value)
        assert nothing_of(server, tenant)
        soon = datetime.now(UTC) + timedelta(seconds=290)
        assert (await book.append(tenant, decision(at=soon))).seq == 1


@pytest.mark.parametrize("off_s", [-600, 600])
async def test_a_clock_ten_minutes_off_is_refused(server, tenant, monkeypatch, off_s):
    """An engine whose clock is wrong is told by how much, before anything is written."""
    real = ledger.append.time.time_ns
    async with Ledger.connect(server.url) as book:
        monkeypatch.setattr(ledger.append.time, "time_ns", lambda: real() + off_s * 10**9)
        with pytest.raises(errors.ClockSkew, match=re.escape(f"{off_s:+d} s")):
            await book.append(tenant, decision())
        assert nothing_of(server, tenant)
        monkeypatch.undo()
        assert (await book.append(tenant, decision())).seq == 1


# -- generated ------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=128)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
# Offsets are whole minutes, as RFC 3339 has them.
ZONES = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TIMES = (
    st.datetimes(timezones=ZONES)
    .filter(lambda moment: 1 < moment.year < 9999)
    .map(datetime.isoformat)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
DECISIONS = st.fixed_dictionaries(
    {
        "type": st.just("decision.recorded"),
        "id": IDS,
        "agent": st.fixed_dictionaries({"id": IDS}, optional={"maci_role": NAME}),
        "action": st.fixed_dictionaries({"type": NAME}, optional={"summary": TEXT}),
        "verdict": st.sampled_from(["allow", "deny", "escalate", "transform", "abstain", "error"]),
    },
    optional={
        "at": st.none() | TIMES,
        "metadata": st.dictionaries(TEXT, JSON, max_size=4),
        "obligations": st.lists(JSON, max_size=4),
        "features": st.dictionaries(TEXT, FLOATS, max_size=4),
        "risk_score": st.floats(0, 1),
        "rules": st.lists(st.fixed_dictionaries({"id": NAME}), max_size=3),
        "reason": st.none() | TEXT,
        "tags": st.lists(NAME, max_size=4),
    },
)


@given(DECISIONS)
def test_what_is_encoded_reads_back_as_the_same_event(fields):
    """Encode and read are inverse, and a second encoding changes nothing."""
    event = event_from_json(orjson.dumps(fields))
    encoded = encode(event)
    read = parse_stored(encoded.data)
    assert read == event
    assert encode(read) == encoded
    stored = orjson.loads(encoded.data)
    assert {**stored, "at": None} == {**orjson.loads(orjson.dumps(fields)), "at": None}


ANY_TEXT = st.text(st.characters(codec=None), max_size=30)
HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4400, max_value=10**4500)
    | st.floats()
    | ANY_TEXT
    | st.binary(max_size=10)
    | st.datetimes()
    | st.datetimes(timezones=st.timezones())
    | st.dates()
    | st.just("x" * 40_000),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.sets(st.integers(), max_size=3)
        | st.dictionaries(ANY_TEXT | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
EVERY_TYPE = sorted(event_types().values(), key=lambda model: model.__name__)
FIELD_NAMES = sorted({name for model in EVERY_TYPE for name in model.model_fields})


def judged(build):
    """The encoded event, or None where it was refused as it should be."""
    try:
        encoded = encode(build())
    except errors.InvalidEvent as error:
        assert_readable(error)
        return None
    assert len(encoded.data) <= EVENT_BYTES_LIMIT
    assert parse_stored(encoded.data).id == encoded.id
    return encoded


@given(
    st.sampled_from(EVERY_TYPE),
    st.dictionaries(st.sampled_from(FIELD_NAMES) | ANY_TEXT, HOSTILE, max_size=6),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_fields_are_an_event_or_a_refusal(model, fields):
    """Whatever a constructor is given: an event within its limits, or InvalidEvent, no other."""
    judged(lambda: model(**fields))


@given(st.dictionaries(st.sampled_from(sorted(MINIMAL)) | ANY_TEXT, HOSTILE, max_size=4))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_decisions_are_an_event_or_a_refusal(fields):
    """A good decision with a few fields replaced by anything is recorded whole or refused."""
    judged(lambda: Decision(**{**MINIMAL, **fields}))


JSON_TEXT = st.dictionaries(st.sampled_from(FIELD_NAMES) | TEXT, JSON, max_size=6).map(orjson.dumps)


@given(st.binary(max_size=200) | ANY_TEXT | JSON_TEXT)
def test_hostile_lines_are_an_event_or_a_refusal(raw):
    """Any bytes or text in place of a JSON line: InvalidEvent, never another error."""
    judged(lambda: event_from_json(raw))


@given(st.data())
def test_a_damaged_line_is_an_event_or_a_refusal(data):
    """A line with a few bytes changed is never half an event."""
    raw = bytearray(line(metadata={"a": 1}, policies=[{"id": "p", "version": "1"}]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    judged(lambda: event_from_json(bytes(raw)))


@given(ANY_TEXT)
def test_any_tenant_name_is_good_or_refused(name):
    """A name is accepted only if it cannot leave its place in a key."""
    try:
        keys.checked_tenant(name)
    except errors.InvalidTenant as error:
        assert_readable(error)
    else:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)


@given(st.lists(DECISIONS, min_size=1, max_size=5, unique_by=lambda fields: fields["id"]))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_stream_gives_back_the_bytes_that_were_sent(valkey, batch):
    """What `replay` yields is `data` as encoded, whatever it holds."""
    events = [event_from_json(orjson.dumps({**fields, "at": None})) for fields in batch]
    tenant = new_tenant()
    with ledger.sync.Ledger.connect(valkey.url) as book:
        book.append_many(tenant, events)
        found = [(entry.type, entry.id, entry.data) for entry in book.replay(tenant)]
        sent = [encode(event) for event in events]
        assert found == [(one.type, one.id, one.data) for one in sent]


def test_an_encoded_event_takes_little_more_memory_than_its_bytes():
    """What is kept until it is sent holds no encoder's buffer, whichever way it was encoded."""
    for read in (lambda raw: encode(event_from_json(raw)), checked_from_json):
        tracemalloc.start()
        kept = [read(line()) for _ in range(100)]
        taken_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken_bytes < 100 * (len(kept[0].data) + 1500)


# -- from JSON without a model --------------------------------------------------------------------


def outcome(read, raw):
    """The encoded event that a line is, or the text of its refusal."""
    try:
        return encode(read(raw))
    except errors.InvalidEvent as error:
        return error.message


def proven_as_sent(raw):
    """What is sent of a line that is proven; None for any other."""
    event = proven(raw)
    return event and encode(event)


def assert_same_without_a_model(raw):
    """Both ways come to the same bytes or the same refusal, and nothing is taken unproven."""
    expected = outcome(event_from_json, raw)
    assert proven_as_sent(raw) in (None, expected)
    assert outcome(checked_from_json, raw) == expected


SHIPPED = Path(ledger.__file__).parent / "data" / "agentdojo-decisions.jsonl"


def test_every_shipped_and_stored_event_is_proven_without_a_model():
    """Each type with each of its fields goes the quick way, to the same bytes."""
    shipped = [orjson.loads(raw) for raw in SHIPPED.read_bytes().splitlines()]
    for event in shipped:
        del event["tenant"]
    for raw in [*stored_lines(), *map(orjson.dumps, shipped)]:
        assert proven_as_sent(raw) == outcome(event_from_json, raw)


ORDINARY = {
    "escapes": rb'"reason":"\u00e9 \" \\ \n \ud83d\ude00"',
    "a time with microseconds": b'"at":"2026-03-03T12:00:00.123456Z"',
    "a time with milliseconds and an offset": b'"at":"2026-03-03T14:00:00.250+02:00"',
    "a whole number for a float": b'"risk_score":1,"features":{"b":1,"a":-0}',
    "a null": b'"reason":null,"policies":null',
    "metadata": b'"metadata":{"b":[1e22,-0.0,18446744073709551615],"a":{"z":null,"y":true}}',
    "a key twice": b'"verdict":"deny","reason":"a","reason":"b"',
    "characters of every width": '"reason":"aé\u2028😀"'.encode(),
}


@pytest.mark.parametrize("fields", ORDINARY.values(), ids=ORDINARY)
def test_what_engines_write_is_proven_without_a_model(fields):
    """What is common in engines' logs goes the quick way, to the same bytes."""
    raw = line()[:-1] + b"," + fields + b"}"
    assert proven_as_sent(raw) == outcome(event_from_json, raw)


UNUSUAL = {
    "a string for a number": b'"risk_score":"0.5"',
    "a time in seconds": b'"at":1772539200',
    "a time with a space": b'"at":"2026-03-03 12:00:00Z"',
    "a time in lower case": b'"at":"2026-03-03t12:00:00z"',
    "a time of ten digits": b'"at":"2026-03-03T12:00:00.1234567894Z"',
    "a time without seconds": b'"at":"2026-03-03T12:00Z"',
    "a week date": b'"at":"2026-W10-2T12:00:00Z"',
    "midnight as 24": b'"at":"2026-03-03T24:00:00Z"',
    "an offset of minutes only": b'"at":"2026-03-03T12:00:00+00:99"',
    "an offset of a day": b'"at":"2026-03-03T12:00:00+24:00"',
    "year 0": b'"at":"0000-03-03T12:00:00Z"',
    "before year 1": b'"at":"0001-01-01T00:00:00+14:00"',
    "an integer of 65 bits": b'"metadata":{"n":18446744073709551616}',
    "an integer of 65 bits for a float": b'"latency_ms":36893488147419103232',
    "metadata over its limit": b'"metadata":{"n":"%b"}' % (b"x" * METADATA_BYTES_LIMIT),
    "an event over its limit": b'"reason":"%b"' % (b"x" * EVENT_BYTES_LIMIT),
    "an id with a newline at its end": rb'"id":"a\n"',
    "an id with DEL": b'"id":"a\x7f"',
    "an id with an escaped control character": rb'"id":"a\u001f"',
    "an id of 129": b'"id":"%b"' % (b"x" * 129),
    "an agent with DEL": b'"agent":{"id":"\x7f"}',
    "a type twice": b'"type":"outcome.reported"',
    "true for 1": b'"required_approvals":true',
    "a whole float for an integer": b'"required_approvals":1.0',
    "a tenant": b'"tenant":"t"',
}


@pytest.mark.parametrize("fields", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_as_the_models_say(fields):
    """Lax, odd and bad values end the same whether a model was asked first or last."""
    assert_same_without_a_model(line()[:-1] + b"," + fields + b"}")


@pytest.mark.parametrize("depth", [1, 90, 101, 190, 199, 200, 210, 254, 260, 5000])
def test_nesting_is_as_the_models_say(depth):
    """Metadata as deep as the models' parser goes is taken, deeper is refused, either way."""
    metadata = b'{"a":' * depth + b"1" + b"}" * depth
    assert_same_without_a_model(line()[:-1] + b',"metadata":' + metadata + b"}")


@pytest.mark.parametrize("raw", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_refused_without_a_model_too(raw):
    """Nothing that is refused is proven."""
    assert proven(raw) is None
    assert_same_without_a_model(raw)


NUMBERS = (
    st.integers().map(str)
    | FLOATS.map(repr)
    | st.from_regex(r"-?[0-9]{1,25}(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
)
MOMENTS = st.from_regex(
    r"(20[0-9]{2}|[0-9]{4})-[01][0-9]-[0-3][0-9][Tt ]([01][0-9]|2[0-4]):[0-6][0-9]:[0-6][0-9]"
    r"(\.[0-9]{1,10})?(Z|z|[+-][0-2][0-9]:[0-6][0-9])",
    fullmatch=True,
).map(lambda text: f'"{text}"')
JSON_VALUES = (
    NUMBERS
    | MOMENTS
    | (JSON | st.text(max_size=600)).map(lambda value: json.dumps(value, ensure_ascii=False))
    | st.sampled_from(['"1"', '"true"', '"yes"', '"allow"', "true", "null", "NaN", "[]", "{}"])
)


@given(st.sampled_from(stored_lines()), st.data())
@settings(max_examples=300)
def test_any_value_anywhere_is_as_the_models_say(stored, data):
    """A line with some of its values replaced, at any depth, ends the same either way."""
    values = list(re.finditer(rb'(?<=:)("[^"]*"|-?[0-9.]+|true|false|null)', stored))
    raw = stored
    for at in sorted(
        data.draw(st.sets(st.sampled_from(values), min_size=1, max_size=3)),
        key=lambda m: -m.start(),
    ):
        raw = raw[: at.start()] + data.draw(JSON_VALUES).encode(errors="replace") + raw[at.end() :]
    assert_same_without_a_model(raw)


@given(DECISIONS, st.booleans())
def test_generated_decisions_are_the_same_without_a_model(fields, ascii_only):
    """Whatever a decision holds, its bytes are the same either way."""
    raw = json.dumps(fields, ensure_ascii=ascii_only).encode()
    assert_same_without_a_model(raw)


@given(st.sampled_from(stored_lines()), st.data())
def test_a_damaged_line_is_as_the_models_say(stored, data):
    """A line with a few bytes changed ends the same either way."""
    raw = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert_same_without_a_model(bytes(raw))


@given(JSON_TEXT | st.binary(max_size=200))
def test_hostile_lines_are_as_the_models_say(raw):
    """Bytes of any kind end the same either way."""
    assert_same_without_a_model(raw)


RULES = {
    "above": Annotated[int, Field(gt=3)],
    "multiples": Annotated[int, Field(multiple_of=2)],
    "strict": Annotated[int, Field(strict=True)],
    "another pattern": Annotated[str, Field(pattern="^x")],
    "a validator of its own": Annotated[int, AfterValidator(abs)],
    "a shortest list": Annotated[tuple[int, ...], Field(min_length=1)],
    "a pair": tuple[int, int],
    "any time": datetime,
    "a time in a list": tuple[Moment, ...],
    "either": int | str,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_that_is_not_known_is_left_to_the_models(rule):
    """A field whose rule has no twin is never proven, and the rest of the event still is."""
    fields = {"type": (Literal["t"], "t"), "id": (str, ""), "other": (str, ""), "new": (rule, None)}
    config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model = create_model("Newer", __config__=config, **fields)
    decode, _ = checker([model], controls=False)
    assert decode(b'{"type":"t","id":"a","other":"b"}')
    for value in (b"1", b"4", b'"x"', b"[1]", b"[1,2]", b'"2026-03-03T12:00:00Z"'):
        with pytest.raises(msgspec.ValidationError):
            decode(b'{"type":"t","id":"a","new":%b}' % value)


@pytest.mark.parametrize(
    "config", [{"str_strip_whitespace": True}, {"extra": "allow"}, {"strict": True}], ids=str
)
def test_a_model_of_another_kind_is_left_to_the_models(config):
    """A model with settings of its own is never proven."""
    fields = {"type": (Literal["t"], "t"), "id": (str, "")}
    settings_ = {"frozen": True, "extra": "forbid", "allow_inf_nan": False, **config}
    model = create_model("Newer", __config__=ConfigDict(**settings_), **fields)
    decode, _ = checker([model], controls=False)
    with pytest.raises(msgspec.ValidationError):
        decode(b'{"type":"t","id":"a"}')


def test_event_classes_say_what_they_are():
    """Each `type` names one model, and the examples here are of it."""
    assert event_types()["feedback.recorded"] is Feedback
    assert event_types()["mode.changed"] is ModeChanged
    assert len(event_types()) == 15
