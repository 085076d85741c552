"""The steps to the newest schema, run by Alembic."""

import asyncio
import pathlib

import alembic.command
import alembic.config
import asyncpg
import sqlalchemy as sa
import sqlalchemy.exc
from sqlalchemy.ext import asyncio as sa_asyncio

from afterhours_grpc import failpoints
from afterhours_grpc.store import connections, schema

# One number for every migration of this schema: "after" as big-endian bytes.
_ADVISORY_LOCK = int.from_bytes(b"after")


def config() -> alembic.config.Config:
    """Return Alembic's configuration; there is no alembic.ini."""
    found = alembic.config.Config()
    found.set_main_option("script_location", str(pathlib.Path(__file__).with_name("migrations")))
    return found


async def upgrade(url: str) -> None:
    """Bring the database to the newest schema in one transaction. Raise SchemaError or connections.CannotConnect."""

    async def connect() -> asyncpg.Connection:
        return await connections.connect(url, schema.SESSION_SETTINGS)

    engine = sa_asyncio.create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=sa.NullPool)
    try:
        async with engine.begin() as connection:
            schema.check_encoding(await connection.scalar(sa.text("SHOW server_encoding")))
            await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{schema.LOCK_TIMEOUT}s'"))
            await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            await connection.run_sync(_upgrade)
            failpoints.reach(failpoints.Point.MIGRATED)
    except sqlalchemy.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "55P03":
            raise schema.SchemaError(
                f"could not acquire a lock within {schema.LOCK_TIMEOUT} s: run it again"
            ) from error
        # The driver's own error.
        raise connections.cannot_connect((error.orig and error.orig.__cause__) or error) from error
    finally:
        await asyncio.shield(engine.dispose())


def _upgrade(connection: sa.Connection) -> None:
    if sa.inspect(connection).has_table(schema.VERSION_TABLE):
        found = connection.scalar(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}"))
        if int(found or 0) >= schema.newest():
            return
    settings = config()
    settings.attributes["connection"] = connection
    alembic.command.upgrade(settings, "head")
