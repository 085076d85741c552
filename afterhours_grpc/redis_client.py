"""Clients of Redis, as every part of the service uses them.

They differ from redis-py's own in two points. A name is resolved outside the event loop's executor and within the
connection's timeout, however long the name server is silent. And connections to a server that failed,
or that is no longer a primary, are closed: by now the name may stand for another server.
"""

import asyncio
import concurrent.futures
import ipaddress
import socket
import threading
import time
import typing
import urllib.parse

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.exceptions
import redis.maint_notifications
import redis.retry

from afterhours_grpc import redis_url, threads

# Members of our keys that somebody else wrote may be no text. They can be removed only by the same bytes.
_ENCODING_ERRORS = "surrogateescape"
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")
# Replies of a server that cannot be written to, and that another one may have replaced: a replica, one that is loading
# its data, one that lost its replicas, its cluster or its disk.
_UNUSABLE = frozenset({"READONLY", "MASTERDOWN", "LOADING", "CLUSTERDOWN", "NOREPLICAS", "MISCONF", "UNBLOCKED"})


class Server:
    """The Redis at a URL, for the clients that share what is known of it. Raise ValueError for a bad URL."""

    def __init__(self, url: str) -> None:
        self._scheme = urllib.parse.urlsplit(url).scheme
        self._options = redis_url.parse(url)
        self._resolving: dict[tuple[str, int], concurrent.futures.Future[list[str]]] = {}
        self._lock = threading.Lock()
        self._left_at = float("-inf")

    def client(self, *, connections: int, timeout: float) -> redis.asyncio.Redis:
        """Return a client for the event loop; connecting, writing and reading take at most `timeout` seconds each."""
        return redis.asyncio.Redis.from_pool(self.pool(connections=connections, timeout=timeout))

    def pool(self, *, connections: int, timeout: float) -> redis.asyncio.ConnectionPool:
        """Return a pool of connections for such a client. When all are in use, the wait for one is as long, too."""
        connection: type[redis.asyncio.Connection | redis.asyncio.UnixDomainSocketConnection] = (
            _AsyncUnix if self._scheme == "unix" else _AsyncTLS if self._scheme == "rediss" else _AsyncTCP
        )
        options = {
            "connection_class": connection,
            "retry": redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0),
            "max_connections": connections,
            "timeout": timeout,
        }
        return redis.asyncio.BlockingConnectionPool(**(options | self._common(timeout)))

    def blocking_client(self, *, timeout: float) -> redis.Redis:
        """Return a client for a thread; connecting, writing and reading take at most `timeout` seconds each."""
        connection: type[redis.Connection | redis.UnixDomainSocketConnection] = (
            _Unix if self._scheme == "unix" else _TLS if self._scheme == "rediss" else _TCP
        )
        options = {
            "connection_class": connection,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        }
        return redis.Redis.from_pool(redis.ConnectionPool(**(options | self._common(timeout))))

    def _common(self, timeout: float) -> dict[str, typing.Any]:
        return {
            **self._options,
            "server": self,
            "decode_responses": True,
            "encoding_errors": _ENCODING_ERRORS,
            # The URL may set shorter timeouts. With longer ones a Redis that stalls would hold up the sweep.
            **{name: min(timeout, self._options.get(name, timeout)) for name in _TIMEOUTS},
            # Neither needed nor always allowed; each would cost a new connection a round trip.
            "driver_info": None,
            "maint_notifications_config": redis.maint_notifications.MaintNotificationsConfig(enabled=False),
        }

    def resolve(self, host: str, port: int) -> concurrent.futures.Future[list[str]]:
        """Return the future of a host's addresses. At any time one thread resolves it, for all clients."""
        with self._lock:
            resolving = self._resolving.get((host, port))
            if resolving is None or resolving.done():
                resolving = threads.run(lambda: _addresses(host, port))
                self._resolving[host, port] = resolving
        return resolving

    def note(self, error: redis.RedisError) -> None:
        """Replace all connections if the error means that the server failed or takes no writes."""
        code = error.status_code or str(error).partition(" ")[0]
        lost = isinstance(error, redis.ConnectionError | redis.TimeoutError)
        # Redis 6 has the code of what failed in a script in the middle of its text.
        if lost or code in _UNUSABLE or "-READONLY " in str(error):
            self._left_at = time.monotonic()

    def left_since(self, connected_at: float) -> bool:
        """Whether connections were to be replaced since one was made."""
        return connected_at <= self._left_at


