"""The memory service keeps what the operations guide promises, on real servers."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ledger import Decision, Ledger, errors, keys, load_settings, sync
from ledger.memory import (
    MAX_TTL_SECONDS,
    MAX_VALUE_BYTES,
    MemoryService,
    get_memory_service,
    reset_memory_service,
)
from projections import Projector, StateReader
from tests.proxy import Proxy
from tests.servers import KINDS, REQUIRE_ALL, spawn, stop
from tests.test_server import as_user, recipe

NODE = Path(__file__).parent / "node"


def service(url, **more):
    return MemoryService(load_settings(redis_url=url, **more))


@pytest.fixture
async def memory(server):
    async with service(server.url) as opened:
        yield opened


def stored(server, key):
    with server.client() as client:
        return client.get(f"claude-flow:memory:{key}")


# -- one value ------------------------------------------------------------------------------------


async def test_a_value_is_stored_in_the_guides_envelope(memory, server, tenant):
    """The string is value, createdAt, updatedAt, metadata in this order, times as JavaScript's."""
    await memory.set(f"{tenant}:a", {"data": "välue"}, metadata={"by": "test"})
    raw = stored(server, f"{tenant}:a")
    envelope = json.loads(raw)
    assert list(envelope) == ["value", "createdAt", "updatedAt", "metadata"]
    assert envelope["value"] == {"data": "välue"}
    assert envelope["metadata"] == {"by": "test"}
    for name in ("createdAt", "updatedAt"):
        moment = datetime.strptime(envelope[name], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
        assert len(envelope[name]) == len("2026-03-03T12:00:00.123Z")
        assert abs(moment - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize("metadata", [None, {"plain": 1}, {"nested": {"braces": "}{"}}])
async def test_created_at_survives_an_update(memory, server, tenant, metadata):
    """An update keeps createdAt, whatever the metadata looks like, and moves updatedAt."""
    key = f"{tenant}:a"
    await memory.set(key, 1, metadata=metadata)
    first = await memory.get_entry(key)
    await asyncio.sleep(0.002)  # the clock has milliseconds
    await memory.set(key, {"createdAt": "2001-01-01T00:00:00.000Z"}, metadata=metadata)
    second = await memory.get_entry(key)
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at
    assert second.metadata == (metadata or {})


@pytest.mark.parametrize(
    "envelope",
    [
        {"value": 1, "createdAt": "2020-02-02T02:02:02.002Z", "updatedAt": "x"},
        {"createdAt": "2020-02-02T02:02:02.002Z", "updatedAt": "x", "value": {"metadata": {}}},
        {"value": 1, "createdAt": "2020-02-02T02:02:02.002Z", "updatedAt": "x", "metadata": None},
    ],
)
async def test_created_at_of_another_client_survives(memory, server, tenant, envelope):
    """An entry in another order, or without metadata, keeps its createdAt too."""
    with server.client() as client:
        client.set(f"claude-flow:memory:{tenant}:a", json.dumps(envelope))
    await memory.set(f"{tenant}:a", 2)
    entry = await memory.get_entry(f"{tenant}:a")
    assert entry.created_at == datetime(2020, 2, 2, 2, 2, 2, 2000, tzinfo=UTC)


@pytest.mark.parametrize(
    "raw", [b"no json", b'{"createdAt":"x\\","a":"b"}', b"[1]", b'{"createdAt":7}']
)
async def test_what_is_no_envelope_is_replaced_whole(memory, server, tenant, raw):
    """Nothing that lies under a key can break the envelope that a set writes over it."""
    with server.client() as client:
        client.set(f"claude-flow:memory:{tenant}:a", raw)
    with pytest.raises(errors.MalformedValue, match="envelope"):
        await memory.get(f"{tenant}:a")
    await memory.set(f"{tenant}:a", "new")
    assert await memory.get(f"{tenant}:a") == "new"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_any_json_comes_back_and_keeps_its_creation(valkey, tenant):
    """Any JSON value and metadata come back, and createdAt stays."""
    with sync.Ledger.connect(valkey.url) as ledger:
        memory = ledger.memory

        @given(JSON_VALUES, st.dictionaries(st.text(), JSON_VALUES, max_size=3))
        @settings(max_examples=60)
        def round_trip(value, metadata):
            memory.set(f"{tenant}:any", value, metadata=metadata)
            entry = memory.get_entry(f"{tenant}:any")
            assert (entry.value, entry.metadata) == (value, metadata)
            created.add(entry.created_at)

        created: set[datetime] = set()
        round_trip()
    assert len(created) == 1


async def test_ttl_rule(memory, tenant):
    """No TTL given = 24 hours, a caller's own counts, 0 = none; expire follows the same rule."""
    for ttl, wanted in ((None, 86_400), (3600, 3600), (0, None)):
        await memory.set(f"{tenant}:a", 1, ttl)
        assert (await memory.get_entry(f"{tenant}:a")).ttl_seconds == wanted
    assert await memory.expire(f"{tenant}:a", 60)
    assert (await memory.get_entry(f"{tenant}:a")).ttl_seconds == 60
    assert await memory.expire(f"{tenant}:a", 0)
    assert (await memory.get_entry(f"{tenant}:a")).ttl_seconds is None
    assert await memory.expire(f"{tenant}:a", 0)
    assert not await memory.expire(f"{tenant}:b", 0)
    assert not await memory.expire(f"{tenant}:b", 60)


async def test_default_ttl_is_the_setting(valkey, tenant, monkeypatch):
    """MEMORY_DEFAULT_TTL_SECONDS decides where a caller does not."""
    monkeypatch.setenv("MEMORY_DEFAULT_TTL_SECONDS", "77")
    async with service(valkey.url) as memory:
        await memory.set(f"{tenant}:a", 1)
        assert (await memory.get_entry(f"{tenant}:a")).ttl_seconds == 77


async def test_delete_and_exists(memory, tenant):
    """Delete says whether there was something."""
    assert not await memory.exists(f"{tenant}:a")
    assert await memory.get(f"{tenant}:a") is None
    assert not await memory.delete(f"{tenant}:a")
    await memory.set(f"{tenant}:a", None)
    assert await memory.exists(f"{tenant}:a")
    assert (await memory.get_entry(f"{tenant}:a")).value is None
    assert await memory.delete(f"{tenant}:a")
    assert not await memory.exists(f"{tenant}:a")


class Session(BaseModel):
    """A model of a caller."""

    step: int
    since: datetime


async def test_a_model_goes_in_and_comes_out(memory, tenant):
    """A model is stored as its JSON, and get(key, Model) makes it again, or names what is wrong."""
    session = Session(step=3, since=datetime(2026, 3, 3, tzinfo=UTC))
    await memory.set(f"{tenant}:s", session)
    assert await memory.get(f"{tenant}:s", Session) == session
    assert await memory.get(f"{tenant}:none", Session) is None
    await memory.set(f"{tenant}:s", {"step": "three", "since": "2026-03-03T00:00:00Z"})
    with pytest.raises(errors.MalformedValue, match=r"step: .*integer"):
        await memory.get(f"{tenant}:s", Session)


@dataclass
class Reading:
    """What orjson writes by itself, a NaN in it as null."""

    value: float | None
    more: object = None


class Unknown(Enum):
    """Written by its value."""

    X = math.nan


class Readings(BaseModel):
    """Containers that a model writes as lists."""

    ones: set[float] = set()
    latest: deque[float] = deque()
    other: object = None


async def test_null_is_stored_wherever_it_stands(memory, tenant):
    """None in a dataclass or model is a value like any other."""
    for value in (Reading(None, [None]), Readings(ones={1.5}, latest=deque([2.5]))):
        await memory.set(f"{tenant}:a", value)
        assert await memory.get(f"{tenant}:a", type(value)) == value


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m.set("k", float("nan")), "NaN"),
        (lambda m: m.set("k", {"a": [None, float("inf")]}), "NaN"),
        (lambda m: m.set("k", Reading(math.nan)), "NaN"),
        (lambda m: m.set("k", [{"a": Reading(None, {"b": Reading(math.inf)})}]), "NaN"),
        (lambda m: m.set("k", Unknown.X), "NaN"),
        (lambda m: m.set("k", Readings(ones={math.nan})), "NaN"),
        (lambda m: m.set("k", Readings(latest=deque([-math.inf]))), "NaN"),
        (lambda m: m.set("k", Readings(other=Reading(math.nan))), "NaN"),
        (lambda m: m.set("k", b"bytes"), "value"),
        (lambda m: m.set("k", {1: 2}), "value"),
        (lambda m: m.set("k", "\ud800"), "value"),
        (lambda m: m.set("k", "x" * MAX_VALUE_BYTES), str(MAX_VALUE_BYTES)),
        (lambda m: m.set("k", 1, metadata={"a": object()}), "metadata"),
        (lambda m: m.set("k", 1, metadata=[1]), "metadata: [1] is no dict"),
        (lambda m: m.set("k", 1, metadata=[]), "metadata"),
        (lambda m: m.set("k", 1, metadata="x"), "metadata"),
        (lambda m: m.set("k", 1, -1), "ttl_seconds"),
        (lambda m: m.set("k", 1, 1.5), "ttl_seconds"),
        (lambda m: m.set("k", 1, True), "ttl_seconds"),
        (lambda m: m.set("k", 1, MAX_TTL_SECONDS + 1), "ttl_seconds"),
        (lambda m: m.expire("k", -1), "ttl_seconds"),
        (lambda m: m.set("", 1), "key"),
        (lambda m: m.set("k" * 1025, 1), "1024"),
        (lambda m: m.get(7), "key"),
        (lambda m: m.get("\ud800"), "key"),
        (lambda m: m.delete("claude-flow:ledger:{t}:governance:decisions"), "relative"),
        (lambda m: m.delete("claude-flow:memory:t:governance:state"), "relative"),
        (lambda m: m.cleanup(""), "pattern"),
        (lambda m: m.cleanup(None), "pattern"),
        (lambda m: m.cleanup("claude-flow:ledger:*"), "cannot leave"),
        (lambda m: m.cleanup("*" * 513), "512"),
        (lambda m: m.keys(""), "pattern"),
    ],
)
async def test_bad_input_is_named(valkey, call, named):
    """What cannot be stored or asked for is refused by field, limit and remedy."""
    async with service(valkey.url) as memory:
        with pytest.raises(errors.InvalidInput) as caught:
            await call(memory)
    assert named in str(caught.value)
    assert caught.value.hint


