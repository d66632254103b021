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

from projections.bodies import (
    Action,
    Decision,
    EscalationResolved,
    EscalationVoted,
    Feedback,
    FollowUp,
    Outcome,
    Overridden,
    read,
)
from projections.governance_decision import count_overridden, decided_at, policy_names
from projections.governance_state import (
    FEEDBACK,
    FUTURE_LIMIT_MS,
    NAMES_LIMIT,
    PRECEDENTS_LIMIT,
    VERDICT_COLUMN,
    VERDICTS,
    WITH_FEEDBACK,
    State,
    advance,
    clipped,
    count_name,
    moment_of,
    ms_of,
    note_overflow,
    shown_name,
)
from projections.projection import DECISION_PREFIX, Entities, Unfoldable

if TYPE_CHECKING:
    from ledger.stream import Entry

__all__ = ["Followed", "effective_verdict", "fold_follow_up"]

Followed = dict[str, Any]
"""A decision's entity."""

_PRECEDENT_KEY_LIMIT: Final = 512
"""Characters; what is longer is made of clipped parts."""
_INTERVENTIONS: Final = ("deny", "escalate")
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
    state: State, entities: Entities, entry: Entry, body: Any, subject: Entry | None
) -> None:
    """Counts what followed a decision; as an orphan where no such decision counts.

    Raises:
        Unfoldable: its `at` is no time or lies ahead of the ledger's, or it is a correction that
            does not say what would be correct.
    """
    kind = type(body)
    if kind is Feedback and body.correct_verdict not in _FEEDBACK_COLUMNS[body.feedback]:
        raise Unfoldable("feedback.recorded: a correction without `correct_verdict`")
    ms = ms_of(entry, body)
    if ms > state["newest_ms"]:
        advance(state, entry, ms)
    decision = None
    if subject is not None:
        decision = subject.memo
        # Where every entry before this one was folded, so was its subject.
        if type(decision) is not Decision or state["events"] != entry.seq - 1:
            decision = _folded(state, entry, subject)
    if decision is None:
        state["orphans"][entry.type] += 1
        return
    name = DECISION_PREFIX + body.decision_id
    followed = entities.get(name)
    if followed is not None:
        _COUNT[kind](state, decision, followed, body, entry)
        return
    followed = {}
    _COUNT[kind](state, decision, followed, body, entry)
    if followed:
        entities[name] = followed


def effective_verdict(verdict: str, followed: Followed | None) -> str:
    """What counts of a decision, given the engine's verdict and the decision's entity.

    The entity is None where nothing that was folded follows the decision.
    """
    effective: str = (followed or {}).get("effective_verdict", verdict)
    return effective


def _folded(state: State, entry: Entry, subject: Entry) -> Decision | None:
    """The subject's body; None where it is no decision, or in quarantine itself."""
    try:
        decision = read(subject)
        if not isinstance(decision, Decision):
            return None
        if state["events"] == entry.seq - 1:
            return decision
        latest_ms = subject.recorded_ms + FUTURE_LIMIT_MS
        return decision if decided_at(subject, decision)[0] <= latest_ms else None
    except Unfoldable:
        return None


def _shown_policies(state: State, decision: Decision) -> list[str]:
    """The names under which the decision's policies count, each once."""
    known, names = state["policies"], policy_names(decision)
    if len(names) == 1 and names[0] in known:
        return names
    return list(dict.fromkeys(shown_name(state, "policies", name) for name in names))


# -- votes and resolutions ------------------------------------------------------------------------


def _is_pending(followed: Followed, decision: Decision) -> bool:
    return decision.verdict == "escalate" and "resolution" not in followed


def _count_vote(
    state: State,
    decision: Decision,
    followed: Followed,
    body: EscalationVoted,
    _entry: Entry,
) -> None:
    if not _is_pending(followed, decision):
        state["conflicts"]["vote_not_pending"] += 1
        return
    if body.reviewer_kind == "advisory":
        state["votes"]["advisory"] += 1
        return
    if body.reviewer == decision.agent.id:
        state["votes"]["own_action"] += 1
        return
    state["votes"]["approve" if body.approve else "reject"] += 1
    votes, key = followed.setdefault("votes", {}), clipped(body.reviewer)
    if len(votes) < NAMES_LIMIT or key in votes:
        votes[key] = body.approve
    else:
        note_overflow(state, "reviewers_of_a_decision")
    listed = state["pending"].get(body.decision_id)
    if listed is not None:
        listed["approvals"] = sum(votes.values())
        listed["rejections"] = len(votes) - listed["approvals"]


