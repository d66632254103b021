"""The past: what a fold says of any seq or time is what was committed then, byte for byte."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledger import (
    Decision,
    EscalationResolved,
    EscalationVoted,
    Feedback,
    Ledger,
    Outcome,
    Overridden,
    errors,
    keys,
)
from projections import Projector, StateReader
from projections.governance import Governance
from projections.history import PastStore, fold_to
from projections.snapshots import SNAPSHOTS_KEPT, Kept, snapshot_is_due, spare
from projections.store import FoldStore, encode_entity
from tests.servers import new_tenant

GOVERNANCE = Governance()


@pytest.fixture
async def ledger(server):
    async with Ledger.connect(server.url) as opened:
        yield opened


@pytest.fixture
def often(monkeypatch):
    """Snapshots every fourth entry, and no more than three of them."""
    monkeypatch.setattr("projections.snapshots.MIN_ENTRIES", 4)
    monkeypatch.setattr("projections.snapshots.SNAPSHOTS_KEPT", 3)
    monkeypatch.setattr("projections.store.SNAPSHOT_FIELDS_A_CALL", 2)


def decision(number, verdict="escalate"):
    return Decision(id=f"d-{number}", agent="a", action="act", verdict=verdict)


def history(choices):
    """Events, most of which follow a decision that may lie far back."""
    events, made = [], 0
    for choice, back in choices:
        if choice == 0 or not made:
            events.append(decision(made, ("escalate", "deny", "allow")[back % 3]))
            made += 1
            continue
        named = f"d-{back % (made + 1)}"  # the last of these is not recorded yet
        events.append(
            (
                Outcome(decision_id=named, outcome="failed"),
                EscalationVoted(decision_id=named, reviewer=f"r-{back % 3}", approve=back % 2 == 0),
                EscalationResolved(decision_id=named, resolution="approved", reviewer="r"),
                Feedback(decision_id=named, reviewer=f"r-{back % 4}", feedback="negative"),
                Overridden(
                    decision_id=named,
                    reviewer="r",
                    from_verdict="deny",
                    to_verdict="allow",
                    justification="j",
                ),
            )[choice % 5]
        )
    return events


async def committed(ledger, tenant):
    """The committed `state` and every other entity, as bytes."""
    store = FoldStore(ledger.server, tenant, GOVERNANCE)
    at, _ = await store.committed()
    key = keys.projection(tenant, "governance", 1)
    state = await ledger.server.command(key, "HGET", key, "state")
    return at.position, state


def encoded(entities):
    return {name: encode_entity(entity) for name, entity in entities.items()}


CHOICES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), min_size=8, max_size=40)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=CHOICES, sizes=st.lists(st.integers(1, 7), min_size=40, max_size=40))
async def test_as_of_n_is_what_was_committed_when_the_head_was_n(valkey, often, choices, sizes):
    """For generated histories, appended and folded bit by bit while snapshots are made and dropped:
    the state and every entity as of each head are the bytes that were committed then; so are those
    of a fold from the first entry, and as of a time.
    """
    events, names = history(choices), [f"decision:d-{n}" for n in range(45)]
    async with Ledger.connect(valkey.url) as ledger:
        tenant, projector = new_tenant(), Projector(ledger, [GOVERNANCE])
        store = FoldStore(ledger.server, tenant, GOVERNANCE)
        kept = {}
        for size in sizes:
            if not events:
                break
            part, events = events[:size], events[size:]
            await ledger.append_many(tenant, part)
            await projector.run_once([tenant])
            position, state = await committed(ledger, tenant)
            kept[position.seq] = position, state, encoded(await store.load(dict.fromkeys(names, 0)))
        snapshots = await store.snapshots()
        assert len(snapshots) <= 3
        for seq, (position, state, entities) in kept.items():
            past = await fold_to(ledger.server, tenant, GOVERNANCE, seq, names=names)
            assert past.position == position
            assert encode_entity(past.state) == state
            assert encoded(past.entities) == entities
            assert past.base == max((one.seq for one in snapshots if one.seq <= seq), default=0)
        listed = keys.snapshots(tenant, "governance", 1)
        await ledger.server.command(listed, "COPY", listed, f"{listed}:aside")
        await ledger.server.command(listed, "DEL", listed)
        whole = await fold_to(ledger.server, tenant, GOVERNANCE, position.seq, names=names)
        assert (whole.base, encode_entity(whole.state)) == (0, state)
        assert encoded(whole.entities) == entities
        await ledger.server.command(listed, "COPY", f"{listed}:aside", listed)
        last_at = datetime.fromtimestamp(int(position.entry_id.split("-")[0]) / 1000, UTC)
        by_time = await fold_to(ledger.server, tenant, GOVERNANCE, last_at)
        assert encode_entity(by_time.state) == state
        await Projector(ledger, [GOVERNANCE]).rebuild(tenant)
        assert (await committed(ledger, tenant))[1] == state
        for seq, (_, state, entities) in kept.items():
            past = await fold_to(ledger.server, tenant, GOVERNANCE, seq, names=names)
            assert encode_entity(past.state) == state
            assert encoded(past.entities) == entities


async def test_as_of_equals_the_published_state_of_then(ledger, tenant):
    """The reader's as_of gives what it gave when the head was there, typed and untyped."""
    async with StateReader(ledger) as reader:
        then = {}
        for number in range(4):
            receipt = await ledger.append(tenant, decision(number))
            await Projector(ledger).run_once([tenant])
            then[receipt.seq] = await reader.state(tenant), receipt
        for seq, (published, receipt) in then.items():
            past = await reader.state(tenant, as_of=seq)
            assert (past.value, past.position) == (published.value, published.position)
            assert (past.source, past.updated_at) == ("folded", None)
            typed = await reader.governance(tenant, as_of=seq, head=True)
            assert (typed.decisions.total, typed.position) == (seq, receipt.position)
            assert (typed.source, typed.behind) == ("folded", 4 - seq)
        first = then[1][1].recorded_at
        assert (await reader.governance(tenant, as_of=first)).seq >= 1
        later = datetime.now(UTC) + timedelta(hours=1)
        assert (await reader.governance(tenant, as_of=later)).seq == 4
        with pytest.raises(errors.NotFound, match="nothing was recorded by"):
            await reader.governance(tenant, as_of=first - timedelta(milliseconds=1))
        for seq in (0, 5, -1):
            with pytest.raises(errors.NotFound, match=f"seq {seq} is not recorded"):
                await reader.governance(tenant, as_of=seq)
        with pytest.raises(errors.NotFound, match="nothing is recorded"):
            await reader.governance(f"{tenant}-new", as_of=later)
        with pytest.raises(errors.InvalidInput, match="time zone"):
            await reader.governance(tenant, as_of=datetime(2026, 1, 1))  # noqa: DTZ001
        with pytest.raises(errors.InvalidInput, match="together"):
            await reader.governance(tenant, as_of=1, at_least=1)
        for wrong in ("2026-01-01", later.date(), 1.0, True):
            for name in ("as_of", "at_least"):
                for read in (reader.governance, reader.state):
                    with pytest.raises(errors.InvalidInput, match=f"{name}: .*is neither a seq"):
                        await read(tenant, **{name: wrong})


