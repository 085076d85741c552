"""Failover of Postgres: the server that accepts writes is found, the other is left, and what was acknowledged stays."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import itertools
import pathlib
import time
import urllib.parse

import keys
import onlooker
import pair
import proxy
import pytest
import replicas
from afterhours.v1 import session_pb2, session_service_pb2

from afterhours_grpc.embedded import redis
from afterhours_grpc.store import connections

pytestmark = [pair.needed, pytest.mark.store, pytest.mark.timed]

# Seconds after a promotion by which calls are OK again.
LONGEST = 5.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[pair.Pair]:
    """Run a primary and its standby."""
    with pair.running(tmp_path_factory.mktemp("pair")) as both:
        yield both


@dataclasses.dataclass(frozen=True)
class Stage:
    """A primary and its synchronous standby, a database on them, and a Redis."""

    servers: pair.Pair
    name: str
    redis_url: str

    def engines(self, url: str = "") -> replicas.Engines:
        """Return the engines with this URL, or with one of both hosts."""
        return replicas.Engines(url or self.servers.url(self.name), self.redis_url)

    def on(self, server: pair.Server) -> replicas.Engines:
        """Return the engines of one server, for looking past the service."""
        return self.engines(server.url(self.name))

    async def left(self, server: pair.Server) -> None:
        """Wait until the service has no connection to a server, that which listens included."""

        async def left() -> bool:
            # A commit that waits for the standby that is gone does not notice that its client went away.
            query = """
                SELECT FROM pg_stat_activity WHERE application_name = 'afterhours' AND datname = $1
                AND wait_event IS DISTINCT FROM 'SyncRep'
            """
            return not await server.sql(query, self.name)

        await replicas.eventually(left, within=LONGEST)


@pytest.fixture
async def stage(servers: pair.Pair, redis_server: redis.Redis) -> Stage:
    """Restore the pair, and create a database on it."""
    await servers.restore()
    return Stage(servers, await servers.database(), redis_server.url)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A call that wrote, or failed to."""

    began: float
    ended: float
    refusal: replicas.Refusal | None


