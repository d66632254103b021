"""The scripts that people run: the demo end to end, and that each row of the bench works."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import wait_until

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

TENANTS = ("agentdojo-banking", "agentdojo-slack", "agentdojo-travel", "agentdojo-workspace")


@pytest.fixture
def script(tmp_path, spawn):
    """`script("demo", …)`: the script's Python file in a process whose temporary files are ours."""

    def started(name: str, *args: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, str(SCRIPTS / f"{name}.py"), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return spawn(argv, env=environment, text=True, **pipes)

    return started


def processes_that_name(directory: Path) -> list[str]:
    """Command lines of what runs and was told of the directory."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if str(directory) in line]


def test_demo_ends_well_and_leaves_nothing(script, tmp_path):
    """The demo folds what its writers race to append, checks it by a replay, and tidies up."""
    demo = script("demo")
    shown, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, shown
    assert "2,800 events, each sent by two writers: recorded once" in shown
    assert "fold(replay(agentdojo-banking)) = its published state" in shown
    assert re.search(r"made cedar-tools stricter: 0.45 → 0.35,\s+version 3", shown), shown
    for tenant in TENANTS:
        assert re.search(rf"{tenant}.*%.*cedar-tools@[12]", shown), shown
    assert list(tmp_path.iterdir()) == []
    assert processes_that_name(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(script, tmp_path, number):
    """Ctrl-C or SIGTERM in the middle ends writers and server, and removes the directory."""
    demo = script("demo")
    wait_until(lambda: list(tmp_path.glob("*/appendonlydir/*.incr.aof")), "a server that records")
    demo.send_signal(number)
    shown, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + number, shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []
    assert processes_that_name(tmp_path) == []


def rows_of(bench: subprocess.Popen[str]) -> dict[str, dict]:
    shown, _ = bench.communicate(timeout=60)
    assert bench.returncode == 0, shown
    found = json.loads(shown[shown.index("{") :])
    assert found["server"]
    assert found["cores"]
    return {row["row"]: row for row in found["rows"]}


def test_bench_measures_what_is_asked_for(script, tmp_path):
    """A quick run measures the rows that were named, every turn of them, and tidies up."""
    rows = rows_of(script("bench", "--quick", "--json", "--only", "memory", "fold"))
    assert list(rows) == ["fold", "memory"]
    for row in rows.values():
        assert len(row["ours"]) == len(row["ceiling"])
        assert all(value > 0 for value in row["ours"] + row["ceiling"])
    assert list(tmp_path.iterdir()) == []
    assert processes_that_name(tmp_path) == []


@pytest.mark.skipif(not shutil.which("redis-benchmark"), reason="needs redis-benchmark")
def test_bench_runs_against_redis_benchmark(script):
    """One append at a time is held against redis-benchmark's, turn by turn."""
    rows = rows_of(script("bench", "--quick", "--json", "--no-pin", "--only", "one"))
    assert len(rows["one"]["ours"]) == len(rows["one"]["ceiling"]) == 3
    assert rows["one"]["score"] > 0


@pytest.mark.parametrize("name", ["bench", "demo"])
def test_wrapper_sets_up_and_starts_its_script(name):
    """What people type is executable, is valid bash, and starts the Python file of that name."""
    wrapper = SCRIPTS / name
    assert os.access(wrapper, os.X_OK)
    subprocess.run(["bash", "-n", str(wrapper)], check=True)
    lines = wrapper.read_text().splitlines()
    assert any(line.startswith("setup_venv --no-dev") for line in lines)
    assert lines[-1] == f'exec "$GOVLEDGER_BIN/python" "$GOVLEDGER_ROOT/scripts/{name}.py" "$@"'
