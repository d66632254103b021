"""The project's own files: versions, packages, set-up, and what the containers promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import redis
import yaml

import ledger
from tests.commands import run
from tests.servers import require, wait_until

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.dev.yml").read_text())

DATA_FILES = {
    "ledger/functions.lua",
    "ledger/data/agentdojo-decisions.jsonl",
    "ledger/py.typed",
    "projections/py.typed",
}


def tracked_files() -> list[Path]:
    """What git has or would add; everything but build products where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built by hatchling without a network."""
    folder = tmp_path_factory.mktemp("dist")
    for target in ("wheel", "sdist"):
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    return folder


def test_versions_agree():
    """pyproject.toml, the installed package, `ledger.__version__` and CHANGELOG.md say the same."""
    version = PYPROJECT["project"]["version"]
    assert metadata.version("govledger") == version
    assert ledger.__version__ == version
    headings = re.findall(
        r"^## \[?v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert headings[0] == version


def test_lock_file_is_portable():
    """uv.lock takes packages from the public index alone, and no path of any machine."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    sources = {tuple(package["source"].items()) for package in packages}
    assert sources == {(("editable", "."),), (("registry", "https://pypi.org/simple"),)}


def test_wheel_has_code_and_data_and_nothing_else(distributions):
    """An installed govledger finds its functions, its sample events and its types."""
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= DATA_FILES
    assert {name.split("/")[0] for name in names} == {
        "ledger",
        "projections",
        f"govledger-{ledger.__version__}.dist-info",
    }
    sources = {
        str(path.relative_to(ROOT))
        for package in ("ledger", "projections")
        for path in (ROOT / package).rglob("*.py")
    }
    assert names >= sources


def test_sdist_has_what_tests_and_builds_need(distributions):
    """From the sdist one can build, and run the tests."""
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "uv.lock", "LICENSE", "README.md", "scripts/test"}
    assert names >= DATA_FILES | needed | {"tests/conftest.py"}


def test_console_script_exists():
    """The `govledger` command points to a callable."""
    (script,) = metadata.entry_points(group="console_scripts", name="govledger")
    assert callable(script.load())


def test_scripts_can_be_run():
    """Every script that is run by its name is executable, and bash or Python accepts it."""
    scripts = [ROOT / ".ci/run", *(path for path in (ROOT / "scripts").iterdir() if path.is_file())]
    for script in scripts:
        source = script.read_text()
        if script.name.startswith("_") or source.startswith("#!/usr/bin/env bash"):
            assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script
        else:
            ast.parse(source, str(script))
        run_by_another = script.name.startswith("_") or script.suffix == ".py"
        assert run_by_another or script.stat().st_mode & 0o111, script


def test_no_path_of_a_machine_in_any_file():
    """No file names a home, a work folder or a private package index."""
    private = re.compile(
        # In two parts, so that this line is no hit itself.
        r"(?<![\w.~-])/(?:" + r"work|root|opt|home/(?!govledger)\w+|Users|tmp/\w+)/"
        r"|extra-index-url|find-links|index-url"
    )
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        if path.suffix != ".jsonl" and path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert hits == []


def test_every_test_says_what_it_promises():
    """Each test function has a docstring."""
    silent = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_compose_redis_is_durable_and_private():
    """The development Redis keeps its data, demands a password, and answers this machine alone."""
    service = COMPOSE["services"]["redis"]
    assert service["image"] == "redis:8.2"
    assert service["ports"] == ["127.0.0.1:6379:6379"]
    assert service["volumes"] == ["redis-data:/data"]
    assert "redis-data" in COMPOSE["volumes"]
    assert service["environment"]["REDISCLI_AUTH"].startswith("${REDIS_PASSWORD:?")
    assert "redis-cli" in service["healthcheck"]["test"][1]


def test_compose_projector_is_ours_and_waits_for_redis():
    """The projector is built from our Dockerfile and starts when Redis is healthy."""
    service = COMPOSE["services"]["projector"]
    assert service["build"] == "."
    assert service["command"] == ["project"]
    assert service["environment"]["REDIS_URL"] == "redis://redis:6379"
    assert service["environment"]["REDIS_PASSWORD"].startswith("${REDIS_PASSWORD:?")
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_compose_scheduler_is_ours_and_can_be_scraped():
    """The scheduler is built as the projector is, and its options are ones that it has."""
    service, projector = COMPOSE["services"]["scheduler"], COMPOSE["services"]["projector"]
    same = ("build", "environment", "depends_on", "restart")
    assert {name: service[name] for name in same} == {name: projector[name] for name in same}
    command, *options = service["command"]
    shown = run(None, command, "--help").out
    assert all(option in shown for option in options if option.startswith("--"))
    port = options[options.index("--metrics-port") + 1]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert "--extra metrics" in (ROOT / "Dockerfile").read_text()


def test_compose_redis_command_works(tmp_path, spawn):
    """The command line in the compose file, on a real Redis 8, gives the settings it promises."""
    program, *arguments = COMPOSE["services"]["redis"]["command"]
    assert program == "redis-server"
    password = 'a "quoted" pass\\word'
    given = [password if "REDIS_PASSWORD" in value else value for value in arguments]
    socket = tmp_path / "redis.sock"
    spawn(
        [require("redis8"), *given, "--port", "0", "--unixsocket", socket, "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    wait_until(socket.exists, "the socket is there")
    with redis.Redis(unix_socket_path=str(socket), password=password) as client:
        settings = client.config_get("appendonly", "appendfsync", "save", "maxmemory-policy")
    assert settings == {
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory-policy": "noeviction",
    }


def test_dockerfile_runs_the_locked_command_without_root():
    """The image installs exactly uv.lock, without the tests' tools, and does not run as root."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    syncs = [line for line in lines if line.startswith("RUN uv sync")]
    assert syncs
    assert all("--locked --no-dev" in line for line in syncs)
    assert 'ENTRYPOINT ["govledger"]' in lines
    assert [line for line in lines if line.startswith("USER ")] == ["USER govledger"]
