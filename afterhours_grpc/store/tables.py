"""The schema that the statements are written for. Migrations make it; `make check` compares them with this.

The CHECKs tie dates to reasons, so that no statement, and no hand at a console, can store a session that is neither
active nor properly ended.
"""

import typing

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

metadata = sa.MetaData()


class TransactionId(sa.types.UserDefinedType[int]):
    """Postgres' xid8: a transaction's id, which is never used again."""

    def get_col_spec(self, **_: object) -> str:
        """Return the type's name."""
        return "XID8"


profiles = sa.Table(
    "after_hours_profiles",
    metadata,
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("premium_expires_at", sa.TIMESTAMP(timezone=True)),
    sa.Column("identity_verified", sa.Boolean, nullable=False),
    sa.Column("location_consent", sa.Boolean, nullable=False),
    sa.CheckConstraint("char_length(user_id) BETWEEN 1 AND 255", name="after_hours_profiles_user_id_length"),
)

sessions = sa.Table(
    "after_hours_sessions",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True, server_default=sa.text("gen_random_uuid()")),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("ended_at", sa.TIMESTAMP(timezone=True)),
    sa.Column("end_reason", sa.Text),
    # Exact, and erased some time after the end: the only columns that no statement returns.
    sa.Column("latitude", sa.Double),
    sa.Column("longitude", sa.Double),
    sa.Column("fuzzed_latitude", sa.Double, nullable=False),
    sa.Column("fuzzed_longitude", sa.Double, nullable=False),
    sa.Column("fuzz_radius_meters", sa.Double, nullable=False),
    # Which key made the fuzzed location, and which cell of its grid it stands for.
    sa.Column("fuzz_key_version", sa.Integer, nullable=False),
    sa.Column("fuzz_cell", sa.BigInteger, nullable=False),
    # When its user is to be warned of its end; none once that was done, or if there is nothing to warn of.
    sa.Column("warn_at", sa.TIMESTAMP(timezone=True)),
    sa.CheckConstraint("char_length(user_id) BETWEEN 1 AND 255", name="after_hours_sessions_user_id_length"),
    sa.CheckConstraint("expires_at > started_at", name="after_hours_sessions_expires_after_start"),
    sa.CheckConstraint("ended_at BETWEEN started_at AND expires_at", name="after_hours_sessions_ends_within_its_time"),
    sa.CheckConstraint("(ended_at IS NULL) = (end_reason IS NULL)", name="after_hours_sessions_ends_for_a_reason"),
    sa.CheckConstraint(
        "end_reason IN ('USER', 'EXPIRED', 'PROFILE_REMOVED', 'INELIGIBLE', 'ADMIN')",
        name="after_hours_sessions_end_reason",
    ),
    sa.CheckConstraint("end_reason <> 'EXPIRED' OR ended_at = expires_at", name="after_hours_sessions_expires_on_time"),
    sa.CheckConstraint(
        "(latitude IS NULL) = (longitude IS NULL) AND (ended_at IS NOT NULL OR latitude IS NOT NULL)",
        name="after_hours_sessions_exact_location",
    ),
    sa.CheckConstraint(
        "latitude BETWEEN -90 AND 90 AND longitude BETWEEN -180 AND 180"
        " AND fuzzed_latitude BETWEEN -90 AND 90 AND fuzzed_longitude BETWEEN -180 AND 180",
        name="after_hours_sessions_coordinates",
    ),
)

# What can be read, and computed with; see session.EXPIRY_LIMIT. NOT VALID, since rows from before this constraint are
# not checked by it: readers must not rely on it for a session that has ended.
_within_time = sa.CheckConstraint(
    "started_at >= '0001-01-01 00:00:00+00' AND expires_at < '9999-01-01 00:00:00+00'",
    name="after_hours_sessions_within_time",
    postgresql_not_valid=True,
)
sessions.append_constraint(_within_time)
sa.event.listen(sessions, "after_create", sa.schema.AddConstraint(_within_time))

# The guarantee of at most one active session a user. Every find of an active session goes by it.
sa.Index(
    "after_hours_sessions_active",
    sessions.c.user_id,
    unique=True,
    postgresql_where=sessions.c.ended_at.is_(None),
)
# What is due, soonest first. The second half of its condition is always true, and keeps plans from other uses of it.
sa.Index(
    "after_hours_sessions_due",
    sessions.c.expires_at,
    sessions.c.id,
    postgresql_where=sessions.c.ended_at.is_(None) & (sessions.c.expires_at > sa.text("'-infinity'")),
)
# A user's history, newest first; its first row has the cell that the user was last shown in.
sa.Index(
    "after_hours_sessions_history",
    sessions.c.user_id,
    sessions.c.started_at.desc(),
    sessions.c.id.desc(),
)

