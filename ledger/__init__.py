"""The ledger that AI-governance systems record their decisions in.

    async with Ledger.connect() as ledger:
        receipt = await ledger.append("acgs-dev", Decision(agent="a", action="b", verdict="allow"))

The names below are all that is public here; `from projections import …` has the read side.
"""

from ledger import errors, events, sync
from ledger.append import Durability, Link, Receipt
from ledger.events import (
    Action,
    AgentRef,
    AgentRoleAssigned,
    AgentTrustAdjusted,
    ConstitutionActivated,
    Correlation,
    Decision,
    EscalationResolved,
    EscalationVoted,
    Event,
    Feedback,
    ModeChanged,
    ModelRef,
    Outcome,
    Overridden,
    PolicyActivated,
    PolicyDeactivated,
    PolicyRef,
    RuleHit,
    Threshold,
    ThresholdChanged,
    WaiverGranted,
    WaiverRevoked,
    event_from_json,
)
from ledger.ledger import Ledger
from ledger.memory import MemoryEntry, MemoryService, get_memory_service, reset_memory_service
from ledger.settings import Settings, load_settings
from ledger.stream import Entry, Head, Incident, Position

__version__ = "0.1.0"

__all__ = [
    "Action",
    "AgentRef",
    "AgentRoleAssigned",
    "AgentTrustAdjusted",
    "ConstitutionActivated",
    "Correlation",
    "Decision",
    "Durability",
    "Entry",
    "EscalationResolved",
    "EscalationVoted",
    "Event",
    "Feedback",
    "Head",
    "Incident",
    "Ledger",
    "Link",
    "MemoryEntry",
    "MemoryService",
    "ModeChanged",
    "ModelRef",
    "Outcome",
    "Overridden",
    "PolicyActivated",
    "PolicyDeactivated",
    "PolicyRef",
    "Position",
    "Receipt",
    "RuleHit",
    "Settings",
    "Threshold",
    "ThresholdChanged",
    "WaiverGranted",
    "WaiverRevoked",
    "errors",
    "event_from_json",
    "events",
    "get_memory_service",
    "load_settings",
    "reset_memory_service",
    "sync",
]
