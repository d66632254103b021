"""Prometheus metrics, gathered when they are asked for: `--metrics-port` of what keeps running.

Tenants have series of their own while there are at most 200; past that only sums and the worst are
told, since a series a tenant would cost more than the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Final

from ledger import errors
from ledger.ledger import Ledger
from ledger.service.inspection import number
from ledger.service.observation import Observation, TenantCounts, observe

try:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as missing:  # the extra `metrics`
    raise errors.InvalidInput(
        "--metrics-port needs the package prometheus-client",
        hint="pip install 'govledger[metrics]'",
    ) from missing

__all__ = ["metrics", "metrics_served"]

TENANT_SERIES_LIMIT: Final = 200
GATHER_TIMEOUT_S: Final = 8.0
"""Prometheus itself gives up after 10 s."""

SHARED_S: Final = 0.5
_log = logging.getLogger("ledger")

_NODE_GAUGES: Final = (
    ("memory_used_bytes", "used_memory", "Memory that the data takes"),
    ("memory_max_bytes", "maxmemory", "maxmemory; 0 = no limit"),
    ("connected_clients", "connected_clients", "Connections"),
    ("max_clients", "maxclients", "maxclients"),
    ("ops_per_second", "instantaneous_ops_per_sec", "Commands a second, by the server's own count"),
    ("replicas", "connected_slaves", "Replicas that are connected"),
    ("last_save_timestamp_seconds", "rdb_last_save_time", "When the last snapshot was taken"),
)
_NODE_COUNTERS: Final = (
    ("commands_processed", "total_commands_processed", "Commands"),
    ("evicted_keys", "evicted_keys", "Keys that were evicted"),
    ("rejected_connections", "rejected_connections", "Connections over maxclients"),
)
_NODE_STATES: Final = (
    ("last_save_ok", "rdb_last_bgsave_status", "Whether the last snapshot worked"),
    ("aof_write_ok", "aof_last_write_status", "Whether the append-only file can be written"),
)
_TENANT_COUNTERS: Final = (
    ("appends", "Events recorded"),
    ("duplicates", "Events that were recorded already under the same id with the same content"),
    ("conflicts", "Events refused since their id is recorded with other content"),
    ("incidents", "What others did to a stream: foreign entries, deletions"),
)


def metrics(seen: Observation) -> Iterator[Metric]:
    """What was observed, as metric families."""
    yield GaugeMetricFamily("govledger_up", "Whether the server could be asked", value=1)
    yield from _of_nodes(seen)
    yield from _of_tenants(seen)
    yield from _of_folds(seen)
    yield from _of_jobs(seen)


def _of_nodes(seen: Observation) -> Iterator[Metric]:
    for name, field, told in _NODE_GAUGES:
        gauge = GaugeMetricFamily(f"govledger_redis_{name}", told, labels=["node"])
        for node, info, _ in seen.nodes:
            gauge.add_metric([node], number(info, field))
        yield gauge
    for name, field, told in _NODE_COUNTERS:
        counter = CounterMetricFamily(f"govledger_redis_{name}", told, labels=["node"])
        for node, info, _ in seen.nodes:
            counter.add_metric([node], number(info, field))
        yield counter
    for name, field, told in _NODE_STATES:
        state = GaugeMetricFamily(f"govledger_redis_{name}", told, labels=["node"])
        for node, info, _ in seen.nodes:
            state.add_metric([node], int(info.get(field, "ok") == "ok"))
        yield state
    keys = GaugeMetricFamily("govledger_redis_keys", "Keys", labels=["node"])
    for node, _, count in seen.nodes:
        keys.add_metric([node], count)
    yield keys


def _of_tenants(seen: Observation) -> Iterator[Metric]:
    yield GaugeMetricFamily("govledger_tenants", "Tenants", value=len(seen.tenants))
    shown = _shown(seen)
    for name, told in _TENANT_COUNTERS:
        counter = CounterMetricFamily(f"govledger_{name}", told, labels=["tenant"])
        for tenant, counts in shown:
            counter.add_metric([tenant], getattr(counts, name))
        yield counter
    gauge = GaugeMetricFamily(
        "govledger_quarantined_entries", "Entries that no fold could read", labels=["tenant"]
    )
    for tenant, counts in shown:
        gauge.add_metric([tenant], counts.quarantined)
    yield gauge


def _shown(seen: Observation) -> list[tuple[str, TenantCounts]]:
    """Each tenant, or the sum of all under the empty name, which no tenant has."""
    if len(seen.tenants) <= TENANT_SERIES_LIMIT:
        return list(seen.tenants.items())
    return [("", _sum(seen.tenants.values()))]


def _sum(counts: Iterable[TenantCounts]) -> TenantCounts:
    rows = [(c.appends, c.duplicates, c.conflicts, c.incidents, c.quarantined) for c in counts]
    return TenantCounts(*map(sum, zip(*rows, strict=True)))


def _of_folds(seen: Observation) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "govledger_fold_lag_seconds",
        "How long the oldest entry that is not folded has waited",
        value=seen.lag_seconds,
    )
    stopped = sum(one.problem is not None for one in seen.standings)
    yield GaugeMetricFamily(
        "govledger_folds_stopped", "Folds that cannot go on: rolled back or damaged", value=stopped
    )
    lag = GaugeMetricFamily(
        "govledger_fold_lag_entries", "Entries not folded yet", labels=["tenant", "projection"]
    )
    age = GaugeMetricFamily(
        "govledger_publish_age_seconds",
        "Since the state was published; it is renewed at half of its TTL",
        labels=["tenant", "projection"],
    )
    few = len(seen.tenants) <= TENANT_SERIES_LIMIT
    for projection in {one.projection.name for one in seen.standings}:
        of_it = [one for one in seen.standings if one.projection.name == projection]
        ages = {
            one.tenant: (seen.now_ms - one.published_ms) / 1000
            for one in of_it
            if one.published_ms is not None
        }
        if few:
            for one in of_it:
                lag.add_metric([one.tenant, projection], one.behind)
            for tenant, seconds in ages.items():
                age.add_metric([tenant, projection], seconds)
        else:  # the sum, and the oldest
            lag.add_metric(["", projection], sum(one.behind for one in of_it))
            age.add_metric(["", projection], max(ages.values(), default=0.0))
    yield lag
    yield age


def _of_jobs(seen: Observation) -> Iterator[Metric]:
    runs = CounterMetricFamily(
        "govledger_job_runs", "Runs of a job that have ended", labels=["job", "status"]
    )
    for (job, status), count in sorted(seen.job_counts.items()):
        runs.add_metric([job, status], count)
    at = GaugeMetricFamily("govledger_job_last_run_timestamp_seconds", "When", labels=["job"])
    took = GaugeMetricFamily("govledger_job_last_run_seconds", "How long", labels=["job"])
    ok = GaugeMetricFamily("govledger_job_last_run_ok", "Whether it did not fail", labels=["job"])
    for job, run in sorted(seen.last_runs.items()):
        at.add_metric([job], run.begun_ms / 1000)
        took.add_metric([job], run.seconds or 0.0)
        ok.add_metric([job], int(run.status in ("ok", "skipped")))
    yield from (runs, at, took, ok)


# -- served --------------------------------------------------------------------------------------


class _LedgerCollector(Collector):
    """Asks the event loop that the ledger lives in; scrapes come in threads of their own."""

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> None:
        self._ledger = ledger
        self._loop = loop
        self._lock = asyncio.Lock()
        self._seen: Observation | None = None

    def describe(self) -> Iterable[Metric]:
        """Nothing: or the registry would collect at once."""
        return ()

    def collect(self) -> Iterator[Metric]:
        asked = asyncio.run_coroutine_threadsafe(self._observed(), self._loop)
        try:
            seen = asked.result(GATHER_TIMEOUT_S + 1)
        except (errors.LedgerError, TimeoutError) as error:
            _log.warning("metrics: %s", str(error) or "the server does not answer in time")
            yield GaugeMetricFamily("govledger_up", "Whether the server could be asked", value=0)
            return
        yield from metrics(seen)

    async def _observed(self) -> Observation:
        """One look at a time; scrapes that come together share it."""
        async with asyncio.timeout(GATHER_TIMEOUT_S), self._lock:
            fresh_from = time.monotonic() - SHARED_S
            if self._seen is None or self._seen.taken_at < fresh_from:
                self._seen = None
                self._seen = await observe(self._ledger)
            return self._seen


@asynccontextmanager
async def metrics_served(ledger: Ledger, host: str, port: int) -> AsyncIterator[int]:
    """Serves `/metrics` while the block runs; gives the port (one is chosen for 0).

    Raises:
        InvalidInput: the port cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(_LedgerCollector(ledger, asyncio.get_running_loop()))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise errors.InvalidInput(
            f"--metrics-port: {host}:{port} cannot be listened on: {error.strerror or error}",
            hint="another port, or --metrics-host with an address of this machine",
        ) from error
    try:
        yield int(server.server_port)
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
