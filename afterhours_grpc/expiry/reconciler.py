"""What makes Redis optional: a sweep that closes what is overdue, and mends the timers."""

import asyncio
import dataclasses
import datetime
import time
import uuid

import redis.exceptions
import structlog

from afterhours_grpc import failpoints, metrics
from afterhours_grpc.expiry import clock, timers
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, store

log = structlog.get_logger()

# Rows of one statement: closed, read for their timers, or forgotten.
BATCH = 1000
_FIRST = (datetime.datetime.min.replace(tzinfo=datetime.UTC), session.SessionId(uuid.UUID(int=0)))


@dataclasses.dataclass(frozen=True, slots=True)
class Swept:
    """What one run did: counts of sessions, timers and answers."""

    closed: int
    armed: int = 0
    dropped: int = 0
    forgotten: int = 0


class Reconciler:
    """Sweeps Postgres and Redis every `interval`. Any number of replicas may do so at once."""

    def __init__(
        self, store: store.Store, timers: timers.Timers, clock: clock.Clock, interval: datetime.timedelta
    ) -> None:
        self._store = store
        self._timers = timers
        self._clock = clock
        self._interval = interval.total_seconds()
        # Where the sweeps for missing and for stale timers go on; each run takes at least one slice of both.
        self._armed_to = _FIRST
        self._rank = 0

    async def close_overdue(self) -> int:
        """Close every overdue session, in batches, and give how many. Raise `errors.StoreUnavailable`."""
        closed = 0
        while True:
            ids = await self._store.expire_overdue(BATCH)
            closed += len(ids)
            failpoints.reach(failpoints.Point.SWEPT)
            await self._timers.cancel(ids)
            if len(ids) < BATCH:
                return closed

    async def run_once(self) -> Swept:
        """Close what is overdue, then mend a slice of the timers, then forget old answers.

        Raise `errors.StoreUnavailable`. While slices have timers missing, because Redis lost them, it goes on with the
        next at once, for at most half an interval. Without Redis the timers are left alone.
        """
        until = time.monotonic() + self._interval / 2
        await self._clock.measure(self._store)
        closed = await self.close_overdue()
        forgotten = await self._store.forget_requests(BATCH)
        armed = missing = dropped = 0
        try:
            while (missing := await self._arm_slice()) and time.monotonic() < until:
                armed += missing
            dropped = await self._drop_slice()
        except redis.exceptions.RedisError as error:
            log.warning("timers_unswept", error=type(error).__name__)
        return Swept(closed, armed + missing, dropped, forgotten)

    async def _arm_slice(self) -> int:
        due = await self._store.active_after(*self._armed_to, BATCH)
        missing = await self._timers.arm(due)
        self._armed_to = (due[-1][1], due[-1][0]) if len(due) == BATCH else _FIRST
        return missing

    async def _drop_slice(self) -> int:
        members = await self._timers.after(self._rank, BATCH)
        # Read after the timers: a session is committed before its timer is set, and never revives.
        active = await self._store.still_active([session.SessionId(id) for _, id in members if id])
        stale = [member for member, id in members if id not in active]
        await self._timers.drop(stale)
        self._rank = self._rank + len(members) - len(stale) if len(members) == BATCH else 0
        return len(stale)

    async def run(self) -> None:
        """Run now and every interval, until cancelled. A Postgres that is away is tried again at the next."""
        while True:
            began = time.monotonic()
            try:
                swept = await self.run_once()
            except (errors.StoreUnavailable, database.Retry) as error:
                log.warning("sweep_delayed", error=type(error).__name__)
            else:
                metrics.EXPIRED.inc(swept.closed)
                if swept != Swept(closed=0):
                    log.info("swept", **dataclasses.asdict(swept))
            await asyncio.sleep(max(0.0, began + self._interval - time.monotonic()))
