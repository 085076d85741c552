"""The latest time at which a session may expire; exact reads by their caller; positions of events without a row that counts them."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Apply."""
    # NOT VALID: validating would scan the whole history while every call waits. It holds for whatever is written from
    # now on, by the release before this one, too.
    op.execute("""
        ALTER TABLE after_hours_sessions ADD CONSTRAINT after_hours_sessions_within_time
        CHECK (started_at >= '0001-01-01 00:00:00+00' AND expires_at < '9999-01-01 00:00:00+00') NOT VALID
    """)
    # Active sessions are found by the index of what is due. Without this, the CHECK would keep them from being ended.
    op.execute("""
        UPDATE after_hours_sessions SET expires_at = '9998-12-31 23:59:59.999999+00', warn_at = NULL
        WHERE ended_at IS NULL AND expires_at >= '9999-01-01 00:00:00+00'
    """)
    op.execute("""
        CREATE INDEX after_hours_exact_reads_by_caller ON after_hours_exact_reads (caller)
    """)
    # The outbox is all but empty, so that writing it anew is quick.
    op.execute("ALTER TABLE after_hours_outbox ADD COLUMN xid XID8 NOT NULL DEFAULT pg_current_xact_id()")
    op.execute("ALTER TABLE after_hours_outbox DROP CONSTRAINT after_hours_outbox_pkey")
    op.execute("ALTER TABLE after_hours_outbox ADD PRIMARY KEY (xid, id)")
    op.execute("ALTER TABLE after_hours_events ADD COLUMN horizon TEXT")
    # No release has used it, and servers of before that still ran would place events beside those of this one.
    op.execute("DROP TABLE after_hours_event_log")
