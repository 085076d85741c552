"""Servers under test: in this process, where a test may look inside, or as processes that it may kill."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import os
import signal
import sys
import typing
import uuid

import asyncpg
import grpc
import pytest
from afterhours.v1 import (
    profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
    session_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
)
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from afterhours_grpc import app, settings

BERLIN = session_pb2.Location(latitude=52.516275, longitude=13.377704)
FUZZ_KEY = "1:a fuzz key of thirty-two characters"

# Settings that could be served, were there a Postgres.
SERVABLE = {
    "DATABASE_URL": "postgresql://ada@127.0.0.1:1/afterhours",
    "AFTERHOURS_AUTH": "none",
    "AFTERHOURS_FUZZ_KEY": FUZZ_KEY,
    "AFTERHOURS_LISTEN": "127.0.0.1:0",
}


@dataclasses.dataclass(frozen=True)
class Engines:
    """A migrated database of a test's own, and an empty Redis."""

    database_url: str
    redis_url: str
    transport: str = "grpcio"

    def environment(self, **overrides: str) -> dict[str, str]:
        """Give the settings of a server on them, on a port of its own."""
        return {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "AFTERHOURS_AUTH": "none",
            "AFTERHOURS_FUZZ_KEY": FUZZ_KEY,
            "AFTERHOURS_LISTEN": "127.0.0.1:0",
            "AFTERHOURS_TRANSPORT": self.transport,
            "AFTERHOURS_DURATIONS": "2s,15m,30m,60m",
            **overrides,
        }

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Run SQL, past the service."""
        connection = await asyncpg.connect(self.database_url)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
            return rows
        finally:
            await connection.close()

    async def execute(self, script: str) -> None:
        """Run several statements, past the service."""
        connection = await asyncpg.connect(self.database_url)
        try:
            await connection.execute(script)
        finally:
            await connection.close()

    async def in_flight(self) -> bool:
        """Return whether a statement in this database waits for a lock."""
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return bool(await self.rows(waiting))


class _Bearer:
    """Sends a token with each call."""

    def __init__(self, token: str) -> None:
        self._metadata = ("authorization", f"Bearer {token}")

    async def _call(
        self,
        continuation: collections.abc.Callable[..., typing.Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: object,
    ) -> typing.Any:
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()), self._metadata)
        details = grpc.aio.ClientCallDetails(
            client_call_details.method,
            client_call_details.timeout,
            metadata,
            client_call_details.credentials,
            client_call_details.wait_for_ready,
        )
        return await continuation(details, request)


class _BearerOfCalls(_Bearer, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary = _Bearer._call


class _BearerOfStreams(_Bearer, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream = _Bearer._call


class Client:
    """The generated stubs on a channel, with what tests ask for most."""

    def __init__(
        self,
        address: str,
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        further: collections.abc.Iterable[tuple[str, int]] = (),
    ) -> None:
        self.address = address
        # No retries and no shared subchannels: each client sees its own server, as it is.
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1), *further]
        interceptors: list[grpc.aio.ClientInterceptor] = (
            [_BearerOfCalls(token), _BearerOfStreams(token)] if token else []
        )
        self.channel = (
            grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)
            if credentials
            else grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        )
        self.sessions: session_service_pb2_grpc.SessionServiceAsyncStub = session_service_pb2_grpc.SessionServiceStub(
            self.channel
        )
        self.profiles: profile_service_pb2_grpc.ProfileServiceAsyncStub = profile_service_pb2_grpc.ProfileServiceStub(
            self.channel
        )

    async def put_profile(self, user_id: str, **fields: typing.Any) -> None:
        """Give a user a profile."""
        profile = profile_pb2.Profile(user_id=user_id, **fields)
        await self.profiles.PutProfile(profile_service_pb2.PutProfileRequest(profile=profile))

    async def start(
        self,
        user_id: str,
        seconds: int = 900,
        request_id: str = "",
        location: session_pb2.Location = BERLIN,
        timeout: float | None = 10,
    ) -> session_pb2.Session:
        """Start a session."""
        request = session_service_pb2.StartSessionRequest(
            user_id=user_id,
            duration=duration_pb2.Duration(seconds=seconds),
            location=location,
            request_id=request_id,
        )
        return (await self.sessions.StartSession(request, timeout=timeout)).session

    async def end(self, user_id: str, request_id: str = "", timeout: float | None = 10) -> session_pb2.Session:
        """End a session."""
        request = session_service_pb2.EndSessionRequest(user_id=user_id, request_id=request_id)
        return (await self.sessions.EndSession(request, timeout=timeout)).session

    async def extend(
        self, user_id: str, seconds: int = 900, request_id: str = "", timeout: float | None = 10
    ) -> session_pb2.Session:
        """Extend a session."""
        request = session_service_pb2.ExtendSessionRequest(
            user_id=user_id,
            additional_duration=duration_pb2.Duration(seconds=seconds),
            request_id=request_id,
        )
        return (await self.sessions.ExtendSession(request, timeout=timeout)).session

    async def get(self, user_id: str, timeout: float | None = 10) -> session_service_pb2.GetSessionResponse:
        """Get a session."""
        request = session_service_pb2.GetSessionRequest(user_id=user_id)
        return await self.sessions.GetSession(request, timeout=timeout)

    async def delete_profile(self, user_id: str) -> None:
        """Delete a profile."""
        await self.profiles.DeleteProfile(profile_service_pb2.DeleteProfileRequest(user_id=user_id))

    async def exact_location(self, session_id: str, purpose: str = "case 7") -> session_pb2.Location:
        """Read where a session was started."""
        request = session_service_pb2.GetExactLocationRequest(session_id=session_id, purpose=purpose)
        return (await self.sessions.GetExactLocation(request, timeout=10)).location

    async def health(self, service: str = "afterhours.v1.SessionService") -> str:
        """Give the name of a health status."""
        stub: typing.Any = health_pb2_grpc.HealthStub(self.channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close(None)

    async def __aenter__(self) -> typing.Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@contextlib.asynccontextmanager
async def replica(engines: Engines, **overrides: str) -> collections.abc.AsyncIterator[tuple[app.Service, Client]]:
    """Run a server in this process; afterwards no connection may be in use."""
    config = settings.load(engines.environment(**{"AFTERHOURS_DRAIN": "3s", **overrides}))
    async with app.running(config) as service:
        client = Client(service.address)
        try:
            yield service, client
        finally:
            await client.close()
    # A watch that was ended in the middle of a read gives its connection back a moment later.
    await until(lambda: service.database.checked_out == 0)


@contextlib.asynccontextmanager
async def locked(engines: Engines, query: str) -> collections.abc.AsyncIterator[asyncpg.Connection]:
    """Hold the locks that a statement takes, as a writer elsewhere would; give the connection that does."""
    connection = await asyncpg.connect(engines.database_url)
    try:
        async with connection.transaction():
            await connection.execute(query)
            yield connection
    finally:
        await connection.close()


class Process:
    """A server of `afterhours-grpc serve`."""

    def __init__(
        self, environment: dict[str, str], *command: str, program: tuple[str, ...] = ("-m", "afterhours_grpc")
    ) -> None:
        self._environment = environment
        self._command = (*program, *(command or ("serve",)))
        self._process: asyncio.subprocess.Process | None = None
        self.lines: list[str] = []

    async def start(self) -> typing.Self:
        """Start without waiting."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_PRELOAD", "FAKETIME") if name in os.environ}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._command,
            env={**kept, **self._environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**20,
        )
        self._reader = asyncio.create_task(self._read())
        self._listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return self

    async def _read(self) -> None:
        assert self._process and self._process.stdout
        async for raw in self._process.stdout:
            line = raw.decode().rstrip()
            self.lines.append(line)
            if line.startswith("listening on ") and not self._listening.done():
                self._listening.set_result(line.removeprefix("listening on "))
        if not self._listening.done():
            self._listening.set_exception(AssertionError("\n".join(self.lines)))

    async def client(self) -> Client:
        """Wait until it serves."""
        return Client(await asyncio.wait_for(asyncio.shield(self._listening), 30))

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    async def wait(self) -> int:
        """Give its exit status; what it printed is in `lines`."""
        assert self._process
        status = await asyncio.wait_for(self._process.wait(), 60)
        await self._reader
        if not self._listening.cancelled() and self._listening.done():
            self._listening.exception()
        return status

    async def terminate(self) -> None:
        """Stop it by SIGTERM, for reading all of its lines: a process that is killed may lose the last ones."""
        self.signal(signal.SIGTERM)
        assert await self.wait() == 0

    async def stop(self) -> None:
        """Kill it, whatever it does."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.wait()


@contextlib.asynccontextmanager
async def process(engines: Engines, **overrides: str) -> collections.abc.AsyncIterator[tuple[Process, Client]]:
    """Run a server as a process."""
    running = await Process(engines.environment(**overrides)).start()
    try:
        client = await running.client()
        try:
            yield running, client
        finally:
            await client.close()
    finally:
        await running.stop()


async def not_served(engines: Engines, **overrides: str) -> str:
    """Run a server in this process, which must refuse to start, and return the one line that it says."""
    with pytest.raises((app.StartError, settings.SettingsError)) as refused:
        async with replica(engines, **overrides):
            pass
    [line] = str(refused.value).splitlines()
    return line


async def refusal_to_start(environment: dict[str, str]) -> str:
    """Start a server that must refuse to, with status 1, and give the one line that it says."""
    process = await Process(environment).start()
    try:
        assert await process.wait() == 1
    finally:
        await process.stop()
    [line] = process.lines
    return line


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a failed call said."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str]
    details: dict[str, typing.Any]


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Read a failed call."""
    status = rpc_status.from_call(typing.cast("grpc.Call", error))
    details: dict[str, typing.Any] = {}
    info = error_details_pb2.ErrorInfo()
    for packed in status.details if status else ():
        name = packed.type_url.rpartition(".")[2]
        details[name] = getattr(error_details_pb2, name)()
        packed.Unpack(details[name])
    info = details.get("ErrorInfo", info)
    assert not info.domain or info.domain == "afterhours.v1"
    return Refusal(error.code().name, info.reason, error.details() or "", dict(info.metadata), details)


Result = typing.TypeVar("Result")


async def outcome(call: collections.abc.Awaitable[Result]) -> Result | Refusal:
    """Give the answer of a call, or what it was refused for."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return refusal(error)


async def refused(call: collections.abc.Awaitable[object]) -> Refusal:
    """Give what a call was refused for; it must be."""
    result = await outcome(call)
    assert isinstance(result, Refusal), result
    return result


async def eventually(holds: collections.abc.Callable[[], collections.abc.Awaitable[bool]], within: float) -> None:
    """Wait until something holds, looking every 20 ms, for at most `within` seconds."""
    async with asyncio.timeout(within):
        while not await holds():  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.02)


async def until(holds: collections.abc.Callable[[], bool], within: float = 10) -> None:
    """Wait until something in this process holds, as `eventually` does."""

    async def does() -> bool:
        return holds()

    await eventually(does, within)


def request_id() -> str:
    """Give a new request_id."""
    return str(uuid.uuid4())
