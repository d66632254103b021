"""`govledger dev` and `govledger project`: what keeps running, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from ledger import Decision, Ledger
from ledger.embedded import is_running
from ledger.keyfile import write_key
from ledger.note import SigningKey
from ledger.service.operate import default_data_dir
from projections import StateReader
from tests.commands import GOVLEDGER, environment, run
from tests.servers import _free_port, wait_until


@pytest.fixture
def dev(spawn, embedded_dir, tmp_path):
    """`dev(*options)`: a running `govledger dev --json`; `told` is its first line, parsed."""

    def started(*options: object) -> SimpleNamespace:
        log = tmp_path / f"dev-{len(list(tmp_path.glob('dev-*')))}.log"
        with log.open("wb") as stderr:
            process = spawn(
                [*GOVLEDGER, "dev", "--data", embedded_dir, "--json", *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(None),
            )
        line = process.stdout.readline()
        assert line, log.read_text()
        return SimpleNamespace(process=process, log=log, told=json.loads(line))

    return started


async def decide(url: str, tenant: str, event_id: str) -> int:
    """Appends a decision, waits until a projector has folded it; its seq."""
    async with Ledger.connect(url) as ledger:
        event = Decision(agent="a", action="b", verdict="deny", id=event_id)
        receipt = await ledger.append(tenant, event)
        assert receipt.durability == "fsynced"
        state = await StateReader(ledger).state(tenant, at_least=receipt, timeout_s=30)
        assert state.seq >= receipt.seq
    return receipt.seq


async def test_dev_serves_and_projects_until_sigterm(dev, embedded_dir, tenant):
    """Dev prints a URL that works, folds what is appended there, and SIGTERM ends it with 0."""
    running = dev()
    assert running.told["url"] == f"embedded://{embedded_dir}"
    assert running.told["tcp_url"] is None
    assert running.told["attached"] is False
    assert await decide(running.told["url"], tenant, "one") == 1
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(10) == 0
    assert "error" not in running.log.read_text()
    async with Ledger.connect(f"embedded://{embedded_dir}") as ledger:
        assert (await ledger.head(tenant)).seq == 1


async def test_a_second_dev_shares_the_server(dev, tenant):
    """A second dev on the directory says it is attached, and keeps going when the first ends."""
    first = dev()
    second = dev()
    assert second.told == {**first.told, "attached": True}
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(10) == 0
    assert await decide(second.told["url"], tenant, "one") == 1


async def test_dev_brings_a_killed_server_back(dev, embedded_dir, tenant):
    """After kill -9 of the server dev says that it runs again, and nothing acknowledged is lost."""
    running = dev()
    assert await decide(running.told["url"], tenant, "one") == 1
    os.kill(running.told["pid"], signal.SIGKILL)
    wait_until(lambda: "it runs again" in running.log.read_text(), "dev says that it runs again")
    assert is_running(embedded_dir).pid != running.told["pid"]
    assert await decide(running.told["url"], tenant, "two") == 2
    assert running.process.poll() is None


async def test_dev_listens_on_a_port_when_it_is_told_to(dev, embedded_dir, tenant, valkey):
    """--port gives a redis:// URL besides; a second dev with another port is refused with 4."""
    with_port = _free_port()
    running = dev("--port", str(with_port))
    assert running.told["tcp_url"] == f"redis://127.0.0.1:{with_port}"
    assert await decide(running.told["tcp_url"], tenant, "one") == 1
    other = run(None, "dev", "--data", embedded_dir, "--port", valkey.port)
    assert (other.code, other.out) == (4, "")
    assert f"listens on port {with_port}" in other.err


def test_dev_shows_the_url_to_people_and_ctrl_c_is_quiet(spawn, embedded_dir):
    """For people dev prints REDIS_URL=…; Ctrl-C ends it with 130 and no traceback."""
    process = spawn(
        [*GOVLEDGER, "dev", "--data", embedded_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(None, REDIS_PASSWORD="of another server"),
    )
    assert process.stdout.readline().decode() == f"REDIS_URL=embedded://{embedded_dir}\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert b"Traceback" not in process.stderr.read()


async def test_project_runs_until_sigterm(valkey, tenant, spawn):
    """Project folds what is appended while it runs, and SIGTERM ends it with 0."""
    process = spawn(
        [*GOVLEDGER, "project", "--json"], stdout=subprocess.PIPE, env=environment(valkey.url)
    )
    assert json.loads(process.stdout.readline())["projecting"].endswith(str(valkey.port))
    assert await decide(valkey.url, tenant, "one") == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_project_attests_for_those_who_may_not_ask(fresh_server, tenant):
    """After `project --once` a user without CONFIG reaches fsynced, by the attestation."""
    server = fresh_server()
    assert run(server.url, "project", "--once").code == 0
    server.cli("ACL", "SETUSER", "engine", "on", ">pw", "~*", "+@all", "-config", "-function")
    engine_url = server.url.replace("redis://", "redis://engine:pw@")
    event = {"type": "policy.activated", "id": "p", "policy": {"id": "p", "version": "1"}}
    asked = ["--durability", "fsynced", "--json"]
    done = run(engine_url, "append", tenant, *asked, stdin=json.dumps(event).encode())
    assert done.code == 0, done.err
    assert done.lines[0]["durability"] == "fsynced"


def test_the_default_data_directory(monkeypatch):
    """Without --data it is below XDG_DATA_HOME, or where that is by default."""
    monkeypatch.setenv("XDG_DATA_HOME", "/data/of/mine")
    assert default_data_dir() == Path("/data/of/mine/govledger")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/govledger")
    assert default_data_dir() == Path("/home/govledger/.local/share/govledger")


async def test_dev_seals_where_it_has_an_anchor(dev, tenant, tmp_path, monkeypatch):
    """With an anchor and a key in the environment, what is appended is sealed by itself."""
    anchor, key = tmp_path / "anchor", tmp_path / "seal.key"
    anchor.mkdir()
    write_key(key, SigningKey.generate("dev.example/log"))
    monkeypatch.setenv("GOVLEDGER_ANCHOR", str(anchor))
    monkeypatch.setenv("GOVLEDGER_SIGNING_KEY_FILE", str(key))
    monkeypatch.setenv("GOVLEDGER_SEAL_SECONDS", "0.1")
    running = dev()
    await decide(running.told["url"], tenant, "one")
    wait_until(lambda: any(one.stat().st_size for one in anchor.iterdir()), "the tenant is sealed")
    done = run(running.told["url"], "verify", tenant)
    assert done.code == 0, done.out
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0
