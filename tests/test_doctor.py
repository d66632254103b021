"""The doctor and the probe: what they find on real servers, and what they make of what they see."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import typer

from ledger import Decision, Ledger, errors, keys, load_settings
from ledger.embedded import EmbeddedServer, is_running
from ledger.server import LIBRARY_VERSION, NodeSettings
from ledger.service.cleanup import Cleanup
from ledger.service.commands_operate import doctor
from ledger.service.doctor import examine, judge, report_lines, worst
from ledger.service.doctor_access import SERVER_CHECKS
from ledger.service.doctor_ledger import LEDGER_CHECKS
from ledger.service.doctor_nodes import NODE_CHECKS
from ledger.service.doctor_seen import Node, Seen, look
from ledger.service.health import reach
from ledger.service.runs import Run
from ledger.settings import DEFAULT_JOBS
from projections import Projector
from tests.commands import run
from tests.servers import Server, new_tenant

CHECKS = {check.__name__ for check in (*SERVER_CHECKS, *NODE_CHECKS, *LEDGER_CHECKS)}
NO_JOBS = json.dumps({job: {"enabled": False} for job in DEFAULT_JOBS})


async def levels(server: Server) -> dict[str, str]:
    async with Ledger.connect(server.url) as ledger:
        return {result.check: result.level for result in await examine(ledger)}


async def folded_tenant(server: Server) -> str:
    tenant = new_tenant()
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))
        await Projector(ledger).run_once([tenant])
    return tenant


# -- on real servers ------------------------------------------------------------------------------


async def test_a_good_server_has_a_clean_bill(fresh_server, server):
    """On each kind, with a password and everything folded, nothing is worse than a note: on a new
    ledger no job was due.
    """
    own = fresh_server(server.kind, password="geheim")
    await folded_tenant(own)
    done = run(own.url, "doctor", "--json")
    (told,) = done.lines
    timed = ("latency", "slow log")  # which a busy machine decides
    judged = [check for check in told["checks"] if check["check"] not in timed]
    assert [check for check in judged if check["level"] not in ("ok", "note")] == []
    assert done.code == 0
    assert len(told["checks"]) == len(CHECKS)
    by_name = {check["check"]: check for check in told["checks"]}
    assert by_name["authentication"]["found"].endswith("who gives no password is refused")
    assert by_name["attestation"]["level"] == "ok"
    kind = {"valkey9": "Valkey 9.1", "redis7": "Redis 7.0", "redis8": "Redis 8.2"}[server.kind]
    assert by_name["version"]["found"].startswith(kind)


@pytest.mark.parametrize(
    ("check", "level", "settings"),
    [
        ("eviction", "danger", {"maxmemory-policy": "allkeys-lru"}),
        ("append-only file", "danger", {"appendonly": "no"}),
        ("append-only file", "danger", {"appendfsync": "no"}),
        ("append-only file", "warning", {"appendfsync": "everysec"}),
        ("append-only file", "warning", {"no-appendfsync-on-rewrite": "yes"}),
        ("rdb schedule", "warning", {"save": "900 1"}),
        ("slow log", "warning", {"slowlog-log-slower-than": "0"}),
    ],
)
async def test_a_bad_setting_is_found_and_its_remedy_works(
    fresh_server, server, check, level, settings
):
    """Each setting is named with its level; what the remedy says to set makes the check ok."""
    own = fresh_server(server.kind)
    for name, value in settings.items():
        own.cli("CONFIG", "SET", name, value)
    async with Ledger.connect(own.url) as ledger:
        (found,) = [result for result in await examine(ledger) if result.check == check]
        assert found.level == level
        assert found.meaning
        for name, value in re.findall(r'CONFIG SET ([a-z-]+) (\w+|"")', found.remedy)[:2]:
            own.cli("CONFIG", "SET", name, value.strip('"'))
        if check == "slow log":
            own.cli("CONFIG", "SET", "slowlog-log-slower-than", "-1")
            own.cli("SLOWLOG", "RESET")
        elif check == "append-only file":
            while own.cli("INFO", "persistence")["aof_rewrite_in_progress"]:
                pass
        (after,) = [result for result in await examine(ledger) if result.check == check]
        assert after.level == "ok"


async def test_strict_makes_a_warning_count(fresh_server):
    """A warning exits with 0, and with --strict with 1."""
    own = fresh_server(password="geheim", config={"appendfsync": "everysec"})
    await folded_tenant(own)
    assert run(own.url, "doctor", GOVLEDGER_JOBS=NO_JOBS).code == 0
    strict = run(own.url, "doctor", "--strict", GOVLEDGER_JOBS=NO_JOBS)
    assert strict.code == 1
    assert "a power cut now loses up to a second or two of acknowledged decisions" in strict.out


async def test_a_server_without_a_password_is_told_so(fresh_server):
    """Where a stranger gets in, the doctor says who could do what; on this machine a warning."""
    assert (await levels(fresh_server()))["authentication"] == "warning"
    own = fresh_server()
    own.cli("ACL", "SETUSER", "default", "on", "nopass", "resetkeys", "-@all", "+@connection")
    done = run(own.url, "doctor", "--json")
    assert done.code in (0, 1), done.err
    by_name = {check["check"]: check for check in done.lines[0]["checks"]}
    assert by_name["authentication"]["level"] == "warning"


async def test_hidden_streams_and_strange_names_are_found(fresh_server, server):
    """A stream whose tenant is not in the registry is danger; a name that is none a warning."""
    own = fresh_server(server.kind)
    tenant = await folded_tenant(own)
    own.cli("SADD", keys.TENANTS, "no tenant")
    assert (await levels(own))["registry"] == "warning"
    own.cli("SREM", keys.TENANTS, tenant)
    own.cli("XADD", "claude-flow:ledger:{odd:\n}:governance:decisions", "*", "a", "b")
    async with Ledger.connect(own.url) as ledger:
        (found,) = [one for one in await examine(ledger) if one.check == "registry"]
    assert found.level == "danger"
    assert tenant in found.found
    own.cli("SADD", keys.TENANTS, tenant)
    done = run(own.url, "doctor")
    assert done.code == 1
    assert "odd:\\n" in done.out


async def test_quarantine_and_foreign_hands_are_found(fresh_server, server):
    """Entries that no fold could read, and entries that others wrote, are warnings by tenant."""
    own = fresh_server(server.kind)
    tenant = await folded_tenant(own)
    own.cli("HSET", keys.projection_quarantine(tenant), "governance@1:7", "why")
    own.cli("XADD", keys.decisions(tenant), "*", "type", "x")
    async with Ledger.connect(own.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))
        found = {one.check: one for one in await examine(ledger)}
    assert found["quarantine"].level == found["foreign writes"].level == "warning"
    assert tenant in found["quarantine"].found
    assert tenant in found["foreign writes"].found
    assert found["projector"].level == "note"
    assert found["projector"].found.startswith("not folded: 2 entries of 1 tenant,")


async def test_a_lost_head_and_a_rolled_back_ledger_are_danger(fresh_server):
    """A fold that is ahead of the ledger, or a damaged head, is named with its tenant."""
    own = fresh_server()
    tenant, other = await folded_tenant(own), await folded_tenant(own)
    own.cli("HSET", keys.head(tenant), "seq", "0")
    own.cli("HDEL", keys.head(other), "seq")
    async with Ledger.connect(own.url) as ledger:
        (found,) = [one for one in await examine(ledger) if one.check == "projector"]
    assert found.level == "danger"
    assert tenant in found.found
    assert other in found.found


@pytest.mark.parametrize(
    ("denied", "right"),
    [
        (["-config"], "+config|get"),
        (["-info"], "+info"),
        (["-slowlog"], "+slowlog|get"),
        (["-scan"], "+scan"),
        (["-smembers"], "+smembers"),
        (["-config", "-info", "-slowlog", "-scan", "-acl", "-fcall", "-hgetall", "-hlen"], "+info"),
        (["-@all", "+@connection", "+time", "+ping"], "+info"),
    ],
)
def test_an_acl_that_hides_something_is_named(fresh_server, server, denied, right):
    """Without a right the doctor still ends, says what it cannot tell, and what to grant."""
    own = fresh_server(server.kind)
    own.cli("ACL", "SETUSER", "watch", "on", ">geheim", "~*", "&*", "+@all", *denied)
    url = own.url.replace("redis://", "redis://watch:geheim@")
    done = run(url, "doctor", "--json")
    assert done.code in (0, 1), done.err
    assert done.err == ""
    remedies = [check["remedy"] for check in done.lines[0]["checks"]]
    assert f"grant {right}" in remedies
    assert run(url, "doctor", "--strict").code == 1


async def test_what_may_not_be_looked_at_is_not_ok(fresh_server):
    """As the engine of the README, who may not list tenants, the doctor vouches for none of them
    while an entry waits and another lies in quarantine; and a head that it may not read is not
    broken.
    """
    own = fresh_server()
    tenant = await folded_tenant(own)
    async with Ledger.connect(own.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))
    own.cli("HSET", keys.projection_quarantine(tenant), "governance@1:7", "why")
    url = own.url.replace("redis://", "redis://watch:geheim@")
    of_tenants = ("projector", "quarantine", "foreign writes")
    for rights, remedies in (
        ("~* +@all -smembers", {"grant +smembers"}),
        (
            f"%R~{keys.TENANTS} +@all",
            {"grant +hmget +hget +ttl +getrange", "grant +hlen", "grant +hmget"},
        ),
    ):
        own.cli("ACL", "SETUSER", "watch", "reset", "on", ">geheim", *rights.split())
        async with Ledger.connect(url) as ledger:
            found = {one.check: one for one in await examine(ledger)}
        assert {found[check].level for check in of_tenants} == {"warning"}
        assert {found[check].remedy for check in of_tenants} == remedies


async def test_a_password_in_the_query_is_no_open_door(fresh_server):
    """A server with a password is not called open where the URL gives it as `?password=`."""
    own = fresh_server(password="geheim")
    url = f"redis://127.0.0.1:{own.port}?password=geheim&username=default&protocol=3"
    async with Ledger.connect(url) as ledger:
        assert (await look(ledger)).open_door is False


async def test_the_attestation_is_left_for_others(fresh_server):
    """After the doctor a user without CONFIG knows that what it appends is fsynced."""
    own = fresh_server()
    assert run(own.url, "doctor").code == 0
    own.cli("ACL", "SETUSER", "engine", "on", ">pw", "~*", "+@all", "-config")
    async with Ledger.connect(own.url.replace("redis://", "redis://engine:pw@")) as ledger:
        receipt = await ledger.append("t", Decision(agent="a", action="b", verdict="allow"))
    assert receipt.durability == "fsynced"


async def test_an_attestation_is_not_renewed_unseen(fresh_server):
    """Who may not read CONFIG cannot keep what somebody else attested alive."""
    own = fresh_server()
    assert run(own.url, "doctor").code == 0
    (key,) = own.cli("KEYS", keys.attestation("*"))
    own.cli("EXPIRE", key, 100)
    own.cli("ACL", "SETUSER", "few", "on", ">pw", "~*", "+@all", "-config")
    few = own.url.replace("redis://", "redis://few:pw@")
    assert run(few, "project", "--once").code == 0
    assert run(few, "doctor").code == 0
    assert 0 < own.cli("TTL", key) <= 100


async def test_replicas_and_what_a_failover_takes(fresh_server):
    """A primary that waits for none of its replicas is a warning; a replica itself is danger."""
    primary = fresh_server()
    replica = fresh_server(config={"replicaof": f"127.0.0.1 {primary.port}"})
    replica.wait_for_replica_link()
    assert (await levels(primary))["replication"] == "warning"
    primary.cli("CONFIG", "SET", "min-replicas-to-write", "1")
    assert (await levels(primary))["replication"] == "ok"
    primary.cli("CONFIG", "SET", "min-replicas-max-lag", "0")  # switches the rule off
    assert (await levels(primary))["replication"] == "warning"
    done = run(replica.url, "doctor", "--json")
    assert done.code == 1
    by_name = {check["check"]: check["level"] for check in done.lines[0]["checks"]}
    assert by_name["replication"] == "danger"
    assert run(replica.url, "health").code == 1


async def test_a_primary_that_waits_for_missing_replicas_takes_nothing(fresh_server, server):
    """Where too few replicas keep up, appends are refused: the doctor and the probe say so, by
    whatever their user may ask.
    """
    own = fresh_server(server.kind)
    tenant = await folded_tenant(own)
    own.cli("CONFIG", "SET", "min-replicas-to-write", "1")
    assert (await levels(own))["replication"] == "danger"
    told = run(own.url, "health")
    assert told.code == 1
    assert "min-replicas-to-write" in told.out
    own.cli("ACL", "SETUSER", "few", "on", ">pw", "~*", "+@all", "-info", "-config")
    few = own.url.replace("redis://", "redis://few:pw@")
    assert "NOREPLICAS" in run(few, "health").out
    own.cli("CONFIG", "SET", "min-replicas-to-write", "0")
    told = run(few, "health")
    assert (told.code, told.out) == (0, "ok: decisions can be recorded\n")
    own.cli("ACL", "SETUSER", "few", "-fcall")
    assert run(few, "health").out == "ok: decisions can be recorded, as far as this user may see\n"
    async with Ledger.connect(own.url) as ledger:
        assert (await ledger.head(tenant)).seq == 1


async def test_every_primary_of_a_cluster_is_examined(cluster):
    """In a cluster each node's results have its name."""
    async with Ledger.connect(cluster.url) as ledger:
        results = await examine(ledger)
    ports = {f"port {server.port}" for server in cluster.primaries}
    assert {result.node for result in results if result.check == "eviction"} == ports
    assert {result.node for result in results if result.check == "registry"} == {""}


