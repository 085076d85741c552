"""What a session and a profile are: frozen values and the rules that need no I/O."""

import dataclasses
import datetime
import enum
import typing
import uuid

from afterhours_grpc.sessions import location

# Every expires_at is before this, also by a CHECK. It leaves a year to the end of what datetime and
# google.protobuf.Timestamp can hold, so that whatever is computed from an expires_at still can be represented.
EXPIRY_LIMIT = datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC)

UserId = typing.NewType("UserId", str)
SessionId = typing.NewType("SessionId", uuid.UUID)


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """The position of an event among all of them; `number` is 0 before the first.

    `placed_at` is when the event there got it: where a history was lost, numbers are used again, but at other times.
    """

    number: int
    placed_at: datetime.datetime


BEGINNING = Position(0, datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC))


class EndReason(enum.StrEnum):
    """Why a session ended, as it is stored."""

    USER = "USER"
    EXPIRED = "EXPIRED"
    PROFILE_REMOVED = "PROFILE_REMOVED"
    INELIGIBLE = "INELIGIBLE"
    ADMIN = "ADMIN"


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A session as it was at one instant of the database's clock. The exact location is no part of it.

    The state is derived from the dates: a row that is overdue and that nothing has swept yet has ended, at
    `expires_at` and as EXPIRED.
    """

    id: SessionId
    user_id: UserId
    started_at: datetime.datetime
    expires_at: datetime.datetime
    ended_at: datetime.datetime | None
    end_reason: EndReason | None
    # None once its user was erased, in what is kept of it for those who watch.
    fuzzed: location.FuzzedLocation | None
    fuzz_radius_meters: float
    as_of: datetime.datetime
    # When its user is to be warned of the end, if at all; known from its transitions alone.
    warn_at: datetime.datetime | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a time without its zone."""
        if None in (self.started_at.tzinfo, self.expires_at.tzinfo, self.as_of.tzinfo):
            raise ValueError("a session's times carry their zone")
        if self.ended_at is None and self.expires_at <= self.as_of:
            object.__setattr__(self, "ended_at", self.expires_at)
            object.__setattr__(self, "end_reason", EndReason.EXPIRED)

    @property
    def active(self) -> bool:
        """Whether its user is discoverable."""
        return self.ended_at is None

    @property
    def remaining(self) -> datetime.timedelta:
        """How long it still runs; zero once ended."""
        return self.expires_at - self.as_of if self.active else datetime.timedelta()


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """What the service knows of a user."""

    user_id: UserId
    premium_expires_at: datetime.datetime | None = None
    identity_verified: bool = False
    location_consent: bool = False


class Method(enum.StrEnum):
    """The calls whose answers are kept for their `request_id`, as they are stored."""

    START = "StartSession"
    END = "EndSession"
    EXTEND = "ExtendSession"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """The identity of a call that may be retried: the same caller, method and id is the same call.

    `fingerprint` is the SHA-256 of the body; the same identity with another one is a mistake of the caller.
    """

    caller: str
    id: uuid.UUID
    fingerprint: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Deadline:
    """When nothing may be applied any more for a call, in seconds of time.monotonic().

    `of_caller`: the caller set it, and knows by itself when it passes. Otherwise it is the service's own limit.
    """

    at: float
    of_caller: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Open a session for `duration`."""

    user_id: UserId
    duration: datetime.timedelta
    exact: location.ExactLocation
    request: Request | None
    deadline: Deadline


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """End the user's active session."""

    user_id: UserId
    request: Request | None
    deadline: Deadline


@dataclasses.dataclass(frozen=True, slots=True)
class Extend:
    """Move the end of the user's active session by `additional`."""

    user_id: UserId
    additional: datetime.timedelta
    request: Request | None
    deadline: Deadline


@dataclasses.dataclass(frozen=True, slots=True)
class ExactRead:
    """Read an exact location. Who did, and for what, is recorded with it."""

    id: SessionId
    purpose: str
    caller: str
    deadline: Deadline


class Gate(enum.StrEnum):
    """What the operator may ask of a profile for a start and an extension, in the order in which it is told."""

    PREMIUM = "premium"
    VERIFIED = "verified"
    CONSENT = "consent"
