"""What is timed of a session: its end, and the warning of it."""

import asyncio
import collections.abc
import dataclasses
import datetime
import uuid

from afterhours_grpc.expiry import clock, jobstore, timers
from afterhours_grpc.sessions import session
from afterhours_grpc.store import store

# Rows of one statement, and members of one read.
_SLICE = 1000
_FIRST = (datetime.datetime.min.replace(tzinfo=datetime.UTC), session.SessionId(uuid.UUID(int=0)))

_After = collections.abc.Callable[
    [datetime.datetime, session.SessionId, int], collections.abc.Awaitable[list[timers.Due]]
]
_Still = collections.abc.Callable[
    [collections.abc.Sequence[session.SessionId]], collections.abc.Awaitable[set[session.SessionId]]
]


@dataclasses.dataclass(slots=True)
class Sweep:
    """Mends the timers of a kind, a slice at a time: sets those that are missing, and drops those that are stale.

    `after` reads from Postgres what should have a timer, soonest first, and `still` which of some sessions should.
    """

    timers: timers.Timers
    after: _After
    still: _Still
    # Where the next slices begin.
    _armed_to: tuple[datetime.datetime, session.SessionId] = _FIRST
    _rank: int = 0

    async def arm_slice(self) -> int:
        """Set what is missing in the next slice, and give how many it was. Raise RedisError."""
        due = await self.after(*self._armed_to, _SLICE)
        missing = await self.timers.arm(due)
        self._armed_to = (due[-1][1], due[-1][0]) if len(due) == _SLICE else _FIRST
        return missing

    async def drop_slice(self) -> int:
        """Drop what is stale in the next slice, and give how many it was. Raise RedisError."""
        members = await self.timers.after(self._rank, _SLICE)
        # Read after the timers: a session is committed before its timer is set, and never revives.
        active = await self.still([session.SessionId(id) for _, id in members if id])
        stale = [member for member, id in members if id not in active]
        await self.timers.drop(stale)
        self._rank = self._rank + len(members) - len(stale) if len(members) == _SLICE else 0
        return len(stale)


class Schedule:
    """The timers of all sessions: of their ends, and of the warnings. `set` and `cancel` never raise."""

    def __init__(self, url: str, store: store.Store, clock: clock.Clock) -> None:
        self.ends = timers.Timers(url, jobstore.EXPIRE, store.expire, clock)
        self.warnings = timers.Timers(url, jobstore.WARN, store.warn, clock)
        self.kinds = (self.ends, self.warnings)
        self.sweeps = (
            Sweep(self.ends, store.active_after, store.still_active),
            Sweep(self.warnings, store.warned_after, store.still_to_warn),
        )

    def start(self) -> None:
        """Begin to fire."""
        for each in self.kinds:
            each.start()

    def stop(self) -> None:
        """Claim nothing more; idempotent."""
        for each in self.kinds:
            each.stop()

    async def close(self) -> None:
        """Close the connections; idempotent."""
        for each in self.kinds:
            await each.close()

    @property
    def alive(self) -> bool:
        """Whether what fires has looked lately for what is due."""
        return all(each.alive for each in self.kinds)

    async def set(self, sessions: collections.abc.Sequence[session.Session]) -> None:
        """Time sessions, or move their timers to a later time. It takes at most 0.1 s."""
        # Nobody waits for a warning's timer.
        self.warnings.put({each.id: each.warn_at for each in sessions if each.warn_at})
        await self.ends.set([(each.id, each.expires_at) for each in sessions])

    async def cancel(self, ids: collections.abc.Sequence[session.SessionId]) -> None:
        """Drop the timers of sessions that ended. It takes at most 0.1 s."""
        self.warnings.put(dict.fromkeys(ids))
        await self.ends.cancel(ids)

    async def drop_of(self, ids: collections.abc.Sequence[session.SessionId]) -> None:
        """Remove the timers of sessions, without what writes them in the background."""
        await asyncio.gather(*(each.drop_of(ids) for each in self.kinds))
