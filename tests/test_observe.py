"""What is shown while it runs: metrics, top, logs; and that no secret is ever among it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ledger import Decision, Ledger, errors, keys, load_settings
from ledger.service import terminal
from ledger.service.cli import app
from ledger.service.metrics import TENANT_SERIES_LIMIT, metrics
from ledger.service.observation import TenantCounts, observe
from ledger.service.top import between, render
from projections import Projector
from tests.commands import GOVLEDGER, environment, run
from tests.servers import new_tenant, wait_until

SECRET = "hunter2/with#odd?chars@and:colons"
QUOTED = "hunter2%2Fwith%23odd%3Fchars%40and%3Acolons"
NO_JOBS = '{"expire": {"every_seconds": 1}, "snapshot": {"enabled": false}}'


def event(event_id: str, verdict: str = "allow") -> Decision:
    at = datetime(2026, 3, 3, tzinfo=UTC)  # the same again is a duplicate
    return Decision(id=event_id, at=at, agent="a", action="b", verdict=verdict)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name, with `_total` for counters, and label values in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
        return samples(reply.read().decode())


async def scraped_when(port: int, condition: Any) -> dict[tuple[str, ...], float]:
    while not condition(found := await asyncio.to_thread(scraped, port)):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return found


@pytest.fixture
def service(spawn, tmp_path):
    """`service(url, *words)`: a command that keeps running and serves metrics; with `port`."""

    def started(url: str | None, *words: object) -> subprocess.Popen[bytes]:
        log = tmp_path / f"service-{len(list(tmp_path.glob('service-*')))}.log"
        with log.open("wb") as stderr:
            process = spawn(
                [*GOVLEDGER, *map(str, words), "--json", "--metrics-port", "0"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(url, GOVLEDGER_JOBS=NO_JOBS, MEMORY_MAX_RECONNECT_ATTEMPTS="2"),
            )
        assert process.stdout.readline(), log.read_text()
        process.log = log
        wait_until(lambda: "metrics on" in log.read_text(), "metrics are served")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        (line,) = [line["message"] for line in lines if line["message"].startswith("metrics on")]
        process.port = int(line.rpartition(":")[2].partition("/")[0])
        return process

    return started


# -- metrics -------------------------------------------------------------------------------------


async def test_metrics_tell_what_the_ledger_did(fresh_server, service, tenant):
    """Appends, duplicates and conflicts, lag, age, jobs and the server's own figures are right."""
    server = fresh_server()
    async with Ledger.connect(server.url) as ledger:
        await ledger.append_many(tenant, [event("one"), event("two", "deny")])
        await Projector(ledger).run_once([tenant])
        await ledger.append(tenant, event("three"))
        await ledger.append_many(tenant, [event("one"), event("two", "deny")])
        with pytest.raises(errors.ConflictingEvent):
            await ledger.append(tenant, event("one", "deny"))
        process = service(server.url, "schedule")
        found = await scraped_when(
            process.port, lambda found: ("govledger_job_last_run_ok", "expire") in found
        )
    assert found["govledger_up",] == 1
    assert found["govledger_tenants",] == 1
    assert found["govledger_appends_total", tenant] == 3
    assert found["govledger_duplicates_total", tenant] == 2
    assert found["govledger_conflicts_total", tenant] == 1
    assert found["govledger_fold_lag_entries", "governance", tenant] == 1
    assert found["govledger_fold_lag_seconds",] > 0
    assert found["govledger_publish_age_seconds", "governance", tenant] > 0
    assert found["govledger_job_last_run_ok", "expire"] == 1
    assert found["govledger_redis_memory_used_bytes", ""] > 0
    assert found["govledger_redis_connected_clients", ""] >= 1
    assert found["govledger_redis_keys", ""] >= 4
    assert found["govledger_redis_commands_processed_total", ""] > 0
    server.kill()
    down = await scraped_when(process.port, lambda found: found["govledger_up",] == 0)
    assert down == {("govledger_up",): 0}
    server.restart()
    await scraped_when(process.port, lambda found: found["govledger_up",] == 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


async def test_project_and_dev_serve_them_too(fresh_server, service, embedded_dir):
    """The projector and dev have the same metrics; the port is free again at their end."""
    for process in (
        service(fresh_server().url, "project"),
        service(None, "dev", "--data", embedded_dir),
    ):
        assert (await asyncio.to_thread(scraped, process.port))["govledger_up",] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        with pytest.raises(urllib.error.URLError):
            await asyncio.to_thread(scraped, process.port)


def test_without_the_extra_nothing_is_started(tmp_path, monkeypatch):
    """Where prometheus-client is missing, the command says so before it starts a server."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "ledger.service.metrics")
    monkeypatch.chdir(tmp_path)
    for words in (["dev", "--data", "data"], ["project", "--once", "--url", "embedded:///data"]):
        with pytest.raises(errors.InvalidInput, match="prometheus-client") as refused:
            app([*words, "--metrics-port", "0"], standalone_mode=False)
        assert refused.value.hint == "pip install 'govledger[metrics]'"
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_named(valkey):
    """Where the port is taken the command ends with 2 and says which."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(valkey.url, "project", "--metrics-port", port)
    assert done.code == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.err


async def test_many_tenants_are_summed(valkey):
    """Past the limit there is one series for all, and nothing of it is lost."""
    tenants = [new_tenant() for _ in range(3)]
    async with Ledger.connect(valkey.url) as ledger:
        for tenant in tenants:
            await ledger.append(tenant, event("one"))
        seen = await observe(ledger)
    seen.tenants = {f"t{n}": TenantCounts(appends=2) for n in range(TENANT_SERIES_LIMIT + 1)}
    families = {family.name: family.samples for family in metrics(seen)}
    (sample,) = families["govledger_appends"]
    assert (sample.labels["tenant"], sample.value) == ("", 2 * (TENANT_SERIES_LIMIT + 1))
    lags = {lag.labels["projection"]: lag.value for lag in families["govledger_fold_lag_entries"]}
    assert lags.keys() == {"governance", "agents"}
    assert sum(lags.values()) == sum(one.behind for one in seen.standings) >= 6


async def test_counting_is_never_in_the_way(fresh_server, server, tenant):
    """A user who may not count gets duplicates and conflicts answered as anybody else."""
    own = fresh_server(server.kind)
    own.cli("ACL", "SETUSER", "few", "on", ">pw", "~*", "+@all", "-hincrby")
    async with Ledger.connect(own.url.replace("redis://", "redis://few:pw@")) as ledger:
        with pytest.raises(errors.ConflictingEvent):
            await ledger.append_many(tenant, [event("x"), event("x", "deny")])
        assert own.cli("EXISTS", keys.head(tenant)) == 0
        await ledger.append(tenant, event("one"))
        assert (await ledger.append(tenant, event("one"))).duplicate
        with pytest.raises(errors.ConflictingEvent):
            await ledger.append(tenant, event("one", "deny"))
    assert own.cli("HGET", keys.head(tenant), "duplicates") is None
    async with Ledger.connect(own.url) as ledger:
        again = [event("one"), event("new"), event("one")]
        assert [one.duplicate for one in await ledger.append_many(tenant, again)] == [
            True,
            False,
            True,
        ]
        with pytest.raises(errors.ConflictingEvent):
            await ledger.append(tenant, event("one", "deny"))
    assert own.cli("HMGET", keys.head(tenant), "duplicates", "conflicts") == ["2", "1"]


# -- top -----------------------------------------------------------------------------------------


async def test_top_shows_rates_verdicts_and_lag(fresh_server, server, tenant):
    """Between two looks: the tenant that appends first, its mix, and what is not folded."""
    own = fresh_server(server.kind)
    idle = new_tenant()
    async with Ledger.connect(own.url) as ledger:
        await ledger.append(idle, event("one"))
        await ledger.append_many(tenant, [event("a"), event("b", "deny"), event("c", "deny")])
        await Projector(ledger).run_once()
        before = await observe(ledger)
        await ledger.append_many(tenant, [event(f"more-{n}") for n in range(10)])
        screen = await between(ledger, before, await observe(ledger), 5)
    assert [row.tenant for row in screen.rows] == [tenant, idle]
    busy, quiet = screen.rows
    assert busy.appends_per_second > 0 == quiet.appends_per_second
    assert (busy.appends, busy.behind) == (13, 10)
    assert busy.verdicts == {
        **dict.fromkeys(busy.verdicts, 0),
        "allow": 1,
        "deny": 2,
    }
    assert screen.behind == 10
    assert screen.lag_seconds >= 0
    (told,) = run(own.url, "top", "--once", "--json", "--interval", "0.1").lines
    assert {row["tenant"] for row in told["rows"]} == {tenant, idle}
    assert told["keys"] > 0
    shown = run(own.url, "top", "--interval", "0.1", "--limit", "1").out
    assert "behind" in shown
    assert "deny" in shown
    assert tenant in shown
    assert idle not in shown
    assert render(screen)


def test_top_is_live_at_a_terminal(valkey):
    """At a terminal the screen is drawn again and again, until Ctrl-C ends it with 130."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*GOVLEDGER, "top", "--interval", "0.1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(valkey.url, TERM="xterm"),
    )
    os.close(theirs)
    shown = b""
    while shown.count(b"appends/s") < 6:
        shown += os.read(ours, 65_536)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    os.close(ours)


# -- logs and secrets -----------------------------------------------------------------------------


def test_logs_are_json_where_nobody_watches(fresh_server, service):
    """Each line of a service's stderr is an object with time, level, logger and message."""
    server = fresh_server()
    process = service(server.url, "schedule")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    assert all({"at", "level", "logger", "message"} <= set(line) for line in lines)
    assert any(line["message"].startswith("scheduling on redis://") for line in lines)


@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        ["doctor", "--json"],
        ["health", "--json"],
        ["jobs"],
        ["run", "health"],
        ["top", "--once", "--interval", "0.1"],
        ["tenants"],
        ["project", "--once"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_no_command_prints_a_secret(fresh_server, words, right):
    """Neither the URL's password nor REDIS_PASSWORD is in what a command prints."""
    server = fresh_server(password=SECRET if right else "another one")
    host = f"127.0.0.1:{server.port}"
    for url, variables in (
        (f"redis://:{QUOTED}@{host}", {}),
        (f"redis://{host}", {"REDIS_PASSWORD": SECRET}),
        (f"redis://:{QUOTED}@127.0.0.1:1", {}),
    ):
        done = run(url, *words, **variables, MEMORY_MAX_RECONNECT_ATTEMPTS="0")
        assert "hunter2" not in done.out + done.err, (url, done.out, done.err)
        assert "another one" not in done.out + done.err


def test_no_log_has_a_secret(fresh_server, service):
    """A service that loses its server, and finds another password there, says neither of them."""
    server = fresh_server(password=SECRET)
    process = service(f"redis://:{QUOTED}@127.0.0.1:{server.port}", "schedule")
    server.cli("CONFIG", "SET", "requirepass", "another one")
    server.password = "another one"
    server.cli("CLIENT", "KILL", "TYPE", "normal")
    wait_until(lambda: "authentication failed" in process.log.read_text(), "it says what is wrong")
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    told = process.log.read_text()
    assert "hunter2" not in told
    assert "another one" not in told


async def test_no_repr_and_no_error_has_a_secret(fresh_server):
    """Settings, ledgers, servers, errors, their pickles and tracebacks keep the password in."""
    server = fresh_server(password=SECRET)
    host = f"127.0.0.1:{server.port}"
    settings = load_settings(redis_url=f"redis://:{QUOTED}@{host}", redis_password=SECRET)
    shown = [repr(settings), str(settings), repr(settings.govledger_jobs)]
    async with Ledger.connect(settings=settings) as ledger:
        shown += [repr(ledger), repr(ledger.server), ledger.server.address]
    for url in (
        f"redis://:{QUOTED}x@{host}",
        f"redis://:{QUOTED}@127.0.0.1:1",
        f"redis://:{SECRET}@{host}",
        f"nonsense://:{QUOTED}@{host}",
    ):
        with pytest.raises(errors.LedgerError) as caught:
            await Ledger.connect(url, settings=load_settings(memory_max_reconnect_attempts=0))
        error = caught.value
        shown += [
            str(error),
            repr(error),
            repr(error.facts),
            str(pickle.loads(pickle.dumps(error))),
        ]
        shown += traceback.format_exception(error)
    assert not any("hunter2" in text for text in shown)


def test_any_text_can_be_logged(capsys):
    """What is no UTF-8, or would steer a terminal, neither breaks the log nor its reader."""
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "a\udcff\x1b[2J\n%s", ("b",), None)
    terminal._JsonHandler().emit(record)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "a\\udcff\x1b[2J\nb"
    assert "\x1b" not in line


def test_a_url_in_any_message_is_masked(capsys):
    """Even a URL that we never knew loses its password, in text and in JSON, in tracebacks too."""
    terminal.say("redis://user:hunter2@host:6379/0 and rediss://:hunter2@[::1]:1")
    error = ValueError("redis://user:hunter2@host")
    told = ("x", logging.ERROR, __file__, 1, "at %s", ("redis://:hunter2@host",))
    terminal._JsonHandler().emit(logging.LogRecord(*told, (ValueError, error, None)))
    shown = capsys.readouterr().err
    assert "hunter2" not in shown
    assert shown.count("***") == 4
