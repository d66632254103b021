"""Shows the whole way on one machine: append, fold, read the state, replay, compare, adapt.

An embedded server is started in a temporary directory. For each of four tenants two writers, in
different processes, send the shipped events at the same time, one in batches and one event by
event, as an engine and its retries would: each event is recorded once, in its order, whoever comes
first. The projector runs beside them. Afterwards nothing is left, neither a process nor a file.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ledger import Entry, Event, Ledger, Receipt, ThresholdChanged, errors, event_from_json
from ledger.embedded import EmbeddedServer, is_running
from ledger.service.terminal import spare_gc
from projections import Governance, GovernanceState, Projector, PublishedState, StateReader
from projections.bodies import subject_id
from projections.projection import Entities
from projections.store import encode_entity

BATCH_EVENTS: Final = 20
DAY: Final = timedelta(days=1)
LINGER_S: Final = 0.2
STOP_TIMEOUT_S: Final = 30.0
MISSED_AT_MOST: Final = 0.05
THRESHOLD_STEP: Final = 0.1

console = Console(width=None if sys.stdout.isatty() else 110)


# -- the events -------------------------------------------------------------------------------


def shipped_events() -> list[dict[str, Any]]:
    """The events that come with the package, in their order; `tenant` says whose each is."""
    text = resources.files("ledger").joinpath("data/agentdojo-decisions.jsonl").read_bytes()
    return [orjson.loads(line) for line in text.splitlines()]


def days_ahead(events: Iterable[dict[str, Any]]) -> int:
    """By how many days the newest event is ahead of this machine's clock; 0 where it is not."""
    newest = max(datetime.fromisoformat(event["at"]) for event in events)
    return max(0, -((datetime.now(UTC) - newest) // DAY))


def events_of(tenant: str, days_back: int) -> list[Event]:
    """One tenant's events, ready to append."""
    found = []
    for event in shipped_events():
        if event.pop("tenant") == tenant:
            moment = datetime.fromisoformat(event["at"]) - days_back * DAY
            event["at"] = moment.isoformat().replace("+00:00", "Z")
            found.append(event_from_json(orjson.dumps(event)))
    return found


# -- a writer process -------------------------------------------------------------------------


async def write(url: str, first: str, again: str, days_back: int) -> None:
    """Waits for a line on stdin, then sends `first`'s events in batches and `again`'s one by one.

    Each line on stdout says what came of some events: the tenant, how many were recorded, how many
    had been recorded by the other writer before.
    """
    batches = list(_cut(events_of(first, days_back), BATCH_EVENTS))
    singles = list(_cut(events_of(again, days_back), 1))
    async with Ledger.connect(url) as ledger:
        print("ready", flush=True)
        if not sys.stdin.readline():  # whom we work for has ended
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send(ledger, first, batches))
            tasks.create_task(_send(ledger, again, singles))


def _cut(events: list[Event], size: int) -> Iterator[list[Event]]:
    return (events[start : start + size] for start in range(0, len(events), size))


async def _send(ledger: Ledger, tenant: str, batches: Iterable[list[Event]]) -> None:
    """Each batch after the acknowledgement of the one before: no event overtakes its cause."""
    for events in batches:
        receipts = await ledger.append_many(tenant, events)
        _tell(tenant, receipts)


def _tell(tenant: str, receipts: list[Receipt]) -> None:
    duplicates = sum(receipt.duplicate for receipt in receipts)
    print(tenant, len(receipts) - duplicates, duplicates, flush=True)


# -- what came of it --------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """One tenant's way through the ledger."""

    ids: list[str]
    recorded: int = 0
    duplicates: int = 0
    folded: int = 0

    @property
    def is_folded(self) -> bool:
        """Whether the published state has all of them."""
        return self.folded == len(self.ids)


class Speeds:
    """How long each step took."""

    def __init__(self) -> None:
        self.table = Table(title="speed, on this machine and beside everything else that runs here")
        for heading, justify in (("step", "left"), ("took", "right"), ("speed", "right")):
            self.table.add_column(heading, justify=justify)  # type: ignore[arg-type]

    def add(self, step: str, count: int, seconds: float) -> None:
        """One step of `count` events that took `seconds`."""
        speed = f"{count / seconds:,.0f} events/s"
        self.table.add_row(step, f"{seconds * 1000:,.0f} ms", speed)


# -- the demo ---------------------------------------------------------------------------------


@asynccontextmanager
async def embedded_server() -> AsyncIterator[EmbeddedServer]:
    """A server on a temporary data directory; both are gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="govledger-demo-"))
    try:
        # A short linger: no later command will want this server.
        with EmbeddedServer.acquire(directory, linger_s=LINGER_S) as server:
            yield server
    finally:
        await _ended(directory)
        shutil.rmtree(directory)


async def _ended(directory: Path) -> None:
    async with asyncio.timeout(STOP_TIMEOUT_S):
        # Other processes set no event of ours.
        while _is_held(directory / "keeper.lock") or is_running(directory):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def _is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@asynccontextmanager
async def writers(url: str, tenants: list[str], days_back: int) -> AsyncIterator[list[Process]]:
    """A process a tenant, connected and waiting; each also repeats the next tenant's events."""
    started: list[Process] = []
    try:
        for first, again in zip(tenants, tenants[1:] + tenants[:1], strict=True):
            argv = [sys.executable, __file__, "--write", url, first, again, str(days_back)]
            # Its own session: Ctrl-C reaches us alone, and we end the writers.
            started.append(
                await asyncio.create_subprocess_exec(
                    *argv, stdin=PIPE, stdout=PIPE, start_new_session=True
                )
            )
        for process in started:
            assert process.stdout is not None
            await process.stdout.readline()
        yield started
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def run_writer(process: Process, tallies: dict[str, Tally]) -> float:
    """Lets a writer go, and counts what it reports until it ends; when its last batch landed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"go\n")
    batch_landed_s = 0.0
    async for line in process.stdout:
        tenant, recorded, duplicates = line.decode().split()
        tallies[tenant].recorded += int(recorded)
        tallies[tenant].duplicates += int(duplicates)
        if int(recorded) + int(duplicates) > 1:
            batch_landed_s = time.perf_counter()
    if await process.wait() != 0:
        sys.exit("a writer failed; what it said is above")
    return batch_landed_s


async def watch(reader: StateReader, tallies: dict[str, Tally]) -> float:
    """Draws how far each tenant is, until all is folded; when that was. It draws on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("recorded {task.completed} of {task.total}, folded {task.fields[folded]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {
            tenant: progress.add_task(tenant, total=len(tally.ids), folded=0)
            for tenant, tally in tallies.items()
        }
        while not all(tally.is_folded for tally in tallies.values()):
            await asyncio.sleep(0.1)
            for tenant, tally in tallies.items():
                with suppress(errors.NotFound):  # nothing is folded yet
                    tally.folded = (await reader.state(tenant)).seq
                progress.update(bars[tenant], completed=tally.recorded, folded=tally.folded)
    return time.perf_counter()


async def append_and_fold(
    ledger: Ledger, url: str, tallies: dict[str, Tally], days_back: int, speeds: Speeds
) -> dict[str, PublishedState]:
    """Runs the writers, and the projector beside them, until all is recorded and folded."""
    reader = StateReader(ledger)
    async with asyncio.TaskGroup() as tasks, writers(url, list(tallies), days_back) as processes:
        projector = tasks.create_task(Projector(ledger).run())
        watching = tasks.create_task(watch(reader, tallies))
        begin_s = time.perf_counter()
        running = [tasks.create_task(run_writer(process, tallies)) for process in processes]
        batches_landed_s = max(await asyncio.gather(*running))
        all_landed_s = time.perf_counter()
        folded_s = await watching
        projector.cancel()
    count = sum(len(tally.ids) for tally in tallies.values())
    for tally in tallies.values():
        if (tally.recorded, tally.duplicates) != (len(tally.ids), len(tally.ids)):
            sys.exit(f"{len(tally.ids)} events were sent twice, and that came of it: {tally}")
    console.print(f"{count:,} events, each sent by two writers: recorded once, one duplicate each")
    at_once = f"by {len(tallies)} writers"
    speeds.add(f"append, {BATCH_EVENTS} a call, {at_once}", count, batches_landed_s - begin_s)
    speeds.add(f"append, one by one, {at_once} beside them", count, all_landed_s - begin_s)
    speeds.add("fold, commit and publish, beside them", count, folded_s - begin_s)
    return {tenant: await reader.state(tenant) for tenant in sorted(tallies)}


def state_table(states: dict[str, PublishedState]) -> Table:
    """Each tenant's governance state, the gist of it."""
    values = [state.value for state in states.values()]
    verdicts = [
        verdict
        for verdict in values[0]["decisions"]["by_verdict"]
        if any(value["decisions"]["by_verdict"][verdict] for value in values)
    ]
    table = Table(title="governance:state")
    table.add_column("tenant")
    for heading in (*verdicts, "deny rate", "overrides", "pending"):
        table.add_column(heading, justify="right")
    table.add_column("active policy")
    for tenant, state in states.items():
        counts = state.value["decisions"]
        active = state.value["policies"]["active"].items()
        table.add_row(
            tenant,
            *(str(counts["by_verdict"][verdict]) for verdict in verdicts),
            f"{state.value['rates']['deny']['rate']:.1%}",
            str(counts["overridden"]),
            str(state.value["escalations"]["pending"]),
            ", ".join(f"{policy_id}@{policy['version']}" for policy_id, policy in active),
        )
    return table


def folded(entries: list[Entry]) -> dict[str, Any]:
    """What the governance fold makes of a history, in this process and from nothing else."""
    governance = Governance()
    entities: Entities = {}
    decisions: dict[str | None, Entry] = {}
    for entry in entries:
        governance.apply(entities, entry, decisions.get(subject_id(entry)))
        if entry.type == "decision.recorded":
            decisions[entry.id] = entry
    return governance.view(entities["state"])


async def replay_and_compare(
    ledger: Ledger, published: PublishedState, ids: list[str], speeds: Speeds
) -> None:
    """Replays a tenant, and ends the demo unless its history folds to the published state."""
    tenant = published.tenant
    begin_s = time.perf_counter()
    entries = [entry async for entry in ledger.replay(tenant)]
    speeds.add(f"replay {tenant}", len(entries), time.perf_counter() - begin_s)
    if [entry.id for entry in entries] != ids:
        sys.exit(f"{tenant}: the replayed history is not what was sent, in the order it was sent")
    begin_s = time.perf_counter()
    value = encode_entity(folded(entries))
    speeds.add("fold that history in this process", len(entries), time.perf_counter() - begin_s)
    if value != encode_entity(published.value):
        sys.exit(f"{tenant}: fold(replay) is not the published state")
    console.print(f"fold(replay({tenant})) = its published state, {len(value):,} bytes of JSON")


def stricter(state: GovernanceState) -> ThresholdChanged | None:
    """A small adaptive policy: a lower threshold where too much is let through."""
    missed, now = state.feedback.overall.false_negative_rate, state.thresholds.current
    if missed.rate is None or missed.rate <= MISSED_AT_MOST or not now:
        return None
    return ThresholdChanged(
        id=f"stricter-than-{now[0].version}",
        scope=now[0].scope,
        level=now[0].level,
        old=now[0].value,
        new=round(now[0].value - THRESHOLD_STEP, 2),
        cause=f"{missed.numerator} of {missed.denominator} were let through",
    )


async def adapt(ledger: Ledger, tenant: str) -> None:
    """Closes the loop: reads a state, appends what the policy makes of it, sees it in the next."""
    async with StateReader(ledger) as reader:
        before = await reader.governance(tenant)
        change = stricter(before)
        if change is None:
            sys.exit(f"{tenant}: the policy found nothing to change")
        receipt = await ledger.append(tenant, change)
        await Projector(ledger).run_once([tenant])
        after = await reader.governance(tenant, at_least=receipt)
        threshold = after.thresholds.of(change.scope, change.level)
        then = await reader.governance(tenant, as_of=before.seq)
    if threshold is None or threshold.value != change.new or then != _as_folded(before):
        sys.exit(f"{tenant}: the next state does not show the new threshold, or the past moved")
    console.print(
        f"a policy read that {change.cause}, and made {change.scope} stricter: {change.old} → "
        f"{threshold.value}, version {threshold.version}; seq {after.seq} shows it, and the state "
        f"as of seq {then.seq} is what it was"
    )


def _as_folded(state: GovernanceState) -> GovernanceState:
    return msgspec.structs.replace(state, source="folded")


async def demo() -> None:
    """The whole way."""
    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    assert me is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, me.cancel)
    events = shipped_events()
    days_back = days_ahead(events)
    if days_back:
        console.print(f"this clock is behind the events: they are moved back by {days_back} days")
    tallies: dict[str, Tally] = {}
    for event in events:
        tallies.setdefault(event["tenant"], Tally([])).ids.append(event["id"])
    speeds = Speeds()
    async with embedded_server() as server:
        console.print(f"an embedded Valkey server runs on {server.data_dir}")
        async with Ledger.connect(server.url) as ledger:
            url = f"embedded://{server.data_dir}"
            states = await append_and_fold(ledger, url, tallies, days_back, speeds)
            console.print(state_table(states))
            chosen = next(iter(states.values()))
            await replay_and_compare(ledger, chosen, tallies[chosen.tenant].ids, speeds)
            await adapt(ledger, chosen.tenant)
    console.print(speeds.table)
    console.print("the server has stopped, and its directory is gone")


def main() -> int:
    """Runs the demo, or one of its writers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    spare_gc()
    try:
        if asked.write:
            url, first, again, days_back = asked.write
            asyncio.run(write(url, first, again, int(days_back)))
        else:
            asyncio.run(demo())
    except KeyboardInterrupt:
        console.print("stopped; nothing is left behind")
        return 130
    except asyncio.CancelledError:
        return 143
    except (errors.LedgerError, ExceptionGroup) as error:
        first = _first(error)
        if not isinstance(first, errors.LedgerError):
            raise
        sys.exit(f"error: {first.message}\nhint: {first.hint}")
    return 0


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
