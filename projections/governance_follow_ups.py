"""What follows a decision: votes, resolutions, overrides, outcomes, feedback.

Each touches `state` and the decision's own entity, which is made at the first follow-up.

- The effective verdict is kept in the decision's entity: a resolution sets it (approved = allow;
  rejected, expired and cancelled = deny), an override sets it for good.
- Votes: the latest of each reviewer counts while the escalation is pending; advisory votes, and
  those of the agent that asked, do not.
- Pending escalations: one is listed in `state` while fewer than 1,000 are and none is unlisted, so
  that the list is always the oldest ones; the others are counted, with the seq from which the
  stream has to be read to find them. Each closes by its decision's entity, listed or not.
- Feedback: the positive class is "an intervention (deny or escalate) is right". What is predicted
  is whether the engine's verdict is one; what is true is whether `correct_verdict` is one. Without
  it, positive feedback says that the prediction was right and negative that it was wrong. Neutral
  counts apart. Of each reviewer and decision the latest word counts; the one before is taken back.
- A precedent is what a person made of an action, by resolution or override.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from projections.governance_decision import DECISION, read_decision
from projections.governance_state import (
    FEEDBACK_COLUMNS,
    NAMES_LIMIT,
    OTHER,
    OVERRIDDEN,
    OVERRIDES,
    TP,
    VERDICT_COLUMN,
    VERDICTS,
    WITH_FEEDBACK,
    State,
    advance,
    check_ahead,
    clipped,
    count,
    digest,
    note_late,
    optional_text,
    overflow,
    reading,
    text,
)
from projections.projection import Entities, Subject, Unfoldable
from projections.windows import Moment, moment, slots

if TYPE_CHECKING:
    from ledger.stream import Entry
