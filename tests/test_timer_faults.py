"""Timers that fire early, late, twice or for nothing, or whose replica fails: sessions end on time all the same."""

import asyncio
import collections.abc
import contextlib
import datetime
import json
import os
import pathlib
import signal
import sys
import time
import uuid

import onlooker
import proxy
import pytest
import replicas
from redis import asyncio as redis

from afterhours_grpc.embedded import redis as embedded

pytestmark = pytest.mark.timed

# So that what closes a session is its timer.
TIMERS_ALONE = {"AFTERHOURS_RECONCILE_INTERVAL": "1h"}
SESSIONS = 100


async def rescored(engines: replicas.Engines, score: float) -> None:
    """Move every job there is, as the claim of another replica or a stranger would."""
    async with redis.Redis.from_url(engines.redis_url) as client:
        # In one step, or a job that is removed meanwhile would come back.
        script = """for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
            redis.call('ZADD', KEYS[1], ARGV[1], id) end"""
        await client.eval(script, 1, onlooker.KEY, str(score))


async def overdue(engines: replicas.Engines, seconds: float) -> bool:
    """Say whether the first session that is open is over by so many seconds; fewer than 0 are to go."""
    rows = await engines.rows(
        "SELECT FROM after_hours_sessions WHERE ended_at IS NULL"
        " HAVING extract(epoch FROM clock_timestamp() - min(expires_at)) >= $1::float8",
        seconds,
    )
    return bool(rows)


async def jobless(engines: replicas.Engines) -> bool:
    """Say whether Redis holds no job."""
    return await onlooker.jobs(engines.redis_url) == {}


async def test_early_and_duplicate_fires_end_each_session_once_and_on_time(engines: replicas.Engines) -> None:
    """Timers that fire 20 times a second, on two replicas, from the start, end no session early and each on time."""

    async def fire() -> None:
        while True:
            await rescored(engines, 0)
            await asyncio.sleep(0.05)

    async with replicas.replica(engines, **TIMERS_ALONE) as (_, client), replicas.replica(engines, **TIMERS_ALONE):
        await onlooker.started(client, SESSIONS)
        firing = asyncio.create_task(fire())
        await onlooker.closed_on_time(engines, SESSIONS)
        firing.cancel()
        await replicas.eventually(lambda: jobless(engines), within=2)


async def test_a_late_fire_is_not_skipped(engines: replicas.Engines) -> None:
    """Timers of a process that was stopped across their time fire within a second once it goes on, however late."""
    async with replicas.process(engines, **TIMERS_ALONE) as (process, client):
        await onlooker.started(client, SESSIONS)
        process.signal(signal.SIGSTOP)
        # APScheduler by itself skips what is more than a second late.
        await replicas.eventually(lambda: overdue(engines, 1.5), within=5)
        process.signal(signal.SIGCONT)
        await onlooker.closed_on_time(engines, SESSIONS, most=1.5 + 1)


async def test_stale_fires_end_nothing_and_go_away(engines: replicas.Engines) -> None:
    """Jobs of sessions that ended, never were, or were extended end nothing, go away, and delay no other."""
    async with replicas.replica(engines, **TIMERS_ALONE) as (_, client):
        for user in ("ended", "extended"):
            await client.put_profile(user)
        ended, extended = await client.start("ended"), await client.start("extended")
        await client.end("ended")
        await client.extend("extended")
        await onlooker.started(client, SESSIONS)
        stale = {f"session:expire:{id}": 1.0 for id in (ended.id, extended.id, *(uuid.uuid4() for _ in range(5000)))}
        async with redis.Redis.from_url(engines.redis_url) as client_of_redis:
            await client_of_redis.zadd(onlooker.KEY, stale)
        await onlooker.closed_on_time(engines, SESSIONS)
        await replicas.eventually(lambda: onlooker.timed(engines), within=2)
        assert set(await onlooker.jobs(engines.redis_url)) == {f"session:expire:{extended.id}"}
        [row] = await engines.rows("SELECT * FROM after_hours_sessions WHERE user_id = 'ended'")
        assert row["end_reason"] == "USER"


