"""The append contract, on every server kind: one call, all or nothing, once, in order."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from msgspec import structs

import ledger
from ledger import (
    Decision,
    Durability,
    Feedback,
    Ledger,
    Link,
    Settings,
    errors,
    events,
    keys,
    sync,
)
from ledger.append import GATHER_EVENTS
from ledger.server import LIBRARY_VERSION, Server, library_source
from tests.proxy import Proxy
from tests.servers import KINDS, new_tenant, wait_until

AT = datetime(2026, 3, 3, 12, tzinfo=UTC)
FCALL = b"govledger_append"


def decision(event_id, **fields):
    """A decision whose bytes depend on nothing but the arguments."""
    given = {"agent": "agent-1", "action": "act", "verdict": "allow", "at": AT}
    return Decision(id=event_id, **{**given, **fields})


@pytest.fixture
async def book(server):
    async with Ledger.connect(server.url) as opened:
        yield opened


async def recorded(book, tenant):
    """(seq, id, verdict) of every entry, in order."""
    if not (await book.head(tenant)).seq:
        return []
    return [(e.seq, e.id, e.event["verdict"]) async for e in book.replay(tenant)]


def eviction(policy):
    return {"maxmemory": "100mb", "maxmemory-policy": policy}


# -- one round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 1000])
async def test_an_append_is_one_round_trip(server, tenant, count):
    """A known tenant's append is one function call and waits for nothing else."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        await book.append(tenant, decision("first"))
        await book._appender._feed.aclose()
        proxy.requests.clear()
        receipts = await book.append_many(tenant, [decision(f"d-{n}") for n in range(count)])
        assert [receipt.seq for receipt in receipts] == list(range(2, count + 2))
        assert len(proxy.requests) == len(proxy.requests_with(FCALL)) == 1


async def test_looking_at_the_settings_costs_no_round_trip(server, tenant, monkeypatch):
    """What the receipt says of durability is read behind the function call, in the same trip."""
    monkeypatch.setattr("ledger.server.SETTINGS_AGE_LIMIT_S", 0)
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        await book.append(tenant, decision("first"))
        await book._appender._feed.aclose()
        proxy.requests.clear()
        receipt = await book.append(tenant, decision("second"))
        assert receipt.durability is Durability.FSYNCED
        assert len(proxy.requests) == 1
        assert all(part in proxy.requests[0] for part in (FCALL, b"CONFIG", b"INFO"))


async def test_calls_in_flight_ride_in_one_function_call(server, tenant):
    """64 concurrent appends to a tenant are at most two calls, each with a receipt of its own."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        await book.append(tenant, decision("first"))
        proxy.requests.clear()
        receipts = await asyncio.gather(
            *(book.append(tenant, decision(f"d-{n}")) for n in range(64))
        )
        assert sorted(receipt.seq for receipt in receipts) == list(range(2, 66))
        assert len(proxy.requests_with(FCALL)) <= 2


async def test_a_call_carries_about_two_hundred_events_of_many_callers(server, tenant):
    """More callers than one call should carry are told apart into several, without loss."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        receipts = await asyncio.gather(
            *(book.append(tenant, decision(f"d-{n}")) for n in range(3 * GATHER_EVENTS))
        )
        assert sorted(receipt.seq for receipt in receipts) == list(range(1, 3 * GATHER_EVENTS + 1))
        calls = b"".join(proxy.requests).split(FCALL)
        digests = [call.count(b"\r\n$32\r\n") for call in calls]  # one an event
        assert sum(digests) >= 3 * GATHER_EVENTS
        assert max(digests) <= GATHER_EVENTS


@pytest.mark.parametrize("lost", ["1-0", "2-0", "9-19"])
async def test_what_is_put_first_is_recorded_first_whatever_breaks(server, tenant, lost):
    """Batches that are started in order land in order, though a connection breaks among them."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        await book.append(tenant, decision("first"))
        proxy.lose_reply_to = f'"{lost}"'.encode()
        batches = [[decision(f"{n}-{m}") for m in range(20)] for n in range(10)]
        got = await asyncio.gather(*(book.append_many(tenant, batch) for batch in batches))
        assert proxy.lose_reply_to is None
        seqs = [receipt.seq for receipts in got for receipt in receipts]
        assert seqs == list(range(2, 202))


# -- order, density, time -------------------------------------------------------------------------


async def test_seq_is_dense_and_time_never_goes_back(book, tenant):
    """Receipts, stream ids and head agree: seq 1..n, the server's clock, one epoch."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    receipts = [await book.append(tenant, decision(f"d-{n}")) for n in range(20)]
    receipts += await book.append_many(tenant, [decision(f"e-{n}") for n in range(20)])
    assert [receipt.seq for receipt in receipts] == list(range(1, 41))
    assert [receipt.entry_id.partition("-")[2] for receipt in receipts] == [
        str(n) for n in range(1, 41)
    ]
    times = [receipt.recorded_at for receipt in receipts]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= datetime.now(UTC)
    assert len({receipt.epoch for receipt in receipts}) == 1
    head = await book.head(tenant)
    assert (head.seq, head.entry_id, head.epoch) == (40, receipts[-1].entry_id, receipts[0].epoch)
    assert [entry.entry_id async for entry in book.replay(tenant)] == [r.entry_id for r in receipts]


