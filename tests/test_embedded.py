"""The embedded server: one server a directory, shared, never lost, stopped cleanly."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import pytest
import redis

import ledger
from ledger.embedded import EmbeddedServer, Endpoint, is_running
from ledger.errors import EmbeddedServerError, InvalidSetting, ServerInUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINGER_S = 0.1
DEADLINE_S = 20.0

# One user in a process of its own: writes a word, says who serves, then waits for its input's end.
USER_PROGRAM = """
import sys
import redis
from ledger.embedded import EmbeddedServer, is_running

directory, linger_s, word = sys.argv[1:]
with EmbeddedServer.acquire(directory, linger_s=float(linger_s)) as server:
    with redis.Redis.from_url(server.url) as client:
        client.sadd("words", word)
    print(is_running(directory).pid, flush=True)
    sys.stdin.read()
"""

T = TypeVar("T")
User: TypeAlias = "subprocess.Popen[str]"
StartUser: TypeAlias = "Callable[[Path, str], User]"


def eventually(condition: Callable[[], T]) -> T:
    """Poll until the condition is true, and return it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "the awaited condition did not come true"
        time.sleep(0.02)
    return value


def acquire(directory: Path, *, port: int | None = None) -> EmbeddedServer:
    return EmbeddedServer.acquire(directory, port=port, linger_s=LINGER_S)


def serving(directory: Path) -> Endpoint:
    endpoint = is_running(directory)
    assert endpoint is not None
    return endpoint


def is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def keeper_pid(directory: Path) -> int:
    return int(eventually((directory / "keeper.lock").read_text))


def kill_keeper(directory: Path) -> int:
    pid = keeper_pid(directory)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_held(directory / "keeper.lock"))
    return pid


def log_of(directory: Path) -> str:
    return (directory / "valkey.log").read_text()


def await_clean_stop(directory: Path) -> None:
    eventually(lambda: not is_held(directory / "server.lock"))
    eventually(lambda: not is_held(directory / "keeper.lock"))
    assert log_of(directory).count("ready to exit") == 1
    assert not (directory / "valkey.sock").exists()
    assert not (directory / "valkey.pid").exists()


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


