"""What makes Redis optional: a sweep that closes what is overdue, and mends the timers. It keeps retentions, too."""

import asyncio
import collections.abc
import dataclasses
import datetime
import functools
import time
import uuid

import redis.exceptions
import structlog

from afterhours_grpc import failpoints
from afterhours_grpc.expiry import clock, schedule, sweep
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, outbox, privacy, store

log = structlog.get_logger()

# Rows of one statement: closed, warned of, or cleared away.
BATCH = 1000
# Seconds for which a warning that is due is left to its timer.
_LEFT_TO_TIMERS = 1.0
_EPOCH = datetime.datetime.fromtimestamp(0, datetime.UTC)
_FIRST_ID = session.SessionId(uuid.UUID(int=0))


@dataclasses.dataclass(frozen=True, slots=True)
class Swept:
    """What one run did: counts of sessions closed and warned of, of timers, and of what was cleared away."""

    closed: int
    warned: int = 0
    armed: int = 0
    dropped: int = 0
    forgotten: int = 0
    erased: int = 0
    removed: int = 0
    events: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """For how long after a session's end its exact location is kept, and the session itself; and events."""

    exact: datetime.timedelta
    history: datetime.timedelta
    events: datetime.timedelta


class Reconciler:
    """Sweeps Postgres and Redis every `interval`. Any number of replicas may do so at once."""

    def __init__(
        self,
        store: store.Store,
        privacy: privacy.Privacy,
        outbox: outbox.Outbox,
        schedule: schedule.Schedule,
        clock: clock.Clock,
        interval: datetime.timedelta,
        retention: Retention,
    ) -> None:
        self._store = store
        self._privacy = privacy
        self._retention = retention
        self._outbox = outbox
        self._schedule = schedule
        self._clock = clock
        self._interval = interval.total_seconds()

    async def close_overdue(self) -> int:
        """Close every overdue session, in batches, and give how many. Raise `errors.StoreUnavailable`."""
        closed = 0
        while True:
            try:
                ids = await self._store.expire_overdue(BATCH)
                more = len(ids) == BATCH
            except database.StatementFailed:
                ids = await self._close_others()
                more = bool(ids)
            closed += len(ids)
            failpoints.reach(failpoints.Point.SWEPT)
            await self._schedule.cancel(ids)
            if not more:
                return closed

    async def _close_others(self) -> list[session.SessionId]:
        """Close the overdue sessions that Postgres can close: one damaged row must not keep the others open."""
        due = await self._store.active_due(_EPOCH, _FIRST_ID, await self._store.clock(), BATCH)
        fired = await self._schedule.ends.handle([session_id for session_id, _ in due])
        return [each.id for each in fired if each.over]

    async def warn(self) -> int:
        """Send the warnings whose timers did not, in batches, and return how many. Raise `errors.StoreUnavailable`."""
        warned = 0
        until = datetime.datetime.fromtimestamp(self._clock.now() - _LEFT_TO_TIMERS, datetime.UTC)
        async for due in sweep.pages(self._store.warnings_due, _EPOCH, until, BATCH):
            fired = await self._schedule.warnings.handle([session_id for session_id, _ in due])
            warned += sum(each.over for each in fired)
        return warned

    async def run_once(self) -> Swept:
        """Close what is overdue, send late warnings, mend the timers, and clear away what is kept no longer.

        Raise `errors.StoreUnavailable`. Without Redis the timers are left alone.
        """
        await self._clock.measure(self._store)
        closed = await self.close_overdue()
        warned = await self.warn()
        mended = sweep.Mended()
        try:
            mended = await self._schedule.mend(self._interval)
        except redis.exceptions.RedisError as error:
            log.warning("timers_unswept", error=type(error).__name__)
        forgotten = await self._clear(self._privacy.forget_requests)
        erased = await self._clear(functools.partial(self._privacy.erase_exact, self._retention.exact))
        removed = await self._clear(functools.partial(self._privacy.remove_ended, self._retention.history))
        events = await self._clear(functools.partial(self._outbox.remove, self._retention.events))
        return Swept(closed, warned, mended.armed, mended.dropped, forgotten, erased, removed, events)

    async def _clear(self, some: collections.abc.Callable[[int], collections.abc.Awaitable[int]]) -> int:
        """Clear away in batches until there is nothing left, for at most a tenth of an interval; give how many."""
        until = time.monotonic() + self._interval / 10
        cleared = batch = await some(BATCH)
        while batch == BATCH and time.monotonic() < until:
            cleared += (batch := await some(BATCH))
        return cleared

    async def run(self) -> None:
        """Run now and every interval, until cancelled. A Postgres that is away is tried again at the next."""
        while True:
            began = time.monotonic()
            try:
                swept = await self.run_once()
            except (errors.StoreUnavailable, database.Retry) as error:
                log.warning("sweep_delayed", error=type(error).__name__)
            else:
                if swept != Swept(closed=0):
                    log.info("swept", **dataclasses.asdict(swept))
            await asyncio.sleep(max(0.0, began + self._interval - time.monotonic()))
