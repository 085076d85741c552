"""What one user sends takes room and time of no other user, and reads of one user share a read."""

import asyncio
import collections
import collections.abc
import contextlib
import dataclasses
import typing

import proxy
import pytest
import replicas
from afterhours.v1 import profile_service_pb2, session_service_pb2

pytestmark = [pytest.mark.store, pytest.mark.alone]

# Calls of one kind of one user that may wait.
PER_USER = 64
# Locks that hold up the calls of mallory.
ROW = "SELECT FROM after_hours_sessions WHERE user_id = 'mallory' FOR UPDATE"
PROFILE = "SELECT FROM after_hours_profiles WHERE user_id = 'mallory' FOR UPDATE"

Call = collections.abc.Awaitable[typing.Any]


def send(calls: collections.abc.Iterable[Call]) -> list[asyncio.Task[typing.Any]]:
    """Send calls at once."""
    return [asyncio.create_task(replicas.outcome(call)) for call in calls]


def reasons(outcomes: collections.abc.Iterable[object]) -> collections.Counter[str]:
    """Count the reasons of refusals; the others count as OK."""
    return collections.Counter(each.reason if isinstance(each, replicas.Refusal) else "OK" for each in outcomes)


async def answered(tasks: list[asyncio.Task[typing.Any]], count: int) -> list[typing.Any]:
    """Wait until so many of the calls are answered, and return their outcomes."""

    async def enough() -> bool:
        return sum(task.done() for task in tasks) >= count

    await replicas.eventually(enough, within=4)
    return [task.result() for task in tasks if task.done()]


@contextlib.asynccontextmanager
async def behind_proxies(
    engines: replicas.Engines, **settings: str
) -> collections.abc.AsyncIterator[tuple[replicas.Client, proxy.Proxy, proxy.Proxy]]:
    """Run a server whose Postgres and Redis answer later, once a test says by how much."""
    async with proxy.Proxy(engines.database_url) as postgres, proxy.Proxy(engines.redis_url) as redis:
        through = dataclasses.replace(engines, database_url=postgres.url, redis_url=redis.url)
        async with replicas.replica(through, **settings) as (_, client):
            yield client, postgres, redis
            postgres.delay_replies = redis.delay_replies = 0


@pytest.mark.parametrize("method", ["start", "extend", "end"])
async def test_the_65th_waiting_call_of_a_user_is_overloaded(engines: replicas.Engines, method: str) -> None:
    """Past 64 waiting calls of one kind a user is OVERLOADED, at once and alone, and those calls are not applied."""
    async with replicas.replica(engines) as (_, client):
        for user in ("ada", "mallory"):
            await client.put_profile(user)
            if method != "start":
                await client.start(user)
        call = getattr(client, method)
        async with replicas.locked(engines, PROFILE if method == "start" else ROW):
            calls = send(call("mallory") for _ in range(100))
            refused = await answered(calls, 100 - PER_USER)
            assert reasons(refused) == {"OVERLOADED": 100 - PER_USER}
            assert {each.code for each in refused} == {"RESOURCE_EXHAUSTED"}
            assert {each.details["RetryInfo"].retry_delay.ToMilliseconds() for each in refused} == {500}
            # Neither another user nor another method of the same one.
            assert (await call("ada", timeout=2)).user_id == "ada"
            assert (await client.get("mallory", timeout=2)).active == (method != "start")
        told = reasons(await asyncio.gather(*calls))
        applied = {"start": 1, "extend": PER_USER, "end": 1}[method]
        assert (told["OK"], told["OVERLOADED"]) == (applied, 100 - PER_USER)
        assert told.total() - applied == told["OVERLOADED"] + told["SESSION_ALREADY_ACTIVE"] + told["NO_ACTIVE_SESSION"]
        [row] = await engines.rows(
            "SELECT extract(epoch FROM expires_at - started_at) / 900 AS quarters"
            " FROM after_hours_sessions WHERE user_id = 'mallory'"
        )
        assert row["quarters"] == (1 + PER_USER if method == "extend" else 1)


