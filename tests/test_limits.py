"""The latest time at which a session may expire, and rows that are odder than that: nobody else notices them."""

import asyncio
import datetime
import typing

import alembic.command
import asyncpg
import pytest
import replicas
import sqlalchemy as sa
from afterhours.v1 import session_event_pb2, session_pb2, session_service_pb2
from sqlalchemy.ext import asyncio as sa_asyncio

from afterhours_grpc.embedded import postgres
from afterhours_grpc.store import migration, schema

pytestmark = pytest.mark.store

LIMIT = datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC)
LAST = LIMIT - datetime.timedelta(microseconds=1)
QUARTER = datetime.timedelta(minutes=15)


async def expires(engines: replicas.Engines, user_id: str) -> datetime.datetime:
    """Read when the session of a user expires."""
    [row] = await engines.rows("SELECT expires_at FROM after_hours_sessions WHERE user_id = $1", user_id)
    found: datetime.datetime = row["expires_at"]
    return found


async def expire_at(engines: replicas.Engines, user_id: str, at: datetime.datetime) -> None:
    """Have the session of a user expire at another time, as many extensions would."""
    await engines.rows("UPDATE after_hours_sessions SET expires_at = $2 WHERE user_id = $1", user_id, at)


def fields(refusal: replicas.Refusal) -> list[str]:
    """Return the fields that a call was refused for as INVALID_REQUEST."""
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    return [each.field for each in refusal.details["BadRequest"].field_violations]


@pytest.mark.parametrize("gates", ["", "consent"])
async def test_an_extension_past_the_year_9998(engines: replicas.Engines, gates: str) -> None:
    """It is refused by its field, applies nothing, and fails no other call of its batch; one that ends before is OK."""
    settings = {"AFTERHOURS_DURATIONS": "15m,366d", "AFTERHOURS_GATES": gates}
    async with replicas.replica(engines, **settings) as (_, client):
        for user_id in ("ada", "bob", "eve"):
            await client.put_profile(user_id, location_consent=True)
            await client.start(user_id)
        await expire_at(engines, "ada", LIMIT - QUARTER)
        await expire_at(engines, "bob", LAST - QUARTER)
        before = await expires(engines, "eve")
        for seconds in (900, 366 * 86400):
            told = await replicas.refused(client.extend("ada", seconds))
            assert fields(told) == ["additional_duration"]
            assert "9998" in told.message
        calls = [client.extend("ada", request_id=replicas.request_id()), client.extend("bob"), client.extend("eve")]
        ada, bob, eve = await asyncio.gather(*map(replicas.outcome, calls))
        assert isinstance(ada, replicas.Refusal)
        assert fields(ada) == ["additional_duration"]
        assert isinstance(bob, session_pb2.Session)
        assert bob.expire_time.ToDatetime(datetime.UTC) == LAST
        assert isinstance(eve, session_pb2.Session)
        assert eve.expire_time.ToDatetime(datetime.UTC) == before + QUARTER
        assert await expires(engines, "ada") == LIMIT - QUARTER
        assert (await client.get("ada")).active
        assert (await client.end("ada")).end_reason == session_pb2.END_REASON_USER
        assert (await replicas.refused(client.extend("ada"))).reason == "NO_ACTIVE_SESSION"
        assert await engines.rows("SELECT FROM after_hours_requests") == []