async def test_two_writers_of_a_new_key_agree_on_its_creation(memory, server, tenant):
    """However many set a key at once, createdAt is one of theirs and stays."""
    async with service(server.url) as other:
        writers = [one.set(f"{tenant}:a", n) for n, one in enumerate([memory, other] * 20)]
        await asyncio.gather(*writers)
        created = (await memory.get_entry(f"{tenant}:a")).created_at
        await other.set(f"{tenant}:a", "last")
    assert (await memory.get_entry(f"{tenant}:a")).created_at == created


# -- many keys ------------------------------------------------------------------------------------


async def test_keys_are_relative_and_matched(memory, tenant):
    """keys() gives what matches the glob, without the prefix."""
    for name in ("session:1", "session:2", "agent:1"):
        await memory.set(f"{tenant}:{name}", 1)
    assert await memory.keys(f"{tenant}:session:*") == [
        f"{tenant}:session:1",
        f"{tenant}:session:2",
    ]
    assert len(await memory.keys(f"{tenant}:*")) == 3
    assert await memory.keys(f"{tenant}:other:*") == []


async def test_cleanup_counts_keys_and_bytes(memory, server, tenant):
    """Cleanup deletes what matches, says how many and how many bytes; a dry run deletes nothing."""
    for n in range(1200):  # more than two pages of SCAN
        await memory.set(f"{tenant}:stale:{n}", "x" * 100)
    await memory.set(f"{tenant}:kept", 1)
    would = await memory.cleanup(f"{tenant}:stale:*", dry_run=True)
    assert len(await memory.keys(f"{tenant}:*")) == 1201
    done = await memory.cleanup(f"{tenant}:stale:*")
    assert (would, done) == (1200, 1200)
    assert would.bytes_freed == done.bytes_freed
    assert 1200 * 200 < done.bytes_freed < 1200 * 1000
    assert await memory.keys(f"{tenant}:*") == [f"{tenant}:kept"]
    assert await memory.cleanup(f"{tenant}:stale:*") == 0


