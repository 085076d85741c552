"""The first schema: profiles, sessions, kept answers."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Apply."""
    op.execute("""
        CREATE TABLE after_hours_profiles (
            user_id TEXT NOT NULL,
            premium_expires_at TIMESTAMP WITH TIME ZONE,
            identity_verified BOOLEAN NOT NULL,
            location_consent BOOLEAN NOT NULL,
            PRIMARY KEY (user_id),
            CONSTRAINT after_hours_profiles_user_id_length CHECK (char_length(user_id) BETWEEN 1 AND 255)
        )
    """)
    op.execute("""
        CREATE TABLE after_hours_sessions (
            id UUID DEFAULT gen_random_uuid() NOT NULL,
            user_id TEXT NOT NULL,
            started_at TIMESTAMP WITH TIME ZONE NOT NULL,
            expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
            ended_at TIMESTAMP WITH TIME ZONE,
            end_reason TEXT,
            latitude DOUBLE PRECISION,
            longitude DOUBLE PRECISION,
            fuzzed_latitude DOUBLE PRECISION NOT NULL,
            fuzzed_longitude DOUBLE PRECISION NOT NULL,
            fuzz_radius_meters DOUBLE PRECISION NOT NULL,
            fuzz_key_version INTEGER NOT NULL,
            fuzz_cell BIGINT NOT NULL,
            PRIMARY KEY (id),
            CONSTRAINT after_hours_sessions_user_id_length CHECK (char_length(user_id) BETWEEN 1 AND 255),
            CONSTRAINT after_hours_sessions_expires_after_start CHECK (expires_at > started_at),
            CONSTRAINT after_hours_sessions_ends_within_its_time CHECK (ended_at BETWEEN started_at AND expires_at),
            CONSTRAINT after_hours_sessions_ends_for_a_reason CHECK ((ended_at IS NULL) = (end_reason IS NULL)),
            CONSTRAINT after_hours_sessions_end_reason CHECK (end_reason IN ('USER', 'EXPIRED', 'PROFILE_REMOVED', 'INELIGIBLE', 'ADMIN')),
            CONSTRAINT after_hours_sessions_expires_on_time CHECK (end_reason <> 'EXPIRED' OR ended_at = expires_at),
            CONSTRAINT after_hours_sessions_exact_location CHECK ((latitude IS NULL) = (longitude IS NULL) AND (ended_at IS NOT NULL OR latitude IS NOT NULL)),
            CONSTRAINT after_hours_sessions_coordinates CHECK (latitude BETWEEN -90 AND 90 AND longitude BETWEEN -180 AND 180 AND fuzzed_latitude BETWEEN -90 AND 90 AND fuzzed_longitude BETWEEN -180 AND 180)
        )
    """)
    op.execute("""
        CREATE UNIQUE INDEX after_hours_sessions_active ON after_hours_sessions (user_id) WHERE ended_at IS NULL
    """)
    op.execute("""
        CREATE INDEX after_hours_sessions_due ON after_hours_sessions (expires_at, id) WHERE ended_at IS NULL
    """)
    op.execute("""
        CREATE INDEX after_hours_sessions_history ON after_hours_sessions (user_id, started_at DESC, id DESC)
    """)
    op.execute("""
        CREATE TABLE after_hours_requests (
            caller TEXT NOT NULL,
            method TEXT NOT NULL,
            request_id UUID NOT NULL,
            fingerprint BYTEA NOT NULL,
            session_id UUID NOT NULL,
            expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
            ended_at TIMESTAMP WITH TIME ZONE,
            end_reason TEXT,
            answered_at TIMESTAMP WITH TIME ZONE NOT NULL,
            PRIMARY KEY (caller, method, request_id),
            CONSTRAINT after_hours_requests_session FOREIGN KEY(session_id) REFERENCES after_hours_sessions (id) ON DELETE CASCADE
        )
    """)
    op.execute("""
        CREATE INDEX after_hours_requests_answered ON after_hours_requests (answered_at)
    """)
    op.execute("""
        CREATE INDEX after_hours_requests_by_session ON after_hours_requests (session_id)
    """)
