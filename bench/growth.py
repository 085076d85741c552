"""How each cost grows with the active sessions: `python bench/growth.py`; figures of the sizes stand side by side.

One server lives through all sizes, so that the plans it cached while the tables were small meet them when they are not.
Timers are not written by the bench: the sweep that arms them is what is timed. Each size starts a second server, too.
"""

import asyncio
import time
import typing

import cost
import generator
import psutil
import systems
import typer

from afterhours_grpc.expiry import jobs

# Users of each timed run, beside those that only are there.
_CALLED = 4_000
_OVERDUE = 10_000
# Seconds for which a sweep may take to arm all timers.
_PATIENCE = 600.0
_ADD = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT 'user ' || n, now(), now() + interval '2 hours' + n * interval '1 ms', 0, 0, 0, 0, 1000, 1, 1
FROM generate_series($1::int, $2::int - 1) AS n
"""
_MAKE_OVERDUE = """
UPDATE after_hours_sessions SET started_at = now() - interval '1 hour', expires_at = now() - interval '1 second'
WHERE user_id IN (SELECT 'user ' || n FROM generate_series(0, $1::int - 1) AS n) AND ended_at IS NULL
"""
_RELATION = "SELECT pg_total_relation_size('after_hours_sessions')"


def main(sizes: str = "10000,100000,1000000", seconds: float = 2.0) -> None:
    """Measure at each of SIZES active sessions, growing, and print a column for each."""
    wanted = [int(size) for size in sizes.split(",")]
    with systems.bench(wanted[-1] + _CALLED) as bench:
        columns = asyncio.run(_measured(bench, wanted, seconds))
    for row in columns[0]:
        figures = "".join(f"{column[row]:>14,.1f}" for column in columns)
        growth = columns[-1][row] / columns[0][row] if columns[0][row] else 0.0
        typer.echo(f"{row:<48}{figures}   x{growth:.2f}")


async def _measured(bench: systems.Bench, sizes: list[int], seconds: float) -> list[dict[str, float]]:
    columns: list[dict[str, float]] = []
    ours = systems.Ours(bench, {})
    async with ours.running():
        await ours.redis.flushall()
        there = 0
        for size in sizes:
            await ours.sql.execute(_ADD, there, size, timeout=_PATIENCE)
            there = size
            columns.append(await _column(ours, size, seconds))
            typer.echo(f"measured {size:,} active sessions", err=True)
    return columns


async def _column(ours: systems.Ours, size: int, seconds: float) -> dict[str, float]:
    """Measure at one size. The statements come before ANALYZE, as after a day's growth."""
    column: dict[str, float] = {"active sessions": size}
    column["seconds from Redis' loss until all are timed again"] = await _armed(ours, size)
    column.update(await _redis_memory(ours, size))
    column["server's memory, MB"] = cost.resident(ours.pids["server"]) / 1e6
    column["table and indexes, MB"] = await ours.sql.fetchval(_RELATION) / 1e6
    for concurrency in (1, 32):
        # Spread over all sessions, and users of their own for what changes the count.
        spread, fresh = range(0, size, max(1, size // _CALLED)), range(size, size + _CALLED)
        for operation, numbers in (("start", fresh), ("get", spread), ("extend", spread), ("end", fresh)):
            # Starts that ran out of time are made up for, so that each end finds its session.
            column.update(await _statement(ours, operation, numbers, concurrency, seconds))
            if operation == "start":
                await generator.run(ours.target("start", ours.requests("start", numbers)), 32, 60)
        await ours.sql.execute("DELETE FROM after_hours_sessions WHERE user_id = ANY($1)", _names(fresh))
    column["seconds from process to SERVING"] = await _started(ours)
    # The first server would close them before the second one is there.
    first = psutil.Process(ours.pids["server"])
    first.suspend()
    await ours.sql.execute(_MAKE_OVERDUE, min(_OVERDUE, size))
    column[f"the same, {_OVERDUE:,} overdue to close first"] = await _started(ours)
    first.resume()
    await ours.sql.execute("DELETE FROM after_hours_sessions WHERE ended_at IS NOT NULL")
    await ours.sql.execute(_ADD, 0, min(_OVERDUE, size))
    return column


def _names(numbers: range) -> list[str]:
    return [f"user {number}" for number in numbers]


async def _statement(
    ours: systems.Ours, operation: str, numbers: range, concurrency: int, seconds: float
) -> dict[str, float]:
    meter = cost.Meter(ours.pids)
    wraps = operation in {"get", "extend"}
    requests = ours.requests(operation, numbers)
    seen = await generator.run(ours.target(operation, requests, wraps=wraps), concurrency, seconds)
    assert seen.calls, f"no {operation} was answered: {seen.errors}"
    if seen.errors:
        typer.echo(f"{operation} x{concurrency} had errors: {seen.errors}", err=True)
    name = f"{operation} x{concurrency}"
    return {
        f"{name}: p50 ms": seen.p50_ms,
        f"{name}: p99 ms": seen.p99_ms,
        f"{name}: Postgres' CPU us a call": meter.used()["postgres"] / seen.calls * 1e6,
    }


async def _armed(ours: systems.Ours, size: int) -> float:
    """Forget all timers, and give how long the sweep takes until each session has one again."""
    await ours.redis.delete(jobs.EXPIRE.key)
    began = time.monotonic()
    async with asyncio.timeout(_PATIENCE):
        while await ours.redis.zcard(jobs.EXPIRE.key) < size:  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def _redis_memory(ours: systems.Ours, size: int) -> dict[str, float]:
    used = typing.cast("int", await ours.redis.memory_usage(jobs.EXPIRE.key, samples=0))
    about = await ours.redis.info("memory")
    return {"Redis: bytes a timer": used / size, "Redis: used_memory, MB": about["used_memory"] / 1e6}


async def _started(ours: systems.Ours) -> float:
    began = time.monotonic()
    async with systems.served(ours.command, ours.environment):
        return time.monotonic() - began


if __name__ == "__main__":
    typer.run(main)
