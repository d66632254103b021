"""Environment → Settings, read once. The first four names are the operations guide's."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from ledger.errors import InvalidSetting

__all__ = ["JobName", "JobSchedule", "Settings", "load_settings"]

JobName = Literal["expire", "snapshot", "cleanup", "aof-rewrite", "refresh", "health"]
WEEK_SECONDS: Final = 7 * 86_400


class JobSchedule(BaseModel):
    """When a job runs: by `cron` in UTC or every `every_seconds`, counted from 1970; or not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str | None = None
    """Minute, hour, day, month, weekday; weekdays by name, since their numbers mean two things."""
    every_seconds: Annotated[int, Field(ge=1, le=WEEK_SECONDS)] | None = None
    enabled: bool = True

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.cron is not None and self.every_seconds is not None:
            raise ValueError("give `cron` or `every_seconds`, not both")
        if self.cron is not None:
            _check_cron(self.cron)
        return self

    def __str__(self) -> str:
        if not self.enabled:
            return "off"
        return f"cron {self.cron}" if self.cron else f"every {self.every_seconds} s"


def _check_cron(text: str) -> None:
    from apscheduler.triggers.cron import CronTrigger  # only where somebody sets one

    try:
        trigger = CronTrigger.from_crontab(text, timezone="UTC")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text!r} is no cron line: {error}") from None
    if trigger.get_next_fire_time(None, datetime.now(UTC)) is None:
        raise ValueError(f"{text!r} never comes")
    if any(char.isdigit() for char in text.split()[4].rpartition("/")[0] or text.split()[4]):
        raise ValueError(f"{text!r}: write weekdays as mon, tue, …: is 0 Sunday or Monday?")


DEFAULT_JOBS: Final[dict[JobName, JobSchedule]] = {
    "expire": JobSchedule(every_seconds=30),
    "snapshot": JobSchedule(cron="0 3 * * *"),
    "cleanup": JobSchedule(cron="30 3 * * *"),
    "aof-rewrite": JobSchedule(cron="0 4 * * *"),
    "refresh": JobSchedule(every_seconds=300),
    "health": JobSchedule(every_seconds=60),
}


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

    govledger_projections: str = ""
    """GOVLEDGER_PROJECTIONS: folds of your own beside ours, as import paths divided by commas:
    `package.module:Name`, a class without arguments or an object, of the protocol in
    projections/projection.py."""

    govledger_allow_eviction: bool = False
    """GOVLEDGER_ALLOW_EVICTION: append even to a server that may evict the ledger's keys."""

    govledger_jobs: dict[JobName, JobSchedule] = Field(default_factory=dict, validate_default=True)
    """GOVLEDGER_JOBS: JSON, job → {"cron": …} or {"every_seconds": …} or {"enabled": false}; what
    it does not name stays as it is by default."""

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

    @field_validator("govledger_jobs")
    @classmethod
    def _with_defaults(cls, given: dict[JobName, JobSchedule]) -> dict[JobName, JobSchedule]:
        table = {}
        for job, default in DEFAULT_JOBS.items():
            own = given.get(job)
            timed = own is not None and (own.cron or own.every_seconds)
            enabled = own.enabled if own is not None else True
            table[job] = own if own and timed else default.model_copy(update={"enabled": enabled})
        return table


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with `overrides` by field name before it.

    Raises:
        InvalidSetting: a value does not fit; the message names the variable and the limit.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except SettingsError as error:  # an environment variable that should hold JSON
        name = str(error).split('"')[1].upper()
        raise InvalidSetting(f"{name}: is no JSON", hint="see README, Settings") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        variable, *within = (str(part) for part in first["loc"] if part != "[key]")
        name = ".".join([variable.upper(), *within])
        told = first["msg"].removeprefix("Value error, ")
        raise InvalidSetting(f"{name}: {told}", hint="see README, Settings") from None
