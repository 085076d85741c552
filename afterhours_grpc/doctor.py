"""`doctor`: looks at all that the service stands on, and says what is wrong and what to do about it."""

import collections.abc
import contextlib
import dataclasses
import datetime
import enum
import time
import typing
import uuid

import asyncpg
import redis.asyncio
import redis.exceptions

from afterhours_grpc import credentials, redis_client, settings
from afterhours_grpc.expiry import jobs
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import connections, database, schema, store

# Sessions, and timers, looked at: the soonest due.
_SAMPLE = 1000
# Seconds: a clock this far off is worth a word, and a scheduler that has not looked for this long is not there.
_OFF = 1.0
_SILENT = 5.0
_OLDEST_POSTGRES = 150000
_LAST = datetime.datetime.max.replace(tzinfo=datetime.UTC)


class Level(enum.StrEnum):
    """How bad it is; only WRONG makes the exit status 1."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` says what to do unless it is OK."""

    name: str
    level: Level
    told: str
    advice: str = ""


Findings = collections.abc.AsyncIterator[Finding]


async def examine(config: settings.Settings) -> list[Finding]:
    """Look at everything that can be looked at; what cannot be reached is a finding."""
    findings = [await _settings(config)]
    db = database.Database(config.database_url or "", connections=1)
    sessions = store.Store(db)
    client = redis_client.Server(config.redis_url).client(connections=1, timeout=2)
    try:
        if config.database_url:
            findings += [each async for each in _postgres(config.database_url)]
        usable = findings[-1].name == "schema" and findings[-1].level is Level.OK
        if usable:
            findings += [each async for each in _sessions(sessions, config)]
        try:
            findings += [each async for each in _redis(client)]
            if usable:
                findings += [each async for each in _timers(sessions, client)]
        except (redis.exceptions.RedisError, OSError) as error:
            told = f"REDIS_URL cannot be used ({type(error).__name__}): sessions end by the sweep alone, later"
            findings.append(Finding("redis", Level.WRONG, told, "check that it runs, and the URL"))
    except errors.StoreUnavailable:
        findings.append(Finding("database", Level.WRONG, "Postgres stopped answering", "look at its log"))
    except database.StatementFailed as error:
        findings.append(_refused(error.__cause__ or error))
    finally:
        await client.aclose()
        await db.close()
    return findings


async def _settings(config: settings.Settings) -> Finding:
    try:
        config.check()
        await credentials.check(config)
    except (settings.SettingsError, credentials.CredentialsError) as error:
        return Finding("settings", Level.WRONG, str(error), "set what is named")
    return Finding("settings", Level.OK, "the service can be served with them")


def _unusable(error: connections.CannotConnect) -> Finding:
    if isinstance(error.__cause__, asyncpg.ProtocolViolationError):
        return Finding(
            "database",
            Level.WRONG,
            "a pooler such as PgBouncer refuses the service's session settings",
            "connect to Postgres directly: PgBouncer in transaction mode is not supported",
        )
    told, _, advice = str(error).partition(": ")
    return Finding("database", Level.WRONG, told, advice)


def _refused(error: BaseException) -> Finding:
    told = f"its tables cannot be read ({type(error).__name__})"
    return Finding("schema", Level.WRONG, told, "check what the role of DATABASE_URL may do, and Postgres' log")


async def _postgres(url: str) -> Findings:
    try:
        connection = await connections.connect(url)
    except connections.CannotConnect as error:
        yield _unusable(error)
        return
    try:
        with connections.explained():
            yield await _server(connection)
    except connections.CannotConnect as error:
        connection.terminate()
        yield _unusable(error)
        return
    try:
        found = await schema.version(connection)
    except schema.SchemaError as error:
        yield Finding("schema", Level.WRONG, str(error), "create another database, and run `afterhours-grpc migrate`")
        return
    except connections.CannotConnect as error:
        yield _refused(error.__cause__ or error)
        return
    finally:
        connection.terminate()
    if found < schema.newest():
        told = f"at version {found}, and this release needs {schema.newest()}"
        yield Finding("schema", Level.WRONG, told, "run `afterhours-grpc migrate`")
    else:
        yield Finding("schema", Level.OK, f"at version {found}")


async def _server(connection: asyncpg.Connection) -> Finding:
    version = int(await connection.fetchval("SHOW server_version_num"))
    told = f"PostgreSQL {await connection.fetchval('SHOW server_version')}"
    if version < _OLDEST_POSTGRES:
        return Finding("database", Level.WRONG, told, "use PostgreSQL 15 or newer")
    if await connection.fetchval("SHOW enable_seqscan") != "off":
        advice = "connect to Postgres directly: PgBouncer in transaction mode is not supported"
        return Finding("database", Level.WRONG, f"{told}, behind a pooler that drops session settings", advice)
    return Finding("database", Level.OK, told)


