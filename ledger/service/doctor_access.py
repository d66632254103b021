"""The doctor on the way in: who is let in, who can read along, what may be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ledger import errors
from ledger.service.doctor_result import Result
from ledger.service.doctor_seen import Seen

__all__ = ["SERVER_CHECKS", "unreachable"]


def unreachable(error: errors.LedgerError) -> Result:
    """For a server that cannot be asked at all."""
    meaning = "nothing can be recorded or read: appends fail, engines must decide what to do then"
    return Result("reachability", "danger", error.message, meaning, error.hint or "")


def reachability(seen: Seen) -> Result:
    """Whether somebody answers."""
    nodes = f", {len(seen.nodes)} primaries" if len(seen.nodes) > 1 else ""
    return Result("reachability", "ok", f"{seen.address} answers{nodes}")


def authentication(seen: Seen) -> Result:
    """Whether a password is needed."""
    who = f"connected as {seen.user!r}" if seen.user else "connected"
    if seen.scheme in ("unix", "embedded"):
        return Result("authentication", "ok", f"{who}; the socket's permissions are the lock")
    if seen.open_door is None:
        return Result("authentication", "note", f"{who}; whether strangers get in was not tried")
    if not seen.open_door:
        return Result("authentication", "ok", f"{who}; who gives no password is refused")
    return Result(
        "authentication",
        "warning" if seen.local else "danger",
        f"{who}; a client without a password gets in",
        "whoever reaches the port can rewrite or delete every decision"
        + (", which on this machine is every account" if seen.local else ""),
        "requirepass <password> in redis.conf (or ACL users) and REDIS_PASSWORD for the clients",
    )


def encryption(seen: Seen) -> Result:
    """Whether the network can read along."""
    if seen.scheme == "rediss" and not seen.verifies_tls:
        return Result(
            "tls",
            "danger",
            "rediss:// with ssl_cert_reqs=none: certificates are not verified",
            "anybody between here and the server can pose as it, read and change everything",
            "remove ssl_cert_reqs from REDIS_URL; ?ssl_ca_certs=/path/ca.pem trusts your own CA",
        )
    if seen.scheme == "rediss":
        return Result("tls", "ok", "rediss://, certificates are verified")
    if seen.local:
        return Result("tls", "ok", "not needed: the server is on this machine")
    return Result(
        "tls",
        "warning",
        f"{seen.scheme}:// to another machine",
        "decisions and passwords cross the network in clear text, and can be changed on the way",
        "tls-port 6380 with a certificate in redis.conf, and REDIS_URL=rediss://host:6380",
    )


def rights(seen: Seen) -> Result:
    """What this doctor may not ask."""
    if not seen.denied:
        return Result("rights", "ok", "everything could be asked")
    return Result(
        "rights",
        "note",
        f"the server refused to say: {', '.join(seen.denied)}",
        "checks that need it say so; an engine or analyst need not have these rights",
        "run the doctor as an operator: +info +config|get +slowlog|get +scan +acl|whoami",
    )


SERVER_CHECKS: Final[tuple[Callable[[Seen], Result], ...]] = (
    reachability,
    authentication,
    encryption,
    rights,
)