@pytest.mark.parametrize(
    "pattern", ["*", "**", "?*", "../ledger:*", "*ledger*", "[a-z]*", "\\*", "*}*", "*governance*"]
)
async def test_cleanup_never_reaches_the_ledger(fresh_server, tenant, pattern):
    """No pattern deletes a claude-flow:ledger: key, and deleted state is published anew."""
    server = fresh_server("valkey9")
    async with Ledger.connect(server.url) as ledger:
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))
        projector = Projector(ledger)
        await projector.run_once([tenant])
        before = set(server.cli("KEYS", "claude-flow:ledger:*"))
        await ledger.memory.cleanup(pattern)
        assert set(server.cli("KEYS", "claude-flow:ledger:*")) == before
        await projector.run_once([tenant])
        assert (await StateReader(ledger).state(tenant)).value["decisions"]["total"] == 1


async def test_keys_are_complete_across_a_failover(fresh_server, tenant):
    """A SCAN that goes on at another server begins anew there: its cursor means nothing to it."""
    first, second = fresh_server(), fresh_server()
    for server in (first, second):
        with server.client() as client, client.pipeline(transaction=False) as pipeline:
            for n in range(3000):
                pipeline.set(f"claude-flow:memory:{tenant}:{n}", "{}")
            pipeline.execute()
    async with Proxy(first) as proxy, service(proxy.url) as memory:
        proxy.takes_over = second
        found = set()
        async with aclosing(memory._server.scan(f"claude-flow:memory:{tenant}:*")) as pages:
            async for page in pages:
                found.update(page)
                if not proxy.lost.is_set():
                    proxy.lose_reply_to = b"SCAN"
        assert proxy.lost.is_set()
        assert len(found) == 3000


