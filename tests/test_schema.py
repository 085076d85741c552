"""The schema: what migrations make is what the statements were written for, and it refuses nonsense."""

# ruff: noqa: S608 - statements are composed of constants

import typing

import asyncpg
import pytest
import replicas
import sqlalchemy as sa
from sqlalchemy.ext import asyncio as sa_asyncio

from afterhours_grpc.embedded import postgres
from afterhours_grpc.store import schema, tables

pytestmark = pytest.mark.store

OF_THE_SCHEMA = "c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE $1 || '%'"
CATALOGUE = {
    "relations": f"SELECT c.relname, c.relkind, c.relpersistence FROM pg_class AS c WHERE {OF_THE_SCHEMA}",
    "columns": f"""
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull,
            a.attidentity, a.attgenerated, a.attcollation::regcollation::text AS collation,
            pg_get_expr(d.adbin, d.adrelid) AS default
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relkind = 'r' AND {OF_THE_SCHEMA}
    """,
    # Without NOT NULLs, which are constraints with names from Postgres 18 on; `columns` has them.
    "constraints": f"""
        SELECT c.relname, n.conname, n.contype, n.convalidated, pg_get_constraintdef(n.oid) AS definition
        FROM pg_class AS c JOIN pg_constraint AS n ON n.conrelid = c.oid
        WHERE n.contype <> 'n' AND {OF_THE_SCHEMA}
    """,
    "indexes": f"""
        SELECT c.relname, pg_get_indexdef(i.indexrelid) AS definition, i.indisvalid
        FROM pg_class AS c JOIN pg_index AS i ON i.indrelid = c.oid WHERE {OF_THE_SCHEMA}
    """,
    "triggers": f"""
        SELECT c.relname, pg_get_triggerdef(t.oid) AS definition
        FROM pg_class AS c JOIN pg_trigger AS t ON t.tgrelid = c.oid AND NOT t.tgisinternal WHERE {OF_THE_SCHEMA}
    """,
}


async def described(url: str) -> dict[str, list[tuple[typing.Any, ...]]]:
    """Tell all that a database holds but rows and the version of the schema; the order of columns is no matter."""
    connection = await asyncpg.connect(url)
    try:
        return {
            name: sorted((tuple(row) for row in await connection.fetch(query, schema.VERSION_TABLE)), key=repr)
            for name, query in CATALOGUE.items()
        }
    finally:
        await connection.close()


async def test_migrations_make_what_tables_say(engines: replicas.Engines, postgres_server: postgres.Postgres) -> None:
    """A database that was migrated has the columns, constraints and indexes of `tables`, and nothing else."""
    assert await schema.current(engines.database_url) == schema.newest()
    place = postgres_server.url.rpartition("/")[0]
    administrator = await asyncpg.connect(f"{place}/postgres")
    await administrator.execute("CREATE DATABASE created TEMPLATE template0")
    try:
        engine = sa_asyncio.create_async_engine(
            sa.make_url(f"{place}/created").set(drivername="postgresql+asyncpg"), poolclass=sa.NullPool
        )
        async with engine.begin() as connection:
            await connection.run_sync(tables.metadata.create_all)
        await engine.dispose()
        created, migrated = await described(f"{place}/created"), await described(engines.database_url)
    finally:
        await administrator.execute("DROP DATABASE created WITH (FORCE)")
        await administrator.close()

    for name in CATALOGUE:
        assert migrated[name] == created[name]
    assert {row[0] for row in migrated["columns"]} == set(tables.metadata.tables)
    assert all(migrated[name] for name in ("columns", "constraints", "indexes"))


# SQL of a session that is active and well.
ACTIVE = {
    "user_id": "'ada'",
    "started_at": "now()",
    "expires_at": "now() + interval '15 min'",
    "ended_at": "NULL",
    "end_reason": "NULL",
    "latitude": "52.5",
    "longitude": "13.4",
    "fuzzed_latitude": "52.51",
    "fuzzed_longitude": "13.41",
    "fuzz_radius_meters": "1000",
    "fuzz_key_version": "1",
    "fuzz_cell": "7",
}
# And of one that its user ended.
ENDED = {**ACTIVE, "ended_at": "now() + interval '5 min'", "end_reason": "'USER'"}


