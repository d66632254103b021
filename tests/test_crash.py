"""kill -9 of servers and clients: what was acknowledged is there, and nothing is there twice."""

import asyncio
import os
import random
import signal
import subprocess
import sys

import pytest

from ledger import Decision, Durability, Ledger, errors, load_settings
from ledger.embedded import is_running
from ledger.events import encode

KILLS = {"valkey9": 5, "redis7": 4, "redis8": 4}
WRITERS = 8


def decision(number):
    return Decision(
        id=f"d-{number}",
        at="2026-01-01T00:00:00Z",
        agent=f"agent-{number % 5}",
        action="act",
        verdict="deny",
        reason="r" * (number % 300),
    )


async def write_until_killed(ledger, tenant, numbers, acknowledged, enough):
    """Appends until the server dies; what was in flight stays unknown."""

    async def work():
        for number in numbers:
            receipt = await ledger.append(tenant, decision(number), durability="fsynced")
            assert receipt.durability is Durability.FSYNCED
            acknowledged[number] = receipt
            if len(acknowledged) >= enough.at:
                enough.set()

    await asyncio.gather(*(work() for _ in range(WRITERS)), return_exceptions=True)


class Enough(asyncio.Event):
    """Set when that many appends are acknowledged."""

    def __init__(self, at):
        super().__init__()
        self.at = at


async def check(ledger, tenant, acknowledged):
    """Every acknowledged event is there, byte for byte, where its receipt said, none twice."""
    entries = [entry async for entry in ledger.replay(tenant)]
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    assert len({entry.id for entry in entries}) == len(entries)
    by_id = {entry.id: entry for entry in entries}
    for number, receipt in acknowledged.items():
        entry = by_id[f"d-{number}"]
        assert (entry.seq, entry.entry_id) == (receipt.seq, receipt.entry_id)
        assert entry.data == encode(decision(number)).data
    return entries


@pytest.mark.parametrize("kind", list(KILLS))
async def test_killed_server_keeps_every_acknowledged_event(kind, fresh_server, tenant):
    """Again and again: kill -9 in the middle of concurrent appends, restart, compare, retry."""
    server = fresh_server(kind)
    acknowledged, next_number = {}, iter(range(10**9))
    sent = 0
    impatient = load_settings(redis_url=server.url, memory_max_reconnect_attempts=0)
    for kill in range(KILLS[kind]):
        enough = Enough(len(acknowledged) + 40 + random.Random(kill).randrange(120))
        async with Ledger.connect(settings=impatient) as ledger:
            writing = asyncio.create_task(
                write_until_killed(ledger, tenant, next_number, acknowledged, enough)
            )
            await enough.wait()
            server.kill()
            await writing
        sent = next(next_number)
        await asyncio.to_thread(server.restart)
        async with Ledger.connect(server.url) as ledger:
            entries = await check(ledger, tenant, acknowledged)
            retried = [number for number in range(sent) if number not in acknowledged]
            for number in retried:
                acknowledged[number] = await ledger.append(tenant, decision(number))
            landed_before = {entry.id for entry in entries}
            for number in retried:
                assert acknowledged[number].duplicate == (f"d-{number}" in landed_before)
            await check(ledger, tenant, acknowledged)
            acknowledged[sent] = await ledger.append(tenant, decision(sent))


CLIENT = """
import asyncio, sys
from ledger import Decision, Ledger

async def main(url, tenant, start):
    async with Ledger.connect(url) as ledger:
        number = start
        while True:
            events = [
                Decision(id=f"d-{n}", at="2026-01-01T00:00:00Z", agent="a", action="b",
                         verdict="allow", reason="r" * 2000)
                for n in range(number, number + 50)
            ]
            print(number, flush=True)
            await ledger.append_many(tenant, events)
            number += 50

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


async def test_killed_client_leaves_whole_batches_and_retries_are_duplicates(server, tenant, spawn):
    """Kill -9 of a client at any moment: each batch is whole or absent, and the same ids again
    add only what is missing.
    """
    moments = random.Random(7)
    start = 0
    async with Ledger.connect(server.url) as ledger:
        for _ in range(4):
            client = spawn(
                [sys.executable, "-c", CLIENT, server.url, tenant, str(start)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2 + moments.randrange(6)):
                last = int(await asyncio.to_thread(client.stdout.readline))
            client.send_signal(signal.SIGKILL)
            client.wait()
            last = max([last, *(int(line) for line in client.stdout.read().splitlines())])
            before = (await ledger.head(tenant)).seq
            assert before % 50 == 0
            events = [
                Decision(
                    id=f"d-{n}",
                    at="2026-01-01T00:00:00Z",
                    agent="a",
                    action="b",
                    verdict="allow",
                    reason="r" * 2000,
                )
                for n in range(last, last + 50)
            ]
            receipts = await ledger.append_many(tenant, events)
            assert len({receipt.duplicate for receipt in receipts}) == 1
            start = last + 50
            assert (await ledger.head(tenant)).seq == start
        ids = [entry.id async for entry in ledger.replay(tenant)]
    assert ids == [f"d-{n}" for n in range(start)]


async def test_cut_connections_are_retried_without_a_double(fresh_server, tenant):
    """Appends whose connections are cut are tried again by themselves, and recorded once."""
    server = fresh_server("valkey9")
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, decision(0))
        appends = asyncio.gather(*(ledger.append(tenant, decision(n)) for n in range(1, 50)))
        await asyncio.sleep(0)
        await ledger.server.command("", "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        receipts = await appends
        assert sorted(receipt.seq for receipt in receipts) == list(range(2, 51))
        assert len([entry async for entry in ledger.replay(tenant)]) == 50


async def test_embedded_server_that_was_killed_comes_back_under_its_client(embedded_dir, tenant):
    """Kill -9 of the embedded server: the client starts it again and its append lands."""
    async with Ledger.connect(f"embedded://{embedded_dir}") as ledger:
        first = await ledger.append(tenant, decision(1), durability="fsynced")
        endpoint = is_running(embedded_dir)
        os.kill(endpoint.pid, signal.SIGKILL)
        second = await ledger.append(tenant, decision(2), durability="fsynced")
        assert (first.seq, second.seq, first.epoch) == (1, 2, second.epoch)
        assert is_running(embedded_dir).pid != endpoint.pid
        assert [entry.id async for entry in ledger.replay(tenant)] == ["d-1", "d-2"]


async def test_dead_server_is_an_error_that_says_the_retry_is_safe(fresh_server, tenant):
    """With retries used up the caller is told, and the same id later is safe."""
    server = fresh_server("valkey9")
    settings = load_settings(redis_url=server.url, memory_max_reconnect_attempts=1)
    async with Ledger.connect(settings=settings) as ledger:
        await ledger.append(tenant, decision(1))
        server.kill()
        with pytest.raises(errors.ServerUnreachable, match="same id is safe"):
            await ledger.append(tenant, decision(2))
        await asyncio.to_thread(server.restart)
        assert (await ledger.append(tenant, decision(2))).seq == 2