async def test_cluster_keys_and_cleanup_reach_every_node(cluster, tenant):
    """In a cluster SCAN goes to each primary, and UNLINK to the key's own."""
    async with service(cluster.url) as memory:
        for n in range(30):
            await memory.set(f"{tenant}:{n}", n)
        assert len(await memory.keys(f"{tenant}:*")) == 30
        assert await memory.cleanup(f"{tenant}:*") == 30
        assert await memory.keys(f"{tenant}:*") == []


# -- life -----------------------------------------------------------------------------------------


async def test_not_initialized_is_the_guides_error(valkey):
    """Before initialize and after disconnect every call says so, in the guide's words."""
    memory = service(valkey.url)
    calls = [
        lambda: memory.set("k", 1),
        lambda: memory.get("k"),
        lambda: memory.delete("k"),
        lambda: memory.exists("k"),
        lambda: memory.expire("k", 1),
        memory.keys,
        lambda: memory.cleanup("k"),
    ]
    for _ in range(2):
        assert not memory.is_initialized
        for call in calls:
            with pytest.raises(errors.NotInitialized, match="Redis client not initialized"):
                await call()
        await memory.initialize()
        await memory.initialize()
        assert memory.is_initialized
        assert not await memory.exists("no-such-key")
        await memory.disconnect()
        await memory.disconnect()


