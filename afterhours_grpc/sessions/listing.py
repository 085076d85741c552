"""Reading many sessions at once: a few such calls at a time, so that starts and ends have Postgres, too."""

import collections.abc
import dataclasses
import datetime
import functools
import typing
import uuid

from afterhours_grpc.sessions import session
from afterhours_grpc.store import batching, lists

Near = lists.Near
Result = typing.TypeVar("Result")
Start = tuple[datetime.datetime, session.SessionId]

# Calls that read at once, and that are let in.
_AT_ONCE = 4
_CAPACITY = 1024

FIRST: Start = (datetime.datetime.min.replace(tzinfo=datetime.UTC), session.SessionId(uuid.UUID(int=0)))
LAST: Start = (datetime.datetime.max.replace(tzinfo=datetime.UTC), session.SessionId(uuid.UUID(int=2**128 - 1)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """A read, and whose queue it waits in."""

    key: str
    run: collections.abc.Callable[[], typing.Any]


class Listing:
    """The lists of sessions. Pages are of at most `size` sessions, and begin after the key of the one before.

    Of each kind of list, those of one caller are read one at a time, and at most 64 wait, so that no caller's lists
    hold up those of others. A history waits with those of the same user instead.
    """

    def __init__(self, lists: lists.Lists) -> None:
        self._lists = lists
        self._reads: batching.Batcher[_Read, typing.Any] = batching.Batcher(
            self._read, lambda read: (read.key,), max_batch=1, max_in_flight=_AT_ONCE, capacity=_CAPACITY
        )

    async def of_users(
        self,
        caller: str,
        user_ids: collections.abc.Sequence[session.UserId],
        min_remaining: datetime.timedelta,
        deadline: session.Deadline,
    ) -> list[session.Session]:
        """Read the active sessions of users, in their order; a repeated one is answered once."""
        distinct = list(dict.fromkeys(user_ids))
        run = functools.partial(self._lists.of_users, distinct, min_remaining)
        return await self._submit(f"of users {caller}", run, deadline)

    async def history(
        self, user_id: session.UserId, before: Start, size: int, deadline: session.Deadline
    ) -> list[session.Session]:
        """Read a user's sessions, newest first."""
        run = functools.partial(self._lists.history, user_id, before, size)
        return await self._submit(f"history {user_id}", run, deadline)

    async def active(
        self, caller: str, min_remaining: datetime.timedelta, after: Start, size: int, deadline: session.Deadline
    ) -> list[session.Session]:
        """Read all active sessions, oldest first."""
        run = functools.partial(self._lists.active, min_remaining, after, size)
        return await self._submit(f"active {caller}", run, deadline)

    async def near(
        self, caller: str, near: lists.Near, min_remaining: datetime.timedelta, size: int, deadline: session.Deadline
    ) -> list[tuple[session.Session, float]]:
        """Read the active sessions near a place, nearest first, with how many metres away each is shown."""
        run = functools.partial(self._lists.near, near, min_remaining, size)
        return await self._submit(f"active {caller}", run, deadline)

    async def close(self) -> None:
        """Wait until what was taken has been answered."""
        await self._reads.close()

    async def _submit(
        self, key: str, run: collections.abc.Callable[[], collections.abc.Awaitable[Result]], deadline: session.Deadline
    ) -> Result:
        found: Result = await self._reads.submit(_Read(key, run), deadline)
        return found

    async def _read(self, reads: list[_Read]) -> list[typing.Any]:
        return [await read.run() for read in reads]