async def test_calls_that_went_away_do_not_count(engines: replicas.Engines) -> None:
    """A user whose waiting calls were cancelled or came too late may send as many others."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("mallory")
        await client.start("mallory")
        async with replicas.locked(engines, ROW):
            gone = send(client.extend("mallory", timeout=0.3) for _ in range(PER_USER // 2))
            cancelled = [asyncio.create_task(client.extend("mallory")) for _ in range(PER_USER // 2)]
            await asyncio.wait(gone)
            for each in cancelled:
                each.cancel()
            await asyncio.wait(cancelled)
            # One that is in flight may count until its statement gave up the lock.
            calls = send(client.extend("mallory") for _ in range(PER_USER - 1))
        assert reasons(await asyncio.gather(*calls)) == {"OK": PER_USER - 1}


async def test_a_flood_of_one_user_fills_nobody_elses_queue(engines: replicas.Engines) -> None:
    """With more ends of one user than the service has room for, another user ends a session."""
    async with replicas.replica(engines) as (service, client), contextlib.AsyncExitStack() as stack:
        for user in ("ada", "mallory"):
            await client.put_profile(user)
            await client.start(user)
        connections = [replicas.Client(service.address) for _ in range(5)]
        for each in connections:
            stack.push_async_callback(each.close)
        async with replicas.locked(engines, ROW):
            calls = send(each.end("mallory") for _ in range(900) for each in connections)
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            assert (await client.end("ada")).user_id == "ada"
        told = reasons(await asyncio.gather(*calls))
        assert told["OVERLOADED"] > 2000
        assert told.keys() <= {"OK", "OVERLOADED", "NO_ACTIVE_SESSION", "STORE_UNAVAILABLE"}


async def test_a_gateway_sends_for_many_users(engines: replicas.Engines) -> None:
    """Of one caller who sends for many users as many calls wait as the service has room for."""
    async with replicas.replica(engines) as (_, client):
        async with replicas.locked(engines, "LOCK TABLE after_hours_sessions IN ACCESS EXCLUSIVE MODE"):
            calls = send(client.end(f"user {n}") for n in range(500))
            await replicas.eventually(engines.in_flight, within=3)
        assert reasons(await asyncio.gather(*calls)) == {"NO_ACTIVE_SESSION": 500}


async def test_one_request_id_with_many_users(engines: replicas.Engines) -> None:
    """Calls with the same request_id run one after the other, and at most 64 wait, whatever users they are about."""
    async with replicas.replica(engines) as (_, client):
        for user in ("ada", "mallory"):
            await client.put_profile(user)
            await client.start(user)
        request_id = replicas.request_id()
        async with replicas.locked(engines, ROW):
            calls = send([client.end("mallory", request_id=request_id)])
            await replicas.eventually(engines.in_flight, within=3)
            calls += send(client.end(f"user {n}", request_id=request_id) for n in range(99))
            refused = await answered(calls, 100 - PER_USER)
            assert reasons(refused) == {"OVERLOADED": 100 - PER_USER}
            assert (await client.end("ada", timeout=2)).user_id == "ada"
        told = reasons(await asyncio.gather(*calls))
        assert told == {"OK": 1, "REQUEST_ID_REUSED": PER_USER - 1, "OVERLOADED": 100 - PER_USER}


async def test_lists_of_one_caller_hold_up_no_others(engines: replicas.Engines) -> None:
    """Of one user at most 64 lists wait, and another user's list is read meanwhile."""
    async with behind_proxies(engines) as (client, postgres, _):

        async def history(user_id: str) -> session_service_pb2.ListSessionsResponse:
            request = session_service_pb2.ListSessionsRequest(user_id=user_id)
            return await client.sessions.ListSessions(request, timeout=10)

        await client.put_profile("ada")
        await client.start("ada")
        postgres.delay_replies = 0.2
        calls = send(history("mallory") for _ in range(100))
        refused = await answered(calls, 100 - PER_USER)
        assert reasons(refused)["OVERLOADED"] == 100 - PER_USER
        assert len((await history("ada")).sessions) == 1
        # Beside one list of mallory's, and not behind 64.
        assert sum(not call.done() for call in calls) > PER_USER // 2
        postgres.delay_replies = 0
        await asyncio.gather(*calls)


async def test_gets_of_one_user_share_a_read(engines: replicas.Engines) -> None:
    """Many gets of one user are answered by one read, which is not older than any of them."""
    async with behind_proxies(engines) as (client, postgres, _):
        await client.put_profile("ada")
        postgres.delay_replies = 0.3
        first = asyncio.create_task(client.get("ada"))
        hurried = client.sessions.GetSession(
            session_service_pb2.GetSessionRequest(user_id="ada"),
            # As metadata, so that only the server minds it, and what the server says is heard.
            metadata=(("grpc-timeout", "200m"),),
        )
        assert (await replicas.refused(hurried)).reason == "DEADLINE_EXCEEDED"
        assert not (await first).active
        postgres.delay_replies = 0.1
        before = send(client.get("ada") for _ in range(200))
        await client.start("ada")
        after = send(client.get("ada") for _ in range(200))
        assert reasons(await asyncio.gather(*before)) == {"OK": 200}
        assert all(each.active for each in await asyncio.gather(*after))


async def test_reads_of_one_profile_are_shared(engines: replicas.Engines) -> None:
    """Many reads of one profile are answered by one read, which is not older than any of them."""
    async with behind_proxies(engines) as (client, postgres, _):
        postgres.delay_replies = 0.1
        request = profile_service_pb2.GetProfileRequest(user_id="ada")
        before = send(client.profiles.GetProfile(request) for _ in range(200))
        await client.put_profile("ada")
        after = send(client.profiles.GetProfile(request) for _ in range(200))
        assert reasons(await asyncio.gather(*before)).keys() <= {"OK", "PROFILE_NOT_FOUND"}
        assert reasons(await asyncio.gather(*after)) == {"OK": 200}


async def test_request_ids_of_one_caller_are_looked_up_together(engines: replicas.Engines) -> None:
    """With a rate limit, starts of one caller for many users share the look-up of their request_ids."""
    users = [f"user {n}" for n in range(300)]
    await engines.rows(
        "INSERT INTO after_hours_profiles SELECT user_id, NULL, true, true FROM unnest($1::text[]) AS user_id", users
    )
    async with behind_proxies(engines, AFTERHOURS_RATE_LIMIT="10") as (client, postgres, _):
        postgres.delay_replies = 0.05
        calls = send(client.start(user, request_id=replicas.request_id()) for user in users)
        assert reasons(await asyncio.gather(*calls)) == {"OK": len(users)}


async def test_one_users_calls_do_not_hold_up_the_rate_limit(engines: replicas.Engines) -> None:
    """While Redis is slow and a user sends many calls, another user waits for Redis once."""
    async with behind_proxies(engines, AFTERHOURS_RATE_LIMIT="10") as (client, _, redis):
        for user in ("ada", "mallory"):
            await client.put_profile(user)
            await client.start(user)
        redis.delay_replies = 0.1
        calls = send(client.extend("mallory") for _ in range(300))
        await answered(calls, 300 - PER_USER)
        await client.extend("ada")
        # Beside one of mallory's calls, and not behind 64.
        assert sum(not call.done() for call in calls) > PER_USER // 2
        redis.delay_replies = 0
        assert reasons(await asyncio.gather(*calls)).keys() <= {"OK", "RATE_LIMITED", "OVERLOADED"}
