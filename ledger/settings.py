"""Environment → Settings, read once. The first four names are the operations guide's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ledger.errors import InvalidSetting

__all__ = ["Settings", "load_settings"]


class Settings(BaseSettings):
    """What can be set from outside; every field says its environment variable."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    redis_url: str = Field(default="redis://localhost:6379", repr=False)  # it may hold a password
    """REDIS_URL: redis://, rediss://, unix://, embedded:///data/dir or
    redis+sentinel://host:26379,host:26379/service; a cluster is recognised by itself."""

    redis_password: SecretStr | None = None
    """REDIS_PASSWORD: used where the URL has none."""

    memory_default_ttl_seconds: Annotated[int, Field(ge=0)] = 86_400
    """MEMORY_DEFAULT_TTL_SECONDS: lifetime of published keys; 0 = no expiry."""

    memory_max_reconnect_attempts: Annotated[int, Field(ge=0, le=1_000)] = 10
    """MEMORY_MAX_RECONNECT_ATTEMPTS: how often a broken call is tried again."""

    govledger_allow_eviction: bool = False
    """GOVLEDGER_ALLOW_EVICTION: append even to a server that may evict the ledger's keys."""

    govledger_signing_key_file: Path | None = None
    """GOVLEDGER_SIGNING_KEY_FILE: the sealer's key, a file that its owner alone can read."""

    govledger_signing_key: SecretStr | None = None
    """GOVLEDGER_SIGNING_KEY: the key itself, where there is no file."""

    govledger_anchor: Path | None = None
    """GOVLEDGER_ANCHOR: a directory outside Redis where signed checkpoints are kept."""

    govledger_witnesses: str = ""
    """GOVLEDGER_WITNESSES: who cosigns, `VKEY@URL` each, divided by spaces."""

    govledger_seal_entries: Annotated[int, Field(ge=1)] = 10_000
    """GOVLEDGER_SEAL_ENTRIES: a tenant is sealed when so many entries are new…"""

    govledger_seal_seconds: Annotated[float, Field(gt=0)] = 60.0
    """GOVLEDGER_SEAL_SECONDS: …or the oldest of them is so old."""


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with `overrides` by field name before it.

    Raises:
        InvalidSetting: a value does not fit; the message names the variable and the limit.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        raise InvalidSetting(f"{name}: {first['msg']}", hint="see README, Settings") from None
