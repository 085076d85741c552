"""Between the domain and rows: what a call is for a statement, and what a row is for the domain."""

import collections.abc
import dataclasses
import datetime

from afterhours_grpc.sessions import location, session
from afterhours_grpc.store import database

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
    at: datetime.datetime

    def too_long(self, call: Call) -> str | None:
        """Return the field that would have a session expire at EXPIRY_LIMIT or later, or None."""
        # Subtracted from the limit, for a sum may be more than datetime holds.
        match call:
            case session.Start() if self.at >= session.EXPIRY_LIMIT - call.duration:
                return "duration"
            case session.Extend() if self.active and self.active[1] >= session.EXPIRY_LIMIT - call.additional:
                return "additional_duration"
        return None


def asked(method: session.Method, calls: collections.abc.Sequence[Call]) -> dict[str, object]:
    """Give the parameters that are of every call."""
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


def by_ordinal(rows: list[database.Row], count: int) -> list[session.Session | None]:
    """Return the session that each of `count` calls was answered, if it was. Rows without an ordinal are no answers."""
    found = {row["ordinal"]: session_of(row) for row in rows if row["ordinal"]}
    return [found.get(ordinal) for ordinal in range(1, count + 1)]


def session_of(row: database.Row) -> session.Session:
    """Return the session of a row; of an event whose user was erased, without user and place.

    A reason that only a newer release knows, which may run on the same database, is left out.
    """
    place = row["fuzzed_latitude"], row["fuzzed_longitude"]
    return session.Session(
        id=row["id"],
        user_id=row["user_id"] or session.UserId(""),
        started_at=row["started_at"],
        expires_at=row["expires_at"],
        ended_at=row["ended_at"],
        end_reason=session.EndReason.__members__.get(row["end_reason"]),
        fuzzed=None if None in place else location.FuzzedLocation(*place),
        fuzz_radius_meters=row["fuzz_radius_meters"] or 0.0,
        as_of=row["as_of"],
        warn_at=row.get("warn_at"),
    )


def explanation(row: database.Row) -> Explanation:
    """Give what stood against a call."""
    return Explanation(
        kept=Kept(row["fingerprint"], session_of(row)) if row["fingerprint"] else None,
        has_profile=row["has_profile"],
        closed=next((gate for gate, closed in zip(session.Gate, row["closed"], strict=True) if closed), None)
        if row["has_profile"]
        else None,
        active=(row["active_id"], row["active_expires_at"]) if row["active_id"] else None,
        at=row["at"],
    )
