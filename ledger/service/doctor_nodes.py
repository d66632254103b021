"""The doctor on each node: what it may lose, whether it has room, and how fast it answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from ledger.server import LIBRARY_VERSION, NodeSettings
from ledger.service.doctor_result import Level, Result, size, unknown
from ledger.service.doctor_seen import Node, Seen
from ledger.service.inspection import number
from ledger.wording import counted

__all__ = ["NODE_CHECKS"]

MEMORY_WARNING: Final = 0.8
"""Of maxmemory: the operations guide's own limit."""
NEARLY_FULL: Final = 0.95
FRAGMENTATION_LIMIT: Final = 1.5
FRAGMENTATION_MIN_BYTES: Final = 100 * 1024 * 1024
LATENCY_LIMIT_MS: Final = 10.0
SLOW_RECENT_S: Final = 3600
CLOCK_WARNING_MS: Final = 5_000
CLOCK_LIMIT_MS: Final = 300_000
BACKUP_AGE_LIMIT_MS: Final = 26 * 3_600_000


def version(_: Seen, node: Node) -> Result:
    """Whether the server can run functions."""
    valkey = node.info.get("valkey_version")
    text = valkey or node.info.get("redis_version")
    if text is None:
        return unknown("version", "whether this server is supported", "+info")
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
        return unknown("eviction", "whether the server may evict decisions", "+info")
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
            f"{found}; {counted(evicted, 'key')} evicted since the start",
            f"when memory runs out it drops any key, recorded decisions too, silently; {refuses}",
            "CONFIG SET maxmemory-policy noeviction (or volatile-lru), and in redis.conf",
        )
    if evicted:
        meaning = "published state and sessions went; the record has no TTL and stayed"
        return Result("eviction", "note", f"{found}; {counted(evicted, 'key')} evicted", meaning)
    return Result("eviction", "ok", found, "recorded decisions are never evicted")


def append_only_file(_: Seen, node: Node) -> Result:
    """What a crash or a power cut takes."""
    set_to = node.settings
    if set_to.appendonly is None:
        return unknown("append-only file", "what a crash or power cut loses", "+config|get")
    if not node.info:
        return unknown("append-only file", "whether it is whole and can be written", "+info")
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
        return unknown("append-only file rewrite", "whether rewrites work", "+info")
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
        return unknown("rdb schedule", "whether a failed snapshot stops writes", "+config|get")
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
        return unknown("last save", "how old the newest snapshot is", "+info")
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
    if not node.info:
        return unknown("disk room", "whether a rewrite and a snapshot fit", "+info")
    data = number(node.info, "used_memory")
    aof = number(node.info, "aof_current_size")
    found = f"{size(node.free_bytes)} free; data {size(data)}, append-only file {size(aof)}"
    if node.free_bytes >= 2 * data + aof:
        return Result("disk room", "ok", found)
    level: Level = "danger" if node.free_bytes < data else "warning"
    meaning = "a rewrite or snapshot may not fit; on a full disk nothing more can be recorded"
    return Result("disk room", level, found, meaning, "free or add disk; govledger run aof-rewrite")


def memory(_: Seen, node: Node) -> Result:
    """Memory against its limit."""
    if not node.info:
        return unknown("memory", "how near the memory limit is", "+info")
    used, limit = number(node.info, "used_memory"), number(node.info, "maxmemory")
    whole = number(node.info, "total_system_memory")
    if limit:
        share, of = used / limit, f"maxmemory {size(limit)}"
    elif whole:
        share, of = used / whole, f"the machine's {size(whole)}, no maxmemory"
    else:
        return Result("memory", "note", f"{size(used)} used, no maxmemory")
    found = f"{size(used)} used, {share:.0%} of {of}"
    if share < MEMORY_WARNING:
        return Result("memory", "ok", found)
    level: Level = "danger" if share >= NEARLY_FULL else "warning"
    meaning = _at_the_limit(node.settings) if limit else _when_killed(node.settings)
    fix = "CONFIG SET maxmemory <more>, or a larger machine; govledger run cleanup frees cache keys"
    return Result("memory", level, found, meaning, fix)


def _at_the_limit(set_to: NodeSettings) -> str:
    if set_to.maxmemory_policy is None:
        return "at the limit appends fail (OOM), or recorded decisions are evicted"
    if set_to.evicts_ledger_keys:
        return f"at the limit recorded decisions are evicted ({set_to.maxmemory_policy})"
    return "at the limit appends fail (OOM); nothing that is recorded is lost"


def _when_killed(set_to: NodeSettings) -> str:
    """A process that is killed loses nothing that it has written to a file, fsynced or not."""
    killed = "the kernel may kill the server"
    if set_to.appendonly is None:
        return f"{killed}; what is lost then cannot be told"
    if set_to.appendonly != "yes" or set_to.aof_begins:
        return f"{killed}, and with it go all decisions since its last snapshot"
    return f"{killed}; nothing that is recorded is lost"


