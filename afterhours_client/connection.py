"""What both clients are made of: a channel with its stubs and credentials, and a watch that reopens its stream."""

import collections.abc
import threading
import typing
import weakref

import grpc
from afterhours.v1 import profile_service_pb2_grpc, session_service_pb2_grpc

from afterhours_client import errors, requests


class Connection:
    """A connection to the servers at `target`, such as `host:port` or `dns:///host:port`.

    `token` is a bearer token, or a function that returns one and is called for each call; `credentials` are those of
    TLS, without which nothing is encrypted. `options` are further options of the gRPC channel and override ours.

    Every call has a deadline of `timeout` seconds and raises `errors.AfterhoursError`, which has a subclass for each
    reason. Mutations carry a `request_id`, a new one unless it is passed: a failed call may be repeated with it.

    Closing the client ends the iteration of its watches, and every other call that is under way, or made later, raises
    `errors.ClientClosed`.
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
        # Reentrant, since a signal handler may close the client in the thread that uses it.
        self._lock = threading.RLock()
        self._closed = False
        self._watches: weakref.WeakSet[Stream] = weakref.WeakSet()

    def _with(self, timeout: float | None) -> dict[str, typing.Any]:
        """Return the deadline and the credentials of a call."""
        return {
            "timeout": min(self._timeout if timeout is None else timeout, requests.LONGEST_TIMEOUT),
            "metadata": requests.metadata(self._token),
        }

    def _registered(self, watch: "AnyStream") -> "AnyStream":
        """Return the watch, which is closed with the client from here on."""
        with self._lock:
            if self._closed:
                raise errors.ClientClosed
            self._watches.add(watch)
        return watch

    def _end(self) -> None:
        """Refuse further calls and close all watches, before the channel is closed."""
        with self._lock:
            self._closed = True
            watches = list(self._watches)
        for each in watches:
            each.close()


class Stream:
    """The events of sessions, without end: each at least once, in order for each session.

    When the stream breaks, it is opened again where it was, on any server. `cursor` is where to resume later: that of
    the event that was returned last, or of a later heartbeat. Iterating ends once the watch or its client is closed;
    it raises CursorExpired, and every error that opening the stream again cannot mend. One reader at a time.
    """

    # threading.Event, or asyncio.Event.
    _event: typing.ClassVar[typing.Any]

    def __init__(self, stub: typing.Any, token: requests.Token | None, state: requests.WatchState) -> None:
        self._stub = stub
        self._token = token
        self._state = state
        self._stream: typing.Any = None
        self._closing = self._event()
        # Held while a stream is opened, so that close() cancels it. Reentrant, as that of the client is.
        self._lock = threading.RLock()

    @property
    def cursor(self) -> str:
        """Where the watch stands; empty before the first message."""
        return self._state.cursor

    def close(self) -> None:
        """End the watch, and a pause before it is opened again; idempotent."""
        self._closing.set()
        with self._lock:
            stream = self._stream
        if stream:
            stream.cancel()

    def _open(self) -> typing.Any:
        """Open the stream where the watch stands; return None if the watch is closed."""
        if self._closing.is_set():
            return None
        # A function that renews a token may take long, and the watch may be closed meanwhile.
        metadata = requests.metadata(self._token)
        with self._lock:
            if self._closing.is_set():
                return None
            self._stream = self._stub.WatchSessions(self._state.request(), metadata=metadata)
            return self._stream


AnyStream = typing.TypeVar("AnyStream", bound=Stream)
