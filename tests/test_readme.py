"""What the README shows works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ledger import Decision, Ledger, keys, load_settings
from ledger.settings import DEFAULT_JOBS
from tests.commands import run as command

README = (Path(__file__).parent.parent / "README.md").read_text()
BIN = str(Path(sys.executable).parent)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def environment(embedded_dir):
    return os.environ | {
        "REDIS_URL": f"embedded://{embedded_dir}",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def run(argv, embedded_dir, **options):
    done = subprocess.run(
        argv,
        env=environment(embedded_dir),
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
    (example,) = blocks("python")
    assert run([sys.executable, "-c", example], embedded_dir).split() == ["1", "fsynced", "1", "1"]


def test_every_command_works_in_order(embedded_dir):
    """Each command line of the README exits 0 on a fresh directory."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 8
    for line in lines:
        run(["bash", "-c", line], embedded_dir)


@pytest.mark.parametrize(
    "key",
    [
        keys.decisions("tenant"),
        keys.head("tenant"),
        keys.index("tenant"),
        keys.projection("tenant", "governance", 1),
        keys.projection_active("tenant"),
        keys.TENANTS,
        keys.FEED,
        keys.attestation("<run_id>"),
        keys.JOBS_CLAIMED,
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
