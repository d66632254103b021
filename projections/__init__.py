"""What is derived from the ledger: folds, the projector that keeps them, the reader."""

from projections import sync
from projections.agents import Agents
from projections.governance import Governance
from projections.projection import Entities, Projection, Unfoldable
from projections.projector import Projector
from projections.reader import StateReader
from projections.state_model import AgentState, EffectiveVerdict, GovernanceState
from projections.store import PublishedState

__all__ = [
    "AgentState",
    "Agents",
    "EffectiveVerdict",
    "Entities",
    "Governance",
    "GovernanceState",
    "Projection",
    "Projector",
    "PublishedState",
    "StateReader",
    "Unfoldable",
    "sync",
]
