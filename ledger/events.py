"""What can be recorded: frozen models, one discriminated union, one encoding.

The bytes of an event are decided here once (`encode`): JSON with sorted keys, of the fields that
the caller set, with times in UTC. So a retry by a newer release, with other defaults and another
field order, gives the same bytes. `id` and `at` are fixed when the event is built.

Limits are refusals, never cuts: an event is at most 32 KiB, `metadata` 8 KiB, an id 128 characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, NamedTuple
from uuid import uuid4

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from ledger.errors import InvalidEvent

__all__ = [
    "EVENT_BYTES_LIMIT",
    "ID_LENGTH_LIMIT",
    "METADATA_BYTES_LIMIT",
    "Action",
    "AgentRef",
    "AgentRoleAssigned",
    "AgentTrustAdjusted",
    "ConstitutionActivated",
    "Correlation",
    "Decision",
    "EncodedEvent",
    "EscalationResolved",
    "EscalationVoted",
    "Event",
    "Feedback",
    "ModeChanged",
    "ModelRef",
    "Outcome",
    "Overridden",
    "PolicyActivated",
    "PolicyDeactivated",
    "PolicyRef",
    "RuleHit",
    "Threshold",
    "ThresholdChanged",
    "WaiverGranted",
    "WaiverRevoked",
    "encode",
    "event_from_json",
    "event_types",
    "parse_stored",
]

EVENT_BYTES_LIMIT: Final = 32 * 1024
METADATA_BYTES_LIMIT: Final = 8 * 1024
ID_LENGTH_LIMIT: Final = 128
ID_PATTERN: Final = r"^[^\x00-\x1f\x7f]+$"
_LIST_LIMIT: Final = 256
_ENCODING: Final = orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z


def utc(moment: datetime) -> datetime:
    """Raises ValueError where there is no such year in UTC."""
    try:
        return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is outside the years 1 to 9999 in UTC") from None


def finite_json(value: Any) -> Any:
    """JSON has no NaN or infinity, and the encoder would write null: raises ValueError for them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and infinity are not JSON; leave the field out")
    if isinstance(value, dict):
        for item in value.values():
            finite_json(item)
    elif isinstance(value, list):
        for item in value:
            finite_json(item)
    return value


