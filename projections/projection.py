"""What a projection is: a pure fold of one tenant's entries into named entities.

The projector loads the entities that an entry names, hands them to `apply`, and commits those that
changed together with the position. So a fold never sees the whole tenant, and its cost does not
grow with the tenant. Between two chunks of entries the entities are JSON with sorted keys; nothing
that a fold reads may depend on the order of a dict's keys or on where a chunk ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["Entities", "Projection", "Subject", "Unfoldable"]

Entities = dict[str, dict[str, Any]]
"""Entities by name. JSON objects: string keys, integers below 2^53, no tuples; mutated in place."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The recorded event that a follow-up names by `decision_id`.

    Attributes:
        seq: its ordinal in the tenant's stream.
        recorded_ms: the ledger's time, in ms since 1970.
        event: its fields as they were stored.
    """

    seq: int
    recorded_ms: int
    event: dict[str, Any]


class Unfoldable(Exception):
    """An entry that this version of a projection cannot fold; `reason` says why.

    It is raised before anything was changed, and again whenever the same entry comes to the same
    entities: the entry goes to quarantine and the fold goes on.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Projection(Protocol):
    """A fold with a name and a version; a change of what it computes is a new version.

    All methods are pure: no I/O, no clock, no randomness.
    """

    name: str
    version: int

    def subject_id(self, entry: Entry) -> str | None:
        """The event id whose recorded event `apply` needs; None where it needs none."""

    def names(self, entry: Entry) -> tuple[str, ...]:
        """The entities that the entry may touch; one that is new is absent from `apply`'s dict."""

    def apply(self, entities: Entities, entry: Entry, subject: Subject | None) -> None:
        """Folds the entry into the entities it names; `subject` is None where none is recorded.

        Raises:
            Unfoldable: the entry cannot be folded; nothing was changed.
        """

    def quarantined(self, entities: Entities, entry: Entry) -> None:
        """Counts an entry that was refused. Changes only `state`; cannot fail."""

    def view(self, state: dict[str, Any]) -> dict[str, Any]:
        """The value to publish, made from the entity `state`."""
