"""A client for asyncio."""

import asyncio
import collections.abc
import contextlib
import datetime
import typing

import grpc
from afterhours.v1 import (
    profile_pb2,
    session_event_pb2,
    session_pb2,
)
from google.protobuf import message

from afterhours_client import connection, errors, requests


class Client(connection.Connection):
    """A client for asyncio; see `connection.Connection` for what it takes."""

    _library: typing.ClassVar[typing.Any] = grpc.aio

    async def close(self) -> None:
        """End all watches and calls, and close the channel; idempotent."""
        self._end()
        await self._channel.close()

    async def __aenter__(self) -> typing.Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: typing.Any, request: message.Message, timeout: float | None = None) -> typing.Any:
        if self._closed:
            raise errors.ClientClosed
        try:
            return await _received(method(request, **self._with(timeout)), lambda: self._closed)
        except grpc.RpcError as failed:
            raise errors.AfterhoursError.of(failed) from failed

    async def start(
        self,
        user_id: str,
        duration: datetime.timedelta,
        place: requests.Place,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> session_pb2.Session:
        """Open the user's session, at a place of (latitude, longitude) in degrees."""
        request = requests.start(user_id, duration, place, request_id)
        return requests.session_of(await self._call(self._sessions.StartSession, request, timeout))

    async def end(
        self, user_id: str, *, request_id: str | None = None, timeout: float | None = None
    ) -> session_pb2.Session:
        """End the user's active session."""
        request = requests.end(user_id, request_id)
        return requests.session_of(await self._call(self._sessions.EndSession, request, timeout))

    async def extend(
        self,
        user_id: str,
        additional: datetime.timedelta,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> session_pb2.Session:
        """Move the end of the user's active session."""
        request = requests.extend(user_id, additional, request_id)
        return requests.session_of(await self._call(self._sessions.ExtendSession, request, timeout))

    async def get(self, user_id: str, *, timeout: float | None = None) -> session_pb2.Session | None:
        """Read the user's active session."""
        response = await self._call(self._sessions.GetSession, requests.get(user_id), timeout)
        return requests.session_of(response) if response.active else None

    async def batch_get(
        self,
        user_ids: collections.abc.Iterable[str],
        *,
        min_remaining: datetime.timedelta | None = None,
        timeout: float | None = None,
    ) -> list[session_pb2.Session]:
        """Read the active sessions of at most 1,000 users."""
        request = requests.batch(user_ids, min_remaining)
        return list((await self._call(self._sessions.BatchGetSessions, request, timeout)).sessions)

    async def history(self, user_id: str, *, page_size: int = 0) -> collections.abc.AsyncIterator[session_pb2.Session]:
        """Read the user's sessions, newest first, a page at a time."""
        async for each in self._paged(self._sessions.ListSessions, requests.history(user_id, page_size)):
            yield each

    async def active(
        self,
        *,
        near: requests.Place | None = None,
        radius_meters: float = 0,
        min_remaining: datetime.timedelta | None = None,
        page_size: int = 0,
    ) -> collections.abc.AsyncIterator[session_pb2.Session]:
        """Read all active sessions, oldest first, or those near a place, nearest first, a page at a time."""
        request = requests.active(near, radius_meters, min_remaining, page_size)
        async for each in self._paged(self._sessions.ListActiveSessions, request):
            yield each

    async def _paged(
        self, method: typing.Any, request: requests.Paged
    ) -> collections.abc.AsyncIterator[session_pb2.Session]:
        while True:
            page = await self._call(method, request)
            for each in page.sessions:
                yield each
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def exact_location(
        self, session_id: str, purpose: str, *, timeout: float | None = None
    ) -> session_pb2.Location:
        """Read where a session was started; the call is recorded with its purpose."""
        request = requests.exact_location(session_id, purpose)
        response = await self._call(self._sessions.GetExactLocation, request, timeout)
        return typing.cast("session_pb2.Location", response.location)

    async def put_profile(self, profile: profile_pb2.Profile, *, timeout: float | None = None) -> profile_pb2.Profile:
        """Create or replace a profile."""
        response = await self._call(self._profiles.PutProfile, requests.put_profile(profile), timeout)
        return typing.cast("profile_pb2.Profile", response.profile)

    async def get_profile(self, user_id: str, *, timeout: float | None = None) -> profile_pb2.Profile:
        """Read a profile."""
        response = await self._call(self._profiles.GetProfile, requests.get_profile(user_id), timeout)
        return typing.cast("profile_pb2.Profile", response.profile)

    async def delete_profile(self, user_id: str, *, timeout: float | None = None) -> None:
        """Delete a profile, and with it end an active session."""
        await self._call(self._profiles.DeleteProfile, requests.delete_profile(user_id), timeout)

    def watch(self, user_ids: collections.abc.Iterable[str] = (), *, cursor: str = "") -> "Watch":
        """Watch the sessions of at most 1,000 users, or of all, after a cursor or from now on."""
        state = requests.WatchState(user_ids, cursor, callable(self._token))
        return self._registered(Watch(self._sessions, self._token, state))


class Watch(connection.Stream):
    """A watch for asyncio; see `connection.Stream` for its guarantees."""

    _event: typing.ClassVar[typing.Any] = asyncio.Event

    async def __aiter__(self) -> collections.abc.AsyncIterator[session_event_pb2.SessionEvent]:
        """Return the events as they arrive."""
        while (stream := self._open()) is not None:
            failed: grpc.RpcError | None = None
            try:
                while (response := await _received(stream.read(), self._closing.is_set)) is not grpc.aio.EOF:
                    if self._state.received(response.event):
                        yield response.event
            except grpc.RpcError as error:
                failed = error
            except errors.ClientClosed:
                pass  # as below
            finally:
                stream.cancel()  # of a reader that stopped reading
            if self._closing.is_set():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._state.pause(failed)):
                    await self._closing.wait()


async def _received(
    call: collections.abc.Awaitable[typing.Any], closed: collections.abc.Callable[[], bool]
) -> typing.Any:
    """Return what a call brings; raise ClientClosed if the call was cancelled because what made it was closed.

    grpc.aio raises CancelledError for that, too, by which no task may end that nobody cancelled. A cancellation of the
    task may be pending when the call begins: Ctrl-C cancels a task that is running.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await call
    except asyncio.CancelledError:
        if not closed() or task is None or task.cancelling() > before:
            raise
        raise errors.ClientClosed from None
