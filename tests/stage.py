"""What a chaos run stands on: a Postgres and a Redis, or two of each that swap their roles."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import pathlib
import secrets
import tempfile
import typing
import urllib.parse

import pair
import proxy
import replicas
import typer
from redis import asyncio as redis

from afterhours_grpc.embedded import postgres, process
from afterhours_grpc.embedded import redis as embedded
from afterhours_grpc.store import schema

_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "300", "track_commit_timestamp": "on"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Engines as replicas reach them, and as the checks do: `checks` leads to what is the primary."""

    engines: replicas.Engines
    checks: replicas.Engines
    servers: pair.Pair | None = None
    timers: "Timers | None" = None


class Timers:
    """A Redis and its replica, behind a name that leads to the primary. Both have one password."""

    def __init__(self, directory: pathlib.Path) -> None:
        password = secrets.token_hex(16)
        settings = {"masterauth": password, "repl-diskless-sync-delay": "0"}
        engines = []
        for name in ("one", "two"):
            (directory / name).mkdir(mode=0o700, parents=True)
            process.write_private(directory / name / "password", password)
            engines.append(embedded.Redis(directory / name, settings=settings))
        self.primary, self.replica = engines

    def __enter__(self) -> typing.Self:
        with contextlib.ExitStack() as stack:
            for each in (self.primary, self.replica):
                stack.enter_context(each)
            self._stack = stack.pop_all()
        self.name = proxy.Proxy(self.primary.url)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.asynccontextmanager
    async def named(self) -> collections.abc.AsyncIterator[str]:
        """Have the replica follow the primary, and lead to the primary; give the URL."""
        await _told(self.replica, "REPLICAOF", *_place(self.primary))
        async with self.name as name:
            yield name.url

    async def switch(self) -> None:
        """Promote the replica once it follows, lead to it, and have the old primary follow it."""
        await replicas.eventually(self._follows, within=20)
        self.primary, self.replica = self.replica, self.primary
        await _told(self.primary, "REPLICAOF", "NO", "ONE")
        self.name.lead_to(self.primary.url)
        await _told(self.replica, "REPLICAOF", *_place(self.primary))

    async def _follows(self) -> bool:
        found = typing.cast("dict[str, object]", await _told(self.replica, "INFO", "replication"))
        return found["master_link_status"] == "up"


async def _told(server: embedded.Redis, *command: str) -> object:
    async with redis.Redis.from_url(server.url, socket_timeout=10) as client:
        answer: object = await client.execute_command(*command)  # type: ignore[no-untyped-call]
        return answer


def _place(server: embedded.Redis) -> tuple[str, str]:
    return "127.0.0.1", str(urllib.parse.urlsplit(server.url).port)


@dataclasses.dataclass(frozen=True)
class Servers:
    """The engines of a stage, which outlive the event loop of a run."""

    truth: pair.Pair | postgres.Postgres
    timers: Timers

    @contextlib.asynccontextmanager
    async def stage(self) -> collections.abc.AsyncIterator[Stage]:
        """Lead to the primaries while a run goes on."""
        async with self.timers.named() as redis_url:
            if isinstance(self.truth, pair.Pair):
                engines = replicas.Engines(self.truth.url(), redis_url)
                checks = replicas.Engines(self.truth.url(target_session_attrs="primary"), redis_url)
                yield Stage(engines, checks, self.truth, self.timers)
            else:
                engines = replicas.Engines(self.truth.url, redis_url)
                yield Stage(engines, engines, None, self.timers)


@contextlib.contextmanager
def running() -> collections.abc.Iterator[Servers]:
    """Run two Redis and, where Debian's PostgreSQL is installed, two Postgres; else one, and say so."""
    with tempfile.TemporaryDirectory(prefix="afterhours-chaos-") as folder, contextlib.ExitStack() as stack:
        directory = pathlib.Path(folder)
        timers = stack.enter_context(Timers(directory / "redis"))
        if pair.needed.args[0]:
            typer.echo(f"no failover of Postgres: it {pair.needed.kwargs['reason']}")
            alone = stack.enter_context(postgres.Postgres(directory / "postgres", settings=_SETTINGS))
            asyncio.run(schema.migrate(alone.url))
            yield Servers(alone, timers)
        else:
            servers = stack.enter_context(pair.running(directory / "pair"))
            asyncio.run(_dated(servers))
            yield Servers(servers, timers)


async def _dated(servers: pair.Pair) -> None:
    """Have both record when a transaction was committed, which shows how late a session was closed."""
    await servers.primary.set("track_commit_timestamp", "on")
    await servers.primary.stop()
    await servers.primary.start()
    await servers.rejoin()
