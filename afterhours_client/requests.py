"""What both clients share: the channel's options, the requests, and the state of a watch."""

import collections.abc
import datetime
import json
import random
import time
import typing
import uuid

import grpc
from afterhours.v1 import profile_pb2, profile_service_pb2, session_event_pb2, session_pb2, session_service_pb2
from google.protobuf import duration_pb2, message

from afterhours_client import errors

Place = tuple[float, float]
Token = str | collections.abc.Callable[[], str]
Paged = session_service_pb2.ListSessionsRequest | session_service_pb2.ListActiveSessionsRequest

TIMEOUT = 5.0
"""Seconds that a call may take, unless the client or the call says otherwise."""

LONGEST_TIMEOUT = 1e9
"""Seconds, some 30 years: a deadline that the library can represent. An endless one would have passed already."""

HEARTBEAT = session_event_pb2.SESSION_EVENT_TYPE_HEARTBEAT

_SERVICES = ("afterhours.v1.SessionService", "afterhours.v1.ProfileService")
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": each} for each in _SERVICES],
            # Nothing was applied, or the same request_id tells.
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
# Seconds before a stream is opened again: doubled each time, until one brings an event or lasts for the longest pause.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# How many tokens in a row a server may refuse before a watch ends: a function may return an old one once more.
_MAX_REFUSED_TOKENS = 4
_RESET = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def options(further: collections.abc.Iterable[tuple[str, typing.Any]]) -> list[tuple[str, typing.Any]]:
    """Return the options of a channel; `further` ones override ours."""
    ours = {
        "grpc.service_config": json.dumps(_SERVICE_CONFIG),
        "grpc.enable_retries": 1,
        # While a call or a watch is under way, a server that vanished is noticed within 40 s: a ping follows 30 s of
        # silence, and must be answered within 10 s. `ping_timeout_ms` is what ends the connection, by default after a
        # minute; `keepalive_timeout_ms` is only how long the kernel may wait for the acknowledgement of sent bytes.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.ping_timeout_ms": 10_000,
        # A watch sends nothing but pings. By default the third in a row would wait for a minute.
        "grpc.http2.max_pings_without_data": 0,
    }
    return list({**ours, **dict(further)}.items())


def metadata(token: Token | None) -> tuple[tuple[str, str], ...]:
    """Return the credentials of a call; a token that is a function is called each time.

    A line break at its end, as a file has one, is left out. Raise ValueError for what no metadata can carry: of some
    calls the library would raise an error of its own that does not say what is wrong.
    """
    found = ((token() if callable(token) else token) or "").strip()
    if not (found.isascii() and found.isprintable()):
        raise ValueError("the token has characters other than printable ASCII: check where it is read from")
    return (("authorization", f"Bearer {found}"),) if found else ()


def _duration(length: datetime.timedelta | None) -> duration_pb2.Duration | None:
    if length is None:
        return None
    found = duration_pb2.Duration()
    found.FromTimedelta(length)
    return found


def _location(place: Place | None) -> session_pb2.Location | None:
    return session_pb2.Location(latitude=place[0], longitude=place[1]) if place else None


def start(
    user_id: str, duration: datetime.timedelta, place: Place, request_id: str | None
) -> session_service_pb2.StartSessionRequest:
    """Return a request, with a new request_id unless one is passed."""
    return session_service_pb2.StartSessionRequest(
        user_id=user_id,
        duration=_duration(duration),
        location=_location(place),
        request_id=request_id or str(uuid.uuid4()),
    )


def end(user_id: str, request_id: str | None) -> session_service_pb2.EndSessionRequest:
    """Return a request."""
    return session_service_pb2.EndSessionRequest(user_id=user_id, request_id=request_id or str(uuid.uuid4()))


def extend(
    user_id: str, additional: datetime.timedelta, request_id: str | None
) -> session_service_pb2.ExtendSessionRequest:
    """Return a request."""
    return session_service_pb2.ExtendSessionRequest(
        user_id=user_id,
        additional_duration=_duration(additional),
        request_id=request_id or str(uuid.uuid4()),
    )


def get(user_id: str) -> session_service_pb2.GetSessionRequest:
    """Return a request."""
    return session_service_pb2.GetSessionRequest(user_id=user_id)


def ids(user_ids: collections.abc.Iterable[str]) -> list[str]:
    """Return the ids of users; raise TypeError for a single one, whose characters would be taken for users."""
    if isinstance(user_ids, str):
        raise TypeError(f"user_ids must be a list of user ids, such as [{user_ids!r}]")
    return list(user_ids)


