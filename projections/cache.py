"""A local cache of governance states that is never older than it says.

Every read from Redis, and every check that it would find the same again, is good for `max_stale_s`
from when it was sent. What is in use is checked four times in that time; the server's notices only
make it be read sooner. So whatever is lost (a notice, a connection, a reply) a state is served for
at most that long. After it, a caller reads for himself, or is told that he is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from ledger import errors, keys
from ledger.server import Server
from ledger.stream import Position
from projections.current import Current, Token, read_current, read_tokens
from projections.governance import Governance
from projections.notices import Notices, happened
from projections.state_model import GovernanceState

__all__ = ["StateCache"]

CHECKS_A_BOUND: Final = 4
IN_USE_S: Final = 5.0
"""A state that nobody asked for since is not kept fresh any more."""

IDLE_S: Final = 60.0
"""One that nobody asked for since is dropped."""

TENANTS_KEPT: Final = 256
MARKS_KEPT: Final = 10_000
NOTICES_PAUSE_S: Final = 0.005
"""So that no flood of notices makes a reader read without a pause."""

_log = logging.getLogger("ledger")


def _boot_clock() -> Callable[[], float]:
    """Seconds, those too in which the machine slept: then a state gets old as well."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    if clock_id is None:
        return time.monotonic
    clock = time.clock_gettime
    return lambda: clock(clock_id)


_now: Final = _boot_clock()


@dataclass(slots=True, eq=False)
class _Entry:
    """One tenant's state as it was read last; `mark` survives what made it unusable."""

    tenant: str
    used_at: float
    state: GovernanceState | None = None
    token: Token | None = None
    fresh_until: float = float("-inf")
    mark: Position | None = None
    dirty: bool = True
    watchers: int = 0
    reading: asyncio.Task[None] | None = None
    failure: errors.LedgerError | None = None
    failed_at: float = float("-inf")
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wakes who waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


