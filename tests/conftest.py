"""Fixtures over real servers; `tests/servers.py` has the classes behind them."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ledger.embedded import is_running
from tests import servers
from tests.servers import KINDS, Certificates, Cluster, Sentinel, Server, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

# Deadlines measure the neighbours on a shared machine. On CI a commit has one verdict.
hypothesis.settings.register_profile(
    "govledger", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("govledger")

_SETTINGS_PREFIXES = ("REDIS_", "MEMORY_", "GOVLEDGER_")


def pytest_configure() -> None:
    """Take the developer's own settings out of the tests and of the processes they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in os.environ if name.startswith(_SETTINGS_PREFIXES)]:
        if name != servers.REQUIRE_ALL:
            del os.environ[name]


def pytest_sessionfinish() -> None:
    """Stop what a fixture may have left running."""
    for server in servers.running():
        server.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Show the end of each running server's log beside a failure."""
    report = yield
    if report.failed:
        for server in servers.running():
            report.sections.append((f"log of {server!r}", server.log_tail))
    return report


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """`shared_server(kind)`: this worker's one server of a kind; never kill or reconfigure it."""
    started: dict[str, Server] = {}

    def shared(kind: str) -> Server:
        if kind not in started:
            started[kind] = Server.start(kind, tmp_path_factory.mktemp(kind))
        assert started[kind].alive, f"an earlier test killed the shared {kind}"
        return started[kind]

    yield shared
    for server in started.values():
        server.kill()


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, shared_server: Callable[[str], Server]) -> Server:
    """The shared server of each kind in turn: the test runs once a kind."""
    return shared_server(request.param)


@pytest.fixture
def valkey(shared_server: Callable[[str], Server]) -> Server:
    """The shared Valkey 9 server, the kind that is embedded."""
    return shared_server("valkey9")


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`fresh_server(kind="valkey9", **options of Server.start)`: its own, killed after it."""
    started: list[Server] = []

    def fresh(kind: str = "valkey9", **options: Any) -> Server:
        server = Server(kind, tmp_path / f"server-{len(started)}", **options)
        started.append(server)
        server.restart()
        return server

    yield fresh
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """This worker's Valkey 9 cluster of three primaries; never kill or reconfigure it."""
    cluster = Cluster.start(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.kill()


@pytest.fixture
def fresh_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """`fresh_cluster(**options of Cluster.start)`: the test's own, killed after it."""
    started: list[Cluster] = []

    def fresh(**options: Any) -> Cluster:
        started.append(Cluster.start(tmp_path / f"cluster-{len(started)}", **options))
        return started[-1]

    yield fresh
    for cluster in started:
        cluster.kill()


@pytest.fixture
def fresh_sentinel(tmp_path: Path) -> Iterator[Callable[..., Sentinel]]:
    """`fresh_sentinel(primary, service="ledger")`: the test's own, killed after it."""
    started: list[Sentinel] = []

    def fresh(primary: Server, **options: Any) -> Sentinel:
        started.append(Sentinel.start(tmp_path / f"sentinel-{len(started)}", primary, **options))
        return started[-1]

    yield fresh
    for sentinel in started:
        sentinel.kill()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A CA and a server certificate for localhost and 127.0.0.1."""
    return Certificates.create(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[Any]]]:
    """`spawn(argv, **options of Popen)`: a client process, killed and reaped after the test."""
    started: list[subprocess.Popen[Any]] = []

    def spawned(argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        started.append(servers.spawn(argv, **options))
        return started[-1]

    yield spawned
    for process in started:
        servers.stop(process)


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test uses."""
    return servers.new_tenant()


@pytest.fixture
def embedded_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory for `embedded://`; its server is shut down after the test, not lingering."""
    directory = tmp_path / "data"
    yield directory
    endpoint = is_running(directory) if directory.exists() else None
    if endpoint is not None:
        no_retry = Retry(NoBackoff(), 0)  # or shutdown() tries for seconds to reach what it ended
        with redis.Redis(unix_socket_path=str(endpoint.socket_path), retry=no_retry) as client:
            client.shutdown(nosave=True)
        wait_until(lambda: not endpoint.socket_path.exists(), "the embedded server has ended")


@pytest.fixture
def no_room() -> Callable[[], AbstractContextManager[None]]:
    """A block in which every write of this process to a file fails, as on a full disk."""

    @contextmanager
    def limited() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
