"""Watches as tests open them."""

import asyncio
import collections.abc
import contextlib
import typing

import grpc
import replicas
from afterhours.v1 import session_event_pb2, session_pb2, session_service_pb2

HEARTBEAT = "HEARTBEAT"
# The reason of a session that has not ended.
NONE = "UNSPECIFIED"


def name(event: session_event_pb2.SessionEvent) -> str:
    """Return the name of an event's type."""
    return session_event_pb2.SessionEventType.Name(event.type).removeprefix("SESSION_EVENT_TYPE_")


class Watch:
    """A stream of events, whose first heartbeat has come."""

    def __init__(self, client: replicas.Client, user_ids: collections.abc.Iterable[str] = (), cursor: str = "") -> None:
        request = session_service_pb2.WatchSessionsRequest(user_ids=user_ids, cursor=cursor)
        self._call: typing.Any = client.sessions.WatchSessions(request)
        self._reading: asyncio.Task[typing.Any] | None = None
        self.cursor = cursor

    async def next(self, within: float = 5) -> session_event_pb2.SessionEvent:
        """Return the next message."""
        # Not wait_for, for a reading that is cancelled ends the call.
        self._reading = self._reading or asyncio.ensure_future(self._call.read())
        await asyncio.wait({self._reading}, timeout=within)
        if not self._reading.done():
            raise TimeoutError
        reading, self._reading = self._reading, None
        response = await reading
        if response is grpc.aio.EOF:
            raise await self._failure()
        event: session_event_pb2.SessionEvent = response.event
        assert event.cursor
        self.cursor = event.cursor
        return event

    async def _failure(self) -> BaseException:
        code, details = await self._call.code(), await self._call.details()
        return grpc.aio.AioRpcError(
            code, await self._call.initial_metadata(), await self._call.trailing_metadata(), details
        )

    async def events(self, count: int, within: float = 10) -> list[session_event_pb2.SessionEvent]:
        """Return the next events, without heartbeats."""
        found: list[session_event_pb2.SessionEvent] = []
        async with asyncio.timeout(within):
            while len(found) < count:
                event = await self.next(within)
                if name(event) != HEARTBEAT:
                    found.append(event)
        return found

    async def silent(self, seconds: float = 0.5) -> None:
        """Check that nothing comes but heartbeats."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while name(await self.next(60)) == HEARTBEAT:
                    pass
                raise AssertionError("an event came")

    def cancel(self) -> None:
        """End it."""
        self._call.cancel()


@contextlib.asynccontextmanager
async def watching(
    client: replicas.Client, user_ids: collections.abc.Iterable[str] = (), cursor: str = ""
) -> collections.abc.AsyncIterator[Watch]:
    """Watch, once the first heartbeat has come."""
    watch = Watch(client, user_ids, cursor)
    try:
        first = await watch.next()
        assert name(first) == HEARTBEAT
        assert not first.HasField("session")
        yield watch
    finally:
        watch.cancel()


def types(events: list[session_event_pb2.SessionEvent]) -> list[str]:
    """Return the types of events."""
    return [name(each) for each in events]


def users(events: list[session_event_pb2.SessionEvent]) -> list[str]:
    """Return the users of events."""
    return [each.session.user_id for each in events]


def told(events: list[session_event_pb2.SessionEvent]) -> list[tuple[str, str, str]]:
    """Return the types, users and end reasons of events."""
    return [
        (
            name(each),
            each.session.user_id,
            session_pb2.EndReason.Name(each.session.end_reason).removeprefix("END_REASON_"),
        )
        for each in events
    ]


def in_order(events: collections.abc.Iterable[session_event_pb2.SessionEvent]) -> None:
    """Check that of each user the end of a session comes before the start of the next."""
    active: dict[str, str] = {}
    for event in events:
        user = event.session.user_id
        if name(event) == "STARTED":
            assert user not in active
            active[user] = event.session.id
        assert active[user] == event.session.id
        if name(event) == "ENDED":
            del active[user]


async def failure(watch: Watch) -> replicas.Refusal:
    """Read a watch to its end, and return how it ends."""
    while not isinstance(outcome := await replicas.outcome(watch.next()), replicas.Refusal):
        pass
    return outcome


async def answers(client: replicas.Client) -> bool:
    """Whether calls are answered."""
    return not isinstance(await replicas.outcome(client.get("ada")), replicas.Refusal)
