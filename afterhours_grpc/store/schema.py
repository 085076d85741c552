"""The version of the schema: brought to the newest, and checked before the service runs on it."""

import asyncio
import pathlib

import alembic.command
import alembic.config
import alembic.script
import asyncpg
import sqlalchemy as sa
import sqlalchemy.exc
from sqlalchemy.ext import asyncio as sa_asyncio

from afterhours_grpc import failpoints
from afterhours_grpc.store import connections

VERSION_TABLE = "after_hours_schema"
# Seconds that a migration waits for a lock, its own or a table's, rather than hold up the calls behind it.
LOCK_TIMEOUT = 10
# A migration may take longer than a call, and sets its own limits. One whose process stops in the middle of it must not
# keep its locks on the tables.
_SESSION_SETTINGS = {
    **connections.KEEPALIVE_SETTINGS,
    "application_name": "afterhours-migrate",
    "default_transaction_isolation": "read committed",
    "idle_in_transaction_session_timeout": "30000",
}
# One number for every migration of this schema: "after" as big-endian bytes.
_ADVISORY_LOCK = int.from_bytes(b"after")


class SchemaError(Exception):
    """The database's schema is not what the service needs; the message is one line and says what to do."""


def config() -> alembic.config.Config:
    """Give Alembic's configuration; there is no alembic.ini."""
    found = alembic.config.Config()
    found.set_main_option("script_location", str(pathlib.Path(__file__).with_name("migrations")))
    return found


def newest() -> int:
    """Give the version that this release needs."""
    return int(alembic.script.ScriptDirectory.from_config(config()).get_current_head() or 0)


def _check_encoding(encoding: object) -> None:
    """Raise SchemaError for an encoding that cannot store every user id, or counts bytes for code points."""
    if encoding != "UTF8":
        raise SchemaError(f"the database's encoding is {encoding}: create it anew with ENCODING 'UTF8'")


async def current(url: str) -> int:
    """Return the version of the database; 0 for none. Raise SchemaError or connections.CannotConnect."""
    connection = await connections.connect(url, _SESSION_SETTINGS)
    try:
        return await version(connection)
    finally:
        connection.terminate()


async def version(connection: asyncpg.Connection) -> int:
    """Return the version of the database that a connection is to; 0 for none. Raise SchemaError or CannotConnect."""
    with connections.explained():
        async with asyncio.timeout(LOCK_TIMEOUT):
            _check_encoding(await connection.fetchval("SHOW server_encoding"))
            if await connection.fetchval("SELECT to_regclass($1)", VERSION_TABLE) is None:
                return 0
            return int(await connection.fetchval(f"SELECT version_num FROM {VERSION_TABLE}") or 0)


async def check(url: str) -> None:
    """Raise SchemaError for a schema older than needed; a newer one is fine, for migrations expand first.

    Raise connections.CannotConnect if no server can be used.
    """
    found = await current(url)
    if found < newest():
        raise SchemaError(
            f"the database's schema is at version {found} and this release needs {newest()}:"
            " run `afterhours-grpc migrate`"
        )


async def migrate(url: str) -> int:
    """Bring the database to the newest schema in one transaction, and return its version.

    Safe to run twice, and by two at once: the second waits. A database that is newer already is left as it is. Raise
    SchemaError if a lock could not be acquired within LOCK_TIMEOUT, connections.CannotConnect if no server can be used.
    """

    async def connect() -> asyncpg.Connection:
        return await connections.connect(url, _SESSION_SETTINGS)

    engine = sa_asyncio.create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=sa.NullPool)
    try:
        async with engine.begin() as connection:
            _check_encoding(await connection.scalar(sa.text("SHOW server_encoding")))
            await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'"))
            await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            await connection.run_sync(_upgrade)
            failpoints.reach(failpoints.Point.MIGRATED)
    except sqlalchemy.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "55P03":
            raise SchemaError(f"could not acquire a lock within {LOCK_TIMEOUT} s: run it again") from error
        # The driver's own error.
        raise connections.cannot_connect((error.orig and error.orig.__cause__) or error) from error
    finally:
        await asyncio.shield(engine.dispose())
    return max(newest(), await current(url))


def _upgrade(connection: sa.Connection) -> None:
    if sa.inspect(connection).has_table(VERSION_TABLE):
        found = connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}"))
        if int(found or 0) >= newest():
            return
    settings = config()
    settings.attributes["connection"] = connection
    alembic.command.upgrade(settings, "head")