def fragmentation(_: Seen, node: Node) -> Result:
    """Memory that is held and not used."""
    if not node.info:
        return unknown("fragmentation", "how much memory is wasted", "+info")
    ratio = float(node.info.get("mem_fragmentation_ratio", "0").replace("nan", "0"))
    wasted = number(node.info, "mem_fragmentation_bytes")
    found = f"ratio {ratio:.2f}, {size(max(0, wasted))}"
    if ratio <= FRAGMENTATION_LIMIT or wasted < FRAGMENTATION_MIN_BYTES:
        return Result("fragmentation", "ok", found)
    meaning = "the machine runs out of memory earlier than used_memory says"
    fix = "CONFIG SET activedefrag yes (where the server has it), or restart it in a quiet hour"
    return Result("fragmentation", "warning", found, meaning, fix)


def clients(_: Seen, node: Node) -> Result:
    """Connections against their limit."""
    if not node.info:
        return unknown("clients", "how near the connection limit is", "+info")
    count, limit = number(node.info, "connected_clients"), number(node.info, "maxclients")
    rejected = number(node.info, "rejected_connections")
    found = f"{count} of {limit}" + (f", {rejected} turned away" if rejected else "")
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
        return unknown("latency", "how long each append waits for the server", "+ping")
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
        return unknown("slow log", "whether somebody blocks the server", "+slowlog|get")
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
        return unknown("clock", "whether the clocks agree", "+time")
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
        return unknown("replication", "what a failover would lose", "+info")
    if node.info.get("role") != "master":
        meaning = "it takes no writes: nothing can be recorded here"
        fix = "connect to the primary, or by redis+sentinel:// or a cluster URL that finds it"
        return Result("replication", "danger", "this is a replica", meaning, fix)
    replicas = number(node.info, "connected_slaves")
    refused = _too_few_replicas(node, replicas)
    if refused is not None:
        return refused
    if not replicas:
        meaning = "this machine's disk has the only copy of the record"
        fix = "a replica on another machine, or `govledger schedule --archive` onto another disk"
        return Result("replication", "note", "no replica", meaning, fix)
    return _waits_for(node, replicas)


def _waits_for(node: Node, replicas: int) -> Result:
    """Whether a primary that is cut off from its replicas ceases to acknowledge."""
    told = " ".join(value for name, value in node.info.items() if name.startswith("slave"))
    lags = [int(lag) for lag in re.findall(r"\blag=(\d+)", told)]
    found = f"{counted(replicas, 'replica')}, the slowest {max(lags, default=0)} s behind"
    needed = (node.config or {}).get("min-replicas-to-write")
    if needed is None:
        return unknown("replication", "how many replicas an append waits for", "+config|get")
    if int(needed) < 1:
        return Result(
            "replication",
            "warning",
            f"{found}; min-replicas-to-write is 0",
            "a failover now loses acknowledged decisions that no replica had yet, and a primary "
            "cut off from all of them goes on acknowledging",
            "CONFIG SET min-replicas-to-write 1, or append with durability='replicated'",
        )
    if not number(node.config or {}, "min-replicas-max-lag"):
        return Result(
            "replication",
            "warning",
            f"{found}; min-replicas-to-write is {needed}, and min-replicas-max-lag 0",
            "a max-lag of 0 switches the rule off: cut off from all replicas it goes on "
            "acknowledging, and a failover loses that",
            "CONFIG SET min-replicas-max-lag 10, and in redis.conf",
        )
    return Result("replication", "ok", f"{found}; min-replicas-to-write is {needed}")


def _too_few_replicas(node: Node, replicas: int) -> Result | None:
    """A primary that waits for replicas which are not there, so that it takes no writes."""
    if "min_slaves_good_slaves" not in node.info:  # INFO has it where the rule is on
        return None
    good = number(node.info, "min_slaves_good_slaves")
    needed = (node.config or {}).get("min-replicas-to-write", "1")
    if good >= int(needed):
        return None
    return Result(
        "replication",
        "danger",
        f"{good} of {counted(replicas, 'replica')} in step; min-replicas-to-write is {needed}",
        "every append is refused now (NOREPLICAS)",
        "bring the replicas back; or CONFIG SET min-replicas-to-write 0, and a failover may lose "
        "acknowledged decisions",
    )


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
    if "health samples" in seen.denied:
        return unknown("key count", "whether keys vanish", "+xrevrange")
    if not node.info:
        return unknown("key count", "which samples are of this run of the server", "+info")
    if not node.samples:
        meaning = "growth cannot be judged"
        return Result(
            "key count", "note", "no health samples of this run", meaning, "govledger schedule"
        )
    counts = [number(one, "keys") for one in node.samples]
    found = (
        f"{counted(counts[0], 'key')}; {min(counts)} to {max(counts)} "
        f"in {counted(len(counts), 'sample')}"
    )
    if counts[0] * 2 >= max(counts):
        return Result("key count", "ok", found)
    meaning = "half of what was there is gone: expiry and cleanup, or somebody deletes keys"
    fix = "govledger replay of each tenant finds entries that are missing"
    return Result("key count", "warning", found, meaning, fix)


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
