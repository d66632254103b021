"""What commands print: JSON Lines as bytes, and text for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import orjson

from ledger.service.terminal import printable
from ledger.stream import Entry

__all__ = ["entry_json", "entry_lines", "entry_text", "table", "time_text"]

_DECISION_FIELDS: Final = ("verdict", "agent", "action", "risk_score")
_OTHER_FIELDS: Final = (
    "resolution",
    "outcome",
    "feedback",
    "mode",
    "agent",
    "policy",
    "constitutional_hash",
    "decision_id",
    "from_verdict",
    "to_verdict",
    "reviewer",
    "approve",
    "waiver_id",
    "scope",
    "level",
    "old",
    "new",
    "role",
    "delta",
)
"""What an entry's line for people shows of its event, in this order, where it is there."""

_SUMMARY_WIDTH: Final = 32


def time_text(moment_ms: int) -> str:
    """`2026-03-03T12:00:00.123Z` from ms since 1970."""
    seconds, ms = divmod(moment_ms, 1000)
    return f"{_second_text(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=16)
def _second_text(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=256)
def _json(text: str) -> bytes:
    return orjson.dumps(text)


def entry_json(entry: Entry) -> bytes:
    """The entry as a line of JSON, without its newline; the event's bytes are those stored."""
    data = entry.data
    if b"\n" in data or b"\r" in data:  # white space between tokens: JSON escapes it in strings
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    return (
        b'{"tenant":%b,"seq":%d,"entry_id":"%b","recorded_at":"%b","type":%b,"id":%b,"event":%b}'
        % (
            _json(entry.tenant),
            entry.seq,
            entry.entry_id.encode(),
            time_text(entry.recorded_ms).encode(),
            _json(entry.type),
            orjson.dumps(entry.id),
            data,
        )
    )


def entry_text(entry: Entry) -> str:
    """The entry as one line for people."""
    event = entry.event
    names = _DECISION_FIELDS if "verdict" in event else _OTHER_FIELDS
    parts = [_brief(name, event[name]) for name in names if event.get(name) is not None]
    head = f"{entry.seq:>8}  {time_text(entry.recorded_ms)}  {entry.type:<22}  {entry.id}"
    return printable(f"{head}  {' '.join(parts)}".rstrip())


def entry_lines(entry: Entry) -> list[str]:
    """The entry in full for people: what the ledger knows of it, then the event."""
    facts = {
        "tenant": entry.tenant,
        "seq": entry.seq,
        "entry id": entry.entry_id,
        "recorded at": time_text(entry.recorded_ms),
        "type": entry.type,
        "id": entry.id,
    }
    event = orjson.dumps(entry.event, option=orjson.OPT_INDENT_2).decode()
    lines = [*(f"{name:<13}{value}" for name, value in facts.items()), *event.splitlines()]
    return [printable(line) for line in lines]


def _brief(name: str, value: Any) -> str:
    if isinstance(value, dict):
        version = f"@{value['version']}" if "version" in value else ""
        value = f"{value.get('id', value.get('type', ''))}{version}"
    text = str(value)
    if len(text) > _SUMMARY_WIDTH:
        text = f"{text[:_SUMMARY_WIDTH]}…"
    named = name in ("verdict", "resolution", "outcome", "feedback", "mode", "agent", "action")
    return text if named else f"{name}={text}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of columns, numbers to the right; "-" for None."""
    shown = [["-" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *shown, strict=True)]
    numeric = [all(isinstance(row[i], int | None) for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [list(header), *shown]
    ]
