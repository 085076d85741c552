"""`doctor` finds what is wrong, says what to do, and ends with exit status 1 only then."""

import asyncio
import collections.abc
import contextlib
import json
import pathlib
import shutil
import socket
import tempfile
import typing

import pytest
import replicas
from redis import asyncio as redis

from afterhours_grpc.embedded import redis as embedded_redis

_OURS = (
    "default_transaction_isolation, enable_seqscan, jit, statement_timeout, lock_timeout,"
    " idle_in_transaction_session_timeout"
)


async def doctor(environment: dict[str, str]) -> tuple[int, dict[str, dict[str, str]]]:
    """Run it; give the exit status and the findings by name."""
    process = await replicas.Process(environment, "doctor", "--json").start()
    status = await process.wait()
    findings = json.loads("\n".join(process.lines))
    return status, {each["name"]: each for each in findings}


def wrong(findings: dict[str, dict[str, str]]) -> set[str]:
    """Name what is wrong; each of it has advice."""
    assert all(each["advice"] for each in findings.values() if each["level"] != "ok")
    return {name for name, each in findings.items() if each["level"] == "wrong"}


async def test_a_healthy_service(engines: replicas.Engines) -> None:
    """With a server running nothing is wrong, all is looked at, and the readable form says the same."""
    async with replicas.process(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        status, findings = await doctor(engines.environment())
        assert (status, wrong(findings)) == (0, set())
        looked_at = {"settings", "database", "schema", "clock", "overdue", "redis eviction", "redis persistence"}
        assert set(findings) == looked_at | {"redis clock", "scheduler", "timers"}
        readable = await replicas.Process(engines.environment(), "doctor").start()
        assert await readable.wait() == 0
        assert len(readable.lines) == len(findings)
        assert all(line.startswith("ok") for line in readable.lines)


async def test_no_server_is_running(engines: replicas.Engines) -> None:
    """Without a server the scheduler is silent, overdue sessions stay open, and timers are missing."""
    async with replicas.process(engines, AFTERHOURS_DURATIONS="2s,15m") as (process, client):
        for user in ("ada", "bob"):
            await client.put_profile(user)
        await client.start("ada", 2)
        await client.start("bob")
        await process.stop()
    await engines.rows("UPDATE after_hours_sessions SET started_at = started_at - interval '1 min',"
                       " expires_at = expires_at - interval '1 min' WHERE user_id = 'ada'")  # fmt: skip
    async with redis.Redis.from_url(engines.redis_url) as client_of_redis:
        await client_of_redis.flushall()
    status, findings = await doctor(engines.environment())
    assert (status, wrong(findings)) == (1, {"scheduler", "overdue", "timers"})
    assert "1 overdue" in findings["overdue"]["told"]
    assert "1 missing" in findings["timers"]["told"]


async def test_nothing_is_there() -> None:
    """Without settings, database and Redis each is named, with what to do."""
    status, findings = await doctor({"REDIS_URL": "redis://127.0.0.1:1"})
    assert (status, wrong(findings)) == (1, {"settings", "redis"})
    unreachable = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing", "REDIS_URL": "redis://127.0.0.1:1"}
    status, findings = await doctor(unreachable)
    assert (status, wrong(findings)) == (1, {"settings", "database", "redis"})


async def test_files_that_no_server_would_take(tmp_path: pathlib.Path) -> None:
    """A key set, certificates and a list of callers are looked at as serve does."""
    (tmp_path / "empty").touch()
    empty = str(tmp_path / "empty")
    tls = {f"AFTERHOURS_TLS_{each}": empty for each in ("CERT", "KEY", "CLIENT_CA")}
    nowhere = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing", "AFTERHOURS_FUZZ_KEY": replicas.FUZZ_KEY}
    for bad in (
        {"AFTERHOURS_JWKS_URL": f"file://{empty}"},
        {"AFTERHOURS_AUTH": "none", **tls},
        {"AFTERHOURS_AUTH": "mtls", "AFTERHOURS_MTLS_ALLOW": empty, **tls},
    ):
        _, findings = await doctor({**nowhere, "REDIS_URL": "redis://127.0.0.1:1", **bad})
        assert findings["settings"]["level"] == "wrong"
        assert any(name in findings["settings"]["told"] for name in ("AFTERHOURS_JWKS_URL", empty))


async def test_an_old_schema(engines: replicas.Engines) -> None:
    """A schema that is older than needed is wrong."""
    await engines.rows("DROP TABLE after_hours_schema")
    status, findings = await doctor(engines.environment())
    assert (status, wrong(findings)) == (1, {"schema"})
    assert "migrate" in findings["schema"]["advice"]


async def test_a_role_without_rights_and_a_job_that_is_no_text(engines: replicas.Engines) -> None:
    """What cannot be read, in Postgres or in Redis, is a finding like any other."""
    place = engines.database_url.rpartition("@")[2]
    await engines.rows("CREATE ROLE stranger LOGIN PASSWORD 'stranger'")
    async with redis.Redis.from_url(engines.redis_url) as client:
        await client.zadd("afterhours:jobs", {b"\xff": 1})
    try:
        (status, findings), (_, others) = await asyncio.gather(
            doctor(engines.environment(DATABASE_URL=f"postgresql://stranger:stranger@{place}")),
            doctor(engines.environment()),
        )
    finally:
        await engines.rows("DROP ROLE stranger")
    assert (status, wrong(findings)) == (1, {"schema"})
    assert "InsufficientPrivilegeError" in findings["schema"]["told"]
    assert wrong(others) == {"scheduler", "timers"}
    assert "1 stale" in others["timers"]["told"]


@pytest.mark.store
async def test_a_database_that_cannot_store_every_user_id(engines: replicas.Engines) -> None:
    """One whose encoding is not UTF8 is refused by migrate and by serve, and doctor says so."""
    await engines.rows("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    environment = engines.environment(DATABASE_URL=engines.database_url.rpartition("/")[0] + "/latin")
    try:
        for words in (("migrate",), ("serve",)):
            process = await replicas.Process(environment, *words).start()
            assert await process.wait() == 1
            assert [line for line in process.lines if "LATIN1" in line and "UTF8" in line] == process.lines != []
        status, findings = await doctor(environment)
    finally:
        await engines.rows("DROP DATABASE latin WITH (FORCE)")
    assert (status, wrong(findings)) == (1, {"schema"})
    assert "LATIN1" in findings["schema"]["told"]


async def test_a_redis_that_evicts_and_forgets(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """A Redis that may evict timers is wrong; one that persists nothing is worth a warning."""
    settings = {"maxmemory-policy": "allkeys-lru", "appendonly": "no"}
    with embedded_redis.Redis(tmp_path, settings=settings) as other:
        environment = engines.environment(REDIS_URL=other.url)
        async with replicas.process(replicas.Engines(engines.database_url, other.url)):
            status, findings = await doctor(environment)
        assert (status, wrong(findings)) == (1, {"redis eviction"})
        assert findings["redis persistence"]["level"] == "warning"


@contextlib.asynccontextmanager
async def pgbouncer(engines: replicas.Engines, folder: pathlib.Path, extra: str) -> collections.abc.AsyncIterator[str]:
    """Run a PgBouncer in transaction mode before the database."""
    credentials, _, place = engines.database_url.removeprefix("postgresql://").partition("@")
    user, _, password = credentials.partition(":")
    address, _, name = place.partition("/")
    host, _, port = address.partition(":")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        own = probe.getsockname()[1]
    (folder / "users").write_text(f'"{user}" "{password}"\n')
    (folder / "ini").write_text(
        f"[databases]\n{name} = host={host} port={port} dbname={name} user={user} password={password}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {own}\nauth_type = scram-sha-256\n"
        f"auth_file = {folder}/users\npool_mode = transaction\nunix_socket_dir =\n{extra}\n"
    )
    for path in (folder, folder / "users", folder / "ini"):
        path.chmod(0o755)
    program = typing.cast("str", shutil.which("pgbouncer", path="/usr/sbin:/usr/bin"))
    process = await asyncio.create_subprocess_exec(
        program, "-u", "nobody", str(folder / "ini"), stderr=asyncio.subprocess.DEVNULL
    )

    async def listening() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", own)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await replicas.eventually(listening, within=5)
        yield f"postgresql://{user}:{password}@127.0.0.1:{own}/{name}"
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(not shutil.which("pgbouncer", path="/usr/sbin:/usr/bin"), reason="Debian's pgbouncer is not here")
@pytest.mark.parametrize("extra", ["", f"ignore_startup_parameters = {_OURS}"])
async def test_a_pooler_in_transaction_mode(engines: replicas.Engines, extra: str) -> None:
    """PgBouncer in transaction mode is not supported, and is said to be, whether it refuses settings or drops them."""
    # Not below tmp_path, which is closed to the user that it runs as.
    with tempfile.TemporaryDirectory() as folder:
        async with pgbouncer(engines, pathlib.Path(folder), extra) as url:
            status, findings = await doctor(engines.environment(DATABASE_URL=url))
    assert status == 1
    assert "database" in wrong(findings)
    assert "PgBouncer" in findings["database"]["advice"]