@contextmanager
def client_of(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(server.url, retry=None, socket_timeout=10, decode_responses=True)
    try:
        yield client
    finally:
        client.close()


def write(server: EmbeddedServer, *words: str) -> None:
    with client_of(server) as client:
        for word in words:
            client.sadd("words", word)


def written(server: EmbeddedServer) -> set[str]:
    with client_of(server) as client:
        return {str(word) for word in client.smembers("words")}


def pid_seen_by(user: User) -> int:
    assert user.stdout is not None
    line = user.stdout.readline()
    assert line, user.communicate()
    return int(line)


def kill(user: User) -> None:
    if user.returncode is None:
        user.kill()
        user.communicate()


def end(user: User) -> None:
    _, errors = user.communicate(timeout=DEADLINE_S)
    assert user.returncode == 0, errors


@pytest.fixture
def start_user() -> Iterator[StartUser]:
    """Start users in processes of their own; none outlives the test."""
    started: list[User] = []
    root = Path(ledger.__file__).parent.parent

    def start(directory: Path, word: str) -> User:
        user = subprocess.Popen(
            [sys.executable, "-P", "-c", USER_PROGRAM, str(directory), str(LINGER_S), word],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(user)
        return user

    yield start
    for user in started:
        kill(user)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "data"
    yield directory
    eventually(lambda: not is_held(directory / "server.lock"))
    eventually(lambda: not is_held(directory / "keeper.lock"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def short_temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        yield Path(temporary)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_processes_that_start_at_once_share_one_server(
    data_dir: Path, start_user: StartUser
) -> None:
    """Twelve processes on a new directory get the same server, and all that they wrote is there."""
    users = [start_user(data_dir, f"word-{n}") for n in range(12)]
    pids = {pid_seen_by(user) for user in users}
    with acquire(data_dir) as server:
        assert pids == {serving(data_dir).pid}
        assert written(server) == {f"word-{n}" for n in range(12)}
        for user in users:
            end(user)
    await_clean_stop(data_dir)


def test_threads_share_one_server(data_dir: Path) -> None:
    """Holds taken at once by threads of one process are holds on one server."""
    with ThreadPoolExecutor(8) as pool:
        servers = list(pool.map(acquire, [data_dir] * 8))
    pids = set()
    for server in servers:
        with client_of(server) as client:
            pids.add(client.info("server")["process_id"])
        server.release()
    assert len(pids) == 1
    await_clean_stop(data_dir)


def test_server_stops_cleanly_after_its_last_user(data_dir: Path) -> None:
    """Idle for the linger, the server is shut down, not killed, and no process is left."""
    with acquire(data_dir):
        server_pid, keeper = serving(data_dir).pid, keeper_pid(data_dir)
    await_clean_stop(data_dir)
    assert "no user for 0.1 s: stopping the server" in log_of(data_dir)
    eventually(lambda: has_ended(server_pid) and has_ended(keeper))
    assert is_running(data_dir) is None


def test_server_stays_while_it_has_a_user(data_dir: Path) -> None:
    """A hold that is longer than the linger keeps the server, whatever other users do."""
    with acquire(data_dir) as server:
        pid = serving(data_dir).pid
        until_s = time.monotonic() + 5 * LINGER_S
        while time.monotonic() < until_s:
            with acquire(data_dir):
                write(server, "still here")
        assert serving(data_dir).pid == pid
    await_clean_stop(data_dir)


def test_killed_user_is_not_waited_for(data_dir: Path, start_user: StartUser) -> None:
    """After kill -9 of the only user the server still stops cleanly."""
    user = start_user(data_dir, "a")
    pid_seen_by(user)
    kill(user)
    await_clean_stop(data_dir)


def test_data_survive_a_stop(data_dir: Path) -> None:
    """What was written is there when the next user starts the server again."""
    with acquire(data_dir) as server:
        write(server, "a", "b")
    await_clean_stop(data_dir)
    with acquire(data_dir) as server:
        assert written(server) == {"a", "b"}


@pytest.mark.parametrize("during_rewrite", [False, True])
def test_acknowledged_data_survive_a_killed_server(data_dir: Path, *, during_rewrite: bool) -> None:
    """After kill -9, also in the middle of an AOF rewrite, a user brings the server back whole."""
    with acquire(data_dir) as server:
        words = {f"word-{n}" for n in range(20_000)}
        with client_of(server) as client:
            client.sadd("words", *words)
            if during_rewrite:
                client.bgrewriteaof()
        pid = serving(data_dir).pid
        os.kill(pid, signal.SIGKILL)
        server.ensure_running()
        assert serving(data_dir).pid != pid
        assert written(server) == words
    await_clean_stop(data_dir)


def test_ensure_running_leaves_a_live_server_alone(data_dir: Path) -> None:
    """Asking for a server that runs changes nothing."""
    with acquire(data_dir) as server:
        pid = serving(data_dir).pid
        server.ensure_running()
        assert serving(data_dir).pid == pid


def test_next_user_replaces_a_killed_keeper(data_dir: Path) -> None:
    """The new keeper adopts the running server, and stops it after the last user."""
    first = acquire(data_dir)
    pid = serving(data_dir).pid
    killed = kill_keeper(data_dir)
    with acquire(data_dir):
        assert serving(data_dir).pid == pid
        eventually(lambda: keeper_pid(data_dir) != killed)
    first.release()
    await_clean_stop(data_dir)


def test_release_replaces_a_killed_keeper(data_dir: Path) -> None:
    """A user whose keeper was killed does not leave the server behind."""
    with acquire(data_dir):
        kill_keeper(data_dir)
    await_clean_stop(data_dir)


def test_orphaned_server_is_adopted(data_dir: Path, start_user: StartUser) -> None:
    """With user and keeper both killed, the next user gets the same server, and it stops after."""
    user = start_user(data_dir, "a")
    pid = pid_seen_by(user)
    kill_keeper(data_dir)
    kill(user)
    with acquire(data_dir) as server:
        assert serving(data_dir).pid == pid
        assert written(server) == {"a"}
    await_clean_stop(data_dir)


def test_stale_socket_and_pid_file_are_no_obstacle(data_dir: Path) -> None:
    """Files that a crash left, naming a live but unrelated process, do not stop a start."""
    with acquire(data_dir) as server:
        write(server, "a")
        kill_keeper(data_dir)
        os.kill(serving(data_dir).pid, signal.SIGKILL)
        eventually(lambda: not is_held(data_dir / "server.lock"))
    eventually(lambda: not is_held(data_dir / "keeper.lock"))
    assert (data_dir / "valkey.sock").is_socket()
    (data_dir / "valkey.pid").write_text(f"{os.getpid()}\n")
    assert is_running(data_dir) is None
    with acquire(data_dir) as server:
        assert written(server) == {"a"}


def test_another_process_attaches(data_dir: Path, start_user: StartUser) -> None:
    """A process that comes later uses the server that runs."""
    with acquire(data_dir) as server:
        user = start_user(data_dir, "from there")
        assert pid_seen_by(user) == serving(data_dir).pid
        assert written(server) == {"from there"}
        end(user)


def test_newcomer_waits_for_a_shutdown_in_progress(data_dir: Path) -> None:
    """Who comes while the server is being stopped gets a fresh server, with the same data."""
    with acquire(data_dir) as server:
        write(server, "a")
        old_pid = serving(data_dir).pid
        os.kill(old_pid, signal.SIGSTOP)  # so that the shutdown lasts until we say so
    with ThreadPoolExecutor(1) as pool:
        try:
            eventually(lambda: "stopping the server" in log_of(data_dir))
            newcomer = pool.submit(acquire, data_dir)
        finally:
            os.kill(old_pid, signal.SIGCONT)
        with newcomer.result(DEADLINE_S) as server:
            assert serving(data_dir).pid != old_pid
            assert written(server) == {"a"}


def test_ctrl_c_reaches_only_the_user(data_dir: Path, start_user: StartUser) -> None:
    """SIGINT to a user's whole process group leaves server and keeper running."""
    user = start_user(data_dir, "a")
    pid, keeper = pid_seen_by(user), keeper_pid(data_dir)
    with acquire(data_dir):
        os.killpg(user.pid, signal.SIGINT)
        user.communicate(timeout=DEADLINE_S)
        assert user.returncode != 0
        assert serving(data_dir).pid == pid
        assert not has_ended(keeper)
    await_clean_stop(data_dir)


def test_removed_directory_does_not_leave_a_server(data_dir: Path) -> None:
    """A directory removed at once after its use takes server and keeper with it."""
    with EmbeddedServer.acquire(data_dir, linger_s=60):
        pid = serving(data_dir).pid
    shutil.rmtree(data_dir)
    eventually(lambda: has_ended(pid))


def test_user_of_a_removed_directory_is_told(data_dir: Path) -> None:
    """No second server is started where the directory was replaced under its user."""
    with acquire(data_dir) as server:
        data_dir.rename(data_dir.with_name("moved"))
        with pytest.raises(EmbeddedServerError, match="removed or replaced"):
            server.ensure_running()
    eventually(lambda: is_running(data_dir.with_name("moved")) is None)


@pytest.mark.parametrize(
    ("name", "linked"),
    [("d" * 120, True), ("a b%20c#d?e&f", False), ("größe", False), ("line\nbreak", True)],
    ids=["long", "url", "utf8", "newline"],
)
def test_odd_directory_names_work(
    tmp_path: Path, short_temporary: Path, *, name: str, linked: bool
) -> None:
    """A path too long for a socket, or with characters that a URL reserves, gets a usable URL; the
    link that this may take is gone when the server is, and comes back with it.
    """
    directory = tmp_path / name
    with acquire(directory) as server:
        assert server.socket_path.is_relative_to(short_temporary) == linked
        assert len(os.fsencode(server.socket_path)) < 104
        write(server, "a")
        assert written(server) == {"a"}
        assert serving(directory).socket_path == server.socket_path
        acquire(directory).stop()
        assert list(short_temporary.glob("*/*")) == []
        server.ensure_running()
        assert written(server) == {"a"}
    eventually(lambda: not is_held(directory / "keeper.lock"))
    assert is_running(directory) is None
    assert list(short_temporary.glob("*/*")) == []


def test_socket_link_is_not_made_in_a_directory_open_to_others(
    tmp_path: Path, short_temporary: Path
) -> None:
    """Where others could redirect a long directory's socket, acquire refuses."""
    shared = short_temporary / f"govledger-{os.geteuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(EmbeddedServerError, match="not a directory of ours alone"):
        acquire(tmp_path / ("d" * 120))


def test_symbolic_link_leads_to_the_same_server(data_dir: Path) -> None:
    """Two names of one directory are one server."""
    with acquire(data_dir) as server:
        link = data_dir.with_name("link")
        link.symlink_to(data_dir)
        with acquire(link) as other:
            assert other.data_dir == server.data_dir
            assert serving(link) == serving(data_dir)


def test_ports(data_dir: Path) -> None:
    """A port is opened when it is first asked for, kept, and no second one is opened."""
    port = free_port()
    with acquire(data_dir) as server:
        assert server.tcp_url is None
        with acquire(data_dir, port=port) as with_port:
            assert with_port.tcp_url == f"redis://127.0.0.1:{port}"
            client = redis.Redis.from_url(with_port.tcp_url)
            assert client.ping()
            client.close()
            assert serving(data_dir).port == port
            with pytest.raises(ServerInUse, match=f"listens on port {port}") as raised:
                acquire(data_dir, port=free_port())
            assert raised.value.hint
            with acquire(data_dir) as without:
                assert without.tcp_url == with_port.tcp_url


def test_port_survives_a_killed_server(data_dir: Path) -> None:
    """The user who asked for the port gets it back, even if another started the server again."""
    port = free_port()
    with acquire(data_dir, port=port) as with_port, acquire(data_dir) as other:
        os.kill(serving(data_dir).pid, signal.SIGKILL)
        other.ensure_running()
        with_port.ensure_running()
        assert serving(data_dir).port == port


def test_taken_port_is_named(data_dir: Path, taken_port: int) -> None:
    """A port that another program has is an error with a hint, at a start and on a live server."""
    for live_users in (0, 1):
        with pytest.raises(EmbeddedServerError, match=str(taken_port)) as raised:
            acquire(data_dir, port=taken_port)
        assert "another program has this TCP port" in str(raised.value.hint)
        if live_users == 0:
            server = acquire(data_dir)
    with server:
        assert serving(data_dir).port is None


def test_impossible_port_is_refused(data_dir: Path) -> None:
    """A number that is no TCP port is refused before anything is created."""
    with pytest.raises(InvalidSetting, match="70000"):
        acquire(data_dir, port=70_000)
    assert not data_dir.exists()


def test_corrupt_file_is_reported_with_the_log(data_dir: Path) -> None:
    """A server that will not load its file gives an error that ends with the log and a hint."""
    with acquire(data_dir) as server:
        write(server, *(f"word-{n}" for n in range(50)))
    await_clean_stop(data_dir)
    [file] = (data_dir / "appendonlydir").glob("*.incr.aof")
    content = bytearray(file.read_bytes())
    content[500:600] = b"#" * 100
    file.write_bytes(content)
    with pytest.raises(EmbeddedServerError, match="Bad file format") as raised:
        acquire(data_dir)
    assert "copy the data directory" in str(raised.value.hint)
    assert file.read_bytes() == content


def test_loading_is_reported_and_can_be_waited_for(data_dir: Path) -> None:
    """When a large file outlasts the timeout the error says so, and a second call gets there."""
    files = data_dir / "appendonlydir"
    files.mkdir(parents=True)
    command = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n"
    (files / "appendonly.aof.1.incr.aof").write_bytes(command * 1_000_000)
    manifest = "file appendonly.aof.1.incr.aof seq 1 type i\n"
    (files / "appendonly.aof.manifest").write_text(manifest)
    told = "does not answer"  # while it has no socket yet, which takes long on a busy machine
    while told.endswith("does not answer"):
        with pytest.raises(EmbeddedServerError) as raised:
            EmbeddedServer.acquire(data_dir, start_timeout_s=0.05, linger_s=10)
        told = raised.value.message
    assert "is still loading" in told
    assert "call again" in str(raised.value.hint)
    with acquire(data_dir) as server, client_of(server) as client:
        assert client.get("k") == "v"
        kill_keeper(data_dir)  # it has the long linger: the next one has the short


def test_server_without_the_lock_is_not_joined(data_dir: Path) -> None:
    """Where the lock files were deleted under a live server, no second server is started."""
    with acquire(data_dir) as server:
        pid = serving(data_dir).pid
        for lock in data_dir.glob("*.lock"):
            lock.rename(lock.with_suffix(".away"))
        with pytest.raises(ServerInUse, match=f"pid {pid}"):
            acquire(data_dir)
        eventually(lambda: not is_held(data_dir / "keeper.lock"))
        for lock in data_dir.glob("*.away"):
            lock.rename(lock.with_suffix(".lock"))
        server.ensure_running()
        assert serving(data_dir).pid == pid


def test_settings_are_durable_and_private(data_dir: Path) -> None:
    """The server syncs before it acknowledges, evicts nothing, and only its owner gets in."""
    wanted = {
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "enable-debug-command": "no",
        "protected-mode": "yes",
        "port": "0",
    }
    with acquire(data_dir) as server:
        with client_of(server) as client:
            assert client.config_get(*wanted) == wanted
        assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        files = [path for path in data_dir.rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in files} == {0}


def test_is_running_creates_nothing(data_dir: Path) -> None:
    """Asking about a directory that does not exist leaves it so."""
    assert is_running(data_dir) is None
    assert not data_dir.exists()


def test_release_is_idempotent_and_final(data_dir: Path) -> None:
    """A second release does nothing; a released hold starts no server; no descriptor is left."""
    descriptors = len(list(Path("/dev/fd").iterdir()))
    server = acquire(data_dir)
    server.release()
    server.release()
    assert len(list(Path("/dev/fd").iterdir())) == descriptors
    with pytest.raises(EmbeddedServerError, match="was released"):
        server.ensure_running()


def test_unusable_directory_is_named(tmp_path: Path) -> None:
    """A path that is a file is an error that names it."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(EmbeddedServerError, match=str(file)):
        acquire(file)


def test_windows_is_told(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no flock the error says what works instead."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(EmbeddedServerError, match="Linux and macOS only"):
        acquire(data_dir)
    with pytest.raises(EmbeddedServerError, match="Linux and macOS only"):
        is_running(data_dir)
