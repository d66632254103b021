"""A tenant's lane: whatever happens, each caller gets an answer, and connections come back."""

import asyncio
import sys
from subprocess import run

import pytest

from ledger import Decision, Durability, Ledger, errors, keys
from ledger.settings import Settings
from tests.proxy import Proxy


def decision(number):
    return Decision(id=f"d-{number}", agent="a", action="act", verdict="allow")


def tries(url, attempts):
    return Ledger.connect(settings=Settings(redis_url=url, memory_max_reconnect_attempts=attempts))


async def warm(book, tenant):
    """The lane has a connection at hand, and knows its server."""
    for number in range(2):
        await book.append(tenant, decision(f"warm-{number}"))


async def test_an_answer_that_makes_no_sense_is_its_callers_error(server, tenant):
    """A record that another hand broke fails the append; nobody waits for ever, nor the next."""
    async with Ledger.connect(server.url) as book:
        await warm(book, tenant)
        server.cli("HSET", keys.head(tenant), "epoch", b"\xff\xfe")
        async with asyncio.timeout(20):
            for number in range(2):
                with pytest.raises(UnicodeDecodeError):
                    await book.append(tenant, decision(number))
        server.cli("HSET", keys.head(tenant), "epoch", b"ab")
        assert (await book.append(tenant, decision("last"))).seq == 5  # they were recorded


async def test_connections_come_back_whatever_rode_along(fresh_server, tenant):
    """After callers of several levels, and a restart of the server, a lane goes the fast way again,
    and closing the ledger closes every connection.
    """
    server = fresh_server()
    async with tries(server.url, 10) as book:
        await warm(book, tenant)
        done = await asyncio.gather(
            book.append(tenant, decision(0)),
            book.append(tenant, decision(1), durability="replicated"),
            return_exceptions=True,
        )
        assert done[0].durability is Durability.FSYNCED
        assert isinstance(done[1], errors.DurabilityNotReached)
        server.kill()
        server.restart()
        lane, pool = book._appender._lanes[tenant, False], book.server._primary
        for number in range(2, 7):
            await book.append(tenant, decision(number))
        assert (lane._lease, lane._slow_task) == (None, None)
        idle = list(pool._idle)
        assert idle
        assert not pool._lent
    assert all(wire.closed for wire in idle)


async def test_who_waits_for_a_replica_holds_up_nobody_else(server, tenant):
    """Plain appends go on beside one that waits two seconds for a replica that does not come."""
    async with Ledger.connect(server.url) as book:
        await warm(book, tenant)
        waiting = asyncio.create_task(book.append(tenant, decision("far"), durability="replicated"))
        for number in range(20):
            await book.append(tenant, decision(number))
        assert not waiting.done()
        with pytest.raises(errors.DurabilityNotReached):
            await waiting


@pytest.mark.parametrize("attempts", [0, 1, 2])
async def test_retries_are_as_many_as_was_set(server, tenant, monkeypatch, attempts):
    """The first attempt and MEMORY_MAX_RECONNECT_ATTEMPTS more, and the error says how many."""
    monkeypatch.setattr("ledger.server.BACKOFF_BASE_S", 0.001)
    async with Proxy(server) as proxy, tries(proxy.url, attempts) as book:
        await warm(book, tenant)
        proxy.requests.clear()

        async def lose_each() -> None:
            while True:
                proxy.lose_reply_to = b"govledger_append"
                await asyncio.sleep(0)

        losing = asyncio.create_task(lose_each())
        with pytest.raises(errors.ServerUnreachable) as told:
            await book.append(tenant, decision(0))
        losing.cancel()
        assert len(proxy.requests_with(b"govledger_append")) == attempts + 1
        assert told.value.facts["attempts"] == attempts + 1
        proxy.lose_reply_to = None


CANCELLED = """
import asyncio, sys
from ledger import Decision, Ledger

async def worker(ready, go):
    async with Ledger.connect(sys.argv[1]) as book:
        ready.set()
        await go.wait()
        await book.append(sys.argv[2], Decision(agent="a", action="act", verdict="allow"))

async def main():
    ready, go = asyncio.Event(), asyncio.Event()
    working = asyncio.create_task(worker(ready, go))
    await ready.wait()
    go.set()
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.wait([working])

asyncio.run(main())
"""


def test_a_program_that_cancels_everything_ends(server, tenant):
    """Also when the lane's own task is cancelled before its first step."""
    done = run([sys.executable, "-c", CANCELLED, server.url, tenant], timeout=30, check=False)
    assert done.returncode == 0


async def test_a_new_primary_takes_the_old_ones_connections_away(fresh_server, fresh_sentinel):
    """As soon as one connection leads to the promoted replica, none to the old primary is used."""
    old = fresh_server()
    new = fresh_server(config={"replicaof": f"127.0.0.1 {old.port}"})
    new.wait_for_replica_link()
    sentinel = fresh_sentinel(old)
    async with tries(sentinel.url, 20) as book:
        await warm(book, "t")
        pool = book.server._primary
        stale = list(pool._idle)
        assert {wire.address[1] for wire in stale} == {old.port}
        assert await asyncio.to_thread(sentinel.failover) == new.port
        held = [pool.take() for _ in stale]  # as by others: a new connection is opened
        while not any(wire.address[1] == new.port for wire in pool._idle):
            for wire in list(pool._idle):
                wire.abort()
            await book.server.command("", "PING")
        for wire in held:
            pool.give(wire)
        assert all(wire.closed for wire in stale)
        receipts = [await book.append("t", decision(number)) for number in range(10)]
    recorded = {fields[b"id"] for _, fields in _entries(new)}
    assert {f"d-{number}".encode() for number in range(10)} <= recorded
    assert len({receipt.seq for receipt in receipts}) == 10


def _entries(server):
    with server.client() as client:
        return client.execute_command("XRANGE", keys.decisions("t"), "-", "+")
