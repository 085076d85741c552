"""The statements that change sessions. They take arrays, one element a call, and answer by the call's ordinal.

What each transition keeps to, in this order, and why:

1. It skips calls whose request_id was applied before; their answer is read, not made again.
2. It locks the rows it is about, in the order of the arrays (sorted by user, so that no two batches
   deadlock), and only then reads the clock, once. A clock read before a lock is old when the lock comes: a guard on it
   would revive a session that expired meanwhile.
3. Its guards stand in the WHERE clause and compare with that clock. No row back means that the guard said no.
4. It stores the answer of a call with a request_id in the same statement. A duplicate in flight fails on the primary
   key, takes the whole statement back, and finds the stored answer when it is tried again.

One index probe a user is written as CROSS JOIN LATERAL (... LIMIT 1), and targets as `id = ANY(ARRAY(...))`: a plan
that was cached while the table was small must stay right when it is not.
"""

from afterhours_grpc.store import database, fragments

# START: the profile is locked against its removal; an overdue session is closed by the start that would trip on it; the
# last place shown is shown again if it is among the candidates.
START = database.Statement(f"""
WITH {
    fragments.fresh(
        ", duration, latitude, longitude",
        ''',
                CAST(:durations AS interval[]), CAST(:latitudes AS float8[]), CAST(:longitudes AS float8[])''',
    )
},
{fragments.ELIGIBLE},
    {fragments.LOCKED_BY_USER.format(asked="eligible")},
    {fragments.CLOCK},
    closed AS (
        UPDATE after_hours_sessions AS s SET ended_at = s.expires_at, end_reason = 'EXPIRED', warn_at = NULL
        FROM clock
        WHERE s.id = ANY(ARRAY(SELECT id FROM locked)) AND {fragments.OPEN} AND s.expires_at <= clock.at
        RETURNING {fragments.SESSION}
    ),
    {fragments.noted("ENDED", "closed", "s.ended_at")},
    candidate AS MATERIALIZED (
        SELECT * FROM unnest(CAST(:candidate_ordinals AS int[]), CAST(:candidate_ranks AS int[]),
                CAST(:key_versions AS int[]), CAST(:cells AS bigint[]),
                CAST(:fuzzed_latitudes AS float8[]), CAST(:fuzzed_longitudes AS float8[]))
            AS candidate(ordinal, rank, key_version, cell, latitude, longitude)
    ),
    opened AS (
        INSERT INTO after_hours_sessions AS s (user_id, started_at, expires_at, latitude, longitude,
            fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell, warn_at)
        SELECT eligible.user_id, clock.at, clock.at + eligible.duration, eligible.latitude, eligible.longitude,
            place.latitude, place.longitude, CAST(:radius_meters AS float8), place.key_version, place.cell,
            {fragments.warn_at("(clock.at + eligible.duration)")}
        FROM eligible
        CROSS JOIN clock
        CROSS JOIN (SELECT count(*) FROM closed) AS after_the_overdue
        LEFT JOIN LATERAL (
            SELECT fuzz_key_version, fuzz_cell FROM after_hours_sessions
            WHERE user_id = eligible.user_id ORDER BY started_at DESC, id DESC LIMIT 1
        ) AS last ON true
        CROSS JOIN LATERAL (
            SELECT candidate.* FROM candidate WHERE candidate.ordinal = eligible.ordinal
            ORDER BY (candidate.key_version = last.fuzz_key_version AND candidate.cell = last.fuzz_cell) IS TRUE DESC,
                candidate.rank
            LIMIT 1
        ) AS place
        WHERE clock.waited < eligible.time_left AND {fragments.opened_gates("eligible")}
            AND clock.at + eligible.duration < {fragments.EXPIRY_LIMIT}
        ON CONFLICT (user_id) WHERE ended_at IS NULL DO NOTHING
        RETURNING {fragments.SESSION}
    ),
    {fragments.noted("STARTED", "opened", after="ENDED")},
    {fragments.KEPT.format(changed="opened")}
SELECT fresh.ordinal, s.*, clock.at AS as_of
FROM opened AS s JOIN fresh USING (user_id) CROSS JOIN clock
UNION ALL SELECT NULL, s.*, clock.at FROM closed AS s CROSS JOIN clock
""")


# EXTEND: `expires_at` moves from where it is, so that k extensions add k times.
def _extend(eligible: str, asked: str, allowed: str) -> database.Statement:
    return database.Statement(f"""
WITH {fragments.fresh(", additional", ", CAST(:additionals AS interval[])")},{eligible}
    {fragments.LOCKED_BY_USER.format(asked=asked)},
    {fragments.CLOCK},
    extended AS (
        UPDATE after_hours_sessions AS s SET expires_at = s.expires_at + locked.additional,
            warn_at = {fragments.warn_at("(s.expires_at + locked.additional)")}
        FROM locked, clock
        WHERE s.id = ANY({fragments.IN_TIME}) AND s.id = locked.id
            AND {fragments.OPEN} AND s.expires_at > clock.at AND {allowed}
            AND s.expires_at + locked.additional < {fragments.EXPIRY_LIMIT}
        RETURNING {fragments.SESSION}
    ),
    {fragments.noted("EXTENDED", "extended")},
    {fragments.KEPT.format(changed="extended")}
SELECT fresh.ordinal, s.*, clock.at AS as_of
FROM extended AS s JOIN fresh USING (user_id) CROSS JOIN clock
""")


EXTEND = _extend("", "fresh", "true")
# Where there are gates; without them the profile is no concern of an extension.
EXTEND_GATED = _extend(f"{fragments.ELIGIBLE},", "eligible", fragments.opened_gates("locked"))
