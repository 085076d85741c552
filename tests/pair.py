"""A primary and a synchronous standby of Debian's PostgreSQL 15, which tests may kill, freeze, promote and rejoin.

    pytestmark = pair.needed

    @pytest.fixture(scope="module")
    def servers(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[pair.Pair]:
        with pair.running(tmp_path_factory.mktemp("pair")) as servers:
            yield servers

    async def test_something(servers: pair.Pair) -> None:
        await servers.restore()
        name = await servers.database()
        await servers.primary.kill()
        await servers.promote()

Whatever changes a server is a coroutine, so that a service in the same event loop goes on meanwhile.
"""

import asyncio
import collections.abc
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import tempfile
import typing
import urllib.parse

import asyncpg
import psutil
import pytest
import replicas

from afterhours_grpc.embedded import postgres, process
from afterhours_grpc.store import schema

BIN = pathlib.Path("/usr/lib/postgresql/15/bin")

SOCKETS = tempfile.gettempdir()

needed = pytest.mark.skipif(
    not all((BIN / program).exists() for program in ("postgres", "initdb", "pg_basebackup")),
    reason=f"needs Debian's PostgreSQL 15 in {BIN}",
)

_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "min_wal_size": "32MB",
    # Besides, for URLs that name a socket's directory; the file's name has the port.
    "unix_socket_directories": SOCKETS,
    "max_connections": "60",
    # A standby whose primary fell silent, and one that looks for its primary, notices soon.
    "wal_receiver_timeout": "1s",
    "wal_retrieve_retry_interval": "100ms",
}
_NAME = "afterhours"
_MAINTENANCE = "postgres"

Result = typing.TypeVar("Result")


