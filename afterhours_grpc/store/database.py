"""Statements run on kept connections; whatever keeps Postgres from answering becomes `StoreUnavailable`."""

import asyncio
import collections.abc
import contextlib
import datetime
import time
import typing

import asyncpg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import asyncpg as dialect

from afterhours_grpc.sessions import errors
from afterhours_grpc.store import driver

# Seconds that a statement may take, and that a connection may take to be made: a silent server counts as an
# unreachable one. The server gives up first, so that a lock it waits for costs a statement and no connection.
STATEMENT_TIMEOUT = 4.0
ANSWER_TIMEOUT = 4.5
# A row that another holds costs its caller another try, and those in the same batch only this.
LOCK_TIMEOUT = 0.1
# The same for a statement that is for one caller alone.
_LONE_LOCK_TIMEOUT = 0.5

# The server's classes of being away: connection exception, insufficient resources, operator intervention (also
# a statement that the server cancelled), and a primary that became read-only.
_AWAY = ("08", "53", "57", "25006")
# Nothing is wrong with the statement, it met another: serialization failure, deadlock, lock not available.
_MET_ANOTHER = ("40001", "40P01", "55P03")


class Retry(Exception):
    """The statement was taken back because it met another one; run it again."""


class StatementFailed(Exception):
    """The statement failed for what it is or carries, and was not applied: the server rolled it back, or never got it.

    `sqlstate` and `constraint_name` are Postgres' own, for the log.
    """

    def __init__(self, sqlstate: str | None = None, constraint_name: str | None = None) -> None:
        super().__init__()
        self.sqlstate = sqlstate
        self.constraint_name = constraint_name


class Statement:
    """SQL with named parameters, compiled once to the driver's `$1`, `$2` and so on."""

    def __init__(self, sql: str) -> None:
        compiled = sa.text(sql).compile(dialect=dialect.dialect())  # type: ignore[no-untyped-call]
        self.sql = str(compiled)
        self.names: tuple[str, ...] = tuple(compiled.positiontup or ())


_SESSION_SETTINGS = {
    "application_name": "afterhours",
    "timezone": "UTC",
    "statement_timeout": str(int(STATEMENT_TIMEOUT * 1000)),
    "lock_timeout": str(int(_LONE_LOCK_TIMEOUT * 1000)),
    "idle_in_transaction_session_timeout": str(int(ANSWER_TIMEOUT * 1000)),
    # Plans are cached while tables are small, and must stay right when they are not.
    "enable_seqscan": "off",
    "jit": "off",
}

Row = collections.abc.Mapping[str, typing.Any]
Run = collections.abc.Callable[..., collections.abc.Awaitable[list[Row]]]


async def connect(url: str) -> asyncpg.Connection:
    """Make a connection as the service uses them. Raise OSError, TimeoutError or asyncpg's errors."""
    return await driver.connect(url, timeout=ANSWER_TIMEOUT, server_settings=_SESSION_SETTINGS)


class _Connection:
    """A connection of the driver's, with the statements that it has prepared."""

    def __init__(self, driver: asyncpg.Connection) -> None:
        self.driver = driver
        self._prepared: dict[Statement, typing.Any] = {}

    async def run(self, statement: Statement, known: Row) -> list[Row]:
        # Prepared first, for that takes round trips when a connection is new, and deadlines are near.
        prepared = self._prepared.get(statement)
        if prepared is None:
            prepared = self._prepared[statement] = await self.driver.prepare(statement.sql)
        if "deadlines" in known:
            known = {**known, **_patience(known["deadlines"])}
        try:
            rows: list[Row] = await prepared.fetch(*[known[name] for name in statement.names])
        except asyncpg.InvalidCachedStatementError as error:  # a migration came between
            self._prepared.clear()
            raise Retry from error
        return rows


def _patience(deadlines: collections.abc.Sequence[float]) -> dict[str, object]:
    now = time.monotonic()
    left = [max(0.0, each - now) for each in deadlines]
    return {
        "times_left": [datetime.timedelta(seconds=each) for each in left],
        # In milliseconds, of which 0 would mean for ever.
        "lock_timeout": str(max(1, int(1000 * min(LOCK_TIMEOUT, *left)))),
    }


