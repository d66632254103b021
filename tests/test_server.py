"""What a ledger meets on the way to a server: each fault by its name, each recovery unnoticed."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from ledger import Decision, Durability, Ledger, Settings, append, connect, errors, keys, sync
from ledger.connect import shown_address
from ledger.server import LIBRARY_VERSION, Server, library_source
from tests.servers import KINDS, Certificates, new_tenant, wait_until

README = (Path(__file__).parent.parent / "README.md").read_text()
SECRET = "correct-horse-battery"
ATTEMPTS = "MEMORY_MAX_RECONNECT_ATTEMPTS"


def decision(number, agent="a"):
    return Decision(
        id=f"d-{number}", at="2026-01-01T00:00:00Z", agent=agent, action="b", verdict="allow"
    )


def settings(url, attempts=0, **given):
    return Settings(redis_url=url, memory_max_reconnect_attempts=attempts, **given)


def impatient(url, attempts=0, **given):
    """A ledger that tries again `attempts` times only."""
    return Ledger.connect(settings=settings(url, attempts, **given))


async def ids(ledger, tenant):
    return [entry.id async for entry in ledger.replay(tenant)]


async def seqs(ledger, tenant):
    return [entry.seq async for entry in ledger.replay(tenant)]


def client_connections(server):
    """How many connections are open to it, the asking one left out."""
    return len(server.cli("CLIENT", "LIST", "TYPE", "normal").splitlines()) - 1


# --- nobody there -------------------------------------------------------------------------------


async def test_missing_server_is_unreachable_with_address_and_hint(fresh_server):
    """Where nobody listens the error names the address and says what to look at."""
    server = fresh_server()
    server.kill()
    with pytest.raises(errors.ServerUnreachable, match=re.escape(server.url)) as caught:
        await impatient(server.url)
    assert "REDIS_URL" in caught.value.hint


@pytest.mark.parametrize("attempts", [0, 1, 3])
async def test_setting_bounds_the_attempts(monkeypatch, attempts):
    """MEMORY_MAX_RECONNECT_ATTEMPTS = n makes n + 1 connections and no more, and says so."""
    accepted = []

    def hang_up(_, writer):
        accepted.append(writer)
        writer.close()

    monkeypatch.setenv(ATTEMPTS, str(attempts))
    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(errors.ServerUnreachable) as caught:
            await Ledger.connect(f"redis://127.0.0.1:{port}")
    assert caught.value.facts["attempts"] == attempts + 1 == len(accepted)


async def test_server_that_dies_under_a_ledger_is_unreachable_then_back(fresh_server, tenant):
    """An open ledger says that the server is gone, and appends again once it is back."""
    server = fresh_server()
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision(1))
        server.kill()
        with pytest.raises(errors.ServerUnreachable):
            await ledger.append(tenant, decision(2))
        server.restart()
        receipt = await ledger.append(tenant, decision(2))
        assert (receipt.seq, receipt.duplicate) == (2, False)


# --- who are you --------------------------------------------------------------------------------


def assert_hides(error, *secrets):
    shown = f"{error!s} {error!r} {error.hint} {error.facts}"
    cause = error
    while cause is not None:
        shown += f"{cause!s} {cause!r}"
        cause = cause.__cause__ or cause.__context__
    assert not [secret for secret in secrets if secret in shown]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offered", [None, "wrong-pony"])
async def test_wrong_or_no_password_is_named_and_not_shown(fresh_server, kind, offered):
    """NOAUTH and WRONGPASS are AuthenticationFailed at the first attempt, without any password."""
    server = fresh_server(kind, password=SECRET)
    secret = f":{offered}@" if offered else ""
    url = f"redis://{secret}127.0.0.1:{server.port}"
    with pytest.raises(errors.AuthenticationFailed) as caught:
        await impatient(url, 3)
    assert "REDIS_PASSWORD" in caught.value.hint
    assert_hides(caught.value, SECRET, "wrong-pony")


async def test_password_from_the_environment_where_the_url_has_none(
    fresh_server, tenant, monkeypatch
):
    """REDIS_PASSWORD lets in, and the URL's own password goes before it."""
    server = fresh_server(password=SECRET)
    monkeypatch.setenv("REDIS_PASSWORD", SECRET)
    async with Ledger.connect(f"redis://127.0.0.1:{server.port}") as ledger:
        assert (await ledger.append(tenant, decision(1))).seq == 1
        assert SECRET not in repr(ledger.server.settings) + ledger.server.address
    monkeypatch.setenv("REDIS_PASSWORD", "wrong-pony")
    async with Ledger.connect(server.url) as ledger:
        assert await ids(ledger, tenant) == ["d-1"]


