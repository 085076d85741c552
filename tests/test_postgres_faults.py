"""Postgres away, silent, full, or giving up: calls are answered in time, nothing is lost, and service goes on."""

import asyncio
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import datetime
import itertools
import pathlib
import time
import typing
import urllib.parse

import asyncpg
import conftest
import onlooker
import proxy
import psutil
import pytest
import replicas
import watches
from afterhours.v1 import session_pb2

from afterhours_grpc import app
from afterhours_grpc.embedded import postgres, redis
from afterhours_grpc.store import schema

Call = collections.abc.Callable[..., collections.abc.Awaitable[session_pb2.Session]]

pytestmark = [pytest.mark.store, pytest.mark.timed]

# Seconds that a call waits for Postgres at most, and what a machine that has more to do may add.
LONGEST = 5.0
SLACK = 1.5
# Connections of a replica, at most.
POOL = 16

_numbers = itertools.count()


class Faulty:
    """A Postgres of these tests' own."""

    def __init__(self, directory: pathlib.Path) -> None:
        settings = {
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "60",
            # Sooner than a statement of the service gives up waiting for a lock.
            "deadlock_timeout": "350ms",
        }
        self._server = postgres.Postgres(directory, bindir=conftest.postgres_bin(), settings=settings)
        # It ends when the thread that started it does; this one does not hold up the event loop.
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._thread.submit(self._server.start).result()

    @property
    def url(self) -> str:
        """Where it is, again after a restart."""
        return self._server.url

    async def restart(self, mode: typing.Literal["fast", "immediate"]) -> None:
        """Stop it, and start it again."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, lambda: self._server.stop(mode=mode))
        await loop.run_in_executor(self._thread, self._server.start)

    @contextlib.contextmanager
    def silent(self) -> collections.abc.Iterator[None]:
        """Stop all its processes: the kernel takes connections for it, and nobody answers."""
        postmaster = psutil.Process(self._server.pid)
        postmaster.suspend()
        everyone = [postmaster, *postmaster.children(recursive=True)]
        try:
            for each in everyone:
                each.suspend()
            yield
        finally:
            for each in everyone:
                each.resume()

    def said(self, words: str) -> int:
        """Count what is in its log."""
        return self._server.log.read_text().count(words)

    def close(self) -> None:
        """Stop it for good."""
        self._thread.submit(self._server.stop, mode="immediate").result()
        self._thread.shutdown()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[Faulty]:
    """Run a Postgres that the tests may harm, migrated."""
    server = Faulty(tmp_path_factory.mktemp("postgres"))
    asyncio.run(schema.migrate(server.url))
    yield server
    server.close()


@pytest.fixture
async def engines(faulty: Faulty, redis_server: redis.Redis) -> collections.abc.AsyncIterator[replicas.Engines]:
    """Give a test its own database there, which no connection may be left to afterwards."""
    name = f"test_{next(_numbers)}"
    host = faulty.url.rpartition("/")[0]
    administration = replicas.Engines(f"{host}/postgres", redis_server.url)
    await administration.rows(f"CREATE DATABASE {name} TEMPLATE afterhours")
    yield replicas.Engines(f"{host}/{name}", redis_server.url)

    async def left() -> bool:
        return not await administration.rows("SELECT FROM pg_stat_activity WHERE datname = $1", name)

    await replicas.eventually(left, within=5)
    await administration.rows(f"DROP DATABASE {name}")


async def waiting(engines: replicas.Engines) -> list[int]:
    """Give the backends of the service that wait for a lock, once there are any."""
    pids: list[int] = []

    async def found() -> bool:
        rows = await engines.rows(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'afterhours' AND wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        pids.extend(row["pid"] for row in rows)
        return bool(rows)

    await replicas.eventually(found, within=5)
    return pids


def says_try_again(refusal: replicas.Refusal) -> bool:
    """Say whether a call was refused as it has to be while Postgres is away."""
    retry = refusal.details.get("RetryInfo")
    told = (refusal.code, refusal.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
    return bool(told and retry and retry.retry_delay.ToTimedelta() > datetime.timedelta())


async def as_promised(engines: replicas.Engines, load: onlooker.Load) -> None:
    """Check what came of a load: answers in time, refusals that say what to do, and each call applied exactly once."""
    assert all(says_try_again(each) for each in load.refusals), load.refusals
    assert load.seconds[-1] < LONGEST + SLACK
    rows = await engines.rows("SELECT * FROM after_hours_sessions WHERE user_id LIKE 'loader %'")
    assert sorted(str(row["id"]) for row in rows) == sorted(load.sessions)
    assert {row["expires_at"] - row["started_at"] for row in rows} == {datetime.timedelta(minutes=30)}
    assert {row["end_reason"] for row in rows} == {"USER"}


async def nothing_leaks(engines: replicas.Engines, service: app.Service, replicas_there: int = 1) -> None:
    """Check that no connection is in use, and that the server has no more of ours than the pools may have."""

    async def quiet() -> bool:
        backends = await engines.rows(
            "SELECT state FROM pg_stat_activity WHERE application_name = 'afterhours' AND datname = current_database()"
        )
        busy = [each for each in backends if each["state"] != "idle"]
        return len(backends) <= POOL * replicas_there and not busy and service.database.checked_out == 0

    await replicas.eventually(quiet, within=5)


async def serving(client: replicas.Client, does: bool, within: float) -> None:
    """Wait until health says so."""

    async def told() -> bool:
        return await client.health() == ("SERVING" if does else "NOT_SERVING")

    await replicas.eventually(told, within)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_under_load_loses_nothing(
    engines: replicas.Engines, faulty: Faulty, mode: typing.Literal["fast", "immediate"]
) -> None:
    """Across a restart or a crash under load calls are OK or UNAVAILABLE, none is lost, and what is due is ended."""
    async with replicas.replica(engines) as (service, client):
        await onlooker.started(client, 20)
        async with onlooker.load(client) as load:
            await faulty.restart(mode)
            back = len(load.answers)

            async def goes_on() -> bool:
                later = load.answers[back:]
                return sum(not isinstance(each.outcome, replicas.Refusal) for each in later) >= 100

            await replicas.eventually(goes_on, within=10)
        assert load.refusals
        await as_promised(engines, load)
        await onlooker.lateness(engines, 20)
        await serving(client, True, within=5)
        await nothing_leaks(engines, service)


async def test_a_silent_postgres_is_an_unreachable_one(engines: replicas.Engines, faulty: Faulty) -> None:
    """While Postgres is stopped, calls are answered in 5 s or by their deadline, and health tells after 5 s.

    When it goes on, sessions that ended meanwhile are closed before health says SERVING again.
    """
    # Neither timers nor sweeps close them: health alone sees to it.
    alone = {"REDIS_URL": "redis://127.0.0.1:1", "AFTERHOURS_RECONCILE_INTERVAL": "1h"}
    async with replicas.replica(engines, **alone) as (service, client):
        await onlooker.started(client, 20)
        async with onlooker.load(client) as load:
            with faulty.silent():
                fell_silent = time.monotonic()
                hurried = await replicas.refused(client.get("user 0", timeout=1))
                assert hurried.code == "DEADLINE_EXCEEDED"
                assert time.monotonic() - fell_silent < 1 + SLACK
                assert await client.health() == "SERVING"
                await serving(client, False, within=8 + SLACK)
                assert time.monotonic() - fell_silent > LONGEST - 1
                assert await client.health("") == "SERVING"
            await serving(client, True, within=5)
            assert len(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at = expires_at")) == 20
        assert load.refusals
        await as_promised(engines, load)
        await nothing_leaks(engines, service)


async def replies_are_lost(engines: replicas.Engines, who: str, *, arrived: bool) -> None:
    """Have every kind of call of `who` lose its reply, or its request too, and ask again by the same request_id."""
    async with proxy.Proxy(engines.database_url) as network:
        by_way = dataclasses.replace(engines, database_url=network.url)
        async with replicas.replica(by_way, AFTERHOURS_RECONCILE_INTERVAL="1h") as (service, client):
            users = starting, extending, ending, leaving = [f"{who} {n}" for n in range(4)]
            await asyncio.gather(*(client.put_profile(user) for user in users))
            await asyncio.gather(*(client.start(user) for user in users[1:]))
            if arrived:
                # A connection that has not prepared a statement yet loses the reply to that, and applies nothing.
                async with onlooker.load(client):
                    await asyncio.sleep(0.5)
            calls: list[tuple[Call, str, str]] = [
                (client.start, starting, replicas.request_id()),
                (client.extend, extending, replicas.request_id()),
                (client.end, ending, replicas.request_id()),
            ]
            network.swallow_replies = True
            network.swallow_requests = not arrived
            asked = time.monotonic()
            refusals = await asyncio.gather(
                *(replicas.refused(call(user, request_id=id)) for call, user, id in calls),
                replicas.refused(client.delete_profile(leaving)),
            )
            assert time.monotonic() - asked < LONGEST + SLACK
            assert all(says_try_again(each) for each in refusals), refusals

            ids = [id for _, _, id in calls]
            applied = await engines.rows("SELECT FROM after_hours_requests WHERE request_id = ANY($1::uuid[])", ids)
            assert bool(applied) is arrived
            network.swallow(False)
            first = await asyncio.gather(*(call(user, request_id=id) for call, user, id in calls))
            again = await asyncio.gather(*(call(user, request_id=id) for call, user, id in calls))
            assert [each.SerializeToString() for each in first] == [each.SerializeToString() for each in again]
            await nothing_leaks(engines, service, 2)

            begun, extended, ended = first
            rows = await engines.rows("SELECT * FROM after_hours_sessions WHERE user_id = ANY($1)", users)
            kept = {row["user_id"]: row for row in rows}
            assert len(kept) == len(rows) == len(users)
            assert str(kept[starting]["id"]) == begun.id
            assert kept[extending]["expires_at"] - kept[extending]["started_at"] == datetime.timedelta(minutes=30)
            assert kept[extending]["expires_at"].timestamp() == extended.expire_time.ToMicroseconds() / 1e6
            assert kept[ending]["ended_at"].timestamp() == ended.end_time.ToMicroseconds() / 1e6
            # Both or neither: a profile that is there has its session.
            assert kept[leaving]["ended_at"] is None
            await client.delete_profile(leaving)


async def test_a_call_whose_reply_is_lost_is_told_by_its_request_id(engines: replicas.Engines) -> None:
    """Calls whose replies are lost, or that never came to Postgres, are told by the same request_id what they did."""
    async with asyncio.TaskGroup() as both:
        both.create_task(replies_are_lost(engines, "deaf", arrived=True))
        both.create_task(replies_are_lost(engines, "mute", arrived=False))


async def test_connections_that_are_cut_lose_nothing(engines: replicas.Engines) -> None:
    """Connections to Postgres that are cut under load, also in the middle of a statement, lose and double nothing."""
    async with proxy.Proxy(engines.database_url) as network:
        by_way = dataclasses.replace(engines, database_url=network.url)
        async with replicas.replica(by_way) as (service, client):
            async with onlooker.load(client) as load:
                for number in range(10):
                    network.cut_after(number * 300)
                    await asyncio.sleep(0.08)
                    network.cut()
                    await asyncio.sleep(0.08)
            assert load.refusals
            await as_promised(engines, load)
            await serving(client, True, within=5)
            await nothing_leaks(engines, service)


async def test_postgres_is_out_of_connections(engines: replicas.Engines) -> None:
    """While others have all connections but a few, calls are OK or UNAVAILABLE, and then they are OK again."""
    async with contextlib.AsyncExitStack() as others, replicas.replica(engines) as (service, client):
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                connection = await asyncpg.connect(engines.database_url)
                others.push_async_callback(connection.close)

        async with onlooker.load(client) as load:

            async def refused() -> bool:
                return len(load.refusals) > 20

            await replicas.eventually(refused, within=10)
            await others.aclose()
            await serving(client, True, within=5)
        await as_promised(engines, load)
        await nothing_leaks(engines, service)


async def is_away_and_back(engines: replicas.Engines, url: str, away: list[str], back: str) -> None:
    """Run statements that lock a service at `url` out, and one that lets it in; check what it says meanwhile."""
    async with replicas.replica(dataclasses.replace(engines, database_url=url)) as (_, client):
        await client.put_profile("ada")
        for statement in away:
            await engines.rows(statement)
        assert says_try_again(await replicas.refused(client.get("ada")))
        await serving(client, False, within=LONGEST + 3 + SLACK)
        assert says_try_again(await replicas.refused(client.put_profile("ada")))
        await engines.rows(back)
        await serving(client, True, within=5)
        await client.put_profile("ada")


@pytest.fixture
async def rented(engines: replicas.Engines) -> collections.abc.AsyncIterator[str]:
    """Return a URL of the database by a role of this test's own, whose password is "one"."""
    await engines.rows("CREATE ROLE renter LOGIN SUPERUSER PASSWORD 'one'")
    url = urllib.parse.urlsplit(engines.database_url)
    yield url._replace(netloc=f"renter:one@{url.netloc.rpartition('@')[2]}").geturl()
    await engines.rows("DROP ROLE renter")


