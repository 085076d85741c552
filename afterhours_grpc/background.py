"""Background tasks with an owner: one that dies is started again, and told in the log."""

import asyncio
import collections.abc

import structlog

from afterhours_grpc import logs

log = structlog.get_logger()

# Seconds before a task that died is started again.
_PAUSE = 0.5


class Background:
    """Keeps tasks running until it is stopped."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def keep(self, name: str, run: collections.abc.Callable[[], collections.abc.Awaitable[None]]) -> asyncio.Task[None]:
        """Run `run`, again and again."""
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

    async def _kept(self, name: str, run: collections.abc.Callable[[], collections.abc.Awaitable[None]]) -> None:
        while True:
            try:
                await run()
            except Exception as error:  # noqa: BLE001 - whatever it is, the task must go on
                log.error("background_task_died", task=name, **logs.described(error))
            await asyncio.sleep(_PAUSE)
