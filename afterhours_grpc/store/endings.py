"""The statements that end sessions, and that say that they are to end; see `transitions` for what they keep to.

Each returns the `end_reason` of every session that it ended, also of those that nobody asked for, so that each of them
can be counted once, by the process that ended it.
"""

import collections.abc

from afterhours_grpc import metrics
from afterhours_grpc.store import database, fragments


# Every end of a session is this one: an overdue session is closed as EXPIRED at its expires_at whoever asks, another
# one now, for the reason that is asked for; without a reason (NULL) only overdue ones are closed.
def _ended(ids: str = "ARRAY(SELECT id FROM locked)") -> str:
    return f"""
    {fragments.CLOCK},
    ended AS (
        UPDATE after_hours_sessions AS s
        SET ended_at = GREATEST(s.started_at, LEAST(clock.at, s.expires_at)),
            end_reason = CASE WHEN s.expires_at <= clock.at THEN 'EXPIRED' ELSE CAST(:reason AS text) END,
            warn_at = NULL
        FROM clock
        WHERE s.id = ANY({ids}) AND {fragments.OPEN}
            AND (s.expires_at <= clock.at OR CAST(:reason AS text) IS NOT NULL)
        RETURNING {fragments.SESSION}
    ),
    {fragments.noted("ENDED", "ended", "s.ended_at")}"""


END = database.Statement(f"""
WITH {fragments.fresh("", "")},
    {fragments.LOCKED_BY_USER.format(asked="fresh")},
    {_ended(fragments.IN_TIME)},
    asked_for AS (SELECT * FROM ended WHERE end_reason = :reason),
    {fragments.KEPT.format(changed="asked_for")}
SELECT fresh.ordinal, s.*, clock.at AS as_of
FROM ended AS s JOIN fresh USING (user_id) CROSS JOIN clock
""")

# For a profile that changed: run after the profile's own statement, in its transaction, and so with a newer snapshot.
END_OF_USERS = database.Statement(f"""
WITH asked AS (SELECT user_id FROM unnest(CAST(:user_ids AS text[])) AS asked(user_id)),
    {fragments.LOCKED_BY_USER.format(asked="asked")},
    {_ended()}
SELECT s.id, s.end_reason FROM ended AS s
""")

# For timers that fired. A row that another statement holds is passed over: its timer fires again.
EXPIRE = database.Statement(f"""
WITH locked AS MATERIALIZED (
        SELECT id, expires_at FROM after_hours_sessions AS s
        WHERE id = ANY(CAST(:ids AS uuid[])) AND {fragments.OPEN}
        FOR UPDATE SKIP LOCKED
    ),
    {_ended()}
SELECT asked.id, ended.end_reason,
    ended.id IS NOT NULL OR open.id IS NULL AND locked.id IS NULL AS over,
    CASE WHEN ended.id IS NULL THEN locked.expires_at END AS due
FROM unnest(CAST(:ids AS uuid[])) AS asked(id)
LEFT JOIN ended ON ended.id = asked.id
LEFT JOIN locked ON locked.id = asked.id
LEFT JOIN LATERAL (
    SELECT id FROM after_hours_sessions AS s WHERE id = asked.id AND {fragments.OPEN} LIMIT 1
) AS open ON true
""")

# For the reconciler: what is overdue whether or not a timer knows of it.
EXPIRE_OVERDUE = database.Statement(f"""
WITH locked AS MATERIALIZED (
        SELECT id FROM after_hours_sessions
        WHERE {fragments.BY_DUE} AND expires_at <= (SELECT {fragments.NOW})
        ORDER BY expires_at, id
        LIMIT :most FOR UPDATE SKIP LOCKED
    ),
    {_ended()}
SELECT s.id, s.end_reason FROM ended AS s
""")

# For warnings that fired, answered as EXPIRE is. Each value of expires_at has one, whoever fires it how often.
WARN = database.Statement(f"""
WITH locked AS MATERIALIZED (
        SELECT id, warn_at FROM after_hours_sessions AS s
        WHERE id = ANY(CAST(:ids AS uuid[])) AND {fragments.OPEN} AND warn_at IS NOT NULL
        FOR UPDATE SKIP LOCKED
    ),
    {fragments.CLOCK},
    warned AS (
        UPDATE after_hours_sessions AS s SET warn_at = NULL
        FROM clock
        WHERE s.id = ANY(ARRAY(SELECT id FROM locked)) AND {fragments.OPEN}
            AND s.warn_at <= clock.at AND s.expires_at > clock.at
        RETURNING {fragments.SESSION}
    ),
    {fragments.noted("EXPIRING", "warned")}
SELECT asked.id, warned.id IS NOT NULL OR pending.id IS NULL AS over,
    CASE WHEN warned.id IS NULL AND locked.warn_at > clock.at THEN locked.warn_at END AS due
FROM unnest(CAST(:ids AS uuid[])) AS asked(id)
CROSS JOIN clock
LEFT JOIN warned ON warned.id = asked.id
LEFT JOIN locked ON locked.id = asked.id
LEFT JOIN LATERAL (
    SELECT id FROM after_hours_sessions AS s
    WHERE id = asked.id AND {fragments.OPEN} AND warn_at IS NOT NULL AND expires_at > clock.at LIMIT 1
) AS pending ON true
""")


def count(found: collections.abc.Iterable[database.Row]) -> None:
    """Count the sessions that statements ended, by the rows that they returned. Call it once, after the commit."""
    metrics.EXPIRED.inc(sum(row.get("end_reason") == "EXPIRED" for row in found))
