"""What `serve` runs: one process that serves, or a supervisor of several that share a port."""

import asyncio
import collections.abc
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import threading
import typing

import structlog
import typer

from afterhours_grpc import address, app, settings

log = structlog.get_logger()

# Seconds before a dead worker is started again: doubled each time, until one has lived for the longest of them.
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_LISTENING = "listening on "


def end_process(status: int) -> None:
    """End the process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


async def serve(
    config: settings.Settings,
    flags: collections.abc.Mapping[str, str],
    greet: collections.abc.Callable[[str], None] = lambda _: None,
    leave: collections.abc.Callable[[int], None] = lambda _: None,
) -> int:
    """Serve until SIGTERM or SIGINT; give the exit status. Raise StartError or SettingsError.

    `flags` are the settings by variable that came from elsewhere than the environment, `greet` is called with the
    address once it serves, and `leave` with the exit status when all but the port of a serving process is closed.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if config.workers > 1:
        return await _supervise(config, flags, greet, stop)
    if config.worker is not None:
        _follow(loop, stop)
    return await _serve(config, greet, leave, stop)


def _follow(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop when the supervisor dies: it has the other end of our standard input."""

    def closed() -> None:
        loop.remove_reader(sys.stdin)
        stop.set()

    loop.add_reader(sys.stdin, closed)


async def _serve(
    config: settings.Settings,
    greet: collections.abc.Callable[[str], None],
    leave: collections.abc.Callable[[int], None],
    stop: asyncio.Event,
) -> int:
    stopped = asyncio.create_task(stop.wait())
    status = 0
    # Each connection is a file, and the usual soft limit of 1,024 is within reach of one client.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with contextlib.AsyncExitStack() as stack:
        context = app.running(config, leave=lambda: leave(status))
        starting = asyncio.create_task(stack.enter_async_context(context))
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return 0
        running = starting.result()
        # What was imported and built lives as long as the process. Looked through by each full collection, it would
        # stop the calls of that moment for 60 ms and more.
        gc.collect()
        gc.freeze()
        typer.echo(f"{_LISTENING}{running.address}")
        greet(running.address)
        failed = asyncio.create_task(running.failed.wait())
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        status = int(running.failed.is_set())
        # Whatever hangs, the process ends in time.
        limit = threading.Timer(config.drain.total_seconds(), end_process, (status,))
        limit.daemon = True
        limit.start()
    return status


async def _supervise(
    config: settings.Settings,
    flags: collections.abc.Mapping[str, str],
    greet: collections.abc.Callable[[str], None],
    stop: asyncio.Event,
) -> int:
    config.check()
    host, port = config.listen
    with _reserved(host, port) as bound:
        shared = str(address.Address(host, bound))
        environment = {**flags, "AFTERHOURS_WORKERS": "1", "AFTERHOURS_LISTEN": shared}
        workers = [_Worker(number, settings.environment(environment)) for number in range(config.workers)]
        stopped = asyncio.create_task(stop.wait())
        try:
            # What keeps one from starting keeps them all: the first one says it, once.
            for some in (workers[:1], workers[1:]):
                starting = asyncio.create_task(_all_start(some))
                await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not starting.done():
                    starting.cancel()
                    return 0
                if not starting.result():
                    return int(not stop.is_set())
            typer.echo(f"{_LISTENING}{shared}")
            greet(shared)
            async with asyncio.TaskGroup() as group:
                keeping = [group.create_task(each.keep()) for each in workers]
                await stopped
                for each in keeping:
                    each.cancel()
        finally:
            failed = await asyncio.gather(*(each.end(config.drain.total_seconds()) for each in workers))
    return int(any(failed))


async def _all_start(workers: collections.abc.Sequence["_Worker"]) -> bool:
    return all(await asyncio.gather(*(each.start() for each in workers)))


@contextlib.contextmanager
def _reserved(host: str, port: int) -> collections.abc.Iterator[int]:
    """Hold a port that workers share, so that they find it free when they start again. Raise StartError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With SO_REUSEPORT it would be had beside another server of the same user.
        with socket.socket(family) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            alone.listen()
            bound: int = alone.getsockname()[1]
        held = socket.socket(family)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            held.setsockopt(socket.SOL_SOCKET, option, 1)
        held.bind((address[0], bound, *address[2:]))
    except OSError:
        raise app.cannot_listen("AFTERHOURS_LISTEN", host, port) from None
    with held:
        yield bound


class _Worker:
    """A serving process, number `number` of those that share a port."""

    def __init__(self, number: int, environment: dict[str, str]) -> None:
        self._number = number
        self._environment = {**environment, "AFTERHOURS_WORKER": str(number)}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> bool:
        """Start it, and wait until it serves; whether it does. It says on stderr why it does not."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "afterhours_grpc", "serve"),
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A terminal's Ctrl-C is for the supervisor.
            start_new_session=True,
        )
        assert self._process.stdout  # noqa: S101 - asked for just now
        return bool(await self._process.stdout.readline())

    async def keep(self) -> typing.NoReturn:
        """Start it again whenever it ends."""
        loop = asyncio.get_running_loop()
        pause = _SHORTEST_PAUSE
        began = loop.time()
        while True:
            assert self._process  # noqa: S101 - started before
            status = await self._process.wait()
            if loop.time() - began > _LONGEST_PAUSE:
                pause = _SHORTEST_PAUSE
            log.error("worker_died", worker=self._number, status=status, restart_in_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            began = loop.time()
            if await self.start():
                log.info("worker_restarted", worker=self._number)

    async def end(self, seconds: float) -> bool:
        """Have it drain, and kill it if it has not ended in time; whether it failed at that."""
        if not self._process or self._process.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(seconds):
                status = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            status = await self._process.wait()
        return status > 0
