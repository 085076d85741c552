"""Events: the outbox that transitions write, and the events in their places; when a session is warned of."""

from alembic import op

revision = "0003"
down_revision = "0002"

_EVENT = """
    type TEXT NOT NULL,
    happened_at TIMESTAMP WITH TIME ZONE NOT NULL,
    session_id UUID NOT NULL,
    user_id TEXT,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
    ended_at TIMESTAMP WITH TIME ZONE,
    end_reason TEXT,
    fuzzed_latitude DOUBLE PRECISION,
    fuzzed_longitude DOUBLE PRECISION,
    fuzz_radius_meters DOUBLE PRECISION
"""


def upgrade() -> None:
    """Apply."""
    op.execute(f"""
        CREATE TABLE after_hours_outbox (
            id BIGINT GENERATED ALWAYS AS IDENTITY,
            {_EVENT},
            PRIMARY KEY (id),
            CONSTRAINT after_hours_outbox_type CHECK (type IN ('STARTED', 'EXTENDED', 'EXPIRING', 'ENDED'))
        )
    """)
    op.execute(f"""
        CREATE TABLE after_hours_events (
            position BIGINT NOT NULL,
            placed_at TIMESTAMP WITH TIME ZONE NOT NULL,
            {_EVENT},
            PRIMARY KEY (position),
            CONSTRAINT after_hours_events_type CHECK (type IN ('STARTED', 'EXTENDED', 'EXPIRING', 'ENDED'))
        )
    """)
    op.execute("""
        CREATE INDEX after_hours_events_by_user ON after_hours_events (user_id, position)
    """)
    op.execute("""
        CREATE TABLE after_hours_event_log (
            id INTEGER NOT NULL,
            last_position BIGINT NOT NULL,
            PRIMARY KEY (id),
            CONSTRAINT after_hours_event_log_one_row CHECK (id = 1)
        )
    """)
    op.execute("INSERT INTO after_hours_event_log (id, last_position) VALUES (1, 0)")
    op.execute("ALTER TABLE after_hours_sessions ADD COLUMN warn_at TIMESTAMP WITH TIME ZONE")
    op.execute("""
        CREATE INDEX after_hours_sessions_warning ON after_hours_sessions (warn_at, id) WHERE warn_at > '-infinity'
    """)
    op.execute("""
        CREATE INDEX after_hours_sessions_by_start ON after_hours_sessions (started_at, id)
        WHERE ended_at IS NULL AND started_at > '-infinity'
    """)
    op.execute("""
        CREATE INDEX after_hours_sessions_near ON after_hours_sessions (floor(fuzzed_latitude * 100), fuzzed_longitude)
        WHERE ended_at IS NULL AND fuzzed_latitude > '-infinity'
    """)
