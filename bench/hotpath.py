"""Where the time of a call goes in our server, by py-spy, which is to be installed: `python bench/hotpath.py`.

Each sample of a running thread belongs to the innermost of its frames that is of a component below, so that the
sending of a statement by asyncio is asyncpg's.
"""

import asyncio
import collections
import contextlib
import pathlib
import subprocess
import sys
import typing

import systems
import typer

# The first of these that a frame matches owns it; a frame that matches none, such as asyncio's, is its caller's.
_COMPONENTS = (
    ("log line: structlog, JSON, stderr", ("structlog/", "json/", "afterhours_grpc/logs.py")),
    ("metrics: prometheus-client", ("prometheus_client/", "afterhours_grpc/metrics.py")),
    ("interceptor and servicer", ("rpc/interceptors.py", "rpc/servicers.py", "rpc/auth.py", "rpc/status.py")),
    ("messages: parse and render", ("rpc/wire.py", "protobuf/", "session_service_pb2", "sessions/session.py")),
    ("fuzzing", ("sessions/location.py", "hmac.py")),
    ("batcher and service", ("store/batching.py", "sessions/service.py")),
    ("store: arguments and rows", ("store/store.py",)),
    ("SQLAlchemy: checkout and return", ("sqlalchemy/",)),
    ("database.py: around the driver", ("store/database.py",)),
    ("asyncpg: encode, send, decode", ("asyncpg/",)),
    ("Redis: redis-py's asyncio client", ("redis/", "expiry/timers.py", "expiry/writer.py")),
    ("scheduler thread", ("apscheduler/", "expiry/jobstore.py", "expiry/claims.py")),
    # grpc.aio is compiled and shows no frames: its tasks are what `Handle._run` runs by itself.
    ("grpc.aio: its tasks in the event loop", ("Handle._run",)),
    ("grpc.aio: its poller thread", ("_poll_wrapper",)),
    ("native transport", ("pygrpc_native/",)),
    ("event loop: select, and wake-ups", ("EpollSelector.select", "BaseEventLoop._run_once", "_process_events")),
)


def main(
    operation: str = "get",
    concurrency: int = 32,
    seconds: float = 15,
    users: int = 100_000,
    top: int = 25,
    transport: str = "grpcio",
    native: bool = False,
) -> None:
    """Load OPERATION for SECONDS, sample the server meanwhile, and print the shares of components and functions."""
    with systems.bench(users) as bench:
        raw = asyncio.run(_sampled(bench, operation, concurrency, seconds, transport, native=native))
    _print(raw, top)


async def _sampled(
    bench: systems.Bench, operation: str, concurrency: int, seconds: float, transport: str, *, native: bool
) -> str:
    ours = systems.Ours(bench, {"AFTERHOURS_TRANSPORT": transport})
    output = bench.folder / "samples"
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(ours.running())
        await ours.prepare(operation)
        command = [
            *(str(pathlib.Path(sys.executable).with_name("py-spy")), "record", "--pid", str(ours.pids["server"])),
            *(
                "--format",
                "raw",
                "--rate",
                "100",
                "--threads",
                "--duration",
                str(int(seconds)),
                "--output",
                str(output),
            ),
            *(["--native"] if native else []),
        ]
        spy = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Starts have one user each, so they are asked for again after a reset until the samples are in.
        while spy.returncode is None:
            seen = await ours.measure(operation, concurrency, seconds)
            typer.echo(
                f"{operation} x{concurrency}: {seen.calls / seen.seconds:.0f}/s under py-spy, errors {seen.errors}"
            )
            await asyncio.sleep(0.5)
        await spy.wait()
    samples: str = output.read_text()
    return samples


def _print(raw: str, top: int) -> None:
    components: collections.Counter[str] = collections.Counter()
    selves: collections.Counter[str] = collections.Counter()
    cumulative: collections.Counter[str] = collections.Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        components[_component(frames)] += int(count)
        selves[frames[-1]] += int(count)
        for frame in set(frames):
            cumulative[frame] += int(count)
    total = components.total()
    tables: tuple[tuple[str, list[tuple[str, int]]], ...] = (
        ("by component", components.most_common()),
        ("self time", selves.most_common(top)),
        ("with what it calls", cumulative.most_common(2 * top)),
    )
    for title, rows in tables:
        typer.echo(f"\n{title} ({total} samples)")
        for name, found in rows:
            typer.echo(f"  {100 * found / total:5.1f}%  {name}")


def _component(frames: typing.Sequence[str]) -> str:
    for frame in reversed(frames):
        for name, marks in _COMPONENTS:
            if any(mark in frame for mark in marks):
                return name
    return "other"


if __name__ == "__main__":
    typer.run(main)
