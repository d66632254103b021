"""Imports go one way: ledger.service → projections → the ledger's core."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MODULES = sorted(
    str(path.relative_to(ROOT))
    for package in ("ledger", "projections")
    for path in (ROOT / package).rglob("*.py")
)

# What each layer may import of ours. The core is every module of ledger outside ledger.service.
ALLOWED = {
    "core": {"core"},
    "projections": {"core", "projections"},
    "service": {"core", "projections", "service"},
}

# `python -m ledger` starts the command line, as the console script of pyproject.toml does.
ENTRY_POINT = "ledger/__main__.py"


def layer(module: str) -> str | None:
    """Which layer a dotted module name is of; None for what is not ours."""
    if module == "ledger.service" or module.startswith("ledger.service."):
        return "service"
    package = module.partition(".")[0]
    return {"ledger": "core", "projections": "projections"}.get(package)


def imports(path: str, source: str) -> set[str]:
    """Dotted names that a module imports, wherever in it: in functions and TYPE_CHECKING too."""
    package = path.removesuffix(".py").split("/")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
        elif _is_import_module(node):
            found.add(node.args[0].value)
    return found


def _is_import_module(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
    )


def forbidden(path: str, source: str) -> set[str]:
    """The imports in a module that go the wrong way."""
    own = layer(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    allowed = ALLOWED["service" if path == ENTRY_POINT else own]
    return {name for name in imports(path, source) if layer(name) not in {None, *allowed}}


@pytest.mark.parametrize("path", MODULES)
def test_module_imports_only_layers_below(path):
    """No module imports a layer above its own."""
    assert forbidden(path, (ROOT / path).read_text()) == set()


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("ledger/stream.py", "import projections.store", {"projections.store"}),
        ("ledger/stream.py", "from ledger import service", {"ledger.service"}),
        ("ledger/stream.py", "from .service import cli", {"ledger.service.cli"}),
        ("ledger/__init__.py", "from . import service", {"ledger.service"}),
        ("ledger/sync.py", "def f():\n    from projections import x", {"projections.x"}),
        ("ledger/sync.py", "importlib.import_module('projections.x')", {"projections.x"}),
        ("projections/store.py", "from ledger.service.jobs import x", {"ledger.service.jobs.x"}),
        ("projections/store.py", "from ledger.stream import Entry", set()),
        ("ledger/service/cli.py", "from projections import x\nimport ledger.stream", set()),
        ("ledger/__main__.py", "from ledger.service.cli import main", set()),
    ],
)
def test_the_check_sees_every_kind_of_import(path, source, found):
    """Plain, relative, late and dynamic imports are all seen, and only wrong ones are named."""
    assert forbidden(path, source) == found


def test_both_packages_are_looked_at():
    """The list of modules is not empty by mistake."""
    assert "ledger/keys.py" in MODULES
    assert any(path.startswith("projections/") for path in MODULES)
