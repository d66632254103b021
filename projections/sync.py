"""The reader for notebooks and synchronous engines: `StateReader`'s methods, without await.

A facade over the event loop of a `ledger.sync.Ledger`; it has no logic.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any, Self

from ledger.sync import Ledger
from projections.reader import StateReader as AsyncStateReader
from projections.state_model import AgentState, EffectiveVerdict, GovernanceState
from projections.store import PublishedState

__all__ = ["StateReader"]


class StateReader:
    """`projections.StateReader` for callers without an event loop; from any thread."""

    def __init__(self, ledger: Ledger, *args: Any, **options: Any) -> None:
        """As `projections.StateReader`, over a `ledger.sync.Ledger`."""
        self._ledger = ledger
        self._reader = AsyncStateReader(ledger.wrapped, *args, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As `projections.StateReader.aclose`."""
        self._ledger.run(self._reader.aclose())

    def governance(self, tenant: str, **options: Any) -> GovernanceState:
        """As `projections.StateReader.governance`."""
        return self._ledger.run(self._reader.governance(tenant, **options))

    def agent(self, tenant: str, agent_id: str) -> AgentState:
        """As `projections.StateReader.agent`."""
        return self._ledger.run(self._reader.agent(tenant, agent_id))

    def effective_verdict(self, tenant: str, decision_id: str) -> EffectiveVerdict:
        """As `projections.StateReader.effective_verdict`."""
        return self._ledger.run(self._reader.effective_verdict(tenant, decision_id))

    def state(self, tenant: str, projection: str = "governance", **options: Any) -> PublishedState:
        """As `projections.StateReader.state`."""
        return self._ledger.run(self._reader.state(tenant, projection, **options))

    def watch(self, tenant: str, **options: Any) -> Iterator[GovernanceState]:
        """As `projections.StateReader.watch`; waits in `next()`."""
        states = self._reader.watch(tenant, **options)
        try:
            while True:
                yield self._ledger.run(_next(states))
        finally:
            self._ledger.run(states.aclose())


async def _next(states: AsyncGenerator[GovernanceState, None]) -> GovernanceState:
    return await anext(states)
