"""Connections to the server that accepts writes, whichever host of DATABASE_URL that is."""

import asyncio
import collections
import collections.abc
import contextlib
import socket
import ssl

import asyncpg

from afterhours_grpc.store import driver, hosts

# Seconds within which a connection is made, and a statement answered: a silent server counts as an unreachable one.
# Well below the 5 s that are promised, since after a silence another server has to be found.
ANSWER_TIMEOUT = 4.0
# The server gives up first, so that a slow statement costs no connection.
_STATEMENT_TIMEOUT = 3.5
# What a statement for one caller alone waits for a row that another transaction holds.
_LOCK_TIMEOUT = 0.5

# For the server, which otherwise keeps the connections of a machine that vanished, with their locks, for two hours.
KEEPALIVE_SETTINGS = {
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}

SESSION_SETTINGS = {
    **KEEPALIVE_SETTINGS,
    "application_name": "afterhours",
    "timezone": "UTC",
    # A transition must see what was committed while it waited for a lock.
    "default_transaction_isolation": "read committed",
    "statement_timeout": str(int(_STATEMENT_TIMEOUT * 1000)),
    "lock_timeout": str(int(_LOCK_TIMEOUT * 1000)),
    "idle_in_transaction_session_timeout": str(int(ANSWER_TIMEOUT * 1000)),
    # Plans are cached while tables are small, and must stay right when they are not.
    "enable_seqscan": "off",
    "jit": "off",
}

# Seconds after which the next host is tried as well. A server under load answers sooner, so that the host that was
# right last stays the preferred one.
_HEAD_START = 0.5

# For peers that vanished, and for NAT gateways and firewalls, which forget flows that are idle for a few minutes. Linux
# has all of these options.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}

READ_ONLY = "25006"
# The server's classes of being away: connection exception, invalid authorization, invalid catalog name, insufficient
# resources, operator intervention (also a statement that the server cancelled), a primary that became read-only, and a
# transaction that was idle for too long, since this process was stopped.
AWAY = ("08", "28", "3D", "53", "57", READ_ONLY, "25P03")

# A setting that is "on" in recovery, too; the first 8 hexadecimal digits of a WAL file's name are its timeline.
_ROLE = """
SELECT current_setting('transaction_read_only') = 'off' AS writable, system_identifier AS system,
    CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END AS timeline
FROM pg_control_system()
"""

# Whatever keeps a connection from being made or used.
FAILURES = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

_ADVICE = {
    "28": "check the user, the password and pg_hba.conf",
    "3D": "create the database, or name another one",
    "53": "raise max_connections, or stop other clients",
}


class CannotConnect(Exception):
    """No server can be used, which may pass; the message is one line and says what to do."""


class Misconfigured(CannotConnect):
    """No server can be used until DATABASE_URL or the server is changed."""


class ReadOnlyError(ConnectionError):
    """The server does not accept writes: it is a standby, read-only, or a primary that another server has replaced."""