BAD_URLS = [
    "http://localhost:6379",
    "localhost:6379",
    "redis://localhost:99999",
    "redis://localhost:port",
    "redis://localhost:6379/0?no_such_option=1",
    "redis://localhost:6379/0?socket_timeout=soon",
    f"redis://:{SECRET}/@localhost:6379",
    f"redis://:{SECRET}#@localhost:6379",
    f"redis+sentinel://:{SECRET}?@localhost:26379/ledger",
    "embedded://relative/path",
    "embedded:///",
    "redis://[::1",
]


@pytest.mark.parametrize("url", BAD_URLS)
async def test_unusable_url_is_an_invalid_setting(url):
    """A URL that cannot be used is refused by name before anything is connected."""
    with pytest.raises(errors.InvalidSetting, match="REDIS_URL") as caught:
        await impatient(url)
    assert caught.value.hint
    assert_hides(caught.value, SECRET)


@pytest.mark.parametrize("value", ["-1", "1001", "many"])
async def test_attempts_out_of_range_are_an_invalid_setting(monkeypatch, value):
    """A number of attempts that is none, or out of range, names the variable."""
    monkeypatch.setenv(ATTEMPTS, value)
    with pytest.raises(errors.InvalidSetting, match=ATTEMPTS):
        Ledger.connect()


def test_shown_address_has_neither_password_nor_query():
    """What messages show of a URL has no user, password or query."""
    url = f"rediss://user:{SECRET}@h:6380/0?ssl_ca_certs=/x"
    assert shown_address(url) == "rediss://h:6380/0"


# --- TLS ----------------------------------------------------------------------------------------


async def test_tls_with_our_ca_works(fresh_server, certificates, tenant):
    """rediss:// with ?ssl_ca_certs appends and replays."""
    server = fresh_server("redis7", tls=certificates)
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision(1))
        assert await ids(ledger, tenant) == ["d-1"]


