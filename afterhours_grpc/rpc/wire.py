"""Protobuf -> domain: every field that breaks its rules is named. What goes back is rendered by `rendering`."""

import collections.abc
import datetime
import hashlib
import re
import typing
import uuid

from afterhours.v1 import (
    profile_service_pb2,
    session_pb2,
    session_service_pb2,
)
from google.protobuf import duration_pb2, timestamp_pb2

from afterhours_grpc.rpc import auth
from afterhours_grpc.sessions import errors, location, session

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
# Code points of a user's id, and of a purpose.
_LONGEST_TEXT = 255
# 0001-01-01 and 9999-12-31T23:59:59, the range that google.protobuf.Timestamp promises.
_FIRST_SECOND, _LAST_SECOND = -62135596800, 253402300799

_Mutation = (
    session_service_pb2.StartSessionRequest
    | session_service_pb2.EndSessionRequest
    | session_service_pb2.ExtendSessionRequest
)


class Durations:
    """The durations that the operator allows, for start and for extend."""

    def __init__(self, allowed: collections.abc.Sequence[datetime.timedelta]) -> None:
        self._allowed = {(each // datetime.timedelta(seconds=1), 0): each for each in allowed}
        self.rule = "must be one of " + ", ".join(f"{seconds}s" for seconds, _ in self._allowed)

    def find(self, duration: duration_pb2.Duration) -> datetime.timedelta | None:
        """Give an allowed duration, or None."""
        return self._allowed.get((duration.seconds, duration.nanos))


class Form:
    """Collects the violations of one request."""

    def __init__(self) -> None:
        self._violations: list[errors.Violation] = []

    def must(self, holds: bool, field: str, rule: str) -> None:
        """Note that a field breaks a rule, unless it holds."""
        if not holds:
            self._violations.append(errors.Violation(field, rule))

    def check(self) -> None:
        """Raise InvalidRequest if any field breaks a rule."""
        if self._violations:
            raise errors.InvalidRequest(tuple(self._violations))

    def user_id(self, value: str, field: str = "user_id") -> session.UserId:
        """Parse a user's id."""
        return session.UserId(self.text(value, field))

    def text(self, value: str, field: str) -> str:
        """Parse a text of 1 to 255 code points."""
        self.must(
            0 < len(value) <= _LONGEST_TEXT and "\0" not in value,
            field,
            "must have 1 to 255 code points, none of them U+0000",
        )
        return value

    def duration(self, value: duration_pb2.Duration, field: str, allowed: Durations) -> datetime.timedelta:
        """Parse one of the allowed durations."""
        found = allowed.find(value)
        self.must(found is not None, field, allowed.rule)
        return found or datetime.timedelta()

    def place(self, value: session_pb2.Location | None, field: str) -> location.ExactLocation:
        """Parse a place."""
        if value is None:
            self.must(False, field, "is required")
            return location.ExactLocation(0.0, 0.0)
        latitude, longitude = value.latitude, value.longitude
        # NaN is in no range.
        if not -90 <= latitude <= 90:
            self.must(False, f"{field}.latitude", "must be from -90 to 90 degrees")
            latitude = 0.0
        if not -180 <= longitude <= 180:
            self.must(False, f"{field}.longitude", "must be from -180 to 180 degrees")
            longitude = 0.0
        return location.ExactLocation(latitude, longitude)

    def identifier(self, value: str, field: str) -> uuid.UUID | None:
        """Parse a UUID."""
        if _UUID.fullmatch(value):
            return uuid.UUID(value)
        self.must(False, field, "must be a UUID such as 123e4567-e89b-12d3-a456-426614174000")
        return None

    def request(self, request: _Mutation, caller: auth.Caller) -> session.Request | None:
        """Parse what makes a retry safe, if it is there."""
        if not request.request_id:
            return None
        id = self.identifier(request.request_id, "request_id")
        if id is None:
            return None
        body = type(request)()
        body.CopyFrom(request)  # type: ignore[arg-type]
        body.ClearField("request_id")
        fingerprint = hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
        return session.Request(caller.id, id, fingerprint)


def request_id(request: object) -> str | None:
    """Give the request_id of a request for the log, if it is one."""
    found = getattr(request, "request_id", "")
    return found if found and _UUID.fullmatch(found) else None


def start(
    request: session_service_pb2.StartSessionRequest,
    caller: auth.Caller,
    deadline: session.Deadline,
    allowed: Durations,
) -> session.Start:
    """Parse, or raise InvalidRequest."""
    form = Form()
    parsed = session.Start(
        user_id=form.user_id(caller.named(request.user_id)),
        duration=form.duration(request.duration, "duration", allowed),
        exact=form.place(request.location if request.HasField("location") else None, "location"),
        request=form.request(request, caller),
        deadline=deadline,
    )
    form.check()
    return parsed


def end(request: session_service_pb2.EndSessionRequest, caller: auth.Caller, deadline: session.Deadline) -> session.End:
    """Parse, or raise InvalidRequest."""
    form = Form()
    parsed = session.End(form.user_id(caller.named(request.user_id)), form.request(request, caller), deadline)
    form.check()
    return parsed


def extend(
    request: session_service_pb2.ExtendSessionRequest,
    caller: auth.Caller,
    deadline: session.Deadline,
    allowed: Durations,
) -> session.Extend:
    """Parse, or raise InvalidRequest."""
    form = Form()
    parsed = session.Extend(
        user_id=form.user_id(caller.named(request.user_id)),
        additional=form.duration(request.additional_duration, "additional_duration", allowed),
        request=form.request(request, caller),
        deadline=deadline,
    )
    form.check()
    return parsed


class _OfUser(typing.Protocol):
    user_id: str


def user_id(request: _OfUser, caller: auth.Caller) -> session.UserId:
    """Parse a request that has nothing but a user, or raise InvalidRequest."""
    form = Form()
    parsed = form.user_id(caller.named(request.user_id))
    form.check()
    return parsed


def delete_profile(request: profile_service_pb2.DeleteProfileRequest) -> session.UserId:
    """Parse, or raise InvalidRequest."""
    form = Form()
    parsed = form.user_id(request.user_id)
    form.check()
    return parsed


def exact_location(
    request: session_service_pb2.GetExactLocationRequest, caller: auth.Caller, deadline: session.Deadline
) -> session.ExactRead:
    """Parse, or raise InvalidRequest."""
    form = Form()
    id = form.identifier(request.session_id, "session_id") or uuid.UUID(int=0)
    parsed = session.ExactRead(session.SessionId(id), form.text(request.purpose, "purpose"), caller.id, deadline)
    form.check()
    return parsed


def put_profile(request: profile_service_pb2.PutProfileRequest) -> session.Profile:
    """Parse, or raise InvalidRequest."""
    form, profile = Form(), request.profile
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
