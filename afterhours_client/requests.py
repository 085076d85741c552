"""What both clients share: the channel's options, the requests, and when a watch goes on."""

import collections.abc
import datetime
import json
import random
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
# Seconds before a watch is tried again: doubled each time that brought nothing.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


def options(further: collections.abc.Iterable[tuple[str, typing.Any]]) -> list[tuple[str, typing.Any]]:
    """Give the options of a channel; `further` ones win."""
    ours = {
        "grpc.service_config": json.dumps(_SERVICE_CONFIG),
        "grpc.enable_retries": 1,
        # A server that vanished is noticed within 40 s, while a call or a watch is under way.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
    }
    return list({**ours, **dict(further)}.items())


def metadata(token: Token | None) -> tuple[tuple[str, str], ...]:
    """Give the credentials of a call; a token that is a function is asked each time."""
    found = token() if callable(token) else token
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
    """Make a request; without a request_id it gets a new one, as in the others."""
    return session_service_pb2.StartSessionRequest(
        user_id=user_id,
        duration=_duration(duration),
        location=_location(place),
        request_id=request_id or str(uuid.uuid4()),
    )


def end(user_id: str, request_id: str | None) -> session_service_pb2.EndSessionRequest:
    """Make a request."""
    return session_service_pb2.EndSessionRequest(user_id=user_id, request_id=request_id or str(uuid.uuid4()))


def extend(
    user_id: str, additional: datetime.timedelta, request_id: str | None
) -> session_service_pb2.ExtendSessionRequest:
    """Make a request."""
    return session_service_pb2.ExtendSessionRequest(
        user_id=user_id,
        additional_duration=_duration(additional),
        request_id=request_id or str(uuid.uuid4()),
    )


def get(user_id: str) -> session_service_pb2.GetSessionRequest:
    """Make a request."""
    return session_service_pb2.GetSessionRequest(user_id=user_id)


def batch(
    user_ids: collections.abc.Iterable[str], min_remaining: datetime.timedelta | None
) -> session_service_pb2.BatchGetSessionsRequest:
    """Make a request."""
    return session_service_pb2.BatchGetSessionsRequest(user_ids=user_ids, min_remaining=_duration(min_remaining))


def history(user_id: str, page_size: int) -> session_service_pb2.ListSessionsRequest:
    """Make the request of the first page."""
    return session_service_pb2.ListSessionsRequest(user_id=user_id, page_size=page_size)


def active(
    near: Place | None, radius_meters: float, min_remaining: datetime.timedelta | None, page_size: int
) -> session_service_pb2.ListActiveSessionsRequest:
    """Make the request of the first page."""
    return session_service_pb2.ListActiveSessionsRequest(
        near=_location(near),
        radius_meters=radius_meters,
        min_remaining=_duration(min_remaining),
        page_size=page_size,
    )


def exact_location(session_id: str, purpose: str) -> session_service_pb2.GetExactLocationRequest:
    """Make a request."""
    return session_service_pb2.GetExactLocationRequest(session_id=session_id, purpose=purpose)


def put_profile(profile: profile_pb2.Profile) -> profile_service_pb2.PutProfileRequest:
    """Make a request."""
    return profile_service_pb2.PutProfileRequest(profile=profile)


def get_profile(user_id: str) -> profile_service_pb2.GetProfileRequest:
    """Make a request."""
    return profile_service_pb2.GetProfileRequest(user_id=user_id)


def delete_profile(user_id: str) -> profile_service_pb2.DeleteProfileRequest:
    """Make a request."""
    return profile_service_pb2.DeleteProfileRequest(user_id=user_id)


def session_of(response: message.Message) -> session_pb2.Session:
    """Give the session of an answer."""
    return typing.cast("session_service_pb2.StartSessionResponse", response).session


class Going:
    """Where a watch stands, and when it goes on."""

    def __init__(self, user_ids: collections.abc.Iterable[str], cursor: str, renewable: bool) -> None:
        self._user_ids = list(user_ids)
        self._renewable = renewable
        self._pause = _SHORTEST_PAUSE
        self.cursor = cursor

    def request(self) -> session_service_pb2.WatchSessionsRequest:
        """Give the request that goes on from here."""
        return session_service_pb2.WatchSessionsRequest(user_ids=self._user_ids, cursor=self.cursor)

    def came(self, event: session_event_pb2.SessionEvent) -> bool:
        """Note where the watch stands now; whether that is an event for its reader."""
        self.cursor = event.cursor
        self._pause = _SHORTEST_PAUSE
        return event.type != HEARTBEAT

    def after(self, failed: grpc.RpcError | None) -> float:
        """Give how many seconds to wait before going on, or raise the error that ends the watch."""
        if failed:
            error = errors.AfterhoursError.of(failed)
            again = error.code is grpc.StatusCode.UNAVAILABLE or isinstance(error, errors.SlowConsumer)
            # A token that is a function may give a new one: once at a time, for a new one brings a heartbeat.
            renewed = isinstance(error, errors.Unauthenticated) and self._renewable and self._pause < 1
            if not again and not renewed:
                raise error from failed
        pause = self._pause
        self._pause = min(2 * pause, _LONGEST_PAUSE)
        return pause * random.uniform(0.5, 1)  # noqa: S311 - it spreads retries
