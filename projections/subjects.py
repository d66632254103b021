"""The decisions that follow-ups refer to: the latest ones at hand, the others by the index."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final, TypeVar

from ledger.server import Server
from ledger.stream import Entry, find_many
from projections.bodies import DECISION, subject_id

__all__ = ["Subjects", "latest"]

KEPT: Final = 512
"""Decisions that had a follow-up, and as many that had none; up to twice as many of each."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Subjects:
    """One tenant's decisions, as one walk along its stream meets them."""

    def __init__(self, server: Server, tenant: str) -> None:
        self._server = server
        self._tenant = tenant
        self.untouched: dict[bytes, Entry] = {}
        """By event id, decisions that the walk has met and that had no follow-up since. The walk
        puts them here itself.
        """
        self._touched: dict[bytes, Entry] = {}
        self._looked_up: dict[bytes, Entry | None] = {}

    def forget(self) -> None:
        """The next walk may begin elsewhere."""
        self.untouched, self._touched, self._looked_up = {}, {}, {}

    def trim(self) -> None:
        """Bounds memory; what is dropped is found by the index."""
        self.untouched = latest(self.untouched, KEPT)
        self._touched = latest(self._touched, KEPT)
        self._looked_up = {}

    def of(self, entry: Entry) -> tuple[Entry | None, bool] | None:
        """The decision that the walk's next entry follows, recorded before it, and whether this is
        its first follow-up; None where it has to be looked up.
        """
        body = entry.memo
        decision_id = subject_id(entry) if body is None else body.decision_id
        if decision_id is None:
            return None, False
        key = decision_id.encode()
        subject = self.untouched.pop(key, None)
        if subject is not None:
            self._touched[key] = subject
            return subject, True
        if key in self._touched:
            return self._touched[key], False
        if key not in self._looked_up:
            return None
        found = self._looked_up[key]
        if found is None or found.seq >= entry.seq:
            return None, False
        self._touched[key] = found
        return found, False

    async def look_ahead(self, entries: Iterable[Entry]) -> None:
        """Looks up the decisions that the walk's next entries follow and that are not at hand.

        Raises:
            EntriesMissing, IndexBehind, Unavailable: as `Ledger.get`.
        """
        met, unmet = set[bytes](), dict[str, None]()
        for entry in entries:
            if entry.raw_fields[1] == DECISION:
                met.add(entry.raw_fields[3])
            elif (decision_id := subject_id(entry)) is not None:
                key = decision_id.encode()
                if not (key in met or key in self.untouched or key in self._touched):
                    unmet[decision_id] = None
        looked_up = self._looked_up  # of this walk: another one may begin while these are read
        looked_up |= dict.fromkeys(decision_id.encode() for decision_id in unmet)
        for found in await find_many(self._server, self._tenant, list(unmet)):
            if found.raw_fields[1] == DECISION:
                looked_up[found.raw_fields[3]] = found


def latest(kept: dict[_Key, _Value], limit: int) -> dict[_Key, _Value]:
    """The dict, or where it has twice as many entries its `limit` latest ones."""
    if len(kept) <= 2 * limit:
        return kept
    return dict(islice(kept.items(), len(kept) - limit, None))