# Whom to warn, soonest first; active sessions by their age; and by where they are shown, in bands of 0.01 degrees. The
# halves about infinity are as above.
sa.Index(
    "after_hours_sessions_warning",
    sessions.c.warn_at,
    sessions.c.id,
    postgresql_where=sessions.c.warn_at > sa.text("'-infinity'"),
)
sa.Index(
    "after_hours_sessions_by_start",
    sessions.c.started_at,
    sessions.c.id,
    postgresql_where=sessions.c.ended_at.is_(None) & (sessions.c.started_at > sa.text("'-infinity'")),
)
sa.Index(
    "after_hours_sessions_near",
    sa.func.floor(sessions.c.fuzzed_latitude * 100),
    sessions.c.fuzzed_longitude,
    postgresql_where=sessions.c.ended_at.is_(None) & (sessions.c.fuzzed_latitude > sa.text("'-infinity'")),
)
# What retention looks for: sessions to be removed, and exact locations to be erased, the oldest first.
sa.Index("after_hours_sessions_ended", sessions.c.ended_at, postgresql_where=sessions.c.ended_at.is_not(None))
sa.Index(
    "after_hours_sessions_exact",
    sessions.c.ended_at,
    postgresql_where=sessions.c.ended_at.is_not(None) & sessions.c.latitude.is_not(None),
)

# The answer of each applied call with a request_id: the session's columns that never change, and these as they were.
requests = sa.Table(
    "after_hours_requests",
    metadata,
    sa.Column("caller", sa.Text, primary_key=True),
    sa.Column("method", sa.Text, primary_key=True),
    sa.Column("request_id", sa.Uuid, primary_key=True),
    sa.Column("fingerprint", postgresql.BYTEA, nullable=False),
    sa.Column(
        "session_id",
        sa.Uuid,
        sa.ForeignKey("after_hours_sessions.id", name="after_hours_requests_session", ondelete="CASCADE"),
        nullable=False,
    ),
    sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("ended_at", sa.TIMESTAMP(timezone=True)),
    sa.Column("end_reason", sa.Text),
    sa.Column("answered_at", sa.TIMESTAMP(timezone=True), nullable=False),
)
# The oldest answers are forgotten first.
sa.Index("after_hours_requests_answered", requests.c.answered_at)
# What goes with a session when it is removed.
sa.Index("after_hours_requests_by_session", requests.c.session_id)

# Who asked for an exact location, and for what; `disclosed`: whether there was one to tell. No foreign
# key: it outlives the session.
exact_reads = sa.Table(
    "after_hours_exact_reads",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("caller", sa.Text, nullable=False),
    sa.Column("session_id", sa.Uuid, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("read_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("disclosed", sa.Boolean, nullable=False),
)
sa.Index("after_hours_exact_reads_by_session", exact_reads.c.session_id)
sa.Index("after_hours_exact_reads_by_caller", exact_reads.c.caller)

# What was erased and exported, for data-protection requests. The user by the SHA-256 of their id: a tombstone that
# tells who knows an id that it was erased.
data_requests = sa.Table(
    "after_hours_data_requests",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("user_digest", postgresql.BYTEA, nullable=False),
    sa.Column("reference", sa.Text, nullable=False),
    sa.Column("requested_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.CheckConstraint("kind IN ('ERASE', 'EXPORT')", name="after_hours_data_requests_kind"),
)
sa.Index("after_hours_data_requests_by_user", data_requests.c.user_digest)


def _event() -> tuple[sa.Column[typing.Any], ...]:
    """Give the columns of an event: the session as it left it. Without a user and a place when they were erased."""
    return (
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("happened_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("session_id", sa.Uuid, nullable=False),
        sa.Column("user_id", sa.Text),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("ended_at", sa.TIMESTAMP(timezone=True)),
        sa.Column("end_reason", sa.Text),
        sa.Column("fuzzed_latitude", sa.Double),
        sa.Column("fuzzed_longitude", sa.Double),
        sa.Column("fuzz_radius_meters", sa.Double),
    )


_TYPES = "type IN ('STARTED', 'EXTENDED', 'EXPIRING', 'ENDED')"
# Written with each transition, in its transaction. Ids are drawn while a session's row is locked, so that the events of
# one user are in order; those of different users are in none, for transactions commit in another order than they draw.
# Rows are found by transaction, which must not walk over those that were moved: see `outbox`.
outbox = sa.Table(
    "after_hours_outbox",
    metadata,
    sa.Column(
        "xid", TransactionId, primary_key=True, autoincrement=False, server_default=sa.text("pg_current_xact_id()")
    ),
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    *_event(),
    sa.CheckConstraint(_TYPES, name="after_hours_outbox_type"),
)
# Moved here once committed, by one transaction at a time, which gives positions without a gap: a reader has missed
# nothing before the position that it has read, whatever is still open elsewhere. `horizon`, of the last one that a
# transaction moves: the snapshot (pg_snapshot) in which everything committed has a position.
events = sa.Table(
    "after_hours_events",
    metadata,
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("placed_at", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("horizon", sa.Text),
    *_event(),
    sa.CheckConstraint(_TYPES, name="after_hours_events_type"),
)
sa.Index("after_hours_events_by_user", events.c.user_id, events.c.position)

# What is recorded stays recorded, whoever holds the service's own password.
_APPEND_ONLY = """
    CREATE FUNCTION after_hours_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
    END
    $$
"""
_TRIGGER = """
    CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %(table)s
    FOR EACH STATEMENT EXECUTE FUNCTION after_hours_append_only()
"""
sa.event.listen(metadata, "before_create", sa.DDL(_APPEND_ONLY))  # type: ignore[no-untyped-call]
sa.event.listen(exact_reads, "after_create", sa.DDL(_TRIGGER))  # type: ignore[no-untyped-call]
sa.event.listen(data_requests, "after_create", sa.DDL(_TRIGGER))  # type: ignore[no-untyped-call]
