"""What personal data is read for, how long it is kept, and how it is erased and exported.

The statements in here are the only ones that return an exact location.
"""

import dataclasses
import datetime
import hashlib

from afterhours_grpc import failpoints
from afterhours_grpc.sessions import errors, location, session
from afterhours_grpc.store import database, endings, fragments, outbox, queries

# Recorded by the statement that reads, whatever it finds.
_READ_EXACT = database.Statement(f"""
WITH found AS MATERIALIZED (
        SELECT latitude, longitude FROM after_hours_sessions WHERE id = CAST(:id AS uuid)
    ),
    recorded AS (
        INSERT INTO after_hours_exact_reads (caller, session_id, purpose, read_at, disclosed)
        SELECT :caller, CAST(:id AS uuid), :purpose, {fragments.NOW},
            EXISTS (SELECT FROM found WHERE latitude IS NOT NULL)
    )
SELECT latitude, longitude FROM found
""")

# The longest ended first; rows that others hold are left to the next sweep.
_PAST = f"""
    SELECT id FROM after_hours_sessions
    WHERE ended_at <= (SELECT {fragments.NOW}) - CAST(:retention AS interval) {{further}}
    ORDER BY ended_at LIMIT :most FOR UPDATE SKIP LOCKED"""

# With an expires_at that the CHECK allows: an old row beyond it could not be updated.
_ERASE_EXACT = database.Statement(f"""
UPDATE after_hours_sessions SET latitude = NULL, longitude = NULL, expires_at = {fragments.readable("expires_at")}
WHERE id = ANY(ARRAY({_PAST.format(further="AND latitude IS NOT NULL")})) RETURNING id
""")

_REMOVE_ENDED = database.Statement(f"""
DELETE FROM after_hours_sessions WHERE id = ANY(ARRAY({_PAST.format(further="")})) RETURNING id
""")

# Holds the user's place among the profiles until the erasure is committed, also where there is no profile to lock: one
# that is put meanwhile waits, and so does a session, which needs it. Only a row that this inserts has an xmax of 0. Ids
# that the table would refuse are left out: nothing is stored under them.
_CLAIM_PROFILE = database.Statement("""
INSERT INTO after_hours_profiles AS p (user_id, identity_verified, location_consent)
SELECT CAST(:user_id AS text), false, false WHERE char_length(CAST(:user_id AS text)) BETWEEN 1 AND 255
ON CONFLICT (user_id) DO UPDATE SET user_id = EXCLUDED.user_id
RETURNING xmax <> 0 AS existed
""")

# Answers kept for a request_id go with their sessions; these are about other users' sessions.
_REMOVE_ANSWERS_OF = database.Statement("""
DELETE FROM after_hours_requests WHERE caller = :user_id RETURNING request_id
""")

_REMOVE_SESSIONS_OF = database.Statement("""
DELETE FROM after_hours_sessions WHERE user_id = :user_id RETURNING id
""")

# The end that an erasure itself causes keeps its user, or those who watch that user would go on to show them; it goes
# with the other events, when their retention is over.
_TOMBSTONES = """
UPDATE {events} SET fuzzed_latitude = NULL, fuzzed_longitude = NULL, fuzz_radius_meters = NULL,
    user_id = CASE WHEN type = 'ENDED' AND session_id = ANY(CAST(:ended AS uuid[])) THEN user_id END
WHERE user_id = :user_id
"""
_ERASE_EVENTS = database.Statement(_TOMBSTONES.format(events="after_hours_events"))
_ERASE_OUTBOX = database.Statement(f"""
WITH {outbox.LAST}{_TOMBSTONES.format(events="after_hours_outbox")}
    AND ctid = ANY(ARRAY(SELECT unplaced.row FROM ({outbox.unplaced()}) AS unplaced WHERE unplaced.user_id = :user_id))
""")

_RECORD = database.Statement(f"""
INSERT INTO after_hours_data_requests (kind, user_digest, reference, requested_at)
VALUES (:kind, :digest, :reference, {fragments.NOW})
""")

# A user may have tens of thousands of sessions: an erasure and an export may take longer than a call.
_SECONDS = 60.0
_TAKE_LONGER = database.Statement(f"SELECT set_config('statement_timeout', '{int(_SECONDS * 1000)}', true)")