async def test_tls_with_another_ca_fails(fresh_server, certificates, tmp_path):
    """A certificate that the given CA has not signed is TlsFailed."""
    server = fresh_server("redis7", tls=certificates)
    other = Certificates.create(tmp_path / "other")
    with pytest.raises(errors.TlsFailed, match="CERTIFICATE_VERIFY_FAILED"):
        await impatient(f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={other.ca}")


async def test_tls_for_another_host_fails(fresh_server, tmp_path):
    """A certificate of another host is TlsFailed, though the CA is right."""
    other = Certificates.create(tmp_path / "other", host="other", address="127.0.0.9")
    program = fresh_server("redis7", tls=Certificates.create(tmp_path / "own"))
    program.stop()
    conf = {"tls-cert-file": str(other.certificate), "tls-key-file": str(other.key)}
    program._config |= conf
    program._spawn()
    wait_until(lambda: "Ready to accept connections" in program.log_tail, "the server is up")
    with pytest.raises(errors.TlsFailed, match=r"127\.0\.0\.1"):
        await impatient(f"rediss://127.0.0.1:{program.port}?ssl_ca_certs={other.ca}")


async def test_tls_client_at_a_plain_port_fails_with_a_hint(valkey, monkeypatch):
    """rediss:// to a server without TLS, which waits for the end of a line, says redis://."""
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT_S", 0.3)
    with pytest.raises(errors.TlsFailed, match="TLS handshake") as caught:
        await impatient(f"rediss://127.0.0.1:{valkey.port}")
    assert "redis:// is for a plain one" in caught.value.hint


async def test_plain_client_at_a_tls_port_fails_with_a_hint(fresh_server, certificates):
    """redis:// to a TLS port says rediss://."""
    server = fresh_server("redis7", tls=certificates)
    with pytest.raises(errors.Unavailable, match="rediss://"):
        await impatient(f"redis://127.0.0.1:{server.port}")


# --- servers that take no writes ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_replica_takes_no_writes_and_gives_reads(fresh_server, kind, tenant):
    """An append to a replica is ReadOnlyReplica, a replay from it works."""
    primary = fresh_server(kind)
    async with impatient(primary.url) as ledger:
        await ledger.append(tenant, decision(1))
    replica = fresh_server(kind, config={"replicaof": f"127.0.0.1 {primary.port}"})
    replica.wait_for_replica_link()
    async with impatient(replica.url) as ledger:
        with pytest.raises(errors.ReadOnlyReplica, match="primary"):
            await ledger.append(tenant, decision(2))
        assert await ids(ledger, tenant) == ["d-1"]


async def test_empty_replica_takes_no_library_either(fresh_server, tenant):
    """Where the library is missing too, a replica still is ReadOnlyReplica."""
    primary = fresh_server()
    replica = fresh_server(config={"replicaof": f"127.0.0.1 {primary.port}"})
    replica.wait_for_replica_link()
    async with impatient(replica.url) as ledger:
        with pytest.raises(errors.ReadOnlyReplica):
            await ledger.append(tenant, decision(1))


@pytest.mark.parametrize("kind", KINDS)
async def test_full_memory_refuses_appends_and_gives_reads(fresh_server, kind, tenant):
    """At maxmemory an append is OutOfMemory and leaves nothing, and reads go on."""
    server = fresh_server(kind, config={"maxmemory-policy": "noeviction"})
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision(1))
        server.cli("CONFIG", "SET", "maxmemory", "1mb")
        server.cli("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(errors.OutOfMemory, match="maxmemory"):
            await ledger.append(tenant, decision(2))
        assert await ids(ledger, tenant) == ["d-1"]
        server.cli("CONFIG", "SET", "maxmemory", "0")
        receipt = await ledger.append(tenant, decision(2))
        assert (receipt.seq, receipt.duplicate) == (2, False)


@pytest.mark.parametrize("kind", ["valkey9", "redis7"])
async def test_loading_is_named_and_waited_for(fresh_server, kind, tenant):
    """While a server reads its data set one attempt is ServerLoading, and patience gets through."""
    server = fresh_server(kind)
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision(1))
    with server.client() as client, client.pipeline(transaction=False) as pipeline:
        for _ in range(8_000):
            pipeline.incr("counter")
        pipeline.execute()
    server.kill()
    # It answers once in 1,024 commands of its file: 8 times, in about a second.
    server._config["key-load-delay"] = "50"
    server._spawn()
    wait_until(lambda: listening(server), "it listens")
    async with impatient(server.url) as ledger:
        with pytest.raises(errors.ServerLoading):
            await ledger.append(tenant, decision(2))
    async with impatient(server.url, 1000) as ledger:
        assert (await ledger.append(tenant, decision(2))).seq == 2


def listening(server):
    """Whether it accepts connections; a loading server does."""
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
async def test_failed_snapshot_is_server_busy(fresh_server, kind, tenant, tmp_path):
    """MISCONF after a failed BGSAVE is ServerBusy with the reason, and a good one ends it."""
    config = {"save": "3600 1", "enable-protected-configs": "local", "appendonly": "no"}
    server = fresh_server(kind, config=config)
    gone = tmp_path / "gone"
    gone.mkdir()
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision(1))
        server.cli("CONFIG", "SET", "dir", str(gone))
        gone.rmdir()
        snapshot(server, "err")
        with pytest.raises(errors.ServerBusy, match="MISCONF"):
            await ledger.append(tenant, decision(2))
        assert await ids(ledger, tenant) == ["d-1"]
        server.cli("CONFIG", "SET", "dir", str(server.directory))
        snapshot(server, "ok")
        assert (await ledger.append(tenant, decision(2))).seq == 2


def snapshot(server, expected):
    with contextlib.suppress(Exception):
        server.cli("BGSAVE")
    wait_until(
        lambda: server.cli("INFO", "persistence").get("rdb_last_bgsave_status") == expected,
        f"BGSAVE: {expected}",
    )


