"""Statements run on a pool of connections; whatever keeps Postgres from answering becomes `StoreUnavailable`."""

import asyncio
import collections.abc
import contextlib
import datetime
import time
import typing
import weakref

import asyncpg
import sqlalchemy as sa
import sqlalchemy.exc
from sqlalchemy.dialects.postgresql import asyncpg as dialect
from sqlalchemy.ext import asyncio as sa_asyncio

from afterhours_grpc.sessions import errors

# Seconds that a statement may take, and that a connection may take to be made: a silent server counts as an
# unreachable one. The server gives up first, so that a lock it waits for costs a statement and no connection.
STATEMENT_TIMEOUT = 4.0
ANSWER_TIMEOUT = 4.5
# A row that another holds costs its caller another try, and those in the same batch only this.
LOCK_TIMEOUT = 0.5

# The server's classes of being away: connection exception, insufficient resources, operator intervention (also
# a statement that the server cancelled), and a primary that became read-only.
_AWAY = ("08", "53", "57", "25006")
# Nothing is wrong with the statement, it met another: serialization failure, deadlock, lock not available.
_MET_ANOTHER = ("40001", "40P01", "55P03")


class Retry(Exception):
    """The statement was taken back because it met another one; run it again."""


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
    "lock_timeout": str(int(LOCK_TIMEOUT * 1000)),
    "idle_in_transaction_session_timeout": str(int(ANSWER_TIMEOUT * 1000)),
    # Plans are cached while tables are small, and must stay right when they are not.
    "enable_seqscan": "off",
    "jit": "off",
}

Row = collections.abc.Mapping[str, typing.Any]
Run = collections.abc.Callable[..., collections.abc.Awaitable[list[Row]]]


async def connect(url: str) -> asyncpg.Connection:
    """Make a connection as the service uses them. Raise OSError, TimeoutError or asyncpg's errors."""
    return await asyncpg.connect(url, timeout=ANSWER_TIMEOUT, server_settings=_SESSION_SETTINGS)


class Database:
    """A pool of at most `connections` connections to `url`, which asyncpg reads as libpq does."""

    def __init__(self, url: str, *, connections: int = 16) -> None:
        # Tests move the service's clock by this; see `transitions.NOW`.
        self.clock_offset = datetime.timedelta()
        self._prepared: weakref.WeakKeyDictionary[asyncpg.Connection, dict[Statement, typing.Any]]
        self._prepared = weakref.WeakKeyDictionary()
        # Statements run on the driver's connection, each in a transaction of its own, so there is nothing for the
        # pool to roll back when it gets one again.
        self._engine = sa_asyncio.create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: connect(url),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=ANSWER_TIMEOUT,
            pool_reset_on_return=None,
            hide_parameters=True,
        )

    @property
    def checked_out(self) -> int:
        """How many connections are in use."""
        return typing.cast("sa.QueuePool", self._engine.pool).checkedout()

    async def close(self) -> None:
        """Close every connection; idempotent."""
        await self._engine.dispose()

    async def fetch(self, statement: Statement, **parameters: object) -> list[Row]:
        """Run one statement in its own transaction. Raise `StoreUnavailable` or `Retry`.

        `deadlines`, in seconds of time.monotonic(), become `times_left` as the statement is sent, not before, and
        their first one bounds `lock_timeout`.
        """
        async with self._connection() as driver:
            return await self._run(driver, statement, parameters)

    @contextlib.asynccontextmanager
    async def transaction(self) -> collections.abc.AsyncIterator[Run]:
        """Give a `fetch` whose statements are committed together or not at all."""
        async with self._connection() as driver:

            async def run(statement: Statement, **parameters: object) -> list[Row]:
                return await self._run(driver, statement, parameters)

            # Not the driver's own transaction(), which waits for a ROLLBACK even of a server that fell silent.
            await driver.execute("BEGIN")
            try:
                yield run
                await driver.execute("COMMIT")
            except asyncpg.PostgresError:
                await driver.execute("ROLLBACK")
                raise

    async def _run(self, driver: asyncpg.Connection, statement: Statement, parameters: Row) -> list[Row]:
        # Prepared first, for that takes round trips when a connection is new, and deadlines are near.
        of_driver = self._prepared.setdefault(driver, {})
        prepared = of_driver.get(statement)
        if prepared is None:
            prepared = of_driver[statement] = await driver.prepare(statement.sql)
        known = {**parameters, "clock_offset": self.clock_offset}
        if "deadlines" in known:
            now = time.monotonic()
            left = [max(0.0, each - now) for each in known["deadlines"]]
            known["times_left"] = [datetime.timedelta(seconds=each) for each in left]
            # In milliseconds, of which 0 would mean for ever.
            known["lock_timeout"] = str(max(1, int(1000 * min(LOCK_TIMEOUT, *left))))
        try:
            rows: list[Row] = await prepared.fetch(*[known[name] for name in statement.names])
        except asyncpg.InvalidCachedStatementError as error:  # a migration came between
            of_driver.clear()
            raise Retry from error
        return rows

    @contextlib.asynccontextmanager
    async def _connection(self) -> collections.abc.AsyncIterator[asyncpg.Connection]:
        with _away_is_unavailable():
            async with asyncio.timeout(ANSWER_TIMEOUT), self._engine.connect() as connection:
                driver = (await connection.get_raw_connection()).driver_connection
                while driver is None or driver.is_closed():  # lost while it lay in the pool
                    await connection.invalidate()
                    driver = (await connection.get_raw_connection()).driver_connection
                try:
                    yield driver
                except asyncpg.PostgresError:
                    raise
                except BaseException:  # a cancellation, too
                    # In the middle of an answer, or of nowhere: such a connection serves nobody again. Not closed
                    # but dropped, for a silent server does not answer a goodbye.
                    driver.terminate()
                    await connection.invalidate()
                    raise


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
        raise
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # the server spoke out of turn, as it does when it ends a connection
        sqlalchemy.exc.DBAPIError,
        sa.exc.TimeoutError,
    ) as error:
        raise errors.StoreUnavailable from error
