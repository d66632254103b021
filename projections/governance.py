"""The `governance` projection: a tenant's decisions and what followed them, as current state.

Entities: `state`, and `decision:<decision_id>` for each decision that had a follow-up
(governance_follow_ups.py). What is published of `state` is made by governance_view.py.

- A *cell* is a list of counts: one a verdict, then decisions with a warning, with a violation, and
  overridden. A decision counts once in each cell that it belongs to (its impact level, action type,
  policies, and the buckets of its `at`); what people do later never changes what the engine said.
- A follow-up whose decision is not recorded before it, or could not be folded, is an orphan.
- A dimension keeps the first 256 names whose JSON is at most 128 bytes. What comes to any other
  name counts as `other`, as does a name that is spelt so; `overflow` says how often, and where.
- Time is the events' own `at`. No clock: whether something is overdue or expired is for readers.
- What an event has to be to be folded, bodies.py says. Beyond that a time has to be one, an `at` no
  more than five minutes ahead of the ledger's own time, and a correction has to say what is
  correct. What is not so is refused before anything is changed; counting cannot fail.
- An event of a type that is not known here is counted by its type, and not read further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from projections.bodies import FOLLOW_UPS, Decision, FollowUp, Unknown, read, subject_id
from projections.governance_decision import decision_counter, keep_recent
from projections.governance_follow_ups import fold_follow_up
from projections.governance_lifecycle import fold_lifecycle
from projections.governance_state import State, count_name, new_state
from projections.governance_view import view
from projections.projection import DECISION_PREFIX, STATE, Entities, Unfoldable

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["Governance"]


class Governance:
    """Folds one tenant's governance events; the module's docstring says how."""

    name = "governance"
    version = 1
    naming = FOLLOW_UPS
    wants_subjects = True
    keeps_snapshots = True

    def names(self, entry: Entry) -> tuple[str, ...]:
        """A follow-up's decision."""
        if entry.raw_fields[1] not in FOLLOW_UPS:
            return ()
        body = entry.memo
        decision_id = subject_id(entry) if body is None else body.decision_id
        return () if decision_id is None else (DECISION_PREFIX + decision_id,)

    def apply(self, entities: Entities, entry: Entry, subject: Entry | None) -> None:
        """Folds the entry.

        Raises:
            Unfoldable: it is not what the module's docstring says.
        """
        state = entities[STATE] if STATE in entities else new_state()
        refused = _fold(state, entities, [entry], [subject])
        if refused:
            raise Unfoldable(refused[entry.seq])
        entities[STATE] = state

    def apply_all(
        self, entities: Entities, entries: Sequence[Entry], subjects: Sequence[Entry | None]
    ) -> dict[int, str]:
        """The same for many entries, and counts those that were refused; by seq, why."""
        if STATE not in entities:
            entities[STATE] = new_state()
        state = entities[STATE]
        refused = _fold(state, entities, entries, subjects)
        state["quarantined"] += len(refused)
        return refused

    def quarantined(self, entities: Entities, entry: Entry) -> None:  # noqa: ARG002 - the protocol
        """Counts an entry that was refused."""
        if STATE not in entities:
            entities[STATE] = new_state()
        entities[STATE]["quarantined"] += 1

    def view(self, state: State) -> dict[str, Any]:
        """What is published: less than 256 KiB of JSON; `governance_view` says what is in it."""
        return view(state)


def _fold(
    state: State,
    entities: Entities,
    entries: Sequence[Entry],
    subjects: Sequence[Entry | None],
) -> dict[int, str]:
    refused: dict[int, str] = {}
    count_decision = decision_counter(state)
    for entry, subject in zip(entries, subjects, strict=True):
        try:
            body = entry.memo or read(entry)
            if type(body) is Decision:
                count_decision(entry, body)
            elif isinstance(body, FollowUp):
                fold_follow_up(state, entities, entry, body, subject)
            elif isinstance(body, Unknown):
                count_name(state, "unknown_types", body.type)
            else:
                fold_lifecycle(state, entry, body)
            state["events"] += 1
        except Unfoldable as error:
            refused[entry.seq] = error.reason
    keep_recent(state, entries, refused)
    return refused
