"""What is wrong, what it means for this ledger, and what to set: each check a plain function.

A check judges what `doctor_seen.look` gathered and asks nothing itself. Levels: `ok`; `note`, worth
knowing; `warning`, something can be lost or is degraded; `danger`, the record or its service is at
risk now. What an ACL hides from a check is a warning that names the missing right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from ledger.ledger import Ledger
from ledger.service.doctor_access import SERVER_CHECKS
from ledger.service.doctor_ledger import LEDGER_CHECKS
from ledger.service.doctor_nodes import NODE_CHECKS
from ledger.service.doctor_result import LEVELS, Level, Result
from ledger.service.doctor_seen import Seen, look

__all__ = ["ANSWER_LIMIT_S", "examine", "judge", "report_json", "report_lines", "worst"]

ANSWER_LIMIT_S: Final = 5.0
"""Who has not answered by then is not examined."""


async def examine(ledger: Ledger) -> list[Result]:
    """Looks at everything and judges it.

    Raises:
        Unavailable: the server stopped answering in the middle.
    """
    return judge(await look(ledger))


def judge(seen: Seen) -> list[Result]:
    """The results of every check, those of the server first, then of each node, then the ledger's.

    A node's results have its name where there are several.
    """
    results = [check(seen) for check in SERVER_CHECKS]
    for node in seen.nodes:
        for of_node in NODE_CHECKS:
            result = of_node(seen, node)
            results.append(Result(**{**asdict(result), "node": node.name}))
    return results + [check(seen) for check in LEDGER_CHECKS]


def worst(results: Sequence[Result]) -> Level:
    """The highest level among them."""
    return max((result.level for result in results), key=LEVELS.index, default="ok")


def report_json(address: str, results: Sequence[Result]) -> dict[str, Any]:
    """All of it as one object."""
    shown = [asdict(result) for result in results]
    return {"address": address, "level": worst(results), "checks": shown}


def report_lines(results: Sequence[Result]) -> list[str]:
    """What is wrong first, with what it means and what to set; then a line for each that is not."""
    lines = []
    for result in sorted(results, key=lambda one: -LEVELS.index(one.level)):
        name = f"{result.check} ({result.node})" if result.node else result.check
        lines.append(f"{result.level:<8} {name}: {result.found}")
        if result.level != "ok":
            lines += [f"         {result.meaning}"] if result.meaning else []
            lines += [f"         → {result.remedy}"] if result.remedy else []
    return lines
