"""Claims of due jobs, which any number of replicas share without a leader.

A job that is due is claimed by moving its score to the end of a lease, in Lua, and stays in Redis until it is settled.
So a job repeats every lease until a replica has done it, and a replica that dies loses nothing.
"""

import collections.abc
import contextlib
import dataclasses
import os
import socket
import threading
import time
import uuid

import redis.exceptions
import structlog

from afterhours_grpc import redis_client
from afterhours_grpc.expiry import clock, jobs

log = structlog.get_logger()

# Seconds for which a claimed job is left to its claimant, and at most which pass between two looks at Redis. Where
# claims take longer to settle, because Postgres is slow, leases are longer: others would claim the same jobs meanwhile.
LEASE = 0.5
_LONGEST_LEASE = 10.0
# Claims that may be held at once, fewer the longer leases are but never fewer than are taken in one look.
_HELD = 4000
_CLAIM = 1000
# Seconds until the next look when no more claims may be held.
_FULL = 0.05

_CLAIM_LUA = """
local due = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[3])
for _, id in ipairs(due) do redis.call('ZADD', KEYS[1], ARGV[2], id) end
redis.call('ZADD', KEYS[2], ARGV[1], ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[1] - 86400)
return {due, redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or 'inf'}
"""

# ARGV: id, score by which it is held, new score or '' to remove it, and so on. A job with another score is left to
# whoever wrote that, unless the new score is later.
SETTLE_LUA = """
for i = 1, #ARGV, 3 do
    local score, new = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or ''), tonumber(ARGV[i + 2])
    if score and (score == tonumber(ARGV[i + 1]) or new and score < new) then
        if new then redis.call('ZADD', KEYS[1], ARGV[i + 2], ARGV[i])
        else redis.call('ZREM', KEYS[1], ARGV[i]) end
    end
end
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A job that this process holds; it was asked for at `at`, by time.monotonic()."""

    session_id: uuid.UUID
    at: float


class Claims:
    """The jobs of a kind that this process holds. `take` is for the scheduler's thread, the others for any."""

    def __init__(self, server: redis_client.Server, kind: jobs.Kind, clock: clock.Clock) -> None:
        self._kind = kind
        self._redis = server.blocking_client(timeout=jobs.TIMEOUT)
        self._script = self._redis.register_script(_CLAIM_LUA)
        self._clock = clock
        self._replica = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self._away = False
        self._lease = LEASE
        # By session, the scores of the jobs that were claimed and are not released yet.
        self._held: dict[uuid.UUID, str] = {}
        self._lock = threading.Lock()
        # Seconds until the next look: at the next due time, and at most a lease.
        self.wait = LEASE

    def take(self) -> list[Claim]:
        """Claim what is due. Without a Redis, or before the clock is known, nothing is."""
        self.wait = LEASE
        if not self._clock.known:
            return []
        try:
            return self._take()
        except redis.exceptions.RedisError as error:
            self._failed(error)
            return []

    def release(self, claims: collections.abc.Iterable[Claim]) -> dict[uuid.UUID, str]:
        """Hold claims no longer, and return the scores of their jobs, which may be claimed again from now on."""
        with self._lock:
            return {claim.session_id: self._held.pop(claim.session_id) for claim in claims}

    def took(self, seconds: float) -> None:
        """Record how long claims had to be held until they could be settled: the next leases must last longer."""
        self._lease = min(max(LEASE, 2 * seconds), _LONGEST_LEASE)

    def close(self) -> None:
        """Remove this replica from those that look, and close the connection."""
        if not self._away:
            with contextlib.suppress(redis.exceptions.RedisError):
                self._redis.zrem(jobs.PASSES, self._replica)
        self._redis.close()

    def _take(self) -> list[Claim]:
        began, lease = time.monotonic(), self._lease
        most = max(_CLAIM, int(_HELD * LEASE / lease))
        room = max(0, min(_CLAIM, most - len(self._held)))
        at = self._clock.now()
        until = jobs.score(at + lease)
        due, first = self._script(keys=[self._kind.key, jobs.PASSES], args=[jobs.score(at), until, room, self._replica])
        self._away = False
        if not room:
            self.wait = _FULL
        else:
            self.wait = 0.0 if len(due) == room else max(0.0, min(LEASE, float(first) - at))
        return self._hold(self._ours(due), until, began)

    def _ours(self, due: collections.abc.Sequence[str]) -> list[uuid.UUID]:
        ids = {job_id: self._kind.session_id(job_id) for job_id in due}
        foreign = [job_id for job_id, session_id in ids.items() if session_id is None]
        if foreign:
            log.warning("foreign_jobs_dropped", count=len(foreign))
            self._redis.zrem(self._kind.key, *foreign)
        return [session_id for session_id in ids.values() if session_id]

    def _hold(self, ids: collections.abc.Sequence[uuid.UUID], until: str, began: float) -> list[Claim]:
        """Hold jobs, and return the claims of those that were not held already: nothing is done twice at once."""
        with self._lock:
            claims = [Claim(session_id, began) for session_id in ids if session_id not in self._held]
            self._held.update(dict.fromkeys(ids, until))
        return claims

    def _failed(self, error: redis.exceptions.RedisError) -> None:
        if not self._away:
            self._away = True
            log.warning("jobs_unreachable", error=type(error).__name__)
        if str(error).startswith("WRONGTYPE"):
            # Somebody else's value under our key: the timers are gone anyway, and the reconciler sets them again.
            with contextlib.suppress(redis.exceptions.RedisError):
                self._redis.delete(self._kind.key, jobs.PASSES)
