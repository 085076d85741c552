"""What may happen to a client: its server vanishes, it is closed amid a call, the reader of its watch is cancelled."""

import asyncio
import collections.abc
import contextlib
import struct
import time
import typing

import frames
import grpc
import keys
import proxy
import pytest
import replicas
from afterhours.v1 import session_event_pb2

import afterhours_client
from afterhours_client import aio, errors, requests

Client = afterhours_client.Client | aio.Client
Watch = afterhours_client.Watch | aio.Watch
Event = session_event_pb2.SessionEvent

both = pytest.mark.parametrize("kind", [afterhours_client.Client, aio.Client], ids=["blocking", "aio"])

JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}


@contextlib.asynccontextmanager
async def connected(
    kind: collections.abc.Callable[..., Client], target: str, **arguments: typing.Any
) -> collections.abc.AsyncIterator[Client]:
    """Run a client of either kind."""
    client = kind(target, **arguments)
    try:
        yield client
    finally:
        await close(client)


async def close(client: Client) -> None:
    """Close a client of either kind."""
    if isinstance(client, aio.Client):
        await client.close()
    else:
        await asyncio.to_thread(client.close)


def got(client: Client) -> "asyncio.Task[object]":
    """Make a call of a client of either kind."""
    if isinstance(client, aio.Client):
        return asyncio.create_task(client.get("ada"))
    return asyncio.create_task(asyncio.to_thread(client.get, "ada"))


class Reading:
    """Reads a watch of either kind, beside the test, until it ends."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.events: list[Event] = []
        self.ended = asyncio.create_task(self._read(watch))

    async def _read(self, watch: Watch) -> None:
        if isinstance(watch, aio.Watch):
            async for event in watch:
                self.events.append(event)
        else:
            await asyncio.to_thread(lambda: self.events.extend(watch))

    async def begun(self) -> typing.Self:
        """Wait for the first heartbeat."""
        await replicas.until(lambda: bool(self.watch.cursor))
        return self

    async def ends(self) -> None:
        """Wait for its end, which is near, and raise what it raised."""
        async with asyncio.timeout(2):
            await asyncio.wait({self.ended})
        self.ended.result()


class Tokens:
    """A function that returns a token after a while, and counts its calls."""

    def __init__(self, token: str = "", seconds: float = 0) -> None:
        self._token = token
        self._seconds = seconds
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        time.sleep(self._seconds)
        return self._token


@both
async def test_a_vanished_server_is_noticed(engines: replicas.Engines, kind: type[Client]) -> None:
    """A watch goes on elsewhere after 40 s of silence; here everything that the client ships is 20 times faster."""
    shipped = dict(requests.options(()))
    hurried = [(name, value // 20) for name, value in shipped.items() if name.endswith("_ms")]
    tokens = Tokens()
    async with (
        replicas.replica(engines) as (service, writer),
        proxy.Proxy(f"grpc://{service.address}") as way,
        connected(kind, way.address, token=tokens, options=hurried) as client,
    ):
        await writer.put_profile("ada")
        reading = await Reading(client.watch()).begun()
        way.strand()
        silent = time.monotonic()
        await writer.start("ada")
        await replicas.until(lambda: tokens.count == 2, within=5)
        assert 1 < time.monotonic() - silent < 5
        await replicas.until(lambda: bool(reading.events), within=5)
        reading.watch.close()
        await reading.ends()


def test_the_pings_that_are_shipped() -> None:
    """A vanished server is noticed within 40 s, by pings that servers allow, of which none waits for data to send."""
    shipped = dict(requests.options(()))
    assert shipped["grpc.keepalive_time_ms"] + shipped["grpc.http2.ping_timeout_ms"] <= 40_000
    assert shipped["grpc.keepalive_time_ms"] >= 10_000
    assert shipped["grpc.http2.max_pings_without_data"] == 0
    assert dict(requests.options([("grpc.http2.ping_timeout_ms", 7)]))["grpc.http2.ping_timeout_ms"] == 7


class _Resetting(proxy.Proxy):
    """A proxy that resets streams, as Envoy does those whose server is gone."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._clients: list[asyncio.StreamWriter] = []

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.append(writer)
        await super()._connected(reader, writer)

    def reset(self, stream: int, error: int) -> None:
        """Reset a stream of the first connection, between two frames: nothing may be on its way."""
        self._clients[0].write(frames.frame(frames.RST_STREAM, struct.pack(">I", error), stream=stream))


