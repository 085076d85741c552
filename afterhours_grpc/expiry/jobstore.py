"""APScheduler's job store in Redis, and the executor that hands over what is due.

All jobs are members of one sorted set, scored by when they are due, so that a job costs little memory and nothing in
Redis is ever run as code. Any number of replicas share it without a leader: a job that is due is claimed by moving its
score to the end of a short lease, in Lua, and is removed only when it is acknowledged with that very score. So a job
repeats every lease until a replica has done it, and one that dies loses nothing.
"""

import collections.abc
import contextlib
import dataclasses
import datetime
import os
import socket
import threading
import typing
import uuid

import redis
import redis.backoff
import redis.exceptions
import redis.retry
import structlog
from apscheduler import job as apscheduler_job
from apscheduler.executors import base as executors
from apscheduler.jobstores import base as jobstores
from apscheduler.triggers import base as triggers

from afterhours_grpc.expiry import clock

log = structlog.get_logger()

# When each replica last looked for due jobs, for `doctor`; those of a day ago are forgotten.
PASSES = "afterhours:passes"

# Seconds for which a claimed job is left to its claimant, and at most which pass between two looks at the store.
LEASE = 0.5
# Claims that may be unacknowledged at once, and are taken in one look.
_OUTSTANDING = 4000
_CLAIM = 1000
# Seconds to wait for Redis. There is no retry: the next look is one.
SOCKET_TIMEOUT = 0.5
# A stranger's member may be no text, and is dropped by its very bytes.
ENCODING_ERRORS = "surrogateescape"

_CLAIM_LUA = """
local due = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[3])
for _, id in ipairs(due) do redis.call('ZADD', KEYS[1], ARGV[2], id) end
redis.call('ZADD', KEYS[2], ARGV[1], ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[1] - 86400)
return {due, redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or 'inf'}
"""