async def test_the_tenant_is_registered_before_its_first_append(book, tenant):
    """Who has an entry is in the registry, and who was only asked about is not."""
    await book.head(tenant)
    assert tenant not in await book.tenants()
    await book.append(tenant, decision("d"))
    assert tenant in await book.tenants()


# -- batches --------------------------------------------------------------------------------------


async def test_a_batch_of_a_thousand_is_atomic(book, tenant):
    """1,000 events land together; 1,000 with one conflict at the end leave nothing."""
    receipts = await book.append_many(tenant, [decision(f"d-{n}") for n in range(1000)])
    assert [receipt.seq for receipt in receipts] == list(range(1, 1001))
    batch = [decision(f"e-{n}") for n in range(999)] + [decision("d-7", verdict="deny")]
    with pytest.raises(errors.ConflictingEvent) as refused:
        await book.append_many(tenant, batch)
    assert (refused.value.facts["index"], refused.value.facts["seq"]) == (999, 8)
    assert (await book.head(tenant)).seq == 1000
    assert len(await recorded(book, tenant)) == 1000
    # The refused batch left no trace in the index either.
    assert (await book.append(tenant, decision("e-0", verdict="error"))).seq == 1001


async def test_events_of_32_kib_fill_a_batch(book, tenant):
    """A batch may be larger than what callers' work is gathered to."""
    batch = [decision(f"d-{n}", reason="x" * 30_000) for n in range(100)]
    assert [receipt.seq for receipt in await book.append_many(tenant, batch)] == [*range(1, 101)]


# -- idempotency ----------------------------------------------------------------------------------


async def test_the_same_event_again_returns_the_first_receipt(book, tenant):
    """Across calls, and within a batch: recorded once, `duplicate` says so."""
    first = await book.append(tenant, decision("a"))
    again = await book.append(tenant, decision("a"))
    assert again == structs.replace(first, duplicate=True)
    receipts = await book.append_many(
        tenant, [decision("b"), decision("a"), decision("b"), decision("c")]
    )
    assert [(r.seq, r.duplicate) for r in receipts] == [
        (2, False),
        (1, True),
        (2, True),
        (3, False),
    ]
    assert await recorded(book, tenant) == [(1, "a", "allow"), (2, "b", "allow"), (3, "c", "allow")]


async def test_the_same_id_with_other_content_is_a_conflict(book, tenant):
    """The error names both contents and where the first one is; nothing is written."""
    first = await book.append(tenant, decision("a"))
    with pytest.raises(errors.ConflictingEvent) as refused:
        await book.append(tenant, decision("a", verdict="deny"))
    facts = refused.value.facts
    assert (facts["seq"], facts["entry_id"], facts["id"]) == (1, first.entry_id, "a")
    assert facts["recorded_sha256"] != facts["offered_sha256"]
    assert str(facts["recorded_sha256"])[:16] in refused.value.message
    assert await recorded(book, tenant) == [(1, "a", "allow")]


async def test_ids_are_one_namespace_across_types(book, tenant):
    """A feedback cannot take the id of a decision."""
    await book.append(tenant, decision("a"))
    feedback = Feedback(id="a", at=AT, decision_id="a", reviewer="r", feedback="positive")
    with pytest.raises(errors.ConflictingEvent):
        await book.append(tenant, feedback)
    assert (await book.head(tenant)).seq == 1


async def test_a_batch_that_contradicts_itself_is_refused(book, tenant):
    """One id with two contents in a batch: nothing was recorded, and the message says which."""
    with pytest.raises(errors.ConflictingEvent, match="id a is twice in this batch") as refused:
        await book.append_many(tenant, [decision("a"), decision("a", verdict="deny")])
    assert refused.value.facts["index"] == 1
    assert (await book.head(tenant)).seq == 0


async def test_tenants_do_not_share_ids(book, tenant):
    """The same id in two tenants is two events."""
    other = new_tenant()
    receipts = await asyncio.gather(*(book.append(t, decision("a")) for t in (tenant, other)))
    assert [(r.tenant, r.seq, r.duplicate) for r in receipts] == [
        (tenant, 1, False),
        (other, 1, False),
    ]


# -- expected sequence ----------------------------------------------------------------------------


