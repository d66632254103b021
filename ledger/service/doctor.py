"""What is wrong, what it means for this ledger, and what to set: each check a plain function.

A check judges what `doctor_seen.look` gathered and asks nothing itself. Levels: `ok`; `note`, worth
knowing; `warning`, something can be lost or is degraded; `danger`, the record or its service is at
risk now. What an ACL hides from a check is a warning that names the missing right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from ledger import errors
from ledger.ledger import Ledger
from ledger.server import LIBRARY_VERSION, NodeSettings
from ledger.service.doctor_seen import Node, Seen, look
from ledger.service.inspection import number
from ledger.service.scheduler import latest_slot

__all__ = [
    "LEDGER_CHECKS",
    "NODE_CHECKS",
    "SERVER_CHECKS",
    "Level",
    "Result",
    "examine",
    "judge",
    "report_json",
    "report_lines",
    "unreachable",
    "worst",
]

Level = Literal["ok", "note", "warning", "danger"]
LEVELS: Final[tuple[Level, ...]] = ("ok", "note", "warning", "danger")

MEMORY_WARNING: Final = 0.8
"""Of maxmemory: the operations guide's own limit."""
NEARLY_FULL: Final = 0.95
FRAGMENTATION_LIMIT: Final = 1.5
FRAGMENTATION_MIN_BYTES: Final = 100 * 1024 * 1024
LATENCY_LIMIT_MS: Final = 10.0
SLOW_RECENT_S: Final = 3600
CLOCK_WARNING_MS: Final = 5_000
CLOCK_LIMIT_MS: Final = 300_000
LAG_LIMIT_MS: Final = 60_000
BACKUP_AGE_LIMIT_MS: Final = 26 * 3_600_000
JOB_GRACE: Final = timedelta(minutes=3)
NAMES_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One check: what was found, what that means for this ledger, and the exact thing to do."""

    check: str
    level: Level
    found: str
    meaning: str = ""
    remedy: str = ""
    node: str = ""


async def examine(ledger: Ledger) -> list[Result]:
    """Looks at everything and judges it.

    Raises:
        Unavailable: the server stopped answering in the middle.
    """
    return judge(await look(ledger))


def judge(seen: Seen) -> list[Result]:
    """The results of every check, those of the server first, then of each node, then the ledger's.

    A node's results have its name where there are several.
    """
    results = [check(seen) for check in SERVER_CHECKS]
    for node in seen.nodes:
        for of_node in NODE_CHECKS:
            result = of_node(seen, node)
            results.append(Result(**{**asdict(result), "node": node.name}))
    return results + [check(seen) for check in LEDGER_CHECKS]


def worst(results: Sequence[Result]) -> Level:
    """The highest level among them."""
    return max((result.level for result in results), key=LEVELS.index, default="ok")


def unreachable(error: errors.LedgerError) -> Result:
    """For a server that cannot be asked at all."""
    meaning = "nothing can be recorded or read: appends fail, engines must decide what to do then"
    return Result("reachability", "danger", error.message, meaning, error.hint or "")


def _unknown(check: str, what: str, right: str) -> Result:
    meaning = f"{what} cannot be told, so nothing is promised about it"
    return Result(check, "warning", f"{right} is denied to this user", meaning, f"grant {right}")


def _shown(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


# -- the way in ----------------------------------------------------------------------------------


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


# -- a node --------------------------------------------------------------------------------------


def version(_: Seen, node: Node) -> Result:
    """Whether the server can run functions."""
    valkey = node.info.get("valkey_version")
    text = valkey or node.info.get("redis_version")
    if text is None:
        return _unknown("version", "whether this server is supported", "+info")
    found = f"{'Valkey' if valkey else 'Redis'} {text}"
    if valkey or int(text.partition(".")[0]) >= 7:
        return Result("version", "ok", found)
    return Result(
        "version",
        "danger",
        found,
        "it has no functions, so nothing can be appended atomically: every append fails",
        "upgrade to Redis 7.0 or Valkey 7.2, or newer",
    )


def eviction(seen: Seen, node: Node) -> Result:
    """Whether the server may drop the record to make room."""
    policy = node.settings.maxmemory_policy
    if policy is None:
        return _unknown("eviction", "whether the server may evict decisions", "+info")
    found = f"maxmemory-policy is {policy}"
    evicted = number(node.info, "evicted_keys")
    if node.settings.evicts_ledger_keys:
        allowed = seen.settings.govledger_allow_eviction
        refuses = (
            "appends go on, since GOVLEDGER_ALLOW_EVICTION is set" if allowed else "appends refuse"
        )
        return Result(
            "eviction",
            "danger",
            f"{found}; {evicted} keys were evicted since the start",
            f"when memory runs out it drops any key, recorded decisions too, silently; {refuses}",
            "CONFIG SET maxmemory-policy noeviction (or volatile-lru), and in redis.conf",
        )
    if evicted:
        meaning = "published state and sessions went; the record has no TTL and stayed"
        return Result("eviction", "note", f"{found}; {evicted} keys were evicted", meaning)
    return Result("eviction", "ok", found, "recorded decisions are never evicted")


def append_only_file(_: Seen, node: Node) -> Result:
    """What a crash or a power cut takes."""
    set_to = node.settings
    if set_to.appendonly is None:
        return _unknown("append-only file", "what a crash or power cut loses", "+config|get")
    if node.info.get("aof_last_write_status", "ok") != "ok":
        meaning = "the last write to the append-only file failed: writes are refused until it works"
        return Result("append-only file", "danger", "its last write failed", meaning, "free disk")
    if set_to.appendonly != "yes":
        meaning = "a crash of the server now loses every decision since its last snapshot"
        return Result("append-only file", "danger", "appendonly is no", meaning, _AOF_FIX)
    found = f"appendonly yes, appendfsync {set_to.appendfsync}"
    if set_to.fsyncs_every_ack:
        return Result("append-only file", "ok", found, "what is acknowledged is on disk")
    level, meaning, fix = _fsync_gap(set_to)
    return Result("append-only file", level, found, meaning, fix)


_AOF_FIX: Final = "CONFIG SET appendonly yes, CONFIG SET appendfsync always, and in redis.conf"


def _fsync_gap(set_to: NodeSettings) -> tuple[Level, str, str]:
    """What is lost where an acknowledgement does not follow its fsync, and what to set."""
    if set_to.appendfsync == "no":
        meaning = "a power cut now loses what the kernel had not written yet: up to half a minute"
        return "danger", meaning, _AOF_FIX
    if set_to.appendfsync == "everysec":
        meaning = "a power cut now loses up to a second or two of acknowledged decisions"
        return "warning", meaning, _AOF_FIX
    if set_to.no_fsync_on_rewrite != "no":
        meaning = "while the file is rewritten nothing is fsynced: a power cut then loses decisions"
        return "warning", meaning, "CONFIG SET no-appendfsync-on-rewrite no, and in redis.conf"
    meaning = "the file is still being made: until its first rewrite has ended a crash loses all"
    return "warning", meaning, "wait until INFO persistence says aof_rewrite_in_progress:0"


def aof_rewrite(_: Seen, node: Node) -> Result:
    """Whether the append-only file can be rewritten."""
    if not node.info:
        return _unknown("append-only file rewrite", "whether rewrites work", "+info")
    if node.info.get("aof_last_bgrewrite_status", "ok") == "ok":
        return Result("append-only file rewrite", "ok", "the last one worked, if there was one")
    return Result(
        "append-only file rewrite",
        "warning",
        "the last one failed",
        "the file grows until the disk is full, and then no decision can be recorded",
        "see the server's log: disk space, or memory for fork (vm.overcommit_memory = 1)",
    )


def save_points(_: Seen, node: Node) -> Result:
    """Whether a failed snapshot stops the ledger."""
    if node.config is None:
        return _unknown("rdb schedule", "whether a failed snapshot stops writes", "+config|get")
    points, stops = node.config.get("save", ""), node.config.get("stop-writes-on-bgsave-error")
    if not points:
        return Result("rdb schedule", "ok", "no save points: the scheduler's job takes snapshots")
    if stops == "yes":
        return Result(
            "rdb schedule",
            "warning",
            f'save "{points}", stop-writes-on-bgsave-error yes',
            "one failed snapshot makes the server refuse every append until one works again",
            'CONFIG SET save "" and let `govledger schedule` take snapshots (or CONFIG SET '
            "stop-writes-on-bgsave-error no)",
        )
    return Result("rdb schedule", "ok", f'save "{points}", a failed one does not stop writes')


def last_save(seen: Seen, node: Node) -> Result:
    """How old the newest snapshot is."""
    if not node.info:
        return _unknown("last save", "how old the newest snapshot is", "+info")
    at_ms, saves = number(node.info, "rdb_last_save_time") * 1000, number(node.info, "rdb_saves")
    age_ms = seen.now_ms - at_ms
    advice = "govledger run snapshot; `govledger schedule` takes one a day"
    if node.info.get("rdb_last_bgsave_status", "ok") != "ok":
        stops = (node.config or {}).get("stop-writes-on-bgsave-error") == "yes"
        refused = stops and (node.config or {}).get("save", "") != ""
        meaning = "appends are refused now (MISCONF)" if refused else "there is no newer snapshot"
        level: Level = "danger" if refused else "warning"
        fix = "the server's log says why (disk, memory for fork); then govledger run snapshot"
        return Result("last save", level, "the last BGSAVE failed", meaning, fix)
    if not saves:
        meaning = "there is no snapshot of this run of the server to go back to"
        old = number(node.info, "uptime_in_seconds") * 1000 > BACKUP_AGE_LIMIT_MS
        level = "warning" if old else "note"
        return Result("last save", level, "none since the server started", meaning, advice)
    found = f"{age_ms / 3_600_000:.1f} h ago"
    if age_ms > BACKUP_AGE_LIMIT_MS:
        meaning = "a restore would go back that far, the append-only file aside"
        return Result("last save", "warning", found, meaning, advice)
    return Result("last save", "ok", found)


def disk_room(_: Seen, node: Node) -> Result:
    """Whether a rewrite and a snapshot fit on the disk."""
    if node.free_bytes is None:
        return Result("disk room", "note", "the data directory cannot be seen from here")
    data = number(node.info, "used_memory")
    aof = number(node.info, "aof_current_size")
    found = f"{_size(node.free_bytes)} free; data {_size(data)}, append-only file {_size(aof)}"
    if node.free_bytes >= 2 * data + aof:
        return Result("disk room", "ok", found)
    level: Level = "danger" if node.free_bytes < data else "warning"
    meaning = "a rewrite or snapshot may not fit; on a full disk nothing more can be recorded"
    return Result("disk room", level, found, meaning, "free or add disk; govledger run aof-rewrite")


def memory(_: Seen, node: Node) -> Result:
    """Memory against its limit."""
    if not node.info:
        return _unknown("memory", "how near the memory limit is", "+info")
    used, limit = number(node.info, "used_memory"), number(node.info, "maxmemory")
    whole = number(node.info, "total_system_memory")
    if limit:
        share, of = used / limit, f"maxmemory {_size(limit)}"
    elif whole:
        share, of = used / whole, f"the machine's {_size(whole)}, no maxmemory"
    else:
        return Result("memory", "note", f"{_size(used)} used, no maxmemory")
    found = f"{_size(used)} used, {share:.0%} of {of}"
    if share < MEMORY_WARNING:
        return Result("memory", "ok", found)
    level: Level = "danger" if share >= NEARLY_FULL else "warning"
    meaning = "at the limit appends fail (OOM)" if limit else "the kernel may kill the server"
    fix = "CONFIG SET maxmemory <more>, or a larger machine; govledger run cleanup frees cache keys"
    return Result("memory", level, found, f"{meaning}; nothing that is recorded is lost", fix)


def fragmentation(_: Seen, node: Node) -> Result:
    """Memory that is held and not used."""
    if not node.info:
        return _unknown("fragmentation", "how much memory is wasted", "+info")
    ratio = float(node.info.get("mem_fragmentation_ratio", "0").replace("nan", "0"))
    wasted = number(node.info, "mem_fragmentation_bytes")
    found = f"ratio {ratio:.2f}, {_size(max(0, wasted))}"
    if ratio <= FRAGMENTATION_LIMIT or wasted < FRAGMENTATION_MIN_BYTES:
        return Result("fragmentation", "ok", found)
    meaning = "the machine runs out of memory earlier than used_memory says"
    fix = "CONFIG SET activedefrag yes (where the server has it), or restart it in a quiet hour"
    return Result("fragmentation", "warning", found, meaning, fix)


def clients(_: Seen, node: Node) -> Result:
    """Connections against their limit."""
    if not node.info:
        return _unknown("clients", "how near the connection limit is", "+info")
    count, limit = number(node.info, "connected_clients"), number(node.info, "maxclients")
    rejected = number(node.info, "rejected_connections")
    found = f"{count} of {limit}" + (f", {rejected} were turned away" if rejected else "")
    if not limit or count < MEMORY_WARNING * limit:
        level: Level = "note" if rejected else "ok"
        return Result("clients", level, found)
    level = "danger" if count >= NEARLY_FULL * limit else "warning"
    meaning = "at the limit engines cannot connect, so they cannot record"
    fix = "share one Ledger a process; CONFIG SET maxclients <more>; find idle ones: CLIENT LIST"
    return Result("clients", level, found, meaning, fix)


def latency(_: Seen, node: Node) -> Result:
    """PING from here."""
    taken = node.round_trips_ms
    if not taken:
        return _unknown("latency", "how long each append waits for the server", "+ping")
    p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
    found = f"PING p50 {p50:.2f} ms, p99 {p99:.2f} ms from here"
    if p99 <= LATENCY_LIMIT_MS:
        return Result("latency", "ok", found)
    meaning = "each append and state read waits at least that long"
    fix = "run closer to the server; look for slow commands (slow log), swapping, a busy machine"
    return Result("latency", "warning", found, meaning, fix)


def slow_log(seen: Seen, node: Node) -> Result:
    """Commands that held everybody up."""
    if node.slow is None:
        return _unknown("slow log", "whether somebody blocks the server", "+slowlog|get")
    recent = [one for one in node.slow if one[0] * 1000 > seen.now_ms - SLOW_RECENT_S * 1000]
    if not recent:
        return Result("slow log", "ok", "nothing in the last hour")
    _, took_us, name = max(recent, key=lambda one: one[1])
    found = f"{len(recent)} in the last hour; the worst: {name}, {took_us / 1000:.0f} ms"
    meaning = "the server does one thing at a time: every engine waited meanwhile"
    fix = "SLOWLOG GET names the clients; KEYS is SCAN's job, a big DEL is UNLINK's"
    return Result("slow log", "warning", found, meaning, fix)


def clock(_: Seen, node: Node) -> Result:
    """Whether the clocks agree."""
    ahead_ms = node.clock_ahead_ms
    if ahead_ms is None:
        return _unknown("clock", "whether the clocks agree", "+time")
    found = f"this machine's is {ahead_ms / 1000:+.3f} s from the server's"
    if abs(ahead_ms) <= CLOCK_WARNING_MS:
        return Result("clock", "ok", found)
    if abs(ahead_ms) <= CLOCK_LIMIT_MS:
        meaning = "recorded times are the server's; at 300 s of difference appends are refused"
        return Result("clock", "warning", found, meaning, "NTP on both machines")
    meaning = "appends from here are refused (ClockSkew)"
    return Result("clock", "danger", found, meaning, "NTP on both machines")


def replication(_: Seen, node: Node) -> Result:
    """What a failover takes."""
    if not node.info:
        return _unknown("replication", "what a failover would lose", "+info")
    if node.info.get("role") != "master":
        meaning = "it takes no writes: nothing can be recorded here"
        fix = "connect to the primary, or by redis+sentinel:// or a cluster URL that finds it"
        return Result("replication", "danger", "this is a replica", meaning, fix)
    replicas = number(node.info, "connected_slaves")
    if not replicas:
        meaning = "this machine's disk has the only copy of the record"
        fix = "a replica on another machine, or `govledger schedule --archive` onto another disk"
        return Result("replication", "note", "no replica", meaning, fix)
    told = " ".join(value for name, value in node.info.items() if name.startswith("slave"))
    lags = [int(lag) for lag in re.findall(r"\blag=(\d+)", told)]
    found = f"{replicas} replicas, the slowest {max(lags, default=0)} s behind"
    needed = (node.config or {}).get("min-replicas-to-write")
    if needed is None:
        return _unknown("replication", "how many replicas an append waits for", "+config|get")
    if int(needed) < 1:
        return Result(
            "replication",
            "warning",
            f"{found}; min-replicas-to-write is 0",
            "a failover now loses acknowledged decisions that no replica had yet, and a primary "
            "cut off from all of them goes on acknowledging",
            "CONFIG SET min-replicas-to-write 1, or append with durability='replicated'",
        )
    return Result("replication", "ok", f"{found}; min-replicas-to-write is {needed}")


def function_library(_: Seen, node: Node) -> Result:
    """Whether the server-side half is there."""
    found = node.library_version
    if found is None:
        meaning = "the first append loads it, if its user has +function|load"
        return Result("function library", "note", "not loaded", meaning, "govledger project --once")
    if found < LIBRARY_VERSION:
        meaning = "the next append by this release replaces it, if its user has +function|load"
        shown = f"version {found}, this release has {LIBRARY_VERSION}"
        return Result("function library", "note", shown, meaning, "govledger project --once")
    if found > LIBRARY_VERSION:
        meaning = "a newer release uses this server; it says so when this one is too old"
        shown = f"version {found}, this release has {LIBRARY_VERSION}"
        return Result("function library", "note", shown, meaning, "pip install -U govledger")
    return Result("function library", "ok", f"version {found}")


def attestation(_: Seen, node: Node) -> Result:
    """Whether clients without CONFIG can know what an acknowledgement means."""
    if node.attested:
        meaning = "clients that may not read CONFIG know for a day what an acknowledgement means"
        return Result("attestation", "ok", "left just now", meaning)
    if node.config is None and node.settings.appendonly is not None:
        return Result("attestation", "ok", "somebody else's is there, and is what was read here")
    meaning = "receipts of clients that may not read CONFIG say `memory`, whatever is true"
    fix = "run this with +config|get and write access to claude-flow:ledger:_:attestation:*"
    return Result("attestation", "warning", "none", meaning, fix)


def key_count(seen: Seen, node: Node) -> Result:
    """Whether keys vanish."""
    if not node.samples:
        meaning = "growth cannot be judged"
        return Result(
            "key count", "note", "no health samples of this run", meaning, "govledger schedule"
        )
    counts = [number(one, "keys") for one in node.samples]
    found = f"{counts[0]} keys; {min(counts)} to {max(counts)} in {len(counts)} samples"
    if counts[0] * 2 >= max(counts):
        return Result("key count", "ok", found)
    meaning = "half of what was there is gone: expiry and cleanup, or somebody deletes keys"
    fix = f"govledger replay of each of {len(seen.tenants)} tenants finds entries that are missing"
    return Result("key count", "warning", found, meaning, fix)


# -- the ledger ----------------------------------------------------------------------------------


def registry(seen: Seen) -> Result:
    """Whether every tenant's stream is known."""
    if seen.unregistered is None:
        return _unknown("registry", "whether streams are hidden from the projectors", "+scan")
    if seen.unregistered:
        return Result(
            "registry",
            "danger",
            f"not in the registry: {_shown(seen.unregistered)}",
            "their decisions are recorded, and no projector folds them: nobody acts on them",
            f"SADD claude-flow:ledger:_:tenants:all {seen.unregistered[0]} …, or delete the keys "
            "if they are no ledgers",
        )
    if seen.misnamed:
        meaning = "somebody else writes into the registry; they are ignored"
        fix = "SREM them from claude-flow:ledger:_:tenants:all"
        return Result("registry", "warning", f"no tenants: {_shown(seen.misnamed)}", meaning, fix)
    return Result("registry", "ok", f"{len(seen.tenants)} tenants, no unknown stream")


