"""An event's JSON straight to its canonical bytes, for readers of many lines.

The models of `events` say what is valid. What they demand is read off their schemas here and put to
msgspec, which checks a line in a third of the time and builds no model. It may only ever say yes:
what it does not take, and whatever it cannot prove, goes to the models, which take it or say what
is wrong with it. One encoder writes the bytes, so nobody can see which way a line went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Union

import msgspec
from pydantic import BaseModel

from ledger.events import (
    EVENT_BYTES_LIMIT,
    ID_PATTERN,
    RECORDABLE,
    CheckedEvent,
    EncodedEvent,
    canonical_bytes,
    checked,
    encode,
    event_from_json,
    finite_json,
    small_metadata,
    utc,
)

__all__ = ["checked_from_json", "checker", "proven"]

_BACKSLASH: Final = 0x5C
_DEL: Final = 0x7F
_BRACKETS_LIMIT: Final = 100
"""Free JSON with more of them may be nested so deeply that the models' parser gives up."""

_RFC_3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)


def checked_from_json(line: bytes) -> CheckedEvent | EncodedEvent:
    """What `encode` makes the same of as of `event_from_json(line)`.

    Raises:
        InvalidEvent: as `event_from_json`.
    """
    return proven(line) or encode(event_from_json(line))


def proven(line: bytes) -> CheckedEvent | None:
    """The event, or None where only `event_from_json` can tell whether it is one."""
    # In JSON a control character within a string is escaped, or it is DEL.
    controls = line.find(_BACKSLASH) >= 0 or line.find(_DEL) >= 0
    decode, finishers = _SEARCHING if controls else _PLAIN
    try:
        fields = msgspec.to_builtins(decode(line))
        kind = fields["type"]
        for name, finish in finishers[kind]:
            if (value := fields.get(name)) is not None:
                fields[name] = finish(value, line)
        at_ms = None
        if (at := fields.get("at")) is not None:
            at_ms = int(at.timestamp() * 1000)
        elif "at" in fields:
            del fields["at"]
        data = canonical_bytes(fields)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return None  # the models say what is wrong with it, if anything is
    if len(data) > EVENT_BYTES_LIMIT:
        return None
    return checked(kind, fields["id"], data, at_ms)


# -- what no type of msgspec's can say -----------------------------------------------------------


def _finish_time(text: str, _: bytes) -> datetime:
    """Raises ValueError where it is no time of RFC 3339, or may be none to the models."""
    # Only YYYY-MM-DDTHH:MM:SSZ has these marks; a pattern takes five times as long.
    if len(text) == 20 and text[7::3] == "-T::Z" and text[11:13] < "24":
        return datetime.fromisoformat(text)
    if not _RFC_3339.fullmatch(text):
        raise ValueError(text)
    return utc(datetime.fromisoformat(text))


def _finish_json(value: object, line: bytes) -> object:
    if line.count(b"[") + line.count(b"{") > _BRACKETS_LIMIT:
        raise ValueError(_BRACKETS_LIMIT)
    return value


def _finish_metadata(value: dict[str, Any], line: bytes) -> object:
    return _finish_json(small_metadata(value), line)


# -- the models' schemas, for msgspec ------------------------------------------------------------

_Finish = Callable[[Any, bytes], object]

_MIRRORED: Final[dict[str, set[str]]] = {
    "bool": set(),
    "int": {"ge", "le"},
    "float": {"ge", "le"},
    "str": {"min_length", "max_length", "pattern"},
    "literal": {"expected"},
    "nullable": {"schema"},
    "tuple": {"items_schema", "variadic_item_index", "max_length"},
    "dict": {"keys_schema", "values_schema"},
    "function-after": {"function", "schema"},
    "definition-ref": {"schema_ref"},
    "datetime": {"tz_constraint", "microseconds_precision"},
    "default": {"schema", "default", "default_factory", "default_factory_takes_data"},
    "model": {"cls", "config", "custom_init", "root_model", "schema"},
    "model-fields": {"fields", "model_name", "computed_fields"},
    "model-field": {"schema"},
}
"""What of pydantic's core schemas is understood here; anything else may be a rule."""

_SCALARS: Final[dict[str, type]] = {"bool": bool, "int": int, "float": float, "str": str}
_NO_RULES: Final = {"type", "metadata", "ref"}
_BOUNDS: Final = ("ge", "le", "min_length", "max_length")
_JSON_VALUE: Final = "pydantic.types.JsonValue:"
_PLAIN_CONFIG: Final = {"allow_inf_nan": False, "extra_fields_behavior": "forbid"}


class _Doubtful:
    """No JSON is of this type: such a field goes to the models."""


