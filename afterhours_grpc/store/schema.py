"""The version of the schema: brought to the newest, and checked before the service runs on it."""

import asyncio
import pathlib

import asyncpg

from afterhours_grpc.store import connections

VERSION_TABLE = "after_hours_schema"
# Seconds that a migration waits for a lock, its own or a table's, rather than hold up the calls behind it.
LOCK_TIMEOUT = 10
# A migration may take longer than a call, and sets its own limits. One whose process stops in the middle of it must not
# keep its locks on the tables.
SESSION_SETTINGS = {
    **connections.KEEPALIVE_SETTINGS,
    "application_name": "afterhours-migrate",
    "default_transaction_isolation": "read committed",
    "idle_in_transaction_session_timeout": "30000",
}
_MIGRATIONS = pathlib.Path(__file__).with_name("migrations") / "versions"


class SchemaError(Exception):
    """The database's schema is not what the service needs; the message is one line and says what to do."""


def newest() -> int:
    """Return the version that this release needs: that of its last migration, whose file name begins with it."""
    return max(int(each.name[:4]) for each in _MIGRATIONS.glob("[0-9]*.py"))


def check_encoding(encoding: object) -> None:
    """Raise SchemaError for an encoding that cannot store every user id, or counts bytes for code points."""
    if encoding != "UTF8":
        raise SchemaError(f"the database's encoding is {encoding}: create it anew with ENCODING 'UTF8'")


async def current(url: str) -> int:
    """Return the version of the database; 0 for none. Raise SchemaError or connections.CannotConnect."""
    connection = await connections.connect(url, SESSION_SETTINGS)
    try:
        return await version(connection)
    finally:
        connection.terminate()


async def version(connection: asyncpg.Connection) -> int:
    """Return the version of the database that a connection is to; 0 for none. Raise SchemaError or CannotConnect."""
    with connections.explained():
        async with asyncio.timeout(LOCK_TIMEOUT):
            check_encoding(await connection.fetchval("SHOW server_encoding"))
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
    # Alembic, which nothing else needs, would be a fifth of the time that every command and worker takes to start.
    from afterhours_grpc.store import migration  # noqa: PLC0415

    await migration.upgrade(url)
    return max(newest(), await current(url))
