"""A live screen: who appends, what was decided, how far the folds are, how the server is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ledger import errors
from ledger.ledger import Ledger
from ledger.service.inspection import number
from ledger.service.observation import Observation, observe
from ledger.service.terminal import printable
from ledger.wording import counted
from projections import StateReader

__all__ = ["Row", "Screen", "as_json", "between", "live", "render"]

VERDICTS: Final = ("allow", "deny", "escalate", "transform", "abstain", "error")


@dataclass(frozen=True, slots=True)
class Row:
    """A tenant, over the time between two looks."""

    tenant: str
    appends_per_second: float
    appends: int
    behind: int
    verdicts: dict[str, int] | None
    """What its state counts, all in all; None where there is none yet."""
    problem: str | None


@dataclass(frozen=True, slots=True)
class Screen:
    """What is shown at one time."""

    address: str
    seconds: float
    appends_per_second: float
    ops_per_second: int
    memory_bytes: int
    memory_limit_bytes: int
    clients: int
    keys: int
    tenants: int
    behind: int
    lag_seconds: float
    rows: list[Row]


async def between(ledger: Ledger, before: Observation, after: Observation, limit: int) -> Screen:
    """The tenants with the highest append rate, then those furthest behind; at most `limit`."""
    seconds = max(after.taken_at - before.taken_at, 1e-3)
    rates = {
        tenant: max(0, now.appends - _appends(before, tenant)) / seconds
        for tenant, now in after.tenants.items()
    }
    behind: dict[str, int] = dict.fromkeys(after.tenants, 0)
    problems: dict[str, str] = {}
    for one in after.standings:
        behind[one.tenant] = max(behind[one.tenant], one.behind)
        if one.problem:
            problems[one.tenant] = one.problem
    order = sorted(after.tenants, key=lambda one: (-rates[one], -behind[one], one))[:limit]
    rows = [
        Row(
            tenant,
            round(rates[tenant], 1),
            after.tenants[tenant].appends,
            behind[tenant],
            await _verdicts(ledger, tenant),
            problems.get(tenant),
        )
        for tenant in order
    ]
    infos = [info for _, info, _ in after.nodes]
    return Screen(
        address=after.address,
        seconds=round(seconds, 3),
        appends_per_second=round(sum(rates.values()), 1),
        ops_per_second=sum(number(info, "instantaneous_ops_per_sec") for info in infos),
        memory_bytes=sum(number(info, "used_memory") for info in infos),
        memory_limit_bytes=sum(number(info, "maxmemory") for info in infos),
        clients=sum(number(info, "connected_clients") for info in infos),
        keys=sum(keys for _, _, keys in after.nodes),
        tenants=len(after.tenants),
        behind=sum(behind.values()),
        lag_seconds=round(after.lag_seconds, 1),
        rows=rows,
    )


def _appends(seen: Observation, tenant: str) -> int:
    known = seen.tenants.get(tenant)
    return known.appends if known else 0


async def _verdicts(ledger: Ledger, tenant: str) -> dict[str, int] | None:
    try:
        value = (await StateReader(ledger).state(tenant)).value
    except errors.NotFound:
        return None
    counted = value.get("decisions", {}).get("by_verdict", {})
    return {verdict: int(counted.get(verdict, 0)) for verdict in VERDICTS}


# -- shown ---------------------------------------------------------------------------------------


def as_json(screen: Screen) -> dict[str, Any]:
    """One object, with a list of `rows`."""
    shown = {name: getattr(screen, name) for name in Screen.__slots__}
    return shown | {
        "rows": [{name: getattr(row, name) for name in Row.__slots__} for row in screen.rows]
    }


def render(screen: Screen) -> Group:
    """For a terminal."""
    limit = screen.memory_limit_bytes
    memory = f"{screen.memory_bytes / 2**20:.1f} MiB" + (
        f" of {limit / 2**20:.0f} ({screen.memory_bytes / limit:.0%})" if limit else ""
    )
    head = Text.assemble(
        (screen.address, "bold"),
        f"  {screen.appends_per_second:.1f} appends/s  {screen.ops_per_second} ops/s  {memory}  "
        f"{counted(screen.clients, 'client')}  {counted(screen.keys, 'key')}\n",
        f"{counted(screen.tenants, 'tenant')}  {counted(screen.behind, 'entry')} behind",
        f", the oldest for {screen.lag_seconds:.1f} s" if screen.behind else "",
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("tenant", no_wrap=True)
    for name in ("appends/s", "events", "behind", *VERDICTS):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in screen.rows:
        table.add_row(
            printable(row.tenant),
            f"{row.appends_per_second:.1f}",
            str(row.appends),
            Text(str(row.behind), style="yellow" if row.behind else ""),
            *_mix(row.verdicts),
            Text(printable(row.problem or ""), style="red"),
        )
    return Group(head, table)


def _mix(verdicts: dict[str, int] | None) -> list[str]:
    """Each verdict's share of all decisions."""
    total = sum(verdicts.values()) if verdicts else 0
    if verdicts is None or not total:
        return ["-"] * len(VERDICTS)
    return [f"{verdicts[one] / total:.0%}" if verdicts[one] else "" for one in VERDICTS]


async def live(ledger: Ledger, interval_s: float, limit: int) -> None:
    """Keeps the screen up to date until it is cancelled; an outage is shown and waited for."""
    before = await observe(ledger)
    with Live(console=Console(), screen=True, auto_refresh=False) as screen:
        while True:
            await asyncio.sleep(interval_s)
            try:
                after = await observe(ledger)
                shown = render(await between(ledger, before, after, limit))
                before = after
            except errors.Unavailable as error:
                shown = Group(Text(printable(str(error)), style="red"))
            screen.update(shown, refresh=True)