async def test_credentials_and_databases_come_and_go(engines: replicas.Engines, rented: str) -> None:
    """Rejected credentials, and a database that is missing, are a Postgres that is away: it comes back by itself."""
    other = f"{engines.database_url.rpartition('/')[2]}_other"
    await engines.rows(f"CREATE DATABASE {other} TEMPLATE afterhours")
    change = ["ALTER ROLE renter PASSWORD 'two'",
              "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'renter'"]  # fmt: skip
    async with asyncio.TaskGroup() as both:
        both.create_task(is_away_and_back(engines, rented, change, "ALTER ROLE renter PASSWORD 'one'"))
        drop, create = f"DROP DATABASE {other} WITH (FORCE)", f"CREATE DATABASE {other} TEMPLATE afterhours"
        both.create_task(is_away_and_back(engines, f"{engines.database_url}_other", [drop], create))
    await engines.rows(drop)


async def test_a_start_waits_for_a_connection_slot(engines: replicas.Engines) -> None:
    """`serve` waits for a free connection slot, and for a backend behind a load balancer that accepts and closes."""
    async with (
        contextlib.AsyncExitStack() as others,
        proxy.Proxy(engines.database_url) as full,
        proxy.Proxy(engines.database_url) as balancer,
    ):
        urls = [full.url, balancer.url]
        balancer.lead_to("postgresql://127.0.0.1:1")
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                connection = await asyncpg.connect(engines.database_url)
                others.push_async_callback(connection.close)
        processes = [
            await replicas.Process(dataclasses.replace(engines, database_url=url).environment()).start() for url in urls
        ]

        async def tried() -> bool:
            return min(full.accepted, balancer.accepted) > 5

        try:
            await replicas.eventually(tried, within=20)
            assert [process.lines for process in processes] == [[], []]
            await others.aclose()
            balancer.lead_to(engines.database_url)
            for process in processes:
                await (await process.client()).close()
        finally:
            await asyncio.gather(*(process.stop() for process in processes))


