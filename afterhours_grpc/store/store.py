"""The transitions of sessions, a set at a time, and what is read of them.

Each takes calls of distinct users and distinct request_ids, sorted by user, and gives one answer a call, in their
order. Raises `errors.StoreUnavailable`, and `database.Retry` if the whole set was taken back.
"""

import collections.abc
import dataclasses
import datetime

from afterhours_grpc import failpoints
from afterhours_grpc.sessions import location, session
from afterhours_grpc.store import database, queries, transitions

Call = session.Start | session.End | session.Extend


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """The first answer to a request_id, and the fingerprint of the body that it was given for."""

    fingerprint: bytes
    session: session.Session


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """What stood against a call: read once, after it came back without an answer."""

    kept: Kept | None
    has_profile: bool
    closed: session.Gate | None
    active: tuple[session.SessionId, datetime.datetime] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Expiry:
    """What became of a session whose timer fired: `over`, or `due` later, or neither: another one holds its row."""

    id: session.SessionId
    over: bool
    due: datetime.datetime | None


class Store:
    """The sessions and profiles in `database`. Starts and extensions need what `gates` ask for."""

    def __init__(self, database: database.Database, gates: collections.abc.Set[session.Gate] = frozenset()) -> None:
        self._database = database
        self._gates = {gate.value: gate in gates for gate in session.Gate}

    async def start(
        self,
        calls: collections.abc.Sequence[session.Start],
        candidates: collections.abc.Sequence[tuple[location.Candidate, ...]],
    ) -> list[session.Session | None]:
        """Open sessions, each shown at one of its candidates: the user's last one, or else the first.

        None: applied before, no profile, a closed gate, or an active session.
        """
        places = [
            (ordinal, rank, place) for ordinal, choice in enumerate(candidates, 1) for rank, place in enumerate(choice)
        ]
        rows = await self._database.fetch(
            transitions.START,
            **_asked(session.Method.START, calls),
            durations=[call.duration for call in calls],
            latitudes=[call.exact.latitude for call in calls],
            longitudes=[call.exact.longitude for call in calls],
            candidate_ordinals=[ordinal for ordinal, _, _ in places],
            candidate_ranks=[rank for _, rank, _ in places],
            key_versions=[place.key_version for _, _, place in places],
            cells=[place.cell for _, _, place in places],
            fuzzed_latitudes=[place.fuzzed.latitude for _, _, place in places],
            fuzzed_longitudes=[place.fuzzed.longitude for _, _, place in places],
            radius_meters=location.RADIUS_METERS,
            **self._gates,
        )
        return _by_ordinal(rows, len(calls))

    async def end(
        self, calls: collections.abc.Sequence[session.End], reason: session.EndReason
    ) -> list[session.Session | None]:
        """End active sessions. None: applied before, or none active (an overdue one has been closed then)."""
        rows = await self._database.fetch(transitions.END, **_asked(session.Method.END, calls), reason=reason.value)
        return [ended if ended and ended.end_reason is reason else None for ended in _by_ordinal(rows, len(calls))]

    async def extend(self, calls: collections.abc.Sequence[session.Extend]) -> list[session.Session | None]:
        """Move the ends of active sessions. None: applied before, a closed gate, or none active."""
        rows = await self._database.fetch(
            transitions.EXTEND_GATED if any(self._gates.values()) else transitions.EXTEND,
            **_asked(session.Method.EXTEND, calls),
            additionals=[call.additional for call in calls],
            **self._gates,
        )
        return _by_ordinal(rows, len(calls))

    async def get(self, user_ids: collections.abc.Sequence[session.UserId]) -> list[session.Session | None]:
        """Read active sessions. None: none active."""
        rows = await self._database.fetch(queries.GET, user_ids=list(user_ids))
        return _by_ordinal(rows, len(user_ids))

    async def explain(self, method: session.Method, calls: collections.abc.Sequence[Call]) -> list[Explanation]:
        """Read what stands against calls."""
        rows = await self._database.fetch(queries.EXPLAIN, **_asked(method, calls), **self._gates)
        by_ordinal = {row["ordinal"]: _explanation(row) for row in rows}
        return [by_ordinal[ordinal] for ordinal in range(1, len(calls) + 1)]

    async def expire(self, ids: collections.abc.Sequence[session.SessionId]) -> list[Expiry]:
        """Close those of these sessions that are overdue, as EXPIRED."""
        rows = await self._database.fetch(transitions.EXPIRE, ids=list(ids), reason=None)
        return [Expiry(row["id"], row["over"], row["due"]) for row in rows]

    async def expire_overdue(self, most: int) -> list[session.SessionId]:
        """Close at most `most` overdue sessions, the longest overdue first; rows that others hold are left out."""
        rows = await self._database.fetch(transitions.EXPIRE_OVERDUE, most=most, reason=None)
        return [row["id"] for row in rows]

    async def kept(self, asked: collections.abc.Sequence[tuple[session.Method, session.Request]]) -> list[bool]:
        """Read which calls were applied before under their request_id."""
        keys = [(request.caller, method.value, request.id) for method, request in asked]
        callers, methods, request_ids = zip(*keys, strict=True)
        rows = await self._database.fetch(queries.KEPT, callers=callers, methods=methods, request_ids=request_ids)
        found = {(row["caller"], row["method"], row["request_id"]) for row in rows}
        return [key in found for key in keys]

    async def put_profile(self, profile: session.Profile) -> list[session.SessionId]:
        """Create or replace a profile, and end an active session if that withdraws what a gate asks for: what ended."""
        values = dataclasses.asdict(profile)
        if not any(self._gates.values()):
            await self._database.fetch(queries.PUT_PROFILE, **values)
            return []
        async with self._database.transaction() as run:
            [put] = await run(queries.PUT_PROFILE_GATED, **values, **self._gates)
            if not put["withdrawn"]:
                return []
            failpoints.reach(failpoints.Point.PUT)
            return await _end_of_user(run, profile.user_id, session.EndReason.INELIGIBLE)

    async def get_profiles(
        self, user_ids: collections.abc.Sequence[session.UserId]
    ) -> dict[session.UserId, session.Profile]:
        """Read profiles, by user."""
        rows = await self._database.fetch(queries.GET_PROFILES, user_ids=list(user_ids))
        return {row["user_id"]: session.Profile(**row) for row in rows}

    async def delete_profile(self, user_id: session.UserId) -> tuple[bool, list[session.SessionId]]:
        """Delete a profile and end its active session, both or neither: whether there was one, and what ended."""
        async with self._database.transaction() as run:
            if not await run(queries.DELETE_PROFILE, user_id=user_id):
                return False, []
            failpoints.reach(failpoints.Point.DELETED)
            return True, await _end_of_user(run, user_id, session.EndReason.PROFILE_REMOVED)

    async def clock(self) -> datetime.datetime:
        """Read the database's clock."""
        rows = await self._database.fetch(queries.CLOCK)
        at: datetime.datetime = rows[0]["at"]
        return at

    async def active_after(
        self, expires_at: datetime.datetime, id: session.SessionId, most: int
    ) -> list[tuple[session.SessionId, datetime.datetime]]:
        """Read at most `most` open sessions and when they are due, by (expires_at, id), after this one."""
        rows = await self._database.fetch(queries.ACTIVE_AFTER, expires_at=expires_at, id=id, most=most)
        return [(row["id"], row["expires_at"]) for row in rows]

    async def overdue(self) -> tuple[int, datetime.timedelta]:
        """Count the overdue sessions that nothing has closed yet, and give for how long at most."""
        [row] = await self._database.fetch(queries.OVERDUE)
        return row["overdue"], row["longest"]

    async def still_active(self, ids: collections.abc.Sequence[session.SessionId]) -> set[session.SessionId]:
        """Read which of these sessions are open."""
        rows = await self._database.fetch(queries.STILL_ACTIVE, ids=list(ids))
        return {row["id"] for row in rows}


