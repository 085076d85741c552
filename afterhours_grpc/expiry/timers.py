"""APScheduler behind set and cancel: a job for each session to expire, or to warn of, shared by replicas."""

import asyncio
import collections
import collections.abc
import contextlib
import datetime
import itertools
import time

import redis.exceptions
import structlog
from apscheduler.schedulers import background

from afterhours_grpc import logs, redis_client, threads
from afterhours_grpc.expiry import claims, clock, jobs, jobstore, writer
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, store

log = structlog.get_logger()

Handle = collections.abc.Callable[
    [collections.abc.Sequence[session.SessionId]], collections.abc.Awaitable[list[store.Fired]]
]

# Sessions closed by one statement.
_BATCH = 500
_CONNECTIONS = 4
# Sessions that one line of the log names.
_NAMED = 10
# Seconds for which the end of a scheduler's thread is waited for; a look takes less, however slow Redis is.
_ENDING = 3.0


class Timers:
    """The timers of a kind, of all sessions. `set` and `cancel` never raise, and take at most 0.1 s.

    A timer that fires only asks Postgres what is due, by `handle`: fired early, late, twice, or for a session that was
    extended, it does no harm.
    """

    def __init__(self, server: redis_client.Server, kind: jobs.Kind, handle: Handle, clock: clock.Clock) -> None:
        self._kind = kind
        self._handle = handle
        self._redis = server.client(connections=_CONNECTIONS, timeout=jobs.TIMEOUT)
        self._settle = self._redis.register_script(claims.SETTLE_LUA)
        self._writer = writer.Writer(self._redis, kind)
        self._claims = claims.Claims(server, kind, clock)
        self._received: collections.deque[claims.Claim] = collections.deque()
        self._fired = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._jobs = jobstore.JobStore(self._claims)
        self._scheduler = background.BackgroundScheduler(
            timezone=datetime.UTC,
            # After an exception in the job store, which raises none, look again as soon as ever.
            jobstore_retry_interval=claims.LEASE,
            jobstores={"default": self._jobs},
            executors={"default": jobstore.ClaimExecutor(self._receive)},
        )

    def start(self) -> None:
        """Begin to fire."""
        self._scheduler.start()

    async def stop(self) -> None:
        """Claim nothing more, and wait for the end of the scheduler's thread for 3 s at most; idempotent."""
        self._jobs.stopping = True
        if self._scheduler.running:
            ending = threads.run(lambda: self._scheduler.shutdown(wait=False))
            await asyncio.wait([asyncio.wrap_future(ending)], timeout=_ENDING)

    async def close(self) -> None:
        """Close the connections; idempotent."""
        await self._redis.aclose()

    @property
    def alive(self) -> bool:
        """Whether the scheduler's thread still looks for due jobs; one that was stopped counts as alive."""
        return self._jobs.stopping or self._jobs.alive

    async def set(self, due: collections.abc.Sequence[store.Due]) -> None:
        """Time sessions, or move their timers to a later time."""
        await self._writer.write(dict(due))

    async def cancel(self, ids: collections.abc.Sequence[session.SessionId]) -> None:
        """Drop the timers of sessions that ended."""
        await self._writer.write(dict.fromkeys(ids))

    def put(self, timers: writer.Timers) -> None:
        """Time sessions, or by None drop their timers, without waiting."""
        self._writer.put(timers)

    async def write(self) -> None:
        """Write timers as they are set, until cancelled."""
        await self._writer.run()

    async def arm(self, due: collections.abc.Sequence[store.Due]) -> int:
        """Set timers to where they belong, and return how many were missing or elsewhere. Raise RedisError."""
        scores = {self._kind.job_id(id): jobs.score(at.timestamp()) for id, at in due}
        return int(await self._redis.zadd(self._kind.key, scores, ch=True) or 0) if scores else 0

    async def count(self, ranges: collections.abc.Sequence[tuple[str, str]]) -> list[int]:
        """Count the members in ranges of scores, as ZCOUNT has them. Raise RedisError."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for lowest, highest in ranges:
                pipeline.zcount(self._kind.key, lowest, highest)
            return [int(each) for each in await pipeline.execute()]

    async def members(self, lowest: str, highest: str, offset: int, most: int) -> dict[str, session.SessionId | None]:
        """Read at most `most` members of a range of scores, with the session of each. Raise RedisError."""
        found = await self._redis.zrange(self._kind.key, lowest, highest, byscore=True, offset=offset, num=most)
        ids = {str(member): self._kind.session_id(str(member)) for member in found}
        return {member: session.SessionId(id) if id else None for member, id in ids.items()}

    async def drop(self, members: collections.abc.Sequence[str]) -> None:
        """Remove members. Raise RedisError."""
        if members:
            await self._redis.zrem(self._kind.key, *members)

    async def drop_of(self, ids: collections.abc.Iterable[session.SessionId]) -> None:
        """Remove the timers of sessions, at once. Those that Redis does not take are left to the sweep."""
        with contextlib.suppress(redis.exceptions.RedisError):
            await self.drop([self._kind.job_id(id) for id in ids])

    def _receive(self, claim: claims.Claim) -> None:
        self._received.append(claim)
        if not self._fired.is_set():
            self._loop.call_soon_threadsafe(self._fired.set)

    async def fire(self) -> None:
        """Handle claims as they arrive, until cancelled."""
        while True:
            # Before the wait: when this task has died and is run again, claims may be left.
            while self._received:
                batch = [self._received.popleft() for _ in range(min(_BATCH, len(self._received)))]
                await self._settle_claims(batch)
            await self._fired.wait()
            self._fired.clear()

    async def handle(self, ids: collections.abc.Sequence[session.SessionId]) -> list[store.Fired]:
        """Do what the timers of sessions are for. A session for which Postgres fails to do it delays no other.

        Raise `errors.StoreUnavailable` or `database.Retry`.
        """
        found: list[store.Fired] = []
        failed: list[session.SessionId] = []
        failure: database.StatementFailed | None = None
        waiting = [ids]
        while waiting:
            some = waiting.pop()
            try:
                found += await self._handle(some)
            except database.StatementFailed as error:
                if len(some) > 1:
                    waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
                else:
                    failed += some
                    failure = error
        if failure:
            named = [str(session_id) for session_id in failed[:_NAMED]]
            log.error("timers_failed", sessions=named, count=len(failed), **logs.described(failure))
        return found

    async def _settle_claims(self, batch: list[claims.Claim]) -> None:
        found: list[store.Fired] = []
        try:
            found = await self.handle([session.SessionId(claim.session_id) for claim in batch])
        except (errors.StoreUnavailable, database.Retry) as error:
            # They fire again when their leases end.
            log.warning("expiry_delayed", error=type(error).__name__, count=len(batch))
        finally:
            scores = self._claims.release(batch)
        # What is neither over nor due later belongs to another writer for the moment, and fires again.
        over = [each.id for each in found if each.over]
        settled = [(each.id, jobs.score(each.due.timestamp())) for each in found if each.due and not each.over]
        if not self._kind.final:
            settled += [(id, "") for id in over]
        try:
            if self._kind.final:
                await self.drop([self._kind.job_id(id) for id in over])
            if settled:
                arguments = ((self._kind.job_id(id), scores[id], score) for id, score in settled)
                await self._settle(keys=[self._kind.key], args=list(itertools.chain.from_iterable(arguments)))
            if found:
                self._claims.took(time.monotonic() - min(claim.at for claim in batch))
        except redis.exceptions.RedisError as error:
            # They fire again when their leases end, and find nothing to do.
            log.warning("claims_unsettled", error=type(error).__name__, count=len(found))
