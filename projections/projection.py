"""What a projection is: a pure fold of one tenant's entries into named entities.

The projector loads the entities that an entry names, hands them to `apply`, and commits those that
changed together with the position. So a fold never sees the whole tenant, and its cost does not
grow with the tenant. Between two chunks of entries the entities are JSON with sorted keys; nothing
that a fold reads may depend on the order of a dict's keys or on where a chunk ended.

A fold reads an entry as `entry.event`, a dict, or by `bodies.read`, which is three times as fast.
Either raises where the entry's data cannot be read; what is raised so quarantines the entry.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = [
    "DECISION_PREFIX",
    "STATE",
    "CopiedEntities",
    "Entities",
    "PageProjection",
    "Projection",
    "Unfoldable",
]

STATE: Final = "state"
"""The entity that every entry may touch, and that is published."""

DECISION_PREFIX: Final = "decision:"
"""`decision:<id>` is the entity of a recorded decision, and of nothing else: it begins with the
decision's first follow-up, so before that nobody looks for it."""

Entities = dict[str, dict[str, Any]]
"""Entities by name. JSON objects: string keys, integers below 2^53, no tuples; mutated in place."""


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

    def names(self, entry: Entry) -> Sequence[str]:
        """The entities that the entry may touch beside `state`; those that are new are absent from
        `apply`'s dict, and so is `state` at first.
        """

    def apply(self, entities: Entities, entry: Entry, subject: Entry | None) -> None:
        """Folds the entry into the entities it names.

        `subject` is the decision that the entry's `decision_id` names, recorded before it: None
        where there is none.

        Raises:
            Unfoldable: the entry cannot be folded; nothing was changed.
        """

    def quarantined(self, entities: Entities, entry: Entry) -> None:
        """Counts an entry that was refused. Changes only `state`; cannot fail."""

    def view(self, state: dict[str, Any]) -> dict[str, Any]:
        """The value to publish, made from the entity `state`."""


@runtime_checkable
class PageProjection(Projection, Protocol):
    """A projection that folds many entries at once, in less time than one after the other."""

    naming: Container[bytes]
    """The types, as they stand in the stream, of the entries for which `names` names anything."""

    wants_subjects: bool
    """Whether the decisions that entries follow are looked up; without, all subjects are None."""

    def apply_all(
        self, entities: Entities, entries: Sequence[Entry], subjects: Sequence[Entry | None]
    ) -> dict[int, str]:
        """What `apply` for each entry and `quarantined` for each that it refuses would do; why
        which were refused, by seq.
        """


@runtime_checkable
class CopiedEntities(Projection, Protocol):
    """A projection of which more than `state` is published: entities, each under its own key."""

    def entity_key(self, tenant: str, name: str) -> str | None:
        """The key of the entity's published copy; None where it has none."""

    def entity_view(self, name: str, entity: dict[str, Any]) -> dict[str, Any]:
        """The value to publish of an entity."""
