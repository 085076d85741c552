"""The statements that read, write profiles, and clear away; see `transitions` for those that change sessions."""

from afterhours_grpc.store import database, fragments

GET = database.Statement(f"""
SELECT asked.ordinal, s.*, clock.at AS as_of
FROM (SELECT {fragments.NOW} AS at) AS clock
CROSS JOIN unnest(CAST(:user_ids AS text[])) WITH ORDINALITY AS asked(user_id, ordinal)
CROSS JOIN LATERAL (
    SELECT {fragments.SESSION} FROM after_hours_sessions AS s
    WHERE s.user_id = asked.user_id AND s.ended_at IS NULL AND s.expires_at > clock.at
    LIMIT 1
) AS s
""")

# Why a call came back without a row: the answer that it was given before, no profile, or an active session.
EXPLAIN = database.Statement(f"""
SELECT asked.ordinal, profile.user_id IS NOT NULL AS has_profile,
    ARRAY[{", ".join(fragments.closed("profile"))}] AS closed,
    kept.*, active.id AS active_id, active.expires_at AS active_expires_at
FROM (SELECT {fragments.NOW} AS at) AS clock
CROSS JOIN unnest(CAST(:ordinals AS int[]), CAST(:user_ids AS text[]), CAST(:callers AS text[]),
    CAST(:request_ids AS uuid[])) AS asked(ordinal, user_id, caller, request_id)
LEFT JOIN LATERAL (
    SELECT r.fingerprint, r.answered_at AS as_of, r.expires_at, r.ended_at, r.end_reason,
        s.id, s.user_id, s.started_at, s.fuzzed_latitude, s.fuzzed_longitude, s.fuzz_radius_meters
    FROM after_hours_requests AS r JOIN after_hours_sessions AS s ON s.id = r.session_id
    WHERE r.caller = asked.caller AND r.method = :method AND r.request_id = asked.request_id
    LIMIT 1
) AS kept ON true
LEFT JOIN LATERAL (
    SELECT * FROM after_hours_profiles WHERE user_id = asked.user_id LIMIT 1
) AS profile ON true
LEFT JOIN LATERAL (
    SELECT s.id, s.expires_at FROM after_hours_sessions AS s
    WHERE s.user_id = asked.user_id AND s.ended_at IS NULL AND s.expires_at > clock.at
    LIMIT 1
) AS active ON true
""")

_PREMIUM, _VERIFIED, _CONSENT = fragments.closed("put")

PUT_PROFILE = database.Statement("""
INSERT INTO after_hours_profiles AS p (user_id, premium_expires_at, identity_verified, location_consent)
VALUES (:user_id, :premium_expires_at, :identity_verified, :location_consent)
ON CONFLICT (user_id) DO UPDATE SET premium_expires_at = EXCLUDED.premium_expires_at,
    identity_verified = EXCLUDED.identity_verified, location_consent = EXCLUDED.location_consent
""")

# Where there are gates: whether this put withdraws what one asks for. A premium time that merely passed does not.
PUT_PROFILE_GATED = database.Statement(f"""
WITH before AS MATERIALIZED (
        SELECT premium_expires_at FROM after_hours_profiles WHERE user_id = :user_id FOR UPDATE
    ),
    put AS (
        INSERT INTO after_hours_profiles AS p (user_id, premium_expires_at, identity_verified, location_consent)
        SELECT CAST(:user_id AS text), CAST(:premium_expires_at AS timestamptz), CAST(:identity_verified AS boolean),
            CAST(:location_consent AS boolean)
        FROM (SELECT count(*) FROM before) AS after_the_lock
        ON CONFLICT (user_id) DO UPDATE SET premium_expires_at = EXCLUDED.premium_expires_at,
            identity_verified = EXCLUDED.identity_verified, location_consent = EXCLUDED.location_consent
        RETURNING premium_expires_at, identity_verified, location_consent
    )
SELECT {_PREMIUM} AND put.premium_expires_at IS DISTINCT FROM before.premium_expires_at
    OR {_VERIFIED} OR {_CONSENT} AS withdrawn
FROM put CROSS JOIN (SELECT {fragments.NOW} AS at FROM (SELECT count(*) FROM put) AS after_the_put) AS clock
LEFT JOIN before ON true
""")

