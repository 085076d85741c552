"""Redis away, empty, slow, full, read-only or full of nonsense: nobody who calls notices, and sessions end in time."""

import asyncio
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import pathlib
import typing
import urllib.parse
import uuid

import onlooker
import proxy
import pytest
import replicas
from redis import asyncio as redis

from afterhours_grpc.embedded import redis as embedded
from afterhours_grpc.sessions import session

pytestmark = pytest.mark.timed

SESSIONS = 100
INTERVAL = 1
SWEPT = {"AFTERHOURS_RECONCILE_INTERVAL": f"{INTERVAL}s"}


class Faulty:
    """A Redis of a test's own. What is not written to its file is gone when it stops: everything."""

    def __init__(self, directory: pathlib.Path, **settings: str) -> None:
        self._server = embedded.Redis(directory, settings={"appendonly": "no", **settings})
        # It ends when the thread that started it does; this one does not hold up the event loop.
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    @property
    def url(self) -> str:
        """Where it is, again after a restart."""
        return self._server.url

    @property
    def port(self) -> str:
        """Its port."""
        return str(urllib.parse.urlsplit(self.url).port)

    @property
    def password(self) -> str:
        """Its password."""
        return urllib.parse.urlsplit(self.url).password or ""

    async def start(self) -> None:
        """Start it, empty."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._server.start)

    async def stop(self) -> None:
        """Stop it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._server.stop)

    async def close(self) -> None:
        """Stop it for good."""
        await self.stop()
        self._thread.shutdown()

    async def tell(self, *command: str | bytes | float) -> object:
        """Run one command."""
        async with redis.Redis.from_url(self.url, socket_timeout=10) as client:
            answer: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]
            return answer


@pytest.fixture
async def faulty(tmp_path: pathlib.Path) -> collections.abc.AsyncIterator[Faulty]:
    """Run a Redis that the test may harm."""
    server = Faulty(tmp_path / "redis")
    await server.start()
    yield server
    await server.close()


@pytest.fixture
async def beside(engines: replicas.Engines, faulty: Faulty) -> replicas.Engines:
    """Give the database of the test, and its own Redis."""
    return dataclasses.replace(engines, redis_url=faulty.url)


@contextlib.asynccontextmanager
async def unnoticed(
    beside: replicas.Engines, by_way: replicas.Engines | None = None
) -> collections.abc.AsyncIterator[replicas.Client]:
    """Run a server with sessions about to end and others under load, through a fault, that ends with the body.

    Each call is OK, and 99 of 100 take less than a second. Sessions that end during the fault or after it are closed
    within the interval and a second. When the fault is over, each active session has its one job within a few sweeps,
    the jobs of those that ended are gone, and a new session has its job within a second.
    """
    async with replicas.replica(by_way or beside, **SWEPT) as (service, client):
        await client.put_profile("staying")
        await client.start("staying")
        await onlooker.started(client, SESSIONS)
        async with onlooker.load(client) as load:
            closing = asyncio.create_task(onlooker.closed_on_time(beside, SESSIONS, most=INTERVAL + 1))
            yield client
            await closing
        assert not load.refusals, load.refusals[0]
        assert onlooker.p99(load.seconds) < 1, load.seconds[-10:]
        assert await client.health() == "SERVING"
        assert not service.failed.is_set()

        await replicas.eventually(lambda: onlooker.timed(beside), within=3 * INTERVAL + 1)
        await client.put_profile("new")
        await client.start("new")
        await replicas.eventually(lambda: onlooker.timed(beside), within=1)
        assert len(await onlooker.jobs(beside.redis_url)) == 2


async def test_redis_stops_and_comes_back_empty(beside: replicas.Engines, faulty: Faulty) -> None:
    """Redis stops, sessions end without it, and it starts again without a byte of what it knew."""
    async with unnoticed(beside):
        await faulty.stop()
        await onlooker.closed_on_time(beside, SESSIONS, most=INTERVAL + 1)
        await faulty.start()
        assert faulty.url == beside.redis_url


async def test_redis_is_flushed(beside: replicas.Engines, faulty: Faulty) -> None:
    """FLUSHALL."""
    async with unnoticed(beside):
        await faulty.tell("FLUSHALL")


async def test_redis_is_paused(beside: replicas.Engines, faulty: Faulty) -> None:
    """CLIENT PAUSE of 3 s, longer than what is left of the sessions: Redis takes connections, and answers nothing."""
    async with unnoticed(beside):
        await faulty.tell("CLIENT", "PAUSE", "3000", "ALL")
        # Answered when the pause is over.
        await faulty.tell("PING")


