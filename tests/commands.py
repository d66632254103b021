"""Running `govledger` in tests: each command is a process of its own, with its own environment.

Most are forked from one process that has everything imported: the half second that starting Python
and importing takes is paid once. `python -m ledger` itself is run where a test says so.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests import servers

__all__ = ["GOVLEDGER", "Done", "environment", "run"]

ROOT: Final = Path(__file__).parent.parent
GOVLEDGER: Final = [sys.executable, "-m", "ledger"]

_FORKER: Final = """
import json, os, signal, sys, traceback
import projections
from ledger import prove, seal, verify
from ledger.service import appending, backup, cli, jsonl, operate, render, restore, state
from ledger.service import doctor, health, jobs, runs, scheduler, top, witness_server

def command(asked):
    signal.alarm(60)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    for fd, (path, flags) in enumerate(asked["files"]):
        os.dup2(os.open(path, flags, 0o600), fd)
    sys.argv[:] = ["govledger", *asked["args"]]
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
for line in requests:
    pid = os.fork()
    if pid == 0:
        command(json.loads(line))
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), file=replies, flush=True)
"""


@dataclass
class Done:
    """A command that has ended; `lines` and `error` are its JSON."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.err.splitlines()[-1])
        return error


def environment(url: str | None, **variables: str) -> dict[str, str]:
    """For a command in any folder; the terminal that the tests run in has no part in it."""
    address = {"REDIS_URL": url} if url else {}
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **address, **variables}


def run(
    url: str | None,
    *args: object,
    stdin: bytes = b"",
    cwd: Path | None = None,
    **variables: str,
) -> Done:
    """`govledger` with these arguments, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        given, out, err = (Path(folder) / name for name in ("stdin", "stdout", "stderr"))
        given.write_bytes(stdin)
        create = os.O_WRONLY | os.O_CREAT
        asked = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or folder),
            "env": environment(url, **variables),
            "files": [(str(given), os.O_RDONLY), (str(out), create), (str(err), create)],
        }
        forker = _forker()
        assert forker.stdin is not None
        assert forker.stdout is not None
        forker.stdin.write(json.dumps(asked).encode() + b"\n")
        forker.stdin.flush()
        code = int(forker.stdout.readline())
        return Done(code, out.read_text(), err.read_text())


@functools.cache
def _forker() -> subprocess.Popen[bytes]:
    forker = servers.spawn(
        [sys.executable, "-c", _FORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(None),
        cwd=ROOT,
    )
    atexit.register(servers.stop, forker)
    return forker
