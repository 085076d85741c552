"""APScheduler behind set and cancel: a job for each session to expire, or to warn of, shared by replicas."""

import asyncio
import collections
import collections.abc
import contextlib
import datetime
import itertools
import time
import typing
import uuid

import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.exceptions
import structlog
from apscheduler.schedulers import background

from afterhours_grpc import metrics
from afterhours_grpc.expiry import clock, jobstore
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, store

log = structlog.get_logger()

Handle = collections.abc.Callable[
    [collections.abc.Sequence[session.SessionId]], collections.abc.Awaitable[list[store.Fired]]
]
Due = tuple[session.SessionId, datetime.datetime]

# Seconds a caller waits for the write of its timer; what takes longer is written behind its back.
_PATIENCE = 0.1
# Seconds between two tries to reach a Redis that is away.
_RETRY = 0.5
# Timers kept for a Redis that is away; the reconciler knows the others.
_UNWRITTEN = 100_000
# Sessions closed by one statement.
_BATCH = 500


class Timers:
    """The timers of a kind, of all sessions. `set` and `cancel` never raise, and take at most 0.1 s.

    A timer that fires only asks Postgres what is due, by `handle`: fired early, late, twice, or for a session that was
    extended, it does no harm.
    """

    def __init__(self, url: str, kind: jobstore.Kind, handle: Handle, clock: clock.Clock) -> None:
        self._kind = kind
        self._handle = handle
        self._redis = redis.asyncio.Redis.from_pool(
            redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=4,
                timeout=jobstore.SOCKET_TIMEOUT,
                decode_responses=True,
                encoding_errors=jobstore.ENCODING_ERRORS,
                socket_timeout=jobstore.SOCKET_TIMEOUT,
                socket_connect_timeout=jobstore.SOCKET_TIMEOUT,
                retry=redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0),
            )
        )
        self._settle = self._redis.register_script(jobstore.SETTLE_LUA)
        self._unwritten: dict[session.SessionId, datetime.datetime | None] = {}
        self._written: list[asyncio.Future[None]] = []
        self._wanted = asyncio.Event()
        self._away = False
        self._claims: collections.deque[jobstore.Claim] = collections.deque()
        self._fired = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.last_pass = time.monotonic()
        self._jobs = jobstore.JobStore(url, kind, clock, self._passed)
        self._scheduler = background.BackgroundScheduler(
            timezone=datetime.UTC,
            # After an exception in the job store, which raises none, look again as soon as ever.
            jobstore_retry_interval=jobstore.LEASE,
            jobstores={"default": self._jobs},
            executors={"default": jobstore.HandOver(self._receive)},
        )

    def start(self) -> None:
        """Begin to fire."""
        self._scheduler.start()

    def stop(self) -> None:
        """Claim nothing more, and end the scheduler's thread; idempotent."""
        self._jobs.stopping = True
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    async def close(self) -> None:
        """Close the connections; idempotent."""
        await self._redis.aclose()

    async def set(self, due: collections.abc.Sequence[Due]) -> None:
        """Time sessions, or move their timers to a later time."""
        await self._write(dict(due))

    async def cancel(self, ids: collections.abc.Sequence[session.SessionId]) -> None:
        """Drop the timers of sessions that ended."""
        await self._write(dict.fromkeys(ids))

    def put(self, timers: collections.abc.Mapping[session.SessionId, datetime.datetime | None]) -> None:
        """Time sessions, or by None drop their timers, behind the caller's back."""
        if timers and len(self._unwritten) < _UNWRITTEN:
            self._unwritten.update(timers)
            self._wanted.set()

    async def _write(self, timers: dict[session.SessionId, datetime.datetime | None]) -> None:
        self.put(timers)
        if timers and not self._away:
            written = self._loop.create_future()
            self._written.append(written)
            await asyncio.wait([written], timeout=_PATIENCE)

    async def write(self) -> None:
        """Write timers as they are wanted, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            taken, self._unwritten = self._unwritten, {}
            written, self._written = self._written, []
            try:
                await self._pipeline(taken)
                self._away = False
            except redis.exceptions.RedisError as error:
                # The only failure that is swallowed: the session is committed, and the reconciler sets its timer.
                if not self._away:
                    log.warning("timers_unwritten", error=type(error).__name__, count=len(taken))
                self._away = True
                metrics.TIMER_WRITES_FAILED.inc()
                self._unwritten = {**taken, **self._unwritten}
                self._wanted.set()
            for future in written:
                if not future.done():
                    future.set_result(None)
            if self._away:
                await asyncio.sleep(_RETRY)

    async def _pipeline(self, timers: dict[session.SessionId, datetime.datetime | None]) -> None:
        due = {self._kind.job_id(id): jobstore.score(at.timestamp()) for id, at in timers.items() if at}
        over = [self._kind.job_id(id) for id, at in timers.items() if at is None]
        async with self._redis.pipeline(transaction=False) as pipeline:
            if due:
                # Only later: of two writes that overtake each other, the one that fires early is put right.
                pipeline.zadd(self._kind.key, due, gt=True)
            if over:
                pipeline.zrem(self._kind.key, *over)
            await pipeline.execute()

    async def arm(self, due: collections.abc.Sequence[Due]) -> int:
        """Set timers to where they belong, and give how many were missing. Raise RedisError.

        One that is extended meanwhile is set too early, which does no harm, and right by the next sweep.
        """
        jobs = {self._kind.job_id(id): jobstore.score(at.timestamp()) for id, at in due}
        return int(await self._redis.zadd(self._kind.key, jobs) or 0) if jobs else 0

    async def after(self, rank: int, most: int) -> list[tuple[str, uuid.UUID | None]]:
        """Read at most `most` members from a rank on, with the session of each. Raise RedisError."""
        members: list[str] = typing.cast("list[str]", await self._redis.zrange(self._kind.key, rank, rank + most - 1))
        return [(member, self._kind.session_id(member)) for member in members]

    async def drop(self, members: collections.abc.Sequence[str]) -> None:
        """Remove members. Raise RedisError."""
        if members:
            await self._redis.zrem(self._kind.key, *members)

    async def drop_of(self, ids: collections.abc.Iterable[session.SessionId]) -> None:
        """Remove the timers of sessions, at once. Those that Redis does not take are left to the sweep."""
        with contextlib.suppress(redis.exceptions.RedisError):
            await self.drop([self._kind.job_id(id) for id in ids])

    def _passed(self) -> None:
        self.last_pass = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether the scheduler has looked for due jobs lately, which it does every half second."""
        return self._jobs.stopping or time.monotonic() - self.last_pass < 10 * jobstore.LEASE

    def _receive(self, claim: jobstore.Claim) -> None:
        self._claims.append(claim)
        if not self._fired.is_set():
            self._loop.call_soon_threadsafe(self._fired.set)

    async def fire(self) -> None:
        """Handle claims as they arrive, until cancelled."""
        while True:
            await self._fired.wait()
            self._fired.clear()
            while self._claims:
                claims = [self._claims.popleft() for _ in range(min(_BATCH, len(self._claims)))]
                try:
                    await self._settle_claims(claims)
                finally:
                    self._jobs.settled(len(claims))

    async def _settle_claims(self, claims: list[jobstore.Claim]) -> None:
        try:
            found = await self._handle([session.SessionId(claim.session_id) for claim in claims])
        except (errors.StoreUnavailable, database.Retry) as error:
            # They fire again when their leases end.
            log.warning("expiry_delayed", error=type(error).__name__, count=len(claims))
            return
        expiries = {each.id: each for each in found}
        settled = []
        for claim in claims:
            expiry = expiries[session.SessionId(claim.session_id)]
            if expiry.over or expiry.due:
                again = jobstore.score(expiry.due.timestamp()) if expiry.due else ""
                settled.append((self._kind.job_id(claim.session_id), claim.score, again))
        try:
            await self._settle(keys=[self._kind.key], args=list(itertools.chain.from_iterable(settled)))
        except redis.exceptions.RedisError as error:
            # They fire again when their leases end, and find nothing to do.
            log.warning("claims_unsettled", error=type(error).__name__, count=len(settled))