async def test_as_of_goes_by_recorded_time_and_counts_foreign_ordinals(ledger, server, tenant):
    """An event that says of itself that it is old belongs to when it was recorded; a foreign entry
    moves the position alone.
    """
    late = Decision(agent="a", action="b", verdict="deny", at=datetime.now(UTC) - timedelta(days=3))
    await ledger.append(tenant, decision(1))
    server.cli("XADD", keys.decisions(tenant), "*", "x", "y")
    receipt = await ledger.append(tenant, late)
    assert receipt.seq == 3
    async with StateReader(ledger) as reader:
        assert (await reader.governance(tenant, as_of=2)).decisions.total == 1
        assert (await reader.governance(tenant, as_of=2)).seq == 2
        assert (await reader.governance(tenant, as_of=3)).decisions.by_verdict.deny == 1


async def test_a_hole_is_no_past(ledger, server, tenant):
    """A deleted entry is an error of every as_of behind it, never a smaller count."""
    receipts = await ledger.append_many(tenant, [decision(n) for n in range(5)])
    server.cli("XDEL", keys.decisions(tenant), receipts[2].entry_id)
    async with StateReader(ledger) as reader:
        assert (await reader.governance(tenant, as_of=2)).seq == 2
        with pytest.raises(errors.EntriesMissing, match="seq 3"):
            await reader.governance(tenant, as_of=4)


