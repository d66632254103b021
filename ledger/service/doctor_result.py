"""What a check of the doctor says, and the words that checks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["LEVELS", "Level", "Result", "size", "unknown"]

Level = Literal["ok", "note", "warning", "danger"]
LEVELS: Final[tuple[Level, ...]] = ("ok", "note", "warning", "danger")


@dataclass(frozen=True, slots=True)
class Result:
    """One check: what was found, what that means for this ledger, and the exact thing to do."""

    check: str
    level: Level
    found: str
    meaning: str = ""
    remedy: str = ""
    node: str = ""


def unknown(check: str, what: str, right: str) -> Result:
    """A warning: this right is denied, so that cannot be told."""
    meaning = f"{what} cannot be told, so nothing is promised about it"
    return Result(check, "warning", f"{right} is denied to this user", meaning, f"grant {right}")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
