"""What follows a decision: votes, resolutions, overrides, outcomes, feedback.

Each touches `state` and the decision's own entity. That holds only what follow-ups added: `outcome`
(the latest), `votes` by reviewer, `resolution`, `overrides` (how many), `effective_verdict` (where
it is not the engine's own any more), `feedback` (by reviewer, a column of the matrix). With one
follow-up it is some 35 bytes of JSON, under a name of 9 bytes and the decision's id.

- The effective verdict: a resolution sets it (approved = allow; rejected, expired and cancelled =
  deny), an override sets it for good.
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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import orjson

from projections.governance_decision import DECISION, read_decision
from projections.governance_state import (
    FEEDBACK,
    FUTURE_LIMIT_MS,
    MALFORMED,
    NAMES_LIMIT,
    OTHER,
    OUTCOMES,
    OVERRIDDEN,
    PRECEDENTS_LIMIT,
    RESOLUTIONS,
    VERDICT_COLUMN,
    VERDICTS,
    WITH_FEEDBACK,
    State,
    advance,
    cell_of,
    clipped,
    count_name,
    malformed,
    moment_of,
    note_late,
    note_overflow,
    one_of,
    shown_name,
    text,
)
from projections.projection import Entities, Subject, Unfoldable
from projections.windows import KNOWN_MOMENTS, moment, slots

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["DECISION_PREFIX", "FOLLOW_UPS", "fold_follow_up"]

DECISION_PREFIX: Final = "decision:"

Body = tuple[Any, ...]
"""What a reader took from an event, in the order in which its counter unpacks it."""

_PRECEDENT_KEY_LIMIT: Final = 512
"""Characters; what is longer is made of clipped parts."""
_INTERVENTIONS: Final = ("deny", "escalate")
_REVIEWER_KINDS: Final = ("human", "service", "advisory")
_TP, _FP, _TN, _FN, _NEUTRAL = range(5)

_Columns = tuple[int, int]
"""The matrix column where the engine did not intervene, and the one where it did."""
_RIGHT: Final[_Columns] = (_TN, _TP)
_WRONG: Final[_Columns] = (_FN, _FP)
_BY_CORRECT: Final[dict[str | None, _Columns]] = {
    verdict: (_FN, _TP) if verdict in _INTERVENTIONS else (_TN, _FP) for verdict in VERDICTS
}
_FEEDBACK_COLUMNS: Final[dict[str, dict[str | None, _Columns]]] = {
    "positive": {None: _RIGHT, **_BY_CORRECT},
    "negative": {None: _WRONG, **_BY_CORRECT},
    "neutral": dict.fromkeys((None, *VERDICTS), (_NEUTRAL, _NEUTRAL)),
    "correction": _BY_CORRECT,
}
"""By the word and the verdict that is said to be correct, which a correction must name."""


def fold_follow_up(
    state: State,
    entities: Entities,
    entry: Entry,
    event: dict[str, Any],
    subject: Subject | None,
) -> None:
    """Counts what followed a decision; as an orphan where no such decision counts.

    Raises:
        Unfoldable: it is malformed, or its `at` lies ahead of the ledger's time.
    """
    kind = event["type"]
    read, count = FOLLOW_UPS[kind]
    try:
        name = DECISION_PREFIX + event["decision_id"]
        body = read(event)
        at = KNOWN_MOMENTS.get(event.get("at", "")) or moment_of(entry, event)
    except MALFORMED as error:
        raise malformed(kind, error) from None
    if at[0] > state["newest_ms"]:
        advance(state, entry, at)
    decision = entities.get(name)
    if subject is None or subject.seq >= entry.seq:
        decision = None
    elif decision is None and _was_folded(state, entry, subject):
        decision = {}
    if decision is None or subject is None:
        state["orphans"][kind] += 1
        return
    count(state, entry, subject, decision, body)
    if decision:
        entities[name] = decision


def _was_folded(state: State, entry: Entry, subject: Subject) -> bool:
    """Whether the subject is a decision, and not in quarantine itself."""
    event = subject.event
    if event.get("type") != DECISION:
        return False
    if state["events"] == entry.seq - 1:
        return True  # every entry before this one was folded, so this one too
    try:
        read_decision(event)
        at = event.get("at")
        return at is None or moment(at)[0] <= subject.recorded_ms + FUTURE_LIMIT_MS
    except (*MALFORMED, Unfoldable):
        return False


def _policy_names(state: State, subject: Subject) -> list[str]:
    """The names under which the decision's policies count, each once."""
    names: list[str] = []
    known = state["policies"]
    for policy in subject.event.get("policies") or ():
        key = policy["id"] + "@" + policy["version"]
        name = key if key in known else OTHER
        if name not in names:
            names.append(name)
    return names


