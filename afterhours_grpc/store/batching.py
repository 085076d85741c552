"""Many calls, one statement: calls that arrive while a flush is in flight share the next one.

What limits the service is the processor time of its one thread, and a statement costs much of that whether it is for
one call or for thirty: so one flight at a time, as full as can be had without letting anybody wait for it.
"""

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

# Seconds for which those are waited for who were answered just now and come back, while others wait for them.
_GATHER = 0.002
# Seconds after which a flight does not keep the next one on the ground: it waits for a lock, or for a slow disk.
_SLOW = 0.01


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
    """Gathers calls into flushes of at most `most`: one at a time, and at most `flights` if they are slow.

    A lone call goes at once, with all that came in the same turn of the event loop; no timer is involved. Under load
    the next flush departs with as many calls as the last one answered and left, or 2 ms after it landed. Two calls that
    share a key are never in the same or in concurrent flushes, and keep their order. Each flush is sorted by the calls'
    first keys.

    `flush` gives an answer a call, in order; an answer may be an exception, and `database.Retry` among them has
    its call tried again by itself. If a flush fails as a whole for what may be the fault of one call, each is tried by
    itself. A caller that is cancelled or late leaves the queue; once in flight its call may be applied, and nobody
    waits for it. More than `room` callers at once are not let in.
    """

    def __init__(
        self,
        flush: collections.abc.Callable[
            [list[Call]], collections.abc.Awaitable[collections.abc.Sequence[Answer | Exception]]
        ],
        keys: collections.abc.Callable[[Call], tuple[collections.abc.Hashable, ...]],
        *,
        most: int = 128,
        flights: int = 4,
        room: int = 4096,
    ) -> None:
        self._flush = flush
        self._keys = keys
        self._most = most
        self._flights = flights
        self._room = room
        self._loop = asyncio.get_running_loop()
        self._waiting: collections.deque[_Entry[Call, Answer]] = collections.deque()
        self._busy: set[collections.abc.Hashable] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flying = 0
        self._inside: set[_Entry[Call, Answer]] = set()
        # One for the first deadline of them all: a timer for each call was a twentieth of a start.
        self._alarm: asyncio.TimerHandle | None = None
        # Whether the last flight has landed, or is slow.
        self._cleared = True
        self._departing = False
        # As many calls as are waited for, and until when.
        self._expected = 1
        self._gathering: asyncio.TimerHandle | None = None
        self._alone = asyncio.Semaphore(flights)

    async def submit(self, call: Call, deadline: session.Deadline) -> Answer:
        """Give the answer to `call`, or raise what it was refused for; Overloaded if there is no room.

        At its deadline DeadlineExceeded is raised if nothing of it was applied or will be; where `deadline` is the
        service's own, StoreUnavailable, even if it was.
        """
        if len(self._inside) >= self._room:
            raise errors.Overloaded
        entry: _Entry[Call, Answer] = _Entry(call, self._keys(call), deadline, self._loop.create_future())
        self._waiting.append(entry)
        self._inside.add(entry)
        if self._cleared and not self._departing and len(self._waiting) >= self._expected:
            self._departing = True
            self._loop.call_soon(self._depart)
        if not self._alarm or deadline.at < self._alarm.when():
            self._wake_at(deadline.at)
        try:
            return await entry.answer
        finally:
            self._inside.discard(entry)
            if len(self._waiting) > 2 * self._room:  # half of them and more have gone away
                self._waiting = collections.deque(each for each in self._waiting if not each.answer.done())

    def _wake_at(self, at: float) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(at, self._ring, at)

    def _ring(self, at: float) -> None:
        """Tell those whose deadline passed, and wake up for the first of the others."""
        now = max(at, self._loop.time())
        self._alarm = None
        for entry in self._inside:
            if entry.deadline.at <= now:
                entry.late()
        if later := [entry.deadline.at for entry in self._inside if entry.deadline.at > now]:
            self._wake_at(min(later))

    async def close(self) -> None:
        """Wait until every call in the queue and in flight has been answered."""
        while self._waiting or self._tasks:
            self._clear()
            await asyncio.wait(self._tasks or [asyncio.create_task(asyncio.sleep(0))])

    def _clear(self) -> None:
        """Let the next flight depart with whoever waits."""
        self._cleared, self._expected = True, 1
        self._gathered()
        self._depart()

    def _gathered(self) -> None:
        if self._gathering:
            self._gathering.cancel()
        self._gathering = None

    def _depart(self) -> None:
        self._departing = False
        if self._waiting and self._cleared and self._flying < self._flights:
            entries = self._board()
            if entries:
                self._flying += 1
                self._cleared = False
                # Its landing says how many are waited for next.
                self._gathered()
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
        slow = self._loop.call_later(_SLOW, self._clear)
        try:
            again = await self._try(entries)
        finally:
            slow.cancel()
            self._flying -= 1
            for entry in again:
                self._own(self._fly_alone(entry))
            self._land(entry for entry in entries if entry not in again)
            self._expected = min(self._most, len(self._waiting) + len(entries))
            self._cleared = True
            if len(self._waiting) >= self._expected:
                self._clear()
            elif self._expected > 1 and not self._gathering:
                self._gathering = self._loop.call_later(_GATHER, self._clear)

    async def _fly_alone(self, entry: _Entry[Call, Answer]) -> None:
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(database.Retry),
                wait=tenacity.wait_random_exponential(multiplier=0.005, max=0.1),
                stop=tenacity.stop_after_delay(entry.deadline.at - time.monotonic()),
                reraise=True,
            ):
                with attempt:
                    async with self._alone:
                        if not entry.answer.done() and await self._try([entry]):
                            raise database.Retry  # noqa: TRY301 - told to the loop around it
        except database.Retry:
            entry.late()
        finally:
            self._land([entry])
            self._depart()

    async def _try(self, entries: list[_Entry[Call, Answer]]) -> list[_Entry[Call, Answer]]:
        """Flush, answer, and give those that are to be tried again by themselves."""
        for entry in entries:
            entry.flying = True
        answers: collections.abc.Sequence[Answer | Exception]
        try:
            answers = await self._flush([entry.call for entry in entries])
        except (database.Retry, errors.SessionError) as error:
            answers = [error] * len(entries)
        except Exception as error:  # noqa: BLE001 - one call's fault, or ours: told to its caller, who logs it
            answers = [database.Retry() if len(entries) > 1 else error] * len(entries)
        again = []
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, database.Retry):
                entry.flying = False  # Taken back: from here on it is known not to be applied.
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

    def _own(self, flight: collections.abc.Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(flight)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
