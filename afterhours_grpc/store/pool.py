"""The connections of one process: kept between statements, and dropped when their server must not be used again."""

import asyncio
import collections.abc
import contextlib
import time

import asyncpg
import structlog

from afterhours_grpc.store import connections, hosts

log = structlog.get_logger()

# Seconds for which a connection is used without a check after its server answered, and that the server may take to
# answer one. A check can be lost without harm; the statement of a call cannot.
_CHECKED_FOR = 1.0
_CHECK_TIMEOUT = 1.0
# Seconds between two such questions on the connection that listens.
_LISTEN_CHECK = 1.0
# Seconds after which an idle connection is closed.
_MAX_IDLE = 60.0


class Connection:
    """A connection to the server at `host`; `driver` is the driver's."""

    def __init__(self, driver: asyncpg.Connection, host: hosts.Host, generation: int) -> None:
        self.driver = driver
        self.host = host
        self.generation = generation
        # In seconds of time.monotonic(): when the server answered last, and when the connection was released.
        self.checked = self.released = time.monotonic()
        # By their SQL.
        self.prepared: dict[str, asyncpg.prepared_stmt.PreparedStatement] = {}


class Pool:
    """At most `size` connections to the server of `url` that accepts writes, and one for each `listen`.

    A connection whose server has not answered for 1 s is checked before it is used. If the server does not answer that
    within 1 s, or is read-only, no connection of this generation is used again, and those of the next one are made to
    another host if there is one. A call that waits for too long costs its own connection alone: it may wait for a
    standby, or for a slow disk, and whether the server is silent is found out by the next check.

    Not asyncpg's own pool: a statement takes 40 µs more with it, which is 4 to 8 % of a call, and connections that it
    expires stay open until they are asked for.
    """

    def __init__(self, url: str, size: int) -> None:
        self.checked_out = 0
        self._connector = connections.Connector(url)
        self._room = asyncio.Semaphore(size)
        self._generation = 0
        # By when they were released, the last one at the end.
        self._idle: list[Connection] = []
        self._listening: set[Connection] = set()

    async def close(self) -> None:
        """Close every connection that is not in use; idempotent."""
        idle, self._idle = self._idle, []
        closing = (each.driver.close(timeout=_CHECK_TIMEOUT) for each in idle)
        await asyncio.gather(*closing, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def connection(
        self, seconds: float = connections.ANSWER_TIMEOUT
    ) -> collections.abc.AsyncIterator[Connection]:
        """Lend a connection for at most 4 s, or `seconds`, waiting and connecting included.

        Raise TimeoutError, CannotConnect, and the driver's errors as they are; after one of the server's the connection
        must be outside of a transaction.
        """
        async with asyncio.timeout(seconds), self._room:
            self.checked_out += 1
            try:
                connection = await self._open()
                try:
                    yield connection
                    connection.checked = time.monotonic()
                except asyncpg.PostgresError as error:
                    if error.sqlstate == connections.READ_ONLY:
                        self._leave(connection, "read_only")
                    raise
                except BaseException:  # a cancellation, too
                    # In the middle of an answer, or of nowhere: such a connection serves nobody again. Not closed but
                    # dropped, for a silent server does not answer a goodbye.
                    connection.driver.terminate()
                    raise
                finally:
                    self._release(connection)
            finally:
                self.checked_out -= 1

    async def listen(self, channel: str, heard: collections.abc.Callable[[], None]) -> None:
        """Call `heard` at each notification, on a connection of its own, until that is lost, or its server is left.

        Raise TimeoutError, CannotConnect, and the driver's errors.
        """
        connection = await self._connect()
        lost = asyncio.Event()
        connection.driver.add_termination_listener(lambda _: lost.set())
        self._listening.add(connection)
        try:
            async with asyncio.timeout(connections.ANSWER_TIMEOUT):
                await connection.driver.add_listener(channel, lambda *_: heard())
            while await self._good(connection):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LISTEN_CHECK):
                        await lost.wait()
        finally:
            self._listening.remove(connection)
            connection.driver.terminate()

    async def _open(self) -> Connection:
        now = time.monotonic()
        while self._idle and now - self._idle[0].released > _MAX_IDLE:
            self._idle.pop(0).driver.terminate()
        while self._idle:
            # The one used last, whose memory and plans are warm.
            connection = self._idle.pop()
            fresh = now - connection.checked < _CHECKED_FOR and not connection.driver.is_closed()
            if fresh or await self._good(connection):
                return connection
        return await self._connect()

    async def _connect(self) -> Connection:
        generation = self._generation
        driver, host = await self._connector.connect()
        return Connection(driver, host, generation)

    async def _good(self, connection: Connection) -> bool:
        """Ask the server whether a connection can be used; if it cannot, it is closed."""
        if connection.driver.is_closed():
            return False
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                await self._connector.check(connection.driver)
        except connections.FAILURES as error:
            connection.driver.terminate()
            if isinstance(error, connections.ReadOnlyError):
                self._leave(connection, "read_only")
            elif isinstance(error, TimeoutError):
                self._leave(connection, "silent")
            return False
        except BaseException:  # a cancellation
            connection.driver.terminate()
            raise
        connection.checked = time.monotonic()
        return True

    def _release(self, connection: Connection) -> None:
        if connection.generation != self._generation:
            connection.driver.terminate()
        elif not connection.driver.is_closed():
            connection.released = time.monotonic()
            self._idle.append(connection)

    def _leave(self, connection: Connection, reason: str) -> None:
        """Use no connection of this generation again: those in use are dropped when they are released."""
        if connection.generation != self._generation:
            return
        self._generation += 1
        self._connector.distrust(connection.host)
        dropped = [*self._idle, *self._listening]
        self._idle.clear()
        for each in dropped:
            each.driver.terminate()
        log.warning("postgres_left", reason=reason, connections=len(dropped))