def insert(session: dict[str, str], **changes: str) -> str:
    """Make the statement that stores a session, with changes."""
    row = {**session, **changes}
    return f"INSERT INTO after_hours_sessions ({', '.join(row)}) VALUES ({', '.join(row.values())})"


NONSENSE = [
    ("after_hours_sessions_active", ACTIVE, {"user_id": "'eve'"}),
    ("after_hours_sessions_ends_for_a_reason", ENDED, {"end_reason": "NULL"}),
    ("after_hours_sessions_ends_for_a_reason", ACTIVE, {"end_reason": "'USER'"}),
    ("after_hours_sessions_end_reason", ENDED, {"end_reason": "'BORED'"}),
    ("after_hours_sessions_end_reason", ENDED, {"end_reason": "''"}),
    ("after_hours_sessions_end_reason", ENDED, {"end_reason": "'user'"}),
    ("after_hours_sessions_expires_on_time", ENDED, {"end_reason": "'EXPIRED'"}),
    ("after_hours_sessions_ends_within_its_time", ENDED, {"ended_at": "now() - interval '1 us'"}),
    ("after_hours_sessions_ends_within_its_time", ENDED, {"ended_at": "now() + interval '15 min 1 us'"}),
    ("after_hours_sessions_ends_within_its_time", ENDED, {"ended_at": "'infinity'"}),
    ("after_hours_sessions_exact_location", ACTIVE, {"latitude": "NULL", "longitude": "NULL"}),
    ("after_hours_sessions_exact_location", ACTIVE, {"latitude": "NULL"}),
    ("after_hours_sessions_exact_location", ENDED, {"longitude": "NULL"}),
    ("after_hours_sessions_expires_after_start", ACTIVE, {"expires_at": "now()"}),
    ("after_hours_sessions_expires_after_start", ACTIVE, {"expires_at": "now() - interval '1 h'"}),
    ("after_hours_sessions_user_id_length", ACTIVE, {"user_id": "''"}),
    ("after_hours_sessions_user_id_length", ACTIVE, {"user_id": "repeat('x', 256)"}),
    *(
        ("after_hours_sessions_coordinates", session, {column: value})
        for session in (ACTIVE, ENDED)
        for column, values in (
            ("latitude", ("'NaN'", "'Infinity'", "'-Infinity'", "90.0001", "-90.0001")),
            ("longitude", ("'NaN'", "'Infinity'", "'-Infinity'", "180.0001", "-180.0001")),
            ("fuzzed_latitude", ("'NaN'", "'Infinity'", "90.0001")),
            ("fuzzed_longitude", ("'NaN'", "'-Infinity'", "-180.0001")),
        )
        for value in values
    ),
    *(
        (None, ACTIVE, {column: "NULL"})
        for column in ACTIVE
        if column not in {"ended_at", "end_reason", "latitude", "longitude"}
    ),
]


async def refused(connection: asyncpg.Connection, statement: str) -> asyncpg.IntegrityConstraintViolationError:
    """Give what Postgres refuses a statement for; it must, and it goes on as if nothing had been."""
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        async with connection.transaction():
            await connection.execute(statement)
    return caught.value


async def test_nonsense_is_refused(engines: replicas.Engines) -> None:
    """No insert stores a session that is neither active nor properly ended, that is nowhere, or a user's second one."""
    connection = await asyncpg.connect(engines.database_url)
    try:
        await connection.execute(insert(ACTIVE, user_id="'eve'"))
        found = [
            (refusal.constraint_name, refusal.sqlstate)
            for refusal in [await refused(connection, insert(row, **changes)) for _, row, changes in NONSENSE]
        ]
        assert len(await connection.fetch("SELECT FROM after_hours_sessions")) == 1
    finally:
        await connection.close()
    unique, check, null = "23505", "23514", "23502"
    assert found == [
        (name, null if name is None else unique if name == "after_hours_sessions_active" else check)
        for name, _, _ in NONSENSE
    ]


