"""Domain -> protobuf. It cannot fail. What comes in is parsed by `wire`."""

import datetime
import typing

from afterhours.v1 import profile_pb2, session_event_pb2, session_pb2, session_service_pb2
from google.protobuf import duration_pb2, timestamp_pb2

from afterhours_grpc.events import feed
from afterhours_grpc.rpc import cursors
from afterhours_grpc.sessions import location, session

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END_REASON: dict[session.EndReason | None, typing.Any] = {
    None: session_pb2.END_REASON_UNSPECIFIED,
    **{each: session_pb2.EndReason.Value(f"END_REASON_{each.value}") for each in session.EndReason},
}
_EVENT_TYPE: dict[str, typing.Any] = {
    name.removeprefix("SESSION_EVENT_TYPE_"): value for name, value in session_event_pb2.SessionEventType.items()
}


def session_message(value: session.Session) -> session_pb2.Session:
    """Render a session."""
    return session_pb2.Session(
        id=str(value.id),
        user_id=value.user_id,
        state=session_pb2.SESSION_STATE_ACTIVE if value.active else session_pb2.SESSION_STATE_ENDED,
        start_time=_timestamp(value.started_at),
        expire_time=_timestamp(value.expires_at),
        end_time=value.ended_at and _timestamp(value.ended_at),
        end_reason=_END_REASON[value.end_reason],
        remaining=_duration(value.remaining),
        fuzzed_location=location_message(value.fuzzed) if value.fuzzed else None,
        fuzz_radius_meters=value.fuzz_radius_meters,
    )


def location_message(value: location.ExactLocation | location.FuzzedLocation) -> session_pb2.Location:
    """Render a place."""
    return session_pb2.Location(latitude=value.latitude, longitude=value.longitude)


# protobuf's own conversions cost a third of the rendering of a session.
def _timestamp(at: datetime.datetime) -> timestamp_pb2.Timestamp:
    since = at - _EPOCH
    return timestamp_pb2.Timestamp(seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000)


def _duration(length: datetime.timedelta) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=length.days * 86400 + length.seconds, nanos=length.microseconds * 1000)


def profile_message(value: session.Profile) -> profile_pb2.Profile:
    """Render a profile."""
    return profile_pb2.Profile(
        user_id=value.user_id,
        premium_expire_time=value.premium_expires_at,
        identity_verified=value.identity_verified,
        location_consent=value.location_consent,
    )


def event_bytes(event: feed.Event) -> bytes:
    """Render an event as the message of a watch, in bytes: once for all who watch."""
    return _watch_bytes(
        session_event_pb2.SessionEvent(
            cursor=cursors.encode(event.position),
            # A type that only a newer release knows is unspecified.
            type=_EVENT_TYPE.get(event.type, session_event_pb2.SESSION_EVENT_TYPE_UNSPECIFIED),
            event_time=_timestamp(event.happened_at),
            session=session_message(event.session),
        )
    )


def heartbeat_bytes(position: session.Position) -> bytes:
    """Render a heartbeat in the same way."""
    return _watch_bytes(
        session_event_pb2.SessionEvent(
            cursor=cursors.encode(position),
            type=session_event_pb2.SESSION_EVENT_TYPE_HEARTBEAT,
            event_time=_timestamp(datetime.datetime.now(datetime.UTC)),
        )
    )


def _watch_bytes(event: session_event_pb2.SessionEvent) -> bytes:
    return session_service_pb2.WatchSessionsResponse(event=event).SerializeToString()