def projector(seen: Seen) -> Result:
    """How far the folds are behind the heads."""
    if "tenants" in seen.denied:
        return _unknown("projector", "how far state is behind", "+hmget +hget +ttl +getrange")
    broken = [f"{one.tenant} ({one.problem})" for one in seen.standings if one.problem]
    if broken:
        return Result(
            "projector",
            "danger",
            f"not folded: {_shown(broken)}",
            "policies act on state that stands still",
            "the hint in `govledger project --once` for that tenant says the way out",
        )
    behind: dict[str, int] = {}
    for one in seen.standings:  # an entry waits until every projection has folded it
        if one.behind:
            behind[one.tenant] = max(one.behind, behind.get(one.tenant, 0))
    entries = sum(behind.values())
    absent = {
        one.tenant for one in seen.standings if one.head and one.head.seq and one.ttl_seconds == -2
    }
    if not behind and not absent:
        return Result("projector", "ok", "every tenant is folded up to its head")
    age_ms = 0 if seen.oldest_unfolded_ms is None else seen.now_ms - seen.oldest_unfolded_ms
    found = f"{entries} entries of {len(behind)} tenants are not folded"
    if behind:
        found += f", the oldest for {age_ms / 1000:.0f} s"
    if absent:
        found += f"; no published copy: {_shown(sorted(absent))}"
    if age_ms <= LAG_LIMIT_MS and not absent:
        return Result("projector", "note", found)
    meaning = "adaptive policies read state from before these decisions"
    return Result("projector", "warning", found, meaning, "govledger project (is one running?)")