# --- access control -----------------------------------------------------------------------------


def recipe(who, tenant):
    """The rules that README's Access control gives `who`, for this tenant."""
    section = README.split("## Access control")[1].split("\n## ")[0]
    begins = re.search(r"each begins `([^`]+)`", section).group(1)
    item = section.split(f"- {who}: ")[1].split("\n- ")[0]
    rules = re.match(r"`([^`]+)`", item).group(1)
    own = f"{begins} {rules}".replace("acgs-dev", tenant).replace(">password", f">{SECRET}")
    return own.split()


def as_user(server, name, rules):
    server.cli("ACL", "SETUSER", name, *rules)
    return f"redis://{name}:{SECRET}@127.0.0.1:{server.port}"


@pytest.mark.parametrize("kind", KINDS)
async def test_engine_recipe_appends_to_its_tenant_alone(fresh_server, kind, tenant):
    """README's engine appends to a tenant that an operator began, and to no other."""
    server, other = fresh_server(kind), new_tenant()
    async with impatient(server.url) as operator:
        await operator.append(tenant, decision(1))
        await operator.append(other, decision(1))
    async with impatient(as_user(server, "engine", recipe("engine", tenant))) as ledger:
        receipt = await ledger.append(tenant, decision(2))
        assert (receipt.seq, receipt.durability) == (2, Durability.MEMORY)
        assert (await ledger.append(tenant, decision(1))).duplicate
        assert await ids(ledger, tenant) == ["d-1", "d-2"]
        with pytest.raises(errors.PermissionDenied, match="README"):
            await ledger.append(other, decision(2))
        with pytest.raises(errors.PermissionDenied):
            await ids(ledger, other)
    async with impatient(server.url) as operator:
        assert await ids(operator, other) == ["d-1"]


@pytest.mark.parametrize("kind", KINDS)
async def test_engine_recipe_with_config_knows_its_durability(fresh_server, kind, tenant):
    """With the rights that README adds, an engine's receipts say fsynced."""
    server = fresh_server(kind)
    async with impatient(server.url) as operator:
        await operator.append(tenant, decision(1))
    rules = [*recipe("engine", tenant), "+config|get", "+info"]
    async with impatient(as_user(server, "engine", rules)) as ledger:
        receipt = await ledger.append(tenant, decision(2), durability="fsynced")
        assert receipt.durability is Durability.FSYNCED


@pytest.mark.parametrize("kind", KINDS)
async def test_analyst_recipe_replays_and_cannot_append(fresh_server, kind, tenant):
    """README's analyst replays its tenant, sees no other, and writes nothing."""
    server, other = fresh_server(kind), new_tenant()
    async with impatient(server.url) as operator:
        await operator.append(tenant, decision(1))
        await operator.append(other, decision(1))
    async with impatient(as_user(server, "analyst", recipe("analyst", tenant))) as ledger:
        assert await ids(ledger, tenant) == ["d-1"]
        assert (await ledger.get(tenant, "d-1")).seq == 1
        assert (await ledger.head(tenant)).seq == 1
        with pytest.raises(errors.PermissionDenied):
            await ledger.append(tenant, decision(2))
        with pytest.raises(errors.PermissionDenied):
            await ids(ledger, other)
    async with impatient(server.url) as operator:
        assert await ids(operator, tenant) == ["d-1"]


