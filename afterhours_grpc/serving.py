"""What `serve` runs: this process, or a supervisor of several that share a port."""

import asyncio
import collections.abc
import contextlib
import gc
import resource

from afterhours_grpc import app, output, settings, stopping, workers

# Of the longest time from the signal to the exit, the share at its end, and seconds at most, in which the process no
# longer drains but flushes its last lines.
_FLUSH_SHARE = 0.25


async def serve(
    config: settings.Settings,
    flags: collections.abc.Mapping[str, str],
    console: output.Console,
    greeting: collections.abc.Callable[[str], str] | None = None,
    *,
    leave: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status. Raise StartError or SettingsError.

    `flags` are the settings by variable that come from elsewhere than the environment. `greeting` makes what is printed
    after the line that names the address. With `leave` the process ends itself as soon as all but its port is closed.
    """
    drain = config.drain.total_seconds()
    last = min(output.FLUSH_SECONDS, drain * _FLUSH_SHARE)
    if config.workers > 1:
        # It waits longer than its workers.
        stop = stopping.Stop(drain, console.end)
        supervisor = workers.Supervisor(config, flags, drain - last / 2)
        return await supervisor.run(stop.requested, _announce(console, greeting))
    # A worker's standard input is closed when its supervisor dies.
    parent = None if config.worker is None else 0
    stop = stopping.Stop(drain - last, console.end, parent)
    return await _serve(config, stop, _announce(console, greeting), console.end if leave else None)


def _announce(
    console: output.Console, greeting: collections.abc.Callable[[str], str] | None
) -> collections.abc.Callable[[str], None]:
    def announce(address: str) -> None:
        console.print(f"listening on {address}")
        if greeting:
            console.print(greeting(address))

    return announce


async def _serve(
    config: settings.Settings,
    stop: stopping.Stop,
    announce: collections.abc.Callable[[str], None],
    leave: collections.abc.Callable[[int], None] | None,
) -> int:
    stopped = asyncio.create_task(stop.requested.wait())
    status = 0
    # Each connection is a file, and the usual soft limit of 1,024 is within reach of one client.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with contextlib.AsyncExitStack() as stack:
        context = app.running(config, leave=lambda: leave(status) if leave else None)
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
        announce(running.address)
        failed = asyncio.create_task(running.failed.wait())
        await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        status = int(running.failed.is_set())
        # Whatever hangs, the process ends in time.
        stop.limit(status)
    return status
