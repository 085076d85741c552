"""A client whose calls block."""

import collections.abc
import datetime
import threading
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
    """A client whose calls block; see `connection.Connection` for what it takes."""

    _library: typing.ClassVar[typing.Any] = grpc

    def close(self) -> None:
        """End all watches and calls, and close the channel; idempotent, and callable from any thread."""
        self._end()
        self._channel.close()

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: typing.Any, request: message.Message, timeout: float | None = None) -> typing.Any:
        try:
            return method(request, **self._with(timeout))
        except grpc.RpcError as failed:
            error = errors.AfterhoursError.of(failed)
            if self._closed and error.code is grpc.StatusCode.CANCELLED:
                raise errors.ClientClosed from failed
            raise error from failed
        except ValueError as failed:  # of a closed channel
            if self._closed:
                raise errors.ClientClosed from failed
            raise

    def start(
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
        return requests.session_of(self._call(self._sessions.StartSession, request, timeout))

    def end(self, user_id: str, *, request_id: str | None = None, timeout: float | None = None) -> session_pb2.Session:
        """End the user's active session."""
        request = requests.end(user_id, request_id)
        return requests.session_of(self._call(self._sessions.EndSession, request, timeout))

    def extend(
        self,
        user_id: str,
        additional: datetime.timedelta,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> session_pb2.Session:
        """Move the end of the user's active session."""
        request = requests.extend(user_id, additional, request_id)
        return requests.session_of(self._call(self._sessions.ExtendSession, request, timeout))

    def get(self, user_id: str, *, timeout: float | None = None) -> session_pb2.Session | None:
        """Read the user's active session."""
        response = self._call(self._sessions.GetSession, requests.get(user_id), timeout)
        return requests.session_of(response) if response.active else None

    def batch_get(
        self,
        user_ids: collections.abc.Iterable[str],
        *,
        min_remaining: datetime.timedelta | None = None,
        timeout: float | None = None,
    ) -> list[session_pb2.Session]:
        """Read the active sessions of at most 1,000 users."""
        request = requests.batch(user_ids, min_remaining)
        return list((self._call(self._sessions.BatchGetSessions, request, timeout)).sessions)

    def history(self, user_id: str, *, page_size: int = 0) -> collections.abc.Iterator[session_pb2.Session]:
        """Read the user's sessions, newest first, a page at a time."""
        yield from self._paged(self._sessions.ListSessions, requests.history(user_id, page_size))

    def active(
        self,
        *,
        near: requests.Place | None = None,
        radius_meters: float = 0,
        min_remaining: datetime.timedelta | None = None,
        page_size: int = 0,
    ) -> collections.abc.Iterator[session_pb2.Session]:
        """Read all active sessions, oldest first, or those near a place, nearest first, a page at a time."""
        request = requests.active(near, radius_meters, min_remaining, page_size)
        yield from self._paged(self._sessions.ListActiveSessions, request)

    def _paged(self, method: typing.Any, request: requests.Paged) -> collections.abc.Iterator[session_pb2.Session]:
        while True:
            page = self._call(method, request)
            yield from page.sessions
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def exact_location(self, session_id: str, purpose: str, *, timeout: float | None = None) -> session_pb2.Location:
        """Read where a session was started; the call is recorded with its purpose."""
        request = requests.exact_location(session_id, purpose)
        response = self._call(self._sessions.GetExactLocation, request, timeout)
        return typing.cast("session_pb2.Location", response.location)

    def put_profile(self, profile: profile_pb2.Profile, *, timeout: float | None = None) -> profile_pb2.Profile:
        """Create or replace a profile."""
        response = self._call(self._profiles.PutProfile, requests.put_profile(profile), timeout)
        return typing.cast("profile_pb2.Profile", response.profile)

    def get_profile(self, user_id: str, *, timeout: float | None = None) -> profile_pb2.Profile:
        """Read a profile."""
        response = self._call(self._profiles.GetProfile, requests.get_profile(user_id), timeout)
        return typing.cast("profile_pb2.Profile", response.profile)

    def delete_profile(self, user_id: str, *, timeout: float | None = None) -> None:
        """Delete a profile, and with it end an active session."""
        self._call(self._profiles.DeleteProfile, requests.delete_profile(user_id), timeout)

    def watch(self, user_ids: collections.abc.Iterable[str] = (), *, cursor: str = "") -> "Watch":
        """Watch the sessions of at most 1,000 users, or of all, after a cursor or from now on."""
        state = requests.WatchState(user_ids, cursor, callable(self._token))
        return self._registered(Watch(self._sessions, self._token, state))


class Watch(connection.Stream):
    """A watch that blocks; see `connection.Stream` for its guarantees. `close` may be called from any thread."""

    _event: typing.ClassVar[typing.Any] = threading.Event

    def __iter__(self) -> collections.abc.Iterator[session_event_pb2.SessionEvent]:
        """Return the events as they arrive."""
        while (stream := self._open()) is not None:
            failed: grpc.RpcError | None = None
            try:
                for response in stream:
                    if self._state.received(response.event):
                        yield response.event
            except grpc.RpcError as error:
                failed = error
            finally:
                stream.cancel()  # of a reader that stopped reading
            if self._closing.is_set():
                return
            self._closing.wait(self._state.pause(failed))
