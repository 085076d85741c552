"""Sessions end by themselves, on time, and their timers say so."""

import asyncio
import dataclasses
import datetime
import typing

import onlooker
import proxy
import pytest
import replicas
from redis import asyncio as redis

from afterhours_grpc.expiry import clock

pytestmark = pytest.mark.alone

KEY = "afterhours:jobs"


async def jobs(engines: replicas.Engines) -> dict[str, float]:
    """Give every job and its due time."""
    async with redis.Redis.from_url(engines.redis_url, decode_responses=True) as client:
        found: typing.Any = await client.zrange(KEY, 0, -1, withscores=True)
        return dict(found)


async def ended(engines: replicas.Engines, count: int) -> bool:
    """Say whether `count` sessions have ended."""
    rows = await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NOT NULL")
    return len(rows) == count


async def test_a_session_ends_by_itself(engines: replicas.Engines) -> None:
    """A session of 2 s is closed by its timer at most 1 s late, with ended_at = expires_at, as EXPIRED."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada", 2)
        await asyncio.sleep(0.9)
        await asyncio.sleep(0.9)
        assert (await client.get("ada")).active
        assert await ended(engines, 0)
        await replicas.eventually(lambda: ended(engines, 1), within=1.2)
        [row] = await engines.rows("SELECT * FROM after_hours_sessions")
        assert row["ended_at"] == row["expires_at"]
        assert row["end_reason"] == "EXPIRED"
        assert str(row["id"]) == started.id
        assert not (await client.get("ada")).active

        async def settled() -> bool:
            return await jobs(engines) == {}

        await replicas.eventually(settled, within=1)


async def test_an_active_session_has_exactly_one_job(engines: replicas.Engines) -> None:
    """A start sets the session's one job at its expire_time, an extension moves it, an end removes it."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        job = f"session:expire:{started.id}"
        assert await jobs(engines) == {job: started.expire_time.ToMicroseconds() / 1e6}
        extended = await client.extend("ada")
        assert await jobs(engines) == {job: extended.expire_time.ToMicroseconds() / 1e6}
        await client.end("ada")
        assert await jobs(engines) == {}


async def test_a_lost_job_is_back_within_a_sweep(engines: replicas.Engines) -> None:
    """Jobs that were flushed are back within a sweep, and jobs of sessions that ended are dropped by it."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        stale = "session:expire:00000000-0000-4000-8000-000000000000"
        async with redis.Redis.from_url(engines.redis_url) as client_of_redis:
            await client_of_redis.flushall()
            await client_of_redis.zadd(KEY, {stale: 4e9, "what is this": 4e9})

        async def mended() -> bool:
            due = started.expire_time.ToMicroseconds() / 1e6
            return await jobs(engines) == {f"session:expire:{started.id}": due}

        await replicas.eventually(mended, within=3)


MANY = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, warn_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT 'user ' || n, now(), now() + interval '1 hour' + n * interval '0.1 s', now() + interval '50 min', 0, 0, 0, 0,
    1000, 1, 1
FROM generate_series(1, $1::int) AS n
"""


async def test_jobs_of_many_sessions_are_mended_within_a_sweep(engines: replicas.Engines) -> None:
    """Of 12,000 sessions, one whose job, or warning, was lost, moved or doubled has it back within one interval."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="2s"):
        await engines.rows(MANY, 12_000)
        rows = await engines.rows("SELECT id FROM after_hours_sessions ORDER BY expires_at DESC")
        async with redis.Redis.from_url(engines.redis_url, decode_responses=True) as client:

            async def mended() -> bool:
                return [await client.zcard(key) for key in (KEY, "afterhours:warnings")] == [12_000, 12_000]

            # It was empty: all at once.
            await replicas.eventually(mended, within=10)
            lost, moved, warning = (str(rows[n]["id"]) for n in (100, 5000, 9000))
            at = await client.zscore(KEY, f"session:expire:{moved}")
            assert at
            stale = "session:expire:00000000-0000-4000-8000-000000000000"
            await client.zrem(KEY, f"session:expire:{lost}")
            await client.zadd(KEY, {f"session:expire:{moved}": at + 400, stale: at - 400})
            await client.zrem("afterhours:warnings", f"session:warn:{warning}")

            async def as_before() -> bool:
                found = await client.zmscore(KEY, [f"session:expire:{id}" for id in (lost, moved)])
                return await mended() and None not in found and found[1] == at

            # Twice the interval and more, for a loaded machine; in turns it would be twelve.
            await replicas.eventually(as_before, within=5)


@pytest.mark.parametrize("mark", ["nonsense", "9e18", "-inf", "nan"])
async def test_what_others_write_stops_no_sweep(engines: replicas.Engines, mark: str) -> None:
    """Whatever somebody else leaves where replicas note that they mend the timers, they are mended."""
    async with (
        replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (_, client),
        redis.Redis.from_url(engines.redis_url) as client_of_redis,
    ):
        await client.put_profile("ada")
        started = await client.start("ada")
        await client_of_redis.set("afterhours:mended", mark)
        await client_of_redis.zrem(KEY, f"session:expire:{started.id}")

        async def mended() -> bool:
            return await client_of_redis.zcard(KEY) == 1

        await replicas.eventually(mended, within=2)


@pytest.mark.parametrize("minutes", [-5, 5])
async def test_a_job_that_moved_is_back_within_a_sweep(engines: replicas.Engines, minutes: int) -> None:
    """A job that is due earlier or later than its session is put right by a sweep, long before it fires."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        job, due = f"session:expire:{started.id}", started.expire_time.ToMicroseconds() / 1e6
        async with redis.Redis.from_url(engines.redis_url) as client_of_redis:
            await client_of_redis.zadd(KEY, {job: due + 60 * minutes})

        async def mended() -> bool:
            return await jobs(engines) == {job: due}

        await replicas.eventually(mended, within=3)


