"""What is derived from the ledger: folds, the projector that keeps them, the reader."""

from projections.agents import Agents
from projections.governance import Governance
from projections.projection import Entities, Projection, Unfoldable
from projections.projector import Projector
from projections.reader import StateReader
from projections.store import PublishedState

__all__ = [
    "Agents",
    "Entities",
    "Governance",
    "Projection",
    "Projector",
    "PublishedState",
    "StateReader",
    "Unfoldable",
]
