"""Ledgers with a past, for tests of what copies them: decisions, foreign hands, follow-ups."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ledger import Decision, EscalationResolved, Feedback, Ledger, keys
from tests.servers import Server

__all__ = ["events", "raw_entries", "recorded", "with_foreign_hands"]

_AT = datetime(2026, 3, 3, 12, tzinfo=UTC)
_VERDICTS = ("allow", "deny", "escalate")


def events(count: int, *, first: int = 0) -> list[Any]:
    """Decisions and what follows them; the bytes depend on the numbers alone."""
    made: list[Any] = []
    for n in range(first, first + count):
        if n % 5 == 3:
            made.append(
                EscalationResolved(
                    id=f"e-{n}",
                    decision_id=f"e-{n - 1}",
                    resolution="approved",
                    reviewer="r",
                    at=_AT,
                )
            )
        elif n % 5 == 4:
            feedback = {"decision_id": f"e-{n - 3}", "reviewer": "r", "feedback": "positive"}
            made.append(Feedback(id=f"e-{n}", at=_AT, **feedback))
        else:
            verdict = _VERDICTS[n % 5]
            made.append(
                Decision(id=f"e-{n}", agent=f"a-{n % 7}", action="act", verdict=verdict, at=_AT)
            )
    return made


async def with_foreign_hands(ledger: Ledger, server: Server, tenant: str) -> None:
    """Entries of ours, foreign ones of every shape among them, and one that was deleted."""
    stream = keys.decisions(tenant)
    with server.client() as client:
        await ledger.append_many(tenant, events(5))
        client.xadd(stream, {"note": "hello"})
        client.xadd(stream, {"type": "decision.recorded", "id": "x", "data": "{}"})
        await ledger.append_many(tenant, events(5, first=5))
        pairs = [part for n in range(5000) for part in (f"f{n}", n)]
        client.execute_command("XADD", stream, "*", *pairs)
        client.xadd(stream, {b"\xff\x00": b"\r\n$5\r\n" * 9, "big": b"x" * (700 << 10)})
        receipts = await ledger.append_many(tenant, events(5, first=10))
        client.xdel(stream, receipts[1].entry_id)
        await ledger.append_many(tenant, events(5, first=15))


def raw_entries(server: Server, tenant: str) -> list[tuple[bytes, list[bytes]]]:
    """What lies in the stream: ids, and fields and values in stored order."""
    with server.client() as client:
        client.response_callbacks.clear()
        raw = client.execute_command("XRANGE", keys.decisions(tenant), "-", "+")
    return [(entry_id, list(fields)) for entry_id, fields in raw]


async def recorded(ledger: Ledger, tenant: str) -> list[tuple[int, str, bytes]]:
    """Ordinal, id and bytes of every own entry; holes are stepped over."""
    found, after = [], 0
    head = await ledger.head(tenant)
    while after < head.seq:
        found += await _from(ledger, tenant, after)
        after = max(after + 1, found[-1][0] if found else 0)
    return found


async def _from(ledger: Ledger, tenant: str, after: int) -> list[tuple[int, str, bytes]]:
    from ledger import errors

    found = []
    try:
        async for entry in ledger.replay(tenant, after=after):
            found.append((entry.seq, entry.entry_id, entry.data))  # noqa: PERF401 - kept at a hole
    except errors.EntriesMissing as hole:
        if not found:
            after = hole.facts["last_seq"]
            return await _from(ledger, tenant, after)
    return found