@pytest.mark.parametrize("damage", ["base", "later", "state", "list"])
async def test_snapshots_that_somebody_deleted_are_not_believed(
    ledger, server, tenant, often, damage
):
    """Where a snapshot, or one that it relies on, is gone, the fold begins elsewhere."""
    projector = Projector(ledger, [GOVERNANCE])
    for start in range(0, 12, 4):
        await ledger.append_many(tenant, [decision(n) for n in range(start, start + 4)])
        await projector.run_once([tenant])
    for number in range(4):
        await ledger.append(
            tenant,
            EscalationResolved(decision_id=f"d-{number}", resolution="approved", reviewer="r"),
        )
        await projector.run_once([tenant])
    listed = keys.snapshots(tenant, "governance", 1)
    seqs = sorted(map(int, server.cli("HKEYS", listed)))
    assert seqs == [4, 8, 12] or seqs[-1] == 16
    if damage == "base":
        server.cli("DEL", keys.snapshot(tenant, "governance", 1, seqs[0]))
    elif damage == "later":
        server.cli("DEL", keys.snapshot(tenant, "governance", 1, seqs[-1]))
    elif damage == "state":
        server.cli("HDEL", keys.snapshot(tenant, "governance", 1, seqs[0]), "state")
    else:
        server.cli("DEL", listed)
    names = [f"decision:d-{n}" for n in range(4)]
    for seq in (5, 9, 13):
        past = await fold_to(ledger.server, tenant, GOVERNANCE, seq, names=names)
        resolved = max(0, seq - 12)
        assert past.state["resolutions"]["approved"] == resolved
        assert len(past.entities) == resolved


async def test_a_snapshot_that_is_dropped_while_it_is_read_is_noticed(
    ledger, tenant, often, monkeypatch
):
    """A fold whose snapshot goes meanwhile begins again, and is right."""
    projector = Projector(ledger, [GOVERNANCE])
    store = FoldStore(ledger.server, tenant, GOVERNANCE)
    await ledger.append_many(tenant, [decision(n) for n in range(4)])
    await projector.run_once([tenant])
    events = [Outcome(decision_id=f"d-{n}", outcome="failed") for n in range(4)]
    await ledger.append_many(tenant, events)
    begin, bases = PastStore.begin, []

    async def overtaken(past, *args):
        await begin(past, *args)
        bases.append(past.base and past.base.seq)
        number = 4
        while past.base in await store.snapshots():
            events = [decision(n) for n in range(number, number + 4)]
            await ledger.append_many(tenant, events)
            await projector.run_once([tenant])
            number += 4

    monkeypatch.setattr(PastStore, "begin", overtaken)
    names = [f"decision:d-{n}" for n in range(4)]
    past = await fold_to(ledger.server, tenant, GOVERNANCE, 6, names=names)
    assert past.state["outcomes"]["failed"] == 2
    assert sorted(past.entities) == names[:2]
    assert bases[0] == 4
    assert len(bases) > 1


async def test_reading_the_past_while_the_present_moves(ledger, tenant, often):
    """While a projector folds, makes and drops snapshots, the past stays as it was."""
    projector = Projector(ledger, [GOVERNANCE])
    expected = {}
    for number in range(12):
        await ledger.append(tenant, decision(number))
        await projector.run_once([tenant])
        position, state = await committed(ledger, tenant)
        expected[position.seq] = state

    async def move():
        for number in range(40):
            event = Outcome(decision_id=f"d-{number % 12}", outcome="failed")
            await ledger.append(tenant, event)
            await projector.run_once([tenant])

    moving = asyncio.create_task(move())
    looked = 0
    while not moving.done():
        for seq, state in expected.items():
            past = await fold_to(ledger.server, tenant, GOVERNANCE, seq, names=["decision:d-1"])
            assert encode_entity(past.state) == state
            assert past.entities == {}
            looked += 1
    await moving
    assert looked