@both
@pytest.mark.parametrize("error", [0, 2], ids=["NO_ERROR", "INTERNAL_ERROR"])
async def test_a_proxy_resets_the_stream(engines: replicas.Engines, kind: type[Client], error: int) -> None:
    """A watch that had begun goes on after a reset for whatever error, which clients take for INTERNAL."""
    async with (
        replicas.replica(engines) as (service, writer),
        _Resetting(f"grpc://{service.address}") as way,
        connected(kind, way.address, token=(tokens := Tokens())) as client,
    ):
        await writer.put_profile("ada")
        reading = await Reading(client.watch()).begun()
        way.reset(1, error)
        await replicas.until(lambda: tokens.count == 2, within=2)
        await writer.start("ada")
        await replicas.until(lambda: bool(reading.events), within=5)
        reading.watch.close()
        await reading.ends()


async def test_closing_a_watch_while_its_token_is_renewed(engines: replicas.Engines) -> None:
    """A watch that is closed while the function for its token runs opens no stream, and its reader ends."""
    tokens = Tokens(seconds=0.5)
    async with (
        replicas.process(engines) as (process, server),
        connected(afterhours_client.Client, server.address, token=tokens) as client,
    ):
        reading = Reading(client.watch())
        await replicas.until(lambda: tokens.count == 1)
        for _ in range(2):
            reading.watch.close()
        await reading.ends()
        assert reading.watch.cursor == ""
        assert not any("WatchSessions" in line for line in process.lines)


