"""Reading many sessions at once: a few such calls at a time, so that starts and ends have Postgres, too."""

import collections.abc
import datetime
import functools
import typing
import uuid

from afterhours_grpc.sessions import session
from afterhours_grpc.store import batching, lists

Near = lists.Near
Result = typing.TypeVar("Result")
Start = tuple[datetime.datetime, session.SessionId]

# Calls that read at once, and that may wait.
_AT_ONCE = 4
_ROOM = 1024

FIRST: Start = (datetime.datetime.min.replace(tzinfo=datetime.UTC), session.SessionId(uuid.UUID(int=0)))
LAST: Start = (datetime.datetime.max.replace(tzinfo=datetime.UTC), session.SessionId(uuid.UUID(int=2**128 - 1)))


class Listing:
    """The lists of sessions. Pages are of at most `size` sessions, and begin after the key of the one before."""

    def __init__(self, lists: lists.Lists) -> None:
        self._lists = lists
        self._reads: batching.Batcher[collections.abc.Callable[[], typing.Any], typing.Any] = batching.Batcher(
            self._read, lambda read: (str(id(read)),), most=1, flights=_AT_ONCE, room=_ROOM
        )

    async def of_users(
        self,
        user_ids: collections.abc.Sequence[session.UserId],
        min_remaining: datetime.timedelta,
        deadline: session.Deadline,
    ) -> list[session.Session]:
        """Read the active sessions of users, in their order; a repeated one is answered once."""
        distinct = list(dict.fromkeys(user_ids))
        return await self._submit(functools.partial(self._lists.of_users, distinct, min_remaining), deadline)

    async def history(
        self, user_id: session.UserId, before: Start, size: int, deadline: session.Deadline
    ) -> list[session.Session]:
        """Read a user's sessions, newest first."""
        return await self._submit(functools.partial(self._lists.history, user_id, before, size), deadline)

    async def active(
        self, min_remaining: datetime.timedelta, after: Start, size: int, deadline: session.Deadline
    ) -> list[session.Session]:
        """Read all active sessions, oldest first."""
        return await self._submit(functools.partial(self._lists.active, min_remaining, after, size), deadline)

    async def near(
        self, near: lists.Near, min_remaining: datetime.timedelta, size: int, deadline: session.Deadline
    ) -> list[tuple[session.Session, float]]:
        """Read the active sessions near a place, nearest first, with how many metres away each is shown."""
        return await self._submit(functools.partial(self._lists.near, near, min_remaining, size), deadline)

    async def close(self) -> None:
        """Wait until what was taken has been answered."""
        await self._reads.close()

    async def _submit(
        self, read: collections.abc.Callable[[], collections.abc.Awaitable[Result]], deadline: session.Deadline
    ) -> Result:
        found: Result = await self._reads.submit(read, deadline)
        return found

    async def _read(self, reads: list[collections.abc.Callable[[], typing.Any]]) -> list[typing.Any]:
        return [await read() for read in reads]