async def test_a_start_past_the_year_9998(engines: replicas.Engines) -> None:
    """On a database whose clock has come that far, a start that would expire past it is refused, and no other call."""
    async with replicas.replica(engines) as (service, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        service.database.clock_offset = LIMIT - datetime.timedelta(minutes=20) - datetime.datetime.now(datetime.UTC)
        told, bob = await asyncio.gather(*map(replicas.outcome, (client.start("ada", 1800), client.start("bob", 900))))
        assert isinstance(told, replicas.Refusal)
        assert fields(told) == ["duration"]
        assert isinstance(bob, session_pb2.Session)
        assert not (await client.get("ada")).active
        assert (await client.end("bob")).id == bob.id


@pytest.mark.parametrize(
    "change", ["expires_at = '9999-01-01Z'", "expires_at = 'infinity'", "started_at = '0002-01-01Z BC'"]
)
async def test_the_schema_refuses_times_out_of_range(engines: replicas.Engines, change: str) -> None:
    """No statement, and no hand at a console, stores a time that readers cannot represent."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await engines.rows(f"UPDATE after_hours_sessions SET {change}")  # noqa: S608 - of this module
        assert caught.value.constraint_name == "after_hours_sessions_within_time"


# An ended session, and the event of it, as a release that knew no limit could leave them.
_OLD = [
    "ALTER TABLE after_hours_sessions DROP CONSTRAINT after_hours_sessions_within_time",
    """INSERT INTO after_hours_sessions (user_id, started_at, expires_at, ended_at, end_reason, latitude, longitude,
        fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
    VALUES ('old', now() - interval '2 d', '20000-01-01Z', now() - interval '2 d', 'USER', 1, 2, 1, 2, 1000, 1, 1)""",
    """ALTER TABLE after_hours_sessions ADD CONSTRAINT after_hours_sessions_within_time
        CHECK (expires_at < '9999-01-01Z') NOT VALID""",
    """INSERT INTO after_hours_outbox (type, happened_at, session_id, user_id, started_at, expires_at)
    SELECT 'EXTENDED', now(), id, user_id, started_at, expires_at FROM after_hours_sessions WHERE user_id = 'old'""",
]


async def events(watching: typing.Any, count: int) -> list[tuple[int, str]]:
    """Read the types and users of the next events of a watch, without heartbeats."""
    found: list[tuple[int, str]] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            event = (await watching.read()).event
            if event.type != session_event_pb2.SESSION_EVENT_TYPE_HEARTBEAT:
                found.append((event.type, event.session.user_id))
    return found


async def test_old_rows_beyond_the_limit(engines: replicas.Engines) -> None:
    """A session that ended before there was a limit is listed, watched and erased as any other, and fails nobody's."""
    settings = {"AFTERHOURS_EXACT_LOCATION_RETENTION": "1d", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with replicas.replica(engines, **settings) as (_, client):
        await client.put_profile("ada")
        watching: typing.Any = client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest())
        await watching.read()
        for statement in _OLD:
            await engines.rows(statement)
        await client.start("ada")
        extended, started = session_event_pb2.SESSION_EVENT_TYPE_EXTENDED, session_event_pb2.SESSION_EVENT_TYPE_STARTED
        assert sorted(await events(watching, 2)) == [(started, "ada"), (extended, "old")]
        watching.cancel()
        history = session_service_pb2.ListSessionsRequest(user_id="old")
        [old] = (await client.sessions.ListSessions(history)).sessions
        assert old.expire_time.ToDatetime(datetime.UTC) == LAST

        async def erased() -> bool:
            return not await engines.rows("SELECT FROM after_hours_sessions WHERE user_id = 'old' AND latitude > 0")

        await replicas.eventually(erased, within=5)


async def test_what_only_a_newer_release_knows(engines: replicas.Engines) -> None:
    """A reason or a type that a newer release wrote, on the same database, is unspecified, and fails nobody's call."""
    async with replicas.replica(engines) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
            await client.start(user_id)
        watching: typing.Any = client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest())
        await watching.read()
        for statement in (
            "ALTER TABLE after_hours_sessions DROP CONSTRAINT after_hours_sessions_end_reason",
            "ALTER TABLE after_hours_outbox DROP CONSTRAINT after_hours_outbox_type",
            "ALTER TABLE after_hours_events DROP CONSTRAINT after_hours_events_type",
            "UPDATE after_hours_sessions SET ended_at = started_at, end_reason = 'BORED' WHERE user_id = 'ada'",
            """INSERT INTO after_hours_outbox
                (type, happened_at, session_id, user_id, started_at, expires_at, end_reason)
            SELECT 'MOVED', now(), id, user_id, started_at, expires_at, 'BORED' FROM after_hours_sessions
            WHERE user_id = 'ada'""",
        ):
            await engines.rows(statement)
        await client.end("bob")
        ended = session_event_pb2.SESSION_EVENT_TYPE_ENDED
        assert sorted(await events(watching, 2)) == [(0, "ada"), (ended, "bob")]
        watching.cancel()
        [ada] = (await client.sessions.ListSessions(session_service_pb2.ListSessionsRequest(user_id="ada"))).sessions
        assert (ada.state, ada.end_reason) == (session_pb2.SESSION_STATE_ENDED, session_pb2.END_REASON_UNSPECIFIED)


async def _migrated_to(url: str, version: str) -> None:
    """Bring an empty database to a version of the schema."""

    def upgrade(connection: sa.Connection) -> None:
        settings = migration.config()
        settings.attributes["connection"] = connection
        alembic.command.upgrade(settings, version)

    engine = sa_asyncio.create_async_engine(
        sa.make_url(url).set(drivername="postgresql+asyncpg"), poolclass=sa.NullPool
    )
    async with engine.begin() as connection:
        await connection.run_sync(upgrade)
    await engine.dispose()


async def test_the_migration_brings_active_sessions_within_the_limit(
    engines: replicas.Engines, postgres_server: postgres.Postgres
) -> None:
    """A session that was extended past the limit before there was one can be read and ended after the migration."""
    place = postgres_server.url.rpartition("/")[0]
    old = replicas.Engines(f"{place}/limits", engines.redis_url)
    await engines.rows("CREATE DATABASE limits TEMPLATE template0")
    try:
        await _migrated_to(old.database_url, "0003")
        await old.rows(
            """INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
                fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell, warn_at)
            VALUES ('ada', now(), '20000-01-01Z', 1, 2, 1, 2, 1000, 1, 1, '19999-01-01Z')"""
        )
        await schema.migrate(old.database_url)
        async with replicas.replica(old) as (_, client):
            assert (await client.get("ada")).session.expire_time.ToDatetime(datetime.UTC) == LAST
            listed = await client.sessions.ListActiveSessions(session_service_pb2.ListActiveSessionsRequest())
            assert [each.user_id for each in listed.sessions] == ["ada"]
            assert (await client.end("ada")).end_reason == session_pb2.END_REASON_USER
    finally:
        await engines.rows("DROP DATABASE limits WITH (FORCE)")
