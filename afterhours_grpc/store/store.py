"""The transitions of sessions, a set at a time, and what is read of them.

Each takes calls of distinct users and distinct request_ids, sorted by user, and gives one answer a call, in their
order. Raises `errors.StoreUnavailable`, and `database.Retry` if the whole set was taken back.
"""

import asyncio
import collections.abc
import dataclasses
import datetime

from afterhours_grpc import failpoints
from afterhours_grpc.sessions import location, session
from afterhours_grpc.store import database, endings, queries, rows, transitions


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What the operator asks for: the gates of starts and extensions, and how long before an end it is warned of."""

    gates: collections.abc.Set[session.Gate] = frozenset()
    warning_lead: datetime.timedelta = datetime.timedelta()


@dataclasses.dataclass(frozen=True, slots=True)
class Fired:
    """What became of a timer that fired: `over`, or `due` later, or neither: another one holds the session's row."""

    id: session.SessionId
    over: bool
    due: datetime.datetime | None


_NO_RULES = Rules()

# A session and when it, or its warning, is due; and the last due time of a slice of sessions, and how many they are.
Due = tuple[session.SessionId, datetime.datetime]
Slice = tuple[datetime.datetime, int]


class Store:
    """The sessions and profiles in `database`, by the operator's `rules`.

    Each transition leaves an event in the outbox; `noted` is set when there may be some.
    """

    def __init__(self, database: database.Database, rules: Rules = _NO_RULES) -> None:
        self.noted = asyncio.Event()
        self._database = database
        self._gates = {gate.value: gate in rules.gates for gate in session.Gate}
        self._timed = {**self._gates, "warning_lead": rules.warning_lead}

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
        found = await self._database.fetch(
            transitions.START,
            **rows.asked(session.Method.START, calls),
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
            **self._timed,
        )
        self.noted.set()
        return rows.by_ordinal(found, len(calls))

    async def end(
        self, calls: collections.abc.Sequence[session.End], reason: session.EndReason
    ) -> list[session.Session | None]:
        """End active sessions. None: applied before, or none active (an overdue one has been closed then)."""
        found = await self._database.fetch(endings.END, **rows.asked(session.Method.END, calls), reason=reason.value)
        self.noted.set()
        return [ended if ended and ended.end_reason is reason else None for ended in rows.by_ordinal(found, len(calls))]

    async def extend(self, calls: collections.abc.Sequence[session.Extend]) -> list[session.Session | None]:
        """Move the ends of active sessions. None: applied before, a closed gate, or none active."""
        found = await self._database.fetch(
            transitions.EXTEND_GATED if any(self._gates.values()) else transitions.EXTEND,
            **rows.asked(session.Method.EXTEND, calls),
            additionals=[call.additional for call in calls],
            **self._timed,
        )
        self.noted.set()
        return rows.by_ordinal(found, len(calls))

    async def get(self, user_ids: collections.abc.Sequence[session.UserId]) -> list[session.Session | None]:
        """Read active sessions. None: none active."""
        found = await self._database.fetch(queries.GET, user_ids=list(user_ids))
        return rows.by_ordinal(found, len(user_ids))

    async def explain(
        self, method: session.Method, calls: collections.abc.Sequence[rows.Call]
    ) -> list[rows.Explanation]:
        """Read what stands against calls."""
        found = await self._database.fetch(queries.EXPLAIN, **rows.asked(method, calls), **self._gates)
        by_ordinal = {row["ordinal"]: rows.explanation(row) for row in found}
        return [by_ordinal[ordinal] for ordinal in range(1, len(calls) + 1)]

    async def expire(self, ids: collections.abc.Sequence[session.SessionId]) -> list[Fired]:
        """Close those of these sessions that are overdue, as EXPIRED."""
        found = await self._database.fetch(endings.EXPIRE, ids=list(ids), reason=None)
        self.noted.set()
        return [Fired(row["id"], row["over"], row["due"]) for row in found]

    async def warn(self, ids: collections.abc.Sequence[session.SessionId]) -> list[Fired]:
        """Note of those of these sessions that are to end within the lead that they are, once for each end."""
        found = await self._database.fetch(endings.WARN, ids=list(ids))
        self.noted.set()
        return [Fired(row["id"], row["over"], row["due"]) for row in found]

    async def expire_overdue(self, most: int) -> list[session.SessionId]:
        """Close at most `most` overdue sessions, the longest overdue first; rows that others hold are left out."""
        found = await self._database.fetch(endings.EXPIRE_OVERDUE, most=most, reason=None)
        self.noted.set()
        return [row["id"] for row in found]

    async def kept(self, asked: collections.abc.Sequence[tuple[session.Method, session.Request]]) -> list[bool]:
        """Read which calls were applied before under their request_id."""
        keys = [(request.caller, method.value, request.id) for method, request in asked]
        callers, methods, request_ids = zip(*keys, strict=True)
        found = await self._database.fetch(queries.KEPT, callers=callers, methods=methods, request_ids=request_ids)
        kept = {(row["caller"], row["method"], row["request_id"]) for row in found}
        return [key in kept for key in keys]

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
            ended = await _end_of_user(run, profile.user_id, session.EndReason.INELIGIBLE)
        self.noted.set()
        return ended

    async def get_profiles(
        self, user_ids: collections.abc.Sequence[session.UserId]
    ) -> dict[session.UserId, session.Profile]:
        """Read profiles, by user."""
        found = await self._database.fetch(queries.GET_PROFILES, user_ids=list(user_ids))
        return {row["user_id"]: session.Profile(**row) for row in found}

    async def delete_profile(self, user_id: session.UserId) -> tuple[bool, list[session.SessionId]]:
        """Delete a profile and end its active session, both or neither: whether there was one, and what ended."""
        async with self._database.transaction() as run:
            if not await run(queries.DELETE_PROFILE, user_id=user_id):
                return False, []
            failpoints.reach(failpoints.Point.DELETED)
            ended = await _end_of_user(run, user_id, session.EndReason.PROFILE_REMOVED)
        self.noted.set()
        return True, ended

    async def clock(self) -> datetime.datetime:
        """Read the database's clock."""
        found = await self._database.fetch(queries.CLOCK)
        at: datetime.datetime = found[0]["at"]
        return at

    async def active_due(
        self, after: datetime.datetime, id: session.SessionId, until: datetime.datetime, most: int
    ) -> list[Due]:
        """Read at most `most` open sessions by (expires_at, id): those after (`after`, `id`), due by `until`."""
        found = await self._database.fetch(queries.ACTIVE_DUE, after=after, id=id, until=until, most=most)
        return [(row["id"], row["due"]) for row in found]

    async def warnings_due(
        self, after: datetime.datetime, id: session.SessionId, until: datetime.datetime, most: int
    ) -> list[Due]:
        """Read the same of the sessions that are to be warned of, by (warn_at, id)."""
        found = await self._database.fetch(queries.WARNINGS_DUE, after=after, id=id, until=until, most=most)
        return [(row["id"], row["due"]) for row in found]

    async def active_slices(self, after: datetime.datetime, rows: int, most: int) -> list[Slice]:
        """Count the `most` open sessions that are due first after `after`, in slices of `rows`, soonest first."""
        found = await self._database.fetch(queries.ACTIVE_SLICES, after=after, rows=rows, most=most)
        return [(row["until"], row["sessions"]) for row in found]

    async def warning_slices(self, after: datetime.datetime, rows: int, most: int) -> list[Slice]:
        """Count the same of the sessions that are to be warned of."""
        found = await self._database.fetch(queries.WARNING_SLICES, after=after, rows=rows, most=most)
        return [(row["until"], row["sessions"]) for row in found]

    async def still_to_warn(
        self, ids: collections.abc.Sequence[session.SessionId]
    ) -> dict[session.SessionId, datetime.datetime]:
        """Read which of these sessions are to be warned of yet, and when."""
        found = await self._database.fetch(queries.STILL_TO_WARN, ids=list(ids))
        return {row["id"]: row["due"] for row in found}

    async def overdue(self) -> tuple[int, datetime.timedelta]:
        """Count the overdue sessions that nothing has closed yet, and give for how long at most."""
        [row] = await self._database.fetch(queries.OVERDUE)
        return row["overdue"], row["longest"]

    async def still_active(
        self, ids: collections.abc.Sequence[session.SessionId]
    ) -> dict[session.SessionId, datetime.datetime]:
        """Read which of these sessions are open, and when they are due."""
        found = await self._database.fetch(queries.STILL_ACTIVE, ids=list(ids))
        return {row["id"]: row["due"] for row in found}


async def _end_of_user(
    run: database.Run, user_id: session.UserId, reason: session.EndReason
) -> list[session.SessionId]:
    found = await run(endings.END_OF_USERS, user_ids=[user_id], reason=reason.value)
    return [row["id"] for row in found]
