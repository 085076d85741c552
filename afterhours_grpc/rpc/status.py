"""One table: a domain error -> its gRPC code and reason; and the details that go with some."""

import datetime
import typing

import grpc
from afterhours.v1 import error_reason_pb2
from google.protobuf import any_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from afterhours_grpc.rpc import cursors
from afterhours_grpc.sessions import errors

DOMAIN = "afterhours.v1"

# Bytes of a status as it is sent. Client libraries drop what is larger than 8 KiB, some at random, and then report
# RESOURCE_EXHAUSTED without any detail; what is left to that is for the other trailers.
_LARGEST = 7 * 1024
# Characters of a message, which is sent twice, of a violation's description, and of the message that always fits.
_LONGEST_MESSAGE, _LONGEST_DESCRIPTION, _SHORT_MESSAGE = 2000, 500, 250

_R = error_reason_pb2
_TABLE: dict[type[Exception], tuple[grpc.StatusCode, _R.ErrorReason]] = {
    errors.InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, _R.ERROR_REASON_INVALID_REQUEST),
    errors.Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, _R.ERROR_REASON_UNAUTHENTICATED),
    errors.Forbidden: (grpc.StatusCode.PERMISSION_DENIED, _R.ERROR_REASON_FORBIDDEN),
    errors.RequestIdReused: (grpc.StatusCode.INVALID_ARGUMENT, _R.ERROR_REASON_REQUEST_ID_REUSED),
    errors.ProfileRequired: (grpc.StatusCode.FAILED_PRECONDITION, _R.ERROR_REASON_PROFILE_REQUIRED),
    errors.PremiumRequired: (grpc.StatusCode.PERMISSION_DENIED, _R.ERROR_REASON_PREMIUM_REQUIRED),
    errors.VerificationRequired: (grpc.StatusCode.PERMISSION_DENIED, _R.ERROR_REASON_VERIFICATION_REQUIRED),
    errors.ConsentRequired: (grpc.StatusCode.PERMISSION_DENIED, _R.ERROR_REASON_CONSENT_REQUIRED),
    errors.RateLimited: (grpc.StatusCode.RESOURCE_EXHAUSTED, _R.ERROR_REASON_RATE_LIMITED),
    errors.SessionAlreadyActive: (grpc.StatusCode.ALREADY_EXISTS, _R.ERROR_REASON_SESSION_ALREADY_ACTIVE),
    errors.NoActiveSession: (grpc.StatusCode.NOT_FOUND, _R.ERROR_REASON_NO_ACTIVE_SESSION),
    errors.ProfileNotFound: (grpc.StatusCode.NOT_FOUND, _R.ERROR_REASON_PROFILE_NOT_FOUND),
    errors.SessionNotFound: (grpc.StatusCode.NOT_FOUND, _R.ERROR_REASON_SESSION_NOT_FOUND),
    errors.LocationErased: (grpc.StatusCode.FAILED_PRECONDITION, _R.ERROR_REASON_LOCATION_ERASED),
    errors.CursorExpired: (grpc.StatusCode.OUT_OF_RANGE, _R.ERROR_REASON_CURSOR_EXPIRED),
    errors.SlowConsumer: (grpc.StatusCode.RESOURCE_EXHAUSTED, _R.ERROR_REASON_SLOW_CONSUMER),
    errors.Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, _R.ERROR_REASON_OVERLOADED),
    errors.DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, _R.ERROR_REASON_DEADLINE_EXCEEDED),
    errors.ShuttingDown: (grpc.StatusCode.UNAVAILABLE, _R.ERROR_REASON_SHUTTING_DOWN),
    errors.StoreUnavailable: (grpc.StatusCode.UNAVAILABLE, _R.ERROR_REASON_STORE_UNAVAILABLE),
    errors.Bug: (grpc.StatusCode.INTERNAL, _R.ERROR_REASON_INTERNAL),
}
_RETRY_DELAY = {
    errors.Overloaded: datetime.timedelta(seconds=0.5),
    errors.ShuttingDown: datetime.timedelta(seconds=0.5),
    errors.StoreUnavailable: datetime.timedelta(seconds=1),
}


def code(error: errors.SessionError) -> grpc.StatusCode:
    """Give the gRPC code of an error."""
    return _TABLE[type(error)][0]


def reason(error: errors.SessionError) -> str:
    """Give the name of an error's reason, without its prefix."""
    return error_reason_pb2.ErrorReason.Name(_TABLE[type(error)][1]).removeprefix("ERROR_REASON_")


def sent(error: errors.SessionError) -> typing.Any:
    """Return an error's code, message and trailing metadata, as `grpc.Status` has them."""
    return _CONSTANT.get(type(error)) or rpc_status.to_status(status(error))


def status(error: errors.SessionError) -> status_pb2.Status:
    """Return an error's code, its message, and the details of AIP-193, in less than 8 KiB as they are sent."""
    info = error_details_pb2.ErrorInfo(reason=reason(error), domain=DOMAIN, metadata=_metadata(error))
    rendered = status_pb2.Status(
        code=code_pb2.Code.Value(code(error).name),
        message=_clipped(str(error), _LONGEST_MESSAGE),
        details=[_packed(detail) for detail in (info, *_further(error))],
    )
    if _bytes_sent(rendered) > _LARGEST:
        # The reason is what callers decide by: everything else gives way to it.
        rendered.message = _clipped(rendered.message, _SHORT_MESSAGE)
        del rendered.details[1:]
    return rendered


def _bytes_sent(rendered: status_pb2.Status) -> int:
    """Return how many bytes a status takes: its details and message in base64, and its message percent-encoded."""
    text = rendered.message
    escaped = len(text) + 2 * text.count("%") if text.isascii() and text.isprintable() else 3 * len(text.encode())
    serialized: int = rendered.ByteSize()
    return escaped + -(-serialized // 3) * 4


def _clipped(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _metadata(error: errors.SessionError) -> dict[str, str]:
    match error:
        case errors.SessionAlreadyActive():
            return {"session_id": str(error.session_id), "expire_time": _rfc3339(error.expires_at)}
        case errors.SlowConsumer():
            return {"cursor": cursors.encode(error.position)}
        case errors.Bug():
            return {"error_id": error.error_id}
    return {}


def _further(error: errors.SessionError) -> list[message.Message]:
    if type(error) in _RETRY_DELAY:
        return [error_details_pb2.RetryInfo(retry_delay=_RETRY_DELAY[type(error)])]
    match error:
        case errors.RateLimited():
            return [error_details_pb2.RetryInfo(retry_delay=error.retry_after)]
        case errors.InvalidRequest():
            violations = [
                error_details_pb2.BadRequest.FieldViolation(
                    field=each.field, description=_clipped(each.description, _LONGEST_DESCRIPTION)
                )
                for each in error.violations
            ]
            return [error_details_pb2.BadRequest(field_violations=violations)]
        case errors.ProfileRequired():
            violation = error_details_pb2.PreconditionFailure.Violation(
                type="PROFILE", subject=error.user_id, description=str(error)
            )
            return [error_details_pb2.PreconditionFailure(violations=[violation])]
    return []


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _rfc3339(at: datetime.datetime) -> str:
    return at.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")


# What says the same each time is rendered once: under a flood, a refusal must cost less than an answer.
_CONSTANT: dict[type[Exception], typing.Any] = {
    kind: rpc_status.to_status(status(kind()))
    for kind in (
        errors.Forbidden,
        errors.NoActiveSession,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.ShuttingDown,
        errors.StoreUnavailable,
    )
}
