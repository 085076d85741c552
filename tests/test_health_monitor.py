"""What the health monitor makes of a Postgres that is read-only, busy or odd, and what survives a task's death."""

import asyncio
import collections.abc
import typing

import asyncpg
import pytest
import replicas
import structlog
import test_health_watch
from grpc_health.v1 import health_pb2

from afterhours_grpc import background, health_monitor
from afterhours_grpc.store import database, store

pytestmark = pytest.mark.timed

_Status = health_pb2.HealthCheckResponse


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second take a tenth of one."""
    monkeypatch.setattr(health_monitor, "_INTERVAL", 0.1)
    monkeypatch.setattr(health_monitor, "_PATIENCE", 0.5)


async def _becomes(client: replicas.Client, status: str) -> None:
    async def has() -> bool:
        return await client.health() == status

    await replicas.eventually(has, within=10)


async def _run(engines: replicas.Engines, sql: str) -> None:
    """Run SQL as an administrator, on another database."""
    url, _, name = engines.database_url.rpartition("/")
    connection = await asyncpg.connect(url + "/postgres")
    try:
        await connection.execute(sql.format(name=name))
    finally:
        await connection.close()


async def test_a_database_that_takes_no_writes(engines: replicas.Engines) -> None:
    """A read-only database is NOT_SERVING, for all watchers that read, until it takes writes again."""
    async with replicas.replica(engines) as (service, client), test_health_watch.stuck(service.address):
        watching = test_health_watch.watch(client)
        assert (await watching.read()).status == _Status.SERVING
        await _run(engines, "ALTER DATABASE {name} SET default_transaction_read_only = on")
        await _run(engines, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        async with asyncio.timeout(10):
            assert (await watching.read()).status == _Status.NOT_SERVING
        assert await client.health("") == "SERVING"
        await _run(engines, "ALTER DATABASE {name} RESET default_transaction_read_only")
        await _run(engines, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        async with asyncio.timeout(10):
            assert (await watching.read()).status == _Status.SERVING


async def test_an_answer_that_nobody_expected(engines: replicas.Engines) -> None:
    """A check that fails for another reason is a failed check, logged without its text, and the monitor goes on."""
    async with replicas.replica(engines) as (_, client):
        with structlog.testing.capture_logs() as logged:
            await engines.rows("ALTER TABLE after_hours_sessions RENAME TO elsewhere")
            await _becomes(client, "NOT_SERVING")
            await engines.rows("ALTER TABLE elsewhere RENAME TO after_hours_sessions")
            await _becomes(client, "SERVING")
        [failed, *_] = [each for each in logged if each["event"] == "health_check_failed"]
        assert failed["sqlstate"] == "42P01"
        assert "does not exist" not in str(logged)


async def test_what_callers_do_is_not_held_against_postgres(
    engines: replicas.Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health stays SERVING while slow statements take every connection, and while a lock holds back the check."""
    monkeypatch.setattr(health_monitor, "_INTERVAL", 0.3)
    sleep = database.Statement("SELECT pg_sleep(:seconds)")
    async with replicas.replica(engines) as (service, client):
        with structlog.testing.capture_logs() as logged:
            slow = [asyncio.create_task(service.database.fetch(sleep, seconds=0.2)) for _ in range(16 * 8)]
            await asyncio.gather(*slow)
            async with replicas.locked(engines, "LOCK TABLE after_hours_sessions"):
                await asyncio.sleep(1)
                assert await client.health() == "SERVING"
        assert not [each for each in logged if each["event"] == "postgres_unreachable"]


async def test_a_monitor_that_died_remembers(engines: replicas.Engines) -> None:
    """A monitor whose task died after NOT_SERVING says SERVING again, once what is overdue has been closed."""
    told: list[bool] = []
    closed = 0

    async def close_overdue() -> None:
        nonlocal closed
        closed += 1

    unreachable = database.Database("postgresql://nobody@127.0.0.1:1/nothing")
    async with replicas.replica(engines) as (service, _):
        monitor = health_monitor.HealthMonitor(
            unreachable, store.Store(unreachable), close_overdue, lambda: True, told.append, asyncio.Event()
        )
        await _until(monitor, lambda: told[-1:] == [False])
        monitor._store = store.Store(service.database)
        await _until(monitor, lambda: told[-1:] == [True])
    assert closed == 1


async def _until(monitor: health_monitor.HealthMonitor, holds: collections.abc.Callable[[], bool]) -> None:
    """Run a monitor in a task of its own until something holds."""
    running = asyncio.create_task(monitor.run())
    try:

        async def does() -> bool:
            return holds()

        await replicas.eventually(does, within=10)
    finally:
        running.cancel()


class _Unprintable(Exception):
    """Cannot even be described."""

    @property
    def sqlstate(self) -> typing.NoReturn:
        raise RuntimeError


@pytest.mark.parametrize("death", [ValueError("latitude 52.516275"), asyncio.CancelledError(), _Unprintable()])
async def test_a_task_that_dies_is_restarted(death: BaseException) -> None:
    """A background task is restarted at once, then after longer pauses, whatever it died of, until it is stopped."""
    runs: list[float] = []
    ran = asyncio.Event()

    async def run() -> None:
        runs.append(asyncio.get_running_loop().time())
        if len(runs) == 4:
            ran.set()
            await asyncio.Event().wait()
        raise death

    tasks = background.Background()
    with structlog.testing.capture_logs() as logged:
        task = tasks.keep("doomed", run)
        async with asyncio.timeout(10):
            await ran.wait()
        await tasks.stop()
    assert task.cancelled()
    assert runs[1] - runs[0] < 0.1
    assert runs[3] - runs[2] > 0.1
    assert "52.516275" not in str(logged)
