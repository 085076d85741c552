"""Whoever reads the log and stdout, or does not, cannot stop the service; and what the log never says."""

import asyncio
import collections.abc
import contextlib
import fcntl
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
import typing
import urllib.request

import psutil
import pytest
import replicas

from afterhours_grpc.rpc import tokens


class _Server:
    """A process that serves, on files that a test chooses."""

    def __init__(self, process: asyncio.subprocess.Process, client: replicas.Client) -> None:
        self.process = process
        self.client = client

    async def end(self) -> float:
        """Stop it; it must exit with 0. Return how many seconds that took."""
        began = time.monotonic()
        self.process.terminate()
        assert await asyncio.wait_for(self.process.wait(), 20) == 0
        return time.monotonic() - began


@contextlib.asynccontextmanager
async def _serving(
    engines: replicas.Engines, stderr: typing.Any, stdout: typing.Any = None, **overrides: str
) -> collections.abc.AsyncIterator[_Server]:
    """Run a server, without Redis, so that each sweep has something to log."""
    address = f"127.0.0.1:{_free_port()}"
    environment = engines.environment(
        REDIS_URL="redis://127.0.0.1:1", AFTERHOURS_LISTEN=address, AFTERHOURS_RECONCILE_INTERVAL="1s", **overrides
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "afterhours_grpc", "serve"),
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=stderr,
    )
    try:
        async with asyncio.timeout(60), replicas.Client(address) as client:
            await _serves(client)
            yield _Server(process, client)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _serves(client: replicas.Client) -> None:
    async def does() -> bool:
        with contextlib.suppress(Exception):
            return await client.health() == "SERVING"
        return False

    await replicas.eventually(does, within=30)


def _unread() -> tuple[int, int]:
    """Make a pipe that is full."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, 4096 * b"-")
    return reader, writer


def _closed() -> tuple[int, int]:
    """Make a pipe whose reader goes away once the process has started."""
    return os.pipe()


@pytest.mark.parametrize(("make", "workers"), [(_unread, "1"), (_unread, "2"), (_closed, "1")])
async def test_a_log_that_cannot_be_written(
    engines: replicas.Engines, make: collections.abc.Callable[[], tuple[int, int]], workers: str
) -> None:
    """With a stderr and a stdout that nobody reads, calls are answered, sessions end on time, and SIGTERM ends it."""
    reader, writer = make()
    try:
        async with _serving(engines, writer, writer, AFTERHOURS_WORKERS=workers) as server:
            os.close(writer)
            if make is _closed:
                os.close(reader)
            await server.client.put_profile("ada")
            for _ in range(300):
                await server.client.get("ada")
            await server.client.start("ada", 2)

            async def ended() -> bool:
                return bool(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at = expires_at"))

            await replicas.eventually(ended, within=6)
            assert await server.client.health() == "SERVING"
            assert await server.end() < 5
    finally:
        if make is not _closed:
            os.close(reader)


async def test_a_disk_that_is_full_for_a_while(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """Lines for which there is no room are dropped and counted; later the log goes on, and says how many."""
    path = tmp_path / "log"
    with path.open("ab") as file:
        async with _serving(engines, file, AFTERHOURS_METRICS_LISTEN=f"127.0.0.1:{(port := _free_port())}") as server:
            await server.client.get("before")
            process = psutil.Process(server.process.pid)
            # A limit on the size of files does to a write what a full disk does, in the middle of a line.
            process.rlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, -1))
            for _ in range(50):
                await server.client.get("during")

            async def counted() -> bool:
                return await asyncio.to_thread(_dropped, port) > 0

            await replicas.eventually(counted, within=10)
            process.rlimit(resource.RLIMIT_FSIZE, (-1, -1))

            async def told() -> bool:
                return b"log_lines_dropped" in path.read_bytes()

            await replicas.eventually(told, within=10)
            dropped = await asyncio.to_thread(_dropped, port)
            await server.client.get("after")
            await server.end()
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sum(line["count"] for line in lines if line["event"] == "log_lines_dropped") == dropped
    assert any(line["event"] == "call" for line in lines[-5:])


def _dropped(port: int) -> float:
    """Read the metric of dropped lines."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        [line] = [
            each
            for each in response.read().decode().splitlines()
            if each.startswith("afterhours_log_lines_dropped_total ")
        ]
    return float(line.split()[1])


_SLOW_READER = """
import sys, time
while chunk := sys.stdin.buffer.read1(30_000):
    sys.stdout.buffer.write(chunk)
    time.sleep(0.001)
"""