async def test_idle_connections_that_a_gateway_forgets(engines: replicas.Engines) -> None:
    """Where what is sent on an idle connection vanishes, no call fails: connections are tried before they are used."""
    async with proxy.Proxy(engines.database_url) as gateway:
        behind = dataclasses.replace(engines, database_url=gateway.url)
        async with replicas.replica(behind, AFTERHOURS_RECONCILE_INTERVAL="1h") as (service, client):
            users = [f"user {n}" for n in range(20)]
            async with replicas.locked(engines, "LOCK TABLE after_hours_profiles"):
                putting = [asyncio.create_task(client.put_profile(user)) for user in users]
                await waiting(engines)
            await asyncio.gather(*putting)
            gateway.forget_after = 1
            for _ in range(2):
                await asyncio.sleep(1.2)
                began = time.monotonic()
                await asyncio.gather(*(client.get(user) for user in users), *(client.start(user) for user in users))
                await asyncio.gather(*(client.end(user) for user in users))
                assert time.monotonic() - began < 2 + SLACK
            gateway.forget_after = None
            await nothing_leaks(engines, service)


async def test_a_watch_is_opened_in_time_or_not_at_all(engines: replicas.Engines) -> None:
    """Opening a watch waits no longer for a silent Postgres than any call, whoever waits already."""
    async with proxy.Proxy(engines.database_url) as network:
        behind = dataclasses.replace(engines, database_url=network.url)
        async with replicas.replica(behind) as (_, client), watches.watching(client):
            network.swallow()

            async def refused() -> float:
                began = time.monotonic()
                refusal = await replicas.refused(watches.Watch(client).next(within=30))
                assert says_try_again(refusal)
                return time.monotonic() - began

            opening = []
            for _ in range(5):
                opening.append(asyncio.create_task(refused()))
                await asyncio.sleep(0.9)
            assert max(await asyncio.gather(*opening)) < LONGEST
            network.swallow(False)
            network.cut()


