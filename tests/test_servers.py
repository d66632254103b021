"""The test servers themselves: what every other test leans on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from tests.servers import KINDS, wait_until

MAJOR_VERSIONS = {"valkey9": "9.", "redis7": "7.", "redis8": "8."}

# Starts a server, says its process id, then waits to be killed.
OWNER_PROGRAM = """
import sys
from pathlib import Path
from tests.servers import Server
print(Server.start("valkey9", Path(sys.argv[1])).pid, flush=True)
sys.stdin.read()
"""


def test_each_kind_is_what_it_is_called(server):
    """A test that says redis7 runs on Redis 7, with an append-only file fsynced always."""
    info = server.cli("INFO", "server")
    version = info.get("valkey_version", info["redis_version"])
    assert version.startswith(MAJOR_VERSIONS[server.kind])
    assert server.cli("CONFIG", "GET", "append*")["appendonly"] == "yes"
    assert server.cli("CONFIG", "GET", "append*")["appendfsync"] == "always"
    assert server.cli("CONFIG", "GET", "save") == {"save": ""}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_server_comes_back_with_its_data(fresh_server, kind):
    """What was acknowledged before kill -9 is there after restart, on the same port."""
    server = fresh_server(kind)
    url, pid = server.url, server.pid
    server.cli("SET", "k", "v")
    server.kill()
    assert not server.alive
    server.restart()
    assert server.cli("GET", "k") == "v"
    assert (server.url, server.pid == pid) == (url, False)


def test_unix_socket_server_listens_nowhere_else(fresh_server):
    """`unix_socket` gives a server with a socket path, an URL, and no TCP port."""
    server = fresh_server(unix_socket=True)
    assert server.port is None
    assert server.cli("CONFIG", "GET", "port") == {"port": "0"}
    assert server.url == f"unix://{server.socket_path}"


def test_password_is_needed_and_in_the_url(fresh_server):
    """A server with a password refuses who has none, and its own URL has it."""
    server = fresh_server(password="p@ss/w:rd")
    assert server.cli("PING")
    with (
        redis.Redis(port=server.port, retry=None) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_tls_server_speaks_tls_only(fresh_server, certificates):
    """The URL of a TLS server names its CA, and plain TCP gets no answer."""
    server = fresh_server("redis7", tls=certificates)
    assert server.url.startswith("rediss://")
    assert server.cli("PING")
    with redis.Redis(port=server.port, retry=None) as plain, pytest.raises(redis.ConnectionError):
        plain.ping()


@pytest.mark.parametrize("kind", KINDS)
def test_sentinel_moves_the_primary_to_its_replica(fresh_server, fresh_sentinel, kind):
    """After a failover the sentinel names the replica, which takes writes."""
    primary = fresh_server(kind, password="secret")
    replica = fresh_server(
        kind, password="secret", config={"replicaof": f"127.0.0.1 {primary.port}"}
    )
    replica.wait_for_replica_link()
    sentinel = fresh_sentinel(primary)
    assert sentinel.primary_port() == primary.port
    assert sentinel.failover() == replica.port
    wait_until(lambda: replica.cli("ROLE")[0] == "master", "the replica is primary")


def test_cluster_serves_every_slot(cluster):
    """Each of three primaries serves keys, and `node_for` says which."""
    keys = [f"k{number}" for number in range(20)]
    assert {cluster.node_for(key) for key in keys} == set(cluster.primaries)
    assert cluster.node_for("k0").cli("SET", "k0", "v") in ("OK", True)


def test_no_server_outlives_a_killed_test_process(tmp_path, spawn):
    """Kill -9 of the process that started a server ends the server too."""
    owner = spawn(
        [sys.executable, "-c", OWNER_PROGRAM, str(tmp_path / "server")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    pid = int(owner.stdout.readline())
    os.kill(owner.pid, signal.SIGKILL)

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(gone, "the server ended with its owner")