async def test_an_acknowledgement_after_an_extension_leaves_its_timer(engines: replicas.Engines) -> None:
    """A claim that is acknowledged after another replica extended the session leaves the timer that it set."""
    async with proxy.Proxy(engines.redis_url) as slow:
        by_way = replicas.Engines(engines.database_url, slow.url)
        async with (
            replicas.replica(engines, **TIMERS_ALONE) as (service, client),
            replicas.replica(by_way, **TIMERS_ALONE),
        ):
            users = [f"extended {n}" for n in range(20)]
            await asyncio.gather(*(client.put_profile(user) for user in users))
            await asyncio.gather(*(client.start(user) for user in users))
            # It claims nothing for a while, so that the other, whose acknowledgements take their time, does.
            service._schedule.ends._scheduler.pause()
            slow.delay_requests = 0.2
            await rescored(engines, 1)

            async def claimed() -> bool:
                return min((await onlooker.jobs(engines.redis_url)).values()) > 1

            await replicas.eventually(claimed, within=5)
            await asyncio.gather(*(client.extend(user) for user in users))
            for _ in range(25):
                assert await onlooker.timed(engines)
                await asyncio.sleep(0.02)
            service._schedule.ends._scheduler.resume()
            await onlooker.started(client, SESSIONS)
            await onlooker.closed_on_time(engines, SESSIONS)


async def test_an_extension_of_a_claimed_session_has_its_timer(engines: replicas.Engines) -> None:
    """Sessions claimed while another writer holds their rows, and then extended, end on time at their new ends."""
    async with replicas.replica(engines, **TIMERS_ALONE) as (_, client):
        users = await onlooker.started(client, 20)
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions FOR UPDATE"):
            await rescored(engines, 1)
            extending = [asyncio.create_task(client.extend(user, 2)) for user in users]
            await asyncio.sleep(0.7)
            assert min((await onlooker.jobs(engines.redis_url)).values()) > 1
        await asyncio.gather(*extending)
        # A lease that was running may be longer than the row was held.
        await replicas.eventually(lambda: onlooker.timed(engines), within=1)
        await onlooker.closed_on_time(engines, 20)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_replica_that_dies_with_leases_delays_nothing(engines: replicas.Engines, fault: signal.Signals) -> None:
    """Sessions claimed by a replica that is killed, or stopped, before it closed them are closed on time by another."""
    async with (
        replicas.process(engines, **TIMERS_ALONE) as (dying, client),
        replicas.process(engines, **TIMERS_ALONE) as (other, client_of_other),
    ):
        await onlooker.started(client, SESSIONS)

        async def claimed() -> bool:
            rows = await engines.rows("SELECT max(expires_at) AS last FROM after_hours_sessions")
            leased = [
                due for due in (await onlooker.jobs(engines.redis_url)).values() if due > rows[0]["last"].timestamp()
            ]
            return len(leased) >= SESSIONS / 2

        await replicas.eventually(lambda: overdue(engines, -0.3), within=5)
        other.signal(signal.SIGSTOP)
        # A timer that fires for a row which somebody holds keeps its claim.
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions FOR UPDATE"):
            await replicas.eventually(claimed, within=2)
            dying.signal(fault)
        other.signal(signal.SIGCONT)
        await onlooker.closed_on_time(engines, SESSIONS)
        await replicas.eventually(lambda: jobless(engines), within=2)

        if fault is signal.SIGSTOP:
            # It goes on where it was: with acknowledgements of claims that are no longer its own.
            again = await client_of_other.start("user 0")
            dying.signal(signal.SIGCONT)
            assert (await client.get("user 0")).session.id == again.id
            assert await onlooker.timed(engines)


@pytest.mark.parametrize("seconds", [5, -5])
async def test_a_clock_that_is_off_the_databases(engines: replicas.Engines, seconds: int) -> None:
    """With the database's clock 5 s before or behind those of the process and of Redis, sessions end on time by it."""
    offset = datetime.timedelta(seconds=seconds)
    async with replicas.replica(engines, **TIMERS_ALONE) as (service, client):
        service.database.clock_offset = offset
        # As the first sweep does, which may have looked already.
        await service._reconciler._clock.measure(service._store)
        await onlooker.started(client, SESSIONS)
        await onlooker.closed_on_time(engines, SESSIONS, offset)


