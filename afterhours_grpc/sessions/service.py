"""The use cases. Each transition is tried, and only what came back without an answer is explained, by one read."""

import asyncio
import collections.abc
import typing

from afterhours_grpc import failpoints
from afterhours_grpc.sessions import errors, location, session
from afterhours_grpc.store import batching, database, privacy, rows, store

Answers = list[session.Session | Exception]
_Identity = tuple[session.Method, session.Request]
_Limited = typing.TypeVar("_Limited", session.Start, session.Extend)

_CLOSED: dict[session.Gate, type[errors.SessionError]] = {
    session.Gate.PREMIUM: errors.PremiumRequired,
    session.Gate.VERIFIED: errors.VerificationRequired,
    session.Gate.CONSENT: errors.ConsentRequired,
}


class Timers(typing.Protocol):
    """Where the end of a session is timed. It never fails: what it could not write is swept up later."""

    async def set(self, sessions: collections.abc.Sequence[session.Session]) -> None:
        """Time sessions, or move their timers to a later time."""

    async def cancel(self, ids: collections.abc.Sequence[session.SessionId]) -> None:
        """Drop the timers of sessions that ended."""


class Limiter(typing.Protocol):
    """How often a user may start and extend. It never waits long, and never fails but by its one refusal."""

    async def admit(self, user_id: session.UserId) -> None:
        """Count a call of a user, or raise RateLimited."""


class Sessions:
    """Start, end, extend and get sessions, and keep their timers in step: commit, then set the timer."""

    def __init__(
        self,
        store: store.Store,
        privacy: privacy.Privacy,
        timers: Timers,
        fuzzer: location.Fuzzer,
        limiter: Limiter | None,
    ) -> None:
        self._store = store
        self._privacy = privacy
        self._limiter = limiter
        # Of the calls with a request_id that are in flight: a duplicate is counted once.
        self._admissions: dict[_Identity, asyncio.Task[None]] = {}
        self._timers = timers
        self._fuzzer = fuzzer
        self._starts = batching.Batcher(self._start, _keys)
        self._ends = batching.Batcher(self._end, _keys)
        self._extends = batching.Batcher(self._extend, _keys)
        self._gets = batching.Batcher(self._get, lambda user_id: (user_id,))
        self._exact = batching.Batcher(self._read_exact, lambda call: (str(call.id),), most=1)
        self._kept = batching.Batcher(store.kept, lambda asked: (asked[1].caller, asked))

    async def start(self, call: session.Start) -> session.Session:
        """Open a session.

        Raise RequestIdReused, RateLimited, ProfileRequired, one of the gates' refusals, or SessionAlreadyActive.
        """
        return await self._limited(session.Method.START, call, self._starts)

    async def end(self, call: session.End) -> session.Session:
        """End the active session, or raise RequestIdReused or NoActiveSession."""
        return await self._ends.submit(call, call.deadline)

    async def extend(self, call: session.Extend) -> session.Session:
        """Move the end of the active session.

        Raise RequestIdReused, RateLimited, one of the gates' refusals, or NoActiveSession.
        """
        return await self._limited(session.Method.EXTEND, call, self._extends)

    async def get(self, user_id: session.UserId, deadline: session.Deadline) -> session.Session | None:
        """Read the active session."""
        return await self._gets.submit(user_id, deadline)

    async def exact_location(self, call: session.ExactRead) -> location.ExactLocation:
        """Read where a session was started, and record who did. Raise SessionNotFound or LocationErased."""
        return await self._exact.submit(call, call.deadline)

    async def close(self) -> None:
        """Wait until what was taken has been answered."""
        closing = (
            each.close() for each in (self._starts, self._ends, self._extends, self._gets, self._exact, self._kept)
        )
        for each in closing:
            await each

    async def _limited(
        self,
        method: session.Method,
        call: _Limited,
        batcher: batching.Batcher[_Limited, session.Session],
    ) -> session.Session:
        if not self._limiter:
            return await batcher.submit(call, call.deadline)
        if not call.request:
            await self._limiter.admit(call.user_id)
            return await batcher.submit(call, call.deadline)
        identity = (method, call.request)
        admission = self._admissions.get(identity)
        if admission:
            await asyncio.shield(admission)
            return await batcher.submit(call, call.deadline)
        admission = self._admissions[identity] = asyncio.create_task(self._admit(identity, call))
        try:
            await asyncio.shield(admission)
            return await batcher.submit(call, call.deadline)
        finally:
            del self._admissions[identity]

    async def _admit(self, identity: _Identity, call: _Limited) -> None:
        """Count a call, unless it was applied before: a replay is answered whatever the limit."""
        assert self._limiter  # noqa: S101 - asked before
        if not await self._kept.submit(identity, call.deadline):
            await self._limiter.admit(call.user_id)

    async def _start(self, calls: list[session.Start]) -> Answers:
        candidates = [self._fuzzer.candidates(call.user_id, call.exact) for call in calls]
        opened = await self._store.start(calls, candidates)
        failpoints.reach(failpoints.Point.STARTED)
        await self._timers.set([each for each in opened if each])
        failpoints.reach(failpoints.Point.TIMED)
        return await self._explained(session.Method.START, calls, opened)

    async def _end(self, calls: list[session.End]) -> Answers:
        ended = await self._store.end(calls, session.EndReason.USER)
        await self._timers.cancel([each.id for each in ended if each])
        return await self._explained(session.Method.END, calls, ended)

    async def _extend(self, calls: list[session.Extend]) -> Answers:
        extended = await self._store.extend(calls)
        await self._timers.set([each for each in extended if each])
        return await self._explained(session.Method.EXTEND, calls, extended)

    async def _get(self, user_ids: list[session.UserId]) -> list[session.Session | None]:
        return await self._store.get(user_ids)

    async def _read_exact(self, calls: list[session.ExactRead]) -> list[location.ExactLocation]:
        return [await self._privacy.read_exact(call) for call in calls]

    async def _explained(
        self,
        method: session.Method,
        calls: collections.abc.Sequence[rows.Call],
        found: list[session.Session | None],
    ) -> Answers:
        refused = [call for call, each in zip(calls, found, strict=True) if each is None]
        reasons: collections.abc.Iterable[session.Session | Exception] = ()
        if refused:
            try:
                explanations = await self._store.explain(method, refused)
                reasons = [_why(method, *each) for each in zip(refused, explanations, strict=True)]
            except (errors.StoreUnavailable, database.Retry) as error:
                # The others were applied, and are told so.
                reasons = [error] * len(refused)
        reason = iter(reasons)
        return [each or next(reason) for each in found]


