"""grpc.health.v1.Health: whether the process lives, and whether our services serve."""

import asyncio
import collections.abc
import typing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from afterhours_grpc.rpc import auth, bounds

NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

# Watches of one connection: a client has one for each service, a proxy some more. They are open without credentials.
_MAX_WATCHES = 100

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Health `""` says that the process lives; the services' own names say whether they serve.

    A watcher is told the latest status whenever it can take one, and nobody waits for it: a client that never reads
    delays no change of health.
    """

    def __init__(self, services: collections.abc.Collection[str]) -> None:
        self._services = services
        self._statuses = {"": _Status.SERVING, **dict.fromkeys(services, _Status.NOT_SERVING)}
        self._changed = asyncio.Event()
        self._draining = False
        self._watches = bounds.Bound(_MAX_WATCHES)

    def serving(self, does: bool) -> None:
        """Set whether our services serve; from `drain` on they do not."""
        status = _Status.SERVING if does and not self._draining else _Status.NOT_SERVING
        statuses = {**self._statuses, **dict.fromkeys(self._services, status)}
        if statuses == self._statuses:
            return
        self._statuses = statuses
        # Watchers wait for an event of their own time, and look again after it.
        self._changed.set()
        self._changed = asyncio.Event()

    def drain(self) -> None:
        """Say NOT_SERVING for good."""
        self._draining = True
        self.serving(False)

    async def Check(  # noqa: N802 - the proto's name, as below
        self, request: health_pb2.HealthCheckRequest, context: auth.Context
    ) -> health_pb2.HealthCheckResponse:
        """Return a service's status; NOT_FOUND if there is no such service."""
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of this name")
        return _Status(status=self._statuses[request.service])

    async def List(self, _: object, __: auth.Context) -> typing.Any:  # noqa: N802
        """Return the status of every service, as a HealthListResponse."""
        statuses = {name: _Status(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined] # newer than its stubs

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: auth.Context
    ) -> None:
        """Send a service's status now and after each change; RESOURCE_EXHAUSTED past 100 watches of a connection."""
        peer = context.peer()
        if self._watches.reached(peer):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watches of this connection")
        with self._watches.counted(peer):
            await self._watch(request.service, context)

    async def _watch(self, service: str, context: auth.Context) -> typing.NoReturn:
        sent: int | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, _Status.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            else:
                await changed.wait()
