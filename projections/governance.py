"""The `governance` projection: a tenant's decisions and what followed them, as current state.

Entities: `state`, and `decision:<decision_id>` for each decision that had a follow-up. What `state`
publishes is `governance_view.view`'s; here is how it is folded.

- A *cell* is a list of counts: one a verdict, then decisions with a warning, with a violation, and
  overridden. A policy's cell goes on with its feedback matrix (`TP` and the following columns).
- A decision counts once in each cell it belongs to; what people did to it later never changes what
  the engine said. The effective verdict is kept in the decision's entity: a resolution sets it
  (approved = allow; rejected, expired and cancelled = deny), an override sets it for good.
- Feedback: the positive class is "an intervention (deny or escalate) is right". The prediction is
  whether the engine's verdict is one. The truth is whether `correct_verdict` is one; without it
  positive feedback says that the prediction was right and negative that it was wrong. Neutral counts
  apart. The latest word of each reviewer on each decision counts, and earlier ones are taken back.
- Votes: the latest of each reviewer while the escalation is pending; advisory votes and those of
  the agent that asked do not count.
- Pending escalations: one is listed in `state` while fewer than 1,000 are listed and none is
  unlisted, so the list is always the oldest ones; the others are counted, with the seq from which
  the stream has to be read to find them. Either closes by the decision's own entity.
- A follow-up whose decision is not recorded before it, or could not be folded, is an orphan.
- Names: a dimension keeps the first 256 names whose JSON is at most 128 bytes. What comes to others
  counts as `other`, as does a name that is spelt so, and `overflow` says how often that was.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from projections import governance_follow_ups as follow_ups