async def test_a_deadlock_is_tried_again(engines: replicas.Engines, faulty: Faulty) -> None:
    """A call that Postgres takes back because of a deadlock is tried again, and its caller does not notice."""
    async with replicas.replica(engines) as (service, client):
        await client.put_profile("ada")
        await client.start("ada")
        before = faulty.said("deadlock detected")
        # A deletion locks the profile first, and then the session; and whoever does it the other way round meets it.
        async with replicas.locked(
            engines, "SELECT FROM after_hours_sessions WHERE user_id = 'ada' FOR UPDATE"
        ) as connection:
            await connection.execute("SET deadlock_timeout = '30s'")
            deleting = asyncio.create_task(client.delete_profile("ada"))
            await waiting(engines)
            await connection.execute("SELECT FROM after_hours_profiles WHERE user_id = 'ada' FOR UPDATE")
            assert faulty.said("deadlock detected") == before + 1
            assert not deleting.done()
        await deleting
        [row] = await engines.rows("SELECT end_reason FROM after_hours_sessions")
        assert row["end_reason"] == "PROFILE_REMOVED"
        await nothing_leaks(engines, service)


# A start as another replica would commit it.
_START = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT user_id, clock_timestamp(), clock_timestamp() + interval '15 min', latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell
FROM after_hours_sessions
"""


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_the_isolation_is_the_service_s_own(engines: replicas.Engines, isolation: str) -> None:
    """Where the database isolates more strictly, no session outlives its profile, and parallel extends add up."""
    name = engines.database_url.rpartition("/")[2]
    await engines.rows(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    async with replicas.replica(engines) as (service, one), replicas.replica(engines) as (_, two):
        await one.put_profile("ada")
        started = await one.start("ada")
        await asyncio.gather(*((one, two)[n % 2].extend("ada", timeout=20) for n in range(40)))
        added = (await one.get("ada")).session.expire_time.ToDatetime() - started.expire_time.ToDatetime()
        assert added == 40 * datetime.timedelta(minutes=15)
        await one.end("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_profiles FOR SHARE") as start:
            # It waits for a start, and must then see what that committed.
            deleting = asyncio.create_task(two.delete_profile("ada"))
            await waiting(engines)
            await start.execute(_START)
        await deleting
        assert await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL") == []
        await nothing_leaks(engines, service, 2)


@pytest.mark.parametrize("function", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_a_statement_that_the_server_cancels(engines: replicas.Engines, function: str) -> None:
    """A statement that the server cancels, or whose connection it ends, is UNAVAILABLE; its request_id works again."""
    async with replicas.replica(engines) as (service, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        request_id = replicas.request_id()
        async with replicas.locked(
            engines, "SELECT FROM after_hours_sessions WHERE user_id = 'ada' FOR UPDATE"
        ) as connection:
            extending = asyncio.create_task(replicas.refused(client.extend("ada", request_id=request_id)))
            while not extending.done():
                for pid in await waiting(engines):
                    await connection.fetch(f"SELECT {function}($1)", pid)
                await asyncio.wait({extending}, timeout=0.1)
        assert says_try_again(await extending)
        extended = await client.extend("ada", request_id=request_id)
        again = await client.extend("ada", request_id=request_id)
        assert extended == again
        step = extended.expire_time.ToDatetime() - started.expire_time.ToDatetime()
        assert step == datetime.timedelta(minutes=15)
        await nothing_leaks(engines, service)
