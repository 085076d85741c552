"""A call in the queue of a `batching.Batcher`, and those who wait for its answer."""

import asyncio
import dataclasses
import typing

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import keyed_queue

Call = typing.TypeVar("Call")
Answer = typing.TypeVar("Answer")

# Seconds between two passes over the deadlines, at least: each pass is over all callers.
_PAUSE = 0.005


@dataclasses.dataclass(slots=True, eq=False)
class Caller(typing.Generic[Call, Answer]):
    """Whoever waits for the answer to an entry's call."""

    entry: "Entry[Call, Answer]"
    deadline: session.Deadline
    answer: asyncio.Future[Answer]

    def expire(self) -> None:
        """Answer that the deadline passed.

        A call in flight may still be applied, which DEADLINE_EXCEEDED denies. Then nothing is answered, and the status
        that the caller's own library makes up at its deadline promises nothing.
        """
        if self.answer.done():
            return
        if not self.deadline.of_caller:
            self.answer.set_exception(errors.StoreUnavailable())
        elif not self.entry.in_flight:
            self.answer.set_exception(errors.DeadlineExceeded())


@dataclasses.dataclass(slots=True, eq=False)
class Entry(typing.Generic[Call, Answer]):
    """A call, from when it is let in until it is answered."""

    call: Call
    keys: tuple[keyed_queue.Key, ...]
    # More than one where reads are shared.
    callers: set[Caller[Call, Answer]] = dataclasses.field(default_factory=set)
    # Taken from the queue, for a batch or for tries of its own.
    taken: bool = False
    # Admitted by what the batcher asks first, and not to be asked about again.
    admitted: bool = False
    # In a statement that is under way and changes something, so that the call is not known to be unapplied.
    in_flight: bool = False

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for the answer."""
        return any(not caller.answer.done() for caller in self.callers)

    def settle(self, answer: Answer | Exception) -> None:
        """Answer all who still wait."""
        for caller in self.callers:
            if caller.answer.done():
                continue
            if isinstance(answer, Exception):
                caller.answer.set_exception(answer)
            else:
                caller.answer.set_result(answer)

    def expire(self, now: float) -> None:
        """Answer those whose deadline passed that it did."""
        for caller in self.callers:
            if caller.deadline.at <= now:
                caller.expire()


class Deadlines(typing.Generic[Call, Answer]):
    """Answers callers at their deadlines: by one timer for the first of them all, since one for each cost more."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._callers: set[Caller[Call, Answer]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, caller: Caller[Call, Answer]) -> None:
        """Answer a caller at its deadline, unless it is forgotten before."""
        self._callers.add(caller)
        at = caller.deadline.at
        if not self._timer or at < self._timer.when():
            self._wake_at(at)

    def forget(self, caller: Caller[Call, Answer]) -> None:
        """Watch a caller no longer."""
        self._callers.discard(caller)

    def _wake_at(self, at: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._expire, at)

    def _expire(self, at: float) -> None:
        now = max(at, self._loop.time())
        self._timer = None
        for caller in self._callers:
            if caller.deadline.at <= now:
                caller.expire()
        if later := [caller.deadline.at for caller in self._callers if caller.deadline.at > now]:
            self._wake_at(max(min(later), now + _PAUSE))
