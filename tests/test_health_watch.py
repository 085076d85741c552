"""Watches of health, and how streams fare when a server goes away: a client that never reads delays nobody."""

import asyncio
import collections.abc
import contextlib
import signal
import time
import typing

import frames
import pytest
import replicas
from afterhours.v1 import session_service_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from afterhours_grpc.rpc import server

pytestmark = [pytest.mark.front_door, pytest.mark.timed]

SESSIONS = "afterhours.v1.SessionService"
_WATCH = "/grpc.health.v1.Health/Watch"
_WATCH_SESSIONS = "/afterhours.v1.SessionService/WatchSessions"
_Status = health_pb2.HealthCheckResponse


@contextlib.asynccontextmanager
async def stuck(address: str) -> collections.abc.AsyncIterator[None]:
    """Hold a connection on which the server may send no message, with a watch of health and one of sessions."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        request = health_pb2.HealthCheckRequest(service=SESSIONS).SerializeToString()
        writer.write(frames.opening(window=0))
        writer.write(frames.call(_WATCH, request, stream=1) + frames.call(_WATCH_SESSIONS, b"", stream=3))
        received = b""
        # Both have begun: headers are sent with the first message, of which the window holds back the rest.
        async with asyncio.timeout(10):
            while frames.kinds(received).count(frames.HEADERS) < 2:
                received += await reader.readexactly(1)
        yield
    finally:
        writer.transport.abort()


def watch(client: replicas.Client, service: str = SESSIONS) -> typing.Any:
    """Watch the health of a service."""
    stub: typing.Any = health_pb2_grpc.HealthStub(client.channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30)


async def test_a_client_that_never_reads_delays_no_end(engines: replicas.Engines) -> None:
    """With watches that never read, SIGTERM is seen by others at once, a call in flight is answered, and it exits."""
    async with replicas.process(engines) as (process, client), stuck(client.address):
        await client.put_profile("ada")
        await client.start("ada")
        watching = watch(client)
        assert (await watching.read()).status == _Status.SERVING
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions FOR UPDATE"):
            ending = asyncio.create_task(client.end("ada"))
            await replicas.eventually(engines.in_flight, within=10)
            process.signal(signal.SIGTERM)
            signalled = time.monotonic()
            assert (await asyncio.wait_for(watching.read(), 2)).status == _Status.NOT_SERVING
            assert (await replicas.refused(client.get("ada"))).reason == "SHUTTING_DOWN"
            assert not ending.done()
            answered = max(time.monotonic(), signalled + 0.5)
        assert (await ending).user_id == "ada"
        assert await process.wait() == 0
        assert time.monotonic() - answered < 1.5


async def test_streams_and_connections_end_with_their_server(engines: replicas.Engines) -> None:
    """From SIGTERM on a watch that reads is told SHUTTING_DOWN, and an idle connection to go away."""
    async with replicas.process(engines) as (process, client), stuck(client.address):
        host, _, port = client.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(frames.opening() + frames.frame(frames.SETTINGS, flags=frames.ACK))
        watching = client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest())
        await watching.read()
        process.signal(signal.SIGTERM)
        assert (await replicas.refused(watching.read())).reason == "SHUTTING_DOWN"
        assert frames.GOAWAY in frames.kinds(await reader.read())
        writer.transport.abort()
        assert await process.wait() == 0


class _Balancer:
    """Passes connections on to one server, as a balancer does that knows of no calls."""

    def __init__(self, target: str) -> None:
        self.target = target

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on a connection."""
        host, _, port = self.target.rpartition(":")
        others = await asyncio.open_connection(host, int(port))
        await asyncio.gather(self._pump(reader, others[1]), self._pump(others[0], writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(65536):
                sink.write(chunk)
        sink.close()


async def test_a_rolling_restart(engines: replicas.Engines) -> None:
    """Clients behind a balancer that retry nothing move to another server when theirs ends, beside a stuck watcher."""
    outcomes: list[object] = []

    async def load(client: replicas.Client) -> None:
        while leaving.returncode is None:
            outcomes.append(await replicas.outcome(client.get("ada")))
            await asyncio.sleep(0.01)
        outcomes.append(await client.get("ada"))

    async with replicas.replica(engines) as (service, _), replicas.process(engines) as (process, direct):
        leaving = typing.cast("asyncio.subprocess.Process", process._process)
        balancer = _Balancer(direct.address)
        async with await asyncio.start_server(balancer.connected, "127.0.0.1", 0) as listening, stuck(direct.address):
            port = listening.sockets[0].getsockname()[1]
            clients = [replicas.Client(f"127.0.0.1:{port}") for _ in range(8)]
            loads = [asyncio.create_task(load(client)) for client in clients]
            await asyncio.sleep(0.3)
            balancer.target = service.address
            process.signal(signal.SIGTERM)
            await asyncio.gather(*loads)
            await asyncio.gather(*(client.close() for client in clients))
    refusals = [each for each in outcomes if isinstance(each, replicas.Refusal)]
    assert {each.reason for each in refusals} <= {"SHUTTING_DOWN"}
    assert len(refusals) <= 2 * len(clients)
    assert len(outcomes) > 10 * len(clients)


async def test_watchers_that_never_read_hold_no_thread(engines: replicas.Engines) -> None:
    """With a dozen watches that never read, and events for them, names are resolved, and other watches go on."""
    async with replicas.replica(engines) as (service, client), contextlib.AsyncExitStack() as stack:
        for _ in range(12):
            await stack.enter_async_context(stuck(service.address))
        watching = client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest())
        await watching.read()
        await client.put_profile("ada")
        await client.start("ada")
        for _ in range(40):
            await client.extend("ada")
        async with asyncio.timeout(5):
            await asyncio.get_running_loop().getaddrinfo("localhost", 1)
            for _ in range(41):
                event: typing.Any = await watching.read()
                assert event.event.session.user_id == "ada"


async def test_a_service_that_there_is_not(engines: replicas.Engines) -> None:
    """A service that there is not is NOT_FOUND to a check, SERVICE_UNKNOWN to a watch, and not in the list."""
    async with replicas.replica(engines) as (_, client):
        assert (await replicas.refused(client.health("nonsense"))).code == "NOT_FOUND"
        assert (await watch(client, "nonsense").read()).status == _Status.SERVICE_UNKNOWN
        stub: typing.Any = health_pb2_grpc.HealthStub(client.channel)
        listed = await stub.List(health_pb2.HealthListRequest(), timeout=10)  # type: ignore[attr-defined]
        assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
            ("", SESSIONS, "afterhours.v1.ProfileService"), _Status.SERVING
        )