async def test_a_timer_that_fires_early_is_set_again(engines: replicas.Engines) -> None:
    """A timer that fires early ends nothing, and is due again at the session's expire_time."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        job, due = f"session:expire:{started.id}", started.expire_time.ToMicroseconds() / 1e6
        async with redis.Redis.from_url(engines.redis_url) as client_of_redis:
            await client_of_redis.zadd(KEY, {job: 1.0})

        async def set_again() -> bool:
            return await jobs(engines) == {job: due}

        await replicas.eventually(set_again, within=2)
        assert (await client.get("ada")).active


async def test_two_replicas_share_the_work(engines: replicas.Engines) -> None:
    """Sessions started on one replica are closed once, on time, while both fire and one is gone."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, one):
        async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, two):
            users = [f"user {n}" for n in range(200)]
            await asyncio.gather(*(two.put_profile(user) for user in users))
            await asyncio.gather(*(two.start(user, 2) for user in users))
        await replicas.eventually(lambda: ended(engines, 200), within=4)
        rows = await engines.rows("SELECT * FROM after_hours_sessions WHERE ended_at <> expires_at")
        assert not rows
        assert not (await one.get("user 1")).active


async def test_without_redis_everything_goes_on(engines: replicas.Engines) -> None:
    """With a Redis that nobody reaches, the calls are OK and a session ends within the interval + 1 s."""
    async with replicas.replica(engines, REDIS_URL="redis://127.0.0.1:1", AFTERHOURS_RECONCILE_INTERVAL="1s") as (
        _,
        client,
    ):
        assert await client.health() == "SERVING"
        await client.put_profile("ada")
        started = await client.start("ada", 2)
        await replicas.eventually(lambda: ended(engines, 1), within=2 + 1 + 1)
        again = await client.start("ada")
        assert again.id != started.id
        await client.extend("ada")
        await client.end("ada")


async def test_a_clock_that_is_set_between_two_sweeps(
    engines: replicas.Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is measured again however rarely the sweep runs: timers fire by the database's clock of now."""
    monkeypatch.setattr(clock, "_LONGEST_AGE", 0.5, raising=False)
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (service, client):
        await client.put_profile("ada")
        await client.start("ada", 900)
        service.database.clock_offset = datetime.timedelta(minutes=20)
        await replicas.eventually(lambda: ended(engines, 1), within=3)


async def test_a_sweep_among_calls_leaves_timers_as_they_are(engines: replicas.Engines) -> None:
    """A sweep whose Redis is slow brings back no timer of a session that ended meanwhile, nor one that was moved."""
    users = [f"user {number}" for number in range(40)]
    async with (
        proxy.Proxy(engines.redis_url) as slow,
        replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, client),
    ):
        await asyncio.gather(*(client.put_profile(user) for user in users))
        await asyncio.gather(*(client.start(user) for user in users))
        slow.delay_requests = 0.3
        by_way = dataclasses.replace(engines, redis_url=slow.url)
        async with replicas.replica(by_way, AFTERHOURS_RECONCILE_INTERVAL="1h"):
            for number, user in enumerate(users):
                await (client.end(user) if number % 2 else client.extend(user))
                await asyncio.sleep(0.05)
            await replicas.eventually(lambda: onlooker.timed(engines), within=2)


async def test_a_clock_moved_forward_expires_what_is_due(engines: replicas.Engines) -> None:
    """The database's clock alone decides: moved forward, what is due by it is closed."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (service, client):
        for user in ("ada", "bob"):
            await client.put_profile(user)
        await client.start("ada", 900)
        await client.start("bob", 1800)
        service.database.clock_offset = datetime.timedelta(minutes=20)
        await replicas.eventually(lambda: ended(engines, 1), within=3)
        assert (await client.get("bob")).active
