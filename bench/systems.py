"""What is measured: our server, the empty call on the same settings, and Postgres by itself. See `peers` for others."""

import abc
import asyncio
import collections.abc
import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import typing

import asyncpg
import bodies
import generator
import redis.asyncio

from afterhours_grpc.embedded import postgres
from afterhours_grpc.embedded import redis as embedded_redis
from afterhours_grpc.expiry import jobs
from afterhours_grpc.store import schema

_FUZZ_KEY = "1:a fuzz key of thirty-two characters"
_SERVICE = "/afterhours.v1.SessionService"
_METHODS = {"start": "StartSession", "get": "GetSession", "extend": "ExtendSession", "end": "EndSession"}
# An active session's answer is longer than this, and that there is none is shorter.
_LEAST = 60

_PROFILES = """
INSERT INTO after_hours_profiles (user_id, identity_verified, location_consent)
SELECT 'user ' || n, true, true FROM generate_series(0, $1::int - 1) AS n ON CONFLICT DO NOTHING
"""
_FILL = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT 'user ' || n, now(), now() + interval '1 hour' + n * interval '1 ms',
    52.516275, 13.377704, 52.51, 13.37, 1000, 1, 1
FROM generate_series($1::int, $2::int - 1) AS n
RETURNING id, expires_at
"""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the systems share: the engines, a folder for what is written, and how many users there are."""

    truth: postgres.Postgres
    timers: embedded_redis.Redis
    folder: pathlib.Path
    users: int


@contextlib.contextmanager
def bench(users: int) -> collections.abc.Iterator[Bench]:
    """Run the engines, on their defaults but for the connections that pgbench asks for."""
    with tempfile.TemporaryDirectory(prefix="afterhours-bench-") as name:
        folder = pathlib.Path(name)
        with (
            postgres.Postgres(folder / "postgres", settings={"max_connections": "250"}) as truth,
            embedded_redis.Redis(folder / "redis") as timers,
        ):
            yield Bench(truth, timers, folder, users)


class System(abc.ABC):
    """Something with operations to measure. `pids` are the roots of the trees whose CPU time counts."""

    name: str
    operations: tuple[str, ...] = bodies.OPERATIONS
    pids: dict[str, int]

    @abc.abstractmethod
    def running(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Run it."""

    @abc.abstractmethod
    async def prepare(self, operation: str) -> None:
        """Bring the state to where each call of the operation is OK."""

    @abc.abstractmethod
    async def measure(self, operation: str, concurrency: int, seconds: float) -> generator.Seen:
        """Measure one operation."""


@contextlib.asynccontextmanager
async def served(
    command: collections.abc.Sequence[str], environment: dict[str, str]
) -> collections.abc.AsyncIterator[tuple[int, str]]:
    """Run a server that prints `listening on HOST:PORT`; give its pid and that address."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        if not line.startswith("listening on "):
            raise RuntimeError(f"{command} did not start; run it by hand to see why")
        yield process.pid, line.removeprefix("listening on ").strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


class Ours(System):
    """`afterhours-grpc serve`, by its defaults but for what `settings` says."""

    command: tuple[str, ...] = (sys.executable, "-m", "afterhours_grpc", "serve")

    def __init__(self, bench: Bench, settings: dict[str, str], *, with_request_ids: bool = False) -> None:
        self.name = "ours"
        self._bench = bench
        self._settings = settings
        self._with_request_ids = with_request_ids
        self._filled = False
        self._requests: dict[str, pathlib.Path] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The settings of the server."""
        return {
            "DATABASE_URL": self._bench.truth.url,
            "REDIS_URL": self._bench.timers.url,
            "AFTERHOURS_AUTH": "none",
            "AFTERHOURS_LISTEN": "127.0.0.1:0",
            "AFTERHOURS_FUZZ_KEY": _FUZZ_KEY,
            **self._settings,
        }

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        """Run the server, migrated, with a profile for each user."""
        await schema.migrate(self._bench.truth.url)
        self.sql = await asyncpg.connect(self._bench.truth.url)
        await self.sql.execute("TRUNCATE after_hours_profiles, after_hours_sessions CASCADE")
        await self.sql.execute(_PROFILES, self._bench.users)
        self.redis = redis.asyncio.Redis.from_url(self._bench.timers.url)
        try:
            async with served(self.command, self.environment) as (pid, self.address):
                self.pids = {"server": pid, "postgres": self._bench.truth.pid, "redis": self._bench.timers.pid}
                yield
        finally:
            await self.sql.close()
            await self.redis.aclose()

    async def prepare(self, operation: str) -> None:
        """Have every user without a session for starts, and with one for all else."""
        if operation == "start" or not self._filled:
            self._filled = False
            await self.sql.execute("TRUNCATE after_hours_sessions CASCADE")
            await self.redis.delete(jobs.EXPIRE.key)
        if operation != "start" and not self._filled:
            self._filled = True
            await self.fill(0, self._bench.users)
        if operation == "end":
            self._filled = False

    async def fill(self, first: int, last: int) -> None:
        """Store active sessions and their timers, past the service."""
        rows = await self.sql.fetch(_FILL, first, last)
        for at in range(0, len(rows), 10_000):
            due = {jobs.EXPIRE.job_id(row["id"]): row["expires_at"].timestamp() for row in rows[at : at + 10_000]}
            await self.redis.zadd(jobs.EXPIRE.key, typing.cast("typing.Any", due))
        await self.sql.execute("ANALYZE after_hours_sessions")

    async def measure(self, operation: str, concurrency: int, seconds: float) -> generator.Seen:
        """Call each user in turn."""
        if operation not in self._requests:
            self._requests[operation] = self.requests(operation, range(self._bench.users))
        wraps = operation in {"get", "extend"}
        target = self.target(operation, self._requests[operation], wraps=wraps)
        return await generator.run(target, concurrency, seconds)

    def requests(self, operation: str, numbers: range) -> pathlib.Path:
        """Write a request of each of these users."""
        path = self._bench.folder / f"ours-{operation}-{numbers.start}-{numbers.stop}-{numbers.step}"
        return bodies.write(path, bodies.ours(operation, numbers, with_request_ids=self._with_request_ids))

    def target(
        self, operation: str, requests: pathlib.Path, *, wraps: bool = False, least: int = _LEAST
    ) -> generator.Target:
        """Give what the generator is to call."""
        path = f"{_SERVICE}/{_METHODS[operation]}"
        return generator.Target("h2", self.address, path, requests, wraps, least)


class Empty(System):
    """An empty call, which no service on the same transport is faster than."""

    operations = ("empty",)

    def __init__(self, bench: Bench, transport: str) -> None:
        self.name = "empty"
        self._transport = transport
        self._requests = bodies.write(bench.folder / "empty", bodies.ours("get", range(bench.users)))

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        """Run the server of the empty call."""
        program = pathlib.Path(__file__).with_name("empty.py")
        async with served((sys.executable, str(program), self._transport), {}) as (pid, self._address):
            self.pids = {"server": pid}
            yield

    async def prepare(self, operation: str) -> None:
        """Nothing is kept."""

    async def measure(self, operation: str, concurrency: int, seconds: float) -> generator.Seen:
        """Call it with the requests of a get."""
        target = generator.Target("h2", self._address, f"/bench.Empty/{operation}", self._requests, wraps=True)
        return await generator.run(target, concurrency, seconds)