async def test_who_may_not_load_the_library_is_told_who_can(fresh_server, tenant):
    """An engine on a server that never had the library gets FunctionMissing with the way out."""
    server = fresh_server()
    async with impatient(as_user(server, "engine", recipe("engine", tenant))) as ledger:
        with pytest.raises(errors.FunctionMissing, match="may not load it") as caught:
            await ledger.append(tenant, decision(1))
    assert "+function|load" in caught.value.hint
    assert server.cli("EXISTS", keys.decisions(tenant)) == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_attestation_stands_in_for_config(fresh_server, kind, tenant):
    """Where CONFIG is denied a receipt says memory, and fsynced once an operator has attested
    this very server process.
    """
    server = fresh_server(kind)
    async with impatient(server.url) as operator:
        await operator.append(tenant, decision(1))
    attested = keys.attestation("*")
    rules = [*recipe("engine", tenant), "+info", "+hgetall", f"%R~{attested}"]
    async with impatient(as_user(server, "engine", rules)) as ledger:
        assert (await ledger.append(tenant, decision(2))).durability is Durability.MEMORY
        with pytest.raises(errors.UnsafeServer, match="attested"):
            await ledger.append(tenant, decision(3), durability="fsynced")
    async with await Server.open(settings(server.url)) as operator:
        await operator.attest()
    async with impatient(as_user(server, "engine", rules)) as ledger:
        receipt = await ledger.append(tenant, decision(3), durability="fsynced")
        assert (receipt.seq, receipt.durability) == (3, Durability.FSYNCED)


# --- what the server's settings allow -----------------------------------------------------------


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_evicting_server_is_refused_unless_allowed(fresh_server, policy, tenant):
    """A policy that can evict the record is UnsafeServer by name, unless it was allowed."""
    server = fresh_server(config={"maxmemory": "100mb", "maxmemory-policy": policy})
    async with impatient(server.url) as ledger:
        with pytest.raises(errors.UnsafeServer, match=f"maxmemory-policy is {policy}") as caught:
            await ledger.append(tenant, decision(1))
    assert caught.value.facts["setting"] == "maxmemory-policy"
    assert server.cli("EXISTS", keys.decisions(tenant)) == 0
    async with impatient(server.url, govledger_allow_eviction=True) as ledger:
        assert (await ledger.append(tenant, decision(1))).seq == 1


async def test_policy_that_evicts_only_keys_with_a_ttl_is_fine(fresh_server, tenant):
    """volatile-lru leaves keys without a TTL alone, so it is not refused."""
    server = fresh_server(config={"maxmemory": "100mb", "maxmemory-policy": "volatile-lru"})
    async with impatient(server.url) as ledger:
        assert (await ledger.append(tenant, decision(1))).seq == 1


UNSAFE = {
    "appendfsync is everysec": {"appendfsync": "everysec"},
    "appendfsync is no": {"appendfsync": "no"},
    "appendonly is no": {"appendonly": "no"},
    "no-appendfsync-on-rewrite is yes": {"no-appendfsync-on-rewrite": "yes"},
}


@pytest.mark.parametrize(("named", "config"), UNSAFE.items())
async def test_fsynced_is_refused_where_a_setting_breaks_it(fresh_server, named, config, tenant):
    """Asked for fsynced, a server that cannot give it is UnsafeServer with the setting's name and
    nothing is written; unasked, the receipt says memory.
    """
    server = fresh_server(config=config)
    async with impatient(server.url) as ledger:
        with pytest.raises(errors.UnsafeServer, match=named):
            await ledger.append(tenant, decision(1), durability="fsynced")
        assert server.cli("EXISTS", keys.decisions(tenant)) == 0
        assert (await ledger.append(tenant, decision(1))).durability is Durability.MEMORY


async def test_change_behind_our_back_shows_in_receipts(fresh_server, tenant):
    """CONFIG SET by somebody else is in the receipts, and refuses fsynced, soon after."""
    server = fresh_server()
    async with impatient(server.url) as ledger:
        receipt = await ledger.append(tenant, decision(0))
        assert receipt.durability is Durability.FSYNCED
        server.cli("CONFIG", "SET", "appendfsync", "everysec")
        deadline_s, number = time.monotonic() + 5, 0
        while receipt.durability is Durability.FSYNCED:
            assert time.monotonic() < deadline_s
            number += 1
            receipt = await ledger.append(tenant, decision(number))
        assert receipt.durability is Durability.MEMORY
        with pytest.raises((errors.UnsafeServer, errors.DurabilityNotReached), match="fsync"):
            await ledger.append(tenant, decision(number + 1), durability="fsynced")