def faked(seconds: int) -> dict[str, str]:
    """Give the environment of a process whose wall clock is off; skip where Debian's libfaketime is not installed."""
    found = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.skip("libfaketime is not installed: apt-get install faketime")
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": f"{seconds:+d}s",
        # A wall clock that is wrong is what happens; a monotonic one is monotonic.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


@contextlib.asynccontextmanager
async def redis_with_a_clock(directory: pathlib.Path, seconds: int) -> collections.abc.AsyncIterator[str]:
    """Run a Redis whose clock is off, and give its URL."""
    program = embedded._executable(embedded._program(), directory)
    connection = directory / "redis.sock"
    settings = ["--port", "0", "--unixsocket", str(connection), "--save", "", "--appendonly", "no"]
    running = await asyncio.create_subprocess_exec(
        program, *settings, env=faked(seconds), stdout=asyncio.subprocess.DEVNULL, cwd=directory
    )
    try:
        url = f"unix://{connection}"

        async def answers() -> bool:
            async with redis.Redis.from_url(url) as client:
                with contextlib.suppress(redis.RedisError):
                    return bool(await client.ping())
            return False

        await replicas.eventually(answers, within=10)
        yield url
    finally:
        running.kill()
        await running.wait()


@pytest.mark.parametrize("seconds", [5, -5])
async def test_a_process_and_a_redis_with_wrong_clocks(
    engines: replicas.Engines, tmp_path: pathlib.Path, seconds: int
) -> None:
    """A whole server whose clock is 5 s off, and a Redis whose clock is 5 s off the other way, end sessions on time."""
    async with redis_with_a_clock(tmp_path, -seconds) as url:
        beside = replicas.Engines(engines.database_url, url)
        async with replicas.process(beside, **TIMERS_ALONE, **faked(seconds)) as (process, client):
            await onlooker.started(client, SESSIONS)
            [row] = await engines.rows("SELECT clock_timestamp() AS at")
            logged = datetime.datetime.fromisoformat(json.loads(process.lines[-1])["timestamp"])
            assert abs((logged - row["at"]).total_seconds() - seconds) < 2
            assert await onlooker.timed(beside)
            await onlooker.closed_on_time(beside, SESSIONS)
            async with redis.Redis.from_url(url) as client_of_redis:
                told, [row] = await client_of_redis.time(), await engines.rows("SELECT clock_timestamp() AS at")
                assert abs(told[0] - row["at"].timestamp() + seconds) < 2


async def test_nonsense_from_redis_stops_no_timer(engines: replicas.Engines) -> None:
    """Replies from Redis that are no replies, until just before the end, kill no scheduler: sessions end on time."""
    async with proxy.Proxy(engines.redis_url) as garbling:
        by_way = replicas.Engines(engines.database_url, garbling.url)
        async with replicas.replica(by_way, **TIMERS_ALONE) as (service, client):
            await onlooker.started(client, SESSIONS)
            garbling.garble_replies = True
            await replicas.eventually(lambda: overdue(engines, -0.2), within=5)
            assert await client.health() == "SERVING"
            garbling.garble_replies = False
            await onlooker.closed_on_time(engines, SESSIONS)
            await replicas.eventually(lambda: jobless(engines), within=3)
            assert not service.failed.is_set()


# A server whose scheduler's thread ends, wherever it is, at SIGUSR1.
_RIGGED = """
import ctypes, signal, threading
from afterhours_grpc import __main__

def die(*_):
    scheduler = [each for each in threading.enumerate() if each.name == "APScheduler"][WHICH]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(scheduler.ident), ctypes.py_object(SystemExit))

signal.signal(signal.SIGUSR1, die)
__main__.main()
"""