def quarantine(seen: Seen) -> Result:
    """Entries that no fold could read."""
    if "quarantine" in seen.denied:
        return _unknown("quarantine", "whether entries could not be folded", "+hlen")
    if not seen.quarantined:
        return Result("quarantine", "ok", "empty")
    counts = [f"{tenant}: {count}" for tenant, count in seen.quarantined.items()]
    first = next(iter(seen.quarantined))
    return Result(
        "quarantine",
        "warning",
        f"entries that could not be folded: {_shown(counts)}",
        "they are recorded, and missing from state",
        f"HGETALL claude-flow:ledger:{{{first}}}:projection:quarantine says why; a release that "
        f"can read them, then govledger rebuild {first}",
    )


def foreign_hands(seen: Seen) -> Result:
    """Incidents that the append function noticed."""
    touched = {
        one.tenant: one.head.incidents for one in seen.standings if one.head and one.head.incidents
    }
    if not touched:
        return Result("foreign writes", "ok", "none was noticed")
    counts = [f"{tenant}: {count}" for tenant, count in touched.items()]
    first = next(iter(touched))
    return Result(
        "foreign writes",
        "warning",
        f"incidents: {_shown(counts)}",
        "others wrote into streams or deleted entries; foreign entries are never folded",
        f"HGETALL claude-flow:ledger:{{{first}}}:governance:head; SECURITY.md has the ACLs",
    )


