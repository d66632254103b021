"""What the README shows works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ledger import keys

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
        run(["bash", "-c", line], embedded_dir, cwd=embedded_dir.parent)


@pytest.mark.parametrize(
    "key",
    [
        keys.decisions("tenant"),
        keys.head("tenant"),
        keys.index("tenant"),
        keys.projection("tenant", "governance", 1),
        keys.projection_active("tenant"),
        keys.evidence_checkpoints("tenant"),
        keys.evidence_tiles("tenant"),
        keys.TENANTS,
        keys.FEED,
        keys.attestation("<run_id>"),
    ],
)
def test_key_table_spells_the_keys(key):
    """The key table has every key as keys.py spells it."""
    assert f"`{key}`" in README


def test_scripts_of_the_readme_exist():
    """The two commands are there and can be executed."""
    for name in ("demo", "test", "bench"):
        assert os.access(Path(__file__).parent.parent / "scripts" / name, os.X_OK)