async def test_expected_seq_is_the_head_or_a_refusal(book, tenant):
    """0 means new; a wrong number is refused with both, and nothing is written."""
    assert (await book.append(tenant, decision("a"), expected_seq=0)).seq == 1
    for wrong in (0, 2, 10**15):
        with pytest.raises(errors.WrongExpectedSeq) as refused:
            await book.append(tenant, decision("b"), expected_seq=wrong)
        assert (refused.value.facts["expected"], refused.value.facts["actual"]) == (wrong, 1)
        assert f"expected seq {wrong}, tenant {tenant} is at 1" in refused.value.message
    assert (await book.append(tenant, decision("b"), expected_seq=1)).seq == 2
    for wrong in (-1, 2**53):
        with pytest.raises(errors.InvalidInput):
            await book.append(tenant, decision("c"), expected_seq=wrong)


async def test_a_batch_comes_right_behind_another_or_not_at_all(book, tenant):
    """It lands where that one was the last that was accepted; nothing of a refused one counts."""
    first, bad = [decision("a"), decision("b")], [decision("a", verdict="deny"), decision("b")]
    sent = [
        (first, Link("n1")),
        ([decision("c")], Link("n2", "n1")),
        (bad, Link("n3", "n2")),  # refused, though its last event is recorded
        ([decision("d")], Link("n4", "n3")),
        (first, Link("n5", "n2")),  # accepted: it is recorded already
        ([decision("e")], Link("n6", "n5")),
    ]
    results = await asyncio.gather(
        *(book.append_many(tenant, batch, link=link) for batch, link in sent),
        return_exceptions=True,
    )
    refusals = [type(one) if isinstance(one, Exception) else None for one in results]
    refused = [None, None, errors.ConflictingEvent, errors.PredecessorMissing, None, None]
    assert refusals == refused
    assert [event_id for _, event_id, *_ in await recorded(book, tenant)] == ["a", "b", "c", "e"]
    await book.append_many(tenant, [decision("f")], link=Link("other"))
    with pytest.raises(errors.PredecessorMissing, match="another named one came between"):
        await book.append_many(tenant, [decision("d")], link=Link("n7", "n6"))
    for wrong in (Link(""), Link("a b"), Link("é"), Link("ok", "no-"), Link("x" * 65)):
        with pytest.raises(errors.InvalidInput, match="link"):
            await book.append_many(tenant, [decision("g")], link=wrong)


async def test_duplicates_are_found_before_the_expected_seq(book, tenant):
    """A retry with the old expectation returns the first receipts, never fails against itself."""
    batch = [decision("a"), decision("b")]
    first = await book.append_many(tenant, batch, expected_seq=0)
    await book.append(tenant, decision("c"))
    again = await book.append_many(tenant, batch, expected_seq=0)
    assert again == [structs.replace(receipt, duplicate=True) for receipt in first]


async def test_a_partial_duplicate_appends_the_rest(book, tenant):
    """What is new of a batch is expected to follow the head; with another number nothing lands."""
    await book.append(tenant, decision("a"))
    batch = [decision("a"), decision("b"), decision("c")]
    with pytest.raises(errors.WrongExpectedSeq):
        await book.append_many(tenant, batch, expected_seq=0)
    assert (await book.head(tenant)).seq == 1
    receipts = await book.append_many(tenant, batch, expected_seq=1)
    assert [(r.seq, r.duplicate) for r in receipts] == [(1, True), (2, False), (3, False)]


# -- groups ---------------------------------------------------------------------------------------


