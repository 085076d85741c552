"""How often a user may start and extend: over all replicas, never on an end, and not without Redis."""

import asyncio
import collections.abc
import contextlib
import datetime
import socket
import typing

import pytest
import redis.asyncio
import replicas

from afterhours_grpc import metrics

LIMIT = {"AFTERHOURS_RATE_LIMIT": "3"}


def limited(told: object) -> bool:
    """Whether a call was refused for the limit, properly."""
    if not isinstance(told, replicas.Refusal) or told.reason != "RATE_LIMITED":
        return False
    delay = told.details["RetryInfo"].retry_delay.ToTimedelta()
    assert told.code == "RESOURCE_EXHAUSTED"
    assert datetime.timedelta() < delay <= datetime.timedelta(minutes=1)
    return True


def skipped() -> float:
    """Read how many calls passed uncounted."""
    return metrics.REGISTRY.get_sample_value("afterhours_rate_limit_skipped_total") or 0.0


@contextlib.asynccontextmanager
async def counted(engines: replicas.Engines) -> collections.abc.AsyncIterator[tuple[replicas.Client, typing.Any, str]]:
    """Start a session of ada's, and remove what is counted; provide a client, Redis, and the key of the counts."""
    async with (
        replicas.replica(engines, **LIMIT) as (_, client),
        redis.asyncio.Redis.from_url(engines.redis_url) as connection,
    ):
        await client.put_profile("ada")
        await client.start("ada")
        [key] = [key async for key in connection.scan_iter("afterhours:rate:*")]
        await connection.delete(key)
        yield client, connection, key


async def limited_after_three(client: replicas.Client) -> None:
    """Extend three times, and be refused the fourth time."""
    for _ in range(3):
        await client.extend("ada")
    assert limited(await replicas.outcome(client.extend("ada")))


async def test_starts_and_extends_count_together_over_replicas(engines: replicas.Engines) -> None:
    """The fourth within a minute is refused whatever it is and wherever; ends, reads and others are not."""
    async with replicas.replica(engines, **LIMIT) as (_, one), replicas.replica(engines, **LIMIT) as (_, other):
        for user_id in ("ada", "bob"):
            await one.put_profile(user_id)
        started = await one.start("ada")
        extended = await other.extend("ada")
        await one.end("ada")
        await other.start("ada")
        for call in (one.extend("ada"), other.extend("ada"), one.start("ada"), other.start("ada")):
            assert limited(await replicas.outcome(call))
        assert (await one.get("ada")).active
        for _ in range(5):
            await replicas.outcome(one.end("ada"))
        assert not (await one.get("ada")).active
        assert (await one.start("bob")).user_id == "bob"
        assert extended.expire_time.ToDatetime() > started.expire_time.ToDatetime()
        rows = await engines.rows("SELECT FROM after_hours_sessions WHERE user_id = 'ada'")
        assert len(rows) == 2


async def test_refused_calls_count_and_come_before_what_they_would_be_refused_for(engines: replicas.Engines) -> None:
    """The limit is asked before the profile, and what is refused after it has counted."""
    async with replicas.replica(engines, **LIMIT) as (_, client):
        for _ in range(3):
            assert (await replicas.refused(client.start("nobody"))).reason == "PROFILE_REQUIRED"
        assert limited(await replicas.outcome(client.start("nobody")))
        assert (await replicas.refused(client.start("nobody", 7))).reason == "INVALID_REQUEST"


async def test_a_replay_is_answered_and_does_not_count(engines: replicas.Engines) -> None:
    """The same request_id again is no further call, before and after the limit is reached, and in flight."""
    async with replicas.replica(engines, **LIMIT) as (_, client):
        await client.put_profile("ada")
        first, second, third = (replicas.request_id() for _ in range(3))
        together = await asyncio.gather(*(client.start("ada", request_id=first) for _ in range(5)))
        assert len({each.id for each in together}) == 1
        for _ in range(5):
            assert await client.start("ada", request_id=first) == together[0]
        one = await client.extend("ada", request_id=second)
        # The last that is allowed, and its duplicates.
        last = await asyncio.gather(*(client.extend("ada", request_id=third) for _ in range(5)))
        assert len({each.SerializeToString() for each in last}) == 1
        assert limited(await replicas.outcome(client.extend("ada", request_id=replicas.request_id())))
        assert await client.extend("ada", request_id=second) == one
        reused = await replicas.refused(client.extend("ada", 1800, request_id=second))
        assert reused.reason == "REQUEST_ID_REUSED"


async def test_a_burst_gets_its_share(engines: replicas.Engines) -> None:
    """Of many extensions at once exactly as many are applied as the limit allows."""
    async with replicas.replica(engines, AFTERHOURS_RATE_LIMIT="20") as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        told = await asyncio.gather(*(replicas.outcome(client.extend("ada")) for _ in range(60)))
        assert sum(map(limited, told)) == 60 - 19
        now = (await client.get("ada")).session
        added = now.expire_time.ToDatetime() - started.expire_time.ToDatetime()
        assert added == 19 * datetime.timedelta(minutes=15)


async def test_the_limit_is_over_after_its_delay(engines: replicas.Engines) -> None:
    """Redis forgets a user's calls within a minute, and knows no user by name."""
    async with replicas.replica(engines, **LIMIT) as (_, client):
        for _ in range(4):
            await replicas.outcome(client.start("ada lovelace"))
        async with redis.asyncio.Redis.from_url(engines.redis_url) as connection:
            keys = [key async for key in connection.scan_iter("*")]
            rates = [key for key in keys if key.startswith(b"afterhours:rate")]
            assert len(rates) == 1
            assert all(key.startswith(b"afterhours:") for key in keys)
            assert 0 < await connection.ttl(rates[0]) <= 60
            assert not [key for key in keys if b"ada" in key]
            # As it will be in a minute.
            await connection.delete(*rates)
        assert (await replicas.refused(client.start("ada lovelace"))).reason == "PROFILE_REQUIRED"


@pytest.mark.parametrize("other", ["text", "words"])
async def test_what_others_write_under_a_user_stops_no_limit(engines: replicas.Engines, other: str) -> None:
    """A value that is not ours under the key of a user is taken away, and counts for nobody."""
    async with counted(engines) as (client, connection, key):
        await (connection.set(key, "a text") if other == "text" else connection.rpush(key, *"words"))
        before = skipped()
        await limited_after_three(client)
        assert skipped() == before


async def test_a_clock_of_redis_that_is_set_back_locks_nobody_out(engines: replicas.Engines) -> None:
    """Calls that were counted in what is now the future count no longer."""
    async with counted(engines) as (client, connection, key):
        seconds, _ = await connection.time()
        await connection.rpush(key, *[str(seconds + 3600)] * 3)
        await limited_after_three(client)


@pytest.mark.parametrize("how", ["away", "silent"])
async def test_without_redis_calls_pass_and_a_metric_says_so(engines: replicas.Engines, how: str) -> None:
    """A Redis that is away, or does not answer, lets every call pass, soon, and each is counted."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if how == "silent" else 1
        await _pass_uncounted(engines, f"redis://127.0.0.1:{port}")


async def _pass_uncounted(engines: replicas.Engines, redis_url: str) -> None:
    async with replicas.replica(engines, **LIMIT, REDIS_URL=redis_url) as (_, client):
        before = skipped()
        async with asyncio.timeout(3):
            for _ in range(6):
                await client.extend("ada")
        assert skipped() - before == 6
