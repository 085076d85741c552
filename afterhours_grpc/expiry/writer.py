"""Writes timers to Redis in the background, in bounded slices."""

import asyncio
import collections
import collections.abc
import datetime

import redis.asyncio
import redis.exceptions
import structlog

from afterhours_grpc import metrics
from afterhours_grpc.expiry import jobs
from afterhours_grpc.sessions import session

log = structlog.get_logger()

# Seconds a caller waits for the write of its timers.
_PATIENCE = 0.1
# Seconds between two tries to reach a Redis that is away.
_RETRY = 0.5
# Timers kept for a Redis that is away; the reconciler finds the others.
_CAPACITY = 100_000
# Timers of one pipeline: at most, and at least when it is halved because a slow link did not take one in time.
_SLICE = 1000
_SMALLEST_SLICE = 32

# A time to set timers to, or None to remove them.
Timers = collections.abc.Mapping[session.SessionId, datetime.datetime | None]


class Writer:
    """A queue of the timers of a kind that are not written yet; `run` writes them. No method raises."""

    def __init__(self, client: redis.asyncio.Redis, kind: jobs.Kind) -> None:
        self._redis = client
        self._kind = kind
        # By when they were put, the newest last.
        self._unwritten: collections.OrderedDict[session.SessionId, datetime.datetime | None] = (
            collections.OrderedDict()
        )
        self._callers: dict[session.SessionId, asyncio.Future[None]] = {}
        self._wanted = asyncio.Event()
        self._slice = _SLICE
        self._away = False

    def put(self, timers: Timers) -> None:
        """Queue timers to be written. The newest are written first; the oldest are dropped when there are too many."""
        for session_id, due in timers.items():
            self._unwritten[session_id] = due
            self._unwritten.move_to_end(session_id)
        while len(self._unwritten) > _CAPACITY:
            self._callers.pop(self._unwritten.popitem(last=False)[0], None)
        if self._unwritten:
            self._wanted.set()

    async def write(self, timers: Timers) -> None:
        """Queue timers and wait until they are written: at most 0.1 s, and not at all while Redis is away."""
        self.put(timers)
        if timers and not self._away:
            # The first that was put is the last to be written.
            first = next(iter(timers))
            written = self._callers.setdefault(first, asyncio.get_running_loop().create_future())
            await asyncio.wait([written], timeout=_PATIENCE)

    async def run(self) -> None:
        """Write timers as they are put, until cancelled."""
        while True:
            await self._wanted.wait()
            while self._unwritten:
                await self._write_slice()
            self._wanted.clear()

    async def _write_slice(self) -> None:
        taken = dict(self._unwritten.popitem() for _ in range(min(self._slice, len(self._unwritten))))
        callers = [self._callers.pop(session_id) for session_id in taken if session_id in self._callers]
        try:
            await self._pipeline(taken)
        except redis.exceptions.RedisError as error:
            self._failed(error, taken)
        else:
            self._away = False
            self._slice = min(_SLICE, 2 * self._slice)
        for written in callers:
            written.set_result(None)
        if self._away:
            await asyncio.sleep(_RETRY)

    def _failed(self, error: redis.exceptions.RedisError, taken: Timers) -> None:
        # The only failure that is swallowed: the sessions are committed, and the reconciler sets their timers.
        if not self._away:
            log.warning("timers_unwritten", error=type(error).__name__, count=len(taken))
        self._away = True
        metrics.TIMER_WRITES_FAILED.inc()
        if isinstance(error, redis.exceptions.TimeoutError):
            self._slice = max(_SMALLEST_SLICE, self._slice // 2)
        for session_id, due in taken.items():
            # Unless it was put again meanwhile.
            self._unwritten.setdefault(session_id, due)

    async def _pipeline(self, timers: Timers) -> None:
        due = {self._kind.job_id(id): jobs.score(at.timestamp()) for id, at in timers.items() if at}
        over = [self._kind.job_id(id) for id, at in timers.items() if at is None]
        async with self._redis.pipeline(transaction=False) as pipeline:
            if due:
                # Only later: of two writes that overtake each other, the one that fires early is put right.
                pipeline.zadd(self._kind.key, due, gt=True)
            if over:
                pipeline.zrem(self._kind.key, *over)
            await pipeline.execute()
