"""Mixed load for some minutes, `python bench/soak.py`: memory every ten seconds, and what is left when it is over."""

import asyncio
import time

import asyncpg
import cost
import generator
import psutil
import systems
import typer

_EVERY = 10.0
# Users that start, extend and end in turns; their number is what one turn takes.
_TURN = 4_000
_CONNECTIONS = """
SELECT count(*) AS all, count(*) FILTER (WHERE state <> 'idle') AS busy
FROM pg_stat_activity WHERE application_name = 'afterhours'
"""


def main(minutes: float = 10, concurrency: int = 16) -> None:
    """Load for MINUTES: CONCURRENCY reads beside as many changes. Status 1 if memory grew or something was left."""
    with systems.bench(20_000) as bench:
        grew = asyncio.run(_soaked(bench, minutes * 60, concurrency))
    raise typer.Exit(int(grew))


async def _soaked(bench: systems.Bench, seconds: float, concurrency: int) -> bool:
    ours = systems.Ours(bench, {})
    samples: list[tuple[float, int]] = []
    async with ours.running():
        server = psutil.Process(ours.pids["server"])
        until = time.monotonic() + seconds
        sampling = asyncio.create_task(_sample(ours, server, samples))
        async with asyncio.TaskGroup() as load:
            load.create_task(_read(ours, until, concurrency))
            load.create_task(_change(ours, until, concurrency))
        sampling.cancel()
        await asyncio.sleep(2)
        after = await ours.sql.fetchrow(_CONNECTIONS)
        left = (
            f"{after['busy']} of {after['all']} connections busy, {server.num_fds()} files,"
            f" {server.num_threads()} threads"
        )
    connection = await asyncpg.connect(bench.truth.url)
    gone = await connection.fetchrow(_CONNECTIONS)
    await connection.close()
    # The first minute warms up; a run shorter than two is only tried out.
    first = next((held for at, held in samples if at >= min(60.0, seconds / 2)), samples[0][1])
    ratio = samples[-1][1] / first
    typer.echo(
        f"memory at the end is {ratio:.3f} times that of the first minute; 2 s after the load {left};"
        f" {gone['all']} connections after the server's end"
    )
    return ratio > 1.1 or after["busy"] > 0 or gone["all"] > 0


async def _sample(ours: systems.Ours, server: psutil.Process, samples: list[tuple[float, int]]) -> None:
    began = time.monotonic()
    while True:
        held = cost.resident(server.pid)
        connections = await ours.sql.fetchrow(_CONNECTIONS)
        timers = await ours.redis.info("memory")
        samples.append((time.monotonic() - began, held))
        typer.echo(
            f"{samples[-1][0]:6.0f} s  server {held / 1e6:7.1f} MB  {server.num_fds():4} files"
            f"  {connections['all']:3} connections  Redis {timers['used_memory'] / 1e6:6.1f} MB"
        )
        await asyncio.sleep(_EVERY)


async def _read(ours: systems.Ours, until: float, concurrency: int) -> None:
    """Ask for users with and without a session."""
    requests = ours.requests("get", range(2 * _TURN))
    while (left := until - time.monotonic()) > 0:
        _check(
            "get", await generator.run(ours.target("get", requests, wraps=True, least=0), concurrency, min(left, 30))
        )


async def _change(ours: systems.Ours, until: float, concurrency: int) -> None:
    files = {operation: ours.requests(operation, range(_TURN)) for operation in ("start", "extend", "end")}
    while time.monotonic() < until:
        for operation, requests in files.items():
            _check(operation, await generator.run(ours.target(operation, requests), concurrency, 600))


def _check(operation: str, seen: generator.Seen) -> None:
    if seen.errors:
        typer.echo(f"{operation}: {seen.errors} beside {seen.calls} answered")


if __name__ == "__main__":
    typer.run(main)
