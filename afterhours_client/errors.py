"""What a failed call raises: a class for each reason that a server gives, by which a caller decides."""

import contextlib
import copyreg
import datetime
import typing

import grpc
from google.protobuf import message
from google.rpc import error_details_pb2, status_pb2

_DOMAIN = "afterhours.v1"
_DETAILS = "grpc-status-details-bin"


class AfterhoursError(Exception):
    """A call failed, for a reason that this client does not know, or for none that a server gave.

    `code` is gRPC's, `reason` the server's or empty, `metadata` what goes with it, `violations` the rules that fields
    broke, by field, and `retry_delay` how long to wait before a retry, if one is of use. The message is for people.
    """

    _by_reason: typing.ClassVar[dict[str, type["AfterhoursError"]]] = {}

    def __init_subclass__(cls, *, reason: str = "") -> None:
        """Register the class of a reason; one without is no server's."""
        if reason:
            AfterhoursError._by_reason[reason] = cls

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str = "",
        metadata: typing.Mapping[str, str] = {},
        violations: typing.Mapping[str, str] = {},
        retry_delay: datetime.timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata)
        self.violations = dict(violations)
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        """Give code, reason and message."""
        return f"{self.code.name} {self.reason}: {super().__str__()}".replace(" : ", ": ")

    def __reduce__(self) -> tuple[typing.Any, ...]:
        """Return how a copy is made, here or in another process: without `__init__`, which takes more than `args`."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined] # pickle's own

    @classmethod
    def of(cls, failed: grpc.RpcError) -> "AfterhoursError":
        """Make the error of a failed call."""
        call = typing.cast("grpc.Call", failed)
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        # A proxy, or another kind of server, may have sent something that is not a status.
        with contextlib.suppress(message.DecodeError):
            for detail in _details(call):
                for kind in (info, request, retry):
                    detail.Unpack(kind)
        reason = info.reason if info.domain == _DOMAIN else ""
        return cls._by_reason.get(reason, cls)(
            call.code(),
            call.details() or "",
            reason,
            info.metadata,
            {each.field: each.description for each in request.field_violations},
            retry.retry_delay.ToTimedelta() if retry.HasField("retry_delay") else None,
        )


def _details(call: grpc.Call) -> typing.Iterable[typing.Any]:
    """Return the details of a failed call. Raise DecodeError.

    `rpc_status.from_call` raises ValueError where the message beside them is not theirs, as it may be behind a proxy.
    """
    for name, value in call.trailing_metadata() or ():
        if name == _DETAILS:
            yield from status_pb2.Status.FromString(value).details


class ClientClosed(AfterhoursError):
    """The client was closed before the call was answered; a call with the same request_id tells what was applied."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.CANCELLED, "the client was closed")


class InvalidRequest(AfterhoursError, reason="INVALID_REQUEST"):
    """A field breaks a rule; `violations` has all of them."""


class RequestIdReused(AfterhoursError, reason="REQUEST_ID_REUSED"):
    """The request_id was applied with another body."""


class Unauthenticated(AfterhoursError, reason="UNAUTHENTICATED"):
    """No credentials, or none that the server accepts."""


class Forbidden(AfterhoursError, reason="FORBIDDEN"):
    """The credentials do not allow this call."""


class ProfileRequired(AfterhoursError, reason="PROFILE_REQUIRED"):
    """The user has no profile."""


class PremiumRequired(AfterhoursError, reason="PREMIUM_REQUIRED"):
    """The operator's gate for premium is closed."""


class VerificationRequired(AfterhoursError, reason="VERIFICATION_REQUIRED"):
    """The operator's gate for verified identities is closed."""


class ConsentRequired(AfterhoursError, reason="CONSENT_REQUIRED"):
    """The operator's gate for consent is closed."""


class SessionAlreadyActive(AfterhoursError, reason="SESSION_ALREADY_ACTIVE"):
    """The user has an active session; `metadata` has its `session_id` and `expire_time`."""


class NoActiveSession(AfterhoursError, reason="NO_ACTIVE_SESSION"):
    """The user has no active session."""


class ProfileNotFound(AfterhoursError, reason="PROFILE_NOT_FOUND"):
    """The user has no profile."""


class SessionNotFound(AfterhoursError, reason="SESSION_NOT_FOUND"):
    """No session has this id, or no longer."""


class LocationErased(AfterhoursError, reason="LOCATION_ERASED"):
    """The exact location was erased."""


class CursorExpired(AfterhoursError, reason="CURSOR_EXPIRED"):
    """Events after this cursor are no longer kept, or the database lost them: start again.

    Watch with an empty cursor, wait until the new watch has a cursor, list, and then apply events.
    """


class SlowConsumer(AfterhoursError, reason="SLOW_CONSUMER"):
    """A watch was read too slowly; `metadata` has its `cursor`."""


class RateLimited(AfterhoursError, reason="RATE_LIMITED"):
    """The user started and extended too often; wait for `retry_delay`."""


class Overloaded(AfterhoursError, reason="OVERLOADED"):
    """Too many calls wait; nothing was applied. Wait for `retry_delay`."""


class DeadlineExceeded(AfterhoursError, reason="DEADLINE_EXCEEDED"):
    """The deadline passed before the call was applied, and nothing was."""


class ShuttingDown(AfterhoursError, reason="SHUTTING_DOWN"):
    """The server is shutting down, and applied nothing."""


class StoreUnavailable(AfterhoursError, reason="STORE_UNAVAILABLE"):
    """The database does not answer; the same request_id tells what was applied."""


class Internal(AfterhoursError, reason="INTERNAL"):
    """A bug of the service; `metadata` has its `error_id`."""
