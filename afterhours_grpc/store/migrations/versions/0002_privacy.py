"""Records of who read exact locations and of requests for data protection; what retention looks for, and an index of its own for what is due."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Apply."""
    op.execute("""
        CREATE TABLE after_hours_exact_reads (
            id BIGINT GENERATED ALWAYS AS IDENTITY,
            caller TEXT NOT NULL,
            session_id UUID NOT NULL,
            purpose TEXT NOT NULL,
            read_at TIMESTAMP WITH TIME ZONE NOT NULL,
            disclosed BOOLEAN NOT NULL,
            PRIMARY KEY (id)
        )
    """)
    op.execute("""
        CREATE INDEX after_hours_exact_reads_by_session ON after_hours_exact_reads (session_id)
    """)
    op.execute("""
        CREATE TABLE after_hours_data_requests (
            id BIGINT GENERATED ALWAYS AS IDENTITY,
            kind TEXT NOT NULL,
            user_digest BYTEA NOT NULL,
            reference TEXT NOT NULL,
            requested_at TIMESTAMP WITH TIME ZONE NOT NULL,
            PRIMARY KEY (id),
            CONSTRAINT after_hours_data_requests_kind CHECK (kind IN ('ERASE', 'EXPORT'))
        )
    """)
    op.execute("""
        CREATE INDEX after_hours_data_requests_by_user ON after_hours_data_requests (user_digest)
    """)
    op.execute("""
        CREATE FUNCTION after_hours_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
        END
        $$
    """)
    for table in ("after_hours_exact_reads", "after_hours_data_requests"):
        op.execute(f"""
            CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
            FOR EACH STATEMENT EXECUTE FUNCTION after_hours_append_only()
        """)
    op.execute("DROP INDEX after_hours_sessions_due")
    op.execute("""
        CREATE INDEX after_hours_sessions_due ON after_hours_sessions (expires_at, id)
        WHERE ended_at IS NULL AND expires_at > '-infinity'
    """)
    op.execute("""
        CREATE INDEX after_hours_sessions_ended ON after_hours_sessions (ended_at) WHERE ended_at IS NOT NULL
    """)
    op.execute("""
        CREATE INDEX after_hours_sessions_exact ON after_hours_sessions (ended_at)
        WHERE ended_at IS NOT NULL AND latitude IS NOT NULL
    """)