def _count_resolution(
    state: State,
    decision: Decision,
    followed: Followed,
    body: EscalationResolved,
    entry: Entry,
) -> None:
    if not _is_pending(followed, decision):
        state["conflicts"]["resolution_not_pending"] += 1
        return
    resolution = followed["resolution"] = body.resolution
    state["resolutions"][resolution] += 1
    if state["pending"].pop(body.decision_id, None) is None:
        state["pending_unlisted"] -= 1
        if not state["pending_unlisted"]:
            state["pending_unlisted_from_seq"] = None
    if "overrides" not in followed:
        _set_effective(state, decision, followed, "allow" if resolution == "approved" else "deny")
    if resolution in ("approved", "rejected"):
        _keep_precedent(state, entry.seq, decision, followed, body.decision_id)


def _set_effective(state: State, decision: Decision, followed: Followed, verdict: str) -> None:
    before = followed.get("effective_verdict", decision.verdict)
    followed["effective_verdict"] = verdict
    change = state["effective_change"]
    change[VERDICT_COLUMN[before]] -= 1
    change[VERDICT_COLUMN[verdict]] += 1


def _keep_precedent(
    state: State, seq: int, decision: Decision, followed: Followed, decision_id: str
) -> None:
    """By the action's type, resource and `args_hash`; without the last there is none."""
    action = decision.action
    if action.args_hash is None:
        return
    key, precedents = _precedent_key(action, action.args_hash), state["precedents"]
    times = precedents[key]["times"] if key in precedents else 0
    precedents[key] = {
        "effective_verdict": followed["effective_verdict"],
        "times": times + 1,
        "decision_id": decision_id,
        "seq": seq,
    }
    if len(precedents) >= 2 * PRECEDENTS_LIMIT:
        by_age = sorted(precedents, key=lambda key: int(precedents[key]["seq"]))
        for old in by_age[:PRECEDENTS_LIMIT]:
            del precedents[old]


def _precedent_key(action: Action, args_hash: str) -> str:
    known = [action.type, action.resource or "", args_hash]
    key = orjson.dumps(known).decode()
    if len(key) > _PRECEDENT_KEY_LIMIT:
        key = orjson.dumps([clipped(part) for part in known]).decode()
    return key


# -- overrides ------------------------------------------------------------------------------------


def _count_override(
    state: State,
    decision: Decision,
    followed: Followed,
    body: Overridden,
    entry: Entry,
) -> None:
    before, verdict = body.from_verdict, decision.verdict
    if before not in (verdict, followed.get("effective_verdict", verdict)):
        state["conflicts"]["override_from_mismatch"] += 1
    state["overrides"] += 1
    followed["overrides"] = followed.get("overrides", 0) + 1
    _set_effective(state, decision, followed, body.to_verdict)
    directions, direction = state["override_directions"], f"{before}→{body.to_verdict}"
    directions[direction] = directions.get(direction, 0) + 1
    count_name(state, "override_reviewers", body.reviewer)
    by_policy = state["override_policies"]
    for name in _shown_policies(state, decision):
        by_policy[name] = by_policy.get(name, 0) + 1
    if followed["overrides"] == 1:
        count_overridden(state, moment_of(entry, body), decision)
    _keep_precedent(state, entry.seq, decision, followed, body.decision_id)


# -- outcomes and feedback ------------------------------------------------------------------------


def _count_outcome(
    state: State,
    _decision: Decision,
    followed: Followed,
    body: Outcome,
    _entry: Entry,
) -> None:
    state["outcomes"][body.outcome] += 1
    followed["outcome"] = body.outcome


def _count_feedback(
    state: State,
    decision: Decision,
    followed: Followed,
    body: Feedback,
    _entry: Entry,
) -> None:
    state["feedback_events"] += 1
    key, columns = clipped(body.reviewer), _FEEDBACK_COLUMNS[body.feedback][body.correct_verdict]
    after = columns[decision.verdict in _INTERVENTIONS]
    given = followed.get("feedback")
    if given is None:
        before, first = None, True
        followed["feedback"] = {key: after}
    else:
        before, first = given.get(key), False
        if before is None and len(given) >= NAMES_LIMIT:
            note_overflow(state, "reviewers_of_a_decision")
            return
        given[key] = after
    matrices, by_policy = [state["feedback"]], state["feedback_policies"]
    for name in _shown_policies(state, decision):
        if name not in by_policy:
            by_policy[name] = [0] * len(FEEDBACK)
        matrices.append(by_policy[name])
    for matrix in matrices:
        matrix[after] += 1
        if before is not None:
            matrix[before] -= 1
        elif first:
            matrix[WITH_FEEDBACK] += 1


_Counter = Callable[[State, Decision, Followed, Any, "Entry"], None]

_COUNT: Final[dict[type[FollowUp], _Counter]] = {
    EscalationVoted: _count_vote,
    EscalationResolved: _count_resolution,
    Overridden: _count_override,
    Outcome: _count_outcome,
    Feedback: _count_feedback,
}