async def test_the_lines_of_workers_stay_whole(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """Two workers under load write whole lines to one pipe, whose reader is slow, and lose none."""
    path = tmp_path / "log"
    stdin, stderr = os.pipe()
    with path.open("wb") as file:
        reader = await asyncio.create_subprocess_exec(sys.executable, "-c", _SLOW_READER, stdin=stdin, stdout=file)
        os.close(stdin)
        async with _serving(engines, stderr, AFTERHOURS_WORKERS="2") as server:
            os.close(stderr)
            clients = [replicas.Client(server.client.address) for _ in range(6)]
            answers = await asyncio.gather(*(_gets(client, 150) for client in clients))
            await asyncio.gather(*(client.close() for client in clients))
            await server.end()
        assert await asyncio.wait_for(reader.wait(), 10) == 0
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sum(line.get("method") == "GetSession" for line in lines) == sum(answers)


async def _gets(client: replicas.Client, count: int) -> int:
    """Call at most ten at a time, and return how many were answered."""
    for _ in range(count // 10):
        await asyncio.gather(*(client.get(f"somebody whose line is long {n * 'x'}") for n in range(100, 110)))
    return count


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_standard_files_that_are_closed(engines: replicas.Engines, workers: str) -> None:
    """A server whose stdin, stdout and stderr are closed serves, and ends with 0."""
    address = f"127.0.0.1:{_free_port()}"
    command = 'exec "$0" -m afterhours_grpc serve <&- >&- 2>&-'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command, sys.executable),
        env={"PATH": os.environ["PATH"], **engines.environment(AFTERHOURS_LISTEN=address, AFTERHOURS_WORKERS=workers)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with replicas.Client(address) as client:
            await _serves(client)
            await client.put_profile("ada")
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_refusal_that_nobody_reads(engines: replicas.Engines) -> None:
    """A server that refuses to start does so with 1, although its line cannot be written."""
    reader, writer = _unread()
    environment = engines.environment(AFTERHOURS_WORKERS="many")
    command = (sys.executable, "-m", "afterhours_grpc", "serve")
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=writer)
    os.close(writer)
    assert await asyncio.wait_for(process.wait(), 20) == 1
    os.close(reader)


_FAILURES = """
import asyncio, gc, logging, sys, threading, warnings
from afterhours_grpc import logs

logs.configure(sys.argv[1])
TEXT = "Key (user_id)=(ada) latitude 52.516275"

def fail():
    raise ValueError(TEXT)

class Finalized:
    def __del__(self):
        fail()

async def tasks():
    asyncio.create_task(asyncio.sleep(0))
    loop = asyncio.get_running_loop()
    loop.call_soon(fail)
    async def failing():
        fail()
    task = asyncio.create_task(failing())
    await asyncio.sleep(0.01)
    del task
    gc.collect()

asyncio.run(tasks())
thread = threading.Thread(target=fail)
thread.start()
thread.join()
Finalized()
try:
    fail()
except ValueError as error:
    logging.getLogger("asyncpg").exception("it failed: %s", error)
    logging.getLogger("grpc").error("it failed: %s", error)
warnings.warn(TEXT)
print(TEXT, file=sys.stderr)
logs.log.info("odd", value=1 << 80, other={object(): b"odd"})
fail()
"""


@pytest.mark.parametrize("format", ["json", "console"])
def test_the_text_of_an_exception_is_never_logged(format: str) -> None:
    """What asyncio, threads, finalizers, libraries and the interpreter log is a line of ours: types and frames."""
    run = subprocess.run([sys.executable, "-c", _FAILURES, format], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "52.516275" not in run.stderr + run.stdout
    lines = run.stderr.splitlines()
    for event in ("library_error", "thread_died", "unraisable", "warning", "stderr_written", "exception"):
        assert any(event in line for line in lines), event
    assert sum("ValueError" in line for line in lines) >= 5
    if format == "json":
        told = [json.loads(line) for line in lines]
        assert all({"event", "level", "timestamp"} <= line.keys() or "types" in line for line in told)
        assert any("fail" in frame for line in told for frame in line.get("frames", ()))


async def test_a_terminal_is_not_told_what_to_do_by_a_caller(engines: replicas.Engines) -> None:
    """Control characters in a caller's id are escaped in the log for people."""
    secret = "a secret of more than thirty-two bytes"
    settings = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": secret, "AFTERHOURS_LOG_FORMAT": "console"}
    token = tokens.signed(secret, "ada\x1b]0;owned\x07\x9b2J", "", 60, tokens.Expected(None, None))
    async with replicas.process(engines, **settings) as (process, client):
        async with replicas.Client(client.address, token) as caller:
            await caller.get("")
        await replicas.until(lambda: any("owned" in line for line in process.lines))
    [line] = [each for each in process.lines if "owned" in each]
    assert "\\x1b]0;owned\\x07\\x9b2J" in line
    assert "\x07" not in line
    assert "\x9b" not in line


_BLOCKED = """
import asyncio, gc, sys, time
from afterhours_grpc import __main__

def busy():
    while True:
        pass

block = {"busy": busy, "asleep": lambda: time.sleep(100)}[sys.argv.pop()]
# The last thing that a server does before it says that it listens.
gc.freeze = lambda: asyncio.get_running_loop().call_later(0.2, block)
__main__.main()
"""


@pytest.mark.parametrize(("how", "number"), [("busy", signal.SIGTERM), ("asleep", signal.SIGINT)])
async def test_a_blocked_event_loop_ends_in_time(engines: replicas.Engines, how: str, number: signal.Signals) -> None:
    """A process whose event loop is blocked ends within AFTERHOURS_DRAIN of the signal, with a status."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _BLOCKED, "serve", how),
        env={"PATH": os.environ["PATH"], **engines.environment(AFTERHOURS_DRAIN="1s")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        assert (await asyncio.wait_for(process.stdout.readline(), 30)).startswith(b"listening on ")
        await asyncio.sleep(0.4)
        process.send_signal(number)
        began = time.monotonic()
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert 0.5 < time.monotonic() - began < 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