async def _end_of_user(
    run: database.Run, user_id: session.UserId, reason: session.EndReason
) -> list[session.SessionId]:
    rows = await run(transitions.END_OF_USERS, user_ids=[user_id], reason=reason.value)
    return [row["id"] for row in rows]


def _asked(method: session.Method, calls: collections.abc.Sequence[Call]) -> dict[str, object]:
    requests = [call.request for call in calls]
    return {
        "method": method.value,
        "ordinals": list(range(1, len(calls) + 1)),
        "user_ids": [call.user_id for call in calls],
        "callers": [request and request.caller for request in requests],
        "request_ids": [request and request.id for request in requests],
        "deadlines": [call.deadline.at for call in calls],
        "fingerprints": [request and request.fingerprint for request in requests],
    }


def _by_ordinal(rows: list[database.Row], count: int) -> list[session.Session | None]:
    found = {row["ordinal"]: _session(row) for row in rows}
    return [found.get(ordinal) for ordinal in range(1, count + 1)]


def _session(row: database.Row) -> session.Session:
    reason = row["end_reason"]
    return session.Session(
        id=row["id"],
        user_id=row["user_id"],
        started_at=row["started_at"],
        expires_at=row["expires_at"],
        ended_at=row["ended_at"],
        end_reason=reason and session.EndReason(reason),
        fuzzed=location.FuzzedLocation(row["fuzzed_latitude"], row["fuzzed_longitude"]),
        fuzz_radius_meters=row["fuzz_radius_meters"],
        as_of=row["as_of"],
    )


def _explanation(row: database.Row) -> Explanation:
    return Explanation(
        kept=Kept(row["fingerprint"], _session(row)) if row["fingerprint"] else None,
        has_profile=row["has_profile"],
        closed=next((gate for gate, closed in zip(session.Gate, row["closed"], strict=True) if closed), None)
        if row["has_profile"]
        else None,
        active=(row["active_id"], row["active_expires_at"]) if row["active_id"] else None,
    )
