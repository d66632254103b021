"""What the README shows works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ledger import Decision, Ledger, keys, load_settings
from ledger.embedded import EmbeddedServer, is_running
from ledger.settings import DEFAULT_JOBS
from tests.commands import run as command

README = (Path(__file__).parent.parent / "README.md").read_text()
BIN = str(Path(sys.executable).parent)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def python_block(word):
    """The one example that has this word."""
    (found,) = [block for block in blocks("python") if word in block]
    return found


def environment(embedded_dir):
    return os.environ | {
        "REDIS_URL": f"embedded://{embedded_dir}",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def run(argv, embedded_dir, own=(), **options):
    done = subprocess.run(
        argv,
        env=environment(embedded_dir) | dict(own),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_example_runs_as_it_stands(embedded_dir):
    """The ten-line example appends, folds and reads its own write."""
    example = python_block("print(receipt.seq")
    assert run([sys.executable, "-c", example], embedded_dir).split() == ["1", "fsynced", "1", "1"]


def test_memory_example_runs_as_it_stands(embedded_dir):
    """The memory service's example stores, reads and counts."""
    example = python_block("get_memory_service()")
    assert run([sys.executable, "-c", example], embedded_dir) == "{'step': 3}\n0\n"


def test_the_policy_closes_the_loop(embedded_dir):
    """The policy reads the false negatives, lowers the threshold, and sees it in force."""
    policy = python_block("false_negative_rate")
    assert run([sys.executable, "-c", policy], embedded_dir).split() == ["0.7"]
    assert run([sys.executable, "-c", policy], embedded_dir).split() == ["0.6"]


def test_projection_of_ones_own_is_folded(embedded_dir, tmp_path):
    """The fold of the README, by its import path, is folded and read."""
    (tmp_path / "my_folds.py").write_text(python_block("class DenyStreak"))
    own = {"GOVLEDGER_PROJECTIONS": "my_folds:DenyStreak", "PYTHONPATH": str(tmp_path)}
    event = '{"type":"decision.recorded","id":"d%d","agent":{"id":"a"},"action":{"type":"x"},'
    lines = "\n".join((event + '"verdict":"deny"}') % n for n in range(3))
    govledger = [sys.executable, "-m", "ledger"]
    run([*govledger, "append", "acgs-dev", "-"], embedded_dir, own, input=lines)
    run([*govledger, "project", "--once"], embedded_dir, own)
    state = [*govledger, "state", "acgs-dev", "--projection", "deny-streak", "--json"]
    assert json.loads(run(state, embedded_dir, own))["value"] == {"denied": 3}


def test_every_command_works_in_order(embedded_dir, tmp_path):
    """Each command line of the README exits 0 on a fresh directory."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 8
    for line in lines:
        run(["bash", "-c", line], embedded_dir, cwd=tmp_path)
    other = tmp_path / "elsewhere"
    if is_running(other):
        EmbeddedServer.acquire(other).stop()


@pytest.mark.parametrize(
    "key",
    [
        keys.decisions("tenant"),
        keys.head("tenant"),
        keys.index("tenant"),
        keys.projection("tenant", "governance", 1),
        keys.projection_active("tenant"),
        keys.snapshots("tenant", "governance", 1),
        keys.evidence_checkpoints("tenant"),
        keys.evidence_tiles("tenant", "acme.example/prod/acgs-dev"),
        keys.TENANTS,
        keys.FEED,
        keys.attestation("<run_id>"),
        keys.JOBS_CLAIMED,
        keys.ARCHIVE_OWNER,
        keys.HEALTH_SAMPLES,
    ],
)
def test_key_table_spells_the_keys(key):
    """The key table has every key as keys.py spells it."""
    assert f"`{key}`" in README


def test_job_table_has_every_job_at_its_time():
    """The table of jobs names each, and the default table is what it says."""
    shown = {"every 30 s": "every 30 s", "cron 0 3 * * *": "03:00", "cron 30 3 * * *": "03:30"}
    shown |= {"cron 0 4 * * *": "04:00", "every 300 s": "every 5 min", "every 60 s": "every minute"}
    for job, schedule in DEFAULT_JOBS.items():
        assert f"| `{job}` | {shown[str(schedule)]} |" in README
    (example,) = re.findall(r"changes what it names: `(.*?)`", README, re.DOTALL)
    load_settings(govledger_jobs=json.loads(example))


async def test_the_operator_of_the_readme_can_operate(fresh_server):
    """With the rights of that recipe the doctor asks everything, and every job works."""
    (recipe,) = re.findall(r"- operator \(.*?\): `(.*?)`", README)
    server = fresh_server()
    rules = ["reset", "on", ">pw", "resetchannels", "-@all", "+@connection", *recipe.split()]
    server.cli("ACL", "SETUSER", "operator", *rules)
    url = server.url.replace("redis://", "redis://operator:pw@")
    async with Ledger.connect(server.url) as ledger:
        await ledger.append("t", Decision(agent="a", action="b", verdict="allow"))
    server.cli("FUNCTION", "FLUSH")
    assert command(url, "project", "--once").code == 0
    for job in DEFAULT_JOBS:
        done = command(url, "run", job)
        assert done.code == 0, done.err
    (told,) = command(url, "doctor", "--json").lines
    by_name = {check["check"]: check for check in told["checks"]}
    assert by_name["rights"]["level"] == "ok", by_name["rights"]
    assert by_name["attestation"]["level"] == "ok"
    assert command(url, "top", "--once", "--interval", "0.1").code == 0


def test_scripts_of_the_readme_exist():
    """The two commands are there and can be executed."""
    for name in ("demo", "test", "bench"):
        assert os.access(Path(__file__).parent.parent / "scripts" / name, os.X_OK)
