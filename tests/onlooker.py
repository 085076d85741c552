"""What an onlooker sees of a service: how late sessions are closed, which jobs there are, how calls under load fare."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import datetime
import math
import time
import typing

import asyncpg
import replicas
from redis import asyncio as redis

KEY = "afterhours:jobs"


async def jobs(url: str) -> dict[str, float]:
    """Give every job in a Redis and its due time."""
    async with redis.Redis.from_url(url, decode_responses=True, encoding_errors="surrogateescape") as client:
        found: typing.Any = await client.zrange(KEY, 0, -1, withscores=True)
        return dict(found)


async def timed(engines: replicas.Engines) -> bool:
    """Say whether Redis holds exactly one job for each active session, due at its end, and nothing else."""
    rows = await engines.rows(
        "SELECT id, extract(epoch FROM expires_at)::float8 AS due FROM after_hours_sessions WHERE ended_at IS NULL"
    )
    return await jobs(engines.redis_url) == {f"session:expire:{row['id']}": row["due"] for row in rows}


async def started(client: replicas.Client, count: int, seconds: int = 2) -> list[str]:
    """Start sessions of `count` users, and give the users."""
    users = [f"user {n}" for n in range(count)]
    await asyncio.gather(*(client.put_profile(user) for user in users))
    await asyncio.gather(*(client.start(user, seconds) for user in users))
    return users


_CLOSED = """
SELECT id, extract(epoch FROM clock_timestamp() + $1 - expires_at)::float8 AS late
FROM after_hours_sessions WHERE ended_at = expires_at AND end_reason = 'EXPIRED'
"""


async def lateness(
    engines: replicas.Engines, count: int, offset: datetime.timedelta = datetime.timedelta(), within: float = 10
) -> list[float]:
    """Wait until `count` sessions have expired; give how late each was seen closed, in seconds, ascending.

    By the database's clock, moved by `offset`; too high by 20 ms and a look at most, and negative for one that was
    closed before its end.
    """
    late: dict[object, float] = {}
    connection = await asyncpg.connect(engines.database_url)
    try:
        async with asyncio.timeout(within):
            while len(late) < count:
                for row in await connection.fetch(_CLOSED, offset):
                    late.setdefault(row["id"], row["late"])
                await asyncio.sleep(0.02)
    finally:
        await connection.close()
    return sorted(late.values())


def p99(ascending: collections.abc.Sequence[float]) -> float:
    """Give what 99 of 100 do not exceed."""
    return ascending[math.ceil(len(ascending) * 0.99) - 1]


async def closed_on_time(
    engines: replicas.Engines, count: int, offset: datetime.timedelta = datetime.timedelta(), most: float = 1
) -> None:
    """Wait until `count` sessions have expired; none was closed before its end, and 99 of 100 at most `most` s late."""
    late = await lateness(engines, count, offset)
    assert late[0] >= 0, late
    assert p99(late) <= most, late


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call of the load came to."""

    method: str
    seconds: float
    outcome: object


class Load:
    """Users who start, extend, get and end their sessions, over and over, and make sure of each step.

    A call without an answer is made again under its request_id until it has one, so that the outcome of each is known,
    whatever was lost on the way.
    """

    def __init__(self, client: replicas.Client, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._stopping = False
        self.answers: list[Answer] = []
        self.sessions: list[str] = []

    def stop(self) -> None:
        """Have every user end their session, and no more."""
        self._stopping = True

    async def user(self, name: str) -> None:
        """Be one user, until told to stop."""
        while not self._stopping:
            begun: typing.Any = await self._sure("start", self._client.start, name)
            self.sessions.append(begun.id)
            extended: typing.Any = await self._sure("extend", self._client.extend, name)
            assert extended.id == begun.id
            found: typing.Any = await self._answered("get", self._client.get, name)
            assert isinstance(found, replicas.Refusal) or found.session.id == begun.id
            ended: typing.Any = await self._sure("end", self._client.end, name)
            assert ended.id == begun.id

    async def _sure(
        self, method: str, call: collections.abc.Callable[..., collections.abc.Awaitable[object]], name: str
    ) -> object:
        request_id = replicas.request_id()
        while isinstance(answer := await self._answered(method, call, name, request_id=request_id), replicas.Refusal):
            # Whoever it is that hears anything else than "try again" has found a bug, and not in the load.
            assert answer.code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}, answer
            await asyncio.sleep(0.05)
        return answer

    async def _answered(
        self,
        method: str,
        call: collections.abc.Callable[..., collections.abc.Awaitable[object]],
        name: str,
        **arguments: str,
    ) -> object:
        began = time.monotonic()
        outcome = await replicas.outcome(call(name, timeout=self._timeout, **arguments))
        self.answers.append(Answer(method, time.monotonic() - began, outcome))
        await asyncio.sleep(0.01)
        return outcome

    @property
    def refusals(self) -> list[replicas.Refusal]:
        """What calls were refused for."""
        return [each.outcome for each in self.answers if isinstance(each.outcome, replicas.Refusal)]

    @property
    def seconds(self) -> list[float]:
        """How long calls took, ascending."""
        return sorted(each.seconds for each in self.answers)


@contextlib.asynccontextmanager
async def load(client: replicas.Client, users: int = 10, timeout: float = 10) -> collections.abc.AsyncIterator[Load]:
    """Run a load; afterwards each user has ended their session."""
    names = [f"loader {n}" for n in range(users)]
    for name in names:
        # One by one, for which one connection is enough.
        await client.put_profile(name)
    running = Load(client, timeout)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(running.user(name))
        try:
            yield running
        finally:
            running.stop()