class Database:
    """At most `connections` connections to `url`, which asyncpg reads as libpq does.

    Not asyncpg's own pool, whose release sends a reset and forgets what was prepared, nor SQLAlchemy's, whose greenlets
    cost more than the statements; both were measured.
    """

    def __init__(self, url: str, *, connections: int = 16) -> None:
        # Tests move the service's clock by this; see `transitions.NOW`.
        self.clock_offset = datetime.timedelta()
        self.checked_out = 0
        # When a statement was last answered, by time.monotonic().
        self.answered_at = 0.0
        self._url = url
        self._room = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []

    async def close(self) -> None:
        """Close every connection that is not in use; idempotent."""
        while self._idle:
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self._idle.pop().driver.close(timeout=ANSWER_TIMEOUT)

    async def fetch(self, statement: Statement, **parameters: object) -> list[Row]:
        """Run one statement in its own transaction. Raise `StoreUnavailable`, `Retry` or `StatementFailed`.

        `deadlines`, in seconds of time.monotonic(), become `times_left` as the statement is sent, not before, and
        their first one bounds `lock_timeout`.
        """
        async with self._connection() as connection:
            rows = await connection.run(statement, {**parameters, "clock_offset": self.clock_offset})
            self.answered_at = time.monotonic()
            return rows

    @contextlib.asynccontextmanager
    async def transaction(self) -> collections.abc.AsyncIterator[Run]:
        """Give a `fetch` whose statements are committed together or not at all."""
        async with self._connection() as connection:

            async def run(statement: Statement, **parameters: object) -> list[Row]:
                return await connection.run(statement, {**parameters, "clock_offset": self.clock_offset})

            # Not the driver's own transaction(), which waits for a ROLLBACK even of a server that fell silent.
            await connection.driver.execute("BEGIN")
            try:
                yield run
            except asyncpg.PostgresError:
                await connection.driver.execute("ROLLBACK")
                raise
            try:
                await connection.driver.execute("COMMIT")
            except asyncpg.PostgresError as error:
                # Whether it was applied is not known, so that nothing may try it again by itself.
                raise errors.StoreUnavailable from error

    async def listen(self, channel: str, heard: collections.abc.Callable[[], None]) -> None:
        """Call `heard` at each notification, on a connection of its own, until it is lost. Raise as `connect` does."""
        connection = await connect(self._url)
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        try:
            await connection.add_listener(channel, lambda *_: heard())
            await lost.wait()
        finally:
            connection.terminate()

    @contextlib.asynccontextmanager
    async def _connection(self) -> collections.abc.AsyncIterator[_Connection]:
        with _away_is_unavailable():
            async with asyncio.timeout(ANSWER_TIMEOUT), self._room:
                self.checked_out += 1
                try:
                    connection = await self._open()
                    try:
                        yield connection
                    except asyncpg.PostgresError:
                        self._idle.append(connection)
                        raise
                    except BaseException:  # a cancellation, too
                        # In the middle of an answer, or of nowhere: such a connection serves nobody again. Not closed
                        # but dropped, for a silent server does not answer a goodbye.
                        connection.driver.terminate()
                        raise
                    self._idle.append(connection)
                finally:
                    self.checked_out -= 1

    async def _open(self) -> _Connection:
        while self._idle:
            # The one used last, whose memory and plans are warm.
            connection = self._idle.pop()
            if not connection.driver.is_closed():  # lost while it lay here
                return connection
        return _Connection(await connect(self._url))


@contextlib.contextmanager
def _away_is_unavailable() -> collections.abc.Iterator[None]:
    try:
        yield
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        if state.startswith(_AWAY):
            raise errors.StoreUnavailable from error
        if state in _MET_ANOTHER or error.as_dict().get("constraint_name") == "after_hours_requests_pkey":
            raise Retry from error
        raise StatementFailed(state, error.as_dict().get("constraint_name")) from error
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # the server spoke out of turn, as it does when it ends a connection
    ) as error:
        if _is_bad_argument(error):
            raise StatementFailed from error
        raise errors.StoreUnavailable from error


def _is_bad_argument(error: Exception) -> bool:
    """Return whether the driver could not encode an argument, and so sent nothing."""
    # The driver hides its class for it behind another one of the same name; what else has both bases is of connecting.
    return (
        isinstance(error, asyncpg.InterfaceError)
        and isinstance(error, ValueError)
        and not isinstance(error, asyncpg.ClientConfigurationError)
    )