@both
@pytest.mark.parametrize("closed", ["watch", "client"])
async def test_closing_ends_a_pause(
    engines: replicas.Engines, kind: type[Client], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch that is closed, or whose client is, between two tries ends at once and without an error."""
    monkeypatch.setattr(requests, "_SHORTEST_PAUSE", 5.0)
    tokens = Tokens("not one")
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        connected(kind, service.address, token=tokens) as client,
    ):
        reading = Reading(client.watch())
        await replicas.until(lambda: tokens.count == 1)
        await asyncio.sleep(0.3)  # for the answer, UNAUTHENTICATED
        if closed == "watch":
            reading.watch.close()
        else:
            await close(client)
        await reading.ends()
        assert tokens.count == 1


@both
async def test_closing_a_client(engines: replicas.Engines, kind: type[Client]) -> None:
    """Closing a client ends its watches and makes its calls raise, those under way too; twice is no error."""
    async with (
        replicas.replica(engines) as (service, _),
        proxy.Proxy(f"grpc://{service.address}") as way,
        connected(kind, way.address) as client,
    ):
        reading = await Reading(client.watch()).begun()
        way.strand()
        call = got(client)
        await asyncio.sleep(0.2)  # now it waits for its answer
        for _ in range(2):
            await close(client)
            await reading.ends()
            async with asyncio.timeout(2):
                for each in (call, got(client)):
                    with pytest.raises(errors.ClientClosed) as raised:
                        await each
                    assert raised.value.code is grpc.StatusCode.CANCELLED
            with pytest.raises(errors.ClientClosed):
                client.watch()


async def test_a_cancelled_reader(engines: replicas.Engines) -> None:
    """A task that reads a watch and is cancelled ends as cancelled, also when the watch or the client was closed."""
    async with replicas.replica(engines) as (service, _):
        for closing in ("nothing", "watch", "client"):
            async with connected(aio.Client, service.address) as client:
                reading = await Reading(client.watch()).begun()
                if closing == "watch":
                    reading.watch.close()
                elif closing == "client":
                    closed = asyncio.create_task(close(client))
                    await asyncio.sleep(0)
                reading.ended.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading.ends()
                if closing == "client":
                    await closed
        async with connected(aio.Client, service.address) as client:
            reading = await Reading(client.watch()).begun()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reading.ended, 0.1)


@both
async def test_a_reader_that_stops(engines: replicas.Engines, kind: type[Client]) -> None:
    """Where a reader leaves its loop the stream ends on the server, and the next loop goes on at the next event."""

    async def first(watch: Watch) -> Event:
        if isinstance(watch, aio.Watch):
            async for event in watch:
                return event
        return await asyncio.to_thread(lambda: next(iter(typing.cast("afterhours_client.Watch", watch))))

    async with replicas.process(engines) as (process, writer), connected(kind, writer.address) as client:
        await writer.put_profile("ada")
        watch = client.watch(["ada"])
        reading = asyncio.create_task(first(watch))
        await replicas.until(lambda: bool(watch.cursor))
        await writer.start("ada")
        assert (await reading).type == session_event_pb2.SESSION_EVENT_TYPE_STARTED
        await replicas.until(lambda: any("WatchSessions" in line for line in process.lines))
        await writer.end("ada")
        assert (await first(watch)).type == session_event_pb2.SESSION_EVENT_TYPE_ENDED


@both
async def test_a_cursor_that_expired(engines: replicas.Engines, kind: type[Client]) -> None:
    """A watch whose cursor the server no longer knows raises CursorExpired, and one without a cursor begins anew."""
    async with (
        replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (service, writer),
        connected(kind, service.address) as client,
    ):
        await writer.put_profile("ada")
        reading = await Reading(client.watch()).begun()
        cursor = reading.watch.cursor
        for _ in range(2):
            await writer.start("ada")
            await writer.end("ada")
        await replicas.until(lambda: len(reading.events) == 4)
        reading.watch.close()
        await reading.ends()
        await engines.rows("UPDATE after_hours_events SET placed_at = placed_at - interval '8 days'")

        async def removed() -> bool:
            return len(await engines.rows("SELECT FROM after_hours_events")) <= 1

        await replicas.eventually(removed, within=10)
        with pytest.raises(errors.CursorExpired):
            await Reading(client.watch(cursor=cursor)).ends()
        anew = await Reading(client.watch()).begun()
        await writer.start("ada")
        await replicas.until(lambda: bool(anew.events))


def refused(code: grpc.StatusCode) -> grpc.RpcError:
    """Return what a stream raises that ended without a reason of the service."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "Stream removed")


def test_pauses_of_a_watch() -> None:
    """Between tries a watch waits longer and longer, up to 5 s, until an event comes; a heartbeat is not enough."""
    state = requests.WatchState((), "", renewable=False)

    def pause() -> float:
        state.request()
        return state.pause(refused(grpc.StatusCode.UNAVAILABLE))

    pauses = [pause() for _ in range(12)]
    assert pauses[0] <= 0.1
    assert 2.5 <= pauses[-1] <= 5
    assert not state.received(Event(cursor="here", type=session_event_pb2.SESSION_EVENT_TYPE_HEARTBEAT))
    assert state.cursor == "here"
    assert pause() >= 2.5
    assert state.received(Event(cursor="there", type=session_event_pb2.SESSION_EVENT_TYPE_STARTED))
    assert pause() <= 0.1


def test_what_a_watch_survives() -> None:
    """A stream that a server or a proxy broke off is opened again; what says that no try would help is raised."""
    state = requests.WatchState((), "", renewable=False)
    for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        assert state.pause(refused(code)) > 0
    lasting = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED)
    broken = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    for code in (*lasting, *broken):
        with pytest.raises(errors.AfterhoursError):
            state.pause(refused(code))
    state.request()
    state.received(Event(cursor="here", type=session_event_pb2.SESSION_EVENT_TYPE_HEARTBEAT))
    for code in broken:
        assert state.pause(refused(code)) > 0
    for code in lasting:
        with pytest.raises(errors.AfterhoursError):
            state.pause(refused(code))
    state.request()
    for code in broken:
        with pytest.raises(errors.AfterhoursError):
            state.pause(refused(code))