async def test_redis_is_full(beside: replicas.Engines, faulty: Faulty) -> None:
    """Maxmemory is reached, without eviction: Redis takes no timer any more, and lets none be claimed."""
    async with unnoticed(beside):
        await faulty.tell("CONFIG", "SET", "maxmemory", "1")
        await onlooker.closed_on_time(beside, SESSIONS, most=INTERVAL + 1)
        await faulty.tell("CONFIG", "SET", "maxmemory", "0")


async def test_redis_becomes_read_only(beside: replicas.Engines, faulty: Faulty) -> None:
    """Redis becomes a read-only replica of a primary that nobody reaches, and then a primary again."""
    async with unnoticed(beside):
        await faulty.tell("CONFIG", "SET", "replica-read-only", "yes")
        await faulty.tell("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(redis.ReadOnlyError):
            await faulty.tell("SET", "a", "b")
        await onlooker.closed_on_time(beside, SESSIONS, most=INTERVAL + 1)
        await faulty.tell("REPLICAOF", "NO", "ONE")


async def test_another_value_is_under_our_keys(beside: replicas.Engines, faulty: Faulty) -> None:
    """Keys of ours hold values of another type: they are taken back."""
    async with unnoticed(beside):
        for key in await typing.cast("collections.abc.Awaitable[list[bytes]]", faulty.tell("KEYS", "afterhours:*")):
            await faulty.tell("DEL", key)
            await faulty.tell("SET", key, "a string")


async def test_other_members_are_among_our_jobs(beside: replicas.Engines, faulty: Faulty) -> None:
    """Among our jobs are members that are none, also bytes that are no text, and our own at impossible times."""
    odd: tuple[str | bytes, ...] = (
        "",
        "what is this",
        b"\xff\xfe\x00",
        "session:expire:",
        "session:expire:not-an-id",
        "session:expire:" + "0" * 32,
        "session:expire:00000000-0000-4000-8000-00000000000A",
        "x" * 100_000,
    )
    async with unnoticed(beside) as client:
        staying = await client.get("staying")
        for number, member in enumerate(odd):
            due = ("-inf", "inf", "0", "1e308", "-1e308", "5e-324")[number % 6]
            await faulty.tell("ZADD", onlooker.KEY, due, member)
        # Some due now and some later, and bytes that are no text at both.
        await faulty.tell("ZADD", onlooker.KEY, "0", b"\xfe", "4e9", b"\xfd", "1e300", "\N{SNOWMAN}")
        for id in await onlooker.jobs(beside.redis_url):
            if id == f"session:expire:{staying.session.id}":
                await faulty.tell("ZADD", onlooker.KEY, "inf", id)


async def test_connections_are_cut_in_the_middle_of_a_pipeline(beside: replicas.Engines) -> None:
    """Connections to Redis are cut in the middle of what they bring, time and again."""
    async with proxy.Proxy(beside.redis_url) as cutting:
        by_way = dataclasses.replace(beside, redis_url=cutting.url)

        async def cut(count: int) -> bool:
            return cutting.cuts == count

        async with unnoticed(beside, by_way):
            for number in range(12):
                # The pipeline of one start has some 90 bytes, a claim some 200.
                cutting.cut_after(number * 40)
                await replicas.eventually(functools.partial(cut, number + 1), within=5)


async def test_redis_is_silent_then_slow_then_refuses(beside: replicas.Engines) -> None:
    """A Redis behind a network that swallows, then one that delays, then one that refuses."""
    async with proxy.Proxy(beside.redis_url) as between:
        by_way = dataclasses.replace(beside, redis_url=between.url)
        async with unnoticed(beside, by_way):
            between.swallow()
            await asyncio.sleep(0.8)
            between.swallow(False)
            between.delay_requests = between.delay_replies = 0.2
            await asyncio.sleep(0.8)
            between.delay_requests = between.delay_replies = 0
            between.refuse()
            await asyncio.sleep(0.8)
            await between.accept()


async def test_a_timeout_of_the_url_holds_up_no_sweep(beside: replicas.Engines) -> None:
    """A Redis that falls silent delays no sweep, whatever timeouts REDIS_URL asks for."""
    async with proxy.Proxy(beside.redis_url) as silent:
        patient = f"{silent.url}?socket_timeout=30&socket_connect_timeout=30"
        async with unnoticed(beside, dataclasses.replace(beside, redis_url=patient)):
            silent.swallow()
            await onlooker.closed_on_time(beside, SESSIONS, most=INTERVAL + 1)
            silent.swallow(False)
            silent.cut()


async def test_redis_is_slow_for_two_replicas(beside: replicas.Engines) -> None:
    """A Redis that takes 0.4 s to answer: sessions end, and jobs are settled though leases end before they are."""
    async with proxy.Proxy(beside.redis_url) as slow:
        by_way = dataclasses.replace(beside, redis_url=slow.url)
        alone = {"AFTERHOURS_RECONCILE_INTERVAL": "1h", "AFTERHOURS_WARNING_LEAD": "1s"}
        async with replicas.replica(by_way, **alone) as (_, client), replicas.replica(by_way, **alone):
            slow.delay_requests = slow.delay_replies = 0.2
            await onlooker.started(client, SESSIONS)
            await onlooker.closed_on_time(beside, SESSIONS, most=2)
            await replicas.eventually(lambda: settled(beside), within=5)


async def test_scripts_are_flushed(beside: replicas.Engines, faulty: Faulty) -> None:
    """SCRIPT FLUSH."""
    async with unnoticed(beside):
        await faulty.tell("SCRIPT", "FLUSH")


async def test_scripts_are_forbidden(beside: replicas.Engines, faulty: Faulty) -> None:
    """A Redis whose user may run no scripts fires no timer: sessions end by the sweep, and doctor says why."""
    await faulty.tell("ACL", "SETUSER", "default", "-@scripting")
    async with replicas.replica(beside, **SWEPT) as (_, client):
        await onlooker.started(client, SESSIONS)
        await onlooker.closed_on_time(beside, SESSIONS, most=INTERVAL + 1)
    process = await replicas.Process(beside.environment(), "doctor").start()
    assert await process.wait() == 1
    assert any(line.startswith("wrong") and "scripts" in line for line in process.lines), process.lines


async def settled(engines: replicas.Engines) -> bool:
    """Say whether no job of any kind is left."""
    async with redis.Redis.from_url(engines.redis_url) as client:
        return not await client.exists("afterhours:jobs", "afterhours:warnings")


async def test_the_primary_becomes_a_replica(beside: replicas.Engines, faulty: Faulty, tmp_path: pathlib.Path) -> None:
    """A primary becomes a replica and its name leads to the new one: timers and limits are there within 2 s.

    The connections to the old one stay open, as they do with `REPLICAOF` and with a name that changes.
    """
    await faulty.tell("CONFIG", "SET", "repl-diskless-sync-delay", "0")
    promoted = Faulty(tmp_path / "promoted", masterauth=faulty.password, replicaof=f"127.0.0.1 {faulty.port}")
    await promoted.start()
    there = dataclasses.replace(beside, redis_url=promoted.url)
    settings = {"AFTERHOURS_RECONCILE_INTERVAL": "1h", "AFTERHOURS_RATE_LIMIT": "10"}
    async with proxy.Proxy(beside.redis_url) as name:
        by_way = dataclasses.replace(beside, redis_url=name.url)
        async with replicas.replica(by_way, **settings) as (_, client):
            await client.put_profile("ada")
            await client.start("ada")
            await replicas.eventually(lambda: onlooker.timed(there), within=10)
            await promoted.tell("ACL", "SETUSER", "default", f">{faulty.password}")
            await promoted.tell("REPLICAOF", "NO", "ONE")
            name.lead_to(promoted.url)
            await faulty.tell("CONFIG", "SET", "masterauth", promoted.password)
            await faulty.tell("REPLICAOF", "127.0.0.1", promoted.port)
            await onlooker.started(client, SESSIONS)
            await replicas.eventually(lambda: onlooker.timed(there), within=2)
            await onlooker.closed_on_time(there, SESSIONS)
            await replicas.eventually(lambda: onlooker.timed(there), within=1)
            for _ in range(10):
                await replicas.outcome(client.extend("ada"))
            assert (await replicas.refused(client.extend("ada"))).reason == "RATE_LIMITED"
    await promoted.close()


async def test_a_backlog_on_a_slow_link(beside: replicas.Engines, faulty: Faulty) -> None:
    """30,000 timers gathered for a Redis behind a link of 2 MB/s are all written, and new ones need not wait."""
    async with proxy.Proxy(beside.redis_url) as link:
        by_way = dataclasses.replace(beside, redis_url=link.url)
        async with replicas.replica(by_way, AFTERHOURS_RECONCILE_INTERVAL="1h") as (service, client):
            await client.put_profile("ada")
            link.request_rate = 2_000_000
            later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
            service._schedule.ends.put({session.SessionId(uuid.uuid4()): later for _ in range(30_000)})
            begun = await client.start("ada")
            await replicas.eventually(lambda: timed(beside, begun.id), within=0.5)
            assert await faulty.tell("ZCARD", onlooker.KEY) != 30_001

            async def written() -> bool:
                return await faulty.tell("ZCARD", onlooker.KEY) == 30_001

            await replicas.eventually(written, within=10)


async def timed(engines: replicas.Engines, id: str) -> bool:
    """Say whether a session has its job."""
    async with redis.Redis.from_url(engines.redis_url) as client:
        return await client.zscore(onlooker.KEY, f"session:expire:{id}") is not None