async def test_a_server_that_refuses_writes_is_examined_all_the_same(fresh_server, server):
    """After a failed snapshot with save points, or without memory, the doctor says which it is."""
    own = fresh_server(server.kind, config={"save": "3600 1"})
    await folded_tenant(own)
    (own.directory / "dump.rdb").mkdir()
    own.cli("BGSAVE")
    while own.cli("INFO", "persistence")["rdb_last_bgsave_status"] != "err":
        pass
    assert (await levels(own))["last save"] == "danger"
    assert run(own.url, "health").code == 1
    own.cli("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
    own.cli("CONFIG", "SET", "maxmemory", "1mb")
    assert (await levels(own))["memory"] == "danger"
    assert "maxmemory" in run(own.url, "health").out
    own.cli("CONFIG", "SET", "maxmemory-policy", "volatile-lru")  # nothing is volatile
    assert "maxmemory" in run(own.url, "health").out


async def test_what_killed_processes_left_is_named_and_cleaned_up(fresh_server):
    """Parts of an import that nobody goes on with, and a lease without an end, are named until the
    cleanup deletes the ones and ends the other; an import that goes on is left alone.
    """
    own = fresh_server()
    tenant, killed, live = await folded_tenant(own), new_tenant(), new_tenant()
    lease = keys.lease(tenant, "governance", 1)
    own.cli("SET", lease, "a worker of long ago")
    own.cli("HSET", keys.importing(live)[1], "token", "x")

    def leave_import() -> None:
        with own.client() as client:
            payload = client.dump(keys.importing(live)[1])
            for one in keys.importing(killed):
                client.execute_command("RESTORE", one, 0, payload, "IDLETIME", 3_700)

    leave_import()
    async with Ledger.connect(own.url) as ledger:
        (found,) = [one for one in await examine(ledger) if one.check == "leftovers"]
        assert found.level == "warning"
        assert found.found == (
            f"imports that were never finished: {killed}; leases without an end: {tenant}"
        )
        done = await Cleanup(ledger, 0).run()
        assert (done["unfinished_imports"], done["leases_given_a_ttl"]) == (3, 1)
        assert 0 < own.cli("PTTL", lease) <= 60_000
        assert own.cli("EXISTS", *keys.importing(live)) == 1
        leave_import()
        own.cli("CONFIG", "SET", "maxmemory-policy", "volatile-lfu")  # which keeps no idle times
        assert (await Cleanup(ledger, 0).run())["unfinished_imports"] == 0
        assert own.cli("EXISTS", *keys.importing(killed)) == 3


# -- judgements ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy() -> Seen:
    """A server of another machine, with nothing wrong."""
    now_ms = int(datetime(2026, 3, 3, 12, tzinfo=UTC).timestamp() * 1000)
    node = Node(
        name="",
        info={
            "redis_version": "8.2.3",
            "role": "master",
            "connected_slaves": "1",
            "slave0": "ip=10.0.0.1,port=6379,state=online,offset=1,lag=0",
            "used_memory": str(10**9),
            "maxmemory": str(10**10),
            "mem_fragmentation_ratio": "1.1",
            "mem_fragmentation_bytes": str(2 * 10**8),
            "connected_clients": "10",
            "maxclients": "10000",
            "rdb_saves": "3",
            "rdb_last_save_time": str(now_ms // 1000 - 3600),
            "uptime_in_seconds": "1000000",
        },
        config={
            "save": "",
            "stop-writes-on-bgsave-error": "yes",
            "min-replicas-to-write": "1",
            "min-replicas-max-lag": "10",
        },
        settings=NodeSettings("yes", "always", "no", "noeviction"),
        attested=True,
        round_trips_ms=[0.2] * 100,
        slow=[],
        library_version=LIBRARY_VERSION,
        free_bytes=10**11,
        samples=[{"keys": "100"}, {"keys": "90"}],
    )
    return Seen(
        address="rediss://ledger:6380",
        scheme="rediss",
        local=False,
        settings=load_settings(),
        verifies_tls=True,
        user="operator",
        open_door=False,
        now_ms=now_ms,
        nodes=[node],
        unregistered=[],
        began_ms=0,
        claimed_ms=dict.fromkeys(DEFAULT_JOBS, now_ms),
    )


def level_of(seen: Seen, check: str) -> str:
    (found,) = [result for result in judge(seen) if result.check == check]
    return found.level


def test_nothing_wrong_is_all_ok(healthy):
    """The healthy server of this file is ok in every respect."""
    assert {result.level for result in judge(healthy)} == {"ok"}


@pytest.mark.parametrize(
    ("check", "level", "changed"),
    [
        ("version", "danger", {"redis_version": "6.2.1"}),
        ("version", "ok", {"redis_version": "7.2.4", "valkey_version": "9.1.2"}),
        ("memory", "warning", {"used_memory": "8000000000"}),
        ("memory", "danger", {"used_memory": "9500000000"}),
        ("memory", "danger", {"maxmemory": "0", "total_system_memory": "1000000000"}),
        ("memory", "note", {"maxmemory": "0"}),
        ("fragmentation", "warning", {"mem_fragmentation_ratio": "1.6"}),
        ("fragmentation", "ok", {"mem_fragmentation_ratio": "9", "mem_fragmentation_bytes": "9"}),
        ("clients", "warning", {"connected_clients": "8000"}),
        ("clients", "danger", {"connected_clients": "9500"}),
        ("clients", "note", {"rejected_connections": "1"}),
        ("append-only file", "danger", {"aof_last_write_status": "err"}),
        ("append-only file rewrite", "warning", {"aof_last_bgrewrite_status": "err"}),
        ("last save", "warning", {"rdb_last_bgsave_status": "err"}),
        ("last save", "warning", {"rdb_last_save_time": "0"}),
        ("last save", "warning", {"rdb_saves": "0"}),
        ("last save", "note", {"rdb_saves": "0", "uptime_in_seconds": "60"}),
        ("replication", "note", {"connected_slaves": "0"}),
        ("replication", "danger", {"role": "slave"}),
        ("eviction", "note", {"evicted_keys": "3"}),
        ("disk room", "warning", {"aof_current_size": "99000000000"}),
    ],
)
def test_what_info_says_is_judged(healthy, check, level, changed):
    """Each limit: at it the check changes its level, and says what that means."""
    node = replace(healthy.nodes[0], info=healthy.nodes[0].info | changed)
    assert level_of(replace(healthy, nodes=[node]), check) == level


def failed_run(job: str) -> Run:
    return Run(job, "failed", "w", None, 0, 1.0, {"error": "disk full", "hint": None})


@pytest.mark.parametrize(
    ("check", "level", "node", "seen"),
    [
        ("latency", "warning", {"round_trips_ms": [0.1] * 98 + [11.0] * 2}, {}),
        ("clock", "warning", {"clock_ahead_ms": -6_000}, {}),
        ("clock", "danger", {"clock_ahead_ms": 301_000}, {}),
        ("disk room", "danger", {"free_bytes": 10**8}, {}),
        ("disk room", "note", {"free_bytes": None}, {}),
        ("function library", "note", {"library_version": None}, {}),
        ("function library", "note", {"library_version": LIBRARY_VERSION + 1}, {}),
        ("key count", "warning", {"samples": [{"keys": "40"}, {"keys": "100"}]}, {}),
        ("key count", "note", {"samples": []}, {}),
        ("attestation", "warning", {"attested": False}, {}),
        ("append-only file", "warning", {"settings": NodeSettings()}, {}),
        ("authentication", "danger", {}, {"open_door": True}),
        ("authentication", "warning", {}, {"open_door": True, "local": True}),
        ("tls", "danger", {}, {"verifies_tls": False}),
        ("tls", "warning", {}, {"scheme": "redis"}),
        ("tls", "ok", {}, {"scheme": "redis", "local": True}),
        ("registry", "warning", {}, {"unregistered": None}),
        ("jobs", "warning", {}, {"claimed_ms": {}}),
        ("jobs", "ok", {}, {"claimed_ms": {}, "began_ms": None}),
        ("jobs", "warning", {}, {"claimed_ms": {}, "denied": {"streams": "no"}}),
        ("projector", "warning", {}, {"denied": {"registry": "no"}}),
        ("quarantine", "warning", {}, {"denied": {"registry": "no"}}),
        ("foreign writes", "warning", {}, {"denied": {"tenants": "no"}}),
        ("key count", "warning", {}, {"denied": {"health samples": "no"}}),
        ("append-only file", "warning", {"info": {}}, {}),
        ("leftovers", "note", {}, {"importing": {"t": 5}}),
        ("leftovers", "warning", {}, {"denied": {"SCAN": "no"}}),
        ("jobs", "warning", {}, {"last_runs": {"snapshot": failed_run("snapshot")}}),
        ("rights", "note", {}, {"denied": {"INFO": "no"}}),
    ],
)
def test_what_else_was_seen_is_judged(healthy, check, level, node, seen):
    """The same for what is measured, tried and read of the ledger."""
    changed = replace(healthy, nodes=[replace(healthy.nodes[0], **node)], **seen)
    assert level_of(changed, check) == level
    (found,) = [result for result in judge(changed) if result.check == check]
    assert found.level == "ok" or found.meaning or found.found
    assert found.level in ("ok", "note") or found.remedy


def test_only_what_was_due_since_the_first_entry_is_missed(healthy):
    """A ledger of this hour without a scheduler has missed the frequent jobs, not the nightly."""
    seen = replace(healthy, claimed_ms={}, began_ms=healthy.now_ms - 3_600_000)
    (found,) = [result for result in judge(seen) if result.check == "jobs"]
    assert found.found == "not run when due: expire, refresh, health"


def test_a_run_that_never_ended_is_named(healthy):
    """A slot that was taken and has no run that ended: killed before or after it began, stopped, or
    longer under way than is likely; until a later run, by hand too, has made up for it.
    """
    slot_ms = healthy.now_ms - 3_600_000
    ended = subprocess.Popen(["true"])
    ended.wait()
    run = Run("snapshot", "running", "elsewhere:1", slot_ms, healthy.now_ms - 590_000, None, {})
    gone = replace(run, worker=f"{socket.gethostname()}:{ended.pid}")
    here = replace(run, worker=f"{socket.gethostname()}:{os.getpid()}")
    stopped = replace(run, status="stopped", seconds=8.0)
    before = replace(run, status="ok", slot_ms=slot_ms - 1, begun_ms=slot_ms - 1, seconds=90.0)
    by_hand = replace(before, slot_ms=None, begun_ms=slot_ms + 1)
    old = replace(run, begun_ms=healthy.now_ms - 610_000)
    for running, last, says in (
        ([], [before], "snapshot was taken when due, and its process ended before it began"),
        ([gone], [before], f"snapshot was begun by {gone.worker}, whose process ended"),
        ([old], [], "snapshot was begun by elsewhere:1 10 min ago and has not ended"),
        ([], [stopped], "stopped before they were done: snapshot"),
        ([run], [], "each that was due has run"),
        ([here], [before], "each that was due has run"),
        ([old], [before], "each that was due has run"),  # the one before took long, too
        ([gone], [by_hand], "each that was due has run"),
    ):
        seen = replace(healthy, claimed_ms=healthy.claimed_ms | {"snapshot": slot_ms})
        seen = replace(seen, running=running, last_runs={one.job: one for one in last})
        (found,) = [result for result in judge(seen) if result.check == "jobs"]
        assert found.found.startswith(says)
        assert found.level == ("ok" if says.startswith("each") else "warning")


def test_a_failed_job_is_told_beside_a_late_one(healthy):
    """That some jobs are late hides no job that failed."""
    late = {job: 0 for job in DEFAULT_JOBS if job == "expire"}
    seen = replace(
        healthy,
        claimed_ms=healthy.claimed_ms | late,
        last_runs={"snapshot": failed_run("snapshot")},
    )
    (found,) = [result for result in judge(seen) if result.check == "jobs"]
    assert found.found == "not run when due: expire; snapshot failed at its last run: disk full"


@pytest.mark.parametrize(
    ("limit", "settings", "says"),
    [
        (100, {}, "appends fail (OOM); nothing that is recorded is lost"),
        (100, {"maxmemory_policy": "allkeys-lru"}, "recorded decisions are evicted (allkeys-lru)"),
        (100, {"maxmemory_policy": None}, "appends fail (OOM), or recorded decisions are evicted"),
        (0, {}, "nothing that is recorded is lost"),
        (0, {"appendonly": "no"}, "with it go all decisions since its last snapshot"),
        (0, {"aof_begins": True}, "with it go all decisions since its last snapshot"),
        (0, {"appendonly": None}, "what is lost then cannot be told"),
    ],
)
def test_what_a_full_memory_costs(healthy, limit, settings, says):
    """What is said to be lost follows from the eviction policy and the append-only file."""
    info = {"used_memory": "99", "maxmemory": str(limit), "total_system_memory": "100"}
    good = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory_policy": "noeviction"}
    node = replace(
        healthy.nodes[0],
        info=healthy.nodes[0].info | info,
        settings=NodeSettings(**{**good, **settings}),
    )
    results = judge(replace(healthy, nodes=[node]))
    (found,) = [result for result in results if result.check == "memory"]
    assert found.level == "danger"
    assert found.meaning.endswith(says)


def test_a_failed_snapshot_that_stops_writes_is_danger(healthy):
    """With save points a failed BGSAVE refuses appends now, which is more than an old backup."""
    node = replace(
        healthy.nodes[0],
        info=healthy.nodes[0].info | {"rdb_last_bgsave_status": "err"},
        config={**healthy.nodes[0].config, "save": "900 1"},
    )
    results = judge(replace(healthy, nodes=[node]))
    assert worst(results) == "danger"
    lines = report_lines(results)
    assert lines[0].startswith("danger   last save: the last BGSAVE failed")
    assert "MISCONF" in lines[1]
    assert lines[2].strip().startswith("→")


# -- the probe -------------------------------------------------------------------------------------


def test_the_probe_answers_with_its_exit_code(fresh_server, server):
    """0 where decisions can be recorded; 1 where not, with the reason, whatever that is."""
    own = fresh_server(server.kind, password="geheim")
    good = run(own.url, "health", "--json")
    assert (good.code, good.lines[0]["healthy"]) == (0, True)
    wrong = run(own.url.replace("geheim", "falsch"), "health", "--json")
    assert (wrong.code, wrong.lines[0]["healthy"]) == (1, False)
    assert "falsch" not in wrong.out + wrong.err
    own.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert "allkeys-lru" in run(own.url, "health").out
    own.kill()
    gone = run(own.url, "health")
    assert gone.code == 1
    assert "cannot be reached" in gone.out
    assert run("nonsense://x", "health").code == 2


def test_the_probe_knows_who_may_not_load_the_library(fresh_server):
    """Where the functions are absent and the user may not load them, no append works."""
    own = fresh_server()
    own.cli("ACL", "SETUSER", "e", "reset", "on", ">geheim", "~*", "+@all", "-function|load")
    told = run(own.url.replace("redis://", "redis://e:geheim@"), "health")
    assert (told.code, "function|load" in told.out) == (1, True)
    assert run(own.url, "health").code == 0


def test_disk_room_is_unknown_without_info(healthy):
    """Free bytes alone do not say whether the data fits."""
    node = replace(healthy.nodes[0], info={})
    assert level_of(replace(healthy, nodes=[node]), "disk room") == "warning"


def test_the_probe_does_not_wait_for_ever(silent_server):
    """A server that accepts and says nothing is unhealthy after the time that was given."""
    done = run(silent_server, "health", "--timeout", "0.3", "--json")
    assert done.code == 1
    assert "within 0.3 s" in done.lines[0]["reason"]


def test_the_doctor_does_not_wait_for_ever(silent_server, monkeypatch, capfdbinary):
    """Nor does the doctor: who does not answer is not examined, however often others try."""
    monkeypatch.setattr("ledger.service.doctor.ANSWER_LIMIT_S", 0.2)
    with pytest.raises(typer.Exit) as ended:
        doctor(strict=False, url=silent_server, as_json=False)
    assert ended.value.exit_code == 1
    assert b"reachability: no answer within 0.2 s" in capfdbinary.readouterr().out


def test_the_probe_neither_starts_nor_waits_for_an_embedded_server(embedded_dir):
    """One that is stopped is unhealthy when the time is up; one that is not there stays so."""
    url = f"embedded://{embedded_dir}"
    assert "does not run" in run(url, "health").out
    assert not embedded_dir.exists()
    with EmbeddedServer.acquire(embedded_dir):
        assert run(url, "health").out == "ok: decisions can be recorded\n"
        pid = is_running(embedded_dir).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            told = [run(url, "health", "--timeout", "0.3")]
            with pytest.raises(errors.ServerUnreachable, match=r"within 0\.1 s"):
                asyncio.run(reach(load_settings(redis_url=url), 0.1))
        finally:
            os.kill(pid, signal.SIGCONT)
    assert told[0].code == 1
    assert "within 0.3 s" in told[0].out


@pytest.fixture
def silent_server():
    """The URL of a port where nobody ever answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}"


async def test_looking_changes_nothing(fresh_server, server):
    """The doctor leaves an attestation and no other key, and no key it finds is changed."""
    own = fresh_server(server.kind)
    await folded_tenant(own)
    before = contents(own)
    async with Ledger.connect(own.url) as ledger:
        await look(ledger)
    after = contents(own)
    assert {key: after[key] for key in before} == before
    (new,) = set(after) - set(before)
    assert new.startswith(b"claude-flow:ledger:_:attestation:")


def contents(server: Server) -> dict[bytes, bytes]:
    with server.client() as client:
        return {key: client.dump(key) for key in client.scan_iter()}