# ARGV: id, claimed score, new score or '' to remove it, and so on. Whoever changed the score since owns the job.
SETTLE_LUA = """
for i = 1, #ARGV, 3 do
    if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or '') == tonumber(ARGV[i + 1]) then
        if ARGV[i + 2] == '' then redis.call('ZREM', KEYS[1], ARGV[i])
        else redis.call('ZADD', KEYS[1], ARGV[i + 2], ARGV[i]) end
    end
end
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A job that is this replica's until `score`, in epoch seconds."""

    session_id: uuid.UUID
    score: str


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What jobs are for: the sorted set that has them, and how their ids begin."""

    key: str
    prefix: str

    def job_id(self, session_id: uuid.UUID) -> str:
        """Give the id of the job of a session."""
        return f"{self.prefix}{session_id}"

    def session_id(self, job_id: str) -> uuid.UUID | None:
        """Give the session of a job, or None for a member that no replica of ours wrote."""
        try:
            found = uuid.UUID(job_id.removeprefix(self.prefix))
        except ValueError:
            return None
        return found if job_id == f"{self.prefix}{found}" else None


EXPIRE = Kind("afterhours:jobs", "session:expire:")
WARN = Kind("afterhours:warnings", "session:warn:")


def score(at: float) -> str:
    """Give epoch seconds as every replica writes them, to the microsecond."""
    return f"{at:.6f}"


class _Repeat(triggers.BaseTrigger):  # type: ignore[misc]
    """A claimed job is due again when its lease ends."""

    def get_next_fire_time(self, _: object, now: datetime.datetime) -> datetime.datetime:
        return now + datetime.timedelta(seconds=LEASE)


class JobStore(jobstores.BaseJobStore):  # type: ignore[misc]
    """The jobs of a kind in `url`, due by `clock`. It never raises: a Redis that is away has no job due.

    `passed` is called at each look, for a watchdog. Jobs are added by `Timers`, from the event loop.
    """

    def __init__(self, url: str, kind: Kind, clock: clock.Clock, passed: collections.abc.Callable[[], None]) -> None:
        super().__init__()
        self._kind = kind
        self._redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors=ENCODING_ERRORS,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=SOCKET_TIMEOUT,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        )
        self._claim = self._redis.register_script(_CLAIM_LUA)
        self._clock = clock
        self._replica = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self._passed = passed
        self._next_run_time = datetime.datetime.now(datetime.UTC)
        self._away = False
        self.stopping = False
        # Claims handed over and not settled yet; counted down by the event loop.
        self._outstanding = 0
        self._lock = threading.Lock()

    def settled(self, count: int) -> None:
        """Make room for `count` more claims."""
        with self._lock:
            self._outstanding -= count

    def get_due_jobs(self, now: datetime.datetime) -> list[apscheduler_job.Job]:
        """Claim what is due. At a shutdown, which looks once more, nothing is."""
        self._passed()
        due: list[str] = []
        wait = LEASE
        room = min(_CLAIM, _OUTSTANDING - self._outstanding)
        if self._clock.known and room > 0 and not self.stopping:
            due, wait = self._take(room)
        self._next_run_time = now + datetime.timedelta(seconds=wait)
        jobs = [self._job(id, self._claimed, now) for id in due]
        with self._lock:
            self._outstanding += len(jobs)
        return jobs

    def get_next_run_time(self) -> datetime.datetime:
        """Say when to look again: at the next due time, and at most a lease from now."""
        return self._next_run_time

    def _take(self, room: int) -> tuple[list[str], float]:
        at = self._clock.now()
        self._claimed = score(at + LEASE)
        try:
            due, first = self._claim(
                keys=[self._kind.key, PASSES], args=[score(at), self._claimed, room, self._replica]
            )
            foreign = [id for id in due if self._kind.session_id(id) is None]
            if foreign:
                log.warning("foreign_jobs_dropped", count=len(foreign))
                self._redis.zrem(self._kind.key, *foreign)
        except redis.exceptions.RedisError as error:
            self._failed(error)
            return [], LEASE
        self._away = False
        wait = 0.0 if len(due) == room else max(0.0, min(LEASE, float(first) - at))
        return [id for id in due if self._kind.session_id(id)], wait

    def _failed(self, error: redis.exceptions.RedisError) -> None:
        if not self._away:
            self._away = True
            log.warning("jobs_unreachable", error=type(error).__name__)
        if str(error).startswith("WRONGTYPE"):
            # Somebody else's value under our key: the timers are gone anyway, and the reconciler sets them again.
            try:
                self._redis.delete(self._kind.key, PASSES)
            except redis.exceptions.RedisError:
                return

    def _job(self, id: str, claimed: str, now: datetime.datetime) -> apscheduler_job.Job:
        # Not through the constructor, which would check a callable and its arguments for each of thousands.
        job = apscheduler_job.Job.__new__(apscheduler_job.Job)
        job.id = job.name = id
        job.args = (Claim(typing.cast("uuid.UUID", self._kind.session_id(id)), claimed),)
        job.next_run_time = now
        job.trigger = _REPEAT
        job.executor = "default"
        job.coalesce = True
        job.misfire_grace_time = None
        job._scheduler, job._jobstore_alias = self._scheduler, self._alias  # noqa: SLF001 - as its jobs are made
        return job

    def update_job(self, job: apscheduler_job.Job) -> None:
        """Do nothing: the claim has moved the job to the end of its lease already."""

    def remove_job(self, job_id: str) -> None:
        """Do nothing: only an acknowledgement removes a job."""

    def remove_all_jobs(self) -> None:
        """Do nothing: the jobs are those of every replica."""

    def add_job(self, job: apscheduler_job.Job) -> None:
        """Raise NotImplementedError: `Timers` adds jobs, without waiting for this thread."""
        raise NotImplementedError

    def lookup_job(self, job_id: str) -> None:
        """Know no job: nothing but its due time is stored of one."""

    def get_all_jobs(self) -> list[apscheduler_job.Job]:
        """Give none, for they may be a million."""
        return []

    def shutdown(self) -> None:
        """Take this replica's name back, and close the connection."""
        with contextlib.suppress(redis.exceptions.RedisError):
            self._redis.zrem(PASSES, self._replica)
        self._redis.close()


_REPEAT = _Repeat()


class HandOver(executors.BaseExecutor):  # type: ignore[misc]
    """Hands claims to `receive`, in the scheduler's thread; nothing runs in it."""

    def __init__(self, receive: collections.abc.Callable[[Claim], None]) -> None:
        super().__init__()
        self._receive = receive

    def submit_job(self, job: apscheduler_job.Job, _: list[datetime.datetime]) -> None:
        """Hand the claim over, without the counting of instances: it is claimed already."""
        self._receive(*job.args)

    def _do_submit_job(self, job: apscheduler_job.Job, run_times: list[datetime.datetime]) -> None:
        raise NotImplementedError
