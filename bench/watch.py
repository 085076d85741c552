"""How long after a transition those who watch are told, under load: `.venv/bin/python bench/watch.py`.

Lag is from the instant by which Postgres dated a transition, which is before its commit, to the arrival of its event
in this process; server, engines, load and watchers share the machine and its clock.
"""

import asyncio
import statistics
import time

import grpc
import systems
import typer
from afterhours.v1 import session_event_pb2, session_service_pb2, session_service_pb2_grpc

_STARTED = session_event_pb2.SESSION_EVENT_TYPE_STARTED


def main(concurrency: int = 2, seconds: float = 5.0, watchers: int = 4, rounds: int = 3) -> None:
    """Start sessions for SECONDS at CONCURRENCY while WATCHERS watch all, and print what they saw."""
    asyncio.run(_measure(concurrency, seconds, watchers, rounds))


async def _measure(concurrency: int, seconds: float, watchers: int, rounds: int) -> None:
    with systems.bench(20_000) as bench:
        ours = systems.Ours(bench, {})
        async with ours.running():
            for number in range(rounds):
                await ours.prepare("start")
                watching = [asyncio.create_task(_watch(ours.address)) for _ in range(watchers)]
                await asyncio.sleep(0.5)
                seen = await ours.measure("start", concurrency, seconds)
                await asyncio.sleep(1.0)
                for each in watching:
                    each.cancel()
                lags = [lag for each in await asyncio.gather(*watching) for lag in each]
                marks = statistics.quantiles(lags, n=100)
                p50, p99, most = (round(each * 1000) for each in (marks[49], marks[98], max(lags)))
                typer.echo(
                    f"round {number + 1}: {seen.calls / seen.seconds:,.0f} starts a second, {len(lags)} events told to"
                    f" {watchers}; lag p50 {p50} ms, p99 {p99} ms, most {most} ms; calls' p50 {seen.p50_ms:.1f} ms"
                )


async def _watch(address: str) -> list[float]:
    lags: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = session_service_pb2_grpc.SessionServiceStub(channel)
        try:
            async for response in stub.WatchSessions(session_service_pb2.WatchSessionsRequest()):
                event = response.event
                if event.type == _STARTED:
                    at = event.event_time
                    lags.append(time.time() - at.seconds - at.nanos / 1e9)
        except asyncio.CancelledError:
            return lags
    return lags


if __name__ == "__main__":
    typer.run(main)