class Connector:
    """Connects to `url`, which is read as libpq reads it, with these settings of the session.

    Each host is tried by itself, in the order of the URL, but first the one that was right last: the next one when the
    one before has failed, or has not answered within 0.5 s. The first one that accepts writes is taken.
    """

    def __init__(self, url: str, settings: collections.abc.Mapping[str, str] = SESSION_SETTINGS) -> None:
        self._url = url
        self._settings = dict(settings)
        self._order: list[hosts.Host] = []
        # The newest timeline of each database cluster, by its system identifier: a restored one may begin anew.
        self._timelines: dict[int, str] = {}

    async def connect(self) -> tuple[asyncpg.Connection, hosts.Host]:
        """Return a connection to a server that accepts writes, and its host. Raise CannotConnect within 4 s."""
        try:
            self._order = self._order or hosts.read(self._url)
        except ValueError as error:
            raise cannot_connect(error) from error
        attempts: dict[asyncio.Task[asyncpg.Connection], hosts.Host] = {}
        failures: list[BaseException] = []
        found = None
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                if found := await self._race(attempts, failures):
                    return found
        except TimeoutError as error:
            failures.append(error)
        finally:
            try:
                await _discard(attempts)
            except asyncio.CancelledError:
                if found:
                    found[0].terminate()
                raise
        cause = max(failures, key=_weight)
        if not isinstance(cause, (*FAILURES, ValueError)):  # a bug, of ours or the driver's
            raise cause
        raise cannot_connect(cause) from cause

    async def check(self, connection: asyncpg.Connection) -> None:
        """Raise ReadOnlyError unless the server accepts writes and is the newest primary that was seen.

        An old primary that was frozen while another server was promoted accepts writes when it goes on, and answers
        from a history that has ended. Each promotion begins a timeline, so its own is behind. Raise one of FAILURES if
        the server does not answer.
        """
        role = await connection.fetchrow(_ROLE)
        newest = self._timelines.get(role["system"], "")
        if not role["writable"] or role["timeline"] < newest:
            raise ReadOnlyError
        self._timelines[role["system"]] = role["timeline"]

    def distrust(self, host: hosts.Host) -> None:
        """Try a host last from now on: its server fell silent, or lost its role."""
        self._move(host, len(self._order))

    async def _race(
        self, attempts: dict["asyncio.Task[asyncpg.Connection]", hosts.Host], failures: list[BaseException]
    ) -> tuple[asyncpg.Connection, hosts.Host] | None:
        untried = collections.deque(self._order)
        while untried or attempts:
            if untried:
                host = untried.popleft()
                attempts[asyncio.create_task(self._attempt(host))] = host
            done, _ = await asyncio.wait(
                attempts, timeout=_HEAD_START if untried else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                if error := attempt.exception():
                    failures.append(error)
                    del attempts[attempt]
                else:
                    host = attempts.pop(attempt)
                    self._move(host, 0)
                    return attempt.result(), host
        return None

    async def _attempt(self, host: hosts.Host) -> asyncpg.Connection:
        connection = await driver.connect(
            self._url, host=host.name, port=host.port, timeout=ANSWER_TIMEOUT, server_settings=self._settings
        )
        try:
            _keep_alive(connection)
            await self.check(connection)
        except BaseException:  # a cancellation, too
            connection.terminate()
            raise
        return connection

    def _move(self, host: hosts.Host, index: int) -> None:
        self._order.remove(host)
        self._order.insert(index, host)


async def connect(url: str, settings: collections.abc.Mapping[str, str] = SESSION_SETTINGS) -> asyncpg.Connection:
    """Return a connection to the server of `url` that accepts writes. Raise CannotConnect within 4 s."""
    connection, _ = await Connector(url, settings).connect()
    return connection


@contextlib.contextmanager
def explained() -> collections.abc.Iterator[None]:
    """Turn the driver's errors into CannotConnect, for commands that end with a line."""
    try:
        yield
    except FAILURES as error:
        raise cannot_connect(error) from error


def cannot_connect(cause: BaseException) -> CannotConnect:
    """Return the error for what keeps Postgres from being used, or that error itself."""
    if isinstance(cause, CannotConnect):
        return cause
    refused = isinstance(cause, asyncpg.PostgresError) and not (cause.sqlstate or "").startswith(AWAY)
    kind = Misconfigured if refused or _is_about_url(cause) else CannotConnect
    return kind(f"Postgres at DATABASE_URL cannot be used ({type(cause).__name__}): {_advice(cause)}")


def _keep_alive(connection: asyncpg.Connection) -> None:
    transport: asyncio.Transport = connection._transport  # noqa: SLF001 - the driver has no other way to its socket
    connected: socket.socket = transport.get_extra_info("socket")
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _discard(attempts: collections.abc.Iterable["asyncio.Task[asyncpg.Connection]"]) -> None:
    """End the attempts that are not needed any more."""
    for attempt in attempts:
        attempt.cancel()
    for ended in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(ended, asyncpg.Connection):
            ended.terminate()


def _weight(error: BaseException) -> int:
    """Rank the errors of several hosts: what has to be changed comes before what is down."""
    unmatched = asyncpg.TargetServerAttributeNotMatched
    order = (TimeoutError, OSError, ssl.SSLError, unmatched, ReadOnlyError, asyncpg.PostgresError)
    known = [index for index, kind in enumerate(order) if isinstance(error, kind)]
    if _is_about_url(error) or not known:
        return len(order)
    return 0 if isinstance(error, TimeoutError) else known[-1]


def _is_about_url(error: BaseException) -> bool:
    # An invalid certificate is a ValueError too, but also an OSError.
    return isinstance(error, ValueError) and not isinstance(error, OSError)


def _is_read_only(error: BaseException) -> bool:
    return isinstance(error, (ReadOnlyError, asyncpg.TargetServerAttributeNotMatched))


def _advice(error: BaseException) -> str:
    if _is_read_only(error):
        return "no host of it accepts writes; promote one, or name the primary"
    state = getattr(error, "sqlstate", None) or ""
    return _ADVICE.get(state[:2], "check the URL, and that it runs")
