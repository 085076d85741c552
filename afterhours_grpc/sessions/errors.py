"""Everything that a call can be refused for. The docstring is the message: what happened, and what to do about it."""

import dataclasses
import datetime

from afterhours_grpc.sessions import session

# Violations that one answer reports: a client library drops an answer whose status is too large.
_MOST_VIOLATIONS = 20


class SessionError(Exception):
    """A call was refused."""

    def __str__(self) -> str:
        """Give the class's docstring, on one line."""
        return " ".join((type(self).__doc__ or "").split())


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """A field, by its path in the request, and the rule that it breaks. Never the value of a coordinate."""

    field: str
    description: str


class InvalidRequest(SessionError):
    """The request is invalid. `violations` are the first 20 of those found, and `omitted` counts the others."""

    def __init__(self, violations: tuple[Violation, ...] = ()) -> None:
        super().__init__()
        self.violations = violations[:_MOST_VIOLATIONS]
        self.omitted = len(violations) - len(self.violations)

    def __str__(self) -> str:
        """Return a message that names the violations, or says that the bytes are no message."""
        if not self.violations:
            return "The request cannot be decoded: send the message that the proto defines for this method."
        named = "; ".join(f"{each.field}: {each.description}" for each in self.violations)
        more = f"; and {self.omitted} more" if self.omitted else ""
        return f"The request is invalid: {named}{more}."


class Unauthenticated(SessionError):
    """The credentials are missing or not accepted."""

    def __init__(self, advice: str) -> None:
        super().__init__()
        self.advice = advice

    def __str__(self) -> str:
        """Say what to send instead."""
        return f"{super().__str__()} {self.advice}"


class Forbidden(SessionError):
    """These credentials do not allow this call: it is for another user, or needs a scope that they lack."""


class RequestIdReused(SessionError):
    """This request_id was applied with another body; take a new UUID for each call that is not a retry."""


class ProfileRequired(SessionError):
    """The user has no profile; put one by ProfileService.PutProfile, then start the session again."""

    def __init__(self, user_id: session.UserId) -> None:
        super().__init__()
        self.user_id = user_id


class PremiumRequired(SessionError):
    """The user's premium time is over or never was; put a later premium_expire_time by ProfileService.PutProfile."""


class VerificationRequired(SessionError):
    """The user's identity is not verified; put identity_verified by ProfileService.PutProfile once it is."""


class ConsentRequired(SessionError):
    """The user does not consent to be located; put location_consent by ProfileService.PutProfile once they do."""


class RateLimited(SessionError):
    """The user started and extended too often within a minute, and nothing was applied. Retry after the delay."""

    def __init__(self, retry_after: datetime.timedelta) -> None:
        super().__init__()
        self.retry_after = retry_after


class SessionAlreadyActive(SessionError):
    """The user has an active session; extend it, or end it before starting another."""

    def __init__(self, session_id: session.SessionId, expires_at: datetime.datetime) -> None:
        super().__init__()
        self.session_id = session_id
        self.expires_at = expires_at


class NoActiveSession(SessionError):
    """The user has no active session: it ended, it expired, or there never was one; start a new one."""


class ProfileNotFound(SessionError):
    """There is no profile of this user; put one by ProfileService.PutProfile."""


class SessionNotFound(SessionError):
    """There is no session of this id: it never was, or it was removed after its retention."""


class LocationErased(SessionError):
    """The exact location of this session was erased after its retention; only the fuzzed one is left."""


class CursorExpired(SessionError):
    """Events after this cursor are no longer kept, or were lost; watch from now on, with an empty cursor, and list."""


class SlowConsumer(SessionError):
    """The stream was read more slowly than events came; watch again from the cursor in the metadata, reading faster."""

    def __init__(self, position: session.Position) -> None:
        super().__init__()
        self.position = position


class Overloaded(SessionError):
    """Too many calls are waiting, in all or for this user, and nothing was applied. Retry after the delay."""


class DeadlineExceeded(SessionError):
    """The deadline passed before the call was applied, and nothing was; retry with a later deadline."""


class ShuttingDown(SessionError):
    """This server is shutting down and applied nothing; retry, another server answers."""


class StoreUnavailable(SessionError):
    """The database does not answer; retry with the same request_id, which tells what was applied."""


class Bug(SessionError):
    """The service has a bug; report the error_id, which its log explains. A retry with the same request_id is safe."""

    def __init__(self, error_id: str) -> None:
        super().__init__()
        self.error_id = error_id
