"""Clusters and sentinels: appends and reads follow what moves, and nothing is lost or twice."""

from __future__ import annotations

import asyncio

import pytest
from redis.crc import key_slot

from ledger import Decision, Ledger, Settings, errors, keys
from ledger.server import Server
from tests.servers import new_tenant


def decision(number):
    return Decision(
        id=f"d-{number}", at="2026-03-03T12:00:00Z", agent="a", action="b", verdict="allow"
    )


def slot_of(tenant):
    return key_slot(keys.decisions(tenant).encode())


def tenant_in(slot):
    """A new tenant whose keys are in this slot."""
    while slot_of(tenant := new_tenant()) != slot:
        pass
    return tenant


class Migration:
    """A slot on its way from the primary that serves it to another one."""

    def __init__(self, cluster, tenant):
        self.slot = slot_of(tenant)
        self.source = cluster.node_for(keys.decisions(tenant))
        self.target = next(node for node in cluster.primaries if node is not self.source)
        self.primaries = cluster.primaries

    def begin(self):
        source, target = self.source.cli("CLUSTER", "MYID"), self.target.cli("CLUSTER", "MYID")
        self.target.cli("CLUSTER", "SETSLOT", self.slot, "IMPORTING", source)
        self.source.cli("CLUSTER", "SETSLOT", self.slot, "MIGRATING", target)

    def move(self, *names):
        self.source.cli("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *names)

    def end(self):
        left = self.source.cli("CLUSTER", "GETKEYSINSLOT", self.slot, 1000)
        if left:
            self.move(*left)
        target = self.target.cli("CLUSTER", "MYID")
        for node in (self.target, self.source):
            node.cli("CLUSTER", "SETSLOT", self.slot, "NODE", target)


async def ids(book, tenant):
    return [entry.id async for entry in book.replay(tenant)]


async def still_waits(task):
    """Whether it has not ended after a while in which several attempts were made."""
    done, _ = await asyncio.wait([task], timeout=0.3)
    return not done


async def test_appends_and_reads_follow_a_moving_slot(fresh_cluster):
    """ASK while it moves, TRYAGAIN while keys are apart, MOVED afterwards: no caller notices."""
    tenant = new_tenant()
    cluster = fresh_cluster()
    migration = Migration(cluster, tenant)
    neighbour = tenant_in(migration.slot)
    async with Ledger.connect(cluster.url) as book:
        await book.append_many(tenant, [decision(n) for n in range(10)])
        migration.begin()
        # Its keys are all at the source still.
        await book.append(tenant, decision(10))
        # Its keys are apart: neither node can run the function, until they are together again.
        migration.move(keys.head(tenant))
        pending = asyncio.create_task(book.append(tenant, decision(11)))
        assert await still_waits(pending)
        migration.move(keys.decisions(tenant), keys.index(tenant))
        assert (await pending).seq == 12
        # All are at the target, which takes only who was sent by the source.
        assert (await book.append(tenant, decision(12))).seq == 13
        assert await ids(book, tenant) == [f"d-{n}" for n in range(13)]
        assert (await book.get(tenant, "d-3")).seq == 4
        # A cluster lets nobody make several keys in a slot that moves.
        begun = asyncio.create_task(book.append(neighbour, decision(0)))
        assert await still_waits(begun)
        migration.end()
        assert (await begun).seq == 1
        assert (await book.append(tenant, decision(13))).seq == 14
        assert await ids(book, tenant) == [f"d-{n}" for n in range(14)]
        assert await ids(book, neighbour) == ["d-0"]


async def test_writers_do_not_notice_slots_that_move(fresh_cluster):
    """While four writers append, their tenants' slots go to another primary: each event once."""
    cluster = fresh_cluster()
    tenants = [new_tenant() for _ in range(4)]
    moved = asyncio.Event()

    async def write(book, tenant):
        number = 0
        while number < 60 or not moved.is_set():
            receipt = await book.append(tenant, decision(number))
            assert receipt.seq == number + 1
            number += 1
        return number

    async with Ledger.connect(cluster.url) as book:
        writers = [asyncio.create_task(write(book, tenant)) for tenant in tenants]
        for tenant in tenants:
            migration = Migration(cluster, tenant)
            await asyncio.to_thread(migration.begin)
            await asyncio.to_thread(migration.end)
        moved.set()
        counts = await asyncio.gather(*writers)
        for tenant, count in zip(tenants, counts, strict=True):
            assert await ids(book, tenant) == [f"d-{n}" for n in range(count)]


async def test_a_cluster_that_is_gone_is_unreachable(fresh_cluster, tenant, monkeypatch):
    """All nodes dead: a bounded number of attempts, then one named error."""
    monkeypatch.setenv("MEMORY_MAX_RECONNECT_ATTEMPTS", "2")
    cluster = fresh_cluster()
    async with Ledger.connect(cluster.url) as book:
        await book.append(tenant, decision(0))
        cluster.kill()
        with pytest.raises(errors.ServerUnreachable) as refused:
            await book.append(tenant, decision(1))
        assert refused.value.facts["attempts"] == 3


# -- sentinels ------------------------------------------------------------------------------------


async def test_one_of_several_sentinels_is_enough(fresh_server, fresh_sentinel, tenant):
    """A URL with several sentinels works while one of them answers, and is shown as it is."""
    primary = fresh_server(password="secret-pony")
    alive = fresh_sentinel(primary).url.removeprefix("redis+sentinel://").partition("/")[0]
    url = f"redis+sentinel://:secret-pony@127.0.0.1:1,{alive}/ledger"
    async with Ledger.connect(url) as book:
        assert (await book.append(tenant, decision(0))).seq == 1
        assert book.server.address == f"redis+sentinel://127.0.0.1:1,{alive}/ledger"


@pytest.mark.parametrize("password", ["12/secret-pony", "12?secret-pony", "12#secret-pony"])
@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel"])
def test_a_password_that_was_not_encoded_is_not_shown(scheme, password):
    """What a URL's parser takes for port, path or query may be a password: none of it is shown."""
    with pytest.raises(errors.InvalidSetting) as refused:
        Server(Settings(redis_url=f"{scheme}://:{password}@localhost:6379/0"))
    assert "pony" not in str(refused.value)
    assert "percent-encode" in refused.value.hint


def test_settings_do_not_show_passwords():
    """Neither the URL's password nor the separate one is in what is printed of the settings."""
    settings = Settings(redis_url="redis://:secret-pony@h", redis_password="other-pony")
    assert "pony" not in f"{settings!r} {settings}"
