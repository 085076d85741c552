"""What both clients are made of: a channel with its stubs and credentials, and a stream that may be opened again."""

import collections.abc
import typing

import grpc
from afterhours.v1 import profile_service_pb2_grpc, session_service_pb2_grpc

from afterhours_client import requests


class Connection:
    """A connection to the servers at `target`, such as `host:port` or `dns:///host:port`.

    `token` is one, or a function that gives one for each call; `credentials` are those of TLS, without which nothing is
    encrypted. Every call has a deadline of `timeout` seconds, and raises `errors.AfterhoursError`, a class for each
    reason. Mutations carry a `request_id`, a new one unless it is given: a call that failed may be made again with it.
    """

    # grpc, or grpc.aio.
    _library: typing.ClassVar[typing.Any]

    def __init__(
        self,
        target: str,
        *,
        token: requests.Token | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float = requests.TIMEOUT,
        options: collections.abc.Iterable[tuple[str, typing.Any]] = (),
    ) -> None:
        chosen = requests.options(options)
        self._token = token
        self._timeout = timeout
        self._channel = (
            self._library.secure_channel(target, credentials, options=chosen)
            if credentials
            else self._library.insecure_channel(target, options=chosen)
        )
        self._sessions: typing.Any = session_service_pb2_grpc.SessionServiceStub(self._channel)
        self._profiles: typing.Any = profile_service_pb2_grpc.ProfileServiceStub(self._channel)

    def _with(self, timeout: float | None) -> dict[str, typing.Any]:
        """Give what goes with a call: its deadline and its credentials."""
        return {
            "timeout": self._timeout if timeout is None else timeout,
            "metadata": requests.metadata(self._token),
        }


class Stream:
    """The events of sessions, one after another, without end: at least once each, in order for each session.

    Where the stream breaks it goes on by itself, on any server. `cursor` is where to go on from later: it belongs to
    the event that was given last, or to a heartbeat since. Iterating raises CursorExpired and what no retry mends.
    """

    def __init__(self, stub: typing.Any, token: requests.Token | None, going: requests.Going) -> None:
        self._stub = stub
        self._token = token
        self._going = going
        self._stream: typing.Any = None
        self._closed = False

    @property
    def cursor(self) -> str:
        """Where the watch stands; empty before the first message."""
        return self._going.cursor

    def close(self) -> None:
        """End the watch; idempotent."""
        self._closed = True
        if self._stream:
            self._stream.cancel()

    def _open(self) -> typing.Any:
        """Open the stream where the watch stands."""
        self._stream = self._stub.WatchSessions(self._going.request(), metadata=requests.metadata(self._token))
        return self._stream
