"""Which projections there are: ours, and those that GOVLEDGER_PROJECTIONS names."""

from __future__ import annotations

import pkgutil
import re
from typing import Any, Final

from ledger.errors import InvalidSetting
from ledger.settings import Settings
from projections.agents import Agents
from projections.governance import Governance
from projections.projection import Projection

__all__ = ["configured"]

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_METHODS: Final = ("names", "apply", "quarantined", "view")


def configured(settings: Settings) -> tuple[Projection, ...]:
    """Ours, then those of the settings, each made once.

    Raises:
        InvalidSetting: an import path leads nowhere, or to what is no projection.
    """
    found: list[Projection] = [Governance(), Agents()]
    for path in settings.govledger_projections.split(","):
        if path.strip():
            one = _loaded(path.strip())
            if any(one.name == other.name for other in found):
                raise _refused(path, f"there is a projection called {one.name!r} already")
            found.append(one)
    return tuple(found)


def _loaded(path: str) -> Projection:
    if ":" not in path:
        raise _refused(path, "it is no import path")
    try:
        named = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise _refused(path, str(error)) from error
    one: Any = named() if isinstance(named, type) else named
    missing = [name for name in _METHODS if not callable(getattr(one, name, None))]
    if missing:
        raise _refused(path, f"a projection has {', '.join(missing)}")
    name, version = getattr(one, "name", None), getattr(one, "version", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refused(path, f"name is {name!r}: 1 to 32 of a-z 0-9 _ -, a letter first")
    if type(version) is not int or version < 1:
        raise _refused(path, f"version is {version!r}: it counts from 1")
    projection: Projection = one
    return projection


def _refused(path: str, why: str) -> InvalidSetting:
    return InvalidSetting(
        f"GOVLEDGER_PROJECTIONS: {path.strip()}: {why}",
        hint="import paths, divided by commas: package.module:Name; is it on PYTHONPATH?",
    )