class StateCache:
    """The states of the tenants that one reader asks for."""

    def __init__(self, server: Server, governance: Governance, max_stale_s: float) -> None:
        self._server = server
        self._governance = governance
        self._max_stale_s = max_stale_s
        self._entries: dict[str, _Entry] = {}
        self._notices = Notices(server, self._noticed)
        self._by_channel: dict[str, _Entry] = {}
        self._marks: dict[str, Position] = {}
        """Of tenants that were dropped: a state that is asked for again must not be older."""
        self._closed = False
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def aclose(self) -> None:
        """Ends what runs in the background; nothing is served any more."""
        self._closed = True
        tasks, self._tasks = self._tasks, []
        for entry in self._entries.values():
            entry.tell()
            if entry.reading:
                tasks.append(entry.reading)
        self._entries.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- for callers --------------------------------------------------------------------------

    def hit(self, tenant: str) -> GovernanceState | None:
        """The state where it is known to be fresh; without waiting."""
        entry = self._entries.get(tenant)
        if entry is None:
            return None
        now = _now()
        if now >= entry.fresh_until:
            return None
        entry.used_at = now
        if not self._tasks:
            self._start()
        return entry.state

    async def read(self, tenant: str) -> GovernanceState:
        """The state, by one read of whoever wants it now.

        Raises:
            NotFound: nothing is folded; without a message.
            StateUnavailable: the server does not answer in `max_stale_s`, or did not lately.
            LedgerRolledBack: as `read_current`.
        """
        entry = self._entry(tenant)
        for _ in range(3):
            lately = _now() - entry.failed_at < self._max_stale_s
            if not (lately and isinstance(entry.failure, errors.Unavailable)):
                await asyncio.shield(self._refresh(entry))
            if entry.failure is not None:
                raise self._failed(entry) from entry.failure.__cause__
            if entry.state is not None and _now() < entry.fresh_until:
                return entry.state
        raise self._failed(entry)

    def last(self, tenant: str) -> GovernanceState | None:
        """What was read last, marked as stale."""
        entry = self._entries.get(tenant)
        if entry is None or entry.state is None:
            return None
        return msgspec.structs.replace(entry.state, stale=True)

    async def wait(self, tenant: str, timeout_s: float) -> None:
        """Returns when something was read of the tenant, or failed; or after the time."""
        entry = self._entry(tenant)
        changed = entry.changed
        self._start()
        entry.watchers += 1
        try:
            await happened(changed, timeout_s)
        finally:
            entry.watchers -= 1
            entry.used_at = _now()

    async def watch(self, tenant: str, *, stale_ok: bool) -> AsyncGenerator[GovernanceState, None]:
        """Each newer state, until the reader or the ledger is closed. With `stale_ok` the last one
        again, marked, when cut off.

        Raises:
            LedgerRolledBack: as `read_current`.
            LedgerError: what no later attempt mends, such as rights that were taken away.
        """
        entry = self._entry(tenant)
        last: GovernanceState | None = None
        said_stale = False
        entry.watchers += 1
        try:
            self._start()
            while not (self._closed or self._server.closed):
                changed, state = entry.changed, entry.state
                fresh = state is not None and _now() < entry.fresh_until
                if state is not None and fresh and (said_stale or _is_news(state, last)):
                    last, said_stale = state, False
                    yield state
                    continue
                if entry.failure is not None and not _passes(entry.failure):
                    raise entry.failure
                if stale_ok and state and last and not fresh and not said_stale:
                    said_stale = True
                    yield msgspec.structs.replace(state, stale=True)
                    continue
                wait_s = max(entry.fresh_until - _now(), 0.0) if fresh else self._max_stale_s
                await happened(changed, wait_s)
        finally:
            entry.watchers -= 1
            entry.used_at = _now()

    # -- one entry ----------------------------------------------------------------------------

    def _entry(self, tenant: str) -> _Entry:
        if self._closed:
            raise errors.StateUnavailable(f"tenant {tenant}: this reader was closed", tenant=tenant)
        entry = self._entries.get(tenant)
        if entry is None:
            entry = self._entries[tenant] = _Entry(keys.checked_tenant(tenant), _now())
            entry.mark = self._marks.pop(tenant, None)
            channel = keys.published(tenant, self._governance.name)
            self._by_channel[channel] = entry
            self._notices.add(channel)
            self._drop_beyond_limit()
        elif not self._tasks:
            self._start()
        entry.used_at = _now()
        return entry

    def _drop_beyond_limit(self) -> None:
        if len(self._entries) > TENANTS_KEPT:
            unwatched = [one for one in self._entries.values() if not one.watchers]
            unwatched.sort(key=lambda one: one.used_at)
            for entry in unwatched[: len(self._entries) - TENANTS_KEPT]:
                self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        channel = keys.published(entry.tenant, self._governance.name)
        del self._entries[entry.tenant], self._by_channel[channel]
        self._notices.remove(channel)
        if entry.mark is not None:
            self._marks[entry.tenant] = entry.mark
            if len(self._marks) > MARKS_KEPT:
                del self._marks[next(iter(self._marks))]

    def _refresh(self, entry: _Entry) -> asyncio.Task[None]:
        """The read that is under way, or a new one. It never raises."""
        if entry.reading is None or entry.reading.done():
            entry.dirty = False
            entry.reading = asyncio.create_task(self._read(entry))
        return entry.reading

    async def _read(self, entry: _Entry) -> None:
        sent_at = _now()
        try:
            async with asyncio.timeout(self._max_stale_s):
                found = await read_current(self._server, entry.tenant, self._governance, entry.mark)
        except TimeoutError:
            self._fail(entry, errors.ServerUnreachable(f"no answer in {self._max_stale_s:g} s"))
        except errors.LedgerError as error:
            self._fail(entry, error)
        else:
            if found is None:
                self._fail(entry, errors.NotFound(f"tenant {entry.tenant}: nothing is folded"))
            else:
                self._keep(entry, found, sent_at)

    def _keep(self, entry: _Entry, found: Current, sent_at: float) -> None:
        if found.token != entry.token or entry.state is None:
            entry.state, entry.token = found
            entry.mark = found.state.position
        entry.failure = None
        entry.fresh_until = sent_at + self._max_stale_s
        entry.tell()

    def _fail(self, entry: _Entry, error: errors.LedgerError) -> None:
        """What is not known to be wrong may be served until it is too old."""
        if not isinstance(error, errors.Unavailable):
            entry.state = entry.token = None
            entry.fresh_until = float("-inf")
        entry.failure, entry.failed_at = error, _now()
        entry.tell()

    def _failed(self, entry: _Entry) -> errors.LedgerError:
        error = entry.failure
        if error is not None and not isinstance(error, errors.Unavailable):
            return error  # the next caller looks again
        last = entry.state
        known = "nothing was read before"
        if last is not None:
            known = f"what was read last is at seq {last.seq}"
        why = error.message if error is not None else "no answer came in time"
        return errors.StateUnavailable(
            f"tenant {entry.tenant}: the state cannot be read now: {why}; {known}",
            hint="a reader with stale_ok=True gets the last one, marked as stale",
            tenant=entry.tenant,
            seq=last and last.seq,
            recorded_at=last and last.recorded_at,
        )

    # -- in the background --------------------------------------------------------------------

    def _start(self) -> None:
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._keep_fresh(), name="govledger state cache"),
                asyncio.create_task(self._notices.run(), name="govledger notices"),
            ]
            for task in self._tasks:
                task.add_done_callback(_ended)

    def _noticed(self, channel: str) -> None:
        entry = self._by_channel.get(channel)
        if entry is not None:
            entry.dirty = True
            self._woken.set()

    async def _keep_fresh(self) -> None:
        interval_s = self._max_stale_s / CHECKS_A_BOUND
        check_at = _now()
        while not self._server.closed and self._entries:
            await happened(self._woken, check_at - _now())
            await asyncio.sleep(NOTICES_PAUSE_S)
            self._woken.clear()
            now = _now()
            for entry in [one for one in self._entries.values() if self._is_idle(one, now)]:
                self._drop(entry)
            in_use = [one for one in self._entries.values() if self._is_in_use(one, now)]
            for entry in in_use:
                if entry.dirty:
                    self._refresh(entry)
            if now >= check_at:
                await self._check(in_use)
                check_at = _now() + interval_s
        tasks, self._tasks = self._tasks, []
        if len(tasks) > 1:
            tasks[1].cancel()

    def _is_idle(self, entry: _Entry, now: float) -> bool:
        return not entry.watchers and now - entry.used_at > IDLE_S

    def _is_in_use(self, entry: _Entry, now: float) -> bool:
        if entry.watchers or now - entry.used_at < IN_USE_S:
            return True
        if entry.dirty:
            entry.fresh_until = float("-inf")  # the next caller reads it
        return False

    async def _check(self, entries: list[_Entry]) -> None:
        """Finds out in one go which states are still what is there; the others are read again."""
        for entry in entries:
            if entry.state is None or entry.failure is not None:
                self._refresh(entry)
        known = [(one, one.state, one.token) for one in entries if one.state and not one.failure]
        if not known:
            return
        sent_at = _now()
        try:
            async with asyncio.timeout(self._max_stale_s):
                tokens = await read_tokens(
                    self._server,
                    self._governance,
                    [entry.tenant for entry, _, _ in known],
                    [state for _, state, _ in known],
                )
        except (TimeoutError, errors.LedgerError) as error:
            _log.debug("states: %s", error)
            return  # each gets too old, and whoever asks then is told
        for (entry, _, token), now in zip(known, tokens, strict=True):
            if now is None or now != token:
                self._refresh(entry)
            elif entry.token is token:
                entry.fresh_until = max(entry.fresh_until, sent_at + self._max_stale_s)


def _passes(error: errors.LedgerError) -> bool:
    """Whether a later attempt may find what this one did not."""
    if isinstance(error, errors.PermissionDenied | errors.AuthenticationFailed):
        return False
    return isinstance(error, errors.Unavailable | errors.NotFound)


def _is_news(state: GovernanceState, last: GovernanceState | None) -> bool:
    if last is None or state.position.epoch != last.position.epoch:
        return True
    return state.seq > last.seq or (state.seq == last.seq and state.stopped != last.stopped)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s ended by a defect", task.get_name(), exc_info=error)