# -- votes and resolutions ------------------------------------------------------------------------


def _read_vote(event: dict[str, Any]) -> Body:
    kind = "human"
    if "reviewer_kind" in event:
        kind = one_of(event, "reviewer_kind", _REVIEWER_KINDS)
    approve = event["approve"]
    if type(approve) is not bool:
        raise TypeError
    return text(event, "reviewer"), kind, approve


def _is_pending(decision: dict[str, Any], subject: Subject) -> bool:
    return subject.event["verdict"] == "escalate" and "resolution" not in decision


def _count_vote(
    state: State, _entry: Entry, subject: Subject, decision: dict[str, Any], body: Body
) -> None:
    reviewer, kind, approve = body
    if not _is_pending(decision, subject):
        state["conflicts"]["vote_not_pending"] += 1
        return
    if kind == "advisory":
        state["votes"]["advisory"] += 1
        return
    if reviewer == subject.event["agent"]["id"]:
        state["votes"]["own_action"] += 1
        return
    state["votes"]["approve" if approve else "reject"] += 1
    votes, key = decision.setdefault("votes", {}), clipped(reviewer)
    if len(votes) < NAMES_LIMIT or key in votes:
        votes[key] = approve
    else:
        note_overflow(state, "reviewers_of_a_decision")
    listed = state["pending"].get(subject.event["id"])
    if listed is not None:
        listed["approvals"] = sum(votes.values())
        listed["rejections"] = len(votes) - listed["approvals"]


def _read_resolution(event: dict[str, Any]) -> Body:
    return (one_of(event, "resolution", RESOLUTIONS),)


def _count_resolution(
    state: State, entry: Entry, subject: Subject, decision: dict[str, Any], body: Body
) -> None:
    (resolution,) = body
    if not _is_pending(decision, subject):
        state["conflicts"]["resolution_not_pending"] += 1
        return
    decision["resolution"] = resolution
    state["resolutions"][resolution] += 1
    if state["pending"].pop(subject.event["id"], None) is None:
        state["pending_unlisted"] -= 1
        if not state["pending_unlisted"]:
            state["pending_unlisted_from_seq"] = None
    if "overrides" not in decision:
        _set_effective(state, subject, decision, "allow" if resolution == "approved" else "deny")
    if resolution in ("approved", "rejected"):
        _keep_precedent(state, entry, subject, decision)


def _set_effective(state: State, subject: Subject, decision: dict[str, Any], verdict: str) -> None:
    before = decision.get("effective_verdict", subject.event["verdict"])
    decision["effective_verdict"] = verdict
    change = state["effective_change"]
    change[VERDICT_COLUMN[before]] -= 1
    change[VERDICT_COLUMN[verdict]] += 1


def _keep_precedent(state: State, entry: Entry, subject: Subject, decision: dict[str, Any]) -> None:
    """By the action's type, resource and `args_hash`; without the last there is none."""
    action = subject.event["action"]
    args_hash, resource = action.get("args_hash"), action.get("resource") or ""
    if type(args_hash) is not str or type(resource) is not str:
        return
    known = [action["type"], resource, args_hash]
    key = orjson.dumps(known).decode()
    if len(key) > _PRECEDENT_KEY_LIMIT:
        key = orjson.dumps([clipped(part) for part in known]).decode()
    precedents = state["precedents"]
    times = precedents[key]["times"] if key in precedents else 0
    precedents[key] = {
        "effective_verdict": decision["effective_verdict"],
        "times": times + 1,
        "decision_id": subject.event["id"],
        "seq": entry.seq,
    }
    if len(precedents) >= 2 * PRECEDENTS_LIMIT:
        by_age = sorted(precedents, key=lambda key: int(precedents[key]["seq"]))
        for old in by_age[:PRECEDENTS_LIMIT]:
            del precedents[old]


# -- overrides ------------------------------------------------------------------------------------


