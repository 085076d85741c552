"""How often a user may start and extend, over all replicas: counted in Redis, and without Redis not at all."""

import asyncio
import datetime
import hashlib
import time
import typing

import limits.aio
import limits.errors
import structlog

from afterhours_grpc import metrics, redis_client
from afterhours_grpc.sessions import errors, session

log = structlog.get_logger()

# Seconds that a call waits for Redis, and for which calls pass uncounted once it did not answer.
_PATIENCE = 0.25
_PAUSE = 1.0
# Calls that ask Redis at once, on as many connections.
_AT_ONCE = 16


class Throttle:
    """At most `rate` calls of a user in any minute. Without an answer of Redis calls pass, and a metric says so."""

    def __init__(self, redis_url: str, rate: int) -> None:
        # Users are counted by a digest, so that Redis does not hold who they are.
        self._connections = redis_client.Server(redis_url).pool(connections=_AT_ONCE, timeout=_PATIENCE)
        # The URL only names the protocol.
        storage = limits.aio.storage.RedisStorage(
            "redis://",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="afterhours:rate",
            connection_pool=typing.cast("typing.Any", self._connections),
        )
        self._limiter = limits.aio.strategies.MovingWindowRateLimiter(storage)
        self._rate = limits.RateLimitItemPerMinute(rate)
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._away_until = 0.0

    async def close(self) -> None:
        """Close the connections; idempotent."""
        await self._connections.aclose()

    async def admit(self, user_id: session.UserId) -> None:
        """Count a call of a user, or raise RateLimited."""
        user = hashlib.blake2b(user_id.encode(), digest_size=16).hexdigest()
        # In a burst calls wait here for each other, and not for Redis.
        async with self._room:
            if time.monotonic() >= self._away_until:
                try:
                    async with asyncio.timeout(_PATIENCE):
                        if await self._limiter.hit(self._rate, user):
                            return
                        window = await self._limiter.get_window_stats(self._rate, user)
                except (limits.errors.StorageError, TimeoutError) as error:
                    self._away_until = time.monotonic() + _PAUSE
                    log.warning("rate_limit_skipped", error=type(error).__name__, for_seconds=_PAUSE)
                else:
                    wait = min(max(window.reset_time - time.time(), 0.0), float(self._rate.get_expiry()))
                    raise errors.RateLimited(datetime.timedelta(seconds=wait))
        metrics.RATE_LIMIT_SKIPPED.inc()
