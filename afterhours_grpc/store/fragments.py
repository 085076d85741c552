"""What the statements of `transitions` and `endings` are made of; see the former for what they keep to."""

import datetime

from afterhours_grpc.sessions import session

EXPIRY_LIMIT = f"TIMESTAMPTZ '{session.EXPIRY_LIMIT}'"
# Ended sessions and events from before the CHECK on EXPIRY_LIMIT may lie beyond it, where the driver decodes no time,
# and one such row would fail the whole statement. What reads many rows sees the last instant that is allowed.
_LAST = f"TIMESTAMPTZ '{session.EXPIRY_LIMIT - datetime.datetime.resolution}'"

SESSION = """s.id, s.user_id, s.started_at, s.expires_at, s.ended_at, s.end_reason,
    s.fuzzed_latitude, s.fuzzed_longitude, s.fuzz_radius_meters, s.warn_at"""


def readable(expires_at: str) -> str:
    """Return an expires_at that can be decoded, whatever is stored."""
    return f"LEAST({expires_at}, {_LAST})"


# SESSION, for statements that read those of many users.
READ = SESSION.replace("s.expires_at", f"{readable('s.expires_at')} AS expires_at")

# The database's clock is the only one; tests move it by this parameter.
NOW = "clock_timestamp() + CAST(:clock_offset AS interval)"

# A plan that is made while a partial index has one page may walk through it, filtering, and does so still when it has
# thousands. So each condition fits the index that it is meant for and no other: by user `ended_at IS NULL`, by due time
# this one, whose second half is always true, and by id one that no index has.
BY_DUE = "ended_at IS NULL AND expires_at > '-infinity'"
BY_START = "ended_at IS NULL AND started_at > '-infinity'"
BY_PLACE = "ended_at IS NULL AND fuzzed_latitude > '-infinity'"
BY_WARNING = "warn_at > '-infinity'"
OPEN = "num_nulls(s.ended_at) = 1"

# Reading the count of the locked rows makes the clock wait until the last lock is held.
CLOCK = f"""
    clock AS MATERIALIZED (
        SELECT {NOW} AS at, clock_timestamp() - statement_timestamp() AS waited
        FROM (SELECT count(*) FROM locked) AS after_the_locks
    )"""

# What was locked before its call's deadline: who was told DEADLINE_EXCEEDED must not find it applied later.
IN_TIME = "ARRAY(SELECT locked.id FROM locked CROSS JOIN clock WHERE clock.waited < locked.time_left)"


def fresh(columns: str, arrays: str) -> str:
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


LOCKED_BY_USER = """
    locked AS MATERIALIZED (
        SELECT asked.*, s.id FROM {asked} AS asked CROSS JOIN LATERAL (
            SELECT id FROM after_hours_sessions
            WHERE user_id = asked.user_id AND ended_at IS NULL
            LIMIT 1 FOR UPDATE
        ) AS s
    )"""

KEPT = """
    kept AS (
        INSERT INTO after_hours_requests (caller, method, request_id, fingerprint,
            session_id, expires_at, ended_at, end_reason, answered_at)
        SELECT fresh.caller, :method, fresh.request_id, fresh.fingerprint,
            s.id, s.expires_at, s.ended_at, s.end_reason, clock.at
        FROM {changed} AS s JOIN fresh USING (user_id) CROSS JOIN clock
        WHERE fresh.request_id IS NOT NULL
    )"""

# The calls whose users have a profile, which is locked against its removal and against what closes a gate.
ELIGIBLE = """
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


def opened_gates(profile: str) -> str:
    """Give the condition under which no gate is closed for a profile."""
    return " AND ".join(f"NOT {each}" for each in closed(profile))


def warn_at(expires_at: str) -> str:
    """Give when a session that is to end then is warned of: not at all if no more than the lead is left by now."""
    lead = "CAST(:warning_lead AS interval)"
    return f"CASE WHEN {lead} > interval '0' AND {expires_at} - {lead} > clock.at THEN {expires_at} - {lead} END"


def noted(kind: str, changed: str, at: str = "clock.at", after: str | None = None) -> str:
    """Return a clause that writes the event of each row of `changed`, in the transaction that changes it.

    Events come in the order in which their ids are drawn. Postgres runs clauses in any order unless one reads another,
    so `after` names the kind of events that come first.
    """
    earlier = f" CROSS JOIN (SELECT count(*) FROM noted_{after.lower()}) AS after_those" if after else ""
    return f"""
    noted_{kind.lower()} AS (
        INSERT INTO after_hours_outbox (type, happened_at, session_id, user_id, started_at, expires_at, ended_at,
            end_reason, fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters)
        SELECT '{kind}', {at}, s.id, s.user_id, s.started_at, s.expires_at, s.ended_at,
            s.end_reason, s.fuzzed_latitude, s.fuzzed_longitude, s.fuzz_radius_meters
        FROM {changed} AS s CROSS JOIN clock{earlier}
        RETURNING id
    )"""
