"""The latest time at which a session may expire; exact locations read, by who read them."""

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