class Prober:
    """Makes a call that writes every 20 ms, whatever has become of the one before."""

    def __init__(self, client: replicas.Client) -> None:
        self._client = client
        self.probes: list[Probe] = []
        # More users than one, of whom no more than 64 calls may wait.
        self._users = itertools.cycle(f"prober {number}" for number in range(32))
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Make calls until cancelled."""
        while True:
            call = asyncio.create_task(self._call())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            await asyncio.sleep(0.02)

    async def _call(self) -> None:
        began = time.monotonic()
        refusal = await replicas.outcome(self._client.put_profile(next(self._users)))
        self.probes.append(Probe(began, time.monotonic(), refusal))

    async def well_again(self, since: float) -> None:
        """Wait until calls are OK, and all that began before them have ended; that took 5 s at most."""

        async def well() -> bool:
            failed = max((each.ended for each in self.probes if each.refusal), default=since)
            later = [each for each in self.probes if each.began > max(failed, since)]
            return len(later) >= 20 and len(self._calls) <= 2

        await replicas.eventually(well, within=3 * LONGEST)
        failures = [each for each in self.probes if each.refusal]
        assert {each.refusal.reason for each in failures if each.refusal} <= {"STORE_UNAVAILABLE"}
        assert max((each.began for each in failures), default=since) < since + LONGEST
        assert all(each.ended - each.began < LONGEST for each in self.probes)


@contextlib.asynccontextmanager
async def probing(client: replicas.Client) -> collections.abc.AsyncIterator[Prober]:
    """Probe a service."""
    prober = Prober(client)
    running = asyncio.create_task(prober.run())
    try:
        yield prober
    finally:
        running.cancel()
        await asyncio.gather(running, *prober._calls, return_exceptions=True)


async def killed(servers: pair.Pair) -> float:
    """Kill the primary, and promote the standby; return when it was promoted."""
    await servers.primary.kill()
    await servers.promote()
    return time.monotonic()


async def frozen(servers: pair.Pair) -> float:
    """Freeze the primary, and promote the standby."""
    servers.primary.freeze()
    await servers.promote()
    return time.monotonic()


async def switched(servers: pair.Pair) -> float:
    """Let the two change their roles: the old primary is back as a standby."""
    await servers.primary.stop()
    await servers.promote()
    promoted = time.monotonic()
    await servers.rejoin()
    return promoted


async def read_only(servers: pair.Pair) -> float:
    """Have the primary refuse writes, on its connections too, and promote the standby."""
    await servers.primary.read_only()
    await servers.promote()
    return time.monotonic()


Failover = collections.abc.Callable[[pair.Pair], collections.abc.Awaitable[float]]


@pytest.mark.parametrize(
    ("fail_over", "first"), [(killed, "standby"), (frozen, "primary"), (switched, "standby"), (read_only, "primary")]
)
async def test_the_new_primary_is_found(stage: Stage, fail_over: Failover, first: str) -> None:
    """Whatever became of the primary, and whichever host is named first, calls are OK 5 s after the promotion.

    With synchronous replication no acknowledged call is lost.
    """
    servers = stage.servers
    order = [servers.primary, servers.standby][:: 1 if first == "primary" else -1]
    engines = stage.engines(servers.url(stage.name, order=order))
    async with replicas.replica(engines) as (_, client), onlooker.load(client) as load, probing(client) as prober:
        await prober.well_again(time.monotonic())
        promoted = await fail_over(servers)
        await prober.well_again(promoted)
        if fail_over is not killed:
            servers.standby.thaw()
            await stage.left(servers.standby)
    rows = await stage.on(servers.primary).rows("SELECT id FROM after_hours_sessions WHERE user_id LIKE 'loader %'")
    assert sorted(str(row["id"]) for row in rows) == sorted(load.sessions)


@pytest.mark.parametrize("fail_over", [frozen, read_only])
async def test_a_name_leads_to_the_new_primary(stage: Stage, fail_over: Failover) -> None:
    """When the address behind the one host of the URL changes, connections to the old address are left."""
    servers = stage.servers
    async with (
        proxy.Proxy(servers.primary.url(stage.name)) as name,
        replicas.replica(stage.engines(name.url)) as (_, client),
        probing(client) as prober,
    ):
        await prober.well_again(time.monotonic())
        await fail_over(servers)
        name.lead_to(servers.primary.url())
        await prober.well_again(time.monotonic())


async def test_a_name_that_still_leads_to_the_old_primary(stage: Stage) -> None:
    """Connections to the old primary, which is back as a standby, are not kept until the name leads elsewhere."""
    servers = stage.servers
    async with (
        proxy.Proxy(servers.primary.url(stage.name)) as name,
        replicas.replica(stage.engines(name.url)) as (_, client),
    ):
        await client.put_profile("ada")
        await switched(servers)
        refusal = await replicas.refused(client.put_profile("ada"))
        assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
        assert (await replicas.refused(client.get("ada"))).reason == "STORE_UNAVAILABLE"
        name.lead_to(servers.primary.url())
        async with probing(client) as prober:
            await prober.well_again(time.monotonic())


async def test_a_primary_that_was_replaced_is_not_used(stage: Stage) -> None:
    """An old primary that goes on, and accepts writes, does not answer while the new one is down."""
    servers = stage.servers
    async with replicas.replica(stage.engines()) as (_, client):
        await client.put_profile("ada")
        await frozen(servers)

        async def started() -> bool:
            return isinstance(await replicas.outcome(client.start("ada")), session_pb2.Session)

        async def known() -> bool:
            return isinstance(await replicas.outcome(client.get("ada")), session_service_pb2.GetSessionResponse)

        await replicas.eventually(started, within=LONGEST)
        servers.standby.thaw()
        await servers.primary.kill()
        for _ in range(10):
            assert (await replicas.refused(client.get("ada"))).reason == "STORE_UNAVAILABLE"
        await servers.primary.start()
        await replicas.eventually(known, within=LONGEST)
        assert (await client.get("ada")).session.user_id == "ada"


async def test_a_start_beside_a_silent_host(stage: Stage) -> None:
    """`serve` starts on the second host while the first one is frozen."""
    servers = stage.servers
    order = [servers.primary, servers.standby]
    await frozen(servers)
    engines = stage.engines(servers.url(stage.name, order=order, target_session_attrs="primary"))
    async with replicas.process(engines) as (_, client):
        await client.put_profile("ada")


async def test_a_start_waits_for_a_promotion(stage: Stage) -> None:
    """`serve` waits while no host accepts writes, and starts when one does."""
    servers = stage.servers
    await servers.primary.kill()
    async with proxy.Proxy(servers.standby.url(stage.name)) as standby:
        engines = stage.engines(f"{standby.url}?target_session_attrs=primary")
        process = await replicas.Process(engines.environment()).start()

        async def tried() -> bool:
            return standby.accepted > 5

        try:
            await replicas.eventually(tried, within=20)
            assert process.lines == []
            await servers.promote()
            client = await process.client()
            await client.put_profile("ada")
            await client.close()
        finally:
            await process.stop()


async def test_one_server_by_every_kind_of_url(stage: Stage, tmp_path: pathlib.Path) -> None:
    """Hosts may be sockets, before the path and in parameters; `sslmode` and `sslrootcert` hold for each host."""
    primary, authority = stage.servers.primary, keys.Authority(tmp_path)
    await primary.encrypt(*authority.server())
    account, _, port = primary.url().removeprefix("postgresql://").partition("@")[0], *primary.location.split(":")
    directory = urllib.parse.quote(pair.SOCKETS, safe="")
    both = stage.servers.url(stage.name, sslmode="verify-full", sslrootcert=str(authority.file))
    urls = {
        f"postgresql://{account}@{directory}:{port},127.0.0.1:1/{stage.name}": (False, None),
        f"postgresql://{account}@/{stage.name}?host=127.0.0.1,{directory}&port=1,{port}": (False, None),
        f"postgresql://{account}@localhost:{port}/{stage.name}?sslmode=require": (True, "127.0.0.1"),
        both: (True, "127.0.0.1"),
    }
    for url, expected in urls.items():
        await stage.left(primary)
        async with replicas.replica(stage.engines(url)) as (_, client):
            await client.put_profile("ada")
            rows = await primary.sql(_BACKENDS, stage.name)
        assert {(row["ssl"], row["address"]) for row in rows} == {expected}, url
    unknown = both.replace(authority.file.name, keys.Authority(tmp_path, "unknown").file.name)
    with pytest.raises(connections.CannotConnect, match="SSLCertVerificationError"):
        await connections.connect(unknown)
    await primary.set("ssl", "off")


_BACKENDS = """
SELECT ssl, host(client_addr) AS address FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
WHERE application_name = 'afterhours' AND datname = $1
"""


async def test_a_standby_that_falls_silent(stage: Stage) -> None:
    """While commits wait for a silent standby, calls that read are OK, and one that writes can be sent again."""
    async with replicas.replica(stage.engines()) as (_, client):
        await client.put_profile("ada")
        stage.servers.standby.freeze()
        request_id = replicas.request_id()
        starting = asyncio.create_task(replicas.refused(client.start("ada", request_id=request_id)))
        while not starting.done():
            await client.get("bob")
            await asyncio.wait({starting}, timeout=0.1)
        assert (await starting).reason == "STORE_UNAVAILABLE"
        assert await client.health() == "SERVING"
        stage.servers.standby.thaw()
        assert (await client.start("ada", request_id=request_id)).id == (await client.get("ada")).session.id


async def gives_up(engines: replicas.Engines, command: str) -> None:
    """Run a command that finds no server to write to: it says so in a line, `serve` and `migrate` after 10 s."""
    began = time.monotonic()
    process = await replicas.Process(engines.environment(), *command.split()).start()
    try:
        assert await process.wait() == 1
    finally:
        await process.stop()
    assert command not in {"serve", "migrate"} or time.monotonic() - began > 10
    [line] = [line for line in process.lines if "DATABASE_URL" in line]
    assert "no host of it accepts writes" in line
    assert command == "doctor" or process.lines == [line]


async def is_not_served(client: replicas.Client) -> None:
    """Check that calls that read are refused as well, and that health says so after 5 s."""
    began = time.monotonic()
    assert (await replicas.refused(client.put_profile("ada"))).reason == "STORE_UNAVAILABLE"
    assert (await replicas.refused(client.get("ada"))).reason == "STORE_UNAVAILABLE"

    async def not_serving() -> bool:
        return await client.health() == "NOT_SERVING"

    await replicas.eventually(not_serving, within=LONGEST + 5)
    assert time.monotonic() - began > LONGEST - 1


async def test_no_host_accepts_writes(stage: Stage) -> None:
    """While one host is read-only and the other a standby, nothing is served, and commands give up in one line."""
    servers = stage.servers
    both, standby = servers.url(stage.name), servers.standby.url(stage.name) + "?target_session_attrs=primary"
    async with replicas.replica(stage.engines()) as (_, client):
        await client.put_profile("ada")
        await servers.primary.read_only()
        commands = {"serve": both, "migrate": standby, "doctor": both, "end ada": standby}
        giving_up = [gives_up(stage.engines(url), command) for command, url in commands.items()]
        await asyncio.gather(is_not_served(client), *giving_up)
        await servers.primary.read_only(False)

        async def serving() -> bool:
            return await client.health() == "SERVING"

        await replicas.eventually(serving, within=LONGEST)
        await client.put_profile("ada")