# Of what the user called or read about others, the call itself is the user's; when the others' sessions end is not.
# Events that have no position yet come last.
_EXPORT = database.Statement(
    f"WITH {outbox.LAST}, unplaced AS ({outbox.unplaced()})"
    """,
    s AS MATERIALIZED (SELECT * FROM after_hours_sessions WHERE user_id = :user_id)
SELECT jsonb_pretty(jsonb_build_object(
    'user_id', CAST(:user_id AS text),
    'profile', (SELECT to_jsonb(p) - 'user_id' FROM after_hours_profiles AS p WHERE p.user_id = :user_id),
    'sessions', coalesce((
        SELECT jsonb_agg(
            to_jsonb(s) - '{user_id,fuzz_cell,fuzz_key_version,warn_at}'::text[] ORDER BY s.started_at, s.id
        ) FROM s
    ), '[]'),
    'events', coalesce((
        SELECT jsonb_agg(event ORDER BY position, id) FROM (
            SELECT to_jsonb(e) - '{user_id,placed_at,horizon}'::text[] AS event, e.position, NULL AS id
            FROM after_hours_events AS e WHERE e.user_id = :user_id
            UNION ALL
            SELECT to_jsonb(o) - '{user_id,xid,id}'::text[], NULL, o.id FROM after_hours_outbox AS o
            WHERE ctid = ANY(ARRAY(SELECT unplaced.row FROM unplaced WHERE unplaced.user_id = :user_id))
        ) AS e
    ), '[]'),
    'answers', coalesce((
        SELECT jsonb_agg(answer ORDER BY answered_at, request_id) FROM (
            SELECT to_jsonb(r) - 'fingerprint' AS answer, answered_at, request_id
            FROM after_hours_requests AS r WHERE r.session_id IN (SELECT id FROM s)
            UNION ALL
            SELECT to_jsonb(r) - '{fingerprint,expires_at,ended_at,end_reason}'::text[], answered_at, request_id
            FROM after_hours_requests AS r WHERE r.caller = :user_id AND r.session_id NOT IN (SELECT id FROM s)
        ) AS r
    ), '[]'),
    'exact_location_reads', coalesce((
        SELECT jsonb_agg(to_jsonb(e) - 'id' ORDER BY e.id)
        FROM after_hours_exact_reads AS e WHERE e.session_id IN (SELECT id FROM s)
    ), '[]'),
    'exact_location_reads_made', coalesce((
        SELECT jsonb_agg(to_jsonb(e) - '{id,caller}'::text[] ORDER BY e.id)
        FROM after_hours_exact_reads AS e WHERE e.caller = :user_id
    ), '[]'),
    'data_requests', coalesce((
        SELECT jsonb_agg(to_jsonb(d) - 'id' - 'user_digest' ORDER BY d.id)
        FROM after_hours_data_requests AS d WHERE d.user_digest = :digest
    ), '[]')
)) AS exported
"""
)


@dataclasses.dataclass(frozen=True, slots=True)
class Erased:
    """What was erased of a user: how many sessions, whether there was a profile, and the sessions that it ended."""

    sessions: int
    profile: bool
    ended: tuple[session.SessionId, ...]


class Privacy:
    """The personal data in `database`.

    All raise `errors.StoreUnavailable`, and `database.Retry` if what they did was taken back.
    """

    def __init__(self, database: database.Database) -> None:
        self._database = database

    async def read_exact(self, call: session.ExactRead) -> location.ExactLocation:
        """Read an exact location, and record that. Raise SessionNotFound or LocationErased."""
        rows = await self._database.fetch(_READ_EXACT, id=call.id, caller=call.caller, purpose=call.purpose)
        if not rows:
            raise errors.SessionNotFound
        [found] = rows
        if found["latitude"] is None:
            raise errors.LocationErased
        return location.ExactLocation(found["latitude"], found["longitude"])

    async def erase_exact(self, retention: datetime.timedelta, most: int) -> int:
        """Erase the exact locations of at most `most` sessions that ended `retention` ago or earlier."""
        return len(await self._database.fetch(_ERASE_EXACT, retention=retention, most=most))

    async def remove_ended(self, retention: datetime.timedelta, most: int) -> int:
        """Remove at most `most` sessions that ended `retention` ago or earlier, with the answers kept of them."""
        return len(await self._database.fetch(_REMOVE_ENDED, retention=retention, most=most))

    async def forget_requests(self, most: int) -> int:
        """Delete at most `most` answers given more than 24 hours ago."""
        return len(await self._database.fetch(queries.FORGET_REQUESTS, most=most))

    async def erase_user(self, user_id: session.UserId, reference: str) -> Erased:
        """End an active session as ADMIN, remove all that is stored of a user, and record that, all or nothing.

        What else happens to the user comes before all of that, or after it.
        """
        async with self._database.transaction(_SECONDS) as run:
            await run(_TAKE_LONGER)
            claimed = await run(_CLAIM_PROFILE, user_id=user_id)
            await run(queries.DELETE_PROFILE, user_id=user_id)
            ended = await run(endings.END_OF_USERS, user_ids=[user_id], reason=session.EndReason.ADMIN.value)
            ids = [row["id"] for row in ended]
            await run(_REMOVE_ANSWERS_OF, user_id=user_id)
            removed = await run(_REMOVE_SESSIONS_OF, user_id=user_id)
            await run(_RECORD, kind="ERASE", digest=_digest(user_id), reference=reference)
            await run(_ERASE_EVENTS, user_id=user_id, ended=ids)
            # While this is held, no event moves from the one table to the other, and those of everybody wait. So it
            # comes last, and what moved meanwhile is all that is left to be erased.
            await run(outbox.LOCK)
            await run(_ERASE_OUTBOX, user_id=user_id, ended=ids)
            await run(_ERASE_EVENTS, user_id=user_id, ended=ids)
            failpoints.reach(failpoints.Point.ERASED)
        endings.count(ended)
        return Erased(len(removed), any(row["existed"] for row in claimed), tuple(ids))

    async def export_user(self, user_id: session.UserId, reference: str) -> str:
        """Return all that is stored of a user as JSON, exact locations included, and record that."""
        async with self._database.transaction(_SECONDS) as run:
            await run(_TAKE_LONGER)
            await run(_RECORD, kind="EXPORT", digest=_digest(user_id), reference=reference)
            [row] = await run(_EXPORT, user_id=user_id, digest=_digest(user_id))
        return str(row["exported"])


def _digest(user_id: session.UserId) -> bytes:
    return hashlib.sha256(user_id.encode()).digest()
