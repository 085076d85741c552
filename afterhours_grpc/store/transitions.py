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

from afterhours_grpc.store import database

SESSION = """s.id, s.user_id, s.started_at, s.expires_at, s.ended_at, s.end_reason,
    s.fuzzed_latitude, s.fuzzed_longitude, s.fuzz_radius_meters"""

# The database's clock is the only one; tests move it by this parameter.
NOW = "clock_timestamp() + CAST(:clock_offset AS interval)"

# A plan that is made while a partial index has one page may walk through it, filtering, and does so still when it has
# thousands. So each condition fits the index that it is meant for and no other: by user `ended_at IS NULL`, by due time
# this one, whose second half is always true, and by id one that no index has.
BY_DUE = "ended_at IS NULL AND expires_at > '-infinity'"
OPEN = "num_nulls(s.ended_at) = 1"

# Reading the count of the locked rows makes the clock wait until the last lock is held.
_CLOCK = f"""
    clock AS MATERIALIZED (
        SELECT {NOW} AS at, clock_timestamp() - statement_timestamp() AS waited
        FROM (SELECT count(*) FROM locked) AS after_the_locks
    )"""

# What was locked before its call's deadline: who was told DEADLINE_EXCEEDED must not find it applied later.
_IN_TIME = "ARRAY(SELECT locked.id FROM locked CROSS JOIN clock WHERE clock.waited < locked.time_left)"


def _fresh(columns: str, arrays: str) -> str:
    """Give the calls that have not been applied under their request_id.

    None waits for a lock beyond the first deadline: what is taken back for it is known not to be applied.
    """
    return f"""
    patience AS MATERIALIZED (SELECT set_config('lock_timeout', :lock_timeout, true)),
    fresh AS MATERIALIZED (
        SELECT asked.*
        FROM patience CROSS JOIN unnest(CAST(:ordinals AS int[]), CAST(:user_ids AS text[]), CAST(:callers AS text[]),
                CAST(:request_ids AS uuid[]), CAST(:fingerprints AS bytea[]), CAST(:times_left AS interval[]){arrays})
            AS asked(ordinal, user_id, caller, request_id, fingerprint, time_left{columns})
        LEFT JOIN LATERAL (
            SELECT true AS applied FROM after_hours_requests AS r
            WHERE r.caller = asked.caller AND r.method = :method AND r.request_id = asked.request_id
            LIMIT 1
        ) AS kept ON true
        WHERE kept.applied IS NULL
    )"""


_LOCKED_BY_USER = """
    locked AS MATERIALIZED (
        SELECT asked.*, s.id FROM {asked} AS asked CROSS JOIN LATERAL (
            SELECT id FROM after_hours_sessions
            WHERE user_id = asked.user_id AND ended_at IS NULL
            LIMIT 1 FOR UPDATE
        ) AS s
    )"""

_KEPT = """
    kept AS (
        INSERT INTO after_hours_requests (caller, method, request_id, fingerprint,
            session_id, expires_at, ended_at, end_reason, answered_at)
        SELECT fresh.caller, :method, fresh.request_id, fresh.fingerprint,
            s.id, s.expires_at, s.ended_at, s.end_reason, clock.at
        FROM {changed} AS s JOIN fresh USING (user_id) CROSS JOIN clock
        WHERE fresh.request_id IS NOT NULL
    )"""

# The calls whose users have a profile, which is locked against its removal and against what closes a gate.
_ELIGIBLE = """
    eligible AS MATERIALIZED (
        SELECT fresh.*, profile.*
        FROM fresh CROSS JOIN LATERAL (
            SELECT premium_expires_at, identity_verified, location_consent
            FROM after_hours_profiles AS p WHERE p.user_id = fresh.user_id LIMIT 1 FOR SHARE
        ) AS profile
    )"""


def closed(profile: str) -> tuple[str, str, str]:
    """Give the conditions under which each gate is closed for a profile, in the order of `session.Gate`."""
    return (
        f"(CAST(:premium AS boolean) AND ({profile}.premium_expires_at > clock.at) IS NOT TRUE)",
        f"(CAST(:verified AS boolean) AND NOT {profile}.identity_verified)",
        f"(CAST(:consent AS boolean) AND NOT {profile}.location_consent)",
    )


def _open(profile: str) -> str:
    return " AND ".join(f"NOT {each}" for each in closed(profile))