async def test_eviction_set_behind_our_back_stops_appends(fresh_server, tenant):
    """CONFIG SET maxmemory-policy allkeys-lru stops appends soon after."""
    server = fresh_server()
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision(0))
        server.cli("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        with pytest.raises(errors.UnsafeServer, match="maxmemory-policy"):
            await append_for_seconds(5, ledger, tenant)


async def append_for_seconds(limit_s, ledger, tenant):
    deadline_s, number = time.monotonic() + limit_s, 0
    while time.monotonic() < deadline_s:
        number += 1
        await ledger.append(tenant, decision(number))


@pytest.mark.parametrize("kind", KINDS)
async def test_replicated_needs_a_replica(fresh_server, kind, tenant, monkeypatch):
    """Replicated without a replica is DurabilityNotReached, though recorded; with one, the same
    id again is a duplicate that now is replicated.
    """
    monkeypatch.setattr(append, "WAIT_TIMEOUT_MS", 200)
    primary = fresh_server(kind)
    async with impatient(primary.url) as ledger:
        with pytest.raises(errors.DurabilityNotReached, match="same id") as caught:
            await ledger.append(tenant, decision(1), durability="replicated")
        assert caught.value.facts["reached"] is Durability.FSYNCED
        assert await ids(ledger, tenant) == ["d-1"]
        replica = fresh_server(kind, config={"replicaof": f"127.0.0.1 {primary.port}"})
        replica.wait_for_replica_link()
        monkeypatch.setattr(append, "WAIT_TIMEOUT_MS", 10_000)
        receipt = await ledger.append(tenant, decision(1), durability="replicated")
        assert (receipt.seq, receipt.duplicate) == (1, True)
        assert receipt.durability is Durability.REPLICATED
        assert replica.cli("XLEN", keys.decisions(tenant)) == 1


# --- the function library -----------------------------------------------------------------------


def library(version, oldest_client=1):
    """Our library as another release would have it."""
    source = library_source().decode()
    for name, value in (("VERSION", version), ("OLDEST_CLIENT", oldest_client)):
        source, found = re.subn(
            rf"^local {name} = \d+$", f"local {name} = {value}", source, flags=re.MULTILINE
        )
        assert found == 1
    return source


def library_version(server):
    return server.cli("FCALL_RO", "govledger_version", 0)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["older", "flushed"])
async def test_library_is_healed_under_concurrent_appenders(fresh_server, kind, before, tenant):
    """An older library, or none, in the middle of four writers' work: it is replaced, and nothing
    is lost or recorded twice.
    """
    server = fresh_server(kind)
    older = ["FUNCTION", "LOAD", "REPLACE", library(LIBRARY_VERSION - 1)]
    break_it = older if before == "older" else ["FUNCTION", "FLUSH"]
    server.cli(*older)
    receipts = []

    async def work(writer):
        async with impatient(server.url) as ledger:
            for number in range(60):
                receipts.append(await ledger.append(tenant, decision(f"{writer}-{number}")))
                if writer == 0 and number % 10 == 5:
                    await asyncio.to_thread(server.cli, *break_it)

    await asyncio.gather(*(work(writer) for writer in range(4)))
    async with impatient(server.url) as ledger:
        await ledger.append(tenant, decision("last"))
        recorded = await ids(ledger, tenant)
        assert await seqs(ledger, tenant) == list(range(1, 242))
    assert len(set(recorded)) == 241
    assert not any(receipt.duplicate for receipt in receipts)
    assert sorted(receipt.seq for receipt in receipts) == list(range(1, 241))
    assert library_version(server) == LIBRARY_VERSION


async def test_newer_library_is_used_and_left_alone(fresh_server, tenant):
    """A newer release's library that still answers us is used and not replaced."""
    server = fresh_server()
    server.cli("FUNCTION", "LOAD", library(99))
    async with impatient(server.url) as ledger:
        assert (await ledger.append(tenant, decision(1))).seq == 1
        await ledger.server.load_library()
        assert await ledger.server.library_version() == 99
    assert library_version(server) == 99