def jobs(seen: Seen) -> Result:
    """Whether the scheduled jobs run and work."""
    if "jobs" in seen.denied:
        return _unknown("jobs", "whether the scheduled jobs run", "+hgetall +zrange")
    table = {job: one for job, one in seen.settings.govledger_jobs.items() if one.enabled}
    now = datetime.fromtimestamp(seen.now_ms / 1000, UTC) - JOB_GRACE
    late = []
    for job, schedule in table.items():
        due = latest_slot(schedule, now)
        due_ms = due.timestamp() * 1000 if due is not None else 0
        # Of what was due before anything was recorded there was nothing to do.
        if seen.claimed_ms.get(job, 0) < due_ms and _was_there(seen, due_ms):
            late.append(job)
    failed = [job for job, run in seen.last_runs.items() if job in table and run.status == "failed"]
    if late:
        return Result(
            "jobs",
            "warning",
            f"not run when due: {', '.join(late)}",
            "no scheduler seems to run: escalations do not expire, snapshots are not taken",
            "govledger schedule, as a service; GOVLEDGER_JOBS switches off what is not wanted",
        )
    if failed:
        reason = seen.last_runs[failed[0]].result.get("error")
        meaning = "what the job is for is not done"
        found = f"failed at their last run: {', '.join(failed)} ({reason})"
        return Result("jobs", "warning", found, meaning, f"govledger jobs {failed[0]}")
    off = [job for job, one in seen.settings.govledger_jobs.items() if not one.enabled]
    return Result(
        "jobs", "ok", "each that was due has run" + (f"; off: {', '.join(off)}" if off else "")
    )