def _addresses(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError("not a host name") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _AsyncRenewable(redis.asyncio.connection.AbstractConnection):
    """A connection that is replaced before its next use if `Server.note` says so."""

    def __init__(self, *, server: Server, **options: typing.Any) -> None:
        super().__init__(**options)
        self._server = server
        # None until the handshake is over: a server that takes no more connections is still good for the others.
        self._connected_at: float | None = None

    async def connect(self) -> None:
        if self._connected_at is not None and self._server.left_since(self._connected_at):
            await self.disconnect(nowait=True)
        await super().connect()
        if self._connected_at is None:
            self._connected_at = time.monotonic()

    async def _connect(self) -> None:
        self._connected_at = None
        await super()._connect()  # type: ignore[safe-super] # of the class that this is mixed into

    async def read_response(self, *arguments: typing.Any, **options: typing.Any) -> typing.Any:
        try:
            return await super().read_response(*arguments, **options)
        except redis.RedisError as error:
            if self._connected_at is not None:
                self._server.note(error)
            raise


class _AsyncTCP(_AsyncRenewable, redis.asyncio.Connection):
    async def _connect(self) -> None:
        self._addresses = [self.host]
        if not _is_address(self.host):
            async with asyncio.timeout(self.socket_connect_timeout):
                self._addresses = await asyncio.wrap_future(self._server.resolve(self.host, self.port))
        while True:
            try:
                return await super()._connect()
            except OSError:
                if len(self._addresses) == 1:
                    raise
                self._addresses = self._addresses[1:]

    def _connection_arguments(self) -> dict[str, typing.Any]:
        return {**super()._connection_arguments(), "host": self._addresses[0]}


class _AsyncTLS(_AsyncTCP, redis.asyncio.SSLConnection):
    def _connection_arguments(self) -> dict[str, typing.Any]:
        # The name, for which the server has a certificate.
        return {**super()._connection_arguments(), "server_hostname": self.host}


class _AsyncUnix(_AsyncRenewable, redis.asyncio.UnixDomainSocketConnection):
    pass


class _Renewable(redis.connection.AbstractConnection):
    """The same for a thread."""

    def __init__(self, *, server: Server, **options: typing.Any) -> None:
        super().__init__(**options)
        self._server = server
        # None until the handshake is over: a server that takes no more connections is still good for the others.
        self._connected_at: float | None = None

    def connect(self) -> None:
        if self._connected_at is not None and self._server.left_since(self._connected_at):
            self.disconnect()
        super().connect()
        if self._connected_at is None:
            self._connected_at = time.monotonic()

    def _connect(self) -> typing.Any:
        self._connected_at = None
        return super()._connect()  # type: ignore[safe-super] # of the class that this is mixed into

    def read_response(self, *arguments: typing.Any, **options: typing.Any) -> typing.Any:
        try:
            return super().read_response(*arguments, **options)
        except redis.RedisError as error:
            if self._connected_at is not None:
                self._server.note(error)
            raise


class _TCP(_Renewable, redis.Connection):
    def _connect(self) -> socket.socket:
        self._connected_at = None
        addresses = [self.host]
        if not _is_address(self.host):
            addresses = self._server.resolve(self.host, self.port).result(self.socket_connect_timeout)
        failure = OSError("the host has no address")
        for address in addresses:
            try:
                return self._connect_to(address)
            except OSError as error:
                failure = error
        raise failure

    def _connect_to(self, address: str) -> socket.socket:
        connection = socket.create_connection((address, self.port), self.socket_connect_timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.socket_keepalive:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in self.socket_keepalive_options.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.settimeout(self.socket_timeout)
        return connection


class _TLS(_TCP, redis.SSLConnection):
    def _connect_to(self, address: str) -> socket.socket:
        connection = super()._connect_to(address)
        try:
            return typing.cast("socket.socket", self._wrap_socket_with_ssl(connection))
        except (OSError, ValueError, redis.RedisError):
            connection.close()
            raise


class _Unix(_Renewable, redis.UnixDomainSocketConnection):
    pass