async def test_library_that_no_longer_answers_us_says_upgrade(fresh_server, tenant):
    """A library whose oldest client is newer than we are is LibraryTooNew, and stays."""
    server = fresh_server()
    server.cli("FUNCTION", "LOAD", library(99, 99))
    async with impatient(server.url) as ledger:
        with pytest.raises(errors.LibraryTooNew) as caught:
            await ledger.append(tenant, decision(1))
    assert "upgrade" in caught.value.hint
    assert library_version(server) == 99
    assert server.cli("EXISTS", keys.decisions(tenant)) == 0


# --- cluster and sentinel -----------------------------------------------------------------------


async def test_cluster_takes_many_tenants(cluster):
    """In a cluster 20 tenants land on all primaries, each of which gets the library."""
    tenants = [new_tenant() for _ in range(20)]
    async with impatient(cluster.url) as ledger:
        events = [decision(number) for number in range(5)]
        many = await asyncio.gather(
            *(ledger.append_many(tenant, events, durability="fsynced") for tenant in tenants)
        )
        assert {tuple(r.seq for r in receipts) for receipts in many} == {(1, 2, 3, 4, 5)}
        for tenant in tenants:
            assert await seqs(ledger, tenant) == [1, 2, 3, 4, 5]
        assert set(tenants) <= set(await ledger.tenants())
    assert [library_version(primary) for primary in cluster.primaries] == [LIBRARY_VERSION] * 3
    held = [int(primary.cli("DBSIZE")) for primary in cluster.primaries]
    assert all(held), held


async def test_cluster_failover_loses_nothing_replicated(fresh_cluster, monkeypatch):
    """Kill -9 of a primary amid appends: retries land after the failover, and no event that was
    acknowledged as replicated is lost or doubled.
    """
    monkeypatch.setattr(append, "WAIT_TIMEOUT_MS", 100)
    cluster = fresh_cluster(replicas=1, config={"appendfsync": "everysec"})
    doomed = cluster.primaries[0]
    tenant = next(
        name for name in iter(new_tenant, None) if cluster.node_for(keys.decisions(name)) is doomed
    )
    acknowledged, stop = {}, asyncio.Event()

    async with impatient(cluster.url, 10) as ledger:

        async def work(writer):
            number = 0
            while not stop.is_set():
                try:
                    name = f"{writer}-{number}"
                    receipt = await ledger.append(tenant, decision(name), durability="replicated")
                except (errors.Unavailable, errors.DurabilityNotReached):
                    if failed_over():
                        stop.set()
                    continue
                acknowledged[name] = receipt.seq
                number += 1
                if len(acknowledged) == 200:
                    doomed.kill()

        def failed_over():
            return not doomed.alive and cluster.replicas[0].cli("ROLE")[0] == "master"

        await asyncio.gather(*(work(writer) for writer in range(4)))
        last = await ledger.append(tenant, decision("after"))
        entries = {entry.id: entry.seq async for entry in ledger.replay(tenant)}
    assert last.seq == len(entries) == entries["d-after"]
    assert len(acknowledged) >= 200
    assert {name: entries.get(f"d-{name}") for name in acknowledged} == acknowledged


async def test_sentinel_failover_is_followed(fresh_server, fresh_sentinel, tenant):
    """When the primary dies and a sentinel promotes the replica, an open ledger's next append
    waits for that and lands there, behind everything that was replicated.
    """
    primary = fresh_server()
    replica = fresh_server(config={"replicaof": f"127.0.0.1 {primary.port}"})
    replica.wait_for_replica_link()
    sentinel = fresh_sentinel(primary)
    async with impatient(sentinel.url, 20) as ledger:
        await asyncio.gather(
            *(ledger.append(tenant, decision(n), durability="replicated") for n in range(5))
        )
        primary.kill()
        assert (await ledger.append(tenant, decision(5))).seq == 6
        assert await ids(ledger, tenant) == [f"d-{n}" for n in range(6)]
    assert sentinel.primary_port() == replica.port
    assert replica.cli("XLEN", keys.decisions(tenant)) == 6


@pytest.mark.parametrize("scheme", ["redis+sentinel", "unix"])
async def test_connect_says_at_once_that_nobody_is_there(scheme, tmp_path):
    """A sentinel or a socket that is not there is found at connect, not at the first append."""
    url = "redis+sentinel://127.0.0.1:1/ledger"
    with pytest.raises(errors.ServerUnreachable, match=scheme.replace("+", ".")):
        await impatient(url if scheme == "redis+sentinel" else f"unix://{tmp_path}/no.sock")