def _was_there(seen: Seen, time_ms: float) -> bool:
    """Whether anything was recorded by then; in doubt it was."""
    unknown = not {"registry", "streams"}.isdisjoint(seen.denied)
    return unknown or (seen.began_ms is not None and seen.began_ms <= time_ms)


SERVER_CHECKS: Final[tuple[Callable[[Seen], Result], ...]] = (
    reachability,
    authentication,
    encryption,
    rights,
)
NODE_CHECKS: Final[tuple[Callable[[Seen, Node], Result], ...]] = (
    version,
    eviction,
    append_only_file,
    aof_rewrite,
    save_points,
    last_save,
    disk_room,
    memory,
    fragmentation,
    clients,
    latency,
    slow_log,
    clock,
    replication,
    function_library,
    attestation,
    key_count,
)
LEDGER_CHECKS: Final[tuple[Callable[[Seen], Result], ...]] = (
    registry,
    projector,
    quarantine,
    foreign_hands,
    jobs,
)


# -- shown ---------------------------------------------------------------------------------------


def report_json(address: str, results: Sequence[Result]) -> dict[str, Any]:
    """All of it as one object."""
    shown = [asdict(result) for result in results]
    return {"address": address, "level": worst(results), "checks": shown}


def report_lines(results: Sequence[Result]) -> list[str]:
    """What is wrong first, with what it means and what to set; then a line for each that is not."""
    lines = []
    for result in sorted(results, key=lambda one: -LEVELS.index(one.level)):
        name = f"{result.check} ({result.node})" if result.node else result.check
        lines.append(f"{result.level:<8} {name}: {result.found}")
        if result.level != "ok":
            lines += [f"         {result.meaning}"] if result.meaning else []
            lines += [f"         → {result.remedy}"] if result.remedy else []
    return lines
