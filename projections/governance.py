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
- An event is read whole before anything is changed, and counting it cannot fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from projections.governance_decision import DECISION, fold_decision
from projections.governance_follow_ups import DECISION_PREFIX, FOLLOW_UPS, fold_follow_up
from projections.governance_lifecycle import LIFECYCLE, fold_lifecycle
from projections.governance_state import MALFORMED, State, count_name, malformed, new_state
from projections.governance_view import view
from projections.projection import Entities, Subject

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["Governance"]

_STATE: Final = "state"
_STATE_ONLY: Final = (_STATE,)


class Governance:
    """Folds one tenant's governance events; the module's docstring says how."""

    name = "governance"
    version = 1

    def subject_id(self, entry: Entry) -> str | None:
        """The id of the decision that a follow-up names."""
        names = self.names(entry)
        return names[1].removeprefix(DECISION_PREFIX) if len(names) == 2 else None

    def names(self, entry: Entry) -> tuple[str, ...]:
        """`state`, and for a follow-up its decision's entity."""
        try:
            event = entry.event
            if event["type"] in FOLLOW_UPS:
                return _STATE, DECISION_PREFIX + event["decision_id"]
        except MALFORMED:
            pass  # `apply` says what is wrong with it
        return _STATE_ONLY

    def apply(self, entities: Entities, entry: Entry, subject: Subject | None) -> None:
        """Folds the entry.

        Raises:
            Unfoldable: the event is malformed, or its `at` lies ahead of the ledger's time.
        """
        state = entities.get(_STATE) or new_state()
        try:
            event = entry.event
            kind = event["type"]
            if type(kind) is not str:
                raise TypeError
        except MALFORMED as error:
            raise malformed("type", error) from None
        if kind == DECISION:
            fold_decision(state, entry, event)
        elif kind in FOLLOW_UPS:
            fold_follow_up(state, entities, entry, event, subject)
        elif kind in LIFECYCLE:
            fold_lifecycle(state, entry, event)
        else:
            count_name(state, "unknown_types", kind)
        state["events"] += 1
        entities[_STATE] = state

    def quarantined(self, entities: Entities, entry: Entry) -> None:  # noqa: ARG002 - the protocol
        """Counts an entry that was refused."""
        if _STATE not in entities:
            entities[_STATE] = new_state()
        entities[_STATE]["quarantined"] += 1

    def view(self, state: State) -> dict[str, Any]:
        """What is published: less than 256 KiB of JSON; `governance_view` says what is in it."""
        return view(state)