# START: the profile is locked against its removal; an overdue session is closed by the start that would trip on it; the
# last place shown is shown again if it is among the candidates.
START = database.Statement(f"""
WITH {
    _fresh(
        ", duration, latitude, longitude",
        ''',
                CAST(:durations AS interval[]), CAST(:latitudes AS float8[]), CAST(:longitudes AS float8[])''',
    )
},
{_ELIGIBLE},
    {_LOCKED_BY_USER.format(asked="eligible")},
    {_CLOCK},
    closed AS (
        UPDATE after_hours_sessions AS s SET ended_at = s.expires_at, end_reason = 'EXPIRED'
        FROM clock
        WHERE s.id = ANY(ARRAY(SELECT id FROM locked)) AND {OPEN} AND s.expires_at <= clock.at
        RETURNING s.id
    ),
    candidate AS MATERIALIZED (
        SELECT * FROM unnest(CAST(:candidate_ordinals AS int[]), CAST(:candidate_ranks AS int[]),
                CAST(:key_versions AS int[]), CAST(:cells AS bigint[]),
                CAST(:fuzzed_latitudes AS float8[]), CAST(:fuzzed_longitudes AS float8[]))
            AS candidate(ordinal, rank, key_version, cell, latitude, longitude)
    ),
    opened AS (
        INSERT INTO after_hours_sessions AS s (user_id, started_at, expires_at, latitude, longitude,
            fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
        SELECT eligible.user_id, clock.at, clock.at + eligible.duration, eligible.latitude, eligible.longitude,
            place.latitude, place.longitude, CAST(:radius_meters AS float8), place.key_version, place.cell
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
        WHERE clock.waited < eligible.time_left AND {_open("eligible")}
        ON CONFLICT (user_id) WHERE ended_at IS NULL DO NOTHING
        RETURNING {SESSION}
    ),
    {_KEPT.format(changed="opened")}
SELECT fresh.ordinal, s.*, clock.at AS as_of
FROM opened AS s JOIN fresh USING (user_id) CROSS JOIN clock
""")


# EXTEND: `expires_at` moves from where it is, so that k extensions add k times.
def _extend(eligible: str, asked: str, allowed: str) -> database.Statement:
    return database.Statement(f"""
WITH {_fresh(", additional", ", CAST(:additionals AS interval[])")},{eligible}
    {_LOCKED_BY_USER.format(asked=asked)},
    {_CLOCK},
    extended AS (
        UPDATE after_hours_sessions AS s SET expires_at = s.expires_at + locked.additional
        FROM locked, clock
        WHERE s.id = ANY({_IN_TIME}) AND s.id = locked.id
            AND {OPEN} AND s.expires_at > clock.at AND {allowed}
        RETURNING {SESSION}
    ),
    {_KEPT.format(changed="extended")}
SELECT fresh.ordinal, s.*, clock.at AS as_of
FROM extended AS s JOIN fresh USING (user_id) CROSS JOIN clock
""")


EXTEND = _extend("", "fresh", "true")
# Where there are gates; without them the profile is no concern of an extension.
EXTEND_GATED = _extend(f"{_ELIGIBLE},", "eligible", _open("locked"))


# Every end of a session is this one: an overdue session is closed as EXPIRED at its expires_at whoever asks, another
# one now, for the reason that is asked for; without a reason (NULL) only overdue ones are closed.
def _ended(ids: str = "ARRAY(SELECT id FROM locked)") -> str:
    return f"""
    {_CLOCK},
    ended AS (
        UPDATE after_hours_sessions AS s
        SET ended_at = GREATEST(s.started_at, LEAST(clock.at, s.expires_at)),
            end_reason = CASE WHEN s.expires_at <= clock.at THEN 'EXPIRED' ELSE CAST(:reason AS text) END
        FROM clock
        WHERE s.id = ANY({ids}) AND {OPEN}
            AND (s.expires_at <= clock.at OR CAST(:reason AS text) IS NOT NULL)
        RETURNING {SESSION}
    )"""


END = database.Statement(f"""
WITH {_fresh("", "")},
    {_LOCKED_BY_USER.format(asked="fresh")},
    {_ended(_IN_TIME)},
    asked_for AS (SELECT * FROM ended WHERE end_reason = :reason),
    {_KEPT.format(changed="asked_for")}
SELECT fresh.ordinal, s.*, clock.at AS as_of
FROM ended AS s JOIN fresh USING (user_id) CROSS JOIN clock
""")

# For a profile that changed: run after the profile's own statement, in its transaction, and so with a newer snapshot.
END_OF_USERS = database.Statement(f"""
WITH asked AS (SELECT user_id FROM unnest(CAST(:user_ids AS text[])) AS asked(user_id)),
    {_LOCKED_BY_USER.format(asked="asked")},
    {_ended()}
SELECT s.id FROM ended AS s
""")

# For timers that fired. A row that another statement holds is passed over: its timer fires again.
EXPIRE = database.Statement(f"""
WITH locked AS MATERIALIZED (
        SELECT id, expires_at FROM after_hours_sessions AS s
        WHERE id = ANY(CAST(:ids AS uuid[])) AND {OPEN}
        FOR UPDATE SKIP LOCKED
    ),
    {_ended()}
SELECT asked.id,
    ended.id IS NOT NULL OR open.id IS NULL AND locked.id IS NULL AS over,
    CASE WHEN ended.id IS NULL THEN locked.expires_at END AS due
FROM unnest(CAST(:ids AS uuid[])) AS asked(id)
LEFT JOIN ended ON ended.id = asked.id
LEFT JOIN locked ON locked.id = asked.id
LEFT JOIN LATERAL (
    SELECT id FROM after_hours_sessions AS s WHERE id = asked.id AND {OPEN} LIMIT 1
) AS open ON true
""")

# For the reconciler: what is overdue whether or not a timer knows of it.
EXPIRE_OVERDUE = database.Statement(f"""
WITH locked AS MATERIALIZED (
        SELECT id FROM after_hours_sessions
        WHERE {BY_DUE} AND expires_at <= (SELECT {NOW})
        ORDER BY expires_at, id
        LIMIT :most FOR UPDATE SKIP LOCKED
    ),
    {_ended()}
SELECT s.id FROM ended AS s
""")
