"""Writers in several processes on one tenant: dense, once, and one winner."""

import asyncio
import subprocess
import sys

import orjson
import pytest

from ledger import Decision, Ledger, errors

PROCESSES = 4
APPENDS = 500

WRITER = """
import asyncio, sys
from ledger import Decision, Ledger

async def main(url, tenant, prefix, count):
    async with Ledger.connect(url) as ledger:
        print("ready", flush=True)
        sys.stdin.readline()
        pending = iter(range(count))
        async def work():
            for number in pending:
                event = Decision(
                    id=f"{prefix}-{number}", at="2026-01-01T00:00:00Z", agent="a", action="b",
                    verdict="allow",
                )
                receipt = await ledger.append(tenant, event)
                print(receipt.seq, receipt.entry_id, int(receipt.duplicate), event.id, flush=False)
        await asyncio.gather(*(work() for _ in range(8)))

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""


def race(spawn, url, tenant, prefixes):
    """The receipts of one process a prefix, all let go at the same moment."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        spawn([sys.executable, "-c", WRITER, url, tenant, prefix, str(APPENDS)], **pipes)
        for prefix in prefixes
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    receipts = []
    for writer in writers:
        output, _ = writer.communicate(timeout=90)
        assert writer.returncode == 0
        receipts += [line.split() for line in output.splitlines()]
    return receipts


async def recorded(url, tenant):
    async with Ledger.connect(url) as ledger:
        return [entry async for entry in ledger.replay(tenant)]


async def test_four_processes_leave_no_gap_and_no_double(server, tenant, spawn):
    """4 times 500 appends of different events: seq 1..2000, each id once, as the receipts say."""
    prefixes = [f"w{n}" for n in range(PROCESSES)]
    receipts = await asyncio.to_thread(race, spawn, server.url, tenant, prefixes)
    entries = await recorded(server.url, tenant)
    total = PROCESSES * APPENDS
    assert [entry.seq for entry in entries] == list(range(1, total + 1))
    assert {entry.id for entry in entries} == {f"{p}-{n}" for p in prefixes for n in range(APPENDS)}
    assert not any(int(duplicate) for _, _, duplicate, _ in receipts)
    by_id = {entry.id: (entry.seq, entry.entry_id) for entry in entries}
    assert all(by_id[event_id] == (int(seq), eid) for seq, eid, _, event_id in receipts)
    times = [entry.recorded_ms for entry in entries]
    assert times == sorted(times)


async def test_four_processes_with_the_same_ids_record_each_once(server, tenant, spawn):
    """The same 500 events from 4 processes: 500 entries, and three of four receipts duplicates."""
    receipts = await asyncio.to_thread(race, spawn, server.url, tenant, ["same"] * PROCESSES)
    entries = await recorded(server.url, tenant)
    assert [entry.seq for entry in entries] == list(range(1, APPENDS + 1))
    assert len({entry.id for entry in entries}) == APPENDS
    assert len({orjson.loads(entry.data)["id"] for entry in entries}) == APPENDS
    assert sum(int(duplicate) for _, _, duplicate, _ in receipts) == (PROCESSES - 1) * APPENDS
    by_id = {entry.id: entry.seq for entry in entries}
    assert all(by_id[event_id] == int(seq) for seq, _, _, event_id in receipts)


async def test_exactly_one_contender_wins_an_expected_seq(server, tenant):
    """Of 20 contenders from separate clients for each of 10 places, one wins and 19 see both
    numbers.
    """
    ledgers = [await Ledger.connect(server.url) for _ in range(4)]
    try:
        for place in range(10):
            events = [Decision(agent="a", action="b", verdict="allow") for _ in range(20)]
            outcomes = await asyncio.gather(
                *(
                    ledgers[n % 4].append(tenant, event, expected_seq=place)
                    for n, event in enumerate(events)
                ),
                return_exceptions=True,
            )
            won = [one for one in outcomes if not isinstance(one, BaseException)]
            lost = [one for one in outcomes if isinstance(one, errors.WrongExpectedSeq)]
            assert len(won) == 1
            assert len(lost) == 19
            assert won[0].seq == place + 1
            assert {(e.facts["expected"], e.facts["actual"]) for e in lost} == {(place, place + 1)}
            winner = events[outcomes.index(won[0])]
            again = await ledgers[0].append(tenant, winner, expected_seq=place)
            assert again.duplicate
            assert again.seq == won[0].seq
    finally:
        for ledger in ledgers:
            await ledger.aclose()
    assert len(await recorded(server.url, tenant)) == 10


@pytest.mark.parametrize("size", [1, 50])
async def test_batches_of_racing_processes_stay_whole(valkey, tenant, size):
    """Atomic batches of several clients never interleave."""
    ledgers = [await Ledger.connect(valkey.url) for _ in range(3)]
    try:

        async def write(number, ledger):
            for batch in range(20):
                events = [
                    Decision(id=f"{number}-{batch}-{n}", agent="a", action="b", verdict="deny")
                    for n in range(size)
                ]
                await ledger.append_many(tenant, events)

        await asyncio.gather(*(write(n, ledger) for n, ledger in enumerate(ledgers)))
        ids = [entry.id async for entry in ledgers[0].replay(tenant)]
    finally:
        for ledger in ledgers:
            await ledger.aclose()
    assert len(ids) == 3 * 20 * size
    for start in range(0, len(ids), size):
        batch = {event_id.rpartition("-")[0] for event_id in ids[start : start + size]}
        assert len(batch) == 1
