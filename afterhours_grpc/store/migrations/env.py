"""Run by Alembic for `schema.migrate`, which gives the connection and has begun the transaction."""

from alembic import context

from afterhours_grpc.store import schema, tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    version_table=schema.VERSION_TABLE,
)
context.run_migrations()
