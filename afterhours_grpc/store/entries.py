"""A call in the queue of a `batching.Batcher`, and the caller who waits for its answer."""

import asyncio
import collections.abc
import dataclasses
import typing

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import keyed_queue

Call = typing.TypeVar("Call")
Answer = typing.TypeVar("Answer")

# Seconds between two passes over the deadlines, at least: each pass is over all callers.
_PAUSE = 0.005


@dataclasses.dataclass(slots=True, eq=False)
class Entry(typing.Generic[Call, Answer]):
    """A call, from when it is let in until it is answered."""

    call: Call
    keys: tuple[keyed_queue.Key, ...]
    deadline: session.Deadline
    answer: asyncio.Future[Answer]
    # Equal reads that came later and share the answer; they are not in the queue themselves.
    joined: "list[Entry[Call, Answer]] | None" = None
    # How many callers waited for the answer when the entry was taken, or do now.
    callers: int = 0
    # Taken from the queue, for a batch or for tries of its own.
    taken: bool = False
    # Admitted by what the batcher asks first, and not to be asked about again.
    admitted: bool = False
    # In a statement that is under way and changes something, so that the call is not known to be unapplied.
    in_flight: bool = False

    def join(self, other: "Entry[Call, Answer]") -> None:
        """Have another entry share the answer."""
        if self.joined is None:
            self.joined = []
        self.joined.append(other)

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for the answer."""
        return not self.answer.done() or bool(self.joined and not all(each.answer.done() for each in self.joined))

    @property
    def latest(self) -> float:
        """When nobody waits any more."""
        return max(each.deadline.at for each in self._sharing())

    def settle(self, answer: Answer | Exception) -> None:
        """Answer all who still wait."""
        for each in self._sharing():
            if each.answer.done():
                continue
            if isinstance(answer, Exception):
                each.answer.set_exception(answer)
            else:
                each.answer.set_result(answer)

    def take_back(self, now: float) -> None:
        """Note that the call is known not to be applied, and tell those whose deadline passed meanwhile."""
        self.in_flight = False
        for each in self._sharing():
            if each.deadline.at <= now:
                each.expire()

    def expire(self) -> None:
        """Answer the caller that the deadline passed.

        A call in flight may still be applied, which DEADLINE_EXCEEDED denies. Then nothing is answered, and the status
        that the caller's own library makes up at its deadline promises nothing.
        """
        if self.answer.done():
            return
        if not self.deadline.of_caller:
            self.answer.set_exception(errors.StoreUnavailable())
        elif not self.in_flight:
            self.answer.set_exception(errors.DeadlineExceeded())

    def _sharing(self) -> "collections.abc.Iterable[Entry[Call, Answer]]":
        return (self, *self.joined) if self.joined else (self,)


class Deadlines(typing.Generic[Call, Answer]):
    """Answers callers at their deadlines: by one timer for the first of them all, since one for each cost more."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._entries: set[Entry[Call, Answer]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, entry: Entry[Call, Answer]) -> None:
        """Answer the caller of an entry at its deadline, unless it is forgotten before."""
        self._entries.add(entry)
        at = entry.deadline.at
        if not self._timer or at < self._timer.when():
            self._wake_at(at)

    def forget(self, entry: Entry[Call, Answer]) -> None:
        """Watch an entry no longer."""
        self._entries.discard(entry)

    def _wake_at(self, at: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._expire, at)

    def _expire(self, at: float) -> None:
        now = max(at, self._loop.time())
        self._timer = None
        for entry in self._entries:
            if entry.deadline.at <= now:
                entry.expire()
        if later := [entry.deadline.at for entry in self._entries if entry.deadline.at > now]:
            self._wake_at(max(min(later), now + _PAUSE))