class Server:
    """One of the two servers. Its port and password stay the same from start to start."""

    def __init__(self, directory: pathlib.Path, thread: concurrent.futures.Executor) -> None:
        self._directory = directory
        self._postgres = postgres.Postgres(directory, bindir=BIN, settings=_SETTINGS)
        # A server ends when the thread that started it does.
        self._thread = thread
        self._frozen: list[psutil.Process] = []
        self.running = False

    def url(self, database: str = _NAME) -> str:
        """Return the URL of a database on this server alone."""
        return self._postgres.url.rpartition("/")[0] + f"/{database}"

    @property
    def location(self) -> str:
        """Host and port."""
        return urllib.parse.urlsplit(self._postgres.url).netloc.rpartition("@")[2]

    async def start(self) -> None:
        """Start it in the role that it had, and return once it accepts connections."""
        await self._run(self._postgres.start)
        self.running = True

    async def stop(self) -> None:
        """Stop it in order: it disconnects clients, writes a checkpoint and sends a standby everything."""
        self.thaw()
        await self._run(lambda: self._postgres.stop(mode="fast"))
        self.running = False

    async def kill(self) -> None:
        """Send SIGKILL to all its processes; idempotent. A frozen server does nothing before it dies."""
        await self._run(self._kill)

    def freeze(self) -> None:
        """Send SIGSTOP to all its processes: the kernel accepts connections for it, and nothing answers."""
        postmaster = psutil.Process(self._postgres.pid)
        postmaster.suspend()
        self._frozen = [postmaster, *postmaster.children(recursive=True)]
        for each in self._frozen:
            each.suspend()

    def thaw(self) -> None:
        """Let a frozen server go on; idempotent."""
        while self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._frozen.pop().resume()

    async def set(self, name: str, value: str) -> None:
        """Change a setting of the running server, for connections old and new."""
        await self.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        await self.sql("SELECT pg_reload_conf()")

    async def read_only(self, does: bool = True) -> None:
        """Refuse writes with SQLSTATE 25006 on connections old and new, or accept them again."""
        await self.set("default_transaction_read_only", "on" if does else "off")

    async def encrypt(self, certificate: pathlib.Path, key: pathlib.Path) -> None:
        """Accept TLS on new connections, with this certificate."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            target = self._directory / "data" / name
            process.write_private(target, source.read_text())
            if owner := process.account():
                os.chown(target, *owner)
        await self.set("ssl", "on")

    async def sql(self, query: str, *arguments: object, database: str = _MAINTENANCE) -> list[asyncpg.Record]:
        """Run a statement as superuser on a connection of its own."""
        connection = await asyncpg.connect(self.url(database), timeout=10)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
            return rows
        finally:
            await connection.close()

    async def create(self) -> None:
        """Create its data with the schema of the service, let standbys connect, and start."""
        await self.start()
        with (self._directory / "data" / "pg_hba.conf").open("a") as file:
            file.write("host replication all 127.0.0.1/32 scram-sha-256\nlocal all all scram-sha-256\n")
        await self.sql("SELECT pg_reload_conf()")
        await schema.migrate(self.url())

    async def copy(self, source: "Server") -> None:
        """Replace its data by a copy of that of `source`, and start as a standby of `source`."""
        await self._run(lambda: self._copy(source))
        await self.start()

    def _kill(self) -> None:
        if self.running:
            postmaster = psutil.Process(self._postgres.pid)
            postmaster.suspend()
            for each in [*postmaster.children(recursive=True), postmaster]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self._frozen.clear()
        self._postgres.stop(mode="immediate")
        self.running = False

    def _copy(self, source: "Server") -> None:
        self._kill()
        self._directory.mkdir(mode=0o700, exist_ok=True)
        # Roles are part of the copy, and their passwords.
        process.write_private(self._directory / "password", (source._directory / "password").read_text())
        engine = process.Engine("PostgreSQL", self._directory, signal.SIGKILL)
        shutil.rmtree(engine.data, ignore_errors=True)
        engine.make_data(engine.data)
        command = [str(BIN / "pg_basebackup"), "-D", process.DATA, "-R", "-X", "stream", "-c", "fast", "--no-sync"]
        if not engine.run([*command, "-d", source.url(_MAINTENANCE)], engine.data):
            raise engine.failure("could not be copied")

    async def _run(self, function: collections.abc.Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


class Pair:
    """Two servers and their roles, as an operator sees them.

    `primary` is the one that was promoted last, and `standby` the other, whatever has become of it. With
    `synchronous`, a commit on the primary returns once the standby has it.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._numbers = itertools.count()
        self.primary = Server(directory / "one", self._thread)
        self.standby = Server(directory / "two", self._thread)
        self.servers = (self.primary, self.standby)
        self.synchronous = False

    def url(self, database: str = _NAME, *, order: collections.abc.Sequence[Server] = (), **parameters: str) -> str:
        """Return a URL that names both servers, in the order in which they were made unless `order` says another."""
        account = urllib.parse.urlsplit(self.primary.url()).netloc.rpartition("@")[0]
        hosts = ",".join(each.location for each in order or self.servers)
        query = urllib.parse.urlencode(parameters)
        return f"postgresql://{account}@{hosts}/{database}" + (f"?{query}" if query else "")

    async def create(self) -> None:
        """Create both."""
        await self.primary.create()
        await self.rejoin()

    async def database(self) -> str:
        """Create a database of its own for a test, with the schema of the service, on both; return its name."""
        name = f"test_{next(self._numbers)}"
        await self.primary.sql(f"CREATE DATABASE {name} TEMPLATE {_NAME}")

        async def applied() -> bool:
            return bool(await self.standby.sql("SELECT FROM pg_database WHERE datname = $1", name))

        await replicas.eventually(applied, within=10)
        return name

    async def promote(self) -> None:
        """Promote the standby, which is `primary` from here on; what became of the primary is left as it is."""
        await self.standby.sql("SELECT pg_promote()")
        self.primary, self.standby = self.standby, self.primary

    async def rejoin(self, *, synchronous: bool = True) -> None:
        """Make a standby of the server that is not the primary, whatever its state, by a new copy."""
        await self.replicate(synchronous=False)
        await self.standby.copy(self.primary)
        await self.replicate(synchronous=synchronous)

    async def replicate(self, *, synchronous: bool) -> None:
        """Have commits on the primary wait for the standby, or not."""
        await self.primary.set("synchronous_standby_names", "*" if synchronous else "")
        self.synchronous = synchronous
        await replicas.eventually(self.in_step, within=20)

    async def in_step(self) -> bool:
        """Whether the standby, if commits wait for it, receives what the primary writes."""
        rows = await self.primary.sql("SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming'")
        return not self.synchronous or [row["sync_state"] for row in rows] == ["sync"]

    async def restore(self) -> None:
        """Make a primary and its synchronous standby of whatever a test has left, without its databases."""
        for each in self.servers:
            each.thaw()
        if not self.primary.running:
            await self.primary.start()
        await self.primary.read_only(False)
        whole = self.synchronous and self.standby.running and await self.in_step()
        await self.replicate(synchronous=False)
        for row in await self.primary.sql("SELECT datname FROM pg_database WHERE datname LIKE 'test%'"):
            await self.primary.sql(f"DROP DATABASE {row['datname']} WITH (FORCE)")
        await (self.replicate(synchronous=True) if whole else self.rejoin())

    def close(self) -> None:
        """Kill both, and remove their data."""
        for each in self.servers:
            self._thread.submit(each._kill).result()
            shutil.rmtree(each._directory, ignore_errors=True)
        self._thread.shutdown()


@contextlib.contextmanager
def running(directory: pathlib.Path) -> collections.abc.Iterator[Pair]:
    """Run a pair whose data is below `directory`, which takes 3 s; afterwards nothing of it is left."""
    pair = Pair(directory)
    try:
        asyncio.run(pair.create())
        yield pair
    finally:
        pair.close()
