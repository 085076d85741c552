"""Statements run on a pool of connections; whatever keeps Postgres from answering becomes `StoreUnavailable`."""

import collections.abc
import contextlib
import datetime
import time
import typing

import asyncpg
import sqlalchemy as sa
import tenacity
from sqlalchemy.dialects.postgresql import asyncpg as dialect

from afterhours_grpc.sessions import errors
from afterhours_grpc.store import connections, pool

# A row that another holds costs its caller another try, and those in the same batch only this.
LOCK_TIMEOUT = 0.1

# Seconds for which a command that starts waits for a server that it can use.
_PATIENCE = 10.0

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


Row = collections.abc.Mapping[str, typing.Any]
Run = collections.abc.Callable[..., collections.abc.Awaitable[list[Row]]]
Result = typing.TypeVar("Result")


def _patience(deadlines: collections.abc.Sequence[float]) -> dict[str, object]:
    now = time.monotonic()
    left = [max(0.0, each - now) for each in deadlines]
    return {
        "times_left": [datetime.timedelta(seconds=each) for each in left],
        # In milliseconds, of which 0 would mean for ever.
        "lock_timeout": str(max(1, int(1000 * min(LOCK_TIMEOUT, *left)))),
    }


class Database:
    """Statements on at most `connections` connections to the server of `url` that accepts writes."""

    def __init__(self, url: str, *, connections: int = 16) -> None:
        # Tests move the service's clock by this; see `transitions.NOW`.
        self.clock_offset = datetime.timedelta()
        # When a statement was last answered, by time.monotonic().
        self.answered_at = 0.0
        self._pool = pool.Pool(url, connections)

    @property
    def checked_out(self) -> int:
        """How many connections are in use."""
        return self._pool.checked_out

    async def close(self) -> None:
        """Close every connection that is not in use; idempotent."""
        await self._pool.close()

    async def fetch(self, statement: Statement, **parameters: object) -> list[Row]:
        """Run one statement in its own transaction. Raise `StoreUnavailable`, `Retry` or `StatementFailed`.

        `deadlines`, in seconds of time.monotonic(), become `times_left` as the statement is sent, not before, and
        their first one bounds `lock_timeout`.
        """
        with _away_is_unavailable():
            async with self._pool.connection() as connection:
                return await self._run(connection, statement, parameters)

    @contextlib.asynccontextmanager
    async def transaction(self, seconds: float = connections.ANSWER_TIMEOUT) -> collections.abc.AsyncIterator[Run]:
        """Provide a `fetch` whose statements are committed together or not at all, within 4 s or `seconds`."""
        with _away_is_unavailable():
            async with self._pool.connection(seconds) as connection:

                async def run(statement: Statement, **parameters: object) -> list[Row]:
                    return await self._run(connection, statement, parameters)

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
        """Call `heard` at each notification, on a connection of its own, until there is none, which is no error."""
        with contextlib.suppress(errors.StoreUnavailable), _away_is_unavailable():
            await self._pool.listen(channel, heard)

    async def _run(
        self, connection: pool.Connection, statement: Statement, parameters: dict[str, typing.Any]
    ) -> list[Row]:
        known = {**parameters, "clock_offset": self.clock_offset}
        # Prepared first, for that takes round trips when a connection is new, and deadlines are near.
        prepared = connection.prepared.get(statement.sql)
        if prepared is None:
            prepared = connection.prepared[statement.sql] = await connection.driver.prepare(statement.sql)
        if "deadlines" in known:
            known.update(_patience(known["deadlines"]))
        try:
            rows: list[Row] = await prepared.fetch(*[known[name] for name in statement.names])
        except asyncpg.InvalidCachedStatementError:  # a migration came between
            connection.prepared.clear()
            raise
        self.answered_at = time.monotonic()
        return rows


async def patiently(do: collections.abc.Callable[[], collections.abc.Awaitable[Result]]) -> Result:
    """Return what `do` returns, trying for 10 s to find a server for it.

    Raise CannotConnect, Misconfigured at once, and whatever else `do` raises.
    """
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_fixed(0.2),
        stop=tenacity.stop_after_delay(_PATIENCE),
        reraise=True,
    ):
        with attempt:
            try:
                return await do()
            except (errors.StoreUnavailable, Retry) as error:
                raise connections.cannot_connect(error.__cause__ or error) from error
    raise AssertionError


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, connections.CannotConnect) and not isinstance(error, connections.Misconfigured)


@contextlib.contextmanager
def _away_is_unavailable() -> collections.abc.Iterator[None]:
    try:
        yield
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        if state.startswith(connections.AWAY):
            raise errors.StoreUnavailable from error
        stale = isinstance(error, asyncpg.InvalidCachedStatementError)
        if stale or state in _MET_ANOTHER or error.as_dict().get("constraint_name") == "after_hours_requests_pkey":
            raise Retry from error
        raise StatementFailed(state, error.as_dict().get("constraint_name")) from error
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # the server spoke out of turn, as it does when it ends a connection
        connections.CannotConnect,
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
