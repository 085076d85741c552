"""10,000 sessions due in one second: how late each is closed, and what a GetSession takes meanwhile.

`make bench-storm`. The server is a process of `afterhours-grpc serve` on embedded engines with default durability; the
load comes from this process, on the same machine. A row's closing is the commit that closed it, as Postgres dates it
(track_commit_timestamp), so that lateness is by the database's clock alone.
"""

import asyncio
import collections.abc
import contextlib
import datetime
import os
import pathlib
import sys
import tempfile
import time

import asyncpg
import grpc
import typer
from afterhours.v1 import session_service_pb2, session_service_pb2_grpc

from afterhours_grpc.embedded import postgres, redis
from afterhours_grpc.store import schema

_INSERT = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT 'user ' || n, now(), now() + $2 + n * interval '1 second' / $1::int, 0, 0, 0, 0, 1000, 1, 1
FROM generate_series(1, $1::int) AS n
"""
_LATENESS = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin) - expires_at)::float8 AS late
FROM after_hours_sessions WHERE ended_at = expires_at ORDER BY late
"""
# Seconds between two calls of GetSession.
_PACE = 0.01


def main(sessions: int = 10_000, lead: float = 8.0, rounds: int = 3) -> None:
    """Run rounds of SESSIONS due within one second, LEAD seconds after they were stored, and print their figures."""
    with tempfile.TemporaryDirectory(prefix="afterhours-storm-") as folder:
        directory = pathlib.Path(folder)
        with (
            postgres.Postgres(directory / "postgres", settings={"track_commit_timestamp": "on"}) as truth,
            redis.Redis(directory / "redis") as timers,
        ):
            asyncio.run(schema.migrate(truth.url))
            for number in range(rounds):
                figures = asyncio.run(_round(truth.url, timers.url, sessions, lead))
                typer.echo(f"round {number + 1}: {figures}")


async def _round(database_url: str, redis_url: str, sessions: int, lead: float) -> str:
    connection = await asyncpg.connect(database_url)
    await connection.execute("TRUNCATE after_hours_sessions CASCADE")
    async with _served(database_url, redis_url) as address:
        await connection.execute(_INSERT, sessions, datetime.timedelta(seconds=lead))
        # The reconciler sets the timers meanwhile.
        await asyncio.sleep(lead - 1)
        waits = await _get_for(address, 4)
    late = [row["late"] for row in await connection.fetch(_LATENESS)]
    left = await connection.fetchval("SELECT count(*) FROM after_hours_sessions WHERE ended_at IS NULL")
    await connection.close()
    early = sum(each < 0 for each in late)
    return (
        f"{len(late)} closed, {left} left, {early} early; lateness {_quantiles(late)};"
        f" {len(waits)} GetSession {_quantiles(waits)}"
    )


async def _get_for(address: str, seconds: float) -> list[float]:
    """Call GetSession at a steady pace, whatever the answers take, and give what each took."""
    waits: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub: session_service_pb2_grpc.SessionServiceAsyncStub = session_service_pb2_grpc.SessionServiceStub(channel)

        async def one(number: int) -> None:
            began = time.perf_counter()
            await stub.GetSession(session_service_pb2.GetSessionRequest(user_id=f"user {number}"))
            waits.append(time.perf_counter() - began)

        async with asyncio.TaskGroup() as calls:
            for number in range(int(seconds / _PACE)):
                calls.create_task(one(number))
                await asyncio.sleep(_PACE)
    return waits


@contextlib.asynccontextmanager
async def _served(database_url: str, redis_url: str) -> collections.abc.AsyncIterator[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "AFTERHOURS_AUTH": "none",
        "AFTERHOURS_LISTEN": "127.0.0.1:0",
        "AFTERHOURS_FUZZ_KEY": "1:a fuzz key of thirty-two characters",
    }
    command = (sys.executable, "-m", "afterhours_grpc", "serve")
    server = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert server.stdout
        yield (await server.stdout.readline()).decode().removeprefix("listening on ").strip()
    finally:
        server.terminate()
        await server.wait()


def _quantiles(seconds: list[float]) -> str:
    ranked = sorted(seconds)
    named = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return " ".join(f"{name} {ranked[int((len(ranked) - 1) * share)] * 1000:.0f} ms" for name, share in named)


if __name__ == "__main__":
    typer.run(main)