async def test_one_service_a_process(valkey, monkeypatch):
    """get_memory_service gives the same one until it is reset, and refuses other settings."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    memory = get_memory_service()
    try:
        assert get_memory_service() is memory
        assert get_memory_service(redis_url=valkey.url) is memory
        with pytest.raises(errors.InvalidSetting, match="other settings"):
            get_memory_service(memory_default_ttl_seconds=5)
        with pytest.raises(errors.InvalidSetting, match="redis_ulr"):
            get_memory_service(redis_ulr=valkey.url)
        await memory.initialize()
    finally:
        await reset_memory_service()
    assert not memory.is_initialized
    assert get_memory_service(memory_default_ttl_seconds=5).settings.memory_default_ttl_seconds == 5
    await reset_memory_service()


async def test_a_lost_answer_is_asked_for_again(valkey, tenant):
    """A set whose answer was lost is sent again and lands."""
    async with Proxy(valkey) as proxy, service(proxy.url) as memory:
        await memory.set(f"{tenant}:a", 1)
        proxy.lose_reply_to = b"govledger_memory_set"
        await memory.set(f"{tenant}:a", 2)
        assert proxy.lost.is_set()
        assert await memory.get(f"{tenant}:a") == 2


async def test_a_write_while_the_server_is_away_is_an_error_or_lands(fresh_server, tenant):
    """A set fails when its attempts run out, and with patience lands after a restart."""
    server = fresh_server()
    async with (
        service(server.url, memory_max_reconnect_attempts=1) as hasty,
        service(server.url, memory_max_reconnect_attempts=1000) as patient,
    ):
        await hasty.set(f"{tenant}:a", 1)
        await patient.set(f"{tenant}:b", 1)
        server.kill()
        with pytest.raises(errors.ServerUnreachable) as caught:
            await hasty.set(f"{tenant}:a", 2)
        assert caught.value.facts["attempts"] == 2
        waiting = asyncio.create_task(patient.set(f"{tenant}:b", 2))
        await asyncio.to_thread(server.restart)
        await waiting
        assert (await hasty.get(f"{tenant}:a"), await patient.get(f"{tenant}:b")) == (1, 2)


async def test_ledger_has_the_memory_on_its_own_connections(valkey, tenant):
    """ledger.memory needs no initialize, and its disconnect leaves the ledger alone."""
    async with Ledger.connect(valkey.url) as ledger:
        await ledger.memory.set(keys.session_key(tenant, "s/1"), 1)
        assert await ledger.memory.keys(f"{tenant}:*") == [f"{tenant}:session:s%2F1"]
        await ledger.memory.disconnect()
        with pytest.raises(errors.NotInitialized):
            await ledger.memory.keys()
        async with ledger.memory as again:  # on a connection of its own
            assert await again.exists(keys.session_key(tenant, "s/1"))
        await ledger.append(tenant, Decision(agent="a", action="b", verdict="allow"))


def test_synchronous_memory(valkey, tenant):
    """sync.Ledger has the same calls without await."""
    with sync.Ledger.connect(valkey.url) as ledger:
        memory, key = ledger.memory, keys.cache_key(tenant, "x")
        memory.set(key, {"step": 1, "since": "2026-03-03T00:00:00Z"}, 60)
        assert memory.get(key)["step"] == 1
        assert memory.get(key, Session).step == 1
        assert memory.exists(key)
        assert memory.expire(key, 0)
        assert memory.get_entry(key).ttl_seconds is None
        assert memory.keys(f"{tenant}:*") == [key]
        assert memory.cleanup(f"{tenant}:*", dry_run=True) == 1
        assert memory.delete(key)


def test_key_helpers_build_the_guides_keys(tenant):
    """Relative and full keys of state and agents agree, and two ids never share a key."""
    assert keys.memory_key(keys.state_key("acgs-dev")) == keys.governance_state("acgs-dev")
    assert keys.memory_key(keys.agent_key("acgs-dev", "a:b")) == keys.agent_state("acgs-dev", "a:b")
    assert (
        keys.memory_key(keys.agent_key("acgs-dev", "agent-123"))
        == "claude-flow:memory:acgs-dev:agent:agent-123"
    )
    assert keys.swarm_key("acgs-dev", "swarm-456") == "acgs-dev:swarm:swarm-456"
    with pytest.raises(errors.InvalidTenant):
        keys.session_key("a:b", "c")


@pytest.mark.parametrize("kind", KINDS)
async def test_memory_recipe_reaches_its_tenant_alone(fresh_server, kind, tenant):
    """README's memory client sets, reads and deletes under its tenant, and nowhere else."""
    server = fresh_server(kind)
    async with Ledger.connect(server.url) as operator:
        await operator.server.load_library()
    url = as_user(server, "memory", recipe("memory client", tenant))
    async with service(url) as memory:
        await memory.set(f"{tenant}:a", 1)
        assert await memory.get(f"{tenant}:a") == 1
        assert await memory.expire(f"{tenant}:a", 0)
        assert await memory.exists(f"{tenant}:a")
        assert await memory.delete(f"{tenant}:a")
        with pytest.raises(errors.PermissionDenied):
            await memory.set("other:a", 1)
        with pytest.raises(errors.PermissionDenied):
            await memory.cleanup("*")
        server.cli("ACL", "SETUSER", "memory", "+scan", "+memory|usage")
        assert await memory.cleanup(f"{tenant}:*") == 0


async def test_disconnect_waits_for_calls_under_way(valkey, tenant):
    """What was asked before disconnect is answered, what comes after is refused."""
    async with Proxy(valkey) as proxy:
        memory = service(proxy.url)
        await memory.initialize()
        await memory.set(f"{tenant}:a", 0)
        calls = [asyncio.create_task(memory.set(f"{tenant}:{n}", n)) for n in range(10)]
        await asyncio.sleep(0)  # they have begun
        await memory.disconnect()
        assert all(call.done() for call in calls)
        await asyncio.gather(*calls)
        with pytest.raises(errors.NotInitialized):
            await memory.get(f"{tenant}:a")
    async with service(valkey.url) as memory:
        assert [await memory.get(f"{tenant}:{n}") for n in range(10)] == list(range(10))