class _Mirror:
    """Types of msgspec's for what pydantic's core schemas say, where both mean the same."""

    def __init__(self, *, controls: bool) -> None:
        self.finishers: dict[str, list[tuple[str, _Finish]]] = {}
        """By event type: fields, and what is still to be done with each."""
        self._finish: dict[str, _Finish] = {}
        self._controls = controls
        self._field = ""

    def event(self, schema: Any) -> Any:
        """A struct that is told by its `type`, or `_Doubtful`."""
        try:
            model = schema["schema"] if schema["type"] == "definitions" else schema
            if not _is_plain(model):
                return _Doubtful
            fields = dict(model["schema"]["fields"])
            kind = fields.pop("type")["schema"]["schema"]["expected"][0]
            # The constructor makes an id up, but a line needs one.
            fields["id"] = {**fields["id"], "schema": fields["id"]["schema"]["schema"]}
            self._finish = {}
            struct = self._struct(model["cls"], fields, kind)
            self.finishers[kind] = list(self._finish.items())
            return struct
        except (LookupError, TypeError):  # schemas of another pydantic: its models check all lines
            return _Doubtful

    def _struct(self, cls: type, fields: dict[str, Any], tag: str | None = None) -> Any:
        members: list[tuple[str, Any, Any]] = []
        for name, field in fields.items():
            self._field = name if tag else self._field
            kind = self._type(field["schema"], direct=bool(tag)) if _is_known(field) else _Doubtful
            if field["schema"]["type"] == "default":
                members.append((name, Union[kind, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007
            else:
                members.append((name, kind, msgspec.NODEFAULT))
        return msgspec.defstruct(
            cls.__name__,
            members,
            kw_only=True,
            forbid_unknown_fields=True,
            gc=False,
            tag_field="type" if tag else None,
            tag=tag,
        )

    def _type(self, schema: dict[str, Any], *, direct: bool = False) -> Any:
        """`direct`: the value is an event's own field, not something within it."""
        kind = schema["type"]
        if not _is_known(schema):
            return _Doubtful
        if kind in _SCALARS:
            return self._scalar(schema)
        if kind == "default":
            return self._type(schema["schema"], direct=direct)
        if kind == "nullable":
            return Union[self._type(schema["schema"], direct=direct), None]  # noqa: UP007
        if kind == "function-after":
            return self._after(schema, direct=direct)
        return self._container(schema)

    def _scalar(self, schema: dict[str, Any]) -> Any:
        if schema.get("pattern", ID_PATTERN) != ID_PATTERN:
            return _Doubtful
        searched = self._controls and "pattern" in schema
        # To Python `$` is before a last newline, too.
        pattern = ID_PATTERN.removesuffix("$") + r"\Z" if searched else None
        return Annotated[_SCALARS[schema["type"]], _rules(schema, pattern=pattern)]

    def _after(self, schema: dict[str, Any], *, direct: bool) -> Any:
        function, inner = schema["function"]["function"], schema["schema"]
        if function is finite_json:  # text that is JSON holds nothing else
            return self._type(inner, direct=direct)
        if function is small_metadata and direct:
            kind = self._type(inner)
            self._finish[self._field] = _finish_metadata
            return kind
        aware = inner["type"] == "datetime" and inner.get("tz_constraint") == "aware"
        if function is utc and direct and aware and _is_known(inner):
            self._finish[self._field] = _finish_time
            return str
        return _Doubtful

    def _container(self, schema: dict[str, Any]) -> Any:
        match schema:
            case {"type": "literal", "expected": expected} if all(
                isinstance(one, str) for one in expected
            ):
                return Literal[tuple(expected)]
            case {"type": "model", "cls": cls, "schema": {"fields": fields}} if _is_plain(schema):
                return self._struct(cls, fields)
            case {"type": "tuple", "items_schema": [item], "variadic_item_index": 0}:
                return Annotated[list[self._type(item)], _rules(schema)]  # type: ignore[misc]
            case {"type": "dict", "keys_schema": {"type": "str"} as key} if (
                not key.keys() - _NO_RULES
            ):
                return dict[str, self._type(schema["values_schema"])]  # type: ignore[misc]
            case {"type": "definition-ref", "schema_ref": ref} if ref.startswith(_JSON_VALUE):
                self._finish[self._field] = _finish_json
                return Any
            case _:
                return _Doubtful


def _rules(schema: dict[str, Any], *, pattern: str | None = None) -> msgspec.Meta:
    return msgspec.Meta(
        pattern=pattern, **{name: schema[name] for name in _BOUNDS if name in schema}
    )


def _is_known(schema: dict[str, Any]) -> bool:
    return schema.keys() <= _MIRRORED.get(schema["type"], set()) | _NO_RULES


def _is_plain(schema: dict[str, Any]) -> bool:
    """A model whose fields say all of it."""
    if not (schema["type"] == "model" and _is_known(schema) and _is_known(schema["schema"])):
        return False
    config = {name: value for name, value in schema["config"].items() if name != "title"}
    special = schema["custom_init"] or schema["root_model"] or schema["schema"]["computed_fields"]
    return config == _PLAIN_CONFIG and not special


_Checker = tuple[Callable[[bytes], Any], dict[str, list[tuple[str, _Finish]]]]


def checker(models: Iterable[type[BaseModel]], *, controls: bool) -> _Checker:
    """What decodes a line to the struct of a model, and what then finishes its fields, by type.

    Args:
        models: of events.
        controls: a string may hold control characters, so ids are searched for them.
    """
    mirror = _Mirror(controls=controls)
    events = [mirror.event(model.__pydantic_core_schema__) for model in models]
    known = tuple(event for event in events if event is not _Doubtful) or (_Doubtful,)
    return msgspec.json.Decoder(Union[known]).decode, mirror.finishers  # noqa: UP007


_PLAIN: Final = checker(RECORDABLE, controls=False)
_SEARCHING: Final = checker(RECORDABLE, controls=True)
