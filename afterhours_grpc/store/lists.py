"""What is read of many sessions at once: those of users, a user's history, all that are active, and those near by."""

import collections.abc
import dataclasses
import datetime
import math

from afterhours_grpc.sessions import location, session
from afterhours_grpc.store import database, fragments, rows

_ACTIVE = """s.expires_at > clock.at AND s.expires_at - clock.at >= CAST(:min_remaining AS interval)"""

_OF_USERS = database.Statement(f"""
SELECT s.*, clock.at AS as_of
FROM (SELECT {fragments.NOW} AS at) AS clock
CROSS JOIN unnest(CAST(:user_ids AS text[])) WITH ORDINALITY AS asked(user_id, ordinal)
CROSS JOIN LATERAL (
    SELECT {fragments.READ} FROM after_hours_sessions AS s
    WHERE s.user_id = asked.user_id AND s.ended_at IS NULL LIMIT 1
) AS s
WHERE {_ACTIVE}
ORDER BY asked.ordinal
""")

_HISTORY = database.Statement(f"""
SELECT {fragments.READ}, clock.at AS as_of
FROM (SELECT {fragments.NOW} AS at) AS clock CROSS JOIN after_hours_sessions AS s
WHERE s.user_id = :user_id AND (s.started_at, s.id) < (CAST(:at AS timestamptz), CAST(:id AS uuid))
ORDER BY s.started_at DESC, s.id DESC LIMIT :most
""")

_ALL = database.Statement(f"""
SELECT {fragments.READ}, clock.at AS as_of
FROM (SELECT {fragments.NOW} AS at) AS clock CROSS JOIN after_hours_sessions AS s
WHERE {fragments.BY_START} AND (s.started_at, s.id) > (CAST(:at AS timestamptz), CAST(:id AS uuid)) AND {_ACTIVE}
ORDER BY s.started_at, s.id LIMIT :most
""")

# The haversine of the angle between a session's fuzzed location and the one that is asked for.
_HAVERSINE = """power(sind((s.fuzzed_latitude - :latitude) / 2), 2)
    + cosd(s.fuzzed_latitude) * cosd(:latitude) * power(sind((s.fuzzed_longitude - :longitude) / 2), 2)"""

_NEAR = database.Statement(f"""
SELECT s.* FROM (
    SELECT s.*, clock.at AS as_of, 2 * CAST(:earth AS float8) * asin(least(1, sqrt({_HAVERSINE}))) AS distance
    FROM (SELECT {fragments.NOW} AS at) AS clock
    CROSS JOIN unnest(CAST(:bands AS float8[]), CAST(:wests AS float8[]), CAST(:easts AS float8[]))
        AS band(number, west, east)
    CROSS JOIN LATERAL (
        SELECT {fragments.READ} FROM after_hours_sessions AS s
        WHERE {fragments.BY_PLACE} AND floor(s.fuzzed_latitude * 100) = band.number
            AND s.fuzzed_longitude BETWEEN band.west AND band.east
        OFFSET 0 -- a probe for each band, whatever the plan thinks of the table's size
    ) AS s
    WHERE {_ACTIVE}
) AS s
WHERE distance <= CAST(:reach AS float8) AND (distance, s.id) > (CAST(:distance AS float8), CAST(:id AS uuid))
ORDER BY distance, s.id LIMIT :most
""")

# Metres of the first try; each further one doubles it until a page is full.
_FIRST_REACH = 500.0


@dataclasses.dataclass(frozen=True, slots=True)
class Near:
    """Which sessions: shown within `radius_meters` of a place, farther than `distance`, or as far with a greater id."""

    place: location.ExactLocation
    radius_meters: float
    distance: float
    id: session.SessionId


class Lists:
    """The sessions in `database`. All raise `errors.StoreUnavailable`."""

    def __init__(self, database: database.Database) -> None:
        self._database = database

    async def of_users(
        self, user_ids: collections.abc.Sequence[session.UserId], min_remaining: datetime.timedelta
    ) -> list[session.Session]:
        """Read the active sessions of distinct users, in their order."""
        found = await self._database.fetch(_OF_USERS, user_ids=list(user_ids), min_remaining=min_remaining)
        return [rows.session_of(row) for row in found]

    async def history(
        self, user_id: session.UserId, before: tuple[datetime.datetime, session.SessionId], most: int
    ) -> list[session.Session]:
        """Read at most `most` sessions of a user, newest first, that come before this (started_at, id)."""
        at, id = before
        found = await self._database.fetch(_HISTORY, user_id=user_id, at=at, id=id, most=most)
        return [rows.session_of(row) for row in found]

    async def active(
        self, min_remaining: datetime.timedelta, after: tuple[datetime.datetime, session.SessionId], most: int
    ) -> list[session.Session]:
        """Read at most `most` active sessions, oldest first, that come after this (started_at, id)."""
        at, id = after
        found = await self._database.fetch(_ALL, min_remaining=min_remaining, at=at, id=id, most=most)
        return [rows.session_of(row) for row in found]

    async def near(
        self, near: Near, min_remaining: datetime.timedelta, most: int
    ) -> list[tuple[session.Session, float]]:
        """Read at most `most` active sessions, and how many metres away each is shown, nearest first."""
        reach = min(near.radius_meters, max(near.distance, 0.0) + _FIRST_REACH)
        while True:
            bands, wests, easts = zip(*_boxes(near.place, reach), strict=True)
            found = await self._database.fetch(
                _NEAR,
                latitude=near.place.latitude,
                longitude=near.place.longitude,
                earth=location.EARTH_METERS,
                bands=bands,
                wests=wests,
                easts=easts,
                reach=reach,
                distance=near.distance,
                id=near.id,
                min_remaining=min_remaining,
                most=most,
            )
            if len(found) == most or reach >= near.radius_meters:
                return [(rows.session_of(row), row["distance"]) for row in found]
            reach = min(near.radius_meters, 2 * reach)


def _boxes(place: location.ExactLocation, reach: float) -> collections.abc.Iterator[tuple[float, float, float]]:
    """Give bands of 0.01 degrees of latitude, and ranges of longitude, that hold all within `reach` metres."""
    # A little more than needed: what is too much is sorted out by its distance.
    angle = 1.000001 * reach / location.EARTH_METERS
    low, high = (place.latitude + sign * math.degrees(angle) for sign in (-1, 1))
    ranges = [(-180.0, 180.0)]
    if low > -90 and high < 90:
        ratio = math.sin(angle) / math.cos(math.radians(place.latitude))
        width = math.degrees(math.asin(min(1.0, ratio))) + 1e-9
        west, east = place.longitude - width, place.longitude + width
        ranges = [(max(west, -180.0), min(east, 180.0))]
        if west <= -180:
            ranges.append((west + 360, 180.0))
        if east >= 180:
            ranges.append((-180.0, east - 360))
    for band in range(math.floor(max(low, -90.0) * 100), math.floor(min(high, 90.0) * 100) + 1):
        for west, east in ranges:
            yield float(band), west, east