async def _sessions(sessions: store.Store, config: settings.Settings) -> Findings:
    at = await sessions.clock()
    yield _clock("clock", at.timestamp() - time.time(), "this machine's clock")
    overdue, longest = await sessions.overdue()
    told = f"{overdue} overdue and not closed yet, for at most {longest.total_seconds():.1f} s"
    if longest > config.reconcile_interval + datetime.timedelta(seconds=1):
        yield Finding("overdue", Level.WRONG, told, "no server sweeps: start one by `afterhours-grpc serve`")
    else:
        yield Finding("overdue", Level.OK, told)


def _clock(name: str, offset: float, whose: str) -> Finding:
    told = f"{whose} is {abs(offset):.3f} s {'behind' if offset > 0 else 'ahead of'} the database's"
    if abs(offset) > _OFF:
        return Finding(name, Level.WARNING, told, "sessions end by the database's all the same; set clocks by NTP")
    return Finding(name, Level.OK, told)


async def _redis(client: redis.asyncio.Redis) -> Findings:
    await client.ping()
    async for finding in _use(client):
        yield finding
    try:
        policy = str((await client.config_get("maxmemory-policy"))["maxmemory-policy"])
        kept = await client.config_get("appendonly", "save")
    except redis.exceptions.ResponseError:
        yield Finding("redis", Level.WARNING, "its configuration is hidden", "make sure that it evicts nothing")
        return
    if policy.startswith("allkeys"):
        told = f"maxmemory-policy {policy} evicts timers"
        yield Finding("redis eviction", Level.WRONG, told, "set maxmemory-policy noeviction")
    else:
        yield Finding("redis eviction", Level.OK, f"maxmemory-policy {policy} evicts no timer")
    if kept["appendonly"] == "no" and not kept["save"]:
        told = "nothing is persisted: after a restart timers are missing until the sweep sets them again"
        yield Finding("redis persistence", Level.WARNING, told, "set appendonly yes")
    else:
        yield Finding("redis persistence", Level.OK, f"appendonly {kept['appendonly']}, save {kept['save'] or 'never'}")


async def _use(client: redis.asyncio.Redis) -> Findings:
    """Check whether the service can use it at all."""
    with contextlib.suppress(redis.exceptions.ResponseError):
        if (await client.info("replication"))["role"] != "master":
            yield Finding("redis role", Level.WRONG, "it is a replica", "set REDIS_URL to its primary")
    try:
        await client.eval("return 1", 0)
    except redis.exceptions.ResponseError:
        told = "its user may not run scripts, so that no timer fires: sessions end by the sweep alone, later"
        yield Finding("redis scripts", Level.WRONG, told, "allow the commands EVALSHA, EVAL and SCRIPT LOAD")


async def _timers(sessions: store.Store, client: redis.asyncio.Redis) -> Findings:
    seconds, micros = await client.time()
    now = await sessions.clock()
    at = now.timestamp()
    yield _clock("redis clock", at - (seconds + micros / 1e6), "Redis' clock")

    passes: typing.Any = await client.zrange(jobs.PASSES, 0, -1, withscores=True)
    ages = sorted(at - score for _, score in passes)
    if not ages or ages[0] > _SILENT:
        told = f"the last look for due sessions was {ages[0]:.0f} s ago" if ages else "no server has looked yet"
        yield Finding("scheduler", Level.WRONG, told, "start a server by `afterhours-grpc serve`")
    else:
        dead = sum(age > _SILENT for age in ages)
        told = f"{len(ages) - dead} looking for due sessions, the last {max(0.0, ages[0]):.1f} s ago"
        if dead:
            yield Finding("scheduler", Level.WARNING, f"{told}; {dead} fell silent", "did a server die?")
        else:
            yield Finding("scheduler", Level.OK, told)

    members = typing.cast("list[str]", await client.zrange(jobs.EXPIRE.key, 0, _SAMPLE - 1))
    timed = [jobs.EXPIRE.session_id(member) for member in members]
    active = await sessions.still_active([session.SessionId(each) for each in timed if each])
    stale = sum(each not in active for each in timed)
    due = await sessions.active_due(now, session.SessionId(uuid.UUID(int=0)), _LAST, _SAMPLE)
    soonest = [jobs.EXPIRE.job_id(id) for id, _ in due]
    scores = await client.zmscore(jobs.EXPIRE.key, soonest) if soonest else []
    missing = sum(score is None for score in scores)
    told = f"of the {_SAMPLE} soonest, {missing} missing and {stale} stale"
    if missing or stale:
        yield Finding("timers", Level.WRONG, told, "a running server mends them within a sweep: look again after one")
    else:
        yield Finding("timers", Level.OK, told)
