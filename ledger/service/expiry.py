"""Escalations past their deadline: each gets its `escalation.resolved` with resolution `expired`.

Which are pending is what the governance state says, and what was recorded behind it. The event is
made of the decision alone (id `expire:<decision id>`, `at` its deadline), so however many
schedulers append it, it is recorded once. Where somebody's other event took that id, a second one
is tried: nobody is to keep an escalation open by an id. A person who resolves the decision in the
same moment wins where that is recorded first; the later one counts as a conflict.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from ledger import errors, keys
from ledger.events import ID_LENGTH_LIMIT, Decision, EscalationResolved, parse_stored
from ledger.ledger import Ledger
from ledger.server import pack
from ledger.service.inspection import server_now_ms
from ledger.stream import Entry, Position
from ledger.wording import counted
from projections.governance import Governance
from projections.pending import Pending, pending_with_deadline, unlisted_from_seq
from projections.projection import STATE

__all__ = ["Expiry", "expiry_event"]

TENANTS_A_CALL: Final = 1000
APPENDS_AT_ONCE: Final = 256
_PREFIX: Final = "expire:"
_ESCALATE: Final = b'"verdict":"escalate"'
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MS: Final = timedelta(milliseconds=1)
_log = logging.getLogger("ledger")


def expiry_event(decision_id: str, deadline: int, *, fallback: bool = False) -> EscalationResolved:
    """The event that expires the decision; equal bytes whoever makes it.

    An id that does not fit behind the prefix is named by its SHA-256; so is the `fallback`'s, for
    where the id is another event's.
    """
    event_id, digest = _PREFIX + decision_id, hashlib.sha256(decision_id.encode()).hexdigest()
    if fallback:
        event_id = f"{_PREFIX}taken:{digest}"
    elif len(event_id) > ID_LENGTH_LIMIT:
        event_id = f"{_PREFIX}sha256:{digest}"
    return EscalationResolved(
        id=event_id,
        at=_EPOCH + timedelta(milliseconds=deadline),
        decision_id=decision_id,
        resolution="expired",
    )


@dataclass(slots=True)
class _Seen:
    """A tenant as it was last looked at, so that an idle one costs one HGET a run."""

    position: bytes
    next_deadline_ms: int | None

    def is_outdated(self, position: bytes, now_ms: int) -> bool:
        """Whether more was folded, or a deadline has passed."""
        due = self.next_deadline_ms is not None and self.next_deadline_ms <= now_ms
        return due or self.position != position


class Expiry:
    """Expires what is overdue; keep it between runs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._server = ledger.server
        self._seen: dict[str, _Seen] = {}
        self._projection = Governance()

    async def run(self) -> dict[str, Any]:
        """Looks at every tenant; how many escalations were expired, and which tenants failed.

        Raises:
            JobFailed: some tenants could not be looked at, or refused; the others were done.
        """
        now_ms = await server_now_ms(self._server)
        tenants = await self._ledger.tenants()
        expired, failed = 0, dict[str, str]()
        for tenant in await self._worth_a_look(tenants, now_ms):
            try:
                count, refused = await self._expire(tenant, now_ms)
            except errors.Unavailable:
                raise
            except errors.LedgerError as error:
                count, refused = 0, [error]
            expired += count
            for why in refused:
                _log.error("tenant %s: escalations are not expired: %s", tenant, why)
                failed.setdefault(tenant, str(why))
        if failed:
            first = next(iter(failed))
            raise errors.JobFailed(
                f"{len(failed)} of {counted(len(tenants), 'tenant')} failed; the first is {first}: "
                f"{failed[first]}",
                expired=expired,
            )
        return {"expired": expired, "tenants": len(tenants)}

    def _fold(self, tenant: str) -> str:
        return keys.projection(tenant, self._projection.name, self._projection.version)

    async def _worth_a_look(self, tenants: list[str], now_ms: int) -> list[str]:
        found = []
        for start in range(0, len(tenants), TENANTS_A_CALL):
            some = tenants[start : start + TENANTS_A_CALL]
            asked = [(fold, pack("HGET", fold, "position")) for fold in map(self._fold, some)]
            replies = await self._server.exchange_each(asked)
            for tenant, reply in zip(some, replies, strict=True):
                seen = self._seen.get(tenant)
                if reply is not None and (seen is None or seen.is_outdated(reply, now_ms)):
                    found.append(tenant)
        return found

    async def _expire(self, tenant: str, now_ms: int) -> tuple[int, list[errors.LedgerError]]:
        """How many were expired, and why others were not."""
        fold = self._fold(tenant)
        position, raw = await self._server.command(fold, "HMGET", fold, "position", STATE)
        if position is None or raw is None:
            return 0, []
        try:
            folded, state = Position.parse(position.decode()), orjson.loads(raw)
            pending, unlisted = pending_with_deadline(state), unlisted_from_seq(state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise errors.JobFailed(
                f"tenant {tenant}: its folded state is damaged: {error!r}",
                hint=f"govledger rebuild {tenant}",
            ) from error
        overdue = [one for one in pending if one.deadline_ms <= now_ms]
        if overdue or unlisted is not None:
            pending = await self._pending(tenant, folded, pending, unlisted)
            overdue = [one for one in pending if one.deadline_ms <= now_ms]
        expired, refused = await self._append(tenant, overdue)
        if not refused:
            later = [one.deadline_ms for one in pending if one.deadline_ms > now_ms]
            self._seen[tenant] = _Seen(position, min(later, default=None))
        return expired, refused

    async def _pending(
        self, tenant: str, position: Position, listed: list[Pending], unlisted: int | None
    ) -> list[Pending]:
        """Listed or not, and not resolved by what was recorded behind the fold."""
        pending = {one.decision_id: one.deadline_ms for one in listed}
        after = position.seq if unlisted is None else unlisted - 1
        walk = await self._ledger.walk(tenant, after=after)
        if walk.head.epoch != position.epoch:
            raise errors.LedgerRolledBack(
                f"tenant {tenant}: the state is of another epoch than the ledger",
                hint=f"govledger rebuild {tenant}",
                tenant=tenant,
            )
        async with aclosing(walk.pages()) as pages:
            async for page in pages:
                for entry in page:
                    _follow(pending, entry, folded=position.seq)
        return [Pending(decision_id, at_ms) for decision_id, at_ms in pending.items()]

    async def _append(
        self, tenant: str, overdue: list[Pending]
    ) -> tuple[int, list[errors.LedgerError]]:
        """How many are recorded by this call and not by another scheduler's, and what others were
        refused for: each is refused alone, and keeps none of the others pending.
        """
        count, refused = 0, list[errors.LedgerError]()
        for start in range(0, len(overdue), APPENDS_AT_ONCE):
            appends = [
                self._resolve(tenant, one) for one in overdue[start : start + APPENDS_AT_ONCE]
            ]
            for result in await asyncio.gather(*appends, return_exceptions=True):
                if isinstance(result, errors.LedgerError) and not isinstance(
                    result, errors.Unavailable
                ):
                    refused.append(result)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    count += result
        return count, refused

    async def _resolve(self, tenant: str, one: Pending) -> bool:
        """Whether this call recorded the expiry."""
        event = expiry_event(*one)
        try:
            if not (await self._ledger.append(tenant, event)).duplicate:
                return True
        except errors.ConflictingEvent:
            pass  # what is there may resolve it all the same, with another release's bytes
        there = await self._ledger.get(tenant, event.id)
        decided = await self._ledger.get(tenant, one.decision_id)
        same = (there.type, there.event.get("decision_id")) == (event.type, one.decision_id)
        if same and there.seq > decided.seq:
            return False
        # What was recorded before the decision resolved nothing.
        receipt = await self._ledger.append(tenant, expiry_event(*one, fallback=True))
        if receipt.duplicate and receipt.seq < decided.seq:
            raise errors.JobFailed(
                f"{one.decision_id}: both ids of its expiry were taken before it was recorded",
                hint="resolve it by hand, with an event of another id",
            )
        return not receipt.duplicate


def _follow(pending: dict[str, int], entry: Entry, *, folded: int) -> None:
    """Notes what an entry opens, where the fold only counts it, or resolves."""
    resolves = entry.type == "escalation.resolved"
    opens = entry.seq <= folded and entry.type == "decision.recorded" and _ESCALATE in entry.data
    if entry.foreign or not (resolves or opens):
        return
    try:
        event = parse_stored(entry.data)
    except ValueError:
        return  # no fold can read it either: it is in quarantine
    if isinstance(event, EscalationResolved):
        pending.pop(event.decision_id, None)
    elif isinstance(event, Decision) and event.verdict == "escalate" and event.expires_at:
        pending.setdefault(entry.id, (event.expires_at - _EPOCH) // _MS)