async def test_a_snapshot_costs_what_changed_and_not_the_tenant(ledger, server, tenant, often):
    """With many decisions that had a follow-up, a snapshot has those alone that changed since."""
    events = [decision(n) for n in range(300)]
    events += [Outcome(decision_id=f"d-{n}", outcome="failed") for n in range(300)]
    await ledger.append_many(tenant, events)
    projector = Projector(ledger, [GOVERNANCE])
    await projector.run_once([tenant])
    again = Outcome(decision_id="d-7", outcome="blocked")
    await ledger.append(tenant, again)
    await projector.run_once([tenant])
    (latest,) = await FoldStore(ledger.server, tenant, GOVERNANCE).snapshots()
    fields = server.cli("HKEYS", keys.snapshot(tenant, "governance", 1, latest.seq))
    assert sorted(fields) == ["build", "e:decision:d-7", "position", "state"]


async def test_projections_without_snapshots_have_a_past_too(ledger, tenant):
    """A projection of one's own that keeps none is folded from its first entry."""

    class Kinds:
        name = "kinds"
        version = 1

        def names(self, entry):
            return ("state",)

        def apply(self, entities, entry, subject):
            state = entities.setdefault("state", {})
            state[entry.type] = state.get(entry.type, 0) + 1

        def quarantined(self, entities, entry):
            entities.setdefault("state", {})

        def view(self, state):
            return dict(state)

    await ledger.append_many(tenant, [decision(n) for n in range(5)])
    await Projector(ledger, [Kinds()]).run_once([tenant])
    async with aclosing(StateReader(ledger, [Kinds()])) as reader:
        assert (await reader.state(tenant, "kinds", as_of=3)).value == {"decision.recorded": 3}
    assert await FoldStore(ledger.server, tenant, Kinds()).snapshots() == []


@pytest.mark.parametrize("step", [1000, 137, 1])
def test_snapshots_stay_few_and_close(step):
    """However large a tenant gets, there are at most 64, and no two are far apart."""
    kept, seq, widest = [], 0, 0.0
    while seq < 400 * max(step, 137):
        seq += step
        if snapshot_is_due(kept, seq):
            kept.append(Kept(seq, None, "b")._replace(position=object()))
            place = spare(kept)
            if place is not None:
                del kept[place]
            seqs = [0, *(one.seq for one in kept)]
            gap = max(b - a for a, b in itertools.pairwise(seqs))
            widest = max(widest, gap / max(seq, SNAPSHOTS_KEPT * 2000))
    assert len(kept) <= SNAPSHOTS_KEPT
    assert widest < 0.035


async def test_many_entities_that_change_in_one_commit_are_all_kept(ledger, tenant, often):
    """An entry of a projection of one's own that touches more entities than one call can carry."""

    class Wide:
        name = "wide"
        version = 1
        keeps_snapshots = True

        def names(self, entry):
            return ("state", *(f"n:{n}" for n in range(2500)))

        def apply(self, entities, entry, subject):
            for name in self.names(entry):
                entities[name] = {"seq": entry.seq}

        def quarantined(self, entities, entry):
            entities.setdefault("state", {})

        def view(self, state):
            return dict(state)

    projector, wide = Projector(ledger, [Wide()]), Wide()
    for number in range(6):
        await ledger.append(tenant, decision(number))
        await projector.run_once([tenant])
    assert [one.seq for one in await FoldStore(ledger.server, tenant, wide).snapshots()] == [4]
    names = [f"n:{n}" for n in range(2500)]
    past = await fold_to(ledger.server, tenant, wide, 4, names=names)
    assert past.base == 4
    assert past.entities == {name: {"seq": 4} for name in names}
