"""How counts and lists read, in whatever people are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["counted", "shown"]

NAMES_SHOWN: Final = 5


def counted(count: int, noun: str) -> str:
    """`1 entry`, `2 entries`, `0 keys`: a singular English noun, after its number."""
    if count == 1:
        return f"1 {noun}"
    ends_with_ies = noun.endswith("y") and noun[-2] not in "aeiou"
    return f"{count} {noun[:-1]}ies" if ends_with_ies else f"{count} {noun}s"


def shown(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
