"""What is timed of a session: its end, and the warning of it."""

import asyncio
import collections.abc
import datetime
import math

import redis.exceptions

from afterhours_grpc import redis_client
from afterhours_grpc.expiry import clock, jobs, sweep, timers
from afterhours_grpc.sessions import session
from afterhours_grpc.store import store

# Of an interval: how recently another replica must have begun to mend for this one not to, and what mending may take.
_RECENTLY = 0.9
_SHARE = 0.25
# Seconds beyond two intervals in which what is due counts as due soon, and in which it does at most.
_MARGIN = 1.0
_LATEST = 86400.0


class Schedule:
    """The timers of all sessions: of their ends, and of the warnings. `set` and `cancel` never raise."""

    def __init__(self, url: str, store: store.Store, clock: clock.Clock) -> None:
        server = redis_client.Server(url)
        self._clock = clock
        # A process that has just started knows nothing of what happened before it, so it mends whoever did lately.
        self._has_mended = False
        self._redis = server.client(connections=1, timeout=jobs.TIMEOUT)
        self.ends = timers.Timers(server, jobs.EXPIRE, store.expire, clock)
        self.warnings = timers.Timers(server, jobs.WARN, store.warn, clock)
        self.kinds = (self.ends, self.warnings)
        self._sweeps = (
            sweep.Sweep(self.ends, store.active_due, store.active_slices, store.still_active),
            sweep.Sweep(self.warnings, store.warnings_due, store.warning_slices, store.still_to_warn),
        )

    def start(self) -> None:
        """Begin to fire."""
        for each in self.kinds:
            each.start()

    async def stop(self) -> None:
        """Claim nothing more; idempotent."""
        await asyncio.gather(*(each.stop() for each in self.kinds))

    async def close(self) -> None:
        """Close the connections; idempotent."""
        for each in self.kinds:
            await each.close()
        await self._redis.aclose()

    @property
    def alive(self) -> bool:
        """Whether the schedulers' threads still look for what is due. If not, only a new process brings them back."""
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

    async def mend(self, interval: float) -> sweep.Mended:
        """Mend the timers, the first time always, and later unless another replica began to within `interval` seconds.

        It takes about half of `interval` at most. Raise RedisError or `errors.StoreUnavailable`.
        """
        now = self._clock.now()
        mended = sweep.Mended()
        if self._has_mended and 0 <= now - await self._mended_at() < _RECENTLY * interval:
            return mended
        await self._redis.set(jobs.MENDED, jobs.score(now))
        at = datetime.datetime.fromtimestamp(now, datetime.UTC)
        soon = at + datetime.timedelta(seconds=min(2 * interval + _MARGIN, _LATEST))
        for each in self._sweeps:
            of_kind = await each.run_once(at, soon, _SHARE * interval)
            mended.armed += of_kind.armed
            mended.dropped += of_kind.dropped
        self._has_mended = True
        return mended

    async def _mended_at(self) -> float:
        """Return when a replica last began to mend; long ago where somebody else wrote something odd."""
        try:
            return float(await self._redis.get(jobs.MENDED) or -math.inf)
        except (ValueError, redis.exceptions.ResponseError):
            return -math.inf
