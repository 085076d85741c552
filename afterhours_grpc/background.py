"""Background tasks with an owner: one that dies is started again, and the log says so."""

import asyncio
import collections.abc
import contextlib

import structlog

from afterhours_grpc import logs

log = structlog.get_logger()

# Seconds before a task that died again is restarted: none the first time, then doubled up to the longest, until it has
# lived for longer than that.
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0

Run = collections.abc.Callable[[], collections.abc.Awaitable[None]]


class Background:
    """Keeps tasks running until it is stopped."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def keep(self, name: str, run: Run) -> asyncio.Task[None]:
        """Run `run`, again and again, until the task is cancelled."""
        task = asyncio.create_task(self._kept(name, run), name=name)
        self._tasks.append(task)
        return task

    async def stop(self) -> None:
        """Cancel every task and wait for its end; idempotent."""
        # Again and again, for asyncio.wait_for of Python 3.11 swallows a cancellation that meets its result.
        while left := [task for task in self._tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.1)

    async def _kept(self, name: str, run: Run) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.0
        while True:
            began = loop.time()
            try:
                await run()
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                _log_death(name, error)  # what it waited for was cancelled, but nobody cancelled it
            except Exception as error:  # noqa: BLE001 - whatever it is, the task must go on
                _log_death(name, error)
            if loop.time() - began > _LONGEST_PAUSE:
                pause = 0.0
            await asyncio.sleep(pause)
            pause = min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)


def _log_death(name: str, error: BaseException) -> None:
    with contextlib.suppress(Exception):  # an exception may be too odd to be described
        log.error("background_task_died", task=name, **logs.described(error))
