"""The boundary of every call of ours: errors become statuses once, a log line once, metrics once."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import time
import typing
import uuid

import grpc
import structlog
from google.protobuf import message

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
_Streaming = collections.abc.Callable[[typing.Any, auth.Context], collections.abc.AsyncGenerator[bytes, None]]


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps the methods of the services named; health and reflection pass by.

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
        """Wait for `pause` seconds, in which late calls are refused, and until no unary call is in flight."""
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
        name, decode = method.rpartition("/")[2], typing.cast("_Decode", handler.request_deserializer)
        wrapped: _MethodHandler
        if handler.response_streaming:
            # It gives bytes: what many watch is rendered once.
            stream = self._stream(name, typing.cast("_Streaming", handler.unary_stream), decode)
            wrapped = grpc.unary_stream_rpc_method_handler(stream)
        else:
            call = self._call(name, typing.cast("_Behaviour", handler.unary_unary), decode)
            wrapped = grpc.unary_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)
        return self._wrapped.setdefault(method, wrapped)

    def _call(self, method: str, behaviour: _Behaviour, decode: _Decode) -> _Behaviour:
        async def call(raw: bytes, context: auth.Context) -> typing.Any:
            async with _Call(self, method, context) as noted:
                request = await self._admit(raw, decode, context, noted)
                return await behaviour(request, context)

        return call

    def _stream(self, method: str, behaviour: _Streaming, decode: _Decode) -> _Streaming:
        async def stream(raw: bytes, context: auth.Context) -> collections.abc.AsyncGenerator[bytes, None]:
            async with _Call(self, method, context, waited_for=False) as noted:
                request = await self._admit(raw, decode, context, noted)
                async with contextlib.aclosing(behaviour(request, context)) as messages:
                    async for message in messages:
                        yield message

        return stream

    async def _admit(self, raw: bytes, decode: _Decode, context: auth.Context, noted: _Call) -> typing.Any:
        """Check what is checked of every call, and give its request."""
        if self._draining:
            raise errors.ShuttingDown
        noted.caller = await self._authenticate(context)
        auth.caller.set(noted.caller)
        noted.request = _decoded(raw, decode)
        auth.deadline.set(_deadline(context.time_remaining()))
        return noted.request

    def enter(self) -> None:
        """Count a call that a drain waits for."""
        self._in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count it no longer."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def note(self, note: journal.Note) -> None:
        """Note a call for the log."""
        self._journal.take(note)


class _Call:
    """A call in flight: what it raises becomes a status, and what it was is noted, as far as it got.

    A drain waits for it unless it is a stream, which a client that does not read keeps open.
    """

    __slots__ = ("_began", "_boundary", "_context", "_method", "_waited_for", "caller", "request")

    def __init__(self, boundary: Boundary, method: str, context: auth.Context, *, waited_for: bool = True) -> None:
        self._boundary = boundary
        self._method = method
        self._context = context
        self._waited_for = waited_for
        self._began = time.perf_counter()
        self.caller: auth.Caller | None = None
        self.request: typing.Any = None

    async def __aenter__(self) -> typing.Self:
        if self._waited_for:
            self._boundary.enter()
        return self

    async def __aexit__(self, _: object, raised: BaseException | None, __: object) -> None:
        error: errors.SessionError | None = None
        code = grpc.StatusCode.OK
        if isinstance(raised, errors.SessionError):
            error, code = raised, status.code(raised)
        elif isinstance(raised, asyncio.CancelledError | GeneratorExit):
            late = self._context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        elif isinstance(raised, Exception):  # whatever it is, no text of it goes to the caller
            error, code = _told(raised), grpc.StatusCode.INTERNAL
        reason = status.reason(error) if error else ""
        caller, request_id = self.caller.id if self.caller else None, wire.request_id(self.request)
        seconds = time.perf_counter() - self._began
        if self._waited_for:
            self._boundary.leave()
        self._boundary.note(journal.Note(self._method, code.name, reason, seconds, caller, request_id))
        if error:
            told = status.sent(error)
            await self._context.abort(told.code, told.details, told.trailing_metadata)


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