GET_PROFILES = database.Statement("""
SELECT user_id, premium_expires_at, identity_verified, location_consent
FROM after_hours_profiles WHERE user_id = ANY(CAST(:user_ids AS text[]))
""")

DELETE_PROFILE = database.Statement("""
DELETE FROM after_hours_profiles WHERE user_id = :user_id RETURNING user_id
""")

CLOCK = database.Statement(f"SELECT {fragments.NOW} AS at")

# Pages of what should have a timer up to an instant, soonest first.
ACTIVE_DUE = database.Statement(f"""
SELECT id, expires_at AS due FROM after_hours_sessions
WHERE {fragments.BY_DUE} AND (expires_at, id) > (CAST(:after AS timestamptz), CAST(:id AS uuid))
    AND expires_at <= CAST(:until AS timestamptz)
ORDER BY expires_at, id LIMIT :most
""")

# The same for warnings.
WARNINGS_DUE = database.Statement(f"""
SELECT id, warn_at AS due FROM after_hours_sessions
WHERE {fragments.BY_WARNING} AND (warn_at, id) > (CAST(:after AS timestamptz), CAST(:id AS uuid))
    AND warn_at <= CAST(:until AS timestamptz)
ORDER BY warn_at, id LIMIT :most
""")

# The same, counted in slices of so many rows: their last due times, by which their timers can be counted in Redis.
ACTIVE_SLICES = database.Statement(f"""
SELECT max(expires_at) AS until, count(*) AS sessions
FROM (
    SELECT expires_at, (row_number() OVER (ORDER BY expires_at, id) - 1) / CAST(:rows AS int) AS slice
    FROM after_hours_sessions WHERE {fragments.BY_DUE} AND expires_at > CAST(:after AS timestamptz)
    ORDER BY expires_at, id LIMIT :most
) AS due
GROUP BY slice ORDER BY slice
""")

WARNING_SLICES = database.Statement(f"""
SELECT max(warn_at) AS until, count(*) AS sessions
FROM (
    SELECT warn_at, (row_number() OVER (ORDER BY warn_at, id) - 1) / CAST(:rows AS int) AS slice
    FROM after_hours_sessions WHERE {fragments.BY_WARNING} AND warn_at > CAST(:after AS timestamptz)
    ORDER BY warn_at, id LIMIT :most
) AS due
GROUP BY slice ORDER BY slice
""")

# What no sweep has closed yet, and for how long at most.
OVERDUE = database.Statement(f"""
SELECT count(*) AS overdue, coalesce(max(({fragments.NOW}) - expires_at), interval '0') AS longest
FROM after_hours_sessions WHERE {fragments.BY_DUE} AND expires_at <= (SELECT {fragments.NOW})
""")

# Of these sessions, those that should have a timer, and when it is due.
STILL_ACTIVE = database.Statement(f"""
SELECT id, expires_at AS due FROM after_hours_sessions AS s WHERE id = ANY(CAST(:ids AS uuid[])) AND {fragments.OPEN}
""")

STILL_TO_WARN = database.Statement(f"""
SELECT id, warn_at AS due FROM after_hours_sessions AS s
WHERE id = ANY(CAST(:ids AS uuid[])) AND {fragments.OPEN} AND warn_at IS NOT NULL
""")

# Which calls were applied before under their request_id.
KEPT = database.Statement("""
SELECT r.caller, r.method, r.request_id
FROM unnest(CAST(:callers AS text[]), CAST(:methods AS text[]), CAST(:request_ids AS uuid[]))
    AS asked(caller, method, request_id)
CROSS JOIN LATERAL (
    SELECT caller, method, request_id FROM after_hours_requests AS r
    WHERE r.caller = asked.caller AND r.method = asked.method AND r.request_id = asked.request_id
    LIMIT 1
) AS r
""")

# Answers of more than a day ago, in bounded batches.
FORGET_REQUESTS = database.Statement(f"""
WITH forgotten AS MATERIALIZED (
        SELECT caller, method, request_id FROM after_hours_requests
        WHERE answered_at < (SELECT {fragments.NOW}) - interval '24 hours'
        ORDER BY answered_at LIMIT :most FOR UPDATE SKIP LOCKED
    )
DELETE FROM after_hours_requests AS r USING forgotten
WHERE (r.caller, r.method, r.request_id) = (forgotten.caller, forgotten.method, forgotten.request_id)
RETURNING r.request_id
""")