def _read_override(event: dict[str, Any]) -> Body:
    return (
        text(event, "reviewer"),
        one_of(event, "from_verdict", VERDICTS),
        one_of(event, "to_verdict", VERDICTS),
    )


def _count_override(
    state: State, entry: Entry, subject: Subject, decision: dict[str, Any], body: Body
) -> None:
    reviewer, before, after = body
    verdict = subject.event["verdict"]
    if before not in (verdict, decision.get("effective_verdict", verdict)):
        state["conflicts"]["override_from_mismatch"] += 1
    state["overrides"] += 1
    decision["overrides"] = decision.get("overrides", 0) + 1
    _set_effective(state, subject, decision, after)
    directions, direction = state["override_directions"], f"{before}→{after}"
    directions[direction] = directions.get(direction, 0) + 1
    count_name(state, "override_reviewers", reviewer)
    names = _policy_names(state, subject)
    by_policy = state["override_policies"]
    for name in names:
        by_policy[name] = by_policy.get(name, 0) + 1
    if decision["overrides"] == 1:
        _count_overridden(state, entry, subject, names)
    _keep_precedent(state, entry, subject, decision)


def _count_overridden(
    state: State, entry: Entry, subject: Subject, policy_names: list[str]
) -> None:
    """A decision is overridden once, in the buckets of its first override."""
    event, newest_ms, rings = subject.event, state["newest_ms"], state["policy_windows"]
    at = moment_of(entry, entry.event)
    action = shown_name(state, "action_types", event["action"]["type"])
    cells = slots(state["minutes"], state["hours"], at, newest_ms)
    cells.append(state["impact_levels"][event.get("impact_level") or "unset"])
    cells.append(cell_of(state, "action_types", action))
    for name in policy_names:
        cells.append(cell_of(state, "policies", name))
        if name in rings:
            cells += slots(None, rings[name], at, newest_ms)
    for cell in cells:
        cell[OVERRIDDEN] += 1
    note_late(state, at)


# -- outcomes and feedback ------------------------------------------------------------------------


def _read_outcome(event: dict[str, Any]) -> Body:
    return (one_of(event, "outcome", OUTCOMES),)


def _count_outcome(
    state: State, _entry: Entry, _subject: Subject, decision: dict[str, Any], body: Body
) -> None:
    (outcome,) = body
    state["outcomes"][outcome] += 1
    decision["outcome"] = outcome


def _read_feedback(event: dict[str, Any]) -> Body:
    columns = _FEEDBACK_COLUMNS[event["feedback"]][event.get("correct_verdict")]
    return text(event, "reviewer"), columns


def _count_feedback(
    state: State, _entry: Entry, subject: Subject, decision: dict[str, Any], body: Body
) -> None:
    reviewer, columns = body
    state["feedback_events"] += 1
    given, key = decision.setdefault("feedback", {}), clipped(reviewer)
    before, first = given.get(key), not given
    if before is None and len(given) >= NAMES_LIMIT:
        note_overflow(state, "reviewers_of_a_decision")
        return
    after = columns[subject.event["verdict"] in _INTERVENTIONS]
    given[key] = after
    _count_in_matrix(state["feedback"], before, after, first=first)
    by_policy = state["feedback_policies"]
    for name in _policy_names(state, subject):
        if name not in by_policy:
            by_policy[name] = [0] * len(FEEDBACK)
        _count_in_matrix(by_policy[name], before, after, first=first)


def _count_in_matrix(matrix: list[int], before: int | None, after: int, *, first: bool) -> None:
    if before is not None:
        matrix[before] -= 1
    matrix[after] += 1
    if first:
        matrix[WITH_FEEDBACK] += 1


_Reader = Callable[[dict[str, Any]], Body]
_Counter = Callable[[State, "Entry", Subject, dict[str, Any], Body], None]

FOLLOW_UPS: Final[dict[str, tuple[_Reader, _Counter]]] = {
    "escalation.voted": (_read_vote, _count_vote),
    "escalation.resolved": (_read_resolution, _count_resolution),
    "decision.overridden": (_read_override, _count_override),
    "outcome.reported": (_read_outcome, _count_outcome),
    "feedback.recorded": (_read_feedback, _count_feedback),
}
"""By event type: what reads the body, and what counts it."""