@pytest.mark.parametrize("which", [0, 1], ids=["of ends", "of warnings"])
async def test_a_process_whose_scheduler_dies_exits_and_others_fire_its_timers(
    engines: replicas.Engines, which: int
) -> None:
    """When the scheduler's thread dies the process exits with status 1, and another replica ends sessions on time."""
    async with replicas.replica(engines, **TIMERS_ALONE):
        rigged = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"WHICH = {which}\n{_RIGGED}",
            "serve",
            env={"PATH": os.environ["PATH"], **engines.environment(**TIMERS_ALONE)},
            stdout=asyncio.subprocess.PIPE,
        )
        assert rigged.stdout
        try:
            line = ""
            async with asyncio.timeout(30):
                while not line.startswith("listening on "):
                    line = (await rigged.stdout.readline()).decode().strip()
            client = replicas.Client(line.removeprefix("listening on "))
            await onlooker.started(client, SESSIONS)
            rigged.send_signal(signal.SIGUSR1)
            await onlooker.closed_on_time(engines, SESSIONS)
            await client.close()
            async with asyncio.timeout(15):
                await rigged.stdout.read()
                assert await rigged.wait() == 1
        finally:
            if rigged.returncode is None:
                rigged.kill()
                await rigged.wait()


async def test_a_scheduler_that_hangs_ends_the_process(engines: replicas.Engines) -> None:
    """A scheduler's thread that does not come back for a look within 5 s is as good as dead."""
    async with replicas.replica(engines, **TIMERS_ALONE) as (service, _):
        with service._schedule.ends._scheduler._jobstores_lock:
            async with asyncio.timeout(8):
                await service.failed.wait()


# A server for which names are not resolved for 10 s, as with a name server that is silent.
_NAMELESS = """
import socket, time
from afterhours_grpc import __main__

resolve = socket.getaddrinfo

def silent(host, *arguments, **options):
    if host != "redis.test":
        return resolve(host, *arguments, **options)
    time.sleep(10)
    raise socket.gaierror(socket.EAI_AGAIN, "no answer")

socket.getaddrinfo = silent
__main__.main()
"""


async def test_a_silent_name_server(engines: replicas.Engines) -> None:
    """Without Redis and an answer of the name server a process serves, ends sessions, and exits in time at SIGTERM.

    Nothing that is resolved, or done in another thread, waits for the name of Redis.
    """
    settings = {
        "REDIS_URL": "redis://redis.test",
        "DATABASE_URL": engines.database_url.replace("127.0.0.1", "localhost"),
        "AFTERHOURS_RECONCILE_INTERVAL": "1s",
        "AFTERHOURS_RATE_LIMIT": "1000",
        "AFTERHOURS_DRAIN": "8s",
    }
    running = await replicas.Process(engines.environment(**settings), program=("-c", _NAMELESS)).start()
    try:
        async with await running.client() as client:
            # Longer than a scheduler may be silent, and until as many names as there are threads would be waited for.
            for _ in range(3):
                await onlooker.started(client, SESSIONS)
                await onlooker.closed_on_time(engines, SESSIONS, most=2)
                await engines.rows("DELETE FROM after_hours_sessions")
            assert await client.health() == "SERVING"
        told = time.monotonic()
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0
        assert time.monotonic() - told < 5
    finally:
        await running.stop()


async def test_postgres_answers_after_a_lease(engines: replicas.Engines) -> None:
    """Jobs whose statement takes longer than a lease are done, and gone: replicas do not claim them for ever."""
    settings = {**TIMERS_ALONE, "AFTERHOURS_WARNING_LEAD": "1s"}
    async with replicas.replica(engines, **settings) as (_, client), replicas.replica(engines, **settings):
        await onlooker.started(client, SESSIONS)
        await engines.rows("""
            CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.7); RETURN NULL; END'
        """)
        await engines.rows("""
            CREATE TRIGGER slowly AFTER UPDATE ON after_hours_sessions FOR EACH STATEMENT EXECUTE FUNCTION slowly()
        """)
        await onlooker.closed_on_time(engines, SESSIONS, most=3)

        async def settled() -> bool:
            async with redis.Redis.from_url(engines.redis_url) as client_of_redis:
                return not await client_of_redis.exists("afterhours:jobs", "afterhours:warnings")

        await replicas.eventually(settled, within=4)