def small_metadata(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError over 8 KiB of JSON."""
    try:
        size = len(orjson.dumps(value))
    except orjson.JSONEncodeError as error:
        raise ValueError(str(error)) from None
    if size > METADATA_BYTES_LIMIT:
        raise ValueError(
            f"metadata is {size} bytes of JSON, the limit is {METADATA_BYTES_LIMIT}: "
            "store the rest elsewhere and record a reference"
        )
    return value


def _policy(given: Any) -> Any:
    policy_id, at, version = given.rpartition("@") if isinstance(given, str) else ("", "", "")
    return {"id": policy_id, "version": version} if at else given


def _many(given: Any) -> Any:
    return given if given is None or isinstance(given, (list, tuple)) else [given]


def _expand(fields: dict[str, Any]) -> dict[str, Any]:
    """The shorthands of the Python constructors; JSON input has none of them."""
    for field, inner in (("agent", "id"), ("action", "type")):
        if isinstance(fields.get(field), str):
            fields[field] = {inner: fields[field]}
    if isinstance(fields.get("policy"), str):
        fields["policy"] = _policy(fields["policy"])
    if fields.get("policies") is not None:
        fields["policies"] = [_policy(one) for one in _many(fields["policies"])]
    if fields.get("rules") is not None:
        rules = _many(fields["rules"])
        fields["rules"] = [{"id": one} if isinstance(one, str) else one for one in rules]
    return fields


Id = Annotated[str, Field(min_length=1, max_length=ID_LENGTH_LIMIT, pattern=ID_PATTERN)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Moment = Annotated[AwareDatetime, AfterValidator(utc)]
FreeJson = Annotated[JsonValue, AfterValidator(finite_json)]
Metadata = Annotated[
    dict[str, JsonValue], AfterValidator(finite_json), AfterValidator(small_metadata)
]
Share = Annotated[float, Field(ge=0, le=1)]
Verdict = Literal["allow", "deny", "escalate", "transform", "abstain", "error"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AgentRef(_Part):
    """Who asked to act."""

    id: Id
    maci_role: Name | None = None


class Action(_Part):
    """What the agent asked to do; `args_hash` instead of arguments, which may be secret."""

    type: Name
    resource: str | None = None
    args_hash: Name | None = None
    summary: str | None = None


class PolicyRef(_Part):
    """A policy that took part, by version."""

    id: Name
    version: Name
    hash: Name | None = None


class RuleHit(_Part):
    """A rule that matched, and what it meant."""

    id: Name
    severity: Name | None = None
    effect: Literal["violation", "warning", "match"] = "match"


class Threshold(_Part):
    """The threshold that the risk was held against."""

    value: float
    version: Annotated[int, Field(ge=0)] | None = None


class ModelRef(_Part):
    """The model behind the agent."""

    id: Name
    version: Name | None = None
    cohort: Name | None = None


class Correlation(_Part):
    """Where this belongs in the caller's traces."""

    request_id: Name | None = None
    session_id: Name | None = None
    trace_id: Name | None = None
    causation_id: Name | None = None


Names = Annotated[tuple[Name, ...], Field(max_length=_LIST_LIMIT)]


class EncodedEvent(NamedTuple):
    """An event as it is sent.

    `packed` is what a call of the append function carries of it: its id, its data and the data's
    SHA-256 as three RESP strings. Made once, so that a batch is a mere join.
    """

    type: str
    id: str
    packed: bytes
    size_bytes: int
    sha256: bytes
    at_ms: int | None

    @property
    def data(self) -> bytes:
        """What is stored, for ever, byte for byte."""
        return self.packed[-_BEHIND_DATA - self.size_bytes : -_BEHIND_DATA]


class CheckedEvent(NamedTuple):
    """An event that can be recorded: for who checks many before the first is sent, and hashes them
    while others are recorded. `packed` is an `EncodedEvent`'s without the SHA-256.
    """

    type: str
    id: str
    packed: bytes
    size_bytes: int
    at_ms: int | None

    @property
    def data(self) -> bytes:
        """What will be stored."""
        return self.packed[-2 - self.size_bytes : -2]

    def encoded(self) -> EncodedEvent:
        """The same, to be sent."""
        digest = sha256(self.data).digest()
        packed = self.packed + _PACKED_DIGEST % digest
        fields = (self.type, self.id, packed, self.size_bytes, digest, self.at_ms)
        return tuple.__new__(EncodedEvent, fields)


_PACKED_DATA: Final = b"$%d\r\n%b\r\n$%d\r\n%b\r\n"
_PACKED_DIGEST: Final = b"$32\r\n%b\r\n"
_PACKED: Final = _PACKED_DATA + _PACKED_DIGEST
_BEHIND_DATA: Final = len(b"\r\n") + len(_PACKED_DIGEST % bytes(32))


# What both make is `tuple.__new__`, as the constructor of a named tuple takes twice as long.


def checked(kind: str, event_id: str, data: bytes, at_ms: int | None) -> CheckedEvent:
    """A valid event whose canonical bytes are `data`."""
    raw_id, size = event_id.encode(), len(data)
    packed = _PACKED_DATA % (len(raw_id), raw_id, size, data)
    return tuple.__new__(CheckedEvent, (kind, event_id, packed, size, at_ms))


def encoded(kind: str, event_id: str, data: bytes, at_ms: int | None) -> EncodedEvent:
    """The same, to be sent."""
    raw_id, digest, size = event_id.encode(), sha256(data).digest(), len(data)
    packed = _PACKED % (len(raw_id), raw_id, size, data, digest)
    return tuple.__new__(EncodedEvent, (kind, event_id, packed, size, digest, at_ms))


class Event(_Part):
    """What every event has. `at` is the engine's time; None means the ledger's own.

    An event is encoded when it is built, so what is wrong with it is said there; a copy with other
    fields is encoded anew.
    """

    __slots__ = ("_encoded",)
    if TYPE_CHECKING:
        _encoded: EncodedEvent

    SCHEMA_VERSION: ClassVar[int] = 1
    """Of every model here; a model that must change what a field means gets a number of its own."""

    type: str
    id: Id = Field(default_factory=lambda: str(uuid4()))
    at: Moment | None = Field(default_factory=lambda: datetime.now(UTC))
    correlation: Correlation | None = None
    metadata: Metadata | None = None

    def __init__(self, **fields: Any) -> None:
        """Raises InvalidEvent with every field that does not fit."""
        try:
            super().__init__(**_expand(fields))
        except ValidationError as error:
            raise _from_validation(error) from None
        if type(self) in RECORDABLE:
            _encode_now(self)

    # Validation from JSON does not come by __init__; this keeps it as fast as it is without one.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Decision(Event):
    """What an engine decided. Strings are short for agent, action and `policy@version`."""

    type: Literal["decision.recorded"] = "decision.recorded"
    agent: AgentRef
    action: Action
    verdict: Verdict
    constitutional_hash: Name | None = None
    policies: Annotated[tuple[PolicyRef, ...], Field(max_length=_LIST_LIMIT)] | None = None
    rules: Annotated[tuple[RuleHit, ...], Field(max_length=_LIST_LIMIT)] | None = None
    risk_score: Share | None = None
    impact_level: Literal["negligible", "low", "medium", "high", "critical"] | None = None
    confidence: Share | None = None
    threshold: Threshold | None = None
    reason_codes: Names | None = None
    reason: str | None = None
    obligations: Annotated[tuple[FreeJson, ...], Field(max_length=_LIST_LIMIT)] | None = None
    required_approvals: Annotated[int, Field(ge=0, le=1_000)] | None = None
    expires_at: Moment | None = None
    model: ModelRef | None = None
    features: dict[str, float] | None = None
    latency_ms: Annotated[float, Field(ge=0)] | None = None
    tags: Names | None = None
    redacted: Names | None = None

    def __init__(self, **fields: Any) -> None:
        """As `Event`; `policy=` is for the usual case of one policy."""
        if "policy" in fields and "policies" not in fields:
            fields["policies"] = fields.pop("policy")
        super().__init__(**fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class EscalationVoted(Event):
    """One reviewer's vote on an escalated decision."""

    type: Literal["escalation.voted"] = "escalation.voted"
    decision_id: Id
    reviewer: Name
    reviewer_kind: Literal["human", "service", "advisory"] = "human"
    approve: bool
    note: str | None = None


class EscalationResolved(Event):
    """The end of an escalation; expired counts as deny."""

    type: Literal["escalation.resolved"] = "escalation.resolved"
    decision_id: Id
    resolution: Literal["approved", "rejected", "expired", "cancelled"]
    reviewer: Name | None = None
    reason: str | None = None


class Overridden(Event):
    """A person changed what a decision means; the decision itself stays."""

    type: Literal["decision.overridden"] = "decision.overridden"
    decision_id: Id
    reviewer: Name
    from_verdict: Verdict
    to_verdict: Verdict
    justification: str | None = None


class Outcome(Event):
    """What became of the action."""

    type: Literal["outcome.reported"] = "outcome.reported"
    decision_id: Id
    outcome: Literal["succeeded", "failed", "blocked", "cancelled", "timed_out"]
    reason: str | None = None


class Feedback(Event):
    """A reviewer's judgement of a decision, afterwards."""

    type: Literal["feedback.recorded"] = "feedback.recorded"
    decision_id: Id
    reviewer: Name
    feedback: Literal["positive", "negative", "neutral", "correction"]
    correct_verdict: Verdict | None = None
    reason: str | None = None


class PolicyActivated(Event):
    """A policy version is in force from here on."""

    type: Literal["policy.activated"] = "policy.activated"
    policy: PolicyRef


class PolicyDeactivated(Event):
    """A policy version is no longer in force."""

    type: Literal["policy.deactivated"] = "policy.deactivated"
    policy: PolicyRef


class ConstitutionActivated(Event):
    """The constitution, by hash, that decisions should name from here on."""

    type: Literal["constitution.activated"] = "constitution.activated"
    constitutional_hash: Name


class ThresholdChanged(Event):
    """A threshold moved; counts only where `old` is what it was."""

    type: Literal["threshold.changed"] = "threshold.changed"
    scope: Name
    level: Name
    old: float | None = None
    new: float
    cause: str | None = None


class ModeChanged(Event):
    """The governance mode, or whether learning is paused."""

    type: Literal["mode.changed"] = "mode.changed"
    mode: Literal["strict", "adaptive", "evolving", "degraded"]
    learning_paused: bool | None = None


class AgentRoleAssigned(Event):
    """An agent's role."""

    type: Literal["agent.role_assigned"] = "agent.role_assigned"
    agent: AgentRef
    role: Name


class AgentTrustAdjusted(Event):
    """A correction of an agent's trust."""

    type: Literal["agent.trust_adjusted"] = "agent.trust_adjusted"
    agent: AgentRef
    delta: Annotated[float, Field(ge=-1, le=1)]
    cause: str | None = None


class WaiverGranted(Event):
    """An exception from policy, until it expires."""

    type: Literal["waiver.granted"] = "waiver.granted"
    waiver_id: Id
    scope: Name
    expires_at: Moment | None = None
    reason: str | None = None


class WaiverRevoked(Event):
    """The end of a waiver before its time."""

    type: Literal["waiver.revoked"] = "waiver.revoked"
    waiver_id: Id
    reason: str | None = None


AnyEvent = Annotated[
    Decision
    | EscalationVoted
    | EscalationResolved
    | Overridden
    | Outcome
    | Feedback
    | PolicyActivated
    | PolicyDeactivated
    | ConstitutionActivated
    | ThresholdChanged
    | ModeChanged
    | AgentRoleAssigned
    | AgentTrustAdjusted
    | WaiverGranted
    | WaiverRevoked,
    Field(discriminator="type"),
]
_ANY_EVENT: TypeAdapter[Event] = TypeAdapter(AnyEvent)
# Not what a caller derives from them: its fields were never checked against a schema of ours.
RECORDABLE: Final = frozenset(Event.__subclasses__())


def encode(event: Event | CheckedEvent | EncodedEvent) -> EncodedEvent:
    """The event's canonical bytes: sorted-key JSON of the fields that were set; made once.

    What is encoded already comes back as it is: `canonical` checked it.

    Raises:
        InvalidEvent: it is no event of this module, is over 32 KiB, or holds what JSON cannot (an
            integer of over 64 bits).
    """
    if isinstance(event, EncodedEvent):
        return event
    if isinstance(event, CheckedEvent):
        return event.encoded()
    try:
        return event._encoded  # noqa: SLF001 - its slot is for this function
    except AttributeError:  # a copy, which nobody has checked; what is built is encoded at once
        return _encode_now(_checked(event))


def _checked(event: Event) -> Event:
    if type(event) not in RECORDABLE:
        raise _invalid(None, [("", f"{type(event).__name__} is no event that can be recorded")])
    fields = event.__pydantic_serializer__.to_python(event, exclude_unset=True, warnings=False)
    try:
        return _ANY_EVENT.validate_python(
            fields
            | (event.model_extra or {})
            | {"type": event.type, "id": event.id, "at": event.at}
        )
    except ValidationError as error:
        raise _from_validation(error) from None


def _encode_now(event: Event) -> EncodedEvent:
    encoded = _encode(event)
    object.__setattr__(event, "_encoded", encoded)
    return encoded


def _encode(event: Event) -> EncodedEvent:
    fields = event.__pydantic_serializer__.to_python(event, exclude_unset=True)
    fields["type"] = event.type
    fields["id"] = event.id
    fields["at"] = event.at
    if event.at is None:
        del fields["at"]
    try:
        data = canonical_bytes(fields)
    except (orjson.JSONEncodeError, RecursionError) as error:
        raise _invalid(event.id, [("", str(error))]) from None
    if len(data) > EVENT_BYTES_LIMIT:
        raise _too_large(event.id, fields, len(data))
    at_ms = None if event.at is None else int(event.at.timestamp() * 1000)
    return encoded(event.type, event.id, data, at_ms)


def canonical_bytes(fields: Mapping[str, Any]) -> bytes:
    """An event's fields as they are stored. Raises orjson.JSONEncodeError, RecursionError."""
    # To be copied by who keeps it: it stays in orjson's buffer of 8 KiB.
    return orjson.dumps(fields, None, _ENCODING)


def _too_large(event_id: str, fields: Mapping[str, Any], size: int) -> InvalidEvent:
    sizes = {name: len(orjson.dumps(value, option=_ENCODING)) for name, value in fields.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    reason = f"the event is {size} bytes, the limit is {EVENT_BYTES_LIMIT}; "
    return _invalid(event_id, [(largest, f"{reason}this field alone is {sizes[largest]}")])


def event_from_json(line: bytes | str) -> Event:
    """One event from JSON as engines write it: `id` is required, an absent `at` stays absent.

    An `at` made up here would differ at the next run, and a retry would then conflict with itself.

    Raises:
        InvalidEvent: not JSON, an unknown field or type, a value out of bounds, no id.
    """
    try:
        event = _ANY_EVENT.validate_json(line)
    except ValidationError as error:
        raise _from_validation(error) from None
    given = event.model_fields_set
    if "id" not in given:
        reason = "is required, so that the same line can be sent again safely"
        raise _invalid(None, [("id", reason)])
    if "at" not in given:
        event = event.model_copy(update={"at": None})
    _encode_now(event)
    return event


def parse_stored(data: bytes) -> Event | dict[str, Any]:
    """A stored event as a model; unknown fields are kept. What no model here fits (a newer
    writer's type or value) comes back as the plain JSON object.
    """
    try:
        event = _ANY_EVENT.validate_json(data, extra="allow")
    except ValidationError:
        event = None
    # What is not stored must not be made up here.
    if event is None or "id" not in event.model_fields_set:
        plain: dict[str, Any] = orjson.loads(data)
        return plain
    return event if "at" in event.model_fields_set else event.model_copy(update={"at": None})


def event_types() -> dict[str, type[Event]]:
    """Every `type` that can be recorded, with its model."""
    return {kind.model_fields["type"].default: kind for kind in Event.__subclasses__()}


def _from_validation(error: ValidationError) -> InvalidEvent:
    details = error.errors(include_url=False, include_context=False)
    return _invalid(None, [(_place(detail), _reason(detail)) for detail in details])


def _place(detail: ErrorDetails) -> str:
    known = event_types()
    parts = [_shown(str(part))[1:-1] for part in detail["loc"] if part not in known]
    place = ".".join(parts)
    return place if len(place) <= 120 else f"{place[:120]}…"


def _shown(value: object) -> str:
    """On one line of plain characters, and short, whatever it is."""
    try:
        shown = ascii(value)
    except (RecursionError, ValueError):  # nested too deeply, an integer of thousands of digits
        return f"<{type(value).__name__}>"
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _reason(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return "is no field of this event; put your own data into metadata"
    if detail["type"] == "union_tag_invalid":  # its own message repeats a tag of any length
        return f"type is none of {', '.join(event_types())}, got {_shown(detail.get('input'))}"
    message = detail["msg"].removeprefix("Value error, ")
    plain = detail["type"] in {"missing", "json_invalid", "union_tag_not_found", "value_error"}
    return message if plain else f"{message}, got {_shown(detail.get('input'))}"


def _invalid(event_id: str | None, problems: list[tuple[str, str]]) -> InvalidEvent:
    where = f"event {event_id}: " if event_id else ""
    shown = "; ".join(f"{field}: {reason}" if field else reason for field, reason in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return InvalidEvent(f"{where}{shown}{more}", problems=problems)
