"""A recorded entry's names and values as people and programs read them.

They are anybody's bytes. Two that differ never look alike, and none passes for something else.
"""

from __future__ import annotations

import re
from typing import Final

from ledger.note import b64

__all__ = ["field_json", "field_line", "name_text", "text_or_base64"]

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.-]+")


def name_text(raw: bytes) -> str:
    """A name that is one, and else its literal: in quotes, so that no value passes for a name."""
    text = raw.decode(errors="replace")
    return text if _PLAIN.fullmatch(text) else ascii(raw)


def field_line(name: bytes, value: bytes, *, withheld: bool) -> str:
    """One printable line. `withheld`: `value` is the SHA-256 of one that is not there."""
    shown = name_text(name)
    if withheld:
        return f"{shown} (withheld, SHA-256): {value.hex()}"
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return f"{shown} (bytes): {value!a}"
    return f"{shown}: {text}" if text.isprintable() else f"{shown} (quoted): {text!a}"


def field_json(name: bytes, value: bytes, *, withheld: bool) -> dict[str, str]:
    """`name` and `value`, each with `_base64` behind it where it is no text; `sha256` in hex
    instead of a value that was withheld.
    """
    named = text_or_base64("name", name)
    return named | ({"sha256": value.hex()} if withheld else text_or_base64("value", value))


def text_or_base64(key: str, raw: bytes) -> dict[str, str]:
    """The bytes under `key` where they are UTF-8, else in Base 64 under `<key>_base64`."""
    try:
        return {key: raw.decode()}
    except UnicodeDecodeError:
        return {f"{key}_base64": b64(raw)}
