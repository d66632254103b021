"""What a tenant's governance state is now, read from Redis; and whether it still is what was read.

The published copy counts where it is whole and belongs to the epoch that is committed; else the
committed fold state, from which the same value is made. Either is compared with the ledger's head:
a state that is ahead of it, or of another epoch, is of a history that is no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import orjson

from ledger import errors, keys
from ledger.server import Reply, Server, pack
from ledger.stream import Head, Position, head_command, parse_head
from projections.governance import Governance
from projections.projection import STATE
from projections.publishing import copy_text
from projections.state_model import GovernanceState, governance_of, published_governance
from projections.store import STOPPED, parse_position

__all__ = ["Current", "Token", "check_folded", "read_current", "read_tokens"]

_TAIL_BYTES = 600
"""Of an envelope: its times and metadata, which each publishing changes."""


class Token(NamedTuple):
    """Equal for as long as a read would find the same: the end of the published text, and what is
    committed (its epoch alone where the published copy counts).
    """

    tail: bytes
    committed: bytes


class Current(NamedTuple):
    """A state that was read."""

    state: GovernanceState
    token: Token


class _Committed(NamedTuple):
    """Of the version that this release folds; nothing where readers take another one."""

    position: Position | None
    raw: bytes
    is_active: bool


async def read_current(
    server: Server, tenant: str, governance: Governance, mark: Position | None
) -> Current | None:
    """The state of now; None where nothing is folded.

    `mark`: what was read before; a published copy that is behind it is passed over.

    Raises:
        LedgerRolledBack: the ledger, or what is folded of it, is behind what was read before.
        StateUnavailable: the published copy is gone, and what is committed is of a version that
            this release does not fold.
        Unavailable: the server cannot be asked.
    """
    published_key = keys.published(tenant, governance.name)
    # The head is read last, so it is at least as far as what was folded.
    asked = [(published_key, pack("GET", published_key)), *_commands(tenant, governance)]
    raw, *replies, head_reply = await server.exchange_each(asked)
    text = copy_text(server, raw)
    committed = _committed(server, governance, *replies)
    head = parse_head(tenant, server.checked(head_reply))
    state = published_governance(tenant, text) if text else None
    tail = text[-_TAIL_BYTES:]
    if state is not None and _counts(state.position, committed.position, mark):
        token = Token(tail, _epoch(committed))
    elif committed.position is not None:
        found = await _read_committed(server, tenant, governance)
        if found is None:
            return None
        state, token, head = found[0], Token(tail, found[1]), found[2]
    elif not committed.is_active:
        raise errors.StateUnavailable(
            f"tenant {tenant}: the published copy is gone, and readers take a version of "
            f"{governance.name} that this release does not fold",
            hint="a projector of that release publishes it again within seconds",
            tenant=tenant,
        )
    elif state is None:
        return None
    else:
        token = Token(tail, b"")
    _check(state, head, mark)
    return Current(state, token)


async def read_tokens(
    server: Server, governance: Governance, tenants: Sequence[str], since: Sequence[GovernanceState]
) -> list[Token | None]:
    """By tenant the token of now, to be compared with that of the state that was read; None where
    that state has to be read again: the ledger is behind it, or somebody damaged something.
    """
    published = [keys.published(tenant, governance.name) for tenant in tenants]
    tails = await server.exchange_each(
        [(key, pack("GETRANGE", key, -_TAIL_BYTES, -1)) for key in published]
    )
    asked = [command for tenant in tenants for command in _commands(tenant, governance)]
    replies = iter(await server.exchange_each(asked))
    tokens: list[Token | None] = []
    for tenant, tail_reply, state in zip(tenants, tails, since, strict=True):
        active_reply, committed_reply, head_reply = (next(replies) for _ in range(3))
        try:
            tail = copy_text(server, tail_reply)
            committed = _committed(server, governance, active_reply, committed_reply)
            _check(state, parse_head(tenant, server.checked(head_reply)), None)
        except errors.LedgerError:
            tokens.append(None)  # reading it again says why
            continue
        of_copy = state.source == "published"
        tokens.append(Token(tail, _epoch(committed) if of_copy else committed.raw))
    return tokens


def _commands(tenant: str, governance: Governance) -> list[tuple[str, bytes]]:
    key = keys.projection(tenant, governance.name, governance.version)
    active = keys.projection_active(tenant)
    return [
        (active, pack("HGET", active, governance.name)),
        (key, pack("HMGET", key, "position", "build")),
        (keys.head(tenant), head_command(tenant)),
    ]


def _committed(server: Server, governance: Governance, active: Reply, reply: Reply) -> _Committed:
    version = server.checked(active)
    if version is not None and version != b"%d" % governance.version:
        return _Committed(None, b"", is_active=False)
    position, build = server.checked(reply)
    at = parse_position(position)
    raw = b"" if at is None else b"%b %b" % (position, build or b"")
    return _Committed(at, raw, is_active=True)


def _epoch(committed: _Committed) -> bytes:
    return b"" if committed.position is None else committed.position.epoch.encode()


def _counts(published: Position, committed: Position | None, mark: Position | None) -> bool:
    """Whether the published copy may be taken."""
    if committed is not None and committed.epoch != published.epoch:
        return False
    return mark is None or mark.epoch != published.epoch or mark.seq <= published.seq


async def _read_committed(
    server: Server, tenant: str, governance: Governance
) -> tuple[GovernanceState, bytes, Head] | None:
    key = keys.projection(tenant, governance.name, governance.version)
    packed = [pack("HMGET", key, "position", "build", STATE, STOPPED), head_command(tenant)]
    whole, head = (server.checked(reply) for reply in await server.exchange(key, packed, 2))
    position, build, raw_state, raw_stopped = whole
    at = parse_position(position)
    if at is None or raw_state is None:
        return None
    value = governance.view(orjson.loads(raw_state))
    stopped = raw_stopped.decode() if raw_stopped else None
    state = governance_of(tenant, governance.version, at, value, "committed", stopped=stopped)
    return state, b"%b %b" % (position, build or b""), parse_head(tenant, head)


def _check(state: GovernanceState, head: Head, mark: Position | None) -> None:
    at = state.position
    check_folded("governance", at, head)
    if mark is not None and mark.epoch == at.epoch and mark.seq > at.seq:
        how = f"was read at {mark}, what is folded is now at {at}"
        raise _rolled_back(state.tenant, "governance", how)


def check_folded(projection: str, at: Position, head: Head) -> None:
    """Whether a state that was read before the head can be of the ledger as it is.

    Raises:
        LedgerRolledBack: the ledger is behind it, or of another epoch.
    """
    if head.epoch == at.epoch and head.seq < at.seq:
        how = f"is folded to {at}, the ledger's head is {head.position}"
        raise _rolled_back(head.tenant, projection, how)
    if head.epoch != at.epoch:
        now = f"of epoch {head.epoch}" if head.epoch else "gone"
        raise _rolled_back(head.tenant, projection, f"is folded to {at}, the ledger is now {now}")


def _rolled_back(tenant: str, projection: str, how: str) -> errors.LedgerRolledBack:
    return errors.LedgerRolledBack(
        f"tenant {tenant}: the {projection} state {how}",
        hint="the ledger was restored or lost its end: nothing folded so far describes it; "
        f"govledger rebuild {tenant} --accept-rollback takes it as it is",
        tenant=tenant,
    )