async def test_each_caller_gets_his_own_error(server, tenant):
    """Calls that ride together fail alone: conflicts, expectations and times of one are his."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        await book.append(tenant, decision("a"))
        proxy.requests.clear()
        far = datetime.now(UTC) + timedelta(hours=1)
        got = await asyncio.gather(
            book.append(tenant, decision("b")),
            book.append(tenant, decision("a", verdict="deny")),
            book.append(tenant, decision("c"), expected_seq=1),
            book.append(tenant, decision("d"), expected_seq=2),
            book.append(tenant, decision("e", at=far)),
            book.append_many(tenant, [decision("f"), decision("b", verdict="deny")]),
            book.append(tenant, decision("a")),
            book.append_many(tenant, [decision("f"), decision("b")]),
            book.append(tenant, decision("g")),
            return_exceptions=True,
        )
        # The first leaves at once, since nobody else was there yet; all others share one call.
        assert len(proxy.requests_with(FCALL)) == 2
    kinds = [type(one) for one in got]
    assert kinds == [
        ledger.Receipt,
        errors.ConflictingEvent,
        errors.WrongExpectedSeq,
        ledger.Receipt,
        errors.ClockSkew,
        errors.ConflictingEvent,
        ledger.Receipt,
        list,
        ledger.Receipt,
    ]
    assert (got[0].seq, got[3].seq, got[6].duplicate, got[8].seq) == (2, 3, True, 5)
    assert [(r.seq, r.duplicate) for r in got[7]] == [(4, False), (2, True)]
    assert got[2].facts["actual"] == 2


async def test_a_refused_group_frees_its_ids(book, tenant):
    """What a refused batch would have written, the next caller in the same call may write."""
    got = await asyncio.gather(
        book.append_many(tenant, [decision("a"), decision("b")], expected_seq=9),
        book.append(tenant, decision("a", verdict="deny")),
        return_exceptions=True,
    )
    assert isinstance(got[0], errors.WrongExpectedSeq)
    assert (got[1].seq, got[1].duplicate) == (1, False)


async def test_a_cancelled_await_does_not_touch_the_others(book, tenant):
    """It may have been recorded, once; whoever waits for the same call gets his receipt."""
    tasks = [asyncio.create_task(book.append(tenant, decision(f"d-{n}"))) for n in range(30)]
    await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    got = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in got[::3])
    kept = [one for number, one in enumerate(got) if number % 3]
    assert [receipt.duplicate for receipt in kept] == [False] * 20
    again = await asyncio.gather(*(book.append(tenant, decision(f"d-{n}")) for n in range(30)))
    assert sorted(receipt.seq for receipt in again) == list(range(1, 31))


async def test_closing_waits_for_what_is_in_flight(server, tenant):
    """An append that was called before `aclose` is recorded and returns."""
    book = await Ledger.connect(server.url)
    tasks = [asyncio.create_task(book.append(tenant, decision(f"d-{n}"))) for n in range(500)]
    await asyncio.sleep(0)
    await book.aclose()
    assert sorted(receipt.seq for receipt in await asyncio.gather(*tasks)) == [*range(1, 501)]


# -- lost replies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("expected_seq", [None, 1])
async def test_an_append_whose_reply_was_lost_is_retried_by_its_id(server, tenant, expected_seq):
    """The server recorded it, the connection broke: the retry finds it, and nothing is twice."""
    async with Proxy(server) as proxy, Ledger.connect(proxy.url) as book:
        await book.append(tenant, decision("first"))
        proxy.lose_reply_to = b"decision.recorded"
        batch = [decision("a"), decision("b")]
        receipts = await book.append_many(tenant, batch, expected_seq=expected_seq)
        assert proxy.lost.is_set()
        assert [(r.seq, r.duplicate) for r in receipts] == [(2, True), (3, True)]
        assert [seq for seq, *_ in await recorded(book, tenant)] == [1, 2, 3]


@pytest.mark.parametrize("idle", [True, False], ids=["connected", "connecting"])
async def test_a_receipt_after_a_failover_speaks_of_the_new_node(fresh_server, monkeypatch, idle):
    """What is known of a node that fsyncs says nothing of the one that took its address over."""
    monkeypatch.setattr("ledger.server.SETTINGS_AGE_LIMIT_S", 3600)
    before, after = fresh_server(), fresh_server(config={"appendfsync": "everysec"})
    async with Proxy(before) as proxy, Ledger.connect(proxy.url) as book:
        first = await book.append("t", decision("first"))
        again = await book.append("t", decision("second"))
        assert {first.durability, again.durability} == {Durability.FSYNCED}
        if not idle:
            book.server._primary.drop_idle()
        proxy.lose_reply_to, proxy.takes_over = b"third", after
        third = await book.append("t", decision("third"))
        assert not third.duplicate  # the old node has it too, and is gone
        assert third.seq == 1
        assert third.durability is Durability.MEMORY


async def test_a_lost_reply_without_retries_is_an_error_and_safe_to_repeat(server, tenant):
    """With no attempts left the caller is told that it may be recorded; repeating is safe."""
    async with Proxy(server) as proxy:
        options = Settings(redis_url=proxy.url, memory_max_reconnect_attempts=0)
        async with Ledger.connect(settings=options) as book:
            await book.append(tenant, decision("first"))
            proxy.lose_reply_to = b"decision.recorded"
            with pytest.raises(errors.ServerUnreachable, match="same id is safe"):
                await book.append(tenant, decision("a"))
            again = await book.append(tenant, decision("a"))
            assert (again.seq, again.duplicate) == (2, True)


async def test_a_server_that_falls_silent_is_not_waited_for_for_ever(server, tenant, monkeypatch):
    """No reply in time is a broken connection; a late reply is never taken for another's."""
    monkeypatch.setattr("ledger.append.REPLY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(Server.exchange, "__kwdefaults__", {"timeout_s": 0.2, "tried": 0})
    async with Proxy(server) as proxy:
        options = Settings(redis_url=proxy.url, memory_max_reconnect_attempts=1)
        async with Ledger.connect(settings=options) as book:
            await book.append(tenant, decision("a"))
            await book._appender._feed.aclose()
            proxy.silent = True
            with pytest.raises(errors.ServerUnreachable) as refused:
                await book.append(tenant, decision("b"))
            assert refused.value.facts["attempts"] == 2
            proxy.silent = False
            got = await asyncio.gather(*(book.append(tenant, decision(i)) for i in "abc"))
            assert [(r.seq, r.duplicate) for r in got] == [(1, True), (2, True), (3, False)]


# -- durability -----------------------------------------------------------------------------------


async def test_fsynced_on_a_server_that_fsyncs_every_write(book, tenant):
    """AOF `always`: the receipt says fsynced, asked for or not; who asks for less is content."""
    for asked in (None, "memory", "fsynced", Durability.FSYNCED):
        receipt = await book.append(tenant, decision(f"d-{asked}"), durability=asked)
        assert receipt.durability is Durability.FSYNCED
    with pytest.raises(errors.InvalidInput, match="memory, fsynced or replicated"):
        await book.append(tenant, decision("x"), durability="certain")


LESS_SAFE = {
    "everysec": ({"appendfsync": "everysec"}, "appendfsync is everysec"),
    "no AOF": ({"appendonly": "no"}, "appendonly is no"),
    "no fsync while rewriting": (
        {"no-appendfsync-on-rewrite": "yes"},
        "no-appendfsync-on-rewrite is yes",
    ),
}


@pytest.mark.parametrize(("config", "named"), LESS_SAFE.values(), ids=LESS_SAFE)
@pytest.mark.parametrize("kind", KINDS)
async def test_less_safe_servers_are_named(fresh_server, tenant, kind, config, named):
    """Without an fsync for each ack a receipt says memory; who asks for fsynced is refused."""
    server = fresh_server(kind, config=config)
    async with Ledger.connect(server.url) as book:
        with pytest.raises(errors.UnsafeServer, match=named) as refused:
            await book.append(tenant, decision("a"), durability="fsynced")
        assert "CONFIG SET" in refused.value.hint
        assert server.cli("EXISTS", keys.decisions(tenant)) == 0
        assert (await book.append(tenant, decision("a"))).durability is Durability.MEMORY
        receipt = await book.append(tenant, decision("b"), durability="memory")
        assert receipt.durability is Durability.MEMORY
    async with Ledger.connect(server.url, durability="fsynced") as strict:
        with pytest.raises(errors.UnsafeServer, match=named):
            await strict.append(tenant, decision("c"))


async def test_a_setting_changed_meanwhile_shows_in_the_receipt(fresh_server, tenant, monkeypatch):
    """It was fsynced at the last look and is not any more: recorded, but not as safely."""
    monkeypatch.setattr("ledger.server.SETTINGS_AGE_LIMIT_S", 0)
    server = fresh_server()
    async with Ledger.connect(server.url) as book:
        assert (await book.append(tenant, decision("a"))).durability is Durability.FSYNCED
        server.cli("CONFIG", "SET", "appendfsync", "everysec")
        with pytest.raises(errors.DurabilityNotReached, match="only memory, not fsynced"):
            await book.append(tenant, decision("b"), durability="fsynced")
        assert (await book.append(tenant, decision("b"))).duplicate


def rewriting(server):
    info = server.cli("INFO", "persistence")
    return info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_aof_in_the_making_is_not_fsynced(fresh_server, tenant, kind, monkeypatch):
    """After CONFIG SET appendonly yes a crash loses all until the first rewrite is done."""
    monkeypatch.setattr("ledger.server.SETTINGS_AGE_LIMIT_S", 0)
    server = fresh_server(kind, config={"appendonly": "no"})
    server.cli("SET", "k", "v")
    async with Ledger.connect(server.url) as known:
        assert (await known.append(tenant, decision("a"))).durability is Durability.MEMORY
        server.cli("CONFIG", "SET", "rdb-key-save-delay", 10**9)
        server.cli("CONFIG", "SET", "appendonly", "yes")
        assert rewriting(server)
        async with Ledger.connect(server.url) as new:
            for book in (known, new):
                assert (await book.append(tenant, decision("b"))).durability is Durability.MEMORY
            with pytest.raises(errors.UnsafeServer, match="may still be in the making"):
                await new.append(tenant, decision("c"), durability="fsynced")
        server.cli("CONFIG", "SET", "appendonly", "no")
        server.cli("CONFIG", "SET", "rdb-key-save-delay", 0)
        server.cli("CONFIG", "SET", "appendonly", "yes")
        wait_until(lambda: not rewriting(server), "the append-only file is made")
        receipt = await known.append(tenant, decision("c"), durability="fsynced")
        assert receipt.durability is Durability.FSYNCED
    server.kill()
    server._config["appendonly"] = "yes"
    server.restart()
    async with Ledger.connect(server.url) as book:
        assert [entry.id async for entry in book.replay(tenant)] == ["a", "b", "c"]


async def test_an_ordinary_rewrite_leaves_appends_fsynced(fresh_server, tenant, monkeypatch):
    """BGREWRITEAOF on a server whose file is in use changes no receipt."""
    monkeypatch.setattr("ledger.server.SETTINGS_AGE_LIMIT_S", 0)
    server = fresh_server()
    async with Ledger.connect(server.url) as book:
        await book.append(tenant, decision("a"), durability="fsynced")
        server.cli("BGREWRITEAOF")
        wait_until(lambda: not rewriting(server), "a rewrite is done")
        server.cli("CONFIG", "SET", "rdb-key-save-delay", 10**9)
        server.cli("BGREWRITEAOF")
        assert rewriting(server)
        await book.append(tenant, decision("b"), durability="fsynced")
        async with Ledger.connect(server.url) as new:
            await new.append(tenant, decision("c"), durability="fsynced")


@pytest.mark.parametrize("kind", KINDS)
async def test_replicated_needs_a_replica(fresh_server, tenant, kind, monkeypatch):
    """With a replica it is reached; without one it is an error after the fact; retry is safe."""
    monkeypatch.setattr("ledger.append.WAIT_TIMEOUT_MS", 100)
    primary = fresh_server(kind)
    async with Ledger.connect(primary.url) as book:
        with pytest.raises(errors.DurabilityNotReached, match="recorded, but only fsynced") as few:
            await book.append(tenant, decision("a"), durability="replicated")
        assert few.value.facts["reached"] is Durability.FSYNCED
        replica = fresh_server(kind, config={"replicaof": f"127.0.0.1 {primary.port}"})
        replica.wait_for_replica_link()
        monkeypatch.setattr("ledger.append.WAIT_TIMEOUT_MS", 20_000)
        receipt = await book.append(tenant, decision("a"), durability="replicated")
        assert (receipt.duplicate, receipt.durability) == (True, Durability.REPLICATED)
        assert replica.cli("XLEN", keys.decisions(tenant)) == 1
        receipt = await book.append(tenant, decision("b"), durability="replicated")
        assert (receipt.seq, receipt.durability) == (2, Durability.REPLICATED)
        # A retry that writes nothing new must not take the answer of WAIT for a no-op.
        os.kill(replica.pid, signal.SIGSTOP)
        monkeypatch.setattr("ledger.append.WAIT_TIMEOUT_MS", 100)
        with pytest.raises(errors.DurabilityNotReached, match="0 replicas"):
            await book.append(tenant, decision("b"), durability="replicated")


async def test_each_caller_gets_the_level_he_asked_for(book, tenant, monkeypatch):
    """Calls in flight that ask for different levels do not share a WAIT."""
    monkeypatch.setattr("ledger.append.WAIT_TIMEOUT_MS", 100)
    levels = [None, "replicated", "fsynced", "memory", "replicated", None]
    got = await asyncio.gather(
        *(
            book.append(tenant, decision(f"d-{n}"), durability=level)
            for n, level in enumerate(levels)
        ),
        return_exceptions=True,
    )
    for level, one in zip(levels, got, strict=True):
        if level == "replicated":
            assert isinstance(one, errors.DurabilityNotReached)
        else:
            assert one.durability is Durability.FSYNCED


# -- what the user may see ------------------------------------------------------------------------

ENGINE = """
    +fcall +function|load +xadd +xrange +xrevrange +xlen +xinfo|stream +exists +wait +time
    +hget +hmget +hset +hlen +hgetall +smembers +sadd +@connection
""".split()  # noqa: SIM905 - as it stands in an ACL


def user_url(server, *rights, key="%RW~claude-flow:*", name="engine"):
    """The URL of a new user with these rights alone."""
    server.cli("ACL", "SETUSER", name, "reset", "on", ">pw", "-@all", key, *rights)
    return f"redis://{name}:pw@127.0.0.1:{server.port}"


@pytest.mark.parametrize("kind", KINDS)
async def test_without_config_rights_the_attestation_counts(fresh_server, tenant, kind):
    """Who may not read CONFIG gets memory, until an operator has attested this server process."""
    server = fresh_server(kind)
    url = user_url(server, *ENGINE, "+info")
    async with Ledger.connect(url) as book:
        assert (await book.append(tenant, decision("a"))).durability is Durability.MEMORY
    async with Ledger.connect(url) as book:
        with pytest.raises(errors.UnsafeServer, match="its settings may not be read"):
            await book.append(tenant, decision("b"), durability="fsynced")

    async def attest():
        async with await Server.open(Settings(redis_url=server.url)) as operator:
            await operator.attest()

    await attest()
    async with Ledger.connect(url) as book:
        receipt = await book.append(tenant, decision("b"), durability="fsynced")
        assert receipt.durability is Durability.FSYNCED
    server.restart()  # another process: nobody has looked at its settings
    user_url(server, *ENGINE, "+info")
    async with Ledger.connect(url) as book:
        assert (await book.append(tenant, decision("c"))).durability is Durability.MEMORY
        await attest()
    async with Ledger.connect(url) as book:
        assert (await book.append(tenant, decision("d"))).durability is Durability.FSYNCED


@pytest.mark.parametrize("kind", KINDS)
async def test_eviction_is_refused_by_name(fresh_server, tenant, kind):
    """allkeys-* could drop what was acknowledged: refused before writing, unless told otherwise."""
    server = fresh_server(kind, config=eviction("allkeys-lru"))
    async with Ledger.connect(server.url) as book:
        for _ in range(2):
            with pytest.raises(errors.UnsafeServer, match="maxmemory-policy is allkeys-lru") as no:
                await book.append(tenant, decision("a"))
        assert "GOVLEDGER_ALLOW_EVICTION" in no.value.hint
        assert server.cli("EXISTS", keys.decisions(tenant)) == 0
    allowed = Settings(redis_url=server.url, govledger_allow_eviction=True)
    async with Ledger.connect(settings=allowed) as book:
        assert (await book.append(tenant, decision("a"))).seq == 1
    for policy in ("volatile-lru", "noeviction"):
        server.cli("CONFIG", "SET", "maxmemory-policy", policy)
        async with Ledger.connect(server.url) as book:
            assert (await book.append(tenant, decision(policy))).seq > 1


async def test_eviction_without_config_rights(fresh_server, tenant):
    """INFO tells the policy too, so an engine without CONFIG is refused as well."""
    server = fresh_server(config=eviction("allkeys-lfu"))
    async with Ledger.connect(user_url(server, *ENGINE, "+info")) as book:
        with pytest.raises(errors.UnsafeServer, match="allkeys-lfu"):
            await book.append(tenant, decision("a"))


async def test_eviction_that_is_switched_on_later_is_noticed(fresh_server, tenant, monkeypatch):
    """However seldom somebody appends: one look late at most, and a repaired server is taken."""
    monkeypatch.setattr("ledger.server.SETTINGS_AGE_LIMIT_S", 0)
    server = fresh_server()
    async with Ledger.connect(server.url) as book:
        await book.append(tenant, decision("a"))
        server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
        await book.append(tenant, decision("b"))
        for _ in range(2):
            with pytest.raises(errors.UnsafeServer):
                await book.append(tenant, decision("c"))
        server.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
        assert (await book.append(tenant, decision("c"))).seq == 3


@pytest.mark.parametrize("missing", ["xadd", "hset", "hmget", "hlen", "time"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_missing_right_leaves_nothing_half_written(tenant, kind, missing, shared_server):
    """A user who may run only some of the function's commands is refused; nothing is written."""
    server = shared_server(kind)
    name = f"engine-{tenant}"
    async with Ledger.connect(server.url) as book:
        await book.append(tenant, decision("a"))
        rights = [right for right in ENGINE if right != f"+{missing}"]
        before = state_of(server, tenant)
        async with Ledger.connect(user_url(server, *rights, name=name)) as poor:
            with pytest.raises(errors.PermissionDenied):
                await poor.append(tenant, decision("b"))
        assert state_of(server, tenant) == before
        server.cli("ACL", "DELUSER", name)
        assert (await book.append(tenant, decision("b"))).seq == 2


def state_of(server, tenant):
    return (
        server.cli("XRANGE", keys.decisions(tenant), "-", "+"),
        server.cli("HGETALL", keys.head(tenant)),
        server.cli("HLEN", keys.index(tenant)),
    )


async def test_keys_of_another_type_are_an_error_and_stay(book, server, tenant):
    """A key that somebody took for something else is named by the server, and not overwritten."""
    server.cli("SET", keys.decisions(tenant), "mine")
    with pytest.raises(errors.LedgerError):
        await book.append(tenant, decision("a"))
    assert server.cli("GET", keys.decisions(tenant)) == "mine"


# -- two releases ---------------------------------------------------------------------------------

APPEND_PROGRAM = """
import sys
from ledger import event_from_json, sync
url, tenant = sys.argv[1:]
with sync.Ledger.connect(url) as book:
    lines = sys.stdin.buffer.read().splitlines()
    for receipt in book.append_many(tenant, [event_from_json(line) for line in lines]):
        print(receipt.seq, receipt.duplicate)
"""


async def test_events_of_another_release_are_duplicates(book, server, tenant, tmp_path):
    """What a release with other defaults and field order recorded is known here, and vice versa."""
    package = Path(ledger.__file__).parent
    shutil.copytree(package, tmp_path / "ledger", ignore=shutil.ignore_patterns("service", "data"))
    models = tmp_path / "ledger" / "events.py"
    text = models.read_text()
    changed = text.replace('] = "match"', '] = "violation"').replace(
        "    agent: AgentRef\n    action: Action\n",
        '    action: Action\n    novelty: str | None = "new"\n    agent: AgentRef\n',
    )
    assert changed.count("novelty") == 1
    assert '] = "match"' not in changed
    models.write_text(changed)

    ours = [decision("a", rules="r"), decision("b", metadata={"z": 1, "a": 2})]
    await book.append_many(tenant, ours)
    lines = [events.encode(event).data for event in [*ours, decision("c", rules=["r", "s"])]]
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", APPEND_PROGRAM, server.url, tenant],
        input=b"\n".join(lines),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.decode().split("\n") == ["1 True", "2 True", "3 False", ""]
    receipt = await book.append(tenant, decision("c", rules=["r", "s"]))
    assert (receipt.seq, receipt.duplicate) == (3, True)


# -- against a model ------------------------------------------------------------------------------

MODEL_IDS = st.sampled_from("abcdefgh")
MODEL_EVENTS = st.tuples(MODEL_IDS, st.sampled_from(["allow", "deny"]))
EXPECTATIONS = st.sampled_from([None, None, 0, -1, 1])


class AppendMachine(RuleBasedStateMachine):
    """Batches with duplicates, conflicts and expectations, against a list of what should be."""

    url = ""

    @initialize()
    def connect(self):
        self.book = sync.Ledger.connect(self.url)
        self.tenant = new_tenant()
        self.entries = []

    def teardown(self):
        if hasattr(self, "book"):
            self.book.close()

    def expected_outcome(self, batch, expected_seq):
        """The receipts as (seq, duplicate), or the error; and the entries afterwards."""
        entries, receipts = list(self.entries), []
        for event_id, verdict in batch:
            known = [n for n, (other, _) in enumerate(entries, 1) if other == event_id]
            if known and entries[known[0] - 1] != (event_id, verdict):
                return errors.ConflictingEvent, self.entries
            if not known:
                entries.append((event_id, verdict))
            receipts.append((known[0] if known else len(entries), bool(known)))
        grown = len(entries) > len(self.entries)
        if grown and expected_seq not in (None, len(self.entries)):
            return errors.WrongExpectedSeq, self.entries
        return receipts, entries

    @rule(batch=st.lists(MODEL_EVENTS, min_size=1, max_size=5), off=EXPECTATIONS)
    def append(self, batch, off):
        expected_seq = None if off is None else max(len(self.entries) + off, 0)
        outcome, self.entries = self.expected_outcome(batch, expected_seq)
        sent = [decision(event_id, verdict=verdict) for event_id, verdict in batch]
        try:
            got = self.book.append_many(self.tenant, sent, expected_seq=expected_seq)
        except errors.Refused as error:
            assert type(error) is outcome  # noqa: PT017 - both outcomes are compared
        else:
            assert [(receipt.seq, receipt.duplicate) for receipt in got] == outcome

    @rule(event_id=MODEL_IDS)
    def get(self, event_id):
        known = [n for n, (other, _) in enumerate(self.entries, 1) if other == event_id]
        if known:
            assert self.book.get(self.tenant, event_id).seq == known[0]
        else:
            with pytest.raises(errors.NotFound):
                self.book.get(self.tenant, event_id)

    @rule(data=st.data())
    def read_on(self, data):
        if self.entries:
            after = data.draw(st.integers(0, len(self.entries)))
            found = [entry.id for entry in self.book.replay(self.tenant, after=after)]
            assert found == [event_id for event_id, _ in self.entries[after:]]

    @invariant()
    def head_is_the_number_of_entries(self):
        assert self.book.head(self.tenant).seq == len(self.entries)


def test_append_behaves_as_its_model(server):
    """Any sequence of batches gives the receipts, errors and entries that a plain list says."""

    class Machine(AppendMachine):
        url = server.url

    run_machine(Machine, settings=settings(max_examples=25, stateful_step_count=20))


# -- what is stored -------------------------------------------------------------------------------

LIBRARY_SHA256 = {
    1: "22536d7470941521400e32c4d33f70032d56019db068402aee03b4329c1a27c1",
    2: "4bb93e5ae281bab531932462887c96f2bd33fb4c6c0be4ceec65da0b8372ae4a",
    3: "859b6d6ed3203a67e8c33253379299b0bdaf6a39fb6a6ed42a81b3e464807116",
}
"""By LIBRARY_VERSION: the text that is, or once was, released under that number."""


def test_a_change_of_the_library_needs_a_new_version():
    """A server keeps a library that has our version, so another text must have another number."""
    digest = hashlib.sha256(library_source()).hexdigest()
    assert LIBRARY_SHA256[LIBRARY_VERSION] == digest, "raise VERSION in functions.lua, or it stays"
    assert f"local VERSION = {LIBRARY_VERSION}\n" in library_source().decode()


async def test_the_entry_has_three_fields_in_order(book, server, tenant):
    """The stream holds type, id and data, and data is the event's bytes."""
    event = decision("a", reason="é")
    await book.append(tenant, event)
    with server.client() as client:
        ((_, fields),) = client.execute_command("XRANGE", keys.decisions(tenant), "-", "+")
    data = events.encode(event).data
    wanted = [(b"type", b"decision.recorded"), (b"id", b"a"), (b"data", data)]
    assert list(fields.items()) == wanted
    assert orjson.loads(data)["reason"] == "é"
