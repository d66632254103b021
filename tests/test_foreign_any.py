"""Foreign hands in any order: what is ours and still there stays readable under its own number."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from msgspec import structs

from ledger import Decision, errors, keys, sync
from tests.servers import new_tenant


def decision(event_id):
    return Decision(id=event_id, at="2026-03-03T12:00:00Z", agent="a", action="b", verdict="allow")


# Not drawn from the server's state: ids have the time in them, and an example must be repeatable.
PICKS = st.integers(0, 30)


def picked(choices, pick):
    """One of the choices."""
    return choices[pick % len(choices)]


class ForeignHands(RuleBasedStateMachine):
    """Appends and repairs of ours between random acts of others on the same keys."""

    server = None

    @initialize()
    def begin(self):
        self.book = sync.Ledger.connect(self.server.url)
        self.redis = self.server.client(decode_responses=True)
        self.tenant = new_tenant()
        self.stream = keys.decisions(self.tenant)
        self.receipts = {}
        self.last_seq = self.made = 0
        self.gap = False  # in the index
        self.append_new()

    def teardown(self):
        if hasattr(self, "book"):
            try:
                self.check()
            finally:
                self.book.close()
                self.redis.close()

    def command(self, *args):
        return self.redis.execute_command(*args)

    def entries(self):
        """What is in the stream by the server's own word: entry id → fields."""
        if not self.command("EXISTS", self.stream):
            return {}
        return dict(self.command("XRANGE", self.stream, "-", "+"))

    def surviving(self):
        """The receipts of ours whose entries are still there, in order."""
        there = self.entries()
        return [r for r in self.receipts.values() if r.entry_id in there]

    @property
    def new(self):
        """Without stream, head and index the tenant is a new one."""
        names = (self.stream, keys.head(self.tenant), keys.index(self.tenant))
        if self.command("EXISTS", *names):
            return False
        self.receipts, self.last_seq, self.gap = {}, 0, False
        return True

    @property
    def headless(self):
        return not self.new and not self.command("EXISTS", keys.head(self.tenant))

    # -- ours -------------------------------------------------------------------------------------

    @rule()
    def append_new(self):
        self.made += 1
        event_id = f"e-{self.made}"
        if self.headless or self.gap:
            with pytest.raises(errors.IndexBehind):
                self.book.append(self.tenant, decision(event_id))
            return
        receipt = self.book.append(self.tenant, decision(event_id))
        assert not receipt.duplicate
        assert receipt.seq > self.last_seq
        assert receipt.seq == self.book.head(self.tenant).seq
        assert all(receipt.recorded_at >= known.recorded_at for known in self.receipts.values())
        self.receipts[event_id] = receipt
        self.last_seq = receipt.seq

    @precondition(lambda self: not (self.headless or self.gap) and self.receipts)
    @rule(pick=PICKS)
    def append_again(self, pick):
        event_id = picked(sorted(self.receipts), pick)
        first = self.receipts[event_id]
        assert self.book.append(self.tenant, decision(event_id)) == structs.replace(
            first, duplicate=True
        )

    @rule()
    def reindex(self):
        if self.new:
            with pytest.raises(errors.NotFound):
                self.book.reindex(self.tenant)
            return
        left, renumbered = self.surviving(), self.headless
        assert self.book.reindex(self.tenant) == len(left)
        epoch = self.book.head(self.tenant).epoch
        self.receipts = {
            event_id: structs.replace(receipt, epoch=epoch)
            for event_id, receipt in self.receipts.items()
            if receipt in left
        }
        if renumbered:  # a new epoch numbers from what is there
            self.last_seq = self.book.head(self.tenant).seq
        self.gap = False

    @rule()
    def check(self):
        """Read past every hole: ours alone, each once, in order, as their receipts said."""
        if self.headless:
            with pytest.raises(errors.IndexBehind):
                self.book.head(self.tenant)
            return
        if self.new:
            with pytest.raises(errors.NotFound):
                next(self.book.replay(self.tenant))
            return
        found, after = [], 0
        while True:
            try:
                for entry in self.book.replay(self.tenant, after=after):
                    found += [(entry.seq, entry.entry_id, entry.id)]
                break
            except errors.EntriesMissing as hole:
                assert hole.facts["last_seq"] > after  # noqa: PT017 - it must get on
                after = hole.facts["last_seq"]
        ids = {receipt.entry_id: event_id for event_id, receipt in self.receipts.items()}
        wanted = [(r.seq, r.entry_id, ids[r.entry_id]) for r in self.surviving()]
        assert found == wanted
        assert self.book.head(self.tenant).seq >= self.last_seq
        for seq, entry_id, event_id in wanted:
            assert self.book.get_seq(self.tenant, seq).entry_id == entry_id
            if not self.gap:
                assert self.book.get(self.tenant, event_id).seq == seq

    # -- others -----------------------------------------------------------------------------------

    @rule(count=st.integers(1, 3))
    def add(self, count):
        for _ in range(count):
            self.command("XADD", self.stream, "*", "x", "y")

    @precondition(lambda self: self.command("EXISTS", self.stream))
    @rule(ahead=st.integers(0, 5), seq=st.integers(0, 20))
    def add_with_an_id(self, ahead, seq):
        last = self.command("XINFO", "STREAM", self.stream)["last-generated-id"]
        time_ms, _, last_seq = last.partition("-")
        seq += int(last_seq) + 1 if ahead == 0 else 0
        imitation = ["type", "decision.recorded", "id", "forged", "data", "{}"]
        self.command("XADD", self.stream, f"{int(time_ms) + ahead}-{seq}", *imitation)

    @precondition(lambda self: self.command("EXISTS", self.stream))
    @rule(pick=PICKS)
    def delete_an_entry(self, pick):
        there = list(self.entries())
        if there:
            self.command("XDEL", self.stream, picked(there, pick))

    @rule(left=st.integers(0, 5))
    def trim(self, left):
        self.command("XTRIM", self.stream, "MAXLEN", "=", left)

    @precondition(lambda self: self.command("EXISTS", self.stream))
    @rule(ahead=st.integers(0, 5), added=st.integers(0, 30))
    def set_the_counters(self, ahead, added):
        info = self.command("XINFO", "STREAM", self.stream)
        time_ms, _, seq = info["last-generated-id"].partition("-")
        added = max(added, info["length"])
        self.command("XSETID", self.stream, f"{int(time_ms) + ahead}-{seq}", "ENTRIESADDED", added)

    @rule()
    def delete_the_stream(self):
        self.command("DEL", self.stream)

    @precondition(lambda self: not (self.headless or self.gap) and self.receipts)
    @rule(pick=st.none() | PICKS)
    def cut_the_index(self, pick):
        index = keys.index(self.tenant)
        if pick is None:
            self.command("DEL", index)
        else:
            self.command("HDEL", index, picked(sorted(self.receipts), pick))
        self.gap = True

    @precondition(lambda self: self.command("EXISTS", self.stream, keys.index(self.tenant)))
    @rule()
    def delete_the_head(self):
        self.command("DEL", keys.head(self.tenant))


def test_ours_stays_readable_whatever_others_do(server):
    """Adding, deleting, trimming, setting, removing: no event is lost, doubled or misnumbered."""

    class Machine(ForeignHands):
        pass

    Machine.server = server
    run_machine(Machine, settings=settings(max_examples=25, stateful_step_count=15))
