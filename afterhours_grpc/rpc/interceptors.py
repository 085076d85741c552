"""The boundary of every call of ours: errors become statuses once, a log line once, metrics once."""

from __future__ import annotations

import asyncio
import collections.abc
import time
import typing
import uuid

import grpc
import structlog
from google.protobuf import message
from grpc_status import rpc_status

from afterhours_grpc import logs
from afterhours_grpc.rpc import auth, journal, status, wire
from afterhours_grpc.sessions import errors, session

log = structlog.get_logger()

# Seconds that no call waits longer for Postgres, whatever its deadline.
LONGEST_WAIT = 5.0
# Seconds before a call's deadline from which on nothing is applied for it, so that it can still be told so.
_MARGIN = 0.02

_MethodHandler: typing.TypeAlias = "grpc.RpcMethodHandler[typing.Any, typing.Any]"
_Decode = collections.abc.Callable[[bytes], typing.Any]
_Behaviour = collections.abc.Callable[[typing.Any, auth.Context], collections.abc.Awaitable[typing.Any]]


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps the unary methods of the services named; health and reflection pass by.

    Requests are decoded in here, where bytes that are no message can be answered properly.
    """

    def __init__(self, services: collections.abc.Collection[str], authenticate: auth.Authenticator) -> None:
        self._prefixes = tuple(f"/{name}/" for name in services)
        self._authenticate = authenticate
        self._wrapped: dict[str, _MethodHandler] = {}
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._journal = journal.Journal()

    def drain(self) -> None:
        """Refuse calls from now on."""
        self._draining = True

    async def idle_for(self, pause: float) -> None:
        """Wait for `pause` seconds, in which those who come late are told, and until no call is in flight."""
        await asyncio.sleep(pause)
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: collections.abc.Callable[
            [grpc.HandlerCallDetails],
            collections.abc.Awaitable[_MethodHandler | None],
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _MethodHandler | None:
        """Give the method's handler, wrapped."""
        method = handler_call_details.method
        if method in self._wrapped:
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(self._prefixes):
            return handler
        wrapped: _MethodHandler = grpc.unary_unary_rpc_method_handler(
            self._wrap(
                method.rpartition("/")[2],
                typing.cast("_Behaviour", handler.unary_unary),
                typing.cast("_Decode", handler.request_deserializer),
            ),
            response_serializer=handler.response_serializer,
        )
        return self._wrapped.setdefault(method, wrapped)

    def _wrap(
        self,
        method: str,
        behaviour: _Behaviour,
        decode: _Decode,
    ) -> _Behaviour:
        async def call(raw: bytes, context: auth.Context) -> typing.Any:
            began = time.perf_counter()
            request: typing.Any = None
            caller: auth.Caller | None = None
            error: errors.SessionError | None = None
            code = grpc.StatusCode.OK
            self._in_flight += 1
            self._idle.clear()
            try:
                if self._draining:
                    raise errors.ShuttingDown  # noqa: TRY301 - told like every other refusal
                caller = await self._authenticate(context)
                auth.caller.set(caller)
                request = _decoded(raw, decode)
                auth.deadline.set(_deadline(context.time_remaining()))
                return await behaviour(request, context)
            except errors.SessionError as refusal:
                error, code = refusal, status.code(refusal)
            except asyncio.CancelledError:
                late = context.time_remaining() == 0
                code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
                raise
            except Exception as bug:  # noqa: BLE001 - whatever it is, no text of it goes to the caller
                error, code = _told(bug), grpc.StatusCode.INTERNAL
            finally:
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
                self._note(method, code, error, time.perf_counter() - began, caller, request)
            told = rpc_status.to_status(status.status(error))
            return await context.abort(told.code, told.details, told.trailing_metadata)

        return call

    def _note(
        self,
        method: str,
        code: grpc.StatusCode,
        error: errors.SessionError | None,
        seconds: float,
        caller: auth.Caller | None,
        request: typing.Any,
    ) -> None:
        reason = status.reason(error) if error else ""
        request_id = wire.request_id(request)
        self._journal.take(journal.Note(method, code.name, reason, seconds, caller.id if caller else None, request_id))


def _decoded(raw: bytes, decode: _Decode) -> typing.Any:
    try:
        return decode(raw)
    except message.DecodeError:
        raise errors.InvalidRequest from None


def _deadline(remaining: float | None) -> session.Deadline:
    """Give the call's deadline or LONGEST_WAIT, whichever comes first."""
    if remaining is None or remaining > LONGEST_WAIT:
        return session.Deadline(time.monotonic() + LONGEST_WAIT, of_caller=False)
    return session.Deadline(time.monotonic() + remaining - min(_MARGIN, remaining / 4), of_caller=True)


def _told(bug: Exception) -> errors.Bug:
    error = errors.Bug(uuid.uuid4().hex)
    log.error("bug", error_id=error.error_id, **logs.described(bug))
    return error
