"""What a failover may lose, and what it must not: answers that were given, and events without an error."""

import asyncio
import collections.abc

import pair
import pytest
import replicas
import watches

from afterhours_grpc.embedded import redis

pytestmark = [pair.needed, pytest.mark.store]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[pair.Pair]:
    """Run a primary and a standby."""
    with pair.running(tmp_path_factory.mktemp("pair")) as servers:
        yield servers


@pytest.fixture
async def database(servers: pair.Pair) -> str:
    """Return the name of a database on a primary with a synchronous standby."""
    await servers.restore()
    return await servers.database()


@pytest.fixture
def engines(servers: pair.Pair, database: str, redis_server: redis.Redis) -> replicas.Engines:
    """Return the database on whichever server is the primary."""
    url = servers.url(database, order=(servers.primary, servers.standby), target_session_attrs="primary")
    return replicas.Engines(url, redis_server.url)


# Only starts, extensions and ends set a timeout of their own.
_WAITING = """
SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%lock_timeout%'
"""


async def test_a_replayed_answer_survives_a_failover(
    servers: pair.Pair, database: str, engines: replicas.Engines
) -> None:
    """A start whose commit was given up before the standby had it is answered, by retries too, once it has."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        first = replicas.request_id()
        servers.standby.freeze()
        await replicas.refused(client.start("ada", request_id=first, timeout=0.5))
        duplicate = asyncio.create_task(replicas.outcome(client.start("ada", request_id=first)))
        # As a client that closes its connection does: the commit is visible from here on.
        assert await servers.primary.sql(_WAITING)
        await replicas.eventually(lambda: _committed(engines), within=5)
        await replicas.refused(client.start("ada", request_id=first, timeout=1))
        assert not duplicate.done()
        servers.standby.thaw()
        started = await client.start("ada", request_id=first)
        # UNAVAILABLE if 5 s have passed before.
        outcome = await duplicate
        assert outcome == started or (isinstance(outcome, replicas.Refusal) and outcome.code == "UNAVAILABLE")
        await servers.primary.kill()
    await servers.promote()
    [row] = await servers.primary.sql("SELECT id FROM after_hours_sessions", database=database)
    assert str(row["id"]) == started.id


async def _committed(engines: replicas.Engines) -> bool:
    return bool(await engines.rows("SELECT FROM after_hours_requests"))


async def started(client: replicas.Client, *users: str) -> None:
    """Start sessions."""
    for user in users:
        await client.put_profile(user)
        await client.start(user)


async def test_a_failover_that_lost_commits(servers: pair.Pair, engines: replicas.Engines) -> None:
    """A watch that saw what a failover lost ends as CURSOR_EXPIRED, and so does one from there; others miss nothing."""
    async with replicas.replica(engines) as (_, client), watches.watching(client) as watch:
        await started(client, "ada", "bob")
        await watch.events(2)
        kept = watch.cursor
        await servers.replicate(synchronous=False)
        await servers.standby.set("primary_conninfo", "")
        await replicas.eventually(lambda: _detached(servers.standby), within=10)
        await started(client, "cyd", "dan", "eve")
        await watch.events(3)
        lost = watch.cursor
        await servers.primary.kill()
        await servers.promote()
        await replicas.eventually(lambda: watches.answers(client), within=20)
        users = ["fay", "gus", "hal", "ida", "jon"]
        await started(client, *users)
        for each in (watch, watches.Watch(client, cursor=lost)):
            refusal = await watches.failure(each)
            assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
        async with watches.watching(client, cursor=kept) as again:
            assert watches.users(await again.events(5)) == users


async def _detached(server: pair.Server) -> bool:
    return not await server.sql("SELECT FROM pg_stat_wal_receiver")


async def test_a_failover_that_lost_nothing(servers: pair.Pair, engines: replicas.Engines) -> None:
    """With a synchronous standby a watch goes on through a failover, and its cursors stay good."""
    async with replicas.replica(engines) as (_, client), watches.watching(client) as watch:
        beginning = watch.cursor
        await started(client, "ada", "bob")
        await watch.events(1)
        cursor = watch.cursor
        await servers.primary.kill()
        await servers.promote()
        await replicas.eventually(lambda: watches.answers(client), within=20)
        await started(client, "cyd")
        assert watches.users(await watch.events(2)) == ["bob", "cyd"]
        for old, users in ((cursor, ["bob", "cyd"]), (beginning, ["ada", "bob", "cyd"])):
            async with watches.watching(client, cursor=old) as again:
                assert watches.users(await again.events(len(users))) == users