class Profiles:
    """Put, get and delete profiles."""

    def __init__(self, store: store.Store, timers: Timers) -> None:
        self._store = store
        self._timers = timers
        # One statement a call, in a task that a cancelled caller leaves behind to finish.
        self._puts = batching.Batcher(self._put, lambda profile: (profile.user_id,), most=1)
        self._gets = batching.Batcher(self._get, lambda user_id: (user_id,))
        self._deletes = batching.Batcher(self._delete, lambda user_id: (user_id,), most=1)

    async def put(self, profile: session.Profile, deadline: session.Deadline) -> session.Profile:
        """Create or replace a profile."""
        return await self._puts.submit(profile, deadline)

    async def get(self, user_id: session.UserId, deadline: session.Deadline) -> session.Profile:
        """Read a profile, or raise ProfileNotFound."""
        return await self._gets.submit(user_id, deadline)

    async def delete(self, user_id: session.UserId, deadline: session.Deadline) -> None:
        """Delete a profile and end its active session, or raise ProfileNotFound."""
        await self._deletes.submit(user_id, deadline)

    async def close(self) -> None:
        """Wait until what was taken has been answered."""
        for batcher in (self._puts, self._gets, self._deletes):
            await batcher.close()

    async def _put(self, profiles: list[session.Profile]) -> list[session.Profile]:
        for profile in profiles:
            await self._timers.cancel(await self._store.put_profile(profile))
        return profiles

    async def _get(self, user_ids: list[session.UserId]) -> list[session.Profile | Exception]:
        profiles = await self._store.get_profiles(user_ids)
        return [profiles.get(user_id) or errors.ProfileNotFound() for user_id in user_ids]

    async def _delete(self, user_ids: list[session.UserId]) -> list[Exception | None]:
        answers: list[Exception | None] = []
        for user_id in user_ids:
            found, ended = await self._store.delete_profile(user_id)
            await self._timers.cancel(ended)
            answers.append(None if found else errors.ProfileNotFound())
        return answers


def _keys(call: rows.Call) -> tuple[collections.abc.Hashable, ...]:
    """Give what two calls of one statement must not share."""
    if call.request is None:
        return (call.user_id,)
    return (call.user_id, (call.request.caller, call.request.id))


def _why(method: session.Method, call: rows.Call, explanation: rows.Explanation) -> session.Session | Exception:
    """Decide what a call without an answer is told, in the order of the contract's checks."""
    kept = explanation.kept
    if kept is not None:
        same = call.request is not None and call.request.fingerprint == kept.fingerprint
        return kept.session if same else errors.RequestIdReused()
    if method is session.Method.START and not explanation.has_profile:
        return errors.ProfileRequired(call.user_id)
    if method is not session.Method.END and explanation.closed:
        return _CLOSED[explanation.closed]()
    starting = method is session.Method.START
    if starting is (explanation.active is not None):
        return errors.SessionAlreadyActive(*explanation.active) if explanation.active else errors.NoActiveSession()
    if field := explanation.too_long(call):
        return errors.InvalidRequest((errors.Violation(field, "must not move the end past the year 9998"),))
    # Nothing stands against it now: it was the deadline, or what did ended, or began, between the two statements.
    return database.Retry()
