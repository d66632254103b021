"""From a REDIS_URL to connections: what is valid, what may be shown, which kind of server."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from ledger import errors
from ledger.settings import Settings

__all__ = [
    "cluster_client",
    "database_number",
    "embedded_path",
    "pool",
    "sentinel_pool",
    "shown_address",
]

CONNECT_TIMEOUT_S: Final = 5.0
_log = logging.getLogger("ledger")
READ_BYTES: Final = 256 * 1024
"""How much one read takes: a page of a replay is most of a megabyte."""

_SCHEMES: Final = ("redis", "rediss", "unix", "embedded", "redis+sentinel")


_TCP_SCHEMES: Final = ("redis", "rediss", "redis+sentinel")
_HOSTS = re.compile(
    r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]*)(:\d{1,5})?(,[A-Za-z0-9._-]+(:\d{1,5})?)*"
)


def shown_address(url: str) -> str:
    """The URL without user, password and query: safe to show.

    Raises:
        InvalidSetting: the scheme is unknown, or what should be host and port is not.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise errors.InvalidSetting(f"REDIS_URL: {error}", hint=_URL_HINT) from None
    if parts.scheme not in _SCHEMES:
        raise errors.InvalidSetting(
            f"REDIS_URL: unknown scheme {parts.scheme!r}", hint=_URL_HINT, scheme=parts.scheme
        )
    hosts = parts.netloc.rpartition("@")[2]
    behind = parts.path + parts.query + parts.fragment
    # A password with / ? or # in it would end up in host, port or path, and be shown.
    if not _HOSTS.fullmatch(hosts) or (parts.scheme in _TCP_SCHEMES and "@" in behind):
        raise errors.InvalidSetting(
            "REDIS_URL: host and port cannot be made out",
            hint=f"percent-encode / ? # @ : in a password, or set REDIS_PASSWORD; {_URL_HINT}",
        )
    return f"{parts.scheme}://{hosts}{parts.path}"


_URL_HINT: Final = (
    "use redis://host:6379, rediss://host:6380, unix:///path.sock, embedded:///data/dir or "
    "redis+sentinel://host:26379/service"
)


def embedded_path(url: str) -> Path:
    """The data directory that an embedded:// URL names."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or path == "/":
        raise errors.InvalidSetting(
            f"REDIS_URL: {shown_address(url)} names no data directory",
            hint="embedded:///absolute/directory",
        )
    if parts.query or parts.fragment:
        raise errors.InvalidSetting(
            f"REDIS_URL: {shown_address(url)} takes no options",
            hint="its ledger is in database 0; percent-encode a ? or # of the directory's name",
        )
    return Path(path)


def database_number(url: str) -> int:
    """Which of a server's databases a URL names; 0 where it names none or there is one alone."""
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        return 0
    return int(parse_url(url).get("db", 0))


def _connection_options(settings: Settings, url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "protocol": 3,
        "legacy_responses": False,
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_read_size": READ_BYTES,
        "retry": Retry(NoBackoff(), 0),
    }
    if settings.redis_password and not urlsplit(url).password:
        options["password"] = settings.redis_password.get_secret_value()
    return options


def pool(url: str, settings: Settings) -> ConnectionPool:
    """Connections to one address; redis-py's own retries are off, see `server.py`."""
    options = _connection_options(settings, url)
    options["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
    _warn_of_unverified_tls(url)
    try:
        made = ConnectionPool.from_url(url, **options)
        made.make_connection()  # type: ignore[no-untyped-call]  # an unknown option shows here
        return made
    except (TypeError, ValueError, redis_errors.RedisError) as error:
        raise errors.InvalidSetting(f"REDIS_URL: {error}", hint=_URL_HINT) from None


def _warn_of_unverified_tls(url: str) -> None:
    """Certificates are verified unless the URL says otherwise, which is to be seen in the log."""
    asked = {name: values[-1].lower() for name, values in parse_qs(urlsplit(url).query).items()}
    unverified = asked.get("ssl_cert_reqs") in ("none", "optional")
    if unverified or asked.get("ssl_check_hostname") in ("false", "0", "no", "off"):
        _log.warning(
            "%s: the URL turns the check of the server's certificate off: whoever is in between "
            "can read and change everything; ?ssl_ca_certs=/path/ca.pem trusts a CA of your own",
            shown_address(url),
        )


def cluster_client(url: str, settings: Settings) -> RedisCluster:
    """redis-py's cluster client, of which we use the topology and the connections."""
    options = _connection_options(settings, url)
    options["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
    return RedisCluster.from_url(url, **options)


def sentinel_pool(settings: Settings) -> tuple[ConnectionPool, list[Redis]]:
    """Connections to the primary that the sentinels name, and the clients that ask them."""
    parts = urlsplit(settings.redis_url)
    service = parts.path.strip("/") or "mymaster"
    hosts = parts.netloc.rpartition("@")[2].split(",")
    addresses = [(host.partition(":")[0], int(host.partition(":")[2] or 26379)) for host in hosts]
    options = _connection_options(settings, f"redis://{parts.netloc.split(',')[0]}")
    options.pop("retry")
    asking = {"socket_timeout": CONNECT_TIMEOUT_S, "retry": Retry(NoBackoff(), 0)}
    sentinel = Sentinel(addresses, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    if parts.password:
        options["password"] = unquote(parts.password)
    if parts.username:
        options["username"] = unquote(parts.username)
    primary = sentinel.master_for(service, retry=Retry(NoBackoff(), 0), **options)
    return primary.connection_pool, sentinel.sentinels