async def test_the_watches_of_a_connection_are_bounded(engines: replicas.Engines) -> None:
    """The 101st watch of a connection is RESOURCE_EXHAUSTED, until one ends, and another connection's is not."""
    async with replicas.replica(engines) as (service, client), replicas.Client(service.address) as other:
        watches = [watch(client) for _ in range(100)]
        assert {(await each.read()).status for each in watches} == {_Status.SERVING}
        assert (await replicas.refused(watch(client).read())).code == "RESOURCE_EXHAUSTED"
        assert (await watch(other).read()).status == _Status.SERVING
        watches.pop().cancel()

        async def has_room() -> bool:
            return not isinstance(await replicas.outcome(watch(client).read()), replicas.Refusal)

        await replicas.eventually(has_room, within=5)


async def test_a_client_that_vanished_is_noticed(engines: replicas.Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose client answers no ping is closed after the time and the timeout of keepalive."""
    # With the times of the service, divided by 50.
    quick = [(name, value // 50 if name.endswith("_ms") else value) for name, value in server._OPTIONS]
    monkeypatch.setattr(server, "_OPTIONS", quick)
    async with replicas.replica(engines) as (service, _):
        host, _, port = service.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(frames.opening() + frames.call(_WATCH, b""))
        async with asyncio.timeout(10):
            received = await reader.read()
        assert frames.PING in frames.kinds(received)
        writer.transport.abort()