def test_a_service_of_another_event_loop_is_not_initialized(valkey, tenant):
    """The process's service says so in a second event loop, and can be initialized there."""
    memory = service(valkey.url)

    async def first():
        await memory.initialize()
        await memory.set(f"{tenant}:a", 1)
        kept.append(memory._server)

    async def second():
        with pytest.raises(errors.NotInitialized, match="event loop"):
            await memory.get(f"{tenant}:a")
        await memory.initialize()
        assert await memory.get(f"{tenant}:a") == 1
        await memory.disconnect()

    kept = []
    with asyncio.Runner() as runner:
        runner.run(first())
        with asyncio.Runner() as other:
            other.run(second())
        runner.run(kept[0].aclose())


# -- TLS ------------------------------------------------------------------------------------------


async def test_tls_is_verified_unless_the_url_says_otherwise(
    fresh_server, certificates, caplog, tenant
):
    """rediss:// refuses an unknown CA, takes one's own, and turning the check off is warned of."""
    server = fresh_server("redis7", tls=certificates)
    bare = f"rediss://127.0.0.1:{server.port}"
    with pytest.raises(errors.TlsFailed):
        await service(bare, memory_max_reconnect_attempts=0).initialize()
    async with service(server.url) as memory:
        await memory.set(f"{tenant}:a", 1)
    assert caplog.text == ""
    async with service(f"{bare}?ssl_cert_reqs=none") as memory:
        assert await memory.get(f"{tenant}:a") == 1
    assert "certificate" in caplog.text


# -- the guide's own client -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_client(tmp_path_factory):
    """A function that starts the npm package `redis` on a URL; skips where it cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        _unavailable("no node and npm on this machine")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(NODE, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = [npm, "ci", "--prefer-offline", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        _unavailable(f"npm cannot install the package redis: {done.stderr[-500:]}")
    return lambda url: spawn(
        [node, folder / "memory.mjs", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _unavailable(reason):
    if os.environ.get(REQUIRE_ALL):
        pytest.fail(f"{reason}, and {REQUIRE_ALL} is set", pytrace=False)
    pytest.skip(reason)


async def test_the_guides_client_and_we_read_each_other(node_client, valkey, tenant):
    """Npm's redis reads what we wrote, we what it wrote, and it reads the projector's state."""
    process = node_client(valkey.url)

    def ask(**command):
        process.stdin.write(json.dumps(command).encode() + b"\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        async with Ledger.connect(valkey.url) as ledger:
            memory = ledger.memory
            await memory.set(f"{tenant}:ours", {"text": "å∂", "n": [1, 2.5, None, True]}, 60)
            seen = ask(command="get", key=f"{tenant}:ours")
            entry = await memory.get_entry(f"{tenant}:ours")
            assert seen["value"] == entry.value
            assert datetime.fromisoformat(seen["createdAt"]) == entry.created_at
            written = ask(command="set", key=f"{tenant}:theirs", value={"text": "å∂"}, ttl=60)
            entry = await memory.get_entry(f"{tenant}:theirs")
            assert entry.value == {"text": "å∂"}
            assert entry.created_at == datetime.fromisoformat(written)
            assert 0 < entry.ttl_seconds <= 60
            await memory.set(f"{tenant}:theirs", 2)
            assert ask(command="get", key=f"{tenant}:theirs")["createdAt"] == written
            await ledger.append(tenant, Decision(agent="a", action="b", verdict="deny"))
            await Projector(ledger).run_once([tenant])
            state = ask(command="get", key=keys.state_key(tenant))
            assert state["value"]["decisions"]["by_verdict"]["deny"] == 1
            assert state["metadata"]["seq"] == 1
            assert set(ask(command="keys", pattern=f"{tenant}:*")) == {
                f"claude-flow:memory:{tenant}:{name}"
                for name in ("ours", "theirs", "governance:state", "agents:state", "agent:a")
            }
    finally:
        stop(process)