async def test_sense_is_stored(engines: replicas.Engines) -> None:
    """Sessions that are well are stored: at the edges of time and place, ended at once, expired, and erased."""
    statements = [
        insert(ACTIVE),
        insert(ENDED),
        insert(ENDED, user_id="repeat('🦉', 255)"),
        insert(ENDED, ended_at="now()"),
        insert(ENDED, ended_at="now() + interval '15 min'"),
        insert(ENDED, ended_at="now() + interval '15 min'", end_reason="'EXPIRED'"),
        *(insert(ENDED, end_reason=f"'{reason}'") for reason in ("PROFILE_REMOVED", "INELIGIBLE", "ADMIN")),
        insert(ENDED, latitude="NULL", longitude="NULL"),
        insert(ACTIVE, user_id="'bob'", latitude="90", longitude="-180"),
        insert(ACTIVE, user_id="'cyd'", fuzzed_latitude="-90", fuzzed_longitude="180"),
    ]
    for statement in statements:
        await engines.rows(statement)
    assert len(await engines.rows("SELECT DISTINCT id FROM after_hours_sessions")) == len(statements)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("ended_at = NULL, end_reason = NULL WHERE ended_at IS NOT NULL", "after_hours_sessions_active"),
        ("end_reason = NULL WHERE ended_at IS NOT NULL", "after_hours_sessions_ends_for_a_reason"),
        ("ended_at = started_at WHERE ended_at IS NULL", "after_hours_sessions_ends_for_a_reason"),
        ("end_reason = 'EXPIRED' WHERE ended_at IS NOT NULL", "after_hours_sessions_expires_on_time"),
        (
            "expires_at = ended_at - interval '1 us' WHERE ended_at IS NOT NULL",
            "after_hours_sessions_ends_within_its_time",
        ),
        ("expires_at = started_at WHERE ended_at IS NULL", "after_hours_sessions_expires_after_start"),
        ("latitude = NULL, longitude = NULL WHERE ended_at IS NULL", "after_hours_sessions_exact_location"),
        ("latitude = 'NaN'", "after_hours_sessions_coordinates"),
    ],
)
async def test_no_session_becomes_nonsense(engines: replicas.Engines, change: str, constraint: str) -> None:
    """What is refused as an insert is refused as an update too: an ended session is not revived beside another one."""
    await engines.rows(insert(ENDED))
    await engines.rows(insert(ACTIVE))
    connection = await asyncpg.connect(engines.database_url)
    try:
        refusal = await refused(connection, f"UPDATE after_hours_sessions SET {change}")
    finally:
        await connection.close()
    assert refusal.constraint_name == constraint


async def test_answers_belong_to_sessions(engines: replicas.Engines) -> None:
    """A kept answer is of a session that there is, is kept once for a caller, method and id, and goes with it."""
    await engines.rows(insert(ENDED))
    keep = (
        "INSERT INTO after_hours_requests"
        " (caller, method, request_id, fingerprint, session_id, expires_at, answered_at)"
        " SELECT 'c', {method}, '123e4567-e89b-12d3-a456-426614174000', '\\x00', {session}, now(), now()"
        " FROM after_hours_sessions"
    )
    connection = await asyncpg.connect(engines.database_url)
    try:
        await connection.execute(keep.format(method="'StartSession'", session="id"))
        await connection.execute(keep.format(method="'EndSession'", session="id"))
        again = await refused(connection, keep.format(method="'EndSession'", session="id"))
        orphan = await refused(connection, keep.format(method="'ExtendSession'", session="gen_random_uuid()"))
        assert again.constraint_name == "after_hours_requests_pkey"
        assert orphan.constraint_name == "after_hours_requests_session"
        await connection.execute("DELETE FROM after_hours_sessions")
        assert await connection.fetch("SELECT FROM after_hours_requests") == []
    finally:
        await connection.close()


@pytest.mark.parametrize("user_id", ["''", "repeat('x', 256)", "NULL"])
async def test_a_profile_is_somebody_s(engines: replicas.Engines, user_id: str) -> None:
    """A profile without a user, or whose user's id is too long, is refused."""
    connection = await asyncpg.connect(engines.database_url)
    put = "INSERT INTO after_hours_profiles (user_id, identity_verified, location_consent) VALUES ({}, true, true)"
    try:
        await connection.execute(put.format("repeat('🦉', 255)"))
        refusal = await refused(connection, put.format(user_id))
    finally:
        await connection.close()
    assert refusal.constraint_name == (None if user_id == "NULL" else "after_hours_profiles_user_id_length")
