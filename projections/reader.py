"""What adaptive policies hold: a tenant's state, and how far it has folded.

`governance` is served from a cache (cache.py), at most `max_stale_s` behind what Redis has;
`state`, `agent` and `effective_verdict` read Redis at each call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Final, Self

import msgspec

from ledger import errors, keys
from ledger.append import Receipt
from ledger.ledger import Ledger
from ledger.server import pack
from ledger.stream import Entry, Position, find_by_id
from projections.agents import Agents, agent_name
from projections.bodies import Decision, read
from projections.cache import StateCache
from projections.current import check_folded
from projections.governance import Governance
from projections.history import fold_to
from projections.projection import DECISION_PREFIX, CopiedEntities, Projection, Unfoldable
from projections.publishing import copy_text
from projections.registry import configured
from projections.state_model import (
    AgentState,
    EffectiveVerdict,
    GovernanceState,
    governance_of,
    placed,
    published_agent,
)
from projections.store import FoldStore, PublishedState, Standing

__all__ = ["MAX_STALE_S", "StateReader"]

MAX_STALE_S: Final = 2.0
"""How far behind Redis a state from the cache may be, by default."""

_POLL_MIN_S: Final = 0.002
_POLL_MAX_S: Final = 0.05
_LOOK_MIN_S: Final = 0.02
_LOOK_MAX_S: Final = 0.25


class StateReader:
    """Reads published state, and what is committed where the published copy is absent.

    Safe to share between tasks of one event loop. It ends with its ledger, or by `aclose`.
    """

    def __init__(
        self,
        ledger: Ledger,
        projections: Sequence[Projection] = (),
        *,
        max_stale_s: float = MAX_STALE_S,
        stale_ok: bool = False,
    ) -> None:
        """Nothing is asked yet.

        Args:
            ledger: where to read.
            projections: those that `state` knows; default ours, and those of GOVLEDGER_PROJECTIONS.
            max_stale_s: how far behind Redis what `governance` returns may be, whatever is lost:
                a notice, a connection, a reply. A read that takes longer counts as cut off.
            stale_ok: when cut off, return what was read last with `stale=True`, and do not raise.

        Raises:
            InvalidInput: `max_stale_s` is not positive.
        """
        if not max_stale_s > 0:
            raise errors.InvalidInput(f"max_stale_s: {max_stale_s} s is no bound", hint="over 0")
        self._server = ledger.server
        self._ledger = ledger
        all_of_them = tuple(projections) or configured(self._server.settings)
        self._projections = {one.name: one for one in all_of_them}
        self._governance = Governance()
        self._stale_ok = stale_ok
        self._max_stale_s = max_stale_s
        self._cache = StateCache(self._server, self._governance, max_stale_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what keeps the cache fresh; the ledger stays open."""
        await self._cache.aclose()

    # -- governance ---------------------------------------------------------------------------

    async def governance(
        self,
        tenant: str,
        *,
        at_least: int | Receipt | Position | None = None,
        as_of: int | datetime | None = None,
        head: bool = False,
        timeout_s: float = 10.0,
        stale_ok: bool | None = None,
    ) -> GovernanceState:
        """The tenant's governance state, at most `max_stale_s` behind what Redis has.

        Args:
            tenant: whose.
            at_least: wait until this seq, or the event of this receipt, has been folded.
            as_of: instead of now, when this seq was the head, or at this time: folded anew from the
                history, by recorded time, from the nearest snapshot.
            head: read where the ledger stands too.
            timeout_s: how long to wait for `at_least`.
            stale_ok: instead of the reader's own.

        Raises:
            InvalidInput: `at_least` or `as_of` is of another type, a time without a zone, both are
                given, or the receipt is of another tenant.
            NotFound: nothing is recorded or folded for the tenant.
            NotCaughtUp: the projector has not come to `at_least` in time.
            StateUnavailable: the reader is cut off; nothing newer than `max_stale_s` is known.
            LedgerRolledBack: what is folded describes a history that is no more.
            EntriesMissing, IndexBehind: as `Ledger.replay`, for `as_of`.
        """
        found = self._cache.hit(tenant) if as_of is None else None
        if as_of is not None:
            _check_alone(at_least)
            found = await self._governance_at(tenant, as_of)
        elif found is None or at_least is not None:
            allowed = self._stale_ok if stale_ok is None else stale_ok
            try:
                found = await self._governance_now(tenant, at_least, timeout_s)
            except errors.StateUnavailable:
                last = self._cache.last(tenant) if allowed else None
                if last is None or not _reaches(last.position, at_least):
                    raise
                return last
        return await self._with_head(found) if head else found

    async def _with_head(self, state: GovernanceState) -> GovernanceState:
        try:
            async with asyncio.timeout(self._max_stale_s):
                head = await self._ledger.head(state.tenant)
        except (TimeoutError, errors.Unavailable) as error:
            raise errors.StateUnavailable(
                f"tenant {state.tenant}: the ledger's head cannot be read now: {error}",
                hint="without head=True the state itself is served while it is fresh",
                tenant=state.tenant,
                seq=state.seq,
                recorded_at=state.recorded_at,
            ) from error
        return msgspec.structs.replace(state, head=head)

    async def _governance_at(self, tenant: str, as_of: int | datetime) -> GovernanceState:
        governance = self._governance
        past = await fold_to(self._server, tenant, governance, as_of)
        value = governance.view(past.state)
        return governance_of(tenant, governance.version, past.position, value, "folded")

    async def _governance_now(
        self, tenant: str, at_least: int | Receipt | Position | None, timeout_s: float
    ) -> GovernanceState:
        _seq(at_least)  # of a wrong type it is refused, whatever is cached
        if isinstance(at_least, Receipt) and at_least.tenant != tenant:
            raise errors.InvalidInput(
                f"at_least: the receipt is of tenant {at_least.tenant}, not of {tenant}"
            )
        found = self._cache.hit(tenant)
        deadline, pause_s = time.monotonic() + timeout_s, _LOOK_MIN_S
        while True:
            failure: errors.LedgerError | None = None
            if found is None:
                try:
                    found = await self._cache.read(tenant)
                except errors.NotFound:
                    if at_least is None:
                        raise await self._nothing(tenant, "governance") from None
                except errors.StateUnavailable as error:
                    failure = error
            if found is not None and _reaches(found.position, at_least):
                return found
            left_s = deadline - time.monotonic()
            if failure is not None and (at_least is None or left_s <= 0):
                raise failure
            assert at_least is not None
            if left_s <= 0:
                at = None if found is None else found.position
                raise await self._late(tenant, "governance", at_least, at, timeout_s)
            await self._cache.wait(tenant, min(pause_s, left_s))
            pause_s, found = min(pause_s * 1.5, _LOOK_MAX_S), None

    async def watch(
        self, tenant: str, *, stale_ok: bool | None = None
    ) -> AsyncGenerator[GovernanceState, None]:
        """The state of now, or the first one, and then each newer one as it is published, until the
        reader or its ledger is closed.

        It waits while the server is away, and never goes back within an epoch. With `stale_ok` it
        says that it is cut off, by the last state again with `stale=True`. Of several states that
        came while the caller was at work it gives the latest. Where the projector stopped, or goes
        on, the state comes once more: `stopped` says so.

        Raises:
            LedgerRolledBack: what is folded describes a history that is no more.
            PermissionDenied, AuthenticationFailed: the server does not let this user in any more.
        """
        allowed = self._stale_ok if stale_ok is None else stale_ok
        async with aclosing(self._cache.watch(tenant, stale_ok=allowed)) as states:
            async for state in states:
                yield state

    # -- agents and decisions -----------------------------------------------------------------

    async def agent(self, tenant: str, agent_id: str) -> AgentState:
        """What one agent did, read from Redis: its published copy, else what is committed.

        Raises:
            NotFound: nothing is folded of an agent with this id.
            LedgerRolledBack: what is folded describes a history that is no more.
        """
        found = await self._agent(keys.checked_tenant(tenant), agent_id)
        if found is None:
            raise errors.NotFound(
                f"tenant {tenant}: nothing is folded of an agent {agent_id!r}",
                hint="its first decision may not be folded yet: is a projector running?",
                tenant=tenant,
                agent=agent_id,
            )
        return found

    async def _agent(self, tenant: str, agent_id: str) -> AgentState | None:
        known = self._projections.get("agents")
        agents = known if isinstance(known, CopiedEntities) else Agents()
        key, name = keys.agent_state(tenant, agent_id), agent_name(agent_id)
        store = FoldStore(self._server, tenant, agents)
        asked = [(key, pack("GET", key)), *store.entity_commands(name)]
        reply, *rest = await self._server.exchange_each(asked)
        at, stopped, entity, head = store.entity_of(rest)
        found = published_agent(tenant, copy_text(self._server, reply))
        if found is not None and found.version != agents.version:
            at = None  # of what readers take, nothing more is known here
        elif found is not None and (at is None or at.epoch == found.position.epoch):
            found = msgspec.structs.replace(found, stopped=stopped)
        elif at is not None and entity is not None:
            value = msgspec.convert(agents.entity_view(name, entity), AgentState)
            found = placed(value, tenant, agents.version, at, "committed", stopped=stopped)
        else:
            found = None
        if at is not None:
            check_folded("agents", at, head)
        if found is not None:
            check_folded("agents", found.position, head)
        return found

    async def effective_verdict(self, tenant: str, decision_id: str) -> EffectiveVerdict:
        """What holds of a decision now: the engine's verdict, or what people made of it.

        Raises:
            NotFound: no decision with this id is recorded that can be read.
            LedgerRolledBack: what is folded describes a history that is no more.
            EntriesMissing, IndexBehind: as `Ledger.get`.
        """
        name = DECISION_PREFIX + decision_id
        store = FoldStore(self._server, keys.checked_tenant(tenant), self._governance)
        position, stopped, followed, head = await store.read_entity(name)
        if position is not None:
            check_folded("governance", position, head)
        entry = await find_by_id(self._server, tenant, decision_id)
        body = None if entry is None else _decision(entry)
        if entry is None or body is None:
            raise errors.NotFound(
                f"tenant {tenant}: no decision has the id {decision_id!r}",
                tenant=tenant,
                id=decision_id,
            )
        followed = followed or {}
        resolution, overrides = followed.get("resolution"), followed.get("overrides", 0)
        return EffectiveVerdict(
            decision_id=decision_id,
            seq=entry.seq,
            verdict=body.verdict,
            effective=followed.get("effective_verdict", body.verdict),
            resolution=resolution,
            overrides=overrides,
            pending=body.verdict == "escalate" and resolution is None,
            position=position,
            stopped=stopped,
        )

    # -- any projection -----------------------------------------------------------------------

    async def state(
        self,
        tenant: str,
        projection: str = "governance",
        *,
        at_least: int | Receipt | None = None,
        as_of: int | datetime | None = None,
        timeout_s: float = 10.0,
    ) -> PublishedState:
        """The tenant's current state of any projection, read from Redis.

        Args:
            tenant: whose.
            projection: which fold.
            at_least: wait until this seq, or the event of this receipt, has been folded.
            as_of: as for `governance`.
            timeout_s: how long to wait for `at_least`.

        Raises:
            InvalidInput: as `governance`.
            NotFound: nothing is recorded or folded for the tenant, or no such projection.
            NotCaughtUp: the projector has not come that far in time.
            LedgerRolledBack: what is folded describes a history that is no more, and no projector
                has said so yet; where one has, `stopped` of what was folded last does.
        """
        store = self._store(tenant, projection)
        if as_of is not None:
            _check_alone(at_least)
            past = await fold_to(self._server, tenant, store.projection, as_of)
            return PublishedState(
                tenant=tenant,
                projection=projection,
                version=store.projection.version,
                value=store.projection.view(past.state),
                position=past.position,
                updated_at=None,
                source="folded",
            )
        wanted = _seq(at_least)
        deadline, pause_s = time.monotonic() + timeout_s, _POLL_MIN_S
        while True:
            found, head = await store.read_published_and_head()
            if found is None or found.seq < wanted or found.position.epoch != head.epoch:
                if await store.standing() in (Standing.ACTIVE, Standing.PINNED):
                    committed, head = await store.read_committed_and_head()
                    found = committed or found
                elif found is None:
                    raise errors.StateUnavailable(
                        f"tenant {tenant}: readers take another version of {projection} than "
                        f"{store.projection.version}, and its published copy is gone",
                        hint="a projector of the release that folds it publishes it again",
                    )
            if found is not None and found.stopped != errors.LedgerRolledBack.__name__:
                check_folded(projection, found.position, head)
            if found is not None and _reaches(found.position, at_least):
                return found
            if at_least is None or wanted == 0:
                raise await self._nothing(tenant, projection)
            if time.monotonic() >= deadline:
                at = None if found is None else found.position
                raise await self._late(tenant, projection, at_least, at, timeout_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)

    def _store(self, tenant: str, projection: str) -> FoldStore:
        known = self._projections.get(projection)
        if known is None:
            names = ", ".join(self._projections)
            raise errors.NotFound(
                f"no projection is called {projection!r}", hint=f"there is: {names}"
            )
        return FoldStore(self._server, keys.checked_tenant(tenant), known)

    async def _nothing(self, tenant: str, projection: str) -> errors.NotFound:
        head = await self._ledger.head(tenant)
        if not head.seq:
            return errors.NotFound.nothing_of(tenant)
        return errors.NotFound(
            f"tenant {tenant}: recorded to seq {head.seq}, and {projection} has folded none of it",
            hint="is a projector running? `govledger project --once` folds what there is",
        )

    async def _late(
        self,
        tenant: str,
        projection: str,
        at_least: int | Receipt | Position,
        at: Position | None,
        timeout_s: float,
    ) -> errors.LedgerError:
        wanted, folded = _seq(at_least), 0 if at is None else at.seq
        epoch = None if isinstance(at_least, int) else at_least.epoch
        head = await self._ledger.head(tenant)
        if epoch is not None and head.epoch not in ("", epoch):
            return errors.LedgerRolledBack(
                f"tenant {tenant}: seq {wanted} was recorded in epoch {epoch}, the ledger is now "
                f"of epoch {head.epoch}",
                hint="it was restored meanwhile: look whether the event is recorded, by its id",
                tenant=tenant,
            )
        return errors.NotCaughtUp(
            f"tenant {tenant}: {projection} has folded to seq {folded}, not to {wanted}, "
            f"after {timeout_s:g} s",
            hint="is a projector running? `govledger project --once` folds what there is",
            tenant=tenant,
            wanted=wanted,
            folded=folded,
        )


def _check_alone(at_least: object) -> None:
    if at_least is not None:
        raise errors.InvalidInput(
            "as_of: it cannot be asked for together with at_least",
            hint="the past is folded as far as as_of says, whatever a projector has done",
        )


def _seq(at_least: int | Receipt | Position | None) -> int:
    given: object = at_least  # callers without types
    if isinstance(given, (Receipt, Position)):
        return given.seq
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        return given or 0
    raise errors.InvalidInput(
        f"at_least: {ascii(given)[:80]} is neither a seq nor a receipt",
        hint="give an int (a seq), or what `append` returned",
    )


def _reaches(position: Position, at_least: int | Receipt | Position | None) -> bool:
    if at_least is None or isinstance(at_least, int):
        return position.seq >= (at_least or 0)
    return position.seq >= at_least.seq and position.epoch == at_least.epoch


def _decision(entry: Entry) -> Decision | None:
    try:
        body = read(entry)
    except Unfoldable:
        return None
    return body if isinstance(body, Decision) else None
