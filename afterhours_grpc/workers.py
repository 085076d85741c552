"""A supervisor of several serving processes that share a port."""

import asyncio
import collections.abc
import contextlib
import socket
import sys
import typing

import structlog

from afterhours_grpc import address, app, logs, settings

log = structlog.get_logger()

# Seconds before a dead worker is started again: doubled each time, until one has lived for the longest of them.
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


class Supervisor:
    """Starts the workers, restarts those that die, and ends them; a worker gets `drain` seconds for its end."""

    def __init__(self, config: settings.Settings, flags: collections.abc.Mapping[str, str], drain: float) -> None:
        self._config = config
        self._flags = flags
        self._drain = drain

    async def run(self, stop: asyncio.Event, announce: collections.abc.Callable[[str], None]) -> int:
        """Run the workers until `stop` is set, and return the exit status. Raise StartError or SettingsError.

        `announce` is called with the address once all workers serve.
        """
        self._config.check()
        host, port = self._config.listen
        with _reserved(host, port) as bound:
            shared = str(address.Address(host, bound))
            workers = self._workers(shared)
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
                announce(shared)
                async with asyncio.TaskGroup() as group:
                    keeping = [group.create_task(each.keep()) for each in workers]
                    await stopped
                    for each in keeping:
                        each.cancel()
            finally:
                failed = await asyncio.gather(*(each.end(self._drain) for each in workers))
        return int(any(failed))

    def _workers(self, listen: str) -> list["_Worker"]:
        environment = {**self._flags, "AFTERHOURS_WORKERS": "1", "AFTERHOURS_LISTEN": listen}
        return [_Worker(number, settings.environment(environment)) for number in range(self._config.workers)]


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
            try:
                if await self.start():
                    log.info("worker_restarted", worker=self._number)
            except OSError as error:  # no memory or no process is left: the next attempt may find some
                log.error("worker_not_started", worker=self._number, **logs.described(error))

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
