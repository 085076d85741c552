"""How often a user may start and extend, over all replicas: counted in Redis, and without Redis not at all."""

import asyncio
import collections.abc
import datetime
import hashlib
import time
import typing

import redis.exceptions
import structlog

from afterhours_grpc import metrics, redis_client
from afterhours_grpc.sessions import errors, session

log = structlog.get_logger()

# Seconds that calls wait for Redis, as turns: however long this process itself needs for one, in a burst or on a loaded
# machine, is not Redis' time.
_TURN = 0.05
_TURNS = 5
_CONNECTIONS = 4
# Seconds for which calls pass uncounted once Redis did not answer.
_PAUSE = 1.0
# Seconds within which calls are counted.
_WINDOW = 60

# Counts a call unless ARGV[1] calls were counted within the last ARGV[2] seconds, by Redis' clock, so that those of the
# replicas need not agree. The reply is nil, or the seconds until the oldest of those calls no longer counts. What is no
# list of ours is removed, and a time in the future does not count: the clock has been set back.
_COUNT = """
local limit, seconds = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local oldest = redis.pcall('LINDEX', KEYS[1], limit - 1)
if type(oldest) == 'table' then redis.call('DEL', KEYS[1]) end
oldest = type(oldest) == 'string' and tonumber(oldest)
if oldest and oldest <= now and oldest + seconds > now then
    return tostring(oldest + seconds - now)
end
redis.call('LPUSH', KEYS[1], now)
redis.call('LTRIM', KEYS[1], 0, limit - 1)
redis.call('EXPIRE', KEYS[1], seconds)
"""
_COUNT_SHA = hashlib.sha1(_COUNT.encode(), usedforsecurity=False).hexdigest()


class Throttle:
    """At most `rate` calls of a user in any minute. Without an answer of Redis calls pass, and a metric counts them.

    All users that are asked about at once share one round trip, so that nobody waits for the turn of another one, and
    nobody longer than 0.25 s.
    """

    def __init__(self, redis_url: str, rate: int) -> None:
        self._redis = redis_client.Server(redis_url).client(connections=_CONNECTIONS, timeout=_TURN * _TURNS)
        self._rate = rate
        self._away_until = 0.0

    async def close(self) -> None:
        """Close the connections; idempotent."""
        await self._redis.aclose()

    async def admit(self, user_ids: collections.abc.Sequence[session.UserId]) -> list[errors.RateLimited | None]:
        """Count a call of each of these users, which are distinct, or return what it is refused with."""
        replies: list[typing.Any] = [None] * len(user_ids)
        skipped = len(user_ids)
        if time.monotonic() >= self._away_until:
            try:
                replies = await _in_time(self._counted(user_ids))
                skipped = sum(isinstance(reply, Exception) for reply in replies)
            except (redis.exceptions.RedisError, OSError, TimeoutError) as error:
                self._away_until = time.monotonic() + _PAUSE
                log.warning("rate_limit_skipped", error=type(error).__name__, for_seconds=_PAUSE)
        metrics.RATE_LIMIT_SKIPPED.inc(skipped)
        return [_refusal(reply) for reply in replies]

    async def _counted(self, user_ids: collections.abc.Sequence[session.UserId]) -> list[typing.Any]:
        """Return the reply for each user; an exception if its key holds something else, and raise it if all do."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for number, user_id in enumerate(user_ids):
                # A digest, so that Redis does not hold who the users are.
                user = hashlib.blake2b(user_id.encode(), digest_size=16).hexdigest()
                # The first one leaves the script with Redis, which may have restarted, for the others.
                run = pipeline.evalsha if number else pipeline.eval
                await run(_COUNT_SHA if number else _COUNT, 1, f"afterhours:rate:{user}", self._rate, _WINDOW)
            replies: list[typing.Any] = await pipeline.execute(raise_on_error=False)
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if len(failed) == len(replies):
            raise failed[0]
        return replies


async def _in_time(
    asking: collections.abc.Coroutine[typing.Any, typing.Any, list[typing.Any]],
) -> list[typing.Any]:
    """Wait for Redis. Raise TimeoutError if it does not answer in time."""
    task = asyncio.create_task(asking)
    # What it raises once nobody waits for it is of no concern.
    task.add_done_callback(lambda _: task.cancelled() or task.exception())
    try:
        for _ in range(_TURNS):
            done, _ = await asyncio.wait({task}, timeout=_TURN)
            if done:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def _refusal(reply: object) -> errors.RateLimited | None:
    if reply is None or isinstance(reply, Exception):
        return None
    return errors.RateLimited(datetime.timedelta(seconds=min(float(typing.cast("str", reply)), _WINDOW)))