async def test_a_session_that_cannot_be_closed_delays_no_other(engines: replicas.Engines) -> None:
    """A row that Postgres fails to update keeps no other session from being closed by its timer, on time."""
    async with replicas.replica(engines, **TIMERS_ALONE) as (_, client):
        await onlooker.started(client, SESSIONS)
        await damage(engines)
        await onlooker.closed_on_time(engines, SESSIONS - 1)
        await engines.rows("DROP TRIGGER fail ON after_hours_sessions")
        await replicas.eventually(lambda: jobless(engines), within=2)


async def test_a_session_that_cannot_be_closed_stops_no_sweep(engines: replicas.Engines) -> None:
    """Nor does it keep the sweep from closing the others, in batches, or a server from starting."""
    alone = {"REDIS_URL": "redis://127.0.0.1:1", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with replicas.replica(engines, **alone) as (_, client):
        await onlooker.started(client, SESSIONS)
        await damage(engines)
        await onlooker.closed_on_time(engines, SESSIONS - 1, most=2)
    await engines.rows("UPDATE after_hours_sessions SET ended_at = NULL, end_reason = NULL WHERE user_id <> 'user 7'")
    async with replicas.replica(engines, **alone) as (_, client):
        assert await client.health() == "SERVING"
        rows = await engines.rows("SELECT user_id FROM after_hours_sessions WHERE ended_at IS NULL")
        assert [row["user_id"] for row in rows] == ["user 7"]


async def damage(engines: replicas.Engines) -> None:
    """Make Postgres fail to update the session of user 7."""
    await engines.rows("CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''damaged''; END'")
    await engines.rows("""
        CREATE TRIGGER fail BEFORE UPDATE ON after_hours_sessions FOR EACH ROW WHEN (OLD.user_id = 'user 7')
        EXECUTE FUNCTION fail()
    """)


async def test_a_process_that_was_stopped_goes_on(engines: replicas.Engines) -> None:
    """A process that was stopped as a whole ends what is overdue at once.

    It takes neither its scheduler for dead nor Postgres for away, which it was checking when it was stopped.
    """
    async with replicas.process(engines, **TIMERS_ALONE) as (process, client):
        await onlooker.started(client, 3)
        async with replicas.locked(engines, "LOCK TABLE after_hours_sessions"):
            await replicas.eventually(engines.in_flight, within=3)
            process.signal(signal.SIGSTOP)
        # Longer than a scheduler may be silent.
        await replicas.eventually(lambda: overdue(engines, 4.5), within=10)
        process.signal(signal.SIGCONT)
        await replicas.eventually(lambda: jobless(engines), within=2)
        # Two more looks of the watchdog.
        for _ in range(18):
            assert await client.health() == "SERVING"
            await asyncio.sleep(0.1)
        process.signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_shutdown_takes_no_leases(engines: replicas.Engines) -> None:
    """The scheduler's last look at a shutdown claims nothing that is due, and others need not wait for a lease."""
    async with replicas.replica(engines, **TIMERS_ALONE) as (service, client):
        await onlooker.started(client, 3, seconds=900)
        # No look but the last one comes between the fire and the end.
        service._schedule.ends._scheduler.pause()
        await rescored(engines, 1)
        await service._schedule.ends.stop()
        assert set((await onlooker.jobs(engines.redis_url)).values()) == {1}


async def test_a_replica_that_stops_when_sessions_end_delays_none(engines: replicas.Engines) -> None:
    """Sessions that end while one of two replicas shuts down are closed on time, and it exits with status 0."""
    async with (
        replicas.process(engines, **TIMERS_ALONE) as (leaving, client),
        replicas.process(engines, **TIMERS_ALONE),
    ):
        await onlooker.started(client, SESSIONS)
        # A shutdown takes half a second until its scheduler stops.
        await replicas.eventually(lambda: overdue(engines, -0.5), within=5)
        leaving.signal(signal.SIGTERM)
        await onlooker.closed_on_time(engines, SESSIONS)
        assert await leaving.wait() == 0
