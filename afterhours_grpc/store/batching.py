"""Many calls, one statement: calls that arrive while a batch is in flight share the next one.

The limit of the service is the processor time of its one thread, and a statement costs much of that whether it carries
one call or thirty. So there is one batch at a time, as full as possible without making anybody wait for it.
"""

import asyncio
import collections.abc
import time
import typing
import uuid

import structlog
import tenacity

from afterhours_grpc import logs
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, entries, keyed_queue

log = structlog.get_logger()

Call = typing.TypeVar("Call")
Answer = typing.TypeVar("Answer")
Outcome = typing.TypeVar("Outcome")
_Do = collections.abc.Callable[[list[Call]], collections.abc.Awaitable[collections.abc.Sequence[Outcome | Exception]]]

# Seconds for which a batch waits for callers that were just answered and usually call again.
_LINGER = 0.002
# Seconds after which a batch no longer holds up the next one: it waits for a lock, or for a slow disk.
_SLOW = 0.01


class Batcher(typing.Generic[Call, Answer]):
    """Gathers calls into batches of at most `max_batch`: one at a time, and at most `max_in_flight` if they are slow.

    A lone call goes at once, with all that came in the same turn of the event loop, without a timer. Under load the
    next batch departs with as many calls as the last one answered and left behind, or 2 ms after it landed. Calls that
    share a key are never in the same or in concurrent batches, and keep their order. Each batch is sorted by the first
    keys. At most `capacity` calls are let in at once, and at most `per_key` of those that share a key.

    `flush` applies a batch and returns an answer for each call, in order. An answer may be an exception; one that is
    `database.Retry` has its call tried again by itself. If `flush` raises an error that says that nothing was applied,
    each call is tried by itself, so that only those at fault fail. If it raises anything else, the batch may have been
    applied: its calls are never tried again, and fail with Bug, which is logged once. Before `flush`, `admit` is asked
    about each call once, in batches, and returns None or the exception that refuses the call; it applies nothing.

    With `reads`, `flush` changes nothing, so that calls are tried by themselves whatever it raises, and those that have
    the same key are answered by one read that begins after all of them arrived; they count as one.

    A caller that is cancelled or late leaves the queue. Once in flight its call may be applied for nobody.
    """

    def __init__(
        self,
        flush: _Do[Call, Answer],
        keys: collections.abc.Callable[[Call], tuple[keyed_queue.Key, ...]],
        *,
        admit: _Do[Call, None] | None = None,
        reads: bool = False,
        max_batch: int = 128,
        max_in_flight: int = 4,
        capacity: int = 4096,
        per_key: int = 64,
    ) -> None:
        self._flush = flush
        self._keys = keys
        self._admit = admit
        self._reads = reads
        self._max_batch = max_batch
        self._max_in_flight = max_in_flight
        self._capacity = capacity
        self._loop = asyncio.get_running_loop()
        self._queue: keyed_queue.KeyedQueue[entries.Entry[Call, Answer]] = keyed_queue.KeyedQueue(capacity, per_key)
        self._deadlines: entries.Deadlines[Call, Answer] = entries.Deadlines()
        # How many callers wait for an entry that is not taken.
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._departing = False
        # Whether the last batch has landed, or is slow; how many calls the next one waits for, and until when.
        self._cleared = True
        self._expected = 1
        self._lingering: asyncio.TimerHandle | None = None
        self._alone = asyncio.Semaphore(max_in_flight)

    async def submit(self, call: Call, deadline: session.Deadline) -> Answer:
        """Return the answer to `call`, or raise what it was refused with; Overloaded if there is no room.

        At its deadline DeadlineExceeded is raised if nothing of it was applied or will be; where `deadline` is the
        service's own, StoreUnavailable, even if it was.
        """
        entry: entries.Entry[Call, Answer] = entries.Entry(call, self._keys(call), deadline, self._loop.create_future())
        first = self._enter(entry)
        first.callers += 1
        self._waiting += 1
        self._deadlines.watch(entry)
        if self._cleared and not self._departing and self._waiting >= self._expected:
            self._departing = True
            self._loop.call_soon(self._depart)
        try:
            return await entry.answer
        finally:
            self._deadlines.forget(entry)
            if not first.taken:
                self._waiting -= 1
                first.callers -= 1
                if not first.callers:
                    self._queue.withdraw(first)

    def _enter(self, entry: entries.Entry[Call, Answer]) -> entries.Entry[Call, Answer]:
        """Queue an entry, or have it join an equal read that has not begun; return the one that is in the queue."""
        if self._reads and (last := self._queue.last(entry.keys[0])) and not last.taken:
            if last.callers >= self._capacity:
                raise errors.Overloaded
            last.join(entry)
            return last
        self._queue.put(entry)
        return entry

    async def close(self) -> None:
        """Wait until every call in the queue and in flight has been answered."""
        while len(self._queue) or self._tasks:
            self._clear()
            await asyncio.wait(self._tasks or [asyncio.create_task(asyncio.sleep(0))])

    def _clear(self) -> None:
        """Let the next batch depart with whatever waits."""
        self._cleared, self._expected = True, 1
        self._stop_lingering()
        self._depart()

    def _stop_lingering(self) -> None:
        if self._lingering:
            self._lingering.cancel()
        self._lingering = None

    def _depart(self) -> None:
        self._departing = False
        if not self._cleared or self._in_flight >= self._max_in_flight:
            return
        if batch := self._board():
            self._in_flight += 1
            self._cleared = False
            # When this batch lands it says how many calls the next one waits for.
            self._stop_lingering()
            self._own(self._fly(batch))

    def _board(self) -> list[entries.Entry[Call, Answer]]:
        """Take the calls of a batch from the queue."""
        batch: list[entries.Entry[Call, Answer]] = []
        while len(batch) < self._max_batch and (entry := self._queue.take()):
            entry.taken = True
            self._waiting -= entry.callers
            batch.append(entry)
        batch.sort(key=lambda entry: typing.cast("str", entry.keys[0]))
        return batch

    async def _fly(self, batch: list[entries.Entry[Call, Answer]]) -> None:
        again: set[entries.Entry[Call, Answer]] = set()
        slow = self._loop.call_later(_SLOW, self._clear)
        try:
            again = await self._try(batch)
        finally:
            slow.cancel()
            self._in_flight -= 1
            for entry in batch:
                if entry in again:
                    self._own(self._fly_alone(entry))
                else:
                    self._queue.release(entry)
            self._expected = min(self._max_batch, self._waiting + sum(entry.callers for entry in batch))
            self._cleared = True
            if self._waiting >= self._expected:
                self._clear()
            elif self._expected > 1 and not self._lingering:
                self._lingering = self._loop.call_later(_LINGER, self._clear)

    async def _fly_alone(self, entry: entries.Entry[Call, Answer]) -> None:
        latest = entry.latest
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(database.Retry),
                wait=tenacity.wait_random_exponential(multiplier=0.005, max=0.1),
                stop=tenacity.stop_after_delay(latest - time.monotonic()),
                reraise=True,
            ):
                with attempt:
                    async with self._alone:
                        if entry.wanted and await self._try([entry]):
                            raise database.Retry  # noqa: TRY301 - for the loop around it
        except database.Retry:
            entry.take_back(latest)
        finally:
            self._queue.release(entry)
            self._depart()

    async def _try(self, batch: list[entries.Entry[Call, Answer]]) -> set[entries.Entry[Call, Answer]]:
        """Apply and answer what is admitted, and return the entries that are to be tried again by themselves."""
        again: set[entries.Entry[Call, Answer]] = set()
        if self._admit:
            asked = [entry for entry in batch if not entry.admitted]
            for entry, refusal in await self._outcomes(self._admit, asked, harmless=True):
                if isinstance(refusal, database.Retry):
                    again.add(entry)
                elif refusal:
                    entry.settle(refusal)
                else:
                    entry.admitted = True
            batch = [entry for entry in batch if entry.admitted]
        # Whoever was told since it was taken that nothing was applied must not find it applied.
        batch = [entry for entry in batch if entry.wanted]
        for entry in batch:
            entry.in_flight = not self._reads
        for entry, answer in await self._outcomes(self._flush, batch, harmless=self._reads):
            if isinstance(answer, database.Retry):
                entry.take_back(time.monotonic())
                again.add(entry)
            else:
                entry.settle(answer)
        return again

    async def _outcomes(
        self, do: _Do[Call, Outcome], batch: list[entries.Entry[Call, Answer]], *, harmless: bool
    ) -> list[tuple[entries.Entry[Call, Answer], Outcome | Exception]]:
        """Return what became of each call, whatever `do` raises."""
        if not batch:
            return []
        outcome: Exception
        try:
            return list(zip(batch, await do([entry.call for entry in batch]), strict=True))
        except (database.Retry, errors.SessionError) as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - a bug, or one call's fault: no caller may wait for ever
            if len(batch) > 1 and (harmless or isinstance(error, database.StatementFailed)):
                outcome = database.Retry()
            else:
                outcome = errors.Bug(uuid.uuid4().hex)
                log.error("bug", error_id=outcome.error_id, **logs.described(error))
        return [(entry, outcome) for entry in batch]

    def _own(self, flight: collections.abc.Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(flight)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
