"""Many calls, one statement: calls that arrive while a flush is in flight share the next one."""

import asyncio
import collections
import collections.abc
import dataclasses
import time
import typing

import tenacity

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database

Call = typing.TypeVar("Call")
Answer = typing.TypeVar("Answer")


@dataclasses.dataclass(slots=True, eq=False)
class _Entry(typing.Generic[Call, Answer]):
    call: Call
    keys: tuple[collections.abc.Hashable, ...]
    deadline: session.Deadline
    answer: asyncio.Future[Answer]
    # Not known to be unapplied: a statement that has it is under way.
    flying: bool = False

    def late(self) -> None:
        """Tell the caller that its deadline passed.

        In flight it may be applied yet, which DEADLINE_EXCEEDED denies: then nothing is told, and what the caller's
        own library says at its deadline promises nothing.
        """
        if self.answer.done():
            return
        if not self.deadline.of_caller:
            self.answer.set_exception(errors.StoreUnavailable())
        elif not self.flying:
            self.answer.set_exception(errors.DeadlineExceeded())


class Batcher(typing.Generic[Call, Answer]):
    """Gathers calls into flushes of at most `most`, of which at most `flights` are under way at once.

    A lone call goes at once; no timer is involved. Two calls that share a key are never in the same or in concurrent
    flushes, and keep their order. Each flush is sorted by the calls' first keys.

    `flush` gives an answer a call, in order; an answer may be an exception, and `database.Retry` among them has
    its call tried again by itself. If a flush fails as a whole for what may be the fault of one call, each is tried by
    itself. A caller that is cancelled or late leaves the queue; once in flight its call may be applied, and nobody
    waits for it.
    """

    def __init__(
        self,
        flush: collections.abc.Callable[
            [list[Call]], collections.abc.Awaitable[collections.abc.Sequence[Answer | Exception]]
        ],
        keys: collections.abc.Callable[[Call], tuple[collections.abc.Hashable, ...]],
        *,
        most: int = 128,
        flights: int = 2,
    ) -> None:
        self._flush = flush
        self._keys = keys
        self._most = most
        self._flights = flights
        self._waiting: collections.deque[_Entry[Call, Answer]] = collections.deque()
        self._busy: set[collections.abc.Hashable] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flying = 0

    async def submit(self, call: Call, deadline: session.Deadline) -> Answer:
        """Give the answer to `call`, or raise what it was refused for.

        At its deadline DeadlineExceeded is raised if nothing of it was applied or will be; where `deadline` is the
        service's own, StoreUnavailable, even if it was.
        """
        loop = asyncio.get_running_loop()
        entry: _Entry[Call, Answer] = _Entry(call, self._keys(call), deadline, loop.create_future())
        self._waiting.append(entry)
        self._depart()
        if entry.flying and deadline.of_caller:
            return await entry.answer
        timer = loop.call_later(deadline.at - time.monotonic(), entry.late)
        try:
            return await entry.answer
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Wait until every call in the queue and in flight has been answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _depart(self) -> None:
        while self._waiting and self._flying < self._flights:
            entries = self._board()
            if not entries:
                return
            self._flying += 1
            self._own(self._fly(entries))

    def _board(self) -> list[_Entry[Call, Answer]]:
        """Take what may fly now; calls whose keys are in flight, or behind such a call, stay in their order."""
        boarded: list[_Entry[Call, Answer]] = []
        left: list[_Entry[Call, Answer]] = []
        taken = set(self._busy)
        while self._waiting and len(boarded) < self._most:
            entry = self._waiting.popleft()
            if entry.answer.done():  # its caller went away
                continue
            (boarded if taken.isdisjoint(entry.keys) else left).append(entry)
            taken.update(entry.keys)
        self._waiting.extendleft(reversed(left))
        boarded.sort(key=lambda entry: typing.cast("str", entry.keys[0]))
        for entry in boarded:
            entry.flying = True
            self._busy.update(entry.keys)
        return boarded

    async def _fly(self, entries: list[_Entry[Call, Answer]]) -> None:
        again: list[_Entry[Call, Answer]] = []
        try:
            again = await self._try(entries)
        finally:
            self._flying -= 1
            for entry in again:
                self._own(self._fly_alone(entry))
            self._land(entry for entry in entries if entry not in again)

    async def _fly_alone(self, entry: _Entry[Call, Answer]) -> None:
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(database.Retry),
                wait=tenacity.wait_random_exponential(multiplier=0.005, max=0.1),
                stop=tenacity.stop_after_delay(entry.deadline.at - time.monotonic()),
                reraise=True,
            ):
                with attempt:
                    if not entry.answer.done() and await self._try([entry]):
                        raise database.Retry  # noqa: TRY301 - told to the loop around it
        except database.Retry:
            entry.late()
        finally:
            self._land([entry])

    async def _try(self, entries: list[_Entry[Call, Answer]]) -> list[_Entry[Call, Answer]]:
        """Flush, answer, and give those that are to be tried again by themselves."""
        answers: collections.abc.Sequence[Answer | Exception]
        for entry in entries:
            entry.flying = True
        try:
            answers = await self._flush([entry.call for entry in entries])
        except database.Retry as error:
            answers = [error] * len(entries)
        except errors.SessionError as error:
            answers = [error] * len(entries)
        except Exception as error:  # noqa: BLE001 - one call's fault, or ours: told to its caller, who logs it
            answers = [database.Retry() if len(entries) > 1 else error] * len(entries)
        again = []
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, database.Retry):
                # Taken back: from here on it is known not to be applied.
                entry.flying = False
                if time.monotonic() >= entry.deadline.at:
                    entry.late()
                again.append(entry)
            elif entry.answer.done():
                continue
            elif isinstance(answer, Exception):
                entry.answer.set_exception(answer)
            else:
                entry.answer.set_result(answer)
        return again

    def _land(self, entries: collections.abc.Iterable[_Entry[Call, Answer]]) -> None:
        for entry in entries:
            self._busy.difference_update(entry.keys)
        self._depart()

    def _own(self, flight: collections.abc.Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(flight)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
