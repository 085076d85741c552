"""Between protobuf and the domain: parsing names every field that breaks its rules; rendering cannot fail."""

import collections.abc
import datetime
import hashlib
import re
import typing
import uuid

from afterhours.v1 import (
    profile_pb2,
    profile_service_pb2,
    session_pb2,
    session_service_pb2,
)
from google.protobuf import duration_pb2, timestamp_pb2

from afterhours_grpc.sessions import errors, location, session

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_LONGEST_USER_ID = 255
# 0001-01-01 and 9999-12-31T23:59:59, the range that google.protobuf.Timestamp promises.
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_FIRST_SECOND, _LAST_SECOND = -62135596800, 253402300799

_Mutation = (
    session_service_pb2.StartSessionRequest
    | session_service_pb2.EndSessionRequest
    | session_service_pb2.ExtendSessionRequest
)
_END_REASON: dict[session.EndReason | None, typing.Any] = {
    None: session_pb2.END_REASON_UNSPECIFIED,
    **{each: session_pb2.EndReason.Value(f"END_REASON_{each.value}") for each in session.EndReason},
}


class Durations:
    """The durations that the operator allows, for start and for extend."""

    def __init__(self, allowed: collections.abc.Sequence[datetime.timedelta]) -> None:
        self._allowed = {(each // datetime.timedelta(seconds=1), 0): each for each in allowed}
        self.rule = "must be one of " + ", ".join(f"{seconds}s" for seconds, _ in self._allowed)

    def find(self, duration: duration_pb2.Duration) -> datetime.timedelta | None:
        """Give an allowed duration, or None."""
        return self._allowed.get((duration.seconds, duration.nanos))


class _Form:
    """Collects the violations of one request."""

    def __init__(self) -> None:
        self._violations: list[errors.Violation] = []

    def must(self, holds: bool, field: str, rule: str) -> None:
        if not holds:
            self._violations.append(errors.Violation(field, rule))

    def check(self) -> None:
        if self._violations:
            raise errors.InvalidRequest(tuple(self._violations))

    def user_id(self, value: str, field: str = "user_id") -> session.UserId:
        self.must(
            0 < len(value) <= _LONGEST_USER_ID and "\0" not in value,
            field,
            "must have 1 to 255 code points, none of them U+0000",
        )
        return session.UserId(value)

    def duration(self, value: duration_pb2.Duration, field: str, allowed: Durations) -> datetime.timedelta:
        found = allowed.find(value)
        self.must(found is not None, field, allowed.rule)
        return found or datetime.timedelta()

    def exact(self, request: session_service_pb2.StartSessionRequest) -> location.ExactLocation:
        if not request.HasField("location"):
            self.must(False, "location", "is required")
            return location.ExactLocation(0.0, 0.0)
        latitude, longitude = request.location.latitude, request.location.longitude
        # NaN is in no range.
        if not -90 <= latitude <= 90:
            self.must(False, "location.latitude", "must be from -90 to 90 degrees")
            latitude = 0.0
        if not -180 <= longitude <= 180:
            self.must(False, "location.longitude", "must be from -180 to 180 degrees")
            longitude = 0.0
        return location.ExactLocation(latitude, longitude)

    def request(self, request: _Mutation, caller: str) -> session.Request | None:
        if not request.request_id:
            return None
        if not _UUID.fullmatch(request.request_id):
            self.must(False, "request_id", "must be a UUID such as 123e4567-e89b-12d3-a456-426614174000")
            return None
        body = type(request)()
        body.CopyFrom(request)  # type: ignore[arg-type]
        body.ClearField("request_id")
        fingerprint = hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
        return session.Request(caller, uuid.UUID(request.request_id), fingerprint)


def request_id(request: object) -> str | None:
    """Give the request_id of a request for the log, if it is one."""
    found = getattr(request, "request_id", "")
    return found if found and _UUID.fullmatch(found) else None


def start(
    request: session_service_pb2.StartSessionRequest, caller: str, deadline: session.Deadline, allowed: Durations
) -> session.Start:
    """Parse, or raise InvalidRequest."""
    form = _Form()
    parsed = session.Start(
        user_id=form.user_id(request.user_id),
        duration=form.duration(request.duration, "duration", allowed),
        exact=form.exact(request),
        request=form.request(request, caller),
        deadline=deadline,
    )
    form.check()
    return parsed


def end(request: session_service_pb2.EndSessionRequest, caller: str, deadline: session.Deadline) -> session.End:
    """Parse, or raise InvalidRequest."""
    form = _Form()
    parsed = session.End(form.user_id(request.user_id), form.request(request, caller), deadline)
    form.check()
    return parsed


def extend(
    request: session_service_pb2.ExtendSessionRequest, caller: str, deadline: session.Deadline, allowed: Durations
) -> session.Extend:
    """Parse, or raise InvalidRequest."""
    form = _Form()
    parsed = session.Extend(
        user_id=form.user_id(request.user_id),
        additional=form.duration(request.additional_duration, "additional_duration", allowed),
        request=form.request(request, caller),
        deadline=deadline,
    )
    form.check()
    return parsed


class _OfUser(typing.Protocol):
    user_id: str


def user_id(request: _OfUser) -> session.UserId:
    """Parse a request that has nothing but a user, or raise InvalidRequest."""
    form = _Form()
    parsed = form.user_id(request.user_id)
    form.check()
    return parsed


def put_profile(request: profile_service_pb2.PutProfileRequest) -> session.Profile:
    """Parse, or raise InvalidRequest."""
    form, profile = _Form(), request.profile
    if not request.HasField("profile"):
        form.must(False, "profile", "is required")
        form.check()
    premium = None
    if profile.HasField("premium_expire_time"):
        premium = _instant(profile.premium_expire_time)
        form.must(premium is not None, "profile.premium_expire_time", "must be a valid Timestamp")
    parsed = session.Profile(
        form.user_id(profile.user_id, "profile.user_id"),
        premium,
        profile.identity_verified,
        profile.location_consent,
    )
    form.check()
    return parsed


def _instant(value: timestamp_pb2.Timestamp) -> datetime.datetime | None:
    if not (_FIRST_SECOND <= value.seconds <= _LAST_SECOND and 0 <= value.nanos < 10**9):
        return None
    return value.ToDatetime(datetime.UTC)


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
        fuzzed_location=session_pb2.Location(latitude=value.fuzzed.latitude, longitude=value.fuzzed.longitude),
        fuzz_radius_meters=value.fuzz_radius_meters,
    )


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