def batch(
    user_ids: collections.abc.Iterable[str], min_remaining: datetime.timedelta | None
) -> session_service_pb2.BatchGetSessionsRequest:
    """Return a request."""
    return session_service_pb2.BatchGetSessionsRequest(user_ids=ids(user_ids), min_remaining=_duration(min_remaining))


def history(user_id: str, page_size: int) -> session_service_pb2.ListSessionsRequest:
    """Return the request of the first page."""
    return session_service_pb2.ListSessionsRequest(user_id=user_id, page_size=page_size)


def active(
    near: Place | None, radius_meters: float, min_remaining: datetime.timedelta | None, page_size: int
) -> session_service_pb2.ListActiveSessionsRequest:
    """Return the request of the first page."""
    return session_service_pb2.ListActiveSessionsRequest(
        near=_location(near),
        radius_meters=radius_meters,
        min_remaining=_duration(min_remaining),
        page_size=page_size,
    )


def exact_location(session_id: str, purpose: str) -> session_service_pb2.GetExactLocationRequest:
    """Return a request."""
    return session_service_pb2.GetExactLocationRequest(session_id=session_id, purpose=purpose)


def put_profile(profile: profile_pb2.Profile) -> profile_service_pb2.PutProfileRequest:
    """Return a request."""
    return profile_service_pb2.PutProfileRequest(profile=profile)


def get_profile(user_id: str) -> profile_service_pb2.GetProfileRequest:
    """Return a request."""
    return profile_service_pb2.GetProfileRequest(user_id=user_id)


def delete_profile(user_id: str) -> profile_service_pb2.DeleteProfileRequest:
    """Return a request."""
    return profile_service_pb2.DeleteProfileRequest(user_id=user_id)


def session_of(response: message.Message) -> session_pb2.Session:
    """Return the session of a response."""
    return typing.cast("session_service_pb2.StartSessionResponse", response).session


class WatchState:
    """Where a watch stands, and how long it waits before its stream is opened again."""

    def __init__(self, user_ids: collections.abc.Iterable[str], cursor: str, renewable: bool) -> None:
        self._user_ids = ids(user_ids)
        self._renewable = renewable
        self._pause = _SHORTEST_PAUSE
        self._opened = 0.0
        # Whether the stream has brought a message.
        self._begun = False
        self._refused_tokens = 0
        self.cursor = cursor

    def request(self) -> session_service_pb2.WatchSessionsRequest:
        """Return the request of a stream that resumes here."""
        self._opened = time.monotonic()
        self._begun = False
        return session_service_pb2.WatchSessionsRequest(user_ids=self._user_ids, cursor=self.cursor)

    def received(self, event: session_event_pb2.SessionEvent) -> bool:
        """Record where the watch stands now; return whether the event is one for its reader."""
        self.cursor = event.cursor
        self._begun = True
        self._refused_tokens = 0
        if event.type == HEARTBEAT:
            # A stream may end right after its first heartbeat, again and again, so that this resets no pause.
            return False
        self._pause = _SHORTEST_PAUSE
        return True

    def pause(self, failed: grpc.RpcError | None) -> float:
        """Return how many seconds to wait before the stream is opened again; raise an error that this cannot mend."""
        if failed:
            error = errors.AfterhoursError.of(failed)
            if not self._can_resume(error):
                raise error from failed
        if time.monotonic() - self._opened > _LONGEST_PAUSE:
            self._pause = _SHORTEST_PAUSE
        pause = self._pause
        self._pause = min(2 * pause, _LONGEST_PAUSE)
        return pause * random.uniform(0.5, 1)  # noqa: S311 - it spreads retries

    def _can_resume(self, error: errors.AfterhoursError) -> bool:
        if isinstance(error, errors.Unauthenticated):
            self._refused_tokens += 1
            return self._renewable and self._refused_tokens <= _MAX_REFUSED_TOKENS
        # Without a reason it was not the service that ended the stream, but a server that was stopped, or a proxy. One
        # that resets a stream that had begun makes it INTERNAL, or in older libraries UNKNOWN.
        broken = {grpc.StatusCode.CANCELLED, *(_RESET if self._begun else ())}
        busy = isinstance(error, errors.SlowConsumer | errors.Overloaded)
        return busy or error.code is grpc.StatusCode.UNAVAILABLE or (not error.reason and error.code in broken)