# --- connections --------------------------------------------------------------------------------


async def concurrently(ledger, tenants, number):
    receipts = await asyncio.gather(*(ledger.append(t, decision(number)) for t in tenants))
    assert not any(receipt.duplicate for receipt in receipts)
    return [receipt.seq for receipt in receipts]


async def test_stale_connections_go_unnoticed(fresh_server):
    """Idle connections that the server has dropped cost one unseen retry, however many they are."""
    server, tenants = fresh_server(), [new_tenant() for _ in range(20)]
    async with impatient(server.url, 1) as ledger:
        assert await concurrently(ledger, tenants, 1) == [1] * 20
        assert client_connections(server) >= 10
        server.cli("CLIENT", "KILL", "TYPE", "normal")
        assert (await ledger.append(tenants[0], decision(2))).seq == 2
        assert await concurrently(ledger, tenants[1:], 2) == [2] * 19


async def test_stale_connections_go_unnoticed_in_a_cluster(cluster):
    """The same where redis-py's cluster client keeps the connections."""
    name = new_tenant()
    node = cluster.node_for(keys.decisions(name))
    tenants = [name]
    while len(tenants) < 20:
        other = new_tenant()
        if cluster.node_for(keys.decisions(other)) is node:
            tenants.append(other)
    async with impatient(cluster.url, 1) as ledger:
        assert await concurrently(ledger, tenants, 1) == [1] * 20
        assert client_connections(node) >= 10
        for primary in cluster.primaries:
            primary.cli("CLIENT", "KILL", "TYPE", "normal")
        assert (await ledger.append(name, decision(2))).seq == 2
        assert await concurrently(ledger, tenants[1:], 2) == [2] * 19


async def test_closed_ledgers_leave_no_connection(fresh_server):
    """Ten ledgers at work at once, closed one after another: the server has no client left."""
    server = fresh_server()
    for _ in range(3):
        async with contextlib.AsyncExitStack() as stack:
            opened = [
                await stack.enter_async_context(Ledger.connect(server.url)) for _ in range(10)
            ]
            tenants = [new_tenant() for _ in range(5)]
            await asyncio.gather(
                *(concurrently(ledger, tenants, n) for n, ledger in enumerate(opened))
            )
            assert client_connections(server) >= 10
    await asyncio.to_thread(
        wait_until, lambda: client_connections(server) == 0, "every connection is closed"
    )


async def test_failed_connect_leaves_no_connection(fresh_server):
    """A connect that is refused closes what it opened."""
    server = fresh_server(password=SECRET)
    for _ in range(5):
        with pytest.raises(errors.AuthenticationFailed):
            await impatient(f"redis://127.0.0.1:{server.port}")
    await asyncio.to_thread(
        wait_until, lambda: client_connections(server) == 0, "every connection is closed"
    )


def test_sync_facade_works_and_ends_its_thread(server, tenant):
    """`ledger.sync` appends, replays and lists without an event loop, and leaves no thread."""
    before = set(threading.enumerate())
    with sync.Ledger.connect(server.url) as ledger:
        assert ledger.append(tenant, decision(1)).seq == 1
        receipts = ledger.append_many(tenant, [decision(n) for n in range(2, 700)])
        assert receipts[-1].seq == 699
        assert [entry.seq for entry in ledger.replay(tenant)] == list(range(1, 700))
        assert next(ledger.replay(tenant, after=5)).id == "d-6"
        assert tenant in ledger.tenants()
        assert ledger.head(tenant).seq == 699
        with pytest.raises(errors.NotFound):
            ledger.get(tenant, "absent")
    assert set(threading.enumerate()) == before


def test_sync_facade_that_cannot_connect_ends_its_thread(fresh_server):
    """A synchronous connect that fails leaves no thread either."""
    server = fresh_server()
    server.kill()
    before = set(threading.enumerate())
    with pytest.raises(errors.ServerUnreachable):
        sync.Ledger.connect(settings=settings(server.url))
    assert set(threading.enumerate()) == before
