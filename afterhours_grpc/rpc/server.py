"""The gRPC server: our services behind the boundary, health and reflection beside them."""

import asyncio
import time
import typing

import grpc
from afterhours.v1 import (
    profile_service_pb2,
    profile_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from afterhours_grpc.events import feed
from afterhours_grpc.rpc import auth, certificates, cursors, goaway, health, interceptors, servicers, wire
from afterhours_grpc.sessions import listing, service

NAMES = (
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
    profile_service_pb2.DESCRIPTOR.services_by_name["ProfileService"].full_name,
)
_KIB, _SECOND, _MINUTE = 1024, 1000, 60_000
_OPTIONS = (
    # The longest request that there is has a thousand user ids of 255 code points.
    ("grpc.max_receive_message_length", 2048 * _KIB),
    # Between the two limits calls would be refused by chance.
    ("grpc.max_metadata_size", 16 * _KIB),
    ("grpc.absolute_max_metadata_size", 16 * _KIB),
    # Of one connection; a client that never reads fills no more than these.
    ("grpc.max_concurrent_streams", 1024),
    # A client that vanished is noticed within 80 s. grpcio waits for the answer to a keepalive ping by the timeout of
    # all pings, a minute by default, and native by the one of keepalive.
    ("grpc.keepalive_time_ms", 60 * _SECOND),
    ("grpc.keepalive_timeout_ms", 20 * _SECOND),
    ("grpc.http2.ping_timeout_ms", 20 * _SECOND),
)
_OPTIONS_OF_GRPCIO = (
    # Of a burst beyond its first 1,000 calls the library would tell some CANCELLED, which nobody retries. What is too
    # much for us is told OVERLOADED, by the batchers.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # Connections move to other servers in time, streams within the grace; clients may ping every 10 s.
    ("grpc.max_connection_idle_ms", 15 * _MINUTE),
    ("grpc.max_connection_age_ms", 30 * _MINUTE),
    ("grpc.max_connection_age_grace_ms", 5 * _MINUTE),
    ("grpc.http2.min_ping_interval_without_data_ms", 10 * _SECOND),
    ("grpc.http2.max_ping_strikes", 2),
)
# Seconds between two rounds of GOAWAY in a drain: new connections get it, too.
_GOAWAY_INTERVAL = 0.05
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


def _transport(
    name: typing.Literal["grpcio", "native"], interceptor: grpc.aio.ServerInterceptor, *, shared: bool
) -> grpc.aio.Server:
    """Give a server on the transport of that name. Raise ModuleNotFoundError if its extra is not installed."""
    # A process has the port to itself unless it is one of several workers: with SO_REUSEPORT another one would
    # silently take half of the calls.
    options = (*_OPTIONS, ("grpc.so_reuseport", int(shared)))
    if name == "native":
        from afterhours_grpc.rpc import native  # noqa: PLC0415 - an extra of its own

        return native.Server(interceptors=[interceptor], options=options)
    return grpc.aio.server(interceptors=[interceptor], options=(*options, *_OPTIONS_OF_GRPCIO))


class Server:
    """A grpc.aio server.

    `transport` is what carries HTTP/2, in the clear unless there is `encryption`; `authenticate` gives each call's
    caller, and `shared` says that other processes listen on the same port.
    """

    def __init__(
        self,
        sessions: service.Sessions,
        profiles: service.Profiles,
        lists: listing.Listing,
        feed: feed.Feed[bytes],
        durations: wire.Durations,
        pages: cursors.Pages,
        authenticate: auth.Authenticator,
        *,
        encryption: certificates.Encryption | None,
        transport: typing.Literal["grpcio", "native"],
        with_reflection: bool,
        shared: bool,
    ) -> None:
        self._boundary = interceptors.Boundary(NAMES, authenticate)
        self._encryption = encryption
        self._feed = feed
        self._goaway: goaway.GoAway | None = None
        self._server = _transport(transport, self._boundary, shared=shared)
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(
            servicers.SessionServicer(sessions, lists, feed, durations, pages), self._server
        )
        profile_service_pb2_grpc.add_ProfileServiceServicer_to_server(servicers.ProfileServicer(profiles), self._server)
        self._health = health.Health(NAMES)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if with_reflection:
            self._reflect()

    def _reflect(self) -> None:
        # Tools look up every service that is listed, and some stop at one that they do not find.
        descriptor_pool.Default().AddSerializedFile(_reflection_v1())
        names = (*NAMES, health.NAME, reflection.SERVICE_NAME, _REFLECTION_V1)
        servicer = reflection.aio.ReflectionServicer(service_names=names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
            servicer, self._server
        )
        # v1 differs from v1alpha by the name alone, and grpcio-reflection has none of it.
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        methods = {"ServerReflectionInfo": handler}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_REFLECTION_V1, methods),))

    async def start(self, host: str, port: int) -> int:
        """Listen, and give the port. Nothing is SERVING yet. Raise OSError if the address is not to be had."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._encryption:
                bound = self._server.add_secure_port(address, self._encryption.credentials())
            else:
                bound = self._server.add_insecure_port(address)
        except RuntimeError:  # its text is a page of the library's own
            raise OSError(f"cannot listen on {address}") from None
        await self._server.start()
        # TLS knows no bytes beside its own.
        self._goaway = None if self._encryption else goaway.GoAway(bound)
        return bound

    def serving(self, does: bool) -> None:
        """Set whether the services' health is SERVING."""
        self._health.serving(does)

    async def drain(self, pause: float) -> None:
        """Say NOT_SERVING, refuse calls and end watches; return after `pause` seconds and once no call is in flight.

        Clients are told to go to other servers. Streams are not waited for: a client that does not read delays nothing.
        """
        self._health.drain()
        self._boundary.drain()
        self._feed.drain()
        going = asyncio.create_task(self._send_goaway())
        try:
            await self._boundary.idle_for(pause)
        finally:
            going.cancel()

    async def _send_goaway(self) -> None:
        """Send GOAWAY to every connection, new ones too, until cancelled."""
        while self._goaway:
            began = time.monotonic()
            self._goaway.send()
            # With thousands of connections a round takes long, and the calls in flight need the time.
            await asyncio.sleep(max(_GOAWAY_INTERVAL, 10 * (time.monotonic() - began)))

    async def stop(self) -> None:
        """Close the port, and cancel what still comes in. Idempotent."""
        await self._server.stop(None)


def _reflection_v1() -> bytes:
    """Return the file of reflection's v1, which is that of v1alpha by another name, as a serialized descriptor."""
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
    return text_format.Parse(text, descriptor_pb2.FileDescriptorProto()).SerializeToString()
